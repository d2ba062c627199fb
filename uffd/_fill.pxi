# Block states, and filling: claim a run of blocks, have the provider fill it, place it, publish it.
#
# Uses:     the data of _core.pyx, the calls of _sys.h; enter_blocking/leave_blocking of _life.pxi
# Provides: begin_run, finish_run (fills), lift_run (the first write), repair_run, poison_again, ask_for_wake,
#           wait_for_word, publish, count, stage, refused
#
#   MISSING > FILLING > CLEAN > UNPROTECTING > DIRTY         the way of a block that is read, then written
#             FILLING > DIRTY                                filled for a write
#             FILLING > MISSING                              a prefetch, populate or read-ahead failed
#             FILLING > POISONED > FILLING                   a touch failed for good; populate tries again
#   CLEAN | DIRTY > FILLING                                  the program dropped pages of it (madvise): repaired
#
# Only the owner of FILLING and UNPROTECTING changes such a word (others may set WAITERS in it), so publishing is an
# exchange. A word is published only after the kernel did what it says. Whoever publishes over WAITERS wakes both
# kinds of sleeper: futex for the SIGBUS handler, UFFDIO_WAKE for faults whose message was read in the busy time.

cdef enum:
    OP_COPY, OP_CONTINUE, OP_ZEROPAGE, OP_POISON
    ERRNO_MAX = 4095                # what the kernel itself takes for -errno
    LATE = -100000                  # no errno: the keeper took the run away while the provider had it

cdef uint32_t fork_gate = 0         # 1 while fork() copies this process: nobody changes a block's state then
cdef char *zero_bytes = NULL        # MAX_BLOCK_BYTES that read as zero, the source of zero blocks


# ---- sizes ------------------------------------------------------------------------------------------------------

cdef inline uint64_t page_round(uint64_t n) noexcept nogil:
    return (n + PAGE - 1) & ~(PAGE - 1)


cdef inline uint64_t block_span(Region_t *r, uint64_t b) noexcept nogil:
    """Bytes of block b in pages; less than a block only for the last one."""
    cdef uint64_t start = b << r.shift, whole = <uint64_t>1 << r.shift
    return whole if start + whole <= r.span else r.span - start


cdef inline bint is_shared(Region_t *r) noexcept nogil:
    """Whether the region's pages are those of its memfd. In a forked child they are private."""
    return r.memfd >= 0 and not r.in_child


cdef inline bint lies_elsewhere(Region_t *r, uint64_t b) noexcept nogil:
    """Whether a missing block's bytes are no more the provider's: in the spill file, or with the parent."""
    cdef uint32_t word = u32_load(&r.state[b])
    return word & SPILLED != 0 or r.in_child and word & FROM_PARENT != 0


cdef inline uint64_t run_bytes(Region_t *r, uint64_t b, uint64_t n) noexcept nogil:
    """Bytes of blocks [b, b+n) that are the user's."""
    cdef uint64_t start = b << r.shift, end = (b + n) << r.shift
    return (end if end < r.nbytes else r.nbytes) - start


# ---- counters ---------------------------------------------------------------------------------------------------

cdef inline void count(Slot *s, Region_t *r, int which, uint64_t n) noexcept nogil:
    u64_add(&r.counters[s.index & (STRIPES - 1)].n[which], n)


cdef inline void stage(Slot *s, Region_t *r, int which, uint64_t ns) noexcept nogil:
    cdef int bucket = u64_log2(ns)
    u64_add(&r.counters[s.index & (STRIPES - 1)].stage[which][bucket if bucket < BUCKETS else BUCKETS - 1], 1)


cdef void count_fault(Slot *s, Region_t *r, uint32_t flags) noexcept nogil:
    if flags & UF_FLAG_WP:
        count(s, r, C_FAULTS_WP, 1)
    elif flags & UF_FLAG_WRITE:
        count(s, r, C_FAULTS_WRITE, 1)
    else:
        count(s, r, C_FAULTS_READ, 1)


# ---- changing states --------------------------------------------------------------------------------------------

cdef void critical_enter(Slot *s) noexcept nogil:
    """Between here and critical_leave the slot may change block states; short, kernel calls only. fork() keeps out."""
    while True:
        u32_store_seq(&s.critical, 1)
        if u32_load_seq(&fork_gate) == 0:
            return
        u32_store_seq(&s.critical, 0)
        futex_wait(&fork_gate, 1, 100000000)


cdef inline void critical_leave(Slot *s) noexcept nogil:
    u32_store(&s.critical, 0)


cdef void settle(Engine_t *e) noexcept nogil:
    """Waits until what was being placed when it was called is published: the kernel lets a fault go on a moment
    before. So whoever touched a page finds it resident, and counted."""
    cdef uint32_t i
    cdef uint64_t deadline = now_ns() + SECOND_NS
    for i in range(<uint32_t>MAX_SLOTS):
        while u32_load_seq(&e.slots[i].critical) and now_ns() < deadline:
            sched_yield()


cdef inline bint phase_change(Slot *s, uint32_t old, uint32_t new) noexcept nogil:
    """The owner's step of its own run; False if the keeper took the run away."""
    return u32_cas(&s.phase, s.run | old, s.run | new)


cdef inline bint is_busy(uint32_t state) noexcept nogil:
    """Owned by somebody who will publish another state, and wake who asked for it."""
    return state == FILLING or state == UNPROTECTING or state == EVICTING or state == COPYING


cdef bint claim(Slot *s, Region_t *r, uint64_t b, uint32_t from_state) noexcept nogil:
    cdef uint32_t word = u32_load(&r.state[b])
    cdef uint32_t mine
    r.known[b * 4 / PAGE] = 1
    while word & STATE_MASK == from_state and word & DEAD == 0:
        mine = FILLING | (word & (WAITERS | FROM_PARENT | KEPT | STICKY)) | ((s.index + 1) << OWNER_SHIFT)
        if from_state == DIRTY:
            mine |= KEPT
        mine |= ((word >> GENERATION_SHIFT) + 1) << GENERATION_SHIFT
        if u32_cas(&r.state[b], word, mine):
            return True
        word = u32_load(&r.state[b])
    return False


cdef inline bint owned(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    cdef uint32_t word = u32_load(&r.state[b])
    return word & STATE_MASK == FILLING and (word >> OWNER_SHIFT) & OWNER_MASK == s.index + 1


cdef void publish(Region_t *r, uint64_t b, uint64_t n, uint32_t state) noexcept nogil:
    """Gives the blocks [b, b+n), which the caller owns, their new state, and wakes whoever asked for it."""
    publish_as(r, b, n, state, STICKY)


cdef void publish_as(Region_t *r, uint64_t b, uint64_t n, uint32_t state, uint32_t kept) noexcept nogil:
    """The same; of the sticky flags only `kept` stay. None: what was written is given up, wherever it lies."""
    cdef uint64_t i
    cdef uint32_t old, new
    cdef bint asked = False
    if state == DIRTY and r.part != NULL and r.part.wire.source:
        part_written(r, b, n)
    for i in range(b, b + n):
        old = u32_load(&r.state[i])
        new = state | (old >> GENERATION_SHIFT << GENERATION_SHIFT) | old & kept
        if state & STATE_MASK == MISSING or state & STATE_MASK == POISONED:
            if kept:
                new |= old & (FROM_PARENT | KEPT)   # set before the first thread ran; only WAITERS changes beside us
            if r.writes_back and not r.hosted:
                sync_left(r, i)
        old = u32_swap(&r.state[i], new)
        if old & WAITERS:
            asked = True
            futex_wake_all(&r.state[i])
    if asked and not r.is_inline:
        uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), ((n - 1) << r.shift) + block_span(r, b + n - 1))


cdef void publish_same(Region_t *r, uint64_t b, uint32_t state) noexcept nogil:
    """A block that was only read returns to the state it had."""
    cdef uint32_t old = u32_load(&r.state[b])
    old = u32_swap(&r.state[b], state | (old >> GENERATION_SHIFT << GENERATION_SHIFT)
                   | old & (STICKY | FROM_PARENT | KEPT))
    if old & WAITERS:
        futex_wake_all(&r.state[b])
        if not r.is_inline:
            uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))


cdef bint ask_for_wake(Region_t *r, uint64_t b, uint32_t word) noexcept nogil:
    """Marks a busy block so that its owner wakes the fault; False when it is not busy or not `word` any more."""
    if not is_busy(word & STATE_MASK):
        return False
    return word & WAITERS != 0 and u32_load(&r.state[b]) == word or u32_cas(&r.state[b], word, word | WAITERS)


cdef void wait_for_word(Region_t *r, uint64_t b, uint32_t word, uint64_t timeout_ns) noexcept nogil:
    """Sleeps until the block's word is not `word` any more, or the time is over."""
    if word & WAITERS == 0:
        if not u32_cas(&r.state[b], word, word | WAITERS):
            return
        word |= WAITERS
    futex_wait(&r.state[b], word, timeout_ns)


# ---- a fill -----------------------------------------------------------------------------------------------------

cdef uint32_t begin_run(Slot *s, Region_t *r, uint64_t b, uint32_t most, bint write, uint32_t cause,
                        uint32_t from_state) noexcept nogil:
    """Claims blocks from b on, at most `most` and what fits the slot's buffer; how many it got. The slot owns them."""
    cdef uint32_t limit = <uint32_t>((HUGE_BYTES if s.huge else RUN_BYTES) >> r.shift)
    cdef uint32_t n = 0, room = 0
    if limit > MAX_RUN:
        limit = MAX_RUN
    if limit == 0:
        limit = 1
    if limit > most:
        limit = most
    if r.in_child:
        limit = 1                           # each block may come from elsewhere
    if b + limit > r.blocks:
        limit = <uint32_t>(r.blocks - b)
    s.no_room = 0
    s.recycled = 0
    s.huge_moved = 0
    if r.part != NULL and (from_state == MISSING or from_state == POISONED):
        limit = wire_spare(s, r, b, limit)
        if limit == 0:
            return 0
    if from_state == MISSING or from_state == POISONED:
        evict_first(r.engine, s, run_span(r, b, limit))
        limit = room_for_run(s, r, b, limit, write, cause)
        room = limit
    critical_enter(s)
    while n < limit and claim(s, r, b + n, from_state):
        if n and (u32_load(&r.state[b + n]) ^ u32_load(&r.state[b])) & SPILLED:
            publish(r, b + n, 1, from_state)    # its bytes come from elsewhere: another run
            break
        n += 1
    if n < room:
        room_return(s, r, b, n, room)
    if n:
        s.room_since_ns = 0
        s.region_id = r.id
        s.region = r
        s.first = b
        s.count = n
        s.cause = cause
        s.write = write and r.writable or not r.protect and r.writable or u32_load(&r.state[b]) & (FROM_PARENT | KEPT)
        s.repair = from_state != MISSING
        s.tries = 0
        s.last_error = 0
        s.said_ns = 0
        s.nudged = 0
        s.deadline_ns = now_ns() + r.timeout_ns
        u64_store(&s.since_ns, s.deadline_ns - r.timeout_ns)
        s.run += RUN_ONE
        u32_store(&s.phase, s.run | BUSY)
    critical_leave(s)
    return n


cdef int finish_run(Slot *s, Region_t *r) noexcept nogil:
    """Fills, places and publishes the run that begin_run claimed. 0, or the first failed block's -errno.

    The run is tried as a whole first; if that fails, block by block, so that one bad block does not take its
    neighbours along, and the bad ones again after growing pauses.
    """
    cdef int err
    if r.slow:
        enter_blocking(s)
    err = attempt(s, r, s.first, s.count)
    if err != 0 and err != LATE:
        recycled_release(s, r)
        err = retry_run(s, r, err)
    if err != LATE and not phase_change(s, BUSY, IDLE):
        err = LATE                          # taken between two tries
    while err == LATE and u32_load(&s.kind) != SLOT_RETIRED:
        sched_yield()                       # the keeper is still answering for the run
    if r.slow:
        leave_blocking(s)
    if err == LATE:
        room_give(s.engine, <uint64_t>s.recycled << r.shift)
        recycled_release(s, r)
        u32_sub(&r.stuck, 1)                # it came back after all; its reference goes now
        return -ETIMEDOUT                   # the keeper has answered for the run; this worker is retired
    u64_store(&s.since_ns, 0)
    return err


cdef int retry_run(Slot *s, Region_t *r, int err) noexcept nogil:
    cdef uint64_t pause = 1000000, b, now
    cdef uint32_t left = s.count
    cdef bint split = s.count > 1
    cdef int one
    s.tries = 1
    while True:
        s.last_error = err
        if not split:
            now = now_ns()
            if gives_up(s, r, now + pause >= s.deadline_ns):
                return fail_run(s, r, err)
            futex_wait(&r.closing, 0, pause)
            pause = pause * 4 if pause < 250000000 else SECOND_NS
            s.tries += 1
            count(s, r, C_RETRIES, left)
        split = False
        left = 0
        for b in range(s.first, s.first + s.count):
            if not owned(s, r, b):
                continue
            one = attempt(s, r, b, 1)
            if one == LATE:
                return LATE
            if one != 0:
                left += 1
                err = one
        if left == 0:
            return 0


cdef bint gives_up(Slot *s, Region_t *r, bint late) noexcept nogil:
    if u32_load(&r.closing) or u32_load(&r.engine.stopping) or s.cause == READAHEAD:
        return True
    if s.cause == DEMAND and r.wait_for_ever:
        return False
    return late or s.tries > r.retries


cdef int attempt(Slot *s, Region_t *r, uint64_t b, uint64_t n) noexcept nogil:
    """One try at blocks [b, b+n) of the slot's run: 0 and published, or -errno and still FILLING."""
    cdef uint64_t offset = b << r.shift, nbytes = run_bytes(r, b, n)
    cdef const char *source = NULL
    cdef uint64_t t0 = now_ns() if s.tries else s.since_ns, t1
    cdef int err = obtain(s, r, offset, nbytes, &source)
    t1 = now_ns()
    stage(s, r, H_FILL, t1 - t0)
    if not phase_change(s, BUSY, PLACING):
        return LATE                         # timed out: whatever came is too late
    if err == 0:
        critical_enter(s)
        if s.write and r.protect and not s.repair and u32_load(&r.frozen):
            s.write = 0                     # writers are stopped: this one finds it protected
        err = place(s, r, offset, page_round(nbytes), source)
        if err >= 0:
            stage(s, r, H_RESOLVE, now_ns() - t1)
            count(s, r, C_DEMAND if s.cause == DEMAND else C_READAHEAD if s.cause == READAHEAD else C_PREFETCH, n)
            count(s, r, C_BYTES, nbytes)
            publish(r, b, n, DIRTY if s.write or err > 0 else CLEAN)
            err = 0
            if s.cause <= READAHEAD and ptr_load(&r.touched) != NULL:
                touched_note(r, b, n)
        critical_leave(s)
        if err == 0:
            note_put(r, b, <uint32_t>n, NOTE_DEMAND if s.cause == DEMAND else
                     NOTE_KEEP if s.job != NULL and s.job.keeps else NOTE_AHEAD)
    u32_store(&s.phase, s.run | BUSY)
    if err != 0:
        count(s, r, C_ERRORS, 1)
    return err


cdef int obtain(Slot *s, Region_t *r, uint64_t offset, uint64_t nbytes, const char **source) noexcept nogil:
    """Has the provider's bytes at *source, or already in the region's own shared pages. 0 or -errno."""
    cdef uint64_t span = page_round(nbytes)
    cdef char *target = recycled_buffer(s, r) if s.recycled else s.staging
    cdef int err
    if s.offered != NULL and s.recycled:
        memcpy(target, offered_at(s, r, offset), span)      # a migration's; its buffer is whole pages
        source[0] = target
        return 0
    if s.offered != NULL:
        return -ESTALE if s.refused else obtain_hosted(s, r, offset, nbytes, source)
    if wire_pending(r, offset >> r.shift):
        return wire_error(r, offset >> r.shift)
    if u32_load(&r.state[offset >> r.shift]) & SPILLED:
        return spill_read(s, r, offset, nbytes, source)
    if lies_elsewhere(r, offset >> r.shift):
        source[0] = r.alias + offset        # dirty in the parent when it forked
        return parent_lacks(r, offset, span)
    if r.fill.kind == FILL_DIRECT and not r.minor and nbytes == span and not r.nested and not s.recycled:
        source[0] = r.fill.direct + offset
        return 0
    if r.fill.kind == FILL_ZERO and (not r.minor or s.repair) and not s.recycled:
        source[0] = NULL if r.zeropage and not r.writable else zero_bytes
        return 0
    if r.hosted:
        return obtain_hosted(s, r, offset, nbytes, source)
    if r.minor and not s.repair and r.fill.kind == FILL_DIRECT and not r.nested and nbytes == span:
        return write_pages(r, offset, nbytes)
    if r.minor and not s.repair:
        if fallocate(r.memfd, 0, <int64_t>offset, <int64_t>span) != 0:
            return -errno                   # said here, where it is an error and not a SIGBUS
        if r.fill.kind == FILL_ZERO:
            return 0
        target = r.alias + offset
    source[0] = target
    if r.fill.kind == FILL_DIRECT:
        err = copy_direct(r, target, r.fill.direct + offset, nbytes)
        if err != 0:
            return err
    elif r.fill.kind == FILL_ZERO:
        memset(target, 0, nbytes)
    else:
        err = r.fill.call(r.fill.self, s.index, offset, target, nbytes)
        if err != 0:
            return err if -ERRNO_MAX <= err < 0 else -EIO
    if span > nbytes:
        memset(target + nbytes, 0, span - nbytes)
    return 0


cdef inline const char *offered_at(Slot *s, Region_t *r, uint64_t offset) noexcept nogil:
    """Of the run's offered bytes those of the block at `offset`: a run that fails is tried again block by block."""
    return s.offered + (offset - (s.first << r.shift))


cdef int obtain_hosted(Slot *s, Region_t *r, uint64_t offset, uint64_t nbytes, const char **source) noexcept nogil:
    """The same from a provider in another process: asked for here, or offered by it."""
    cdef uint64_t tail = page_round(nbytes) - nbytes
    cdef char *target = r.alias + offset if r.minor and not s.repair else s.staging
    cdef int err = 0
    if s.offered == NULL:
        err = host_fill(s, r, offset, nbytes)
    elif r.minor:
        err = -errno if fallocate(r.memfd, 0, <int64_t>offset, <int64_t>nbytes) != 0 else 0
        if err == 0:
            memcpy(target, offered_at(s, r, offset), nbytes)
    else:
        source[0] = offered_at(s, r, offset)
        return 0
    if err == 0 and tail:
        memset(target + nbytes, 0, tail)
    source[0] = target
    return err


cdef int copy_direct(Region_t *r, char *target, const char *source, uint64_t nbytes) noexcept nogil:
    """Memory to memory, where bad source memory (a mapped file that was cut) is EFAULT and no signal. Memory of another
    region that the kernel can't have filled (inline delivery, user mode) is touched here, which has it filled."""
    cdef int err
    if r.fill.private_memory and not r.nested:
        memcpy(target, source, nbytes)
        return 0
    err = copy_guarded(target, source, nbytes)
    if err == -EFAULT and r.nested and not poisoned_within(<uint64_t>source, nbytes):
        memcpy(target, source, nbytes)
        err = 0
    return err


cdef bint poisoned_within(uint64_t start, uint64_t nbytes) noexcept nogil:
    cdef uint64_t address = start
    cdef Region_t *r
    cdef bint bad = False
    while address < start + nbytes and not bad:
        r = region_at(address)
        if r != NULL:
            bad = u32_load(&r.state[(address - <uint64_t>r.base) >> r.shift]) & STATE_MASK == POISONED
            region_release(r)
        address = (address & ~(PAGE - 1)) + PAGE
    return bad


cdef int write_pages(Region_t *r, uint64_t offset, uint64_t nbytes) noexcept nogil:
    """From memory into shared pages through the file: a source that is gone (a mapped file that was cut) is EFAULT and
    not SIGBUS, and the pages need no zeroing first."""
    cdef uint64_t at = 0
    cdef int64_t n
    while at < nbytes:
        n = pwrite(r.memfd, r.fill.direct + offset + at, nbytes - at, <int64_t>(offset + at))
        if n > 0:
            at += <uint64_t>n
        elif n == 0 or errno != EINTR:
            return -errno if n < 0 else -EIO
    return 0


# ---- the first write, and blocks that are there -----------------------------------------------------------------

cdef uint32_t lift_run(Slot *s, Region_t *r, uint64_t b, uint32_t most) noexcept nogil:
    """CLEAN > UNPROTECTING > DIRTY for the blocks from b on, at most `most` and none that is watched; how many. One
    ioctl; it wakes writers."""
    cdef uint32_t n = 0, word
    critical_enter(s)
    while n < most and not u32_load(&r.frozen) and not watched_run(r, b + n, b + n + 1):
        word = u32_load(&r.state[b + n])
        if word & STATE_MASK != CLEAN:
            break
        if u32_cas(&r.state[b + n], word, (word & ~<uint32_t>STATE_MASK) | UNPROTECTING):
            n += 1
    if n:
        if r.protect:
            unprotect(r, b, n)
        publish(r, b, n, DIRTY)
    critical_leave(s)
    return n


cdef void lift_again(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    """A write fault on a DIRTY block: told late, or its protection was left over. Only who owns a block lifts its
    protection: who stores it may set it at this very moment, and the block would be CLEAN and writable."""
    cdef uint32_t word
    critical_enter(s)
    word = u32_load(&r.state[b])
    if u32_load(&r.frozen) or watched_run(r, b, b + 1):
        pass                                # nobody writes there now; or page by page, by a fresh message's address
    elif word & STATE_MASK == DIRTY and u32_cas(&r.state[b], word, (word & ~<uint32_t>STATE_MASK) | UNPROTECTING):
        unprotect(r, b, 1)
        publish(r, b, 1, DIRTY)
    critical_leave(s)


cdef void unprotect(Region_t *r, uint64_t b, uint64_t n) noexcept nogil:
    """Lifts the protection of blocks [b, b+n). A kernel that refuses for a second leaves the writer no way on."""
    cdef uint64_t start = <uint64_t>(r.base + (b << r.shift)), deadline = now_ns() + SECOND_NS
    cdef uint64_t len = ((n - 1) << r.shift) + block_span(r, b + n - 1)
    cdef unsigned int tries = 0
    cdef int err = uf_writeprotect(r.fd, start, len, 0)
    if err == -ENOENT:                      # unmapped, or (older kernels) an madvise split the mapping inside the range
        while len:
            len -= PAGE
            uf_writeprotect(r.fd, start + len, PAGE, 0)
        return
    while err != 0:
        refused(r, b, err, deadline, &tries)
        err = uf_writeprotect(r.fd, start, len, 0)


cdef void refused(Region_t *r, uint64_t b, int err, uint64_t deadline, unsigned int *tries) noexcept nogil:
    """The kernel did not do what a block can't go on without: a nap; from the deadline on the end of the process."""
    if now_ns() > deadline:
        say_stuck(r, b, err)
        bus_die()
    nap(tries[0])
    tries[0] += 1


cdef bint block_present(Region_t *r, uint64_t b) noexcept nogil:
    """Whether the program dropped no page of a private block. Of a shared one only CONTINUE can tell."""
    return not r.minor and pages_there(r.base + (b << r.shift), block_span(r, b), PAGE)


cdef void repair_run(Slot *s, Region_t *r, uint64_t b, uint32_t state, uint32_t cause) noexcept nogil:
    """A block that is CLEAN or DIRTY lacks pages: the program dropped them (madvise). They come back as the provider
    has them, for a touch (DEMAND) or to be stored (REPAIR); what was written to them is gone."""
    if r.minor and remap_block(s, r, b, state):
        return
    if r.hosted:
        hosted_repair(s, r, b, state, cause)
    elif begin_run(s, r, b, 1, state == DIRTY, cause, state):
        count(s, r, C_REPAIRED, 1)
        finish_run(s, r)
    else:
        uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))


cdef bint remap_block(Slot *s, Region_t *r, uint64_t b, uint32_t state) noexcept nogil:
    """A shared block whose pages are in the file: back into the page table. False where the file lacks some. Only who
    owns the block maps it: who takes it out at this moment would else leave a writable page behind."""
    cdef uint64_t start = <uint64_t>(r.base + (b << r.shift))
    cdef uint32_t word
    cdef int err = 0
    critical_enter(s)
    word = u32_load(&r.state[b])
    if word & STATE_MASK == state and u32_cas(&r.state[b], word, (word & ~<uint32_t>STATE_MASK) | UNPROTECTING):
        err = place_run(r, OP_CONTINUE, start, 0, block_span(r, b),
                        UF_CONTINUE_WP if r.protect and (state == CLEAN or watched_run(r, b, b + 1)) else 0)
        publish(r, b, 1, state)
    else:
        uf_wake(r.fd, start, block_span(r, b))      # it changed meanwhile: the touch asks again
    critical_leave(s)
    return err >= 0


# ---- failure ----------------------------------------------------------------------------------------------------

cdef int fail_run(Slot *s, Region_t *r, int err) noexcept nogil:
    """Gives up the blocks of the run that are still owned: poisoned for a touch, missing again for anybody else."""
    cdef uint64_t b
    if not phase_change(s, BUSY, PLACING):
        return LATE
    s.failed = s.first + s.count
    critical_enter(s)
    for b in range(s.first, s.first + s.count):
        if owned(s, r, b):
            if s.failed > b:
                s.failed = b
            fail_block(s, r, b, err, s.tries, 0)
    critical_leave(s)
    u32_store(&s.phase, s.run | BUSY)
    return err


cdef void fail_block(Slot *s, Region_t *r, uint64_t b, int err, uint32_t tries, uint32_t flags) noexcept nogil:
    cdef BlockError *note = &r.error[b & (ERRORS - 1)]
    cdef uint32_t code = <uint32_t>-err
    note.block = b
    note.error = err
    note.tries = tries
    if s.cause == REPAIR:                   # what is left of it stays, dirty; filled aside, so a late fill does no harm
        write_pauses(r)
        note_unwritten(r, b, err, tries)
        publish(r, b, 1, DIRTY)
        return
    if r.minor and u32_load(&r.state[b]) & KEPT == 0:
        fallocate(r.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <int64_t>(b << r.shift),
                  <int64_t>block_span(r, b))                # half-filled pages must never be mapped
    room_give(r.engine, block_span(r, b))
    if (s.cause != DEMAND or u32_load(&r.closing)) and flags & DEAD == 0:
        publish(r, b, 1, MISSING)
        return
    count(s, r, C_POISONED, 1)
    poison_pages(r, b)
    publish(r, b, 1, POISONED | flags | (code & OWNER_MASK) << OWNER_SHIFT)
    uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))


cdef void poison_pages(Region_t *r, uint64_t b) noexcept nogil:
    cdef char *start = r.base + (b << r.shift)
    if r.poison:
        if is_shared(r) and r.protect:      # it stays behind where a shared page was: POISON answers EEXIST there
            uf_writeprotect(r.fd, <uint64_t>start, block_span(r, b), 0)
        place_run(r, OP_POISON, <uint64_t>start, 0, block_span(r, b), 0)
    elif not r.is_inline:
        say_poison(r, b)                    # no SIGBUS will come to say it: kernels before 6.6
        mprotect(start, block_span(r, b), PROT_NONE)


cdef void unpoison_pages(Region_t *r, uint64_t b) noexcept nogil:
    cdef char *start = r.base + (b << r.shift)
    if not r.poison and not r.is_inline:
        mprotect(start, block_span(r, b), PROT_READ | PROT_WRITE if r.writable else PROT_READ)
    if r.memfd >= 0 and not r.in_child:     # private memory: a COPY goes over the poison, and what was written stays
        madvise(start, block_span(r, b), MADV_DONTNEED)


cdef void poison_again(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    """A fault on a poisoned block, of which the program may have dropped pages: poison, and let the fault go on to meet
    it. Only by its owner: a block that is repaired at this moment would lose its protection."""
    cdef uint32_t word
    critical_enter(s)
    word = u32_load(&r.state[b])
    if word & STATE_MASK == POISONED and u32_cas(&r.state[b], word, (word & ~<uint32_t>STATE_MASK) | UNPROTECTING):
        poison_pages(r, b)
        publish(r, b, 1, POISONED | word & (DEAD | OWNER_MASK << OWNER_SHIFT))
    critical_leave(s)
    uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))
