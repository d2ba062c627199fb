# Images of memory on disk: a forked child that writes one, checksums of what was written, and the order of touches.
#
# Uses:     _imagefile.h; region_at of _inline.pxi; states of _data.pxi
# Provides: ForkedImage, image_sums, image_sum, write_out, record_touches, touches; touched_note for _fill.pxi
#
# The child of a program with threads may run nothing but this: no Python (somebody may have held its lock), no malloc
# of ours. It reads memory by touching it, so that regions serve themselves there, copies it to a buffer that was mapped
# before, and writes that.

cdef extern from "_imagefile.h" nogil:
    ctypedef struct sigset_t:
        pass
    int c_image_sums "image_sums"(int fd, uint64_t data_offset, uint64_t data_bytes, uint64_t seed,
                                  uint64_t *sum) noexcept
    uint64_t c_image_sum "image_sum"(uint64_t seed, uint64_t unit, const uint8_t *bytes, size_t nbytes) noexcept
    int forked_there(int pagemap, uint64_t address, uint64_t page, uint64_t n, uint8_t *there) noexcept
    int forked_pagemap() noexcept
    void forked_close_others(int fd) noexcept
    void forked_signals_off(sigset_t *before) noexcept
    void forked_signals_back(const sigset_t *before) noexcept
    int fork() noexcept

cdef enum:
    FORKED_PAGES = 256           # of one step of the child: the size of its buffer

cdef struct ForkedRange:         # memory, and where in the file it goes
    uint64_t address
    uint64_t nbytes
    uint64_t file_at

cdef struct ForkedJob:           # shared by parent and child; the child writes it
    uint32_t finished           # 1: all of it is written, or `error` says why not
    int32_t error
    uint64_t done               # bytes looked at
    uint64_t total
    int parent
    int fd
    uint64_t count              # of ranges, which follow; behind them a byte per page of theirs: whether it was written
    uint8_t *written
    char *buffer
    ForkedRange range[1]


cdef uint64_t forked_range_pages(const ForkedRange *area) noexcept nogil:
    return (area.address + area.nbytes + PAGE - 1) / PAGE - area.address / PAGE


cdef void forked_child(ForkedJob *job) noexcept nogil:
    """All that the child does."""
    cdef uint64_t i
    cdef uint8_t *written = job.written
    cdef int pagemap = -1
    if engines == NULL:
        forked_close_others(job.fd)          # with engines, their threads here need theirs
    pagemap = forked_pagemap()
    for i in range(job.count):
        if job.error == 0:
            job.error = forked_range(job, &job.range[i], pagemap, written)
        written += forked_range_pages(&job.range[i])
    u32_store(&job.finished, 1)
    end_process(0)


cdef int forked_range(ForkedJob *job, const ForkedRange *area, int pagemap, uint8_t *written) noexcept nogil:
    """One array, page by page: what was never written stays a hole of the file."""
    cdef uint64_t at = area.address / PAGE * PAGE, end = area.address + area.nbytes, n, i
    cdef Region_t *r = region_at(area.address)
    cdef uint8_t there[512]
    cdef int err = 0
    while at < end and err == 0:
        n = u64_min((end - at + PAGE - 1) / PAGE, FORKED_PAGES)
        memset(there, 1, n)
        if r != NULL:
            for i in range(n):
                there[i] = not forked_skips(r, at + i * PAGE)
        elif pagemap >= 0:
            err = forked_there(pagemap, at, PAGE, n, there)
        if err == 0:
            err = forked_pages(job, area, at, n, there, r != NULL)
        memcpy(written, there, n)
        written += n
        at += n * PAGE
        u64_add(&job.done, n * PAGE)
        if getppid() != job.parent:
            end_process(1)                  # nobody wants it any more
    if r != NULL:
        region_release(r)
    return err


cdef int forked_pages(ForkedJob *job, const ForkedRange *area, uint64_t at, uint64_t n, const uint8_t *there,
                      bint touched) noexcept nogil:
    """Writes the runs of pages that are there. Those of regions, which serve themselves at a touch, and what write()
    can't read by itself (others' userfaultfds) are copied first."""
    cdef uint64_t i = 0, first, low, high
    cdef int err = -EFAULT
    while i < n:
        first = i
        while i < n and there[i]:
            i += 1
        low = u64_max(at + first * PAGE, area.address)
        high = u64_min(at + i * PAGE, area.address + area.nbytes)
        if i > first and high > low:
            if not touched:
                err = pwrite_all(job.fd, <const char *>low, high - low, area.file_at + (low - area.address))
            if touched or err == -EFAULT:
                memcpy(job.buffer, <const void *>low, high - low)
                err = pwrite_all(job.fd, job.buffer, high - low, area.file_at + (low - area.address))
            if err != 0:
                return err
        i += 1
    return 0


cdef bint forked_skips(Region_t *r, uint64_t address) noexcept nogil:
    """Whether a page of a region is zeros that nobody stored, so that it need not be filled to be known."""
    cdef uint64_t b = (address - <uint64_t>r.base) >> r.shift
    cdef uint32_t word
    if r.fill.kind != FILL_ZERO or address < <uint64_t>r.base or b >= r.blocks:
        return False
    word = u32_load(&r.state[b])
    return word & STATE_MASK == MISSING and word & (SPILLED | FROM_PARENT | KEPT) == 0


cdef class ForkedImage:
    """A child of this process that writes its memory, as it was at the fork, into a file.

    ranges: an int64 buffer of (address, bytes, offset in the file); they must be mapped until the constructor is back.
    Any thread may call; the interpreter lock is not held over the fork, and the child never wants it."""
    cdef ForkedJob *job
    cdef uint64_t nbytes
    cdef uint64_t pages
    cdef int pid
    cdef int pidfd
    cdef int status
    cdef bint reaped
    cdef readonly uint64_t instant_ns
    cdef readonly uint64_t pause_ns

    def __cinit__(self, ranges, int fd):
        cdef Py_buffer view
        cdef uint64_t i, head
        cdef ForkedRange *range_
        self.pidfd = -1
        self.pid = -1
        PyObject_GetBuffer(ranges, &view, PyBUF_ANY_CONTIGUOUS)
        try:
            range_ = <ForkedRange *>view.buf
            head = page_round(sizeof(ForkedJob) + <uint64_t>view.len)
            for i in range(<uint64_t>view.len // sizeof(ForkedRange)):
                self.pages += forked_range_pages(&range_[i])
            self.nbytes = head + page_round(self.pages) + FORKED_PAGES * PAGE
            self.job = <ForkedJob *>mmap(NULL, self.nbytes, PROT_READ | PROT_WRITE,
                                        MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
            if self.job == MAP_FAILED:
                self.job = NULL
                raise MemoryError("no memory for what a forked child says of its image")
            memcpy(self.job.range, view.buf, <size_t>view.len)
            self.job.count = <uint64_t>view.len // sizeof(ForkedRange)
        finally:
            PyBuffer_Release(&view)
        self.job.total = self.pages * PAGE
        self.job.written = <uint8_t *>self.job + head
        self.job.buffer = <char *>self.job + head + page_round(self.pages)
        self.job.fd = fd
        self._start()

    cdef int _start(self) except -1:
        cdef int pid
        cdef sigset_t before
        self.job.parent = getpid()
        with nogil:
            forked_signals_off(&before)
            self.instant_ns = now_ns()
            pid = fork()
            if pid == 0:
                forked_child(self.job)
            self.pause_ns = now_ns() - self.instant_ns
            self.instant_ns += self.pause_ns            # other threads' writes count up to the end of the fork
            forked_signals_back(&before)
        if pid < 0:
            raise _os_error(-errno, "no child to write the image")
        self.pid = pid
        self.pidfd = sys_pidfd(pid)
        return 0

    def wait(self, uint64_t timeout_ns):
        """Whether the child has ended; releases the interpreter lock for so long at the most."""
        cdef pollfd one
        cdef uint64_t deadline = now_ns() + timeout_ns
        while not self.reaped:
            self.reaped = host_reap(self.pid, &self.status)
            if self.reaped or now_ns() >= deadline:
                break
            with nogil:
                one.fd = self.pidfd
                one.events = POLLIN
                poll(&one, 1 if self.pidfd >= 0 else 0, <int>u64_min((deadline - now_ns()) / 1000000 + 1,
                                                                      1000 if self.pidfd >= 0 else 5))
        return bool(self.reaped)

    def progress(self):
        """(bytes looked at, all bytes)."""
        return u64_load(&self.job.done), self.job.total

    def abort(self):
        """Ends the child; idempotent."""
        if not self.reaped:
            host_kill(self.pid, self.pidfd)

    def result(self):
        """(whether it came to its end, errno or 0, wait status) of a child that has ended."""
        return bool(u32_load(&self.job.finished)), -self.job.error, self.status

    def written(self, uint64_t i):
        """Of range i: a byte for each of its pages, 1 for those that were written to the file."""
        cdef uint64_t k
        cdef uint8_t *at = self.job.written
        if i >= self.job.count:
            raise IndexError(f"range {i} of {self.job.count}")
        for k in range(i):
            at += forked_range_pages(&self.job.range[k])
        return at[:forked_range_pages(&self.job.range[i])]

    def close(self):
        """Ends and reaps the child, and lets go of what is shared with it; idempotent."""
        if self.pid > 0:
            self.abort()
            self.wait(10**10)
        self._free()

    cdef void _free(self):
        if self.pidfd >= 0:
            close(self.pidfd)
            self.pidfd = -1
        if self.job != NULL:
            munmap(self.job, self.nbytes)
            self.job = NULL

    def __dealloc__(self):
        if self.pid > 0 and not self.reaped and self.job != NULL and self.job.parent == getpid():
            host_kill(self.pid, self.pidfd)
        self._free()


def image_sums(int fd, uint64_t data_offset, uint64_t data_bytes, uint64_t seed):
    """The sums of a file's data section, 64 bits for each unit (_imagefile.h). Reads it, without the interpreter lock.
    OSError."""
    cdef uint64_t units = (data_bytes + IMAGE_UNIT - 1) // IMAGE_UNIT
    cdef bytes out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(units * 8))
    cdef uint64_t *sums = <uint64_t *>PyBytes_AsString(out)
    cdef int err
    with nogil:
        err = c_image_sums(fd, data_offset, data_bytes, seed, sums)
    if err != 0:
        raise _os_error(err, "an image can't be read back")
    return out


def write_out(int fd, bytearray over not None):
    """Has the kernel begin to write what was written to a file to its disk; it may wait for a disk that has much to do,
    for 8 MiB after another thread has set over[0]. A hint: where it can't be had nothing is lost."""
    cdef Py_buffer view
    PyObject_GetBuffer(over, &view, PyBUF_ANY_CONTIGUOUS)
    with nogil:
        file_write_out(fd, <const uint8_t *>view.buf)
    PyBuffer_Release(&view)


def image_sum(data, uint64_t seed, uint64_t unit):
    """The sum of one unit's bytes."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_ANY_CONTIGUOUS)
    out = c_image_sum(seed, unit, <const uint8_t *>view.buf, <size_t>view.len)
    PyBuffer_Release(&view)
    return out


# ---- the order of touches ---------------------------------------------------------------------------------------

cdef void touched_note(Region_t *r, uint64_t b, uint64_t n) noexcept nogil:
    """Blocks that a touch or a pattern brought: up to one note per block of the region, the first ones."""
    cdef uint64_t at = u64_load(&r.touched_count), i
    if at >= r.blocks:
        return
    at = u64_add(&r.touched_count, n)
    for i in range(n):
        if at + i < r.blocks:
            u32_store(&r.touched[at + i], <uint32_t>(b + i + 1))


def record_touches(Region region):
    """From here on the region notes which blocks touches bring, in their order; idempotent."""
    cdef Region_t *r = _live(region)
    cdef char *place
    if r.blocks >= <uint64_t>1 << 32:
        raise ValueError(f"{r.blocks} blocks are too many for their order to be noted: take larger ones")
    if ptr_load(&r.touched) != NULL:
        return
    place = map_lazy(page_round(r.blocks * 4), PROT_READ | PROT_WRITE, -1)
    if place == NULL:
        raise MemoryError("no memory for the order of touches")
    ptr_store(&r.touched, place)


def touches(Region region):
    """Those blocks, 32 bits each, in their order."""
    cdef Region_t *r = _live(region)
    cdef uint64_t n
    if ptr_load(&r.touched) == NULL:
        return b""
    _hold(r)
    with nogil:
        settle(r.engine)                    # the kernel lets the toucher go before its block is noted
    region_release(r)
    n = u64_min(u64_load(&r.touched_count), r.blocks)
    return PyBytes_FromStringAndSize(<char *>r.touched, <Py_ssize_t>(n * 4))
