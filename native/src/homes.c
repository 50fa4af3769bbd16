#include "homes.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "error.h"
#include "fork.h"

static homes *all_homes;
pthread_mutex_t bapq_homes_lock = PTHREAD_MUTEX_INITIALIZER;

static bool same_plane(const plane_home *a, const plane_home *b, size_t chunks) {
    if (!a->extent || !b->extent) return a->extent == b->extent;
    return a->device == b->device && a->inode == b->inode &&
           memcmp(a->extent, b->extent, chunks * sizeof *a->extent) == 0;
}

static homes *find(const plane_home planes[BAPQ_PLANES], int32_t chunk_count) {
    for (homes *h = all_homes; h; h = h->next) {
        bool same = h->chunk_count == chunk_count;
        for (int32_t p = 0; same && p < BAPQ_PLANES; p++)
            same = same_plane(&h->plane[p], &planes[p], (size_t)chunk_count);
        if (same) return h;
    }
    return NULL;
}

static void free_homes(homes *h) {
    for (int32_t p = 0; p < BAPQ_PLANES; p++) {
        plane_home *plane = &h->plane[p];
        if (plane->base) munmap(plane->base, (size_t)plane->bytes);
        free(plane->extent);
        free(plane->claimants);
        free(plane->state);
    }
    pthread_mutex_destroy(&h->lock);
    pthread_cond_destroy(&h->changed);
    free(h);
}

static int32_t make_plane(plane_home *plane, int32_t p, size_t chunks, bapq_error *error) {
    plane->claimants = calloc(chunks, sizeof *plane->claimants);
    plane->state = calloc(chunks, 1);
    if (!plane->claimants || !plane->state)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for the chunk table of plane %s",
                         bapq_plane_name(p));
    void *base = mmap(NULL, (size_t)plane->bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no address range of %lld bytes for plane %s",
                         (long long)plane->bytes, bapq_plane_name(p));
    plane->base = base;
    return BAPQ_OK;
}

static homes *make(const plane_home planes[BAPQ_PLANES], int32_t chunk_count, bapq_error *error) {
    homes *h = calloc(1, sizeof *h);
    if (!h) {
        bapq_fail(error, BAPQ_NO_MEMORY, "no memory for the planes' tables");
        return NULL;
    }
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->changed, NULL);
    h->chunk_count = chunk_count;
    h->page_bytes = sysconf(_SC_PAGESIZE);
    int32_t status = BAPQ_OK;
    for (int32_t p = 0; p < BAPQ_PLANES; p++) {
        h->plane[p] = planes[p];
        if (planes[p].extent && status == BAPQ_OK)
            status = make_plane(&h->plane[p], p, (size_t)chunk_count, error);
    }
    if (status == BAPQ_OK) return h;
    for (int32_t p = 0; p < BAPQ_PLANES; p++) h->plane[p].extent = NULL; /* the caller's still */
    free_homes(h);
    return NULL;
}

homes *bapq_homes_join(plane_home planes[BAPQ_PLANES], int32_t chunk_count, bapq_error *error) {
    pthread_mutex_lock(&bapq_homes_lock);
    homes *h = find(planes, chunk_count);
    bool found = h != NULL;
    if (!found && (h = make(planes, chunk_count, error)) != NULL) {
        h->next = all_homes;
        all_homes = h;
    }
    if (h) h->owners++;
    pthread_mutex_unlock(&bapq_homes_lock);
    for (int32_t p = 0; p < BAPQ_PLANES; p++) {
        if (found || !h) free(planes[p].extent);
        planes[p].extent = NULL;
    }
    return h;
}

void bapq_homes_forget(void) { all_homes = NULL; }

void bapq_homes_leave(homes *h) {
    pthread_mutex_lock(&bapq_homes_lock);
    bool last = --h->owners == 0;
    for (homes **link = &all_homes; last && *link; link = &(*link)->next)
        if (*link == h) {
            *link = h->next;
            break;
        }
    pthread_mutex_unlock(&bapq_homes_lock);
    if (last) free_homes(h);
}

void bapq_homes_release_gaps(homes *h, int32_t p) {
    /* Pages of one chunk may be shared with its neighbours, so the unit is the gap between chunks
     * that are kept, not the chunk. */
    const plane_home *plane = &h->plane[p];
    int64_t page = h->page_bytes;
    int64_t gap_start = 0;
    for (int32_t chunk = 0; chunk <= h->chunk_count; chunk++) {
        int64_t gap_end;
        if (chunk == h->chunk_count)
            gap_end = (plane->bytes + page - 1) / page * page; /* the last page is all ours */
        else if (plane->claimants[chunk] == 0)
            continue;
        else
            gap_end = (int64_t)plane->extent[chunk].offset;
        int64_t first = (gap_start + page - 1) / page * page;
        int64_t last = gap_end / page * page;
        if (last > first) madvise(plane->base + first, (size_t)(last - first), MADV_DONTNEED);
        if (chunk < h->chunk_count) gap_start = gap_end + plane->extent[chunk].bytes;
    }
}
