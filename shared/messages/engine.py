"""The embedded engine: requests of gateways, and steps of ranks."""

from dataclasses import dataclass

from shared.messages.base import Message
from shared.types import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenLogprob,
)

DRAWN = -1
"""In the place of a token that a step before draws: the ranks know it."""


@dataclass(frozen=True, slots=True)
class Sample(Message):
    """What a step drew for one sequence, and told of its prompt. Not sent alone: part of StepDone.

    `token` is -1 where nothing was drawn.
    """

    sequence: int
    token: int
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepDone(Message):
    """A step's KV is written on this rank (and so its part in every collective done); what was drawn.

    `sequences` and `drawn`: int32, the sequences of which there is nothing to tell but their next token. `samples`: the
    others. Of its `seconds`, it spent `waited_s` waiting for others in collectives.
    """

    epoch: int
    step: int
    rank: int
    sequences: bytes
    drawn: bytes
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
class SequenceStart(Message):
    """A sequence that takes part in its epoch's steps from now on: its page table, and what does not change of it.

    Only where drawing needs them, `prompt` holds the prompt's tokens, `history` those generated that have KV already.
    """

    sequence: int
    prompt_tokens: int
    pages: bytes
    sampling: SamplingParams
    prompt_logprobs: int | None = None
    """N: also the logprob of each next prompt token, and of the N most likely ones."""
    prompt: bytes = b""
    history: bytes = b""


@dataclass(frozen=True, slots=True)
class Batch(Message):
    """The chunks of tokens that one step computes. Not sent alone: part of StepPlan.

    It says what the ranks have not been told in this epoch. All are int32, one for each chunk, where nothing else is
    said.
    """

    sequences: bytes = b""
    starts: bytes = b""
    """Positions of the chunks' first tokens."""
    counts: bytes = b""
    tokens: bytes = b""
    """All chunks' tokens, one after the other. DRAWN, alone in its chunk: what was drawn last for its sequence."""
    draws: bytes = b""
    """A byte for each chunk: 1 if the token that follows it is to be drawn."""
    pages: bytes = b""
    """New entries of page tables: chunk, place in the table, page."""
    following: bytes = b""
    """Prompt tokens after chunks that tell logprobs of a part of their prompt: chunk, token."""
    begun: tuple[SequenceStart, ...] = ()
    """Those of the sequences that took part in no step yet."""
    ended: bytes = b""
    """Sequences that take part in none any more, or begin anew."""
    anew: bool = False
    """The ranks forget all sequences first."""


@dataclass(frozen=True, slots=True)
class StepPlan(Message):
    """One forward pass, the same on every rank. Each epoch begins with ranks that know no sequence.

    It may come before the one in front of it is computed. After a step that raised an error, ranks leave those out that
    were planned to follow it: all up to one that begins anew.
    """

    epoch: int
    step: int
    batch: Batch


@dataclass(frozen=True, slots=True)
class NotePages(Message):
    """These pages (int32) are whole after the steps that were planned before: their keys, 16 bytes each."""

    epoch: int
    pages: bytes
    keys: bytes


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
class NextTokens(Message):
    """One more token for each of these requests, and nothing else to tell of them; `tokens` are int32."""

    request_ids: tuple[str, ...]
    tokens: bytes


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """An accepted request can't be finished: ends its stream with an error."""

    request_id: str
    message: str
