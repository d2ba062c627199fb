/* What a Blosc2 frame says about itself: its header, its chunks' places, the layout of its array, a chunk's header.
 *
 * Reads the published format (README_CFRAME_FORMAT, README_CHUNK_FORMAT and README_B2ND_METALAYER of C-Blosc2) and
 * nothing else: no library, no threads, no state but the structures here. Every length is checked before use.
 *
 *     frame:  header | chunk 0 | chunk 1 | ... | index chunk (one int64 per chunk) | trailer
 *     chunk:  header (16 or 32 bytes) | bstarts (int32 per block) | the blocks' streams, in any order
 *
 * Uses: libc. Provides: struct uffd_b2_info, struct b2_frame, b2_frame_open, b2_frame_places, b2_frame_close;
 * struct b2_chunk, b2_parse_chunk, b2_pread; struct b2_box, b2_cut, b2_tiles, b2_clip, b2_number, b2_next,
 * b2_copy_rows.
 */
#ifndef UFFD_BLOSC2_FRAME_H
#define UFFD_BLOSC2_FRAME_H

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "chunk headers are read as little endian");

#define UFFD_B2_MAX_DIM 16

struct uffd_b2_info {
    uint64_t nbytes;      /* of the array, in C order */
    uint64_t chunks;
    uint64_t chunk_bytes; /* array bytes per chunk: a fill of whole chunks decodes straight into its target */
    uint64_t block_bytes; /* the frame's blosc block, 0 if the chunks choose their own: the least that is decoded */
    int32_t typesize;
    int32_t ndim;         /* 0: a plain super-chunk, or a scalar */
    int64_t shape[UFFD_B2_MAX_DIM];
    bool linear;
};

enum {
    B2_FRAME_HEADER_BYTES = 87,           /* without metalayers */
    B2_FRAME_HEADER_MAX_BYTES = 64 << 20,
    B2_FRAME_VERSION_MAX = 3,
    B2_CHUNK_HEADER_BYTES = 32,
    B2_CHUNK_HEADER_OLD_BYTES = 16,       /* Blosc 1 chunks have no filter pipeline in theirs */
    B2_SPECIAL_ZERO = 1, B2_SPECIAL_NAN = 2, B2_SPECIAL_VALUE = 3, B2_SPECIAL_UNINIT = 4,
    B2_FILTER_DELTA = 3, B2_FILTER_LAST = 4, B2_FILTER_PLUGIN_FIRST = 32, B2_FILTER_PLUGIN_LAST = 36,
    B2_CODEC_PLUGIN_FIRST = 32, B2_CODEC_PLUGIN_LAST = 35, /* ndlz, zfp; those above run python or load libraries */
};

struct b2_place {
    int64_t at;    /* from the first chunk's first byte; negative: not in the file, a special value in the top byte */
    uint64_t span; /* bytes up to the next chunk: no chunk may claim more */
};

/* The layout of a b2nd array, array > chunks > blocks. The last dimension counts bytes, so that a range need not end
 * at an item; trailing dimensions that are not cut are folded into it. */
struct b2_grid {
    uint32_t dims;
    uint64_t shape[UFFD_B2_MAX_DIM], chunk[UFFD_B2_MAX_DIM], block[UFFD_B2_MAX_DIM];
    uint64_t stride[UFFD_B2_MAX_DIM];       /* of the array, in bytes */
    uint64_t chunk_stride[UFFD_B2_MAX_DIM]; /* in chunks, over the array's grid of chunks */
    uint64_t block_stride[UFFD_B2_MAX_DIM]; /* in blocks, over a chunk's grid of blocks */
    uint64_t row_stride[UFFD_B2_MAX_DIM];   /* within a block, in bytes */
};

struct b2_frame {
    int fd;
    uint64_t start;        /* of the frame in the file */
    uint64_t chunks_start; /* of the first chunk in the file */
    uint64_t chunks_bytes; /* of all chunks, compressed; the index follows them */
    uint64_t index_span;   /* bytes from the index to the frame's end */
    uint64_t plain_bytes;  /* of all chunks, with their padding */
    uint64_t stored_bytes; /* of one chunk, with its padding */
    bool plugins;          /* its pipeline has codecs or filters of the plugins that ship with the library */
    struct uffd_b2_info info;
    struct b2_grid grid;   /* if not info.linear */
    struct b2_place *places;
};

/* A chunk's header. */
struct b2_chunk {
    uint32_t nbytes, cbytes, blocksize, typesize, blocks, header_bytes;
    uint32_t special; /* B2_SPECIAL_*, 0: none */
    bool stored;      /* its blocks lie there as they are, without bstarts */
    bool whole;       /* can be decoded only all at once */
};

static inline uint32_t b2_le32(const uint8_t *p)
{
    uint32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

static inline uint64_t b2_be(const uint8_t *p, int nbytes)
{
    uint64_t value = 0;
    for (int i = 0; i < nbytes; i++)
        value = value << 8 | p[i];
    return value;
}

/* All of it or -errno; a file that ends early is -EIO. */
static inline int b2_pread(int fd, void *target, uint64_t nbytes, uint64_t offset)
{
    uint8_t *p = target;
    while (nbytes) {
        ssize_t n = pread(fd, p, nbytes < 1u << 30 ? nbytes : 1u << 30, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return -EIO;
        p += n;
        offset += (uint64_t)n;
        nbytes -= (uint64_t)n;
    }
    return 0;
}

/* ---- a chunk's header -------------------------------------------------------------------------------------------- */

/* Which filters and codecs the chunk went through: all known, and `whole` set where blocks depend on each other. */
static int b2_check_pipeline(const uint8_t *p, bool plugins, struct b2_chunk *head)
{
    for (int i = 0; i < 6; i++) {
        uint8_t filter = p[16 + i];
        if (filter == B2_FILTER_DELTA)
            head->whole = true; /* against the chunk's first block */
        else if (filter > B2_FILTER_LAST
                 && (!plugins || filter < B2_FILTER_PLUGIN_FIRST || filter > B2_FILTER_PLUGIN_LAST))
            return -ENOTSUP;
    }
    if (p[2] >> 5 == 7) /* the codec is named elsewhere */
        return -ENOTSUP;
    if (p[2] >> 5 == 6 && (!plugins || p[22] < B2_CODEC_PLUGIN_FIRST || p[22] > B2_CODEC_PLUGIN_LAST))
        return -ENOTSUP;
    return 0;
}

/* The header at p, of which `have` bytes are there, of a chunk that has at most `span` bytes. */
static int b2_parse_chunk(const uint8_t *p, uint64_t have, uint64_t span, bool plugins, struct b2_chunk *head)
{
    *head = (struct b2_chunk){0};
    if (have < B2_CHUNK_HEADER_OLD_BYTES)
        return -EBADMSG;
    head->typesize = p[3];
    head->nbytes = b2_le32(p + 4);
    head->blocksize = b2_le32(p + 8);
    head->cbytes = b2_le32(p + 12);
    head->stored = p[2] & 2;
    head->header_bytes = B2_CHUNK_HEADER_OLD_BYTES;
    if ((p[2] & 5) == 5) { /* both shuffles at once: the sign of the long header */
        if (have < B2_CHUNK_HEADER_BYTES)
            return -EBADMSG;
        head->header_bytes = B2_CHUNK_HEADER_BYTES;
        if (p[30] & 1 || p[31] & 0x80) /* blocks of variable length; instrumented codec */
            return -ENOTSUP;
        if (p[31] & 8) /* lazy: a form for memory, which would send the library to a file of its own */
            return -EBADMSG;
        head->special = p[31] >> 4 & 7;
        if (head->special > B2_SPECIAL_UNINIT)
            return -EBADMSG;
        head->whole = p[31] & 1; /* a dictionary lies between head and blocks */
        int rc = head->special ? 0 : b2_check_pipeline(p, plugins, head);
        if (rc)
            return rc;
    } else {
        head->whole = p[2] & 8; /* delta */
    }
    if (head->nbytes > INT32_MAX || head->cbytes > INT32_MAX || head->cbytes < head->header_bytes
        || head->cbytes > span || head->typesize == 0)
        return -EBADMSG;
    if (head->special)
        return 0;
    if (head->nbytes == 0 || head->blocksize == 0 || head->blocksize > head->nbytes)
        return -EBADMSG;
    head->blocks = (head->nbytes - 1) / head->blocksize + 1;
    if (head->stored ? head->cbytes - head->header_bytes < head->nbytes
                     : (head->cbytes - head->header_bytes) / 4 < head->blocks)
        return -EBADMSG;
    if (head->blocksize % head->typesize || head->nbytes % head->typesize)
        head->whole = true; /* a block can be named only in items */
    return 0;
}

static inline uint32_t b2_block_nbytes(const struct b2_chunk *head, uint64_t block)
{
    return block + 1 == head->blocks ? head->nbytes - (head->blocks - 1) * head->blocksize : head->blocksize;
}

static inline uint64_t b2_chunk_nbytes(const struct b2_frame *frame, uint64_t chunk)
{
    uint64_t rest = frame->plain_bytes - chunk * frame->stored_bytes;
    return rest < frame->stored_bytes ? rest : frame->stored_bytes;
}

/* ---- the array's layout ------------------------------------------------------------------------------------------ */

/* The content of a metalayer: *content in header, its length; 0 if there is none of that name, or -EBADMSG. */
static int64_t b2_metalayer(const uint8_t *header, uint64_t header_bytes, const char *name, const uint8_t **content)
{
    uint64_t at = B2_FRAME_HEADER_BYTES;
    if (header_bytes < at + 7 || header[at] != 0x93)
        return 0;
    uint64_t count = b2_be(header + at + 5, 2);
    at += 7;
    for (; count; count--) {
        const uint64_t name_bytes = at < header_bytes ? header[at] & 0x1f : 0;
        if (at + 1 + name_bytes + 5 > header_bytes || header[at] >> 5 != 5 || header[at + 1 + name_bytes] != 0xd2)
            return -EBADMSG;
        if (name_bytes == strlen(name) && !memcmp(header + at + 1, name, name_bytes)) {
            uint64_t where = b2_be(header + at + 1 + name_bytes + 1, 4);
            if (where + 5 > header_bytes || header[where] != 0xc6)
                return -EBADMSG;
            uint64_t nbytes = b2_be(header + where + 1, 4);
            if (nbytes == 0 || nbytes > header_bytes - where - 5)
                return -EBADMSG;
            *content = header + where + 5;
            return (int64_t)nbytes;
        }
        at += 1 + name_bytes + 5;
    }
    return 0;
}

/* `dims` msgpack integers of `width` bytes from *p on. */
static int b2_read_dims(const uint8_t **p, const uint8_t *end, uint32_t dims, int width, uint64_t *out)
{
    if (end - *p < 1 || **p >> 4 != 9)
        return -EBADMSG;
    *p += 1;
    for (uint32_t d = 0; d < dims; d++) {
        if (end - *p < 1 + width || **p != (width == 8 ? 0xd3 : 0xd2))
            return -EBADMSG;
        out[d] = b2_be(*p + 1, width);
        if (out[d] > (width == 8 ? (uint64_t)INT64_MAX : (uint64_t)INT32_MAX))
            return -EBADMSG;
        *p += 1 + width;
    }
    return 0;
}

/* Whether cutting shape into tiles, numbered in C order, keeps C order: tiles of one row's part, or of whole rows; and
 * no padding but behind the last byte. */
static bool b2_in_order(uint32_t dims, const uint64_t *shape, const uint64_t *tile)
{
    uint32_t d = 0;
    bool leading = true; /* all dimensions before d have one item */
    for (; d < dims && tile[d] == 1; d++)
        leading = leading && shape[d] == 1;
    if (d < dims && !leading && shape[d] % tile[d])
        return false;
    for (uint32_t i = d + 1; i < dims; i++)
        if (tile[i] != shape[i])
            return false;
    return true;
}

static bool b2_times(uint64_t *product, uint64_t factor)
{
    return !__builtin_mul_overflow(*product, factor, product) && *product <= INT64_MAX;
}

/* The strides of a grid whose shape, chunk and block are set, after folding. */
static void b2_grid_strides(struct b2_grid *grid)
{
    for (uint32_t d = grid->dims - 1; d > 0; d--) {
        if (grid->shape[d] != grid->chunk[d] || grid->shape[d] != grid->block[d])
            break;
        grid->shape[d - 1] *= grid->shape[d];
        grid->chunk[d - 1] *= grid->chunk[d];
        grid->block[d - 1] *= grid->block[d];
        grid->dims = d;
    }
    uint64_t stride = 1, chunk_stride = 1, block_stride = 1, row_stride = 1;
    for (uint32_t d = grid->dims; d-- > 0;) {
        grid->stride[d] = stride;
        grid->chunk_stride[d] = chunk_stride;
        grid->block_stride[d] = block_stride;
        grid->row_stride[d] = row_stride;
        stride *= grid->shape[d];
        chunk_stride *= (grid->shape[d] - 1) / grid->chunk[d] + 1;
        block_stride *= (grid->chunk[d] - 1) / grid->block[d] + 1;
        row_stride *= grid->block[d];
    }
}

/* The b2nd metalayer at p: the array's shape into frame->info, its layout into frame->grid. */
static int b2_parse_b2nd(struct b2_frame *frame, const uint8_t *p, int64_t nbytes)
{
    struct b2_grid *grid = &frame->grid;
    struct uffd_b2_info *info = &frame->info;
    const uint8_t *end = p + nbytes;
    const uint64_t item = (uint64_t)info->typesize;
    uint64_t total = item, chunks = 1, useful = item, stored = item, block = item;

    if (nbytes < 3 || p[0] >> 4 != 9 || p[2] > UFFD_B2_MAX_DIM)
        return -EBADMSG;
    grid->dims = p[2];
    p += 3;
    if (b2_read_dims(&p, end, grid->dims, 8, grid->shape) || b2_read_dims(&p, end, grid->dims, 4, grid->chunk)
        || b2_read_dims(&p, end, grid->dims, 4, grid->block))
        return -EBADMSG;
    info->ndim = (int32_t)grid->dims;
    bool empty = false;
    for (uint32_t d = 0; d < grid->dims; d++) {
        info->shape[d] = (int64_t)grid->shape[d];
        empty = empty || grid->shape[d] == 0;
    }
    if (empty) {
        info->nbytes = frame->plain_bytes = 0;
        return 0;
    }
    for (uint32_t d = 0; d < grid->dims; d++) {
        if (grid->chunk[d] == 0 || grid->block[d] == 0)
            return -EBADMSG;
        if (!b2_times(&total, grid->shape[d]) || !b2_times(&chunks, (grid->shape[d] - 1) / grid->chunk[d] + 1)
            || !b2_times(&useful, grid->chunk[d]) || !b2_times(&block, grid->block[d])
            || !b2_times(&stored, ((grid->chunk[d] - 1) / grid->block[d] + 1) * grid->block[d]))
            return -EBADMSG;
    }
    if (stored != frame->stored_bytes || !b2_times(&stored, chunks) || stored != frame->plain_bytes)
        return -EBADMSG;
    info->nbytes = total;
    info->chunk_bytes = useful;
    info->block_bytes = block;
    info->linear = b2_in_order(grid->dims, grid->shape, grid->chunk)
        && b2_in_order(grid->dims, grid->chunk, grid->block);
    if (!info->linear) { /* has a dimension at least */
        grid->shape[grid->dims - 1] *= item;
        grid->chunk[grid->dims - 1] *= item;
        grid->block[grid->dims - 1] *= item;
        b2_grid_strides(grid);
    }
    return 0;
}

/* ---- ranges of the array -------------------------------------------------------------------------------------- */

struct b2_box {
    uint64_t low[UFFD_B2_MAX_DIM], high[UFFD_B2_MAX_DIM]; /* [low, high) in each dimension */
};

/* Count `index` on through [low, high), the last dimension first; false when it has come around. */
static bool b2_next(uint32_t dims, uint64_t *index, const uint64_t *low, const uint64_t *high)
{
    for (uint32_t d = dims; d-- > 0;) {
        if (++index[d] < high[d])
            return true;
        index[d] = low[d];
    }
    return false;
}

/* The largest box that starts at byte `offset` and is a run of array bytes that ends by `end`; its size in bytes. At
 * most 2 * dims - 1 of them make up a range. */
static uint64_t b2_cut(const struct b2_grid *grid, uint64_t offset, uint64_t end, struct b2_box *box)
{
    uint32_t d = 0;
    uint64_t rest = offset;
    while (offset % grid->stride[d] || end - offset < grid->stride[d])
        d++; /* ends: the last stride is 1 */
    for (uint32_t i = 0; i < grid->dims; i++) {
        box->low[i] = i > d ? 0 : rest / grid->stride[i];
        box->high[i] = i > d ? grid->shape[i] : box->low[i] + 1;
        rest %= grid->stride[i];
    }
    uint64_t count = (end - offset) / grid->stride[d], room = grid->shape[d] - box->low[d];
    count = count < room ? count : room;
    box->high[d] = box->low[d] + count;
    return count * grid->stride[d];
}

/* Copy the rows of box, in coordinates of the array, out of the block whose first item is at `corner`. */
static void b2_copy_rows(const struct b2_grid *grid, const struct b2_box *box, const uint64_t *corner,
                         const uint8_t *plain, uint8_t *target, uint64_t offset)
{
    const uint32_t last = grid->dims - 1;
    uint64_t index[UFFD_B2_MAX_DIM];
    memcpy(index, box->low, sizeof index);
    do {
        uint64_t from = 0, to = 0;
        for (uint32_t d = 0; d <= last; d++) {
            from += (index[d] - corner[d]) * grid->row_stride[d];
            to += index[d] * grid->stride[d];
        }
        memcpy(target + (to - offset), plain + from, box->high[last] - box->low[last]);
    } while (b2_next(last, index, box->low, box->high));
}

/* The part of box that lies in tile `index` of the tiles that begin at `origin`; corner: the tile's first item. */
static void b2_clip(const struct b2_grid *grid, const struct b2_box *box, const uint64_t *tile, const uint64_t *origin,
                    const uint64_t *index, struct b2_box *part, uint64_t *corner)
{
    for (uint32_t d = 0; d < grid->dims; d++) {
        corner[d] = origin[d] + index[d] * tile[d];
        part->low[d] = box->low[d] > corner[d] ? box->low[d] : corner[d];
        part->high[d] = box->high[d] < corner[d] + tile[d] ? box->high[d] : corner[d] + tile[d];
    }
}

/* The tiles that box touches. */
static void b2_tiles(const struct b2_grid *grid, const struct b2_box *box, const uint64_t *tile, const uint64_t *origin,
                     struct b2_box *tiles)
{
    for (uint32_t d = 0; d < grid->dims; d++) {
        tiles->low[d] = (box->low[d] - origin[d]) / tile[d];
        tiles->high[d] = (box->high[d] - 1 - origin[d]) / tile[d] + 1;
    }
}

static uint64_t b2_number(const struct b2_grid *grid, const uint64_t *index, const uint64_t *stride)
{
    uint64_t number = 0;
    for (uint32_t d = 0; d < grid->dims; d++)
        number += index[d] * stride[d];
    return number;
}

/* ---- the frame's header ------------------------------------------------------------------------------------------ */

/* The metalayers: the array's layout, if it has one. Arrays whose chunks are computed, or fetched from elsewhere, when
 * python-blosc2 reads them are refused: here they would read as zeros. */
static int b2_parse_metalayers(struct b2_frame *frame, const uint8_t *header, uint64_t header_bytes)
{
    static const char *const foreign[] = {"LazyArray", "proxy-source", "b2o"};
    const uint8_t *content;
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) {
        int64_t n = b2_metalayer(header, header_bytes, foreign[i], &content);
        if (n)
            return n < 0 ? (int)n : -ENOTSUP;
    }
    int64_t n = b2_metalayer(header, header_bytes, "b2nd", &content);
    if (n == 0)
        n = b2_metalayer(header, header_bytes, "caterva", &content); /* its name until 2022 */
    if (n <= 0)
        return (int)n;
    return b2_parse_b2nd(frame, content, n);
}

/* The fixed part of the header; *header_bytes: of all of it. */
static int b2_parse_header(struct b2_frame *frame, const uint8_t *p, uint64_t room, uint64_t *header_bytes)
{
    struct uffd_b2_info *info = &frame->info;
    if (memcmp(p + 1, "\xa8" "b2frame", 9) || p[10] != 0xd2 || p[15] != 0xcf || p[24] != 0xa4)
        return -EBADMSG;
    if ((p[25] & 0xf) > B2_FRAME_VERSION_MAX || p[25] & 0x40 || p[26] & 0xf) /* newer; chunks of any size; sparse */
        return -ENOTSUP;
    *header_bytes = b2_be(p + 11, 4);
    const uint64_t frame_bytes = b2_be(p + 16, 8);
    const uint64_t block_bytes = b2_be(p + 53, 4), typesize = b2_be(p + 48, 4);
    frame->plain_bytes = b2_be(p + 30, 8);
    frame->chunks_bytes = b2_be(p + 39, 8);
    frame->stored_bytes = b2_be(p + 58, 4);
    if (*header_bytes < B2_FRAME_HEADER_BYTES || *header_bytes > B2_FRAME_HEADER_MAX_BYTES
        || *header_bytes > frame_bytes || frame->chunks_bytes > frame_bytes - *header_bytes
        || typesize == 0 || typesize > INT32_MAX || block_bytes > INT32_MAX || frame->plain_bytes > INT64_MAX
        || (frame->stored_bytes > INT32_MAX && frame->plain_bytes)) /* an empty frame's chunks have size -1 */
        return -EBADMSG;
    if (frame_bytes > room)
        return -EIO; /* the file ends before the frame does */
    if (frame->stored_bytes == 0 && frame->plain_bytes)
        return -ENOTSUP; /* chunks of any size, again */
    for (int i = 71; i < 78; i++) { /* six filters, the codec */
        const int last = i < 77 ? B2_FILTER_PLUGIN_LAST : B2_CODEC_PLUGIN_LAST;
        if (p[i] > last)
            return -ENOTSUP;
        frame->plugins = frame->plugins || p[i] >= B2_FILTER_PLUGIN_FIRST;
    }
    frame->chunks_start = frame->start + *header_bytes;
    frame->index_span = frame_bytes - *header_bytes - frame->chunks_bytes;
    info->typesize = (int32_t)typesize;
    info->nbytes = frame->plain_bytes;
    info->chunk_bytes = frame->stored_bytes;
    info->block_bytes = block_bytes;
    info->linear = true;
    return 0;
}

static void b2_frame_close(struct b2_frame *frame)
{
    free(frame->places);
    if (frame->fd >= 0)
        close(frame->fd);
    frame->places = NULL;
    frame->fd = -1;
}

/* Open the frame at byte `start` of a file and read its header; what is left to do is b2_frame_places. On failure
 * nothing stays open. -ENOTSUP also for a directory, which is what a sparse frame is. */
static int b2_frame_open(struct b2_frame *frame, const char *path, uint64_t start)
{
    uint8_t fixed[B2_FRAME_HEADER_BYTES];
    uint64_t header_bytes = 0;
    struct stat st;

    *frame = (struct b2_frame){.fd = open(path, O_RDONLY | O_CLOEXEC), .start = start};
    if (frame->fd < 0)
        return -errno;
    if (fstat(frame->fd, &st))
        st = (struct stat){0};
    const uint64_t file_bytes = st.st_size > 0 ? (uint64_t)st.st_size : 0;
    int rc = S_ISDIR(st.st_mode) ? -ENOTSUP : start > file_bytes ? -EIO : 0;
    if (!rc)
        rc = b2_pread(frame->fd, fixed, sizeof fixed, start);
    if (!rc)
        rc = b2_parse_header(frame, fixed, file_bytes - start, &header_bytes);
    uint8_t *header = rc ? NULL : malloc(header_bytes);
    if (!rc)
        rc = header ? b2_pread(frame->fd, header, header_bytes, start) : -ENOMEM;
    if (!rc)
        rc = b2_parse_metalayers(frame, header, header_bytes);
    free(header);
    if (!rc && frame->plain_bytes)
        frame->info.chunks = (frame->plain_bytes - 1) / frame->stored_bytes + 1;
    if (rc)
        b2_frame_close(frame);
    return rc;
}

static int b2_compare(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Where each chunk lies, from the decoded index of info.chunks offsets, which this sorts. Chunks that were replaced
 * lie behind the others, and leave holes: a chunk may reach to the next one in the file, whichever that is. */
static int b2_frame_places(struct b2_frame *frame, int64_t *offsets)
{
    const uint64_t chunks = frame->info.chunks;
    frame->places = malloc(chunks * sizeof *frame->places);
    if (!frame->places)
        return -ENOMEM;
    bool ascending = true;
    for (uint64_t i = 0; i < chunks; i++) {
        if (offsets[i] >= 0 && (uint64_t)offsets[i] >= frame->chunks_bytes)
            return -EBADMSG;
        ascending = ascending && (i == 0 || offsets[i] > offsets[i - 1]);
        frame->places[i] = (struct b2_place){.at = offsets[i]};
    }
    if (!ascending)
        qsort(offsets, chunks, sizeof *offsets, b2_compare);
    for (uint64_t i = 0; i < chunks; i++) {
        struct b2_place *place = &frame->places[i];
        uint64_t low = 0, high = chunks; /* the first offset greater than ours */
        while (place->at >= 0 && low < high) {
            uint64_t middle = low + (high - low) / 2;
            if (offsets[middle] > place->at)
                high = middle;
            else
                low = middle + 1;
        }
        if (place->at >= 0)
            place->span = (low < chunks ? (uint64_t)offsets[low] : frame->chunks_bytes) - (uint64_t)place->at;
    }
    return 0;
}

#endif
