"""What is restored and what is recomputed."""

from services.coordinator.protection.costs import Rates, Stripe, plan_restore, restorable, valid_tokens, wanted_keys
from services.coordinator.protection.ledger import PagePool
from services.coordinator.scheduling.scheduler import Sequence
from shared.messages import ParityShard
from shared.types import GenerationRequest, SamplingParams, next_page_key, pack_ids, root_key

TOKENS = 4


def made(pool: PagePool, pages: int, computed: int, start: int = 0) -> Sequence:
    """A sequence with `pages` sealed pages and `computed` tokens of KV."""
    tokens = list(range(start, start + computed + 1))
    request = GenerationRequest("r", pack_ids(tokens), 1, SamplingParams())
    table = pool.allocate(-(-computed // TOKENS))
    assert table is not None
    parent, keys = root_key("m", ""), []
    for page in range(pages):
        parent = next_page_key(parent, tokens[page * TOKENS : (page + 1) * TOKENS])
        keys.append(parent)
        table[page] = pool.seal(table[page], parent)
    return Sequence(start, request, root_key("m", ""), tokens, len(tokens), computed, table, keys, goal=len(tokens))


def stripe(shards: int = 1) -> Stripe:
    return Stripe(tuple(ParityShard(3 + n, "tcp://x:1", 0) for n in range(shards)), (1, 2, 3))


def plan(
    pool: PagePool, sequences: list[Sequence], stripes: dict[bytes, Stripe], rates: Rates | None = None
) -> list[int]:
    """The pages restored, in order; without `rates`, always."""
    always, rates = rates is None, rates or Rates()
    returns = plan_restore(pool, sequences, stripes, rates, page_bytes=100, page_tokens=TOKENS, always=always)
    return [stripe.page for each in returns for stripe in each.stripes]


def test_sealed_pages_are_restored_and_the_tail_is_not_valid() -> None:
    pool = PagePool(8, protect=True)
    sequence = made(pool, 3, 14)
    pool.lose({1})
    keys = wanted_keys(pool, [sequence])
    assert keys == sequence.keys
    assert plan(pool, [sequence], dict.fromkeys(keys, stripe())) == sequence.pages[:3]
    for page, key in zip(sequence.pages, keys, strict=False):
        pool.restored(page, key)
    assert valid_tokens(pool, sequence, TOKENS) == 12


def test_a_gap_ends_what_is_restored() -> None:
    pool = PagePool(8, protect=True)
    sequence = made(pool, 3, 12)
    pool.lose({1})
    stripes = {sequence.keys[0]: stripe(), sequence.keys[2]: stripe()}
    assert plan(pool, [sequence], stripes) == sequence.pages[:1]
    pool.restored(sequence.pages[0], sequence.keys[0])
    assert valid_tokens(pool, sequence, TOKENS) == 4


def test_as_many_parity_shards_as_lost_ranks_are_needed() -> None:
    pool = PagePool(8, protect=True)
    sequence = made(pool, 1, 4)
    pool.lose({0, 2})
    assert plan(pool, [sequence], {sequence.keys[0]: stripe(1)}) == []
    found = restorable(pool.pages[sequence.pages[0]], {sequence.keys[0]: stripe(2)})
    assert found is not None
    assert found.lost == (0, 2)
    assert len(found.parity) == 2


def test_a_shared_page_is_restored_once() -> None:
    pool = PagePool(8, protect=True)
    first, second = made(pool, 2, 8), made(pool, 2, 8)
    assert first.pages == second.pages
    pool.lose({0})
    assert plan(pool, [first, second], dict.fromkeys(first.keys, stripe())) == first.pages


def test_who_lacks_least_comes_first() -> None:
    pool = PagePool(8, protect=True)
    long, short = made(pool, 4, 16), made(pool, 1, 6, start=50)
    pool.lose({0})
    stripes = dict.fromkeys([*long.keys, *short.keys], stripe())
    assert plan(pool, [long, short], stripes) == [*short.pages[:1], *long.pages]


def test_each_sequence_comes_back_the_faster_way() -> None:
    pool = PagePool(32, protect=True)
    long, short = made(pool, 20, 80), made(pool, 1, 6, start=500)
    pool.lose({0})
    stripes = dict.fromkeys([*long.keys, *short.keys], stripe())
    rates = Rates(prefill_tokens_s=400, restore_bytes_s=1e6, restore_start_s=0.05)
    ways = plan_restore(pool, [long, short], stripes, rates, page_bytes=100, page_tokens=TOKENS)
    assert [(way.sequence, len(way.stripes)) for way in ways] == [(short, 0), (long, 20)]
    assert ways[0].restore_s > ways[0].recompute_s
    assert ways[1].restore_s < ways[1].recompute_s


def test_a_page_that_another_sequence_gave_up_is_not_valid() -> None:
    pool = PagePool(8, protect=True)
    first, second = made(pool, 2, 8), made(pool, 2, 8)
    pool.lose({0})
    pool.restored(first.pages[0], first.keys[0])
    pool.forget(first.pages)
    assert valid_tokens(pool, second, TOKENS) == 4


def test_what_nothing_was_lost_of_stays_valid() -> None:
    pool = PagePool(8, protect=True)
    sequence = made(pool, 2, 11)
    assert valid_tokens(pool, sequence, TOKENS) == 11
    assert wanted_keys(pool, [sequence]) == []


def test_recomputing_is_chosen_where_it_is_faster() -> None:
    pool = PagePool(8, protect=True)
    sequence = made(pool, 3, 12)
    pool.lose({1})
    stripes = dict.fromkeys(sequence.keys, stripe())
    assert plan(pool, [sequence], stripes, Rates(prefill_tokens_s=1e6)) == []
    assert plan(pool, [sequence], stripes, Rates(prefill_tokens_s=10)) == sequence.pages


def test_rates_follow_what_is_measured_and_ignore_the_tiny() -> None:
    rates = Rates()
    before = rates.prefill_tokens_s
    rates.saw_prefill(1, 0.001)
    assert rates.prefill_tokens_s == before
    for _ in range(50):
        rates.saw_prefill(500, 0.5)
        rates.saw_restore(10_000_000, 0.01)
    assert abs(rates.prefill_tokens_s - 1000) < 1
    assert abs(rates.restore_bytes_s - 1e9) < 1e6


def test_of_raw_copies_each_lost_rank_needs_its_own() -> None:
    pool = PagePool(8, protect=True, acks=3)
    sequence = made(pool, 1, 4)
    pool.lose({0, 2})
    copies = Stripe(tuple(ParityShard(3 + rank, "tcp://x:1", rank) for rank in range(3)), (1, 2, 3))
    keys = sequence.keys
    page = pool.pages[sequence.pages[0]]
    found = restorable(page, {keys[0]: copies}, copies=True)
    assert found is not None
    assert [shard.shard for shard in found.parity] == [3, 5]
    assert restorable(page, {keys[0]: Stripe(copies.parity[:2], (1, 2, 3))}, copies=True) is None
