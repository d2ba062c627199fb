"""A simulation that checkpoints itself: the heat equation on a square plate, three ways: np.save, which stops it for as
long as the disk takes; a forked child that writes; and uffd.snapshot by write protection. Each checkpoint is compared
with the plate as it was at that step.

Run: python examples/checkpoint_simulation.py [cells on a side, default 1400] [picture.png]. It needs nothing but uffd;
for the picture of what each step took, matplotlib. Where no full userfaultfd is to be had the third way is the second.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import uffd
from uffd import snapshot

STEPS, EVERY = 48, 12                            # a checkpoint after each twelfth step


class Plate:
    """Hot at one edge; a step is one of the explicit scheme, in place."""

    def __init__(self, side):
        self.heat = np.zeros((side, side))
        self.heat[0] = 100.0
        self._flow = np.empty((side - 2, side - 2))

    def step(self):
        heat, flow = self.heat, self._flow
        np.add(heat[:-2, 1:-1], heat[2:, 1:-1], out=flow)
        flow += heat[1:-1, :-2]
        flow += heat[1:-1, 2:]
        flow *= 0.25
        heat[1:-1, 1:-1] += 0.9 * (flow - heat[1:-1, 1:-1])


class Saved:
    """np.save, and then fsync and rename, since a checkpoint that a crash can spoil is none."""

    def take(self, heat, path):
        with open(f"{path}.tmp", "wb") as file:
            np.save(file, heat)
            file.flush()
            os.fsync(file.fileno())
        Path(f"{path}.tmp").rename(path)

    def end(self):
        pass

    def load(self, path):
        return np.load(path)


class Imaged:
    """uffd.snapshot, by one method; the image before this one has to be on disk first."""

    def __init__(self, method):
        self.method, self.last = method, None
        self.used = "?"

    def take(self, heat, path):
        self.end()
        self.last = snapshot.take({"heat": heat}, path, method=self.method)

    def end(self):
        if self.last is not None:
            self.used = self.last.wait().method

    def load(self, path):
        return snapshot.load(path)["heat"]


def run(side, way, folder):
    """What each step took, its checkpoint included, in ms."""
    plate, times = Plate(side), []
    for number in range(1, STEPS + 1):
        started_s = time.perf_counter()
        plate.step()
        if number % EVERY == 0:
            way.take(plate.heat, folder / f"{number}.checkpoint")
        times.append((time.perf_counter() - started_s) * 1e3)
    way.end()
    return times


def check(side, ways, folders):
    """Every checkpoint against a run that takes none."""
    plate = Plate(side)
    for number in range(1, STEPS + 1):
        plate.step()
        if number % EVERY == 0:
            for name, way in ways.items():
                found = way.load(folders[name] / f"{number}.checkpoint")
                assert np.array_equal(found, plate.heat), (name, number)


def picture(path, results):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 1, figsize=(8, 5), sharex=True, sharey=True, squeeze=False)
    for axis, (name, times) in zip(axes[:, 0], results.items(), strict=True):
        axis.bar(range(1, STEPS + 1), times, color=["#d1495b" if n % EVERY == 0 else "#00798c"
                                                    for n in range(1, STEPS + 1)])
        axis.set_title(name, fontsize=9)
        axis.set_ylabel("ms")
    axes[-1, 0].set_xlabel("step; red: with a checkpoint")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main():
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 1400
    ways = {"np.save": Saved(), "fork": Imaged("fork"), "uffd.snapshot": Imaged("auto")}
    with tempfile.TemporaryDirectory() as name:
        folders = {way: Path(name, way) for way in ways}
        results = {}
        print(f"a plate of {side:,} x {side:,} cells ({side * side * 8 / 1e6:.0f} MB), {STEPS} steps, a checkpoint "
              f"each {EVERY}")
        for way, do in ways.items():
            folders[way].mkdir()
            results[way] = times = run(side, do, folders[way])
            stalls = [times[n - 1] for n in range(EVERY, STEPS + 1, EVERY)]
            plain = statistics.median(times)
            how = f" (by {do.used})" if way == "uffd.snapshot" else ""
            print(f"{way:>14}: {sum(times) / 1e3:6.2f} s in all; a step {plain:6.1f} ms, one with a checkpoint "
                  f"{statistics.median(stalls):6.1f} ms, the longest {max(times):6.1f} ms{how}")
        check(side, ways, folders)
        print("each checkpoint is the plate at its step, bit by bit")
        if len(sys.argv) > 2:
            picture(sys.argv[2], results)
            print(f"what each step took: {sys.argv[2]}")


if __name__ == "__main__":
    if uffd.probe(self_test=False).mode == "none":
        print("skipped: no userfaultfd to be had here, and images are opened lazily")
        sys.exit(77)
    main()
