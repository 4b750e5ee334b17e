"""Sampling: the same draw for the same seed and position, from the distribution that was asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine import sampler
from services.worker.engine.sampler import is_plain_greedy, sample, sample_greedy, token_logprobs
from shared.types import SamplingParams

LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -5.0, 0.5])
GREEDY = SamplingParams(temperature=0.0)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def draws(params: SamplingParams, count: int = 2000, logits: torch.Tensor = LOGITS) -> np.ndarray:
    tokens = [sample(logits, params, position=position).token for position in range(count)]
    return np.bincount(tokens, minlength=len(logits)) / count


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    assert sample(LOGITS, GREEDY, position=0).token == 1
    assert sample_greedy(torch.stack([LOGITS, LOGITS.flip(0)])) == [1, 2]
    assert is_plain_greedy(GREEDY)
    assert not is_plain_greedy(replace(GREEDY, logprobs=0))


@given(seed=st.integers(-(2**63), 2**64), position=st.integers(0, 2**40))
def test_a_draw_depends_on_seed_and_position_only(seed: int, position: int) -> None:
    params = SamplingParams(seed=seed, top_p=0.9)
    first = sample(LOGITS, params, position=position)
    sample(LOGITS, params, position=position + 1)
    assert sample(LOGITS.clone(), params, position=position) == first


def test_seeds_and_positions_give_different_draws() -> None:
    flat = torch.zeros(1000)
    by_position = {sample(flat, SamplingParams(seed=1), position=p).token for p in range(50)}
    by_seed = {sample(flat, SamplingParams(seed=s), position=1).token for s in range(50)}
    assert len(by_position) > 40
    assert len(by_seed) > 40


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, -1).numpy()
    assert np.abs(draws(SamplingParams(temperature=temperature, seed=3)) - expected).max() < 0.04


def test_filters_leave_the_most_likely() -> None:
    assert set(np.flatnonzero(draws(SamplingParams(top_k=2), 300))) == {1, 3}
    assert set(np.flatnonzero(draws(SamplingParams(top_k=1), 50))) == {1}
    assert set(np.flatnonzero(draws(SamplingParams(top_p=0.7), 300))) == {1, 3}
    assert set(np.flatnonzero(draws(SamplingParams(top_p=1e-12), 50))) == {1}
    assert set(np.flatnonzero(draws(SamplingParams(min_p=0.3), 500))) == {1, 2, 3}
    assert set(np.flatnonzero(draws(SamplingParams(min_p=1.0), 100))) == {1, 3}


@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.0, 1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.floats(0.01, 5.0),
)
def test_a_draw_is_always_within_every_filter(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 4
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    token = sample(logits, params, position=seed).token
    probabilities = torch.softmax(logits.double() / temperature, -1)
    more_likely = int((probabilities > probabilities[token]).sum())
    assert top_k == 0 or more_likely < top_k
    assert probabilities[token] >= min_p * probabilities.max() * (1 - 1e-9)


def test_penalties_and_bias_change_the_choice() -> None:
    prompt, output = ids(1), ids(3, 3)
    repeated = replace(GREEDY, repetition_penalty=2.0)
    assert sample(LOGITS, repeated, position=0, prompt=prompt, output=output).token == 2
    present = replace(GREEDY, presence_penalty=1.5)
    assert sample(LOGITS, present, position=0, prompt=prompt, output=ids(1)).token == 3
    frequent = replace(GREEDY, frequency_penalty=0.6)
    assert sample(LOGITS, frequent, position=0, prompt=prompt, output=ids(1, 3, 3)).token == 1
    assert sample(LOGITS, replace(GREEDY, logit_bias=((4, 100.0), (999, 100.0))), position=0).token == 4
    assert torch.equal(LOGITS, torch.tensor([1.0, 3.0, 2.0, 3.0, -5.0, 0.5]))


def test_logprobs_are_the_models_own() -> None:
    expected = torch.log_softmax(LOGITS.double(), -1)
    sampled = sample(LOGITS, replace(GREEDY, logprobs=3, logit_bias=((0, 50.0),)), position=0)
    assert sampled.token == 0
    assert sampled.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in sampled.top] == [1, 3, 2]
    assert [logprob for _, logprob in sampled.top] == pytest.approx(expected[[1, 3, 2]].tolist())
    assert token_logprobs(LOGITS.numpy(), 1, 0)[1] == ()
    assert len(token_logprobs(LOGITS.numpy(), 1, 99)[1]) == len(LOGITS)


def test_wrong_shapes_stop_at_the_door() -> None:
    with pytest.raises(ValueError, match="float32 logits"):
        sample(LOGITS[None], GREEDY, position=0)


def sorted_draw(weights: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """The definition of a draw, which sorts the whole vocabulary."""
    order = np.argsort(-weights, kind="stable")[: params.top_k if params.top_k > 0 else None]
    kept = weights[order]
    if params.min_p > 0.0:
        kept = kept[kept >= params.min_p * kept[0]]
    if params.top_p < 1.0:
        before = np.cumsum(kept) - kept
        kept = kept[before < max(params.top_p, 1e-9) * kept.sum()]
    cumulative = np.cumsum(kept)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(order[min(index, int(np.flatnonzero(kept)[-1]))])


def definition(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    scaled = logits.numpy().astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    uniform = sampler._uniform(params.seed, position)
    if params.top_k <= 0 and params.top_p >= 1.0 and params.min_p <= 0.0:
        return sampler._invert(weights, uniform)
    return sorted_draw(weights, params, uniform)


def vocabulary(dice: np.random.Generator, size: int) -> torch.Tensor:
    """Logits of one of the shapes that models, and those who test them, give: peaked, flat, with ties, cut off."""
    shape = dice.integers(6)
    logits = dice.normal(0.0, dice.choice([0.1, 1.0, 4.0, 12.0]), size)
    if shape == 1:
        logits = np.round(logits, int(dice.integers(0, 2)))  # many are equal
    elif shape == 2:
        logits[1:][dice.random(size - 1) < 0.9] = -np.inf
    elif shape == 3:
        logits = np.zeros(size)
    elif shape == 4:
        logits = -1.1 * np.log(np.arange(1, size + 1))[dice.permutation(size)]
    elif shape == 5:
        logits = np.log(2.0) * dice.integers(-8, 1, size)  # weights whose sums are exact: top_p may meet one
    return torch.from_numpy(logits.astype(np.float32))


@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([5, 63, 64, 65, 700, 1500, 20_000]),
    top_k=st.sampled_from([0, 0, 0, 1, 7, 64, 5000]),
    top_p=st.one_of(st.sampled_from([0.0, 1e-12, 0.25, 0.5, 0.75, 0.9, 0.95, 0.999, 1.0]), st.floats(0.0, 1.0)),
    min_p=st.one_of(st.just(0.0), st.just(0.0), st.floats(0.0, 1.0)),
    temperature=st.sampled_from([0.05, 0.3, 0.7, 1.0, 1.7, 5.0]),
)
@settings(max_examples=400)
def test_a_draw_is_that_of_the_whole_vocabulary_sorted(
    seed: int, size: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = vocabulary(np.random.default_rng(seed), size)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    for position in range(4):
        assert sample(logits, params, position=position).token == definition(logits, params, position)


def test_what_a_nucleus_leaves_is_the_same_to_the_last_token() -> None:
    """Also where a sum meets top_p within the last bits, and one way of adding up would leave a token more."""
    dice = np.random.default_rng(5)
    certain = 0
    for _ in range(300):
        weights = np.exp(np.float64(vocabulary(dice, 3000).numpy()))
        weights /= weights.max()
        order = np.argsort(-weights, kind="stable")
        shares = np.cumsum(weights[order]) / weights.sum()
        edge = shares[int(dice.integers(1, 60))] * (1 + dice.choice([0.0, 1e-16, -1e-16, 1e-12, -1e-12, 1e-6, -1e-6]))
        for top_p in (float(edge), float(dice.random())):
            if not 0.0 < top_p < 1.0:
                continue
            before = np.cumsum(weights[order]) - weights[order]
            expected = order[before < top_p * weights[order].sum()]
            found = sampler._nucleus(weights, top_p)
            certain += found is not None
            assert found is None or np.array_equal(found, expected)
    assert certain > 100


def test_a_peaked_vocabulary_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_sizes: list[int] = []
    argsort = np.argsort

    def counted(values: np.ndarray, **how: str) -> np.ndarray:
        sorted_sizes.append(len(values))
        return argsort(values, **how)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(np, "argsort", counted)
    logits = torch.randn(152_000, generator=torch.Generator().manual_seed(1)) * 6
    for filters in ({"top_p": 0.9}, {"top_k": 40}, {"top_k": 40, "top_p": 0.9}, {"min_p": 0.05}):
        sample(logits, SamplingParams(temperature=0.7, seed=1, **filters), position=3)  # type: ignore[arg-type]
    assert max(sorted_sizes) <= 1024
