"""What is told of a migration: figures of the core made a report, its text, its JSON, its picture."""

import builtins
import json

import pytest
from uffd.migrate import _report
from uffd.migrate._report import Report, Status, Traffic, plot
from uffd.migrate._states import Phase

MS = 1_000_000
BEGAN = 5_000 * MS
LATENCY = [0] * 64
LATENCY[17], LATENCY[18], LATENCY[22] = 900, 90, 10
KEEPS_FONTS = pytest.mark.keeps("matplotlib keeps the files of its fonts open")


def figures(**changes):
    """As the core tells them: a migration of 100 blocks of 64 KiB, in two rounds, 1 ms from stop to resume."""
    found = {
        "bytes": {"precopy": 60 << 16, "pushed": 30 << 16, "requested": 6 << 16, "zero": 4 << 16, "doubled": 1 << 16,
                  "released": 0},
        "blocks": {"precopy": 60, "pushed": 30, "requested": 6, "zero": 4, "doubled": 1, "released": 0},
        "rounds": 2, "latency": LATENCY, "latency_max_ns": 5 * MS, "blocked_ns": 170 * MS,
        "blocked_by_thread_ns": {}, "asked": 1000,
        "stopped_ns": BEGAN + 50 * MS, "resumed_ns": BEGAN + 51 * MS, "left": 0,
        "moments": [(BEGAN + 10 * MS, Phase.PRECOPY, 100), (BEGAN + 49 * MS, Phase.FROZEN, 36),
                    (BEGAN + 50 * MS, Phase.DOUBT, 36), (BEGAN + 51 * MS, Phase.POSTCOPY, 36),
                    (BEGAN + 110 * MS, Phase.COMPLETED, 0)],
    }
    return {**found, **changes}


def report(side="source", phase=Phase.COMPLETED, **changes):
    return Report.of(figures(**changes), side=side, phase=phase, began_ns=BEGAN, now_ns=BEGAN + 500 * MS,
                     setup_ns=10 * MS, dirty_blocks=(100, 40), bytes_passed=7 << 20)


def test_the_figures_are_the_cores():
    found = report()
    assert (found.status, found.owner) == (Status.COMPLETED, "destination")
    assert found.downtime_s == pytest.approx(0.001)
    assert found.setup_s == pytest.approx(0.01)
    assert found.total_s == pytest.approx(0.110), "to its end, not to the moment at which it is asked for"
    assert found.bytes == Traffic(60 << 16, 30 << 16, 6 << 16, 4 << 16, 1 << 16)
    assert found.bytes_copied == 96 << 16
    assert found.throughput_bytes_per_s == pytest.approx((96 << 16) / 0.1)
    assert [(moment.status, moment.blocks_left) for moment in found.timeline] == [
        (Status.SETUP, 100), (Status.PRECOPY, 100), (Status.SWITCHOVER, 36), (Status.POSTCOPY, 36),
        (Status.COMPLETED, 0)], "the hand-over has two phases and one name"
    assert 2**17 <= found.requests.p50_ns < 2**18


@pytest.mark.parametrize(("changes", "why"), [
    ({"side": "destination"}, "it does not see when the source stopped"),
    ({"stopped_ns": 0}, "nothing was stopped"),
    ({"resumed_ns": 0}, "nothing runs yet"),
])
def test_a_downtime_that_was_not_measured_is_none(changes, why):
    found = report(**changes)
    assert found.downtime_s is None, why
    assert "not yet, or not to be seen" in str(found)


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("side", ["source", "destination"])
def test_every_state_has_a_public_name_and_a_text(side, phase):
    found = report(side, phase)
    assert str(found.status) in str(found)
    assert found.owner in str(found)
    assert found.status.over == (phase >= Phase.COMPLETED)
    json.dumps(found.as_dict())


@KEEPS_FONTS
def test_before_anything_has_happened_it_can_be_told_too(tmp_path):
    nothing = dict.fromkeys(figures()["bytes"], 0)
    found = report(phase=Phase.SETUP, bytes=nothing, blocks=nothing, latency=[0] * 64, latency_max_ns=0, blocked_ns=0,
                   rounds=0, moments=[], stopped_ns=0, resumed_ns=0, left=100)
    assert found.total_s == pytest.approx(0.5)
    assert "left        100 blocks" in str(found)
    plot(found, tmp_path / "picture.png")


def test_as_dict_is_json_and_has_all_of_it():
    told = json.loads(json.dumps(report(blocked_by_thread_ns={4711: 170 * MS}).as_dict()))
    assert told["bytes"] == {"precopy": 60 << 16, "pushed": 30 << 16, "requested": 6 << 16, "zero": 4 << 16,
                             "doubled": 1 << 16, "total": 96 << 16}
    assert told["requests"]["n"] == 1000
    assert told["requests"]["p99_ns"] <= told["requests"]["max_ns"] == 5 * MS
    assert told["blocked_by_thread_s"] == {"4711": pytest.approx(0.17)}
    assert told["timeline"][-1] == {"at_s": pytest.approx(0.11), "status": "COMPLETED", "blocks_left": 0}
    assert set(told) >= set(vars(report())) - {"requests_max_ns"}


def test_the_text_says_what_one_asks_first():
    text = str(report(blocked_by_thread_ns={4711: 170 * MS}))
    for words in ("COMPLETED; the memory is with the destination", "downtime    1.00 ms", "6.0 MiB, 60.0 MiB/s",
                  "0.110 s, of which setup 10.0 ms", "7.0 MiB by descriptor", "requested   6 blocks, 384.0 KiB",
                  "rounds      2; dirty blocks by round 100, 40", "1,000: p50", "blocked 170.0 ms in all",
                  "4711: 170.0 ms", "SETUP 0.0 > PRECOPY 10.0"):
        assert words in text, text


def test_the_quantile_of_a_bucket_does_not_pass_the_longest():
    counts = [0] * 64
    counts[20] = 1
    found = report(latency=counts, latency_max_ns=2**20 + 1)
    assert found.as_dict()["requests"]["p99_ns"] == 2**20 + 1


@KEEPS_FONTS
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_is_drawn(tmp_path, ending):
    from dataclasses import replace

    target = tmp_path / f"picture.{ending}"
    drawn = replace(report(), program=((0.0, 100.0), (0.05, 0.0), (0.2, 90.0)))
    plot(drawn, target)
    head = target.read_bytes()
    assert head.startswith(b"\x89PNG" if ending == "png" else b"<?xml") and len(head) > 5000


def test_the_picture_needs_an_extra_and_says_which(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pyuffd\[plot\]"):
        plot(report(), tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_the_status_names_are_the_public_ones():
    assert [str(status) for status in Status] == ["SETUP", "PRECOPY", "SWITCHOVER", "POSTCOPY", "PAUSED", "RECOVERING",
                                                  "COMPLETED", "FAILED", "CANCELLED"]
    assert set(_report._COLOURS) == set(Status)
