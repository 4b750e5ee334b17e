"""What a rank claims when it dials again: exactly the pages that are whole."""

import pytest

from services.worker.agent.inventory import Inventory
from shared.errors import CommunicatorAborted
from shared.types import OPEN_KEY, pack_ids

A, B, C = (bytes([number]) * 16 for number in range(1, 4))


def claimed(inventory: Inventory) -> tuple[int, int, bytes, bytes] | None:
    claim = inventory.claim()
    return None if claim is None else (claim.epoch, claim.rank, claim.pages, claim.keys)


def test_a_page_that_was_written_again_is_not_claimed() -> None:
    inventory = Inventory()
    inventory.begin(1, 2)
    inventory.note(1, [(5, A), (6, B)])
    inventory.strike(1, [5])
    assert claimed(inventory) == (1, 2, pack_ids([6]), B)


def test_pages_outlive_an_epoch_but_not_the_rank() -> None:
    inventory = Inventory()
    inventory.begin(1, 2)
    inventory.note(1, [(5, A)])
    inventory.begin(2, 2)
    assert claimed(inventory) == (2, 2, pack_ids([5]), A)
    inventory.begin(3, 0)
    assert claimed(inventory) == (3, 0, b"", b"")


def test_after_the_claim_nothing_is_written_until_the_next_epoch() -> None:
    inventory = Inventory()
    inventory.begin(1, 2)
    inventory.note(1, [(5, A)])
    assert inventory.claim() is not None
    with pytest.raises(CommunicatorAborted):
        inventory.strike(1, [5])
    inventory.note(1, [(6, C)])
    assert claimed(inventory) == (1, 2, pack_ids([5]), A)
    inventory.begin(2, 2)
    with pytest.raises(CommunicatorAborted):
        inventory.strike(1, [5])
    inventory.strike(2, [5])
    assert claimed(inventory) == (2, 2, b"", b"")


def test_a_worker_that_was_given_up_claims_nothing() -> None:
    inventory = Inventory()
    assert inventory.claim() is None
    inventory.begin(1, 2)
    inventory.note(1, [(5, A)])
    inventory.forget()
    assert inventory.claim() is None


def test_pages_that_were_copied_count_when_the_rank_is_taken() -> None:
    inventory = Inventory()
    inventory.prepare(1)
    inventory.copied([5, 6, 7], [A, B, C])
    inventory.copied([6], [OPEN_KEY])
    assert inventory.claim() is None
    inventory.begin(4, 1)
    assert claimed(inventory) == (4, 1, pack_ids([5, 7]), A + C)
    inventory.forget()
    inventory.prepare(1)
    inventory.copied([5], [A])
    inventory.begin(5, 2)
    assert claimed(inventory) == (5, 2, b"", b"")
