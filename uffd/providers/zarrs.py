"""Zarr arrays as the bytes of one C-order ndarray, whatever the shape of their chunks.

Geometry is counted in bytes: the last axis is taken times the item size, so that a range of the region that cuts an
item in two is like any other. A range of the stream is a few boxes of the array (`boxes`), a box meets chunks, and of
each chunk the parts that were asked for are copied into place. The rest of a chunk is offered to the engine row by
row, since to decode it again would cost more than anything else here.
"""

from __future__ import annotations

import errno
import itertools
import math
import mmap
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from .hosted import Provider
from .urls import is_url, shown

__all__ = ["Zarr", "suggested_block_bytes"]

_CACHE_BYTES = 64 << 20
_AHEAD_MAX = 4                      # chunks decoded at once, ahead
_BLOCK_BYTES_MAX = 1 << 20
_BLOCK_BYTES_USUAL = 1 << 16

Index = tuple[int, ...]
Slices = tuple[slice, ...]
Copies = list[tuple[np.ndarray, Slices]]         # where to, and from where in the chunk


class Zarr(Provider):
    """The bytes of a zarr array in C order, chunks decoded by zarr itself: versions 2 and 3 of the format, sharded or
    not, any codec that the installed zarr (2.18 or 3) has. Read-only.

    store: a directory, a .zip file, a URL (then storage_options are fsspec's), a store object of zarr, or an array of
    it. path: of the array in a group. Its metadata is read here (FileNotFoundError; TypeError for objects and strings
    of variable length; ValueError for a group or a grid of chunks that is not regular; ImportError naming the extra)
    and is part of the recipe: a process that opens it and finds other metadata raises ESTALE. Zarr has no version for
    chunks, so the store must not be written to while it is in use. A chunk that is missing is the array's fill value,
    by the format's own rule; one that can't be read is an error.

    Attributes: shape, dtype (as zarr's array[...] has it), chunks (of a sharded array: the inner ones), nbytes.

    Each chunk is decoded once for all the blocks it has a part in: parts that cover whole blocks are offered to the
    engine, and what is left waits among the last `cache_bytes` of decoded chunks, at least one of them. While chunks
    are asked for one after the other along an axis, the next one is decoded ahead. A region over it is best made with
    `block_bytes=suggested_block_bytes(shape, chunks, itemsize)`, as `uffd.open` does.
    """

    concurrency = max(2, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    cache_bytes = _CACHE_BYTES

    def __init__(self, store: Any, path: str = "", *, storage_options: Mapping[str, Any] | None = None) -> None:
        if hasattr(store, "store") and hasattr(store, "path"):       # an array or a group of zarr's
            store, path = store.store, "/".join(filter(None, (store.path, path)))
        if isinstance(store, (str, os.PathLike)):
            store = os.fspath(store)
            store = store if is_url(store) else os.path.abspath(store)
        self.store = store
        self.path = path.strip("/")
        self.storage_options = dict(storage_options or {})
        with opened(self.store, self.path, self.storage_options) as array:
            self._layout = _Layout.of(array, self._place())
        self.shape, self.dtype, self.chunks = self._layout.shape, self._layout.dtype, self._layout.chunks
        self.nbytes: int | None = math.prod(self._layout.byte_shape)
        self.title = f"Zarr({self._place()!r})"
        self._live: _Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_live", "_session")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _live=None)

    def __repr__(self) -> str:
        return f"uffd.providers.{self.title}"

    def suggested_block_bytes(self) -> int:
        """`suggested_block_bytes` of this array."""
        return suggested_block_bytes(self.shape, self.chunks, self.dtype.itemsize)

    def open(self) -> None:
        context = opened(self.store, self.path, self.storage_options)
        array = context.__enter__()
        found = _Layout.of(array, self._place())
        if found != self._layout:
            context.__exit__(None, None, None)
            raise OSError(errno.ESTALE, f"the array has changed since it was opened: then {self._layout}, now {found}; "
                          "open it again", self._place())
        pool = ThreadPoolExecutor(self.concurrency, "uffd-zarr")
        self._live = _Live(context, array, _Decoded(self.cache_bytes), pool, _Ahead())

    def read(self, offset: int, out: np.ndarray) -> None:
        self.read_many([(offset, out)])

    def read_many(self, requests: Sequence[tuple[int, np.ndarray]]) -> None:
        """Decodes each chunk that any of the requests needs once, several chunks at a time."""
        wanted: dict[Index, Copies] = defaultdict(list)
        for offset, out in requests:
            self._layout.plan(offset, out, wanted)
        live = self._live
        if live is None:
            raise ValueError(f"{self.title} is not open")
        if len(wanted) == 1:
            for index, copies in wanted.items():
                self._look_ahead(live, index)
                self._serve(live, index, copies)
            return
        tasks = [live.pool.submit(self._serve, live, index, copies) for index, copies in wanted.items()]
        wait(tasks)                              # all of them, whatever fails: none may write to `out` after the return
        for task in tasks:
            task.result()

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.pool.shutdown(cancel_futures=True)
            live.context.__exit__(None, None, None)

    def _serve(self, live: _Live, index: Index, copies: Copies) -> None:
        chunk = self._decoded(live, index)
        for target, part in copies:
            target[...] = chunk[part]
        if live.decoded.first_use(index) and sum(target.nbytes for target, _ in copies) < chunk.nbytes:
            self._offer_chunk(index, chunk)

    def _decoded(self, live: _Live, index: Index) -> np.ndarray:
        future, is_ours = live.decoded.find(index)
        if is_ours:
            self._decode(live, {index: future})
        return future.result()

    def _look_ahead(self, live: _Live, index: Index) -> None:
        """Nothing of it is offered before it is asked for: to fill memory ahead is for the engine to decide."""
        if self._layout.chunk_bytes * _AHEAD_MAX * 2 <= self.cache_bytes:
            ahead = [one for one in live.ahead.after(index) if self._layout.has_chunk(one)]
            if ahead:
                live.pool.submit(self._decode_ahead, live, ahead)

    def _decode_ahead(self, live: _Live, ahead: Sequence[Index]) -> None:
        # claimed here, and not by who asks: nobody may wait for a chunk whose turn in the pool has not come
        claimed = live.decoded.claim(ahead)
        are_neighbours = len(claimed) == len(ahead)
        for group in [claimed] if are_neighbours else [{index: future} for index, future in claimed.items()]:
            self._decode(live, group)

    def _decode(self, live: _Live, claimed: Mapping[Index, Future[np.ndarray]]) -> None:
        """Neighbours along one axis, by one selection: zarr decodes them side by side. Errors are left with them."""
        try:
            chunks = self._layout.decode(live.array, sorted(claimed))
        except BaseException as error:
            live.decoded.fail(claimed, error)
            return
        live.decoded.settle(claimed, chunks)

    def _offer_chunk(self, index: Index, chunk: np.ndarray) -> None:
        """The whole chunk: what was asked for, or is there already, the engine leaves alone."""
        session = self._session
        block_bytes = getattr(session, "block_bytes", None)
        if session is None or not block_bytes:
            return
        for offset, step, rows in self._layout.rows(index, chunk):
            if rows.shape[1] < block_bytes:      # no row covers a block
                return
            session.offer_rows(offset, step, rows)

    def _place(self) -> str:
        store = self.store if isinstance(self.store, str) else type(self.store).__name__
        return f"{shown(store)}{'/' if self.path else ''}{self.path}"


def suggested_block_bytes(shape: Sequence[int], chunks: Sequence[int], itemsize: int) -> int:
    """The block size for an array in such chunks: the largest power of two, a page to 1 MiB, whose blocks lie in one
    chunk each, so that every row of a decoded chunk is whole blocks. (8192, 8192) of 8 bytes in (512, 512): 4 KiB.

    Where rows of chunks can't be aligned, it is the largest power of two up to the row's length, a page to 64 KiB: a
    block then meets few chunks. Where even a page takes in whole rows of the array, it meets as many chunks as a larger
    block does: then it is up to 64 KiB, within the height of a chunk.
    """
    page = mmap.PAGESIZE
    axis = _row_axis(shape, chunks)
    strides = _strides((*shape, itemsize))[:-1]
    if axis is None:
        return min(max(page, 1 << max(0, math.prod(shape) * itemsize - 1).bit_length()), _BLOCK_BYTES_MAX)
    row_bytes = chunks[axis] * strides[axis]
    common = math.gcd(row_bytes, *(strides[before] for before in range(axis) if shape[before] > 1))
    aligned = common & -common                   # the largest power of two in it
    if aligned >= page:
        return min(aligned, _BLOCK_BYTES_MAX)
    if axis and strides[axis - 1] <= page:
        row_bytes = chunks[axis - 1] * strides[axis - 1]
    return min(max(page, 1 << (row_bytes.bit_length() - 1)), _BLOCK_BYTES_USUAL)


def require_zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError('zarr arrays need the package zarr: pip install "pyuffd[zarr]"') from error
    return zarr


# ---- zarr's side ------------------------------------------------------------------------------------------------


@contextmanager
def opened(store: Any, path: str, storage_options: Mapping[str, Any]) -> Iterator[Any]:
    """The zarr array or group there, read-only; FileNotFoundError if there is none."""
    zarr = require_zarr()
    made = _made_store(zarr, store, storage_options) if isinstance(store, str) else None
    place = f"{shown(store) if isinstance(store, str) else type(store).__name__}/{path}"
    try:
        try:
            node = _node(zarr, store if made is None else made, path)
        except (FileNotFoundError, KeyError, ValueError) as error:
            if isinstance(error, FileNotFoundError) or type(error).__name__.endswith("NotFoundError"):
                raise FileNotFoundError(errno.ENOENT, "no zarr array or group is there", place) from error
            raise
        yield node
    finally:
        if made is not None and hasattr(made, "close"):
            made.close()
        _close_session(getattr(made, "fs", None))


def array_names(group: Any) -> list[str]:
    """The paths of all arrays in a zarr group, those of its subgroups included; the store must be listable."""
    names: list[str] = []
    if _is_version_2(require_zarr()):
        group.visititems(lambda name, node: names.append(name) if hasattr(node, "dtype") else None)
        return names
    return [name for name, node in group.members(max_depth=None) if hasattr(node, "dtype")]


def _node(zarr: Any, store: Any, path: str) -> Any:
    if _is_version_2(zarr) and not path:
        try:
            return zarr.open_consolidated(store, mode="r")           # a group whose store can't be listed
        except KeyError:
            pass
    return zarr.open(store, path=path or None, mode="r")


def _made_store(zarr: Any, store: str, storage_options: Mapping[str, Any]) -> Any:
    if is_url(store):
        if _is_version_2(zarr):
            # by default it takes every OSError for a chunk that is missing, and would answer with the fill value
            return zarr.storage.FSStore(store, mode="r", exceptions=(KeyError,), skip_instance_cache=True,
                                        **storage_options)
        options = {"skip_instance_cache": True, **storage_options}
        return zarr.storage.FsspecStore.from_url(store, storage_options=options, read_only=True)
    if os.path.isfile(store):
        return zarr.storage.ZipStore(store, mode="r")
    if not os.path.isdir(store):
        raise FileNotFoundError(errno.ENOENT, "no zarr array or group is there", store)
    return zarr.storage.DirectoryStore(store) if _is_version_2(zarr) else zarr.storage.LocalStore(store, read_only=True)


def _close_session(fs: Any) -> None:
    """The connections of an HTTP or S3 file system: used from zarr 3's own loop, it does not close them by itself."""
    held: Any = getattr(fs, "_s3creator", None) or getattr(fs, "_session", None)
    if not getattr(fs, "asynchronous", False) or not hasattr(held, "__aexit__"):
        return
    from zarr.core.sync import sync

    async def close() -> None:
        await held.__aexit__(None, None, None)

    with suppress(Exception):                    # what can't be closed ends with the process
        sync(close())


def _is_version_2(zarr: Any) -> bool:
    return int(zarr.__version__.partition(".")[0]) < 3


# ---- geometry ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """What of an array's metadata its bytes depend on, here."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @classmethod
    def of(cls, array: Any, place: str) -> _Layout:
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise ValueError(f"{place}: a zarr group; name one of its arrays by `path`, or use uffd.open")
        dtype = np.dtype(array.dtype)
        if not dtype.hasobject and not _is_version_2(require_zarr()):
            # what zarr 3 hands out is not always what it stores (byte order); nothing selected decodes nothing
            dtype = np.asarray(array[(slice(0, 0),) * array.ndim] if array.ndim else array[...]).dtype
        if dtype.hasobject or dtype.kind == "T":
            raise TypeError(f"{place}: arrays of {dtype} (objects, or strings of variable length) can't be served: "
                            "their elements are pointers")
        try:
            chunks = tuple(int(extent) for extent in array.chunks)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"{place}: only a regular grid of chunks can be served") from error
        shape = tuple(int(extent) for extent in array.shape)
        return cls(shape, dtype, tuple(max(1, min(pair)) for pair in zip(chunks, shape, strict=True)))

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return _in_bytes(self.shape, self.dtype.itemsize)

    @property
    def byte_chunks(self) -> tuple[int, ...]:
        return _in_bytes(self.chunks, self.dtype.itemsize)

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.byte_chunks)

    def has_chunk(self, index: Index) -> bool:
        return all(0 <= at * chunk < extent for at, chunk, extent in zip(index, self.byte_chunks, self.byte_shape))

    def decode(self, array: Any, indices: Sequence[Index]) -> list[np.ndarray]:
        """The bytes of each chunk, its last axis in bytes, cut off at the array's end. They are neighbours along one
        axis, in order, and are decoded by one selection."""
        selection = tuple(slice(low * chunk, min((high + 1) * chunk, extent))
                          for low, high, chunk, extent in zip(indices[0], indices[-1], self.chunks, self.shape))
        shape = tuple(one.stop - one.start for one in selection)
        found = np.asarray(array[selection or ...])          # (): a scalar, which has lost its byte order
        if found.shape != shape or found.dtype != self.dtype:
            raise OSError(errno.EIO, f"zarr decodes chunk {indices[0]} to {found.shape} of {found.dtype}, not to "
                          f"{shape} of {self.dtype}")
        flat = np.ascontiguousarray(found).reshape(-1)
        box = flat.view(np.uint8).reshape(_in_bytes(shape, self.dtype.itemsize))
        if len(indices) == 1:
            return [box]
        return [np.ascontiguousarray(box[tuple(slice((at - low) * chunk, (at - low + 1) * chunk)
                                               for at, low, chunk in zip(index, indices[0], self.byte_chunks))])
                for index in indices]

    def plan(self, offset: int, out: np.ndarray, wanted: dict[Index, Copies]) -> None:
        """Adds to `wanted`, by chunk, the copies that fill `out` with the bytes from `offset` on."""
        at = 0
        chunks = self.byte_chunks
        for low, high in boxes(offset, offset + out.nbytes, self.byte_shape):
            extents = [last - first for first, last in zip(low, high)]
            target = out[at:at + math.prod(extents)].reshape(extents)
            at += target.nbytes
            grid = [range(first // chunk, -(-last // chunk)) for first, last, chunk in zip(low, high, chunks)]
            for index in itertools.product(*grid):
                there, part = [], []
                for i, first, last, chunk in zip(index, low, high, chunks):
                    begin, end = max(first, i * chunk), min(last, (i + 1) * chunk)
                    there.append(slice(begin - first, end - first))
                    part.append(slice(begin - i * chunk, end - i * chunk))
                wanted[index].append((target[tuple(there)], tuple(part)))

    def rows(self, index: Index, chunk: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """A decoded chunk as (offset, step, rows): row i lies at offset + i * step of the stream."""
        strides = _strides(self.byte_shape)
        first = sum(at * extent * stride for at, extent, stride in zip(index, self.byte_chunks, strides))
        axis = _row_axis(self.byte_shape, chunk.shape)
        axis = 0 if axis is None else axis
        axes = [(count, stride) for count, stride in zip(chunk.shape[:axis], strides) if count > 1]
        while len(axes) > 1 and axes[-2][1] == axes[-1][0] * axes[-1][1]:      # they follow each other as one
            axes[-2:] = [(axes[-2][0] * axes[-1][0], axes[-1][1])]
        count, step = axes.pop() if axes else (1, chunk.nbytes)
        pieces = chunk.reshape(math.prod(n for n, _ in axes), count, -1)
        for number, outer in enumerate(itertools.product(*(range(n) for n, _ in axes))):
            yield first + sum(at * stride for at, (_, stride) in zip(outer, axes)), step, pieces[number]


def boxes(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[Index, Index]]:
    """The boxes (corner, opposite corner) that [start, stop) of a C-order stream of `shape` consists of, in its order:
    at most two for each axis, and one."""
    if start >= stop:
        return
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)

    def within(at: int, begin: int, end: int) -> Iterator[tuple[Index, Index]]:
        for low, high in boxes(begin, end, shape[1:]):
            yield (at, *low), (at + 1, *high)

    if first == last:
        yield from within(first, head, tail)
        return
    if head:
        yield from within(first, head, inner)
        first += 1
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last, *shape[1:])
    yield from within(last, 0, tail)


def _row_axis(shape: Sequence[int], chunk: Sequence[int]) -> int | None:
    """The last axis that a chunk does not span: from there on its bytes follow each other. None: it spans them all."""
    return next((axis for axis in reversed(range(len(shape))) if chunk[axis] < shape[axis]), None)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))


def _in_bytes(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] * itemsize) if shape else (itemsize,)


# ---- decoded chunks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Live:
    """What there is between open and close."""

    context: Any
    array: Any
    decoded: _Decoded
    pool: ThreadPoolExecutor
    ahead: _Ahead


class _Decoded:
    """The last chunks decoded, at most `limit_bytes` of them or one; a chunk that is being decoded is waited for."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Index, Future[np.ndarray]] = OrderedDict()
        self._kept_bytes = 0
        self._unused: set[Index] = set()

    def find(self, index: Index) -> tuple[Future[np.ndarray], bool]:
        """The chunk, there or coming. True: nobody decodes it, the caller is to, and ends with settle or fail."""
        with self._lock:
            future = self._kept.get(index)
            if future is None:
                future = self._kept[index] = Future()
                return future, True
            self._kept.move_to_end(index)
            return future, False

    def claim(self, indices: Sequence[Index]) -> dict[Index, Future[np.ndarray]]:
        """Those of them that nobody has decoded, or is about to: the caller is to, as with `find`."""
        with self._lock:
            new: dict[Index, Future[np.ndarray]] = {index: Future() for index in indices if index not in self._kept}
            self._kept.update(new)
            return new

    def settle(self, claimed: Mapping[Index, Future[np.ndarray]], chunks: Sequence[np.ndarray]) -> None:
        """Given in the order of sorted(claimed)."""
        with self._lock:
            for index, chunk in zip(sorted(claimed), chunks, strict=True):
                self._unused.add(index)
                self._kept_bytes += chunk.nbytes
                claimed[index].set_result(chunk)
            self._drop_oldest()

    def fail(self, claimed: Mapping[Index, Future[np.ndarray]], error: BaseException) -> None:
        """Everybody who waits gets the error; the next one tries again."""
        with self._lock:
            for index, future in claimed.items():
                del self._kept[index]
                future.set_exception(error)

    def first_use(self, index: Index) -> bool:
        """True once for each time that the chunk was decoded."""
        with self._lock:
            is_first = index in self._unused
            self._unused.discard(index)
            return is_first

    def _drop_oldest(self) -> None:
        done = [index for index, future in self._kept.items() if future.done()]
        for index in done[:-1]:
            if self._kept_bytes <= self._limit_bytes:
                return
            self._kept_bytes -= self._kept.pop(index).result().nbytes
            self._unused.discard(index)


class _Ahead:
    """Which chunks to decode ahead: whoever goes from chunk to neighbour along an axis goes on, the further the
    longer it has. Thread-safe; wrong where two walk at once, which costs no more than the time of a few chunks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: Index | None = None
        self._step: Index | None = None
        self._steps = 0                          # that were the same
        self._beyond = 0                         # chunks past the last one that were given out

    def after(self, index: Index) -> list[Index]:
        """What is to be decoded now that `index` is asked for; it may lie outside of the array."""
        with self._lock:
            last, self._last = self._last, index
            if last is None or last == index:
                return []
            step = tuple(at - was for at, was in zip(index, last))
            if step != self._step:
                self._step, self._steps, self._beyond = step, 0, 0
            if sum(map(abs, step)) != 1:
                return []
            self._steps += 1
            self._beyond = max(0, self._beyond - 1)
            count = min(self._steps, _AHEAD_MAX)
            if self._beyond > count // 2:
                return []
            first, self._beyond = self._beyond + 1, self._beyond + count
            return [tuple(at + one * far for at, one in zip(index, step)) for far in range(first, first + count)]
