/* NEON of ARMv8.0, without the dot product instructions: up to 4 activation rows by 8 outputs.
 * A product register holds 2 rows x 4 columns of int16. */
#if defined(__aarch64__)
#include "neon.inc"

/* Registers of one half of a vector of 4 rows: rows 0, 1 and rows 2, 3. */
typedef struct {
    int16x8_t low, high;
} products;
typedef struct {
    int32x4_t low, high;
} pairs;

/* Levels 4, 2, 1: a block's 8 products of at most 15 * 128 per lane fit int16. */
BAPQ_INLINE void dot_small(int n, int groups, int level, const bapq_tile *w, int32_t b, int row,
                           const int8_t *q, ptrdiff_t stride, int32x4_t dot[4][4]) {
    products acc[4][4];
    uint8x16_t bits[4][2];
    const uint8_t *nibbles = w->code[0] + (ptrdiff_t)b * 256 + row * 4;
#pragma GCC unroll 4
    for (int g = 0; g < groups; g++) {
        if (level != BAPQ_L4) {
            bits_at(level, w, (ptrdiff_t)b * 64 + (row + g * 4) * 4, bits[g]);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        int8x16_t code[4];
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            code[g] = vreinterpretq_s8_u8(code_of(level, nibbles + g * 16, bits[g], j));
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            const int32x2_t eight = vreinterpret_s32_s8(vld1_s8(q + i * stride + j / 2 * 8));
            const int8x16_t qj = vreinterpretq_s8_s32(j % 2 == 0 ? vdupq_lane_s32(eight, 0)
                                                                 : vdupq_lane_s32(eight, 1));
#pragma GCC unroll 4
            for (int g = 0; g < groups; g++) {
                products *a = &acc[i][g];
                if (j == 0) {
                    a->low = vmull_s8(vget_low_s8(code[g]), vget_low_s8(qj));
                    a->high = vmull_high_s8(code[g], qj);
                } else {
                    a->low = vmlal_s8(a->low, vget_low_s8(code[g]), vget_low_s8(qj));
                    a->high = vmlal_high_s8(a->high, code[g], qj);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            dot[i][g] = vpaddq_s32(vpaddlq_s16(acc[i][g].low), vpaddlq_s16(acc[i][g].high));
        }
    }
}

/* Level 8, less 127 * sum(q). Codes span 0..255, so they are centred: code - 128 for even j,
 * 127 - code, subtracted, for odd j. A pair of products then lies within +-32640 for every int8
 * value of q and fits int16. The even columns' missing 1 * q is added at the end. */
BAPQ_INLINE void dot_full(int n, int groups, const bapq_tile *w, int32_t b, int row,
                          const int8_t *q, ptrdiff_t stride, int32x4_t dot[4][4]) {
    const uint8x16_t steps_even = step_table(w, -128);
    const uint8x16_t steps_odd = vmvnq_u8(steps_even);
    pairs acc[4][4];
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        int8x16_t even[4], odd[4];
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            const ptrdiff_t at = (ptrdiff_t)b * 256 + p * 64 + (row + g * 4) * 4;
            const uint8x16_t p4 = vld1q_u8(w->code[0] + at), r8 = vld1q_u8(w->code[1] + at);
            const uint8x16_t mask = vdupq_n_u8(15);
            even[g] = vreinterpretq_s8_u8(
                vaddq_u8(vqtbl1q_u8(steps_even, vandq_u8(p4, mask)), vandq_u8(r8, mask)));
            odd[g] = vreinterpretq_s8_u8(vsubq_u8(vqtbl1q_u8(steps_odd, p4 >> 4), r8 >> 4));
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            const int32x2_t eight = vreinterpret_s32_s8(vld1_s8(q + i * stride + p * 8));
            const int8x16_t qe = vreinterpretq_s8_s32(vdupq_lane_s32(eight, 0));
            const int8x16_t qo = vreinterpretq_s8_s32(vdupq_lane_s32(eight, 1));
#pragma GCC unroll 4
            for (int g = 0; g < groups; g++) {
                pairs *a = &acc[i][g];
                int16x8_t low = vmull_s8(vget_low_s8(even[g]), vget_low_s8(qe));
                int16x8_t high = vmull_high_s8(even[g], qe);
                low = vmlsl_s8(low, vget_low_s8(odd[g]), vget_low_s8(qo));
                high = vmlsl_high_s8(high, odd[g], qo);
                a->low = p == 0 ? vpaddlq_s16(low) : vpadalq_s16(a->low, low);
                a->high = p == 0 ? vpaddlq_s16(high) : vpadalq_s16(a->high, high);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        const int32x4_t q0 = vreinterpretq_s32_s8(vld1q_s8(q + i * stride));
        const int32x4_t q1 = vreinterpretq_s32_s8(vld1q_s8(q + i * stride + 16));
        const int16_t even = vaddlvq_s8(vreinterpretq_s8_s32(vuzp1q_s32(q0, q1)));
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            dot[i][g] = vaddq_s32(vpaddq_s32(acc[i][g].low, acc[i][g].high), vdupq_n_s32(even));
        }
    }
}

/* n rows by 4 * groups outputs at a time, 16 sums in registers at most. */
BAPQ_INLINE void rows_codes(int n, int32_t first, int level, const bapq_tile *w,
                            const bapq_panel *x, float *out) {
    const int groups = n <= 2 ? 4 : 2;
    const int32_t blocks = w->blocks;
    const ptrdiff_t stride = (ptrdiff_t)blocks * BAPQ_BLOCK;
    const int8_t *q = x->q + first * stride;
    const float *scale = x->scale + (ptrdiff_t)first * blocks;
    const float *sum = x->sum + (ptrdiff_t)first * blocks;
    const float zero = zero_of(level, w) - (level == BAPQ_L8 ? 127.0f : 0.0f);
    for (int row = 0; row < BAPQ_TILE_ROWS; row += 4 * groups) {
        float32x4_t acc[4][4];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
#pragma GCC unroll 4
            for (int g = 0; g < groups; g++) {
                acc[i][g] = vdupq_n_f32(0.0f);
            }
        }
        const uint16_t *group = w->scale + row;
        for (int32_t b = 0, used = 0; b < blocks; b++) {
            float32x4_t d[4];
#pragma GCC unroll 4
            for (int g = 0; g < groups; g++) {
                d[g] = scale_at(level, w, group + g * 4);
            }
            if (++used == w->scale_blocks) {
                used = 0;
                group += BAPQ_TILE_ROWS;
            }
            const int8_t *qb = q + (ptrdiff_t)b * BAPQ_BLOCK;
            int32x4_t dot[4][4];
            if (level == BAPQ_L8) {
                dot_full(n, groups, w, b, row, qb, stride, dot);
            } else {
                dot_small(n, groups, level, w, b, row, qb, stride, dot);
            }
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) {
                const ptrdiff_t at = (ptrdiff_t)i * blocks + b;
#pragma GCC unroll 4
                for (int g = 0; g < groups; g++) {
                    acc[i][g] = add_block(acc[i][g], d[g], scale[at], dot[i][g], zero, sum[at]);
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
#pragma GCC unroll 4
            for (int g = 0; g < groups; g++) {
                float *to = out + (ptrdiff_t)(first + i) * BAPQ_TILE_ROWS + row + g * 4;
                vst1q_f32(to, acc[i][g]);
            }
        }
    }
}

BAPQ_INLINE void tile_codes(int level, const bapq_tile *w, const bapq_panel *x, int32_t m,
                            float *out) {
    BAPQ_BY_ROWS(4, m, rows_codes, level, w, x, out);
}

BAPQ_DEFINE_FAMILY(neon)
#endif
