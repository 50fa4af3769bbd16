#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "crc32.h"
#include "error.h"

typedef struct plan {
    struct plan *next_dead;
    int64_t number;
    int32_t runs;
    uint8_t level[]; /* (chunk_count,) level index */
} plan;

typedef struct {
    int fd;
    int64_t bytes;
    uint8_t *base;       /* reserved range, one byte per byte of the file */
    bapq_extent *extent; /* (chunk_count,) */
    int32_t *users;      /* (chunk_count,) living plans that need the chunk */
} plane_store;

struct bapq_store {
    plane_store plane[BAPQ_PLANES];
    bapq_layer *layer;
    int32_t *layer_of; /* (chunk_count,) */
    int32_t layer_count;
    int32_t chunk_count;
    int32_t threads;
    int64_t page_bytes;
    const bapq_kernels *kernels;

    pthread_mutex_t publish_lock;
    int64_t read_bytes;

    pthread_mutex_t plan_lock;
    plan *published;
    plan *dead;
    int64_t plan_count; /* ever published */
    int64_t live_plans;
    int64_t resident_bytes;
    int64_t scratch_bytes;
    int32_t open_runs;
};

struct bapq_run {
    bapq_store *store;
    plan *plan;
    uint32_t generation;
    bapq_error error;
    void *scratch;
    int64_t scratch_bytes;
};

/* Runs of all stores. A ticket is generation << 32 | slot + 1, so a stale one is recognised. */
enum { MAX_RUNS = 256 };
static bapq_run runs[MAX_RUNS];
static pthread_mutex_t runs_lock = PTHREAD_MUTEX_INITIALIZER;

int32_t bapq_abi_version(void) { return BAPQ_ABI_VERSION; }

const char *bapq_kernels_name(void) {
    const bapq_kernels *kernels = bapq_kernels_best();
    return kernels ? kernels->name : "";
}

/* ---- reading ---- */

static int32_t read_chunk(bapq_store *store, int32_t p, int32_t chunk, bapq_error *error) {
    static const char *const NAMES[BAPQ_PLANES] = {"f32", "r8", "p4", "m1", "s1"};
    plane_store *plane = &store->plane[p];
    const bapq_extent *extent = &plane->extent[chunk];
    uint8_t *target = plane->base + extent->offset;
    uint32_t done = 0;
    int32_t status = BAPQ_OK;
    while (done < extent->bytes) {
        ssize_t n =
            pread(plane->fd, target + done, extent->bytes - done, (off_t)(extent->offset + done));
        if (n > 0) {
            done += (uint32_t)n;
        } else if (n == 0) {
            status =
                bapq_fail(error, BAPQ_TRUNCATED,
                          "plane %s ends inside chunk %d: %u of %u bytes at offset %llu", NAMES[p],
                          chunk, done, extent->bytes, (unsigned long long)extent->offset);
            break;
        } else if (errno != EINTR) {
            int code = errno;
            status = bapq_fail(error, BAPQ_IO, "plane %s cannot be read at chunk %d: %s", NAMES[p],
                               chunk, strerror(code));
            error->os_errno = code;
            break;
        }
    }
    if (status == BAPQ_OK) {
        uint32_t crc = bapq_crc32(target, extent->bytes);
        if (crc != extent->crc32)
            status = bapq_fail(error, BAPQ_CHECKSUM,
                               "plane %s, chunk %d: CRC-32 is %08x, the bank says %08x", NAMES[p],
                               chunk, crc, extent->crc32);
    }
    if (status != BAPQ_OK) {
        error->layer = store->layer_of[chunk];
        error->chunk = chunk;
        return status;
    }
    store->read_bytes += extent->bytes;
    return BAPQ_OK;
}

/* ---- residency: every function here is called with publish_lock held ---- */

static void add_resident(bapq_store *store, int64_t bytes) {
    pthread_mutex_lock(&store->plan_lock);
    store->resident_bytes += bytes;
    pthread_mutex_unlock(&store->plan_lock);
}

/* Gives back every whole page that no resident chunk touches. Pages of one chunk may be shared with
 * its neighbours, so the unit is the gap between resident chunks, not the chunk. */
static void release_gaps(bapq_store *store, plane_store *plane) {
    int64_t page = store->page_bytes;
    int64_t gap_start = 0;
    for (int32_t chunk = 0; chunk <= store->chunk_count; chunk++) {
        int64_t gap_end = plane->bytes;
        if (chunk < store->chunk_count) {
            if (plane->users[chunk] == 0) continue;
            gap_end = (int64_t)plane->extent[chunk].offset;
        } else {
            gap_end = (gap_end + page - 1) / page * page; /* the range's last page is all ours */
        }
        int64_t first = (gap_start + page - 1) / page * page;
        int64_t last = gap_end / page * page;
        if (last > first) madvise(plane->base + first, (size_t)(last - first), MADV_DONTNEED);
        if (chunk < store->chunk_count) gap_start = gap_end + plane->extent[chunk].bytes;
    }
}

/* Drops the plan's claim on chunks [0, count) and frees what nobody else needs. */
static void drop_claims(bapq_store *store, const plan *p, int32_t count) {
    uint32_t touched = 0;
    int64_t freed = 0;
    for (int32_t chunk = 0; chunk < count; chunk++) {
        int32_t planes[2];
        int32_t n = bapq_level_planes(p->level[chunk], planes);
        for (int32_t i = 0; i < n; i++) {
            plane_store *plane = &store->plane[planes[i]];
            if (--plane->users[chunk] == 0) {
                touched |= 1u << planes[i];
                freed += plane->extent[chunk].bytes;
            }
        }
    }
    for (int32_t i = 0; i < BAPQ_PLANES; i++)
        if (touched & 1u << i) release_gaps(store, &store->plane[i]);
    if (freed) add_resident(store, -freed);
}

static int32_t claim_chunk(bapq_store *store, int32_t level, int32_t chunk, bapq_error *error) {
    int32_t planes[2];
    int32_t n = bapq_level_planes(level, planes);
    for (int32_t i = 0; i < n; i++) {
        plane_store *plane = &store->plane[planes[i]];
        if (plane->users[chunk] == 0) {
            int32_t status = read_chunk(store, planes[i], chunk, error);
            if (status != BAPQ_OK) {
                if (i == 1 && --store->plane[planes[0]].users[chunk] == 0)
                    add_resident(store, -(int64_t)store->plane[planes[0]].extent[chunk].bytes);
                return status;
            }
            add_resident(store, plane->extent[chunk].bytes);
        }
        plane->users[chunk]++;
    }
    return BAPQ_OK;
}

static void reap_dead(bapq_store *store) {
    for (;;) {
        pthread_mutex_lock(&store->plan_lock);
        plan *p = store->dead;
        if (p) {
            store->dead = p->next_dead;
            store->live_plans--;
        }
        pthread_mutex_unlock(&store->plan_lock);
        if (!p) return;
        drop_claims(store, p, store->chunk_count);
        free(p);
    }
}

/* Reaps what died while somebody else held publish_lock, too: that is why it looks again. */
static void unlock_and_reap(bapq_store *store) {
    for (;;) {
        reap_dead(store);
        pthread_mutex_unlock(&store->publish_lock);
        pthread_mutex_lock(&store->plan_lock);
        int more = store->dead != NULL;
        pthread_mutex_unlock(&store->plan_lock);
        if (!more || pthread_mutex_trylock(&store->publish_lock) != 0) return;
    }
}

/* Called with plan_lock held, when the plan is no longer published and no run holds it. */
static void bury(bapq_store *store, plan *p) {
    p->next_dead = store->dead;
    store->dead = p;
}

int32_t bapq_store_publish(bapq_store *store, const uint8_t *chunk_levels, bapq_error *error) {
    plan *next = calloc(1, sizeof *next + (size_t)store->chunk_count);
    if (!next) return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for a plan");
    for (int32_t chunk = 0; chunk < store->chunk_count; chunk++) {
        int32_t level = bapq_level_index(chunk_levels[chunk]);
        int32_t planes[2];
        int32_t n = level < 0 ? 0 : bapq_level_planes(level, planes);
        int32_t missing = n == 0;
        for (int32_t i = 0; i < n; i++) missing |= store->plane[planes[i]].base == NULL;
        if (missing) {
            free(next);
            return bapq_fail(error, BAPQ_NO_PLANE,
                             "chunk %d cannot run at level %d: its plane is not there", chunk,
                             chunk_levels[chunk]);
        }
        next->level[chunk] = (uint8_t)level;
    }
    pthread_mutex_lock(&store->publish_lock);
    int32_t status = BAPQ_OK;
    for (int32_t chunk = 0; chunk < store->chunk_count && status == BAPQ_OK; chunk++) {
        status = claim_chunk(store, next->level[chunk], chunk, error);
        if (status != BAPQ_OK) drop_claims(store, next, chunk);
    }
    if (status == BAPQ_OK) {
        pthread_mutex_lock(&store->plan_lock);
        plan *old = store->published;
        next->number = ++store->plan_count;
        store->published = next;
        store->live_plans++;
        if (old && old->runs == 0) bury(store, old);
        pthread_mutex_unlock(&store->plan_lock);
    } else {
        for (int32_t i = 0; i < BAPQ_PLANES; i++) /* a chunk that failed half-way */
            if (store->plane[i].base) release_gaps(store, &store->plane[i]);
        free(next);
    }
    unlock_and_reap(store);
    return status;
}

/* ---- open, close, stats ---- */

static int32_t check_bank(const bapq_bank *bank, bapq_error *error) {
    int64_t next = 0;
    if (bank->layer_count < 1 || bank->chunk_count < 1 || bank->threads < 1)
        return bapq_fail(error, BAPQ_ARGUMENT, "a bank needs layers, chunks and threads");
    for (int32_t l = 0; l < bank->layer_count; l++) {
        const bapq_layer *layer = &bank->layers[l];
        int sound = layer->rows > 0 && layer->columns > 0 && layer->chunk_rows > 0 &&
                    layer->chunk_rows % BAPQ_TILE_ROWS == 0 && layer->first_chunk == next &&
                    layer->residual_steps >= 8 && layer->residual_steps <= 16;
        for (int32_t p = 0; p < BAPQ_PLANES; p++)
            sound =
                sound && layer->scale_columns[p] >= 0 && layer->scale_columns[p] % BAPQ_BLOCK == 0;
        if (!sound) return bapq_fail(error, BAPQ_ARGUMENT, "layer %d of the bank is malformed", l);
        next += bapq_chunk_count(layer);
    }
    if (next != bank->chunk_count)
        return bapq_fail(error, BAPQ_ARGUMENT, "the layers have %lld chunks, the bank %d",
                         (long long)next, bank->chunk_count);
    return BAPQ_OK;
}

static int32_t open_plane(bapq_store *store, const bapq_bank *bank, int32_t p, bapq_error *error) {
    plane_store *plane = &store->plane[p];
    const char *path = bank->plane_path[p];
    plane->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (plane->fd < 0) {
        int code = errno;
        bapq_fail(error, BAPQ_IO, "%s cannot be opened: %s", path, strerror(code));
        error->os_errno = code;
        return BAPQ_IO;
    }
    size_t count = (size_t)store->chunk_count;
    plane->extent = malloc(count * sizeof *plane->extent);
    plane->users = calloc(count, sizeof *plane->users);
    if (!plane->extent || !plane->users)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for the chunk table of %s", path);
    memcpy(plane->extent, bank->extents[p], count * sizeof *plane->extent);
    for (int32_t l = 0; l < store->layer_count; l++) {
        const bapq_layer *layer = &store->layer[l];
        int64_t record = bapq_record_bytes(layer, p);
        int32_t chunks = bapq_chunk_count(layer);
        for (int32_t i = 0; i < chunks; i++) {
            const bapq_extent *extent = &plane->extent[layer->first_chunk + i];
            int32_t rows = i + 1 < chunks ? layer->chunk_rows : layer->rows - i * layer->chunk_rows;
            int64_t bytes = bapq_ceil_div(rows, BAPQ_TILE_ROWS) * record;
            if ((int64_t)extent->bytes != bytes || extent->offset % 64 != 0 ||
                extent->offset < (uint64_t)plane->bytes || extent->offset > INT64_MAX / 2)
                return bapq_fail(
                    error, BAPQ_ARGUMENT,
                    "%s: chunk %d is at %llu with %u bytes, expected %lld bytes at %lld "
                    "or after",
                    path, layer->first_chunk + i, (unsigned long long)extent->offset, extent->bytes,
                    (long long)bytes, (long long)plane->bytes);
            plane->bytes = (int64_t)extent->offset + bytes;
        }
    }
    void *base = mmap(NULL, (size_t)plane->bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no address range of %lld bytes for %s",
                         (long long)plane->bytes, path);
    plane->base = base;
    return BAPQ_OK;
}

static void free_store(bapq_store *store) {
    for (int32_t p = 0; p < BAPQ_PLANES; p++) {
        plane_store *plane = &store->plane[p];
        if (plane->base) munmap(plane->base, (size_t)plane->bytes);
        if (plane->fd >= 0) close(plane->fd);
        free(plane->extent);
        free(plane->users);
    }
    while (store->dead) {
        plan *p = store->dead;
        store->dead = p->next_dead;
        free(p);
    }
    free(store->published);
    free(store->layer);
    free(store->layer_of);
    pthread_mutex_destroy(&store->publish_lock);
    pthread_mutex_destroy(&store->plan_lock);
    free(store);
}

int32_t bapq_store_open(const bapq_bank *bank, bapq_store **out, bapq_error *error) {
    *out = NULL;
    int32_t status = check_bank(bank, error);
    if (status != BAPQ_OK) return status;
    const bapq_kernels *kernels = bapq_kernels_best();
    if (!kernels)
        return bapq_fail(error, BAPQ_NO_KERNEL, "BAPQ_ISA=%s: this CPU has no such kernels",
                         getenv("BAPQ_ISA"));
    bapq_store *store = calloc(1, sizeof *store);
    if (!store) return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for the store");
    pthread_mutex_init(&store->publish_lock, NULL);
    pthread_mutex_init(&store->plan_lock, NULL);
    for (int32_t p = 0; p < BAPQ_PLANES; p++) store->plane[p].fd = -1;
    store->kernels = kernels;
    store->layer_count = bank->layer_count;
    store->chunk_count = bank->chunk_count;
    store->threads = bank->threads;
    store->page_bytes = sysconf(_SC_PAGESIZE);
    store->layer = malloc((size_t)bank->layer_count * sizeof *store->layer);
    store->layer_of = malloc((size_t)bank->chunk_count * sizeof *store->layer_of);
    if (!store->layer || !store->layer_of) {
        free_store(store);
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for the layer table");
    }
    memcpy(store->layer, bank->layers, (size_t)bank->layer_count * sizeof *store->layer);
    for (int32_t l = 0; l < store->layer_count; l++)
        for (int32_t i = 0; i < bapq_chunk_count(&store->layer[l]); i++)
            store->layer_of[store->layer[l].first_chunk + i] = l;
    for (int32_t p = 0; p < BAPQ_PLANES && status == BAPQ_OK; p++)
        if (bank->plane_path[p]) status = open_plane(store, bank, p, error);
    if (status != BAPQ_OK) {
        free_store(store);
        return status;
    }
    *out = store;
    return BAPQ_OK;
}

int32_t bapq_store_close(bapq_store *store, bapq_error *error) {
    pthread_mutex_lock(&store->plan_lock);
    int32_t open_runs = store->open_runs;
    pthread_mutex_unlock(&store->plan_lock);
    if (open_runs > 0) return bapq_fail(error, BAPQ_ARGUMENT, "%d runs are still open", open_runs);
    /* Once both locks were free no run is inside the store any more. */
    pthread_mutex_lock(&store->publish_lock);
    pthread_mutex_unlock(&store->publish_lock);
    free_store(store);
    return BAPQ_OK;
}

void bapq_store_read_stats(bapq_store *store, bapq_store_stats *out) {
    pthread_mutex_lock(&store->publish_lock);
    out->read_bytes = store->read_bytes;
    pthread_mutex_lock(&store->plan_lock);
    out->resident_bytes = store->resident_bytes;
    out->scratch_bytes = store->scratch_bytes;
    out->live_plans = store->live_plans;
    pthread_mutex_unlock(&store->plan_lock);
    pthread_mutex_unlock(&store->publish_lock);
}

/* ---- runs ---- */

int32_t bapq_run_begin(bapq_store *store, int64_t *ticket, int64_t *plan_number,
                       bapq_error *error) {
    *ticket = 0;
    pthread_mutex_lock(&runs_lock);
    int32_t slot = 0;
    while (slot < MAX_RUNS && runs[slot].store) slot++;
    if (slot < MAX_RUNS) runs[slot].store = store;
    pthread_mutex_unlock(&runs_lock);
    if (slot == MAX_RUNS)
        return bapq_fail(error, BAPQ_ARGUMENT, "%d runs are open already, the most there can be",
                         MAX_RUNS);
    bapq_run *run = &runs[slot];
    memset(&run->error, 0, sizeof run->error);
    run->generation =
        (run->generation + 1) & 0x7FFFFFFF; /* before the plan: no stale ticket fits */
    pthread_mutex_lock(&store->plan_lock);
    run->plan = store->published;
    if (run->plan) {
        run->plan->runs++;
        store->open_runs++;
    }
    pthread_mutex_unlock(&store->plan_lock);
    if (!run->plan) {
        pthread_mutex_lock(&runs_lock);
        run->store = NULL;
        pthread_mutex_unlock(&runs_lock);
        return bapq_fail(error, BAPQ_ARGUMENT, "no plan is published yet");
    }
    *ticket = (int64_t)run->generation << 32 | (slot + 1);
    *plan_number = run->plan->number;
    return BAPQ_OK;
}

bapq_run *bapq_run_of(int64_t ticket) {
    int64_t slot = (ticket & 0xFFFFFFFF) - 1;
    if (slot < 0 || slot >= MAX_RUNS) return NULL;
    bapq_run *run = &runs[slot];
    return run->plan && (int64_t)run->generation == ticket >> 32 ? run : NULL;
}

int32_t bapq_run_end(int64_t ticket, bapq_error *error) {
    bapq_run *run = bapq_run_of(ticket);
    if (!run)
        return bapq_fail(error, BAPQ_ARGUMENT, "ticket %lld is not an open run", (long long)ticket);
    bapq_store *store = run->store;
    int32_t status = run->error.status;
    if (status != BAPQ_OK) *error = run->error;
    free(run->scratch);
    int64_t scratch_bytes = run->scratch_bytes;
    run->scratch = NULL;
    run->scratch_bytes = 0;
    plan *p = run->plan;
    run->plan = NULL;
    pthread_mutex_lock(&runs_lock);
    run->store = NULL;
    pthread_mutex_unlock(&runs_lock);

    pthread_mutex_lock(&store->plan_lock);
    store->scratch_bytes -= scratch_bytes;
    int died = --p->runs == 0 && store->published != p;
    if (died) bury(store, p);
    pthread_mutex_unlock(&store->plan_lock);
    if (died && pthread_mutex_trylock(&store->publish_lock) == 0) unlock_and_reap(store);

    pthread_mutex_lock(&store->plan_lock);
    store->open_runs--; /* last, so that close waits for the reaping above */
    pthread_mutex_unlock(&store->plan_lock);
    return status;
}

const bapq_kernels *bapq_run_kernels(const bapq_run *run) { return run->store->kernels; }
int32_t bapq_run_threads(const bapq_run *run) { return run->store->threads; }
int32_t bapq_run_layer_count(const bapq_run *run) { return run->store->layer_count; }

const bapq_layer *bapq_run_layer(const bapq_run *run, int32_t layer) {
    return &run->store->layer[layer];
}

uint32_t bapq_run_levels(const bapq_run *run, int32_t layer) {
    const bapq_layer *l = &run->store->layer[layer];
    uint32_t levels = 0;
    for (int32_t i = 0; i < bapq_chunk_count(l); i++)
        levels |= 1u << run->plan->level[l->first_chunk + i];
    return levels;
}

int32_t bapq_run_acquire(bapq_run *run, int32_t layer, int32_t i, bapq_chunk_view *view,
                         bapq_error *error) {
    (void)error;
    const bapq_layer *l = &run->store->layer[layer];
    int32_t chunk = l->first_chunk + i;
    int32_t first_row = i * l->chunk_rows;
    view->layer = l;
    view->level = run->plan->level[chunk];
    view->first_row = first_row;
    view->rows = l->rows - first_row < l->chunk_rows ? l->rows - first_row : l->chunk_rows;
    int32_t planes[2];
    int32_t n = bapq_level_planes(view->level, planes);
    for (int32_t p = 0; p < n; p++) {
        const plane_store *plane = &run->store->plane[planes[p]];
        view->records[p] = plane->base + plane->extent[chunk].offset;
        view->record_bytes[p] = bapq_record_bytes(l, planes[p]);
    }
    return BAPQ_OK;
}

void bapq_run_release(bapq_run *run, const bapq_chunk_view *view) {
    (void)run;
    (void)view;
}

void *bapq_run_scratch(bapq_run *run, int64_t bytes) {
    if (bytes > run->scratch_bytes) {
        int64_t rounded = (bytes + 4095) / 4096 * 4096;
        free(run->scratch);
        run->scratch = aligned_alloc(64, (size_t)rounded);
        int64_t grown = (run->scratch ? rounded : 0) - run->scratch_bytes;
        run->scratch_bytes += grown;
        pthread_mutex_lock(&run->store->plan_lock);
        run->store->scratch_bytes += grown;
        pthread_mutex_unlock(&run->store->plan_lock);
    }
    return run->scratch;
}

void bapq_run_fail(bapq_run *run, const bapq_error *error) {
    if (run->error.status == BAPQ_OK) run->error = *error;
}
