"""An HTTP server with byte ranges on loopback, that can also misbehave in every way that a client must notice.

Run as a program (`python rangeserver.py FOLDER`) it prints its port and serves until its standard input ends: what
touches memory may hold the interpreter lock, so the server that fills it must be another process.
"""

import contextlib
import http.server
import mmap
import os
import re
import subprocess
import sys
import threading
import time


def mapped(path):
    """The bytes of a file, of which only those are read that are sent."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /<way>/<name>: the file <name> of the folder, served in that way; see `answer`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        if self.server.refuse and self.server.refuse(self.path):
            return self.reply(503, b"")
        _, way, name = self.path.partition("?")[0].split("/", 2)
        body = self.server.files.get(name)
        if body is None:
            try:
                body = mapped(os.path.join(self.server.folder or "", name))
            except OSError:
                return self.reply(404, b"no such file")
        # zarr and others fetch whole files
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(body))
        return self.answer(way if found else "whole", body, start, stop)

    def answer(self, way, body, start, stop):
        total, is_probe = len(body), stop - start == 1
        stop = min(stop, total)
        headers = {"ETag": f'"{self.server.etag}"'}
        if way == "slow":
            time.sleep(self.server.delay_s)
        elif way == "error" and not is_probe:
            return self.reply(503, b"")
        elif way == "denied":
            return self.reply(403, b"")
        elif way == "gzip" and not is_probe:
            headers["Content-Encoding"] = "gzip"
        elif way == "shifted" and not is_probe:
            start, stop = start + 1, min(stop + 1, total)
        elif way == "cut" and not is_probe:      # the head promises all, the connection ends early
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
            return self.reply(206, body[start:stop], headers, 7)
        elif way == "short" and not is_probe:    # an honest short answer
            stop -= 5
        if way == "whole" or (way == "whole-later" and not is_probe):
            return self.reply(200, body[:], headers)
        if start >= total:
            return self.reply(416, b"", {"Content-Range": f"bytes */{total}"})
        told = "*" if way == "unsized" else total
        return self.reply(206, body[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{told}"})

    def reply(self, status, body, headers=None, cut=0):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):               # a client that wants no more
            self.wfile.write(body[:len(body) - cut])
        if cut:
            self.close_connection = True


class Server(http.server.ThreadingHTTPServer):
    """`files` (name to bytes) and `etag` may be changed at any time; `requests` is what was asked for."""

    daemon_threads = True

    def __init__(self, folder=None, files=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.files = dict(files or {})
        self.etag = "first"
        self.delay_s = 0.05
        self.requests = []
        self.refuse = None                       # a function of the path

    def url(self, name, way="good"):
        return f"http://127.0.0.1:{self.server_port}/{way}/{name}"

    def handle_error(self, request, client_address):
        pass


@contextlib.contextmanager
def in_thread(folder=None, files=None):
    """A server for code that lets go of the interpreter lock."""
    server = Server(folder, files)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@contextlib.contextmanager
def in_child(folder):
    """The URL of a folder, served by another process."""
    child = subprocess.Popen([sys.executable, "-I", "-S", __file__, str(folder)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(child.stdout.readline())}/good"
    finally:
        child.stdin.close()
        child.stdout.close()
        child.wait(10)


if __name__ == "__main__":
    with in_thread(sys.argv[1]) as serving:
        print(serving.server_port, flush=True)
        sys.stdin.read()
