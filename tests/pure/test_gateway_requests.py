"""What requests are taken, how they are refused, and what sequences they become."""

import json
from dataclasses import replace
from typing import Any

import pytest

from services.gateway.intake import Job, Serving, prepare
from services.gateway.openapi import describe
from services.gateway.responses import CompletionLogprobs, reply_to, usage
from services.gateway.schemas import ChatRequest, CompletionRequest, parse
from services.gateway.stream import Choice, Delta
from services.gateway.tokenizer import Tokenizer
from shared.errors import RequestRejected
from shared.messages import Tokens
from shared.types import TokenLogprob, pack_ids, unpack_ids
from tests.tiny_tokenizer import make_tokenizer_dir

HELLO = [{"role": "user", "content": "the end"}]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    tokenizer = Tokenizer.load(str(make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"))))
    return Serving(tokenizer, "tiny", max_model_len=100, vocab_size=400, fingerprint="f" * 32)


def completion(serving: Serving, **fields: Any) -> Job:
    return prepare(parse(CompletionRequest, json.dumps({"prompt": "the end"} | fields).encode()), serving)


def chat(serving: Serving, **fields: Any) -> Job:
    return prepare(parse(ChatRequest, json.dumps({"messages": HELLO} | fields).encode()), serving)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": "abc"}, "max_tokens"),
        ({"max_tokens": "12"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [400]}, "stop_token_ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"400": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "."}, "suffix"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, 400]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 3}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"echo": 1}, "echo"),
        ({"user": 1}, "user"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
    ],
)
def test_a_bad_completion_is_refused_by_the_parameters_name(
    serving: Serving, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestRejected) as refused:
        completion(serving, **fields)
    assert refused.value.status == 400
    assert refused.value.param == param
    assert param.split(".")[0].split("[")[0] in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 100}, "max_completion_tokens"),
        ({"max_tokens": 100}, "max_tokens"),
    ],
)
def test_a_bad_chat_is_refused_by_the_parameters_name(serving: Serving, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRejected) as refused:
        chat(serving, **fields)
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 10000, b'"x"'])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    for kind in (CompletionRequest, ChatRequest):
        with pytest.raises(RequestRejected) as refused:
            parse(kind, body)
        assert refused.value.status == 400


def test_a_missing_prompt_is_named() -> None:
    with pytest.raises(RequestRejected, match="'prompt': is missing"):
        parse(CompletionRequest, b"{}")
    with pytest.raises(RequestRejected, match="'messages': is missing"):
        parse(ChatRequest, b"{}")


def test_nothing_of_the_prompt_is_in_a_refusal(serving: Serving) -> None:
    with pytest.raises(RequestRejected) as refused:
        chat(serving, messages=[{"role": "user", "content": {"secret": "s3cret"}}])
    assert "s3cret" not in str(refused.value)


def test_fields_that_mean_nothing_special_and_unknown_ones_are_ignored(serving: Serving) -> None:
    assert completion(serving, best_of=1, suffix=None, frobnicate=1, store=True, user="u")
    assert chat(serving, tools=[], tool_choice="none", response_format={"type": "text"}, n=None, stop=None)


def test_another_model_is_not_found(serving: Serving) -> None:
    with pytest.raises(RequestRejected) as refused:
        completion(serving, model="gpt-9")
    assert (refused.value.status, refused.value.code, refused.value.param) == (404, "model_not_found", "model")
    assert completion(serving, model="tiny")


def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers(serving: Serving) -> None:
    with pytest.raises(RequestRejected, match=r"100 tokens.*120 tokens") as refused:
        completion(serving, prompt=[5] * 120)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(RequestRejected, match=r"120 were requested \(90 in the prompt, 30 in max_tokens\)"):
        completion(serving, prompt=[5] * 90, max_tokens=30)


def test_max_tokens_defaults_to_16_or_to_what_the_context_leaves(serving: Serving) -> None:
    assert completion(serving).sequences[0].max_tokens == 16
    assert completion(serving, prompt=[5] * 90).sequences[0].max_tokens == 10
    job = chat(serving)
    assert job.sequences[0].max_tokens == 100 - len(job.prompts[0].ids)
    assert chat(serving, max_completion_tokens=3, max_tokens=5).sequences[0].max_tokens == 3


def test_each_choice_of_each_prompt_is_a_sequence_with_its_own_seed(serving: Serving) -> None:
    job = completion(serving, prompt=[[1, 2], [3]], n=2, seed=2**63 - 1, temperature=0)
    assert [unpack_ids(sequence.prompt) for sequence in job.sequences] == [[1, 2], [1, 2], [3], [3]]
    assert [sequence.sampling.seed for sequence in job.sequences] == [2**63 - 1, 0, 2**63 - 1, 0]
    assert [job.prompt_of(index).ids for index in range(4)] == [(1, 2), (1, 2), (3,), (3,)]
    assert len({sequence.request_id for sequence in job.sequences}) == 4
    assert completion(serving, seed=-1).sequences[0].sampling.seed == 2**63 - 1
    assert completion(serving).sequences[0].sampling.seed != completion(serving).sequences[0].sampling.seed


def test_sampling_parameters_arrive(serving: Serving) -> None:
    request = completion(
        serving,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"7": -100, "8": 0.5},
        logprobs=0,
        stop_token_ids=[9],
        ignore_eos=True,
        cache_salt="s",
        return_kv_digest=True,
    ).sequences[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.2, -1, 2)
    assert (sampling.logit_bias, sampling.logprobs) == (((7, -100.0), (8, 0.5)), 0)
    assert (request.stop_token_ids, request.ignore_eos, request.cache_salt) == ((9,), True, "s")
    assert (request.kv_digest, request.prompt_logprobs) == (True, None)


def test_chat_logprobs(serving: Serving) -> None:
    assert chat(serving).sequences[0].sampling.logprobs is None
    assert chat(serving, logprobs=True).sequences[0].sampling.logprobs == 0
    assert chat(serving, logprobs=True, top_logprobs=3).sequences[0].sampling.logprobs == 3


def test_echo_asks_for_the_prompts_logprobs_only_with_logprobs(serving: Serving) -> None:
    assert completion(serving, echo=True, max_tokens=0).sequences[0].prompt_logprobs is None
    assert completion(serving, echo=True, max_tokens=0, logprobs=2).sequences[0].prompt_logprobs == 2


def test_a_chat_is_rendered_once_with_its_turn_open(serving: Serving) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "end"}]
    job = chat(serving, messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}])
    text = serving.tokenizer._core.decode(list(job.prompts[0].ids), skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nthe\nend<|im_end|>\n<|im_start|>assistant\n"
    )


def test_bos_is_added_to_a_text_but_not_to_a_chat(tmp_path_factory: pytest.TempPathFactory, serving: Serving) -> None:
    folder = make_tokenizer_dir(tmp_path_factory.mktemp("bos"), add_bos=True)
    with_bos = replace(serving, tokenizer=Tokenizer.load(str(folder)))
    assert completion(with_bos).prompts[0].ids[0] == 0
    assert completion(with_bos, prompt="").prompts[0].ids == (0,)
    assert 0 not in chat(with_bos).prompts[0].ids


# -- answers ---------------------------------------------------------------------------------------------------------


def test_text_offsets_count_characters_even_where_tokens_end_within_one(serving: Serving) -> None:
    text = "é the 日本 🙂 end"
    ids = serving.tokenizer.encode(text, special=False)
    entries = [(token, TokenLogprob(token, float("-inf"), ((2, -1.0),))) for token in ids]
    logprobs = CompletionLogprobs(serving.tokenizer)
    parts = [logprobs.add([entry]) for entry in entries]
    offsets = [part["text_offset"][0] for part in parts]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert text[offsets[-1] :] == serving.tokenizer.decode(ids[-1:])
    assert parts[0]["token_logprobs"] == [-9999.0]
    assert parts[0]["top_logprobs"][0]["<|im_end|>"] == -1.0


def test_an_echo_has_the_prompts_logprobs_with_none_for_its_first_token(serving: Serving) -> None:
    job = completion(serving, prompt=[5, 6, 7], echo=True, logprobs=1, max_tokens=1)
    chosen = TokenLogprob(9, -1.0, ((9, -1.0),))
    delta = Delta("x", (9,), (chosen,), "length", True, (TokenLogprob(6, -2.0), TokenLogprob(7, -3.0)))
    choice = reply_to(job).response([delta], {})["choices"][0]
    assert choice["text"] == serving.tokenizer.decode([5, 6, 7]) + "x"
    assert choice["logprobs"]["token_logprobs"] == [None, -2.0, -3.0, -1.0]
    assert choice["logprobs"]["top_logprobs"][0] is None


def test_usage_counts_a_prompt_once_however_many_choices_it_has(serving: Serving) -> None:
    job = completion(serving, prompt=[[1, 2, 3], [4]], n=2)
    choices = [Choice(serving.tokenizer.decode, [], []) for _ in job.sequences]
    for choice in choices:
        choice.feed(Tokens("r", pack_ids([5, 6]), (), (), "length", 2))
    assert usage(job, choices) == {
        "prompt_tokens": 4,
        "completion_tokens": 8,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_a_delta_without_news_makes_no_chunk(serving: Serving) -> None:
    held = Delta("", (5,), (), None, True)
    assert reply_to(completion(serving)).chunk(0, held) is None
    assert reply_to(chat(serving)).chunk(0, held) is None
    told = reply_to(completion(serving, return_token_ids=True)).chunk(0, held)
    assert told is not None
    assert told["choices"][0]["token_ids"] == [5]


def test_the_openapi_document_refers_only_to_what_it_defines() -> None:
    document = describe("1", keys=True)
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
    assert {"CompletionRequest", "ChatRequest"} <= names
