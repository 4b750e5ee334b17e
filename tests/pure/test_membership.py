"""Membership: who holds which rank, epoch by epoch."""

import pytest

from services.coordinator.membership import InvalidTransition, Member, Membership


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


def test_a_host_that_was_cut_off_is_asked_last_until_one_of_its_ranks_has_joined() -> None:
    membership = made(workers=2)
    for name, host in (("apart", "b"), ("also apart", "b"), ("near", "c")):
        membership.hello(Member(name, host, name, 1, "cpu", seen=0.0))
        membership.ready(name)
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
