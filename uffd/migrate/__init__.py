"""Live migration: arrays and regions move to another process or host while they are in use.

The destination listens, the source connects. `precopy` sends memory while the source's program still writes to it;
`switchover` stops writers, hands the memory over, and the destination runs at once; what it lacks comes when it is
touched, before all else, and in the background.

    with uffd.migrate.listen("unix:/run/service.move") as incoming:         # at the destination
        arrival = incoming.accept()
        serve(arrival.arrays, arrival.state)

    with uffd.migrate.connect("unix:/run/service.move", {"x": x}) as outgoing:      # at the source
        outgoing.precopy()
        outgoing.switchover(b"what else it needs to know")

docs/migration.md says what is promised at each failure; ARCHITECTURE.md how it works.
"""

from __future__ import annotations

from ._incoming import Arrival, Incoming, listen
from ._outgoing import Outgoing, connect
from ._report import Report, Status, plot

__all__ = ["Arrival", "Incoming", "Outgoing", "Report", "Status", "connect", "listen", "plot"]
