/* AVX2 with FMA: 4 activation rows by 16 outputs in registers (8 outputs at level 8). Codes of 4
 * bits at most, so that a whole block's products (32 * 15 * 128 over two lanes: 30720) fit int16
 * sums; level 8 keeps p4 and r8 apart and joins their int32 sums. */
#if defined(__x86_64__)
#include <immintrin.h>

#define BAPQ_STRIPE_PLANES 2
#define BAPQ_STRAIGHT_ROWS 4
#include "stripe.inc"

typedef uint16_t u16x16 __attribute__((vector_size(32)));

BAPQ_INLINE float unit_of(int level) {
    (void)level;
    return 1.0f;
}

BAPQ_INLINE float shift_of(int level, const bapq_tile *w) { return -zero_of(level, w); }

BAPQ_INLINE __m256i shift_right(__m256i v, int bits) { return (__m256i)((u16x16)v >> bits); }

/* What the codes of 8 rows of one block are cut from: the nibble planes where they lie, the bit
 * planes in registers. */
typedef struct {
    const uint8_t *nibbles;
    __m256i bits[2];
} source;

BAPQ_INLINE source source_at(int level, const uint8_t *const plane[2], int32_t b, int half,
                             int which) {
    source s = {0};
    if (level == BAPQ_L8 || level == BAPQ_L4) {
        s.nibbles = plane[which] + (ptrdiff_t)b * 256 + half * 32;
        return s;
    }
    const ptrdiff_t at = (ptrdiff_t)b * 64 + half * 32;
    const __m256i s1 = _mm256_loadu_si256((const __m256i *)(plane[0] + at));
    if (level == BAPQ_L1) {
        s.bits[0] = s1;
        return s;
    }
    /* Interleave sign and magnitude bits once: four 2-bit codes per byte, even and odd j apart. */
    const __m256i m1 = _mm256_loadu_si256((const __m256i *)(plane[1] + at));
    const __m256i mask = _mm256_set1_epi8(0x55);
    s.bits[0] = _mm256_or_si256(_mm256_and_si256(m1, mask),
                                _mm256_andnot_si256(mask, _mm256_add_epi8(s1, s1)));
    s.bits[1] =
        _mm256_or_si256(_mm256_and_si256(shift_right(m1, 1), mask), _mm256_andnot_si256(mask, s1));
    return s;
}

/* Codes of columns 4j..4j+3. */
BAPQ_INLINE __m256i code_of(int level, const source *s, int j) {
    switch (level) {
        case BAPQ_L1:
            return _mm256_and_si256(shift_right(s->bits[0], j), _mm256_set1_epi8(1));
        case BAPQ_L2:
            return _mm256_and_si256(shift_right(s->bits[j % 2], j / 2 * 2), _mm256_set1_epi8(3));
        default: {
            const __m256i v = _mm256_loadu_si256((const __m256i *)(s->nibbles + j / 2 * 64));
            return _mm256_and_si256(shift_right(v, j % 2 * 4), _mm256_set1_epi8(15));
        }
    }
}

BAPQ_INLINE int planes_of(int level) { return level == BAPQ_L8 ? 2 : 1; }

/* Of each block and plane: columns 4j..4j+3 at 64 * j. */
BAPQ_INLINE void decode(int level, const bapq_tile *w, stripe *s) {
    for (int32_t b = 0; b < s->blocks; b++) {
        for (int p = 0; p < planes_of(level); p++) {
            for (int half = 0; half < 2; half++) {
                const source from = source_at(level, w->code, s->first + b, half, p);
                int8_t *to = s->code[p] + (ptrdiff_t)b * 512 + half * 32;
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++) {
                    _mm256_store_si256((__m256i *)(to + j * 64), code_of(level, &from, j));
                }
            }
        }
    }
}

BAPQ_INLINE void add_codes(int level, const bapq_tile *w, const stripe *s, int32_t b,
                           int32_t total[BAPQ_TILE_ROWS]) {
    for (int p = 0; p < planes_of(level); p++) {
        const int steps = level == BAPQ_L8 && p == 0 ? w->residual_steps : 1;
        for (int half = 0; half < 2; half++) {
            const int8_t *code = s->code[p] + (ptrdiff_t)b * 512 + half * 32;
            __m256i sum = _mm256_setzero_si256();
            for (int j = 0; j < 8; j++) {
                const __m256i codes = _mm256_load_si256((const __m256i *)(code + j * 64));
                sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, _mm256_set1_epi8(1)));
            }
            __m256i *to = (__m256i *)(total + half * 8);
            sum = _mm256_madd_epi16(sum, _mm256_set1_epi16((short)steps));
            _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), sum));
        }
    }
}

/* The empty asm stops gcc from turning the chain of additions into a tree, which spills every
 * product to the stack. */
BAPQ_INLINE __m256i add_in_order(__m256i sum, __m256i product) {
    sum = _mm256_add_epi16(sum, product);
    __asm__("" : "+x"(sum));
    return sum;
}

/* One block of n rows by 8 * halves outputs: added to the dot products, or their beginning. */
BAPQ_INLINE void add_block(int n, int halves, variant v, int fresh, const bapq_tile *w,
                           const stripe *s, int32_t b, int half, const int8_t *q, ptrdiff_t stride,
                           __m256i dot[4][2]) {
    const int planes = planes_of(v.level);
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i steps = _mm256_set1_epi16((short)w->residual_steps);
    source from[2][2];
    __m256i pairs[4][2][2]; /* [row][half][plane]: sums of two columns, int16 */
    if (v.straight) {
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) {
#pragma GCC unroll 2
            for (int p = 0; p < planes; p++) {
                from[h][p] = source_at(v.level, w->code, b, half + h, p);
            }
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        __m256i code[2][2];
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) {
#pragma GCC unroll 2
            for (int p = 0; p < planes; p++) {
                const ptrdiff_t at = (ptrdiff_t)b * 512 + j * 64 + (half + h) * 32;
                code[h][p] = v.straight ? code_of(v.level, &from[h][p], j)
                                        : _mm256_load_si256((const __m256i *)(s->code[p] + at));
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            int32_t four;
            memcpy(&four, q + i * stride + 4 * j, sizeof four);
            const __m256i qi = _mm256_set1_epi32(four);
#pragma GCC unroll 2
            for (int h = 0; h < halves; h++) {
#pragma GCC unroll 2
                for (int p = 0; p < planes; p++) {
                    const __m256i product = _mm256_maddubs_epi16(code[h][p], qi);
                    pairs[i][h][p] = j == 0 ? product : add_in_order(pairs[i][h][p], product);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) {
            __m256i sum = _mm256_madd_epi16(pairs[i][h][0], v.level == BAPQ_L8 ? steps : ones);
            if (v.level == BAPQ_L8) {
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs[i][h][1], ones));
            }
            dot[i][h] = fresh ? sum : _mm256_add_epi32(dot[i][h], sum);
        }
    }
}

/* Weight steps of 8 rows. */
BAPQ_INLINE __m256 d_of(int level, const bapq_tile *w, const uint16_t *bf16) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)bf16));
    const __m256 d = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    return level == BAPQ_L8 ? _mm256_mul_ps(d, _mm256_set1_ps(1.0f / (float)w->residual_steps)) : d;
}

/* n rows by 8 * halves outputs at a time; at most 8 int16 sums in registers. straight: the codes
 * come from the planes, decoded here. */
BAPQ_INLINE void rows_codes(int n, int32_t first, variant v, const bapq_tile *w,
                            const bapq_panel *x, const stripe *s, float *out) {
    const int halves = n * planes_of(v.level) <= 4 ? 2 : 1;
    const ptrdiff_t blocks = w->blocks, stride = blocks * BAPQ_BLOCK;
    const __m256 zero = _mm256_set1_ps(zero_of(v.level, w));
    for (int half = 0; half < 2; half += halves) {
        const int8_t *q = x->q + first * stride + (ptrdiff_t)s->first * BAPQ_BLOCK;
        float *to = out + (ptrdiff_t)first * BAPQ_TILE_ROWS + half * 8;
        __m256 acc[4][2];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
#pragma GCC unroll 2
            for (int h = 0; h < halves; h++) {
                acc[i][h] = s->first == 0 ? _mm256_setzero_ps()
                                          : _mm256_loadu_ps(to + i * BAPQ_TILE_ROWS + h * 8);
            }
        }
        ptrdiff_t at = first * blocks + s->first;
        const float *scale = scales_of(x, blocks, first) + (ptrdiff_t)s->first * BAPQ_SCALE_ROWS;
        const uint16_t *bf16 = w->scale + half * 8;
        for (int32_t k = 0, b = 0, in_group = 0; k < s->runs; k++) {
            const int32_t run = v.grouped ? s->run_blocks[k] : 1, end = b + run;
            __m256i dot[4][2];
            add_block(n, halves, v, 1, w, s, b++, half, q, stride, dot);
            for (q += BAPQ_BLOCK; v.grouped && b < end; q += BAPQ_BLOCK) {
                add_block(n, halves, v, 0, w, s, b++, half, q, stride, dot);
            }
            __m256 step[2];
#pragma GCC unroll 2
            for (int h = 0; h < halves; h++) {
                step[h] = v.straight ? d_of(v.level, w, bf16 + h * 8)
                                     : _mm256_loadu_ps(&s->step[k][(half + h) * 8]);
            }
            if (v.straight && ++in_group == w->scale_blocks) {
                in_group = 0;
                bf16 += BAPQ_TILE_ROWS;
            }
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) {
                const ptrdiff_t here = at + i * blocks;
#pragma GCC unroll 2
                for (int h = 0; h < halves; h++) {
                    __m256 f = _mm256_fnmadd_ps(zero, _mm256_broadcast_ss(&x->sum[here]),
                                                _mm256_cvtepi32_ps(dot[i][h]));
                    for (int32_t next = 1; v.grouped && next < run; next++) {
                        f = _mm256_fnmadd_ps(zero, _mm256_broadcast_ss(&x->sum[here + next]), f);
                    }
                    const __m256 d = v.uniform
                                         ? step[h]
                                         : _mm256_mul_ps(step[h], _mm256_broadcast_ss(&scale[i]));
                    acc[i][h] = _mm256_fmadd_ps(d, f, acc[i][h]);
                }
            }
            at += run;
            scale += BAPQ_SCALE_ROWS; /* a run is one block, if it is read */
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
#pragma GCC unroll 2
            for (int h = 0; h < halves; h++) {
                if (s->closes) {
                    acc[i][h] =
                        _mm256_add_ps(acc[i][h], _mm256_loadu_ps(&s->offset[(half + h) * 8]));
                }
                _mm256_storeu_ps(to + i * BAPQ_TILE_ROWS + h * 8, acc[i][h]);
            }
        }
    }
}

BAPQ_INLINE void multiply(variant v, const bapq_tile *w, const bapq_panel *x, const stripe *s,
                          int32_t m, float *out) {
    BAPQ_BY_ROWS(4, m, rows_codes, v, w, x, s, out);
}

BAPQ_INLINE void rows_float(int n, int32_t first, const bapq_tile *w, const bapq_panel *x,
                            float *out) {
    const ptrdiff_t columns = (ptrdiff_t)w->blocks * BAPQ_BLOCK;
    const float *xi = x->x + first * columns;
    __m256 acc[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        acc[i][0] = acc[i][1] = _mm256_setzero_ps();
    }
    for (ptrdiff_t k = 0; k < columns; k++) {
        const float *weight = (const float *)(w->code[0] + k * BAPQ_TILE_ROWS * 4);
        const __m256 low = _mm256_loadu_ps(weight), high = _mm256_loadu_ps(weight + 8);
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            const __m256 xk = _mm256_broadcast_ss(&xi[i * columns + k]);
            acc[i][0] = _mm256_fmadd_ps(xk, low, acc[i][0]);
            acc[i][1] = _mm256_fmadd_ps(xk, high, acc[i][1]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        float *to = out + (ptrdiff_t)(first + i) * BAPQ_TILE_ROWS;
        _mm256_storeu_ps(to, acc[i][0]);
        _mm256_storeu_ps(to + 8, acc[i][1]);
    }
}

static void tile_float(const bapq_tile *w, const bapq_panel *x, int32_t m, float *out) {
    BAPQ_BY_ROWS(4, m, rows_float, w, x, out);
}

#include "depthwise.inc"

BAPQ_DEFINE_FAMILY(avx2, BAPQ_ALL_CODES, 0)
#endif
