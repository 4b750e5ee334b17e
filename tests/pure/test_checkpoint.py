"""What is wrong with a model's files is said in one line that names the file, the tensor or the key."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.worker.engine import model_files
from services.worker.engine.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    Expected,
    check_features,
    check_files,
    check_size,
    compare,
    max_positions,
    read_tensors,
    weight_files,
)
from shared.errors import ModelError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
TENSORS = {"model.embed_tokens.weight": ("BF16", (8, 4)), "model.norm.weight": ("F32", (4,))}
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4, "U8": 1}


def write(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(at))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that can be served, as far as its files say."""
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
    (tmp_path / "tokenizer.json").write_text("{}")
    write(tmp_path / SINGLE, TENSORS)
    return tmp_path


def sharded(model: Path) -> None:
    """Put two shards and an index in the place of the single file."""
    (model / SINGLE).unlink()
    weight_map = {}
    for number, (name, entry) in enumerate(TENSORS.items(), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        write(model / file, {name: entry})
        weight_map[name] = file
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@contextmanager
def refused(*names: str) -> Iterator[None]:
    with pytest.raises(ModelError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in names), message


def test_a_whole_checkpoint_is_taken(model: Path) -> None:
    check_files(model)
    assert {name: entry.shape for name, entry in read_tensors(model).items()} == {
        name: shape for name, (_, shape) in TENSORS.items()
    }
    sharded(model)
    check_files(model)
    assert {entry.file for entry in read_tensors(model).values()} == {path.name for path in weight_files(model)}


@pytest.mark.parametrize("file", [SINGLE, "tokenizer.json", CONFIG])
def test_a_pointer_of_git_lfs_is_no_file(model: Path, file: str) -> None:
    (model / file).write_text(POINTER)
    with refused(file, "Git LFS", "git lfs pull"):
        check_files(model)


def test_an_index_that_is_a_pointer_is_named(model: Path) -> None:
    sharded(model)
    (model / INDEX).write_text(POINTER)
    with refused(INDEX, "Git LFS"):
        check_files(model)


def test_a_file_cut_in_half_is_named_with_what_it_lacks(model: Path) -> None:
    content = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(content[: len(content) // 2])
    with refused(SINGLE, "cut"):
        check_files(model)
    (model / SINGLE).write_bytes(content[:-16])
    with refused(SINGLE, f"is cut: {len(content) - 16} bytes of {len(content)}"):
        check_files(model)
    (model / SINGLE).write_bytes(content + b"more")
    with refused(SINGLE, "too long"):
        check_files(model)


def test_a_missing_shard_is_named(model: Path) -> None:
    sharded(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with refused("model-00002-of-00002.safetensors is missing", INDEX):
        check_files(model)


def test_an_index_that_is_none_is_named(model: Path) -> None:
    sharded(model)
    for content in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../../etc/passwd"}}', "[" * 100_000):
        (model / INDEX).write_text(content)
        with refused(INDEX):
            check_files(model)


def test_missing_files_are_named(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with refused("tokenizer"):
        check_files(model)
    (model / SINGLE).unlink()
    with refused("safetensors"):
        read_tensors(model)
    (model / CONFIG).write_text("{'not': json}")
    with refused(CONFIG):
        check_files(model)
    (model / CONFIG).unlink()
    with refused("config.json is missing"):
        check_files(model)


def test_quantised_tensors_are_named(model: Path) -> None:
    for dtype in ("F8_E4M3", "I32", "U8"):
        write(model / SINGLE, TENSORS | {"model.layers.0.mlp.up_proj.weight": (dtype, (4, 4))})
        with refused(SINGLE, "model.layers.0.mlp.up_proj.weight", dtype, "quantised"):
            check_files(model)


def test_one_set_of_weights_is_read_though_two_lie_there(model: Path) -> None:
    write(model / "consolidated.safetensors", {"tok_embeddings.weight": ("BF16", (8, 4))})
    assert weight_files(model) == [model / SINGLE]
    sharded(model)
    assert len(weight_files(model)) == 2
    (model / INDEX).unlink()
    write(model / "consolidated.safetensors", {"model.norm.weight": ("F32", (4,))})
    with refused("model.norm.weight", "consolidated.safetensors", "two sets"):
        check_files(model)


@given(keep=st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_part_of_a_file_passes_for_the_whole(model: Path, keep: float) -> None:
    content = write(model / SINGLE, TENSORS).read_bytes()
    (model / SINGLE).write_bytes(content[: int(len(content) * keep)])
    with refused(SINGLE):
        read_tensors(model)


@given(at=st.integers(0, 200), byte=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_header_with_a_wrong_byte_is_read_or_refused_but_never_crashes(model: Path, at: int, byte: int) -> None:
    content = bytearray(write(model / SINGLE, TENSORS).read_bytes())
    content[at] = byte
    (model / SINGLE).write_bytes(content)
    said = SINGLE
    try:
        read_tensors(model)
    except ModelError as error:
        said = str(error)
    assert SINGLE in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config", "fp8")),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantization_config", "gptq")),
        ({"quantization_config": {"quant_method": "awq"}}, ("quantization_config", "awq")),
        ({"compression_config": {"format": "int-quantized"}}, ("compression_config",)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("rope_scaling", "dynamic")),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, ("rope_scaling", "longrope")),
        ({"rope_scaling": {"type": "su"}}, ("rope_scaling", "su")),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": None}},
            ("rope_parameters.full_attention", "dynamic"),
        ),
        ({"layer_types": ["linear_attention", "full_attention"]}, ("layer_types", "linear_attention")),
        ({"layer_types": ["chunked_attention"]}, ("layer_types", "chunked_attention")),
    ],
)
def test_what_is_not_served_is_named_by_its_key(model: Path, config: dict[str, Any], names: tuple[str, ...]) -> None:
    with refused(CONFIG, *names):
        check_features(model, config)
    (model / CONFIG).write_text(json.dumps(config))
    with refused(CONFIG, *names):
        check_files(model)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None, "rope_scaling": None, "layer_types": None},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_parameters": {"rope_theta": 10000.0}},
        {"layer_types": ["sliding_attention", "full_attention"]},
    ],
)
def test_what_is_served_passes(model: Path, config: dict[str, Any]) -> None:
    check_features(model, config)


def test_yarn_stretches_the_limit_and_nothing_else_does() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert max_positions({"max_position_embeddings": 40960, "rope_scaling": yarn}) == 131072
    assert max_positions({"max_position_embeddings": 163840, "rope_parameters": yarn | {"factor": 2.0}}) == 163840
    assert max_positions({"max_position_embeddings": 1024, "rope_scaling": {"type": "yarn", "factor": 2.0}}) == 2048
    linear = {"rope_type": "linear", "factor": 4.0}
    assert max_positions({"max_position_embeddings": 4096, "rope_scaling": linear}) == 4096
    assert max_positions({"max_position_embeddings": 4096}) == 4096


def test_a_size_that_does_not_divide_is_refused_with_those_that_do(model: Path) -> None:
    config = {"num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 96}
    check_size(model, config, 3)
    with refused("6 KV heads", "allowed: 1, 2, 3, 6"):
        check_size(model, config, 4)
    with refused("allowed: 1, 2"):
        check_size(model, config | {"intermediate_size": 64}, 3)


EXPECTED = Expected({"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)})


def test_tensors_that_are_not_what_the_architecture_loads_are_named(model: Path) -> None:
    compare(model, read_tensors(model), EXPECTED)
    name = "model.layers.0.self_attn.q_proj.weight"
    with refused(f"{name} is missing"):
        compare(model, read_tensors(model), Expected({**EXPECTED.shapes, name: (4, 4)}))
    with refused(SINGLE, "model.embed_tokens.weight has shape [8, 4]", "[16, 4]"):
        compare(model, read_tensors(model), Expected({**EXPECTED.shapes, "model.embed_tokens.weight": (16, 4)}))
    with refused("model.norm.weight has shape [4]", "[8]"):
        compare(model, read_tensors(model), Expected({**EXPECTED.shapes, "model.norm.weight": (8,)}))


def test_a_renamed_tensor_is_named_with_what_lies_there_instead(model: Path) -> None:
    stem = "model.layers.0.self_attn.q_proj."
    write(model / SINGLE, TENSORS | {stem + "qweight": ("F16", (4, 4)), stem + "scales": ("F16", (1, 4))})
    with refused(stem + "weight is missing", stem + "qweight"):
        compare(model, read_tensors(model), Expected({**EXPECTED.shapes, stem + "weight": (4, 4)}))


def test_a_tensor_that_would_be_dropped_is_named_unless_it_means_nothing(model: Path) -> None:
    import re

    write(model / SINGLE, TENSORS | {"lm_head.bias": ("F32", (8,)), "lm_head.weight": ("F32", (8, 4))})
    with refused(SINGLE, "lm_head.bias"):
        compare(model, read_tensors(model), Expected({**EXPECTED.shapes, "lm_head.weight": (8, 4)}))
    ignored = re.compile(r"^lm_head\.bias$")
    tied = Expected({**EXPECTED.shapes, "lm_head.weight": (8, 4)}, frozenset({"lm_head.weight"}), ignored)
    compare(model, read_tensors(model), tied)
    write(model / SINGLE, TENSORS)
    compare(model, read_tensors(model), tied)


class FakeHub:
    """snapshot_download over a dictionary of a repository's files: which were fetched?"""

    def __init__(self, folder: Path, files: Mapping[str, bytes]) -> None:
        self._folder = folder
        self._files = files

    def __call__(self, name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        from huggingface_hub.utils import filter_repo_objects

        for file in filter_repo_objects(
            list(self._files), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (self._folder / file).parent.mkdir(exist_ok=True)
            (self._folder / file).write_bytes(self._files[file])
        return str(self._folder)


def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, source: Path, **extra: bytes) -> None:
    files = {path.name: path.read_bytes() for path in source.iterdir()} | extra
    monkeypatch.setattr("huggingface_hub.snapshot_download", FakeHub(folder, files))


@pytest.mark.parametrize("shards", [False, True])
def test_of_a_hub_id_one_set_of_weights_is_fetched(
    model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, shards: bool
) -> None:
    if shards:
        sharded(model)
    wanted = {path.name for path in model.iterdir()}
    cache = tmp_path_factory.mktemp("hub")
    others = {"consolidated.safetensors": b"x", "original/model.safetensors": b"x", "onnx/config.json": b"{}"}
    hub(monkeypatch, cache, model, **others)
    assert model_files.resolve_model("someone/small") == cache
    assert {str(path.relative_to(cache)) for path in cache.rglob("*")} == wanted


def test_a_hub_models_configuration_is_refused_before_its_weights_are_fetched(
    model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / CONFIG).write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    cache = tmp_path_factory.mktemp("hub")
    hub(monkeypatch, cache, model)
    with refused("quantization_config"):
        model_files.resolve_model("someone/small")
    assert not (cache / SINGLE).exists()
    (model / SINGLE).unlink()
    (model / CONFIG).write_text("{}")
    hub(monkeypatch, cache, model)
    with refused("someone/small", SINGLE):
        model_files.resolve_model("someone/small")
