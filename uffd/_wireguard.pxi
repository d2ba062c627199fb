# Migration, the source's side: writes are seen, and stopped.
#
# Uses:     _wire.pxi; settle_all of _track.pxi
# Provides: each_part (protects, collects, stops), stored_look and stored_stay, source_thaw, guard_main (the
#           thread that sees writes to memory that is not ours); part_written and wire_parked (called where a region of
#           ours is written); touch_parked, parked_since, say_parked (a touch that waits here)
#
# Writes are seen by write protection: a block's first write since it was last protected sets its bit in `dirty`. At the
# switchover the same protection stops writers: their faults are not answered any more. Until then, only what was
# dirtied since must be protected, so that it takes as long as that, however large the memory is.

cdef void part_written(Region_t *r, uint64_t b, uint64_t n) noexcept nogil:
    """Blocks of a region of ours turn writable. By whoever publishes that, inside `critical`."""
    cdef uint64_t i
    for i in range(b, b + n):
        bit_set(r.part.dirty, i)


cdef void wire_parked(Region_t *r, uint64_t b) noexcept nogil:
    """A write to a region whose writers are stopped: it is not answered, and told again when they are let go."""
    if r.part != NULL and r.part.wire.source:
        touch_parked(r.part, b)
        writer_seen(r.part.wire)


cdef void touch_parked(Part_t *p, uint64_t b) noexcept nogil:
    """Somebody waits from here on, until writers are let go; the first one is who the user is told of."""
    cdef Wire_t *w = p.wire
    if u64_load(&w.parked_ns) == 0:
        u64_store(&w.parked, <uint64_t>(p - w.part) << 44 | b)
        u64_store(&w.parked_ns, now_ns())


cdef uint64_t parked_since(Wire_t *w, uint64_t *key) noexcept nogil:
    """Since when, and at which block (part << 44 | number); 0: nobody waits."""
    cdef uint64_t since = u64_load(&w.parked_ns) if u32_load(&w.frozen) else 0
    key[0] = u64_load(&w.parked)
    return since


cdef void say_parked(Wire_t *w, uint64_t key, uint64_t age_ns) noexcept nogil:
    cdef uint32_t phase = u32_load(&w.phase)
    cdef line l
    l.n = 0
    line_text(&l, b"uffd: migration: a touch of array ")
    line_number(&l, key >> 44)
    line_text(&l, b" at offset ")
    line_number(&l, (key & ((<uint64_t>1 << 44) - 1)) << w.part[key >> 44].shift)
    line_text(&l, b" waits here, at the source, since ")
    line_number(&l, age_ns / SECOND_NS)
    if phase != PH_POSTCOPY and phase != PH_PAUSED_LATE and phase != PH_RECOVERING_LATE and phase != PH_COMPLETED and \
            phase != PH_FAILED_DESTINATION:
        line_text(&l, b" s, until it is known which side has the memory")
    elif w.kill:
        line_text(&l, b" s, until this process ends by it (on_write='kill')")
    else:
        line_text(&l, b" s, and will for ever: the memory is the destination's (on_write='stop')")
    line_text(&l, b" (Ctrl-C twice gives up)")
    line_say(&l)


cdef void writer_seen(Wire_t *w) noexcept nogil:
    cdef line l
    if not w.kill or u32_swap(&w.killed, 1):
        return
    if u32_load(&w.phase) == PH_COMPLETED:
        die_for_write()
    l.n = 0
    line_text(&l, b"uffd: migration: memory was written to at the source after its switchover; this process ends when "
                  b"the destination has all of it (on_write='kill')")
    line_say(&l)


cdef void die_for_write() noexcept nogil:
    cdef line l
    l.n = 0
    line_text(&l, b"uffd: migration: memory that has moved to another process was written to here (on_write='kill')")
    line_say(&l)
    bus_die()


cdef int protect_at(int fd, uint64_t start, uint64_t len, uint64_t mode) noexcept nogil:
    """WRITEPROTECT, again where the address space is changing. 0 or -errno."""
    cdef uint64_t deadline = now_ns() + SECOND_NS
    cdef unsigned int tries = 0
    cdef int err = uf_writeprotect(fd, start, len, mode)
    while err == -EAGAIN and now_ns() < deadline:
        nap(tries)
        tries += 1
        err = uf_writeprotect(fd, start, len, mode)
    return err


cdef int part_protect_run(Wire_t *w, Part_t *p, Region_t *r, uint64_t b, uint64_t n) noexcept nogil:
    """Protects blocks [b, b + n): of ours (r) with the region's uffd, else what whole pages they have."""
    cdef uint64_t start, end
    cdef int err
    if r != NULL:
        err = protect_at(r.fd, <uint64_t>r.base + (b << r.shift), run_span(r, b, n), UF_WRITEPROTECT_WP)
        if err == -ENOENT and n > 1:        # the program has split the mapping with an madvise
            err = part_protect_run(w, p, r, b, n / 2)
            return part_protect_run(w, p, r, b + n / 2, n - n / 2) if err == 0 else err
        return err
    start = u64_max(<uint64_t>p.base + (b << p.shift), p.guarded)
    end = u64_min(<uint64_t>p.base + ((b + n) << p.shift), p.guarded + p.guarded_bytes)
    start &= ~(PAGE - 1)
    end = page_round(end)
    return protect_at(w.guard_fd, start, end - start, UF_WRITEPROTECT_WP) if start < end else 0


cdef int part_protect(Wire_t *w, Part_t *p, Region_t *r) noexcept nogil:
    """From here on every write is seen. Of a region only what is dirty lacks protection."""
    cdef uint64_t b = 0, last = 0, first
    cdef int err = 0
    if r == NULL:
        return part_protect_run(w, p, NULL, 0, p.blocks)
    while err == 0 and next_known(r, &b, &last):
        while b < last and err == 0:
            first = b
            while b < last and u32_load(&r.state[b]) & STATE_MASK == DIRTY:
                b += 1
            if b > first:
                err = part_protect_run(w, p, r, first, b - first)
            else:
                b += 1
    return err


cdef int collect(Wire_t *w, Part_t *p, Region_t *r, uint64_t *found) noexcept nogil:
    """What was written since the last time is to be sent, and is protected again. A write between the two is in what
    will be sent; one after it is seen. 0 or -errno."""
    cdef uint64_t i, bits, b, n
    cdef int err = 0
    if r == NULL and not p.whole:
        bit_set(p.dirty, 0)                 # its ends share pages with other memory, and are not protected
        bit_set(p.dirty, p.blocks - 1)
    for i in range((p.blocks + 63) / 64):
        if u64_load(&p.dirty[i]) == 0:
            continue
        bits = u64_and(&p.dirty[i], 0)
        u64_or(&p.todo[i], bits)
        found[0] += u64_count(bits)
        b = wire_next_bit(&bits, 0, 64)
        while b < 64 and err == 0:
            n = 1
            while b + n < 64 and bits >> (b + n) & 1:
                n += 1
            err = part_protect_run(w, p, r, i * 64 + b, u64_min(n, p.blocks - i * 64 - b))
            b = wire_next_bit(&bits, b + n, 64)
    return err


cdef int each_part(Wire_t *w, bint first, bint freeze, uint64_t *found) noexcept nogil:
    """part_protect (first) or collect for every part; freeze: writers wait from here on. 0 or -errno."""
    cdef uint32_t i
    cdef Region_t *r
    cdef int err = 0
    pthread_mutex_lock(&w.guard_lock)
    if freeze:
        u64_store(&w.parked_ns, 0)
        u32_store_seq(&w.frozen, 1)
        w.passed = 0
    for i in range(w.nparts):
        r = NULL
        if w.part[i].region_id:
            r = region_acquire(w.part[i].region_id)
            if r == NULL:
                err = -ENODATA
                break
            if freeze:
                u32_store_seq(&r.frozen, 1)
                settle_all(r.engine)        # who did not see it has told by then what it made writable
        if w.part[i].passed:
            err = source_disarm(w, &w.part[i], r) if freeze else 0
        else:
            err = part_protect(w, &w.part[i], r) if first else collect(w, &w.part[i], r, found)
        if freeze and r == NULL and err == 0 and not w.part[i].whole:
            keep_edges(&w.part[i])
        if r != NULL:
            region_release(r)
        if err != 0:
            break
    pthread_mutex_unlock(&w.guard_lock)
    return err


cdef int source_disarm(Wire_t *w, Part_t *p, Region_t *r) noexcept nogil:
    """A region whose file the destination shares: here it is not mapped any more, every touch waits, and what is in the
    file need not travel. 0 or -errno."""
    cdef uint64_t b = 0, last = 0
    cdef uint32_t state
    memset(p.there, 0, (p.blocks + 63) / 64 * 8)
    p.away = wire_disarm(r.base, r.span)
    if p.away == NULL:
        return -ENOTSUP
    while next_known(r, &b, &last):
        while b < last:
            state = u32_load(&r.state[b]) & STATE_MASK
            if state == CLEAN or state == DIRTY or state == POOLED or state == POOLED_DIRTY:
                bit_set(p.there, b)
                bit_take(p.todo, b)
                w.passed += part_bytes(p, b, 1)
            b += 1
    return 0


cdef void stored_look(Wire_t *w) noexcept nogil:
    """Which blocks are what their provider holds, in parts whose provider the destination has opened. Of a stopped
    region that stays so: what is not written stays clean."""
    cdef uint32_t i, word, state
    cdef uint64_t b, last
    cdef Part_t *p
    cdef Region_t *r
    for i in range(w.nparts):
        p = &w.part[i]
        r = region_acquire(p.region_id) if p.opened else NULL
        if r == NULL:
            continue
        memset(p.stored, 255, (p.blocks + 63) / 64 * 8)
        b = 0
        last = 0
        while next_known(r, &b, &last):
            while b < last:
                word = u32_load(&r.state[b])
                state = word & STATE_MASK
                if state != MISSING and state != CLEAN and state != POOLED or word & (STICKY | FROM_PARENT | KEPT):
                    bit_take(p.stored, b)
                b += 1
        region_release(r)


cdef void stored_stay(Wire_t *w) noexcept nogil:
    """The destination has been told of them: they are not to be sent."""
    cdef Part_t *p
    cdef uint32_t i
    cdef uint64_t b
    w.opened = 0
    for i in range(w.nparts):
        p = &w.part[i]
        b = wire_next_bit(p.stored, 0, p.blocks) if p.opened else p.blocks
        while b < p.blocks:
            if bit_take(p.todo, b):
                w.opened += part_bytes(p, b, 1)
            b = wire_next_bit(p.stored, b + 1, p.blocks)


cdef void rearm(Part_t *p, Region_t *r) noexcept nogil:
    """It was not handed over: its pages are mapped again as they are touched."""
    cdef uint64_t i
    if p.away != NULL:
        munmap(p.away, r.span)
        p.away = NULL
    for i in range((p.blocks + 63) / 64):
        u64_or(&p.todo[i], p.there[i])


cdef void keep_edges(Part_t *p) noexcept nogil:
    """The blocks at the ends may share pages with other memory, which is not to be stopped: what they hold now goes."""
    memcpy(p.edge[0], p.base, part_bytes(p, 0, 1))
    memcpy(p.edge[1], p.base + ((p.blocks - 1) << p.shift), part_bytes(p, p.blocks - 1, 1))


cdef void source_thaw(Wire_t *w) noexcept nogil:
    """Writers go on: those that wait fault again, and are seen as before."""
    cdef uint32_t i
    cdef uint64_t b
    cdef Region_t *r
    pthread_mutex_lock(&w.guard_lock)
    if u32_swap(&w.frozen, 0):
        for i in range(w.nparts):
            if w.part[i].region_id == 0:
                if w.part[i].guarded_bytes:
                    uf_wake(w.guard_fd, w.part[i].guarded, w.part[i].guarded_bytes)
                continue
            r = region_acquire(w.part[i].region_id)
            if r == NULL:
                continue
            if w.part[i].passed:
                rearm(&w.part[i], r)
            b = 0
            while w.part[i].opened and b < (w.part[i].blocks + 63) / 64:
                u64_or(&w.part[i].todo[b], w.part[i].stored[b])
                b += 1
            u32_store_seq(&r.frozen, 0)
            futex_wake_all(&r.frozen)
            if not r.is_inline:
                uf_wake(r.fd, <uint64_t>r.base, r.span)
            region_release(r)
    pthread_mutex_unlock(&w.guard_lock)


cdef void *guard_main(void *argument) noexcept nogil:
    """Sees the writes to memory that is not ours."""
    cdef Wire_t *w = <Wire_t *>argument
    cdef uf_msg message[BATCH]
    cdef pollfd look[2]
    cdef int n, i
    cdef bint taken = False
    while not u32_load(&w.ending) or u32_load(&w.frozen):   # whoever waits is looked after, to the end of the process
        look[0].fd = w.guard_fd
        look[1].fd = w.guard_wake
        look[0].events = <short>POLLIN
        look[1].events = <short>POLLIN
        poll(look, 2, TICK_IDLE_MS if u32_load(&w.frozen) else -1)
        n = uf_read(w.guard_fd, message, BATCH)
        for i in range(n):
            if message[i].event == UF_EVENT_PAGEFAULT:
                guard_look(w, message[i].address)
        if w.engine == NULL:
            guard_waits(w, &taken)
    take_int(&taken, False)
    wire_thread_ends(w)
    return NULL


cdef void guard_waits(Wire_t *w, bint *taken) noexcept nogil:
    """What a keeper does for regions: whether a touch has waited for long, and to tell the user."""
    cdef uint64_t now = now_ns(), key = 0, age = 0
    take_int(taken, wire_waits(w, now, &key, &age))
    if age:
        w.said_ns = now
        say_parked(w, key, age)


cdef void guard_parked(Wire_t *w, uint64_t at) noexcept nogil:
    """A write to a page of memory that is not ours, while writers are stopped."""
    cdef Part_t *p
    cdef uint32_t i
    for i in range(w.nparts):
        p = &w.part[i]
        if p.region_id == 0 and at + PAGE > <uint64_t>p.base and at < <uint64_t>p.base + p.nbytes:
            touch_parked(p, (u64_max(at, <uint64_t>p.base) - <uint64_t>p.base) >> p.shift)
            break
    writer_seen(w)


cdef void guard_look(Wire_t *w, uint64_t address) noexcept nogil:
    cdef Part_t *p
    cdef uint32_t i
    cdef uint64_t b, last, start, end, at = address & ~(PAGE - 1)
    pthread_mutex_lock(&w.guard_lock)
    if u32_load(&w.frozen):
        pthread_mutex_unlock(&w.guard_lock)
        guard_parked(w, at)
        return
    start = at
    end = at + PAGE
    for i in range(w.nparts):               # two arrays may have blocks on one page
        p = &w.part[i]
        if p.region_id or end <= <uint64_t>p.base or at >= <uint64_t>p.base + p.nbytes:
            continue
        b = (u64_max(at, <uint64_t>p.base) - <uint64_t>p.base) >> p.shift
        last = (u64_min(end, <uint64_t>p.base + p.nbytes) - 1 - <uint64_t>p.base) >> p.shift
        bit_set(p.dirty, b)
        bit_set(p.dirty, last)
        if p.guarded <= at < p.guarded + p.guarded_bytes:
            start = u64_min(start, u64_max((<uint64_t>p.base + (b << p.shift)) & ~(PAGE - 1), p.guarded))
            end = u64_max(end, u64_min(page_round(<uint64_t>p.base + ((last + 1) << p.shift)),
                                       p.guarded + p.guarded_bytes))
            if start < at:
                bit_set(p.dirty, (u64_max(start, <uint64_t>p.base) - <uint64_t>p.base) >> p.shift)
            if end > at + PAGE:
                bit_set(p.dirty, (u64_min(end, <uint64_t>p.base + p.nbytes) - 1 - <uint64_t>p.base) >> p.shift)
    if protect_at(w.guard_fd, start, end - start, 0) != 0:
        uf_wake(w.guard_fd, at, PAGE)
    pthread_mutex_unlock(&w.guard_lock)


cdef void source_release(Wire_t *w, uint32_t i, uint64_t b, uint64_t n) noexcept nogil:
    """Blocks that the destination has are given back, each once; touching one here is SIGBUS, never zeros."""
    cdef Part_t *p = &w.part[i]
    cdef Region_t *r = NULL
    cdef Slot *s = NULL
    cdef uint64_t start, end, k
    if p.passed:
        return                              # its pages are the destination's
    if p.region_id:
        r = region_acquire(p.region_id)
        if r == NULL:
            return
        s = wire_borrow(r.engine)
    for k in range(b, b + n):
        if bit_set(p.there, k):
            continue
        u64_add(&w.blocks[M_RELEASED], 1)
        u64_add(&w.bytes[M_RELEASED], part_bytes(p, k, 1))
        if r != NULL:
            if discard_blocks(s, r, k, k + 1) == k + 1:
                lose_block(s, r, k, -ENOTRECOVERABLE)
            continue
        start = page_round(<uint64_t>p.base + (k << p.shift))   # the first page may have malloc's header
        end = (<uint64_t>p.base + (k << p.shift) + part_bytes(p, k, 1)) & ~(PAGE - 1)
        if start < end:
            give_back(w, start, end)
    if r != NULL:
        wire_return(r.engine, s)
        region_release(r)


cdef void give_back(Wire_t *w, uint64_t start, uint64_t end) noexcept nogil:
    cdef int64_t done = 0
    madvise(<void *>start, end - start, MADV_DONTNEED)
    uf_poison(w.guard_fd, start, end - start, &done)


cdef void source_release_all(Wire_t *w) noexcept nogil:
    """At the end: what is left, and the pages that two blocks share."""
    cdef Part_t *p
    cdef uint32_t i
    cdef uint64_t k, start, page, last
    for i in range(w.nparts):
        p = &w.part[i]
        last = 0
        source_release(w, i, 0, p.blocks)
        for k in range(p.blocks + 1 if p.region_id == 0 and p.guarded_bytes else 0):
            start = <uint64_t>p.base + (k << p.shift)
            page = start & ~(PAGE - 1)
            if page == last or page == start and <uint64_t>1 << p.shift >= PAGE:
                continue                    # given back already: once more, and it would read as zeros in between
            if <uint64_t>p.base <= page and page + PAGE <= <uint64_t>p.base + p.nbytes:
                give_back(w, page, page + PAGE)
                last = page
