"""Opening array files lazily, and packing them so that they are worth opening lazily."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..providers.urls import is_url, shown
from . import frames, npy, packing, recognise, remote, safetensors, zarrs
from .serving import Serving
from .sources import LocalSource

__all__ = ["open", "pack"]


def open(
    path_or_url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    mode: str = "c",
    engine: Any = None,
    **region_options: Any,
) -> np.ndarray | Mapping[str, np.ndarray]:
    """Return the array, or the mapping of named arrays, that a file or a zarr store holds; its bytes come on first
    touch.

    ============================================  =====================================================
    content                                       result
    ============================================  =====================================================
    ``.npy``, format versions 1 to 3              ndarray, C or Fortran order as stored
    ``.b2nd`` (Blosc2 array)                      ndarray
    contiguous Blosc2 frame without an array      one-dimensional ``uint8`` ndarray of its bytes
    what `pack` wrote                             as the file that was packed
    ``.safetensors``                              read-only mapping of name to ndarray
    ``*.safetensors.index.json``, or a directory  the same, over all shards
    holding one
    zarr array, format 2 or 3                     ndarray, C order
    zarr group                                    read-only mapping of path in the group to ndarray
    ============================================  =====================================================

    A zarr store is a directory or a zip file. A URL (https://, s3:// and whatever fsspec has) may name a ``.npy``, a
    ``.safetensors``, an index of its shards or a zarr store; the server must do byte ranges. The content decides, not
    the suffix. Only headers are read here; each file that holds array data becomes one `Region`, whose address range
    costs no memory until it is touched. Arrays are ordinary ndarrays that keep their region alive; `region_of(array)`
    finds it. Empty arrays have no region.

    mode: "c" (default): arrays can be written to, privately, and the file never changes. "r": arrays are not
    writeable. "r+", of a local ``.npy`` or ``.safetensors`` (ValueError for all else): what is written goes back into
    the file, for certain when `region_of(array).flush()` returns, or at the end; after a crash some blocks are new.
    engine: the `Engine` to serve the region, by default `default_engine()`.
    region_options: passed on to `Region`. Unless given, ``name`` is the path, and ``block_bytes`` follows the
    compressed blocks of a Blosc2 file or the chunks of a zarr array.
    storage_options: fsspec's options for a URL (credentials, headers); must be None for a local path.

    A file is served as it was when it was opened here: bytes of a remote file that has changed since are an error.
    Two regions over one file don't see each other's writes; of two with "r+" the last block written back wins.
    A zarr store must not be written to while it is in use.

    A mapping opens each shard's region when a tensor of it is asked for first; ``.metadata`` holds the file's own
    metadata, of a zarr group its attributes. Tensors of types that numpy lacks (BF16, F8_E4M3, F8_E5M2, ...) need the
    package ml_dtypes; without it the access to such a key raises TypeError, other keys are not affected. A tensor
    whose offset in the file is no multiple of its item size is a correct, but unaligned array (``flags.aligned`` is
    False): numpy computes with it through copies, and libraries that insist on aligned data copy it whole. `pack`
    aligns every tensor.

    When `numpy.memmap` is faster: a raw ``.npy`` or ``.safetensors`` on a local disk, opened only to be read. The
    kernel maps a page that is cached for a twentieth of what a fault served from user space costs. Open such files
    here for what memmap cannot do (batched prefetch, statistics, one path for raw and compressed), or `pack` them.

    Blocks while headers are read. May be called from any thread; so may the mapping.
    Raises FileNotFoundError, IsADirectoryError and other OSError from the file system; ValueError for unknown, damaged
    or truncated files (with the sizes found and expected), for what a URL can't name and for a bad mode; TypeError for
    arrays of Python objects; ImportError naming the extra to install.
    """
    return _opened(os.fsdecode(path_or_url), storage_options, mode, engine, region_options)


def pack(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], *, codec: str = "zstd", level: int = 5
) -> None:
    """Write to the file `dst` the array or tensors of `src`, compressed block by block, for `open` to open lazily.

    src: a local ``.npy`` (not of Python objects), a ``.safetensors``, an index of shards or a directory holding one;
    shards are merged. codec: "zstd", "lz4", "lz4hc", "blosclz" or "zlib". level: 0 (no compression) to 9.

    `dst` is one contiguous Blosc2 frame (the customary suffix is ``.b2frame``): blocks of 64 KiB, each shuffled by
    item size, in chunks of 1 MiB (more from 32 GiB on). Any program with Blosc2 can read it: the bytes of the
    array follow one another in the super-chunk, and its variable-length metadata holds the header in the source's
    own format, ``uffd_npy_header`` or ``uffd_safetensors_header``, the latter with offsets into the super-chunk.

    Memory use is a few chunks, whatever the size of `src`. The frame is written under a temporary name beside
    `dst`, read back and compared by checksum, synced to disk and renamed: a crash leaves the former `dst` or none.
    Blocks until done. Raises ValueError (also where `dst` is the source), TypeError, OSError and ImportError as
    `open` does, OSError also when what was written does not read back.
    """
    packing.pack_file(src, dst, codec=codec, level=level)


def _opened(
    name: str, storage_options: Mapping[str, Any] | None, mode: str, engine: Any, region_options: Mapping[str, Any]
) -> np.ndarray | Mapping[str, np.ndarray]:
    if is_url(name) and not name.startswith("file://"):
        serving = Serving(shown(name), mode, engine, region_options)
        serving.refuse_writes(shown(name), "a URL")
        return remote.open_url(name, storage_options or {}, serving)
    path = recognise.local_path(name)
    if storage_options is not None:
        raise ValueError(f"storage_options are for URLs, and {path!r} is a local path")
    serving, source = Serving(path, mode, engine, region_options), LocalSource(path, mode == "r+")
    kind = recognise.kind_of_local(path, source)
    if kind == "npy":
        return npy.open_array(source, serving)
    if kind == "frame":
        serving.refuse_writes(path, "a Blosc2 frame")
        return frames.open_frame(path, serving)
    if kind == "zarr":
        serving.refuse_writes(path, "a zarr store")
        return zarrs.open_zarr(path, {}, serving)
    return safetensors.open_tensors(source, kind, serving)
