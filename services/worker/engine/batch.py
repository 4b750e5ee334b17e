"""What one step asks of the model: the chunk of tokens of each sequence in it, and what to draw after it."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from shared.types import SamplingParams

Int32 = np.ndarray[Any, np.dtype[np.int32]]
LogitRows = Literal["none", "last", "all"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's part of a step."""

    tokens: Int32  # [n] token ids at positions start .. start + n - 1
    start: int
    prompt_tokens: int  # positions from here on were generated, and get attention in decode's shape
    pages: Int32  # [ceil((start + n) / page_tokens)] the sequence's page table; more entries than that are ignored
    logits: LogitRows  # whose rows are wanted

    @property
    def end(self) -> int:
        """The position after the chunk's last token."""
        return self.start + len(self.tokens)

    @property
    def rows(self) -> int:
        """How many rows of logits the chunk asks for."""
        return {"none": 0, "last": 1, "all": len(self.tokens)}[self.logits]


def _none() -> Int32:
    return np.zeros(0, dtype="<i4")


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """One sequence's part of a step, and how to draw the token that follows. `Sequences` fills it from a StepPlan.

    `history` holds the output tokens so far and `prompt` the prompt's, only where drawing needs them.
    """

    sequence: int
    chunk: Chunk
    sampling: SamplingParams | None
    prompt_logprobs: int | None = None
    """N: also the logprob of each next prompt token, and of the N most likely ones; `next_token` follows the last."""
    next_token: int = -1
    prompt: Int32 = field(default_factory=_none)
    history: Int32 = field(default_factory=_none)
