/* CRC-32 three ways: by tables, by the carry-less multiplication of x86-64, and by the CRC
 * instructions of ARM64. The best that the CPU has is chosen at run time. */
#include "crc32.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

/* Slicing by eight: eight independent look-ups per eight bytes instead of eight dependent ones. */
static uint32_t table[8][256];
static uint32_t (*update)(uint32_t c, const uint8_t *data, size_t bytes);
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void fill_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++) c = (c >> 1) ^ (0xEDB88320u & (0u - (c & 1u)));
        table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int slice = 1; slice < 8; slice++)
            table[slice][i] = (table[slice - 1][i] >> 8) ^ table[0][table[slice - 1][i] & 0xFF];
}

static uint32_t by_table(uint32_t c, const uint8_t *data, size_t bytes) {
    for (; bytes >= 8; bytes -= 8, data += 8) {
        uint32_t low, high;
        memcpy(&low, data, 4); /* both targets are little-endian */
        memcpy(&high, data + 4, 4);
        low ^= c;
        c = table[7][low & 0xFF] ^ table[6][(low >> 8) & 0xFF] ^ table[5][(low >> 16) & 0xFF] ^
            table[4][low >> 24] ^ table[3][high & 0xFF] ^ table[2][(high >> 8) & 0xFF] ^
            table[1][(high >> 16) & 0xFF] ^ table[0][high >> 24];
    }
    for (; bytes > 0; bytes--) c = (c >> 8) ^ table[0][(c ^ *data++) & 0xFF];
    return c;
}

/* By instructions: the checksum of streamed chunks is on every run's way. Table: 1.4 GB/s. */
#if defined(__x86_64__)
/* Moves 16 bytes on by a distance: what it adds to the 16 bytes there, modulo the polynomial. `k`
 * holds x^(distance + 32) and x^(distance - 32), distance in bits, modulo it and reflected. */
__attribute__((target("pclmul"))) static __m128i fold(__m128i x, __m128i k, const uint8_t *next) {
    __m128i moved =
        _mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x00), _mm_clmulepi64_si128(x, k, 0x11));
    return _mm_xor_si128(moved, _mm_loadu_si128((const __m128i *)next));
}

__attribute__((target("pclmul"))) static uint32_t by_instructions(uint32_t c, const uint8_t *data,
                                                                  size_t bytes) {
    if (bytes < 64) return by_table(c, data, bytes);
    const __m128i by_64 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4);
    const __m128i by_16 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m128i x[4];
    uint8_t rest[4][16];
    for (int i = 0; i < 4; i++) x[i] = _mm_loadu_si128((const __m128i *)data + i);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)c));
    for (data += 64, bytes -= 64; bytes >= 64; data += 64, bytes -= 64)
        for (int i = 0; i < 4; i++) x[i] = fold(x[i], by_64, data + 16 * i);
    for (int i = 1; i < 4; i++) _mm_storeu_si128((__m128i *)rest[i], x[i]);
    for (int i = 1; i < 4; i++) x[0] = fold(x[0], by_16, rest[i]);
    for (; bytes >= 16; data += 16, bytes -= 16) x[0] = fold(x[0], by_16, data);
    _mm_storeu_si128((__m128i *)rest[0], x[0]);
    return by_table(by_table(0, rest[0], 16), data, bytes);
}

/* The same, four products at once; the last 64 bytes are left to the narrow one. */
#define WIDE __attribute__((target("avx512f,vpclmulqdq")))

WIDE static __m512i fold_wide(__m512i x, __m512i k, const uint8_t *next) {
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(x, k, 0x00),
                                     _mm512_clmulepi64_epi128(x, k, 0x11), _mm512_loadu_si512(next),
                                     0x96); /* xor of all three */
}

WIDE static uint32_t by_wide_instructions(uint32_t c, const uint8_t *data, size_t bytes) {
    if (bytes < 256) return by_instructions(c, data, bytes);
    const __m512i by_256 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x1322d1430, 0x11542778a));
    const __m512i by_64 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x1c6e41596, 0x154442bd4));
    __m512i x[4];
    uint8_t rest[4][64];
    for (int i = 0; i < 4; i++) x[i] = _mm512_loadu_si512(data + 64 * i);
    x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)c)));
    for (data += 256, bytes -= 256; bytes >= 256; data += 256, bytes -= 256)
        for (int i = 0; i < 4; i++) x[i] = fold_wide(x[i], by_256, data + 64 * i);
    for (int i = 1; i < 4; i++) _mm512_storeu_si512(rest[i], x[i]);
    for (int i = 1; i < 4; i++) x[0] = fold_wide(x[0], by_64, rest[i]);
    _mm512_storeu_si512(rest[0], x[0]);
    return by_instructions(by_instructions(0, rest[0], 64), data, bytes);
}
#elif defined(__aarch64__)
__attribute__((target("+crc"))) static uint32_t by_instructions(uint32_t c, const uint8_t *data,
                                                                size_t bytes) {
    for (; bytes >= 8; bytes -= 8, data += 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        c = __crc32d(c, word);
    }
    return by_table(c, data, bytes);
}
#endif

static void prepare(void) {
    fill_table();
    update = by_table;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("pclmul")) update = by_instructions;
    if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("vpclmulqdq"))
        update = by_wide_instructions;
#elif defined(__aarch64__)
    if ((getauxval(AT_HWCAP) & HWCAP_CRC32) != 0) update = by_instructions;
#endif
}

uint32_t bapq_crc32(const uint8_t *data, size_t bytes) {
    pthread_once(&once, prepare);
    return ~update(0xFFFFFFFFu, data, bytes);
}
