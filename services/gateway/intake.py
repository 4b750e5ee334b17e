"""From a parsed request to the sequences to generate: prompts, limits, sampling parameters. Pure, but slow enough for
long prompts that the gateway calls it in a thread."""

import secrets
import uuid
from dataclasses import dataclass, replace

from services.gateway.prompts import Prompt, ServedModel, chat_prompt, check_ids, text_prompts
from services.gateway.schemas import ChatRequest, CompletionRequest
from shared.errors import RequestRejected
from shared.types import GenerationRequest, SamplingParams, pack_ids

DEFAULT_COMPLETION_TOKENS = 16
MAX_SEQUENCES = 256
COLDEST = 1e-5
"""A temperature below it is 0: logits divided by it are no numbers any more."""
_SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Job:
    """A request made ready: choice i continues prompts[i // n], drawn by sequences[i]."""

    reply_id: str
    request: CompletionRequest | ChatRequest
    serving: ServedModel
    prompts: tuple[Prompt, ...]
    sequences: tuple[GenerationRequest, ...]

    def prompt_of(self, index: int) -> Prompt:
        """The prompt that choice `index` continues."""
        return self.prompts[index * len(self.prompts) // len(self.sequences)]


def prepare(request: CompletionRequest | ChatRequest, serving: ServedModel) -> Job:
    """Turn a request into sequences. Raises RequestRejected, naming the parameter."""
    if request.model is not None and request.model != serving.model:
        raise RequestRejected(
            f"The model {request.model!r} does not exist; this server has {serving.model!r}",
            status=404,
            code="model_not_found",
            param="model",
        )
    chat = isinstance(request, ChatRequest)
    choices = request.n or 1
    prompts = [chat_prompt(request, serving)] if isinstance(request, ChatRequest) else text_prompts(request, serving)
    if len(prompts) * choices > MAX_SEQUENCES:
        raise RequestRejected(f"prompts times 'n' is {len(prompts) * choices}; at most {MAX_SEQUENCES}", param="n")
    sampling = _sampling(request, serving.vocab_size)
    stop_tokens = _stop_tokens(request, serving)
    wants_prompt_logprobs = isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None
    first_seed = request.seed if request.seed is not None else secrets.randbelow(_SEEDS)
    reply_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    packed = [pack_ids(prompt.ids) for prompt in prompts]  # once for all choices
    limits = [_max_tokens(request, len(prompt.ids), serving.max_model_len) for prompt in prompts]
    sequences = tuple(
        GenerationRequest(
            request_id=f"{reply_id}-{place * choices + choice}",
            prompt=packed[place],
            max_tokens=limits[place],
            sampling=replace(sampling, seed=(first_seed + choice) % _SEEDS),
            stop_token_ids=stop_tokens,
            ignore_eos=request.ignore_eos,
            cache_salt=request.cache_salt,
            prompt_logprobs=request.logprobs if wants_prompt_logprobs else None,
            kv_digest=request.return_kv_digest,
        )
        for place in range(len(prompts))
        for choice in range(choices)
    )
    return Job(reply_id, request, serving, tuple(prompts), sequences)


def _max_tokens(request: CompletionRequest | ChatRequest, prompt: int, limit: int) -> int:
    """How many tokens to generate. Raises RequestRejected where prompt and tokens exceed the context."""
    name, asked = "max_tokens", request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        name, asked = "max_completion_tokens", request.max_completion_tokens
    room = limit - prompt
    if asked is None:
        return room if isinstance(request, ChatRequest) else min(room, DEFAULT_COMPLETION_TOKENS)
    if asked > room:
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise RequestRejected(
            f"This model's maximum context length is {limit} tokens, but {prompt + asked} were requested "
            f"({prompt} in the {field}, {asked} in {name}). Shorten one of them.",
            code="context_length_exceeded",
            param=name,
        )
    return asked


def _stop_tokens(request: CompletionRequest | ChatRequest, serving: ServedModel) -> tuple[int, ...]:
    """The tokens that end the answer, besides those that the model's configuration names.

    Special tokens have no text: a stop string that is one stops by its id. And the tokenizer may know an end.
    """
    tokenizer, given = serving.tokenizer, tuple(request.stop_token_ids or ())
    check_ids(given, serving.vocab_size, "stop_token_ids")
    ids = [*given, *(tokenizer.special_ids[stop] for stop in request.stops if stop in tokenizer.special_ids)]
    if tokenizer.eos_token_id is not None and not request.ignore_eos:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ids))


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
        temperature=temperature if (temperature := given(request.temperature, 1.0)) >= COLDEST else 0.0,
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
