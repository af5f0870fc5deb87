"""The global random streams belong to the user: they are seeded and rewound only on request."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.agents import weights
from helpers.sb3_families import FAMILIES, AnySpaces, both, make
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy

from worldflux import create_world_model
from worldflux.agents import WorldFluxAgent
from worldflux.diagnostics.open_loop import open_loop
from worldflux.envs import check_env, collect
from worldflux.training import Trainer

OBS = np.zeros(3, np.float32)
Saved = tuple[str, WorldFluxAgent, Path]


def streams() -> tuple[Any, ...]:
    """The states of the global random streams of Python, NumPy and torch."""
    _, words, *rest = np.random.get_state()
    return random.getstate(), words.tobytes(), tuple(rest), bytes(torch.get_rng_state().tolist())


def seed_streams() -> None:
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The family of an agent that has learned, the agent, and a directory with its files."""
    path = tmp_path_factory.mktemp(request.param)
    seed_streams()
    agent = make(request.param).learn(30)
    agent.save(path / "agent.zip")
    agent.save_checkpoint(path / "checkpoint")
    agent.model.save_pretrained(path / "model")
    return request.param, agent, path


LEAVES_ALONE: dict[str, Callable[[WorldFluxAgent, Path], Any]] = {
    "load": lambda agent, path: WorldFluxAgent.load(path / "agent.zip"),
    "load with an environment": lambda agent, path: WorldFluxAgent.load(path / "agent.zip", AnySpaces()),
    "load a checkpoint": lambda agent, path: WorldFluxAgent.load(path / "checkpoint"),
    "load and act": lambda agent, path: WorldFluxAgent.load(path / "agent.zip").predict(OBS, deterministic=True),
    "create_world_model": lambda agent, path: create_world_model(path / "model"),
    "save": lambda agent, path: agent.save(path / "again.zip"),
    "save_checkpoint": lambda agent, path: agent.save_checkpoint(path / "again"),
    "set_parameters": lambda agent, path: agent.set_parameters(path / "agent.zip"),
    "sample": lambda agent, path: agent.replay_buffer.sample(2, 4),
    "predict": lambda agent, path: agent.predict(OBS, deterministic=True),
    "evaluate_policy": lambda agent, path: evaluate_policy(agent, AnySpaces(), n_eval_episodes=1),
    "collect": lambda agent, path: collect(AnySpaces(), steps=5, seed=3),
    "open_loop": lambda agent, path: open_loop(agent.model, agent.replay_buffer.sample(2, 5), 2, samples=2, seed=3),
    "Trainer": lambda agent, path: Trainer(agent.model),
    "Trainer.evaluate": lambda agent, path: agent.trainer.evaluate(agent.replay_buffer, 1),
    "Trainer.health": lambda agent, path: agent.trainer.health(),
    "check_env": lambda agent, path: check_env(AnySpaces()),
}


@pytest.mark.parametrize("what", LEAVES_ALONE)
@pytest.mark.filterwarnings("ignore")
def test_the_global_random_streams_stay_where_they_are(saved: Saved, what: str) -> None:
    seed_streams()
    before = streams()
    LEAVES_ALONE[what](*saved[1:])
    assert streams() == before


def test_a_callback_that_loads_a_rival_does_not_change_the_training(saved: Saved) -> None:
    family, _, path = saved

    class Compare(BaseCallback):
        looks = 0

        def _on_step(self) -> bool:
            if self.num_timesteps % 5 == 0:
                self.looks += 1
                WorldFluxAgent.load(path / "agent.zip").predict(OBS, deterministic=True)
            return True

    plain, compared, compare = make(family), make(family), Compare()
    plain.learn(40)
    compared.learn(40, compare)
    assert compare.looks == 8 and torch.equal(weights(compared), weights(plain))


def test_a_seed_that_is_given_to_load_starts_the_streams(saved: Saved) -> None:
    _, _, path = saved
    states = []
    for seed in (3, 3, 4):
        WorldFluxAgent.load(path / "agent.zip", seed=seed)
        states.append(streams())
    assert states[0] == states[1] != states[2]


@both
def test_resuming_goes_on_with_the_saved_streams(family: str, tmp_path: Path) -> None:
    agent = make(family).learn(30)
    before = streams()
    agent.save_checkpoint(tmp_path / "checkpoint")
    torch.rand(5), np.random.rand(5), random.random()
    WorldFluxAgent.load(tmp_path / "checkpoint")
    assert streams() != before
    resumed = WorldFluxAgent.load(tmp_path / "checkpoint", AnySpaces(), resume=True)
    after = streams()
    # One number of NumPy's has become the environments' seed.
    assert (after[0], after[3]) == (before[0], before[3]) and after[1:3] != before[1:3]
    assert resumed.num_timesteps == 30
