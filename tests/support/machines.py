"""For state machines of hypothesis."""

import os

import hypothesis
from hypothesis.stateful import run_state_machine_as_test


def run_machine(machine, name, settings, **attributes):
    """Runs it with these attributes of its class, by a seed that is told."""
    seed = int(os.environ.get("UFFD_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"machine {name}: UFFD_SEED={seed}")
    bound = type(machine.__name__, (machine,), attributes)
    run_state_machine_as_test(hypothesis.seed(seed)(bound), settings=settings)
