/* What it costs to send bytes over one loopback socket into touched memory, with nothing around it: the floor of a
 * migration's total time. */
#define _GNU_SOURCE
#include "floor.h"

#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 256 * 1024 };

struct sending {
    const uint8_t *source;
    size_t nbytes;
    int fd;
};

static void *send_all(void *argument)
{
    struct sending *s = argument;
    size_t at = 0;
    while (at < s->nbytes) {
        ssize_t n = send(s->fd, s->source + at, s->nbytes - at < PIECE ? s->nbytes - at : PIECE, MSG_NOSIGNAL);
        if (n <= 0)
            break;
        at += (size_t)n;
    }
    shutdown(s->fd, SHUT_WR);
    return NULL;
}

static int connected(int *pair)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    pair[0] = pair[1] = -1;
    if (listener < 0)
        return -errno;
    if (bind(listener, (struct sockaddr *)&at, size) == 0 && listen(listener, 1) == 0 &&
        getsockname(listener, (struct sockaddr *)&at, &size) == 0) {
        pair[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (pair[0] >= 0 && connect(pair[0], (struct sockaddr *)&at, size) == 0)
            pair[1] = accept(listener, NULL, NULL);
    }
    close(listener);
    return pair[1] < 0 ? -EIO : 0;
}

/* Nanoseconds for nbytes from source to target, or -errno. */
int64_t wire_floor(const uint8_t *source, uint8_t *target, size_t nbytes)
{
    struct sending s = {source, nbytes, -1};
    struct timespec begin, end;
    size_t at = 0;
    pthread_t sender;
    int pair[2], err = connected(pair);
    if (err == 0) {
        s.fd = pair[0];
        clock_gettime(CLOCK_MONOTONIC, &begin);
        err = -pthread_create(&sender, NULL, send_all, &s);
    }
    if (err == 0) {
        while (at < nbytes) {
            ssize_t n = recv(pair[1], target + at, nbytes - at < PIECE ? nbytes - at : PIECE, 0);
            if (n <= 0)
                break;
            at += (size_t)n;
        }
        clock_gettime(CLOCK_MONOTONIC, &end);
        pthread_join(sender, NULL);
        err = at == nbytes ? 0 : -EIO;
    }
    if (pair[0] >= 0)
        close(pair[0]);
    if (pair[1] >= 0)
        close(pair[1]);
    return err ? err : (end.tv_sec - begin.tv_sec) * 1000000000LL + (end.tv_nsec - begin.tv_nsec);
}
