"""vLLM's CPU worker as a rank whose peers come and go. Named to vLLM by --worker-cls; `gpu_worker` has the other."""

import copy
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from services.vllm import batch, warm
from services.vllm.groups import Groups
from services.vllm.rejoins import Rejoins


class GhostCpuWorker(Rejoins, CPUWorker):
    """See `Rejoins`."""

    def init_device(self) -> None:
        """As CPUWorker's, but the groups are made here alone: nobody else needs to be there."""
        self.device = torch.device("cpu")
        self.groups = Groups.of(self.vllm_config, self.rank, self.device)
        self.groups.install()
        set_random_seed(self.model_config.seed)
        assert current_platform.is_cpu()
        self.model_runner = CPUModelRunner(self.vllm_config, self.device)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """As vLLM's, after the requests are made known that were scheduled before this rank's batch was wiped."""
        batch.make_known(self.model_runner, getattr(scheduler_output, "ghost_known", ()))
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM's, which fails on a CPU where a request with a seed is prefilled in pieces.

        The output tells the generators' states too: the scheduler keeps them with the tokens that they belong to.
        """
        with batch.no_draws_for_partial_prompts(self.model_runner):
            output = super().sample_tokens(grammar_output)
        if draws := batch.draws(self.model_runner):
            output = copy.copy(output)  # it may be vLLM's own constant
            output.ghost_draws = draws
        return output

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """As CPUWorker's, after a few steps; the KV is zeros again, and takes no memory until it is written."""
        warm.run_steps(self)
        batch.wipe(self.model_runner)
        for cache in self.model_runner.kv_caches:
            warm.give_back(cache)
        return super().compile_or_warm_up_model()
