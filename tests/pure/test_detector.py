"""Suspicions: who is lost though its channel is open, and who is only slow, unlucky, or waiting for another."""

from services.coordinator.membership.detector import Detector
from services.coordinator.membership.members import Member, Membership
from shared.messages import Heartbeat, StepDone

BEAT_S = 0.2


class Watched:
    """Three ranks in epoch 1, a detector, and a clock."""

    def __init__(self, *, replace_stragglers: bool = False, spares: int = 1) -> None:
        self.now = 0.0
        self.membership = Membership(3, heartbeat_timeout_s=3.0, join_timeout_s=5.0)
        self.detector = Detector(heartbeat_s=BEAT_S, hang_timeout_s=2.0, replace_stragglers=replace_stragglers)
        for number in range(3 + spares):
            self.membership.hello(Member(f"w{number}", "host", "id", number, "cpu", seen=0.0))
            self.membership.ready(f"w{number}", 0.0)
        self.membership.form(1, 0.0)
        self.detector.epoch_begins()

    def serves(self) -> "Watched":
        self.membership.rendezvous(1)
        for name in self.membership.ranks:
            self.membership.joined(1, str(name))
        self.membership.restored()
        return self

    def beat(self, *names: str, progress: int | None = None) -> None:
        for name in names:
            self.membership.heard(name, self.now)
            beat = Heartbeat(1, 0, True, int(self.now * 100) if progress is None else progress)
            self.detector.beat(name, beat, self.now)

    def lost(self, busy_since: float | None) -> dict[str, str]:
        return {name: kind for name, kind, _ in self.detector.lost(self.membership, busy_since, self.now)}

    def until_lost(self, *beating: str, limit_s: float, busy_since: float | None = 0.0, **beat: int) -> dict[str, str]:
        """Let these beat, until somebody is lost or the time is over."""
        while self.now < limit_s:
            self.now += BEAT_S
            self.beat(*beating, **beat)
            if found := self.lost(busy_since):
                return found
        return {}


def test_a_rank_that_falls_silent_while_others_wait_for_it_is_lost_before_the_timeout() -> None:
    watched = Watched().serves()
    assert watched.until_lost("w0", "w2", "w3", limit_s=1.7) == {}
    assert watched.until_lost("w0", "w2", "w3", limit_s=2.3) == {"w1": "silent"}


def test_silence_without_a_step_in_flight_is_given_the_whole_timeout() -> None:
    watched = Watched().serves()
    assert watched.until_lost("w0", "w2", "w3", limit_s=2.7, busy_since=None) == {}
    assert watched.until_lost("w0", "w2", "w3", limit_s=3.3, busy_since=None) == {"w1": "silent"}


def test_silence_of_all_at_once_accuses_nobody() -> None:
    watched = Watched().serves()
    assert watched.until_lost("w3", limit_s=2.7) == {}


def test_two_that_stop_at_once_are_both_lost() -> None:
    watched = Watched().serves()
    assert watched.until_lost("w0", "w3", limit_s=2.3) == {"w1": "silent", "w2": "silent"}


def test_ranks_are_excused_for_what_happened_while_the_coordinator_was_away() -> None:
    watched = Watched().serves()
    watched.detector.looked(0.0)
    watched.now = 30.0
    away = watched.detector.looked(watched.now)
    assert away == 30.0
    watched.membership.excuse(away)
    assert watched.lost(busy_since=away) == {}


def test_of_ranks_that_beat_and_stand_still_the_one_that_the_others_wait_for_is_lost() -> None:
    watched = Watched().serves()
    watched.beat("w1", progress=40)
    while watched.now < 1.9:
        watched.now += BEAT_S
        watched.beat("w0", "w2", progress=41)
        watched.beat("w1", progress=40)
        watched.beat("w3", progress=0)
        assert watched.lost(busy_since=0.0) == {}
    watched.now = 2.1
    watched.beat("w0", "w2", progress=41)
    watched.beat("w1", progress=40)
    assert watched.lost(busy_since=0.0) == {"w1": "hung"}


def test_a_long_step_in_which_all_get_on_is_nobodys_fault() -> None:
    watched = Watched().serves()
    assert watched.until_lost("w0", "w1", "w2", "w3", limit_s=30.0) == {}


def test_ranks_that_stand_at_the_same_place_are_not_told_apart() -> None:
    watched = Watched().serves()
    assert watched.until_lost("w0", "w1", "w2", "w3", limit_s=30.0, progress=7) == {}


def test_of_ranks_that_do_not_join_only_the_one_that_is_behind_is_lost() -> None:
    watched = Watched()
    watched.now = 5.1
    watched.beat("w0", "w2", "w3", progress=2)
    watched.beat("w1", progress=1)
    assert watched.lost(None) == {"w1": "late"}
    watched.beat("w1", progress=2)
    assert watched.lost(None) == {"w0": "late", "w1": "late", "w2": "late"}


def test_who_alone_can_not_connect_or_is_the_first_to_fail_twice_is_cut_off() -> None:
    detector = Watched().detector
    detector.failed("w1")
    assert detector.cut_off(1.0, joining=True) == "w1"
    detector.epoch_begins()
    for name in ("w2", "w1", "w0"):
        detector.failed(name)
    assert detector.cut_off(2.0, joining=True) is None
    detector.epoch_begins()
    detector.failed("w2")
    assert detector.cut_off(3.0, joining=False) == "w2"
    detector.epoch_begins()
    detector.failed("w2")
    detector.gone("w2")
    assert detector.cut_off(4.0, joining=False) is None
    detector.failed("w1")
    assert detector.cut_off(60.0, joining=False) is None  # its first failure is long ago


def slow_steps(watched: Watched, seconds: float) -> dict[str, str]:
    """Steps for so long in which w1 computes and the others wait for it; who is lost in the end."""
    found: dict[str, str] = {}
    end = watched.now + seconds
    while watched.now < end and not found:
        watched.now += 0.1
        for rank, name in enumerate(("w0", "w1", "w2")):
            waited = 0.0 if name == "w1" else 0.09
            watched.detector.step_done(name, StepDone(1, 1, rank, b"", b"", (), 0.1, waited))
        watched.beat(*watched.membership.members)
        found = watched.lost(watched.now)
    return found


def test_a_slow_rank_is_told_from_those_that_wait_for_it_and_only_shown() -> None:
    watched = Watched().serves()
    assert slow_steps(watched, 10.0) == {}
    paces = watched.detector.paces(watched.now)
    assert {name: pace.straggler for name, pace in paces.items()} == {"w0": False, "w1": True, "w2": False}
    assert paces["w1"].compute_s > 5 * paces["w0"].compute_s


def test_a_straggler_is_replaced_where_that_is_asked_for_and_there_is_a_spare() -> None:
    assert slow_steps(Watched(replace_stragglers=True).serves(), 10.0) == {"w1": "straggler"}
    assert slow_steps(Watched(replace_stragglers=True, spares=0).serves(), 10.0) == {}
