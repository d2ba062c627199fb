"""320 GB of zeros as an ordinary array, on a machine that has far less: written here and there, and read back, under a
budget of 1 GiB. What is cold goes to a file without a name that is as large as what was written.

Run: python examples/larger_than_memory.py [GiB to write, default 1.5]. It needs nothing but uffd, and that much room in
TMPDIR (else /var/tmp).
"""

import resource
import sys
import time

import numpy as np

import uffd

SHAPE = (400_000, 100_000)                       # float64: 320 GB
BUDGET_BYTES = 1 << 30
PIECE = 8192                                     # numbers written at a place: 64 KiB


def places(count):
    """(row, column) of pieces all over the array, no two of which overlap."""
    rows = np.random.default_rng(1).choice(SHAPE[0], count, replace=False)
    columns = np.random.default_rng(2).integers(0, SHAPE[1] - PIECE, count)
    return list(zip(rows.tolist(), columns.tolist()))


def piece(row, column):
    """What is written at a place; nothing in it is 0, so that zeros there would be found."""
    return np.arange(PIECE) + (row * SHAPE[1] + column + 1.0)


def main():
    count = max(1, int(float(sys.argv[1] if len(sys.argv) > 1 else "1.5") * 2**30) // (PIECE * 8))
    with uffd.Engine(budget_bytes=BUDGET_BYTES) as engine:
        array = uffd.zeros(SHAPE, engine=engine)
        region = uffd.region_of(array)
        print(f"{array.nbytes / 1e9:.0f} GB of {array.dtype}, a plain {type(array).__name__}, budget "
              f"{BUDGET_BYTES / 2**30:.0f} GiB")
        most = 0
        started_s = time.perf_counter()
        for row, column in places(count):
            array[row, column:column + PIECE] = piece(row, column)
            most = max(most, engine.resident_bytes)
        written_s = time.perf_counter() - started_s
        stats = region.stats()
        print(f"written: {count:,} pieces, {count * PIECE * 8 / 1e9:.2f} GB in {written_s:.1f} s; "
              f"{stats.bytes_written / 1e9:.2f} GB of blocks spilled to a file")

        started_s = time.perf_counter()
        for row, column in places(count):
            assert np.array_equal(array[row, column:column + PIECE], piece(row, column)), (row, column)
            most = max(most, engine.resident_bytes)
        print(f"read back: all of it right, in {time.perf_counter() - started_s:.1f} s; "
              f"{region.stats().blocks_demand - stats.blocks_demand:,} blocks came back by a touch")

        assert not array[::40_000, -1].any()     # no piece ends there
        assert most <= BUDGET_BYTES
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"resident: {most / 2**30:.2f} GiB at the most; peak RSS of the process {peak_bytes / 2**30:.2f} GiB")
        assert peak_bytes < BUDGET_BYTES + (256 << 20)
        region.discard()                         # nobody wants it any more: nothing of it is written at the end
        del array


if __name__ == "__main__":
    main()
