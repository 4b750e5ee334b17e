"""`ghostserve drill` as a person runs it, on the default model, its parity over ucx; other tests drill over tcp."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from shared.transport import ucx_engine

KEYS = {
    "identical", "kv_identical", "streams", "prompt_tokens", "max_tokens", "protection", "stall_s", "baseline_gap_s",
    "phases", "restored_pages", "recomputed_tokens", "kv_bytes_restored", "parity_bytes_stored",
}  # fmt: skip
PHASES = {"detect_s", "regroup_s", "weights_s", "restore_s", "recompute_s", "resume_s"}


@pytest.mark.skipif(not ucx_engine.is_installed(), reason="UCXX IS NOT INSTALLED: no drill over ucx")
@pytest.mark.timeout(280)
async def test_the_drill_loses_a_rank_of_the_default_model_and_no_token(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", "drill", "--prompt-tokens", "256", "--max-tokens", "40", "--streams", "2",
        "--cached", "--transport", "ucx", "--json", str(out),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    printed, _ = await asyncio.wait_for(process.communicate(), 270)
    assert process.returncode == 0, printed.decode()
    report = json.loads(out.read_text())
    assert report.keys() >= KEYS
    assert report["phases"].keys() == PHASES
    assert report["identical"]
    assert report["kv_identical"]
    assert 2 * (255 // 16) <= report["restored_pages"] <= 2 * ((256 + 40) // 16)
    assert report["recomputed_tokens"] <= 2 * (16 + 40)
    assert "loss to suspicion" in printed.decode()
