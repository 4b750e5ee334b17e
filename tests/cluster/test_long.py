"""A long sequence is protected, loses a rank in decode, and goes on; others decode meanwhile."""

from pathlib import Path

import pytest

from tests.bench.long import PAGE_TOKENS, TOKENS, measure

LENGTH = 50_000


@pytest.mark.timeout(400)
async def test_a_long_sequence_that_loses_a_rank_goes_on_with_the_same_tokens_and_kv(tmp_path: Path) -> None:
    row = await measure(tmp_path, LENGTH, window=1024)
    assert row.identical
    assert row.restored_pages >= LENGTH // PAGE_TOKENS
    assert row.recomputed_tokens <= 3 * (PAGE_TOKENS + TOKENS)  # its tail, and that of the stream beside it
