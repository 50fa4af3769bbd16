/* Two chunk stores of one bank under load, for the sanitizers: a few threads run through all chunks
 * and compare every byte with what the bank holds, and the values of skipped ones with the plan's
 * region, while another one publishes random plans and a disk that stutters and fails answers the
 * reads. Prints
 * "N passed, 0 failed"; exit status 1 on a failure.
 *
 * Usage: store_stress DIRECTORY SECONDS [SEED] */
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "crc32.h"
#include "store.h"

enum {
    STORES = 2,
    RUNNERS = 2,
    CHUNKS_MOST = 64,
    PLANS_MOST = 4000,
    ROUND_MS = 2500,
    SCRATCH_MOST = 1 << 17
};
enum { REGIONS_MOST = 50, ROWS_MOST = 1000 };

static const uint8_t LEVEL_BITS[BAPQ_SKIP + 1] = {32, 8, 4, 2, 1, 0};

/* All levels; 32, 4 and 1; and 8 and 2, whose planes hold all that 4 and 1 read but their biases.
 */
enum { ALL = (1 << BAPQ_LEVELS) - 1, SOME = 1 << BAPQ_L32 | 1 << BAPQ_L4 | 1 << BAPQ_L1 };
enum { SHARED = 1 << BAPQ_L8 | 1 << BAPQ_L2 };
/* rows, stored_rows, columns, chunk_rows, first_chunk, residual_steps, has_bias, gathered,
 * depthwise, read_by_row, levels, scale_columns, row_order, dropped_bias */
static const int32_t row_order[] = {3, 16, 0, 14, 1, 15, 2, 17, 4, 13, 5, 6, 12, 7, 11, 8, 10, 9};
static const float dropped_bias[] = {0.5f, -0.5f};
static bapq_layer layers[] = {
    {256, 256, 96, 32, 0, 15, 1, 0, 0, 0, ALL, {0, 0, 32, 0, 128}, NULL, NULL},
    {130, 100, 64, 16, 0, 12, 0, 0, 0, 0, ALL, {0, 0, 64}, NULL, NULL},
    {70, 70, 200, 48, 0, 16, 1, 0, 0, 0, SOME, {0, 0, 32}, NULL, NULL},
    {90, 90, 96, 32, 0, 15, 1, 0, 0, 0, SHARED, {0, 0, 32, 64, 0}, NULL, NULL},
    {128, 128, 32, 16, 0, 15, 0, 1, 0, 0, ALL, {0, 0, 32}, NULL, NULL},
    {96, 96, 64, 16, 0, 15, 0, 1, 0, 1, ALL, {0, 0, 64}, NULL, NULL},
    {18, 16, 512, 16, 0, 8, 1, 0, 0, 0, ALL, {0, 0, 32}, row_order, dropped_bias}};
enum { LAYERS = sizeof layers / sizeof *layers };

static int32_t chunk_count;
static bapq_extent extents[BAPQ_PLANES][CHUNKS_MOST];
static int32_t layer_of[CHUNKS_MOST];
static uint8_t *content[BAPQ_PLANES]; /* of each plane file */
static int64_t content_bytes[BAPQ_PLANES];
static char paths[BAPQ_PLANES][4096];

static atomic_int passed, failed;
static atomic_bool stopping;
static atomic_int fault_percent; /* of reads that fail */

/* A store and what was published to it, by the number of the plan. */
typedef struct {
    bapq_store *store;
    int64_t plan_count;
    int32_t region_count;
    uint8_t levels[PLANS_MOST][CHUNKS_MOST];
    int32_t region[PLANS_MOST];
} user;
static user users[STORES];

static void check(bool good, const char *format, ...) {
    if (good) {
        atomic_fetch_add(&passed, 1);
        return;
    }
    if (atomic_fetch_add(&failed, 1) > 20) return;
    va_list arguments;
    va_start(arguments, format);
    fputs("FAILED: ", stdout);
    vprintf(format, arguments);
    fputc('\n', stdout);
    va_end(arguments);
}

static uint32_t draw(uint64_t *state, uint32_t below) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33) % below;
}

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* ---- the disk ---- */

ssize_t __real_pread(int fd, void *target, size_t bytes, off_t offset);

/* Interrupted, short and slow reads are always about; failing ones when a round asks for them. */
ssize_t __wrap_pread(int fd, void *target, size_t bytes, off_t offset) {
    static _Thread_local uint64_t state = 7;
    uint32_t dice = draw(&state, 1000);
    if (dice < 50) {
        errno = EINTR;
        return -1;
    }
    if (dice < 60) usleep(500);
    if (draw(&state, 100) < (uint32_t)atomic_load(&fault_percent)) {
        switch (draw(&state, 3)) {
            case 0:
                errno = EIO;
                return -1;
            case 1:
                return 0;
            default: {
                ssize_t n = __real_pread(fd, target, bytes, offset);
                if (n > 0) ((uint8_t *)target)[draw(&state, (uint32_t)n)] ^= 4;
                return n;
            }
        }
    }
    /* Direct reads may only be cut where their blocks end. */
    if (dice < 150 && bytes > 8192) bytes = 4096 + bytes / 8192 * 4096;
    return __real_pread(fd, target, bytes, offset);
}

/* ---- the bank ---- */

static void make_bank(const char *directory, uint64_t *state) {
    for (int32_t l = 0; l < LAYERS; l++) {
        layers[l].first_chunk = chunk_count;
        for (int32_t i = 0; i < bapq_chunk_count(&layers[l]); i++) layer_of[chunk_count + i] = l;
        chunk_count += bapq_chunk_count(&layers[l]);
    }
    for (int32_t p = 0; p < BAPQ_PLANES; p++) {
        uint64_t offset = 0;
        for (int32_t l = 0; l < LAYERS; l++) {
            for (int32_t i = 0; i < bapq_chunk_count(&layers[l]); i++) {
                int32_t rows = layers[l].stored_rows - i * layers[l].chunk_rows;
                if (rows > layers[l].chunk_rows) rows = layers[l].chunk_rows;
                int64_t bytes =
                    bapq_ceil_div(rows, BAPQ_TILE_ROWS) * bapq_record_bytes(&layers[l], p);
                offset += draw(state, 3) * 64;
                extents[p][layers[l].first_chunk + i] = (bapq_extent){offset, (uint32_t)bytes, 0};
                offset += (uint64_t)bytes;
            }
        }
        content_bytes[p] = (int64_t)offset;
        content[p] = malloc(offset);
        for (uint64_t i = 0; i < offset; i++) content[p][i] = (uint8_t)draw(state, 256);
        for (int32_t c = 0; c < chunk_count; c++)
            extents[p][c].crc32 =
                bapq_crc32(content[p] + extents[p][c].offset, extents[p][c].bytes);
        snprintf(paths[p], sizeof paths[p], "%s/%s.bin", directory, bapq_plane_name(p));
        FILE *file = fopen(paths[p], "wb");
        if (!file || fwrite(content[p], 1, offset, file) != offset || fclose(file) != 0) {
            perror(paths[p]);
            exit(2);
        }
    }
}

static int64_t plane_bytes(int32_t level, int32_t chunk) {
    int32_t planes[2];
    int32_t n = bapq_level_planes(level, planes);
    int64_t bytes = 0;
    for (int32_t i = 0; i < n; i++) bytes += extents[planes[i]][chunk].bytes;
    return bytes;
}

/* ---- runs ---- */

static float skip_value(int32_t region, int32_t row) { return (float)(region * ROWS_MOST + row); }

static void add_region(user *u) {
    int32_t number = u->region_count++;
    float values[ROWS_MOST];
    bapq_error error = {0};
    int32_t region;
    for (int32_t row = 0; row < ROWS_MOST; row++) values[row] = skip_value(number, row);
    check(bapq_store_add_region(u->store, values, &region, &error) == BAPQ_OK && region == number,
          "region %d: %s", number, error.message);
}

static void check_view(const bapq_chunk_view *view, int32_t layer, int32_t i) {
    int32_t planes[2];
    int32_t n = bapq_level_planes(view->level, planes);
    check(view->chunk == layers[layer].first_chunk + i, "chunk %d of layer %d is %d", i, layer,
          view->chunk);
    check(view->chunks >= 1 && (view->chunks == 1 || view->borrowed == BAPQ_FROM_HOME) &&
              i + view->chunks <= bapq_chunk_count(&layers[layer]),
          "%d chunks from %d on", view->chunks, view->chunk);
    check(bapq_has_level(&layers[layer], view->level), "layer %d lacks level %d", layer,
          LEVEL_BITS[view->level]);
    int32_t rows = layers[layer].stored_rows - view->first_row;
    int32_t most = view->chunks * layers[layer].chunk_rows;
    check(view->rows == (rows < most ? rows : most), "%d chunks from %d on have %d rows",
          view->chunks, view->chunk, view->rows);
    for (int32_t r = 1; view->level == BAPQ_SKIP && r < view->rows; r++)
        check(view->skip_values[r] == view->skip_values[0] + (float)r, "wrong values of chunk %d",
              view->chunk);
    for (int32_t p = 0; p < n; p++) {
        const bapq_extent *extent = &extents[planes[p]][view->chunk];
        size_t bytes = 0;
        for (int32_t c = 0; c < view->chunks; c++) bytes += extent[c].bytes;
        check(memcmp(view->records[p], content[planes[p]] + extent->offset, bytes) == 0,
              "wrong bytes: plane %s, chunk %d, level %d, borrowed %d", bapq_plane_name(planes[p]),
              view->chunk, LEVEL_BITS[view->level], view->borrowed);
    }
}

typedef struct {
    int32_t chunk, level;
    float skip_value; /* of its first row */
} seen_chunk;

/* One run through the layers, in bank order or another one, sometimes not through all of them.
 * Returns its status. */
static int32_t run_once(const user *u, uint64_t *state, bool faults) {
    int64_t ticket;
    bapq_error error = {0};
    if (bapq_run_begin(u->store, (int32_t)draw(state, 2), &ticket, &error) != BAPQ_OK) {
        check(false, "begin: %s", error.message);
        return error.status;
    }
    bapq_run *run = bapq_run_of(ticket);
    seen_chunk seen[CHUNKS_MOST * 2];
    int32_t seen_count = 0, degraded = 0, status = BAPQ_OK;
    bool swapped = draw(state, 3) == 0, partial = draw(state, 8) == 0;
    for (int32_t step = 0; step < LAYERS && status == BAPQ_OK; step++) {
        int32_t l = swapped && step < 2 ? 1 - step : step;
        if (partial && draw(state, 2)) continue;
        int32_t chunks = bapq_chunk_count(&layers[l]);
        int32_t step_chunks = 1;
        for (int32_t j = 0; j < chunks && status == BAPQ_OK; j += step_chunks) {
            bool by_row = layers[l].read_by_row || (layers[l].gathered && draw(state, 2));
            int32_t i = by_row ? (int32_t)draw(state, (uint32_t)chunks) : j;
            bapq_chunk_view view;
            status = by_row ? bapq_run_acquire_rows(run, l, i, &view, &error)
                            : bapq_run_acquire(run, l, i, &view, &error);
            if (status != BAPQ_OK) break;
            if (draw(state, 40) == 0) usleep(200);
            check_view(&view, l, i);
            int32_t row = view.first_row;
            for (int32_t before = 0; before < l; before++) row += layers[before].stored_rows;
            bool skipped = view.level == BAPQ_SKIP;
            /* Less the row's own share, which leaves the region's. */
            float value = skipped ? view.skip_values[0] - skip_value(0, row) : 0;
            step_chunks = view.chunks;
            for (int32_t c = 0; c < view.chunks; c++)
                seen[seen_count++] = (seen_chunk){view.chunk + c, view.level, value};
            if (by_row)
                bapq_run_release_rows(run, &view);
            else
                bapq_run_release(run, &view);
        }
        if (draw(state, 4) == 0) {
            int64_t bytes = 1 + (int64_t)draw(state, SCRATCH_MOST);
            uint8_t *scratch = bapq_run_scratch(run, bytes);
            check(scratch != NULL, "no scratch");
            if (scratch) memset(scratch, step, (size_t)bytes);
        }
    }
    if (status != BAPQ_OK) {
        bool named = status == BAPQ_IO || status == BAPQ_TRUNCATED || status == BAPQ_CHECKSUM;
        check(faults && named && error.chunk >= 0 && error.layer >= 0, "acquire: %d %s", status,
              error.message);
        bapq_run_fail(run, &error);
    }
    bapq_run_report report;
    int32_t ended = bapq_run_end(ticket, &report, &error);
    check(ended == status, "the run failed with %d, its end says %d", status, ended);
    check(bapq_run_of(ticket) == NULL, "a ticket outlives its run");
    const uint8_t *levels = u->levels[report.plan_number];
    for (int32_t i = 0; i < seen_count; i++) {
        if (seen[i].level == BAPQ_SKIP)
            check(seen[i].skip_value == skip_value(u->region[report.plan_number], 0),
                  "plan %lld: chunk %d has the values of another region",
                  (long long)report.plan_number, seen[i].chunk);
        if (LEVEL_BITS[seen[i].level] == levels[seen[i].chunk]) continue;
        check(seen[i].level != BAPQ_SKIP && LEVEL_BITS[seen[i].level] < levels[seen[i].chunk],
              "plan %lld: chunk %d at level %d", (long long)report.plan_number, seen[i].chunk,
              LEVEL_BITS[seen[i].level]);
        degraded++;
    }
    check(degraded == report.degraded && (faults || degraded == 0), "%d chunks degraded, report %d",
          degraded, report.degraded);
    return status;
}

typedef struct {
    const user *user;
    uint64_t state;
    bool faults;
} runner;

static void *keep_running(void *data) {
    runner *r = data;
    while (!atomic_load(&stopping)) run_once(r->user, &r->state, r->faults);
    return NULL;
}

/* ---- plans ---- */

/* One level or any, and some chunks skipped; all pinned, none or some; some planes kept; a ring of
 * any size; a limit that binds or not. */
static void publish(user *u, uint64_t *state, bool settled) {
    uint8_t *levels = u->levels[u->plan_count + 1];
    uint8_t pinned[CHUNKS_MOST], kept[CHUNKS_MOST];
    int32_t region = (int32_t)draw(state, (uint32_t)u->region_count + 1) - 1;
    int32_t uniform = (int32_t)draw(state, 2 * BAPQ_LEVELS);
    uint32_t share = settled ? 2 : draw(state, 5);
    int64_t all_bytes = 0;
    for (int32_t c = 0; c < chunk_count; c++) {
        const bapq_layer *layer = &layers[layer_of[c]];
        int32_t level = uniform < BAPQ_LEVELS ? uniform : (int32_t)draw(state, BAPQ_LEVELS);
        while (!bapq_has_level(layer, level)) level = (level + 1) % BAPQ_LEVELS;
        if (region >= 0 && !layer->gathered && draw(state, 3) == 0) level = BAPQ_SKIP;
        levels[c] = LEVEL_BITS[level];
        pinned[c] = draw(state, 4) < share;
        kept[c] = !settled && draw(state, 2) ? (uint8_t)draw(state, 1 << BAPQ_PLANES) : 0;
        all_bytes += plane_bytes(level, c);
    }
    bapq_plan_request request = {
        .levels = levels,
        .pinned = pinned,
        .kept = draw(state, 2) ? kept : NULL,
        .region = region,
        .ring_bytes = draw(state, 2) ? 0 : (int64_t)draw(state, 1 << 16) / 64 * 64,
        .home_limit_bytes =
            settled || draw(state, 2) ? INT64_MAX / 2 : draw(state, (uint32_t)all_bytes + 1),
        .threads = 1};
    u->region[u->plan_count + 1] = region;
    bapq_error error = {0};
    check(bapq_store_publish(u->store, &request, &error) == BAPQ_OK, "publish: %s", error.message);
    u->plan_count++;
    if (!settled) return;
    atomic_store(&fault_percent, 0);
    int64_t expected = 0;
    for (int32_t l = 0; l < LAYERS; l++)
        for (int32_t i = 0; i < bapq_chunk_count(&layers[l]) && !layers[l].read_by_row; i++) {
            int32_t c = layers[l].first_chunk + i;
            if (pinned[c]) expected += plane_bytes(bapq_level_index(levels[c]), c);
        }
    /* Runs over all layers bring home what the faults left out; the reader then comes to rest. */
    for (int32_t i = 0; i < 20; i++) run_once(u, state, false);
    bapq_store_stats stats;
    for (int64_t end = now_ms() + 5000;;) {
        bapq_store_read_stats(u->store, &stats);
        if ((stats.home_bytes == expected && stats.live_plans == 1) || now_ms() > end) break;
        usleep(1000);
    }
    check(stats.home_bytes == expected, "%lld bytes at home, %lld are pinned",
          (long long)stats.home_bytes, (long long)expected);
    check(stats.live_plans == 1, "%lld plans live", (long long)stats.live_plans);
    check(stats.scratch_bytes <= SCRATCH_MOST, "%lld bytes of scratch after the runs",
          (long long)stats.scratch_bytes);
}

/* Recording goes on and off under the runs, and its buffer is often full. */
static void record(bapq_store *store, uint64_t *state) {
    bapq_trace_event events[100];
    bapq_error error = {0};
    int64_t lost;
    if (draw(state, 8) == 0)
        check(bapq_store_trace(store, draw(state, 200), &error) == BAPQ_OK, "%s", error.message);
    int64_t count = bapq_store_trace_read(store, events, draw(state, 101), &lost);
    bool sound = lost >= 0;
    for (int64_t i = 0; i < count; i++) {
        const bapq_trace_event *e = &events[i];
        int64_t bytes = e->kind == BAPQ_TRACE_WAIT || e->status != BAPQ_OK
                            ? 0
                            : extents[e->plane][e->chunk].bytes;
        sound = sound && e->start_ns <= e->end_ns && e->bytes == bytes &&
                (i == 0 || events[i - 1].end_ns <= e->end_ns);
    }
    check(sound, "a recorded event is not what happened");
}

/* False: the file system has no direct reads. */
static bool open_store(user *u, bool direct, uint64_t *state) {
    bapq_bank bank = {.layers = layers,
                      .layer_count = LAYERS,
                      .chunk_count = chunk_count,
                      .direct = direct,
                      .row_cache_slots = 4};
    for (int32_t p = 0; p < BAPQ_PLANES; p++) {
        bank.plane_path[p] = paths[p];
        bank.extents[p] = extents[p];
    }
    bapq_error error = {0};
    int32_t status = bapq_store_open(&bank, &u->store, &error);
    if (direct && status == BAPQ_IO) return false;
    check(status == BAPQ_OK, "open: %s", error.message);
    if (status != BAPQ_OK) exit(1);
    int64_t ticket;
    check(bapq_run_begin(u->store, 0, &ticket, &error) == BAPQ_ARGUMENT, "a run without a plan");
    u->plan_count = 0;
    u->region_count = 0;
    publish(u, state, false);
    check(bapq_run_begin(u->store, 0, &ticket, &error) == BAPQ_OK, "begin: %s", error.message);
    check(bapq_store_close(u->store, &error) == BAPQ_ARGUMENT, "closed under an open run");
    bapq_run_report report;
    check(bapq_run_end(ticket, &report, &error) == BAPQ_OK, "end: %s", error.message);
    return true;
}

static void close_store(user *u, uint64_t *state) {
    bapq_error error = {0};
    publish(u, state, true);
    check(bapq_store_close(u->store, &error) == BAPQ_OK, "close: %s", error.message);
}

/* A process that is forked in the middle of it all opens a store of its own. The thread sanitizer
 * allows it no threads. */
static void fork_once(uint64_t *state) {
#if !defined(__SANITIZE_THREAD__)
    static user own;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(60);
        atomic_store(&failed, 0);
        atomic_store(&fault_percent, 0);
        open_store(&own, false, state);
        close_store(&own, state);
        fflush(stdout);
        _exit(atomic_load(&failed) > 0);
    }
    int status = -1;
    check(child > 0 && waitpid(child, &status, 0) == child && status == 0,
          "a forked process ended with %d", status);
#else
    (void)state;
#endif
}

static void play_round(uint64_t *state, bool direct, bool faults) {
    if (!open_store(&users[0], direct, state)) return;
    for (int32_t i = 1; i < STORES; i++) open_store(&users[i], false, state);
    atomic_store(&fault_percent, faults ? 3 : 0);
    atomic_store(&stopping, false);
    runner runners[STORES * RUNNERS];
    pthread_t threads[STORES * RUNNERS];
    for (int32_t i = 0; i < STORES * RUNNERS; i++) {
        runners[i] = (runner){&users[i / RUNNERS], *state + (uint64_t)i, faults};
        pthread_create(&threads[i], NULL, keep_running, &runners[i]);
    }
    for (int64_t end = now_ms() + ROUND_MS; now_ms() < end;) {
        user *u = &users[draw(state, STORES)];
        if (u->plan_count >= PLANS_MOST - 2) break;
        if (u->region_count < REGIONS_MOST && draw(state, 10) == 0) add_region(u);
        publish(u, state, false);
        record(u->store, state);
        if (draw(state, 100) == 0) fork_once(state);
        usleep(draw(state, 4) == 0 ? 20000 : draw(state, 1500));
    }
    atomic_store(&stopping, true);
    for (int32_t i = 0; i < STORES * RUNNERS; i++) pthread_join(threads[i], NULL);
    for (int32_t i = STORES - 1; i >= 0; i--) close_store(&users[i], state);
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: store_stress DIRECTORY SECONDS [SEED]\n");
        return 2;
    }
    int32_t seconds = atoi(argv[2]);
    uint64_t state = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
    alarm((unsigned)seconds + 60); /* a deadlock ends here */
    make_bank(argv[1], &state);
    int64_t end = now_ms() + seconds * 1000;
    for (int32_t round = 0; round < 4 || now_ms() < end; round++)
        play_round(&state, round % 4 == 3, round % 2 == 1);
    for (int32_t p = 0; p < BAPQ_PLANES; p++) free(content[p]);
    printf("%d passed, %d failed\n", atomic_load(&passed), atomic_load(&failed));
    return atomic_load(&failed) > 0;
}
