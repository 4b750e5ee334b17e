"""What all control messages have in common."""

from dataclasses import dataclass

TOLD_TO_STOP = "it was told to stop"
"""The reason of who says Goodbye to the coordinator."""


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all control messages."""
