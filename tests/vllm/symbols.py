"""The private names of vLLM that services/vllm uses, as they are in the installed version.

python -m tests.vllm.symbols > tests/vllm/symbols.txt, once a new version was tried.
"""

import ast
import hashlib
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

SIGNATURES = """
vllm.v1.executor.multiproc_executor:MultiprocExecutor._init_executor
vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc
vllm.v1.executor.multiproc_executor:MultiprocExecutor.execute_model
vllm.v1.executor.multiproc_executor:MultiprocExecutor.sample_tokens
vllm.v1.executor.multiproc_executor:MultiprocExecutor.take_draft_token_ids
vllm.v1.executor.multiproc_executor:MultiprocExecutor.register_failure_callback
vllm.v1.executor.multiproc_executor:MultiprocExecutor.shutdown
vllm.v1.executor.multiproc_executor:MultiprocExecutor._ensure_worker_termination
vllm.v1.executor.multiproc_executor:MultiprocExecutor._get_parallel_sizes
vllm.v1.executor.multiproc_executor:MultiprocExecutor._get_output_rank
vllm.v1.executor.multiproc_executor:set_multiprocessing_worker_envs
vllm.v1.worker.worker_base:WorkerWrapperBase.__init__
vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker
vllm.v1.worker.cpu_worker:CPUWorker.__init__
vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model
vllm.v1.worker.gpu_worker:Worker.load_model
vllm.v1.worker.gpu_worker:Worker.execute_model
vllm.v1.worker.gpu_worker:Worker.initialize_from_config
vllm.v1.worker.gpu_worker:Worker.__init__
vllm.v1.worker.gpu_worker:Worker._init_workspace_and_model_runner
vllm.v1.worker.gpu_worker:Worker.determine_available_memory
vllm.v1.worker.utils:request_memory
vllm.utils.mem_utils:MemorySnapshot.__init__
vllm.model_executor.determinism.batch_invariant:init_batch_invariance
vllm.distributed.parallel_state:set_custom_all_reduce
vllm.v1.worker.gpu.model_runner:GPUModelRunner.capture_model
vllm.v1.worker.gpu.model_runner:GPUModelRunner.profile_run
vllm.v1.worker.gpu.model_runner:GPUModelRunner._remove_request
vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.needs_capture
vllm.compilation.cuda_graph:CUDAGraphWrapper.clear_all_graphs
vllm.compilation.breakable_cudagraph:BreakableCUDAGraphWrapper.clear_all_graphs
vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states
vllm.v1.worker.gpu_input_batch:InputBatch.remove_request
vllm.v1.worker.gpu_input_batch:InputBatch.condense
vllm.v1.worker.gpu_input_batch:InputBatch.refresh_metadata
vllm.v1.core.sched.scheduler:Scheduler.__init__
vllm.v1.core.sched.scheduler:Scheduler.schedule
vllm.v1.core.sched.scheduler:Scheduler.update_from_output
vllm.v1.core.sched.scheduler:Scheduler._preempt_request
vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks
vllm.v1.core.block_pool:BlockPool.touch
vllm.v1.core.block_pool:BlockPool.free_blocks
vllm.v1.core.block_pool:BlockPool._insert_block_hash
vllm.v1.core.block_pool:BlockPool.evict_blocks
vllm.v1.core.block_pool:BlockPool.get_num_free_blocks
vllm.v1.core.sched.scheduler:Scheduler.finish_requests
vllm.v1.core.sched.request_queue:create_request_queue
vllm.v1.core.sched.request_queue:RequestQueue.remove_request
vllm.v1.core.sched.request_queue:RequestQueue.prepend_requests
vllm.v1.core.sched.output:NewRequestData.from_request
vllm.distributed.parallel_state:_register_group
vllm.utils.ompmultiprocessing:OMPProcessManager.configure_omp_envs
""".split()  # noqa: SIM905

BODIES = """
vllm.v1.executor.multiproc_executor:WorkerProc.__init__
vllm.v1.worker.cpu_worker:CPUWorker.init_device
vllm.v1.worker.gpu_worker:Worker.init_device
vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model
vllm.v1.worker.gpu_worker:init_worker_distributed_environment
vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture
vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.release_graphs
vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.dispatch
vllm.distributed.parallel_state:GroupCoordinator.graph_capture
vllm.v1.worker.sentinel.gpu_worker_sentinel:WorkerSentinel._clean_worker_state
vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache
vllm.v1.core.sched.scheduler:Scheduler._preempt_request
vllm.v1.engine.core:EngineCore.step
vllm.v1.engine.core:EngineCore.step_with_batch_queue
vllm.v1.engine.core:EngineCore._initialize_kv_caches
vllm.distributed.parallel_state:GroupCoordinator.__init__
vllm.distributed.parallel_state:initialize_model_parallel
vllm.distributed.device_communicators.base_device_communicator:DeviceCommunicatorBase.__init__
""".split()  # noqa: SIM905
"""Copied, or followed so closely that a change in them matters."""

FIELDS = """
vllm.v1.core.sched.output:NewRequestData
vllm.v1.core.sched.output:CachedRequestData
vllm.v1.core.sched.output:SchedulerOutput
vllm.v1.outputs:ModelRunnerOutput
vllm.v1.core.kv_cache_utils:KVCacheBlock
vllm.v1.kv_cache_interface:KVCacheTensor
vllm.v1.worker.gpu_input_batch:CachedRequestState
""".split()  # noqa: SIM905

ATTRIBUTES = {
    "vllm.v1.core.sched.scheduler:Scheduler": "running waiting requests prev_step_scheduled_req_ids kv_cache_manager "
    "use_v2_model_runner model_uses_mrope policy grammar_compile_error_reqs",
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "block_pool coordinator",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": "single_type_managers",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": "req_to_blocks block_size",
    "vllm.v1.core.block_pool:BlockPool": "blocks num_gpu_blocks",
    "vllm.v1.request:Request": "num_stale_output_tokens drop_stale_output num_in_flight_tokens status request_id",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": "requests input_batch kv_caches num_prompt_logprobs "
    "execute_model_state kv_connector_output",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": "req_states cudagraph_manager execute_model_state kv_caches "
    "kv_cache_config",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager": "_graphs_captured graphs",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "req_id_to_index req_ids generators req_prompt_embeds",
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor": "is_failed failure_callback output_rank world_size",
}
GLOBALS = {
    "vllm.distributed.parallel_state": "_WORLD _NODE_COUNT _TP _ETP _DCP _PCP _PP _DP _EP",
    "vllm.v1.outputs": "EMPTY_MODEL_RUNNER_OUTPUT",
}


def lines() -> Iterator[str]:
    """What is used, one a line: its kind, its name, and its shape."""
    for name in SIGNATURES:
        shape = re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(_find(name))))
        yield f"signature {name} {shape}"
    for name in BODIES:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(_find(name)))))
        yield f"body {name} {hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]}"
    for name in FIELDS:
        yield f"fields {name} {' '.join(_find(name).__dataclass_fields__)}"
    for name, attributes in ATTRIBUTES.items():
        source = inspect.getsource(_find(name))
        there = [each for each in attributes.split() if re.search(rf"self\.{each}\b.*=", source)]
        yield f"attributes {name} {' '.join(there)}"
    for name, values in GLOBALS.items():
        there = [each for each in values.split() if hasattr(importlib.import_module(name), each)]
        yield f"globals {name} {' '.join(there)}"


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


if __name__ == "__main__":
    print("\n".join(lines()))
