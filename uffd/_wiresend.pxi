# Migration, the source's side: what is sent, in which order, and when writers wait.
#
# Uses:     _wire.pxi, source_read of _wireread.pxi, each_part of _wireguard.pxi
# Provides: push_main, answer_main (its threads); source_arm, source_switchover (what Python calls)
#
# `todo` has a bit per block that is to be sent; who clears it sends it.

cdef enum:
    PUSH_BYTES = 256 * 1024         # of one frame of the push, where it is not all of a huge page
    FRAMES = 2048                   # under way at most; a power of two
    PUSH_FRAMES = 512               # that a run of WIRE_RUN is cut into, small blocks that are zeros and others in turn
    DROP_ROUNDS = 10                # in which the destination drops what was written, before writers are stopped
    FEW = 16                        # blocks dirtied in one of them: there will hardly be fewer
    SLOW = 250 * 1000 * 1000        # bytes per second: below, a whole frame is too much to lie before an answer
    FAST = 500 * 1000 * 1000        # from here on a huge page is not
    WINDOW_BYTES = 32 << 20         # under way at most
cdef uint64_t QUEUE_NS = 1000000    # so much of the push may lie in the network before a request's answer
cdef uint64_t TRIP_NS = 10 * SECOND_NS      # after that the way may be another one
cdef uint64_t BURST_NS = 10000000   # what a limited rate may catch up


# ---- sending ------------------------------------------------------------------------------------------------------

cdef int emit(Wire_t *w, int fd, uint32_t kind, uint32_t part, uint64_t b, uint32_t n, const char *data,
              uint64_t nbytes) noexcept nogil:
    cdef wire_head head
    cdef uint64_t rate, fair = 0
    cdef int err
    head.kind = kind
    head.part = part
    head.block = b
    head.count = n
    head.nbytes = <uint32_t>nbytes
    head.extra = fd != w.ask_fd and w.window < 8 * nbytes       # of so few, each is acknowledged at once
    if fd == w.ask_fd:
        pthread_mutex_lock(&w.send_lock)
        err = wire_send(fd, &head, data, nbytes, WIRE_SILENCE_MS)
        pthread_mutex_unlock(&w.send_lock)
        return err
    frame_begins(w, part, b, n, sizeof(wire_head) + nbytes)
    rate = wire_rate(fd, QUEUE_NS / 2, &fair) if nbytes else 0
    w.flow = rate if nbytes else w.flow
    if 0 < rate < SLOW:
        err = wire_send_thin(fd, &head, data, nbytes, WIRE_SILENCE_MS, rate, u64_max(fair, 32 << 10))
    else:
        err = wire_send(fd, &head, data, nbytes, WIRE_SILENCE_MS)
    if err == 0:
        w.sent_frames += 1
        w.sent += sizeof(wire_head) + nbytes
    return err


cdef inline void frame_begins(Wire_t *w, uint32_t part, uint64_t b, uint32_t n, uint64_t nbytes) noexcept nogil:
    cdef Frame_t *f = &w.ring[w.sent_frames & (FRAMES - 1)]
    f.bytes = nbytes
    f.flight = w.sent - w.acked + nbytes
    f.sent_ns = now_ns()
    f.block = b
    f.count = n
    f.part = part


cdef int emit_data(Wire_t *w, int fd, uint32_t part, uint64_t b, uint32_t n, const char *data, uint64_t nbytes,
                   char *room, void *codec) noexcept nogil:
    """Compressed, if that is wanted and makes it smaller by an eighth at least; where it did not, the next runs are not
    tried, twice as many each time."""
    cdef size_t packed = 0
    if codec != NULL and (fd != w.push_fd or not codec_skips(&w.plain)):
        packed = codec_pack(codec, room, nbytes - nbytes / 8, data, nbytes)
        if packed or fd == w.push_fd:
            codec_learns(&w.plain, &w.plain_next, packed != 0)
    u64_add(&w.wired, packed if packed else nbytes)
    if packed:
        return emit(w, fd, W_PACKED, part, b, n, room, packed)
    return emit(w, fd, W_BLOCKS, part, b, n, data, nbytes)


cdef int send_blocks(Wire_t *w, int fd, uint32_t i, uint64_t b, uint32_t n, char *buffer, int kind,
                     void *codec) noexcept nogil:
    """Reads and sends blocks whose bits the caller took: data, zeros, or that one can't be read. 0 or -errno."""
    cdef Part_t *p = &w.part[i]
    cdef const char *data = NULL
    cdef uint32_t at = 0, k
    cdef bint zero
    cdef int err = source_read(w, p, b, n, buffer, &data)
    if err == -ENODATA:
        return err
    if err != 0 and n > 1:
        for k in range(n):
            err = send_blocks(w, fd, i, b + k, 1, buffer, kind, codec)
            if err != 0:
                return err
        return 0
    if err != 0:
        return emit(w, fd, W_BAD, i, b, 1, NULL, 0)
    while at < n:
        zero = wire_is_zero(data + (<uint64_t>at << p.shift), part_bytes(p, b + at, 1))
        k = 1
        while at + k < n and zero == wire_is_zero(data + (<uint64_t>(at + k) << p.shift),
                                                  part_bytes(p, b + at + k, 1)):
            k += 1
        sent_count(w, p, M_ZERO if zero else kind, b + at, k, 1)    # before it can be the last one, and all be over
        if zero:
            err = emit(w, fd, W_ZEROS, i, b + at, k, NULL, 0)
        else:
            err = emit_data(w, fd, i, b + at, k, data + (<uint64_t>at << p.shift), part_bytes(p, b + at, k),
                            buffer + MAX_BLOCK_BYTES + WIRE_RUN, codec)
        if err != 0:
            sent_count(w, p, M_ZERO if zero else kind, b + at, k, <uint64_t>-1)
            return err
        at += k
    return 0


cdef inline void sent_count(Wire_t *w, Part_t *p, int kind, uint64_t b, uint64_t n, uint64_t sign) noexcept nogil:
    u64_add(&w.blocks[kind], sign * n)
    u64_add(&w.bytes[kind], sign * part_bytes(p, b, n))


cdef void *push_main(void *argument) noexcept nogil:
    """Sends what is to be sent, all of it in some order, near the last request first."""
    cdef Wire_t *w = <Wire_t *>argument
    cdef char *buffer = map_lazy(WIRE_BUFFER, PROT_READ | PROT_WRITE, -1)
    cdef void *codec = codec_make(CODEC_ENCODES) if w.packs else NULL
    cdef uint32_t epoch = 0
    cdef int err
    while wire_enter(w, &epoch):
        err = push_all(w, epoch, w.push_fd, buffer, codec) if buffer != NULL else -ENOMEM
        wire_break(w, epoch, err)
        wire_leave(w)
    if buffer != NULL:
        munmap(buffer, WIRE_BUFFER)
    codec_free(codec, CODEC_ENCODES)
    wire_thread_ends(w)
    return NULL


cdef int push_all(Wire_t *w, uint32_t epoch, int fd, char *buffer, void *codec) noexcept nogil:
    cdef uint32_t turn, phase
    cdef int err = 0
    while err == 0 and not u32_load(&w.ending):
        turn = u32_load(&w.turn)
        if not u32_load(&w.connected) or u32_load(&w.epoch) != epoch:
            return -ENOTCONN
        phase = u32_load(&w.phase)
        if w.acked != w.sent or phase == PH_POSTCOPY:
            err = take_acks(w, fd, push_full(w))
            if err != 0:
                return err
            if push_full(w):
                continue
        if phase == PH_POSTCOPY or u32_load(&w.round):
            err = push_next(w, fd, buffer, phase == PH_POSTCOPY, codec)
            if err <= 0:
                continue
            err = 0                         # nothing is left to send
            if w.acked != w.sent:
                err = take_acks(w, fd, True)
                continue
            if u32_swap(&w.round, 0):
                wire_tell(w)
                continue
        elif w.acked != w.sent:
            err = take_acks(w, fd, True)
            continue
        elif u32_load(&w.turn) == turn and not u32_swap(&w.drained, 1):
            wire_tell(w)
            continue                        # who asks for it anew may have done so just before that
        futex_wait(&w.turn, turn, SECOND_NS)
    return err if err != 0 else -ENOTCONN


cdef bint push_full(Wire_t *w) noexcept nogil:
    """Whether enough is under way. Two frames always may be, so that the connection does not lie idle."""
    cdef uint64_t frames = w.sent_frames - w.handed, most
    if frames and now_ns() > w.trip_until_ns:
        return True                         # the next one is to travel alone, and its time is measured
    if frames >= FRAMES - PUSH_FRAMES:
        return True
    most = u64_max(push_bytes(w, 0), <uint64_t>1 << w.part[w.at_part].shift)
    return frames >= 2 and w.sent - w.acked + most > w.window


cdef inline uint64_t push_bytes(Wire_t *w, uint64_t rate) noexcept nogil:
    """Of one frame, where a block is not larger; a power of two. All of a huge page, which the destination can place as
    one, where that does not take long. rate: a limit in bytes per second, or 0."""
    cdef uint64_t most = u64_min(PUSH_BYTES, w.window / 4)
    if rate:
        most = u64_min(most, u64_max(rate / 64, 1))
    elif w.window >= HUGE_BYTES / 2 and (w.flow == 0 or w.flow >= FAST) and not w.packs and \
            u32_load(&w.phase) == PH_POSTCOPY:
        return HUGE_BYTES
    return <uint64_t>1 << u64_log2(most)


cdef void send_again(Wire_t *w) noexcept nogil:
    """Of a connection that broke: what was sent and not acknowledged. The destination can't tell that it is missing: it
    may have the block as it was in a round before."""
    cdef uint64_t k, b
    cdef Frame_t *f
    for k in range(w.handed, w.sent_frames):
        f = &w.ring[k & (FRAMES - 1)]
        for b in range(f.block, f.block + f.count):
            bit_set(w.part[f.part].todo, b)


cdef int take_acks(Wire_t *w, int fd, bint wait) noexcept nogil:
    """Reads what the destination acknowledged; wait: at least once. 0 or -errno."""
    cdef wire_head head
    cdef Frame_t *f = NULL
    cdef size_t got = 0
    cdef int err
    while wait or wire_ready(fd, <short>POLLIN, 0) == 0:
        got = 0
        err = wire_receive(fd, &head, sizeof(wire_head), &got, WIRE_SILENCE_MS)
        if err != 0:
            return err
        if head.kind != W_ACK or head.nbytes or head.extra > w.sent_frames or head.extra < w.handed:
            return -EPROTO
        while w.handed < head.extra:
            f = &w.ring[w.handed & (FRAMES - 1)]
            w.acked += f.bytes
            if w.release and u32_load(&w.phase) == PH_POSTCOPY:
                source_release(w, f.part, f.block, f.count)
            w.handed += 1
        if f != NULL:
            window_set(w, f)
        wait = False
    return 0


cdef void window_set(Wire_t *w, Frame_t *f) noexcept nogil:
    """After a frame was acknowledged: how much may be under way. As much as keeps the connection busy, and QUEUE_NS
    more; the frame's own time tells how much more there was."""
    cdef uint64_t now = now_ns(), ns = now - f.sent_ns, fair
    if now > w.trip_until_ns and f.flight == f.bytes:
        w.trip_until_ns = now + TRIP_NS
        w.trip_ns = ns
    w.trip_ns = u64_min(w.trip_ns, ns)
    if ns < w.trip_ns + QUEUE_NS / 2:       # hardly a queue: twice as much, if it was used
        w.window = u64_max(w.window, u64_min(2 * f.flight, WINDOW_BYTES))
    elif ns > w.trip_ns + QUEUE_NS:
        fair = <uint64_t>(<double>f.flight * <double>(w.trip_ns + QUEUE_NS) / <double>ns)
        if fair < w.window:
            w.window = u64_max(w.window - (w.window - fair) / 8, 64 << 10)


cdef int push_next(Wire_t *w, int fd, char *buffer, bint late, void *codec) noexcept nogil:
    """One frame or a few; 1 when nothing is to be sent, 0, or -errno."""
    cdef Part_t *p
    cdef uint32_t i = w.at_part, turns = 0, n = 0, most
    cdef uint64_t b = w.at_block, first, rate
    while turns <= w.nparts:
        p = &w.part[i]
        b = next_to_send(p, b, late)
        if b < p.blocks:
            break
        i = (i + 1) % w.nparts
        b = 0
        turns += 1
    else:
        return 1
    rate = w.rate[1] if late else w.rate[0]
    if rate and now_ns() < w.next_ns:       # before it is claimed: a request for it must not wait for its turn
        pace(w)
        return 0
    first = b
    most = <uint32_t>u64_max(push_bytes(w, rate) >> p.shift, 1)
    most -= b & (most - 1)                  # frames lie alike at both ends, as huge pages do
    if p.region_id == 0 and not p.whole and (b == 0 or b == p.blocks - 1):
        most = 1                            # a block at an end may be sent from elsewhere
    while n < most and b < p.blocks and (n == 0 or p.region_id or p.whole or b < p.blocks - 1) and \
            next_to_send(p, b, late) == b and bit_take(p.todo, b):
        n += 1
        b += 1
    w.at_part = i
    w.at_block = b
    if n == 0:
        return 0
    if not late and u32_load(&w.phase) == PH_SETUP:
        wire_step(w, EV_DATA)
    if rate:
        w.next_ns = u64_max(w.next_ns, now_ns() - BURST_NS) + <uint64_t>(
            <double>part_bytes(p, first, n) * 1e9 / <double>rate)
    cdef int err = send_blocks(w, fd, i, first, n, buffer, M_PUSHED if late else M_PRECOPY, codec)
    if err != 0:                            # some were not sent, and their bits are what says so
        for b in range(first, first + n):
            bit_set(p.todo, b)
    return err


cdef uint64_t next_to_send(Part_t *p, uint64_t b, bint late) noexcept nogil:
    """The next block from b on, or p.blocks. Before the hand-over, what the destination may have by itself waits."""
    if p.passed and not late:
        return p.blocks
    b = wire_next_bit(p.todo, b, p.blocks)
    while p.opened and not late and b < p.blocks and bit_of(p.stored, b):
        b = wire_next_bit(p.todo, b + 1, p.blocks)
    return b


cdef void pace(Wire_t *w) noexcept nogil:
    """Waits until more bytes may go, or there is news."""
    cdef uint32_t turn = u32_load(&w.turn)
    cdef uint64_t now = now_ns()
    if now < w.next_ns:
        futex_wait(&w.turn, turn, u64_min(w.next_ns - now, SLICE_NS))


# ---- the other connection: requests, and what is agreed on --------------------------------------------------------

cdef void *answer_main(void *argument) noexcept nogil:
    """Answers requests on the connection that they come by, past all that is pushed."""
    cdef Wire_t *w = <Wire_t *>argument
    cdef char *buffer = map_lazy(WIRE_BUFFER, PROT_READ | PROT_WRITE, -1)
    cdef void *codec = codec_make(CODEC_ENCODES) if w.packs else NULL
    cdef uint32_t epoch = 0
    cdef int err
    while wire_enter(w, &epoch):
        err = answer_all(w, epoch, buffer, codec) if buffer != NULL else -ENOMEM
        wire_break(w, epoch, err)
        wire_leave(w)
    if buffer != NULL:
        munmap(buffer, WIRE_BUFFER)
    codec_free(codec, CODEC_ENCODES)
    wire_thread_ends(w)
    return NULL


cdef int answer_all(Wire_t *w, uint32_t epoch, char *buffer, void *codec) noexcept nogil:
    cdef wire_head head
    cdef uint32_t phase = u32_load(&w.phase)
    cdef int err = 0
    if phase == PH_RECOVERING_EARLY or phase == PH_RECOVERING_DOUBT or phase == PH_RECOVERING_LATE:
        err = wire_say(w, W_RESUME, 0, 0, 0, phase != PH_RECOVERING_EARLY, NULL, 0)
    while err == 0:
        err = wire_take(w, w.ask_fd, &head, sizeof(wire_head), epoch, False)
        if err == 0:
            err = take_answer(w, &head, epoch, buffer, codec)
    return err


cdef int take_answer(Wire_t *w, wire_head *h, uint32_t epoch, char *buffer, void *codec) noexcept nogil:
    if h.kind == W_HAVE:
        return take_have(w, h, epoch, buffer)
    if h.nbytes:
        return -EPROTO
    if h.kind == W_WANT:
        return answer_want(w, h, buffer, codec)
    if h.kind == W_READY or h.kind == W_SYNCED:
        u32_store(&w.ready, 1)
        wire_tell(w)
        return 0
    if h.kind == W_STARTED:
        w.resumed_ns = now_ns()
        if u32_load(&w.phase) == PH_DOUBT and not wire_step(w, EV_STARTED):
            return -EPROTO
        return 0
    if h.kind == W_HAVE_END:
        return resumed(w, h.extra != 0)
    if h.kind == W_DONE:
        return handed_over(w)
    if h.kind == W_ENDED:                   # it runs, and wants no more: that it runs may not have been heard
        if u32_load(&w.phase) == PH_DOUBT:
            wire_step(w, EV_STARTED)
        elif u32_load(&w.phase) == PH_RECOVERING_DOUBT:
            wire_step(w, EV_RESUMED_LATE)
        give_verdict(w, ENOTRECOVERABLE)
        return -ENOTCONN
    if h.kind == W_GAVE_UP:
        u32_store(&w.ready, 2)
        if wire_step(w, EV_GIVEN_UP) or wire_step(w, EV_CANCEL):
            source_thaw(w)
        return -ENOTCONN
    return -EPROTO


cdef int answer_want(Wire_t *w, wire_head *h, char *buffer, void *codec) noexcept nogil:
    cdef Part_t *p
    cdef int err
    if h.part >= w.nparts or h.count != 1 or h.block >= w.part[h.part].blocks:
        return -EPROTO
    p = &w.part[h.part]
    if u32_load(&w.phase) == PH_DOUBT:
        w.resumed_ns = now_ns()
        wire_step(w, EV_STARTED)            # a touch there may be ahead of the word that it runs
    if u32_load(&w.phase) != PH_POSTCOPY:
        return -EPROTO
    u64_add(&w.asked, 1)
    if not bit_take(p.todo, h.block):
        return 0                            # it is on its way by the other connection
    err = send_blocks(w, w.ask_fd, h.part, h.block, 1, buffer, M_REQUESTED, codec)
    w.at_part = h.part                      # the push goes on behind it
    w.at_block = h.block + 1
    return err


cdef int take_have(Wire_t *w, wire_head *h, uint32_t epoch, char *buffer) noexcept nogil:
    """What the destination lacks, after a reconnection: it is to be sent, whatever was."""
    cdef Part_t *p
    cdef uint64_t i, n
    cdef bint late = u32_load(&w.phase) != PH_RECOVERING_EARLY
    cdef int err
    if h.part >= w.nparts or u32_load(&w.phase) < PH_RECOVERING_EARLY or u32_load(&w.phase) > PH_RECOVERING_LATE:
        return -EPROTO
    p = &w.part[h.part]
    if h.block & 63 or h.block >= p.blocks or h.nbytes & 7 or h.nbytes > WIRE_RUN or \
            h.nbytes / 8 > (p.blocks - h.block + 63) / 64:
        return -EPROTO
    err = wire_take(w, w.ask_fd, buffer, h.nbytes, epoch, True)
    if err != 0:
        return err
    for i in range(h.nbytes / 8):
        n = (<uint64_t *>buffer)[i]
        if h.block / 64 + i == (p.blocks - 1) / 64 and p.blocks & 63:
            n &= (<uint64_t>1 << (p.blocks & 63)) - 1
        if late:
            u64_store(&p.todo[h.block / 64 + i], n)
        else:
            u64_or(&p.todo[h.block / 64 + i], n)
    return 0


cdef int resumed(Wire_t *w, bint running) noexcept nogil:
    if not wire_step(w, EV_RESUMED_LATE if running else EV_RESUMED_EARLY):
        return -EPROTO
    return 0


cdef int handed_over(Wire_t *w) noexcept nogil:
    if not wire_step(w, EV_DONE):
        return -EPROTO
    if w.release:
        source_release_all(w)
    if u32_load(&w.killed):
        die_for_write()
    return -ENOTCONN                        # closed from here: the destination waits for that, so that DONE is not lost


# ---- what Python calls --------------------------------------------------------------------------------------------

cdef int source_arm(Wire_t *w) noexcept nogil:
    """Writes are seen from here on. 0 or -errno."""
    cdef uint64_t found = 0
    cdef int err
    if w.guarding:
        return 0
    err = each_part(w, True, False, &found)
    if err == 0:
        w.guarding = 1
    return err


cdef int source_drain(Wire_t *w, uint64_t deadline) noexcept nogil:
    """The push has stopped, and all it sent has arrived. 0 or -errno."""
    cdef uint32_t turn
    u32_store(&w.drained, 0)
    u32_store(&w.round, 0)
    wire_tell(w)
    while not u32_load(&w.drained):
        turn = u32_load(&w.turn)
        if not u32_load(&w.connected):
            return -ENOTCONN
        if now_ns() > deadline:
            return -ETIMEDOUT
        if not u32_load(&w.drained):
            futex_wait(&w.turn, turn, SLICE_NS)
    return 0


cdef int tell_dirty(Wire_t *w) noexcept nogil:
    """What is to be sent still: the destination drops what it has of it."""
    return tell_bits(w, W_DIRTY) if w.blocks[M_PRECOPY] or w.blocks[M_ZERO] else 0


cdef int tell_bits(Wire_t *w, uint32_t kind) noexcept nogil:
    """W_DIRTY of all parts, or W_PASS of those that are passed or opened: a bit per block. 0 or -errno."""
    cdef uint32_t i
    cdef uint64_t at, n
    cdef uint64_t *bits
    cdef int err = 0
    for i in range(w.nparts):
        if kind == W_PASS and not w.part[i].passed and not w.part[i].opened:
            continue
        bits = w.part[i].todo if kind == W_DIRTY else w.part[i].there if w.part[i].passed else w.part[i].stored
        at = 0
        while at * 64 < w.part[i].blocks and err == 0:
            n = u64_min((w.part[i].blocks + 63) / 64 - at, WIRE_RUN / 8)
            err = wire_say(w, kind, i, at * 64, 0, 0, &bits[at], n * 8)
            at += n
    return err


cdef int source_switchover(Wire_t *w, const char *state, uint64_t nbytes, uint64_t deadline) noexcept nogil:
    """The hand-over, without the interpreter: a writer that is stopped may hold its lock. 0: the destination runs.
    -errno: it does not, unless the phase is one of doubt; writers go on."""
    cdef uint64_t found = 0, last = 0
    cdef uint32_t k
    cdef int err = source_drain(w, deadline)
    if err == 0:
        err = source_arm(w)
    for k in range(<uint32_t>DROP_ROUNDS):
        if err != 0:
            break
        found = 0
        err = each_part(w, False, False, &found)
        if err == 0:
            err = tell_dirty(w)
        if err == 0:
            err = wait_synced(w, deadline)  # what takes it time is not to be waited for while writers are stopped
        if found <= FEW or k > 1 and found > last / 8 * 7:
            break
        last = found
    if err == 0 and not wire_step(w, EV_FREEZE):
        return -EPROTO
    if err == 0:
        u32_store(&w.ready, 0)
        err = each_part(w, False, True, &found)
        w.stopped_ns = now_ns()
    if err == 0:
        err = tell_dirty(w)
    if err == 0:
        stored_look(w)
        err = tell_bits(w, W_PASS)
        stored_stay(w)
    if err == 0:
        err = wire_say(w, W_PREPARE, 0, 0, 0, nbytes, state, nbytes)
    if err == 0:
        err = wait_ready(w, deadline)
    if err == 0 and not wire_step(w, EV_COMMIT):
        err = -ENOTCONN
    if err != 0:
        source_thaw(w)
        wire_break(w, w.epoch, err)         # the destination learns by that that it is not to run
        return err
    err = wire_say(w, W_COMMIT, 0, 0, 0, 0, NULL, 0)
    return wait_started(w, deadline + 5 * SECOND_NS, err)


cdef int wait_synced(Wire_t *w, uint64_t deadline) noexcept nogil:
    """The destination has done all that it was told so far."""
    cdef uint32_t turn
    cdef int err
    u32_store(&w.ready, 0)
    err = wire_say(w, W_SYNC, 0, 0, 0, 0, NULL, 0)
    while err == 0:
        turn = u32_load(&w.turn)
        if u32_load(&w.ready):
            break
        if not u32_load(&w.connected) or u32_load(&w.phase) > PH_PRECOPY:
            return -ENOTCONN
        if now_ns() > deadline:
            return -ETIMEDOUT
        futex_wait(&w.turn, turn, SLICE_NS)
    return err


cdef int wait_ready(Wire_t *w, uint64_t deadline) noexcept nogil:
    cdef uint32_t turn
    while True:
        turn = u32_load(&w.turn)
        if u32_load(&w.ready) == 1:
            return 0
        if u32_load(&w.phase) != PH_FROZEN:
            return -ENOTCONN
        if now_ns() > deadline:
            return -ETIMEDOUT
        futex_wait(&w.turn, turn, SLICE_NS)


cdef int wait_started(Wire_t *w, uint64_t deadline, int err) noexcept nogil:
    cdef uint32_t turn, phase
    while err == 0:
        turn = u32_load(&w.turn)
        phase = u32_load(&w.phase)
        if phase == PH_POSTCOPY or phase == PH_PAUSED_LATE or phase == PH_COMPLETED:
            return 0
        if phase != PH_DOUBT:
            return -ENOTCONN
        if now_ns() > deadline:
            err = -ETIMEDOUT
            break
        futex_wait(&w.turn, turn, SLICE_NS)
    wire_break(w, w.epoch, err)
    return err
