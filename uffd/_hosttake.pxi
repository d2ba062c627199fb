# The provider host's own end of the channel, without Python: which request a thread takes next, answers, the watcher.
#
# Uses:     _host.h, the data of HostEnd in _hostside.pxi
# Provides: session_find, host_take, request_end, offer_rows, host_ask, host_watcher

cdef HostSession *session_find(HostEnd end, uint64_t session, bint make) noexcept nogil:
    """The entry, made if there is none and that is wanted; else NULL, and when memory is short. Good for as long as the
    lock is held."""
    cdef uint32_t i, at
    cdef HostSession *one
    cdef HostSession *vacant = NULL
    if make and end.session_used * 4 >= end.session_room * 3:
        sessions_grow(end)
    for i in range(end.session_room):
        at = <uint32_t>(session + i) & (end.session_room - 1)
        one = &end.sessions[at]
        if one.id == session:
            return one
        if one.id == 0 and vacant == NULL:
            vacant = one
        if one.limit == 0:
            break                           # never used: nothing lies behind it
    if not make:
        return NULL
    if vacant != NULL:
        end.session_used += vacant.limit == 0
        memset(vacant, 0, sizeof(HostSession))
        vacant.id = session
        vacant.limit = 1
    return vacant


cdef void sessions_grow(HostEnd end) noexcept nogil:
    """A table with twice the room that is in use; as it was when there is no memory. Under the lock."""
    cdef uint32_t live = 0, room = HOST_SESSIONS, i, at
    cdef HostSession *table
    for i in range(end.session_room):
        live += end.sessions[i].id != 0
    while room < 2 * live + 2:
        room *= 2
    table = <HostSession *>calloc(room, sizeof(HostSession))
    if table == NULL:
        return
    for i in range(end.session_room):
        if end.sessions[i].id:
            at = <uint32_t>end.sessions[i].id & (room - 1)
            while table[at].id:
                at = (at + 1) & (room - 1)
            table[at] = end.sessions[i]
    free(end.sessions)
    end.sessions = table
    end.session_room = room
    end.session_used = live


cdef int host_take(HostEnd end, uint32_t *found) noexcept nogil:
    """Requests of one session that are equally urgent, the oldest first; 0 at the end of service."""
    cdef host_channel *ch = end.channel
    cdef uint32_t bell
    cdef uint64_t spin, until
    cdef int n
    while not u32_load(&end.stopping):
        bell = u32_load_seq(&ch.doorbell)
        n = host_pick(end, found)
        if n:
            return n
        spin = 2 * u64_load(&ch.gap_ns)
        until = now_ns() + (spin if spin < SPIN_NS else 0)
        while u32_load(&ch.doorbell) == bell and now_ns() < until:
            cpu_relax()
        if u32_load(&ch.doorbell) != bell:
            continue
        u32_add_seq(&ch.sleepers, 1)
        futex_wait_shared(&ch.doorbell, bell, SECOND_NS)
        u32_sub(&ch.sleepers, 1)
    return 0


cdef int host_pick(HostEnd end, uint32_t *found) noexcept nogil:
    cdef host_channel *ch = end.channel
    cdef uint64_t posted = u64_load_seq(&ch.posted), bits = posted, session = 0
    cdef uint32_t kind = REQ_READ
    cdef int best = -1, i, n = 0
    cdef HostSession *one
    if posted == 0:
        return 0
    pthread_mutex_lock(&end.lock)
    while bits:
        i = u64_log2(bits)
        bits &= ~(<uint64_t>1 << i)
        if i < <int>HOST_REQUESTS and request_before(ch, i, best):
            one = session_find(end, ch.request[i].session, True)
            if one != NULL and one.running < one.limit:
                best = i
                session = one.id
                kind = ch.request[i].kind
    if best >= 0 and request_take(ch, best, session, kind):
        found[0] = <uint32_t>best
        n = 1
        one = session_find(end, session, False)
        bits = posted & ~(<uint64_t>1 << best)
        if one == NULL or not (kind == REQ_READ and one.read_many or kind == REQ_WRITE and one.write_many):
            bits = 0
        while bits:
            i = u64_log2(bits)
            bits &= ~(<uint64_t>1 << i)
            # who waits does not wait for the bytes of others that nobody waits for yet
            if (i < <int>HOST_REQUESTS and ch.request[i].urgent == ch.request[best].urgent
                    and request_take(ch, i, session, kind)):
                found[n] = <uint32_t>i
                n += 1
        batch_begin(end, session, found, <uint32_t>n)
        if one != NULL:
            one.running += 1
    pthread_mutex_unlock(&end.lock)
    return n


cdef void batch_begin(HostEnd end, uint64_t session, const uint32_t *found, uint32_t n) noexcept nogil:
    """Requests that one thread took together. A number of its own: a request is used again as soon as it is answered,
    before the others of its batch are. Under the lock."""
    cdef uint32_t b = 0, i
    while b < HOST_REQUESTS - 1 and end.left[b]:
        b += 1                              # at most as many batches as requests
    end.left[b] = n
    end.session_of[b] = session
    for i in range(n):
        end.batch[found[i]] = b


cdef bint request_before(host_channel *ch, int i, int best) noexcept nogil:
    """Whether posted request i comes before request `best`."""
    cdef host_request *a = &ch.request[i]
    if u32_load(&a.word) & REQ_STATE != REQ_POSTED:
        return False
    if best < 0:
        return True
    if a.urgent != ch.request[best].urgent:
        return a.urgent > ch.request[best].urgent
    return a.order < ch.request[best].order


cdef bint request_take(host_channel *ch, int i, uint64_t session, uint32_t kind) noexcept nogil:
    """If it is posted, and this session's. The word's sequence number has the swap fail if it was taken back and posted
    again for another between the look and the swap."""
    cdef uint32_t word = u32_load(&ch.request[i].word)
    if word & REQ_STATE != REQ_POSTED or ch.request[i].session != session or ch.request[i].kind != kind:
        return False
    if not u32_cas(&ch.request[i].word, word, word & ~<uint32_t>REQ_STATE | REQ_TAKEN):
        return False
    u64_and(&ch.posted, ~(<uint64_t>1 << i))
    u64_store(&ch.request[i].taken_ns, now_ns())
    return True


cdef void request_end(HostEnd end, uint32_t slot, int err) noexcept nogil:
    """The answer. With the last one of a batch its session may be handed to a thread again."""
    cdef host_request *q = &end.channel.request[slot]
    cdef uint32_t word = u32_load(&q.word), b
    cdef HostSession *one
    if word & REQ_STATE != REQ_TAKEN:
        return                              # answered already
    pthread_mutex_lock(&end.lock)
    b = end.batch[slot]
    if end.left[b]:
        end.left[b] -= 1
    if end.left[b] == 0:
        one = session_find(end, end.session_of[b], False)
        if one != NULL and one.running:
            one.running -= 1
    pthread_mutex_unlock(&end.lock)
    q.error = err
    u32_store_seq(&q.word, word & ~<uint32_t>REQ_STATE | REQ_DONE)
    futex_wake_shared(&q.word, 1)


cdef uint32_t offer_rows(HostEnd end, uint64_t session, uint64_t offset, uint64_t step, uint64_t row_bytes,
                         uint64_t rows) noexcept nogil:
    """How many blocks were placed."""
    cdef host_offer *o = &end.channel.offer
    o.session = session
    o.offset = offset
    o.step = step
    o.row_bytes = row_bytes
    o.rows = rows
    o.taken = 0
    u32_store_seq(&o.word, REQ_POSTED)
    futex_wake_shared(&o.word, 1)
    while u32_load(&o.word) == REQ_POSTED and not u32_load(&end.stopping):
        futex_wait_shared(&o.word, REQ_POSTED, SECOND_NS / 4)
    return o.taken if u32_load(&o.word) == REQ_DONE else 0


cdef int host_ask(HostEnd end, host_message *m, int *fd) noexcept nogil:
    """Asks the engine, and waits at most half a minute for the answer to this very question. 0 or -errno."""
    cdef uint32_t before
    cdef uint64_t deadline = now_ns() + 30 * SECOND_NS
    cdef uint64_t session = m.session
    cdef uint32_t what = m.what
    cdef int err
    pthread_mutex_lock(&end.asking)
    before = u32_load(&end.answered)
    err = host_send(end.control_fd, m, -1)
    while err == 0 and not u32_load(&end.stopping):
        if u32_load(&end.answered) != before:
            before = u32_load(&end.answered)
            m[0] = end.answer
            fd[0] = end.answer_fd
            end.answer_fd = -1
            if m.session == session and m.what == what:
                err = m.error
                break
            if fd[0] >= 0:                  # of a question that was given up
                close(fd[0])
            fd[0] = -1
        elif now_ns() > deadline:
            err = -ETIMEDOUT
        else:
            futex_wait(&end.answered, before, SECOND_NS / 10)
    pthread_mutex_unlock(&end.asking)
    return err


cdef void *host_watcher(void *argument) noexcept nogil:
    """A thread without Python: a provider that holds the interpreter lock for long does not keep it from seeing the
    engine's end. The object of `argument` lives as long as the process."""
    control_loop(<HostEnd>argument)
    return NULL


cdef void control_loop(HostEnd end) noexcept nogil:
    cdef host_message m
    cdef int fd = -1, got
    cdef pollfd fds[2]
    fds[0].fd = end.control_fd
    fds[0].events = <short>POLLIN
    fds[1].fd = end.parent_fd
    fds[1].events = <short>POLLIN
    while True:
        poll(fds, 2, 1000)
        got = host_receive(end.control_fd, &m, &fd, MSG_DONTWAIT)
        if got == 0 or getppid() != end.parent or (fds[1].revents and end.parent_fd >= 0):
            break
        if got == 1 and m.what == CONTROL_CLOSE:
            note_closed(end, m.session)
        elif got == 1:
            end.answer = m
            end.answer_fd = fd
            u32_add_seq(&end.answered, 1)
            futex_wake_all(&end.answered)
    u32_store_seq(&end.stopping, 1)
    u32_add_seq(&end.channel.doorbell, 1)
    futex_wake_shared(&end.channel.doorbell, 1 << 30)
    u32_add(&end.closings, 1)
    futex_wake_all(&end.closings)
    poll(NULL, 0, 1000)                     # close() of the providers runs meanwhile
    end_process(1)


cdef void note_closed(HostEnd end, uint64_t session) noexcept nogil:
    cdef bint there = False
    while not there:
        pthread_mutex_lock(&end.lock)
        if end.closed_tail - end.closed_head < HOST_CLOSINGS:
            end.closed[end.closed_tail & (HOST_CLOSINGS - 1)] = session
            end.closed_tail += 1
            there = True
        pthread_mutex_unlock(&end.lock)
        if not there:
            poll(NULL, 0, 10)               # Python is behind
    u32_add(&end.closings, 1)
    futex_wake_all(&end.closings)
