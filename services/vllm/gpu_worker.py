"""vLLM's GPU worker as a rank whose peers come and go, named to vLLM by --worker-cls. It has served on no GPU yet."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import set_custom_all_reduce
from vllm.model_executor.determinism.batch_invariant import init_batch_invariance
from vllm.platforms import current_platform
from vllm.utils.mem_utils import MemorySnapshot
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import request_memory
from vllm.v1.worker.worker_base import CompilationTimes

from services.vllm import graphs
from services.vllm.groups import Groups
from services.vllm.rejoins import Rejoins
from services.worker.communicator.base import Communicator


class GhostGpuWorker(Rejoins, Worker):
    """See `Rejoins`. `local_rank` is its device, whichever rank it is."""

    joined = False
    """It has had peers."""

    def init_device(self) -> None:
        """As Worker's, but the groups are made here alone: nobody else needs to be there."""
        self.device = torch.device("cuda", current_platform.logical_device_id_to_visible_device_id(self.local_rank))
        torch.accelerator.set_device_index(self.device)
        current_platform.check_if_supports_dtype(self.model_config.dtype)
        self.groups = Groups.of(self.vllm_config, self.rank, self.device)
        self.groups.install()
        init_batch_invariance()
        set_custom_all_reduce(False)
        set_random_seed(self.model_config.seed)
        gc.collect()
        torch.accelerator.empty_cache()
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = request_memory(self.init_snapshot, self.cache_config)
        self._init_workspace_and_model_runner()

    def determine_available_memory(self) -> int:
        """As vLLM's. One that comes later is told the size of its KV: it only compiles."""
        if self.joined:
            return int(super().determine_available_memory())
        with torch.inference_mode(), set_current_vllm_config(self.vllm_config):
            self.model_runner.profile_run(randomize_inputs=self.randomize_dummy_inputs)
        return 0

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """As vLLM's. One that comes later captures no graphs: alone it has no collectives that they could hold."""
        given = self.model_config.enforce_eager
        self.model_config.enforce_eager = given or not self.joined
        try:
            return super().compile_or_warm_up_model()
        finally:
            self.model_config.enforce_eager = given

    def leave(self) -> None:
        """See Rejoins. Captured graphs hold its communicator too."""
        super().leave()
        graphs.release(self.model_runner)

    def rejoin(self, epoch: int, channel: Communicator) -> None:
        """See Rejoins. Steps run eager until `capture_again`."""
        super().rejoin(epoch, channel)
        self.joined = True
        self._channel = channel

    def capture_again(self, quiet: AbstractContextManager[bool]) -> bool | None:
        """See `graphs.capture_again`."""
        return graphs.capture_again(
            self.model_runner, quiet, _agreement(self._channel, self.device), needed=not self.model_config.enforce_eager
        )


def _agreement(channel: Communicator, device: torch.device) -> Callable[[bool], bool]:
    def agree(yes: bool) -> bool:
        votes = torch.tensor([float(yes)], device=device)
        channel.all_reduce(votes)
        agreed = float(votes.item()) == channel.size
        channel.check()
        return agreed

    return agree
