"""A folder over HTTP on loopback: by nginx where it is installed, else by a server in Python, which is slower than the
client that is measured."""
from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LISTENS_S = 20.0
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")    # where Debian has it
CONFIGURATION = """
daemon off;
pid {own}/pid;
error_log stderr;
{user}
worker_processes 1;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    tcp_nodelay on;
    open_file_cache max=16;
    keepalive_requests 1000000000;
    client_body_temp_path {own}/body;
    proxy_temp_path {own}/proxy;
    fastcgi_temp_path {own}/fastcgi;
    uwsgi_temp_path {own}/uwsgi;
    scgi_temp_path {own}/scgi;
    server {{ listen 127.0.0.1:{port}; root {folder}; }}
}}
"""
PYTHON = """
import sys
from aiohttp import web
app = web.Application()
app.router.add_static("/", sys.argv[1])
web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=None, access_log=None)
"""


@contextmanager
def serving(folder: Path, own: Path) -> Iterator[tuple[str, str]]:
    """The URL of `folder`, and which server it is. `own`: an empty directory for what the server writes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(_command(folder, own, port), stdin=subprocess.DEVNULL)
    try:
        _wait_for(process, port)
        yield f"http://127.0.0.1:{port}", "nginx" if NGINX else "aiohttp"
    finally:
        process.terminate()
        process.wait()


def _command(folder: Path, own: Path, port: int) -> list[str]:
    if not NGINX:
        return [sys.executable, "-P", "-c", PYTHON, str(folder), str(port)]
    user = "user root;" if os.geteuid() == 0 else ""    # else its worker may not read what is ours
    configuration = own / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(own=own, user=user, port=port, folder=folder))
    return [NGINX, "-p", str(own), "-c", str(configuration), "-e", "stderr"]


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + LISTENS_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the web server does not listen (exit code {process.returncode})") from None
            time.sleep(0.02)
