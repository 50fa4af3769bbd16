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

BAPQ_INLINE float scale_at(int level, const bapq_tile *w, int32_t b, int r) {
    const uint32_t bits = (uint32_t)w->scale[b / w->scale_blocks * BAPQ_TILE_ROWS + r] << 16;
    float d;
    memcpy(&d, &bits, sizeof d);
    return level == BAPQ_L8 ? d * (1.0f / (float)w->residual_steps) : d;
}

BAPQ_INLINE void tile_codes(int level, const bapq_tile *w, const bapq_panel *x, int32_t m,
                            float *out) {
    const float zero = zero_of(level, w);
    memset(out, 0, (size_t)m * BAPQ_TILE_ROWS * sizeof *out);
    for (int32_t b = 0; b < w->blocks; b++) {
        for (int r = 0; r < BAPQ_TILE_ROWS; r++) {
            int32_t code[BAPQ_BLOCK];
            for (int k = 0; k < BAPQ_BLOCK; k++) {
                code[k] = code_at(level, w, b, r, k);
            }
            const float d = scale_at(level, w, b, r);
            for (int32_t i = 0; i < m; i++) {
                const ptrdiff_t at = (ptrdiff_t)i * w->blocks + b;
                const int8_t *q = x->q + at * BAPQ_BLOCK;
                int32_t dot = 0;
                for (int k = 0; k < BAPQ_BLOCK; k++) {
                    dot += code[k] * q[k];
                }
                const float f = (float)dot - zero * x->sum[at];
                float *acc = &out[(ptrdiff_t)i * BAPQ_TILE_ROWS + r];
                *acc = fmaf(d * x->scale[at], f, *acc);
            }
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

BAPQ_DEFINE_FAMILY(scalar)
