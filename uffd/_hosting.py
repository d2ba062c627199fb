"""The engine's side of provider hosts, as far as it is Python: how they are started, and how a provider gets there."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import sysconfig
from multiprocessing import spawn
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ProviderError
from .providers import hosted

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Portable", "begin", "command"]

START_S = 30.0                                   # a host that takes no requests by then is stopped, and another started


def command() -> tuple[list[bytes], list[bytes]]:
    """argv and environment of a host. The last two arguments stand for its descriptors."""
    package = Path(__file__).resolve().parent
    found = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    executable = os.fsencode(spawn.get_executable() or sys.executable)     # what multiprocessing was told to use
    if not executable:
        raise RuntimeError("no Python interpreter is known to run providers in: this program embeds one. "
                           "multiprocessing.set_executable() names it")
    flags = [os.fsencode(flag) for flag in subprocess._args_from_interpreter_flags()]    # type: ignore[attr-defined]
    if package.parent in found:
        start = [b"-P", b"-m", b"uffd._host"]
    else:                                        # uffd lies somewhere else: it is found as this one was
        start = [b"-P", b"-c", b"import sys; sys.path.insert(0, " + repr(str(package.parent)).encode() +
                 b"); from uffd._host import main; main()"]
    environment = [key + b"=" + value for key, value in os.environb.items()]
    return [executable, *flags, *start, b"-", b"-"], environment


def begin(engine: Engine, provider: hosted.Provider, *, name: str, block_bytes: int, retries: int,
          timeout_s: float) -> tuple[Any, int | None, bool]:
    """Has a host open the provider: its Filler, its size, if it knows one, and whether it can write. ProviderError when
    open() fails."""
    data = hosted.pickled(provider)
    fd = os.memfd_create("uffd-provider", os.MFD_CLOEXEC)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left):]
        threads = engine._with_hosts()
    except BaseException:
        os.close(fd)
        raise
    filler = threads.begin_session(fd, block_bytes, name, hosted.writes(provider))
    try:
        number, text, nbytes, writes = threads.open_session(filler, retries, int(min(timeout_s, 1e9) * 1e9))
        if number:
            why = last_line(text) or os.strerror(number)
            raise ProviderError(number, f"region {name!r}: {hosted.title(provider)} could not be opened: {why}",
                                region=name, offset=0, nbytes=0, tries=1, provider_traceback=text or None)
    except BaseException:
        threads.end_session(filler)
        raise
    return filler, nbytes, writes


def last_line(text: str | None) -> str:
    """Of a traceback: the exception."""
    lines = (text or "").strip().splitlines()
    return lines[-1] if lines else ""


class Portable:
    """A provider in Python on its way into another process, with a region's recipe: pickled as for a provider host, by
    cloudpickle where it is installed, and refused for the same reasons."""

    def __init__(self, provider: Any) -> None:
        self.provider = provider

    def __reduce__(self) -> Any:
        served = hosted.as_provider(self.provider)
        assert served is not None, "only regions over providers in Python are pickled with a Portable"
        return _again, (hosted.portable(served),)


def _again(data: bytes) -> Any:
    thing = pickle.loads(data)
    return thing.function if type(thing) is hosted.FunctionProvider else thing
