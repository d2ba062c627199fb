"""What a flush raises: for blocks that could not be written back, in their time, or made durable."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from ._coreless import core as _core
from .errors import ProviderError

if TYPE_CHECKING:
    from .region import Region

_LISTED = 64


class NotInTime(ProviderError, TimeoutError):
    """Both, so that it is caught as either."""


def late(region: Region, answer: int, runs: list[list[int]], timeout_s: float | None, what: str) -> ProviderError:
    """Of a flush that did not end in its time (answer 1), or whose native store has not answered for the region's
    (2)."""
    left = [b for first, end in runs for b in _core.under_way(region, first, end, _LISTED)][:_LISTED]
    time_s = timeout_s if answer == 1 else region._options["timeout_s"]
    return _error(region, NotInTime, errno.ETIMEDOUT, [(b, errno.ETIMEDOUT) for b in left], 1,
                  f"{what} within {time_s} s by {_title(region)}; {_core.unwritten(region)} blocks are left, they stay "
                  "in memory" + (f", the first at offset {left[0] * region.block_bytes}" if left else ""))


def sync_error(region: Region, number: int) -> ProviderError:
    """Of a provider that could not make durable what it had acknowledged."""
    lost = _core.lost(region, _LISTED)
    more = (f"; blocks that it was for had left memory, the first at offset {lost[0] * region.block_bytes}: what the "
            "store has of them can't be known (write them again from elsewhere, in a new region; `discard` gives "
            "them up)"
            if lost else "")
    return _error(region, ProviderError, number, [(b, number) for b in lost], 1,
                  f"{_title(region)} could not make durable what was written: {os.strerror(number)}{more}",
                  region._text_of((1 << 64) - 1))


def write_error(region: Region, failed: list[tuple[int, int, int]], where: str) -> ProviderError:
    """Of [(block, errno, tries), ...] that the store did not take."""
    block, number, tries = failed[0]
    text = region._text_of(block)
    why = text.strip().splitlines()[-1] if text else os.strerror(number)
    return _error(region, ProviderError, number, [(b, n) for b, n, _ in failed], tries,
                  f"{len(failed)} blocks could not be written back to {where}, the first at offset "
                  f"{block * region.block_bytes} ({tries} tries): {why}; they stay in memory, and are tried again",
                  text)


def _error(region: Region, kind: type[ProviderError], number: int, failed: list[tuple[int, int]], tries: int,
           message: str, text: str | None = None) -> ProviderError:
    listed = [(b * region.block_bytes, min(region.block_bytes, region.nbytes - b * region.block_bytes), n)
              for b, n in failed]
    offset, nbytes = listed[0][:2] if listed else (0, region.nbytes)
    error = kind(number, f"region {region.name!r}: {message}", region=region.name, offset=offset, nbytes=nbytes,
                 tries=tries, provider_traceback=text)
    error.failed = listed or error.failed
    return error


def _title(region: Region) -> Any:
    provider = region.provider
    return getattr(provider, "title", None) or getattr(provider, "__name__", None) or type(provider).__name__
