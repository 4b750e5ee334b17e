"""Logs: one line an event, with the epoch and the request that it belongs to; text for people, JSON for machines.

A call names what happened and gives what is known of it: `log.info("rank lost", extra={"rank": 1, "worker": name})`.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

LEVELS = ("debug", "info", "warning", "error")

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request that the running task works for, for its log lines."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def parse_levels(spec: str) -> tuple[str, dict[str, str]]:
    """`info,services.coordinator=debug` as a level for all, and levels by module. Raises ValueError."""
    first, *others = [part.strip() for part in spec.split(",")]
    modules = {}
    for part in others:
        module, equals, level = part.partition("=")
        if not equals or not module or not all(name.isidentifier() for name in module.split(".")):
            raise ValueError(f"{part!r} is not module=level")
        modules[module] = level
    for level in (first, *modules.values()):
        if level not in LEVELS:
            raise ValueError(f"{level!r} is no level; allowed: {', '.join(LEVELS)}")
    return first, modules


def check_levels(spec: str) -> str:
    """The spec, if it is one. Raises ValueError."""
    parse_levels(spec)
    return spec


def configure(service: str, levels: str, *, as_json: bool) -> None:
    """Send this process's log to standard error. Lines are stamped with `service`, and with the epoch once known."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(service) if as_json else _Text(service))
    level, modules = parse_levels(levels)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    for module, own in modules.items():
        logging.getLogger(module).setLevel(own.upper())


def epoch_is(epoch: int) -> None:
    """From now on this process's lines carry `epoch`: it belongs to one group."""
    _Formatter.epoch = epoch


class _Formatter(logging.Formatter):
    """What text and JSON have in common: a record's parts in order."""

    epoch = 0

    def __init__(self, service: str):
        super().__init__()
        self._service = service

    def _parts(self, record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
        if self.epoch:
            yield "epoch", self.epoch
        given = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if (request := request_id.get()) and "request" not in given:
            yield "request", request
        yield from given.items()
        if record.exc_info and record.exc_info[0] is not None:
            yield "exception", self.formatException(record.exc_info)

    @staticmethod
    def _time(record: logging.LogRecord) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


class _Text(_Formatter):
    """`time LEVEL service module: message name=value ...`; line breaks are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        told = "".join(f" {name}={_shown(value)}" for name, value in self._parts(record))
        head = f"{self._time(record)} {record.levelname} {self._service} {record.name}: "
        return head + record.getMessage().replace("\n", "\\n") + told


class Bare(_Formatter):
    """`message name=value ...`, for who prints the time himself."""

    def __init__(self) -> None:
        super().__init__("")

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        return record.getMessage() + "".join(f" {name}={_shown(value)}" for name, value in self._parts(record))


class _Json(_Formatter):
    """One JSON object a line: time, level, service, module, message, and what else is known."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        body = {
            "time": self._time(record),
            "level": record.levelname.lower(),
            "service": self._service,
            "module": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(body | dict(self._parts(record)), default=str, ensure_ascii=False)


def _shown(value: Any) -> str:
    """A value of a text line, quoted where it would not be one word."""
    text = value if isinstance(value, str) else str(value)
    return text if text and not any(each.isspace() or each in '"=' for each in text) else json.dumps(text)
