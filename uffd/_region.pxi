# What Python sees of a region: its memory as a buffer, its blocks, its prefetches, and how it ends.
#
# Uses:     _os_error and Engine of _api.pxi
# Provides: Region (memory, exported as a buffer), Job (a prefetch or populate), _live and _hold, the graveyard

@no_gc_clear                    # the engine must outlive the region, also in a cycle that is collected
cdef class Region:
    """Memory that the engine serves, exported as a writable (or read-only) buffer of bytes. The public uffd.Region
    holds one; so does every array, through the memoryview that is its base."""
    cdef Region_t *r
    cdef Engine engine
    cdef Filler filler
    cdef readonly Py_ssize_t exports
    cdef bint leaving
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]
    cdef object __weakref__

    def _open(self, Engine engine, Filler filler, uint64_t nbytes, uint64_t block_bytes, *, str name, str provider,
              bint shared, bint is_inline, bint writable, uint64_t readahead_bytes, bint wait_for_ever,
              uint32_t retries, uint64_t timeout_ns, bint writes_back, bint volatile_pages, bytes spill_folder,
              int memfd=-1):
        """Makes the memory. OSError or MemoryError, and then nothing is left."""
        cdef Region_t *r
        cdef int err
        _sweep()
        if engine.e == NULL or self.r != NULL:
            raise ValueError("the engine is closed" if self.r == NULL else "the region is open already")
        if known_way < 0:
            err = uffd_discover()
            if err != 0:
                raise _os_error(err, "no userfaultfd")
        r = <Region_t *>calloc(1, sizeof(Region_t))
        if r == NULL:
            raise MemoryError("no memory for a region")
        r.engine = engine.e
        r.fill = &filler.fill
        r.nbytes = nbytes
        r.shift = u64_log2(block_bytes)
        r.is_inline = is_inline
        r.writable = writable
        r.wait_for_ever = wait_for_ever
        r.retries = retries
        r.timeout_ns = timeout_ns
        r.ahead_blocks = readahead_bytes >> r.shift
        _copy_name(r.name, name)
        _copy_name(r.provider, provider)
        r.writes_back = writes_back
        r.volatile_pages = volatile_pages
        err = unpackers_make() if r.fill.packs else 0
        if err == 0:
            err = _prepare(r, shared, memfd)
        if err == 0 and writable:
            err = _prepare_spill(r, spill_folder)
        if err == 0:
            with nogil:
                err = region_make(r)
        if err != 0:
            if r.memfd >= 0:
                close(r.memfd)
            free(r.spills)
            free(r)
            raise _os_error(err, f"region {name!r} of {nbytes} bytes could not be made")
        self.engine = engine
        self.filler = filler
        self.r = r

    def __dealloc__(self):
        if self.r != NULL:
            _bury(self, BURY_NS)

    def _shut(self, uint64_t patience_ns=0):
        """Out of service; torn down now, or by the keeper when nobody has it in hand. True: gone already."""
        if self.r == NULL:
            return True
        return _bury(self, patience_ns)

    def _close(self, uint64_t patience_ns):
        """As _shut; BufferError while arrays live. No array can be made between the look and the end."""
        if self.exports:
            raise BufferError(f"region {self.r.name.decode('utf-8', 'replace')!r}: {self.exports} arrays are in use")
        return self._shut(patience_ns)

    def _shut_when_unused(self):
        """Now, or when the last array dies."""
        if self.exports == 0:
            self._shut(BURY_NS)
        else:
            self.leaving = True

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.r == NULL:
            raise _closed()
        if flags & 1 and not self.r.writable:
            raise BufferError("the region is read-only")
        self.shape[0] = <Py_ssize_t>self.r.nbytes
        self.strides[0] = 1
        buffer.buf = self.r.base
        buffer.obj = self
        buffer.len = <Py_ssize_t>self.r.nbytes
        buffer.itemsize = 1
        buffer.readonly = not self.r.writable
        buffer.ndim = 1
        buffer.format = b"B"
        buffer.shape = self.shape
        buffer.strides = self.strides
        buffer.suboffsets = NULL
        buffer.internal = NULL
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1
        if self.exports == 0 and self.leaving and self.r != NULL:
            _bury(self, BURY_NS)

    @property
    def closed(self):
        return self.r == NULL or self.leaving

    @property
    def gone(self):
        """Whether its memory is, too: a closed one that arrays still use is there until the last of them dies."""
        return self.r == NULL

    @property
    def address(self):
        return <uintptr_t>_live(self).base

    @property
    def block_count(self):
        return _live(self).blocks

    @property
    def tracked(self):
        """Whether dirty blocks are known exactly (the kernel has write protection for this memory)."""
        return bool(_live(self).protect) or not _live(self).writable

    def _memory_fd(self):
        """A descriptor of its own of the file that the region's pages are in; None where a touch could not map what
        another process put there."""
        cdef Region_t *r = _live(self)
        return _os.dup(r.memfd) if is_shared(r) and r.minor and not r.is_inline else None

    def _states(self):
        """One byte per block: its state. A snapshot without a lock; touches no managed page."""
        cdef Region_t *r = _live(self)
        cdef uint64_t b = 0, last = 0
        cdef bytes out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>r.blocks)
        cdef char *to = PyBytes_AsString(out)
        _hold(r)
        with nogil:
            memset(to, MISSING, r.blocks)
            settle(r.engine)
            while next_known(r, &b, &last):
                while b < last:
                    to[b] = <char>_seen(u32_load(&r.state[b]))
                    b += 1
            region_release(r)
        return out

    def _absent(self, runs):
        """Of block runs (an int64 buffer of pairs): the first block that is not resident and its state, or None."""
        cdef Py_buffer view
        cdef Region_t *r = _live(self)
        cdef int64_t *pair
        cdef uint64_t i, b
        cdef uint32_t state
        PyObject_GetBuffer(runs, &view, PyBUF_ANY_CONTIGUOUS)
        try:
            pair = <int64_t *>view.buf
            for i in range(<uint64_t>view.len // 16):
                for b in range(<uint64_t>pair[2 * i], <uint64_t>pair[2 * i + 1]):
                    state = u32_load(&r.state[b]) & STATE_MASK
                    if state != CLEAN and state != DIRTY and state != UNPROTECTING and state != COPYING:
                        return b, state
        finally:
            PyBuffer_Release(&view)
        return None

    def _wait_block(self, uint64_t b, uint64_t timeout_ns):
        """Sleeps while block b is busy, at most timeout_ns; releases the GIL."""
        cdef Region_t *r = _live(self)
        cdef uint32_t word = u32_load(&r.state[b])
        if is_busy(word & STATE_MASK):
            _hold(r)
            with nogil:
                wait_for_word(r, b, word, timeout_ns)
                region_release(r)

    def _make_writable(self, runs):
        """Lifts the write protection of the resident blocks of runs, as if they had been written: for a write by the
        kernel where its faults are not served."""
        cdef Region_t *r = _live(self)
        cdef Py_buffer view
        cdef int64_t *pair
        cdef uint64_t i, b, end
        cdef uint32_t n
        cdef Slot *s
        PyObject_GetBuffer(runs, &view, PyBUF_ANY_CONTIGUOUS)
        _hold(r)
        with nogil:
            pair = <int64_t *>view.buf
            s = inline_borrow(r.engine)
            for i in range(<uint64_t>view.len // 16):
                b = <uint64_t>pair[2 * i]
                end = <uint64_t>pair[2 * i + 1]
                while b < end:
                    if u32_load(&r.watched) and lift_whole(s, r, b):
                        b += 1
                        continue
                    n = lift_run(s, r, b, <uint32_t>(end - b if end - b < MAX_RUN else MAX_RUN))
                    b += n if n else 1
            inline_return(r.engine, s)
            region_release(r)
        PyBuffer_Release(&view)

    def _poison_of(self, uint64_t b):
        """(errno, tries, beyond repair) of a poisoned block, (0, 0, False) of any other."""
        cdef Region_t *r = _live(self)
        cdef uint32_t word = u32_load(&r.state[b])
        if word & STATE_MASK != POISONED:
            return 0, 0, False
        return errno_of(r, b), tries_of(r, b), word & DEAD != 0

    def _text_of(self, uint64_t b):
        """What a provider host said about the last failure of block b, or None."""
        cdef Text *t = text_of(_live(self), b)
        return None if t == NULL else t.text[:t.nbytes].decode("utf-8", "replace")

    def _counts(self):
        """(counters, stages): sums over the stripes. Stops nobody."""
        cdef Region_t *r = _live(self)
        _hold(r)
        with nogil:
            settle(r.engine)
        out = ([sum([r.counters[i].n[k] for i in range(STRIPES)]) for k in range(COUNTERS)],
                [[sum([r.counters[i].stage[h][k] for i in range(STRIPES)]) for k in range(BUCKETS)]
                 for h in range(STAGES)])
        region_release(r)
        return out

    def _post(self, runs, int kind):
        """Queues a prefetch or populate of block runs (a non-empty int64 buffer of pairs); a Job."""
        cdef Region_t *r = _live(self)
        cdef Py_buffer view
        cdef Job_t *j
        cdef Job job
        if r.engine.stopping:
            raise ValueError("the engine is closed")
        PyObject_GetBuffer(runs, &view, PyBUF_ANY_CONTIGUOUS)
        try:
            j = <Job_t *>calloc(1, sizeof(Job_t))
            if j != NULL:
                j.runs = <uint64_t *>malloc(<size_t>view.len)
            if j == NULL or j.runs == NULL:
                free(j)
                raise MemoryError("no memory for a prefetch")
            memcpy(j.runs, view.buf, <size_t>view.len)
            j.nruns = <uint64_t>view.len // 16
        finally:
            PyBuffer_Release(&view)
        j.block = j.runs[0]
        j.keeps = kind == PREFETCH and _bytes_of(j, r.shift) > u64_load(&r.engine.limit) / 8
        j.region_id = r.id
        j.kind = <uint32_t>kind
        j.refs = 1
        j.since_ns = now_ns()
        job = Job.__new__(Job)
        job.j = j
        job.engine = self.engine
        _hold(r)
        with nogil:
            job_post(r.engine, j)
            region_release(r)
        return job


cdef uint64_t _bytes_of(Job_t *j, uint32_t shift) noexcept:
    cdef uint64_t i, n = 0
    for i in range(j.nruns):
        n += j.runs[2 * i + 1] - j.runs[2 * i]
    return n << shift


cdef bint job_others(Job_t *j, uint64_t timeout_ns) noexcept nogil:
    """Whether none of a job's blocks is being filled by somebody else any more; waits a while."""
    cdef Region_t *r = region_acquire(j.region_id)
    cdef uint64_t i, b, now = now_ns(), deadline = now + timeout_ns
    cdef uint32_t word
    cdef bint none = True
    if r == NULL:
        return True
    for i in range(j.nruns):
        b = j.runs[2 * i]
        while b < j.runs[2 * i + 1] and none and not u32_load(&r.closing):
            word = u32_load(&r.state[b])
            if word & STATE_MASK != FILLING:
                b += 1
                continue
            now = now_ns()
            none = now < deadline
            if none:
                wait_for_word(r, b, word, deadline - now)
    region_release(r)
    return none


@no_gc_clear
cdef class Job:
    """A queued prefetch or populate."""
    cdef Job_t *j
    cdef Engine engine

    def __dealloc__(self):
        cdef Engine_t *e = self.engine.e
        if self.j == NULL:
            return
        if e != NULL:
            pthread_mutex_lock(&e.job_lock)
        job_release(self.j)
        if e != NULL:
            pthread_mutex_unlock(&e.job_lock)

    def done(self):
        return bool(u32_load(&self.j.done))

    @property
    def cancelled(self):
        return bool(u32_load(&self.j.cancelled))

    def cancel(self):
        """What is not begun is not filled; idempotent."""
        if self.engine.e != NULL and not u32_load(&self.j.done):
            with nogil:
                job_cancel(self.engine.e, self.j)

    def wait(self, timeout_ns=None):
        """True when done, False when the time was over first. Ctrl-C interrupts it."""
        cdef uint64_t deadline = 0, now = now_ns(), part
        cdef bint ended
        if timeout_ns is not None:
            deadline = now + <uint64_t>timeout_ns
        while not u32_load(&self.j.done):
            part = SLICE_NS
            if timeout_ns is not None:
                now = now_ns()
                if now >= deadline:
                    return False
                part = deadline - now if deadline - now < SLICE_NS else SLICE_NS
            with nogil:
                futex_wait(&self.j.done, 0, part)
            PyErr_CheckSignals()
        while not u32_load(&self.j.cancelled):
            with nogil:                     # what others had in hand was left to them
                ended = job_others(self.j, SLICE_NS if timeout_ns is None else u64_min(SLICE_NS, deadline - now_ns()))
            if ended:
                break
            PyErr_CheckSignals()
            if timeout_ns is not None and now_ns() >= deadline:
                return False
        return True

    @property
    def error(self):
        """(errno, block, tries) of the first block that failed, or None."""
        return (-self.j.error, self.j.error_block, self.j.tries) if self.j.error else None


cdef inline uint32_t _seen(uint32_t word) noexcept nogil:
    """A block's state as it is reported: what its store has not acknowledged yet is dirty."""
    if word & WRITING and word & STATE_MASK == CLEAN:
        return DIRTY
    if word & WRITING and word & STATE_MASK == POOLED:
        return POOLED_DIRTY
    return word & STATE_MASK


cdef int _prepare_spill(Region_t *r, bytes folder) except? -1000:
    cdef int i
    r.spills = <Spill_t *>calloc(1, sizeof(Spill_t))
    if r.spills == NULL:
        return -ENOMEM
    for i in range(<int>EPOCHS):
        r.spills.file[i] = -1
    _copy_path(r.spills.folder, folder)
    return 0


cdef int _prepare(Region_t *r, bint shared, int memfd) except? -1000:
    """The rest of a region's constant fields; memfd: to be taken over, -1 for a new one. 0 or -errno."""
    r.span = page_round(r.nbytes)
    r.blocks = (r.span + (<uint64_t>1 << r.shift) - 1) >> r.shift
    r.fd = -1
    r.memfd = -1
    r.poison = has(UF_FEATURE_POISON)
    r.zeropage = True
    r.credit = CREDIT
    r.nested = r.fill.kind == FILL_DIRECT and region_overlaps(<uint64_t>r.fill.direct, r.nbytes)
    r.hosted = r.fill.kind == FILL_HOST
    r.slow = r.fill.may_block or r.nested
    r.odd_block = r.blocks
    r.kernel_faults = not r.is_inline and known_way != UF_WAY_USER
    if shared:
        r.protect = r.writable and has(UF_FEATURE_WP_HUGETLBFS_SHMEM)
    else:
        r.guard = not r.writable and has(UF_FEATURE_WP) and has(UF_FEATURE_MOVE)
        r.protect = (r.writable or r.guard) and has(UF_FEATURE_WP)
        r.moves = (r.writable or r.guard) and has(UF_FEATURE_MOVE)
    for i in range(HISTORY):
        r.history[i] = -(<int64_t>1 << 62)
    if shared:
        r.minor = has(UF_FEATURE_MINOR_SHMEM)
        r.memfd = sys_memfd(b"uffd") if memfd < 0 else memfd
        return r.memfd if r.memfd < 0 else 0
    return 0


def base_at(uint64_t address):
    """The address of the region that holds an address, or None."""
    cdef Region_t *r = region_at(address)
    if r == NULL:
        return None
    base = <uintptr_t>r.base
    region_release(r)
    return base


cdef object _closed():
    from .errors import RegionClosed
    return RegionClosed("the region is closed")


cdef Region_t *_live(Region region) except NULL:
    if region.r == NULL:
        raise _closed()
    return region.r


cdef void _hold(Region_t *r):
    """Before the GIL is let go: another thread may close the region then. region_release when done."""
    u32_add_seq(&r.refs, 1)


cdef bint _bury(Region region, uint64_t patience_ns):
    """Shuts a region down; what it needs stays alive until the keeper is done with it."""
    cdef Region_t *r = region.r
    cdef int left
    cdef Grave grave
    cdef Engine engine = region.engine      # a closed region that is still referenced keeps nothing else
    cdef Filler filler = region.filler
    region.r = NULL
    region.engine = None
    region.filler = None
    with nogil:
        if r.writes_back:
            settle(r.engine)                # the last write may have been let go a moment before its block is DIRTY
        # Once the interpreter ends, a provider's memory goes with it; the exit has flushed all that was written before.
        r.flush_at_end = (not u32_load(&finalizing) and r.writes_back
                          and (u32_load(&r.unsynced) or count_dirty(r) != 0))
        left = region_shut(r, patience_ns)
    if left == 0 and u32_load(&r.stuck) == 0 and u32_load(&r.refs) == 0:
        free(r)
        return True
    grave = Grave()
    grave.r = r
    grave.engine = engine
    grave.filler = filler
    graveyard.append(grave)
    return False


@no_gc_clear
cdef class Grave:
    """What a closed region in somebody's hands still needs."""
    cdef Region_t *r
    cdef Engine engine
    cdef Filler filler


def _sweep():
    """Lets go of what closed regions needed, once they are gone. One with a fill that hangs for ever is kept."""
    cdef Grave g
    for g in list(graveyard):
        if u32_load(&g.r.gone) and u32_load(&g.r.stuck) == 0 and u32_load(&g.r.refs) == 0:
            graveyard.remove(g)
            if g.r.flush_error:
                _tell_unflushed(g.r)
            free(g.r)
    return len(graveyard)


def wait_for_graves():
    """Waits until regions whose last array died are flushed, each for its timeout_s at the most, and tells of those
    that could not be. For the end of the process."""
    cdef Grave g
    cdef uint64_t deadline
    for g in list(graveyard):
        deadline = now_ns() + g.r.timeout_ns if g in graveyard else 0
        # In a forked child nobody ends the parent's: its engines have none that are dying.
        while (g in graveyard and u32_load(&g.r.flush_at_end) == 1 and g.r.engine.dying != NULL
               and now_ns() < deadline):
            with nogil:
                poll(NULL, 0, 1)
        if g in graveyard and u32_load(&g.r.flush_at_end) == 2 and g.r.flush_error:
            _tell_unflushed(g.r)
            g.r.flush_error = 0


cdef _tell_unflushed(Region_t *r):
    """A region whose last array died could not be flushed: nobody is there to be raised at."""
    from .errors import ProviderError
    name, number, left = r.name.decode("utf-8", "replace"), -r.flush_error, r.flush_left
    error = ProviderError(number, f"region {name!r}: {left} blocks could not be written back when its last array died, "
                          f"and are lost: {_os.strerror(number)}", region=name, offset=0, nbytes=r.nbytes,
                          tries=r.retries + 1)
    PyErr_SetObject(type(error), error)
    PyErr_WriteUnraisable("the flush of a uffd region whose last array died")


cdef int _sweep_pending(void *unused) noexcept:
    """Run by the interpreter in its main thread, at the keeper's request (Py_AddPendingCall needs no GIL)."""
    _sweep()
    return 0


def _finalize():
    u32_store(&finalizing, 1)
