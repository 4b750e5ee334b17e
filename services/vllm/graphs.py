"""CUDA graphs of a rank (model runner V2): captured collectives belong to the epoch in which they were captured."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
from vllm.compilation.cuda_graph import CUDAGraphWrapper

log = logging.getLogger("vllm.ghostserve")


def release(runner: Any) -> None:
    """Drop all captured graphs: steps run eager from now on. NCCL's abort waits for graphs that hold its operations."""
    if runner.cudagraph_manager is not None:  # else there is no KV cache yet
        runner.cudagraph_manager.release_graphs()
    CUDAGraphWrapper.clear_all_graphs()
    BreakableCUDAGraphWrapper.clear_all_graphs()


def capture_again(
    runner: Any, quiet: AbstractContextManager[bool], agree: Callable[[bool], bool], *, needed: bool
) -> bool | None:
    """Capture the graphs of this epoch, at one time on all ranks: whether steps use graphs now; None: not at this time.

    `quiet`: no other thread of this process touches the device while it is entered (a capture ends with an error
    otherwise), if it gives True. `agree`: whether all ranks say so; what one rank captured and another did not would be
    collectives of two sizes. A failure leaves all of them eager.
    """
    manager = runner.cudagraph_manager
    if not needed or manager is None or not manager.needs_capture():
        return False
    with quiet as still:
        if not agree(still and runner.execute_model_state is None):
            return None
        done = False
        try:
            runner.capture_model()
            torch.accelerator.synchronize()
            done = True
        except RuntimeError:
            log.exception("CUDA graphs could not be captured again: steps stay eager")
        if not agree(done):
            release(runner)
            return False
    return True
