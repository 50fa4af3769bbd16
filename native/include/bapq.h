/* libbapq: the plain C ABI that Python binds with ctypes.
 *
 * Every call that can fail returns a status and fills a bapq_error; nothing aborts. All pointers in
 * a bapq_bank are copied or read during bapq_store_open only.
 */
#ifndef BAPQ_H
#define BAPQ_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BAPQ_API __attribute__((visibility("default")))

/* Raised by one whenever a struct or a function below changes; Python refuses another. */
enum { BAPQ_ABI_VERSION = 10 };

typedef enum {
    BAPQ_OK = 0,
    BAPQ_ARGUMENT,  /* a caller's mistake: wrong index, shape or level */
    BAPQ_NO_MEMORY, /* the system refused memory */
    BAPQ_IO,        /* a read failed; os_errno says how */
    BAPQ_TRUNCATED, /* a plane file ends before the chunk does */
    BAPQ_CHECKSUM,  /* a chunk's bytes differ from their checksum */
    BAPQ_NO_LEVEL,  /* a chunk cannot run at the level that a plan gives it */
    BAPQ_NO_KERNEL, /* BAPQ_ISA names kernels that this CPU cannot run */
} bapq_status;

typedef struct {
    int32_t status;
    int32_t os_errno;
    int32_t layer; /* -1: none */
    int32_t chunk; /* number in the whole bank, -1: none */
    char message[240];
} bapq_error;

/* Planes, in the order of every per-plane table and mask. */
enum { BAPQ_F32, BAPQ_R8, BAPQ_P4, BAPQ_M1, BAPQ_S1, BAPQ_PLANES };

/* One row of tables/<plane>_chunks.npy. */
typedef struct {
    uint64_t offset;
    uint32_t bytes;
    uint32_t crc32;
} bapq_extent;

typedef struct {
    int32_t rows;        /* of the output */
    int32_t stored_rows; /* the others are dropped: their weights are all zero */
    int32_t columns;
    int32_t chunk_rows;
    int32_t first_chunk;
    int32_t residual_steps;
    int32_t has_bias;
    int32_t gathered;    /* 1: Gather reads it */
    int32_t depthwise;   /* 1: DepthwiseConv reads it, and its codes are laid out for that */
    int32_t read_by_row; /* 1: only Gather does, so it is neither streamed nor pinned */
    int32_t levels;      /* bit i is set: the layer has the i-th of levels 32, 8, 4, 2, 1 */
    int32_t scale_columns[BAPQ_PLANES]; /* per plane; 0: no scales there */
    const int32_t *row_order;  /* (rows,) output row of every stored row, then of every dropped one;
                                  NULL: in order */
    const float *dropped_bias; /* (rows - stored_rows,), NULL: zeros */
} bapq_layer;

typedef struct {
    const char *plane_path[BAPQ_PLANES];     /* NULL: absent */
    const bapq_extent *extents[BAPQ_PLANES]; /* (chunk_count,) each; NULL: absent */
    const bapq_layer *layers;
    int32_t layer_count;
    int32_t chunk_count;
    int32_t direct;          /* 1: read around the page cache (O_DIRECT) */
    int32_t row_cache_slots; /* chunks of embedding tables that are kept, at least 1 */
} bapq_bank;

/* A plan: what runs at which level, and what stays in memory. */
typedef struct {
    const uint8_t *levels;    /* (chunk_count,) 32, 8, 4, 2, 1, or 0: skipped */
    const uint8_t *pinned;    /* (chunk_count,) 1: stays in memory once it was read */
    const uint8_t *kept;      /* (chunk_count,) bit p: if plane p is in memory, it stays, for plans
                                 to come; NULL: none */
    int32_t region;           /* whose values stand in for skipped rows, -1: none */
    int64_t ring_bytes;       /* buffer for the chunks that are not pinned */
    int64_t home_limit_bytes; /* most bytes of pinned chunks, those of dying plans included */
    int32_t threads;          /* most threads that one operator runs on */
} bapq_plan_request;

typedef struct {
    int64_t home_bytes;      /* of pinned chunks in memory, all plans of this store that live */
    int64_t ring_bytes;      /* buffer of the chunks that pass through, as far as touched */
    int64_t row_cache_bytes; /* buffer of embedding rows, as far as touched */
    int64_t row_cache_limit_bytes; /* all of it */
    int64_t read_bytes;            /* from storage since the store was opened */
    int64_t wait_ns;               /* that operators waited for reads, all runs */
    int64_t scratch_bytes;         /* buffers of all runs */
    int64_t live_plans;            /* the published one and those that runs still hold */
} bapq_store_stats;

/* What reading and computing took since it was last asked for. */
typedef struct {
    int64_t runs;        /* that ended */
    int64_t read_bytes;  /* of the reader; rows that Gather asks for are none of its */
    int64_t read_ns;     /* that it took for them */
    int64_t read_cpu_ns; /* of that on a core: copying and checking */
} bapq_times;

typedef struct {
    int64_t plan_number;  /* plans are numbered from 1 in the order of their publication */
    int64_t rss_bytes;    /* of the process when a measured run ended, its buffers still there */
    int64_t weight_bytes; /* of that, come since the store was opened: ring and row cache as far as
                             touched, and pinned chunks of all stores of the bank */
    int32_t degraded;     /* chunks that ran below their level, because a read failed */
    bapq_error degraded_by;
} bapq_run_report;

enum {
    BAPQ_TRACE_READ, /* the reader thread read a chunk of a plane */
    BAPQ_TRACE_ROWS, /* an operator did, for a few of its rows */
    BAPQ_TRACE_WAIT, /* an operator waited for a chunk */
};

typedef struct {
    int32_t kind;
    int32_t chunk;
    int32_t plane;    /* of a wait -1 */
    int32_t status;   /* of the read */
    int64_t start_ns; /* CLOCK_MONOTONIC */
    int64_t end_ns;
    int64_t bytes; /* that read_bytes grew by */
} bapq_trace_event;

typedef struct bapq_store bapq_store;

BAPQ_API int32_t bapq_abi_version(void);
/* Name of a plane in banks, NULL past the last: so Python checks that its order is this one. */
BAPQ_API const char *bapq_plane_name(int32_t plane);
BAPQ_API int32_t bapq_store_open(const bapq_bank *bank, bapq_store **out, bapq_error *error);
/* The operators that ONNX Runtime makes on this thread from now on, with a session, compute for
 * runs of this store and no other; NULL: for none. */
BAPQ_API void bapq_store_owns_operators(const bapq_store *store);
/* Closes the store and gives its memory back. BAPQ_ARGUMENT while a run is open. */
BAPQ_API int32_t bapq_store_close(bapq_store *store, bapq_error *error);
/* Makes this the plan of every run that begins from now on. Reads nothing: the reader thread brings
 * in what the plan lacks, and a run waits for the chunks it needs. What only the old plan needed
 * goes as soon as no run holds it. */
BAPQ_API int32_t bapq_store_publish(bapq_store *store, const bapq_plan_request *request,
                                    bapq_error *error);
/* Registers the values that stand in for the rows of skipped chunks in one region of inputs: the
 * outputs before the clip, bias included, (stored rows of all layers,) in the order of the bank.
 * Regions are numbered from 0, and last as long as the store. */
BAPQ_API int32_t bapq_store_add_region(bapq_store *store, const float *values, int32_t *region,
                                       bapq_error *error);
BAPQ_API void bapq_store_read_stats(bapq_store *store, bapq_store_stats *out);
/* Moves the times since the last call to `out`, and to `layer_ns`, (layers,), what runs took
 * besides waiting for reads: from asking for a layer's first chunk to asking for the next layer's,
 * so that it holds what the graph engine does between them. */
BAPQ_API void bapq_store_take_times(bapq_store *store, bapq_times *out, int64_t *layer_ns);
/* Records from now on, into a buffer of so many events; 0 ends it and frees the buffer. */
BAPQ_API int32_t bapq_store_trace(bapq_store *store, int64_t capacity, bapq_error *error);
/* Moves the recorded events to `out`, in the order in which they ended, `capacity` at most; returns
 * how many. `lost`: events since the recording began that found the buffer full. */
BAPQ_API int64_t bapq_store_trace_read(bapq_store *store, bapq_trace_event *out, int64_t capacity,
                                       int64_t *lost);
/* Begins a run on the published plan. The ticket, the value of the graph input "bapq.run", is a
 * random number, so that no graph can guess that of another run.
 * `measured`: the run's report tells memory, for which the system is asked. */
BAPQ_API int32_t bapq_run_begin(bapq_store *store, int32_t measured, int64_t *ticket,
                                bapq_error *error);
/* Ends the run. Returns the status of the first operator that failed in it, and its error. */
BAPQ_API int32_t bapq_run_end(int64_t ticket, bapq_run_report *report, bapq_error *error);
/* Name of the kernels in use, "" when BAPQ_ISA names ones that cannot run. */
BAPQ_API const char *bapq_kernels_name(void);

#ifdef __cplusplus
}
#endif

#endif
