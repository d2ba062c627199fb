"""Faults on order for scripts: builds tests/faults/shim.c, and talks to it inside the script's process."""

import ctypes
import functools
from pathlib import Path

from support import native

FAIL, PARTIAL, EXISTED, SHORT, MASK = range(5)
SOURCE = Path(__file__).resolve().parent.parent / "faults" / "shim.c"


@functools.lru_cache(maxsize=None)
def path():
    """The library for run_script(preload=...)."""
    return native.compile_library(SOURCE)


@functools.lru_cache(maxsize=None)
def loaded():
    """The shim of this very process, which was started with it preloaded."""
    lib = ctypes.CDLL(None)
    lib.shim_rule.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    lib.shim_calls.restype = lib.shim_fired.restype = ctypes.c_long
    return lib


class Rule:
    """Make calls number first .. first + count - 1 (count -1: for ever) fail, counted from now on."""

    def __init__(self, call, first=1, count=1, error=0, manner=FAIL, argument=0):
        self.index = loaded().shim_rule(call.encode(), first, count, error, manner, argument)
        assert self.index >= 0, "too many rules"

    @property
    def calls(self):
        return loaded().shim_calls(self.index)

    @property
    def fired(self):
        return loaded().shim_fired(self.index)


def clear():
    loaded().shim_clear()
