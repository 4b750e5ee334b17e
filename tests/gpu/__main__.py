"""python -m tests.gpu: all that only a GPU can prove, in under ten minutes, and a table of it.

The exit code is 0 if all was proved, 1 if something failed, and 2 where there is no GPU to prove it on.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as Xml
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PARTS_S = {("test_kernels_gpu.py", "test_worker_gpu.py"): 140, ("test_services_gpu.py",): 200}
"""Files of tests -> what they may take together."""
BENCH_S, SANITIZER_S = 110, 120
NO_GPU = 2


def device() -> tuple[str, str]:
    """The GPU's name, or why there is none."""
    import torch

    if not torch.version.cuda:
        return "", f"torch {torch.__version__} is built without CUDA: install a CUDA build of it"
    if not torch.cuda.is_available():
        return "", "there is no CUDA device here, or its driver does not answer (nvidia-smi says which)"
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return "", f"CuPy can't be imported ({error}): pip install 'ghostserve[cuda]'"
    return torch.cuda.get_device_name(0), ""


def tests(files: tuple[str, ...], limit_s: float) -> list[tuple[str, str, str]]:
    """Each test's promise, outcome and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = [str(HERE / name) for name in files]
        _run([sys.executable, "-m", "pytest", *paths, "-q", f"--junitxml={report}"], limit_s)
        if not report.exists():
            return [(", ".join(files), f"FAILED: no report within {limit_s:.0f} s", "")]
        cases = list(Xml.parse(report).iter("testcase"))
    rows = []
    for case in cases:
        bad = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        said = "" if bad is None else f"{'skipped' if bad.tag == 'skipped' else 'FAILED'}: {bad.get('message')}"
        outcome = said or "proved"
        rows.append((case.get("name", "").removeprefix("test_").replace("_", " "), outcome[:120], case.get("time", "")))
    return rows


def sanitizer() -> tuple[str, str, str]:
    """The kernel's tests under compute-sanitizer, where there is one."""
    tool, name = shutil.which("compute-sanitizer"), "kernels under compute-sanitizer"
    if tool is None:
        return name, "not run: compute-sanitizer is not installed", ""
    chosen = f"{HERE / 'test_kernels_gpu.py'}::test_checksums_are_made_on_the_way"
    began = time.monotonic()
    code = _run([tool, "--error-exitcode=9", sys.executable, "-m", "pytest", "-q", chosen], SANITIZER_S)
    return name, "proved" if code == 0 else f"FAILED: exit code {code}", f"{time.monotonic() - began:.1f}"


def bench() -> list[tuple[str, str, str]]:
    """The kernels against a copy of as many bytes, in a process that can be ended."""
    code = "from tests.bench.kernels import on_gpu, show; show(on_gpu())"
    failed = _run([sys.executable, "-c", code], BENCH_S)
    return [("kernels' bench, printed above", f"FAILED: exit code {failed}" if failed else "done", "")]


def _run(command: list[str], limit_s: float) -> int:
    try:
        return subprocess.run(command, timeout=limit_s, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


def main() -> int:
    """Prove what can be proved, and print it."""
    console = Console(width=160)
    name, missing = device()
    if missing:
        console.print(f"NOTHING PROVED: {missing}.")
        console.print("What is proved without a GPU is in docs/gpu.md; `make test` proves it.")
        return NO_GPU
    proved = [row for files, limit_s in PARTS_S.items() for row in tests(files, limit_s)]
    rows = [*proved, sanitizer(), *bench()]
    table = Table("promise", "outcome", "s", title=f"On {name}")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return int(any(outcome.startswith("FAILED") for _, outcome, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
