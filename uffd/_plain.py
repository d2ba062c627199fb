"""Providers read and written plainly: in this process, by Python, without the extension. For eager.py."""

from __future__ import annotations

import copy
import ctypes
import errno
import mmap
import operator
import os
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np

from . import providers
from .errors import BudgetError, UffdError
from .providers import hosted

__all__ = ["Source", "batches", "callers_level", "memory_of", "number_of", "source_of", "text_of",
           "traceback_of", "words_of"]

_TRACEBACK_CHARS = 8192
_SLAB_BYTES = 64 << 20              # of a Blosc2 array decoded at once, unless a row of it is larger
_CANARY_BYTES = 8
_MANY = 16                          # requests for one call of read_many

Request = tuple[int, np.ndarray]    # offset, and a view of the region's memory to be filled whole
Piece = tuple[int, bytes]           # offset, and what to store there
Offer = Callable[[int, np.ndarray], bool]


class NotFilled(UffdError, OSError):
    """A provider answered in a way that can't be right."""


class Source:
    """A provider in use. `open` may be called again; `read` fills every request whole or raises, `write` has stored
    every one whole, or raises, and `flush` has made durable what was stored before."""

    nbytes: int | None = None
    writes = False                  # whether it can; known once it is open
    is_zero = False                 # there is nothing to read
    batch = 1                       # requests that one `read` makes good use of

    def begin(self, offer: Offer) -> None:
        """Before all else. offer(offset, bytes): takes what nobody asked for yet."""

    def open(self) -> None: ...

    def read(self, requests: list[Request]) -> None:
        for offset, out in requests:
            self.fill(offset, out)

    def fill(self, offset: int, out: np.ndarray) -> None: ...

    def write(self, requests: list[Piece]) -> None:
        for offset, data in requests:
            self.store(offset, data)

    def store(self, offset: int, data: bytes) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class _Synced(Source):
    """Made durable by the kernel, which tells of a page that it could not write once, and counts it as written then:
    after a failed sync none succeeds before something was stored again."""

    _failed: OSError | None = None

    def flush(self) -> None:
        if self._failed is None:
            try:
                self.sync()
            except OSError as error:
                self._failed = error
        if self._failed is not None:
            raise self._failed

    def store(self, offset: int, data: bytes) -> None:
        self._failed = None
        self.put(offset, data)

    def sync(self) -> None: ...

    def put(self, offset: int, data: bytes) -> None: ...


def source_of(provider: Any) -> Source:
    """How to read it: one of uffd.providers, or a Provider."""
    for kind, source in _SOURCES:
        if isinstance(provider, kind):
            return source(provider)
    return _PythonSource(provider)


def batches(runs: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """As many at once as one call takes."""
    batch: list[Any] = []
    for run in runs:
        batch.append(run)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


def memory_of(nbytes: int, name: str) -> mmap.mmap:
    """Zeros, page-aligned, private to this process also after a fork."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        return mmap.mmap(-1, nbytes, **private)
    except (OSError, MemoryError, OverflowError) as error:
        raise BudgetError(f"region {name!r}: {nbytes} bytes could not be had: {error}; without a userfaultfd a region "
                          "must fit into memory") from error


def callers_level() -> int:
    """For a warning in the function that calls this: the first caller outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "uffd":
        level, frame = level + 1, frame.f_back
    return level


def number_of(error: Exception) -> int:
    return error.errno if isinstance(error, OSError) and error.errno else errno.EIO


def words_of(error: Exception, number: int) -> str:
    """What went wrong, for the end of a sentence."""
    if isinstance(error, NotFilled):
        return str(error.args[1])
    plain = os.strerror(number)
    if isinstance(error, OSError):
        return plain if error.strerror in (None, plain) else f"{plain} ({error.strerror})"
    return f"{type(error).__name__}: {error}"


def traceback_of(error: Exception, provider: Any) -> str | None:
    """The text of an exception in Python code of a provider, cut from its front; None for native ones."""
    if isinstance(error, NotFilled) or isinstance(provider, tuple(kind for kind, _ in _SOURCES)):
        return None
    return "".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:]


def text_of(error: Exception, provider: Any) -> str | None:
    """What there is to tell beyond its errno: as a provider host would."""
    return str(error.args[1]) if isinstance(error, NotFilled) else traceback_of(error, provider)


# Providers that need no Python elsewhere -----------------------------------------------------------------------------


class _Zero(Source):
    is_zero = True

    def __init__(self, provider: providers.Zero | providers.Scratch) -> None:
        pass

    def fill(self, offset: int, out: np.ndarray) -> None:
        out[:] = 0


class _Memory(Source):
    def __init__(self, provider: providers.Memory) -> None:
        self.nbytes = provider.nbytes
        flat = np.asarray(provider._buffer)      # of any strides; its bytes as they lie in memory
        self._bytes = flat.reshape(-1, order="A").view(np.uint8)

    def fill(self, offset: int, out: np.ndarray) -> None:
        out[:] = self._bytes[offset:offset + len(out)]


class _File(_Synced):
    def __init__(self, provider: providers.File) -> None:
        self.nbytes, self._offset, self._provider = provider.nbytes, provider._offset, provider
        self._fd, self._own, self.writes = provider._fd, False, bool(provider._made.writes)
        if provider._direct and os.path.isdir("/proc/self/fd"):  # O_DIRECT is particular about addresses and sizes
            how = os.O_RDWR if self.writes else os.O_RDONLY
            self._fd, self._own = os.open(f"/proc/self/fd/{self._fd}", how | os.O_CLOEXEC), True

    def fill(self, offset: int, out: np.ndarray) -> None:
        view, at = memoryview(cast(Any, out)), offset + self._offset
        while view:
            done = _read_at(self._fd, view, at)
            if done == 0:
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            view, at = view[done:], at + done

    def put(self, offset: int, data: bytes) -> None:
        view, at = memoryview(data), offset + self._offset
        while view:
            done = _write_at(self._fd, view, at)
            if done == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            view, at = view[done:], at + done

    def sync(self) -> None:
        getattr(os, "fdatasync", os.fsync)(self._fd)

    def close(self) -> None:
        if self._own:
            os.close(self._fd)


class _Checked(_Synced):
    """A File with checksums, by the core's own code: there is one reader of that format."""

    def __init__(self, provider: providers.File) -> None:
        self.nbytes, self._provider, self.writes = provider.nbytes, provider, bool(provider._made.writes)

    def fill(self, offset: int, out: np.ndarray) -> None:
        self._provider._made.fill_now(offset, out)

    def put(self, offset: int, data: bytes) -> None:
        self._provider._made.store_now(offset, data)

    def sync(self) -> None:
        self._provider._made.sync_now()


def _file(provider: providers.File) -> Source:
    return _Checked(provider) if provider.checksums else _File(provider)


_seek_lock = threading.Lock()


def _read_at(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(view))
    view[:len(data)] = data
    return len(data)


def _write_at(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, view, offset)
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view)


class _Native(Source):
    def __init__(self, provider: providers.Native) -> None:
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t)
        self._function, self._data, self._provider = kind(provider._address), provider._data, provider
        self.writes = provider._write_address != 0
        self._write = kind(provider._write_address) if self.writes else None

    def fill(self, offset: int, out: np.ndarray) -> None:
        self._check(self._function(self._data or None, offset, out.__array_interface__["data"][0], len(out)))

    def store(self, offset: int, data: bytes) -> None:
        assert self._write is not None, "only who writes is asked to"
        self._check(self._write(self._data or None, offset, ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p),
                                len(data)))

    def _check(self, answer: int) -> None:
        if answer:
            raise OSError(abs(answer), os.strerror(abs(answer)))


class _Blosc2File(Source):
    """By the blosc2 package, in slabs: a chunk, or for an array the rows that chunks share; the last one is kept."""

    def __init__(self, provider: providers.Blosc2File) -> None:
        self.nbytes = provider.nbytes
        self._opened = open_frame(*provider._place)
        self._is_array = hasattr(self._opened, "schunk")
        if self._is_array and self._opened.ndim:
            row_bytes = max(1, self._opened.dtype.itemsize * int(np.prod(self._opened.shape[1:], dtype=object)))
            self._rows = max(1, min(self._opened.chunks[0], _SLAB_BYTES // row_bytes))
            self._slab_bytes = self._rows * row_bytes
        else:
            self._slab_bytes = max(1, self._opened.dtype.itemsize if self._is_array else self._opened.chunksize)
        self._kept: tuple[int, np.ndarray] = (-1, np.zeros(0, np.uint8))

    def fill(self, offset: int, out: np.ndarray) -> None:
        done = 0
        while done < len(out):
            index, start = divmod(offset + done, self._slab_bytes)
            piece = self._slab(index)[start:start + len(out) - done]
            if not len(piece):
                raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
            out[done:done + len(piece)] = piece
            done += len(piece)

    def _slab(self, index: int) -> np.ndarray:
        if self._kept[0] != index:
            self._kept = index, self._decoded(index)
        return self._kept[1]

    def _decoded(self, index: int) -> np.ndarray:
        try:
            if not self._is_array:
                return np.frombuffer(self._opened.decompress_chunk(index), np.uint8)
            key: Any = slice(index * self._rows, (index + 1) * self._rows) if self._opened.ndim else ()
            return np.ascontiguousarray(self._opened[key]).reshape(-1).view(np.uint8)
        except (RuntimeError, ValueError) as error:          # the library has no exception type of its own
            raise OSError(errno.EBADMSG, f"{os.strerror(errno.EBADMSG)}: {error}") from error


def open_frame(path: str, offset: int) -> Any:
    """An NDArray or SChunk of the blosc2 package. ImportError; OSError as Blosc2File."""
    try:
        import blosc2
    except ImportError as error:
        raise ImportError('Blosc2 files need the blosc2 package: pip install "pyuffd[blosc2]"') from error
    with open(path, "rb") as file:
        readable = len(file.read(1))
    try:
        return blosc2.open(path, mode="r", offset=offset)
    except Exception as error:
        number = errno.EBADMSG if readable else errno.EIO
        raise OSError(number, f"{os.strerror(number)}: {error}", path) from error


# Providers in Python -------------------------------------------------------------------------------------------------


class _PythonSource(Source):
    """A Provider. It fills buffers of our own, whose bytes are then copied: one that keeps `out` and writes to it
    later reaches nothing. A copy of it is opened, as in a provider host: what open() keeps could not be pickled."""

    def __init__(self, provider: hosted.Provider) -> None:
        self._provider = copy.copy(provider)
        self._takes_many = hosted.overrides(provider, "read_many")
        self._stores_many = hosted.overrides(provider, "write_many")
        self._is_open = False
        self._pool: ThreadPoolExecutor | None = None
        self._buffers: deque[mmap.mmap] = deque()

    @property
    def nbytes(self) -> int | None:                  # type: ignore[override]
        found = self._provider.nbytes
        return None if found is None else operator.index(found)

    def begin(self, offer: Offer) -> None:
        self._provider._session = _Offers(offer)

    def open(self) -> None:
        if self._is_open:
            return
        self._provider.open()
        self._is_open = True
        self.writes = hosted.writes(self._provider)
        threads = max(1, operator.index(self._provider.concurrency))
        self.batch = _MANY if self._takes_many else threads
        if threads > 1:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="uffd-provider")

    def read(self, requests: list[Request]) -> None:
        if self._takes_many:
            self._filled(requests, self._provider.read_many)
        elif self._pool is not None and len(requests) > 1:
            for _ in self._pool.map(lambda request: self.read([request]), requests):
                pass
        else:
            for request in requests:
                self._filled([request], None)

    def _filled(self, requests: list[Request], read_many: Callable[[list[Request]], Any] | None) -> None:
        buffers = [self._buffer(len(out)) for _, out in requests]
        before = _references(buffers)
        canary = np.frombuffer(os.urandom(_CANARY_BYTES), np.uint8)
        pairs = [(offset, np.frombuffer(buffer, np.uint8, len(out)))
                 for (offset, out), buffer in zip(requests, buffers, strict=True)]
        for _, made in pairs:
            for tail in _page_tails(made):
                tail[:] = canary[:len(tail)]
        method = "read" if read_many is None else "read_many"
        answer: Any = self._provider.read(*pairs[0]) if read_many is None else read_many(list(pairs))
        _check_answer(method, answer, sum(len(made) for _, made in pairs))
        for (offset, out), (_, made) in zip(requests, pairs, strict=True):
            if any(np.array_equal(tail, canary[:len(tail)]) for tail in _page_tails(made) if len(tail) > 2):
                raise NotFilled(errno.EIO, f"not filled whole: {method}() returned, and of the {len(out)} bytes at "
                                           f"offset {offset} some were left as they were")
            out[:] = made
        del pairs, made
        self._take_back(buffers, before)

    def write(self, requests: list[Piece]) -> None:
        if self._stores_many and len(requests) > 1:
            self._stored(requests, self._provider.write_many)
        elif self._pool is not None and len(requests) > 1:
            for _ in self._pool.map(lambda request: self._stored([request], None), requests):
                pass
        else:
            for request in requests:
                self._stored([request], None)

    def _stored(self, requests: list[Piece], write_many: Callable[[list[Request]], Any] | None) -> None:
        """In buffers of our own, as in a provider host: aligned, not writable, and dead afterwards."""
        buffers = [self._buffer(len(data)) for _, data in requests]
        before = _references(buffers)
        pairs = [(offset, _holding(buffer, data)) for (offset, data), buffer in zip(requests, buffers, strict=True)]
        answer: Any = self._provider.write(*pairs[0]) if write_many is None else write_many(list(pairs))
        _check_answer("write" if write_many is None else "write_many", answer, sum(len(data) for _, data in requests))
        del pairs
        self._take_back(buffers, before)

    def flush(self) -> None:
        self._provider.flush()

    def _take_back(self, buffers: list[mmap.mmap], before: list[int]) -> None:
        after = _references(buffers)
        self._buffers.extend(buffers[i] for i in range(len(buffers)) if after[i] <= before[i])    # else it was kept

    def _buffer(self, nbytes: int) -> mmap.mmap:
        try:
            kept = self._buffers.popleft()
        except IndexError:
            return mmap.mmap(-1, nbytes)
        return kept if len(kept) >= nbytes else mmap.mmap(-1, nbytes)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        try:
            if self._is_open:
                self._provider.close()
        except Exception as error:
            warnings.warn(f"{type(self._provider).__name__}.close() failed: {type(error).__name__}: {error}",
                          RuntimeWarning, stacklevel=4)
        finally:
            self._provider._session = None


def _references(buffers: list[mmap.mmap]) -> list[int]:
    return [sys.getrefcount(buffers[i]) for i in range(len(buffers))]


def _holding(buffer: mmap.mmap, data: bytes) -> np.ndarray:
    buffer[:len(data)] = data
    view = np.frombuffer(buffer, np.uint8, len(data))
    view.flags.writeable = False
    return view


class _Offers:
    """What `Provider.offer` hands its blocks to."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer

    def offer(self, offset: int, data: Any) -> bool:
        flat = np.ascontiguousarray(data) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
        return self._offer(operator.index(offset), flat.reshape(-1).view(np.uint8))

    def offer_rows(self, offset: int, step: int, rows: Any) -> bool:
        taken = [self._offer(operator.index(offset) + i * step, row) for i, row in enumerate(np.asarray(rows))]
        return any(taken)


def _page_tails(made: np.ndarray) -> Iterable[np.ndarray]:
    """The last bytes of each page of a buffer, the last page being as long as it is."""
    for stop in [*range(mmap.PAGESIZE, len(made), mmap.PAGESIZE), len(made)]:
        yield made[max(stop - _CANARY_BYTES, (stop - 1) // mmap.PAGESIZE * mmap.PAGESIZE):stop]


def _check_answer(method: str, answer: Any, nbytes: int) -> None:
    """None, or how many bytes it filled or stored: all."""
    if answer is None:
        return
    stores = method.startswith("write")
    did, name = ("stored", "data") if stores else ("filled", "out")
    if isinstance(answer, bool) or not isinstance(answer, (int, np.integer)):
        must = "store all of `data`" if stores else "fill `out` in place (out[:] = ...)"
        raise NotFilled(errno.EIO, f"wrong type: {method}() returned {type(answer).__name__}. It must {must} and "
                                   f"return None, or the number of bytes it {did}")
    if answer != nbytes:
        word = f"short {'write' if stores else 'fill'}" if answer < nbytes else "wrong size"
        raise NotFilled(errno.EIO, f"{word}: {method}() says that it {did} {answer} of the {nbytes} bytes of `{name}`")


_SOURCES: tuple[tuple[Any, Any], ...] = (
    (providers.Zero, _Zero), (providers.Scratch, _Zero), (providers.Memory, _Memory), (providers.File, _file),
    (providers.Blosc2File, _Blosc2File), (providers.Native, _Native),
)
