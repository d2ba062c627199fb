"""Where a region's bytes come from.

Native providers (Zero, Memory, File, Blosc2File, Native) run in the engine's own threads, without the interpreter lock;
one instance may serve any number of regions. Fsspec, Redis, Zarr and whatever is derived from uffd.Provider run in the
provider host, another process; one instance serves one region.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib.util
import operator
import os
import stat
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from .._coreless import core as _core
from .._coreless import reason as _no_core
from ..errors import UffdError
from .redis import Redis
from .remote import Fsspec
from .zarrs import Zarr

__all__ = ["Blosc2File", "File", "Fsspec", "Memory", "Native", "Redis", "Scratch", "Zarr", "Zero"]


_fillers_lock = threading.Lock()
_FunctionPointer: Any = ctypes.CFUNCTYPE(None).__mro__[1]     # the base of all ctypes function pointers


class _NativeProvider:
    """Holds the core's side of a provider, made once."""

    nbytes: int | None = None
    title: str = ""
    _made: _core.Filler
    _taken = False
    _recipe: tuple[tuple[Any, ...], dict[str, Any]] | None = None     # arguments that make it again elsewhere

    def _filler(self, engine: Any) -> _core.Filler:
        """The core's side for one engine: slots, and what a provider keeps for each, are numbered per engine."""
        with _fillers_lock:
            fillers = self.__dict__.setdefault("_fillers", weakref.WeakKeyDictionary())
            if engine not in fillers:
                fillers[engine] = self._made.again() if self._taken else self._made
                self._taken = True
            return fillers[engine]

    def __reduce__(self) -> Any:
        if self._recipe is None:
            raise TypeError(f"{self.title} can't be pickled: it lives in the memory of this process")
        arguments, keywords = self._recipe
        return functools.partial(type(self), *arguments, **keywords), ()

    def __repr__(self) -> str:
        return f"uffd.providers.{self.title}"


class Zero(_NativeProvider):
    """Zeros of any size (`nbytes` is None: the region says how many)."""

    def __init__(self) -> None:
        self.title = "Zero()"
        self._recipe = ((), {})
        self._made = _core.Filler.zero()


class Scratch(_NativeProvider):
    """Zeros at first, and a place for what is written over them: an anonymous file in TMPDIR (else /var/tmp), as sparse
    as what was written, gone with the region. What `uffd.zeros` and a Region without a provider use.

    Only blocks that must leave memory go there. Nothing of it outlives the process.

    compress: "zstd" for the machine's libzstd (OSError without it), at its fastest level, with a checksum: a block that
    gets smaller by a page or more (never one of a single page) takes as many pages less of the file, and reading it
    costs the decoding. Data that does not get smaller is found out soon and stored as it is. `stats().bytes_written`
    beside `bytes_stored` says what it gains.
    """

    causes = {errno.EBADMSG: "the bytes in the file are not those that were written to it: the disk or its file system "
                             "is damaged"}

    def __init__(self, compress: str | None = None) -> None:
        if compress not in (None, "zstd"):
            raise ValueError(f"compress must be None or 'zstd', not {compress!r}")
        if compress and _no_core is None:
            _core.load_codec()
        self.title = f"Scratch(compress={compress!r})" if compress else "Scratch()"
        self._recipe = ((), {"compress": compress})
        self._made = _core.Filler.zero(bool(compress))


class Memory(_NativeProvider):
    """The bytes of a contiguous buffer or array (C or Fortran order: as they lie in memory), which stays exported.

    Pages are copied straight from it. It must not be memory of a region of the same engine (Region refuses it). Bytes
    that change before a block is filled are seen, later changes are not.
    """

    def __init__(self, buffer: Any) -> None:
        if isinstance(buffer, np.ndarray):
            if buffer.dtype.hasobject:
                raise TypeError(f"dtype {buffer.dtype} holds Python objects")
            if not (buffer.flags.c_contiguous or buffer.flags.f_contiguous):
                raise ValueError("the array is not contiguous")
            if buffer.size:
                flat = buffer.reshape(-1, order="C" if buffer.flags.c_contiguous else "F")
                buffer = flat.view(np.uint8)     # dtypes that the buffer protocol does not know (dates, bfloat16)
        self._made = _core.Filler.memory(buffer)
        self._buffer = buffer
        self.nbytes = self._made.nbytes
        self.title = f"Memory({self.nbytes} bytes)"


class File(_NativeProvider):
    """The bytes of a local file from `offset` on, read by pread in the worker.

    nbytes is what the file held when it was opened. A file that has become shorter since, or a short read, is an error
    (ENODATA), never zeros. direct: past the page cache (O_DIRECT), for files far larger than memory; what is
    written and is not of whole pages passes through it. writable: a region
    over it writes back what was written (mode "r+"), by pwrite; `flush` is fdatasync. A crash in between may leave a
    block half written, unless it has checksums. The file keeps its size. It is opened here (OSError).

    checksums: whatever ends the program, or the machine, leaves each block old or new, and bytes that are not those
    that were written are an error (EBADMSG), never data. A block that was written back survives the death of the
    process, one that was flushed the loss of power. `File.checksum(path)` makes the checksums once, in `path`.uffd;
    that file also has the journal in which a block lies until the next flush (at most 80 MiB, each block is written
    twice), so the two belong together. The file alone has all of it after a flush or a clean end, for any program to
    read; one that writes to it makes it unreadable here, until its checksums are made again. One process that
    writes, or any number that read, at a time (EBUSY): from here on until this and its regions are gone. Not with
    `direct`.
    """

    causes = {errno.EBADMSG: "the bytes are not those of their checksum: the file was damaged, or written to by "
                             "another program; uffd.providers.File.checksum(path) accepts it as it is now"}

    def __init__(self, path: str | os.PathLike[str], offset: int = 0, *, writable: bool = False, direct: bool = False,
                 checksums: bool = False) -> None:
        offset = operator.index(offset)
        name = os.fspath(path)
        if checksums and direct:
            raise ValueError("direct and checksums don't go together: the journal's bytes pass through the page cache")
        # O_NONBLOCK: opening a FIFO would wait for a writer. Not all systems have each of them; Windows has O_BINARY.
        wanted = ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY", *(("O_DIRECT",) if direct else ()))
        fd = os.open(name, functools.reduce(operator.or_, (getattr(os, flag, 0) for flag in wanted),
                                              os.O_RDWR if writable else os.O_RDONLY))
        try:
            kind = os.fstat(fd).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                number = errno.EISDIR if stat.S_ISDIR(kind) else errno.ESPIPE
                raise OSError(number, "File needs a regular file or a block device", os.fsdecode(name))
            size = os.lseek(fd, 0, os.SEEK_END)  # block devices have no st_size
            if not 0 <= offset <= size:
                raise ValueError(f"{name}: offset {offset} is outside the file of {size} bytes")
            self._made = _checked_filler(name, fd, offset, size - offset, writable) if checksums else \
                _core.Filler.open_file(fd, offset, size - offset, bool(direct), bool(writable))
        except BaseException:
            os.close(fd)
            raise
        self.nbytes = size - offset
        self._fd, self._offset, self._direct = fd, offset, bool(direct)          # the Filler closes it
        self.checksums = bool(checksums)
        self._recipe = ((os.path.abspath(os.fsdecode(name)), offset),
                        {"direct": bool(direct), "writable": bool(writable), "checksums": bool(checksums)})
        self.title = f"File({Path(os.fsdecode(name)).name!r}{f', offset={offset}' if offset else ''})"

    @staticmethod
    def checksum(path: str | os.PathLike[str], offset: int = 0) -> None:
        """Makes the checksums for File(path, offset, checksums=True) of what the file has now, or makes them anew;
        blocks until all of it was read. What a program that died had written back reaches the file first. OSError
        (EBUSY where it is open); ValueError for an empty one."""
        from .checksums import make

        make(os.fspath(path), operator.index(offset))


class Blosc2File(_NativeProvider):
    """The array bytes (C order) of a contiguous Blosc2 frame or .b2nd file, decompressed in the worker.

    `offset`: where the frame starts in the file, for frames inside a container. Decoding is done by the C library that
    the `blosc2` package ships (ImportError without it: the extra `blosc2`), one context per worker, only the Blosc2
    blocks that a fill needs. OSError: EBADMSG for a damaged frame, EIO for a short one, ENOTSUP for a directory frame
    or a codec that the library lacks. Blosc2 has no checksums: damage inside a block may decode to other bytes.

    Attributes: nbytes, chunk_bytes, block_bytes (of Blosc2), typesize, chunks, linear (whether the bytes of a chunk are
    consecutive bytes of the array), shape (of a b2nd array, else ()).
    """

    def __init__(self, path: str | os.PathLike[str], *, offset: int = 0) -> None:
        name, offset = os.fspath(path), operator.index(offset)
        self._place = os.path.abspath(os.fsdecode(name)), offset
        if _no_core is None:
            self._made = _core.Filler.blosc2(os.fsencode(_blosc2_library()), os.fsencode(name), offset)
            info = self._made.info
        else:
            self._made, info = _frame_told_by_its_package(*self._place)
        self._recipe = (self._place[:1], {"offset": offset})
        self.nbytes = self._made.nbytes
        self.chunk_bytes: int = info["chunk_bytes"]
        self.block_bytes: int = info["block_bytes"]
        self.typesize: int = info["typesize"]
        self.chunks: int = info["chunks"]
        self.linear: bool = info["linear"]
        self.shape: tuple[int, ...] = info["shape"]
        self.title = f"Blosc2File({Path(name).name!r}{f', offset={offset}' if offset else ''})"


class Native(_NativeProvider):
    """A compiled function: `int fill(void *user_data, uint64_t offset, void *block, size_t nbytes)`, 0 or -errno.

    function: a ctypes function pointer of a shared library, a PyCapsule (Cython), a scipy.LowLevelCallable, a Numba
    @cfunc, or a ctypes.c_void_p. What it belongs to is kept alive. uffd.h (see `uffd.get_include()`) says what it must
    keep to: it is called from several threads at once, without the interpreter lock. A ctypes function that wraps
    Python code is a TypeError: it would wait for that lock, which the touching thread may hold. A Numba @cfunc must not
    raise: its error path takes the lock to print the exception.

    user_data: None, an int address, a ctypes pointer, a PyCapsule, or a buffer (its first byte; kept exported).
    write: a function of the same kind that takes bytes back, `int write(void *user_data, uint64_t offset, const void
    *block, size_t nbytes)`; 0 acknowledges them. A region over it is "r+" by default.
    inline_safe: the function may run in a signal handler (no malloc, no stdio, no locks); with inline delivery it then
    runs on the touching thread, else a worker runs it.
    """

    def __init__(self, function: Any, user_data: Any = None, *, write: Any = None, inline_safe: bool = False) -> None:
        address, context = _function_address(function)
        data, kept = (context, None) if user_data is None else _data_address(user_data)
        write_address = 0 if write is None else _function_address(write)[0]
        self._made = _core.Filler.native_pointer(address, data, bool(inline_safe), (function, user_data, kept, write),
                                                 write_address)
        self._address, self._data, self._write_address = address, data, write_address
        name = getattr(function, "__name__", type(function).__name__)
        self.title = f"Native({name})"


def _checked_filler(name: Any, fd: int, offset: int, nbytes: int, writable: bool) -> _core.Filler:
    from .checksums import opened

    return opened(name, fd, offset, nbytes, writable)


def _blosc2_library() -> str:
    """The shared library inside the installed blosc2 package."""
    found = importlib.util.find_spec("blosc2")
    if found is None or not found.submodule_search_locations:
        raise ImportError('Blosc2 files need the blosc2 package: pip install "pyuffd[blosc2]"')
    for folder in found.submodule_search_locations:
        for library in sorted(Path(folder).glob("**/libblosc2.so*")):
            return str(library)
    raise UffdError("the installed blosc2 package ships no libblosc2.so; its wheels do")


def _frame_told_by_its_package(path: str, offset: int) -> tuple[_core.Filler, dict[str, Any]]:
    """Where there is no extension: (what stands in for a Filler, its info)."""
    from .._plain import open_frame

    opened = open_frame(path, offset)
    schunk = getattr(opened, "schunk", opened)
    shape = tuple(opened.shape) if schunk is not opened else ()
    info = {"chunk_bytes": schunk.chunksize, "block_bytes": schunk.blocksize, "typesize": schunk.typesize,
            "chunks": schunk.nchunks, "linear": len(shape) < 2, "shape": shape}
    nbytes = opened.dtype.itemsize * int(np.prod(shape, dtype=object)) if schunk is not opened else schunk.nbytes
    stand_in: Any = _core.Filler
    return stand_in("blosc2", nbytes), info


def _function_address(function: Any) -> tuple[int, int]:
    """(address, context address or 0) of a C function, however it is wrapped."""
    if isinstance(function, _FunctionPointer):
        if any(type(kept).__name__ == "CThunkObject" for kept in (function._objects or {}).values()):
            raise TypeError("a ctypes function that wraps Python code needs the interpreter lock, which the touching "
                            "thread may hold: it would hang. Compile it (Cython, C, Numba @cfunc)")
        if function._flags_ & 4:                 # FUNCFLAG_PYTHONAPI: of a PyDLL
            raise TypeError("a function of a ctypes.PyDLL needs the interpreter lock, which the touching thread may "
                            "hold")
        address = ctypes.cast(function, ctypes.c_void_p).value or 0
        return _not_null(address), 0
    if isinstance(function, ctypes.c_void_p):
        return _not_null(function.value or 0), 0
    if type(function).__name__ == "PyCapsule":
        return _core.capsule_address(function)
    if type(function).__name__ == "LowLevelCallable" and isinstance(function, tuple):
        return _from_low_level(function)
    if hasattr(function, "address") and hasattr(function, "native_name"):    # Numba @cfunc
        return _not_null(operator.index(function.address)), 0
    raise TypeError(f"no C function in a {type(function).__name__}: give a ctypes function of a library, a PyCapsule, "
                    "a scipy.LowLevelCallable, a Numba @cfunc or a ctypes.c_void_p")


def _from_low_level(function: Any) -> tuple[int, int]:
    address, context = _core.capsule_address(tuple.__getitem__(function, 0))
    inner = function.function
    if isinstance(inner, _FunctionPointer):
        _function_address(inner)                 # refuses what wraps Python code
    return address, context


def _not_null(address: int) -> int:
    if not address:
        raise ValueError("the function pointer is NULL")
    return address


def _data_address(data: Any) -> tuple[int, Any]:
    """(address, what keeps it) of user_data."""
    if isinstance(data, int):
        return data, None
    if type(data).__name__ == "PyCapsule":
        return _core.capsule_address(data)[0], None
    if isinstance(data, (ctypes.c_void_p, ctypes._Pointer)):
        return ctypes.cast(data, ctypes.c_void_p).value or 0, None
    view = memoryview(data)
    return _core.buffer_address(view), view
