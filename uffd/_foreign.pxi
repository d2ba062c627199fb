# Which pages of memory that is not ours were written: the kernel's asynchronous write protection (WP_ASYNC and
# PAGEMAP_SCAN, Linux 6.7), without a fault that anybody serves; before 6.7 synchronous write protection.
#
# Uses:     bits_* of _track.pxi, uf_* and pm_* of _sys.h; thread_spawn of _life.pxi
# Provides: foreign_begin(start, end, filed, &f), foreign_take(f, reset, out), foreign_end(f): as watch_* of _track.pxi,
#           for a page-aligned range of addresses; foreign_fork_* (hooks of fork)
#
# One asynchronous userfaultfd of the process has all ranges, since a range belongs to one; a scan that resets pages
# which others watch, too, marks them for the others. What a scan says of holes depends on how it is asked, hence two
# ways:
#
#   whole       every page carried a mark of ours when we last looked: protected, or a marker in a hole. Whatever is
#               not protected now was written or dropped. The kernel has a fast path for this question.
#   with holes  private memory of which parts were never touched, and shall cost nothing: pages that are there are
#               asked for, with what they are. `there` remembers them; one that is gone, or is the zero page now, was
#               dropped.
#
# Memory that is mapped from a file or shared is armed whole, since a read maps its pages unprotected.
#
# Synchronous (`lift_fd`): a first write is a fault, and a thread of ours (`uffd-track`) lifts the page's protection,
# and does nothing else: which pages have lost their mark stands in /proc/self/pagemap. Who asks reads it there, marks
# those pages and protects them again, in this order. So all memory is armed whole. The thread takes no lock and touches
# no memory but its own, for whoever waits for it may hold any lock.
#
# All else is under foreign_lock, whose holder touches nothing that could wait for anybody but that thread.

cdef enum:
    SCAN_RUNS = 512

cdef struct Foreign_t:
    Foreign_t *next
    uint64_t start
    uint64_t end
    uint64_t *bits              # reported by a scan, and not taken yet
    uint64_t *there             # pages with bytes in them when we last looked
    bint whole
    bint filed                  # mapped from a file, or shared
    int32_t lost                # -errno of what ended it: the memory is not what it was

cdef Foreign_t *foreign_all = NULL          # these six under foreign_lock
cdef int foreign_fd = -1
cdef int pagemap_fd = -1
cdef int lift_fd = -1                       # synchronous: what ends its thread
cdef uint32_t lifting = 0                   # futex: 1 while there is that thread
cdef pthread_mutex_t foreign_lock


cdef int foreign_open() noexcept nogil:
    """The process's userfaultfd for this, and its pagemap. 0 or -errno: ENOTSUP before Linux 5.18; EPERM where faults
    of the kernel's own are not served, and it would have to be synchronous."""
    global foreign_fd, pagemap_fd
    cdef uint64_t want = UF_FEATURE_WP, ioctls = 0
    cdef int err
    if foreign_fd >= 0:
        return 0
    if known_way < 0:
        err = uffd_discover()
        if err != 0:
            return err
    if has(UF_FEATURE_WP_ASYNC):
        want |= UF_FEATURE_WP_ASYNC
    elif not has(UF_FEATURE_EXACT_ADDRESS) or not has(UF_FEATURE_WP):
        return -ENOTSUP                     # 5.18: pagemap tells marks (5.13), and MADV_POPULATE_READ (5.14) is there
    elif known_way == UF_WAY_USER:
        return -EPERM
    elif has(UF_FEATURE_WP_UNPOPULATED):
        want |= UF_FEATURE_WP_UNPOPULATED
    if has(UF_FEATURE_WP_HUGETLBFS_SHMEM):
        want |= UF_FEATURE_WP_HUGETLBFS_SHMEM
    if pagemap_fd < 0:
        pagemap_fd = pm_open()
        if pagemap_fd < 0:
            return pagemap_fd
    foreign_fd = uf_open(known_way)
    err = foreign_fd if foreign_fd < 0 else uf_api(foreign_fd, &want, &ioctls)
    if err == 0 and not has(UF_FEATURE_WP_ASYNC):
        err = lift_begin()
    if err != 0:
        foreign_shut()
    return err


cdef void foreign_shut() noexcept nogil:
    """Nothing is registered any more, so nobody waits for the thread."""
    global foreign_fd, pagemap_fd, lift_fd
    if lift_fd >= 0:
        eventfd_raise(lift_fd)
    while u32_load(&lifting):
        futex_wait(&lifting, 1, SLICE_NS)
    if lift_fd >= 0:
        close(lift_fd)
    if foreign_fd >= 0:
        close(foreign_fd)
    if pagemap_fd >= 0:
        close(pagemap_fd)
    lift_fd = foreign_fd = pagemap_fd = -1


cdef int lift_begin() noexcept nogil:
    """The thread is there before anything is protected: to start one, the C library allocates."""
    global lift_fd
    cdef int err
    lift_fd = sys_eventfd()
    if lift_fd < 0:
        return lift_fd
    u32_store(&lifting, 1)
    err = thread_spawn(&lift_main, NULL, b"uffd-track", -1)
    if err != 0:
        u32_store(&lifting, 0)
    return err


cdef void *lift_main(void *unused) noexcept nogil:
    cdef uf_msg message[BATCH]
    cdef pollfd wait_for[2]
    cdef int i, n
    wait_for[0].fd = foreign_fd
    wait_for[0].events = POLLIN
    wait_for[1].fd = lift_fd
    wait_for[1].events = POLLIN
    wait_for[1].revents = 0
    while not wait_for[1].revents:
        poll(wait_for, 2, -1)
        n = uf_read(wait_for[0].fd, message, BATCH)
        for i in range(n):
            if message[i].event == UF_EVENT_PAGEFAULT:
                lift_one(wait_for[0].fd, message[i].address)
    u32_store(&lifting, 0)
    futex_wake_all(&lifting)
    return NULL


cdef void lift_one(int fd, uint64_t address) noexcept nogil:
    """The page, or, of huge pages that can't be split, the least that the kernel takes."""
    cdef uint64_t nbytes = PAGE
    cdef unsigned int tries = 0
    cdef int err = uf_writeprotect(fd, address & ~(nbytes - 1), nbytes, 0)
    while err == -EAGAIN and tries < 1000 or err == -EINVAL and nbytes < <uint64_t>1 << 30:
        if err == -EAGAIN:
            nap(tries)
            tries += 1
        else:
            nbytes *= 2
        err = uf_writeprotect(fd, address & ~(nbytes - 1), nbytes, 0)
    if err != 0:
        uf_wake(fd, address & ~(PAGE - 1), PAGE)        # unmapped or unregistered: it faults again, or goes on


cdef inline uint64_t foreign_span(uint64_t pages) noexcept nogil:
    return PAGE + 2 * page_round((pages + 63) // 64 * 8)


cdef int foreign_begin(uint64_t start, uint64_t end, bint filed, Foreign_t **out) noexcept nogil:
    """Watches the pages of [start, end): all are clean from here on. 0 or -errno: EBUSY where another userfaultfd has
    the memory, ENOTSUP, EINVAL where it is of no kind that the kernel protects, ENOMEM."""
    global foreign_all
    cdef Foreign_t *f
    cdef uint64_t pages = (end - start) // PAGE
    cdef int err
    f = <Foreign_t *>map_lazy(foreign_span(pages), PROT_READ | PROT_WRITE, -1)
    if f == NULL:
        return -ENOMEM
    f.start = start
    f.end = end
    f.bits = <uint64_t *>(<char *>f + PAGE)
    f.there = <uint64_t *>(<char *>f.bits + page_round((pages + 63) // 64 * 8))
    f.filed = filed
    pthread_mutex_lock(&foreign_lock)
    err = foreign_open()
    if err == 0:
        err = foreign_arm(f)
    if err == 0:
        f.next = foreign_all
        foreign_all = f
    elif foreign_all == NULL:
        foreign_shut()
    pthread_mutex_unlock(&foreign_lock)
    if err != 0:
        munmap(f, foreign_span(pages))
        return err
    out[0] = f
    return 0


cdef int foreign_arm(Foreign_t *f) noexcept nogil:
    """Registers and protects; who watches a part of it already gets what was written there until now."""
    cdef uint64_t ioctls = 0
    cdef int err = uf_register(foreign_fd, f.start, f.end - f.start, UF_REGISTER_WP, &ioctls)
    if err != 0:
        return err
    if f.filed or lift_fd >= 0:
        foreign_scan_others(f)
        err = foreign_protect(f, f.start, f.end)
        f.whole = True
        bits_set(f.there, 0, (f.end - f.start) // PAGE)
    else:
        err = foreign_scan(f, True)
    bits_clear(f.bits, 0, (f.end - f.start) // PAGE)
    if err != 0:
        foreign_release(f)
    return err


cdef int foreign_protect(Foreign_t *f, uint64_t start, uint64_t end) noexcept nogil:
    if lift_fd >= 0 and not f.filed and not has(UF_FEATURE_WP_UNPOPULATED) and madvise(<void *>start, end - start, 22):
        return -errno                       # MADV_POPULATE_READ: a hole can't be protected before Linux 6.4
    return uf_writeprotect(foreign_fd, start, end - start, UF_WRITEPROTECT_WP)


cdef void foreign_scan_others(Foreign_t *f) noexcept nogil:
    """Before pages are protected that others watch: what was written is theirs."""
    cdef Foreign_t *g = foreign_all
    while g != NULL:
        if g.start < f.end and f.start < g.end and not g.lost:
            g.lost = foreign_scan(g, True)
        g = g.next


cdef void foreign_release(Foreign_t *f) noexcept nogil:
    """Takes the registration back, but for what others watch. f is in no list."""
    cdef Foreign_t *g
    cdef uint64_t at = f.start, stop
    cdef bint moved
    while at < f.end:
        stop = f.end
        moved = False
        g = foreign_all
        while g != NULL:
            if g.start <= at < g.end:
                at = g.end
                moved = True
            elif at < g.start < stop:
                stop = g.start
            g = g.next
        if not moved:
            if lift_fd >= 0:
                uf_writeprotect(foreign_fd, at, stop - at, 0)       # UNREGISTER would not wake who waits
            uf_unregister(foreign_fd, at, stop - at)
            uf_wake(foreign_fd, at, stop - at)
            at = stop


# ---- scans ------------------------------------------------------------------------------------------------------

cdef int foreign_scan(Foreign_t *f, bint reset) noexcept nogil:
    """Has what was written since the last scan in f.bits, and in those of others who watch it. reset: all is protected
    again; else it will be found again. 0 or -errno: the memory is not what it was. Under foreign_lock."""
    cdef pm_run run[SCAN_RUNS]
    cdef pm_scan_request q
    cdef uint64_t at = f.start, filled = 0
    cdef int n, i, err
    memset(&q, 0, sizeof(q))
    q.flags = PM_SCAN_CHECK | (PM_SCAN_PROTECT if reset else 0)
    q.start = f.start
    q.end = f.end
    q.vec = <uint64_t>&run[0]
    q.vec_len = SCAN_RUNS
    if f.whole:
        q.all_of = PM_WRITTEN
        q.returned = PM_WRITTEN
    else:
        q.any_of = PM_PRESENT | PM_SWAPPED
        q.returned = PM_WRITTEN | PM_ZERO
    while q.start < f.end:
        n = pm_scan(pagemap_fd, &q) if lift_fd < 0 else pm_unmarked(pagemap_fd, &q, PAGE)
        if n < 0:
            return n
        for i in range(n):
            if f.whole:
                foreign_mark(f, run[i].start, run[i].end)
                err = foreign_protect(f, run[i].start, run[i].end) if lift_fd >= 0 and reset else 0
                if err != 0:
                    return err
            else:
                foreign_hole(f, at, run[i].start, reset)
                filled += foreign_seen(f, &run[i], reset)
                at = run[i].end
        if q.walk_end <= q.start:
            return -EFAULT
        q.start = q.walk_end
    if not f.whole:
        foreign_hole(f, at, f.end, reset)
        f.whole = reset and filled == f.end - f.start
    # What was unmapped has no pages to report: seen here. What was mapped anew in its place is not registered, and the
    # scan has answered EPERM.
    return 0 if range_mapped(f.start, f.end - f.start) else -ENOENT


cdef void foreign_hole(Foreign_t *f, uint64_t start, uint64_t end, bint reset) noexcept nogil:
    """[start, end) is empty. What was there was dropped."""
    cdef uint64_t first = (start - f.start) // PAGE, stop = (end - f.start) // PAGE, i
    if start >= end or not bits_any(f.there, first, stop):
        return
    for i in range(first, stop):
        if f.there[i // 64] >> (i % 64) & 1:
            foreign_mark(f, f.start + i * PAGE, f.start + (i + 1) * PAGE)
    if reset:
        bits_clear(f.there, first, stop)


cdef uint64_t foreign_seen(Foreign_t *f, pm_run *run, bint reset) noexcept nogil:
    """A run of pages that are there: bytes of it that are not the kernel's page of zeros."""
    if run.categories & PM_ZERO:
        foreign_hole(f, run.start, run.end, reset)
        return 0
    if run.categories & PM_WRITTEN:
        foreign_mark(f, run.start, run.end)
    if reset:
        bits_set(f.there, (run.start - f.start) // PAGE, (run.end - f.start) // PAGE)
    return run.end - run.start


cdef void foreign_mark(Foreign_t *f, uint64_t start, uint64_t end) noexcept nogil:
    cdef Foreign_t *g = foreign_all
    bits_set(f.bits, (start - f.start) // PAGE, (end - f.start) // PAGE)
    while g != NULL:
        if g != f and start < g.end and g.start < end:
            bits_set(g.bits, (u64_max(start, g.start) - g.start) // PAGE,
                     (u64_min(end, g.end) - g.start) // PAGE)
        g = g.next


# ---- who asks ---------------------------------------------------------------------------------------------------

cdef int64_t foreign_take(Foreign_t *f, bint reset, uint8_t *out) noexcept nogil:
    """Pages written since they were last taken: 1 in out[page] (zero before; or NULL), how many; or -errno when the
    memory was unmapped, moved or mapped anew (ENOENT, EPERM), in a forked child (ECHILD): lost, for good."""
    cdef uint64_t pages = (f.end - f.start) // PAGE
    cdef int64_t n
    pthread_mutex_lock(&foreign_lock)
    if not f.lost:
        f.lost = foreign_scan(f, reset)
    n = f.lost
    if n == 0:
        n = <int64_t>bits_spread(f.bits, 0, pages, reset, out)
    pthread_mutex_unlock(&foreign_lock)
    return n


cdef void foreign_end(Foreign_t *f) noexcept nogil:
    cdef Foreign_t **at = &foreign_all      # of a forked child: it is in the list, and nothing is registered
    pthread_mutex_lock(&foreign_lock)
    while at[0] != NULL and at[0] != f:
        at = &at[0].next
    if at[0] == f:
        at[0] = f.next
        if foreign_fd >= 0:
            foreign_release(f)
        if foreign_all == NULL and foreign_fd >= 0:
            foreign_shut()
    pthread_mutex_unlock(&foreign_lock)
    munmap(f, foreign_span((f.end - f.start) // PAGE))


cdef void foreign_fork_child() noexcept nogil:
    """fork() took the lock. The child's memory is registered nowhere, and the pagemap would be the parent's."""
    global lift_fd
    cdef Foreign_t *f = foreign_all
    pthread_mutex_init(&foreign_lock, NULL)
    u32_store(&lifting, 0)                  # the thread is the parent's, and so is what would end it
    if lift_fd >= 0:
        close(lift_fd)
    lift_fd = -1
    foreign_shut()
    while f != NULL:
        f.lost = -ECHILD
        f = f.next


cdef class ForeignWatch:
    """A range of addresses that is not ours, watched. The public Tracker holds one, and whatever keeps the memory."""
    cdef Foreign_t *f

    def __cinit__(self, uint64_t start, uint64_t end, bint filed):
        cdef int err
        if start >= end or start % PAGE or end % PAGE:
            raise ValueError(f"[{start:#x}, {end:#x}) is no range of whole pages")
        with nogil:
            err = foreign_begin(start, end, filed, &self.f)
        if err != 0:
            raise _os_error(err, "the memory can't be watched")

    def __dealloc__(self):
        self.close()

    def close(self):
        """Idempotent."""
        cdef Foreign_t *f = self.f
        self.f = NULL
        if f != NULL:
            with nogil:
                foreign_end(f)

    def take(self, out, bint reset):
        """How many pages were written, and 1 in out[page]; negative, the errno of why tracking is lost."""
        cdef Foreign_t *f = self.f
        cdef Py_buffer view
        cdef int64_t n
        if f == NULL:
            raise ValueError("the tracker is closed")
        PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
        if <uint64_t>view.len != (f.end - f.start) // PAGE:
            PyBuffer_Release(&view)
            raise ValueError(f"a buffer of {(f.end - f.start) // PAGE} bytes is needed")
        with nogil:
            n = foreign_take(f, reset, <uint8_t *>view.buf)
        PyBuffer_Release(&view)
        return n
