# What a forked child may still read of ours: blocks of shared memory that were dirty at the fork stay in it until then.
#
# Uses:     _pin_block of _memory.pxi, next_known of _life.pxi, registry_lock
# Provides: kept_prepare, kept_parent, kept_child (of the handlers of fork), kept_look (the keeper's), kept_close;
#           parent_lacks (the child's)
#
# How a parent hears of the end of a process that nobody names to it: by a pipe. Its write end is the child's, and that
# of all of its own children; their exit or exec closes it. Then the pins of that fork are taken back. A block may be
# kept for several children: each has a pin of it. Where there is no pipe to be had, or no memory, the block is pinned
# for good. A child that closes descriptors that it does not know is wrong; a block that is gone is an error there,
# never zeros.
#
# All of it is under registry_lock.

cdef extern from "fcntl.h" nogil:
    int O_CLOEXEC

cdef extern from "unistd.h" nogil:
    int pipe2(int *fds, int flags) noexcept

cdef extern from "poll.h" nogil:
    int POLLHUP

cdef struct Child:
    Child *next
    int fd                      # the read end
    uint32_t users              # regions that keep something for it

cdef struct Kept:               # of one region for one child
    Kept *next
    Child *child
    uint64_t *bits              # blocks, lazily touched

cdef Child *children = NULL
cdef int child_pipe[2]          # of the fork under way: -1, -1: none
cdef uint32_t child_reads       # a forked child: it has blocks that lie in its parent's pages


cdef inline uint64_t kept_span(Region_t *r) noexcept nogil:
    return page_round(r.blocks / 8 + 8)


# ---- around a fork ----------------------------------------------------------------------------------------------

cdef void kept_prepare() noexcept nogil:
    cdef uint64_t i
    child_pipe[0] = child_pipe[1] = -1
    for i in range(snapshot.n if snapshot != NULL else 0):
        if is_shared(snapshot.entry[i].region) and snapshot.entry[i].region.writable:
            if pipe2(child_pipe, O_CLOEXEC) != 0:
                child_pipe[0] = child_pipe[1] = -1
            return


cdef void kept_parent() noexcept nogil:
    """With every policy_lock held. A fork that failed has a pipe that is closed at once."""
    global children
    cdef Child *c = NULL
    cdef uint64_t i
    if child_pipe[1] >= 0:
        close(child_pipe[1])
        c = <Child *>calloc(1, sizeof(Child))
    for i in range(snapshot.n if snapshot != NULL else 0):
        if is_shared(snapshot.entry[i].region) and snapshot.entry[i].region.writable:
            keep_for_child(snapshot.entry[i].region, c)
    if c != NULL and c.users:
        c.fd = child_pipe[0]
        c.next = children
        ptr_store(&children, c)
        return
    free(c)
    if child_pipe[0] >= 0:
        close(child_pipe[0])


cdef void keep_for_child(Region_t *r, Child *c) noexcept nogil:
    """A child reads what was dirty at the fork from our pages, whenever it touches it."""
    cdef uint64_t b = 0, last = 0
    cdef Kept *k = NULL
    while next_known(r, &b, &last):
        while b < last:
            if is_dirty(r.state[b] & STATE_MASK) or r.state[b] & (WRITING | KEPT):
                if k == NULL and c != NULL:
                    k = kept_make(r, c)
                keep_block(r, b, k)
            b += 1


cdef Kept *kept_make(Region_t *r, Child *c) noexcept nogil:
    cdef Kept *k = <Kept *>calloc(1, sizeof(Kept))
    if k == NULL:
        return NULL
    k.bits = <uint64_t *>map_lazy(kept_span(r), PROT_READ | PROT_WRITE, -1)
    if k.bits == NULL:
        free(k)
        return NULL
    k.child = c
    k.next = <Kept *>r.kept
    r.kept = k
    c.users += 1
    return k


cdef void keep_block(Region_t *r, uint64_t b, Kept *k) noexcept nogil:
    if r.pins[b] == 0:
        u64_add(&r.engine.pinned, block_span(r, b))
    if k != NULL and r.pins[b] < 254:
        k.bits[b / 64] |= <uint64_t>1 << (b % 64)
        r.pins[b] += 1
    else:
        r.pins[b] = 255


cdef void kept_child() noexcept nogil:
    """What is kept for brothers is the parent's matter; the pipe stays, where it says something."""
    global children, child_reads
    cdef Child *c
    cdef uint64_t i
    for i in range(snapshot.n if snapshot != NULL else 0):
        while snapshot.entry[i].region.kept != NULL:
            kept_drop(snapshot.entry[i].region, <Kept **>&snapshot.entry[i].region.kept)
    while children != NULL:
        c = children
        children = c.next
        close(c.fd)
        free(c)
    if child_pipe[0] >= 0:
        close(child_pipe[0])
    if child_pipe[1] >= 0 and not child_reads:
        close(child_pipe[1])
    child_reads = 0


# ---- when it has ended ------------------------------------------------------------------------------------------

cdef void kept_look(Engine_t *e) noexcept nogil:
    """The keeper of any engine: children that are gone."""
    cdef Child **at = &children
    cdef Child *c
    cdef pollfd one
    if ptr_load(&children) == NULL:
        return
    pthread_mutex_lock(&registry_lock)
    while at[0] != NULL:
        c = at[0]
        one.fd = c.fd
        one.events = 0
        one.revents = 0
        if c.users and (poll(&one, 1, 0) <= 0 or not one.revents & POLLHUP):
            at = &c.next
            continue
        child_ended(c)
        ptr_store(at, c.next)
        close(c.fd)
        free(c)
    pthread_mutex_unlock(&registry_lock)


cdef void child_ended(Child *c) noexcept nogil:
    cdef Region_t *r
    cdef Kept **at
    cdef uint64_t i
    for i in range(snapshot.n if snapshot != NULL else 0):
        r = snapshot.entry[i].region
        at = <Kept **>&r.kept
        while at[0] != NULL and at[0].child != c:
            at = &at[0].next
        if at[0] == NULL:
            continue
        pthread_mutex_lock(&r.engine.policy_lock)
        kept_drop(r, at)
        pthread_mutex_unlock(&r.engine.policy_lock)
        room_tell(r.engine)
        evictor_ring(r.engine)


cdef void kept_drop(Region_t *r, Kept **at) noexcept nogil:
    """Takes the pins of one child back, and forgets it."""
    cdef Kept *k = at[0]
    cdef uint64_t b = 0, last = 0
    while next_known(r, &b, &last):
        while b < last:
            if k.bits[b / 64] >> (b % 64) & 1:
                _pin_block(r, b, False)
            b += 1
    at[0] = k.next
    k.child.users -= 1
    munmap(k.bits, kept_span(r))
    free(k)


cdef void kept_close(Region_t *r) noexcept nogil:
    """The region ends; its file lives as long as the children that map it."""
    cdef Kept *k
    while r.kept != NULL:
        k = <Kept *>r.kept
        r.kept = k.next
        k.child.users -= 1
        munmap(k.bits, kept_span(r))
        free(k)


cdef int parent_lacks(Region_t *r, uint64_t offset, uint64_t span) noexcept nogil:
    """A child: 0 if the parent's file has these pages, else -ENODATA, so that a hole does not read as zeros. No answer
    (the descriptor was closed by somebody) is no yes."""
    cdef int64_t hole = file_hole(r.memfd, <int64_t>offset)
    return 0 if <int64_t>(offset + span) <= hole <= <int64_t>r.span else -ENODATA
