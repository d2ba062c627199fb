"""providers.Redis over a Redis Cluster: three masters with a replica each, on loopback, and what happens to shards.

Method: as in test_redis.py; one cluster serves the module, and tests that kill a node have one of their own.
"""

import errno
import itertools
import signal
import threading
import time

import numpy as np
import pytest
from support import redisserver
from support.redisblocks import SMALL, opening, read, skip_without_redis, some_bytes

import uffd

skip_without_redis()

from uffd.providers.redis import Redis  # noqa: E402
from uffd.providers.redis_layout import GROUPS, Keys, group_of  # noqa: E402

BLOCK = 65536
FAILOVER_S = 25.0                                # of the cluster: 1.5 s until a master is missed, and an election


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory):
    with redisserver.Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster):
    """Empty and whole."""
    redisserver.wait_until(shared_cluster.is_whole, "the cluster does not recover", 40)
    for server in shared_cluster.masters():
        server.do("FLUSHALL")
    return shared_cluster


@pytest.fixture
def own_cluster(tmp_path):
    """One whose nodes may be killed."""
    with redisserver.Cluster(tmp_path) as made:
        yield made


@pytest.fixture
def opened():
    with opening(timeout_s=FAILOVER_S) as build:
        yield build


def master_of(cluster, key):
    """The server that has the key now."""
    asked = cluster.masters()[0]
    slot = asked.do("CLUSTER", "KEYSLOT", key)
    (port,) = [master[1] for first, last, master, *_ in asked.do("CLUSTER", "SLOTS") if first <= slot <= last]
    return next(server for server in cluster.servers if server.port == port)


def test_all_shards_are_one_pool(cluster, opened):
    provider, data = opened(cluster.url), some_bytes(4000 * SMALL)
    provider.write(100, data)
    provider.flush()
    assert np.array_equal(read(provider, 100, len(data)), data)
    assert not read(provider, 4100 * SMALL, SMALL).any()
    counts = [server.do("DBSIZE") for server in cluster.masters()]
    assert len(counts) == 3 and min(counts) > sum(counts) / 5
    assert np.array_equal(read(opened(cluster.servers[4].url), 100, len(data)), data)    # a replica's address will do


def test_both_ledgers_are_on_shards_of_their_own(cluster):
    for name in ("a", "space", "x" * 50):
        first, second = Keys(name).ledgers
        assert master_of(cluster, first) is not master_of(cluster, second)


def test_wait_is_asked_of_each_shard(cluster, opened):
    provider, data = opened(cluster.url, durable="wait", timeout_s=4.0), some_bytes(400 * SMALL)
    provider.write(0, data)
    provider.flush()
    replicas = [server for server in cluster.servers if server not in cluster.masters()]
    provider.write(0, data)
    replicas[1].signal(signal.SIGSTOP)
    try:
        with pytest.raises(OSError, match="0 of 1 replicas") as caught:
            provider.flush()
        assert caught.value.errno == errno.ETIMEDOUT
    finally:
        replicas[1].signal(signal.SIGCONT)
    redisserver.wait_until(cluster.is_whole, "the replica does not come back", 40)
    provider.flush()


def test_a_shard_that_went_back_is_found_by_who_never_saw_it(cluster, opened):
    """The ledgers, on other shards, know of writes that this shard has forgotten."""
    provider = opened(cluster.url)
    provider.write(0, some_bytes(SMALL, 1))
    index, block = Keys("space").index(0), Keys("space").block(0)
    server = master_of(cluster, index)
    old = {key: server.do("GET", key) for key in (index, block)}
    provider.write(0, some_bytes(SMALL, 2))
    provider.close()
    assert Redis(cluster.url, "space").nbytes is None
    for key, value in old.items():
        server.do("SET", key, value)
    with pytest.raises(OSError, match="older than the last acknowledged write") as caught:
        Redis(cluster.url, "space")
    assert caught.value.errno == errno.ESTALE


def test_a_shard_that_started_again_empty(cluster, opened):
    """Before its replica takes over: it is master still, of nothing."""
    provider = opened(cluster.url)
    provider.write(0, some_bytes(4000 * SMALL))
    server = master_of(cluster, Keys("space").index(0))
    server.do("FLUSHALL")
    for offset in (0, GROUPS * 16 * 100 * SMALL):            # written, and never written
        with pytest.raises(OSError, match="its group of blocks is gone") as caught:
            read(provider, offset, SMALL)
        assert caught.value.errno == errno.ENODATA
    with pytest.raises(OSError, match="groups of blocks are lost|older namespace|is not there"):
        Redis(cluster.url, "space", create=False)
    others = (block for block in range(0, 4000, 16) if master_of_group(cluster, block) is not server)
    for block in itertools.islice(others, 3):    # the other shards still serve
        assert np.array_equal(read(provider, block * SMALL, SMALL), some_bytes(4000 * SMALL)[block * SMALL:][:SMALL])


def master_of_group(cluster, block):
    return master_of(cluster, Keys("space").index(group_of(block)))


class Load:
    """Threads that read and write all the time. Each read is right, or raises; each block has one writer."""

    THREADS = 4
    BLOCKS = 64                                  # of each thread

    def __init__(self, provider):
        self.provider, self.stop = provider, threading.Event()
        self.wrong, self.errors, self.longest_s = [], [], 0.0
        self.acknowledged = {}                   # block: seed
        self.maybe = {}                          # block: seeds of writes that failed: done or not
        self.rounds = [0] * self.THREADS
        self.threads = [threading.Thread(target=self.work, args=(number,)) for number in range(self.THREADS)]

    def work(self, number):
        rng, seed = np.random.default_rng(number), number
        while not self.stop.is_set():
            block = int(rng.integers(self.BLOCKS)) * self.THREADS + number
            start_s = time.monotonic()
            try:
                if rng.integers(2):
                    seed += self.THREADS
                    self.maybe.setdefault(block, set()).add(seed)
                    self.provider.write(block * SMALL, some_bytes(SMALL, seed))
                    self.acknowledged[block], self.maybe[block] = seed, set()
                else:
                    self.check(block)
            except OSError as error:
                self.errors.append(error)
            except BaseException as error:
                self.wrong.append(error)
                return
            self.longest_s = max(self.longest_s, time.monotonic() - start_s)
            self.rounds[number] += 1

    def check(self, block):
        got = read(self.provider, block * SMALL, SMALL)
        seeds = {self.acknowledged.get(block), *self.maybe.get(block, ())}
        if not any(np.array_equal(got, some_bytes(SMALL, seed) if seed is not None else np.zeros(SMALL))
                   for seed in seeds):
            self.wrong.append((block, seeds, got[:8].tolist()))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(2 * FAILOVER_S)


@pytest.mark.deadline(180)
def test_a_master_killed_under_load(own_cluster, opened):
    """Errors or right bytes, in bounded time, never zeros. After the failover all of it works again, but for blocks
    whose last writes the replica did not have: those are errors, and none of them was flushed."""
    provider = opened(own_cluster.url, durable="wait")
    with Load(provider) as load:
        redisserver.wait_until(lambda: min(load.rounds) > 20, "no load")
        master_of(own_cluster, Keys("space").index(0)).kill()
        time.sleep(3.0)
        redisserver.wait_until(lambda: len(own_cluster.masters()) == 3, "no failover", FAILOVER_S)
        before = list(load.rounds)
        redisserver.wait_until(lambda: min(now - then for now, then in zip(load.rounds, before)) > 20,
                               "nothing works after the failover", 2 * FAILOVER_S)
    assert load.wrong == []
    assert load.longest_s < FAILOVER_S + 10
    # ENODATA: the replica had not even heard of a group of blocks that was made a moment before
    assert {error.errno for error in load.errors} <= {errno.ESTALE, errno.ENODATA, errno.ETIMEDOUT, errno.EHOSTDOWN,
                                                      errno.ECONNREFUSED, errno.ECONNRESET}, load.errors
    behind = 0
    for block in load.acknowledged:
        try:
            load.check(block)
        except OSError as error:
            assert error.errno in (errno.ESTALE, errno.ENODATA)
            behind += 1
    assert load.wrong == []
    assert behind < len(load.acknowledged)
    for thread in load.threads:
        assert not thread.is_alive()


@pytest.mark.deadline(180)
def test_what_was_flushed_survives_a_master(own_cluster, opened):
    """durable="wait": each shard's replica has it when flush returns."""
    provider, data = opened(own_cluster.url, durable="wait"), some_bytes(2000 * SMALL)
    provider.write(0, data)
    provider.flush()
    master_of(own_cluster, Keys("space").index(0)).kill()
    start_s = time.monotonic()
    assert np.array_equal(read(provider, 0, len(data)), data)
    assert time.monotonic() - start_s < FAILOVER_S + 10
    provider.write(0, some_bytes(2000 * SMALL, 2))
    assert np.array_equal(read(opened(own_cluster.masters()[0].url), 0, len(data)), some_bytes(2000 * SMALL, 2))


@pytest.mark.deadline(120)
def test_a_flush_waits_for_the_namespace_itself(own_cluster, opened):
    """Goal: what a namespace is made of is on each shard's replica, too, when the first flush returns: else a failover
    of a shard that has none of the blocks would take the namespace away. Method: one block is written, and a replica
    of another shard stands still."""
    provider = opened(own_cluster.url, durable="wait", timeout_s=4.0)
    provider.write(0, some_bytes(SMALL))
    ours = master_of(own_cluster, Keys("space").index(group_of(0)))
    other = next(server for server in own_cluster.masters() if server is not ours)
    port = int(other.do("INFO", "replication")["slave0"]["port"])
    replica = next(server for server in own_cluster.servers if server.port == port)
    replica.signal(signal.SIGSTOP)
    with pytest.raises(OSError, match="0 of 1 replicas") as caught:
        provider.flush()
    assert caught.value.errno == errno.ETIMEDOUT and str(other.port) in str(caught.value)
    replica.signal(signal.SIGCONT)
    redisserver.wait_until(lambda: flushes(provider), "no flush once it goes on", 40)
    replica.signal(signal.SIGSTOP)
    provider.write(0, some_bytes(SMALL, 2))
    provider.flush()                             # from then on, only what was written
    replica.signal(signal.SIGCONT)


def flushes(provider):
    try:
        provider.flush()
    except OSError:
        return False
    return True


def test_a_slot_that_moves(cluster, opened):
    """MOVED is followed; while a slot is on its way, commands of several of its keys wait (TRYAGAIN)."""
    provider, data = opened(cluster.url), some_bytes(16 * SMALL)
    provider.write(0, data)
    index = Keys("space").index(0)
    source = master_of(cluster, index)
    target = next(server for server in cluster.masters() if server is not source)
    slot = source.do("CLUSTER", "KEYSLOT", index)
    source_id, target_id = (server.do("CLUSTER", "MYID") for server in (source, target))

    def move(source, source_id, target, target_id):
        target.do("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source.do("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        keys = source.do("CLUSTER", "GETKEYSINSLOT", slot, 1000)
        half = len(keys) // 2
        source.do("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys[:half])
        timer = threading.Timer(0.5, finish, [source, target, target_id, keys[half:]])
        timer.start()
        assert np.array_equal(read(provider, 0, len(data)), data)
        provider.write(0, data)
        timer.join(20)

    def finish(source, target, target_id, keys):
        source.do("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "REPLACE", "KEYS", *keys)
        for server in (target, source, *cluster.masters()):
            server.do("CLUSTER", "SETSLOT", slot, "NODE", target_id)
    move(source, source_id, target, target_id)
    assert master_of(cluster, index) is target
    assert np.array_equal(read(provider, 0, len(data)), data)
    move(target, target_id, source, source_id)


def test_a_region_over_a_cluster(cluster, opened, engine):
    data = some_bytes(100 * BLOCK)
    opened(cluster.url, nbytes=len(data), block_bytes=BLOCK).write(0, data)
    array = uffd.from_provider(Redis(cluster.url, "space"), len(data), "u1", engine=engine)
    uffd.prefetch(array).wait(60)
    assert np.array_equal(array, data)
    del array
