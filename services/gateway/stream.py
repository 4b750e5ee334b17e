"""From token events to pieces of text: one `Choice` follows one sequence. Pure: no sockets, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.gateway.tokenizer import Tokenizer
from shared.messages import Tokens
from shared.types import FinishReason, TokenLogprob, unpack_ids


class StopMatcher:
    """Finds the first stop string in text that comes in pieces, and holds back what may be the beginning of one.

    `keep`: the stop string itself is part of the text.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool = False):
        self._stops = tuple(stops)
        self._keep = keep
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that may be sent, and whether a stop string was found (then nothing follows)."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(place, len(stop)) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            place, length = min(found)
            return text[: place + length if self._keep else place], True
        keep = self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What a token event adds to a choice. Logprobs are those of `tokens`, if they were asked for.

    `first` marks the choice's first delta, which carries all of the prompt's logprobs, if they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    first: bool
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    kv_digests: tuple[str, ...] = ()


class Choice:
    """One sequence's way from token events to deltas. Token ids that end a sequence are not among its tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str],
        *,
        keep_stop: bool = False,
        special: bool = False,
    ):
        self._detokenizer = tokenizer.detokenizer(prompt, special=special)
        self._matcher = StopMatcher(stops, keep=keep_stop)
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._begun = False
        self.finish_reason: FinishReason | None = None
        self.completion_tokens = 0
        self.cached_tokens = 0

    def feed(self, event: Tokens) -> Delta | None:
        """The delta of one event; None if it has nothing to show yet, or the choice is finished.

        When a stop string ends the choice, the delta says so with the event's own finish reason still open: then the
        sequence is to be aborted. Tokens after the one that completed the stop string are dropped.
        """
        if self.finish_reason is not None:
            return None
        tokens = unpack_ids(event.tokens)
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        self._prompt_logprobs += event.prompt_logprobs
        if not tokens and event.finish_reason is None:
            return None
        text, used = self._text_of(tokens, event.finish_reason)
        self.completion_tokens += used
        first, self._begun = not self._begun, True
        return Delta(
            text=text,
            tokens=tuple(tokens[:used]),
            logprobs=event.logprobs[:used],
            finish_reason=self.finish_reason,
            first=first,
            prompt_logprobs=self._prompt_logprobs if first else (),
            cached_tokens=self.cached_tokens,
            kv_digests=event.kv_digests,
        )

    def _text_of(self, tokens: Sequence[int], finish: FinishReason | None) -> tuple[str, int]:
        """Text to send, and how many tokens it took; sets the finish reason."""
        text = ""
        for used, token in enumerate(tokens, start=1):
            ready, stopped = self._matcher.feed(self._detokenizer.push(token))
            text += ready
            if stopped:
                self.finish_reason = "stop"
                return text, used
        if finish is not None:
            ready, stopped = self._matcher.feed(self._detokenizer.flush())
            text += ready if stopped else ready + self._matcher.flush()
            self.finish_reason = "stop" if stopped else finish
        return text, len(tokens)


def merged(deltas: Sequence[Delta]) -> Delta:
    """All deltas of a finished choice as one."""
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        first=True,
        prompt_logprobs=deltas[0].prompt_logprobs,
    )
