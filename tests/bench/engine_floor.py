"""The least time that the engine's cases can take on this machine: bytes over memory bandwidth, operations over peak.

Both rates are measured, in the process that asks, with all its threads: a sum over a buffer far larger than the caches,
and a product of large matrices in the model's dtype. A step of decode reads all weights and its sequences' KV once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from services.worker.engine.spec import read_spec
from services.worker.engine.weights import weight_files

BUFFER_VALUES = 64 << 20
SIDE = 2048
TRIES = 5


@dataclass(frozen=True, slots=True)
class Floor:
    """Rates of the machine, a second, and what the model needs: bytes of its weights, bytes of a token's KV."""

    bytes_s: float
    operations_s: float
    weight_bytes: int
    parameters: int
    token_bytes: int

    def tokens_s(self, context: int, streams: int, steps: int) -> float:
        """At the least time for prefill of `context` tokens (`steps` = 0), or for decode after it."""
        if not steps:
            return self.operations_s / (2 * self.parameters)
        read = self.weight_bytes + streams * context * self.token_bytes
        return streams / max(read / self.bytes_s, streams * 2 * self.parameters / self.operations_s)


def measure(model_dir: Path, dtype: torch.dtype) -> Floor:
    """This machine's and this model's."""
    spec = read_spec(model_dir, 1, dtype)
    buffer, matrix = torch.ones(BUFFER_VALUES), torch.ones(SIDE, SIDE, dtype=dtype)
    weights = sum(path.stat().st_size for path in weight_files(model_dir))
    return Floor(
        bytes_s=buffer.nbytes / _best(buffer.sum),
        operations_s=2 * SIDE**3 / _best(lambda: matrix @ matrix),
        weight_bytes=weights,
        parameters=weights // dtype.itemsize,
        token_bytes=2 * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize,
    )


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some tries."""
    taken = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)
