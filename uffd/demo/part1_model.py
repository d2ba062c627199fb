"""Part one: a real model, packed, opened lazily, used; after each step what it touched and what it filled."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import uffd
from uffd.formats import packing

from . import _eager, _picture, _plan
from ._screen import StepTable, human_bytes, human_seconds
from ._watch import Watch, rss_bytes

_PIECE_BYTES = 1 << 20
_ROUNDS = 5
_ROUNDS_LIMIT_S = 15.0


@dataclass
class Piece:
    """A part of a step: what is timed, how many bytes of the lazy arrays it needs, what must come out."""
    nbytes: int
    touch: Callable[[], np.ndarray]
    expected: Callable[[], np.ndarray]


def run(path: Path, *, screen, pairs, png: Path, keep: bool) -> dict:
    """Do the whole part on the file `path`; returns the figures. Takes some seconds; raises DataError, OSError."""
    _eager.check(path)
    result = {"file": str(path), "file_bytes": path.stat().st_size, "steps": [],
              "mode": uffd.probe(self_test=False).mode}
    screen.head("uffd demo 1: a model opened lazily", f"userfaultfd mode: {result['mode']}")
    if result["mode"] == "user":
        screen.pair("mode", "a syscall on a missing page needs uffd.pinned(); cure: uffd probe")
    before_bytes = rss_bytes()
    eager = _eager.load(path)
    result["eager_memory_bytes"] = rss_bytes() - before_bytes
    result["arrays"] = len(eager)
    screen.pair("file", f"{path.name}, {human_bytes(result['file_bytes'])}, {len(eager)} arrays; "
                        "read once before timing")
    plan = _plan.make(path, eager, pairs)
    with _work_directory(keep, screen) as directory:
        source = _pack(path, directory, screen, result)
        _use(source, path, eager, plan, screen, result, png)
        _compare_ways(source, path, plan, screen, result)
    _say_memmap(screen, result)
    _say_summary(screen, result)
    return result


@contextmanager
def _work_directory(keep, screen):
    """A directory for the packed file, under TMPDIR; removed at the end unless it is to be kept."""
    directory = Path(tempfile.mkdtemp(prefix="uffd-demo-"))
    try:
        yield directory
    finally:
        if keep:
            screen.pair("kept", str(directory))
        else:
            shutil.rmtree(directory, ignore_errors=True)


def _pack(path, directory, screen, result):
    """The file that will be opened lazily: packed by uffd.pack, or the file itself where it is compressed already."""
    if path.suffix not in _eager.PACKABLE_SUFFIXES:
        screen.pair("packed", "already: opened as it is")
        return path
    packed = directory / (path.stem + ".b2frame")
    room_bytes = shutil.disk_usage(directory).free
    if room_bytes < 1.1 * result["file_bytes"]:
        raise _eager.DataError(f"{directory} has room for {human_bytes(room_bytes)}: set TMPDIR to pack "
                               f"{human_bytes(result['file_bytes'])}")
    started_s = time.perf_counter()
    with screen.bar("pack") as update:
        stages = {"compress": 0, "verify": 1}
        with _refused_by_name(path):
            # uffd.pack itself, by the way that reports its progress.
            packing.pack_file(path, packed, progress=lambda stage, done, total: update(
                stages[stage] * total + done, len(stages) * total))
    result["pack_s"] = time.perf_counter() - started_s
    result["packed_bytes"] = packed.stat().st_size
    screen.pair("pack", f"{human_bytes(result['file_bytes'])} -> {human_bytes(result['packed_bytes'])}, Blosc2 zstd "
                        f"5, {human_seconds(result['pack_s'])}, once")
    return packed


@contextmanager
def _refused_by_name(path):
    """What open and pack raise about a file becomes a DataError: the demo ends with its text, not a traceback."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise _eager.DataError(f"{path.name}: {error}") from error


def _open(source, name):
    """The arrays of a file by name, lazily; a type that numpy lacks is left out (the TypeError is that key's own)."""
    with _refused_by_name(Path(source)):
        opened = uffd.open(source)
    if isinstance(opened, np.ndarray):
        return {name: opened}
    arrays = {}
    for key in opened:
        try:
            arrays[key] = opened[key]
        except TypeError:
            continue
    return arrays


def _use(source, path, eager, plan, screen, result, png):
    """The steps on the lazily opened file: open, look up, compare, multiply, then everything."""
    table = StepTable(screen)
    screen.pair("lazy", f"filled from the {'packed ' if source != path else ''}file in blocks, on first touch; "
                        "each step once:")
    table.header()
    before_bytes = rss_bytes()
    started_s = time.perf_counter()
    lazy = _open(source, path.stem)
    seconds = time.perf_counter() - started_s
    if plan.table not in lazy:
        raise _eager.DataError(f"{path.name}: {plan.table} is of a type that numpy lacks: pip install 'pyuffd[dtypes]'")
    watch = Watch(lazy)
    result["left_out"] = sorted(set(eager) - set(lazy))
    _finish(screen, table, watch, result, "open", 0, seconds, _same_headers(lazy, eager))
    shown = []
    looked_up = _look_up(lazy, eager, plan, screen, table, watch, result)
    shown.append(("look up", watch.resident()))
    result["lazy_filled_bytes"] = watch.filled()["bytes_filled"]
    vectors = _plan.vectors(plan, looked_up)
    _multiply(lazy, eager, plan, vectors, screen, table, watch, result)
    shown.append(("multiply", watch.resident()))
    result["lazy_memory_bytes"] = rss_bytes() - before_bytes
    _picture.save(png, shown, f"{path.name}: blocks resident after a few words and one layer")
    result["png"] = str(png)
    _read_all(lazy, eager, screen, table, watch, result)
    result["cosines"] = {f"{left}-{right}": round(_plan.cosine(vectors[left], vectors[right]), 3)
                         for left, right in plan.pairs}
    for start in range(0, len(plan.pairs), 4):
        screen.pair("cosine" if start == 0 else "", "  ".join(
            f"{pair} {value:.3f}" for pair, value in list(result["cosines"].items())[start:start + 4]))


def _same_headers(lazy, eager):
    """Whether names, shapes and types agree; a type that numpy lacks stands on the eager side as integers or bytes."""
    def same(array, whole):
        if array.dtype.isbuiltin == 1:
            return (array.dtype, array.shape) == (whole.dtype, whole.shape)
        return array.nbytes == whole.nbytes

    return all(name in eager and same(array, eager[name]) for name, array in lazy.items())


def _look_up(lazy, eager, plan, screen, table, watch, result):
    array, whole = lazy[plan.table], eager[plan.table]
    looked_up = {}

    def piece(number):
        def touch():
            looked_up[number] = plan.row(array, number)
            return looked_up[number]
        return Piece(plan.row(whole, number).nbytes, touch, lambda: plan.row(whole, number))

    numbers = list(dict.fromkeys(plan.row_numbers()))
    name = f"look up {len(plan.rows)} {'words' if plan.vocabulary_size else 'rows'}"
    _step(screen, table, watch, result, name, [piece(number) for number in numbers])
    if plan.pairs:
        # The same rows again: nothing is left to fill, and the time is that of ordinary memory.
        _step(screen, table, watch, result, "the same again", [piece(number) for number in numbers])
    return looked_up


def _multiply(lazy, eager, plan, vectors, screen, table, watch, result):
    if plan.layer is None:
        return
    stacked = np.stack(list(vectors.values()))
    weight = lazy[plan.layer]
    product = stacked @ eager[plan.layer].T   # first, so that BLAS has started its threads before the timed one
    _step(screen, table, watch, result, "multiply {}x{}".format(*weight.shape),
          [Piece(weight.nbytes, lambda: stacked @ weight.T, lambda: product)])
    result["layer"] = plan.layer


def _read_all(lazy, eager, screen, table, watch, result):
    """Every byte of every array, checked: the step long enough to watch the residency bar move."""
    pieces = []
    for name, array in lazy.items():
        flat, whole = _eager.flat_bytes(array), _eager.flat_bytes(eager[name])
        for start in range(0, flat.size, _PIECE_BYTES):
            span = slice(start, start + _PIECE_BYTES)
            pieces.append(Piece(whole[span].size, lambda flat=flat, span=span: flat[span].copy(),
                                lambda whole=whole, span=span: whole[span]))
    _step(screen, table, watch, result, "read everything", pieces)


def _step(screen, table, watch, result, name, pieces):
    """Time the touches alone, then check each piece's bits; the bars move between pieces."""
    seconds, same = 0.0, True
    with screen.bar(name) as update:
        for number, piece in enumerate(pieces, start=1):
            started_s = time.perf_counter()
            value = piece.touch()
            seconds += time.perf_counter() - started_s
            same &= np.array_equal(_eager.flat_bytes(value), _eager.flat_bytes(piece.expected()))
            update(number, len(pieces), lambda: (watch.resident(), watch.block_nbytes))
    _finish(screen, table, watch, result, name, sum(piece.nbytes for piece in pieces), seconds, same)


def _finish(screen, table, watch, result, name, touched_bytes, seconds, same):
    filled = watch.filled()
    blocks = filled["blocks_demand"] + filled["blocks_readahead"]
    done = {key: sum(step[key] for step in result["steps"])
            for key in ("filled_bytes", "filled_blocks", "demand_blocks")}
    step = {"name": name, "touched_bytes": touched_bytes, "seconds": seconds, "same_bits": bool(same),
            "filled_bytes": filled["bytes_filled"] - done["filled_bytes"],
            "filled_blocks": blocks - done["filled_blocks"],
            "demand_blocks": filled["blocks_demand"] - done["demand_blocks"], "resident_bytes": watch.resident_bytes()}
    result["steps"].append(step)
    table.row(step)
    if step["filled_blocks"]:
        screen.line(screen.residency(watch.resident(), watch.block_nbytes), "green")


def _compare_ways(source, path, plan, screen, result):
    """The same work from a standing start by each way, interleaved: first the rows, then every byte. Medians."""
    ways = {"numpy, whole file": lambda: _eager.load(path), "uffd, packed file": lambda: _open(source, path.stem)}
    if source == path:
        ways["uffd, this file"] = ways.pop("uffd, packed file")
    else:
        ways["uffd, raw file"] = lambda: _open(path, path.stem)
        ways["np.memmap, raw file"] = lambda: _eager.mapped(path)
    times = {name: [] for name in ways}
    started_s = time.perf_counter()
    with screen.bar("compare") as update:
        for number in range(_ROUNDS):
            for place, (name, make) in enumerate(ways.items()):
                times[name].append(_time_way(make, plan))
                update(number * len(ways) + place + 1, _ROUNDS * len(ways))
            if time.perf_counter() - started_s > _ROUNDS_LIMIT_S:
                break
    rounds = len(next(iter(times.values())))
    result["rounds"] = rounds
    result["ways"] = {name: {"first_s": statistics.median(first for first, _ in pairs),
                             "all_s": statistics.median(every for _, every in pairs)}
                      for name, pairs in times.items()}
    said = (f"medians of {rounds}" if rounds > 1 else "one shot") + ", page cache warm"
    what = "words" if plan.vocabulary_size else "rows"
    screen.line(f"{'from a standing start':<22}{'first ' + what:>12}{'everything':>12}   {said}", "bold")
    for name, figures in result["ways"].items():
        screen.line(f"{name:<22}{human_seconds(figures['first_s']):>12}{human_seconds(figures['all_s']):>12}")


def _time_way(make, plan):
    """Seconds until the plan's rows are there, and until every byte has been read, both from before the open."""
    started_s = time.perf_counter()
    arrays = make()
    for number in plan.row_numbers():
        plan.row(arrays[plan.table], number)
    first_s = time.perf_counter() - started_s
    for array in arrays.values():
        flat = _eager.flat_bytes(array)
        for start in range(0, flat.size, _PIECE_BYTES):
            flat[start:start + _PIECE_BYTES].copy()
    return first_s, time.perf_counter() - started_s


def _say_memmap(screen, result):
    """The honest line: a raw, local, cached file is the kernel's business."""
    ways = result["ways"]
    if "np.memmap, raw file" not in ways:
        screen.pair("honest", "np.memmap can't open a compressed file; of a raw one it is the faster way")
        return
    ours, kernels = ways["uffd, packed file"]["first_s"], ways["np.memmap, raw file"]["first_s"]
    word = f"np.memmap is {ours / kernels:.0f} x faster here" if kernels < ours else "np.memmap was not faster here"
    screen.pair("honest", f"{word}: take it for a raw, local, cached file.")
    screen.pair("", "It can't open a packed or computed one: that is what uffd is for.")


def _say_summary(screen, result):
    same = all(step["same_bits"] for step in result["steps"])
    result["same_bits"] = same
    if result["left_out"]:
        screen.pair("left out", f"{len(result['left_out'])} arrays of types that numpy lacks: "
                                "pip install 'pyuffd[dtypes]'")
    eager = result["ways"]["numpy, whole file"]["first_s"]
    lazy = next(figures["first_s"] for name, figures in result["ways"].items() if name.startswith("uffd"))
    screen.pair("picture", result["png"])
    screen.pair("memory", f"eager +{human_bytes(result['eager_memory_bytes'])}, "
                          f"lazy +{human_bytes(result['lazy_memory_bytes'])} after the layer, buffers included")
    screen.line(f"eager: {human_seconds(eager)}, {human_bytes(result['file_bytes'])} | "
                f"lazy: {human_seconds(lazy)}, {human_bytes(result['lazy_filled_bytes'])} | "
                f"{'same bits' if same else 'THE BITS DIFFER'}", "bold green" if same else "bold red")
