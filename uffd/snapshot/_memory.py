"""What memory an array lies in, as far as that decides how it can be imaged."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import region as _region
from ..errors import SnapshotError

_SHARED_MEMORY = ("/dev/shm/", "/memfd:", "/SYSV", "/dev/zero", "/anon_hugepage")


@dataclass(frozen=True, slots=True)
class Place:
    """One array: its bytes, and what they are."""

    name: str
    address: int
    nbytes: int
    region: Any                    # of ours, or None
    shared: bool                   # memory that other processes may have, too


def places_of(arrays: Mapping[str, np.ndarray]) -> list[Place]:
    """SnapshotError for memory that can't be imaged, with the reason."""
    found = []
    maps = _Maps()
    for name, array in arrays.items():
        if not array.nbytes:
            continue
        address = array.__array_interface__["data"][0]
        region = _region_at(array)
        shared = region.backing == "shared" if region is not None else maps.shared(name, address, array.nbytes)
        found.append(Place(name, address, array.nbytes, region, shared))
    return found


def _region_at(array: np.ndarray) -> Any:
    try:
        region = _region.region_of(array)
    except ValueError:
        return None
    from ..eager import EagerRegion

    return None if isinstance(region, EagerRegion) else region     # memory like any other


class _Maps:
    """The mappings of this process, read once."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._rows: list[tuple[int, bool, str]] = []
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for row in maps:
                words = row.rstrip("\n").split(None, 5)
                low, high = (int(word, 16) for word in words[0].split("-"))
                path = words[5] if len(words) > 5 else ""
                self._starts.append(low)
                self._rows.append((high, words[1][3] == "s", path if words[4] != "0" else ""))

    def shared(self, name: str, address: int, nbytes: int) -> bool:
        """Whether other processes may write there. SnapshotError for a file's pages."""
        at, shared = address, False
        while at < address + nbytes:
            index = bisect.bisect_right(self._starts, at) - 1
            if index < 0 or self._rows[index][0] <= at:
                raise SnapshotError(f"array {name!r}: no memory is mapped at {at:#x}, inside it")
            end, is_shared, path = self._rows[index]
            if path and not path.startswith(_SHARED_MEMORY):
                raise SnapshotError(f"array {name!r} is a mapping of the file {path}: its pages are that file's, which "
                                    "others may write to; it can be tracked, not imaged. Copy the file, or the array")
            shared |= is_shared
            at = end
        return shared
