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
    """Takes the clean blocks of runs out of memory; bytes freed. Dirty and pinned ones stay, and those that are being
    filled. What can't leave at this moment (somebody has it in hand, or the kernel has its pages in a batch of another
    CPU's) is tried again for a tenth of a second."""
    cdef Region_t *r = _live(region)
    cdef Py_buffer view
    cdef int64_t *pair
    cdef uint64_t i, b, freed = 0, deadline
    cdef unsigned int tries
    cdef Slot *s
    PyObject_GetBuffer(runs, &view, PyBUF_ANY_CONTIGUOUS)
    _hold(r)
    with nogil:
        settle(r.engine)                    # a touch is let go a moment before its block is published
        pair = <int64_t *>view.buf
        s = call_borrow(r.engine)
        for i in range(<uint64_t>view.len // 16):
            freed += evict_blocks(s, r, <uint64_t>pair[2 * i], <uint64_t>pair[2 * i + 1])
        deadline = now_ns() + SLICE_NS
        for i in range(<uint64_t>view.len // 16):
            for b in range(<uint64_t>pair[2 * i], <uint64_t>pair[2 * i + 1]):
                tries = 0
                while leaves_soon(r, b) and now_ns() < deadline:
                    nap(tries)
                    tries += 1
                    freed += evict_blocks(s, r, b, b + 1)
        call_return(r.engine, s)
        pool_trim(r.engine, freed)
        region_release(r)
    PyBuffer_Release(&view)
    return freed


cdef bint leaves_soon(Region_t *r, uint64_t b) noexcept nogil:
    """Whether a block is there that could leave, or is in the hands of somebody who calls the kernel."""
    cdef uint32_t word = u32_load(&r.state[b]), state = word & STATE_MASK
    if state == CLEAN:
        return word & WRITING == 0 and u8_load(&r.pins[b]) == 0 and not u32_load(&r.closing)
    return is_busy(state) and state != FILLING


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
    """Has the dirty blocks of runs written back, pooled ones too. 0: the store has answered for all (which failed is
    told by write_errors); 1: the time was over first; 2: a native store has not answered for as long as the region's
    time is. What was begun goes on then. Ctrl-C interrupts it."""
    cdef Region_t *r = _live(region)
    cdef Py_buffer view
    cdef int answer = 0
    cdef uint64_t deadline = <uint64_t>-1 if timeout_ns is None else now_ns() + <uint64_t>timeout_ns
    PyObject_GetBuffer(runs, &view, PyBUF_ANY_CONTIGUOUS)
    _hold(r)
    try:
        if _any_dirty(r, <int64_t *>view.buf, <uint64_t>view.len // 16):
            answer = _wait_work(r, <int64_t *>view.buf, <uint64_t>view.len // 16, deadline, NULL)
        if answer == 0:
            answer = _wait_written(r, deadline)
    finally:
        PyBuffer_Release(&view)
        region_release(r)
    return answer


def sync(Region region not None, timeout_ns=None):
    """Makes durable what the store has acknowledged: (as write_back, 0 or errno)."""
    cdef Region_t *r = _live(region)
    cdef uint64_t deadline = <uint64_t>-1 if timeout_ns is None else now_ns() + <uint64_t>timeout_ns
    cdef int err = 0, answer = 0
    if not r.writes_back or not r.hosted and r.fill.sync == NULL:
        return 0, 0
    _hold(r)
    try:
        answer = _wait_work(r, NULL, 0, deadline, &err)
    finally:
        region_release(r)
    return answer, -err


cdef int _wait_work(Region_t *r, int64_t *runs, uint64_t n, uint64_t deadline, int *err) except -1:
    """A thread's work, waited for in slices: 0, 1 or 2 as of write_back."""
    cdef Work *w = NULL
    cdef uint32_t turn = 0
    cdef uint64_t moved = now_ns()
    cdef bint done = False
    try:
        while not done:
            with nogil:
                if w == NULL:
                    w = work_begin(r, runs, n)
                if w != NULL:
                    done = work_wait(w, SLICE_NS)
                else:
                    poll(NULL, 0, 5)        # all threads that may write are at it
            if not done:
                PyErr_CheckSignals()
            if not done and now_ns() > deadline:
                return 1
            if not done and runs != NULL and _hangs(r, &turn, &moved):   # a disk may sync for minutes
                return 2
        if err != NULL:
            err[0] = w.error
        return 0
    finally:
        if w != NULL:
            work_leave(w)


cdef int _wait_written(Region_t *r, uint64_t deadline) except -1:
    """Until nothing is under way that others began: 0, 1 or 2 as of write_back."""
    cdef uint32_t turn = 0
    cdef uint64_t moved = now_ns()
    cdef bint done = False
    while True:
        with nogil:
            done = wait_written(r, SLICE_NS)
        if done:
            return 0
        PyErr_CheckSignals()
        if now_ns() > deadline:
            return 1
        if _hangs(r, &turn, &moved):
            return 2


cdef bint _hangs(Region_t *r, uint32_t *turn, uint64_t *moved) noexcept:
    """Whether a native store has answered nothing for longer than the region's time."""
    cdef uint64_t now = now_ns()
    cdef uint32_t at = u32_load(&r.write_turn)
    if at != turn[0]:
        turn[0] = at
        moved[0] = now
    return not r.hosted and not r.wait_for_ever and now - moved[0] > r.timeout_ns + SECOND_NS / 2


cdef bint _any_dirty(Region_t *r, int64_t *pair, uint64_t n) noexcept:
    cdef uint64_t i
    with nogil:
        settle(r.engine)
        for i in range(n):
            if _next_dirty(r, <uint64_t>pair[2 * i], <uint64_t>pair[2 * i + 1]) < <uint64_t>pair[2 * i + 1]:
                return True
    return False


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


def lost(Region region not None, uint32_t most):
    """Up to `most` blocks that had left memory when a sync failed that was for them, too: [block, ...]."""
    cdef Region_t *r = _live(region)
    cdef uint64_t b = 0, last = 0
    cdef list found = []
    while r.sync_lost and len(found) < most and next_known(r, &b, &last):
        while b < last and len(found) < most:
            if u8_load(&r.spill[b]) & LOST:
                found.append(b)
            b += 1
    return found


def under_way(Region region not None, uint64_t first, uint64_t end, uint32_t most):
    """Up to `most` blocks of [first, end) whose bytes the store does not have, those first that it was given and has
    not answered for: [block, ...]."""
    cdef Region_t *r = _live(region)
    cdef uint64_t b, last
    cdef uint32_t word, turn
    cdef list found = []
    for turn in range(2):
        b, last = first, 0
        while b < end and len(found) < most and next_known(r, &b, &last):
            while b < last and b < end and len(found) < most:
                word = u32_load(&r.state[b])
                if (word & WRITING != 0) == (turn == 0) and (turn == 0 or is_dirty(word & STATE_MASK)):
                    found.append(b)
                b += 1
    return found
