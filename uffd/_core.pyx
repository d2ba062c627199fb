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
from uffd._core cimport uffd_fill_fn

# ---- the data, all of it ----------------------------------------------------------------------------------------

cdef enum:
    MAX_REGIONS = 65536         # of one process; an id is slot + generation * MAX_REGIONS
    MAX_WORKERS = 112           # base workers, and those that stand in for workers that are stuck
    MAX_BASE_WORKERS = 64
    INLINE_SLOTS = 16           # threads that may fill at once in the SIGBUS handler; others wait their turn
    MAX_HOSTS = 8               # provider hosts of one engine
    HOSTED_SLOT = MAX_WORKERS + INLINE_SLOTS            # one per request of a host, and one for what it offers
    KEEPER_SLOT = HOSTED_SLOT + MAX_HOSTS * 33
    MAX_SLOTS = KEEPER_SLOT + 1
    BATCH = 64                  # messages of one read
    MAX_RUN = 512               # blocks of one fill
    STRIPES = 8                 # sets of counters of a region
    BUCKETS = 40                # log2 of nanoseconds, up to 18 minutes
    STREAMS = 8                 # access patterns that read-ahead follows at once, per region
    HISTORY = 16                # demand faults among which a new pattern is looked for
    CREDIT = 4                  # the most of it; earned back by patterns that prove true, and one per 32 touches
    PROVEN = 6                  # touches that fit, after which a pattern is believed
    RING = 512                  # pieces of read-ahead, or handed-off faults, that may be queued
    ERRORS = 64                 # failed blocks whose number of tries is remembered

cdef enum:                      # the state of a block: the low bits of its word
    MISSING = 0                 # (zero: an untouched state page says that nothing is here)
    FILLING = 1                 # owned by one slot
    CLEAN = 2                   # present, write-protected: equal to what the provider holds
    UNPROTECTING = 3            # owned by who serves the first write
    DIRTY = 4                   # present, writable
    POISONED = 5                # its fill failed for good: the owner bits hold the errno
    STATE_MASK = 15
    WAITERS = 16                # somebody sleeps on the word, or in a fault that was read while the block was busy
    DEAD = 32                   # poisoned, and not to be repaired: a fill that hung may still write there
    KEPT = 128                  # poisoned or being repaired, and it holds pages that were written
    FROM_PARENT = 64            # in a forked child, shared backing: the bytes are in the parent's pages
    OWNER_SHIFT = 8
    OWNER_MASK = 0x3ff
    GENERATION_SHIFT = 18       # 14 bits, one more at each claim: no word recurs while somebody compares with it
    GENERATION_ONE = 1 << 18

cdef enum:                      # why a block is filled
    DEMAND, READAHEAD, PREFETCH, POPULATE

cdef enum:                      # counters of a region
    C_FAULTS_READ, C_FAULTS_WRITE, C_FAULTS_WP, C_DEMAND, C_READAHEAD, C_PREFETCH, C_BYTES, C_DUPLICATES
    C_RETRIES, C_ERRORS, C_POISONED, C_WASTED, C_REPAIRED
    COUNTERS

cdef enum:                      # stages, each with a histogram
    H_QUEUE, H_FILL, H_RESOLVE
    STAGES

cdef enum:                      # how a native provider is called
    FILL_ZERO, FILL_DIRECT, FILL_CALL, FILL_HOST

cdef enum:                      # a slot's life, and the phase of its fill
    SLOT_FREE, SLOT_WORKER, SLOT_RETIRED, SLOT_INLINE, SLOT_HOSTED
    IDLE = 0
    BUSY = 1                    # the provider has the block; the keeper may take the blocks away (-> TIMED_OUT)
    PLACING = 2                 # the kernel has them; nobody may
    TIMED_OUT = 3
    PHASE_MASK = 3
    RUN_ONE = 4

ctypedef int (*call_fn)(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes) noexcept nogil

cdef struct Fill:               # where blocks come from. Constant while a region uses it.
    int kind
    const char *direct          # FILL_DIRECT: byte 0
    call_fn call
    void (*forget)(void *self, uint32_t slot) noexcept nogil    # a forked child: the slot was in use. Or NULL
    void *self
    uint64_t session            # FILL_HOST: the provider's number in the hosts
    uint32_t one_host           # FILL_HOST: 1 + the host that has it alone, since it can write; 0: all of them
    bint inline_safe            # may run in the SIGBUS handler
    bint may_block              # a fill can take long: others must not queue behind it

cdef struct Counters:           # one cache-line-aligned stripe; relaxed adds
    uint64_t n[COUNTERS]
    uint64_t stage[STAGES][BUCKETS]

cdef struct Stream:             # one access pattern; under the region's ahead_lock
    int64_t stride              # in blocks; 0: unused
    int64_t last                # the furthest block that was really asked for
    int64_t next                # the first that has not been asked for ahead
    uint64_t confirmed          # blocks of the pattern that were reached
    uint64_t stamp              # for replacing the least recently used
    uint64_t owed               # blocks asked for on credit, before the pattern had proved itself

cdef struct BlockError:
    uint64_t block
    uint32_t tries
    int32_t error

cdef struct Region_t:
    # constant from making to closing
    uint64_t id
    char *base
    uint64_t nbytes             # the user's
    uint64_t span               # rounded up to pages
    uint32_t shift              # log2 of the block size
    uint64_t blocks
    int fd                      # its userfaultfd
    int memfd                   # shared backing, else -1
    char *alias                 # shared backing: the second mapping, through which providers write
    bint minor                  # shared backing, and the kernel has CONTINUE
    bint protect                # read faults are filled write-protected
    bint writable
    bint is_inline
    bint poison                 # the kernel has POISON
    bint zeropage
    bint nested                 # FILL_DIRECT from another region's memory, whose faults somebody must serve
    bint hosted                 # its provider runs in another process
    uint32_t asked              # hosted: requests that it has in use
    void *texts                 # hosted: what the host said about failures, beside `error`
    bint slow                   # a fill can take long: its worker counts as busy
    bint wait_for_ever          # on_error="wait"
    uint64_t timeout_ns
    uint32_t retries
    Fill *fill
    Engine_t *engine
    Counters *counters          # STRIPES of them
    uint32_t *state             # one word per block, lazily touched
    uint8_t *known              # one byte per page of words: 1 before the first word of it changes
    char name[80]
    char provider[80]
    # seen by several threads
    uint32_t refs               # who uses it now; it is torn down at 0
    uint32_t closing
    uint32_t stuck              # references held by workers whose fill hangs for good
    uint32_t in_child           # after a fork, shared backing: alias holds the parent's dirty blocks
    uint64_t odd_block          # of the last SIGBUS that was none of ours, with thread delivery; a heuristic, relaxed
    uint32_t odd_count
    uint32_t gone               # torn down: what Python kept alive for it may go
    Region_t *next_dying
    # read-ahead, under ahead_lock (a try-lock: who does not get it leaves the pattern alone)
    uint32_t ahead_lock
    uint32_t history_at
    uint64_t ahead_blocks       # the largest window
    uint64_t clock
    uint64_t credit             # blocks that unproven patterns may still ask for
    int64_t history[HISTORY]
    Stream stream[STREAMS]
    BlockError error[ERRORS]    # the block's number modulo ERRORS; written by who fails it, before POISONED

cdef struct Slot:               # what one thread needs to fill: a worker's own, or borrowed by the SIGBUS handler
    Engine_t *engine
    uint32_t index
    uint32_t kind               # SLOT_*
    uint32_t critical           # inside a change of block states; fork waits for it to be 0
    uint32_t phase              # IDLE, BUSY, PLACING, TIMED_OUT in the low bits, the number of the run above
    uint32_t run                # that number; the owner's own
    uint32_t tid
    int cpu
    char *staging               # private page buffers, staging_bytes of them
    # the run in flight: written by the owner inside `critical`, read by the keeper and by a forked child
    uint64_t region_id
    Region_t *region            # held by the owner's reference for as long as since_ns is not 0
    uint64_t deadline_ns        # when the keeper may take the run away
    uint64_t first
    uint32_t count
    uint32_t cause
    uint32_t write
    uint32_t repair             # pages of the run may be there already: fill aside, place page by page
    uint32_t tries
    int32_t last_error
    uint64_t failed             # the first block of the run that failed for good
    uint64_t since_ns           # 0: nothing in flight
    uint64_t said_ns            # when the keeper last told the user about this fill
    uint32_t pending            # messages of the batch in hand that are not answered yet
    uint32_t nudged             # the keeper had the region's faults asked again, past this slow fill
    # the worker
    int epoll_fd
    int wake_fd
    uint32_t armed
    uint32_t sample
    uint32_t turns
    uint64_t last_id            # of the region that the last fault came from
    uint64_t served             # messages; read by others for placement, relaxed
    uint64_t empty              # wake-ups that found nothing
    uint64_t reviewed           # `served` at the last review of placement
    Job_t *job                    # whose piece the run is, or NULL
    Carrier *carrier            # of a slot that belongs to a request, else NULL
    const char *offered         # the run's bytes, which its provider offered unasked; else NULL
    uint8_t pad[64]

cdef struct Piece:              # some blocks to bring in, or one handed-off fault
    uint64_t region_id
    uint64_t first
    int64_t stride
    uint32_t count
    uint32_t write
    uint64_t since_ns

cdef struct Cell:
    uint64_t turn
    Piece piece

cdef struct Ring:               # bounded, many producers, many consumers, no lock (after D. Vyukov's MPMC queue)
    Cell cell[RING]
    uint64_t head
    uint8_t pad0[56]
    uint64_t tail
    uint8_t pad1[56]

cdef struct Job_t:                # a prefetch or populate; all fields under the engine's job_lock but the last four
    Job_t *next
    uint64_t region_id
    uint32_t kind               # PREFETCH or POPULATE
    uint32_t refs               # the Python object, and the queue
    uint64_t *runs              # pairs: first, end
    uint64_t nruns
    uint64_t at                 # the run being handed out, and the block in it
    uint64_t block
    uint32_t outstanding
    uint32_t queued
    uint64_t since_ns
    uint32_t cancelled
    uint32_t done               # futex
    int32_t error
    uint32_t tries
    uint64_t error_block

cdef struct Engine_t:
    Slot *slots
    uint32_t workers            # base workers, slots 0 .. workers-1
    uint64_t staging_bytes
    int faults_fd               # epoll over the uffds of all regions with thread delivery
    uint32_t stopping
    uint64_t inline_free        # bit per inline slot that is free
    uint32_t inline_turn        # futex: changes whenever an inline slot is given back
    uint64_t idle[2]            # bit per worker that sleeps and may be woken for work
    uint64_t stalled_ns         # since when all workers are busy; 0: not so. The keeper's own
    uint32_t busy               # workers inside a fill that may block
    uint32_t alive              # worker threads, without those that are stuck for ever; futex
    uint32_t keepers            # 1 while the keeper runs; futex
    Ring *demand                # faults that the SIGBUS handler hands to a worker
    Ring *ahead
    pthread_mutex_t job_lock
    Job_t *jobs
    uint32_t jobs_starved       # some wait for a request of a provider host to be free; no other can be served
    uint32_t jobs_waiting       # jobs with pieces to hand out, [populate] + [prefetch]
    int keeper_fd
    uint32_t keeper_alert
    uint32_t follow             # workers are armed by where faults come from
    uint32_t regions            # under registry_lock
    Region_t *dying             # closed, but still in somebody's hands: the keeper's list, under registry_lock
    uint64_t placed             # messages since the last review of placement
    uint32_t placing
    Hosts_t *hosts              # NULL until the first hosted provider
    Session_t *sessions         # under registry_lock
    uint32_t carrier_waiters    # who waits for one
    uint32_t carrier_turn       # futex: changes whenever a request is free again
    uint32_t carriers           # their threads, and those of offers; futex
    uint32_t broken             # a forked child could not start its threads
    uint64_t read_errors
    Engine_t *next              # all engines, under registry_lock
    Counters *closed            # what regions that are gone had counted; under registry_lock

cdef uint64_t SECOND_NS = 1000000000
cdef uint64_t SLICE_NS = 100000000          # of a wait that Python code waits for: then it looks at signals
cdef uint64_t PAGE = <uint64_t>sysconf(_SC_PAGESIZE)
cdef enum:
    RUN_BYTES = 512 * 1024      # of one fill: staging that stays in the second-level cache
    PIECE_BYTES = 512 * 1024    # of read-ahead and prefetch between two looks for demand
    MAX_BLOCK_BYTES = 16 << 20
    STAND_IN_MS = 50            # a stand-in is not woken for work, it looks; so its descriptors can go with it
    EVENT_WAKE = 1              # epoll data of a worker's own set
    EVENT_FAULTS = 2


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
        if message[i].event != UF_EVENT_PAGEFAULT:
            continue                        # no event is asked for; a kernel that sends one anyway is not answered
        b = (message[i].address - <uint64_t>r.base) >> r.shift
        f = <uint32_t>message[i].flags
        if b >= r.blocks:
            continue
        count_fault(s, r, f)
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
    if state == FILLING or state == UNPROTECTING:
        ahead_note(s, r, <int64_t>b)
        if not ask_for_wake(r, b, word):
            return k                        # it changed meanwhile: look again
        return k + 1
    if state == POISONED:
        poison_block(r, b)                  # again, in case the program dropped the page; wakes
        return k + 1
    if write and state == CLEAN:
        while k + n < m and block[k + n] == b + <uint64_t>n and flags[k + n] & UF_FLAG_WRITE:
            n += 1
        n = <int>lift_run(s, r, b, <uint32_t>n)
        if n == 0:
            return k
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
        if r.protect:
            uf_writeprotect(r.fd, <uint64_t>start, len, 0)
        uf_wake(r.fd, <uint64_t>start, len)
    elif block_present(r, b):
        uf_wake(r.fd, <uint64_t>start, len)
    else:
        repair_run(s, r, b, state)


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
            if ask_for_wake(r, b, u32_load(&r.state[b])):
                b += 1
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
    cdef uint32_t word = u32_load(&r.state[b])
    cdef Slot *owner
    if word & STATE_MASK != FILLING or tid == 0:
        return False
    owner = &s.engine.slots[((word >> OWNER_SHIFT) & OWNER_MASK) - 1]
    if u32_load(&owner.tid) != tid:
        return False
    say_own_region(r, b)
    poison_block(r, b)
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
include "_ahead.pxi"
include "_hosted.pxi"
include "_hosts.pxi"
include "_inline.pxi"
include "_native.pxi"
include "_life.pxi"
include "_keeper.pxi"
include "_api.pxi"
include "_hostside.pxi"
include "_hostwrite.pxi"
