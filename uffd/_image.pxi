# What an image takes of regions: their own write faults feed it, and what is not in memory comes from where it is.
#
# Uses:     the threads, the aside buffers and the file of _snapshot.pxi; the watches of _track.pxi
# Provides: for the fault path: image_waits, image_saves (before a page is lifted), image_unsaved, image_want (before
#           something is discarded); for an image: regions_protect, regions_open, region_stream, regions_saved, ...
#
# A region that is imaged is watched (so all is placed protected, and each first write is seen), coarsely: a block at a
# time. While `image_gate` is closed no write to it is let go. Afterwards a first write to a block that is not saved
# copies it first, or has the streamer do so. The streamer takes blocks as they are: in memory, in the pool, or from the
# store or the provider, without bringing them into memory. In a series, the watch knows what was written since.

cdef enum:
    REGION_ASIDE = 1 << 30                  # in Aside.span: the rest is a number of a region
    SAVED_PARK = 0
    SAVED_GO = 1

cdef struct RegionPart:
    Region_t *r
    Watch_t *w
    uint64_t first                          # blocks [first, end) of the region
    uint64_t end
    uint64_t at                             # of its blocks in state[] and mine[]
    uint8_t *state                          # SKIPPED, UNSAVED, LIFTED (saved); changed by who owns the block
    uint8_t *mine                           # 1: saved in this image, 2: a writer waits for it
    Image_t *m


# ---- the fault path ---------------------------------------------------------------------------------------------

cdef bint image_waits(Slot *s, Region_t *r) noexcept nogil:
    """Before a write is let go: enters `critical` when no image is being begun."""
    while True:
        while u32_load_seq(&r.image_gate):
            futex_wait(&r.image_gate, 1, SECOND_NS)
        critical_enter(s)
        if u32_load_seq(&r.image_gate) == 0:
            return True
        critical_leave(s)


cdef RegionPart *image_unsaved(Region_t *r, uint64_t b) noexcept nogil:
    """The image that lacks this block still, or NULL. Inside `critical`."""
    cdef RegionPart *p = <RegionPart *>ptr_load(&r.image)
    if p == NULL or b < p.first or b >= p.end or u8_load(&p.state[b - p.first]) != UNSAVED:
        return NULL
    return p


cdef void image_want(RegionPart *p, uint64_t b) noexcept nogil:
    """Somebody waits until the block is saved. Inside `critical`."""
    u64_add(&p.m.waits, 1)
    u8_cas(&p.mine[b - p.first], 0, 2)
    u32_store_seq(&p.m.wanted, 1)
    image_ring(p.m)


cdef bint image_keeps(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    """Before a block is discarded: True, after a wait, while an image lacks it; else False, inside `critical`."""
    cdef uint32_t turn
    cdef RegionPart *p
    image_waits(s, r)
    turn = u32_load_seq(&r.image_turn)
    p = image_unsaved(r, b)
    if p == NULL:
        return False
    image_want(p, b)
    critical_leave(s)
    futex_wait(&r.image_turn, turn, SLICE_NS)
    return True


cdef int image_saves(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    """Before a page of a block that is there is lifted, inside `critical`: SAVED_GO, or SAVED_PARK: the writer is woken
    when the streamer has saved the block, or asks again."""
    cdef RegionPart *p = image_unsaved(r, b)
    cdef uint32_t a, state = u32_load(&r.state[b]) & STATE_MASK
    cdef int got
    if p == NULL:
        return SAVED_GO
    u64_add(&p.m.faults, 1)
    if state != CLEAN and state != DIRTY:
        return SAVED_GO                     # it can't be lifted either
    a = aside_take(p.m)
    if a == p.m.asides:
        image_want(p, b)
        return SAVED_PARK if image_unsaved(r, b) != NULL else SAVED_GO
    got = image_copy(s, p, b, state, p.m.aside_bytes + <uint64_t>a * p.m.slot_bytes)
    if got <= 0:
        u32_store(&p.m.aside[a].state, ASIDE_FREE)
        return SAVED_GO if got == 0 else SAVED_PARK
    p.m.aside[a].span = REGION_ASIDE | <uint32_t>(p - p.m.region)
    p.m.aside[a].block = b
    u64_add(&p.m.copied_bytes, block_span(r, b))
    u32_store(&p.m.aside[a].state, ASIDE_FULL)
    image_ring(p.m)
    return SAVED_GO


cdef int image_copy(Slot *s, RegionPart *p, uint64_t b, uint32_t state, char *target) noexcept nogil:
    """Copies a block that is in memory, in that state, inside `critical`: 1, and it counts as saved; 0: its state has
    changed; -1: it can't be copied (the program dropped pages of it), which ends the image."""
    cdef Region_t *r = p.r
    cdef uint64_t span = block_span(r, b)
    cdef uint32_t tid = s.tid
    cdef bint done = True
    if not claim_copying(s, r, b, state):
        return 0
    if u8_load(&p.state[b - p.first]) != UNSAVED:
        publish(r, b, 1, state)
        return 0
    if is_shared(r):
        memcpy(target, r.alias + (b << r.shift), span)
    elif state == POOLED or state == POOLED_DIRTY:
        memcpy(target, slot_at(r.engine, r.shift, r.place[b]), span)
    else:
        done = copy_resident(s, r, b, target)
        u32_store(&s.tid, tid)
    u8_cas(&p.state[b - p.first], UNSAVED, LIFTED)
    p.mine[b - p.first] = 1
    publish(r, b, 1, state)
    if not done:
        image_fail(p.m, -EFAULT, True)
    return 1 if done else -1


cdef bint claim_copying(Slot *s, Region_t *r, uint64_t b, uint32_t state) noexcept nogil:
    """state > COPYING, whether it is on its way to the store or not."""
    cdef uint32_t word = u32_load(&r.state[b])
    while word & STATE_MASK == state:
        if u32_cas(&r.state[b], word, COPYING | word & (WAITERS | FROM_PARENT | KEPT | STICKY)
                   | (s.index + 1) << OWNER_SHIFT | ((word >> GENERATION_SHIFT) + 1) << GENERATION_SHIFT):
            return True
        word = u32_load(&r.state[b])
    return False


# ---- the streamer -----------------------------------------------------------------------------------------------

cdef void region_stream(Image_t *m, RegionPart *p) noexcept nogil:
    cdef uint64_t b
    for b in range(p.first, p.end):
        if u32_load(&m.aborted):
            return
        if u8_load(&p.state[b - p.first]) == UNSAVED:
            drain(m)
            region_save(m, p, b)


cdef void regions_wanted(Image_t *m) noexcept nogil:
    cdef uint64_t i, b
    cdef RegionPart *p
    for i in range(m.regions):
        p = &m.region[i]
        for b in range(p.first, p.end):
            if u8_load(&p.mine[b - p.first]) == 2:
                region_save(m, p, b)


cdef void region_save(Image_t *m, RegionPart *p, uint64_t b) noexcept nogil:
    """One block, wherever it is, to the file; and whoever waits for it goes on."""
    cdef Region_t *r = p.r
    cdef Slot *s
    cdef uint32_t word, state
    cdef int got = 0
    while got == 0 and not u32_load(&m.aborted):
        s = call_borrow(r.engine)
        critical_enter(s)
        word = u32_load(&r.state[b])
        state = word & STATE_MASK
        if u8_load(&p.state[b - p.first]) != UNSAVED:
            got = 2
        elif state == CLEAN or state == DIRTY or state == POOLED or state == POOLED_DIRTY:
            got = image_copy(s, p, b, state, m.stream_bytes)
        critical_leave(s)
        call_return(r.engine, s)
        if got == 0 and state == MISSING:
            got = region_obtain(m, p, b)
        elif got == 0 and state == POISONED:
            image_fail(m, -<int>errno_of(r, b), False)
        elif got == 0 and is_busy(state):
            wait_for_word(r, b, word, SLICE_NS)
    region_woken(r, b)
    if got == 1:
        write_parts(m, <uint64_t>r.base + (b << r.shift), <uint64_t>r.base + (b << r.shift) + block_span(r, b),
                    m.stream_bytes)
    if got != 2:
        u64_add(&m.done_bytes, block_span(r, b))


cdef void region_woken(Region_t *r, uint64_t b) noexcept nogil:
    u32_add_seq(&r.image_turn, 1)
    futex_wake_all(&r.image_turn)
    if not r.is_inline:
        uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))


cdef int region_obtain(Image_t *m, RegionPart *p, uint64_t b) noexcept nogil:
    """A block that is not in memory, from its store or provider into the streamer's buffer: 1; 0: it is somewhere else
    by now."""
    cdef Region_t *r = p.r
    cdef uint32_t tries
    cdef int err = -EIO, got = 0
    for tries in range(r.retries + 1):
        got = obtain_aside(m, p, b, &err)
        if got or err == 0 or u32_load(&m.aborted):
            break
        futex_wait(&r.closing, 0, 1000000 << (2 * tries if tries < 5 else 10))
    if got == 0 and err != 0:
        image_fail(m, err, False)
    return got


cdef int obtain_aside(Image_t *m, RegionPart *p, uint64_t b, int *err) noexcept nogil:
    """One try: 1, or 0 with err: why, or 0 when the block is not missing any more."""
    cdef Region_t *r = p.r
    cdef Slot *s = carrier_wait(r.engine, r) if r.hosted else call_borrow(r.engine)
    cdef const char *source = NULL
    cdef uint64_t nbytes = run_bytes(r, b, 1), span = block_span(r, b)
    cdef bint hosted = r.hosted, native = r.fill.call == &native_fill
    cdef char *staging
    err[0] = slot_buffer(s)
    staging = s.staging
    if err[0] == 0 and claim_aside(s, r, b):
        m.filling_slot = s
        m.filling_region = r
        m.filling_block = b
        u32_store(&m.filling, FILLING_NOT if r.hosted else FILLING_BUSY)
        err[0] = obtain(s, r, b << r.shift, nbytes, &source)
        if not hosted and not u32_cas(&m.filling, FILLING_BUSY, FILLING_NOT):
            if not native:
                came_back(m, s, r, staging)
            pthread_exit(NULL)              # given up: nothing of this may be touched any more
        if err[0] == 0 and source == NULL:
            memset(m.stream_bytes, 0, span)
        elif err[0] == 0 and r.fill.kind == FILL_DIRECT:
            err[0] = copy_direct(r, m.stream_bytes, source, nbytes)
        elif err[0] == 0:
            memcpy(m.stream_bytes, source, span)
        obtain_ends(s, p, b, err[0] == 0)
        obtained_return(s, r)
        return err[0] == 0
    obtained_return(s, r)
    return 0


cdef void image_give_up(Image_t *m) noexcept nogil:
    """By who waits for the streamer: when it hangs in a function of a provider's, past the region's time, the image is
    over, and its block is missing again. This mapping and the region are left to that function for ever; the thread,
    until it comes back; so are buffer and slot, but for functions that know of no slots. (Providers in Python come
    back: their hosts are killed.)"""
    cdef Slot *s = m.filling_slot
    cdef Region_t *r = m.filling_region
    cdef Slot *mine
    if u32_load(&m.filling) != FILLING_BUSY or now_ns() < s.deadline_ns + SECOND_NS // 2:
        return
    if r.wait_for_ever and not u32_load(&m.aborted) or not u32_cas(&m.filling, FILLING_BUSY, FILLING_GIVEN_UP):
        return
    mine = call_borrow(r.engine)
    critical_enter(mine)
    publish(r, m.filling_block, 1, MISSING)
    critical_leave(mine)
    call_return(r.engine, mine)
    uf_wake(r.fd, <uint64_t>(r.base + (m.filling_block << r.shift)), block_span(r, m.filling_block))
    phase_change(s, BUSY, IDLE)
    u64_store(&s.since_ns, 0)
    s.staging = NULL
    if r.fill.call == &native_fill:
        call_return(r.engine, s)
    image_fail(m, -ETIMEDOUT, False)
    image_lift_all(m)
    u32_sub(&m.threads, 1)
    u32_store(&m.filling, FILLING_LEFT)
    image_over(m)


cdef void came_back(Image_t *m, Slot *s, Region_t *r, char *staging) noexcept nogil:
    """The streamer that was given up. The region is there still: the image's arrays are kept for that."""
    while u32_load(&m.filling) != FILLING_LEFT:
        sched_yield()                       # who gave it up is still at it
    s.staging = staging
    call_return(r.engine, s)


cdef bint claim_aside(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    """As begin_run, for one missing block whose bytes are wanted and which stays missing: it needs no room."""
    cdef bint claimed
    critical_enter(s)
    claimed = claim(s, r, b, MISSING)
    if claimed:
        s.region_id = r.id
        s.region = r
        s.first = b
        s.count = 1
        s.cause = PREFETCH
        s.write = 0
        s.repair = 2                        # aside: not into the region's own page
        s.recycled = 0
        s.tries = 0
        s.said_ns = 0
        s.deadline_ns = now_ns() + r.timeout_ns
        u64_store(&s.since_ns, s.deadline_ns - r.timeout_ns)
        s.run += RUN_ONE
        u32_store(&s.phase, s.run | BUSY)
    critical_leave(s)
    return claimed


cdef inline void obtained_return(Slot *s, Region_t *r) noexcept nogil:
    if r.hosted:
        carrier_return(s)
    else:
        call_return(r.engine, s)


cdef void obtain_ends(Slot *s, RegionPart *p, uint64_t b, bint good) noexcept nogil:
    """The block is missing again, as it was; saved, if that was good."""
    cdef Region_t *r = p.r
    critical_enter(s)
    if good:
        u8_cas(&p.state[b - p.first], UNSAVED, LIFTED)
        p.mine[b - p.first] = 1
    publish(r, b, 1, MISSING)
    critical_leave(s)
    uf_wake(r.fd, <uint64_t>(r.base + (b << r.shift)), block_span(r, b))    # who touched it meanwhile asks again
    phase_change(s, BUSY, IDLE)
    u64_store(&s.since_ns, 0)


cdef void region_write_aside(Image_t *m, Aside *a, const char *bytes) noexcept nogil:
    cdef Region_t *r = m.region[a.span & ~<uint32_t>REGION_ASIDE].r
    cdef uint64_t start = <uint64_t>r.base + (a.block << r.shift)
    write_parts(m, start, start + block_span(r, a.block), bytes)
    u64_add(&m.done_bytes, block_span(r, a.block))


cdef bint regions_saved(Image_t *m) noexcept nogil:
    cdef uint64_t i, b
    for i in range(m.regions):
        for b in range(m.region[i].end - m.region[i].first):
            if u8_load(&m.region[i].state[b]) == UNSAVED:
                return False
    return True


cdef uint64_t regions_total(Image_t *m) noexcept nogil:
    cdef uint64_t i, b, n = 0
    for i in range(m.regions):
        for b in range(m.region[i].first, m.region[i].end):
            if u8_load(&m.region[i].state[b - m.region[i].first]) == UNSAVED:
                n += block_span(m.region[i].r, b)
    return n


# ---- start and end ----------------------------------------------------------------------------------------------

cdef int regions_protect(Image_t *m) noexcept nogil:
    """Closes the regions' gates and protects them: all blocks of a first image are to be saved, of a series those that
    were written since. 0 or -errno; EBUSY: a region has an image under way."""
    cdef uint64_t i
    cdef RegionPart *p
    cdef Region_t *r
    cdef int err = 0
    for i in range(m.regions):
        p = &m.region[i]
        r = p.r
        if r.writable and not r.kernel_faults:
            return -EPERM                   # a readinto of the program's into protected memory would fail
        if p.w == NULL and r.writable:
            pthread_mutex_lock(&registry_lock)
            if r.image == NULL:
                u32_store_seq(&r.image_gate, 1)
                ptr_store(&r.image, p)
            else:
                err = -EBUSY
            pthread_mutex_unlock(&registry_lock)
            if err == 0:
                settle_all(r.engine)
                err = watch_begin(r, (p.first << r.shift) / PAGE, u64_min(p.end << r.shift, r.span) / PAGE, &p.w)
            if err != 0:
                return err
            p.w.coarse = True
            skip_zeros(p)
        elif r.writable:
            u32_store_seq(&r.image_gate, 1)
            settle_all(r.engine)
            written_since(p)
    return 0


cdef void skip_zeros(RegionPart *p) noexcept nogil:
    """Blocks of a region of zeros that nobody has touched are zeros at the instant, whatever is written later. No write
    is let go meanwhile."""
    cdef Region_t *r = p.r
    cdef uint64_t b = p.first, last = 0, at = p.first
    cdef uint32_t word
    if r.fill.kind != FILL_ZERO:
        return
    while b < p.end and next_known(r, &b, &last):
        memset(&p.state[at - p.first], SKIPPED, u64_min(b, p.end) - at)
        while b < last and b < p.end:
            word = u32_load(&r.state[b])
            if word & STATE_MASK == MISSING and word & (SPILLED | FROM_PARENT) == 0:
                p.state[b - p.first] = SKIPPED
            b += 1
        at = b
    if at < p.end:
        memset(&p.state[at - p.first], SKIPPED, p.end - at)


cdef void written_since(RegionPart *p) noexcept nogil:
    """A series: what the watch has marked is to be saved, and protected again."""
    cdef Region_t *r = p.r
    cdef uint64_t b, first, end
    for b in range(p.first, p.end):
        first = (b << r.shift) / PAGE
        end = u64_min((b + 1) << r.shift, r.span) / PAGE
        if u8_load(&p.state[b - p.first]) != UNSAVED and bits_any(p.w.bits, first - p.w.first, end - p.w.first):
            watch_take(p.w, first, end, True, NULL)
            p.state[b - p.first] = UNSAVED


cdef void regions_open(Image_t *m) noexcept nogil:
    cdef uint64_t i
    for i in range(m.regions):
        if ptr_load(&m.region[i].r.image) == &m.region[i]:
            u32_store_seq(&m.region[i].r.image_gate, 0)
            futex_wake_all(&m.region[i].r.image_gate)


cdef void regions_lift(Image_t *m) noexcept nogil:
    """Nobody waits for the image any more. What a series had not saved counts as written since."""
    cdef uint64_t i, b
    cdef RegionPart *p
    for i in range(m.regions):
        p = &m.region[i]
        for b in range(p.first, p.end):
            if u8_cas(&p.state[b - p.first], UNSAVED, LIFTED):
                if p.w != NULL:
                    bits_set(p.w.bits, (b << p.r.shift) / PAGE - p.w.first,
                             u64_min((b + 1) << p.r.shift, p.r.span) / PAGE - p.w.first)
        if ptr_load(&p.r.image) == p:
            u32_add_seq(&p.r.image_turn, 1)
            futex_wake_all(&p.r.image_turn)
            if not p.r.is_inline:
                uf_wake(p.r.fd, <uint64_t>p.r.base, p.r.span)


cdef void regions_close(Image_t *m) noexcept nogil:
    """The regions are as they were. (What is protected still is lifted by the next write, as ever.)"""
    cdef uint64_t i
    cdef RegionPart *p
    regions_lift(m)
    regions_open(m)
    for i in range(m.regions):
        p = &m.region[i]
        if ptr_load(&p.r.image) == p:
            ptr_store(&p.r.image, NULL)
            settle_all(p.r.engine)
        if p.w != NULL:
            watch_end(p.w)
            p.w = NULL
