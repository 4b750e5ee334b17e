"""What the engine core and its worker processes say to each other, over one pipe a process."""

import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from shared.types import ModelInfo


@dataclass(frozen=True, slots=True)
class Call:
    """Engine core to worker: run a method of vLLM's worker. `answer`: its result is wanted from this rank."""

    epoch: int
    number: int
    method: str | bytes
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: bool


@dataclass(frozen=True, slots=True)
class Build:
    """Engine core to worker: make vLLM's worker for each of these ranks, and run `calls` (method, args) on it."""

    ranks: tuple[int, ...]
    calls: tuple[tuple[str, tuple[Any, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Engine core to worker: be this rank from now on, with no request known, and meet the others at `address`."""

    epoch: int
    rank: int
    address: str
    timeout_s: float
    hosted_epoch: int = 0
    """The coordinator's, where one decides."""


@dataclass(frozen=True, slots=True)
class End:
    """Engine core to worker: an epoch begins, `epoch`; what is computed in an earlier one has no effect any more."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Host:
    """Engine core to worker: dial the coordinator under this name; the model that all ranks have."""

    name: str
    info: ModelInfo
    blocks: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Worker to engine core: what came out of a Call. An error is told by every rank, a value where it is wanted."""

    epoch: int
    number: int
    value: Any
    error: str = ""
    own: bool = True
    """Whether the error is this rank's, not that its peers did not take part."""
    method: str = ""
    """What failed."""


@dataclass(frozen=True, slots=True)
class Built:
    """Worker to engine core: it can take any of the ranks that it was told to build."""

    seconds: float
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Placed:
    """Worker to engine core: it is connected as that rank; or could not be, for `error`."""

    epoch: int
    rank: int
    seconds: float
    error: str = ""


Message = Call | Build | Place | End | Host | Answer | Built | Placed


def send(connection: Connection, message: Message) -> None:
    """Send in one piece. Raises OSError when the other end is gone."""
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))  # not `send`: it would share tensors' memory


def receive(connection: Connection) -> Message:
    """The next message. Raises EOFError or OSError when the other end is gone."""
    return pickle.loads(connection.recv_bytes())  # type: ignore[no-any-return]
