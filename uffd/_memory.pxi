# What Python asks of the budget, of eviction and of write-back. Functions of a core Region or Engine.
#
# Uses:     _live, _hold of _api.pxi; _evict.pxi, _store.pxi
# Provides: budget, set_budget; pin, unpin, evict, discard, write_back, sync, write_errors
#
# `runs` is an int64 buffer of pairs of block numbers, [first, end). Those who wait do so without the GIL, in slices of
# 100 ms, with a look at Python's signals between them.

def budget(of):
    """Of an Engine, or of a Region's: (limit in bytes or None, bytes in use, bytes pinned, the least that a limit may
    be)."""
    cdef Engine engine = (<Region?>of).engine if isinstance(of, Region) else of
    cdef Engine_t *e = NULL if engine is None else engine.e
    if e == NULL:
        return None, 0, 0, 0
    limit = u64_load(&e.limit)
    used = u64_load(&e.used) - u64_load(&e.free_bytes)
    return None if limit == NO_LIMIT else limit, used, u64_load(&e.pinned), room_least(e, 0)


def set_budget(Engine engine not None, limit, bint follows, list cgroups, bytes pressure):
    """limit: bytes or None; follows: "auto". cgroups: the files of each that holds us: limit, usage, statistics."""
    cdef Engine_t *e = engine.e
    cdef int i
    if e == NULL:
        raise ValueError("the engine is closed")
    for i in range(min(len(cgroups), <int>CGROUPS)):
        _copy_path(e.cgroup[i].limit, cgroups[i][0])
        _copy_path(e.cgroup[i].usage, cgroups[i][1])
        _copy_path(e.cgroup[i].stat, cgroups[i][2])
    e.cgroups = min(len(cgroups), <int>CGROUPS)
    _copy_path(e.pressure, pressure)
    e.asked_limit = NO_LIMIT if limit is None else <uint64_t>limit
    e.auto_limit = follows
    with nogil:
        budget_set(e, e.asked_limit)
        budget_follow(e, 0)


def least_budget(Engine engine, uint64_t block_bytes=0):
    """The least limit in bytes with which an engine works that has a region of such blocks, too; 0 of a closed one."""
    return 0 if engine is None or engine.e == NULL else room_least(engine.e, block_bytes)


cdef void _copy_path(char *to, bytes path):
    if len(path) > 255:
        path = b""
    memcpy(to, PyBytes_AsString(path), <size_t>len(path))
    to[len(path)] = 0


# ---- pins -------------------------------------------------------------------------------------------------------

def pin(Region region not None, runs):
    """Pins the blocks of runs: who evicts leaves them alone, from now on. The bytes that the budget lacks for them, 0:
    none, and then they are pinned. A block that is in many calls at once (254) stays for good."""
    cdef Region_t *r = _live(region)
    cdef Engine_t *e = r.engine
    cdef Py_buffer view
    cdef uint64_t lacks = 0, least = room_least(e, 0)
    PyObject_GetBuffer(runs, &view, PyBUF_ANY_CONTIGUOUS)
    _hold(r)
    with nogil:
        lacks = _pin_runs(r, <int64_t *>view.buf, <uint64_t>view.len // 16, least)
        region_release(r)
    PyBuffer_Release(&view)
    return lacks


cdef uint64_t _pin_runs(Region_t *r, int64_t *pair, uint64_t n, uint64_t least) noexcept nogil:
    """0, or the bytes by which the budget is too small; nothing is pinned then."""
    cdef Engine_t *e = r.engine
    cdef uint64_t i, b, need = 0, limit
    pthread_mutex_lock(&e.policy_lock)      # of two who pin, the second counts what the first has
    limit = u64_load(&e.limit)
    for i in range(n):
        for b in range(<uint64_t>pair[2 * i], <uint64_t>pair[2 * i + 1]):
            if u8_load(&r.pins[b]) == 0:
                need += block_span(r, b)
    if limit != NO_LIMIT and need and least + need > limit:
        pthread_mutex_unlock(&e.policy_lock)
        return least + need - limit
    for i in range(n):
        for b in range(<uint64_t>pair[2 * i], <uint64_t>pair[2 * i + 1]):
            _pin_block(r, b, True)
    pthread_mutex_unlock(&e.policy_lock)
    return 0


cdef void _pin_block(Region_t *r, uint64_t b, bint more) noexcept nogil:
    cdef uint8_t old = u8_load(&r.pins[b])
    r.known[b * 4 / PAGE] = 1
    while old != 255 and (more or old != 0):
        if u8_cas(&r.pins[b], old, <uint8_t>(old + 1 if more else old - 1)):
            if more and old == 0:
                u64_add(&r.engine.pinned, block_span(r, b))
            elif not more and old == 1:
                u64_add(&r.engine.pinned, -block_span(r, b))
            return
        old = u8_load(&r.pins[b])


def unpin(Region region not None, runs):
    """Takes back one pin of each block. Nothing, if the region is closed by now."""
    cdef Region_t *r = region.r
    cdef Py_buffer view
    cdef int64_t *pair
    cdef uint64_t i, b
    if r == NULL:
        return
    PyObject_GetBuffer(runs, &view, PyBUF_ANY_CONTIGUOUS)
    _hold(r)
    with nogil:
        pair = <int64_t *>view.buf
        pthread_mutex_lock(&r.engine.policy_lock)
        for i in range(<uint64_t>view.len // 16):
            for b in range(<uint64_t>pair[2 * i], <uint64_t>pair[2 * i + 1]):
                _pin_block(r, b, False)
        pthread_mutex_unlock(&r.engine.policy_lock)
        evictor_ring(r.engine)
        room_tell(r.engine)
        region_release(r)
    PyBuffer_Release(&view)


# ---- out of memory ----------------------------------------------------------------------------------------------

def evict(Region region not None, runs):
    """Takes the clean blocks of runs out of memory; bytes freed. Dirty, pinned and busy ones stay."""
    cdef Region_t *r = _live(region)
    cdef Py_buffer view
    cdef int64_t *pair
    cdef uint64_t i, freed = 0
    cdef Slot *s
    PyObject_GetBuffer(runs, &view, PyBUF_ANY_CONTIGUOUS)
    _hold(r)
    with nogil:
        settle(r.engine)                    # a touch is let go a moment before its block is published
        pair = <int64_t *>view.buf
        s = call_borrow(r.engine)
        for i in range(<uint64_t>view.len // 16):
            freed += evict_blocks(s, r, <uint64_t>pair[2 * i], <uint64_t>pair[2 * i + 1])
        call_return(r.engine, s)
        pool_trim(r.engine, freed)
        region_release(r)
    PyBuffer_Release(&view)
    return freed


def discard(Region region not None, uint64_t first, uint64_t end):
    """Drops the blocks [first, end) and what was written to them, in order; where it stopped. Before `end`: a block
    that is pinned, or busy for longer than 100 ms."""
    cdef Region_t *r = _live(region)
    cdef uint64_t b = first, before
    cdef uint32_t word
    cdef Slot *s
    _hold(r)
    with nogil:
        settle(r.engine)
        s = call_borrow(r.engine)
        while b < end:
            before = b
            b = discard_blocks(s, r, b, end)
            if b < end and b == before:
                word = u32_load(&r.state[b])
                if word & WRITING:
                    wait_for_write(r, b)
                elif is_busy(word & STATE_MASK):
                    wait_for_word(r, b, word, SLICE_NS)
                elif u8_load(&r.pins[b]) or u32_load(&r.closing):
                    break
                break
        call_return(r.engine, s)
        region_release(r)
    return b


def is_pinned(Region region not None, uint64_t b):
    return u8_load(&_live(region).pins[b]) != 0


# ---- to the store -----------------------------------------------------------------------------------------------

def write_back(Region region not None, runs, timeout_ns=None):
    """Writes the dirty blocks of runs back, pooled ones too; True when the store has answered for all, False when the
    time was over first. Which failed is told by write_errors. Ctrl-C interrupts it."""
    cdef Region_t *r = _live(region)
    cdef Py_buffer view
    cdef int64_t *pair
    cdef uint64_t i, b, end, stop, deadline = <uint64_t>-1
    cdef Slot *s
    cdef bint done = False
    if timeout_ns is not None:
        deadline = now_ns() + <uint64_t>timeout_ns
    PyObject_GetBuffer(runs, &view, PyBUF_ANY_CONTIGUOUS)
    _hold(r)
    try:
        pair = <int64_t *>view.buf
        for i in range(<uint64_t>view.len // 16):
            b = <uint64_t>pair[2 * i]
            end = <uint64_t>pair[2 * i + 1]
            while b < end:
                stop = b
                with nogil:
                    stop = _next_dirty(r, b, end)
                    if stop < end:
                        b = stop
                        stop = u64_min(end, b + u64_max(RUN_BYTES >> r.shift, 1))   # one write, then a look
                        s = call_borrow(r.engine)
                        write_range(s, r, b, stop, True, &r.closing)
                        call_return(r.engine, s)
                b = stop
                PyErr_CheckSignals()
                if now_ns() > deadline:
                    return False
        while not done:
            with nogil:
                done = wait_written(r, SLICE_NS)
            PyErr_CheckSignals()
            if not done and now_ns() > deadline:
                return False
        return True
    finally:
        PyBuffer_Release(&view)
        region_release(r)


cdef uint64_t _next_dirty(Region_t *r, uint64_t b, uint64_t end) noexcept nogil:
    """The first block of [b, end) that the store does not have, or `end`. Goes by what was ever touched."""
    cdef uint64_t last = 0
    cdef uint32_t word
    while b < end and next_known(r, &b, &last):
        while b < last and b < end:
            word = u32_load(&r.state[b])
            if is_dirty(word & STATE_MASK) or is_busy(word & STATE_MASK):
                return b
            b += 1
    return end


def write_failures(Region region not None):
    """How many writes of blocks have failed so far."""
    return u64_load(&_live(region).write_failures)


def write_errors(Region region not None, uint64_t first, uint64_t end, uint64_t since):
    """[(block, errno, tries)] of blocks in [first, end) whose last write failed, after write_failures was `since`; at
    most one of each 64 neighbours."""
    cdef Region_t *r = _live(region)
    return sorted([(r.write_error[i].block, -r.write_error[i].error, r.write_error[i].tries) for i in range(ERRORS)
                   if r.write_error[i].error and r.write_error[i].at > since and first <= r.write_error[i].block < end])


def unwritten(Region region not None):
    """How many blocks the store does not have."""
    cdef Region_t *r = _live(region)
    cdef uint64_t n
    _hold(r)
    with nogil:
        n = count_dirty(r)
        region_release(r)
    return n


def sync(Region region not None):
    """Makes durable what the store has acknowledged: 0 or errno. Waits for the store."""
    cdef Region_t *r = _live(region)
    cdef int err
    _hold(r)
    with nogil:
        err = sync_store(r)
        region_release(r)
    return -err
