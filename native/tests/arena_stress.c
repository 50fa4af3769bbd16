/* The arena under load: threads take, fill, check and give blocks at random while one trims it.
 *
 * Usage: arena_stress SECONDS SEED. Run it under the sanitizers. */
#include "arena.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { THREADS = 4, BLOCKS = 64, ALIGNMENT = 64 };

static atomic_bool stop;
static atomic_long failures;

typedef struct {
    uint8_t *memory;
    size_t bytes;
    uint8_t value;
} held;

static uint32_t draw(uint32_t *state) { /* xorshift32 */
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

static void fail(const char *what) {
    atomic_fetch_add(&failures, 1);
    fprintf(stderr, "arena_stress: %s\n", what);
}

static void *work(void *seed) {
    uint32_t state = (uint32_t)(uintptr_t)seed;
    held blocks[BLOCKS] = {{0}};
    while (!atomic_load(&stop)) {
        held *block = &blocks[draw(&state) % BLOCKS];
        if (block->memory) {
            for (size_t i = 0; i < block->bytes; i++)
                if (block->memory[i] != block->value) {
                    fail("a block does not hold what was written to it");
                    break;
                }
            bapq_arena_give(block->memory);
            block->memory = NULL;
            continue;
        }
        /* Most are small, some take pages. */
        block->bytes = draw(&state) % (draw(&state) % 8 ? 512 : 100000);
        block->value = (uint8_t)draw(&state);
        block->memory = bapq_arena_take(block->bytes);
        if (!block->memory || (uintptr_t)block->memory % ALIGNMENT != 0) {
            fail("no block, or one that is not aligned");
            break;
        }
        memset(block->memory, block->value, block->bytes);
    }
    for (int i = 0; i < BLOCKS; i++) bapq_arena_give(blocks[i].memory);
    return NULL;
}

int main(int argc, char **argv) {
    int seconds = argc > 1 ? atoi(argv[1]) : 2;
    uintptr_t seed = argc > 2 ? (uintptr_t)atoi(argv[2]) : 1;
    pthread_t threads[THREADS];
    if (!bapq_arena_open()) {
        fail("no addresses");
        return 1;
    }
    void *first = bapq_arena_take(1);
    bapq_arena_give(first);
    for (uintptr_t i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, work, (void *)(seed * THREADS + i + 1));
    time_t end = time(NULL) + seconds;
    while (time(NULL) < end) {
        struct timespec pause = {.tv_nsec = 1000000};
        nanosleep(&pause, NULL);
        bapq_arena_trim();
    }
    atomic_store(&stop, true);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    /* All was given back: what is taken now begins where the first block did. */
    void *again = bapq_arena_take(1 << 20);
    if (again != first) fail("blocks were left behind");
    bapq_arena_give(again);
    if (bapq_arena_give(NULL) || bapq_arena_give(threads)) fail("foreign memory was taken");
    if (bapq_arena_take(SIZE_MAX) || bapq_arena_take(SIZE_MAX / 2)) fail("a block without end");
    printf("arena_stress: %s\n", atomic_load(&failures) ? "failed" : "passed");
    return atomic_load(&failures) != 0;
}
