"""Attention in portions: equal to attention over all keys at once, in bounded memory, with bits that no step moves."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from services.worker.engine import looks
from services.worker.engine.attention import Scratch, StepAttention, attend, plan_attention
from services.worker.engine.batch import Chunk
from services.worker.engine.kv_pool import KVPool
from services.worker.engine.looks import TILE, most_gathered, plan_rounds
from tests.worker.rank_threads import RankThreads, Story, small_model

PAGE = 16
HEADS, KV_HEADS, DIM = 6, 2, 16
CHUNKS = {
    "prompt": (0, 700, 9999),
    "middle of a prompt": (389, 130, 9999),
    "end of a prompt, and after it": (600, 150, 650),
    "generated": (640, 60, 100),
    "decode": (699, 1, 100),
}  # first position, tokens, prompt's length


@pytest.fixture(params=[False, True], ids=["one portion", "many portions"])
def portions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(looks, "BLOCK", 2 * TILE)
        monkeypatch.setattr(looks, "GATHERED", 4 * TILE)


class Layer:
    """Random queries, keys and values of two sequences, whose earlier keys are in a pool."""

    def __init__(self, chunks: list[Chunk], tokens: int) -> None:
        torch.manual_seed(1)
        self.pool = KVPool(pages=128, layers=2, page_tokens=PAGE, kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32)
        self.pool.kv.fill_(float("nan"))  # what nobody wrote must not matter
        self.keys, self.values = torch.randn(2, len(chunks), KV_HEADS, tokens, DIM)
        self.queries = torch.randn(len(chunks), HEADS, tokens, DIM)
        self.chunks = chunks
        for number, chunk in enumerate(chunks):
            for at in range(chunk.start):
                into = self.pool.kv[int(chunk.pages[at // PAGE]), 1, :, at % PAGE]
                into[0], into[1] = self.keys[number, :, at], self.values[number, :, at]

    def ours(self, step: StepAttention, window: int | None) -> torch.Tensor:
        query, key, value = (self._of_step(each) for each in (self.queries, self.keys, self.values))
        module = SimpleNamespace(layer_idx=1)
        out, _ = attend(module, query, key, value, None, scaling=DIM**-0.5, step=step, sliding_window=window)  # type: ignore[arg-type]
        return out[0]

    def dense(self, window: int | None) -> torch.Tensor:
        """All scores in float64, masked."""
        rows = []
        for number, chunk in enumerate(self.chunks):
            keys, values = (
                part[number, :, : chunk.end].double().repeat_interleave(HEADS // KV_HEADS, 0)
                for part in (self.keys, self.values)
            )
            scores = self.queries[number, :, chunk.start : chunk.end].double() @ keys.transpose(1, 2) * DIM**-0.5
            row, key = torch.arange(chunk.start, chunk.end)[:, None], torch.arange(chunk.end)[None]
            seen = (key <= row) & (key > row - (window or math.inf))
            scores = scores.masked_fill(~seen, -math.inf)
            rows.append((scores.softmax(-1) @ values).transpose(0, 1))
        return torch.cat(rows)

    def _of_step(self, of: torch.Tensor) -> torch.Tensor:
        return torch.cat([of[n, :, each.start : each.end] for n, each in enumerate(self.chunks)], 1)[None]


def chunk(start: int, count: int, prompt: int, first_page: int = 0) -> Chunk:
    pages = np.random.default_rng(first_page).permutation(64).astype(np.int32) + first_page
    return Chunk(np.zeros(count, dtype=np.int32), start, prompt, pages[: -(-(start + count) // PAGE)], "last")


@pytest.mark.parametrize("kind", CHUNKS)
@pytest.mark.parametrize("window", [None, 1, 37, 64, 200])
@pytest.mark.usefixtures("portions")
def test_what_is_gathered_in_portions_gives_what_all_keys_masked_give(kind: str, window: int | None) -> None:
    layer = Layer([chunk(*CHUNKS[kind]), chunk(90, 30, 100, first_page=64)], 900)
    step = plan_attention(layer.chunks, layer.pool, Scratch())
    torch.testing.assert_close(layer.ours(step, window).double(), layer.dense(window), rtol=1e-5, atol=1e-5)
    # another layer of the same step may look less far
    torch.testing.assert_close(layer.ours(step, 50).double(), layer.dense(50), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_kv_bits_of_many_portions_do_not_depend_on_how_tokens_were_grouped(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "BLOCK", 2 * TILE)
    monkeypatch.setattr(looks, "GATHERED", 2 * TILE)
    group = RankThreads(small_model(tmp_path, family, sliding_window=150), 2)
    tokens = np.random.default_rng(1).integers(2, 211, 420).tolist()
    whole = Story(tokens[:390], range(30))
    whole.tokens = tokens
    expected_logits = group.step([whole.chunk()])
    expected = group.digests(whole.pages, len(tokens))
    for step in (23, 64, 129, 250):
        again = Story(tokens[:390], range(30, 60))
        again.tokens = tokens
        while again.done < len(tokens):
            logits = group.step([again.chunk(step)])
        assert group.digests(again.pages, len(tokens)) == expected, step
        assert torch.equal(logits, expected_logits), step
    group.close()


def test_a_layer_gathers_what_its_window_reaches_however_long_the_context_is() -> None:
    window, pages = 1000, np.arange(70_000, dtype=np.int32)
    for start, count, prompt in ((1_000_000, 1, 5), (1_000_000, 512, 2_000_000), (999_990, 20, 1_000_000)):
        rounds = plan_rounds([Chunk(np.zeros(count, dtype=np.int32), start, prompt, pages, "last")], window, PAGE)
        assert sum(each.keys for each in rounds) <= window + count + 2 * TILE + 4 * PAGE


@pytest.mark.parametrize("page_tokens", [16, 48, 1024])
def test_a_round_is_no_longer_for_a_long_context_and_all_keys_are_seen_once(page_tokens: int) -> None:
    pages = np.arange(-(-130_000 // page_tokens), dtype=np.int32)
    several = [
        Chunk(np.zeros(count, dtype=np.int32), start, prompt, pages, "last")
        for start, count, prompt in ((129_000, 500, 129_100), (50, 1, 1), (70_000, 1, 1), (0, 30, 40))
    ]
    rounds = plan_rounds(several, None, page_tokens)
    assert all(each.keys == sum(map(len, each.pages)) * page_tokens for each in rounds)
    assert all(each.keys <= most_gathered(page_tokens) for each in rounds)
    seen: dict[int, int] = {}
    for each in rounds:
        for look in each.queries:
            seen[look.row] = seen.get(look.row, 0) + look.count
    assert seen == {row: 129_001 + row for row in range(100, 500)} | {500: 51, 501: 70_001}
