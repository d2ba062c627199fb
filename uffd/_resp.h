/* Values from a socket straight into the pages where they belong: the bulk strings of RESP2 (the protocol of Redis).
 *
 * What comes is "$N\r\n", N bytes, "\r\n" for each value, or "$-1\r\n" where there is none. The first bytes of a value
 * are its head, which goes into a table, the others fill a part of somebody's memory; what a part does not get is
 * zeros. Nothing is believed: what does not look like this, or does not fit, ends it by -EPROTO.
 *
 * Provides: resp_values. Threads: one at a time per socket. Takes no lock and no memory.
 */
#ifndef UFFD_RESP_H
#define UFFD_RESP_H

#include "_sys.h"
#include <poll.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum {
    RESP_LINE = 24,                             /* the longest line "$N\r\n" */
    RESP_AHEAD = 256,                           /* bytes read beyond a value, at the most */
    RESP_GATHERED = 256 << 10,                  /* that are waited for together, if so many are on their way, */
    RESP_GATHER_MS = 2,                         /* for no longer than this */
};

struct resp_stream {
    int fd;
    int timeout_ms;                             /* of one wait; -1: none */
    uint8_t *ahead;                             /* received, and not taken: [start, stop) of `room` bytes */
    size_t room, start, stop;
    uint64_t expected;                          /* bytes that are likely to come yet: it wakes nobody if they do not */
    int low;                                    /* SO_RCVLOWAT of the socket, while this has it */
};

struct resp_part {
    uint8_t *start;
    uint64_t nbytes;
};

static inline void resp_low(struct resp_stream *s, uint64_t nbytes)
{
    int low = nbytes < RESP_GATHERED ? (int)nbytes : RESP_GATHERED;
    if (low != s->low && setsockopt(s->fd, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof low) == 0)
        s->low = low;
}

/* Waits until there is something to receive. To be woken by each piece as it comes would cost more than the piece: as
 * much as is expected is waited for first, for a moment. 0, -EAGAIN: that moment is over, or another error. */
static inline int resp_wait(struct resp_stream *s, bool gather)
{
    struct pollfd p = { s->fd, POLLIN, 0 };
    uint64_t begun = now_ns();
    int whole = gather && (s->timeout_ms < 0 || s->timeout_ms > RESP_GATHER_MS) ? RESP_GATHER_MS : s->timeout_ms;
    int left = whole, ready;
    resp_low(s, gather ? s->expected : 1);
    while ((ready = poll(&p, 1, left)) < 0 && errno == EINTR) {
        uint64_t gone = (now_ns() - begun) / 1000000;
        if (whole >= 0)
            left = gone < (uint64_t)whole ? whole - (int)gone : 0;
    }
    if (ready == 0)
        return gather ? -EAGAIN : -ETIMEDOUT;
    return ready < 0 ? -errno : 0;
}

/* What there is, at least a byte: into `data`, then behind what was received ahead, at most `more` bytes. 0 or -errno;
 * count[0] and the stream's `stop` have grown. */
static inline int resp_receive(struct resp_stream *s, uint8_t *data, uint64_t nbytes, size_t more, uint64_t *count)
{
    struct iovec part[2] = { { data, nbytes }, { NULL, 0 } };
    struct msghdr h = { .msg_iov = part, .msg_iovlen = 2 };
    bool gather = s->expected > 1;
    if (s->start == s->stop)
        s->start = s->stop = 0;
    part[1].iov_base = s->ahead + s->stop;
    part[1].iov_len = more < s->room - s->stop ? more : s->room - s->stop;
    for (;;) {
        ssize_t got = recvmsg(s->fd, &h, MSG_DONTWAIT);
        if (got > 0) {
            *count = (uint64_t)got < nbytes ? (uint64_t)got : nbytes;
            s->stop += (size_t)((uint64_t)got - *count);
            s->expected -= (uint64_t)got < s->expected ? (uint64_t)got : s->expected;
            return 0;
        }
        if (got == 0)
            return -EPROTO;                     /* the end, in the midst of an answer */
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            return -errno;
        int err = resp_wait(s, gather);
        if (err != 0 && err != -EAGAIN)
            return err;
        gather = false;
    }
}

/* The next n bytes, then as many of `more` as are there without a wait. */
static inline int resp_exactly(struct resp_stream *s, uint8_t *data, uint64_t n, size_t more)
{
    uint64_t at = s->stop - s->start < n ? s->stop - s->start : n, count = 0;
    memcpy(data, s->ahead + s->start, at);
    s->start += at;
    while (at < n) {
        int err = resp_receive(s, data + at, n - at, more, &count);
        if (err != 0)
            return err;
        at += count;
    }
    return 0;
}

/* The number of a line "$N\r\n", -1 or more. */
static inline int resp_length(struct resp_stream *s, int64_t *length)
{
    for (;;) {
        uint8_t *line = s->ahead + s->start, *end = memchr(line, '\n', s->stop - s->start);
        if (end != NULL) {
            int64_t number = 0;
            uint8_t *at = line + 1;
            if (line[0] != '$' || end - line < 3 || end - line >= RESP_LINE || end[-1] != '\r')
                return -EPROTO;
            s->start += (size_t)(end - line) + 1;
            if (at[0] == '-') {
                *length = -1;
                return end - line == 4 && at[1] == '1' ? 0 : -EPROTO;
            }
            for (; at < end - 1; at++) {
                if (*at < '0' || *at > '9' || number > INT32_MAX)
                    return -EPROTO;
                number = number * 10 + (*at - '0');
            }
            *length = number;
            return 0;
        }
        if (s->stop - s->start >= RESP_LINE)
            return -EPROTO;
        if (s->room - s->start < RESP_LINE) {   /* no room behind it for a whole line */
            memmove(s->ahead, line, s->stop - s->start);
            s->stop -= s->start;
            s->start = 0;
        }
        uint64_t none = 0;
        int err = resp_receive(s, NULL, 0, RESP_AHEAD, &none);
        if (err != 0)
            return err;
    }
}

static inline int resp_each(struct resp_stream *s, uint32_t n, uint32_t head_bytes, uint8_t *heads,
                            const struct resp_part *part, int64_t *length)
{
    for (uint32_t i = 0; i < n; i++) {
        uint64_t nbytes = 0;
        int err = resp_length(s, &length[i]);
        if (err == 0 && length[i] >= 0) {
            if ((uint64_t)length[i] < head_bytes || (uint64_t)length[i] - head_bytes > part[i].nbytes)
                return -EPROTO;
            nbytes = (uint64_t)length[i] - head_bytes;
            s->expected = (n - i) * (uint64_t)(length[i] + 2);
            s->expected -= s->stop - s->start < s->expected ? s->stop - s->start : s->expected;
            /* behind the last value comes what is not ours to take */
            size_t more = i + 1 < n ? 2 + RESP_LINE + head_bytes : 2;
            uint8_t end[2];
            err = resp_exactly(s, heads + (size_t)i * head_bytes, head_bytes, 0);
            if (err == 0)
                err = resp_exactly(s, part[i].start, nbytes, more < RESP_AHEAD ? more : RESP_AHEAD);
            if (err == 0)
                err = resp_exactly(s, end, 2, 0);
            if (err == 0 && (end[0] != '\r' || end[1] != '\n'))
                err = -EPROTO;
        }
        if (err != 0)
            return err;
        memset(part[i].start + nbytes, 0, part[i].nbytes - nbytes);
    }
    return 0;
}

/* n values: of value i, `head_bytes` to heads + i * head_bytes, the rest to part[i], and its length to length[i] (-1:
 * there is none). 0 or -errno: -EPROTO for what is no such answer, and for the end of the connection. */
static inline int resp_values(struct resp_stream *s, uint32_t n, uint32_t head_bytes, uint8_t *heads,
                              const struct resp_part *part, int64_t *length)
{
    int err;
    s->expected = 0;
    s->low = 1;
    err = resp_each(s, n, head_bytes, heads, part, length);
    if (s->low > 1)
        resp_low(s, 1);                         /* for who uses the connection next */
    return err;
}

#endif
