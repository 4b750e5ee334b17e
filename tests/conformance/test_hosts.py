"""A host and the ledger keep their contract through random interleavings of all that happens to pages.

What each rank has in its memory and what the stores have is kept beside them: a page counts as there, or as protected,
only where that is true. The same for each host.
"""

from collections import Counter
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.coordinator.protection.costs import StoredStripe, restorable
from services.coordinator.protection.ledger import Parity
from services.coordinator.protection.rates import Rates
from shared.messages import ParityShard, StripeRestore
from shared.types import PageKey, next_page_key, root_key
from tests.pure.dictionary_host import DictionaryHost, EmbeddedPages
from tests.pure.driven_host import PAGE_TOKENS, Driven, Table
from tests.pure.ways import choose

RANKS, SHARDS, PAGES = 3, 2, 7
OPEN, OPEN_TOKENS = b"being written", 2
MOST_PAGES = 3
"""That a run fills."""
pick = st.integers(0, 1 << 16)
salts = st.lists(st.integers(0, 1), max_size=3)
mostly = st.sampled_from([True, True, True, False])
ranks = st.sets(st.integers(0, RANKS - 1), max_size=SHARDS)


@dataclass(frozen=True, slots=True)
class Encode:
    """A page that the ranks read for its parity; shard n goes to the n-th of `stores`."""

    page: int
    key: PageKey
    stores: tuple[str, ...]


def chain(numbers: list[int], parent: PageKey = b"") -> list[PageKey]:
    """The keys of the first pages of a request."""
    keys = []
    for number in numbers:
        parent = next_page_key(parent or root_key("m", ""), [number])
        keys.append(parent)
    return keys


class HostContract(RuleBasedStateMachine):
    """One group. An epoch serves once all runs have returned; between two epochs nothing is computed or sent."""

    host_type: type[Driven]

    @initialize(stores=st.integers(1, 2))
    def begin(self, stores: int) -> None:
        self.memory: list[dict[int, bytes]] = [{} for _ in range(RANKS)]
        self.away: dict[int, dict[int, bytes]] = {}
        self.stores: dict[str, set[tuple[PageKey, int]]] = {}
        self.serial = 0
        for _ in range(stores):
            self.a_store_comes()
        self.forming = False
        self.coordinator_starts()

    def coordinator_starts(self) -> None:
        self.host = self.host_type(PAGES)
        self.ledger = self.host.ledger
        self.encodes: list[Encode] = []
        self.decodes: list[StripeRestore] = []
        self.copies: dict[int, bytes] = {}

    # -- what there is -----------------------------------------------------------------------------------------------

    def stepping(self) -> bool:
        return not self.forming

    def serving(self) -> bool:
        return not self.forming and not any(table.held for table in self.host.tables)

    def tables(self, *, held: bool) -> list[Table]:
        return [table for table in self.host.tables if table.held is held]

    def stored(self, key: PageKey) -> set[int]:
        """The shards that the stores have of a stripe."""
        return {shard for store in self.stores.values() for of, shard in store if of == key}

    def stripes(self) -> dict[PageKey, StoredStripe]:
        """As the index has them."""
        keys = {key for store in self.stores.values() for key, _ in store}
        return {
            key: StoredStripe(tuple(ParityShard(RANKS + n, "", 0) for n in sorted(self.stored(key))), (0,) * RANKS)
            for key in keys
        }

    def write(self, page: int, content: bytes, ranks: frozenset[int] = frozenset(range(RANKS))) -> None:
        for rank in ranks:
            self.memory[rank][page] = content

    # -- runs --------------------------------------------------------------------------------------------------------

    @rule(pages=st.integers(1, 3), prefix=salts, filled=salts)
    @precondition(lambda self: self.stepping() and len(self.host.tables) < PAGES // 2)
    def a_run_begins(self, pages: int, prefix: list[int], filled: list[int]) -> None:
        """Maybe on pages of another that are found, and maybe where those of others that were idle are needed."""
        room = self.host.free + len(self.host.idle())
        table = self.host.begin(pages, chain(prefix))
        assert table is not None or pages > room - len(prefix)
        if table is not None:
            self.taken(table)
            for salt in filled[:pages]:
                self.fill(table, salt)

    @rule(which=pick, salt=st.integers(0, 1))
    @precondition(lambda self: self.stepping() and self.tables(held=False))
    def a_page_is_full(self, which: int, salt: int) -> None:
        tables = self.tables(held=False)
        table = tables[which % len(tables)]
        if len(table.keys) == len(table.pages):
            table.pages.extend(self.host.allocate(1) or ())
            self.taken(table)
        if len(table.keys) < min(len(table.pages), MOST_PAGES):
            self.fill(table, salt)

    def taken(self, table: Table) -> None:
        """Some tokens are written to each open page."""
        for page in table.pages[len(table.keys) :]:
            assert not self.host.pins[page], "a page that is read or written was given away"
            self.write(page, OPEN)
            table.computed = len(table.keys) * PAGE_TOKENS + OPEN_TOKENS

    def fill(self, table: Table, salt: int) -> None:
        page = table.pages[len(table.keys)]
        (key,) = chain([salt], table.keys[-1] if table.keys else b"")
        assert not self.host.pins[page], "a page that is read or written is written to"
        self.write(page, key)
        self.host.fill(table, key)
        if len(table.pages) > len(table.keys):
            table.computed += OPEN_TOKENS

    @rule(which=pick)
    @precondition(lambda self: len(self.host.tables) > 1)
    def a_run_ends(self, which: int) -> None:
        table = self.host.tables[which % len(self.host.tables)]
        self.host.end(table)
        if table.held and self.serving():
            self.resumes()

    # -- parity ------------------------------------------------------------------------------------------------------

    @rule(limit=st.integers(1, 3))
    @precondition(lambda self: self.serving() and self.stores and self.ledger.count(Parity.QUEUED))
    def encoding_begins(self, limit: int) -> None:
        stores = sorted(self.stores)
        places = tuple(stores[number % len(stores)] for number in range(SHARDS))
        for page in self.ledger.start_protection(limit, PAGES):
            key = self.ledger.key(page)
            assert key is not None
            self.encodes.append(Encode(page, key, places))

    @rule(which=pick, good=mostly, put=st.sets(st.integers(0, SHARDS - 1)))
    @precondition(lambda self: self.encodes)
    def encoding_ends(self, which: int, good: bool, put: set[int]) -> None:
        """Where it is not `good`, some shards may be stored all the same; a store that acknowledged may be gone."""
        encode = self.encodes.pop(which % len(self.encodes))
        assert all(memory[encode.page] == encode.key for memory in self.memory), "a page was written while it was read"
        for shard, store in enumerate(encode.stores):
            if store in self.stores and (good or shard in put):
                self.stores[store].add((encode.key, shard))
        self.ledger.end_protection([encode.key], 0, protected=good, reason="full")

    @rule()
    @precondition(lambda self: self.serving() and self.stores and self.ledger.count(Parity.QUEUED))
    def all_is_encoded(self) -> None:
        """Undisturbed: what is queued is protected, but for what a lost store leaves in doubt."""
        self.encoding_begins(PAGES)
        while self.encodes:
            self.encoding_ends(0, True, set())

    @rule()
    @precondition(lambda self: self.serving() and self.ledger.count(Parity.UNPROTECTED))
    def what_failed_is_tried_again(self) -> None:
        self.ledger.protect_again(Parity.UNPROTECTED)

    @rule()
    @precondition(lambda self: self.ledger.count(Parity.UNPROTECTED) and self.ledger.count(Parity.PROTECTED))
    def the_stores_are_full(self) -> None:
        given = self.ledger.make_room(self.ledger.unprotected())
        for key in given:
            page = self.ledger.find(key)
            assert page is not None
            assert page in self.host.idle()
        self.release(given)

    @rule()
    @precondition(lambda self: self.ledger.count(Parity.UNPROTECTED))
    def the_index_is_read(self) -> None:
        complete = [key for key in self.ledger.unprotected() if len(self.stored(key)) == SHARDS]
        self.ledger.found_protected(complete)

    @rule()
    @precondition(lambda self: len(self.stores) < SHARDS)
    def a_store_comes(self) -> None:
        self.serial += 1
        self.stores[f"s{self.serial}"] = set()

    @rule(which=pick)
    @precondition(lambda self: self.stores and (self.ledger.count(Parity.PROTECTED) > 1 or self.encodes))
    def a_store_is_lost(self, which: int) -> None:
        del self.stores[sorted(self.stores)[which % len(self.stores)]]
        self.ledger.protection_lost()

    @rule(which=pick)
    @precondition(lambda self: self.encodes or self.ledger.count(Parity.PROTECTED) > 1)
    def a_store_gives_a_shard_up(self, which: int) -> None:
        held = sorted((store, *shard) for store, shards in self.stores.items() for shard in shards)
        if held:
            store, key, shard = held[which % len(held)]
            self.stores[store].remove((key, shard))
            self.ledger.shards_lost([key])

    @rule()
    @precondition(lambda self: any(self.stores.values()))
    def the_stores_forget_what_is_released(self) -> None:
        self.release(self.ledger.take_released())

    def release(self, keys: tuple[PageKey, ...]) -> None:
        assert not {encode.key for encode in self.encodes} & set(keys), "a stripe is released that is being made"
        for store in self.stores.values():
            store.difference_update({shard for shard in store if shard[0] in keys})

    # -- ranks -------------------------------------------------------------------------------------------------------

    @rule(lost=ranks, back=ranks, at_once=mostly)
    @precondition(lambda self: self.stepping() and self.ledger.count(Parity.PROTECTED))
    def the_epoch_ends(self, lost: set[int], back: set[int], at_once: bool) -> None:
        """And where the ranks are there, the next one begins."""
        self.interrupted()
        if at_once:
            self.an_epoch_begins(lost, back)

    def interrupted(self) -> None:
        self.forming = True
        self.encodes.clear()
        while self.decodes:
            self.host.unpin(self.decodes.pop().page)

    @rule(lost=ranks, back=ranks)
    @precondition(lambda self: self.forming)
    def an_epoch_begins(self, lost: set[int], back: set[int]) -> None:
        """Some ranks are new; the workers of those `back` held them before, maybe long ago, and have sealed pages."""
        self.ledger.lose(lost)
        for rank in lost:
            here, self.memory[rank] = self.memory[rank], {}
            if rank in back:
                worker = self.away.pop(rank, here)
                self.memory[rank] = {page: key for page, key in worker.items() if key != OPEN}
                self.ledger.reclaim(rank, self.memory[rank])
            else:
                self.away[rank] = here
        self.copies.clear()
        self.ledger.forget_copies()
        self.runs_are_placed()

    def runs_are_placed(self) -> None:
        self.forming = False
        for table in self.host.tables:
            table.held = True
        if not self.host.tables:
            self.resumes()

    @rule(limit=st.integers(1, 4))
    @precondition(lambda self: self.serving() and self.ledger.uncopied())
    def pages_of_a_rank_that_moves_are_copied(self, limit: int) -> None:
        for page in self.ledger.uncopied()[:limit]:
            self.copies[page] = self.memory[0][page]
            self.ledger.copied(page)

    @rule()
    @precondition(lambda self: self.serving() and len(self.copies) > 1)
    def a_rank_has_moved(self) -> None:
        """Rank 0 is at another worker, which has what was copied, and the open pages."""
        self.interrupted()
        tail = {page for table in self.host.tables for page in table.pages[len(table.keys) :]}
        self.memory[0] = self.copies | {page: self.memory[0][page] for page in tail}
        self.ledger.lose({0})
        self.ledger.moved(0, tail)
        self.ledger.forget_copies()
        self.copies = {}
        self.runs_are_placed()

    @rule(away=ranks)
    @precondition(lambda self: self.ledger.count(Parity.PROTECTED) > 1)
    def the_coordinator_is_replaced(self, away: set[int]) -> None:
        """The next one has what the ranks tell of their sealed pages; the stores forget all else."""
        for rank, memory in enumerate(self.memory):
            self.memory[rank] = {} if rank in away else {page: key for page, key in memory.items() if key != OPEN}
        self.coordinator_starts()
        self.forming = False
        self.ledger.adopt({rank: memory for rank, memory in enumerate(self.memory) if rank not in away}, RANKS)
        self.release(tuple(self.stripes().keys() - self.ledger.keys))

    # -- what was lost comes back ------------------------------------------------------------------------------------

    @rule()
    @precondition(lambda self: self.stepping() and not self.decodes and self.tables(held=True))
    def what_runs_lack_is_asked_for(self) -> None:
        for choice in self.choices():
            for stripe in choice:
                self.decode(stripe)

    def choices(self) -> list[tuple[StripeRestore, ...]]:
        held, stripes = self.tables(held=True), self.stripes()
        chosen = choose(self.ledger, held, stripes, Rates(), page_bytes=1, page_tokens=PAGE_TOKENS, always=True)
        return [choice.stripes for choice in chosen]

    @rule(limit=st.integers(1, 3))
    @precondition(lambda self: self.serving() and not self.decodes and self.ledger.lost)
    def idle_pages_are_asked_for(self, limit: int) -> None:
        """Or given up, if too little of them is stored."""
        for page in self.ledger.lost_idle(limit):
            key = self.ledger.key(page)
            assert key is not None
            stripe = restorable(page, key, self.ledger.missing(page), self.stripes())
            if stripe is None:
                self.ledger.forget([page])
            else:
                self.decode(stripe)

    def decode(self, stripe: StripeRestore) -> None:
        assert len(stripe.lost) <= len(self.stored(stripe.key))
        self.host.pin(stripe.page)
        self.decodes.append(stripe)

    @rule(which=pick, good=mostly)
    @precondition(lambda self: self.decodes)
    def decoding_ends(self, which: int, good: bool) -> None:
        stripe = self.decodes.pop(which % len(self.decodes))
        if good:
            missing = self.ledger.missing(stripe.page)
            self.ledger.restored(stripe.page, b"what was there before")
            assert self.ledger.missing(stripe.page) == missing
            rest = [memory.get(stripe.page) for rank, memory in enumerate(self.memory) if rank not in stripe.lost]
            assert set(rest) <= {stripe.key}, "a page was written while it was read"
            self.write(stripe.page, stripe.key, frozenset(stripe.lost))
            self.ledger.restored(stripe.page, stripe.key)
        elif self.serving():
            self.ledger.forget([stripe.page])
        self.host.unpin(stripe.page)

    @rule(tokens=st.integers(0, PAGE_TOKENS))
    @precondition(lambda self: self.stepping() and self.tables(held=True))
    def runs_return(self, tokens: int) -> None:
        """Those of which nothing is under way. Of the first page that is not there, some tokens may be."""
        coming = {stripe.page for stripe in self.decodes}
        for table in self.tables(held=True):
            if coming.isdisjoint(table.pages):
                valid = self.ledger.valid_tokens(table, PAGE_TOKENS)
                valid += self.tokens_back(table, valid, tokens)
                self.ledger.forget(table.pages[-(-valid // PAGE_TOKENS) :])
                self.host.returned(table.number, valid)
        if self.serving():
            self.resumes()

    def tokens_back(self, table: Table, valid: int, tokens: int) -> int:
        """Up to `tokens` after those that are valid, if nobody else stands on their page and some rank has it."""
        if valid == table.computed:
            return 0
        index = valid // PAGE_TOKENS
        page, key = table.pages[index], (*table.keys, None)[min(index, len(table.keys))]
        alone = sum(page in other.pages for other in self.host.tables) == 1
        if not alone or not 0 < len(self.ledger.missing(page)) < RANKS or self.ledger.key(page) != key:
            return 0
        there = min(PAGE_TOKENS, table.computed - index * PAGE_TOKENS)
        back = min(there, tokens)
        if back:
            self.write(page, OPEN if key is None or back < there else key)
            self.ledger.tokens_restored(page, whole=back == there)
        return back

    def resumes(self) -> None:
        self.ledger.protect_again(Parity.PENDING)
        self.ledger.protect_again(Parity.UNPROTECTED)

    @rule()
    @precondition(lambda self: self.stepping() and not self.decodes and self.tables(held=True))
    def all_that_is_stored_comes_back(self) -> None:
        """Undisturbed: each run has its pages up to the first that can't be restored, and goes on with them."""
        stripes, expected = self.stripes(), {}
        for table in self.tables(held=True):
            good = 0
            for page, key in zip(table.pages, table.keys, strict=False):
                missing = self.ledger.missing(page)
                if self.ledger.key(page) != key or (missing and not restorable(page, key, missing, stripes)):
                    break
                good += 1
            expected[table] = good * PAGE_TOKENS
        self.what_runs_lack_is_asked_for()
        while self.decodes:
            self.decoding_ends(0, True)
        for table, tokens in expected.items():
            assert self.ledger.valid_tokens(table, PAGE_TOKENS) >= tokens
        self.runs_return(0)
        assert self.serving()
        assert all(table.computed >= tokens for table, tokens in expected.items())

    # -- what holds --------------------------------------------------------------------------------------------------

    @invariant()
    def each_page_is_in_one_place_and_pinned_while_it_is_read_or_written(self) -> None:
        self.host.check()
        pending = [page.number for page in self.ledger if page.parity is Parity.PENDING]
        assert +self.host.pins == Counter(pending) + Counter(stripe.page for stripe in self.decodes)
        assert not self.serving() or {encode.page for encode in self.encodes} == {*pending}

    @invariant()
    def what_counts_as_protected_is_stored(self) -> None:
        for page in self.ledger.sealed_pages:
            if page.parity is Parity.PROTECTED and page.key is not None:
                assert len(self.stored(page.key)) == SHARDS, f"{page} is protected by too little"

    @invariant()
    def what_counts_as_there_is_there(self) -> None:
        for page in self.ledger.sealed_pages:
            assert not page.missing or page.parity not in (Parity.QUEUED, Parity.PENDING), f"{page} can't be encoded"
            for rank in set(range(RANKS)) - page.missing:
                assert self.memory[rank].get(page.number) == page.key, f"rank {rank} has not {page}"

    @invariant()
    def who_goes_on_stands_on_whole_pages_that_are_what_it_takes_them_for(self) -> None:
        for table in self.tables(held=False):
            for page, key in zip(table.pages, [*table.keys, *[None] * PAGES], strict=False):
                assert self.ledger.is_whole(page), f"{table} stands on page {page}, which is not whole"
                assert self.host.key(page) == self.ledger.key(page) == key, f"{table}: page {page} has another key"
                assert {memory.get(page) for memory in self.memory} == {key or OPEN}, f"{table}: page {page} was lost"


class OfDictionaries(HostContract):
    """The host that is nothing but dictionaries."""

    host_type = DictionaryHost


class OfTheEmbeddedEngine(HostContract):
    """The embedded engine's allocator and prefix cache."""

    host_type = EmbeddedPages


TestDictionaryHost = OfDictionaries.TestCase
TestEmbeddedEngine = OfTheEmbeddedEngine.TestCase
TestDictionaryHost.settings = TestEmbeddedEngine.settings = settings(
    max_examples=300, stateful_step_count=50, report_multiple_bugs=False
)
