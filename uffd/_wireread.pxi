# Migration, the source's side: a block's bytes, wherever they are.
#
# Uses:     _wire.pxi; claims of _fill.pxi, slots and torn copies of _evict.pxi, the spill file of _store.pxi, requests
#           of _hosted.pxi
# Provides: source_read
#
# A block is read where it is: in the region, in the pool, in the spill file, or at its provider, and does not become
# resident by that.


cdef int source_read(Wire_t *w, Part_t *p, uint64_t b, uint64_t n, char *buffer, const char **data) noexcept nogil:
    """The bytes of blocks [b, b + n) at *data: in place, or in the buffer. 0, or -errno of one that can't be read."""
    cdef Region_t *r
    cdef uint64_t i
    cdef int err = 0
    if p.region_id == 0:
        data[0] = p.base + (b << p.shift)
        if u32_load(&w.frozen) and b == 0 and not p.whole:
            data[0] = p.edge[0]
        elif u32_load(&w.frozen) and b == p.blocks - 1 and not p.whole:
            data[0] = p.edge[1]
        return 0
    data[0] = buffer
    r = region_acquire(p.region_id)
    if r == NULL:
        return -ENODATA
    for i in range(n):
        err = region_read(r, b + i, buffer + (i << p.shift))
        if err != 0:
            break
    region_release(r)
    return err


cdef int region_read(Region_t *r, uint64_t b, char *out) noexcept nogil:
    """A copy of a block, wherever it is. It stays there, and what was not resident does not become so."""
    cdef uint32_t word, state
    cdef Slot *s = wire_borrow(r.engine)
    cdef int err = 1
    cdef uint32_t tries = 0
    while err > 0:
        word = u32_load(&r.state[b])
        state = word & STATE_MASK
        if state == CLEAN or state == DIRTY or state == POOLED or state == POOLED_DIRTY:
            err = copy_held(s, r, b, word, out)
        elif state == MISSING:
            err = read_store(s, r, b, word, out)
            if err != 0 and tries < r.retries:
                tries += 1
                poll(NULL, 0, <int>(1 << 2 * tries if tries < 5 else 1000))
                err = 1
        elif state == POISONED:
            err = -EIO
        else:
            wait_for_word(r, b, word, 10000000)
    wire_return(r.engine, s)
    return err


cdef int copy_held(Slot *s, Region_t *r, uint64_t b, uint32_t word, char *out) noexcept nogil:
    """Of a block in memory, which can't leave it meanwhile: it is COPYING. 1: look again."""
    cdef uint32_t state = word & STATE_MASK
    cdef uint64_t nbytes = run_bytes(r, b, 1)
    cdef bint whole = True
    critical_enter(s)
    if not u32_cas(&r.state[b], word, COPYING | word & (WAITERS | FROM_PARENT | KEPT | STICKY)
                   | (s.index + 1) << OWNER_SHIFT | ((word >> GENERATION_SHIFT) + 1) << GENERATION_SHIFT):
        critical_leave(s)
        return 1
    if is_shared(r):
        memcpy(out, r.alias + (b << r.shift), nbytes)
    elif state == POOLED or state == POOLED_DIRTY:
        memcpy(out, slot_at(r.engine, r.shift, r.place[b]), nbytes)
    else:
        u32_store(&s.torn, 0)
        u32_store(&s.tid, <uint32_t>thread_id())
        memcpy(out, r.base + (b << r.shift), nbytes)
        u32_store(&s.tid, 0)
        whole = u32_load(&s.torn) == 0
        if not whole:
            untear(s, r, b)
    publish_same(r, b, state)
    critical_leave(s)
    if not whole:                           # the program dropped pages of it: they come back as at a touch
        memcpy(out, r.base + (b << r.shift), nbytes)
    return 0


cdef int read_store(Slot *s, Region_t *r, uint64_t b, uint32_t word, char *out) noexcept nogil:
    """Of a block that is not in memory: from the spill file or the provider, as a fill would, into a buffer."""
    cdef uint64_t offset = b << r.shift, nbytes = run_bytes(r, b, 1)
    cdef const char *source = NULL
    cdef int err = slot_buffer(s) if s.staging == NULL else 0
    if err != 0:
        return err
    if word & SPILLED:
        err = spill_fetch(r, b, out)
        return err if u32_load(&r.state[b]) == word else 1
    if r.in_child and word & FROM_PARENT:
        memcpy(out, r.alias + offset, nbytes)
        return parent_lacks(r, offset, block_span(r, b))
    if r.fill.kind == FILL_ZERO:
        memset(out, 0, nbytes)
    elif r.fill.kind == FILL_DIRECT:
        err = copy_direct(r, out, r.fill.direct + offset, nbytes)
    elif r.fill.kind == FILL_HOST:
        err = read_hosted(r, offset, nbytes, out)
    else:
        err = r.fill.call(r.fill.self, s.index, offset, out, nbytes)
        err = err if -ERRNO_MAX <= err <= 0 else -EIO
    if err == 0 and u32_load(&r.state[b]) & SPILLED:
        return 1                            # it was touched, written, and left again meanwhile
    return err


cdef int read_hosted(Region_t *r, uint64_t offset, uint64_t nbytes, char *out) noexcept nogil:
    cdef Slot *c = carrier_wait(r.engine, r)
    cdef int err
    c.deadline_ns = now_ns() + r.timeout_ns
    host_post(c, REQ_READ, r.fill.session, offset, nbytes, 1, False)
    err = host_answer(c, r.timeout_ns, NULL)
    c.carrier.posted_bytes = 0
    if err == 0:
        memcpy(out, c.staging, nbytes)
    carrier_return(c)
    return err
