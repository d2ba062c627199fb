# Which pages of a region were written: fed by the region's own write faults, exact to the page.
#
# Uses:     the states of _fill.pxi, settle; call_borrow of _evict.pxi; registry_lock
# Provides: for the fault path, all inside `critical`: watched_run, mark_pages, mark_block, lift_page; lift_whole
#           for who asks (none of them takes or needs the GIL; the caller has a reference to the region throughout):
#             watch_begin(r, first, end, &w)      watches pages [first, end) of a region from now on; 0 or -errno
#             watch_take(w, first, end, reset, out)    which of these pages were written since they were last taken: a
#                                                 byte each in out (or NULL), and how many; reset: they are clean again
#             watch_end(w)
#
# A block that is watched is always placed write-protected, and its protection is lifted page by page, at the first
# write to each: DIRTY says that some of its pages may be writable, its marks say which. So two rules make it exact:
#
#   1. A page that is writable has a mark, but for the moment between lift and mark inside `critical`. It is marked
#      before it is lifted and again afterwards: a taker in between reports it, and finds it again the next time.
#   2. Who takes marks waits for those moments first (settle), then owns each block that may have writable pages while
#      it takes their marks and protects them.
#
# What changes a block's bytes without a write (discard, a volatile page that is dropped, pages that the program
# dropped) marks it, too. A block that left memory and came back has the marks that it had.


# ---- marks ------------------------------------------------------------------------------------------------------

cdef inline bint watched_run(Region_t *r, uint64_t b, uint64_t end) noexcept nogil:
    """Whether a page of blocks [b, end) is watched. Inside `critical`."""
    cdef uint32_t i
    cdef Watch_t *w
    if u32_load_seq(&r.watched) == 0:
        return False
    for i in range(<uint32_t>WATCHES):
        w = <Watch_t *>ptr_load(&r.watch[i])
        if w != NULL and w.first < (end << r.shift) / PAGE and (b << r.shift) / PAGE < w.end:
            return True
    return False


cdef void mark_pages(Region_t *r, uint64_t first, uint64_t end) noexcept nogil:
    """Pages [first, end) of the region count as written. Inside `critical`."""
    cdef uint32_t i
    cdef Watch_t *w
    if u32_load_seq(&r.watched) == 0:
        return
    for i in range(<uint32_t>WATCHES):
        w = <Watch_t *>ptr_load(&r.watch[i])
        if w != NULL and first < w.end and w.first < end:
            bits_set(w.bits, u64_max(first, w.first) - w.first, u64_min(end, w.end) - w.first)


cdef inline void mark_block(Region_t *r, uint64_t b) noexcept nogil:
    mark_pages(r, (b << r.shift) / PAGE, ((b << r.shift) + block_span(r, b)) / PAGE)


cdef inline uint64_t bits_mask(uint64_t word, uint64_t first, uint64_t end) noexcept nogil:
    """The bits of that word that lie in [first, end)."""
    cdef uint64_t mask = ~<uint64_t>0
    if first > word * 64:
        mask = mask << (first - word * 64)
    if end < word * 64 + 64:
        mask &= (<uint64_t>1 << (end - word * 64)) - 1
    return mask


cdef void bits_set(uint64_t *bits, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t i
    for i in range(first // 64, (end + 63) // 64):
        u64_or(&bits[i], bits_mask(i, first, end))


cdef void bits_clear(uint64_t *bits, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t i
    for i in range(first // 64, (end + 63) // 64):
        u64_and(&bits[i], ~bits_mask(i, first, end))


cdef bint bits_any(uint64_t *bits, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t i
    for i in range(first // 64, (end + 63) // 64):
        if u64_load(&bits[i]) & bits_mask(i, first, end):
            return True
    return False


cdef uint64_t bits_spread(uint64_t *bits, uint64_t first, uint64_t end, bint clear, uint8_t *out) noexcept nogil:
    """A byte per bit of [first, end) that is set, to out[0] and on (those that are not are left); how many."""
    cdef uint64_t i, word, mask, n = 0
    cdef int k
    for i in range(first // 64, (end + 63) // 64):
        mask = bits_mask(i, first, end)
        if u64_load(&bits[i]) & mask == 0:
            continue
        word = (u64_and(&bits[i], ~mask) if clear else u64_load(&bits[i])) & mask
        n += u64_count(word)
        if out == NULL:
            continue
        if word == ~<uint64_t>0:
            memset(&out[i * 64 - first], 1, 64)
            continue
        while word:
            k = u64_log2(word)
            word &= ~(<uint64_t>1 << k)
            out[i * 64 + k - first] = 1
    return n


# ---- the fault path ---------------------------------------------------------------------------------------------

cdef bint lift_page(Slot *s, Region_t *r, uint64_t address) noexcept nogil:
    """A write to a protected page of a watched block that is there: marked and lifted, and its block is DIRTY. False:
    the block is in no state for that, or is not watched. While a migration has stopped writers it sleeps
    on; while an image lacks the block, and has no room for it, too."""
    cdef uint64_t first = (address - <uint64_t>r.base) / PAGE, b = (address - <uint64_t>r.base) >> r.shift
    cdef uint64_t end = first + 1
    cdef uint32_t frozen
    cdef bint lifted = False, parked
    image_waits(s, r)
    frozen = u32_load_seq(&r.frozen)
    if not watched_run(r, b, b + 1) or not is_there(r, b):
        critical_leave(s)
        return False
    parked = not frozen and image_saves(s, r, b) == SAVED_PARK
    if not parked and not frozen:
        if not watched_finely(r, b):
            first = (b << r.shift) / PAGE
            end = first + block_span(r, b) / PAGE
        lifted = lift_marked(r, b, first, end)
    critical_leave(s)
    if frozen:
        wire_parked(r, b)
        if r.is_inline:
            futex_wait(&r.frozen, 1, SECOND_NS)
    return lifted or parked or frozen != 0


cdef inline bint is_there(Region_t *r, uint64_t b) noexcept nogil:
    cdef uint32_t state = u32_load(&r.state[b]) & STATE_MASK
    return state == CLEAN or state == DIRTY


cdef bint watched_finely(Region_t *r, uint64_t b) noexcept nogil:
    """Whether somebody asks for the block's pages one by one. Inside `critical`."""
    cdef uint32_t i
    cdef Watch_t *w
    for i in range(<uint32_t>WATCHES):
        w = <Watch_t *>ptr_load(&r.watch[i])
        if w != NULL and not w.coarse and w.first < ((b + 1) << r.shift) / PAGE and (b << r.shift) / PAGE < w.end:
            return True
    return False


cdef bint lift_marked(Region_t *r, uint64_t b, uint64_t first, uint64_t end) noexcept nogil:
    """Pages [first, end) of block b turn writable, and have marks. Inside `critical`."""
    cdef uint32_t word = u32_load(&r.state[b])
    if word & STATE_MASK != CLEAN and word & STATE_MASK != DIRTY:
        return False
    if not u32_cas(&r.state[b], word, (word & ~<uint32_t>STATE_MASK) | UNPROTECTING):
        return False
    mark_pages(r, first, end)
    unprotect_pages(r, first, end)
    mark_pages(r, first, end)
    publish(r, b, 1, DIRTY)
    return True


cdef bint lift_whole(Slot *s, Region_t *r, uint64_t b) noexcept nogil:
    """All of a watched block, present, writable and marked: the kernel itself is to write there, where its faults are
    not served. (There is no image of such a region.)"""
    cdef uint64_t first = (b << r.shift) / PAGE
    cdef bint lifted = False
    critical_enter(s)
    if is_there(r, b) and not u32_load_seq(&r.frozen):
        lifted = lift_marked(r, b, first, first + block_span(r, b) / PAGE)
    critical_leave(s)
    return lifted


cdef void unprotect_pages(Region_t *r, uint64_t first, uint64_t end) noexcept nogil:
    """As unprotect, for pages of one block."""
    if uf_writeprotect(r.fd, <uint64_t>r.base + first * PAGE, (end - first) * PAGE, 0) != 0:
        unprotect(r, first * PAGE >> r.shift, 1)
        mark_block(r, first * PAGE >> r.shift)


# ---- who asks ---------------------------------------------------------------------------------------------------

cdef int watch_begin(Region_t *r, uint64_t first, uint64_t end, Watch_t **out) noexcept nogil:
    """Watches pages [first, end) of a region: all of them are clean from here on. 0 or -errno: ENOTSUP where the memory
    can't be write-protected, EBUSY with WATCHES of them already."""
    cdef Watch_t *w
    cdef uint64_t span = watch_span(end - first)
    cdef uint32_t i
    if not r.protect or not r.writable:
        return -ENOTSUP
    w = <Watch_t *>map_lazy(span, PROT_READ | PROT_WRITE, -1)
    if w == NULL:
        return -ENOMEM
    w.region = r
    w.first = first
    w.end = end
    w.bits = <uint64_t *>(<char *>w + PAGE)
    pthread_mutex_lock(&registry_lock)
    for i in range(<uint32_t>WATCHES):
        if r.watch[i] == NULL:
            ptr_store(&r.watch[i], w)
            u32_add_seq(&r.watched, 1)
            break
    else:
        pthread_mutex_unlock(&registry_lock)
        munmap(w, span)
        return -EBUSY
    pthread_mutex_unlock(&registry_lock)
    settle_all(r.engine)                    # whoever places pages from here on has seen it
    arm_blocks(w)
    out[0] = w
    return 0


cdef void arm_blocks(Watch_t *w) noexcept nogil:
    """What is writable now is marked, as all that is writable must be; taken, it is protected and clean."""
    cdef Region_t *r = w.region
    cdef Slot *s = call_borrow(r.engine)
    cdef uint64_t b = w.first * PAGE >> r.shift, end = ((w.end * PAGE - 1) >> r.shift) + 1, last = 0
    cdef uint64_t first, stop
    cdef uint32_t state
    while b < end and next_known(r, &b, &last):
        while b < last and b < end:
            state = u32_load(&r.state[b]) & STATE_MASK
            if state == DIRTY or is_busy(state):
                first = u64_max(w.first, (b << r.shift) / PAGE)
                stop = u64_min(w.end, ((b + 1) << r.shift) / PAGE)
                bits_set(w.bits, first - w.first, stop - w.first)
                take_block(s, w, b, first, stop, NULL)
            b += 1
    call_return(r.engine, s)


cdef inline uint64_t watch_span(uint64_t pages) noexcept nogil:
    return PAGE + page_round((pages + 63) // 64 * 8)


cdef void watch_end(Watch_t *w) noexcept nogil:
    """Protection that it left is lifted by the next write, as ever."""
    cdef Region_t *r = w.region
    cdef uint32_t i
    pthread_mutex_lock(&registry_lock)
    for i in range(<uint32_t>WATCHES):
        if r.watch[i] == w:
            ptr_store(&r.watch[i], NULL)
            u32_sub(&r.watched, 1)
    pthread_mutex_unlock(&registry_lock)
    settle_all(r.engine)                    # then nobody has it in hand
    munmap(w, watch_span(w.end - w.first))


cdef void settle_all(Engine_t *e) noexcept nogil:
    """As settle, to the end: sections are calls of the kernel only, but a machine may be slow."""
    cdef uint32_t i, turn
    for i in range(<uint32_t>MAX_SLOTS):
        turn = 0
        while u32_load_seq(&e.slots[i].critical):
            nap(turn)
            turn += 1


cdef uint64_t watch_take(Watch_t *w, uint64_t first, uint64_t end, bint reset, uint8_t *out) noexcept nogil:
    """Which of the region's pages [first, end) were written since they were last taken: 1 in out[page - first] (zero
    before; or NULL), and how many. reset: protected again and clean. A write that ended before the call is in it; one
    that runs beside it is in it, in the next, or in both."""
    cdef Region_t *r = w.region
    cdef Slot *s
    cdef uint64_t b, stop, at = first, n = 0
    settle_all(r.engine)
    if not reset:
        return bits_spread(w.bits, first - w.first, end - w.first, False, out)
    s = call_borrow(r.engine)
    while at < end:
        b = at * PAGE >> r.shift
        stop = u64_min(end, ((b + 1) << r.shift) / PAGE)
        if bits_any(w.bits, at - w.first, stop - w.first):
            n += take_block(s, w, b, at, stop, out + (at - first) if out != NULL else NULL)
        at = stop
    call_return(r.engine, s)
    return n


cdef uint64_t take_block(Slot *s, Watch_t *w, uint64_t b, uint64_t first, uint64_t end, uint8_t *out) noexcept nogil:
    """The marks of pages [first, end) of one block. What can't be protected now keeps them: it is reported again."""
    cdef Region_t *r = w.region
    cdef uint32_t word, state, tries = 0
    cdef uint64_t n
    while True:
        critical_enter(s)
        word = u32_load(&r.state[b])
        state = word & STATE_MASK
        if state == DIRTY and (r.kernel_faults or u8_load(&r.pins[b]) == 0):
            if u32_cas(&r.state[b], word, (word & ~<uint32_t>STATE_MASK) | UNPROTECTING):
                n = protect_marked(w, b, first, end, out)
                publish(r, b, 1, DIRTY)
                critical_leave(s)
                return n
        elif state == DIRTY or state == FILLING and word & KEPT or is_busy(state) and state != FILLING and tries > 4000:
            n = bits_spread(w.bits, first - w.first, end - w.first, False, out)
            critical_leave(s)
            return n
        elif state == FILLING or not is_busy(state):
            n = take_absent(w, b, word, first, end, out)
            critical_leave(s)
            return n
        critical_leave(s)
        nap(tries)
        tries += 1


cdef uint64_t protect_marked(Watch_t *w, uint64_t b, uint64_t first, uint64_t end, uint8_t *out) noexcept nogil:
    """Of a DIRTY block that the caller owns. A page that the kernel does not protect keeps its mark."""
    cdef Region_t *r = w.region
    cdef uint64_t at = first, run, n = 0
    while at < end:
        if not bits_any(w.bits, at - w.first, at + 1 - w.first):
            at += 1
            continue
        run = at
        while at < end and bits_any(w.bits, at - w.first, at + 1 - w.first):
            at += 1
        n += bits_spread(w.bits, run - w.first, at - w.first, True, NULL if out == NULL else out + (run - first))
        if uf_writeprotect(r.fd, <uint64_t>r.base + run * PAGE, (at - run) * PAGE, UF_WRITEPROTECT_WP) != 0:
            bits_set(w.bits, run - w.first, at - w.first)
    return n


cdef uint64_t take_absent(Watch_t *w, uint64_t b, uint32_t word, uint64_t first, uint64_t end,
                          uint8_t *out) noexcept nogil:
    """Of a block without writable pages: it is not there, or CLEAN. If it changed meanwhile, the marks are put back."""
    cdef uint8_t found[64]
    cdef uint64_t n = bits_spread(w.bits, first - w.first, end - w.first, False, out)
    cdef uint64_t i, part, k
    i = first
    while i < end:
        part = u64_min(end, i + 64)
        memset(found, 0, sizeof(found))
        bits_spread(w.bits, i - w.first, part - w.first, True, found)
        fence_seq()
        if (u32_load(&w.region.state[b]) ^ word) & ~<uint32_t>WAITERS:
            for k in range(part - i):
                if found[k]:
                    bits_set(w.bits, i + k - w.first, i + k + 1 - w.first)
        i = part
    return n


# ---- what Python sees -------------------------------------------------------------------------------------------

@no_gc_clear
cdef class Watch:
    """Pages [first, end) of a region, watched. The public Tracker holds one for memory of ours."""
    cdef Watch_t *w
    cdef Region region
    cdef Region_t *r

    def __cinit__(self, Region region not None, uint64_t first, uint64_t end):
        cdef Region_t *r = _live(region)
        cdef int err
        if first >= end or end > r.span / PAGE:
            raise ValueError(f"pages [{first}, {end}) of {r.span // PAGE}")
        _hold(r)
        with nogil:
            err = watch_begin(r, first, end, &self.w)
            region_release(r)
        if err != 0:
            raise _os_error(err, "the region can't be watched")
        self.region = region
        self.r = r

    def __dealloc__(self):
        self.close()

    def close(self):
        """Idempotent. What watched a region that is closed goes with the region."""
        cdef Watch_t *w = self.w
        self.w = NULL
        if w != NULL and self.region.r == self.r:
            _hold(self.r)
            with nogil:
                watch_end(w)
                region_release(self.r)
        self.region = None

    def take(self, out, bint reset):
        """How many pages were written: 1 in out[page], a writable buffer of zero bytes. ValueError: the region is
        closed."""
        cdef Watch_t *w = self.w
        cdef Region_t *r
        cdef uint64_t n
        cdef Py_buffer view
        if w == NULL:
            raise ValueError("the tracker is closed")
        r = _live(self.region)
        PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
        if <uint64_t>view.len != w.end - w.first:
            PyBuffer_Release(&view)
            raise ValueError(f"a buffer of {w.end - w.first} bytes is needed")
        _hold(r)
        with nogil:
            n = watch_take(w, w.first, w.end, reset, <uint8_t *>view.buf)
            region_release(r)
        PyBuffer_Release(&view)
        return n
