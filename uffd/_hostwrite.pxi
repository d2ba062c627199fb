# Hosted providers that write: what goes back.
#
# Uses:     the carriers and requests of _hosted.pxi
# Provides: carrier_for_write, carrier_wait_write, host_store (a write), host_sync (a flush); _host_store, _host_sync
#           (the same for the tests, on any region)
#
# A write's bytes lie in the page buffer of its request, so that it can be asked for again for as long as the carrier
# is lent: when it failed, and when its host died with it. The same bytes at the same place: twice does no harm, as
# long as two writes of one block are never under way at once. A provider that can write is opened by one host alone
# (Fill.one_host): two instances might not read what the other has written.

cdef Slot *carrier_for_write(Region_t *r) noexcept nogil:
    """A free request for host_store or host_sync, or NULL when none is free or WRITES are under way. It is not of the
    region's share: pages must be able to go while others wait to come."""
    cdef Engine_t *e = r.engine
    cdef Slot *c = carrier_take(e, r.fill, NULL, 0)
    if c == NULL:
        return NULL
    c.carrier.writes = 1
    if u32_add(&c.carrier.h.writing, 1) >= WRITES:
        carrier_return(c)
        return NULL
    return c


cdef Slot *carrier_wait_write(Region_t *r) noexcept nogil:
    """The same; sleeps while there is none. NULL when the engine stops."""
    cdef Engine_t *e = r.engine
    cdef uint32_t turn
    cdef Slot *c = NULL
    u32_add_seq(&e.carrier_waiters, 1)
    while c == NULL and not u32_load(&e.stopping):
        turn = u32_load(&e.carrier_turn)
        c = carrier_for_write(r)
        if c == NULL:
            futex_wait(&e.carrier_turn, turn, SECOND_NS / 10)
    u32_sub(&e.carrier_waiters, 1)
    return c


cdef int host_store(Slot *c, Region_t *r, uint64_t offset, uint64_t nbytes, bint once) noexcept nogil:
    """Has the provider store the first nbytes of the carrier's buffer at `offset`: 0 when it has acknowledged them,
    else -errno, with the host's text noted for the first block, the tries in the slot, and the buffer as it was.

    Waits, for at most the region's time; needs no run of the slot. `once`: without another try. Never two at once for
    one block."""
    cdef int err = host_command(c, r, REQ_WRITE, offset, nbytes, 0 if once else r.retries)
    cdef uint64_t now = now_ns(), before = u64_load(&r.stored_ns)
    while err == 0 and before < now and not u64_cas(&r.stored_ns, before, now):
        before = u64_load(&r.stored_ns)     # before the block may go: see is_outdated
    return err


cdef int host_sync(Slot *c, Region_t *r) noexcept nogil:
    """Has the provider make durable what it has acknowledged: as host_store, its text noted for NO_BLOCK. Only while no
    write of the region is under way."""
    return host_command(c, r, REQ_FLUSH, 0, 0, r.retries)


cdef int host_command(Slot *c, Region_t *r, uint32_t kind, uint64_t offset, uint64_t nbytes,
                      uint32_t retries) noexcept nogil:
    """Asks for what can be asked for again, up to `retries` times more: the same bytes at the same place."""
    cdef uint64_t pause_ms = 1, b = offset >> r.shift if kind == REQ_WRITE else <uint64_t>NO_BLOCK
    cdef int err
    c.deadline_ns = now_ns() + r.timeout_ns
    c.tries = 0
    while True:
        host_post(c, kind, r.fill.session, offset, nbytes, 1, False)
        err = host_answer(c, r.timeout_ns, NULL)
        c.carrier.posted_bytes = 0
        c.tries += 1
        if err == 0:
            return 0
        note_text(r, b, c.carrier)
        if c.tries > retries or u32_load(&r.engine.stopping) or now_ns() + pause_ms * 1000000 >= c.deadline_ns:
            return err
        count(c, r, C_RETRIES, 1)
        poll(NULL, 0, <int>pause_ms)
        pause_ms = pause_ms * 4 if pause_ms < 250 else 1000


# ---- for the tests ----------------------------------------------------------------------------------------------

def _host_store(Region region, uint64_t offset, bytes data):
    """Has the region's provider store bytes: (0 or errno, tries, the host's text or None). Releases the GIL."""
    return _commanded(region, REQ_WRITE, offset, data)


def _host_sync(Region region):
    """Has it make durable what it has acknowledged; answers the same."""
    return _commanded(region, REQ_FLUSH, 0, b"")


cdef _commanded(Region region, uint32_t kind, uint64_t offset, bytes data):
    cdef Region_t *r = _live(region)
    cdef const char *source = PyBytes_AsString(data)
    cdef uint64_t nbytes = <uint64_t>len(data)
    cdef uint32_t tries = 0
    cdef int err = -EINVAL
    cdef Slot *c
    cdef Text *t
    if not r.hosted or nbytes > HOST_BUFFER_BYTES or nbytes > r.nbytes or offset > r.nbytes - nbytes:
        raise ValueError(f"{nbytes} bytes at {offset} can't be written")
    _hold(r)
    with nogil:
        c = carrier_wait_write(r)
        if c != NULL:
            memcpy(c.staging, source, nbytes)
            err = host_store(c, r, offset, nbytes, False) if kind == REQ_WRITE else host_sync(c, r)
            tries = c.tries
            carrier_return(c)
    t = text_of(r, offset >> r.shift if kind == REQ_WRITE else <uint64_t>NO_BLOCK) if err else NULL
    text = None if t == NULL else t.text[:t.nbytes].decode("utf-8", "replace")
    region_release(r)
    return -err, tries, text
