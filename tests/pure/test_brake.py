"""When an epoch has to wait for those before it, which came to nothing."""

from services.coordinator.membership.brake import FREE, LONGEST_S, STOOD_S, Brake


def pauses(brake: Brake, count: int, *, lasting_s: float = 0.1) -> list[float]:
    """So many epochs in a row that end without progress, and how long the next one had to wait after each."""
    now, found = 100.0, []
    for _ in range(count):
        brake.began(now)
        now += lasting_s
        brake.ended(now, "the driver is gone")
        began = now
        while brake.holds(now):
            assert "the driver is gone" in brake.why(now)
            now += 0.0625
        assert brake.why(now) == ""
        found.append(now - began)
    return found


def test_pauses_double_up_to_a_bound_once_several_epochs_have_come_to_nothing() -> None:
    assert pauses(Brake(), FREE + 7) == [0.0] * FREE + [0.5, 1.0, 2.0, 4.0, 8.0, LONGEST_S, LONGEST_S]


def test_a_step_that_came_back_lets_the_brake_go() -> None:
    brake = Brake()
    pauses(brake, FREE + 3)
    brake.began(500.0)
    brake.progressed()
    brake.ended(500.1, "lost")
    assert not brake.holds(500.1)
    assert pauses(brake, FREE) == [0.0] * FREE


def test_epochs_that_stood_for_a_while_are_no_crash_loop() -> None:
    assert pauses(Brake(), 10, lasting_s=STOOD_S) == [0.0] * 10


def test_a_loss_before_an_epoch_has_begun_counts_for_nothing() -> None:
    brake = Brake()
    for _ in range(20):
        brake.ended(1.0, "lost")
    assert not brake.holds(1.0)
