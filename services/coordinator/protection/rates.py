"""What steps, and restores, are expected to take: fitted to those that were seen. Pure: seconds and times come in.

A step takes a part that is always the same, and others that grow with its tokens, with the pairs of a token and one
before it, and with the tokens that are looked back on (however many look). Steps are kept by their size, so that
thousands of one kind leave what is known of another.

Encoding a stripe is restoring one backwards: a rank takes as many slices from the others and moves as much parity. So
until a restore was seen, the stripes that were protected say what one will take: the fastest ones, for what made others
slower is the model beside them, which stands still while its KV is restored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_CHUNK = 64
"""Tokens of a prompt that a step takes however long they take: the ranks' attention would gain nothing by less."""
NEW = 0.3
"""The share of what was seen last in what is known of its kind."""
SLOWER = 1.02
"""Where the fastest is wanted, each one that was slower makes what is known of its kind so many times slower."""
FITTED_STEPS = 64
"""After so many steps the fit is made anew."""
LEAST_BYTES = 65_536
"""Of stripes: less says nothing of rates."""
STALE_S = 600.0
"""A rate of restoring that is older is a guess, and is tried again where that costs little."""
EXPLORE = 1.5
"""What a try may be expected to take, in terms of the other way."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step has to do."""

    tokens: int
    pairs: float
    """Of a token and one that it attends to."""
    context: float
    """Tokens of KV that its sequences have, at its end."""

    @classmethod
    def chunk(cls, start: int, count: int) -> "Work":
        """A sequence's tokens start .. start + count - 1."""
        return cls(count, count * (start + count / 2), start + count)


class Fit:
    """Seconds as a sum of non-negative parts, each in proportion to one figure of what was seen.

    The first figures are those that explain all as long as less than as many kinds were seen.
    """

    def __init__(self, guess: Sequence[float], *, fastest: bool = False):
        """`fastest`: fit to the fastest of each kind, which many slower ones make forgotten."""
        self._parts = tuple(guess)
        self._fastest = fastest
        self._seen: dict[tuple[int, ...], tuple[float, ...]] = {}

    @property
    def known(self) -> bool:
        """Whether anything was seen."""
        return bool(self._seen)

    def saw(self, *figures: float, seconds: float) -> bool:
        """Take one into account; whether there was none of its size yet."""
        kind, row = tuple(int(figure).bit_length() for figure in figures), (*figures, seconds)
        before = self._seen.get(kind)
        self._seen[kind] = row if before is None else self._known(before, row)
        return before is None

    def _known(self, before: tuple[float, ...], row: tuple[float, ...]) -> tuple[float, ...]:
        """Of a kind, with one more."""
        if not self._fastest:
            return tuple(a + NEW * (b - a) for a, b in zip(before, row, strict=True))
        slower = row[-1] * self.seconds(*before[:-1]) > before[-1] * self.seconds(*row[:-1])
        return (*before[:-1], before[-1] * SLOWER) if slower else row

    def fit(self) -> None:
        """Least squares of relative errors; a part that would be negative is nothing."""
        rows = np.array(list(self._seen.values()))
        relative = rows[:, :-1] / rows[:, -1:]
        scale = np.maximum(relative.max(axis=0), 1e-30)
        parts, used = np.zeros(len(scale)), list(range(min(len(rows), len(scale))))
        while used:
            found = np.linalg.lstsq(relative[:, used] / scale[used], np.ones(len(rows)), rcond=1e-6)[0]
            if found.min() >= 0:
                parts[used] = found / scale[used]
                break
            used.pop(int(found.argmin()))
        self._parts = tuple(map(float, parts))

    def seconds(self, *figures: float) -> float:
        """What that is expected to take."""
        return sum(part * figure for part, figure in zip(self._parts, figures, strict=True))


class Rates:
    """Speeds that the choice between restoring and recomputing rests on, and the length of a step's chunks."""

    def __init__(
        self,
        *,
        prefill_tokens_s: float = 400.0,
        restore_bytes_s: float = 200e6,
        restore_start_s: float = 0.02,
        step_tokens: int = 512,
    ):
        """What is taken for granted until more is known; a restore's start: index look-up, plan, first exchange."""
        self._steps = Fit((1 / prefill_tokens_s, 0.0, 0.0, 0.0))
        self._protects = Fit((1 / restore_bytes_s, restore_start_s), fastest=True)
        self._restores = Fit((1 / restore_bytes_s, restore_start_s))
        self._restore_start_s = restore_start_s
        self._step_tokens = step_tokens
        self._restored_at = 0.0
        self._unfitted = 0

    # -- what was seen -----------------------------------------------------------------------------------------------

    def saw_step(self, work: Work, seconds: float) -> None:
        """A step is done."""
        if work.tokens <= 0 or not 0 < seconds < math.inf:
            return
        self._unfitted += 1
        new = self._steps.saw(work.tokens, 1, work.pairs, work.context, seconds=seconds)
        if new or self._unfitted >= FITTED_STEPS:
            self._steps.fit()
            self._unfitted = 0

    def saw_protect(self, protected_bytes: int, seconds: float) -> None:
        """A rank encoded stripes of which its own slices have so many bytes, and the stores acknowledged them."""
        if protected_bytes >= LEAST_BYTES and seconds > 0:
            self._protects.saw(protected_bytes, 1, seconds=seconds)
            self._protects.fit()

    def saw_restore(self, restored_bytes: int, seconds: float, now: float) -> None:
        """A restore is done."""
        if restored_bytes >= LEAST_BYTES and seconds > 0:
            self._restored_at = now
            self._restores.saw(restored_bytes, 1, seconds=seconds)
            self._restores.fit()

    # -- what is expected --------------------------------------------------------------------------------------------

    def step_seconds(self, work: Work) -> float:
        """What a step is expected to take."""
        return self._steps.seconds(work.tokens, 1, work.pairs, work.context)

    def recompute_seconds(self, start: int, tokens: int) -> float:
        """What a prefill of `tokens` tokens behind `start` others is expected to take."""
        steps = -(-tokens // self._step_tokens)
        looked = steps * (start + (tokens + self._step_tokens) / 2)
        return self._steps.seconds(tokens, steps, Work.chunk(start, tokens).pairs, looked)

    def restore_seconds(self, restored_bytes: int) -> float:
        """What decoding so many bytes is expected to take."""
        of = self._restores if self._restores.known or not self._protects.known else self._protects
        return max(self._restore_start_s, of.seconds(restored_bytes, 1))

    def explores(self, restore_s: float, recompute_s: float, now: float) -> bool:
        """Whether to restore though recomputing seems faster: the guess is old, and not much is at stake."""
        old = self._restores.known and now - self._restored_at > STALE_S
        return old and restore_s < EXPLORE * recompute_s

    def chunk(self, start: int, most: int, seconds: float) -> int:
        """How many of `most` tokens behind `start` others fit into so many seconds of a step, or LEAST_CHUNK."""
        count = most
        while count > LEAST_CHUNK and self.step_seconds(Work.chunk(start, count)) > seconds:
            count //= 2
        return min(most, max(count // LEAST_CHUNK * LEAST_CHUNK, LEAST_CHUNK))


@dataclass(frozen=True, slots=True)
class StepBound:
    """How long a step may take."""

    rates: Rates
    seconds: float

    def fits(self, start: int, most: int) -> int:
        """How many of a prompt's next tokens, behind `start` others, those that wait for the step can bear."""
        return self.rates.chunk(start, most, self.seconds)
