"""Memory externalization for Python: numpy arrays whose pages come on first touch, from files, compressed files, memory
or compiled functions, served in user space by Linux userfaultfd.

Start with `open` (a file), `from_provider` (an array over a provider) or `Region`; `probe` says what this machine can
do.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata

from .errors import DegradedWarning, ProviderError, RegionClosed, UffdError, Unavailable
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

if sys.platform.startswith("linux"):
    from . import providers
    from .engine import Engine, default_engine
    from .formats import open, pack
    from .region import Prefetch, Region, chunks, from_provider, pinned, populate, prefetch, region_of
    from .stats import LatencyHistogram, Stats
else:
    def __getattr__(name: str) -> object:
        if name in __all__:
            raise Unavailable(f"uffd.{name} needs Linux's userfaultfd; this is {sys.platform}")
        raise AttributeError(name)


def get_include() -> str:
    """The folder with uffd.h and _core.pxd, for compilers of native providers."""
    return os.path.dirname(os.path.abspath(__file__))


__all__ = [
    "Capabilities", "DegradedWarning", "Engine", "LatencyHistogram", "Prefetch", "ProviderError", "Region",
    "RegionClosed", "Stats", "UffdError", "Unavailable", "chunks", "default_engine", "from_provider", "get_include",
    "open", "pack", "pinned", "populate", "prefetch", "probe", "providers", "region_of",
]
