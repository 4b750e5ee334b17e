"""Draw a token from logits, the same on every rank and again after a failure.

There is no sampler state: the random number for a token comes from a counter-based generator (Philox, Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011) keyed by the request's seed and counted by the token's position.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared.types import SamplingParams

Int32 = np.ndarray[Any, np.dtype[np.int32]]
Float32 = np.ndarray[Any, np.dtype[np.float32]]
Float64 = np.ndarray[Any, np.dtype[np.float64]]
Ids = np.ndarray[Any, np.dtype[np.intp]]

_SEED_MASK = (1 << 64) - 1
_TRIED = (1024, 16384)
"""How many of the most likely tokens are sorted, as far as needed, before all are."""
_OFF = 1e-9
"""More, as a part of it, than any order of adding up a vocabulary can change of its sum."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token; its logprob and the most likely ones' (token id, logprob) where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample_greedy(logits: torch.Tensor) -> list[int]:
    """The most likely token of each row of float32 logits [rows, vocab]; of equal ones, the lowest id."""
    return [int(token) for token in logits.numpy(force=True).argmax(axis=-1)]


def is_plain_greedy(sampling: SamplingParams) -> bool:
    """Whether `sample_greedy` gives what `sample` would."""
    return (
        sampling.temperature <= 0.0
        and sampling.logprobs is None
        and not sampling.logit_bias
        and not sampling.needs_history
    )


def sample(
    logits: torch.Tensor,
    sampling: SamplingParams,
    *,
    position: int,
    prompt: Int32 | None = None,
    output: Int32 | None = None,
) -> Sampled:
    """Draw the token at `position` from float32 logits [vocab]. The logits are not changed.

    prompt, output: the ids of the sequence so far, needed only where sampling.needs_history. Penalties count as in
    OpenAI's API (presence and frequency: generated tokens only) and in CTRL (repetition: prompt and generated ones).
    Logprobs are the model's own, before penalties, bias and temperature.
    """
    if logits.ndim != 1 or logits.dtype != torch.float32:
        raise ValueError(f"sample takes float32 logits [vocab], not {logits.dtype} {tuple(logits.shape)}")
    raw: Float32 = logits.numpy(force=True)
    adjusted = _adjust(raw, sampling, prompt, output)
    if sampling.temperature <= 0.0:
        token = int(adjusted.argmax())
    else:
        token = _draw(adjusted, sampling, _uniform(sampling.seed, position))
    if sampling.logprobs is None:
        return Sampled(token)
    logprob, top = token_logprobs(raw, token, sampling.logprobs)
    return Sampled(token, logprob, top)


def token_logprobs(logits: Float32, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The logprob of `token` in float32 logits [vocab], and the `count` most likely tokens with theirs, best first."""
    values = logits.astype(np.float64)
    peak = values.max()
    normaliser = peak + np.log(np.exp(values - peak).sum())
    best = _most_likely_first(logits, count) if count else ()
    return float(values[token] - normaliser), tuple((int(t), float(values[t] - normaliser)) for t in best)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position, and on nothing else."""
    generator = np.random.Generator(np.random.Philox(key=seed & _SEED_MASK, counter=position))
    return float(generator.random())


def _adjust(raw: Float32, sampling: SamplingParams, prompt: Int32 | None, output: Int32 | None) -> Float32:
    """Logits after bias and penalties; `raw` itself where there are none."""
    if not sampling.logit_bias and not sampling.needs_history:
        return raw
    logits = raw.copy()
    empty = np.empty(0, dtype=np.int32)
    generated = empty if output is None else output
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.concatenate((empty if prompt is None else prompt, generated)))
        penalty = np.float32(sampling.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
        tokens, counts = np.unique(generated, return_counts=True)
        logits[tokens] -= (sampling.presence_penalty + sampling.frequency_penalty * counts).astype(np.float32)
    for token, bias in sampling.logit_bias:
        if 0 <= token < len(logits):
            logits[token] += np.float32(bias)
    return logits


def _draw(logits: Float32, sampling: SamplingParams, uniform: float) -> int:
    """Invert the cumulative distribution at `uniform`, over the tokens that top_k, top_p and min_p leave."""
    scaled: Float64 = logits.astype(np.float64) / sampling.temperature
    weights: Float64 = np.exp(scaled - scaled.max())
    if sampling.top_k <= 0 and sampling.top_p >= 1.0 and sampling.min_p <= 0.0:
        return _invert(weights, uniform)
    order, kept = _left(weights, sampling)
    return int(order[_invert(kept, uniform)])


def _left(weights: Float64, sampling: SamplingParams) -> tuple[Ids, Float64]:
    """The ids, and weights, of the tokens that top_k, then min_p, then top_p leave: by falling weight, then by id.

    Only as many are sorted as may be left.
    """
    if 0 < sampling.top_k < len(weights):
        order = _most_likely_first(weights, sampling.top_k)
    elif sampling.min_p > 0.0:
        likely = np.flatnonzero(weights >= sampling.min_p * weights.max())
        order = likely[_most_likely_first(weights[likely], 0)]
    elif (nucleus := _nucleus(weights, sampling.top_p)) is not None:
        return nucleus, weights[nucleus]
    else:
        order = _most_likely_first(weights, 0)
    kept = weights[order]
    if sampling.min_p > 0.0:
        kept = kept[kept >= sampling.min_p * kept[0]]
    if sampling.top_p < 1.0:
        before = np.cumsum(kept) - kept  # a token stays if those before it don't reach top_p: the first always does
        kept = kept[before < _mass(sampling.top_p) * kept.sum()]
    return order, kept


def _nucleus(weights: Float64, top_p: float) -> Ids | None:
    """The ids that top_p alone leaves of all, most likely first, by sorting a few; None where that is not certain.

    The last bits of the sum that top_p is a part of depend on the order in which it is added up. Where they could
    decide, all have to be sorted, so that the answer never depends on the way.
    """
    total = weights.sum()
    for count in _TRIED:
        if count >= len(weights):
            break
        order = _most_likely_first(weights, count)
        before = np.cumsum(weights[order]) - weights[order]
        most, least = (int(np.count_nonzero(before < _mass(top_p) * total * off)) for off in (1 + _OFF, 1 - _OFF))
        if most == least < count:
            return order[:most]
    return None


def _mass(top_p: float) -> float:
    return max(top_p, 1e-9)


def _most_likely_first(weights: Float32 | Float64, top_k: int) -> Ids:
    """Token ids by falling weight, equal ones by id; only the first top_k, if top_k > 0."""
    if 0 < top_k < len(weights):
        threshold = np.partition(weights, len(weights) - top_k)[len(weights) - top_k]
        candidates = np.flatnonzero(weights >= threshold)
        return candidates[np.argsort(-weights[candidates], kind="stable")][:top_k]
    return np.argsort(-weights, kind="stable")


def _invert(weights: Float64, uniform: float) -> int:
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))
