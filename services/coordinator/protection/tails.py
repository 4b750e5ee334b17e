"""Protection of tails: each token's KV as a stripe of its own, from its step until its page is protected. Pure.

A token's place is a slot: page * page_tokens + offset. Its stripe's key names nothing but itself, and begins with a
number that all tokens of a step share, so that one rank encodes them and puts them in one go.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from services.coordinator.protection.ledger import Shadow
from services.coordinator.scheduling.scheduler import Scheduler, Sequence
from shared.types import PageKey


@dataclass(slots=True)
class TailToken:
    """One token's stripe. `pending`: under way, and its page pinned; `dropped`: not wanted any more when it arrives."""

    key: PageKey
    page: int
    slot: int
    pending: bool = True
    dropped: bool = False


class Tails:
    """The tail stripes of all running sequences."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._pool = scheduler.pool
        self._page_tokens = scheduler.page_tokens
        self._tokens: dict[int, dict[int, TailToken]] = {}  # by sequence number, then position
        self._by_key: dict[PageKey, TailToken] = {}
        self._released: list[PageKey] = []

    def computed(self, epoch: int, step: int) -> list[TailToken]:
        """A step is done: the tokens that want a stripe of their own now.

        Those are the ones on the page of the last one, unless the step filled all of it: pages are soon protected.
        """
        begun: list[TailToken] = []
        size = self._page_tokens
        for sequence, start, end in self._scheduler.computed:
            if sequence not in self._scheduler.running:
                continue
            first = max(start, (end - 1) // size * size)
            if end != sequence.computed or (end % size == 0 and end - first == size):
                continue
            page = sequence.pages[first // size]
            if self._pool.pages[page].shadow is Shadow.PROTECTED:  # the page of another sequence with these tokens
                continue
            tokens = self._tokens.setdefault(sequence.number, {})
            for position in range(first, end):
                if position in tokens:
                    self._drop(tokens.pop(position))
                key = (epoch << 32 | step).to_bytes(8, "little") + b"tail" + len(begun).to_bytes(4, "little")
                token = tokens[position] = self._by_key[key] = TailToken(key, page, page * size + position % size)
                self._pool.pin(page)
                begun.append(token)
        return begun

    def knows(self, key: PageKey) -> bool:
        """Whether this is the key of a tail stripe."""
        return key in self._by_key

    def ended(self, key: PageKey, *, protected: bool) -> None:
        """The stores acknowledged a stripe, or they did not."""
        token = self._by_key.get(key)
        if token is None:
            return
        self._unpin(token)
        if token.dropped or not protected:
            self._forget(token)

    def prune(self) -> None:
        """Drop the stripes of tokens whose page is protected, or that no running sequence has any more."""
        alive = {each.number: each for each in self._scheduler.running}
        for number, tokens in list(self._tokens.items()):
            sequence = alive.get(number)
            for position, token in list(tokens.items()):
                if token.key not in self._by_key:
                    del tokens[position]  # it could not be stored
                elif sequence is None or not self._wanted(sequence, position, token):
                    self._drop(tokens.pop(position))
            if not tokens:
                del self._tokens[number]

    def _wanted(self, sequence: Sequence, position: int, token: TailToken) -> bool:
        index = position // self._page_tokens
        if position >= sequence.computed or index >= len(sequence.pages) or sequence.pages[index] != token.page:
            return False
        return self._pool.pages[token.page].shadow is not Shadow.PROTECTED

    def interrupted(self) -> None:
        """The epoch is over: what was under way may have arrived or not; the index knows."""
        for token in list(self._by_key.values()):
            self._unpin(token)
            if token.dropped:
                self._forget(token)

    def take_released(self) -> tuple[PageKey, ...]:
        """Keys of stripes that the stores may forget."""
        released, self._released = self._released, []
        return tuple(released)

    def run(self, sequence: Sequence, start: int) -> list[TailToken]:
        """The tokens from position `start` on that have stripes, without a gap."""
        tokens = self._tokens.get(sequence.number, {})
        run: list[TailToken] = []
        for position in range(start, sequence.computed):
            token = tokens.get(position)
            if token is None or token.page != sequence.pages[position // self._page_tokens]:
                break
            run.append(token)
        return run

    def keys(self, sequences: Iterable[Sequence]) -> list[PageKey]:
        """The keys of all stripes of these sequences."""
        return [token.key for each in sequences for token in self._tokens.get(each.number, {}).values()]

    # -- inside ------------------------------------------------------------------------------------------------------

    def _unpin(self, token: TailToken) -> None:
        if token.pending:
            token.pending = False
            self._pool.unpin(token.page)

    def _drop(self, token: TailToken) -> None:
        token.dropped = True
        if not token.pending:
            self._forget(token)

    def _forget(self, token: TailToken) -> None:
        if self._by_key.pop(token.key, None) is not None:
            self._released.append(token.key)
