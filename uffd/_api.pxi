# What Python sees of the core. The public classes of engine.py and region.py are made of these.
#
# Uses:     everything before it
# Provides: Engine (threads), Region (memory, exported as a buffer), Job (a prefetch or populate), the ways to a
#           userfaultfd, and _os_error: the one place where -errno turns into an exception
#
# Rule of the GIL: it is held here for bookkeeping only. Every wait is in slices of 100 ms without it, with a look at
# Python's signals between them.

from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cython cimport no_gc_clear
import atexit as _atexit
import errno as _errno
import os as _os

cdef uint64_t BURY_NS = 5000000             # waited where nobody asked to wait: most fills are over by then

PAGE_BYTES = PAGE
MAX_BLOCK = <int>MAX_BLOCK_BYTES
MAX_WORKERS_BASE = <int>MAX_BASE_WORKERS
MAX_HOST_COUNT = <int>MAX_HOSTS
JOB_PREFETCH = <int>PREFETCH
JOB_POPULATE = <int>POPULATE
STATES = {"missing": <int>MISSING, "filling": <int>FILLING, "clean": <int>CLEAN, "unprotecting": <int>UNPROTECTING,
          "dirty": <int>DIRTY, "poisoned": <int>POISONED}
WAYS = ("device", "syscall", "syscall-user")
FEATURES = {
    "PAGEFAULT_FLAG_WP": <int>UF_FEATURE_WP, "EVENT_FORK": <int>UF_FEATURE_EVENT_FORK,
    "EVENT_REMAP": <int>UF_FEATURE_EVENT_REMAP, "EVENT_REMOVE": <int>UF_FEATURE_EVENT_REMOVE,
    "MISSING_HUGETLBFS": <int>UF_FEATURE_MISSING_HUGETLBFS, "MISSING_SHMEM": <int>UF_FEATURE_MISSING_SHMEM,
    "EVENT_UNMAP": <int>UF_FEATURE_EVENT_UNMAP, "SIGBUS": <int>UF_FEATURE_SIGBUS,
    "THREAD_ID": <int>UF_FEATURE_THREAD_ID, "MINOR_HUGETLBFS": <int>UF_FEATURE_MINOR_HUGETLBFS,
    "MINOR_SHMEM": <int>UF_FEATURE_MINOR_SHMEM, "EXACT_ADDRESS": <int>UF_FEATURE_EXACT_ADDRESS,
    "WP_HUGETLBFS_SHMEM": <int>UF_FEATURE_WP_HUGETLBFS_SHMEM, "WP_UNPOPULATED": <int>UF_FEATURE_WP_UNPOPULATED,
    "POISON": <int>UF_FEATURE_POISON, "WP_ASYNC": <int>UF_FEATURE_WP_ASYNC, "MOVE": <int>UF_FEATURE_MOVE}
COUNTER_NAMES = ("faults_read", "faults_write", "faults_wp", "blocks_demand", "blocks_readahead", "blocks_prefetch",
                 "bytes_filled", "duplicates", "retries", "errors", "poisoned", "readahead_wasted", "repaired")
STAGE_NAMES = ("queue", "fill", "resolve")
IOCTLS = {"API": UF_IOC_API, "REGISTER": UF_IOC_REGISTER, "UNREGISTER": UF_IOC_UNREGISTER, "WAKE": UF_IOC_WAKE,
          "COPY": UF_IOC_COPY, "ZEROPAGE": UF_IOC_ZEROPAGE, "WRITEPROTECT": UF_IOC_WRITEPROTECT,
          "CONTINUE": UF_IOC_CONTINUE, "POISON": UF_IOC_POISON, "NEW": UF_IOC_NEW}

cdef list graveyard = []        # (Region, Filler) of regions that the keeper is still to tear down


def _os_error(int code, what):
    """-errno as the OSError of that number (PermissionError, MemoryError for ENOMEM, ...)."""
    number = -code
    if number == _errno.ENOMEM:
        return MemoryError(f"{what}: {_os.strerror(number)}")
    return OSError(number, f"{what}: {_os.strerror(number)}")


def try_open(str way, keep=False):
    """Opens a userfaultfd one way: (fd or -errno, features, ioctls). The fd is closed again unless keep."""
    cdef int fd = uf_open(WAYS.index(way))
    cdef uint64_t features = 0, ioctls = 0
    cdef int err
    if fd < 0:
        return fd, 0, 0
    err = uf_api(fd, &features, &ioctls)
    if err != 0 or not keep:
        close(fd)
    return (err if err != 0 else fd), features, ioctls


def mode():
    """"full", "user" or "none", with the errno of the last way tried: (mode, errno)."""
    cdef int err = 0 if known_way >= 0 else uffd_discover()
    if err != 0:
        return "none", -err
    return ("user" if known_way == UF_WAY_USER else "full"), 0


def supports(str feature):
    """Whether regions may use a kernel feature, by its name in FEATURES."""
    return bool(known_features & ~masked_features & <uint64_t>FEATURES[feature])


def mask(features=0, way=None):
    """For tests of the fall-backs: features that new regions must do without, and the only way to open by (None: the
    best there is). Regions that exist are not changed."""
    global masked_features, known_way
    masked_features = features
    known_way = -1
    if way is not None:
        uffd_discover()
        known_way = WAYS.index(way)


def sigbus_check():
    """Puts our SIGBUS handler back in front if somebody replaced it; True if somebody had."""
    return bool(bus_ensure())


cdef class Engine:
    """Worker threads and their buffers. The public uffd.Engine holds one."""
    cdef Engine_t *e
    cdef object __weakref__

    def __cinit__(self, uint32_t workers):
        cdef int err
        global zero_bytes
        if zero_bytes == NULL:
            zero_bytes = map_lazy(MAX_BLOCK_BYTES, PROT_READ, -1)
        if zero_bytes == NULL:
            raise MemoryError("no address space for the zero source")
        if workers == 0 or workers > MAX_BASE_WORKERS:
            raise ValueError(f"workers must be 1 to {MAX_WORKERS_BASE}, not {workers}")
        with nogil:
            err = engine_make(&self.e, workers)
        if err != 0:
            raise _os_error(err, f"no engine with {workers} workers")

    def stop(self):
        """Ends the threads; idempotent. With regions that are still in somebody's hands it happens when the last of
        them, which keep this object, is gone."""
        cdef Engine_t *e = self.e
        _sweep()
        if e != NULL and u32_load(&e.regions) == 0:
            self.e = NULL
            with nogil:
                engine_stop(e)

    def __dealloc__(self):
        if self.e != NULL:
            with nogil:
                engine_stop(self.e)

    def set_hosts(self, uint32_t n, list argv, list envp, bint debug):
        """Up to n provider hosts, started as argv with its last two items replaced. Once per engine."""
        cdef Hosts_t *all
        cdef int err
        if self.e == NULL or self.e.hosts != NULL:
            raise ValueError("the engine is closed" if self.e == NULL else "the engine has its hosts already")
        if n == 0 or n > MAX_HOSTS:
            raise ValueError(f"hosts must be 1 to {<int>MAX_HOSTS}, not {n}")
        all = <Hosts_t *>calloc(1, sizeof(Hosts_t) + n * sizeof(Host_t))
        if all == NULL:
            raise MemoryError("no memory for provider hosts")
        all.n = n
        all.debug = debug
        err = _copy_strings(all, argv, envp)
        if err == 0:
            err = hosts_make(self.e, all)
        if err != 0:
            hosts_free(all)
            raise _os_error(err, "no provider hosts")

    def host_pids(self):
        """Of the hosts that run now."""
        if self.e == NULL or self.e.hosts == NULL:
            return []
        return [self.e.hosts.host[i].pid for i in range(self.e.hosts.n) if self.e.hosts.host[i].pid > 0]

    def begin_session(self, int pickle_fd, uint64_t block_bytes, str name, bint writes):
        """The Filler of a hosted provider, whose pickle is in a memfd. Takes the descriptor over. writes: it can, and
        one host has it alone: what an instance wrote, another might not read."""
        cdef Filler f = Filler()
        cdef char region_name[80]
        if self.e == NULL or self.e.hosts == NULL:
            raise ValueError("the engine is closed")
        _copy_name(region_name, name)
        f.kind = "hosted"
        f.fill.kind = FILL_HOST
        f.fill.session = session_begin(self.e, pickle_fd, block_bytes, region_name)
        if f.fill.session == 0:
            close(pickle_fd)
            raise MemoryError("no memory for a provider")
        if writes:
            f.fill.one_host = 1 + <uint32_t>(f.fill.session % self.e.hosts.n)
        return f

    def end_session(self, Filler f):
        """Of a provider that no region was made of."""
        if self.e != NULL:
            with nogil:
                pthread_mutex_lock(&registry_lock)
                session_end(self.e, f.fill.session)
                pthread_mutex_unlock(&registry_lock)

    def open_session(self, Filler f, uint32_t retries, uint64_t timeout_ns):
        """Has a host open the provider: (0 or errno, text, nbytes or None, whether it can write). Ctrl-C interrupts it.
        ValueError when the engine is closed meanwhile."""
        cdef Engine_t *e = self.e
        cdef Slot *c = NULL
        cdef int err = 1
        cdef uint64_t deadline = now_ns() + timeout_ns
        if e == NULL or e.hosts == NULL:
            raise ValueError("the engine is closed")
        u32_add(&e.carriers, 1)             # the engine is not freed meanwhile
        try:
            while c == NULL and not u32_load(&e.stopping):
                with nogil:
                    c = carrier_take(e, &f.fill, NULL, 0)
                    if c == NULL:
                        poll(NULL, 0, 5)
                PyErr_CheckSignals()
            if c != NULL:
                u32_cas(&c.carrier.h.state, HOST_BROKEN, HOST_DOWN)     # it gets another chance
                c.carrier.lost = 0
                host_post(c, REQ_OPEN, f.fill.session, 0, 0, 2, False)
            while err == 1 and not u32_load(&e.stopping):
                with nogil:
                    err = open_look(c, retries, deadline)
                PyErr_CheckSignals()
            if err == 1:
                raise ValueError("the engine was closed")
            text = c.carrier.q.text[:min(c.carrier.q.text_bytes, <uint32_t>HOST_TEXT_BYTES)].decode("utf-8", "replace")
            size = c.carrier.q.opened_bytes
            return (-err, text if err else "", None if size < 0 else size,
                    err == 0 and c.carrier.q.opened_flags & OPENED_WRITES != 0)
        finally:
            if c != NULL and err == 1:      # interrupted: the answer is waited for without us
                c.carrier.count = deadline - now_ns() if deadline > now_ns() else 0
                carrier_pass(c, NULL, T_DRAIN)
            elif c != NULL:
                carrier_return(c)
            u32_sub(&e.carriers, 1)
            futex_wake_all(&e.carriers)

    def workers(self):
        """Per base worker: (cpu or -1, messages served, empty wake-ups, armed)."""
        if self.e == NULL:
            return []
        return [(self.e.slots[i].cpu, self.e.slots[i].served, self.e.slots[i].empty, bool(self.e.slots[i].armed))
                for i in range(self.e.workers)]

    def threads(self):
        return 0 if self.e == NULL else u32_load(&self.e.alive)

    def closed_counts(self):
        """What regions that are gone had counted: (counters, stages)."""
        if self.e == NULL:
            return [0] * COUNTERS, [[0] * BUCKETS for _ in range(STAGES)]
        return ([self.e.closed.n[k] for k in range(COUNTERS)],
                [[self.e.closed.stage[h][k] for k in range(BUCKETS)] for h in range(STAGES)])


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
              uint32_t retries, uint64_t timeout_ns):
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
        err = _prepare(r, shared)
        if err == 0:
            with nogil:
                err = region_make(r)
        if err != 0:
            if r.memfd >= 0:
                close(r.memfd)
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
            raise ValueError("the region is closed")
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
    def address(self):
        return <uintptr_t>_live(self).base

    @property
    def block_count(self):
        return _live(self).blocks

    @property
    def tracked(self):
        """Whether dirty blocks are known exactly (the kernel has write protection for this memory)."""
        return bool(_live(self).protect) or not _live(self).writable

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
                    to[b] = <char>(u32_load(&r.state[b]) & STATE_MASK)
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
                    if state != CLEAN and state != DIRTY and state != UNPROTECTING:
                        return b, state
        finally:
            PyBuffer_Release(&view)
        return None

    def _wait_block(self, uint64_t b, uint64_t timeout_ns):
        """Sleeps while block b is busy, at most timeout_ns; releases the GIL."""
        cdef Region_t *r = _live(self)
        cdef uint32_t word = u32_load(&r.state[b])
        if word & STATE_MASK == FILLING or word & STATE_MASK == UNPROTECTING:
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
        return True

    @property
    def error(self):
        """(errno, block, tries) of the first block that failed, or None."""
        return (-self.j.error, self.j.error_block, self.j.tries) if self.j.error else None


cdef int _prepare(Region_t *r, bint shared) except? -1000:
    """The rest of a region's constant fields. 0 or -errno."""
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
    if shared:
        r.protect = r.writable and has(UF_FEATURE_WP_HUGETLBFS_SHMEM)
    else:
        r.protect = r.writable and has(UF_FEATURE_WP)
    for i in range(HISTORY):
        r.history[i] = -(<int64_t>1 << 62)
    if shared:
        r.minor = has(UF_FEATURE_MINOR_SHMEM)
        r.memfd = sys_memfd(b"uffd")
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


cdef Region_t *_live(Region region) except NULL:
    if region.r == NULL:
        raise ValueError("the region is closed")
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
            free(g.r)
    return len(graveyard)


cdef int _sweep_pending(void *unused) noexcept:
    """Run by the interpreter in its main thread, at the keeper's request (Py_AddPendingCall needs no GIL)."""
    _sweep()
    return 0


def _finalize():
    u32_store(&finalizing, 1)


cdef int _copy_strings(Hosts_t *all, list argv, list envp) except? -1:
    """argv and envp as C strings that last as long as the hosts. 0 or -errno."""
    cdef bytes text
    cdef size_t at = (len(argv) + len(envp) + 2) * sizeof(char *), total = at
    cdef char **pointer
    for text in argv + envp:
        total += <size_t>len(text) + 24             # room for numbers that are written later
    all.memory = <char *>calloc(1, total)
    if all.memory == NULL:
        return -ENOMEM
    pointer = <char **>all.memory
    all.argv = pointer
    for text in argv:
        pointer[0] = all.memory + at
        memcpy(pointer[0], PyBytes_AsString(text), <size_t>len(text))
        at += <size_t>len(text) + 24
        pointer += 1
    pointer += 1
    all.envp = pointer
    for text in envp:
        pointer[0] = all.memory + at
        memcpy(pointer[0], PyBytes_AsString(text), <size_t>len(text))
        at += <size_t>len(text) + 24
        pointer += 1
    return 0


cdef void _copy_name(char *to, str name):
    cdef bytes text = name.encode("utf-8", "replace")[:79]
    memcpy(to, PyBytes_AsString(text), <size_t>len(text))
    to[len(text)] = 0


cdef int _start() except -1:
    pthread_mutex_init(&registry_lock, NULL)
    bus_deliver_set(&inline_deliver)
    if pthread_atfork(&fork_prepare, &fork_parent, &fork_child) != 0:
        raise MemoryError("pthread_atfork")
    _atexit.register(_finalize)
    return 0


_start()
