"""Providers in Python: the class to derive from, and how one travels to the provider host, the process it runs in."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import io
import linecache
import os
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

__all__ = ["Provider"]

PICKLE_BYTES_MAX = 64 << 20
MAIN_NAMES = ("__main__", "__mp_main__")         # the latter in a process that multiprocessing spawned
_EVERYWHERE = ("cloudpickle", "numpy", "uffd")   # packages that a host has for certain
_by_value_lock = threading.RLock()               # cloudpickle keeps one registry for the process
_in_host = False


class Provider:
    """Where a region's bytes come from, in Python. Derive a class, override `read`, and give an instance to
    `uffd.Region` or `uffd.from_provider`. Where no state is needed, a function f(offset, out) will do.

        class Rows(uffd.Provider):
            def __init__(self, path):            # in your process: keep what can be pickled
                self.path = path
                self.nbytes = os.path.getsize(path)

            def open(self):                      # in the host: open the rest
                self.file = open(self.path, "rb")

            def read(self, offset, out):         # fill all of `out` with the bytes from `offset` on
                self.file.seek(offset)
                self.file.readinto(out)

    The instance is pickled when the region is made, and its methods run in the provider host, a process beside yours:
    what it changes there is not seen here, and what it prints comes out here. One instance serves one region; each
    host (`Engine(hosts=n)`) has its own. A host that dies is replaced, and the instance opened again.

    nbytes: how many bytes there are, None: as many as the region likes; open() may set it.
    concurrency: how many threads may run its methods at once. With 1 it needs no lock of its own.

    An exception reaches the user as ProviderError with its traceback, at a touch as `on_error` says; an OSError keeps
    its errno. UFFD_HOST_DEBUG=1 prints tracebacks to stderr as they happen, has breakpoint() work (the host shares
    your terminal then) and enforces no time-outs. `uffd.testing.check_provider` tests a provider of yours.
    """

    nbytes: int | None = None
    concurrency: int = 1
    _session: Any = None                         # in the host: its way to the engine

    def open(self) -> None:
        """Opens files, connections, arrays: what can't be pickled. Once per instance, in the host, before any read.

        When it fails, nothing more is called of this instance; the next request opens a new one. The working directory
        is that of your process when the region was made; another region may change it later.
        """

    def read(self, offset: int, out: np.ndarray) -> int | None:
        """Fills all of `out`, a writable array of uint8 whose address is aligned to pages, with the bytes from
        `offset` on. Called by up to `concurrency` threads at once.

        offset is a multiple of the page size, and out ends with the region or is whole pages. Write into it
        (out[:] = ..., readinto(out)), do not return data: the answer is None, or how many bytes were written, which
        must be all. `out` is dead after the return: copy what you want to keep.
        """
        if not overrides(self, "read_many"):
            raise TypeError(f"{type(self).__name__} has no read(offset, out)")
        return self.read_many([(offset, out)])

    def read_many(self, requests: Sequence[tuple[int, np.ndarray]]) -> int | None:
        """Optional: fills several requests [(offset, out), ...], sorted by offset, each as `read` does. Those that
        wait are given together, for providers that fetch neighbours at once. If it fails, all of them fail."""
        for offset, out in requests:
            self.read(offset, out)
        return None

    def write(self, offset: int, data: np.ndarray) -> int | None:
        """Stores `data`, an array of uint8 that can't be written to, at `offset`. A class that overrides it can write,
        and its regions are of mode "r+" unless they are told otherwise. Called like `read`, by as many threads.

        The return (None, or how many bytes were stored, which must be all) acknowledges them: the region may forget
        its own copy. So they must have left this process for where `read` finds them, in an instance that is opened
        after this process was killed, too: the kernel's cache of a file is such a place, a buffer of Python's is not.
        An exception says that nothing is acknowledged. The same bytes may come again: after an exception, and when the
        host died with the call. `data` is dead after the return.
        """
        if not overrides(self, "write_many"):
            raise TypeError(f"{type(self).__name__} can't write: it has no write(offset, data)")
        return self.write_many([(offset, data)])

    def write_many(self, requests: Sequence[tuple[int, np.ndarray]]) -> int | None:
        """Optional: stores several requests [(offset, data), ...], sorted by offset, none over another. Those that
        wait are given together, for stores where one large request costs less. If it fails, none is acknowledged."""
        for offset, data in requests:
            self.write(offset, data)
        return None

    def flush(self) -> None:
        """Makes durable whatever was acknowledged before it was called, by this instance or by one before it whose host
        died; its return says that it is. Never called while a write of this region is under way."""

    def close(self) -> None:
        """Closes what open() opened: when the region was closed, after its last read, or the engine ends. A host that
        is killed calls nothing; one that ends gives it less than a second."""

    def offer(self, offset: int, data: Any) -> bool:
        """Hands over bytes at `offset` that nobody asked for yet, such as the rest of a decoded chunk. True if any
        block was taken.

        data: any contiguous buffer or array; it is copied. Taken are blocks that lie whole in it and are not there
        yet. Waits for the engine. Only within a call of a method, in the host; elsewhere it does nothing.
        """
        session = self._session
        return False if session is None else session.offer(offset, data)


class FunctionProvider(Provider):
    """A function f(offset, out) as a provider."""

    def __init__(self, function: Callable[[int, np.ndarray], Any]) -> None:
        self.function = function

    def read(self, offset: int, out: np.ndarray) -> Any:
        return self.function(offset, out)

    @property
    def title(self) -> str:
        return function_title(self.function)


def in_host() -> bool:
    """Whether this process is a provider host, or was forked by one."""
    return _in_host


def enter_host() -> None:
    """This process is a provider host from here on."""
    global _in_host
    _in_host = True


def overrides(provider: Provider, name: str) -> bool:
    """Whether the provider has a method of its own."""
    return name in vars(provider) or getattr(type(provider), name) is not getattr(Provider, name)


def writes(provider: Provider) -> bool:
    """Whether it can write: its class has a `write` (or a `write_many`) of its own."""
    return overrides(provider, "write") or overrides(provider, "write_many")


def title(provider: Any) -> str:
    """What messages call a provider."""
    return getattr(provider, "title", None) or type(provider).__name__


def function_title(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or type(function).__name__


# ---- what can be a provider -------------------------------------------------------------------------------------


def as_provider(thing: Any) -> Provider | None:
    """The Provider that `thing` is, or stands for if it is callable; None if it is neither. TypeError, with the cure,
    for what looks like one and can't be."""
    if isinstance(thing, Provider):
        if not overrides(thing, "read") and not overrides(thing, "read_many"):
            raise TypeError(f"{type(thing).__name__} has no method read(self, offset, out)")
        if any(map(inspect.iscoroutinefunction, (thing.open, thing.read, thing.read_many, thing.write,
                                                 thing.write_many, thing.flush))):
            raise TypeError(f"{type(thing).__name__} has `async def` methods, and nobody awaits them: use asyncio.run, "
                            "or a loop of its own thread, inside")
        return thing
    if not callable(thing):
        return None
    if isinstance(thing, type):
        raise TypeError(f"{thing.__name__} is a class: give an instance, {thing.__name__}(...)")
    if _is_compiled(thing):
        raise TypeError(f"a {type(thing).__name__} is compiled: give uffd.providers.Native({function_title(thing)})")
    inner = thing if inspect.isroutine(thing) or isinstance(thing, functools.partial) else type(thing).__call__
    if inspect.iscoroutinefunction(inner) or inspect.isgeneratorfunction(inner):
        raise TypeError(f"{function_title(thing)} is an async function or a generator: its body would never run")
    try:
        inspect.signature(thing).bind(0, None)
    except TypeError as error:
        raise TypeError(f"{function_title(thing)} can't be called as f(offset, out): {error}") from None
    except ValueError:                           # a builtin without a signature
        pass
    return FunctionProvider(thing)


def _is_compiled(thing: Any) -> bool:
    """A C function pointer of ctypes, or Numba's @cfunc."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(thing).__mro__}
    return ("_ctypes", "CFuncPtr") in kinds or (hasattr(thing, "native_name") and hasattr(thing, "address"))


# ---- the way to the host ----------------------------------------------------------------------------------------


def pickled(provider: Provider) -> bytes:
    """What a host needs to have the provider: `unpacked` takes it apart. Nothing is unpickled here.

    By cloudpickle where it is installed, else by pickle. TypeError names the part that can't be pickled, and the cure;
    ValueError over 64 MiB; RuntimeError inside a provider host.
    """
    if _in_host:
        raise RuntimeError("a provider host starts no hosts of its own: a region over a provider in Python can't be "
                           "made here")
    data, files = _dumped(provider)
    sources = {name: linecache.getlines(name) for name in files if not os.path.exists(name)}
    header = pickle.dumps({"path": [entry or os.getcwd() for entry in sys.path], "cwd": _cwd(), "argv": list(sys.argv),
                           "main": _main_module(), "sources": sources}, protocol=5)
    return b"".join((len(header).to_bytes(8, "little"), header, data))


def portable(provider: Provider) -> bytes:
    """The provider's own pickle, for another process that is to make a region of it. Refused is what `pickled` would
    refuse: that process would do it, far from here. A host may make one, too."""
    return bytes(_dumped(provider)[0])


def _dumped(provider: Provider) -> tuple[memoryview, set[str]]:
    """(the provider's pickle, the files that code in it was written in)."""
    out = _Limited()
    pickler = _pickler_class()(out)
    try:
        with _by_value_lock:
            pickler.run(provider)
    except _TooLarge as error:
        raise ValueError(_too_large(provider, error, pickler)) from None
    except Exception as error:
        raise TypeError(_unpicklable(provider, error)) from None
    if pickler.of_main is not None and _main_module() is None:
        raise TypeError(f"{pickler.of_main} is defined in the main module, which can't be imported again in the "
                        f"provider host (it is no file: a prompt, a notebook, -c or -m package). {_CALLBACK}, or move "
                        "it into a module")
    return out.getbuffer(), pickler.files


def unpacked(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """(what the host is to set up, the provider's pickle) of what `pickled` made."""
    view = memoryview(data)
    end = 8 + int.from_bytes(view[:8], "little")
    return pickle.loads(view[8:end]), view[end:]


def _cwd() -> str | None:
    try:
        return os.getcwd()
    except OSError:                              # it was deleted
        return None


def _main_module() -> tuple[str, str] | None:
    """("name" or "path", which), as multiprocessing.spawn imports the main module again; None if it can't."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:                         # spawn imports no __main__.py again
        return None if spec.name.rpartition(".")[2] == "__main__" else ("name", spec.name)
    path = getattr(main, "__file__", None)
    if path is None:
        return None
    path = os.path.abspath(path)
    if not os.path.isfile(path) or os.path.splitext(os.path.basename(path))[0] == "ipython":
        return None
    return "path", path


class _TooLarge(Exception):
    """More than the limit; the size and what it is, if it is known."""


class _Limited(io.BytesIO):
    def write(self, data: Any) -> int:
        nbytes = memoryview(data).nbytes
        if self.tell() + nbytes > PICKLE_BYTES_MAX:
            raise _TooLarge(nbytes, "a buffer" if nbytes > PICKLE_BYTES_MAX // 4 else None)
        return super().write(data)


def _pickler_class() -> Any:
    try:
        import cloudpickle
    except ImportError:
        return _pickler_over(pickle.Pickler, None)
    return _pickler_over(cloudpickle.CloudPickler, cloudpickle)


@functools.cache
def _pickler_over(base: Any, cloudpickle: Any) -> Any:
    """A pickler that refuses what would only fail later, and notes what the host must be able to import."""

    class Pickler(base):
        def __init__(self, out: Any) -> None:
            super().__init__(out, protocol=5)
            self.of_main: str | None = None      # something that is found in the main module, by name
            self.largest: tuple[int, str] | None = None
            self.looked_at: set[str] = set()
            self.by_value: list[Any] = []
            self.files: set[str] = set()         # where code that travels with the pickle was written

        def run(self, thing: Any) -> None:
            try:
                self.dump(thing)
            finally:
                for module in self.by_value:
                    cloudpickle.unregister_pickle_by_value(module)

        def reducer_override(self, thing: Any) -> Any:
            if isinstance(thing, (np.ndarray, memoryview)):
                self.see_array(thing)
            _refuse_what_stays(thing)
            named = isinstance(thing, (type, types.FunctionType))
            if named and cloudpickle is not None:
                self.see_module(thing.__module__)
            answer = super().reducer_override(thing) if cloudpickle is not None else NotImplemented
            if isinstance(thing, types.CodeType) and types.CodeType in getattr(self, "dispatch_table", ()):
                return self.with_file(thing, self.dispatch_table[types.CodeType](thing))
            if named and answer is NotImplemented and thing.__module__ in MAIN_NAMES:
                self.of_main = thing.__qualname__
            return answer

        def with_file(self, code: types.CodeType, answer: tuple[Any, ...]) -> tuple[Any, ...]:
            """cloudpickle forgets the file's name, which tracebacks are to tell."""
            name = os.path.abspath(code.co_filename) if os.path.exists(code.co_filename) else code.co_filename
            self.files.add(name)
            return answer[0], tuple(name if part == "<dynamic-code>" else part for part in answer[1]), *answer[2:]

        def see_array(self, array: Any) -> None:
            what = _array_in_words(array)
            if self.largest is None or array.nbytes > self.largest[0]:
                self.largest = array.nbytes, what
            if array.nbytes > PICKLE_BYTES_MAX:
                raise _TooLarge(array.nbytes, what)

        def see_module(self, name: str | None) -> None:
            """What lies in a module that another process would not find is taken along (tests, for example)."""
            if not isinstance(name, str) or name in self.looked_at or name in MAIN_NAMES:
                return
            self.looked_at.add(name)
            module, known = sys.modules.get(name), cloudpickle.list_registry_pickle_by_value()
            if module is not None and not _importable(module) and name not in known:
                cloudpickle.register_pickle_by_value(module)
                self.by_value.append(module)

    return Pickler


def _array_in_words(array: Any) -> str:
    what = "an array" if isinstance(array, np.ndarray) else "a memoryview"
    return what + (f" of shape {tuple(array.shape)}" if array.ndim != 1 else f" of {array.shape[0]} items")


def _refuse_what_stays(thing: Any) -> None:
    """What would be pickled, and be something else in the host."""
    if isinstance(thing, io.TextIOWrapper) and thing not in (sys.stdout, sys.stderr):
        raise TypeError("an open file belongs to this process")      # cloudpickle would take its contents
    if _is_library(thing):
        raise TypeError("a loaded library belongs to this process")  # its handle is a number
    if _is_hosted_region(thing):
        raise TypeError("its provider is in Python, and a host starts no hosts of its own")


def _is_library(thing: Any) -> bool:
    kind = getattr(sys.modules.get("ctypes"), "CDLL", None)
    return kind is not None and isinstance(thing, kind)


def _is_hosted_region(thing: Any) -> bool:
    region = getattr(sys.modules.get("uffd.region"), "Region", None)
    return region is not None and isinstance(thing, region) and not hasattr(thing.provider, "_filler")


def _importable(module: types.ModuleType) -> bool:
    """Whether a process with this one's sys.path would import the same file under the module's name."""
    name = module.__name__
    if name.partition(".")[0] in sys.stdlib_module_names or name.partition(".")[0] in _EVERYWHERE:
        return True
    path, spec, so_far = None, None, ""
    try:
        for part in name.split("."):
            so_far = f"{so_far}.{part}" if so_far else part
            finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
            specs = (find(so_far, path) for find in finders if find is not None)
            spec = next((found for found in specs if found is not None), None)
            if spec is None:
                return False
            path = getattr(sys.modules.get(so_far), "__path__", None) or spec.submodule_search_locations
        file = getattr(module, "__file__", None)
        return file is None or spec is None or spec.origin is None or os.path.samefile(file, spec.origin)
    except Exception:                            # a finder of its own kind: the host will tell
        return True


# ---- why not ----------------------------------------------------------------------------------------------------

_CALLBACK = 'pip install "pyuffd[callback]" (cloudpickle)'
_OPEN = "open() of a class derived from uffd.Provider, which runs in the host"


def _too_large(provider: Provider, error: _TooLarge, pickler: Any) -> str:
    nbytes, what = error.args
    if what is None and pickler.largest is not None:
        nbytes, what = pickler.largest
    holds = f": it captured {what}, {nbytes} bytes" if what else ""
    return (f"{title(provider)} has a pickle of more than {PICKLE_BYTES_MAX >> 20} MiB{holds}. Save that to a file, "
            f"and open it in {_OPEN}; or give uffd.providers.Memory(array), which needs no host")


def _unpicklable(provider: Provider, error: BaseException) -> str:
    where, thing, error = _culprit(provider, "", error)
    what = f"{where} is {_described(thing)}" if where else f"it is {_described(thing)}"
    kind = thing if isinstance(thing, (types.FunctionType, type)) else type(thing)
    is_nameless = isinstance(thing, types.FunctionType) or "<locals>" in kind.__qualname__ or \
        kind.__module__ in MAIN_NAMES
    if is_nameless and importlib.util.find_spec("cloudpickle") is None:
        cure = f"{_CALLBACK}, or define it at the top of a module"
    elif _is_hosted_region(thing):
        cure = "Read from that one's source itself"
    elif isinstance(provider, FunctionProvider):
        cure = f"Open it in {_OPEN}"
    else:
        cure = "Keep in __init__ what can be pickled (a path, a URL), and open the rest in open(): it runs in the host"
    return (f"{title(provider)} can't be pickled, and providers in Python run in another process: {what} "
            f"({type(error).__name__}: {error}). {cure}")


def _culprit(thing: Any, where: str, error: BaseException, depth: int = 6) -> tuple[str, Any, BaseException]:
    """(its place, the part that can't be pickled, why), as deep as it can be told."""
    for name, part in _parts(thing, where) if depth else ():
        try:
            _pickler_class()(_Limited()).run(part)
        except _TooLarge:
            continue
        except Exception as found:
            return _culprit(part, name, found, depth - 1)
    return where, thing, error


def _parts(thing: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, FunctionProvider):
        yield "", thing.function
    elif isinstance(thing, functools.partial):
        yield f"the function of the partial {where}".rstrip(), thing.func
        yield from ((f"argument {at} of the partial {where}".rstrip(), part) for at, part in enumerate(thing.args))
        yield from ((f"argument {name!r} of the partial {where}".rstrip(), part)
                    for name, part in thing.keywords.items())
    elif isinstance(thing, types.MethodType):
        yield "self", thing.__self__
    elif isinstance(thing, types.FunctionType):
        try:
            captured = inspect.getclosurevars(thing)
        except ValueError:                       # a variable without a value yet
            return
        for name, part in {**captured.globals, **captured.nonlocals}.items():
            yield f"the variable {name!r}", part
        for at, part in enumerate(thing.__defaults__ or ()):
            yield f"the default of argument {thing.__code__.co_varnames[at - len(thing.__defaults__ or ())]!r}", part
    elif isinstance(thing, dict):
        yield from ((f"{where}[{key!r}]", part) for key, part in thing.items())
    elif isinstance(thing, (list, tuple)):
        yield from ((f"{where}[{at}]", part) for at, part in enumerate(thing))
    elif not (isinstance(thing, (type, types.ModuleType)) or _is_library(thing) or _is_hosted_region(thing)):
        yield from ((f"{where or 'self'}.{name}", part) for name, part in getattr(thing, "__dict__", {}).items())


def _described(thing: Any) -> str:
    kind = type(thing)
    what = f"a {kind.__qualname__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"
    if isinstance(thing, types.FunctionType):
        is_lambda = thing.__name__ == "<lambda>"
        what = "a lambda" if is_lambda else f"the function {thing.__qualname__} of {thing.__module__}"
    elif isinstance(thing, type):
        what = f"the class {thing.__qualname__}"
    elif isinstance(thing, io.IOBase):
        what = f"an open file ({getattr(thing, 'name', kind.__name__)!r})"
    elif kind.__module__ == "_thread":
        what = "a lock"
    elif any(base.__module__ == "_ctypes" for base in kind.__mro__) or kind.__module__ == "ctypes":
        what = f"a ctypes object ({kind.__name__})"
    elif _is_hosted_region(thing):
        what = f"the region {thing.name!r}"
    return what
