#include "shapes.h"

#include <stdbool.h>

#include "error.h"

static const int64_t MOST_ATTRIBUTE = (int64_t)1 << 20;
static const int64_t MOST_ELEMENTS = (int64_t)1 << 40; /* 4 TiB: more than any board has */
static const int64_t MOST_MACS = (int64_t)1 << 62;

/* a *= b, within `most`; neither is negative. */
static bool multiply(int64_t *a, int64_t b, int64_t most) {
    return !__builtin_mul_overflow(*a, b, a) && *a <= most;
}

/* The product of some axes, which is at most 2^40; so is every part of it, though others be 0. */
static bool count_elements(const int64_t *dims, size_t count, int64_t *elements) {
    int64_t extent = 1;
    *elements = 1;
    for (size_t i = 0; i < count; i++) {
        if (dims[i] < 0 || dims[i] > INT32_MAX) return false;
        if (dims[i] > 0 && !multiply(&extent, dims[i], MOST_ELEMENTS)) return false;
        *elements *= dims[i] > 0 ? dims[i] : 0;
    }
    return true;
}

static int32_t too_large(bapq_error *error, const char *what) {
    return bapq_fail(error, BAPQ_ARGUMENT, "%s is larger than any that can be computed", what);
}

static int32_t check_both(const bapq_shape *x, const bapq_shape *y, bapq_error *error) {
    int64_t elements;
    if (!count_elements(x->dims, x->rank, &elements)) return too_large(error, "the input");
    if (!count_elements(y->dims, y->rank, &elements)) return too_large(error, "the output");
    return BAPQ_OK;
}

int32_t bapq_matmul_shape(const bapq_layer *layer, int gemm, const bapq_shape *x, int64_t *m,
                          bapq_shape *y, bapq_error *error) {
    if (x->rank == 0 || x->dims[x->rank - 1] != layer->columns)
        return bapq_fail(error, BAPQ_ARGUMENT, "the input's last axis is %lld, the weights fit %d",
                         x->rank ? (long long)x->dims[x->rank - 1] : 0LL, layer->columns);
    if (gemm && x->rank != 2)
        return bapq_fail(error, BAPQ_ARGUMENT, "Gemm's input has %zu axes, a matrix has 2",
                         x->rank);
    *y = *x;
    y->dims[y->rank - 1] = layer->rows;
    int32_t status = check_both(x, y, error);
    if (status != BAPQ_OK) return status;
    count_elements(x->dims, x->rank - 1, m);
    int64_t macs = *m;
    if (*m > INT32_MAX || !multiply(&macs, layer->columns, MOST_MACS) ||
        !multiply(&macs, layer->rows, MOST_MACS))
        return too_large(error, "the product");
    return BAPQ_OK;
}

/* ---- convolution ---- */

/* `what`: of the convolution, or of another operator with windows. */
static int32_t check_window(const char *what, const bapq_conv_params *p, int64_t most_groups,
                            bapq_error *error) {
    const struct {
        const char *name;
        int64_t value, least, most;
    } attributes[] = {{"group", p->group, 1, most_groups},
                      {"kernel_h", p->kernel_h, 1, MOST_ATTRIBUTE},
                      {"kernel_w", p->kernel_w, 1, MOST_ATTRIBUTE},
                      {"stride_h", p->stride_h, 1, MOST_ATTRIBUTE},
                      {"stride_w", p->stride_w, 1, MOST_ATTRIBUTE},
                      {"dilation_h", p->dilation_h, 1, MOST_ATTRIBUTE},
                      {"dilation_w", p->dilation_w, 1, MOST_ATTRIBUTE},
                      {"pad_top", p->pad_top, 0, MOST_ATTRIBUTE},
                      {"pad_left", p->pad_left, 0, MOST_ATTRIBUTE},
                      {"pad_bottom", p->pad_bottom, 0, MOST_ATTRIBUTE},
                      {"pad_right", p->pad_right, 0, MOST_ATTRIBUTE},
                      {"auto_pad", p->auto_pad, BAPQ_PAD_EXPLICIT, BAPQ_PAD_SAME_LOWER}};
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        if (attributes[i].value < attributes[i].least || attributes[i].value > attributes[i].most)
            return bapq_fail(error, BAPQ_ARGUMENT,
                             "the %s's %s is %lld, it can be from %lld to %lld", what,
                             attributes[i].name, (long long)attributes[i].value,
                             (long long)attributes[i].least, (long long)attributes[i].most);
    return BAPQ_OK;
}

/* One axis of the image: the output's length, and with auto_pad the pads. */
static int64_t slide(int64_t length, int64_t kernel, int64_t stride, int64_t dilation,
                     int64_t auto_pad, int64_t *before, int64_t *after) {
    int64_t span = (kernel - 1) * dilation + 1;
    if (auto_pad != BAPQ_PAD_EXPLICIT) {
        int64_t pads = ((length + stride - 1) / stride - 1) * stride + span - length;
        int64_t odd = auto_pad == BAPQ_PAD_SAME_LOWER; /* the odd pixel goes before, not after */
        pads = pads > 0 ? pads : 0;
        *before = (pads + odd) / 2;
        *after = pads - *before;
    }
    int64_t room = length + *before + *after - span;
    return room < 0 ? 0 : room / stride + 1;
}

/* An input without height has windows without. */
static int32_t check_flat(const char *what, const bapq_conv_params *p, const bapq_shape *x,
                          bapq_error *error) {
    if (x->rank == 3 && (p->kernel_h != 1 || p->pad_top != 0 || p->pad_bottom != 0))
        return bapq_fail(error, BAPQ_ARGUMENT,
                         "the %s's input has 3 axes, its window is %lld high with pads "
                         "%lld and %lld, it must be flat",
                         what, (long long)p->kernel_h, (long long)p->pad_top,
                         (long long)p->pad_bottom);
    return BAPQ_OK;
}

/* The input's image, and the outputs that windows on it give: all of `conv`, with the pads
 * resolved.
 */
static int32_t place_windows(const char *what, const bapq_conv_params *params, const bapq_shape *x,
                             bapq_conv *conv, bapq_error *error) {
    bool flat = x->rank == 3;
    bapq_conv_params p = *params;
    int64_t height = flat ? 1 : x->dims[2], width = x->dims[x->rank - 1];
    int64_t out_h =
        slide(height, p.kernel_h, p.stride_h, p.dilation_h, p.auto_pad, &p.pad_top, &p.pad_bottom);
    int64_t out_w =
        slide(width, p.kernel_w, p.stride_w, p.dilation_w, p.auto_pad, &p.pad_left, &p.pad_right);
    if (out_h == 0 || out_w == 0)
        return bapq_fail(error, BAPQ_ARGUMENT,
                         "the %s's input of %lld x %lld is smaller than its window", what,
                         (long long)height, (long long)width);
    int64_t pixels = out_h, area = height;
    if (!multiply(&area, width, INT32_MAX)) return too_large(error, "the input's image");
    if (!multiply(&pixels, out_w, INT32_MAX)) return too_large(error, "the output's image");
    *conv = (bapq_conv){p, x->dims[0], x->dims[1], height, width, out_h, out_w};
    return BAPQ_OK;
}

/* What windows give of `rows` channels, each output from `values` of the input. */
static int32_t check_outputs(const bapq_conv *conv, const bapq_shape *x, int64_t rows,
                             int64_t values, bapq_shape *y, bapq_error *error) {
    int64_t macs = values, elements;
    if (!multiply(&macs, conv->out_h * conv->out_w, MOST_MACS) ||
        !multiply(&macs, rows, MOST_MACS) || !multiply(&macs, conv->batch, MOST_MACS))
        return too_large(error, "the product");
    *y = (bapq_shape){{conv->batch, rows, x->rank == 3 ? conv->out_w : conv->out_h, conv->out_w},
                      x->rank};
    if (!count_elements(y->dims, y->rank, &elements)) return too_large(error, "the output");
    return BAPQ_OK;
}

int32_t bapq_conv_shape(const bapq_layer *layer, const bapq_conv_params *params,
                        const bapq_shape *x, bapq_conv *conv, bapq_shape *y, bapq_error *error) {
    if (x->rank != 3 && x->rank != 4)
        return bapq_fail(error, BAPQ_ARGUMENT, "Conv's input has %zu axes, it can have 3 or 4",
                         x->rank);
    const bapq_conv_params *p = params;
    int32_t status = check_window("convolution", p, layer->rows, error);
    if (status != BAPQ_OK) return status;
    if (layer->rows % p->group != 0)
        return bapq_fail(error, BAPQ_ARGUMENT, "the convolution has %d rows in %lld groups",
                         layer->rows, (long long)p->group);
    int64_t elements;
    if (!count_elements(x->dims, x->rank, &elements)) return too_large(error, "the input");
    status = check_flat("convolution", p, x, error);
    if (status != BAPQ_OK) return status;
    int64_t channels = x->dims[1];
    int64_t columns = channels / p->group; /* attributes are small: these products fit */
    if (channels % p->group != 0 || !multiply(&columns, p->kernel_h * p->kernel_w, INT32_MAX) ||
        columns != layer->columns)
        return bapq_fail(error, BAPQ_ARGUMENT,
                         "the convolution's input has %lld channels in %lld groups, a window of "
                         "%lld x %lld: its weights have %d columns",
                         (long long)channels, (long long)p->group, (long long)p->kernel_h,
                         (long long)p->kernel_w, layer->columns);
    if (layer->depthwise && p->group != channels)
        return bapq_fail(error, BAPQ_ARGUMENT,
                         "the depthwise convolution has %lld groups, its input %lld channels",
                         (long long)p->group, (long long)channels);
    status = place_windows("convolution", p, x, conv, error);
    if (status != BAPQ_OK) return status;
    return check_outputs(conv, x, layer->rows, layer->columns, y, error);
}

int32_t bapq_pool_shape(const bapq_conv_params *params, const bapq_shape *x, bapq_conv *pool,
                        bapq_shape *y, bapq_error *error) {
    if (x->rank != 3 && x->rank != 4)
        return bapq_fail(error, BAPQ_ARGUMENT, "MaxPool's input has %zu axes, it can have 3 or 4",
                         x->rank);
    int32_t status = check_window("pooling", params, 1, error);
    if (status != BAPQ_OK) return status;
    int64_t elements;
    if (!count_elements(x->dims, x->rank, &elements)) return too_large(error, "the input");
    status = check_flat("pooling", params, x, error);
    if (status != BAPQ_OK) return status;
    status = place_windows("pooling", params, x, pool, error);
    if (status != BAPQ_OK) return status;
    return check_outputs(pool, x, pool->channels, params->kernel_h * params->kernel_w, y, error);
}

int32_t bapq_normalization_shape(const bapq_shape *x, const bapq_shape *scale,
                                 const bapq_shape *bias, int64_t *m, bapq_error *error) {
    int64_t elements, n = x->rank ? x->dims[x->rank - 1] : 0;
    if (!count_elements(x->dims, x->rank, &elements)) return too_large(error, "the input");
    const struct {
        const char *name;
        const bapq_shape *shape;
    } factors[] = {{"scale", scale}, {"bias", bias}};
    for (size_t i = 0; i < 2; i++) {
        const bapq_shape *shape = factors[i].shape;
        if (n < 1 || (shape && (shape->rank != 1 || shape->dims[0] != n)))
            return bapq_fail(error, BAPQ_ARGUMENT,
                             "the normalization's input has %lld values a row, its %s %lld on %zu "
                             "axes; give it as many on one, and one at least",
                             (long long)n, factors[i].name,
                             shape && shape->rank ? (long long)shape->dims[0] : 0LL,
                             shape ? shape->rank : 0);
    }
    count_elements(x->dims, x->rank - 1, m);
    return BAPQ_OK;
}

int32_t bapq_residual_shape(const bapq_shape *residual, const bapq_shape *y, bapq_error *error) {
    if (residual->rank != y->rank)
        return bapq_fail(
            error, BAPQ_ARGUMENT,
            "the residual, the tensor added to its output, has %zu axes, the output %zu",
            residual->rank, y->rank);
    for (size_t axis = 0; axis < y->rank; axis++)
        if (residual->dims[axis] != y->dims[axis])
            return bapq_fail(
                error, BAPQ_ARGUMENT,
                "the residual, the tensor added to its output, is of size %lld on axis "
                "%zu, the output %lld; give inputs the sizes that the model declares",
                (long long)residual->dims[axis], axis, (long long)y->dims[axis]);
    return BAPQ_OK;
}

/* ---- rows of a table ---- */

int32_t bapq_gather_shape(const bapq_layer *layer, const bapq_shape *x, int64_t *count,
                          bapq_shape *y, bapq_error *error) {
    if (x->rank == BAPQ_MAX_RANK)
        return bapq_fail(error, BAPQ_ARGUMENT, "Gather's indices have %zu axes", x->rank);
    *y = *x;
    y->dims[y->rank++] = layer->columns;
    int32_t status = check_both(x, y, error);
    if (status == BAPQ_OK) count_elements(x->dims, x->rank, count);
    return status;
}
