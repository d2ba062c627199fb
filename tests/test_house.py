"""The rules of the house, held against the source tree beside these tests. The tree is read, never imported."""

import ast
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES_PER_FUNCTION = 60
LINES_PER_FILE = 700
COLUMNS = 120

if not (ROOT / "uffd").is_dir():
    pytest.skip("no source tree beside the tests: these hold only there", allow_module_level=True)


def sources(*suffixes, under=("uffd",)):
    """Source files as pytest parameters, named by their path."""
    found = []
    for folder in under:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes and "build" not in path.parts]
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sorted(found)]


CYTHON = sources(".pyx", ".pxi")
CODE = sources(".py", ".pyx", ".pxi", ".pxd", ".h")


# Functions


@dataclass
class Function:
    name: str
    first: int  # number of its first line
    lines: int
    head: str  # the signature on one line, for Cython
    body: str


def python_functions(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield Function(node.name, node.lineno, node.end_lineno - node.lineno + 1, "", "")


CYTHON_START = re.compile(r"(\s*)(?:async\s+def|def|cdef|cpdef)\s+[^=]*?(\w+)\s*\(")


def after_arguments(text):
    """What follows the parenthesis that closes the one at which this text begins; no comment."""
    depth = 0
    for at, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return text[at + 1:].partition("#")[0]
    return ""


def cython_functions(text):
    """A function is its head, up to the line that ends it with a colon, and the lines that are indented further."""
    lines = text.splitlines()
    for at, line in enumerate(lines):
        start = CYTHON_START.match(line)
        if not start:
            continue
        head, end = line, at
        while head.count("(") > head.count(")") and end + 1 < len(lines):
            end += 1
            head += " " + lines[end].strip()
        if ":" not in after_arguments(head[start.end() - 1:]):
            continue  # a declaration, or a variable made by a call
        indent, last = len(start[1]), end
        for number in range(end + 1, len(lines)):
            text_of_line = lines[number]
            if text_of_line.strip() and len(text_of_line) - len(text_of_line.lstrip()) <= indent:
                break
            last = number if text_of_line.strip() else last
        yield Function(start[2], at + 1, last - at + 1, head, "\n".join(lines[end + 1:last + 1]))


def c_functions(text):
    """A body begins with a brace that ends or makes a line outside of all others, after a parenthesis."""
    lines, start = text.splitlines(), None
    for at, line in enumerate(lines):
        if start is None and re.match(r"(?!(?:typedef|struct|enum|union|extern)\b.*\{)\w.*\(", line):
            start = at if not line.rstrip().endswith((";", "}")) else None
        elif start is not None and line.startswith("}"):
            name = re.search(r"(\w+)\s*\(", lines[start])[1]
            yield Function(name, start + 1, at - start + 1, "", "\n".join(lines[start:at + 1]))
            start = None
        elif start is not None and line.endswith(";") and not line.startswith((" ", "\t", "{")):
            start = None


def functions_of(path):
    read = {".py": python_functions, ".h": c_functions, ".c": c_functions}.get(path.suffix, cython_functions)
    return list(read(path.read_text()))


@pytest.mark.parametrize("path", CODE)
def test_functions_are_short(path):
    long = [f"{f.name} at line {f.first}: {f.lines}" for f in functions_of(path) if f.lines > LINES_PER_FUNCTION]
    assert not long, f"longer than {LINES_PER_FUNCTION} lines"


@pytest.mark.parametrize("path", CODE)
def test_files_are_short_and_their_lines_too(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= LINES_PER_FILE
    assert [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS] == []


@pytest.mark.parametrize("path", CODE)
def test_lines_end_clean(path):
    text = path.read_text()
    assert [number for number, line in enumerate(text.split("\n"), 1) if line != line.rstrip()] == []
    assert not text or text.endswith("\n")
    assert "\t" not in text


# Words


UNFINISHED = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"]))


@pytest.mark.parametrize("path", sources(".py", ".pyx", ".pxi", ".pxd", ".pyi", ".h", ".c", ".md", ".toml",
                                         under=("uffd", "tests", "benchmarks", "tools", "docs")))
def test_nothing_is_left_unfinished(path):
    assert UNFINISHED.findall(path.read_text()) == []


@pytest.mark.parametrize("path", CODE)
def test_the_page_size_is_asked_for(path):
    assert re.findall(r"\b(?:4096|0x1000)\b", path.read_text()) == []


# The core


def nogil_functions():
    for parameter in CYTHON:
        (path,) = parameter.values
        for function in functions_of(path):
            if re.search(r"\bnogil\b", function.head):
                yield path, function


@pytest.mark.parametrize("path", CYTHON)
def test_a_worker_never_takes_the_gil(path):
    code = code_only(path.read_text())
    assert not re.search(r"\bwith\s+gil\b", code)
    assert "PyGILState" not in code


@pytest.mark.parametrize("path", CYTHON)
def test_nogil_functions_answer_errno_and_raise_nothing(path):
    """Without `noexcept` each call would look for an exception, with the GIL."""
    bad = [f"{f.name} at line {f.first}" for p, f in nogil_functions() if p == path and "noexcept" not in f.head]
    assert not bad


# malloc's lock may be held by the very thread that waits for its fault, and a worker that unmaps or forks may wait for
# itself. The functions that do so all the same run outside of the fault path, or for the reason given.
MAY_ALLOCATE = {
    "snapshot_replace": "a region is made or closed",
    "engine_make": "an engine is made",
    "engine_free": "an engine is gone, with its workers",
    "region_unmap": "a region is closed, and nobody serves it any more",
    "child_make_private": "a forked child, before its first touch",
    "job_release": "a prefetch is over; no lock of malloc is ever held while memory of a region is touched",
    "work_begin": "a flush is asked for, by a program's thread outside of any fault",
    "work_drop": "a flush is over",
    "foreign_protect": "who asks for written pages, on a program's thread; the thread that lifts does not",
    "session_begin": "a region over a provider in Python is made",
    "sessions_tell": "such a region is closed",
    "sessions_free": "an engine is gone, or forked",
    "hosts_free": "an engine is gone, with its hosts",
    "sessions_grow": "in the provider host, which serves no faults",
    "map_window": "in the provider host, which serves no faults",
    "take_out": "an eviction, in which the program's own threads find EVICTING; events of madvise are not asked for",
    "take_out_shared": "the same",
    "move_to_pool": "the same",
    "move_back": "the same, in memory of the engine's own",
    "bring_in": "memory of the engine's own, which nobody faults in",
    "copy_to_pool": "the same",
    "untear": "the same, and of what a migration reads",
    "discard_block": "what the program asks for",
    "slot_release": "memory of the engine's own, which nobody faults in",
    "pool_trim": "the same",
    "recycled_release": "the same",
    "pool_ready": "the first eviction of a block size; nobody waits for it",
    "kept_parent": "the thread that forked, after it",
    "kept_make": "the same",
    "kept_child": "a forked child, before its first touch",
    "kept_look": "the keeper, once a child has ended",
    "kept_drop": "the same",
    "kept_close": "a region is closed",
    "child_free_slots": "a forked child, before its first touch",
    "region_leaves_budget": "a region is closed",
    "spill_close": "a region is closed",
    "spill_pack": "the writer, at its first block to be compressed; who waits for it has no lock of malloc, as above",
    "take_image": "memory of our own, which nobody faults in",
    "copy_images": "the writer, after many forks; memory of our own, which nobody faults in",
    "packer_free": "an engine is gone",
    "watch_begin": "a tracker is made",
    "watch_end": "a tracker ends",
    "foreign_begin": "a tracker is made",
    "foreign_end": "a tracker ends",
    "wire_release": "a migration is over, on both sides",
    "landing_make": "a migration's thread begins",
    "landing_free": "a migration's thread ends",
    "landing_used": "a migration's own thread, its own memory, whose owner waits for no fault",
    "push_main": "a migration's thread ends",
    "answer_main": "the same",
    "take_prepare": "a migration's own thread, before the hand-over",
    "give_back": "memory that was handed over, which no program touches any more",
    "rearm": "a migration's hand-over failed, and its file is mapped by this process alone again",
    "protect_blocks": "before the fault threads' gate opens, on kernels where a hole can't be protected",
    "unpoison_pages": "a repair, asked for by populate; events of madvise are not asked for",
}
ALLOCATES = re.compile(r"\b(malloc|calloc|realloc|free|posix_memalign|aligned_alloc|strdup|asprintf|printf|fprintf|"
                       r"fputs|puts|fopen|PyMem_\w+|madvise|munmap|fork|codec_make)\s*\(")


def code_only(cython):
    """Without docstrings and comments."""
    return re.sub(r"#.*", "", re.sub(r'""".*?"""', "", cython, flags=re.DOTALL))


def allocating_functions():
    found = list(nogil_functions())
    assert found, "no nogil function in the core: this test looks at nothing"
    return {f.name: f"{path.name}: {f.name}: {match[0]}" for path, f in found
            for match in ALLOCATES.finditer(code_only(f.body))}


def test_the_fault_path_allocates_nothing():
    assert [what for name, what in allocating_functions().items() if name not in MAY_ALLOCATE] == []


def test_each_exception_to_that_is_still_one():
    assert [name for name in MAY_ALLOCATE if name not in allocating_functions()] == []


# The kernel's numbers, typed by hand from its documentation, against those of uffd/_sys.h


KERNEL = {
    "UF_API_VERSION": 0xAA, "UF_USER_MODE_ONLY": 1,
    "UF_FEATURE_WP": 0x1, "UF_FEATURE_EVENT_FORK": 0x2, "UF_FEATURE_EVENT_REMAP": 0x4,
    "UF_FEATURE_EVENT_REMOVE": 0x8, "UF_FEATURE_MISSING_HUGETLBFS": 0x10, "UF_FEATURE_MISSING_SHMEM": 0x20,
    "UF_FEATURE_EVENT_UNMAP": 0x40, "UF_FEATURE_SIGBUS": 0x80, "UF_FEATURE_THREAD_ID": 0x100,
    "UF_FEATURE_MINOR_HUGETLBFS": 0x200, "UF_FEATURE_MINOR_SHMEM": 0x400, "UF_FEATURE_EXACT_ADDRESS": 0x800,
    "UF_FEATURE_WP_HUGETLBFS_SHMEM": 0x1000, "UF_FEATURE_WP_UNPOPULATED": 0x2000, "UF_FEATURE_POISON": 0x4000,
    "UF_FEATURE_WP_ASYNC": 0x8000, "UF_FEATURE_MOVE": 0x10000,
    "UF_REGISTER_MISSING": 1, "UF_REGISTER_WP": 2, "UF_REGISTER_MINOR": 4,
    "UF_COPY_DONTWAKE": 1, "UF_COPY_WP": 2, "UF_ZEROPAGE_DONTWAKE": 1,
    "UF_WRITEPROTECT_WP": 1, "UF_WRITEPROTECT_DONTWAKE": 2, "UF_CONTINUE_DONTWAKE": 1, "UF_CONTINUE_WP": 2,
    "UF_MOVE_DONTWAKE": 1,
    "UF_EVENT_PAGEFAULT": 0x12, "UF_EVENT_REMAP": 0x14, "UF_FLAG_WRITE": 1, "UF_FLAG_WP": 2, "UF_FLAG_MINOR": 4,
    "UF_IOC_NEW": 0x0000AA00, "UF_IOC_API": 0xC018AA3F, "UF_IOC_REGISTER": 0xC020AA00, "UF_IOC_UNREGISTER": 0x8010AA01,
    "UF_IOC_WAKE": 0x8010AA02, "UF_IOC_COPY": 0xC028AA03, "UF_IOC_ZEROPAGE": 0xC020AA04,
    "UF_IOC_WRITEPROTECT": 0xC018AA06, "UF_IOC_CONTINUE": 0xC020AA07, "UF_IOC_POISON": 0xC020AA08,
    "UF_IOC_MOVE": 0xC028AA05,
    "sizeof(struct uf_msg)": 32, "offsetof(struct uf_msg, flags)": 8, "offsetof(struct uf_msg, address)": 16,
    "offsetof(struct uf_msg, ptid)": 24, "offsetof(struct uf_copy, copy)": 32,
}


def test_the_kernels_numbers_are_right(tmp_path):
    """Compiled, since a header says what a number is only to a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    rows = "\n".join(f'    printf("%s\\t%llu\\n", "{name}", (unsigned long long)({name}));' for name in KERNEL)
    program = tmp_path / "numbers.c"
    program.write_text(f'#include "_sys.h"\n#include <stddef.h>\nint main(void)\n{{\n{rows}\n    return 0;\n}}\n')
    subprocess.run([compiler, "-std=gnu11", f"-I{ROOT / 'uffd'}", "-o", tmp_path / "numbers", program], check=True,
                   timeout=60)
    answer = subprocess.run([tmp_path / "numbers"], capture_output=True, text=True, check=True, timeout=10).stdout
    found = {name: int(value) for name, value in (line.split("\t") for line in answer.splitlines())}
    assert found == KERNEL


@pytest.mark.parametrize("path", sources(".h"))
def test_c_code_gives_no_warning(tmp_path, path):
    """By itself: in the extension, two warnings are off that Cython's own code gives."""
    compiler = shutil.which("gcc")
    if not compiler:
        pytest.skip("no gcc")
    (tmp_path / "one.c").write_text(f'#include "{path.name}"\n')
    done = subprocess.run([compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function",
                           f"-I{path.parent}", "-c", "-o", tmp_path / "one.o", tmp_path / "one.c"],
                          capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_kernel_number_of_the_header_is_among_those():
    text = (ROOT / "uffd" / "_sys.h").read_text()
    prefixes = "FEATURE|REGISTER|COPY|MOVE|ZEROPAGE|WRITEPROTECT|CONTINUE|EVENT|FLAG|IOC|API|USER"
    named = set(re.findall(rf"\b(UF_(?:{prefixes})_\w+)\b", text))
    assert named == {name for name in KERNEL if name.startswith("UF_")}


# The project


@pytest.mark.parametrize("target", ["demo", "test", "stress", "bench", "sanitize", "lint", "wheel", "clean"])
def test_the_makefile_has_the_target(target):
    if not shutil.which("make"):
        pytest.skip("no make")
    done = subprocess.run(["make", "-n", "-C", ROOT, target], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 0, done.stderr
    assert f"tools/dev.py {target}" in done.stdout


def test_continuous_integration_runs_the_tests():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert "make test" in script


def test_the_architecture_names_every_file():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    files = [path for path in (ROOT / "uffd").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    names = {path.parent.name + "/" if path.name == "__init__.py" else path.name for path in files}
    assert sorted(name for name in names if name not in text) == []


def test_built_files_are_not_in_the_tree():
    built = [path for pattern in ("*.so", "_core.c", "*.o") for path in (ROOT / "uffd").rglob(pattern)]
    assert built == []


# These tests themselves: that they find what they look for


def test_the_readers_of_functions_read():
    python = "def f(a,\n      b):\n    return 1\n"
    cython = ("cdef int f(int a,\n           int b) noexcept nogil:\n    return 1\n\n\ncdef int n = g(1)\n"
              "cdef class C:\n    cdef void m(self) nogil:\n        free(x)\n        pass\n\n"
              "    def p(self): return 1\n")
    c = ("static inline int f(int a)\n{\n    if (a) {\n    }\n    return g(a);\n}\n"
         "static int one(void) { return 1; }\nint h(int a,\n      int b) {\n    return 1;\n}\n")
    assert [(f.name, f.first, f.lines) for f in python_functions(python)] == [("f", 1, 3)]
    assert [(f.name, f.first, f.lines) for f in cython_functions(cython)] == [("f", 1, 3), ("m", 8, 3), ("p", 12, 1)]
    assert [(f.name, f.first, f.lines) for f in c_functions(c)] == [("f", 1, 6), ("h", 8, 4)]
    heads = [f.head for f in cython_functions(cython)]
    assert ["noexcept" in head for head in heads] == [True, False, False]
