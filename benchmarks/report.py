"""The table from the JSON that pytest-benchmark wrote: work | ours | floor | ratio | goal | met.

Answers 0 whether or not goals are met, 1 when a row has no numbers.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from rows import ROWS, Row


def collected(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows by key, and what is said of the machine."""
    data = json.loads(path.read_text())
    rows: dict[str, Any] = {}
    for benchmark in data["benchmarks"]:
        rows.update(benchmark["extra_info"].get("rows", {}))
    return rows, data.get("machine_info", {})


def spread(result: dict[str, float], unit: str) -> str:
    """Median, and the quartiles where they say more."""
    text = f"{result['median']:.3g} {unit}"
    return text if result["low"] == result["high"] else f"{text} ({result['low']:.3g}..{result['high']:.3g})"


def line(row: Row, found: dict[str, Any]) -> list[str]:
    floor = spread(found["floor"], row.unit) if found["floor"] else "-"
    judged = f"{found['judged']:.2f} x" if row.value != "number" else f"{found['judged']:.3g} {row.unit}"
    return [row.work, spread(found["ours"], row.unit), floor, judged, row.goal_text(), "yes" if found["met"] else "NO"]


def print_table(lines: list[list[str]]) -> None:
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(lines[0]))]
    for number, cells in enumerate(lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def print_beside(rows: dict[str, Any]) -> None:
    """What else a user could do, and what else was tried: lower is faster."""
    print("\nBeside it (median, in the row's unit; less is faster)")
    for row in ROWS:
        found = rows.get(row.key)
        if not found or not (found["beside"] or found["floor_name"]):
            continue
        others = dict(found["beside"])
        ours = found["ours"]["median"]
        texts = [f"ours {ours:.3g}"] + [f"{name} {value:.3g}" for name, value in others.items()]
        if found["floor_name"]:
            texts.insert(1, f"floor: {found['floor_name']} {found['floor']['median']:.3g}")
        print(f"  {row.key} [{row.unit}]: " + " | ".join(texts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what --benchmark-json wrote")
    rows, machine = collected(parser.parse_args().json)
    print(f"kernel {machine.get('kernel')}, {machine.get('cpus')} CPUs, userfaultfd mode {machine.get('uffd_mode')}; "
          "medians, quartiles in brackets")
    scales = {found["scale"] for found in rows.values()} - {1.0}
    if scales:
        print(f"sizes shrunk by UFFD_BENCH_SCALE to {', '.join(f'{scale:g}' for scale in scales)}: not for the record")
    heads = ["work", "ours", "floor", "ratio or number", "goal", "met"]
    measured = [row for row in ROWS if row.key in rows]
    print_table([heads] + [line(row, rows[row.key]) for row in measured])
    print("\nFloors, in the same run: " + "; ".join(f"{row.key}: {row.floor}" for row in measured if row.floor))
    print_beside(rows)
    missing = [row.key for row in ROWS if row.key not in rows]
    if missing:
        print(f"\nnot measured: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
