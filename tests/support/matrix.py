"""Where a region can live: delivery x backing, with what each needs of the kernel, and why it is skipped."""

import functools
import os
from dataclasses import dataclass


@functools.lru_cache(maxsize=None)
def opened():
    """(way, feature bits) of the first way to a userfaultfd that works in this process; (None, 0) if none does."""
    from uffd import _core

    for way in _core.WAYS:
        fd_or_error, features, _ioctls = _core.try_open(way)
        if fd_or_error >= 0:
            return way, features
    return None, 0


def filled_whole():
    """True in the run of the fallback: no userfaultfd can be had, and regions are filled when they are made."""
    return os.environ.get("UFFD_FALLBACK") == "eager" and opened()[0] is None


def full_mode():
    """True if kernel accesses to missing pages are served here (not USER_MODE_ONLY)."""
    return opened()[0] in ("device", "syscall")


def missing_feature(*names):
    """The first of the named features that this kernel lacks, or None."""
    from uffd import _core

    features = opened()[1]
    for name in names:
        if not features & _core.FEATURES[name]:
            return name
    return None


@dataclass(frozen=True)
class Where:
    delivery: str
    backing: str
    features: tuple = ()

    @property
    def options(self):
        return {"delivery": self.delivery, "backing": self.backing}

    def unavailable(self):
        """Why this kernel or user can't have it, or None."""
        if filled_whole():
            return None
        if opened()[0] is None:
            return "no userfaultfd to be had: see `python -m uffd probe`"
        lacking = missing_feature(*self.features)
        return f"the kernel lacks {lacking}" if lacking else None

    def __str__(self):
        return f"{self.delivery}-{self.backing}"


EVERY = (
    Where("thread", "anon"),
    Where("thread", "shared", ("MISSING_SHMEM",)),
    Where("inline", "anon", ("SIGBUS",)),
    Where("inline", "shared", ("SIGBUS", "MISSING_SHMEM")),
)

# UFFD_TEST_WHERES names fewer, for a run in which something else is the question than where a region lives.
NAMED = os.environ.get("UFFD_TEST_WHERES", "").split() or [str(where) for where in EVERY]
WHERES = tuple(where for where in EVERY if str(where) in NAMED)
if filled_whole():
    WHERES = EVERY[:1]  # delivery and backing mean nothing then


def where_from_environment():
    """The entry named by UFFD_TEST_WHERE, for scripts in subprocesses."""
    name = os.environ.get("UFFD_TEST_WHERE", "thread-anon")
    return next(where for where in EVERY if str(where) == name)
