"""Benchmarks run against the installed wheel. UFFD_BENCH_SCALE shrinks their sizes, for a quick look."""
from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))       # native, harness and rows, which are no package

import native  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    import uffd
    if Path(uffd.__file__).resolve().is_relative_to(HERE.parent) and ".venv" not in uffd.__file__:
        raise pytest.UsageError(f"uffd comes from {uffd.__file__}, not from a wheel: run python -P -m pytest")
    native.library()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """bench_*.py hold tests, wherever pytest was told to start."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    import uffd
    machine_info["kernel"] = platform.release()
    machine_info["cpus"] = native.CPUS
    machine_info["uffd_mode"] = uffd.probe().mode


@pytest.fixture(scope="session")
def engine() -> Iterator[object]:
    """One engine for all rows, as a program would have."""
    import uffd
    with uffd.Engine() as made:
        yield made
