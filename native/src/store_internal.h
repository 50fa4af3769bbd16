/* What the files of the store share. See store.h for the idea.
 *
 * What happens without the lock, and why that is right on ARM64 too, where another core may see two
 * writes in either order. Nothing here leans on the order that x86 keeps: every byte that passes
 * from thread to thread has, between its write and its read, an unlock and a lock of one mutex, or
 * the start or the end of parallel work.
 *
 * Weights. The reader writes a chunk to its home or into the ring, then takes the lock and marks it
 * (HOME_THERE, ENTRY_READY). An operator sees the mark under the lock before it reads a byte.
 * Nobody writes there while it reads: a home is written only by the one reader that marked it as
 * arriving, and given up only with its last claim, and the operator's run holds a plan that claims
 * it; a ring entry's place is free again when its borrower pops it, under the lock, and only the
 * leader, which borrows one chunk at a time, or the reader while there is none, empties the queue.
 *
 * Plans. Level, claims and region are written before the plan is published, under the lock, and
 * never after. bapq_run_begin takes the pointer under the lock, and its hold keeps the plan alive.
 *
 * Layers and extents. Written before bapq_store_open returns, and never after.
 *
 * Runs. The fields of a run belong to the thread that is in the graph for it: its operators follow
 * each other, and ONNX Runtime orders each before the next. Slots are given and taken back under
 * bapq_runs_lock, and whoever has a ticket got it afterwards.
 *
 * Rows. The cache has a lock of its own, held from acquire to release.
 *
 * Work (work.h). `next` deals out items and is relaxed: each number is drawn once in any order.
 * What items read was written before ParallelFor started their threads; what they write, each its
 * own rows, is read after it returned.
 *
 * Trace. `on` is relaxed, a hint: where it counts it is read again with the lock held. A stale
 * value costs an event, or a look at the clock.
 *
 * tests/native/run_sanitizers.sh puts all but Work under the thread sanitizer. */
#ifndef BAPQ_STORE_INTERNAL_H
#define BAPQ_STORE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "homes.h"
#include "store.h"

typedef struct plan {
    int64_t number;
    int32_t holders; /* open runs, and the stream while it reads ahead for this plan */
    int32_t threads;
    int64_t ring_bytes;
    int64_t home_limit_bytes; /* most bytes at home while this plan is the published one */
    uint8_t *level;           /* (chunk_count,) level index */
    uint8_t *pinned;          /* (chunk_count,) 1: keep it at home once it was read */
    uint8_t *claimed;         /* (chunk_count,) bit p: plane p, if it is at home, stays there */
    const float *skip_values; /* (stored rows of all layers,) of its region */
} plan;

/* One plane file, as this store reads it. Its chunks are at home in homes->plane. */
typedef struct {
    int fd;
    int32_t *claims; /* (chunk_count,) of living plans, and of a read that goes home */
} plane_store;

/* A chunk that is on its way through the ring, or whose read failed. */
typedef struct {
    int32_t chunk;
    int32_t state;  /* of the enum below */
    int64_t offset; /* in the ring */
    int64_t bytes;  /* in the ring, 0 when nothing of it stands there */
    int64_t at[2];  /* per plane of the level: offset in the ring, or -1: at home */
    bapq_error error;
    int64_t read_for; /* ticket of the leader then, 0: none */
} ring_entry;

enum { ENTRY_READING, ENTRY_READY, ENTRY_FAILED };
enum { RING_ENTRIES = 64 };

/* The one reader thread and the ring it fills. Chunks pass in bank order, round and round. */
typedef struct {
    pthread_t thread;
    bool started, stopping;
    bool busy;        /* a read is under way, outside the lock */
    plan *plan;       /* whose chunks are read ahead; held */
    bapq_run *leader; /* the one run that may take from the ring */
    int32_t next;     /* chunk that the reader looks at next */
    int32_t idle_for; /* chunks in a row that needed nothing: a whole round means rest */
    bool misled;      /* reads ahead in an order that is known to be wrong now */
    uint8_t *ring;
    int64_t ring_bytes;
    int64_t ring_touched_bytes; /* from its start */
    ring_entry entry[RING_ENTRIES];
    int32_t first, count; /* of the queue in entry[] */
    uint8_t *bounce;      /* aligned buffer for direct reads, NULL for cached ones */
    int64_t bounce_bytes;
} stream;

/* Tiles of embedding tables, read on demand: a direct-mapped cache. */
typedef struct {
    pthread_mutex_t lock; /* held from acquire to release of a row's chunk */
    int64_t slot_bytes;
    int32_t slots;
    int32_t slots_used; /* under the store's lock */
    int64_t *key;       /* (slots,) chunk * 8 + level, or of the enum below */
    uint8_t *data;
    uint8_t *bounce;
} row_cache;

/* What is recorded while someone profiles. */
typedef struct {
    atomic_bool on;          /* written with the lock held */
    bapq_trace_event *event; /* (capacity,) */
    int64_t capacity, count, lost;
} trace_buffer;

enum { ROW_NONE = -1, ROW_NEVER = -2 /* never was any */ };

struct bapq_store {
    int64_t id; /* of all stores ever opened, from 1 on */
    plane_store plane[BAPQ_PLANES];
    bapq_layer *layer;
    int32_t *row_order;   /* what the layers' row_order point into */
    float *dropped_bias;  /* likewise */
    int64_t *first_row;   /* (layer_count + 1,) stored rows of the layers before */
    int32_t *layer_of;    /* (chunk_count,) */
    int32_t *sequence;    /* (chunk_count,) chunks in the order in which runs ask for them */
    int32_t *position_of; /* (chunk_count,) the inverse */
    bool order_known;
    int32_t layer_count;
    int32_t chunk_count;
    int statm_fd; /* /proc/self/statm, -1: not there */
    bool direct;
    const bapq_kernels *kernels;

    homes *homes;               /* what stands below is under their lock */
    bapq_store *neighbour;      /* another one that is open on them */
    int64_t bytes_there_before; /* at home when this store was opened: no growth of its own */
    plan *published;
    int64_t plan_count; /* ever published */
    float **region;     /* (region_count,) of (stored rows of all layers,) */
    int32_t region_count;
    int64_t live_plans;
    int64_t home_bytes;    /* of chunks at home that this store claims */
    int64_t scratch_bytes; /* of all runs, and of the spare one */
    void *spare_scratch;   /* of a run that ended, for the next one */
    int64_t spare_scratch_bytes;
    int64_t read_bytes;
    int64_t wait_ns;   /* operators waited for reads */
    bapq_times times;  /* since they were last taken */
    int64_t *layer_ns; /* (layer_count,) likewise */
    int32_t open_runs;
    stream stream;
    row_cache rows;
    trace_buffer trace;
};

struct bapq_run {
    bapq_store *store;
    plan *plan;
    int64_t ticket;
    bool measured;  /* its report tells memory */
    int32_t *asked; /* layers in the order in which the run asked for them; NULL: not noted */
    int32_t asked_layers;
    int32_t layer;    /* that it asked for last, -1: none yet */
    int64_t since_ns; /* when it last had what it asked for */
    int32_t degraded; /* chunks that ran below their level because a read failed */
    bapq_error error;
    bapq_error degraded_by;
    void *scratch;
    int64_t scratch_bytes;
};

/* ---- run.c ---- */

/* Frees the spare scratch buffer. */
void bapq_scratch_free(bapq_store *store);

/* ---- residency.c ---- */

/* Reads one chunk of a plane into `target` and checks it there. Called without the lock. */
int32_t bapq_read_chunk(const bapq_store *store, int32_t plane, int32_t chunk, uint8_t *target,
                        uint8_t *bounce, bapq_error *error);
/* The rest is called with the lock held. */
/* But for the values of its region; called without the lock. */
plan *bapq_plan_new(const bapq_store *store, const bapq_plan_request *request, bapq_error *error);
void bapq_plan_claim(bapq_store *store, const plan *p);
/* Takes part in the homes from now on, and no more; these two are called without the lock. */
void bapq_enter_homes(bapq_store *store, homes *h);
void bapq_leave_homes(bapq_store *store);
void bapq_claim(bapq_store *store, int32_t plane, int32_t chunk);
/* Takes away a holder; frees the plan, and what only it kept at home, when nobody needs it. */
void bapq_plan_release(bapq_store *store, plan *p);
void bapq_unclaim(bapq_store *store, int32_t plane, int32_t chunk);
/* Bytes of the chunk's planes that are not at home, with each plane rounded to 64. */
int64_t bapq_missing_bytes(const bapq_store *store, const plan *p, int32_t chunk);
/* Whether all that the level reads is at home and stays there as long as the plan lives. */
bool bapq_plan_holds(const bapq_store *store, const plan *p, int32_t level, int32_t chunk);
/* Marks the chunk as being at home, for all stores that claim it. */
void bapq_arrived(bapq_store *store, int32_t plane, int32_t chunk);

/* Weights in memory that came since the store was opened, as far as their pages were touched: its
 * ring and rows, and what is at home, whichever of the bank's stores asked for it. */
int64_t bapq_weight_bytes(const bapq_store *store);
/* Resident memory of the process; 0 when the system does not tell. Called without the lock. */
int64_t bapq_rss_bytes(const bapq_store *store);

/* ---- stream.c ---- */

int32_t bapq_stream_start(bapq_store *store, bapq_error *error);
/* Ends the thread and frees the ring. Called without the lock. */
void bapq_stream_stop(bapq_store *store);
/* Called with the lock held, when another plan was published: nobody leads, so turn to it now. */
void bapq_stream_follow(bapq_store *store);
/* Called with the lock held, when the run ends. The order it noted is taken over. */
void bapq_stream_leave(bapq_store *store, const bapq_run *run);

/* ---- trace.c ---- */

int64_t bapq_now_ns(void);
/* Time that this thread was on a core. */
int64_t bapq_thread_ns(void);
/* The time, or 0 when nothing is recorded. Called with the lock or without it. */
int64_t bapq_trace_start(const bapq_store *store);
/* Called with the lock held. Records the event, with all but its end, unless start_ns is 0. */
void bapq_trace_end(bapq_store *store, bapq_trace_event event);
/* Called without the lock, when nobody else uses the store. */
void bapq_trace_free(bapq_store *store);

#endif
