"""An agent's objective: set at any time, followed while acting and collecting, and absent from its files."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.agents import make_agent, make_planner
from helpers.captured import acted, actors
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from worldflux import ConfigurationError, PlannedTrajectory, RewardPlus, TrainingError, WorldFluxAgent
from worldflux.envs import make_env

SEARCH = dict(horizon=1, num_samples=64, num_elites=8, num_pi_trajs=4, iterations=5, min_std=0.01)
DEPTH: dict[str, Any] = dict(train_ratio=0, planner_kwargs=SEARCH)


def torque(wanted: float) -> Any:
    """An objective whose best action is known: a torque of `wanted` times the largest one."""
    return lambda trajectory: -(trajectory.actions[..., 0] - wanted).square()


def observations(rows: int) -> Any:
    return np.random.default_rng(0).uniform(-1, 1, (rows, 3)).astype(np.float32)


MAKERS = {
    "tdmpc2": lambda **settings: make_planner(**{**DEPTH, **settings}),
    "dreamerv3": lambda **settings: make_agent("Pendulum-v1", planner="mppi", **{**DEPTH, **settings}),
}


@pytest.mark.parametrize("family", MAKERS)
def test_an_objective_is_followed_from_the_moment_it_is_set(family: str) -> None:
    agent, obs = MAKERS[family](), observations(3)
    plain, _ = agent.predict(obs, deterministic=True)
    for wanted in (-0.5, 0.5):
        agent.objective = torque(wanted)
        actions, memory = agent.predict(obs, deterministic=True)
        np.testing.assert_allclose(actions, 2.0 * wanted, atol=0.1)  # the environment's torques reach up to 2
    agent.objective = torque(-0.5)  # in the middle of an episode: the last plan only initialises the search
    actions, _ = agent.predict(obs, memory, deterministic=True)
    np.testing.assert_allclose(actions, -1.0, atol=0.1)
    sampled, _ = agent.predict(obs)
    np.testing.assert_allclose(sampled, -1.0, atol=0.3)
    alone, _ = agent.predict(obs[1:2], deterministic=True)
    np.testing.assert_allclose(alone[0], actions[1], atol=0.1)
    agent.objective = None
    np.testing.assert_array_equal(agent.predict(obs, deterministic=True)[0], plain)
    given = MAKERS[family](objective=torque(0.25))
    np.testing.assert_allclose(given.predict(obs, deterministic=True)[0], 0.5, atol=0.1)


def test_files_do_not_contain_the_objective_and_load_takes_it_again(tmp_path: Path) -> None:
    def objective(trajectory: PlannedTrajectory) -> Tensor:
        return -(trajectory.actions[..., 0] - 0.5).square()

    agent, obs = make_planner(**DEPTH), observations(2)
    plain, _ = agent.predict(obs, deterministic=True)
    agent.objective = objective
    agent.save(tmp_path / "agent")

    assert (agent.objective, WorldFluxAgent.load(tmp_path / "agent").objective) == (objective, None)
    np.testing.assert_array_equal(WorldFluxAgent.load(tmp_path / "agent").predict(obs, deterministic=True)[0], plain)
    loaded = WorldFluxAgent.load(tmp_path / "agent", objective=objective)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])
    further = WorldFluxAgent.load(tmp_path / "agent", objective=objective, planner_kwargs={**SEARCH, "horizon": 9})
    seen: list[Any] = []
    further.objective = lambda t: (seen.append(t.rewards.shape), t.rewards)[1]
    further.predict(obs)
    assert seen[0] == (9, 2 * 4)
    assert copy.deepcopy(agent).objective is objective


@pytest.mark.parametrize("make", [lambda **s: make_planner(planner=None, **s), make_agent], ids=["None", "auto"])
def test_an_agent_without_a_planner_takes_no_objective(make: Any) -> None:
    settings: dict[str, Any] = {"planner_kwargs": None}
    with pytest.raises(ConfigurationError, match=r"has an objective but no planner.*planner='mppi'"):
        make(objective=torque(0.0), **settings)
    agent = make(**settings)
    assert agent.objective is None
    with pytest.raises(ConfigurationError, match="has an objective but no planner"):
        agent.objective = torque(0.0)
    agent.objective = None


def test_an_objective_that_is_no_function_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="The objective is 'high', expected a function"):
        make_planner(objective="high")


# Learning with an objective


class Records(BaseCallback):
    """Keeps the actions, and calls a function at each step."""

    def __init__(self, at_step: Any = None) -> None:
        super().__init__()
        self.actions: list[float] = []
        self.at_step = at_step

    def _on_step(self) -> bool:
        self.actions.extend(self.locals["actions"][:, 0])
        if self.at_step is not None:
            self.at_step(self.model, self.num_timesteps)
        return True


@pytest.mark.parametrize("asynchronous", [False, True])
def test_learning_collects_with_the_objective_that_callbacks_set(asynchronous: bool) -> None:
    def switch(agent: Any, step: int) -> None:
        if step == 40:
            agent.objective = torque(-0.5)

    agent = make_planner(DummyVecEnv([lambda: make_env("Pendulum-v1")] * 2), planner_kwargs=SEARCH)
    agent.objective, seen = torque(0.5), Records(switch)
    agent.learn(60, seen, asynchronous=asynchronous)

    np.testing.assert_allclose(np.mean(seen.actions[24:40]), 1.0, atol=0.25)  # 20 random actions come first
    np.testing.assert_allclose(np.mean(seen.actions[42:]), -1.0, atol=0.25)
    assert agent.trainer.step_count > 0
    assert agent.replay_buffer is not None
    assert (agent.replay_buffer.sample(4, 4).rewards <= 0.0).all()  # those of the environment


def test_an_objective_beside_the_learner_is_the_very_object_that_was_given() -> None:
    class Objective:
        """Cannot be copied, and says which torque it wants when it is asked."""

        wanted, calls = 0.5, 0
        lock = threading.Lock()

        def __init__(self) -> None:
            self.own = threading.Lock()

        def __call__(self, trajectory: PlannedTrajectory) -> Tensor:
            self.calls += 1
            return torque(self.wanted)(trajectory)

    objective = Objective()
    make_planner(objective=objective, train_ratio=6).learn(30, asynchronous=True)
    assert objective.calls > 0


def test_an_error_of_an_objective_ends_learn_and_the_agent_stays_usable() -> None:
    def fails(trajectory: PlannedTrajectory) -> Tensor:
        raise ZeroDivisionError("mine")

    agent = make_planner(objective=fails)
    with pytest.raises(ZeroDivisionError, match="mine"):
        agent.learn(60)
    agent.objective = lambda t: t.rewards.log() * torch.nan
    with pytest.raises(TrainingError, match="objective '<lambda>' returned NaN"):
        agent.learn(60)
    agent.objective = RewardPlus(lambda t: -t.actions.square().sum(-1))
    assert agent.learn(60).num_timesteps == 60


# On CUDA


def test_with_an_objective_actions_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would keep the goal that the function had when it was captured."""
    plain, played = actors("tdmpc2:tiny", "vector", True, monkeypatch)
    expected = acted(plain, 2, True)
    acted(played, 2, True)
    assert played._captures is not None and played._captures.count == 2
    assert plain.planner is not None and played.planner is not None
    goal = {"action": 1.0}
    for actor in (plain, played):
        actor.planner.objective = lambda t: -(t.actions - goal["action"]).square().sum(-1)
    for goal["action"] in (1.0, -1.0):
        found = [memory.actions for memory in acted(played, 2, True)]
        torch.testing.assert_close(found, [memory.actions for memory in acted(plain, 2, True)])
        assert found[-1].mean() * goal["action"] > 0.2
    played.planner.objective = None
    torch.testing.assert_close([m.actions for m in acted(played, 2, True)], [m.actions for m in expected])
    assert played._captures.count == 2
