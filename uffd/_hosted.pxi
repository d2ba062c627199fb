# Hosted providers, the engine's side: requests to another process, which runs Python.
#
# Uses:     _host.h; the fills of _fill.pxi, the jobs and pieces of _ahead.pxi, the slots of _core.pyx
# Provides: carrier_borrow, carrier_return, hosted_run (a touch), hosted_piece, hosted_job (work handed out), host_fill
#           (what obtain calls), inline_hosted; host_post, host_answer, note_text (a request, for _hostwrite.pxi)
#
# A *carrier* is a slot that belongs to one request of one host: its staging buffer is the request's page buffer, which
# the host has mapped too. Who wants a block filled borrows a carrier, claims the block in its name and posts the
# request. Whoever *drives* the carrier then waits for the answer, places the pages and gives it back: the worker that
# read the fault, for as long as answers lately took; the toucher itself, with inline delivery; else the carrier's own
# thread, to which the worker passes it on, so that no worker waits for Python code. One drives at a time.

cdef enum:
    SHARE = 24                              # requests of one host that one region may have
    SPARE = 8                               # requests kept for touches: work that nobody waits for leaves them alone
    WRITES = 8                              # of one host at once, so that touches find others
    THREAD_TRIES = 3                        # for a carrier's thread
    NO_BLOCK = -1                           # the block under which the text of a failed flush is noted
    T_RUN = 1                               # what a carrier's thread is to do: end the run that was posted,
    T_PIECE = 2                             # fill a piece of read-ahead,
    T_JOB = 3                               # or of a prefetch or populate,
    T_DRAIN = 4                             # wait for an answer that nobody wants any more,
    T_WRITE = 5                             # or write blocks back, which its buffer holds
    HOST_DOWN = 0
    HOST_UP = 1
    HOST_BROKEN = 2                         # it can't be started: requests fail
    LOST_BY_OTHERS = 1                      # `error` of a lost request whose host was killed for another's sake
    STARTS = 4                              # hosts that ended before they took a request, until it counts as broken
cdef uint64_t SPIN_NS = 60000               # answers that take longer are waited for asleep

cdef struct Carrier:
    Slot *s
    Host_t *h
    host_request *q
    uint32_t index
    uint32_t baton                          # futex: T_* while its thread has it in hand, 0 when the thread has nothing
    uint32_t threaded                       # its thread was started
    Region_t *counted                       # whose share of requests it is of, or NULL
    uint32_t writes                         # it counts in its host's `writing`
    # the request in flight: of who drives
    uint64_t posted_offset                  # what was posted, and not waited for yet
    uint64_t posted_bytes                   # 0: nothing
    uint64_t posted_ns
    uint64_t touched                        # bytes of its buffer that have pages, at the most
    uint32_t lost                           # of OPEN: hosts that died with it
    # what its thread is to do: written before the baton
    Region_t *region
    uint32_t demand_write
    Piece piece
    Job_t *job
    uint64_t first
    uint64_t count

cdef struct Session_t:                      # a provider of one region: under registry_lock
    Session_t *next
    uint64_t id
    int pickle_fd                           # -1 once it has ended
    uint32_t untold                         # it has ended, and the hosts of these bits are to hear of it yet
    uint64_t block_bytes
    char name[80]

cdef struct Host_t:                         # one process
    Engine_t *engine
    uint32_t index
    host_channel *channel
    int memfd
    Carrier carrier[HOST_REQUESTS]
    Slot *offers                            # the slot in whose name offered blocks are placed
    uint32_t offering                       # its thread was started
    uint64_t free                           # bit per carrier
    uint32_t writing                        # carriers lent for writes
    uint32_t wanted                         # somebody posted: it is to run
    uint32_t state                          # HOST_*: the keeper's, read by all
    uint32_t kill_generation                # the host of that generation is to be killed: a request of it is late
    uint64_t latency_ns                     # of answers, smoothed; a heuristic, relaxed
    uint64_t answered_ns                    # when the last one came
    # the keeper's own
    int control_fd
    int pid
    int pidfd
    host_message owed                       # a question that is not answered yet, if `owes`; it asks one at a time
    bint owes
    uint32_t failures                       # ends in a row without a request taken
    uint64_t again_ns                       # not started before
    uint64_t begun_ns                       # when the process that runs was started
    int32_t last_status                     # of wait()

cdef struct Hosts_t:                        # what is needed to start hosts; constant
    uint32_t n
    char **argv                             # the descriptors' numbers are its last two, written at each start
    char **envp
    char *memory                            # what argv and envp lie in
    bint debug
    uint64_t start_ns                       # a process that is not ready after that is stopped
    Host_t host[1]

cdef uint64_t session_next = 1              # under registry_lock


# ---- carriers ---------------------------------------------------------------------------------------------------

cdef Slot *carrier_borrow(Engine_t *e, Region_t *r, bint urgent) noexcept nogil:
    """A free request of the host that has most of them, or NULL. Not urgent: the last SPARE are left alone. r, if not
    NULL, may have SHARE of them per host: one whose provider hangs leaves some to the others."""
    if r != NULL and u32_load(&r.asked) >= SHARE * (1 if r.fill.one_host else e.hosts.n):
        return NULL
    return carrier_take(e, r.fill if r != NULL else NULL, r, 0 if urgent else SPARE)


cdef Slot *carrier_take(Engine_t *e, const Fill *fill, Region_t *counted, int least) noexcept nogil:
    """A free request of a host that has more than `least` of them and may have the provider, or NULL."""
    cdef Host_t *h
    cdef Host_t *best
    cdef uint64_t bits, bit
    cdef int most, n
    cdef uint32_t i
    while True:
        best = NULL
        most = least
        for i in range(e.hosts.n):
            h = &e.hosts.host[i]
            if fill != NULL and fill.one_host and fill.one_host != i + 1:
                continue
            n = u64_count(u64_load(&h.free))
            if n and u32_load(&h.state) == HOST_BROKEN:
                n = 1                       # only where there is no other: its requests fail
            if n > most:
                most = n
                best = h
        if best == NULL:
            return NULL
        bits = u64_load(&best.free)
        bit = bits & (~bits + 1)
        if bit and u64_cas(&best.free, bits, bits & ~bit):
            best.carrier[u64_log2(bit)].posted_bytes = 0
            best.carrier[u64_log2(bit)].lost = 0
            best.carrier[u64_log2(bit)].writes = 0
            best.carrier[u64_log2(bit)].counted = counted
            if counted != NULL:
                u32_add(&counted.asked, 1)
            return best.carrier[u64_log2(bit)].s


cdef Slot *carrier_wait(Engine_t *e, Region_t *r) noexcept nogil:
    """The same for a touch: sleeps while all are in use."""
    cdef uint32_t turn
    cdef Slot *c
    u32_add_seq(&e.carrier_waiters, 1)
    while True:
        turn = u32_load(&e.carrier_turn)
        c = carrier_borrow(e, r, True)
        if c != NULL:
            u32_sub(&e.carrier_waiters, 1)
            return c
        futex_wait(&e.carrier_turn, turn, SECOND_NS)


cdef void carrier_return(Slot *c) noexcept nogil:
    cdef Carrier *k = c.carrier
    cdef Engine_t *e = c.engine
    u32_store(&c.tid, 0)
    if k.counted != NULL:                   # the caller still has its reference
        u32_sub(&k.counted.asked, 1)
    if k.writes:
        u32_sub(&k.h.writing, 1)
    u32_store(&k.q.word, (u32_load(&k.q.word) & ~<uint32_t>REQ_STATE) | REQ_FREE)
    u64_or(&k.h.free, <uint64_t>1 << k.index)
    u32_add_seq(&e.carrier_turn, 1)
    if u32_load_seq(&e.carrier_waiters):
        futex_wake_all(&e.carrier_turn)
    fence_seq()                             # pairs with job_ready: it says that it found none, then looks again
    if u32_load(&e.jobs_starved):
        u32_store(&e.jobs_starved, 0)
        wake_worker(e)


cdef bint carrier_may_stay(Slot *c) noexcept nogil:
    """Whether who has a request that is not urgent may use it again, as one that is borrowed now."""
    return u32_load_seq(&c.engine.carrier_waiters) == 0 and u64_count(u64_load(&c.carrier.h.free)) >= <int>SPARE


cdef void carrier_pass(Slot *c, Region_t *r, uint32_t task) noexcept nogil:
    """Hands a carrier to its own thread, with a reference to the region. Where the system gives no thread the caller
    does its work: a touch waits for it."""
    cdef Carrier *k = c.carrier
    cdef Engine_t *e = c.engine
    cdef unsigned int tries
    k.region = r
    if r != NULL:
        u32_add_seq(&r.refs, 1)
    u32_store(&k.baton, task)
    if u32_load(&k.threaded):
        futex_wake_all(&k.baton)
        return
    u32_store(&k.threaded, 1)
    u32_add(&e.carriers, 1)
    for tries in range(THREAD_TRIES):
        if thread_spawn(&carrier_main, k, b"uffd-carrier", -1) == 0:
            return
        nap(tries)
    u32_store(&k.threaded, 0)               # before it is given back: the next one to borrow it tries again
    carrier_work(k)
    u32_sub(&e.carriers, 1)
    futex_wake_all(&e.carriers)


cdef void *carrier_main(void *argument) noexcept nogil:
    """A carrier's thread: ends what a worker has begun in its name."""
    cdef Carrier *k = <Carrier *>argument
    cdef Engine_t *e = k.s.engine
    while True:
        if u32_load(&k.baton):
            carrier_work(k)
        elif u32_load(&e.stopping):
            break
        else:
            futex_wait(&k.baton, 0, SECOND_NS)
    u32_sub(&e.carriers, 1)
    futex_wake_all(&e.carriers)
    return NULL


cdef void carrier_work(Carrier *k) noexcept nogil:
    """Does what the baton says, and gives the carrier and the region's reference back."""
    cdef Region_t *r = k.region
    cdef uint32_t task = u32_load(&k.baton)
    if task == T_RUN:
        finish_run(k.s, r)
    elif task == T_PIECE:
        fill_piece(k.s, r, &k.piece, READAHEAD)
    elif task == T_JOB:
        job_fill(r.engine, k.s, k.job, r, k.first, k.count)
    elif task == T_WRITE:
        write_hosted(k.s, r)
    else:
        k.s.deadline_ns = now_ns() + k.count
        host_answer(k.s, k.count, NULL)
    u32_store(&k.baton, 0)
    carrier_return(k.s)
    if r != NULL:
        region_release(r)


# ---- what workers and touchers call -----------------------------------------------------------------------------

cdef uint32_t hosted_run(Slot *s, Region_t *r, uint64_t b, uint32_t n, bint write, bint alone) noexcept nogil:
    """A touch of missing blocks: claims up to n of them from b on, asks for them, and ends the run or passes it on. How
    many it claimed. alone: no other fault waits for this worker, it may wait a little for the answer."""
    cdef Slot *c = carrier_borrow(r.engine, r, True)
    cdef uint32_t got
    if c == NULL:
        enter_blocking(s)
        c = carrier_wait(r.engine, r)
        leave_blocking(s)
    got = begin_run(c, r, b, n, write, DEMAND, MISSING)
    if got == 0:
        s.no_room = c.no_room
        carrier_return(c)
        return 0
    s.room_since_ns = 0
    host_post_run(c, r)
    ahead_note(s, r, <int64_t>(b + got - 1))
    if alone and host_watch(c) and u32_load(&c.carrier.q.word) & REQ_STATE == REQ_DONE and c.carrier.q.error == 0:
        finish_run(c, r)
        carrier_return(c)
    else:
        carrier_pass(c, r, T_RUN)           # an error, too: it is retried, with pauses
    return got


cdef void hosted_repair(Slot *s, Region_t *r, uint64_t b, uint32_t state, uint32_t cause) noexcept nogil:
    """A block of which the program dropped pages is asked for again: in the SIGBUS handler by the toucher itself, else
    by the request's own thread."""
    cdef Slot *c = carrier_borrow(r.engine, r, True)
    if c == NULL:
        enter_blocking(s)
        c = carrier_wait(r.engine, r)
        leave_blocking(s)
    if s.kind == SLOT_INLINE:
        u32_store(&c.tid, <uint32_t>thread_id())
    if not begin_run(c, r, b, 1, state == DIRTY, cause, state):
        uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))
        carrier_return(c)
        return
    count(c, r, C_REPAIRED, 1)
    host_post_run(c, r)
    if s.kind == SLOT_INLINE:
        finish_run(c, r)
        carrier_return(c)
    else:
        carrier_pass(c, r, T_RUN)


cdef bint hosted_piece(Region_t *r, Piece *p) noexcept nogil:
    """Read-ahead; False when no request is free."""
    cdef Slot *c = carrier_borrow(r.engine, r, False)
    if c == NULL:
        return False
    c.carrier.piece = p[0]
    carrier_pass(c, r, T_PIECE)
    return True


cdef void hosted_job(Slot *c, Region_t *r, Job_t *j, uint64_t first, uint64_t n) noexcept nogil:
    c.carrier.job = j
    c.carrier.first = first
    c.carrier.count = n
    carrier_pass(c, r, T_JOB)


cdef int inline_hosted(Region_t *r, uint64_t b, bint write) noexcept nogil:
    """In the SIGBUS handler: the toucher drives its request itself. BUS_NOT_OURS: look at the block's state again."""
    cdef Slot *c = carrier_wait(r.engine, r)
    cdef Slot *s
    cdef uint32_t got
    u32_store(&c.tid, <uint32_t>thread_id())
    got = begin_run(c, r, b, 1, write, DEMAND, MISSING)
    if got == 0 and c.no_room:
        s = inline_borrow(r.engine)
        while got == 0 and c.no_room:
            carrier_return(c)               # not kept meanwhile: what makes room may need one
            room_wait(s, r, b, write)
            c = carrier_wait(r.engine, r)
            u32_store(&c.tid, <uint32_t>thread_id())
            got = begin_run(c, r, b, 1, write, DEMAND, MISSING)
        inline_return(r.engine, s)
    if got:
        host_post_run(c, r)
        count(c, r, C_FAULTS_WRITE if write else C_FAULTS_READ, 1)
        ahead_note(c, r, <int64_t>b)
        host_watch(c)
        finish_run(c, r)
    carrier_return(c)
    return BUS_SERVED if got and u32_load(&r.state[b]) & STATE_MASK != POISONED else BUS_NOT_OURS


# ---- a request --------------------------------------------------------------------------------------------------

cdef void host_post(Slot *c, uint32_t kind, uint64_t session, uint64_t offset, uint64_t nbytes, uint32_t urgent,
                    bint in_place) noexcept nogil:
    cdef Carrier *k = c.carrier
    cdef Host_t *h = k.h
    cdef host_channel *ch = h.channel
    cdef host_request *q = k.q
    cdef uint64_t now = now_ns(), gap = now - u64_load(&ch.posted_ns)
    u64_store(&ch.posted_ns, now)
    u64_store(&ch.gap_ns, (u64_load(&ch.gap_ns) * 7 + (gap if gap < SECOND_NS else SECOND_NS)) / 8)
    q.kind = kind
    q.session = session
    q.offset = offset
    q.nbytes = nbytes
    q.urgent = urgent
    q.in_place = in_place
    q.error = 0
    q.text_bytes = 0
    q.order = u64_add(&ch.order, 1)
    k.posted_offset = offset
    k.posted_bytes = nbytes
    k.posted_ns = now
    if nbytes > k.touched and not in_place:
        k.touched = nbytes
    u32_store(&q.word, (u32_load(&q.word) & ~<uint32_t>REQ_STATE) + REQ_SEQUENCE | REQ_POSTED)
    u64_or(&ch.posted, <uint64_t>1 << k.index)
    u32_add_seq(&ch.doorbell, 1)
    if u32_load_seq(&ch.sleepers):
        futex_wake_shared(&ch.doorbell, 1)
    if u32_load(&h.state) != HOST_UP and u32_swap(&h.wanted, 1) == 0:
        eventfd_raise(h.engine.keeper_fd)


cdef void host_post_run(Slot *c, Region_t *r) noexcept nogil:
    """Asks for the whole run of a carrier."""
    host_prepare(c, r, c.first << r.shift, run_bytes(r, c.first, c.count))


cdef int host_prepare(Slot *c, Region_t *r, uint64_t offset, uint64_t nbytes) noexcept nogil:
    cdef bint in_place = r.minor and not c.repair
    if lies_elsewhere(r, offset >> r.shift):
        return 0                            # obtain finds them there
    if in_place and fallocate(r.memfd, 0, <int64_t>offset, <int64_t>page_round(nbytes)) != 0:
        return -errno
    host_post(c, REQ_READ, r.fill.session, offset, nbytes, 2 if c.cause == DEMAND else c.cause == POPULATE, in_place)
    return 0


cdef bint host_watch(Slot *c) noexcept nogil:
    """Waits awake for the answer, for as long as answers lately took, if that was not long. Whether it is there."""
    cdef Carrier *k = c.carrier
    cdef uint64_t usual = u64_load(&k.h.latency_ns), end
    cdef uint32_t word = u32_load(&k.q.word)
    if usual > SPIN_NS or u32_load(&k.h.state) != HOST_UP:
        return False
    end = k.posted_ns + 2 * usual + 10000
    while word & REQ_STATE == REQ_POSTED or word & REQ_STATE == REQ_TAKEN:
        if now_ns() > end:
            return False
        cpu_relax()
        word = u32_load(&k.q.word)
    return True


cdef int host_fill(Slot *c, Region_t *r, uint64_t offset, uint64_t nbytes) noexcept nogil:
    """The bytes of [offset, offset + nbytes) in the carrier's buffer, or in the region's own shared pages. 0 or -errno,
    with the host's text noted for the block."""
    cdef Carrier *k = c.carrier
    cdef int err
    if k.posted_bytes != nbytes or k.posted_offset != offset:
        err = host_prepare(c, r, offset, nbytes)
        if err != 0:
            return err
    err = host_answer(c, r.timeout_ns, &r.closing if c.cause == DEMAND and r.wait_for_ever else NULL)
    k.posted_bytes = 0
    if err != 0:
        note_text(r, offset >> r.shift, k)
    return err


cdef int host_answer(Slot *c, uint64_t timeout_ns, uint32_t *until) noexcept nogil:
    """Waits for the answer to what was posted, until the slot's deadline: its error number, -ETIMEDOUT, or -ECONNRESET
    when the host died with it. until: not NULL: it is never late before this is not 0.

    What is lost because the host was killed for another's sake is asked for again, with all its time.

    The time that a request waits for its turn is not its own; it is late there only if the host answers nobody. Then
    it is taken back. For a late one that the host has taken the host is killed: a thread of Python can't be ended,
    and the buffer is not ours before that.
    """
    cdef Carrier *k = c.carrier
    cdef Host_t *h = k.h
    cdef host_request *q = k.q
    cdef uint64_t now, deadline = c.deadline_ns, limit
    cdef uint32_t word, generation
    cdef bint late = False
    while True:
        generation = u32_load(&h.channel.generation)    # before the word: not of a host that came after
        word = u32_load(&q.word)
        now = now_ns()
        if word & REQ_STATE == REQ_DONE:
            note_latency(h, now - k.posted_ns)
            u64_store(&h.answered_ns, now)
            c.deadline_ns += queued_ns(k, now)
            return q.error if -ERRNO_MAX <= q.error <= 0 else -EIO
        if word & REQ_STATE == REQ_LOST:
            if late or q.error != LOST_BY_OTHERS:
                return -ETIMEDOUT if late else -ECONNRESET
            host_post(c, q.kind, q.session, q.offset, q.nbytes, q.urgent, q.in_place)
            deadline = now + timeout_ns
            c.deadline_ns = deadline
            continue
        if word & REQ_STATE == REQ_POSTED and u32_load(&h.state) == HOST_BROKEN and host_unpost(k, word):
            return -ECHILD
        if word & REQ_STATE == REQ_TAKEN:
            limit = deadline + queued_ns(k, now)
        else:
            limit = u64_load(&h.answered_ns) + timeout_ns
            limit = limit if limit > deadline else deadline
        if now >= limit and not late and not h.engine.hosts.debug and (until == NULL or u32_load(until)):
            if word & REQ_STATE == REQ_POSTED and host_unpost(k, word):
                return -ETIMEDOUT
            late = True
            u32_store(&h.kill_generation, generation)
            eventfd_raise(h.engine.keeper_fd)
        futex_wait_shared(&q.word, word, limit - now if now < limit < now + SECOND_NS else SECOND_NS / 4)


cdef int open_look(Slot *c, uint32_t retries, uint64_t deadline) noexcept nogil:
    """Waits a little for the answer to an OPEN: 1 when it is not there yet, else 0 or -errno."""
    cdef Carrier *k = c.carrier
    cdef host_request *q = k.q
    cdef uint32_t word = u32_load(&q.word), state = word & REQ_STATE
    cdef uint64_t now = now_ns()
    if state == REQ_LOST:
        k.lost += q.error != LOST_BY_OTHERS
        if k.lost > retries:
            return -ECONNRESET
        host_post(c, REQ_OPEN, q.session, 0, 0, 2, False)
        return 1
    if state == REQ_DONE or state == REQ_POSTED and u32_load(&k.h.state) == HOST_BROKEN:
        c.deadline_ns = now + SECOND_NS
        return host_answer(c, SECOND_NS, NULL)
    if now >= deadline and not k.h.engine.hosts.debug:
        c.deadline_ns = now
        return host_answer(c, 0, NULL)
    futex_wait_shared(&q.word, word, SLICE_NS if deadline <= now or deadline - now > SLICE_NS else deadline - now)
    return 1


cdef uint64_t queued_ns(Carrier *k, uint64_t now) noexcept nogil:
    """How long a taken request waited for its turn, as the host tells."""
    cdef uint64_t taken = u64_load(&k.q.taken_ns)
    if taken > now:
        taken = now
    return taken - k.posted_ns if taken > k.posted_ns else 0


cdef void note_latency(Host_t *h, uint64_t ns) noexcept nogil:
    u64_store(&h.latency_ns, (u64_load(&h.latency_ns) * 7 + (ns if ns < SECOND_NS else SECOND_NS)) / 8)


cdef bint host_unpost(Carrier *k, uint32_t word) noexcept nogil:
    """Takes a request back that the host has not taken."""
    if not u32_cas(&k.q.word, word, word & ~<uint32_t>REQ_STATE | REQ_FREE):
        return False
    u64_and(&k.h.channel.posted, ~(<uint64_t>1 << k.index))
    return True


# ---- the host's own words about a failure -----------------------------------------------------------------------

cdef enum:
    TEXT_BYTES = 4080                       # 64 blocks' texts are a quarter of a megabyte, and only if they fail

cdef struct Text:                           # of a failed block; beside Region_t.error, by the same index
    uint64_t block
    uint64_t nbytes
    char text[TEXT_BYTES]


cdef void note_text(Region_t *r, uint64_t b, Carrier *k) noexcept nogil:
    """Keeps the end of the host's text: there the exception is named. Written by who owns the block."""
    cdef Text *t = <Text *>r.texts + (b & (ERRORS - 1))
    cdef uint64_t n = k.q.text_bytes, cut = 0
    if r.texts == NULL:
        return
    if n > HOST_TEXT_BYTES:
        n = HOST_TEXT_BYTES
    if n > TEXT_BYTES:
        cut = n - TEXT_BYTES
    if u32_load(&k.q.word) & REQ_STATE != REQ_DONE:
        n = 0
        cut = 0
    t.block = b
    t.nbytes = n - cut
    memcpy(t.text, &k.q.text[cut], n - cut)


cdef Text *text_of(Region_t *r, uint64_t b) noexcept nogil:
    """What the host said about the last failure of block b, or NULL."""
    cdef Text *t = <Text *>r.texts + (b & (ERRORS - 1))
    if r.texts == NULL or t.block != b or t.nbytes == 0 or t.nbytes > TEXT_BYTES:
        return NULL
    return t


# ---- blocks that nobody asked for -------------------------------------------------------------------------------

cdef void *offers_main(void *argument) noexcept nogil:
    """One thread per host: places what its providers offer. The host waits for it meanwhile."""
    cdef Host_t *h = <Host_t *>argument
    cdef Engine_t *e = h.engine
    cdef host_offer *o = &h.channel.offer
    cdef uint32_t word
    while not u32_load(&e.stopping):
        word = u32_load(&o.word)
        if word != REQ_POSTED:
            futex_wait_shared(&o.word, word, SECOND_NS / 4)
            continue
        o.taken = place_offer(h, o)
        if u32_cas(&o.word, REQ_POSTED, REQ_DONE):
            futex_wake_shared(&o.word, 1)
    u32_sub(&e.carriers, 1)
    futex_wake_all(&e.carriers)
    return NULL


cdef uint32_t place_offer(Host_t *h, host_offer *o) noexcept nogil:
    """Places the blocks that rows cover whole and that are missing; how many. The numbers are another process's: each
    is checked."""
    cdef Slot *s = h.offers
    cdef Region_t *r = region_of_session(h.engine, o.session)
    cdef uint64_t row, at, end, rows = o.rows, row_bytes = o.row_bytes, step = o.step, start = o.offset, b
    cdef uint32_t taken = 0
    if r == NULL:
        return 0
    if row_bytes and rows <= HOST_BUFFER_BYTES / row_bytes:
        for row in range(rows):
            at = start + row * step
            end = at + row_bytes
            if at > r.nbytes or end > r.nbytes or u32_load(&r.closing):
                break
            b = (at + (<uint64_t>1 << r.shift) - 1) >> r.shift
            while b < r.blocks and (b << r.shift) + run_bytes(r, b, 1) <= end:
                taken += place_offered(h, r, b, s.staging + row * row_bytes + ((b << r.shift) - at))
                b += 1
    region_release(r)
    return taken


cdef uint32_t place_offered(Host_t *h, Region_t *r, uint64_t b, const char *bytes) noexcept nogil:
    """One offered block: 1 if it was missing and is there now."""
    cdef Slot *s = h.offers
    if u32_load(&r.state[b]) & STATE_MASK != MISSING or run_bytes(r, b, 1) & (PAGE - 1):
        return 0                            # the last block may end inside a page: it is asked for
    if is_outdated(h, r, b) or not begin_run(s, r, b, 1, False, READAHEAD, MISSING):
        return 0
    s.offered = bytes
    s.refused = is_outdated(h, r, b)        # now that it is ours: it may have been written, and gone, since that look
    finish_run(s, r)
    s.offered = NULL
    return u32_load(&r.state[b]) & STATE_MASK == CLEAN or u32_load(&r.state[b]) & STATE_MASK == DIRTY


cdef bint is_outdated(Host_t *h, Region_t *r, uint64_t b) noexcept nogil:
    """Whether the program may have written something else to missing block b than its provider offers: it lies
    elsewhere, or the provider acknowledged a write since the call began that offers. Which call that is nobody says:
    the oldest one under way counts."""
    cdef uint64_t stored = u64_load(&r.stored_ns)
    cdef host_request *q
    cdef uint32_t i
    cdef bint called = False
    if lies_elsewhere(r, b):
        return True
    for i in range(HOST_REQUESTS if stored else 0):
        q = &h.channel.request[i]
        if u32_load(&q.word) & REQ_STATE == REQ_TAKEN and q.kind == REQ_READ and q.session == r.fill.session:
            called = True
            if u64_load(&q.taken_ns) <= stored:
                return True
    return stored != 0 and not called


cdef Region_t *region_of_session(Engine_t *e, uint64_t session) noexcept nogil:
    """The region with a reference, or NULL."""
    cdef Region_t *r = NULL
    cdef uint64_t i
    pthread_mutex_lock(&registry_lock)
    if snapshot != NULL:
        for i in range(snapshot.n):
            if snapshot.entry[i].region.engine == e and snapshot.entry[i].region.fill.session == session and session:
                r = snapshot.entry[i].region
                if u32_load(&r.closing):
                    r = NULL
                else:
                    u32_add_seq(&r.refs, 1)
                break
    pthread_mutex_unlock(&registry_lock)
    return r
