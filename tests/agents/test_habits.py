"""Objects that explain themselves, and what users of stable-baselines3 try out of habit."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import TINY, make_agent, make_planner
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy

from worldflux import State, WorldFluxAgent, create_world_model
from worldflux.agents.habits import COUNTERPARTS
from worldflux.agents.settings import SETTINGS
from worldflux.config import DreamerV3Config, TDMPC2Config
from worldflux.errors import ConfigurationError
from worldflux.models.base import WorldModel
from worldflux.training import Batch

OBS = np.zeros(4, np.float32)


# --- short descriptions


def test_an_agent_says_what_it_is_and_how_far() -> None:
    agent = make_agent()
    count = f"{sum(w.numel() for w in agent.model.parameters() if w.requires_grad):,}"
    start = (
        f"WorldFluxAgent(dreamerv3:tiny with {count} parameters, obs_shape=(4,), action_space=Discrete(2), n_envs=1, "
        "device='cpu', train_ratio=6, batches of 2 x 6"
    )
    assert repr(agent) == str(agent) == f"{start}, num_timesteps=0, n_updates=0)"
    agent.learn(20)
    assert repr(agent) == f"{start}, num_timesteps=20, n_updates={agent._n_updates})" and agent._n_updates > 0
    assert ", planner='mppi', num_timesteps=0, n_updates=0)" in repr(make_planner())


def test_what_an_agent_consists_of_describes_itself() -> None:
    agent = make_planner()
    assert repr(agent.trainer) == "Trainer(TDMPC2, batches of 4 x 4, learning_rate=0.0003, device='cpu', step_count=0)"
    assert repr(agent.schedule) == "UpdateSchedule(train_ratio=6, replayed_per_update=16, first_updates=7)"
    agent.learn(23)
    assert repr(agent.schedule).endswith("first_updates=7, env_steps=3)")
    assert repr(agent.actor.planner) == (
        "Planner(TDMPC2, PlannerConfig(horizon=3, num_samples=16, num_elites=4, num_pi_trajs=4, iterations=2, "
        "temperature=0.5, min_std=0.05, max_std=2.0, uniform_share=0.05, momentum=0.0, discount=None))"
    )
    assert repr(agent.replay_buffer) == (
        "ReplayBuffer(23 of 200 transitions, 0 episodes, obs_shape=(3,), action_dim=1, n_envs=1)"
    )


def test_data_show_their_shapes_and_never_their_values() -> None:
    lead = (2, 5)
    batch = Batch(
        obs={"image": torch.zeros(*lead, 3, 8, 8), "arm": torch.zeros(*lead, 4)},
        actions=torch.zeros(*lead, 2),
        rewards=torch.zeros(lead),
        terminations=torch.zeros(lead, dtype=torch.bool),
        row_ids=torch.zeros(lead, dtype=torch.int64),
    )
    assert repr(batch) == (
        "Batch(obs/image: [2, 5, 3, 8, 8], obs/arm: [2, 5, 4], actions: [2, 5, 2], rewards: [2, 5], "
        "terminations: [2, 5], device='cpu')"
    )
    assert repr(State({"deter": torch.zeros(2, 8), "stoch": torch.zeros(2, 4, 4)})) == (
        "State(deter: [2, 8], stoch: [2, 4, 4])"
    )


# --- policies


def test_the_policy_predicts_as_the_agent_does() -> None:
    agent = make_agent()
    action, state = agent.policy.predict(OBS, deterministic=True)
    expected, its = agent.predict(OBS, deterministic=True)
    assert action == expected and all(map(np.array_equal, state, its))
    again, _ = agent.policy.predict(OBS, state, np.array([False]), True)
    assert again == agent.predict(OBS, its, np.array([False]), True)[0]
    env = Monitor(gym.make("CartPole-v1"))
    scores = []
    for player in (agent, agent.policy):
        env.reset(seed=1)
        scores.append(evaluate_policy(player, env, 3, return_episode_rewards=True))
    assert scores[0] == scores[1]


def test_other_habits_with_a_policy() -> None:
    agent = make_agent()
    agent.policy.set_training_mode(False)
    assert not agent.policy.training
    agent.policy.set_training_mode(True)
    assert agent.policy.training
    tensor, several = agent.policy.obs_to_tensor(OBS)
    assert (tuple(tensor.shape), several) == ((1, 4), False)
    assert agent.policy.encode(tensor)["deter"].shape == (1, 32)
    assert set(agent.get_parameters()) >= {"policy"}
    assert agent.get_env() is agent.env and agent.observation_space.shape == (4,)


def test_a_copy_of_an_agent_has_a_policy_of_its_own_and_a_copy_of_a_model_none() -> None:
    agent = make_agent()
    twin = copy.deepcopy(agent)
    with torch.no_grad():
        for weight in twin.policy.parameters():
            weight.add_(torch.randn_like(weight))
    state = twin.policy.predict(OBS, deterministic=True)[1]
    assert all(map(np.array_equal, state, twin.predict(OBS, deterministic=True)[1]))
    assert not all(map(np.array_equal, state, agent.predict(OBS, deterministic=True)[1]))
    for model in (copy.deepcopy(agent.policy), pickle.loads(pickle.dumps(agent.policy))):
        assert isinstance(model, WorldModel)
        with pytest.raises(ConfigurationError, match="belongs to no agent"):
            model.predict(OBS)


def test_the_model_does_not_keep_its_agent_alive() -> None:
    agent = make_agent()
    model, gone = agent.model, weakref.ref(agent)
    agent.env.close()
    del agent
    gc.collect()
    assert gone() is None
    with pytest.raises(ConfigurationError, match="belongs to no agent"):
        model.predict(OBS)  # type: ignore[operator]


def test_a_models_own_method_is_kept() -> None:
    model = create_world_model("dreamerv3:tiny", obs_shape=(4,), action_dim=2, action_type="discrete", **TINY)
    own = type("Own", (type(model),), {"predict": lambda self: "mine"})
    model.__class__ = own
    assert WorldFluxAgent(model, "CartPole-v1", device="cpu").policy.predict() == "mine"  # type: ignore[operator]


# --- arguments


@pytest.mark.parametrize("algorithm", [PPO, SAC, DQN, TD3])
def test_every_argument_of_sb3_is_a_setting_or_has_advice(algorithm: Any) -> None:
    for name in list(inspect.signature(algorithm).parameters)[2:]:
        assert name in {*SETTINGS, "device", "_init_setup_model"} or name in COUNTERPARTS, name
        if name in COUNTERPARTS:
            with pytest.raises(ConfigurationError, match=f"^{name} is an argument of stable-baselines3's algorithms: "):
                WorldFluxAgent("dreamerv3:tiny", "CartPole-v1", **{name: None})


def test_advice_names_what_there_is() -> None:
    DreamerV3Config(discount_horizon=1 / (1 - 0.99), lambda_=0.9, entropy_scale=1e-3, slow_critic_rate=0.01)
    DreamerV3Config(loss_scales={"critic": 0.5}, grad_clip=0.5, units=256)
    TDMPC2Config(discount_min=0.99, discount_max=0.99, entropy_coef=1e-3, value_coef=0.5, tau=0.01, grad_clip=10.0)


def test_a_name_of_no_library_gets_the_nearest_setting() -> None:
    with pytest.raises(ConfigurationError, match="Unknown setting 'train_ration'; did you mean 'train_ratio'"):
        WorldFluxAgent("dreamerv3:tiny", "CartPole-v1", train_ration=64)


@pytest.mark.parametrize("model", ["MlpPolicy", "CnnPolicy", "MultiInputPolicy", ActorCriticPolicy])
def test_a_policy_in_place_of_the_model_is_explained(model: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"a policy of stable-baselines3\. Pass a preset"):
        WorldFluxAgent(model, "CartPole-v1", verbose=1)


def test_the_quick_start_of_sb3_works_line_by_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_agent(gym.make("CartPole-v1"))
    callback = EvalCallback(Monitor(gym.make("CartPole-v1")), eval_freq=20, best_model_save_path="best", verbose=0)
    model.learn(total_timesteps=40, callback=callback, log_interval=4)
    model.save("agent")
    del model
    model = WorldFluxAgent.load("agent", env=gym.make("CartPole-v1"))
    vec_env = model.get_env()
    assert vec_env is not None
    obs = vec_env.reset()
    for _ in range(5):
        action, _states = model.predict(obs, deterministic=True)
        obs, _rewards, _dones, _info = vec_env.step(action)
    assert WorldFluxAgent.load("best/best_model").num_timesteps in (20, 40)
