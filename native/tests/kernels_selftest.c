/* Compares every kernel family that this CPU can run with the scalar one, bit for bit, over seeded
 * random and extreme cases. The digest covers the scalar family's results, so that runs on
 * different CPUs can be compared too. Exit status 1 on a difference. */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

enum { MAX_BLOCKS = 40, MAX_ROWS = 33, MAX_COLUMNS = MAX_BLOCKS * BAPQ_BLOCK };

static const char *const level_names[BAPQ_LEVELS] = {"32", "8", "4", "2", "1"};

typedef struct {
    uint8_t planes[2][MAX_BLOCKS * 256];
    float weights[MAX_COLUMNS * BAPQ_TILE_ROWS];
    uint16_t scales[MAX_BLOCKS * BAPQ_TILE_ROWS];
    int8_t q[MAX_ROWS * MAX_COLUMNS];
    float scale[(MAX_ROWS + BAPQ_SCALE_ROWS) * MAX_BLOCKS];
    float sum[MAX_ROWS * MAX_BLOCKS];
    float x[MAX_ROWS * MAX_COLUMNS];
} operands;

typedef struct {
    int8_t q[MAX_COLUMNS];
    float scale[MAX_BLOCKS * BAPQ_SCALE_ROWS];
    float sum[MAX_BLOCKS];
} quantized;

static uint64_t state;
static uint64_t digest = 0xcbf29ce484222325u;

static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) ^ (uint32_t)(state >> 20);
}

static int32_t random_in(int32_t low, int32_t high) {
    return low + (int32_t)(random_bits() % (uint32_t)(high - low + 1));
}

static float random_float(int32_t exponent) {
    return ldexpf((float)(int32_t)(random_bits() & 0xffffff) - 8388608.0f, exponent - 23);
}

static void add_to_digest(const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        digest = (digest ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
    }
}

/* NaNs are equal whatever their sign and payload, which IEEE 754 leaves open. */
static void unify_nans(float *values, size_t count) {
    for (size_t i = 0; i < count; i++) {
        values[i] = isnan(values[i]) ? NAN : values[i];
    }
}

/* extreme: 0 random operands, 1..4 the corners of codes and activations. */
static void fill(operands *o, int extreme) {
    const uint8_t code_byte = extreme % 2 == 1 ? 0xff : 0x00;
    for (size_t i = 0; i < sizeof o->planes; i++) {
        ((uint8_t *)o->planes)[i] = extreme > 0 ? code_byte : (uint8_t)random_bits();
    }
    for (int i = 0; i < MAX_ROWS * MAX_COLUMNS; i++) {
        o->q[i] = (int8_t)(extreme == 0 ? random_in(-127, 127) : extreme <= 2 ? -127 : 127);
        o->x[i] = random_float(random_in(-3, 3));
    }
    for (int i = 0; i < MAX_COLUMNS * BAPQ_TILE_ROWS; i++) {
        o->weights[i] = random_float(random_in(-6, 0));
    }
    for (int i = 0; i < MAX_BLOCKS * BAPQ_TILE_ROWS; i++) {
        o->scales[i] = (uint16_t)random_in(0x3a00, 0x3f80);
    }
    for (int i = 0; i < (MAX_ROWS + BAPQ_SCALE_ROWS) * MAX_BLOCKS; i++) {
        o->scale[i] = fabsf(random_float(random_in(-8, 2)));
    }
}

static bool same_tile(const bapq_kernels *k, operands *o, int level, int extreme) {
    static float got[MAX_ROWS * BAPQ_TILE_ROWS], want[MAX_ROWS * BAPQ_TILE_ROWS];
    const int32_t blocks = random_in(1, random_in(0, 3) == 0 ? MAX_BLOCKS : 5);
    const int32_t m = random_in(1, MAX_ROWS);
    const bapq_tile tile = {
        .code = {level == BAPQ_L32 ? (const uint8_t *)o->weights : o->planes[0], o->planes[1]},
        .scale = o->scales,
        .blocks = blocks,
        .padding = random_in(0, 31),
        .scale_blocks = random_in(1, random_in(0, 1) ? 4 : 20),
        .residual_steps = extreme > 0 ? 16 : random_in(8, 16),
    };
    const int32_t uniform = random_in(0, 1), columns = blocks * BAPQ_BLOCK;
    static int8_t q[MAX_ROWS * MAX_COLUMNS]; /* as a panel has it: 0 in the padding */
    memcpy(q, o->q, (size_t)(m * columns));
    for (int32_t i = 0; i < m; i++) {
        memset(q + (i + 1) * columns - tile.padding, 0, (size_t)tile.padding);
    }
    const bapq_panel panel = {
        .q = q,
        .scale = o->scale,
        .sum = o->sum,
        .x = o->x,
        .uniform = uniform,
        .zero_point = uniform ? random_in(-3, 3) * random_in(0, 42) : 0,
    };
    bapq_kernels_scalar.block_sums(q, m, blocks, o->sum);
    const size_t count = (size_t)m * BAPQ_TILE_ROWS;
    memset(got, 0xff, sizeof got);
    bapq_kernels_scalar.tile[level](&tile, &panel, m, want);
    k->tile[level](&tile, &panel, m, got);
    unify_nans(got, count);
    unify_nans(want, count);
    if (k == &bapq_kernels_scalar) {
        add_to_digest(want, count * sizeof *want);
    }
    if (memcmp(got, want, count * sizeof *want) != 0) {
        printf("  differs: level %s, %d blocks, %d rows, scale_blocks %d, steps %d, extreme %d\n",
               level_names[level], blocks, m, tile.scale_blocks, tile.residual_steps, extreme);
        return false;
    }
    return true;
}

/* Rows with every magnitude a float can have, zeros, infinities and NaNs among them. */
static bool same_quantize(const bapq_kernels *k) {
    static float x[MAX_COLUMNS];
    static quantized got, want;
    const int32_t n = random_in(1, MAX_COLUMNS);
    const int32_t kind = random_in(0, 4);
    for (int i = 0; i < n; i++) {
        const uint32_t bits = random_bits();
        x[i] = random_float(kind == 0 ? random_in(-149, 127) : 0);
        if (kind == 1) {
            x[i] = random_float(-128) * 0x1p-4f;
        } else if (kind == 2) {
            x[i] = (float)random_in(-254, 254) * 0.5f;
        } else if (kind == 3 && i % 64 < 32) {
            memcpy(&x[i], &bits, sizeof bits);
        } else if (kind == 4) {
            x[i] = random_in(0, 9) == 0 ? -0.0f : 0.0f;
        }
    }
    memset(&got, 0, sizeof got);
    memset(&want, 0, sizeof want);
    bapq_kernels_scalar.quantize_row(x, n, want.q, want.scale, want.sum);
    k->quantize_row(x, n, got.q, got.scale, got.sum);
    unify_nans(got.scale, MAX_BLOCKS * BAPQ_SCALE_ROWS);
    unify_nans(want.scale, MAX_BLOCKS * BAPQ_SCALE_ROWS);
    if (k == &bapq_kernels_scalar) {
        add_to_digest(&want, sizeof want);
    }
    if (memcmp(&got, &want, sizeof want) != 0) {
        printf("  differs: quantize_row, %d columns, kind %d\n", n, kind);
        return false;
    }
    return true;
}

static bool same_sums(const bapq_kernels *k, operands *o) {
    static float got[MAX_ROWS * MAX_BLOCKS], want[MAX_ROWS * MAX_BLOCKS];
    const int32_t rows = random_in(1, MAX_ROWS), blocks = random_in(1, MAX_BLOCKS);
    bapq_kernels_scalar.block_sums(o->q, rows, blocks, want);
    k->block_sums(o->q, rows, blocks, got);
    if (memcmp(got, want, (size_t)(rows * blocks) * sizeof *want) != 0) {
        printf("  differs: block_sums, %d rows, %d blocks\n", rows, blocks);
        return false;
    }
    return true;
}

/* Kernels of every size with steps of every kind; NaNs, infinities and zeros of both signs on the
 * way. What lies behind the outputs must stay as it was. */
static bool same_depthwise(const bapq_kernels *k, const operands *o) {
    enum { ROW = 80, MAX_KERNEL = 8, MAX_OUTPUTS = 12 * 40 };
    static float x[64 * ROW], got[MAX_OUTPUTS + 16], want[MAX_OUTPUTS + 16];
    static const uint32_t special[] = {0x7f800000, 0xff800000, 0x7fc00000, 0x80000000};
    memcpy(x, o->x, sizeof x);
    if (random_in(0, 3) == 0) {
        memcpy(&x[random_in(0, 64 * ROW - 1)], &special[random_in(0, 3)], sizeof *x);
    }
    const int32_t usual = random_in(0, 1) ? 3 : 5, square = random_in(0, 2);
    const int32_t dilation = random_in(1, random_in(1, 3));
    ptrdiff_t tap[MAX_KERNEL];
    for (int i = 0; i < MAX_KERNEL; i++) {
        tap[i] = i * random_in(1, 4);
    }
    const bapq_windows windows = {
        .x = x,
        .tap = tap,
        .kernel_row = (ptrdiff_t)dilation * ROW,
        .output_row = (ptrdiff_t)random_in(1, 3) * ROW,
        .kernel_h = square ? usual : random_in(1, MAX_KERNEL),
        .kernel_w = square ? usual : random_in(1, MAX_KERNEL),
        .rows = random_in(1, 12),
        .width = random_in(1, 40),
    };
    const int32_t none = random_in(0, 1);
    const float bias = none ? -0.0f : random_float(0), low = none ? -INFINITY : 0.0f;
    const float high = none ? INFINITY : random_float(2);
    memset(got, 0xa5, sizeof got);
    memset(want, 0xa5, sizeof want);
    bapq_kernels_scalar.depthwise(&windows, o->weights, bias, low, high, want);
    k->depthwise(&windows, o->weights, bias, low, high, got);
    const size_t count = (size_t)windows.rows * (size_t)windows.width;
    unify_nans(got, count);
    unify_nans(want, count);
    if (k == &bapq_kernels_scalar) {
        add_to_digest(want, count * sizeof *want);
    }
    if (memcmp(got, want, sizeof want) != 0) {
        printf("  differs: depthwise, kernel %d x %d, dilation %d, outputs %d x %d\n",
               windows.kernel_h, windows.kernel_w, dilation, windows.rows, windows.width);
        return false;
    }
    return true;
}

int main(void) {
    const bapq_kernels *family[8];
    const int32_t families = bapq_kernels_available(family, 8);
    const bapq_kernels *best = bapq_kernels_best();
    operands *o = malloc(sizeof *o);
    if (o == NULL || best == NULL) {
        printf("%s\n", o == NULL ? "out of memory" : "BAPQ_ISA names no family this CPU can run");
        return 1;
    }
    int passed = 0, failed = 0;
    for (int f = 0; f < families; f++) {
        int family_passed = 0, family_failed = 0;
        for (int round = 0; round < 200; round++) {
            state = (uint64_t)round; /* the same cases for every family */
            const int extreme = round % 20 < 4 ? round % 20 + 1 : 0;
            if (round % 5 == 0 || extreme > 0) {
                fill(o, extreme);
            }
            for (int level = 0; level < BAPQ_LEVELS; level++) {
                *(same_tile(family[f], o, level, extreme) ? &family_passed : &family_failed) += 1;
            }
            *(same_quantize(family[f]) ? &family_passed : &family_failed) += 1;
            *(same_sums(family[f], o) ? &family_passed : &family_failed) += 1;
            *(same_depthwise(family[f], o) ? &family_passed : &family_failed) += 1;
        }
        printf("%-10s %d passed, %d failed%s\n", family[f]->name, family_passed, family_failed,
               family[f] == best ? " (chosen)" : "");
        passed += family_passed;
        failed += family_failed;
    }
    printf("digest %016llx\n%d passed, %d failed\n", (unsigned long long)digest, passed, failed);
    free(o);
    return failed != 0;
}
