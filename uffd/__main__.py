"""The command line: `uffd`, `pyuffd`, `python -m uffd`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import uffd
from uffd.errors import UffdError


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0, 1 for an error that one line on stderr names (`snapshot diff`: 2,
    as diff does, 1 is that they differ), 2 for wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["demo"]:  # it parses its own options
        return _guarded(_demo, words[1:])
    options = _parser().parse_args(words)
    return _guarded(options.run, options)


class _Parser(argparse.ArgumentParser):
    """Wrong usage is answered by the whole help of the command, which names all there is; subcommands inherit it."""

    def error(self, message: str):
        self.exit(2, f"{self.format_help()}\n{self.prog}: error: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        if rest:  # else a subcommand's would be told by the help of `uffd` itself
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="uffd", description="Memory externalization for Python on Linux userfaultfd.")
    parser.add_argument("--version", action="version", version=f"uffd {uffd.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    probe = commands.add_parser("probe", help="what this machine grants, and the cure for what it does not",
                                description="Tell what this machine grants. Exit code 1: regions can't work here.")
    probe.add_argument("--json", action="store_true", help="print JSON")
    probe.add_argument("--no-self-test", action="store_true", help="leave the measured faults out")
    probe.add_argument("--seccomp-profile", metavar="BASE.json", type=Path,
                       help="print this seccomp profile of a container engine with userfaultfd allowed, and end")
    probe.set_defaults(run=_probe)

    pack = commands.add_parser("pack", help="compress a .npy or .safetensors into a file that uffd.open() takes lazily",
                               description="Compress the arrays of a file block by block, with shuffle, by Blosc2.")
    pack.add_argument("source", metavar="SOURCE", type=Path, help="a .npy or .safetensors file")
    pack.add_argument("target", metavar="TARGET", type=Path, help="the file to write")
    pack.add_argument("--codec", default="zstd", help="Blosc2's name of a codec (default: %(default)s)")
    pack.add_argument("--level", type=int, default=5, help="0 to 9 (default: %(default)s)")
    pack.add_argument("--json", action="store_true", help="print the sizes as JSON")
    pack.set_defaults(run=_pack)

    from .snapshot import _cli

    _cli.add(commands)

    top = commands.add_parser("top", help="a live view of an engine that called engine.serve(PATH)",
                              description="Show budget, residency, rates and latencies of an engine of another process "
                                          "of yours, that called engine.serve(PATH). Ctrl-C ends it.")
    top.add_argument("path", metavar="PATH", help="the socket that engine.serve() made")
    top.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds (default: %(default)s)")
    top.add_argument("--once", action="store_true", help="print one frame, of one interval, and end; so it is without "
                                                         "a terminal")
    top.add_argument("--json", action="store_true", help="print the figures, a line of JSON each time")
    top.set_defaults(run=_top)
    _add_store(commands)
    _add_migrate(commands)
    commands.add_parser("demo", help="the tour, on a real model: uffd demo --help")
    return parser


def _add_store(commands: argparse._SubParsersAction) -> None:
    store = commands.add_parser("store", help="list or remove what providers.Redis keeps in a server",
                                description="Namespaces of uffd.providers.Redis in a server or cluster.")
    actions = store.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("ls", help="list the namespaces", description="List the namespaces, with their sizes "
                                 "and who writes to them. Looks through all keys of the server.")
    listing.add_argument("--json", action="store_true", help="print a JSON array")
    listing.set_defaults(run=_store_ls)
    removing = actions.add_parser("rm", help="remove a namespace", description="Remove a namespace and all its blocks.")
    removing.set_defaults(run=_store_rm)
    for parser in (listing, removing):
        parser.add_argument("url", metavar="URL", help="redis://, rediss:// or unix://")
        parser.add_argument("--timeout", metavar="SECONDS", type=float, default=20.0,
                            help="how long an answer may take (default: %(default)g)")
    removing.add_argument("namespace", metavar="NAMESPACE")
    removing.add_argument("--force", action="store_true", help="also while somebody writes to it")


def _add_migrate(commands: argparse._SubParsersAction) -> None:
    moving = commands.add_parser("migrate", help="uffd migrate demo: memory moves while a program writes to it",
                                 description="Live migration; in a program: uffd.migrate.")
    actions = moving.add_subparsers(metavar="ACTION", required=True)
    demo = actions.add_parser("demo", help="between two processes, with a program that writes faster than it is sent",
                              description="Moves memory to another process while a program writes to all of it; checks "
                                          "it there, prints the report, and draws the program's speed.")
    demo.add_argument("--mib", type=int, default=256, metavar="N", help="how much memory (default: %(default)s)")
    demo.add_argument("--mb-per-s", type=float, default=400.0, metavar="R",
                      help="how fast it is sent at most, 0: no limit (default: %(default)g)")
    demo.add_argument("--seconds", type=float, default=1.0, metavar="S",
                      help="how long the program runs before the move, and after it (default: %(default)g)")
    demo.add_argument("--png", type=Path, default=Path("uffd-migrate.png"), metavar="PATH",
                      help="where the picture goes (default: %(default)s)")
    demo.add_argument("--no-png", action="store_true", help="draw none")
    demo.add_argument("--compare", action="store_true",
                      help="move it three times: stop and copy, precopy, postcopy; how long the program stands still, "
                           "and until it is at full speed")
    demo.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")
    demo.set_defaults(run=_migrate_demo)


def _guarded(run, options) -> int:
    """Errors that a user can mend are one line; all others are bugs and keep their traceback."""
    trouble = getattr(options, "trouble", 1)        # where 1 is an answer: 2
    try:
        return run(options)
    except BrokenPipeError:  # the reader has enough: `uffd probe | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return trouble
    except (UffdError, OSError, ValueError, TypeError, ImportError) as error:
        print(f"uffd: {type(error).__name__}: {error}", file=sys.stderr)
        return trouble
    except KeyboardInterrupt:
        print("uffd: interrupted", file=sys.stderr)
        return 130


def _probe(options: argparse.Namespace) -> int:
    if options.seccomp_profile:
        from ._cures import seccomp_profile

        try:
            profile = seccomp_profile(json.loads(options.seccomp_profile.read_text()))
        except ValueError as error:  # what JSON is not, too
            raise ValueError(f"{options.seccomp_profile}: {error}; give the profile that your container engine uses, a "
                             "JSON file (Docker's default is profiles/seccomp/default.json of its sources)") from None
        print(json.dumps(profile, indent=2))
        return 0
    found = uffd.probe(self_test=not options.no_self_test)
    print(json.dumps(found.as_dict(), indent=2) if options.json else found)
    return 0 if found.mode != "none" and all(test.ok for test in found.self_test) else 1


def _pack(options: argparse.Namespace) -> int:
    uffd.pack(options.source, options.target, codec=options.codec, level=options.level)
    sizes = {"source_bytes": options.source.stat().st_size, "target_bytes": options.target.stat().st_size}
    ratio = sizes["source_bytes"] / max(1, sizes["target_bytes"])
    if options.json:
        print(json.dumps({**sizes, "ratio": ratio}))
    else:
        print(f"{options.target}: {sizes['target_bytes']:,} bytes of {sizes['source_bytes']:,} ({ratio:.2f} times "
              "smaller)")
    return 0


def _top(options: argparse.Namespace) -> int:
    from . import _top

    return _top.main(options.path, interval_s=options.interval, once=options.once, as_json=options.json)


def _store_ls(options: argparse.Namespace) -> int:
    from .providers import redis_store

    with redis_store.connected(options.url, options.timeout) as server:
        rows = redis_store.listed(server)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        size = "any size" if row["nbytes"] is None else f"{row['nbytes']:,} bytes"
        writer = f", written by {row['writer']}" if row["writer"] else ""
        print(f"{row['namespace']}: {row['state']}, {size}, {row['blocks_written']:,} blocks of "
              f"{row['block_bytes']:,} bytes written{writer}")
    return 0


def _store_rm(options: argparse.Namespace) -> int:
    from .providers import redis_store

    with redis_store.connected(options.url, options.timeout) as server:
        count = redis_store.removed(server, options.namespace, force=options.force)
    print(f"{options.namespace}: {count:,} keys removed")
    return 0


def _migrate_demo(options: argparse.Namespace) -> int:
    from .migrate import _demo

    if not (1 <= options.mib <= 1 << 20 and options.mb_per_s >= 0 and 0 < options.seconds <= 60):
        raise ValueError("--mib takes 1 or more, --mb-per-s 0 or more, --seconds more than 0 and at most 60")
    if not options.no_png and not options.png.absolute().parent.is_dir():
        raise ValueError(f"--png: there is no folder {options.png.absolute().parent}; name another, or say --no-png")
    return _demo.main(options.mib << 20, options.mb_per_s * 1e6, options.seconds,
                      None if options.no_png else options.png, options.json, options.compare)


def _demo(words: list[str]) -> int:
    from . import demo

    return demo.main(words)


if __name__ == "__main__":
    sys.exit(main())
