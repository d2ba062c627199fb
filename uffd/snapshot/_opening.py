"""Opening an image: arrays whose bytes come on first touch, and the order of first touches, replayed ahead."""

from __future__ import annotations

import errno
import hashlib
import struct
import threading
from typing import Any

import numpy as np

from .. import providers
from .._coreless import core as _core
from ..formats.serving import Serving
from ..formats.tensors import TensorMap
from . import _files, _layout
from ._files import Chain
from ._target import Target

_TOUCHED = struct.Struct("<8s32sQQ")
_TOUCHED_MAGIC = b"uffdtch1"
_SUFFIX = ".touched"
_FIRST_WINDOW, _LAST_WINDOW = 16, 1024         # blocks that are brought in one sweep
_AHEAD_BYTES = 64 << 20                        # of the file, asked of the kernel's own read-ahead


class ImageProvider(providers._NativeProvider):
    """The bytes of an image, through the chain of its files."""

    causes = {errno.EBADMSG: "the bytes are not those of their checksum: a file of the image is damaged, or another "
                             "program wrote to it (`uffd snapshot verify` finds all such places)"}

    def __init__(self, path: str, chain: Chain | None = None) -> None:
        chain = Chain(path) if chain is None else chain
        self._made = chain.filler()
        self.nbytes = chain.layout.nbytes
        self.title = f"image {path!r}" + (f" and {len(chain.files) - 1} that it builds upon" if chain.files[1:] else "")
        self._recipe = ((path,), {})


class PackedProvider(providers._NativeProvider):
    """The bytes of a compressed image, each piece of 64 KiB held against its checksum. (Where there is no core, nobody
    does that.)"""

    causes = {errno.EBADMSG: "the bytes are not those of their checksum: the compressed image is damaged "
                             "(`uffd snapshot verify` finds all such places)"}

    def __init__(self, path: str, seed: int, sums: bytes) -> None:
        frame = providers.Blosc2File(path)
        self._made = _core.Filler.summed(frame._made, seed, sums) if hasattr(_core, "ForkedImage") else frame._made
        self.nbytes = frame.nbytes
        self.title = f"compressed image {path!r}"
        self._recipe = ((path, seed, sums), {})


class ImageMap(TensorMap):
    """Read-only mapping of name to array of an image; its memory is one region, made when the first array is asked for.

    Each access gives a new array over the same memory. Safe to use from any thread."""

    def __init__(self, path: str, image_id: str, layout: _layout.Layout, offsets: dict[str, int], nbytes: int,
                 metadata: dict[str, Any], serving: Serving, make_provider: Any,
                 block_bytes: int | None = None) -> None:
        super().__init__(path, {}, metadata, serving, lambda _part: self._made_region())
        self._entries = {entry.name: entry for entry in layout.entries}
        self._tensors: Any = self._entries     # what the mapping iterates over
        self._offsets, self._nbytes, self._id = offsets, nbytes, image_id
        self._make_provider, self._block_bytes = make_provider, block_bytes
        self._replayed = np.zeros(0, np.uint32)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if not entry.nbytes:
            return self._serving.empty(entry.dtype, entry.shape, entry.order)
        order: Any = entry.order
        return self._region(0).array(entry.dtype, entry.shape, offset=self._offsets[name], order=order)

    def __repr__(self) -> str:
        shown = [f"{e.name!r}: {e.dtype}{list(e.shape)}" for e in list(self._entries.values())[:8]]
        more = [f"... {len(self) - 8} more"] if len(self) > 8 else []
        return f"<image {self.path!r}: {{{', '.join(shown + more)}}}>"

    def _made_region(self) -> Any:
        region = self._serving.region(self._nbytes, self._make_provider(), self.path, self._block_bytes)
        if _records(region):
            _core.record_touches(region)
        return region

    # ---- the working set ----

    def save_working_set(self) -> int:
        """How many blocks came by touches until now, in this process and those it was replayed from: their order is
        stored beside the image, in `path`.touched, and `load` brings them ahead of the program next time. Call it when
        the program has its first result. OSError where the file can't be written."""
        region = self._regions.get(0)
        if region is None or not _records(region):
            return 0
        new = np.frombuffer(_core.touches(region), np.uint32)
        blocks = np.concatenate([self._replayed, new[new > 0] - np.uint32(1)]).astype("<u4")
        _, first = np.unique(blocks, return_index=True)
        blocks = blocks[np.sort(first)]
        head = _TOUCHED.pack(_TOUCHED_MAGIC, self._id.encode(), region.block_bytes, len(blocks))
        data = head + blocks.tobytes()
        with Target(self.path + _SUFFIX) as target:
            _files.write_all(target.fd, data + hashlib.blake2b(data, digest_size=16).digest(), 0)
            target.publish()
        return len(blocks)

    def replay(self) -> Any:
        """Has the blocks of a stored working set brought in, in their order, in the background: a `Prefetch`; None
        where there is none that is whole and of this image."""
        found = working_set(self.path, self._id)
        if found is None or not self._nbytes:
            return None
        region = self._region(0)
        if not _records(region):
            return None
        block_bytes, self._replayed = found
        if block_bytes != region.block_bytes:
            return None
        count = -(-region.nbytes // block_bytes)
        blocks = self._replayed[self._replayed < count].astype(np.int64)
        runs = _windows(blocks)
        if isinstance(region.provider, ImageProvider):
            within = np.cumsum(runs[:, 1] - runs[:, 0]) * block_bytes <= _AHEAD_BYTES
            threading.Thread(target=region.provider._made.ahead, args=(runs[within] * block_bytes,), daemon=True,
                             name="uffd-ahead").start()
        return region._prefetch(runs)


def _records(region: Any) -> bool:
    from ..eager import EagerRegion

    return not isinstance(region, EagerRegion)


def working_set(path: str, image_id: str) -> tuple[int, np.ndarray] | None:
    """(block bytes, blocks in their order), None where there is none, or it is damaged or of another image: it is a
    hint."""
    try:
        with open(path + _SUFFIX, "rb") as file:
            data = file.read()
    except OSError:
        return None
    if len(data) < _TOUCHED.size + 16 or hashlib.blake2b(data[:-16], digest_size=16).digest() != data[-16:]:
        return None
    magic, number, block_bytes, count = _TOUCHED.unpack_from(data)
    if magic != _TOUCHED_MAGIC or number != image_id.encode() or len(data) != _TOUCHED.size + 4 * count + 16:
        return None
    return block_bytes, np.frombuffer(data[_TOUCHED.size:-16], "<u4")


def _windows(blocks: np.ndarray) -> np.ndarray:
    """Runs of neighbours: sorted within windows that grow, so that the first blocks come first and the rest in large
    pieces."""
    out, at, window = [], 0, _FIRST_WINDOW
    while at < len(blocks):
        piece = np.sort(blocks[at:at + window])
        edges = np.flatnonzero(np.diff(piece, prepend=-2) != 1)
        ends = np.append(edges[1:], len(piece))
        out.append(np.stack([piece[edges], piece[ends - 1] + 1], 1))
        at, window = at + window, min(window * 2, _LAST_WINDOW)
    return np.concatenate(out) if out else np.zeros((0, 2), np.int64)


# ---- what uffd.open finds -----------------------------------------------------------------------------------------


def open_local(path: str, serving: Serving) -> ImageMap:
    """An uncompressed image, and those it builds upon."""
    serving.refuse_writes(path, "an image, whose checksums would be wrong then")
    chain = Chain(path)
    offsets = {entry.name: entry.offset for entry in chain.layout.entries}
    return ImageMap(path, chain.id, chain.layout, offsets, chain.layout.nbytes, {}, serving,
                    lambda: ImageProvider(path, chain), _files.UNIT_BYTES)


def open_parts(path: str, metadata: dict[str, str], tensors: Any, nbytes: int, serving: Serving, make_provider: Any,
               block_bytes: int | None = None) -> ImageMap:
    """A whole image whose bytes come from elsewhere: a Blosc2 frame, which has sums of its own, or a URL, whose bytes
    nothing checks but what brings them."""
    _files.check_version(metadata, path)
    layout = _layout.layout_from(metadata.get("uffd_arrays"), path)
    if "uffd_base" in metadata:
        raise ValueError(f"{path}: an incremental image can't be opened by a URL: it needs the files that it builds "
                         "upon beside it")
    for entry in layout.entries:
        found = tensors.get(entry.name)
        if found is None or (found.code, found.nbytes) != (entry.code, entry.nbytes):
            raise ValueError(f"{path}: damaged: array {entry.name!r} is not as its table of arrays has it")
    offsets = {entry.name: tensors[entry.name].offset for entry in layout.entries}
    return ImageMap(path, metadata.get("uffd_id", "").ljust(32)[:32], layout, offsets, nbytes, {}, serving,
                    make_provider, block_bytes)
