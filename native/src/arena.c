#include "arena.h"

#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fork.h"

/* Stands before each block's memory. Blocks follow each other without a gap, and no two neighbours
 * are free. */
typedef struct block {
    struct block *before; /* NULL: the first */
    size_t bytes;         /* this header included */
    bool used;
} __attribute__((aligned(64))) block;

enum { UNIT = sizeof(block) };

static struct {
    uint8_t *base, *end; /* the blocks; `end` grows and shrinks */
    uint8_t *writable;   /* end of what can be written to */
    uint8_t *limit;      /* end of the reserved addresses */
    block *last;         /* always used: a free one is given to `end` */
    block *hint;         /* no block before it is free; NULL: none at all is */
} arena;
pthread_mutex_t bapq_arena_lock = PTHREAD_MUTEX_INITIALIZER;

bool bapq_arena_open(void) {
    pthread_mutex_lock(&bapq_arena_lock);
    if (!arena.base) {
        /* Addresses only: nothing is charged before it can be written to. */
        size_t bytes = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
        void *base =
            mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base != MAP_FAILED) {
            arena.base = arena.end = arena.writable = base;
            arena.limit = arena.base + bytes;
        }
    }
    bool there = arena.base != NULL;
    pthread_mutex_unlock(&bapq_arena_lock);
    return there;
}

static block *after(const block *b) { return (block *)((uint8_t *)b + b->bytes); }

/* Makes the rest of a block, from `bytes` on, a free one. */
static void split(block *b, size_t bytes) {
    block *rest = (block *)((uint8_t *)b + bytes);
    *rest = (block){.before = b, .bytes = b->bytes - bytes};
    after(rest)->before = rest; /* there is one: the last block is never free */
    b->bytes = bytes;
}

static block *best_fit(size_t bytes) {
    block *best = NULL;
    block *first_free = NULL;
    for (block *b = arena.hint; b && (uint8_t *)b < arena.end; b = after(b)) {
        if (b->used) continue;
        if (!first_free) first_free = b;
        if (b->bytes >= bytes && (!best || b->bytes < best->bytes)) best = b;
    }
    arena.hint = first_free;
    return best;
}

static block *extend(size_t bytes) {
    if (bytes > (size_t)(arena.limit - arena.end)) return NULL;
    uint8_t *end = arena.end + bytes;
    if (end > arena.writable) {
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        size_t more = ((size_t)(end - arena.writable) + page - 1) / page * page;
        if (mprotect(arena.writable, more, PROT_READ | PROT_WRITE) != 0) return NULL;
        arena.writable += more;
    }
    block *b = (block *)arena.end;
    *b = (block){.before = arena.last, .bytes = bytes};
    arena.end = end;
    arena.last = b;
    return b;
}

void *bapq_arena_take(size_t bytes) {
    if (bytes > SIZE_MAX - 2 * UNIT) return NULL;
    bytes = (bytes + 2 * UNIT - 1) / UNIT * UNIT;
    pthread_mutex_lock(&bapq_arena_lock);
    block *b = best_fit(bytes);
    if (!b)
        b = extend(bytes);
    else if (b->bytes - bytes >= 2 * UNIT)
        split(b, bytes);
    if (b) b->used = true;
    pthread_mutex_unlock(&bapq_arena_lock);
    return b ? b + 1 : NULL;
}

bool bapq_arena_give(void *memory) {
    if ((uint8_t *)memory < arena.base || (uint8_t *)memory >= arena.limit) return false;
    pthread_mutex_lock(&bapq_arena_lock);
    block *b = (block *)memory - 1;
    b->used = false;
    if (b != arena.last && !after(b)->used) {
        b->bytes += after(b)->bytes;
        after(b)->before = b;
    }
    if (b->before && !b->before->used) {
        b->before->bytes += b->bytes;
        b = b->before;
        if ((uint8_t *)after(b) < arena.end) after(b)->before = b;
    }
    if ((uint8_t *)after(b) == arena.end) {
        arena.end = (uint8_t *)b;
        arena.last = b->before;
        if (arena.hint == b) arena.hint = NULL;
    } else if (!arena.hint || b < arena.hint) {
        arena.hint = b;
    }
    pthread_mutex_unlock(&bapq_arena_lock);
    return true;
}

static void release(uint8_t *first, uint8_t *end) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uint8_t *whole = (uint8_t *)(((uintptr_t)first + page - 1) / page * page);
    uint8_t *last = (uint8_t *)((uintptr_t)end / page * page);
    if (last > whole) madvise(whole, (size_t)(last - whole), MADV_DONTNEED);
}

void bapq_arena_trim(void) {
    pthread_mutex_lock(&bapq_arena_lock);
    for (block *b = arena.hint; b && (uint8_t *)b < arena.end; b = after(b))
        if (!b->used) release((uint8_t *)(b + 1), (uint8_t *)after(b));
    if (arena.base) release(arena.end, arena.writable);
    pthread_mutex_unlock(&bapq_arena_lock);
}
