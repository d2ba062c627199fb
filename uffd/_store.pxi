# Writing back: dirty blocks go to their store, which is the region's provider or, for private memory, a spill file.
#
# Uses:     the states of _fill.pxi, claim_out, copy_resident and slots of _evict.pxi; host_store of _hosted.pxi;
#           spill_write of _spill.pxi
# Provides: writer_main, writer_ask (a block left its region dirty), write_range, note_unwritten;
#           lacks_pages (dropped by the program)
#
#   DIRTY        > COPYING (protected, copied) > CLEAN + WRITING      its bytes are on their way
#   POOLED_DIRTY > COPYING (copied)            > POOLED + WRITING     the same, moved out
#   WRITING is taken off when the store has acknowledged. Until then the block does not leave memory. A write meanwhile
#   makes it DIRTY (+ WRITING) as ever: it is written again, after the first has ended. Where the store failed, CLEAN
#   turns DIRTY again, by UNPROTECTING, and POOLED turns POOLED_DIRTY: nothing is lost, and all is tried again.

cdef enum:
    ASK_BATCH = 64
    CANNOT = 0xffffffff                     # of write_run and copy_run: a block that can't be copied
cdef uint64_t WRITE_PAUSE_NS = 20000000     # after a failure; doubled up to a second


# ---- the writer -------------------------------------------------------------------------------------------------

cdef void writer_ask(Region_t *r, uint64_t b, uint32_t n) noexcept nogil:
    """Blocks that are dirty and on their way out. A full ring forgets it: they are asked for again before they go."""
    cdef Piece p
    if r.write_again_ns and now_ns() < r.write_again_ns:
        return
    p.region_id = r.id
    p.first = b
    p.count = n
    p.stride = 1
    p.write = 0
    p.since_ns = 0
    if ring_put(r.engine.writes, &p) and u32_load(&r.engine.write_bell) == 0 and u32_swap(&r.engine.write_bell, 1) == 0:
        futex_wake_all(&r.engine.write_bell)


cdef void *writer_main(void *argument) noexcept nogil:
    """Writes back what the evictor took out; ends regions whose last array died. It may wait for a store, so nobody
    waits for it but through the blocks that it has written."""
    cdef Slot *s = <Slot *>argument
    cdef Engine_t *e = s.engine
    cdef Piece asked[ASK_BATCH]
    cdef int n
    while not u32_load(&e.stopping) and u32_load(&e.writer) == s.index:     # else it hung, and another took its place
        u32_swap(&e.write_bell, 0)
        n = 0
        while n < ASK_BATCH and ring_take(e.writes, &asked[n]):
            n += 1
        if n:
            write_pieces(e, s, asked, n)
            continue
        if e.dying != NULL and dying_flush(e, s):
            continue
        futex_wait(&e.write_bell, 0, SECOND_NS)
    writer_leaves(e, s)
    return NULL


cdef void write_pieces(Engine_t *e, Slot *s, Piece *p, int n) noexcept nogil:
    """Sorted and merged, so that neighbours are one write."""
    cdef Piece one
    cdef Region_t *r
    cdef int i, k
    for i in range(1, n):
        one = p[i]
        k = i
        while k > 0 and (p[k - 1].region_id > one.region_id or
                         p[k - 1].region_id == one.region_id and p[k - 1].first > one.first):
            p[k] = p[k - 1]
            k -= 1
        p[k] = one
    i = 0
    while i < n:
        one = p[i]
        i += 1
        while i < n and p[i].region_id == one.region_id and p[i].first <= one.first + one.count:
            if p[i].first + p[i].count > one.first + one.count:
                one.count = <uint32_t>(p[i].first + p[i].count - one.first)
            i += 1
        r = region_acquire(one.region_id)
        if r != NULL:
            write_range(s, r, one.first, one.first + one.count, False, NULL)
            region_release(r)


cdef uint64_t write_range(Slot *s, Region_t *r, uint64_t first, uint64_t end, bint resident,
                          uint32_t *until) noexcept nogil:
    """Writes the dirty blocks of [first, end) back; resident: those too that have not left the region. Where it
    stopped: at `end`, or, with `until`, when that is not 0 any more. What a host writes may still be under way."""
    cdef uint64_t b = first
    cdef uint32_t state, word, got
    while b < end and not is_over(s, r, until):
        word = u32_load(&r.state[b])
        state = word & STATE_MASK
        if word & WRITING and (state == DIRTY or state == POOLED_DIRTY):
            if resident:
                wait_for_write(r, b)        # an older write of it is under way: one at a time
            else:
                b += 1                      # the same, and it may hang: asked for again before the block goes
            continue
        if resident and is_busy(state):
            wait_for_word(r, b, word, SLICE_NS)
            continue
        if state != POOLED_DIRTY and not (resident and state == DIRTY):
            b += 1
            continue
        got = write_run(s, r, b, end, resident)
        if got == 0 and resident:
            continue                        # it changed meanwhile: evicted, rescued, written by somebody else
        if got == CANNOT and lacks_pages(r, b):
            if not resident:
                repair_ask(r, b)            # the writer waits for no fill: it is asked again before the block goes
            elif repair_wait(s, r, b, until):
                continue
        elif got == CANNOT and resident:
            note_unwritten(r, b, -EFAULT, 1)
        b += got if 0 < got < CANNOT else 1
    return b


cdef bint lacks_pages(Region_t *r, uint64_t b) noexcept nogil:
    """Whether the program dropped pages of a block that is there, or in the pool. Shared ones are looked for in the
    file: a hole in it reads as zeros, which nobody wrote."""
    cdef int64_t start = <int64_t>(b << r.shift)
    if is_shared(r):
        return file_hole(r.memfd, start) < start + <int64_t>block_span(r, b)
    return u32_load(&r.state[b]) & STATE_MASK == DIRTY and not block_present(r, b)


cdef inline bint is_over(Slot *s, Region_t *r, uint32_t *until) noexcept nogil:
    """Whether who writes back is to stop: told by `until` (or its region closes), or its time is over."""
    return until != NULL and (u32_load(until) != 0 or u32_load(&r.closing) != 0) or \
        s.give_up_ns != 0 and now_ns() > s.give_up_ns


cdef bint repair_wait(Slot *s, Region_t *r, uint64_t b, uint32_t *until) noexcept nogil:
    """Has a dirty block made whole, as a touch would, and waits for it within the region's time; False, and noted,
    where its provider fails."""
    cdef BlockError *note = &r.write_error[b & (ERRORS - 1)]
    cdef uint64_t failures = u64_load(&r.write_failures), asked = 0, now = now_ns(), deadline = now + r.timeout_ns
    cdef uint32_t word
    while not is_over(s, r, until):
        word = u32_load(&r.state[b])
        if not is_busy(word & STATE_MASK) and not (is_dirty(word & STATE_MASK) and lacks_pages(r, b)):
            return True
        if note.block == b and note.error and note.at > failures:
            return False
        now = now_ns()
        if now > deadline:
            note_unwritten(r, b, -ETIMEDOUT, 1)
            return False
        if now - asked > SECOND_NS or asked == 0:
            repair_ask(r, b)
            asked = now
        wait_for_word(r, b, word, SLICE_NS)
    return True


cdef void wait_for_write(Region_t *r, uint64_t b) noexcept nogil:
    cdef uint32_t turn = u32_load(&r.write_turn)
    if u32_load(&r.state[b]) & WRITING:
        futex_wait(&r.write_turn, turn, SLICE_NS)


cdef void note_unwritten(Region_t *r, uint64_t b, int err, uint32_t tries) noexcept nogil:
    """Who flushes looks at the notes that were made since it began, so that none takes another's away."""
    cdef BlockError *note = &r.write_error[b & (ERRORS - 1)]
    note.block = b
    note.error = err
    note.tries = tries
    note.at = u64_add(&r.write_failures, 1) + 1


cdef uint32_t write_run(Slot *s, Region_t *r, uint64_t b, uint64_t end, bint resident) noexcept nogil:
    """Claims dirty neighbours from b on, copies and writes them; how many blocks. 0: b is not what it was; CANNOT: it
    can't be copied. In the host's case the request's own thread ends it."""
    cdef Slot *c = s
    cdef uint32_t n
    cdef int err
    cdef uint64_t i
    if r.writes_back and r.hosted:
        c = carrier_wait_write(r)
        if c == NULL:
            return CANNOT                   # the engine stops
    elif slot_buffer(s) != 0:
        return CANNOT
    n = copy_run(c, r, b, end, resident)
    if n == 0 or n == CANNOT:
        if c != s:
            carrier_return(c)
        return n
    if c != s:
        c.carrier.first = b
        c.carrier.count = n
        carrier_pass(c, r, T_WRITE)
        return n
    err = store_bytes(s, r, b, n, s.staging, n > 1)
    if err == 0 or n == 1:
        acknowledge(s, r, b, n, err)
        return n
    count(s, r, C_WRITE_ERRORS, 1)
    for i in range(n):                      # one bad block does not take its neighbours along
        err = store_bytes(s, r, b + i, 1, s.staging + (i << r.shift), False)
        acknowledge(s, r, b + i, 1, err)
    return n


cdef uint32_t copy_run(Slot *s, Region_t *r, uint64_t b, uint64_t end, bint resident) noexcept nogil:
    """The dirty blocks from b on, as many as fit one write, copied into the slot's buffer: CLEAN or POOLED, and
    WRITING. How many."""
    cdef uint64_t most = RUN_BYTES >> r.shift
    cdef uint32_t n = 0, state
    cdef int done = 0
    if most == 0:
        most = 1
    if end - b < most:
        most = end - b
    critical_enter(s)
    u32_add(&r.writing, <uint32_t>most)     # before the first looks clean: who flushes waits for those under way
    while n < most:
        state = u32_load(&r.state[b + n]) & STATE_MASK
        if u32_load(&r.state[b + n]) & WRITING or state != POOLED_DIRTY and not (resident and state == DIRTY):
            break
        done = copy_block(s, r, b + n, state, s.staging + (<uint64_t>n << r.shift))
        if done <= 0:
            break
        n += 1
    if n < most:
        u32_sub(&r.writing, <uint32_t>most - n)
        u32_add_seq(&r.write_turn, 1)
        futex_wake_all(&r.write_turn)
    critical_leave(s)
    return CANNOT if n == 0 and done < 0 else n


cdef int copy_block(Slot *s, Region_t *r, uint64_t b, uint32_t state, char *target) noexcept nogil:
    """One dirty block: 1, and it is on its way to its store; 0: it is not in that state any more; -1: it can't be
    copied now. One that is pinned where the kernel's own writes to protected memory are not served (a readinto may be
    under way), or that can't be protected (older kernels), is copied as it is, and stays dirty."""
    cdef char *start = r.base + (b << r.shift)
    cdef uint64_t span = block_span(r, b)
    cdef bint shared = is_shared(r)
    cdef bint done = True, stays = state == DIRTY and (
        not r.protect or not r.kernel_faults and u8_load(&r.pins[b]) != 0)
    if not claim_write(s, r, b, state):
        return 0
    if not stays and state == DIRTY and uf_writeprotect(r.fd, <uint64_t>start, span, UF_WRITEPROTECT_WP) != 0:
        done = False                        # an madvise split it (older kernels): it stays dirty
    elif shared:                            # read, not touched: a page that is not there stays a hole, and is found
        done = pread_all(r.memfd, target, span, b << r.shift) == 0 and not lacks_pages(r, b)
    elif state == DIRTY:
        done = copy_resident(s, r, b, target)
    else:
        memcpy(target, slot_at(r.engine, r.shift, r.place[b]), span)
    if not done:
        publish(r, b, 1, state)             # protected, but dirty: a write lifts it
        return -1
    publish(r, b, 1, (DIRTY if stays else CLEAN if state == DIRTY else POOLED) | WRITING)
    return 1


cdef bint claim_write(Slot *s, Region_t *r, uint64_t b, uint32_t state) noexcept nogil:
    """state > COPYING, pinned or not."""
    cdef uint32_t word = u32_load(&r.state[b])
    while word & STATE_MASK == state and word & WRITING == 0:
        if u32_cas(&r.state[b], word, COPYING | word & (WAITERS | FROM_PARENT | KEPT | STICKY)
                   | (s.index + 1) << OWNER_SHIFT | ((word >> GENERATION_SHIFT) + 1) << GENERATION_SHIFT):
            return True
        word = u32_load(&r.state[b])
    return False


cdef int store_bytes(Slot *s, Region_t *r, uint64_t b, uint32_t n, const char *bytes, bint once) noexcept nogil:
    """Blocks to the store, tried again up to `retries` times unless `once`: 0, or -errno."""
    cdef uint64_t pause = 1000000, t0 = now_ns()
    cdef uint32_t tries = 0
    cdef int err
    while True:
        write_enters(s, r, b)
        if r.writes_back:
            err = r.fill.store(r.fill.self, s.index, b << r.shift, bytes, run_bytes(r, b, n))
        else:
            err = spill_write(s, r, b, n, bytes)
        u64_store(&s.write_ns, 0)
        if err == 0 or once or tries >= r.retries or u32_load(&r.engine.stopping):
            break
        tries += 1
        count(s, r, C_WRITE_ERRORS, 1)
        futex_wait(&r.closing, 0, pause)
        pause = pause * 4 if pause < 250000000 else SECOND_NS
    stage(s, r, H_WRITE, now_ns() - t0)
    return err if -ERRNO_MAX <= err <= 0 else -EIO


cdef inline void write_enters(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    """A call that nobody can end: the keeper looks at how long it takes."""
    s.region_id = r.id
    s.first = b
    s.write_limit_ns = r.timeout_ns
    u64_store(&s.write_ns, now_ns())


cdef void write_hosted(Slot *c, Region_t *r) noexcept nogil:
    """The carrier's thread: the rest of write_run."""
    cdef Carrier *k = c.carrier
    cdef uint64_t t0 = now_ns(), first = k.first, i
    cdef uint32_t n = <uint32_t>k.count
    cdef int err = host_store(c, r, first << r.shift, run_bytes(r, first, n), n > 1)
    stage(c, r, H_WRITE, now_ns() - t0)
    if err == 0 or n == 1 or err == -ETIMEDOUT:     # one that hangs would hang again, block by block
        acknowledge(c, r, first, n, err)
        return
    count(c, r, C_WRITE_ERRORS, 1)
    for i in range(n):                      # one bad block does not take its neighbours along
        if i:
            memcpy(c.staging, c.staging + (i << r.shift), run_bytes(r, first + i, 1))
        err = host_store(c, r, (first + i) << r.shift, run_bytes(r, first + i, 1), False)
        acknowledge(c, r, first + i, 1, err)


cdef void acknowledge(Slot *s, Region_t *r, uint64_t b, uint32_t n, int err) noexcept nogil:
    """The store has answered for the blocks [b, b+n)."""
    cdef uint64_t i
    if err == 0:
        count(s, r, C_WRITTEN, n)
        count(s, r, C_BYTES_WRITTEN, run_bytes(r, b, n))
        count(s, r, C_BYTES_STORED, run_bytes(r, b, n) if r.writes_back else spill_took(r, b, n))
        r.write_again_ns = 0
        r.write_pause_ns = 0
        if r.writes_back:
            u32_store(&r.unsynced, 1)
    else:
        count(s, r, C_WRITE_ERRORS, 1)
        write_pauses(r)
    for i in range(b, b + n):
        if err != 0:
            note_unwritten(r, i, err, r.retries + 1)
        elif r.write_error[i & (ERRORS - 1)].block == i:
            r.write_error[i & (ERRORS - 1)].error = 0
        critical_enter(s)
        acknowledge_block(s, r, i, err)
        critical_leave(s)
    u32_add_seq(&r.write_turn, 1)
    u32_sub(&r.writing, n)
    futex_wake_all(&r.write_turn)
    if r.engine.limit != NO_LIMIT:
        evictor_ring(r.engine)


cdef void write_pauses(Region_t *r) noexcept nogil:
    """Something failed: what asks by itself waits a while, longer each time."""
    r.write_pause_ns = u64_min(SECOND_NS, WRITE_PAUSE_NS if r.write_pause_ns == 0 else r.write_pause_ns * 2)
    r.write_again_ns = now_ns() + r.write_pause_ns


cdef void acknowledge_block(Slot *s, Region_t *r, uint64_t b, int err) noexcept nogil:
    cdef uint32_t word, state, new
    while True:
        word = u32_load(&r.state[b])
        state = word & STATE_MASK
        if is_busy(state):
            sched_yield()                   # its owner is inside a call of the kernel
            continue
        if err != 0 and state == CLEAN:
            if not u32_cas(&r.state[b], word, word & ~<uint32_t>STATE_MASK | UNPROTECTING):
                continue
            if r.protect and not watched_run(r, b, b + 1):
                unprotect(r, b, 1)
            publish_as(r, b, 1, DIRTY, SPILLED)
            return
        new = word & ~<uint32_t>WRITING
        if err != 0 and state == POOLED:
            new = new & ~<uint32_t>STATE_MASK | POOLED_DIRTY
        if err == 0 and not r.writes_back:
            new |= SPILLED
        elif err == 0 and not r.hosted:
            sync_acknowledged(r, b)
        if u32_cas(&r.state[b], word, new):
            return


# ---- flush ------------------------------------------------------------------------------------------------------

cdef bint wait_written(Region_t *r, uint64_t timeout_ns) noexcept nogil:
    """Waits a while for writes under way; True when there are none."""
    cdef uint32_t turn = u32_load(&r.write_turn)
    if u32_load(&r.writing) == 0:
        return True
    futex_wait(&r.write_turn, turn, timeout_ns)
    return u32_load(&r.writing) == 0


cdef bint dying_flush(Engine_t *e, Slot *s) noexcept nogil:
    """Regions whose last array died and that are to be flushed: the keeper takes them down afterwards. Whether there
    was one."""
    cdef Region_t *r
    pthread_mutex_lock(&registry_lock)
    r = e.dying
    while r != NULL and u32_load(&r.flush_at_end) != 1:
        r = r.next_dying
    if r != NULL:
        u32_add_seq(&r.refs, 1)
    pthread_mutex_unlock(&registry_lock)
    if r == NULL:
        return False
    region_flush(s, r)
    u32_store(&r.flush_at_end, 2)
    region_release(r)
    eventfd_raise(e.keeper_fd)
    return True


cdef void region_flush(Slot *s, Region_t *r) noexcept nogil:
    """All of a region that nobody uses any more; flush_error says how it ended. Within its time."""
    cdef uint64_t b = 0, last = 0, deadline = now_ns() + r.timeout_ns
    cdef int err = 0, tries = 0
    cdef uint64_t dirty = 1
    s.give_up_ns = deadline
    while dirty and tries < 2:
        b = 0
        while next_known(r, &b, &last):
            write_range(s, r, b, last, True, NULL)
            b = last
        while not wait_written(r, SLICE_NS) and now_ns() < deadline:
            pass
        dirty = count_dirty(r)
        tries += 1
    if dirty:
        err = r.write_error[0].error
        for b in range(ERRORS):
            err = err if err else r.write_error[b].error
        err = err if err else -EIO
    if err == 0:
        err = sync_store(s, r, NULL)
    s.give_up_ns = 0
    r.flush_error = err
    r.flush_left = dirty


cdef uint64_t count_dirty(Region_t *r) noexcept nogil:
    """Blocks whose bytes their store does not have."""
    cdef uint64_t b = 0, last = 0, n = 0
    cdef uint32_t word
    while next_known(r, &b, &last):
        while b < last:
            word = u32_load(&r.state[b])
            n += word & WRITING != 0 or is_dirty(word & STATE_MASK)
            b += 1
    return n


cdef inline bint is_dirty(uint32_t state) noexcept nogil:
    return state == DIRTY or state == POOLED_DIRTY or state == UNPROTECTING
