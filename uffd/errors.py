"""What can go wrong, by name. Every message says which region, offset and provider, how often it was tried, and what
to do."""

from __future__ import annotations

__all__ = ["BudgetError", "DegradedWarning", "ProviderError", "RegionClosed", "SnapshotError", "UffdError",
           "Unavailable"]


class UffdError(Exception):
    """The base of all errors of this package that are not plain ValueError, TypeError or MemoryError."""


class Unavailable(UffdError, OSError):
    """This machine does not grant what was asked for. The message names the cure; `python -m uffd probe` says more."""


class ProviderError(UffdError, OSError):
    """A provider did not give a block, or did not take one back.

    Attributes: region (its name), offset and nbytes (of the block, in the region), errno, tries, provider_traceback
    (the text of an exception in a provider, None for native ones). failed: of a flush, all that could not be written
    back: [(offset, nbytes, errno), ...], at most 64 of a region at once.
    """

    failed: list[tuple[int, int, int]]

    def __init__(self, errno: int, message: str, *, region: str, offset: int, nbytes: int, tries: int,
                 provider_traceback: str | None = None) -> None:
        super().__init__(errno, message)
        self.region = region
        self.offset = offset
        self.nbytes = nbytes
        self.tries = tries
        self.failed = [(offset, nbytes, errno)]
        self.provider_traceback = provider_traceback


class RegionClosed(UffdError, ValueError):
    """The region was closed; its arrays, if any live, still work."""


class SnapshotError(UffdError):
    """Memory can't be tracked or imaged (any more): it was freed or moved ("tracking lost"), or can't be had whole."""


class BudgetError(UffdError, MemoryError):
    """More bytes would have to be resident than the budget has room for. The message names both, and what sets them."""


class DegradedWarning(UserWarning):
    """Something works, with less than it could: said once per process, with the cure."""
