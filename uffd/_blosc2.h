/* Pieces of a Blosc2 frame, decompressed by any thread, without the GIL.
 *
 * The codec library is the one that the `blosc2` wheel ships: opened at run time by its path, no header and no linking
 * at build time. Of its ABI we rely on eight functions of plain arguments and on one structure passed by value (struct
 * b2_dparams). The frame round the chunks is read by _blosc2_frame.h and not by the library, whose super-chunk handles
 * are not for several threads, keep a FILE each, and say of a file that ended early only that something failed.
 *
 * Two shapes of frame:
 *   linear  the bytes of chunk i, one after the other, are array bytes [i * chunk_bytes, (i + 1) * chunk_bytes).
 *   grid    any other b2nd layout: a byte range is cut into boxes, a box into blosc blocks, a block's rows copied out.
 *           A range of a few rows decodes every block that the rows cross, so a slot keeps up to B2_CACHE_BYTES of
 *           decoded blocks: row after row then costs each block once, as long as one row of blocks fits.
 *
 * What a fill reads and decodes is the blosc blocks it needs: of a chunk entered at random its head and the span of
 * those blocks; the whole chunk when at least half of it is wanted, when the slot reads in sequence, or when it comes
 * back to the same chunk. The bytes lie in the slot's buffer at their places in the chunk, so that the library sees an
 * ordinary chunk in memory and touches only the blocks asked for.
 *
 * Threads: uffd_b2_load, _open and _close by one thread at a time. uffd_b2_fill by any number of threads, each with a
 * slot of its own; nothing that two slots share is written after open. A slot's memory (context, chunk buffer, decoded
 * blocks) is allocated at its first fill, by the thread that fills, and grows only for a larger chunk; the library also
 * allocates scratch space at a context's first block of a new size. So a fill is not for signal handlers.
 *
 * Damage: Blosc2 has no checksums. Every length is checked before use, so a damaged file gives -errno (-EIO where bytes
 * are missing, -EBADMSG where they make no sense, -ENOTSUP for what the format allows and we don't read) or, where only
 * compressed payload was hit and still decodes, other bytes; never a write outside the block.
 *
 * Uses: _blosc2_frame.h, dlopen. Provides: uffd_b2_load, uffd_b2_version, uffd_b2_open, uffd_b2_fill, uffd_b2_close.
 */
#ifndef UFFD_BLOSC2_H
#define UFFD_BLOSC2_H

#include <dlfcn.h>
#include <stdio.h>

#include "_blosc2_frame.h"

enum {
    B2_READ_WHOLE_BYTES = 32 << 10,  /* a chunk this small is not worth a second read */
    B2_SMALL_BLOCK_BYTES = 16 << 10, /* a call of the library for each block of this size costs more than a copy */
    B2_CACHE_BYTES = 16 << 20,       /* decoded blocks of a grid frame, per slot */
    B2_CACHE_ENTRIES = 256,
};

/* ---- the library ---------------------------------------------------------------------------------------------- */

/* Passed by value. The reserve stays zero: a later 3.x that appends fields reads their defaults and not our stack. */
struct b2_dparams {
    int16_t nthreads;
    void *schunk;
    void *postfilter;
    void *postparams;
    int32_t typesize;
    uint64_t reserve[8];
};

static struct b2_library {
    void *handle;
    const char *version;
    bool may_thread; /* BLOSC_NTHREADS overrides nthreads in every context; only block reads stay in our thread then */
    void (*init)(void);
    const char *(*get_version_string)(void);
    void *(*create_dctx)(struct b2_dparams);
    void (*free_ctx)(void *);
    int (*decompress_ctx)(void *, const void *, int32_t, void *, int32_t);
    int (*getitem_ctx)(void *, const void *, int32_t, int, int, void *, int32_t);
    void *(*schunk_open_offset)(const char *, int64_t);
    int (*schunk_free)(void *);
} b2_library;

/* The version of the loaded library, or "" before uffd_b2_load, for messages. */
static inline const char *uffd_b2_version(void)
{
    return b2_library.version ? b2_library.version : "";
}

/* 0, also when it is loaded already (the first path stays); -ENOENT: cannot be opened; -ENOSYS: not a C-Blosc2 2.x or
 * 3.x. RTLD_NOW, so that no worker ever resolves a symbol; RTLD_LOCAL, since the library exports its own zstd, lz4
 * and zfp. */
static inline int uffd_b2_load(const char *library_path)
{
    struct b2_library it = {0};
    const struct { const char *name; void *slot; } symbols[] = {
        {"blosc2_init", &it.init},
        {"blosc2_get_version_string", &it.get_version_string},
        {"blosc2_create_dctx", &it.create_dctx},
        {"blosc2_free_ctx", &it.free_ctx},
        {"blosc2_decompress_ctx", &it.decompress_ctx},
        {"blosc2_getitem_ctx", &it.getitem_ctx},
        {"blosc2_schunk_open_offset", &it.schunk_open_offset},
        {"blosc2_schunk_free", &it.schunk_free},
    };
    if (b2_library.handle)
        return 0;
    it.handle = dlopen(library_path, RTLD_NOW | RTLD_LOCAL);
    if (!it.handle)
        return -ENOENT;
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *address = dlsym(it.handle, symbols[i].name);
        if (!address) {
            dlclose(it.handle);
            return -ENOSYS;
        }
        memcpy(symbols[i].slot, &address, sizeof address);
    }
    it.version = it.get_version_string();
    if (!it.version || (it.version[0] != '2' && it.version[0] != '3') || it.version[1] != '.') {
        dlclose(it.handle);
        return -ENOSYS;
    }
    it.may_thread = getenv("BLOSC_NTHREADS") != NULL;
    it.init(); /* registers the plugins' codecs and filters */
    b2_library = it;
    return 0;
}

/* The library's codes in ours. */
static inline int b2_errno(int code)
{
    switch (code) {
    case -4: return -ENOMEM;
    case -7: case -10: return -ENOTSUP; /* codec, version */
    case -13: case -30: return -EIO;
    default: return -EBADMSG;
    }
}

/* ---- slots ------------------------------------------------------------------------------------------------------- */

/* A decoded block in a slot's cache; chunk UINT64_MAX: none. */
struct b2_entry {
    uint64_t chunk, block, used;
};

/* One thread at a time owns a slot; 64: no two of them on one cache line. */
struct b2_slot {
    void *context;
    void *schunk;         /* for plugins only: they look up the array's shape in it */
    uint8_t *packed;      /* the chunk, compressed, each byte at its place in the chunk */
    uint64_t packed_bytes;
    uint64_t next_offset; /* the end of the last fill: a fill that starts there reads in sequence */
    uint64_t chunk;       /* which one; UINT64_MAX: none */
    struct b2_chunk head;
    uint64_t have_bytes;  /* present: [0, have_bytes) and the window */
    uint64_t window_start, window_end;
    bool sequential, seen; /* seen: an earlier fill already read from this chunk */
    uint8_t *plain;       /* decoded blocks, entry_bytes each */
    uint64_t entry_bytes;
    uint32_t entries;
    uint64_t clock;
    struct b2_entry *entry;
} __attribute__((aligned(64)));

struct uffd_b2 {
    struct b2_frame frame; /* not written after open */
    uint32_t slots;
    struct b2_slot *slot;
};

/* ---- chunks ------------------------------------------------------------------------------------------------------ */

/* Grow the slot's chunk buffer, keeping the bytes that are there. */
static int b2_packed_fit(struct b2_slot *slot, uint64_t nbytes)
{
    if (nbytes <= slot->packed_bytes)
        return 0;
    uint8_t *larger = realloc(slot->packed, nbytes);
    if (!larger)
        return -ENOMEM;
    slot->packed = larger;
    slot->packed_bytes = nbytes;
    return 0;
}

/* Where in the file byte `within` of a chunk lies. */
static inline uint64_t b2_file_offset(const struct uffd_b2 *self, uint64_t chunk, uint64_t within)
{
    return self->frame.chunks_start + (uint64_t)self->frame.places[chunk].at + within;
}

/* Read the chunk's bytes up to `stop`. */
static int b2_read_upto(struct uffd_b2 *self, struct b2_slot *slot, uint64_t chunk, uint64_t stop)
{
    if (stop <= slot->have_bytes)
        return 0;
    int rc = b2_packed_fit(slot, stop);
    if (!rc)
        rc = b2_pread(self->frame.fd, slot->packed + slot->have_bytes, stop - slot->have_bytes,
                      b2_file_offset(self, chunk, slot->have_bytes));
    if (!rc)
        slot->have_bytes = stop;
    return rc;
}

/* Make `chunk` the slot's chunk: its header parsed, its bstarts present. */
static int b2_enter(struct uffd_b2 *self, struct b2_slot *slot, uint64_t chunk)
{
    const uint64_t span = self->frame.places[chunk].span;
    const uint64_t expected = b2_chunk_nbytes(&self->frame, chunk);
    const uint64_t block_bytes = self->frame.info.block_bytes;
    uint64_t guess = block_bytes ? B2_CHUNK_HEADER_BYTES + 4 * (expected / block_bytes + 1) : 256;

    if (slot->chunk == chunk)
        return 0;
    slot->chunk = UINT64_MAX; /* so that a failure on the way is read anew */
    slot->seen = false;
    slot->have_bytes = slot->window_start = slot->window_end = 0;
    if (span <= B2_READ_WHOLE_BYTES || guess > span)
        guess = span;
    int rc = b2_read_upto(self, slot, chunk, guess);
    if (!rc)
        rc = b2_parse_chunk(slot->packed, slot->have_bytes, span, self->frame.plugins, &slot->head);
    if (rc)
        return rc;
    if (slot->head.nbytes != expected)
        return -EBADMSG;
    if (!self->frame.info.linear && !slot->head.special && slot->head.blocksize != block_bytes)
        return -EBADMSG;
    if (slot->have_bytes > slot->head.cbytes)
        slot->have_bytes = slot->head.cbytes; /* what follows belongs to nobody */
    uint64_t head_bytes = slot->head.header_bytes;
    if (slot->head.special)
        head_bytes = slot->head.cbytes;
    else if (!slot->head.stored)
        head_bytes += 4 * (uint64_t)slot->head.blocks;
    rc = b2_packed_fit(slot, slot->head.cbytes); /* the library may look at all of it, where streams are damaged */
    if (!rc)
        rc = b2_read_upto(self, slot, chunk, head_bytes);
    if (!rc)
        slot->chunk = chunk;
    return rc;
}

/* Where the streams of a block lie in the chunk. Compression by several threads leaves blocks in any order, so the end
 * is the next greater start. */
static int b2_block_span(const struct b2_slot *slot, uint64_t block, uint64_t *start, uint64_t *end)
{
    const struct b2_chunk *head = &slot->head;
    const uint8_t *bstarts = slot->packed + head->header_bytes;
    *start = b2_le32(bstarts + 4 * block);
    *end = head->cbytes;
    if (*start < head->header_bytes + 4 * (uint64_t)head->blocks || *start >= head->cbytes)
        return -EBADMSG;
    for (uint64_t i = 0; i < head->blocks; i++) {
        uint64_t other = b2_le32(bstarts + 4 * i);
        if (other > *start && other < *end)
            *end = other;
    }
    return 0;
}

/* Have the compressed bytes of blocks first..last in memory. */
static int b2_want(struct uffd_b2 *self, struct b2_slot *slot, uint64_t first, uint64_t last)
{
    const struct b2_chunk *head = &slot->head;
    uint64_t low = UINT64_MAX, high = 0;

    if (slot->have_bytes == head->cbytes)
        return 0;
    if (head->whole || slot->sequential || slot->seen || (last - first + 1) * 2 >= head->blocks || last - first >= 32)
        return b2_read_upto(self, slot, slot->chunk, head->cbytes);
    for (uint64_t block = first; block <= last; block++) {
        uint64_t start, end;
        int rc = b2_block_span(slot, block, &start, &end);
        if (rc)
            return rc;
        low = start < low ? start : low;
        high = end > high ? end : high;
    }
    if (high <= slot->have_bytes || (low >= slot->window_start && high <= slot->window_end))
        return 0;
    if ((high - low) * 2 >= head->cbytes)
        return b2_read_upto(self, slot, slot->chunk, head->cbytes);
    int rc = b2_pread(self->frame.fd, slot->packed + low, high - low, b2_file_offset(self, slot->chunk, low));
    slot->window_start = rc ? 0 : low;
    slot->window_end = rc ? 0 : high;
    return rc;
}

/* Bytes [within, within + nbytes) of a chunk that is one value over and over. An uninitialised chunk is zeros: its
 * bytes may be anything, and must not be what lay in this memory before. */
static int b2_special(uint32_t kind, const uint8_t *value, uint64_t value_bytes, uint64_t within, uint8_t *target,
                      uint64_t nbytes)
{
    static const uint8_t nan4[] = {0, 0, 0xc0, 0x7f}, nan8[] = {0, 0, 0, 0, 0, 0, 0xf8, 0x7f};
    if (kind == B2_SPECIAL_ZERO || kind == B2_SPECIAL_UNINIT) {
        memset(target, 0, nbytes);
        return 0;
    }
    if (kind == B2_SPECIAL_NAN) { /* value_bytes: of the item; the library knows no other NaN either */
        if (value_bytes != 4 && value_bytes != 8)
            return -ENOTSUP;
        value = value_bytes == 4 ? nan4 : nan8;
    }
    if (value_bytes == 0)
        return -EBADMSG;
    for (uint64_t done = 0, phase = within % value_bytes; done < nbytes; phase = 0) {
        uint64_t n = value_bytes - phase < nbytes - done ? value_bytes - phase : nbytes - done;
        memcpy(target + done, value + phase, n);
        done += n;
    }
    return 0;
}

/* The same for the chunk that the index calls special, or that the slot holds; 1: it is an ordinary chunk. */
static int b2_special_piece(struct uffd_b2 *self, struct b2_slot *slot, uint64_t chunk, uint64_t within,
                            uint8_t *target, uint64_t nbytes)
{
    const int64_t at = self->frame.places[chunk].at;
    if (at < 0) {
        uint32_t kind = (uint32_t)((uint64_t)at >> 56 & 0x7f);
        if (kind != B2_SPECIAL_ZERO && kind != B2_SPECIAL_NAN && kind != B2_SPECIAL_UNINIT)
            return -EBADMSG;
        return b2_special(kind, NULL, (uint64_t)self->frame.info.typesize, within, target, nbytes);
    }
    int rc = b2_enter(self, slot, chunk);
    if (rc)
        return rc;
    const struct b2_chunk *head = &slot->head;
    if (!head->special)
        return 1;
    if (head->special == B2_SPECIAL_VALUE)
        return b2_special(head->special, slot->packed + head->header_bytes, head->cbytes - head->header_bytes, within,
                          target, nbytes);
    return b2_special(head->special, NULL, head->typesize, within, target, nbytes);
}

/* Bytes of a chunk that did not compress: they lie in it as they are, so they come straight from the file. */
static int b2_stored(struct uffd_b2 *self, struct b2_slot *slot, uint64_t within, uint8_t *target, uint64_t nbytes)
{
    const uint64_t start = slot->head.header_bytes + within;
    if (start + nbytes > slot->have_bytes)
        return b2_pread(self->frame.fd, target, nbytes, b2_file_offset(self, slot->chunk, start));
    memcpy(target, slot->packed + start, nbytes);
    return 0;
}

/* Decode bytes [start, start + nbytes) of the slot's chunk into target: whole blocks, one or (the library then copies
 * once more) several; or all of the chunk, where blocks depend on each other. */
static int b2_decode(struct b2_slot *slot, uint64_t start, uint64_t nbytes, uint8_t *target)
{
    const struct b2_chunk *head = &slot->head;
    const int32_t cbytes = (int32_t)head->cbytes, room = (int32_t)nbytes;
    int n;
    if (head->whole || (nbytes == head->nbytes && !b2_library.may_thread))
        n = b2_library.decompress_ctx(slot->context, slot->packed, cbytes, target, room);
    else
        n = b2_library.getitem_ctx(slot->context, slot->packed, cbytes, (int)(start / head->typesize),
                                   (int)(nbytes / head->typesize), target, room);
    return n < 0 ? b2_errno(n) : n == room ? 0 : -EBADMSG;
}

/* Entries of at least nbytes for decoded blocks: one for a linear frame, which passes each block once. */
static int b2_cache_fit(const struct uffd_b2 *self, struct b2_slot *slot, uint64_t nbytes)
{
    if (nbytes <= slot->entry_bytes)
        return 0;
    uint64_t entries = self->frame.info.linear ? 1 : B2_CACHE_BYTES / nbytes;
    entries = entries < 1 ? 1 : entries > B2_CACHE_ENTRIES ? B2_CACHE_ENTRIES : entries;
    free(slot->plain);
    free(slot->entry);
    slot->entry_bytes = 0;
    slot->entries = 0;
    slot->plain = malloc(entries * nbytes); /* the part of it that is never used costs no memory */
    slot->entry = calloc(entries, sizeof *slot->entry);
    if (!slot->plain || !slot->entry)
        return -ENOMEM; /* both are freed by the next attempt, or by close */
    slot->entry_bytes = nbytes;
    slot->entries = (uint32_t)entries;
    for (uint32_t i = 0; i < slot->entries; i++)
        slot->entry[i].chunk = UINT64_MAX;
    return 0;
}

static const uint8_t *b2_cached(struct b2_slot *slot, uint64_t chunk, uint64_t block)
{
    for (uint32_t i = 0; i < slot->entries; i++) {
        if (slot->entry[i].chunk == chunk && slot->entry[i].block == block) {
            slot->entry[i].used = ++slot->clock;
            return slot->plain + i * slot->entry_bytes;
        }
    }
    return NULL;
}

/* The entry used longest ago, emptied. */
static uint32_t b2_evict(struct b2_slot *slot)
{
    uint32_t victim = 0;
    for (uint32_t i = 1; i < slot->entries; i++)
        if (slot->entry[i].used < slot->entry[victim].used)
            victim = i;
    slot->entry[victim].chunk = UINT64_MAX;
    return victim;
}

/* A block of nbytes, decoded, in the slot's cache; `*plain` is valid until the next call. */
static int b2_block(struct uffd_b2 *self, struct b2_slot *slot, uint64_t chunk, uint64_t block, uint64_t nbytes,
                    const uint8_t **plain)
{
    const struct b2_chunk *head = &slot->head;
    uint64_t key = block;
    int rc;

    *plain = b2_cached(slot, chunk, block);
    if (*plain)
        return 0;
    rc = self->frame.places[chunk].at < 0 ? 0 : b2_enter(self, slot, chunk);
    if (rc)
        return rc;
    const bool special = self->frame.places[chunk].at < 0 || head->special;
    const bool whole = !special && !head->stored && head->whole;
    if (whole) { /* one entry holds all of the chunk, under the number of no block */
        key = UINT64_MAX;
        *plain = b2_cached(slot, chunk, key);
    }
    if (!*plain) {
        rc = b2_cache_fit(self, slot, whole ? head->nbytes : nbytes);
        if (rc)
            return rc;
        const uint32_t entry = b2_evict(slot);
        uint8_t *target = slot->plain + entry * slot->entry_bytes;
        if (special) /* a block starts at an item: in phase with the value */
            rc = b2_special_piece(self, slot, chunk, 0, target, nbytes);
        else if (head->stored)
            rc = b2_stored(self, slot, block * head->blocksize, target, nbytes);
        else if (!(rc = b2_want(self, slot, block, block)))
            rc = b2_decode(slot, whole ? 0 : block * head->blocksize, whole ? head->nbytes : nbytes, target);
        if (rc)
            return rc;
        slot->entry[entry].chunk = chunk;
        slot->entry[entry].block = key;
        slot->entry[entry].used = ++slot->clock;
        *plain = target;
    }
    *plain += whole ? block * head->blocksize : 0;
    return 0;
}

/* ---- linear frames ----------------------------------------------------------------------------------------------- */

/* Bytes [within, within + nbytes) of one chunk: whole blocks are decoded in place, the ends by way of the cache. */
static int b2_piece(struct uffd_b2 *self, struct b2_slot *slot, uint64_t chunk, uint64_t within, uint8_t *target,
                    uint64_t nbytes)
{
    const struct b2_chunk *head = &slot->head;
    int rc = b2_special_piece(self, slot, chunk, within, target, nbytes);
    if (rc <= 0)
        return rc;
    if (head->stored)
        return b2_stored(self, slot, within, target, nbytes);
    const uint64_t stop = within + nbytes, size = head->blocksize;
    rc = b2_want(self, slot, within / size, (stop - 1) / size);
    while (!rc && within < stop) {
        const uint64_t block = within / size, skip = within % size, rest = stop - within;
        const uint64_t full = b2_block_nbytes(head, block);
        uint64_t n = full - skip < rest ? full - skip : rest;
        const uint8_t *plain;
        if (rest == head->nbytes || (n == full && !head->whole)) {
            if (rest == head->nbytes)
                n = rest;
            else if (size < B2_SMALL_BLOCK_BYTES)
                n = stop == head->nbytes ? rest : rest - rest % size; /* one call for all of them */
            rc = b2_decode(slot, within, n, target);
        } else if (!(rc = b2_block(self, slot, chunk, block, full, &plain))) {
            memcpy(target, plain + skip, n);
        }
        within += n;
        target += n;
    }
    return rc;
}

static int b2_fill_linear(struct uffd_b2 *self, struct b2_slot *slot, uint64_t offset, uint8_t *target, uint64_t nbytes)
{
    const uint64_t size = self->frame.info.chunk_bytes;
    slot->sequential = slot->next_offset == offset;
    while (nbytes) {
        const uint64_t within = offset % size, n = size - within < nbytes ? size - within : nbytes;
        int rc = b2_piece(self, slot, offset / size, within, target, n);
        if (rc)
            return rc;
        offset += n;
        target += n;
        nbytes -= n;
    }
    slot->next_offset = offset;
    slot->seen = true;
    return 0;
}

/* ---- grid frames ------------------------------------------------------------------------------------------------- */

/* The part of a box that lies in one chunk, whose first item is at origin. */
static int b2_fill_in_chunk(struct uffd_b2 *self, struct b2_slot *slot, uint64_t chunk, const uint64_t *origin,
                            const struct b2_box *box, uint8_t *target, uint64_t offset)
{
    const struct b2_grid *grid = &self->frame.grid;
    struct b2_box blocks, part;
    uint64_t index[UFFD_B2_MAX_DIM], corner[UFFD_B2_MAX_DIM];
    b2_tiles(grid, box, grid->block, origin, &blocks);
    memcpy(index, blocks.low, sizeof index);
    do {
        const uint8_t *plain;
        const uint64_t block = b2_number(grid, index, grid->block_stride);
        int rc = b2_block(self, slot, chunk, block, self->frame.info.block_bytes, &plain);
        if (rc)
            return rc;
        b2_clip(grid, box, grid->block, origin, index, &part, corner);
        b2_copy_rows(grid, &part, corner, plain, target, offset);
    } while (b2_next(grid->dims, index, blocks.low, blocks.high));
    return 0;
}

static int b2_fill_grid(struct uffd_b2 *self, struct b2_slot *slot, uint64_t offset, uint8_t *target, uint64_t nbytes)
{
    static const uint64_t zero[UFFD_B2_MAX_DIM];
    const struct b2_grid *grid = &self->frame.grid;
    const uint64_t end = offset + nbytes;
    while (offset < end) {
        struct b2_box box = { { 0 }, { 0 } }, chunks, part;
        uint64_t index[UFFD_B2_MAX_DIM], origin[UFFD_B2_MAX_DIM];
        const uint64_t n = b2_cut(grid, offset, end, &box);
        b2_tiles(grid, &box, grid->chunk, zero, &chunks);
        memcpy(index, chunks.low, sizeof index);
        do {
            b2_clip(grid, &box, grid->chunk, zero, index, &part, origin);
            int rc = b2_fill_in_chunk(self, slot, b2_number(grid, index, grid->chunk_stride), origin, &part, target,
                                      offset);
            if (rc)
                return rc;
        } while (b2_next(grid->dims, index, chunks.low, chunks.high));
        offset += n;
        target += n;
    }
    return 0;
}

/* ---- what the engine calls --------------------------------------------------------------------------------------- */

static void *b2_context(void *schunk)
{
    return b2_library.create_dctx((struct b2_dparams){.nthreads = 1, .schunk = schunk, .typesize = 8});
}

/* The index: a chunk of int64, decoded with a context of its own. */
static int b2_read_index(struct b2_frame *frame)
{
    const uint64_t nbytes = frame->info.chunks * sizeof(int64_t);
    const uint64_t at = frame->chunks_start + frame->chunks_bytes;
    uint8_t header[B2_CHUNK_HEADER_BYTES];
    struct b2_chunk head;

    const uint64_t have = frame->index_span < sizeof header ? frame->index_span : sizeof header;
    int rc = b2_pread(frame->fd, header, have, at);
    if (!rc)
        rc = b2_parse_chunk(header, have, frame->index_span, false, &head);
    if (rc)
        return rc;
    if (head.nbytes != nbytes)
        return -EBADMSG;
    uint8_t *packed = malloc(head.cbytes);
    int64_t *offsets = malloc(nbytes);
    void *context = b2_context(NULL);
    rc = packed && offsets && context ? b2_pread(frame->fd, packed, head.cbytes, at) : -ENOMEM;
    if (!rc) {
        int n = b2_library.decompress_ctx(context, packed, (int32_t)head.cbytes, offsets, (int32_t)nbytes);
        rc = n < 0 ? b2_errno(n) : (uint64_t)n == nbytes ? b2_frame_places(frame, offsets) : -EBADMSG;
    }
    if (context)
        b2_library.free_ctx(context);
    free(offsets);
    free(packed);
    return rc;
}

/* NULL is fine. No fill may be running. */
static inline void uffd_b2_close(struct uffd_b2 *self)
{
    if (!self)
        return;
    for (uint32_t i = 0; self->slot && i < self->slots; i++) {
        struct b2_slot *slot = &self->slot[i];
        if (slot->context)
            b2_library.free_ctx(slot->context);
        if (slot->schunk)
            b2_library.schunk_free(slot->schunk);
        free(slot->packed);
        free(slot->plain);
        free(slot->entry);
    }
    free(self->slot);
    b2_frame_close(&self->frame);
    free(self);
}

/* The slots, empty. Plugins get a handle on the frame each; the library opens it by our own descriptor, so that it
 * reads the same file, and here, since its registries are not for concurrent use. */
static int b2_make_slots(struct uffd_b2 *self, uint32_t slots)
{
    char path[64];
    self->slots = slots;
    self->slot = aligned_alloc(_Alignof(struct b2_slot), slots * sizeof *self->slot);
    if (!self->slot)
        return -ENOMEM;
    memset(self->slot, 0, slots * sizeof *self->slot);
    snprintf(path, sizeof path, "/proc/self/fd/%d", self->frame.fd);
    for (uint32_t i = 0; i < slots; i++) {
        self->slot[i].chunk = UINT64_MAX;
        if (!self->frame.plugins)
            continue;
        self->slot[i].schunk = b2_library.schunk_open_offset(path, (int64_t)self->frame.start);
        if (!self->slot[i].schunk)
            return -EBADMSG;
    }
    return 0;
}

/* Open the contiguous frame at byte `offset` of a file, for `slots` threads. 0, with *out and *info set, or -errno:
 * open(2)'s; -EIO: the file ends too early; -EBADMSG: not a frame, or damaged; -ENOTSUP: a sparse frame (a directory),
 * a newer format, chunks or blocks of variable length, codecs or filters that the library does not carry, an array
 * that is computed or fetched when read; -ENOMEM; -ENOSYS: uffd_b2_load has not succeeded. */
static inline int uffd_b2_open(struct uffd_b2 **out, const char *path, uint64_t offset, uint32_t slots,
                               struct uffd_b2_info *info)
{
    *out = NULL;
    if (!b2_library.handle)
        return -ENOSYS;
    if (slots == 0)
        return -EINVAL;
    struct uffd_b2 *self = calloc(1, sizeof *self);
    if (!self)
        return -ENOMEM;
    int rc = b2_frame_open(&self->frame, path, offset);
    if (!rc && self->frame.info.chunks)
        rc = b2_read_index(&self->frame);
    if (!rc)
        rc = b2_make_slots(self, slots);
    if (rc) {
        uffd_b2_close(self);
        return rc;
    }
    *info = self->frame.info;
    *out = self;
    return 0;
}

/* Array bytes [offset, offset + nbytes) into block: 0, or -errno and the block's contents are worthless. Any thread, no
 * GIL; `slot` is the calling thread's alone while this runs. Blocks in read(2). */
static inline int uffd_b2_fill(void *frame, uint32_t slot, uint64_t offset, void *block, size_t nbytes)
{
    struct uffd_b2 *self = frame;
    const struct uffd_b2_info *info = &self->frame.info;
    if (slot >= self->slots || offset > info->nbytes || nbytes > info->nbytes - offset)
        return -EINVAL;
    struct b2_slot *mine = &self->slot[slot];
    if (!mine->context)
        mine->context = b2_context(mine->schunk);
    if (!mine->context)
        return -ENOMEM;
    if (info->linear)
        return b2_fill_linear(self, mine, offset, block, nbytes);
    return b2_fill_grid(self, mine, offset, block, nbytes);
}

/* The descriptor of the open file. */
static inline int uffd_b2_fd(const struct uffd_b2 *self)
{
    return self->frame.fd;
}

/* In a forked child, for a slot whose thread was inside a fill: what it held may be caught in mid-change. It is left
 * where it is (not freed), and the slot begins anew. */
static inline void uffd_b2_forget(void *frame, uint32_t slot)
{
    struct uffd_b2 *self = frame;
    if (slot >= self->slots)
        return;
    void *schunk = self->slot[slot].schunk;
    memset(&self->slot[slot], 0, sizeof self->slot[slot]);
    self->slot[slot].schunk = schunk;
    self->slot[slot].chunk = UINT64_MAX;
}

#endif
