"""What a rank has been told of the sequences of its epoch: steps only bring what is new. Pure."""

from dataclasses import dataclass

import numpy as np

from services.worker.engine.batch import Chunk, Int32, LogitRows, SequenceStep
from shared.errors import ProtocolError
from shared.messages import Batch, SequenceStart
from shared.types import unpack_keys

ROOM = 64
"""Entries by which a page table grows at least, and a quarter of it: so that it is copied seldom."""


@dataclass(slots=True)
class Sequence:
    """One sequence. `history`: the generated tokens that have KV, int32, where drawing needs them."""

    start: SequenceStart
    table: Int32  # [room] its page table, of which `pages` entries count
    pages: int
    prompt: Int32
    history: bytearray

    def put(self, place: int, page: int) -> None:
        """An entry of its page table, behind the last one or in the place of another."""
        if place > self.pages:
            raise ProtocolError(f"sequence {self.start.sequence} has {self.pages} pages, and no place {place}")
        if place == len(self.table):
            self.table = np.concatenate([self.table, np.zeros(ROOM + place // 4, dtype="<i4")])
        self.table[place] = page
        self.pages = max(self.pages, place + 1)


class Sequences:
    """The sequences of one epoch; `take` is given each of its steps, in order."""

    def __init__(self) -> None:
        self._known: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Another epoch begins: nothing is known in it."""
        self._known.clear()

    def take(self, batch: Batch, page_tokens: int) -> tuple[SequenceStep, ...]:
        """The chunks of a step. Raises ProtocolError for one that does not fit what was told before."""
        for number in _ids(batch.ended).tolist():
            self._known.pop(number, None)
        for start in batch.begun:
            table = _ids(start.pages).copy()
            prompt, history = _ids(start.prompt), bytearray(start.history)
            self._known[start.sequence] = Sequence(start, table, len(table), prompt, history)
        numbers, tokens = _ids(batch.sequences).tolist(), _ids(batch.tokens)
        for chunk, place, page in _ids(batch.pages).reshape(-1, 3).tolist():
            self._of(numbers[chunk]).put(place, page)
        following: dict[int, int] = dict(_ids(batch.following).reshape(-1, 2).tolist())  # type: ignore[arg-type]
        keys, steps, at, sealed = unpack_keys(batch.seals), [], 0, 0
        rows = zip(numbers, _ids(batch.starts).tolist(), _ids(batch.counts).tolist(), batch.draws, strict=True)
        for place, (number, start, count, draws) in enumerate(rows):
            full = (start + count) // page_tokens - start // page_tokens
            chunk_tokens, seals = tokens[at : at + count], tuple(keys[sealed : sealed + full])
            at, sealed = at + count, sealed + full
            steps.append(_step(self._of(number), chunk_tokens, start, bool(draws), following.get(place, -1), seals))
        if at != len(tokens) or sealed != len(keys):
            raise ProtocolError("a step's chunks have other tokens or keys than it brings")
        return tuple(steps)

    def _of(self, number: int) -> Sequence:
        if (known := self._known.get(number)) is None:
            raise ProtocolError(f"a step goes on with sequence {number}, which this epoch has not begun")
        return known


def _step(
    of: Sequence, tokens: Int32, start: int, draws: bool, following: int, seals: tuple[bytes, ...]
) -> SequenceStep:
    told, end = of.start, start + len(tokens)
    needs_history = told.sampling.needs_history
    if needs_history and end > told.prompt_tokens:
        of.history += tokens[max(0, told.prompt_tokens - start) :].tobytes()
    of_prompt = told.prompt_logprobs if start < told.prompt_tokens else None
    rows: LogitRows = "all" if of_prompt is not None else "last" if draws else "none"
    return SequenceStep(
        sequence=told.sequence,
        chunk=Chunk(tokens, start, told.prompt_tokens, of.table[: of.pages], rows),
        sampling=told.sampling if draws else None,
        prompt_logprobs=of_prompt,
        next_token=following,
        prompt=of.prompt,
        history=_ids(bytes(of.history)) if draws and needs_history else _NONE,
        seals=seals,
    )


def _ids(data: bytes) -> Int32:
    return np.frombuffer(data, dtype="<i4")


_NONE = _ids(b"")
