# Native providers: where the bytes of a block come from. Called by workers, or in the SIGBUS handler, never by Python.
#
# Uses:     _blosc2.h, _checked.h, _imagefile.h; the Fill of _core.pyx
# Provides: Filler (what a Region is given), with one constructor per kind

from cython cimport no_gc_clear
from cpython.buffer cimport PyBUF_ANY_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

cdef extern from *:
    """
    #define UFFD_PREAD_DIRECT_ALIGN(n, page) ((n) & ~((uint64_t)(page) - 1))
    """
    uint64_t align_down "UFFD_PREAD_DIRECT_ALIGN"(uint64_t n, uint64_t page) nogil

cdef extern from "Python.h":
    void *PyCapsule_GetPointer(object capsule, const char *name) except NULL
    const char *PyCapsule_GetName(object capsule) except? NULL
    void *PyCapsule_GetContext(object capsule) except? NULL
    int Py_AddPendingCall(int (*call)(void *) noexcept, void *argument) noexcept nogil

cdef extern from "_blosc2.h" nogil:
    struct uffd_b2:
        pass
    struct uffd_b2_info:
        uint64_t nbytes
        uint64_t chunks
        uint64_t chunk_bytes
        uint64_t block_bytes
        int32_t typesize
        int32_t ndim
        int64_t shape[16]
        bint linear
    int uffd_b2_load(const char *library_path) noexcept
    const char *uffd_b2_version() noexcept
    int uffd_b2_open(uffd_b2 **out, const char *path, uint64_t offset, uint32_t slots, uffd_b2_info *info) noexcept
    int uffd_b2_fill(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes) noexcept
    void uffd_b2_close(uffd_b2 *self) noexcept
    int uffd_b2_fd(const uffd_b2 *self) noexcept
    void uffd_b2_forget(void *self, uint32_t slot) noexcept

cdef extern from "_checked.h" nogil:
    struct uffd_checked:
        pass
    int uffd_checked_make(int fd, int side, uint64_t offset, uint64_t nbytes, uint64_t id) noexcept
    int uffd_checked_open(uffd_checked **out, int fd, int side, uint64_t offset, uint64_t nbytes,
                          bint writable) noexcept
    void uffd_checked_ahead(void *self, uint64_t offset, uint64_t nbytes) noexcept
    int uffd_checked_fill(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes) noexcept
    int uffd_checked_store(void *self, uint32_t slot, uint64_t offset, const void *block, size_t nbytes) noexcept
    int uffd_checked_sync(void *self) noexcept
    void uffd_checked_close(uffd_checked *self) noexcept

cdef extern from "_imagefile.h" nogil:
    enum:
        IMAGE_UNIT
    struct image_extent:
        uint64_t at
        uint64_t nbytes
        uint64_t file
        uint64_t file_at
    struct image_file:
        int fd
        uint64_t data_offset
        uint64_t data_bytes
        uint64_t seed
        uint64_t *sum
    struct uffd_image:
        image_file *file
        image_extent *extent
        image_extent *under
    uffd_image *uffd_image_make(uint64_t files, uint64_t extents, uint64_t unders) noexcept
    bint uffd_image_whole(const uffd_image *image, uint64_t nbytes) noexcept
    int uffd_image_fill(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes) noexcept
    void uffd_image_ahead(const uffd_image *image, uint64_t offset, uint64_t nbytes) noexcept
    void uffd_image_free(uffd_image *image) noexcept

cdef struct FileSource:
    int fd
    uint64_t offset             # of the region's byte 0 in the file
    int plain_fd                # O_DIRECT: without it, for what is written and not of whole pages; or -1
    char *bounce[MAX_SLOTS]     # O_DIRECT: aligned buffers, one per slot, mapped at its first fill

cdef struct PackedSource:       # a compressed image: another provider's bytes, each unit held against its sum
    Fill *frame
    uint64_t nbytes
    uint64_t seed
    uint64_t *sum

cdef struct NativeSource:
    uffd_fill_fn function
    uffd_write_fn write         # or NULL
    void *user_data


cdef int file_fill(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes) noexcept nogil:
    """pread until all is there. A file that ends early is an error (ENODATA), whatever it was before."""
    cdef FileSource *f = <FileSource *>self
    cdef size_t at = 0
    cdef int64_t n
    while at < nbytes:
        n = pread(f.fd, <char *>block + at, nbytes - at, <int64_t>(f.offset + offset + at))
        if n > 0:
            at += <size_t>n
        elif n == 0:
            return -ENODATA
        elif errno != EINTR:
            return -errno
    return 0


cdef void image_ahead(void *self, uint64_t offset, uint64_t nbytes) noexcept nogil:
    uffd_image_ahead(<uffd_image *>self, offset, nbytes)


cdef void file_ahead(void *self, uint64_t offset, uint64_t nbytes) noexcept nogil:
    cdef FileSource *f = <FileSource *>self
    posix_fadvise(f.fd, <int64_t>(f.offset + offset), <int64_t>nbytes, POSIX_FADV_WILLNEED)


cdef int file_fill_direct(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes) noexcept nogil:
    """The same past the page cache: the aligned range around the wanted bytes, through an aligned buffer."""
    cdef FileSource *f = <FileSource *>self
    cdef uint64_t start = align_down(f.offset + offset, PAGE)
    cdef uint64_t lead = f.offset + offset - start, want = page_round(lead + nbytes), at = 0
    cdef int64_t n
    if f.bounce[slot] == NULL:
        f.bounce[slot] = map_lazy(MAX_BLOCK_BYTES + 2 * PAGE, PROT_READ | PROT_WRITE, -1)
        if f.bounce[slot] == NULL:
            return -ENOMEM
    while at < lead + nbytes:
        n = pread(f.fd, f.bounce[slot] + at, want - at, <int64_t>(start + at))
        if n > 0:
            at += <uint64_t>n
            if at < lead + nbytes and at & (PAGE - 1):
                return -ENODATA             # only the end of the file leaves an unaligned rest
        elif n == 0:
            return -ENODATA
        elif errno != EINTR:
            return -errno
    memcpy(block, f.bounce[slot] + lead, nbytes)
    return 0


cdef int file_store(void *self, uint32_t slot, uint64_t offset, const void *block, size_t nbytes) noexcept nogil:
    cdef FileSource *f = <FileSource *>self
    return pwrite_all(f.fd, <const char *>block, nbytes, f.offset + offset)


cdef int file_store_direct(void *self, uint32_t slot, uint64_t offset, const void *block,
                           size_t nbytes) noexcept nogil:
    """Past the page cache, where the file takes it: the odd end, and a region at an odd offset, go through it."""
    cdef FileSource *f = <FileSource *>self
    cdef uint64_t lead = (f.offset + offset) & (PAGE - 1), whole = align_down(nbytes, PAGE) if lead == 0 else 0
    cdef int err = pwrite_all(f.fd, <const char *>block, whole, f.offset + offset)
    return err if err != 0 else pwrite_all(f.plain_fd, <const char *>block + whole, nbytes - whole,
                                           f.offset + offset + whole)


cdef int file_sync(void *self) noexcept nogil:
    cdef FileSource *f = <FileSource *>self
    return -errno if fdatasync(f.fd) != 0 else 0


cdef int native_fill(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes) noexcept nogil:
    cdef NativeSource *n = <NativeSource *>self
    return n.function(n.user_data, offset, block, nbytes)


cdef int native_store(void *self, uint32_t slot, uint64_t offset, const void *block, size_t nbytes) noexcept nogil:
    cdef NativeSource *n = <NativeSource *>self
    return n.write(n.user_data, offset, block, nbytes)


def load_codec():
    """Has the machine's zstd loaded. OSError where there is none."""
    cdef int err = codec_load()
    if err != 0:
        raise _os_error(err, "no libzstd.so.1 on this machine, for compress='zstd' (Debian: apt install libzstd1)")


cdef int packed_fill(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes) noexcept nogil:
    """Whole units in place, others through a copy on the stack. EBADMSG: not the bytes of their sum."""
    cdef PackedSource *packed = <PackedSource *>self
    cdef uint8_t whole[IMAGE_UNIT]
    cdef uint8_t *to = <uint8_t *>block
    cdef uint8_t *at
    cdef uint64_t unit, skip, has, n
    cdef int err
    while nbytes:
        unit = offset // IMAGE_UNIT
        skip = offset % IMAGE_UNIT
        has = u64_min(IMAGE_UNIT, packed.nbytes - unit * IMAGE_UNIT)
        n = u64_min(has - skip, nbytes)
        at = to if n == has else whole
        err = packed.frame.call(packed.frame.self, slot, unit * IMAGE_UNIT, at, <size_t>has)
        if err != 0:
            return err
        if c_image_sum(packed.seed, unit, at, <size_t>has) != packed.sum[unit]:
            return -EBADMSG
        if n < has:
            memcpy(to, at + skip, <size_t>n)
        to += n
        offset += n
        nbytes -= <size_t>n
    return 0


cdef void packed_forget(void *self, uint32_t slot) noexcept nogil:
    cdef PackedSource *packed = <PackedSource *>self
    if packed.frame.forget != NULL:
        packed.frame.forget(packed.frame.self, slot)


@no_gc_clear
cdef class Filler:
    """A native provider as the core sees it. Immutable; kept alive by the regions that use it."""
    cdef Fill fill
    cdef FileSource file
    cdef NativeSource native
    cdef uffd_b2 *frame
    cdef uffd_checked *checked
    cdef uffd_image *image_files
    cdef PackedSource packed
    cdef object __weakref__
    cdef Py_buffer view
    cdef bint has_view
    cdef object keep
    cdef object remake
    cdef readonly object nbytes
    cdef readonly str kind
    cdef readonly object info

    def __cinit__(self):
        self.file.fd = -1
        self.file.plain_fd = -1

    def __dealloc__(self):
        cdef int i
        if self.has_view:
            PyBuffer_Release(&self.view)
        if self.file.fd >= 0:
            close(self.file.fd)
        if self.file.plain_fd >= 0:
            close(self.file.plain_fd)
        for i in range(MAX_SLOTS):
            if self.file.bounce[i] != NULL:
                munmap(self.file.bounce[i], MAX_BLOCK_BYTES + 2 * PAGE)
        if self.frame != NULL:
            uffd_b2_close(self.frame)
        if self.checked != NULL:
            uffd_checked_close(self.checked)
        if self.image_files != NULL:
            uffd_image_free(self.image_files)

    def again(self):
        """Another one of the same: what is kept per slot must not be shared by two engines."""
        return self.remake() if self.kind != "checked" else self.shared(self.fill.writes)

    def shared(self, bint writable):
        """Of a checked file: another one over the same journal, which keeps nothing per slot."""
        cdef Filler other = Filler()
        other.fill = self.fill
        other.fill.writes = other.fill.writes and writable
        other.kind, other.nbytes, other.keep = self.kind, self.nbytes, self
        return other

    @staticmethod
    def zero(bint packs=False):
        """packs: what is spilled over it is compressed; after load_codec."""
        cdef Filler f = Filler()
        f.remake = lambda: Filler.zero(packs)
        f.kind = "zero"
        f.fill.packs = packs
        f.fill.kind = FILL_ZERO
        f.fill.inline_safe = True
        return f

    @staticmethod
    def memory(buffer):
        """Over the bytes of a contiguous buffer, in the order in which they lie in memory. It stays exported."""
        cdef Filler f = Filler()
        PyObject_GetBuffer(buffer, &f.view, PyBUF_ANY_CONTIGUOUS)
        f.has_view = True
        f.remake = lambda: Filler.memory(buffer)
        f.kind = "memory"
        f.nbytes = f.view.len
        f.fill.kind = FILL_DIRECT
        f.fill.direct = <const char *>f.view.buf
        f.fill.private_memory = is_private(<uintptr_t>f.view.buf, <uintptr_t>f.view.buf + <uintptr_t>f.view.len)
        f.fill.inline_safe = True
        return f

    @staticmethod
    def open_file(int fd, uint64_t offset, nbytes, bint direct, bint writable):
        """Takes the descriptor over, unless it raises OSError."""
        cdef Filler f = Filler()
        if direct and writable:
            f.file.plain_fd = _os.open(f"/proc/self/fd/{fd}", _os.O_WRONLY | _os.O_CLOEXEC)
        f.remake = lambda: Filler.open_file(_os.dup(fd), offset, nbytes, direct, writable)
        f.kind = "file"
        f.nbytes = nbytes
        f.file.fd = fd
        f.file.offset = offset
        f.fill.kind = FILL_CALL
        f.fill.call = &file_fill_direct if direct else &file_fill
        f.fill.ahead = NULL if direct else &file_ahead
        if writable:
            f.fill.writes = True
            f.fill.store = &file_store_direct if direct else &file_store
            f.fill.sync = &file_sync
        f.fill.self = &f.file
        f.fill.inline_safe = True
        f.fill.may_block = True
        return f

    @staticmethod
    def checked_file(int fd, int side, uint64_t offset, uint64_t nbytes, bint writable):
        """A file and its sidecar. Takes both descriptors over, unless it raises OSError with the errno of
        _checked.h."""
        cdef Filler f = Filler()
        cdef int err
        with nogil:
            err = uffd_checked_open(&f.checked, fd, side, offset, nbytes, writable)
        if err != 0:
            raise _os_error(err, "the file and its checksums can't be opened")
        f.kind = "checked"
        f.nbytes = nbytes
        f.fill.kind = FILL_CALL
        f.fill.call = &uffd_checked_fill
        f.fill.ahead = &uffd_checked_ahead
        if writable:
            f.fill.writes = True
            f.fill.store = &uffd_checked_store
            f.fill.sync = &uffd_checked_sync
        f.fill.self = f.checked
        f.fill.may_block = True             # it takes locks: not for a signal handler
        return f

    @staticmethod
    def image(list files, bytes extents, uint64_t nbytes, bytes under=b""):
        """An image of memory over its files: [(descriptor, data offset, data bytes, seed, sums as 64-bit words)], and
        extents as four 64-bit words each (_imagefile.h). under: the same without the last file, whose bytes are copies;
        where they are damaged the originals are read. Takes none of the descriptors over. ValueError where the extents
        don't fit."""
        cdef Filler f = Filler()
        cdef uint64_t i, n = <uint64_t>len(extents) // sizeof(image_extent)
        f.image_files = uffd_image_make(<uint64_t>len(files), n, <uint64_t>len(under) // sizeof(image_extent))
        if f.image_files == NULL:
            raise MemoryError("no memory for an image's files")
        for i in range(<uint64_t>len(files)):
            _image_file(&f.image_files.file[i], files[i])
        memcpy(f.image_files.extent, PyBytes_AsString(extents), n * sizeof(image_extent))
        if len(under):
            memcpy(f.image_files.under, PyBytes_AsString(under), <size_t>len(under))
        if not uffd_image_whole(f.image_files, nbytes):
            raise ValueError(f"the extents don't cover the image's {nbytes} bytes, or leave their files")
        own = [(f.image_files.file[i].fd, *files[i][1:]) for i in range(<uint64_t>len(files))]
        f.remake = lambda: Filler.image(own, extents, nbytes, under)
        f.kind = "image"
        f.nbytes = nbytes
        f.fill.kind = FILL_CALL
        f.fill.call = &uffd_image_fill
        f.fill.ahead = &image_ahead
        f.fill.self = f.image_files
        f.fill.may_block = True             # a unit is read to the stack: too much for a signal handler
        return f

    @staticmethod
    def summed(Filler frame not None, uint64_t seed, bytes sums):
        """The bytes of another one that calls a function, each unit of 64 KiB held against its sum, as 64-bit words.
        ValueError for the wrong number of sums."""
        cdef Filler f = Filler()
        if <uint64_t>len(sums) != (<uint64_t>frame.nbytes + IMAGE_UNIT - 1) // IMAGE_UNIT * 8:
            raise ValueError(f"{len(sums)} bytes of sums for {frame.nbytes} bytes")
        f.remake = lambda: Filler.summed(frame.again(), seed, sums)
        f.keep = (frame, sums)
        f.kind = "summed"
        f.nbytes = frame.nbytes
        f.packed.frame = &frame.fill
        f.packed.nbytes = <uint64_t>frame.nbytes
        f.packed.seed = seed
        f.packed.sum = <uint64_t *>PyBytes_AsString(sums)
        f.fill.kind = FILL_CALL
        f.fill.call = &packed_fill
        f.fill.forget = &packed_forget
        f.fill.self = &f.packed
        f.fill.may_block = True
        return f

    @staticmethod
    def blosc2(bytes library, bytes path, uint64_t offset):
        """A contiguous Blosc2 frame at a byte of a file. OSError with the errno of _blosc2.h."""
        cdef Filler f = Filler()
        cdef uffd_b2_info info
        cdef int err = uffd_b2_load(library)
        if err != 0:
            raise _os_error(err, f"the Blosc2 library {library!r} can't be used")
        err = uffd_b2_open(&f.frame, path, offset, MAX_SLOTS, &info)
        if err != 0:
            raise _os_error(err, f"no readable Blosc2 frame at byte {offset} of {path!r}")
        same = b"/proc/self/fd/%d" % uffd_b2_fd(f.frame)      # the path may name another file by then
        f.remake = lambda: Filler.blosc2(library, same, offset)
        f.fill.forget = &uffd_b2_forget
        f.kind = "blosc2"
        f.nbytes = info.nbytes
        f.info = {"chunk_bytes": info.chunk_bytes, "block_bytes": info.block_bytes, "typesize": info.typesize,
                  "chunks": info.chunks, "linear": bool(info.linear),
                  "shape": tuple([info.shape[i] for i in range(info.ndim)]),
                  "library_version": uffd_b2_version().decode()}
        f.fill.kind = FILL_CALL
        f.fill.call = &uffd_b2_fill
        f.fill.self = f.frame
        f.fill.may_block = True             # the codec allocates: not for a signal handler
        return f

    @staticmethod
    def native_pointer(function, user_data, bint inline_safe, keep, write=0):
        """Of two addresses, and that of a function that writes back, or 0; `keep` holds what they belong to."""
        cdef Filler f = Filler()
        f.remake = lambda: Filler.native_pointer(function, user_data, inline_safe, keep, write)
        f.kind = "native"
        f.keep = keep
        f.native.function = <uffd_fill_fn><uintptr_t>function
        f.native.user_data = <void *><uintptr_t>user_data
        f.native.write = <uffd_write_fn><uintptr_t>write
        if write:
            f.fill.writes = True
            f.fill.store = &native_store
        f.fill.kind = FILL_CALL
        f.fill.call = &native_fill
        f.fill.self = &f.native
        f.fill.inline_safe = inline_safe
        f.fill.may_block = True
        return f

    def ahead(self, runs):
        """Of an image: tells the kernel that these bytes will be read, an int64 buffer of (from, to). Releases the
        interpreter lock, and may wait for the disk's queue."""
        cdef Py_buffer view
        cdef uint64_t i
        cdef int64_t *pair
        PyObject_GetBuffer(runs, &view, PyBUF_ANY_CONTIGUOUS)
        with nogil:
            pair = <int64_t *>view.buf
            for i in range(<uint64_t>view.len // 16 if self.image_files != NULL else 0):
                uffd_image_ahead(self.image_files, <uint64_t>pair[2 * i], <uint64_t>(pair[2 * i + 1] - pair[2 * i]))
        PyBuffer_Release(&view)

    def fill_now(self, uint64_t offset, out):
        """Of one with a function, by this thread; for regions that no engine serves. OSError."""
        cdef Py_buffer view
        cdef int err
        PyObject_GetBuffer(out, &view, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE)
        with nogil:
            err = self.fill.call(self.fill.self, 0, offset, view.buf, <size_t>view.len)
        PyBuffer_Release(&view)
        if err != 0:
            raise _os_error(err, "can't be read")

    def store_now(self, uint64_t offset, data):
        """The same, of what goes back."""
        cdef Py_buffer view
        cdef int err
        PyObject_GetBuffer(data, &view, PyBUF_ANY_CONTIGUOUS)
        with nogil:
            err = self.fill.store(self.fill.self, 0, offset, view.buf, <size_t>view.len)
        PyBuffer_Release(&view)
        if err != 0:
            raise _os_error(err, "can't be written")

    def sync_now(self):
        cdef int err
        with nogil:
            err = self.fill.sync(self.fill.self)
        if err != 0:
            raise _os_error(err, "can't be made durable")

    @property
    def writes(self):
        """Whether it can be written back to."""
        return bool(self.fill.writes)

    @property
    def span(self):
        """(first address, end) of the memory it reads, or None."""
        cdef uint64_t start = <uint64_t>self.fill.direct
        return (start, start + <uint64_t>self.nbytes) if self.fill.kind == FILL_DIRECT else None


cdef int _image_file(image_file *to, tuple file) except -1:
    """Duplicates the descriptor and copies the sums."""
    cdef bytes sums = file[4]
    to.data_offset, to.data_bytes, to.seed = file[1], file[2], file[3]
    if <uint64_t>len(sums) != (to.data_bytes + IMAGE_UNIT - 1) // IMAGE_UNIT * 8:
        raise ValueError(f"{len(sums)} bytes of sums for {to.data_bytes} bytes of data")
    to.sum = <uint64_t *>malloc(<size_t>len(sums) + 8)
    if to.sum == NULL:
        raise MemoryError("no memory for an image's checksums")
    memcpy(to.sum, PyBytes_AsString(sums), <size_t>len(sums))
    to.fd = _os.dup(file[0])
    return 0


def is_private(uint64_t start, uint64_t end):
    """Whether all of [start, end) is anonymous memory of this process, by what /proc tells now. Who exports a buffer
    keeps it mapped, and anonymous memory stays what it is; a mapped file may be cut by anybody."""
    cdef uint64_t low, high, at = start
    try:
        with open("/proc/self/maps", "rb") as maps:
            for row in maps:
                words = row.split(None, 5)
                low, high = [int(word, 16) for word in words[0].split(b"-")]
                if high <= at:
                    continue
                if low > at or words[4] != b"0":
                    return False
                at = high
                if at >= end:
                    return True
    except OSError:
        pass                                # no /proc: the guarded copy it is
    return start == end


def make_checksums(int fd, int side, uint64_t offset, uint64_t nbytes, uint64_t id):
    """The sidecar of a file as it is now, for Filler.checked_file. Reads all of it. OSError."""
    cdef int err
    with nogil:
        err = uffd_checked_make(fd, side, offset, nbytes, id)
    if err != 0:
        raise _os_error(err, "no checksums could be made")


def capsule_address(capsule):
    """(pointer, context pointer or 0) of a PyCapsule, whatever its name."""
    cdef void *context = PyCapsule_GetContext(capsule)
    return <uintptr_t>PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)), <uintptr_t>context


def buffer_address(buffer):
    """The address of a buffer's first byte; the caller keeps the buffer alive."""
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_ANY_CONTIGUOUS)
    address = <uintptr_t>view.buf
    PyBuffer_Release(&view)
    return address
