"""Who is let in to a migration: addresses, keys, and what somebody can do who has none."""

import contextlib
import errno
import os
import queue
import socket
import stat
import struct
import tempfile
import threading
import time
from pathlib import Path

import pytest
import uffd
from hypothesis import given, settings
from hypothesis import strategies as st
from uffd.migrate import _acceptor, _auth, _urls

KEY, OTHER = b"k" * 32, b"o" * 32
LONG_S = 5.0


@pytest.fixture
def tmp_path():
    """In place of pytest's: a socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="m-") as folder:
        yield Path(folder)


def soon():
    return time.monotonic() + LONG_S


# Addresses


@pytest.mark.parametrize("url", ["unix:/tmp/x", "unix:relative/x", "tcp://127.0.0.1:0", "tcp://[::1]:65535",
                                 "tcp://[fe80::1%eth0]:1", "tcp://a-host.example:7"])
def test_an_address_is_told_as_it_was_given(url):
    assert str(_urls.parse(url)) == url


@pytest.mark.parametrize("url", ["", "unix:", "unix:a\0b", "tcp://h", "tcp://h:", "tcp://:1", "tcp://h:65536",
                                 "tcp://h:-1", "tcp://u@h:1", "tcp://h:1/", "tcp://h:1?x", "tcp://::1:5",
                                 "tcp://[h]:1", "tcp://h:1\n", "http://h:1", "/tmp/x", "tcp://h:٣"])
def test_what_is_no_address_is_refused_with_the_forms(url):
    with pytest.raises(ValueError, match=r"unix:|port"):
        _urls.parse(url)


@pytest.mark.parametrize("url", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:9", "tcp://[2001:db8::1]:9"])
def test_other_machines_are_refused_without_a_key_at_both_ends(url):
    """Before anything is bound or sent: 192.0.2.1 and 2001:db8:: are nobody's: a connection there would only hang."""
    address = _urls.parse(url)
    for attempt in (lambda: _urls.listen(address, has_key=False),
                    lambda: _urls.connect(address, has_key=False, deadline_s=soon())):
        with pytest.raises(uffd.MigrationError, match=r"key=.*tunnel.*unix:") as caught:
            attempt()
        assert caught.value.owner == "source"


def test_a_name_counts_by_what_it_resolves_to(monkeypatch):
    """A name that sounds like this machine and is not: one address of another machine is enough to refuse it."""
    real = socket.getaddrinfo

    def resolve(host, port, *args, **kwargs):
        if host != "localhost":
            return real(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("127.0.0.1", "192.0.2.1")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(uffd.MigrationError, match=r"192\.0\.2\.1"):
        _urls.connect(_urls.parse("tcp://localhost:9"), has_key=False, deadline_s=soon())


def test_an_ipv4_address_in_ipv6_clothes_is_judged_as_what_it_is():
    assert [_urls._is_loopback(host) for host in ("::ffff:127.0.0.1", "::ffff:192.0.2.1", "127.8.9.1", "::1", "::",
                                                   "fe80::1%eth0")] == [True, False, True, True, False, False]


def test_a_unix_socket_is_this_users_alone_and_takes_a_dead_ones_place(tmp_path):
    path = tmp_path / "socket"
    address = _urls.parse(f"unix:{path}")
    with _urls.listen(address, has_key=False)[0]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(FileExistsError, match=f"process {os.getpid()} listens there"):
            _urls.listen(address, has_key=False)
    _urls.listen(address, has_key=False)[0].close()


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_unix_socket_of_another_user_is_refused_without_a_key(tmp_path, monkeypatch, side):
    """The kernel tells who is at the other end: somebody may have put a socket of his in the path's place."""
    address = _urls.parse(f"unix:{tmp_path / 'socket'}")
    with _urls.listen(address, has_key=False)[0] as listener:
        monkeypatch.setattr(_urls, "peer", lambda connection: (4321, os.geteuid() + 1))
        if side == "source":
            with pytest.raises(uffd.MigrationError, match="process 4321 of user"):
                _urls.connect(address, has_key=False, deadline_s=soon())
        else:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "socket"))
                connection, _ = listener.accept()
                with connection, pytest.raises(uffd.MigrationError, match="process 4321 of user"):
                    _urls.check_peer(connection, has_key=False)
        _urls.connect(address, has_key=True, deadline_s=soon()).close()


def test_nobody_there_is_an_oserror_with_what_to_look_at(tmp_path):
    with socket.socket() as bound:                 # bound, and nobody listens
        bound.bind(("127.0.0.1", 0))
        for url in (f"unix:{tmp_path / 'none'}", f"tcp://127.0.0.1:{bound.getsockname()[1]}"):
            with pytest.raises(OSError, match="does the destination listen there") as caught:
                _urls.connect(_urls.parse(url), has_key=True, deadline_s=soon())
            assert caught.value.errno in (errno.ENOENT, errno.ECONNREFUSED)


@pytest.mark.parametrize(("key", "error"), [("", ValueError), (b"", ValueError), (7, TypeError), ([1], TypeError)])
def test_what_is_no_key_is_refused(key, error):
    with pytest.raises(error, match="token_bytes"):
        _auth.check_key(key)


# The hello, by its messages


def exchange(listening, connecting, change=lambda number, data: data):
    """Both sides to their end; change(number, data): what becomes of each message on its way. All messages."""
    said = [change(0, connecting.hello)]
    sides = [listening, connecting]
    while sides[0].wanted and len(said[-1]) == sides[0].wanted:
        reply = sides[0].took(said[-1])
        if not reply:
            break
        said.append(change(len(said), reply))
        sides.reverse()
    return said


def outcome(key_l, key_c, **versions):
    listening = _auth.Listening(key_l, versions.get("listening", _auth.VERSIONS))
    connecting = _auth.Connecting(key_c, b"push", versions.get("connecting", _auth.VERSIONS))
    exchange(listening, connecting)
    return listening, connecting


@pytest.mark.parametrize("key", [KEY, None])
def test_both_sides_agree(key):
    listening, connecting = outcome(key, key)
    assert listening.peer == connecting.peer
    assert (listening.peer.purpose, listening.peer.version, len(listening.peer.session)) == (b"push", 1, 32)
    assert outcome(key, key)[0].peer.session != listening.peer.session


@pytest.mark.parametrize(("key_l", "key_c", "says_l", "says_c"), [
    (KEY, OTHER, "could not show", "keys of the two ends differ"),
    (KEY, None, "the source has no key", "the destination has a key"),
    (None, KEY, "the source has a key", "the destination has none"),
])
def test_keys_that_differ_are_refused_and_both_sides_say_why(key_l, key_c, says_l, says_c):
    listening, connecting = outcome(key_l, key_c)
    assert listening.peer is None and connecting.peer is None
    assert says_l in str(listening.failure) and says_c in str(connecting.failure)


def test_versions_are_negotiated_to_the_newest_of_both_and_else_named():
    assert outcome(KEY, KEY, listening=(1, 3), connecting=(2, 9))[0].peer.version == 3
    for ours, theirs in (((1, 1), (2, 3)), ((4, 5), (2, 3))):
        listening, connecting = outcome(KEY, KEY, listening=ours, connecting=theirs)
        for side in (listening, connecting):
            assert side.peer is None
            assert all(f"{a} to {b}" in str(side.failure) for a, b in (ours, theirs))
            upgraded = "this side" if (side is listening) == (ours < theirs) else "the "
            assert f"upgrade uffd at {upgraded}" in str(side.failure)


def test_what_was_heard_is_of_no_use_a_second_time():
    """A whole hello that succeeded, said again to the same listener, and to the connector."""
    said = exchange(_auth.Listening(KEY), _auth.Connecting(KEY))
    listening = _auth.Listening(KEY)
    listening.took(said[0])
    listening.took(said[2])
    assert listening.peer is None and "could not show" in str(listening.failure)
    connecting = _auth.Connecting(KEY)
    connecting.took(said[1])
    connecting.took(said[3])
    assert connecting.peer is None and "could not show" in str(connecting.failure)


def test_a_sides_own_proof_sent_back_to_it_proves_nothing():
    """Somebody without the key between two sides of equal part has nobody to ask for the other part's proof."""
    connecting = _auth.Connecting(KEY)
    challenge = _auth.Listening(KEY).took(connecting.hello)
    proof = connecting.took(challenge)
    connecting.took(_auth._VERDICT.pack(_auth._MAGIC, 0, proof[-32:]))
    assert connecting.peer is None


def test_a_listener_says_nothing_that_depends_on_its_key_to_who_has_none():
    listening, connecting = _auth.Listening(KEY), _auth.Connecting(OTHER)
    said = exchange(listening, connecting)
    assert said[3] == _auth._VERDICT.pack(_auth._MAGIC, _auth._WRONG_KEY, bytes(32))
    assert said[1][-32:] == listening._nonce


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 3), st.integers(0, 95), st.integers(1, 255))
def test_no_bit_of_a_hello_can_be_changed_on_the_way(message, at, flip):
    def change(number, data):
        if number != message or at >= len(data):
            return data
        return data[:at] + bytes([data[at] ^ flip]) + data[at + 1:]

    listening, connecting = _auth.Listening(KEY), _auth.Connecting(KEY, b"push")
    said = exchange(listening, connecting, change)
    if at < len(said[min(message, len(said) - 1)]) and message < 3:
        assert listening.peer is None, f"byte {at} of message {message} changed by {flip:#x}"
    if message == 3 and at < len(said[3]):
        # The padding behind the verdict is nobody's.
        assert connecting.peer is None or said[3][:9] + said[3][12:] == b"".join(
            [_auth._MAGIC, b"\0", connecting._mac(b"listener")])


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=0, max_size=160), st.booleans(), st.booleans())
def test_nonsense_is_refused_and_nothing_else(data, has_key, whole):
    """Fuzzed: whatever bytes come, each side ends refused, or waits for more; it raises nothing."""
    for talk in (_auth.Listening(KEY if has_key else None), _auth.Connecting(KEY if has_key else None)):
        given_bytes = (_auth._MAGIC + data if whole else data)
        while talk.wanted and len(given_bytes) >= talk.wanted:
            head, given_bytes = given_bytes[:talk.wanted], given_bytes[talk.wanted:]
            talk.took(head)
        assert talk.peer is None
        assert (talk.failure is None) == bool(talk.wanted)


# The hello, over sockets


def test_over_sockets_it_takes_no_byte_that_is_not_its_own():
    a, b = socket.socketpair()
    with a, b:
        got = []
        thread = threading.Thread(target=lambda: got.append(_auth.answer(b, KEY, deadline_s=soon())))
        thread.start()
        peer = _auth.prove(a, KEY, b"ask", deadline_s=soon())
        a.sendall(b"what follows")
        thread.join()
        assert got == [peer]
        assert b.recv(100) == b"what follows"


@pytest.mark.parametrize("side", [_auth.answer, _auth.prove])
def test_the_deadline_is_for_the_whole_hello(side):
    """A byte now and then, each in good time: whoever counts from the last byte would never be done."""
    a, b = socket.socketpair()
    with a, b:
        ends_at = time.monotonic() + 0.2

        def drip():
            with contextlib.suppress(OSError):
                for byte in _auth._MAGIC * 5:
                    b.send(bytes([byte]))
                    time.sleep(0.01)

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(TimeoutError, match=r"the hello: \d+ of \d+ bytes came in time|the hello: too late"):
            side(a, KEY, deadline_s=ends_at)
        late_s = time.monotonic() - ends_at
        a.close()
        thread.join()
    assert late_s < 0.5


@pytest.mark.parametrize("side", [_auth.answer, _auth.prove])
def test_a_peer_that_goes_away_is_an_oserror(side):
    a, b = socket.socketpair()
    with a:
        b.sendall(_auth._MAGIC)
        b.close()
        with pytest.raises(OSError, match=r"closed the connection after 8 of \d+ bytes|Broken pipe"):
            side(a, KEY, deadline_s=soon())


# The acceptor


class Door:
    """An acceptor with what came through it, and clients that are closed at the end."""

    def __init__(self, url="tcp://127.0.0.1:0", key=KEY, **options):
        self.came = queue.Queue()
        self.acceptor = _acceptor.Acceptor(_urls.parse(url), key, lambda *item: self.came.put(item), **options)
        self.address = self.acceptor.address
        self.clients = []

    def client(self):
        self.clients.append(_urls.connect(self.address, has_key=True, deadline_s=soon()))
        return self.clients[-1]

    def enter(self, key=KEY, purpose=b"push"):
        """A whole hello, and how long it took."""
        began_s = time.monotonic()
        peer = _auth.prove(self.client(), key, purpose, deadline_s=soon())
        connection, same = self.came.get(timeout=LONG_S)
        self.clients.append(connection)
        assert peer == same
        assert connection.gettimeout() is None
        return time.monotonic() - began_s

    def wait_refused(self, why, count):
        deadline_s = soon()
        while self.acceptor.refused[why] < count:
            assert time.monotonic() < deadline_s, self.acceptor.refused
            time.sleep(0.005)


@pytest.fixture
def door():
    made = []

    def make(**options):
        made.append(Door(**options))
        return made[-1]

    yield make
    for one in made:
        one.acceptor.close()
        for client in one.clients:
            client.close()
        assert not one.acceptor._thread.is_alive()


def test_it_lets_in_who_has_the_key_and_goes_on_after_who_has_not(door):
    one = door()
    for key in (OTHER, None):
        with pytest.raises(uffd.MigrationError, match="key"):
            _auth.prove(one.client(), key, deadline_s=soon())
    one.wait_refused("refused", 2)
    one.enter()
    assert one.came.empty()


def test_over_a_unix_socket_whose_path_goes_with_it(door, tmp_path):
    one = door(url=f"unix:{tmp_path / 'socket'}", key=None)
    one.enter(key=None)
    one.acceptor.close()
    one.acceptor.close()
    assert not (tmp_path / "socket").exists()


def test_thousands_that_say_nothing_keep_nobody_out(door):
    """Idle, slow, and with nonsense; never more than so many are held, and an honest source is let in at once."""
    one = door(half_open=16, hello_s=60.0)
    idle = []
    try:
        for number in range(2000):
            idle.append(socket.create_connection(("127.0.0.1", one.address.port)))
            if number % 3:
                with contextlib.suppress(OSError):
                    idle[-1].send(b"x" if number % 3 == 1 else _auth._MAGIC + bytes(40))
            if number % 500 == 250:
                assert one.enter() < 2.0
            if len(idle) > 200:
                idle.pop(0).close()
        assert one.enter() < 2.0
        assert len(one.acceptor._half_open) <= 16
        assert one.acceptor.refused["crowded"] > 100
    finally:
        for client in idle:
            client.close()


def test_a_slow_hello_ends_at_its_deadline_however_busy_it_is(door):
    one = door(hello_s=0.25)
    client, ended_s = one.client(), None
    began_s = time.monotonic()
    with contextlib.suppress(OSError):
        for byte in _auth.Connecting(KEY).hello:
            client.send(bytes([byte]))
            client.settimeout(0.01)
            try:
                if client.recv(1) == b"":
                    break
            except TimeoutError:
                pass
    ended_s = time.monotonic() - began_s
    assert 0.2 < ended_s < 2.0
    one.wait_refused("late", 1)


def test_one_that_sends_too_much_or_goes_away_is_nobodys_trouble(door):
    one = door()
    flood, gone = one.client(), one.client()
    gone.sendall(_auth._MAGIC)
    gone.close()
    with contextlib.suppress(OSError):
        flood.sendall(b"y" * 1_000_000)
    one.wait_refused("gone", 1)
    one.wait_refused("refused", 1)
    one.enter()


def test_what_ready_raises_closes_that_connection_alone(door, monkeypatch):
    one = door()
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(str(args.exc_value)))
    monkeypatch.setattr(one.acceptor, "_ready", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    client = one.client()
    _auth.prove(client, KEY, deadline_s=soon())
    assert client.recv(1) == b""
    until = time.monotonic() + 10
    while not seen and time.monotonic() < until:    # the thread tells it after it has closed the connection
        time.sleep(0.001)
    assert seen == ["a bug"]
    monkeypatch.setattr(one.acceptor, "_ready", lambda *item: one.came.put(item))
    one.enter()


def test_without_descriptors_it_waits_and_goes_on(door, monkeypatch):
    """EMFILE: the listener would be found ready again at once, so it is left alone for a while."""
    one, accept, failures = door(), socket.socket.accept, [1, 2, 3]

    def fail(listener):
        if failures:
            failures.pop()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", fail)
    assert 3 * _acceptor._PAUSE_S < one.enter() < 2.0
    assert not failures


def test_a_forked_child_answers_nobody_and_leaves_the_path(door, tmp_path):
    one = door(url=f"unix:{tmp_path / 'socket'}")
    half = one.client()
    half.sendall(_auth._MAGIC)
    pid = os.fork()
    if pid == 0:
        closed = one.acceptor._closed and one.acceptor._listener.fileno() == -1
        one.acceptor.close()
        os._exit(0 if closed and (tmp_path / "socket").exists() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    one.enter()
    half.close()
    one.wait_refused("gone", 1)                    # the child holds no copy of it


def test_a_frame_of_garbage_after_the_hello_is_refused_by_its_length():
    from uffd.migrate import _frames

    a, b = socket.socketpair()
    with a, b:
        for nbytes in (0, 1, _frames.FRAME_BYTES + 1, 0xFFFFFFFF):
            a.sendall(struct.pack("!I", nbytes))
            with pytest.raises(uffd.MigrationError, match="the most"):
                _frames.Frames(b).receive("layout", deadline_s=soon())
