# What Python sees of an image: Imager, which uffd/snapshot/ makes files with.
#
# Uses:     _snapshot.pxi, _image.pxi; foreign.py for what memory is
# Provides: Imager
#
# The file is the caller's: each range's bytes go to `fd` at the offset that it gave. What is not written is zero (or,
# in a series, as it was in the image before).

_left = []                                  # views of regions that a lost streamer may still be in


@no_gc_clear
cdef class Imager:
    """An image of ranges of memory at one instant. ranges: [(contiguous buffer, offset in the file), ...]; buffers that
    lie in regions are found by their address. memory_limit_bytes: for copies that wait for the disk. keep: what was
    saved stays protected, and `previous=` this one has the next write only what was written since.

    SnapshotError, ValueError, Unavailable: the memory can't be imaged, with the reason."""
    cdef Image_t *m
    cdef list views
    cdef list spans                         # (first address, address behind the last byte), as the caller's ranges
    cdef bint started
    cdef readonly bint keep

    def __init__(self, list ranges, int fd, *, memory_limit_bytes, bint keep=False, Imager previous=None):
        from . import foreign
        if self.m != NULL:
            raise ValueError("an Imager is used once")
        self.views = [memoryview(buffer) for buffer, _ in ranges]
        for view in self.views:
            if not view.contiguous:
                raise ValueError("an image is made of contiguous buffers")
        self.spans = [(a, a + view.nbytes) for a, view in zip([buffer_address(v) for v in self.views], self.views)]
        self.keep = keep
        offsets = [offset for _, offset in ranges]
        if previous is not None:
            self._take_over(previous)
        else:
            self._make(*_layout(self.spans, foreign))
        try:
            _set_parts(self.m, self.spans, offsets)
            _set_buffers(self.m, memory_limit_bytes)
        except BaseException:
            self.close()
            raise
        self.m.fd = fd
        self.m.keep = keep

    def _make(self, list spans, list regions):
        """spans: (start, end, filed); regions: (address in it, first block, end)."""
        cdef uint64_t blocks = 0, at = 0, span_blocks, i
        cdef uint64_t own = sum([end - first for _, first, end in regions])
        cdef uint64_t bytes_of_parts = len(self.spans) * sizeof(Part)
        cdef char *p
        cdef Image_t *m
        for start, end, _ in spans:
            blocks += (end - start + (1 << SAVE_SHIFT) - 1) >> SAVE_SHIFT
        at = (page_round(sizeof(Image_t)) + page_round(bytes_of_parts) + page_round(len(spans) * sizeof(Span))
              + page_round(len(regions) * sizeof(RegionPart)) + page_round(2 * (blocks + own)))
        m = <Image_t *>map_lazy(at, PROT_READ | PROT_WRITE, -1)
        if m == NULL:
            raise MemoryError("no address space for an image")
        self.m = m
        m.bytes = at
        m.uffd = -1
        m.stop_fd = -1
        m.pagemap = -1
        m.fd = -1
        m.pid = getpid()
        p = <char *>m + page_round(sizeof(Image_t))
        m.part = <Part *>p
        p += page_round(bytes_of_parts)
        m.span = <Span *>p
        p += page_round(len(spans) * sizeof(Span))
        m.region = <RegionPart *>p
        p += page_round(len(regions) * sizeof(RegionPart))
        m.state = <uint8_t *>p
        m.mine = m.state + blocks + own
        m.blocks = blocks
        at = 0
        for start, end, filed in spans:
            span_blocks = (end - start + (1 << SAVE_SHIFT) - 1) >> SAVE_SHIFT
            m.span[m.spans] = Span(start=start, end=end, first=at, blocks=span_blocks, filed=filed)
            m.spans += 1
            at += span_blocks
        for address, first, end in regions:
            _set_region(m, address, first, end, at)
            at += end - first

    def _take_over(self, Imager previous not None):
        """The next of a series has the protection, the threads and the states of the one before."""
        cdef uint64_t i
        if previous.m == NULL or not previous.keep or not u32_load(&previous.m.done) or previous.m.error:
            raise ValueError("the image before was not made with keep=True, is not done, or has failed")
        if previous.spans != self.spans or previous.m.pid != getpid():
            raise ValueError("the image before has other ranges, or is of another process")
        self.m = previous.m
        previous.m = NULL
        with nogil:
            gate_close(self.m)              # a fault thread that found a block unsaved may be on its way to the buffers
            u32_store_seq(&self.m.gate, GATE_OPEN)
            futex_wake_all(&self.m.gate)
        memset(self.m.mine, 0, _all_blocks(self.m))
        self.m.done = 0
        self.m.aborted = 0
        self.m.wanted = 0
        self.m.total_bytes = self.m.done_bytes = 0
        self.m.faults = self.m.copied_bytes = self.m.waits = self.m.streamed_bytes = 0

    def __dealloc__(self):
        self.close()

    cdef Image_t *_live(self) except NULL:
        if self.m == NULL:
            raise ValueError("the image is closed")
        if self.m.pid != getpid():
            from .errors import SnapshotError
            raise SnapshotError("an image can't be gone on with in a forked child")
        return self.m

    def start(self):
        """Protects everything: the instant. Writers wait for `pause_ns`, then for blocks that are not saved yet."""
        cdef Image_t *m = self._live()
        cdef int err = 0
        if self.started:
            raise ValueError("the image is started already")
        self.started = True
        with nogil:
            if u32_load(&m.threads) == 0:
                err = image_open(m)
            if err == 0:
                err = image_start(m)
        if err != 0:
            spans = self.spans
            with nogil:
                image_stop(m)
            self.close()
            from . import foreign
            raise foreign.refusal(-err, min([a for a, _ in spans]), max([b for _, b in spans]), "imaged")

    @property
    def instant_ns(self):
        return self._live().instant_ns

    @property
    def pause_ns(self):
        return self._live().pause_ns

    def wait(self, timeout_s=None):
        """True when all is written, False when the time was over first. OSError: the file could not be written;
        SnapshotError: tracking was lost, or it was aborted. Nothing is protected then. Ctrl-C interrupts it."""
        cdef Image_t *m = self._live()
        cdef uint64_t deadline = <uint64_t>-1, now
        if not self.started:
            raise ValueError("the image is not started")
        if timeout_s is not None:
            deadline = now_ns() + <uint64_t>(max(0.0, min(timeout_s, 1e9)) * 1e9)
        while not u32_load(&m.done):
            now = now_ns()
            if now >= deadline:
                return False
            with nogil:
                futex_wait(&m.done, 0, u64_min(SLICE_NS, deadline - now))
                image_give_up(m)
            PyErr_CheckSignals()
            m = self._live()
        self._check()
        return True

    cdef _check(self):
        from .errors import SnapshotError
        cdef Image_t *m = self.m
        if m.error and m.lost:
            raise SnapshotError(f"tracking lost: memory of the image was freed, dropped (madvise), moved or mapped "
                                f"anew before it was saved ({_os.strerror(-m.error)})")
        if m.error:
            raise OSError(-m.error, f"the image could not be written: {_os.strerror(-m.error)}")
        if m.aborted:
            raise SnapshotError("the image was aborted")

    def written_runs(self):
        """[(index of the range, start, stop), ...]: bytes of ranges that are in the file. What else there is of them is
        zero, or as it was in the image before."""
        cdef Image_t *m = self._live()
        cdef uint64_t i
        cdef list out = []
        for i in range(m.parts):
            _runs_of(m, &m.part[i], out)
        out.sort()
        return out

    def progress(self):
        """(bytes written, bytes in all)."""
        cdef Image_t *m = self._live()
        return min(u64_load(&m.done_bytes), m.total_bytes), m.total_bytes

    def abort(self):
        """Ends it: nothing is protected any more, nobody waits. Waits for a write to the file under way."""
        cdef Image_t *m = self._live()
        if u32_load(&m.done):
            return
        u32_store(&m.aborted, 1)
        image_ring(m)
        while u32_load(&m.streaming):
            with nogil:
                futex_wait(&m.streaming, 1, SLICE_NS)
                image_give_up(m)
            m = self._live()                # closed by another thread meanwhile

    def finish(self):
        """After it is done: protection goes, and the threads, unless it is kept for the next of a series."""
        cdef Image_t *m = self._live()
        if not u32_load(&m.done):
            raise ValueError("the image is not done")
        if not self.keep:
            with nogil:
                image_stop(m)

    def close(self):
        """Aborts what is under way, lifts all protection, lets go of the memory; idempotent. In a forked child it lets
        go of what the child has of it."""
        cdef Image_t *m = self.m
        self.m = NULL
        if m != NULL:
            with nogil:
                if m.pid == getpid():
                    image_stop(m)
                else:
                    image_forget(m)
                if m.aside != NULL:
                    munmap(m.aside, m.buffers)
            if u32_load(&m.filling) >= FILLING_GIVEN_UP:
                _left.append(self.views)    # their regions stay, for the function that hangs in one of them
            else:
                munmap(m, m.bytes)
        self.views = []

    def stats(self):
        cdef Image_t *m = self._live()
        return {"pause_ns": m.pause_ns, "faults": u64_load(&m.faults), "copied_aside_bytes": u64_load(&m.copied_bytes),
                "waits": u64_load(&m.waits), "bytes_streamed": u64_load(&m.streamed_bytes),
                "errors": 1 if m.error else 0}


def _layout(list spans, foreign):
    """What an image has to protect: ([(start, end, filed)] of memory that is not ours, whole pages, merged;
    [(an address of a region, first block, end)]). ValueError for memory that can't be imaged."""
    cdef Region_t *r
    cdef uint64_t start, end, first, stop
    regions, found = {}, []
    for a, b in spans:
        start = a
        end = b
        if start == end:
            continue
        r = region_at(start)
        if r == NULL:
            low, high = foreign.widened(a, b)
            found.append((low, high))
            continue
        first = (start - <uint64_t>r.base) >> r.shift
        stop = ((end - 1 - <uint64_t>r.base) >> r.shift) + 1
        base = <uint64_t>r.base
        region_release(r)
        before = regions.get(base, (first, stop))
        regions[base] = (min(before[0], first), max(before[1], stop))
    pieces = foreign.memory_of(min(found)[0], max([high for _, high in found])) if found else []
    merged = []
    for low, high in sorted(found):
        filed = foreign.imaged_shared(pieces, low, high)
        before = merged.pop() if merged else (low, low, filed)
        if low <= before[1] and before[2] == filed:
            merged.append((before[0], max(high, before[1]), filed))
        else:
            merged += [before, (low, high, filed)]
    return merged, [(base, first, stop) for base, (first, stop) in sorted(regions.items())]


cdef _set_region(Image_t *m, uint64_t address, uint64_t first, uint64_t end, uint64_t at):
    cdef RegionPart *p = &m.region[m.regions]
    p.r = region_at(address)
    if p.r == NULL:
        raise _closed()
    region_release(p.r)                     # the buffers that the image holds keep it open
    p.m = m
    p.first = first
    p.end = end
    p.at = at
    p.state = m.state + at
    p.mine = m.mine + at
    memset(p.state, UNSAVED, end - first)
    m.regions += 1


cdef uint64_t _all_blocks(Image_t *m):
    cdef uint64_t i, n = m.blocks
    for i in range(m.regions):
        n += m.region[i].end - m.region[i].first
    return n


cdef _set_parts(Image_t *m, list spans, list offsets):
    cdef uint64_t reach = 0
    m.parts = 0
    for (start, end), index in sorted(zip(spans, range(len(spans)))):
        if start == end:
            continue
        if not 0 <= offsets[index] <= (1 << 62):
            raise ValueError(f"offset {offsets[index]} in the file")
        reach = max(reach, end)
        m.part[m.parts] = Part(start=start, end=end, reach=reach, offset=offsets[index], index=index)
        m.parts += 1


cdef _set_buffers(Image_t *m, limit):
    """The streamer's buffer for a block of a region, and those aside, within the limit."""
    cdef uint64_t i, slot = 1 << SAVE_SHIFT, stream = 0, aside
    cdef char *p
    for i in range(m.regions):
        stream = max(stream, <uint64_t>1 << m.region[i].r.shift)
    slot = max(slot, stream)
    if limit < slot:
        raise ValueError(f"memory_limit_bytes is {limit}; an image of this memory needs {slot} or more")
    aside = min((limit - stream) // slot, 1 << 16)
    if m.aside != NULL:
        munmap(m.aside, m.buffers)
    m.buffers = page_round(aside * sizeof(Aside) + 1) + stream + aside * slot
    p = map_lazy(m.buffers, PROT_READ | PROT_WRITE, -1)
    m.aside = <Aside *>p
    if p == NULL:
        raise MemoryError("no address space for an image's buffers")
    m.asides = <uint32_t>aside
    m.slot_bytes = slot
    m.stream_bytes = p + page_round(aside * sizeof(Aside) + 1)
    m.aside_bytes = m.stream_bytes + stream


cdef _runs_of(Image_t *m, Part *part, list out):
    """The saved runs of one range."""
    cdef Span *p = span_at(m, part.start)
    cdef uint64_t i
    if p != NULL:
        _merged_runs(&m.mine[p.first], p.start, SAVE_SHIFT, part, out)
        return
    for i in range(m.regions):
        if <uint64_t>m.region[i].r.base <= part.start < <uint64_t>m.region[i].r.base + m.region[i].r.span:
            _merged_runs(m.region[i].mine, <uint64_t>m.region[i].r.base + (m.region[i].first << m.region[i].r.shift),
                         m.region[i].r.shift, part, out)


cdef _merged_runs(uint8_t *mine, uint64_t base, uint32_t shift, Part *part, list out):
    cdef uint64_t k = (part.start - base) >> shift, end = ((part.end - 1 - base) >> shift) + 1, run
    while k < end:
        run = k
        while k < end and mine[k] == 1:
            k += 1
        if k > run:
            out.append((part.index, max(part.start, base + (run << shift)) - part.start,
                        min(part.end, base + (k << shift)) - part.start))
        else:
            k += 1
