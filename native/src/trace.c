/* The recording of reads and waits, for who profiles. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "error.h"
#include "store_internal.h"

static int64_t clock_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t bapq_now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

int64_t bapq_thread_ns(void) { return clock_ns(CLOCK_THREAD_CPUTIME_ID); }

int64_t bapq_trace_start(const bapq_store *store) {
    return atomic_load_explicit(&store->trace.on, memory_order_relaxed) ? bapq_now_ns() : 0;
}

void bapq_trace_end(bapq_store *store, bapq_trace_event event) {
    trace_buffer *t = &store->trace;
    if (!atomic_load_explicit(&t->on, memory_order_relaxed) || event.start_ns == 0) return;
    if (t->count == t->capacity) {
        t->lost++;
        return;
    }
    event.end_ns = bapq_now_ns();
    t->event[t->count++] = event;
}

int32_t bapq_store_trace(bapq_store *store, int64_t capacity, bapq_error *error) {
    bapq_trace_event *event = NULL;
    if (capacity < 0 || capacity > INT32_MAX)
        return bapq_fail(error, BAPQ_ARGUMENT, "a trace of %lld events cannot be",
                         (long long)capacity);
    if (capacity > 0 && !(event = malloc((size_t)capacity * sizeof *event)))
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory to record %lld events",
                         (long long)capacity);
    trace_buffer *t = &store->trace;
    pthread_mutex_lock(&store->homes->lock);
    bapq_trace_event *old = t->event;
    t->event = event;
    t->capacity = capacity;
    t->count = t->lost = 0;
    atomic_store_explicit(&t->on, capacity > 0, memory_order_relaxed);
    pthread_mutex_unlock(&store->homes->lock);
    free(old);
    return BAPQ_OK;
}

int64_t bapq_store_trace_read(bapq_store *store, bapq_trace_event *out, int64_t capacity,
                              int64_t *lost) {
    trace_buffer *t = &store->trace;
    pthread_mutex_lock(&store->homes->lock);
    int64_t n = t->count < capacity ? t->count : capacity;
    if (n > 0) {
        memcpy(out, t->event, (size_t)n * sizeof *out);
        t->count -= n;
        memmove(t->event, t->event + n, (size_t)t->count * sizeof *out);
    }
    *lost = t->lost;
    pthread_mutex_unlock(&store->homes->lock);
    return n;
}

void bapq_trace_free(bapq_store *store) { free(store->trace.event); }
