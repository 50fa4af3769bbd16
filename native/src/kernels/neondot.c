/* NEON with the dot product instructions of ARMv8.2: up to 4 activation rows by 8 outputs. One sdot
 * takes 4 rows x 4 columns of codes and 4 activations, picked from a register by lane. */
#if defined(__aarch64__)
#define BAPQ_STRIPE_PLANES 1
#define BAPQ_STRAIGHT_ROWS 4
#include "neon.inc"

/* Of each block: rows 0..7, then 8..15; of those, columns 4j..4j+3 at 32 * j. */
BAPQ_INLINE void decode(int level, const bapq_tile *w, stripe *s) {
    const uint8x16_t table = code_table(level, w);
    int8_t *to = s->code[0];
    for (int32_t b = s->first; b < s->first + s->blocks; b++) {
        for (int g = 0; g < 4; g += 2) {
            const cutting low = cutting_of(level, w, b, g), high = cutting_of(level, w, b, g + 1);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++, to += 32) {
                const int8x16_t lows = stored_code(level, table, &low, j);
                const int8x16_t highs = stored_code(level, table, &high, j);
                vst1q_s8(to, lows);
                vst1q_s8(to + 16, highs);
            }
        }
    }
}

BAPQ_INLINE void add_codes(int level, const bapq_tile *w, const stripe *s, int32_t b,
                           int32_t total[BAPQ_TILE_ROWS]) {
    (void)level, (void)w;
    for (int g = 0; g < 4; g++, total += 4) {
        const int8_t *code = s->code[0] + (2 * b + g / 2) * 256 + g % 2 * 16;
        int32x4_t sum = vld1q_s32(total);
        for (int j = 0; j < 8; j++) {
            sum = vdotq_s32(sum, vld1q_s8(code + j * 32), vdupq_n_s8(1));
        }
        vst1q_s32(total, sum);
    }
}

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

BAPQ_INLINE void dot_run(int n, variant v, int32_t run, source *from, const int8_t *q[4],
                         int32x4_t dot[4][GROUPS]) {
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        dot[i][0] = dot[i][1] = vdupq_n_s32(0);
    }
    do {
        int8x16_t qi[4][2];
        cutting c[GROUPS];
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; g++) {
            if (v.straight) {
                c[g] = cutting_of(v.level, from->w, from->b, 2 * from->half + g);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            qi[i][0] = vld1q_s8(q[i]);
            qi[i][1] = vld1q_s8(q[i] + 16);
            q[i] += BAPQ_BLOCK;
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
#pragma GCC unroll 2
            for (int g = 0; g < GROUPS; g++) {
                const int8x16_t code = v.straight ? straight_code(v.level, from->table, &c[g], j)
                                                  : vld1q_s8(from->decoded + j * 32 + g * 16);
#pragma GCC unroll 4
                for (int i = 0; i < n; i++) {
                    dot[i][g] = dot_lane(dot[i][g], code, qi[i][j / 4], j % 4);
                }
            }
        }
        from->decoded += 512;
        from->b++;
    } while (v.grouped && --run > 0);
}

#include "depthwise.inc"

BAPQ_DEFINE_FAMILY(neondot, 1u << BAPQ_L8)
#endif
