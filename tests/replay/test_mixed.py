"""Batches with windows of recorded data and of collected ones, and extras that are added to a buffer later."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.replay import counts, ended

from worldflux.errors import ConfigurationError
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.provider import MixedReplay

MARK = {"mark": ((2,), np.float32)}


def of_episodes(episodes: range, seed: int = 0, **options: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(1_000, (1,), 1, extras=MARK, seed=seed, **options)
    for episode in episodes:
        buffer.add_episode(*counts(episode, 9), ended(9))
    return buffer


def episodes_in(obs: torch.Tensor) -> set[int]:
    return set((obs // 1000).int().flatten().tolist())


@pytest.mark.parametrize(
    ("share", "batch_size", "expected"),
    [
        (0.5, 8, 4),
        (0.25, 8, 2),
        (0.3, 8, 2),
        (0.01, 8, 1),
        (0.99, 8, 7),
        (0, 8, 0),
        (1, 8, 8),
        (0.5, 1, 0),
        (0.6, 1, 1),
    ],
)
def test_a_batch_has_the_share_of_recorded_windows(share: float, batch_size: int, expected: int) -> None:
    mixed = MixedReplay(of_episodes(range(4)), of_episodes(range(4, 8)), share)
    for _ in range(5):
        batch = mixed.sample(batch_size, 5)
        assert batch.obs.shape == (batch_size, 5, 1)
        assert episodes_in(batch.obs[:expected]) <= set(range(4))
        assert episodes_in(batch.obs[expected:]) <= set(range(4, 8))
        recorded, action = (batch.obs // 1000 < 4).squeeze(-1), batch.obs[..., 0] % 1000 < 9
        assert torch.equal(batch.row_ids < 0, recorded)
        torch.testing.assert_close(batch.rewards[action], batch.obs[..., 0][action] + 0.5)


def test_all_windows_are_recorded_until_something_was_collected() -> None:
    collected = of_episodes(range(0))
    mixed = MixedReplay(of_episodes(range(4)), collected, 0.25)
    assert (mixed.sample(8, 5).row_ids < 0).all()
    assert mixed.recorded_windows(8, 5) == 8
    collected.add_episode(*counts(7, 3), ended(3))
    assert mixed.recorded_windows(8, 4) == 2 and mixed.recorded_windows(8, 5) == 8


def test_a_mask_of_one_side_covers_both() -> None:
    recorded = ReplayBuffer(100, (1,), 1, extras=MARK, seed=0)
    obs, actions, rewards = counts(0, 4)
    recorded.add_episode(obs[:-1], actions, rewards, ended(4))  # without its last observation
    mixed = MixedReplay(recorded, of_episodes(range(4, 8)), 0.5)
    batch = mixed.sample(4, 5)
    assert batch.obs_mask.tolist() == [[True] * 4 + [False]] * 2 + [[True] * 5] * 2


def test_what_the_model_computed_goes_where_the_rows_came_from() -> None:
    recorded, collected = of_episodes(range(2)), of_episodes(range(4, 6))
    mixed = MixedReplay(recorded, collected, 0.5)
    for _ in range(60):
        batch = mixed.sample(4, 3)
        mixed.update_extras(batch.row_ids[:, 1:], {"mark": batch.obs[:, 1:].expand(-1, -1, 2) + 1})
    for buffer, fresh in ((recorded, 1), (collected, 1)):
        batch = buffer.sample(500, 1)
        is_set = batch.extras["mark"] != 0
        assert is_set.float().mean() > 0.8
        assert torch.equal(batch.extras["mark"][is_set], (batch.obs.expand(-1, -1, 2) + fresh)[is_set])


def test_the_newest_windows_are_asked_of_the_collected_side() -> None:
    class Asked(ReplayBuffer):
        fresh: list[bool] = []  # noqa: RUF012

        def sample(self, *args: Any, fresh: bool = False) -> Any:
            self.fresh.append(fresh)
            return super().sample(*args, fresh=fresh)

    collected = Asked(100, (1,), 1, extras=MARK, seed=0)
    collected.add_episode(*counts(4, 9), ended(9))
    mixed = MixedReplay(of_episodes(range(4)), collected, 0.5)
    mixed.sample(4, 5, fresh=True)
    mixed.sample(4, 5)
    assert Asked.fresh == [True, False]


def test_extras_are_added_to_data_that_have_none() -> None:
    buffer = ReplayBuffer(50, (1,), 1, seed=0)
    buffer.add_episode(*counts(0, 9), ended(9))
    before = buffer.nbytes
    rows = len(buffer.stored()[0].flags)
    buffer.add_extras(MARK)
    buffer.add_extras({**MARK, "more": ((), "uint8")})  # what is there stays
    assert buffer.extras == {"mark": ((2,), np.dtype(np.float32)), "more": ((), np.dtype(np.uint8))}
    assert buffer.nbytes == before + rows * 9
    batch = buffer.sample(2, 10)
    assert batch.extras["mark"].shape == (2, 10, 2) and not batch.extras["mark"].any()
    buffer.update_extras(batch.row_ids, {"mark": torch.ones(2, 10, 2)})
    buffer.add_episode(*counts(1, 9), ended(9))
    assert buffer.sample(500, 1).extras["mark"].mean() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ConfigurationError, match=r"has extras 'mark' of .*Load the data again, without extras"):
        buffer.add_extras({"mark": ((3,), np.float32)})


def test_sides_without_the_same_extras_are_refused() -> None:
    plain = ReplayBuffer(50, (1,), 1, seed=0)
    with pytest.raises(ConfigurationError, match=r"recorded data have nothing beside their rows, expected \['mark'\]"):
        MixedReplay(plain, of_episodes(range(4)), 0.5)
    plain.add_extras({**MARK, "more": ((), "uint8")})
    plain.add_episode(*counts(0, 9), ended(9))
    assert list(MixedReplay(plain, of_episodes(range(4)), 0.5).sample(2, 3).extras) == ["mark"]
