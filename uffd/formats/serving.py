"""How the files of one `open` call are served: options checked once, regions made alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import region as _region

_MODES = ("r", "c", "r+")


class Serving:
    """The options of one `open` call; makes regions and empty arrays by them."""

    __slots__ = ("engine", "mode", "name", "options")

    def __init__(self, name: str, mode: str, engine: Any, options: Mapping[str, Any]) -> None:
        if mode not in _MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(map(repr, _MODES))}")
        clash = {"nbytes", "provider"} & set(options)
        if clash:
            raise TypeError(f"{sorted(clash)[0]!r} is decided by the file and cannot be passed to open()")
        self.name = name
        self.mode = mode
        self.engine = engine
        self.options = dict(options)

    def refuse_writes(self, path: str, what: str) -> None:
        """ValueError where `mode` asks for write-back and `what` has none."""
        if self.mode == "r+":
            raise ValueError(f"{path}: mode 'r+' writes back into local .npy and .safetensors files alone, and this is "
                             f"{what}: use 'c'")

    def region(self, nbytes: int, provider: Any, path: str, block_bytes: int | None = None) -> Any:
        """A region of `nbytes` over `provider`; the caller's own name and block_bytes win over those given here."""
        if provider.nbytes < nbytes:
            raise ValueError(f"{path}: its header describes {nbytes} bytes, its provider holds {provider.nbytes}")
        options = dict(self.options)
        options.setdefault("name", path)
        if block_bytes is not None:
            options.setdefault("block_bytes", block_bytes)
        return _region.Region(nbytes, provider, engine=self.engine, mode=self.mode, **options)

    def empty(self, dtype: np.dtype, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
        """An array without elements, which needs no region."""
        array = np.empty(shape, dtype, order="F" if order == "F" else "C")
        array.flags.writeable = self.mode != "r"
        return array
