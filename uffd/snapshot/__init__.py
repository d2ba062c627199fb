"""Images of memory: the state of arrays at one instant, written while the program goes on, and opened lazily.

`take` writes one, `load` (or `uffd.open`) opens it; `info`, `verify`, `export` and `diff` work on files.
docs/snapshots.md tells the rest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ._taking import FIRST, Report, Snapshot, take
from ._tools import Info, diff, export, image_at, info, verify

__all__ = ["FIRST", "Info", "Report", "Snapshot", "diff", "export", "info", "load", "take", "verify"]


def load(path: str | os.PathLike[str], lazy: bool = True, **open_options: Any) -> Mapping[str, np.ndarray]:
    """The arrays of an image by name, writable, and private: the image never changes.

    lazy: their bytes come on first touch, as with `uffd.open`, whose options (engine, mode, ...) may follow; and where
    a working set is stored beside the image (the mapping's `save_working_set()` does that), those blocks are brought in
    the order in which they were first touched, ahead of the program. Not lazy: ordinary arrays, read and checked now.

    Raises FileNotFoundError and other OSError, and ValueError for what is damaged, truncated or no image. A piece that
    is damaged is found when it is read: ValueError here, with lazy as a fill that fails (`Region`: SIGBUS at a touch,
    ProviderError from `populate`).
    """
    if not lazy:
        if open_options:
            raise TypeError(f"{sorted(open_options)[0]!r} is for images that are opened lazily")
        return _read(path)
    from ..formats import open as open_file
    from ._opening import ImageMap

    arrays = open_file(path, **open_options)
    if not isinstance(arrays, ImageMap):
        raise ValueError(f"{os.fsdecode(path)}: no image that uffd.snapshot wrote")
    arrays.replay()
    return arrays


def _read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    image = image_at(path)
    out = {}
    for entry in image.layout.entries:
        array: np.ndarray = np.empty(entry.shape, entry.dtype, order="F" if entry.order == "F" else "C")
        if entry.nbytes:
            flat = array.reshape(-1, order="F" if entry.order == "F" else "C").view(np.uint8)
            image.read(entry.offset, flat)
        out[entry.name] = array
    return out
