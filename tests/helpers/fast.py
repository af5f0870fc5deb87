"""Episodes to train on, and how often a function is entered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.profiler import ProfilerActivity, profile

from worldflux.training import ReplayBuffer

SMALL = dict(
    deter_dim=32, hidden_dim=16, units=16, stoch_discrete=4, stoch_classes=4, blocks=4, bins=31, imagination_horizon=3
)


FAST = ("Scan", "NativeScan")
"""Names of the autograd nodes that are the fast form, in torch and in C, as torch's profiler shows them."""


def times_entered(function: Callable[[], Any], *names: str) -> int:
    """How often a function computes the states along replayed windows in the fast form."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    # key_averages() takes seconds for thousands of events.
    return sum(event.name() in (names or FAST) for event in seen.profiler.kineto_results.events())


def episodes(*, finals: bool, storage: Any = None, model: Any = None, classes: tuple[int, ...] = ()) -> ReplayBuffer:
    """Episodes that end in many ways, with or without their last observations; discrete actions have `classes`."""
    extras = {} if model is None else model.replay_extras()
    buffer = ReplayBuffer(400, (3,), sum(classes) or 2, seed=0, storage=storage, extras=extras)
    random = np.random.default_rng(0)
    for episode, length in enumerate((5, 9, 1, 14, 30, 3, 22, 8) * 2):
        ends = np.arange(length) == length - 1
        buffer.add_episode(
            random.normal(size=(length + finals, 3)),
            np.concatenate([np.eye(n)[random.integers(n, size=length)] for n in classes], -1)
            if classes
            else random.uniform(-1, 1, (length, 2)),
            random.normal(size=length),
            **{"terminations" if episode % 2 else "truncations": ends},
        )
    return buffer
