"""What a hosted engine tells of its running requests when it stands still."""

from collections.abc import Mapping
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
    def of(cls, told: EngineRun, pages: int, sealed: Mapping[int, PageKey]) -> "HostedRun":
        """From a message of an engine that has so many pages, these of them sealed. Raises ProtocolError for what can't
        be.
        """
        try:
            numbers = unpack_ids(told.pages)
        except ValueError as error:
            raise ProtocolError(f"a run that can't be read: {error}") from error
        if not all(0 <= number < pages for number in numbers):
            raise ProtocolError(f"run {told.number}: a page that there is not")
        keys = tuple(sealed[number] for number in takewhile(sealed.__contains__, numbers))
        return cls(told.number, told.request_id, numbers, keys, told.computed, told.computed)
