/* The machine's zstd (libzstd.so.1), found when it is asked for: it packs migrations and compressed spill files.
 *
 * Threads: a context belongs to one thread at a time. An encoder takes memory at its first call and when blocks get
 * larger; a decoder takes all of its own when it is made, so that it may run in a signal handler.
 *
 * Provides: codec_load, _make, _free, _pack, _unpack; codec_skips, codec_learns.
 */
#ifndef UFFD_CODEC_H
#define UFFD_CODEC_H

#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>

enum { CODEC_DECODES, CODEC_ENCODES, CODEC_ENCODES_CHECKED };   /* CHECKED: with a checksum of what was packed */

static struct {
    void *(*encoder)(void);
    size_t (*free_encoder)(void *);
    size_t (*set)(void *, int, int);
    size_t (*encode)(void *, void *, size_t, const void *, size_t);
    void *(*decoder)(void);
    size_t (*free_decoder)(void *);
    size_t (*decode)(void *, void *, size_t, const void *, size_t);
    unsigned (*failed)(size_t);
} codec;

/* 0, or -ENOENT: it is not there, or lacks what is needed (before 1.4). Under the interpreter's lock; it stays loaded,
 * with all of its symbols found, so that no thread of ours ever resolves one. */
static inline int codec_load(void)
{
    void *library = codec.failed ? NULL : dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    if (codec.failed)
        return 0;
    if (!library)
        return -ENOENT;
    *(void **)&codec.encoder = dlsym(library, "ZSTD_createCCtx");
    *(void **)&codec.free_encoder = dlsym(library, "ZSTD_freeCCtx");
    *(void **)&codec.set = dlsym(library, "ZSTD_CCtx_setParameter");
    *(void **)&codec.encode = dlsym(library, "ZSTD_compress2");
    *(void **)&codec.decoder = dlsym(library, "ZSTD_createDCtx");
    *(void **)&codec.free_decoder = dlsym(library, "ZSTD_freeDCtx");
    *(void **)&codec.decode = dlsym(library, "ZSTD_decompressDCtx");
    if (codec.encoder && codec.free_encoder && codec.set && codec.encode && codec.decoder && codec.free_decoder &&
        codec.decode)
        *(void **)&codec.failed = dlsym(library, "ZSTD_isError");
    return codec.failed ? 0 : -ENOENT;
}

static inline void codec_free(void *context, int kind)
{
    if (context && kind != CODEC_DECODES)
        codec.free_encoder(context);
    else if (context)
        codec.free_decoder(context);
}

/* A context, or NULL: no memory. Encoders work at the fastest of the levels that count up. */
static inline void *codec_make(int kind)
{
    void *context = kind != CODEC_DECODES ? codec.encoder() : codec.decoder();
    if (context && kind != CODEC_DECODES &&
        (codec.failed(codec.set(context, 100 /* ZSTD_c_compressionLevel */, 1)) ||
         codec.failed(codec.set(context, 201 /* ZSTD_c_checksumFlag */, kind == CODEC_ENCODES_CHECKED)))) {
        codec_free(context, kind);
        return NULL;
    }
    return context;
}

/* Bytes at `to`; 0: they would not be fewer than `most`, or there is no context. */
static inline size_t codec_pack(void *context, void *to, size_t most, const void *from, size_t nbytes)
{
    const size_t n = context ? codec.encode(context, to, most, from, nbytes) : 0;
    return !context || codec.failed(n) ? 0 : n;
}

/* 0, or -EPROTO: it does not make exactly nbytes, or they are not those of their checksum. */
static inline int codec_unpack(void *context, void *to, size_t nbytes, const void *from, size_t packed)
{
    const size_t n = context ? codec.decode(context, to, nbytes, from, packed) : 0;
    return !context || codec.failed(n) || n != nbytes ? -EPROTO : 0;
}

/* What can't be packed costs time. Where some did not get smaller, the next are not tried, twice as many each time, up
 * to 16. Several threads may share a count: it is a guess, and a decrement that is lost does no harm. */
static inline int codec_skips(uint32_t *left)
{
    const uint32_t n = __atomic_load_n(left, __ATOMIC_RELAXED);
    if (n)
        __atomic_store_n(left, n - 1, __ATOMIC_RELAXED);
    return n != 0;
}

static inline void codec_learns(uint32_t *left, uint32_t *next, int smaller)
{
    const uint32_t was = __atomic_load_n(next, __ATOMIC_RELAXED), n = smaller || !was ? 1 : was < 16 ? was * 2 : 16;
    __atomic_store_n(next, n, __ATOMIC_RELAXED);
    if (!smaller)
        __atomic_store_n(left, n, __ATOMIC_RELAXED);
}

#endif
