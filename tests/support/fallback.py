"""The run of the fallback: which tests hold where regions are filled whole when they are made, and why others do not.

Here is the list, and not marks in the tests: what is left out of that run is to be seen in one place.
"""

import errno
import importlib

import pytest

from support import matrix

LAZY = "looks at what is filled when; here all is, from the start"
AT_A_TOUCH = "an error of the provider comes when the region is made here, not at a touch or a call"
DIRTY = "tells written blocks from others; here nobody sees writes"
KERNEL = "about what a userfaultfd or a system call does"

# What can't hold in the files of that run, which tools/dev.py names: (file, test) -> why. test_fallback.py looks
# whether each of them is still there.
LEFT_OUT = {
    ("test_open.py", "test_only_what_is_touched_is_filled"): LAZY,
    ("test_pack.py", "test_a_touch_fills_one_block"): LAZY,
    ("test_pinned.py", "test_pinned_populates_what_it_names"): LAZY,
    ("test_pinned.py", "test_chunks_prefetches_the_next_piece"): LAZY,
    ("test_pinned.py", "test_pinned_raises_what_the_provider_answers"): AT_A_TOUCH,
    ("test_pinned.py", "test_chunks_error_is_raised_at_its_piece"): AT_A_TOUCH,
    ("test_pinned.py", "test_pinned_in_user_mode_readinto"): KERNEL,
    ("test_pinned.py", "test_pinned_marks_no_other_block_as_written"): DIRTY,
    ("test_providers.py", "test_memory_over_a_region_of_the_same_engine_is_refused"): "it is right here",
    ("test_providers.py", "test_file_truncated_under_us"): AT_A_TOUCH,
    ("test_providers.py", "test_file_grown_again_is_repaired"): AT_A_TOUCH,
    ("test_providers.py", "test_blosc2_chunk_damaged_under_us"): AT_A_TOUCH,
    ("test_providers.py", "test_native_error_numbers"): AT_A_TOUCH,
    ("test_region.py", "test_resident_and_dirty_are_exact"): DIRTY,
    ("test_region.py", "test_huge_region_costs_nothing_until_touched"): LAZY,
    ("test_region.py", "test_auto_delivery"): KERNEL,
}


def skip_what_cannot_hold(items):
    """Mark those of a run in this mode; nothing in any other."""
    for item in items if matrix.filled_whole() else ():
        why = LEFT_OUT.get((item.path.name, getattr(item, "originalname", item.name)))
        if why:
            item.add_marker(pytest.mark.skip(reason=f"fallback: {why}"))


def ask_for_it(monkeypatch):
    """The body of a fixture: the core answers that there is no userfaultfd, and the fallback is asked for."""
    import uffd

    engine, eager = (importlib.import_module(f"uffd.{name}") for name in ("engine", "eager"))
    monkeypatch.setattr(uffd._core, "mode", lambda: ("none", errno.EPERM))
    monkeypatch.setattr(engine, "_default", None)
    monkeypatch.setattr(eager, "_told", True)
    monkeypatch.setenv("UFFD_FALLBACK", "eager")
    yield
    if isinstance(engine._default, eager.EagerEngine):
        engine._default._leave()
