# Threads that write back: who waits for a store can give up, and a store that hangs keeps nobody but its own blocks.
#
# Uses:     write_range of _store.pxi; sync_store of _sync.pxi; region_release of _inline.pxi; thread_spawn of _life.pxi
# Provides: work_begin, work_wait, work_leave (what a flush has done by a thread of its own), writers_look (the
#           keeper's), writer_start, slot_for_write
#
# A call of a native store can't be ended from outside. So it is never made by the thread that asked: a flush waits in
# slices, and leaves when its time is over. The block on its way stays WRITING: in memory, not written back, and no
# second write of it begins while the first may still land. Only its late answer changes that. A background writer that
# hangs keeps its slot and buffer; another one goes on in its place, and it ends when it comes back.

cdef struct Work:                           # of one flush; the last of the two who have it frees it
    Region_t *region                        # a reference, until done
    Slot *slot
    uint64_t nruns
    int64_t *runs                           # pairs [first, end); NULL: make durable what was acknowledged
    uint32_t cancelled
    uint32_t done                           # futex
    uint32_t users
    int32_t error


cdef Slot *slot_for_write(Engine_t *e) noexcept nogil:
    """A slot for a thread that writes, NULL when all are in use."""
    cdef uint32_t i
    for i in range(<uint32_t>WRITERS):
        if u32_cas(&e.slots[WRITER_SLOT + i].kind, SLOT_FREE, SLOT_WRITER):
            return &e.slots[WRITER_SLOT + i]
    return NULL


cdef void writer_leaves(Engine_t *e, Slot *s) noexcept nogil:
    """The last that a thread that writes does: the engine may be gone afterwards."""
    u64_store(&s.write_ns, 0)
    u32_store(&s.kind, SLOT_FREE)
    u32_sub(&e.evictors, 1)
    futex_wake_all(&e.evictors)             # an address only


# ---- a flush ----------------------------------------------------------------------------------------------------

cdef Work *work_begin(Region_t *r, int64_t *runs, uint64_t nruns) noexcept nogil:
    """Has a thread write the dirty blocks of runs back, or, without runs, make durable what was acknowledged. NULL: no
    slot, thread or memory is free now."""
    cdef Slot *s = slot_for_write(r.engine)
    cdef Work *w = <Work *>calloc(1, sizeof(Work) + nruns * 16) if s != NULL else NULL
    if s == NULL:
        return NULL
    if w != NULL:
        u32_add_seq(&r.refs, 1)
        w.region = r
        w.slot = s
        w.users = 2
        w.nruns = nruns
        if runs != NULL:
            w.runs = <int64_t *>(w + 1)
            memcpy(w.runs, runs, nruns * 16)
        if helper_start(r.engine, &work_main, w, b"uffd-flush") == 0:
            return w
        free(w)
        region_release(r)
    u32_store(&s.kind, SLOT_FREE)
    return NULL


cdef void *work_main(void *argument) noexcept nogil:
    cdef Work *w = <Work *>argument
    cdef Region_t *r = w.region
    cdef Engine_t *e = r.engine
    cdef Slot *s = w.slot
    cdef uint64_t i
    if w.runs == NULL:
        w.error = sync_store(s, r, &w.cancelled)
    for i in range(w.nruns):
        write_range(s, r, <uint64_t>w.runs[2 * i], <uint64_t>w.runs[2 * i + 1], True, &w.cancelled)
    region_release(r)
    u32_store(&w.done, 1)
    futex_wake_all(&w.done)
    work_drop(w)
    writer_leaves(e, s)
    return NULL


cdef bint work_wait(Work *w, uint64_t timeout_ns) noexcept nogil:
    """Whether it is done, after a while."""
    if not u32_load(&w.done):
        futex_wait(&w.done, 0, timeout_ns)
    return u32_load(&w.done) != 0


cdef void work_leave(Work *w) noexcept nogil:
    """Who asked waits no more; what was not begun by now is left."""
    u32_store(&w.cancelled, 1)
    work_drop(w)


cdef void work_drop(Work *w) noexcept nogil:
    if u32_sub(&w.users, 1) == 1:
        free(w)


# ---- the writer -------------------------------------------------------------------------------------------------

cdef int writer_start(Engine_t *e) noexcept nogil:
    """A background writer, from now on the only one that takes new work. 0 or -errno."""
    cdef Slot *s = slot_for_write(e)
    cdef uint32_t before = e.writer
    cdef int err
    if s == NULL:
        return -EAGAIN
    u32_store(&e.writer, s.index)
    err = helper_start(e, &writer_main, s, b"uffd-writer")
    if err != 0:
        u32_store(&e.writer, before)
        u32_store(&s.kind, SLOT_FREE)
    return err


cdef void writers_look(Engine_t *e, uint64_t now) noexcept nogil:
    """The keeper: says which writes hang, and has another writer go on where the background one does."""
    cdef Slot *s
    cdef Region_t *r
    cdef uint64_t since
    cdef uint32_t i
    for i in range(<uint32_t>WRITERS):
        s = &e.slots[WRITER_SLOT + i]
        since = u64_load(&s.write_ns)
        if since == 0 or now < since or now - since < s.write_limit_ns:
            continue
        if s.said_ns != since:
            r = region_acquire(s.region_id)
            if r != NULL:
                s.said_ns = since
                say_hanging(r, s.first, now - since)
                region_release(r)
        if e.writer == s.index:
            writer_start(e)                 # no slot or thread to be had: tried again at the next tick


cdef void say_hanging(Region_t *r, uint64_t b, uint64_t age_ns) noexcept nogil:
    cdef line l
    l.n = 0
    describe_block(&l, r, b)
    line_text(&l, b"is being written since ")
    line_number(&l, age_ns / SECOND_NS)
    line_text(&l, b" s by ")
    line_text(&l, <const char *>r.provider)
    line_text(&l, b", which can't be ended; it stays in memory, not written back, until that answers")
    line_say(&l)
