"""Who is alive, and who holds which rank. Pure: events and the time come in, what to do is read off.

The group's life is the table below. A loss in any state leads back to `forming`; an epoch lasts from one `formed` to
the next loss, and everything that belongs to an older one has no effect.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Literal

from shared.errors import ProtocolError
from shared.messages import Claim
from shared.types import GroupState, PageKey, WorkerStatus, unpack_ids

GroupEvent = Literal["formed", "rendezvous", "joined", "restored", "lost"]

TRANSITIONS: dict[tuple[GroupState, GroupEvent], GroupState] = {
    ("forming", "formed"): "assigning",
    ("assigning", "rendezvous"): "joining",
    ("joining", "joined"): "restoring",
    ("restoring", "restored"): "serving",
    ("forming", "lost"): "forming",
    ("assigning", "lost"): "forming",
    ("joining", "lost"): "forming",
    ("restoring", "lost"): "forming",
    ("serving", "lost"): "forming",
}


MAX_CORDONS = 256
"""Of workers that do not come back, the oldest are forgotten."""


class InvalidTransition(AssertionError):
    """An event that can't happen in this state: a defect. The message tells the last events."""


@dataclass(frozen=True, slots=True)
class Held:
    """The rank that a worker held when it lost its coordinator, and the sealed pages that it still has: page -> key."""

    epoch: int
    rank: int
    pages: Mapping[int, PageKey]

    @classmethod
    def of(cls, claim: Claim, *, ranks: int, pages: int) -> "Held":
        """What a claim says, in a group of so many ranks with so many pages each. Raises ProtocolError."""
        try:
            numbers, keys = unpack_ids(claim.pages), claim.keys
            held = dict(zip(numbers, keys, strict=True))
        except ValueError as error:
            raise ProtocolError(f"a claim that can't be read: {error}") from error
        if not 0 <= claim.rank < ranks or not all(0 <= number < pages for number in held):
            raise ProtocolError(f"a claim to rank {claim.rank} and its pages: there are no such")
        return cls(claim.epoch, claim.rank, held)


@dataclass(slots=True)
class Member:
    """A worker that has said hello. `rank` is None while it loads or is a spare.

    `held`: what it has of a rank that it held before. Until an epoch begins, after which it is out of date.
    """

    name: str
    host: str
    host_id: str
    pid: int
    device: str
    seen: float
    ready: bool = False
    held: Held | None = None
    rank: int | None = None
    step: int = 0
    joined: bool = False
    pages_address: str = ""
    draining: bool = False
    cordoned: bool = False
    was: int | None = None
    """The rank from which it was cordoned."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that a rank computes in a step, without its waiting for others; and whether it is far behind them."""

    compute_s: float = 0.0
    straggler: bool = False


@dataclass(frozen=True, slots=True)
class Formation:
    """A new epoch's ranks. `fresh` are those whose KV has been lost since the epoch before was formed.

    Of these, the workers of `returned` held the rank before, and have some pages' slices.
    """

    epoch: int
    ranks: tuple[str, ...]
    fresh: frozenset[int]
    returned: Mapping[int, Held]


_UNKNOWN = Pace()


class Membership:
    """The workers of one group, its epoch and its state.

    The first epoch after `epoch`, the last of an earlier coordinator, waits up to `return_grace_s` for the workers of
    that one to return to their ranks.
    """

    def __init__(
        self,
        size: int,
        *,
        heartbeat_timeout_s: float,
        join_timeout_s: float,
        epoch: int = 0,
        return_grace_s: float = 1.0,
    ):
        self.size = size
        self.state: GroupState = "forming"
        self.epoch = epoch
        self.return_grace_s = return_grace_s
        self.members: dict[str, Member] = {}
        self.cordons: dict[str, int | None] = {}
        """Workers that are not to be taken, here or not, and the rank from which each was moved."""
        self.ranks: list[str | None] = [None] * size
        self.history: deque[str] = deque(maxlen=32)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._join_timeout_s = join_timeout_s
        self._void: set[int] = set(range(size))
        """Ranks whose KV is gone since the last epoch was formed."""
        self._apart: set[str] = set()  # hosts that ranks on other hosts could not reach
        self._formed_at = 0.0
        self._first_ready: float | None = None
        self._formed = False

    # -- events ------------------------------------------------------------------------------------------------------

    def hello(self, member: Member) -> None:
        """A worker has come; it is loading."""
        if member.name in self.members:
            raise AssertionError(f"{member.name} is here already")
        self.members[member.name] = member
        self._mark(member)
        self._tell(f"hello {member.name}")

    def cordon(self, name: str, was: int | None = None) -> None:
        """A worker is not to be taken any more. `was`: the rank that moved away from it."""
        self.cordons[name] = was
        while len(self.cordons) > MAX_CORDONS:
            del self.cordons[next(iter(self.cordons))]
        self._mark(self.members[name])

    def uncordon(self, name: str) -> None:
        """A worker may be taken again."""
        self.cordons.pop(name, None)
        if name in self.members:
            self._mark(self.members[name])

    def _mark(self, member: Member) -> None:
        member.cordoned, member.was = member.name in self.cordons, self.cordons.get(member.name)

    def ready(self, name: str, now: float, held: Held | None = None) -> None:
        """A worker has loaded: a spare, that may have held a rank before."""
        self.members[name].ready = True
        self.members[name].held = held
        if self._first_ready is None:
            self._first_ready = now
        self._tell(f"ready {name}" + (f", was rank {held.rank} in epoch {held.epoch}" if held else ""))

    def heard(self, name: str, now: float, step: int | None = None) -> None:
        """A worker gave a sign of life, with the last step it finished if it told."""
        member = self.members[name]
        member.seen = now
        if step is not None:
            member.step = step

    def gone(self, name: str, reason: str) -> int | None:
        """A worker is lost. Returns the rank it held, if any; then the group is forming again."""
        member = self.members.pop(name, None)
        if member is None:
            return None
        self._tell(f"gone {name}: {reason}")
        if member.rank is None:
            return None
        self.ranks[member.rank] = None
        self._void.add(member.rank)
        self._move("lost")
        return member.rank

    def restart(self, reason: str) -> None:
        """The epoch is broken though nobody is known to be lost: form again with the same members."""
        self._tell(f"restart: {reason}")
        self._move("lost")

    def hand_over(self, rank: int, name: str) -> None:
        """A rank moves to a spare: the epoch is over, its worker is a spare from now on."""
        old, new = self.members[str(self.ranks[rank])], self.members[name]
        if new.rank is not None:
            raise AssertionError(f"{name} holds rank {new.rank} already")
        self._tell(f"rank {rank} moves from {old.name} to {name}")
        old.rank, new.rank, self.ranks[rank] = None, rank, name
        self._void.add(rank)
        self._move("lost")

    def cut_off(self, apart: Set[int]) -> list[str]:
        """The workers to give up when the ranks `apart` can't reach rank 0: the smaller part of the two, by name.

        The larger one instead when the hosts that it may reach have too few workers for a group, and those without it
        have enough. Until a rank of their hosts has joined an epoch again, spares there are taken last.
        """
        if not apart:
            return []
        rest = set(range(self.size)) - apart
        kept, lost = (rest, apart) if len(apart) <= len(rest) else (apart, rest)
        hosts_kept = self._hosts(kept)
        self._apart |= self._hosts(lost)
        if self._usable(self._apart) < self.size <= self._usable(hosts_kept):
            lost, self._apart = kept, hosts_kept
        return [name for rank, name in enumerate(self.ranks) if name is not None and rank in lost]

    def can_form(self, now: float) -> bool:
        """Whether an epoch can begin: forming, a worker for every rank, and nobody more to wait for."""
        vacant = self.ranks.count(None)
        return self.state == "forming" and vacant <= len(self.spares()) and not self._awaits_return(now)

    def form(self, epoch: int, now: float) -> Formation:
        """Begin an epoch: workers return to the ranks that they claim, spares take the others that are vacant."""
        if epoch <= self.newest_epoch:
            raise AssertionError(f"epoch {epoch} is not newer than {self.newest_epoch}")
        self.epoch = epoch
        returning = self._returning()
        for rank, member in returning.items():
            self._fill(rank, member)
        spares = iter(self.spares())
        for rank, name in enumerate(self.ranks):
            if name is None:
                self._fill(rank, next(spares))
        self._formed_at = now
        self._formed = True
        self._move("formed")
        for member in self._ranked():
            member.joined, member.step, member.seen = False, 0, now
        returned = {rank: member.held for rank, member in returning.items() if member.held is not None}
        for member in self.members.values():
            member.held = None
        fresh, self._void = frozenset(self._void), set()
        return Formation(epoch, tuple(member.name for member in self._ranked()), fresh, returned)

    def rendezvous(self, epoch: int) -> bool:
        """Rank 0 has opened the meeting points. False: of another epoch, ignore it."""
        if epoch != self.epoch or self.state != "assigning":
            return False
        self._move("rendezvous")
        return True

    def joined(self, epoch: int, name: str) -> bool:
        """A rank has both communicators. True when it was the last."""
        member = self.members[name]
        if epoch != self.epoch or self.state != "joining" or member.rank is None:
            return False
        member.joined = True
        if not all(each.joined for each in self._ranked()):
            return False
        self._apart.difference_update(each.host for each in self._ranked())
        self._move("joined")
        return True

    def restored(self) -> None:
        """Every running sequence has what could be restored for it."""
        self._move("restored")

    @property
    def stepping(self) -> bool:
        """Whether steps are computed. While some sequences' pages are restored, those that have theirs go on."""
        return self.state in ("restoring", "serving")

    def overdue(self, now: float) -> Iterable[tuple[str, Literal["silent", "late"], str]]:
        """Workers to be given up, and why: silent for too long, or not joined in time; the kind, and in words."""
        late_join = self.state in ("assigning", "joining") and now - self._formed_at > self._join_timeout_s
        for member in list(self.members.values()):
            if member.ready and now - member.seen > self._heartbeat_timeout_s:
                yield member.name, "silent", f"no heartbeat for {now - member.seen:.1f} s"
            elif late_join and member.rank is not None and not member.joined:
                yield member.name, "late", f"did not join epoch {self.epoch} within {self._join_timeout_s:.0f} s"

    def excuse(self, pause_s: float) -> None:
        """This process was away for so long: nobody was silent or late meanwhile."""
        self._formed_at += pause_s
        for member in self.members.values():
            member.seen += pause_s

    # -- return ------------------------------------------------------------------------------------------------------

    @property
    def newest_epoch(self) -> int:
        """The newest epoch heard of: this coordinator's own, or one that a worker was in."""
        return max([self.epoch, *(member.held.epoch for member in self.members.values() if member.held)])

    def _returning(self) -> dict[int, Member]:
        """The vacant ranks that were held by a worker that is here; by several, one after the other: the last."""
        found: dict[int, Member] = {}
        for member in sorted(self.spares(), key=lambda each: each.held.epoch if each.held else 0):
            if member.held is not None and self.ranks[member.held.rank] is None:
                found[member.held.rank] = member
        return found

    def _awaits_return(self, now: float) -> bool:
        """Whether workers of an earlier coordinator's last epoch may yet come."""
        newest = self.newest_epoch
        if self._formed or newest == 0 or self._first_ready is None:
            return False
        back = [member for member in self._returning().values() if member.held and member.held.epoch == newest]
        return len(back) < self.size and now - self._first_ready < self.return_grace_s

    def _hosts(self, ranks: Set[int]) -> set[str]:
        return {member.host for member in self._ranked() if member.rank in ranks}

    def _usable(self, without: Set[str]) -> int:
        """Workers that could make up a group without these hosts."""
        return sum(each.ready and not each.cordoned and each.host not in without for each in self.members.values())

    def _fill(self, rank: int, member: Member) -> None:
        member.rank = rank
        self.ranks[rank] = member.name

    # -- views -------------------------------------------------------------------------------------------------------

    def spares(self) -> list[Member]:
        """Workers that can take a rank: on hosts that others can reach, with most ranks, and the longest here first."""
        ranks_by_host = Counter(member.host_id for member in self._ranked())
        idle = (member for member in self.members.values() if member.ready and member.rank is None)
        free = [member for member in idle if not member.cordoned]
        return sorted(free, key=lambda each: (each.host in self._apart, -ranks_by_host[each.host_id]))

    def statuses(self, paces: Mapping[str, Pace]) -> tuple[WorkerStatus, ...]:
        """All workers, ranks first."""
        ordered = sorted(self.members.values(), key=lambda each: (each.rank is None, each.rank or 0, each.name))
        return tuple(
            WorkerStatus(
                each.name,
                each.host,
                each.pid,
                each.device,
                each.rank,
                _state(each),
                paces.get(each.name, _UNKNOWN).compute_s,
                paces.get(each.name, _UNKNOWN).straggler,
            )
            for each in ordered
        )

    def one_host(self) -> bool:
        """Whether all ranks can share memory."""
        return len({member.host_id for member in self._ranked()}) == 1

    def on_gpus(self) -> bool:
        """Whether all ranks compute on GPUs."""
        return all(member.device.startswith("cuda") for member in self._ranked())

    def _ranked(self) -> list[Member]:
        return [self.members[name] for name in self.ranks if name is not None]

    def _move(self, event: GroupEvent) -> None:
        target = TRANSITIONS.get((self.state, event))
        if target is None:
            raise InvalidTransition(f"{event} in state {self.state}; before: {'; '.join(self.history)}")
        self._tell(f"{event}: {self.state} -> {target}, epoch {self.epoch}")
        self.state = target

    def _tell(self, what: str) -> None:
        self.history.append(what)

    def check(self) -> None:
        """Raise AssertionError unless ranks and members agree."""
        for rank, name in enumerate(self.ranks):
            assert name is None or self.members[name].rank == rank, f"rank {rank} and {name} disagree"
        held = [member.rank for member in self.members.values() if member.rank is not None]
        assert len(held) == len(set(held)), "two workers hold one rank"
        assert self.state == "forming" or None not in self.ranks, f"a vacant rank in state {self.state}"


def _state(member: Member) -> Literal["loading", "spare", "member", "draining", "cordoned"]:
    if member.rank is not None:
        return "draining" if member.draining else "member"
    if member.cordoned:
        return "cordoned"
    return "spare" if member.ready else "loading"
