/* What the kernel itself takes for tracking and for an image's pause: one scan, one write protection, one fork. */
#define _GNU_SOURCE
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct scan {                                   /* struct pm_scan_arg, Linux 6.7; distributions' headers are older */
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, all_of, any_of, returned;
};
struct run { uint64_t start, end, categories; };
#define SCAN _IOWR('f', 16, struct scan)
enum { WRITTEN = 1 << 1, PROTECT = 1, RUNS = 1 << 16, FEATURE_WP_ASYNC = 1 << 15, WP = 1 };

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int registered(uint8_t *base, size_t nbytes, uint64_t features)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    struct uffdio_register range = {.range = {(uint64_t)base, nbytes}, .mode = UFFDIO_REGISTER_MODE_WP};
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api) < 0 || ioctl(fd, UFFDIO_REGISTER, &range) < 0)
        return -errno;
    return fd;
}

static int scan_once(int pagemap, uint8_t *base, size_t nbytes)
{
    static struct run runs[RUNS];
    struct scan s = {.size = sizeof s, .flags = PROTECT, .start = (uint64_t)base, .end = (uint64_t)base + nbytes,
                     .vec = (uint64_t)runs, .vec_len = RUNS, .all_of = WRITTEN, .returned = WRITTEN};
    for (; s.start < s.end; s.start = s.walk_end)
        if (ioctl(pagemap, SCAN, &s) < 0)
            return -errno;
    return 0;
}

/* Of a range that is armed, `count` pages are written; nanoseconds of the scan that finds and protects them. */
int64_t scan_written(uint8_t *base, size_t nbytes, const uint64_t *offsets, size_t count)
{
    int fd = registered(base, nbytes, FEATURE_WP_ASYNC), pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    int64_t taken = fd < 0 ? fd : scan_once(pagemap, base, nbytes);
    for (size_t i = 0; taken == 0 && i < count; i++)
        ((volatile uint8_t *)base)[offsets[i]]++;
    if (taken == 0) {
        taken = -now_ns();
        int error = scan_once(pagemap, base, nbytes);
        taken = error ? error : taken + now_ns();
    }
    close(pagemap);
    if (fd >= 0)
        close(fd);
    return taken;
}

/* Nanoseconds to write-protect a populated range. */
int64_t protect_range(uint8_t *base, size_t nbytes)
{
    int fd = registered(base, nbytes, 0);
    struct uffdio_writeprotect all = {.range = {(uint64_t)base, nbytes}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    if (fd < 0)
        return fd;
    int64_t start = now_ns();
    int64_t taken = ioctl(fd, UFFDIO_WRITEPROTECT, &all) < 0 ? -errno : now_ns() - start;
    close(fd);
    return taken;
}

/* Nanoseconds for which fork() stops its caller. The child ends at once. */
int64_t fork_pause(void)
{
    int64_t start = now_ns();
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    start = child < 0 ? -errno : now_ns() - start;
    if (child > 0)
        waitpid(child, NULL, 0);
    return start;
}
