"""The requests of the REST API, as OpenAI defines them, and what GhostServe adds. Unknown fields are ignored, as
OpenAI's servers do; fields that are known and not supported are refused by name, rather than ignored silently."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import RequestRejected

MAX_CHOICES = 128
MAX_PROMPTS = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096
_SEED = 2**63

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class Part(BaseModel):
    """Base of all parts of a request: JSON types are taken at their word, "1" is no number."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class StreamOptions(Part):
    """What a stream carries besides the text."""

    include_usage: bool = Field(False, description="end the stream with the counts of tokens")


class GenerateRequest(Part):
    """What completions and chat completions have in common."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that are refused, with the values that mean the same as leaving them out."""

    model: str | None = Field(None, max_length=1024, description="name of the model served; may be left out")
    stream: bool | None = Field(False, description="answer with server-sent events, as tokens come")
    stream_options: StreamOptions | None = Field(None, description="only together with stream")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="choices for each prompt; default 1")
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="texts that end the answer, and are not part of it"
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="tokens that end the answer"
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the most likely token; default 1")
    top_p: float | None = Field(None, gt=0, le=1, description="least probability of the tokens drawn from, together")
    top_k: int | None = Field(None, ge=-1, description="most likely tokens drawn from; 0 or -1: all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="least probability of a token drawn, as a share of the most likely one's"
    )
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED, description="the same seed draws the same tokens")
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, description="above 1: tokens of prompt and answer become less likely"
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="taken from the logit of every token that the answer has"
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="the same, times how often the answer has it"
    )
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        Field(None, description="token id to what is added to its logit, -100 to 100")
    )
    user: str | None = Field(None, description="taken, and of no effect")
    ignore_eos: bool = Field(False, description="go on to max_tokens, whatever the model says")
    cache_salt: str = Field("", max_length=256, description="prompts share cached KV only within one salt")
    return_kv_digest: bool = Field(False, description="return each rank's hash of the KV as kv_digests")
    return_token_ids: bool = Field(False, description="return the ids of the tokens as token_ids")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as one type."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name, neutral in cls.unsupported.items():
                if (value := given.get(name)) is not None and value not in neutral:
                    raise RequestRejected(f"{name!r} is not supported here", code="unsupported_parameter", param=name)
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestRejected("'stream_options' needs 'stream': true", param="stream_options")
        return self


class CompletionRequest(GenerateRequest):
    """Body of POST /v1/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"best_of": (1,), "suffix": ("",), "prompt_embeds": ()}

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = Field(
        description="one text, or several; or token ids"
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="default 16; 0 only together with echo")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="logprobs of each token and of so many most likely ones"
    )
    echo: bool | None = Field(False, description="begin the answer with the prompt")

    @model_validator(mode="after")
    def _has_output(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise RequestRejected("'max_tokens' must be at least 1, or 0 together with 'echo'", param="max_tokens")
        if isinstance(self.prompt, list) and not self.prompt:
            raise RequestRejected("'prompt' is empty", param="prompt")
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) and len(self.prompt) > MAX_PROMPTS:
            raise RequestRejected(f"'prompt' has {len(self.prompt)} entries; at most {MAX_PROMPTS}", param="prompt")
        return self


class TextPart(Part):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(Part):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="of who speaks, for the chat template")

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatRequest(GenerateRequest):
    """Body of POST /v1/chat/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="default: what the context leaves")
    logprobs: bool | None = Field(False, description="return the logprob of each token")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="and of so many most likely ones")

    @model_validator(mode="after")
    def _logprobs_asked(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestRejected("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
        return self


Request = TypeVar("Request", bound=GenerateRequest)


def parse(kind: type[Request], body: bytes) -> Request:
    """The request in a body. Raises RequestRejected, naming the parameter, for anything else."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if problem["type"] == "json_invalid":
        raise RequestRejected("the body is not valid JSON", code="invalid_json")
    if not problem["loc"]:
        raise RequestRejected("the body is not a JSON object", code="invalid_json")
    param = "".join(_path(problem["loc"])).lstrip(".")
    if param == "prompt" or param.startswith("prompt["):
        param, reason = "prompt", "should be a string, strings, token ids, or lists of token ids"
        if problem["type"] == "missing":
            reason = "is missing"
    else:
        reason = "is missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Input ")
    raise RequestRejected(f"{param!r}: {reason}", param=param)


_NAMES = frozenset(
    name
    for kind in (CompletionRequest, ChatRequest, ChatMessage, TextPart, StreamOptions)
    for name in kind.model_fields
)


def _path(location: tuple[int | str, ...]) -> Iterator[str]:
    """A location as a client would write it, up to the first part that is pydantic's own (a type of a union)."""
    for part in location:
        if isinstance(part, int):
            yield f"[{part}]"
        elif part in _NAMES:
            yield f".{part}"
        else:
            return
