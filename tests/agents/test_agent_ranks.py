"""An agent that learns on several ranks: one training, of which each rank has its own environments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import agent_env, agent_of, learning, on_ranks

from worldflux import WorldFluxAgent
from worldflux.envs import make_vec_env

FAMILIES = ("dreamerv3", "tdmpc2")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("learned")
    return directory, on_ranks(2, learning, directory / "out", directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_gradient_steps_and_episodes_count_over_all_ranks(learned: Any, family: str) -> None:
    first, second = (one[family] for one in learned[1])
    alone = agent_of(family)
    alone.learn(120)
    for one in (first, second):
        assert one["steps"] == list(range(4, 121, 4))
        assert one["stored"] == 60
    assert first["updates"] == second["updates"] == pytest.approx(alone._n_updates, abs=8)
    assert first["episodes"] == second["episodes"] == len(first["returns"])
    assert first["returns"] == second["returns"]


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_have_equal_models_and_different_experience(learned: Any, family: str) -> None:
    first, second = (one[family] for one in learned[1])
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight), name
    assert not np.array_equal(first["rewards"], second["rewards"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_ranks_resumes_with_the_replay_data_of_each_and_reproducibly(learned: Any, family: str) -> None:
    for one in learned[1]:
        assert one[family]["resumed steps"] == [160, 160]
        assert one[family]["resumed stored"] == [80, 80]
        again, once_more = one[family]["resumed"]
        for name, weight in again.items():
            assert torch.equal(once_more[name], weight), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_ranks_goes_on_in_one_process_with_all_of_its_data(learned: Any, family: str) -> None:
    env = make_vec_env(agent_env(family), 2)
    agent = WorldFluxAgent.load(learned[0] / family, env, device="cpu", resume=True)
    assert agent.num_timesteps == 120 and agent.replay_buffer.num_transitions == 120
    agent.learn(8, reset_num_timesteps=False)
    assert agent.num_timesteps == 128
    acting = WorldFluxAgent.load(learned[0] / family / "agent.zip")
    for name, weight in acting.model.state_dict().items():
        assert torch.equal(learned[1][0][family]["weights"][name], weight), name
