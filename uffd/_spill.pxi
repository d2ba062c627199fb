# The spill file: where the cold blocks of private memory lie, as they are or compressed.
#
# Uses:     _codec.h; page_round, block_span of _fill.pxi; recycled_buffer of _room.pxi, slot_buffer of _life.pxi;
#           spill_hold of _epochs.pxi
# Provides: spill_write (the writer), spill_read (a fill), spill_fetch (one block), spill_took; unpackers_make,
#           unpackers_forked, packer_free; pread_all, pwrite_all
#
# Without a name: gone with the process. A block lies in it where it lies in the region, so it is as sparse as they are.
# Compressed (Region.packed is there), a block is an image of whole pages at its place, and the rest of its place is a
# hole. `packed` says how many bytes of the image count; a block that would not get smaller by a page is stored as it
# is. Only a block that is in memory is written, and only one that is not is read, so neither sees the other's half.
#
# Who writes has a slot of its own, and an encoder in it. Who reads may be a SIGBUS handler, or a thread of an image,
# which must not allocate: it borrows one of a few decoders, made before, for one block. Nobody who has one waits for
# anything but the file, so whoever finds none free waits for a moment.

cdef extern from "_codec.h" nogil:
    enum:
        CODEC_DECODES, CODEC_ENCODES, CODEC_ENCODES_CHECKED
    int codec_load() noexcept
    void *codec_make(int kind) noexcept
    void codec_free(void *context, int kind) noexcept
    size_t codec_pack(void *context, void *to, size_t most, const void *data, size_t nbytes) noexcept
    int codec_unpack(void *context, void *to, size_t nbytes, const void *data, size_t packed) noexcept
    bint codec_skips(uint32_t *left) noexcept
    void codec_learns(uint32_t *left, uint32_t *next, bint smaller) noexcept

cdef struct Unpacker:
    void *codec
    char *packed                # MAX_BLOCK_BYTES, touched as far as they were used

cdef enum:
    UNPACKERS = 64
cdef Unpacker unpacker[UNPACKERS]
cdef uint32_t unpackers         # made; once, under the interpreter's lock
cdef uint64_t unpackers_free    # bit for each


# ---- out --------------------------------------------------------------------------------------------------------

cdef int spill_write(Slot *s, Region_t *r, uint64_t b, uint32_t n, const char *bytes) noexcept nogil:
    """Blocks [b, b+n) into the file of the epoch; `Region.spill` has them there before the file is let go. 0 or
    -errno."""
    cdef uint32_t i
    cdef int epoch = spill_epoch(s, r), err
    if epoch < 0:
        return epoch
    if r.packed == NULL:
        err = pwrite_all(r.spills.file[epoch], bytes, run_span(r, b, n), b << r.shift)
    else:
        err = put_blocks(s, r, b, n, bytes, <uint32_t>epoch)
    for i in range(n if err == 0 else 0):
        u8_store(&r.spill[b + i], <uint8_t>epoch)   # nobody reads it there before the block has left memory
    spill_drop(r, <uint32_t>epoch)
    return err


cdef int put_blocks(Slot *s, Region_t *r, uint64_t b, uint32_t n, const char *bytes, uint32_t epoch) noexcept nogil:
    cdef uint32_t i, plain = 0
    cdef uint64_t size
    cdef int fd = r.spills.file[epoch], err
    for i in range(n):
        size = spill_pack(s, r, b + i, bytes + (<uint64_t>i << r.shift))
        if size == 0:
            plain += 1
            continue
        err = put_packed(s, r, fd, b + i, size, epoch)
        if err == 0:
            err = put_plain(r, fd, b + i - plain, plain, bytes + (<uint64_t>(i - plain) << r.shift))
        if err != 0:
            return err
        plain = 0
    return put_plain(r, fd, b + n - plain, plain, bytes + (<uint64_t>(n - plain) << r.shift))


cdef uint64_t spill_pack(Slot *s, Region_t *r, uint64_t b, const char *bytes) noexcept nogil:
    """Packs a block into the slot's buffer: how many bytes, 0 where it would not save a page."""
    cdef uint64_t span = block_span(r, b)
    cdef size_t size
    if span <= PAGE or codec_skips(&r.spills.plain):
        return 0
    if s.packer == NULL:
        s.packer = codec_make(CODEC_ENCODES_CHECKED)
    if s.packed == NULL:
        s.packed = map_lazy(MAX_BLOCK_BYTES, PROT_READ | PROT_WRITE, -1)
    if s.packed == NULL:
        return 0
    size = codec_pack(s.packer, s.packed, span - PAGE, bytes, span)
    codec_learns(&r.spills.plain, &r.spills.plain_next, size != 0)
    return size


cdef int put_plain(Region_t *r, int fd, uint64_t b, uint32_t n, const char *bytes) noexcept nogil:
    cdef uint64_t i
    for i in range(b, b + n):
        r.packed[i] = <uint32_t>block_span(r, i)
    return pwrite_all(fd, bytes, run_span(r, b, n), b << r.shift) if n else 0


cdef int put_packed(Slot *s, Region_t *r, int fd, uint64_t b, uint64_t size, uint32_t epoch) noexcept nogil:
    """Whole pages are written: where one is written in part, and is not in the page cache, the rest has to be read
    first. What an older image of the block took beyond that is given back to the file system, if it can."""
    cdef uint64_t span = page_round(size), offset = b << r.shift
    cdef uint64_t before = page_round(r.packed[b]) if r.spill[b] == epoch else 0
    cdef int err
    if before < span:
        r.packed[b] = <uint32_t>size        # where it fails, no less than what may lie there
    err = pwrite_all(fd, s.packed, span, offset)
    if err == 0:
        r.packed[b] = <uint32_t>size
        if before > span:
            fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <int64_t>(offset + span),
                      <int64_t>(before - span))
    return err


cdef uint64_t spill_took(Region_t *r, uint64_t b, uint64_t n) noexcept nogil:
    """What the blocks [b, b+n), just written, take in the file."""
    cdef uint64_t i, total = 0
    if r.packed == NULL:
        return run_bytes(r, b, n)
    for i in range(b, b + n):
        total += u64_min(page_round(r.packed[i]), run_bytes(r, i, 1))
    return total


cdef void packer_free(Slot *s) noexcept nogil:
    codec_free(s.packer, CODEC_ENCODES_CHECKED)
    if s.packed != NULL:
        munmap(s.packed, MAX_BLOCK_BYTES)


cdef int pwrite_all(int fd, const char *bytes, uint64_t nbytes, uint64_t offset) noexcept nogil:
    cdef uint64_t at = 0
    cdef int64_t n
    while at < nbytes:
        n = pwrite(fd, bytes + at, nbytes - at, <int64_t>(offset + at))
        if n > 0:
            at += <uint64_t>n
        elif n == 0:
            return -EIO
        elif errno != EINTR:
            return -errno
    return 0


# ---- back in ----------------------------------------------------------------------------------------------------

cdef int spill_read(Slot *s, Region_t *r, uint64_t offset, uint64_t nbytes, const char **source) noexcept nogil:
    """Spilled blocks for a fill: all blocks of a run are, or none. 0 or -errno."""
    cdef uint64_t b = offset >> r.shift, at = 0, part, span = page_round(nbytes)
    cdef char *target = recycled_buffer(s, r) if s.recycled else s.staging
    cdef int epoch, err = 0
    if r.minor and not s.repair:
        if fallocate(r.memfd, 0, <int64_t>offset, <int64_t>span) != 0:
            return -errno
        target = r.alias + offset
    elif target == NULL:
        err = slot_buffer(s)
        if err != 0:
            return err
        target = s.staging
    while at < span and err == 0:
        part = block_span(r, b)
        epoch = spill_hold(r, b)
        if epoch < 0:
            return epoch
        while r.packed == NULL and at + part < span and u8_load(&r.spill[b + (part >> r.shift)]) == <uint32_t>epoch:
            part += block_span(r, b + (part >> r.shift))
        err = take_image(r, b, r.spills.file[epoch], part, target + at)
        spill_drop(r, <uint32_t>epoch)
        at += part
        b += part >> r.shift
    source[0] = target
    return err


cdef int spill_fetch(Region_t *r, uint64_t b, char *target) noexcept nogil:
    """The whole pages of a spilled block. 0 or -errno: ENODATA for a file that is too short, EBADMSG for bytes that
    were not written there."""
    cdef int epoch = spill_hold(r, b), err
    if epoch < 0:
        return epoch
    err = take_image(r, b, r.spills.file[epoch], block_span(r, b), target)
    spill_drop(r, <uint32_t>epoch)
    return err


cdef int take_image(Region_t *r, uint64_t b, int fd, uint64_t span, char *target) noexcept nogil:
    """Of a block, or, where they are not compressed, of several of one file."""
    cdef uint32_t size = r.packed[b] if r.packed != NULL else 0, i
    cdef int err
    if r.packed == NULL or size == span:
        return pread_all(fd, target, span, b << r.shift)
    if size > span:
        return -EBADMSG
    i = unpacker_borrow()
    err = pread_all(fd, unpacker[i].packed, size, b << r.shift)
    if err == 0 and codec_unpack(unpacker[i].codec, target, span, unpacker[i].packed, size) != 0:
        err = -EBADMSG
    if size > RUN_BYTES:
        madvise(unpacker[i].packed, page_round(size), MADV_DONTNEED)
    u64_or(&unpackers_free, <uint64_t>1 << i)
    return err


cdef uint32_t unpacker_borrow() noexcept nogil:
    cdef uint64_t bits
    cdef uint32_t i
    cdef unsigned int tries = 0
    while True:
        bits = u64_load(&unpackers_free)
        i = <uint32_t>u64_log2(bits & (~bits + 1)) if bits else 0
        if bits and u64_cas(&unpackers_free, bits, bits & ~(<uint64_t>1 << i)):
            return i
        if bits == 0:
            nap(tries)
            tries += 1


cdef int unpackers_make() except? -1:
    """Of the process, at its first compressed region: one for each worker and each inline slot of an engine that has a
    worker per CPU, about. 0 or -ENOMEM."""
    global unpackers, unpackers_free
    cdef uint32_t i, n = <uint32_t>u64_min(UNPACKERS, INLINE_SLOTS + <uint64_t>sysconf(_SC_NPROCESSORS_ONLN) + 2)
    for i in range(unpackers, n):
        unpacker[i].packed = map_lazy(MAX_BLOCK_BYTES, PROT_READ | PROT_WRITE, -1)
        unpacker[i].codec = codec_make(CODEC_DECODES) if unpacker[i].packed != NULL else NULL
        if unpacker[i].codec == NULL:
            if unpacker[i].packed != NULL:
                munmap(unpacker[i].packed, MAX_BLOCK_BYTES)
            return 0 if unpackers else -ENOMEM
        unpackers = i + 1
        u64_or(&unpackers_free, <uint64_t>1 << i)
    return 0


cdef void unpackers_forked() noexcept nogil:
    """A forked child: those that the parent's threads had in use. A decoder starts from nothing at each block."""
    global unpackers_free
    unpackers_free = run_mask(unpackers) if unpackers else 0


cdef int pread_all(int fd, char *bytes, uint64_t nbytes, uint64_t offset) noexcept nogil:
    """All of it, or an error: a file that ends early is ENODATA."""
    cdef uint64_t at = 0
    cdef int64_t n
    while at < nbytes:
        n = pread(fd, bytes + at, nbytes - at, <int64_t>(offset + at))
        if n > 0:
            at += <uint64_t>n
        elif n == 0:
            return -ENODATA
        elif errno != EINTR:
            return -errno
    return 0
