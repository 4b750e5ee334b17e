"""Control frames: MessagePack [version, type name, fields], to and from the dataclasses of `messages`."""

from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

import msgpack
from pydantic import TypeAdapter, ValidationError

from shared import messages
from shared.errors import ProtocolError
from shared.messages import Message

VERSION = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
"""The largest control frame: a StepPlan or Submit stays far below; page bytes never travel here."""


def check_size(length: int, what: str = "frame", limit: int = MAX_FRAME_BYTES) -> None:
    """Raise ProtocolError for more bytes than a frame may have."""
    if length > limit:
        raise ProtocolError(f"{what} of {length} bytes; at most {limit} are allowed")


class Codec:
    """Frames of the messages that these modules define, of so many bytes at most."""

    def __init__(self, *modules: ModuleType, limit: int = MAX_FRAME_BYTES):
        self._limit = limit
        kinds = (kind for module in modules for kind in vars(module).values())
        self._adapters: dict[str, TypeAdapter[Message]] = {
            kind.__name__: TypeAdapter(kind)
            for kind in kinds
            if is_dataclass(kind) and isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
        }

    @property
    def kinds(self) -> list[str]:
        """The names of the messages."""
        return sorted(self._adapters)

    def encode(self, message: Message) -> bytes:
        """One message as a frame. Raises ProtocolError for one that no receiver would take."""
        name = type(message).__name__
        body = self._adapters[name].dump_python(message)
        frame: bytes = msgpack.packb([VERSION, name, body], use_bin_type=True)
        check_size(len(frame), name, self._limit)
        return frame

    def decode(self, frame: bytes) -> Message:
        """The message in a frame, validated. Raises ProtocolError, with what was wrong, for anything else."""
        check_size(len(frame), "frame", self._limit)
        try:
            content: Any = msgpack.unpackb(frame, raw=False, strict_map_key=True)
        except Exception as error:  # msgpack raises many kinds, ValueError and its own among them
            raise ProtocolError(f"not a MessagePack frame: {type(error).__name__}") from error
        if not (isinstance(content, list) and len(content) == 3):
            raise ProtocolError("a frame is a list of version, type and fields")
        version, name, fields = content
        if version != VERSION:
            raise ProtocolError(f"protocol version {version!r}; this is version {VERSION}")
        adapter = self._adapters.get(name) if isinstance(name, str) else None
        if adapter is None:
            raise ProtocolError(f"unknown message type {str(name)[:64]!r}")
        try:
            return adapter.validate_python(fields)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ProtocolError(f"{name}.{where}: {first['msg']}") from error


CONTROL = Codec(messages)


def encode(message: Message) -> bytes:
    """One control message as a frame. Raises ProtocolError, see `Codec.encode`."""
    return CONTROL.encode(message)


def decode(frame: bytes) -> Message:
    """The control message in a frame. Raises ProtocolError, see `Codec.decode`."""
    return CONTROL.decode(frame)
