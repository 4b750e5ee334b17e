"""Whole worker processes on one real GPU, with all that is around them: the group's only rank is killed."""

import asyncio
import os
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.cluster.test_one_rank import check_survival
from tests.tiny_tokenizer import make_tokenizer_dir
from tests.worker.rank_threads import small_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or a torch without CUDA"),
    pytest.mark.timeout(180),
]


async def test_the_only_worker_dies_and_the_next_one_on_its_gpu_goes_on(tmp_path: Path) -> None:
    """Proves the worker process: a fork with CUDA, steps, parity from the device to a store and back, its KV's hash.

    Coordinator, gateway, store and supervisor are real. TP = 1: that ranks find one another over NCCL is not proved.
    """
    folder = small_model(tmp_path, "Llama", vocab_size=400, max_position_embeddings=4096)
    await check_survival(make_tokenizer_dir(folder), "cuda")


async def test_vllms_only_rank_dies_and_the_next_one_on_its_gpu_goes_on(tmp_path: Path) -> None:
    """Proves GhostGpuWorker: groups without torch's, blocks of BLNHC as pages, a rank that loads on the dead one's GPU.

    The stream's tokens are those of a run without a fault, what is lost comes from the store, and graphs, which the new
    rank begins without, are captured while no request runs. TP = 1: NCCL between ranks, and its abort, are not proved.
    """
    pytest.importorskip("vllm", reason="no vLLM in this environment")
    from vllm.platforms import current_platform

    if current_platform.device_type != "cuda":
        pytest.skip("vLLM is here as its CPU build: install its CUDA build")
    from services.vllm import flags
    from tests.vllm.protected import protected
    from tests.vllm.server import prompt, stream
    from tests.vllm.streams import Breaks
    from tests.vllm.tiny_model import make_model_dir

    model = make_model_dir(tmp_path / "model")
    classes = flags.classes("cuda", asynchronous=True)
    given = [*flags.GPU_FLAGS, *classes, "--gpu-memory-utilization", "0.3", "--no-enforce-eager", "--dtype", "bfloat16"]
    given += shlex.split(os.environ.get("GHOST_TEST_VLLM_FLAGS", ""))
    environment = flags.GPU_ENVIRONMENT | {"GHOST_VLLM_ANY_VERSION": os.environ.get("GHOST_VLLM_ANY_VERSION", "0")}
    if find_spec("flashinfer") is None:  # the sampler asks for it on this device, there or not
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    with protected(model, tmp_path, *given, size=1, spares=0, **environment) as one:
        ids = prompt(1, 300)
        before = await stream(one.server, ids, 40)
        held = await one.until(lambda status: status["stripes_protected"] >= 300 // 32, "not protected")
        after = await stream(one.server, ids, 40, Breaks(8, lambda: one.server.kill(0)))
        assert after.tokens == before.tokens
        (record,) = await one.records(held["now"])
        assert record["restored_pages"] >= 300 // 32
        async with asyncio.timeout(60):
            while "Graph capturing finished" not in one.log().partition("CUDA graphs are captured again")[2]:
                await asyncio.sleep(0.2)
        again = await stream(one.server, ids, 40)
        assert again.tokens == before.tokens
