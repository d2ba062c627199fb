"""A Redis or Valkey server, or a Redis Cluster, as one thing that commands are sent to; by redis-py.

Every wait has a deadline, every failure that may pass is tried again until then, and what comes out is an OSError that
names the server and the cure. Commands that are given here may be sent twice: all that change something are scripts
that know their own work again.
"""

from __future__ import annotations

import errno
import itertools
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .redis_wire import Answers, Unexpected, asked
from .urls import after_password, shown

__all__ = ["Server"]

Command = tuple[str, tuple[Any, ...]]            # a key that says which shard, and the command with its arguments
SCHEMES = ("redis://", "rediss://", "unix://")
RIGHTS = "~uffd:* +@read +@write +@scripting +@connection +info +cluster +command"
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.005, 0.5
_SOCKET_TIMEOUT_MAX_S = 5.0
_SOCKET_READ_BYTES = 256 << 10                   # blocks come in fewer pieces, each of which takes the interpreter lock


def require_redis() -> Any:
    try:
        import redis
    except ImportError as error:
        raise ImportError('providers.Redis needs the package redis: pip install "pyuffd[redis]"') from error
    return redis


class Server:
    """Connections to a server or a cluster, made when they are needed, one for each thread that is at work.

    Every method may be called by several threads at once. `timeout_s` is the whole patience of one `run`.
    """

    def __init__(self, url: str, timeout_s: float, client_name: str = "uffd") -> None:
        if not url.startswith(SCHEMES):
            raise ValueError(f"{shown(url)!r}: a URL of Redis begins with {', '.join(SCHEMES)}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be > 0, not {timeout_s}")
        self.url = url
        self.place = shown(url)
        self.timeout_s = timeout_s
        self.socket_timeout_s = min(_SOCKET_TIMEOUT_MAX_S, timeout_s / 2)
        self._redis = require_redis()
        self._check_url()
        self._client_name = client_name
        self._lock = threading.Lock()            # of the two below
        self._single: Any = None
        self._cluster: Any = None
        self._look_lock = threading.Lock()       # of looking for the shards again
        self._looked_s = 0.0
        self._marks = itertools.count(secrets.randbits(48))
        self._passing = (self._redis.ConnectionError, self._redis.TimeoutError, self._redis.ReadOnlyError,
                         self._redis.exceptions.ClusterError, self._redis.exceptions.AskError,
                         self._redis.exceptions.TryAgainError, self._redis.exceptions.RedisClusterException)
        self._refusals = (self._redis.AuthenticationError, self._redis.exceptions.AuthorizationError,
                          self._redis.exceptions.NoPermissionError)

    def _check_url(self) -> None:
        """Makes no connection. The package's own message may quote a piece of a password that is not written right."""
        try:
            self._redis.ConnectionPool.from_url(self.url).close()
        except ValueError:
            raise ValueError(f"{after_password(self.url)!r} can't be read: give redis://[user:password@]host:port, "
                             "the port from 1 to 65535, and each option a value of its type; in a password, / ? # @ : "
                             "are written as %2F %3F %23 %40 %3A") from None

    def close(self) -> None:
        with self._lock:
            clients, self._single, self._cluster = (self._cluster, self._single), None, None
        for client in clients:
            if client is not None:
                client.close()

    @property
    def is_cluster(self) -> bool:
        """Known after `look`."""
        return self._cluster is not None

    def deadline(self) -> float:
        return time.monotonic() + self.timeout_s

    # ---- what is there ----

    def look(self, deadline: float | None = None) -> list[dict[str, Any]]:
        """INFO of the server, or of each shard's master; each with "address". Finds out whether it is a cluster. To be
        called before anything else, by one thread."""
        deadline = self.deadline() if deadline is None else deadline
        info = self._until(deadline, "INFO", self._info)
        if not int(info.get("cluster_enabled", 0)):
            return [info]
        # a node that does not answer is met more than once while the others are asked where its slots went
        self.socket_timeout_s = min(_SOCKET_TIMEOUT_MAX_S, self.timeout_s / 8)
        if self._cluster is None:
            self._cluster = self._until(deadline, "CLUSTER SLOTS", self._open_cluster)
        return [self._until(deadline, "INFO", self._info, node) for node in self.nodes()]

    def _info(self, node: Any = None) -> dict[str, Any]:
        info = self._client(node).info()
        return {**info, "address": node.name if node is not None else self.place}

    def _options(self) -> dict[str, Any]:
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        return {"socket_timeout": self.socket_timeout_s, "socket_connect_timeout": self.socket_timeout_s,
                "socket_read_size": _SOCKET_READ_BYTES, "client_name": self._client_name, "protocol": 2,
                "retry": Retry(NoBackoff(), 0)}

    def _open_cluster(self) -> Any:
        return self._redis.RedisCluster.from_url(self.url, **self._options())

    def _client(self, node: Any = None) -> Any:
        if node is not None:
            return self._cluster.get_redis_connection(node)
        with self._lock:
            if self._single is None:
                self._single = self._redis.Redis.from_url(self.url, **self._options())
            return self._single

    def nodes(self) -> list[Any]:
        """One for each shard; [None] for a server by itself."""
        return [None] if self._cluster is None else self._cluster.get_primaries()

    def node_of(self, key: str) -> Any:
        """The shard that has the key; None for a server by itself."""
        return None if self._cluster is None else self._cluster.get_node_from_key(key)

    def names(self, pattern: str) -> Iterator[str]:
        """All keys that match, on all shards; one may come twice."""
        for node in self.nodes():
            cursor = 0
            while True:
                cursor, keys = self._until(self.deadline(), "SCAN", self._client(node).scan, cursor, pattern, 1000)
                yield from (key.decode() for key in keys)
                if not cursor:
                    break

    # ---- commands ----

    def run(self, commands: Sequence[Command], deadline: float | None = None) -> list[Any]:
        """The replies, in order: pipelined, all commands of a shard in one go. OSError if one of them fails."""
        deadline = self.deadline() if deadline is None else deadline
        replies: list[Any] = [None] * len(commands)
        todo = list(range(len(commands)))
        pause_s, tries = _PAUSE_MIN_S, 0
        while todo:
            tries += 1
            failed: dict[int, Exception] = {}
            for node, numbers in self._by_node(commands, todo, failed).items():
                self._go(node, commands, numbers, replies, failed, deadline)
            todo = sorted(failed)
            if todo:
                self._wait_or_give_up(failed[todo[0]], commands[todo[0]][1][0], deadline, pause_s, tries)
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
                self._look_again(failed.values())
        return replies

    def run_on_each(self, commands: Sequence[Command], last: tuple[Any, ...], deadline: float) -> list[tuple[str, Any]]:
        """Each shard's share of the commands, and `last` after them on the same connection. All replies of commands
        are checked by nobody: they are given in order, ("", reply); then those of `last`: (address, reply)."""
        def go() -> list[tuple[str, Any]]:
            replies: list[Any] = [None] * len(commands)
            lasts = []
            for node, numbers in self._by_node(commands, range(len(commands)), None).items():
                share = [commands[number][1] for number in numbers]
                *answers, final = self._pipelined(node, [*share, last], raise_on_error=True)
                for number, answer in zip(numbers, answers, strict=True):
                    replies[number] = answer
                lasts.append((self.place if node is None else node.name, final))
            return [("", reply) for reply in replies] + lasts
        return self._until(deadline, last[0], go)

    def _by_node(self, commands: Sequence[Command], numbers: Sequence[int] | range,
                 failed: dict[int, Exception] | None) -> Mapping[Any, list[int]]:
        if self._cluster is None:
            return {None: list(numbers)}
        found = defaultdict(list)
        for number in numbers:
            try:
                found[self.node_of(commands[number][0])].append(number)
            except self._passing as error:       # no shard has the slot now
                if failed is None:
                    raise
                failed[number] = error
        return found

    def _go(self, node: Any, commands: Sequence[Command], numbers: Sequence[int], replies: list[Any],
            failed: dict[int, Exception], deadline: float) -> None:
        """One shard's share; `failed` gets what may work later."""
        try:
            if time.monotonic() > deadline:
                raise self._redis.TimeoutError("no time was left")
            answers = self._pipelined(node, [commands[number][1] for number in numbers], raise_on_error=False)
        except self._refusals as error:
            raise self._named(error, "connecting", 1) from error
        except self._passing as error:
            failed.update(dict.fromkeys(numbers, error))
            return
        for number, given in zip(numbers, answers, strict=True):
            answer = self._asked(given, commands[number][1])
            if isinstance(answer, self._passing) and not isinstance(answer, self._refusals):
                failed[number] = answer
            elif isinstance(answer, Exception):
                raise self._named(answer, commands[number][1][0], 1) from answer
            else:
                replies[number] = answer

    def _pipelined(self, node: Any, commands: Sequence[tuple[Any, ...]], *, raise_on_error: bool) -> list[Any]:
        """The answers to commands of one shard, on one connection. Their end is marked by a word of ours: answers that
        are out of step with what was asked, on a connection where some were doubled or lost, are not taken."""
        client = self._client(node)
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        mark = f"uffd {next(self._marks)}".encode()
        pipeline.execute_command("ECHO", mark)
        *answers, end = pipeline.execute(raise_on_error=raise_on_error)
        if end != mark and not isinstance(end, self._refusals):
            client.connection_pool.disconnect(inuse_connections=False)
            raise self._redis.ConnectionError("the answers are out of step with what was asked; is something between "
                                              "here and the server that doubles or drops them?")
        return answers

    @contextmanager
    def answers(self, node: Any, commands: Sequence[tuple[Any, ...]]) -> Iterator[Answers]:
        """The answers to commands of one shard, to be taken from its socket; once, without a second try. Raises
        Unexpected, OSError or RedisError, also where all was taken and turns out to be out of step."""
        mark = f"uffd {next(self._marks)}".encode()
        with asked(self._client(node), [*commands, ("ECHO", mark)]) as answers:
            yield answers
            if answers.bulk() != mark:
                raise Unexpected("out of step")

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What `answers` may raise."""
        return Unexpected, OSError, self._redis.RedisError, self._redis.exceptions.RedisClusterException

    def _asked(self, ask: Any, command: tuple[Any, ...]) -> Any:
        """The answer; if that is ASK, the slot is on its way to another shard, which has this key already."""
        exceptions = self._redis.exceptions
        if not isinstance(ask, exceptions.AskError) or isinstance(ask, exceptions.MovedError):
            return ask
        node = self._cluster.get_node(ask.host, ask.port)
        if node is None:
            return ask
        try:
            return self._pipelined(node, [("ASKING",), command], raise_on_error=False)[1]
        except self._passing as error:
            return error

    def _until(self, deadline: float, what: str, function: Any, *arguments: Any) -> Any:
        """function(*arguments), until it works."""
        pause_s, tries = _PAUSE_MIN_S, 0
        while True:
            tries += 1
            try:
                return function(*arguments)
            except self._refusals as error:
                raise self._named(error, what, tries) from error
            except self._passing as error:
                self._wait_or_give_up(error, what, deadline, pause_s, tries)
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
                self._look_again([error])
            except self._redis.RedisError as error:
                raise self._named(error, what, tries) from error

    def _wait_or_give_up(self, error: Exception, what: str, deadline: float, pause_s: float, tries: int) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= pause_s:
            raise self._named(error, what, tries) from error
        time.sleep(pause_s)

    def _look_again(self, errors: Any) -> None:
        """Shards may have changed, and idle connections may be as dead as the one that failed."""
        if self._cluster is None:
            if self._single is not None:
                self._single.connection_pool.disconnect(inuse_connections=False)
            return
        if not self._look_lock.acquire(blocking=False):      # another thread is at it
            return
        try:
            if time.monotonic() - self._looked_s > _PAUSE_MAX_S / 2:
                self._cluster.nodes_manager.initialize()
                self._looked_s = time.monotonic()
        except (self._redis.RedisError, self._redis.exceptions.RedisClusterException):
            pass                                 # nobody answers yet: the caller tries again, until its deadline
        finally:
            self._look_lock.release()

    # ---- errors ----

    def _named(self, error: Exception, what: str, tries: int) -> OSError:
        number, text = self._in_words(error)
        times = f" ({tries} tries in {self.timeout_s:g} s)" if tries > 1 else ""
        return OSError(number, f"{what}{times}: {text}", self.place)

    def _in_words(self, error: Exception) -> tuple[int, str]:
        """(errno, what it was and what to do)."""
        exceptions, text, number, cure = self._redis.exceptions, f"{error}".rstrip("."), errno.EIO, ""
        if isinstance(error, self._refusals) or "user executing the script can't" in text:
            number, text = errno.EACCES, f"the server refuses: {text}"
            cure = ("The URL must name a user and password that may do what is needed: ACL SETUSER name on >password "
                    f"{RIGHTS}")
        elif isinstance(error, exceptions.ReadOnlyError):
            number, text, cure = errno.EROFS, f"the server is a replica: {text}", "Give the master's address"
        elif isinstance(error, exceptions.OutOfMemoryError) or text.startswith("OOM"):
            number, text = errno.ENOSPC, f"the server is at its maxmemory: {text}"
            cure = "Raise it, add shards, or remove namespaces (uffd store rm)"
        elif isinstance(error, (exceptions.TimeoutError, TimeoutError)):
            number, text = errno.ETIMEDOUT, f"no answer: {text}"
            cure = "Is the server stopped, cut off, or too busy?"
        elif isinstance(error, exceptions.ConnectionError):
            cause = getattr(error.__cause__ or error.__context__, "errno", None)
            number = cause if isinstance(cause, int) and cause > 0 else errno.ECONNREFUSED
            text, cure = f"no connection: {text}", "Is the server up, and the URL right?"
        elif isinstance(error, self._passing):
            number, text = errno.EHOSTDOWN, f"the cluster does not serve all its slots: {text or type(error).__name__}"
            cure = "See CLUSTER INFO; a shard without a master needs one"
        else:
            text = f"{type(error).__name__}: {text}"
        return number, f"{text}. {cure}".rstrip(". ")
