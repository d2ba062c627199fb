"""A proxy that does to connections what networks do: cuts, delays, changes a byte, goes silent, is slow.

One thread moves the bytes of all connections. Faults are rules: at which connection (in the order of their coming),
in which direction ("up": from who connected), after how many bytes. Exactly so many bytes arrive before a fault. What
passed is counted, so that a test can first look how long a conversation is and then cut it at each of its bytes.
"""

import os
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

CHUNK = 1 << 16
BUFFERED = 1 << 18


@dataclass
class Rule:
    what: str  # "cut", "reset", "silence", "delay", "corrupt"
    direction: str  # "up", "down"
    at: int  # after so many bytes
    connection: int | None = None  # the first is 0; None: whichever comes there first
    delay_s: float = 0.0
    flip: int = 0xFF
    used: bool = False


@dataclass
class Pipe:
    """One direction of a connection."""

    direction: str
    source: socket.socket
    sink: socket.socket
    passed: int = 0
    taken: int = 0
    pending: bytearray = field(default_factory=bytearray)
    ended: bool = False  # the source has closed
    told: bool = False  # and the sink was told
    not_before_s: float = 0.0


@dataclass
class Pair:
    number: int
    pipes: tuple
    silent: bool = False


class Proxy:
    """Listens at .url, in front of the migration url given; a context manager."""

    def __init__(self, url, rules=(), rate_bytes_per_s=None, where=None):
        self.target = address_of(url)
        self.rules = list(rules)
        self.rate_bytes_per_s = rate_bytes_per_s
        self.pairs, self.counts, self.happened = [], [], []
        self.accepting = True
        self.lock = threading.Lock()
        if where:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(where)
            self.url = f"unix:{where}"
        else:
            self.listener = socket.create_server(("127.0.0.1", 0))
            self.url = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.where = where
        self.listener.listen(64)
        self.listener.setblocking(False)
        self.waker, self.bell = socket.socketpair()
        self.ended = False
        self.thread = threading.Thread(target=self.run, name="proxy", daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.ended = True
        self.bell.send(b"x")
        self.thread.join(10)
        assert not self.thread.is_alive()
        for one in (self.listener, self.waker, self.bell):
            one.close()
        if self.where:
            os.unlink(self.where)

    def cut_all(self, what="cut"):
        """Every connection that there is, now."""
        with self.lock:
            for pair in list(self.pairs):
                self.end(pair, what)

    def passed(self, connection, direction):
        return self.counts[connection][direction]

    # ---- the thread ----

    def run(self):
        while not self.ended:
            with self.lock:
                waiting = self.wishes()
            for key, _ in waiting.select(0.02 if self.is_held() else 0.2):
                with self.lock:
                    self.serve(key.fileobj, key.data)
            waiting.close()
            with self.lock:
                for pair in list(self.pairs):
                    for pipe in pair.pipes:
                        self.move(pair, pipe)
        with self.lock:
            for pair in list(self.pairs):
                self.end(pair, "cut")

    def wishes(self):
        """Made anew each time: few connections, and every kind of fault changes what is waited for."""
        selector = selectors.DefaultSelector()
        if self.accepting:
            selector.register(self.listener, selectors.EVENT_READ)
        selector.register(self.waker, selectors.EVENT_READ)
        for pair in self.pairs:
            wanted = {}
            for pipe in pair.pipes:
                if not pipe.ended and len(pipe.pending) < BUFFERED:
                    wanted[pipe.source] = wanted.get(pipe.source, 0) | selectors.EVENT_READ
                if pipe.pending and not pair.silent and time.monotonic() >= pipe.not_before_s:
                    wanted[pipe.sink] = wanted.get(pipe.sink, 0) | selectors.EVENT_WRITE
            for one, events in wanted.items():
                selector.register(one, events, pair)
        return selector

    def is_held(self):
        return any(pipe.not_before_s for pair in self.pairs for pipe in pair.pipes)

    def serve(self, one, pair):
        if one is self.listener:
            self.welcome()
        elif one is self.waker:
            self.waker.recv(100)
        elif pair in self.pairs:
            for pipe in pair.pipes:
                if pipe.source is one:
                    self.take(pair, pipe)

    def welcome(self):
        try:
            client, _ = self.listener.accept()
        except BlockingIOError:
            return
        family, sockaddr = self.target
        server = socket.socket(family)
        try:
            server.connect(sockaddr)
        except OSError:
            client.close()
            server.close()
            return
        for one in (client, server):
            one.setblocking(False)
            if one.family != socket.AF_UNIX:
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pairs.append(Pair(len(self.counts), (Pipe("up", client, server), Pipe("down", server, client))))
        self.counts.append({"up": 0, "down": 0})

    def take(self, pair, pipe):
        try:
            data = pipe.source.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self.end(pair, "reset")
            return
        pipe.pending += data
        pipe.ended = pipe.ended or not data

    def move(self, pair, pipe):
        """Send what may go: up to the next fault, and as fast as is allowed."""
        while pair in self.pairs and not pair.silent and time.monotonic() >= pipe.not_before_s:
            pipe.not_before_s = 0.0
            rule = self.next_rule(pair, pipe)
            if rule and rule.at <= pipe.passed:
                self.happen(rule, pair, pipe)
                continue
            room = min(len(pipe.pending), CHUNK, rule.at - pipe.passed if rule else CHUNK)
            if not room:
                self.tell_end(pair, pipe)
                return
            try:
                sent = pipe.sink.send(pipe.pending[:room])
            except BlockingIOError:
                return
            except OSError:
                self.end(pair, "reset")
                return
            del pipe.pending[:sent]
            pipe.passed += sent
            self.counts[pair.number][pipe.direction] = pipe.passed
            if self.rate_bytes_per_s:
                pipe.not_before_s = time.monotonic() + sent / self.rate_bytes_per_s

    def tell_end(self, pair, pipe):
        if pipe.ended and not pipe.told:
            pipe.told = True
            try:
                pipe.sink.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            if all(one.told for one in pair.pipes):
                self.end(pair, "cut")

    def next_rule(self, pair, pipe):
        mine = [rule for rule in self.rules if not rule.used and rule.direction == pipe.direction
                and rule.connection in (None, pair.number) and rule.at >= pipe.passed]
        return min(mine, key=lambda rule: rule.at, default=None)

    def happen(self, rule, pair, pipe):
        if rule.what == "corrupt":
            if not pipe.pending:
                pipe.not_before_s = time.monotonic() + 0.001  # the byte has yet to come
                return
            pipe.pending[0] ^= rule.flip
        elif rule.what == "delay":
            pipe.not_before_s = time.monotonic() + rule.delay_s
        elif rule.what == "silence":
            pair.silent = True
        else:
            self.end(pair, rule.what)
        rule.used = True
        self.happened.append((rule.what, pair.number, pipe.direction, pipe.passed))

    def end(self, pair, what):
        self.pairs.remove(pair)
        for pipe in pair.pipes:
            if what == "reset":
                pipe.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            pipe.source.close()


def address_of(url):
    if url.startswith("unix:"):
        return socket.AF_UNIX, url.removeprefix("unix:")
    host, port = url.removeprefix("tcp://").rsplit(":", 1)
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host.strip("[]"), int(port))
