"""`uffd snapshot`: images on disk from the command line."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    snapshot = commands.add_parser("snapshot", help="look at images that uffd.snapshot.take() wrote",
                                   description="Images of memory: whole, incremental or compressed files.")
    actions = snapshot.add_subparsers(metavar="ACTION", required=True)
    about = {"info": "arrays, sizes and chain", "verify": "read all of it, and hold it against its checksums",
             "export": "make one whole file of a chain",
             "diff": "what differs between two images; exit code 0: nothing, 1: something, 2: trouble"}
    parsers = {name: actions.add_parser(name, help=text, description=text.capitalize() + ".")
               for name, text in about.items()}
    for name, parser in parsers.items():
        parser.add_argument("path", metavar="IMAGE")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=globals()[f"_{name}"])
    parsers["export"].add_argument("target", metavar="TARGET", help="the file to write")
    parsers["export"].add_argument("--compress", metavar="CODEC", help="as uffd pack does, by zstd, lz4 ...")
    parsers["diff"].add_argument("other", metavar="OTHER")
    parsers["diff"].set_defaults(trouble=2)


def _info(options: argparse.Namespace) -> int:
    from . import info

    found = info(options.path)
    print(json.dumps(found.as_dict(), indent=2) if options.json else found)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from . import verify

    nbytes = verify(options.path)
    text = f"{options.path}: {nbytes:,} bytes are as written"
    print(json.dumps({"verified_bytes": nbytes}) if options.json else text)
    return 0


def _export(options: argparse.Namespace) -> int:
    from . import export

    number = export(options.path, options.target, compress=options.compress)
    print(json.dumps({"path": options.target, "id": number}) if options.json else f"{options.target}: image {number}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    from . import diff

    found = diff(options.path, options.other)
    if options.json:
        print(json.dumps({name: None if rows is None else rows.tolist() for name, rows in found.items()}))
        return 1 if found else 0
    for name, rows in found.items():
        if rows is None:
            print(f"{name}: only in one of them, or of another type, shape or order")
        else:
            print(f"{name}: {int((rows[:, 1] - rows[:, 0]).sum()):,} bytes in {len(rows)} places differ, the first at "
                  f"byte {rows[0, 0]}")
    if not found:
        print("the same")
    return 1 if found else 0
