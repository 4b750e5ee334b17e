"""A rank moves to a spare on the operator's word: its pages are copied while it serves, and between two steps, when the
rest has followed, the spare takes its place. One rank at a time. Pure: this says what to send, and the time comes in.

What fails on the way leaves the group as it is: copies count only where an epoch begins with the successor in place.
"""

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from services.coordinator.membership.members import Formation, Member, Membership
from services.coordinator.outbox import Outbox
from services.coordinator.protection.host import Host
from services.coordinator.protection.ledger import Ledger
from shared.errors import RequestRejected
from shared.messages import CopyPages, PagesCopied, Prepare, Prepared, StandBy
from shared.types import OPEN_KEY, HandoverStatus, OperatorAction, pack_ids

log = logging.getLogger(__name__)

COPY_BYTES = 4 << 20
"""Copied between two ticks at most, and left for the end, when steps are held for it, at most."""
RETRY_S = 1.0

Phase = Literal["waiting", "preparing", "copying", "closing", "switching"]


@dataclass(slots=True)
class Move:
    """A rank on its way from `old` to `new`, which is "" until there is a spare."""

    action: OperatorAction
    rank: int
    old: str
    new: str = ""
    phase: Phase = "waiting"
    number: int = 0
    """Of the attempt: answers of earlier ones have no effect."""
    todo: deque[int] = field(default_factory=deque)
    copying: tuple[int, ...] = ()
    """Pages under way."""
    rewritten: set[int] = field(default_factory=set)
    """Of these, those that were given away meanwhile."""
    tail: set[int] = field(default_factory=set)
    """Pages that are not sealed, copied while no step is computed."""
    held_since: float = 0.0
    not_before: float = 0.0
    trouble: str = ""


class Moves:
    """The move under way, if one."""

    def __init__(
        self,
        membership: Membership,
        host: Host,
        ledger: Ledger,
        page_bytes: int,
        outbox: Outbox,
        *,
        possible: bool = True,
    ):
        """`possible`: whether the engine has spares."""
        self.possible = possible
        self.move: Move | None = None
        self._membership = membership
        self._host = host
        self._ledger = ledger
        self._batch = max(1, COPY_BYTES // page_bytes)
        self._outbox = outbox
        self._attempts = 0

    # -- the operator ------------------------------------------------------------------------------------------------

    def apply(self, action: OperatorAction, target: str) -> str:
        """Do what an operator asks; says what will happen. Raises RequestRejected where it can't."""
        if not self.possible:
            text = "this engine keeps no spare (GHOST_SPARES) to which a rank could move"
            raise RequestRejected(text, status=409, code="no_spare")
        member = self._member(action, target)
        if action == "resume":
            if self.move is not None and self.move.old == member.name and self.move.phase != "switching":
                self._end("the operator changed their mind")
            self._membership.uncordon(member.name)
            if member.rank is None:
                self._outbox.to_worker(member.name, StandBy(self._membership.epoch, hold=True))
            return f"{member.name} may be taken again"
        if member.rank is None:
            if action == "replace":
                raise RequestRejected(f"{member.name} holds no rank", status=409, code="no_rank", param="target")
            self._membership.cordon(member.name)
            return f"{member.name} is a spare, and won't be taken before it is resumed"
        if self.move is not None:
            text = f"rank {self.move.rank} is on its way; one rank moves at a time"
            raise RequestRejected(text, status=409, code="busy", param="target")
        self.move = Move(action, member.rank, member.name)
        member.draining = True
        return f"rank {member.rank} moves from {member.name} to a spare"

    def _member(self, action: OperatorAction, target: str) -> Member:
        kind, _, name = target.partition(":")
        members = self._membership.members
        if kind == "worker" and name in members:
            return members[name]
        if kind == "rank" and name.isdecimal():
            here = [each for each in members.values() if each.rank == int(name)]
            away = [each for each in members.values() if each.cordoned and each.was == int(name)]
            if found := away or here if action == "resume" else here:
                return found[0]
        text = f"{target[:100]!r} is not here: rank:N, or worker:NAME"
        raise RequestRejected(text, status=404, code="not_found", param="target")

    # -- events ------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Go on, while the group serves and nothing is to be restored."""
        move = self.move
        if move is None or now < move.not_before:
            return
        if move.phase == "waiting" and (spares := self._membership.spares()):
            self._attempts += 1
            move.new, move.number, move.phase = spares[0].name, self._attempts, "preparing"
            log.info("a rank begins to move", extra={"rank": move.rank, "worker": move.old, "successor": move.new})
            self._outbox.to_worker(move.new, Prepare(move.number, move.rank))
        elif move.phase == "copying" and not move.copying:
            self._copy_on(move, now)

    def _copy_on(self, move: Move, now: float) -> None:
        if not move.todo:
            move.todo.extend(self._ledger.uncopied())
        if len(move.todo) <= self._batch:
            move.phase, move.held_since = "closing", now
            return
        pages: list[int] = []
        while move.todo and len(pages) < self._batch:
            if self._ledger.wants_copy(number := move.todo.popleft()):
                pages.append(number)
        self._ask(move, pages)

    @property
    def closing(self) -> bool:
        """Whether no step may begin: the last pages are copied, or the epoch ends."""
        return self.move is not None and self.move.phase in ("closing", "switching")

    def close(self) -> None:
        """No step is computed: copy what is left, about COPY_BYTES and the tails."""
        move = self.move
        if move is None or move.phase != "closing" or move.copying:
            return
        runs = self._host.runs() if self._host.keeps_open else ()
        move.tail = {number for run in runs for number in run.pages if self._ledger.key(number) is None}
        if rest := [*self._ledger.uncopied(), *move.tail]:
            self._ask(move, rest)
        else:
            move.phase = "switching"

    def prepared(self, message: Prepared) -> None:
        """The successor has the rank's weights."""
        if self.move is not None and self.move.phase == "preparing" and self.move.number == message.move:
            self.move.phase = "copying"

    def copied(self, message: PagesCopied, now: float) -> None:
        """The successor has pages, or could not get them."""
        move = self.move
        if move is None or move.number != message.move or pack_ids(move.copying) != message.pages:
            return
        pages, move.copying = move.copying, ()
        for number in pages:
            if not message.reason and number not in move.tail | move.rewritten:
                self._ledger.copied(number)
            self._host.unpin(number)
        if message.reason:
            log.warning("pages of a rank that moves could not be copied: %s", message.reason)
            self._again(message.reason, now + RETRY_S)
        elif move.phase == "closing":
            move.phase = "switching"

    def dropped(self, number: int) -> None:
        """This page is given away: what is copied of it at this moment may be anything."""
        if self.move is not None and number in self.move.copying:
            self.move.rewritten.add(number)

    def switch(self) -> Move | None:
        """The move whose successor has all that it needs, once: from now on an epoch may begin with it."""
        move = self.move
        if move is None or move.phase != "switching" or self._membership.ranks[move.rank] != move.old:
            return None
        self._membership.hand_over(move.rank, move.new)
        return move

    def formed(self, formation: Formation) -> None:
        """An epoch begins. With the successor in place, it has what was copied; otherwise the move begins anew."""
        move = self.move
        if move is None:
            return
        if formation.ranks[move.rank] == move.new:
            self._ledger.moved(move.rank, move.tail)
            if move.action == "drain" and move.old in self._membership.members:
                self._membership.cordon(move.old, move.rank)
            log.info("a rank has moved", extra={"rank": move.rank, "worker": move.old, "successor": move.new})
            self._end("")
        elif formation.ranks[move.rank] != move.old:
            self._end("its worker is lost")
        elif move.new in formation.ranks:
            self._again("the spare was needed elsewhere")

    def interrupted(self) -> None:
        """The epoch is over, but not by a switch: steps are not held any more, and what is copied stays copied."""
        move = self.move
        if move is not None and move.phase != "switching":
            self._stop_copying(move)
            if move.phase == "closing":
                move.phase = "copying"

    def gone(self, name: str) -> None:
        """A worker is lost."""
        if self.move is not None and name == self.move.new:
            self._again(f"{name} is lost")
        elif self.move is not None and name == self.move.old and self.move.phase != "switching":
            self._end("its worker is lost")

    # -- inside ------------------------------------------------------------------------------------------------------

    def _ask(self, move: Move, pages: list[int]) -> None:
        address = self._membership.members[move.old].pages_address
        for number in pages:
            self._host.pin(number)
        move.copying, move.rewritten = tuple(pages), set()
        keys = tuple(self._ledger.key(number) or OPEN_KEY for number in pages)
        self._outbox.to_worker(move.new, CopyPages(move.number, address, pack_ids(pages), keys))

    def _again(self, reason: str, not_before: float = 0.0) -> None:
        """Begin with a spare anew, where the rank is still with its worker."""
        move = self.move
        if move is None:
            return
        self._stop_copying(move)
        self._ledger.forget_copies()
        move.new, move.phase, move.trouble, move.not_before = "", "waiting", reason, not_before
        move.tail.clear()

    def _end(self, reason: str) -> None:
        move, self.move = self.move, None
        if move is None:
            return
        self._stop_copying(move)
        self._ledger.forget_copies()
        if (old := self._membership.members.get(move.old)) is not None:
            old.draining = False
        if reason:
            log.warning("a rank does not move", extra={"rank": move.rank, "reason": reason})

    def _stop_copying(self, move: Move) -> None:
        for number in move.copying:
            self._host.unpin(number)
        move.copying = ()
        move.todo.clear()

    # -- views -------------------------------------------------------------------------------------------------------

    def status(self) -> HandoverStatus | None:
        """What is under way, for operators."""
        move = self.move
        if move is None:
            return None
        left = len(move.todo) + len(move.copying)
        return HandoverStatus(move.action, move.rank, move.old, move.new, move.phase, left, move.trouble)
