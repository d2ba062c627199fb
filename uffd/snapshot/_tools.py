"""What can be done with images on disk: read about, verified, made one of a chain, compared."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .._coreless import core as _core
from ..formats import frames, recognise, safetensors
from ..formats.sources import LocalSource
from . import _files, _layout, _merging, _opening, _touched
from ._files import Chain
from ._target import Target

_PIECE_BYTES = 4 << 20             # a multiple of the unit and of every page


@dataclass(frozen=True)
class Info:
    """What is known of an image without reading its data. nbytes: of the arrays. data_bytes: of this file's data
    (compressed: of its file). chain: the files, this one first. working_set: blocks of a stored order of touches."""

    path: str
    id: str
    version: int
    created_s: float
    compressed: bool
    arrays: dict[str, dict[str, Any]]
    nbytes: int
    data_bytes: int
    chain: list[str]
    working_set: int

    def as_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts."""
        return asdict(self)

    def __str__(self) -> str:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.created_s))
        what = "compressed image" if self.compressed else "image" if len(self.chain) == 1 else "incremental image"
        lines = [f"{self.path}: {what} {self.id}, made {made}: {self.nbytes:,} bytes of arrays, "
                 f"{self.data_bytes:,} here"]
        lines += [f"  {name}: {a['dtype']} {tuple(a['shape'])}" + (", Fortran order" if a["order"] == "F" else "")
                  for name, a in self.arrays.items()]
        lines += [f"  builds upon {path}" for path in self.chain[1:]]
        return "\n".join(lines + ([f"  working set: {self.working_set:,} blocks"] if self.working_set else []))


class Packed:
    """A compressed image, read as it was before it was packed. It has the plain file's checksums, which `verify` looks
    at, and its own, in their compressed order, which each read is held against."""

    def __init__(self, path: str) -> None:
        schunk = frames._open_checked(path)
        text = frames._header_in(getattr(schunk, "schunk", schunk), frames.SAFETENSORS_HEADER, path)
        tensors, metadata = ({}, {}) if text is None else safetensors.parse_header(text, path, schunk.nbytes, gaps=True)
        if not _files.is_image(metadata):
            raise ValueError(f"{path}: a Blosc2 frame, but no image that uffd.snapshot wrote")
        _files.check_version(metadata, path)
        self.path, self.metadata = path, metadata
        self.id, self.created_s = _files._identity(metadata, path)
        self.layout = _layout.layout_from(metadata.get("uffd_arrays"), path)
        self.files: list[Any] = []
        self._tensors = tensors
        sums = frames._header_in(getattr(schunk, "schunk", schunk), frames.SUMS, path)
        if text is None or sums is None or len(sums) != -(-schunk.nbytes // _files.UNIT_BYTES) * 8:
            raise ValueError(f"{path}: damaged: a compressed image without its checksums")
        self._provider = _opening.PackedProvider(path, frames.sums_seed(text), sums)
        self._at = {e.name: tensors[e.name].offset for e in self.layout.entries if e.name in tensors}
        if len(self._at) != len(self.layout.entries):
            raise ValueError(f"{path}: damaged: arrays of its table are missing")

    def read(self, at: int, out: np.ndarray) -> None:
        """Bytes of the image; zeros between the arrays."""
        out[:] = 0
        for entry in self.layout.entries:
            low, high = max(at, entry.offset), min(at + len(out), entry.offset + entry.nbytes)
            if low < high:
                self._fill(self._at[entry.name] + low - entry.offset, out[low - at:high - at])

    def _fill(self, offset: int, out: np.ndarray) -> None:
        try:
            self._provider._made.fill_now(offset, out)
        except OSError as error:
            raise ValueError(f"{self.path}: damaged: bytes {offset} to {offset + len(out)} can't be decompressed, or "
                             "are not those of their checksums") from error

    def seal(self) -> tuple[int, np.ndarray]:
        """(seed, sums) of the plain file."""
        found = self._tensors.get(_files._SUMS)
        if found is None or found.nbytes != _files.seal_bytes(self.layout.nbytes):
            raise ValueError(f"{self.path}: damaged: no checksums, or not those of {self.layout.nbytes} bytes")
        data = np.empty(found.nbytes, np.uint8)
        self._fill(found.offset, data)
        front = _files._SEAL.unpack(data[:_files._SEAL.size].tobytes())
        if front[:4] != (_files._SEAL_MAGIC, _files.VERSION, _files.UNIT_BYTES, self.layout.nbytes):
            raise ValueError(f"{self.path}: damaged: its checksums begin with {front[0]!r}")
        return front[4], data[_files._SEAL.size:-_files._DIGEST_BYTES].view("<u8")


def image_at(path: str | os.PathLike[str]) -> Chain | Packed:
    """An image of either kind. ValueError for what is none."""
    name = recognise.local_path(path)
    kind = recognise.kind_of_local(name, LocalSource(name))
    if kind == "frame":
        return Packed(name)
    if kind != "safetensors":
        raise ValueError(f"{name}: no image that uffd.snapshot wrote, but {kind}")
    return Chain(name)


def info(path: str | os.PathLike[str]) -> Info:
    """An `Info`: arrays, sizes, chain. Reads headers and checksums, no data; ValueError as `uffd.open`."""
    image = image_at(path)
    packed = isinstance(image, Packed)
    arrays = {e.name: {"dtype": str(e.dtype), "shape": list(e.shape), "order": e.order, "nbytes": e.nbytes}
              for e in image.layout.entries}
    touched = _touched.read(image.path, image.id)
    created_s = image.created_s if isinstance(image, Packed) else image.files[0].created_s
    return Info(image.path, image.id, _files.VERSION, created_s, packed, arrays,
                sum(e.nbytes for e in image.layout.entries),
                os.stat(image.path).st_size if packed else image.files[0].data_bytes,
                [image.path] if packed else [file.path for file in image.files], len(touched.blocks) if touched else 0)


def verify(path: str | os.PathLike[str]) -> int:
    """How many bytes were read, of all files of the image, and found to be those of their checksums. ValueError naming
    file and place for the first that is not; OSError. Blocks for one pass over them."""
    image = image_at(path)
    if isinstance(image, Packed):
        return _verify_packed(image)
    total = 0
    for file in image.files:
        with open(file.path, "rb") as opened:
            expected, sums = np.frombuffer(file.sums, "<u8"), b""
            if os.fstat(opened.fileno()).st_size >= file.data_offset + file.data_bytes:
                sums = _core.image_sums(opened.fileno(), file.data_offset, file.data_bytes, file.seed)
        found = np.frombuffer(sums, "<u8")
        bad = np.flatnonzero(found != expected) if len(found) == len(expected) else np.zeros(1, int)
        if len(bad):
            _refuse_units(file.path, bad, file.data_offset)
        total += file.data_bytes
    return total


def _refuse_units(path: str, bad: np.ndarray, data_offset: int) -> None:
    at = data_offset + int(bad[0]) * _files.UNIT_BYTES
    raise ValueError(f"{path}: damaged: {len(bad)} of its pieces of {_files.UNIT_BYTES} bytes are not those of their "
                     f"checksums, the first at byte {at}")


def _verify_packed(image: Packed) -> int:
    seed, sums = image.seal()
    unit = _files.UNIT_BYTES
    bad = []
    for at in range(0, image.layout.nbytes, _PIECE_BYTES):
        data = np.empty(min(_PIECE_BYTES, image.layout.nbytes - at), np.uint8)
        image.read(at, data)
        for skip in range(0, len(data), unit):
            number = (at + skip) // unit
            if _core.image_sum(data[skip:skip + unit], seed, number) != sums[number]:
                bad.append(number)
    if bad:
        _refuse_units(image.path, np.array(bad), 0)
    return image.layout.nbytes


def export(src: str | os.PathLike[str], dst: str | os.PathLike[str], *, compress: str | None = None) -> str:
    """The number of the new image: `dst` is one whole file with all that the chain of `src` has, each byte checked on
    the way; compressed where `compress` names a codec. Written as `take` writes; `dst` may be any file but those of the
    chain. Blocks until it is durable. ValueError, OSError."""
    image = image_at(src)
    target_path = os.path.abspath(os.fsdecode(dst))
    for path in [image.path, *(file.path for file in image.files)]:
        if os.path.exists(target_path) and os.path.samefile(path, target_path):
            raise ValueError(f"{target_path} is part of the image itself: give the new one another name")
    layout = _layout.Layout(image.layout.entries, image.layout.nbytes, image.layout.align)
    head = _files.Head(uuid.uuid4().hex, time.time(), layout, None)
    with Target(target_path) as target:
        for at in range(0, layout.nbytes, _PIECE_BYTES):
            data = np.empty(min(_PIECE_BYTES, layout.nbytes - at), np.uint8)
            image.read(at, data)
            _files.write_sparse(target.fd, data.tobytes(), head.data_offset + at)
        os.ftruncate(target.fd, head.data_offset + layout.nbytes)
        _files.finish(target.fd, head, layout.nbytes, np.zeros((0, 2), np.uint64))
        if compress is None:
            target.publish()
        else:
            _merging.packed(target, target_path, compress)
    return head.id


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> dict[str, np.ndarray | None]:
    """Of each array that differs: int64 rows [from, to) of its bytes, in pages; None for one that only one of them has,
    or that has another type, shape or order there. Empty: the same. Blocks for one pass over both."""
    first, second = image_at(a), image_at(b)
    mine = {e.name: e for e in first.layout.entries}
    theirs = {e.name: e for e in second.layout.entries}
    out: dict[str, np.ndarray | None] = {}
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        x, y = mine.get(name), theirs.get(name)
        if x is None or y is None or (x.dtype, x.shape, x.order) != (y.dtype, y.shape, y.order):
            out[name] = None
            continue
        rows = _differences(first, x, second, y)
        if len(rows):
            out[name] = rows
    return out


def _differences(first: Any, x: _layout.Entry, second: Any, y: _layout.Entry) -> np.ndarray:
    page, rows = _layout.ALIGN_BYTES, []
    for at in range(0, x.nbytes, _PIECE_BYTES):
        n = min(_PIECE_BYTES, x.nbytes - at)
        pages = -(-n // page)
        mine, theirs = np.zeros(pages * page, np.uint8), np.zeros(pages * page, np.uint8)
        first.read(x.offset + at, mine[:n])
        second.read(y.offset + at, theirs[:n])
        differs = (mine.view(np.uint64) != theirs.view(np.uint64)).reshape(pages, -1).any(1)
        edges = np.flatnonzero(np.diff(differs, prepend=False, append=False)).reshape(-1, 2) * page + at
        rows += [(low, min(high, x.nbytes)) for low, high in edges.tolist()]
    return np.array(_merging._widened(rows, x.nbytes), np.int64).reshape(-1, 2)
