/* NEON with the dot product instructions of ARMv8.2: up to 8 activation rows by 8 outputs. One sdot
 * takes 4 rows x 4 columns of codes and 4 activations, picked from a register by lane. */
#if defined(__aarch64__)
#include "neon.inc"

BAPQ_INLINE int32x4_t dot_lane(int32x4_t acc, int8x16_t code, int8x16_t q, int lane) {
    switch (lane) {
        case 0:
            return vdotq_laneq_s32(acc, code, q, 0);
        case 1:
            return vdotq_laneq_s32(acc, code, q, 1);
        case 2:
            return vdotq_laneq_s32(acc, code, q, 2);
        default:
            return vdotq_laneq_s32(acc, code, q, 3);
    }
}

/* n rows by 4 * groups outputs at a time, 16 sums in registers at most. */
BAPQ_INLINE void rows_codes(int n, int32_t first, int level, const bapq_tile *w,
                            const bapq_panel *x, float *out) {
    const int groups = n <= 4 ? 4 : 2;
    const int32_t blocks = w->blocks;
    const ptrdiff_t stride = (ptrdiff_t)blocks * BAPQ_BLOCK;
    const int8_t *q = x->q + first * stride;
    const float *scale = x->scale + (ptrdiff_t)first * blocks;
    const float *sum = x->sum + (ptrdiff_t)first * blocks;
    /* Level-8 codes span 0..255; 128 less makes them int8, and moves their zero by as much. */
    const uint8x16_t steps = step_table(w, -128);
    const float zero = zero_of(level, w) - (level == BAPQ_L8 ? 128.0f : 0.0f);
    for (int row = 0; row < BAPQ_TILE_ROWS; row += 4 * groups) {
        float32x4_t acc[8][4];
#pragma GCC unroll 8
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
            int32x4_t dot[8][4];
            int8x16_t qi[8];
            uint8x16_t bits[4][2];
#pragma GCC unroll 4
            for (int g = 0; g < groups; g++) {
                if (level == BAPQ_L2 || level == BAPQ_L1) {
                    bits_at(level, w, (ptrdiff_t)b * 64 + (row + g * 4) * 4, bits[g]);
                }
#pragma GCC unroll 8
                for (int i = 0; i < n; i++) {
                    dot[i][g] = vdupq_n_s32(0);
                }
            }
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                if (j % 4 == 0) {
#pragma GCC unroll 8
                    for (int i = 0; i < n; i++) {
                        qi[i] = vld1q_s8(qb + i * stride + j * 4);
                    }
                }
#pragma GCC unroll 4
                for (int g = 0; g < groups; g++) {
                    const ptrdiff_t at = (ptrdiff_t)b * 256 + (row + g * 4) * 4;
                    uint8x16_t code;
                    if (level == BAPQ_L8) {
                        code =
                            vaddq_u8(vqtbl1q_u8(steps, code_of(BAPQ_L4, w->code[0] + at, NULL, j)),
                                     code_of(BAPQ_L4, w->code[1] + at, NULL, j));
                    } else {
                        code = code_of(level, w->code[0] + at, bits[g], j);
                    }
#pragma GCC unroll 8
                    for (int i = 0; i < n; i++) {
                        dot[i][g] = dot_lane(dot[i][g], vreinterpretq_s8_u8(code), qi[i], j % 4);
                    }
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < n; i++) {
                const ptrdiff_t at = (ptrdiff_t)i * blocks + b;
#pragma GCC unroll 4
                for (int g = 0; g < groups; g++) {
                    acc[i][g] = add_block(acc[i][g], d[g], scale[at], dot[i][g], zero, sum[at]);
                }
            }
        }
#pragma GCC unroll 8
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
    BAPQ_BY_ROWS(8, m, rows_codes, level, w, x, out);
}

BAPQ_DEFINE_FAMILY(neondot)
#endif
