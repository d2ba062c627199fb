/* Which block leaves memory: S3-FIFO without access bits.
 *
 *   fill, not remembered --> SMALL --.                   .-- untouched, came from SMALL --> GHOST (no memory)
 *                                    |--> POOL, oldest --|
 *   fill, in GHOST --------> MAIN ---'     |             '-- untouched, came from MAIN ---> forgotten
 *                             ^            |
 *                             '- touched --'
 *
 * Memory model: none. The caller holds one lock round every call. No allocation, no syscall; everything but
 * policy_check is O(1), ghosts freed to keep their limit aside.
 *
 * Uses: nothing. Provides: struct policy, struct policy_node, policy_*.
 */
#ifndef UFFD_POLICY_H
#define UFFD_POLICY_H

#include <stdint.h>
#include <string.h>

/* Shares of the budget, by simulation (benchmarks/policy_sim.py, which compiles this file with other numbers). */
#ifndef POLICY_SMALL_PERCENT
#define POLICY_SMALL_PERCENT 10
#endif
#ifndef POLICY_POOL_PERCENT
#define POLICY_POOL_PERCENT 10
#endif
#ifndef POLICY_GHOST_PERCENT
#define POLICY_GHOST_PERCENT 90
#endif

enum policy_queue { POLICY_FREE, POLICY_SMALL, POLICY_MAIN, POLICY_POOL, POLICY_HAND, POLICY_GHOST, POLICY_QUEUES };

/* 20 bytes: the reference is cut in two so that it asks for no padding. */
struct policy_node {
    uint32_t ref_low, ref_high;
    uint32_t newer, older; /* neighbours in its queue, 0 at the ends; of a free node, older is the next free one */
    uint8_t queue;         /* enum policy_queue */
    uint8_t from;          /* POOL, HAND, GHOST: POLICY_SMALL or POLICY_MAIN, where it was resident */
    uint8_t shift;         /* log2 of its bytes */
    uint8_t unused;
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
    n->queue = (uint8_t)queue;
    n->newer = n->older = 0;
    if (queue == POLICY_SMALL || queue == POLICY_MAIN)
        n->from = (uint8_t)queue;
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

/* A node that is in no queue; 0: all are in use for blocks in memory. */
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
    if (queue == POLICY_POOL || queue == POLICY_HAND)
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

/* The block `ref` of 1 << shift bytes has become resident. `node` is what the block remembers: 0, its ghost, or an index
 * that is another block's by now. `ahead`: nobody asked for it yet, so that its ghost proves nothing. The block's node,
 * to be remembered; 0: there is none, and the block must leave memory by other means than this. */
static inline uint32_t policy_filled(struct policy *p, uint32_t node, uint64_t ref, uint32_t shift, int ahead)
{
    const uint32_t queue = policy_queue(p, node);
    int remembered = 0;
    if (queue != POLICY_FREE && policy_ref(p, node) == ref) {
        if (queue != POLICY_GHOST) {
            policy_rescued(p, node); /* it was filled before its end was told; or it is told twice */
            return node;
        }
        remembered = !ahead;
        policy_pull(p, node);
    } else {
        node = policy_take(p);
        if (!node)
            return 0;
    }
    p->nodes[node].ref_low = (uint32_t)ref;
    p->nodes[node].ref_high = (uint32_t)(ref >> 32);
    p->nodes[node].shift = (uint8_t)shift;
    policy_push(p, node, remembered || policy_has_room(p) ? POLICY_MAIN : POLICY_SMALL);
    return node;
}

/* ---- what the evictor asks and tells ---------------------------------------------------------------------------- */

/* The next resident block to move out: in hand now, to be given to policy_pooled, _back, _rescued, _gone or _forget.
 * 0: there is none. Blocks that are given back again and again (pinned) don't hide the others: each that follows another
 * is taken from the other queue, so that all are offered within twice their number of calls. */
static inline uint32_t policy_victim(struct policy *p)
{
    const uint32_t small = p->lists[POLICY_SMALL].oldest, main = p->lists[POLICY_MAIN].oldest;
    int from_small = p->lists[POLICY_SMALL].nbytes > p->small_limit_bytes;
    uint32_t node;
    p->evicting = 1;
    if (p->backs & 1)
        from_small = !from_small;
    node = (from_small && small) || !main ? small : main;
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
    policy_move(p, node, (enum policy_queue)p->nodes[node].from);
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
    if (p->nodes[node].from != POLICY_SMALL) {
        policy_free(p, node);
        return 0;
    }
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
        if (n->queue >= POLICY_QUEUES || n->shift > 63)
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
