"""vLLM as a host of protection: the only place that imports vllm."""
