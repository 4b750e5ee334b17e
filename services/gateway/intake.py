"""From a parsed request to the sequences to generate: tokenising, limits, sampling parameters. Pure, but slow enough
for long prompts that the gateway calls it in a thread."""

import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.gateway.schemas import ChatRequest, CompletionRequest
from services.gateway.tokenizer import Tokenizer
from shared.errors import RequestRejected
from shared.types import GenerationRequest, SamplingParams, pack_ids

DEFAULT_COMPLETION_TOKENS = 16
MAX_SEQUENCES = 256
_SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Serving:
    """What the gateway knows of the model while it can serve."""

    tokenizer: Tokenizer
    model: str
    max_model_len: int
    vocab_size: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request. `text` is filled only for echo."""

    ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A request made ready: choice i continues prompts[i // n], drawn by sequences[i]."""

    reply_id: str
    request: CompletionRequest | ChatRequest
    serving: Serving
    prompts: tuple[Prompt, ...]
    sequences: tuple[GenerationRequest, ...]

    def prompt_of(self, index: int) -> Prompt:
        """The prompt that choice `index` continues."""
        return self.prompts[index * len(self.prompts) // len(self.sequences)]


def prepare(request: CompletionRequest | ChatRequest, serving: Serving) -> Job:
    """Turn a request into sequences. Raises RequestRejected, naming the parameter."""
    if request.model is not None and request.model != serving.model:
        raise RequestRejected(
            f"The model {request.model!r} does not exist; this server has {serving.model!r}",
            status=404,
            code="model_not_found",
            param="model",
        )
    chat = isinstance(request, ChatRequest)
    prompts = _chat_prompts(request, serving) if isinstance(request, ChatRequest) else _prompts(request, serving)
    choices = request.n or 1
    if len(prompts) * choices > MAX_SEQUENCES:
        raise RequestRejected(f"prompts times 'n' is {len(prompts) * choices}; at most {MAX_SEQUENCES}", param="n")
    field = "messages" if chat else "prompt"
    limits = [_max_tokens(request, len(prompt.ids), serving.max_model_len, field) for prompt in prompts]
    sampling = _sampling(request, serving.vocab_size)
    stop_tokens = tuple(request.stop_token_ids or ())
    _check_ids(stop_tokens, serving.vocab_size, "stop_token_ids")
    wants_prompt_logprobs = isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None
    first_seed = request.seed if request.seed is not None else secrets.randbelow(_SEEDS)
    reply_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    sequences = tuple(
        GenerationRequest(
            request_id=f"{reply_id}-{place * choices + choice}",
            prompt=pack_ids(prompt.ids),
            max_tokens=limit,
            sampling=replace(sampling, seed=(first_seed + choice) % _SEEDS),
            stop_token_ids=stop_tokens,
            ignore_eos=request.ignore_eos,
            cache_salt=request.cache_salt,
            prompt_logprobs=request.logprobs if wants_prompt_logprobs else None,
            kv_digest=request.return_kv_digest,
        )
        for place, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        for choice in range(choices)
    )
    return Job(reply_id, request, serving, tuple(prompts), sequences)


def _chat_prompts(request: ChatRequest, serving: Serving) -> list[Prompt]:
    messages = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        | ({"name": message.name} if message.name is not None else {})
        for message in request.messages
    ]
    text = serving.tokenizer.render_chat(messages)
    return [Prompt(tuple(serving.tokenizer.encode(text, special=False)))]


def _prompts(request: CompletionRequest, serving: Serving) -> list[Prompt]:
    given = request.prompt
    entries: Sequence[str | Sequence[int]]
    if isinstance(given, str):
        entries = [given]
    elif isinstance(given[0], int):
        entries = [[token for token in given if isinstance(token, int)]]
    else:
        entries = [entry for entry in given if not isinstance(entry, int)]
    return [_prompt(entry, bool(request.echo), serving) for entry in entries]


def _prompt(entry: str | Sequence[int], echo: bool, serving: Serving) -> Prompt:
    tokenizer = serving.tokenizer
    if isinstance(entry, str):
        ids = tokenizer.encode(entry, special=True)
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
        text = entry
    else:
        ids = list(entry)
        _check_ids(ids, serving.vocab_size, "prompt")
        text = tokenizer.decode(ids) if echo else ""
    if not ids:
        raise RequestRejected("'prompt' is empty", param="prompt")
    return Prompt(tuple(ids), text if echo else "")


def _check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    if ids and max(ids) >= vocab_size:
        raise RequestRejected(
            f"{param!r}: token id {max(ids)} is not in the model's vocabulary of {vocab_size}", param=param
        )


def _max_tokens(request: CompletionRequest | ChatRequest, prompt: int, limit: int, field: str) -> int:
    """How many tokens to generate. Raises RequestRejected where prompt and tokens exceed the context."""
    name, asked = "max_tokens", request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        name, asked = "max_completion_tokens", request.max_completion_tokens
    room = limit - prompt
    if room < 1:
        raise RequestRejected(
            f"This model's maximum context length is {limit} tokens, but the {field} have {prompt} tokens and leave "
            "no room for an answer. Shorten them.",
            code="context_length_exceeded",
            param=field,
        )
    if asked is None:
        return room if isinstance(request, ChatRequest) else min(room, DEFAULT_COMPLETION_TOKENS)
    if asked > room:
        raise RequestRejected(
            f"This model's maximum context length is {limit} tokens, but {prompt + asked} were requested "
            f"({prompt} in the {field}, {asked} in {name}). Shorten one of them.",
            code="context_length_exceeded",
            param=name,
        )
    return asked


def _sampling(request: CompletionRequest | ChatRequest, vocab_size: int) -> SamplingParams:
    """The sampling parameters of all choices, but for the seed. What is left out means the model as it is."""

    def given(value: float | None, default: float) -> float:
        return default if value is None else float(value)

    logprobs: int | None
    if isinstance(request, ChatRequest):
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    else:
        logprobs = request.logprobs
    return SamplingParams(
        temperature=given(request.temperature, 1.0),
        top_p=given(request.top_p, 1.0),
        top_k=max(request.top_k or 0, 0),
        min_p=given(request.min_p, 0.0),
        repetition_penalty=given(request.repetition_penalty, 1.0),
        presence_penalty=given(request.presence_penalty, 0.0),
        frequency_penalty=given(request.frequency_penalty, 0.0),
        logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
        logprobs=logprobs,
    )


def _logit_bias(given: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for key in given:
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise RequestRejected(
                f"'logit_bias': {key[:20]!r} is no token id of the model's vocabulary of {vocab_size}",
                param="logit_bias",
            )
    return tuple((int(key), bias) for key, bias in given.items())
