"""A store in memory behind a native provider that writes: what it holds, and how its next writes go wrong."""

import ctypes

import numpy as np

from support.native import FOR_EVER, keep_for_ever, library
from support.pattern import pattern


class Store(ctypes.Structure):
    """struct store of native.c, field for field. `held` is the stored bytes as an array."""

    _fields_ = [
        ("bytes", ctypes.c_void_p), ("nbytes", ctypes.c_uint64),
        ("reads", ctypes.c_uint64), ("writes", ctypes.c_uint64), ("failures", ctypes.c_uint64),
        ("delay_us", ctypes.c_uint64),
        ("fail_start", ctypes.c_uint64), ("fail_stop", ctypes.c_uint64),
        ("fail_answer", ctypes.c_int64), ("fail_times", ctypes.c_int64), ("fail_keeps", ctypes.c_uint64),
        ("gate_start", ctypes.c_uint64), ("gate_stop", ctypes.c_uint64),
        ("gate_closed", ctypes.c_uint32), ("gate_waiters", ctypes.c_uint32),
        ("count_block_bytes", ctypes.c_uint64),
        ("counts", ctypes.c_void_p), ("running", ctypes.c_void_p),
        ("overlaps", ctypes.c_uint32), ("fail_reads", ctypes.c_uint32),
    ]

    def fail(self, start, stop, answer, times=FOR_EVER, keeps=0):
        """Writes that touch [start, stop) answer `answer` (-errno), after `keeps` bytes of each were stored."""
        self.fail_start, self.fail_stop, self.fail_answer, self.fail_keeps = start, stop, answer, keeps
        self.fail_times = times

    def heal(self):
        self.fail_times = 0

    def close_gate(self, start=0, stop=1 << 62):
        self.gate_start, self.gate_stop, self.gate_closed = start, stop, 1

    def open_gate(self):
        self.gate_closed = 0

    def count_blocks(self, block_bytes):
        """Count the writes of each block; returns the live uint32 array of counts."""
        blocks = -(-self.nbytes // block_bytes)
        self._count_arrays = np.zeros(blocks, np.uint32), np.zeros(blocks, np.uint32)
        self.count_block_bytes = block_bytes
        self.counts, self.running = (array.ctypes.data for array in self._count_arrays)
        return self._count_arrays[0]


def stored(nbytes, **native_options):
    """(uffd.providers.Native over a Store of nbytes that holds the pattern, that Store)."""
    import uffd

    store = Store()
    store.held = pattern(0, nbytes).copy()
    store.bytes, store.nbytes = store.held.ctypes.data, nbytes
    native_options.setdefault("inline_safe", True)
    lib = library()
    provider = uffd.providers.Native(lib.store_read, ctypes.addressof(store), write=lib.store_write, **native_options)
    provider.nbytes = nbytes  # as a provider that knows its size
    keep_for_ever(store)
    keep_for_ever(store.held)
    return provider, store
