/* Speed of the kernels. As a program: GMAC/s of every family at every level on a layer of 256 rows,
 * median of interleaved repeats. Usage: kernels_bench [repeats]
 *
 * As a shared library, which `make bench-kernels` loads beside libbapq.so, it gives the functions
 * below: one timed pass over layers of any shape, and what the machine can do at most. */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels/kernels.h"

/* Layers of one shape that share one input: more copies than a cache holds come from memory. */
typedef struct {
    int32_t level, rows, columns, m, copies, scale_blocks;
    uint8_t *codes[2];
    uint16_t *scales;
    int8_t *q;
    float *x, *scale, *sum, *out;
} bapq_bench;

BAPQ_EXPORT void bapq_bench_close(bapq_bench *b);
BAPQ_EXPORT bapq_bench *bapq_bench_open(int32_t level, int32_t rows, int32_t columns, int32_t m,
                                        int32_t copies, int32_t scale_blocks);
BAPQ_EXPORT double bapq_bench_products_s(bapq_bench *b, const bapq_kernels *k, int32_t passes);
BAPQ_EXPORT double bapq_bench_inputs_s(bapq_bench *b, const bapq_kernels *k, int32_t passes);
BAPQ_EXPORT double bapq_bench_bytes_per_s(int64_t bytes);
BAPQ_EXPORT double bapq_bench_macs_per_s(const char *family);

static const int32_t block_bytes[BAPQ_LEVELS] = {2048, 256, 256, 64, 64}; /* of a plane, a tile */
static const int planes[BAPQ_LEVELS] = {1, 2, 1, 2, 1};

/* Of this thread: the turns of other programs on its core do not count. */
static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static size_t plane_bytes(const bapq_bench *b) {
    return (size_t)(b->rows / BAPQ_TILE_ROWS) * (size_t)(b->columns / BAPQ_BLOCK) *
           (size_t)block_bytes[b->level];
}

static size_t tile_scales(const bapq_bench *b) {
    const int32_t blocks = b->columns / BAPQ_BLOCK;
    return (size_t)((blocks + b->scale_blocks - 1) / b->scale_blocks) * BAPQ_TILE_ROWS;
}

static void *allocate(size_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory) memset(memory, 0, bytes);
    return memory;
}

void bapq_bench_close(bapq_bench *b) {
    void *const owned[] = {b->codes[0], b->codes[1], b->scales, b->q, b->x,
                           b->scale,    b->sum,      b->out,    b};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
}

/* level: an index of bapq_kernels; rows: a multiple of 16; columns: of 32. NULL: no memory. */
bapq_bench *bapq_bench_open(int32_t level, int32_t rows, int32_t columns, int32_t m, int32_t copies,
                            int32_t scale_blocks) {
    bapq_bench *b = calloc(1, sizeof *b);
    if (!b) return NULL;
    b->level = level, b->rows = rows, b->columns = columns, b->m = m, b->copies = copies;
    b->scale_blocks = scale_blocks;
    const size_t values = (size_t)m * (size_t)columns, blocks = values / BAPQ_BLOCK;
    const size_t scales = (size_t)copies * (size_t)(rows / BAPQ_TILE_ROWS) * tile_scales(b);
    for (int p = 0; p < planes[level]; p++) {
        b->codes[p] = allocate((size_t)copies * plane_bytes(b));
        for (size_t i = 0; b->codes[p] && i < (size_t)copies * plane_bytes(b); i++)
            b->codes[p][i] = (uint8_t)(i * 2654435761u >> 24) & 0x3f; /* floats near 1 */
    }
    b->scales = allocate(scales * sizeof *b->scales);
    b->q = allocate(values);
    b->x = allocate(values * sizeof(float));
    const size_t scaled = blocks + (size_t)BAPQ_SCALE_ROWS * (size_t)(columns / BAPQ_BLOCK);
    b->scale = allocate(scaled * sizeof(float));
    b->sum = allocate(blocks * sizeof(float));
    b->out = allocate((size_t)m * BAPQ_TILE_ROWS * sizeof(float));
    if (!b->codes[0] || (planes[level] == 2 && !b->codes[1]) || !b->scales || !b->q || !b->x ||
        !b->scale || !b->sum || !b->out) {
        bapq_bench_close(b);
        return NULL;
    }
    for (size_t i = 0; i < scales; i++) b->scales[i] = 0x3c00;
    for (size_t i = 0; i < values; i++) {
        b->q[i] = (int8_t)(i * 37 % 255 - 127);
        b->x[i] = (float)b->q[i] / 127.0f;
    }
    for (size_t i = 0; i < scaled; i++) b->scale[i] = 1.0f / 127.0f;
    return b;
}

/* Time of a pass over all copies: every tile times the panel of m rows. */
double bapq_bench_products_s(bapq_bench *b, const bapq_kernels *k, int32_t passes) {
    const bapq_panel panel = {.q = b->q, .scale = b->scale, .sum = b->sum, .x = b->x};
    const size_t tiles = (size_t)(b->rows / BAPQ_TILE_ROWS) * (size_t)b->copies;
    const size_t bytes = plane_bytes(b) / (size_t)(b->rows / BAPQ_TILE_ROWS);
    const double start = now_s();
    for (int32_t pass = 0; pass < passes; pass++) {
        for (size_t t = 0; t < tiles; t++) {
            const uint8_t *second = b->codes[1] ? b->codes[1] + t * bytes : NULL;
            const bapq_tile tile = {.code = {b->codes[0] + t * bytes, second},
                                    .scale = b->scales + t * tile_scales(b),
                                    .blocks = b->columns / BAPQ_BLOCK,
                                    .scale_blocks = b->scale_blocks,
                                    .residual_steps = 13};
            k->tile[b->level](&tile, &panel, b->m, b->out);
        }
    }
    return (now_s() - start) / passes;
}

/* Time to quantize the input, once for each copy. */
double bapq_bench_inputs_s(bapq_bench *b, const bapq_kernels *k, int32_t passes) {
    if (b->level == BAPQ_L32) return 0.0;
    const double start = now_s();
    for (int32_t pass = 0; pass < passes * b->copies; pass++) {
        for (int32_t i = 0; i < b->m; i++) {
            const size_t at = (size_t)i * (size_t)b->columns;
            const size_t row_blocks = (size_t)b->columns / BAPQ_BLOCK;
            const int32_t four = i / BAPQ_SCALE_ROWS * BAPQ_SCALE_ROWS;
            k->quantize_row(b->x + at, b->columns, b->q + at,
                            b->scale + (size_t)four * row_blocks + (i - four),
                            b->sum + at / BAPQ_BLOCK);
        }
    }
    return (now_s() - start) / passes;
}

/* Memory that one thread reads, in a few streams, which keep more of it in flight than one does.
 * `bytes` should be far beyond the last cache. 0: no memory. */
double bapq_bench_bytes_per_s(int64_t bytes) {
    typedef uint64_t line __attribute__((vector_size(64)));
    enum { STREAMS = 4 };
    line *lines = allocate((size_t)bytes);
    if (!lines) return 0.0;
    const size_t part = (size_t)bytes / sizeof *lines / STREAMS;
    line sums[STREAMS] = {{0}};
    const double start = now_s();
    for (size_t i = 0; i < part; i++)
        for (size_t s = 0; s < STREAMS; s++) sums[s] += lines[s * part + i];
    double seconds = now_s() - start;
    for (int s = 0; s < STREAMS; s++)
        for (int word = 0; word < 8; word++) seconds += (double)sums[s][word]; /* zeros, but used */
    free(lines);
    return (double)(part * STREAMS * sizeof *lines) / seconds;
}

/* Independent chains of a family's multiply-add of int8, all in registers. */
enum { CHAINS = 12, STEPS = 2000000 };

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void spin_avx2(void) {
    __m256i sum[CHAINS] = {_mm256_setzero_si256()}, b = _mm256_set1_epi8(1);
    for (int s = 0; s < STEPS; s++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
            __m256i products;
            __asm__ volatile("vpmaddubsw %1, %1, %0" : "=x"(products) : "x"(b));
            sum[i] = _mm256_add_epi16(sum[i], products);
            __asm__ volatile("" : "+x"(sum[i]));
        }
    }
}
__attribute__((target("avx512f,avx512vnni"))) static void spin_avx512vnni(void) {
    __m512i sum[CHAINS] = {_mm512_setzero_si512()}, b = _mm512_set1_epi8(1);
    for (int s = 0; s < STEPS; s++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
            sum[i] = _mm512_dpbusd_epi32(sum[i], b, b);
            __asm__ volatile("" : "+v"(sum[i]));
        }
    }
}
#elif defined(__aarch64__)
static void spin_neon(void) {
    int16x8_t sum[CHAINS] = {vdupq_n_s16(0)};
    int8x16_t b = vdupq_n_s8(1);
    for (int s = 0; s < STEPS; s++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            __asm__ volatile("smlal %0.8h, %1.8b, %1.8b" : "+w"(sum[i]) : "w"(b));
    }
}
__attribute__((target("arch=armv8.2-a+dotprod"))) static void spin_neondot(void) {
    int32x4_t sum[CHAINS] = {vdupq_n_s32(0)};
    int8x16_t b = vdupq_n_s8(1);
    for (int s = 0; s < STEPS; s++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(sum[i]) : "w"(b));
    }
}
#endif

/* 0: a family that has no such instruction. */
double bapq_bench_macs_per_s(const char *family) {
    static const struct {
        const char *family;
        void (*spin)(void);
        int macs;
    } peaks[] = {
#if defined(__x86_64__)
        {"avx2", spin_avx2, 32},
        {"avx512vnni", spin_avx512vnni, 64},
#elif defined(__aarch64__)
        {"neon", spin_neon, 8},
        {"neondot", spin_neondot, 16},
#endif
    };
    for (size_t i = 0; i < sizeof peaks / sizeof *peaks; i++) {
        if (strcmp(peaks[i].family, family) != 0) continue;
        const double start = now_s();
        peaks[i].spin();
        return (double)peaks[i].macs * CHAINS * STEPS / (now_s() - start);
    }
    return 0.0;
}

static int ascending(const void *a, const void *b) {
    const double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

enum { ROWS = 256, MAX_FAMILIES = 4, MAX_REPEATS = 99 };

int main(int argc, char **argv) {
    const int wanted = argc > 1 ? atoi(argv[1]) : 7;
    const int repeats = wanted < 1 ? 1 : wanted > MAX_REPEATS ? MAX_REPEATS : wanted;
    const bapq_kernels *family[MAX_FAMILIES];
    const int32_t families = bapq_kernels_available(family, MAX_FAMILIES);
    static const char *const names[BAPQ_LEVELS] = {"32", "8", "4", "2", "1"};
    static const int32_t columns[] = {512, 1024, 4096}, panel_rows[] = {1, 8, 64};
    static double sample[MAX_FAMILIES][MAX_REPEATS];
    printf("GMAC/s    K    m level");
    for (int f = 0; f < families; f++) printf(" %11s", family[f]->name);
    printf("\n");
    for (int i = 0; i < 3 * 3 * BAPQ_LEVELS; i++) {
        const int32_t k = columns[i / (3 * BAPQ_LEVELS)], m = panel_rows[i / BAPQ_LEVELS % 3];
        const int level = i % BAPQ_LEVELS;
        bapq_bench *bench = bapq_bench_open(level, ROWS, k, m, 1, 1);
        if (!bench) return 1;
        const double macs = (double)ROWS * k * m;
        for (int s = 0; s < repeats; s++) {
            for (int f = 0; f < families; f++) {
                const double work = strcmp(family[f]->name, "scalar") == 0 ? 1e6 : 3e7;
                const int passes = macs > work ? 1 : (int)(work / macs);
                sample[f][s] = bapq_bench_products_s(bench, family[f], passes);
            }
        }
        bapq_bench_close(bench);
        printf("%11d %4d %5s", k, m, names[level]);
        for (int f = 0; f < families; f++) {
            qsort(sample[f], (size_t)repeats, sizeof(double), ascending);
            printf(" %11.2f", macs / sample[f][repeats / 2] * 1e-9);
        }
        printf("\n");
    }
    return 0;
}
