"""For scripts in subprocesses: a source and a destination, two processes that know each other's address."""

import os
import traceback

import numpy as np  # noqa: F401
from uffd import MigrationError, migrate

from support.child import *  # noqa: F403
from support.child import wait_until

TCP = "tcp://127.0.0.1:0"


def start(destination, url=TCP, key=None, engine=None):
    """Forks a destination, which runs destination(incoming); its pid and the URL to connect to."""
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with migrate.listen(url, key=key, engine=engine) as incoming:
                os.write(w, incoming.url.encode())
                os.close(w)
                destination(incoming)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(w)
    with os.fdopen(r) as said:
        url = said.read()
    assert url, "the destination does not listen"
    return pid, url


def ended(pid):
    """The exit status of a destination; negative: the signal. The script's own deadline bounds it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fails(call, owner=None):
    """The call raises MigrationError, which says who has the memory."""
    try:
        call()
    except MigrationError as error:
        assert owner in (None, error.owner), error
    else:
        raise AssertionError("it did not fail")


def filled(nbytes, seed=0):
    """Numbers that tell where they belong."""
    return np.arange(nbytes // 8, dtype=np.int64) * 3 + seed


def status_is(one, name, timeout_s=15):
    wait_until(lambda: one.status == name, f"status {name}, not {one.status}", timeout_s)
