"""The files of an image: how their bytes are laid out, checked in full before use, and joined to a chain.

    8 bytes       the header's length, little-endian
    header        JSON, as .safetensors has it, padded with blanks to a page
    data          a whole image: its arrays, each from a page on; an incremental one: what was written, in pieces
    extents       incremental only: pairs of 64-bit words, where each piece belongs in the image and how long it is
    seal          magic, version, unit, data bytes, seed, extents; a 64-bit sum per unit of the data; BLAKE2b-128 of
                  header, extents and all of the seal before it

The sizes of all that are known before the data, so that these are written where they stay; the header and the seal come
last. What the sums are is said in _imagefile.h.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._coreless import core as _core
from ..formats import safetensors
from ..formats.sources import LocalSource
from . import _layout
from ._layout import Layout

VERSION = 1
UNIT_BYTES = 1 << 16               # IMAGE_UNIT of _imagefile.h
_SEAL_MAGIC = b"uffdseal"
_SEAL = struct.Struct("<8sIIQQQ")
_DIGEST_BYTES = 16
_CHAIN_MAX = 1 << 12
_DELTA, _EXTENTS, _SUMS = "__uffd_delta__", "__uffd_extents__", "__uffd_seal__"
_WIDEST = 10**18                   # any number of bytes takes at most so many digits


@dataclass(frozen=True, slots=True)
class Base:
    """What an incremental image builds upon: a file beside it."""

    name: str
    id: str


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file, checked but for its data."""

    path: str
    id: str
    created_s: float
    layout: Layout
    base: Base | None
    data_offset: int
    data_bytes: int
    file_bytes: int
    seed: int
    sums: bytes
    extents: np.ndarray            # (n, 2) of uint64: at, nbytes; of a whole image one that covers it


# ---- writing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """What a file's header will say, but for the sizes of an incremental one."""

    id: str
    created_s: float
    layout: Layout
    base: Base | None

    @property
    def seed(self) -> int:
        return int(self.id[:16], 16)

    @property
    def data_offset(self) -> int:
        """Where the data will begin: known before them."""
        widest = _WIDEST if self.base else self.layout.nbytes
        return 8 + self._header_bytes(self._tensors(widest, widest // 16 if self.base else 0))

    def header(self, data_bytes: int, extents: int) -> bytes:
        text = self._text(self._tensors(data_bytes, extents))
        return (self.data_offset - 8).to_bytes(8, "little") + text.ljust(self.data_offset - 8)

    def _header_bytes(self, tensors: dict[str, Any]) -> int:
        return _layout.round_up(8 + len(self._text(tensors)), self.layout.align) - 8

    def _text(self, tensors: dict[str, Any]) -> bytes:
        base = {"uffd_base": self.base.name, "uffd_base_id": self.base.id} if self.base else {}
        metadata = {"uffd_snapshot": str(VERSION), "uffd_id": self.id, "uffd_created": f"{self.created_s:017.6f}",
                    **base, "uffd_arrays": _layout.table_of(self.layout)}
        return json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()

    def _tensors(self, data_bytes: int, extents: int) -> dict[str, Any]:
        if self.base:
            sizes, out, end = {_DELTA: data_bytes, _EXTENTS: extents * 16}, {}, 0
            for name, nbytes in sizes.items():
                out[name] = _bytes_at(end, nbytes)
                end += nbytes
        else:
            out, end = _whole_tensors(self.layout), self.layout.nbytes
        return {**out, _SUMS: _bytes_at(end, seal_bytes(data_bytes))}


def _whole_tensors(layout: Layout) -> dict[str, Any]:
    """The arrays, and tensors of bytes in the gaps that the format does not allow."""
    out: dict[str, Any] = {}
    for number, entry in enumerate(layout.entries):
        end = entry.offset + entry.nbytes
        out[entry.name] = {"dtype": entry.code, "shape": list(entry.tensor_shape), "data_offsets": [entry.offset, end]}
        gap = _layout.round_up(end, layout.align) - end
        if gap:
            out[f"{_layout.PAD_PREFIX}{number}"] = _bytes_at(end, gap)
    return out


def _bytes_at(offset: int, nbytes: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [nbytes], "data_offsets": [offset, offset + nbytes]}


def seal_bytes(data_bytes: int) -> int:
    return _SEAL.size + -(-data_bytes // UNIT_BYTES) * 8 + _DIGEST_BYTES


def finish(fd: int, head: Head, data_bytes: int, extents: np.ndarray) -> int:
    """Writes what belongs around data that are in the file; its length. OSError."""
    pairs = np.ascontiguousarray(extents, "<u8").tobytes() if head.base else b""
    end = head.data_offset + data_bytes + len(pairs) + seal_bytes(data_bytes)
    os.ftruncate(fd, end)
    sums = _core.image_sums(fd, head.data_offset, data_bytes, head.seed)
    header = head.header(data_bytes, len(pairs) // 16)
    front = _SEAL.pack(_SEAL_MAGIC, VERSION, UNIT_BYTES, data_bytes, head.seed, len(pairs) // 16)
    at = head.data_offset + data_bytes
    write_sparse(fd, pairs, at)
    write_sparse(fd, front + sums + _digest(header, pairs, front, sums), at + len(pairs))
    write_all(fd, header, 0)
    return end


def _digest(header: bytes, pairs: bytes, front: bytes, sums: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in (header, pairs, front, sums):
        digest.update(part)
    return digest.digest()


def write_all(fd: int, data: Any, offset: int) -> None:
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def write_sparse(fd: int, data: bytes, offset: int) -> None:
    """Leaves long runs of zeros out: an image of a huge array that was hardly written has a table that is mostly 0."""
    view, zeros = memoryview(data), bytes(UNIT_BYTES)
    for at in range(0, len(view), UNIT_BYTES):
        piece = view[at:at + UNIT_BYTES]
        if piece != zeros[:len(piece)]:
            write_all(fd, piece, offset + at)


# ---- reading ------------------------------------------------------------------------------------------------------


def is_image(metadata: Any) -> bool:
    return "uffd_snapshot" in metadata


def check_version(metadata: Any, path: str) -> None:
    if metadata["uffd_snapshot"] != str(VERSION):
        raise ValueError(f"{path}: an image of version {metadata['uffd_snapshot'][:20]!r} of the format; this uffd "
                         f"reads version {VERSION}")


def read_file(path: str) -> ImageFile:
    """The file, everything but its data checked. ValueError for what is no image, or is damaged or truncated."""
    part, tensors, metadata = safetensors._read_part(LocalSource(path))
    if not is_image(metadata):
        raise ValueError(f"{path}: a .safetensors file, but no image that uffd.snapshot wrote")
    check_version(metadata, path)
    number, created_s = _identity(metadata, path)
    layout = _layout.layout_from(metadata.get("uffd_arrays"), path)
    base = _base_of(metadata, path)
    seal = tensors.get(_SUMS)
    with open(path, "rb") as file:
        header = file.read(part.data_offset)
        data_bytes, pairs, front, rest = _read_seal(file, part, tensors, path)
        file_bytes = os.fstat(file.fileno()).st_size
    sums, digest = rest[:-_DIGEST_BYTES], rest[-_DIGEST_BYTES:]
    if seal is None or _digest(header, pairs, front, sums) != digest:
        raise ValueError(f"{path}: damaged: its header or its checksums are not those that were written")
    expected = Head(number, created_s, layout, base)._tensors(data_bytes, len(pairs) // 16)
    found = {name: (t.code, t.shape, t.offset, t.nbytes) for name, t in tensors.items()}
    if found != {name: _found(entry) for name, entry in expected.items()}:
        raise ValueError(f"{path}: damaged: its tensors are not those of its table of arrays")
    return ImageFile(path, number, created_s, layout, base, part.data_offset, data_bytes, file_bytes,
                     _SEAL.unpack(front)[4], sums, _extents_of(pairs, base, layout, data_bytes, path))


def _identity(metadata: Any, path: str) -> tuple[str, float]:
    number, created = metadata.get("uffd_id", ""), metadata.get("uffd_created", "")
    if not re.fullmatch("[0-9a-f]{32}", number) or not re.fullmatch(r"[0-9]{10}\.[0-9]{6}", created):
        raise ValueError(f"{path}: damaged: an image with the number {number[:40]!r}, made at {created[:40]!r}")
    return number, float(created)


def _found(entry: dict[str, Any]) -> tuple[Any, ...]:
    begin, end = entry["data_offsets"]
    return entry["dtype"], tuple(entry["shape"]), begin, end - begin


def _read_seal(file: Any, part: Any, tensors: Any, path: str) -> tuple[int, bytes, bytes, bytes]:
    """(data bytes, extents, front of the seal, its rest); sizes are held against the file's before they are read."""
    seal = tensors.get(_SUMS)
    if seal is None or seal.code != "U8" or seal.nbytes < _SEAL.size + _DIGEST_BYTES:
        raise ValueError(f"{path}: damaged: no checksums in an image")
    file.seek(part.data_offset + seal.offset)
    front = file.read(_SEAL.size)
    magic, version, unit, data_bytes, _, extents = _SEAL.unpack(front)
    if magic != _SEAL_MAGIC or version != VERSION or unit != UNIT_BYTES:
        raise ValueError(f"{path}: damaged: its checksums begin with {magic!r}, version {version}, unit {unit}")
    if data_bytes + extents * 16 != seal.offset or seal.nbytes != seal_bytes(data_bytes):
        raise ValueError(f"{path}: damaged: checksums for {data_bytes} bytes and {extents} extents before byte "
                         f"{seal.offset}, in {seal.nbytes} bytes")
    rest = file.read(seal.nbytes - _SEAL.size)
    file.seek(part.data_offset + data_bytes)
    return data_bytes, file.read(extents * 16), front, rest


def _base_of(metadata: Any, path: str) -> Base | None:
    name, number = metadata.get("uffd_base"), metadata.get("uffd_base_id")
    if name is None and number is None:
        return None
    # An image may come from anywhere; what it builds upon lies beside it and nowhere else.
    if not name or not number or name in (".", "..") or os.path.basename(name) != name or "\0" in name:
        raise ValueError(f"{path}: damaged: it builds upon {name!r}, which is no file beside it")
    return Base(name, number)


def _extents_of(pairs: bytes, base: Base | None, layout: Layout, data_bytes: int, path: str) -> np.ndarray:
    if base is None:
        if pairs or data_bytes != layout.nbytes:
            raise ValueError(f"{path}: damaged: {data_bytes} bytes for arrays of {layout.nbytes}")
        return np.array([[0, layout.nbytes]], np.uint64)[:1 if layout.nbytes else 0]
    extents = np.frombuffer(pairs, "<u8").reshape(-1, 2).astype(np.uint64)
    at, nbytes = extents[:, 0], extents[:, 1]
    limit = np.uint64(layout.nbytes)
    if (len(extents) and ((at > limit).any() or (nbytes > limit - np.minimum(at, limit)).any() or not nbytes.all()
                          or (at[1:] < at[:-1] + nbytes[:-1]).any())) or int(nbytes.sum()) != data_bytes:
        raise ValueError(f"{path}: damaged: its extents overlap, or leave the image or its data")
    return extents


# ---- chains -------------------------------------------------------------------------------------------------------


class Chain:
    """An image as its files have it together: the newest first."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files = [read_file(path)]
        while self.files[-1].base is not None:
            self.files.append(_next(self.files, path))
        self.layout = self.files[0].layout
        self.id = self.files[0].id
        self._filler: Any = None
        self.extents = np.zeros((0, 4), np.uint64)
        for number in reversed(range(len(self.files))):
            self.extents = _overlaid(self.extents, _placed(self.files[number].extents, number))

    def filler(self, copies: Any = None) -> Any:
        """The core's reader of it, each piece against its checksum. copies: a `WorkingSet` of it with bytes, which are
        read in the place of those in the files as long as they are whole. OSError; ValueError where a file was
        replaced."""
        fds: list[int] = []
        extents, under = self.extents, b""
        try:
            for file in self.files:
                fds.append(os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))
                if os.fstat(fds[-1]).st_size != file.file_bytes:
                    raise ValueError(f"{file.path}: changed while it was opened")
            rows = [(fd, file.data_offset, file.data_bytes, file.seed, file.sums)
                    for fd, file in zip(fds, self.files, strict=True)]
            if copies is not None and os.path.exists(copies.path):
                fds.append(os.open(copies.path, os.O_RDONLY | os.O_CLOEXEC))
                rows.append((fds[-1], copies.data_offset, copies.data_bytes, copies.seed, copies.sums))
                extents = _overlaid(extents, copies.extents(self.layout.nbytes, len(self.files)))
                under = self.extents.tobytes()
            return _core.Filler.image(rows, extents.tobytes(), self.layout.nbytes, under)
        finally:
            for fd in fds:
                os.close(fd)

    def read(self, at: int, out: np.ndarray) -> None:
        """Bytes of the image from `at` on, checked. ValueError naming the file for those that are damaged."""
        if self._filler is None:
            self._filler = self.filler()
        try:
            self._filler.fill_now(at, out)
        except OSError as error:
            names = sorted({os.path.basename(self.files[int(f)].path) for _, _, f, _ in self.pieces(at, len(out))})
            raise ValueError(f"{self.path}: damaged: bytes {at} to {at + len(out)} of the image: in "
                             f"{', '.join(names)} they are not those of their checksum, or the file is cut") from error

    def pieces(self, at: int, nbytes: int) -> Iterator[tuple[int, int, int, int]]:
        """Where a range lies: (at, nbytes, number of the file, offset in its data)."""
        starts = self.extents[:, 0]
        first = max(0, int(np.searchsorted(starts, at, "right")) - 1)
        for row in self.extents[first:int(np.searchsorted(starts, at + nbytes))].tolist():
            yield tuple(row)


def _next(files: list[ImageFile], path: str) -> ImageFile:
    base = files[-1].base
    assert base is not None
    if len(files) == _CHAIN_MAX:
        raise ValueError(f"{path}: a chain of more than {_CHAIN_MAX} images: `uffd snapshot export` makes one of them")
    name = os.path.join(os.path.dirname(files[-1].path), base.name)
    try:
        found = read_file(name)
    except FileNotFoundError:
        raise FileNotFoundError(f"{files[-1].path} builds upon {name}, which is not there") from None
    if found.id != base.id:
        raise ValueError(f"{files[-1].path} builds upon the image {base.id}, and {name} is another one now "
                         f"({found.id})")
    if found.layout != files[0].layout or found.id in {file.id for file in files}:
        raise ValueError(f"{files[-1].path}: damaged: {name}, which it builds upon, has other arrays, or is itself")
    return found


def _placed(extents: np.ndarray, file: int) -> np.ndarray:
    """With the file's number, and where each lies in its data: one behind the other."""
    out = np.zeros((len(extents), 4), np.uint64)
    out[:, :2] = extents
    out[:, 2] = file
    out[1:, 3] = np.cumsum(extents[:-1, 1], dtype=np.uint64)
    return out


def _overlaid(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The extents of `old` with those of `new` in front."""
    if not len(new):
        return old
    rows = np.concatenate([old, new])
    edges = np.unique(np.concatenate([rows[:, 0], rows[:, 0] + rows[:, 1]]))
    out = np.zeros((len(edges) - 1, 4), np.uint64)
    out[:, 0], out[:, 1] = edges[:-1], np.diff(edges)
    held = np.zeros(len(out), bool)
    for rows in (old, new):
        if len(rows):
            index = np.searchsorted(rows[:, 0], out[:, 0], "right").astype(np.int64) - 1
            row = rows[np.maximum(index, 0)]
            inside = (index >= 0) & (out[:, 0] < row[:, 0] + row[:, 1])
            out[inside, 2] = row[inside, 2]
            out[inside, 3] = (row[:, 3] + (out[:, 0] - row[:, 0]))[inside]
            held |= inside
    return _joined(out[held])


def _joined(rows: np.ndarray) -> np.ndarray:
    """Neighbours that lie so in their file, too, as one."""
    follows = ((rows[1:, 0] == rows[:-1, 0] + rows[:-1, 1]) & (rows[1:, 2] == rows[:-1, 2])
               & (rows[1:, 3] == rows[:-1, 3] + rows[:-1, 1]))
    first = np.flatnonzero(np.concatenate([[True], ~follows]))
    out = rows[first]
    out[:, 1] = np.add.reduceat(rows[:, 1], first)
    return out
