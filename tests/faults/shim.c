/* Faults on order: an LD_PRELOAD library that makes chosen calls of the process fail, by ordinal.
 *
 * Nothing happens until shim_rule is called. A rule names a call, the first ordinal to hit, how many, the errno and a
 * manner. Ordinals count from the moment the rule is set. Calls of all threads count; glibc's own do not come by.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

enum manner {
    FAIL,        /* the call is not made, errno is set */
    PARTIAL,     /* COPY, CONTINUE, MOVE: only `argument` pages are done; EAGAIN with the bytes done */
    EXISTED,     /* COPY, CONTINUE: done without a wake-up, then EEXIST: as if another thread had won */
    SHORT,       /* pread, pwrite: at most `argument` bytes */
    MASK         /* UFFDIO_API: the kernel lacks the feature bits `argument` */
};

enum { RULES = 8 };
struct rule {
    char call[32];
    long first, count, argument;
    int error;
    enum manner manner;
    _Atomic long calls, fired;
};
static struct rule rules[RULES];
static _Atomic int rules_n;

/* Set a rule; its index, or -1. count < 0: for ever. */
int shim_rule(const char *call, long first, long count, int error, int manner, long argument)
{
    int n = atomic_load(&rules_n);
    if (n == RULES)
        return -1;
    struct rule *r = &rules[n];
    memset(r, 0, sizeof *r);
    snprintf(r->call, sizeof r->call, "%s", call);
    r->first = first;
    r->count = count;
    r->error = error;
    r->manner = (enum manner)manner;
    r->argument = argument;
    atomic_store(&rules_n, n + 1);
    return n;
}

void shim_clear(void) { atomic_store(&rules_n, 0); }
long shim_calls(int rule) { return atomic_load(&rules[rule].calls); }
long shim_fired(int rule) { return atomic_load(&rules[rule].fired); }

/* The rule that hits this call, or NULL. */
static struct rule *hit(const char *call)
{
    for (int i = 0; i < atomic_load(&rules_n); i++) {
        struct rule *r = &rules[i];
        if (strcmp(r->call, call))
            continue;
        long ordinal = atomic_fetch_add(&r->calls, 1) + 1;
        if (ordinal >= r->first && (r->count < 0 || ordinal < r->first + r->count)) {
            atomic_fetch_add(&r->fired, 1);
            return r;
        }
    }
    return NULL;
}

static int refuse(struct rule *r)
{
    errno = r->error;
    return -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* ---- ioctl ---- */

struct copy { uint64_t dst, src, len, mode; int64_t done; };
struct others { uint64_t start, len, mode; int64_t done; };
struct api { uint64_t api, features, ioctls; };

static const char *uffd_ioctl_name(unsigned long request)
{
    static const char *names[] = {"REGISTER", "UNREGISTER", "WAKE", "COPY", "ZEROPAGE", "MOVE", "WRITEPROTECT",
                                  "CONTINUE", "POISON"};
    unsigned number = (unsigned)request & 0xFF;
    if (((request >> 8) & 0xFF) != 0xAA)
        return NULL;
    if (number == 0x3F)
        return "API";
    if (number == 0 && _IOC_SIZE(request) == 0)
        return "NEW";
    return number < sizeof names / sizeof *names ? names[number] : NULL;
}

static int is_move_of_pages(const char *name)
{
    return !strcmp(name, "COPY") || !strcmp(name, "CONTINUE") || !strcmp(name, "ZEROPAGE") || !strcmp(name, "POISON");
}

/* COPY and MOVE have a source; their structures are the same. */
static int is_copy(const char *name)
{
    return !strcmp(name, "COPY") || !strcmp(name, "MOVE");
}

static int64_t *done_of(const char *name, void *argument)
{
    return is_copy(name) ? &((struct copy *)argument)->done : &((struct others *)argument)->done;
}

static int partial(struct rule *r, int fd, unsigned long request, const char *name, void *argument)
{
    uint64_t *len = is_copy(name) ? &((struct copy *)argument)->len : &((struct others *)argument)->len;
    uint64_t whole = *len, part = (uint64_t)r->argument * (uint64_t)sysconf(_SC_PAGESIZE);
    int answer;
    if (part >= whole)
        return (int)syscall(SYS_ioctl, fd, request, argument);
    if (part) {
        *len = part;
        answer = (int)syscall(SYS_ioctl, fd, request, argument);
        *len = whole;
        if (answer)
            return answer;
    }
    *done_of(name, argument) = part ? (int64_t)part : -EAGAIN;
    errno = EAGAIN;
    return -1;
}

static int existed(int fd, unsigned long request, const char *name, void *argument)
{
    uint64_t *mode = is_copy(name) ? &((struct copy *)argument)->mode : &((struct others *)argument)->mode;
    uint64_t before = *mode;
    int answer;
    *mode |= 1; /* DONTWAKE */
    answer = (int)syscall(SYS_ioctl, fd, request, argument);
    *mode = before;
    if (answer)
        return answer;
    *done_of(name, argument) = -EEXIST;
    errno = EEXIST;
    return -1;
}

static int mask(struct rule *r, int fd, unsigned long request, struct api *api)
{
    if (api->features & (uint64_t)r->argument) {
        memset(api, 0, sizeof *api); /* what the kernel does when asked for what it lacks */
        errno = EINVAL;
        return -1;
    }
    int answer = (int)syscall(SYS_ioctl, fd, request, api);
    api->features &= ~(uint64_t)r->argument;
    return answer;
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    const char *name = uffd_ioctl_name(request);
    struct rule *r = name ? hit(name) : NULL;
    if (!r)
        return (int)syscall(SYS_ioctl, fd, request, argument);
    if (r->manner == MASK)
        return mask(r, fd, request, argument);
    if (r->manner == PARTIAL)
        return partial(r, fd, request, name, argument);
    if (r->manner == EXISTED)
        return existed(fd, request, name, argument);
    if (is_move_of_pages(name) && r->error != ESRCH)
        *done_of(name, argument) = -r->error;
    return refuse(r);
}

/* ---- files ---- */

static int anonymous(int fd)
{
    char path[64], target[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlink, path, target, sizeof target - 1);
    return n > 0 && !strncmp(target, "anon_inode:[userfaultfd]", (size_t)n);
}

ssize_t read(int fd, void *out, size_t nbytes)
{
    struct rule *r = atomic_load(&rules_n) && anonymous(fd) ? hit("read") : NULL;
    return r ? refuse(r) : syscall(SYS_read, fd, out, nbytes);
}

static ssize_t pread_any(int fd, void *out, size_t nbytes, off_t offset)
{
    struct rule *r = hit("pread");
    if (r && r->manner == SHORT)
        return syscall(SYS_pread64, fd, out, nbytes < (size_t)r->argument ? nbytes : (size_t)r->argument, offset);
    return r ? refuse(r) : syscall(SYS_pread64, fd, out, nbytes, offset);
}

ssize_t pread(int fd, void *out, size_t nbytes, off_t offset) { return pread_any(fd, out, nbytes, offset); }
ssize_t pread64(int fd, void *out, size_t nbytes, off_t offset) { return pread_any(fd, out, nbytes, offset); }

static int is_memfd(int fd)
{
    char path[64], target[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlink, path, target, sizeof target - 1);
    return n >= 7 && !strncmp(target, "/memfd:", 7);
}

/* To files; what goes into a region's own shared pages is left alone. */
static ssize_t pwrite_any(int fd, const void *bytes, size_t nbytes, off_t offset)
{
    struct rule *r = atomic_load(&rules_n) && !is_memfd(fd) ? hit("pwrite") : NULL;
    if (r && r->manner == SHORT)
        return syscall(SYS_pwrite64, fd, bytes, nbytes < (size_t)r->argument ? nbytes : (size_t)r->argument, offset);
    return r ? refuse(r) : syscall(SYS_pwrite64, fd, bytes, nbytes, offset);
}

ssize_t pwrite(int fd, const void *bytes, size_t nbytes, off_t offset) { return pwrite_any(fd, bytes, nbytes, offset); }
ssize_t pwrite64(int fd, const void *bytes, size_t nbytes, off_t offset)
{
    return pwrite_any(fd, bytes, nbytes, offset);
}

int fdatasync(int fd)
{
    struct rule *r = hit("fdatasync");
    return r ? refuse(r) : (int)syscall(SYS_fdatasync, fd);
}

int sync_file_range(int fd, off_t offset, off_t nbytes, unsigned flags)
{
    struct rule *r = hit("sync_file_range");
    return r ? refuse(r) : (int)syscall(SYS_sync_file_range, fd, offset, nbytes, flags);
}

static int open_any(const char *path, int flags, mode_t mode)
{
    struct rule *r = !strcmp(path, "/dev/userfaultfd") ? hit("device") : NULL;
    if (!r && (flags & O_TMPFILE) == O_TMPFILE)
        r = hit("tmpfile");
    return r ? refuse(r) : (int)syscall(SYS_openat, -100, path, flags, mode);
}

int open(const char *path, int flags, ...)
{
    va_list list;
    va_start(list, flags);
    mode_t mode = va_arg(list, mode_t);
    va_end(list);
    return open_any(path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list list;
    va_start(list, flags);
    mode_t mode = va_arg(list, mode_t);
    va_end(list);
    return open_any(path, flags, mode);
}

/* ---- memory, threads, descriptors ---- */

static void *mmap_any(void *start, size_t len, int protection, int flags, int fd, off_t offset)
{
    struct rule *r = hit("mmap");
    if (r) {
        errno = r->error;
        return MAP_FAILED;
    }
    return (void *)syscall(SYS_mmap, start, len, protection, flags, fd, offset);
}

void *mmap(void *start, size_t len, int protection, int flags, int fd, off_t offset)
{
    return mmap_any(start, len, protection, flags, fd, offset);
}

void *mmap64(void *start, size_t len, int protection, int flags, int fd, off_t offset)
{
    return mmap_any(start, len, protection, flags, fd, offset);
}

int mprotect(void *start, size_t len, int protection)
{
    struct rule *r = hit("mprotect");
    return r ? refuse(r) : (int)syscall(SYS_mprotect, start, len, protection);
}

static int truncate_any(int fd, off_t length)
{
    struct rule *r = hit("ftruncate");
    return r ? refuse(r) : (int)syscall(SYS_ftruncate, fd, length);
}

int ftruncate(int fd, off_t length) { return truncate_any(fd, length); }
int ftruncate64(int fd, off_t length) { return truncate_any(fd, length); }

int eventfd(unsigned value, int flags)
{
    struct rule *r = hit("eventfd");
    return r ? refuse(r) : (int)syscall(SYS_eventfd2, value, flags);
}

int epoll_create1(int flags)
{
    struct rule *r = hit("epoll_create1");
    return r ? refuse(r) : (int)syscall(SYS_epoll_create1, flags);
}

int epoll_ctl(int epoll_fd, int operation, int fd, struct epoll_event *event)
{
    struct rule *r = operation == EPOLL_CTL_DEL ? NULL : hit("epoll_ctl");
    return r ? refuse(r) : (int)syscall(SYS_epoll_ctl, epoll_fd, operation, fd, event);
}

int epoll_wait(int epoll_fd, struct epoll_event *events, int most, int timeout_ms)
{
    struct rule *r = hit("epoll_wait");
    return r ? refuse(r) : (int)syscall(SYS_epoll_pwait, epoll_fd, events, most, timeout_ms, NULL, 8);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    struct rule *r = hit("pthread_create");
    return r ? r->error : REAL(pthread_create)(thread, attributes, run, argument);
}

/* userfaultfd and memfd_create come by as syscall(2). */
long syscall(long number, ...)
{
    static long (*real)(long, ...);
    va_list list;
    long a[6];
    if (!real)
        real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    struct rule *r = NULL;
    if (number == SYS_userfaultfd)
        r = hit("userfaultfd");
    else if (number == SYS_memfd_create)
        r = hit("memfd_create");
    return r ? refuse(r) : real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
