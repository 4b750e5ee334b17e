"""What NVRTC and ptxas make of erasure.cu, read from their log and from nvdisasm: needs neither a GPU nor a driver."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from kernels.launch import BLOCK, SOURCE, Program

_ENTRY = re.compile(
    r"entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_REGISTERS = 65_536  # of a multiprocessor, on all of sm_80, sm_90 and sm_100; as are 2,048 threads
_THREADS = 2_048


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture."""

    program: Program
    width: int
    registers: int
    spilled: int  # bytes of stack frame, spill stores and spill loads
    instructions: tuple[str, ...]  # with modifiers, without padding

    def count(self, *prefixes: str) -> Counter[str]:
        return Counter(name for name in self.instructions if name.startswith(prefixes))

    @property
    def body(self) -> tuple[str, ...]:
        """What a thread executes to code its vectors: all up to where single bytes of head and tail begin."""
        names = self.instructions
        end = next((i for i, name in enumerate(names) if name.startswith("LDG") and ".U8" in name), len(names))
        while end and names[end - 1].split(".")[0] not in ("EXIT", "BRA"):
            end -= 1
        return names[:end]

    @property
    def body_bytes(self) -> int:
        """Bytes that those instructions load and store."""
        return self.program.vectors * self.width * (self.program.sources + self.program.targets)

    @property
    def moved(self) -> int:
        """Bytes that the 128-bit accesses among those instructions move."""
        return 16 * sum(name.startswith(("LDG", "STG")) and ".128" in name for name in self.body)

    @property
    def threads(self) -> int:
        """Threads resident on a multiprocessor, by registers."""
        per_block = -(-self.registers // 8) * 8 * BLOCK
        return min(_THREADS // BLOCK, _REGISTERS // per_block) * BLOCK

    @property
    def bytes_in_flight(self) -> int:
        """Bytes that the resident threads of a multiprocessor have asked memory for at once."""
        return self.threads * self.program.vectors * self.program.sources * self.width


@cache
def disassembler() -> Path | None:
    """Return where nvdisasm is, if it is installed."""
    try:
        files = distribution("nvidia-cuda-nvdisasm").files or ()
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "nvdisasm"), None)


@cache
def compile_program(program: Program, architecture: int) -> dict[int, Kernel]:
    """Return the kernels, by width, that NVRTC makes for sm_<architecture>."""
    from cupy_backends.cuda.libs import nvrtc

    options = (*program.options(), f"-arch=sm_{architecture}", "--ptxas-options=-v")
    handle = nvrtc.createProgram(SOURCE.read_text(), SOURCE.name, (), ())
    try:
        nvrtc.compileProgram(handle, options)
    except nvrtc.NVRTCError as error:
        raise AssertionError(nvrtc.getProgramLog(handle)) from error
    log, cubin = nvrtc.getProgramLog(handle), nvrtc.getCUBIN(handle) + b"\0"  # CuPy takes it for a string and cuts it
    nvrtc.destroyProgram(handle)
    listing = dict(_disassemble(cubin))
    kernels = {}
    for entry in _ENTRY.finditer(log):
        width = int(entry["name"].removeprefix("code_"))
        spilled = sum(int(entry[kind]) for kind in ("stack", "stores", "loads"))
        kernels[width] = Kernel(program, width, int(entry["registers"]), spilled, listing[entry["name"]])
    return kernels


def _disassemble(cubin: bytes) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name and the instructions of each kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(disassembler()), "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    parts = re.split(r"^\s*\.text\.(code_\d+):", text, flags=re.MULTILINE)
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        names = _INSTRUCTION.findall(part.split("\n.section", 1)[0])
        yield name, tuple(name for name in names if name != "NOP")
