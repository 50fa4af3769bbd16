/* The chunk store: owns all weight memory, and hands chunks to the operators of a run.
 *
 * Residency. Each plane has a reserved address range as long as its file; a chunk that is in memory
 * stands at its file offset there, and a chunk that is not costs address space only. A chunk of a
 * plane is resident while at least one living plan needs it.
 *
 * Plans. A plan is immutable: one level per chunk. Publishing reads what the new plan lacks, then
 * swaps the store's pointer. A run holds the plan it began on, so it sees one plan from its first
 * operator to its last; a plan dies when it is neither published nor held, and only then are the
 * chunks that nobody else needs given back to the system. Going down a level therefore reads
 * nothing, and going up reads only the missing plane.
 *
 * Locks. publish_lock: held through the reading, owns the residency table. plan_lock: short, owns
 * the published pointer, the counts of runs and the list of dead plans. A run that ends never waits
 * for a publisher that is reading: it puts its dead plan on the list, and whoever next holds
 * publish_lock reaps it.
 */
#ifndef BAPQ_STORE_H
#define BAPQ_STORE_H

#include "bapq.h"
#include "kernels/kernels.h"
#include "layout.h"

typedef struct bapq_run bapq_run;

/* The open run with this ticket, NULL if there is none. */
bapq_run *bapq_run_of(int64_t ticket);

const bapq_kernels *bapq_run_kernels(const bapq_run *run);
int32_t bapq_run_threads(const bapq_run *run);
int32_t bapq_run_layer_count(const bapq_run *run);
const bapq_layer *bapq_run_layer(const bapq_run *run, int32_t layer);
/* Bit i is set when a chunk of the layer runs at level i. */
uint32_t bapq_run_levels(const bapq_run *run, int32_t layer);
/* Borrows chunk i of the layer at the level of the run's plan, until bapq_run_release. */
int32_t bapq_run_acquire(bapq_run *run, int32_t layer, int32_t i, bapq_chunk_view *view,
                         bapq_error *error);
void bapq_run_release(bapq_run *run, const bapq_chunk_view *view);
/* A buffer of at least this size, 64-byte aligned, valid until the next call; NULL: no memory. */
void *bapq_run_scratch(bapq_run *run, int64_t bytes);
/* Keeps the first error of the run for bapq_run_end. */
void bapq_run_fail(bapq_run *run, const bapq_error *error);

#endif
