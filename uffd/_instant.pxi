# An image's instant: everything is protected while no write is answered. And its end: nothing is.
#
# Uses:     the data and threads of _snapshot.pxi; the regions' side of _image.pxi; thread_spawn of _life.pxi
# Provides: image_open, image_start, image_stop, image_lift_all, image_forget; protect_help for fault threads that wait
#
# The instant is one because no write fault is answered (`gate`) before the last range is protected. Pages that nobody
# has touched are not protected, which would cost page tables: those that appear while the others are protected are
# looked for, and protected, until a look finds none. Then no write that is in the image came after one that is not.
#
# A first look, before the gate is closed, spares the pause most of the looking: SKIPPED blocks with pages turn LIFTED,
# which is what has to be protected. Protecting takes the kernel a while on small pages: so it is done in pieces, which
# the fault threads take, too. A piece grows as long as the kernel is quick with it (huge pages).

cdef enum:
    GATE_OPEN = 0
    GATE_CLOSED
    GATE_HELP                               # closed, and there are pieces to protect
    LOOKS = 16
    FIRST_PIECE = 128                       # save-blocks: 32 MiB
    QUICK_NS = 300000


# ---- before it --------------------------------------------------------------------------------------------------

cdef int image_open(Image_t *m) noexcept nogil:
    """The userfaultfd, all spans registered with it, and the fault threads behind the gate. 0 or -errno."""
    cdef uint64_t want = UF_FEATURE_WP, ioctls = 0, i
    cdef int err
    u32_store(&m.gate, GATE_CLOSED)
    if m.spans == 0:
        return image_thread(m, &streamer_main, b"uffd-streamer")
    if known_way < 0:
        err = uffd_discover()
        if err != 0:
            return err
    if known_way == UF_WAY_USER:
        return -EPERM
    for i in range(m.spans):
        if m.span[i].filed:
            want |= UF_FEATURE_WP_HUGETLBFS_SHMEM
    if has(UF_FEATURE_WP_UNPOPULATED):
        want |= UF_FEATURE_WP_UNPOPULATED
    m.uffd = uf_open(known_way)
    if m.uffd < 0:
        return m.uffd
    err = uf_api(m.uffd, &want, &ioctls)
    for i in range(m.spans):
        if err == 0:
            err = uf_register(m.uffd, m.span[i].start, m.span[i].end - m.span[i].start, UF_REGISTER_WP, &ioctls)
        if err != 0:
            m.spans = i                     # the rest may be another's, whose registration UNREGISTER would end
            return err
    m.pagemap = pm_open()
    m.stop_fd = sys_eventfd()
    if m.stop_fd < 0:
        return m.stop_fd
    for i in range(FAULT_THREADS):
        if err == 0:
            err = image_thread(m, &snapshot_main, b"uffd-snapshot")
    return err if err != 0 else image_thread(m, &streamer_main, b"uffd-streamer")


cdef int image_thread(Image_t *m, void *(*run)(void *) noexcept nogil, const char *name) noexcept nogil:
    cdef int err
    u32_add(&m.threads, 1)
    err = thread_spawn(run, m, name, -1)
    if err != 0:
        u32_sub(&m.threads, 1)
    return err


cdef int image_start(Image_t *m) noexcept nogil:
    """Protects everything; the instant is when the last is. Writers that wait go on. 0 or -errno, and then nothing is
    protected. The streamer runs from here on, until `done`."""
    cdef uint64_t t0, found = 0
    cdef int err
    m.total_bytes = 0
    look(m, False, &found)                  # an error comes again in the pause
    kept_check(m, True)
    t0 = now_ns()
    gate_close(m)
    err = regions_protect(m)
    if err == 0:
        err = image_protect(m)
    m.instant_ns = real_ns()
    if err == 0 and not spans_mapped(m):
        err = -ENOENT
    if err == 0:
        m.total_bytes += regions_total(m)
        u32_store(&m.streaming, 1)
    else:
        image_lift_all(m)
    u32_store_seq(&m.gate, GATE_OPEN)
    regions_open(m)
    m.pause_ns = now_ns() - t0
    futex_wake_all(&m.gate)
    if err == 0:
        u32_store(&m.go, 1)                 # after the gate: the streamer would take this thread's CPU
        futex_wake_all(&m.go)
    return err


# ---- the pause --------------------------------------------------------------------------------------------------

cdef int image_protect(Image_t *m) noexcept nogil:
    """All that is there is protected when this returns. 0 or -errno. Of a series, what was written since."""
    cdef uint32_t turn
    cdef uint64_t found = 1
    cdef int err = protect_lifted(m)
    for turn in range(<uint32_t>LOOKS):
        if found == 0 or err != 0:
            break
        found = 0
        err = look(m, turn + 1 == LOOKS, &found)
        if err == 0 and found:
            err = protect_lifted(m)
    return err


cdef int protect_lifted(Image_t *m) noexcept nogil:
    """LIFTED blocks are protected and UNSAVED, by this thread and those at the gate. 0 or -errno."""
    cdef uint64_t t0 = now_ns()
    cdef uint32_t n
    m.piece_error = 0
    u64_store(&m.piece_at, 0)
    u64_store(&m.piece_blocks, FIRST_PIECE)
    if not protect_next(m):
        return m.piece_error
    if now_ns() - t0 > QUICK_NS:
        u32_store_seq(&m.gate, GATE_HELP)
        futex_wake_all(&m.gate)
    while protect_next(m):
        pass
    u32_store_seq(&m.gate, GATE_CLOSED)     # Dekker with protect_help
    n = u32_load_seq(&m.helping)
    while n:
        futex_wait(&m.helping, n, SLICE_NS)
        n = u32_load_seq(&m.helping)
    return m.piece_error


cdef void protect_help(Image_t *m) noexcept nogil:
    """A fault thread at the gate."""
    u32_add_seq(&m.helping, 1)
    while u32_load_seq(&m.gate) == GATE_HELP and protect_next(m):
        pass
    u32_sub(&m.helping, 1)
    futex_wake_all(&m.helping)


cdef bint protect_next(Image_t *m) noexcept nogil:
    """The next piece; False: there was none, or a piece has failed."""
    cdef uint64_t n = u64_load(&m.piece_blocks), t0 = now_ns(), at
    cdef int err
    if u32_load(<uint32_t *>&m.piece_error):
        return False
    at = u64_add(&m.piece_at, n)
    if at >= m.blocks:
        return False
    err = protect_piece(m, at, u64_min(at + n, m.blocks))
    if err != 0:
        u32_cas(<uint32_t *>&m.piece_error, 0, <uint32_t>err)
    elif now_ns() - t0 < QUICK_NS:
        u64_store(&m.piece_blocks, 2 * n)
    return True


cdef int protect_piece(Image_t *m, uint64_t at, uint64_t end) noexcept nogil:
    """Save-blocks [at, end) of all spans together. Nobody else has them while the gate is closed."""
    cdef uint64_t i = span_of_block(m, at), k, run, stop
    cdef Span *p
    cdef int err = 0
    while i < m.spans and m.span[i].first < end and err == 0:
        p = &m.span[i]
        k = at - p.first if at > p.first else 0
        stop = u64_min(p.blocks, end - p.first)
        while k < stop and err == 0:
            run = k
            while k < stop and m.state[p.first + k] == LIFTED:
                m.state[p.first + k] = UNSAVED
                k += 1
            if k > run:
                err = protect_blocks(m, p, run, k)
            else:
                k += 1
        i += 1
    return err


cdef uint64_t span_of_block(Image_t *m, uint64_t block) noexcept nogil:
    cdef uint64_t low = 0, high = m.spans, middle
    while low < high:                       # the first that ends behind it
        middle = (low + high) >> 1
        if m.span[middle].first + m.span[middle].blocks <= block:
            low = middle + 1
        else:
            high = middle
    return low


cdef int protect_blocks(Image_t *m, Span *p, uint64_t k, uint64_t stop) noexcept nogil:
    cdef uint64_t start = save_start(p, k), len = save_end(p, stop - 1) - start
    u64_add(&m.total_bytes, len)
    if not has(UF_FEATURE_WP_UNPOPULATED) and not p.filed and madvise(<void *>start, len, 22) != 0:
        return -errno                       # MADV_POPULATE_READ: a hole can't be protected before Linux 6.4
    return uf_writeprotect(m.uffd, start, len, UF_WRITEPROTECT_WP)


# ---- looking ----------------------------------------------------------------------------------------------------

cdef int look(Image_t *m, bint all, uint64_t *found) noexcept nogil:
    """SKIPPED blocks with pages turn LIFTED, and are counted. All do where that can't be seen: shared memory (what is
    there need not be in our page table), no PAGEMAP_SCAN; or when asked for, since a program goes on filling holes."""
    cdef uint64_t i, k, run
    cdef Span *p
    cdef bint blind
    cdef int err = 0
    for i in range(m.spans):
        p = &m.span[i]
        blind = all or p.filed or m.pagemap < 0 or not has(UF_FEATURE_WP_ASYNC)
        k = 0
        while k < p.blocks and err == 0:
            run = k
            while k < p.blocks and m.state[p.first + k] == SKIPPED:
                k += 1
            if k == run:
                k += 1
            elif blind:
                found_blocks(m, p, run, k, found)
            else:
                err = look_there(m, p, run, k, found)
    return err


cdef int look_there(Image_t *m, Span *p, uint64_t k, uint64_t stop, uint64_t *found) noexcept nogil:
    cdef pm_run run[SCAN_RUNS]
    cdef pm_scan_request q
    cdef int i, n
    memset(&q, 0, sizeof(q))
    q.start = save_start(p, k)
    q.end = save_end(p, stop - 1)
    q.vec = <uint64_t>&run[0]
    q.vec_len = SCAN_RUNS
    q.any_of = PM_PRESENT | PM_SWAPPED
    q.returned = PM_PRESENT                 # runs are merged where this is alike
    while q.start < q.end:
        n = pm_scan(m.pagemap, &q)
        if n < 0:
            return n
        for i in range(n):
            found_blocks(m, p, (run[i].start - p.start) >> SAVE_SHIFT, ((run[i].end - 1 - p.start) >> SAVE_SHIFT) + 1,
                         found)
        if q.walk_end <= q.start:
            return -EFAULT
        q.start = q.walk_end
    return 0


cdef void found_blocks(Image_t *m, Span *p, uint64_t first, uint64_t end, uint64_t *found) noexcept nogil:
    """Nobody else changes a block that is SKIPPED."""
    cdef uint64_t k
    for k in range(first, end):
        if m.state[p.first + k] == SKIPPED:
            m.state[p.first + k] = LIFTED
            found[0] += 1


cdef bint kept_check(Image_t *m, bint mend) noexcept nogil:
    """Whether all that a series keeps protected is as it was saved: pages that the program dropped have no protection
    any more. mend: they count as written, before the gate is closed. (Between that and the instant more may go, so the
    streamer looks once more: an image that may lack those has failed.)"""
    cdef uint64_t i, k, run
    cdef Span *p
    for i in range(m.spans):
        p = &m.span[i]
        k = 0
        while k < p.blocks:
            run = k
            while k < p.blocks and u8_load(&m.state[p.first + k]) == KEPT_BLOCK:
                k += 1
            if k == run:
                k += 1
            elif not still_marked(m, save_start(p, run), save_end(p, k - 1)) and not kept_blocks(m, p, run, k, mend):
                return False
    return True


cdef bint kept_blocks(Image_t *m, Span *p, uint64_t k, uint64_t stop, bint mend) noexcept nogil:
    """One by one. A writer's fault turns the state first, and lifts then: so a block that is KEPT_BLOCK still, after it
    was found without protection, was not lifted."""
    while k < stop:
        if not still_marked(m, save_start(p, k), save_end(p, k)) and u8_load(&m.state[p.first + k]) == KEPT_BLOCK:
            if not mend:
                return False
            u8_cas(&m.state[p.first + k], KEPT_BLOCK, LIFTED)
        k += 1
    return True


cdef bint spans_mapped(Image_t *m) noexcept nogil:
    """What is not mapped any more has no pages that could be missed."""
    cdef uint64_t i
    for i in range(m.spans):
        if not range_mapped(m.span[i].start, m.span[i].end - m.span[i].start):
            return False
    return True


# ---- the end ----------------------------------------------------------------------------------------------------

cdef void image_lift_all(Image_t *m) noexcept nogil:
    """No block is protected any more, and nobody waits. What a series had kept is written since, for all it knows."""
    cdef uint64_t i, k
    cdef uint8_t state
    for i in range(m.spans):
        for k in range(m.span[i].first, m.span[i].first + m.span[i].blocks):
            state = u8_load(&m.state[k])
            while (state == UNSAVED or state == KEPT_BLOCK) and not u8_cas(&m.state[k], state, LIFTED):
                state = u8_load(&m.state[k])
        lift_span(m, m.span[i].start, m.span[i].end)
    regions_lift(m)


cdef void image_stop(Image_t *m) noexcept nogil:
    """The end: threads, registrations (which lets go whoever waits), descriptors. Waits for the streamer, which looks
    at `aborted` after each write and each block, or is given up."""
    cdef uint64_t i
    u32_store(&m.aborted, 1)
    u32_store(&m.ending, 1)
    u32_store_seq(&m.gate, GATE_OPEN)
    futex_wake_all(&m.gate)
    image_ring(m)
    while u32_load(&m.streaming):
        futex_wait(&m.streaming, 1, SLICE_NS)
        image_give_up(m)
    if m.uffd >= 0:
        for i in range(m.spans):
            lift_span(m, m.span[i].start, m.span[i].end)
            uf_unregister(m.uffd, m.span[i].start, m.span[i].end - m.span[i].start)
    if m.stop_fd >= 0:
        eventfd_raise(m.stop_fd)
    u32_store(&m.go, 1)
    futex_wake_all(&m.go)
    while u32_load(&m.threads):
        futex_wait(&m.threads, u32_load(&m.threads), SLICE_NS)
    regions_close(m)
    image_forget(m)


cdef void image_forget(Image_t *m) noexcept nogil:
    """The descriptors; in a forked child, which has none of the threads, all that there is to do."""
    if m.uffd >= 0:
        close(m.uffd)
    if m.stop_fd >= 0:
        close(m.stop_fd)
    if m.pagemap >= 0:
        close(m.pagemap)
    m.uffd = m.stop_fd = m.pagemap = -1
