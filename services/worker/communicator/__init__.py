"""What ranks say to each other: one contract, a backend a file."""

import threading
from collections.abc import Callable
from typing import Protocol

from services.worker.communicator.base import DEFAULT_SLOT_BYTES, Communicator, Kind
from services.worker.communicator.shm import ShmCommunicator, ShmRendezvous


class RendezvousHandle(Protocol):
    """Where the ranks of a communicator meet. Rank 0 opens it, and closes it when all are connected or none will be."""

    address: str

    def close(self) -> None: ...


def open_rendezvous(
    kind: Kind, size: int, *, host: str = "127.0.0.1", slot_bytes: int = DEFAULT_SLOT_BYTES
) -> RendezvousHandle:
    """Open the meeting point of a communicator of `size` ranks. `host` is the address others reach this one by."""
    if kind == "shm":
        return ShmRendezvous(size, slot_bytes)
    from services.worker.communicator.torch_dist import StoreRendezvous

    return StoreRendezvous(size, host)


def create(
    kind: Kind,
    address: str,
    rank: int,
    size: int,
    *,
    slot_bytes: int = DEFAULT_SLOT_BYTES,
    timeout: float,
    cancelled: threading.Event | None = None,
) -> Communicator:
    """Connect as `rank`, and return when all ranks have.

    Raises CutOff when rank 0 can't be reached; DeadlineExceeded after `timeout` seconds, which is also the bound of
    each later wait; CommunicatorAborted when `cancelled` is set while ranks are missing. Once all have come, gloo and
    NCCL connect them within 10 s, which nothing can end sooner.
    """
    if kind == "shm":
        return ShmCommunicator(address, rank, size, timeout, cancelled)
    from services.worker.communicator import torch_dist

    backend: Callable[[str, int, int, float, threading.Event | None], Communicator]
    backend = torch_dist.GlooCommunicator if kind == "gloo" else torch_dist.NcclCommunicator
    return backend(address, rank, size, timeout, cancelled)
