"""What the compiler makes of the CUDA kernel, for each generation of data centre GPUs: no GPU is needed to look."""

import numpy as np
import pytest

from kernels.codec import make_codec
from kernels.errors import CodecError
from kernels.generator import decode_matrix, parity_matrix
from kernels.launch import Program

nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NO CUPY: THE CUDA KERNEL IS NOT COMPILED")
from tests.bench.kernels_sass import compile_program, disassembler  # noqa: E402

pytestmark = pytest.mark.skipif(not disassembler(), reason="NO nvdisasm: THE CUDA KERNEL IS NOT LOOKED AT")

PROGRAMS = {
    "encode 1+1": parity_matrix(1, 1),
    "encode 2+1": parity_matrix(2, 1),
    "encode 3+2": parity_matrix(3, 2),
    "encode 4+2": parity_matrix(4, 2),
    "encode 8+1": parity_matrix(8, 1),
    "encode 8+2": parity_matrix(8, 2),
    "encode 8+4": parity_matrix(8, 4),
    "encode 32+4": parity_matrix(32, 4),
    "reconstruct 1 of 8+1": decode_matrix(8, 1, [0, 1, 2, 4, 5, 6, 7, 8], [3]),
    "reconstruct 2 of 8+2": decode_matrix(8, 2, [0, 3, 4, 5, 6, 7, 8, 9], [1, 2]),
    "reconstruct 4 of 8+4": decode_matrix(8, 4, [2, 3, 6, 7, 8, 9, 10, 11], [0, 1, 4, 5]),
}


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_compiler_keeps_the_promises_of_the_kernel(name: str, architecture: int) -> None:
    program = Program.of(PROGRAMS[name])
    kernels = compile_program(program, architecture)
    assert sorted(kernels) == [1, 4, 16]
    for kernel in kernels.values():
        assert kernel.spilled == 0
        assert not kernel.count("LDL", "STL", "LDS", "STS", "LD.", "ST.", "BAR", "CALL"), "all but global memory"
    wide = kernels[16]
    loads, stores = wide.count("LDG"), wide.count("STG")
    assert sum(n for name, n in loads.items() if ".128" in name) == program.vectors * program.sources
    assert sum(n for name, n in stores.items() if ".128" in name) == program.vectors * program.targets
    # what else there is are the single bytes of head and tail: no table is read
    assert sum(n for name, n in loads.items() if ".128" not in name) == program.sources
    assert sum(n for name, n in stores.items() if ".128" not in name) == program.targets
    assert wide.moved == wide.body_bytes  # the least possible
    kinds = [name.split(".")[0] for name in wide.body if ".128" in name]
    assert kinds == ["LDG"] * program.vectors * program.sources + ["STG"] * program.vectors * program.targets
    # Memory of 8 TB/s that answers in 1 us wants 54 KiB in flight from each of 148 multiprocessors.
    assert wide.bytes_in_flight >= 64 << 10
    if program.sources <= 8 and program.targets <= 2:
        assert wide.threads >= 1024


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", ["encode 8+1", "encode 8+2", "reconstruct 2 of 8+2", "reconstruct 4 of 8+4"])
def test_checksums_cost_no_memory_traffic_but_their_own(name: str, architecture: int) -> None:
    program = Program.of(PROGRAMS[name], sums=True)
    shards = program.sources + program.targets
    for kernel in compile_program(program, architecture).values():
        assert kernel.spilled == 0
        assert not kernel.count("LDL", "STL", "CALL")
        assert kernel.count("BAR").total() == 1
        assert kernel.count("RED.", "REDG").total() == 1  # by the first threads of a block, one a sum
        assert kernel.count("REDUX").total() == 3 * shards
    wide = compile_program(program, architecture)[16]
    assert wide.moved == wide.body_bytes
    assert wide.bytes_in_flight >= 64 << 10


def test_coefficients_fold_into_instructions() -> None:
    ones, row = np.ones((1, 8), dtype=np.uint8), parity_matrix(8, 2)[1:]
    xor, cauchy = (compile_program(Program.of(matrix), 90)[16].count("LOP3").total() for matrix in (ones, row))
    # 7 sums of 4 words, two in an instruction; the same for the byte path; and some for addresses
    assert xor <= 16 + 4 + 6
    # 7 doublings of 2, and the sums, for each of those words: any choice at run time would cost 4 times as much
    assert cauchy <= 7 * xor


def test_no_gpu_is_a_clear_error() -> None:
    import cupy

    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        devices = 0
    with pytest.raises(CodecError, match=r"CUDA can't be used|there is no cuda"):
        make_codec(2, 1, f"cuda:{devices}")
