/* Maxima of windows. Rows under a row of windows are brought down to one, padded at both ends, and
 * that row's windows to their outputs: so no window is a special case, and both steps have vectors
 * along the width. */
#include <math.h>
#include <string.h>

#include "error.h"
#include "plain.h"
#include "work.h"

enum { SLACK = 8 }; /* values behind the last window that vectors may read */

typedef struct {
    const bapq_conv *pool;
    const float *x;
    float *y;
    int64_t row_floats;
    int64_t count; /* columns of the input that windows reach; before and behind them is padding */
    float *rows;   /* (threads, row_floats) */
} pool_job;

static inline float max1(float best, float v) { return v > best || isnan(v) ? v : best; }

/* A NaN in either stays. */
static inline bapq_float4 max4(bapq_float4 best, bapq_float4 v) {
#if defined(__aarch64__)
    return (bapq_float4)vmaxq_f32((float32x4_t)best, (float32x4_t)v);
#elif defined(__SSE__)
    __m128 unordered = _mm_cmpunord_ps((__m128)v, (__m128)v);
    return (bapq_float4)_mm_or_ps(unordered, _mm_max_ps((__m128)v, (__m128)best));
#else
    return (bapq_float4)bapq_choose4((v > best) | (v != v), (bapq_int4)v, (bapq_int4)best);
#endif
}

enum { ROW_VALUES = 16 }; /* of a row at a time */

static inline void max_values(const float *a, const float *b, const float *c, float *to) {
    bapq_float4 best[ROW_VALUES / 4];
    for (int k = 0; k < ROW_VALUES / 4; k++)
        best[k] = max4(max4(bapq_load4(a + 4 * k), bapq_load4(b + 4 * k)), bapq_load4(c + 4 * k));
    memcpy(to, best, sizeof best);
}

/* The largest of three rows' values; `to` may be one of them. */
static void max_rows(const float *a, const float *b, const float *c, int64_t n, float *to) {
    int64_t i = 0;
    for (; i + ROW_VALUES <= n; i += ROW_VALUES) max_values(a + i, b + i, c + i, to + i);
    if (i < n && n >= ROW_VALUES) { /* what is left, and some again */
        i = n - ROW_VALUES;
        max_values(a + i, b + i, c + i, to + i);
        return;
    }
    for (; i < n; i++) to[i] = max1(max1(a[i], b[i]), c[i]);
}

/* How windows lie on a row; those of `max_four` are constants for the compiler where they can be.
 */
typedef struct {
    int64_t taps, stride, step;
} windows;

/* Maxima of four windows, the first at `from`; they lie side by side or `in_pairs`, two apart. */
static inline __attribute__((always_inline)) void max_four(windows w, int in_pairs,
                                                           const float *from, float *y) {
    const bapq_float4 zero = {0}; /* the sum with it has no negative zero */
    bapq_float4 best, even, odd;
    if (in_pairs) {
        bapq_part4(from, &best, &odd);
        if (w.taps > 1) best = max4(best, odd);
        for (int64_t t = 2; t < w.taps; t += 2) {
            bapq_part4(from + t, &even, &odd);
            best = max4(best, even);
            if (t + 1 < w.taps) best = max4(best, odd);
        }
    } else {
        best = bapq_load4(from);
        for (int64_t t = 1; t < w.taps; t++) best = max4(best, bapq_load4(from + t * w.step));
    }
    best += zero;
    memcpy(y, &best, sizeof best);
}

/* The maxima of n windows on a row. */
static inline __attribute__((always_inline)) void max_windows(windows w, const float *row,
                                                              int64_t n, float *y) {
    const int in_pairs = w.stride == 2 && w.step == 1;
    int64_t i = 0;
    if (n >= 4 && (w.stride == 1 || in_pairs)) {
        for (; i + 4 <= n; i += 4) max_four(w, in_pairs, row + w.stride * i, y + i);
        if (i < n) max_four(w, in_pairs, row + w.stride * (n - 4), y + n - 4); /* some again */
        return;
    }
    for (; i < n; i++) {
        float best = row[i * w.stride];
        for (int64_t t = 1; t < w.taps; t++) best = max1(best, row[i * w.stride + t * w.step]);
        y[i] = best + 0.0f;
    }
}

static void finish_row(const bapq_conv_params *p, const float *row, int64_t n, float *y) {
    int close = p->dilation_w == 1;
    if (close && p->stride_w == 2 && p->kernel_w == 3)
        max_windows((windows){3, 2, 1}, row, n, y);
    else if (close && p->stride_w == 2 && p->kernel_w == 2)
        max_windows((windows){2, 2, 1}, row, n, y);
    else if (close && p->stride_w == 1 && p->kernel_w == 3)
        max_windows((windows){3, 1, 1}, row, n, y);
    else
        max_windows((windows){p->kernel_w, p->stride_w, p->dilation_w}, row, n, y);
}

/* Rows ky to `end` of the windows whose first row is y0, as one. */
static void join_rows(const pool_job *j, const float *plane, int64_t y0, float *to) {
    const bapq_conv *pool = j->pool;
    const int64_t dilation = pool->p.dilation_h, below = pool->height - 1 - y0;
    const int64_t ky = y0 < 0 ? (-y0 + dilation - 1) / dilation : 0;
    int64_t end = below < 0 ? 0 : below / dilation + 1;
    end = end < pool->p.kernel_h ? end : pool->p.kernel_h;
    if (ky >= end) {
        for (int64_t i = 0; i < j->count; i++) to[i] = -INFINITY;
        return;
    }
    const float *x = plane + (y0 + ky * dilation) * pool->width, *best = x;
    const int64_t row = dilation * pool->width;
    for (int64_t left = end - ky;; left -= 2, x += 2 * row, best = to) {
        const float *second = left > 1 ? x + row : best;
        max_rows(best, second, left > 2 ? x + 2 * row : second, j->count, to);
        if (left <= 3) return;
    }
}

static void pool_plane(void *data, int32_t worker, int64_t plane, int32_t first, int32_t end) {
    (void)first, (void)end;
    const pool_job *j = data;
    const bapq_conv *pool = j->pool;
    const float *x = j->x + plane * pool->height * pool->width;
    float *y = j->y + plane * pool->out_h * pool->out_w;
    float *row = j->rows + worker * j->row_floats;
    for (int64_t oy = 0; oy < pool->out_h; oy++, y += pool->out_w) {
        join_rows(j, x, oy * pool->p.stride_h - pool->p.pad_top, row + pool->p.pad_left);
        finish_row(&pool->p, row, pool->out_w, y);
    }
}

int32_t bapq_max_pool(bapq_run *run, const bapq_conv *pool, const bapq_parallel *parallel,
                      const float *x, float *y, bapq_error *error) {
    const bapq_conv_params *p = &pool->p;
    const int64_t planes = pool->batch * pool->channels;
    if (planes == 0) return BAPQ_OK;
    /* Up to where the last window ends. */
    int64_t reached = (pool->out_w - 1) * p->stride_w + (p->kernel_w - 1) * p->dilation_w + 1;
    int64_t count = reached - p->pad_left < pool->width ? reached - p->pad_left : pool->width;
    pool_job j = {.pool = pool,
                  .x = x,
                  .y = y,
                  .row_floats = (reached > p->pad_left ? reached : p->pad_left) + SLACK,
                  .count = count > 0 ? count : 0};
    int32_t threads = bapq_run_threads(run);
    int64_t floats = threads * j.row_floats;
    j.rows = bapq_run_scratch(run, floats * (int64_t)sizeof(float));
    if (!j.rows)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for %lld bytes of scratch",
                         (long long)(floats * (int64_t)sizeof(float)));
    for (int64_t i = 0; i < floats; i++) j.rows[i] = -INFINITY;
    bapq_work work = {.panels = planes, .tiles = 1, .item = pool_plane, .data = &j};
    bapq_work_run(&work, parallel, threads,
                  planes * pool->out_h * pool->out_w * p->kernel_h * p->kernel_w);
    return BAPQ_OK;
}
