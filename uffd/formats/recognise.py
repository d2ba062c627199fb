"""Which format a file has: by its first bytes, not by its name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

NPY_MAGIC = b"\x93NUMPY"
FRAME_MAGIC = b"\x9e\xa8b2frame\x00"  # a msgpack array of 14 whose first item is that string of 8
ZIP_MAGIC = b"PK\x03\x04"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def local_path(path_or_url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> str:
    """The path as str; ValueError for a URL, and for storage options, which only a URL could use."""
    path = os.fsdecode(path_or_url)
    if _URL.match(path):
        raise ValueError(f"{path!r} is a URL: only local paths can be opened so far; download the file first")
    if storage_options is not None:
        raise ValueError(f"storage_options are for URLs, and {path!r} is a local path")
    return path


def kind_of(path: str) -> str:
    """ "npy", "frame" (Blosc2), "safetensors", "index" (a JSON index of shards) or "directory"; else ValueError."""
    if os.path.isdir(path):
        return "directory"
    with open(path, "rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
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
        f"{path}: not a .npy, .safetensors, safetensors index or Blosc2 frame"
        f" ({file_bytes} bytes, beginning {head[:8]!r})"
    )
