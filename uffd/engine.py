"""The threads that serve faults, shared by regions."""

from __future__ import annotations

import atexit
import inspect
import operator
import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import _budget
from ._coreless import core as _core
from .errors import BudgetError, DegradedWarning, Unavailable
from .stats import Stats

if TYPE_CHECKING:
    from .monitor import Monitor
    from .region import Region

__all__ = ["Engine", "default_engine"]

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_default: Engine | None = None
_default_lock = threading.Lock()
_told_user_mode = False


def shows_its_arguments(cls: type) -> type:
    """A decorator of classes whose __new__ only chooses a class: help() and editors show what __init__ takes."""
    cls.__new__.__signature__ = inspect.signature(cls.__init__)     # type: ignore[misc, attr-defined]
    return cls


@shows_its_arguments
class Engine:
    """Worker threads, page buffers and a byte budget for any number of regions.

    workers: threads that serve faults, one per CPU this process may use when None, each bound to its CPU. They never
    hold the interpreter lock. When all of them are inside slow fills, others join for as long as that lasts.
    hosts: processes that providers written in Python run in, at most; started when the first is used. One runs as many
    calls of a provider at a time as it allows (`Provider.concurrency`), but like any Python it computes on one CPU:
    more hosts are for providers that compute. Each opens each provider.
    budget_bytes: how much of its regions may be in memory at once, all of them together, pinned blocks and those that
    are on their way included. Cold blocks leave memory before that is reached: what was written goes to the provider
    (mode "r+") or to a file without a name in the folder for temporary files (mode "c"). "auto": 60 % of what the
    machine and the memory cgroup have for us, followed as that changes (UFFD_BUDGET_BYTES overrides it); None: no
    limit. Can be set later; what no longer fits leaves at once. BudgetError, with numbers, for one too small.
    fallback: "eager" makes regions work where no userfaultfd can be had: they are then filled whole when they are made
    (one DegradedWarning; BudgetError where memory lacks). None takes the environment's UFFD_FALLBACK.

    A context manager: leaving it flushes its regions and closes them, now or when their last array dies, and never
    raises for arrays that are in use. `close()` raises BufferError for them. Thread-safe. Raises Unavailable where the
    machine has no userfaultfd and no fallback was asked for, with the cure.
    """

    fills_whole = False                          # true of the fallback's engine: eager.py
    _monitors: tuple[Monitor, ...] = ()

    def __new__(cls, *args: Any, fallback: str | None = None, **options: Any) -> Engine:
        if cls is Engine and _falls_back(fallback):
            from .eager import EagerEngine

            return super().__new__(EagerEngine)
        return super().__new__(cls)

    def __init__(self, workers: int | None = None, budget_bytes: int | str | None = "auto", *, hosts: int = 1,
                 fallback: str | None = None) -> None:
        asked = _budget.checked(budget_bytes)
        hosts = operator.index(hosts)
        if not 1 <= hosts <= _core.MAX_HOST_COUNT:
            raise ValueError(f"hosts must be 1 to {_core.MAX_HOST_COUNT}, not {hosts}")
        require_userfaultfd()
        if workers is None:
            workers = min(len(os.sched_getaffinity(0)), _core.MAX_WORKERS_BASE)
        self._threads: _core.Engine | None = _core.Engine(workers)
        self._regions: weakref.WeakSet[Region] = weakref.WeakSet()
        self._ended = Stats()
        self.workers = workers
        self.hosts = hosts
        self._hosts_lock = threading.Lock()
        self._hosts_set = False
        self._set_budget(asked)
        _engines.add(self)

    # ---- the budget ----

    @property
    def budget_bytes(self) -> int | None:
        """The most that regions may have in memory now, None: no limit. Set it to a number, None or "auto"; what is
        above it leaves memory at once, by other threads. BudgetError for one too small to work with."""
        return None if self._threads is None else _core.budget(self._threads)[0]

    @budget_bytes.setter
    def budget_bytes(self, asked: int | str | None) -> None:
        if self._threads is None:
            raise ValueError("the engine is closed")
        self._set_budget(_budget.checked(asked))

    def _set_budget(self, asked: int | str | None) -> None:
        threads = self._threads
        assert threads is not None
        if isinstance(asked, int):
            _budget.refuse_small(self, asked)
        _core.set_budget(threads, asked if isinstance(asked, int) else None, asked == "auto",
                         [] if asked is None else _budget.cgroup_files(), _budget.pressure_file())
        if isinstance(asked, int) and asked > (self.budget_bytes or asked):
            least = _core.least_budget(threads)
            if (self.budget_bytes or 0) < least:
                raise BudgetError(f"a budget of {asked} bytes: the memory cgroup leaves room for {self.budget_bytes}, "
                                  f"and {least} is the least")

    @property
    def resident_bytes(self) -> int:
        """Bytes of all regions that are in memory, blocks on their way included. Never above `budget_bytes`, but for
        the moment after that was lowered."""
        return 0 if self._threads is None else _core.budget(self._threads)[1]

    def flush(self) -> None:
        """Region.flush of all regions; the first failure is raised, after all were tried."""
        failure = None
        for region in list(self.regions):
            try:
                region.flush()
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _with_hosts(self) -> _core.Engine:
        """The core's engine, ready to start provider hosts. ValueError if it is closed."""
        from . import _hosting

        with self._hosts_lock:
            threads = self._threads
            if threads is None:
                raise ValueError("the engine is closed")
            if not self._hosts_set:
                argv, environment = _hosting.command()
                threads.set_hosts(self.hosts, argv, environment, os.environ.get("UFFD_HOST_DEBUG") == "1",
                                  int(_hosting.START_S * 1e9))
                self._hosts_set = True
            return threads

    @property
    def regions(self) -> Iterator[Region]:
        """The regions that are open."""
        return iter([region for region in list(self._regions) if not region.closed])

    @property
    def closed(self) -> bool:
        """Whether it takes no more regions."""
        return self._threads is None

    def stats(self) -> Stats:
        """The sum over all regions, those included that are closed. Stops no worker, touches no managed page."""
        if self._threads is None:
            return self._ended
        total = Stats.of(self._threads.closed_counts())
        for region in list(self._regions):
            counted = region._stats_or_none()
            total = total if counted is None else total + counted
        return total

    def serve(self, path: str | os.PathLike[str]) -> Monitor:
        """A Monitor: this engine's figures at a new unix socket, for `uffd top PATH`, curl and Prometheus.

        GET /stats answers JSON, GET /metrics Prometheus text (docs/seeing.md). The socket has mode 0600 and goes when
        the engine or the Monitor is closed, or at exit. A small thread answers; it touches no managed page. One that
        a dead process left is replaced; FileExistsError for whatever else is there, other OSErrors with the cure.
        """
        from .monitor import Monitor

        if self.closed:
            raise ValueError("the engine is closed")
        self._monitors = (*self._monitors, Monitor(self, path))
        return self._monitors[-1]

    def _end_monitors(self) -> None:
        for monitor in self._monitors:
            monitor.close()
        self._monitors = ()

    def close(self) -> None:
        """Closes all regions and ends the threads; idempotent. BufferError, with nothing done, while arrays live."""
        if self._threads is None:
            return
        using = [region.name for region in list(self._regions) if region.exports]
        if using:
            raise BufferError(f"arrays of {len(using)} regions are in use (the first: {using[0]!r}); drop them first, "
                              "or leave the engine as a context manager, which waits for them")
        self.flush()
        for region in list(self._regions):
            region.close()
        self._end_monitors()
        self._ended = self.stats()
        threads, self._threads = self._threads, None
        threads.stop()                           # or, if a fill still has a region in hand, when it lets go

    def _leave(self) -> None:
        if self._threads is None:
            return
        try:
            self.flush()
        finally:
            self._end_monitors()
            for region in list(self._regions):
                region._shut_when_unused()
            self._ended = self.stats()
            self._threads = None                 # the regions that are left keep the threads; the last one ends them

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(list(self.regions))} regions"
        return f"<uffd.Engine: {self.workers} workers, {state}>"


def default_engine() -> Engine:
    """The engine that regions use when none is given; made at the first call, and again after it was closed."""
    global _default
    with _default_lock:
        if _default is None or _default.closed:
            _default = Engine()
        return _default


def fills_whole(engine: Engine | None) -> bool:
    """Whether regions of this engine (None: the default one) are filled whole when they are made: eager.py."""
    if engine is None:
        engine = _default
        if engine is None or engine.closed:
            return _falls_back(None)
    return engine.fills_whole if isinstance(engine, Engine) else _falls_back(None)


def _falls_back(fallback: str | None) -> bool:
    if fallback is None:
        fallback = os.environ.get("UFFD_FALLBACK") or None
    if fallback not in (None, "eager"):
        raise ValueError(f"fallback (or UFFD_FALLBACK) must be 'eager', or None for no fallback, not {fallback!r}")
    return fallback == "eager" and _core.mode()[0] == "none"


def require_userfaultfd() -> str:
    """The mode, "full" or "user"; Unavailable with the cure when there is none. Warns once in user mode."""
    global _told_user_mode
    mode, number = _core.mode()
    if mode == "none":
        from .probe import probe
        cures = "; ".join(str(cure) for cure in probe(self_test=False).cures) or "run `python -m uffd probe`"
        raise Unavailable(number, f"no userfaultfd here ({os.strerror(number)}): {cures}; or UFFD_FALLBACK=eager, "
                          "Engine(fallback='eager'): regions are then filled whole when they are made")
    if mode == "user" and not _told_user_mode:
        _told_user_mode = True
        warnings.warn(
            "only user-mode faults can be served here: a system call on a missing page (np.save, readinto, send, ...) "
            "answers EFAULT or writes short; use uffd.pinned() around it. `python -m uffd probe` names the cure",
            DegradedWarning, stacklevel=4)
    return mode


def _flush_at_exit() -> None:
    """A normal exit writes back what is dirty, each region within its timeout_s, those too whose last array has died a
    moment ago. In a forked child there is nothing to write back: its regions are private."""
    failures: list[Exception] = []
    for engine in list(_engines):
        for region in list(engine._regions):
            try:
                region._flush_at_exit()
            except Exception as error:           # the others are to be flushed all the same
                failures.append(error)
    _core.wait_for_graves()
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ExceptionGroup(f"{len(failures)} regions could not be flushed at the end of the process", failures)


atexit.register(_flush_at_exit)
