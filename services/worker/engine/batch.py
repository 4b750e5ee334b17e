"""What one step asks of the model: the chunk of tokens of each sequence in it."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Int32 = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's part of a step. The runner fills it from the coordinator's StepPlan."""

    tokens: Int32  # [n] token ids at positions start .. start + n - 1
    start: int
    prompt_tokens: int  # positions from here on were generated, and get attention in decode's shape
    pages: Int32  # [ceil((start + n) / page_tokens)] the sequence's page table; more entries than that are ignored
    logits: Literal["none", "last", "all"]  # whose rows are wanted

    @property
    def end(self) -> int:
        """The position after the chunk's last token."""
        return self.start + len(self.tokens)

    @property
    def rows(self) -> int:
        """How many rows of logits the chunk asks for."""
        return {"none": 0, "last": 1, "all": len(self.tokens)}[self.logits]
