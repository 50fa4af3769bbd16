/* The reader thread, the ring, and the chunks that operators borrow. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "error.h"
#include "store_internal.h"

static ring_entry *entry_at(stream *s, int32_t i) {
    return &s->entry[(s->first + i) % RING_ENTRIES];
}

static void pop_entry(stream *s) {
    s->first = (s->first + 1) % RING_ENTRIES;
    s->count--;
}

/* ---- what the reader reads next: all with the lock held ---- */

static void resize_ring(stream *s, int64_t bytes) {
    if (s->ring_bytes == bytes) return;
    if (s->ring) munmap(s->ring, (size_t)s->ring_bytes);
    void *ring = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    s->ring = ring == MAP_FAILED ? NULL : ring; /* without a ring its chunks fail by name */
    s->ring_bytes = s->ring ? bytes : 0;
    s->ring_touched_bytes = 0;
}

/* Forgets what was read ahead, and goes on at `position` for plan p. Not while the reader is busy.
 */
static void serve(bapq_store *store, plan *p, int32_t position) {
    stream *s = &store->stream;
    s->first = s->count = 0;
    s->next = position;
    s->idle_for = 0;
    s->misled = false;
    plan *old = s->plan;
    if (old != p) {
        s->plan = p;
        p->holders++;
    }
    resize_ring(s, p->ring_bytes); /* for a plan of before, too: it may have had no memory then */
    if (old != p && old) bapq_plan_release(store, old);
    pthread_cond_broadcast(&store->homes->changed);
}

void bapq_stream_follow(bapq_store *store) {
    stream *s = &store->stream;
    if (s->leader == NULL && !s->busy && (s->plan != store->published || s->misled))
        serve(store, store->published, 0);
}

/* Offset of free space for one more entry, -1 when there is none. */
static int64_t ring_space(stream *s, int64_t bytes) {
    int64_t tail = -1, head = 0;
    for (int32_t i = 0; i < s->count; i++) {
        const ring_entry *e = entry_at(s, i);
        if (e->bytes == 0) continue;
        if (tail < 0) tail = e->offset;
        head = e->offset + e->bytes;
    }
    if (tail < 0) return bytes <= s->ring_bytes ? 0 : -1;
    if (head > tail) {
        if (head + bytes <= s->ring_bytes) return head;
        return bytes <= tail ? 0 : -1;
    }
    return head + bytes <= tail ? head : -1;
}

/* Whether the reader can go on: a chunk to read and a place for it. Skips what needs nothing. */
static bool find_work(bapq_store *store, ring_entry **out, bool *to_home) {
    stream *s = &store->stream;
    bapq_stream_follow(store);
    while (s->plan != NULL && s->idle_for < store->chunk_count) {
        int32_t chunk = store->sequence[s->next];
        const plan *p = s->plan;
        bool by_row = store->layer[store->layer_of[chunk]].read_by_row;
        if (by_row || bapq_plan_holds(store, p, p->level[chunk], chunk)) {
            s->next = (s->next + 1) % store->chunk_count;
            s->idle_for++;
            continue;
        }
        if (s->count == RING_ENTRIES) return false;
        for (int32_t i = 0; i < s->count; i++)
            if (entry_at(s, i)->chunk == chunk) return false; /* a whole round is in the ring */
        int64_t bytes = bapq_missing_bytes(store, p, chunk);
        *to_home = p->pinned[chunk] && store->home_bytes + bytes <= p->home_limit_bytes;
        int64_t offset = *to_home ? 0 : ring_space(s, bytes);
        /* With an empty queue there is no space only if there is no ring: that is for the operator.
         */
        if (offset < 0 && s->count > 0) return false;
        ring_entry *e = entry_at(s, s->count++);
        *e = (ring_entry){.chunk = chunk,
                          .state = ENTRY_READING,
                          .offset = offset,
                          .bytes = *to_home ? 0 : bytes,
                          .at = {-1, -1},
                          .read_for = s->leader ? s->leader->ticket : 0};
        s->next = (s->next + 1) % store->chunk_count;
        s->idle_for = 0;
        if (e->bytes > 0 && offset + bytes > s->ring_touched_bytes)
            s->ring_touched_bytes = offset + bytes;
        *out = e;
        return true;
    }
    return false;
}

/* ---- the reader ---- */

/* Reads the planes that the chunk lacks. Called with the lock, which it lets go of while reading.
 */
static void bring_in(bapq_store *store, ring_entry *e, bool to_home) {
    stream *s = &store->stream;
    const plan *p = s->plan;
    int32_t chunk = e->chunk, planes[2];
    int32_t n = bapq_level_planes(p->level[chunk], planes);
    int64_t used = 0;
    if (!to_home && e->offset < 0) {
        e->state = ENTRY_FAILED;
        e->bytes = 0;
        bapq_fail(&e->error, BAPQ_NO_MEMORY, "no ring of %lld bytes", (long long)p->ring_bytes);
        return;
    }
    for (int32_t i = 0; i < n; i++) {
        const plane_home *home = &store->homes->plane[planes[i]];
        const bapq_extent *extent = &home->extent[chunk];
        s->busy = true;
        while (to_home && home->state[chunk] == HOME_ARRIVING) /* another store reads it */
            pthread_cond_wait(&store->homes->changed, &store->homes->lock);
        s->busy = false;
        if (p->claimed[chunk] & 1 << planes[i] && home->state[chunk] == HOME_THERE) continue;
        uint8_t *target = to_home ? home->base + extent->offset : s->ring + e->offset + used;
        if (to_home) {
            /* The claim keeps the home's pages ours, should the plan die meanwhile. */
            bapq_claim(store, planes[i], chunk);
            home->state[chunk] = HOME_ARRIVING;
        }
        s->busy = true;
        pthread_mutex_unlock(&store->homes->lock);
        bapq_error error = {0};
        bapq_trace_event event = {BAPQ_TRACE_READ, chunk, planes[i],
                                  .start_ns = bapq_trace_start(store)};
        int64_t started = bapq_now_ns(), started_cpu = bapq_thread_ns();
        int32_t status = bapq_read_chunk(store, planes[i], chunk, target, s->bounce, &error);
        int64_t took = bapq_now_ns() - started, took_cpu = bapq_thread_ns() - started_cpu;
        pthread_mutex_lock(&store->homes->lock);
        s->busy = false;
        event.status = status;
        event.bytes = status == BAPQ_OK ? extent->bytes : 0;
        bapq_trace_end(store, event);
        if (status == BAPQ_OK) {
            store->read_bytes += extent->bytes;
            store->times.read_bytes += extent->bytes;
            store->times.read_ns += took;
            store->times.read_cpu_ns += took_cpu;
            if (to_home) {
                bapq_arrived(store, planes[i], chunk);
            } else {
                e->at[i] = e->offset + used;
                used += ((int64_t)extent->bytes + 63) / 64 * 64;
            }
        }
        if (to_home) {
            if (status != BAPQ_OK) home->state[chunk] = HOME_AWAY;
            bapq_unclaim(store, planes[i], chunk);
        }
        if (status != BAPQ_OK) {
            e->state = ENTRY_FAILED;
            e->bytes = 0;
            e->error = error;
            return;
        }
    }
    e->state = ENTRY_READY;
}

static void *reader(void *data) {
    bapq_store *store = data;
    stream *s = &store->stream;
    pthread_mutex_lock(&store->homes->lock);
    while (!s->stopping) {
        ring_entry *e = NULL;
        bool to_home = false;
        if (find_work(store, &e, &to_home)) {
            bring_in(store, e, to_home);
            /* What came home needs no place in the queue; a failure does, for its operator. */
            if (to_home && e->state == ENTRY_READY) s->count--;
            /* Woken with the lock held, the operator would only go to sleep on the lock. */
            pthread_mutex_unlock(&store->homes->lock);
            pthread_cond_broadcast(&store->homes->changed);
            pthread_mutex_lock(&store->homes->lock);
            continue;
        }
        bool resting = s->plan != NULL && s->idle_for >= store->chunk_count;
        if (resting && s->count == 0 && s->ring_touched_bytes > 0) {
            madvise(s->ring, (size_t)s->ring_bytes, MADV_DONTNEED);
            s->ring_touched_bytes = 0;
        }
        pthread_cond_wait(&store->homes->changed, &store->homes->lock);
    }
    pthread_mutex_unlock(&store->homes->lock);
    return NULL;
}

int32_t bapq_stream_start(bapq_store *store, bapq_error *error) {
    stream *s = &store->stream;
    if (pthread_create(&s->thread, NULL, reader, store) != 0)
        return bapq_fail(error, BAPQ_NO_MEMORY, "no thread to read with");
    s->started = true;
    return BAPQ_OK;
}

void bapq_stream_stop(bapq_store *store) {
    stream *s = &store->stream;
    if (s->started) {
        pthread_mutex_lock(&store->homes->lock);
        s->stopping = true;
        pthread_cond_broadcast(&store->homes->changed);
        pthread_mutex_unlock(&store->homes->lock);
        pthread_join(s->thread, NULL);
    }
    if (s->ring) munmap(s->ring, (size_t)s->ring_bytes);
    free(s->bounce);
}

/* The graph engine may run layers in another order than the bank has them in: read ahead in that.
 */
static void take_over_order(bapq_store *store, const bapq_run *run) {
    stream *s = &store->stream;
    if (run->asked == NULL || run->asked_layers == 0 || store->order_known) return;
    int32_t position = 0;
    memset(store->position_of, -1, (size_t)store->chunk_count * sizeof *store->position_of);
    for (int32_t i = 0; i < run->asked_layers + store->layer_count; i++) {
        /* First the layers that were asked for, then all that were not. */
        int32_t l = i < run->asked_layers ? run->asked[i] : i - run->asked_layers;
        const bapq_layer *layer = &store->layer[l];
        if (store->position_of[layer->first_chunk] >= 0) continue;
        for (int32_t c = 0; c < bapq_chunk_count(layer); c++, position++) {
            store->sequence[position] = layer->first_chunk + c;
            store->position_of[layer->first_chunk + c] = position;
        }
    }
    store->order_known = true;
    /* A reader that is busy, as on a slow card it always is, begins anew after what it reads now.
     */
    s->misled = s->plan != NULL;
    bapq_stream_follow(store);
}

void bapq_stream_leave(bapq_store *store, const bapq_run *run) {
    if (store->stream.leader == run) {
        store->stream.leader = NULL;
        pthread_cond_broadcast(
            &store->homes->changed); /* a run whose chunks were all at home wakes nobody */
    }
    if (store->stream.leader == NULL) take_over_order(store, run);
}

/* ---- borrowing ---- */

static void describe(const bapq_run *run, int32_t layer, int32_t i, int32_t level,
                     bapq_chunk_view *view) {
    const bapq_layer *l = &run->store->layer[layer];
    int32_t first_row = i * l->chunk_rows;
    view->layer = l;
    view->level = level;
    view->first_row = first_row;
    view->rows =
        l->stored_rows - first_row < l->chunk_rows ? l->stored_rows - first_row : l->chunk_rows;
    view->chunk = l->first_chunk + i;
    view->chunks = 1;
    view->borrowed = BAPQ_FROM_HOME;
    if (level == BAPQ_SKIP)
        view->skip_values = run->plan->skip_values + run->store->first_row[layer] + first_row;
}

static void point_home(const bapq_store *store, bapq_chunk_view *view) {
    int32_t planes[2];
    int32_t n = bapq_level_planes(view->level, planes);
    for (int32_t p = 0; p < n; p++) {
        const plane_home *home = &store->homes->plane[planes[p]];
        view->records[p] = home->base + home->extent[view->chunk].offset;
        view->record_bytes[p] = bapq_record_bytes(view->layer, planes[p]);
    }
}

/* Adds the chunks behind the view's that are at home, too, and run at its level. Those of a layer
 * stand one behind the other in a plane's file, and so at home; where a bank has gaps, the view
 * ends. */
static void extend_at_home(const bapq_run *run, bapq_chunk_view *view) {
    const bapq_store *store = run->store;
    const bapq_layer *layer = view->layer;
    int32_t planes[2];
    int32_t n = bapq_level_planes(view->level, planes);
    int32_t end = layer->first_chunk + bapq_chunk_count(layer);
    for (int32_t chunk = view->chunk + 1; chunk < end; chunk++) {
        if (run->plan->level[chunk] != view->level ||
            !bapq_plan_holds(store, run->plan, view->level, chunk))
            return;
        for (int32_t p = 0; p < n; p++) {
            const bapq_extent *extent = &store->homes->plane[planes[p]].extent[chunk];
            if (extent[-1].offset + extent[-1].bytes != extent->offset) return;
        }
        view->chunks++;
        view->rows += layer->chunk_rows;
        if (view->first_row + view->rows > layer->stored_rows)
            view->rows = layer->stored_rows - view->first_row;
    }
}

/* The highest level below the chunk's own that the layer has and whose planes the plan holds at
 * home, or -1. Planes alone do not make a level: its scales and bias may be missing in them. An
 * operator that runs at level 32 has not prepared its input for another one. */
static int32_t fallback_level(const bapq_run *run, int32_t chunk) {
    const bapq_layer *layer = &run->store->layer[run->store->layer_of[chunk]];
    int32_t own = run->plan->level[chunk];
    for (int32_t level = own + 1; own != BAPQ_L32 && level < BAPQ_LEVELS; level++)
        if (bapq_has_level(layer, level) && bapq_plan_holds(run->store, run->plan, level, chunk))
            return level;
    return -1;
}

static int32_t take_failure(bapq_run *run, int32_t layer, int32_t i, bapq_chunk_view *view,
                            const bapq_error *failure, bapq_error *error) {
    int32_t level = fallback_level(run, view->chunk);
    if (level < 0) {
        *error = *failure;
        return error->status;
    }
    if (run->degraded++ == 0) run->degraded_by = *failure;
    describe(run, layer, i, level, view);
    point_home(run->store, view);
    return BAPQ_OK;
}

/* One look at the ring, as its leader. False: the caller must wait and look again. */
static bool take_from_ring(bapq_run *run, int32_t layer, int32_t i, bapq_chunk_view *view,
                           int32_t *status, bapq_error *error) {
    bapq_store *store = run->store;
    stream *s = &store->stream;
    int32_t at = 0;
    while (at < s->count && entry_at(s, at)->chunk != view->chunk) at++;
    if (s->plan != run->plan || at == s->count) {
        /* What the reader reads right now may be this chunk on its way home: look again after it.
         */
        if (!s->busy) serve(store, run->plan, store->position_of[view->chunk]);
        return false;
    }
    for (; at > 0; at--)
        pop_entry(s); /* operators that this run skips, such as a branch not taken */
    ring_entry *e = entry_at(s, 0);
    if (e->state == ENTRY_READING) return false;
    if (e->state == ENTRY_FAILED && e->read_for != run->ticket) {
        /* The fault may have gone since: what was read ahead for nobody, or for another run, is
         * read again before this run fails. */
        if (!s->busy) serve(store, run->plan, store->position_of[view->chunk]);
        return false;
    }
    if (e->state == ENTRY_FAILED) {
        bapq_error failure = e->error;
        pop_entry(s);
        *status = take_failure(run, layer, i, view, &failure, error);
        return true;
    }
    int32_t planes[2];
    int32_t n = bapq_level_planes(view->level, planes);
    point_home(store, view);
    for (int32_t p = 0; p < n; p++)
        if (e->at[p] >= 0) view->records[p] = s->ring + e->at[p];
    view->borrowed = BAPQ_FROM_RING;
    return true;
}

/* Remembers the order in which the run asks for layers. */
static void note_order(bapq_run *run, int32_t layer) {
    bapq_store *store = run->store;
    if (run->asked == NULL) return;
    for (int32_t i = run->asked_layers - 1; i >= 0; i--)
        if (run->asked[i] == layer) return;
    if (run->asked_layers < store->layer_count) run->asked[run->asked_layers++] = layer;
}

int32_t bapq_run_acquire(bapq_run *run, int32_t layer, int32_t i, bapq_chunk_view *view,
                         bapq_error *error) {
    bapq_store *store = run->store;
    stream *s = &store->stream;
    int32_t chunk = store->layer[layer].first_chunk + i;
    int32_t level = run->plan->level[chunk];
    int32_t status = BAPQ_OK;
    int64_t waited_since = 0;
    if (store->layer[layer].read_by_row)
        return bapq_fail(error, BAPQ_ARGUMENT, "only Gather reads this layer's weights");
    describe(run, layer, i, level, view);
    int64_t asked = bapq_now_ns();
    pthread_mutex_lock(&store->homes->lock);
    if (i == 0) note_order(run, layer);
    /* What comes before a run's first layer, the reader has too. */
    store->layer_ns[run->layer < 0 ? layer : run->layer] += asked - run->since_ns;
    run->layer = layer;
    run->since_ns = asked;
    for (;;) {
        if (bapq_plan_holds(store, run->plan, level, chunk)) {
            point_home(store, view);
            extend_at_home(run, view);
            break;
        }
        if (s->leader == NULL) s->leader = run;
        if (s->leader == run && take_from_ring(run, layer, i, view, &status, error)) break;
        if (waited_since == 0) waited_since = bapq_now_ns();
        pthread_cond_wait(&store->homes->changed, &store->homes->lock);
    }
    if (waited_since != 0) {
        int64_t waited = bapq_now_ns() - waited_since;
        store->wait_ns += waited;
        run->since_ns = waited_since + waited;
        bapq_trace_end(store, (bapq_trace_event){BAPQ_TRACE_WAIT, chunk, -1, status,
                                                 .start_ns = waited_since});
    }
    pthread_mutex_unlock(&store->homes->lock);
    return status;
}

void bapq_run_release(bapq_run *run, const bapq_chunk_view *view) {
    if (view->borrowed != BAPQ_FROM_RING) return;
    pthread_mutex_lock(&run->store->homes->lock);
    pop_entry(&run->store->stream);
    pthread_mutex_unlock(&run->store->homes->lock);
    pthread_cond_broadcast(&run->store->homes->changed);
}

/* ---- rows ---- */

int32_t bapq_run_acquire_rows(bapq_run *run, int32_t layer, int32_t i, bapq_chunk_view *view,
                              bapq_error *error) {
    bapq_store *store = run->store;
    row_cache *rows = &store->rows;
    int32_t chunk = store->layer[layer].first_chunk + i;
    int32_t level = run->plan->level[chunk];
    if (!store->layer[layer].gathered)
        return bapq_fail(error, BAPQ_ARGUMENT, "Gather does not read this layer's weights");
    describe(run, layer, i, level, view);
    if (run->plan->claimed[chunk]) { /* a table that a product reads too, and that is at home */
        pthread_mutex_lock(&store->homes->lock);
        bool home = bapq_plan_holds(store, run->plan, level, chunk);
        pthread_mutex_unlock(&store->homes->lock);
        if (home) {
            point_home(store, view);
            return BAPQ_OK;
        }
    }
    int32_t planes[2];
    int32_t n = bapq_level_planes(level, planes);
    int32_t slot = chunk % rows->slots;
    int64_t key = (int64_t)chunk * 8 + level, used = 0;
    uint8_t *data = rows->data + slot * rows->slot_bytes;
    pthread_mutex_lock(&rows->lock);
    bool cached = rows->key[slot] == key;
    bool fresh = !cached && rows->key[slot] == ROW_NEVER;
    if (!cached) rows->key[slot] = ROW_NONE;
    for (int32_t p = 0; p < n; p++) {
        int64_t bytes = store->homes->plane[planes[p]].extent[chunk].bytes;
        view->records[p] = data + used;
        view->record_bytes[p] = bapq_record_bytes(view->layer, planes[p]);
        if (!cached) {
            bapq_trace_event event = {BAPQ_TRACE_ROWS, chunk, planes[p],
                                      .start_ns = bapq_trace_start(store)};
            int32_t status =
                bapq_read_chunk(store, planes[p], chunk, data + used, rows->bounce, error);
            event.status = status;
            event.bytes = status == BAPQ_OK ? bytes : 0;
            pthread_mutex_lock(&store->homes->lock);
            store->read_bytes += event.bytes;
            bapq_trace_end(store, event);
            pthread_mutex_unlock(&store->homes->lock);
            if (status != BAPQ_OK) {
                pthread_mutex_unlock(&rows->lock);
                return status;
            }
        }
        used += (bytes + 63) / 64 * 64;
    }
    if (!cached) {
        rows->key[slot] = key;
        pthread_mutex_lock(&store->homes->lock);
        rows->slots_used += fresh;
        pthread_mutex_unlock(&store->homes->lock);
    }
    view->borrowed = BAPQ_FROM_ROWS;
    return BAPQ_OK;
}

void bapq_run_release_rows(bapq_run *run, const bapq_chunk_view *view) {
    if (view->borrowed == BAPQ_FROM_ROWS) pthread_mutex_unlock(&run->store->rows.lock);
}
