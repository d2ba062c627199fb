# Migration, the destination's side: blocks that come by a socket into regions.
#
# Uses:     _wire.pxi; _wireplace.pxi; discard of _evict.pxi
# Provides: wire_spare, wire_error, wire_pending (asked by fills of a region that a migration brings); part_clear;
#           receive_push_main, receive_ask_main, gate_main (its threads); give_verdict, say_paused, ask_again;
#           wires_wait (asked by the keeper)

cdef uint64_t SPREAD = <uint64_t>0x9E3779B9 << 32 | 0x7F4A7C15      # the golden ratio: hashes block numbers


# ---- the destination: what fills ask ------------------------------------------------------------------------------

cdef inline bint wire_pending(Region_t *r, uint64_t b) noexcept nogil:
    """Whether the block has yet to come; or has gone: of a source's region whose file was passed on."""
    if r.part == NULL:
        return False
    return wire_gone(r) if r.part.wire.source else bit_of(r.part.todo, b)


cdef inline bint wire_gone(Region_t *r) noexcept nogil:
    return r.part != NULL and u32_load(&r.frozen) and r.part.passed


cdef uint32_t wire_spare(Slot *s, Region_t *r, uint64_t b, uint32_t n) noexcept nogil:
    """How many of the blocks [b, b + n) may be filled from elsewhere than the wire. 0: the first has yet to come; it
    was asked for, and whoever waits for it is woken when it is there. What will never come is for the fill to say, one
    by one."""
    cdef Part_t *p = r.part
    cdef uint32_t k = 0, word
    if s.index >= WIRE_SLOT:
        return n
    if p.wire.source:
        while wire_gone(r):                 # its pages are another process's: whoever touches one waits
            touch_parked(p, b)
            word = u32_load(&r.state[b])
            if word & STATE_MASK != MISSING or word & WAITERS or u32_cas(&r.state[b], word, word | WAITERS):
                return 0
        return n
    while k < n and not bit_of(p.todo, b + k):
        k += 1
    if k:
        return k
    if u32_load(&p.wire.verdict):
        return 1
    while bit_of(p.todo, b):
        word = u32_load(&r.state[b])
        if word & STATE_MASK != MISSING or u32_load(&p.wire.verdict):
            return 1
        r.known[b * 4 / PAGE] = 1
        if word & WAITERS == 0 and not u32_cas(&r.state[b], word, word | WAITERS):
            continue
        fence_seq()                         # pairs with part_clear: it sees WAITERS, or we see its bit gone
        if not bit_of(p.todo, b):
            break
        ask_for(p, b)
        return 0
    return 1


cdef int wire_error(Region_t *r, uint64_t b) noexcept nogil:
    """Why a block that is still pending will never come: -errno."""
    cdef uint32_t verdict = u32_load(&r.part.wire.verdict)
    return -<int>verdict if verdict else -ENOTCONN


cdef void part_clear(Region_t *r, Part_t *p, uint64_t b) noexcept nogil:
    """The block is there, or is zeros, which its region has by itself."""
    cdef uint32_t word
    if not bit_take(p.todo, b):
        return
    if bit_take(p.dirty, b):
        note_came(p.wire, <uint32_t>(p - p.wire.part), b)
    fence_seq()
    word = u32_load(&r.state[b])
    if word & STATE_MASK == MISSING and word & WAITERS:
        u32_cas(&r.state[b], word, word & ~<uint32_t>WAITERS)
        futex_wake_all(&r.state[b])
        if not r.is_inline:
            uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))
    u64_add(&p.wire.left, <uint64_t>-1)


cdef inline Ask *ask_of(Wire_t *w, uint32_t part, uint64_t b) noexcept nogil:
    return &w.ask[(b * SPREAD >> 40 ^ part) & (WIRE_ASKS - 1)]


cdef void wire_toucher(Region_t *r, uint64_t b, uint32_t tid) noexcept nogil:
    """That thread waits for the block; before it is asked for. (Who touches it next is not told.)"""
    cdef Part_t *p = r.part
    cdef Ask *a
    if p == NULL or p.wire.source or not bit_of(p.todo, b):
        return
    a = ask_of(p.wire, <uint32_t>(p - p.wire.part), b)
    u32_store(&a.touched, 1)
    if not bit_of(p.dirty, b):
        u32_store(&a.tid, tid)


cdef void ask_for(Part_t *p, uint64_t b) noexcept nogil:
    """Sends a request, once. By workers: it never waits; what the socket does not take is sent later."""
    cdef Wire_t *w = p.wire
    cdef uint32_t part = <uint32_t>(p - w.part)
    cdef uint64_t key = (<uint64_t>part << 44 | b) + 1
    cdef Ask *a = ask_of(w, part, b)
    if bit_set(p.dirty, b):
        return
    u64_store(&a.key, key)
    u64_store(&a.since_ns, now_ns())
    u64_add(&w.asked, 1)
    pthread_mutex_lock(&w.send_lock)
    if not u32_load(&w.connected) or u32_load(&w.phase) != PH_POSTCOPY or not ask_send(w, part, b):
        u32_store(&w.asks_left, 1)
    pthread_mutex_unlock(&w.send_lock)


cdef bint ask_send(Wire_t *w, uint32_t part, uint64_t b) noexcept nogil:
    """Under send_lock. False where the socket takes nothing now."""
    cdef wire_head head
    if wire_ready(w.ask_fd, <short>POLLOUT, 0) != 0:
        return False
    head.kind = W_WANT
    head.part = part
    head.block = b
    head.count = 1
    head.nbytes = 0
    head.extra = 0
    return wire_send(w.ask_fd, &head, NULL, 0, WIRE_SLICE_MS) == 0


cdef void ask_again(Wire_t *w) noexcept nogil:
    """All that is wanted and not there: after a connection broke, or was full."""
    cdef uint32_t i
    cdef uint64_t b
    cdef Part_t *p
    cdef bint taken = True
    pthread_mutex_lock(&w.send_lock)
    for i in range(w.nparts):
        p = &w.part[i]
        b = wire_next_bit(p.dirty, 0, p.blocks)
        while b < p.blocks and taken:
            if bit_of(p.todo, b):
                taken = u32_load(&w.connected) and u32_load(&w.phase) == PH_POSTCOPY and ask_send(w, i, b)
            b = wire_next_bit(p.dirty, b + 1, p.blocks)
    pthread_mutex_unlock(&w.send_lock)
    if not taken:
        u32_store(&w.asks_left, 1)


cdef void note_came(Wire_t *w, uint32_t part, uint64_t b) noexcept nogil:
    """A block that was asked for is there: how long it took, from the fault."""
    cdef Ask *a = ask_of(w, part, b)
    cdef uint64_t ns
    cdef uint32_t tid = u32_load(&a.tid), i
    cdef int bucket
    if u64_load(&a.key) != (<uint64_t>part << 44 | b) + 1:
        return
    ns = now_ns() - a.since_ns
    u64_store(&a.key, 0)
    u32_store(&a.tid, 0)                    # a call asks for blocks, too, and is no touch
    u32_store(&a.touched, 0)
    bucket = u64_log2(ns)
    u64_add(&w.latency[bucket if bucket < BUCKETS else BUCKETS - 1], 1)
    u64_add(&w.blocked_ns, ns)
    if ns > w.latency_max_ns:
        w.latency_max_ns = ns
    for i in range(<uint32_t>WIRE_WAITERS if tid else 0):
        if u32_load(&w.waiter[i].tid) == tid or u32_cas(&w.waiter[i].tid, 0, tid):
            u64_add(&w.waiter[i].ns, ns)
            break


# ---- the destination: what comes ----------------------------------------------------------------------------------

cdef void *receive_push_main(void *argument) noexcept nogil:
    return receive_all(<Wire_t *>argument, False)


cdef void *receive_ask_main(void *argument) noexcept nogil:
    return receive_all(<Wire_t *>argument, True)


cdef void *receive_all(Wire_t *w, bint asks) noexcept nogil:
    """A thread of the destination: it takes frames off one of the connections, whichever they are just now."""
    cdef Landing l
    cdef uint32_t epoch = 0
    cdef int err
    cdef bint made = landing_make(w, &l, not asks)
    while wire_enter(w, &epoch):
        err = receive_frames(w, asks, epoch, &l) if made else -ENOMEM
        wire_break(w, epoch, err)
        wire_leave(w)
    landing_free(w, &l)
    wire_thread_ends(w)
    return NULL


cdef int receive_frames(Wire_t *w, bint asks, uint32_t epoch, Landing *l) noexcept nogil:
    """Until the connection ends: -errno."""
    cdef wire_head head
    cdef int fd = w.ask_fd if asks else w.push_fd
    cdef int err = 0
    while err == 0:
        err = wire_take(w, fd, &head, sizeof(wire_head), epoch, False)
        if err == 0 and asks and head.kind >= W_DIRTY and head.kind != W_PACKED:
            err = take_word(w, fd, &head, epoch, l.bytes)
        elif err == 0:
            err = take_blocks(w, fd, &head, epoch, l, asks)
            if err == 0 and not asks:
                w.handed += 1
                if head.extra or w.handed & 3 == 0 or wire_ready(fd, <short>POLLIN, 0) != 0:
                    frames_placed(w, fd)    # who sent them may be gone; what it had sent is read all the same
    return err


cdef int frames_placed(Wire_t *w, int fd) noexcept nogil:
    cdef wire_head head
    memset(&head, 0, sizeof(head))
    head.kind = W_ACK
    head.extra = w.handed
    return wire_send(fd, &head, NULL, 0, WIRE_SILENCE_MS)


cdef int take_blocks(Wire_t *w, int fd, wire_head *h, uint32_t epoch, Landing *l, bint asked) noexcept nogil:
    """Blocks, zeros or the word that a block is lost. Every number is another process's: each is checked."""
    cdef Part_t *p
    cdef uint32_t phase
    cdef uint64_t want
    cdef bint packed = h.kind == W_PACKED and w.packs
    if h.kind > W_BAD and not packed or h.part >= w.nparts:
        return -EPROTO
    p = &w.part[h.part]
    if h.count == 0 or h.block >= p.blocks or h.count > p.blocks - h.block:
        return -EPROTO
    want = part_bytes(p, h.block, h.count) if packed or h.kind == W_BLOCKS else 0
    if want > MAX_BLOCK_BYTES or h.count > 1 and want > WIRE_RUN or (h.nbytes >= want if packed else h.nbytes != want):
        return -EPROTO
    if u32_load(&w.phase) == PH_SETUP:
        wire_step(w, EV_DATA)
    phase = settled_phase(w, epoch)
    if phase != PH_PRECOPY and phase != PH_POSTCOPY and phase != PH_FROZEN:
        return -EPROTO
    return take_data(w, fd, h, want, epoch, l, asked) if want else take_piece(w, p, h, l, l.bytes, epoch, asked)


cdef uint32_t settled_phase(Wire_t *w, uint32_t epoch) noexcept nogil:
    """The phase, once the two sides have agreed on it after a reconnection: the push may be ahead of the word."""
    cdef uint32_t phase = u32_load(&w.phase)
    while PH_RECOVERING_EARLY <= phase <= PH_RECOVERING_LATE and u32_load(&w.connected) and w.epoch == epoch:
        futex_wait(&w.phase, phase, SLICE_NS)
        phase = u32_load(&w.phase)
    return phase


cdef void finish_arrival(Wire_t *w) noexcept nogil:
    if wire_step(w, EV_DONE):
        wire_say(w, W_DONE, 0, 0, 0, 0, NULL, 0)


# ---- the destination: what is agreed on ---------------------------------------------------------------------------

cdef int take_word(Wire_t *w, int fd, wire_head *h, uint32_t epoch, char *buffer) noexcept nogil:
    cdef int err = 0
    if h.kind == W_DIRTY or h.kind == W_PASS:
        return take_dirty(w, fd, h, epoch, buffer)
    if h.kind == W_PREPARE:
        return take_prepare(w, fd, h, epoch)
    if h.nbytes:
        return -EPROTO
    if h.kind == W_SYNC:
        return wire_say(w, W_SYNCED, 0, 0, 0, 0, NULL, 0)
    if h.kind == W_COMMIT:
        return start_here(w, EV_COMMIT)
    if h.kind == W_RESUME:
        return take_resume(w, h)
    if h.kind == W_CANCEL:
        if not wire_step(w, EV_CANCEL):
            return -EPROTO
        return -ENOTCONN
    if h.kind == W_LOST:
        give_verdict(w, ENOTRECOVERABLE)
        return -ENOTCONN
    return -EPROTO


cdef int start_here(Wire_t *w, uint32_t event) noexcept nogil:
    """From here on this side has the memory."""
    take_passed(w)
    w.resumed_ns = now_ns()
    if not wire_step(w, event):
        return -EPROTO
    cdef int err = wire_say(w, W_STARTED, 0, 0, 0, 0, NULL, 0)
    if err == 0 and u64_load(&w.left) == 0:
        finish_arrival(w)
    return err


cdef int take_prepare(Wire_t *w, int fd, wire_head *h, uint32_t epoch) noexcept nogil:
    cdef char *state
    cdef int err
    if h.extra > WIRE_STATE or h.nbytes != h.extra:
        return -EPROTO
    state = <char *>malloc(h.extra + 1)
    if state == NULL:
        return -ENOMEM
    err = wire_take(w, fd, state, h.extra, epoch, True)
    if err == 0 and not wire_step(w, EV_FREEZE):
        err = -EPROTO
    if err != 0:
        free(state)
        return err
    free(w.state)
    w.state = state
    w.state_bytes = h.extra
    return wire_say(w, W_READY, 0, 0, 0, 0, NULL, 0)


cdef int take_dirty(Wire_t *w, int fd, wire_head *h, uint32_t epoch, char *buffer) noexcept nogil:
    """A bit per block. Those that were written since they were sent: what is here of them is dropped. Or those that are
    in a file which both sides share."""
    cdef Part_t *p
    cdef Region_t *r
    cdef uint64_t *bits = <uint64_t *>buffer
    cdef uint64_t b, n
    cdef int err
    if h.part >= w.nparts or u32_load(&w.phase) > PH_PRECOPY and u32_load(&w.phase) != PH_RECOVERING_EARLY:
        return -EPROTO
    p = &w.part[h.part]
    if h.block & 63 or h.block >= p.blocks or h.nbytes & 7 or h.nbytes > WIRE_RUN or \
            h.nbytes / 8 > (p.blocks - h.block + 63) / 64:
        return -EPROTO
    err = wire_take(w, fd, buffer, h.nbytes, epoch, True)
    if err != 0:
        return err
    if h.kind == W_PASS:
        if not p.passed and not p.opened:
            return -EPROTO
        memcpy(&p.there[h.block / 64] if p.passed else &p.stored[h.block / 64], buffer, h.nbytes)
        return 0
    r = region_acquire(p.region_id)
    n = u64_min(h.nbytes * 8, p.blocks - h.block)
    b = wire_next_bit(bits, 0, n)
    while b < n and r != NULL and err == 0:
        err = drop_arrived(w, p, r, h.block + b)
        b = wire_next_bit(bits, b + 1, n)
    if r != NULL:
        region_release(r)
    return err


cdef void take_passed(Wire_t *w) noexcept nogil:
    """At the hand-over: what the shared files hold is here, not mapped yet, like a block that was taken out."""
    cdef uint32_t i, word
    cdef uint64_t b, n
    cdef Part_t *p
    cdef Region_t *r
    for i in range(w.nparts):
        p = &w.part[i]
        if p.opened:
            take_opened(w, p)
        r = region_acquire(p.region_id) if p.passed else NULL
        if r == NULL:
            continue
        b = wire_next_bit(p.there, 0, p.blocks)
        while b < p.blocks:
            n = 0
            while b + n < p.blocks and n < MAX_RUN and bit_of(p.there, b + n) and bit_take(p.todo, b + n):
                r.known[(b + n) * 4 / PAGE] = 1
                word = u32_load(&r.state[b + n])
                u32_store(&r.state[b + n], word & ~<uint32_t>STATE_MASK | POOLED_DIRTY)     # nobody else has it yet
                n += 1
            if n:
                u64_add(&w.left, -n)
                u64_add(&w.passed, part_bytes(p, b, n))
                u64_add(&r.engine.used, run_span(r, b, n))
                note_put(r, b, <uint32_t>n, NOTE_AHEAD)
            b = wire_next_bit(p.there, b + (n if n else 1), p.blocks)
        evictor_ring(r.engine)              # no room was asked for: what is too much leaves from here on
        region_release(r)


cdef void take_opened(Wire_t *w, Part_t *p) noexcept nogil:
    """At the hand-over: what was not written since it came from its provider, which is open here, too."""
    cdef uint64_t b = wire_next_bit(p.stored, 0, p.blocks)
    while b < p.blocks:
        if bit_take(p.todo, b):
            u64_add(&w.left, <uint64_t>-1)
            u64_add(&w.opened, part_bytes(p, b, 1))
        b = wire_next_bit(p.stored, b + 1, p.blocks)


cdef int drop_arrived(Wire_t *w, Part_t *p, Region_t *r, uint64_t b) noexcept nogil:
    cdef Slot *s
    cdef uint64_t deadline = now_ns() + 10 * SECOND_NS
    if bit_of(p.todo, b):
        return 0
    s = wire_borrow(r.engine)
    while discard_blocks(s, r, b, b + 1) == b and not u32_load(&r.closing):
        if now_ns() > deadline:
            wire_return(r.engine, s)
            return -EBUSY
        wait_for_word(r, b, u32_load(&r.state[b]), 1000000)
    wire_return(r.engine, s)
    if not bit_set(p.todo, b):
        u64_add(&w.left, 1)
    return 0


cdef int take_resume(Wire_t *w, wire_head *h) noexcept nogil:
    """After a reconnection: what is here is told, and who has the memory is settled. extra: 1 if COMMIT was sent."""
    cdef uint32_t i, phase = u32_load(&w.phase)
    cdef uint64_t at, n
    cdef int err = 0
    cdef bint running = phase == PH_RECOVERING_LATE or phase == PH_COMPLETED
    if running and not h.extra:
        return -EPROTO                      # it can't be: only COMMIT let us run
    if h.extra and not running:
        take_passed(w)
    for i in range(w.nparts):
        at = 0
        while at * 64 < w.part[i].blocks and err == 0:
            n = u64_min((w.part[i].blocks + 63) / 64 - at, WIRE_RUN / 8)
            err = wire_say(w, W_HAVE, i, at * 64, 0, 0, &w.part[i].todo[at], n * 8)
            at += n
    if err == 0:
        err = wire_say(w, W_HAVE_END, 0, 0, 0, running or h.extra != 0, NULL, 0)
    if err != 0:
        return err
    if phase == PH_COMPLETED:
        return wire_say(w, W_DONE, 0, 0, 0, 0, NULL, 0)
    if not running and h.extra:
        w.resumed_ns = now_ns()
    if not wire_step(w, EV_RESUMED_LATE if h.extra else EV_RESUMED_EARLY):
        return -EPROTO
    u32_store(&w.asks_left, 1)
    if h.extra and u64_load(&w.left) == 0:
        finish_arrival(w)
    return 0


cdef bint give_verdict(Wire_t *w, int why) noexcept nogil:
    """The other side will not come back. What has yet to come never will: touches of it fail, and who waits is woken to
    hear that."""
    cdef uint32_t i
    cdef uint64_t b
    cdef Part_t *p
    cdef Region_t *r
    if not wire_step(w, EV_LOST):
        return False
    u32_store(&w.verdict, <uint32_t>why)
    fence_seq()
    for i in range(w.nparts if not w.source else 0):
        p = &w.part[i]
        r = region_acquire(p.region_id)
        if r == NULL:
            continue
        b = wire_next_bit(p.dirty, 0, p.blocks)
        while b < p.blocks:
            futex_wake_all(&r.state[b])
            b = wire_next_bit(p.dirty, b + 1, p.blocks)
        if not r.is_inline:
            uf_wake(r.fd, <uint64_t>r.base, r.span)
        region_release(r)
    return True


cdef bint wires_wait(Engine_t *e, uint64_t now) noexcept nogil:
    """By the keeper: whether a touch has waited long for a migration; the user is told, each half minute."""
    cdef Wire_t *w
    cdef Wire_t *told = NULL
    cdef uint64_t key = 0, age = 0, told_key = 0, told_ns = 0
    cdef bint waiting = False
    if wires == NULL:
        return False
    pthread_mutex_lock(&registry_lock)
    w = wires
    while w != NULL:
        if w.engine == e and wire_waits(w, now, &key, &age):
            waiting = True
            if told == NULL and age:
                w.said_ns = now
                u32_add(&w.refs, 1)
                told = w
                told_key = key
                told_ns = age
        w = w.next
    pthread_mutex_unlock(&registry_lock)
    if told != NULL:
        say_wire_waits(told, told_key, told_ns)
        wire_release(told)
    return waiting


cdef bint wire_waits(Wire_t *w, uint64_t now, uint64_t *key, uint64_t *age_ns) noexcept nogil:
    """Whether a touch has waited long; *age_ns: for how long, where the user is to be told of it now, else 0."""
    cdef uint64_t since = parked_since(w, key) if w.source else longest_touch(w, key)
    age_ns[0] = 0
    if since == 0 or now < since + PATIENCE_NS:
        w.said_ns = 0
        return False
    if w.said_ns == 0 or now - w.said_ns > 30 * SECOND_NS:
        age_ns[0] = now - since
    return True


cdef uint64_t longest_touch(Wire_t *w, uint64_t *key) noexcept nogil:
    """Since when, and for which block (part << 44 | number); 0: nobody waits. Those whose place another request has
    taken are left out."""
    cdef uint64_t found = 0, k, since
    cdef uint32_t i
    for i in range(<uint32_t>WIRE_ASKS if u64_load(&w.left) and not u32_load(&w.verdict) else 0):
        k = u64_load(&w.ask[i].key)
        since = u64_load(&w.ask[i].since_ns)
        if k and u32_load(&w.ask[i].touched) and (found == 0 or since < found):
            found = since
            key[0] = k - 1
    return found


cdef void say_wire_waits(Wire_t *w, uint64_t key, uint64_t age_ns) noexcept nogil:
    cdef Region_t *r = region_acquire(w.part[key >> 44].region_id) if not w.source else NULL
    cdef line l
    if w.source:
        say_parked(w, key, age_ns)
    if r == NULL:
        return
    l.n = 0
    describe_block(&l, r, key & ((<uint64_t>1 << 44) - 1))
    region_release(r)
    line_text(&l, b"waited for since ")
    line_number(&l, age_ns / SECOND_NS)
    line_text(&l, b" s, from the source of its migration")
    if not u32_load(&w.connected):
        line_text(&l, b", the connection to which is gone: until that calls recover()")
    line_text(&l, b" (Ctrl-C twice gives up)")
    line_say(&l)


cdef void say_paused(Wire_t *w, int err) noexcept nogil:
    cdef line l
    l.n = 0
    line_text(&l, b"uffd: migration: the connection to the source is gone (")
    line_errno(&l, -err)
    line_text(&l, b"); ")
    line_number(&l, u64_load(&w.left))
    line_text(&l, b" blocks have yet to come, and touches of them wait until the source calls recover()")
    line_say(&l)


cdef void *gate_main(void *argument) noexcept nogil:
    """Takes new connections from the process that listens, after the old ones broke. Not in Python: whoever waits for a
    block may hold the interpreter."""
    cdef Wire_t *w = <Wire_t *>argument
    cdef char name[32]
    cdef int pair[2]
    cdef int err = 0
    pair[0] = -1
    pair[1] = -1
    while not u32_load(&w.ending) and err != -ECONNRESET:
        err = wire_take_pair(w.gate_fd, name, pair, WIRE_SLICE_MS)
        if err != 0:
            continue
        if memcmp(name, w.name, 32) == 0:
            wire_break(w, u32_load(&w.epoch), -ECONNRESET)      # the source knows that the old ones are gone
            err = wire_attach(w, pair[0], pair[1])
        else:
            err = -ENODATA
        if err != 0:
            close(pair[0])
            close(pair[1])
    wire_thread_ends(w)
    return NULL
