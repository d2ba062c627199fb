# What Python sees of the core. The public classes of engine.py and region.py are made of these.
#
# Uses:     everything before it
# Provides: Engine (threads), Region (memory, exported as a buffer), Job (a prefetch or populate), the ways to a
#           userfaultfd, and _os_error: the one place where -errno turns into an exception
#
# Rule of the GIL: it is held here for bookkeeping only. Every wait is in slices of 100 ms without it, with a look at
# Python's signals between them.

from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetObject, PyErr_WriteUnraisable
from cython cimport no_gc_clear
import atexit as _atexit
import errno as _errno
import os as _os

cdef uint64_t BURY_NS = 5000000             # waited where nobody asked to wait: most fills are over by then

PAGE_BYTES = PAGE
MAX_BLOCK = <int>MAX_BLOCK_BYTES
IMAGE_UNIT_BYTES = <int>IMAGE_UNIT
MAX_WORKERS_BASE = <int>MAX_BASE_WORKERS
MAX_HOST_COUNT = <int>MAX_HOSTS
JOB_PREFETCH = <int>PREFETCH
JOB_POPULATE = <int>POPULATE
STATES = {"missing": <int>MISSING, "filling": <int>FILLING, "clean": <int>CLEAN, "unprotecting": <int>UNPROTECTING,
          "dirty": <int>DIRTY, "poisoned": <int>POISONED, "evicting": <int>EVICTING, "pooled": <int>POOLED,
          "pooled_dirty": <int>POOLED_DIRTY, "copying": <int>COPYING}
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
                 "bytes_filled", "duplicates", "retries", "errors", "poisoned", "readahead_wasted", "repaired",
                 "evicted", "rescued", "written_back", "bytes_written", "write_errors", "evict_waits", "evict_busy",
                 "recycled", "bytes_stored")
STAGE_NAMES = ("queue", "fill", "resolve", "write")
IOCTLS = {"API": UF_IOC_API, "REGISTER": UF_IOC_REGISTER, "UNREGISTER": UF_IOC_UNREGISTER, "WAKE": UF_IOC_WAKE,
          "COPY": UF_IOC_COPY, "ZEROPAGE": UF_IOC_ZEROPAGE, "WRITEPROTECT": UF_IOC_WRITEPROTECT,
          "CONTINUE": UF_IOC_CONTINUE, "POISON": UF_IOC_POISON, "MOVE": UF_IOC_MOVE, "NEW": UF_IOC_NEW}

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

    def set_hosts(self, uint32_t n, list argv, list envp, bint debug, uint64_t start_ns):
        """Up to n provider hosts, started as argv with its last two items replaced; each is ready after start_ns, or
        stopped. Once per engine."""
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
        all.start_ns = start_ns
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
                with nogil:
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
