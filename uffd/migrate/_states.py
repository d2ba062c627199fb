"""The states of a migration, as data: which event leads from where to where, and who owns the memory there.

Nothing here does I/O. The core runs by these very tables (`encoded`): what it does between two events is its matter,
but it goes nowhere that the tables don't lead, so a simulation of them is one of the real thing.

The hand-over has two phases. The source stops writers (FROZEN) and sends what is left of the state; the destination
answers that it could run (PREPARED there). Only then the source says COMMIT, and from that instant on it never writes
again unless the destination itself says that it gave up. The destination runs from the instant it reads COMMIT. So
there is no instant with two owners; there may be one with none, in which a broken connection is repaired by asking.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["DESTINATION", "SOURCE", "Event", "Machine", "Phase", "encoded", "owner_of", "status_name"]


class Phase(IntEnum):
    SETUP = 0
    PRECOPY = 1
    FROZEN = 2              # source: writers wait. Destination: all is prepared. Nothing is handed over
    DOUBT = 3               # source: COMMIT was sent, and no answer came yet
    POSTCOPY = 4
    PAUSED_EARLY = 5        # the connection is gone, before the hand-over: the source's program runs
    PAUSED_DOUBT = 6        # source: after COMMIT. Destination: prepared, and no COMMIT was read
    PAUSED_LATE = 7         # after the hand-over
    RECOVERING_EARLY = 8
    RECOVERING_DOUBT = 9
    RECOVERING_LATE = 10
    COMPLETED = 11
    CANCELLED = 12
    FAILED_SOURCE = 13      # failed, and the source has the memory
    FAILED_DESTINATION = 14
    FAILED_UNKNOWN = 15


class Event(IntEnum):
    DATA = 0                # the first block of precopy was sent, or came
    FREEZE = 1              # source: writers wait now. Destination: PREPARE was read
    COMMIT = 2              # source: is about to be sent. Destination: was read
    STARTED = 3             # source: the destination says that it runs
    DONE = 4                # every block is there and acknowledged
    BROKEN = 5              # a connection ended, or was told to pause
    RECONNECT = 6           # new connections were authenticated
    RESUMED_EARLY = 7       # both agree that the source has the memory
    RESUMED_LATE = 8        # both agree that the destination has it
    GIVEN_UP = 9            # the destination, prepared, stopped waiting; it will never run. Said, or heard
    CANCEL = 10             # before the hand-over, by either side
    LOST = 11               # the other side is dead, or is given up for dead


_P, _E = Phase, Event
_EARLY = (_P.SETUP, _P.PRECOPY, _P.PAUSED_EARLY, _P.RECOVERING_EARLY)

_COMMON = {
    (_P.SETUP, _E.DATA): _P.PRECOPY,
    (_P.SETUP, _E.FREEZE): _P.FROZEN,
    (_P.PRECOPY, _E.FREEZE): _P.FROZEN,
    (_P.SETUP, _E.BROKEN): _P.PAUSED_EARLY,
    (_P.PRECOPY, _E.BROKEN): _P.PAUSED_EARLY,
    (_P.POSTCOPY, _E.DONE): _P.COMPLETED,
    (_P.POSTCOPY, _E.BROKEN): _P.PAUSED_LATE,
    (_P.PAUSED_EARLY, _E.RECONNECT): _P.RECOVERING_EARLY,
    (_P.PAUSED_DOUBT, _E.RECONNECT): _P.RECOVERING_DOUBT,
    (_P.PAUSED_LATE, _E.RECONNECT): _P.RECOVERING_LATE,
    (_P.RECOVERING_EARLY, _E.BROKEN): _P.PAUSED_EARLY,
    (_P.RECOVERING_DOUBT, _E.BROKEN): _P.PAUSED_DOUBT,
    (_P.RECOVERING_LATE, _E.BROKEN): _P.PAUSED_LATE,
    (_P.RECOVERING_EARLY, _E.RESUMED_EARLY): _P.PRECOPY,
    (_P.RECOVERING_DOUBT, _E.RESUMED_LATE): _P.POSTCOPY,
    (_P.RECOVERING_LATE, _E.RESUMED_LATE): _P.POSTCOPY,
    (_P.POSTCOPY, _E.LOST): _P.FAILED_DESTINATION,
    (_P.PAUSED_LATE, _E.LOST): _P.FAILED_DESTINATION,
    (_P.RECOVERING_LATE, _E.LOST): _P.FAILED_DESTINATION,
    **{(phase, _E.CANCEL): _P.CANCELLED for phase in (*_EARLY, _P.FROZEN)},
    **{(phase, _E.LOST): _P.FAILED_SOURCE for phase in _EARLY},
}

SOURCE = {
    **_COMMON,
    (_P.FROZEN, _E.COMMIT): _P.DOUBT,
    (_P.FROZEN, _E.BROKEN): _P.PAUSED_EARLY,            # writers go on
    (_P.FROZEN, _E.LOST): _P.FAILED_SOURCE,
    (_P.DOUBT, _E.STARTED): _P.POSTCOPY,
    (_P.DOUBT, _E.BROKEN): _P.PAUSED_DOUBT,             # writers wait on: the destination may run
    (_P.DOUBT, _E.GIVEN_UP): _P.FAILED_SOURCE,
    (_P.RECOVERING_DOUBT, _E.GIVEN_UP): _P.FAILED_SOURCE,
    **{(phase, _E.LOST): _P.FAILED_UNKNOWN for phase in (_P.DOUBT, _P.PAUSED_DOUBT, _P.RECOVERING_DOUBT)},
}

DESTINATION = {
    **_COMMON,
    (_P.FROZEN, _E.COMMIT): _P.POSTCOPY,
    (_P.FROZEN, _E.BROKEN): _P.PAUSED_DOUBT,
    (_P.RECOVERING_DOUBT, _E.RESUMED_EARLY): _P.PRECOPY,    # the source had not committed, and its program ran on
    (_P.FROZEN, _E.GIVEN_UP): _P.FAILED_SOURCE,
    (_P.PAUSED_DOUBT, _E.GIVEN_UP): _P.FAILED_SOURCE,
    (_P.RECOVERING_DOUBT, _E.GIVEN_UP): _P.FAILED_SOURCE,
    # A destination that has read no COMMIT never ran: whatever became of the source, the memory is not here.
    **{(phase, _E.LOST): _P.FAILED_SOURCE for phase in (_P.FROZEN, _P.PAUSED_DOUBT, _P.RECOVERING_DOUBT)},
    **{(phase, _E.CANCEL): _P.CANCELLED for phase in (_P.PAUSED_DOUBT, _P.RECOVERING_DOUBT)},
}

_STATUS = {"FROZEN": "SWITCHOVER", "DOUBT": "SWITCHOVER"}
ILLEGAL = 255


class Machine:
    """One side of a migration. `step` takes an event and answers the new phase; ValueError for one that has no place
    there."""

    def __init__(self, side: str) -> None:
        if side not in ("source", "destination"):
            raise ValueError(f"side must be 'source' or 'destination', not {side!r}")
        self.side = side
        self.phase = Phase.SETUP

    def step(self, event: Event) -> Phase:
        table = SOURCE if self.side == "source" else DESTINATION
        if (self.phase, event) not in table:
            raise ValueError(f"{self.side}: {event.name} has no place in {self.phase.name}")
        self.phase = table[self.phase, event]
        return self.phase

    @property
    def status(self) -> str:
        return status_name(self.phase)

    @property
    def owner(self) -> str:
        return owner_of(self.side, self.phase)

    @property
    def may_write(self) -> bool:
        """Whether this side's program may write to the memory now."""
        if self.side == "source":
            return self.phase in (*_EARLY, Phase.CANCELLED, Phase.FAILED_SOURCE)
        return self.phase in (Phase.POSTCOPY, Phase.PAUSED_LATE, Phase.RECOVERING_LATE, Phase.COMPLETED,
                              Phase.FAILED_DESTINATION)


def status_name(phase: Phase) -> str:
    """The public name of a phase, one of migrate.Status."""
    return _STATUS.get(phase.name, phase.name.partition("_")[0])


def owner_of(side: str, phase: Phase) -> str:
    """Who has the memory, as far as that side knows: "source", "destination" or "unknown"."""
    if phase in (Phase.POSTCOPY, Phase.PAUSED_LATE, Phase.RECOVERING_LATE, Phase.COMPLETED, Phase.FAILED_DESTINATION):
        return "destination"
    if phase in (Phase.DOUBT, Phase.PAUSED_DOUBT, Phase.RECOVERING_DOUBT, Phase.FAILED_UNKNOWN):
        return "unknown"
    return "source"


def encoded(side: str) -> bytes:
    """The table for the core: a byte per phase and event, the next phase or ILLEGAL."""
    table = SOURCE if side == "source" else DESTINATION
    return bytes(table.get((phase, event), ILLEGAL) for phase in Phase for event in Event)
