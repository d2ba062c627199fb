"""The provider host's Python, uffd/_host.py, against an engine and a HostEnd written in Python: support/fakehost.py."""

import errno
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import uffd
from support.fakehost import BLOCK_BYTES, READ, FakeEngine, Failed, read_until
from support.fakeproviders import (
    Answers, Breakpoint, ChecksItsCalls, Children, Dies, FailsToClose, Gated, LeavesThreads, Many, Offers, OnlyMany,
    OpensAtTheSecondTry, Says, StuckAtClose, Writes, WrongAboutItself,
)
from support.hosted import Pattern, Prints, lines
from support.pattern import pattern


@pytest.fixture(scope="module")
def shared():
    """A host for all tests that leave it as they found it."""
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def own():
    with FakeEngine() as engine:
        yield engine


def wait_for_line(log, line, count=1):
    deadline = time.monotonic() + 20
    while lines(log).count(line) < count:
        assert time.monotonic() < deadline, lines(log)
        time.sleep(0.002)


def settle(engine):
    """Until the host has received all that was sent: it frees a session that nobody knows."""
    engine.tell("close", 1 << 40)
    engine.wait("freed", 1 << 40)


def text_of(engine, session):
    return engine.read(session).tobytes().decode().strip()


def failure(engine, session, **where):
    with pytest.raises(Failed) as caught:
        engine.read(session, **where)
    return caught.value.errno, caught.value.text


# ---- opening and reading


def test_content(shared):
    """Goal: a provider is opened with what it says of itself, and its reads fill right bytes, of whole and part pages.
    Method: the provider asserts what its docstring promises about `out` and the order of calls."""
    session = shared.session(ChecksItsCalls(123456, concurrency=3))
    assert tuple(shared.open(session)) == (123456, 3, False, False, False)
    for offset, nbytes in ((0, BLOCK_BYTES), (BLOCK_BYTES, 1 << 20), (4 * BLOCK_BYTES, 1), (5 * BLOCK_BYTES, 4099)):
        assert np.array_equal(shared.read(session, offset, nbytes), pattern(offset, nbytes))


def test_open_is_called_once(shared, tmp_path):
    """Goal: a second OPEN is answered, and calls nothing; a READ that comes first opens by itself and says so."""
    log = str(tmp_path / "log")
    session = shared.session(Pattern(BLOCK_BYTES, log))
    assert np.array_equal(shared.read(session), pattern(0, BLOCK_BYTES))
    assert shared.wait("answer", -1, "opened", session)[0].nbytes == BLOCK_BYTES
    assert shared.open(session).nbytes == BLOCK_BYTES
    assert [line.split()[0] for line in lines(log)] == ["open", "read"]


def test_failing_open_is_tried_again(shared, tmp_path):
    """Goal: open() that fails has its errno and traceback told; the next request opens a new instance."""
    session = shared.session(OpensAtTheSecondTry(None, str(tmp_path / "log")))
    with pytest.raises(Failed) as caught:
        shared.open(session)
    assert caught.value.errno == errno.ECONNREFUSED
    assert caught.value.text.rstrip().endswith("ConnectionRefusedError: [Errno 111] not yet")
    assert np.array_equal(shared.read(session), pattern(0, BLOCK_BYTES))
    assert len(lines(tmp_path / "log")) == 3


@pytest.mark.parametrize("claims", [{"nbytes": "many"}, {"nbytes": -1}, {"concurrency": 0}, {"concurrency": None},
                                    {"concurrency": 1.5}], ids=str)
def test_wrong_attributes_are_refused(shared, tmp_path, claims):
    """Goal: what a provider wrongly says of itself fails its opening in words, and it is closed again."""
    log = str(tmp_path / "log")
    with pytest.raises(Failed, match="must be"):
        shared.open(shared.session(WrongAboutItself(log, **claims)))
    assert lines(log) == ["open", "close"]


def test_function(shared):
    """Goal: a plain function is a provider; a lambda travels by cloudpickle."""
    pytest.importorskip("cloudpickle")
    seven = 7
    session = shared.session(lambda offset, out: out.fill(seven + offset // BLOCK_BYTES))
    assert tuple(shared.open(session)) == (None, 1, False, False, False)
    assert set(shared.read(session, BLOCK_BYTES)) == {8}


def test_a_provider_that_writes_says_so(shared):
    """Goal: the engine learns which providers can write."""
    assert shared.open(shared.session(Writes())).writes


# ---- failing


WRONG = [
    ("too_little", errno.EIO, "short fill: read() says that it filled 100 of the 65536 bytes"),
    ("too_much", errno.EIO, "wrong size: read() says that it filled 1073741824 bytes"),
    ("true", errno.EIO, "wrong type: read() returned bool"),
    ("data", errno.EIO, "wrong type: read() returned bytes"),
    ("itself", errno.EIO, "wrong type: read() returned ndarray"),
    ("unfilled", errno.EIO, "not filled whole"),
    ("os_error", errno.ENOENT, "FileNotFoundError: [Errno 2] gone: '/the/file'"),
    ("os_error_without_errno", errno.EIO, "TimeoutError: slow"),
    ("odd_errno", errno.EIO, "[Errno 123456] odd"),
    ("key_error", errno.EIO, "KeyError: 'inner'\n\nThe above exception was the direct cause"),
    ("leaves", errno.EIO, "SystemExit: leaving"),
    ("interrupted", errno.EIO, "KeyboardInterrupt"),
    ("hostile", errno.EIO, "HostileError"),
    ("surrogates", errno.EIO, "ValueError: caf"),
    ("in_a_region", errno.EIO, "a provider host starts no hosts of its own"),
]


@pytest.mark.parametrize(("how", "number", "words"), WRONG, ids=[how for how, _, _ in WRONG])
def test_failures_have_their_own_words(shared, how, number, words):
    """Goal: whatever a provider raises or returns fails its request with errno and text; the host goes on.
    Method: no frame of ours is in the text, and the next read of another session is right."""
    found, text = failure(shared, shared.opened(Answers(how)))
    assert found == number and words in text
    if how != "in_a_region":
        assert "_host.py" not in text and "providers/hosted.py" not in text
    if "Error" in words:
        assert text.startswith("Traceback") and "fakeproviders.py" in text
    assert np.array_equal(shared.read(shared.opened(Pattern())), pattern(0, BLOCK_BYTES))


@pytest.mark.parametrize("how", ["nothing", "its_size", "its_size_by_numpy"])
def test_right_answers(shared, how):
    """Goal: None, or the number of bytes, is right."""
    assert np.array_equal(shared.read(shared.opened(Answers(how))), pattern(0, BLOCK_BYTES))


def test_a_provider_that_keeps_out_is_told_so_once():
    """Goal: one warning per region on stderr, with the region's name."""
    with FakeEngine(stderr=subprocess.PIPE) as engine:
        session = engine.opened(Answers("keeps"), "the hoard")
        for at in range(3):
            engine.read(session, at * BLOCK_BYTES)
        assert engine.end() == 0
        told = engine.host.stderr.read().decode()
        assert told.count("kept `out`") == 1 and "'the hoard'" in told


def test_a_pickle_that_can_not_be_loaded(shared):
    """Goal: a module or a name that is not there is told with the cure, as the last line; so is any other error."""
    module = b"\x80\x05cno_such_module\nThing\n."
    name = b"\x80\x05csupport.fakeproviders\nNoSuchThing\n."
    other = b"\x80\x05cbuiltins\nint\n\x8c\x01x\x85R."
    head = (uffd.providers.hosted.pickled(Pattern()))
    size = 8 + int.from_bytes(head[:8], "little")
    for tail, words in ((module, "No module named 'no_such_module'. The module must be found"),
                        (name, "NoSuchThing"), (other, "ValueError: invalid literal")):
        with pytest.raises(Failed) as caught:
            shared.open(shared.session(head[:size] + tail))
        last = caught.value.text.splitlines()[-1]
        assert last.startswith("the provider can't be unpickled in the provider host") and words in last


def test_an_unknown_session_fails(shared):
    """Goal: what the engine does not hand over is a failure of the request alone."""
    assert failure(shared, 123456)[0] == errno.ENOENT


# ---- several at once


def test_read_many(own, tmp_path):
    """Goal: requests that wait are given together, sorted; one alone is read by read(); a failure fails all.
    Method: the first request stops in the provider until the others are posted."""
    log = str(tmp_path / "log")
    (tmp_path / "log.gate").touch()
    session = own.session(Many(None, log))
    assert own.open(session).read_many
    posted = [own.post(session, 0)]
    wait_for_line(log, "one")
    posted += [own.post(session, at * BLOCK_BYTES) for at in (5, 3, 4)]
    settle(own)
    (tmp_path / "log.open").touch()
    for at, one in zip((0, 5, 3, 4), posted, strict=True):
        assert np.array_equal(own.answer(one), pattern(at * BLOCK_BYTES, BLOCK_BYTES))
    assert lines(log)[1:] == ["one", "196608+65536 262144+65536 327680+65536"]
    (tmp_path / "log.open").unlink()
    posted = [own.post(session, 0)]
    wait_for_line(log, "one", 2)
    posted += [own.post(session, at * BLOCK_BYTES) for at in (1, 2)]
    settle(own)
    (tmp_path / "log.fail").touch()
    (tmp_path / "log.open").touch()
    own.answer(posted[0])
    for one in posted[1:]:
        with pytest.raises(Failed, match="ValueError: all of them"):
            own.answer(one)


def test_read_many_alone_is_enough(shared):
    """Goal: a provider with read_many and no read serves single requests, too."""
    assert np.array_equal(shared.read(shared.opened(OnlyMany())), pattern(0, BLOCK_BYTES))


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrency_is_reached_and_others_go_on(own, tmp_path, limit):
    """Goal: as many threads as the provider allows are in it, and another region is served meanwhile.
    Method: the provider's reads wait for a file; `limit` of them must be inside before it is made."""
    log, gate = str(tmp_path / "log"), tmp_path / "gate"
    slow = own.opened(Gated(log, str(gate), limit))
    quick = own.opened(Pattern())
    posted = [own.post(slow, at * BLOCK_BYTES) for at in range(limit + 2)]
    for at in range(limit):
        wait_for_line(log, f"in {at * BLOCK_BYTES}")
    for at in range(5):
        assert np.array_equal(own.read(quick, at * BLOCK_BYTES), pattern(at * BLOCK_BYTES, BLOCK_BYTES))
    assert len([line for line in lines(log) if line.startswith("in")]) == limit
    gate.touch()
    for at, one in enumerate(posted):
        assert np.array_equal(own.answer(one), pattern(at * BLOCK_BYTES, BLOCK_BYTES))


def test_threads_are_made_as_needed(own, tmp_path):
    """Goal: a host whose requests come one by one has as many threads as it needs: one at work, one that waits."""
    session = own.opened(Says("threads"))
    assert {text_of(own, session) for _ in range(20)} <= {"1", "2"}
    log, gate = str(tmp_path / "log"), tmp_path / "gate"
    slow = own.opened(Gated(log, str(gate), 8))
    posted = [own.post(slow, at * BLOCK_BYTES) for at in range(8)]
    for at in range(8):
        wait_for_line(log, f"in {at * BLOCK_BYTES}")
    assert 9 <= int(text_of(own, session)) <= 11
    gate.touch()
    for one in posted:
        own.answer(one)


def test_many_regions(own):
    """Goal: more sessions than threads may be made; each serves its own bytes."""
    sessions = [own.opened(Pattern()) for _ in range(100)]
    for at, session in enumerate(sessions):
        assert np.array_equal(own.read(session, at * BLOCK_BYTES), pattern(at * BLOCK_BYTES, BLOCK_BYTES))


# ---- closing


def test_close_comes_after_the_last_read(own, tmp_path):
    """Goal: a session that is closed while a read runs is closed after it, then freed; what comes later fails."""
    log, gate = str(tmp_path / "log"), tmp_path / "gate"
    session = own.opened(Gated(log, str(gate), 2))
    posted = own.post(session)
    wait_for_line(log, "in 0")
    own.tell("close", session)
    own.read(own.opened(Pattern()))
    assert "close" not in [line.split()[0] for line in lines(log)]
    gate.touch()
    assert np.array_equal(own.answer(posted), pattern(0, BLOCK_BYTES))
    own.wait("freed", session)
    assert [line.split()[0] for line in lines(log)] == ["open", "in", "out", "close"]
    del own.pickles[session]
    assert failure(own, session)[0] == errno.ENOENT


def test_a_session_that_was_never_opened_is_freed(shared):
    """Goal: each CLOSE is followed by a free, whether the host knew the session or not."""
    shared.tell("close", 4711)
    shared.wait("freed", 4711)


def test_close_that_fails_is_told():
    """Goal: an exception in close() is printed with the region's name, and ends nothing."""
    with FakeEngine(stderr=subprocess.PIPE) as engine:
        session = engine.opened(FailsToClose(), "the vault")
        engine.tell("close", session)
        engine.wait("freed", session)
        engine.read(engine.opened(Pattern()))
        assert engine.end() == 0
        told = engine.host.stderr.read().decode()
        assert "'the vault'" in told and "ValueError: the door is stuck" in told


def test_the_end_of_service(own, tmp_path):
    """Goal: at the end of service every provider is closed once, and the host ends with status 0."""
    logs = [str(tmp_path / f"log{at}") for at in range(5)]
    for log in logs:
        own.read(own.opened(Pattern(None, log)))
    assert own.end() == 0
    for log in logs:
        assert [line.split()[0] for line in lines(log)] == ["open", "read", "close"]


@pytest.mark.parametrize("stuck", [LeavesThreads, StuckAtClose])
def test_nothing_holds_up_the_end(own, tmp_path, stuck):
    """Goal: a read or a close() that never ends, and threads that are no daemons, don't keep the host alive; the other
    providers are closed."""
    log, other = str(tmp_path / "log"), str(tmp_path / "other")
    own.opened(Pattern(None, other))
    session = own.opened(stuck(None, log))
    if stuck is LeavesThreads:
        own.post(session)
        wait_for_line(log, "in")
    assert own.end() == 0
    assert [line.split()[0] for line in lines(other)] == ["open", "close"]


def test_prints_come_out():
    """Goal: what a provider prints is there in the end, and while it runs, by the line."""
    with FakeEngine(stdout=subprocess.PIPE, stderr=subprocess.PIPE) as engine:
        engine.read(engine.opened(Prints()))
        assert read_until(engine.host.stdout, b"\n") == b"hello from the provider\n"
        assert engine.end() == 0
        assert engine.host.stderr.read() == b"and a complaint\n"


def test_a_crash_is_the_engines_business(own):
    """Goal: a provider that kills its process kills the host, by that signal."""
    own.post(own.opened(Dies()))
    assert own.exit_code() == -signal.SIGSEGV


# ---- the process


def test_signals(own):
    """Goal: nothing is blocked, Ctrl-C is ignored, and SIGCHLD and SIGALRM do what they do by default."""
    session = own.opened(Says("signals"))
    blocked, ignored = text_of(own, session).split(" ", 1)
    assert blocked == "0"
    assert str(int(signal.SIGINT)) in ignored.strip("[]").split(", ")
    assert str(int(signal.SIGCHLD)) not in ignored.strip("[]").split(", ")
    own.host.send_signal(signal.SIGINT)
    text_of(own, session)


def ignore_child_signal(engine):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def test_a_program_that_ignores_its_children():
    """Goal: what the program ignores does not break a provider that waits for its own children."""
    with FakeEngine(preexec=ignore_child_signal) as engine:
        assert text_of(engine, engine.opened(Children("fork"))) == "7"


def test_descriptors():
    """Goal: the host has its own two descriptors, not inheritable, and none of the program's but stdout and stderr;
    stdin is /dev/null."""
    other, end = os.pipe()
    with FakeEngine(more_fds=(other, end)) as engine:
        os.close(end)
        found = eval(text_of(engine, engine.opened(Says("files"))))
        assert os.read(other, 1) == b""          # the end of file: nobody has its other end
        os.close(other)
        assert found[0] == ("/dev/null", True)
        assert found[engine.channel_fd] == ("/memfd:fake-channel (deleted)", False)
        assert found[engine.control_number][1] is False
        assert [fd for fd, (_, inheritable) in found.items() if inheritable] == [0, 1, 2]


def without_stdin(engine):
    os.close(0)


def test_a_program_without_stdin():
    """Goal: the place of a closed stream is taken, so that no file of a provider's gets its number."""
    with FakeEngine(preexec=without_stdin) as engine:
        assert eval(text_of(engine, engine.opened(Says("files"))))[0] == ("/dev/null", True)


def channel_as_stdin(engine):
    os.dup2(engine.channel_fd, 0)
    os.close(1)


def test_a_program_without_standard_streams():
    """Goal: a descriptor of ours under the number of a stream is moved away, and prints reach nobody's memory."""
    with FakeEngine(preexec=channel_as_stdin, channel_number=0, stderr=subprocess.DEVNULL) as engine:
        engine.read(engine.opened(Prints()))
        found = eval(text_of(engine, engine.opened(Says("files"))))
        assert found[0] == found[1] == ("/dev/null", True)
        assert np.array_equal(engine.read(engine.opened(Pattern())), pattern(0, BLOCK_BYTES))


def test_place(shared, tmp_path, monkeypatch):
    """Goal: a provider is opened where the program stood when it gave it, with its arguments, and knows where it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["program", "--option"])
    assert text_of(shared, shared.opened(Says("place"))) == f"{tmp_path} ['program', '--option'] True"
    assert not uffd.providers.hosted.in_host()


def test_a_directory_that_is_gone(shared, tmp_path, monkeypatch):
    """Goal: a program whose working directory was deleted can still give providers."""
    place = tmp_path / "gone"
    place.mkdir()
    monkeypatch.chdir(place)
    place.rmdir()
    assert np.array_equal(shared.read(shared.opened(Pattern())), pattern(0, BLOCK_BYTES))


CHILDREN = {"fork": "7", "subprocess": "hello", "pool_fork": "[0, 1, 4, 9]", "pool_spawn": "[0, 1, 4, 9]",
            "pool_sends_itself": "hello", "forked_child_returns": "1"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("how", "words"), CHILDREN.items(), ids=CHILDREN)
def test_a_provider_may_have_children(own, how, words):
    """Goal: fork, subprocess and multiprocessing work in a provider; a forked child that returns into the host ends."""
    assert text_of(own, own.opened(Children(how))) == words
    assert own.end() == 0


# ---- offering


OFFERED = {
    "bytes": [(BLOCK_BYTES, 0, (1, BLOCK_BYTES))],
    "array": [(BLOCK_BYTES, 0, (1, 16 * BLOCK_BYTES))],
    "fortran": [(BLOCK_BYTES, 0, (1, 6))],
    "large": [(3 * BLOCK_BYTES, 0, (1, (16 << 20) - 3 * BLOCK_BYTES)), (16 << 20, 0, (1, 16 << 20)),
              (32 << 20, 0, (1, (8 << 20) + 3 * BLOCK_BYTES + 5))],
    "rows": [(BLOCK_BYTES, 10 * BLOCK_BYTES, (3, BLOCK_BYTES))],
}


@pytest.mark.parametrize(("what", "messages"), OFFERED.items(), ids=OFFERED)
def test_offers(shared, what, messages):
    """Goal: what is offered reaches the engine as bytes in C order; what is too large for its buffer is cut where
    blocks begin."""
    session = shared.opened(Offers(what))
    shared.read(session)
    for expected in messages:
        offset, step, shape, head = shared.wait("offer", session)
        assert (offset, step, shape) == expected
    if what == "fortran":
        assert head == bytes(range(6))


def test_wrong_offers(shared):
    """Goal: an offset before the beginning is a ValueError of the provider's call."""
    assert "ValueError: offset and step must be >= 0" in failure(shared, shared.opened(Offers("negative")))[1]


def test_offers_outside_of_a_host_do_nothing():
    """Goal: a provider can be tried out in any process."""
    assert Pattern().offer(0, b"123") is False


# ---- debugging


def test_debugging():
    """Goal: with UFFD_HOST_DEBUG=1 breakpoint() talks to the program's terminal, failures are printed as they happen,
    and faulthandler is on."""
    with FakeEngine({"UFFD_HOST_DEBUG": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE) as engine:
        assert text_of(engine, engine.opened(Says("faulthandler"))) == "True"
        posted = engine.post(engine.opened(Breakpoint()), 3 * BLOCK_BYTES, kind=READ)
        engine.host.stdin.write(b"p 'offset', offset\nc\n")
        engine.host.stdin.flush()
        assert b"('offset', 196608)" in read_until(engine.host.stdout, b"196608)")
        assert np.array_equal(engine.answer(posted), pattern(3 * BLOCK_BYTES, BLOCK_BYTES))
        failure(engine, engine.opened(Answers("key_error"), "the cellar"))
        told = read_until(engine.host.stderr, b"ValueError: outer")
        assert b"'the cellar'" in told and b"Traceback" in told


def test_interrupts_while_debugging(tmp_path):
    """Goal: Ctrl-C while debugging does not end the host: the program has it, too, and decides."""
    with FakeEngine({"UFFD_HOST_DEBUG": "1"}) as engine:
        session = engine.opened(Pattern())
        engine.host.send_signal(signal.SIGINT)
        assert np.array_equal(engine.read(session), pattern(0, BLOCK_BYTES))
        assert engine.end() == 0
