"""A process of part three: looks rows up, counts each look-up, and moves to another process when it is told to.

`python -m uffd.demo._service source KEY ROWS.npy URL ASKED WORDS`, or `destination KEY ASKED WORDS`: the last two are
descriptors of sockets, for requests and for what part3_move.py has to say.
"""

import json
import os
import socket
import struct
import sys
import threading
import warnings

import numpy as np

import uffd
from uffd import migrate

_ANSWER = struct.Struct("!Iq")
_MOVED = -1


class Service:
    """The state: rows, a counter for each, and how many there were in all; nothing else."""

    def __init__(self, arrays):
        self.rows, self.counts = arrays["rows"], arrays["counts"]
        self.moved = False
        self.at_rest = threading.Event()

    def answer(self, asked):
        """Until the other end is closed. After `moved` is set nothing is written any more: who asks is sent there."""
        pid = os.getpid()
        while request := asked.recv(4):
            if self.moved:
                self.at_rest.set()
                asked.send(_ANSWER.pack(pid, _MOVED))
                continue
            (row,) = struct.unpack("!I", request)
            self.counts[row] += 1
            self.counts[-1] += 1
            asked.send(_ANSWER.pack(pid, int(self.counts[-1])) + self.rows[row].tobytes())


def source(key, path, url, asked, words):
    table = np.load(path)
    rows = uffd.zeros(table.shape, table.dtype)
    rows[:] = table
    counts = uffd.zeros(len(rows) + 1, np.int64)
    service = Service({"rows": rows, "counts": counts})
    thread = threading.Thread(target=service.answer, args=(asked,), daemon=True)
    thread.start()
    words.send(b"{}")
    words.recv(100)
    outgoing = migrate.connect(url, {"rows": rows, "counts": counts}, key=key)
    outgoing.precopy(rounds=2)                   # it answers meanwhile
    service.moved = True                         # a request that is being answered is done before its thread sees this
    service.at_rest.wait(20)
    outgoing.switchover(b"")
    report = outgoing.wait(60)
    words.send(json.dumps(report.as_dict()).encode())
    words.recv(100)                              # until it is killed: its memory is no longer its own


def destination(key, asked, words):
    with migrate.listen("tcp://127.0.0.1:0", key=key) as incoming:
        words.send(json.dumps({"url": incoming.url}).encode())
        arrival = incoming.accept(60)
        service = Service(arrival.arrays)
        thread = threading.Thread(target=service.answer, args=(asked,), daemon=True)
        thread.start()
        report = arrival.wait(60)
        words.send(json.dumps(report.as_dict()).encode())
        words.recv(100)
        words.send(json.dumps({"sum": int(service.counts[:-1].sum())}).encode())
        words.recv(100)


def main(side, key, *rest):
    warnings.simplefilter("ignore", uffd.DegradedWarning)       # the screen says it in its head
    asked, words = (socket.socket(fileno=int(fd)) for fd in rest[-2:])
    if side == "source":
        source(key, *rest[:-2], asked, words)
    else:
        destination(key, asked, words)
    os._exit(0)                                  # a thread that waits for memory that is gone must not hold this up


if __name__ == "__main__":
    main(*sys.argv[1:])
