"""Our sharded, paged models against transformers' own, in float32; and their KV bits, however they were computed."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from services.worker.engine import attention
from services.worker.engine.batch import Chunk
from services.worker.engine.checkpoint import check_files
from services.worker.engine.model import RankModel
from services.worker.engine.model_files import resolve_model
from services.worker.engine.sampler import sample_greedy
from services.worker.engine.spec import read_spec
from services.worker.engine.tensor_parallel import PackedLinear, Ranks
from shared.errors import ModelError
from tests.worker.rank_threads import RankThreads, Story, generate, small_model

FAMILIES = {
    "Llama": {},
    "Llama-biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": None},
    "Mistral-window": {"sliding_window": 37},
    "Gemma": {},  # scaled embeddings, norms that add one
    "Phi": {"partial_rotary_factor": 0.5},  # a bias in the head, norms with one
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = request.param.partition("-")[0]
    return small_model(tmp_path_factory.mktemp(request.param), family, **FAMILIES[request.param])


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, 211, length).tolist()  # type: ignore[no-any-return]


def reference(model_dir: Path, tokens: list[int], count: int) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = torch.tensor([tokens])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return out[0, len(tokens) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_greedy_text_is_that_of_transformers(model_dir: Path, size: int) -> None:
    tokens = prompt(83)
    group = RankThreads(model_dir, size)
    ours = generate(group, Story(tokens, range(3, 20)), 24, chunk=33)
    group.close()
    assert ours == reference(model_dir, tokens, 24)


@pytest.mark.parametrize(("size", "page_tokens"), [(1, 16), (3, 16), (2, 32)])
def test_kv_bits_do_not_depend_on_how_tokens_were_grouped(model_dir: Path, size: int, page_tokens: int) -> None:
    """The promise behind recovery: a restart at any page boundary, in any company, gives the same KV and tokens."""
    tokens, count = prompt(75), 30
    pages = math.ceil((len(tokens) + count) / page_tokens)
    group = RankThreads(model_dir, size, page_tokens=page_tokens)
    whole = Story(tokens, range(pages))
    generated = generate(group, whole, count)
    computed = whole.done
    expected = group.digests(whole.pages, computed)

    for start in range(0, computed, page_tokens):
        again = Story(tokens, np.arange(pages) * 2 + 1)
        again.tokens = whole.tokens[:computed]
        kept, moved = whole.pages[: start // page_tokens], again.pages[: start // page_tokens]
        for pool in group.pools:
            pool.kv.fill_(float("nan"))  # what is in a page before it is written must not matter
        rebuild = Story(tokens, range(pages))
        rebuild.tokens = whole.tokens[:computed]
        if start:
            group.step([rebuild.chunk(start)])
            for pool in group.pools:
                pool.kv[moved] = pool.kv[kept]
        again.done = start
        other = Story(prompt(40, seed=start), range(40, 50))
        step = np.random.default_rng(start).integers(1, 60)
        while again.done < computed:
            company = [other.chunk(7)] if other.done < 40 else []
            logits = group.step([*company, again.chunk(int(step))])
        assert sample_greedy(logits[-1:]) == generated[-1:], start
        assert group.digests(again.pages, computed) == expected, start
    group.close()


def test_long_contexts_decode_as_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_FUSED_KEYS", 40)  # in the middle of what is generated
    model = small_model(tmp_path, "Llama")
    tokens = prompt(30)
    for size in (1, 6):  # several KV heads on a rank, and one
        group = RankThreads(model, size)
        story = Story(tokens, range(4))
        assert generate(group, story, 30) == reference(model, tokens, 30)
        again = Story(story.tokens[:30], range(10, 14))
        again.tokens = story.tokens[: story.done]
        for start in (0, 17, 35, 48):
            again.done = min(again.done, start)
            group.step([again.chunk()])
            assert group.digests(again.pages, again.done) == group.digests(story.pages, story.done), start
        group.close()


def test_decode_bits_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = small_model(tmp_path, "Llama")
    group = RankThreads(model, 3)
    alone = [Story(prompt(20 + 9 * i, seed=i), range(i * 6, i * 6 + 6)) for i in range(5)]
    texts = [generate(group, story, 20) for story in alone]
    digests = [group.digests(story.pages, story.done) for story in alone]
    together = [Story(prompt(20 + 9 * i, seed=i), range(30 + i * 6, i * 6 + 36)) for i in range(5)]
    for _ in range(20):
        tokens = sample_greedy(group.step([story.chunk() for story in together]))
        for story, token in zip(together, tokens, strict=True):
            story.tokens.append(token)
    assert [story.tokens[story.prompt_tokens :] for story in together] == texts
    assert [group.digests(story.pages, story.done) for story in together] == digests
    group.close()


def test_all_logits_are_those_of_transformers(tmp_path: Path) -> None:
    model = small_model(tmp_path, "Qwen3")
    tokens = prompt(50)
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        expected = whole(torch.tensor([tokens])).logits[0]
    group = RankThreads(model, 2)
    chunk = Chunk(np.array(tokens, dtype=np.int32), 0, 50, np.arange(4, dtype=np.int32), "all")
    torch.testing.assert_close(group.step([chunk]), expected, rtol=1e-4, atol=1e-4)
    group.close()


def test_another_rank_can_be_loaded_later(tmp_path: Path) -> None:
    model = small_model(tmp_path, "Llama")
    group = RankThreads(model, 2)
    expected = generate(group, Story(prompt(30), range(4)), 8)
    group.models[0].load(1)
    group.models[0].load(0)
    assert generate(group, Story(prompt(30), range(4)), 8) == expected
    group.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(576, 320), (192, 576), (576, 1024), (512, 576), (1536, 576), (37, 41)]
)
def test_a_row_of_a_linear_has_the_same_bits_in_any_batch(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(inputs)
    linear = PackedLinear(inputs, outputs, "replicated", Ranks(), dtype)
    linear.take(linear.pack(torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)))
    x = torch.randn(1, 600, inputs).to(dtype)
    with torch.inference_mode():
        whole = linear(x)
        for rows in [*range(1, 130), *range(130, 600, 23), 512]:
            assert torch.equal(linear(x[:, :rows]), whole[:, :rows]), rows
        for row in range(0, 600, 37):
            assert torch.equal(linear(x[:, row : row + 1]), whole[:, row : row + 1]), row


def test_sizes_that_do_not_divide_the_kv_heads_are_refused_with_those_that_do(tmp_path: Path) -> None:
    model = small_model(tmp_path, "Llama", num_key_value_heads=3, num_attention_heads=6)
    with pytest.raises(ModelError, match=r"allowed: 1, 3$"):
        read_spec(model, 2)


def test_unsupported_models_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        resolve_model("/nowhere/at/all")
    model = small_model(tmp_path / "llama", "Llama")
    with pytest.raises(ModelError, match="no tokenizer"):
        check_files(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        RankModel(model, size=1, dtype=torch.float32)
    mixture = tmp_path / "mixture"
    transformers.MixtralConfig(num_hidden_layers=1).save_pretrained(mixture)
    with pytest.raises(ModelError, match="tensor-parallel plan has"):
        read_spec(mixture, 1)
