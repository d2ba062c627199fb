"""Opening an image: arrays whose bytes come on first touch, and the order of first touches, replayed ahead."""

from __future__ import annotations

import errno
import os
import threading
from typing import Any

import numpy as np

from .. import providers
from .._coreless import core as _core
from ..formats.serving import Serving
from ..formats.tensors import TensorMap
from . import _files, _layout, _touched
from ._files import Chain

_AHEAD_BYTES = 64 << 20                        # of the file, asked of the kernel's own read-ahead
_AHEAD_STEP_BYTES = 4 << 20


class ImageProvider(providers._NativeProvider):
    """The bytes of an image, through the chain of its files."""

    causes = {errno.EBADMSG: "the bytes are not those of their checksum: a file of the image is damaged, or another "
                             "program wrote to it (`uffd snapshot verify` finds all such places)"}

    def __init__(self, path: str, chain: Chain | None = None, copies: _touched.WorkingSet | None = None) -> None:
        chain = Chain(path) if chain is None else chain
        self._made = chain.filler(copies)
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
                 block_bytes: int | None = None, chain: Chain | None = None) -> None:
        super().__init__(path, {}, metadata, serving, lambda _part: self._made_region())
        self._entries = {entry.name: entry for entry in layout.entries}
        self._tensors: Any = self._entries     # what the mapping iterates over
        self._offsets, self._nbytes, self._id = offsets, nbytes, image_id
        self._make_provider, self._block_bytes, self._chain = make_provider, block_bytes, chain
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
        stored beside the image, in `path`.touched, and `load` brings them ahead of the program next time. If they are
        less than half of the image, so are their bytes. Call it when the program has its first result. OSError where
        the file can't be written; ValueError where the image is damaged."""
        region = self._regions.get(0)
        if region is None or not _records(region):
            return 0
        new = np.frombuffer(_core.touches(region), np.uint32)
        blocks = np.concatenate([self._replayed, new[new > 0] - np.uint32(1)]).astype("<u4")
        _, first = np.unique(blocks, return_index=True)
        blocks = blocks[np.sort(first)]
        _touched.save(self.path, self._id, region.block_bytes, blocks, self._chain)
        return len(blocks)

    def replay(self) -> Any:
        """Has the blocks of a stored working set brought in, in their order, in the background: a `Prefetch`; None
        where there is none that is whole and of this image."""
        found = _touched.read(self.path, self._id)
        if found is None or not len(found.blocks) or int(found.blocks.max()) * found.block_bytes >= self._nbytes:
            return None
        chain = self._chain
        if found.sums and chain is not None and not self._regions:
            self._make_provider = lambda: ImageProvider(self.path, chain, found)
        region = self._region(0)
        if not _records(region) or found.block_bytes != region.block_bytes:
            return None
        self._replayed = found.blocks
        runs = found.runs()
        if isinstance(region.provider, ImageProvider):
            within = np.cumsum(runs[:, 1] - runs[:, 0]) * found.block_bytes <= _AHEAD_BYTES
            ahead: Any = (_read_ahead, (found,)) if found.sums else (
                region.provider._made.ahead, (runs[within] * found.block_bytes,))
            threading.Thread(target=ahead[0], args=ahead[1], daemon=True, name="uffd-ahead").start()
        return region._prefetch(runs)


def _read_ahead(copies: _touched.WorkingSet) -> None:
    """Has the kernel read copies of blocks one behind the other."""
    try:
        fd = os.open(copies.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return                     # it is gone: a hint
    try:
        for at in range(0, min(copies.data_bytes, _AHEAD_BYTES), _AHEAD_STEP_BYTES):
            os.posix_fadvise(fd, copies.data_offset + at, _AHEAD_STEP_BYTES, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)


def _records(region: Any) -> bool:
    from ..eager import EagerRegion

    return not isinstance(region, EagerRegion)


# ---- what uffd.open finds -----------------------------------------------------------------------------------------


def open_local(path: str, serving: Serving) -> ImageMap:
    """An uncompressed image, and those it builds upon."""
    serving.refuse_writes(path, "an image, whose checksums would be wrong then")
    chain = Chain(path)
    offsets = {entry.name: entry.offset for entry in chain.layout.entries}
    return ImageMap(path, chain.id, chain.layout, offsets, chain.layout.nbytes, {}, serving,
                    lambda: ImageProvider(path, chain), _files.UNIT_BYTES, chain)


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
