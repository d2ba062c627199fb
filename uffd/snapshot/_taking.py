"""Taking an image: one instant for all arrays, then a thread that brings it to disk while the program goes on."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import SnapshotError, Unavailable
from . import _files, _layout, _memory, _methods, _merging
from ._target import Target

FIRST: Any = type("First", (), {"__repr__": lambda self: "uffd.snapshot.FIRST"})()
Progress = Callable[[int, int], None]
_MEMORY_LIMIT_BYTES = 64 << 20
_LOOK_S = 0.1
_series: weakref.WeakValueDictionary[str, Snapshot] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Report:
    """What an image cost. pause_ns: for how long the instant held the program's writers up (of a fork, the fork; else
    while the arrays were protected). total_ns: from there until the file was durable and had its name. nbytes: of
    the arrays. blocks: units of 64 KiB of them that hold data in this file. file_bytes: its length; disk_bytes: the
    room it takes, less where arrays were never written. base: the file that an incremental image builds upon, or None.
    details: the method's own figures."""

    path: str
    method: str
    id: str
    base: str | None
    pause_ns: int
    total_ns: int
    nbytes: int
    blocks: int
    data_bytes: int
    file_bytes: int
    disk_bytes: int
    details: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings and dicts."""
        return asdict(self)

    def __str__(self) -> str:
        rate = self.nbytes / max(1, self.total_ns)
        upon = f", upon {self.base}" if self.base else ""
        return (f"{self.path}: {self.nbytes:,} bytes of arrays, {self.data_bytes:,} of them in this file{upon}; by "
                f"{self.method}, pause {self.pause_ns / 1e6:.2f} ms, durable after {self.total_ns / 1e9:.3f} s "
                f"({rate:.2f} GB/s); {self.disk_bytes:,} bytes on disk")


class Snapshot:
    """An image on its way to its file. Every method may be called from any thread. In a forked child it is over: the
    image is the parent's. A normal exit of the program waits for it."""

    def __init__(self, path: str, layout: _layout.Layout, progress: Progress | None) -> None:
        self.path = path
        self.id = uuid.uuid4().hex
        self.instant_ns = 0        # of time.time_ns: the state of all arrays is that of this moment
        self._begun_ns = time.monotonic_ns()
        self._layout = layout
        self._progress = progress
        self._created_s = time.time()
        self._pid = os.getpid()
        self._ended = threading.Event()
        self._cancelled = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._report: Report | None = None
        self._kept: Any = None     # of a series: what stays protected for the next one

    def wait(self, timeout_s: float | None = None) -> Report:
        """The report, once the image is durable at its path. TimeoutError when timeout_s is over first; SnapshotError
        when it could not be written or was cancelled (the path is as it was); what `progress` raised. Ctrl-C interrupts
        it, and not the image."""
        if os.getpid() != self._pid:
            raise SnapshotError(f"{self.path}: the image is taken by process {self._pid}, of which this one is a fork")
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"{self.path}: not written within {timeout_s} s")
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report

    def done(self) -> bool:
        """Whether nothing more is under way: durable, failed or cancelled."""
        return self._ended.is_set() or os.getpid() != self._pid

    def cancel(self) -> None:
        """Gives the image up and waits until nothing of it is left; idempotent. One that is durable stays."""
        if os.getpid() == self._pid and not self._ended.is_set():
            self._cancelled = True
            if threading.current_thread() is not self._thread:       # by `progress`: it ends when that is back
                self._ended.wait()

    def __del__(self) -> None:
        kept = getattr(self, "_kept", None)
        if kept is not None and os.getpid() == self._pid:
            kept.close()           # nobody can build upon it with what it knows: the program's writes are free again

    def __repr__(self) -> str:
        state = "taken" if not self.done() else "failed" if self._error is not None else "durable"
        return f"<uffd.snapshot.Snapshot {self.path!r}: {state}>"

    # ---- the thread that brings it to disk ----

    def _run(self, job: _Job) -> None:
        try:
            with job.target.written_out() if job.stays else contextlib.nullcontext():
                self._drain(job.writer)
                completed = self._complete(job)
            self._publish(job, *completed)
            if job.keeps:
                self._kept = job.writer
                _series[self.id] = self
        except OSError as error:
            self._error = SnapshotError(f"{self.path}: the image could not be written: {error}; what was there is "
                                        "as it was")
            self._error.__cause__ = error
        except BaseException as error:
            self._error = error
        finally:
            try:
                job.close(keeps=self._error is None)
            finally:
                self._ended.set()

    def _drain(self, writer: Any) -> None:
        ended = False
        while not ended:
            self._check_cancelled(writer)
            ended = writer.wait(_LOOK_S)
            if self._progress is not None:
                self._progress(*writer.progress())
        self._check_cancelled(writer)
        writer.check()

    def _check_cancelled(self, writer: Any) -> None:
        if self._cancelled:
            writer.abort()
            raise SnapshotError(f"{self.path}: the image was cancelled; what was there is as it was")

    def _complete(self, job: _Job) -> tuple[_methods.Runs, int, np.ndarray, int]:
        """All that the file is to hold is in it: (what the method wrote, bytes of the data, extents, bytes of all)."""
        head = _files.Head(self.id, self._created_s, self._layout, job.base)
        runs = job.writer.runs()
        if job.base is None:
            data_bytes, extents = self._layout.nbytes, np.zeros((0, 2), np.uint64)
        else:
            known = job.previous is not None
            extents = _merging.changed(job.scratch.fd, runs, job.chain, known, self._stop)
            data_bytes = _merging.copied(job.scratch.fd, extents, job.target.fd, head.data_offset, self._stop)
        return runs, data_bytes, extents, _files.finish(job.target.fd, head, data_bytes, extents)

    def _publish(self, job: _Job, runs: _methods.Runs, data_bytes: int, extents: np.ndarray, file_bytes: int) -> None:
        self._stop()
        if job.compress is None:
            job.target.publish()
        else:
            _merging.packed(job.target, self.path, job.compress)
        blocks = sum(-(-stop // _files.UNIT_BYTES) - start // _files.UNIT_BYTES
                     for start, stop in (runs if job.base is None else _merging.pairs(extents)))
        info = os.stat(self.path)
        self._report = Report(self.path, job.writer.method, self.id, job.base.name if job.base else None,
                              job.writer.pause_ns, time.monotonic_ns() - self._begun_ns,
                              sum(entry.nbytes for entry in self._layout.entries), blocks,
                              sum(stop - start for start, stop in runs) if job.base is None else data_bytes,
                              info.st_size if job.compress else file_bytes, info.st_blocks * 512, job.writer.stats())

    def _stop(self) -> None:
        if self._cancelled:
            raise SnapshotError(f"{self.path}: the image was cancelled; what was there is as it was")


class _Job:
    """What one image needs while it is written."""

    def __init__(self, path: str, base: _files.Base | None, chain: Any, compress: str | None) -> None:
        self.base, self.chain, self.compress = base, chain, compress
        self.writer: Any = None
        self.previous: Any = None
        self.keeps = False
        self.target = Target(path)
        try:
            self.scratch = Target(path) if base else self.target
        except BaseException:
            self.target.close()
            raise

    @property
    def stays(self) -> bool:
        """Whether what the method writes is what will be at the path."""
        return self.scratch is self.target and self.compress is None

    def close(self, keeps: bool = False) -> None:
        if self.writer is not None and not (keeps and self.keeps):
            self.writer.close()
        self.scratch.close()
        self.target.close()


def take(arrays: Mapping[str, np.ndarray] | np.ndarray, path: str | os.PathLike[str], *, base: Any = None,
         method: str = "auto", compress: str | None = None, memory_limit_bytes: int | None = None,
         progress: Progress | None = None) -> Snapshot:
    """A `Snapshot`: the state of all `arrays` at one instant, on its way to the file `path` while the program writes
    on.

    The instant lies within this call, whatever number of threads write. The file is there, whole and durable, when
    `wait` is back; until then, and after a crash, `path` is as it was. Without `compress` it is a valid .safetensors
    file, each array from a page on; `uffd.open` and `load` open it lazily, with every byte checked against its
    checksum.

    arrays: name to array; one array alone is named "array". Any contiguous memory in C or Fortran order, also regions
    of uffd (missing blocks are taken from their provider), large arrays that were hardly written (what never was is a
    hole of the file). TypeError for Python objects; SnapshotError for mappings of files, with the reason.

    method: "protect": a write to a block that is not saved yet saves it first; needs a full userfaultfd. "fork": a
    forked child writes its memory; works everywhere, not for shared memory and regions of mode "r+", and pays for a
    copy of each page that is written meanwhile. "auto": protect where the machine grants it
    and the memory allows it (regions served inline, and what a tracker or another image has in hand, don't), else fork.
    memory_limit_bytes: how much may be copied aside with "protect" (None: 64 MiB); beyond, a writer waits for the disk.

    base: makes the image incremental: a path or `Snapshot` in the same folder, of arrays of the same names, types and
    shapes; what did not change since is taken from there, so the base must stay as it is. Where the last `Snapshot` of
    a series by "protect" is still there, and is the base, only what was written since is looked at: begin such a series
    with `FIRST`, a whole image whose blocks stay protected. Else the base is read and compared.
    compress: "zstd", "lz4", ...: as `uffd.pack` writes it. Not with `base`; can't be one either.
    progress: called with (bytes done, all bytes) a few times a second, in the thread that writes.

    Blocks for the pause alone. Raises ValueError, TypeError, OSError, Unavailable and SnapshotError; what goes wrong
    later is raised by `wait`.
    """
    _methods.require_core()
    named = {"array": arrays} if isinstance(arrays, np.ndarray) else _named(arrays)
    target = os.path.abspath(os.fsdecode(path))
    layout = _layout.plan(named)
    places = _memory.places_of(named)
    way = _methods.choose(method, places)
    _check_codec(compress, base)
    job = _Job(target, *_base_of(base, target, layout), compress)
    snapshot = Snapshot(target, layout, progress)
    try:
        _start(snapshot, job, named, places, way, base, memory_limit_bytes,
               method == "auto" and memory_limit_bytes is None)
        snapshot._thread = threading.Thread(target=snapshot._run, args=(job,), name="uffd-snapshot")
        snapshot._thread.start()
    except BaseException:
        job.close()
        raise
    return snapshot


def _start(snapshot: Snapshot, job: _Job, named: Mapping[str, np.ndarray], places: list[_memory.Place], way: str,
           base: Any, memory_limit_bytes: int | None, may_fork: bool) -> None:
    """The instant."""
    head = _files.Head(snapshot.id, snapshot._created_s, snapshot._layout, job.base)
    data_offset = 0 if job.base else head.data_offset
    os.ftruncate(job.scratch.fd, data_offset + snapshot._layout.nbytes)
    if way == "protect":
        try:
            job.writer = _protected(snapshot, job, named, places, data_offset, base, memory_limit_bytes)
        except (ValueError, Unavailable):
            # In use by another userfaultfd (a tracker, an image under way), or served inline: a fork can do it.
            if not may_fork or _methods.why_not_fork(places):
                raise
            job.previous, job.keeps = None, False
    if job.writer is None:
        job.writer = _methods.Fork(snapshot._layout, places, job.scratch.fd, data_offset)
    snapshot.instant_ns = job.writer.instant_ns


def _protected(snapshot: Snapshot, job: _Job, named: Mapping[str, np.ndarray], places: list[_memory.Place],
               data_offset: int, base: Any, memory_limit_bytes: int | None) -> _methods.Protect:
    """The next image of a series goes on with what the one before knows."""
    key = [(place.name, place.address, place.nbytes) for place in places]
    before = _series.pop(job.base.id, None) if job.base else None
    if before is not None and before._kept is not None and before._kept.key == key:
        job.previous, before._kept = before._kept, None
    job.keeps = base is not None
    limit = _MEMORY_LIMIT_BYTES if memory_limit_bytes is None else memory_limit_bytes
    return _methods.Protect(
        snapshot._layout, places, job.scratch.fd, data_offset, memory_limit_bytes=limit, keep=job.keeps,
        previous=job.previous, buffers=[_bytes_of(named[place.name]) for place in places])


def _named(arrays: Any) -> dict[str, np.ndarray]:
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays must be an array or a mapping of names to arrays, not {type(arrays).__name__}")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(f"array {name!r} is a {type(array).__name__}, not a numpy array: give a view of its memory "
                            "(torch: tensor.numpy())")
    return dict(arrays)


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """The array's own memory as bytes; keeps it alive."""
    return array.reshape(-1, order="C" if array.flags.c_contiguous else "F").view(np.uint8)


def _check_codec(compress: str | None, base: Any) -> None:
    if compress is None:
        return
    if base is not None and base is not FIRST:
        raise ValueError("compress and base don't go together: an incremental image is read page by page; "
                         "`uffd snapshot export --compress` makes one compressed file of a chain")
    from ..formats import frames, packing

    if compress not in packing._CODECS:
        raise ValueError(f"compress {compress!r} is not one of {', '.join(packing._CODECS)}")
    frames.require_blosc2()


def _base_of(base: Any, target: str, layout: _layout.Layout) -> tuple[_files.Base | None, Any]:
    """The base as it will stand in the file, and its chain. ValueError for one that does not fit."""
    if base is None or base is FIRST:
        return None, None
    if isinstance(base, Snapshot):
        base.wait()
    path = os.path.abspath(base.path if isinstance(base, Snapshot) else os.fsdecode(base))
    chain = _files.Chain(path)
    if chain.layout.key != layout.key:
        raise ValueError(f"{path}: its arrays are not those to be imaged (names, types, shapes and order must be the "
                         "same): take a whole image")
    if os.path.realpath(os.path.dirname(path)) != os.path.realpath(os.path.dirname(target)):
        raise ValueError(f"an incremental image lies beside its base: {os.path.dirname(path)}, not "
                         f"{os.path.dirname(target)}")
    for file in chain.files:
        if os.path.exists(target) and os.path.samefile(target, file.path):
            raise ValueError(f"{target} is part of the chain that the image would build upon: give it another name")
    return _files.Base(os.path.basename(path), chain.id), chain
