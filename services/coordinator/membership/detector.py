"""Which ranks are lost though their channels are open. Pure: heartbeats, answers and the time come in.

A rank that waits for another in a collective stands as still as the one it waits for. What tells them apart:

    silence   a rank is silent while all others beat and a step is in flight. Silence of all at once says nothing
    progress  a count that grows with each collective that a rank enters: those that wait are one ahead of the one that
              they wait for
    compute   a step's seconds less those spent waiting in collectives: a slow rank has more of them, the others less
    failures  a rank that can't connect, or is the first to fail again and again, is cut off from the others
"""

import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from services.coordinator.membership.members import Member, Membership, Pace
from shared.messages import Heartbeat, StepDone

SILENCE_BEATS = 10.0
"""Heartbeats that a rank misses before it is given up, where all others beat and a step waits for it.

A stopped one is killed by its supervisor long before; a process that only lacks processors has been silent for 1.5 s.
"""
FRESH_BEATS = 2.5
AWAY_S = 1.0
"""A pause of the coordinator itself, after which nobody is blamed for what happened in it."""
BLAME_WINDOW_S = 30.0
STRAGGLER_RATIO = 2.0
STRAGGLER_S = 3.0
"""How long a rank must compute STRAGGLER_RATIO times as long as the others to count as a straggler."""
PACE_STEPS = 20
"""Steps over which compute times are averaged."""

Suspicion = tuple[str, Literal["silent", "late", "hung", "straggler"], str]
"""The worker's name, the kind, and the reason in words."""


@dataclass(slots=True)
class Signs:
    """What a worker has told of itself. `slow_since`: since when it has been a straggler."""

    epoch: int = 0
    progress: int = -1
    progressed: float = 0.0
    compute_s: float = 0.0
    steps: int = 0
    slow_since: float | None = None


class Detector:
    """Suspicions about the ranks of one group."""

    def __init__(self, *, heartbeat_s: float, hang_timeout_s: float, replace_stragglers: bool):
        self._silence_s = SILENCE_BEATS * heartbeat_s
        self._fresh_s = FRESH_BEATS * heartbeat_s
        self._hang_s = hang_timeout_s
        self._replace_stragglers = replace_stragglers
        self._signs: dict[str, Signs] = {}
        self._failed_first: list[tuple[float, str]] = []
        self._failing: list[str] = []  # in this epoch, the first one first
        self._looked: float | None = None

    # -- events ------------------------------------------------------------------------------------------------------

    def looked(self, now: float) -> float:
        """Called at every look. Returns how long this process itself was away, if so long that it must be excused."""
        pause = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        if pause < AWAY_S:
            return 0.0
        for signs in self._signs.values():
            signs.progressed += pause
            signs.slow_since = None
        return pause

    def beat(self, name: str, beat: Heartbeat, now: float) -> None:
        """A worker's heartbeat."""
        signs = self._signs.setdefault(name, Signs())
        if (signs.epoch, signs.progress) != (beat.epoch, beat.progress):
            signs.epoch, signs.progress, signs.progressed = beat.epoch, beat.progress, now

    def step_done(self, name: str, done: StepDone) -> None:
        """A rank's answer to a step."""
        signs = self._signs.setdefault(name, Signs())
        signs.steps += 1
        weight = max(1 / signs.steps, 1 / PACE_STEPS)
        signs.compute_s += weight * (max(0.0, done.seconds - done.waited_s) - signs.compute_s)

    def failed(self, name: str) -> None:
        """A rank reports that it can't go on in this epoch, though it is well itself."""
        if name not in self._failing:
            self._failing.append(name)

    def epoch_begins(self) -> None:
        """New ranks, new communicators: what was measured of their steps and failures is over."""
        self._failing.clear()
        for signs in self._signs.values():
            signs.compute_s, signs.steps, signs.slow_since = 0.0, 0, None

    def gone(self, name: str) -> None:
        """A worker is lost, or has left."""
        self._signs.pop(name, None)
        self._failing = [each for each in self._failing if each != name]
        self._failed_first = [each for each in self._failed_first if each[1] != name]

    # -- suspicions --------------------------------------------------------------------------------------------------

    def lost(self, membership: Membership, busy_since: float | None, now: float) -> Iterator[Suspicion]:
        """Workers to be given up, or, if they straggle, replaced. `busy_since`: when the step in flight began."""
        self._note_slow(now)
        overdue = list(membership.overdue(now))
        late = self.behind([name for name, kind, _ in overdue if kind == "late"], membership.epoch)
        for name, kind, reason in overdue:
            if kind == "silent" or not late or name in late:  # the late ones may have waited for another
                yield name, kind, reason
        if busy_since is not None and not overdue:
            ranks = [membership.members[name] for name in membership.ranks if name is not None]
            yield from self._standing(ranks, membership.epoch, busy_since, now)
            slow = self._stragglers([each.name for each in ranks], now)
            if slow and self._replace_stragglers and membership.spares():
                ratio = self._ratio(slow[0], [each.name for each in ranks])
                yield slow[0], "straggler", f"it computes {ratio:.1f} times as long as the other ranks"

    def _standing(self, ranks: Sequence[Member], epoch: int, busy_since: float, now: float) -> Iterator[Suspicion]:
        """Ranks that the others wait for in a step: stopped, or hung."""
        silent = [each for each in ranks if now - each.seen > self._silence_s]
        fresh = [each for each in ranks if now - each.seen < self._fresh_s]
        if silent and fresh and len(silent) + len(fresh) == len(ranks) and now - busy_since > self._silence_s:
            for each in silent:
                yield each.name, "silent", f"no heartbeat for {now - each.seen:.2f} s, while its peers wait for it"
        elif len(fresh) == len(ranks) and now - busy_since > self._hang_s:
            for name in self.behind([each.name for each in ranks], epoch):
                still_s = now - self._signs[name].progressed
                if still_s > self._hang_s:
                    yield name, "hung", f"it beats, but stood still for {still_s:.1f} s, while its peers wait for it"

    def behind(self, names: Collection[str], epoch: int) -> list[str]:
        """Those of these ranks that the others wait for; none if all stand at the same place, or it is not known."""
        places = {name: signs for name in names if (signs := self._signs.get(name)) is not None}
        if len(places) < len(names) or any(signs.epoch != epoch for signs in places.values()):
            return []
        low = min((signs.progress for signs in places.values()), default=0)
        found = [name for name, signs in places.items() if signs.progress == low]
        return found if len(found) < len(places) else []

    def cut_off(self, now: float, *, joining: bool) -> str | None:
        """Who is to be given up for an epoch that broke though nobody was lost; None: all may try again.

        While ranks join: the only one that failed. Else one that was the first to fail twice in BLAME_WINDOW_S.
        """
        if not self._failing:
            return None
        first = self._failing[0]
        if joining and len(self._failing) == 1:
            return first
        before = [each for each in self._failed_first if now - each[0] < BLAME_WINDOW_S]
        self._failed_first = [*before, (now, first)]
        return first if first in (name for _, name in before) else None

    def _note_slow(self, now: float) -> None:
        """Note since when ranks compute far longer than the others, step after step."""
        names = [name for name, signs in self._signs.items() if signs.steps]
        for name in names:
            signs = self._signs[name]
            if signs.steps < PACE_STEPS or self._ratio(name, names) < STRAGGLER_RATIO:
                signs.slow_since = None
            elif signs.slow_since is None:
                signs.slow_since = now

    def _stragglers(self, names: Collection[str], now: float) -> list[str]:
        """Those of these ranks that have been slow for some time."""
        since = ((name, signs.slow_since) for name in names if (signs := self._signs.get(name)) is not None)
        return [name for name, slow_since in since if slow_since is not None and now - slow_since >= STRAGGLER_S]

    def paces(self, now: float) -> dict[str, Pace]:
        """How fast each worker computes that has taken part in steps."""
        names = [name for name, signs in self._signs.items() if signs.steps]
        slow = self._stragglers(names, now)
        return {name: Pace(self._signs[name].compute_s, name in slow) for name in names}

    def _ratio(self, name: str, names: Collection[str]) -> float:
        """How many times as long as the median of the others a rank computes; 0 if there is nothing to compare."""
        others = [signs.compute_s for other in names if other != name and (signs := self._signs.get(other))]
        median = statistics.median(others) if others else 0.0
        return self._signs[name].compute_s / median if median else 0.0
