# Migration, what both sides share: their data, their states, their connections.
#
# Uses:     _wire.h; say_paused, ask_again of _wiretake.pxi, source_thaw of _wiresend.pxi
# Provides: Wire_t and its life: wire_step, wire_enter, wire_leave, wire_break, wire_attach, wire_release; frames:
#           wire_say, wire_take; slots: wire_borrow, wire_return; bits
#
# A region at the destination is an ordinary one, of zeros, with a *part* of a wire laid over it: a bit for each block
# that has yet to come. A touch of such a block is not answered but asked for, and whoever reads the fault goes on; the
# thread that receives the block claims it, places it and publishes it, which wakes the toucher. A bit goes when its
# block is there, or is known to be zeros. Two connections: `push`, on which the source sends what is missing, and `ask`
# for what is wanted at once, the answers to it, and all that is agreed on. ARCHITECTURE.md draws both sides' states.

cdef extern from "_wire.h" nogil:
    struct wire_head:
        uint32_t kind
        uint32_t part
        uint64_t block
        uint32_t count
        uint32_t nbytes
        uint64_t extra
    int wire_ready(int fd, short events, int timeout_ms) noexcept
    int wire_send(int fd, const wire_head *head, const void *data, size_t nbytes, int timeout_ms) noexcept
    uint64_t wire_rate(int fd, uint64_t queue_ns, uint64_t *fair) noexcept
    int wire_send_thin(int fd, const wire_head *head, const char *data, size_t nbytes, int timeout_ms, uint64_t rate,
                       uint64_t fair) noexcept
    int wire_receive(int fd, void *buffer, size_t nbytes, size_t *got, int timeout_ms) noexcept
    bint wire_is_zero(const char *p, size_t n) noexcept
    char *huge_room(uint64_t len) noexcept
    bint huge_fill(char *p, uint64_t len, uint64_t page, uint64_t *took_ns) noexcept
    int wire_shutdown(int fd) noexcept
    char *wire_disarm(char *start, uint64_t len) noexcept
    int wire_take_pair(int fd, char *name, int *pair, int timeout_ms) noexcept
    uint64_t wire_next_bit(const uint64_t *bits, uint64_t start, uint64_t end) noexcept
    short POLLOUT
    int EPROTO, ENOTCONN, ENOTRECOVERABLE

cdef enum:
    WIRE_PARTS = 1 << 12             # arrays of one migration
    WIRE_RUN = HUGE_BYTES           # bytes of one frame, where a block is not larger
    WIRE_PIECE = 256 * 1024         # of it that are received and placed at once, where they are copied
    WIRE_BUFFER = 2 * (MAX_BLOCK_BYTES + WIRE_RUN)      # of a thread: a frame's blocks, and behind them compressed ones
    WIRE_STATE = 64 << 20           # bytes of state that travel at the switchover, at the most
    WIRE_EVENTS = 512               # of the time line; later ones are not kept
    WIRE_ASKS = 1024                # requests whose time is taken at once
    WIRE_WAITERS = 256              # threads whose waiting is told; later ones are in the sum alone
    WIRE_SLICE_MS = 100
    WIRE_SILENCE_MS = 15000         # a peer that takes nothing, or gives nothing that is due, for so long is gone

cdef uint64_t DEATH_NS = 5000000    # between looks whether a peer whose connection ended is dead

cdef enum:                          # kinds of frames
    # from the source
    W_BLOCKS = 1, W_ZEROS, W_BAD, W_DIRTY, W_PREPARE, W_COMMIT, W_CANCEL, W_RESUME, W_LOST, W_PASS, W_SYNC
    W_PACKED
    # from the destination
    W_ACK = 32, W_WANT, W_READY, W_STARTED, W_HAVE, W_HAVE_END, W_DONE, W_GAVE_UP, W_ENDED
    W_SYNCED

cdef enum:                          # phases and events: the numbers of migrate/_states.py
    PH_SETUP, PH_PRECOPY, PH_FROZEN, PH_DOUBT, PH_POSTCOPY, PH_PAUSED_EARLY, PH_PAUSED_DOUBT, PH_PAUSED_LATE
    PH_RECOVERING_EARLY, PH_RECOVERING_DOUBT, PH_RECOVERING_LATE, PH_COMPLETED, PH_CANCELLED, PH_FAILED_SOURCE
    PH_FAILED_DESTINATION, PH_FAILED_UNKNOWN
    PHASES
cdef enum:
    EV_DATA, EV_FREEZE, EV_COMMIT, EV_STARTED, EV_DONE, EV_BROKEN, EV_RECONNECT, EV_RESUMED_EARLY, EV_RESUMED_LATE
    EV_GIVEN_UP, EV_CANCEL, EV_LOST
    EVENTS

cdef enum:                          # counters of a migration
    M_PRECOPY, M_PUSHED, M_REQUESTED, M_ZERO, M_DOUBLED, M_RELEASED
    M_KINDS

cdef struct Part_t:                 # an array's memory, on either side
    Wire_t *wire
    uint64_t nbytes
    uint64_t blocks
    uint32_t shift
    uint64_t region_id              # 0: memory that is not ours (source)
    char *base                      # of that
    Part_t *before                  # source: of the migration that had brought the region
    uint64_t *todo                  # source: to be sent. Destination: has yet to come
    uint64_t *dirty                 # source: written since its protection was last set. Destination: asked for
    bint passed                     # its file is shared by both sides: what is in that does not travel
    uint64_t *there                 # of such a part: blocks in the file. Of others, at the source: that were released
    bint opened                     # the destination has opened its provider by itself: what that holds does not travel
    uint64_t *stored                # of such a part: those blocks, as of the last look (source), or of the hand-over
    char *away                      # source: where its pages are mapped once it was disarmed
    uint64_t guarded                # source, not ours: address and bytes of its whole pages, which are protected
    uint64_t guarded_bytes
    bint whole                      # the same: those hold all of the array, and nothing else
    char *edge[2]                   # else the blocks at its ends, as they were when writers were stopped

cdef struct Ask:                    # a block that somebody waits for, and since when
    uint64_t key
    uint64_t since_ns
    uint32_t tid                    # the thread that touched it first
    uint32_t touched                # a thread waits in a touch of it, and not in a call

cdef struct Waiter:                 # a thread of the destination's program: how long it waited in all
    uint32_t tid
    uint64_t ns

cdef struct Moment:
    uint64_t at_ns
    uint32_t phase
    uint64_t left

cdef struct Frame_t:                # of the push, on its way
    uint64_t bytes
    uint64_t flight                 # that were under way, with it, when it was sent
    uint64_t sent_ns
    uint64_t block
    uint32_t count
    uint32_t part

cdef struct Wire_t:
    uint32_t refs                   # the Python object, its threads, the regions that parts lie over
    bint source
    uint8_t rules[PHASES * EVENTS]  # phase and event to the next phase; constant
    uint32_t nparts
    Part_t *part
    uint64_t parts_bytes
    pthread_mutex_t lock            # phase, connection, users, moments
    uint32_t phase                  # written under the lock; futex
    uint32_t connected
    uint32_t epoch                  # of the connection: one more with each
    uint32_t users                  # threads that use its descriptors; futex
    int push_fd
    int ask_fd
    pthread_mutex_t send_lock       # of who writes to ask_fd
    uint32_t ending                 # threads are to end
    uint32_t threads                # that run; futex
    uint32_t turn                   # futex of the push thread, and of who waits for a round: changes with every news
    int32_t last_error              # of the connection
    int peer_fd                     # pidfd of the other side's process, where it is on this machine; -1
    uint32_t told                   # the user was told of the pause
    Wire_t *next                    # of those that touches may wait for; under registry_lock
    Engine_t *engine                # of its regions, whose keeper looks at those; NULL: the guard thread does
    uint64_t said_ns                # when the user was last told that a touch waits
    # destination
    char name[32]                   # of the migration
    int gate_fd                     # where new connections come from, after a break; not ours
    uint64_t left                   # blocks that have yet to come
    uint32_t verdict                # 0, or the errno of what will never come
    uint32_t asks_left              # requests that the socket did not take
    char *state                     # what travelled at the switchover
    uint64_t state_bytes
    uint64_t handed                 # frames of the push connection that were placed
    Ask ask[WIRE_ASKS]
    Waiter waiter[WIRE_WAITERS]     # tid by CAS, ns added
    # source
    uint64_t rate[2]                # bytes per second of precopy and push; 0: no limit
    uint64_t next_ns                # when the next bytes may go
    uint32_t round                  # a round of precopy is to be sent
    uint32_t drained                # the push has stopped, and all it sent was acknowledged
    uint32_t at_part                # where the push goes on; a request moves it
    uint64_t at_block
    uint64_t sent                   # bytes and frames of this connection; acknowledged ones
    uint64_t sent_frames
    uint64_t acked
    uint64_t window                 # bytes under way at most; two frames always may be
    uint64_t flow                   # bytes per second that the kernel measured; 0: unknown
    uint64_t trip_ns                # the least time from a frame's sending to its acknowledgement
    uint64_t trip_until_ns          # when that is measured anew, with nothing else under way
    Frame_t ring[2048]              # frames under way, by their number
    uint32_t ready                  # answers of the destination; 2: it gave up
    uint32_t frozen                 # writers wait
    uint32_t kill                   # a writer after the hand-over ends the process, once all is handed over
    uint32_t killed                 # a write was seen
    uint64_t parked_ns              # since when somebody waits in a touch that is not answered; 0: nobody
    uint64_t parked                 # of what: part << 44 | block
    uint32_t guarding               # writes are seen: all is protected, or marked
    int guard_fd                    # userfaultfd of memory that is not ours
    int guard_wake
    pthread_mutex_t guard_lock      # of who answers a fault there, against who protects it
    bint release
    uint32_t plain                  # runs that are sent as they are, since the last one did not get smaller
    uint32_t plain_next
    bint packs                      # both: blocks may go compressed (constant)
    # what is told of it
    uint64_t wired                  # bytes of blocks as they went over the wire
    uint64_t bytes[M_KINDS]
    uint64_t blocks[M_KINDS]
    uint64_t passed                 # bytes that the file held at the hand-over
    uint64_t opened                 # bytes of blocks that the destination has from its own provider
    uint64_t rounds
    uint64_t latency[BUCKETS]       # log2 ns from request to placed
    uint64_t latency_max_ns
    uint64_t blocked_ns             # sum of those
    uint64_t asked
    uint64_t setup_ns
    uint64_t stopped_ns             # source: last write possible. CLOCK_MONOTONIC of its machine
    uint64_t resumed_ns             # destination: may run. Source: it was heard of
    uint64_t moments
    Moment moment[WIRE_EVENTS]


cdef Wire_t *wires = NULL           # under registry_lock


# ---- states and connections ---------------------------------------------------------------------------------------

cdef bint wire_step_locked(Wire_t *w, uint32_t event) noexcept nogil:
    """Goes where the event leads; False where it has no place. Under the lock."""
    cdef uint8_t following = w.rules[w.phase * EVENTS + event]
    if following == 255:
        return False
    if following != w.phase and w.moments < WIRE_EVENTS:
        w.moment[w.moments].at_ns = now_ns()
        w.moment[w.moments].phase = following
        w.moment[w.moments].left = w.left
        w.moments += 1
    u32_store(&w.phase, following)
    return True


cdef bint wire_step(Wire_t *w, uint32_t event) noexcept nogil:
    cdef bint done
    pthread_mutex_lock(&w.lock)
    done = wire_step_locked(w, event)
    pthread_mutex_unlock(&w.lock)
    if done:
        wire_tell(w)
    return done


cdef void wire_tell(Wire_t *w) noexcept nogil:
    """There is news: whoever waits looks again."""
    u32_add(&w.turn, 1)
    futex_wake_all(&w.turn)
    futex_wake_all(&w.phase)


cdef bint wire_enter(Wire_t *w, uint32_t *epoch) noexcept nogil:
    """Waits for a connection that this thread did not use yet, and is then one of its users. False: it is to end."""
    cdef uint32_t turn
    while True:
        turn = u32_load(&w.turn)
        pthread_mutex_lock(&w.lock)
        if u32_load(&w.ending):
            pthread_mutex_unlock(&w.lock)
            return False
        if w.connected and w.epoch != epoch[0]:
            epoch[0] = w.epoch
            u32_add(&w.users, 1)
            pthread_mutex_unlock(&w.lock)
            return True
        pthread_mutex_unlock(&w.lock)
        if u32_load(&w.connected) or w.peer_fd < 0 or u32_load(&w.phase) >= PH_COMPLETED:
            futex_wait(&w.turn, turn, SECOND_NS)
        elif peer_dead(w):
            give_verdict(w, ENOTRECOVERABLE)
        else:
            futex_wait(&w.turn, turn, DEATH_NS)


cdef inline bint peer_dead(Wire_t *w) noexcept nogil:
    """Known of a process on this machine alone. Its sockets end a moment before it does."""
    return w.peer_fd >= 0 and wire_ready(w.peer_fd, <short>POLLIN, 0) == 0


cdef void wire_leave(Wire_t *w) noexcept nogil:
    u32_sub(&w.users, 1)
    futex_wake_all(&w.users)


cdef void wire_break(Wire_t *w, uint32_t epoch, int err) noexcept nogil:
    """The connection of that epoch is over, whoever noticed: both sockets are shut down, the migration is paused."""
    cdef bint paused = False
    pthread_mutex_lock(&w.lock)
    if w.connected and w.epoch == epoch:
        w.connected = 0
        w.last_error = err
        wire_shutdown(w.push_fd)
        wire_shutdown(w.ask_fd)
        paused = wire_step_locked(w, EV_BROKEN)
    pthread_mutex_unlock(&w.lock)
    if paused:
        if w.source and u32_load(&w.phase) == PH_PAUSED_EARLY:
            source_thaw(w)
        elif not w.source and u32_load(&w.phase) == PH_PAUSED_LATE:
            say_paused(w, err)
    wire_tell(w)


cdef int wire_attach(Wire_t *w, int push_fd, int ask_fd) noexcept nogil:
    """New connections in the place of those that broke. Takes the descriptors over. 0, or -EBUSY: there is one."""
    cdef uint32_t users
    while True:
        pthread_mutex_lock(&w.lock)
        users = u32_load(&w.users)
        if w.connected or users == 0:
            break
        pthread_mutex_unlock(&w.lock)
        futex_wait(&w.users, users, SECOND_NS)
    if w.connected or w.epoch and not wire_step_locked(w, EV_RECONNECT) and w.phase != PH_COMPLETED:
        pthread_mutex_unlock(&w.lock)
        return -EBUSY
    if w.source:
        send_again(w)
    pthread_mutex_lock(&w.send_lock)        # a worker that looked at the old one must not ask by the new one
    wire_close_fds(w)
    w.push_fd = push_fd
    w.ask_fd = ask_fd
    pthread_mutex_unlock(&w.send_lock)
    w.sent = 0
    w.acked = 0
    w.sent_frames = 0
    w.handed = 0
    w.window = 256 << 10
    w.flow = 0
    w.trip_until_ns = 0
    w.epoch += 1
    w.connected = 1
    pthread_mutex_unlock(&w.lock)
    wire_tell(w)
    return 0


cdef void wire_close_fds(Wire_t *w) noexcept nogil:
    if w.push_fd >= 0:
        close(w.push_fd)
    if w.ask_fd >= 0:
        close(w.ask_fd)
    w.push_fd = -1
    w.ask_fd = -1


cdef int wire_say(Wire_t *w, uint32_t kind, uint32_t part, uint64_t block, uint32_t n, uint64_t extra,
                  const void *data, size_t nbytes) noexcept nogil:
    """A frame on the `ask` connection, whole. 0 or -errno."""
    cdef wire_head head
    cdef int err
    head.kind = kind
    head.part = part
    head.block = block
    head.count = n
    head.nbytes = <uint32_t>nbytes
    head.extra = extra
    pthread_mutex_lock(&w.send_lock)
    err = wire_send(w.ask_fd, &head, data, nbytes, WIRE_SILENCE_MS)
    pthread_mutex_unlock(&w.send_lock)
    return err


cdef int wire_take(Wire_t *w, int fd, void *buffer, size_t nbytes, uint32_t epoch, bint due) noexcept nogil:
    """Receives nbytes. Looks now and then whether the connection still stands, and, of what is due, not for longer than
    WIRE_SILENCE_MS. 0 or -errno."""
    cdef size_t got = 0
    cdef int err, waited = 0
    while True:
        err = wire_receive(fd, buffer, nbytes, &got, WIRE_SLICE_MS)
        if err != -ETIMEDOUT:
            return err
        if u32_load(&w.ending) or not u32_load(&w.connected) or u32_load(&w.epoch) != epoch:
            return -ENOTCONN
        if peer_dead(w):
            return -ECONNRESET              # a child that it forked has its sockets open
        waited += WIRE_SLICE_MS
        if waited >= WIRE_SILENCE_MS and (due or got):
            return -ETIMEDOUT
        if not w.source and u32_swap(&w.asks_left, 0):
            ask_again(w)


cdef bint wire_start(Wire_t *w, void *(*run)(void *) noexcept nogil, const char *name) noexcept nogil:
    u32_add(&w.threads, 1)
    u32_add(&w.refs, 1)
    if thread_spawn(run, w, name, -1) != 0:
        u32_sub(&w.threads, 1)
        u32_sub(&w.refs, 1)
        return False
    return True


cdef void wire_thread_ends(Wire_t *w) noexcept nogil:
    u32_sub(&w.threads, 1)
    futex_wake_all(&w.threads)
    wire_release(w)


cdef void wire_release(Wire_t *w) noexcept nogil:
    """Drops a reference; with the last one goes all of it."""
    cdef uint32_t i
    cdef Part_t *p
    if u32_sub(&w.refs, 1) != 1:
        return
    wire_close_fds(w)
    if w.peer_fd >= 0:
        close(w.peer_fd)
    if w.guard_fd >= 0:
        close(w.guard_fd)
    if w.guard_wake >= 0:
        close(w.guard_wake)
    for i in range(w.nparts):
        p = &w.part[i]
        if p.todo != NULL:
            munmap(p.todo, 4 * bits_bytes(p.blocks))
        if p.edge[0] != NULL:
            munmap(p.edge[0], 2 << p.shift)
    free(w.part)
    free(w.state)
    free(w)


cdef void part_release(Region_t *r) noexcept nogil:
    """Of a region that ends: the migration that brought it."""
    cdef Part_t *p = r.part
    while p != NULL and p.wire.source:
        p = p.before
    r.part = NULL
    if p != NULL:
        wire_release(p.wire)


cdef inline uint64_t bits_bytes(uint64_t blocks) noexcept nogil:
    return page_round((blocks + 63) / 64 * 8)


cdef inline bint bit_of(uint64_t *bits, uint64_t b) noexcept nogil:
    return u64_load_seq(&bits[b >> 6]) >> (b & 63) & 1


cdef inline bint bit_set(uint64_t *bits, uint64_t b) noexcept nogil:
    """Whether it was set before."""
    return u64_or(&bits[b >> 6], <uint64_t>1 << (b & 63)) >> (b & 63) & 1


cdef inline bint bit_take(uint64_t *bits, uint64_t b) noexcept nogil:
    """Clears it; whether it was set: of several takers one gets it."""
    return u64_and(&bits[b >> 6], ~(<uint64_t>1 << (b & 63))) >> (b & 63) & 1


cdef inline uint64_t part_bytes(Part_t *p, uint64_t b, uint64_t n) noexcept nogil:
    """Bytes of blocks [b, b + n) that are the array's."""
    cdef uint64_t end = (b + n) << p.shift
    return (end if end < p.nbytes else p.nbytes) - (b << p.shift)


# ---- slots, and a forked child ------------------------------------------------------------------------------------

cdef Slot *wire_borrow(Engine_t *e) noexcept nogil:
    """A slot for a migration's thread, which places or reads blocks; held for one run, so that one is soon free."""
    cdef uint32_t i, bits
    cdef unsigned int tries = 0
    while True:
        bits = u32_load(&e.wire_slots)
        for i in range(<uint32_t>WIRE_SLOTS):
            if bits & 1 << i == 0 and u32_cas(&e.wire_slots, bits, bits | 1 << i):
                return &e.slots[WIRE_SLOT + i]
        nap(tries)
        tries += 1


cdef void wire_return(Engine_t *e, Slot *s) noexcept nogil:
    cdef uint32_t bit = <uint32_t>1 << (s.index - WIRE_SLOT), bits = u32_load(&e.wire_slots)
    u32_store(&s.tid, 0)
    while not u32_cas(&e.wire_slots, bits, bits & ~bit):
        bits = u32_load(&e.wire_slots)


cdef void child_part(Region_t *r) noexcept nogil:
    """A forked child has no connection of its own: what has yet to come never comes to it. It is the parent's."""
    if r.part == NULL:
        return
    if r.part.wire.source:
        r.part = NULL                       # the child writes to its own copy as it likes
        r.frozen = 0
    else:
        u32_store(&r.part.wire.verdict, <uint32_t>ECHILD)
