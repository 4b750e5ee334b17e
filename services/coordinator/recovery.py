"""What to restore from parity and what to recompute after a loss. Pure: sequences, stripes and rates come in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.coordinator.pages import PagePool
from services.coordinator.scheduler import Sequence
from shared.messages import ParityShard, StripeRestore
from shared.types import PageKey


@dataclass(frozen=True, slots=True)
class Stripe:
    """What the index says of a stripe's parity, as far as its store is alive in the incarnation that has the bytes."""

    parity: tuple[ParityShard, ...]
    data_checksums: tuple[int, ...]


@dataclass(slots=True)
class Rates:
    """Speeds that the choice between restoring and recomputing rests on, updated as they are measured."""

    prefill_tokens_s: float = 400.0
    restore_bytes_s: float = 200e6
    restore_start_s: float = 0.02
    """A restore's fixed cost: index look-up, plan, first exchange."""

    def saw_prefill(self, tokens: int, seconds: float) -> None:
        """Take a step of at least 64 tokens into account."""
        if tokens >= 64 and seconds > 0:
            self.prefill_tokens_s += 0.3 * (tokens / seconds - self.prefill_tokens_s)

    def saw_restore(self, restored_bytes: int, seconds: float) -> None:
        """Take a finished restore of at least 1 MB into account."""
        if restored_bytes >= 1_000_000 and seconds > 0:
            self.restore_bytes_s += 0.3 * (restored_bytes / seconds - self.restore_bytes_s)

    def restoring_pays(self, pages: int, page_bytes: int, page_tokens: int) -> bool:
        """Whether `pages` pages of a sequence come back sooner from parity than by prefill."""
        restore_s = self.restore_start_s + pages * page_bytes / self.restore_bytes_s
        return restore_s < pages * page_tokens / self.prefill_tokens_s


def wanted_keys(pool: PagePool, sequences: Iterable[Sequence]) -> list[PageKey]:
    """Keys of the sealed pages of sequences that have a slice missing, each once, in order of need."""
    wanted: dict[PageKey, None] = {}
    for sequence in sequences:
        for page, key in zip(sequence.pages, sequence.keys, strict=False):
            if pool.pages[page].missing:
                wanted[key] = None
    return list(wanted)


def plan_restore(
    pool: PagePool,
    sequences: Iterable[Sequence],
    stripes: Mapping[PageKey, Stripe],
    rates: Rates | None,
    *,
    page_bytes: int,
    page_tokens: int,
    copies: bool = False,
) -> tuple[StripeRestore, ...]:
    """The pages to decode: for each sequence, the run from its start that is recoverable, if that pays (by `rates`).

    A page after one that can't be restored is left out: recomputing the gap goes through it anyway. `copies`: the
    stripes' stored shards are raw copies of each rank's page, not parity.
    """
    plan: dict[PageKey, StripeRestore] = {}
    for sequence in sequences:
        run = []
        for number, key in zip(sequence.pages, sequence.keys, strict=False):
            page, stripe = pool.pages[number], stripes.get(key)
            if not page.missing or key in plan:
                continue
            lost = tuple(sorted(page.missing))
            shards = _enough(stripe, lost, copies=copies) if stripe is not None else None
            if stripe is None or shards is None:
                break
            run.append(StripeRestore(number, key, lost, shards, stripe.data_checksums))
        if run and (rates is None or rates.restoring_pays(len(run), page_bytes, page_tokens)):
            plan.update((stripe.key, stripe) for stripe in run)
    return tuple(plan.values())


def _enough(stripe: Stripe, lost: tuple[int, ...], *, copies: bool) -> tuple[ParityShard, ...] | None:
    """The stored shards from which the lost slices come back: any as many, or each one's own copy. None: too few."""
    if copies:
        size = len(stripe.data_checksums)
        wanted = {size + rank for rank in lost}
        shards = tuple(shard for shard in stripe.parity if shard.shard in wanted)
    else:
        shards = stripe.parity[: len(lost)]
    return shards if len(shards) == len(lost) else None


def valid_tokens(pool: PagePool, sequence: Sequence, page_tokens: int) -> int:
    """Tokens from a sequence's start whose KV is there on every rank."""
    for index in range(len(sequence.keys)):
        if pool.pages[sequence.pages[index]].missing:
            return index * page_tokens
    tail = sequence.pages[len(sequence.keys) :]
    if tail and pool.pages[tail[0]].missing:
        return len(sequence.keys) * page_tokens
    return sequence.computed
