"""What operators ask for, and what they see."""

from dataclasses import dataclass

from shared.messages.base import Message
from shared.types import (
    ClusterStatus,
    Fault,
    OperatorAction,
)


@dataclass(frozen=True, slots=True)
class InjectFault(Message):
    """Break this worker. Of no effect unless each that it passes was started with allow_faults."""

    worker: str
    fault: Fault


@dataclass(frozen=True, slots=True)
class Apply(Message):
    """An operator wants this done to a worker. Answered by Applied, with this id."""

    request_id: str
    action: OperatorAction
    target: str


@dataclass(frozen=True, slots=True)
class Applied(Message):
    """What an operator asked for is under way, or done: in words."""

    request_id: str
    message: str


@dataclass(frozen=True, slots=True)
class StatusChanged(Message):
    """Sent on every change of state, and at least once a second."""

    status: ClusterStatus
