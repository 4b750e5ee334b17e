"""How long a GPU works, and how long the host takes to ask it to."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_AHEAD = 256 << 20  # bytes of each of the copies that work is queued behind: 0.2 ms on an H100
_COPIES = 20


@dataclass(frozen=True)
class Took:
    """Medians, in seconds. gpu: between events on the stream, what is asked being queued by then. host: to ask."""

    gpu: float
    host: float


def took(work: Callable[[], object], rounds: int = 20) -> Took:
    """Time work on the current CuPy stream. Its launches wait behind copies, so that no gap between them counts.

    That holds as long as to queue it takes less than the copies, which take 3 ms or more.
    """
    import cupy

    source, target = (cupy.empty(_AHEAD, dtype=cupy.uint8) for _ in range(2))
    began, ended = cupy.cuda.Event(), cupy.cuda.Event()
    gpu, host = [], []
    for number in range(rounds + 3):
        for _ in range(_COPIES):
            cupy.copyto(target, source)
        began.record()
        at = time.perf_counter()
        work()
        asked = time.perf_counter() - at
        ended.record()
        ended.synchronize()
        if number >= 3:  # the first ones compile, and fill what is kept
            gpu.append(cupy.cuda.get_elapsed_time(began, ended) / 1e3)
            host.append(asked)
    return Took(float(np.median(gpu)), float(np.median(host)))
