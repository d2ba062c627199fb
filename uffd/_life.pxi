# The life of engines and regions, and what a forked child does.
#
# Uses:     everything before it; keeper_main of _keeper.pxi
# Provides: engine_make, engine_stop, region_make, region_shut, region_reap, worker_start and the hooks of worker_main,
#           uffd_discover (the ways to a userfaultfd), has, next_known
#
# Lock order: registry_lock, then job_lock.

cdef Engine_t *engines = NULL               # under registry_lock
cdef int known_way = -1                     # how a userfaultfd is had here; -1: not tried yet
cdef uint64_t known_features = 0
cdef uint64_t masked_features = 0           # features that we must not use (the tests of the fall-backs set it)


# ---- userfaultfd ------------------------------------------------------------------------------------------------

cdef int uffd_discover() noexcept nogil:
    """Finds the first way that works, going on after any error. 0, or the last way's -errno."""
    global known_way, known_features
    cdef int way, fd, err = -ENOSYS
    cdef uint64_t features, ioctls = 0
    for way in range(UF_WAYS):
        fd = uf_open(way)
        if fd < 0:
            err = fd
            continue
        features = 0
        err = uf_api(fd, &features, &ioctls)
        close(fd)
        if err == 0:
            known_features = features
            known_way = way
            return 0
    return err


cdef inline bint has(uint64_t feature) noexcept nogil:
    return (known_features & ~masked_features) & feature == feature


cdef int region_listen(Region_t *r) noexcept nogil:
    """Opens the region's uffd and registers its range. 0 or -errno."""
    cdef uint64_t want = 0, ioctls = 0, mode = UF_REGISTER_MISSING
    cdef int err
    cdef uint64_t wp = UF_FEATURE_WP_HUGETLBFS_SHMEM if r.memfd >= 0 and not r.in_child else UF_FEATURE_WP
    want |= UF_FEATURE_SIGBUS if r.is_inline else 0
    want |= UF_FEATURE_THREAD_ID if not r.is_inline and has(UF_FEATURE_THREAD_ID) else 0
    want |= UF_FEATURE_POISON if r.poison else 0
    if r.protect:
        want |= wp
        mode |= UF_REGISTER_WP
    if r.minor:
        want |= UF_FEATURE_MINOR_SHMEM
        mode |= UF_REGISTER_MINOR
    if r.memfd >= 0 and not r.in_child:
        want |= UF_FEATURE_MISSING_SHMEM
        if not r.is_inline and has(UF_FEATURE_EVENT_REMAP):     # an mremap, which waits until a worker has read of it,
            want |= UF_FEATURE_EVENT_REMAP                      # moves whole page tables then (wire_disarm)
    r.fd = uf_open(known_way)
    if r.fd < 0 and uffd_discover() == 0:
        r.fd = uf_open(known_way)           # privileges were dropped since the first one
    if r.fd < 0:
        return r.fd
    err = uf_api(r.fd, &want, &ioctls)
    if err == 0:
        err = uf_register(r.fd, <uint64_t>r.base, r.span, mode, &ioctls)
    if err != 0:
        close(r.fd)
        r.fd = -1
    return err


# ---- regions ----------------------------------------------------------------------------------------------------

cdef int region_make(Region_t *r) noexcept nogil:
    """Maps, registers and publishes a region whose constant fields are set. 0 or -errno, and then nothing is left."""
    cdef int err = region_map(r)
    cdef Engine_t *e = r.engine
    if err == 0:
        err = region_listen(r)
    if err == 0:
        pthread_mutex_lock(&registry_lock)
        err = registry_add(r)
        if err == 0:
            e.regions += 1
            if e.block_max < <uint64_t>1 << r.shift:
                e.block_max = <uint64_t>1 << r.shift
        pthread_mutex_unlock(&registry_lock)
        if err == 0 and not r.is_inline:
            err = region_watch(r)
            if err != 0:
                region_shut(r, SECOND_NS)
                return err
    if err != 0:
        region_unmap(r)
        return err
    bus_ensure()
    eventfd_raise(e.keeper_fd)
    return 0


cdef inline bint listens_itself(Slot *s) noexcept nogil:
    """Whether the worker has the regions' uffds in its own epoll set, each message told once: one hop less for each
    fault. The others have the engine's set in it: stand-ins, which come and go, and those that are armed by turns."""
    return s.index < s.engine.workers and not s.engine.follow


cdef int region_watch(Region_t *r) noexcept nogil:
    """The workers are told of its faults from here on. 0 or -errno."""
    cdef Engine_t *e = r.engine
    cdef uint32_t i
    cdef int err = epoll_watch(e.faults_fd, r.fd, r.id)
    for i in range(e.workers):
        if err == 0 and listens_itself(&e.slots[i]):
            err = epoll_watch_edge(e.slots[i].epoll_fd, r.fd, r.id, False)
    return err


cdef void region_unwatch(Region_t *r) noexcept nogil:
    cdef Engine_t *e = r.engine
    cdef uint32_t i
    epoll_ctl(e.faults_fd, EPOLL_CTL_DEL, r.fd, NULL)
    for i in range(e.workers):
        if listens_itself(&e.slots[i]):
            epoll_ctl(e.slots[i].epoll_fd, EPOLL_CTL_DEL, r.fd, NULL)


cdef inline uint64_t state_bytes(Region_t *r) noexcept nogil:
    """What there is for each block, and behind it a byte per page of words: all of it untouched at first."""
    return 3 * page_round(r.blocks * 4) + 2 * page_round(r.blocks) + page_round(r.blocks * 4 / PAGE + 1)


cdef int region_map(Region_t *r) noexcept nogil:
    cdef int protection = PROT_READ | PROT_WRITE if r.writable or r.guard else PROT_READ
    cdef bint shared = r.memfd >= 0
    r.state = <uint32_t *>map_lazy(state_bytes(r), PROT_READ | PROT_WRITE, -1)
    r.counters = <Counters *>map_lazy(page_round(STRIPES * sizeof(Counters)), PROT_READ | PROT_WRITE, -1)
    if r.hosted:
        r.texts = map_lazy(page_round(ERRORS * sizeof(Text)), PROT_READ | PROT_WRITE, -1)
    if r.state == NULL or r.counters == NULL or r.hosted and r.texts == NULL:
        return -ENOMEM
    if r.fill.packs and r.writable and r.shift > u64_log2(PAGE):
        r.packed = <uint32_t *>map_lazy(page_round(r.blocks * 4), PROT_READ | PROT_WRITE, -1)
        if r.packed == NULL:
            return -ENOMEM
    r.node = <uint32_t *>(<char *>r.state + page_round(r.blocks * 4))
    r.place = <uint32_t *>(<char *>r.node + page_round(r.blocks * 4))
    r.pins = <uint8_t *>r.place + page_round(r.blocks * 4)
    r.spill = r.pins + page_round(r.blocks)
    r.known = r.spill + page_round(r.blocks)
    if shared:
        if ftruncate(r.memfd, <int64_t>r.span) != 0:
            return -errno
        r.alias = map_lazy(r.span, PROT_READ | PROT_WRITE, r.memfd)
        if r.alias == NULL:
            return -ENOMEM
    if shared or r.span < HUGE_BYTES:
        r.base = map_lazy(r.span, protection, r.memfd)
    else:
        r.base = map_aligned(r.span, HUGE_BYTES, protection)
    if r.base == NULL:
        return -ENOMEM
    if pages_there(r.base, PAGE, PAGE) and not shared:
        return -EBUSY                       # somebody populates all new memory, in spite of map_lazy
    return 0


cdef void region_unmap(Region_t *r) noexcept nogil:
    """Who still waits in a fault there gets SIGSEGV: the range turns inaccessible before the uffd lets them go."""
    cdef int i
    if r.base != NULL:
        map_forbid(r.base, r.span)
    if r.fd >= 0:
        close(r.fd)
    if r.base != NULL:
        munmap(r.base, r.span)
    if r.stuck == 0 and r.alias != NULL:
        munmap(r.alias, r.span)             # else a fill that hangs may still write there: it stays for ever
    if r.memfd >= 0:
        close(r.memfd)
    for i in range(WATCHES if r.stuck == 0 else 0):
        if r.watch[i] != NULL:
            munmap(r.watch[i], watch_span(r.watch[i].end - r.watch[i].first))
    if r.stuck == 0 and r.state != NULL:
        munmap(r.state, state_bytes(r))
    if r.stuck == 0 and r.packed != NULL:
        munmap(r.packed, page_round(r.blocks * 4))
    if r.texts != NULL:
        munmap(r.texts, page_round(ERRORS * sizeof(Text)))
    r.texts = NULL
    if r.stuck == 0 and r.touched != NULL:
        munmap(r.touched, page_round(r.blocks * 4))
    if r.stuck == 0 and r.counters != NULL:
        munmap(r.counters, page_round(STRIPES * sizeof(Counters)))
    part_release(r)
    r.fd = -1
    r.memfd = -1
    r.base = NULL


cdef int region_shut(Region_t *r, uint64_t patience_ns) noexcept nogil:
    """Takes a region out of service and tears it down as soon as nobody has it in hand.

    0: gone. 1: somebody had it for longer than patience_ns, or the writer is to flush it first (flush_at_end); the
    keeper goes on, and sets r.gone.
    """
    cdef Engine_t *e = r.engine
    cdef uint64_t deadline = now_ns() + patience_ns
    cdef uint32_t refs
    cdef bint last = False
    u32_store_seq(&r.closing, 1)
    futex_wake_all(&r.closing)
    jobs_cancel(e, r.id)
    if not r.is_inline:
        region_unwatch(r)
    pthread_mutex_lock(&registry_lock)
    registry_remove(r)
    pthread_mutex_unlock(&registry_lock)
    while True:
        refs = u32_load(&r.refs)
        if refs <= u32_load(&r.stuck) or now_ns() >= deadline:
            break
        futex_wait(&r.refs, refs, 20000000)
    pthread_mutex_lock(&registry_lock)
    if u32_load(&r.refs) <= u32_load(&r.stuck) and r.flush_at_end != 1:
        region_reap(r)
        last = True
    else:
        r.next_dying = e.dying
        e.dying = r
    pthread_mutex_unlock(&registry_lock)
    if not last:
        eventfd_raise(e.keeper_fd)
        u32_store(&e.write_bell, 1)
        futex_wake_all(&e.write_bell)
    return 0 if last else 1


cdef void region_reap(Region_t *r) noexcept nogil:
    """The end of a region that nobody has in hand. Under registry_lock."""
    cdef Engine_t *e = r.engine
    cdef int i, k
    while snapshot_replace(NULL, r) != 0:
        sched_yield()                       # out of memory for the table; it is a matter of time
    while u32_load(&r.refs) > u32_load(&r.stuck):
        sched_yield()                       # a SIGBUS handler that found it by address a moment ago
    for i in range(STREAMS):
        stream_end(&e.slots[KEEPER_SLOT], r, &r.stream[i])
    for i in range(STRIPES):
        for k in range(COUNTERS):
            e.closed.n[k] += r.counters[i].n[k]
        for k in range(STAGES * BUCKETS):
            (<uint64_t *>e.closed.stage)[k] += (<uint64_t *>r.counters[i].stage)[k]
    region_leaves_budget(r)
    kept_close(r)
    region_unmap(r)
    spill_close(r)
    if r.hosted:
        session_end(e, r.fill.session)
    e.regions -= 1
    e.block_max = 0
    for i in range(<int>snapshot.n if snapshot != NULL else 0):
        if snapshot.entry[i].region.engine == e and <uint64_t>1 << snapshot.entry[i].region.shift > e.block_max:
            e.block_max = <uint64_t>1 << snapshot.entry[i].region.shift
    u32_store(&r.gone, 1)


cdef void region_leaves_budget(Region_t *r) noexcept nogil:
    """What a region that ends has in memory and in the pool is free again; the policy forgets it."""
    cdef Engine_t *e = r.engine
    cdef uint64_t b = 0, last = 0, nbytes = 0
    cdef uint32_t state
    pthread_mutex_lock(&e.policy_lock)
    notes_drain(e)
    while next_known(r, &b, &last):
        while b < last:
            state = u32_load(&r.state[b]) & STATE_MASK
            if state != MISSING and state != POISONED:
                nbytes += block_span(r, b)
            if (state == POOLED or state == POOLED_DIRTY) and not is_shared(r):
                madvise(slot_at(e, r.shift, r.place[b]), <uint64_t>1 << r.shift, MADV_DONTNEED)
                hole_give(e, r.shift, r.place[b], 1)
            if r.node[b] and policy_ref(&e.pol, r.node[b]) == ref_of(r, b):
                policy_forget(&e.pol, r.node[b])
            if u8_load(&r.pins[b]):
                u64_add(&e.pinned, -block_span(r, b))
            b += 1
    pthread_mutex_unlock(&e.policy_lock)
    room_give(e, nbytes)


cdef void jobs_cancel(Engine_t *e, uint64_t region_id) noexcept nogil:
    cdef Job_t *j
    cdef Job_t *following
    pthread_mutex_lock(&e.job_lock)
    j = e.jobs
    while j != NULL:
        following = j.next
        if j.region_id == region_id:
            u32_store(&j.cancelled, 1)
            job_unqueue(e, j)
        j = following
    pthread_mutex_unlock(&e.job_lock)


# ---- engines ----------------------------------------------------------------------------------------------------

cdef int engine_make(Engine_t **out, uint32_t workers) noexcept nogil:
    """An engine with its threads running. 0 or -errno."""
    global engines
    cdef Engine_t *e = <Engine_t *>calloc(1, sizeof(Engine_t))
    cdef uint32_t i
    cdef int err
    if e == NULL:
        return -ENOMEM
    e.workers = workers
    e.faults_fd = -1
    e.keeper_fd = -1
    e.pool_fd = -1
    e.limit = NO_LIMIT
    e.asked_limit = NO_LIMIT
    e.residence_ns = RESIDENCE_NS
    pthread_mutex_init(&e.job_lock, NULL)
    pthread_mutex_init(&e.policy_lock, NULL)
    e.slots = <Slot *>map_lazy(page_round(MAX_SLOTS * sizeof(Slot)), PROT_READ | PROT_WRITE, -1)
    e.demand = <Ring *>map_lazy(page_round(3 * sizeof(Ring)), PROT_READ | PROT_WRITE, -1)
    e.closed = <Counters *>calloc(1, sizeof(Counters))
    e.notes = <Notes *>map_lazy(page_round(sizeof(Notes)), PROT_READ | PROT_WRITE, -1)
    e.pool_span = page_round(<uint64_t>sysconf(_SC_PHYS_PAGES) * PAGE / 2)
    e.node_capacity = <uint32_t>(<uint64_t>sysconf(_SC_PHYS_PAGES) * 5 / 4 + NOTES)
    e.nodes = <policy_node *>map_lazy(page_round(e.node_capacity * sizeof(policy_node)), PROT_READ | PROT_WRITE, -1)
    if e.slots == NULL or e.demand == NULL or e.closed == NULL or e.notes == NULL or e.nodes == NULL:
        engine_free(e)
        return -ENOMEM
    policy_init(&e.pol, e.nodes, e.node_capacity)
    policy_limit(&e.pol, NO_LIMIT)
    e.ahead = &e.demand[1]
    e.writes = &e.demand[2]
    for i in range(<uint32_t>MAX_SLOTS):
        e.slots[i].engine = e
        e.slots[i].index = i
        e.slots[i].epoll_fd = -1
        e.slots[i].wake_fd = -1
        if MAX_WORKERS <= i < HOSTED_SLOT:
            e.slots[i].kind = SLOT_INLINE
    err = engine_start(e)
    if err != 0:
        engine_stop(e)
        return err
    pthread_mutex_lock(&registry_lock)
    e.next = engines
    engines = e
    pthread_mutex_unlock(&registry_lock)
    out[0] = e
    return 0


cdef int engine_start(Engine_t *e) noexcept nogil:
    """Opens the descriptors and starts the threads; also in a forked child. 0 or -errno."""
    cdef int cpus[1024]
    cdef int n = cpus_allowed(cpus, 1024), err
    cdef uint32_t i
    ring_init(e.demand)
    ring_init(e.ahead)
    ring_init(e.writes)
    notes_init(e.notes)
    e.inline_free = (<uint64_t>1 << INLINE_SLOTS) - 1
    e.follow = e.workers > 4
    e.faults_fd = epoll_create1(EPOLL_CLOEXEC)
    e.keeper_fd = sys_eventfd()
    if e.faults_fd < 0 or e.keeper_fd < 0:
        return -errno
    for i in range(<uint32_t>MAX_WORKERS, <uint32_t>HOSTED_SLOT):
        err = slot_buffer(&e.slots[i])
        if err != 0:
            return err
    for i in range(e.workers):
        err = worker_start(e, &e.slots[i], cpus[i * n / e.workers] if n and e.workers <= <uint32_t>n else -1)
        if err != 0:
            return err
    err = helper_start(e, &evictor_main, e, b"uffd-evictor")
    if err == 0:
        err = writer_start(e)
    if err == 0:
        err = thread_spawn(&keeper_main, e, b"uffd-keeper", -1)
    if err == 0:
        u32_store(&e.keepers, 1)
    return err


cdef int helper_start(Engine_t *e, void *(*run)(void *) noexcept nogil, void *argument,
                      const char *name) noexcept nogil:
    cdef int err
    u32_add(&e.evictors, 1)
    err = thread_spawn(run, argument, name, -1)
    if err != 0:
        u32_sub(&e.evictors, 1)
    return err


cdef int thread_spawn(void *(*run)(void *) noexcept nogil, void *argument, const char *name, int cpu) noexcept nogil:
    cdef pthread_t thread = 0
    cdef int err = thread_start(&thread, run, argument, name, cpu)
    if err == 0:
        pthread_detach(thread)              # nobody joins: who stops an engine waits for `alive`
    return err


cdef int slot_buffer(Slot *s) noexcept nogil:
    if s.staging == NULL:
        s.staging = map_lazy(MAX_BLOCK_BYTES, PROT_READ | PROT_WRITE, -1)
    return -ENOMEM if s.staging == NULL else 0


cdef int worker_start(Engine_t *e, Slot *s, int cpu) noexcept nogil:
    """Gives a slot its buffer, descriptors and thread. 0 or -errno."""
    cdef int err = slot_buffer(s)
    if err != 0:
        return err
    memset(s.staging, 0, RUN_BYTES)         # touched now, so that a fill need not wait for memory
    s.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
    s.wake_fd = sys_eventfd()
    s.cpu = cpu
    s.armed = 1
    s.kind = SLOT_WORKER
    err = -errno if s.epoll_fd < 0 or s.wake_fd < 0 else 0
    if err == 0:
        err = epoll_watch(s.epoll_fd, s.wake_fd, EVENT_WAKE)
    if err == 0:
        err = 0 if listens_itself(s) else epoll_watch(s.epoll_fd, e.faults_fd, EVENT_FAULTS)
    if err == 0:
        u32_add(&e.alive, 1)
        err = thread_spawn(&worker_main, s, b"uffd-worker", cpu)
        if err != 0:
            u32_sub(&e.alive, 1)
    if err != 0:
        worker_ends(s)
    return err


cdef void worker_ends(Slot *s) noexcept nogil:
    """Its buffer stays for the next one. Descriptors of base workers stay until the engine is freed: somebody may be
    about to raise them."""
    if s.index >= s.engine.workers:
        slot_close(s)
    s.since_ns = 0
    s.phase = IDLE
    s.job = NULL
    s.tid = 0
    if u32_load(&s.kind) == SLOT_RETIRED:
        u32_add(&s.engine.alive, 1)         # it was counted out when it was given up
    u32_store(&s.kind, SLOT_FREE)


cdef void slot_close(Slot *s) noexcept nogil:
    if s.epoll_fd >= 0:
        close(s.epoll_fd)
    if s.wake_fd >= 0:
        close(s.wake_fd)
    s.epoll_fd = -1
    s.wake_fd = -1


cdef void worker_leaves(Engine_t *e) noexcept nogil:
    u32_sub(&e.alive, 1)
    futex_wake_all(&e.alive)                # an address only: the engine may be gone by now


cdef bint stand_in_leaves(Engine_t *e) noexcept nogil:
    """Whether an extra worker may end: there are enough without it, and not all of them are busy."""
    cdef uint32_t alive = u32_load(&e.alive)
    while alive > e.workers and u32_load(&e.busy) + 1 < alive:
        if u32_cas(&e.alive, alive, alive - 1):
            return True
        alive = u32_load(&e.alive)
    return False


cdef bint engine_stop(Engine_t *e) noexcept nogil:
    """Ends the threads and frees the engine; it has no regions any more. False: a stuck worker keeps its memory."""
    cdef Engine_t **at = &engines
    cdef uint32_t i, alive
    cdef uint64_t deadline = now_ns() + 10 * SECOND_NS
    cdef bint stuck = False
    pthread_mutex_lock(&registry_lock)
    while at[0] != NULL and at[0] != e:
        at = &at[0].next
    if at[0] == e:
        at[0] = e.next
    pthread_mutex_unlock(&registry_lock)
    u32_store_seq(&e.stopping, 1)
    if e.keeper_fd >= 0:
        eventfd_raise(e.keeper_fd)
    while now_ns() < deadline:
        for i in range(e.workers):
            if e.slots[i].wake_fd >= 0:
                eventfd_raise(e.slots[i].wake_fd)
        carriers_end(e)
        helpers_end(e)
        alive = u32_load(&e.alive)
        if alive == 0 and u32_load(&e.keepers) == 0 and u32_load(&e.carriers) == 0 and u32_load(&e.evictors) == 0:
            break
        futex_wait(&e.alive if alive else &e.keepers, alive if alive else 1, 10000000)
    for i in range(<uint32_t>MAX_WORKERS):
        stuck = stuck or e.slots[i].kind != SLOT_FREE
    if stuck or u32_load(&e.alive) or u32_load(&e.keepers) or u32_load(&e.carriers) or u32_load(&e.evictors):
        return False
    engine_free(e)
    return True


cdef void helpers_end(Engine_t *e) noexcept nogil:
    """Wakes evictor and writer, so that they see that the engine stops."""
    u32_store(&e.bell, 1)
    futex_wake_all(&e.bell)
    u32_store(&e.write_bell, 1)
    futex_wake_all(&e.write_bell)


cdef void engine_free(Engine_t *e) noexcept nogil:
    cdef uint32_t i
    cdef uint64_t bits
    for i in range(<uint32_t>CLASSES):
        if e.pool[i].base != NULL:
            bits = page_round(e.pool[i].slots / 8 + 8)
            munmap(e.pool[i].base, e.pool[i].slots << (i + 12))
            munmap(e.pool[i].taken, 2 * bits)
    if e.pool_fd >= 0:
        close(e.pool_fd)
    if e.notes != NULL:
        munmap(e.notes, page_round(sizeof(Notes)))
    if e.nodes != NULL:
        munmap(e.nodes, page_round(e.node_capacity * sizeof(policy_node)))
    if e.slots != NULL:
        for i in range(<uint32_t>MAX_SLOTS):
            slot_close(&e.slots[i])
            packer_free(&e.slots[i])
            if e.slots[i].staging != NULL and e.slots[i].kind != SLOT_HOSTED:
                munmap(e.slots[i].staging, MAX_BLOCK_BYTES)
        munmap(e.slots, page_round(MAX_SLOTS * sizeof(Slot)))
    if e.demand != NULL:
        munmap(e.demand, page_round(3 * sizeof(Ring)))
    if e.faults_fd >= 0:
        close(e.faults_fd)
    if e.keeper_fd >= 0:
        close(e.keeper_fd)
    while e.sessions != NULL:
        session_end(e, e.sessions.id)
    sessions_free(e)
    if e.hosts != NULL:
        hosts_free(e.hosts)
    free(e.closed)
    free(e)


cdef bint next_known(Region_t *r, uint64_t *first, uint64_t *end) noexcept nogil:
    """The next blocks from *first on whose state words were ever touched: [*first, *end), one page of words."""
    cdef uint64_t per_page = PAGE / 4
    while first[0] < r.blocks:
        end[0] = (first[0] / per_page + 1) * per_page
        if end[0] > r.blocks:
            end[0] = r.blocks
        if r.known[first[0] / per_page]:
            return True
        first[0] = end[0]
    return False
