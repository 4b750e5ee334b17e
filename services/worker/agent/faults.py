"""What a worker breaks in itself when a drill tells it to; armed only by --fault-dir.

A friend of Worker, which it reaches into, so that the worker has no code for this but the line that arms it.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

import services.worker.communicator.meeting
from shared import faults
from shared.errors import CommunicatorAborted, DeadlineExceeded
from shared.types import pack_ids

if TYPE_CHECKING:
    from services.worker.agent.app import Worker

NOWHERE = "ws://127.0.0.1:1"


def arm(worker: "Worker", folder: str) -> None:
    """From now on this worker can be told to break itself."""
    breakage = _Breakage(worker)
    faults.obey(
        faults.folder(folder),
        {
            "hang": breakage.hang,
            "raise": breakage.raise_error,
            "cut:peers": breakage.cut_peers,
            "cut:coordinator": breakage.cut_coordinator,
            "cut:store": breakage.cut_store,
            "corrupt:page": breakage.corrupt_pages,
            "corrupt:wire": breakage.corrupt_wire,
            "heal": breakage.heal,
        },
    )


class _Breakage:
    def __init__(self, worker: "Worker"):
        self._worker: Any = worker
        self._undo: list[Callable[[], None]] = []

    def heal(self) -> None:
        """Undo all that can be undone."""
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before))

    def hang(self) -> None:
        """The compute thread never comes back from its next step."""
        self._worker._runner.model.forward = lambda *_: threading.Event().wait()

    def raise_error(self, tokens: str, place: str = "before") -> None:
        """Steps raise an error that compute these token ids, say 17,4, one after the other: before the model, or after.

        `after`: once all collectives are done but those of the logits.
        """
        model = self._worker._runner.model
        forward, wanted = model.forward, pack_ids(int(each) for each in tokens.split(","))

        def failing(chunks: Any, *others: Any) -> Any:
            hit = any(wanted in each.tokens.tobytes() for each in chunks)
            if hit and place == "before":
                raise RuntimeError(f"a step with {tokens}, on demand")
            hidden = forward(chunks, *others)
            if hit:
                raise RuntimeError(f"a step with {tokens}, on demand")
            return hidden

        self._replace(model, "forward", failing)

    def cut_peers(self) -> None:
        """No communicator with the peers works, and none can be made."""

        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise CommunicatorAborted("cut off from its peers")

        self._replace(services.worker.communicator.meeting, "create", refuse)
        runner = self._worker._runner
        for communicator in (runner._communicator, getattr(runner.shadow._exchange, "communicator", None)):
            if communicator is not None:
                communicator.abort()

    def cut_coordinator(self) -> None:
        """Nothing comes from the coordinator, nothing gets there, and neither side is told."""
        channel = self._worker._channel
        if channel is not None:
            transport = channel._socket._conn.transport
            transport.pause_reading()
            self._undo.append(lambda: None if transport.is_closing() else transport.resume_reading())
            self._replace(channel, "send", lambda message: None)
        elsewhere = self._worker._settings.model_copy(update={"coordinator_url": NOWHERE})
        self._replace(self._worker, "_settings", elsewhere)

    def cut_store(self) -> None:
        """No store answers."""
        stores = self._worker._stores

        async def silence(address: str, request: Any, _: Sequence[memoryview]) -> tuple[DeadlineExceeded, ...]:
            await asyncio.sleep(min(stores._put_deadline_s, stores._fetch_deadline_s))
            return (DeadlineExceeded(f"{address} did not answer"),) * len(request.shards)

        self._replace(stores, "put", silence)
        self._replace(stores, "get", silence)

    def corrupt_pages(self) -> None:
        """The lowest bit of each page flips."""
        pool = self._worker._runner.pool
        for page in pool.rows(np.arange(pool.pages), pool.empty):
            page[0] ^= 1

    def corrupt_wire(self) -> None:
        """The lowest bit of each shard flips on its way, after its checksum was taken."""
        stores = self._worker._stores
        put, get = stores.put, stores.get

        async def damaged_put(address: str, request: Any, payloads: Sequence[memoryview]) -> Any:
            copies = [bytearray(payload) for payload in payloads]
            for copy in copies:
                copy[0] ^= 1
            return await put(address, request, [memoryview(copy) for copy in copies])

        async def damaged_get(address: str, request: Any, into: Sequence[memoryview]) -> Any:
            outcomes = await get(address, request, into)
            for buffer in into:
                buffer.cast("B")[0] ^= 1
            return outcomes

        self._replace(stores, "put", damaged_put)
        self._replace(stores, "get", damaged_get)
