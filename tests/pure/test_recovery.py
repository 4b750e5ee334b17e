"""What is restored and what is recomputed."""

from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.protection.costs import Choice, Redundancy, StoredStripe, Ways, restorable
from services.coordinator.protection.rates import Rates
from shared.messages import ParityShard
from shared.types import PageKey, next_page_key, root_key
from tests.pure.dictionary_host import DictionaryHost
from tests.pure.driven_host import PAGE_TOKENS, Table
from tests.pure.ways import choose


def made(host: DictionaryHost, pages: int, computed: int, start: int = 0) -> Table:
    """A run with `pages` sealed pages and `computed` tokens of KV."""
    tokens = list(range(start, start + computed + 1))
    table = host.begin(-(-computed // PAGE_TOKENS))
    assert table is not None
    parent = root_key("m", "")
    for page in range(pages):
        parent = next_page_key(parent, tokens[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS])
        host.fill(table, parent)
    table.computed = computed
    return table


def stripe(shards: int = 1) -> StoredStripe:
    return StoredStripe(tuple(ParityShard(3 + n, "tcp://x:1", 0) for n in range(shards)), (1, 2, 3))


def wanted_keys(host: DictionaryHost, run: Table) -> list[PageKey]:
    return Ways(host.ledger, [run], Rates(), page_bytes=100, page_tokens=PAGE_TOKENS).keys()


def plan(
    host: DictionaryHost, runs: list[Table], stripes: dict[PageKey, StoredStripe], rates: Rates | None = None
) -> list[int]:
    """The pages restored, in order; without `rates`, always."""
    always, rates = rates is None, rates or Rates()
    choices = choose(host.ledger, runs, stripes, rates, page_bytes=100, page_tokens=PAGE_TOKENS, always=always)
    return [stripe.page for each in choices for stripe in each.stripes]


def test_sealed_pages_are_restored_and_the_tail_is_not_valid() -> None:
    host = DictionaryHost(8)
    run = made(host, 3, 14)
    host.ledger.lose({1})
    keys = wanted_keys(host, run)
    assert keys == run.keys
    assert plan(host, [run], dict.fromkeys(keys, stripe())) == run.pages[:3]
    for page, key in zip(run.pages, keys, strict=False):
        host.ledger.restored(page, key)
    assert host.ledger.valid_tokens(run, PAGE_TOKENS) == 12


def test_a_gap_ends_what_is_restored() -> None:
    host = DictionaryHost(8)
    run = made(host, 3, 12)
    host.ledger.lose({1})
    stripes = {run.keys[0]: stripe(), run.keys[2]: stripe()}
    assert plan(host, [run], stripes) == run.pages[:1]
    host.ledger.restored(run.pages[0], run.keys[0])
    assert host.ledger.valid_tokens(run, PAGE_TOKENS) == 4


def test_as_many_parity_shards_as_lost_ranks_are_needed() -> None:
    host = DictionaryHost(8)
    run = made(host, 1, 4)
    host.ledger.lose({0, 2})
    page, key = run.pages[0], run.keys[0]
    assert plan(host, [run], {key: stripe(1)}) == []
    found = restorable(page, key, host.ledger.missing(page), {key: stripe(2)})
    assert found is not None
    assert found.lost == (0, 2)
    assert len(found.parity) == 2


def test_a_shared_page_is_restored_once() -> None:
    host = DictionaryHost(8)
    first, second = made(host, 2, 8), made(host, 2, 8)
    assert first.pages == second.pages
    host.ledger.lose({0})
    assert plan(host, [first, second], dict.fromkeys(first.keys, stripe())) == first.pages


def test_who_lacks_least_comes_first() -> None:
    host = DictionaryHost(8)
    long, short = made(host, 4, 16), made(host, 1, 6, start=50)
    host.ledger.lose({0})
    stripes = dict.fromkeys([*long.keys, *short.keys], stripe())
    assert plan(host, [long, short], stripes) == [*short.pages[:1], *long.pages]


def test_each_run_comes_back_the_faster_way() -> None:
    host = DictionaryHost(32)
    long, short = made(host, 20, 80), made(host, 1, 6, start=500)
    host.ledger.lose({0})
    stripes = dict.fromkeys([*long.keys, *short.keys], stripe())
    rates = Rates(prefill_tokens_s=400, restore_bytes_s=1e6, restore_start_s=0.05)
    choices = choose(host.ledger, [long, short], stripes, rates, page_bytes=100, page_tokens=PAGE_TOKENS)
    assert [(each.run, len(each.stripes), each.way) for each in choices] == [
        (short, 0, "recompute"),
        (long, 20, "restore"),
    ]
    assert choices[0].restore_s > choices[0].recompute_s
    assert choices[1].restore_s < choices[1].recompute_s


def test_a_page_that_another_run_gave_up_is_not_valid() -> None:
    host = DictionaryHost(8)
    first, second = made(host, 2, 8), made(host, 2, 8)
    host.ledger.lose({0})
    host.ledger.restored(first.pages[0], first.keys[0])
    host.ledger.forget(first.pages)
    assert host.ledger.valid_tokens(second, PAGE_TOKENS) == 4


def test_what_nothing_was_lost_of_stays_valid() -> None:
    host = DictionaryHost(8)
    run = made(host, 2, 11)
    assert host.ledger.valid_tokens(run, PAGE_TOKENS) == 11
    assert wanted_keys(host, run) == []


def test_recomputing_is_chosen_where_it_is_faster() -> None:
    host = DictionaryHost(8)
    run = made(host, 3, 12)
    host.ledger.lose({1})
    stripes = dict.fromkeys(run.keys, stripe())
    assert plan(host, [run], stripes, Rates(prefill_tokens_s=1e6)) == []
    assert plan(host, [run], stripes, Rates(prefill_tokens_s=10)) == run.pages


def test_a_recovery_tries_one_restore_where_the_guess_is_old_and_little_is_at_stake() -> None:
    host = DictionaryHost(64)
    first, second = made(host, 20, 80), made(host, 20, 80, start=500)
    host.ledger.lose({0})
    stripes = dict.fromkeys([*first.keys, *second.keys], stripe())
    rates = Rates(prefill_tokens_s=400, restore_start_s=0.0)
    rates.saw_restore(1_000_000, 125.0, now=0.0)  # 0.25 s a run by now, and 0.2 s to recompute it

    def restored(now: float) -> int:
        chosen = choose(host.ledger, [first, second], stripes, rates, page_bytes=100, page_tokens=PAGE_TOKENS, now=now)
        return sum(each.way == "restore" for each in chosen)

    assert restored(1.0) == 0
    assert restored(10_000.0) == 1
    rates.saw_restore(1_000_000, 300.0, now=10_000.0)  # it is not better: nor is it tried, with so much at stake
    rates.saw_restore(1_000_000, 300.0, now=10_000.0)
    assert restored(20_000.0) == 0


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    shared=st.integers(0, 6),
    at_a_time=st.integers(1, 9),
    unknown=st.sets(st.integers(0, 40), max_size=4),
    always=st.booleans(),
)
def test_looked_up_part_by_part_the_same_comes_back(
    sizes: list[int], shared: int, at_a_time: int, unknown: set[int], always: bool
) -> None:
    """Where a part of a run's pages does not pay by itself, it waits for the others."""
    host = DictionaryHost(64)
    runs: list[Table] = []
    for number, size in enumerate(sizes):
        run = host.begin(size, runs[0].keys[: min(shared, size)] if runs else [])
        assert run is not None
        for at in range(len(run.keys), size):
            host.fill(run, next_page_key(run.keys[-1] if run.keys else root_key("m", ""), [number, at]))
        run.computed = size * PAGE_TOKENS
        runs.append(run)
    host.ledger.lose({1})
    keys = list(dict.fromkeys(key for run in runs for key in run.keys))
    stripes = {key: stripe() for at, key in enumerate(keys) if at not in unknown}
    rates = Rates(prefill_tokens_s=400, restore_start_s=0.03)  # a few pages don't pay

    def chosen(at_a_time: int) -> list[Choice]:
        return choose(
            host.ledger, runs, stripes, rates, at_a_time=at_a_time, always=always, page_bytes=100,
            page_tokens=PAGE_TOKENS,
        )  # fmt: skip

    def told(choices: list[Choice]) -> list[tuple[object, ...]]:
        return [(each.run, each.pages, each.way, each.restore_s, each.recompute_s) for each in choices if each.last]

    whole, parts = chosen(len(keys) + 1), chosen(at_a_time)
    assert [page for each in parts for page in each.stripes] == [page for each in whole for page in each.stripes]
    assert told(parts) == told(whole)
    assert all(each.stripes for each in parts if not each.last)


def test_the_first_pages_of_a_long_run_do_not_wait_until_all_are_looked_up() -> None:
    host = DictionaryHost(64)
    run = made(host, 20, 80)
    host.ledger.lose({1})
    ways = Ways(host.ledger, [run], Rates(), page_bytes=100, page_tokens=PAGE_TOKENS)
    (choice,) = ways.found(run.keys[:15], dict.fromkeys(run.keys[:15], stripe()), runs={run.number})
    assert ([each.page for each in choice.stripes], choice.way, choice.last) == (run.pages[:15], "restore", False)
    (choice,) = ways.found(run.keys[15:], dict.fromkeys(run.keys[15:19], stripe()), runs={run.number})
    assert ([each.page for each in choice.stripes], choice.pages, choice.last) == (run.pages[15:19], 19, True)


def test_of_a_run_that_ends_meanwhile_nothing_more_comes_back() -> None:
    host = DictionaryHost(64)
    short, long = made(host, 4, 16), made(host, 8, 32, start=500)
    host.ledger.lose({1})
    ways = Ways(host.ledger, [short, long], Rates(), page_bytes=100, page_tokens=PAGE_TOKENS, always=True)
    keys, stripes = ways.keys(), dict.fromkeys([*short.keys, *long.keys], stripe())
    first = list(ways.found(keys[:2], {key: stripes[key] for key in keys[:2]}, runs={short.number, long.number}))
    rest = list(ways.found(keys[2:], {key: stripes[key] for key in keys[2:]}, runs={long.number}))
    assert [(each.run, len(each.stripes), each.last) for each in (*first, *rest)] == [
        (short, 2, False),
        (long, 8, True),
    ]


def test_of_raw_copies_each_lost_rank_needs_its_own() -> None:
    host = DictionaryHost(8, acks=3)
    run = made(host, 1, 4)
    host.ledger.lose({0, 2})
    page, key = run.pages[0], run.keys[0]
    lost = host.ledger.missing(page)
    copies = StoredStripe(tuple(ParityShard(3 + rank, "tcp://x:1", rank) for rank in range(3)), (1, 2, 3))
    found = restorable(page, key, lost, {key: copies}, redundancy=Redundancy("copies", 3))
    assert found is not None
    assert [shard.shard for shard in found.parity] == [3, 5]
    assert (
        restorable(
            page, key, lost, {key: StoredStripe(copies.parity[:2], (1, 2, 3))}, redundancy=Redundancy("copies", 3)
        )
        is None
    )
