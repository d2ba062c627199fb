"""Where a migration goes: `unix:PATH` or `tcp://HOST:PORT`; and what may be reached without a key.

Without one, whoever connects would get the memory, and whoever listens could take its place: so only this machine is
accepted then, by the addresses that names resolve to and not by the names, at both ends. Over TCP that is loopback,
where any local user may come; a unix socket is for this user (and root) alone, which the kernel tells of both ends.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from typing import Any

from .._sockets import left_s, listen_unix, peer
from ..errors import MigrationError

__all__ = ["Address", "check_peer", "connect", "listen", "parse"]

_BACKLOG = 128
_FORMS = "unix:PATH or tcp://HOST:PORT"
_TCP = re.compile(r"tcp://(?:\[([0-9A-Fa-f.]*:[0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s\[\]:/@?#]+)):([0-9]{1,5})", re.ASCII)
_CURE = ("Pass the same key=secrets.token_bytes(32) at both ends; or listen on 127.0.0.1 and reach it through a tunnel "
         "(ssh -L, WireGuard, stunnel: docs/migration.md); or use unix:PATH on one machine")


@dataclass(frozen=True)
class Address:
    """Where to listen or to connect. path: of a unix socket, "" for TCP."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


def listen(address: Address, *, has_key: bool) -> tuple[socket.socket, Address]:
    """A listening socket, and where it is: with the number that the kernel chose for port 0.

    A unix socket has mode 0600 and takes the place of one at which nobody listens any more.
    """
    if address.path:
        path = os.path.abspath(address.path)
        return listen_unix(path, _BACKLOG), Address(path=path)
    family, sockaddr = _resolved(address, socket.AI_PASSIVE)[0]
    if not has_key and not _is_loopback(sockaddr[0]):
        raise _refused(f"{address} can be reached from other machines ({sockaddr[0]} is no loopback address)")
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:            # or [::] would take IPv4 in, under addresses that look like IPv6
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(sockaddr)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{error.strerror}: can't listen at {address}; is another process there, or the "
                      "address not this machine's?") from error
    except BaseException:
        listener.close()
        raise
    return listener, Address(host=address.host, port=listener.getsockname()[1])


def connect(address: Address, *, has_key: bool, deadline_s: float) -> socket.socket:
    """A connected socket. Tries each address of the host until deadline_s (time.monotonic); the name is looked up
    before, by the system, in its own time. OSError, or MigrationError for a place that needs a key."""
    places: list[tuple[int, Any]]
    if address.path:
        places = [(socket.AF_UNIX, address.path)]
    else:
        places = _resolved(address, 0)
        away = [sockaddr[0] for _, sockaddr in places if not _is_loopback(sockaddr[0])]
        if away and not has_key:                 # any of them: which one answers is not for others to choose
            raise _refused(f"{address} is on another machine ({away[0]} is no loopback address)")
    failure: OSError | None = None
    for family, sockaddr in places:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(left_s(deadline_s, "connecting"))
            connection.connect(sockaddr)
            check_peer(connection, has_key=has_key)
            if family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
    assert failure is not None
    raise OSError(failure.errno or errno.ETIMEDOUT, f"can't connect to {address}: {failure.strerror or failure}; does "
                  "the destination listen there, and is it this machine that may reach it?") from failure


def check_peer(connection: socket.socket, *, has_key: bool) -> None:
    """MigrationError if the other end is one with whom nothing is exchanged without a key, and there is none."""
    if has_key:
        return
    if connection.family == socket.AF_UNIX:
        pid, uid = peer(connection)
        if uid not in (0, os.geteuid()):
            raise _refused(f"at the other end of the unix socket is process {pid} of user {uid}")
    elif not _is_loopback(connection.getpeername()[0]):
        raise _refused(f"{connection.getpeername()[0]} is another machine")


def parse(url: str) -> Address:
    """ValueError with the forms that are known for everything else."""
    if not isinstance(url, str):
        raise TypeError(f"a migration's address is a str, {_FORMS}, not {type(url).__name__}")
    if url.startswith("unix:"):
        path = url.removeprefix("unix:")
        if not path or "\0" in path:
            raise ValueError(f"{url!r}: a path has to follow 'unix:', without NUL")
        return Address(path=path)
    found = _TCP.fullmatch(url)
    if not found:
        raise ValueError(f"{url!r} is not {_FORMS}: an IPv6 host stands in brackets, a port has to be there, and "
                         "nothing follows it")
    port = int(found[3])
    if port > 65535:
        raise ValueError(f"{url!r}: a port is 65535 at most (0: the kernel chooses, where one listens)")
    return Address(host=found[1] or found[2], port=port)


def _resolved(address: Address, flags: int) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=flags)
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(errno.EHOSTUNREACH, f"{address}: the host's name is not known ({error})") from error
    return [(family, sockaddr) for family, _, _, _, sockaddr in found
            if family in (socket.AF_INET, socket.AF_INET6)]


def _is_loopback(host: str) -> bool:
    found = ipaddress.ip_address(host.partition("%")[0])
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def _refused(what: str) -> MigrationError:
    return MigrationError(f"refused without a key: {what}. {_CURE}")
