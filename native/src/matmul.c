/* Matrix product: the input is brought once into the forms that the layer's levels need, and every
 * chunk is multiplied with it. */
#include <string.h>

#include "error.h"
#include "work.h"

enum { PANEL_ROWS = 64 }; /* a panel's outputs for one tile, 4 KiB, stay in the first-level cache */

typedef struct {
    const bapq_kernels *kernels;
    const bapq_epilogue *epilogue;
    const bapq_layer *layer;
    int64_t m;
    int32_t columns, blocks, rows;
    const float *input; /* (m, columns) */
    float *y;           /* (m, rows) */
    /* The input in the forms that the layer's levels need. */
    int8_t *q;       /* (m, blocks*32) */
    float *scale;    /* (ceil(m/4), blocks, 4) */
    float *sum;      /* (m, blocks) */
    const float *x;  /* (m, blocks*32) */
    float *x_padded; /* NULL when the columns fill their blocks: then x is the input itself */
    bapq_chunk_view view;
} matmul;

static void carve_inputs(matmul *mm, uint32_t levels, bapq_carver *carver) {
    int64_t padded = (int64_t)mm->blocks * BAPQ_BLOCK;
    if (levels & ~(1u << BAPQ_L32)) {
        mm->q = bapq_carve(carver, mm->m * padded);
        int64_t scaled_rows = bapq_ceil_div(mm->m, BAPQ_SCALE_ROWS) * BAPQ_SCALE_ROWS;
        mm->scale = bapq_carve(carver, scaled_rows * mm->blocks * (int64_t)sizeof(float));
        mm->sum = bapq_carve(carver, mm->m * mm->blocks * (int64_t)sizeof(float));
    }
    if (levels & 1u << BAPQ_L32) {
        mm->x = mm->input;
        if (padded != mm->columns) {
            mm->x_padded = bapq_carve(carver, mm->m * padded * (int64_t)sizeof(float));
            mm->x = mm->x_padded;
        }
    }
}

enum { PREPARE_ROWS = 16 };

static void prepare_rows(void *data, size_t i) {
    matmul *mm = data;
    int64_t padded = (int64_t)mm->blocks * BAPQ_BLOCK;
    int64_t end = (int64_t)(i + 1) * PREPARE_ROWS < mm->m ? (int64_t)(i + 1) * PREPARE_ROWS : mm->m;
    for (int64_t row = (int64_t)i * PREPARE_ROWS; row < end; row++) {
        const float *source = mm->input + row * mm->columns;
        if (mm->q)
            mm->kernels->quantize_row(source, mm->columns, mm->q + row * padded,
                                      mm->scale +
                                          row / BAPQ_SCALE_ROWS * BAPQ_SCALE_ROWS * mm->blocks +
                                          row % BAPQ_SCALE_ROWS,
                                      mm->sum + row * mm->blocks);
        if (mm->x_padded) {
            float *target = mm->x_padded + row * padded;
            memcpy(target, source, (size_t)mm->columns * sizeof(float));
            memset(target + mm->columns, 0, (size_t)(padded - mm->columns) * sizeof(float));
        }
    }
}

/* One row of a tile's outputs, finished. */
static inline void finish_row(const float *out, const bapq_float4 bias[4], const float *residual,
                              const bapq_epilogue *epilogue, float *y) {
#pragma GCC unroll 4
    for (int32_t k = 0; k < 4; k++) {
        bapq_float4 v = bapq_load4(out + 4 * k) + bias[k];
        if (residual) v += bapq_load4(residual + 4 * k);
        v = bapq_clip4(v, epilogue);
        memcpy(y + 4 * k, &v, sizeof v);
    }
}

/* Finishes a tile's outputs (m, 16) and writes their first `width` to columns `first` and on of m
 * rows of y from `row` on; or, where the layer has a row order, to the columns that it names. */
static void write_tile(const matmul *mm, const float *out, const float *bias, int64_t row,
                       int32_t m, int32_t first, int32_t width) {
    const bapq_epilogue epilogue = *mm->epilogue; /* which no output can overwrite */
    const int32_t *order = mm->layer->row_order ? mm->layer->row_order + first : NULL;
    const int64_t rows = mm->rows;
    float *y = mm->y + row * rows;
    const float *residual = epilogue.residual ? epilogue.residual + row * rows : NULL;
    float padded[BAPQ_TILE_ROWS];
    bapq_tile_bias(bias, padded);
    bapq_float4 biases[4];
    memcpy(biases, padded, sizeof biases);
    if (!order && width == BAPQ_TILE_ROWS) {
        if (residual)
            for (int64_t i = 0; i < m; i++)
                finish_row(out + i * BAPQ_TILE_ROWS, biases, residual + i * rows + first, &epilogue,
                           y + i * rows + first);
        else
            for (int64_t i = 0; i < m; i++)
                finish_row(out + i * BAPQ_TILE_ROWS, biases, NULL, &epilogue, y + i * rows + first);
        return;
    }
    float finished[BAPQ_TILE_ROWS], added[BAPQ_TILE_ROWS] = {0};
    for (int64_t i = 0; i < m; i++, y += rows) {
        for (int32_t r = 0; residual && r < width; r++)
            added[r] = residual[i * rows + (order ? order[r] : first + r)];
        finish_row(out + i * BAPQ_TILE_ROWS, biases, residual ? added : NULL, &epilogue, finished);
        for (int32_t r = 0; r < width; r++) y[order ? order[r] : first + r] = finished[r];
    }
}

/* Stored rows [first, first + count) are constants; see bapq_constants. */
static void write_constants(const matmul *mm, bapq_function function, const float *values,
                            int32_t first, int32_t count) {
    float out[BAPQ_TILE_ROWS];
    for (int32_t r = 0; r < count; r++) {
        int32_t in_tile = r % BAPQ_TILE_ROWS;
        if (in_tile == 0)
            bapq_constants(mm->kernels, function, values ? values + r : NULL,
                           count - r < BAPQ_TILE_ROWS ? count - r : BAPQ_TILE_ROWS, out);
        const float *residual = mm->epilogue->residual;
        int64_t at = bapq_output_row(mm->layer, first + r);
        for (int64_t i = 0; i < mm->m; i++, at += mm->rows)
            mm->y[at] = bapq_clip(out[in_tile] + (residual ? residual[at] : 0.0f), mm->epilogue);
    }
}

static void multiply_item(void *data, int32_t worker, int64_t panel, int32_t first_tile,
                          int32_t end_tile) {
    (void)worker;
    matmul *mm = data;
    int64_t row = panel * PANEL_ROWS;
    int32_t m = (int32_t)(mm->m - row < PANEL_ROWS ? mm->m - row : PANEL_ROWS);
    int64_t padded = (int64_t)mm->blocks * BAPQ_BLOCK;
    bapq_panel in = {0};
    if (mm->q) {
        in.q = mm->q + row * padded;
        in.scale = mm->scale + row * mm->blocks;
        in.sum = mm->sum + row * mm->blocks;
    }
    if (mm->x) in.x = mm->x + row * padded;
    float out[PANEL_ROWS * BAPQ_TILE_ROWS] __attribute__((aligned(64)));
    for (int32_t t = first_tile; t < end_tile; t++) {
        const float *bias;
        bapq_tile tile = bapq_view_tile(&mm->view, t, &bias);
        mm->kernels->tile[mm->view.level](&tile, &in, m, out);
        if (!mm->epilogue->use_bias) bias = NULL;
        int32_t first = t * BAPQ_TILE_ROWS;
        int32_t width =
            mm->view.rows - first < BAPQ_TILE_ROWS ? mm->view.rows - first : BAPQ_TILE_ROWS;
        if (mm->epilogue->function) {
            mm->kernels->apply(mm->epilogue->function, bias, m, out);
            bias = NULL;
        }
        write_tile(mm, out, bias, row, m, mm->view.first_row + first, width);
    }
}

int32_t bapq_matmul(bapq_run *run, int32_t layer, const bapq_epilogue *epilogue,
                    const bapq_parallel *parallel, int64_t m, const float *x, float *y,
                    bapq_error *error) {
    const bapq_layer *l = bapq_run_layer(run, layer);
    matmul mm = {.kernels = bapq_run_kernels(run),
                 .epilogue = epilogue,
                 .layer = l,
                 .m = m,
                 .columns = l->columns,
                 .blocks = bapq_ceil_div(l->columns, BAPQ_BLOCK),
                 .rows = l->rows,
                 .input = x,
                 .y = y};
    if (m == 0) return BAPQ_OK;
    uint32_t levels = bapq_run_levels(run, layer);
    bapq_carver count = {0};
    carve_inputs(&mm, levels, &count);
    bapq_carver carver = {.base = bapq_run_scratch(run, count.used + 64)};
    if (!carver.base)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for %lld bytes of scratch",
                         (long long)count.used);
    carve_inputs(&mm, levels, &carver);

    if (mm.q || mm.x_padded) {
        size_t tasks = (size_t)bapq_ceil_div(m, PREPARE_ROWS);
        if (tasks == 1)
            prepare_rows(&mm, 0);
        else
            parallel->for_each(parallel->self, prepare_rows, tasks, &mm);
    }
    for (int32_t i = 0; i < bapq_chunk_count(l); i += mm.view.chunks) {
        int32_t status = bapq_run_acquire(run, layer, i, &mm.view, error);
        if (status != BAPQ_OK) return status;
        if (mm.view.level == BAPQ_SKIP) {
            write_constants(&mm, BAPQ_NO_FUNCTION, mm.view.skip_values, mm.view.first_row,
                            mm.view.rows);
            bapq_run_release(run, &mm.view);
            continue;
        }
        bapq_work work = {.panels = bapq_ceil_div(m, PANEL_ROWS),
                          .tiles = bapq_ceil_div(mm.view.rows, BAPQ_TILE_ROWS),
                          .item = multiply_item,
                          .data = &mm};
        bapq_work_run(&work, parallel, bapq_run_threads(run), m * mm.columns * mm.view.rows);
        bapq_run_release(run, &mm.view);
    }
    write_constants(&mm, epilogue->function, epilogue->use_bias ? l->dropped_bias : NULL,
                    l->stored_rows, l->rows - l->stored_rows);
    return BAPQ_OK;
}
