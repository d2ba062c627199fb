"""Redis servers for the tests: real ones, on loopback, in a directory of their own, gone at the end of the test.

UFFD_REDIS_SERVER names another program than the redis-server or valkey-server that is found.
"""

import contextlib
import functools
import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time

START_S = 20.0
# The watchdog kills whoever overruns, and nobody would be left to end the servers.
_ENDED_WITH_US = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()


def program():
    return os.environ.get("UFFD_REDIS_SERVER") or shutil.which("redis-server") or shutil.which("valkey-server")


def why_not():
    """Why there are no servers here; None if there are."""
    return None if program() else "no redis-server (on Debian: apt-get install redis-server)"


@functools.cache
def version():
    """(7, 0) of Redis, or of the Redis that a Valkey says it is like."""
    told = subprocess.run([program(), "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    found = re.search(r"v=(\d+)\.(\d+)", told)
    return (7, 2) if "valkey" in told.lower() else (int(found[1]), int(found[2]))


def free_port(above=20000, below=50000):
    """A port that nobody has now; the one 10,000 above it, for the cluster's bus, neither."""
    for _ in range(200):
        port = random.randrange(above, below)
        with contextlib.ExitStack() as stack:
            try:
                for number in (port, port + 10000):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            return port
    raise OSError("no free port")


def wait_until(condition, what, timeout_s=START_S):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


class Server:
    """A server; `options` as on its command line. A context manager."""

    def __init__(self, folder, **options):
        self.port = free_port()
        self.folder = folder / str(self.port)
        self.folder.mkdir()
        self.options = {"save": "", "bind": "127.0.0.1", "loglevel": "warning", **options}
        self.process = None

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self):
        return self.process.pid

    def start(self):
        words = [word for name, value in self.options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen([*_ENDED_WITH_US, program(), "--port", str(self.port), *words],
                                            cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        wait_until(self.answers, f"redis-server in {self.folder} does not answer")
        return self

    def answers(self):
        if self.process.poll() is not None:
            raise OSError(f"redis-server ended with {self.process.returncode}: {(self.folder / 'log').read_text()}")
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as one:
                one.sendall(b"PING\r\n")
                return one.recv(1) in (b"+", b"-")           # "-": it asks for a password
        except OSError:
            return False

    @contextlib.contextmanager
    def client(self, **options):
        """redis-py, for the test's own looks and tricks."""
        import redis

        with redis.Redis(port=self.port, socket_timeout=10, **options) as made:
            yield made

    def do(self, *command):
        with self.client() as client:
            return client.execute_command(*command)

    def signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """As a crash: nothing is saved."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)

    def restart(self):
        self.kill()
        return self.start()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.kill()


class Cluster:
    """Three masters with a replica each, all on loopback. A context manager."""

    MASTERS = 3
    SLOTS = 16384

    def __init__(self, folder, **options):
        self.servers = [Server(folder, cluster_enabled="yes", cluster_node_timeout=1500, appendonly="no",
                               repl_diskless_sync_delay=0, cluster_replica_validity_factor=0,
                               repl_ping_replica_period=1, **options)
                        for _ in range(2 * self.MASTERS)]

    @property
    def url(self):
        return self.servers[0].url

    def __enter__(self):
        try:
            for server in self.servers:
                server.start()
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.kill()

    def _join(self):
        first = self.servers[0]
        ids = [server.do("CLUSTER", "MYID").decode() for server in self.servers]
        share = -(-self.SLOTS // self.MASTERS)
        for number, server in enumerate(self.servers[:self.MASTERS]):
            slots = range(number * share, min((number + 1) * share, self.SLOTS))
            server.do("CLUSTER", "ADDSLOTS", *slots)
        wait_until(functools.partial(self._meet, first), "the nodes do not know each other", 40)
        for number, server in enumerate(self.servers[self.MASTERS:]):
            server.do("CLUSTER", "REPLICATE", ids[number])
        wait_until(self.is_whole, "the cluster does not get ready", 40)

    def _meet(self, first):
        """Whether all know all. A handshake that takes too long is forgotten, so it is asked for until then."""
        strangers = [server for server in self.servers
                     if int(server.do("CLUSTER INFO")["cluster_known_nodes"]) < len(self.servers)]
        for server in strangers:
            if server is not first:
                server.do("CLUSTER", "MEET", "127.0.0.1", first.port)
        if strangers:
            time.sleep(0.5)
        return not strangers

    def is_whole(self):
        """All slots served, each master with a replica that is up to date."""
        infos = [server.do("INFO", "replication") for server in self.servers if server.process.poll() is None]
        states = [server.do("CLUSTER INFO")["cluster_state"] for server in self.servers
                  if server.process.poll() is None]
        return set(states) == {"ok"} and all(
            info["connected_slaves"] >= 1 if info["role"] == "master" else info["master_link_status"] == "up"
            for info in infos)

    def masters(self):
        return [server for server in self.servers if server.process.poll() is None
                and server.do("INFO", "replication")["role"] == "master"]


class Proxy:
    """Passes bytes between clients and a server. `upto(up, down)` cuts the next connection after so many bytes of
    requests, or of answers; those after it are whole. `twice`: the next answer comes doubled;
    "late": its double comes before the answer after it."""

    def __init__(self, port):
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.limits = (None, None)
        self.connections = 0
        self.twice = False
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.sockets = [self.listener]

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    def upto(self, up=None, down=None):
        self.limits = (up, down)

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self.connections += 1
            (up, down), self.limits = self.limits, (None, None)
            self.sockets += [client, server]
            for one, other, limit, is_answer in ((client, server, up, False), (server, client, down, True)):
                thread = threading.Thread(target=self._pass_on, args=(one, other, limit, is_answer), daemon=True)
                self.threads.append(thread)
                thread.start()

    def _pass_on(self, one, other, limit, is_answer):
        passed, late = 0, b""
        try:
            while data := one.recv(65536):
                data, late = late + data, b""
                if limit is not None and passed + len(data) >= limit:
                    other.sendall(data[:limit - passed])
                    break
                other.sendall(data)
                if is_answer and self.twice:
                    if self.twice == "late":
                        late = data
                    else:
                        other.sendall(data)
                    self.twice = False
                passed += len(data)
        except OSError:
            pass
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        self.threads[0].start()
        return self

    def __exit__(self, *_):
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)
        for one in self.sockets:
            one.close()
