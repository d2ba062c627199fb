"""Build of the one extension, uffd._core. Everything else about the package is in pyproject.toml.

Environment, read when building:
  UFFD_STRICT=1            warnings of Cython and of the C compiler, and Cython's performance hints, are errors.
                           `make` always sets it. It is not the default because a newer compiler, with warnings
                           that did not exist when a release was made, must not break `pip install`.
  UFFD_SANITIZE=LIST       -fsanitize=LIST ("address,undefined"), for `make sanitize`.
"""

import contextlib
import io
import os
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

STRICT = os.environ.get("UFFD_STRICT", "0") not in ("", "0")
SANITIZE = os.environ.get("UFFD_SANITIZE", "")
# The limited API fixes the layout of no object, so that one wheel serves 3.11 and all later versions. A free-threaded
# interpreter has no limited API.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
C_DIR = "build/cython"

WARNINGS = [
    "-Wall",
    "-Wextra",
    # The two that Cython's own code raises: `for i in range(ENUM)` with an unsigned i counts against an int, and the
    # conversion of an enum from a Python int has a stub with an argument. What is written by hand in C is held to
    # these two as well, by a test of the house that compiles the headers alone.
    "-Wno-sign-compare",
    "-Wno-unused-parameter",
]
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "embedsignature": True,
    "binding": True,
    "show_performance_hints": True,
    "autotestdict": False,  # no __test__ in the module: there are no doctests in it
}


def flags() -> tuple[list[str], list[str]]:
    compile_args = ["-std=gnu11", "-pthread", "-fvisibility=hidden", *WARNINGS]
    link_args = ["-pthread"]
    if STRICT:
        compile_args.append("-Werror")
    if SANITIZE:
        sanitize = f"-fsanitize={SANITIZE}"
        compile_args += [sanitize, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
        link_args.append(sanitize)
    return compile_args, link_args


class Tee(io.StringIO):
    """Keeps what is written, and shows it."""

    def write(self, text: str) -> int:
        sys.__stderr__.write(text)
        return super().write(text)


def compile_pyx(extension: Extension) -> list[str]:
    """The C source, from the .pyx."""
    from Cython.Build import cythonize
    from Cython.Compiler import Options

    Options.warning_errors = STRICT
    output = Tee()
    with contextlib.redirect_stderr(output):
        (made,) = cythonize([extension], build_dir=C_DIR, compiler_directives=DIRECTIVES, force=STRICT)
    # A hint (a nogil function that takes the GIL to look for an exception, say) is no warning to Cython, so that its
    # warning_errors lets it pass: it is found in what the compiler says.
    if STRICT and "performance hint" in output.getvalue():
        raise SystemExit("uffd: Cython's performance hints above are errors here (UFFD_STRICT)")
    return made.sources


class BuildCore(build_ext):
    """Cython runs when the extension is built, and not each time that setup.py is asked for something else."""

    def build_extension(self, ext: Extension) -> None:
        ext.sources = compile_pyx(ext)
        super().build_extension(ext)


def extensions() -> list[Extension]:
    # Elsewhere than on Linux the package is plain Python, and every use of it answers uffd.Unavailable.
    if not sys.platform.startswith("linux"):
        return []
    compile_args, link_args = flags()
    return [Extension(
        "uffd._core",
        ["uffd/_core.pyx"],
        depends=sorted(glob("uffd/*.pxi") + glob("uffd/*.pxd") + glob("uffd/*.h")),
        include_dirs=["uffd"],
        define_macros=[("Py_LIMITED_API", "0x030b0000")] if LIMITED else [],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        libraries=["dl"],  # dlopen, in glibc before 2.34 (manylinux_2_28); a stub since
        py_limited_api=LIMITED,
    )]


os.chdir(Path(__file__).resolve().parent)
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCore},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
