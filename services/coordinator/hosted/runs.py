"""What a hosted engine tells of its running requests when it stands still."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from shared.errors import ProtocolError
from shared.messages import EngineRun
from shared.types import PageKey, unpack_ids


@dataclass(slots=True)
class HostedRun:
    """A request's pages of one KV cache group; see `host.Run`. `had`: tokens that were computed when it stood still."""

    number: int
    request_id: str
    pages: list[int]
    keys: tuple[PageKey, ...]
    computed: int
    had: int
    held: bool = True

    @classmethod
    def of(cls, told: EngineRun, keys: Sequence[PageKey]) -> "HostedRun":
        """From a message of an engine whose pages have these keys, empty where they are not sealed.

        Raises ProtocolError for what can't be.
        """
        try:
            numbers = unpack_ids(told.pages)
        except ValueError as error:
            raise ProtocolError(f"a run that can't be read: {error}") from error
        if not all(0 <= number < len(keys) for number in numbers):
            raise ProtocolError(f"run {told.number}: a page that there is not")
        sealed = tuple(takewhile(bool, (keys[number] for number in numbers)))
        return cls(told.number, told.request_id, numbers, sealed, told.computed, told.computed)
