# Pages are put in place: one ioctl for a run, and more where the kernel stops half way.
#
# Uses:     watched_run and mark_pages of _track.pxi; place_recycled, move_pages of _room.pxi
# Provides: place (a run that was filled), place_run (one kind of ioctl over a range), place_around (only the pages that
#           a block lacks)

cdef int place(Slot *s, Region_t *r, uint64_t offset, uint64_t span, const char *source) noexcept nogil:
    """Puts the pages in. 0; 1 when some were there already, of unknown history; or -errno."""
    cdef uint64_t start = <uint64_t>r.base + offset
    cdef bint watched = watched_run(r, offset >> r.shift, (offset + span + (<uint64_t>1 << r.shift) - 1) >> r.shift)
    cdef bint protect = r.protect and (not s.write or watched)      # watched: each page's first write is a fault
    cdef int err
    if s.repair:
        return place_around(r, start, span, source, protect)
    if s.recycled:
        return place_recycled(s, r, start, span, protect)
    if r.minor:
        err = place_run(r, OP_CONTINUE, start, 0, span, UF_CONTINUE_WP if protect else 0)
    elif source == NULL:
        err = place_run(r, OP_ZEROPAGE, start, 0, span, 0)
    elif s.huge and span == HUGE_BYTES and not protect:
        err = place_huge(s, r, start, <uint64_t>source)
    else:
        err = place_run(r, OP_COPY, start, <uint64_t>source, span, UF_COPY_WP if protect else 0)
    if err > 0 and watched:
        mark_pages(r, offset / PAGE, (offset + span) / PAGE)
        uf_writeprotect(r.fd, start, span, UF_WRITEPROTECT_WP)
    elif err > 0 and protect:
        uf_writeprotect(r.fd, start, span, 0)
    return err


cdef int place_huge(Slot *s, Region_t *r, uint64_t start, uint64_t source) noexcept nogil:
    """Moves a huge page in; what can't be moved of it is copied. As `place`."""
    move_pages(r.fd, start, source, HUGE_BYTES, 0, &s.huge_moved)
    if s.huge_moved == HUGE_BYTES:
        return 0
    return place_run(r, OP_COPY, start + s.huge_moved, source + s.huge_moved, HUGE_BYTES - s.huge_moved, 0)


cdef int place_run(Region_t *r, int op, uint64_t start, uint64_t source, uint64_t len, uint64_t mode) noexcept nogil:
    """One ioctl for the run, and more where the kernel stops half way. `done` is signed: progress only if positive."""
    cdef uint64_t at = 0, deadline = 0, piece = len
    cdef int64_t done
    cdef int err, mixed = 0
    cdef unsigned int tries = 0
    while at < len:
        done = 0
        if piece > len - at:
            piece = len - at
        if op == OP_COPY:
            err = uf_copy(r.fd, start + at, source + at, piece, mode, &done)
        elif op == OP_CONTINUE:
            err = uf_continue(r.fd, start + at, piece, mode, &done)
        elif op == OP_ZEROPAGE:
            err = uf_zeropage(r.fd, start + at, piece, mode, &done)
        else:
            err = uf_poison(r.fd, start + at, piece, &done)
        if err == 0:
            at += piece
        elif done > 0:
            at += <uint64_t>done            # stopped at a page that is there, or by a signal: go on behind it
        elif err == -EEXIST:
            mixed = 1                       # benign: the page is there. Its waiters are not woken by the kernel
            uf_wake(r.fd, start + at, PAGE)
            at += PAGE
        elif err == -ENOENT and piece > PAGE:
            piece = PAGE                    # an madvise of the program has split the mapping inside the range
        elif err == -EAGAIN:                # the address space is changing; over when that is, if it ever is
            if deadline == 0:
                deadline = now_ns() + SECOND_NS
            elif now_ns() > deadline:
                return err
            nap(tries)
            tries += 1
        else:
            return err
    return mixed


cdef int place_around(Region_t *r, uint64_t start, uint64_t span, const char *source, bint protect) noexcept nogil:
    """For a block of which some pages are there: the missing ones are put in, the others stay as they are."""
    cdef uint64_t at = 0
    cdef int err
    while at < span:
        if source == NULL:
            err = place_run(r, OP_ZEROPAGE, start + at, 0, PAGE, 0)
        else:
            err = place_run(r, OP_COPY, start + at, <uint64_t>source + at, PAGE, UF_COPY_WP if protect else 0)
        if err > 0 and r.minor:             # in the file, not in the page table
            err = place_run(r, OP_CONTINUE, start + at, 0, PAGE, UF_CONTINUE_WP if protect else 0)
        if err < 0:
            return err
        if err == 0:                        # what had been written there is gone
            mark_pages(r, (start + at - <uint64_t>r.base) / PAGE, (start + at - <uint64_t>r.base) / PAGE + 1)
        at += PAGE
    uf_wake(r.fd, start, span)
    return 0
