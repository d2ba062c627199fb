# Making durable what a store has acknowledged, and what a failed sync means for it.
#
# Uses:     write_enters, is_over of _store.pxi; host_sync of _hostwrite.pxi; unprotect of _fill.pxi
# Provides: sync_store; sync_acknowledged, sync_left (told of blocks); lost_forget (discard gives them up)
#
# A kernel that could not write pages to the disk reports it once, to the next fsync, and counts those pages as written:
# a second fsync succeeds, and the data is gone. (Rebello and others, "Can Applications Recover from fsync Failures?",
# USENIX ATC 2020.) So after a failed sync nothing that was acknowledged since the last good one counts as stored: it is
# dirty again where it is still in memory, and written again before the next sync. What has left memory can't be: flush
# raises from then on, naming those blocks. For providers in Python their own `flush` has to answer for that.

cdef int sync_store(Slot *s, Region_t *r, uint32_t *until) noexcept nogil:
    """Makes durable what the provider acknowledged. 0 or -errno. Waits for the store."""
    cdef Slot *c
    cdef int err = 0
    if not r.writes_back:
        return 0                            # private: nothing of it outlives the region
    while not u32_cas(&r.syncing, 0, 1):    # of two at once, one could take the other's blocks for stored
        if is_over(s, r, until):
            return -ETIMEDOUT
        poll(NULL, 0, 2)
    u32_store(&r.unsynced, 0)               # what is acknowledged from here on may not be in it
    if r.hosted:
        c = carrier_wait_write(r)
        if c == NULL:
            err = -EIO
        else:
            err = host_sync(c, r)
            carrier_return(c)
    elif r.fill.sync != NULL:
        sync_marks(r, UNSYNCED, SYNCING)
        write_enters(s, r, 0)
        err = r.fill.sync(r.fill.self)
        u64_store(&s.write_ns, 0)
        if err == 0:
            sync_marks(r, SYNCING, SYNCED)
        else:
            sync_failed(s, r, err)
        if err == 0:
            err = r.sync_lost
    if err != 0:
        u32_store(&r.unsynced, 1)
    u32_store(&r.syncing, 0)
    return err


cdef void sync_marks(Region_t *r, uint8_t old, uint8_t new) noexcept nogil:
    cdef uint64_t b = 0, last = 0
    while next_known(r, &b, &last):
        while b < last:
            sync_mark(r, b, old, new)
            b += 1


cdef inline void sync_mark(Region_t *r, uint64_t b, uint8_t old, uint8_t new) noexcept nogil:
    cdef uint8_t now = u8_load(&r.spill[b])
    while now & SYNC_MASK == old and not u8_cas(
            &r.spill[b], now, now & LOST | (new | now & LEFT if new != SYNCED else 0)):
        now = u8_load(&r.spill[b])          # acknowledged once more, or it left


cdef inline void sync_acknowledged(Region_t *r, uint64_t b) noexcept nogil:
    cdef uint8_t now = u8_load(&r.spill[b])
    while not u8_cas(&r.spill[b], now, now & (LEFT | LOST) | UNSYNCED):
        now = u8_load(&r.spill[b])


cdef inline void sync_left(Region_t *r, uint64_t b) noexcept nogil:
    """A block leaves memory."""
    cdef uint8_t now = u8_load(&r.spill[b])
    while now & SYNC_MASK and not u8_cas(&r.spill[b], now, now | LEFT):
        now = u8_load(&r.spill[b])


cdef void sync_failed(Slot *s, Region_t *r, int err) noexcept nogil:
    """All that was acknowledged since the last good sync is dirty again, or lost."""
    cdef uint64_t b = 0, last = 0
    while next_known(r, &b, &last):
        while b < last:
            if u8_load(&r.spill[b]) & SYNC_MASK:
                sync_again(s, r, b, err)
            b += 1


cdef void sync_again(Slot *s, Region_t *r, uint64_t b, int err) noexcept nogil:
    cdef uint32_t word, state
    cdef uint8_t mark
    cdef bint done = False
    while not done:
        word = u32_load(&r.state[b])
        state = word & STATE_MASK
        if is_busy(state):
            wait_for_word(r, b, word, SLICE_NS)     # its owner is inside a call of the kernel, or a fill in its time
            continue
        mark = u8_load(&r.spill[b])
        if not u8_cas(&r.spill[b], mark, mark & LOST):     # before it can be written and acknowledged again
            continue
        critical_enter(s)
        if mark & LEFT or state == MISSING or state == POISONED:
            u8_cas(&r.spill[b], mark & LOST, LOST)
            done = True
            r.sync_lost = err
        elif state == CLEAN and word & WRITING == 0:
            done = u32_cas(&r.state[b], word, word & ~<uint32_t>STATE_MASK | UNPROTECTING)
            if done:
                if r.protect:
                    unprotect(r, b, 1)
                publish(r, b, 1, DIRTY)
        elif state == POOLED and word & WRITING == 0:
            done = u32_cas(&r.state[b], word, word & ~<uint32_t>STATE_MASK | POOLED_DIRTY)
        else:
            done = True                     # dirty, or on its way once more: it is stored after this
        critical_leave(s)
        if not done:
            sync_acknowledged(r, b)         # it changed in between: looked at again


cdef void lost_forget(Region_t *r, uint64_t b) noexcept nogil:
    """The program has given a block up: what the store has of it is what it is."""
    cdef uint64_t i = 0, last = 0
    cdef uint8_t now = u8_load(&r.spill[b])
    if not r.writes_back or now & LOST == 0:
        return
    while not u8_cas(&r.spill[b], now, now & ~<uint8_t>LOST):
        now = u8_load(&r.spill[b])
    while next_known(r, &i, &last):
        while i < last:
            if u8_load(&r.spill[i]) & LOST:
                return
            i += 1
    r.sync_lost = 0
