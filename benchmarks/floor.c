/* The same work as the benchmarks do through uffd, with nothing around it: what plain C reaches on this machine. */
#define _GNU_SOURCE
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { TOUCH_THREADS_MAX = 64, START_DELAY_US = 2000 };

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- a range and its userfaultfd ---- */

static int uffd_open(uint64_t features)
{
    int uffd = -1;
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
        uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (uffd < 0)
        return -errno;
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (ioctl(uffd, UFFDIO_API, &api) < 0) {
        int error = -errno;
        close(uffd);
        return error;
    }
    return uffd;
}

static int map_anon(struct range *range)
{
    range->base = mmap(NULL, range->nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range->base == MAP_FAILED)
        return -errno;
    madvise(range->base, range->nbytes, MADV_NOHUGEPAGE);
    return 0;
}

static int map_shared(struct range *range)
{
    range->memfd = memfd_create("uffd-floor", MFD_CLOEXEC);
    if (range->memfd < 0 || ftruncate(range->memfd, (off_t)range->nbytes) < 0)
        return -errno;
    range->base = mmap(NULL, range->nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, range->memfd, 0);
    range->second = mmap(NULL, range->nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, range->memfd, 0);
    return range->base == MAP_FAILED || range->second == MAP_FAILED ? -errno : 0;
}

int range_open(struct range *range, size_t nbytes, size_t block_bytes, const uint8_t *source, size_t source_nbytes,
               int delivery)
{
    memset(range, 0, sizeof *range);
    *range = (struct range){.nbytes = nbytes, .block_bytes = block_bytes, .source = source,
                            .source_nbytes = source_nbytes, .uffd = -1, .memfd = -1, .base = MAP_FAILED,
                            .second = MAP_FAILED};
    uint64_t features = delivery == DELIVERY_THREAD ? UFFD_FEATURE_THREAD_ID : UFFD_FEATURE_SIGBUS;
    int shared = delivery == DELIVERY_INLINE_SHARED;
    int error = shared ? map_shared(range) : map_anon(range);
    if (!error) {
        range->uffd = uffd_open(features | (shared ? UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MISSING_SHMEM : 0));
        error = range->uffd < 0 ? range->uffd : 0;
    }
    struct uffdio_register registration = {
        .range = {(uint64_t)range->base, nbytes},
        .mode = UFFDIO_REGISTER_MODE_MISSING | (shared ? UFFDIO_REGISTER_MODE_MINOR : 0),
    };
    if (!error && ioctl(range->uffd, UFFDIO_REGISTER, &registration) < 0)
        error = -errno;
    if (error)
        range_close(range);
    return error;
}

void range_close(struct range *range)
{
    if (range->base != MAP_FAILED)
        munmap(range->base, range->nbytes);
    if (range->second != MAP_FAILED)
        munmap(range->second, range->nbytes);
    if (range->memfd >= 0)
        close(range->memfd);
    if (range->uffd >= 0)
        close(range->uffd);
    range->base = range->second = MAP_FAILED;
    range->uffd = range->memfd = -1;
}

size_t range_struct_bytes(void)
{
    return sizeof(struct range);
}

static int range_wake(const struct range *range, uint64_t address)
{
    uint64_t start = address & ~(uint64_t)(range->block_bytes - 1);
    struct uffdio_range wake = {start, range->block_bytes};
    return ioctl(range->uffd, UFFDIO_WAKE, &wake) < 0 ? -errno : 0;
}

static int fill_piece(const struct range *range, size_t offset, size_t nbytes)
{
    const uint8_t *source = range->source + offset % range->source_nbytes;
    if (range->memfd >= 0) {
        memcpy(range->second + offset, source, nbytes);
        struct uffdio_continue map = {.range = {(uint64_t)range->base + offset, nbytes}};
        return ioctl(range->uffd, UFFDIO_CONTINUE, &map) < 0 ? -errno : 0;
    }
    struct uffdio_copy copy = {.dst = (uint64_t)range->base + offset, .len = nbytes, .src = (uint64_t)source};
    return ioctl(range->uffd, UFFDIO_COPY, &copy) < 0 ? -errno : 0;
}

int range_fill(const struct range *range, uint64_t address)
{
    size_t offset = (address - (uint64_t)range->base) & ~(range->block_bytes - 1);
    int error = fill_piece(range, offset, range->block_bytes);
    /* EEXIST wakes nobody: the winner's COPY woke those who waited then, not who came in between. */
    return error == -EEXIST ? range_wake(range, address) : error;
}

int64_t fill_bulk(const struct range *range, size_t piece_bytes)
{
    uint64_t start_ns = now_ns();
    for (size_t offset = 0; offset < range->nbytes; offset += piece_bytes) {
        size_t left = range->nbytes - offset;
        int error = fill_piece(range, offset, left < piece_bytes ? left : piece_bytes);
        if (error)
            return error;
    }
    return (int64_t)(now_ns() - start_ns);
}

/* ---- a file, by several threads ---- */

struct file_fill {
    const struct range *range;
    int fd;
    size_t piece_bytes;
    _Atomic size_t next;
    _Atomic int error;
};

struct file_filler {
    struct file_fill *work;
    pthread_t thread;
    int cpu;
};

static void *fill_pieces(void *argument)
{
    struct file_filler *filler = argument;
    struct file_fill *work = filler->work;
    size_t piece = work->piece_bytes;
    struct range staged = *work->range;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(filler->cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    uint8_t *buffer = malloc(piece);
    staged.source = buffer;
    staged.source_nbytes = piece;
    for (;;) {
        size_t offset = atomic_fetch_add(&work->next, piece);
        if (offset + piece > staged.nbytes || !buffer || atomic_load(&work->error))
            break;
        ssize_t got = pread(work->fd, buffer, piece, (off_t)offset);
        int error = got == (ssize_t)piece ? fill_piece(&staged, offset, piece) : -EIO;
        if (error)
            atomic_store(&work->error, error);
    }
    free(buffer);
    return NULL;
}

int64_t fill_from_file(const struct range *range, int fd, size_t piece_bytes, int threads)
{
    struct file_fill work = {.range = range, .fd = fd, .piece_bytes = piece_bytes};
    struct file_filler fillers[TOUCH_THREADS_MAX];
    int started = 0, error = threads < 1 || threads > TOUCH_THREADS_MAX || range->nbytes % piece_bytes ? -EINVAL : 0;
    uint64_t start_ns = now_ns();
    for (int i = 0; i < threads && !error; i++) {
        fillers[i] = (struct file_filler){.work = &work, .cpu = i};
        error = -pthread_create(&fillers[i].thread, NULL, fill_pieces, &fillers[i]);
        started += !error;
    }
    for (int i = 0; i < started; i++)
        pthread_join(fillers[i].thread, NULL);
    if (!error)
        error = atomic_load(&work.error);
    return error ? error : (int64_t)(now_ns() - start_ns);
}

/* ---- delivery in the faulting thread ---- */

static struct range inline_range;
static struct sigaction inline_previous;

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    (void)context;
    int saved_errno = errno;
    uint64_t address = (uint64_t)info->si_addr, base = (uint64_t)inline_range.base;
    if (info->si_code <= 0 || address < base || address >= base + inline_range.nbytes ||
        range_fill(&inline_range, address) < 0)
        signal(signal_number, SIG_DFL);         /* not ours: the access is repeated, and ends the process */
    errno = saved_errno;
}

int inline_install(const struct range *range)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};
    inline_range = *range;
    sigfillset(&action.sa_mask);
    sigdelset(&action.sa_mask, SIGBUS);
    return sigaction(SIGBUS, &action, &inline_previous) < 0 ? -errno : 0;
}

int inline_remove(void)
{
    return sigaction(SIGBUS, &inline_previous, NULL) < 0 ? -errno : 0;
}

/* ---- the toucher that both sides share ---- */

struct toucher {
    const struct touch *touch;
    size_t first, end;
    _Atomic int *go;
    pthread_t thread;
};

static void *touch_share(void *argument)
{
    struct toucher *toucher = argument;
    const struct touch *touch = toucher->touch;
    if (touch->cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(touch->cpu, &set);
        pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    }
    while (!atomic_load(toucher->go))
        usleep(START_DELAY_US);
    for (size_t i = toucher->first; i < toucher->end; i++) {
        uint64_t start_ns = now_ns();
        (void)*(const volatile uint8_t *)(touch->base + touch->offsets[i]);
        if (touch->wait_ns)
            touch->wait_ns[i] = (uint32_t)(now_ns() - start_ns);
        if (touch->cpus)
            touch->cpus[i] = (int16_t)sched_getcpu();
    }
    return NULL;
}

int touch(const struct touch *touch)
{
    struct toucher touchers[TOUCH_THREADS_MAX];
    _Atomic int go = 0;
    int started = 0, error = 0;
    if (touch->threads < 1 || touch->threads > TOUCH_THREADS_MAX)
        return -EINVAL;
    for (int i = 0; i < touch->threads && !error; i++) {
        size_t count = touch->count, threads = (size_t)touch->threads;
        touchers[i] = (struct toucher){.touch = touch, .go = &go, .first = count * (size_t)i / threads,
                                       .end = count * ((size_t)i + 1) / threads};
        error = -pthread_create(&touchers[i].thread, NULL, touch_share, &touchers[i]);
        started += !error;
    }
    atomic_store(&go, 1);
    for (int i = 0; i < started; i++)
        pthread_join(touchers[i].thread, NULL);
    return error;
}

int64_t touch_sequential(const uint8_t *base, size_t nbytes, size_t step_bytes)
{
    uint64_t start_ns = now_ns();
    for (size_t offset = 0; offset < nbytes; offset += step_bytes)
        (void)*(const volatile uint8_t *)(base + offset);
    return (int64_t)(now_ns() - start_ns);
}
