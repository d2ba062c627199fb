"""Pages that the kernel swapped out: none of them was dropped, and mincore does not know of them."""

import ctypes
import functools
import mmap

import numpy as np

MADV_PAGEOUT = 21
PAGE = mmap.PAGESIZE


def swapped(array):
    """Of each page of a page-aligned array: whether it lies in swap."""
    pages = (array.nbytes + PAGE - 1) // PAGE
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(array.ctypes.data // PAGE * 8)
        entries = np.frombuffer(file.read(pages * 8), np.uint64)
    return entries >> np.uint64(62) & np.uint64(1) != 0


def page_out(array):
    """Asks the kernel to swap the array out. How many of its pages are in swap now."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), MADV_PAGEOUT):
        return 0
    return int(swapped(array).sum())


@functools.lru_cache(maxsize=None)
def why_not():
    """Why nothing can be swapped out here, or None."""
    mapping = mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(mapping, np.uint8)
    array[:] = np.arange(array.size) % 251
    return None if page_out(array) == 16 else "no swap here, or none that madvise(MADV_PAGEOUT) uses (swapon)"
