# Which spill file is written, and when one is done with.
#
# Uses:     next_known of _life.pxi, pread_all and pwrite_all of _spill.pxi
# Provides: spill_epoch (the file that is written now), spill_hold (one that a block lies in), spill_drop; spill_fork,
#           spill_forked, spill_forget (discard), spill_close
#
# A forked child reads its spilled blocks from the files as they were at the fork, so its parent never writes again to
# one that it wrote before: after a fork the next write takes a new number. Numbers and descriptors are few. When they
# run short, files in which no block lies any more are closed (a child has descriptors of its own), and if that frees
# none, the two with the fewest blocks are copied into a new one. A block that has moved is told by CAS of
# `Region.spill`: what is written meanwhile goes to another file than the copy, and wins.
#
# Nobody closes a file that somebody holds. `held` is raised before `file` is looked at, and `file` is taken away before
# `held` is looked at, so one of both sees the other.

cdef struct Spilled:            # of a region's spill files
    uint64_t blocks[EPOCHS]     # that lie in it
    bint busy[EPOCHS]           # somebody may still say that a block lies in it


# ---- held -------------------------------------------------------------------------------------------------------

cdef int spill_hold(Region_t *r, uint64_t b) noexcept nogil:
    """The number of the file that a spilled block lies in, held. -ENODATA: it is not spilled any more."""
    cdef uint32_t epoch
    while True:
        epoch = u8_load(&r.spill[b])
        u32_add_seq(&r.spills.held[epoch], 1)
        if u8_load(&r.spill[b]) == epoch and <int>u32_load_seq(<uint32_t *>&r.spills.file[epoch]) >= 0:
            return <int>epoch
        spill_drop(r, epoch)
        if u32_load(&r.state[b]) & SPILLED == 0:
            return -ENODATA
        sched_yield()


cdef inline void spill_drop(Region_t *r, uint32_t epoch) noexcept nogil:
    u32_sub(&r.spills.held[epoch], 1)


cdef int spill_epoch(Slot *s, Region_t *r) noexcept nogil:
    """The number of the file that is written now, held; or -errno."""
    cdef Spill_t *f = r.spills
    cdef uint32_t epoch
    cdef unsigned int tries = 0
    cdef int err
    while True:
        epoch = u32_load_seq(&f.epoch)
        if epoch:
            u32_add_seq(&f.held[epoch], 1)
            if u32_load_seq(&f.epoch) == epoch:
                return <int>epoch
            spill_drop(r, epoch)            # a fork came between
        elif u32_cas(&f.choosing, 0, 1):
            err = choose_epoch(s, r) if u32_load_seq(&f.epoch) == 0 else 0
            u32_store_seq(&f.choosing, 0)
            if err != 0:
                return err
        else:
            nap(tries)
            tries += 1


# ---- the next one -----------------------------------------------------------------------------------------------

cdef int choose_epoch(Slot *s, Region_t *r) noexcept nogil:
    """One number stays free, for the next copy. 0 or -errno."""
    cdef Spilled in_files
    cdef int err = 0
    cdef uint32_t epoch
    if free_epoch(r, 2) == 0:
        count_spilled(r, &in_files)
        close_empty(r, &in_files)
        if free_epoch(r, 2) == 0:
            err = unite_smallest(r, &in_files)
    epoch = free_epoch(r, 2)
    if epoch == 0:
        return err if err != 0 else -EBUSY
    err = open_epoch(r, epoch)
    if err == 0:
        u32_store_seq(&r.spills.epoch, epoch)
    return err


cdef uint32_t free_epoch(Region_t *r, uint32_t n) noexcept nogil:
    """The n-th number that no file has, or 0."""
    cdef uint32_t epoch
    for epoch in range(1, <uint32_t>EPOCHS):
        if r.spills.file[epoch] < 0:
            n -= 1
            if n == 0:
                return epoch
    return 0


cdef int open_epoch(Region_t *r, uint32_t epoch) noexcept nogil:
    cdef int fd = sys_unnamed_file(r.spills.folder)
    if fd < 0:
        return fd
    u32_store_seq(<uint32_t *>&r.spills.file[epoch], <uint32_t>fd)
    return 0


cdef void count_spilled(Region_t *r, Spilled *in_files) noexcept nogil:
    """No file is the present one. Who still writes to one of before may say so of a block that was counted already."""
    cdef uint64_t b = 0, last = 0
    cdef uint32_t word, epoch
    memset(in_files, 0, sizeof(Spilled))
    for epoch in range(<uint32_t>EPOCHS):
        in_files.busy[epoch] = u32_load_seq(&r.spills.held[epoch]) != 0
    while next_known(r, &b, &last):
        while b < last:
            word = u32_load(&r.state[b])
            if word & SPILLED:
                in_files.blocks[u8_load(&r.spill[b])] += 1
            elif word & WRITING:
                in_files.busy[u8_load(&r.spill[b])] = True  # just written, perhaps, and not acknowledged
            b += 1


cdef void close_empty(Region_t *r, const Spilled *in_files) noexcept nogil:
    cdef uint32_t epoch
    cdef int fd
    for epoch in range(1, <uint32_t>EPOCHS):
        fd = r.spills.file[epoch]
        if fd < 0 or in_files.busy[epoch] or in_files.blocks[epoch]:
            continue
        u32_store_seq(<uint32_t *>&r.spills.file[epoch], <uint32_t>-1)
        if u32_load_seq(&r.spills.held[epoch]) == 0:
            close(fd)
        else:
            u32_store_seq(<uint32_t *>&r.spills.file[epoch], <uint32_t>fd)


cdef int unite_smallest(Region_t *r, Spilled *in_files) noexcept nogil:
    """Copies the blocks of two files into a third, and closes them. 0 or -errno."""
    cdef uint32_t one = 0, two = 0, epoch, to = free_epoch(r, 1)
    cdef int err
    for epoch in range(1, <uint32_t>EPOCHS):
        if r.spills.file[epoch] < 0 or in_files.busy[epoch]:
            continue
        if one == 0 or in_files.blocks[epoch] < in_files.blocks[one]:
            two = one
            one = epoch
        elif two == 0 or in_files.blocks[epoch] < in_files.blocks[two]:
            two = epoch
    if to == 0 or two == 0:
        return -EBUSY                       # readers and writers of them all, at once
    err = open_epoch(r, to)
    if err == 0:
        err = copy_images(r, one, two, to)
    count_spilled(r, in_files)              # a copy that failed may have moved nothing: then it goes, too
    close_empty(r, in_files)
    return err


cdef int copy_images(Region_t *r, uint32_t one, uint32_t two, uint32_t to) noexcept nogil:
    cdef char *buffer = map_lazy(MAX_BLOCK_BYTES, PROT_READ | PROT_WRITE, -1)
    cdef uint64_t b = 0, last = 0, span
    cdef uint32_t epoch
    cdef int err = 0
    if buffer == NULL:
        return -ENOMEM
    while err == 0 and next_known(r, &b, &last):
        while b < last and err == 0:
            epoch = u8_load(&r.spill[b])
            if u32_load(&r.state[b]) & SPILLED and (epoch == one or epoch == two):
                span = block_span(r, b)
                if r.packed != NULL:
                    span = u64_min(span, page_round(u32_load(&r.packed[b])))
                err = pread_all(r.spills.file[epoch], buffer, span, b << r.shift)
                if err == 0:
                    err = pwrite_all(r.spills.file[to], buffer, span, b << r.shift)
                if err == 0:
                    u8_cas(&r.spill[b], <uint8_t>epoch, <uint8_t>to)
                elif u8_load(&r.spill[b]) != epoch or u32_load(&r.state[b]) & SPILLED == 0:
                    err = 0                 # it was written anew, or discarded
            b += 1
    munmap(buffer, MAX_BLOCK_BYTES)
    return err


# ---- its life ---------------------------------------------------------------------------------------------------

cdef void spill_fork(Region_t *r) noexcept nogil:
    """Before a fork: what is written from here on is in other files, on both sides."""
    if r.spills != NULL:
        u32_store_seq(&r.spills.epoch, 0)


cdef void spill_forked(Region_t *r) noexcept nogil:
    """A forked child: the parent's threads are not here."""
    if r.spills != NULL:
        memset(r.spills.held, 0, sizeof(r.spills.held))
        r.spills.choosing = 0
        r.spills.epoch = 0


cdef void spill_forget(Region_t *r, uint64_t b) noexcept nogil:
    """A spilled block that its owner gives up: its place in the file is the file system's again, unless a forked child
    may still read it."""
    cdef uint32_t epoch = u8_load(&r.spill[b])
    if epoch and epoch == u32_load(&r.spills.epoch):
        fallocate(r.spills.file[epoch], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <int64_t>(b << r.shift),
                  <int64_t>block_span(r, b))
        if r.packed != NULL:
            r.packed[b] = 0
    u8_store(&r.spill[b], 0)


cdef void spill_close(Region_t *r) noexcept nogil:
    cdef int i
    if r.spills != NULL:
        for i in range(<int>EPOCHS):
            if r.spills.file[i] >= 0:
                close(r.spills.file[i])
        free(r.spills)
        r.spills = NULL
