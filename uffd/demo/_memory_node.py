"""The demo's memory node: a Redis server of its own on a unix socket, that keeps nothing and ends with the demo."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

_START_S = 20.0
_SOCKET_PATH_BYTES = 107            # the longest that a unix socket's name may be


def program() -> str | None:
    return shutil.which("redis-server") or shutil.which("valkey-server")


class Node:
    """A running server. A context manager; leaving it kills the server and removes its directory. OSError, with what
    the server said, if it does not answer within 20 s."""

    def __init__(self):
        self._folder = Path(tempfile.mkdtemp(prefix="uffd-demo-redis-"))     # 0700: nobody else reaches the socket
        if len(os.fsencode(self._folder / "socket")) > _SOCKET_PATH_BYTES:
            self._folder.rmdir()
            self._folder = Path(tempfile.mkdtemp(prefix="uffd-demo-redis-", dir="/tmp"))
        self._socket = self._folder / "socket"
        self.url = f"unix://{self._socket}"
        # Also when we are killed; a session of its own, so that Ctrl-C reaches us alone, and we end it in order.
        dying_with_us = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [*dying_with_us, program(), "--port", "0", "--unixsocket", str(self._socket), "--save", "",
                 "--appendonly", "no", "--dir", str(self._folder), "--loglevel", "warning"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            self._client = self._answering()
            self.version = self._client.info("server")["redis_version"]
        except BaseException:
            self.__exit__()
            raise

    def _answering(self):
        import redis

        client = redis.Redis.from_url(self.url, socket_timeout=_START_S)
        deadline_s = time.monotonic() + _START_S
        while True:
            try:
                client.ping()
                return client
            except redis.exceptions.ConnectionError as error:
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    said = (self._folder / "log").read_text(errors="replace").strip()
                    raise OSError(f"redis-server does not answer: {said[-300:] or error}") from error
                time.sleep(0.02)

    def wire_bytes(self) -> tuple[int, int]:
        """What the server has received and sent since its start, as it counts it."""
        told = self._client.info("stats")
        return told["total_net_input_bytes"], told["total_net_output_bytes"]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
