"""What File(checksums=True) costs over File: filling, writing back, flushing; the ratio of interleaved runs.

    python benchmarks/bench_checked_file.py [MIB] [FOLDER]

Fills read the page cache, so that the checksums and not the disk are seen. Writing back and the flush write each block
twice, to the journal and to the file, and sync four times in place of one.
"""

import os
import statistics
import sys
import tempfile
import time

import numpy as np
import uffd

BLOCK = 65536
ROUNDS = 7


def run(path, checksums):
    """Seconds to fill all of it, to write all of it back, and to flush."""
    with uffd.Engine(budget_bytes=None) as engine:
        file = uffd.providers.File(path, writable=True, checksums=checksums)
        with uffd.Region(None, file, engine=engine) as region:
            times = [time.perf_counter()]
            region.populate()
            times.append(time.perf_counter())
            region.array("u8")[::BLOCK // 8] += np.uint64(1)
            times.append(time.perf_counter())
            region.evict()
            times.append(time.perf_counter())
            region.flush()
            times.append(time.perf_counter())
    return times[1] - times[0], times[3] - times[2], times[4] - times[3]


def main(mib=256, folder=None):
    with tempfile.TemporaryDirectory(dir=folder) as made:
        path = os.path.join(made, "file")
        with open(path, "wb") as file:
            for _ in range(mib):
                file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        began = time.perf_counter()
        uffd.providers.File.checksum(path)
        print(f"{mib} MiB; File.checksum: {time.perf_counter() - began:.3f} s")
        plain, checked = [], []
        for i in range(ROUNDS):
            for checksums in (i % 2 == 0, i % 2 == 1):
                if not checksums:
                    plain.append(run(path, False))
                    uffd.providers.File.checksum(path)   # it was written to without them
                else:
                    checked.append(run(path, True))
        for which, name in enumerate(("fill", "write back", "flush", "write back + flush")):
            of = [[sum(t[1:]) if which == 3 else t[which] for t in times] for times in (plain, checked)]
            a, b = (statistics.median(times) for times in of)
            print(f"{name:20} File {mib / a:8.0f} MiB/s   with checksums {mib / b:8.0f} MiB/s   ratio {b / a:.2f}")


if __name__ == "__main__":
    main(*(int(a) if i == 0 else a for i, a in enumerate(sys.argv[1:])))
