"""Zarr: an array as an ndarray, a group as a lazy mapping of its arrays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..providers.urls import shown
from .serving import Serving


def open_zarr(store: str, storage_options: Mapping[str, Any], serving: Serving) -> np.ndarray | ZarrMap:
    """The array of a store, or the arrays of a group; metadata is read now, regions are made when asked for."""
    from ..providers import zarrs

    with zarrs.opened(store, "", storage_options) as node:
        metadata = None if hasattr(node, "dtype") else dict(node.attrs)
    if metadata is None:
        return _array_maker(store, "", storage_options, serving)()
    return ZarrMap(store, metadata, storage_options, serving)


def _array_maker(store: str, path: str, storage_options: Mapping[str, Any],
                 serving: Serving) -> Callable[[], np.ndarray]:
    """Makes the region; what is returned makes arrays over it."""
    from ..providers import zarrs

    provider = zarrs.Zarr(store, path, storage_options=storage_options)
    dtype, shape = provider.dtype, provider.shape
    if not provider.nbytes:
        return lambda: serving.empty(dtype, shape)
    name = f"{shown(store)}{'/' if path else ''}{path}"
    region = serving.region(provider.nbytes, provider, name, provider.suggested_block_bytes())
    return lambda: region.array(dtype, shape)


class ZarrMap(Mapping[str, np.ndarray]):
    """Read-only mapping of path in the group to ndarray, subgroups included ("a/b"). An array's region is made when it
    is asked for first; each access gives a new array over the same memory. `metadata` is the group's attributes.

    Names are listed when they are needed; a store that can't be listed (HTTP without consolidated metadata) may still
    be asked for an array by its name. Safe to use from any thread.
    """

    def __init__(self, store: str, metadata: Mapping[str, Any], storage_options: Mapping[str, Any],
                 serving: Serving) -> None:
        self.path = shown(store)
        self.metadata = dict(metadata)
        self._store = store
        self._storage_options = storage_options
        self._serving = serving
        self._lock = threading.RLock()
        self._listed: tuple[str, ...] | None = None
        self._made: dict[str, Callable[[], np.ndarray]] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if not isinstance(name, str):
            raise KeyError(name)
        with self._lock:
            if name not in self._made:
                self._made[name] = self._open(name)
            return self._made[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __repr__(self) -> str:
        return f"<zarr arrays of {self.path!r}>"

    def _open(self, name: str) -> Callable[[], np.ndarray]:
        try:
            return _array_maker(self._store, name, self._storage_options, self._serving)
        except FileNotFoundError:
            raise KeyError(name) from None
        except ValueError:
            if name in self._names():
                raise
            raise KeyError(name) from None       # a group, or no path at all

    def _names(self) -> tuple[str, ...]:
        from ..providers import zarrs

        with self._lock:
            if self._listed is None:
                with zarrs.opened(self._store, "", self._storage_options) as group:
                    self._listed = tuple(sorted(zarrs.array_names(group)))
            return self._listed
