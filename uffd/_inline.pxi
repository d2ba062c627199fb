# Finding regions without a lock, and delivery inline: the faulting thread serves itself in the SIGBUS handler.
#
# Uses:     the states and fills of _fill.pxi; hand_off, ahead_note of _ahead.pxi
# Provides: region_acquire, region_release, registry_add, registry_remove; inline_deliver (called by _sigbus.h)
#
# Everything here runs in a signal handler, under whatever locks the faulting thread holds: no interpreter lock, no
# malloc, no stdio, no mutex. A reader marks one of two counters (the epoch's parity) for the few instructions that it
# holds the snapshot; who replaces the snapshot waits until both have been seen empty (the two-phase scheme of
# sleepable RCU). From then on a region is held by its own `refs`.

cdef enum:
    EPOCH_STRIPES = 32

cdef struct Stripe:
    uint32_t inside[2]
    uint8_t pad[56]

cdef struct Entry:
    uint64_t start
    uint64_t end
    Region_t *region

cdef struct Snapshot:           # sorted by address; never changed once published
    uint64_t n
    Entry entry[1]

cdef Stripe stripe[EPOCH_STRIPES]
cdef uint32_t epoch = 0
cdef Snapshot *snapshot = NULL
cdef Region_t *table[MAX_REGIONS]           # by id modulo MAX_REGIONS
cdef uint64_t table_next = 16               # under registry_lock; below are the other events of epoll sets
cdef pthread_mutex_t registry_lock          # all that makes, closes or lists regions and engines; never a fault


cdef inline uint32_t *epoch_enter() noexcept nogil:
    cdef uint32_t here = 0                  # its address tells threads apart
    cdef uint32_t *mark = &stripe[(<uintptr_t>&here >> 12) & (EPOCH_STRIPES - 1)].inside[u32_load_seq(&epoch) & 1]
    u32_add_seq(mark, 1)
    return mark


cdef inline void epoch_leave(uint32_t *mark) noexcept nogil:
    u32_sub(mark, 1)


cdef void epoch_synchronize() noexcept nogil:
    """Returns when nobody holds what was published before. Under registry_lock. Readers are inside for nanoseconds."""
    cdef int phase = 0, i
    cdef uint32_t old
    while phase < 2:
        old = u32_add_seq(&epoch, 1) & 1
        phase += 1
        for i in range(EPOCH_STRIPES):
            while u32_load_seq(&stripe[i].inside[old]) != 0:
                sched_yield()


cdef Region_t *region_acquire(uint64_t region_id) noexcept nogil:
    """The region of that id with a reference, or NULL if it is closed or closing."""
    cdef uint32_t *mark = epoch_enter()
    cdef Region_t *r = <Region_t *>ptr_load(&table[region_id & (MAX_REGIONS - 1)])
    if r != NULL and r.id == region_id and not u32_load(&r.closing):
        u32_add_seq(&r.refs, 1)
    else:
        r = NULL
    epoch_leave(mark)
    return r


cdef Region_t *region_at(uint64_t address) noexcept nogil:
    """The region that holds an address with a reference, or NULL."""
    cdef uint32_t *mark = epoch_enter()
    cdef Snapshot *now = <Snapshot *>ptr_load(&snapshot)
    cdef Region_t *r = NULL
    cdef uint64_t low = 0, high = 0 if now == NULL else now.n, middle
    while low < high:
        middle = (low + high) >> 1
        if address >= now.entry[middle].end:
            low = middle + 1
        else:
            high = middle
    if now != NULL and low < now.n and address >= now.entry[low].start:
        r = now.entry[low].region
        u32_add_seq(&r.refs, 1)
    epoch_leave(mark)
    return r


cdef bint region_overlaps(uint64_t start, uint64_t nbytes) noexcept nogil:
    """Whether any region lies in [start, start + nbytes)."""
    cdef uint64_t i
    cdef bint found = False
    pthread_mutex_lock(&registry_lock)
    if snapshot != NULL:
        for i in range(snapshot.n):
            found = found or snapshot.entry[i].start < start + nbytes and start < snapshot.entry[i].end
    pthread_mutex_unlock(&registry_lock)
    return found


cdef inline void region_release(Region_t *r) noexcept nogil:
    if u32_sub(&r.refs, 1) == 1:
        futex_wake_all(&r.refs)


cdef int registry_add(Region_t *r) noexcept nogil:
    """Publishes a region under a new id. 0 or -errno. Under registry_lock."""
    global table_next
    cdef uint64_t i
    for i in range(<uint32_t>MAX_REGIONS):
        if table[(table_next + i) & (MAX_REGIONS - 1)] == NULL:
            break
    else:
        return -ENOSPC
    table_next += i
    r.id = table_next
    table_next += 1
    if snapshot_replace(r, NULL) != 0:
        return -ENOMEM
    ptr_store(&table[r.id & (MAX_REGIONS - 1)], r)
    return 0


cdef void registry_remove(Region_t *r) noexcept nogil:
    """Nobody new finds the region by id from here on. Under registry_lock."""
    ptr_store(&table[r.id & (MAX_REGIONS - 1)], NULL)
    epoch_synchronize()


cdef int snapshot_replace(Region_t *add, Region_t *drop) noexcept nogil:
    """Publishes the sorted table with one region more or less. 0 or -errno. Under registry_lock."""
    cdef Snapshot *old = snapshot
    cdef uint64_t n = 0 if old == NULL else old.n, i, k = 0
    cdef Snapshot *new = <Snapshot *>malloc(sizeof(Snapshot) + (n + 1) * sizeof(Entry))
    if new == NULL:
        return -ENOMEM
    for i in range(n):
        if add != NULL and <uint64_t>add.base < old.entry[i].start:
            k = snapshot_put(new, k, add)
            add = NULL
        if old.entry[i].region != drop:
            new.entry[k] = old.entry[i]
            k += 1
    if add != NULL:
        k = snapshot_put(new, k, add)
    new.n = k
    ptr_store(&snapshot, new)
    epoch_synchronize()
    free(old)
    return 0


cdef uint64_t snapshot_put(Snapshot *s, uint64_t k, Region_t *r) noexcept nogil:
    s.entry[k].start = <uint64_t>r.base
    s.entry[k].end = <uint64_t>r.base + r.span
    s.entry[k].region = r
    return k + 1


# ---- the SIGBUS handler's part ----------------------------------------------------------------------------------

cdef int inline_deliver(uint64_t address, int write) noexcept nogil:
    """A SIGBUS at this address: BUS_SERVED (run the instruction again), BUS_POISONED, or BUS_NOT_OURS."""
    cdef Region_t *r = region_at(address)
    cdef int verdict
    if r == NULL:
        return BUS_NOT_OURS
    verdict = inline_serve(r, address, write)
    region_release(r)
    return verdict


cdef int inline_serve(Region_t *r, uint64_t address, int write) noexcept nogil:
    """Acts on the block's state until the fault can be tried again. write: 1, 0, or -1 where that is not known."""
    cdef uint64_t b = (address - <uint64_t>r.base) >> r.shift
    cdef uint32_t word, state
    cdef uint64_t asked_ns = 0
    cdef int verdict
    while True:
        word = u32_load(&r.state[b])
        state = word & STATE_MASK
        if state == POISONED:
            say_poison(r, b)
            return BUS_POISONED
        if (state == FILLING or state == EVICTING or state == COPYING) and filled_here(r, word):
            if state != FILLING:
                tear_copy(&r.engine.slots[((word >> OWNER_SHIFT) & OWNER_MASK) - 1], r, b)
                return BUS_SERVED
            say_own_region(r, b)
            return BUS_POISONED
        if u32_load(&r.closing):
            return BUS_NOT_OURS             # its memory is about to go: the program used it after closing it
        if not r.is_inline:
            return odd_fault(r, b, state)
        if wire_gone(r):
            wire_parked(r, b)
            futex_wait(&r.frozen, 1, SECOND_NS)
            continue
        if state == MISSING and wire_pending(r, b):
            wire_toucher(r, b, <uint32_t>thread_id())
            asked_ns = inline_ask(r, b, write > 0, word, asked_ns)
            verdict = BUS_NOT_OURS
        elif state == MISSING and r.hosted:
            verdict = inline_hosted(r, b, write > 0)
        elif state == MISSING and r.fill.inline_safe:
            verdict = inline_fill(r, b, write > 0, MISSING)
        elif state == MISSING:
            asked_ns = inline_ask(r, b, write > 0, word, asked_ns)
            verdict = BUS_NOT_OURS
        elif state == POOLED or state == POOLED_DIRTY:
            verdict = inline_rescue(r, b, write > 0)
        elif state == CLEAN or state == DIRTY:
            verdict = inline_present(r, address, write, state)
        else:
            verdict = inline_wait(r, b, word)
        if verdict != BUS_NOT_OURS:
            return verdict


cdef int odd_fault(Region_t *r, uint64_t b, uint32_t state) noexcept nogil:
    """SIGBUS with thread delivery, and the block is not poisoned: repaired since, or a cause that is none of ours (a
    memory error, no room in shared memory), which stays."""
    if state != FILLING and b == r.odd_block:
        r.odd_count += 1
        if r.odd_count > 1000:
            return BUS_NOT_OURS
    else:
        r.odd_block = b
        r.odd_count = 0
    return BUS_SERVED


cdef int inline_fill(Region_t *r, uint64_t b, bint write, uint32_t from_state) noexcept nogil:
    """Fills the block in this thread. BUS_NOT_OURS: look at its state again."""
    cdef Slot *s = inline_borrow(r.engine)
    cdef uint32_t got = begin_run(s, r, b, 1, write, DEMAND, from_state)
    if few_blocks(r.engine):
        note_touch(r.engine, <uint32_t>s.tid, <uint64_t>r.base + (b << r.shift))
    while got == 0 and s.no_room and u32_load(&r.state[b]) & STATE_MASK == from_state:     # else it failed for room
        room_wait(s, r, b, write)
        got = begin_run(s, r, b, 1, write, DEMAND, from_state)
    if got:
        count(s, r, C_FAULTS_WRITE if write else C_FAULTS_READ, 1)
        ahead_note(s, r, <int64_t>b)        # first: the workers fill ahead while this thread fills its own
        finish_run(s, r)
    inline_return(r.engine, s)
    return BUS_SERVED if got and u32_load(&r.state[b]) & STATE_MASK != POISONED else BUS_NOT_OURS


cdef int inline_rescue(Region_t *r, uint64_t b, bint write) noexcept nogil:
    """The block waits in the pool. BUS_NOT_OURS: look at its state again."""
    cdef Slot *s = inline_borrow(r.engine)
    cdef bint came
    if few_blocks(r.engine):
        note_touch(r.engine, <uint32_t>s.tid, <uint64_t>r.base + (b << r.shift))
    count(s, r, C_FAULTS_WRITE if write else C_FAULTS_READ, 1)
    came = demand_pooled(s, r, b, write)
    while not came and s.no_room:
        came = demand_pooled(s, r, b, write)
    inline_return(r.engine, s)
    return BUS_SERVED if came else BUS_NOT_OURS


cdef uint64_t inline_ask(Region_t *r, uint64_t b, bint write, uint32_t word, uint64_t asked_ns) noexcept nogil:
    """The fill can't run in a signal handler: a worker gets it (again, if a second has passed). When it was asked."""
    cdef uint64_t now = now_ns()
    cdef Slot *s
    if now - asked_ns > SECOND_NS:
        if asked_ns == 0:                   # 1: the queue was full, it is asked again at once
            s = inline_borrow(r.engine)
            count(s, r, C_FAULTS_WRITE if write else C_FAULTS_READ, 1)
            ahead_note(s, r, <int64_t>b)
            inline_return(r.engine, s)
        if not hand_off(r, b, write):
            sched_yield()
            return 1
        asked_ns = now
    wait_for_word(r, b, word, SECOND_NS)
    return asked_ns


cdef int inline_present(Region_t *r, uint64_t address, int write, uint32_t state) noexcept nogil:
    """A fault on a block that is there: its first write, somebody else's fill just ended, or pages were dropped."""
    cdef uint64_t b = (address - <uint64_t>r.base) >> r.shift
    cdef Slot *s
    cdef int verdict = BUS_SERVED
    if state == CLEAN and write < 0 and (r.minor or block_present(r, b)):
        write = 1                           # there, and faulting: a write (of a shared block at least maybe)
    if write and u32_load(&r.frozen) and (r.minor or block_present(r, b)):
        wire_parked(r, b)
        futex_wait(&r.frozen, 1, SECOND_NS)
        return BUS_SERVED
    if state == CLEAN and write == 0 and block_present(r, b):
        return BUS_SERVED
    if write > 0 and state == CLEAN and r.guard:
        forbid_write(r, b)
        return BUS_SERVED
    s = inline_borrow(r.engine)
    if u32_load(&r.watched) and write != 0 and lift_page(s, r, address):
        count(s, r, C_FAULTS_WP, 1)
        state = DIRTY
        if not r.minor and block_present(r, b):
            inline_return(r.engine, s)
            return BUS_SERVED
    elif write > 0 and state == CLEAN and lift_run(s, r, b, 1):
        count(s, r, C_FAULTS_WP, 1)
        if not r.minor and block_present(r, b):
            inline_return(r.engine, s)
            return BUS_SERVED
        state = DIRTY
    elif state == DIRTY and r.protect:
        lift_again(s, r, b)
    if not block_present(r, b):
        repair_run(s, r, b, state, DEMAND)
        if u32_load(&r.state[b]) & STATE_MASK == POISONED:
            verdict = BUS_NOT_OURS
    inline_return(r.engine, s)
    return verdict


cdef bint filled_here(Region_t *r, uint32_t word) noexcept nogil:
    """Whether the block of this FILLING word is being filled by the very thread that asks: it would wait for itself."""
    cdef Slot *owner = &r.engine.slots[((word >> OWNER_SHIFT) & OWNER_MASK) - 1]
    return u32_load(&owner.tid) == <uint32_t>thread_id()


cdef int inline_wait(Region_t *r, uint64_t b, uint32_t word) noexcept nogil:
    """Somebody else is at it: wait for the word."""
    cdef Slot *s
    if word & WAITERS == 0:
        s = inline_borrow(r.engine)
        ahead_note(s, r, <int64_t>b)
        inline_return(r.engine, s)
    wait_for_word(r, b, word, SECOND_NS)
    return BUS_NOT_OURS


# ---- slots for the handler --------------------------------------------------------------------------------------

cdef Slot *inline_borrow(Engine_t *e) noexcept nogil:
    """A slot from the bounded free list; sleeps while all are in use."""
    cdef uint64_t bits, bit
    cdef uint32_t turn
    cdef Slot *s
    while True:
        turn = u32_load(&e.inline_turn)
        bits = u64_load(&e.inline_free)
        if bits == 0:
            futex_wait(&e.inline_turn, turn, SECOND_NS)
            continue
        bit = bits & (~bits + 1)
        if u64_cas(&e.inline_free, bits, bits & ~bit):
            s = &e.slots[MAX_WORKERS + u64_log2(bit)]
            u32_store(&s.tid, <uint32_t>thread_id())
            s.room_since_ns = 0
            return s


cdef void inline_return(Engine_t *e, Slot *s) noexcept nogil:
    cdef uint64_t bits
    u32_store(&s.tid, 0)
    bits = u64_or(&e.inline_free, <uint64_t>1 << (s.index - MAX_WORKERS))
    u32_add(&e.inline_turn, 1)
    if bits == 0:
        futex_wake_all(&e.inline_turn)      # somebody may have found none
