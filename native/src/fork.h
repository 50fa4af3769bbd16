/* What a forked process must not find as it was: locks that a thread of the one before held, and
 * what belongs to its stores. */
#ifndef BAPQ_FORK_H
#define BAPQ_FORK_H

#include <pthread.h>

/* The locks of the process, each guarding the file that defines it. None is taken while another
 * one is held. */
extern pthread_mutex_t bapq_runs_lock;
extern pthread_mutex_t bapq_homes_lock;
extern pthread_mutex_t bapq_arena_lock;

/* In a forked process, with the file's lock held: the runs and the homes are another's. Their
 * memory stays, since nobody can tell what used it. */
void bapq_runs_forget(void);
void bapq_homes_forget(void);

#endif
