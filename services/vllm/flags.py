"""What of vLLM's configuration can be protected; what is refused at the start, each in one line. Imports no vllm."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

EXECUTOR = "services.vllm.executor.GhostExecutor"
SCHEDULER = "services.vllm.scheduler.GhostScheduler"
ASYNC_SCHEDULER = "services.vllm.scheduler.GhostAsyncScheduler"
WORKERS = {"cpu": "services.vllm.worker.GhostCpuWorker", "cuda": "services.vllm.gpu_worker.GhostGpuWorker"}
"""Our class for vLLM's --worker-cls, by the platform's device type."""

BLOCKS_OUTERMOST = ("BLHNC", "BLNHC", "BHLNC")
"""Layouts in which a block is one range of bytes."""
GPU_FLAGS = (
    "--disable-custom-all-reduce",
    "--no-enable-flashinfer-autotune",
    "-cc.pass_config.fuse_allreduce_rms=False",
)
GPU_ENVIRONMENT = {"VLLM_KV_CACHE_LAYOUT": "BLNHC"}
GPU_UNTRIED = (
    "vLLM's ranks on GPUs are protected by code that has not served on a GPU yet: it is tested on CPUs and on a "
    "fake device (docs/gpu.md)"
)
_GPU_CONFIG = {
    "compilation_config.pass_config.fuse_allreduce_rms": "all-reduce fused with normalisation "
    "(compilation_config.pass_config.fuse_allreduce_rms)",
    "kernel_config.enable_flashinfer_autotune": "FlashInfer's autotuning (--enable-flashinfer-autotune)",
    "parallel_config.enable_dbo": "two batches at once (--enable-dbo)",
}
"""What talks to other ranks past the communicator that ends with the epoch."""

_CONFIG = {
    "parallel_config.pipeline_parallel_size over 1": "pipeline parallelism (--pipeline-parallel-size)",
    "parallel_config.data_parallel_size over 1": "data parallelism (--data-parallel-size)",
    "parallel_config.nnodes over 1": "several nodes (--nnodes)",
    "parallel_config.decode_context_parallel_size over 1": "context parallelism (--decode-context-parallel-size)",
    "parallel_config.prefill_context_parallel_size over 1": "context parallelism (--prefill-context-parallel-size)",
    "parallel_config.enable_expert_parallel": "expert parallelism (--enable-expert-parallel)",
    "parallel_config.enable_elastic_ep": "elastic expert parallelism (--enable-elastic-ep)",
    "speculative_config": "speculative decoding (--speculative-config)",
    "kv_transfer_config": "KV connectors (--kv-transfer-config)",
    "ec_transfer_config": "encoder cache connectors (--ec-transfer-config)",
    "lora_config": "LoRA adapters (--enable-lora)",
    "cache_config.kv_offloading_size": "offloading of KV (--kv-offloading-size)",
    "model_config.enable_sleep_mode": "sleep mode (--enable-sleep-mode)",
    "model_config.is_multimodal_model": "a multimodal model",
    "model_config.is_encoder_decoder": "an encoder-decoder model",
    "model_config.is_hybrid": "a model with recurrent layers (Mamba and its like)",
    "model_config.is_attention_free": "a model without attention",
}
"""A part of VllmConfig -> what it is when it is there, or over 1."""


VLLM_WORKERS = ("vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker")
"""What vLLM makes of --worker-cls auto."""


def refusal(config: Any, platform: str, layout: str | None = None) -> str:
    """Why an engine of this VllmConfig can't be protected, in one line; empty if it can.

    platform: "cpu" or "cuda", as vLLM names it. layout: what VLLM_KV_CACHE_LAYOUT asks for.
    """
    return next(_refusals(config, platform, layout), "")


def _refusals(config: Any, platform: str, layout: str | None) -> Iterator[str]:
    if platform not in WORKERS:
        yield f"no rank of vLLM can be protected on {platform}: workers are there for {' and '.join(WORKERS)}"
    for path, what in _CONFIG.items():
        name, over, _ = path.partition(" over ")
        value = _get(config, name) or 0
        if value > 1 if over else value:
            yield f"{what}: not protected yet; leave it out, or run vLLM without GhostServe"
    parallel = config.parallel_config
    if (backend := _name(parallel.distributed_executor_backend)) not in ("", "mp", EXECUTOR):
        yield f"--distributed-executor-backend {backend}: GhostServe starts the workers itself"
    worker = _name(parallel.worker_cls)
    if worker not in ("auto", "", *WORKERS.values(), *VLLM_WORKERS) and not _is_own(worker):
        yield f"--worker-cls {worker}: workers are of GhostServe's own class, or of one made of it"
    if not config.cache_config.enable_prefix_caching:
        yield "without prefix caching (--no-enable-prefix-caching) no block has a name by which it could come back"
    if (runner := config.model_config.runner_type) != "generate":
        yield f"--runner {runner}: only models that generate text have KV to protect"
    if platform != "cpu":
        yield from _gpu_refusals(config, platform, layout)


def _gpu_refusals(config: Any, platform: str, layout: str | None) -> Iterator[str]:
    if not config.parallel_config.disable_custom_all_reduce:
        yield "vLLM's own all-reduce can't be ended when a rank is lost: --disable-custom-all-reduce is needed"
    if layout not in BLOCKS_OUTERMOST:
        yield f"a block must be one range of memory: VLLM_KV_CACHE_LAYOUT={GPU_ENVIRONMENT['VLLM_KV_CACHE_LAYOUT']}"
    for path, what in _GPU_CONFIG.items():
        if _get(config, path):
            yield f"{what} talks to other ranks past what ends when one is lost: it must be off"
    if not _get(config, "use_v2_model_runner"):
        yield "on GPUs only vLLM's model runner V2 is protected: VLLM_USE_V2_MODEL_RUNNER=0, or a flag, asks for V1"


def _name(given: Any) -> str:
    """A class, or the name of one, as its name."""
    return given if isinstance(given, str) else f"{given.__module__}.{given.__qualname__}" if given else ""


def _get(config: Any, path: str) -> Any:
    """A part of the configuration by its path; None where this vLLM has no such part."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _is_own(worker: str) -> bool:
    """Whether a class, by its full name, is made of one of ours."""
    module, _, name = worker.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return False
    return any(f"{base.__module__}.{base.__qualname__}" in WORKERS.values() for base in kind.__mro__)


def classes(platform: str, *, asynchronous: bool) -> tuple[str, ...]:
    """The flags of `vllm serve` for our classes. `asynchronous`: steps are scheduled while one is in flight."""
    return (
        "--distributed-executor-backend", EXECUTOR,
        "--worker-cls", WORKERS[platform],
        "--scheduler-cls", ASYNC_SCHEDULER if asynchronous else SCHEDULER,
    )  # fmt: skip
