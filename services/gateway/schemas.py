"""The requests of the REST API, as OpenAI defines them, and what GhostServe adds. Unknown fields are ignored, as
OpenAI's servers do; fields that are known and not supported are refused by name, rather than ignored silently."""

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from shared.errors import RequestRejected

MAX_CHOICES = 128
MAX_PROMPTS = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_TOOL_CALLS = 128
_SEED = 2**63

Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]
"""A list of which the first wrong item is the last one looked at: another error for each of 300,000 helps nobody."""
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


def _prompt_kind(given: Any) -> str:
    """Which of a prompt's forms this is, by its first item: so that a long list is looked at once."""
    first = given[0] if isinstance(given, list) and given else None
    if isinstance(given, str):
        return "a text"
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "ids"


Prompt = Annotated[
    Annotated[str, Tag("a text")]
    | Annotated[Items[str], Tag("texts")]
    | Annotated[Items[TokenId], Tag("ids")]
    | Annotated[Items[Items[TokenId]], Tag("lists")],
    Discriminator(_prompt_kind),
]


def _few_biases(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MAX_BIASES:
        raise PydanticCustomError("too_long", "has more than {most} entries", {"most": MAX_BIASES})
    return given


class Part(BaseModel):
    """Base of all parts of a request: JSON types are taken at their word, "1" is no number; null means left out."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class StreamOptions(Part):
    """What a stream carries besides the text."""

    include_usage: bool = Field(False, description="end the stream with the counts of tokens")


class GenerateRequest(Part):
    """What completions and chat completions have in common."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "min_tokens": (0,),
        "allowed_token_ids": ([],),
        "bad_words": ([],),
        "use_beam_search": (False,),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_decoding_backend": (),
        "guided_whitespace_pattern": (),
        "structured_outputs": (),
        "response_format": ({"type": "text"},),
        "prompt_logprobs": (),
        "logits_processors": ([],),
        "prompt_embeds": (),
    }
    """Fields that would change the answer, and are refused; with the values that mean the same as leaving them out."""

    model: str | None = Field(None, max_length=1024, description="name of the model served; may be left out")
    stream: bool | None = Field(False, description="answer with server-sent events, as tokens come")
    stream_options: StreamOptions | None = Field(None, description="only together with stream")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="choices for each prompt; default 1")
    stop: StopString | Annotated[Items[StopString], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="texts that end the answer, and are not part of it"
    )
    stop_token_ids: Annotated[Items[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="tokens that end the answer"
    )
    include_stop_str_in_output: bool = Field(False, description="a stop text that ends the answer is part of it")
    skip_special_tokens: bool = Field(True, description="special tokens have no text in the answer")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="only the last so many tokens of a prompt; -1: as many as the context takes"
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the most likely token; default 1")
    top_p: float | None = Field(None, gt=0, le=1, description="least probability of the tokens drawn from, together")
    top_k: int | None = Field(None, ge=-1, description="most likely tokens drawn from; 0 or -1: all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="least probability of a token drawn, as a share of the most likely one's"
    )
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED, description="the same seed draws the same tokens")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=10, description="above 1: tokens of prompt and answer become less likely"
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="taken from the logit of every token that the answer has"
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="the same, times how often the answer has it"
    )
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_biases)] | None = (
        Field(None, description="token id to what is added to its logit, -100 to 100")
    )
    user: str | None = Field(None, description="taken, and of no effect")
    ignore_eos: bool = Field(False, description="go on to max_tokens, whatever the model says")
    cache_salt: str = Field("", max_length=256, description="prompts share cached KV only within one salt")
    return_kv_digest: bool = Field(False, description="for operators: return each rank's hash of the KV as kv_digests")
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

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = GenerateRequest.unsupported | {"best_of": (1,), "suffix": ("",)}

    prompt: Prompt = Field(description="one text, or several; or token ids")
    add_special_tokens: bool = Field(True, description="begin a text as the tokenizer does, with its BOS token")
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


class FunctionCall(Part):
    """The function that was called, and with what."""

    name: str
    arguments: str | dict[str, Any] = Field("", description="JSON, or what it says")


class ToolCall(Part):
    """A call that the assistant made in an earlier turn."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


Content = Annotated[
    Annotated[str, Tag("a text")] | Annotated[Items[TextPart], Tag("parts")],
    Discriminator(lambda given: "parts" if isinstance(given, list) else "a text"),
]


class ChatMessage(Part):
    """One message of a conversation. Turns with tools need a chat template that knows them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(None, description="may be left out where there are tool_calls")
    name: str | None = Field(None, description="of who speaks, for the chat template")
    tool_calls: Annotated[Items[ToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = Field(
        None, description="calls that the assistant made"
    )
    tool_call_id: str | None = Field(None, description="of a tool's message: the call that it answers")

    @property
    def text(self) -> str:
        """The content as one text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


class ChatRequest(GenerateRequest):
    """Body of POST /v1/chat/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = GenerateRequest.unsupported | {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "reasoning_effort": (),
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
    }

    messages: Annotated[Items[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="arguments of the model's chat template")
    add_generation_prompt: bool | None = Field(
        None, description="open the assistant's turn; default: unless continue_final_message"
    )
    continue_final_message: bool = Field(False, description="go on with the last message, which stays open")
    add_special_tokens: bool = Field(False, description="put a BOS token before what the chat template made")
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="default: what the context leaves")
    logprobs: bool | None = Field(False, description="return the logprob of each token")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="and of so many most likely ones")

    @property
    def opens_turn(self) -> bool:
        """Whether the prompt ends with the beginning of the assistant's turn."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @model_validator(mode="after")
    def _chat_is_consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestRejected("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestRejected(
                "'continue_final_message' and 'add_generation_prompt' exclude each other",
                param="continue_final_message",
            )
        return self
