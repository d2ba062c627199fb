"""Part two: a table four times its budget, kept in a memory node; look-ups by Zipf's law, every row checked.

The measured work is a process of its own (`_zipf.py`), in a memory cgroup where one can be made; here is what prepares
it and shows it: the store, the file for np.memmap, the limit, the screen.
"""

import base64
import errno
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

import uffd
from uffd.region import _spill_folder

from . import _eager, _limit, _memory_node, _plan
from ._screen import human_bytes, human_seconds
from ._zipf import EXPONENT, Job, Tiled

BUDGET_BYTES = 64 << 20
LEAST_BUDGET_BYTES = 16 << 20
TIMES = 4                                        # how much larger than the budget the table is
BLOCK_BYTES = 16384                              # a miss brings in ten rows of the model's table, not 42
LOOK_S = 3.0                                     # after half of that to warm up
# Beside the budget: the interpreter and numpy, and the provider host, which is Python once more.
OVERHEAD_BYTES = 128 << 20
_ROW_LEAST_BYTES, _ROW_MOST_BYTES, _ROW_OTHERWISE_BYTES = 64, 32768, 2048
_DEADLINE_S = 120.0
_NAMES = {"redis": "uffd over Redis", "scratch": "uffd over Scratch", "memmap": "np.memmap, a file",
          "random": "same, MADV_RANDOM"}
MAPPED = ("memmap", "random")


@dataclass
class Table:
    """The small table as rows of bytes, its copy in a memfd, and how many rows the large one has."""
    name: str
    rows: np.ndarray
    large_rows: int
    memory_fd: int = -1
    figures: dict = field(default_factory=dict)

    @property
    def large_bytes(self):
        return self.large_rows * self.rows.shape[1]


def run(path: Path, *, screen, pairs, budget_bytes: int = BUDGET_BYTES, seconds: float = LOOK_S,
        store: str | None = None) -> dict:
    """Do the whole part with the table of the file `path`; returns the figures. store: "redis", "scratch", None: Redis
    where there is one. Raises DataError, OSError."""
    _eager.check(path)
    mode = uffd.probe(self_test=False).mode
    if mode == "none":
        raise uffd.Unavailable(errno.ENOSYS, "part two needs userfaultfd: `uffd probe` has the cure")
    _check_room(budget_bytes)
    table = _table(path, pairs, budget_bytes)
    result = {"mode": mode, "table": table.name, "table_bytes": table.large_bytes, "budget_bytes": budget_bytes,
              "row_bytes": table.rows.shape[1], "rows": table.large_rows, "limit_bytes": None, "ways": {}}
    screen.head(f"uffd demo 2: {human_bytes(table.large_bytes)} of memory in {human_bytes(budget_bytes)}",
                f"userfaultfd mode: {mode}")
    with ExitStack() as stack:
        store, said = _chosen_store(store)
        node = stack.enter_context(_memory_node.Node()) if store == "redis" else None
        screen.pair("table", f"{table.name} of {path.name}")
        screen.pair("", f"{human_bytes(table.rows.nbytes)}, tiled to {human_bytes(table.large_bytes)}: "
                        f"{table.large_rows:,} rows")
        screen.pair("store", f"Redis {node.version} on a unix socket, started for this, nothing on disk" if node
                    else f"Scratch, a file without a name{said}")
        stack.enter_context(_shared(table))
        _measure(table, store, node, screen, result, seconds)
    _say(screen, result)
    return result


# ---- what is prepared -------------------------------------------------------------------------------------------


def _check_room(budget_bytes):
    if budget_bytes < LEAST_BUDGET_BYTES:
        raise _eager.DataError(f"part two takes a budget of {LEAST_BUDGET_BYTES:,} bytes or more, not {budget_bytes:,}")
    needed = (TIMES * 1.4 + 1) * budget_bytes + 2 * OVERHEAD_BYTES      # the store's copy, and what Redis adds
    room = _eager._available_bytes()
    if room is not None and needed > room:
        raise _eager.DataError(f"part two needs {needed:,.0f} bytes of memory, the store included, and {room:,} are "
                               f"available: a smaller --budget-bytes (now {budget_bytes:,})")
    folder = os.fsdecode(_spill_folder())
    status = os.statvfs(folder)
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes < 2.2 * TIMES * budget_bytes:
        raise _eager.DataError(f"{folder} has room for {human_bytes(free_bytes)}, and part two needs "
                               f"{human_bytes(2.2 * TIMES * budget_bytes)}: set TMPDIR, or a smaller --budget-bytes")


def _table(path, pairs, budget_bytes):
    arrays = _eager.load(path)
    name = _plan.make(path, arrays, pairs).table
    flat = _eager.flat_bytes(arrays[name])
    row_bytes = arrays[name][0].nbytes
    if not _ROW_LEAST_BYTES <= row_bytes <= _ROW_MOST_BYTES:
        row_bytes = min(_ROW_OTHERWISE_BYTES, flat.size)
    rows = flat[:flat.size // row_bytes * row_bytes].reshape(-1, row_bytes)
    rows = rows[:max(1, budget_bytes // row_bytes)]          # a table as large as that is large enough once
    return Table(name, rows, TIMES * budget_bytes // row_bytes)


def _chosen_store(store):
    """Which store, and why it is not Redis."""
    if store == "scratch":
        return store, ""
    why = None
    if _memory_node.program() is None:
        why = "no redis-server here (on Debian: apt-get install redis-server)"
    elif missing := [name for name in ("redis", "xxhash") if importlib.util.find_spec(name) is None]:
        why = f"no module {', '.join(missing)} here: pip install 'pyuffd[redis]'"
    if why and store == "redis":
        raise _eager.DataError(why)
    return ("scratch", f":\n         {why}") if why else ("redis", "")


@contextmanager
def _shared(table):
    """The small table in memory of this process that others can map: it is charged to no limit of theirs."""
    table.memory_fd = os.memfd_create("uffd-demo-table")
    try:
        with os.fdopen(os.dup(table.memory_fd), "wb") as file:
            file.write(np.ascontiguousarray(table.rows).data)
        yield
    finally:
        os.close(table.memory_fd)


@contextmanager
def _tiled_file(table, screen):
    """The large table in a file for np.memmap, on the disk."""
    fd, name = tempfile.mkstemp(prefix="uffd-demo-", dir=os.fsdecode(_spill_folder()))
    try:
        tiled = Tiled(table.rows, table.large_rows)
        step = max(1, (4 << 20) // table.rows.shape[1])
        with os.fdopen(fd, "wb") as file, screen.bar("write the file for np.memmap") as update:
            for start in range(0, table.large_rows, step):
                file.write(tiled.rows_of(start, min(start + step, table.large_rows)).data)
                update(start, table.large_rows)
            file.flush()
            os.fsync(file.fileno())
        yield name
    finally:
        os.unlink(name)


def _drop_cached(name):
    """Out of the page cache: what another has cached is charged to him, and not to who maps it."""
    fd = os.open(name, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


# ---- what is measured -------------------------------------------------------------------------------------------


def _measure(table, store, node, screen, result, seconds):
    """Each way in a process and under a limit of its own, one after the other."""
    result["store"] = store
    with _tiled_file(table, screen) as file:
        for way in dict.fromkeys((store, "scratch", *MAPPED)):
            place = node.url if way == "redis" else file
            _drop_cached(file)
            job = Job(way, place, table.memory_fd, len(table.rows), table.large_rows, table.rows.shape[1], BLOCK_BYTES,
                      result["budget_bytes"], seconds / 2, seconds)
            with ExitStack() as stack:
                limit = _limit.make(result["budget_bytes"] + OVERHEAD_BYTES)
                if limit is not None:
                    stack.enter_context(limit)
                    result["limit_bytes"] = limit.nbytes
                figures = _Watched(job, limit, node if way == "redis" else None, screen).run()
                figures["peak_bytes"] = limit.peak_bytes() if limit else None
            result["ways"][way] = figures


class _Watched:
    """The child that does the work, its lines of JSON, and the screen."""

    def __init__(self, job, limit, node, screen):
        self._job, self._limit, self._node, self._screen = job, limit, node, screen
        self._wire = {}
        blocks = -(-job.rows * job.row_bytes // job.block_bytes)
        self._block_nbytes = np.full(blocks, job.block_bytes, dtype=np.int64)

    def run(self) -> dict:
        command = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "uffd.demo._zipf",
                   json.dumps(asdict(self._job))]
        if self._limit is not None:              # it joins before it is Python, so that all of it is charged
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', self._limit.procs, *command]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   pass_fds=[self._job.table_fd])
        timer = threading.Timer(_DEADLINE_S, process.kill)
        timer.start()
        try:
            with self._screen.bar(_NAMES[self._job.way]) as update:
                figures = self._read(process, update)
            process.stdin.close()
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        if figures is None:
            raise _eager.DataError(f"the look-ups by {_NAMES[self._job.way]} ended with exit code {code} before their "
                                   f"end ({_DEADLINE_S:.0f} s are their limit; -9 may be the memory cgroup's)")
        return figures

    def _read(self, process, update):
        for line in process.stdout:
            told = json.loads(line)
            if "error" in told:
                raise _eager.DataError(told["error"])
            if "result" in told:
                return {**told["result"], **self._wire}
            if "done" in told:
                update(told["done"], 1.0, self._residency(told), note=self._note(told))
            else:
                self._at_barrier(told["stage"])
                process.stdin.write("\n")
                process.stdin.flush()
        return None

    def _at_barrier(self, stage):
        if self._node is None:
            return
        received, sent = self._node.wire_bytes()
        if stage == "filled":
            self._wire |= {"fill_to_store_bytes": received, "fill_from_store_bytes": sent}
        elif stage == "warm":
            self._before = received, sent
        else:
            self._wire |= {"to_store_bytes": received - self._before[0], "from_store_bytes": sent - self._before[1]}

    def _residency(self, told):
        if "resident" not in told:
            return None
        return lambda: (unpacked(told["resident"], len(self._block_nbytes)), self._block_nbytes)

    def _note(self, told):
        """What stands beside the bar: the stage, and how it goes."""
        parts = [told["stage"]]
        if "hit_ratio" in told:
            parts.append(f"hit {100 * told['hit_ratio']:5.1f} %")
            parts.append(f"{told['per_s']:,.0f} look-ups/s")
        if "resident_bytes" in told:
            parts.append(f"{human_bytes(told['resident_bytes'])} of {human_bytes(told['budget_bytes'])}")
        return ", ".join(parts)


def unpacked(text: str, blocks: int) -> np.ndarray:
    """The bool per block that _zipf packed."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=blocks).astype(bool)


# ---- what is said -----------------------------------------------------------------------------------------------

_ROW = "{:<19}{:>7}{:>9}{:>9}{:>12}{:>12}{:>12}"


def _say(screen, result):
    budget, limit = human_bytes(result["budget_bytes"]), result["limit_bytes"]
    screen.pair("memory", f"budget {budget}; " + (f"memory cgroup of {human_bytes(limit)}, Python (twice) included"
                                                  if limit else "no memory cgroup can be made here: no limit"))
    ours = result["ways"][result["store"]]
    if ours["budget_bytes"] < result["budget_bytes"]:
        screen.pair("", f"the budget had fallen to {human_bytes(ours['budget_bytes'])} at the end: memory pressure")
    screen.pair("fill", f"{human_bytes(ours['fill_written_bytes'])} written through the region in "
                        f"{human_seconds(ours['fill_s'])}, {ours['fill_evicted']:,} blocks evicted")
    if "fill_to_store_bytes" in ours:
        screen.pair("", f"over the wire: {human_bytes(ours['fill_to_store_bytes'])} to Redis, "
                        f"{human_bytes(ours['fill_from_store_bytes'])} back")
    screen.pair("look up", f"Zipf {EXPONENT}, popular rows scattered, {ours['seconds']:.0f} s each, "
                           f"{ours['warm']['seconds']:.1f} s warm-up before")
    screen.line(_ROW.format("", "hit", "p50", "p99", "look-ups/s", "came in", "peak"), "bold")
    for way, figures in result["ways"].items():
        came = figures.get("from_store_bytes", figures["read_bytes"])
        peak = figures["peak_bytes"]
        screen.line(_ROW.format(_NAMES[way], f"{100 * figures['hit_ratio']:.1f} %",
                                _latency(figures["p50_us"]), _latency(figures["p99_us"]),
                                f"{figures['per_s']:,.0f}", human_bytes(came), human_bytes(peak) if peak else "-"),
                    "bold red" if figures["wrong"] else None)
    nbytes = np.full(-(-result["table_bytes"] // BLOCK_BYTES), BLOCK_BYTES, dtype=np.int64)
    screen.line(screen.residency(unpacked(ours["resident"], len(nbytes)), nbytes), "green")
    screen.pair("evicted", f"{ours['evicted']:,} blocks meanwhile, {ours['rescued']:,} rescued at the door; "
                           f"{ours['evict_waits']:,} touches waited")
    _say_memmap(screen, result)
    _say_summary(screen, result, ours)
    for figures in result["ways"].values():      # for the picture above alone
        figures.pop("resident", None)


def _latency(us):
    return f"{us:.1f} us" if us < 100 else human_seconds(us / 1e6)


def _say_memmap(screen, result):
    """The honest lines: when the kernel's way is the better one."""
    rates = {way: figures["per_s"] for way, figures in result["ways"].items()}
    best = max((way for way in rates if way not in MAPPED), key=rates.get)
    mapped = max(MAPPED, key=rates.get)
    ratio = rates[mapped] / rates[best]
    name = "np.memmap" if mapped == "memmap" else "np.memmap with MADV_RANDOM"
    said = f"{name} was {ratio:.1f} x as fast as {_NAMES[best]}" if ratio >= 1 else \
        f"{_NAMES[best]} was {1 / ratio:.1f} x as fast as {name}"
    screen.pair("honest", said + ".")
    screen.pair("", "Its page cache had the whole of the limit, uffd the budget." if result["limit_bytes"]
                else "Without a limit, all of its file can stay in the page cache.")
    screen.pair("", "Take np.memmap for a raw file on a local disk that is only read;")
    screen.pair("", "uffd where it is no such file, is written to, or keeps to a budget.")


def _say_summary(screen, result, ours):
    result["wrong"] = sum(figures["wrong"] + figures["warm"]["wrong"] for figures in result["ways"].values())
    result["same_bits"] = not result["wrong"]
    count = sum(figures["look_ups"] + figures["warm"]["look_ups"] for figures in result["ways"].values())
    at_most = f", peak {human_bytes(ours['peak_bytes'])} of {human_bytes(result['limit_bytes'])}" \
        if ours["peak_bytes"] and result["limit_bytes"] else ""
    screen.line(f"{human_bytes(result['table_bytes'])} in {human_bytes(result['budget_bytes'])}{at_most} | "
                f"{count:,} look-ups | " + (f"{result['wrong']:,} ROWS DIFFER" if result["wrong"] else "same bits"),
                "bold red" if result["wrong"] else "bold green")
