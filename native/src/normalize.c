/* Layer normalization: sums in a fixed order and no fused multiply-adds, so that all CPUs agree. */
#include <math.h>
#include <string.h>

#include "plain.h"
#include "work.h"

enum { LANES = 16 };             /* sums under way, in four vectors */
enum { TASK_VALUES = 16 << 10 }; /* of a task, at least: fewer are not worth another thread */

/* Adds up what is in the vectors. */
static inline float total_of(const bapq_float4 sum[4]) {
    bapq_float4 all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return (all[0] + all[1]) + (all[2] + all[3]);
}

/* The sum of x, or of the squares of its distances from `mean`. */
static inline __attribute__((always_inline)) float sum_of(const float *x, int64_t n, int squares,
                                                          float mean) {
    const bapq_float4 centre = bapq_splat(mean);
    bapq_float4 sum[4] = {{0}};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < 4; k++) {
            bapq_float4 v = bapq_load4(x + i + 4 * k);
            if (squares) v -= centre;
            sum[k] += squares ? v * v : v;
        }
    float total = total_of(sum);
    for (; i < n; i++) {
        float v = squares ? x[i] - mean : x[i];
        total += squares ? v * v : v;
    }
    return total;
}

/* y = (x - mean) * factor * scale + bias; a bias of NULL is none. */
static inline __attribute__((always_inline)) void write_row(const float *x, int64_t n, float mean,
                                                            float factor, const float *scale,
                                                            const float *bias, float *y) {
    const bapq_float4 centre = bapq_splat(mean), factors = bapq_splat(factor), zero = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        bapq_float4 v[LANES / 4];
        for (int k = 0; k < LANES / 4; k++) {
            v[k] = (bapq_load4(x + i + 4 * k) - centre) * factors * bapq_load4(scale + i + 4 * k);
            v[k] += bias ? bapq_load4(bias + i + 4 * k) : zero;
        }
        memcpy(y + i, v, sizeof v);
    }
    for (; i < n; i++) y[i] = (x[i] - mean) * factor * scale[i] + (bias ? bias[i] : 0.0f);
}

static void normalize_row(const bapq_normalization *job, const float *x, float *y) {
    const int64_t n = job->n;
    const float mean = sum_of(x, n, 0, 0.0f) / (float)n;
    const float variance = sum_of(x, n, 1, mean) / (float)n;
    const float factor = 1.0f / sqrtf(variance + job->epsilon);
    if (job->bias)
        write_row(x, n, mean, factor, job->scale, job->bias, y);
    else
        write_row(x, n, mean, factor, job->scale, NULL, y);
}

typedef struct {
    const bapq_normalization *job;
    int64_t task_rows;
} tasks;

static void normalize_rows(void *data, size_t i) {
    const tasks *t = data;
    const bapq_normalization *job = t->job;
    int64_t row = (int64_t)i * t->task_rows, end = row + t->task_rows;
    for (end = end < job->m ? end : job->m; row < end; row++)
        normalize_row(job, job->x + row * job->n, job->y + row * job->n);
}

void bapq_normalize(const bapq_normalization *job, const bapq_parallel *parallel) {
    tasks t = {job, TASK_VALUES / job->n + 1};
    int64_t count = (job->m + t.task_rows - 1) / t.task_rows;
    if (count == 1)
        normalize_rows(&t, 0);
    else if (count > 1)
        parallel->for_each(parallel->self, normalize_rows, (size_t)count, &t);
}
