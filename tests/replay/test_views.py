"""Two parts of one buffer that share no row. The `Replay` machine of `test_replay_model.py` compares their windows."""

import numpy as np
import pytest
import torch
from helpers.replay import counts, ended

from worldflux.errors import BufferError, ConfigurationError
from worldflux.replay.batch import BatchRequest
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.views import newest_rows


def of_episodes(lengths, n_envs=1, **changes):
    buffer = ReplayBuffer(10_000, (1,), 1, n_envs=n_envs, extras={"mark": ((), np.float32)}, seed=0, **changes)
    for episode, length in enumerate(lengths):
        buffer.add_episode(*counts(episode, length), ended(length))
    return buffer


def episodes_of(part):
    return set((part.sample(4000, 1).obs.flatten() // 1000).int().tolist())


def test_whole_episodes_are_held_out_until_their_share_is_reached():
    buffer = of_episodes([50] * 20, n_envs=2)
    train, held_out = buffer.split(0.22, seed=3)
    assert len(episodes_of(held_out)) == 5 and len(episodes_of(train)) == 15
    assert episodes_of(train) | episodes_of(held_out) == set(range(20))
    assert (train.num_episodes, len(train), held_out.num_episodes, held_out.num_transitions) == (15, 750, 5, 250)
    assert repr(held_out) == "ReplayPart(250 transitions, 5 episodes)"
    assert train.num_windows(1) + held_out.num_windows(1) == buffer.num_windows(1) == 1020
    again, other = buffer.split(0.22, seed=3)[1], buffer.split(0.22, seed=4)[1]
    assert episodes_of(again) == episodes_of(held_out) != episodes_of(other)


def test_one_long_episode_never_takes_all_the_others_with_it():
    for seed in range(10):
        train, held_out = of_episodes([900, 10, 10]).split(0.5, seed=seed)
        assert train.num_episodes >= 1 and held_out.num_episodes >= 1
        assert len(train) + len(held_out) == 920


def test_windows_of_short_episodes_run_on_into_the_next_one_of_their_part():
    train, held_out = of_episodes([7] * 40).split(0.25, seed=0)
    batch = held_out.sample(300, 20)
    count, rows = batch.obs[..., 0], batch.row_ids
    assert torch.all((count[:, 1:] == count[:, :-1] + 1) | batch.is_first[:, 1:])
    assert torch.all(rows[:, 1:] > rows[:, :-1]) and torch.any(rows[:, 1:] > rows[:, :-1] + 1)
    assert not set(rows.flatten().tolist()) & set(train.sample(3000, 1).row_ids.flatten().tolist())


def test_every_window_of_a_part_is_as_likely_as_any_other():
    _, held_out = of_episodes([9, 4, 30, 6, 11, 8]).split(0.4, seed=0)
    windows = held_out.num_windows(5)
    starts = torch.unique(held_out.sample(400 * windows, 5).row_ids[:, 0], return_counts=True)[1]
    assert len(starts) == windows and starts.min() > 310 and starts.max() < 490  # sigma 20


def test_a_part_is_a_provider_of_its_own():
    buffer = of_episodes([30] * 10)
    before = buffer.rng_state()
    train, _ = buffer.split(0.2, seed=5)
    train.seed(1)
    state = train.rng_state()
    first = train.sample(4, 6)
    train.set_rng_state(state)
    assert torch.equal(train.sample(BatchRequest(4, 6)).obs, first.obs)
    train.set_rng_state(state)
    assert torch.equal(train.sample_ahead(4, 6, device="cpu").row_ids, first.row_ids)
    assert buffer.rng_state() == before
    train.update_extras(first.row_ids, {"mark": first.obs[..., 0] + 1})
    assert torch.equal(train.extras_of(first.row_ids)["mark"], first.obs[..., 0] + 1)
    assert torch.equal(buffer.extras_of(first.row_ids)["mark"], first.obs[..., 0] + 1)  # one memory
    with pytest.raises(ConfigurationError, match="seed is -1"):
        train.seed(-1)
    with pytest.raises(BufferError, match="rng_state"):
        train.set_rng_state({})


def test_parts_of_a_buffer_that_changed_are_refused_instead_of_mixed():
    buffer = of_episodes([30] * 10)
    train, held_out = buffer.split(0.2)
    batch = train.sample(3, 5)
    buffer.grow(20_000)  # every row keeps its number
    train.update_extras(batch.row_ids, {"mark": torch.ones(3, 5)})
    assert train.sample(2000, 5).extras["mark"].any()
    buffer.add_episode(*counts(11, 3), ended(3))
    for call in (
        lambda: train.sample(3, 5),
        lambda: held_out.sample_ahead(3, 5),
        lambda: held_out.num_windows(5),
        lambda: train.extras_of(batch.row_ids),
        lambda: train.update_extras(batch.row_ids, {"mark": torch.ones(3, 5)}),
    ):
        with pytest.raises(BufferError, match="added to the replay buffer or dropped from it after it was split"):
            call()
    assert len(buffer.split(0.2)[0]) + len(buffer.split(0.2)[1]) == 303


def test_an_episode_in_flight_belongs_to_one_of_the_parts():
    buffer = of_episodes([5, 5])
    for t in range(6):
        buffer.add([[9000.0 + t]], [[0.0]], [0.0], [False], [False])
    parts = buffer.split(0.4, seed=0)
    assert sum(len(part) for part in parts) == 16 and sum(part.num_episodes for part in parts) == 2
    assert sorted(episode for part in parts for episode in episodes_of(part)) == [0, 1, 9]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fraction": 0}, BufferError, "fraction is 0, expected a number between 0 and 1"),
        ({"fraction": 1.0}, BufferError, "fraction is 1.0"),
        ({"fraction": float("nan")}, BufferError, "fraction is nan"),
        ({"fraction": "0.1"}, BufferError, "fraction is '0.1'"),
        ({"fraction": True}, BufferError, "fraction is True"),
        ({"fraction": 0.1, "seed": -1}, ConfigurationError, "seed is -1"),
        ({"fraction": 0.1, "seq_len": 0}, BufferError, "seq_len is 0"),
        ({"fraction": 0.1, "seq_len": 30}, BufferError, "Of 9 episodes, 20 transitions are held out, in no stream"),
        ({"fraction": 0.95, "seq_len": 30}, BufferError, "Of 9 episodes, 20 transitions are left to train on"),
    ],
)
def test_a_split_that_cannot_be_says_why(arguments, error, message):
    with pytest.raises(error, match=message):
        of_episodes([20] * 9).split(**arguments)


def test_fewer_than_two_episodes_cannot_be_split():
    for lengths in ([], [30]):
        with pytest.raises(BufferError, match=f"has {len(lengths)} episodes, .* expected at least 2"):
            of_episodes(lengths).split(0.5)


def test_a_part_without_such_a_window_says_how_long_its_rows_are():
    train, held_out = of_episodes([20] * 9).split(0.1)
    with pytest.raises(BufferError, match=r"longest stream has 21 rows, but seq_len is 22.*Split off another share"):
        held_out.sample(1, 22)
    assert train.sample(1, 22).obs.shape == (1, 22, 1)


def test_windows_come_from_the_newest_rows_and_leave_the_buffers_sampler_alone():
    buffer = ReplayBuffer(100, (1,), 1, n_envs=2, seed=0)
    for t in range(60):
        obs = np.array([[t], [1000 + t]], np.float32)
        nothing = np.zeros(2)
        buffer.add(obs, np.zeros((2, 1)), nothing, nothing, nothing)
    before = buffer.rng_state()
    newest = newest_rows(buffer, 10, seed=0)
    assert newest.num_windows(8) == 2 * 3
    seen = newest.sample(50, 8).obs
    assert set(seen[..., 0].unique().tolist()) == {*range(50, 60), *range(1050, 1060)}
    assert buffer.rng_state() == before
