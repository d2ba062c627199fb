/* What a migration's threads ask of sockets and of memory. Blocking calls answer 0 or -errno; none raises SIGPIPE. */
#ifndef UFFD_WIRE_H
#define UFFD_WIRE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <limits.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "_sys.h"

/* The head of every frame of the core, in the byte order of both ends (which they compare before). */
struct wire_head {
    uint32_t kind;
    uint32_t part;
    uint64_t block;
    uint32_t count;
    uint32_t nbytes;            /* of what follows */
    uint64_t extra;
};
_Static_assert(sizeof(struct wire_head) == 32, "the head of a frame is what goes over the wire");

/* Waits until the socket is ready for `events`: 0, -ETIMEDOUT, or -errno. A closed or broken one is ready. */
static inline int wire_ready(int fd, short events, int timeout_ms)
{
    struct pollfd p = {.fd = fd, .events = events};
    int n;
    do {
        n = poll(&p, 1, timeout_ms);
    } while (n < 0 && errno == EINTR);
    return n > 0 ? 0 : n == 0 ? -ETIMEDOUT : -errno;
}

/* Sends a head (or none) and what follows it, whole. -ETIMEDOUT: nothing was taken for timeout_ms. */
static inline int wire_send(int fd, const struct wire_head *head, const void *data, size_t nbytes, int timeout_ms)
{
    struct iovec part[2] = {{(void *)(uintptr_t)head, head ? sizeof *head : 0}, {(void *)(uintptr_t)data, nbytes}};
    struct msghdr message = {.msg_iov = part, .msg_iovlen = nbytes ? 2 : 1};
    int err;
    while (message.msg_iovlen) {
        ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN)
                return -errno;
            err = wire_ready(fd, POLLOUT, timeout_ms);
            if (err)
                return err;
            continue;
        }
        while (message.msg_iovlen && (size_t)n >= message.msg_iov->iov_len) {
            n -= (ssize_t)message.msg_iov->iov_len;
            message.msg_iov++;
            message.msg_iovlen--;
        }
        if (message.msg_iovlen) {
            message.msg_iov->iov_base = (char *)message.msg_iov->iov_base + n;
            message.msg_iov->iov_len -= (size_t)n;
        }
    }
    return 0;
}

/* What the kernel measured of a TCP connection (Linux 4.9): bytes per second that it delivers, 0 for unknown; and the
   bytes that keep it busy with a queue of queue_ns behind them. */
static inline uint64_t wire_rate(int fd, uint64_t queue_ns, uint64_t *fair)
{
    char info[168];                 /* struct tcp_info as of then; older headers lack these two fields */
    socklen_t len = sizeof info;
    uint32_t min_rtt_us;
    uint64_t rate;
    if (getsockopt(fd, IPPROTO_TCP, 11 /* TCP_INFO */, info, &len) || len < sizeof info)
        return 0;
    memcpy(&min_rtt_us, info + 148, sizeof min_rtt_us);
    memcpy(&rate, info + 160, sizeof rate);
    *fair = (uint64_t)((double)rate * (min_rtt_us * 1250.0 + (double)queue_ns) / 1e9);
    return rate;
}

/* Sends like wire_send, in slices, and waits before each until the network has no more than `fair` bytes to carry. */
static inline int wire_send_thin(int fd, const struct wire_head *head, const char *data, size_t nbytes, int timeout_ms,
                                 uint64_t rate, uint64_t fair)
{
    const size_t slice = 16 << 10;
    uint64_t waited_ns = 0;
    int queued, last = INT_MAX, err = 0;
    while (!err && nbytes) {
        struct pollfd p = {.fd = fd};           /* no events but its end, which nobody need ask for */
        struct timespec nap = {0, 0};
        size_t n = nbytes < slice ? nbytes : slice;
        if (ioctl(fd, SIOCOUTQ, &queued) == 0 && (uint64_t)queued > fair) {
            nap.tv_nsec = (long)((double)((uint64_t)queued - fair) * 1e9 / (double)rate);
            nap.tv_nsec = nap.tv_nsec > 1000000 ? 1000000 : nap.tv_nsec;
            waited_ns = queued < last ? 0 : waited_ns + (uint64_t)nap.tv_nsec;
            last = queued;
            if (waited_ns > (uint64_t)timeout_ms * 1000000)
                return -ETIMEDOUT;
            if (ppoll(&p, 1, &nap, NULL) <= 0)
                continue;                       /* else it is broken: sending says how */
        }
        err = wire_send(fd, head, data, n, timeout_ms);
        head = NULL;
        data += n;
        nbytes -= n;
        last = INT_MAX;
        waited_ns = 0;
    }
    return err;
}

/* Receives exactly nbytes. -ECONNRESET: the other side closed; -ETIMEDOUT: nothing came for timeout_ms, and `*got`
   bytes are there, with which it can be called again. */
static inline int wire_receive(int fd, void *buffer, size_t nbytes, size_t *got, int timeout_ms)
{
    while (*got < nbytes) {
        ssize_t n = recv(fd, (char *)buffer + *got, nbytes - *got, MSG_DONTWAIT);
        if (n > 0) {
            *got += (size_t)n;
        } else if (n == 0) {
            return -ECONNRESET;
        } else if (errno == EAGAIN) {
            int err = wire_ready(fd, POLLIN, timeout_ms);
            if (err)
                return err;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

/* A migration's name (32 bytes) and its two new connections, handed over by the process that listens. 0 or -errno, and
   then no descriptor is left open. */
static inline int wire_take_pair(int fd, char *name, int *pair, int timeout_ms)
{
    char text[64], control[CMSG_SPACE(8 * sizeof(int))];
    struct iovec to = {text, sizeof text};
    struct msghdr message = {.msg_iov = &to, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    int got[8], n = 0, i, err = wire_ready(fd, POLLIN, timeout_ms);
    struct cmsghdr *c;
    ssize_t bytes;
    if (err)
        return err;
    bytes = recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (bytes <= 0)
        return bytes < 0 ? -errno : -ECONNRESET;
    for (c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        n = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(got, CMSG_DATA(c), (size_t)n * sizeof(int));
    }
    if (n == 2 && bytes == 32) {
        memcpy(name, text, 32);
        pair[0] = got[0];
        pair[1] = got[1];
        return 0;
    }
    for (i = 0; i < n; i++)
        close(got[i]);
    return -EPROTO;
}

/* Whether all bytes are zero; as fast as memory where they are, at once where they are not. */
static inline int wire_is_zero(const char *p, size_t n)
{
    uint64_t first;
    if (n < sizeof first) {
        for (size_t i = 0; i < n; i++)
            if (p[i])
                return 0;
        return 1;
    }
    memcpy(&first, p, sizeof first);
    if (first)
        return 0;
    memcpy(&first, p + n - sizeof first, sizeof first);
    return first == 0 && memcmp(p, p + 8, n - 8) == 0;
}

/* Moves the pages of a mapping that a userfaultfd watches to another address. The mapping stays, empty and watched, so
   that every access to it faults. Where an mremap is an event, the kernel moves whole page tables, else page by page.
   NULL: not possible (Linux before 5.13). */
static inline char *wire_disarm(char *start, uint64_t len)
{
    const uint64_t unit = 2 << 20;               /* of a page table: it must lie alike in both places */
    char *room = mmap(NULL, len + unit, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *to;
    if (room == MAP_FAILED)
        return NULL;
    to = room + (((uintptr_t)start - (uintptr_t)room) & (unit - 1));
    if (mremap(start, len, len, MREMAP_MAYMOVE | MREMAP_FIXED | 4 /* MREMAP_DONTUNMAP */, to) == MAP_FAILED) {
        munmap(room, len + unit);
        return NULL;
    }
    if (to > room)
        munmap(room, (size_t)(to - room));
    munmap(to + len, unit - (uint64_t)(to - room));
    return to;
}

/* Room for a huge page, which a forked child does not get: it would share it, and then it can't be moved. NULL: none is
   to be had. */
static inline char *huge_room(uint64_t len)
{
    char *p = map_aligned(len, len, PROT_READ | PROT_WRITE);
    if (p && (madvise(p, len, MADV_HUGEPAGE) || madvise(p, len, MADV_DONTFORK))) {
        munmap(p, len);
        p = NULL;
    }
    return p;
}

/* Has the kernel put one into such a room, which is empty, and measures what that takes of the thread's time. 0: it has
   none, and the room stays empty. */
static inline int huge_fill(char *p, uint64_t len, uint64_t page, uint64_t *took_ns)
{
    struct timespec before, after;
    unsigned char last = 0;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
    *(volatile char *)p = 0;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
    *took_ns = (uint64_t)((after.tv_sec - before.tv_sec) * 1000000000 + after.tv_nsec - before.tv_nsec);
    if (mincore(p + len - page, page, &last) == 0 && last & 1)
        return 1;
    madvise(p, len, MADV_DONTNEED);
    return 0;
}

static inline int wire_shutdown(int fd)
{
    return shutdown(fd, SHUT_RDWR);
}

/* The next set bit of [from, end), or end. Bits change under us: it is a hint until it is claimed. */
static inline uint64_t wire_next_bit(const uint64_t *bits, uint64_t from, uint64_t end)
{
    while (from < end) {
        uint64_t word = __atomic_load_n(&bits[from >> 6], __ATOMIC_RELAXED) >> (from & 63);
        if (word) {
            from += (uint64_t)__builtin_ctzll(word);
            return from < end ? from : end;
        }
        from = (from | 63) + 1;
    }
    return end;
}

#endif
