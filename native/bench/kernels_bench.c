/* Speed of every kernel family at every level: GMAC/s of a layer of 256 rows (16 tiles), median of
 * interleaved repeats. Usage: kernels_bench [repeats] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/kernels.h"

enum {
    ROWS = 256,
    TILES = ROWS / BAPQ_TILE_ROWS,
    MAX_COLUMNS = 4096,
    MAX_M = 64,
    MAX_REPEATS = 99
};
enum { MAX_BLOCKS = MAX_COLUMNS / BAPQ_BLOCK, MAX_FAMILIES = 4 };

static const char *const level_names[BAPQ_LEVELS] = {"32", "8", "4", "2", "1"};
static const int32_t code_bytes[BAPQ_LEVELS] = {2048, 256, 256, 64, 64};

/* At levels 8 to 1 the tiles use the first code_bytes of each block's 2048. */
static uint8_t codes[2][(size_t)TILES * MAX_BLOCKS * 2048];
static uint16_t scales[MAX_BLOCKS * BAPQ_TILE_ROWS];
static int8_t q[MAX_M * MAX_COLUMNS];
static float x[MAX_M * MAX_COLUMNS], panel_scale[MAX_M * MAX_BLOCKS], panel_sum[MAX_M * MAX_BLOCKS];
static float out[MAX_M * BAPQ_TILE_ROWS];

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    const double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

static double seconds_per_layer(const bapq_kernels *k, int level, int32_t blocks, int32_t m) {
    const bapq_panel panel = {q, panel_scale, panel_sum, x};
    const double macs = (double)ROWS * blocks * BAPQ_BLOCK * m;
    const double wanted = strcmp(k->name, "scalar") == 0 ? 1e6 : 3e7; /* of work per sample */
    const int calls = macs > wanted ? 1 : (int)(wanted / macs);
    const double start = now_s();
    for (int c = 0; c < calls; c++) {
        for (size_t t = 0; t < TILES; t++) {
            const size_t at = t * (size_t)blocks * (size_t)code_bytes[level];
            const bapq_tile tile = {{codes[0] + at, codes[1] + at}, scales, blocks, 1, 8};
            k->tile[level](&tile, &panel, m, out);
        }
    }
    return (now_s() - start) / calls;
}

static double quantize_ns_per_float(const bapq_kernels *k) {
    const double start = now_s();
    for (int i = 0; i < MAX_M; i++) {
        k->quantize_row(x + i * MAX_COLUMNS, MAX_COLUMNS, q + i * MAX_COLUMNS, panel_scale,
                        panel_sum);
    }
    return (now_s() - start) * 1e9 / (MAX_M * MAX_COLUMNS);
}

int main(int argc, char **argv) {
    const int wanted = argc > 1 ? atoi(argv[1]) : 7;
    const int repeats = wanted < 1 ? 1 : wanted > MAX_REPEATS ? MAX_REPEATS : wanted;
    const bapq_kernels *family[MAX_FAMILIES];
    const int32_t families = bapq_kernels_available(family, MAX_FAMILIES);
    for (size_t i = 0; i < sizeof codes; i++) {
        ((uint8_t *)codes)[i] = (uint8_t)(i * 2654435761u >> 24) & 0x3f; /* floats near 1 */
    }
    for (int i = 0; i < MAX_BLOCKS * BAPQ_TILE_ROWS; i++) {
        scales[i] = 0x3c00;
    }
    for (int i = 0; i < MAX_M * MAX_COLUMNS; i++) {
        q[i] = (int8_t)(i * 37 % 255 - 127);
        x[i] = (float)q[i] / 127.0f;
    }
    for (int i = 0; i < MAX_M * MAX_BLOCKS; i++) {
        panel_scale[i] = 1.0f / 127.0f;
    }

    static double sample[MAX_FAMILIES][MAX_REPEATS];
    printf("GMAC/s    K    m level");
    for (int f = 0; f < families; f++) {
        printf(" %11s", family[f]->name);
    }
    printf("\n");
    static const int32_t columns[] = {512, 1024, 4096}, panel_rows[] = {1, 8, 64};
    for (int c = 0; c < 3; c++) {
        for (int r = 0; r < 3; r++) {
            for (int level = 0; level < BAPQ_LEVELS; level++) {
                const int32_t m = panel_rows[r], k = columns[c];
                for (int s = 0; s < repeats; s++) {
                    for (int f = 0; f < families; f++) {
                        sample[f][s] = seconds_per_layer(family[f], level, k / BAPQ_BLOCK, m);
                    }
                }
                printf("%11d %4d %5s", k, m, level_names[level]);
                for (int f = 0; f < families; f++) {
                    qsort(sample[f], (size_t)repeats, sizeof(double), ascending);
                    const double macs = (double)ROWS * k * m;
                    printf(" %11.2f", macs / sample[f][repeats / 2] * 1e-9);
                }
                printf("\n");
            }
        }
    }
    printf("quantize_row, ns/float:");
    for (int s = 0; s < repeats; s++) {
        for (int f = 0; f < families; f++) {
            sample[f][s] = quantize_ns_per_float(family[f]);
        }
    }
    for (int f = 0; f < families; f++) {
        qsort(sample[f], (size_t)repeats, sizeof(double), ascending);
        printf(" %s %.3f", family[f]->name, sample[f][repeats / 2]);
    }
    printf("\n");
    return 0;
}
