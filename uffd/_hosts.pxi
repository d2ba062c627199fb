# Provider hosts as processes: sessions, start, control messages, end, fork.
#
# Uses:     _host.h, the data of _hosted.pxi; thread_spawn of _life.pxi
# Provides: hosts_make, hosts_free, hosts_child; hosts_look, hosts_poll, hosts_stop (the keeper's part); session_begin,
#           session_end; carriers_end
#
# A host is started by the keeper, not by Python: the thread that waits for it may hold the interpreter lock.

cdef enum:
    KEPT_BYTES = RUN_BYTES                  # of each page buffer: what ordinary runs use

# ---- sessions ---------------------------------------------------------------------------------------------------

cdef uint64_t session_begin(Engine_t *e, int pickle_fd, uint64_t block_bytes, const char *name) noexcept nogil:
    """A provider's number; takes the descriptor over. 0: no memory, and the descriptor stays the caller's."""
    global session_next
    cdef Session_t *one = <Session_t *>calloc(1, sizeof(Session_t))
    if one == NULL:
        return 0
    one.pickle_fd = pickle_fd
    one.block_bytes = block_bytes
    memcpy(one.name, name, 80)
    pthread_mutex_lock(&registry_lock)
    one.id = session_next
    session_next += 1
    one.next = e.sessions
    e.sessions = one
    pthread_mutex_unlock(&registry_lock)
    return one.id


cdef void session_end(Engine_t *e, uint64_t session) noexcept nogil:
    """Its hosts are told; the keeper goes on with those whose socket is full. Under registry_lock."""
    cdef Session_t **at = &e.sessions
    cdef Session_t *one
    cdef uint32_t i
    while at[0] != NULL and at[0].id != session:
        at = &at[0].next
    one = at[0]
    if one == NULL or one.pickle_fd < 0:
        return
    close(one.pickle_fd)
    one.pickle_fd = -1
    for i in range(e.hosts.n):
        if e.hosts.host[i].control_fd >= 0:
            one.untold |= <uint32_t>1 << i
    at[0] = one.next
    one.next = e.sessions_ended
    e.sessions_ended = one
    if sessions_tell(e) and e.keeper_fd >= 0:
        eventfd_raise(e.keeper_fd)


cdef bint sessions_tell(Engine_t *e) noexcept nogil:
    """Tells hosts of sessions that ended, as far as their sockets take it. Whether some are left. Under
    registry_lock."""
    cdef Session_t **at = &e.sessions_ended
    cdef Session_t *one
    cdef host_message m
    cdef uint32_t full = 0, i
    memset(&m, 0, sizeof(m))
    m.what = CONTROL_CLOSE
    while at[0] != NULL:
        one = at[0]
        m.session = one.id
        for i in range(e.hosts.n):
            if one.untold & ~full & <uint32_t>1 << i:
                if e.hosts.host[i].control_fd >= 0 and host_send(e.hosts.host[i].control_fd, &m, -1) == -EAGAIN:
                    full |= <uint32_t>1 << i
                else:
                    one.untold &= ~(<uint32_t>1 << i)       # or it is gone, and its instance with it
        if one.untold:
            at = &one.next
            if full == (<uint32_t>1 << e.hosts.n) - 1:
                break
        else:
            at[0] = one.next
            free(one)
    return e.sessions_ended != NULL


cdef void control_answer(Host_t *h, host_message *m) noexcept nogil:
    """The host asks for a provider's pickle, or for the memory of its region."""
    cdef Session_t *one
    cdef uint64_t i
    cdef Region_t *r
    cdef int fd = -1
    m.error = -ENOENT
    pthread_mutex_lock(&registry_lock)
    one = h.engine.sessions
    while one != NULL and one.id != m.session:
        one = one.next
    if one != NULL:
        m.block_bytes = one.block_bytes
        memcpy(m.name, one.name, 80)
        fd = one.pickle_fd
    if one != NULL and m.what == CONTROL_MEMORY:
        fd = -1
        for i in range(snapshot.n if snapshot != NULL else 0):
            r = snapshot.entry[i].region
            if r.engine == h.engine and r.fill.session == m.session and r.memfd >= 0 and not r.in_child:
                m.nbytes = r.span
                fd = r.memfd
    if fd >= 0:
        m.error = 0
    if host_send(h.control_fd, m, fd) == -EAGAIN:
        h.owed = m[0]                       # its socket is full of closes: answered later
        h.owes = 1
    pthread_mutex_unlock(&registry_lock)


# ---- the keeper's part: hosts begin, end, and are asked ---------------------------------------------------------

cdef int hosts_look(Engine_t *e, int timeout_ms) noexcept nogil:
    """When to look at them again, in milliseconds, at most timeout_ms (-1: no need to)."""
    cdef Host_t *h
    cdef uint32_t i
    cdef int status = 0
    cdef bint soon = False
    if e.sessions_ended != NULL:
        pthread_mutex_lock(&registry_lock)
        soon = sessions_tell(e)
        pthread_mutex_unlock(&registry_lock)
    for i in range(e.hosts.n):
        h = &e.hosts.host[i]
        if h.pid > 0:
            if h.owes:
                h.owes = 0
                control_answer(h, &h.owed)
            soon = soon or h.owes
            control_read(h)
            if u32_load(&h.kill_generation) == h.channel.generation:
                host_kill(h.pid, h.pidfd)
                soon = True
            if u32_load(&h.state) != HOST_UP:
                soon = True
                if u32_load_seq(&h.channel.ready) == h.channel.generation:
                    h.failures = 0
                    u32_store(&h.state, HOST_UP)
                elif now_ns() - h.begun_ns > e.hosts.start_ns and not e.hosts.debug:
                    host_kill(h.pid, h.pidfd)
            if host_reap(h.pid, &status):
                host_ended(h, status)
        if h.pid == 0 and u32_load(&h.wanted):
            soon = True
            if now_ns() >= h.again_ns:
                u32_store(&h.wanted, 0)
                host_begin(h)
        if buffers_trim(h) and timeout_ms < 0:
            timeout_ms = TICK_IDLE_MS
    return TICK_BUSY_MS if soon else timeout_ms


cdef bint buffers_trim(Host_t *h) noexcept nogil:
    """Gives back what page buffers have beyond KEPT_BYTES once they were not used for a while: those of large blocks.
    Whether some are left for later."""
    cdef Carrier *k
    cdef uint64_t bit, bits, now = now_ns()
    cdef uint32_t i
    cdef bint left = False
    for i in range(HOST_REQUESTS):
        k = &h.carrier[i]
        bit = <uint64_t>1 << i
        bits = u64_load(&h.free)
        if k.touched <= KEPT_BYTES:
            continue
        if bits & bit and now > k.posted_ns + SECOND_NS and u64_cas(&h.free, bits, bits & ~bit):
            if k.touched > KEPT_BYTES and now > k.posted_ns + SECOND_NS:
                fallocate(h.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                          <int64_t>(host_buffer_at(i) + KEPT_BYTES), <int64_t>(HOST_BUFFER_BYTES - KEPT_BYTES))
                k.touched = 0
            k.counted = NULL
            k.writes = 0
            carrier_return(k.s)
        else:
            left = True
    return left


cdef void control_read(Host_t *h) noexcept nogil:
    cdef host_message m
    cdef int fd = -1
    while host_receive(h.control_fd, &m, &fd, MSG_DONTWAIT) == 1:
        if fd >= 0:
            close(fd)                       # none is expected
        if m.what == CONTROL_PICKLE or m.what == CONTROL_MEMORY:
            control_answer(h, &m)


cdef void host_begin(Host_t *h) noexcept nogil:
    """Starts the process. Where that fails it counts as one that ended at once."""
    cdef Hosts_t *all = h.engine.hosts
    cdef host_start start
    cdef int pair[2]
    cdef int n = 0, pid
    h.channel.generation += 1
    pair[0] = -1
    pair[1] = -1
    if not h.offering:
        h.offering = 1
        u32_add(&h.engine.carriers, 1)
        if thread_spawn(&offers_main, h, b"uffd-offers", -1) != 0:
            u32_sub(&h.engine.carriers, 1)
            h.offering = 0
    pid = host_sockets(pair)
    if pid == 0:
        while all.argv[n] != NULL:
            n += 1
        number_text(all.argv[n - 2], h.memfd)
        number_text(all.argv[n - 1], pair[1])
        start.argv = all.argv
        start.envp = all.envp
        start.keep[0] = h.memfd
        start.keep[1] = pair[1]
        start.with_terminal = all.debug
        pid = host_spawn(&start)
        close(pair[1])
    if pid < 0:
        if pair[0] >= 0:
            close(pair[0])
        host_failed(h, pid)
        return
    pthread_mutex_lock(&registry_lock)
    h.control_fd = pair[0]
    pthread_mutex_unlock(&registry_lock)
    h.pid = pid
    h.pidfd = sys_pidfd(pid)
    h.begun_ns = now_ns()


cdef void number_text(char *to, int n) noexcept nogil:
    cdef line l
    l.n = 0
    line_number(&l, <uint64_t>n)
    memcpy(to, l.text, l.n)
    to[l.n] = 0


cdef void host_failed(Host_t *h, int err) noexcept nogil:
    """It ended before it took a request, or did not begin."""
    h.failures += 1
    h.again_ns = now_ns() + (<uint64_t>50000000 << (h.failures if h.failures < 5 else 5))
    u32_store(&h.wanted, 1)
    if h.failures >= STARTS:
        u32_store(&h.wanted, 0)
        u32_store(&h.state, HOST_BROKEN)
        say_host(h, b" can't be started: ", err)


cdef void host_ended(Host_t *h, int status) noexcept nogil:
    """The process was reaped: what it had in hand is lost, and who waits for that asks again."""
    cdef host_channel *ch = h.channel
    cdef uint32_t i, word
    cdef bint ready = u32_load_seq(&ch.ready) == ch.generation
    cdef bint killed = u32_load(&h.kill_generation) == ch.generation
    cdef bint hung = not ready and now_ns() - h.begun_ns > h.engine.hosts.start_ns and not h.engine.hosts.debug
    pthread_mutex_lock(&registry_lock)
    close(h.control_fd)
    h.control_fd = -1
    pthread_mutex_unlock(&registry_lock)
    if h.pidfd >= 0:
        close(h.pidfd)
    h.pidfd = -1
    h.owes = 0
    h.last_status = status
    u32_store(&h.state, HOST_DOWN)
    u32_store_seq(&ch.sleepers, 0)
    if not u32_load(&h.engine.stopping):
        say_host(h, b" was not ready in time and was stopped" if hung else
                 b" did not answer in time and was stopped" if killed else b" has ended unasked", 0)
    h.pid = 0
    if hung or not ready and status & 127 != SIGKILL:   # killed from outside says nothing about its ability to start
        host_failed(h, -ECHILD)
    for i in range(HOST_REQUESTS):
        word = u32_load(&ch.request[i].word)
        ch.request[i].error = LOST_BY_OTHERS if killed else 0       # who is late itself knows it
        if word & REQ_STATE == REQ_TAKEN and u32_cas(&ch.request[i].word, word,
                                                     word & ~<uint32_t>REQ_STATE | REQ_LOST):
            futex_wake_shared(&ch.request[i].word, 1)
        elif word & REQ_STATE == REQ_POSTED:
            u64_or(&ch.posted, <uint64_t>1 << i)    # it may have died between the two steps of taking it
            if u32_load(&h.state) == HOST_DOWN:
                u32_store(&h.wanted, 1)
            futex_wake_shared(&ch.request[i].word, 1)


cdef void say_host(Host_t *h, const char *what, int err) noexcept nogil:
    cdef line l
    cdef int status = h.last_status
    l.n = 0
    line_text(&l, b"uffd: the provider host")
    if h.pid > 0:
        line_text(&l, b" (process ")
        line_number(&l, <uint64_t>h.pid)
        line_text(&l, b")")
    line_text(&l, what)
    if err != 0 and err != -ECHILD:
        line_text(&l, h.engine.hosts.argv[0])
        line_text(&l, b": ")
        line_errno(&l, -err)
    elif err != 0:
        line_text(&l, b"it ended before it was ready, each time; what it printed stands above")
    elif status & 127:
        line_text(&l, b", by signal ")
        line_number(&l, <uint64_t>(status & 127))
    else:
        line_text(&l, b", with status ")
        line_number(&l, <uint64_t>(status >> 8 & 255))
    line_say(&l)


cdef int hosts_poll(Engine_t *e, pollfd *fds) noexcept nogil:
    """Adds what the keeper waits for; how many."""
    cdef uint32_t i
    cdef int n = 0
    if e.hosts == NULL:
        return 0
    for i in range(e.hosts.n):
        if e.hosts.host[i].pid > 0:
            fds[n].fd = e.hosts.host[i].control_fd
            fds[n].events = <short>POLLIN
            n += 1
            if e.hosts.host[i].pidfd >= 0:
                fds[n].fd = e.hosts.host[i].pidfd
                fds[n].events = <short>POLLIN
                n += 1
    return n


cdef void hosts_stop(Engine_t *e) noexcept nogil:
    """The keeper's last act: hosts may close their providers for a second, then they are killed. None is left."""
    cdef uint64_t deadline = now_ns() + 3 * SECOND_NS / 2
    cdef Host_t *h
    cdef uint32_t i
    cdef int status = 0
    cdef bint left = True
    for i in range(e.hosts.n):
        if e.hosts.host[i].pid > 0:
            shutdown(e.hosts.host[i].control_fd, SHUT_RDWR)
    while left:
        left = False
        for i in range(e.hosts.n):
            h = &e.hosts.host[i]
            if h.pid > 0 and host_reap(h.pid, &status):
                host_ended(h, status)
            elif h.pid > 0:
                left = True
                if now_ns() > deadline:
                    host_kill(h.pid, h.pidfd)
        if left:
            poll(NULL, 0, 2)


# ---- making, ending, forking ------------------------------------------------------------------------------------

cdef int hosts_make(Engine_t *e, Hosts_t *all) noexcept nogil:
    """Maps the channels of all.n hosts, whose processes begin with their first request. 0 or -errno."""
    cdef Host_t *h
    cdef uint32_t i, k
    for i in range(all.n):
        h = &all.host[i]
        h.engine = e
        h.index = i
        h.control_fd = -1
        h.pidfd = -1
        h.memfd = sys_memfd(b"uffd-host")
        if h.memfd < 0:
            return h.memfd
        if ftruncate(h.memfd, <int64_t>host_channel_bytes()) != 0:
            return -errno
        h.channel = <host_channel *>map_lazy(host_channel_bytes(), PROT_READ | PROT_WRITE, h.memfd)
        if h.channel == NULL:
            return -ENOMEM
        h.channel.version = HOST_VERSION
        h.free = (<uint64_t>1 << HOST_REQUESTS) - 1
        for k in range(HOST_REQUESTS + 1):
            host_slot(e, h, k)
    e.hosts = all
    return 0


cdef void host_slot(Engine_t *e, Host_t *h, uint32_t k) noexcept nogil:
    cdef Slot *s = &e.slots[HOSTED_SLOT + h.index * (HOST_REQUESTS + 1) + k]
    s.kind = SLOT_HOSTED
    s.staging = <char *>h.channel + host_buffer_at(k)
    if k == HOST_REQUESTS:
        h.offers = s
        return
    s.carrier = &h.carrier[k]
    s.carrier.s = s
    s.carrier.h = h
    s.carrier.q = &h.channel.request[k]
    s.carrier.index = k


cdef void carriers_end(Engine_t *e) noexcept nogil:
    """Their threads look at `stopping`."""
    cdef uint32_t i, k
    if e.hosts != NULL:
        for i in range(e.hosts.n):
            futex_wake_shared(&e.hosts.host[i].channel.offer.word, 1)
            for k in range(HOST_REQUESTS):
                futex_wake_all(&e.hosts.host[i].carrier[k].baton)


cdef void sessions_free(Engine_t *e) noexcept nogil:
    """Those that no host hears of any more: the hosts are gone."""
    cdef Session_t *one
    while e.sessions_ended != NULL:
        one = e.sessions_ended
        e.sessions_ended = one.next
        free(one)


cdef void hosts_free(Hosts_t *all) noexcept nogil:
    cdef uint32_t i
    for i in range(all.n):
        if all.host[i].channel != NULL:
            munmap(all.host[i].channel, host_channel_bytes())
        if all.host[i].memfd > 0:
            close(all.host[i].memfd)
    free(all.memory)
    free(all)


cdef int hosts_child(Engine_t *e) noexcept nogil:
    """A forked child has hosts of its own, over channels of its own in the same place. 0 or -errno."""
    cdef Host_t *h
    cdef uint32_t i, k
    e.carriers = 0
    e.carrier_waiters = 0
    e.jobs_starved = 0
    sessions_free(e)
    for i in range(e.hosts.n):
        h = &e.hosts.host[i]
        if h.control_fd >= 0:
            close(h.control_fd)             # else the parent's host would not notice the parent's end
        if h.pidfd >= 0:
            close(h.pidfd)
        close(h.memfd)
        h.control_fd = -1
        h.pidfd = -1
        h.pid = 0
        h.owes = 0                          # to the parent's host
        h.state = HOST_DOWN
        h.wanted = 0
        h.kill_generation = 0
        h.failures = 0
        h.again_ns = 0
        h.offering = 0
        h.latency_ns = 0
        h.answered_ns = 0
        h.free = (<uint64_t>1 << HOST_REQUESTS) - 1
        h.writing = 0
        for k in range(HOST_REQUESTS):
            h.carrier[k].baton = 0
            h.carrier[k].threaded = 0
            h.carrier[k].posted_bytes = 0
            h.carrier[k].touched = 0
        h.memfd = sys_memfd(b"uffd-host")
        if h.memfd < 0 or ftruncate(h.memfd, <int64_t>host_channel_bytes()) != 0:
            return -ENOMEM
        if mmap(h.channel, host_channel_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                h.memfd, 0) == MAP_FAILED:
            return -errno
        h.channel.version = HOST_VERSION
    return 0
