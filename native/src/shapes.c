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

static int32_t check_attributes(const bapq_layer *layer, const bapq_conv_params *p,
                                bapq_error *error) {
    const struct {
        const char *name;
        int64_t value, least, most;
    } attributes[] = {{"group", p->group, 1, layer->rows},
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
                             "the convolution's %s is %lld, it can be from %lld to %lld",
                             attributes[i].name, (long long)attributes[i].value,
                             (long long)attributes[i].least, (long long)attributes[i].most);
    if (layer->rows % p->group != 0)
        return bapq_fail(error, BAPQ_ARGUMENT, "the convolution has %d rows in %lld groups",
                         layer->rows, (long long)p->group);
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

int32_t bapq_conv_shape(const bapq_layer *layer, const bapq_conv_params *params,
                        const bapq_shape *x, bapq_conv *conv, bapq_shape *y, bapq_error *error) {
    bool flat = x->rank == 3;
    if (!flat && x->rank != 4)
        return bapq_fail(error, BAPQ_ARGUMENT, "Conv's input has %zu axes, it can have 3 or 4",
                         x->rank);
    int32_t status = check_attributes(layer, params, error);
    int64_t elements;
    if (status != BAPQ_OK) return status;
    if (!count_elements(x->dims, x->rank, &elements)) return too_large(error, "the input");
    bapq_conv_params p = *params;
    if (flat && (p.kernel_h != 1 || p.pad_top != 0 || p.pad_bottom != 0))
        return bapq_fail(error, BAPQ_ARGUMENT,
                         "the convolution's input has 3 axes, its window is %lld high with pads "
                         "%lld and %lld, it must be flat",
                         (long long)p.kernel_h, (long long)p.pad_top, (long long)p.pad_bottom);
    int64_t batch = x->dims[0], channels = x->dims[1];
    int64_t height = flat ? 1 : x->dims[2], width = x->dims[x->rank - 1];
    int64_t columns = channels / p.group; /* attributes are small: these products fit */
    if (channels % p.group != 0 || !multiply(&columns, p.kernel_h * p.kernel_w, INT32_MAX) ||
        columns != layer->columns)
        return bapq_fail(error, BAPQ_ARGUMENT,
                         "the convolution's input has %lld channels in %lld groups, a window of "
                         "%lld x %lld: its weights have %d columns",
                         (long long)channels, (long long)p.group, (long long)p.kernel_h,
                         (long long)p.kernel_w, layer->columns);
    if (layer->depthwise && p.group != channels)
        return bapq_fail(error, BAPQ_ARGUMENT,
                         "the depthwise convolution has %lld groups, its input %lld channels",
                         (long long)p.group, (long long)channels);
    int64_t out_h =
        slide(height, p.kernel_h, p.stride_h, p.dilation_h, p.auto_pad, &p.pad_top, &p.pad_bottom);
    int64_t out_w =
        slide(width, p.kernel_w, p.stride_w, p.dilation_w, p.auto_pad, &p.pad_left, &p.pad_right);
    if (out_h == 0 || out_w == 0)
        return bapq_fail(error, BAPQ_ARGUMENT,
                         "the convolution's input of %lld x %lld is smaller than its window",
                         (long long)height, (long long)width);
    int64_t pixels = out_h, area = height;
    int64_t macs = layer->columns;
    if (!multiply(&area, width, INT32_MAX)) return too_large(error, "the input's image");
    if (!multiply(&pixels, out_w, INT32_MAX)) return too_large(error, "the output's image");
    if (!multiply(&macs, pixels, MOST_MACS) || !multiply(&macs, layer->rows, MOST_MACS) ||
        !multiply(&macs, batch, MOST_MACS))
        return too_large(error, "the product");
    *y = (bapq_shape){{batch, layer->rows, flat ? out_w : out_h, out_w}, x->rank};
    if (!count_elements(y->dims, y->rank, &elements)) return too_large(error, "the output");
    *conv = (bapq_conv){p, batch, channels, height, width, out_h, out_w};
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
