/* What the matrix and the convolution operator share: the chunks of a view times panels of
 * activation rows. */
#ifndef BAPQ_WORK_H
#define BAPQ_WORK_H

#include <stdatomic.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "ops.h"

static inline float bapq_clip(float v, const bapq_epilogue *epilogue) {
    v = v < epilogue->clip_low ? epilogue->clip_low : v; /* in this order NaN passes through */
    return v > epilogue->clip_high ? epilogue->clip_high : v;
}

/* The outputs of up to 16 rows that are constants, before residual and clip: `values`, or zeros
 * where that is NULL. Zero is what every function makes of zero. */
static inline void bapq_constants(const bapq_kernels *kernels, bapq_function function,
                                  const float *values, int32_t count, float out[BAPQ_TILE_ROWS]) {
    memset(out, 0, BAPQ_TILE_ROWS * sizeof *out);
    if (!values) return;
    memcpy(out, values, (size_t)count * sizeof *out);
    if (function) kernels->apply(function, NULL, 1, out);
    for (int32_t r = 0; r < BAPQ_TILE_ROWS; r++) out[r] += 0.0f;
}

/* The code that stands for the weight 0; see bapq_tile. */
static inline float bapq_zero_of(int level, int32_t residual_steps) {
    static const float zeros[BAPQ_LEVELS] = {[BAPQ_L4] = 7.5f, [BAPQ_L2] = 1.5f, [BAPQ_L1] = 0.5f};
    return level == BAPQ_L8 ? 7.5f * (float)(residual_steps + 1) : zeros[level];
}

/* Four outputs at a time. */
typedef float bapq_float4 __attribute__((vector_size(16)));
typedef int32_t bapq_int4 __attribute__((vector_size(16)));

static inline bapq_float4 bapq_splat(float v) { return (bapq_float4){v, v, v, v}; }

static inline bapq_int4 bapq_splat_int(int32_t v) { return (bapq_int4){v, v, v, v}; }

static inline bapq_float4 bapq_load4(const float *from) {
    bapq_float4 v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline bapq_int4 bapq_choose4(bapq_int4 mask, bapq_int4 yes, bapq_int4 no) {
    return (mask & yes) | (~mask & no);
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (bapq_int4){i, j, k, l})
#endif

/* Four rows of four columns, turned. */
static inline void bapq_turn4(bapq_float4 v[4]) {
    bapq_float4 a = SHUFFLE(v[0], v[2], 0, 4, 1, 5), b = SHUFFLE(v[1], v[3], 0, 4, 1, 5);
    bapq_float4 c = SHUFFLE(v[0], v[2], 2, 6, 3, 7), d = SHUFFLE(v[1], v[3], 2, 6, 3, 7);
    v[0] = SHUFFLE(a, b, 0, 4, 1, 5);
    v[1] = SHUFFLE(a, b, 2, 6, 3, 7);
    v[2] = SHUFFLE(c, d, 0, 4, 1, 5);
    v[3] = SHUFFLE(c, d, 2, 6, 3, 7);
}

/* Of eight values the even ones and the odd ones. */
static inline void bapq_part4(const float *from, bapq_float4 *even, bapq_float4 *odd) {
#if defined(__aarch64__)
    const float32x4x2_t parts = vld2q_f32(from);
    *even = (bapq_float4)parts.val[0];
    *odd = (bapq_float4)parts.val[1];
#else
    bapq_float4 a = bapq_load4(from), b = bapq_load4(from + 4);
    *even = SHUFFLE(a, b, 0, 2, 4, 6);
    *odd = SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}
#undef SHUFFLE

/* The bias of a tile's outputs, or zeros. What it is added to keeps no negative zero: so the CPUs'
 * own minima and maxima agree. */
static inline void bapq_tile_bias(const float *bias, float out[BAPQ_TILE_ROWS]) {
    for (int32_t r = 0; r < BAPQ_TILE_ROWS; r++) out[r] = (bias ? bias[r] : 0.0f) + 0.0f;
}

static inline bapq_float4 bapq_raise4(bapq_float4 v, float clip_low) {
    bapq_float4 low = bapq_splat(clip_low);
#if defined(__aarch64__)
    return (bapq_float4)vmaxq_f32((float32x4_t)v, (float32x4_t)low);
#elif defined(__SSE__)
    return (bapq_float4)_mm_max_ps((__m128)low, (__m128)v);
#else
    return (bapq_float4)bapq_choose4(v < low, (bapq_int4)low, (bapq_int4)v);
#endif
}

static inline bapq_float4 bapq_clip4(bapq_float4 v, const bapq_epilogue *epilogue) {
    bapq_float4 high = bapq_splat(epilogue->clip_high);
    v = bapq_raise4(v, epilogue->clip_low);
#if defined(__aarch64__)
    return (bapq_float4)vminq_f32((float32x4_t)v, (float32x4_t)high);
#elif defined(__SSE__)
    return (bapq_float4)_mm_min_ps((__m128)high, (__m128)v);
#else
    return (bapq_float4)bapq_choose4(v > high, (bapq_int4)high, (bapq_int4)v);
#endif
}

/* The tiles of one view crossed with the panels of one input, dealt out to a few workers. Each
 * worker draws (panel, run of tiles) items until none is left, so a slow core does not hold up the
 * rest. */
typedef struct {
    int64_t panels;
    int32_t tiles;          /* of the view */
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
