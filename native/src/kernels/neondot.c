/* NEON with the dot product instructions of ARMv8.2: up to 4 activation rows by 8 outputs. One sdot
 * takes 4 rows x 4 columns of codes and 4 activations, picked from a register by lane. */
#if defined(__aarch64__)
#define BAPQ_STRIPE_PLANES 1
#define BAPQ_PAIRED 0 /* decoded: columns 4j..4j+3 of 8 rows at 32 * j */
#define BAPQ_STRAIGHT_ROWS 4
#include "neon.inc"

BAPQ_INLINE void add_codes(int level, const bapq_tile *w, const stripe *s, int32_t b,
                           int32_t total[BAPQ_TILE_ROWS]) {
    (void)level, (void)w;
    for (int g = 0; g < 4; g++, total += 4) {
        const int8_t *code = s->code[0] + g / 2 * HALF_BYTES + b * 256 + g % 2 * 16;
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

/* A block of activations, and past it: compilers seldom make that one instruction. */
BAPQ_INLINE void take_block(const int8_t **q, int8x16_t block[2]) {
    __asm__("ldp %q0, %q1, [%2], #32"
            : "=w"(block[0]), "=w"(block[1]), "+r"(*q)
            : "m"(*(const int8_t(*)[BAPQ_BLOCK]) * q));
}

/* A block, or its first half. */
BAPQ_INLINE void add_block(int n, variant v, int is_short, source *from, const int8_t *q[4],
                           int32x4_t dot[4][GROUPS]) {
    int8x16_t qi[4][2];
    int8x16x4_t codes;
    cutting c[GROUPS];
    if (v.straight) {
        cut(v.level, 0, from->w, from->b, from->half, c);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        take_block(&q[i], qi[i]);
    }
    const int parts = is_short ? 4 : 8;
#pragma GCC unroll 8
    for (int j = 0; j < parts; j++) {
        if (!v.straight && j % 2 == 0) {
            codes = take_codes(&from->decoded);
        }
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; g++) {
            const int8x16_t code =
                v.straight ? straight_code(v, &from->t, &c[g], j) : codes.val[j % 2 * 2 + g];
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) {
                dot[i][g] = dot_lane(dot[i][g], code, qi[i][j / 4], j % 4);
            }
        }
    }
    from->b++;
}

BAPQ_INLINE void dot_run(int n, variant v, int32_t run, int ends_short, source *from,
                         const int8_t *q[4], int32x4_t dot[4][GROUPS]) {
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        dot[i][0] = dot[i][1] = vdupq_n_s32(0);
    }
    if (!ends_short) {
        do {
            add_block(n, v, 0, from, q, dot);
        } while (v.grouped && --run != 0);
        return;
    }
    while (v.grouped && --run != 0) {
        add_block(n, v, 0, from, q, dot);
    }
    add_block(n, v, 1, from, q, dot);
}

#include "depthwise.inc"

BAPQ_DEFINE_FAMILY(neondot, 0, 1u << BAPQ_L8)
#endif
