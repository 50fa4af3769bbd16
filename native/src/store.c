/* Opening, closing and publishing. */
#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arena.h"
#include "error.h"
#include "store_internal.h"

int32_t bapq_abi_version(void) { return BAPQ_ABI_VERSION; }

const char *bapq_kernels_name(void) {
    const bapq_kernels *kernels = bapq_kernels_best();
    return kernels ? kernels->name : "";
}

/* ---- open ---- */

static int32_t check_bank(const bapq_bank *bank, bapq_error *error) {
    int64_t next = 0;
    if (bank->layer_count < 1 || bank->chunk_count < 1 || bank->row_cache_slots < 1)
        return bapq_fail(error, BAPQ_ARGUMENT, "a bank needs layers, chunks and row slots");
    for (int32_t l = 0; l < bank->layer_count; l++) {
        const bapq_layer *layer = &bank->layers[l];
        int whole = layer->stored_rows == layer->rows && !layer->row_order;
        int sound = layer->stored_rows > 0 && layer->stored_rows <= layer->rows &&
                    layer->columns > 0 && layer->chunk_rows > 0 &&
                    layer->chunk_rows % BAPQ_TILE_ROWS == 0 && layer->first_chunk == next &&
                    layer->residual_steps >= 8 && layer->residual_steps <= 16 &&
                    layer->levels > 0 && layer->levels < 1 << BAPQ_LEVELS &&
                    (whole || !layer->gathered); /* whose rows are found by their number */
        for (int32_t i = 0; sound && layer->row_order && i < layer->rows; i++)
            sound = layer->row_order[i] >= 0 && layer->row_order[i] < layer->rows;
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

/* Every chunk must be as long as its layer says, and come after the one before. */
static int32_t check_extents(const bapq_store *store, plane_home *plane, int32_t p,
                             const char *path, bapq_error *error) {
    for (int32_t chunk = 0; chunk < store->chunk_count; chunk++) {
        const bapq_layer *layer = &store->layer[store->layer_of[chunk]];
        const bapq_extent *extent = &plane->extent[chunk];
        int32_t before = (chunk - layer->first_chunk) * layer->chunk_rows;
        int32_t left = layer->stored_rows - before;
        int32_t rows = left < layer->chunk_rows ? left : layer->chunk_rows;
        int64_t bytes = bapq_ceil_div(rows, BAPQ_TILE_ROWS) * bapq_record_bytes(layer, p);
        if ((int64_t)extent->bytes != bytes || extent->offset % 64 != 0 ||
            extent->offset < (uint64_t)plane->bytes || extent->offset > INT64_MAX / 2)
            return bapq_fail(
                error, BAPQ_ARGUMENT,
                "%s: chunk %d is at %llu with %u bytes, expected %lld bytes at %lld or "
                "after",
                path, chunk, (unsigned long long)extent->offset, extent->bytes, (long long)bytes,
                (long long)plane->bytes);
        plane->bytes = (int64_t)extent->offset + bytes;
    }
    return BAPQ_OK;
}

static int32_t open_plane(bapq_store *store, const bapq_bank *bank, int32_t p, plane_home *home,
                          bapq_error *error) {
    const char *path = bank->plane_path[p];
    struct stat file;
    int fd = open(path, O_RDONLY | O_CLOEXEC | (store->direct ? O_DIRECT : 0));
    store->plane[p].fd = fd;
    if (fd < 0 || fstat(fd, &file) != 0) {
        int code = errno;
        bapq_fail(error, BAPQ_IO, "%s cannot be opened%s: %s", path,
                  store->direct ? " for direct reads" : "", strerror(code));
        error->os_errno = code;
        return BAPQ_IO;
    }
    home->device = file.st_dev;
    home->inode = file.st_ino;
    size_t count = (size_t)store->chunk_count;
    home->extent = malloc(count * sizeof *home->extent);
    store->plane[p].claims = calloc(count, sizeof *store->plane[p].claims);
    if (!home->extent || !store->plane[p].claims)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for the chunk table of %s", path);
    memcpy(home->extent, bank->extents[p], count * sizeof *home->extent);
    return check_extents(store, home, p, path, error);
}

static int32_t open_planes(bapq_store *store, const bapq_bank *bank, bapq_error *error) {
    plane_home planes[BAPQ_PLANES] = {0};
    int32_t status = BAPQ_OK;
    for (int32_t p = 0; p < BAPQ_PLANES && status == BAPQ_OK; p++)
        if (bank->plane_path[p]) status = open_plane(store, bank, p, &planes[p], error);
    if (status != BAPQ_OK) {
        for (int32_t p = 0; p < BAPQ_PLANES; p++) free(planes[p].extent);
        return status;
    }
    homes *joined = bapq_homes_join(planes, store->chunk_count, error);
    if (!joined) return error->status;
    bapq_enter_homes(store, joined);
    return BAPQ_OK;
}

/* The layers' own tables, moved to where they live as long as the store. */
static int32_t copy_row_tables(bapq_store *store, bapq_error *error) {
    int64_t ordered = 0, dropped = 0;
    for (int32_t l = 0; l < store->layer_count; l++) {
        const bapq_layer *layer = &store->layer[l];
        if (layer->row_order) ordered += layer->rows;
        if (layer->dropped_bias) dropped += layer->rows - layer->stored_rows;
    }
    int32_t *order = store->row_order = malloc((size_t)(ordered + 1) * sizeof *order);
    float *bias = store->dropped_bias = malloc((size_t)(dropped + 1) * sizeof *bias);
    store->first_row = malloc(((size_t)store->layer_count + 1) * sizeof *store->first_row);
    if (!order || !bias || !store->first_row)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for the tables of rows");
    store->first_row[0] = 0;
    for (int32_t l = 0; l < store->layer_count; l++) {
        bapq_layer *layer = &store->layer[l];
        int32_t dropped_rows = layer->rows - layer->stored_rows;
        store->first_row[l + 1] = store->first_row[l] + layer->stored_rows;
        if (layer->row_order) {
            layer->row_order = memcpy(order, layer->row_order, (size_t)layer->rows * sizeof *order);
            order += layer->rows;
        }
        if (layer->dropped_bias) {
            layer->dropped_bias =
                memcpy(bias, layer->dropped_bias, (size_t)dropped_rows * sizeof *bias);
            bias += dropped_rows;
        }
    }
    return BAPQ_OK;
}

static int32_t make_tables(bapq_store *store, const bapq_bank *bank, bapq_error *error) {
    size_t chunks = (size_t)bank->chunk_count;
    store->layer = malloc((size_t)bank->layer_count * sizeof *store->layer);
    store->layer_of = malloc(chunks * sizeof *store->layer_of);
    store->sequence = malloc(chunks * sizeof *store->sequence);
    store->position_of = malloc(chunks * sizeof *store->position_of);
    store->layer_ns = calloc((size_t)bank->layer_count, sizeof *store->layer_ns);
    if (!store->layer || !store->layer_of || !store->sequence || !store->position_of ||
        !store->layer_ns)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for the layer table");
    memcpy(store->layer, bank->layers, (size_t)bank->layer_count * sizeof *store->layer);
    for (int32_t l = 0; l < store->layer_count; l++)
        for (int32_t i = 0; i < bapq_chunk_count(&store->layer[l]); i++)
            store->layer_of[store->layer[l].first_chunk + i] = l;
    for (int32_t chunk = 0; chunk < store->chunk_count; chunk++)
        store->sequence[chunk] = store->position_of[chunk] = chunk;
    return copy_row_tables(store, error);
}

/* A slot of the row cache holds a chunk at any level: the largest pair of planes. */
static int32_t make_row_cache(bapq_store *store, const bapq_bank *bank, bapq_error *error) {
    row_cache *rows = &store->rows;
    for (int32_t l = 0; l < store->layer_count; l++) {
        const bapq_layer *layer = &store->layer[l];
        for (int32_t level = 0; layer->gathered && level < BAPQ_LEVELS; level++) {
            int32_t planes[2];
            int32_t n = bapq_has_level(layer, level) ? bapq_level_planes(level, planes) : 0;
            int64_t bytes = 0;
            for (int32_t i = 0; i < n; i++)
                if (store->homes->plane[planes[i]].base)
                    bytes +=
                        layer->chunk_rows / BAPQ_TILE_ROWS * bapq_record_bytes(layer, planes[i]);
            if (bytes > rows->slot_bytes) rows->slot_bytes = bytes;
        }
    }
    if (rows->slot_bytes == 0) return BAPQ_OK;
    rows->slots = bank->row_cache_slots;
    rows->key = malloc((size_t)rows->slots * sizeof *rows->key);
    rows->data = aligned_alloc(64, (size_t)(rows->slots * rows->slot_bytes));
    if (!rows->key || !rows->data)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for %d embedding rows", rows->slots);
    for (int32_t i = 0; i < rows->slots; i++) rows->key[i] = ROW_NEVER;
    return BAPQ_OK;
}

/* Buffers for direct reads: the largest chunk and the blocks around it. */
static int32_t make_bounce_buffers(bapq_store *store, bapq_error *error) {
    int64_t bytes = 0;
    for (int32_t p = 0; p < BAPQ_PLANES; p++)
        for (int32_t chunk = 0; store->plane[p].claims && chunk < store->chunk_count; chunk++)
            if (store->homes->plane[p].extent[chunk].bytes > bytes)
                bytes = store->homes->plane[p].extent[chunk].bytes;
    bytes = (bytes + 3 * 4096 - 1) / 4096 * 4096;
    store->stream.bounce = aligned_alloc(4096, (size_t)bytes);
    store->rows.bounce = aligned_alloc(4096, (size_t)bytes);
    if (!store->stream.bounce || !store->rows.bounce)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for direct reads");
    return BAPQ_OK;
}

static void free_store(bapq_store *store) {
    bapq_stream_stop(store);
    if (store->homes) bapq_leave_homes(store);
    for (int32_t p = 0; p < BAPQ_PLANES; p++) {
        if (store->plane[p].fd >= 0) close(store->plane[p].fd);
        free(store->plane[p].claims);
    }
    if (store->stream.plan != store->published) free(store->stream.plan);
    if (store->statm_fd >= 0) close(store->statm_fd);
    bapq_scratch_free(store);
    bapq_trace_free(store);
    free(store->published);
    free(store->layer);
    free(store->layer_of);
    free(store->row_order);
    free(store->dropped_bias);
    free(store->first_row);
    for (int32_t i = 0; i < store->region_count; i++) free(store->region[i]);
    free(store->region);
    free(store->sequence);
    free(store->position_of);
    free(store->layer_ns);
    free(store->rows.key);
    free(store->rows.data);
    free(store->rows.bounce);
    pthread_mutex_destroy(&store->rows.lock);
    free(store);
}

static atomic_llong stores_opened;

static _Thread_local int64_t operators_store_id;

void bapq_store_owns_operators(const bapq_store *store) {
    operators_store_id = store ? store->id : 0;
}

int64_t bapq_operators_store_id(void) { return operators_store_id; }

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
    pthread_mutex_init(&store->rows.lock, NULL);
    for (int32_t p = 0; p < BAPQ_PLANES; p++) store->plane[p].fd = -1;
    store->id = atomic_fetch_add(&stores_opened, 1) + 1;
    store->kernels = kernels;
    store->layer_count = bank->layer_count;
    store->chunk_count = bank->chunk_count;
    store->direct = bank->direct != 0;
    store->statm_fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
    status = make_tables(store, bank, error);
    if (status == BAPQ_OK) status = open_planes(store, bank, error);
    if (status == BAPQ_OK) status = make_row_cache(store, bank, error);
    if (status == BAPQ_OK && store->direct) status = make_bounce_buffers(store, error);
    if (status == BAPQ_OK) status = bapq_stream_start(store, error);
    if (status != BAPQ_OK) {
        free_store(store);
        return status;
    }
    *out = store;
    return BAPQ_OK;
}

int32_t bapq_store_close(bapq_store *store, bapq_error *error) {
    pthread_mutex_lock(&store->homes->lock);
    int32_t open_runs = store->open_runs;
    pthread_mutex_unlock(&store->homes->lock);
    if (open_runs > 0) return bapq_fail(error, BAPQ_ARGUMENT, "%d runs are still open", open_runs);
    free_store(store);
    bapq_arena_trim(); /* of the tensors of its graphs */
    return BAPQ_OK;
}

/* ---- publish, regions, stats ---- */

int32_t bapq_store_publish(bapq_store *store, const bapq_plan_request *request, bapq_error *error) {
    plan *next = bapq_plan_new(store, request, error);
    if (!next) return error->status;
    pthread_mutex_lock(&store->homes->lock);
    if (request->region >= store->region_count) {
        int32_t count = store->region_count;
        pthread_mutex_unlock(&store->homes->lock);
        free(next);
        return bapq_fail(error, BAPQ_NO_LEVEL, "region %d is unknown, %d are registered",
                         request->region, count);
    }
    if (request->region >= 0) next->skip_values = store->region[request->region];
    plan *old = store->published;
    next->number = ++store->plan_count;
    store->live_plans++;
    bapq_plan_claim(store, next); /* before the old plan lets go of what both need */
    if (old) old->holders++;      /* ours, until the stream has turned away from it */
    store->published = next;
    bapq_stream_follow(store);
    if (old) bapq_plan_release(store, old);
    pthread_cond_broadcast(&store->homes->changed);
    pthread_mutex_unlock(&store->homes->lock);
    return BAPQ_OK;
}

int32_t bapq_store_add_region(bapq_store *store, const float *values, int32_t *region,
                              bapq_error *error) {
    size_t bytes = (size_t)store->first_row[store->layer_count] * sizeof *values;
    float *copy = malloc(bytes);
    if (!copy) return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for a region's values");
    memcpy(copy, values, bytes);
    pthread_mutex_lock(&store->homes->lock);
    size_t count = (size_t)store->region_count;
    float **grown = realloc(store->region, (count + 1) * sizeof *grown);
    if (grown) {
        store->region = grown;
        store->region[count] = copy;
        *region = store->region_count++;
    }
    pthread_mutex_unlock(&store->homes->lock);
    if (grown) return BAPQ_OK;
    free(copy);
    return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for the table of regions");
}

void bapq_store_read_stats(bapq_store *store, bapq_store_stats *out) {
    pthread_mutex_lock(&store->homes->lock);
    out->home_bytes = store->home_bytes;
    out->ring_bytes = store->stream.ring_touched_bytes;
    out->row_cache_bytes = store->rows.slots_used * store->rows.slot_bytes;
    out->row_cache_limit_bytes = store->rows.slots * store->rows.slot_bytes;
    out->read_bytes = store->read_bytes;
    out->wait_ns = store->wait_ns;
    out->scratch_bytes = store->scratch_bytes;
    out->live_plans = store->live_plans;
    pthread_mutex_unlock(&store->homes->lock);
}

void bapq_store_take_times(bapq_store *store, bapq_times *out, int64_t *layer_ns) {
    size_t bytes = (size_t)store->layer_count * sizeof *layer_ns;
    pthread_mutex_lock(&store->homes->lock);
    *out = store->times;
    store->times = (bapq_times){0};
    memcpy(layer_ns, store->layer_ns, bytes);
    memset(store->layer_ns, 0, bytes);
    pthread_mutex_unlock(&store->homes->lock);
}
