"""Where no userfaultfd can be had and the user asked for this: regions that are filled whole when they are made."""

from __future__ import annotations

import weakref

from .engine import Engine
from .region import Region

_regions: weakref.WeakValueDictionary[int, EagerRegion] = weakref.WeakValueDictionary()  # by address


class EagerEngine(Engine):
    """No threads: what `Engine(fallback="eager")` is where no userfaultfd can be had."""

    fills_whole = True


class EagerRegion(Region):
    """A region without faults."""


def region_at(address: int) -> EagerRegion | None:
    """The region whose memory has this address, or None."""
    for start, region in list(_regions.items()):
        if start <= address < start + region.nbytes:
            return region
    return None
