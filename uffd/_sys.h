/* The kernel boundary: every constant, structure and call that the core needs of Linux, and the atomics.
 *
 * Every wrapper answers 0 (or a count, or an fd) or -errno; nothing here allocates, prints or takes a lock.
 * The definitions are our own, since a distribution's <linux/userfaultfd.h> can be years older than the kernel
 * it runs on. What a kernel can do is asked at run time, never at compile time.
 *
 * Memory model: words that two threads see are read and written through the helpers below only. 'acquire' loads
 * pair with 'release' stores; a compare-and-swap is both. Counters that nobody orders anything by are relaxed.
 */
#ifndef UFFD_SYS_H
#define UFFD_SYS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

/* ---- userfaultfd: constants, each with the kernel that introduced it ------------------------------------------ */

#define UF_API_VERSION 0xAAu
#define UF_USER_MODE_ONLY 1u                     /* 5.11: faults of user space only; needs no privilege */

enum {
    UF_FEATURE_WP = 1u << 0,                     /* 5.7  */
    UF_FEATURE_EVENT_FORK = 1u << 1,             /* 4.11 */
    UF_FEATURE_EVENT_REMAP = 1u << 2,            /* 4.11 */
    UF_FEATURE_EVENT_REMOVE = 1u << 3,           /* 4.11 */
    UF_FEATURE_MISSING_HUGETLBFS = 1u << 4,      /* 4.11 */
    UF_FEATURE_MISSING_SHMEM = 1u << 5,          /* 4.11 */
    UF_FEATURE_EVENT_UNMAP = 1u << 6,            /* 4.11 */
    UF_FEATURE_SIGBUS = 1u << 7,                 /* 4.14 */
    UF_FEATURE_THREAD_ID = 1u << 8,              /* 4.14 */
    UF_FEATURE_MINOR_HUGETLBFS = 1u << 9,        /* 5.13 */
    UF_FEATURE_MINOR_SHMEM = 1u << 10,           /* 5.14 */
    UF_FEATURE_EXACT_ADDRESS = 1u << 11,         /* 5.18 */
    UF_FEATURE_WP_HUGETLBFS_SHMEM = 1u << 12,    /* 5.19 */
    UF_FEATURE_WP_UNPOPULATED = 1u << 13,        /* 6.4  */
    UF_FEATURE_POISON = 1u << 14,                /* 6.6  */
    UF_FEATURE_WP_ASYNC = 1u << 15,              /* 6.7  */
    UF_FEATURE_MOVE = 1u << 16                   /* 6.8  */
};

enum { UF_REGISTER_MISSING = 1, UF_REGISTER_WP = 2, UF_REGISTER_MINOR = 4 };
enum { UF_COPY_DONTWAKE = 1, UF_COPY_WP = 2 };
enum { UF_ZEROPAGE_DONTWAKE = 1 };
enum { UF_WRITEPROTECT_WP = 1, UF_WRITEPROTECT_DONTWAKE = 2 };
enum { UF_CONTINUE_DONTWAKE = 1, UF_CONTINUE_WP = 2 };
enum { UF_MOVE_DONTWAKE = 1 };
enum { UF_EVENT_PAGEFAULT = 0x12, UF_EVENT_REMAP = 0x14 };
enum { UF_FLAG_WRITE = 1, UF_FLAG_WP = 2, UF_FLAG_MINOR = 4 };

struct uf_api { uint64_t api, features, ioctls; };
struct uf_range { uint64_t start, len; };
struct uf_register { struct uf_range range; uint64_t mode, ioctls; };
struct uf_copy { uint64_t dst, src, len, mode; int64_t copy; };
struct uf_zeropage { struct uf_range range; uint64_t mode; int64_t zeropage; };
struct uf_writeprotect { struct uf_range range; uint64_t mode; };
struct uf_continue { struct uf_range range; uint64_t mode; int64_t mapped; };
struct uf_poison { struct uf_range range; uint64_t mode; int64_t updated; };
struct uf_move { uint64_t dst, src, len, mode; int64_t move; };

struct uf_msg {                                  /* what read() on a userfaultfd returns */
    uint8_t event, reserved1;
    uint16_t reserved2;
    uint32_t reserved3;
    uint64_t flags, address;
    uint32_t ptid, reserved4;
};

/* Of a UF_EVENT_REMAP: `address` is where the pages are now, and these are their bytes. */
static inline uint64_t uf_moved_bytes(const struct uf_msg *m)
{
    return m->ptid | (uint64_t)m->reserved4 << 32;
}

/* ---- which pages are there, and written: PAGEMAP_SCAN, 6.7 ----------------------------------------------------- */

enum { PM_WRITTEN = 1u << 1, PM_PRESENT = 1u << 3, PM_SWAPPED = 1u << 4, PM_ZERO = 1u << 5 };
enum { PM_SCAN_PROTECT = 1, PM_SCAN_CHECK = 2 };      /* protect what matches; EPERM where that is not WP_ASYNC */

struct pm_run { uint64_t start, end, categories; };
struct pm_scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t inverted, all_of, any_of, returned;
};
#define PM_IOC_SCAN _IOWR('f', 16, struct pm_scan)

_Static_assert(sizeof(struct pm_scan) == 96 && sizeof(struct pm_run) == 24, "kernel structures");

#define UF_IOC_NEW _IO(0xAA, 0x00)               /* on /dev/userfaultfd, 6.1 */
#define UF_IOC_API _IOWR(0xAA, 0x3F, struct uf_api)
#define UF_IOC_REGISTER _IOWR(0xAA, 0x00, struct uf_register)
#define UF_IOC_UNREGISTER _IOR(0xAA, 0x01, struct uf_range)
#define UF_IOC_WAKE _IOR(0xAA, 0x02, struct uf_range)
#define UF_IOC_COPY _IOWR(0xAA, 0x03, struct uf_copy)
#define UF_IOC_ZEROPAGE _IOWR(0xAA, 0x04, struct uf_zeropage)
#define UF_IOC_MOVE _IOWR(0xAA, 0x05, struct uf_move)                      /* 6.8  */
#define UF_IOC_WRITEPROTECT _IOWR(0xAA, 0x06, struct uf_writeprotect)      /* 5.7  */
#define UF_IOC_CONTINUE _IOWR(0xAA, 0x07, struct uf_continue)              /* 5.13 */
#define UF_IOC_POISON _IOWR(0xAA, 0x08, struct uf_poison)                  /* 6.6  */

_Static_assert(sizeof(struct uf_msg) == 32, "struct uffd_msg is 32 bytes");
_Static_assert(sizeof(struct uf_copy) == 40 && sizeof(struct uf_register) == 32, "kernel structures");
_Static_assert(sizeof(struct uf_writeprotect) == 24 && sizeof(struct uf_poison) == 32, "kernel structures");
_Static_assert(sizeof(void *) == 8, "64-bit only: regions are larger than a 32-bit address space");

/* ---- atomics ---------------------------------------------------------------------------------------------------- */

static inline uint32_t u32_load(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void u32_store(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint32_t u32_swap(uint32_t *p, uint32_t v) { return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL); }
static inline uint32_t u32_add(uint32_t *p, uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
static inline uint32_t u32_sub(uint32_t *p, uint32_t v) { return __atomic_fetch_sub(p, v, __ATOMIC_ACQ_REL); }
static inline int u32_cas(uint32_t *p, uint32_t old, uint32_t new_)
{
    return __atomic_compare_exchange_n(p, &old, new_, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
/* Dekker's store-then-load (the fork gate, the epoch) needs one total order, which release/acquire does not give. */
static inline void u32_store_seq(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static inline uint32_t u32_load_seq(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline uint32_t u32_add_seq(uint32_t *p, uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
static inline uint8_t u8_load(const uint8_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void u8_store(uint8_t *p, uint8_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static inline int u8_cas(uint8_t *p, uint8_t old, uint8_t new_)
{
    return __atomic_compare_exchange_n(p, &old, new_, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static inline uint64_t u64_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void u64_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline int u64_cas(uint64_t *p, uint64_t old, uint64_t new_)
{
    return __atomic_compare_exchange_n(p, &old, new_, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline uint64_t u64_load_seq(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void fence_seq(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline uint64_t u64_add(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
static inline uint64_t u64_or(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }
static inline uint64_t u64_and(uint64_t *p, uint64_t v) { return __atomic_fetch_and(p, v, __ATOMIC_ACQ_REL); }
static inline void *ptr_load(void *p) { return __atomic_load_n((void **)p, __ATOMIC_ACQUIRE); }
static inline void ptr_store(void *p, void *v) { __atomic_store_n((void **)p, v, __ATOMIC_RELEASE); }
static inline void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}
static inline int u64_count(uint64_t v) { return __builtin_popcountll(v); }
static inline int u64_log2(uint64_t v) { return v ? 63 - __builtin_clzll(v) : 0; }

/* ---- time, threads, futex ------------------------------------------------------------------------------------- */

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Waits while *word == value, at most timeout_ns; every answer means 'look again'. Private unless stated. */
static inline void futex_wait(uint32_t *word, uint32_t value, uint64_t timeout_ns)
{
    struct timespec t = { (time_t)(timeout_ns / 1000000000u), (long)(timeout_ns % 1000000000u) };
    syscall(SYS_futex, word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, value, &t, NULL, 0);
}

static inline uint64_t real_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void futex_wake_all(uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, INT_MAX, NULL, NULL, 0);
}

/* Between tries of a call that answers EAGAIN: yields at first, then sleeps, 50 us to 1.6 ms. */
static inline void nap(unsigned tries)
{
    if (tries < 8) {
        sched_yield();
        return;
    }
    struct timespec t = { 0, 50000L << (tries < 64 ? (tries - 8) / 12 : 5) };
    nanosleep(&t, NULL);
}

static inline int thread_id(void) { return (int)syscall(SYS_gettid); }

/* ---- userfaultfd: opening --------------------------------------------------------------------------------------- */

enum { UF_WAY_DEVICE, UF_WAY_SYSCALL, UF_WAY_USER, UF_WAYS };

static inline int uf_open(int way)
{
    int fd;
    if (way == UF_WAY_DEVICE) {
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device < 0)
            return -errno;
        fd = ioctl(device, UF_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        fd = fd < 0 ? -errno : fd;
        close(device);
        return fd;
    }
    fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | (way == UF_WAY_USER ? (int)UF_USER_MODE_ONLY : 0));
    return fd < 0 ? -errno : fd;
}

/* The handshake: features in = wanted, out = all that the kernel has. It may be done once per fd. */
static inline int uf_api(int fd, uint64_t *features, uint64_t *ioctls)
{
    struct uf_api api = { .api = UF_API_VERSION, .features = *features };
    if (ioctl(fd, UF_IOC_API, &api))
        return -errno;
    *features = api.features;
    *ioctls = api.ioctls;
    return 0;
}

/* ---- userfaultfd: ranges. `done` is the kernel's signed answer: bytes done so far, or what it left there. ------- */

static inline int uf_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls)
{
    struct uf_register a = { .range = { start, len }, .mode = mode };
    if (ioctl(fd, UF_IOC_REGISTER, &a))
        return -errno;
    *ioctls = a.ioctls;
    return 0;
}

static inline int uf_unregister(int fd, uint64_t start, uint64_t len)
{
    struct uf_range a = { start, len };
    return ioctl(fd, UF_IOC_UNREGISTER, &a) ? -errno : 0;
}

/* The number of runs that it put into s->vec, or -errno; s->walk_end says how far it came. */
static inline int pm_scan(int fd, struct pm_scan *s)
{
    int n;
    s->size = sizeof *s;
    do
        n = ioctl(fd, PM_IOC_SCAN, s);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static inline int pm_open(void)
{
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* As pm_scan asked for pages that carry no mark (PM_WRITTEN), by the entries of pagemap: bit 57 is the mark, of empty
 * places, too (5.19). A run that is cut short by the end of `vec` is gone on with by the next call. */
static inline int pm_unmarked(int fd, struct pm_scan *s, uint64_t page)
{
    struct pm_run *run = (struct pm_run *)(uintptr_t)s->vec;
    uint64_t entry[512], n = 0;
    for (s->walk_end = s->start; s->walk_end < s->end;) {
        uint64_t many = (s->end - s->walk_end) / page;
        ssize_t got = pread(fd, entry, (many < 512 ? many : 512) * 8, (off_t)(s->walk_end / page * 8));
        if (got < 8)
            return got < 0 ? -errno : -EFAULT;
        for (uint64_t i = 0; i < (uint64_t)got / 8; i++, s->walk_end += page) {
            if (entry[i] >> 57 & 1)
                continue;
            if (n && run[n - 1].end == s->walk_end)
                run[n - 1].end += page;
            else if (n < s->vec_len)
                run[n++] = (struct pm_run){ s->walk_end, s->walk_end + page, PM_WRITTEN };
            else
                return (int)n;
        }
    }
    return (int)n;
}

/* Whether each page of a range carries its mark, in memory, swapped out or empty: 1 or 0, or -errno. A page that was
 * dropped, or mapped anew, has lost it. scans: the kernel has PAGEMAP_SCAN. */
static inline int pm_marked(int fd, int scans, uint64_t page, uint64_t start, uint64_t end)
{
    struct pm_run run;
    struct pm_scan s = { .start = start, .end = end, .vec = (uint64_t)(uintptr_t)&run, .vec_len = 1,
                         .inverted = PM_WRITTEN, .all_of = PM_WRITTEN, .any_of = PM_PRESENT | PM_SWAPPED,
                         .returned = PM_WRITTEN };
    int n = scans ? pm_scan(fd, &s) : pm_unmarked(fd, &s, page);
    if (n < 0)
        return n;
    return scans ? n == 1 && run.start == start && run.end == end : n == 0;
}

/* Whether all of the range is mapped by something. */
static inline int range_mapped(uint64_t start, uint64_t len)
{
    return msync((void *)(uintptr_t)start, len, MS_ASYNC) == 0 || errno != ENOMEM;
}

static inline int uf_wake(int fd, uint64_t start, uint64_t len)
{
    struct uf_range a = { start, len };
    return ioctl(fd, UF_IOC_WAKE, &a) ? -errno : 0;
}

static inline int uf_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done)
{
    struct uf_copy a = { dst, src, len, mode, 0 };
    int r = ioctl(fd, UF_IOC_COPY, &a) ? -errno : 0;
    *done = a.copy;
    return r;
}

static inline int uf_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done)
{
    struct uf_zeropage a = { { start, len }, mode, 0 };
    int r = ioctl(fd, UF_IOC_ZEROPAGE, &a) ? -errno : 0;
    *done = a.zeropage;
    return r;
}

static inline int uf_continue(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done)
{
    struct uf_continue a = { { start, len }, mode, 0 };
    int r = ioctl(fd, UF_IOC_CONTINUE, &a) ? -errno : 0;
    *done = a.mapped;
    return r;
}

static inline int uf_poison(int fd, uint64_t start, uint64_t len, int64_t *done)
{
    struct uf_poison a = { { start, len }, 0, 0 };
    int r = ioctl(fd, UF_IOC_POISON, &a) ? -errno : 0;
    *done = a.updated;
    return r;
}

static inline int uf_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done)
{
    struct uf_move a = { dst, src, len, mode, 0 };
    int r = ioctl(fd, UF_IOC_MOVE, &a) ? -errno : 0;
    *done = a.move;
    return r;
}

/* mode 0 lifts the protection and wakes who waits for it */
static inline int uf_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
    struct uf_writeprotect a = { { start, len }, mode };
    return ioctl(fd, UF_IOC_WRITEPROTECT, &a) ? -errno : 0;
}

/* ---- mappings ---------------------------------------------------------------------------------------------------- */

/* Address space that is empty for certain: with mlockall(MCL_FUTURE) an ordinary mmap comes populated, so it is
 * reserved without access, unlocked, and opened afterwards. fd -1: private anonymous memory. NULL on failure. */
static inline char *map_lazy(uint64_t len, int protection, int fd)
{
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED | MAP_NORESERVE;
    char *p = mmap(NULL, len, PROT_NONE, flags, fd, 0);
    if (p == MAP_FAILED)
        return NULL;
    munlock(p, len);
    madvise(p, len, MADV_NOHUGEPAGE);            /* fails harmlessly where huge pages are not configured */
    if (mprotect(p, len, protection)) {
        int saved = errno;
        munmap(p, len);
        errno = saved;
        return NULL;
    }
    return p;
}

/* Puts inaccessible address space in the place of a mapping, in one step: who waits in a fault there gets SIGSEGV
 * when the userfaultfd closes, and not the zeros that an unregistered range would give. */
static inline int map_forbid(char *start, uint64_t len)
{
    void *p = mmap(start, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return p == MAP_FAILED ? -errno : 0;
}

/* Breaks the sharing of pages with a forked child or parent, without a touch. 5.14; -EINVAL before, and for memory that
 * is not writable. */
static inline int map_unshare(char *start, uint64_t len)
{
    return madvise(start, len, 23 /* MADV_POPULATE_WRITE */) ? -errno : 0;
}

/* Whether something is there of each of these pages of private memory: in memory, or swapped out, of which mincore
 * knows only as long as it is in the swap cache. Keeps no descriptor, so that a forked child asks for its own memory.
 * Where /proc can't be had, a page that is swapped out counts as not there. A marker (poison, a guard, a protected
 * hole: regions have none of these where data should be) looks swapped out and counts as there. Async-signal-safe. */
static inline int pages_there(const char *start, uint64_t len, uint64_t page)
{
    enum { MOST = 64 };
    unsigned char core[MOST];
    uint64_t entry[MOST], at = (uint64_t)(uintptr_t)start, end = at + len;
    int pagemap = -1, all = 1;
    while (all && at < end) {
        uint64_t n = (end - at) / page < MOST ? (end - at) / page : MOST, i = 0;
        all = mincore((void *)(uintptr_t)at, n * page, core) == 0;
        while (all && i < n && core[i] & 1)
            i++;
        if (all && i < n) {
            if (pagemap < 0)
                pagemap = pm_open();
            all = pagemap >= 0 && pread(pagemap, entry, n * 8, (off_t)(at / page * 8)) == (ssize_t)(n * 8);
            for (; all && i < n; i++)
                all = (core[i] & 1) || entry[i] >> 62 != 0;
        }
        at += n * page;
    }
    if (pagemap >= 0)
        close(pagemap);
    return all;
}

/* Has the kernel begin to write a file's dirty pages to the disk, so that an fsync finds less to do. In pieces, until
 * `over` is not 0: a call may wait as long as the disk takes for most of a piece, and no signal ends it. */
static inline int file_write_out(int fd, const uint8_t *over)
{
    enum { PIECE = 8 << 20 };
    struct stat s;
    int err = fstat(fd, &s) ? -errno : 0;
    for (off_t at = 0; !err && at < s.st_size && !u8_load(over); at += PIECE)
        err = sync_file_range(fd, at, PIECE, SYNC_FILE_RANGE_WRITE) ? -errno : 0;
    return err;
}

/* memcpy within this process that answers -EFAULT for a source that is not there. */
static inline int copy_guarded(char *target, const char *source, uint64_t nbytes)
{
    while (nbytes) {
        struct iovec to = { target, nbytes }, from = { (void *)(uintptr_t)source, nbytes };
        ssize_t n = process_vm_readv(getpid(), &to, 1, &from, 1, 0);
        if (n <= 0)
            return n < 0 ? -errno : -EFAULT;
        target += n;
        source += n;
        nbytes -= (uint64_t)n;
    }
    return 0;
}

/* ---- how much memory there is ----------------------------------------------------------------------------------- */

static inline uint64_t u64_min(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t u64_max(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* What a small file says, behind `key` if that is not NULL: the whole number there, or `otherwise` ("max", no file). */
static inline uint64_t sys_file_number(const char *path, const char *key, uint64_t otherwise)
{
    char text[8192], *p = text, *end;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return otherwise;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[n < 0 ? 0 : n] = 0;
    if (key) {
        p = strstr(text, key);
        if (!p)
            return otherwise;
        p += strlen(key);
    }
    while (*p == ' ')
        p++;
    uint64_t v = strtoull(p, &end, 10);
    return end == p ? otherwise : v;
}

static inline uint64_t sys_memory_available(void)
{
    uint64_t kib = sys_file_number("/proc/meminfo", "MemAvailable:", UINT64_MAX);
    return kib > UINT64_MAX >> 12 ? UINT64_MAX / 2 : kib * 1024;
}

/* Bytes of a memory cgroup that may be ours: what is free in it, what we have already, and file pages, which the kernel
 * takes away when it needs them. UINT64_MAX: no limit. */
static inline uint64_t sys_cgroup_room(const char *limit_path, const char *usage_path, const char *stat_path,
                                       uint64_t used)
{
    uint64_t limit = sys_file_number(limit_path, NULL, UINT64_MAX);
    uint64_t usage = sys_file_number(usage_path, NULL, 0), files;
    if (limit > UINT64_MAX / 4)                  /* "max"; version 1 says a number of that kind */
        return UINT64_MAX;
    files = sys_file_number(stat_path, "\ntotal_inactive_file ", 0) +
            sys_file_number(stat_path, "\ntotal_active_file ", 0);
    if (!files)                                  /* version 2 */
        files = sys_file_number(stat_path, "\ninactive_file ", 0) + sys_file_number(stat_path, "\nactive_file ", 0);
    uint64_t others = usage > used + files ? usage - used - files : 0;
    return limit > others ? limit - others : 0;
}

/* Percent of the last ten seconds in which somebody waited for memory; 0 where the kernel does not say (PSI, 4.20). */
static inline unsigned sys_pressure(const char *path)
{
    return *path ? (unsigned)sys_file_number(path, "some avg10=", 0) : 0;
}

/* The first hole of a file from `start` on, its end if it has none. What can't be told counts as none. */
static inline int64_t file_hole(int fd, int64_t start)
{
    off_t hole = lseek(fd, start, SEEK_HOLE);
    return hole >= 0 ? hole : errno == ENXIO ? start : INT64_MAX;
}

/* A file without a name in a folder, for this process alone; gone with its last descriptor. */
static inline int sys_unnamed_file(const char *folder)
{
    int fd = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC | O_EXCL, 0600);
    if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL))
        return fd < 0 ? -errno : fd;
    char path[320];                              /* file systems without O_TMPFILE */
    for (int i = 0; i < 100; i++) {
        snprintf(path, sizeof path, "%s/uffd-%d-%llx", folder, (int)getpid(), (unsigned long long)now_ns() + i);
        fd = open(path, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
        if (fd >= 0) {
            unlink(path);
            return fd;
        }
        if (errno != EEXIST)
            break;
    }
    return -errno;
}

static inline int sys_memfd(const char *name)
{
    int fd = (int)syscall(SYS_memfd_create, name, 1u /* MFD_CLOEXEC */);
    return fd < 0 ? -errno : fd;
}

/* ---- small things ---------------------------------------------------------------------------------------------- */

static inline int sys_eventfd(void)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return fd < 0 ? -errno : fd;
}

static inline void eventfd_raise(int fd)
{
    uint64_t one = 1;
    ssize_t n = write(fd, &one, sizeof one);     /* EAGAIN: already raised as far as it goes */
    (void)n;
}

static inline void eventfd_clear(int fd)
{
    uint64_t all;
    ssize_t n = read(fd, &all, sizeof all);      /* EAGAIN: another worker cleared it */
    (void)n;
}

/* The number of messages read, 0 when there are none, or -errno. */
static inline int uf_read(int fd, struct uf_msg *messages, int most)
{
    ssize_t n = read(fd, messages, (size_t)most * sizeof *messages);
    if (n < 0)
        return errno == EAGAIN ? 0 : -errno;
    return (int)((size_t)n / sizeof *messages);
}

static inline int epoll_watch(int epoll_fd, int fd, uint64_t data)
{
    struct epoll_event e = { .events = EPOLLIN, .data.u64 = data };
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e) ? -errno : 0;
}

/* The same, told only of what is new: each message is told once. again: what waits there now is told once more. */
static inline int epoll_watch_edge(int epoll_fd, int fd, uint64_t data, int again)
{
    struct epoll_event e = { .events = EPOLLIN | EPOLLET, .data.u64 = data };
    return epoll_ctl(epoll_fd, again ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &e) ? -errno : 0;
}

static inline int epoll_take(int epoll_fd, uint64_t *data, int most, int timeout_ms)
{
    struct epoll_event e[16];
    int n = epoll_wait(epoll_fd, e, most < 16 ? most : 16, timeout_ms);
    for (int i = 0; i < n; i++)
        data[i] = e[i].data.u64;
    return n < 0 ? 0 : n;
}

/* The CPU a thread of this process ran on last, or -1: field 39 of its stat file. About 5 us; callers sample. */
static inline int thread_cpu(uint32_t tid)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/self/task/%u/stat", tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return -1;
    text[n] = 0;
    char *p = strrchr(text, ')');                /* the name may hold spaces and brackets */
    for (int field = 2; p && field < 39; field++)
        p = strchr(p + 1, ' ');
    return p ? atoi(p + 1) : -1;
}

static inline void say(const char *text, size_t length)
{
    ssize_t n = write(2, text, length);          /* stderr may be closed; there is nobody else to tell */
    (void)n;
}

/* A thread with every signal blocked but SIGBUS: a fill function may touch an inline region of another provider. */
static inline int thread_start(pthread_t *thread, void *(*run)(void *), void *argument, const char *name, int cpu)
{
    sigset_t all, old;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 * 1024);
    if (cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        pthread_attr_setaffinity_np(&attributes, sizeof set, &set);
    }
    int r = pthread_create(thread, &attributes, run, argument);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r == 0)
        pthread_setname_np(*thread, name);
    return -r;
}

/* The CPUs this process may use, in order; at most `most` of them. */
static inline int cpus_allowed(int *cpus, int most)
{
    cpu_set_t set;
    int n = 0;
    if (sched_getaffinity(0, sizeof set, &set))
        return 0;
    for (int i = 0; i < CPU_SETSIZE && n < most; i++)
        if (CPU_ISSET(i, &set))
            cpus[n++] = i;
    return n;
}

#endif
