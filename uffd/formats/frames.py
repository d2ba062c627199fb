"""Contiguous Blosc2 frames: plain super-chunks, .b2nd arrays and what `pack` writes."""

from __future__ import annotations

import hashlib
import io
import os
from types import ModuleType
from typing import Any

import numpy as np

from .. import providers
from . import npy, safetensors
from .serving import Serving
from .tensors import TensorMap

# Names, in a packed frame's variable-length metadata, of the header of the file it was made from.
NPY_HEADER = "uffd_npy_header"
SAFETENSORS_HEADER = "uffd_safetensors_header"
SUMS = "uffd_sums"  # of an image of memory: 64 bits for each 64 KiB of the super-chunk

_LENGTH_AT = 16  # big-endian 64-bit length of the frame, after its msgpack tag
_BLOCK_BYTES_MIN = 1 << 16
_BLOCK_BYTES_MAX = 1 << 22


def require_blosc2() -> ModuleType:
    try:
        import blosc2
    except ImportError as error:
        raise ImportError('Blosc2 files need the package blosc2: pip install "pyuffd[blosc2]"') from error
    return blosc2


def open_frame(path: str, serving: Serving) -> np.ndarray | TensorMap:
    """The array or the tensors of a frame, its region over the whole super-chunk."""
    opened = _open_checked(path)
    schunk = getattr(opened, "schunk", opened)
    block_bytes = region_block_bytes(schunk.blocksize)
    npy_header = _header_in(schunk, NPY_HEADER, path)
    if npy_header is not None:
        header = npy.read_header(io.BytesIO(npy_header), path)
        return _array(header, schunk.nbytes, path, serving, block_bytes)
    safetensors_header = _header_in(schunk, SAFETENSORS_HEADER, path)
    if safetensors_header is not None:
        return _tensors(safetensors_header, schunk, path, serving, block_bytes)
    dtype, shape = (np.dtype("u1"), (schunk.nbytes,)) if opened is schunk else (opened.dtype, tuple(opened.shape))
    return _array(npy.Header.made(dtype, shape), schunk.nbytes, path, serving, block_bytes)


def region_block_bytes(frame_block_bytes: int) -> int:
    """The power of two next above the frame's own block, within bounds: a fill then decodes what it needs, once."""
    wanted = 1 << max(0, frame_block_bytes - 1).bit_length()
    return min(max(wanted, _BLOCK_BYTES_MIN), _BLOCK_BYTES_MAX)


def _open_checked(path: str) -> Any:
    """Open with python-blosc2, for metadata only."""
    blosc2 = require_blosc2()
    with open(path, "rb") as file:
        head = file.read(_LENGTH_AT + 8)
        file_bytes = os.fstat(file.fileno()).st_size
    frame_bytes = int.from_bytes(head[_LENGTH_AT:], "big")
    if len(head) < _LENGTH_AT + 8 or frame_bytes > file_bytes:
        raise ValueError(f"{path}: truncated: a Blosc2 frame of {frame_bytes} bytes in a file of {file_bytes}")
    try:
        opened = blosc2.open(path, mode="r")
    except Exception as error:  # the library has no exception type of its own
        raise ValueError(f"{path}: a damaged Blosc2 frame: {error}") from error
    if not isinstance(opened, (blosc2.NDArray, blosc2.SChunk)):
        raise ValueError(f"{path}: the frame holds a {type(opened).__name__}, not an array or plain super-chunk")
    return opened


def _header_in(schunk: Any, name: str, path: str) -> bytes | None:
    try:
        value = schunk.vlmeta.get(name)
    except Exception as error:  # from the library, or from the msgpack decoder
        raise ValueError(f"{path}: a damaged Blosc2 frame: metadata {name}: {error}") from error
    if value is None:
        return None
    if not isinstance(value, bytes):
        raise ValueError(f"{path}: metadata {name} holds {type(value).__name__}, not bytes")
    return value


def _array(header: npy.Header, data_bytes: int, path: str, serving: Serving, block_bytes: int) -> np.ndarray:
    npy.check_objects(header.dtype, path)
    if data_bytes < header.nbytes:
        raise ValueError(f"{path}: its header describes {header.nbytes} bytes, the super-chunk holds {data_bytes}")
    if header.nbytes == 0:
        return serving.empty(header.dtype, header.shape, header.order)
    region = serving.region(header.nbytes, providers.Blosc2File(path), path, block_bytes)
    return region.array(header.dtype, header.shape, order=header.order)


def sums_seed(header: bytes) -> int:
    """With which the sums were made: so they don't fit a header that is not theirs."""
    return int.from_bytes(hashlib.blake2b(header, digest_size=8).digest(), "little")


def _tensors(text: bytes, schunk: Any, path: str, serving: Serving, block_bytes: int) -> TensorMap:
    data_bytes: int = schunk.nbytes
    tensors, metadata = safetensors.parse_header(text, path, data_bytes, gaps=True)
    if "uffd_snapshot" in metadata:
        from ..snapshot import _opening

        sums = _header_in(schunk, SUMS, path)
        if sums is None or len(sums) != -(-data_bytes // (1 << 16)) * 8:
            raise ValueError(f"{path}: damaged: a compressed image without its checksums")
        seed = sums_seed(text)
        return _opening.open_parts(path, metadata, tensors, data_bytes, serving,
                                   lambda: _opening.PackedProvider(path, seed, sums), max(block_bytes, 1 << 16))

    def make_region(_part: int) -> Any:
        return serving.region(data_bytes, providers.Blosc2File(path), path, block_bytes)

    return TensorMap(path, tensors, metadata, serving, make_region)
