"""providers.Redis against real servers: the last acknowledged bytes, or an error that names the block; never zeros that
nobody wrote, never old bytes, never a hang.

Method: the provider's own methods, called in this process, and the test's own hand on the server's keys: deleted, put
back as they were, spoiled. What needs a second process has one.
"""

import errno
import pickle
import shutil
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
from support import redisserver
from support.pattern import seeded
from support.redisblocks import SMALL, failing, group_keys, key_of, read, skip_without_redis, some_bytes, uffd_command

import uffd

skip_without_redis()

from uffd.providers.redis import Redis  # noqa: E402
from uffd.providers.redis_wire import Answers, Unexpected  # noqa: E402

pytest_plugins = ("support.redisblocks",)
BLOCK = 65536


# ---- right bytes


def test_what_was_written_is_read(server, opened):
    provider = opened(server.url, nbytes=100 * SMALL, block_bytes=SMALL)
    data = some_bytes(40 * SMALL)
    provider.write(3 * SMALL, data)
    assert np.array_equal(read(provider, 3 * SMALL, len(data)), data)
    assert not read(provider, 0, 3 * SMALL).any()
    assert not read(provider, 43 * SMALL, 57 * SMALL).any()


def test_a_model_of_bytes(server, opened):
    """Any ranges, written and read by one call or several, against a plain array; then by a session that is new."""
    rng = seeded("redis-model")
    nbytes = 300 * SMALL + 77
    provider, model = opened(server.url, nbytes=nbytes), np.zeros(nbytes, np.uint8)

    def some_range():
        start = rng.randrange(nbytes)
        return start, min(start + rng.randrange(1, 40 * SMALL), nbytes)
    for step in range(120):
        ranges = [some_range() for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.5:
            pieces = [(start, some_bytes(stop - start, step)) for start, stop in ranges]
            provider.write_many(pieces)
            for start, data in pieces:
                model[start:start + len(data)] = data
        else:
            wanted = [(start, np.full(stop - start, 0xAA, np.uint8)) for start, stop in ranges]
            provider.read_many(wanted)
            assert all(np.array_equal(out, model[start:start + len(out)]) for start, out in wanted)
    provider.flush()
    provider.close()
    assert np.array_equal(read(opened(server.url), 0, nbytes), model)


@pytest.mark.parametrize("block_bytes", [SMALL, BLOCK, 1 << 20])
def test_pages_of_larger_blocks(server, opened, block_bytes):
    """A region's blocks may be smaller than the store's: the rest of the store's block stays."""
    provider, page = opened(server.url, nbytes=3 << 20, block_bytes=block_bytes), uffd._core.PAGE_BYTES
    first, second = some_bytes(page, 1), some_bytes(page, 2)
    provider.write(2 * page, first)
    provider.write(5 * page, second)
    expected = np.zeros(8 * page, np.uint8)
    expected[2 * page:3 * page], expected[5 * page:6 * page] = first, second
    assert np.array_equal(read(provider, 0, 8 * page), expected)


def test_the_last_block_may_be_short(server, opened):
    provider, data = opened(server.url, nbytes=2 * SMALL + 7), some_bytes(SMALL + 7)
    provider.write(SMALL, data)
    assert np.array_equal(read(provider, SMALL, SMALL + 7), data)
    assert server.do("STRLEN", key_of(provider, 2)) == 56 + 7
    failing(errno.EINVAL, provider.write, 2 * SMALL, some_bytes(8))
    failing(errno.EINVAL, provider.read, 2 * SMALL, np.zeros(8, np.uint8))


def test_more_than_one_pipeline_holds(server, opened):
    provider, data = opened(server.url, block_bytes=BLOCK), some_bytes(20 << 20)
    provider.write(0, data)
    assert np.array_equal(read(provider, 0, len(data)), data)


def test_zeros_written_over_data_are_zeros(server, opened):
    provider = opened(server.url)
    provider.write(0, some_bytes(SMALL))
    provider.write(0, np.zeros(SMALL, np.uint8))
    assert not read(provider, 0, SMALL).any()


def test_several_threads_at_once(server, opened):
    """Each has its own bytes of blocks that it shares with others, as the host's threads do."""
    provider, failed, per_thread = opened(server.url, block_bytes=4 * SMALL), [], 100

    def work(number):
        try:
            for at in range(per_thread):
                data = some_bytes(SMALL, number * per_thread + at)
                provider.write((4 * at + number) * SMALL, data)
                if not np.array_equal(read(provider, (4 * at + number) * SMALL, SMALL), data):
                    failed.append((number, at))
        except BaseException as error:
            failed.append(error)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    expected = np.concatenate([some_bytes(SMALL, number * per_thread + at)
                               for at in range(per_thread) for number in range(4)])
    assert np.array_equal(read(provider, 0, len(expected)), expected)


def test_two_hosts_of_one_session(server, opened):
    """Engine(hosts=2) has two instances of one recipe: they share the lease, and undo nothing of each other."""
    first = opened(server.url, block_bytes=4 * SMALL)
    second = pickle.loads(pickle.dumps(first))
    second.open()
    failed = []

    def work(provider, number):
        try:
            for at in range(100):
                provider.write((2 * at + number) * SMALL, some_bytes(SMALL, 2 * at + number))
        except BaseException as error:
            failed.append(error)
    threads = [threading.Thread(target=work, args=pair) for pair in ((first, 0), (second, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    second.flush()
    second.close()
    assert failed == []
    expected = np.concatenate([some_bytes(SMALL, at) for at in range(200)])
    assert np.array_equal(read(first, 0, len(expected)), expected)


# ---- what is not there, or not what it was


def test_a_written_block_that_is_missing(server, opened):
    provider = opened(server.url)
    provider.write(0, some_bytes(40 * SMALL))
    server.do("DEL", key_of(provider, 7))
    for one in (provider, opened(server.url)):
        text = failing(errno.ENODATA, read, one, 0, 40 * SMALL)
        assert "block 7 " in text and "'space'" in text and server.url in text and "uffd store rm" in text
        assert np.array_equal(read(one, 8 * SMALL, SMALL), some_bytes(40 * SMALL)[8 * SMALL:9 * SMALL])
    failing(errno.ENODATA, provider.write, 7 * SMALL, some_bytes(5))     # in part: the rest of it is lost
    provider.write(7 * SMALL, some_bytes(SMALL, 2))
    assert np.array_equal(read(provider, 7 * SMALL, SMALL), some_bytes(SMALL, 2))


def test_an_old_value_is_not_given(server, opened):
    """As a replica that was behind would."""
    provider = opened(server.url)
    provider.write(0, some_bytes(SMALL, 1))
    old = server.do("GET", key_of(provider, 0))
    provider.write(0, some_bytes(SMALL, 2))
    server.do("SET", key_of(provider, 0), old)
    for one in (provider, opened(server.url)):
        assert "block 0 " in failing(errno.ESTALE, read, one, 0, SMALL)


def test_a_group_that_went_back_as_one(server, opened):
    """A shard that failed over to a replica that was behind: blocks and index are old together. This session knows."""
    provider, reader = opened(server.url), opened(server.url)
    provider.write(0, some_bytes(SMALL, 1))
    with server.client() as client:
        old = {key: client.get(key) for key in group_keys(provider, 0)}
        provider.write(0, some_bytes(SMALL, 2))
        provider.flush()
        assert np.array_equal(read(reader, 0, SMALL), some_bytes(SMALL, 2))
        for key, value in old.items():
            client.set(key, value)
    for one in (provider, reader):
        assert "went back" in failing(errno.ESTALE, read, one, 0, SMALL)
    failing(errno.ESTALE, provider.write, SMALL, some_bytes(SMALL))     # or the loss would be hidden by it
    provider._live.wrote(0, 0)
    failing(errno.ESTALE, provider.flush)
    failing(errno.ESTALE, provider.flush)        # and it is not forgotten


@pytest.mark.parametrize("spoil, word", [
    (lambda value: value[:-1] + bytes([value[-1] ^ 1]), "checksum"), (lambda value: value[:-1], "bytes, and has"),
    (lambda value: value[:24] + bytes([value[24] ^ 1]) + value[25:], "checksum"),
    (lambda value: value[:9] + bytes([value[9] ^ 1]) + value[10:], "generation"), (lambda value: b"hello", "no block"),
    (lambda value: b"x" * 900, "no block"), (lambda value: value[:4] + b"\2" + value[5:], "format 2")])
def test_a_spoiled_value(server, opened, spoil, word):
    provider = opened(server.url)
    provider.write(0, some_bytes(SMALL))
    server.do("SET", key_of(provider, 0), spoil(server.do("GET", key_of(provider, 0))))
    assert word in failing(errno.EBADMSG, read, provider, 0, SMALL)


def test_another_blocks_value(server, opened):
    provider = opened(server.url)
    provider.write(0, some_bytes(2 * SMALL))
    server.do("SET", key_of(provider, 0), server.do("GET", key_of(provider, 1)))
    assert "says that it is block 1" in failing(errno.EBADMSG, read, provider, 0, SMALL)


def test_a_server_that_started_again_empty(own_server, opened):
    server = own_server()
    provider = opened(server.url)
    provider.write(0, some_bytes(SMALL))
    server.restart()
    for offset in (0, 5000 * SMALL):             # written, and never written: who knows now?
        assert "started again without its data" in failing(errno.ENODATA, read, provider, offset, SMALL)
    failing(errno.ENODATA, provider.write, 0, some_bytes(SMALL))
    failing(errno.ENODATA, provider.flush)
    recipe = pickle.loads(pickle.dumps(provider))            # a host that is started again
    assert "is not there any more" in failing(errno.ESTALE, recipe.open)
    failing(errno.ENOENT, lambda: Redis(server.url, "space", create=False))


def test_a_server_that_kept_its_data(own_server, opened):
    server = own_server(appendonly="yes", appendfsync="always")
    provider = opened(server.url)
    provider.write(0, some_bytes(SMALL))
    server.restart()
    assert np.array_equal(read(provider, 0, SMALL), some_bytes(SMALL))
    provider.write(SMALL, some_bytes(SMALL, 2))
    provider.flush()
    assert np.array_equal(read(opened(server.url, create=False), SMALL, SMALL), some_bytes(SMALL, 2))


def test_parts_that_are_lost_are_found_at_open(server, opened):
    provider = opened(server.url)
    recipe = pickle.loads(pickle.dumps(provider))
    server.do("DEL", provider._space.keys.index(200))
    assert "1 of its 256 groups" in failing(errno.ENODATA, recipe.open)
    failing(errno.ENODATA, lambda: Redis(server.url, "space"))
    server.do("DEL", provider._space.keys.head)
    assert "an older namespace" in failing(errno.ESTALE, lambda: Redis(server.url, "space"))


def test_a_namespace_that_was_made_anew(server, opened):
    provider = opened(server.url)
    provider.write(0, some_bytes(SMALL))
    recipe = pickle.loads(pickle.dumps(provider))
    provider.close()
    assert uffd_command("store", "rm", server.url, "space").returncode == 0
    assert not read(opened(server.url), 0, SMALL).any()
    assert "made anew" in failing(errno.ESTALE, recipe.open)


def test_a_namespace_half_made_is_completed(server, opened):
    provider = opened(server.url)
    server.do("HSET", provider._space.keys.head, "state", "making")
    server.do("DEL", *map(provider._space.keys.index, range(100, 256)))
    assert opened(server.url)._space.generation == provider._space.generation
    assert not read(provider, 0, 5000 * SMALL).any()


# ---- servers that can't do


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
def test_a_server_that_evicts_is_refused(own_server, policy):
    server = own_server(maxmemory_policy=policy, maxmemory="100mb")
    text = failing(errno.EINVAL, lambda: Redis(server.url, "space"))
    assert policy in text and "CONFIG SET maxmemory-policy" in text


def test_a_full_server_says_so(own_server, opened):
    server = own_server(maxmemory_policy="volatile-lru")
    provider = opened(server.url)
    provider.write(0, some_bytes(SMALL))
    server.do("CONFIG", "SET", "maxmemory", "1mb")
    assert "maxmemory" in failing(errno.ENOSPC, provider.write, 0, some_bytes(SMALL, 2))
    assert np.array_equal(read(provider, 0, SMALL), some_bytes(SMALL))
    server.do("CONFIG", "SET", "maxmemory", "0")
    provider.write(0, some_bytes(SMALL, 2))


def test_evicted_while_running(own_server, opened):
    """The policy was changed after open: what is evicted is an error."""
    server = own_server()
    provider = opened(server.url, block_bytes=BLOCK)
    provider.write(0, some_bytes(64 * BLOCK))
    server.do("CONFIG", "SET", "maxmemory-policy", "allkeys-random", "maxmemory", "3mb")
    failing(errno.ENODATA, read, provider, 0, 64 * BLOCK)


def test_a_replica_is_refused(own_server):
    master = own_server()
    replica = own_server(replicaof=f"127.0.0.1 {master.port}")
    assert "master's address" in failing(errno.EROFS, lambda: Redis(replica.url, "space"))


def test_sizes_that_do_not_fit(server, opened):
    provider = opened(server.url, nbytes=1000)
    assert Redis(server.url, "space").nbytes == 1000
    assert Redis(server.url, "space").block_bytes == SMALL
    with pytest.raises(ValueError, match="1000 bytes, not 1001"):
        Redis(server.url, "space", nbytes=1001)
    with pytest.raises(ValueError, match=f"blocks of {SMALL} bytes"):
        Redis(server.url, "space", block_bytes=BLOCK)
    assert provider.nbytes == 1000


@pytest.mark.parametrize("name", ["", "a/b", "a{b}", "a*", "a b", "-a", "x" * 201, "ä", None])
def test_names_that_can_not_be(name):
    with pytest.raises(ValueError, match="namespace"):
        Redis("redis://127.0.0.1:1", name)


def test_options_that_can_not_be():
    for options in ({"durable": "yes"}, {"nbytes": -1}, {"block_bytes": 1000}, {"replicas": 0}, {"lease_s": 0},
                    {"timeout_s": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Redis("redis://127.0.0.1:1", "space", **options)
    with pytest.raises(ValueError, match="redis://"):
        Redis("http://127.0.0.1", "space")


# ---- from a socket into pages


class Stream:
    """A socket as TLS has them, without a descriptor of its own to receive from."""

    def __init__(self, end):
        self.recv_into, self.gettimeout = end.recv_into, end.gettimeout


@pytest.fixture(params=["plain", "wrapped"])
def line(request):
    """(the server's end, the answers that come at the other end, that end), both ways to receive."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname(), 20)
        theirs, _ = listening.accept()
    with ours, theirs:
        yield theirs, Answers(ours if request.param == "plain" else Stream(ours)), ours


def bulk(data):
    return b"$-1\r\n" if data is None else b"$%d\r\n%s\r\n" % (len(data), data)


@pytest.mark.parametrize("sizes", [[64] * 5, [BLOCK] * 40, [BLOCK, None, 7, 0, None, BLOCK - 1, 300_000, None], []])
@pytest.mark.parametrize("step", [None, 100_003])
def test_values_from_a_socket(line, sizes, step):
    """Goal: heads and bytes as they were sent, zeros behind short ones and where there is none, whatever comes in one
    piece or does not come yet; and what follows is still there to be read."""
    theirs, answers, ours = line
    heads = [bytes(some_bytes(56, 100 + number)) for number in range(len(sizes))]
    data = [None if size is None else bytes(some_bytes(size, number)) for number, size in enumerate(sizes)]
    sent = b"".join(map(bulk, [b"before", *(one if one is None else head + one for head, one in zip(heads, data)),
                               b"behind"]))

    def send():
        for at in range(0, len(sent), step or len(sent)):
            theirs.sendall(sent[at:at + (step or len(sent))])
            time.sleep(0.005 if step else 0)
    sender = threading.Thread(target=send)
    sender.start()
    assert answers.bulk() == b"before"
    parts = [np.full(max(size or 0, 1000), 0xAA, np.uint8) for size in sizes]
    lengths, found = answers.values(parts, 56)
    assert answers.bulk() == b"behind"
    sender.join()
    assert lengths == [-1 if one is None else 56 + len(one) for one in data]
    for number, (part, one) in enumerate(zip(parts, data)):
        assert bytes(part) == (one or b"").ljust(len(part), b"\0"), number
        assert one is None or found[56 * number:56 * number + 56] == heads[number], number
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


@pytest.mark.parametrize("answer", [
    b"-LOADING not yet\r\n", b":5\r\n", b"*1\r\n", b"$\r\n", b"$-2\r\n", b"$6x\r\n", b"$" + b"9" * 400, bulk(b"short"),
    bulk(bytes(56 + 1001)), b"$60\r\n" + bytes(62), b"$60\r\n" + bytes(30), b"", b"$1056\r\n" + bytes(1056)])
def test_an_answer_that_is_none(line, answer):
    """Goal: an error, whatever comes, and for the end of the connection."""
    theirs, answers, _ = line
    theirs.sendall(bulk(bytes(57)) + answer)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises((Unexpected, OSError)):
        answers.values([np.zeros(1000, np.uint8) for _ in range(2)], 56)


def test_values_that_do_not_come(line):
    theirs, answers, ours = line
    ours.settimeout(0.2)
    late = Answers(ours if answers._fd >= 0 else Stream(ours))
    theirs.sendall(bulk(bytes(57)) + b"$1056\r\n")
    with pytest.raises(TimeoutError):
        late.values([np.zeros(1000, np.uint8) for _ in range(2)], 56)
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


# ---- addresses, users and servers


@pytest.mark.parametrize("rest, place", [
    ("me:secret@host:99999/0", "host:99999/0"), ("me:secret@host:first", "host:first"), ("me:secret/s@host", "host"),
    ("me:se@cret@[::1", "[::1"), ("me:secret@host:1?socket_timeout=secret", "host:1")])
def test_urls_that_can_not_be(rest, place):
    """Goal: the error names the URL, no part of its password, and the cure."""
    with pytest.raises(ValueError) as caught:
        Redis(f"redis://{rest}", "space", timeout_s=0.5)
    text = str(caught.value)
    assert f"'redis://{place}'" in text and "1 to 65535" in text and "secret" not in text and "cret@" not in text, text
    assert caught.value.__suppress_context__


def test_a_server_that_is_not_there_and_a_password_that_is_not_told():
    port = redisserver.free_port()
    start_s = time.monotonic()
    text = failing(errno.ECONNREFUSED, lambda: Redis(f"redis://me:secret@127.0.0.1:{port}", "space", timeout_s=0.5))
    assert time.monotonic() - start_s < 3
    assert f"127.0.0.1:{port}" in text and "secret" not in text


def test_users(own_server, opened):
    server = own_server()
    good = "redis://good:pw@" + server.url.removeprefix("redis://")
    with server.client() as client:
        from uffd.providers.redis_server import RIGHTS
        client.execute_command("ACL", "SETUSER", "good", "on", ">pw", *RIGHTS.split())
        client.execute_command("ACL", "SETUSER", "few", "on", ">pw", "~uffd:*", "+@read", "+info", "+@connection")
        client.execute_command("ACL", "SETUSER", "blind", "on", ">pw", "~other:*", "+@all")
    provider = opened(good)
    provider.write(0, some_bytes(SMALL))
    provider.flush()
    assert uffd_command("store", "ls", good).stdout.startswith("space: ready")
    for user, password in (("few", "pw"), ("blind", "pw"), ("good", "wrong")):
        url = good.replace("good:pw", f"{user}:{password}")
        text = failing(errno.EACCES, lambda url=url: Redis(url, "another"))
        assert "ACL SETUSER" in text and password not in text.replace("password", "")


def test_tls(own_server, opened, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate,
                    "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
                   check=True, capture_output=True, timeout=60)
    tls_port = redisserver.free_port()
    try:
        own_server(tls_port=tls_port, tls_cert_file=certificate, tls_key_file=key, tls_auth_clients="no",
                   tls_ca_cert_file=certificate)
    except OSError as error:
        if "tls" in str(error).lower():
            pytest.skip("this redis-server was built without TLS")
        raise
    url = f"rediss://127.0.0.1:{tls_port}"
    provider = opened(f"{url}?ssl_ca_certs={certificate}")
    provider.write(0, some_bytes(40 * SMALL))
    assert np.array_equal(read(provider, 0, 40 * SMALL), some_bytes(40 * SMALL))
    with pytest.raises(OSError, match="certificate"):
        Redis(url, "space", timeout_s=0.5)       # nobody vouches for it
