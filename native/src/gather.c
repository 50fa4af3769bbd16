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

/* The codes of row r of a tile, back as numbers: (code - zero) * d, rounded once. */
static void expand_row(const bapq_tile *tile, int32_t level, int32_t r, int32_t columns, float *y) {
    float step = 1.0f;
    if (level == BAPQ_L8) step = 1.0f / (float)tile->residual_steps;
    for (int32_t column = 0; column < columns; column++) {
        int32_t block = column / BAPQ_BLOCK;
        int32_t k = column % BAPQ_BLOCK;
        if (level == BAPQ_L32) {
            const float *weights = (const float *)tile->code[0];
            y[column] = weights[(int64_t)column * BAPQ_TILE_ROWS + r];
            continue;
        }
        float code, zero;
        int64_t nibble = (int64_t)block * 256 + k / 8 * 64 + r * 4 + k % 4;
        int64_t bit = (int64_t)block * 64 + r * 4 + k % 4;
        int32_t nibble_shift = k / 4 % 2 * 4;
        int32_t bit_shift = k / 4;
        switch (level) {
            case BAPQ_L8: {
                int32_t high = tile->code[0][nibble] >> nibble_shift & 15;
                int32_t low = tile->code[1][nibble] >> nibble_shift & 15;
                code = (float)(tile->residual_steps * high + low);
                zero = 7.5f * (float)(tile->residual_steps + 1);
                break;
            }
            case BAPQ_L4:
                code = (float)(tile->code[0][nibble] >> nibble_shift & 15);
                zero = 7.5f;
                break;
            case BAPQ_L2: {
                int32_t high = tile->code[0][bit] >> bit_shift & 1;
                int32_t low = tile->code[1][bit] >> bit_shift & 1;
                code = (float)(2 * high + low);
                zero = 1.5f;
                break;
            }
            default:
                code = (float)(tile->code[0][bit] >> bit_shift & 1);
                zero = 0.5f;
        }
        float scale = bf16(tile->scale[block / tile->scale_blocks * BAPQ_TILE_ROWS + r]);
        y[column] = (code - zero) * (scale * step);
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
