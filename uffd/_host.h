/* The provider host: the memory that engine and host share, and how the process is started without the interpreter.
 *
 * Both sides include this. A request is a record and a page buffer; its `word` is a futex of a state and a sequence
 * number, and says who owns the record:
 *
 *   FREE > POSTED        the engine, which has filled the record in
 *   POSTED > TAKEN       the host, by compare-and-swap: it has the buffer from here on
 *   POSTED > FREE        the engine takes it back (too late), by compare-and-swap: exactly one of the two wins
 *   TAKEN > DONE         the host; the record holds the answer
 *   TAKEN > LOST         the engine, after the host was reaped
 *
 * The buffer of a READ is the host's to fill; that of a WRITE has the bytes that belong at `offset`, and stays as it
 * is, so that it can be asked for again. FLUSH makes what was acknowledged durable.
 *
 * Nothing that the host writes is trusted further than that: lengths are cut, numbers are checked by who reads them.
 */
#ifndef UFFD_HOST_H
#define UFFD_HOST_H

#include "_sys.h"
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define HOST_REQUESTS 32u                        /* of one host at a time */
#define HOST_BUFFER_BYTES (16u << 20)            /* of each: address space, touched as far as blocks reach */
#define HOST_TEXT_BYTES 8192u
#define HOST_VERSION 2u

enum { REQ_FREE, REQ_POSTED, REQ_TAKEN, REQ_DONE, REQ_LOST, REQ_STATE = 7, REQ_SEQUENCE = 8 };
enum { REQ_OPEN, REQ_READ, REQ_WRITE, REQ_FLUSH };
enum { OPENED_READ_MANY = 1, OPENED_WRITES = 2 };

struct host_request {
    uint32_t word;
    uint32_t kind;
    uint64_t session;
    uint64_t offset;
    uint64_t nbytes;
    uint64_t order;                              /* oldest first */
    uint32_t urgent;                             /* 2: somebody waits in a fault; 1: in a call; 0: nobody */
    uint32_t in_place;                           /* into the region's own shared pages, at `offset` */
    int32_t error;                               /* 0 or -errno */
    uint32_t text_bytes;
    int64_t opened_bytes;                        /* of OPEN: the provider's size, or -1 */
    uint32_t opened_concurrency;
    uint32_t opened_flags;
    uint64_t taken_ns;                           /* CLOCK_MONOTONIC, which all processes share */
    uint8_t pad[40];
    char text[HOST_TEXT_BYTES];
};

struct host_offer {                              /* rows that nobody asked for; the word goes FREE, POSTED, DONE */
    uint32_t word;
    uint32_t taken;                              /* blocks that were placed */
    uint64_t session;
    uint64_t offset;                             /* of row 0; row i lies at offset + i * step */
    uint64_t step;
    uint64_t row_bytes;
    uint64_t rows;
};

struct host_channel {
    uint32_t version;
    uint32_t ready;                              /* futex: the generation of the host that takes requests */
    uint32_t generation;                         /* of the host that is to; set before it is started */
    uint32_t doorbell;                           /* futex: one more with each post */
    uint32_t sleepers;                           /* threads of the host that sleep on it */
    uint32_t pad;
    uint64_t posted;                             /* bit per request */
    uint64_t order;
    uint64_t gap_ns;                             /* between posts, smoothed: whether it pays to wait awake */
    uint64_t posted_ns;
    struct host_offer offer;
    struct host_request request[HOST_REQUESTS];
};

/* Behind the channel, page-aligned: the buffers of the requests, then the offer's. */
static inline uint64_t host_buffer_at(uint32_t i)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    return ((sizeof(struct host_channel) + page - 1) & ~(page - 1)) + (uint64_t)i * HOST_BUFFER_BYTES;
}

static inline uint64_t host_channel_bytes(void)
{
    return host_buffer_at(HOST_REQUESTS + 1);
}

/* ---- the control socket: what travels seldom --------------------------------------------------------------------- */

enum { CONTROL_PICKLE = 1, CONTROL_MEMORY = 2, CONTROL_CLOSE = 3 };

struct host_message {                            /* both ways; an answer carries a descriptor */
    uint64_t session;
    uint32_t what;
    int32_t error;
    uint64_t nbytes;                             /* of the region */
    uint64_t block_bytes;
    char name[80];
};

static inline int host_send(int socket_fd, const struct host_message *m, int fd)
{
    struct iovec part = { (void *)(uintptr_t)m, sizeof *m };
    union { struct cmsghdr head; char room[CMSG_SPACE(sizeof(int))]; } extra;
    struct msghdr h = { .msg_iov = &part, .msg_iovlen = 1 };
    memset(&extra, 0, sizeof extra);
    if (fd >= 0) {
        h.msg_control = &extra;
        h.msg_controllen = sizeof extra;
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    return sendmsg(socket_fd, &h, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)sizeof *m ? 0 : -errno;
}

/* 1 with a message (and a descriptor in *fd, or -1), 0 at the end of the connection, or -errno. */
static inline int host_receive(int socket_fd, struct host_message *m, int *fd, int flags)
{
    struct iovec part = { m, sizeof *m };
    union { struct cmsghdr head; char room[CMSG_SPACE(sizeof(int))]; } extra;
    struct msghdr h = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &extra, .msg_controllen = sizeof extra };
    ssize_t n = recvmsg(socket_fd, &h, flags | MSG_CMSG_CLOEXEC);
    *fd = -1;
    if (n <= 0)
        return n < 0 ? -errno : 0;
    struct cmsghdr *c = CMSG_FIRSTHDR(&h);
    if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(c), sizeof *fd);
    return n == (ssize_t)sizeof *m ? 1 : -EPROTO;
}

/* ---- the process ------------------------------------------------------------------------------------------------- */

struct host_start {
    char *const *argv;
    char *const *envp;
    int keep[2];                                 /* the descriptors that it gets, besides 0, 1 and 2 */
    int with_terminal;                           /* it is being debugged */
    int error;                                   /* of exec; written in our memory by the child */
};

/* Runs in the memory of the thread that starts it, which sleeps until exec: nothing but system calls. Signals stay
 * blocked (a handler of the program must not run here); the host unblocks them. */
static int host_exec(void *argument)
{
    struct host_start *s = argument;
    if (!s->with_terminal) {
        struct sigaction ignore = { .sa_handler = SIG_IGN };
        sigaction(SIGINT, &ignore, NULL);        /* before exec, which keeps what is ignored: Ctrl-C is the program's */
        setsid();
    }
    for (int i = 0; i < 2; i++)
        fcntl(s->keep[i], F_SETFD, 0);
    execve(s->argv[0], s->argv, s->envp);
    s->error = errno;
    _exit(127);
}

/* A child like any other once it has called exec: the program may see its SIGCHLD, and may reap it. The pid, or
 * -errno. */
static inline int host_spawn(struct host_start *s)
{
    enum { STACK = 64 * 1024 };
    char *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED)
        return -errno;
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    s->error = 0;
    int pid = clone(host_exec, stack + STACK, CLONE_VM | CLONE_VFORK | SIGCHLD, s);
    int error = pid < 0 ? errno : s->error;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    munmap(stack, STACK);
    if (pid > 0 && error)
        waitpid(pid, NULL, 0);
    return error ? -error : pid;
}

/* Whether the host has ended; *status as of wait(). */
static inline int host_reap(int pid, int *status)
{
    return waitpid(pid, status, WNOHANG) != 0;   /* ECHILD: the program waited for any child, and it was this one */
}

/* By its pidfd where there is one: the number may belong to another process once the program has reaped it. */
static inline void host_kill(int pid, int pidfd)
{
    if (pidfd < 0 || syscall(424 /* pidfd_send_signal, 5.1 */, pidfd, SIGKILL, NULL, 0u) != 0)
        if (pidfd < 0 || errno == ENOSYS || errno == EPERM)
            kill(pid, SIGKILL);
}

/* Moves the pages of a mapping into the place of another, which is gone with that. 0, or -errno and they are gone. */
static inline int pages_into(char *place, char *pages, uint64_t len)
{
    if (mremap(pages, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, place) != MAP_FAILED)
        return 0;
    int error = errno;
    munmap(pages, len);
    return -error;
}

static inline int sys_pidfd(int pid)
{
    int fd = (int)syscall(434 /* pidfd_open, 5.3 */, pid, 0u);
    return fd < 0 ? -errno : fd;
}

static inline int host_sockets(int pair[2])
{
    return socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) ? -errno : 0;
}

/* ---- futexes that two processes share ---------------------------------------------------------------------------- */

static inline void futex_wait_shared(uint32_t *word, uint32_t value, uint64_t timeout_ns)
{
    struct timespec t = { (time_t)(timeout_ns / 1000000000u), (long)(timeout_ns % 1000000000u) };
    syscall(SYS_futex, word, FUTEX_WAIT, value, &t, NULL, 0);
}

static inline void futex_wake_shared(uint32_t *word, int most)
{
    syscall(SYS_futex, word, FUTEX_WAKE, most, NULL, NULL, 0);
}

#endif
