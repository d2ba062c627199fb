"""The destination's side: `listen`, what comes, and the memory that it brings."""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import threading
import time
import warnings
from contextlib import suppress
from typing import Any, cast

import numpy as np

from .._coreless import core as _core
from ..engine import Engine
from ..errors import MigrationError, UffdError
from ..region import Region
from . import _auth, _frames, _states, _stores, _urls
from ._gate import Gate, last_words, own_pidfd, take_pidfd
from ._report import Report, Side, Status

__all__ = ["Arrival", "Incoming", "listen"]

SETUP_S = 10.0                      # for what is agreed on before any memory moves


def listen(url: str, *, key: bytes | str | None = None, engine: Engine | None = None) -> Incoming:
    """Listens for migrations at `url`: unix:PATH, or tcp://HOST:PORT (port 0: the kernel chooses, see `.url`).

    key: what a source has to have, too: it is shown by challenge and response, never sent. Without one only this
    machine is listened to, and unix sockets. engine: of the regions that come, None: the default one. Blocks until the
    process that listens runs, a fraction of a second. OSError; MigrationError for an address that needs a key.
    """
    return Incoming(Gate(_urls.parse(url), _auth.check_key(key)), engine)


class Incoming:
    """Who listens. A context manager. Until it is closed, what has arrived can be recovered."""

    def __init__(self, gate: Gate, engine: Engine | None) -> None:
        self._gate, self._engine = gate, engine
        self._begun: Arrival | None = None
        self._calls = threading.Lock()
        self._closed = False

    @property
    def url(self) -> str:
        """Where it listens."""
        return self._gate.url

    def accept(self, timeout_s: float | None = None) -> Arrival:
        """The next migration, when the memory is this process's: it may run on it at once, and what is missing comes at
        its touch. Blocks until then, while precopy goes on, too.

        TimeoutError: the same migration goes on with the next call. MigrationError: it was cancelled, refused or lost
        before the hand-over, and the source has the memory (`owner`).
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._calls:
            while True:
                if self._closed:
                    raise ValueError("this Incoming is closed")
                left_s = 3600.0 if deadline_s is None else deadline_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(errno.ETIMEDOUT, f"no migration has arrived within {timeout_s} s")
                arrival = self._look(min(left_s, 0.1))
                if arrival is not None:
                    return arrival

    def _look(self, wait_s: float) -> Arrival | None:
        begun = self._begun
        if begun is None or (begun._phase is _states.Phase.PAUSED_EARLY and _readable(self._gate.new)):
            found = self._gate.accept(wait_s)
            if found is None:
                return None
            if begun is not None:                # another one is here, and the last did not come back
                self._begun = None
                begun._give_up()
            self._begun = _begin(*found, self._gate, self._engine)
            return None
        phase = begun._phase
        if begun._running():
            self._begun = None
            return begun
        if phase >= _states.Phase.COMPLETED:
            self._begun = None
            error = begun._error(f"the migration is {begun.status.name.lower()} before the hand-over")
            begun._give_up()
            raise error
        begun._wire.wait_phase(int(phase), int(wait_s * 1e9))
        return None

    def close(self) -> None:
        """Listens no more. What has arrived stays; what is paused can't be recovered any more. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._begun is not None:
            self._begun._give_up()
        self._gate.close()

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Arrival(Side):
    """A migration, at its destination: `arrays` (by name) and `state`, as the source gave them, and the `regions` that
    the arrays lie in. A context manager: leaving it waits for the rest. While some blocks have yet to come, a touch of
    one waits for it; if the connection breaks, until the source recovers; if the source is given up (`close`), such a
    touch is SIGBUS, and never zeros."""

    def __init__(self, wire: Any, regions: list[_Arriving], layout: _frames.Layout, again: socket.socket,
                 began_ns: int) -> None:
        self._wire, self.regions, self._layout, self._again = wire, regions, layout, again
        self._began_ns, self._setup_ns = began_ns, time.monotonic_ns() - began_ns
        self._pid = os.getpid()
        self._ended = False
        self.arrays = {one.name: regions[one.part].array(one.dtype, one.shape, offset=one.offset,
                                                         order=cast(Any, one.order))
                       for one in layout.arrays}

    @property
    def state(self) -> bytes:
        """What the source gave to switchover()."""
        return self._wire.state

    def _running(self) -> bool:
        return _states.owner_of("destination", self._phase) == "destination"

    def wait(self, timeout_s: float | None = None) -> Report:
        """Blocks until all is here; through pauses, too. TimeoutError; MigrationError if what is missing will never
        come."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            phase = self._phase
            if phase >= _states.Phase.COMPLETED:
                break
            left_ns = None if deadline_s is None else int((deadline_s - time.monotonic()) * 1e9)
            if left_ns is not None and left_ns <= 0:
                raise TimeoutError(errno.ETIMEDOUT, f"{self._wire.left} blocks have not come within {timeout_s} s: "
                                   f"the migration is {self.status.name.lower()}")
            self._wire.wait_phase(int(phase), left_ns)
        if self.status is not Status.COMPLETED:
            raise self._error("the migration has failed")
        return self.report()

    def recover(self, timeout_s: float | None = None) -> None:
        """Blocks until a paused migration goes on: it is the source that connects anew, with Outgoing.recover(), to the
        Incoming that this came from, which must be open. TimeoutError; MigrationError if it has failed."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while self._phase.name.startswith(("PAUSED", "RECOVERING")):
            left_ns = None if deadline_s is None else int((deadline_s - time.monotonic()) * 1e9)
            if left_ns is not None and left_ns <= 0:
                raise TimeoutError(errno.ETIMEDOUT, f"the source has not come back within {timeout_s} s")
            self._wire.wait_phase(int(self._phase), left_ns)
        if self.status is Status.FAILED:
            raise self._error("the migration has failed")

    def report(self) -> Report:
        """What has happened so far."""
        figures = self._wire.figures()
        return Report.of(figures, side="destination", phase=self._phase, began_ns=self._began_ns,
                         now_ns=time.monotonic_ns(), setup_ns=self._setup_ns,
                         bytes_passed=figures["bytes_passed"])

    def close(self) -> None:
        """Ends the migration. What has not come by now never will: a touch of it is SIGBUS. Arrays stay; idempotent."""
        if self._ended or os.getpid() != self._pid:
            return
        self._ended = True
        if self._phase < _states.Phase.COMPLETED:
            self._wire.lose(errno.ENOTRECOVERABLE)
        if self._wire.end():                     # else a thread still reads from there
            with suppress(OSError):              # the Incoming is closed: nobody can come back anyway
                self._again.send(last_words(self._phase), socket.MSG_DONTWAIT)
            self._again.close()

    def __enter__(self) -> Arrival:
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        try:
            if kind is None and self.status is not Status.FAILED:
                self.wait()
        finally:
            self.close()

    def __del__(self) -> None:
        if not self.__dict__.get("_ended", True) and os.getpid() == self._pid:
            if self._phase < _states.Phase.COMPLETED:
                warnings.warn(f"{self!r} was dropped before its end", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        return f"<uffd.migrate.Arrival of {len(self.arrays)} arrays: {self.status.name}>"

    def _give_up(self) -> None:
        """Before the hand-over: nobody has seen the arrays."""
        self.close()
        self.arrays = {}
        for region in self.regions:
            region._shut_when_unused()

    def _error(self, what: str) -> MigrationError:
        owner = _states.owner_of("destination", self._phase)
        who = {"source": "the source has the memory",
               "destination": f"the memory is here, without {self._wire.left} blocks; a touch of one is SIGBUS"}[owner]
        why = f" ({os.strerror(self._wire.last_error)})" if self._wire.last_error else ""
        return MigrationError(f"{what}{why}: {who}", owner=owner)


class _Arriving(Region):
    """A region whose blocks a migration brings: what is to be populated is asked for, and waited for here."""

    _wire: Any = None

    @classmethod
    def over(cls, part: _frames.Part, engine: Engine | None, name: str, memfd: int, provider: Any) -> _Arriving:
        """memfd: of the file that its pages are in already, taken over; -1: none. provider: the source's, opened here;
        None: what does not come is zeros."""
        region = cast(_Arriving, cls.__new__(cls, engine=engine))
        region._memfd = memfd
        cls.__init__(region, part.nbytes, provider, engine=engine, name=name, mode="c", block_bytes=part.block_bytes,
                     backing=part.backing, readahead_bytes=0)
        return region

    def _bring_in(self, runs: np.ndarray, timeout_s: float | None) -> None:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while self._wire is not None and _core.wire_want(self, runs):
            self._check_open()
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise TimeoutError(errno.ETIMEDOUT, f"region {self.name!r}: not populated within {timeout_s} s")
        super()._bring_in(runs, None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))


def _begin(migration: str, push: socket.socket, ask: socket.socket, gate: Gate,
           engine: Engine | None) -> Arrival | None:
    """Agrees with a source that has shown the key, and makes the memory. None: it went away, or was refused."""
    began_ns, deadline_s = time.monotonic_ns(), time.monotonic() + SETUP_S
    regions: list[_Arriving] = []
    again = None
    with push, ask:
        frames = _frames.Frames(ask)
        try:
            offer = frames.receive("offer", deadline_s=deadline_s)
            layout = _frames.layout(offer, page_bytes=_core.PAGE_BYTES)
            if _frames.text(offer, "byteorder") != sys.byteorder:
                raise MigrationError(f"migration refused: this machine is {sys.byteorder}-endian, and the source not")
            passed = _passed(offer, layout)
            files = {i: _file(ask, layout.parts[i].nbytes) for i in passed}
            stores = _opened(offer, layout, passed)
            regions += [_Arriving.over(part, engine, f"migrated {i}", files.pop(i, -1), stores.get(i))
                        for i, part in enumerate(layout.parts)]
            wire = _core.Wire(False, _states.encoded("destination"), list(regions), 0)
            for i in passed:
                wire.passes(i)
            for i in stores:
                wire.opens(i)
            if offer.get("pidfd") is True:
                wire.watch(take_pidfd(ask))
            if offer.get("compress") == "zstd":
                wire.pack()
            again = gate.route(migration)
            wire.listen(migration.encode(), again.fileno())
            _accept(frames, ask, list(stores), deadline_s)
            for one in (push, ask):
                one.setblocking(True)
            wire.attach(push.detach(), ask.detach())     # before others are looked for, should these break at once
            wire.start()
        except (MigrationError, OSError, UffdError, MemoryError, ValueError) as error:
            for region in regions:
                region._shut_when_unused()
            if again is not None:
                again.close()
            _refuse(frames, error)
            return None
        for region in regions:
            region._wire = wire
    return Arrival(wire, regions, layout, again, began_ns)


def _accept(frames: _frames.Frames, ask: socket.socket, opened: list[int], deadline_s: float) -> None:
    mine = own_pidfd(ask)
    try:
        frames.send("accepted", deadline_s=deadline_s, pidfd=mine >= 0, opened=opened)
        if mine >= 0:
            socket.send_fds(ask, [b"p"], [mine])
    finally:
        if mine >= 0:
            os.close(mine)


def _opened(offer: dict[str, Any], layout: _frames.Layout, passed: list[int]) -> dict[int, Any]:
    """The source's providers that are open here, too, by part."""
    said = offer.get("stores", {})
    if not isinstance(said, dict):
        raise MigrationError("migration refused: the other side sent what can't be: providers that are no object")
    found = {i: _stores.opened(said.get(str(i)), part.nbytes) for i, part in enumerate(layout.parts) if i not in passed}
    return {i: provider for i, provider in found.items() if provider is not None}


def _passed(offer: dict[str, Any], layout: _frames.Layout) -> list[int]:
    """The parts whose files come along, as the source says."""
    passed = offer.get("passed")
    if not isinstance(passed, list) or not all(
            type(i) is int and 0 <= i < len(layout.parts) and layout.parts[i].backing == "shared" for i in passed):
        raise MigrationError("migration refused: the source passes files of memory that it does not describe")
    return sorted(set(passed))


def _file(ask: socket.socket, nbytes: int) -> int:
    """The descriptor of a part's file, of at least its size."""
    data, fds, _, _ = socket.recv_fds(ask, 1, 1)
    if data != b"f" or len(fds) != 1 or os.fstat(fds[0]).st_size < nbytes:
        for fd in fds:
            os.close(fd)
        raise MigrationError("migration refused: no descriptor came for a region with shared backing, or not of its "
                             "memory; is something between the two that passes bytes only? Then go by tcp://")
    return fds[0]


def _refuse(frames: _frames.Frames, error: BaseException) -> None:
    try:
        frames.send("refused", deadline_s=time.monotonic() + 1.0, why=" ".join(str(error).split())[:1000])
    except (OSError, ValueError):
        pass                                     # it is gone


def _readable(one: socket.socket) -> bool:
    return bool(select.select([one], [], [], 0)[0])
