"""The embedded engine: requests of gateways, and steps of ranks."""

from dataclasses import dataclass

from shared.messages.base import Message
from shared.types import (
    FinishReason,
    GenerationRequest,
    LogitRows,
    SamplingParams,
    TokenLogprob,
)


@dataclass(frozen=True, slots=True)
class Sample(Message):
    """What a step drew for one sequence. Not sent alone: part of StepDone."""

    sequence: int
    token: int
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepDone(Message):
    """A step's KV is written on this rank (and so its part in every collective done); what was drawn.

    Of its `seconds`, it spent `waited_s` waiting for others in collectives.
    """

    epoch: int
    step: int
    rank: int
    samples: tuple[Sample, ...]
    seconds: float
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepRaised(Message):
    """A step raised an error on this rank, which has all that it had before it, and is ready for another step.

    Until then it had entered so many `collectives` of the epoch: if that is so on all ranks, they are still in step.
    """

    epoch: int
    step: int
    rank: int
    reason: str
    collectives: int


@dataclass(frozen=True, slots=True)
class DigestDone(Message):
    """The hash of one sequence's KV on this rank."""

    epoch: int
    digest: int
    rank: int
    value: str


@dataclass(frozen=True, slots=True)
class SequenceStep(Message):
    """One sequence's part of a step: tokens at positions start.., its page table, and how to draw the next token.

    `history` holds the output tokens so far and `prompt` the prompt's, only where drawing needs them.
    """

    sequence: int
    tokens: bytes
    start: int
    prompt_tokens: int
    pages: bytes
    logits: LogitRows
    sampling: SamplingParams | None
    prompt_logprobs: int | None = None
    """N: also the logprob of each next prompt token, and of the N most likely ones; `next_token` follows the last."""
    next_token: int = -1
    prompt: bytes = b""
    history: bytes = b""
    seals: bytes = b""
    """Keys, 16 bytes each, of the pages that this step fills, from the one that position `start` is in."""


@dataclass(frozen=True, slots=True)
class StepPlan(Message):
    """One forward pass, the same on every rank."""

    epoch: int
    step: int
    sequences: tuple[SequenceStep, ...]


@dataclass(frozen=True, slots=True)
class DigestPlan(Message):
    """Hash the KV of tokens 0..tokens-1 of the sequence that has these pages."""

    epoch: int
    digest: int
    pages: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class Submit(Message):
    """Generate this. Answered by Accepted or Refused.

    `fingerprint` is the model's that the prompt was made for. `generated`: the tokens received already of a request
    that was accepted before the channel was lost; only what follows them is sent. None: a new request.
    """

    request: GenerationRequest
    fingerprint: str = ""
    generated: bytes | None = None


@dataclass(frozen=True, slots=True)
class Abort(Message):
    """Nobody waits for this request any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Accepted(Message):
    """The request is queued; its tokens follow."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """The request is not served: an HTTP status and OpenAI's error fields."""

    request_id: str
    status: int
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Tokens(Message):
    """The next tokens of a request. The last message has a finish reason; the drill's has the ranks' digests.

    A token that ends the sequence is not among `tokens`, so they may be empty. `prompt_logprobs` come with the first
    message that has any, and in those without before it: one entry for each prompt token but the first.
    """

    request_id: str
    tokens: bytes
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    cached_tokens: int
    kv_digests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """An accepted request can't be finished: ends its stream with an error."""

    request_id: str
    message: str
