"""providers.Redis as the one writer's: what is durable, who may write, how it ends, servers that stop or cut lines, and
regions over it. Method: as in test_redis.py."""

import errno
import json
import os
import pickle
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support import redisserver
from support.redisblocks import SMALL, failing, key_of, read, skip_without_redis, some_bytes, uffd_command

import uffd
from uffd import testing

skip_without_redis()

from uffd.providers.redis import Redis  # noqa: E402

pytest_plugins = ("support.redisblocks",)
BLOCK = 65536


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
