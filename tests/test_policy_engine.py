"""The engine keeps what the simulator says that its policy keeps: hit ratios within 2 points of each other.

Method: benchmarks/policy_engine.py, one thread of C that touches, fixed seeds. What threads do when changes how much of
the budget is free at a moment, by a few percent of it, and nothing else: the traces are such that this is less than a
point.
"""

import shutil
import sys
from pathlib import Path

import pytest
from support import matrix

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir() or shutil.which("gcc") is None:
    pytest.skip("the source tree is not here, or no compiler for it", allow_module_level=True)

sys.path.insert(0, str(BENCHMARKS))
import policy_engine as both  # noqa: E402
import policy_sim as sim  # noqa: E402

pytestmark = pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing is evicted")
POINTS = 2.0


@pytest.fixture(scope="module")
def traces(warm):
    both.native.library()
    return {played.name: played for played in both.traces(blocks=8000, count=60_000, seed=4)}


@pytest.mark.parametrize("delivery", ["inline", "thread"])
@pytest.mark.parametrize("name", ["zipf 0.7", "zipf 0.99", "scan + loop", "shifting", "words"])
def test_the_engine_does_what_the_simulator_says(traces, name, delivery):
    reason = next(where for where in matrix.WHERES if where.delivery == delivery).unavailable()
    if reason:
        pytest.skip(reason)
    played = traces[name]
    budget_bytes = played.data_bytes // 4
    told = sim.play(played, "ours", budget_bytes).hits
    found, stats = both.engine_hits(played, budget_bytes, delivery)
    print(f"{name}: simulator {told:.2f} %, engine {found:.2f} %")
    assert abs(found - told) <= POINTS
    assert stats.evicted and stats.rescued and not stats.blocks_readahead
