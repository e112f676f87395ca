"""Schedules of sparsity."""

from __future__ import annotations

import pytest

import kirsch
from kirsch.errors import UsageError


def test_the_cubic_schedule_is_equation_1_of_zhu_and_gupta():
    schedule = kirsch.SparsitySchedule(0.9, steps=100, initial=0.1, begin=20, every=10)
    for step in range(20, 120):
        n = (step - 20) // 10 + 1  # number of changes
        expected = 0.9 + (0.1 - 0.9) * (1 - n * 10 / 100) ** 3
        assert schedule(step) == pytest.approx(expected, abs=1e-12)
    assert schedule(0) == schedule(19) == 0.1
    assert schedule(10_000) == 0.9


def test_sparsity_never_falls_and_changes_where_the_schedule_says():
    schedule = kirsch.SparsitySchedule(0.8, steps=35, begin=5, every=10)
    values = [schedule(step) for step in range(60)]
    assert values == sorted(values)
    changes = [step for step in range(60) if schedule.changes_at(step)]
    assert changes == [0, 5, 15, 25, 35]


@pytest.mark.parametrize(("steps", "every"), [(60, 20), (1000, 100), (35, 10), (7, 1), (1, 1), (3, 20)])
@pytest.mark.parametrize("kind", ["cubic", "constant"])
def test_a_loop_of_exactly_these_steps_ends_at_the_final_sparsity(steps, every, kind):
    schedule = kirsch.SparsitySchedule(0.9, steps=steps, every=every, kind=kind)
    values = [schedule(step) for step in range(steps) if schedule.changes_at(step)]
    assert values[-1] == schedule(steps - 1) == 0.9
    assert len(values) == (1 if kind == "constant" else -(-steps // every))
    assert schedule.rounds == tuple(values)


def test_the_constant_schedule_has_the_final_sparsity_from_the_first_step():
    schedule = kirsch.SparsitySchedule(0.5, kind="constant", begin=3)
    assert [schedule(step) for step in range(5)] == [0, 0, 0, 0.5, 0.5]


def test_rounds_are_the_sparsities_of_the_changes_and_end_with_the_final_one():
    assert kirsch.SparsitySchedule(0.875, steps=2).rounds == pytest.approx((0.765625, 0.875))
    assert kirsch.SparsitySchedule(0.9).rounds == (0.9,)
    assert kirsch.SparsitySchedule(0.9, kind="constant").rounds == (0.9,)


def test_a_sparsity_that_falls_is_refused():
    with pytest.raises(UsageError, match=r"is 0\.9, above `final`, 0\.5"):
        kirsch.SparsitySchedule(0.5, initial=0.9)
