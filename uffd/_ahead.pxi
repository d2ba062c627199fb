# Bringing blocks in before the touch: read-ahead by pattern, and the jobs of prefetch and populate.
#
# Uses:     begin_run, finish_run of _fill.pxi; region_acquire of _inline.pxi
# Provides: ahead_note (a demand fault was seen), hand_off (a fault that a worker shall serve), repair_ask (a block that
#           lacks pages), job_post, job_cancel, serve_one_piece (a worker has time), announce_idle, withdraw_idle,
#           wake_worker
#
# Order of service: handed-off faults, populate (somebody waits), read-ahead, prefetch. A worker looks for faults
# between any two pieces, so a touch waits for at most one piece of PIECE_BYTES per worker.

# ---- who sleeps, and who is woken -------------------------------------------------------------------------------

cdef void announce_idle(Engine_t *e, Slot *s) noexcept nogil:
    u64_or(&e.idle[s.index >> 6], <uint64_t>1 << (s.index & 63))
    fence_seq()                             # before we look for work: pairs with the fence of wake_worker


cdef void withdraw_idle(Engine_t *e, Slot *s) noexcept nogil:
    u64_and(&e.idle[s.index >> 6], ~(<uint64_t>1 << (s.index & 63)))


cdef void wake_worker(Engine_t *e) noexcept nogil:
    """Wakes one worker that sleeps, if any does. Called after work was queued."""
    cdef uint64_t bits, bit
    cdef uint32_t half, i
    fence_seq()
    for half in range(2):
        bits = u64_load_seq(&e.idle[half])
        while bits:
            bit = bits & (~bits + 1)
            if u64_and(&e.idle[half], ~bit) & bit:
                i = half * 64 + <uint32_t>u64_log2(bit)
                eventfd_raise(e.slots[i].wake_fd)
                return
            bits = u64_load_seq(&e.idle[half])


cdef bint work_waits(Engine_t *e) noexcept nogil:
    return (not ring_is_empty(e.demand) or not ring_is_empty(e.ahead)
            or u32_load_seq(&e.jobs_waiting) != 0 and not u32_load_seq(&e.jobs_starved))


cdef bint serve_one_piece(Engine_t *e, Slot *s) noexcept nogil:
    """Does one piece of work that is no fault; False when there was none."""
    cdef Piece p
    if ring_take(e.demand, &p):
        serve_piece(s, &p, DEMAND)
        return True
    if job_serve(e, s, POPULATE):
        return True
    if ring_take(e.ahead, &p):
        if not ring_is_empty(e.ahead):
            wake_worker(e)                  # there is more: somebody else may take the next
        serve_piece(s, &p, READAHEAD)
        return True
    return job_serve(e, s, PREFETCH)


cdef void serve_piece(Slot *s, Piece *p, uint32_t cause) noexcept nogil:
    """Fills what is still missing of a piece, or has it filled by a provider host. Where that has its hands full, a
    piece of read-ahead is dropped: it is a hint."""
    cdef Region_t *r = region_acquire(p.region_id)
    if r == NULL:
        return
    stage(s, r, H_QUEUE, now_ns() - p.since_ns)
    if p.stride == 0:
        repair_piece(s, r, p.first)
    elif r.hosted:
        hosted_piece(r, p)
    else:
        if p.ahead:
            source_told(r, <int64_t>p.first + p.ahead, p.stride, p.count)
        fill_piece(s, r, p, cause)
    region_release(r)


cdef void source_told(Region_t *r, int64_t b, int64_t stride, uint32_t n) noexcept nogil:
    """Tells the source of blocks that will be asked for next, so that a disk is at work on them while those before them
    are filled. Not of those that are there, or lie elsewhere."""
    cdef int64_t low = b, count = 1
    if r.fill.ahead == NULL or r.part != NULL or r.in_child:
        return
    if stride == 1 or stride == -1:
        low = b if stride == 1 else b - n + 1
        count = n
        n = 1
    while n and 0 <= low < <int64_t>r.blocks:
        if low + count > <int64_t>r.blocks:
            count = <int64_t>r.blocks - low
        if u32_load(&r.state[low]) & (STATE_MASK | SPILLED) == MISSING:
            r.fill.ahead(r.fill.self, <uint64_t>low << r.shift, run_bytes(r, <uint64_t>low, <uint32_t>count))
        low += stride
        n -= 1


cdef void repair_ask(Region_t *r, uint64_t b) noexcept nogil:
    """Has a worker bring back what the program dropped of a dirty block: without it the block can't be stored. A full
    ring forgets it: who needs it asks again."""
    cdef Piece p
    if r.write_again_ns and now_ns() < r.write_again_ns:
        return
    p.region_id = r.id
    p.first = b
    p.count = 1
    p.stride = 0
    p.write = 1
    p.since_ns = now_ns()
    if ring_put(r.engine.demand, &p):
        wake_worker(r.engine)


cdef void repair_piece(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    cdef uint32_t state = u32_load(&r.state[b]) & STATE_MASK
    if state == POOLED_DIRTY and is_shared(r) and lacks_pages(r, b):
        rescue(s, r, b, True)               # its pages can only be put in where they are missed
        state = u32_load(&r.state[b]) & STATE_MASK
    if state == DIRTY and lacks_pages(r, b) and not u32_load(&r.closing):
        repair_run(s, r, b, DIRTY, REPAIR)


cdef void fill_piece(Slot *s, Region_t *r, Piece *p, uint32_t cause) noexcept nogil:
    cdef uint64_t b = p.first
    cdef uint32_t got, left = p.count
    while left and not u32_load(&r.closing):
        got = 0
        s.no_room = 0
        if b < r.blocks:
            got = begin_run(s, r, b, left if p.stride == 1 else 1, p.write, cause, MISSING)
        if got:
            finish_run(s, r)
            if u32_load(&s.kind) == SLOT_RETIRED:
                break
        elif s.no_room and cause == DEMAND:
            room_wait(s, r, b, p.write)
            continue
        elif s.no_room and not evict_some(r.engine, s):
            break                           # a hint: it is not waited for
        elif s.no_room:
            continue
        else:
            got = 1
        left -= got
        b += <uint64_t>(<int64_t>got * p.stride)


# ---- the rings --------------------------------------------------------------------------------------------------

cdef void ring_init(Ring *q) noexcept nogil:
    cdef uint64_t i
    for i in range(<uint32_t>RING):
        q.cell[i].turn = i
    q.head = 0
    q.tail = 0


cdef bint ring_put(Ring *q, Piece *p) noexcept nogil:
    cdef uint64_t at = u64_load(&q.tail), turn
    while True:
        turn = u64_load(&q.cell[at & (RING - 1)].turn)
        if turn == at:
            if u64_cas(&q.tail, at, at + 1):
                q.cell[at & (RING - 1)].piece = p[0]
                u64_store(&q.cell[at & (RING - 1)].turn, at + 1)
                return True
        elif <int64_t>(turn - at) < 0:
            return False                    # full
        at = u64_load(&q.tail)


cdef bint ring_take(Ring *q, Piece *p) noexcept nogil:
    cdef uint64_t at = u64_load(&q.head), turn
    while True:
        turn = u64_load(&q.cell[at & (RING - 1)].turn)
        if turn == at + 1:
            if u64_cas(&q.head, at, at + 1):
                p[0] = q.cell[at & (RING - 1)].piece
                u64_store(&q.cell[at & (RING - 1)].turn, at + RING)
                return True
        elif <int64_t>(turn - at) <= 0:
            return False                    # empty
        at = u64_load(&q.head)


cdef bint ring_is_empty(Ring *q) noexcept nogil:
    return u64_load_seq(&q.tail) == u64_load_seq(&q.head)


cdef bint hand_off(Region_t *r, uint64_t b, bint write) noexcept nogil:
    """Asks a worker to serve a fault; the caller then sleeps on the block's word. False: full, ask again."""
    cdef Piece p
    p.region_id = r.id
    p.first = b
    p.stride = 1
    p.count = 1
    p.write = write
    p.since_ns = now_ns()
    if not ring_put(r.engine.demand, &p):
        return False
    wake_worker(r.engine)
    return True


# ---- read-ahead -------------------------------------------------------------------------------------------------

cdef void ahead_note(Slot *s, Region_t *r, int64_t b) noexcept nogil:
    """A touch waits, or waited, for block b: continue the pattern it belongs to, or look for a new one.

    A pattern is a constant stride in blocks (negative ones too), first believed when three touches among the last
    HISTORY fit it, in their order. Until PROVEN have fitted it asks for one block at a time, on credit: random touches
    look like patterns for a while, and soon have none left. Then it asks for a sixth of what it has proved so far, at
    least 4 blocks and at most ahead_blocks: what is read in vain when it stops stays a small part of what was used. A
    pattern that is not met again asks for nothing more.
    """
    cdef Stream *st
    cdef int i
    if r.ahead_blocks == 0 or not u32_cas(&r.ahead_lock, 0, 1):
        return
    r.clock += 1
    if r.clock & 31 == 0 and r.credit < CREDIT:
        r.credit += 1
    for i in range(STREAMS):
        st = &r.stream[i]
        if st.stride != 0 and stream_meets(st, b):
            stream_extend(s, r, st, b)
            u32_store(&r.ahead_lock, 0)
            return
    stream_look(s, r, b)
    r.history[r.history_at & (HISTORY - 1)] = b
    r.history_at += 1
    u32_store(&r.ahead_lock, 0)


cdef bint stream_meets(Stream *st, int64_t b) noexcept nogil:
    """Whether b is the next block that was not asked for yet, or one on the way there."""
    cdef int64_t ahead = (b - st.last) * (1 if st.stride > 0 else -1)
    cdef int64_t limit = (st.next - st.last) * (1 if st.stride > 0 else -1)
    return 0 < ahead <= limit and (b - st.last) % st.stride == 0


cdef void stream_extend(Slot *s, Region_t *r, Stream *st, int64_t b) noexcept nogil:
    cdef uint64_t window, ahead
    st.confirmed += <uint64_t>((b - st.last) / st.stride)
    st.last = b
    st.stamp = r.clock
    if st.next == b:
        st.next = b + st.stride
    r.credit = r.credit + st.owed if r.credit + st.owed < CREDIT else CREDIT
    st.owed = 0
    ahead = <uint64_t>((st.next - b) / st.stride) - 1
    if st.confirmed < PROVEN:
        if ahead == 0 and r.credit:
            r.credit -= 1
            st.owed = 1
            stream_ask(s, r, st, 1, 0)
        return
    window = st.confirmed / 6
    if window < 4:
        window = 4
    if window > r.ahead_blocks:
        window = r.ahead_blocks
    if ahead * 2 <= window:
        stream_ask(s, r, st, window - ahead, window)


cdef void stream_ask(Slot *s, Region_t *r, Stream *st, uint64_t n, uint64_t told) noexcept nogil:
    """Queues the stream's next n blocks in pieces. A full queue ends it early: read-ahead is a hint. told: with each
    piece the source is told of the one that lies so many of the stream's blocks behind it."""
    cdef uint64_t per_piece = PIECE_BYTES >> r.shift, pieces = 0, most = TOLD_BYTES >> r.shift
    cdef Piece p
    if per_piece == 0:
        per_piece = 1
    if st.stride != 1 and per_piece > 32:
        per_piece = 32                      # each is an ioctl of its own
    while n and st.next >= 0 and st.next < <int64_t>r.blocks:
        p.region_id = r.id
        p.first = <uint64_t>st.next
        p.stride = st.stride
        p.count = <uint32_t>(per_piece if per_piece < n else n)
        p.write = 0
        p.since_ns = now_ns()
        p.ahead = <int64_t>(told if told < most else most) * st.stride
        if not ring_put(r.engine.ahead, &p):
            break
        st.next += st.stride * <int64_t>p.count
        n -= p.count
        pieces += 1
    if pieces > 1 or pieces and s.kind != SLOT_WORKER:
        wake_worker(r.engine)


cdef void stream_look(Slot *s, Region_t *r, int64_t b) noexcept nogil:
    """Is there a d with b - d among the last touches, and b - 2 d before it? The latest touch is tried first."""
    cdef int i, j
    cdef int64_t d
    for i in range(1, HISTORY + 1):
        d = b - r.history[(r.history_at - i) & (HISTORY - 1)]
        if d == 0 or d > 64 or d < -64:
            continue
        for j in range(i + 1, HISTORY + 1):
            if r.history[(r.history_at - j) & (HISTORY - 1)] == b - 2 * d:
                stream_start(s, r, b, d)
                return


cdef void stream_start(Slot *s, Region_t *r, int64_t b, int64_t stride) noexcept nogil:
    cdef Stream *st = &r.stream[0]
    cdef int i
    for i in range(1, STREAMS):
        if r.stream[i].stamp < st.stamp:
            st = &r.stream[i]
    stream_end(s, r, st)
    st.stride = stride
    st.last = b - stride
    st.next = b
    st.confirmed = 2
    st.owed = 0
    stream_extend(s, r, st, b)


cdef void stream_end(Slot *s, Region_t *r, Stream *st) noexcept nogil:
    """What it asked for beyond the last block that was met counts as wasted; an estimate, there are no access bits."""
    cdef int64_t ahead
    if st.stride != 0:
        ahead = (st.next - st.last) / st.stride - 1
        if ahead > 0:
            count(s, r, C_WASTED, <uint64_t>ahead)
    st.stride = 0


# ---- jobs: prefetch and populate --------------------------------------------------------------------------------

cdef enum:
    JOB_FAILED = 2              # `cancelled` of a populate with an error; 1: somebody cancelled it

cdef void job_post(Engine_t *e, Job_t *j) noexcept nogil:
    """Queues a job, behind those of its kind; wakes a worker. The queue holds a reference."""
    cdef Job_t **at
    pthread_mutex_lock(&e.job_lock)
    j.refs += 1
    j.next = NULL
    j.queued = 1
    at = &e.jobs
    while at[0] != NULL:
        at = &at[0].next
    at[0] = j
    u32_add_seq(&e.jobs_waiting, 1)
    u32_store_seq(&e.jobs_starved, 0)
    pthread_mutex_unlock(&e.job_lock)
    wake_worker(e)
    if j.nruns > 1 or j.runs[1] - j.runs[0] > 1:
        wake_worker(e)


cdef void job_unqueue(Engine_t *e, Job_t *j) noexcept nogil:
    """Takes a job that has nothing more to hand out from the queue. Under job_lock."""
    cdef Job_t **at = &e.jobs
    while at[0] != j:
        at = &at[0].next
    at[0] = j.next
    j.queued = 0
    u32_sub(&e.jobs_waiting, 1)
    job_finish(j)


cdef void job_finish(Job_t *j) noexcept nogil:
    """Ends a job that is out of the queue and has no piece under way. Under job_lock."""
    if not j.queued and j.outstanding == 0 and not u32_load(&j.done):
        u32_store(&j.done, 1)
        futex_wake_all(&j.done)
        job_release(j)                      # the queue's reference


cdef void job_release(Job_t *j) noexcept nogil:
    """Under job_lock."""
    j.refs -= 1
    if j.refs == 0:
        free(j.runs)
        free(j)


cdef void job_cancel(Engine_t *e, Job_t *j) noexcept nogil:
    pthread_mutex_lock(&e.job_lock)
    u32_store(&j.cancelled, 1)
    if j.queued:
        job_unqueue(e, j)
    pthread_mutex_unlock(&e.job_lock)


cdef bint job_serve(Engine_t *e, Slot *s, uint32_t kind) noexcept nogil:
    """One piece of the first job of a kind. False: there is none."""
    cdef Job_t *j
    cdef Region_t *r = NULL
    cdef Slot *by = NULL
    cdef uint64_t first = 0, n = 0, end = 0, told
    if u32_load_seq(&e.jobs_waiting) == 0:
        return False
    pthread_mutex_lock(&e.job_lock)
    j = job_ready(e, s, kind, &r, &by)
    if j != NULL:
        if r == NULL:
            u32_store(&j.cancelled, 1)
            job_unqueue(e, j)
        else:
            j.outstanding += 1
            by.job = j                      # under the lock that fork() takes: a child finds every piece under way
            end = j.runs[2 * j.at + 1]
            job_next_piece(e, j, r.shift, &first, &n)
    pthread_mutex_unlock(&e.job_lock)
    if j == NULL:
        return False
    if r != NULL:
        if r.hosted:
            hosted_job(by, r, j, first, n)
        else:
            told = first + (<uint64_t>TOLD_BYTES >> r.shift)
            if told < end:
                source_told(r, <int64_t>told, 1, <uint32_t>(n if n < end - told else end - told))
            job_fill(e, s, j, r, first, n)
        region_release(r)
    return True


cdef Job_t *job_ready(Engine_t *e, Slot *s, uint32_t kind, Region_t **r, Slot **by) noexcept nogil:
    """The first job of a kind for which there is a slot: the worker's own, or a free request of a provider host. Its
    region with a reference, NULL when that is closed. Under job_lock."""
    cdef Job_t *j = e.jobs
    while j != NULL:
        if j.kind == kind:
            r[0] = region_acquire(j.region_id)
            by[0] = s
            if r[0] != NULL and r[0].hosted:
                by[0] = carrier_borrow(e, r[0], False)
                if by[0] == NULL:
                    u32_store_seq(&e.jobs_starved, 1)
                    fence_seq()             # pairs with carrier_return
                    by[0] = carrier_borrow(e, r[0], False)
            if by[0] != NULL:
                u32_store(&e.jobs_starved, 0)
                return j
            region_release(r[0])
            r[0] = NULL
        j = j.next
    return NULL


cdef void job_next_piece(Engine_t *e, Job_t *j, uint32_t shift, uint64_t *first, uint64_t *n) noexcept nogil:
    """Under job_lock: the next piece; the job leaves the queue with its last one."""
    cdef uint64_t most = PIECE_BYTES >> shift
    cdef uint64_t end = j.runs[2 * j.at + 1]
    if most == 0:
        most = 1
    first[0] = j.block
    n[0] = end - j.block if end - j.block < most else most
    j.block += n[0]
    if j.block == end:
        j.at += 1
        if j.at < j.nruns:
            j.block = j.runs[2 * j.at]
    j.handed_bytes += n[0] << shift
    if j.at == j.nruns:
        job_unqueue(e, j)                   # it ends with the last piece that is under way
    elif j.kind == PREFETCH and j.handed_bytes > u64_load(&e.limit) / 2:
        job_unqueue(e, j)                   # more would only drive out what it has brought


cdef void job_fill(Engine_t *e, Slot *s, Job_t *j, Region_t *r, uint64_t first, uint64_t n) noexcept nogil:
    """A piece; in the name of a request of a provider host also those after it, for as long as nothing else is to be
    done first: to hand each of them out anew takes a worker, and wakes two threads."""
    while job_piece(e, s, j, r, first, n) and job_goes_on(e, s, r, &first, &n):
        pass


cdef bint job_piece(Engine_t *e, Slot *s, Job_t *j, Region_t *r, uint64_t first, uint64_t n) noexcept nogil:
    """False: the keeper has ended it in our place."""
    cdef uint64_t b = first, end = first + n
    cdef uint32_t got
    cdef int err
    stage(s, r, H_QUEUE, now_ns() - j.since_ns)
    while b < end and not job_ends(j, b) and not u32_load(&r.closing):
        got = begin_run(s, r, b, <uint32_t>(end - b), False, j.kind, MISSING)
        if got == 0 and (s.no_room or job_rescue(s, r, b)):
            if s.no_room and not job_waits(e, s, j):
                break
            continue
        if got == 0 and j.kind == POPULATE:
            got = begin_run(s, r, b, 1, False, POPULATE, POISONED)
            if got:
                unpoison_pages(r, b)
        if got == 0:
            b += 1
            continue
        err = finish_run(s, r)
        if u32_load(&s.kind) == SLOT_RETIRED:
            return False
        b += got
        if err != 0:
            job_fail(e, j, err, s.failed, s.tries)
    return True


cdef bint job_goes_on(Engine_t *e, Slot *s, Region_t *r, uint64_t *first, uint64_t *n) noexcept nogil:
    """The slot's piece has ended. Whether it got the next one of its job: not where a worker drives it, who looks for
    faults in between, and not before what goes first."""
    cdef Job_t *j
    cdef bint more
    pthread_mutex_lock(&e.job_lock)
    j = s.job
    more = s.carrier != NULL and j.queued and not u32_load(&r.closing) and carrier_may_stay(s) \
        and ring_is_empty(e.demand) and ring_is_empty(e.ahead) and not job_precedes(e, j)
    if more:
        job_next_piece(e, j, r.shift, first, n)
    else:
        job_piece_ends(s)
    pthread_mutex_unlock(&e.job_lock)
    return more


cdef void job_piece_ends(Slot *s) noexcept nogil:
    """The slot's piece has ended. Under job_lock."""
    cdef Job_t *j = s.job
    s.job = NULL
    j.outstanding -= 1
    job_finish(j)


cdef void job_piece_done(Engine_t *e, Slot *s) noexcept nogil:
    pthread_mutex_lock(&e.job_lock)
    job_piece_ends(s)
    pthread_mutex_unlock(&e.job_lock)


cdef bint job_precedes(Engine_t *e, Job_t *j) noexcept nogil:
    """Whether another job is to be served before this one. Under job_lock."""
    cdef Job_t *other = e.jobs
    while other != NULL and other != j:
        if other.kind == POPULATE or other.kind == j.kind:
            return True
        other = other.next
    while other != NULL and j.kind == PREFETCH:
        if other.kind == POPULATE:
            return True
        other = other.next
    return False


cdef bint job_rescue(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    """A block that waits in the pool comes back; True: it is there, or s.no_room says why not."""
    return rescue(s, r, b, False) or s.no_room


cdef bint job_waits(Engine_t *e, Slot *s, Job_t *j) noexcept nogil:
    """A piece finds no room: it makes some, or waits a moment. False: a prefetch that the budget can't hold, whose rest
    is left; a populate has its blocks pinned and accounted for, so that there will be room."""
    if evict_some(e, s):
        return True
    if j.kind == PREFETCH:
        return False
    evictor_ring(e)
    poll(NULL, 0, 1)
    return not u32_load(&e.stopping)


cdef inline bint job_ends(Job_t *j, uint64_t b) noexcept nogil:
    """Whether block b is not to be filled any more. After an error the blocks before it are: one may fail, too."""
    cdef uint32_t cancelled = u32_load(&j.cancelled)
    return cancelled == 1 or cancelled == JOB_FAILED and b > u64_load(&j.error_block)


cdef void job_fail(Engine_t *e, Job_t *j, int err, uint64_t b, uint32_t tries) noexcept nogil:
    """The error of a job's lowest block; populate hands out no more then, prefetch goes on."""
    pthread_mutex_lock(&e.job_lock)
    if j.error == 0 or b < j.error_block:
        j.error = err
        u64_store(&j.error_block, b)
        j.tries = tries
    if j.kind == POPULATE:
        u32_cas(&j.cancelled, 0, JOB_FAILED)
        if j.queued:
            job_unqueue(e, j)
    pthread_mutex_unlock(&e.job_lock)
