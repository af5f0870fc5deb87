"""NaN in a model: no action that is not finite is returned, and the error names the first broken tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers.sb3_families import BOX, FAMILIES, IMAGE, NUMBERS, AnySpaces, both, make
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from worldflux.agents import WorldFluxAgent
from worldflux.diagnostics.calibration import check_finite
from worldflux.diagnostics.open_loop import open_loop
from worldflux.envs import collect
from worldflux.errors import ShapeMismatchError, TrainingError, WorldFluxError

NAN = float("nan")
DISCRETE, SEVERAL = spaces.Discrete(3), spaces.MultiDiscrete([3, 2])
SEARCH = dict(num_samples=8, num_elites=2, num_pi_trajs=2, iterations=2)

WAYS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "DreamerV3": ("dreamerv3", (NUMBERS, BOX), {}),
    "DreamerV3, a choice": ("dreamerv3", (NUMBERS, DISCRETE), {}),
    "DreamerV3, choices": ("dreamerv3", (NUMBERS, SEVERAL), {}),
    "DreamerV3, images": ("dreamerv3", (IMAGE, DISCRETE), {}),
    "DreamerV3, planning": ("dreamerv3", (NUMBERS, BOX), {"planner": "mppi", "planner_kwargs": SEARCH}),
    "TD-MPC2, planning": ("tdmpc2", (NUMBERS, BOX), {}),
    "TD-MPC2, no proposals": ("tdmpc2", (NUMBERS, BOX), {"planner_kwargs": {**SEARCH, "num_pi_trajs": 0}}),
    "TD-MPC2, policy": ("tdmpc2", (NUMBERS, BOX), {"planner": None, "planner_kwargs": None}),
    "TD-MPC2, whole numbers": (
        "tdmpc2", (NUMBERS, spaces.Box(-3, 3, (2,), np.int64)), {"planner": None, "planner_kwargs": None},
    ),
}  # fmt: skip
"""The ways in which an agent acts: family, spaces, settings."""


@contextmanager
def broken(agent: WorldFluxAgent, name: str, value: float = NAN, index: Any = slice(None)) -> Iterator[None]:
    """Makes some values of a tensor not finite inside the block."""
    tensor = agent.model.get_parameter(name) if name in dict(agent.model.named_parameters()) else None
    tensor = agent.model.get_buffer(name) if tensor is None else tensor
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.view(-1)[index] = value
    try:
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(before)


def an_actors_tensor(agent: WorldFluxAgent) -> str:
    return next(name for name, _ in agent.model.named_parameters() if name.startswith("actor."))


@pytest.mark.parametrize("way", WAYS)
def test_each_broken_tensor_is_named_unless_the_action_does_not_depend_on_it(way: str) -> None:
    family, of, settings = WAYS[way]
    env = AnySpaces(*of)
    agent = make(family, env, **settings).learn(12)
    seen = [env.observation_space.sample() for _ in range(2)]

    def act() -> list[Any]:
        first, memory = agent.predict(seen[0], deterministic=True)
        return [first.tolist(), agent.predict(seen[1], memory, deterministic=True)[0].tolist()]

    right, named = act(), 0
    tensors = dict([*agent.model.named_parameters(), *agent.model.named_buffers()])
    for name in [name for name, tensor in tensors.items() if tensor.is_floating_point()]:
        with broken(agent, name, index=slice(0, 1)):
            try:
                assert act() == right, name
            except TrainingError as error:
                assert str(error).startswith(
                    f"The chosen action is not finite: of the model's weights '{name}' has 1 of"
                )
                named += 1
    assert named >= 18 and act() == right


@both
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_no_broken_action_reaches_an_environment(family: str, value: float) -> None:
    given: list[Any] = []

    class Watched(AnySpaces):
        def step(self, action: Any) -> Any:
            given.append(action)
            return super().step(action)

    agent = make(family, Watched(), train_ratio=2).learn(20)
    agent.train_ratio = 0
    del given[:]
    name = next(name for name, _ in agent.model.named_parameters() if name.startswith("encoder."))
    with broken(agent, name, value):
        tries = [
            lambda: agent.predict(np.ones(3, np.float32)),
            lambda: agent.predict(np.ones((2, 3), np.float32), deterministic=True),
            lambda: agent.learn(5, reset_num_timesteps=False),
            lambda: evaluate_policy(agent, Watched(), n_eval_episodes=1),
            lambda: collect(Watched(), agent, steps=5),
            lambda: agent.learn(5, EvalCallback(DummyVecEnv([Watched]), eval_freq=1, verbose=0)),
            lambda: check_finite(open_loop(agent.model, agent.replay_buffer.sample(2, 4), 2)),
        ]
        for attempt in tries:
            with pytest.raises(TrainingError, match="not finite"):
                attempt()
    assert given == []
    assert agent.learn(5).num_timesteps == 5 and len(given) == 5  # it is as usable as before


@pytest.mark.parametrize("way", WAYS)
def test_learning_steps_no_environment_with_a_broken_action(way: str) -> None:
    family, of, settings = WAYS[way]
    agent = make(family, AnySpaces(*of), train_ratio=2, **settings).learn(16)
    agent.train_ratio = 0
    with broken(agent, an_actors_tensor(agent)):
        for _ in range(2):
            with pytest.raises(
                TrainingError, match=r"The chosen action is not finite: of the model's weights 'actor\."
            ):
                agent.learn(5, reset_num_timesteps=False)
    assert agent.num_timesteps == agent.replay_buffer.num_transitions == 16


def test_a_broken_state_is_named_unless_an_episode_begins_there() -> None:
    agent, obs = make("dreamerv3"), np.zeros((3, 3), np.float32)
    _, memory = agent.predict(obs)
    for place, name in enumerate(["deter", "logits", "stoch", "actions"]):
        spoilt = tuple(array.copy() for array in memory)
        spoilt[place][1] = NAN
        if name != "logits":  # which are told, not used
            with pytest.raises(TrainingError, match=rf"of the state before '{name}' has .* Pass what predict returned"):
                agent.predict(obs, spoilt)
        actions, after = agent.predict(obs, spoilt, np.array([False, True, False]), deterministic=True)
        assert all(np.isfinite(array).all() for array in (actions, *after))


def test_what_overflows_without_broken_weights_says_how_large_it_is() -> None:
    agent = make("tdmpc2", planner=None, planner_kwargs=None)
    message = r"all weights are finite, up to 1e\+38, and so is the observation, up to 9, .* overflows\. Scale"
    with broken(agent, "encoder.parts.0.0.weight", 1e38), pytest.raises(TrainingError, match=message):
        agent.predict(np.full(3, 9.0, np.float32))


@both
@pytest.mark.parametrize("value", [NAN, np.inf])
def test_an_observation_that_is_not_finite_is_called_so(family: str, value: float) -> None:
    class Spoilt(AnySpaces):
        def step(self, action: Any) -> Any:
            obs, *rest = super().step(action)
            return (np.full(3, value, np.float32) if self.t == 3 else obs), *rest

    agent = make(family, Spoilt())
    message = "observation contains NaN or infinite values, expected finite numbers"
    with pytest.raises(ShapeMismatchError, match=message):
        agent.predict(np.array([0, value, 0], np.float32))
    for env in (Spoilt(), VecNormalize(DummyVecEnv([Spoilt]))):
        with pytest.raises(WorldFluxError, match=r"observation.*NaN|obs .*(nan|inf)"):
            make(family, env, learning_starts=2).learn(20)


class Wrong(WorldFluxAgent):
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        actions, state = super().predict(*args, **kwargs)
        return np.full_like(actions, NAN), state


def test_an_agents_own_predict_that_gives_nan_is_called_so() -> None:
    settings = {**FAMILIES["dreamerv3"], "learning_starts": 0, "buffer_size": 300, "device": "cpu"}
    agent = Wrong("dreamerv3:tiny", AnySpaces(), **settings)
    with pytest.raises(TrainingError, match="The agent's own predict chose an action that is not finite"):
        agent.learn(5)


# --- weights that break while they are learned


class Breaks(BaseCallback):
    """Breaks a tensor after some steps, as a bad gradient does."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _on_step(self) -> bool:
        if self.num_timesteps == 15:
            with torch.no_grad():
                self.model.model.get_parameter(self.name).fill_(NAN)
        return True


@both
def test_a_loss_is_blamed_before_the_action_that_follows_from_it(family: str) -> None:
    agent = make(family, train_ratio=8)
    with pytest.raises(TrainingError, match=r"(is|are) not finite at gradient step \d+\. Check the data"):
        agent.learn(40, Breaks(an_actors_tensor(agent)))


@both
def test_an_agent_that_only_acts_names_the_tensor(family: str) -> None:
    agent = make(family, train_ratio=2).learn(14)
    agent.train_ratio = 0
    name = an_actors_tensor(agent)
    with pytest.raises(TrainingError, match=rf"The chosen action is not finite: of the model's weights '{name}' has"):
        agent.learn(20, Breaks(name))


@both
def test_broken_weights_are_not_saved(family: str, tmp_path: Path) -> None:
    agent = make(family).learn(14)
    agent.save(tmp_path / "agent.zip")
    before = (tmp_path / "agent.zip").read_bytes()
    name = an_actors_tensor(agent)
    with broken(agent, name, index=slice(0, 1)):
        for save, target in (
            (agent.save, "agent.zip"),
            (agent.save_checkpoint, "new"),
            (agent.trainer.save_checkpoint, "t"),
        ):
            with pytest.raises(TrainingError, match=rf"Nothing is saved: of the model's weights '{name}' has 1 of"):
                save(tmp_path / target)
    assert (tmp_path / "agent.zip").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["agent.zip"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", ["DreamerV3, a choice", "TD-MPC2, planning"])
def test_recorded_acting_on_cuda_names_the_tensor_too(way: str) -> None:
    family, of, settings = WAYS[way]
    agent = make(family, AnySpaces(*of), **{**settings, "device": "cuda"}).learn(20)
    obs = np.zeros(3, np.float32)
    for _ in range(4):  # recorded by now
        agent.predict(obs)
    name = an_actors_tensor(agent)
    with broken(agent, name), pytest.raises(TrainingError, match=f"of the model's weights '{name}' has"):
        agent.predict(obs)
    assert np.isfinite(agent.predict(obs)[0]).all()
