# Every target makes what it needs by itself: virtual environments under .venv/, one abi3 wheel in dist/. A second run
# needs no network. ARGS goes to pytest (make test ARGS="-k fork"), or to the demo; PYTHONS names other interpreters
# than those that are found.
PYTHON ?= python3
PYTHONS ?=
ARGS ?=
DEV = $(PYTHON) tools/dev.py

.PHONY: help wheel demo test stress bench sanitize lint clean

help:
	@echo "make demo      the tour, on a real model"
	@echo "make test      the suite against the wheel: every CPython found, without privilege, without userfaultfd"
	@echo "make stress    the long races (UFFD_STRESS_SECONDS, default 120)"
	@echo "make bench     the benchmarks beside their floors, a table and JSON"
	@echo "make sanitize  the suite on a core built with ASan and UBSan"
	@echo "make lint      ruff, cython-lint, mypy, and the stubs against the built module"
	@echo "make wheel     the wheel alone, in dist/"
	@echo "make clean     all of what the others made away"

wheel demo test stress bench sanitize lint clean:
	@PYTHONS="$(PYTHONS)" $(DEV) $@ $(ARGS)
