/* The chunk store: owns all weight memory, and hands chunks to the operators of a run.
 *
 * Plans. A plan is immutable: a level for every chunk or none (the chunk is skipped: never read,
 * and the plan's region has values for its rows), and the set of pinned chunks. Publishing one
 * swaps a pointer and reads nothing. A run holds the plan it began on, so it sees one plan from its
 * first operator to its last; a plan dies when it is neither published nor held.
 *
 * Homes. Each plane has a reserved address range as long as its file. A pinned chunk, once read and
 * checked, is at home: at its file offset in that range. A chunk that is not costs address space
 * only. Living plans claim the planes of their pinned chunks, and those that they keep for plans to
 * come; where the last claim goes, the pages go back to the system. Going down a level therefore
 * frees memory without reading, and going up reads only the missing plane. Stores of one bank in a
 * process share its homes (homes.h), and the lock that guards them.
 *
 * The ring. Everything else passes through a ring buffer. The order in which operators ask for
 * chunks is the same in every run, so one reader thread reads ahead of them, round and round: an
 * LRU cache would miss every time on such a scan. It also brings pinned chunks home on their first
 * pass. One run at a time, the leader, takes from the ring; a run whose chunks are all at home
 * needs no turn.
 *
 * Rows. A table that only Gather reads is never streamed: its chunks are one tile each, read on
 * demand through a small cache.
 *
 * Failure. A read that fails, or a checksum that does not fit, reaches the operator as an error
 * with layer, chunk and plane; or, where a lower level of that chunk is at home, the operator gets
 * that and the run reports it. The next run reads again.
 *
 * Concurrency. One lock guards all of it and is never held while reading. The reader writes only
 * into memory that nobody else looks at: a ring slot still marked as being read, or a home not yet
 * marked as read; the lock that it takes to change the mark orders its writes before the operators'
 * reads.
 */
#ifndef BAPQ_STORE_H
#define BAPQ_STORE_H

#include "bapq.h"
#include "kernels/kernels.h"
#include "layout.h"

typedef struct bapq_run bapq_run;

/* The open run with this ticket, NULL if there is none. */
bapq_run *bapq_run_of(int64_t ticket);
/* Number of the run's store, which no other store of the process ever has. */
int64_t bapq_run_store_id(const bapq_run *run);
/* Number of the store that owns the operators made on this thread, 0: none does. */
int64_t bapq_operators_store_id(void);

const bapq_kernels *bapq_run_kernels(const bapq_run *run);
int32_t bapq_run_threads(const bapq_run *run);
int32_t bapq_run_layer_count(const bapq_run *run);
const bapq_layer *bapq_run_layer(const bapq_run *run, int32_t layer);
/* Bit i is set when a chunk of the layer runs at level i; skipped ones set none. A fallback of a
 * level other than 32 is none of 32. */
uint32_t bapq_run_levels(const bapq_run *run, int32_t layer);
/* Borrows chunk i of the layer, until bapq_run_release, and those behind it of the same level that
 * are at home, too: work on them is then dealt out once. A run borrows one view at a time. */
int32_t bapq_run_acquire(bapq_run *run, int32_t layer, int32_t i, bapq_chunk_view *view,
                         bapq_error *error);
void bapq_run_release(bapq_run *run, const bapq_chunk_view *view);
/* The same for Gather: a few rows of the chunk are wanted, in no order. */
int32_t bapq_run_acquire_rows(bapq_run *run, int32_t layer, int32_t i, bapq_chunk_view *view,
                              bapq_error *error);
void bapq_run_release_rows(bapq_run *run, const bapq_chunk_view *view);
/* A buffer of at least this size, 64-byte aligned, valid until the next call; NULL: no memory. */
void *bapq_run_scratch(bapq_run *run, int64_t bytes);
/* Keeps the first error of the run for bapq_run_end. */
void bapq_run_fail(bapq_run *run, const bapq_error *error);

#endif
