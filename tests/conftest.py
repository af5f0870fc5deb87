"""What every test starts from."""

from __future__ import annotations

import gc
import itertools
import random

import numpy as np
import pytest
import torch
from helpers.faults import Disk

# Tests run on machines with few cores, often several at once; more threads make small models slower, not faster.
torch.set_num_threads(1)

# A full collection visits the objects of all modules and tests, which nobody ever releases: about a million of them.
gc.set_threshold(10_000, 20, 20)


def pytest_collection_finish() -> None:
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on which one ran before it, nor on the system's entropy.

    A replay buffer without a seed asks `default_rng` for a fresh generator: here the first, second, ... of a test are
    always the same ones.
    """
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    seeds, default_rng = itertools.count(), np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: default_rng(next(seeds) if seed is None else seed))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Records or refuses the calls that bring files to the disk and to their places."""
    return Disk(monkeypatch)
