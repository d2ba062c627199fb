# Migration as Python sees it: one side's core, with its threads.
#
# Uses:     _wire.pxi, _wiresend.pxi; _live of _region.pxi
# Provides: Wire

from cpython.ref cimport Py_INCREF


cdef class Wire:
    """One side of a migration: `rules` of migrate/_states.py, and the memory: a Region, or a contiguous buffer of bytes
    (source only). It holds no reference to either; who made it does. All that blocks lets the interpreter go."""
    cdef Wire_t *w

    def __cinit__(self, bint source, bytes rules, memory, uint32_t block_bytes):
        cdef Wire_t *w
        cdef uint32_t i
        if len(rules) != PHASES * EVENTS or len(memory) > WIRE_PARTS:
            raise ValueError(f"{len(memory)} arrays, {len(rules)} bytes of rules")
        w = <Wire_t *>calloc(1, sizeof(Wire_t))
        if w == NULL:
            raise MemoryError("no memory for a migration")
        self.w = w
        w.refs = 1
        w.source = source
        w.push_fd = -1
        w.ask_fd = -1
        w.peer_fd = -1
        w.guard_fd = -1
        w.guard_wake = -1
        w.gate_fd = -1
        memcpy(w.rules, <const char *>rules, PHASES * EVENTS)
        pthread_mutex_init(&w.lock, NULL)
        pthread_mutex_init(&w.send_lock, NULL)
        pthread_mutex_init(&w.guard_lock, NULL)
        w.part = <Part_t *>calloc(len(memory) + 1, sizeof(Part_t))
        if w.part == NULL:
            raise MemoryError("no memory for a migration")
        for i in range(<uint32_t>len(memory)):
            w.nparts += 1
            _make_part(w, &w.part[i], memory[i], block_bytes)

    def __dealloc__(self):
        if self.w != NULL:
            if self.w.source and self.w.threads == 0 and not u32_load(&self.w.frozen):
                _detach(self.w)             # a region must not refer to what is gone
            _unlist(self.w)
            wire_release(self.w)

    def listen(self, bytes name, int gate_fd):
        """Destination: where new connections of this migration come from. Before start."""
        if len(name) != 32:
            raise ValueError(f"a migration's name has 32 bytes, not {len(name)}")
        memcpy(self.w.name, <const char *>name, 32)
        self.w.gate_fd = gate_fd

    def start(self, bint release=False):
        """Registers what memory is not ours, and starts the threads. OSError."""
        cdef int err
        cdef bint ok
        cdef Wire_t *w = self.w
        w.release = release
        _list(w)
        if w.source:
            err = _guard(w)
            if err != 0:
                raise _os_error(err, "memory can't be watched for writes")
            ok = wire_start(w, &push_main, b"uffd-push") and wire_start(w, &answer_main, b"uffd-answer")
            ok = ok and (w.guard_fd < 0 or wire_start(w, &guard_main, b"uffd-guard"))
        else:
            ok = wire_start(w, &receive_push_main, b"uffd-receive") and wire_start(w, &receive_ask_main, b"uffd-asks")
            ok = ok and (w.gate_fd < 0 or wire_start(w, &gate_main, b"uffd-gate"))
        if not ok:
            raise _os_error(-EAGAIN, "no thread for a migration")

    def pack(self):
        """Blocks go, or come, compressed by zstd where that makes them smaller. Before start. OSError."""
        load_codec()
        self.w.packs = True

    def passes(self, uint32_t part):
        """The part's file is shared by both sides. Before start."""
        self.w.part[part].passed = True

    def opens(self, uint32_t part):
        """The destination has opened the part's provider by itself. Before start."""
        self.w.part[part].opened = True

    def watch(self, int pidfd):
        """The other side's process, on this machine: taken over. When it is dead there is a verdict at once. Before
        start."""
        self.w.peer_fd = pidfd

    def keep(self, memory):
        """Source: nobody ever frees `memory`, nor this: its writers are stopped, and who frees memory may write to it,
        the interpreter at its end among them."""
        Py_INCREF(memory)
        Py_INCREF(self)

    def limit(self, uint64_t precopy, uint64_t push):
        """Bytes per second; 0: none."""
        self.w.rate[0] = precopy
        self.w.rate[1] = push

    def attach(self, int push_fd, int ask_fd):
        """Takes two connected sockets over, at first or after others broke. BlockingIOError: there are some."""
        cdef int err
        with nogil:
            err = wire_attach(self.w, push_fd, ask_fd)
        if err != 0:
            raise _os_error(err, "the migration has a connection")

    def round(self):
        """Source: begins a round of precopy, of all or of what was written since the last; the blocks to be sent."""
        cdef Wire_t *w = self.w
        cdef uint64_t found = 0
        cdef int err
        cdef bint first = w.rounds == 0
        with nogil:
            err = source_arm(w)
            if err == 0 and not first:
                err = each_part(w, False, False, &found)
            stored_look(w)
        if err != 0:
            raise _os_error(err, "writes can't be seen")
        w.rounds += 1
        u32_store(&w.round, 1)
        wire_tell(w)
        return found if not first else sum([w.part[i].blocks for i in range(w.nparts)])

    def round_ends(self, timeout_ns=None):
        """Waits until the round was sent and is there, or the connection is gone, or the time is over: then False."""
        cdef Wire_t *w = self.w
        cdef uint64_t deadline = _deadline(timeout_ns)
        cdef uint32_t turn
        while True:
            turn = u32_load(&w.turn)
            if not u32_load(&w.round) or u32_load(&w.phase) > PH_PRECOPY:
                return True
            if now_ns() >= deadline:
                return False
            with nogil:
                futex_wait(&w.turn, turn, SLICE_NS)
            PyErr_CheckSignals()

    def dirty_blocks(self):
        """Source: blocks written since the last round began."""
        cdef uint64_t n = 0, k
        cdef uint32_t i
        for i in range(self.w.nparts):
            for k in range((self.w.part[i].blocks + 63) / 64):
                n += u64_count(u64_load(&self.w.part[i].dirty[k]))
        return n

    def switchover(self, bytes state, uint64_t timeout_ns, bint kill):
        """Source: hands over. 0, or -errno; the phase says who has the memory then."""
        cdef Wire_t *w = self.w
        cdef const char *data = state
        cdef uint64_t nbytes = <uint64_t>len(state), deadline = now_ns() + timeout_ns
        cdef int err
        if nbytes > WIRE_STATE:
            raise ValueError(f"state: {nbytes} bytes, more than the {WIRE_STATE} that may travel")
        w.kill = kill
        with nogil:
            err = source_switchover(w, data, nbytes, deadline)
        return err

    @property
    def phase(self):
        return u32_load(&self.w.phase)

    def wait_phase(self, uint32_t old, timeout_ns=None):
        """Waits until the phase is not `old` any more, or the time is over; the phase."""
        cdef Wire_t *w = self.w
        cdef uint64_t deadline = _deadline(timeout_ns), now
        while u32_load(&w.phase) == old:
            now = now_ns()
            if now >= deadline:
                break
            with nogil:
                futex_wait(&w.phase, old, u64_min(deadline - now, SLICE_NS))
            PyErr_CheckSignals()
        return u32_load(&w.phase)

    def pause(self, int number=0):
        """Breaks the connection, if there is one."""
        cdef Wire_t *w = self.w
        with nogil:
            wire_break(w, u32_load(&w.epoch), -number)

    def cancel(self):
        """Before the hand-over: both sides give it up, and the source's writers go on. False: it is too late."""
        cdef Wire_t *w = self.w
        cdef bint done
        with nogil:
            done = wire_step(w, EV_CANCEL)
            if done:
                if u32_load(&w.connected):
                    wire_say(w, W_CANCEL if w.source else W_GAVE_UP, 0, 0, 0, 0, NULL, 0)
                if w.source:
                    source_thaw(w)
        return bool(done)

    def lose(self, int number):
        """The other side is given up for dead: what has yet to come fails at its touch, with that errno. False: there
        is nothing to lose any more."""
        cdef Wire_t *w = self.w
        cdef bint done
        with nogil:
            done = give_verdict(w, number)  # first: until then COMMIT may be read, and this side run
            if done and u32_load(&w.connected):
                wire_say(w, W_LOST if w.source else W_GAVE_UP if u32_load(&w.phase) == PH_FAILED_SOURCE else W_ENDED,
                         0, 0, 0, 0, NULL, 0)
            if done and w.source and u32_load(&w.phase) == PH_FAILED_SOURCE:
                source_thaw(w)
        return bool(done)

    def end(self):
        """Ends the threads and closes the sockets. Memory that was handed over stays protected at the source; that of
        a destination stays what it is: what never came fails."""
        cdef Wire_t *w = self.w
        cdef uint32_t n, keep = 0
        cdef uint64_t deadline = now_ns() + 10 * SECOND_NS
        cdef bint ours
        if not w.source:
            _unlist(w)
        with nogil:
            while u32_load(&w.phase) >= PH_COMPLETED and u32_load(&w.connected):
                if now_ns() > deadline - 8 * SECOND_NS:
                    break
                n = u32_load(&w.turn)
                if u32_load(&w.connected):  # who heard how it ended closes: closed from here, that might be lost
                    futex_wait(&w.turn, n, SLICE_NS)
            ours = w.source and u32_load(&w.frozen) == 0
            if w.source and not ours and w.guard_fd >= 0:
                keep = 1                    # writers still wait there, or are to be told
            if not keep:
                u32_store(&w.ending, 1)
                if w.guard_wake >= 0:
                    eventfd_raise(w.guard_wake)
            else:
                u32_store(&w.ending, 1)
            wire_break(w, u32_load(&w.epoch), -ENOTCONN)
            wire_tell(w)
            while True:
                n = u32_load(&w.threads)
                if n <= keep or now_ns() > deadline:
                    break
                futex_wait(&w.threads, n, SLICE_NS)
            if ours:
                _unlist(w)
                _detach(w)
            elif w.source:
                u32_add(&w.refs, 1)         # regions whose writers are stopped refer to it, to the end of the process
        return n <= keep

    @property
    def state(self):
        """Destination: what travelled at the switchover."""
        return self.w.state[:self.w.state_bytes] if self.w.state != NULL else b""

    @property
    def connected(self):
        return bool(u32_load(&self.w.connected))

    @property
    def left(self):
        """Blocks that have yet to come (destination), or to be sent (source)."""
        cdef uint64_t n = 0, k
        cdef uint32_t i
        if not self.w.source:
            return u64_load(&self.w.left)
        for i in range(self.w.nparts):
            for k in range((self.w.part[i].blocks + 63) / 64):
                n += u64_count(u64_load(&self.w.part[i].todo[k]))
        return n

    @property
    def last_error(self):
        return -self.w.last_error

    def figures(self):
        """What was counted, as plain numbers."""
        cdef Wire_t *w = self.w
        names = ("precopy", "pushed", "requested", "zero", "doubled", "released")
        return {"bytes": {names[i]: w.bytes[i] for i in range(M_KINDS)},
                "blocks": {names[i]: w.blocks[i] for i in range(M_KINDS)},
                "rounds": w.rounds, "bytes_wire": w.wired, "bytes_passed": w.passed, "bytes_opened": w.opened,
                "latency": [w.latency[i] for i in range(BUCKETS)],
                "latency_max_ns": w.latency_max_ns, "blocked_ns": w.blocked_ns, "asked": w.asked,
                "blocked_by_thread_ns": {w.waiter[i].tid: w.waiter[i].ns for i in range(WIRE_WAITERS)
                                         if w.waiter[i].tid},
                "stopped_ns": w.stopped_ns, "resumed_ns": w.resumed_ns, "left": self.left,
                "moments": [(w.moment[i].at_ns, w.moment[i].phase, w.moment[i].left) for i in range(w.moments)]}


cdef void _list(Wire_t *w) noexcept:
    global wires
    """It is among those that a keeper looks at: that of the first region. Without one, its guard does."""
    cdef uint32_t i
    cdef Region_t *r
    for i in range(w.nparts):
        r = region_acquire(w.part[i].region_id) if w.part[i].region_id and w.engine == NULL else NULL
        if r != NULL:
            w.engine = r.engine
            region_release(r)
    if w.engine == NULL:
        return
    pthread_mutex_lock(&registry_lock)
    w.next = wires
    wires = w
    pthread_mutex_unlock(&registry_lock)


cdef void _unlist(Wire_t *w) noexcept nogil:
    cdef Wire_t **at = &wires
    pthread_mutex_lock(&registry_lock)
    while at[0] != NULL and at[0] != w:
        at = &at[0].next
    if at[0] != NULL:
        at[0] = w.next
    pthread_mutex_unlock(&registry_lock)


cdef uint64_t _deadline(timeout_ns) except? 0:
    return <uint64_t>-1 if timeout_ns is None else now_ns() + <uint64_t>timeout_ns


cdef int _make_part(Wire_t *w, Part_t *p, memory, uint32_t block_bytes) except -1:
    cdef Region region
    cdef Py_buffer view
    cdef uint64_t i, words
    p.wire = w
    if isinstance(memory, Region):
        region = memory
        p.nbytes = _live(region).nbytes
        p.shift = region.r.shift
        p.region_id = region.r.id
    else:
        PyObject_GetBuffer(memory, &view, PyBUF_ANY_CONTIGUOUS)
        p.nbytes = <uint64_t>view.len
        p.base = <char *>view.buf
        PyBuffer_Release(&view)
        p.shift = u64_log2(block_bytes)
    p.blocks = (p.nbytes + (<uint64_t>1 << p.shift) - 1) >> p.shift
    p.todo = <uint64_t *>map_lazy(4 * bits_bytes(p.blocks), PROT_READ | PROT_WRITE, -1)
    if p.todo == NULL:
        raise MemoryError("no memory for a migration")
    words = bits_bytes(p.blocks) / 8
    p.dirty = p.todo + words
    p.there = p.dirty + words
    p.stored = p.there + words
    for i in range(p.blocks / 64):
        p.todo[i] = ~<uint64_t>0
    if p.blocks & 63:
        p.todo[p.blocks / 64] = (<uint64_t>1 << (p.blocks & 63)) - 1
    w.left += p.blocks if not w.source else 0
    if p.region_id:
        if region.r.part != NULL and not (w.source and _has_come(region.r.part)):
            raise ValueError("the region is being migrated")
        p.before = region.r.part
        if w.source and region.r.writable and not region.r.protect and not region.r.minor:
            raise _os_error(-ENOTSUP, "this kernel can't write-protect the region's memory")
        region.r.part = p
        if not w.source:
            u32_add(&w.refs, 1)             # dropped by region_unmap
    else:
        p.edge[0] = map_lazy(2 << p.shift, PROT_READ | PROT_WRITE, -1)
        if p.edge[0] == NULL:
            raise MemoryError("no memory for a migration")
        p.edge[1] = p.edge[0] + (<uint64_t>1 << p.shift)
        _find_guarded(p)
    return 0


cdef bint _has_come(Part_t *p) noexcept:
    return not p.wire.source and u32_load(&p.wire.phase) == PH_COMPLETED


cdef void _find_guarded(Part_t *p) noexcept:
    """The pages that are the array's alone: all that it touches where malloc has mapped it by itself (its header is in
    front of it then, and tells a whole number of pages that hold just this), else those within it."""
    cdef uint64_t start = <uint64_t>p.base, end = start + p.nbytes, chunk
    if start & (PAGE - 1) == 16:
        chunk = (<uint64_t *>(p.base - 8))[0]
        if chunk & (PAGE - 1) == 2 and end <= start - 16 + chunk - 2 < end + 2 * PAGE:     # 2: mapped by itself
            p.guarded = start - 16
            p.guarded_bytes = chunk - 2
            p.whole = True
            return
    p.guarded = page_round(start)
    p.guarded_bytes = end & ~(PAGE - 1)
    p.guarded_bytes = p.guarded_bytes - p.guarded if p.guarded_bytes > p.guarded else 0


cdef int _guard(Wire_t *w) noexcept:
    """A userfaultfd over the memory that is not ours. 0 or -errno."""
    cdef uint64_t want = UF_FEATURE_WP, ioctls = 0
    cdef uint32_t i
    cdef int err = 0
    cdef bint any = False
    for i in range(w.nparts):
        any = any or w.part[i].guarded_bytes != 0
    if not any:
        return 0
    if known_way < 0:
        err = uffd_discover()
    if err == 0 and (known_way == UF_WAY_USER or not has(UF_FEATURE_WP)):
        err = -ENOTSUP                      # the program's own system calls would fail there
    if err != 0:
        return err
    if w.release and not has(UF_FEATURE_POISON):
        return -ENOTSUP                     # what is gone would read as zeros
    want |= UF_FEATURE_POISON if w.release else 0
    if has(UF_FEATURE_WP_UNPOPULATED):
        want |= UF_FEATURE_WP_UNPOPULATED
    w.guard_fd = uf_open(known_way)
    w.guard_wake = sys_eventfd()
    if w.guard_fd < 0 or w.guard_wake < 0:
        return w.guard_fd if w.guard_fd < 0 else w.guard_wake
    err = uf_api(w.guard_fd, &want, &ioctls)
    for i in range(w.nparts):
        if err == 0 and w.part[i].guarded_bytes:
            if not has(UF_FEATURE_WP_UNPOPULATED):
                madvise(<void *>w.part[i].guarded, w.part[i].guarded_bytes, 22)   # MADV_POPULATE_READ
            err = uf_register(w.guard_fd, w.part[i].guarded, w.part[i].guarded_bytes, UF_REGISTER_WP, &ioctls)
    return err


cdef void _detach(Wire_t *w) noexcept nogil:
    """The source keeps its memory: nobody watches it any more."""
    cdef uint32_t i
    cdef Region_t *r
    for i in range(w.nparts):
        r = region_acquire(w.part[i].region_id) if w.part[i].region_id else NULL
        if r == NULL:
            continue
        if r.part == &w.part[i]:
            r.part = w.part[i].before
        settle(r.engine)                    # who was about to mark a block in it has done so
        region_release(r)
    if w.guard_fd >= 0:
        close(w.guard_fd)                   # lets memory that is not ours be as it was
        w.guard_fd = -1


def wire_want(Region region, runs):
    """Asks for the blocks of runs (an int64 buffer of pairs) that a migration has yet to bring, and waits for one of
    them, at most 100 ms. Whether any has yet to come; never of those that never will."""
    cdef Region_t *r = _live(region)
    cdef Py_buffer view
    cdef int64_t *pair
    cdef uint64_t i, b, last = 0
    cdef bint any = False
    if r.part == NULL or r.part.wire.source:
        return False
    PyObject_GetBuffer(runs, &view, PyBUF_ANY_CONTIGUOUS)
    _hold(r)
    with nogil:
        pair = <int64_t *>view.buf
        for i in range(<uint64_t>view.len // 16):
            b = wire_next_bit(r.part.todo, <uint64_t>pair[2 * i], <uint64_t>pair[2 * i + 1])
            while b < <uint64_t>pair[2 * i + 1] and not u32_load(&r.part.wire.verdict):
                any = True
                last = b
                ask_for(r.part, b)
                b = wire_next_bit(r.part.todo, b + 1, <uint64_t>pair[2 * i + 1])
        if any:
            wait_for_word(r, last, u32_load(&r.state[last]), SLICE_NS)
        region_release(r)
    PyBuffer_Release(&view)
    PyErr_CheckSignals()
    return bool(any)
