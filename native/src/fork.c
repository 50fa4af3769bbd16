#include "fork.h"

static void before(void) {
    pthread_mutex_lock(&bapq_runs_lock);
    pthread_mutex_lock(&bapq_homes_lock);
    pthread_mutex_lock(&bapq_arena_lock);
}

static void after(void) {
    pthread_mutex_unlock(&bapq_arena_lock);
    pthread_mutex_unlock(&bapq_homes_lock);
    pthread_mutex_unlock(&bapq_runs_lock);
}

static void in_child(void) {
    bapq_runs_forget();
    bapq_homes_forget();
    after();
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(before, after, in_child);
}
