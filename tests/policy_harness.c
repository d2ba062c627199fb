/* uffd/_policy.h by itself: as a library for ctypes (policy_test_*), and as a program under sanitizers.
 *
 *   policy_harness fuzz SEED CALLS    calls in any order, with indexes of every kind, and policy_check after each
 *
 * The nodes end at an unmapped page, so that a node past the last is found without sanitizers too.
 */
#define _GNU_SOURCE
#include "_policy.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

struct handle {
    struct policy policy;
    char *map;
    size_t nbytes;
};

void *policy_test_make(uint32_t capacity)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), need = capacity * sizeof(struct policy_node);
    const size_t room = (need + page - 1) / page * page;
    struct handle *h = calloc(1, sizeof *h);
    if (!h)
        return NULL;
    h->nbytes = room + page;
    h->map = mmap(NULL, h->nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (h->map == MAP_FAILED || mprotect(h->map + room, page, PROT_NONE)) {
        free(h);
        return NULL;
    }
    policy_init(&h->policy, (struct policy_node *)(void *)(h->map + room - need), capacity);
    return h;
}

void policy_test_free(struct handle *h)
{
    munmap(h->map, h->nbytes);
    free(h);
}

uint32_t policy_test_node_bytes(void) { return sizeof(struct policy_node); }
int policy_test_check(struct handle *h) { return policy_check(&h->policy); }
void policy_test_limit(struct handle *h, uint64_t budget_bytes) { policy_limit(&h->policy, budget_bytes); }
void policy_test_rescued(struct handle *h, uint32_t node) { policy_rescued(&h->policy, node); }
uint32_t policy_test_victim(struct handle *h) { return policy_victim(&h->policy); }
void policy_test_pooled(struct handle *h, uint32_t node) { policy_pooled(&h->policy, node); }
void policy_test_back(struct handle *h, uint32_t node) { policy_back(&h->policy, node); }
uint32_t policy_test_drop(struct handle *h) { return policy_drop(&h->policy); }
void policy_test_redrop(struct handle *h, uint32_t node) { policy_redrop(&h->policy, node); }
uint32_t policy_test_gone(struct handle *h, uint32_t node) { return policy_gone(&h->policy, node); }
void policy_test_forget(struct handle *h, uint32_t node) { policy_forget(&h->policy, node); }
uint64_t policy_test_ref(struct handle *h, uint32_t node) { return policy_ref(&h->policy, node); }
uint32_t policy_test_queue(struct handle *h, uint32_t node) { return policy_queue(&h->policy, node); }
uint32_t policy_test_shift(struct handle *h, uint32_t node) { return policy_shift(&h->policy, node); }
int policy_test_pool_full(struct handle *h) { return policy_pool_full(&h->policy); }

uint32_t policy_test_filled(struct handle *h, uint32_t node, uint64_t ref, uint32_t shift, int ahead)
{
    return policy_filled(&h->policy, node, ref, shift, ahead);
}

/* resident, pool, hand: bytes. */
void policy_test_bytes(struct handle *h, uint64_t out[3])
{
    out[0] = h->policy.resident_bytes;
    out[1] = h->policy.pool_bytes;
    out[2] = h->policy.hand_bytes;
}

/* Into out, the nodes of a queue, the oldest first; how many. */
uint32_t policy_test_order(struct handle *h, uint32_t queue, uint32_t *out)
{
    uint32_t node, count = 0;
    for (node = h->policy.lists[queue].oldest; node; node = h->policy.nodes[node].newer)
        out[count++] = node;
    return count;
}

/* ---- the program -------------------------------------------------------------------------------------------------- */

static uint64_t random_state;

static uint64_t next_random(uint64_t below)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % below;
}

/* Mostly an index that may be right; now and then one that never was a node. */
static uint32_t any_node(const struct policy *p)
{
    static const uint32_t wrong[] = {0, 1, UINT32_MAX, UINT32_MAX - 1, 1u << 31};
    const uint64_t kind = next_random(20);
    return kind < 5 ? wrong[kind] : (uint32_t)next_random((uint64_t)p->capacity + 3);
}

static void call_any(struct policy *p)
{
    const uint32_t node = any_node(p), same = (uint32_t)next_random(2);
    switch (next_random(16)) {
    case 0: case 1: case 2:
        policy_filled(p, node, 1 + next_random(64), 12 + (uint32_t)next_random(13), (int)next_random(2));
        break;
    case 3: policy_filled(p, node, policy_ref(p, node), policy_shift(p, node), (int)next_random(2)); break;
    case 4: policy_rescued(p, node); break;
    case 5: policy_pooled(p, same ? policy_victim(p) : node); break;
    case 6: policy_back(p, same ? policy_victim(p) : node); break;
    case 7: policy_redrop(p, same ? policy_drop(p) : node); break;
    case 8: case 9: policy_gone(p, same ? policy_drop(p) : node); break;
    case 10: policy_gone(p, same ? policy_victim(p) : node); break;
    case 11: policy_forget(p, node); break;
    case 12: policy_limit(p, next_random(8) ? next_random(1 << 24) : UINT64_MAX); break;
    case 13: policy_rescued(p, policy_victim(p)); break;
    case 14: policy_pooled(p, policy_victim(p)); break;
    default:
        if (policy_pool_full(p) && !policy_drop(p))
            abort();
    }
}

static int fuzz(uint64_t seed, uint64_t calls)
{
    uint64_t i;
    struct handle *h = NULL;
    random_state = seed * 2 + 1;
    for (i = 0; i < calls; i++) {
        int line;
        if (i % 2000 == 0) {
            if (h)
                policy_test_free(h);
            h = policy_test_make(1 + (uint32_t)next_random(next_random(2) ? 8 : 200));
            if (!h)
                return 2;
        }
        call_any(&h->policy);
        line = policy_check(&h->policy);
        if (line) {
            fprintf(stderr, "seed %llu, call %llu: the rule of line %d does not hold\n", (unsigned long long)seed,
                    (unsigned long long)i, line);
            return 1;
        }
    }
    policy_test_free(h);
    printf("%llu calls\n", (unsigned long long)calls);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "fuzz"))
        return fuzz(strtoull(argv[2], NULL, 10), strtoull(argv[3], NULL, 10));
    return 2;
}
