"""What a step draws and tells of its prompt is the same in pieces as at once, and no piece is larger than it may be."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from services.worker.engine.batch import Chunk, SequenceStep
from services.worker.engine.draw import draw
from services.worker.engine.sampler import sample, token_logprobs
from shared.types import SamplingParams, TokenLogprob
from tests.worker.rank_threads import RankThreads, small_model

VOCABULARY = 211


def step(sequence: int, tokens: list[int], prompt_tokens: int, **others: object) -> SequenceStep:
    """One sequence's part; the fields that don't matter here have plain values."""
    rows = others.pop("logits", "last")
    chunk = Chunk(np.array(tokens, "<i4"), 0, prompt_tokens, np.zeros(1, np.int32), rows)  # type: ignore[arg-type]
    return SequenceStep(sequence, chunk, **({"sampling": None} | others))  # type: ignore[arg-type]


GREEDY, WARM = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_p=0.9, seed=5, logprobs=2)
PARTS = (
    step(1, [3, 4, 5, 6, 7], 5, logits="all", prompt_logprobs=2, sampling=GREEDY),
    step(2, [9], 0, sampling=GREEDY),
    step(3, [8, 8, 8], 9, logits="none"),
    step(4, [10, 11, 12], 7, logits="all", prompt_logprobs=0, next_token=13),
    step(5, [14], 0, sampling=WARM),
    step(6, [1, 2], 2, logits="all", prompt_logprobs=0),
)
CHUNKS = tuple(part.chunk for part in PARTS)
ROWS = sum(each.rows for each in CHUNKS)


def expected(logits: torch.Tensor) -> dict[int, tuple[int, TokenLogprob | None, tuple[TokenLogprob, ...]]]:
    def told(row: int, token: int, count: int) -> TokenLogprob:
        return TokenLogprob(token, *token_logprobs(logits[row].numpy(), token, count))

    warm = sample(logits[9], WARM, position=1)
    assert warm.logprob is not None
    return {
        1: (int(logits[4].argmax()), None, tuple(told(row, 4 + row, 2) for row in range(4))),
        2: (int(logits[5].argmax()), None, ()),
        4: (-1, None, (told(6, 11, 0), told(7, 12, 0), told(8, 13, 0))),
        5: (warm.token, TokenLogprob(warm.token, warm.logprob, warm.top), ()),
        6: (-1, None, (told(10, 2, 0),)),
    }


@pytest.mark.parametrize("rows", [1, 2, 3, 5, ROWS, 100])
def test_pieces_of_logits_give_what_all_at_once_gives(rows: int) -> None:
    logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(2))
    samples = draw(PARTS, logits.split(rows))
    assert {each.sequence: (each.token, each.logprob, each.prompt_logprobs) for each in samples} == expected(logits)


def test_a_piece_is_done_with_before_the_next_one_is_made() -> None:
    logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(2))
    held: list[torch.Tensor] = []

    def pieces() -> Iterator[torch.Tensor]:
        for row in range(ROWS):
            held[:] = [logits[row : row + 1].clone()]
            yield held[0]
            held[0].fill_(float("nan"))  # whoever looks at it again, finds nothing

    assert {each.sequence: each.token for each in draw(PARTS, pieces())} == {
        sequence: token for sequence, (token, _, _) in expected(logits).items()
    }


@pytest.mark.parametrize("size", [1, 3])
def test_logits_are_made_in_pieces_that_are_no_larger_than_they_may_be(tmp_path: Path, size: int) -> None:
    group = RankThreads(small_model(tmp_path, "Llama"), size)
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, 50).astype(np.int32)
    asked = [Chunk(tokens, 0, 50, np.arange(4, dtype=np.int32), "all")]
    whole = group.step(asked)
    for limit in (1, 4 * VOCABULARY * 7, 1 << 20):
        pieces = group.pieces(asked, limit)
        assert all(piece.nbytes <= max(limit, 4 * VOCABULARY) for piece in pieces)
        assert torch.equal(torch.cat(pieces), whole)
    group.close()
