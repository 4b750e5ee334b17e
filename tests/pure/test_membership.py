"""Membership: who holds which rank, epoch by epoch."""

import pytest

from services.coordinator.membership.members import Held, InvalidTransition, Member, Membership
from shared.errors import ProtocolError
from shared.messages import Claim
from shared.types import pack_ids

KEY = bytes(16)


def made(size: int = 2, workers: int = 3) -> Membership:
    membership = Membership(size, heartbeat_timeout_s=1.0, join_timeout_s=5.0)
    for number in range(workers):
        membership.hello(Member(f"w{number}", "host", "id", 1, "cpu", seen=0.0))
        membership.ready(f"w{number}", 0.0)
    return membership


def serving(membership: Membership, epoch: int) -> None:
    membership.form(epoch, now=0.0)
    assert membership.rendezvous(epoch)
    ranked = [name for name in membership.ranks if name]
    assert [membership.joined(epoch, name) for name in ranked] == [False] * (len(ranked) - 1) + [True]
    membership.restored()


def test_a_spare_takes_the_lost_rank_and_the_others_keep_theirs() -> None:
    membership = made()
    serving(membership, 1)
    assert membership.gone("w0", "killed") == 0
    assert membership.can_form(0.0)
    formation = membership.form(2, now=1.0)
    assert formation.ranks == ("w2", "w1")
    assert formation.fresh == {0}
    membership.check()


def test_without_a_spare_no_epoch_begins() -> None:
    membership = made(workers=2)
    serving(membership, 1)
    membership.gone("w1", "killed")
    assert not membership.can_form(0.0)
    assert membership.state == "forming"


def test_each_epoch_names_the_ranks_lost_since_the_one_before() -> None:
    membership = made(workers=4)
    serving(membership, 1)
    membership.gone("w0", "killed")
    membership.form(2, now=0.0)
    membership.gone("w1", "killed")
    assert membership.form(3, now=0.0).fresh == {1}


def test_what_an_older_epoch_says_has_no_effect() -> None:
    membership = made()
    membership.form(4, now=0.0)
    assert not membership.rendezvous(3)
    assert membership.rendezvous(4)
    assert not membership.rendezvous(4)
    assert not membership.joined(3, "w0")
    assert membership.state == "joining"


def test_the_silent_and_the_late_are_overdue() -> None:
    membership = made()
    membership.heard("w2", 1.0)
    assert {name for name, _, _ in membership.overdue(1.5)} == {"w0", "w1"}
    membership.form(1, now=2.0)
    for name in ("w0", "w1", "w2"):
        membership.heard(name, 8.0)
    late = list(membership.overdue(8.0))
    assert [(name, kind) for name, kind, _ in late] == [("w0", "late"), ("w1", "late")]
    assert "did not join epoch 1" in late[0][2]


def test_a_transition_that_can_not_be_tells_the_story() -> None:
    membership = made()
    with pytest.raises(InvalidTransition, match="hello w0"):
        membership.restored()


def test_an_epoch_only_grows() -> None:
    membership = made()
    membership.form(5, now=0.0)
    membership.restart("test")
    with pytest.raises(AssertionError, match="not newer"):
        membership.form(5, now=0.0)


def test_spares_on_the_hosts_of_the_other_ranks_go_first() -> None:
    membership = made(workers=2)
    for name, host_id in (("far", "other"), ("near", "id")):
        membership.hello(Member(name, "host", host_id, 1, "cpu", seen=0.0))
        membership.ready(name, 0.0)
    serving(membership, 1)
    membership.gone("w1", "killed")
    assert membership.form(2, now=0.0).ranks == ("w0", "near")


@pytest.mark.parametrize(
    ("apart", "lost"), [({2}, ["w2"]), ({1, 2}, ["w0"]), (set(), [])], ids=["one", "all but rank 0", "none"]
)
def test_the_smaller_part_of_a_group_cut_in_two_is_given_up(apart: set[int], lost: list[str]) -> None:
    membership = made(size=3)
    membership.form(1, now=0.0)
    assert membership.cut_off(apart) == lost


def test_a_host_that_no_other_can_reach_gives_its_ranks_away_though_they_are_the_most() -> None:
    membership = Membership(3, heartbeat_timeout_s=1.0, join_timeout_s=5.0)
    for name in ("b0", "b1", "a0", "a1", "c0", "c1"):
        membership.hello(Member(name, name[0], name[0], 1, "cpu", seen=0.0))
        membership.ready(name, 0.0)
    assert membership.form(1, now=0.0).ranks == ("b0", "b1", "a0")
    assert membership.cut_off({2}) == ["a0"]  # it may be a's fault
    membership.gone("a0", "cut off")
    assert membership.form(2, now=0.0).ranks == ("b0", "b1", "c0")
    assert membership.cut_off({2}) == ["b0", "b1"]  # nobody is left whom b may reach
    membership.gone("b0", "cut off")
    membership.gone("b1", "cut off")
    assert set(membership.form(3, now=0.0).ranks) == {"a1", "c0", "c1"}


def test_a_host_that_was_cut_off_is_asked_last_until_one_of_its_ranks_has_joined() -> None:
    membership = made(workers=2)
    for name, host in (("apart", "b"), ("also apart", "b"), ("near", "c")):
        membership.hello(Member(name, host, name, 1, "cpu", seen=0.0))
        membership.ready(name, 0.0)
    membership.gone("w1", "killed")
    assert membership.form(1, now=0.0).ranks == ("w0", "apart")
    assert membership.cut_off({1}) == ["apart"]
    membership.gone("apart", "cut off")
    serving(membership, 2)
    assert membership.ranks == ["w0", "near"]
    membership.gone("near", "killed")
    serving(membership, 3)
    assert membership.ranks == ["w0", "also apart"]
    assert not membership._apart


def returning(*held: tuple[str, int, int] | None, epoch: int = 7) -> Membership:
    """A new coordinator's group of two after `epoch`, to which workers (name, epoch, rank) come at time 0."""
    membership = Membership(2, heartbeat_timeout_s=3, join_timeout_s=60, epoch=epoch, return_grace_s=1.0)
    for number, each in enumerate(held):
        name, of, rank = each or (f"spare{number}", 0, 0)
        membership.hello(Member(name, "host", "id", 1, "cpu", seen=0.0))
        membership.ready(name, 0.0, Held(of, rank, {}) if each else None)
    return membership


def test_all_ranks_of_the_last_epoch_are_waited_for_and_then_no_longer() -> None:
    membership = returning(("a", 7, 1), None)
    assert not membership.can_form(0.9)
    membership.hello(Member("b", "host", "id", 1, "cpu", seen=0.0))
    membership.ready("b", 0.9, Held(7, 0, {}))
    assert membership.can_form(0.9)
    formation = membership.form(8, 0.9)
    assert formation.ranks == ("b", "a")
    assert set(formation.returned) == {0, 1}


def test_a_spare_takes_a_rank_whose_worker_does_not_return() -> None:
    membership = returning(None, ("a", 7, 1))
    assert not membership.can_form(0.9)
    assert membership.can_form(1.1)
    formation = membership.form(8, 1.1)
    assert formation.ranks == ("spare0", "a")
    assert set(formation.returned) == {1}


def test_of_two_that_held_a_rank_the_later_returns_to_it() -> None:
    membership = returning(("woken", 5, 0), ("a", 7, 1), ("b", 7, 0))
    assert membership.form(8, 0.0).ranks == ("b", "a")


def test_an_epoch_is_newer_than_any_that_a_worker_was_in() -> None:
    membership = returning(("a", 9, 0), ("b", 9, 1), epoch=3)  # Redis has forgotten
    assert membership.newest_epoch == 9
    with pytest.raises(AssertionError, match="not newer"):
        membership.form(4, 0.0)


def test_nobody_is_waited_for_where_there_was_no_epoch() -> None:
    assert returning(None, None, epoch=0).can_form(0.0)


@pytest.mark.parametrize(
    "claim",
    [Claim(1, 2, b"", b""), Claim(1, 0, b"123", b""), Claim(1, 0, pack_ids([1]), b""), Claim(1, 0, pack_ids([9]), KEY)],
    ids=["rank", "no ids", "no key", "page"],
)
def test_a_claim_to_what_there_is_not_is_an_error(claim: Claim) -> None:
    with pytest.raises(ProtocolError):
        Held.of(claim, ranks=2, pages=9)
