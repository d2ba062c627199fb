# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=False, binding=False
"""The core of uffd: page faults of numpy arrays, served without the interpreter lock.

Read this file from the top down and you follow a page: a worker waits (worker_main), reads a batch of messages
(serve_region), sorts it and answers each block from its state (serve_messages, answer), and lets runs of missing
blocks be filled (_fill.pxi). The other ways in are the SIGBUS handler of inline delivery (_inline.pxi) and the pieces
that read-ahead, prefetch and populate ask for (_ahead.pxi). Making, closing and forking are in _life.pxi, the thread
that looks after it all in _keeper.pxi, native providers in _native.pxi, and what Python sees is in _api.pxi.
ARCHITECTURE.md draws the states and names the owner of every field.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy, memset
from libc.stdlib cimport calloc, free, malloc
from uffd._sys cimport *
from uffd._core cimport uffd_fill_fn, uffd_write_fn

include "_data.pxi"


# ---- the way of a page: wait, read a batch, route ---------------------------------------------------------------

cdef void *worker_main(void *argument) noexcept nogil:
    """A worker thread: faults first, then one piece of other work, then faults again."""
    cdef Slot *s = <Slot *>argument
    cdef Engine_t *e = s.engine
    cdef bint more = False, stand_in = s.index >= e.workers
    s.tid = thread_id()
    while not u32_load(&e.stopping) and u32_load(&s.kind) == SLOT_WORKER:
        if stand_in:
            wait_for_faults(e, s, 0 if more else STAND_IN_MS)
        else:
            if not more:
                announce_idle(e, s)
                more = work_waits(e)        # queued before we were seen to be idle
            wait_for_faults(e, s, 0 if more else -1)
            withdraw_idle(e, s)
        more = serve_one_piece(e, s)
        if stand_in and not more and stand_in_leaves(e):
            worker_ends(s)
            return NULL
    worker_ends(s)
    worker_leaves(e)
    return NULL


cdef void wait_for_faults(Engine_t *e, Slot *s, int timeout_ms) noexcept nogil:
    cdef uint64_t event[16]
    cdef int i, n
    n = epoll_take(s.epoll_fd, event, 16, timeout_ms)
    for i in range(n):
        if event[i] == EVENT_WAKE:
            eventfd_clear(s.wake_fd)
        elif event[i] == EVENT_FAULTS:
            serve_any(e, s)
        else:
            serve_region(s, event[i])


cdef void serve_any(Engine_t *e, Slot *s) noexcept nogil:
    """Some region of the engine's set has messages."""
    cdef uint64_t ids[16]
    cdef int i, n
    s.turns += 1
    if s.turns & 15 and serve_region(s, s.last_id):
        return                              # most faults come from where the last one came from: one call less
    n = epoll_take(e.faults_fd, ids, 16, 0)
    for i in range(n):
        serve_region(s, ids[i])


cdef bint serve_region(Slot *s, uint64_t region_id) noexcept nogil:
    """One read of a region's uffd: as many messages as wait there, up to BATCH. What is left is reported again.
    Whether there were any."""
    cdef uf_msg message[BATCH]
    cdef Region_t *r = region_acquire(region_id)
    cdef int n
    if r == NULL:
        return False                        # closed since the event
    n = uf_read(r.fd, message, BATCH) if not r.is_inline else 0
    if (n == BATCH or n < 0) and listens_itself(s):
        epoll_watch_edge(s.epoll_fd, r.fd, r.id, True)      # what is left there would not be told again by itself
    if n > 0:
        s.last_id = region_id if not r.slow else 0
        follow_faulter(s, message[0].ptid)
        serve_messages(s, r, message, n)
    elif n < 0:
        u64_add(&s.engine.read_errors, 1)
    else:
        u64_add(&s.empty, 1)                # another worker was faster
    region_release(r)
    return n > 0


cdef void serve_messages(Slot *s, Region_t *r, uf_msg *message, int n) noexcept nogil:
    """Sorts a batch by block, drops doubles, and answers it run by run."""
    cdef uint64_t block[BATCH]
    cdef uint32_t flags[BATCH]
    cdef uint64_t b
    cdef uint32_t f
    cdef int i, k, m = 0
    cdef uint64_t t0 = now_ns()
    u64_add(&s.served, <uint64_t>n)
    for i in range(n):
        if message[i].event == UF_EVENT_REMAP and not u32_load(&r.frozen):
            uf_unregister(r.fd, message[i].address, uf_moved_bytes(&message[i]))    # by the program: nobody serves that
        if message[i].event != UF_EVENT_PAGEFAULT:
            continue                        # a migration's own; a kernel that sends others anyway is not answered
        b = (message[i].address - <uint64_t>r.base) >> r.shift
        f = <uint32_t>message[i].flags
        if b >= r.blocks:
            continue
        count_fault(s, r, f)
        if f & UF_FLAG_WP == 0 and few_blocks(s.engine):
            note_touch(s.engine, message[i].ptid, message[i].address)
        if f & UF_FLAG_WP and u32_load(&r.watched) and lift_page(s, r, message[i].address):
            continue
        if r.part != NULL:
            wire_toucher(r, b, message[i].ptid)
        if f & UF_FLAG_WP == 0 and fills_itself(s, r, b, message[i].ptid):
            continue
        k = m
        while k > 0 and block[k - 1] > b:
            k -= 1
        if k > 0 and block[k - 1] == b:
            flags[k - 1] |= f
            count(s, r, C_DUPLICATES, 1)
            continue
        insert_at(block, flags, m, k, b, f)
        m += 1
    k = 0
    while k < m:
        s.pending = <uint32_t>(m - k - 1)
        k = answer(s, r, block, flags, k, m, t0)
        if u32_load(&s.kind) == SLOT_RETIRED:
            break                           # the keeper has had them asked again
    s.pending = 0


cdef void insert_at(uint64_t *block, uint32_t *flags, int m, int k, uint64_t b, uint32_t f) noexcept nogil:
    while m > k:
        block[m] = block[m - 1]
        flags[m] = flags[m - 1]
        m -= 1
    block[k] = b
    flags[k] = f


cdef int answer(Slot *s, Region_t *r, uint64_t *block, uint32_t *flags, int k, int m, uint64_t t0) noexcept nogil:
    """Answers message k, and those after it that need the same for the blocks beside it; the next one to answer.

    The block's present state decides, whatever the message says: it may have been read long ago.
    """
    cdef uint64_t b = block[k]
    cdef bint write = flags[k] & UF_FLAG_WRITE != 0
    cdef uint32_t word = u32_load(&r.state[b])
    cdef uint32_t state = word & STATE_MASK
    cdef int n = 1
    if state == MISSING:
        while k + n < m and block[k + n] == b + <uint64_t>n and (flags[k + n] & UF_FLAG_WRITE != 0) == write:
            n += 1
        demand_run(s, r, b, <uint32_t>n, write, t0)
        return k + n
    if state == POOLED or state == POOLED_DIRTY:
        return k + 1 if demand_pooled(s, r, b, write) else k
    if is_busy(state):
        ahead_note(s, r, <int64_t>b)
        if not ask_for_wake(r, b, word):
            return k                        # it changed meanwhile: look again
        return k + 1
    if state == POISONED:
        poison_again(s, r, b)
        return k + 1
    if write and state == CLEAN and r.guard:
        forbid_write(r, b)
        return k + 1
    if u32_load(&r.frozen) and (flags[k] & UF_FLAG_WP or wire_gone(r)):
        wire_parked(r, b)                   # it waits for a migration; woken when writers may go on
        return k + 1
    if write and state == CLEAN and not u32_load(&r.frozen):
        while k + n < m and block[k + n] == b + <uint64_t>n and flags[k + n] & UF_FLAG_WRITE:
            n += 1
        n = <int>lift_run(s, r, b, <uint32_t>n)
        if n == 0 and not u32_load(&r.watched):
            return k
        if n == 0 and flags[k] & UF_FLAG_WP:
            uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))    # asked again, with its page
            return k + 1
        if flags[k] & UF_FLAG_WP:
            return k + n
        n = 1                               # a page of a block that is there is not: go on below
    resolve_present(s, r, b, state, flags[k])
    return k + n


cdef void resolve_present(Slot *s, Region_t *r, uint64_t b, uint32_t state, uint32_t flags) noexcept nogil:
    """A fault on a block that is there: a late message, a stale protection, or a page that the program dropped."""
    cdef char *start = r.base + (b << r.shift)
    cdef uint64_t len = block_span(r, b)
    count(s, r, C_DUPLICATES, 1)
    if flags & UF_FLAG_WP:
        if r.protect and state == DIRTY:
            lift_again(s, r, b)
        uf_wake(r.fd, <uint64_t>start, len)
    elif block_present(r, b):
        uf_wake(r.fd, <uint64_t>start, len)
    else:
        repair_run(s, r, b, state, DEMAND)


cdef void demand_run(Slot *s, Region_t *r, uint64_t b, uint32_t n, bint write, uint64_t t0) noexcept nogil:
    """Fills the blocks of [b, b+n) that are still missing, in runs, and looks for a pattern in them."""
    cdef uint64_t end = b + n
    cdef uint32_t got
    while b < end:
        if r.hosted:
            stage(s, r, H_QUEUE, now_ns() - t0)
            got = hosted_run(s, r, b, <uint32_t>(end - b), write, s.pending == 0)
        else:
            got = begin_run(s, r, b, <uint32_t>(end - b), write, DEMAND, MISSING)
        if got == 0:
            if s.no_room and u32_load(&r.state[b]) & STATE_MASK == MISSING:     # else it failed for room
                room_wait(s, r, b, write)
            elif ask_for_wake(r, b, u32_load(&r.state[b])):
                b += 1
            elif wire_pending(r, b) and u32_load(&r.state[b]) & (STATE_MASK | WAITERS) == MISSING | WAITERS:
                ahead_note(s, r, <int64_t>b)
                b += 1                      # asked for; who brings it wakes
            elif u32_load(&r.state[b]) & STATE_MASK != MISSING:
                uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))
                b += 1
            continue
        if r.hosted:
            b += got                        # answered, or in the hands of the request's own thread
            continue
        stage(s, r, H_QUEUE, s.since_ns - t0)
        finish_run(s, r)
        if u32_load(&s.kind) == SLOT_RETIRED:
            return                          # the region may be gone by now
        ahead_note(s, r, <int64_t>(b + got - 1))
        b += got


cdef bint fills_itself(Slot *s, Region_t *r, uint64_t b, uint32_t tid) noexcept nogil:
    """A fill function that touches the very block it fills can never end: say so, and let the process die."""
    cdef uint32_t word = u32_load(&r.state[b]), state = word & STATE_MASK
    cdef Slot *owner
    if state != FILLING and state != EVICTING and state != COPYING or tid == 0:
        return False
    owner = &s.engine.slots[((word >> OWNER_SHIFT) & OWNER_MASK) - 1]
    if u32_load(&owner.tid) != tid:
        return False
    if state != FILLING:
        tear_copy(owner, r, b)
        return True
    say_own_region(r, b)
    poison_pages(r, b)
    uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))
    return True


# ---- placement: which workers listen ----------------------------------------------------------------------------

cdef void follow_faulter(Slot *s, uint32_t tid) noexcept nogil:
    """Now and then, before the faulting thread is let go: arm the worker of the CPU that it sleeps on.

    A worker on the faulter's own CPU answers several times faster than one that must be woken across CPUs, but all
    workers polling one uffd are all woken by each fault. Up to four CPUs that is the best there is; beyond, only
    those listen on whose CPUs faults lately came from.
    """
    cdef Engine_t *e = s.engine
    cdef Slot *other
    cdef uint32_t i
    cdef int cpu
    if not e.follow or s.index >= e.workers:
        return
    s.sample += 1
    if s.sample & 63 == 0:
        cpu = thread_cpu(tid)
        for i in range(e.workers):
            other = &e.slots[i]
            if other.cpu == cpu and not u32_load(&other.armed):
                arm(e, other)
    if s.sample & 255 == 0 and u32_load(&s.armed):
        review_placement(e, s)


cdef void review_placement(Engine_t *e, Slot *s) noexcept nogil:
    """Disarms the workers that served less than a sixteenth of the recent faults; never the one that asks."""
    cdef uint64_t total = 0
    cdef uint32_t i
    if not u32_cas(&e.placing, 0, 1):
        return
    for i in range(e.workers):
        total += u64_load(&e.slots[i].served)
    if total - e.placed >= 256:
        for i in range(e.workers):
            if &e.slots[i] != s and u32_load(&e.slots[i].armed):
                if (u64_load(&e.slots[i].served) - e.slots[i].reviewed) * 16 < total - e.placed:
                    disarm(e, &e.slots[i])
            e.slots[i].reviewed = u64_load(&e.slots[i].served)
        e.placed = total
    u32_store(&e.placing, 0)


cdef void arm(Engine_t *e, Slot *s) noexcept nogil:
    """Flag and epoll set change together, under `placing`: else a review could disarm the last one that listens."""
    while not u32_cas(&e.placing, 0, 1):
        cpu_relax()
    if u32_cas(&s.armed, 0, 1):
        epoll_watch(s.epoll_fd, e.faults_fd, EVENT_FAULTS)
    u32_store(&e.placing, 0)


cdef void arm_another(Engine_t *e, Slot *s) noexcept nogil:
    """Before a fill that may take long: somebody else that is free must listen."""
    cdef Slot *idle = NULL
    cdef uint32_t i
    fence_seq()                             # of two that go in at once, one sees the other
    for i in range(e.workers):
        if &e.slots[i] != s and u32_load(&e.slots[i].phase) & PHASE_MASK == IDLE and \
                u32_load(&e.slots[i].kind) == SLOT_WORKER:
            if u32_load(&e.slots[i].armed):
                return
            idle = &e.slots[i]
    if idle != NULL:
        arm(e, idle)


cdef void disarm(Engine_t *e, Slot *s) noexcept nogil:
    """Under `placing`."""
    if u32_cas(&s.armed, 1, 0):
        epoll_ctl(s.epoll_fd, EPOLL_CTL_DEL, e.faults_fd, NULL)


include "_fill.pxi"
include "_place.pxi"
include "_words.pxi"
include "_room.pxi"
include "_evict.pxi"
include "_store.pxi"
include "_spill.pxi"
include "_epochs.pxi"
include "_sync.pxi"
include "_flush.pxi"
include "_ahead.pxi"
include "_hosted.pxi"
include "_hosts.pxi"
include "_inline.pxi"
include "_native.pxi"
include "_life.pxi"
include "_fork.pxi"
include "_kept.pxi"
include "_keeper.pxi"
include "_api.pxi"
include "_region.pxi"
include "_memory.pxi"
include "_track.pxi"
include "_foreign.pxi"
include "_snapshot.pxi"
include "_instant.pxi"
include "_image.pxi"
include "_imager.pxi"
include "_forked.pxi"
include "_hostside.pxi"
include "_hosttake.pxi"
include "_hostwrite.pxi"
include "_resp.pxi"
include "_wire.pxi"
include "_wireplace.pxi"
include "_wiretake.pxi"
include "_wireread.pxi"
include "_wireguard.pxi"
include "_wiresend.pxi"
include "_wireapi.pxi"


cdef int _start() except -1:
    pthread_mutex_init(&registry_lock, NULL)
    pthread_mutex_init(&foreign_lock, NULL)
    bus_deliver_set(&inline_deliver)
    if pthread_atfork(&fork_prepare, &fork_parent, &fork_child) != 0:
        raise MemoryError("pthread_atfork")
    _atexit.register(_finalize)
    return 0


_start()
