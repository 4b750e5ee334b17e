"""Calls of the engine core to its ranks, and what becomes of those that an epoch's end cuts short."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from services.vllm.messages import Answer


@dataclass(slots=True)
class _Open:
    method: str
    ranks: tuple[int, ...]
    """Those whose answers are wanted."""
    single: bool
    future: Future[Any]
    answers: dict[int, Any] = field(default_factory=dict)


class Calls:
    """Futures by number. `lost` makes the value with which a call ends that its epoch did not outlive."""

    def __init__(self, lost: Callable[[str], Any]):
        self._lost = lost
        self._guard = threading.Lock()
        self._epoch = 0
        self._number = 0
        self._open: dict[int, _Open] = {}
        self._held: list[_Open] = []

    def issue(
        self, epoch: int, method: str, ranks: Sequence[int], single: bool, tell: Callable[[int], None]
    ) -> Future[Any]:
        """A future for the answers of `ranks`: a list, or with `single` the only one. `tell` sends under a number.

        If the epoch is over nothing is sent, and the future ends as lost with the others.
        """
        call = _Open(method, tuple(ranks), single, Future())
        with self._guard:
            if epoch != self._epoch:
                self._held.append(call)
                return call.future
            self._number += 1
            self._open[self._number] = call
            tell(self._number)
        return call.future

    def answered(self, rank: int, answer: Answer) -> str | None:
        """Take a rank's answer. Returns the method if it failed there, and the call's future stays open."""
        with self._guard:
            call = self._open.get(answer.number)
            if call is None or answer.epoch != self._epoch:
                return None if not answer.error or answer.epoch != self._epoch else "?"
            if answer.error:
                return call.method
            call.answers[rank] = answer.value
            if len(call.answers) < len(call.ranks):
                return None
            del self._open[answer.number]
        values = [call.answers[each] for each in call.ranks]
        call.future.set_result(values[0] if call.single else values)
        return None

    def end(self, epoch: int) -> None:
        """A new epoch: what is open has no effect any more, and ends when `release` says so."""
        with self._guard:
            self._epoch = epoch
            self._held += self._open.values()
            self._open.clear()

    def fail_one(self, number: int, error: Exception) -> None:
        """End one call by itself."""
        with self._guard:
            call = self._open.pop(number, None)
        if call is not None:
            call.future.set_exception(error)

    def release(self, error: Exception | None = None) -> None:
        """End those that are held, as lost, or all with `error`."""
        with self._guard:
            held, self._held = self._held, []
            if error is not None:
                held += self._open.values()
                self._open.clear()
        for call in held:
            try:
                if error is not None:
                    raise error
                value = self._lost(call.method)
            except Exception as failure:
                call.future.set_exception(failure)
            else:
                call.future.set_result(value)
