/* The reference family: portable C, the definition that the others are held to, bit for bit. */
#include <math.h>

#include "common.inc"

/* Code of row r, column k (0..31) of block b. */
BAPQ_INLINE int32_t code_at(int level, const bapq_tile *w, int32_t b, int r, int k) {
    if (level == BAPQ_L8 || level == BAPQ_L4) {
        const ptrdiff_t at = (ptrdiff_t)b * 256 + k / 8 * 64 + r * 4 + k % 4;
        const int shift = k % 8 / 4 * 4;
        const int32_t p4 = w->code[0][at] >> shift & 15;
        return level == BAPQ_L4 ? p4 : w->residual_steps * p4 + (w->code[1][at] >> shift & 15);
    }
    const ptrdiff_t at = (ptrdiff_t)b * 64 + r * 4 + k % 4;
    const int32_t s1 = w->code[0][at] >> k / 4 & 1;
    return level == BAPQ_L1 ? s1 : 2 * s1 + (w->code[1][at] >> k / 4 & 1);
}

BAPQ_INLINE void tile_codes(int level, const bapq_tile *w, const bapq_panel *x, int32_t m,
                            float *out) {
    const float zero = zero_of(level, w);
    const ptrdiff_t stride = (ptrdiff_t)w->blocks * BAPQ_BLOCK;
    float offset[BAPQ_TILE_ROWS] = {0};
    memset(out, 0, (size_t)m * BAPQ_TILE_ROWS * sizeof *out);
    for (int32_t first = 0, end; first < w->blocks; first = end) {
        end = run_end(w, x, first);
        const int32_t columns = (end - first) * BAPQ_BLOCK;
        float steps[BAPQ_TILE_ROWS];
        steps_of(level, w, x, first, steps);
        for (int r = 0; r < BAPQ_TILE_ROWS; r++) {
            int32_t code[BAPQ_RUN_BLOCKS * BAPQ_BLOCK], total = 0;
            for (int32_t k = 0; k < columns; k++) {
                code[k] = code_at(level, w, first + k / BAPQ_BLOCK, r, k % BAPQ_BLOCK);
                total += code[k];
            }
            const int32_t own = end == w->blocks ? columns - w->padding : columns;
            const float c = (float)total - zero * (float)own;
            offset[r] = fmaf(steps[r], (float)-x->zero_point * c, offset[r]);
            for (int32_t i = 0; i < m; i++) {
                const int8_t *q = x->q + i * stride + (ptrdiff_t)first * BAPQ_BLOCK;
                int32_t dot = 0, sum = 0;
                for (int32_t k = 0; k < columns; k++) {
                    dot += code[k] * q[k];
                    sum += q[k];
                }
                const float f = (float)dot - zero * (float)sum;
                const float scale =
                    x->uniform ? 1.0f : scales_of(x, w->blocks, i)[first * BAPQ_SCALE_ROWS];
                float *acc = &out[(ptrdiff_t)i * BAPQ_TILE_ROWS + r];
                *acc = fmaf(steps[r] * scale, f, *acc);
            }
        }
    }
    for (int32_t i = 0; x->zero_point != 0 && i < m; i++) {
        for (int r = 0; r < BAPQ_TILE_ROWS; r++) {
            out[(ptrdiff_t)i * BAPQ_TILE_ROWS + r] += offset[r];
        }
    }
}

static void tile_float(const bapq_tile *w, const bapq_panel *x, int32_t m, float *out) {
    const ptrdiff_t columns = (ptrdiff_t)w->blocks * BAPQ_BLOCK;
    for (int32_t i = 0; i < m; i++) {
        float acc[BAPQ_TILE_ROWS] = {0};
        for (ptrdiff_t k = 0; k < columns; k++) {
            for (int r = 0; r < BAPQ_TILE_ROWS; r++) {
                float weight;
                memcpy(&weight, w->code[0] + (k * BAPQ_TILE_ROWS + r) * 4, sizeof weight);
                acc[r] = fmaf(x->x[i * columns + k], weight, acc[r]);
            }
        }
        memcpy(out + (ptrdiff_t)i * BAPQ_TILE_ROWS, acc, sizeof acc);
    }
}

static void depthwise(const bapq_windows *x, const float *weight, float bias, float low, float high,
                      float *y) {
    for (int32_t r = 0; r < x->rows; r++) {
        for (int32_t i = 0; i < x->width; i++) {
            float acc = bias;
            for (int32_t ky = 0; ky < x->kernel_h; ky++) {
                const float *row = x->x + r * x->output_row + ky * x->kernel_row + i;
                for (int32_t kx = 0; kx < x->kernel_w; kx++) {
                    acc = fmaf(row[x->tap[kx]], weight[ky * x->kernel_w + kx], acc);
                }
            }
            acc = acc < low ? low : acc; /* in this order NaN passes through */
            *y++ = acc > high ? high : acc;
        }
    }
}

BAPQ_DEFINE_FAMILY(scalar, 0, 0)
