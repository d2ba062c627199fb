# The provider host's own end of the channel: what `python -m uffd._host` is made of, beside the Python of _host.py.
#
# Uses:     _host.h, _hosttake.pxi; nothing of an engine
# Provides: HostEnd (takes requests, answers them), HostBuffer (the bytes that a provider fills or stores)
#
# Threads of the host wait here without its interpreter lock. A buffer that a provider keeps after its call is taken
# away from it: private memory is put in the place of the shared, so that a late write reaches nobody's array.

cdef enum:
    HOST_SESSIONS = 1 << 6                  # entries that the table of sessions begins with
    HOST_CLOSINGS = 1 << 10                 # sessions closed by the engine that Python has not heard of yet

cdef struct HostSession:
    uint64_t id                             # 0: free
    uint32_t limit                          # threads at once
    uint32_t running
    bint read_many
    bint write_many
    uint64_t block_bytes
    char name[80]


@no_gc_clear
cdef class HostMapping:
    """A region's shared pages. Its buffers hold it; it is unmapped with the last one that a provider keeps."""
    cdef char *start                        # NULL: each buffer has a mapping of its own
    cdef uint64_t nbytes
    cdef int fd                             # where it has not; else -1

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        if self.start != NULL:
            munmap(self.start, self.nbytes)
        if self.fd >= 0:
            close(self.fd)


@no_gc_clear
cdef class HostBuffer:
    """The bytes that one call of a provider is to fill, or to store. `exports` tells whether it still holds them
    afterwards."""
    cdef char *start
    cdef Py_ssize_t nbytes
    cdef readonly Py_ssize_t exports
    cdef bint to_store                      # it may only be read
    cdef uint64_t canary                    # another for each call: what matches by chance does not match again
    cdef HostMapping mapping                # that it lies in, or None
    cdef char *window                       # its own: unmapped with the last view
    cdef uint64_t window_bytes
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if flags & 1 and self.to_store:     # PyBUF_WRITABLE
            raise BufferError("the bytes are to be stored, not to be changed")
        self.shape[0] = self.nbytes
        self.strides[0] = 1
        buffer.buf = self.start
        buffer.obj = self
        buffer.len = self.nbytes
        buffer.itemsize = 1
        buffer.readonly = self.to_store
        buffer.ndim = 1
        buffer.format = b"B"
        buffer.shape = self.shape
        buffer.strides = self.strides
        buffer.suboffsets = NULL
        buffer.internal = NULL
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1

    def __dealloc__(self):
        if self.window != NULL:
            munmap(self.window, self.window_bytes)


@no_gc_clear
cdef class HostEnd:
    """One per host process: maps the channel (OSError where it is not one of this version) and answers requests. All
    methods are thread-safe; those that wait release the interpreter lock."""
    cdef host_channel *channel
    cdef int channel_fd
    cdef int control_fd
    cdef int parent_fd
    cdef int parent
    cdef uint32_t stopping
    cdef pthread_mutex_t lock               # sessions; held for a few instructions
    cdef pthread_mutex_t asking             # one question to the engine at a time
    cdef pthread_mutex_t offering           # one offer at a time
    cdef HostSession *sessions              # an open table, by number; under the lock
    cdef uint32_t session_room              # its entries, a power of two
    cdef uint32_t session_used              # those that were ever used
    cdef dict memories                      # session: HostMapping
    cdef char *window[HOST_REQUESTS + 1]
    cdef list buffers
    cdef uint32_t batch[HOST_REQUESTS]      # that a taken request belongs to, by index into these; under the lock
    cdef uint32_t left[HOST_REQUESTS]       # requests of a batch without an answer; 0: the index is free
    cdef uint64_t session_of[HOST_REQUESTS]
    cdef uint32_t answered                  # futex: answers to questions
    cdef host_message answer                # of the last one; under `asking`, once `answered` has changed
    cdef int answer_fd
    cdef uint32_t closings                  # futex: sessions that the engine closed
    cdef uint64_t closed[HOST_CLOSINGS]     # their numbers; under the lock
    cdef uint32_t closed_head
    cdef uint32_t closed_tail

    def __init__(self, int channel_fd, int control_fd):
        cdef uint32_t i
        self.channel_fd = channel_fd
        self.control_fd = control_fd
        self.parent = getppid()
        self.parent_fd = sys_pidfd(self.parent)
        self.answer_fd = -1
        pthread_mutex_init(&self.lock, NULL)
        pthread_mutex_init(&self.asking, NULL)
        pthread_mutex_init(&self.offering, NULL)
        self.buffers = [None] * HOST_REQUESTS
        self.memories = {}
        self.session_room = HOST_SESSIONS
        self.sessions = <HostSession *>calloc(HOST_SESSIONS, sizeof(HostSession))
        self.channel = <host_channel *>map_window(channel_fd, 0, host_buffer_at(0))
        if self.channel == NULL or self.sessions == NULL:
            raise MemoryError("no memory for a provider host")
        if self.channel.version != HOST_VERSION:
            raise OSError(_errno.EPROTO, "the engine and its provider host are of different versions")
        for i in range(HOST_REQUESTS + 1):
            self.window[i] = map_window(channel_fd, host_buffer_at(i), HOST_BUFFER_BYTES)
            if self.window[i] == NULL:
                raise MemoryError("no address space for page buffers")
        if thread_spawn(&host_watcher, <void *>self, b"uffd-watch", -1) != 0:
            raise MemoryError("no thread for a provider host")

    def ready(self):
        """Tells the engine that requests are taken."""
        cdef host_offer *o = &self.channel.offer
        while u32_load(&o.word) == REQ_POSTED and not self.stopping:
            with nogil:
                poll(NULL, 0, 1)            # the engine still answers the host before
        u32_store(&o.word, REQ_FREE)
        u32_store_seq(&self.channel.ready, self.channel.generation)

    def take(self):
        """Waits for work: (kind, session, slot, [(slot, offset, nbytes), ...]), or None at the end of service."""
        cdef uint32_t found[HOST_REQUESTS]
        cdef int n
        cdef host_request *q
        with nogil:
            n = host_take(self, found)
        if n == 0:
            return None
        q = &self.channel.request[found[0]]
        return (q.kind, q.session, found[0],
                sorted([(i, self.channel.request[i].offset, self.channel.request[i].nbytes) for i in found[:n]],
                       key=_by_offset))

    def out(self, uint32_t slot):
        """A writable view of the bytes that request `slot` is to fill; anew with each call."""
        cdef host_request *q = _request(self, slot)
        cdef HostBuffer b = HostBuffer.__new__(HostBuffer)
        cdef uint64_t end, page
        if q.nbytes > HOST_BUFFER_BYTES:
            raise ValueError(f"a request of {q.nbytes} bytes")
        if q.in_place:
            self._in_place(b, q.session, q.offset, q.nbytes)
        else:
            b.start = self.window[slot]
        b.nbytes = <Py_ssize_t>q.nbytes
        b.canary = scrambled(now_ns())
        self.buffers[slot] = b
        end = q.nbytes
        if q.in_place:
            with nogil:                     # mapped in one go; a kernel before 5.14 faults page by page
                madvise(b.start, page_round(end), 23)       # MADV_POPULATE_WRITE
        page = 0
        while page < end:
            canary_put(b.start + page, PAGE if end - page > PAGE else end - page, b.canary ^ page << 32)
            page += PAGE
        return memoryview(b)

    def data(self, uint32_t slot):
        """A read-only view of the bytes that request `slot` is to store; anew with each call."""
        cdef host_request *q = _request(self, slot)
        cdef HostBuffer b = HostBuffer.__new__(HostBuffer)
        if q.nbytes > HOST_BUFFER_BYTES:
            raise ValueError(f"a request of {q.nbytes} bytes")
        b.start = self.window[slot]
        b.nbytes = <Py_ssize_t>q.nbytes
        b.to_store = True
        self.buffers[slot] = b
        return memoryview(b)

    cdef int _in_place(self, HostBuffer b, uint64_t session, uint64_t offset, uint64_t nbytes) except -1:
        """Has a buffer lie in the region's own shared pages."""
        cdef HostMapping mapping = self.memories.get(session)
        if mapping is None:
            mapping = self.memories.setdefault(session, self._mapped(session, True))
        if offset > mapping.nbytes or nbytes > mapping.nbytes - offset:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are outside the region's shared pages")
        if mapping.start != NULL:
            b.mapping = mapping
            b.start = mapping.start + offset
            return 0
        b.window_bytes = page_round(nbytes)
        b.window = map_window(mapping.fd, offset, b.window_bytes)
        b.start = b.window
        if b.window == NULL:
            raise MemoryError("no address space for the region's shared pages")
        return 0

    cdef HostMapping _mapped(self, uint64_t session, bint whole):
        cdef HostMapping mapping = HostMapping()
        cdef host_message told
        mapping.fd = self._ask(session, CONTROL_MEMORY, &told)
        mapping.nbytes = told.nbytes
        if whole:
            mapping.start = map_window(mapping.fd, 0, told.nbytes)
            close(mapping.fd)
            mapping.fd = -1
            if mapping.start == NULL:
                raise MemoryError("no address space for the region's shared pages")
        return mapping

    def opened(self, int64_t slot, uint64_t session, nbytes, uint32_t concurrency, bint read_many, bint writes,
               bint write_many):
        """The session's provider is open. slot: of the OPEN request that this answers, or -1."""
        cdef HostSession *one
        cdef host_request *q
        pthread_mutex_lock(&self.lock)
        one = session_find(self, session, False)
        if one != NULL:
            one.limit = concurrency if concurrency else 1
            one.read_many = read_many
            one.write_many = write_many
        pthread_mutex_unlock(&self.lock)
        u32_add_seq(&self.channel.doorbell, 1)
        futex_wake_shared(&self.channel.doorbell, 1 << 30)      # more threads may run it now
        if slot >= 0:
            q = _request(self, <uint32_t>slot)
            q.opened_bytes = -1 if nbytes is None else nbytes
            q.opened_concurrency = concurrency
            q.opened_flags = (OPENED_READ_MANY if read_many else 0) | (OPENED_WRITES if writes else 0)
            request_end(self, <uint32_t>slot, 0)

    def done(self, uint32_t slot):
        """Request `slot` is filled, stored or flushed. A text where the provider deserves a warning, else None."""
        cdef host_request *q = _request(self, slot)
        cdef HostBuffer b = self.buffers[slot]
        cdef uint64_t page = 0, end = q.nbytes, n
        warning = None
        if b is not None and b.exports:
            warning = self._take_away(slot, b)
        while q.kind == REQ_READ and page < end:
            n = PAGE if end - page > PAGE else end - page
            if canary_there(b.start + page, n, b.canary ^ page << 32):
                self.failed(slot, _errno.EIO, "not filled whole: read() returned, and bytes "
                            f"{page} to {page + n} of the {end} of `out` were not written"
                            + (" (the provider kept `out`, which is taken away after its call)" if warning else ""))
                return warning
            page += PAGE
        self.buffers[slot] = None
        request_end(self, slot, 0)
        return warning

    def _take_away(self, uint32_t slot, HostBuffer b):
        """The provider still holds its buffer: it keeps a private copy of the pages, and the slot gets others."""
        cdef host_request *q = _request(self, slot)
        cdef uint64_t span = page_round(q.nbytes)
        cdef char *fresh
        if q.in_place:
            if b.mapping is not None and self.memories.get(q.session) is b.mapping:
                self.memories[q.session] = self._mapped(q.session, False)   # what is kept from now on is kept alone
            fresh = b.start
        else:
            fresh = map_window(self.channel_fd, host_buffer_at(slot), HOST_BUFFER_BYTES)
            if fresh == NULL:
                raise MemoryError("no address space for page buffers")
            b.window = self.window[slot]
            b.window_bytes = HOST_BUFFER_BYTES
            self.window[slot] = fresh
        if make_private(b.start, span) != 0:
            raise MemoryError("no memory to take a buffer away")
        b.start = fresh                     # what is checked and placed; views have the old address
        if b.to_store:
            return ("the provider kept `data` after write() had returned: it was given a copy of its own, which costs "
                    "time. Copy what you want to keep")
        return ("the provider kept `out` after read() had returned: it was taken away, and what is written to it later "
                "goes nowhere. Copy what you want to keep")

    def failed(self, uint32_t slot, int number, str text):
        """Request `slot` failed: an errno, and what the user is to read."""
        cdef host_request *q = _request(self, slot)
        cdef bytes raw = text.encode("utf-8", "replace")[-<int>HOST_TEXT_BYTES:]
        cdef HostBuffer b = self.buffers[slot]
        if b is not None and b.exports:     # a thread of the provider may still write to it
            try:
                self._take_away(slot, b)
            except MemoryError:
                _os._exit(1)                # better no host than one that writes into another block
        memcpy(q.text, PyBytes_AsString(raw), <size_t>len(raw))
        q.text_bytes = <uint32_t>len(raw)
        self.buffers[slot] = None
        request_end(self, slot, -number if number > 0 else -_errno.EIO)

    def offer(self, uint64_t session, uint64_t offset, uint64_t step, rows):
        """Places rows of bytes that nobody asked for: row i of a 2-d C-contiguous uint8 buffer at offset + i * step.
        Only whole blocks that are missing. Waits for the engine. True: some were placed."""
        cdef Py_buffer view
        cdef uint64_t row_bytes, n, at = 0, most
        cdef uint32_t taken = 0
        PyObject_GetBuffer(rows, &view, PyBUF_ANY_CONTIGUOUS)
        try:
            n = len(rows)
            row_bytes = <uint64_t>view.len // n if n else 0
            if row_bytes == 0 or row_bytes > HOST_BUFFER_BYTES:
                return False
            most = HOST_BUFFER_BYTES // row_bytes
            with nogil:
                pthread_mutex_lock(&self.offering)
                while at < n and not u32_load(&self.stopping):
                    if n - at < most:
                        most = n - at
                    memcpy(self.window[HOST_REQUESTS], <char *>view.buf + at * row_bytes, most * row_bytes)
                    taken += offer_rows(self, session, offset + at * step, step, row_bytes, most)
                    at += most
                pthread_mutex_unlock(&self.offering)
        finally:
            PyBuffer_Release(&view)
        return taken > 0

    def pickle_of(self, uint64_t session):
        """The pickle of the session's provider, from the engine."""
        cdef HostSession *one
        cdef host_message told
        fd = self._ask(session, CONTROL_PICKLE, &told)
        try:
            size = _os.fstat(fd).st_size
            data = _os.pread(fd, size, 0)
            while len(data) < size:
                more = _os.pread(fd, size - len(data), len(data))
                if not more:
                    raise OSError(_errno.EIO, "the provider's pickle is cut short")
                data += more
        finally:
            _os.close(fd)
        pthread_mutex_lock(&self.lock)
        one = session_find(self, session, True)
        if one != NULL:
            one.block_bytes = told.block_bytes
            memcpy(one.name, told.name, 80)
            one.name[79] = 0
        pthread_mutex_unlock(&self.lock)
        return data

    def name_of(self, uint64_t session):
        """The region's name, known after pickle_of."""
        cdef char name[80]
        cdef HostSession *one
        name[0] = 0
        pthread_mutex_lock(&self.lock)
        one = session_find(self, session, False)
        if one != NULL:
            memcpy(name, one.name, 80)
        pthread_mutex_unlock(&self.lock)
        return name.decode("utf-8", "replace")

    def block_bytes_of(self, uint64_t session):
        """The region's block size, known after pickle_of; 0 before."""
        cdef HostSession *one
        cdef uint64_t block_bytes = 0
        pthread_mutex_lock(&self.lock)
        one = session_find(self, session, False)
        if one != NULL:
            block_bytes = one.block_bytes
        pthread_mutex_unlock(&self.lock)
        return block_bytes

    cdef int _ask(self, uint64_t session, uint32_t what, host_message *told) except -1:
        """A descriptor from the engine, and what it tells of the session. Releases the interpreter lock."""
        cdef int err, fd = -1
        memset(told, 0, sizeof(told[0]))
        told.session = session
        told.what = what
        with nogil:
            err = host_ask(self, told, &fd)
        if err != 0 or fd < 0:
            raise _os_error(err if err else -_errno.EPROTO, "the engine did not hand the provider over")
        return fd

    def watch(self):
        """Waits for the engine: the number of a session that it closed, or None at the end of service. From then on the
        process has a second to end by itself."""
        cdef uint64_t session = 0
        cdef uint32_t turn
        with nogil:
            while session == 0 and not u32_load(&self.stopping):
                turn = u32_load(&self.closings)
                pthread_mutex_lock(&self.lock)
                if self.closed_tail != self.closed_head:
                    session = self.closed[self.closed_head & (HOST_CLOSINGS - 1)]
                    self.closed_head += 1
                pthread_mutex_unlock(&self.lock)
                if session == 0:
                    futex_wait(&self.closings, turn, SECOND_NS)
        return session if session else None

    def free_session(self, uint64_t session):
        """Forgets a session that the engine closed."""
        cdef HostSession *one
        pthread_mutex_lock(&self.lock)
        one = session_find(self, session, False)
        if one != NULL:
            one.id = 0
        pthread_mutex_unlock(&self.lock)
        self.memories.pop(session, None)


def _by_offset(request):
    return request[1]


cdef host_request *_request(HostEnd end, uint32_t slot) except NULL:
    if slot >= HOST_REQUESTS:
        raise ValueError(f"no request {slot}")
    return &end.channel.request[slot]


cdef char *map_window(int fd, uint64_t offset, uint64_t nbytes) noexcept nogil:
    """Shared memory that a provider's own children do not get. NULL on failure."""
    cdef void *p = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, <int64_t>offset)
    if p == MAP_FAILED:
        return NULL
    madvise(p, nbytes, 10)                  # MADV_DONTFORK
    return <char *>p


cdef int make_private(char *start, uint64_t span) noexcept nogil:
    """Private memory with the same bytes in the place of shared pages."""
    cdef char *copy = map_lazy(span, PROT_READ | PROT_WRITE, -1)
    if copy == NULL:
        return -ENOMEM
    memcpy(copy, start, span)
    return pages_into(start, copy, span)    # in one step: a thread that still stores them reads no zeros


cdef uint64_t scrambled(uint64_t v) noexcept nogil:
    """Every bit of it depends on the time (the multiplier of Fibonacci hashing)."""
    cdef uint64_t high = 0x9E3779B9, low = 0x7F4A7C15
    return v * (high << 32 | low) | 1


cdef void canary_put(char *page, uint64_t n, uint64_t value) noexcept nogil:
    """Bytes at the end of a page that nobody writes by chance."""
    cdef uint64_t w = 8 if n >= 8 else n
    memcpy(page + n - w, &value, w)


cdef bint canary_there(const char *page, uint64_t n, uint64_t value) noexcept nogil:
    """Whether its last four bytes are still there: so many may be missing of a fill that ended early."""
    return n >= 8 and memcmp(page + n - 4, <char *>&value + 4, 4) == 0
