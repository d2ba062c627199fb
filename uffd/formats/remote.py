"""What a URL can name: a file with arrays in it, or a zarr store."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..providers.urls import shown
from . import npy, recognise, safetensors, zarrs
from .serving import Serving
from .sources import RemoteSource

# How a store says of the root of a zarr hierarchy that it is no file: not there, a directory, a page made for people.
_NO_FILE = (errno.ENOENT, errno.EISDIR, errno.EOPNOTSUPP, errno.EACCES)


def open_url(url: str, storage_options: Mapping[str, Any], serving: Serving) -> np.ndarray | Mapping[str, np.ndarray]:
    """The array or the tensors there."""
    if "memory://" in url:
        raise ValueError(f"{url}: memory:// is of this process, and providers run in another; use providers.Memory")
    if url.partition("?")[0].endswith((".zarr", "/")):
        return zarrs.open_zarr(url, storage_options, serving)
    source = RemoteSource(url, storage_options)
    try:
        kind = recognise.kind_of(source)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        try:
            return zarrs.open_zarr(url, storage_options, serving)
        except (OSError, ImportError):
            raise error from None
    if kind == "npy":
        return npy.open_array(source, serving)
    if kind == "frame":
        raise ValueError(f"{shown(url)}: Blosc2 frames are opened from local files only; over URLs .npy, .safetensors, "
                         "an index of its shards and zarr can be opened: download the file first")
    return safetensors.open_tensors(source, kind, serving)
