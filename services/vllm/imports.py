"""All that a worker process imports, for the process from which workers are forked. No tensor is computed here."""

import torch._dynamo
import torch._inductor.compile_fx
import vllm.model_executor.model_loader
import vllm.v1.worker.cpu_worker

import services.vllm.process
import services.vllm.worker

__all__ = ["services", "torch", "vllm"]
