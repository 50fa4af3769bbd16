/* What the matrix and the convolution operator share: one chunk times panels of activation rows. */
#ifndef BAPQ_WORK_H
#define BAPQ_WORK_H

#include <stdatomic.h>
#include <string.h>

#include "ops.h"

static inline float bapq_finish(float v, const float *bias, const bapq_epilogue *epilogue) {
    if (bias) v += *bias;
    v = v < epilogue->clip_low ? epilogue->clip_low : v; /* in this order NaN passes through */
    return v > epilogue->clip_high ? epilogue->clip_high : v;
}

/* The same for four outputs at a time. A bias of -0 changes nothing. */
typedef float bapq_float4 __attribute__((vector_size(16)));
typedef int32_t bapq_int4 __attribute__((vector_size(16)));

static inline bapq_float4 bapq_splat(float v) { return (bapq_float4){v, v, v, v}; }

static inline bapq_float4 bapq_load4(const float *from) {
    bapq_float4 v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline bapq_float4 bapq_select4(bapq_int4 mask, bapq_float4 yes, bapq_float4 no) {
    return (bapq_float4)((mask & (bapq_int4)yes) | (~mask & (bapq_int4)no));
}

static inline bapq_float4 bapq_finish4(bapq_float4 v, bapq_float4 bias,
                                       const bapq_epilogue *epilogue) {
    bapq_float4 low = bapq_splat(epilogue->clip_low), high = bapq_splat(epilogue->clip_high);
    v += bias;
    v = bapq_select4(v < low, low, v);
    return bapq_select4(v > high, high, v);
}

/* The tiles of one chunk crossed with the panels of one input, dealt out to a few workers. Each
 * worker draws (panel, run of tiles) items until none is left, so a slow core does not hold up the
 * rest. */
typedef struct {
    int64_t panels;
    int32_t tiles;          /* of the chunk */
    int32_t tiles_per_item; /* fewer than `tiles` only when panels alone cannot fill the workers */
    atomic_llong next;
    void (*item)(void *data, int32_t worker, int64_t panel, int32_t first_tile, int32_t end_tile);
    void *data;
} bapq_work;

static inline void bapq_work_draw(void *data, size_t worker) {
    bapq_work *work = data;
    int64_t per_panel = bapq_ceil_div(work->tiles, work->tiles_per_item);
    for (;;) {
        int64_t i = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed);
        if (i >= work->panels * per_panel) return;
        int32_t first = (int32_t)(i % per_panel) * work->tiles_per_item;
        int32_t end = first + work->tiles_per_item;
        work->item(work->data, (int32_t)worker, i / per_panel, first,
                   end < work->tiles ? end : work->tiles);
    }
}

/* Below this many multiply-adds, waking another thread costs more than it brings. */
enum { BAPQ_SERIAL_MACS = 1 << 17 };

static inline void bapq_work_run(bapq_work *work, const bapq_parallel *parallel, int32_t threads,
                                 int64_t macs) {
    int32_t workers = macs < BAPQ_SERIAL_MACS ? 1 : threads;
    int64_t splits = work->panels >= 2 * workers ? 1 : bapq_ceil_div(2 * workers, work->panels);
    work->tiles_per_item = bapq_ceil_div(work->tiles, splits < work->tiles ? splits : work->tiles);
    atomic_init(&work->next, 0);
    if (workers == 1)
        bapq_work_draw(work, 0);
    else
        parallel->for_each(parallel->self, bapq_work_draw, (size_t)workers, work);
}

/* Cuts a scratch buffer into 64-byte aligned pieces; with base NULL it only counts. */
typedef struct {
    uint8_t *base;
    int64_t used;
} bapq_carver;

static inline void *bapq_carve(bapq_carver *carver, int64_t bytes) {
    void *piece = carver->base ? carver->base + carver->used : NULL;
    carver->used += (bytes + 63) / 64 * 64;
    return piece;
}

#endif
