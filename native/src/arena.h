/* The arena: memory for the tensors of ONNX Runtime's sessions, packed as tightly as they allow.
 *
 * ONNX Runtime's own arena grows by doubling and hands out parts of what it has in the order of
 * their sizes, so that a run touches up to half as much again as its tensors need at once. This one
 * is a single range of addresses. A tensor goes to the free place that fits best, and free
 * neighbours are one place. All sessions share it. */
#ifndef BAPQ_ARENA_H
#define BAPQ_ARENA_H

#include <stdbool.h>
#include <stddef.h>

/* Reserves the addresses, once; false where the system has none to give. Any thread may call it. */
bool bapq_arena_open(void);
/* 64-byte aligned; NULL where there is no room. */
void *bapq_arena_take(size_t bytes);
/* Whether it was the arena's; else nothing happens. */
bool bapq_arena_give(void *memory);
/* Gives the pages that nobody uses back to the system. */
void bapq_arena_trim(void);

#endif
