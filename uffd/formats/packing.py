"""Packing: the bytes of an array or of tensors, streamed into one compressed Blosc2 frame.

The frame keeps the order of bytes, so that a range of the array is a range of the super-chunk. Its item size is one
for all chunks, since readers count by it, and it decides how Blosc2 splits shuffled bytes into streams. The width of
the shuffle is each chunk's own: tensors of unequal item size therefore lie in different chunks.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .._coreless import core as _core
from . import frames, npy, recognise, safetensors
from .sources import LocalSource
from .tensors import bits_of

BLOCK_BYTES = 1 << 16  # the region's default block: one fill decodes one block
_CHUNK_BYTES_MIN = 1 << 20
_CHUNK_BYTES_MAX = 1 << 24
_CHUNKS_MAX = 1 << 15  # appending rewrites the table of chunks: let it stay small
_SMALL_ALIGN_BYTES = 64  # a cache line, the widest vector
_SPLIT_WIDTH_MAX = 16  # Blosc2 splits up to this item size
_SHUFFLE_WIDTH_MAX = 255
_CODECS = {"zstd": "ZSTD", "lz4": "LZ4", "lz4hc": "LZ4HC", "blosclz": "BLOSCLZ", "zlib": "ZLIB"}

Progress = Callable[[str, int, int], None]  # stage "compress" or "verify", bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a source file and where they go in the super-chunk."""

    path: str
    source_offset: int
    nbytes: int
    offset: int
    width: int  # bytes to shuffle by: the item size


@dataclass(frozen=True, slots=True)
class Plan:
    """What a frame will hold. Extents lie in the order of their offsets; no chunk holds two widths."""

    extents: tuple[Extent, ...]
    nbytes: int
    itemsize: int
    chunk_bytes: int
    header_name: str
    header: bytes
    summed: bool = False  # an image of memory: each 64 KiB have a checksum, which Blosc2 has not


def pack_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    codec: str = "zstd",
    level: int = 5,
    progress: Progress | None = None,
) -> None:
    """`uffd.pack`, with a callback for progress, called after each chunk."""
    source, target = recognise.local_path(src), recognise.local_path(dst)
    if codec not in _CODECS:
        raise ValueError(f"codec {codec!r} is not one of {', '.join(_CODECS)}")
    if type(level) is not int or not 0 <= level <= 9:
        raise ValueError(f"level {level!r} is not an integer from 0 to 9")
    blosc2 = frames.require_blosc2()
    plan = _plan(source)
    _check_target(target, plan, source)
    temporary = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        checksums = _write_frame(blosc2, plan, temporary, codec=codec, level=level, progress=progress)
        _verify(blosc2, plan, temporary, checksums, progress)
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync(os.path.dirname(target) or ".")  # the rename itself


def _check_target(target: str, plan: Plan, source: str) -> None:
    if os.path.isdir(target):
        raise IsADirectoryError(f"{target!r} is a directory; pack writes one file")
    directory = os.path.dirname(target) or "."
    if not os.path.isdir(directory):
        raise FileNotFoundError(f"no directory {directory!r} to write {target!r} in")
    sources = {extent.path for extent in plan.extents} | {source}
    if os.path.exists(target) and any(os.path.samefile(target, path) for path in sources):
        raise ValueError(f"{target!r} is the source itself")


def _plan(source: str) -> Plan:
    kind = recognise.kind_of_local(source, LocalSource(source))
    if kind == "zarr":
        raise ValueError(f"{source}: a zarr store, whose chunks are compressed already")
    if kind == "frame":
        raise ValueError(f"{source}: already a Blosc2 frame")
    return _plan_npy(source) if kind == "npy" else _plan_tensors(source, kind)


def _plan_npy(source: str) -> Plan:
    with open(source, "rb") as file:
        header = npy.read_header(file, source)
        npy.check_length(header, os.fstat(file.fileno()).st_size, source)
        file.seek(0)
        text = file.read(header.data_offset)
    width = header.dtype.itemsize
    extents = (Extent(source, header.data_offset, header.nbytes, 0, width),) if header.nbytes else ()
    return Plan(extents, header.nbytes, _frame_itemsize(width), _chunk_bytes(header.nbytes), frames.NPY_HEADER, text)


def _plan_tensors(source: str, kind: str) -> Plan:
    """Large tensors begin at a block, so that none shares a block with another; small ones at a cache line."""
    catalogue = safetensors.read_catalogue(LocalSource(source), kind)
    widths = {name: max(1, (bits_of(tensor.code) or 8) // 8) for name, tensor in catalogue.tensors.items()}
    # Wide items first, as the format's own writer sorts them, else as they lie in the files.
    ordered = sorted(catalogue.tensors.items(), key=lambda item: (-widths[item[0]], item[1].part, item[1].offset))
    chunk_bytes = _chunk_bytes(sum(tensor.nbytes for tensor in catalogue.tensors.values()))
    weights: Counter[int] = Counter()
    extents = []
    entries: dict[str, Any] = {}
    offset, chunk_width = 0, 0
    for name, tensor in ordered:
        width = widths[name]
        if tensor.nbytes:
            align = BLOCK_BYTES if tensor.nbytes >= BLOCK_BYTES else _SMALL_ALIGN_BYTES
            offset = _round_up(offset, align if width == chunk_width else chunk_bytes)
            part = catalogue.parts[tensor.part]
            extents.append(Extent(part.path, part.data_offset + tensor.offset, tensor.nbytes, offset, width))
            chunk_width = width
            weights[width] += tensor.nbytes
        entries[name] = {"dtype": tensor.code, "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    itemsize = _frame_itemsize(weights.most_common(1)[0][0] if weights else 1)
    header = {"__metadata__": {key: _text(value) for key, value in catalogue.metadata.items()}}
    header |= {name: entries[name] for name in catalogue.tensors}  # the order that the user knows
    text = json.dumps(header, separators=(",", ":")).encode()
    nbytes = _round_up(offset, _SMALL_ALIGN_BYTES)
    return Plan(tuple(extents), nbytes, itemsize, chunk_bytes, frames.SAFETENSORS_HEADER, text,
                "uffd_snapshot" in catalogue.metadata)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _round_up(offset: int, align: int) -> int:
    return -(-offset // align) * align


def _chunk_bytes(nbytes: int) -> int:
    chunk_bytes = _CHUNK_BYTES_MIN
    while chunk_bytes < _CHUNK_BYTES_MAX and nbytes > chunk_bytes * _CHUNKS_MAX:
        chunk_bytes *= 2
    return chunk_bytes


def _frame_itemsize(width: int) -> int:
    """Item sizes that do not divide the block would shift Blosc2's blocks against the region's: count in bytes."""
    return width if 0 < width <= _SPLIT_WIDTH_MAX and BLOCK_BYTES % width == 0 else 1


def _write_frame(
    blosc2: Any, plan: Plan, path: str, *, codec: str, level: int, progress: Progress | None
) -> list[int]:
    """Write the frame; the checksum of each chunk's plain bytes."""

    def parameters(width: int) -> Any:
        return blosc2.CParams(
            codec=blosc2.Codec[_CODECS[codec]],
            clevel=level,
            typesize=plan.itemsize,
            blocksize=BLOCK_BYTES,
            filters=[blosc2.Filter.SHUFFLE],
            filters_meta=[width if width <= _SHUFFLE_WIDTH_MAX else 1],
            nthreads=_compression_threads(),
        )

    current_width = plan.extents[0].width if plan.extents else 1
    checksums: list[int] = []
    sums: list[int] = []
    done_bytes = 0
    try:
        schunk = blosc2.SChunk(
            chunksize=plan.chunk_bytes, cparams=parameters(current_width), urlpath=path, mode="w", contiguous=True
        )
        for width, data in _chunks(plan):
            if width != current_width:
                schunk.cparams = parameters(width)
                current_width = width
            schunk.append_data(data)
            checksums.append(zlib.crc32(data))
            if plan.summed:
                seed = frames.sums_seed(plan.header)
                sums += [_core.image_sum(data[at : at + BLOCK_BYTES], seed, (done_bytes + at) // BLOCK_BYTES)
                         for at in range(0, len(data), BLOCK_BYTES)]
            done_bytes += len(data)
            if progress is not None:
                progress("compress", done_bytes, plan.nbytes)
        if plan.summed:
            schunk.vlmeta[frames.SUMS] = struct.pack(f"<{len(sums)}Q", *sums)
        schunk.vlmeta[plan.header_name] = plan.header  # last: each append rewrites what follows the chunks
    except RuntimeError as error:  # all the library says of a full disk, too
        raise OSError(f"{path}: Blosc2 could not write after {done_bytes} of {plan.nbytes} bytes: {error}") from error
    return checksums


def _compression_threads() -> int:
    return len(os.sched_getaffinity(0))


def _chunks(plan: Plan) -> Iterator[tuple[int, memoryview]]:
    """Each chunk's shuffle width and bytes, in a buffer that the next chunk overwrites; gaps are zeros."""
    buffer = bytearray(min(plan.chunk_bytes, plan.nbytes))
    number = 0
    width = 1
    with _OpenFile() as source:
        for extent in plan.extents:
            done = 0
            while done < extent.nbytes:
                chunk, start = divmod(extent.offset + done, plan.chunk_bytes)
                if chunk > number:
                    yield width, memoryview(buffer)
                    buffer[:] = bytes(len(buffer))
                    number += 1
                width = extent.width
                length = min(plan.chunk_bytes - start, extent.nbytes - done)
                source.read_into(extent.path, extent.source_offset + done, memoryview(buffer)[start : start + length])
                done += length
    if plan.nbytes:
        yield width, memoryview(buffer)[: plan.nbytes - number * plan.chunk_bytes]


class _OpenFile:
    """The one source file that is open; extents come file by file."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._fd = -1

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, path: str, offset: int, out: memoryview) -> None:
        if path != self._path:
            self._close()
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._path = path
        done = 0
        while done < len(out):
            count = os.preadv(self._fd, [out[done:]], offset + done)
            if count == 0:
                raise OSError(f"{path}: ends at byte {offset + done}, while {len(out) - done} more were expected")
            done += count


def _verify(
    blosc2: Any, plan: Plan, path: str, checksums: list[int], progress: Progress | None
) -> None:
    """Read the frame back: a write that failed late leaves no trace in Blosc2's own return codes."""
    try:
        schunk = blosc2.open(path, mode="r")
        header = schunk.vlmeta[plan.header_name]
        sizes = (schunk.nbytes, schunk.nchunks)
        done_bytes = 0
        for number, checksum in enumerate(checksums):
            data = schunk.decompress_chunk(number)
            if zlib.crc32(data) != checksum:
                raise OSError(f"{path}: chunk {number} does not read back as it was written")
            done_bytes += len(data)
            if progress is not None:
                progress("verify", done_bytes, plan.nbytes)
    except (RuntimeError, KeyError, FileNotFoundError) as error:
        raise OSError(f"{path}: what was written does not read back (is the disk full?): {error}") from error
    if sizes != (plan.nbytes, len(checksums)) or header != plan.header:
        raise OSError(f"{path}: what was written does not read back: {sizes} for {plan.nbytes}, {len(checksums)}")


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
