/* Eviction policies played over a trace: what share of the touches finds its block in memory?
 *
 * Ours is uffd/_policy.h itself, used as the engine uses it; beside it FIFO, LRU, S3-FIFO with real access bits, and
 * Belady, which knows the future (farthest next use: the optimum where all blocks have one size). All count bytes. An
 * entry of a trace is a block's number; with SIM_AHEAD set it is a fill that nobody waits for, and no touch.
 */
#include <errno.h>
#include <stdlib.h>

#include "_policy.h"

#define SIM_AHEAD 0x80000000u

struct sim_trace {
    const uint32_t *touches;
    uint64_t count, warm;  /* the first `warm` entries are played, but not counted */
    const uint8_t *shifts; /* log2 of the bytes, for each block */
    uint32_t blocks;
    uint32_t late;         /* ours: so many events wait until the evictor looks; 1 or more */
    uint32_t capacity;     /* ours: nodes; 0: as many as there are blocks */
    uint64_t budget_bytes;
};

struct sim_result {
    uint64_t touches, misses;        /* misses: touches that waited for a fill */
    uint64_t fills;                  /* those, and the ones ahead of need */
    uint64_t rescues;                /* hits that were brought back from the pool */
    uint64_t moves;                  /* blocks moved out of the region into the pool */
    uint64_t peak_bytes;
    uint64_t nodes;                  /* most nodes in use */
    int32_t broken;                  /* 0, or what policy_check answered */
};

static inline uint64_t bytes_of(const struct sim_trace *t, uint32_t block)
{
    return UINT64_C(1) << t->shifts[block];
}

/* Counts entry i; is it a touch that counts? */
static inline int touched(const struct sim_trace *t, uint64_t i, struct sim_result *r)
{
    const int counts = i >= t->warm && !(t->touches[i] & SIM_AHEAD);
    r->touches += (uint64_t)counts;
    return counts;
}

static inline void filled(const struct sim_trace *t, uint64_t i, struct sim_result *r)
{
    r->fills += i >= t->warm;
    r->misses += i >= t->warm && !(t->touches[i] & SIM_AHEAD);
}

static uint64_t low_watermark(const struct sim_trace *t)
{
    uint32_t block, largest = 0;
    uint64_t room_bytes;
    for (block = 0; block < t->blocks; block++)
        largest = t->shifts[block] > largest ? t->shifts[block] : largest;
    room_bytes = (uint64_t)(t->late - 1) << largest;
    return room_bytes < t->budget_bytes / 2 ? t->budget_bytes - room_bytes : t->budget_bytes / 2;
}

/* ---- ours ------------------------------------------------------------------------------------------------------- */

enum { ABSENT, RESIDENT, POOLED };

struct event {
    uint32_t block;
    uint8_t rescued, ahead;
};

struct ours {
    const struct sim_trace *trace;
    struct policy policy;
    uint32_t *known; /* what each block remembers: its node */
    uint8_t *state;
    struct event *events;
    uint32_t waiting;
    uint64_t held_bytes, low_bytes; /* room for events that wait is made before they come */
    int counts;
    struct sim_result *result;
};

static void drain(struct ours *s)
{
    uint32_t i;
    for (i = 0; i < s->waiting; i++) {
        const struct event *e = &s->events[i];
        if (e->rescued)
            policy_rescued(&s->policy, s->known[e->block]);
        else
            s->known[e->block] = policy_filled(&s->policy, s->known[e->block], (uint64_t)e->block + 1,
                                               s->trace->shifts[e->block], e->ahead);
    }
    s->waiting = 0;
}

static uint32_t block_of(const struct ours *s, uint32_t node)
{
    return (uint32_t)(policy_ref(&s->policy, node) - 1);
}

/* As the engine does: from the pool while that is full, else from the region into the pool. 0: nothing is left. */
static int free_some(struct ours *s)
{
    struct policy *p = &s->policy;
    uint32_t node = policy_pool_full(p) ? 0 : policy_victim(p);
    if (node) {
        s->state[block_of(s, node)] = POOLED;
        s->result->moves += (uint64_t)s->counts;
        policy_pooled(p, node);
        return 1;
    }
    node = policy_drop(p);
    if (node) {
        const uint32_t block = block_of(s, node);
        s->state[block] = ABSENT;
        s->held_bytes -= bytes_of(s->trace, block);
        s->known[block] = policy_gone(p, node);
    }
    return node != 0;
}

static void evict(struct ours *s)
{
    const struct policy *p = &s->policy;
    uint64_t nodes;
    drain(s);
    nodes = (uint64_t)p->used - 1 - p->lists[POLICY_FREE].blocks;
    s->result->nodes = nodes > s->result->nodes ? nodes : s->result->nodes;
    while (s->held_bytes > s->low_bytes && free_some(s))
        ;
}

static void play_ours(struct ours *s)
{
    const struct sim_trace *t = s->trace;
    uint64_t i;
    for (i = 0; i < t->count; i++) {
        const uint32_t block = t->touches[i] & ~SIM_AHEAD;
        const int ahead = (t->touches[i] & SIM_AHEAD) != 0;
        s->counts = touched(t, i, s->result);
        if (s->state[block] == RESIDENT || (ahead && s->state[block] == POOLED))
            continue;
        s->events[s->waiting++] = (struct event){block, s->state[block] == POOLED, (uint8_t)ahead};
        if (s->state[block] == POOLED) {
            s->result->rescues += (uint64_t)s->counts;
        } else {
            filled(t, i, s->result);
            s->held_bytes += bytes_of(t, block);
            s->result->peak_bytes = s->held_bytes > s->result->peak_bytes ? s->held_bytes : s->result->peak_bytes;
        }
        s->state[block] = RESIDENT;
        if (s->waiting == t->late)
            evict(s);
    }
    evict(s);
}

int sim_ours(const struct sim_trace *t, struct sim_result *r)
{
    const uint32_t capacity = t->capacity ? t->capacity : t->blocks + 1;
    struct policy_node *nodes = calloc(capacity, sizeof *nodes);
    struct ours s = {.trace = t, .result = r};
    s.known = calloc(t->blocks, sizeof *s.known);
    s.state = calloc(t->blocks, 1);
    s.events = calloc(t->late, sizeof *s.events);
    s.low_bytes = low_watermark(t);
    memset(r, 0, sizeof *r);
    if (nodes && s.known && s.state && s.events) {
        policy_init(&s.policy, nodes, capacity);
        policy_limit(&s.policy, t->budget_bytes);
        play_ours(&s);
        r->broken = policy_check(&s.policy);
    } else {
        r->broken = -ENOMEM;
    }
    free(nodes);
    free(s.known);
    free(s.state);
    free(s.events);
    return r->broken;
}

/* ---- FIFO, LRU, S3-FIFO as published: circular lists over the blocks, with a head for each queue ----------------- */

enum { OUT, FIRST, SECOND, GONE, HEADS };

struct lists {
    const struct sim_trace *trace;
    uint32_t *next, *prev; /* [blocks + HEADS]; the head of queue q is blocks + q; next: older */
    uint8_t *queue, *bits;
    uint64_t nbytes[HEADS];
};

static void unlink_block(struct lists *l, uint32_t block)
{
    l->next[l->prev[block]] = l->next[block];
    l->prev[l->next[block]] = l->prev[block];
    l->nbytes[l->queue[block]] -= bytes_of(l->trace, block);
    l->queue[block] = OUT;
}

static void link_newest(struct lists *l, uint32_t block, uint8_t queue)
{
    const uint32_t head = l->trace->blocks + queue;
    if (l->queue[block] != OUT)
        unlink_block(l, block);
    l->next[block] = l->next[head];
    l->prev[block] = head;
    l->prev[l->next[head]] = block;
    l->next[head] = block;
    l->queue[block] = queue;
    l->nbytes[queue] += bytes_of(l->trace, block);
}

static uint32_t oldest(const struct lists *l, uint8_t queue)
{
    return l->prev[l->trace->blocks + queue];
}

static int lists_make(struct lists *l, const struct sim_trace *t)
{
    uint32_t head;
    memset(l, 0, sizeof *l);
    l->trace = t;
    l->next = calloc(t->blocks + HEADS, sizeof *l->next);
    l->prev = calloc(t->blocks + HEADS, sizeof *l->prev);
    l->queue = calloc(t->blocks + HEADS, 1);
    l->bits = calloc(t->blocks, 1);
    if (!l->next || !l->prev || !l->queue || !l->bits)
        return -ENOMEM;
    for (head = t->blocks; head < t->blocks + HEADS; head++)
        l->next[head] = l->prev[head] = head;
    return 0;
}

static void lists_free(struct lists *l)
{
    free(l->next);
    free(l->prev);
    free(l->queue);
    free(l->bits);
}

static void play_simple(struct lists *l, struct sim_result *r, int lru)
{
    const struct sim_trace *t = l->trace;
    uint64_t i;
    for (i = 0; i < t->count; i++) {
        const uint32_t block = t->touches[i] & ~SIM_AHEAD;
        touched(t, i, r);
        if (l->queue[block] == OUT)
            filled(t, i, r);
        else if (!lru || (t->touches[i] & SIM_AHEAD))
            continue;
        link_newest(l, block, FIRST);
        while (l->nbytes[FIRST] > t->budget_bytes)
            unlink_block(l, oldest(l, FIRST));
    }
}

/* Yang et al., algorithm 1: S a tenth, M the rest, as many ghosts as M holds bytes; two bits, more than one to get into
 * M. */
static void s3_evict(struct lists *l, uint64_t budget_bytes)
{
    const uint64_t small_bytes = budget_bytes / 10;
    while (l->nbytes[FIRST] + l->nbytes[SECOND] > budget_bytes) {
        const int small = l->nbytes[FIRST] >= small_bytes || !l->nbytes[SECOND];
        const uint32_t block = oldest(l, small ? FIRST : SECOND);
        if (small && l->bits[block] > 1) {
            l->bits[block] = 0;
            link_newest(l, block, SECOND);
        } else if (small) {
            link_newest(l, block, GONE);
        } else if (l->bits[block]) {
            l->bits[block]--;
            link_newest(l, block, SECOND);
        } else {
            unlink_block(l, block);
        }
        while (l->nbytes[GONE] > budget_bytes - small_bytes)
            unlink_block(l, oldest(l, GONE));
    }
}

static void play_s3(struct lists *l, struct sim_result *r)
{
    const struct sim_trace *t = l->trace;
    uint64_t i;
    for (i = 0; i < t->count; i++) {
        const uint32_t block = t->touches[i] & ~SIM_AHEAD;
        const int ahead = (t->touches[i] & SIM_AHEAD) != 0;
        touched(t, i, r);
        if (l->queue[block] == FIRST || l->queue[block] == SECOND) {
            l->bits[block] += (uint8_t)(!ahead && l->bits[block] < 3);
            continue;
        }
        filled(t, i, r);
        l->bits[block] = 0;
        link_newest(l, block, l->queue[block] == GONE && !ahead ? SECOND : FIRST);
        s3_evict(l, t->budget_bytes);
    }
}

static int sim_lists(const struct sim_trace *t, struct sim_result *r, int policy)
{
    struct lists l;
    const int rc = lists_make(&l, t);
    memset(r, 0, sizeof *r);
    if (!rc && policy < 2)
        play_simple(&l, r, policy);
    else if (!rc)
        play_s3(&l, r);
    lists_free(&l);
    return rc;
}

int sim_fifo(const struct sim_trace *t, struct sim_result *r) { return sim_lists(t, r, 0); }
int sim_lru(const struct sim_trace *t, struct sim_result *r) { return sim_lists(t, r, 1); }
int sim_s3fifo(const struct sim_trace *t, struct sim_result *r) { return sim_lists(t, r, 2); }

/* ---- Belady: a heap of (next use, block), with entries that are no longer true left in it until they come up ----- */

struct use {
    uint64_t next;
    uint32_t block;
};

static void heap_push(struct use *heap, uint64_t at, struct use use)
{
    for (; at && heap[(at - 1) / 2].next < use.next; at = (at - 1) / 2)
        heap[at] = heap[(at - 1) / 2];
    heap[at] = use;
}

static struct use heap_pop(struct use *heap, uint64_t count)
{
    const struct use top = heap[0], last = heap[count - 1];
    uint64_t at = 0, child;
    for (; (child = 2 * at + 1) < count - 1; at = child) {
        child += child + 1 < count - 1 && heap[child + 1].next > heap[child].next;
        if (heap[child].next <= last.next)
            break;
        heap[at] = heap[child];
    }
    heap[at] = last;
    return top;
}

static void play_belady(const struct sim_trace *t, struct sim_result *r, const uint64_t *next, struct use *heap,
                        uint64_t *present)
{
    uint64_t i, entries = 0, held_bytes = 0;
    for (i = 0; i < t->count; i++) {
        const uint32_t block = t->touches[i] & ~SIM_AHEAD;
        touched(t, i, r);
        if (!present[block]) {
            filled(t, i, r);
            held_bytes += bytes_of(t, block);
        }
        present[block] = next[i];
        heap_push(heap, entries++, (struct use){next[i], block});
        while (held_bytes > t->budget_bytes) {
            const struct use far = heap_pop(heap, entries--);
            if (present[far.block] != far.next)
                continue;
            present[far.block] = 0;
            held_bytes -= bytes_of(t, far.block);
        }
    }
}

int sim_belady(const struct sim_trace *t, struct sim_result *r)
{
    uint64_t *next = calloc(t->count, sizeof *next), *present = calloc(t->blocks, sizeof *present), i;
    struct use *heap = calloc(t->count + 1, sizeof *heap);
    const int rc = next && present && heap ? 0 : -ENOMEM;
    memset(r, 0, sizeof *r);
    if (!rc) {
        for (i = t->count; i-- > 0;) {
            const uint32_t block = t->touches[i] & ~SIM_AHEAD;
            next[i] = present[block] ? present[block] : UINT64_MAX; /* entry 0 is nobody's next use */
            present[block] = i;
        }
        memset(present, 0, t->blocks * sizeof *present);
        play_belady(t, r, next, heap, present);
    }
    free(next);
    free(present);
    free(heap);
    return rc;
}
