"""What CupyRunner asks of CuPy, by a CuPy that only takes notes: what is compiled, and launched where with what."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kernels.codec import make_codec
from kernels.cuda import CudaCodec, DeviceMemory
from kernels.errors import CodecError
from kernels.launch import ARGUMENT_BYTES, Program


class FakeCupy:
    """Two devices; notes of modules compiled and kernels launched, with the device and the stream they were for."""

    def __init__(self) -> None:
        self.device: int | None = None
        self.stream: int | None = None
        self.compiled: list[tuple[int | None, tuple[str, ...]]] = []
        self.launched: list[tuple[Any, ...]] = []
        error = type("CUDARuntimeError", (RuntimeError,), {})
        runtime = SimpleNamespace(
            getDeviceCount=lambda: 2,
            CUDARuntimeError=error,
            pointerGetAttributes=self.attributes,
            memsetAsync=lambda *arguments: self.launched.append((self.device, "clear", *arguments)),
        )
        compiler = SimpleNamespace(CompileException=type("CompileException", (Exception,), {}))
        stream = SimpleNamespace(from_external=lambda stream: self.inside("stream", stream.__cuda_stream__()[1]))
        self.cuda = SimpleNamespace(
            runtime=runtime, compiler=compiler, Stream=stream, Device=lambda index: self.inside("device", index)
        )

    @contextmanager
    def inside(self, what: str, value: int) -> Iterator[None]:
        before = getattr(self, what)
        setattr(self, what, value)
        yield
        setattr(self, what, before)

    def attributes(self, address: int) -> Any:
        return SimpleNamespace(device=address >> 32, devicePointer=address)

    def RawModule(self, code: str, options: tuple[str, ...]) -> Any:
        assert "code_16" in code
        self.compiled.append((self.device, options))

        def launch(name: str, grid: tuple[int, int], block: tuple[int], arguments: tuple[Any]) -> None:
            self.launched.append((self.device, self.stream, name, grid, block, arguments))

        return SimpleNamespace(get_function=lambda name: lambda *arguments: launch(name, *arguments))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[arg-type]
    return fake


def test_a_launch_goes_to_the_callers_stream_with_addresses_as_its_argument(cupy: FakeCupy) -> None:
    codec = make_codec(2, 1, "cuda:1")
    a, b, out = (DeviceMemory((1 << 32) + (i << 20), 100_000, device=1) for i in range(3))
    for stream in (7, 0):
        codec.encode([a, b], [out], stream=stream)
    ((device, options),) = cupy.compiled  # once
    assert device == 1
    assert {"-DSOURCES=2", "-DTARGETS=1", "-DCOEFFICIENTS=1,1", "-std=c++17"} <= set(options)
    assert [launch[1] for launch in cupy.launched] == [7, 0]
    device, _, name, grid, block, (batch,) = cupy.launched[0]
    assert (device, name, grid, block) == (1, "code_16", (7, 1), (256,))
    assert batch.size == 1  # CuPy passes arrays of one element by value
    assert batch.nbytes <= ARGUMENT_BYTES
    assert batch["shards"][0].tolist() == [a.address, b.address, out.address]
    assert batch["length"] == 100_000


def test_sums_are_cleared_on_the_same_stream_before_they_are_made(cupy: FakeCupy) -> None:
    codec = make_codec(2, 1, "cuda:1")
    assert isinstance(codec, CudaCodec)
    codec.encode_at(np.array([[4096, 8192, 12288], [16384, 20480, 24576]], dtype=np.uint64), 100, stream=7, sums=512)
    clear, launch = cupy.launched
    assert clear == (1, "clear", 512, 0, 2 * 3 * 8, 7)
    assert launch[1] == 7
    assert launch[5][0]["shards"][:2, 3].tolist() == [512, 512 + 3 * 8]
    assert "-DSUMS=1" in cupy.compiled[0][1]


def test_plans_are_compiled_ahead_and_once_for_a_matrix(cupy: FakeCupy) -> None:
    codec = make_codec(8, 1, "cuda")
    assert isinstance(codec, CudaCodec)
    codec.prepare(codec.plan(set(range(9)) - {lost}, [lost]) for lost in range(8))
    assert len(cupy.compiled) == 1  # whichever shard is lost, it is the XOR of the others: encoding's own kernel


def test_memory_that_does_not_say_its_device_is_asked_of_the_driver(cupy: FakeCupy) -> None:
    codec = make_codec(1, 1, "cuda:1")
    ours, others = (SimpleNamespace(__cuda_array_interface__={"shape": (9,), "typestr": "<f4", "data": (place, False)})
                    for place in ((1 << 32) + 4096, 4096))  # fmt: skip
    codec.encode([ours], [DeviceMemory(1 << 33, 36, device=1)])
    with pytest.raises(CodecError, match="not in the memory of cuda:1"):
        codec.encode([others], [DeviceMemory(1 << 33, 36, device=1)])


def test_missing_devices_and_libraries_are_clear_errors(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CodecError, match="no cuda:2"):
        make_codec(1, 1, "cuda:2")
    for name in ("cuda:", "cuda:x", "cuda1"):
        with pytest.raises(CodecError, match="no codec"):
            make_codec(1, 1, name)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(CodecError, match=r"ghostserve\[cuda\]"):
        make_codec(1, 1, "cuda")


def test_equal_matrices_share_a_program() -> None:
    ones = np.ones((1, 3), dtype=np.uint8)
    assert Program.of(ones) == Program.of(ones.copy())
    assert Program.of(ones).batch_type.itemsize <= ARGUMENT_BYTES
