"""What a rank has been told of the sequences of its epoch: steps only bring what is new. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from services.worker.engine.batch import Chunk, Int32, LogitRows, SequenceStep
from shared.errors import ProtocolError
from shared.messages import DRAWN, Batch, Sample, SequenceStart

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
    drawn: int | None = None
    """Its last token that was drawn in this epoch."""

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

    def drew(self, samples: Iterable[Sample]) -> None:
        """What the step before drew: the next one may go on with it."""
        for sample in samples:
            if sample.token >= 0:
                self._of(sample.sequence).drawn = sample.token

    def take(self, batch: Batch) -> tuple[SequenceStep, ...]:
        """The chunks of a step. Raises ProtocolError for one that does not fit what was told before."""
        if batch.anew:
            self.clear()
        for number in _ids(batch.ended).tolist():
            self._known.pop(number, None)
        for start in batch.begun:
            table = _ids(start.pages).copy()
            prompt, history = _ids(start.prompt), bytearray(start.history)
            self._known[start.sequence] = Sequence(start, table, len(table), prompt, history)
        numbers, counts = _ids(batch.sequences).tolist(), _ids(batch.counts)
        tokens = self._known_tokens(numbers, counts, _ids(batch.tokens))
        for chunk, place, page in _ids(batch.pages).reshape(-1, 3).tolist():
            self._of(numbers[chunk]).put(place, page)
        following: dict[int, int] = dict(_ids(batch.following).reshape(-1, 2).tolist())  # type: ignore[arg-type]
        steps, at = [], 0
        rows = zip(numbers, _ids(batch.starts).tolist(), counts.tolist(), batch.draws, strict=True)
        for place, (number, start, count, draws) in enumerate(rows):
            chunk_tokens, at = tokens[at : at + count], at + count
            steps.append(_step(self._of(number), chunk_tokens, start, bool(draws), following.get(place, -1)))
        if at != len(tokens):
            raise ProtocolError("a step's chunks have other tokens than it brings")
        return tuple(steps)

    def _known_tokens(self, numbers: list[int], counts: Int32, tokens: Int32) -> Int32:
        """The tokens of a step, with those put in that the steps before drew."""
        places = np.flatnonzero(tokens == DRAWN)
        if not len(places):
            return tokens
        tokens = tokens.copy()
        of = np.searchsorted(np.cumsum(counts), places, side="right")
        for place, chunk in zip(places.tolist(), of.tolist(), strict=True):
            if (drawn := self._of(numbers[chunk]).drawn) is None:
                raise ProtocolError(f"a step goes on with what sequence {numbers[chunk]} drew, which is nothing")
            tokens[place] = drawn
        return tokens

    def _of(self, number: int) -> Sequence:
        if (known := self._known.get(number)) is None:
            raise ProtocolError(f"a step goes on with sequence {number}, which this epoch has not begun")
        return known


def _step(of: Sequence, tokens: Int32, start: int, draws: bool, following: int) -> SequenceStep:
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
    )


def _ids(data: bytes) -> Int32:
    return np.frombuffer(data, dtype="<i4")


_NONE = _ids(b"")
