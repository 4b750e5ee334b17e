"""From a request's texts, messages or token ids to prompts that fit the context."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from services.gateway.schemas import ChatMessage, ChatRequest, CompletionRequest
from services.gateway.tokenizer import Tokenizer
from shared.errors import RequestRejected


@dataclass(frozen=True, slots=True)
class ServedModel:
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


def chat_prompt(request: ChatRequest, serving: ServedModel) -> Prompt:
    tokenizer, arguments = serving.tokenizer, request.chat_template_kwargs or {}
    if taken := sorted(tokenizer.template_arguments & arguments.keys()):
        raise RequestRejected(
            f"'chat_template_kwargs': {taken[0]!r} is not the template's", param="chat_template_kwargs"
        )
    _check_tools(request.messages, tokenizer)
    text = tokenizer.render_chat(
        [_turn(message) for message in request.messages],
        arguments,
        continued=request.continue_final_message,
        open_turn=request.opens_turn,
    )
    return Prompt(tuple(_tokens_of(text, request, serving)))


def _check_tools(messages: Sequence[ChatMessage], tokenizer: Tokenizer) -> None:
    """Raise RequestRejected for turns that the template would not show, or for a turn without anything in it."""
    for place, message in enumerate(messages):
        word = "tool_calls" if message.tool_calls else "tool" if message.role == "tool" else ""
        if word and not tokenizer.template_knows(word):
            raise RequestRejected(
                "the model's chat template knows no tools", code="unsupported_parameter", param=f"messages[{place}]"
            )
        if message.content is None and not message.tool_calls:
            param = f"messages[{place}].content"
            raise RequestRejected(f"{param!r}: is missing", param=param)


def _turn(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates expect it."""
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    given = {"name": message.name, "tool_call_id": message.tool_call_id}
    return turn | {name: value for name, value in given.items() if value is not None}


def _arguments(given: str | dict[str, Any]) -> Any:
    """Templates write a call's arguments as JSON themselves; OpenAI's clients send text."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def text_prompts(request: CompletionRequest, serving: ServedModel) -> list[Prompt]:
    given = request.prompt
    entries: Sequence[str | Sequence[int]]
    if isinstance(given, str):
        entries = [given]
    elif isinstance(given[0], int):
        entries = [[token for token in given if isinstance(token, int)]]
    else:
        entries = [entry for entry in given if not isinstance(entry, int)]
    return [_prompt(entry, request, serving) for entry in entries]


def _prompt(entry: str | Sequence[int], request: CompletionRequest, serving: ServedModel) -> Prompt:
    tokenizer, echo = serving.tokenizer, bool(request.echo)
    if isinstance(entry, str):
        ids = _tokens_of(entry, request, serving)
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
    else:
        ids = _truncated(entry, request, serving)
        check_ids(ids, serving.vocab_size, "prompt")
        _check_room(len(ids), request, serving.max_model_len)
    if not ids:
        raise RequestRejected("'prompt' is empty", param="prompt")
    if not echo:
        return Prompt(tuple(ids))
    whole = isinstance(entry, str) and request.truncate_prompt_tokens is None
    return Prompt(tuple(ids), str(entry) if whole else tokenizer.decode(ids, special=not request.skip_special_tokens))


def _tokens_of(text: str, request: CompletionRequest | ChatRequest, serving: ServedModel) -> list[int]:
    """A text's tokens. Raises RequestRejected, of a text that is far too long before all of it is looked at."""
    limit = serving.max_model_len
    if serving.tokenizer.exceeds(text, limit):
        _refuse_length(f"more than {2 * limit}", request, limit)
    ids = _truncated(serving.tokenizer.encode(text, special=request.add_special_tokens), request, serving)
    _check_room(len(ids), request, limit)
    return ids


def _truncated(ids: Sequence[int], request: CompletionRequest | ChatRequest, serving: ServedModel) -> list[int]:
    asked = request.truncate_prompt_tokens
    if asked is None or asked == 0:
        return list(ids)
    return list(ids[-(serving.max_model_len - 1 if asked == -1 else asked) :])


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    if ids and max(ids) >= vocab_size:
        raise RequestRejected(
            f"{param!r}: token id {max(ids)} is not in the model's vocabulary of {vocab_size}", param=param
        )


def _check_room(prompt: int, request: CompletionRequest | ChatRequest, limit: int) -> None:
    """Raise RequestRejected where a prompt leaves no room for the first token, if one is asked for."""
    if prompt + (request.max_tokens != 0) > limit:
        _refuse_length(str(prompt), request, limit)


def _refuse_length(tokens: str, request: CompletionRequest | ChatRequest, limit: int) -> NoReturn:
    field = "messages" if isinstance(request, ChatRequest) else "prompt"
    raise RequestRejected(
        f"This model's maximum context length is {limit} tokens, but the {field} have {tokens} tokens and leave "
        "no room for an answer. Shorten them.",
        code="context_length_exceeded",
        param=field,
    )
