"""An agent that learns on several ranks: one training, of which each rank has its own environments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ranks import agent_env, agent_of, learning, on_ranks

from worldflux import WorldFluxAgent
from worldflux.envs import make_vec_env


def test_agents_on_ranks_learn_together_and_resume(tmp_path: Path) -> None:
    learned = on_ranks(2, learning, tmp_path / "out", tmp_path)
    for family in ("dreamerv3", "tdmpc2"):
        first, second = (one[family] for one in learned)
        # Steps, gradient steps and episodes count over all ranks.
        alone = agent_of(family)
        alone.learn(80)
        for one in (first, second):
            assert one["steps"] == list(range(4, 81, 4))
            assert one["stored"] == 40
        assert first["updates"] == second["updates"] == pytest.approx(alone._n_updates, abs=8)
        assert first["episodes"] == second["episodes"] == len(first["returns"])
        assert first["returns"] == second["returns"]
        # The models are equal, and the experience differs.
        for name, weight in first["weights"].items():
            assert torch.equal(second["weights"][name], weight), name
        assert not np.array_equal(first["actions"], second["actions"])
        # Each rank resumes with its replay data, and reproducibly.
        for one in (first, second):
            assert one["resumed steps"] == [100, 100]
            assert one["resumed stored"] == [50, 50]
            again, once_more = one["resumed"]
            for name, weight in again.items():
                assert torch.equal(once_more[name], weight), name
        # A single process goes on with the data of both.
        env = make_vec_env(agent_env(family), 2)
        agent = WorldFluxAgent.load(tmp_path / family, env, device="cpu", resume=True)
        assert agent.replay_buffer is not None
        assert agent.num_timesteps == 80 and agent.replay_buffer.num_transitions == 80
        agent.learn(8, reset_num_timesteps=False)
        assert agent.num_timesteps == 88
        acting = WorldFluxAgent.load(tmp_path / family / "agent.zip")
        for name, weight in acting.model.state_dict().items():
            assert torch.equal(first["weights"][name], weight), name
