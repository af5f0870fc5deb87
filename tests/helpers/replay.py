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
