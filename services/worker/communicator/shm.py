"""A communicator over shared memory, for CPU ranks of one host: the fast one there, and the one that aborts at once.

The memory is an anonymous file (memfd) of rank 0, reached by the others through /proc, so nothing is left behind by a
process that is killed. Each rank owns a sequence word and two slots. To take part in operation i a rank writes its
slot i mod 2, then its word, and wakes those who wait for it (futex). A slot is written again in operation i + 2, which
a rank enters after all have entered i + 1 and so have done with i.

Order of stores: x86 keeps it; other machines would need fences that Python does not have, and are refused.
"""

import ctypes
import mmap
import os
import platform
import select
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from services.worker.communicator.base import Communicator, cut
from services.worker.memory import Bytes, Memory, to_host
from shared.errors import CommunicatorAborted, ConfigError, DeadlineExceeded, ProtocolError

_SYS_FUTEX = 202  # x86-64
_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_EVERYONE = 0x7FFFFFFF
_ABORTED = 0x80000000
_SEQUENCE = 0x7FFFFFFF  # the rest of a word counts barriers, round and round
_LINE = 64  # each word on a cache line of its own
_SLICE = 0.02  # a wait looks for dead peers this often
_ONE_PHASE_BYTES = 32 << 10  # above: each rank sums its part, then all copy the sums

_ARGUMENTS = (
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_long,
    ctypes.c_long,
)
_syscall = ctypes.CDLL(None).syscall  # releases the GIL while it waits
_syscall.argtypes = _ARGUMENTS
_syscall_at_once = ctypes.PyDLL(None).syscall  # keeps the GIL: another thread that has got it holds it for 5 ms
_syscall_at_once.argtypes = _ARGUMENTS


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


_SLICE_SPEC = _Timespec(0, int(_SLICE * 1e9))
_SLICE_ADDRESS = ctypes.addressof(_SLICE_SPEC)


class ShmRendezvous:
    """The shared memory of one communicator, held by rank 0 until all ranks are connected."""

    def __init__(self, size: int, slot_bytes: int) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise ConfigError(f"communicator shm needs x86-64, this is {platform.machine()}: use gloo")
        slot_bytes = _round_up(slot_bytes, 4096)
        self._fd = os.memfd_create("ghostserve", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, _header_bytes(size) + size * 2 * slot_bytes)
        self.address = f"/proc/{os.getpid()}/fd/{self._fd}"
        self._size = size

    def abort(self) -> None:
        """End the epoch for all ranks, connected or not, from a process that need not be one of them."""
        if self._fd >= 0:
            memory = mmap.mmap(self._fd, _header_bytes(self._size))
            words = [ctypes.c_uint32.from_buffer(memory, line * _LINE) for line in range(1 + self._size)]
            _abort(words[0], words[1:])

    def close(self) -> None:
        """Forget the memory. Ranks that are connected keep it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ShmCommunicator(Communicator):
    """Ranks of one host over the memory at `address` (see ShmRendezvous)."""

    def __init__(
        self, address: str, rank: int, size: int, timeout: float, cancelled: threading.Event | None = None
    ) -> None:
        super().__init__(rank, size, timeout)
        self._cancelled = cancelled
        self._map = _open(address)
        header = _header_bytes(size)
        self._slot_bytes = (len(self._map) - header) // (2 * size)
        whole = np.frombuffer(self._map, dtype=np.uint8)
        # line 0: abort; lines 1..size: sequence words; lines size+1..2*size: process ids
        words = [ctypes.c_uint32.from_buffer(self._map, line * _LINE) for line in range(1 + 2 * size)]
        self._abort_word, self._words, self._pids = words[0], words[1 : 1 + size], words[1 + size :]
        self._addresses = [ctypes.addressof(word) for word in self._words]
        self._peers = [r for r in range(size) if r != rank]
        # slots: uint8 [size, 2, slot_bytes]
        self._slots = torch.from_numpy(whole[header : header + size * 2 * self._slot_bytes]).view(size, 2, -1)
        self._slots_np = self._slots.numpy()
        self._views: dict[tuple[torch.dtype, int, int], list[torch.Tensor]] = {}
        self._sequence = 0
        self._operation = 0
        self._pidfds: dict[int, int] = {}
        self._closed = False
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        self._pids[self.rank].value = os.getpid()
        self._barrier()  # word 1: everyone is here, and has said its process id
        for peer in self._peers:
            pid = self._pids[peer].value
            try:
                self._pidfds[peer] = os.pidfd_open(pid)
            except ProcessLookupError:
                raise CommunicatorAborted(f"rank {peer} is gone") from None

    def all_reduce(self, tensor: torch.Tensor) -> None:
        flat = tensor.view(-1)
        step = self._slot_bytes // flat.element_size()
        if flat.numel() * flat.element_size() <= _ONE_PHASE_BYTES:
            self._reduce_small(flat)
        else:
            for start in range(0, flat.numel(), step):
                self._reduce_large(flat[start : start + step])

    def _reduce_small(self, flat: torch.Tensor) -> None:
        """Everyone sums everything: one barrier."""
        slots = self._begin(flat)
        slots[self.rank].copy_(flat)
        self._barrier()
        _ordered_sum(slots, flat)

    def _reduce_large(self, flat: torch.Tensor) -> None:
        """Each rank sums its part in place of its own slot's, which nobody else reads; then all copy: two barriers."""
        slots = self._begin(flat)
        slots[self.rank].copy_(flat)
        self._barrier()
        part = -(-flat.numel() // self.size)
        mine = slice(self.rank * part, (self.rank + 1) * part)
        _ordered_sum([slot[mine] for slot in slots], slots[self.rank][mine])
        self._barrier()
        for rank, slot in enumerate(slots):
            flat[rank * part : (rank + 1) * part].copy_(slot[rank * part : (rank + 1) * part])

    def all_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        self._check_gather(tensor, out)
        flat, flat_out = tensor.view(-1), out.view(self.size, -1)
        step = self._slot_bytes // flat.element_size()
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step]
            slots = self._begin(piece)
            slots[self.rank].copy_(piece)
            self._barrier()
            for rank, slot in enumerate(slots):
                flat_out[rank, start : start + step].copy_(slot)

    def all_to_all(self, send: Sequence[Sequence[Memory]], receive: Sequence[Sequence[Memory]]) -> None:
        self._check_exchange(send, receive)
        sources = [[to_host(buffer) for buffer in buffers] for buffers in send]
        targets = [[to_host(buffer) for buffer in buffers] for buffers in receive]
        sent = [sum(map(len, buffers)) for buffers in sources]
        expected = [sum(map(len, buffers)) for buffers in targets]
        # each slot begins with `sent` of its rank, which says how the rest is divided among those that get bytes of it,
        # and in the first round how many rounds there are: one barrier a round
        head = self.size * 8
        round_, rounds = 0, 1
        while round_ < rounds:
            slots = self._slots_np[:, self._operation % 2]
            self._operation += 1
            totals = slots[:, :head].view(np.int64)  # [from, to]
            totals[self.rank] = sent
            for to, buffers in enumerate(sources):
                place, part = _share(sent, to, self._slot_bytes - head)
                room = slots[self.rank, head + place :]
                for buffer, at, length in _laid_out(buffers, round_ * part, part):
                    room[at : at + length] = buffer
            self._barrier()
            if totals[:, self.rank].tolist() != expected:
                self.abort()
                raise ProtocolError(f"all_to_all: rank {self.rank} expects other sizes than its peers send")
            told = totals.tolist()  # a rank that is ahead writes to the other slot
            for source, buffers in enumerate(targets):
                place, part = _share(told[source], self.rank, self._slot_bytes - head)
                room = slots[source, head + place :]
                for buffer, at, length in _laid_out(buffers, round_ * part, part):
                    buffer[:] = room[at : at + length]
            round_ += 1
            rounds = max(-(-max(row) // _share(row, 0, self._slot_bytes - head)[1]) for row in told)

    def abort(self) -> None:
        if not self._closed:
            _abort(self._abort_word, self._words)

    def close(self) -> None:
        if not self._closed:
            self.abort()
            self._closed = True
            for pidfd in self._pidfds.values():
                os.close(pidfd)
            self._pidfds.clear()
            self._views.clear()  # the map itself goes with the last view of it

    def _begin(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """All ranks' slots for the next operation, as views like `flat` [n]."""
        buffer = self._operation % 2
        self._operation += 1
        key = (flat.dtype, flat.numel(), buffer)
        views = self._views.get(key)
        if views is None:
            length = flat.numel() * flat.element_size()
            views = [self._slots[rank, buffer, :length].view(flat.dtype) for rank in range(self.size)]
            if len(self._views) < 256:
                self._views[key] = views
        return views

    def _barrier(self) -> None:
        """Say that this rank got here, and wait until all have."""
        if self._closed or self._abort_word.value:
            raise CommunicatorAborted("the epoch was aborted")
        sequence = self._sequence = (self._sequence + 1) & _SEQUENCE
        self._words[self.rank].value = sequence
        self.entered += 1
        _syscall_at_once(_SYS_FUTEX, self._addresses[self.rank], _FUTEX_WAKE, _EVERYONE, None, 0, 0)
        began = time.monotonic()
        for peer in self._peers:
            if self._words[peer].value != sequence:
                self._await(peer, sequence)
        self.waited_s += time.monotonic() - began

    def _await(self, peer: int, sequence: int) -> None:
        word, address = self._words[peer], self._addresses[peer]
        deadline = time.monotonic() + self.timeout
        trouble: CommunicatorAborted | DeadlineExceeded | None = None
        while True:
            # what ends a wait is looked for before the word is read: who has left meanwhile had got here first
            aborted = self._abort_word.value
            seen = word.value
            if (seen - sequence) & _SEQUENCE <= 1:  # one further at most: the next barrier can't be passed without us
                return
            if trouble is not None:
                self.abort()
                raise trouble
            if aborted or seen & _ABORTED:
                raise CommunicatorAborted("the epoch was aborted")
            _syscall(_SYS_FUTEX, address, _FUTEX_WAIT, seen, _SLICE_ADDRESS, 0, 0)
            if word.value == seen:
                trouble = self._trouble(peer, deadline)

    def _trouble(self, peer: int, deadline: float) -> CommunicatorAborted | DeadlineExceeded | None:
        """Why this rank need not wait any longer for `peer`, unless that has got here since."""
        if self._pidfds:
            poll = select.poll()
            ranks = {pidfd: rank for rank, pidfd in self._pidfds.items()}
            for pidfd in ranks:
                poll.register(pidfd, select.POLLIN)
            for pidfd, _ in poll.poll(0):
                return CommunicatorAborted(f"rank {ranks[pidfd]} is gone")
        elif self._cancelled is not None and self._cancelled.is_set():
            return CommunicatorAborted("the epoch ended before all ranks were connected")
        if time.monotonic() > deadline:
            return DeadlineExceeded(f"rank {peer} did not take part within {self.timeout} s")
        return None


def _abort(abort_word: ctypes.c_uint32, words: Sequence[ctypes.c_uint32]) -> None:
    abort_word.value = 1
    for word in words:
        word.value |= _ABORTED  # a word that changed ends a futex wait, also one that is only about to begin
        _syscall_at_once(_SYS_FUTEX, ctypes.addressof(word), _FUTEX_WAKE, _EVERYONE, None, 0, 0)


def _share(sent: Sequence[int], to: int, room: int) -> tuple[int, int]:
    """Where rank `to` finds its bytes in a slot, and how many at most: it is divided among those who get any."""
    part = room // max(1, sum(map(bool, sent)))
    return part * sum(map(bool, sent[:to])), part


def _laid_out(buffers: Sequence[Bytes], start: int, length: int) -> Iterator[tuple[Bytes, int, int]]:
    """The views that make up bytes [start, start + length) of buffers laid end to end; where each goes, its length."""
    at = 0
    for piece in cut([len(buffer) for buffer in buffers], start, length):
        yield buffers[piece.buffer][piece.offset : piece.offset + piece.length], at, piece.length
        at += piece.length


def _ordered_sum(slots: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """out [n] = slots[0] + slots[1] + ..., in this order; half-precision is added in float32 and rounded once."""
    if out.dtype in (torch.bfloat16, torch.float16):
        total = slots[0].float()
        for slot in slots[1:]:
            total += slot
        out.copy_(total)
    elif len(slots) == 1:
        out.copy_(slots[0])
    else:
        total = slots[0] + slots[1]
        for slot in slots[2:]:
            total += slot
        out.copy_(total)


def _open(address: str) -> mmap.mmap:
    try:
        fd = os.open(address, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise CommunicatorAborted(f"rank 0's shared memory {address} is gone: {error.strerror}") from error
    try:
        return mmap.mmap(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _header_bytes(size: int) -> int:
    return _round_up((1 + 2 * size) * _LINE, 4096)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
