"""All that a worker process imports, for the process from which workers are forked. No tensor is computed here."""

import torch._dynamo
import torch._inductor.compile_fx
import vllm.model_executor.model_loader
from vllm.platforms import current_platform

import services.vllm.process

if current_platform.is_cpu():
    import services.vllm.worker as worker
else:
    import vllm.v1.worker.gpu.model_runner

    import services.vllm.gpu_worker as worker  # type: ignore[no-redef]

__all__ = ["services", "torch", "vllm", "worker"]
