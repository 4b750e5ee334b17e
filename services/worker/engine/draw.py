"""Draw the tokens that a step asks for, from its logits."""

from collections.abc import Sequence

import numpy as np
import torch

from services.worker.engine.batch import Chunk
from services.worker.engine.sampler import is_plain_greedy, sample, sample_greedy, token_logprobs
from shared.messages import Sample, SequenceStep
from shared.types import TokenLogprob


def draw(parts: Sequence[SequenceStep], chunks: Sequence[Chunk], logits: torch.Tensor) -> tuple[Sample, ...]:
    """Samples of the sequences that want one, from logits [rows, vocab] in chunk order."""
    samples = []
    row = 0
    greedy: list[tuple[int, int]] = []  # (sequence, row): drawn in one go
    for part, chunk in zip(parts, chunks, strict=True):
        rows = logits[row : row + chunk.rows]
        row += chunk.rows
        prompt_logprobs = _prompt_logprobs(part, rows)
        if part.sampling is None:
            if prompt_logprobs:
                samples.append(Sample(part.sequence, -1, None, prompt_logprobs))
            continue
        if is_plain_greedy(part.sampling) and not prompt_logprobs:
            greedy.append((part.sequence, row - 1))
            continue
        drawn = sample(
            rows[-1],
            part.sampling,
            position=chunk.end,
            prompt=np.frombuffer(part.prompt, dtype="<i4"),
            output=np.frombuffer(part.history, dtype="<i4"),
        )
        logprob = None if drawn.logprob is None else TokenLogprob(drawn.token, drawn.logprob, drawn.top)
        samples.append(Sample(part.sequence, drawn.token, logprob, prompt_logprobs))
    if greedy:
        tokens = sample_greedy(logits[[row for _, row in greedy]] if len(greedy) < len(logits) else logits)
        samples.extend(Sample(sequence, token) for (sequence, _), token in zip(greedy, tokens, strict=True))
    return tuple(samples)


def _prompt_logprobs(part: SequenceStep, rows: torch.Tensor) -> tuple[TokenLogprob, ...]:
    """Logprobs of the prompt tokens that follow each row [n, vocab], up to the prompt's end."""
    if part.prompt_logprobs is None:
        return ()
    following = [*np.frombuffer(part.tokens, dtype="<i4")[1:].tolist(), part.next_token]
    found = []
    for offset, token in enumerate(following):
        if part.start + offset + 1 >= part.prompt_tokens or token < 0:
            break
        logprob, top = token_logprobs(rows[offset].numpy(force=True), token, part.prompt_logprobs)
        found.append(TokenLogprob(token, logprob, top))
    return tuple(found)
