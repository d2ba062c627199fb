# The keeper: one thread per engine that serves no faults and looks after those that do.
#
# Uses:     the fills of _fill.pxi, the jobs of _ahead.pxi, worker_start and region_reap of _life.pxi
# Provides: keeper_main; enter_blocking, leave_blocking (around a fill that can take long)
#
# It ticks twice a second, faster while fills are under way: tells the user about long waits, ends fills that hang,
# starts stand-ins when every worker is inside a slow fill, keeps SIGBUS ours, and tears down what could not be torn
# down at once.

cdef enum:
    TICK_IDLE_MS = 500
    TICK_BUSY_MS = 10
cdef uint64_t FOLLOW_NS = 400000000         # between looks at what memory the machine and the cgroup have left
cdef uint32_t finalizing = 0                # the interpreter is on its way out: it is not to be called any more
cdef uint32_t ints_taken = 0                # by keepers, and guards of migrations, which have let Ctrl-C through
cdef uint64_t PATIENCE_NS = 2 * SECOND_NS   # of a wait before the user is told
cdef uint64_t STALL_NS = 20000000           # all workers inside slow fills before another one is started


cdef void enter_blocking(Slot *s) noexcept nogil:
    """A worker goes into a fill that can take long. The last free one calls the keeper to look often, and so does one
    that has more faults in hand."""
    cdef Engine_t *e = s.engine
    if e.follow:
        arm_another(e, s)
    cdef bint all_busy
    if s.kind == SLOT_WORKER:
        all_busy = u32_add(&e.busy, 1) + 1 >= u32_load(&e.alive)
        if (all_busy or s.pending) and u32_cas(&e.keeper_alert, 0, 1):
            eventfd_raise(e.keeper_fd)


cdef void leave_blocking(Slot *s) noexcept nogil:
    if u32_load(&s.kind) == SLOT_WORKER:
        u32_sub(&s.engine.busy, 1)          # for a retired one the keeper did it


cdef void *keeper_main(void *argument) noexcept nogil:
    cdef Engine_t *e = <Engine_t *>argument
    cdef pollfd wake[1 + 2 * MAX_HOSTS]
    cdef int timeout_ms = TICK_BUSY_MS
    cdef bint said = False
    wake[0].fd = e.keeper_fd
    wake[0].events = <short>POLLIN
    while not u32_load(&e.stopping):
        poll(wake, <unsigned long>(1 + hosts_poll(e, &wake[1])), timeout_ms)
        eventfd_clear(e.keeper_fd)
        if e.regions and bus_ensure() and not said:
            say_taken()
            said = True
        timeout_ms = keeper_tick(e)
        if now_ns() - e.followed_ns > FOLLOW_NS:
            budget_follow(e, room_least(e, 0))
        if e.hosts != NULL:
            timeout_ms = hosts_look(e, timeout_ms)
    take_int(&e.waiting, False)
    if e.hosts != NULL:
        hosts_stop(e)
    u32_store(&e.keepers, 0)
    futex_wake_all(&e.keepers)
    return NULL


cdef int keeper_tick(Engine_t *e) noexcept nogil:
    """One look at everything; the milliseconds until the next."""
    cdef uint64_t now = now_ns()
    cdef uint32_t i
    cdef bint busy = False, waiting = False
    cdef Slot *s
    for i in range(<uint32_t>KEEPER_SLOT):
        s = &e.slots[i]
        if u64_load(&s.since_ns) != 0 and u32_load(&s.kind) != SLOT_RETIRED:
            busy = True
            waiting = keeper_look(e, s, now) or waiting
    waiting = wires_wait(e, now) or waiting
    take_int(&e.waiting, waiting)
    u32_swap(&e.keeper_alert, 0)            # before `busy` is read: pairs with enter_blocking
    fence_seq()
    if u32_load(&e.busy) < u32_load(&e.alive) or u32_load(&e.alive) >= MAX_WORKERS:
        e.stalled_ns = 0
    elif e.stalled_ns == 0:
        e.stalled_ns = now
    elif now - e.stalled_ns > STALL_NS:
        stand_in_start(e)
    writers_look(e, now)
    kept_look(e)
    if e.dying != NULL:
        busy = True
        keeper_reap(e)
    if busy or e.stalled_ns:
        return TICK_BUSY_MS
    return TICK_IDLE_MS if e.regions else -1


cdef void take_int(bint *taken, bint waiting) noexcept nogil:
    """Ctrl-C is ours while a touch waits for long, of any of those that the threads which call this look after."""
    if waiting:
        if not taken[0]:
            u32_add(&ints_taken, 1)
        int_arm()
    elif taken[0] and u32_sub(&ints_taken, 1) == 1:
        int_disarm()                        # another thread may arm it just now: it does again at its tick
    taken[0] = waiting
    thread_take_int(waiting)


cdef void stand_in_start(Engine_t *e) noexcept nogil:
    """Every worker is inside a slow fill: one more thread reads the faults. It ends when it is not needed."""
    cdef uint32_t i
    for i in range(e.workers, <uint32_t>MAX_WORKERS):
        if u32_load(&e.slots[i].kind) == SLOT_FREE:
            worker_start(e, &e.slots[i], -1)    # no thread to be had: tried again at the next tick
            break
    else:
        if u32_load(&e.alive) == 0:
            say_lost()
            bus_die()
    e.stalled_ns = 0


cdef bint keeper_look(Engine_t *e, Slot *s, uint64_t now) noexcept nogil:
    """At a fill under way: tells the user when it takes long, ends it when it takes too long. Whether it is long."""
    cdef uint64_t since = u64_load(&s.since_ns)
    cdef bint late = s.kind == SLOT_WORKER and now > s.deadline_ns + 50000000
    cdef bint nudge = s.pending != 0 and not s.nudged and now > since + STALL_NS
    cdef Region_t *r
    if since == 0 or now < since + PATIENCE_NS and not late and not nudge:
        return False
    if s.kind == SLOT_HOSTED and s.cause != DEMAND:
        return False                        # it may only wait for its turn, and nobody waits in a touch
    r = keeper_hold(s, since)
    if r == NULL:
        return False
    if nudge:
        s.nudged = 1                        # its other faults are asked again, for others to read
        uf_wake(r.fd, <uint64_t>r.base, r.span)
    if now > since + PATIENCE_NS and (s.said_ns == 0 or now - s.said_ns > 30 * SECOND_NS):
        s.said_ns = now
        say_waiting(s, r, now - since)
    if late and (s.cause != DEMAND or not r.wait_for_ever or u32_load(&r.closing)):
        keeper_time_out(e, s, r, since)
    region_release(r)
    return now > since + PATIENCE_NS


cdef Region_t *keeper_hold(Slot *s, uint64_t since) noexcept nogil:
    """The region of a slot's run with a reference, one that is closing too; NULL when the run has ended.

    While since_ns stands the owner has a reference, and nothing is reaped without registry_lock.
    """
    cdef Region_t *r = NULL
    pthread_mutex_lock(&registry_lock)
    if u64_load(&s.since_ns) == since and u32_load(&s.kind) != SLOT_RETIRED:
        r = s.region
        u32_add_seq(&r.refs, 1)
        if u64_load(&s.since_ns) != since:
            region_release(r)
            r = NULL
    pthread_mutex_unlock(&registry_lock)
    return r


cdef void keeper_time_out(Engine_t *e, Slot *s, Region_t *r, uint64_t since) noexcept nogil:
    """The fill hangs. Its blocks fail, its thread and buffer are given up for ever, and another takes its place.

    SLOT_RETIRED comes last: an owner that returns in between waits for it before it goes on.
    """
    cdef Slot *me = &e.slots[KEEPER_SLOT]
    cdef uint64_t b
    cdef uint32_t phase = u32_load(&s.phase)    # with the run's number: no later run can be taken for this one
    critical_enter(me)
    if u64_load(&s.since_ns) != since or phase & PHASE_MASK != BUSY or not u32_cas(
            &s.phase, phase, phase & ~<uint32_t>PHASE_MASK | TIMED_OUT):
        critical_leave(me)
        return                              # it has just come back
    u32_add(&r.stuck, 1)
    for b in range(s.first, s.first + s.count):
        if owned(s, r, b):
            fail_block(s, r, b, -ETIMEDOUT, s.tries + 1, DEAD if r.minor else 0)
    u64_add(&e.used, <uint64_t>s.recycled << r.shift)   # the hung fill has these pages, until it comes back
    critical_leave(me)
    if s.job != NULL:
        job_fail(e, s.job, -ETIMEDOUT, s.first, s.tries + 1)
        job_piece_done(e, s)
    if r.slow:
        u32_sub(&e.busy, 1)
    u32_sub(&e.alive, 1)
    u32_store(&s.kind, SLOT_RETIRED)
    if not r.is_inline:
        uf_wake(r.fd, <uint64_t>r.base, r.span)     # what else it had read is asked again
    stand_in_start(e)


cdef void keeper_reap(Engine_t *e) noexcept nogil:
    cdef Region_t **at = &e.dying
    cdef Region_t *r
    cdef bint reaped = False
    pthread_mutex_lock(&registry_lock)
    while at[0] != NULL:
        r = at[0]
        if u32_load(&r.refs) <= u32_load(&r.stuck) and u32_load(&r.flush_at_end) != 1:
            at[0] = r.next_dying
            region_reap(r)
            reaped = True
        else:
            at = &r.next_dying
    pthread_mutex_unlock(&registry_lock)
    if reaped and not u32_load(&finalizing):
        Py_AddPendingCall(&_sweep_pending, NULL)    # refused when its queue is full: the next API call sweeps too


cdef void budget_follow(Engine_t *e, uint64_t least) noexcept nogil:
    """What the machine has may become less, or more: "auto" is 60 % of what there is for us, and no budget is more than
    a memory cgroup leaves. Under memory pressure (PSI) "auto" falls by eighths, down to a half, and comes back; a
    number that the program gave does not: whoever is short of memory, it may be another cgroup. None falls below
    `least`, what pins and fills need: touches would fail, and the pins stay all the same."""
    cdef uint64_t used = u64_load(&e.used), room, limit = e.asked_limit, now = u64_load(&e.limit)
    cdef int i
    e.followed_ns = now_ns()
    room = sys_memory_available() + used if e.auto_limit else NO_LIMIT
    for i in range(e.cgroups):
        room = u64_min(room, sys_cgroup_room(e.cgroup[i].limit, e.cgroup[i].usage, e.cgroup[i].stat, used))
    if e.auto_limit:
        limit = room / 10 * 6
    elif room != NO_LIMIT:
        limit = u64_min(limit, room / 10 * 9)
    if e.auto_limit:
        e.pressed = pressed(e.pressed, sys_pressure(e.pressure))
        limit -= limit / 8 * e.pressed
    limit = u64_max(limit, u64_min(least, e.asked_limit))
    if limit != now and (limit < now - now / 64 or limit > now + now / 64 or limit == e.asked_limit):
        budget_set(e, limit)


cdef inline uint32_t pressed(uint32_t old, uint32_t percent) noexcept nogil:
    if percent > 10:
        return old + 1 if old < 4 else 4
    return old - 1 if old and percent < 2 else old


cdef void budget_set(Engine_t *e, uint64_t limit) noexcept nogil:
    pthread_mutex_lock(&e.policy_lock)
    u64_store(&e.limit, limit)
    policy_limit(&e.pol, limit)
    pthread_mutex_unlock(&e.policy_lock)
    evictor_ring(e)
    room_tell(e)


cdef void say_waiting(Slot *s, Region_t *r, uint64_t age_ns) noexcept nogil:
    cdef line l
    l.n = 0
    describe_block(&l, r, s.first)
    line_text(&l, b"waited for since ")
    line_number(&l, age_ns / SECOND_NS)
    line_text(&l, b" s, from ")
    line_text(&l, r.provider)
    if s.tries:
        line_text(&l, b", try ")
        line_number(&l, s.tries + 1)
        line_text(&l, b", last: ")
        line_errno(&l, -s.last_error)
    line_text(&l, b" (Ctrl-C twice gives up)")
    line_say(&l)


cdef void say_lost() noexcept nogil:
    cdef line l
    l.n = 0
    line_text(&l, b"uffd: every worker is stuck in a fill that hangs; nobody is left to serve a fault")
    line_say(&l)


cdef void say_taken() noexcept nogil:
    cdef line l
    l.n = 0
    line_text(&l, b"uffd: somebody installed a SIGBUS handler; uffd put its own back in front of it and passes on what "
                  b"is not its own")
    line_say(&l)
