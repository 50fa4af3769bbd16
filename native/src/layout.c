/* Byte layout of tile records: which planes a level reads, how long a record is, where its parts
 * are. */
#include "layout.h"

#include <stddef.h>

static const int32_t LEVEL_BITS[BAPQ_SKIP + 1] = {32, 8, 4, 2, 1, 0};
static const int32_t LEVEL_PLANES[BAPQ_SKIP + 1][2] = {
    {BAPQ_F32, -1}, {BAPQ_P4, BAPQ_R8}, {BAPQ_P4, -1}, {BAPQ_S1, BAPQ_M1}, {BAPQ_S1, -1}, {-1, -1}};
/* The level that each plane completes, and whose bias it carries. */
static const int32_t COMPLETES[BAPQ_PLANES] = {[BAPQ_F32] = BAPQ_L32,
                                               [BAPQ_R8] = BAPQ_L8,
                                               [BAPQ_P4] = BAPQ_L4,
                                               [BAPQ_M1] = BAPQ_L2,
                                               [BAPQ_S1] = BAPQ_L1};
/* Which of the level's planes carries its scales; the last one carries its bias. */
static const int32_t SCALES_IN[BAPQ_LEVELS] = {-1, 0, 0, 1, 0};
static const int32_t CODE_BITS[BAPQ_PLANES] = {
    [BAPQ_F32] = 32, [BAPQ_R8] = 4, [BAPQ_P4] = 4, [BAPQ_M1] = 1, [BAPQ_S1] = 1};
static const char *const PLANE_NAMES[BAPQ_PLANES] = {
    [BAPQ_F32] = "f32", [BAPQ_R8] = "r8", [BAPQ_P4] = "p4", [BAPQ_M1] = "m1", [BAPQ_S1] = "s1"};
enum { RECORD_ALIGNMENT = 64 };

const char *bapq_plane_name(int32_t plane) {
    return plane >= 0 && plane < BAPQ_PLANES ? PLANE_NAMES[plane] : NULL;
}

int32_t bapq_level_index(int32_t bits) {
    for (int32_t i = 0; i <= BAPQ_SKIP; i++)
        if (LEVEL_BITS[i] == bits) return i;
    return -1;
}

int32_t bapq_level_planes(int32_t level, int32_t planes[2]) {
    planes[0] = LEVEL_PLANES[level][0];
    planes[1] = LEVEL_PLANES[level][1];
    return (planes[0] >= 0) + (planes[1] >= 0);
}

bool bapq_has_level(const bapq_layer *layer, int32_t level) {
    return level == BAPQ_SKIP || layer->levels >> level & 1;
}

int32_t bapq_layer_planes(const bapq_layer *layer) {
    int32_t mask = 0;
    for (int32_t level = 0; level < BAPQ_LEVELS; level++) {
        int32_t planes[2];
        int32_t n = bapq_has_level(layer, level) ? bapq_level_planes(level, planes) : 0;
        for (int32_t i = 0; i < n; i++) mask |= 1 << planes[i];
    }
    return mask;
}

int32_t bapq_chunk_count(const bapq_layer *layer) {
    return bapq_ceil_div(layer->stored_rows, layer->chunk_rows);
}

static int64_t padded_columns(const bapq_layer *layer) {
    return (int64_t)bapq_ceil_div(layer->columns, BAPQ_BLOCK) * BAPQ_BLOCK;
}

int64_t bapq_code_bytes(const bapq_layer *layer, int32_t plane) {
    int64_t columns = layer->depthwise ? layer->columns : padded_columns(layer);
    return (columns * CODE_BITS[plane] + 7) / 8 * BAPQ_TILE_ROWS;
}

static int64_t scale_bytes(const bapq_layer *layer, int32_t plane) {
    int32_t group = layer->scale_columns[plane];
    if (group == 0) return 0;
    int64_t groups = bapq_ceil_div(padded_columns(layer), group);
    return groups * BAPQ_TILE_ROWS * (int64_t)sizeof(uint16_t);
}

int64_t bapq_record_bytes(const bapq_layer *layer, int32_t plane) {
    if (!(bapq_layer_planes(layer) >> plane & 1)) return 0;
    int64_t used = bapq_code_bytes(layer, plane) + scale_bytes(layer, plane);
    if (layer->has_bias && bapq_has_level(layer, COMPLETES[plane]))
        used += BAPQ_TILE_ROWS * (int64_t)sizeof(float);
    return bapq_ceil_div(used, RECORD_ALIGNMENT) * (int64_t)RECORD_ALIGNMENT;
}

bapq_tile bapq_view_tile(const bapq_chunk_view *view, int32_t t, const float **bias) {
    const bapq_layer *layer = view->layer;
    int32_t planes[2];
    int32_t n = bapq_level_planes(view->level, planes);
    int32_t blocks = bapq_ceil_div(layer->columns, BAPQ_BLOCK);
    bapq_tile tile = {.blocks = blocks,
                      .padding = blocks * BAPQ_BLOCK - layer->columns,
                      .scale_blocks = 1,
                      .residual_steps = layer->residual_steps};
    for (int32_t i = 0; i < n; i++) tile.code[i] = view->records[i] + t * view->record_bytes[i];
    int32_t s = SCALES_IN[view->level];
    if (s >= 0) {
        tile.scale = (const uint16_t *)(tile.code[s] + bapq_code_bytes(layer, planes[s]));
        tile.scale_blocks = layer->scale_columns[planes[s]] / BAPQ_BLOCK;
    }
    *bias = NULL;
    if (layer->has_bias) {
        int32_t last = planes[n - 1];
        *bias = (const float *)(tile.code[n - 1] + bapq_code_bytes(layer, last) +
                                scale_bytes(layer, last));
    }
    return tile;
}
