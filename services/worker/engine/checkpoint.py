"""What a model's files say of themselves, looked at before anybody waits for them: no tensor is read, torch isn't used.

Two questions are answered: does `config.json` ask for anything that is not served, and is what the headers of the
safetensors list (names, shapes, types, sizes) whole, and what the architecture expects. Every answer that is no is a
ModelError of one line that names the file, the tensor or the key.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER = 100 << 20  # what the safetensors library takes
_POINTER = b"version https://git-lfs"
_SERVED_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone; those of others (dynamic, longrope) change with the
longest sequence of a step, so that a sequence's KV would depend on its neighbours."""
_SERVED_LAYERS = ("full_attention", "sliding_attention")
_QUANTISED = ("quantization_config", "compression_config")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header of its file lists it."""

    file: str
    dtype: str  # safetensors' name: "BF16"
    shape: Shape


@dataclass(frozen=True, slots=True)
class Expected:
    """The tensors that an architecture loads: `optional` may be missing, and what `ignored` finds may be there too."""

    shapes: Mapping[str, Shape]
    optional: frozenset[str] = field(default_factory=frozenset)
    ignored: re.Pattern[str] | None = None


def check_files(directory: Path) -> None:
    """All that can be said of a model's directory in a moment. Raises ModelError for what can't be served."""
    check_features(directory, read_json(directory / CONFIG))
    if not any((directory / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"model {directory}: no tokenizer (tokenizer.json)")
    for path in sorted((*directory.glob("*.json"), *directory.glob("*.model"))):
        _check_pointer(path)
    read_tensors(directory)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that one of a model's files holds. Raises ModelError."""
    if not path.is_file():
        raise ModelError(f"model {path.parent}: {path.name} is missing")
    _check_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model {path.parent}: {path.name} can't be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"model {path.parent}: {path.name} is no JSON object")
    return content


def check_features(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError where a configuration, raw or with its defaults filled in, asks for what is not served."""

    def refuse(why: str) -> ModelError:
        return ModelError(f"model {directory}: {CONFIG}: {why}")

    for key in _QUANTISED:
        if how := config.get(key):
            method = how.get("quant_method") or how.get("quant_algo") if isinstance(how, dict) else how
            raise refuse(
                f"{key} ({method}): quantised weights are not served; take a checkpoint in bfloat16 or float16"
            )
    for key, kind in _rope_types(config):
        if kind not in _SERVED_ROPE:
            raise refuse(f"{key} {kind!r} is not served; served: {', '.join(_SERVED_ROPE)}")
    layers = config.get("layer_types") or ()
    if unknown := sorted({str(layer) for layer in layers} - set(_SERVED_LAYERS)):
        raise refuse(f"layer_types {', '.join(unknown)}: not served; served: {', '.join(_SERVED_LAYERS)}")


def check_size(directory: Path, config: Mapping[str, Any], size: int) -> None:
    """Raise ModelError where a model can't be split into `size` ranks, naming the sizes that do."""
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    inner = config["intermediate_size"]
    allowed = [k for k in range(1, kv_heads + 1) if kv_heads % k == 0 and inner % k == 0]
    if size not in allowed:
        raise ModelError(
            f"model {directory.name} has {kv_heads} KV heads and can't be split into {size} ranks; "
            f"allowed: {', '.join(map(str, allowed))}"
        )


def max_positions(config: Mapping[str, Any]) -> int:
    """How long a sequence may be: with YaRN, as far as its factor stretches the original length."""
    longest: int = config["max_position_embeddings"]
    for _, rope in _rope_settings(config):
        if _kind(rope) == "yarn":
            original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            longest = max(longest, int(original * (rope.get("factor") or 1)))
    return longest


def _rope_settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each set of rotary settings: one for the model, or one a type of layer."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if not isinstance(rope, dict):
            continue
        nested = {name: each for name, each in rope.items() if isinstance(each, dict)}
        yield from ((f"{key}.{name}", each) for name, each in nested.items())
        if not nested:
            yield key, rope


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_types(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    return ((key, _kind(rope)) for key, rope in _rope_settings(config))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors of a model: one set, though several may lie there. Raises ModelError if there is none.

    As transformers does, `model.safetensors` goes before the shards of an index; without both all files are taken, of
    which `read_tensors` wants that no two have the same tensor.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        return [directory / name for name in shards(directory)]
    if found := sorted(directory.glob("*.safetensors")):
        return found
    raise ModelError(f"model {directory}: no *.safetensors (other weight formats are not read)")


def shards(directory: Path) -> list[str]:
    """The names of the files that a model's index lists."""
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"model {directory}: {INDEX} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"model {directory}: {INDEX} names {name!r}, which is no file beside it")
    return names


def read_tensors(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of a model, from the headers of its files. Raises ModelError where a file is not whole."""
    found: dict[str, TensorEntry] = {}
    for path in weight_files(directory):
        for name, entry in _read_header(path).items():
            if name in found:
                both = f"{found[name].file} and in {path.name}"
                raise ModelError(f"model {directory}: {name} is in {both}: these are two sets of weights")
            found[name] = entry
    return found


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file, whose size must be that which its header says."""
    where = f"model {path.parent}: {path.name}"
    if not path.is_file():
        raise ModelError(f"{where} is missing, though {INDEX} names it")
    _check_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _MAX_HEADER:
            raise ModelError(f"{where} is no safetensors file")
        if 8 + length > size:
            raise ModelError(f"{where} is cut: {size} bytes, of which its header alone takes {8 + length}")
        try:
            header = json.loads(file.read(length))
            entries = {name: _entry(path.name, each) for name, each in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelError(f"{where}: its header can't be read: {type(error).__name__}: {one_line(error)}") from error
    end = 0
    for name, (entry, first, last) in entries.items():
        if entry.dtype not in _BYTES:
            raise ModelError(
                f"{where}: {name} has type {entry.dtype}: quantised weights are not served; served: {', '.join(_BYTES)}"
            )
        if first < 0 or last - first != math.prod(entry.shape) * _BYTES[entry.dtype]:
            raise ModelError(f"{where}: the header gives {name} {last - first} bytes for {list(entry.shape)}")
        end = max(end, last)
    if size != 8 + length + end:
        state = "is cut" if size < 8 + length + end else "is too long"
        raise ModelError(f"{where} {state}: {size} bytes of {8 + length + end}")
    return {name: entry for name, (entry, _, _) in entries.items()}


def _entry(file: str, content: Mapping[str, Any]) -> tuple[TensorEntry, int, int]:
    first, last = content["data_offsets"]
    return (
        TensorEntry(file, str(content["dtype"]), tuple(int(each) for each in content["shape"])),
        int(first),
        int(last),
    )


def _check_pointer(path: Path) -> None:
    where = f"model {path.parent}: {path.name}"
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise ModelError(f"{where} can't be read: {error.strerror}") from error
    if start == _POINTER:
        raise ModelError(f"{where} is a Git LFS pointer, not the file itself: run `git lfs pull` there")


def compare(directory: Path, found: Mapping[str, TensorEntry], expected: Expected) -> None:
    """Raise ModelError unless the files have each tensor that is loaded, in its shape, and none that is dropped."""
    where = f"model {directory}"
    for name, shape in expected.shapes.items():
        entry = found.get(name)
        if entry is None and name not in expected.optional:
            stem = name.removesuffix("weight")
            alike = [other for other in sorted(found) if other.startswith(stem) and other not in expected.shapes]
            instead = f"; there is {alike[0]} ({found[alike[0]].dtype}) in {found[alike[0]].file}" if alike else ""
            raise ModelError(f"{where}: weight {name} is missing{instead}")
        if entry is not None and entry.shape != shape:
            raise ModelError(
                f"{where}: {entry.file}: {name} has shape {list(entry.shape)}, where {CONFIG} asks for {list(shape)}"
            )
    for name, entry in found.items():
        if name not in expected.shapes and not (expected.ignored and expected.ignored.search(name)):
            raise ModelError(f"{where}: {entry.file}: {name} is of no use to the architecture, and would be dropped")


def one_line(error: BaseException) -> str:
    """What an error of a library says, fit for a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
