"""What the CUDA kernel can reach on H100 and H200, computed from its disassembly and the data sheets: not measured."""

from dataclasses import dataclass

from kernels.generator import decode_matrix, parity_matrix
from kernels.gf256 import Matrix
from kernels.launch import Program
from tests.bench.kernels_sass import Kernel, compile_program

# Units that take 64 lanes a cycle on a multiprocessor of sm_90; IMAD and memory go elsewhere, what is uniform is once a
# warp. All instructions together are issued at 128 lanes a cycle. Source: CUDA C++ Programming Guide, throughput table.
_INTEGER = ("LOP3", "IADD3", "SHF", "PRMT", "ISETP", "SEL", "LEA", "IABS", "IMNMX", "PLOP3", "MOV")
_INTEGER_LANES = 64
_ISSUE_LANES = 128
_REDUX_LANES = 16


@dataclass(frozen=True)
class Device:
    """A GPU of sm_90, by its data sheet; the clock is what it holds under load, below its boost of 1.98 GHz."""

    name: str
    bandwidth: float  # bytes per second
    multiprocessors: int = 132
    clock: float = 1.7e9


H100 = Device("H100 SXM", 3.35e12)
H200 = Device("H200", 4.8e12)


@dataclass(frozen=True)
class Roofline:
    """One operation on one device: bytes of the k sources per second, and which limit that is."""

    device: Device
    kernel: Kernel

    @property
    def limits(self) -> dict[str, float]:
        """Seconds for each byte that is moved, by what would limit it."""
        kernel, lanes = self.kernel, self.device.multiprocessors * self.device.clock
        # with sums, what follows the bytes of the tail is executed too: all is counted, so this is an upper bound
        names = [name.split(".")[0] for name in (kernel.instructions if kernel.program.sums else kernel.body)]
        integer = sum(name in _INTEGER for name in names)
        return {
            "memory": kernel.moved / kernel.body_bytes / self.device.bandwidth,
            "integer units": integer / kernel.body_bytes / (_INTEGER_LANES * lanes),
            "warp sums": kernel.count("REDUX").total() / kernel.body_bytes / (_REDUX_LANES * lanes),
            "issue": len(names) / kernel.body_bytes / (_ISSUE_LANES * lanes),
        }

    @property
    def limit(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def source_bytes_per_second(self) -> float:
        program = self.kernel.program
        return program.sources / (program.sources + program.targets) / self.limits[self.limit]

    @property
    def best(self) -> float:
        """The same if each source byte is loaded once, each target byte stored once, at the full bandwidth."""
        program = self.kernel.program
        return program.sources / (program.sources + program.targets) * self.device.bandwidth


def programs() -> dict[tuple[str, int, int], Matrix]:
    """Return matrices by (operation, k, m)."""
    cases: dict[tuple[str, int, int], Matrix] = {}
    for k, m in ((2, 1), (4, 2), (8, 1), (8, 2), (8, 4), (16, 2), (32, 4)):
        cases["encode", k, m] = parity_matrix(k, m)
    for lost, m in ((1, 1), (1, 2), (2, 2), (4, 4)):
        cases[f"reconstruct {lost}", 8, m] = decode_matrix(8, m, range(lost, 8 + lost), range(lost))
    return cases


def rooflines() -> list[tuple[str, int, int, Roofline]]:
    """Return (operation, k, m, roofline) for each program on each device."""
    found = []
    for (operation, k, m), matrix in programs().items():
        for sums in (False, True) if k == 8 else (False,):
            kernel = compile_program(Program.of(matrix, sums), 90)[16]
            name = f"{operation}, sums" if sums else operation
            found += [(name, k, m, Roofline(device, kernel)) for device in (H100, H200)]
    return found
