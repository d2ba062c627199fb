/* Images of memory on disk: read through the chain of their files, each piece against its checksum; and what a forked
 * child needs to write one.
 *
 * A file of an image has a data section, cut into units of IMAGE_UNIT bytes, the last one shorter. The sum of a unit is
 * 0 where all of it is zeros (a hole takes no room, and costs no hashing), else its XXH64 (_checked.h) seeded by the
 * file's own number and the unit's, so that bytes in the wrong place don't pass. An extent says where a range of the
 * image lies: in which file, and where in that file's data. Extents are sorted, and cover the image without a gap.
 *
 * Threads: everything here is constant once it is made; fills keep nothing, and take no lock and no memory.
 *
 * Provides: uffd_image_make, _fill, _free; image_sums; forked_there. All answer 0 or -errno: EBADMSG for bytes that are
 * not those of their checksum, ENODATA for a file that has become shorter.
 */
#ifndef UFFD_IMAGEFILE_H
#define UFFD_IMAGEFILE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>

#include "_checked.h"

enum { IMAGE_UNIT = 64 << 10 };

struct image_extent {
    uint64_t at, nbytes;                /* of the image */
    uint64_t file, file_at;             /* which file, and where in its data section */
};

struct image_file {
    int fd;
    uint64_t data_offset, data_bytes, seed;
    uint64_t *sum;
};

struct uffd_image {
    uint64_t files, extents, unders;
    struct image_file *file;
    struct image_extent *extent;        /* what is read */
    struct image_extent *under;         /* or NULL: the same without the last file, which has copies of the others */
};

static inline bool image_zeros(const uint8_t *bytes, size_t nbytes)
{
    return nbytes == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, nbytes - 1) == 0);
}

static inline uint64_t image_sum(uint64_t seed, uint64_t unit, const uint8_t *bytes, size_t nbytes)
{
    if (image_zeros(bytes, nbytes))
        return 0;
    uint64_t sum = checked_sum(seed, unit, bytes, nbytes);
    return sum ? sum : 1;
}

static inline size_t image_unit_bytes(uint64_t data_bytes, uint64_t unit)
{
    uint64_t left = data_bytes - unit * IMAGE_UNIT;
    return left < IMAGE_UNIT ? (size_t)left : IMAGE_UNIT;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

static inline int image_read_unit(const struct image_file *f, uint64_t unit, uint8_t *to)
{
    size_t nbytes = image_unit_bytes(f->data_bytes, unit);
    int err = checked_pread(f->fd, to, nbytes, f->data_offset + unit * IMAGE_UNIT);
    if (err == 0 && image_sum(f->seed, unit, to, nbytes) != f->sum[unit])
        err = -EBADMSG;
    return err;
}

/* Bytes of one file's data section. Whole units are read in place, others through a copy on the stack. */
static inline int image_read_file(const struct image_file *f, uint64_t at, uint8_t *to, size_t nbytes)
{
    uint8_t whole[IMAGE_UNIT];
    while (nbytes) {
        uint64_t unit = at / IMAGE_UNIT, skip = at % IMAGE_UNIT;
        size_t has = image_unit_bytes(f->data_bytes, unit), n = has - skip < nbytes ? has - skip : nbytes;
        int err = image_read_unit(f, unit, n == has ? to : whole);
        if (err)
            return err;
        if (n < has)
            memcpy(to, whole + skip, n);
        at += n, to += n, nbytes -= n;
    }
    return 0;
}

/* The first extent that ends behind an offset. */
static inline uint64_t image_extent_at(const struct image_extent *extent, uint64_t extents, uint64_t offset)
{
    uint64_t low = 0, high = extents;
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        if (extent[middle].at + extent[middle].nbytes <= offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Tells the kernel that a range will be read: a disk then has many requests at once, not one for each worker. */
static inline void uffd_image_ahead(const struct uffd_image *image, uint64_t offset, uint64_t nbytes)
{
    for (uint64_t i = image_extent_at(image->extent, image->extents, offset); nbytes && i < image->extents; i++) {
        const struct image_extent *e = &image->extent[i];
        uint64_t skip = offset - e->at, n = e->nbytes - skip < nbytes ? e->nbytes - skip : nbytes;
        const struct image_file *f = &image->file[e->file];
        posix_fadvise(f->fd, (off_t)(f->data_offset + e->file_at + skip), (off_t)n, POSIX_FADV_WILLNEED);
        offset += n, nbytes -= n;
    }
}

static inline int image_read(const struct uffd_image *image, const struct image_extent *extent, uint64_t extents,
                             uint64_t offset, uint8_t *to, size_t nbytes)
{
    for (uint64_t low = image_extent_at(extent, extents, offset); nbytes; low++) {
        if (low == extents)
            return -ENODATA;
        const struct image_extent *e = &extent[low];
        uint64_t skip = offset - e->at;
        size_t n = e->nbytes - skip < nbytes ? (size_t)(e->nbytes - skip) : nbytes;
        int err = image_read_file(&image->file[e->file], e->file_at + skip, to, n);
        if (err && extent != image->under && image->under && e->file == image->files - 1)
            err = image_read(image, image->under, image->unders, offset, to, n);    /* a damaged copy: the original */
        if (err)
            return err;
        offset += n, to += n, nbytes -= n;
    }
    return 0;
}

static inline int uffd_image_fill(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes)
{
    const struct uffd_image *image = self;
    (void)slot;
    return image_read(image, image->extent, image->extents, offset, block, nbytes);
}

static inline void uffd_image_free(struct uffd_image *image)
{
    for (uint64_t i = 0; image && i < image->files; i++) {
        free(image->file[i].sum);
        if (image->file[i].fd >= 0)
            close(image->file[i].fd);
    }
    if (image) {
        free(image->file);
        free(image->extent);
        free(image->under);
        free(image);
    }
}

/* An image without its files' sums, whose descriptors are -1; NULL: no memory. */
static inline struct uffd_image *uffd_image_make(uint64_t files, uint64_t extents, uint64_t unders)
{
    struct uffd_image *image = calloc(1, sizeof *image);
    if (!image)
        return NULL;
    image->file = calloc(files + 1, sizeof *image->file);
    image->extent = calloc(extents + 1, sizeof *image->extent);
    image->under = unders ? calloc(unders, sizeof *image->under) : NULL;
    if (!image->file || !image->extent || (unders && !image->under)) {
        uffd_image_free(image);
        return NULL;
    }
    image->files = files, image->extents = extents, image->unders = unders;
    for (uint64_t i = 0; i < files; i++)
        image->file[i].fd = -1;
    return image;
}

/* Each extent lies in its file, each follows the one before it, and together they are nbytes. */
static inline bool image_whole(const struct uffd_image *image, const struct image_extent *extent, uint64_t extents,
                               uint64_t nbytes)
{
    uint64_t at = 0;
    for (uint64_t i = 0; i < extents; i++) {
        const struct image_extent *e = &extent[i];
        if (e->at != at || e->nbytes == 0 || e->nbytes > nbytes - at || e->file >= image->files)
            return false;
        const struct image_file *f = &image->file[e->file];
        if (e->file_at > f->data_bytes || e->nbytes > f->data_bytes - e->file_at)
            return false;
        at += e->nbytes;
    }
    return at == nbytes;
}

static inline bool uffd_image_whole(const struct uffd_image *image, uint64_t nbytes)
{
    return image_whole(image, image->extent, image->extents, nbytes)
        && (!image->under || image_whole(image, image->under, image->unders, nbytes));
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

/* The sums of a data section that was written. Holes are stepped over. */
static inline int image_sums(int fd, uint64_t data_offset, uint64_t data_bytes, uint64_t seed, uint64_t *sum)
{
    uint8_t bytes[IMAGE_UNIT];
    uint64_t units = (data_bytes + IMAGE_UNIT - 1) / IMAGE_UNIT, data_until = 0;
    for (uint64_t unit = 0; unit < units; unit++) {
        uint64_t at = data_offset + unit * IMAGE_UNIT;
        size_t nbytes = image_unit_bytes(data_bytes, unit);
        if (at >= data_until) {
            off_t next = lseek(fd, (off_t)at, SEEK_DATA);
            if (next < 0 && errno == ENXIO)
                next = (off_t)(data_offset + data_bytes);
            if (next >= 0 && (uint64_t)next >= at + nbytes) {
                uint64_t skip = ((uint64_t)next - data_offset) / IMAGE_UNIT - unit;
                if (skip > units - unit || (uint64_t)next >= data_offset + data_bytes)
                    skip = units - unit;
                memset(sum + unit, 0, skip * sizeof *sum);
                unit += skip - 1;
                continue;
            }
            off_t end = next < 0 ? -1 : lseek(fd, next, SEEK_HOLE);
            data_until = end < 0 ? UINT64_MAX : (uint64_t)end;     /* no SEEK_DATA here: all of it is data */
        }
        int err = checked_pread(fd, bytes, nbytes, at);
        if (err)
            return err;
        sum[unit] = image_sum(seed, unit, bytes, nbytes);
    }
    return 0;
}

/* Which of up to 512 pages from address on were ever written, by /proc/self/pagemap: present or swapped out. */
static inline int forked_there(int pagemap, uint64_t address, uint64_t page, uint64_t n, uint8_t *there)
{
    uint64_t entry[512];
    int err = checked_pread(pagemap, entry, n * 8, address / page * 8);
    for (uint64_t i = 0; err == 0 && i < n; i++)
        there[i] = entry[i] >> 62 != 0;
    return err;
}

static inline int forked_pagemap(void)
{
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* The child has the program's pipes and sockets, whose ends others wait for: it closes what it does not need. */
static inline void forked_close_others(int fd)
{
    syscall(436 /* close_range, 5.9 */, 0u, (unsigned)fd - 1, 0u);
    syscall(436, (unsigned)fd + 1, ~0u, 0u);
}

/* Signals of the terminal are not for it, and Python's handlers would tell them to the program; those that a touch may
 * cause stay. Gives back what was blocked before. */
static inline void forked_signals_off(sigset_t *before)
{
    sigset_t all;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGILL);
    sigdelset(&all, SIGFPE);
    pthread_sigmask(SIG_SETMASK, &all, before);
}

static inline void forked_signals_back(const sigset_t *before) { pthread_sigmask(SIG_SETMASK, before, NULL); }

#endif
