"""docs/syscalls.md: what common calls do with missing pages, in full and in user mode, as measured here.

UFFD_WRITE_DOCS=1 writes the file; otherwise what it says is compared with what happens.
"""

import json
import os
from pathlib import Path

import pytest
from support import calls, matrix
from support.scripts import run_script

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "syscalls.md"
COLUMNS = ("full mode", "user mode", "user mode, inside `pinned(a)`")
INTRODUCTION = """# Calls on missing pages

Python code, numpy and every C library touch an array with ordinary loads and stores; these always work. When an array
is handed to the kernel instead (`write`, `read`, `send`), the kernel itself meets the missing pages. With a full
userfaultfd that is served like any other touch. Without privilege (**user mode**, `python -m uffd probe` says which one
you have), and with `delivery="inline"` in either, the kernel answers `EFAULT`, or stops half-way and reports a short
count, which some callers pass on without an error. `uffd.pinned(a)` is the cure: inside it every page is there.

Each call below got a 1 MiB `uint8` array of which the first block was resident and the rest was not.

"""

SCRIPT = """
import json, pathlib
from support import calls
full = sys.argv[1] == "full"
directory = pathlib.Path("out")
directory.mkdir(mode=0o777)
os.chmod(directory, 0o777)
content = pattern(0, calls.NBYTES).copy()
rows = calls.OUT | calls.INTO
for number, function in enumerate(rows.values()):  # import what they import while this user may still read it
    calls.outcome(function, content.copy(), content, directory / f"warm{number}")
    for left in directory.glob(f"warm{number}*"):
        os.chmod(left, 0o777)
if not full:
    drop_privileges()
def attempt(function, path, pin):
    into = function in calls.INTO.values()
    provider, control = controlled(Control(seed=1 if into else 0))
    with uffd.Region(calls.NBYTES, provider, readahead_bytes=0) as r:
        a = r.array()
        a[0]
        if not pin:
            return calls.outcome(function, a, content, path)
        with uffd.pinned(a):
            return calls.outcome(function, a, content, path)
table = {}
for number, (name, function) in enumerate(rows.items()):
    table[name] = [attempt(function, directory / f"{number}{pin}", pin) for pin in (False, True)]
say("TABLE" + json.dumps(table))
os._exit(0)  # some of these libraries keep threads that need what this user may no longer read
"""


@pytest.fixture(scope="module")
def measured():
    """{call: [full mode, user mode, user mode pinned]}; None for the full mode where it can't be had."""
    columns = {}
    for mode in ("full", "user"):
        if mode == "full" and not matrix.full_mode():
            continue
        result = run_script(SCRIPT, 60, argv=[mode]).check()
        columns[mode] = json.loads(result.stdout.split("TABLE")[1])
    full = columns.get("full")
    return {name: [full and full[name][0], *outcomes] for name, outcomes in columns["user"].items()}


def rendered(table):
    lines = [f"| call | {' | '.join(COLUMNS)} |", "|---|---|---|---|"]
    for heading, names in (("out of the array", calls.OUT), ("into the array", calls.INTO)):
        lines.append(f"| *{heading}* | | | |")
        lines += [f"| {name} | {' | '.join(table[name])} |" for name in names]
    return INTRODUCTION + "\n".join(lines) + "\n"


def documented():
    table = {}
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 4 and cells[0] in calls.OUT | calls.INTO:
            table[cells[0]] = cells[1:]
    return table


@pytest.mark.deadline(150)
def test_document_agrees(measured):
    """Goal: the table is what happens. Method: measure each cell, compare; libraries not installed are left out."""
    missing = sorted({cell for cells in measured.values() for cell in cells if cell and cell.startswith("no ")})
    if os.environ.get("UFFD_WRITE_DOCS") == "1":
        assert not missing and all(cells[0] for cells in measured.values()), f"to write the table: {missing}, full mode"
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(rendered(measured))
    if not DOCUMENT.exists():
        pytest.skip("docs/syscalls.md is not in this distribution")
    said = documented()
    assert list(said) == list(measured)
    for name, cells in measured.items():
        for column, (cell, word) in enumerate(zip(cells, said[name])):
            if cell is not None and not cell.startswith("no "):
                assert cell == word, f"{name}, {COLUMNS[column]}: is {cell!r}, documented {word!r}"


@pytest.mark.deadline(150)
def test_full_mode_serves_all(measured):
    if not matrix.full_mode():
        pytest.skip("no full userfaultfd: this user has user mode only")
    assert {name: cells[0] for name, cells in measured.items() if cells[0] != "works" and cells[0][:3] != "no "} == {}


@pytest.mark.deadline(150)
def test_pinned_is_the_cure(measured):
    assert {name: cells[2] for name, cells in measured.items() if cells[2] != "works" and cells[2][:3] != "no "} == {}


@pytest.mark.deadline(150)
def test_user_mode_never_gives_wrong_bytes(measured):
    """Goal: in user mode a call works, raises or comes up short; wrong bytes it never gives."""
    assert not [name for name, cells in measured.items() if "wrong" in cells[1]]
    assert "short" in measured['`open(path, "wb", 0).write(a)`'][1]


@pytest.mark.parametrize("backing", ["anon", "shared"])
@pytest.mark.parametrize("user_mode", [False, True], ids=["full", "user"])
def test_o_direct(backing, user_mode, tmp_path):
    """Goal: O_DIRECT reads into and writes from missing pages: served in full mode, EFAULT or short in user mode."""
    if not user_mode and not matrix.full_mode():
        pytest.skip("no full userfaultfd: this user has user mode only")
    result = run_script("""
try:
    fd = os.open("direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
except OSError as error:
    say(f"skip {error}")
    os._exit(0)
full = sys.argv[1] == "full"
provider, control = controlled()
r = region(16 * BLOCK, provider, readahead_bytes=0)
a = r.array()
try:
    count = os.write(fd, a)
except OSError as error:
    assert not full and error.errno == errno.EFAULT, error
else:
    assert count == 16 * BLOCK or not full
    assert open("direct", "rb").read()[:count] == pattern(0, count).tobytes()
with uffd.pinned(a):
    assert os.pwrite(fd, a, 0) == 16 * BLOCK
assert open("direct", "rb").read() == pattern(0, 16 * BLOCK).tobytes()
provider, other = controlled(Control(seed=8))
into = region(16 * BLOCK, provider, readahead_bytes=0)
b = into.array()
try:
    count = os.preadv(fd, [b], 0)
except OSError as error:
    assert not full and error.errno == errno.EFAULT, error
else:
    assert count == 16 * BLOCK or not full
    assert (b[:count] == a[:count]).all() and (b[count:] == pattern(count, 16 * BLOCK - count, 8)).all()
""", where=f"thread-{backing}", user_mode=user_mode, argv=["user" if user_mode else "full"]).check()
    if result.stdout.startswith("skip"):
        pytest.skip(f"no O_DIRECT in {tmp_path.parent}: {result.stdout[5:]}")
