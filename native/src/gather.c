/* Gather of an embedding table: the rows asked for, turned back into float32. */
#include <string.h>

#include "error.h"
#include "work.h"

static float bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

typedef uint8_t byte4 __attribute__((vector_size(4)));

/* Codes of one plane: the bits from `shift` on of four bytes. */
static inline bapq_int4 codes_at(const uint8_t *from, int shift, int mask) {
    byte4 bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, bapq_int4) >> shift & mask;
}

/* A block of row r of a tile, back as numbers: (code - zero) * d, rounded once. Compiled for each
 * level as a constant. */
static inline __attribute__((always_inline)) void expand_block(int level, const bapq_tile *tile,
                                                               int32_t block, int32_t r,
                                                               float y[BAPQ_BLOCK]) {
    const int nibbles = level == BAPQ_L8 || level == BAPQ_L4;
    const int two_planes = level == BAPQ_L8 || level == BAPQ_L2;
    const int32_t factor = level == BAPQ_L8 ? tile->residual_steps : 2;
    const float part = level == BAPQ_L8 ? 1.0f / (float)tile->residual_steps : 1.0f;
    const float d = bf16(tile->scale[block / tile->scale_blocks * BAPQ_TILE_ROWS + r]) * part;
    const float zero = bapq_zero_of(level, tile->residual_steps);
    const int64_t first = (int64_t)block * (nibbles ? 256 : 64) + r * 4;
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) { /* columns 4j..4j+3 */
        const int64_t at = first + (nibbles ? j / 2 * 64 : 0);
        const int shift = nibbles ? j % 2 * 4 : j, mask = nibbles ? 15 : 1;
        bapq_int4 code = codes_at(tile->code[0] + at, shift, mask);
        if (two_planes) code = factor * code + codes_at(tile->code[1] + at, shift, mask);
        const bapq_float4 value = (__builtin_convertvector(code, bapq_float4) - zero) * d;
        memcpy(y + 4 * j, &value, sizeof value);
    }
}

static inline __attribute__((always_inline)) void expand_codes(int level, const bapq_tile *tile,
                                                               int32_t r, int32_t columns,
                                                               float *y) {
    const int32_t whole = columns / BAPQ_BLOCK, rest = columns % BAPQ_BLOCK;
    float last[BAPQ_BLOCK];
    for (int32_t b = 0; b < whole; b++)
        expand_block(level, tile, b, r, y + (ptrdiff_t)b * BAPQ_BLOCK);
    if (rest == 0) return;
    expand_block(level, tile, whole, r, last);
    memcpy(y + (ptrdiff_t)whole * BAPQ_BLOCK, last, (size_t)rest * sizeof *y);
}

static void expand_row(const bapq_tile *tile, int32_t level, int32_t r, int32_t columns, float *y) {
    const float *weights = (const float *)tile->code[0];
    switch (level) {
        case BAPQ_L8:
            expand_codes(BAPQ_L8, tile, r, columns, y);
            break;
        case BAPQ_L4:
            expand_codes(BAPQ_L4, tile, r, columns, y);
            break;
        case BAPQ_L2:
            expand_codes(BAPQ_L2, tile, r, columns, y);
            break;
        case BAPQ_L1:
            expand_codes(BAPQ_L1, tile, r, columns, y);
            break;
        default:
            for (int32_t column = 0; column < columns; column++)
                y[column] = weights[(ptrdiff_t)column * BAPQ_TILE_ROWS + r];
    }
}

int32_t bapq_gather(bapq_run *run, int32_t layer, int64_t count, const int64_t *indices, float *y,
                    bapq_error *error) {
    const bapq_layer *l = bapq_run_layer(run, layer);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = indices[i] < 0 ? indices[i] + l->rows : indices[i];
        if (row < 0 || row >= l->rows)
            return bapq_fail(error, BAPQ_ARGUMENT, "index %lld is outside a table of %d rows",
                             (long long)indices[i], l->rows);
        bapq_chunk_view view;
        int32_t status =
            bapq_run_acquire_rows(run, layer, (int32_t)(row / l->chunk_rows), &view, error);
        if (status != BAPQ_OK) return status;
        int32_t inside = (int32_t)(row % l->chunk_rows);
        const float *bias;
        bapq_tile tile = bapq_view_tile(&view, inside / BAPQ_TILE_ROWS, &bias);
        expand_row(&tile, view.level, inside % BAPQ_TILE_ROWS, l->columns, y + i * l->columns);
        bapq_run_release_rows(run, &view);
    }
    return BAPQ_OK;
}
