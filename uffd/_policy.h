/* Which block leaves memory: S3-FIFO without access bits.
 *
 *   fill, not remembered --> SMALL --.                   .-- untouched --> GHOST (a node, no memory); a block of MAIN
 *                                    |--> POOL, oldest --|                 only if it was touched in the pool before
 *   fill, remembered ------> MAIN ---'     |             '-- untouched, else --> forgotten
 *                             ^            |
 *                             '- touched --'
 *
 * S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi: FIFO Queues are All You Need for Cache Eviction, SOSP 2023) has a small FIFO
 * through which new blocks must pass, a main one, and one of ghosts, blocks that left lately: who comes back while its
 * ghost is there goes to MAIN at once. A scan passes through SMALL and leaves MAIN alone. It asks of a block at the end
 * of its queue whether it was accessed. User space has no such bit. Its place is taken by a pool of blocks that were
 * moved out of their region and are still in memory: a touch is a fault that brings the block back within microseconds
 * (the second-chance list of Turner and Levy: Segmented FIFO Page Replacement, SIGMETRICS 1981; VMS).
 *
 * What differs from the paper, and what it is worth. Misses in % of touches at 1, 10 and 25 % of the data in memory, by
 * benchmarks/policy_sim.py (20,000 blocks, 1,000,000 touches, seed 4), which compiles this file:
 *                                   zipf 0.7        zipf 0.9        zipf 1.2        scan + loop     phases
 *   as it is                        84.6 62.5 46.4  63.7 39.6 27.3  25.8 10.9  6.5  77.6 48.2 40.0  87.5 43.7 10.9
 *   LRU                             90.7 66.4 47.3  71.1 42.8 27.8  29.4 11.8  6.6  86.2 61.2 52.7  90.3 47.9 10.2
 *   S3-FIFO with access bits        80.4 56.9 41.4  59.1 35.1 23.6  22.9  9.4  5.5  73.7 50.2 50.2  86.0 42.6 10.3
 *   LAPS 0                          84.7 63.0 47.4  64.0 40.2 28.2  26.1 11.2  6.8  77.8 48.2 40.0  87.6 43.9 10.8
 *   no ghosts for MAIN, LAPS 0      84.8 63.3 47.8  64.1 40.5 28.5  26.3 11.4  7.0  77.8 48.2 40.0  87.6 43.9 10.9
 *   POOL 5                          84.5 62.6 47.1  63.6 39.9 27.9  25.8 11.1  6.7  77.3 47.8 39.1  87.4 43.9 11.0
 *   POOL 20                         85.0 62.5 45.9  64.2 39.6 26.9  26.0 10.9  6.4  78.3 48.9 41.6  87.7 44.0 10.6
 *   SMALL 20                        85.2 63.1 47.0  64.5 40.3 27.8  26.4 11.3  6.7  78.5 48.9 41.6  87.8 44.1 10.8
 *   GHOST 50                        84.4 61.7 45.3  63.3 38.9 26.5  25.3 10.6  6.2  77.4 48.2 40.0  87.3 73.2 10.9
 * - The pool is a tenth of the budget: of the hits 1.6 % are rescues then, at most 5 % (zipf 0.7, 25 %). A pool of a
 *   twentieth halves that and gives up half a point where much is in memory; a fifth doubles it.
 * - Fewer ghosts win a point on Zipf and lose 30 where a program turns to a loop that just fits memory (phases, 10 %):
 *   what it comes back to must still be remembered after a lap, so SMALL + POOL + GHOST must exceed the budget.
 * - Ghosts of all that leaves MAIN would win another point on Zipf, but a loop a fifth larger than memory then misses
 *   92 % instead of 40. So a block of MAIN leaves a ghost only if it was seen touched in the pool.
 * - A block that was seen touched passes MAIN's end untested twice (LAPS), as with the paper's two bits. That saves
 *   rescues.
 * - Until memory is full for the first time, what SMALL has no room for goes to MAIN, as in the authors' own simulator.
 * - A fill ahead of need is a guess, and sends a block to MAIN only the second time that its ghost is there. If it
 *   never did, laps over an array that fits would fill it again and again (phases, 25 %: 37 fills per 100 touches, now
 *   7); if the first time did, guesses in vain would cost 3 points.
 * - SMALL keeps 16 blocks, up to half the budget: else, below some 160 blocks, what was read ahead leaves before its
 *   touch comes (phases with read-ahead, 32 blocks: 86 % misses, now 29).
 * Larger read-ahead or prefetch than SMALL and the pool hold, a fifth of the budget, pushes itself out.
 *
 * Sizes: limits are in bytes, blocks of any power of two may be mixed. `ref` is the caller's name of a block, not 0.
 * Order: events may be told late and twice, but a rescue that is told after its block was moved out once more takes the
 * block for resident; the caller then finds a victim that is not, and tells policy_pooled (or _gone) of it.
 *
 * Memory model: none. The caller holds one lock round every call. No allocation, no syscall; all but policy_check and
 * policy_limit take constant time (the ghosts that are freed are no more than were made).
 *
 * Uses: nothing. Provides: struct policy, struct policy_node, policy_*.
 */
#ifndef UFFD_POLICY_H
#define UFFD_POLICY_H

#include <stdint.h>
#include <string.h>

/* Shares of the budget. The simulator compiles this file with other numbers, hence the guards. */
#ifndef POLICY_SMALL_PERCENT
#define POLICY_SMALL_PERCENT 10
#endif
#ifndef POLICY_POOL_PERCENT
#define POLICY_POOL_PERCENT 10
#endif
#ifndef POLICY_GHOST_PERCENT
#define POLICY_GHOST_PERCENT 90
#endif
/* Laps of MAIN that a block passes untested after it was found touched. At most 3. */
#ifndef POLICY_LAPS
#define POLICY_LAPS 2
#endif
/* SMALL keeps so many blocks, however small the budget. */
#ifndef POLICY_SMALL_BLOCKS
#define POLICY_SMALL_BLOCKS 16
#endif

enum { POLICY_SKIPS = 64 }; /* blocks that one policy_victim passes by, at most: a bound on its time */

enum policy_queue { POLICY_FREE, POLICY_SMALL, POLICY_MAIN, POLICY_POOL, POLICY_HAND, POLICY_GHOST, POLICY_QUEUES };

/* 20 bytes: the reference is cut in two so that it asks for no padding. */
struct policy_node {
    uint32_t ref_low, ref_high;
    uint32_t newer, older; /* neighbours in its queue, 0 at the ends; of a free node, older is the next free one */
    uint32_t queue : 3;    /* enum policy_queue */
    uint32_t from : 3;     /* POLICY_SMALL or POLICY_MAIN: where it is resident, or last was */
    uint32_t shift : 6;    /* log2 of its bytes */
    uint32_t laps : 2;     /* MAIN: times that it passes the end untested */
    uint32_t hot : 1;      /* it was touched in the pool since it came into memory */
    uint32_t ahead : 1;    /* it was filled ahead of need while its ghost was there, and not seen touched since */
};

struct policy_list {
    uint32_t newest, oldest, blocks;
    uint64_t nbytes;
};

struct policy {
    struct policy_node *nodes; /* [capacity]; node 0 is none; zero memory, touched as it is used */
    uint32_t capacity;
    uint32_t used;             /* nodes 1 .. used - 1 were handed out at least once */
    uint32_t free;             /* a list of those that came back */
    uint32_t backs;            /* policy_back since the last victim that did move out */
    int evicting;              /* memory was full, and has not become mostly empty since */
    uint64_t resident_bytes, pool_bytes, hand_bytes; /* copies of what the lists count: SMALL + MAIN, POOL, HAND */
    uint64_t budget_bytes, small_limit_bytes, pool_limit_bytes, ghost_limit_bytes;
    struct policy_list lists[POLICY_QUEUES]; /* HAND counts only */
};

/* ---- lists ------------------------------------------------------------------------------------------------------ */

static inline uint64_t policy_ref(const struct policy *p, uint32_t node)
{
    return node && node < p->used ? (uint64_t)p->nodes[node].ref_high << 32 | p->nodes[node].ref_low : 0;
}

/* An index that never was a node is in POLICY_FREE. */
static inline uint32_t policy_queue(const struct policy *p, uint32_t node)
{
    return node && node < p->used ? p->nodes[node].queue : POLICY_FREE;
}

static inline uint32_t policy_shift(const struct policy *p, uint32_t node)
{
    return node && node < p->used ? p->nodes[node].shift : 0;
}

static inline void policy_count(struct policy *p)
{
    p->resident_bytes = p->lists[POLICY_SMALL].nbytes + p->lists[POLICY_MAIN].nbytes;
    p->pool_bytes = p->lists[POLICY_POOL].nbytes;
    p->hand_bytes = p->lists[POLICY_HAND].nbytes;
}

/* Into a queue, as its newest. */
static inline void policy_push(struct policy *p, uint32_t node, enum policy_queue queue)
{
    struct policy_node *n = &p->nodes[node];
    struct policy_list *list = &p->lists[queue];
    n->queue = queue;
    n->newer = n->older = 0;
    if (queue == POLICY_SMALL || queue == POLICY_MAIN)
        n->from = queue;
    list->blocks++;
    list->nbytes += UINT64_C(1) << n->shift;
    if (queue != POLICY_HAND) {
        n->older = list->newest;
        if (list->newest)
            p->nodes[list->newest].newer = node;
        else
            list->oldest = node;
        list->newest = node;
    }
    policy_count(p);
}

/* Out of whatever queue it is in. The node is nowhere then, and must be pushed or freed. */
static inline void policy_pull(struct policy *p, uint32_t node)
{
    struct policy_node *n = &p->nodes[node];
    struct policy_list *list = &p->lists[n->queue];
    list->blocks--;
    list->nbytes -= UINT64_C(1) << n->shift;
    if (n->queue != POLICY_HAND) {
        if (n->newer)
            p->nodes[n->newer].older = n->older;
        else
            list->newest = n->older;
        if (n->older)
            p->nodes[n->older].newer = n->newer;
        else
            list->oldest = n->newer;
    }
    policy_count(p);
}

static inline void policy_move(struct policy *p, uint32_t node, enum policy_queue queue)
{
    policy_pull(p, node);
    policy_push(p, node, queue);
}

static inline void policy_free(struct policy *p, uint32_t node)
{
    policy_pull(p, node);
    memset(&p->nodes[node], 0, sizeof p->nodes[node]);
    p->nodes[node].older = p->free;
    p->free = node;
    p->lists[POLICY_FREE].blocks++;
}

static inline void policy_trim_ghosts(struct policy *p)
{
    struct policy_list *ghosts = &p->lists[POLICY_GHOST];
    while (ghosts->nbytes > p->ghost_limit_bytes)
        policy_free(p, ghosts->oldest);
}

/* A node that is in no queue, its flags zero; 0: all are in use for blocks in memory. */
static inline uint32_t policy_take(struct policy *p)
{
    uint32_t node;
    if (!p->free && p->used >= p->capacity && p->lists[POLICY_GHOST].oldest)
        policy_free(p, p->lists[POLICY_GHOST].oldest);
    if (p->free) {
        node = p->free;
        p->free = p->nodes[node].older;
        p->lists[POLICY_FREE].blocks--;
        return node;
    }
    return p->used < p->capacity ? p->used++ : 0;
}

/* ---- life ------------------------------------------------------------------------------------------------------- */

static inline uint64_t policy_share(uint64_t nbytes, uint64_t percent)
{
    return nbytes == UINT64_MAX ? nbytes : nbytes / 100 * percent + nbytes % 100 * percent / 100;
}

/* The most that may be in memory, pool and hand included; UINT64_MAX: no limit. Moves nothing out: the caller does. */
static inline void policy_limit(struct policy *p, uint64_t budget_bytes)
{
    p->budget_bytes = budget_bytes;
    p->small_limit_bytes = policy_share(budget_bytes, POLICY_SMALL_PERCENT);
    p->pool_limit_bytes = policy_share(budget_bytes, POLICY_POOL_PERCENT);
    p->ghost_limit_bytes = policy_share(budget_bytes, POLICY_GHOST_PERCENT);
    policy_trim_ghosts(p);
}

/* nodes: zero memory for `capacity` of them, node 0 included, the caller's to free. No limit yet. */
static inline void policy_init(struct policy *p, struct policy_node *nodes, uint32_t capacity)
{
    memset(p, 0, sizeof *p);
    p->nodes = nodes;
    p->capacity = capacity;
    p->used = 1;
    policy_limit(p, UINT64_MAX);
}

/* ---- what the fault threads report ------------------------------------------------------------------------------ */

/* Touched while it waited in the pool, or while it was in hand: it is resident again. Late and double reports, and
 * those of blocks that meanwhile left memory, change nothing. */
static inline void policy_rescued(struct policy *p, uint32_t node)
{
    const uint32_t queue = policy_queue(p, node);
    if (queue != POLICY_POOL && queue != POLICY_HAND)
        return;
    p->nodes[node].laps = POLICY_LAPS;
    p->nodes[node].hot = 1;
    p->nodes[node].ahead = 0;
    policy_move(p, node, POLICY_MAIN);
}

/* Until memory is full for the first time, what does not fit SMALL goes to MAIN, which else would start empty: a loop
 * larger than the budget then has a part that stays. Below three quarters (regions closed, a raised limit) again. */
static inline int policy_has_room(struct policy *p)
{
    const uint64_t held_bytes = p->resident_bytes + p->pool_bytes + p->hand_bytes;
    if (held_bytes < p->budget_bytes / 4 * 3)
        p->evicting = 0;
    return !p->evicting && p->lists[POLICY_SMALL].nbytes >= p->small_limit_bytes;
}

/* Does its ghost send this block to MAIN? A fill ahead of need is a guess: it takes two in a row, since a scan that
 * comes again and again is seen by nothing else, while a guess in vain should not hold memory for a lap of MAIN. */
static inline int policy_remembered(struct policy_node *ghost, int ahead)
{
    const int proven = !ahead || ghost->ahead;
    ghost->ahead = ahead != 0;
    return proven;
}

/* The block `ref` of 1 << shift bytes has become resident. `node` is what the block remembers: 0, its ghost, or an
 * index that is another block's by now. `ahead`: nobody asked for it yet. The block's node, to be remembered; 0: there
 * is none, and the block must leave memory by other means than this. */
static inline uint32_t policy_filled(struct policy *p, uint32_t node, uint64_t ref, uint32_t shift, int ahead)
{
    const uint32_t queue = policy_queue(p, node);
    int to_main = 0;
    if (queue != POLICY_FREE && policy_ref(p, node) == ref) {
        if (queue != POLICY_GHOST) {
            policy_rescued(p, node); /* it was filled before its end was told; or it is told twice */
            return node;
        }
        to_main = policy_remembered(&p->nodes[node], ahead);
        policy_pull(p, node);
    } else {
        node = policy_take(p);
        if (!node)
            return 0;
    }
    p->nodes[node].ref_low = (uint32_t)ref;
    p->nodes[node].ref_high = (uint32_t)(ref >> 32);
    p->nodes[node].shift = shift & 63;
    policy_push(p, node, policy_has_room(p) || to_main ? POLICY_MAIN : POLICY_SMALL);
    return node;
}

/* Resident, and asked for by name in such numbers that SMALL would lose the first before the last has come: to MAIN. */
static inline void policy_keep(struct policy *p, uint32_t node)
{
    if (policy_queue(p, node) == POLICY_SMALL)
        policy_move(p, node, POLICY_MAIN);
}

/* ---- what the evictor asks and tells ---------------------------------------------------------------------------- */

/* SMALL's end while SMALL has more than its share, else MAIN's. Blocks that are given back again and again (pinned)
 * must not hide the others: once one came back, the queues take turns, also within a batch, all of which is in hand
 * before any of it comes back (batches of an even number left SMALL out for ever). */
static inline uint32_t policy_next(const struct policy *p)
{
    const struct policy_list *small = &p->lists[POLICY_SMALL], *main = &p->lists[POLICY_MAIN];
    int from_small = small->nbytes > p->small_limit_bytes &&
                     (small->blocks > POLICY_SMALL_BLOCKS || small->nbytes > p->budget_bytes / 2);
    if (p->backs && (p->backs + p->lists[POLICY_HAND].blocks) & 1)
        from_small = !from_small;
    return (from_small && small->oldest) || !main->oldest ? small->oldest : main->oldest;
}

/* The next resident block to move out: in hand now, to be given to policy_pooled, _back, _rescued, _gone or _forget.
 * 0: there is none. If all are given back, each is offered within 8 calls per block. */
static inline uint32_t policy_victim(struct policy *p)
{
    uint32_t node = policy_next(p), skips;
    p->evicting = 1;
    for (skips = 0; skips < POLICY_SKIPS && node && p->nodes[node].laps; skips++) { /* laps: only in MAIN */
        p->nodes[node].laps--;
        policy_move(p, node, POLICY_MAIN);
        node = policy_next(p);
    }
    if (node)
        policy_move(p, node, POLICY_HAND);
    return node;
}

/* In hand > pool: moved out of the region, still in memory. */
static inline void policy_pooled(struct policy *p, uint32_t node)
{
    if (policy_queue(p, node) != POLICY_HAND)
        return;
    p->backs = 0;
    policy_move(p, node, POLICY_POOL);
}

/* In hand > resident, where it was: it is pinned, or busy. */
static inline void policy_back(struct policy *p, uint32_t node)
{
    if (policy_queue(p, node) != POLICY_HAND)
        return;
    p->backs++;
    policy_move(p, node, p->nodes[node].from == POLICY_SMALL ? POLICY_SMALL : POLICY_MAIN);
}

/* The oldest block of the pool: in hand now, to be given to policy_redrop, _gone, _rescued or _forget. 0: none. */
static inline uint32_t policy_drop(struct policy *p)
{
    const uint32_t node = p->lists[POLICY_POOL].oldest;
    if (node)
        policy_move(p, node, POLICY_HAND);
    return node;
}

/* In hand > the pool once more, as its newest: it is dirty, and not written back yet. */
static inline void policy_redrop(struct policy *p, uint32_t node)
{
    if (policy_queue(p, node) == POLICY_HAND)
        policy_move(p, node, POLICY_POOL);
}

/* In hand > out of memory. What the block has to remember: its node while it is a ghost, else 0. */
static inline uint32_t policy_gone(struct policy *p, uint32_t node)
{
    const uint32_t queue = policy_queue(p, node);
    if (queue != POLICY_HAND)
        return queue == POLICY_FREE ? 0 : node; /* filled again, or rescued, before this was told: the node lives on */
    p->backs = 0;
    if (p->nodes[node].from == POLICY_MAIN && !p->nodes[node].hot) {
        policy_free(p, node);
        return 0;
    }
    p->nodes[node].laps = p->nodes[node].hot = 0;
    policy_move(p, node, POLICY_GHOST);
    policy_trim_ghosts(p);
    return policy_queue(p, node) == POLICY_GHOST ? node : 0;
}

/* From any queue, or in hand: its region is closed, or it was discarded. */
static inline void policy_forget(struct policy *p, uint32_t node)
{
    if (policy_queue(p, node) != POLICY_FREE)
        policy_free(p, node);
}

/* Is it time to drop blocks of the pool before more are moved out? Never of an empty pool. */
static inline int policy_pool_full(const struct policy *p)
{
    return p->lists[POLICY_POOL].blocks && p->pool_bytes >= p->pool_limit_bytes;
}

/* ---- for tests -------------------------------------------------------------------------------------------------- */

/* One queue gone through from its newest block; 0, or the line of the rule that does not hold. */
static inline int policy_check_list(const struct policy *p, uint32_t queue)
{
    const struct policy_list *list = &p->lists[queue];
    uint32_t blocks = 0, newer = 0, node;
    uint64_t nbytes = 0;
    for (node = list->newest; node; newer = node, node = p->nodes[node].older) {
        if (node >= p->used || blocks++ == p->used)
            return __LINE__;
        if (p->nodes[node].queue != queue || p->nodes[node].newer != newer)
            return __LINE__;
        nbytes += UINT64_C(1) << p->nodes[node].shift;
    }
    if (list->oldest != newer || list->blocks != blocks || list->nbytes != nbytes)
        return __LINE__;
    return 0;
}

/* 0, or the line of the rule that does not hold. Goes through all nodes. */
static inline int policy_check(const struct policy *p)
{
    uint32_t blocks[POLICY_QUEUES] = {0}, node, free = 0, queue;
    uint64_t hand_bytes = 0;
    if (!p->used || p->used > p->capacity)
        return __LINE__;
    for (node = 1; node < p->used; node++) {
        const struct policy_node *n = &p->nodes[node];
        if (n->queue >= POLICY_QUEUES)
            return __LINE__;
        if (n->queue != POLICY_MAIN && n->queue != POLICY_HAND && n->queue != POLICY_POOL && (n->laps || n->hot))
            return __LINE__;
        if (n->queue != POLICY_FREE && n->from != POLICY_SMALL && n->from != POLICY_MAIN)
            return __LINE__;
        blocks[n->queue]++;
        hand_bytes += n->queue == POLICY_HAND ? UINT64_C(1) << n->shift : 0;
    }
    for (queue = 0; queue < POLICY_QUEUES; queue++) {
        const int line = queue == POLICY_FREE || queue == POLICY_HAND ? 0 : policy_check_list(p, queue);
        if (line)
            return line;
        if (blocks[queue] != p->lists[queue].blocks)
            return __LINE__;
    }
    for (node = p->free; node; node = p->nodes[node].older)
        if (node >= p->used || p->nodes[node].queue != POLICY_FREE || free++ == p->used)
            return __LINE__;
    if (free != blocks[POLICY_FREE] || hand_bytes != p->hand_bytes)
        return __LINE__;
    if (p->lists[POLICY_GHOST].nbytes > p->ghost_limit_bytes)
        return __LINE__;
    if (p->resident_bytes != p->lists[POLICY_SMALL].nbytes + p->lists[POLICY_MAIN].nbytes)
        return __LINE__;
    return p->pool_bytes == p->lists[POLICY_POOL].nbytes ? 0 : __LINE__;
}

#endif /* UFFD_POLICY_H */
