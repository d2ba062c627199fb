/* What it costs to fill a block and take one out, for ever, with nothing around it: the floor of eviction. */
#define _GNU_SOURCE
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef UFFDIO_MOVE                             /* Linux 6.8; distributions' headers are older */
struct uffdio_move { uint64_t dst, src, len, mode; int64_t move; };
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif
enum { FEATURE_MOVE = 1 << 16, FEATURE_WP = 1 << 0, FEATURE_SIGBUS = 1 << 7 };

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint8_t *map_registered(size_t nbytes, uint64_t mode, int *uffd)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    *uffd = device >= 0 ? ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK)
                        : (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (device >= 0)
        close(device);
    struct uffdio_api api = {.api = UFFD_API, .features = FEATURE_MOVE | FEATURE_WP | FEATURE_SIGBUS};
    uint8_t *base = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*uffd < 0 || base == MAP_FAILED || ioctl(*uffd, UFFDIO_API, &api) < 0)
        return NULL;
    madvise(base, nbytes, MADV_NOHUGEPAGE);
    struct uffdio_register registration = {.range = {(uint64_t)base, nbytes}, .mode = mode};
    return ioctl(*uffd, UFFDIO_REGISTER, &registration) < 0 ? NULL : base;
}

static int move_pages(int uffd, uint8_t *target, uint8_t *source, size_t nbytes)
{
    for (size_t at = 0; at < nbytes;) {
        struct uffdio_move move = {.dst = (uint64_t)target + at, .src = (uint64_t)source + at, .len = nbytes - at};
        if (ioctl(uffd, UFFDIO_MOVE, &move) == 0)
            return 0;
        if (move.move <= 0)
            return errno == EAGAIN ? 0 : -errno;
        at += (size_t)move.move;
    }
    return 0;
}

/* `count` times: a block copied into the pages of the one that left before, moved in, protected, touched, moved out.
 * Blocks come in the order of `offsets` from `source`. Nanoseconds taken, or -errno. */
int64_t evict_cycle(const uint8_t *source, size_t nbytes, size_t block_bytes, const uint64_t *offsets, size_t count)
{
    int in, out;
    uint8_t *region = map_registered(nbytes, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP, &in);
    uint8_t *slot = map_registered(block_bytes, UFFDIO_REGISTER_MODE_MISSING, &out);
    int error = region && slot ? 0 : -errno;
    for (size_t at = 0; at < block_bytes && !error; at += 4096) {
        struct uffdio_copy copy = {.dst = (uint64_t)slot + at, .src = (uint64_t)source, .len = 4096};
        error = ioctl(out, UFFDIO_COPY, &copy) < 0 ? -errno : 0;
    }
    uint64_t start_ns = now_ns();
    for (size_t i = 0; i < count && !error; i++) {
        uint8_t *block = region + offsets[i];
        memcpy(slot, source + offsets[i], block_bytes);
        error = move_pages(in, block, slot, block_bytes);
        struct uffdio_writeprotect protect = {.range = {(uint64_t)block, block_bytes},
                                              .mode = UFFDIO_WRITEPROTECT_MODE_WP};
        if (!error && ioctl(in, UFFDIO_WRITEPROTECT, &protect) < 0)
            error = -errno;
        if (!error) {
            (void)*(volatile uint8_t *)block;
            error = move_pages(out, slot, block, block_bytes);
        }
    }
    int64_t taken_ns = (int64_t)(now_ns() - start_ns);
    if (region)
        munmap(region, nbytes);
    if (slot)
        munmap(slot, block_bytes);
    close(in);
    close(out);
    return error ? error : taken_ns;
}
