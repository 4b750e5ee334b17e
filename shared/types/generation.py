"""What a request asks to be generated, and what comes of it."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
LogitRows = Literal["none", "last", "all"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are drawn; keyed by (seed, position), so that every rank draws the same."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """None: no logprobs. N: the sampled token's and the N most likely ones' logprobs."""

    @property
    def needs_history(self) -> bool:
        """Whether drawing depends on the tokens before, not on the logits alone."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. The gateway makes one for each choice of each prompt."""

    request_id: str
    prompt: bytes
    max_tokens: int
    """0: only the prompt is computed, for its logprobs."""
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    cache_salt: str = ""
    prompt_logprobs: int | None = None
    traceparent: str = ""
    """W3C Trace Context of the gateway's span of this request."""
    kv_digest: bool = False
    """Ask each rank for a hash of the sequence's KV when it ends (the drill compares them)."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that was chosen, with its logprob and the most likely alternatives as (token id, logprob)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
