"""Which format a file has: by its first bytes, not by its name."""

from __future__ import annotations

import os
import zipfile

from ..providers.urls import is_url, shown
from .sources import Source

NPY_MAGIC = b"\x93NUMPY"
FRAME_MAGIC = b"\x9e\xa8b2frame\x00"  # a msgpack array of 14 whose first item is that string of 8
ZIP_MAGIC = b"PK\x03\x04"
ZARR_ENTRIES = ("zarr.json", ".zarray", ".zgroup")


def local_path(path_or_url: str | os.PathLike[str]) -> str:
    """The path as str, also of a file:// URL; ValueError for other URLs."""
    path = os.fsdecode(path_or_url)
    if path.startswith("file://"):
        return path.removeprefix("file://")
    if is_url(path):
        raise ValueError(f"{shown(path)!r} is a URL, and only local paths can be packed; download the file first")
    return path


def kind_of_local(path: str, source: Source) -> str:
    """As `kind_of`, or "zarr" or "directory" for what is not one file of bytes."""
    if os.path.isdir(path):
        return "zarr" if any(os.path.exists(os.path.join(path, name)) for name in ZARR_ENTRIES) else "directory"
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    if is_zip and _holds_zarr(path):
        return "zarr"
    return kind_of(source)


def kind_of(source: Source) -> str:
    """"npy", "frame" (Blosc2), "safetensors" or "index" (a JSON index of shards); else ValueError."""
    path = source.path
    with source.open() as file:
        file_bytes = source.size_of(file)
        head = file.read(64)
    if head.startswith(NPY_MAGIC):
        return "npy"
    if head.startswith(FRAME_MAGIC):
        return "frame"
    if head.startswith(ZIP_MAGIC):
        raise ValueError(f"{path}: zip archives (.npz, .b2z) cannot be opened lazily; extract the arrays first")
    # JSON text read as a little-endian length is astronomic, so the two cannot be confused.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= file_bytes - 8:
        return "safetensors"
    if head.lstrip()[:1] == b"{":
        return "index"
    if path.endswith(".safetensors"):
        return "safetensors"  # damaged: its own reader says how
    raise ValueError(
        f"{path}: not a .npy, .safetensors, safetensors index, Blosc2 frame or zarr store"
        f" ({file_bytes} bytes, beginning {head[:8]!r})"
    )


def _holds_zarr(path: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return not set(ZARR_ENTRIES).isdisjoint(archive.namelist())
    except zipfile.BadZipFile:
        return False
