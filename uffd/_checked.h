/* A file whose blocks are old or new after a crash, never torn, and whose flipped bits are an error and never data.
 *
 * Beside the file lies another one, the sidecar: two headers, a table with a checksum of each unit of 4 KiB, a journal.
 *
 *   store   appends a record to the journal: the bytes, their checksums, a checksum of that. Nothing else is written,
 *           so whatever ends the process leaves the record whole or worthless, and the file as it was. From then on a
 *           fill takes these units from the journal.
 *   sync    makes the journal durable, then copies it: into the file, and the checksums into the table; makes both
 *           durable; then a header with a new generation makes the journal void, and its room is used again. A crash in
 *           the midst finds the old generation, and all its records are there to be copied again.
 *   open    reads the records of the header's generation up to the first that is not whole. Who may write copies them.
 *
 * So a store that was acknowledged survives the death of the process (its record is in the kernel's hands), one that
 * was synced the loss of power, and after a sync the file has what was written, for everybody to read. A record spans
 * a whole store: all of a block's units are old, or all are new. No write to the file or the table begins before the
 * journal is durable that can repair it. When the journal holds CHECKED_JOURNAL_BYTES, a store syncs first.
 *
 * The two headers lie in pages of their own and are written in turn, so that one is whole at any time. A record of the
 * last generation that was not yet overwritten when power was lost does no harm when it is copied again: nothing newer
 * was copied before the newer header was durable.
 *
 * Checksums: XXH64 (Yann Collet; https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md), with the unit's
 * number and a random number of the sidecar's own as its seed, so that bytes in the wrong place don't pass.
 *
 * Threads: open and close by one at a time; the others by any number. Fills go on during a sync. In a forked child
 * fills alone are allowed: it takes no lock (whose owner is not there), and where the parent has moved on meanwhile it
 * looks again: it gets whole units then, but of a block that the parent has under way maybe some of each. After an
 * fdatasync of the journal failed nothing is stored any more: the kernel may have dropped pages, and now
 * calls them clean.
 *
 * Provides: uffd_checked_make, _open, _ahead, _fill, _store, _sync, _close. All but _ahead answer 0 or -errno: EBADMSG
 * for bytes that are not those of their checksum, ESTALE for a file whose size or a sidecar whose offset is another,
 * EBUSY while another has it open for writing. Damage to the journal costs what was stored since the last sync, as a
 * loss of power does.
 */
#ifndef UFFD_CHECKED_H
#define UFFD_CHECKED_H

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    CHECKED_UNIT = 4 << 10,             /* divides every block */
    CHECKED_RECORD_UNITS = 4 << 10,     /* of one record, at most: the largest block */
    CHECKED_TABLE = 2 * CHECKED_UNIT,   /* where the table begins */
    CHECKED_CHUNK_UNITS = 256,          /* checksums and bytes are moved in pieces of so many units */
    CHECKED_CHILD_TRIES = 200,          /* of a forked child, a millisecond apart */
};
#ifndef CHECKED_JOURNAL_BYTES
#define CHECKED_JOURNAL_BYTES (64ull << 20)
#endif
#define CHECKED_MAGIC 0x316d757364666675ull     /* "uffdsum1" */
#define CHECKED_RECORD 0x3163657264666675ull    /* "uffdrec1" */

struct checked_header {
    uint64_t magic, id, generation;
    uint64_t offset, nbytes;            /* what of the file is covered */
    uint64_t unit;
    uint64_t checksum;                  /* of all before */
};

struct checked_record {
    uint64_t magic, generation, number; /* the number counts from 0 in each generation */
    uint64_t first, units;
    uint64_t checksum;                  /* of all before, and of the units' checksums, which follow */
};

struct uffd_checked {
    int fd, side;
    pid_t owner;
    bool writable, broken;
    uint64_t id, generation, offset, nbytes, units;
    uint64_t journal;                   /* where it begins in the sidecar */
    pthread_mutex_t writer;             /* of the journal's end, of copying: one at a time */
    pthread_rwlock_t moved;             /* held for writing when units change their place */
    uint64_t records, used;             /* in the journal; bytes */
    uint32_t *place;                    /* of each unit: 0, in the file; else 1 + its unit in the journal */
    uint64_t *sum;                      /* of each unit that is in the journal */
    struct checked_record *record;      /* room for the largest, with its checksums */
    uint8_t *copy;                      /* CHECKED_CHUNK_UNITS units */
};

/* ---- checksums ------------------------------------------------------------------------------------------------- */

#define XXH_1 0x9E3779B185EBCA87ull
#define XXH_2 0xC2B2AE3D27D4EB4Full
#define XXH_3 0x165667B19E3779F9ull
#define XXH_4 0x85EBCA77C2B2AE63ull
#define XXH_5 0x27D4EB2F165667C5ull

static inline uint64_t checked_rotate(uint64_t x, int n) { return x << n | x >> (64 - n); }

static inline uint64_t checked_word(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? __builtin_bswap64(v) : v;
}

static inline uint64_t checked_round(uint64_t lane, uint64_t word)
{
    return checked_rotate(lane + word * XXH_2, 31) * XXH_1;
}

static inline uint64_t checked_tail(uint64_t h, const uint8_t *p, size_t left)
{
    for (; left >= 8; p += 8, left -= 8)
        h = checked_rotate(h ^ checked_round(0, checked_word(p)), 27) * XXH_1 + XXH_4;
    if (left >= 4) {
        uint32_t v = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        h = checked_rotate(h ^ v * XXH_1, 23) * XXH_2 + XXH_3;
        p += 4, left -= 4;
    }
    for (; left; p++, left--)
        h = checked_rotate(h ^ *p * XXH_5, 11) * XXH_1;
    h = (h ^ h >> 33) * XXH_2;
    h = (h ^ h >> 29) * XXH_3;
    return h ^ h >> 32;
}

static inline uint64_t checked_xxh64(const void *bytes, size_t nbytes, uint64_t seed)
{
    const uint8_t *p = bytes;
    uint64_t lane[4] = {seed + XXH_1 + XXH_2, seed + XXH_2, seed, seed - XXH_1}, h = seed + XXH_5;
    size_t left = nbytes;
    if (nbytes >= 32) {
        for (; left >= 32; p += 32, left -= 32)
            for (int i = 0; i < 4; i++)
                lane[i] = checked_round(lane[i], checked_word(p + 8 * i));
        h = checked_rotate(lane[0], 1) + checked_rotate(lane[1], 7) + checked_rotate(lane[2], 12) +
            checked_rotate(lane[3], 18);
        for (int i = 0; i < 4; i++)
            h = (h ^ checked_round(0, lane[i])) * XXH_1 + XXH_4;
    }
    return checked_tail(h + nbytes, p, left);
}

static inline uint64_t checked_sum(uint64_t id, uint64_t unit, const void *bytes, size_t nbytes)
{
    return checked_xxh64(bytes, nbytes, id ^ unit * XXH_3);
}

/* ---- reading and writing --------------------------------------------------------------------------------------- */

static inline int checked_pread(int fd, void *bytes, size_t nbytes, uint64_t offset)
{
    for (size_t at = 0; at < nbytes;) {
        ssize_t n = pread(fd, (char *)bytes + at, nbytes - at, (off_t)(offset + at));
        if (n > 0)
            at += (size_t)n;
        else if (n == 0)
            return -ENODATA;
        else if (errno != EINTR)
            return -errno;
    }
    return 0;
}

static inline int checked_pwrite(int fd, const void *bytes, size_t nbytes, uint64_t offset)
{
    for (size_t at = 0; at < nbytes;) {
        ssize_t n = pwrite(fd, (const char *)bytes + at, nbytes - at, (off_t)(offset + at));
        if (n > 0)
            at += (size_t)n;
        else if (n == 0)
            return -EIO;
        else if (errno != EINTR)
            return -errno;
    }
    return 0;
}

static inline size_t checked_unit_bytes(const struct uffd_checked *c, uint64_t unit)
{
    return unit + 1 < c->units ? CHECKED_UNIT : (size_t)(c->nbytes - unit * CHECKED_UNIT);
}

static inline uint64_t checked_min(uint64_t a, uint64_t b) { return a < b ? a : b; }

static inline uint64_t checked_whole(uint64_t nbytes)
{
    return (nbytes + CHECKED_UNIT - 1) / CHECKED_UNIT * CHECKED_UNIT;
}

/* Bytes of a record in the journal before its units. */
static inline uint64_t checked_head(uint64_t units)
{
    return checked_whole(sizeof(struct checked_record) + 8 * units);
}

static inline uint64_t *checked_sums(struct checked_record *r) { return (uint64_t *)(r + 1); }

static inline uint64_t checked_record_sum(uint64_t id, const struct checked_record *r)
{
    uint64_t h = checked_xxh64(r, offsetof(struct checked_record, checksum), id);
    return checked_xxh64(r + 1, 8 * (size_t)r->units, h);
}

/* ---- headers --------------------------------------------------------------------------------------------------- */

static inline uint64_t checked_header_sum(const struct checked_header *h)
{
    return checked_xxh64(h, offsetof(struct checked_header, checksum), 0);
}

static inline int checked_write_header(int side, uint64_t id, uint64_t generation, uint64_t offset, uint64_t nbytes)
{
    struct checked_header h = {CHECKED_MAGIC, id, generation, offset, nbytes, CHECKED_UNIT, 0};
    h.checksum = checked_header_sum(&h);
    return checked_pwrite(side, &h, sizeof h, generation % 2 * CHECKED_UNIT);
}

/* The newer of the two that is whole. */
static inline int checked_read_header(int side, struct checked_header *found)
{
    struct checked_header h;
    int known = 0;
    for (int i = 0; i < 2; i++) {
        int err = checked_pread(side, &h, sizeof h, (uint64_t)i * CHECKED_UNIT);
        if (err && err != -ENODATA)
            return err;
        if (err || h.magic != CHECKED_MAGIC || h.checksum != checked_header_sum(&h) || h.unit != CHECKED_UNIT)
            continue;
        if (!known || h.generation > found->generation)
            *found = h;
        known = 1;
    }
    return known ? 0 : -EBADMSG;
}

/* A new sidecar, for the file as it is now, which nobody may write to meanwhile. Reads all of it. */
static inline int uffd_checked_make(int fd, int side, uint64_t offset, uint64_t nbytes, uint64_t id)
{
    enum { UNITS = 256 };
    uint8_t *bytes = malloc((size_t)UNITS * CHECKED_UNIT);
    uint64_t sums[UNITS], units = checked_whole(nbytes) / CHECKED_UNIT;
    int err = bytes ? ftruncate(side, (off_t)checked_whole(CHECKED_TABLE + 8 * units)) ? -errno : 0 : -ENOMEM;
    for (uint64_t u = 0; !err && u < units; u += UNITS) {
        uint64_t at = u * CHECKED_UNIT, part = checked_min(nbytes - at, (uint64_t)UNITS * CHECKED_UNIT), n = 0;
        err = checked_pread(fd, bytes, part, offset + at);
        for (; !err && n * CHECKED_UNIT < part; n++)
            sums[n] = checked_sum(id, u + n, bytes + n * CHECKED_UNIT,
                                  checked_min(part - n * CHECKED_UNIT, CHECKED_UNIT));
        if (!err)
            err = checked_pwrite(side, sums, 8 * n, CHECKED_TABLE + 8 * u);
    }
    free(bytes);
    for (uint64_t generation = 1; !err && generation < 3; generation++)
        err = checked_write_header(side, id, generation, offset, nbytes);
    return err ? err : fsync(side) ? -errno : 0;
}

/* ---- fills ----------------------------------------------------------------------------------------------------- */

/* Units [u, u + n) that lie together, in the file or in the journal; the last may be wanted in part (`want` bytes). */
static inline int checked_take(struct uffd_checked *c, uint64_t u, uint64_t n, uint8_t *target, size_t want)
{
    uint64_t kept[CHECKED_CHUNK_UNITS];
    uint8_t whole[CHECKED_UNIT];
    const uint64_t *sums = c->sum + u;
    size_t last = checked_unit_bytes(c, u + n - 1), before = (size_t)(n - 1) * CHECKED_UNIT;
    bool part = want < before + last;
    uint32_t place = c->place[u];
    int fd = place ? c->side : c->fd, err = 0;
    uint64_t from = place ? c->journal + (uint64_t)(place - 1) * CHECKED_UNIT : c->offset + u * CHECKED_UNIT;
    if (!place) {
        err = checked_pread(c->side, kept, 8 * (size_t)n, CHECKED_TABLE + 8 * u);
        sums = kept;
    }
    if (!err)
        err = checked_pread(fd, target, part ? before : before + last, from);
    if (!err && part)
        err = checked_pread(fd, whole, last, from + before);
    if (err)
        return err;
    for (uint64_t i = 0; i < n; i++) {
        bool is_part = part && i == n - 1;
        if (checked_sum(c->id, u + i, is_part ? whole : target + i * CHECKED_UNIT, i == n - 1 ? last : CHECKED_UNIT) !=
            sums[i])
            return -EBADMSG;
    }
    if (part)
        memcpy(target + before, whole, want - before);
    return 0;
}

static inline int checked_fill_now(struct uffd_checked *c, uint64_t offset, uint8_t *block, size_t nbytes)
{
    uint64_t u = offset / CHECKED_UNIT, end = checked_whole(offset + nbytes) / CHECKED_UNIT;
    while (u < end) {
        uint64_t n = 1;
        while (u + n < end && n < CHECKED_CHUNK_UNITS &&
               c->place[u + n] == (c->place[u] ? c->place[u] + (uint32_t)n : 0))
            n++;
        uint64_t at = u * CHECKED_UNIT - offset;
        int err = checked_take(c, u, n, block + at, (size_t)checked_min(nbytes - at, n * CHECKED_UNIT));
        if (err)
            return err;
        u += n;
    }
    return 0;
}

/* The parent goes on: what was in the journal may be in the file by now, which may just be written. */
static inline int checked_fill_in_child(struct uffd_checked *c, uint64_t offset, uint8_t *block, size_t nbytes)
{
    int err = checked_fill_now(c, offset, block, nbytes);
    for (int i = 0; err == -EBADMSG && i < CHECKED_CHILD_TRIES; i++) {
        for (uint64_t u = offset / CHECKED_UNIT; u * CHECKED_UNIT < offset + nbytes; u++)
            c->place[u] = 0;
        nanosleep(&(struct timespec){0, 1000000}, NULL);
        err = checked_fill_now(c, offset, block, nbytes);
    }
    return err;
}

/* Tells the kernel of bytes that will be asked for. What lies in the journal was written lately. */
static inline void uffd_checked_ahead(void *self, uint64_t offset, uint64_t nbytes)
{
    const struct uffd_checked *c = self;
    posix_fadvise(c->fd, (off_t)(c->offset + offset), (off_t)nbytes, POSIX_FADV_WILLNEED);
}

static inline int uffd_checked_fill(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes)
{
    struct uffd_checked *c = self;
    (void)slot;
    if (getpid() != c->owner)
        return checked_fill_in_child(c, offset, block, nbytes);
    pthread_rwlock_rdlock(&c->moved);
    int err = checked_fill_now(c, offset, block, nbytes);
    pthread_rwlock_unlock(&c->moved);
    return err;
}

/* ---- the journal ----------------------------------------------------------------------------------------------- */

/* The units of a record, whose first lies at the journal's unit `at`, are to be found there. */
static inline void checked_index(struct uffd_checked *c, const struct checked_record *r, uint64_t at)
{
    const uint64_t *sums = (const uint64_t *)(r + 1);
    pthread_rwlock_wrlock(&c->moved);
    for (uint64_t i = 0; i < r->units; i++) {
        c->place[r->first + i] = (uint32_t)(at + i + 1);
        c->sum[r->first + i] = sums[i];
    }
    pthread_rwlock_unlock(&c->moved);
}

static inline void checked_added(struct uffd_checked *c, const struct checked_record *r)
{
    checked_index(c, r, (c->used + checked_head(r->units)) / CHECKED_UNIT);
    c->used += checked_head(r->units) + r->units * CHECKED_UNIT;
    c->records++;
}

/* The head of the record at byte `at` of the journal: 0, -ENODATA when none is there, or -errno. */
static inline int checked_read_record(struct uffd_checked *c, uint64_t at, uint64_t number)
{
    struct checked_record *r = c->record;
    int err = checked_pread(c->side, r, sizeof *r, c->journal + at);
    if (err)
        return err;
    if (r->magic != CHECKED_RECORD || r->generation != c->generation || r->number != number || r->units == 0 ||
        r->units > CHECKED_RECORD_UNITS || r->first >= c->units || r->units > c->units - r->first)
        return -ENODATA;
    err = checked_pread(c->side, r + 1, 8 * (size_t)r->units, c->journal + at + sizeof *r);
    return err ? err : r->checksum == checked_record_sum(c->id, r) ? 0 : -ENODATA;
}

/* Whether all its units are there: 0, -ENODATA, -errno. */
static inline int checked_read_units(struct uffd_checked *c, uint64_t at)
{
    struct checked_record *r = c->record;
    for (uint64_t i = 0; i < r->units; i++) {
        size_t nbytes = checked_unit_bytes(c, r->first + i);
        int err = checked_pread(c->side, c->copy, nbytes,
                                c->journal + at + checked_head(r->units) + i * CHECKED_UNIT);
        if (err)
            return err;
        if (checked_sum(c->id, r->first + i, c->copy, nbytes) != checked_sums(r)[i])
            return -ENODATA;
    }
    return 0;
}

static inline int checked_recover(struct uffd_checked *c)
{
    int err;
    do {
        err = checked_read_record(c, c->used, c->records);
        if (!err)
            err = checked_read_units(c, c->used);
        if (!err)
            checked_added(c, c->record);
    } while (!err);
    return err == -ENODATA ? 0 : err;
}

/* The record at hand, but for units that a later one has, into the file and the table. */
static inline int checked_copy_record(struct uffd_checked *c, uint64_t at)
{
    struct checked_record *r = c->record;
    uint64_t from = (at + checked_head(r->units)) / CHECKED_UNIT, i = 0;
    int err = 0;
    while (!err && i < r->units) {
        uint64_t n = 0, u = r->first + i;
        while (i + n < r->units && n < CHECKED_CHUNK_UNITS && c->place[u + n] == from + i + n + 1)
            n++;
        if (n == 0) {
            i++;
            continue;
        }
        size_t nbytes = (size_t)(n - 1) * CHECKED_UNIT + checked_unit_bytes(c, u + n - 1);
        err = checked_take(c, u, n, c->copy, nbytes);
        if (!err)
            err = checked_pwrite(c->fd, c->copy, nbytes, c->offset + u * CHECKED_UNIT);
        if (!err)
            err = checked_pwrite(c->side, c->sum + u, 8 * (size_t)n, CHECKED_TABLE + 8 * u);
        i += n;
    }
    return err;
}

static inline int checked_copy_all(struct uffd_checked *c)
{
    uint64_t at = 0;
    for (uint64_t k = 0; k < c->records; k++) {
        int err = checked_read_record(c, at, k);
        if (!err)
            err = checked_copy_record(c, at);
        if (err)
            return err == -ENODATA ? -EBADMSG : err;
        at += checked_head(c->record->units) + c->record->units * CHECKED_UNIT;
    }
    return 0;
}

/* All units are in the file now, and the journal is void. The new generation also keeps what an unlucky end left behind
 * the journal's last whole record from being taken for a record that follows the next one. */
static inline int checked_next(struct uffd_checked *c)
{
    int err = checked_write_header(c->side, c->id, c->generation + 1, c->offset, c->nbytes);
    if (err)
        return err;
    pthread_rwlock_wrlock(&c->moved);
    if (c->records && (madvise(c->place, 4 * c->units, MADV_DONTNEED) || madvise(c->sum, 8 * c->units, MADV_DONTNEED)))
        memset(c->place, 0, 4 * c->units);       /* locked memory (mlockall) is not given back */
    c->records = c->used = 0;
    c->generation++;
    pthread_rwlock_unlock(&c->moved);
    return 0;
}

/* By the writer. What fails leaves the journal as it is, and may be tried again. */
static inline int checked_sync_now(struct uffd_checked *c)
{
    int err = c->broken ? -EIO : 0;
    if (err || c->records == 0)
        return err;
    if (fdatasync(c->side)) {
        c->broken = true;
        return -errno;
    }
    err = checked_copy_all(c);
    if (err)
        return err;
    if (fdatasync(c->fd))
        return -errno;
    if (fdatasync(c->side)) {
        c->broken = true;
        return -errno;
    }
    return checked_next(c);
}

static inline int uffd_checked_sync(void *self)
{
    struct uffd_checked *c = self;
    if (!c->writable || getpid() != c->owner)
        return -EBADF;
    pthread_mutex_lock(&c->writer);
    int err = checked_sync_now(c);
    pthread_mutex_unlock(&c->writer);
    return err;
}

/* One record. `rest`: what the last unit has behind the bytes given, which end inside it. */
static inline int checked_append(struct uffd_checked *c, uint64_t u, const uint8_t *bytes, size_t nbytes)
{
    struct checked_record *r = c->record;
    uint64_t n = checked_whole(nbytes) / CHECKED_UNIT;
    size_t before = (size_t)(n - 1) * CHECKED_UNIT, given = nbytes - before, last = checked_unit_bytes(c, u + n - 1);
    uint8_t *whole = c->copy;
    if (given < last) {
        int err = checked_take(c, u + n - 1, 1, whole, last);
        if (err)
            return err;
    }
    memcpy(whole, bytes + before, given);
    *r = (struct checked_record){CHECKED_RECORD, c->generation, c->records, u, n, 0};
    for (uint64_t i = 0; i + 1 < n; i++)
        checked_sums(r)[i] = checked_sum(c->id, u + i, bytes + i * CHECKED_UNIT, CHECKED_UNIT);
    checked_sums(r)[n - 1] = checked_sum(c->id, u + n - 1, whole, last);
    r->checksum = checked_record_sum(c->id, r);
    uint64_t at = c->journal + c->used, units = at + checked_head(n);
    int err = checked_pwrite(c->side, bytes, before, units);
    if (!err)
        err = checked_pwrite(c->side, whole, last, units + before);
    if (!err)
        err = checked_pwrite(c->side, r, sizeof *r + 8 * (size_t)n, at);
    if (!err)
        checked_added(c, r);
    return err;
}

static inline int uffd_checked_store(void *self, uint32_t slot, uint64_t offset, const void *block, size_t nbytes)
{
    struct uffd_checked *c = self;
    const uint64_t most = (uint64_t)CHECKED_RECORD_UNITS * CHECKED_UNIT;
    int err = 0;
    (void)slot;
    if (!c->writable || getpid() != c->owner)
        return -EBADF;
    pthread_mutex_lock(&c->writer);
    for (uint64_t at = 0; !err && at < nbytes; at += most) {
        if (c->broken)
            err = -EIO;
        else if (c->used >= CHECKED_JOURNAL_BYTES)
            err = checked_sync_now(c);
        if (!err)
            err = checked_append(c, (offset + at) / CHECKED_UNIT, (const uint8_t *)block + at,
                                 (size_t)checked_min(nbytes - at, most));
    }
    pthread_mutex_unlock(&c->writer);
    return err;
}

/* ---- life ------------------------------------------------------------------------------------------------------ */

static inline void *checked_map(uint64_t nbytes)
{
    void *p = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static inline void checked_free(struct uffd_checked *c)
{
    if (c->place)
        munmap(c->place, 4 * c->units);
    if (c->sum)
        munmap(c->sum, 8 * c->units);
    free(c->record);
    free(c->copy);
    pthread_mutex_destroy(&c->writer);
    pthread_rwlock_destroy(&c->moved);
    free(c);
}

/* The sidecar's header, and whether it fits the file. */
static inline int checked_adopt(struct uffd_checked *c)
{
    struct checked_header h = {0};
    struct stat st, side;
    int err = checked_read_header(c->side, &h);
    if (err)
        return err;
    if (h.nbytes == 0 || h.offset != c->offset || h.nbytes != c->nbytes)
        return -ESTALE;
    if (fstat(c->fd, &st) || fstat(c->side, &side))
        return -errno;
    c->id = h.id;
    c->generation = h.generation;
    c->units = checked_whole(h.nbytes) / CHECKED_UNIT;
    c->journal = checked_whole(CHECKED_TABLE + 8 * c->units);
    return (uint64_t)side.st_size < c->journal ? -EBADMSG : 0;
}

static inline int checked_begin(struct uffd_checked *c)
{
    int err = flock(c->side, (c->writable ? LOCK_EX : LOCK_SH) | LOCK_NB) ? -errno : 0;
    if (err)
        return err == -EWOULDBLOCK ? -EBUSY : err;
    err = checked_adopt(c);
    if (err)
        return err;
    c->place = checked_map(4 * c->units);
    c->sum = checked_map(8 * c->units);
    c->record = malloc((size_t)checked_head(CHECKED_RECORD_UNITS));
    c->copy = malloc((size_t)CHECKED_CHUNK_UNITS * CHECKED_UNIT);
    if (!c->place || !c->sum || !c->record || !c->copy)
        return -ENOMEM;
    err = checked_recover(c);
    if (err || !c->writable)
        return err;
    return c->records ? checked_sync_now(c) : checked_next(c);
}

/* The bytes [offset, offset + nbytes) of a file and its sidecar, both of which stay the caller's when it fails. */
static inline int uffd_checked_open(struct uffd_checked **out, int fd, int side, uint64_t offset, uint64_t nbytes,
                                    bool writable)
{
    struct uffd_checked *c = calloc(1, sizeof *c);
    if (!c)
        return -ENOMEM;
    c->fd = fd, c->side = side, c->offset = offset, c->nbytes = nbytes, c->writable = writable, c->owner = getpid();
    pthread_mutex_init(&c->writer, NULL);
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
#ifdef PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP
    /* glibc's own choice lets fills that follow one another keep a store out for ever */
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
    pthread_rwlock_init(&c->moved, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    int err = checked_begin(c);
    if (err) {
        flock(side, LOCK_UN);
        checked_free(c);
        return err;
    }
    *out = c;
    return 0;
}

/* Copies what is in the journal, if it can; else the next one who opens it does. */
static inline void uffd_checked_close(struct uffd_checked *c)
{
    if (getpid() == c->owner) {
        if (c->writable)
            checked_sync_now(c);
        flock(c->side, LOCK_UN);                 /* a forked child has the descriptor, and may live on */
    }
    close(c->fd);
    close(c->side);
    checked_free(c);
}

#endif
