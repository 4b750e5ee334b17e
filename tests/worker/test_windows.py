"""A RestorePlan's columns: what a rank finds in them is what the coordinator put there."""

import random

import pytest

from services.worker.shadow.windows import lost_pages, windows
from shared import wire
from shared.messages import ParityShard, RestorePlan, StripeRestore

K = 4


def stripes(count: int, seed: int) -> list[StripeRestore]:
    """Of several kinds, in any order: of each kind another number of ranks lost, and of shards; some have none."""
    dice = random.Random(seed)

    def shards() -> tuple[ParityShard, ...]:
        return tuple(
            ParityShard(K + number, f"tcp://s{dice.randrange(2)}:1", dice.getrandbits(64))
            for number in range(dice.randrange(4))
        )

    return [
        StripeRestore(
            dice.randrange(1 << 30),
            dice.randbytes(dice.choice([16, 32])),
            tuple(sorted(dice.sample(range(K), dice.choice([1, 2])))),
            shards(),
            tuple(dice.getrandbits(64) for _ in range(K)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_each_stripe_is_in_one_window_with_what_was_said_of_it(count: int, length: int) -> None:
    planned = stripes(count, seed=count + length)
    plan = wire.decode(wire.encode(RestorePlan.of(3, 4, planned)))
    assert isinstance(plan, RestorePlan)
    seen: list[int] = []
    for window in windows(plan, length):
        part = planned[window.start : window.start + length]
        assert (window.pages.tolist(), list(window.keys)) == ([each.page for each in part], [each.key for each in part])
        to = window.receivers(K)
        for group in window.groups:
            for row, place in enumerate(group.at.tolist()):
                stripe = part[place]
                seen.append(window.start + place)
                assert (group.pages[row], group.keys[row]) == (stripe.page, stripe.key)
                assert group.kind.lost == stripe.lost == tuple(to[place].nonzero()[0].tolist())
                assert group.kind.shards == tuple(shard.shard for shard in stripe.parity)
                assert group.kind.addresses == tuple(shard.bulk_address for shard in stripe.parity)
                assert group.shard_sums[row].tolist() == [shard.checksum for shard in stripe.parity]
                if stripe.parity:
                    assert group.slice_sums[row].tolist() == [stripe.data_checksums[rank] for rank in stripe.lost]
    assert sorted(seen) == [*range(count)]
    for rank in range(K):
        lost = [(place, each.page, each.key) for place, each in enumerate(planned) if rank in each.lost]
        assert lost_pages(plan, rank) == lost


def test_a_plan_says_once_what_its_stripes_have_alike() -> None:
    many = [
        StripeRestore(page, page.to_bytes(16, "big"), (1,), (ParityShard(K, "tcp://store:1", page),), (page,) * K)
        for page in range(2000)
    ]
    assert len(wire.encode(RestorePlan.of(1, 1, many))) < 2000 * (4 + 2 + 2 * 8 + 18) + 200
