"""The table: every row's work and goal, as data. The benchmarks name rows by key; report.py prints them in this order.

`value` says what a row is judged by: the time per unit of ours and of the floor ("time": ours / floor), the rates that
follow from them ("rate": floor time / ours time, so that more is better), or a number of ours alone ("number").
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    key: str
    work: str
    unit: str                       # of `ours` and `floor`
    value: str                      # "time", "rate" or "number"
    goal: float
    at_most: bool                   # else at least
    floor: str = ""                 # what the floor does

    def judged(self, ours: float, floor: float | None) -> float:
        """The number that the goal speaks of."""
        if self.value == "number" or floor is None:
            return ours
        return ours / floor if self.value == "time" else floor / ours

    def met(self, judged: float) -> bool:
        return judged <= self.goal if self.at_most else judged >= self.goal

    def goal_text(self) -> str:
        times = "" if self.value == "number" else " x"
        return f"{'<=' if self.at_most else '>='} {self.goal:g}{times}"


ON_SAME_CPU = "C worker pinned to the faulting thread's CPU"
LIMITED = "np.memmap under the same memory cgroup"
PAGEMAP_SCAN = "one PAGEMAP_SCAN in C, into an array of runs"
PROTECT = "one UFFDIO_WRITEPROTECT in C"
BEST_PLACEMENT = "best fixed placement in C"

ROWS = (
    Row("thread-latency", "thread delivery, 4 KiB blocks, random first touch (median touch)", "us", "time", 1.3, True,
        ON_SAME_CPU),
    Row("thread-rate-1", "the same, rate with 1 touching thread", "us", "rate", 0.9, False, BEST_PLACEMENT),
    Row("thread-rate-2", "the same, rate with 2 touching threads", "us", "rate", 0.9, False, BEST_PLACEMENT),
    Row("thread-rate-8", "the same, rate with 8 touching threads", "us", "rate", 0.9, False, BEST_PLACEMENT),
    Row("inline-latency", "inline delivery, 4 KiB blocks, random first touch (median touch)", "us", "time", 1.3, True,
        "SIGBUS + COPY in C"),
    Row("memory-sum", "default settings, one thread sums a region over Memory", "s/GiB", "rate", 0.8, False,
        "bulk UFFDIO_COPY of 2 MiB pieces, no sum"),
    Row("shared-sequential", "shared backing, inline delivery, sequential", "s/GiB", "rate", 0.6, False,
        "memcpy + CONTINUE of 2 MiB pieces in C"),
    Row("file-sequential", "File, page cache warm, sequential", "s/GiB", "rate", 0.7, False,
        "readinto of a touched buffer"),
    Row("blosc2-sequential", "Blosc2File, sequential", "s/GiB", "rate", 0.9, False,
        "decompress_chunk in a loop, one thread"),
    Row("blosc2-random", "Blosc2File, 1 % of the blocks at random, share of the cost of all", "%", "number", 3.0, True),
    Row("readahead-random", "random touches: blocks filled / touched", "x", "number", 1.1, True),
    Row("readahead-stride", "stride of 3 blocks: blocks filled / touched", "x", "number", 1.2, True),
    Row("readahead-stride-ahead", "stride of 3 blocks: share filled ahead of demand", "%", "number", 90.0, False),
    Row("readahead-both", "both in one region: blocks filled / touched", "x", "number", 1.2, True),
    Row("readahead-both-ahead", "both in one region: share of the strided filled ahead", "%", "number", 90.0, False),
    Row("hosted-touch", "provider in Python (out[:] = 7), 64 KiB blocks, random touch (median)", "us", "time", 2.5,
        True, "a native provider, thread delivery"),
    Row("hosted-sum", "sum through a provider in Python that copies from its array, 1 MiB blocks", "s/GiB", "rate", 0.5,
        False, "the same over Memory"),
    Row("hosted-sum-shared", "the same with shared backing", "s/GiB", "rate", 0.7, False,
        "the same over Memory, shared backing"),
    Row("hosted-two", "zlib in a provider in Python, two touching threads, two hosts", "ms", "rate", 1.7, False,
        "one host"),
    Row("hosted-zarr", "zarr, 8192 x 8192 in 512 x 512 chunks, one column of chunks", "ms", "time", 1.3, True,
        "zarr's own selection"),
    Row("hosted-zarr-decodes", "the same: decodes of each chunk", "x", "number", 1.0, True),
    Row("hosted-http", "10,000 random rows over HTTP, after uffd.prefetch", "s", "rate", 5.0, False,
        "the same without the prefetch"),
    Row("redis-prefetch", "Redis on loopback, 64 KiB blocks, prefetch on, summed", "s/GiB", "rate", 0.8, False,
        "redis-py: pipelined GETs of the same blocks in a loop, summed"),
    Row("evict-steady", "steady state: a clean 64 KiB block filled from memory, one taken out", "us", "time", 1.4, True,
        "C: memcpy, MOVE in, WP, MOVE out, in one thread, without a fault"),
    Row("evict-zipf", "data 4 x budget: random reads, Zipf 0.99, File, cold", "s", "rate", 1.5, False, LIMITED),
    Row("evict-rmw", "data 4 x budget: random read-modify-write, 4 KiB, File, then flush", "s", "rate", 2.0, False,
        LIMITED),
    Row("evict-sort", "data 4 x budget: float64 sorted in place, runs and merges", "s", "rate", 1.2, False, LIMITED),
    Row("evict-scan", "data 4 x budget: one scan, cold", "s", "rate", 1.0, False, LIMITED),
    Row("evict-waits", "Zipf 0.99, every second touch writes, Scratch, 32 to 256 MiB: faults that wait for room", "%",
        "number", 1.0, True),
    Row("evict-waits-inline", "the same, inline delivery", "%", "number", 1.0, True),
    Row("evict-metadata", "memory beside the data, for each block that was touched", "bytes", "number", 32.0, True),
    Row("evict-packed", "data 4 x budget that does not get smaller, written and read, Scratch(compress='zstd')", "s",
        "rate", 0.85, False, "the same, Scratch()"),
    Row("evict-packed-bytes", "the same of integers below 1000: bytes in the spill file / written", "%", "number", 50.0,
        True),
    Row("migrate-idle", "memory that nobody writes to, from the switchover to its last block, TCP on loopback", "s/GiB",
        "rate", 0.8, False, "C: the same bytes over one socket into touched memory"),
    Row("migrate-busy", "the same, while the destination's program computes on it: GB/s", "GB/s", "number", 1.0, False),
    Row("migrate-downtime-256", "downtime of 256 MiB that a thread writes at full speed, after two rounds", "ms",
        "number", 5.0, True),
    Row("migrate-downtime-2048", "the same of 2 GiB", "ms", "number", 5.0, True),
    Row("migrate-downtime-8192", "the same of 8 GiB", "ms", "number", 5.0, True),
    Row("migrate-request-p50", "a requested block while the push fills the link (median)", "us", "time", 3.0, True,
        "the same with an idle link"),
    Row("migrate-request-p99", "the same, p99", "ms", "number", 5.0, True),
    Row("migrate-local", "4 GiB in a region with shared backing to another process by its descriptor, in all", "ms",
        "number", 20.0, True),
    Row("migrate-recover", "recover() after a cut, the hellos among it (median)", "ms", "number", 10.0, True),
    Row("track-1", "tracker.written() of 1 GiB, 1 % written, 4 KiB pages", "ms", "time", 1.3, True, PAGEMAP_SCAN),
    Row("track-100", "the same, all of it written", "ms", "time", 1.3, True, PAGEMAP_SCAN),
    Row("image-protect-small", "pause of the first image of 1 GiB, 4 KiB pages", "ms", "time", 1.5, True, PROTECT),
    Row("image-protect-huge", "the same, transparent huge pages", "ms", "time", 1.5, True, PROTECT),
    Row("image-fork-small", "the same, 4 KiB pages, beside fork", "ms", "time", 1.0, True, "fork() in C"),
    Row("image-fork-huge", "the same, transparent huge pages, beside fork", "ms", "time", 0.1, True, "fork() in C"),
    Row("image-next", "pause of the next image of a series, 1 % written since in one piece, 4 KiB pages", "ms", "time",
        0.1, True, "the first image's"),
    Row("snapshot-writer-small", "two dense writers while an image is taken, 4 KiB pages", "s/GiB", "rate", 1.3, False,
        "beside a forked child that writes it"),
    Row("snapshot-writer-huge", "the same, transparent huge pages", "s/GiB", "rate", 1.3, False,
        "beside a forked child that writes it"),
    Row("snapshot-next-time", "next image of a series, 1 % written since: time, of the first one's", "%", "number",
        5.0, True),
    Row("snapshot-next-bytes", "the same: bytes, of the first one's", "%", "number", 5.0, True),
    Row("snapshot-restart", "restart from a cold image, with a stored working set: time to the first result", "s",
        "rate", 2.0, False, "the same without it"),
    Row("life-1tib-time", "1 TiB region made and closed", "ms", "number", 50.0, True),
    Row("life-1tib-rss", "1 TiB region made and closed: resident memory while open", "MiB", "number", 4.0, True),
    Row("life-1000", "1,000 regions made and closed 20 times: fds, threads, mappings left", "left", "number", 0.0,
        True),
)
BY_KEY = {row.key: row for row in ROWS}
assert len(BY_KEY) == len(ROWS), "two rows of one key"
