"""Text to token ids and back: a thin face over a Hugging Face tokenizer, and incremental detokenising.

Only the tokenizer's Rust core is used after loading, never its Python `__call__`: that one changes truncation state on
each call and so can't be shared between threads. Of the core, only calls that let other threads run meanwhile.
"""

import inspect
import json
import logging
import re
from codecs import utf_8_decode
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from shared.errors import ModelError, RequestRejected

log = logging.getLogger(__name__)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 6
_RESET_TOKENS = 64
_SLICE_CHARACTERS = 16 * 1024
_LONG_TOKEN = 8
"""Characters a token, beyond which a text is counted in slices first: no usual text has tokens that long."""
_LONGEST_BEGUN = 3
"""Bytes of a character that is not complete."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Encodes prompts, renders chats, decodes tokens. Safe to use from several threads."""

    def __init__(self, tokenizer: Any):
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            raise ModelError("the model's tokenizer has no fast (tokenizer.json) form")
        core.no_truncation()
        core.no_padding()
        self._tokenizer = tokenizer
        self._core = core
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder.items()
        self._added = {int(token): str(each) for token, each in added}
        self.special_ids: dict[str, int] = {str(each): int(token) for token, each in added if each.special}
        """The tokens that have no text, by their names."""
        self._bytes: dict[int, bytes] = {}
        self._texts: tuple[dict[int, bytes], dict[int, bytes]] = {}, {}

    @classmethod
    def load(cls, source: str) -> "Tokenizer":
        """Load from a directory or a hub id; blocks for seconds. Raises ModelError."""
        from transformers import AutoTokenizer

        if Path(source).is_absolute() and not Path(source).is_dir():
            raise ModelError(f"tokenizer: there is no {source} on this host; say where it lies here (--model)")
        try:
            loaded = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # transformers, tokenizers and the hub client raise dozens of kinds
            raise ModelError(f"tokenizer of {source!r} can't be loaded: {type(error).__name__}: {error}") from error
        return cls(loaded)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text. `special`: add what the tokenizer puts around a text (BOS); a rendered chat has it."""
        ids: list[int] = self._core.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids

    def exceeds(self, text: str, most: int) -> bool:
        """Whether a text is certain to have more than `most` tokens. Costs no more than that many tokens twice.

        Counted in slices up to twice as many: a cut within a word makes a few tokens more, never double. What is not
        certain is for `encode` to tell, of a text that is not much longer.
        """
        if len(text) <= max(_SLICE_CHARACTERS, _LONG_TOKEN * most):
            return False
        counted = 0
        for start in range(0, len(text), _SLICE_CHARACTERS):
            counted += len(self.encode(text[start : start + _SLICE_CHARACTERS], special=False))
            if counted > 2 * most:
                return True
        return False

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids. `special`: with special tokens, which are left out otherwise."""
        text: str = self._core.decode(list(ids), skip_special_tokens=not special)
        return text

    def certain(self, ids: Sequence[int], *, special: bool = False) -> tuple[str, bool]:
        """Text of token ids but for the beginning of a character at their end, and whether there is one."""
        text = self.decode(ids, special=special)
        if not text.endswith(REPLACEMENT):
            return text, False
        begun = _begun(b"".join(self.token_bytes(token) for token in ids[-4:]))
        if not begun:
            return text, False
        # bytes that are no character are one U+FFFD to a byte-level decoder; to the other kind a token each, and spoil
        # the characters before them
        return (text[:-1] if self._is_byte_level else self.decode(ids[:-begun], special=special)), True

    def detokenizer(self, prompt: Sequence[int] = (), *, special: bool = False) -> "Detokenizer":
        """What tells the text of an answer to this prompt, token by token. `special`: special tokens have a text."""
        if self._is_bytes:
            return ByteDetokenizer(self, prompt, special=special)
        return WindowDetokenizer(self, prompt, special=special)

    @cached_property
    def template_arguments(self) -> frozenset[str]:
        """Names that a template's own arguments can't have."""
        return frozenset(inspect.signature(self._tokenizer.apply_chat_template).parameters) | {"messages"}

    def template_knows(self, word: str) -> bool:
        """Whether the chat template, if there is one, has this word in it."""
        return bool(self._tokenizer.chat_template) and word in self._tokenizer.get_chat_template()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any] | None = None,
        *,
        continued: bool = False,
        open_turn: bool = True,
    ) -> str:
        """The prompt of a conversation. Raises RequestRejected.

        `open_turn`: ready for the assistant's turn. `continued`: the last message goes on. `arguments`: the template's.
        """
        if not self._tokenizer.chat_template:
            raise RequestRejected(
                "the model has no chat template; use /v1/completions instead", code="no_chat_template", param="messages"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=open_turn,
                continue_final_message=continued,
                **(arguments or {}),
            )
        except Exception as error:  # whatever a template raises, it is about these messages
            raise RequestRejected(
                f"the model's chat template refuses these messages: {_first_line(error)}", param="messages"
            ) from error
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; they may be part of a character."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._find_bytes(token)
        return found

    def text_bytes(self, token: int, *, special: bool) -> bytes:
        """What a token adds to a text that is but its tokens' bytes; special tokens only where `special` is set."""
        texts = self._texts[special]
        found = texts.get(token)
        if found is None:
            found = texts[token] = self._find_text_bytes(token, special)
        return found

    def _find_text_bytes(self, token: int, special: bool) -> bytes:
        if token not in self._added:
            return self.token_bytes(token)
        if not special and self._added[token] in self.special_ids:
            return b""
        return _from_alphabet(self._added[token]) or self.token_bytes(token)

    def _find_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece: str | None = self._core.id_to_token(token)
        if piece is None:
            return b""
        if self._is_byte_level and (data := _from_alphabet(piece)):
            return data
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode()

    @cached_property
    def _decoders(self) -> list[str]:
        """What makes a text of tokens, one after the other."""
        decoder = json.loads(self._core.to_str()).get("decoder") or {}
        return [part.get("type", "") for part in decoder.get("decoders", [decoder])]

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in self._decoders

    @cached_property
    def _is_bytes(self) -> bool:
        """Whether a text is its tokens' bytes and nothing else."""
        return self._decoders == ["ByteLevel"]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


def _from_alphabet(piece: str) -> bytes:
    """The bytes that a piece stands for; none if it is not written in the alphabet."""
    return bytes(_BYTE_OF[char] for char in piece) if all(char in _BYTE_OF for char in piece) else b""


def _begun(data: bytes) -> int:
    """How many bytes at the end are the beginning of a character that is not complete."""
    for back, byte in enumerate(reversed(data[-3:]), start=1):
        if byte & 0xC0 != 0x80:
            length = 4 if 0xF0 <= byte < 0xF8 else 3 if 0xE0 <= byte < 0xF0 else 2 if 0xC0 <= byte < 0xE0 else 1
            return back if back < length else 0
    return 0


class Detokenizer(Protocol):
    """Text of a growing list of tokens, piece by piece; never half a character.

    Pieces joined equal the text of all tokens decoded at once. A token costs the same however long the answer is.
    A character that begins in the prompt is told with the token that completes it.
    """

    def push(self, token: int) -> str:
        """The text that is certain after one more token; empty while a character is incomplete."""

    def flush(self) -> str:
        """What is left at the end: an incomplete character as U+FFFD."""


class ByteDetokenizer:
    """A Detokenizer where a text is its tokens' bytes: holds those of a character that is not complete."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, special: bool = False):
        self._tokenizer = tokenizer
        self._special = special
        self._begun = b""
        before = b"".join(tokenizer.text_bytes(token, special=special) for token in prompt[-_CONTEXT_TOKENS:])
        self._decode(before[-_LONGEST_BEGUN:])

    def _decode(self, data: bytes) -> str:
        data = self._begun + data
        text, used = utf_8_decode(data, "replace", False)
        self._begun = data[used:]
        return text

    def push(self, token: int) -> str:
        """See Detokenizer."""
        return self._decode(self._tokenizer.text_bytes(token, special=self._special))

    def flush(self) -> str:
        """See Detokenizer."""
        begun, self._begun = self._begun, b""
        return begun.decode(errors="replace")


class WindowDetokenizer:
    """A Detokenizer for any tokenizer.

    Tokens are decoded in a short window that begins where the text was last known to be whole (as
    text-generation-inference and vLLM do). `prompt`: what comes before, for tokenizers that treat a text's beginning
    specially.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, special: bool = False):
        self._tokenizer = tokenizer
        self._special = special
        start = max(0, len(prompt) - _CONTEXT_TOKENS)
        while (
            start
            and tokenizer.token_bytes(prompt[start])[:1]
            and tokenizer.token_bytes(prompt[start])[0] & 0xC0 == 0x80
        ):
            start -= 1  # not within a character
        self._restart(list(prompt[start:]))

    def _restart(self, window: list[int]) -> None:
        self._window = window
        self._whole = len(window)  # tokens at the window's start whose text is sent
        self._sent = len(self._certain()[0])  # characters of the window's text that are sent

    def _certain(self) -> tuple[str, bool]:
        return self._tokenizer.certain(self._window, special=self._special) if self._window else ("", False)

    def push(self, token: int) -> str:
        """See Detokenizer."""
        self._window.append(token)
        text, begun = self._certain()
        new = text[self._sent :]
        if len(self._window) - self._whole >= _RESET_TOKENS or (new and not begun):
            self._restart(self._window[self._whole :])
        else:
            self._sent = max(self._sent, len(text))
        return new

    def flush(self) -> str:
        """See Detokenizer."""
        text = self._tokenizer.decode(self._window, special=self._special)
        new, self._sent = text[self._sent :], len(text)
        return new
