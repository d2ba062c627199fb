# What the user is told of a block on stderr, without stdio: from workers, the keeper and the SIGBUS handler.
#
# Uses:     the lines of _sigbus.h; text_of of _hosted.pxi
# Provides: describe_block, say_poison, say_text, say_stuck, say_own_region; errno_of, tries_of

cdef void describe_block(line *l, Region_t *r, uint64_t b) noexcept nogil:
    line_text(l, b"uffd: region '")
    line_text(l, r.name)
    line_text(l, b"': block at offset ")
    line_number(l, b << r.shift)
    line_text(l, b" (")
    line_number(l, run_bytes(r, b, 1))
    line_text(l, b" bytes) ")


cdef void say_poison(Region_t *r, uint64_t b) noexcept nogil:
    """The last words before SIGBUS. Async-signal-safe."""
    cdef line l
    l.n = 0
    describe_block(&l, r, b)
    line_text(&l, b"could not be filled from ")
    line_text(&l, r.provider)
    line_text(&l, b": ")
    line_errno(&l, errno_of(r, b))
    line_text(&l, b" after ")
    line_number(&l, tries_of(r, b))
    line_text(&l, b" tries; this touch can't go on (populate() raises instead, and repairs the block)")
    line_say(&l)
    say_text(r, b)


cdef void say_text(Region_t *r, uint64_t b) noexcept nogil:
    """What the provider host said about it: a traceback."""
    cdef Text *t = text_of(r, b)
    if t != NULL:
        say(t.text, t.nbytes)
        say(b"\n", 1)


cdef int errno_of(Region_t *r, uint64_t b) noexcept nogil:
    if r.error[b & (ERRORS - 1)].block == b:
        return -r.error[b & (ERRORS - 1)].error
    return <int>((u32_load(&r.state[b]) >> OWNER_SHIFT) & OWNER_MASK)   # 10 bits of it: enough for what Linux has


cdef uint32_t tries_of(Region_t *r, uint64_t b) noexcept nogil:
    if r.error[b & (ERRORS - 1)].block == b:
        return r.error[b & (ERRORS - 1)].tries
    return r.retries + 1                    # its note was overwritten by another block's


cdef void say_stuck(Region_t *r, uint64_t b, int err) noexcept nogil:
    cdef line l
    l.n = 0
    describe_block(&l, r, b)
    line_text(&l, b"can't go on: the kernel lifts no write protection, or moves no pages: ")
    line_errno(&l, -err)
    line_say(&l)


cdef void say_own_region(Region_t *r, uint64_t b) noexcept nogil:
    cdef line l
    l.n = 0
    describe_block(&l, r, b)
    line_text(&l, b"was touched by its own fill function (")
    line_text(&l, r.provider)
    line_text(&l, b"): a provider must not touch the region it serves")
    line_say(&l)
