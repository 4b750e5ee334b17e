"""Sampling: the same draw for the same seed and position, from the distribution that was asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
