"""Draw the tokens that a step asks for, from its logits."""

from collections.abc import Iterable, Sequence

import torch

from services.worker.engine.batch import SequenceStep
from services.worker.engine.sampler import is_plain_greedy, sample, sample_greedy, token_logprobs
from shared.messages import Sample
from shared.types import TokenLogprob


def draw(parts: Sequence[SequenceStep], pieces: Iterable[torch.Tensor]) -> tuple[Sample, ...]:
    """Samples of the sequences that want one, from `pieces`: logits [rows, vocab] of all rows in chunk order.

    Each piece is done with before the next one is taken, so that they need not be there together.
    """
    following = [_following(part) for part in parts]
    prompts: list[list[TokenLogprob]] = [[] for _ in parts]
    drawn: dict[int, tuple[int, TokenLogprob | None]] = {}
    rows = ((index, offset) for index, part in enumerate(parts) for offset in range(part.chunk.rows))
    for logits in pieces:
        greedy: dict[int, int] = {}  # sequence -> row: drawn in one go
        for row, (index, offset) in zip(range(len(logits)), rows, strict=False):
            part = parts[index]
            if offset < len(following[index]):
                token = following[index][offset]
                logprob, top = token_logprobs(logits[row].numpy(force=True), token, part.prompt_logprobs or 0)
                prompts[index].append(TokenLogprob(token, logprob, top))
            if part.sampling is None or offset + 1 < part.chunk.rows:
                continue
            if is_plain_greedy(part.sampling):
                greedy[index] = row
            else:
                drawn[index] = _drawn(part, logits[row])
        if greedy:
            picked = logits[list(greedy.values())] if len(greedy) < len(logits) else logits
            drawn |= {index: (token, None) for index, token in zip(greedy, sample_greedy(picked), strict=True)}
    return tuple(
        Sample(part.sequence, *drawn.get(index, (-1, None)), tuple(prompt))
        for index, (part, prompt) in enumerate(zip(parts, prompts, strict=True))
        if index in drawn or prompt
    )


def _drawn(part: SequenceStep, logits: torch.Tensor) -> tuple[int, TokenLogprob | None]:
    """The token after a chunk, drawn from logits [vocab], with its logprob where that is asked for."""
    assert part.sampling is not None
    drawn = sample(
        logits,
        part.sampling,
        position=part.chunk.end,
        prompt=part.prompt,
        output=part.history,
    )
    return drawn.token, None if drawn.logprob is None else TokenLogprob(drawn.token, drawn.logprob, drawn.top)


def _following(part: SequenceStep) -> list[int]:
    """The prompt tokens whose logprobs are asked for: those that follow each row, up to the prompt's end."""
    if part.prompt_logprobs is None:
        return []
    tokens = [*part.chunk.tokens[1:].tolist(), part.next_token]
    known = tokens[: max(0, part.chunk.prompt_tokens - part.chunk.start - 1)]
    return known[:-1] if known and known[-1] < 0 else known
