"""What does not fit a model, or cannot be right, is named when training starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from worldflux import create_world_model
from worldflux.errors import TrainingError
from worldflux.training import Batch, ReplayBuffer, Trainer, TrainingConfig, train

STEPS = dict(total_steps=30, batch_size=2, sequence_length=6, device="cpu")


def filled(**named: Any) -> ReplayBuffer:
    rng, buffer = np.random.default_rng(0), ReplayBuffer(500, (3,), 1, **named)
    for _ in range(3):
        buffer.add_episode(rng.normal(size=(21, 3)), rng.uniform(-1, 1, (20, 1)), rng.normal(size=20))
    return buffer


# Numbers that are not finite


class Spoilt:
    """Batches of which one field holds a NaN from some time on."""

    def __init__(self, name: str, after: int) -> None:
        self.name, self.after, self.calls = name, after, 0

    def sample(self, batch_size: int, seq_len: int | None = None, device: str = "cpu") -> Batch:
        B, T = batch_size, seq_len or 50
        fields: dict[str, Any] = {
            "obs": torch.randn(B, T, 3),
            "actions": torch.rand(B, T, 1),
            "rewards": torch.randn(B, T),
            "terminations": torch.zeros(B, T),
        }
        if self.calls >= self.after:
            fields[self.name][1, 2] = torch.inf if self.name == "rewards" else torch.nan
        self.calls += 1
        return Batch(**fields)


@pytest.mark.parametrize("name", ["obs", "actions", "rewards"])
@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_a_number_of_a_batch_that_is_not_finite_is_blamed_on_its_field(family: str, name: str) -> None:
    def model() -> Any:
        return create_world_model(f"{family}:tiny", obs_shape=(3,), action_dim=1)

    with pytest.raises(
        TrainingError, match=rf"The batch's {name} is not finite at gradient step 1: it has (nan|inf) at index \(1, 2"
    ):
        train(model(), Spoilt(name, 0), **STEPS)
    with pytest.raises(TrainingError, match=rf"^The batch's {name} was not finite at gradient step 4\. Look for where"):
        train(model(), Spoilt(name, 3), **{**STEPS, "total_steps": 5})
    trainer = Trainer(model(), TrainingConfig(device="cpu"))
    provider = Spoilt(name, 1)
    for _ in range(2):
        trainer.step(provider.sample(2, 6))
    with pytest.raises(TrainingError, match=rf"^The batch's {name} was not finite at gradient step 2"):
        trainer.check_finite()
