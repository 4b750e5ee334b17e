"""Protection of tails: each token's KV as a stripe of its own, from its step until its page is protected. Pure.

A token's place is a slot: page * page_tokens + offset. Its stripe's key names nothing but itself, and begins with a
number that all tokens of a step share, so that one rank encodes them and puts them in one go.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from services.coordinator.protection.host import Host, Run, Span
from services.coordinator.protection.ledger import Ledger, Parity
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
    """The tail stripes of all open pages, and of those that are sealed but not protected yet."""

    def __init__(self, host: Host, ledger: Ledger, page_tokens: int):
        self._host = host
        self._ledger = ledger
        self._page_tokens = page_tokens
        self._tokens: dict[int, dict[int, TailToken]] = {}  # by page, then offset
        self._by_key: dict[PageKey, TailToken] = {}
        self._released: list[PageKey] = []

    def computed(self, epoch: int, step: int, spans: Iterable[Span]) -> list[TailToken]:
        """A step is done: the tokens of these spans want a stripe of their own now."""
        begun: list[TailToken] = []
        for span in spans:
            if self._ledger.parity(span.page) is Parity.PROTECTED:  # the page of another request with these tokens
                continue
            tokens = self._tokens.setdefault(span.page, {})
            for offset in range(span.start, span.end):
                if offset in tokens:
                    self._drop(tokens.pop(offset))
                key = (epoch << 32 | step).to_bytes(8, "little") + b"tail" + len(begun).to_bytes(4, "little")
                token = TailToken(key, span.page, span.page * self._page_tokens + offset)
                tokens[offset] = self._by_key[key] = token
                self._host.pin(span.page)
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

    def page_dropped(self, page: int, offset: int = 0) -> None:
        """What is on a page from `offset` on is written again, or nobody's: its stripes are not wanted any more."""
        if (tokens := self._tokens.get(page)) is None:
            return
        for at in [each for each in tokens if each >= offset]:
            self._drop(tokens.pop(at))
        if not tokens:
            del self._tokens[page]

    def prune(self) -> None:
        """Drop the stripes of tokens whose page is protected, or that could not be stored."""
        for page, tokens in list(self._tokens.items()):
            if self._ledger.parity(page) is Parity.PROTECTED:
                self.page_dropped(page)
                continue
            for offset in [at for at, token in tokens.items() if token.key not in self._by_key]:
                del tokens[offset]
            if not tokens:
                del self._tokens[page]

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

    def after(self, run: Run, start: int) -> list[TailToken]:
        """A run's tokens from position `start` on that have stripes, without a gap."""
        found: list[TailToken] = []
        for position in range(start, run.computed):
            index, offset = divmod(position, self._page_tokens)
            token = self._tokens.get(run.pages[index], {}).get(offset)
            if token is None:
                break
            found.append(token)
        return found

    def keys(self) -> list[PageKey]:
        """The keys of all stripes that are wanted."""
        return [token.key for tokens in self._tokens.values() for token in tokens.values()]

    # -- inside ------------------------------------------------------------------------------------------------------

    def _unpin(self, token: TailToken) -> None:
        if token.pending:
            token.pending = False
            self._host.unpin(token.page)

    def _drop(self, token: TailToken) -> None:
        token.dropped = True
        if not token.pending:
            self._forget(token)

    def _forget(self, token: TailToken) -> None:
        if self._by_key.pop(token.key, None) is not None:
            self._released.append(token.key)
