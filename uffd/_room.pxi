# Room under the budget: who may bring a block in, the pool of moved-out blocks, and what the policy is told.
#
# Uses:     the data of _core.pyx, block_span, run_bytes of _fill.pxi; evict_some of _evict.pxi
# Provides: room_for_run, room_return, room_give, room_wait, room_left, room_high; note_put, note_touch,
#           notes_drain; the slots of the pool: hole_take, full_take, slot_release, pool_trim; recycled fills
#
# `used` counts every byte that a region or the pool has, or that was promised to a fill: it is raised before a block
# is claimed, so it is never above the limit but for the moment in which a limit is lowered. What comes is told to the
# policy through a ring without a lock (a fill may run in a signal handler); who evicts drains it first.

cdef enum:
    NOTE_DEMAND, NOTE_AHEAD, NOTE_RESCUED, NOTE_KEEP
    REF_BLOCK_BITS = 40                     # a block's name in the policy: slot of its region, number
    ROOM_BYTES = 4 << 20                    # of headroom that is kept, where the budget is large enough
cdef uint64_t ROOM_WAIT_NS = 20000000       # then a wait for room looks again
cdef uint64_t RESIDENCE_NS = 1000000        # that a block stays at least, where the budget has few
cdef uint64_t RESIDENCE_MOST_NS = 200000000


# ---- the sum ----------------------------------------------------------------------------------------------------

cdef inline uint64_t run_span(Region_t *r, uint64_t b, uint64_t n) noexcept nogil:
    """Bytes of blocks [b, b+n) in pages."""
    cdef uint64_t end = (b + n) << r.shift
    return (end if end < r.span else r.span) - (b << r.shift)


cdef inline uint64_t room_left(Engine_t *e) noexcept nogil:
    """Bytes that may still come; pages that nobody wants count as room."""
    cdef uint64_t used = u64_load(&e.used) - u64_load(&e.free_bytes), limit = u64_load(&e.limit)
    return 0 if used >= limit else limit - used


cdef inline uint64_t room_high(Engine_t *e) noexcept nogil:
    """The headroom to which the evictor works; at half of it, it is woken."""
    cdef uint64_t limit = u64_load(&e.limit), high = limit / 32
    if limit == NO_LIMIT:
        return 0
    if high < ROOM_BYTES:
        high = ROOM_BYTES
    if high > limit / 16:
        high = limit / 16
    return high if high > 2 * e.block_max else 2 * e.block_max


cdef inline uint64_t room_least(Engine_t *e, uint64_t block_bytes) noexcept nogil:
    """What pins and fills need, with a region of such blocks too: each worker a run of one block, and the instruction
    that waits up to four blocks."""
    return u64_load(&e.pinned) + (e.workers + 6) * u64_max(u64_max(e.block_max, block_bytes), PAGE)


cdef bint room_charge(Engine_t *e, uint64_t nbytes) noexcept nogil:
    """Promises nbytes; False where that would be more than the limit."""
    cdef uint64_t limit = u64_load(&e.limit), used = u64_load(&e.used)
    while limit != NO_LIMIT:                # not added first and taken back: the sum is seen, and never above the limit
        if used + nbytes > limit:
            return False
        if u64_cas(&e.used, used, used + nbytes):
            break
        used = u64_load(&e.used)
    if limit == NO_LIMIT:
        u64_add(&e.used, nbytes)
    elif room_left(e) < room_high(e) / 2:
        evictor_ring(e)
    return True


cdef void room_give(Engine_t *e, uint64_t nbytes) noexcept nogil:
    u64_add(&e.used, -nbytes)
    room_tell(e)


cdef inline void room_tell(Engine_t *e) noexcept nogil:
    fence_seq()                             # pairs with room_wait: it says that it waits, then looks for room
    if u32_load_seq(&e.room_waiters):
        u32_add_seq(&e.room_turn, 1)
        futex_wake_all(&e.room_turn)


cdef inline void evictor_ring(Engine_t *e) noexcept nogil:
    if u32_load(&e.bell) == 0 and u32_swap(&e.bell, 1) == 0:
        futex_wake_all(&e.bell)


# ---- what a run asks for ----------------------------------------------------------------------------------------

cdef uint32_t room_for_run(Slot *s, Region_t *r, uint64_t b, uint32_t n, bint write, uint32_t cause) noexcept nogil:
    """How many of the blocks [b, b+n) may come; 0 sets s.no_room. They are promised, or have a recycled buffer."""
    cdef Engine_t *e = r.engine
    if recycles(s, r, write) and (b + n) << r.shift <= r.span and u64_load(&e.limit) != NO_LIMIT:
        u64_add(&e.full_wanted, n)
        if full_take(e, r.shift, n, &s.recycled_at):
            s.recycled = n
            return n
    while n:
        if room_charge(e, run_span(r, b, n)):
            return n
        if not pool_trim(e, run_span(r, b, n)):
            n = 1 if n > 1 and cause != READAHEAD else 0
    s.no_room = 1
    evictor_ring(e)
    return 0


cdef void room_return(Slot *s, Region_t *r, uint64_t b, uint32_t n, uint32_t room) noexcept nogil:
    """Of `room` promised blocks only n were claimed."""
    if s.recycled:
        full_give(r.engine, r.shift, s.recycled_at + n, room - n)
        s.recycled = n
    else:
        room_give(r.engine, run_span(r, b + n, room - n))


cdef void room_wait(Slot *s, Region_t *r, uint64_t b, bint write) noexcept nogil:
    """A touch found no room. A worker makes some itself, a toucher in the SIGBUS handler waits for it. After the
    region's time the block fails: what is dirty can't be written back, or all is pinned."""
    cdef Engine_t *e = r.engine
    cdef uint32_t turn
    cdef uint64_t now = now_ns()
    if s.room_since_ns == 0:
        s.room_since_ns = now
        count(s, r, C_EVICT_WAITS, 1)
    elif now - s.room_since_ns > r.timeout_ns and not r.wait_for_ever or u32_load(&r.closing):
        fail_for_room(s, r, b)
        return
    if s.kind == SLOT_WORKER and evict_some(e, s):
        return
    u32_add_seq(&e.room_waiters, 1)
    turn = u32_load_seq(&e.room_turn)
    evictor_ring(e)
    if room_left(e) < block_span(r, b):
        futex_wait(&e.room_turn, turn, ROOM_WAIT_NS)
    u32_sub(&e.room_waiters, 1)


cdef void fail_for_room(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    cdef line l
    critical_enter(s)
    if claim(s, r, b, MISSING):
        u64_add(&r.engine.used, block_span(r, b))   # given back by fail_block
        s.cause = DEMAND
        l.n = 0
        describe_block(&l, r, b)
        line_text(&l, b"finds no room: the budget is ")
        line_number(&l, u64_load(&r.engine.limit))
        line_text(&l, b" bytes, of which ")
        line_number(&l, u64_load(&r.engine.pinned))
        line_text(&l, b" are pinned, and what is left could not be evicted in time (writes back that fail are kept)")
        line_say(&l)
        fail_block(s, r, b, -ENOMEM, 1, 0)
    critical_leave(s)
    s.room_since_ns = 0


# ---- the slots of the pool --------------------------------------------------------------------------------------

cdef inline Pool *pool_of(Engine_t *e, uint32_t shift) noexcept nogil:
    return &e.pool[shift - 12]


cdef inline char *slot_at(Engine_t *e, uint32_t shift, uint32_t slot) noexcept nogil:
    return pool_of(e, shift).base + (<uint64_t>slot << shift)


cdef bint pool_ready(Engine_t *e, uint32_t shift) noexcept nogil:
    """Maps the pool of a block size at its first use; False where no memory can be had. Under policy_lock.

    Its range is registered with a userfaultfd of the engine, since only registered memory can be moved to; with the
    SIGBUS feature, so that a stray touch dies and does not wait. Without MOVE the pool is plain memory. `base` is told
    last: who sees it looks at pool_fd next, without the lock, and must not copy to what is about to be registered.
    """
    cdef Pool *p = pool_of(e, shift)
    cdef char *base
    cdef uint64_t bits, want = UF_FEATURE_MOVE | UF_FEATURE_SIGBUS, ioctls = 0
    if p.base != NULL:
        return True
    p.slots = e.pool_span >> shift
    if p.slots < 64:
        p.slots = 64
    bits = page_round(p.slots / 8 + 8)
    p.taken = <uint64_t *>map_lazy(2 * bits, PROT_READ | PROT_WRITE, -1)
    base = map_lazy(p.slots << shift, PROT_READ | PROT_WRITE, -1)
    if base == NULL or p.taken == NULL:
        if base != NULL:
            munmap(base, p.slots << shift)
        if p.taken != NULL:
            munmap(p.taken, 2 * bits)
        return False
    p.full = <uint64_t *>(<char *>p.taken + bits)
    p.used = 0
    if has(UF_FEATURE_MOVE) and e.pool_fd == -1:
        e.pool_fd = uf_open(known_way)
        if e.pool_fd >= 0 and uf_api(e.pool_fd, &want, &ioctls) != 0:
            close(e.pool_fd)
            e.pool_fd = -1
        if e.pool_fd < 0:
            e.pool_fd = -2                  # not asked for again: pages are copied
    if e.pool_fd >= 0 and uf_register(e.pool_fd, <uint64_t>base, p.slots << shift, UF_REGISTER_MISSING, &ioctls) != 0:
        close(e.pool_fd)
        e.pool_fd = -2
    ptr_store(&p.base, base)
    return True


cdef inline uint64_t run_mask(uint32_t n) noexcept nogil:
    return <uint64_t>-1 if n >= 64 else (<uint64_t>1 << n) - 1


cdef int bits_find(uint64_t word, uint32_t n) noexcept nogil:
    """Where n ones lie side by side, or -1."""
    cdef uint32_t have = 1, step
    while have < n and word:
        step = have if have < n - have else n - have
        word &= word >> step
        have += step
    return u64_log2(word & (~word + 1)) if word else -1


cdef bint hole_take(Engine_t *e, uint32_t shift, uint32_t n, uint32_t *at) noexcept nogil:
    """n slots side by side without pages: they are the caller's."""
    cdef Pool *p = pool_of(e, shift)
    cdef uint64_t i, word
    cdef int bit
    for i in range(p.slots / 64):
        word = u64_load(&p.taken[i])
        while word != <uint64_t>-1:
            bit = bits_find(~word, n)
            if bit < 0:
                break
            if u64_cas(&p.taken[i], word, word | run_mask(n) << bit):
                at[0] = <uint32_t>(i * 64) + <uint32_t>bit
                if i >= u64_load(&p.used):
                    u64_store(&p.used, i + 1)       # a lower one that comes late costs a look, no slot
                return True
            word = u64_load(&p.taken[i])
    return False


cdef bint full_take(Engine_t *e, uint32_t shift, uint32_t n, uint32_t *at) noexcept nogil:
    """n slots side by side whose pages nobody wants: they are the caller's. They stay counted as used."""
    cdef Pool *p = pool_of(e, shift)
    cdef uint64_t i, word
    cdef int bit
    if n > 64 or u64_load(&e.free_bytes) < <uint64_t>n << shift or p.base == NULL:
        return False
    for i in range(u64_load(&p.used)):
        word = u64_load(&p.full[i])
        while word:
            bit = bits_find(word, n)
            if bit < 0:
                break
            if u64_cas(&p.full[i], word, word & ~(run_mask(n) << bit)):
                at[0] = <uint32_t>(i * 64) + <uint32_t>bit
                u64_add(&e.free_bytes, -(<uint64_t>n << shift))
                if room_left(e) < room_high(e) / 2:
                    evictor_ring(e)
                return True
            word = u64_load(&p.full[i])
    return False


cdef void full_give(Engine_t *e, uint32_t shift, uint32_t at, uint32_t n) noexcept nogil:
    """Slots of a run whose pages nobody wants any more; they lie in one word of the bitmap."""
    u64_add(&e.free_bytes, <uint64_t>n << shift)
    u64_or(&pool_of(e, shift).full[at / 64], run_mask(n) << (at % 64))
    room_tell(e)


cdef void hole_give(Engine_t *e, uint32_t shift, uint32_t at, uint32_t n) noexcept nogil:
    """The same of slots that have no pages any more."""
    u64_and(&pool_of(e, shift).taken[at / 64], ~(run_mask(n) << (at % 64)))


cdef void slot_release(Engine_t *e, uint32_t shift, uint32_t at, uint64_t nbytes) noexcept nogil:
    """A slot's block is gone, or was copied out: its pages are kept for the next fill if fills take such, and there
    are not enough yet. nbytes of them are counted as used."""
    if u64_load(&e.full_wanted) and nbytes == <uint64_t>1 << shift and u64_load(&e.free_bytes) < room_high(e):
        full_give(e, shift, at, 1)
        return
    madvise(slot_at(e, shift, at), <uint64_t>1 << shift, MADV_DONTNEED)
    hole_give(e, shift, at, 1)
    room_give(e, nbytes)


cdef bint pool_trim(Engine_t *e, uint64_t nbytes) noexcept nogil:
    """Gives pages that nobody wants back to the kernel, nbytes of them or more; whether there were any."""
    cdef uint64_t i, word, freed = 0
    cdef uint32_t shift, k
    cdef Pool *p
    if u64_load(&e.free_bytes) == 0:
        return False
    u64_store(&e.full_wanted, 0)            # who came now could not use them
    for shift in range(12, 12 + CLASSES):
        p = pool_of(e, shift)
        for i in range(u64_load(&p.used) if p.base != NULL else 0):
            word = u64_load(&p.full[i])
            while word and freed < nbytes:
                k = <uint32_t>u64_log2(word)
                if u64_and(&p.full[i], ~(<uint64_t>1 << k)) & <uint64_t>1 << k:
                    madvise(p.base + (i * 64 + k << shift), <uint64_t>1 << shift, MADV_DONTNEED)
                    u64_and(&p.taken[i], ~(<uint64_t>1 << k))
                    u64_add(&e.free_bytes, -(<uint64_t>1 << shift))
                    u64_add(&e.used, -(<uint64_t>1 << shift))
                    freed += <uint64_t>1 << shift
                word = u64_load(&p.full[i])
            if freed >= nbytes:
                room_tell(e)
                return True
    return freed != 0


# ---- fills into recycled pages ----------------------------------------------------------------------------------

cdef inline bint recycles(Slot *s, Region_t *r, bint write) noexcept nogil:
    """Whether a fill of the region may be moved in. MOVE maps pages writable, whatever they were, and write protection
    comes after: so only where a write in between is seen as one, or forbidden."""
    return r.moves and r.engine.pool_fd >= 0 and (r.guard or write) and not r.hosted and not r.in_child


cdef inline char *recycled_buffer(Slot *s, Region_t *r) noexcept nogil:
    return slot_at(r.engine, r.shift, s.recycled_at)


cdef int place_recycled(Slot *s, Region_t *r, uint64_t start, uint64_t span, bint protect) noexcept nogil:
    """Moves the run's pages in from their slots. 0, 1 when some were there already, or -errno."""
    cdef uint64_t source = <uint64_t>recycled_buffer(s, r)
    cdef uint64_t done = 0
    cdef int err = -EBUSY                   # of memory that is watched a write must not slip in before the protection
    if not protect or r.guard:
        err = move_pages(r.fd, start, source, span, UF_MOVE_DONTWAKE if protect else 0, &done)
    if err == 0:
        hole_give(r.engine, r.shift, s.recycled_at, s.recycled)
        count(s, r, C_RECYCLED, s.recycled)
        s.recycled = 0
    else:                                   # shared with a forked child (EBUSY), or a page is there (EEXIST)
        err = 0
        if done < span:
            err = place_run(r, OP_COPY, start + done, source + done, span - done, UF_COPY_WP if protect else 0)
        recycled_release(s, r)
    if protect:
        uf_writeprotect(r.fd, start, span, UF_WRITEPROTECT_WP)
        if not r.is_inline:
            uf_wake(r.fd, start, span)
    return err


cdef void recycled_release(Slot *s, Region_t *r) noexcept nogil:
    """Gives a run's recycled pages back to the kernel; its blocks keep what was counted for them."""
    if s.recycled:
        madvise(recycled_buffer(s, r), <uint64_t>s.recycled << r.shift, MADV_DONTNEED)
        hole_give(r.engine, r.shift, s.recycled_at, s.recycled)
        s.recycled = 0


cdef int move_pages(int fd, uint64_t target, uint64_t source, uint64_t len, uint64_t mode,
                    uint64_t *moved) noexcept nogil:
    """UFFDIO_MOVE to the end, or to the page that can't be moved: 0, or that page's -errno; *moved bytes before it."""
    cdef uint64_t at = 0, deadline = 0
    cdef int64_t done
    cdef int err
    cdef unsigned int tries = 0
    moved[0] = 0
    while at < len:
        done = 0
        err = uf_move(fd, target + at, source + at, len - at, mode, &done)
        if err == 0:
            at = len
        elif done > 0:
            at += <uint64_t>done            # stopped before a page that says why when it is the first
        elif err == -EAGAIN:
            if deadline == 0:
                deadline = now_ns() + SECOND_NS
            elif now_ns() > deadline:
                return err
            nap(tries)
            tries += 1
        else:
            return err
        moved[0] = at
    return 0


# ---- what the policy is told ------------------------------------------------------------------------------------

cdef inline uint64_t ref_of(Region_t *r, uint64_t b) noexcept nogil:
    return ((r.id & (MAX_REGIONS - 1)) + 1) << REF_BLOCK_BITS | b


cdef void note_touch(Engine_t *e, uint32_t tid, uint64_t address) noexcept nogil:
    """With a budget of few blocks: a thread that faults where it lately did was not let run before its block was taken
    again. So blocks that came stay longer, until that is over: there is progress at the smallest budget."""
    cdef Touch *t = &e.touch[tid % TOUCHERS]
    cdef uint64_t page = address / PAGE, now = e.residence_ns
    cdef bint lost = t.tid == tid and (t.page[0] == page or t.page[1] == page or t.page[2] == page or t.page[3] == page)
    if lost:
        e.residence_ns = now * 2 if now < RESIDENCE_MOST_NS else now
    else:
        e.residence_ns = now - now / 64 if now > RESIDENCE_NS else now
        t.page[t.at & 3] = page
        t.at += 1
    t.tid = tid


cdef void note_put(Region_t *r, uint64_t b, uint32_t n, uint32_t kind) noexcept nogil:
    """Blocks that came. A full ring is waited for: the evictor drains it, and never waits for a fault."""
    cdef Engine_t *e = r.engine
    cdef Notes *q = e.notes
    cdef uint64_t at = u64_load(&q.tail), turn
    cdef unsigned int tries = 0
    cdef Note *note
    while not u32_load(&e.stopping):
        note = &q.cell[at & (NOTES - 1)]
        turn = u64_load(&note.turn)
        if turn == at:
            if u64_cas(&q.tail, at, at + 1):
                note.region_id = r.id
                note.first = b
                note.count = n
                note.kind = kind
                u64_store(&note.turn, at + 1)
                if at & 255 == 0 and at - u64_load(&q.head) > NOTES / 2:
                    evictor_ring(e)
                return
        elif <int64_t>(turn - at) < 0:
            evictor_ring(e)
            nap(tries)
            tries += 1
        at = u64_load(&q.tail)


cdef void notes_init(Notes *q) noexcept nogil:
    cdef uint64_t i
    for i in range(<uint64_t>NOTES):
        q.cell[i].turn = i
    q.head = 0
    q.tail = 0


cdef bint note_take(Notes *q, Note *out) noexcept nogil:
    """Under policy_lock: one taker at a time."""
    cdef uint64_t at = u64_load(&q.head)
    cdef Note *note = &q.cell[at & (NOTES - 1)]
    if u64_load(&note.turn) != at + 1:
        return False
    out[0] = note[0]
    u64_store(&note.turn, at + NOTES)
    u64_store(&q.head, at + 1)
    return True


cdef void notes_drain(Engine_t *e) noexcept nogil:
    """Under policy_lock."""
    cdef Note n
    cdef Region_t *r
    while note_take(e.notes, &n):
        r = region_acquire(n.region_id)
        if r != NULL:                       # else its end takes the blocks from the policy
            note_apply(e, r, &n)
            region_release(r)


cdef void note_apply(Engine_t *e, Region_t *r, Note *n) noexcept nogil:
    cdef uint64_t b, now = 0
    cdef uint32_t state
    for b in range(n.first, n.first + n.count):
        if n.kind == NOTE_RESCUED:
            policy_rescued(&e.pol, r.node[b])
        else:
            state = u32_load(&r.state[b]) & STATE_MASK
            if state == MISSING or state == POISONED:
                continue                    # gone again: discarded
            r.node[b] = policy_filled(&e.pol, r.node[b], ref_of(r, b), r.shift, n.kind == NOTE_AHEAD)
            if n.kind == NOTE_KEEP:
                policy_keep(&e.pol, r.node[b])
        if few_blocks(e):
            if now == 0:
                now = now_ns()
            e.recent[e.recent_at % RECENT].ref = ref_of(r, b)
            e.recent[e.recent_at % RECENT].since_ns = now
            e.recent_at += 1


cdef inline bint few_blocks(Engine_t *e) noexcept nogil:
    """Whether the order of the queues alone is no guarantee that a block stays until who waited for it has run."""
    return u64_load(&e.limit) / (e.block_max + 1) < 4 * RECENT


cdef bint is_young(Engine_t *e, uint64_t ref, uint64_t now) noexcept nogil:
    """With a budget of few blocks: whether this one came a moment ago, so that who waited for it may not have run."""
    cdef int i
    for i in range(RECENT):
        if e.recent[i].ref == ref and now - e.recent[i].since_ns < e.residence_ns:
            return True
    return False
