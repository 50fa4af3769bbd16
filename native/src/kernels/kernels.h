/* The kernel families and the data they work on.
 *
 * A tile is 16 output rows of one layer; its columns come in blocks of 32. All levels share one
 * layout (docs/reference/bank_format.md), so one bank serves every CPU. A kernel multiplies one
 * tile with a panel of m activation rows. Blocks that share all their scales form runs of at most
 * 8; a run of a panel that is not uniform is one block. With step = d * scale:
 *
 *   acc[i][r]  = over the runs, in order: fma(step, f, acc),           f = sum (code - zero) * q
 *   offset[r]  = over the runs, in order: fma(step, -zero_point * c, offset),
 *                                            c = sum (code - zero) over the layer's own columns
 *   out[i][r]  = acc[i][r] + offset[r]; without the offset where zero_point is 0
 *
 * f and zero_point * c are integers or half-integers below 2^23, hence exact in float32. The only
 * roundings are the product d * scale, one fma per run and the last sum, so every family gives the
 * same bits.
 */
#ifndef BAPQ_KERNELS_H
#define BAPQ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define BAPQ_EXPORT __attribute__((visibility("default")))

enum {
    BAPQ_TILE_ROWS = 16,
    BAPQ_BLOCK = 32,
    BAPQ_RUN_BLOCKS = 8,
    BAPQ_SCALE_ROWS = 4,
    BAPQ_LANES = 8
};

/* Index of a level in every per-level table. */
enum { BAPQ_L32, BAPQ_L8, BAPQ_L4, BAPQ_L2, BAPQ_L1, BAPQ_LEVELS };

/* One tile at one level.
 * code[0], code[1]: p4, r8 (level 8); p4, - (4); s1, m1 (2); s1, - (1); f32, - (32).
 * d = bf16 scale, times 1/residual_steps at level 8.
 *   level 8: code = residual_steps*p4 + r8, zero = 7.5*(residual_steps + 1)
 *   level 4: code = p4,                     zero = 7.5
 *   level 2: code = 2*s1 + m1,              zero = 1.5
 *   level 1: code = s1,                     zero = 0.5 */
typedef struct {
    const uint8_t *code[2];
    const uint16_t *scale;  /* (scale groups, 16) bf16; NULL at level 32 */
    int32_t blocks;         /* ceil(columns / 32) */
    int32_t scale_blocks;   /* blocks that share one scale, >= 1 */
    int32_t residual_steps; /* 8..16: level-8 steps in one level-4 step */
    int32_t padding;        /* columns of the last block past the layer's; their codes are 0 */
} bapq_tile;

/* m activation rows: x = scale * (q - zero_point); q and x are 0 in the padding. */
typedef struct {
    const int8_t *q;    /* (m, blocks*32), row stride blocks*32; -127..127 */
    const float *scale; /* (ceil(m/4), blocks, 4), rows by fours; or one for all if `uniform` */
    const float *sum;   /* (m, blocks): sum of q over the block; see sum_levels */
    const float *x;     /* (m, blocks*32) float32, level 32 only */
    int32_t uniform;    /* one scale for the whole panel */
    int32_t zero_point; /* -127..127; 0 unless uniform */
} bapq_panel;

/* out: (m, 16), row stride 16. */
typedef void (*bapq_tile_fn)(const bapq_tile *w, const bapq_panel *x, int32_t m, float *out);

/* Quantize one row of n floats into ceil(n/32) blocks: scale = amax/127, q = x*(127/amax) rounded
 * half to even, q = 0 past n. Below 2^-100, x and amax are first multiplied by 2^100, so that
 * 127/amax stays finite. amax == 0: scale 0, q 0. A NaN or infinity in a block makes its scale
 * NaN and its q 0, so that every output of the row is NaN. Scales go to every fourth place, as a
 * panel has them. */
typedef void (*bapq_quantize_row_fn)(const float *x, int32_t n, int8_t *q, float *scale,
                                     float *sum);

/* Block sums of m rows of already quantized values: sum[i][b] = sum of q[i][32b..32b+31]. */
typedef void (*bapq_block_sums_fn)(const int8_t *q, int32_t rows, int32_t blocks, float *sum);

/* What may stand between a layer's bias and its clip. */
typedef enum {
    BAPQ_NO_FUNCTION,
    BAPQ_HARD_SWISH, /* x min(max(x/6 + 1/2, 0), 1) */
    BAPQ_SILU,       /* x / (1 + e^-x) */
    BAPQ_GELU,       /* x times the normal distribution at x */
    BAPQ_GELU_TANH,  /* the same by tanh */
    BAPQ_FUNCTIONS
} bapq_function;

/* out = function(out + bias) in place; out: (m, 16), bias: (16,) or NULL. Unless it is none. */
typedef void (*bapq_apply_fn)(bapq_function function, const float *bias, int32_t m, float *out);

/* Outputs of one channel of a depthwise convolution, and the input under them. Each row of the
 * input is cut by the convolution's stride, so that a tap's values for neighbouring outputs are
 * neighbours. BAPQ_LANES values from a row's first output on may be read, however few it has. */
typedef struct {
    const float *x;       /* the first output's first tap */
    const ptrdiff_t *tap; /* (kernel_w,): where the taps of a kernel row stand, from its first */
    ptrdiff_t kernel_row; /* from a kernel row to the next */
    ptrdiff_t output_row; /* from an output row to the next */
    int32_t kernel_h, kernel_w;
    int32_t rows, width; /* outputs */
} bapq_windows;

/* y: (rows, width). weight: (kernel_h * kernel_w,), readable up to a multiple of 4. y = the clip of
 * acc = fma(x, weight, acc) over the taps, in order, from bias on: `low` where acc is below it,
 * then `high` where it is above. */
typedef void (*bapq_depthwise_fn)(const bapq_windows *x, const float *weight, float bias, float low,
                                  float high, float *y);

typedef struct {
    const char *name; /* "scalar", "avx2", "avx512vnni", "neon", "neondot" */
    bapq_tile_fn tile[BAPQ_LEVELS];
    bapq_quantize_row_fn quantize_row;
    bapq_block_sums_fn block_sums;
    bapq_depthwise_fn depthwise;
    uint32_t sum_levels;      /* bit l: tile[l] reads the sums of a uniform panel, too */
    uint32_t even_sum_levels; /* the same, but only of layers whose residual_steps are even */
    bapq_apply_fn apply;
} bapq_kernels;

/* The best family this CPU can run; BAPQ_ISA in the environment names another one, and then the
 * answer is NULL where bapq_kernels_by_name would give NULL. */
BAPQ_EXPORT const bapq_kernels *bapq_kernels_best(void);
/* NULL when the name is unknown or the CPU lacks the instructions. */
BAPQ_EXPORT const bapq_kernels *bapq_kernels_by_name(const char *name);
/* Every family that this CPU can run, best first; returns the count. */
BAPQ_EXPORT int32_t bapq_kernels_available(const bapq_kernels **out, int32_t capacity);

extern const bapq_kernels bapq_kernels_scalar;
#if defined(__x86_64__)
extern const bapq_kernels bapq_kernels_avx2;
extern const bapq_kernels bapq_kernels_avx512vnni;
#elif defined(__aarch64__)
extern const bapq_kernels bapq_kernels_neon;
extern const bapq_kernels bapq_kernels_neondot;
#endif

#endif
