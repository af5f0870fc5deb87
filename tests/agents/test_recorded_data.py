"""Agents that learn from recorded data besides what they collect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import make_agent, make_planner, trained_on, weights

from worldflux.agents import WorldFluxAgent
from worldflux.envs import collect
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.training import ReplayBuffer

AGENTS = {"dreamerv3": (make_agent, "CartPole-v1"), "tdmpc2": (make_planner, "Pendulum-v1")}


@pytest.fixture(scope="module", params=AGENTS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    make, env = AGENTS[request.param]
    path = tmp_path_factory.mktemp("recorded") / "data.npz"
    collect(env, steps=400, seed=0).save(path)
    return make, path


def marked(path: Path) -> ReplayBuffer:
    """The recording, whose rewards say that they are of it."""
    with np.load(path) as file:
        arrays = dict(file)
    arrays["rewards"] = np.full_like(arrays["rewards"], 77.0)
    target = path.with_name("marked.npz")
    np.savez(target, **arrays)
    return ReplayBuffer.load(target)


def test_each_batch_has_the_share_of_recorded_windows(family: tuple[Any, Path]) -> None:
    make, path = family
    agent = make(buffer=marked(path), offline_share=0.25, batch_size=8, learning_starts=None, train_ratio=24)
    batches = trained_on(agent)
    agent.learn(40)
    assert agent.learning_starts == 0 and len(batches) > 10
    is_recorded = [int((batch.rewards == 77.0).any(1).sum()) for batch in batches]
    assert is_recorded[0] == 8 and is_recorded[-10:] == [2] * 10


def test_latents_go_to_the_buffer_that_a_window_came_from() -> None:
    recorded = collect("CartPole-v1", steps=60, seed=0)
    agent = make_agent(buffer=recorded, offline_share=0.5)
    agent.learn(80)
    for buffer in (recorded, agent.replay_buffer):
        assert buffer is not None
        assert set(buffer.extras) == {"deter", "stoch"}
        stored = buffer.sample(200, 1).extras["stoch"]
        assert float((stored > 0).all(-1).float().mean()) > 0.5


def test_a_planner_with_recorded_data_does_not_act_at_random_first(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    sample = gym.spaces.Box.sample
    monkeypatch.setattr(gym.spaces.Box, "sample", lambda *args: (drawn.append(1), sample(*args))[1])
    make_planner().learn(3)
    assert drawn
    data = collect("Pendulum-v1", steps=300, seed=0)
    drawn.clear()
    agent = make_planner(buffer=data)
    agent.learn(3)
    assert not drawn


def test_a_run_resumes_exactly_and_needs_the_same_data(family: tuple[Any, Path], tmp_path: Path) -> None:
    make, path = family
    agent = make(buffer=ReplayBuffer.load(path), offline_share=0.75)
    agent.learn(40).save_checkpoint(tmp_path / "checkpoint")
    env = agent.get_env()

    def resumed(**options: Any) -> WorldFluxAgent:
        return WorldFluxAgent.load(tmp_path / "checkpoint", env, device="cpu", resume=True, **options)

    ends = [resumed(buffer=ReplayBuffer.load(path, seed=seed)).learn(20, reset_num_timesteps=False) for seed in (1, 2)]
    assert torch.equal(weights(ends[0]), weights(ends[1]))
    assert [end._learner.offline_share for end in ends] == [0.75, 0.75]
    if make is make_agent:  # the latents that were stored beside the recorded rows are continued, too
        state = ReplayBuffer.load(path)
        again = resumed(buffer=state)
        assert set(state.extras_state()) == {"deter", "stoch"}
        for name, values in agent._learner.recorded.extras_state().items():
            assert torch.equal(values, again._learner.recorded.extras_state()[name])
    assert resumed(buffer=ReplayBuffer.load(path), offline_share=0.5)._learner.offline_share == 0.5
    with pytest.raises(ConfigurationError, match=r"learns from recorded data, too.*resume=True, buffer="):
        resumed()
    with pytest.raises(ConfigurationError, match="other data than the run has learned from"):
        resumed(buffer=marked(path))


def test_data_can_be_given_to_an_agent_later_and_taken_away() -> None:
    agent = make_agent()
    batches = trained_on(agent)
    agent.learn(50)
    taken = len(batches)
    agent.learn_from(collect("CartPole-v1", steps=60, seed=0), offline_share=1.0)
    agent.learn(10, reset_num_timesteps=False)
    assert len(batches) > taken and all((batch.row_ids < 0).all() for batch in batches[taken:])
    agent.learn_from(None)
    taken = len(batches)
    agent.learn(10, reset_num_timesteps=False)
    assert len(batches) > taken and all((batch.row_ids >= 0).all() for batch in batches[taken:])


def test_equal_seeds_give_equal_runs(family: tuple[Any, Path]) -> None:
    make, path = family
    first, second = (make(buffer=ReplayBuffer.load(path), seed=3).learn(25) for _ in range(2))
    assert torch.equal(weights(first), weights(second))


def test_a_part_of_a_buffer_serves_as_well(family: tuple[Any, Path]) -> None:
    make, path = family
    whole = ReplayBuffer.load(path, extras=make().model.replay_extras())
    part, _ = whole.split(0.3)
    batches = trained_on(agent := make(buffer=part, offline_share=1.0))
    agent.learn(20)
    assert batches and all((batch.row_ids < 0).all() for batch in batches)


def test_data_that_do_not_fit_are_refused() -> None:
    cartpole = collect("CartPole-v1", steps=100, seed=0)
    with pytest.raises(ShapeMismatchError, match=r"recorded data holds observations \(4,\) and 2 action numbers"):
        make_planner(buffer=cartpole)
    with pytest.raises(ConfigurationError, match=r"offline_share is 1.5, expected a share from 0 to 1"):
        make_agent(buffer=cartpole, offline_share=1.5)
    with pytest.raises(ConfigurationError, match=r"buffer is 'data.npz', expected recorded data: ReplayBuffer.load"):
        make_agent(buffer="data.npz")
    with pytest.raises(BufferError, match="No stream of the recorded data has the"):
        make_agent(buffer=collect("CartPole-v1", steps=2, seed=0))
    other = ReplayBuffer(100, (4,), 2, extras={"deter": ((3,), "float32")})
    with pytest.raises(ConfigurationError, match=r"has extras 'deter' of .*Load the data again"):
        make_agent(buffer=other)
