"""providers.Redis against real servers: the last acknowledged bytes, or an error that names the block; never zeros that
nobody wrote, never old bytes, never a hang.

Method: the provider's own methods, called in this process, and the test's own hand on the server's keys: deleted, put
back as they were, spoiled. What needs a second process has one.
"""

import contextlib
import errno
import io
import json
import os
import pickle
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support import redisserver
from support.pattern import seeded

import uffd
from uffd import testing

redis = pytest.importorskip("redis", reason="providers.Redis needs redis-py")
pytest.importorskip("xxhash", reason="providers.Redis needs xxhash")
if redisserver.why_not():
    pytest.skip(redisserver.why_not(), allow_module_level=True)

from uffd.providers.redis import Redis  # noqa: E402

BLOCK = 65536
SMALL = 512                                      # a block size: many blocks, short messages


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    with redisserver.Server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared_server):
    """Empty, and as it was at the beginning."""
    shared_server.do("FLUSHALL")
    return shared_server


@pytest.fixture
def own_server(tmp_path):
    """own_server(**options): one that the test may stop, restart and configure."""
    made = []

    def start(**options):
        made.append(redisserver.Server(tmp_path, **options))
        return made[-1].start()
    yield start
    for one in made:
        one.kill()


@pytest.fixture
def opened():
    """opened(url, namespace, **options): a provider, open; closed at the end."""
    made = []

    def build(url, namespace="space", **options):
        options = {"block_bytes": SMALL, "timeout_s": 3.0, "lease_s": 2.0, **options}
        provider = Redis(url, namespace, **options)
        provider.open()
        made.append(provider)
        return provider
    yield build
    for provider in made:
        try:
            provider.close()
        except OSError:                          # its server is gone
            pass


def some_bytes(count, seed=1):
    return np.random.default_rng(seed).integers(1, 256, count, dtype=np.uint8)


def read(provider, offset, count):
    out = np.full(count, 0xAA, np.uint8)
    assert provider.read(offset, out) is None
    return out


def failing(number, call, *arguments):
    """The OSError that call(*arguments) raises, which has this errno."""
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == number, caught.value
    return str(caught.value)


def key_of(provider, block):
    return provider._space.keys.block(block)


def group_keys(provider, block):
    """The keys that fail over together with the block's."""
    return [provider._space.keys.index(0)[:-len("index")].replace("/0}", f"/{block // 16 % 256}}}") + rest
            for rest in ("index", str(block))]


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


# ---- durability


def test_wait_without_a_replica(server, opened):
    provider = opened(server.url, durable="wait", timeout_s=1.0)
    provider.flush()                             # nothing was written
    provider.write(0, some_bytes(SMALL))
    for _ in range(2):
        assert "0 of 1 replicas" in failing(errno.ETIMEDOUT, provider.flush)


def test_wait_for_a_replica(own_server, opened):
    master = own_server(repl_diskless_sync_delay=0)
    replica = own_server(replicaof=f"127.0.0.1 {master.port}")
    provider = opened(master.url, durable="wait")
    redisserver.wait_until(lambda: replica.do("INFO", "replication")["master_link_status"] == "up", "no replication")
    provider.write(0, some_bytes(40 * SMALL))
    provider.flush()
    assert all(replica.do("GET", key_of(provider, block)) == master.do("GET", key_of(provider, block))
               for block in range(40))
    replica.signal(signal.SIGSTOP)
    provider.write(0, some_bytes(SMALL, 2))
    failing(errno.ETIMEDOUT, provider.flush)
    replica.signal(signal.SIGCONT)
    provider.flush()
    provider.write(0, some_bytes(SMALL, 3))
    provider.flush()
    master.kill()
    assert replica.do("GET", key_of(provider, 0)).endswith(some_bytes(SMALL, 3).tobytes())


def test_aof_where_it_can_not_be(own_server):
    server = own_server()
    text = failing(errno.EOPNOTSUPP, lambda: Redis(server.url, "space", durable="aof"))
    if redisserver.version() < (7, 2):
        assert "7.2" in text and server.do("INFO", "server")["redis_version"] in text
    else:
        assert "appendonly" in text


def test_aof(own_server, opened):
    if redisserver.version() < (7, 2):
        pytest.skip("WAITAOF came with Redis 7.2")
    server = own_server(appendonly="yes", appendfsync="everysec")
    provider = opened(server.url, durable="aof")
    provider.write(0, some_bytes(SMALL))
    provider.flush()
    server.restart()
    assert np.array_equal(read(provider, 0, SMALL), some_bytes(SMALL))


# ---- one writer


def test_two_writers_that_live(server, opened):
    first, second = opened(server.url), opened(server.url)
    assert not read(second, 5000 * SMALL, SMALL).any()       # who reads needs no lease
    first.write(0, some_bytes(SMALL))
    start_s = time.monotonic()
    text = failing(errno.EBUSY, second.write, 0, some_bytes(SMALL, 2))
    assert "writes to it" in text and f":{os.getpid()}:" in text
    assert time.monotonic() - start_s < 3
    assert np.array_equal(read(second, 0, SMALL), some_bytes(SMALL))
    first.write(SMALL, some_bytes(SMALL))
    first.flush()


def test_the_next_writer_need_not_wait_for_one_that_closed(server, opened):
    first = opened(server.url, lease_s=60)
    first.write(0, some_bytes(SMALL))
    first.close()
    second = opened(server.url)
    second.write(0, some_bytes(SMALL, 2))
    assert np.array_equal(read(second, 0, SMALL), some_bytes(SMALL, 2))


def test_what_was_read_before_another_wrote_is_not_written_back(server, opened):
    first, second, third = opened(server.url), opened(server.url), opened(server.url)
    read(second, 0, SMALL)
    read(third, 5000 * SMALL, SMALL)             # of another group
    first.write(0, some_bytes(SMALL))
    first.close()
    for _ in range(2):
        assert "out of date" in failing(errno.EBUSY, second.write, 0, some_bytes(SMALL, 2))
    second.close()
    third.write(SMALL, some_bytes(SMALL, 3))
    assert np.array_equal(read(third, 0, SMALL), some_bytes(SMALL))


WRITER = """
import sys, numpy as np
from uffd.providers.redis import Redis
provider = Redis(sys.argv[1], "space", block_bytes=512, lease_s=0.5, timeout_s=5, delete=True)
provider.open()
provider.write(0, np.full(2048, 1, np.uint8))
provider.flush()
print("wrote", flush=True)
for line in sys.stdin:
    try:
        if line == "write\\n":
            provider.write(0, np.full(512, 1, np.uint8))
        elif line == "close\\n":
            provider.close()
        else:
            provider.flush()
        print("done", flush=True)
    except OSError as error:
        print(error.errno, error, flush=True)
"""


@pytest.fixture
def writer(server):
    """A process that has written, and does what it is told: tell(word) gives the line that it answers."""
    process = subprocess.Popen([sys.executable, "-P", "-c", WRITER, server.url], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, bufsize=1)

    def tell(word=None):
        if word:
            process.stdin.write(word + "\n")
        assert select.select([process.stdout], [], [], 30)[0], "the writer says nothing"
        return process.stdout.readline()
    tell.process = process
    assert tell() == "wrote\n"
    yield tell
    process.kill()
    process.wait(20)
    process.stdin.close()
    process.stdout.close()


@pytest.mark.parametrize("first_word", ["write", "flush"])
def test_a_writer_that_was_stopped_for_longer_than_its_lease(server, opened, writer, first_word):
    writer.process.send_signal(signal.SIGSTOP)
    second = opened(server.url)
    second.write(0, some_bytes(SMALL))           # waits for the lease to run out
    second.flush()
    if first_word == "flush":                    # also when the second one is gone
        second.close()
        second = opened(server.url)
    writer.process.send_signal(signal.SIGCONT)
    for word in (first_word, "write", "flush"):
        answer = writer(word)
        assert answer.startswith(f"{errno.EBUSY} ") and "lease" in answer
    assert writer("close") == "done\n"           # and deletes nothing, for it is not its own any more
    assert np.array_equal(read(second, 0, SMALL), some_bytes(SMALL))
    assert np.array_equal(read(second, SMALL, SMALL), np.full(SMALL, 1))
    second.write(SMALL, some_bytes(SMALL, 2))
    second.flush()


def test_a_writer_that_was_stopped_and_met_nobody_goes_on(server, writer):
    writer.process.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    assert server.do("EXISTS", "uffd:{space}:lease") == 0
    writer.process.send_signal(signal.SIGCONT)
    assert writer("write") == "done\n"
    assert writer("flush") == "done\n"


def again(provider):
    """The session's host, started again: nothing is left of what it knew."""
    made = pickle.loads(pickle.dumps(provider))
    made.open()
    return made


def test_a_host_that_was_started_again_goes_on(server, opened):
    provider = opened(server.url)
    read(provider, 0, SMALL)
    provider.write(0, some_bytes(SMALL))
    restarted = again(provider)
    read(restarted, 0, SMALL)
    restarted.flush()
    restarted.write(0, some_bytes(SMALL, 2))
    restarted.flush()
    restarted.close()
    assert np.array_equal(read(provider, 0, SMALL), some_bytes(SMALL, 2))


def test_a_host_that_was_started_again_flushes_what_the_one_before_wrote(server, opened):
    provider = opened(server.url, durable="wait", timeout_s=1.0)
    again(provider).close()
    provider.write(0, some_bytes(SMALL))
    restarted = again(provider)
    assert "0 of 1 replicas" in failing(errno.ETIMEDOUT, restarted.flush)
    restarted.close()


def test_a_host_that_was_started_again_has_lost_the_lease_too(server, opened):
    """It was stopped, another session wrote and is gone, and then its host dies: nothing tells the new one but the
    server."""
    first = opened(server.url)
    first.write(0, some_bytes(SMALL))
    server.do("DEL", first._space.keys.lease)
    second = opened(server.url)
    second.write(0, some_bytes(SMALL, 2))
    second.close()
    for call in (lambda one: one.write(0, some_bytes(SMALL)), lambda one: one.flush()):
        restarted = again(first)
        failing(errno.EBUSY, call, restarted)
        restarted.close()
    assert np.array_equal(read(first, 0, SMALL), some_bytes(SMALL, 2))


def test_a_writer_that_died_is_waited_for(server, opened, writer):
    writer.process.kill()
    second = opened(server.url)
    second.write(0, some_bytes(SMALL))
    assert np.array_equal(read(second, 0, SMALL), some_bytes(SMALL))


def test_a_fence_holds_without_any_lease(server, opened):
    """The lease's key may be lost (a failover, an eviction): two may then think that they have it, and the later one
    wins on every block."""
    first, second = opened(server.url), opened(server.url)
    first.write(0, some_bytes(SMALL))
    server.do("DEL", first._space.keys.lease)
    second.write(SMALL, some_bytes(SMALL, 2))
    failing(errno.EBUSY, first.write, 2 * SMALL, some_bytes(SMALL))
    failing(errno.EBUSY, first.flush)
    second.write(0, some_bytes(SMALL, 3))
    assert np.array_equal(read(second, 0, SMALL), some_bytes(SMALL, 3))


# ---- the end


@pytest.mark.parametrize("is_written", [False, True])
def test_delete_by_its_maker_and_its_writer(server, opened, is_written):
    provider = opened(server.url, delete=True)
    if is_written:
        provider.write(0, some_bytes(5000 * SMALL))
    provider.close()
    assert server.do("DBSIZE") == 0


def test_delete_is_not_for_everybody(server, opened):
    maker, other = opened(server.url, delete=True), opened(server.url, delete=True)
    other.close()                                # did not make it, did not write
    assert not read(maker, 0, SMALL).any()
    writer = opened(server.url)
    writer.write(0, some_bytes(SMALL))
    maker.close()                                # somebody else wrote
    assert np.array_equal(read(writer, 0, SMALL), some_bytes(SMALL))


def test_without_delete_it_stays(server, opened):
    provider = opened(server.url)
    provider.write(0, some_bytes(SMALL))
    provider.close()
    assert np.array_equal(read(opened(server.url, create=False), 0, SMALL), some_bytes(SMALL))


def uffd_command(*words):
    """What the command `uffd` does, here: returncode, stdout, stderr."""
    from uffd.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(list(words))
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())


def test_store_ls_and_rm(server, opened):
    first = opened(server.url, "first", nbytes=100 * SMALL)
    opened(server.url, "first.2")
    server.do("SET", "uffd:{x}:y", "not ours")
    first.write(0, some_bytes(30 * SMALL))
    rows = json.loads(uffd_command("store", "ls", "--json", server.url).stdout)
    assert [(row["namespace"], row["nbytes"], row["block_bytes"], row["blocks_written"]) for row in rows] == [
        ("first", 100 * SMALL, SMALL, 30), ("first.2", None, SMALL, 0)]
    assert f":{os.getpid()}:" in rows[0]["writer"] and rows[1]["writer"] is None
    shown = uffd_command("store", "ls", server.url).stdout
    assert re.search(r"^first: ready, 51,200 bytes, 30 blocks of 512 bytes written, written by ", shown, re.MULTILINE)
    refused = uffd_command("store", "rm", server.url, "first")
    assert refused.returncode == 1 and "writes to it" in refused.stderr
    assert uffd_command("store", "rm", "--force", server.url, "first").returncode == 0
    assert [row["namespace"] for row in json.loads(uffd_command("store", "ls", "--json", server.url).stdout)] == [
        "first.2"]
    assert not server.do("KEYS", "uffd:{first[}/]*")
    failing(errno.ENODATA, first.write, 0, some_bytes(SMALL))
    gone = uffd_command("store", "rm", server.url, "first")
    assert gone.returncode == 1 and "not there" in gone.stderr


# ---- time and lines


def test_a_server_that_is_stopped(own_server, opened):
    server = own_server()
    provider = opened(server.url, timeout_s=1.0)
    provider.write(0, some_bytes(SMALL))
    server.signal(signal.SIGSTOP)
    for call in (lambda: read(provider, 0, SMALL), lambda: provider.write(0, some_bytes(SMALL, 2)), provider.flush,
                 lambda: Redis(server.url, "space", timeout_s=1.0)):
        start_s = time.monotonic()
        assert "no answer" in failing(errno.ETIMEDOUT, call)
        assert time.monotonic() - start_s < 5
    server.signal(signal.SIGCONT)
    provider.write(SMALL, some_bytes(SMALL, 3))
    assert np.array_equal(read(provider, SMALL, SMALL), some_bytes(SMALL, 3))
    provider.flush()


def test_connections_that_the_server_closed(server, opened):
    provider = opened(server.url)
    provider.write(0, some_bytes(SMALL))
    server.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    provider.write(SMALL, some_bytes(SMALL))
    server.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert np.array_equal(read(provider, 0, SMALL), some_bytes(SMALL))


def test_a_connection_cut_at_each_byte(server, opened):
    """Of a write's messages either way: it is sent again, and counts once."""
    with redisserver.Proxy(server.port) as proxy:
        provider = opened(proxy.url, timeout_s=5.0)
        provider.write(0, some_bytes(SMALL))
        cuts = [(up, None) for up in range(1, 3500, 151)] + [(None, down) for down in range(1, 60)]
        for number, (up, down) in enumerate(cuts):
            provider._live.server._single.connection_pool.disconnect()
            before = server.do("GETRANGE", provider._space.keys.index(0), 8, 15)
            proxy.upto(up, down)
            data = some_bytes(SMALL, number)
            provider.write(0, data)
            after = server.do("GETRANGE", provider._space.keys.index(0), 8, 15)
            assert int.from_bytes(after, "little") == int.from_bytes(before, "little") + 1, (up, down)
            assert np.array_equal(read(provider, 0, SMALL), data), (up, down)
        assert proxy.connections > len(cuts)
        provider.close()


def test_a_read_cut_at_each_byte(server, opened):
    """Of two blocks, one of them never written, into buffers that held something else."""
    data = some_bytes(SMALL)
    with redisserver.Proxy(server.port) as proxy:
        provider = opened(proxy.url, timeout_s=5.0)
        provider.write(SMALL, data)
        for down in [*range(1, 130), *range(130, 800, 37)]:
            provider._live.server._single.connection_pool.disconnect()
            proxy.upto(None, down)
            assert np.array_equal(read(provider, 0, 2 * SMALL), np.concatenate([np.zeros(SMALL, np.uint8), data])), down
        provider.close()


def test_both_ways_of_a_read_are_taken(server, opened, monkeypatch):
    """Whole blocks come straight from the socket; parts, and what went wrong there, by redis-py."""
    provider, others = opened(server.url), []
    provider.write(0, some_bytes(20 * SMALL))
    straight = provider._read_straight

    def noting(live, runs):
        left = straight(live, runs)
        others.extend(left)
        return left
    monkeypatch.setattr(provider, "_read_straight", noting)
    assert np.array_equal(read(provider, 0, 20 * SMALL), some_bytes(20 * SMALL))
    assert others == []
    assert np.array_equal(read(provider, 5, 20), some_bytes(20 * SMALL)[5:25])
    assert len(others) == 1
    provider.write(20 * SMALL, some_bytes(7))                # a short value: zeros behind it
    assert np.array_equal(read(provider, 20 * SMALL, SMALL), np.append(some_bytes(7), np.zeros(SMALL - 7, np.uint8)))
    assert len(others) == 1


def test_answers_that_come_twice(server, opened):
    """What is left of them on the connection is no answer to anything else."""
    with redisserver.Proxy(server.port) as proxy:
        provider = opened(proxy.url)
        provider.write(0, some_bytes(SMALL))
        for number in range(40):
            proxy.twice = "late" if number < 20 else True
            if number % 2:
                assert not read(provider, 7 * 16 * SMALL, SMALL).any()       # of another group, never written
            provider.write(0, some_bytes(SMALL, number))
            assert np.array_equal(read(provider, 0, SMALL), some_bytes(SMALL, number))
        provider.close()


# ---- regions


def test_a_region_over_it(server, opened, engine):
    data = some_bytes(64 * BLOCK)
    with_data = opened(server.url, nbytes=96 * BLOCK, block_bytes=BLOCK)
    with_data.write(0, data)
    array = uffd.from_provider(Redis(server.url, "space"), 96 * BLOCK, "u1", engine=engine)
    uffd.prefetch(array, np.s_[:40 * BLOCK]).wait(30)
    assert np.array_equal(array[:64 * BLOCK], data)
    assert not array[64 * BLOCK:].any()
    del array


def test_a_lost_block_is_an_error_of_its_region(server, opened, engine):
    provider = opened(server.url, nbytes=4 * BLOCK, block_bytes=BLOCK)
    provider.write(0, some_bytes(4 * BLOCK))
    server.do("DEL", key_of(provider, 2))
    with uffd.Region(None, Redis(server.url, "space"), engine=engine, retries=0) as region:
        with pytest.raises(uffd.ProviderError, match="block 2 ") as caught:
            region.populate()
        assert caught.value.errno == errno.ENODATA and caught.value.offset == 2 * BLOCK


def test_it_keeps_the_rules_of_providers(server):
    testing.check_provider(Redis(server.url, "space", nbytes=10 * BLOCK + 100))


@pytest.mark.skipif(not hasattr(uffd.Region, "flush"), reason="this version has no regions that are written back")
def test_what_a_region_wrote_is_there_for_the_next(server, engine):
    data = some_bytes(40 * BLOCK + 100)
    with uffd.Region(len(data), Redis(server.url, "space", nbytes=len(data)), engine=engine, mode="r+") as region:
        region.array()[:] = data
        region.flush()
        again = uffd.from_provider(Redis(server.url, "space", create=False), len(data), "u1", engine=engine, mode="r")
        assert np.array_equal(again, data)
        region.array()[5 * BLOCK] ^= 1
        del again
    data[5 * BLOCK] ^= 1
    again = uffd.from_provider(Redis(server.url, "space", create=False), len(data), "u1", engine=engine, mode="r")
    assert np.array_equal(again, data)
    del again
