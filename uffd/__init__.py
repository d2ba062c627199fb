"""Memory externalization for Python: numpy arrays whose pages come on first touch, served in user space by Linux
userfaultfd: from files, compressed files, memory, compiled functions, or any function of Python.

Start with `open` (a file), `from_provider` (an array over a provider) or `Region`; `probe` says what this machine can
do.
"""

from __future__ import annotations

import os
from importlib import metadata

from .errors import BudgetError, DegradedWarning, ProviderError, RegionClosed, SnapshotError, UffdError, Unavailable
from .probe import Capabilities, probe

try:
    __version__ = metadata.version("pyuffd")
except metadata.PackageNotFoundError:            # the source tree without an installation
    __version__ = "0+unknown"


def _refuse_the_other_uffd() -> None:
    """PyPI has another project named uffd, which installs a package of this name: both can't be used together."""
    try:
        other = metadata.distribution("uffd")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(f"the distribution 'uffd' {other.version} is installed beside 'pyuffd', and both bring a package "
                      "named uffd: `pip uninstall uffd`, then `pip install --force-reinstall pyuffd`")


_refuse_the_other_uffd()

# Elsewhere than on Linux all of this can be imported, too: regions are Unavailable there, or filled whole (eager.py).
from . import eager as _eager  # noqa: E402, F401 (now: who drops privileges later may find no file)
from . import providers, snapshot  # noqa: E402
from .engine import Engine, default_engine  # noqa: E402
from .formats import open, pack  # noqa: E402
from .providers.hosted import Provider  # noqa: E402
from .region import (  # noqa: E402
    Prefetch, Region, chunks, from_provider, pinned, populate, prefetch, region_of, zeros,
)
from .stats import LatencyHistogram, Stats  # noqa: E402
from .tracking import Tracker, track  # noqa: E402


def get_include() -> str:
    """The folder with uffd.h and _core.pxd, for compilers of native providers."""
    return os.path.dirname(os.path.abspath(__file__))


__all__ = [
    "BudgetError", "Capabilities", "DegradedWarning", "Engine", "LatencyHistogram", "Prefetch", "Provider",
    "ProviderError", "Region", "RegionClosed", "SnapshotError", "Stats", "Tracker", "UffdError", "Unavailable",
    "chunks", "default_engine", "from_provider", "get_include", "open", "pack", "pinned", "populate", "prefetch",
    "probe", "providers", "region_of", "snapshot", "track", "zeros",
]
