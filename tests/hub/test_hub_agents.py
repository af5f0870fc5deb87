"""Agents on the Hugging Face Hub: what is pushed, the card, and what is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import PLANNING, make_agent
from helpers.hub import Hub, point_to
from huggingface_hub import ModelCard, constants

from worldflux import HubError, WorldFluxAgent, create_world_model
from worldflux.cli.main import main
from worldflux.errors import CheckpointError
from worldflux.hub.cards import without_folders

NAME, ADDRESS = "ann/cartpole", "hf://ann/cartpole"
AGENT_FILES = {"agent.json", "config.json", "model.safetensors", "worldflux.json"}
OBS = np.array([[0.1, -0.2, 0.03, 0.4], [-1.0, 0.5, 0.1, -2.0]], np.float32)


@pytest.fixture(scope="module")
def agent() -> WorldFluxAgent:
    """An agent that has taken gradient steps."""
    return make_agent().learn(60)


def parameters(agent: WorldFluxAgent) -> dict[str, torch.Tensor]:
    return dict(agent.model.state_dict())


def assert_same(one: WorldFluxAgent, other: WorldFluxAgent) -> None:
    """Compares the parameters, and actions in two steps of two environments."""
    torch.testing.assert_close(parameters(one), parameters(other), rtol=0, atol=0)
    found = []
    for agent in (one, other):
        first, state = agent.predict(OBS, deterministic=True)
        second, state = agent.predict(OBS[::-1], state, deterministic=True)
        found.append((first, second, *(state or ())))
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_pushed_agent_loads_and_acts_the_same(hub: Hub, agent: WorldFluxAgent) -> None:
    assert agent.push_to_hub(NAME) == f"{hub.url}/{NAME}"
    loaded = WorldFluxAgent.load(ADDRESS)
    assert_same(agent, loaded)
    assert (loaded.num_timesteps, loaded._n_updates) == (60, agent._n_updates) and agent._n_updates > 0
    assert loaded.trainer.step_count == agent.trainer.step_count
    model = create_world_model(ADDRESS)
    torch.testing.assert_close(dict(model.state_dict()), parameters(agent), rtol=0, atol=0)


def test_only_json_safetensors_and_the_card_are_pushed_and_only_these_are_downloaded(
    hub: Hub, agent: WorldFluxAgent
) -> None:
    agent.push_to_hub(NAME)
    assert hub.files(NAME).keys() - {".gitattributes"} == AGENT_FILES | {"README.md"}
    hub.files(NAME)["optimizer.pt"] = hub.files(NAME)["agent.pkl"] = b"a pickle"
    WorldFluxAgent.load(ADDRESS)
    assert set(hub.downloads()) == AGENT_FILES


def test_a_loaded_agent_goes_on_learning_with_a_new_optimiser(hub: Hub, agent: WorldFluxAgent) -> None:
    agent.push_to_hub(NAME)
    loaded = WorldFluxAgent.load(ADDRESS, "CartPole-v1")
    before = {name: tensor.clone() for name, tensor in parameters(loaded).items()}
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded.num_timesteps == 120 and loaded._n_updates > agent._n_updates
    assert any(not torch.equal(before[name], tensor) for name, tensor in parameters(loaded).items())
    loaded.push_to_hub(NAME)
    assert_same(WorldFluxAgent.load(ADDRESS), loaded)
    with pytest.raises(CheckpointError, match="hf://ann/cartpole holds no replay data, so it cannot be resumed"):
        WorldFluxAgent.load(ADDRESS, "CartPole-v1", resume=True)


def test_a_planning_agent_and_its_parameters_come_back(hub: Hub) -> None:
    agent = WorldFluxAgent("tdmpc2:tiny", "Pendulum-v1", **PLANNING).learn(30)
    agent.push_to_hub("ann/pendulum")
    loaded, obs = WorldFluxAgent.load("hf://ann/pendulum"), np.array([1.0, 0.0, 0.5], np.float32)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])
    other = WorldFluxAgent("tdmpc2:tiny", "Pendulum-v1", **{**PLANNING, "seed": 1})
    other.set_parameters("hf://ann/pendulum")
    torch.testing.assert_close(parameters(other), parameters(agent), rtol=0, atol=0)


def test_the_model_is_a_start_for_another_agent(hub: Hub, agent: WorldFluxAgent) -> None:
    agent.push_to_hub(NAME)
    other = WorldFluxAgent(ADDRESS, "CartPole-v1", train_ratio=0, buffer_size=100, device="cpu")
    torch.testing.assert_close(parameters(other), parameters(agent), rtol=0, atol=0)
    assert other.num_timesteps == 0


def test_a_copy_of_a_repository_loads_from_the_disk(hub: Hub, agent: WorldFluxAgent, tmp_path: Path) -> None:
    agent.push_to_hub(NAME)
    (tmp_path / "copy").mkdir()
    for name, content in hub.files(NAME).items():
        (tmp_path / "copy" / name).write_bytes(content)
    hub.requests.clear()
    assert_same(WorldFluxAgent.load(tmp_path / "copy"), agent)
    assert hub.requests == []


# --- the card


def card(hub: Hub) -> ModelCard:
    return ModelCard(hub.files(NAME)["README.md"].decode())


def test_the_card_has_the_score_with_its_protocol(hub: Hub, agent: WorldFluxAgent) -> None:
    agent.push_to_hub(NAME, eval_env="CartPole-v1", n_eval_episodes=3, eval_seed=7)
    found, score = card(hub), json.loads(hub.files(NAME)["worldflux.json"])["score"]
    assert found.data.library_name == "worldflux" and found.data.pipeline_tag == "reinforcement-learning"
    assert {"reinforcement-learning", "world-model", "dreamerv3", "CartPole-v1"} <= set(found.data.tags)
    (result,) = found.data.eval_results
    assert (result.task_type, result.dataset_name) == ("reinforcement-learning", "CartPole-v1")
    assert (result.metric_type, result.metric_value) == ("mean_reward", f"{score['mean']:.2f} +/- {score['std']:.2f}")
    assert result.metric_args == {"episodes": 3, "deterministic": True, "seed": 7}
    assert score["mean"] == score["length"] > 5  # every step earns 1
    assert "| 3 |" in found.text and f"| CartPole-v1 | {score['mean']:.4g} |" in found.text
    assert 'WorldFluxAgent.load("hf://ann/cartpole")' in found.text
    assert "from 60 environment steps" in found.text and "with the seed 0" in found.text


def test_the_same_seed_gives_the_same_score(hub: Hub, agent: WorldFluxAgent) -> None:
    scores = []
    for seed in (7, 7, 8):
        agent.push_to_hub(NAME, eval_env="CartPole-v1", n_eval_episodes=4, eval_seed=seed)
        scores.append(json.loads(hub.files(NAME)["worldflux.json"])["score"]["mean"])
    assert scores[0] == scores[1] != scores[2]


def test_without_an_evaluation_the_card_claims_none(hub: Hub, agent: WorldFluxAgent) -> None:
    agent.push_to_hub(NAME)
    assert card(hub).data.eval_results is None
    assert "The agent was not evaluated. The last" in card(hub).text and "actions are sampled" in card(hub).text


def test_the_code_in_the_card_runs(hub: Hub, agent: WorldFluxAgent) -> None:
    agent.push_to_hub(NAME)
    names: dict[str, Any] = {}
    exec(card(hub).text.split("```python\n")[1].split("```")[0], names)
    assert names["over"] and names["agent"].num_timesteps == 60


def test_options_of_the_environment_stand_in_the_card(hub: Hub) -> None:
    env = gym.wrappers.ClipReward(gym.make("CartPole-v1", sutton_barto_reward=True, max_episode_steps=50), 0, 1)
    make_agent(env, train_ratio=0).push_to_hub(NAME)
    assert 'make_env("CartPole-v1", sutton_barto_reward=True, max_episode_steps=50)' in card(hub).text
    assert "| wrappers | ClipReward |" in card(hub).text
    assert "worldflux eval" not in card(hub).text and main(["eval", ADDRESS, "--episodes", "1"]) == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("train tdmpc2:tiny /home/ann/my/env.py:MyEnv --steps 9", "train tdmpc2:tiny env.py:MyEnv --steps 9"),
        ("train dreamerv3:tiny dmc/walker-walk --set x=/data/ann/y", "train dreamerv3:tiny dmc/walker-walk --set x=y"),
        (r"train C:\Users\ann\model dmc/walker-walk", "train model dmc/walker-walk"),
        ("train ~/model ./here runs/1", "train model ./here runs/1"),
    ],
)
def test_directories_of_the_user_are_not_published(text: str, shown: str) -> None:
    assert without_folders(text) == shown


# --- revisions and the cache


def test_revisions_are_branches_and_commits(hub: Hub, agent: WorldFluxAgent) -> None:
    agent.push_to_hub(NAME)
    first = hub.repositories[NAME].branches["main"]
    changed = make_agent(seed=1)
    changed.push_to_hub(NAME, branch="experiment", commit_message="Try another seed")
    assert hub.repositories[NAME].messages[-1] == "Try another seed"
    assert_same(WorldFluxAgent.load(ADDRESS), agent)
    assert_same(WorldFluxAgent.load(f"{ADDRESS}@experiment"), changed)
    changed.push_to_hub(NAME)
    assert_same(WorldFluxAgent.load(ADDRESS), changed)
    assert_same(WorldFluxAgent.load(f"{ADDRESS}@{first}"), agent)


def test_what_is_in_the_cache_loads_without_the_hub(
    hub: Hub, agent: WorldFluxAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.push_to_hub(NAME)
    create_world_model(ADDRESS)
    assert set(hub.downloads()) == AGENT_FILES  # an agent, too, can be loaded from the cache now
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert_same(WorldFluxAgent.load(ADDRESS), agent)
    assert hub.requests == []
    with pytest.raises(HubError, match=r"hf://ann/other is not in the cache, and HF_HUB_OFFLINE is set"):
        WorldFluxAgent.load("hf://ann/other")
    with pytest.raises(HubError, match=r"'ann/cartpole' cannot be reached, because HF_HUB_OFFLINE is set"):
        agent.push_to_hub(NAME)


def test_a_dead_network_is_named_and_the_cache_helps(
    hub: Hub, agent: WorldFluxAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.push_to_hub(NAME)
    WorldFluxAgent.load(ADDRESS)
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert_same(WorldFluxAgent.load(ADDRESS), agent)
    with pytest.raises(HubError, match=r"hf://ann/other is not in the cache, and the Hub cannot be reached \("):
        WorldFluxAgent.load("hf://ann/other")
    with pytest.raises(HubError, match=r"Hub cannot be reached for 'ann/cartpole' \(.*refused.*Check the connection"):
        agent.push_to_hub(NAME)
