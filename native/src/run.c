/* Runs and their tickets. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "error.h"
#include "fork.h"
#include "store_internal.h"

/* Runs of all stores. A ticket is random, but for its lowest byte, which is the slot: a graph can
 * guess none, and a stale one is recognised. */
enum { MAX_RUNS = 256 };
static bapq_run runs[MAX_RUNS];
pthread_mutex_t bapq_runs_lock = PTHREAD_MUTEX_INITIALIZER;

void bapq_runs_forget(void) {
    for (int32_t slot = 0; slot < MAX_RUNS; slot++) runs[slot].store = NULL;
}

static void free_slot(bapq_run *run) {
    pthread_mutex_lock(&bapq_runs_lock);
    run->store = NULL;
    pthread_mutex_unlock(&bapq_runs_lock);
}

/* A ticket for the slot: never 0, never negative. Called with the lock held. */
static int64_t make_ticket(int32_t slot) {
    static uint64_t count;
    uint64_t number = 0;
    /* Where the system has no randomness yet, the store's number must do to keep runs apart. */
    if (getrandom(&number, sizeof number, GRND_NONBLOCK) != sizeof number) number = ++count << 8;
    number = (number & (uint64_t)INT64_MAX & ~(uint64_t)(MAX_RUNS - 1)) | (uint64_t)slot;
    return number == 0 ? MAX_RUNS : (int64_t)number;
}

int32_t bapq_run_begin(bapq_store *store, int32_t measured, int64_t *ticket, bapq_error *error) {
    *ticket = 0;
    pthread_mutex_lock(&bapq_runs_lock);
    int32_t slot = 0;
    while (slot < MAX_RUNS && runs[slot].store) slot++;
    bapq_run *run = NULL;
    if (slot < MAX_RUNS) { /* filled under the lock: others look for a slot whose store is NULL */
        run = &runs[slot];
        *run = (bapq_run){
            .store = store, .ticket = make_ticket(slot), .measured = measured != 0, .layer = -1};
    }
    pthread_mutex_unlock(&bapq_runs_lock);
    if (!run)
        return bapq_fail(error, BAPQ_ARGUMENT, "%d runs are open already, the most there can be",
                         MAX_RUNS);
    pthread_mutex_lock(&store->homes->lock);
    run->plan = store->published;
    run->since_ns = bapq_now_ns();
    if (run->plan) {
        run->plan->holders++;
        store->open_runs++;
        run->scratch = store->spare_scratch;
        run->scratch_bytes = store->spare_scratch_bytes;
        store->spare_scratch = NULL;
        store->spare_scratch_bytes = 0;
        if (!store->order_known)
            run->asked = malloc((size_t)store->layer_count * sizeof *run->asked);
    }
    pthread_mutex_unlock(&store->homes->lock);
    if (!run->plan) {
        free_slot(run);
        return bapq_fail(error, BAPQ_ARGUMENT, "no plan is published yet");
    }
    *ticket = run->ticket;
    return BAPQ_OK;
}

bapq_run *bapq_run_of(int64_t ticket) {
    bapq_run *run = &runs[ticket & (MAX_RUNS - 1)];
    pthread_mutex_lock(
        &bapq_runs_lock); /* the slot of an old ticket may be about to serve another */
    bool open = run->store != NULL && run->ticket == ticket;
    pthread_mutex_unlock(&bapq_runs_lock);
    return open ? run : NULL;
}

/* Leaves the larger buffer with the store. */
static void swap_scratch(bapq_store *store, bapq_run *run) {
    void *scratch = store->spare_scratch;
    int64_t bytes = store->spare_scratch_bytes;
    store->spare_scratch = run->scratch;
    store->spare_scratch_bytes = run->scratch_bytes;
    run->scratch = scratch;
    run->scratch_bytes = bytes;
}

void bapq_scratch_free(bapq_store *store) {
    if (store->spare_scratch) munmap(store->spare_scratch, (size_t)store->spare_scratch_bytes);
}

int32_t bapq_run_end(int64_t ticket, bapq_run_report *report, bapq_error *error) {
    bapq_run *run = bapq_run_of(ticket);
    if (!run)
        return bapq_fail(error, BAPQ_ARGUMENT, "ticket %lld is not an open run", (long long)ticket);
    bapq_store *store = run->store;
    int32_t status = run->error.status;
    if (status != BAPQ_OK) *error = run->error;
    *report = (bapq_run_report){.plan_number = run->plan->number,
                                .rss_bytes = run->measured ? bapq_rss_bytes(store) : 0,
                                .degraded = run->degraded,
                                .degraded_by = run->degraded_by};
    plan *p = run->plan;
    run->plan = NULL;
    int64_t ended = bapq_now_ns();
    pthread_mutex_lock(&store->homes->lock);
    report->weight_bytes = bapq_weight_bytes(store);
    if (run->layer >= 0) {
        store->layer_ns[run->layer] += ended - run->since_ns;
        store->times.runs++;
    }
    if (run->scratch_bytes > store->spare_scratch_bytes) swap_scratch(store, run);
    store->scratch_bytes -= run->scratch_bytes;
    if (status != BAPQ_OK) run->asked_layers = 0; /* it did not see every layer */
    bapq_stream_leave(store, run);
    bapq_plan_release(store, p);
    store->open_runs--;
    pthread_mutex_unlock(&store->homes->lock);
    if (run->scratch) munmap(run->scratch, (size_t)run->scratch_bytes);
    free(run->asked);
    free_slot(run);
    return status;
}

int64_t bapq_run_store_id(const bapq_run *run) { return run->store->id; }
const bapq_kernels *bapq_run_kernels(const bapq_run *run) { return run->store->kernels; }
int32_t bapq_run_threads(const bapq_run *run) { return run->plan->threads; }
int32_t bapq_run_layer_count(const bapq_run *run) { return run->store->layer_count; }

const bapq_layer *bapq_run_layer(const bapq_run *run, int32_t layer) {
    return &run->store->layer[layer];
}

uint32_t bapq_run_levels(const bapq_run *run, int32_t layer) {
    const bapq_layer *l = &run->store->layer[layer];
    uint32_t levels = 0;
    for (int32_t i = 0; i < bapq_chunk_count(l); i++)
        levels |= 1u << run->plan->level[l->first_chunk + i];
    return levels & ~(1u << BAPQ_SKIP);
}

void *bapq_run_scratch(bapq_run *run, int64_t bytes) {
    if (bytes > run->scratch_bytes) {
        /* Not from the heap: buffers of megabytes that grow between the graph engine's own would
         * leave holes there that nobody can use. */
        int64_t page = run->store->homes->page_bytes;
        int64_t rounded = (bytes + page - 1) / page * page;
        if (run->scratch) munmap(run->scratch, (size_t)run->scratch_bytes);
        run->scratch =
            mmap(NULL, (size_t)rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (run->scratch == MAP_FAILED) run->scratch = NULL;
        int64_t grown = (run->scratch ? rounded : 0) - run->scratch_bytes;
        run->scratch_bytes += grown;
        pthread_mutex_lock(&run->store->homes->lock);
        run->store->scratch_bytes += grown;
        pthread_mutex_unlock(&run->store->homes->lock);
    }
    return run->scratch;
}

void bapq_run_fail(bapq_run *run, const bapq_error *error) {
    if (run->error.status == BAPQ_OK) run->error = *error;
}
