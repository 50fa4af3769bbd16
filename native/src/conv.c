/* Convolution as a matrix product: a panel holds, for some output pixels, the input values under
 * the kernel window in the order (kernel_y, kernel_x, channel), which is the order of the layer's
 * columns. Panels are built anew for every view of the weights, so no unfolded input is ever held;
 * the one that a worker built last serves the next view, too, where the input is so small. */
#include <math.h>
#include <string.h>

#include "error.h"
#include "conv_input.h"
#include "work.h"

enum {
    PANEL_ROWS = 128,
    FLOAT_PANEL_ROWS = 64, /* where a chunk runs at level 32 */
    PANEL_BYTES =
        256 << 10 /* of int8: fits the second-level cache, of 512 KiB on the smallest boards */
};

/* Buffers of one worker. */
typedef struct {
    int8_t *q;  /* (panel_rows, blocks*32) */
    float *sum; /* (panel_rows, blocks) */
    float *x;   /* (panel_rows, blocks*32), level 32 */
    /* What they hold: a panel of a small input serves one view after another. */
    const float *of_sample; /* NULL: nothing yet */
    int64_t of_group, of_pixel;
    int of_floats, has_sums;
    uint8_t spoiled[PANEL_ROWS]; /* pixels that read a NaN or infinity; see spoil */
} worker_buffers;

typedef struct {
    const bapq_kernels *kernels;
    const bapq_conv *conv;
    bapq_epilogue epilogue; /* of this sample, as x and y */
    const bapq_layer *layer;
    int32_t columns, blocks, rows;
    int32_t panel_rows;
    int32_t group_rows;     /* output rows per group */
    int32_t group_channels; /* input channels per group */
    const float *x;         /* this sample: (channels, height, width) */
    float *y;               /* this sample: (rows, out_h, out_w) */
    bapq_conv_input input;
    void *input_scratch;
    worker_buffers *buffers; /* (threads,) */
    bapq_chunk_view view;
} conv_job;

static int is_pointwise(const bapq_conv *conv) {
    const bapq_conv_params *p = &conv->p;
    return p->kernel_h == 1 && p->kernel_w == 1 && p->stride_h == 1 && p->stride_w == 1 &&
           p->pad_top == 0 && p->pad_left == 0 && p->pad_bottom == 0 && p->pad_right == 0 &&
           p->group == 1 && conv->channels % BAPQ_BLOCK == 0;
}

/* ---- panels ---- */

typedef int8_t vector __attribute__((vector_size(16)));

enum { OVERRUN = 16 }; /* bytes that a copy may read and write behind its end: no tails */

static inline void copy_run(int8_t *target, const int8_t *source, int64_t bytes) {
    int64_t k = 0;
    for (; k + 64 <= bytes; k += 64) memcpy(target + k, source + k, 64);
    for (; k < bytes; k += OVERRUN) memcpy(target + k, source + k, OVERRUN);
}

static inline void fill_run(int8_t *target, int8_t value, int64_t bytes) {
    const vector values = (vector){0} + value;
    for (int64_t k = 0; k < bytes; k += OVERRUN) memcpy(target + k, &values, OVERRUN);
}

/* One window that reaches into the padding, or whose pixels are not adjacent. */
static void fill_window(const conv_job *j, int64_t group, int64_t y0, int64_t x0, int8_t *q) {
    const bapq_conv *conv = j->conv;
    const bapq_conv_params *p = &conv->p;
    const int64_t channels = j->group_channels;
    for (int64_t ky = 0; ky < p->kernel_h; ky++) {
        int64_t iy = y0 + ky * p->dilation_h;
        for (int64_t kx = 0; kx < p->kernel_w; kx++, q += channels) {
            int64_t ix = x0 + kx * p->dilation_w;
            if (iy < 0 || iy >= conv->height || ix < 0 || ix >= conv->width)
                fill_run(q, (int8_t)j->input.zero_point, channels);
            else
                copy_run(q,
                         j->input.q + (iy * conv->width + ix) * conv->channels + group * channels,
                         channels);
        }
    }
}

/* int8: windows one behind the other, so that what a run writes behind its end is written over. */
static void fill_quantized(const conv_job *j, int64_t group, int64_t pixel, int32_t m, int8_t *q) {
    const bapq_conv *conv = j->conv;
    const bapq_conv_params p = conv->p;
    const int64_t padded = (int64_t)j->blocks * BAPQ_BLOCK, padding = padded - j->columns;
    const vector zeros = {0};
    const int64_t run = p.kernel_w * j->group_channels;
    const int64_t row_bytes = p.dilation_h * conv->width * conv->channels;
    const int64_t span_h = (p.kernel_h - 1) * p.dilation_h + 1;
    const int adjacent = p.dilation_w == 1 && p.group == 1;
    int64_t out_x = pixel % conv->out_w;
    int64_t y0 = pixel / conv->out_w * p.stride_h - p.pad_top;
    for (int32_t i = 0; i < m; i++, q += padded) {
        int64_t x0 = out_x * p.stride_w - p.pad_left;
        if (adjacent && x0 >= 0 && x0 + p.kernel_w <= conv->width && y0 >= 0 &&
            y0 + span_h <= conv->height) {
            const int8_t *from = j->input.q + (y0 * conv->width + x0) * conv->channels;
            int8_t *to = q;
            for (int64_t ky = 0; ky < p.kernel_h; ky++, to += run, from += row_bytes)
                copy_run(to, from, run);
        } else {
            fill_window(j, group, y0, x0, q);
        }
        if (padding > 0) memcpy(q + j->columns, &zeros, OVERRUN);
        if (padding > OVERRUN) memcpy(q + j->columns + OVERRUN, &zeros, OVERRUN);
        if (++out_x == conv->out_w) {
            out_x = 0;
            y0 += p.stride_h;
        }
    }
}

/* float32, straight from the channels-first sample. */
static void fill_float(const conv_job *j, int64_t group, int64_t pixel, int32_t m, float *x) {
    const bapq_conv *conv = j->conv;
    const bapq_conv_params *p = &conv->p;
    int64_t padded = (int64_t)j->blocks * BAPQ_BLOCK;
    for (int32_t i = 0; i < m; i++, x += padded) {
        int64_t y0 = (pixel + i) / conv->out_w * p->stride_h - p->pad_top;
        int64_t x0 = (pixel + i) % conv->out_w * p->stride_w - p->pad_left;
        float *target = x;
        for (int64_t ky = 0; ky < p->kernel_h; ky++) {
            int64_t iy = y0 + ky * p->dilation_h;
            for (int64_t kx = 0; kx < p->kernel_w; kx++) {
                int64_t ix = x0 + kx * p->dilation_w;
                int inside = iy >= 0 && iy < conv->height && ix >= 0 && ix < conv->width;
                int64_t plane = conv->height * conv->width;
                int64_t first = group * j->group_channels * plane + iy * conv->width + ix;
                for (int32_t c = 0; c < j->group_channels; c++)
                    *target++ = inside ? j->x[first + c * plane] : 0.0f;
            }
        }
        memset(target, 0, (size_t)(padded - j->columns) * sizeof(float));
    }
}

/* Codes cannot hold a NaN or infinity: notes the pixels whose windows do. */
static void find_spoiled(const conv_job *j, int64_t group, int64_t pixel, int32_t m,
                         uint8_t *spoiled) {
    const bapq_conv *conv = j->conv;
    const bapq_conv_params *p = &conv->p;
    int64_t plane = conv->height * conv->width;
    const float *x = j->x + group * j->group_channels * plane;
    for (int32_t i = 0; i < m; i++) {
        int64_t y0 = (pixel + i) / conv->out_w * p->stride_h - p->pad_top;
        int64_t x0 = (pixel + i) % conv->out_w * p->stride_w - p->pad_left;
        int found = 0;
        for (int64_t ky = 0; ky < p->kernel_h; ky++) {
            int64_t iy = y0 + ky * p->dilation_h;
            if (iy < 0 || iy >= conv->height) continue;
            for (int64_t kx = 0; kx < p->kernel_w; kx++) {
                int64_t ix = x0 + kx * p->dilation_w;
                if (ix < 0 || ix >= conv->width) continue;
                for (int32_t c = 0; c < j->group_channels; c++)
                    found |= bapq_is_spoiled(x[c * plane + iy * conv->width + ix]);
            }
        }
        spoiled[i] = (uint8_t)found;
    }
}

/* Makes the outputs of such pixels NaN: out is (m, 16). */
static void spoil(const uint8_t *spoiled, int32_t m, float *out) {
    for (int32_t i = 0; i < m; i++)
        for (int32_t r = 0; spoiled[i] && r < BAPQ_TILE_ROWS; r++)
            out[i * BAPQ_TILE_ROWS + r] = NAN;
}

static bapq_panel build_panel(const conv_job *j, worker_buffers *buffers, int64_t group,
                              int64_t pixel, int32_t m) {
    bapq_panel panel = {0};
    int floats = j->view.level == BAPQ_L32;
    int there = buffers->of_sample == j->x && buffers->of_group == group &&
                buffers->of_pixel == pixel && buffers->of_floats == floats;
    buffers->of_sample = j->x;
    buffers->of_group = group;
    buffers->of_pixel = pixel;
    buffers->of_floats = floats;
    if (floats) {
        if (!there) fill_float(j, group, pixel, m, buffers->x);
        panel.x = buffers->x;
        return panel;
    }
    /* Of a pointwise convolution a pixel is a row already. */
    int pointwise = is_pointwise(j->conv);
    panel.q = pointwise ? j->input.q + pixel * j->conv->channels : buffers->q;
    if (!there && !pointwise) fill_quantized(j, group, pixel, m, buffers->q);
    if (!there && !j->input.finite) find_spoiled(j, group, pixel, m, buffers->spoiled);
    uint32_t sum_levels = j->kernels->sum_levels;
    if (j->layer->residual_steps % 2 == 0) sum_levels |= j->kernels->even_sum_levels;
    int sums = sum_levels >> j->view.level & 1;
    if (sums && !(there && buffers->has_sums))
        j->kernels->block_sums(panel.q, m, j->blocks, buffers->sum);
    buffers->has_sums = sums || (there && buffers->has_sums);
    panel.scale = &j->input.scale;
    panel.uniform = 1;
    panel.zero_point = j->input.zero_point;
    panel.sum = buffers->sum;
    return panel;
}

/* ---- product ---- */

/* Finishes `rows` rows of a tile from r on, and writes them to y from `at` on: of each row its
 * first pixel. Compiled for capped outputs, and for those without an upper end, as after Relu. */
static inline __attribute__((always_inline)) void write_rows(int capped, const conv_job *j,
                                                             const float *out, int32_t rows,
                                                             int32_t r,
                                                             const float biases[BAPQ_TILE_ROWS],
                                                             const int64_t at[4], int32_t m) {
    const bapq_epilogue epilogue = j->epilogue; /* which no output can overwrite */
    const float *residual[4] = {0};
    float *y[4];
    for (int32_t k = 0; k < rows; k++) {
        y[k] = j->y + at[k];
        if (epilogue.residual) residual[k] = epilogue.residual + at[k];
    }
    int32_t i = 0;
    for (; rows == 4 && i + 4 <= m; i += 4) {
        bapq_float4 v[4];
        for (int32_t k = 0; k < 4; k++) v[k] = bapq_load4(out + (i + k) * BAPQ_TILE_ROWS + r);
        bapq_turn4(v);
        for (int32_t k = 0; k < 4; k++) {
            v[k] += bapq_splat(biases[r + k]);
            if (residual[0]) v[k] += bapq_load4(residual[k] + i);
            v[k] = capped ? bapq_clip4(v[k], &epilogue) : bapq_raise4(v[k], epilogue.clip_low);
            memcpy(y[k] + i, &v[k], sizeof v[k]);
        }
    }
    for (; i < m; i++)
        for (int32_t k = 0; k < rows; k++) {
            float v = out[i * BAPQ_TILE_ROWS + r + k] + biases[r + k];
            y[k][i] = bapq_clip(v + (residual[0] ? residual[k][i] : 0.0f), &epilogue);
        }
}

/* Rows [first, end) of tile t, all of one group, for m pixels. */
static void multiply_tile(const conv_job *j, const bapq_panel *panel, const uint8_t *spoiled,
                          int32_t t, int32_t first, int32_t end, int64_t pixel, int32_t m) {
    const float *bias;
    bapq_tile tile = bapq_view_tile(&j->view, t, &bias);
    float out[PANEL_ROWS * BAPQ_TILE_ROWS] __attribute__((aligned(64)));
    j->kernels->tile[j->view.level](&tile, panel, m, out);
    if (!j->epilogue.use_bias) bias = NULL;
    if (j->epilogue.function) {
        j->kernels->apply(j->epilogue.function, bias, m, out);
        bias = NULL;
    }
    if (panel->q && !j->input.finite) spoil(spoiled, m, out);
    float biases[BAPQ_TILE_ROWS];
    bapq_tile_bias(bias, biases);
    int64_t pixels = j->conv->out_h * j->conv->out_w;
    for (int32_t row = first, rows; row < end; row += rows) {
        rows = end - row < 4 ? end - row : 4;
        int64_t at[4];
        for (int32_t k = 0; k < rows; k++)
            at[k] = bapq_output_row(j->layer, j->view.first_row + row + k) * pixels + pixel;
        if (j->epilogue.clip_high < INFINITY)
            write_rows(1, j, out, rows, row % BAPQ_TILE_ROWS, biases, at, m);
        else
            write_rows(0, j, out, rows, row % BAPQ_TILE_ROWS, biases, at, m);
    }
}

/* Stored rows [first, first + count) are constants; see bapq_constants. */
static void write_constants(const conv_job *j, bapq_function function, const float *values,
                            int32_t first, int32_t count) {
    int64_t pixels = j->conv->out_h * j->conv->out_w;
    float out[BAPQ_TILE_ROWS];
    for (int32_t r = 0; r < count; r++) {
        int32_t in_tile = r % BAPQ_TILE_ROWS;
        if (in_tile == 0)
            bapq_constants(j->kernels, function, values ? values + r : NULL,
                           count - r < BAPQ_TILE_ROWS ? count - r : BAPQ_TILE_ROWS, out);
        const float *residual = j->epilogue.residual;
        int64_t at = bapq_output_row(j->layer, first + r) * pixels;
        for (int64_t end = at + pixels; at < end; at++)
            j->y[at] = bapq_clip(out[in_tile] + (residual ? residual[at] : 0.0f), &j->epilogue);
    }
}

/* The group of a row of the chunk. Where rows are reordered, groups may mix. */
static int32_t group_of(const conv_job *j, int32_t row) {
    return bapq_output_row(j->layer, j->view.first_row + row) / j->group_rows;
}

/* The tiles of an item may span groups, and each group reads its own channels: so first the rows
 * are cut by group, then by tile. A tile on the border is multiplied once for each of its groups.
 */
static void multiply_item(void *data, int32_t worker, int64_t panel_index, int32_t first_tile,
                          int32_t end_tile) {
    conv_job *j = data;
    int64_t pixels = j->conv->out_h * j->conv->out_w;
    int64_t pixel = panel_index * j->panel_rows;
    int32_t m = (int32_t)(pixels - pixel < j->panel_rows ? pixels - pixel : j->panel_rows);
    int32_t row = first_tile * BAPQ_TILE_ROWS;
    int32_t end_row =
        end_tile * BAPQ_TILE_ROWS < j->view.rows ? end_tile * BAPQ_TILE_ROWS : j->view.rows;
    while (row < end_row) {
        int32_t group = group_of(j, row);
        int32_t group_end = j->conv->p.group == 1 ? end_row : row + 1;
        while (group_end < end_row && group_of(j, group_end) == group) group_end++;
        bapq_panel panel = build_panel(j, &j->buffers[worker], group, pixel, m);
        while (row < group_end) {
            int32_t t = row / BAPQ_TILE_ROWS;
            int32_t end =
                (t + 1) * BAPQ_TILE_ROWS < group_end ? (t + 1) * BAPQ_TILE_ROWS : group_end;
            multiply_tile(j, &panel, j->buffers[worker].spoiled, t, row, end, pixel, m);
            row = end;
        }
    }
}

/* ---- run ---- */

static void carve_buffers(conv_job *j, uint32_t levels, int32_t threads, bapq_carver *carver) {
    int64_t padded = (int64_t)j->blocks * BAPQ_BLOCK;
    int64_t block_floats = (int64_t)j->blocks * (int64_t)sizeof(float);
    worker_buffers none = {0};
    j->buffers = bapq_carve(carver, threads * (int64_t)sizeof *j->buffers);
    int quantized = (levels & ~(1u << BAPQ_L32)) != 0;
    if (quantized) {
        const bapq_conv *conv = j->conv;
        int64_t values = conv->channels * conv->height * conv->width;
        j->input.q = bapq_carve(carver, values + OVERRUN);
        j->input_scratch = bapq_carve(carver, bapq_conv_input_scratch(values));
    }
    for (int32_t i = 0; i < threads; i++) {
        worker_buffers *buffers = carver->base ? &j->buffers[i] : &none;
        if (quantized) {
            if (!is_pointwise(j->conv))
                buffers->q = bapq_carve(carver, j->panel_rows * padded + OVERRUN);
            buffers->sum = bapq_carve(carver, j->panel_rows * block_floats);
        }
        if (levels & 1u << BAPQ_L32)
            buffers->x = bapq_carve(carver, j->panel_rows * padded * (int64_t)sizeof(float));
    }
}

static int32_t run_sample(bapq_run *run, int32_t layer, conv_job *j, const bapq_parallel *parallel,
                          bapq_error *error) {
    const bapq_conv *conv = j->conv;
    int64_t pixels = conv->out_h * conv->out_w;
    if (j->input.q)
        bapq_conv_input_quantize(j->x, conv->channels, conv->height, conv->width, parallel,
                                 j->input_scratch, &j->input);
    const bapq_layer *l = j->layer;
    for (int32_t i = 0; i < bapq_chunk_count(l); i += j->view.chunks) {
        int32_t status = bapq_run_acquire(run, layer, i, &j->view, error);
        if (status != BAPQ_OK) return status;
        if (j->view.level == BAPQ_SKIP) {
            write_constants(j, BAPQ_NO_FUNCTION, j->view.skip_values, j->view.first_row,
                            j->view.rows);
            bapq_run_release(run, &j->view);
            continue;
        }
        bapq_work work = {.panels = bapq_ceil_div(pixels, j->panel_rows),
                          .tiles = bapq_ceil_div(j->view.rows, BAPQ_TILE_ROWS),
                          .item = multiply_item,
                          .data = j};
        bapq_work_run(&work, parallel, bapq_run_threads(run), pixels * j->columns * j->view.rows);
        bapq_run_release(run, &j->view);
    }
    write_constants(j, j->epilogue.function, j->epilogue.use_bias ? l->dropped_bias : NULL,
                    l->stored_rows, l->rows - l->stored_rows);
    return BAPQ_OK;
}

/* Rows of a panel: as many as fit, in panels of one size. Kernels take rows by eights. */
static int32_t panel_rows(int64_t pixels, int32_t blocks, uint32_t levels) {
    int32_t cap = levels & 1u << BAPQ_L32 ? FLOAT_PANEL_ROWS : PANEL_ROWS;
    int32_t most = PANEL_BYTES / (blocks * BAPQ_BLOCK) & ~7;
    most = most < 8 ? 8 : most > cap ? cap : most;
    return bapq_ceil_div(bapq_ceil_div(pixels, bapq_ceil_div(pixels, most)), 8) * 8;
}

int32_t bapq_conv_run(bapq_run *run, int32_t layer, const bapq_conv *conv,
                      const bapq_epilogue *epilogue, const bapq_parallel *parallel, const float *x,
                      float *y, bapq_error *error) {
    const bapq_layer *l = bapq_run_layer(run, layer);
    int32_t blocks = bapq_ceil_div(l->columns, BAPQ_BLOCK);
    uint32_t levels = bapq_run_levels(run, layer);
    conv_job j = {.kernels = bapq_run_kernels(run),
                  .conv = conv,
                  .epilogue = *epilogue,
                  .layer = l,
                  .columns = l->columns,
                  .blocks = blocks,
                  .rows = l->rows,
                  .panel_rows = panel_rows(conv->out_h * conv->out_w, blocks, levels),
                  .group_rows = (int32_t)(l->rows / conv->p.group),
                  .group_channels = (int32_t)(conv->channels / conv->p.group)};
    int32_t threads = bapq_run_threads(run);
    bapq_carver count = {0};
    carve_buffers(&j, levels, threads, &count);
    bapq_carver carver = {.base = bapq_run_scratch(run, count.used)};
    if (!carver.base)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no memory for %lld bytes of scratch",
                         (long long)count.used);
    carve_buffers(&j, levels, threads, &carver);
    for (int32_t i = 0; i < threads; i++) j.buffers[i].of_sample = NULL;
    for (int64_t n = 0; n < conv->batch; n++) {
        j.x = x + n * conv->channels * conv->height * conv->width;
        int64_t first = n * l->rows * conv->out_h * conv->out_w;
        j.y = y + first;
        if (epilogue->residual) j.epilogue.residual = epilogue->residual + first;
        int32_t status = run_sample(run, layer, &j, parallel, error);
        if (status != BAPQ_OK) return status;
    }
    return BAPQ_OK;
}
