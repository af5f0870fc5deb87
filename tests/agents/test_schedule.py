"""How many gradient steps are due."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldflux.agents.learning import UpdateSchedule
from worldflux.errors import ConfigurationError


def test_the_first_call_owes_one_update_and_later_ones_keep_the_remainder() -> None:
    schedule = UpdateSchedule(train_ratio=384, replayed_per_update=1024)  # 3 updates every 8 steps

    assert [schedule.updates_due(1) for _ in range(9)] == [1, 0, 0, 1, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("n_envs", [1, 3, 16])
def test_the_ratio_does_not_depend_on_the_number_of_environments(n_envs: int) -> None:
    schedule = UpdateSchedule(train_ratio=512, replayed_per_update=1024)
    schedule.updates_due(n_envs)

    assert sum(schedule.updates_due(n_envs) for _ in range(480 // n_envs)) == 240


def test_a_large_ratio_owes_several_updates_at_once() -> None:
    schedule = UpdateSchedule(train_ratio=2560, replayed_per_update=1024)

    assert [schedule.updates_due(2) for _ in range(4)] == [1, 5, 5, 5]
    assert schedule.env_steps_per_update == 0.4


def test_a_ratio_of_zero_never_trains() -> None:
    schedule = UpdateSchedule(train_ratio=0, replayed_per_update=1024)

    assert [schedule.updates_due(100) for _ in range(3)] == [0, 0, 0]


@given(st.floats(0.01, 5000), st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_what_was_handed_out_never_strays_from_the_ratio(train_ratio: float, steps: list[int]) -> None:
    schedule = UpdateSchedule(train_ratio, replayed_per_update=1024)
    schedule.updates_due(1)

    done = sum(schedule.updates_due(new) for new in steps)

    assert 0 <= sum(steps) * train_ratio / 1024 - done < 1


def test_a_saved_count_goes_on_where_it_was() -> None:
    whole, first = UpdateSchedule(300, 1024), UpdateSchedule(300, 1024)
    expected = [whole.updates_due(1) for _ in range(40)]
    due = [first.updates_due(1) for _ in range(17)]
    second = UpdateSchedule(300, 1024)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))

    assert due + [second.updates_due(1) for _ in range(23)] == expected


def test_a_changed_ratio_owes_nothing_for_the_past() -> None:
    first = UpdateSchedule(1024, 1024)
    for _ in range(101):
        first.updates_due(1)
    second = UpdateSchedule(4096, 1024)
    second.load_state_dict(first.state_dict())

    assert [second.updates_due(1) for _ in range(3)] == [4, 4, 4]


def test_a_negative_ratio_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="train_ratio is -1, expected a number of 0 or more"):
        UpdateSchedule(-1, 1024)
