"""What of vLLM's configuration is refused at the start, and in which words."""

from types import SimpleNamespace
from typing import Any

import pytest

from services.vllm import flags


def config(**changes: Any) -> Any:
    """A VllmConfig-like value of what is protected, with parts changed: "parallel_config.nnodes" as parallel_nnodes."""
    parts = {
        "parallel_config": {
            "tensor_parallel_size": 3, "pipeline_parallel_size": 1, "data_parallel_size": 1, "nnodes": 1,
            "distributed_executor_backend": "mp", "worker_cls": "auto", "disable_custom_all_reduce": True,
            "enable_expert_parallel": False, "enable_elastic_ep": False, "decode_context_parallel_size": 1,
            "enable_dbo": False,
        },
        "cache_config": {"enable_prefix_caching": True, "kv_offloading_size": None},
        "model_config": {
            "is_multimodal_model": False, "is_encoder_decoder": False, "is_hybrid": False, "runner_type": "generate",
            "enable_sleep_mode": False,
        },
        "compilation_config": {"pass_config": SimpleNamespace(fuse_allreduce_rms=False)},
        "kernel_config": {"enable_flashinfer_autotune": False},
    }  # fmt: skip
    top = {"use_v2_model_runner": True}
    top |= {"speculative_config": None, "kv_transfer_config": None, "ec_transfer_config": None, "lora_config": None}
    for name, value in changes.items():
        part, _, field = name.partition("_")
        if f"{part}_config" in parts:
            parts[f"{part}_config"][field] = value
        else:
            top[name] = value
    return SimpleNamespace(**{name: SimpleNamespace(**values) for name, values in parts.items()}, **top)


def test_tensor_parallelism_on_one_host_is_not_refused() -> None:
    assert flags.refusal(config(), "cpu") == ""
    assert flags.refusal(config(parallel_distributed_executor_backend=flags.EXECUTOR), "cpu") == ""
    assert flags.refusal(config(parallel_worker_cls=flags.WORKERS["cpu"]), "cpu") == ""


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parallel_pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"parallel_data_parallel_size": 2}, "--data-parallel-size"),
        ({"parallel_nnodes": 2}, "--nnodes"),
        ({"parallel_decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"parallel_distributed_executor_backend": "ray"}, "ray"),
        ({"parallel_worker_cls": "my.Worker"}, "my.Worker"),
        ({"parallel_enable_expert_parallel": True}, "--enable-expert-parallel"),
        ({"cache_enable_prefix_caching": False}, "--no-enable-prefix-caching"),
        ({"cache_kv_offloading_size": 4.0}, "--kv-offloading-size"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"model_is_multimodal_model": True}, "multimodal"),
        ({"model_is_hybrid": True}, "recurrent"),
        ({"model_runner_type": "pooling"}, "--runner"),
    ],
)
def test_what_is_not_protected_is_refused_in_one_line_that_names_its_flag(changes: dict[str, Any], named: str) -> None:
    told = flags.refusal(config(**changes), "cpu")
    assert named in told
    assert "\n" not in told


def test_gpus_need_whole_blocks_and_collectives_that_end() -> None:
    whole = flags.GPU_ENVIRONMENT["VLLM_KV_CACHE_LAYOUT"]
    assert "--disable-custom-all-reduce" in flags.refusal(
        config(parallel_disable_custom_all_reduce=False), "cuda", whole
    )
    assert "VLLM_KV_CACHE_LAYOUT" in flags.refusal(config(), "cuda", "LBHNC")
    assert "VLLM_KV_CACHE_LAYOUT" in flags.refusal(config(), "cuda")
    assert flags.refusal(config(), "cuda", whole) == ""
    assert "cuda" in flags.refusal(config(), "xpu", whole)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compilation_pass_config": SimpleNamespace(fuse_allreduce_rms=True)}, "fuse_allreduce_rms"),
        ({"kernel_enable_flashinfer_autotune": True}, "--enable-flashinfer-autotune"),
        ({"parallel_enable_dbo": True}, "--enable-dbo"),
        ({"use_v2_model_runner": False}, "VLLM_USE_V2_MODEL_RUNNER"),
    ],
)
def test_what_talks_past_the_communicator_or_is_of_the_other_runner_is_refused_on_gpus_only(
    changes: dict[str, Any], named: str
) -> None:
    assert named in flags.refusal(config(**changes), "cuda", flags.GPU_ENVIRONMENT["VLLM_KV_CACHE_LAYOUT"])
    assert flags.refusal(config(**changes), "cpu") == ""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_scheduler_that_looks_ahead_is_taken_where_steps_overlap(asynchronous: bool) -> None:
    given = flags.classes("cpu", asynchronous=asynchronous)
    named = dict(zip(given[::2], given[1::2], strict=True))
    assert named["--scheduler-cls"].endswith("GhostAsyncScheduler" if asynchronous else "GhostScheduler")
    assert named["--worker-cls"] == flags.WORKERS["cpu"]
