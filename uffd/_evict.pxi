# Eviction: blocks are moved out of a region into the pool, where they have a second chance, and then out of memory.
#
# Uses:     the states of _fill.pxi, room and pool of _room.pxi; writer_ask of _store.pxi
# Provides: evict_some (what makes room), evictor_main, rescue (a touch of a pooled block), demand_pooled, evict_blocks
#           and discard_blocks (what the program asks for), forbid_write, tear_copy, the slots of API calls
#
#   CLEAN > EVICTING > POOLED > EVICTING > MISSING             the way out
#   DIRTY > EVICTING > POOLED_DIRTY (> COPYING > POOLED)       the same; written back from the pool
#   POOLED | POOLED_DIRTY > FILLING > CLEAN | DIRTY            touched there: back in
#
# Taking a block out is one step to the program: UFFDIO_MOVE takes each page out of its page table, so that a write is
# in the page that is moved, or faults and finds EVICTING. Shared pages are unmapped and stay in their file. Never copy
# and drop what can't be moved: a device, or a forked child, may have the page.

cdef enum:
    EVICT_BATCH = 32
    EVICT_BYTES = 1 << 20                   # of one batch
    GO_BACK, GO_POOL, GO_AGAIN, GO_GONE, GO_RESCUED, GO_FORGET     # what has become of a block in hand

cdef struct Batch:                          # blocks in hand: neither in a queue of the policy nor gone
    uint32_t n
    bint dropping
    uint32_t node[EVICT_BATCH]
    uint64_t ref[EVICT_BATCH]
    uint32_t fate[EVICT_BATCH]


# ---- a batch ----------------------------------------------------------------------------------------------------

cdef bint evict_some(Engine_t *e, Slot *s) noexcept nogil:
    """Takes some blocks out, or drops some that were: False if nothing could be done. Any thread that has no run."""
    cdef Batch t
    pthread_mutex_lock(&e.policy_lock)
    batch_take(e, &t, EVICT_BYTES, False)
    pthread_mutex_unlock(&e.policy_lock)
    if t.n == 0 or evict_batch(e, s, &t):
        return t.n != 0
    if not t.dropping:
        return False
    # The pool is full of what its store does not take, or not yet: it must not keep clean blocks from leaving.
    pthread_mutex_lock(&e.policy_lock)
    batch_take(e, &t, EVICT_BYTES, True)
    pthread_mutex_unlock(&e.policy_lock)
    return t.n != 0 and evict_batch(e, s, &t)


cdef void evict_first(Engine_t *e, Slot *s, uint64_t nbytes) noexcept nogil:
    """Before a fill of nbytes, where less room is left than there should be: about as much is taken out by the thread
    that fills. It costs that thread what the evictor would take on another CPU, but not what two threads of one address
    space cost each other (each page that leaves is told to every CPU that runs one). Not where others are at it; in the
    SIGBUS handler too."""
    cdef Batch t
    if u64_load(&e.limit) == NO_LIMIT or room_left(e) >= room_high(e) or pthread_mutex_trylock(&e.policy_lock) != 0:
        return
    batch_take(e, &t, 2 * nbytes if 2 * nbytes < EVICT_BYTES else EVICT_BYTES, False)
    pthread_mutex_unlock(&e.policy_lock)
    if t.n:
        evict_batch(e, s, &t)


cdef bint evict_batch(Engine_t *e, Slot *s, Batch *t) noexcept nogil:
    """Moves out, or drops, what is in hand; whether anything was done."""
    cdef Region_t *r
    cdef uint64_t b
    cdef uint32_t i = 0, k
    while i < t.n:
        r = region_of_ref(t.ref[i])
        if r == NULL:
            t.fate[i] = GO_FORGET
            i += 1
            continue
        b = t.ref[i] & ((<uint64_t>1 << REF_BLOCK_BITS) - 1)
        k = 1
        if t.dropping:
            t.fate[i] = drop_block(s, r, b)
        elif t.fate[i] != GO_BACK:
            while i + k < t.n and t.ref[i + k] == t.ref[i] + k and t.fate[i + k] != GO_BACK:
                k += 1
            k = move_out(s, r, b, k, &t.fate[i])
        region_release(r)
        i += k
    return batch_put(e, t)


cdef void batch_take(Engine_t *e, Batch *t, uint64_t most, bint past_pool) noexcept nogil:
    """The next blocks in the policy's order, about `most` bytes of them, sorted by address. past_pool: victims, however
    full the pool is. Under policy_lock."""
    cdef uint64_t nbytes = 0, now = 0
    cdef uint32_t node
    t.n = 0
    notes_drain(e)
    t.dropping = policy_pool_full(&e.pol) and not past_pool
    if few_blocks(e):
        now = now_ns()
    while t.n < EVICT_BATCH and nbytes < most:
        node = policy_drop(&e.pol) if t.dropping else policy_victim(&e.pol)
        if node == 0 and t.n == 0 and not t.dropping and not past_pool:
            t.dropping = True
            continue
        if node == 0:
            break
        nbytes += <uint64_t>1 << policy_shift(&e.pol, node)
        batch_insert(t, node, policy_ref(&e.pol, node),
                     GO_BACK if now and not t.dropping and is_young(e, policy_ref(&e.pol, node), now) else GO_POOL)


cdef void batch_insert(Batch *t, uint32_t node, uint64_t ref, uint32_t fate) noexcept nogil:
    cdef uint32_t i = t.n
    while i > 0 and t.ref[i - 1] > ref:
        t.ref[i] = t.ref[i - 1]
        t.node[i] = t.node[i - 1]
        t.fate[i] = t.fate[i - 1]
        i -= 1
    t.ref[i] = ref
    t.node[i] = node
    t.fate[i] = fate
    t.n += 1


cdef bint batch_put(Engine_t *e, Batch *t) noexcept nogil:
    """Tells the policy what became of the batch; whether anything did."""
    cdef uint32_t i, node
    cdef bint moved = False
    pthread_mutex_lock(&e.policy_lock)
    for i in range(t.n):
        node = t.node[i]
        if policy_ref(&e.pol, node) != t.ref[i]:
            continue                        # its region ended meanwhile, and the node has another block
        if t.fate[i] == GO_POOL:
            policy_pooled(&e.pol, node)
        elif t.fate[i] == GO_GONE:
            policy_gone(&e.pol, node)
        elif t.fate[i] == GO_AGAIN:
            policy_redrop(&e.pol, node)
        elif t.fate[i] == GO_RESCUED:
            policy_rescued(&e.pol, node)
        elif t.fate[i] == GO_FORGET:
            policy_forget(&e.pol, node)
        else:
            policy_back(&e.pol, node)
        moved = moved or t.fate[i] == GO_POOL or t.fate[i] == GO_GONE or t.fate[i] == GO_FORGET
    pthread_mutex_unlock(&e.policy_lock)
    return moved


cdef Region_t *region_of_ref(uint64_t ref) noexcept nogil:
    """The region of a block's name, with a reference, or NULL."""
    cdef uint32_t *mark = epoch_enter()
    cdef Region_t *r = <Region_t *>ptr_load(&table[(ref >> REF_BLOCK_BITS) - 1])
    if r != NULL and not u32_load(&r.closing):
        u32_add_seq(&r.refs, 1)
    else:
        r = NULL
    epoch_leave(mark)
    return r


# ---- out of the region ------------------------------------------------------------------------------------------

cdef inline bint can_store(Region_t *r) noexcept nogil:
    return r.writes_back or r.spills != NULL or r.volatile_pages


cdef bint claim_out(Slot *s, Region_t *r, uint64_t b, uint32_t from_state, uint32_t to_state) noexcept nogil:
    """from_state > EVICTING or COPYING, unless the block is pinned. Who pins says so first, then looks at the state."""
    cdef uint32_t word = u32_load(&r.state[b])
    while word & STATE_MASK == from_state and u8_load(&r.pins[b]) == 0 and not wire_gone(r):
        if u32_cas(&r.state[b], word, to_state | word & (WAITERS | FROM_PARENT | KEPT | STICKY)
                   | (s.index + 1) << OWNER_SHIFT | ((word >> GENERATION_SHIFT) + 1) << GENERATION_SHIFT):
            fence_seq()
            if u8_load(&r.pins[b]) == 0:
                return True
            publish(r, b, 1, from_state)
            return False
        word = u32_load(&r.state[b])
    return False


cdef uint32_t move_out(Slot *s, Region_t *r, uint64_t b, uint32_t n, uint32_t *fate) noexcept nogil:
    """Takes up to n blocks from b on out, those that are in the state of the first; how many are answered for."""
    cdef uint32_t state = u32_load(&r.state[b]) & STATE_MASK, k = 0, i
    cdef uint32_t most = <uint32_t>(RUN_BYTES >> r.shift)
    if most > 64:
        most = 64                           # slots of one word of the bitmap
    fate[0] = GO_BACK
    if state == POOLED or state == POOLED_DIRTY:
        fate[0] = GO_POOL
    elif state == MISSING or state == POISONED:
        fate[0] = GO_FORGET
    if state != CLEAN and (state != DIRTY or not can_store(r)) or not is_shared(r) and not pool_prepare(r):
        return 1
    critical_enter(s)
    while k < n and k < (most if most else 1) and claim_out(s, r, b + k, state, EVICTING):
        k += 1
    if k:
        for i in range(k):
            fate[i] = GO_BACK
        take_out(s, r, b, k, state, fate)
    critical_leave(s)
    return k if k else 1


cdef void take_out(Slot *s, Region_t *r, uint64_t b, uint32_t n, uint32_t state, uint32_t *fate) noexcept nogil:
    """Takes the claimed blocks out and publishes them, each with its fate."""
    cdef char *start = r.base + (b << r.shift)
    cdef uint32_t pooled = POOLED if state == CLEAN else POOLED_DIRTY, at = 0, k, done
    cdef Engine_t *e = r.engine
    if is_shared(r):
        take_out_shared(s, r, b, n, state, fate)
        return
    if not r.writable and (not r.moves or e.pool_fd < 0):
        madvise(start, run_span(r, b, n), MADV_DONTNEED)    # nobody can have written to it, a device neither
        for k in range(n):
            fate[k] = GO_GONE
        count(s, r, C_EVICTED, n)
        room_give(e, run_span(r, b, n))
        publish(r, b, n, MISSING)
        return
    k = n
    while k and not hole_take(e, r.shift, k, &at):
        k >>= 1
    if k == 0:
        publish(r, b, n, state)             # no address space for them: they stay
        return
    if r.moves and e.pool_fd >= 0:
        done = move_to_pool(s, r, b, k, at, &pooled, fate)
    else:
        done = copy_to_pool(s, r, b, k, at, state)
    settle_out(s, r, b, n, done, k, at, state, pooled, fate)


cdef void settle_out(Slot *s, Region_t *r, uint64_t b, uint32_t n, uint32_t done, uint32_t k, uint32_t at,
                     uint32_t state, uint32_t pooled, uint32_t *fate) noexcept nogil:
    """Publishes: of n claimed blocks, for k of which there are slots from `at` on, `done` are in the pool."""
    cdef uint32_t i
    if done < k:
        hole_give(r.engine, r.shift, at + done, k - done)
    for i in range(done):
        r.place[b + i] = at + i
        fate[i] = GO_POOL
    if done:
        publish(r, b, done, pooled)
        if pooled == POOLED_DIRTY and not r.volatile_pages:
            writer_ask(r, b, done)
    for i in range(done, n):
        if fate[i] == GO_BACK:
            publish(r, b + i, 1, DIRTY if pooled == DIRTY and i == 0 else state)
        elif fate[i] == GO_GONE:
            count(s, r, C_EVICTED, 1)
            room_give(r.engine, block_span(r, b + i))
            publish(r, b + i, 1, MISSING)


cdef bint pool_prepare(Region_t *r) noexcept nogil:
    """The pool of the region's block size is there. Not inside `critical`: fork() waits for that with the lock."""
    cdef bint ready
    if ptr_load(&pool_of(r.engine, r.shift).base) != NULL:
        return True
    pthread_mutex_lock(&r.engine.policy_lock)
    ready = pool_ready(r.engine, r.shift)
    pthread_mutex_unlock(&r.engine.policy_lock)
    return ready


cdef uint32_t move_to_pool(Slot *s, Region_t *r, uint64_t b, uint32_t n, uint32_t at, uint32_t *pooled,
                           uint32_t *fate) noexcept nogil:
    """By UFFDIO_MOVE: how many whole blocks. At one that can't be moved it stops, with its pages back in their place;
    a clean one that lacks pages (the program dropped them) is dropped whole."""
    cdef Engine_t *e = r.engine
    cdef uint64_t start = <uint64_t>(r.base + (b << r.shift)), slot = <uint64_t>slot_at(e, r.shift, at)
    cdef uint64_t moved = 0, part, ignored = 0
    cdef int err = move_pages(e.pool_fd, slot, start, run_span(r, b, n), 0, &moved)
    if err == -EBUSY and moved == 0 and unshare(r, b):
        if not r.guard:
            pooled[0] = POOLED_DIRTY        # it was unprotected for a moment: a write may be in it
        err = move_pages(e.pool_fd, slot, start, block_span(r, b), 0, &moved)
        mark_block(r, b)
        if err != 0 and not r.guard and r.protect:
            pooled[0] = DIRTY
        elif err != 0:
            uf_writeprotect(r.fd, start, block_span(r, b), UF_WRITEPROTECT_WP)
        else:
            return 1
    if err == 0:
        return n
    part = moved & ((<uint64_t>1 << r.shift) - 1)
    moved -= part
    if err == -ENOENT and pooled[0] == POOLED:
        madvise(<char *>slot + moved, part, MADV_DONTNEED)
        madvise(<char *>start + moved, block_span(r, b + (moved >> r.shift)), MADV_DONTNEED)
        fate[moved >> r.shift] = GO_GONE
        return <uint32_t>(moved >> r.shift)
    count(s, r, C_EVICT_BUSY, 1)
    if err == -ENOENT:
        repair_ask(r, b + (moved >> r.shift))   # dirty: what is left of it can't be stored without the rest
    if part:
        move_back(r, start + moved, slot + moved, part,
                  pooled[0] == POOLED or watched_run(r, b + (moved >> r.shift), b + (moved >> r.shift) + 1))
    return <uint32_t>(moved >> r.shift)


cdef void move_back(Region_t *r, uint64_t start, uint64_t slot, uint64_t nbytes, bint clean) noexcept nogil:
    """Pages of a block that could not be moved whole return to it. The block is busy: who writes to a page that is here
    again and not protected yet would not be seen, so clean ones are copied in, protected. Where the program unmapped
    the block they are dropped. A kernel that refuses for a second ends the process."""
    cdef uint64_t moved = 0, mode = UF_COPY_WP if clean and r.protect else 0, deadline = now_ns() + SECOND_NS
    cdef unsigned int tries = 0
    cdef int err
    if not clean or r.guard:
        move_pages(r.fd, start, slot, nbytes, UF_MOVE_DONTWAKE, &moved)
        if clean:
            uf_writeprotect(r.fd, start, nbytes, UF_WRITEPROTECT_WP)
    while moved < nbytes:
        err = place_run(r, OP_COPY, start + moved, slot + moved, nbytes - moved, mode)
        if err >= 0 or err == -ENOENT:
            madvise(<char *>slot + moved, nbytes - moved, MADV_DONTNEED)
            break
        refused(r, (start - <uint64_t>r.base) >> r.shift, err, deadline, &tries)


cdef bint unshare(Region_t *r, uint64_t b) noexcept nogil:
    """A block that shares pages with a forked process gets its own; False where that can't be, or would not help."""
    cdef char *start = r.base + (b << r.shift)
    if not can_store(r) and not r.guard or u32_load_seq(&r.image_gate) or image_unsaved(r, b) != NULL:
        return False                        # (an image that lacks it: it must not be writable before it is saved)
    mark_block(r, b)                        # and once more when it is moved: it is writable in between
    if r.protect and uf_writeprotect(r.fd, <uint64_t>start, block_span(r, b), 0) != 0:
        return False
    return map_unshare(start, block_span(r, b)) == 0 or r.protect


cdef uint32_t copy_to_pool(Slot *s, Region_t *r, uint64_t b, uint32_t n, uint32_t at, uint32_t state) noexcept nogil:
    """Kernels before 6.8: protected, copied, dropped. How many blocks."""
    cdef uint32_t i
    cdef char *start
    cdef uint64_t span
    for i in range(n):
        start = r.base + ((b + i) << r.shift)
        span = block_span(r, b + i)
        if state == DIRTY and (not r.protect or uf_writeprotect(r.fd, <uint64_t>start, span, UF_WRITEPROTECT_WP) != 0):
            return i
        if not copy_resident(s, r, b + i, slot_at(r.engine, r.shift, at + i)):
            return i
        madvise(start, span, MADV_DONTNEED)
    return n


cdef bint copy_resident(Slot *s, Region_t *r, uint64_t b, char *target) noexcept nogil:
    """Copies a protected block; False if pages of it are not there (the program dropped them), or went meanwhile: then
    the fault of this very thread was answered by tear_copy."""
    cdef char *page = r.base + (b << r.shift)
    if not block_present(r, b):
        return False
    u32_store(&s.torn, 0)
    u32_store(&s.tid, <uint32_t>thread_id())
    memcpy(target, page, block_span(r, b))
    u32_store(&s.tid, 0)
    if u32_load(&s.torn) == 0:
        return True
    untear(s, r, b)
    return False


cdef void untear(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    """Takes away what tear_copy put in: missing again, so that a touch repairs it."""
    cdef char *page = r.base + (b << r.shift)
    cdef uint64_t i
    for i in range(block_span(r, b) / PAGE):
        if s.torn_page[i / 64] >> (i % 64) & 1:
            madvise(page + i * PAGE, PAGE, MADV_DONTNEED)


cdef void tear_copy(Slot *owner, Region_t *r, uint64_t b) noexcept nogil:
    """The thread that copies a block faults in it: the program dropped pages of it in these microseconds. It gets zeros
    in their place so that it can go on; it takes them away again, and what it has copied is not used."""
    cdef char *page = r.base + (b << r.shift)
    cdef uint64_t i
    if u32_load(&owner.torn) == 0:
        memset(owner.torn_page, 0, sizeof(owner.torn_page))
    for i in range(block_span(r, b) / PAGE):
        if not pages_there(page + i * PAGE, PAGE, PAGE):
            owner.torn_page[i / 64] |= <uint64_t>1 << (i % 64)
    u32_store(&owner.torn, 1)
    place_around(r, <uint64_t>page, block_span(r, b), zero_bytes, r.protect)


cdef void take_out_shared(Slot *s, Region_t *r, uint64_t b, uint32_t n, uint32_t state, uint32_t *fate) noexcept nogil:
    """Shared pages leave the page table and stay in their file; without CONTINUE they could not come back."""
    cdef uint32_t i
    if not r.minor:
        if state == DIRTY:
            publish(r, b, n, state)
            writer_ask(r, b, n)
            return
        for i in range(n):
            fallocate(r.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <int64_t>((b + i) << r.shift),
                      <int64_t>block_span(r, b + i))
            fate[i] = GO_GONE
        count(s, r, C_EVICTED, n)
        room_give(r.engine, run_span(r, b, n))
        publish(r, b, n, MISSING)
        return
    madvise(r.base + (b << r.shift), run_span(r, b, n), MADV_DONTNEED)
    for i in range(n):
        fate[i] = GO_POOL
    publish(r, b, n, POOLED if state == CLEAN else POOLED_DIRTY)
    if state == DIRTY and not r.volatile_pages:
        writer_ask(r, b, n)


# ---- out of memory ----------------------------------------------------------------------------------------------

cdef uint32_t drop_block(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    """The oldest block of the pool leaves memory, if its bytes are in its store; its fate."""
    cdef uint32_t word = u32_load(&r.state[b]), state = word & STATE_MASK
    cdef bint forgets = state == POOLED_DIRTY and r.volatile_pages
    cdef bint kept
    if word & WRITING or state == POOLED_DIRTY and not forgets:
        if not word & WRITING:
            writer_ask(r, b, 1)
        return GO_AGAIN
    if state == MISSING or state == POISONED:
        return GO_FORGET
    if state != POOLED and not forgets:
        return GO_RESCUED
    critical_enter(s)
    kept = forgets and (u32_load_seq(&r.image_gate) or image_unsaved(r, b) != NULL)     # an image has it first
    if kept or not claim_out(s, r, b, state, EVICTING):
        critical_leave(s)
        return GO_AGAIN
    if forgets:
        mark_block(r, b)
    leave_pool(s, r, b, 0 if forgets else STICKY)
    critical_leave(s)
    return GO_GONE


cdef void leave_pool(Slot *s, Region_t *r, uint64_t b, uint32_t kept) noexcept nogil:
    """A pooled block that the caller owns is gone."""
    if is_shared(r):
        fallocate(r.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <int64_t>(b << r.shift),
                  <int64_t>block_span(r, b))
        room_give(r.engine, block_span(r, b))
    else:
        slot_release(r.engine, r.shift, r.place[b], block_span(r, b))
    count(s, r, C_EVICTED, 1)
    publish_as(r, b, 1, MISSING, kept)


# ---- back in ----------------------------------------------------------------------------------------------------

cdef bint demand_pooled(Slot *s, Region_t *r, uint64_t b, bint write) noexcept nogil:
    """A touch of a block in the pool: answered, or to be looked at again (after a wait for room)."""
    if rescue(s, r, b, write):
        return True
    if s.no_room:
        room_wait(s, r, b, write)
    return False


cdef bint rescue(Slot *s, Region_t *r, uint64_t b, bint write) noexcept nogil:
    """Brings a pooled block back; False if it is not there any more.

    MOVE maps pages writable, and protection comes after, so a clean block that must stay known as such is copied in;
    all others are moved.
    """
    cdef uint32_t word = u32_load(&r.state[b]), state = word & STATE_MASK
    cdef bint watched = u32_load(&r.watched) != 0 or u32_load(&r.frozen)
    cdef bint protect = r.protect and (state == POOLED and not (write and r.writable) or watched)
    cdef bint shared = is_shared(r), can_move = r.moves and r.engine.pool_fd >= 0
    cdef bint copies = not shared and (not can_move or protect and not r.guard)
    cdef uint64_t span = block_span(r, b)
    cdef bint came = False, charged = False
    cdef int err = 0
    s.no_room = 0
    if state != POOLED and state != POOLED_DIRTY or wire_gone(r):
        return False
    # Without room it is copied all the same: its slot is given back at once, so a thread has at most one block twice in
    # memory, while it copies. Moved, unprotected, it would have to count as written.
    if copies:
        charged = room_charge(r.engine, span) or pool_trim(r.engine, span) and room_charge(r.engine, span)
    critical_enter(s)
    if claim(s, r, b, state):
        if not protect and watched_run(r, b, b + 1):
            came = False                    # since a moment ago; it is asked for again
            if charged:
                room_give(r.engine, span)
        elif shared:
            err = place_run(r, OP_CONTINUE, <uint64_t>(r.base + (b << r.shift)), 0, span,
                            UF_CONTINUE_WP if protect else 0)
            came = err >= 0 or err == -EFAULT   # a hole: the program dropped pages. The touch asks again, for them
        else:
            came = bring_in(r, b, &state, protect, copies, charged)
        if came:
            count(s, r, C_RESCUED, 1)
            publish(r, b, 1, CLEAN if state == POOLED and (protect or not r.writable) else DIRTY)
            if err == -EFAULT:
                uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), span)
        else:
            publish(r, b, 1, state)
            uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), span)    # it asks again
    elif charged:
        room_give(r.engine, span)
    critical_leave(s)
    if came:
        s.room_since_ns = 0
        note_put(r, b, 1, NOTE_RESCUED)
    return came


cdef bint bring_in(Region_t *r, uint64_t b, uint32_t *state, bint protect, bint copies, bint charged) noexcept nogil:
    """Private pages from their slot, by move or copy (charged: counted twice until then); False when the kernel refuses
    both, and then all of them are in the slot again (*state: what it is now). Copies come protected, so that those of a
    block that does not come whole can be dropped: nobody has written to them."""
    cdef Engine_t *e = r.engine
    cdef uint64_t start = <uint64_t>(r.base + (b << r.shift)), span = block_span(r, b), moved = 0
    cdef uint64_t slot = <uint64_t>slot_at(e, r.shift, r.place[b])
    if not copies:                          # what is shared with a forked child can't be moved: copied, the rest of it
        move_pages(r.fd, start, slot, span, UF_MOVE_DONTWAKE if protect else 0, &moved)
    if moved < span and place_run(r, OP_COPY, start + moved, slot + moved, span - moved,
                                  UF_COPY_WP if r.protect else 0) < 0:
        if r.protect:
            madvise(<char *>start + moved, span - moved, MADV_DONTNEED)
        send_back(r, b, slot, moved)
        if moved and not protect and r.writable:
            state[0] = POOLED_DIRTY         # it could be written to for a moment
        if charged:
            room_give(e, span)
        return False
    if moved < span and r.protect and not protect:
        unprotect(r, b, 1)
    if protect and not copies:
        uf_writeprotect(r.fd, start, span, UF_WRITEPROTECT_WP)
        uf_wake(r.fd, start, span)
    if charged:
        slot_release(e, r.shift, r.place[b], span)
    else:
        if moved < span:
            madvise(<char *>slot, span, MADV_DONTNEED)
        hole_give(e, r.shift, r.place[b], 1)
    return True


cdef void send_back(Region_t *r, uint64_t b, uint64_t slot, uint64_t nbytes) noexcept nogil:
    """The pages of a block that were moved in return to their slot, whatever was written to them. A block that is half
    here and half there could be neither used nor stored, so a kernel that refuses for a second ends the process."""
    cdef uint64_t start = <uint64_t>(r.base + (b << r.shift)), at = 0, moved = 0, deadline = now_ns() + SECOND_NS
    cdef unsigned int tries = 0
    cdef int err
    while at < nbytes:
        err = move_pages(r.engine.pool_fd, slot + at, start + at, nbytes - at, 0, &moved)
        at += moved
        if err != 0:
            refused(r, b, err, deadline, &tries)


cdef void forbid_write(Region_t *r, uint64_t b) noexcept nogil:
    """A write to a read-only region: its memory is made what it says that it is, so that the write is SIGSEGV."""
    mprotect(r.base + (b << r.shift), block_span(r, b), PROT_READ)
    uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))


# ---- the evictor ------------------------------------------------------------------------------------------------

cdef void *evictor_main(void *argument) noexcept nogil:
    """Makes room ahead of need: rung at the low mark, it works up to the high one. Never waits for a fault or a
    provider, so that everybody may wait for it."""
    cdef Engine_t *e = <Engine_t *>argument
    cdef Slot *s = &e.slots[EVICTOR_SLOT]
    cdef uint64_t pause_ms = 1, over
    while not u32_load(&e.stopping):
        u32_swap(&e.bell, 0)
        pthread_mutex_lock(&e.policy_lock)
        notes_drain(e)
        pthread_mutex_unlock(&e.policy_lock)
        over = u64_load(&e.used)
        if over > u64_load(&e.limit):
            pool_trim(e, over - u64_load(&e.limit))
        while room_left(e) < room_high(e) and not u32_load(&e.stopping):
            if not evict_some(e, s):
                break
            pause_ms = 1
            room_tell(e)
        if room_left(e) >= room_high(e) / 2 or u64_load(&e.limit) == NO_LIMIT:
            pause_ms = 1
            futex_wait(&e.bell, 0, SECOND_NS)
            continue
        poll(NULL, 0, 1)                    # all is pinned, young, or waits to be written back
        futex_wait(&e.bell, 0, pause_ms * 1000000)
        pause_ms = pause_ms * 2 if pause_ms < 64 else 64
    u32_sub(&e.evictors, 1)
    futex_wake_all(&e.evictors)
    return NULL


# ---- what the program asks for ----------------------------------------------------------------------------------

cdef Slot *call_borrow(Engine_t *e) noexcept nogil:
    """A slot for an API call; sleeps while all are in use."""
    cdef uint32_t turn, i, bits
    while True:
        turn = u32_load(&e.call_turn)
        bits = u32_load(&e.call_slots)
        for i in range(<uint32_t>CALL_SLOTS):
            if bits & 1 << i == 0 and u32_cas(&e.call_slots, bits, bits | 1 << i):
                return &e.slots[CALL_SLOT + i]
        if bits == (1 << CALL_SLOTS) - 1:
            futex_wait(&e.call_turn, turn, SLICE_NS)


cdef void call_return(Engine_t *e, Slot *s) noexcept nogil:
    cdef uint32_t bit = <uint32_t>1 << (s.index - CALL_SLOT), bits = u32_load(&e.call_slots)
    s.tid = 0
    while not u32_cas(&e.call_slots, bits, bits & ~bit):
        bits = u32_load(&e.call_slots)
    u32_add(&e.call_turn, 1)
    futex_wake_all(&e.call_turn)


cdef void forget_node(Region_t *r, uint64_t b) noexcept nogil:
    """The policy forgets a block that is gone by other ways than its own."""
    cdef Engine_t *e = r.engine
    pthread_mutex_lock(&e.policy_lock)
    notes_drain(e)
    if r.node[b] and policy_ref(&e.pol, r.node[b]) == ref_of(r, b):
        policy_forget(&e.pol, r.node[b])
    r.node[b] = 0
    pthread_mutex_unlock(&e.policy_lock)


cdef uint64_t evict_blocks(Slot *s, Region_t *r, uint64_t first, uint64_t end) noexcept nogil:
    """Takes clean blocks of [first, end) out of memory at once; bytes. Pinned and dirty ones stay."""
    cdef uint64_t b = first, freed = 0
    cdef uint32_t fate = 0, state
    while b < end and not u32_load(&r.closing):
        state = u32_load(&r.state[b]) & STATE_MASK
        if state == CLEAN or state == DIRTY and r.volatile_pages:
            move_out(s, r, b, 1, &fate)
            if fate == GO_GONE:
                freed += block_span(r, b)
                forget_node(r, b)
            state = u32_load(&r.state[b]) & STATE_MASK
        if (state == POOLED or state == POOLED_DIRTY and r.volatile_pages) and drop_block(s, r, b) == GO_GONE:
            freed += block_span(r, b)
            forget_node(r, b)
        b += 1
    return freed


cdef uint64_t discard_blocks(Slot *s, Region_t *r, uint64_t first, uint64_t end) noexcept nogil:
    """Drops blocks of [first, end) and what was written to them, from the first on; where it stopped: at `end`, or at
    a block that is busy, pinned or being written."""
    cdef uint64_t b = first
    cdef uint32_t word, state
    while b < end and not u32_load(&r.closing):
        word = u32_load(&r.state[b])
        state = word & STATE_MASK
        if is_busy(state) or word & WRITING:
            return b
        if state == MISSING and lies_elsewhere(r, b):
            if image_keeps(s, r, b):
                return b
            if claim(s, r, b, MISSING):
                mark_block(r, b)
                spill_forget(r, b)
                publish_as(r, b, 1, MISSING, 0)
            critical_leave(s)
        elif state == CLEAN or state == DIRTY or state == POOLED or state == POOLED_DIRTY:
            if u8_load(&r.pins[b]) or not discard_block(s, r, b, state):
                return b
        lost_forget(r, b)
        if r.part != NULL and r.part.wire.source:
            part_written(r, b, 1)           # what was sent of it is not what is here
        b += 1
    return b


cdef bint discard_block(Slot *s, Region_t *r, uint64_t b, uint32_t state) noexcept nogil:
    cdef char *start = r.base + (b << r.shift)
    if image_keeps(s, r, b):
        return False
    if not claim_out(s, r, b, state, EVICTING):
        critical_leave(s)
        return False
    if u32_load(&r.state[b]) & SPILLED or is_dirty(state):
        mark_block(r, b)
    if u32_load(&r.state[b]) & SPILLED:
        spill_forget(r, b)
    if state == POOLED or state == POOLED_DIRTY:
        leave_pool(s, r, b, 0)
    else:
        madvise(start, block_span(r, b), MADV_DONTNEED)
        if is_shared(r):
            fallocate(r.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <int64_t>(b << r.shift),
                      <int64_t>block_span(r, b))
        room_give(r.engine, block_span(r, b))
        publish_as(r, b, 1, MISSING, 0)
    critical_leave(s)
    forget_node(r, b)
    return True
