"""What shards a store holds: pure bookkeeping over the arena, without sockets, clocks or Redis.

A shard's life, as calls of ShardTable, with the state that they leave it in:

    begin (arriving) -> finish (held) -> settle (held)      its bytes arrived, and the index names it
                     -> abandon (freed)                     its bytes did not arrive
                        finish -> revert (freed)            the index refused it: all is as it was before
    another's finish (replaced) -> that one's settle (freed), or its revert (held again)
    take_out (taken) -> the index forgets it -> free (freed)

Names are (group, page key, shard number). Bytes stay as long as the index may speak of them, or somebody reads them.
Calls to the index are made in the order of finish and take_out, and their outcomes reported in that order.
"""

import heapq
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from services.parity_store.arena import Arena, Block
from shared.errors import Fenced, ShardMissing
from shared.transport.base import ShardLabel
from shared.types import PageKey

State = Literal["arriving", "held", "replaced", "taken", "freed"]


@dataclass(eq=False, slots=True)
class Shard:
    """One shard in the arena. Made and changed by ShardTable only."""

    group: str
    epoch: int
    label: ShardLabel
    block: Block
    stored_at: float  # the caller's clock, seconds
    serial: int = 0  # of the plan that it was put for; see ReleaseStripes
    state: State = "arriving"
    pins: int = 0  # readers of its bytes
    replaced: "Shard | None" = None  # of the same name, until this one is settled
    replaced_by: "Shard | None" = None


class ShardTable:
    """All shards of a store, the epochs of its groups, and who reads what."""

    def __init__(self, arena: Arena):
        self._arena = arena
        self._held: dict[str, dict[PageKey, dict[int, Shard]]] = {}
        self._others: set[Shard] = set()  # in the arena but not in _held: arriving, replaced or leaving
        self._epochs: dict[str, int] = {}
        self.count = 0  # shards held

    # epochs

    def advance_epoch(self, group: str, epoch: int) -> None:
        """From now on refuse writes of older epochs of this group. An older epoch than known changes nothing."""
        self._epochs[group] = max(epoch, self._epochs.get(group, 0))

    @property
    def epochs(self) -> dict[str, int]:
        return dict(self._epochs)

    # writing

    def begin(self, group: str, epoch: int, label: ShardLabel, now: float, serial: int = 0) -> Shard:
        """Make room for a shard whose bytes will arrive. Raises Fenced or StoreFull."""
        self._check_epoch(group, epoch)
        shard = Shard(group, epoch, label, self._arena.allocate(label.length), now, serial)
        self._others.add(shard)
        return shard

    def finish(self, shard: Shard) -> None:
        """The bytes are there and right: the shard can be read. Raises Fenced if the epoch grew meanwhile."""
        self._expect(shard, "arriving")
        self._check_epoch(shard.group, shard.epoch)
        self.advance_epoch(shard.group, shard.epoch)
        self._others.discard(shard)
        row = self._held.setdefault(shard.group, {}).setdefault(shard.label.page_key, {})
        shard.replaced = row.get(shard.label.number)
        row[shard.label.number] = shard
        shard.state = "held"
        if shard.replaced is None:
            self.count += 1
        else:
            shard.replaced.state = "replaced"
            shard.replaced.replaced_by = shard
            self._others.add(shard.replaced)

    def settle(self, shard: Shard) -> None:
        """The index names this shard: what it replaced can go."""
        replaced, shard.replaced = shard.replaced, None
        if replaced is not None:
            replaced.replaced_by = None
            self.settle(replaced)
            self._free(replaced)

    def revert(self, shard: Shard) -> None:
        """The index refused a finished shard: put back what it replaced, and free it."""
        older, newer = shard.replaced, shard.replaced_by
        if shard.state == "taken":
            self.settle(shard)  # the index is about to forget the older one too
            return
        shard.replaced = shard.replaced_by = None
        if older is not None:
            older.replaced_by = newer
        if newer is not None:
            newer.replaced = older
        elif older is None:
            self._remove(shard)
            self._others.add(shard)
        else:
            self._held[shard.group][shard.label.page_key][shard.label.number] = older
            older.state = "held"
            self._others.discard(older)
            self._others.add(shard)
        self._free(shard)

    def abandon(self, shard: Shard) -> None:
        """The bytes did not arrive, or are wrong: give the room back. A finished shard is left alone."""
        if shard.state == "arriving":
            self._free(shard)

    # reading

    def pin(self, group: str, page_key: PageKey, number: int) -> Shard:
        """Return a shard whose bytes stay as they are until unpin. Raises ShardMissing."""
        shard = self._held.get(group, {}).get(page_key, {}).get(number)
        if shard is None:
            raise ShardMissing(f"no shard {number} of stripe {page_key.hex()} in this store")
        shard.pins += 1
        return shard

    def unpin(self, shard: Shard) -> None:
        """The reader is done."""
        shard.pins -= 1
        if shard.pins == 0 and shard.state == "freed":
            self._give_back(shard)

    def view(self, shard: Shard) -> memoryview:
        """Return a shard's bytes."""
        return self._arena.view(shard.block)

    # releasing

    def take_out(self, group: str, page_keys: Collection[PageKey], up_to: tuple[int, int] | None = None) -> list[Shard]:
        """Remove all shards of these stripes, and return them: free each once the index forgot it.

        They can't be read any more; who reads one already may go on. up_to: (epoch, serial); newer shards stay.
        """
        stripes = self._held.get(group, {})
        found = [
            shard
            for page_key in page_keys
            for shard in list(stripes.get(page_key, {}).values())
            if up_to is None or (shard.epoch, shard.serial) <= up_to
        ]
        for shard in found:
            self._remove(shard)
            shard.state = "taken"
            self._others.add(shard)
        return found

    def free(self, shard: Shard) -> None:
        """The index forgot a shard that was taken out: give its room back, at once or when its last reader is done."""
        self._expect(shard, "taken")
        self.settle(shard)
        self._free(shard)

    # looking

    def stripe(self, page_key: PageKey) -> list[Shard]:
        """Return the held shards with this page key, of all groups."""
        return [s for stripes in self._held.values() for s in stripes.get(page_key, {}).values()]

    def stripes(self, after: PageKey, limit: int) -> list[PageKey]:
        """Return up to limit page keys greater than `after`, in order. Looks at every stripe."""
        keys = (key for stripes in self._held.values() for key in stripes if key > after)
        return heapq.nsmallest(limit, set(keys))

    @property
    def groups(self) -> list[str]:
        """The groups that have shards here."""
        return list(self._held)

    def keys(self, group: str) -> list[PageKey]:
        """Return the page keys of a group's stripes."""
        return list(self._held.get(group, ()))

    @property
    def stripe_count(self) -> int:
        return sum(len(stripes) for stripes in self._held.values())

    def check(self) -> None:
        """Assert that shards and arena agree: every block has one shard, and every shard is where its state says."""
        held = [s for stripes in self._held.values() for row in stripes.values() for s in row.values()]
        assert all(s.state == "held" for s in held), "a held shard in another state"
        assert all(row for stripes in self._held.values() for row in stripes.values()), "an empty stripe"
        assert self.count == len(held), f"{self.count} shards counted, {len(held)} held"
        assert all(s.state != "held" for s in self._others), "misfiled shard"
        assert all(s.pins for s in self._others if s.state == "freed"), "a freed shard that nobody reads"
        assert self._arena.used_bytes == sum(s.block.size for s in (*held, *self._others)), "blocks lost or doubled"
        self._arena.check()

    def _check_epoch(self, group: str, epoch: int) -> None:
        known = self._epochs.get(group, 0)
        if epoch < known:
            raise Fenced(f"epoch {epoch} of group {group} is over; the group is at {known}")

    def _remove(self, shard: Shard) -> None:
        stripes = self._held[shard.group]
        row = stripes[shard.label.page_key]
        del row[shard.label.number]
        self.count -= 1
        if not row:
            del stripes[shard.label.page_key]
            if not stripes:
                del self._held[shard.group]

    def _free(self, shard: Shard) -> None:
        shard.state = "freed"
        if shard.pins == 0:
            self._give_back(shard)

    def _give_back(self, shard: Shard) -> None:
        self._others.discard(shard)
        self._arena.free(shard.block)

    @staticmethod
    def _expect(shard: Shard, state: State) -> None:
        if shard.state != state:
            raise ValueError(f"shard {shard.label.number} of {shard.label.page_key.hex()} is {shard.state}")
