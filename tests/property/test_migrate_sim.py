"""Source, destination and link of a migration in one process, as state machines under random failures, with a seed.

The states and what leads from one to another are the package's own tables (migrate/_states.py), by which the core runs;
data, messages and failures are modelled here: two connections that are cut together with any part of what is under
way lost, noticed by the two sides at different times; either side killed, or given up, or cancelled, at any moment.

Checked at each step: never do both programs write; what the destination's program reads is what was last written,
whoever wrote it; a block is placed once after the hand-over. At the end: both sides have a verdict, and the verdicts
agree. And over all runs: every entry of both tables was used, so none is there in vain and this looks at all of them.
"""

import os
import random
from collections import Counter, deque

import pytest
from uffd.migrate import _states
from uffd.migrate._states import Event, Machine, Phase

BLOCKS = 3
RUNS = 10_000
STEPS = 50  # with failures; then they stop, and the rest has to come to an end
STEPS_MAX = 2_000
PAUSED = (Phase.PAUSED_EARLY, Phase.PAUSED_DOUBT, Phase.PAUSED_LATE)
RECOVERING = (Phase.RECOVERING_EARLY, Phase.RECOVERING_DOUBT, Phase.RECOVERING_LATE)
EARLY = (Phase.SETUP, Phase.PRECOPY)
DECISIVE = (*RECOVERING, Phase.DOUBT, Phase.PAUSED_DOUBT)  # short, and much is decided there: more fails there


class Broken(Exception):
    """A message that has no place here: the side that reads it breaks the connection."""


class Side:
    def __init__(self, name, world):
        self.machine, self.world = Machine(name), world
        self.connected, self.dead = True, False

    @property
    def phase(self):
        return self.machine.phase

    @property
    def over(self):
        return self.dead or self.machine.phase >= Phase.COMPLETED

    def step(self, event):
        self.world.used[self.machine.side, self.phase, event] += 1
        return self.machine.step(event)

    def may(self, event):
        table = _states.SOURCE if self.machine.side == "source" else _states.DESTINATION
        return (self.phase, event) in table

    def say(self, *message):
        if self.connected and self.world.up:
            self.world.queues[self.machine.side, "ask"].append(message)

    def notice(self):
        """The connection is gone, from this side's view: what had come and was not read yet goes with it."""
        self.connected = False
        self.world.up = False
        for channel in ("ask", "push"):
            self.world.queues[self.world.other(self).machine.side, channel].clear()
        if not self.dead and self.may(Event.BROKEN):
            self.step(Event.BROKEN)
        self.broke()

    def broke(self):
        pass


class Source(Side):
    def __init__(self, world):
        super().__init__("source", world)
        self.memory = [0] * BLOCKS
        self.todo, self.dirty, self.under_way = set(range(BLOCKS)), set(), []
        self.round, self.ready, self.want_switchover = False, False, False

    def broke(self):
        """What was not acknowledged is sent again: the destination may have it as it was in a round before."""
        if self.world.resends:
            self.todo.update(self.under_way)
        self.under_way.clear()
        self.round = self.ready = self.want_switchover = False

    def push(self):
        """One block by the push connection, in precopy or after the hand-over."""
        late = self.phase == Phase.POSTCOPY
        if not (late or (self.round and self.phase in EARLY)):
            return
        if not self.todo:
            self.round = False
            return
        if self.phase == Phase.SETUP:
            self.step(Event.DATA)
        block = self.world.random.choice(sorted(self.todo))
        self.todo.discard(block)
        self.under_way.append(block)
        if self.world.up:
            self.world.queues["source", "push"].append(("BLOCK", block, self.memory[block]))

    def begin_round(self):
        if self.phase in EARLY:
            self.todo |= self.dirty
            self.dirty.clear()
            self.round = True

    def hand_over(self):
        """Once the push was acknowledged: writers are stopped, and what is dirty is told, and PREPARE."""
        self.round = False
        if self.under_way or self.phase not in EARLY:
            return
        self.want_switchover = False
        self.step(Event.FREEZE)
        self.todo |= self.dirty
        self.dirty.clear()
        self.say("DIRTY", frozenset(self.todo))
        self.say("PREPARE")

    def commit(self):
        if self.phase == Phase.FROZEN and self.ready:
            self.step(Event.COMMIT)
            self.say("COMMIT")

    def take(self, kind, *rest):  # noqa: PLR0912 (a kind each)
        if kind == "ACK":
            self.under_way.remove(rest[0])
        elif kind == "READY" and self.phase == Phase.FROZEN:
            self.ready = True
        elif kind == "STARTED" and self.phase in (Phase.DOUBT, Phase.POSTCOPY):
            if self.phase == Phase.DOUBT:
                self.step(Event.STARTED)
        elif kind == "WANT":
            if self.phase == Phase.DOUBT:
                self.step(Event.STARTED)
            if self.phase != Phase.POSTCOPY:
                raise Broken
            if rest[0] in self.todo:
                self.todo.discard(rest[0])
                self.say("BLOCK", rest[0], self.memory[rest[0]])
        elif kind == "HAVE" and self.phase in RECOVERING:
            lacks, running = rest
            if running:
                self.todo = set(lacks)
            else:
                self.todo |= lacks
            self.step(Event.RESUMED_LATE if running else Event.RESUMED_EARLY)
        elif kind == "DONE" and self.may(Event.DONE):
            self.step(Event.DONE)
        elif kind == "ENDED":  # it runs, and wants no more
            if self.phase in (Phase.DOUBT, Phase.RECOVERING_DOUBT):
                self.step(Event.STARTED if self.phase == Phase.DOUBT else Event.RESUMED_LATE)
            if not self.may(Event.LOST):
                raise Broken
            self.step(Event.LOST)
        elif kind == "GAVE_UP":
            event = next((one for one in (Event.GIVEN_UP, Event.CANCEL) if self.may(one)), None)
            if event is None:
                raise Broken
            self.step(event)
        else:
            raise Broken


class Destination(Side):
    def __init__(self, world):
        super().__init__("destination", world)
        self.memory = {}  # of blocks that came
        self.lacks = set(range(BLOCKS))

    def take(self, kind, *rest):
        if kind == "BLOCK":
            self.take_block(*rest)
        elif kind == "DIRTY" and self.phase in EARLY:
            self.lacks |= rest[0]
            for block in rest[0]:
                self.memory.pop(block, None)
        elif kind == "PREPARE" and self.may(Event.FREEZE):
            self.step(Event.FREEZE)
            self.say("READY")
        elif kind == "COMMIT" and self.phase == Phase.FROZEN:
            self.run(Event.COMMIT)
        elif kind == "RESUME":
            self.take_resume(*rest)
        elif kind == "CANCEL" and self.may(Event.CANCEL):
            self.step(Event.CANCEL)
        elif kind == "LOST" and self.may(Event.LOST):
            self.step(Event.LOST)
        else:
            raise Broken

    def take_block(self, block, value):
        if self.phase == Phase.SETUP:
            self.step(Event.DATA)
        if self.phase not in (Phase.PRECOPY, Phase.FROZEN, Phase.POSTCOPY):
            raise Broken
        if self.phase == Phase.POSTCOPY:
            if block not in self.lacks:  # it is the program's by now
                self.world.doubled += 1
                return
            self.world.placed[block] += 1
        self.memory[block] = value
        self.lacks.discard(block)
        self.finish()

    def take_resume(self, committed):
        running = self.phase in (Phase.RECOVERING_LATE, Phase.COMPLETED)
        if self.phase not in (*RECOVERING, Phase.COMPLETED) or (running and not committed):
            raise Broken
        self.say("HAVE", frozenset(self.lacks), running or committed)
        if self.phase == Phase.COMPLETED:
            self.say("DONE")
            return
        self.step(Event.RESUMED_LATE if committed else Event.RESUMED_EARLY)
        self.finish()

    def run(self, event):
        self.step(event)
        self.say("STARTED")
        self.finish()

    def finish(self):
        if self.phase == Phase.POSTCOPY and not self.lacks:
            self.step(Event.DONE)
            self.say("DONE")


class World:
    def __init__(self, seed, resends=True, vague=False):
        self.random, self.used, self.resends, self.vague = random.Random(seed), Counter(), resends, vague
        self.up, self.doubled, self.breaks, self.placed = True, 0, 0, Counter()
        self.truth, self.writes = [0] * BLOCKS, 0
        self.queues = {(side, channel): deque() for side in ("source", "destination") for channel in ("push", "ask")}
        self.source, self.destination = Source(self), Destination(self)
        self.steps = 0

    def other(self, side):
        return self.destination if side is self.source else self.source

    # ---- the two programs ----

    def source_writes(self):
        if self.source.machine.may_write and not self.source.dead:
            block = self.random.randrange(BLOCKS)
            self.writes += 1
            self.source.memory[block] = self.truth[block] = self.writes
            self.source.dirty.add(block)

    def destination_runs(self):
        side = self.destination
        if not side.machine.may_write or side.dead:
            return
        block = self.random.randrange(BLOCKS)
        if block in side.lacks:
            if side.phase == Phase.POSTCOPY:
                side.say("WANT", block)
            return
        assert side.memory[block] == self.truth[block], f"block {block} is stale"
        if self.random.random() < 0.5:
            self.writes += 1
            side.memory[block] = self.truth[block] = self.writes

    # ---- the link ----

    def deliver(self):
        waiting = [key for key, queue in self.queues.items() if queue]
        if not waiting:
            return
        key = self.random.choice(waiting)
        side = self.destination if key[0] == "source" else self.source
        message = self.queues[key].popleft()
        if (side.over and side.phase != Phase.COMPLETED) or side.dead or not side.connected:
            return
        try:
            side.take(*message)
        except Broken:
            side.notice()
            return
        if key == ("source", "push") and self.up:
            self.queues["destination", "push"].append(("ACK", message[1]))

    def cut(self):
        """Of what is under way in each direction, a part still arrives; nothing that is said later does."""
        self.up = False
        self.breaks += 1
        for queue in self.queues.values():
            for _ in range(self.random.randint(0, len(queue))):
                queue.pop()

    def notice(self):
        side = self.random.choice((self.source, self.destination))
        if not self.up and side.connected:
            side.notice()

    def reconnect(self):
        source, destination = self.source, self.destination
        if self.up or source.connected or destination.connected or source.dead or destination.dead:
            return
        if source.phase not in PAUSED or destination.phase not in (*PAUSED, Phase.COMPLETED):
            return
        for queue in self.queues.values():
            queue.clear()
        self.up = source.connected = destination.connected = True
        source.step(Event.RECONNECT)
        if destination.phase != Phase.COMPLETED:
            destination.step(Event.RECONNECT)
        source.say("RESUME", source.phase != Phase.RECOVERING_EARLY)

    # ---- what people do ----

    def kill(self):
        side = self.random.choice((self.source, self.destination))
        side.dead = True
        side.connected = False
        self.cut()

    def give_up(self, side=None):
        """close() at one side while it is not over."""
        side = side or self.random.choice((self.source, self.destination))
        if side.over:
            return
        if side is self.destination and side.may(Event.GIVEN_UP) and self.random.random() < 0.5:
            side.step(Event.GIVEN_UP)
            side.say("GAVE_UP")
        elif side.may(Event.LOST):
            side.step(Event.LOST)
            side.say("LOST" if side is self.source else
                     "GAVE_UP" if side.phase == Phase.FAILED_SOURCE or self.vague else "ENDED")

    def cancel(self):
        side = self.random.choice((self.source, self.destination))
        if not side.over and side.may(Event.CANCEL):
            side.step(Event.CANCEL)
            side.say("CANCEL" if side is self.source else "GAVE_UP")

    # ---- a run ----

    def ordinary(self):
        source, choice = self.source, self.random.random()
        if choice < 0.42:
            self.deliver()
        elif choice < 0.54:
            self.source_writes()
        elif choice < 0.66:
            self.destination_runs()
        elif choice < 0.84 and not source.over and source.connected:
            source.push()
        elif choice < 0.88 and not source.over and source.connected:
            source.begin_round()
        elif not source.over and source.connected:
            source.commit()
            if source.phase in EARLY and (source.want_switchover or choice > 0.97):
                source.want_switchover = True
                source.hand_over()
        if not self.up:
            self.notice()
            self.reconnect()

    def failure(self):
        choice = self.random.random()
        if choice < (0.4 if self.source.phase in DECISIVE else 0.8):
            self.cut()
        elif choice < (0.5 if self.source.phase in DECISIVE else 0.88):
            self.kill()
        elif choice < 0.95:
            self.give_up()
        else:
            self.cancel()

    def check(self):
        both = [side for side in (self.source, self.destination) if side.machine.may_write and not side.dead]
        assert len(both) < 2, f"two owners: {self.source.phase.name} and {self.destination.phase.name}"

    def run(self, failures):
        while not (self.source.over and self.destination.over):
            self.steps += 1
            assert self.steps < STEPS_MAX, f"no end: {self.source.phase.name}, {self.destination.phase.name}"
            share = failures * 4 if self.source.phase in DECISIVE else failures
            if self.steps < STEPS and self.random.random() < share:
                self.failure()
            else:
                self.ordinary()
            if self.steps > STEPS:
                self.help_to_an_end()
            self.check()
        self.verdicts()

    def help_to_an_end(self):
        """Failures are over. Who has nobody left to talk to is closed by its program."""
        if self.source.phase in EARLY:
            self.source.want_switchover = True
            if self.random.random() < 0.3 and self.source.connected:
                self.source.hand_over()
        for side in (self.source, self.destination):
            if not side.over and not side.connected and self.other(side).over and (
                    self.other(side).dead or self.other(side).phase != Phase.COMPLETED):
                self.give_up(side)
            elif not side.over and self.other(side).over and self.other(side).phase != Phase.COMPLETED and self.up \
                    and not any(self.queues.values()):
                self.cut()

    def verdicts(self):
        source, destination = self.source, self.destination
        says = {side.machine.side: side.machine.owner for side in (source, destination) if not side.dead}
        ran = destination.machine.may_write
        if says.get("source") == "source":
            assert not ran, "the source believes that it has the memory, and the destination ran"
        if says.get("source") == "destination" and "destination" in says:
            assert ran, "the source believes that the destination runs, and it never did"
        if "destination" in says:
            assert says["destination"] == ("destination" if ran else "source")
        if destination.phase == Phase.COMPLETED:
            assert [destination.memory[block] for block in range(BLOCKS)] == self.truth, "stale"
            assert source.dead or source.machine.owner != "source"
        if ran:
            assert all(count == 1 for count in self.placed.values()), "placed twice"
            assert all(destination.memory[block] == self.truth[block] for block in destination.memory
                       if block not in destination.lacks), "stale"
        if not self.breaks and not self.doubled and self.source.phase == Phase.COMPLETED:
            assert self.destination.phase == Phase.COMPLETED


def run_all(seed, runs, failures=0.06, **options):
    used = Counter()
    for number in range(runs):
        world = World(f"{seed}:{number}", **options)
        try:
            world.run(failures)
        except AssertionError as error:
            raise AssertionError(f"UFFD_SEED={seed}, run {number}, step {world.steps}: {error}") from error
        used.update(world.used)
    return used


@pytest.mark.deadline(120)
def test_under_random_failures_there_is_one_owner_and_every_byte_is_right():
    seed = os.environ.get("UFFD_SEED", "1")
    print(f"UFFD_SEED={seed}")
    used = run_all(seed, RUNS)
    for side, table in (("source", _states.SOURCE), ("destination", _states.DESTINATION)):
        unused = [(phase.name, event.name) for phase, event in table if not used[side, phase, event]]
        assert unused == [], f"{side}: entries that no run came through"


def test_without_failures_every_run_completes():
    used = run_all("calm", 300, failures=0)
    assert used["source", Phase.POSTCOPY, Event.DONE] == used["destination", Phase.POSTCOPY, Event.DONE] == 300


@pytest.mark.parametrize(("fault", "found"), [({"resends": False}, "stale"), ({"vague": True}, "two owners")])
def test_it_finds_the_faults_that_the_core_once_had(fault, found):
    """The simulation itself. resends: a source forgot what a break had lost. vague: a destination that ran, and was
    closed, said no more than that it gave up, which the source took for never having run."""
    with pytest.raises(AssertionError, match=found):
        run_all("faults", 10000, **fault)


@pytest.mark.parametrize(("side", "phase", "event", "becomes"), [
    ("destination", Phase.FROZEN, Event.BROKEN, Phase.PAUSED_LATE),     # runs without having read COMMIT
    ("source", Phase.DOUBT, Event.BROKEN, Phase.PAUSED_EARLY),          # writes while the destination may run
    ("source", Phase.DOUBT, Event.LOST, Phase.FAILED_SOURCE),           # claims what it can't know
])
def test_it_finds_a_wrong_entry(monkeypatch, side, phase, event, becomes):
    monkeypatch.setitem(_states.SOURCE if side == "source" else _states.DESTINATION, (phase, event), becomes)
    with pytest.raises((AssertionError, ValueError)):
        run_all("wrong", 3000)
