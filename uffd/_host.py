"""The provider host: `python -m uffd._host CHANNEL_FD CONTROL_FD`, started by an engine, runs its providers in Python.

The main thread watches for the engine's messages, and for its end. The other threads are alike: each waits for a
request and answers it, and one of them is always there to wait (leader and followers), so that a request needs no hop
from thread to thread. All calls of providers are made here.
"""

from __future__ import annotations

import atexit
import errno
import faulthandler
import fcntl
import functools
import gc
import io
import linecache
import operator
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from .providers import hosted

__all__ = ["main"]

OPEN, READ, WRITE, FLUSH = range(4)              # kinds of requests
THREADS_MAX = 64
OFFER_BYTES_MAX = 16 << 20                       # of one row; a multiple of all block sizes
LAST_SECOND_S = 0.7                              # for close() at the end; the engine waits for a second
_OWN_FILES = {__file__, hosted.__file__}
_load_lock = threading.Lock()

Request = tuple[int, int, int]                   # slot, offset, nbytes


class Refused(Exception):
    """What a provider did or is, that can't be; the text is for the user, the most important line last."""


class Link:
    """A provider's way to the engine: its attribute `_session`."""

    def __init__(self, end: Any, number: int) -> None:
        self._end = end
        self._number = number
        self.region: str = end.name_of(number)
        self.block_bytes: int = end.block_bytes_of(number)

    def offer(self, offset: int, data: Any) -> bool:
        row = np.ascontiguousarray(data) if isinstance(data, np.ndarray) else np.asarray(memoryview(data).cast("B"))
        return self.offer_rows(offset, 0, row.reshape(1, -1).view(np.uint8))

    def offer_rows(self, offset: int, step: int, rows: np.ndarray) -> bool:
        """Row i of a 2-d C-contiguous array of uint8 lies at offset + i * step. True if any block was taken."""
        offset, step = operator.index(offset), operator.index(step)
        if offset < 0 or step < 0:
            raise ValueError(f"offset and step must be >= 0, not {offset} and {step}")
        if rows.shape[1] <= OFFER_BYTES_MAX:
            return self._end.offer(self._number, offset, step, rows)
        taken = False
        for at in range(len(rows)):              # cut where blocks begin, so that none is lost
            start, first = offset + at * step, 0
            while first < rows.shape[1]:
                end = min(rows.shape[1], OFFER_BYTES_MAX * ((start + first) // OFFER_BYTES_MAX + 1) - start)
                taken |= self._end.offer(self._number, start + first, 0, rows[at:at + 1, first:end])
                first = end
        return taken

    def __reduce__(self) -> Any:                 # a provider that sends itself to a process of its own
        return type(None), ()


class Session:
    """One provider of one region. `read` is None while it can't be used: before open(), and from close on."""

    __slots__ = ("closing", "concurrency", "name", "nbytes", "number", "provider", "read", "read_many", "warned",
                 "write_many")

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = ""
        self.provider: Any = None
        self.read: Any = None
        self.read_many: Any = None
        self.write_many: Any = None
        self.nbytes: int | None = None
        self.concurrency = 1
        self.closing = False
        self.warned = False

    def adopt(self, provider: Any) -> None:
        """Takes an opened provider, if what it says of itself can be."""
        nbytes, concurrency = provider.nbytes, provider.concurrency
        try:
            self.nbytes = None if nbytes is None else operator.index(nbytes)
            self.concurrency = operator.index(concurrency)
        except TypeError:
            raise Refused(f"nbytes must be an int or None, and concurrency an int, not {nbytes!r} and "
                          f"{concurrency!r}") from None
        if self.concurrency < 1 or (self.nbytes or 0) < 0:
            raise Refused(f"concurrency must be >= 1 and nbytes >= 0, not {concurrency} and {nbytes}")
        self.provider = provider
        self.read_many = provider.read_many if hosted.overrides(provider, "read_many") else None
        self.write_many = provider.write_many if hosted.overrides(provider, "write_many") else None
        self.read = provider.function if type(provider) is hosted.FunctionProvider else provider.read
        if self.closing:                         # meanwhile
            self.read = None

    def retire(self) -> None:
        self.closing = True
        self.read = self.read_many = self.write_many = None


class Host:
    """Answers the requests of one engine until it ends. `run` is the main thread."""

    def __init__(self, end: Any, *, debug: bool = False) -> None:
        self.end = end
        self.debug = debug
        self.sessions: dict[int, Session] = {}
        self.current: list[Session | None] = []  # of each thread: what it works for, None while it waits
        self.threads_max = 1
        self.closers: list[threading.Thread] = []
        self.pid = os.getpid()
        self.lock = threading.Lock()             # of the lists above, where they change; never held in a provider

    def run(self) -> None:
        """Returns at the end of service."""
        self._grow()
        self.end.ready()
        while True:
            try:
                number = self.end.watch()
            except KeyboardInterrupt:            # only when debugging; the program has it, too, and decides
                continue
            if number is None:
                return
            self._begin_close(number)

    # ---- requests ----

    def _live(self, index: int) -> None:
        """A thread. If it fails otherwise than by a provider, the host is of no use; the engine starts another."""
        try:
            self._serve(index)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _serve(self, index: int) -> None:
        """What a request costs here is on the way of each page: no locks, few names."""
        take, out, done, current, sessions = self.end.take, self.end.out, self.end.done, self.current, self.sessions
        frombuffer, uint8 = np.frombuffer, np.uint8
        session: Any
        array: Any
        while (work := take()) is not None:
            kind, number, slot, requests = work
            current[index] = session = sessions.get(number) or self._session(number)
            if len(current) < self.threads_max and None not in current:
                self._grow()
            read = session.read                  # after `current` is set: the other order is in _close
            if read is None or kind != READ or len(requests) > 1:
                self._answer(session, kind, slot, requests)
            else:
                slot, offset, nbytes = requests[0]
                try:
                    array = frombuffer(out(slot), uint8)
                    answer = read(offset, array)
                    array = None                 # else done() would find it in use
                    if answer is not None:
                        _check_answer("read", answer, nbytes)
                    warning = done(slot)
                    if warning is not None:
                        self._warn(session, warning)
                except BaseException as error:
                    array = answer = None
                    self._fail(session, (slot,), error)
            current[index] = session = read = None

    def _grow(self) -> None:
        """One more thread. Also when the system gives none: then there is one less."""
        with self.lock:
            if len(self.current) >= self.threads_max or None in self.current:
                return
            index = len(self.current)
            self.current.append(None)
            thread = threading.Thread(target=self._live, args=(index,), name=f"uffd-host-{index}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                self.current.pop()
                if not index:
                    raise

    def _session(self, number: int) -> Session:
        with self.lock:
            session = self.sessions.setdefault(number, Session(number))
            self._count_threads()
            return session

    def _count_threads(self) -> None:
        wanted = 1 + sum(session.concurrency for session in list(self.sessions.values()))
        self.threads_max = min(THREADS_MAX, wanted)

    def _answer(self, session: Session, kind: int, slot: int, requests: Sequence[Request]) -> None:
        """A request that is not one read of an open session."""
        slots = (slot,) if kind == OPEN else tuple(request[0] for request in requests)
        try:
            if session.closing:
                raise Refused("the region was closed")
            if session.provider is None:
                self._open(session)
                if kind != OPEN:                 # this host opens it because another one, or the one before, had
                    self._tell_opened(session, -1)
            if kind == OPEN:
                self._tell_opened(session, slot)
            elif kind == FLUSH:
                self._flush(session, slot)
            elif kind == WRITE:
                self._write(session, requests)
            elif session.read_many is not None and len(requests) > 1:
                self._read_many(session, requests)
            else:
                for request in requests:
                    self._read(session, *request)
        except BaseException as error:
            self._fail(session, slots, error)

    def _tell_opened(self, session: Session, slot: int) -> None:
        self.end.opened(slot, session.number, session.nbytes, min(session.concurrency, THREADS_MAX),
                        session.read_many is not None, hosted.writes(session.provider), session.write_many is not None)

    def _open(self, session: Session) -> None:
        """A new instance, opened; on failure nothing is left of it."""
        data = self.end.pickle_of(session.number)
        session.name = self.end.name_of(session.number)
        provider = load(data)
        provider._session = Link(self.end, session.number)
        provider.open()
        try:
            session.adopt(provider)
        except BaseException:
            self._quietly(session, provider.close)
            raise
        with self.lock:
            self._count_threads()

    def _read(self, session: Session, slot: int, offset: int, nbytes: int) -> None:
        array: Any = None
        try:
            array = np.frombuffer(self.end.out(slot), np.uint8)
            answer = session.read(offset, array)
            array = None
            _check_answer("read", answer, nbytes)
            self._warn(session, self.end.done(slot))
        except BaseException as error:
            array = answer = None
            self._fail(session, (slot,), error)

    def _read_many(self, session: Session, requests: Sequence[Request]) -> None:
        """One call for all of them; what it raises fails all of them."""
        asked = [(offset, np.frombuffer(self.end.out(slot), np.uint8)) for slot, offset, _ in requests]
        answer = session.read_many(asked)
        asked.clear()
        _check_answer("read_many", answer, sum(nbytes for _, _, nbytes in requests))
        self._end(session, requests)

    def _end(self, session: Session, requests: Sequence[Request]) -> None:
        for slot, _, _ in requests:
            try:
                self._warn(session, self.end.done(slot))
            except BaseException as error:
                self._fail(session, (slot,), error)

    def _write(self, session: Session, requests: Sequence[Request]) -> None:
        """One call for all of them, as in _read_many. Several come only for a provider that takes them."""
        views = [(offset, np.frombuffer(self.end.data(slot), np.uint8)) for slot, offset, _ in requests]
        total = sum(nbytes for _, _, nbytes in requests)
        if session.write_many is not None and len(views) > 1:
            answer = session.write_many(views)
            views.clear()
            _check_answer("write_many", answer, total)
        else:
            answer = session.provider.write(*views.pop())
            _check_answer("write", answer, total)
        self._end(session, requests)

    def _flush(self, session: Session, slot: int) -> None:
        answer = session.provider.flush()
        if answer is not None:
            raise Refused(f"wrong type: flush() returned {type(answer).__name__}. To return None says that all is "
                          "durable; what is not must be raised")
        self.end.done(slot)

    def _fail(self, session: Session, slots: Sequence[int], error: BaseException) -> None:
        number, text = told(error)
        if os.getpid() != self.pid:              # a child that the provider forked, and that should have ended itself
            os._exit(1)
        for slot in slots:
            self.end.failed(slot, number, text)
        if self.debug:
            self._say(session, f"failed\n{text.rstrip()}")

    def _warn(self, session: Session, warning: str | None) -> None:
        if warning is not None and not session.warned:
            session.warned = True
            self._say(session, f"{warning} (said once per region)")

    def _say(self, session: Session, text: str) -> None:
        title = hosted.title(session.provider) if session.provider is not None else "its provider"
        try:
            print(f"uffd: region {session.name!r}: {title}: {text}", file=sys.stderr, flush=True)
        except (OSError, ValueError):            # nobody reads it any more
            pass

    # ---- the end ----

    def _begin_close(self, number: int) -> None:
        thread = threading.Thread(target=self._close, args=(number,), name="uffd-close", daemon=True)
        self.closers = [other for other in self.closers if other.is_alive()] + [thread]
        thread.start()

    def _close(self, number: int) -> None:
        """The engine closed a session: so does the provider, after its last read. A thread of its own."""
        session = self.sessions.get(number)
        if session is not None:
            session.retire()
            pause_s = 0.001
            while session in self.current:       # a read that began before; how long it takes is not ours
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)
            with self.lock:
                provider, session.provider = session.provider, None
            if provider is not None:
                self._quietly(session, provider.close)
                left = weakref.ref(provider)
                provider = None
                if left() is not None:           # in a cycle, with what it holds: a host that is idle collects nothing
                    gc.collect()
            with self.lock:
                self.sessions.pop(number, None)
                self._count_threads()
        self.end.free_session(number)

    def _quietly(self, session: Session, close: Any) -> None:
        try:
            close()
        except BaseException as error:
            self._say(session, f"close() failed\n{told(error)[1].rstrip()}")

    def finish(self) -> None:
        """close() of all providers that have one, and what atexit has, for as long as the engine waits."""
        deadline = time.monotonic() + LAST_SECOND_S
        for session in list(self.sessions.values()):
            if session.provider is not None and hosted.overrides(session.provider, "close"):
                self._begin_close(session.number)
        for thread in self.closers:
            thread.join(max(0.0, deadline - time.monotonic()))
        last = threading.Thread(target=atexit._run_exitfuncs, daemon=True)   # multiprocessing ends its children there
        last.start()
        last.join(max(0.1, deadline - time.monotonic()))


def _check_answer(method: str, answer: Any, nbytes: int) -> None:
    """None, or how many bytes it filled or stored: all."""
    if answer is None:
        return
    stores = method.startswith("write")
    did, name = ("stored", "data") if stores else ("filled", "out")
    if isinstance(answer, bool) or not isinstance(answer, (int, np.integer)):
        must = "store all of `data`" if stores else "fill `out` in place (out[:] = ...)"
        raise Refused(f"wrong type: {method}() returned {type(answer).__name__}. It must {must} and return None, or "
                      f"the number of bytes it {did}")
    if answer < nbytes:
        raise Refused(f"short {'write' if stores else 'fill'}: {method}() says that it {did} {answer} of the {nbytes} "
                      f"bytes of `{name}`")
    if answer > nbytes:
        raise Refused(f"wrong size: {method}() says that it {did} {answer} bytes, and `{name}` has {nbytes}")


def told(error: BaseException) -> tuple[int, str]:
    """(errno, text) of an exception: its traceback without our own frames. Lets go of what its frames hold."""
    number = error.errno if isinstance(error, OSError) else None
    number = number if isinstance(number, int) and 0 < number < 1000 else errno.EIO
    if isinstance(error, Refused):
        return number, str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in _OWN_FILES:
        trace = trace.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except BaseException as second:              # out of memory, most likely
        text = f"{type(error).__name__} (and {type(second).__name__} while its traceback was written)"
    one: BaseException | None = error
    for _ in range(100):                         # of a chain that may be a ring
        if one is None:
            break
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__
    return number, text


# ---- from bytes to a provider -----------------------------------------------------------------------------------


def load(data: bytes) -> hosted.Provider:
    """The provider that `hosted.pickled` took. Refused, with the cure, where this process can't have it."""
    header, pickle_bytes = hosted.unpacked(data)
    with _load_lock:
        _settle(header)
        try:
            return _Loader(io.BytesIO(pickle_bytes), header["main"]).load()
        except Refused:
            raise
        except BaseException as error:
            raise Refused(_not_loaded(error)) from None


def _settle(header: dict[str, Any]) -> None:
    """Modules, files and arguments are found where the program finds them."""
    path = header["path"]
    sys.path[:] = path + [entry for entry in sys.path if entry not in path]
    sys.argv[:] = header["argv"]
    for name, lines in header["sources"].items():            # of a notebook's cells: for tracebacks
        linecache.cache[name] = sum(map(len, lines)), None, lines, name
    try:
        os.chdir(header["cwd"] or ".")
    except OSError:                              # deleted since, or not ours to enter: relative names will say so
        pass


class _Loader(pickle.Unpickler):
    """Imports the program's main module again when the pickle names something in it, as multiprocessing does."""

    def __init__(self, file: Any, main: tuple[str, str] | None) -> None:
        super().__init__(file)
        self.main = main

    def find_class(self, module: str, name: str) -> Any:
        if module in hosted.MAIN_NAMES:
            _import_main(self.main)
        return super().find_class(module, name)


_main_imported: tuple[str, str] | None = None
_main_refused: str | None = None


def _import_main(main: tuple[str, str] | None) -> None:
    """Once: a main module that does more than define things would do it again with each try. Under _load_lock."""
    global _main_imported, _main_refused
    if main is None or main == _main_imported:
        return
    if _main_refused is None:
        try:
            from multiprocessing import spawn

            spawn.prepare({f"init_main_from_{main[0]}": main[1]})
            _main_imported = main
            return
        except BaseException as error:
            trace = "".join(traceback.format_exception(error))
            _main_refused = (f"{trace}\nthe provider is defined in the main module {main[1]}, and that can't be "
                             f"imported again in the provider host ({_in_short(error)}). Guard what the program does "
                             "by `if __name__ == \"__main__\":`, or move the provider into a module of its own, or "
                             'pip install "pyuffd[callback]" (cloudpickle)')
    raise Refused(_main_refused)


def _not_loaded(error: BaseException) -> str:
    """What to do where a provider can't be unpickled here."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, ModuleNotFoundError):
        cure = ("The module must be found in another process, too: install it, or put its folder on sys.path before "
                'the region is made; or pip install "pyuffd[callback]" (cloudpickle), by which such code travels')
    elif isinstance(error, AttributeError) and any(name in str(error) for name in hosted.MAIN_NAMES):
        cure = ("The main module, imported again, does not define it: move it out of `if __name__ == \"__main__\":`, "
                'or into a module of its own, or pip install "pyuffd[callback]" (cloudpickle)')
    else:
        cure = "Keep in the instance what can be had in another process, and open the rest in open()"
    return f"{trace}\nthe provider can't be unpickled in the provider host: {_in_short(error)}. {cure}"


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


# ---- the process ------------------------------------------------------------------------------------------------


def main() -> None:
    """Never returns: exit status 0 at the end of service. `--load` is a trial: can a provider be unpickled here?"""
    if sys.argv[1:] == ["--load"]:
        sys.exit(_try_to_load())
    from . import _core

    debug = os.environ.get("UFFD_HOST_DEBUG") == "1"
    channel_fd, control_fd = (_above_the_standard_ones(int(argument)) for argument in sys.argv[1:3])
    _close_inherited({channel_fd, control_fd})
    _set_up_streams(debug)
    _set_up_signals(debug)
    hosted.enter_host()
    for fd in (channel_fd, control_fd):          # a provider's children are not to hold them
        os.register_at_fork(after_in_child=functools.partial(os.close, fd))
    host = Host(_core.HostEnd(channel_fd, control_fd), debug=debug)
    host.run()
    host.finish()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):        # nobody reads it any more
            pass
    os._exit(0)                                  # threads of providers have no say in it


def _try_to_load() -> int:
    """Of uffd.testing: stdin has what `hosted.pickled` made."""
    hosted.enter_host()
    try:
        load(sys.stdin.buffer.read())
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _above_the_standard_ones(fd: int) -> int:
    """The descriptor, non-inheritable, under a number that no stream has (a program may have closed its own)."""
    if fd > 2:
        os.set_inheritable(fd, False)
        return fd
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return moved


def _close_inherited(kept: set[int]) -> None:
    """The program's descriptors that came along. Those that this process opened itself are all close-on-exec."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd > 2 and fd not in kept and os.get_inheritable(fd):
                os.close(fd)
        except OSError:                          # the descriptor of the listing
            pass


def _set_up_streams(debug: bool) -> None:
    """stdin is the program's; what is printed comes out with each line, for the process may be killed."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        if (fd == 0 and not debug) or not _is_open(fd):
            os.dup2(null, fd)
    if null > 2:
        os.close(null)
    else:
        os.set_inheritable(null, True)           # it took the place of a closed stream
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    if debug:
        faulthandler.enable()


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _set_up_signals(debug: bool) -> None:
    """Ctrl-C is the program's business; what the program ignores or blocks is not ours."""
    signal.signal(signal.SIGINT, signal.default_int_handler if debug else signal.SIG_IGN)
    for number in (signal.SIGALRM, signal.SIGCHLD):          # the first ends us if nothing else does
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


if __name__ == "__main__":
    main()
