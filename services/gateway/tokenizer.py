"""Text to token ids and back: a thin face over a Hugging Face tokenizer, and incremental detokenising.

Only the tokenizer's Rust core is used after loading, never its Python `__call__`: that one changes truncation state on
each call and so can't be shared between threads.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.errors import ModelError, RequestRejected

log = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 6
_HOLD_TOKENS = 8
_RESET_TOKENS = 64
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
        self._added = {int(token): str(added) for token, added in tokenizer.added_tokens_decoder.items()}

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
        ids: list[int] = self._core.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._core.decode(list(ids), skip_special_tokens=True)
        return text

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation, ready for the assistant's turn. Raises RequestRejected."""
        if not self._tokenizer.chat_template:
            raise RequestRejected(
                "the model has no chat template; use /v1/completions instead", code="no_chat_template", param="messages"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template raises, it is about these messages
            raise RequestRejected(
                f"the model's chat template refuses these messages: {_first_line(error)}", param="messages"
            ) from error
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; they may be part of a character."""
        if token in self._added:
            return self._added[token].encode()
        piece: str | None = self._core.id_to_token(token)
        if piece is None:
            return b""
        if self._is_byte_level and all(char in _BYTE_OF for char in piece):
            return bytes(_BYTE_OF[char] for char in piece)
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self._core.to_str()).get("decoder") or {}
        return "ByteLevel" in {part.get("type") for part in [decoder, *decoder.get("decoders", [])]}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


class Detokenizer:
    """Text of a growing list of tokens, piece by piece; never half a character.

    Pieces joined equal the text of all tokens decoded at once. Tokens are decoded in a short window that begins where
    the text was last known to be whole (as text-generation-inference and vLLM do), so each costs the same however
    long the answer is. `prompt`: what comes before, for tokenizers that treat a text's beginning specially.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()):
        self._decode = decode
        self._window = list(prompt[-_CONTEXT_TOKENS:])
        self._whole = len(self._window)  # tokens at the window's start whose text is sent
        before = decode(self._window) if self._window else ""
        self._sent = len(before.removesuffix(REPLACEMENT))  # characters of the window's text that are sent

    def push(self, token: int) -> str:
        """The text that is certain after one more token; empty while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        held = len(self._window) - self._whole
        if held >= _RESET_TOKENS or (len(text) > self._sent and not text.endswith(REPLACEMENT)):
            new, self._window = text[self._sent :], self._window[self._whole :]
            self._whole = len(self._window)
            self._sent = len(self._decode(self._window))
            return new
        if held >= _HOLD_TOKENS and text.endswith(REPLACEMENT):
            # Broken bytes, or tokens that always end within a character: only the very end can still change.
            new, self._sent = text[self._sent : -1], max(self._sent, len(text) - 1)
            return new
        return ""

    def flush(self) -> str:
        """What is left at the end: an incomplete character as U+FFFD."""
        text = self._decode(self._window)
        new, self._sent = text[self._sent :], len(text)
        return new
