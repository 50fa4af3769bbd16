/* The arena: memory for the tensors of ONNX Runtime's sessions, packed as tightly as they allow.
 *
 * ONNX Runtime's own arena grows by doubling and hands out parts of what it has in the order of
 * their sizes, so that a run touches up to half as much again as its tensors need at once. This one
 * is a single range of addresses. A tensor goes to the free place that fits best, and free
 * neighbours are one place. All sessions share it. */
#ifndef BAPQ_ARENA_H
#define BAPQ_ARENA_H

#include <stddef.h>

/* Reserves the addresses, once; 0 where the system has none to give. Any thread may call it. */
int bapq_arena_open(void);
/* 64-byte aligned; NULL where there is no memory. */
void *bapq_arena_take(size_t bytes);
void bapq_arena_give(void *memory);
/* Gives the pages that nobody uses back to the system. */
void bapq_arena_trim(void);

#endif
