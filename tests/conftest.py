"""What every test starts from."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

# Tests run on machines with few cores, often several at once; more threads make small models slower, not faster.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """No test depends on which one ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
