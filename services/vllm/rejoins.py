"""What a rank of vLLM does when its peers come and go, on a CPU or a GPU."""

from contextlib import AbstractContextManager
from typing import Any

from vllm.utils.torch_utils import set_random_seed

from services.vllm import batch
from services.vllm.groups import Groups
from services.vllm.pages import BlockPages, pages_of
from services.worker.communicator.base import Communicator


class Rejoins:
    """One rank, on any device. It can lose its peers in a step and be given others, without losing weights or KV.

    To be named before vLLM's own class; it makes `groups` in its init_device.
    """

    groups: Groups
    model_runner: Any
    model_config: Any

    def pages(self) -> BlockPages:
        """This rank's KV cache as pages of bytes."""
        runner = self.model_runner
        return pages_of(runner.kv_caches[0], runner.kv_cache_config.kv_cache_tensors, runner.kv_cache_config.num_blocks)

    def leave(self) -> None:
        """The epoch is over: forget all requests, and whatever holds its communicator."""
        batch.wipe(self.model_runner)
        self.groups.connect(None)

    def rejoin(self, epoch: int, channel: Communicator) -> None:
        """Step with new peers."""
        self.groups.connect(channel)
        set_random_seed(self.model_config.seed + epoch)  # all ranks draw alike, the newcomer too

    def capture_again(self, quiet: AbstractContextManager[bool]) -> bool | None:
        """Have steps use CUDA graphs of this epoch: whether they do now; None: not at this time. See `graphs`."""
        return False
