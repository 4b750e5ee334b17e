"""A step as the ranks are told it: of each sequence what they don't know yet. Pure."""

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

from shared.messages import DRAWN, Batch, SequenceStart
from shared.types import pack_ids

if TYPE_CHECKING:
    from services.coordinator.scheduling.scheduler import Request


class BatchBuilder:
    """Takes a step's chunks one by one. `ended`: sequences that the ranks are to forget; `anew`: all that they know."""

    def __init__(self, ended: Iterable[int], *, anew: bool = False):
        self._ended = pack_ids(ended)
        self._anew = anew
        self._sequences: list[int] = []
        self._starts: list[int] = []
        self._counts: list[int] = []
        self._tokens = array("i")
        self._draws = bytearray()
        self._pages: list[int] = []
        self._following: list[int] = []
        self._begun: list[SequenceStart] = []

    def add(self, request: "Request", count: int) -> bool:
        """The next `count` tokens of a request, whose page table has room for them. Returns whether one is drawn."""
        tokens, start = request.tokens, request.computed + request.ahead
        end, place = start + count, len(self._sequences)
        self._sequences.append(request.number)
        self._starts.append(start)
        self._counts.append(count)
        if count == 1:
            self._tokens.append(tokens[start] if start < len(tokens) else DRAWN)
        else:
            self._tokens.extend(tokens[start:end])
        draws = end == len(tokens) + request.unknown and request.finish is None
        self._draws.append(draws)
        told, have = request.told, len(request.pages)
        if told < 0:
            self._begun.append(_start(request))
        elif told < have:
            for at in range(told, have):
                self._pages += (place, at, request.pages[at])
        request.told = have
        if start < request.prompt_tokens and end < len(tokens) and request.params.prompt_logprobs is not None:
            self._following += (place, tokens[end])
        return draws

    def batch(self) -> Batch:
        """What was added."""
        return Batch(
            sequences=pack_ids(self._sequences),
            starts=pack_ids(self._starts),
            counts=pack_ids(self._counts),
            tokens=pack_ids(self._tokens),
            draws=bytes(self._draws),
            pages=pack_ids(self._pages),
            following=pack_ids(self._following),
            begun=tuple(self._begun),
            ended=self._ended,
            anew=self._anew,
        )


def _start(request: "Request") -> SequenceStart:
    params, history = request.params, request.params.sampling.needs_history
    return SequenceStart(
        sequence=request.number,
        prompt_tokens=request.prompt_tokens,
        pages=pack_ids(request.pages),
        sampling=params.sampling,
        prompt_logprobs=params.prompt_logprobs,
        prompt=params.prompt if history else b"",
        history=pack_ids(request.tokens[request.prompt_tokens : request.computed]) if history else b"",
    )
