"""Who may write to a namespace: one session at a time, for as long as it renews its lease.

The lease keeps sessions apart while they are alive. What keeps the bytes right is the fence: each new writer gets a
higher number, and raises it in every group of blocks before its first write. A writer that was stopped for longer than
its lease, and comes back after another one wrote, has a fence below: its writes are refused by the scripts that would
make them, on every shard, whatever its clock says.
"""

from __future__ import annotations

import errno
import hashlib
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from . import redis_layout as layout
from .redis_layout import GROUPS
from .redis_server import Command, Server
from .redis_store import Namespace, problem

__all__ = ["Lease", "process_identity"]

_FENCES_MAX = 8                                  # tries to get above a fence that a failover brought back


def process_identity(pid: int) -> str:
    """A process as no other one is called, on this machine and others, now and later."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        started = file.read().rpartition(b")")[2].split()[19].decode()       # in ticks since boot
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{socket.gethostname()}:{pid}:{started}:{file.read(8)}"


class Lease:
    """The right to write, had from the first `ensure` on. Every method may be called by several threads."""

    def __init__(self, server: Server, space: Namespace, token: str, lease_s: float,
                 read_at: dict[int, int]) -> None:
        self._server = server
        self._space = space
        self._token = token
        self._lease_s = lease_s
        self._read_at = read_at                  # of the groups that were read: their newest version then
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: tuple[int, str] | None = None            # errno and how; for ever
        self.fence = 0                           # 0: not asked for yet
        self.owner = hashlib.sha256(token.encode()).digest()[:8]
        self.writer = int.from_bytes(self.owner, "little")
        self.newest: list[int] = []              # of each group: the highest version used

    @property
    def is_ours(self) -> bool:
        return self.fence > 0 and self._lost is None

    def ensure(self, deadline: float) -> None:
        """Returns with the right to write. OSError if another session has it, or had it since. Waits for the lease of
        a writer that died to run out."""
        if self._lost is not None:
            raise self._error(*self._lost)
        if self.fence:
            return
        with self._lock:
            if self._lost is not None:
                raise self._error(*self._lost)
            if not self.fence:
                self._take(deadline)

    def was_ours(self, deadline: float) -> bool:
        """Whether this session wrote before this object was made: in another host, or in one that died. OSError if it
        did, and another one had the lease since."""
        keys = self._space.keys
        command = layout.evaluated(layout.HAD_IT, [keys.head, keys.writers], self._token, self.owner)
        ((word, _, *who),) = self._server.run([(keys.head, command)], deadline)
        if word == b"TAKEN":
            raise self._taken(who[0].decode(errors="replace"))
        return word == b"SAME"

    def lose(self, number: int, how: str) -> OSError:
        """It is another's, or nobody's; the error to raise. Nothing is written from here on."""
        self._lost = self._lost or (number, how)
        self._stop.set()
        return self._error(*self._lost)

    def check(self, deadline: float) -> None:
        """Renews it; OSError if another session had it since."""
        self._ask(deadline)

    def release(self) -> None:
        """The next writer need not wait."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._server.timeout_s + self._server.socket_timeout_s)
        if self.is_ours:
            key = self._space.keys.lease
            self._server.run([(key, layout.evaluated(layout.RELEASE, [key], self._token))])

    # ---- taking it ----

    def _take(self, deadline: float) -> None:
        above = 0
        for _ in range(_FENCES_MAX):
            word, fence = self._ask(deadline, above)
            above = self._raise_fences(fence, is_new=word == "NEW", deadline=deadline)
            if above < fence:
                break
        else:
            raise self._error(errno.EIO, f"its groups have fences above {fence}, time and again: do two clusters share "
                              "shards?")
        self.fence = fence
        self._thread = threading.Thread(target=_renew, args=(weakref.ref(self), self._stop, self._lease_s / 3),
                                        name="uffd-lease", daemon=True)
        self._thread.start()

    def _ask(self, deadline: float, above: int = 0) -> tuple[str, int]:
        """("NEW" or "SAME", fence)."""
        keys, had = self._space.keys, self.fence
        least_left_ms: int | None = None
        while True:
            command = layout.evaluated(layout.ACQUIRE, [keys.head, keys.lease, keys.writers], self._token,
                                       max(1, int(self._lease_s * 1e3)), f"{self._space.generation:016x}", had, above,
                                       self.owner)
            ((word, number, *who),) = self._server.run([(keys.head, command)], deadline)
            holder = who[0].decode(errors="replace") if who else ""
            match word:
                case b"NEW" | b"SAME":
                    return word.decode(), number
                case b"TAKEN":
                    raise self._taken(holder)
                case b"HELD":
                    if had:
                        raise self.lose(errno.EBUSY, f"{holder} writes to it now: this session was stopped or cut off "
                                        f"for longer than its lease of {self._lease_s:g} s")
                    if least_left_ms is not None and number > least_left_ms:
                        raise self._error(errno.EBUSY, f"{holder} writes to it: one session at a time can. End that "
                                          "one, or take another namespace")
                    least_left_ms = number
                    self._wait_for_holder(holder, number, deadline)
                case b"STATE":
                    raise self.lose(errno.ENODATA, f"it is {holder}: somebody removes it")
                case _:
                    raise self.lose(errno.ENODATA, "its head is gone, or of another generation: it was removed, or "
                                    "the server started again without its data")

    def _taken(self, holder: str) -> OSError:
        return self.lose(errno.EBUSY, f"{holder} had it since: this session was stopped or cut off for longer than its "
                         f"lease of {self._lease_s:g} s, and its writes are refused. Open it anew, and read again")

    def _wait_for_holder(self, holder: str, left_ms: int, deadline: float) -> None:
        """A holder that lives renews its lease, and more is left of it then; one that died lets it run out."""
        pause_s = min(max(left_ms, 10) / 1e3, 0.25)
        if time.monotonic() + pause_s > deadline:
            raise self._error(errno.EBUSY, f"{holder} has the right to write for {left_ms} ms more: one session at "
                              "a time can. Try again then, or end that one")
        if self._stop.wait(pause_s):
            raise self._error(errno.ECANCELED, "closed while it waited for another writer")

    def _raise_fences(self, fence: int, *, is_new: bool, deadline: float) -> int:
        """Puts our fence before all groups. The highest that is there and above or another's, or one less than ours."""
        keys, generation = self._space.keys, layout.raw(self._space.generation)
        commands: list[Command] = [(keys.index(group), layout.evaluated(
            layout.RAISE, [keys.index(group)], generation, fence, self.owner)) for group in range(GROUPS)]
        answers = self._server.run(commands, deadline)
        for group, (word, *_) in enumerate(answers):
            if word in (b"LOST", b"OTHER"):
                raise self.lose(errno.ENODATA, f"{keys.index(group)} is gone, or of another generation: the server "
                                "or a shard started again without its data, or the namespace was removed")
        fenced = [answer[1] for answer in answers if answer[0] == b"FENCED"]
        if fenced:
            return max(fenced)
        for group, (_, _, newest) in enumerate(answers):
            if is_new and self._read_at.get(group, newest) != newest:
                raise self.lose(errno.EBUSY, "another session has written to it since this one read it: what was "
                                "read is out of date, and writing it back would undo that. Open it again")
        self.newest = [answer[2] for answer in answers]
        return fence - 1

    def _error(self, number: int, text: str) -> OSError:
        return problem(self._server, self._space.name, number, text)


def _renew(lease_ref: Callable[[], Lease | None], stop: threading.Event, pause_s: float) -> None:
    """A thread of its own, while the lease is held by anybody."""
    while not stop.wait(pause_s):
        lease: Any = lease_ref()
        if lease is None:
            return
        try:
            lease.check(time.monotonic() + pause_s)
        except OSError:                          # lost: nothing more to do; no answer: the next round tries again
            pass
        lease = None
