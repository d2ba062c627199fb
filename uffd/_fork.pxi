# What a forked child does: it serves itself.
#
# Uses:     engine_start, region_listen, region_watch, next_known of _life.pxi; jobs, hosts, the pool
# Provides: fork_prepare, fork_parent, fork_child (the handlers of pthread_atfork)

cdef void fork_prepare() noexcept nogil:
    """Nobody changes a block's state while the kernel copies the process, page after page."""
    cdef Engine_t *e
    cdef uint64_t i
    pthread_mutex_lock(&foreign_lock)
    pthread_mutex_lock(&registry_lock)
    u32_store_seq(&fork_gate, 1)
    e = engines
    while e != NULL:
        pthread_mutex_lock(&e.job_lock)
        pthread_mutex_lock(&e.policy_lock)
        settle(e)
        e = e.next
    for i in range(snapshot.n if snapshot != NULL else 0):
        spill_fork(snapshot.entry[i].region)
    kept_prepare()


cdef void fork_parent() noexcept nogil:
    cdef Engine_t *e = engines
    kept_parent()
    u32_store_seq(&fork_gate, 0)
    futex_wake_all(&fork_gate)
    while e != NULL:
        pthread_mutex_unlock(&e.policy_lock)
        pthread_mutex_unlock(&e.job_lock)
        e = e.next
    pthread_mutex_unlock(&registry_lock)
    pthread_mutex_unlock(&foreign_lock)


cdef void fork_child() noexcept nogil:
    global wires
    """The child has this one thread and none of ours. It opens uffds of its own over the same ranges and starts its
    own workers, before it can touch anything: it serves itself."""
    cdef Engine_t *e = engines
    cdef uint64_t i
    u32_store_seq(&fork_gate, 0)
    pthread_mutex_init(&registry_lock, NULL)
    foreign_fork_child()
    memset(stripe, 0, sizeof(stripe))
    unpackers_forked()
    bus_after_fork()
    u32_store(&ints_taken, 0)
    wires = NULL                            # its migrations are the parent's
    while e != NULL:
        child_engine(e)
        e = e.next
    if snapshot != NULL and snapshot.n:
        bus_ensure()                        # somebody of the parent may have been in the middle of it
        for i in range(snapshot.n):
            child_part(snapshot.entry[i].region)
            child_region(snapshot.entry[i].region)
    kept_child()
    e = engines
    while e != NULL:
        child_budget(e)
        e = e.next


cdef void child_engine(Engine_t *e) noexcept nogil:
    cdef uint32_t i
    cdef Slot *s
    cdef Job_t *j
    pthread_mutex_init(&e.job_lock, NULL)
    while e.jobs != NULL:
        j = e.jobs
        e.jobs = j.next
        j.queued = 0
        u32_store(&j.cancelled, 1)
        job_finish(j)
    for i in range(<uint32_t>MAX_SLOTS):
        s = &e.slots[i]
        child_slot(s)
    close(e.faults_fd)
    close(e.keeper_fd)
    e.jobs_waiting = 0
    e.idle[0] = 0
    e.idle[1] = 0
    e.busy = 0
    e.alive = 0
    e.keepers = 0
    e.waiting = False
    e.dying = NULL
    e.stalled_ns = 0
    e.placing = 0
    e.evictors = 0
    e.bell = 0
    e.write_bell = 0
    e.room_waiters = 0
    e.call_slots = 0
    e.wire_slots = 0
    e.broken = child_pool(e) != 0 or (e.hosts != NULL and hosts_child(e) != 0) or engine_start(e) != 0
    if e.broken:
        say_child(b"a forked child could not start its workers; touching a missing page will end it")


cdef int child_pool(Engine_t *e) noexcept nogil:
    """The pool's pages came along; they are registered anew, those that nobody wants are given back. 0 or -errno."""
    cdef uint64_t want = UF_FEATURE_MOVE | UF_FEATURE_SIGBUS, ioctls = 0, i
    cdef uint32_t shift
    cdef Pool *p
    cdef int err = 0
    pthread_mutex_init(&e.policy_lock, NULL)
    policy_init(&e.pol, e.nodes, e.node_capacity)
    policy_limit(&e.pol, e.limit)
    e.used = 0
    e.free_bytes = 0
    if e.pool_fd >= 0:
        close(e.pool_fd)                    # the parent still has it
        e.pool_fd = uf_open(known_way)
        err = e.pool_fd if e.pool_fd < 0 else uf_api(e.pool_fd, &want, &ioctls)
    for shift in range(12, 12 + CLASSES):
        p = pool_of(e, shift)
        if p.base == NULL:
            continue
        if e.pool_fd >= 0 and err == 0:
            err = uf_register(e.pool_fd, <uint64_t>p.base, p.slots << shift, UF_REGISTER_MISSING, &ioctls)
        for i in range(p.used):
            p.full[i] = p.taken[i]          # of these, child_budget takes out those of pooled blocks
    return err


cdef void child_budget(Engine_t *e) noexcept nogil:
    """What is in memory here, counted and told to the policy afresh: first what is in the pool, then the rest."""
    cdef uint64_t i
    cdef uint32_t turn, shift
    cdef Pool *p
    pthread_mutex_lock(&e.policy_lock)
    for turn in range(2):
        for i in range(snapshot.n if snapshot != NULL else 0):
            if snapshot.entry[i].region.engine == e:
                child_count(e, snapshot.entry[i].region, turn == 0)
    for shift in range(12, 12 + CLASSES):
        p = pool_of(e, shift)
        for i in range(p.used if p.base != NULL else 0):
            child_free_slots(p, i, shift)
    pthread_mutex_unlock(&e.policy_lock)


cdef void child_count(Engine_t *e, Region_t *r, bint pooled) noexcept nogil:
    cdef uint64_t b = 0, last = 0
    cdef uint32_t state
    while next_known(r, &b, &last):
        while b < last:
            state = r.state[b] & STATE_MASK
            if state != MISSING and state != POISONED and pooled == (state == POOLED or state == POOLED_DIRTY):
                u64_add(&e.used, block_span(r, b))
                r.node[b] = policy_filled(&e.pol, 0, ref_of(r, b), r.shift, False)
                if pooled:
                    policy_pooled(&e.pol, policy_victim(&e.pol))    # the only one in its queue
                    pool_of(e, r.shift).full[r.place[b] / 64] &= ~(<uint64_t>1 << (r.place[b] % 64))
            elif state == MISSING and pooled:
                r.node[b] = 0
            b += 1


cdef void child_free_slots(Pool *p, uint64_t i, uint32_t shift) noexcept nogil:
    cdef uint32_t k
    for k in range(64):
        if p.full[i] >> k & 1:
            madvise(p.base + (i * 64 + k << shift), <uint64_t>1 << shift, MADV_DONTNEED)
    p.taken[i] &= ~p.full[i]
    p.full[i] = 0


cdef void child_slot(Slot *s) noexcept nogil:
    """What the parent's thread had in hand at the fork is missing here."""
    cdef uint64_t b
    cdef Region_t *r = <Region_t *>table[s.region_id & (MAX_REGIONS - 1)]
    if s.since_ns != 0 and r != NULL and r.id == s.region_id:
        for b in range(s.first, s.first + s.count):
            if owned(s, r, b):
                r.state[b] = (POISONED | <uint32_t>EIO << OWNER_SHIFT if s.repair == 1 else MISSING) | (
                    r.state[b] & (FROM_PARENT | KEPT | STICKY))     # a repair: the poison may still lie there
        if r.fill.forget != NULL:
            r.fill.forget(r.fill.self, s.index)             # caught in the middle of a change
    if s.job != NULL:
        u32_store(&s.job.cancelled, 1)
        s.job.outstanding -= 1
        job_finish(s.job)
    slot_close(s)
    s.critical = 0
    s.phase = IDLE
    s.since_ns = 0
    s.recycled = 0
    s.write_ns = 0
    s.packer = NULL                         # it may be in the middle of a change
    s.job = NULL
    s.tid = 0
    if s.kind != SLOT_INLINE and s.kind != SLOT_HOSTED:
        s.kind = SLOT_FREE


cdef void child_region(Region_t *r) noexcept nogil:
    cdef int err = -EAGAIN if r.engine.broken else 0
    r.refs = 0
    r.asked = 0
    r.stuck = 0
    r.ahead_lock = 0
    r.writing = 0
    r.image = NULL                          # it is the parent's
    r.image_gate = 0
    child_watches(r)
    spill_forked(r)
    r.writes_back = False                   # a store never gets a second writer by accident: private from here on
    r.flush_at_end = 0
    child_unwritten(r)
    if r.fd >= 0:
        close(r.fd)                         # the parent still has it: nobody is woken by this
    if err == 0 and r.memfd >= 0 and not r.in_child:
        err = child_make_private(r)
    if err == 0:
        err = region_listen(r)
    if err == 0 and not r.is_inline:
        err = region_watch(r)
    if err == 0 and r.protect:
        child_protect(r)
    if err != 0:
        if map_forbid(r.base, r.span) != 0:
            bus_die()                       # a signal, and no zeros
        say_child(b"a forked child could not take a region over; it will die if it touches it")


cdef void child_watches(Region_t *r) noexcept nogil:
    """Trackers go on; what an image had to watch is over."""
    cdef uint32_t i
    for i in range(<uint32_t>WATCHES):
        if r.watch[i] != NULL and r.watch[i].coarse:
            r.watch[i] = NULL
            r.watched -= 1


cdef void child_unwritten(Region_t *r) noexcept nogil:
    """What was on its way to the store at the fork is dirty here: the parent hears of its end, the child does not."""
    cdef uint64_t b = 0, last = 0
    cdef uint32_t word, state
    while next_known(r, &b, &last):
        while b < last:
            word = r.state[b]
            state = word & STATE_MASK
            if word & WRITING:
                if state == CLEAN:
                    state = DIRTY
                elif state == POOLED:
                    state = POOLED_DIRTY
                r.state[b] = word & ~<uint32_t>(STATE_MASK | WRITING) | state
            b += 1


cdef int child_make_private(Region_t *r) noexcept nogil:
    """Shared backing: parent and child must not both fill the same page, so the child gets private memory. What was
    clean comes from the provider again, what the parent had written comes from its pages, as of the child's first
    touch. Where some of a block's pages are gone there, too, that touch fails: never the provider's bytes instead."""
    cdef uint64_t b = 0, last = 0
    global child_reads
    cdef bint written
    cdef int protection = PROT_READ | PROT_WRITE if r.writable else PROT_READ
    if mmap(r.base, r.span, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED:
        return -errno
    madvise(r.base, r.span, 15)             # MADV_NOHUGEPAGE
    r.in_child = 1
    r.minor = False
    r.protect = r.writable and has(UF_FEATURE_WP)
    r.moves = r.writable and has(UF_FEATURE_MOVE)
    while next_known(r, &b, &last):
        while b < last:
            written = is_dirty(r.state[b] & STATE_MASK) or r.state[b] & KEPT != 0
            r.state[b] = MISSING | (FROM_PARENT if written else r.state[b] & SPILLED)   # the newer of both
            child_reads |= written
            b += 1
    return 0


cdef void child_protect(Region_t *r) noexcept nogil:
    """fork() dropped the write protection: the child's clean blocks get it back, so that its dirty ones are known, and
    all blocks that are watched."""
    cdef uint64_t b = 0, last = 0, first
    while next_known(r, &b, &last):
        while b < last:
            first = b
            while b < last and (r.state[b] & STATE_MASK == CLEAN or
                                r.state[b] & STATE_MASK == DIRTY and watched_run(r, b, b + 1)):
                b += 1
            if b > first:
                uf_writeprotect(r.fd, <uint64_t>(r.base + (first << r.shift)),
                                ((b - 1 - first) << r.shift) + block_span(r, b - 1), UF_WRITEPROTECT_WP)
            else:
                b += 1


cdef void say_child(const char *text) noexcept nogil:
    cdef line l
    l.n = 0
    line_text(&l, b"uffd: ")
    line_text(&l, text)
    line_say(&l)
