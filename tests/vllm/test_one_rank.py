"""One rank: its parity is a copy of its KV, which outlives its process."""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from tests.vllm.protected import protected
from tests.vllm.server import prompt, stream
from tests.vllm.streams import Breaks

pytestmark = pytest.mark.timeout(300)

BLOCKS = 300 // 32


async def test_a_stream_goes_on_with_the_same_tokens_when_the_only_rank_is_killed(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with protected(tiny_llama, tmp_path, size=1) as one:
        await one.whole()
        ids = prompt(1, 300)
        expected = await stream(one.server, ids, 40)
        held = await one.until(lambda status: status["stripes_protected"] >= BLOCKS, "not protected")
        known = held["now"]
        kill = Breaks(8, lambda: one.server.kill(0))
        seen = await stream(one.server, ids, 40, kill)
        assert seen.tokens == expected.tokens
        (record,) = await one.records(known)
        assert record["lost_ranks"] == [0]
        assert record["restored_pages"] >= BLOCKS
