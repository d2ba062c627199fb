"""The source's side: `connect`, and what can be done with a migration from there."""

from __future__ import annotations

import errno
import operator
import os
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from .. import region as regions
from .._coreless import core as _core
from ..errors import MigrationError
from . import _auth, _frames, _states, _stores, _urls
from ._gate import notice_silence, own_pidfd, purpose, take_pidfd
from ._report import Report, Side, Status

__all__ = ["Outgoing", "connect"]

CONNECT_S = 30.0                    # for all of connecting
SWITCHOVER_S = 30.0                 # for the destination to be ready, from the call on
BLOCK_BYTES = 65536                 # of memory that is not ours


def connect(url: str, arrays: Any, *, key: bytes | str | None = None, precopy_bytes_per_s: float | None = None,
            postcopy_bytes_per_s: float | None = None, compress: str | None = None, release: bool = False) -> Outgoing:
    """A migration of `arrays` to the destination that listens at `url` (unix:PATH or tcp://HOST:PORT). Nothing is sent
    yet but what they are: names, types and shapes.

    arrays: a mapping of names to arrays, or a sequence, or one array (its name is "0"). Of regions of this package,
    whole regions travel, and blocks that are not in memory are read where they are without becoming resident. Other
    memory must be contiguous and writable, and is held until the end of the migration; the blocks at its ends may share
    pages with other memory, so writes to those are not stopped, only not sent. key: the same as the destination's;
    without one only this machine is talked to. precopy_bytes_per_s, postcopy_bytes_per_s: None for as fast as it goes;
    what the destination waits for is never held back. compress: "zstd" (the machine's libzstd, at both ends): for
    connections slower than some 300 MB/s; what does not get smaller goes as it is. release: memory is given back as the
    destination acknowledges it; touching it here afterwards is SIGBUS.

    Blocks until the destination has answered, 30 s at most. TypeError for objects, ValueError for memory that can't be
    sent, MigrationError if it is refused, OSError for the connection; uffd.Unavailable where writes can't be seen.
    """
    if compress not in (None, "zstd"):
        raise ValueError(f"compress must be None or 'zstd', not {compress!r}")
    address, secret = _urls.parse(url), _auth.check_key(key)
    memory, layout = _gathered(arrays)
    migration = secrets.token_hex(16)
    deadline_s = time.monotonic() + CONNECT_S
    began_ns = time.monotonic_ns()
    wire = _core.Wire(True, _states.encoded("source"), memory, BLOCK_BYTES)
    try:
        push, ask = _pair(address, secret, "new", migration, deadline_s)
    except BaseException:
        wire.end()                               # or its regions would be of this migration for ever
        raise
    try:
        if compress:
            wire.pack()
        _offer(wire, ask, memory, layout, compress, address, deadline_s)
        wire.limit(_rate(precopy_bytes_per_s), _rate(postcopy_bytes_per_s))
        wire.start(bool(release))
    except BaseException:
        push.close()
        ask.close()
        wire.end()
        raise
    for one in (push, ask):
        one.setblocking(True)
    wire.attach(push.detach(), ask.detach())
    return Outgoing(wire, memory, layout, address, secret, migration, began_ns)


class Outgoing(Side):
    """A migration, at its source. A context manager: leaving it before the switchover cancels it; after, it waits for
    the end. All methods are thread-safe and release the interpreter lock while they wait."""

    def __init__(self, wire: Any, memory: list[Any], layout: _frames.Layout, address: _urls.Address,
                 key: bytes | None, migration: str, began_ns: int) -> None:
        self._wire, self._memory, self._layout = wire, memory, layout
        self._address, self._key, self._migration = address, key, migration
        self._began_ns = began_ns
        self._setup_ns = time.monotonic_ns() - began_ns
        self._pid = os.getpid()
        self._calls = threading.Lock()          # of those that change the state
        self._dirty: list[int] = []             # what each round had to send
        self._ended = False

    @property
    def _owner(self) -> str:
        return _states.owner_of("source", self._phase)

    def precopy(self, rounds: int = 1, until_dirty_bytes: int | None = None, timeout_s: float | None = None) -> None:
        """Sends memory while the program writes to it: all of it, then in each further round what was written since.

        rounds: at most so many. until_dirty_bytes: no further one when less than that was written meanwhile. Blocks
        until the last round is there, for timeout_s at most (None: as long as it takes): what was not sent by then
        comes after the switchover, so a program that writes faster than the connection is no obstacle.
        MigrationError when the connection breaks, or the migration is past its switchover.
        """
        rounds = operator.index(rounds)
        if rounds < 1:
            raise ValueError(f"rounds must be positive, not {rounds}")
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._calls:
            for _ in range(rounds):
                self._check_running()
                self._dirty.append(self._wire.round())
                left_ns = None if deadline_s is None else max(0, int((deadline_s - time.monotonic()) * 1e9))
                if not self._wire.round_ends(left_ns):
                    return
                self._check_running()
                if until_dirty_bytes is not None and self._wire.dirty_blocks() * BLOCK_BYTES <= until_dirty_bytes:
                    return

    def switchover(self, state: bytes = b"", *, on_write: str = "stop") -> None:
        """Hands the memory over, with `state` (bytes, up to 64 MiB); returns when the destination runs.

        From here on a write to it at the source waits, until the migration is cancelled or fails before the hand-over,
        else to the end of the process (on_write="stop"), or ends this process by a signal, with a line on stderr, once
        the destination has everything (on_write="kill"). A thread that writes to it while it holds the interpreter
        lock stops this whole interpreter so; the hand-over and the sending go on without it.

        MigrationError says who has the memory: "source", and its program goes on, or "unknown", when the connection
        broke at that very instant: writers wait then, and `recover` finds out.
        """
        if on_write not in ("stop", "kill"):
            raise ValueError(f"on_write must be 'stop' or 'kill', not {on_write!r}")
        with self._calls:
            self._check_running()
            number = self._wire.switchover(bytes(state), int(SWITCHOVER_S * 1e9), on_write == "kill")
            if self._owner != "source":
                self._wire.keep(self._memory)
        if number:
            raise self._error(f"the switchover failed: {os.strerror(-number)}")

    def wait(self, timeout_s: float | None = None) -> Report:
        """Blocks until the destination has all of it. TimeoutError; MigrationError when that can't be by waiting: it
        is paused (`recover`), cancelled, or has failed."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.done():
            phase = self._phase
            left_ns = None if deadline_s is None else int((deadline_s - time.monotonic()) * 1e9)
            if left_ns is not None and left_ns <= 0:
                raise TimeoutError(errno.ETIMEDOUT, f"the migration is not complete within {timeout_s} s "
                                   f"({phase.name.lower()}, {self._wire.left} blocks are left)")
            if phase.name.startswith("PAUSED"):
                raise self._error("the migration is paused")
            self._wire.wait_phase(int(phase), left_ns)
        if self.status is not Status.COMPLETED:
            raise self._error(f"the migration is {self.status.name.lower()}")
        return self.report()

    def report(self) -> Report:
        """What has happened so far."""
        figures = self._wire.figures()
        return Report.of(figures, side="source", phase=self._phase, began_ns=self._began_ns,
                         now_ns=time.monotonic_ns(), setup_ns=self._setup_ns,
                         dirty_blocks=self._dirty, bytes_passed=figures["bytes_passed"])

    def done(self) -> bool:
        """Whether nothing more will happen: completed, cancelled or failed."""
        return self._phase >= _states.Phase.COMPLETED

    def pause(self) -> None:
        """Breaks the connection; both sides are PAUSED. The destination's program runs on what it has."""
        self._wire.pause()

    def recover(self, url: str | None = None) -> None:
        """Connects again, to the same destination or where it is reached now; both sides tell what they have, and go
        on from there. Blocks until they agree, 30 s at most. OSError, MigrationError: it is paused still, and this may
        be tried again."""
        address = self._address if url is None else _urls.parse(url)
        deadline_s = time.monotonic() + CONNECT_S
        with self._calls:
            if not self._phase.name.startswith("PAUSED"):
                raise self._error(f"only a paused migration is recovered, and this one is {self.status.name.lower()}")
            push, ask = _pair(address, self._key, "again", self._migration, deadline_s)
            for one in (push, ask):
                one.setblocking(True)
            self._wire.attach(push.detach(), ask.detach())
            self._address = address
            while True:
                phase = self._phase
                if not phase.name.startswith("RECOVERING"):
                    break
                left_ns = int((deadline_s - time.monotonic()) * 1e9)
                if left_ns <= 0:
                    self._wire.pause(errno.ETIMEDOUT)
                    break
                self._wire.wait_phase(int(phase), left_ns)
        if self._phase.name.startswith(("PAUSED", "FAILED")):
            raise self._error("the migration could not be taken up again")

    def cancel(self) -> None:
        """Before the hand-over: gives it up, and the source's program goes on. MigrationError when it is too late."""
        if self._wire.cancel() or (self.status in (Status.CANCELLED, Status.FAILED) and self._owner == "source"):
            return
        raise self._error("it is too late to cancel")

    def close(self) -> None:
        """Ends what is under way: cancels before the hand-over; after it, what was not sent is lost to the destination.
        Idempotent."""
        if self._ended or os.getpid() != self._pid:
            return
        self._ended = True
        if not self.done() and not self._wire.cancel():
            self._wire.lose(errno.ENOTRECOVERABLE)
        self._wire.end()
        if self._owner == "source":
            self._memory = []

    def __enter__(self) -> Outgoing:
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        try:
            if kind is None and self._owner == "destination":
                self.wait()
        finally:
            self.close()

    def __del__(self) -> None:
        if not self.__dict__.get("_ended", True) and os.getpid() == self._pid:
            if not self.done():
                warnings.warn(f"{self!r} was dropped before its end", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        return f"<uffd.migrate.Outgoing to {self._address}: {self.status.name}>"

    def _check_running(self) -> None:
        if self._phase not in (_states.Phase.SETUP, _states.Phase.PRECOPY):
            raise self._error(f"the migration is {self.status.name.lower()}")

    def _error(self, what: str) -> MigrationError:
        owner = self._owner
        why = f" ({os.strerror(self._wire.last_error)})" if self._wire.last_error else ""
        who = {"source": "the memory is here, and its program goes on", "destination": "the destination has the memory",
               "unknown": "this side can't tell who has the memory, so writers wait: recover() asks"}[owner]
        cure = "; recover() takes it up again" if self._phase.name.startswith("PAUSED") else ""
        return MigrationError(f"{what}{why}: {who}{cure}", owner=owner)


def _pair(address: _urls.Address, key: bytes | None, what: str, migration: str,
          deadline_s: float) -> tuple[socket.socket, socket.socket]:
    """The two connections of a migration."""
    made: list[socket.socket] = []
    try:
        for which in ("push", "ask"):
            made.append(_urls.connect(address, has_key=key is not None, deadline_s=deadline_s))
            notice_silence(made[-1])
            _auth.prove(made[-1], key, purpose(what, migration, which), deadline_s=deadline_s)
    except BaseException:
        for one in made:
            one.close()
        raise
    return made[0], made[1]


def _offer(wire: Any, ask: socket.socket, memory: list[Any], layout: _frames.Layout, compress: str | None,
           address: _urls.Address, deadline_s: float) -> None:
    """Says what would be sent, with the descriptors that a destination on this machine can use; and hears what it makes
    of that."""
    frames = _frames.Frames(ask)
    files = _files(memory) if address.path else {}
    stores = _described(memory, files)
    for i in files:
        wire.passes(i)
    mine = own_pidfd(ask)
    fds = [*files.values(), *([mine] if mine >= 0 else [])]
    try:
        frames.send("offer", deadline_s=deadline_s, byteorder=sys.byteorder, passed=list(files),
                    compress=compress or "", pidfd=mine >= 0, stores=stores, **_frames.described(layout))
        for fd in fds:
            socket.send_fds(ask, [b"p" if fd == mine else b"f"], [fd])
    finally:
        for fd in fds:
            os.close(fd)
    answer = frames.receive("accepted", "refused", deadline_s=deadline_s)
    if answer["type"] == "refused":
        raise MigrationError("the destination refused: " + _frames.text(answer, "why", most_bytes=1 << 12))
    if answer.get("pidfd") is True:
        wire.watch(take_pidfd(ask))
    for i in _frames.numbers({"opened": [], **answer}, "opened", len(memory)):
        if str(i) not in stores:
            raise MigrationError("the destination says that it has opened what was not described to it")
        wire.opens(i)


def _described(memory: list[Any], files: dict[int, int]) -> dict[str, Any]:
    """By part: the providers that the destination may be able to open."""
    found = {str(i): _stores.describe(one) for i, one in enumerate(memory)
             if isinstance(one, regions.Region) and i not in files}
    return {i: description for i, description in found.items() if description is not None}


def _files(memory: list[Any]) -> dict[int, int]:
    """Of each part with shared backing: a descriptor of its file, for a destination on this machine."""
    found = {i: one._memory_fd() for i, one in enumerate(memory) if isinstance(one, regions.Region)}
    return {i: fd for i, fd in found.items() if fd is not None}


def _rate(bytes_per_s: float | None) -> int:
    if bytes_per_s is None:
        return 0
    if not bytes_per_s >= 1:
        raise ValueError(f"bytes per second must be 1 or more, not {bytes_per_s}")
    return int(min(bytes_per_s, 1 << 62))


# ---- which memory -----------------------------------------------------------------------------------------------


def _gathered(arrays: Any) -> tuple[list[Any], _frames.Layout]:
    """The pieces of memory that travel, for the core, and what lies in them."""
    memory: list[Any] = []
    parts: list[_frames.Part] = []
    places: dict[int, int] = {}                  # the address of a region -> its part
    found = []
    for name, one in _named(arrays):
        view = one.array() if isinstance(one, regions.Region) else np.asarray(one)
        _check(name, view)
        region = _region_of(view)
        if region is not None:
            if region.address not in places:
                places[region.address] = len(parts)
                memory.append(region)
                parts.append(_frames.Part(region.nbytes, region.block_bytes, region.backing))
            part, offset = places[region.address], _address(view) - region.address
        else:
            part, offset = len(parts), 0
            flat = view.reshape(-1, order="A").view(np.uint8) if view.size else np.zeros(1, np.uint8)
            memory.append(flat)
            parts.append(_frames.Part(flat.nbytes, BLOCK_BYTES, "anon"))
        found.append(_frames.Array(name, part, offset, view.dtype, view.shape,
                                   "C" if view.flags.c_contiguous else "F"))
    if not found:
        raise ValueError("there are no arrays to migrate")
    _check_apart([one for one in memory if isinstance(one, np.ndarray)])
    return memory, _frames.Layout(tuple(parts), tuple(found))


def _named(arrays: Any) -> list[tuple[str, Any]]:
    if isinstance(arrays, Mapping):
        return [(str(name), one) for name, one in arrays.items()]
    if isinstance(arrays, (np.ndarray, regions.Region)):
        return [("0", arrays)]
    return [(str(i), one) for i, one in enumerate(arrays)]


def _check(name: str, view: np.ndarray) -> None:
    if view.dtype.hasobject:
        raise TypeError(f"array {name!r}: dtype {view.dtype} holds Python objects, which can't move to another process")
    if not (view.flags.c_contiguous or view.flags.f_contiguous):
        raise ValueError(f"array {name!r} is not contiguous: migrate the array that it is a view of")


def _region_of(view: np.ndarray) -> Any:
    try:
        return regions.region_of(view) if view.size else None
    except ValueError:
        return None


def _address(view: np.ndarray) -> int:
    return view.__array_interface__["data"][0]


def _check_apart(arrays: list[np.ndarray]) -> None:
    """Two views of one memory would become two memories."""
    spans = sorted((_address(one), _address(one) + one.nbytes) for one in arrays)
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise ValueError("two of the arrays share memory: migrate the one that both are views of")
