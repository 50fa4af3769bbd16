/* AVX-512 with VNNI: 8 activation rows by 16 outputs in registers. One dpbusd takes a 64-byte code
 * vector (16 rows x 4 columns) and 4 activations, broadcast from memory. */
#if defined(__x86_64__)
#include <immintrin.h>

#define BAPQ_STRIPE_PLANES 1
#define BAPQ_STRAIGHT_ROWS 8
#include "stripe.inc"

typedef uint16_t u16x32 __attribute__((vector_size(64)));

BAPQ_INLINE float unit_of(int level) {
    (void)level;
    return 1.0f;
}

BAPQ_INLINE float shift_of(int level, const bapq_tile *w) { return -zero_of(level, w); }

BAPQ_INLINE __m512i shift_right(__m512i v, int bits) { return (__m512i)((u16x32)v >> bits); }

/* residual_steps * (0..15), in each of the four parts. */
BAPQ_INLINE __m512i steps_of_p4(const bapq_tile *w) {
    const __m128i steps = _mm_set1_epi16((short)w->residual_steps);
    return _mm512_broadcast_i32x4(
        _mm_packus_epi16(_mm_mullo_epi16(steps, _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7)),
                         _mm_mullo_epi16(steps, _mm_setr_epi16(8, 9, 10, 11, 12, 13, 14, 15))));
}

/* Code vectors of block b: code[j] holds columns 4j..4j+3. steps: residual_steps * (0..15). */
BAPQ_INLINE void unpack(int level, const bapq_tile *w, int32_t b, __m512i steps, __m512i code[8]) {
    const __m512i low = _mm512_set1_epi8(15);
    if (level == BAPQ_L8 || level == BAPQ_L4) {
        for (int p = 0; p < 4; p++) {
            const __m512i p4 = _mm512_loadu_si512(w->code[0] + (ptrdiff_t)b * 256 + p * 64);
            code[2 * p] = _mm512_and_si512(p4, low);
            code[2 * p + 1] = _mm512_and_si512(shift_right(p4, 4), low);
            if (level == BAPQ_L8) {
                const __m512i r8 = _mm512_loadu_si512(w->code[1] + (ptrdiff_t)b * 256 + p * 64);
                code[2 * p] = _mm512_add_epi8(_mm512_shuffle_epi8(steps, code[2 * p]),
                                              _mm512_and_si512(r8, low));
                code[2 * p + 1] = _mm512_add_epi8(_mm512_shuffle_epi8(steps, code[2 * p + 1]),
                                                  _mm512_and_si512(shift_right(r8, 4), low));
            }
        }
        return;
    }
    const __m512i s1 = _mm512_loadu_si512(w->code[0] + (ptrdiff_t)b * 64);
    if (level == BAPQ_L1) {
        for (int j = 0; j < 8; j++) {
            code[j] = _mm512_and_si512(shift_right(s1, j), _mm512_set1_epi8(1));
        }
        return;
    }
    /* Interleave sign and magnitude bits once: four 2-bit codes per byte, even and odd j apart. */
    const __m512i m1 = _mm512_loadu_si512(w->code[1] + (ptrdiff_t)b * 64);
    const __m512i bits = _mm512_set1_epi8(0x55);
    const __m512i even = _mm512_or_si512(_mm512_and_si512(m1, bits),
                                         _mm512_andnot_si512(bits, _mm512_add_epi8(s1, s1)));
    const __m512i odd =
        _mm512_or_si512(_mm512_and_si512(shift_right(m1, 1), bits), _mm512_andnot_si512(bits, s1));
    for (int k = 0; k < 4; k++) {
        code[2 * k] = _mm512_and_si512(shift_right(even, 2 * k), _mm512_set1_epi8(3));
        code[2 * k + 1] = _mm512_and_si512(shift_right(odd, 2 * k), _mm512_set1_epi8(3));
    }
}

BAPQ_INLINE void decode(int level, const bapq_tile *w, stripe *s) {
    const __m512i steps = steps_of_p4(w);
    for (int32_t b = 0; b < s->blocks; b++) {
        __m512i code[8];
        unpack(level, w, s->first + b, steps, code);
        for (int j = 0; j < 8; j++) {
            _mm512_store_si512(s->code[0] + (ptrdiff_t)b * 512 + j * 64, code[j]);
        }
    }
}

BAPQ_INLINE void add_codes(int level, const bapq_tile *w, const stripe *s, int32_t b,
                           int32_t total[BAPQ_TILE_ROWS]) {
    (void)level, (void)w;
    __m512i sum = _mm512_loadu_si512(total);
    for (int j = 0; j < 8; j++) {
        const __m512i code = _mm512_load_si512(s->code[0] + (ptrdiff_t)b * 512 + j * 64);
        sum = _mm512_dpbusd_epi32(sum, code, _mm512_set1_epi8(1));
    }
    _mm512_storeu_si512(total, sum);
}

/* Weight steps of the tile's rows. */
BAPQ_INLINE __m512 d_of(int level, const bapq_tile *w, const uint16_t *bf16) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)bf16));
    const __m512 d = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    return level == BAPQ_L8 ? _mm512_mul_ps(d, _mm512_set1_ps(1.0f / (float)w->residual_steps)) : d;
}

/* n rows; `straight`: their codes come from the planes, decoded here. */
BAPQ_INLINE void rows_codes(int n, int32_t first, variant v, const bapq_tile *w,
                            const bapq_panel *x, const stripe *s, float *out) {
    const ptrdiff_t blocks = w->blocks;
    const ptrdiff_t stride = blocks * BAPQ_BLOCK;
    const int8_t *q = x->q + first * stride + (ptrdiff_t)s->first * BAPQ_BLOCK;
    const __m512 zero = _mm512_set1_ps(zero_of(v.level, w));
    const __m512i steps = steps_of_p4(w);
    float *to = out + (ptrdiff_t)first * BAPQ_TILE_ROWS;
    __m512 acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        acc[i] = s->first == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(to + i * BAPQ_TILE_ROWS);
    }
    ptrdiff_t at = first * blocks + s->first;
    const float *scale = scales_of(x, blocks, first) + (ptrdiff_t)s->first * BAPQ_SCALE_ROWS;
    int32_t in_group = 0;
    const uint16_t *bf16 = w->scale;
    for (int32_t k = 0, b = 0; k < s->runs; k++) {
        const int32_t run = v.grouped ? s->run_blocks[k] : 1, end = b + run;
        __m512i dot[8];
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            dot[i] = _mm512_setzero_si512();
        }
        do {
            __m512i code[8];
            if (v.straight) {
                unpack(v.level, w, b, steps, code);
            } else {
                for (int j = 0; j < 8; j++) {
                    code[j] = _mm512_load_si512(s->code[0] + (ptrdiff_t)b * 512 + j * 64);
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < n; i++) {
                const int8_t *qi = q + i * stride + (ptrdiff_t)b * BAPQ_BLOCK;
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++) {
                    int32_t four;
                    memcpy(&four, qi + 4 * j, sizeof four);
                    dot[i] = _mm512_dpbusd_epi32(dot[i], code[j], _mm512_set1_epi32(four));
                }
            }
            b++;
        } while (v.grouped && b < end);
        __m512 step;
        if (v.straight) {
            step = d_of(v.level, w, bf16);
            if (++in_group == w->scale_blocks) {
                in_group = 0;
                bf16 += BAPQ_TILE_ROWS;
            }
        } else {
            step = _mm512_loadu_ps(s->step[k]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            const ptrdiff_t here = at + i * blocks;
            __m512 f =
                _mm512_fnmadd_ps(zero, _mm512_set1_ps(x->sum[here]), _mm512_cvtepi32_ps(dot[i]));
            for (int32_t next = 1; v.grouped && next < run; next++) {
                f = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x->sum[here + next]), f);
            }
            const __m512 d =
                v.uniform ? step
                          : _mm512_mul_ps(step, _mm512_set1_ps(scale[i / 4 * 4 * blocks + i % 4]));
            acc[i] = _mm512_fmadd_ps(d, f, acc[i]);
        }
        at += run;
        scale += BAPQ_SCALE_ROWS; /* a run is one block, if it is read */
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        if (s->closes) {
            acc[i] = _mm512_add_ps(acc[i], _mm512_loadu_ps(s->offset));
        }
        _mm512_storeu_ps(to + i * BAPQ_TILE_ROWS, acc[i]);
    }
}

BAPQ_INLINE void multiply(variant v, const bapq_tile *w, const bapq_panel *x, const stripe *s,
                          int32_t m, float *out) {
    BAPQ_BY_ROWS(8, m, rows_codes, v, w, x, s, out);
}

BAPQ_INLINE void rows_float(int n, int32_t first, const bapq_tile *w, const bapq_panel *x,
                            float *out) {
    const ptrdiff_t columns = (ptrdiff_t)w->blocks * BAPQ_BLOCK;
    const float *xi = x->x + first * columns;
    __m512 acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        acc[i] = _mm512_setzero_ps();
    }
    for (ptrdiff_t k = 0; k < columns; k++) {
        const __m512 weight = _mm512_loadu_ps(w->code[0] + k * BAPQ_TILE_ROWS * 4);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            acc[i] = _mm512_fmadd_ps(_mm512_set1_ps(xi[i * columns + k]), weight, acc[i]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        _mm512_storeu_ps(out + (ptrdiff_t)(first + i) * BAPQ_TILE_ROWS, acc[i]);
    }
}

static void tile_float(const bapq_tile *w, const bapq_panel *x, int32_t m, float *out) {
    BAPQ_BY_ROWS(8, m, rows_float, w, x, out);
}

#include "depthwise.inc"

BAPQ_DEFINE_FAMILY(avx512vnni, BAPQ_ALL_CODES, 0)
#endif
