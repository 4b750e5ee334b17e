"""The pool: a page is one range of bytes, and a digest follows a sequence wherever its pages are."""

import numpy as np
import pytest
import torch

from services.worker.engine.kv_pool import KVPool
from services.worker.memory import to_host


def pool(dtype: torch.dtype = torch.float32) -> KVPool:
    made = KVPool(pages=7, layers=3, page_tokens=4, kv_heads=2, head_dim=8, dtype=dtype)
    made.kv.copy_(torch.randn(made.kv.shape, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_is_its_bytes_without_a_copy(dtype: torch.dtype) -> None:
    kv = pool(dtype)
    assert kv.page_bytes == 3 * 2 * 4 * 2 * 8 * dtype.itemsize
    assert kv.kv.data_ptr() % 64 == 0
    first, second = map(to_host, kv.rows(np.array([5, 2]), kv.empty))
    assert first.tobytes() == kv.kv[5].contiguous().view(torch.uint8).numpy().tobytes()
    second[:] = first
    assert torch.equal(kv.kv[2], kv.kv[5])
    for number in (7, -1):
        with pytest.raises(IndexError):
            kv.rows(np.array([0, number]), kv.empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_put_together_and_back(dtype: torch.dtype) -> None:
    kv = pool(dtype)
    tokens = kv.tokens
    assert tokens.page_bytes * 4 == kv.page_bytes
    rows = tokens.rows(np.array([5 * 4 + 2, 2]), tokens.empty)
    for row, (page, offset) in zip(rows, [(5, 2), (0, 2)], strict=True):
        expected = kv.kv[page, :, :, offset].contiguous().view(torch.uint8).numpy()
        assert np.asarray(row).tobytes() == expected.tobytes()
    before = kv.kv.clone()
    tokens.wrote(np.array([3 * 4 + 1]), rows.take(np.array([0])))
    assert torch.equal(kv.kv[3, :, :, 1], before[5, :, :, 2])
    before[3, :, :, 1] = before[5, :, :, 2]
    assert torch.equal(kv.kv, before)


def test_the_views_of_the_pool_agree() -> None:
    kv = pool()
    assert torch.equal(kv.blocks[(5 * 3 + 1) * 2 + 1].view(4, 2, 8), kv.kv[5, 1, 1])
    assert torch.equal(kv.slots[((5 * 3 + 1) * 2 + 1) * 4 + 3], kv.kv[5, 1, 1, 3])


def test_a_digest_is_of_the_sequence_not_of_its_pages() -> None:
    kv = pool()
    before = kv.digest(np.array([0, 1, 2], dtype=np.int32), 10)
    kv.kv[[6, 3, 5]] = kv.kv[[0, 1, 2]]
    moved = np.array([6, 3, 5], dtype=np.int32)
    assert kv.digest(moved, 10) == before
    kv.kv[5, :, :, 2:] = 0  # after the tenth token
    assert kv.digest(moved, 10) == before
    assert kv.digest(moved, 9) != before
    kv.kv[3, 2, 1, 3, 1, 7] += 1
    assert kv.digest(moved, 10) != before
