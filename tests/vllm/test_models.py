"""One loss for each kind of model: the same tokens. The engine core runs in this process, and there is no spare."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from tests.vllm.protected import cluster_of
from tests.vllm.server import CLASSES, ENVIRONMENT, prompt
from tests.vllm.tiny_model import make_model_dir

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

SERVING_S = 180.0
BLOCK, TOKENS = 32, 24
GROUPS = {"Gemma3": 6, "GptOss": 3}
"""KV cache groups: a record counts the tokens of each."""


@dataclass(frozen=True)
class Family:
    """A transformers model and what is changed of its small configuration."""

    name: str
    config: str = ""
    changes: tuple[tuple[str, Any], ...] = ()
    unable: str = ""
    """Why it can't be tried on CPUs."""
    how: signal.Signals = signal.SIGKILL


FAMILIES = {
    "qwen3": Family("Qwen3", how=signal.SIGSTOP),
    "qwen3-moe": Family("Qwen3Moe", changes=(("num_experts", 6), ("num_experts_per_tok", 2),
                                             ("moe_intermediate_size", 96))),
    "gemma3, sliding windows": Family("Gemma3", "Gemma3TextConfig", (("sliding_window", 64), ("num_hidden_layers", 6),
                                      ("query_pre_attn_scalar", 32))),
    "one KV head for all ranks": Family("Llama", changes=(("num_key_value_heads", 1),)),
    "deepseek, latent attention": Family("DeepseekV2", unable="stock vLLM's CPU build, too, goes on otherwise when a "
        "text of latent attention is prefilled instead of decoded, and it has no prefix cache for it"),
    "gpt-oss": Family("GptOss", changes=(("num_local_experts", 3), ("num_experts_per_tok", 2),
                                         ("sliding_window", 64))),
}  # fmt: skip


@contextmanager
def _engine(model: Path, coordinator: str) -> Iterator[Any]:
    """vLLM's engine, with its core in this process."""
    os.environ.update(ENVIRONMENT)
    changed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "GHOST_COORDINATOR_URL": coordinator, "GHOST_SPARES": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setenv(name, value)
        from vllm import EngineArgs, LLMEngine

        names = {flag.removeprefix("--").replace("-", "_"): name for flag, name in CLASSES.items()}
        engine = LLMEngine.from_engine_args(
            EngineArgs(str(model), dtype="float32", tensor_parallel_size=3, enforce_eager=True, max_model_len=1024,
                       block_size=BLOCK, max_num_seqs=4, max_num_batched_tokens=256, **names)
        )  # fmt: skip
        try:
            yield engine
        finally:
            engine.engine_core.shutdown()


def _run(engine: Any, name: str, how: signal.Signals | None = None) -> list[list[int]]:
    """Two requests with a common beginning; `how` rank 1 ends when one has a third of its tokens."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    answers: dict[str, list[int]] = {}
    for number in range(2):
        ids = prompt(1, 100) + prompt(2 + number, 80)
        engine.add_request(f"{name}-{number}", {"prompt_token_ids": ids}, parameters)
    while engine.has_unfinished_requests():
        for output in engine.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)
        if how is not None and max(map(len, answers.values()), default=0) >= TOKENS // 3:
            os.kill(engine.model_executor._ranks[1].pid, how)
            how = None
    return [answers[each] for each in sorted(answers)]


def _records(status: dict[str, Any], since: float) -> list[dict[str, Any]]:
    return [each for each in status["recoveries"] if each["started"] >= since and each["lost_ranks"] == [1]]


def _wait(condition: Any, what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def status(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """Where one engine after the other dials, and what asks for the cluster's status."""
    folder = tmp_path_factory.mktemp("cluster")
    with cluster_of(tiny_llama, folder) as (cluster, loop):

        def now() -> dict[str, Any]:
            """Told after this was called."""
            began = time.monotonic()
            while True:
                told = asyncio.run_coroutine_threadsafe(cluster.status(), loop).result(10)
                if told["now"] >= began:
                    return told
                time.sleep(0.05)

        yield cluster.coordinator_url, now


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_tokens_are_the_same_when_a_rank_dies(family: Family, status: tuple[str, Any], tmp_path: Path) -> None:
    if family.unable:
        pytest.skip(family.unable)
    coordinator, now = status
    model = make_model_dir(tmp_path / "model", family.name, family.config, **dict(family.changes))
    with _engine(model, coordinator) as engine:
        _wait(lambda: now()["state"] == "serving" and len(now()["workers"]) == 3, "not whole", SERVING_S)
        before = _run(engine, "before")
        assert all(len(tokens) == TOKENS for tokens in before)
        _wait(lambda: not now()["stripes_pending"] + now()["stripes_unprotected"], "not protected", 30)
        since = now()["now"]
        assert _run(engine, "after", family.how) == before
        _wait(lambda: _records(now(), since), "no record", 30)
        (record,) = _records(now(), since)
        assert record["restored_pages"] > 0
        assert record["recomputed_tokens"] <= 2 * (BLOCK + 1) * GROUPS.get(family.name, 1)
