"""The core's state as plain data, and the core from it again: from where a recording can be replayed.

Objects are a table of nodes that name each other by number, so that what is one object stays one. Only classes of the
coordinator and of `shared` can be in it, and nothing of them is called: reading a keyframe runs no code of its author.
"""

import gc
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import Any

import msgpack

from shared.errors import ProtocolError

Externals = Mapping[str, object]
"""Objects that are not written, but put in by name: settings, metrics, tracing."""

_REF = 1
_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
_KINDS: dict[Any, str] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    dict: "dict",
    OrderedDict: "odict",
}
_HOMES = ("services.coordinator.", "shared.")


def freeze(root: object, externals: Externals) -> bytes:
    """All that can be reached from `root`, as MessagePack. Raises TypeError for what can't be written."""
    outside = {id(value): name for name, value in externals.items()}
    refs, found = {id(root): msgpack.ExtType(_REF, bytes(4))}, [root]
    fields: dict[str, list[str]] = {}

    def put(value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        ref = refs.get(id(value))
        if ref is None:
            ref = refs[id(value)] = msgpack.ExtType(_REF, len(found).to_bytes(4, "little"))
            found.append(value)
        return ref

    def node(value: Any) -> list[Any]:
        kind: Any = type(value)
        if (external := outside.get(id(value))) is not None:
            return ["external", external]
        if isinstance(value, Enum):
            return ["enum", _name(kind), value.value]
        if kind is array:
            return ["array", value.typecode, value.tobytes()]
        if kind is deque:
            return ["deque", value.maxlen, *map(put, value)]
        if kind in (dict, OrderedDict):
            return [_KINDS[kind], *(put(part) for item in value.items() for part in item)]
        if kind in _KINDS:
            return [_KINDS[kind], *map(put, value)]
        name = _name(kind)
        fields[name] = _slots(name) or list(vars(value))
        parts = _values(name)(value) if _slots(name) else vars(value).values()
        return [name, *[part if type(part) in _PLAIN else put(part) for part in parts]]

    gc.disable()  # so much is made at once that it would look through all of it several times, for nothing
    try:
        nodes = [node(value) for value in found]  # which grows meanwhile
        return bytes(msgpack.packb([fields, nodes], use_bin_type=True))
    finally:
        gc.enable()


def thaw(data: bytes, externals: Externals) -> Any:
    """The inverse of `freeze`. Raises ProtocolError for what was not written by it, or by other code than this."""
    try:
        fields, nodes = msgpack.unpackb(data, ext_hook=_ext, strict_map_key=False)
        return _Thaw(fields, nodes, externals).get(_Ref(0))
    except Exception as error:  # of many kinds, for what was damaged anywhere
        raise ProtocolError(f"a keyframe that can't be read: {type(error).__name__}: {error}") from error


class _Ref(int):
    """The number of a node."""


def _ext(kind: int, raw: bytes) -> _Ref:
    return _Ref(int.from_bytes(raw, "little"))


class _Thaw:
    """Objects made so far, by number."""

    def __init__(self, fields: dict[str, list[str]], nodes: list[Any], externals: Externals):
        self._fields = fields
        self._nodes = nodes
        self._externals = externals
        self._made: dict[int, Any] = {}

    def get(self, value: Any) -> Any:
        """The object that a value of a node stands for."""
        if not isinstance(value, _Ref):
            return value
        if value not in self._made:
            self._make(value)
        return self._made[value]

    def _make(self, number: _Ref) -> None:
        kind, *parts = self._nodes[number]
        made = self._made
        match kind:
            case "external":
                made[number] = self._externals[parts[0]]
            case "enum":
                made[number] = _enum(parts[0])(parts[1])
            case "tuple":
                made[number] = tuple(map(self.get, parts))
            case "frozenset":
                made[number] = frozenset(map(self.get, parts))
            case "list":
                items: list[Any] = []
                made[number] = items
                items.extend(map(self.get, parts))
            case "set":
                found: set[Any] = set()
                made[number] = found
                found.update(map(self.get, parts))
            case "array":
                made[number] = ids = array(parts[0])
                ids.frombytes(parts[1])
            case "deque":
                made[number] = queue = deque[Any](maxlen=parts[0])
                queue.extend(map(self.get, parts[1:]))
            case "dict" | "odict":
                made[number] = table = OrderedDict[Any, Any]() if kind == "odict" else {}
                values = iter(parts)
                table.update((self.get(key), self.get(value)) for key, value in zip(values, values, strict=True))
            case _:
                self._object(number, kind, parts)

    def _object(self, number: _Ref, name: str, parts: list[Any]) -> None:
        kind = _class(name)
        made = self._made[number] = kind.__new__(kind)
        for field, part in zip(self._fields[name], parts, strict=True):
            object.__setattr__(made, field, self.get(part))


@cache
def _name(kind: Any) -> str:
    if not kind.__module__.startswith(_HOMES):
        raise TypeError(f"{kind.__module__}.{kind.__qualname__} is no part of the core's state")
    return f"{kind.__module__}:{kind.__qualname__}"


@cache
def _class(name: str) -> Any:
    module, _, qualified = name.partition(":")
    if not module.startswith(_HOMES) or not isinstance(kind := getattr(import_module(module), qualified), type):
        raise ProtocolError(f"{name} is no class of the core")
    return kind


def _enum(name: str) -> Any:
    if not issubclass(kind := _class(name), Enum):
        raise ProtocolError(f"{name} is no enumeration")
    return kind


@cache
def _slots(name: str) -> list[str]:
    return [slot for kind in reversed(_class(name).__mro__) for slot in getattr(kind, "__slots__", ())]


@cache
def _values(name: str) -> Callable[[Any], tuple[Any, ...]]:
    """Reads all slots of an object of this class."""
    first, *others = _slots(name)
    return attrgetter(first, *others) if others else lambda value: (getattr(value, first),)
