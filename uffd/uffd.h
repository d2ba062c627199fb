/* The C interface of native providers (public; ships in the wheel, see uffd.get_include()).
 *
 * A fill function is called from several threads at once, without the interpreter lock, and never from a Python
 * thread state: it may call the C library and codecs, but nothing of Python. It fills the `nbytes` bytes at `block`
 * wholly with the region's bytes [offset, offset + nbytes) and answers 0, or -errno, and then the block's old content
 * does not matter. `offset` is a multiple of the region's block size; `nbytes` is one or more whole blocks, less at
 * the end of the region only. The function must not touch memory of a region that it serves.
 *
 * With Native(..., inline_safe=True) the function also runs in a SIGBUS handler on the faulting thread, inside
 * whatever locks that thread holds: system calls and memcpy are fine there, malloc, stdio and lock-taking codecs are
 * not.
 */
#ifndef UFFD_H
#define UFFD_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef int (*uffd_fill_fn)(void *user_data, uint64_t offset, void *block, size_t nbytes);

/* A write function takes the `nbytes` bytes at `block` as the region's bytes [offset, offset + nbytes), of whole blocks
 * as above. Its 0 acknowledges them: from then on the block may leave memory, and a fill must give these bytes. -errno:
 * it is called again with the same. Called from a thread of its own, for several ranges at once but never twice at once
 * for one block, beside fills of other blocks. */
typedef int (*uffd_write_fn)(void *user_data, uint64_t offset, const void *block, size_t nbytes);

#ifdef __cplusplus
}
#endif
#endif
