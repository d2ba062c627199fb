# A consistent image of memory that is not ours: its bytes at one instant, written while the program goes on writing.
#
# Uses:     uf_*, pm_* of _sys.h; the pause, and the end, of _instant.pxi; the regions' side of _image.pxi
# Provides: the threads of an image and what they share with all others
#
#   SKIPPED                   nothing is there at the instant: zeros. Not protected
#   UNSAVED > SAVING > LIFTED      a first write: copied aside, protection off
#   UNSAVED > WRITTEN > SAVING > LIFTED       the streamer writes it from where it is, then takes the protection off
#             WRITTEN > SAVING > LIFTED       a first write meanwhile: copied aside like any other, and written again
#   ... > SAVING > KEPT_BLOCK > LIFTED        a series: it stays protected, so the next one knows what is written
#
# A page that the program drops (madvise) loses its protection with its bytes: so what was copied, or written, counts
# only if it is protected still afterwards. Else the image has failed: its bytes of the instant are nowhere.
#
# Fault threads (`uffd-snapshot`) and the streamer touch memory of ours alone: mappings that are made before anything is
# protected, and can't be a target. No malloc, no lock that a program's thread can hold while it writes. The program's
# memory is read by the kernel for them (pwrite, process_vm_readv), so that memory which is gone is an error and no
# signal.

cdef enum:
    SKIPPED = 0                             # the same
    UNSAVED, SAVING, LIFTED, KEPT_BLOCK, WRITTEN
    SAVE_SHIFT = 18                         # of a save-block, 256 KiB: a dense writer pays 2 us per page, 104 at 4 KiB
    STREAM_BLOCKS = 4                       # that the streamer saves at once
    FAULT_THREADS = 2
    AHEAD_BLOCKS = 8                        # that are saved for a writer who goes through memory, at the most
    AHEAD_REACH = 64                        # who writes so few blocks behind the last ones does that: some were saved
    WRITERS_SEEN = 8                        # of them that are told apart
    ASIDE_FREE = 0                          # what untouched memory says
    ASIDE_TAKEN = 1
    ASIDE_FULL = 2
    FILLING_NOT = 0
    FILLING_BUSY = 1
    FILLING_GIVEN_UP = 2                    # the streamer is lost in it; the image is over, without it
    FILLING_LEFT = 3                        # and all is done that has to be for that

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
    uint64_t slot_bytes                     # of each buffer aside: a save-block, or the regions' largest block
    char *aside_bytes
    char *stream_bytes                      # the streamer's, for a block of a region
    RegionPart *region                      # what is ours: _image.pxi
    uint64_t regions
    int uffd
    int stop_fd
    int pagemap                             # or -1: then nobody sees that pages were dropped
    int pid
    bint keep
    # of the image under way
    int fd
    uint32_t gate                           # but for GATE_OPEN nobody's write is answered; futex
    uint32_t inside                         # fault threads that passed it and are not done
    uint32_t aborted
    uint32_t done                           # futex: all is written, or it failed
    uint32_t bell                           # futex: the streamer is to look
    uint32_t wanted                         # writers wait for the streamer
    uint32_t filling                        # FILLING_NOT, or the streamer is in a provider's function, of:
    Slot *filling_slot
    Region_t *filling_region
    uint64_t filling_block
    uint32_t threads                        # futex: ours that run
    uint32_t go                             # futex: the streamer is to write an image
    uint32_t ending                         # or to end
    uint32_t streaming                      # futex: it writes one
    uint32_t helping                        # futex: fault threads that protect pieces
    uint64_t piece_at                       # save-blocks up to here were taken by who protects them
    uint64_t piece_blocks                   # of the next piece
    int32_t piece_error                     # the first one
    int32_t error                           # the first one
    int32_t lost                            # it was of the memory, not of the file
    uint64_t total_bytes
    uint64_t done_bytes
    uint64_t instant_ns
    uint64_t pause_ns
    uint64_t going[WRITERS_SEEN]            # writers that go through memory: the next block << 8 | how many were saved
    uint32_t going_turn
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
    """For a writer."""
    return u8_cas(&m.state[p.first + k], UNSAVED, SAVING) or u8_cas(&m.state[p.first + k], WRITTEN, SAVING)


cdef inline bint is_unsaved(uint8_t state) noexcept nogil:
    return state == UNSAVED or state == SAVING or state == WRITTEN


cdef inline void save_publish(Image_t *m, Span *p, uint64_t k, uint8_t state) noexcept nogil:
    m.mine[p.first + k] = 1
    u8_cas(&m.state[p.first + k], SAVING, state)


cdef void image_fail(Image_t *m, int err, bint lost) noexcept nogil:
    """The first error is the one that is told; the streamer lifts everything and ends. What is not there any more after
    that, or after it was given up, is no error: who copies a block at that moment finds its protection gone."""
    if u32_load(&m.aborted) == 0 and u32_cas(<uint32_t *>&m.error, 0, <uint32_t>err):
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


cdef int copy_saved(Image_t *m, Span *p, uint64_t k, char *target) noexcept nogil:
    """Bytes of the instant, of a block that the caller saves. -errno where they are lost: see the head."""
    cdef uint64_t start = save_start(p, k), end = save_end(p, k)
    cdef int err = copy_program(target, start, end - start)
    return err if err != 0 else -ENODATA if not still_marked(m, start, end) else 0


cdef bint still_marked(Image_t *m, uint64_t start, uint64_t end) noexcept nogil:
    """Whether no protected page went since it was protected; True where that can't be seen."""
    if m.pagemap < 0 or not has(UF_FEATURE_EXACT_ADDRESS):      # 5.18; pagemap's bit is of 5.13
        return True
    return pm_marked(m.pagemap, has(UF_FEATURE_WP_ASYNC), PAGE, start, end) > 0


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
        gate_wait(m)
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
    """Dekker with gate_close, which waits until nobody is inside."""
    while True:
        u32_add_seq(&m.inside, 1)
        if u32_load_seq(&m.gate) == GATE_OPEN:
            return
        u32_sub(&m.inside, 1)
        gate_wait(m)


cdef void gate_close(Image_t *m) noexcept nogil:
    u32_store_seq(&m.gate, GATE_CLOSED)
    while u32_load_seq(&m.inside):
        sched_yield()                       # a copy of a few blocks at the most


cdef void gate_wait(Image_t *m) noexcept nogil:
    """Until it is open. Who waits here helps to protect."""
    cdef uint32_t gate = u32_load(&m.gate)
    while gate != GATE_OPEN:
        if gate == GATE_HELP:
            protect_help(m)
        futex_wait(&m.gate, gate, SECOND_NS)
        gate = u32_load(&m.gate)


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
        if state == UNSAVED or state == WRITTEN:
            if save_aside(m, p, k, ahead_of(m, p, k)):
                return
        elif state != KEPT_BLOCK or u8_cas(&m.state[p.first + k], KEPT_BLOCK, LIFTED):
            lift_span(m, save_start(p, k), save_end(p, k))
            return


cdef uint32_t ahead_of(Image_t *m, Span *p, uint64_t k) noexcept nogil:
    """How many blocks from k on to save: twice as many each time as long as a writer goes through memory. That costs a
    sparse writer nothing, and a dense one an eighth of the faults. (Fault threads may overwrite each other's notes.)"""
    cdef uint64_t at = p.first + k, word, following
    cdef uint32_t i, n = 1
    for i in range(<uint32_t>WRITERS_SEEN):
        word = u64_load(&m.going[i])
        following = word >> 8
        if word and following <= at < following + AHEAD_REACH:
            n = <uint32_t>u64_min(2 * (word & 255), AHEAD_BLOCKS)
            break
    else:
        i = u32_add(&m.going_turn, 1) % <uint32_t>WRITERS_SEEN
    u64_store(&m.going[i], (at + n) << 8 | n)
    return n


cdef bint save_aside(Image_t *m, Span *p, uint64_t k, uint32_t most) noexcept nogil:
    """Copies blocks that are not saved yet for the writer of the first; False: its state has changed. Without room it
    waits for the streamer, which has the disk."""
    cdef uint32_t slot[AHEAD_BLOCKS]
    cdef uint32_t n = 0, i
    cdef int err = 0
    while n < most and k + n < p.blocks and err == 0:
        slot[n] = aside_take(m)
        if slot[n] == m.asides:
            break
        if not save_claim(m, p, k + n):
            u32_store(&m.aside[slot[n]].state, ASIDE_FREE)
            if n == 0:
                return False
            break
        err = copy_saved(m, p, k + n, m.aside_bytes + <uint64_t>slot[n] * m.slot_bytes)
        n += 1
    if n == 0:
        u64_add(&m.waits, 1)
        u8_cas(&m.mine[p.first + k], 0, 2)  # asked for
        u32_store_seq(&m.wanted, 1)         # after it: who finds this takes it back before it looks for those
        image_ring(m)
        return is_unsaved(u8_load(&m.state[p.first + k]))
    u64_add(&m.copied_bytes, save_end(p, k + n - 1) - save_start(p, k))
    if err != 0:
        image_fail(m, err, True)            # before it counts as saved: the streamer may be done with all others
    for i in range(n):
        save_publish(m, p, k + i, LIFTED)
    lift_span(m, save_start(p, k), save_end(p, k + n - 1))
    for i in range(n):
        m.aside[slot[i]].span = <uint32_t>(p - m.span)
        m.aside[slot[i]].block = k + i
        u32_store(&m.aside[slot[i]].state, ASIDE_FULL)
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
    if not kept_check(m, False):
        image_fail(m, -ENODATA, True)       # before anything else of it is kept
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
    image_over(m)


cdef void image_over(Image_t *m) noexcept nogil:
    u32_store(&m.streaming, 0)              # first: who sees `done` may begin the next image
    futex_wake_all(&m.streaming)
    u32_store(&m.done, 1)
    futex_wake_all(&m.done)


cdef bint all_saved(Image_t *m) noexcept nogil:
    """Nothing is copied and not written, nor being copied at this moment."""
    cdef uint32_t a
    cdef uint64_t i
    for i in range(m.blocks):
        if is_unsaved(u8_load(&m.state[i])):
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
    while stop < p.blocks and stop < k + STREAM_BLOCKS and u8_load(&m.state[p.first + stop]) == UNSAVED:
        stop += 1
    return stream_blocks(m, p, k, stop)


cdef uint64_t stream_blocks(Image_t *m, Span *p, uint64_t k, uint64_t stop) noexcept nogil:
    """Claims, writes and lets go (or keeps protected) blocks [k, stop), up to the first that is not unsaved any more;
    which that is. A writer does not wait for the file: what it wants of them is copied aside, and written again after
    this."""
    cdef uint64_t n = 0, run
    while k + n < stop and n < STREAM_BLOCKS and u8_cas(&m.state[p.first + k + n], UNSAVED, WRITTEN):
        n += 1
    stop = k + n
    if n == 0:
        return stop
    write_blocks(m, p, k, stop, <const char *>save_start(p, k))
    while k < stop:
        run = k
        while k < stop and u8_cas(&m.state[p.first + k], WRITTEN, SAVING):
            k += 1
        if k > run:
            written_run(m, p, run, k)
        else:
            k += 1
    return stop


cdef void written_run(Image_t *m, Span *p, uint64_t k, uint64_t stop) noexcept nogil:
    """The streamer's blocks, which nobody has written to meanwhile: they are saved."""
    cdef bint kept = still_marked(m, save_start(p, k), save_end(p, stop - 1))
    cdef uint64_t i
    for i in range(k, stop):
        save_publish(m, p, i, KEPT_BLOCK if m.keep and u8_load(&m.mine[p.first + i]) != 2 else LIFTED)
    release_run(m, p, k, stop)
    if not kept:
        image_fail(m, -ENODATA, True)


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
    """The bytes of blocks [k, stop), copied or where they are, go to the file, array by array."""
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
            image_fail(m, -errno if n < 0 else -EIO, n < 0 and errno == EFAULT)     # it reads the program's memory
