/* Signals: the SIGBUS handler of inline delivery and of poisoned blocks, its chain, and the Ctrl-C of a long wait.
 *
 * The handler runs on the faulting thread, under whatever locks that thread holds. It takes no lock of ours, does not
 * allocate, and prints by write(2) only. SA_NODEFER, so that a fill may touch another inline region; not SA_ONSTACK,
 * because an alternate stack is too small for a fill; every other signal is blocked while it runs.
 */
#ifndef UFFD_SIGBUS_H
#define UFFD_SIGBUS_H

#include "_sys.h"
#include <ucontext.h>

/* ---- one line of text, built without stdio ---------------------------------------------------------------------- */

struct line { size_t n; char text[1024]; };

static inline void line_text(struct line *l, const char *s)
{
    while (*s && l->n < sizeof l->text - 1)
        l->text[l->n++] = *s++;
}

static inline void line_number(struct line *l, uint64_t v)
{
    char digits[24];
    int n = 0;
    do
        digits[n++] = (char)('0' + v % 10);
    while ((v /= 10) != 0);
    while (n && l->n < sizeof l->text - 1)
        l->text[l->n++] = digits[--n];
}

static inline void line_errno(struct line *l, int e)
{
    /* What fills answer. Our own table: strerrorname_np needs glibc 2.32, strerror may allocate. */
    static const struct { int number; const char *name; } known[] = {
        { EIO, "EIO" }, { ENODATA, "ENODATA" }, { EBADMSG, "EBADMSG" }, { ETIMEDOUT, "ETIMEDOUT" },
        { ENOMEM, "ENOMEM" }, { ENOSPC, "ENOSPC" }, { EFAULT, "EFAULT" }, { EINVAL, "EINVAL" },
        { EAGAIN, "EAGAIN" }, { EACCES, "EACCES" }, { EPERM, "EPERM" }, { ENOENT, "ENOENT" },
        { ESTALE, "ESTALE" }, { EBADF, "EBADF" }, { ENXIO, "ENXIO" }, { ENOTSUP, "ENOTSUP" },
        { EINTR, "EINTR" }, { EISDIR, "EISDIR" }, { EREMOTEIO, "EREMOTEIO" },
    };
    const char *name = NULL;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].number == e)
            name = known[i].name;
    line_text(l, "errno ");
    line_number(l, (uint64_t)(e < 0 ? -e : e));
    if (name) {
        line_text(l, " ");
        line_text(l, name);
    }
}

static inline void line_say(struct line *l)
{
    l->text[l->n++] = '\n';                      /* line_text leaves one byte free for it */
    say(l->text, l->n);
}

/* ---- SIGBUS ----------------------------------------------------------------------------------------------------- */

enum { BUS_NOT_OURS = 0, BUS_SERVED = 1, BUS_POISONED = 2 };

/* Set once by the core: serves or judges the fault at an address. */
static int (*bus_deliver)(uint64_t address, int write);
static inline void bus_deliver_set(int (*deliver)(uint64_t, int)) { bus_deliver = deliver; }

/* Whom we replaced. Written under bus_lock, read by the handler: two cells, the index published last. */
static struct sigaction bus_chain[2];
static uint32_t bus_chain_index;
static uint32_t bus_lock;

static inline int fault_was_write(const void *context)
{
#if defined(__x86_64__)
    const ucontext_t *u = context;
    return (u->uc_mcontext.gregs[REG_ERR] & 2) != 0;
#else
    (void)context;                               /* not said: taken for a read; a write faults once more */
    return -1;
#endif
}

/* The thread that is inside the handler before us, or 0: a signal that it sends itself from there is its way to die.
 * Stays set when that handler leaves by siglongjmp, which does no harm: faults are told apart by si_code. */
static uint32_t bus_chained_tid;

/* A fault: the instruction runs again and the kernel ends the process. A signal that was sent has to be sent again. */
static inline void bus_default_and_die(const siginfo_t *info)
{
    struct sigaction d = { .sa_handler = SIG_DFL };
    sigaction(SIGBUS, &d, NULL);
    if (info->si_code <= 0)
        raise(SIGBUS);
}

/* From any thread, after the reason was said. */
static inline void bus_die(void)
{
    struct sigaction d = { .sa_handler = SIG_DFL };
    sigaction(SIGBUS, &d, NULL);
    raise(SIGBUS);                               /* no thread of ours blocks it; a program thread that does: */
    abort();
}

static inline void bus_call_chain(int number, siginfo_t *info, void *context)
{
    const struct sigaction *next = &bus_chain[u32_load(&bus_chain_index)];
    uint32_t before = u32_load(&bus_chained_tid), mine = (uint32_t)thread_id();
    if (before == mine && info->si_code <= 0) {  /* faulthandler puts back whom it replaced, us, and raises */
        bus_default_and_die(info);
        return;
    }
    u32_store(&bus_chained_tid, mine);
    if (next->sa_flags & SA_SIGINFO)
        next->sa_sigaction(number, info, context);
    else if (next->sa_handler == SIG_DFL || (next->sa_handler == SIG_IGN && info->si_code > 0))
        bus_default_and_die(info);               /* a fault can't be ignored: the kernel would force the default */
    else if (next->sa_handler != SIG_IGN)
        next->sa_handler(number);
    u32_store(&bus_chained_tid, before);
}

static void bus_handler(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    int verdict = BUS_NOT_OURS;
    if (info->si_code > 0)                       /* <= 0: sent by kill, raise or sigqueue */
        verdict = bus_deliver((uint64_t)(uintptr_t)info->si_addr, fault_was_write(context));
    if (verdict != BUS_SERVED)
        bus_call_chain(number, info, context);
    if (verdict == BUS_POISONED)                 /* one that only takes note would be back here for ever */
        bus_default_and_die(info);
    errno = saved;
}

/* Makes sure that SIGBUS is ours. 1: somebody had taken it, and is our chain target now; 0: it was ours already. */
static inline int bus_ensure(void)
{
    struct sigaction now, ours = { .sa_sigaction = bus_handler, .sa_flags = SA_SIGINFO | SA_NODEFER };
    if (sigaction(SIGBUS, NULL, &now) || ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == bus_handler))
        return 0;
    if (!u32_cas(&bus_lock, 0, 1))
        return 0;                                /* another thread is at it */
    sigfillset(&ours.sa_mask);
    sigdelset(&ours.sa_mask, SIGBUS);
    uint32_t next = 1 - u32_load(&bus_chain_index);
    bus_chain[next] = now;
    u32_store(&bus_chain_index, next);
    sigaction(SIGBUS, &ours, NULL);
    u32_store(&bus_lock, 0);
    return 1;
}

/* ---- Ctrl-C: armed while somebody waits for a block longer than the patience of the keeper ---------------------- */

static struct sigaction int_chain;
static uint32_t int_armed;
static uint64_t int_first_ns;                    /* when the first of two was pressed; 0: not yet */
#define INT_PAIR_NS 5000000000u                  /* later than that it is a first one again */

static void int_handler(int number, siginfo_t *info, void *context)
{
    uint64_t now = now_ns(), first = u64_load(&int_first_ns);
    u64_store(&int_first_ns, now);
    if (first && now - first < INT_PAIR_NS) {    /* the second one: the wait can't be unwound, the process can end */
        static const char text[] = "uffd: interrupted twice while waiting for a block: giving up\n";
        struct sigaction d = { .sa_handler = SIG_DFL };
        sigset_t only;
        say(text, sizeof text - 1);
        sigaction(SIGINT, &d, NULL);
        sigemptyset(&only);
        sigaddset(&only, SIGINT);
        pthread_sigmask(SIG_UNBLOCK, &only, NULL);
        raise(number);
        return;
    }
    if (int_chain.sa_flags & SA_SIGINFO)
        int_chain.sa_sigaction(number, info, context);
    else if (int_chain.sa_handler != SIG_IGN && int_chain.sa_handler != SIG_DFL)
        int_chain.sa_handler(number);
}

static inline void int_arm(void)                 /* called by a keeper, which then lets SIGINT through to itself */
{
    struct sigaction ours = { .sa_sigaction = int_handler, .sa_flags = SA_SIGINFO };
    if (!u32_cas(&int_armed, 0, 1))
        return;
    u64_store(&int_first_ns, 0);
    sigemptyset(&ours.sa_mask);
    struct sigaction now;
    sigaction(SIGINT, NULL, &now);
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == int_handler)
        return;                                  /* another engine's keeper was between its two steps */
    int_chain = now;
    ours.sa_flags |= now.sa_flags & SA_RESTART;  /* what input() and sockets do on Ctrl-C stays as it was */
    if ((int_chain.sa_flags & SA_SIGINFO) == 0 && (int_chain.sa_handler == SIG_IGN || int_chain.sa_handler == SIG_DFL))
        return;                                  /* nobody catches it: one Ctrl-C does what it always does */
    sigaction(SIGINT, &ours, NULL);
}

static inline void int_disarm(void)
{
    struct sigaction now;
    if (!u32_load(&int_armed))
        return;
    if (sigaction(SIGINT, NULL, &now) == 0 && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == int_handler)
        sigaction(SIGINT, &int_chain, NULL);
    u32_store(&int_armed, 0);
}

/* In a forked child, which has one thread: nobody is inside any of this. */
static inline void bus_after_fork(void)
{
    u32_store(&bus_lock, 0);
    u32_store(&bus_chained_tid, 0);
    int_disarm();
}

static inline void thread_take_int(int yes)
{
    sigset_t only;
    sigemptyset(&only);
    sigaddset(&only, SIGINT);
    pthread_sigmask(yes ? SIG_UNBLOCK : SIG_BLOCK, &only, NULL);
}

#endif
