/* AVX-512 with VNNI: 8 activation rows by 16 outputs in registers. One dpbusd takes a 64-byte code
 * vector (16 rows x 4 columns) and 4 activations, broadcast from memory. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "common.inc"

typedef uint16_t u16x32 __attribute__((vector_size(64)));

BAPQ_INLINE __m512i shift_right(__m512i v, int bits) { return (__m512i)((u16x32)v >> bits); }

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

BAPQ_INLINE void rows_codes(int n, int32_t first, int level, const bapq_tile *w,
                            const bapq_panel *x, float *out) {
    const int32_t blocks = w->blocks;
    const ptrdiff_t stride = (ptrdiff_t)blocks * BAPQ_BLOCK;
    const int8_t *q = x->q + first * stride;
    const float *scale = x->scale + (ptrdiff_t)first * blocks;
    const float *sum = x->sum + (ptrdiff_t)first * blocks;
    const __m512 zero = _mm512_set1_ps(zero_of(level, w));
    const __m512 step = _mm512_set1_ps(1.0f / (float)w->residual_steps);
    const __m512i steps = _mm512_broadcast_i32x4(
        _mm_packus_epi16(_mm_mullo_epi16(_mm_set1_epi16((short)w->residual_steps),
                                         _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7)),
                         _mm_mullo_epi16(_mm_set1_epi16((short)w->residual_steps),
                                         _mm_setr_epi16(8, 9, 10, 11, 12, 13, 14, 15))));
    __m512 acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        acc[i] = _mm512_setzero_ps();
    }
    const uint16_t *group = w->scale;
    for (int32_t b = 0, used = 0; b < blocks; b++) {
        const __m256i half = _mm256_loadu_si256((const __m256i *)group);
        __m512 d = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        if (level == BAPQ_L8) {
            d = _mm512_mul_ps(d, step);
        }
        if (++used == w->scale_blocks) {
            used = 0;
            group += BAPQ_TILE_ROWS;
        }
        __m512i code[8];
        unpack(level, w, b, steps, code);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            const int8_t *qi = q + i * stride + (ptrdiff_t)b * BAPQ_BLOCK;
            __m512i dot = _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                int32_t four;
                memcpy(&four, qi + 4 * j, sizeof four);
                dot = _mm512_dpbusd_epi32(dot, code[j], _mm512_set1_epi32(four));
            }
            const ptrdiff_t at = (ptrdiff_t)i * blocks + b;
            const __m512 f =
                _mm512_fnmadd_ps(zero, _mm512_set1_ps(sum[at]), _mm512_cvtepi32_ps(dot));
            acc[i] = _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(scale[at])), f, acc[i]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        _mm512_storeu_ps(out + (ptrdiff_t)(first + i) * BAPQ_TILE_ROWS, acc[i]);
    }
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

BAPQ_INLINE void tile_codes(int level, const bapq_tile *w, const bapq_panel *x, int32_t m,
                            float *out) {
    BAPQ_BY_ROWS(8, m, rows_codes, level, w, x, out);
}

static void tile_float(const bapq_tile *w, const bapq_panel *x, int32_t m, float *out) {
    BAPQ_BY_ROWS(8, m, rows_float, w, x, out);
}

BAPQ_DEFINE_FAMILY(avx512vnni)
#endif
