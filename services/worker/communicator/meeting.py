"""How the ranks of an epoch meet: each connects two communicators, one for the model and one for exchange."""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import cast

from services.worker.communicator import RendezvousHandle, create, open_rendezvous
from services.worker.communicator.base import Communicator, Kind
from shared.messages import Assign, Join, Rendezvous


class Meeting:
    """One rank's part in it. `slot_bytes`: what a rank says at a time over the one communicator, and over the other."""

    def __init__(self, slot_bytes: tuple[int, int], timeout_s: float):
        self._slot_bytes = slot_bytes
        self._timeout_s = timeout_s
        self._open: list[RendezvousHandle] = []

    def open(self, assign: Assign, host: str) -> Rendezvous:
        """For rank 0: where the others, who reach this one as `host`, find it."""
        kind = cast(Kind, assign.communicator)
        for slot_bytes in self._slot_bytes:
            self._open.append(open_rendezvous(kind, assign.size, host=host, slot_bytes=slot_bytes))
        return Rendezvous(assign.epoch, *(each.address for each in self._open))

    def connect(self, assign: Assign, join: Join, cancelled: threading.Event) -> Sequence[Communicator]:
        """The model's communicator and that for exchange, when all ranks are there. Raises as `create` does."""
        made: list[Communicator] = []
        with ExitStack() as undo:
            for address, slot_bytes in zip((join.model_address, join.exchange_address), self._slot_bytes, strict=True):
                communicator = create(
                    cast(Kind, assign.communicator),
                    address,
                    assign.rank,
                    assign.size,
                    timeout=self._timeout_s,
                    slot_bytes=slot_bytes,
                    cancelled=cancelled,
                )
                undo.callback(communicator.close)
                made.append(communicator)
            undo.pop_all()
        self.close()
        return made

    def close(self) -> None:
        """All have come, or none will."""
        for handle in self._open:
            handle.close()
        self._open.clear()
