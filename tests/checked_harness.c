/* uffd/_checked.h by itself, as a library for ctypes: every write and every fdatasync goes by a hook of the test's. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

typedef int (*hook_fn)(int is_sync, int fd, const void *bytes, size_t nbytes, uint64_t offset);
static hook_fn hook;

/* The hook answers 0, or the errno with which the call is to fail. */
static ssize_t hooked_pwrite(int fd, const void *bytes, size_t nbytes, off_t offset)
{
    int err = hook ? hook(0, fd, bytes, nbytes, (uint64_t)offset) : 0;
    if (err)
        errno = err;
    return err ? -1 : pwrite(fd, bytes, nbytes, offset);
}

static int hooked_fdatasync(int fd)
{
    int err = hook ? hook(1, fd, NULL, 0, 0) : 0;
    if (err)
        errno = err;
    return err ? -1 : fdatasync(fd);
}

#define pwrite hooked_pwrite
#define fdatasync hooked_fdatasync
#define CHECKED_JOURNAL_BYTES (128u << 10)      /* small, so that a few stores fill it */
#include "_checked.h"
#undef pwrite
#undef fdatasync

void checked_test_hook(hook_fn function) { hook = function; }
uint64_t checked_test_xxh64(const void *bytes, size_t nbytes, uint64_t seed) { return checked_xxh64(bytes, nbytes, seed); }

int checked_test_make(int fd, int side, uint64_t offset, uint64_t nbytes, uint64_t id)
{
    return uffd_checked_make(fd, side, offset, nbytes, id);
}

int checked_test_open(void **out, int fd, int side, uint64_t offset, uint64_t nbytes, int writable)
{
    return uffd_checked_open((struct uffd_checked **)out, fd, side, offset, nbytes, writable);
}

int checked_test_fill(void *self, uint64_t offset, void *block, size_t nbytes)
{
    return uffd_checked_fill(self, 0, offset, block, nbytes);
}

int checked_test_store(void *self, uint64_t offset, const void *block, size_t nbytes)
{
    return uffd_checked_store(self, 0, offset, block, nbytes);
}

int checked_test_sync(void *self) { return uffd_checked_sync(self); }
void checked_test_close(void *self) { uffd_checked_close(self); }
uint64_t checked_test_pending(void *self) { return ((struct uffd_checked *)self)->records; }
