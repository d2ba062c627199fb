# A consistent image of memory that is not ours: its bytes at one instant, written while the program goes on writing.
#
# Uses:     uf_*, pm_scan, thread_start of _sys.h; thread_spawn of _life.pxi; the regions' side of _image.pxi
# Provides: image_start, image_stop, image_abort, image_lift_all; the threads of an image
#
#   SKIPPED                   nothing is there at the instant: zeros. Not protected
#   UNSAVED > SAVING > LIFTED      a first write, or the streamer: copied, protection off
#   UNSAVED > SAVING > KEPT_BLOCK > LIFTED    a series: it stays protected, so the next one knows what is written
#
# The instant is one because no write fault is answered (`gate`) before the last range is protected. Pages that nobody
# has touched are not protected, which would cost page tables: those that appear while the others are protected are
# looked for, and protected, until a look finds none. Then no write that is in the image came after one that is not.
#
# Fault threads (`uffd-snapshot`) and the streamer touch memory of ours alone: mappings that are made before anything is
# protected, and can't be a target. No malloc, no lock that a program's thread can hold while it writes. The program's
# memory is read by the kernel for them (process_vm_readv), so that memory which is gone is an error and no signal.

cdef enum:
    SKIPPED = 0                             # the same
    UNSAVED, SAVING, LIFTED, KEPT_BLOCK
    SAVE_SHIFT = 18                         # of a save-block, 256 KiB: a dense writer pays 2 us per page, 104 at 4 KiB
    STREAM_BLOCKS = 4                       # that the streamer copies at once, if there is memory for them
    FAULT_THREADS = 2
    START_PASSES = 16
    ASIDE_FREE = 0                          # what untouched memory says
    ASIDE_TAKEN = 1
    ASIDE_FULL = 2

cdef struct Part:                           # one array's bytes; sorted by start
    uint64_t start
    uint64_t end
    uint64_t reach                          # the largest end of this and those before
    int64_t offset                          # in the file
    uint64_t index                          # in the caller's list

cdef struct Span:                           # whole pages of memory that is not ours, merged; sorted
    uint64_t start
    uint64_t end
    uint64_t first                          # of its save-blocks in Image_t.state
    uint64_t blocks
    bint filed                              # shared memory: what is there need not be in our page table

cdef struct Aside:                          # a block that was copied for a writer
    uint32_t state
    uint32_t span
    uint64_t block

cdef struct Image_t:
    # constant from making on
    uint64_t bytes                          # of this mapping
    Part *part
    uint64_t parts
    Span *span
    uint64_t spans
    uint8_t *state                          # per save-block, by CAS; SKIPPED is 0
    uint8_t *mine                           # saved in this image; who saves it
    uint64_t blocks
    Aside *aside
    uint32_t asides
    uint64_t buffers                        # bytes of the mapping of both buffers
    uint64_t stream_blocks                  # save-blocks that the streamer copies at once
    uint64_t slot_bytes                     # of each buffer aside: a save-block, or the regions' largest block
    char *aside_bytes
    char *stream_bytes
    RegionPart *region                      # what is ours: _image.pxi
    uint64_t regions
    int uffd
    int stop_fd
    int pid
    bint keep
    # of the image under way
    int fd
    uint32_t gate                           # 1: nobody's write is answered; futex
    uint32_t inside                         # fault threads that passed it and are not done
    uint32_t aborted
    uint32_t done                           # futex: all is written, or it failed
    uint32_t bell                           # futex: the streamer is to look
    uint32_t wanted                         # writers wait for the streamer
    uint32_t threads                        # futex: ours that run
    uint32_t go                             # futex: the streamer is to write an image
    uint32_t ending                         # or to end
    uint32_t streaming                      # futex: it writes one
    uint32_t protected                      # something is, and has to be lifted
    int32_t error                           # the first one
    int32_t lost                            # it was of the memory, not of the file
    uint64_t total_bytes
    uint64_t done_bytes
    uint64_t instant_ns
    uint64_t pause_ns
    uint64_t faults
    uint64_t copied_bytes
    uint64_t waits
    uint64_t streamed_bytes


# ---- blocks -----------------------------------------------------------------------------------------------------

cdef inline uint64_t save_start(Span *p, uint64_t k) noexcept nogil:
    return p.start + (k << SAVE_SHIFT)


cdef inline uint64_t save_end(Span *p, uint64_t k) noexcept nogil:
    return u64_min(p.end, p.start + ((k + 1) << SAVE_SHIFT))


cdef Span *span_at(Image_t *m, uint64_t address) noexcept nogil:
    cdef uint64_t low = 0, high = m.spans, middle
    while low < high:
        middle = (low + high) >> 1
        if address >= m.span[middle].end:
            low = middle + 1
        else:
            high = middle
    if low < m.spans and address >= m.span[low].start:
        return &m.span[low]
    return NULL


cdef inline bint save_claim(Image_t *m, Span *p, uint64_t k) noexcept nogil:
    return u8_cas(&m.state[p.first + k], UNSAVED, SAVING)


cdef inline void save_publish(Image_t *m, Span *p, uint64_t k, uint8_t state) noexcept nogil:
    m.mine[p.first + k] = 1
    u8_cas(&m.state[p.first + k], SAVING, state)


cdef void image_fail(Image_t *m, int err, bint lost) noexcept nogil:
    """The first error is the one that is told; the streamer lifts everything and ends."""
    if u32_cas(<uint32_t *>&m.error, 0, <uint32_t>err):
        m.lost = lost
    u32_store(&m.aborted, 1)
    image_ring(m)


cdef void image_ring(Image_t *m) noexcept nogil:
    u32_store_seq(&m.bell, 1)
    futex_wake_all(&m.bell)


cdef int lift_span(Image_t *m, uint64_t start, uint64_t end) noexcept nogil:
    """Protection off, and who waits there goes on. 0 or -errno; EAGAIN for a second at most."""
    cdef uint64_t deadline = now_ns() + SECOND_NS
    cdef unsigned int tries = 0
    cdef int err = uf_writeprotect(m.uffd, start, end - start, 0)
    while err == -EAGAIN and now_ns() < deadline:
        nap(tries)
        tries += 1
        err = uf_writeprotect(m.uffd, start, end - start, 0)
    if err != 0:
        uf_wake(m.uffd, start, end - start)     # unregistered by who remapped it: then nobody waits, or is let go
    return err


cdef int copy_program(char *target, uint64_t source, uint64_t nbytes) noexcept nogil:
    """The program's bytes; -EFAULT where they are gone. Where process_vm_readv is forbidden (seccomp) they are trusted
    to be there, since the arrays are held."""
    cdef int err = copy_guarded(target, <const char *>source, nbytes)
    if err == -EPERM or err == -ENOSYS:
        memcpy(target, <const char *>source, nbytes)
        err = 0
    return err


# ---- faults -----------------------------------------------------------------------------------------------------

cdef void *snapshot_main(void *argument) noexcept nogil:
    """A fault thread: from when the gate opens until the image is stopped."""
    cdef Image_t *m = <Image_t *>argument
    cdef uf_msg message[BATCH]
    cdef pollfd wait_for[2]
    cdef int i, n
    wait_for[0].fd = m.uffd
    wait_for[0].events = POLLIN
    wait_for[1].fd = m.stop_fd
    wait_for[1].events = POLLIN
    while True:
        while u32_load(&m.gate):
            futex_wait(&m.gate, 1, SECOND_NS)
        wait_for[1].revents = 0
        poll(wait_for, 2, -1)
        if wait_for[1].revents:
            break
        if u32_load(&m.gate):
            continue                        # the next image of a series begins: its faults wait
        n = uf_read(m.uffd, message, BATCH)
        for i in range(n):
            if message[i].event == UF_EVENT_PAGEFAULT:
                gate_enter(m)
                save_fault(m, message[i].address)
                u32_sub(&m.inside, 1)
    u32_sub(&m.threads, 1)
    futex_wake_all(&m.threads)
    return NULL


cdef void gate_enter(Image_t *m) noexcept nogil:
    """Dekker with image_start, which closes the gate and waits until nobody is inside."""
    while True:
        u32_add_seq(&m.inside, 1)
        if u32_load_seq(&m.gate) == 0:
            return
        u32_sub(&m.inside, 1)
        futex_wait(&m.gate, 1, SECOND_NS)


cdef void save_fault(Image_t *m, uint64_t address) noexcept nogil:
    """Somebody writes to a protected page. Its block's state decides; whoever saves it lets the writer go."""
    cdef Span *p = span_at(m, address)
    cdef uint64_t k
    cdef uint8_t state
    if p == NULL:
        return
    k = (address - p.start) >> SAVE_SHIFT
    u64_add(&m.faults, 1)
    while True:
        state = u8_load(&m.state[p.first + k])
        if state == SAVING:
            return                          # it lifts the protection when it is done, after it has changed the state
        if state == UNSAVED:
            if save_aside(m, p, k):
                return
        elif state != KEPT_BLOCK or u8_cas(&m.state[p.first + k], KEPT_BLOCK, LIFTED):
            lift_span(m, save_start(p, k), save_end(p, k))
            return


cdef bint save_aside(Image_t *m, Span *p, uint64_t k) noexcept nogil:
    """Copies an unsaved block for its writer; False: its state has changed. Without room the writer waits for the
    streamer, which has the disk."""
    cdef uint32_t a = aside_take(m)
    cdef uint64_t nbytes = save_end(p, k) - save_start(p, k)
    cdef int err
    if a == m.asides:
        u64_add(&m.waits, 1)
        u32_store_seq(&m.wanted, 1)
        u8_cas(&m.mine[p.first + k], 0, 2)  # asked for
        image_ring(m)
        return u8_load(&m.state[p.first + k]) == UNSAVED or u8_load(&m.state[p.first + k]) == SAVING
    if not save_claim(m, p, k):
        u32_store(&m.aside[a].state, ASIDE_FREE)
        return False
    err = copy_program(m.aside_bytes + <uint64_t>a * m.slot_bytes, save_start(p, k), nbytes)
    if err != 0:
        u32_store(&m.aside[a].state, ASIDE_FREE)
        save_publish(m, p, k, LIFTED)
        lift_span(m, save_start(p, k), save_end(p, k))
        image_fail(m, err, True)
        return True
    m.aside[a].span = <uint32_t>(p - m.span)
    m.aside[a].block = k
    u64_add(&m.copied_bytes, nbytes)
    save_publish(m, p, k, LIFTED)
    lift_span(m, save_start(p, k), save_end(p, k))
    u32_store(&m.aside[a].state, ASIDE_FULL)
    image_ring(m)
    return True


cdef uint32_t aside_take(Image_t *m) noexcept nogil:
    cdef uint32_t a
    for a in range(m.asides):
        if u32_load(&m.aside[a].state) == ASIDE_FREE and u32_cas(&m.aside[a].state, ASIDE_FREE, ASIDE_TAKEN):
            return a
    return m.asides


# ---- the streamer -----------------------------------------------------------------------------------------------

cdef void *streamer_main(void *argument) noexcept nogil:
    """Writes one image after the other, of a series. It is there before anything is protected: to start a thread, the C
    library allocates."""
    cdef Image_t *m = <Image_t *>argument
    while True:
        if u32_swap(&m.go, 0) and u32_load(&m.streaming):
            stream_image(m)                 # one that was asked for, even if it is only to be ended
        elif u32_load(&m.ending):
            break
        else:
            futex_wait(&m.go, 0, SECOND_NS)
    u32_sub(&m.threads, 1)
    futex_wake_all(&m.threads)
    return NULL


cdef void stream_image(Image_t *m) noexcept nogil:
    """First what was copied for writers, then what they wait for, then the rest in large runs."""
    cdef Span *p
    cdef uint64_t i, k
    for i in range(m.spans):
        p = &m.span[i]
        k = 0
        while k < p.blocks and not u32_load(&m.aborted):
            drain(m)
            k = stream_run(m, p, k)
    for i in range(m.regions):
        region_stream(m, &m.region[i])
    while not u32_load(&m.aborted) and not all_saved(m):
        u32_store_seq(&m.bell, 0)
        drain(m)
        if not all_saved(m):
            futex_wait(&m.bell, 0, SLICE_NS)
    drain(m)
    if not spans_mapped(m):
        image_fail(m, -ENOENT, True)
    if u32_load(&m.aborted):
        image_lift_all(m)
    u32_store(&m.streaming, 0)              # first: who sees `done` may begin the next image
    futex_wake_all(&m.streaming)
    u32_store(&m.done, 1)
    futex_wake_all(&m.done)


cdef bint spans_mapped(Image_t *m) noexcept nogil:
    """What is not mapped any more has no pages that could be missed."""
    cdef uint64_t i
    for i in range(m.spans):
        if not range_mapped(m.span[i].start, m.span[i].end - m.span[i].start):
            return False
    return True


cdef bint all_saved(Image_t *m) noexcept nogil:
    """Nothing is copied and not written, nor being copied at this moment."""
    cdef uint32_t a
    cdef uint64_t i
    for i in range(m.blocks):
        if u8_load(&m.state[i]) == UNSAVED or u8_load(&m.state[i]) == SAVING:
            return False
    for a in range(m.asides):
        if u32_load(&m.aside[a].state) != ASIDE_FREE:
            return False
    return regions_saved(m)


cdef void drain(Image_t *m) noexcept nogil:
    """What was copied aside is written, and blocks are saved that writers wait for, until there are none."""
    cdef uint32_t a
    cdef uint64_t i, k
    cdef Aside *s
    for a in range(m.asides):
        s = &m.aside[a]
        if u32_load(&s.state) == ASIDE_FULL:
            if s.span & REGION_ASIDE:
                region_write_aside(m, s, m.aside_bytes + <uint64_t>a * m.slot_bytes)
            else:
                write_blocks(m, &m.span[s.span], s.block, s.block + 1, m.aside_bytes + <uint64_t>a * m.slot_bytes)
            u32_store(&s.state, ASIDE_FREE)
    if u32_load_seq(&m.wanted) and u32_swap(&m.wanted, 0):
        for i in range(m.spans):
            for k in range(m.span[i].blocks):
                if u8_load(&m.mine[m.span[i].first + k]) == 2:
                    stream_blocks(m, &m.span[i], k, k + 1)
        regions_wanted(m)


cdef uint64_t stream_run(Image_t *m, Span *p, uint64_t k) noexcept nogil:
    """The next run of unsaved blocks from k on; where to go on."""
    cdef uint64_t stop
    while k < p.blocks and u8_load(&m.state[p.first + k]) != UNSAVED:
        k += 1
    stop = k
    while stop < p.blocks and stop < k + m.stream_blocks and u8_load(&m.state[p.first + stop]) == UNSAVED:
        stop += 1
    if stop > k:
        stream_blocks(m, p, k, stop)
    return stop


cdef void stream_blocks(Image_t *m, Span *p, uint64_t k, uint64_t stop) noexcept nogil:
    """Claims, copies, lets go (or keeps protected) and writes blocks [k, stop), those that are unsaved still."""
    cdef uint64_t n = 0
    cdef int err
    while k + n < stop and n < m.stream_blocks and save_claim(m, p, k + n):
        n += 1
    if n == 0:
        return
    err = copy_program(m.stream_bytes, save_start(p, k), save_end(p, k + n - 1) - save_start(p, k))
    stop = k + n
    while n:
        n -= 1
        save_publish(m, p, k + n, KEPT_BLOCK if m.keep and u8_load(&m.mine[p.first + k + n]) != 2 else LIFTED)
    release_run(m, p, k, stop)
    if err != 0:
        image_fail(m, err, True)
        return
    write_blocks(m, p, k, stop, m.stream_bytes)


cdef void release_run(Image_t *m, Span *p, uint64_t k, uint64_t stop) noexcept nogil:
    """The blocks were saved: their protection goes, or, in a series, who waits asks again and lifts it by a fault."""
    cdef int err
    if m.keep:
        while k < stop:
            if u8_load(&m.state[p.first + k]) == LIFTED:
                lift_span(m, save_start(p, k), save_end(p, k))
            else:
                uf_wake(m.uffd, save_start(p, k), save_end(p, k) - save_start(p, k))
            k += 1
        return
    err = lift_span(m, save_start(p, k), save_end(p, stop - 1))
    if err != 0:
        image_fail(m, err, True)


cdef void write_blocks(Image_t *m, Span *p, uint64_t k, uint64_t stop, const char *bytes) noexcept nogil:
    """Copied blocks [k, stop) go to the file, array by array."""
    write_parts(m, save_start(p, k), save_end(p, stop - 1), bytes)
    u64_add(&m.done_bytes, save_end(p, stop - 1) - save_start(p, k))


cdef void write_parts(Image_t *m, uint64_t start, uint64_t end, const char *bytes) noexcept nogil:
    """The bytes of addresses [start, end) to wherever arrays have them in the file."""
    cdef uint64_t low = 0, high = m.parts, middle, a, b
    while low < high:                       # the first that reaches beyond start
        middle = (low + high) >> 1
        if m.part[middle].reach > start:
            high = middle
        else:
            low = middle + 1
    while low < m.parts and m.part[low].start < end:
        a = u64_max(start, m.part[low].start)
        b = u64_min(end, m.part[low].end)
        if a < b:
            write_file(m, bytes + (a - start), b - a, m.part[low].offset + <int64_t>(a - m.part[low].start))
        low += 1


cdef void write_file(Image_t *m, const char *bytes, uint64_t nbytes, int64_t offset) noexcept nogil:
    cdef uint64_t at = 0
    cdef int64_t n
    while at < nbytes and not u32_load(&m.aborted):
        n = pwrite(m.fd, bytes + at, nbytes - at, offset + <int64_t>at)
        if n > 0:
            at += <uint64_t>n
            u64_add(&m.streamed_bytes, <uint64_t>n)
        elif n == 0 or errno != EINTR:
            image_fail(m, -errno if n < 0 else -EIO, False)


# ---- start and end ----------------------------------------------------------------------------------------------

cdef int image_open(Image_t *m) noexcept nogil:
    """The userfaultfd, all spans registered with it, and the fault threads behind the gate. 0 or -errno."""
    cdef uint64_t want = UF_FEATURE_WP, ioctls = 0, i
    cdef int err
    m.uffd = -1
    m.stop_fd = -1
    u32_store(&m.gate, 1)
    if m.spans == 0:
        return image_thread(m, &streamer_main, b"uffd-streamer")
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


cdef int image_protect(Image_t *m) noexcept nogil:
    """All that is there is protected when this returns. 0 or -errno. Of a series, what was written since."""
    cdef uint64_t i, k, run
    cdef Span *p
    cdef int err = 0
    for i in range(m.spans):
        p = &m.span[i]
        k = 0
        while k < p.blocks and err == 0:
            run = k
            while k < p.blocks and (u8_load(&m.state[p.first + k]) == LIFTED or
                                    p.filed and u8_load(&m.state[p.first + k]) == SKIPPED):
                u8_set(&m.state[p.first + k], UNSAVED)
                k += 1
            if k > run:
                err = protect_blocks(m, p, run, k)
            else:
                k += 1
    return err if err != 0 else protect_new(m)


cdef inline void u8_set(uint8_t *p, uint8_t v) noexcept nogil:
    """While the gate is closed nobody else changes it but by the same value."""
    u8_cas(p, u8_load(p), v)


cdef int protect_blocks(Image_t *m, Span *p, uint64_t k, uint64_t stop) noexcept nogil:
    cdef uint64_t start = save_start(p, k), len = save_end(p, stop - 1) - start
    u32_store(&m.protected, 1)
    if not has(UF_FEATURE_WP_UNPOPULATED) and not p.filed and madvise(<void *>start, len, 22) != 0:
        return -errno                       # MADV_POPULATE_READ: a hole can't be protected before Linux 6.4
    return uf_writeprotect(m.uffd, start, len, UF_WRITEPROTECT_WP)


cdef int protect_new(Image_t *m) noexcept nogil:
    """Of the blocks that were empty, those with pages by now, again and again until there are none: see the head."""
    cdef uint32_t turn
    cdef uint64_t found = 1, i
    cdef int err = 0, pagemap = pm_open()
    for turn in range(<uint32_t>START_PASSES):
        if found == 0 or err != 0:
            break
        found = 0
        for i in range(m.spans):
            if err == 0 and turn + 1 < START_PASSES and pagemap >= 0:
                err = protect_populated(m, &m.span[i], pagemap, &found)
            if err == -ENOTTY or err == -EINVAL or err == 0 and (turn + 1 == START_PASSES or pagemap < 0):
                err = protect_skipped(m, &m.span[i])    # no PAGEMAP_SCAN, or a program that goes on filling: all
    if pagemap >= 0:
        close(pagemap)
    return err


cdef int protect_skipped(Image_t *m, Span *p) noexcept nogil:
    cdef uint64_t k = 0, run
    cdef int err = 0
    while k < p.blocks and err == 0:
        run = k
        while k < p.blocks and u8_load(&m.state[p.first + k]) == SKIPPED:
            u8_set(&m.state[p.first + k], UNSAVED)
            k += 1
        if k > run:
            err = protect_blocks(m, p, run, k)
        else:
            k += 1
    return err


cdef int protect_populated(Image_t *m, Span *p, int pagemap, uint64_t *found) noexcept nogil:
    """One look at a span's skipped blocks."""
    cdef uint64_t k = 0, run
    cdef int err = 0
    while k < p.blocks and err == 0:
        run = k
        while k < p.blocks and u8_load(&m.state[p.first + k]) == SKIPPED:
            k += 1
        if k > run:
            err = protect_found(m, p, run, k, pagemap, found)
        else:
            k += 1
    return err


cdef int protect_found(Image_t *m, Span *p, uint64_t k, uint64_t stop, int pagemap, uint64_t *found) noexcept nogil:
    cdef pm_run run[SCAN_RUNS]
    cdef pm_scan_request q
    cdef uint64_t first = k, end = k, a, b
    cdef int i, n, err = 0
    memset(&q, 0, sizeof(q))
    q.start = save_start(p, k)
    q.end = save_end(p, stop - 1)
    q.vec = <uint64_t>&run[0]
    q.vec_len = SCAN_RUNS
    q.any_of = PM_PRESENT | PM_SWAPPED
    q.returned = PM_PRESENT                 # runs are merged where this is alike
    while q.start < q.end and err == 0:
        n = pm_scan(pagemap, &q)
        if n < 0:
            return n
        for i in range(n):
            a = (run[i].start - p.start) >> SAVE_SHIFT
            b = ((run[i].end - 1 - p.start) >> SAVE_SHIFT) + 1
            if a > end:
                err = err if err != 0 else found_blocks(m, p, first, end, found)
                first = a
            elif first == end:
                first = a
            end = b
        if q.walk_end <= q.start:
            return -EFAULT
        q.start = q.walk_end
    return err if err != 0 else found_blocks(m, p, first, end, found)


cdef int found_blocks(Image_t *m, Span *p, uint64_t first, uint64_t end, uint64_t *found) noexcept nogil:
    cdef uint64_t k
    if first == end:
        return 0
    found[0] += end - first
    for k in range(first, end):
        u8_set(&m.state[p.first + k], UNSAVED)
    return protect_blocks(m, p, first, end)


cdef int image_start(Image_t *m) noexcept nogil:
    """Protects everything; the instant is when the last is. Writers that wait go on. 0 or -errno, and then nothing is
    protected. The streamer runs from here on, until `done`."""
    cdef uint64_t t0 = now_ns()
    cdef int err
    u32_store_seq(&m.gate, 1)
    while u32_load_seq(&m.inside):
        sched_yield()                       # a copy of one block at the most
    err = regions_protect(m)
    if err == 0:
        err = image_protect(m)
    m.instant_ns = real_ns()
    if err == 0 and not spans_mapped(m):
        err = -ENOENT
    if err == 0:
        count_image(m)
        u32_store(&m.streaming, 1)
    else:
        image_lift_all(m)
    u32_store_seq(&m.gate, 0)
    regions_open(m)
    m.pause_ns = now_ns() - t0
    futex_wake_all(&m.gate)
    if err == 0:
        u32_store(&m.go, 1)                 # after the gate: the streamer would take this thread's CPU
        futex_wake_all(&m.go)
    return err


cdef void count_image(Image_t *m) noexcept nogil:
    cdef uint64_t i, k
    for i in range(m.spans):
        for k in range(m.span[i].blocks):
            if u8_load(&m.state[m.span[i].first + k]) == UNSAVED:
                m.total_bytes += save_end(&m.span[i], k) - save_start(&m.span[i], k)
    m.total_bytes += regions_total(m)


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
    at `aborted` after each write."""
    cdef uint64_t i
    u32_store(&m.aborted, 1)
    u32_store(&m.ending, 1)
    u32_store_seq(&m.gate, 0)
    futex_wake_all(&m.gate)
    image_ring(m)
    while u32_load(&m.streaming):
        futex_wait(&m.streaming, 1, SLICE_NS)
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
    m.uffd = -1
    m.stop_fd = -1
