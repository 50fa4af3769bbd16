/* Byte layout of tile records (docs/reference/bank_format.md, bapq_edge/bank/layout.py). */
#ifndef BAPQ_LAYOUT_H
#define BAPQ_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

#include "bapq.h"
#include "kernels/kernels.h"

static inline int32_t bapq_ceil_div(int64_t a, int64_t b) { return (int32_t)((a + b - 1) / b); }

/* In place of a level: the chunk is neither read nor computed on. */
enum { BAPQ_SKIP = BAPQ_LEVELS };

/* Level index of a precision in bits, BAPQ_SKIP for 0, -1 for none. */
int32_t bapq_level_index(int32_t bits);
/* Planes that a level reads, in the order of bapq_tile.code. Returns how many: none for BAPQ_SKIP.
 */
int32_t bapq_level_planes(int32_t level, int32_t planes[2]);
/* Whether the layer has the level; BAPQ_SKIP counts as one that every layer has. */
bool bapq_has_level(const bapq_layer *layer, int32_t level);
/* Bit p is set: plane p holds the layer, since one of its levels reads it. */
int32_t bapq_layer_planes(const bapq_layer *layer);
int32_t bapq_chunk_count(const bapq_layer *layer);
/* Bytes of the codes of one tile record (level 32: of its weights). */
int64_t bapq_code_bytes(const bapq_layer *layer, int32_t plane);
/* Bytes of one tile record: codes, the scales and the bias that the layer's levels read there,
 * zeros up to a multiple of 64. None in a plane that does not hold the layer. */
int64_t bapq_record_bytes(const bapq_layer *layer, int32_t plane);

/* Where a borrowed chunk stands, and so what letting go of it means. */
enum { BAPQ_FROM_HOME, BAPQ_FROM_RING, BAPQ_FROM_ROWS };

/* A chunk at one level, ready to compute on; or several, one behind the other, as if they were one.
 */
typedef struct {
    const bapq_layer *layer;
    int32_t level;  /* BAPQ_L32 .. BAPQ_L1, BAPQ_SKIP */
    int32_t chunk;  /* number of the first one in the bank */
    int32_t chunks; /* more than one only where they are at home */
    int32_t borrowed;
    int32_t first_row;         /* of the first one, among the layer's stored rows */
    int32_t rows;              /* of all of them, without padding */
    const float *skip_values;  /* (rows,) BAPQ_SKIP: what they give before the clip */
    const uint8_t *records[2]; /* tile records of each plane of the level */
    int64_t record_bytes[2];
} bapq_chunk_view;

/* Where a row, counted in stored order, stands in the output. */
static inline int32_t bapq_output_row(const bapq_layer *layer, int32_t row) {
    return layer->row_order ? layer->row_order[row] : row;
}

/* Tile t of the chunk: what a kernel reads, and its bias (NULL when the layer has none). */
bapq_tile bapq_view_tile(const bapq_chunk_view *view, int32_t t, const float **bias);

#endif
