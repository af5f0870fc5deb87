"""Numbers that say where they belong, and a recorder that holds steps back: for the tests of the replay buffer."""

import numpy as np
import torch

from worldflux.replay import ring as row_store


def acted(count):
    """The action at a count: within [-1, 1], and exact in float32."""
    return (count + 0.25) / 2**17


def counts(episode, length):
    """obs, actions and rewards of one episode, whose observations are `1000 * episode + t`.

    `[T+1, 1]`, `[T, 1]`, `[T]`
    """
    count = 1000.0 * episode + np.arange(length + 1)
    return count[:, None], acted(count[:-1, None]), count[:-1] + 0.5


def ended(length):
    """Flags of an episode whose last step terminates it. `[T]`"""
    return np.arange(length) == length - 1


def seen(batch):
    """Whether each observation of a batch was recorded: a batch without a mask says that all were. `[B, T]`"""
    if batch.obs_mask is None:
        return torch.ones_like(batch.is_first)
    assert not batch.obs_mask.all(), "a batch in which everything was seen has no mask"
    return batch.obs_mask


def documented(**changes):
    """The documented arrays of a file with two episodes, of 3 and 2 steps; None takes one away."""
    count = np.array([0, 1, 2, 1000, 1001], np.float32)
    arrays = dict(
        obs=np.stack([count, -count], 1),
        actions=acted(count[:, None]),
        rewards=count + 0.5,
        dones=np.array([0, 0, 1, 0, 1], np.float32),
        obs_shape=np.array([2]),
        action_dim=np.array(1),
        capacity=np.array(20),
    )
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def with_table(**changes):
    """The same with everything that `ReplayBuffer.save` adds."""
    table = dict(
        truncations=np.zeros(5, bool),
        episode_lengths=np.array([3, 2]),
        episode_streams=np.zeros(2, int),
        episode_starts=np.ones(2, bool),
        episode_ends=np.ones(2, bool),
        final_obs=np.ones((2, 2), np.float32),
        final_obs_mask=np.ones(2, bool),
        n_envs=np.array(1),
    )
    return documented(**{**table, **changes})


def assert_same_batch(one, other):
    """Both batches hold the same rows, with the same extras."""
    for name in ("actions", "rewards", "terminations", "truncations", "is_first"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(seen(one), seen(other))
    for mine, its in ((one.obs, other.obs), (one.extras, other.extras)):
        mine, its = (part if isinstance(part, dict) else {"obs": part} for part in (mine, its))
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[key], its[key]) and mine[key].dtype == its[key].dtype for key in mine)


class HeldBack:
    """Hands over as many steps at once as the buffer takes."""

    def __init__(self, buffer):
        self.buffer, self.steps = buffer, []
        self.is_resting, self.is_abandoned = True, False
        self.streams = buffer.attach(self, buffer.n_envs)
        self.most = buffer.most_steps

    def add(self, obs, term, trunc, on):
        if len(self.steps) == self.most:
            self.hand_over()
        flags = on * (term * row_store.TERMINATED | trunc * row_store.TRUNCATED | row_store.STEP)
        self.steps.append((obs.astype(np.float32), flags))

    def hand_over(self):
        if self.steps:
            obs, flags = (np.stack(part) for part in zip(*self.steps, strict=True))
            self.steps = []
            finals = {"obs": obs[flags > row_store.STEP] + 1}
            self.buffer.add_checked({"obs": obs}, acted(obs), obs[..., 0] + 0.5, flags, finals, self.streams)

    def limit(self, steps):
        self.most = steps

    def end_episodes(self):
        self.buffer.end_in(self.streams)
