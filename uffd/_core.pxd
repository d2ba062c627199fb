# For Cython programs that bring their own native provider: cimport uffd._core and hand the function over in a
# PyCapsule (see uffd.providers.Native). Ships in the wheel with uffd.h, which says what a fill function must keep to.
from libc.stdint cimport uint64_t

cdef extern from "uffd.h" nogil:
    ctypedef int (*uffd_fill_fn)(void *user_data, uint64_t offset, void *block, size_t nbytes) noexcept
    ctypedef int (*uffd_write_fn)(void *user_data, uint64_t offset, const void *block, size_t nbytes) noexcept
