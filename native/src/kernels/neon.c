/* NEON of ARMv8.0, without the dot product instructions: up to 4 activation rows by 8 outputs.
 *
 * A register of codes holds 8 rows x 2 columns. It meets two activations repeated 8 times, which
 * one ld4r loads for 8 columns; neighbouring products then belong to one row. */
#if defined(__aarch64__)
#define BAPQ_STRIPE_PLANES 1
#define BAPQ_PAIRED 1 /* decoded: columns 2t, 2t+1 of 8 rows at 16 * t */
#define BAPQ_STRAIGHT_ROWS 2
#include "neon.inc"

/* Keeps clang from putting off additions until their operands fill the stack. */
#define IN_ORDER(a, b) __asm__ volatile("" : "+w"(a), "+w"(b))

BAPQ_INLINE void add_codes(int level, const bapq_tile *w, const stripe *s, int32_t b,
                           int32_t total[BAPQ_TILE_ROWS]) {
    (void)level, (void)w;
    for (int half = 0; half < 2; half++, total += OUTPUTS) {
        const int8_t *code = s->code[0] + half * HALF_BYTES + b * 256;
        int16x8_t sum = vdupq_n_s16(0); /* of 32 codes of at most 128 */
        for (int t = 0; t < 16; t++) {
            sum = vpadalq_s8(sum, vld1q_s8(code + t * 16));
        }
        vst1q_s32(total, vaddw_s16(vld1q_s32(total), vget_low_s16(sum)));
        vst1q_s32(total + 4, vaddw_high_s16(vld1q_s32(total + 4), sum));
    }
}

/* 8 activations, each pair of them repeated. */
BAPQ_INLINE int16x8x4_t pairs_at(const int8_t **q) {
    const int16x8x4_t pair = vld4q_dup_s16((const int16_t *)(const void *)*q);
    *q += 8;
    /* Where the compiler does not see the pointer move, it moves with the load. */
    __asm__("" : "+r"(*q));
    return pair;
}

/* 16 activations, each four of them repeated. */
BAPQ_INLINE int32x4x4_t fours_at(const int8_t **q) {
    const int32x4x4_t four = vld4q_dup_s32((const int32_t *)(const void *)*q);
    *q += 16;
    __asm__("" : "+r"(*q));
    return four;
}

/* Level 8: |code| <= 128 and |q| <= 127, so two products fit int16. Four sums are under way, so
 * that an in-order core need not wait for the one before; two rows at once would not fit the
 * registers. */
BAPQ_INLINE void add_full(int n, int fresh, int is_short, source *from, const int8_t *q[4],
                          int32x4_t dot[4][GROUPS]) {
    const int parts = is_short ? 2 : 4;
#pragma GCC unroll 4
    for (int p = 0; p < parts; p++) {
        const int8x16x4_t code = take_codes(&from->decoded); /* columns 8p..8p+7 */
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            const int16x8x4_t pair = pairs_at(&q[i]);
            int16x8_t low[2], high[2];
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) {
                const int8x16_t qt = vreinterpretq_s8_s16(pair.val[2 * k]);
                low[k] = vmull_s8(vget_low_s8(code.val[2 * k]), vget_low_s8(qt));
                high[k] = vmull_high_s8(code.val[2 * k], qt);
            }
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) {
                const int8x16_t qt = vreinterpretq_s8_s16(pair.val[2 * k + 1]);
                low[k] = vmlal_s8(low[k], vget_low_s8(code.val[2 * k + 1]), vget_low_s8(qt));
                high[k] = vmlal_high_s8(high[k], code.val[2 * k + 1], qt);
            }
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) {
                const int begins = fresh && p == 0 && k == 0;
                dot[i][0] = begins ? vpaddlq_s16(low[k]) : vpadalq_s16(dot[i][0], low[k]);
                dot[i][1] = begins ? vpaddlq_s16(high[k]) : vpadalq_s16(dot[i][1], high[k]);
                IN_ORDER(dot[i][0], dot[i][1]);
            }
        }
    }
}

/* Two rows at a time, so that an in-order core need not wait for the sum before. gcc would move the
 * results of two ld4r about. */
#ifdef __clang__
enum { ROWS = 2 };
#else
enum { ROWS = 1 };
#endif

/* Levels 4, 2, 1: |code| <= 15, so a block's 16 products per int16 fit: 16 * 15 * 127 = 30480. */
BAPQ_INLINE void add_small(int n, int fresh, int is_short, source *from, const int8_t *q[4],
                           int16x8_t chain[4][GROUPS]) {
    const int parts = is_short ? 2 : 4;
#pragma GCC unroll 4
    for (int p = 0; p < parts; p++) {
        const int8x16x4_t code = take_codes(&from->decoded); /* columns 8p..8p+7 */
#pragma GCC unroll 4
        for (int first = 0; first < n; first += ROWS) {
            const int end = first + ROWS < n ? first + ROWS : n;
            int16x8x4_t pair[4];
#pragma GCC unroll 2
            for (int i = first; i < end; i++) {
                pair[i] = pairs_at(&q[i]);
            }
#pragma GCC unroll 4
            for (int t = 0; t < 4; t++) {
#pragma GCC unroll 2
                for (int i = first; i < end; i++) {
                    const int8x16_t qt = vreinterpretq_s8_s16(pair[i].val[t]);
                    const int8x8_t code_low = vget_low_s8(code.val[t]), q_low = vget_low_s8(qt);
                    const int begins = fresh && p == 0 && t == 0;
                    chain[i][0] =
                        begins ? vmull_s8(code_low, q_low) : vmlal_s8(chain[i][0], code_low, q_low);
                    chain[i][1] = begins ? vmull_high_s8(code.val[t], qt)
                                         : vmlal_high_s8(chain[i][1], code.val[t], qt);
                    IN_ORDER(chain[i][0], chain[i][1]);
                }
            }
        }
    }
}

/* Blocks whose products fit one int16 sum: at level 2 a block adds 16 * 3 * 127 at most. */
BAPQ_INLINE int32_t chain_of(int level) {
    return level == BAPQ_L1 ? BAPQ_RUN_BLOCKS : level == BAPQ_L2 ? 4 : 1;
}

/* Adds a chain of blocks to the dot products, or begins them with it. A short one is the first half
 * of a block. */
BAPQ_INLINE void add_chain(int n, variant v, int fresh, int is_short, int32_t blocks, source *from,
                           const int8_t *q[4], int32x4_t dot[4][GROUPS]) {
    if (v.level == BAPQ_L8) {
        add_full(n, fresh, is_short, from, q, dot);
    } else {
        int16x8_t chain[4][GROUPS];
        add_small(n, 1, is_short, from, q, chain);
        for (; !is_short && blocks != 1; blocks--) {
            add_small(n, 0, 0, from, q, chain);
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
#pragma GCC unroll 2
            for (int g = 0; g < GROUPS; g++) {
                dot[i][g] = fresh ? vpaddlq_s16(chain[i][g]) : vpadalq_s16(dot[i][g], chain[i][g]);
            }
        }
    }
}

/* A block whose codes come from the planes: registers of 4 rows x 4 columns meet 4 activations
 * repeated 4 times. The lower half of a product is of the first two rows. */
BAPQ_INLINE void dot_straight(int n, variant v, const source *from, const int8_t *q[4],
                              int32x4_t dot[4][GROUPS]) {
    int32x4_t low[4][GROUPS], high[4][GROUPS]; /* level 8: pairs of products added up */
    int16x8_t lows[4][GROUPS], highs[4][GROUPS];
    int32x4x4_t four[4];
    cutting c[GROUPS];
    cut(v.level, 0, from->w, from->b, from->half, c);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        int8x16_t code[GROUPS];
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; g++) {
            code[g] = straight_code(v, &from->t, &c[g], j);
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            if (j % 4 == 0) {
                four[i] = fours_at(&q[i]);
            }
            const int8x16_t qj = vreinterpretq_s8_s32(four[i].val[j % 4]);
#pragma GCC unroll 2
            for (int g = 0; g < GROUPS; g++) {
                const int begins = v.level == BAPQ_L8 ? j % 2 == 0 : j == 0;
                const int8x8_t code_low = vget_low_s8(code[g]), q_low = vget_low_s8(qj);
                lows[i][g] =
                    begins ? vmull_s8(code_low, q_low) : vmlal_s8(lows[i][g], code_low, q_low);
                highs[i][g] =
                    begins ? vmull_high_s8(code[g], qj) : vmlal_high_s8(highs[i][g], code[g], qj);
                if (v.level == BAPQ_L8 && j % 2 == 1) {
                    low[i][g] =
                        j == 1 ? vpaddlq_s16(lows[i][g]) : vpadalq_s16(low[i][g], lows[i][g]);
                    high[i][g] =
                        j == 1 ? vpaddlq_s16(highs[i][g]) : vpadalq_s16(high[i][g], highs[i][g]);
                    IN_ORDER(low[i][g], high[i][g]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; g++) {
            dot[i][g] = v.level == BAPQ_L8 ? vpaddq_s32(low[i][g], high[i][g])
                                           : vpaddlq_s16(vpaddq_s16(lows[i][g], highs[i][g]));
        }
    }
}

BAPQ_INLINE void dot_run(int n, variant v, int32_t run, int ends_short, source *from,
                         const int8_t *q[4], int32x4_t dot[4][GROUPS]) {
    if (v.straight) {
        dot_straight(n, v, from, q, dot);
        from->b++;
        return;
    }
    if (ends_short && !v.grouped) {
        add_chain(n, v, 1, 1, 1, from, q, dot);
        return;
    }
    if (ends_short) {
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            dot[i][0] = dot[i][1] = vdupq_n_s32(0);
        }
        while (--run != 0) {
            add_chain(n, v, 0, 0, 1, from, q, dot);
        }
        add_chain(n, v, 0, 1, 1, from, q, dot);
        return;
    }
    const int32_t longest = v.grouped ? chain_of(v.level) : 1;
    int32_t chain = run < longest ? run : longest;
    if (longest == 1) {
        chain = 1; /* which the compiler does not see by itself */
    }
    add_chain(n, v, 1, 0, chain, from, q, dot);
    while (v.grouped && (run -= chain) != 0) {
        chain = longest == 1 || run >= longest ? longest : run;
        add_chain(n, v, 0, 0, chain, from, q, dot);
    }
}

#include "depthwise.inc"

BAPQ_DEFINE_FAMILY(neon, 0, 1u << BAPQ_L8)
#endif
