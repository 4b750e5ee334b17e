"""Bodies of answers in OpenAI's shape, built from deltas. Pure."""

import codecs
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from pydantic_core import to_json

from services.gateway.intake import Job
from services.gateway.schemas import ChatRequest
from services.gateway.stream import Choice, Delta
from services.gateway.tokenizer import Tokenizer
from shared.types import TokenLogprob

Json = dict[str, Any]

_LEAST_LOGPROB = -9999.0  # JSON has no -inf
PROMPT_LOGPROBS = 256
"""Prompt tokens whose logprobs one chunk of a stream carries: a long prompt's are more than is made in one go."""


def error_body(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> Json:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_type(status: int) -> str:
    """OpenAI's error type for an HTTP status."""
    return "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"


def usage(job: Job, choices: Sequence[Choice]) -> Json:
    """Token counts of an answer; a prompt with several choices counts once."""
    per_prompt = len(choices) // len(job.prompts)
    prompt_tokens = sum(len(prompt.ids) for prompt in job.prompts)
    completion_tokens = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in choices[::per_prompt])},
    }


class Reply(Protocol):
    """Builds the answer to one request, as chunks of a stream or as one response, in JSON."""

    def opening(self) -> list[bytes]:
        """The chunks that a stream begins with."""

    def chunks(self, index: int, delta: Delta) -> Iterator[bytes]:
        """The chunks for a delta of choice `index`; none if it has nothing to tell."""

    def usage_chunk(self, usage: Json) -> bytes:
        """The last chunk of a stream that was asked for its usage."""

    def response(self, deltas: Sequence[Delta], usage: Json) -> bytes:
        """The answer that is not streamed, from one merged delta for each choice. Takes long for logprobs."""


def reply_to(job: Job) -> Reply:
    """The builder for a request's kind."""
    return ChatReply(job) if isinstance(job.request, ChatRequest) else CompletionReply(job)


class _Envelope:
    """The fields that all bodies of one answer share. `kind`: what a chunk of it is called."""

    def __init__(self, job: Job, kind: str):
        self._job = job
        self._asked = job.request
        self._kind = kind
        self._created = int(time.time())
        empty = self.body(kind, []) | ({"usage": None} if self._asked.include_usage else {})
        self._before, _, self._after = to_json(empty).partition(b'"choices":[')

    def body(self, kind: str, choices: list[Json], usage: Json | None = None) -> Json:
        body = {
            "id": self._job.reply_id,
            "object": kind,
            "created": self._created,
            "model": self._job.serving.model,
            "system_fingerprint": f"fp_{self._job.serving.fingerprint[:12]}",
            "choices": choices,
        }
        return body if usage is None else body | {"usage": usage}

    def whole(self, kind: str, choices: Iterator[Json], usage: Json) -> bytes:
        """The body of an answer that is not streamed; written choice by choice, so that none is long in one go."""
        body = to_json(self.body(kind, [], usage))
        return body.replace(b'"choices":[]', b'"choices":[' + b",".join(map(to_json, choices)) + b"]", 1)

    def chunk(self, choice: Json) -> bytes:
        """A chunk; where usage is asked for, OpenAI sends it as null in every chunk but the last.

        There is one for each token: what they have in common is written once.
        """
        return b'%b"choices":[%b%b' % (self._before, to_json(choice), self._after)

    def usage_chunk(self, usage: Json) -> bytes:
        """The last chunk of a stream that was asked for its usage."""
        return to_json(self.body(self._kind, [], usage))

    def with_extensions(self, choice: Json, delta: Delta) -> Json:
        """A choice with GhostServe's own fields."""
        if self._asked.return_token_ids:
            choice["token_ids"] = list(delta.tokens)
        if self._asked.return_kv_digest and delta.finish_reason:
            choice["kv_digests"] = list(delta.kv_digests)
        return choice

    def is_telling(self, delta: Delta) -> bool:
        """Whether a client would miss the chunk of this delta."""
        asked = self._asked.return_token_ids and delta.tokens
        return bool(delta.text or delta.logprobs or delta.prompt_logprobs or delta.finish_reason or asked)


class CompletionReply:
    """Answers of /v1/completions."""

    def __init__(self, job: Job):
        self._envelope = _Envelope(job, "text_completion")
        self._job = job
        self._logprobs = {index: CompletionLogprobs(job.serving.tokenizer) for index in range(len(job.sequences))}

    def opening(self) -> list[bytes]:
        """Nothing: an echo comes with the first tokens, as the prompt's logprobs do."""
        return []

    def chunks(self, index: int, delta: Delta) -> Iterator[bytes]:
        """See Reply."""
        if not self._envelope.is_telling(delta) and not (delta.first and self._job.prompt_of(index).text):
            return
        asked = self._job.sequences[index]
        parts = self._prompt_logprobs(index, delta) if delta.first and asked.prompt_logprobs is not None else []
        text = self._job.prompt_of(index).text if delta.first else ""
        for part in parts[:-1]:
            choice = {"index": index, "text": text, "logprobs": self._logprobs[index].add(part), "finish_reason": None}
            yield self._envelope.chunk(choice)
            text = ""
        yield self._envelope.chunk(self._choice(index, delta, text, parts[-1] if parts else []))

    def usage_chunk(self, usage: Json) -> bytes:
        """See Reply."""
        return self._envelope.usage_chunk(usage)

    def response(self, deltas: Sequence[Delta], usage: Json) -> bytes:
        """See Reply."""
        return self._envelope.whole("text_completion", map(self._whole, range(len(deltas)), deltas), usage)

    def _whole(self, index: int, delta: Delta) -> Json:
        asked = self._job.sequences[index].prompt_logprobs is not None
        entries = [entry for part in self._prompt_logprobs(index, delta) for entry in part] if asked else []
        return self._choice(index, delta, self._job.prompt_of(index).text, entries)

    def _choice(self, index: int, delta: Delta, prompt: str, entries: list["Entry"]) -> Json:
        """`prompt`: what of the prompt is echoed, and its tokens."""
        logprobs = None
        if self._job.sequences[index].sampling.logprobs is not None:
            logprobs = self._logprobs[index].add([*entries, *zip(delta.tokens, delta.logprobs, strict=False)])
        choice = {
            "index": index,
            "text": prompt + delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        return self._envelope.with_extensions(choice, delta)

    def _prompt_logprobs(self, index: int, delta: Delta) -> list[list["Entry"]]:
        """The prompt's tokens, PROMPT_LOGPROBS at a time."""
        ids = self._job.prompt_of(index).ids
        known = list(delta.prompt_logprobs)[-(len(ids) - 1) :] if len(ids) > 1 else []
        entries = list(zip(ids, [*[None] * (len(ids) - len(known)), *known], strict=True))
        return [entries[start : start + PROMPT_LOGPROBS] for start in range(0, len(entries), PROMPT_LOGPROBS)]


Entry = tuple[int, TokenLogprob | None]
"""A token and its logprob; the first token of a prompt has none."""


class CompletionLogprobs:
    """The logprobs of one completion; counts characters over chunks for text_offset."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._offset = 0
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, entries: Sequence[Entry]) -> Json:
        """The next tokens' part."""
        body: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob in entries:
            data = self._tokenizer.token_bytes(token)
            body["tokens"].append(_readable(data))
            body["text_offset"].append(self._offset)
            self._offset += len(self._characters.decode(data))
            body["token_logprobs"].append(None if logprob is None else _finite(logprob.logprob))
            body["top_logprobs"].append(None if logprob is None else self._top(logprob))
        return body

    def _top(self, chosen: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in [*chosen.top, (chosen.token, chosen.logprob)]:
            top.setdefault(_readable(self._tokenizer.token_bytes(token)), _finite(logprob))
        return top


class ChatReply:
    """Answers of /v1/chat/completions."""

    def __init__(self, job: Job):
        self._envelope = _Envelope(job, "chat.completion.chunk")
        self._job = job

    def opening(self) -> list[bytes]:
        """One chunk for each choice, with the role."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._envelope.chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
            for index in range(len(self._job.sequences))
        ]

    def chunks(self, index: int, delta: Delta) -> Iterator[bytes]:
        """See Reply."""
        if self._envelope.is_telling(delta):
            content = {"content": delta.text} if delta.text or not delta.finish_reason else {}
            yield self._envelope.chunk(self._choice(index, delta, "delta", content))

    def usage_chunk(self, usage: Json) -> bytes:
        """See Reply."""
        return self._envelope.usage_chunk(usage)

    def response(self, deltas: Sequence[Delta], usage: Json) -> bytes:
        """See Reply."""
        choices = (
            self._choice(index, delta, "message", {"role": "assistant", "content": delta.text, "refusal": None})
            for index, delta in enumerate(deltas)
        )
        return self._envelope.whole("chat.completion", choices, usage)

    def _choice(self, index: int, delta: Delta, part: str, content: Json) -> Json:
        choice = {
            "index": index,
            part: content,
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }
        return self._envelope.with_extensions(choice, delta)

    def _logprobs(self, delta: Delta) -> Json | None:
        if not delta.logprobs:
            return None
        content = [
            self._token(chosen.token, chosen.logprob)
            | {"top_logprobs": [self._token(token, logprob) for token, logprob in chosen.top]}
            for chosen in delta.logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        data = self._job.serving.tokenizer.token_bytes(token)
        return {"token": _readable(data), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def _readable(data: bytes) -> str:
    """A token as text; one that is part of a character as OpenAI writes it: bytes:\\xe2\\x80."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
