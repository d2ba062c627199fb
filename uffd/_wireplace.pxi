# Migration, the destination's side: where frames are received, and how their blocks are placed.
#
# Uses:     _wire.pxi; the fills of _fill.pxi, room of _room.pxi; part_clear of _wiretake.pxi
# Provides: Landing; landing_make, landing_free; take_data (a frame's bytes, received and placed), place_blocks,
#           lose_block
#
# What comes is received into a buffer that stays, and copied from there by UFFDIO_COPY. Where the whole of a huge page
# comes at once, it is received into one, which is then moved to its place: no second copy, no page for page.

cdef uint64_t HUGE_SLOW_NS = 1000000    # of a thread's time for a huge page: pages are copied in less
cdef enum:
    HUGE_SKIPS = 128                    # frames for which none is asked for, after several were slow or not to be had

cdef struct Landing:                    # of one thread
    char *bytes                         # WIRE_BUFFER
    char *huge                          # room for a huge page; NULL: pages can't be moved
    bint ready                          # it is there
    uint32_t skip                       # frames for which it is not asked for
    uint32_t skip_next
    void *codec                         # the decoder; NULL: nothing comes compressed


cdef bint landing_make(Wire_t *w, Landing *l, bint moves) noexcept nogil:
    """False: no memory."""
    memset(l, 0, sizeof(Landing))
    l.bytes = map_lazy(WIRE_BUFFER, PROT_READ | PROT_WRITE, -1)
    l.codec = codec_make(CODEC_DECODES) if w.packs else NULL
    if moves and PAGE / 8 * PAGE == HUGE_BYTES and has(UF_FEATURE_MOVE):
        l.huge = huge_room(HUGE_BYTES)
    return l.bytes != NULL


cdef void landing_free(Wire_t *w, Landing *l) noexcept nogil:
    if l.bytes != NULL:
        munmap(l.bytes, WIRE_BUFFER)
    if l.huge != NULL:
        munmap(l.huge, HUGE_BYTES)
    codec_free(l.codec, CODEC_DECODES)


cdef bint landing_ready(Landing *l) noexcept nogil:
    """Whether an empty huge page is there, or can be had at once. What it takes the kernel to find and to clear one is
    looked at: where it is much, the next frames do without."""
    cdef uint64_t took_ns = 0
    if l.huge == NULL or l.ready:
        return l.ready
    if l.skip:
        l.skip -= 1
        return False
    l.ready = huge_fill(l.huge, HUGE_BYTES, PAGE, &took_ns)
    if l.ready and took_ns < HUGE_SLOW_NS:
        l.skip_next = 0
    else:
        landing_skip(l)
    return l.ready


cdef void landing_skip(Landing *l) noexcept nogil:
    l.skip_next = 8 if l.skip_next == 0 else <uint32_t>u64_min(2 * l.skip_next, HUGE_SKIPS)
    l.skip = l.skip_next


cdef void landing_used(Landing *l, uint64_t moved) noexcept nogil:
    """A run was placed from the huge page: by moving it, all of it or so many bytes, or by copying."""
    if moved:
        l.ready = False
    if moved != HUGE_BYTES:
        landing_skip(l)
        if moved:
            madvise(l.huge, HUGE_BYTES, MADV_DONTNEED)


cdef bint takes_huge(Wire_t *w, Part_t *p, wire_head *h, uint64_t want) noexcept nogil:
    """Whether a frame is all of a huge page of a region into which such can be moved, and nothing of it is there. Not
    before the hand-over: what comes then may be dropped again, block by block."""
    cdef Region_t *r
    cdef uint64_t b = 0
    if want != HUGE_BYTES or (h.block << p.shift) & (HUGE_BYTES - 1) or u32_load(&w.phase) != PH_POSTCOPY:
        return False
    r = region_acquire(p.region_id)
    if r == NULL:
        return False
    if r.moves and r.writable and not is_shared(r) and <uint64_t>r.base & (HUGE_BYTES - 1) == 0:
        while b < h.count and bit_of(p.todo, h.block + b):
            b += 1
    region_release(r)
    return b == h.count


cdef int take_data(Wire_t *w, int fd, wire_head *h, uint64_t want, uint32_t epoch, Landing *l,
                   bint asked) noexcept nogil:
    """The bytes of a frame's blocks, received and placed: of a huge page at once, of others in pieces that stay in the
    processor's cache. 0 or -errno."""
    cdef Part_t *p = &w.part[h.part]
    cdef wire_head piece = h[0]
    cdef uint64_t at = 0, per = h.count
    cdef char *to = l.bytes
    cdef int err = 0
    if h.kind == W_BLOCKS and not asked and takes_huge(w, p, h, want) and landing_ready(l):
        to = l.huge
    elif h.kind == W_BLOCKS:
        per = u64_max(WIRE_PIECE >> p.shift, 1)
    while at < h.count and err == 0:
        piece.kind = h.kind
        piece.block = h.block + at
        piece.count = <uint32_t>u64_min(per, h.count - at)
        if h.kind == W_BLOCKS:
            piece.nbytes = <uint32_t>part_bytes(p, piece.block, piece.count)
        err = take_bytes(w, fd, &piece, part_bytes(p, piece.block, piece.count), epoch, to, l)
        if err == 0:
            err = take_piece(w, p, &piece, l, to, epoch, asked)
        at += piece.count
    return err


cdef int take_bytes(Wire_t *w, int fd, wire_head *h, uint64_t want, uint32_t epoch, char *buffer,
                    Landing *l) noexcept nogil:
    """The bytes of a frame's blocks into the buffer, whole pages of them. 0 or -errno."""
    cdef char *to = buffer + MAX_BLOCK_BYTES + WIRE_RUN if h.kind == W_PACKED else buffer
    cdef int err = wire_take(w, fd, to, h.nbytes, epoch, True)
    u64_add(&w.wired, h.nbytes)
    if err == 0 and h.kind == W_PACKED:
        err = codec_unpack(l.codec, buffer, want, to, h.nbytes)
        h.kind = W_BLOCKS
        h.nbytes = <uint32_t>want
    if err == 0 and page_round(want) > want:
        memset(buffer + want, 0, page_round(want) - want)
    return err


cdef int take_piece(Wire_t *w, Part_t *p, wire_head *h, Landing *l, char *buffer, uint32_t epoch,
                    bint asked) noexcept nogil:
    """Blocks whose bytes are at `buffer`, or zeros, or the word that one is lost. 0 or -errno."""
    cdef Region_t *r
    cdef uint64_t b
    cdef int err
    cdef uint32_t phase = settled_phase(w, epoch)
    if phase != PH_PRECOPY and phase != PH_POSTCOPY and phase != PH_FROZEN:
        return -EPROTO
    r = region_acquire(p.region_id)
    if r == NULL:                           # closed by the program: nobody wants them any more
        for b in range(h.block, h.block + h.count):
            if bit_take(p.todo, b):
                u64_add(&w.left, <uint64_t>-1)
        return 0
    err = place_blocks(w, p, r, h, l, buffer, phase, asked)
    region_release(r)
    if u64_load(&w.left) == 0 and u32_load(&w.phase) == PH_POSTCOPY:
        finish_arrival(w)
    return err


cdef int place_blocks(Wire_t *w, Part_t *p, Region_t *r, wire_head *h, Landing *l, char *buffer, uint32_t phase,
                      bint asked) noexcept nogil:
    """What was received at `buffer`: the landing's huge page, or else."""
    cdef uint64_t b = h.block, end = h.block + h.count, n
    cdef int kind = M_PRECOPY if phase != PH_POSTCOPY else M_REQUESTED if asked else M_PUSHED
    cdef int err = 0
    while b < end and err == 0:
        n = 1
        if not bit_of(p.todo, b):
            if phase == PH_POSTCOPY:
                u64_add(&w.blocks[M_DOUBLED], 1)
            else:
                overwrite(r, b, buffer + ((b - h.block) << p.shift), h.kind == W_ZEROS)
        elif h.kind == W_ZEROS and p.opened:    # its provider has something else there
            memset(buffer, 0, <uint64_t>1 << p.shift)
            err = place_run_of(w, p, r, b, 1, NULL, buffer, &n)
        elif h.kind == W_ZEROS:
            part_clear(r, p, b)
        elif h.kind == W_BAD:
            err = place_bad(w, p, r, b)
        else:
            err = place_run_of(w, p, r, b, <uint32_t>(end - b), l if buffer == l.huge else NULL,
                               buffer + ((b - h.block) << p.shift), &n)
        b += n
    u64_add(&w.blocks[M_ZERO if h.kind == W_ZEROS else kind], h.count)
    u64_add(&w.bytes[M_ZERO if h.kind == W_ZEROS else kind],
            part_bytes(p, h.block, h.count) if h.kind == W_ZEROS else h.nbytes)
    return err


cdef int place_run_of(Wire_t *w, Part_t *p, Region_t *r, uint64_t b, uint32_t most, Landing *l, char *bytes,
                      uint64_t *placed) noexcept nogil:
    """Claims blocks that are missing, places them and clears their bits; how many at *placed. -errno: the kernel has no
    memory for them; the connection is given up then, and they come again with the next."""
    cdef Slot *s = wire_borrow(r.engine)
    cdef uint32_t n = 0, got, turn
    cdef uint64_t i
    cdef int err = 0
    while n < most and bit_of(p.todo, b + n):
        n += 1
    placed[0] = 1
    s.huge = l != NULL
    while True:
        turn = u32_load(&r.engine.room_turn)
        s.no_room = 0
        got = begin_run(s, r, b, n, True, PREFETCH, MISSING)
        if got or not s.no_room or u32_load(&r.closing) or u32_load(&w.ending):
            break
        if not evict_some(r.engine, s):
            evictor_ring(r.engine)
            futex_wait(&r.engine.room_turn, turn, ROOM_WAIT_NS)
    if got:
        s.offered = bytes
        err = finish_run(s, r)
        s.offered = NULL
        placed[0] = got
        if l != NULL:
            landing_used(l, s.huge_moved)
        for i in range(got):
            if err == 0 or is_placed(r, b + i):
                part_clear(r, p, b + i)
    elif u32_load(&r.state[b]) & STATE_MASK != MISSING and u32_load(&w.phase) == PH_POSTCOPY:
        u64_add(&w.blocks[M_DOUBLED], 1)    # the other connection's thread has placed it this moment
    elif u32_load(&r.state[b]) & STATE_MASK != MISSING:
        overwrite(r, b, bytes, False)       # it was not thought to be there, and is: of a round that was cut off
        part_clear(r, p, b)
    s.huge = 0
    wire_return(r.engine, s)
    return err


cdef inline bint is_placed(Region_t *r, uint64_t b) noexcept nogil:
    """Of a run of which some blocks failed: whether this one did not. It is the program's from there on."""
    cdef uint32_t word = u32_load(&r.state[b])
    return word & SPILLED != 0 or word & STATE_MASK != MISSING and word & STATE_MASK != POISONED


cdef int place_bad(Wire_t *w, Part_t *p, Region_t *r, uint64_t b) noexcept nogil:
    """The source could not read the block: a touch of it fails here as it would have there."""
    cdef Slot *s = wire_borrow(r.engine)
    if lose_block(s, r, b, -EIO):
        part_clear(r, p, b)
    wire_return(r.engine, s)
    return 0


cdef bint lose_block(Slot *s, Region_t *r, uint64_t b, int err) noexcept nogil:
    """A missing block is poisoned. False: it is not missing, or there is no room for it."""
    if not begin_run(s, r, b, 1, True, DEMAND, MISSING):
        return False
    s.tries = 1
    recycled_release(s, r)
    fail_run(s, r, err)
    phase_change(s, BUSY, IDLE)
    u64_store(&s.since_ns, 0)
    return True


cdef void overwrite(Region_t *r, uint64_t b, const char *bytes, bint zeros) noexcept nogil:
    """A newer state of a block that is there already; only before the hand-over, while nobody else uses it. It may have
    left memory again: touching it brings it back, like anybody's touch."""
    if zeros:
        memset(r.base + (b << r.shift), 0, run_bytes(r, b, 1))
    else:
        memcpy(r.base + (b << r.shift), bytes, run_bytes(r, b, 1))
