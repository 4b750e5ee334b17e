"""Frames: every message comes back as it was, and nothing else is let in."""

import dataclasses

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import messages, wire
from shared.errors import ProtocolError
from shared.messages import Batch, Heartbeat, Message, StepPlan

KINDS = wire.CONTROL.kinds


st.register_type_strategy(int, st.integers(-(2**63), 2**64 - 1))
st.register_type_strategy(float, st.floats(allow_nan=False))


@pytest.mark.parametrize("name", KINDS)
def test_every_message_survives_the_wire(name: str) -> None:
    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(st.from_type(getattr(messages, name)))
    def check(value: Message) -> None:
        assert wire.decode(wire.encode(value)) == value

    check()


@given(st.binary(max_size=300))
def test_random_bytes_are_a_protocol_error(frame: bytes) -> None:
    try:
        message = wire.decode(frame)
    except ProtocolError:
        return
    assert wire.decode(wire.encode(message)) == message


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ([wire.VERSION + 1, "Heartbeat", {}], "protocol version"),
        ([wire.VERSION, "Nonsense", {}], "unknown message type"),
        ([wire.VERSION, "Heartbeat", {"epoch": 1, "step": "x", "in_flight": True}], "Heartbeat.step"),
        ([wire.VERSION, "Heartbeat", {"epoch": 1}], "Heartbeat.step"),
        ([wire.VERSION, "Message", {}], "unknown message type"),
        ([wire.VERSION, ["Heartbeat"], {}], "unknown message type"),
        ({"a": 1}, "a frame is a list"),
    ],
)
def test_a_bad_frame_is_refused_with_what_was_wrong(frame: object, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        wire.decode(msgpack.packb(frame))


def test_a_frame_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        wire.decode(b"\0" * (wire.MAX_FRAME_BYTES + 1))


def test_messages_are_frozen() -> None:
    assert all(dataclasses.fields(getattr(messages, name)) is not None for name in KINDS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Heartbeat(1, 2, True, 0).epoch = 3  # type: ignore[misc]
    assert StepPlan(1, 2, Batch()).batch.begun == ()
