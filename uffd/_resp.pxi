# Values of a Redis server, straight from its socket into the pages of a request.
#
# Uses:     _resp.h; nothing of an engine
# Provides: resp_take (of providers/redis_wire.py)

cdef extern from "_resp.h" nogil:
    struct resp_stream:
        int fd
        int timeout_ms
        uint8_t *ahead
        size_t room
        size_t start
        size_t stop
    struct resp_part:
        uint8_t *start
        uint64_t nbytes
    int resp_values(resp_stream *s, uint32_t n, uint32_t head_bytes, uint8_t *heads, const resp_part *part,
                    int64_t *length) noexcept


cdef class _Parts:
    """Buffers that are held while they are filled."""
    cdef Py_buffer *view
    cdef resp_part *part
    cdef int64_t *length
    cdef uint32_t n

    def __cinit__(self, parts):
        cdef size_t most = <size_t>len(parts) + 1
        self.view = <Py_buffer *>calloc(most, sizeof(Py_buffer))
        self.part = <resp_part *>calloc(most, sizeof(resp_part))
        self.length = <int64_t *>calloc(most, sizeof(int64_t))
        if self.view == NULL or self.part == NULL or self.length == NULL:
            raise MemoryError("no memory for an answer")
        for part in parts:
            PyObject_GetBuffer(part, &self.view[self.n], PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE)
            self.part[self.n].start = <uint8_t *>self.view[self.n].buf
            self.part[self.n].nbytes = <uint64_t>self.view[self.n].len
            self.n += 1

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.n):
            PyBuffer_Release(&self.view[i])
        free(self.view)
        free(self.part)
        free(self.length)


def resp_take(int fd, timeout_s, ahead, size_t start, size_t stop, parts, heads):
    """Fills buffers with the values that come on a socket, one each: its first bytes go to `heads` (as many for each as
    that has room), the others to the buffer, whose rest is zeros. Returns their lengths, -1 where there is no value,
    and what of `ahead` is left, which is where bytes are that were received and not taken: (lengths, start, stop).
    Waits timeout_s at most for the next bytes, without the interpreter lock. OSError; EPROTO for another answer."""
    cdef resp_stream s
    cdef Py_buffer view, table
    cdef _Parts into = _Parts(parts)
    cdef int err = 0
    cdef uint32_t i, head_bytes
    PyObject_GetBuffer(ahead, &view, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE)
    try:
        PyObject_GetBuffer(heads, &table, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE)
        try:
            if stop > <size_t>view.len or start > stop:
                raise ValueError(f"bytes {start} to {stop} of {view.len}")
            head_bytes = <uint32_t>(table.len // into.n) if into.n else 0
            s.fd = fd
            s.timeout_ms = -1 if timeout_s is None else <int>min(timeout_s * 1000 + 1, 1e9)
            s.ahead = <uint8_t *>view.buf
            s.room = <size_t>view.len
            s.start = start
            s.stop = stop
            with nogil:
                err = resp_values(&s, into.n, head_bytes, <uint8_t *>table.buf, into.part, into.length)
        finally:
            PyBuffer_Release(&table)
    finally:
        PyBuffer_Release(&view)
    if err != 0:
        raise OSError(-err, _os.strerror(-err))
    return [into.length[i] for i in range(into.n)], s.start, s.stop
