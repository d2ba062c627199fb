"""Part three: a process that serves requests from the model's weights, and counts them, moves to another while it is
asked. The two are processes of their own (`_service.py`); here is who asks, and checks every answer."""

import json
import secrets
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import uffd

from . import _eager, _plan
from ._screen import human_bytes, human_seconds

SECONDS = 0.7                                    # before the move, and after it
_DEADLINE_S = 60.0
_ROW_MOST_BYTES = 32768
_ROWS_MOST = 1 << 18
_ANSWER = struct.Struct("!Iq")                   # the process, and how many requests were counted; then the row
_MOVED = -1                                      # in place of the count: ask the other one


def run(path: Path, *, screen, pairs, seconds: float = SECONDS) -> dict:
    """Do the whole part with the table of the file `path`; returns the figures. Raises DataError, OSError."""
    _eager.check(path)
    mode = uffd.probe(self_test=False).mode
    if mode == "none":
        raise uffd.Unavailable(38, "part three needs userfaultfd: `uffd probe` has the cure")
    arrays = _eager.load(path)
    name = _plan.make(path, arrays, pairs).table
    rows = _rows(_eager.flat_bytes(arrays[name]), arrays[name])
    screen.head("uffd demo 3: a service moves while it is asked", f"userfaultfd mode: {mode}")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="uffd-demo-"))
        np.save(Path(folder) / "rows.npy", rows)
        key = secrets.token_hex(16)
        after = stack.enter_context(Service("destination", key))
        before = stack.enter_context(Service("source", key, str(Path(folder) / "rows.npy"), after.hears()["url"]))
        before.hears()
        screen.pair("rows", name)
        screen.pair("service", f"looks rows up, {human_bytes(rows.nbytes)} of them, and counts in an array beside")
        client = Client(rows, before, after)
        moved = _ask(client, before, after, seconds)
    return _told(client, moved, before, after, rows, screen)


class Service:
    """One of the two processes, a socket to ask it by, and one to tell it what to do. A context manager: killed."""

    def __init__(self, *arguments):
        self.asked, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._words, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, told:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "uffd.demo._service", *arguments, str(theirs.fileno()),
                 str(told.fileno())], pass_fds=(theirs.fileno(), told.fileno()), stdin=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        self.asked.close()
        self._words.close()

    def say(self, word):
        self._words.send(word.encode())

    def hears(self, timeout_s=_DEADLINE_S):
        """What it says next, or DataError with why it does not."""
        if not select.select([self._words], [], [], timeout_s)[0]:
            raise _eager.DataError(f"the service said nothing for {timeout_s:g} s")
        said = self._words.recv(1 << 20)
        if not said:
            raise _eager.DataError(f"the service ended (exit code {self.process.wait()}); what it said is above")
        return json.loads(said)

    def has_said(self):
        return bool(select.select([self._words], [], [], 0)[0])


class Client:
    """Asks for one row after the other, of whoever serves; notes when each answer came, from which process, and whether
    row and count were right."""

    def __init__(self, rows, first, second):
        self._rows, self._order = rows, np.random.default_rng(1).integers(0, len(rows), 1 << 16)
        self._ways = [first, second]
        self.count, self.wrong, self.pids, self.at_s = 0, 0, [], []

    def ask(self):
        row = int(self._order[self.count % len(self._order)])
        while True:
            asked = self._ways[0].asked
            asked.settimeout(_DEADLINE_S)
            asked.send(struct.pack("!I", row))
            answer = asked.recv(_ANSWER.size + _ROW_MOST_BYTES)
            if not answer:
                raise _eager.DataError("the service ended while it was asked")
            pid, count = _ANSWER.unpack(answer[:_ANSWER.size])
            if count != _MOVED:
                break
            self._ways.pop(0)                    # the same request again, of the other one
        self.count += 1
        self.wrong += count != self.count or answer[_ANSWER.size:] != self._rows[row].tobytes()
        if pid not in self.pids:
            self.pids.append(pid)
        self.at_s.append(time.monotonic())


def _ask(client, before, after, seconds):
    """Through the move and on; what the two say of it: (begun, done, the source's report, the destination's)."""
    def ask_until(over):
        while not over():
            for _ in range(16):
                client.ask()

    def lasting(start_s):
        return lambda: time.monotonic() > start_s + seconds

    ask_until(lasting(time.monotonic()))
    begun_s = time.monotonic()
    before.say("move")
    ask_until(before.has_said)
    reports = before.hears(), after.hears()
    done_s = time.monotonic()
    before.__exit__()                            # nothing of it is needed any more
    ask_until(lasting(time.monotonic()))
    after.say("end")
    return begun_s, done_s, *reports, after.hears()


def _rows(flat, array):
    row_bytes = array[0].nbytes if array.ndim > 1 else 0
    if not 8 <= row_bytes <= _ROW_MOST_BYTES:
        row_bytes = min(2048, flat.size)
    rows = flat[:flat.size // row_bytes * row_bytes].reshape(-1, row_bytes)
    return rows[:_ROWS_MOST]


def _told(client, moved, before, after, rows, screen):
    begun_s, done_s, source, destination, counted = moved
    at_s = np.array(client.at_s)
    gaps_s = np.diff(at_s)
    during = (at_s >= begun_s) & (at_s <= done_s)
    spans = {"before": (at_s[0], begun_s), "during": (begun_s, done_s), "after": (done_s, at_s[-1])}
    rates = {name: int(((at_s >= start_s) & (at_s < end_s)).sum() / max(end_s - start_s, 1e-9))
             for name, (start_s, end_s) in spans.items()}
    right = client.wrong == 0 and counted["sum"] == client.count and client.pids == [before.process.pid,
                                                                                     after.process.pid]
    result = {"same_bits": right, "requests": client.count, "wrong": client.wrong, "pids": client.pids,
              "counted": counted["sum"], "table_bytes": rows.nbytes, "longest_gap_s": float(gaps_s.max()),
              "downtime_s": source["downtime_s"], "move_s": done_s - begun_s, "per_second": rates,
              "requests_during": int(during.sum()), "source": source, "destination": destination}
    screen.pair("moved", f"process {client.pids[0]} -> {client.pids[-1]}, TCP on loopback, with a key, in "
                         f"{human_seconds(result['move_s'])}")
    screen.pair("", f"{human_bytes(source['bytes']['precopy'])} sent before; after the hand-over "
                    f"{human_bytes(source['bytes']['pushed'])} pushed, {human_bytes(source['bytes']['requested'])} "
                    "on touch")
    screen.pair("down", f"{human_seconds(source['downtime_s'])} from the last write there to running here")
    screen.pair("", f"longest wait for an answer: {human_seconds(result['longest_gap_s'])}")
    screen.pair("asked", "  ".join(f"{name} {rate:,}/s" for name, rate in rates.items()))
    screen.line(f"{client.wrong} wrong of {client.count:,} answers | the counter went on, to {counted['sum']:,}",
                "bold green" if right else "bold red")
    return result
