/* Plans, and what they keep at home. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "crc32.h"
#include "error.h"
#include "store_internal.h"

enum { DIRECT_ALIGNMENT = 4096 };

/* Bytes [offset, offset + bytes) of the file into target. EINTR and short reads go on. */
static int32_t read_fully(int fd, uint8_t *target, int64_t bytes, int64_t offset, int64_t *done) {
    *done = 0;
    while (*done < bytes) {
        ssize_t n = pread(fd, target + *done, (size_t)(bytes - *done), (off_t)(offset + *done));
        if (n == 0) break;
        if (n < 0 && errno != EINTR) return errno;
        if (n > 0) *done += n;
    }
    return 0;
}

/* O_DIRECT wants offset, size and address aligned: the enclosing blocks go through the bounce
 * buffer. Neighbours are never written from there, so what was checked stays what is used. */
static int32_t read_direct(int fd, uint8_t *target, int64_t bytes, int64_t offset, int64_t *done,
                           uint8_t *bounce) {
    int64_t start = offset / DIRECT_ALIGNMENT * DIRECT_ALIGNMENT;
    int64_t end = (offset + bytes + DIRECT_ALIGNMENT - 1) / DIRECT_ALIGNMENT * DIRECT_ALIGNMENT;
    int64_t got;
    int32_t code = read_fully(fd, bounce, end - start, start, &got);
    got -= offset - start; /* the file's last block may be short */
    *done = got < 0 ? 0 : got > bytes ? bytes : got;
    if (code == 0) memcpy(target, bounce + (offset - start), (size_t)*done);
    return *done == bytes ? 0 : code;
}

int32_t bapq_read_chunk(const bapq_store *store, int32_t p, int32_t chunk, uint8_t *target,
                        uint8_t *bounce, bapq_error *error) {
    int fd = store->plane[p].fd;
    const bapq_extent *extent = &store->homes->plane[p].extent[chunk];
    int64_t offset = (int64_t)extent->offset, done = 0;
    int32_t code = bounce ? read_direct(fd, target, extent->bytes, offset, &done, bounce)
                          : read_fully(fd, target, extent->bytes, offset, &done);
    int32_t status = BAPQ_OK;
    if (code != 0) {
        status = bapq_fail(error, BAPQ_IO, "plane %s cannot be read at chunk %d: %s",
                           bapq_plane_name(p), chunk, strerror(code));
        error->os_errno = code;
    } else if (done < extent->bytes) {
        status = bapq_fail(
            error, BAPQ_TRUNCATED, "plane %s ends inside chunk %d: %lld of %u bytes at offset %lld",
            bapq_plane_name(p), chunk, (long long)done, extent->bytes, (long long)offset);
    } else {
        uint32_t crc = bapq_crc32(target, extent->bytes);
        if (crc != extent->crc32)
            status = bapq_fail(error, BAPQ_CHECKSUM,
                               "plane %s, chunk %d: CRC-32 is %08x, the bank says %08x",
                               bapq_plane_name(p), chunk, crc, extent->crc32);
    }
    if (status != BAPQ_OK) {
        error->layer = store->layer_of[chunk];
        error->chunk = chunk;
    }
    return status;
}

/* ---- homes ---- */

void bapq_enter_homes(bapq_store *store, homes *h) {
    store->homes = h;
    pthread_mutex_lock(&h->lock);
    store->neighbour = h->stores;
    h->stores = store;
    store->bytes_there_before = h->bytes_there;
    pthread_mutex_unlock(&h->lock);
}

void bapq_claim(bapq_store *store, int32_t p, int32_t chunk) {
    const plane_home *home = &store->homes->plane[p];
    if (store->plane[p].claims[chunk]++ > 0) return;
    home->claimants[chunk]++;
    if (home->state[chunk] == HOME_THERE) store->home_bytes += home->extent[chunk].bytes;
}

void bapq_arrived(bapq_store *store, int32_t p, int32_t chunk) {
    const plane_home *home = &store->homes->plane[p];
    int64_t bytes = home->extent[chunk].bytes;
    home->state[chunk] = HOME_THERE;
    store->homes->bytes_there += bytes;
    for (bapq_store *s = store->homes->stores; s; s = s->neighbour)
        if (s->plane[p].claims[chunk] > 0) s->home_bytes += bytes;
}

/* Takes one claim away; true when bytes at home lost their last one, of all stores. */
static bool drop_claim(bapq_store *store, int32_t p, int32_t chunk) {
    const plane_home *home = &store->homes->plane[p];
    if (--store->plane[p].claims[chunk] > 0) return false;
    home->claimants[chunk]--;
    if (home->state[chunk] != HOME_THERE) return false;
    store->home_bytes -= home->extent[chunk].bytes;
    if (home->claimants[chunk] > 0) return false;
    home->state[chunk] = HOME_AWAY;
    store->homes->bytes_there -= home->extent[chunk].bytes;
    return true;
}

void bapq_unclaim(bapq_store *store, int32_t p, int32_t chunk) {
    if (drop_claim(store, p, chunk)) bapq_homes_release_gaps(store->homes, p);
}

void bapq_leave_homes(bapq_store *store) {
    homes *h = store->homes;
    pthread_mutex_lock(&h->lock);
    for (int32_t p = 0; p < BAPQ_PLANES; p++) {
        int32_t *claims = store->plane[p].claims;
        bool left = false;
        for (int32_t chunk = 0; claims && chunk < store->chunk_count; chunk++) {
            if (claims[chunk] == 0) continue;
            claims[chunk] = 1;
            left |= drop_claim(store, p, chunk);
        }
        if (left) bapq_homes_release_gaps(h, p);
    }
    bapq_store **link = &h->stores;
    while (*link != store) link = &(*link)->neighbour;
    *link = store->neighbour;
    pthread_mutex_unlock(&h->lock);
    bapq_homes_leave(h);
}

static bool holds_plane(const bapq_store *store, const plan *p, int32_t plane, int32_t chunk) {
    return p->claimed[chunk] & 1 << plane && store->homes->plane[plane].state[chunk] == HOME_THERE;
}

bool bapq_plan_holds(const bapq_store *store, const plan *p, int32_t level, int32_t chunk) {
    int32_t planes[2];
    int32_t n = bapq_level_planes(level, planes);
    for (int32_t i = 0; i < n; i++)
        if (!holds_plane(store, p, planes[i], chunk)) return false;
    return true;
}

int64_t bapq_missing_bytes(const bapq_store *store, const plan *p, int32_t chunk) {
    int32_t planes[2];
    int32_t n = bapq_level_planes(p->level[chunk], planes);
    int64_t bytes = 0;
    for (int32_t i = 0; i < n; i++) {
        if (!holds_plane(store, p, planes[i], chunk))
            bytes += ((int64_t)store->homes->plane[planes[i]].extent[chunk].bytes + 63) / 64 * 64;
    }
    return bytes;
}

int64_t bapq_weight_bytes(const bapq_store *store) {
    return store->homes->bytes_there - store->bytes_there_before +
           store->stream.ring_touched_bytes + store->rows.slots_used * store->rows.slot_bytes;
}

int64_t bapq_rss_bytes(const bapq_store *store) {
    char text[128];
    ssize_t n = store->statm_fd < 0 ? -1 : pread(store->statm_fd, text, sizeof text - 1, 0);
    if (n <= 0) return 0;
    text[n] = 0;
    const char *total_end = strchr(text, ' '); /* pages in all, then those in memory */
    return total_end ? strtoll(total_end, NULL, 10) * store->homes->page_bytes : 0;
}

/* ---- plans ---- */

/* Level index that the chunk runs at, -1 when it cannot. */
static int32_t check_level(const bapq_store *store, const bapq_plan_request *request, int32_t chunk,
                           bapq_error *error) {
    const char *reason = NULL;
    int32_t planes[2];
    const bapq_layer *layer = &store->layer[store->layer_of[chunk]];
    int32_t level = bapq_level_index(request->levels[chunk]);
    int32_t n = level < 0 ? 0 : bapq_level_planes(level, planes);
    if (level < 0) reason = "there is no such level";
    for (int32_t i = 0; i < n; i++)
        if (store->homes->plane[planes[i]].base == NULL) reason = "its plane is not there";
    if (level >= 0 && !bapq_has_level(layer, level)) reason = "its layer lacks it";
    if (level == BAPQ_SKIP && layer->gathered) reason = "Gather reads it, so it cannot be skipped";
    if (level == BAPQ_SKIP && request->region < 0)
        reason = "skipping needs the values of a region, and the plan names none";
    if (reason == NULL) return level;
    bapq_fail(error, BAPQ_NO_LEVEL, "chunk %d cannot run at level %d: %s", chunk,
              request->levels[chunk], reason);
    return -1;
}

plan *bapq_plan_new(const bapq_store *store, const bapq_plan_request *request, bapq_error *error) {
    size_t chunks = (size_t)store->chunk_count;
    plan *p = calloc(1, sizeof *p + 3 * chunks);
    if (!p) {
        bapq_fail(error, BAPQ_NO_MEMORY, "no memory for a plan");
        return NULL;
    }
    p->level = (uint8_t *)(p + 1);
    p->pinned = p->level + chunks;
    p->claimed = p->pinned + chunks;
    p->threads = request->threads > 0 ? request->threads : 1;
    p->ring_bytes = request->ring_bytes;
    p->home_limit_bytes = request->home_limit_bytes;
    int32_t present = 0;
    for (int32_t i = 0; i < BAPQ_PLANES; i++) present |= (store->homes->plane[i].base != NULL) << i;
    for (int32_t chunk = 0; chunk < store->chunk_count; chunk++) {
        int32_t planes[2];
        const bapq_layer *layer = &store->layer[store->layer_of[chunk]];
        int32_t level = check_level(store, request, chunk, error);
        if (level < 0) {
            free(p);
            return NULL;
        }
        p->level[chunk] = (uint8_t)level;
        if (layer->read_by_row) continue;
        p->pinned[chunk] = request->pinned[chunk] != 0;
        if (request->kept)
            p->claimed[chunk] =
                (uint8_t)(request->kept[chunk] & present & bapq_layer_planes(layer));
        /* Any chunk may have to pass through the ring once: while memory of a dying plan is still
         * in use, a pinned one finds no room at home. The pages are touched only then. */
        int32_t n = bapq_level_planes(level, planes);
        int64_t bytes = 0;
        for (int32_t i = 0; i < n; i++) {
            if (p->pinned[chunk]) p->claimed[chunk] |= (uint8_t)(1 << planes[i]);
            bytes += ((int64_t)store->homes->plane[planes[i]].extent[chunk].bytes + 63) / 64 * 64;
        }
        if (bytes > p->ring_bytes) p->ring_bytes = bytes;
    }
    return p;
}

void bapq_plan_claim(bapq_store *store, const plan *p) {
    for (int32_t i = 0; i < BAPQ_PLANES; i++)
        for (int32_t chunk = 0; store->homes->plane[i].base && chunk < store->chunk_count; chunk++)
            if (p->claimed[chunk] >> i & 1) bapq_claim(store, i, chunk);
}

void bapq_plan_release(bapq_store *store, plan *p) {
    if (--p->holders > 0 || p == store->published) return;
    for (int32_t i = 0; i < BAPQ_PLANES; i++) {
        bool left = false;
        for (int32_t chunk = 0; store->plane[i].claims && chunk < store->chunk_count; chunk++)
            if (p->claimed[chunk] >> i & 1) left |= drop_claim(store, i, chunk);
        if (left) bapq_homes_release_gaps(store->homes, i);
    }
    store->live_plans--;
    free(p);
}
