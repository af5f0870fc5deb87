"""WorldFluxAgent with TD-MPC2: planning, the random start, and what follows from the length of episodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers.agents import PLAN, TINY, TINY_TDMPC2, make_planner, trained_on
from helpers.envs import CountingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from worldflux import create_world_model
from worldflux.agents import WorldFluxAgent
from worldflux.agents.collecting import max_vec_episode_steps
from worldflux.config import PlannerConfig
from worldflux.envs import make_env, make_vec_env
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.interop import load_official_tdmpc2
from worldflux.models.planning import Planner
from worldflux.models.tdmpc2.world_model import TDMPC2

OFFICIAL = Path(__file__).parent.parent / "golden" / "tdmpc2_state_official.pt"


def make_agent(env: Any = "Pendulum-v1", **settings: Any) -> WorldFluxAgent:
    """An agent that takes a gradient step for each environment step."""
    return make_planner(env, **{"train_ratio": 16, "buffer_size": 1000, **settings})


def observations(rows: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(rows, 3)).astype(np.float32)


def at_each_plan(agent: WorldFluxAgent, look: Callable[[], Any]) -> list[Any]:
    """The values of `look()` each time that the agent plans, from now on."""
    seen: list[Any] = []
    act = agent.actor.act
    agent.actor.act = lambda *args, **kwargs: (seen.append(look()), act(*args, **kwargs))[1]  # type: ignore[method-assign]
    return seen


@pytest.fixture(scope="module")
def trained() -> WorldFluxAgent:
    """Shared by tests that change nothing in it."""
    return make_agent().learn(60)


# --- the schedule of the paper


def test_the_start_is_random_and_its_gradient_steps_are_made_up_for() -> None:
    agent = make_agent()
    planned = at_each_plan(agent, lambda: agent.num_timesteps)

    agent.learn(20)
    assert (planned, agent._n_updates) == ([], 20)  # one for each of the first 20 steps, at their end
    agent.learn(5, reset_num_timesteps=False)
    assert (planned, agent._n_updates) == ([20, 21, 22, 23, 24], 25)


def test_no_plan_is_made_before_the_random_start_was_learned_from() -> None:
    agent = make_agent(make_vec_env("Pendulum-v1", 2, processes=True))
    updates = at_each_plan(agent, lambda: agent._n_updates)
    agent.learn(28)
    assert updates == [20, 22, 24]  # a step of two environments owes two, which are paid during the next one


def test_the_pretraining_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    told = "one gradient step per environment step (train_ratio 16, batches of 4 x 4)"
    agent = make_agent().learn(20)
    assert f"{told}, and 20 at once after 20 random steps\n" in capsys.readouterr().err
    agent.learn(50)
    assert f"{told}\n" in capsys.readouterr().err


def test_random_actions_fill_the_whole_space() -> None:
    agent = make_agent(learning_starts=300).learn(290)
    assert agent.replay_buffer is not None
    actions = agent.replay_buffer.sample(50, 4).actions
    assert actions.min() < -0.95 and actions.max() > 0.95 and abs(actions.mean()) < 0.2


def test_one_gradient_step_follows_each_step_of_each_environment() -> None:
    agent = make_agent(make_vec_env("Pendulum-v1", 3)).learn(60)
    # 20 are owed by the random start, which ends after 21 steps, and one by each of the 39 that follow.
    assert agent._n_updates == 20 + 39


def test_the_numbers_are_the_papers() -> None:
    agent = make_agent(
        batch_size=None, learning_starts=None, train_ratio=None, buffer_size=None, planner_kwargs=None, model_kwargs={}
    )
    assert (agent.batch_size, agent.seq_len, agent.buffer_size) == (256, 4, 1_000_000)
    assert agent.learning_starts == 1000 == agent.schedule.first_updates  # five episodes of 200
    assert agent.schedule.env_steps_per_update == 1.0
    assert agent.learning_rate == 3e-4 and agent.trainer.config.grad_clip == 20.0
    assert agent.planner == "mppi"


def test_batches_of_any_size_are_trained_on_once_for_each_environment_step() -> None:
    agent = make_agent(batch_size=7, seq_len=9, train_ratio=None)
    assert agent.train_ratio == 63.0 and agent.schedule.env_steps_per_update == 1.0


def test_windows_are_drawn_at_random_from_the_beginning() -> None:
    agent = make_agent()
    batches = trained_on(agent)
    agent.learn(20)
    # Windows that nobody has seen yet, each beginning where the last one ends, would come first for DreamerV3.
    assert batches[0].row_ids is not None and batches[0].row_ids[:, 0].tolist() != [0, 4, 8, 12]


# --- what the environment says


@pytest.mark.parametrize(
    ("name", "options", "steps", "discount"),
    [
        ("Pendulum-v1", {}, 200, 0.975),
        ("Pendulum-v1", {"action_repeat": 4}, 50, 0.95),
        ("dmc/cartpole-balance", {}, 500, 0.99),
        ("dmc/cartpole-balance", {"action_repeat": 1}, 1000, 0.995),
    ],
)
def test_the_discount_follows_from_the_length_of_episodes(name: str, options: Any, steps: int, discount: float) -> None:
    env = make_env(name, **options)
    assert max_vec_episode_steps(DummyVecEnv([lambda: env])) == steps
    assert make_agent(env).model.config.discounts == (discount,)


def test_without_a_time_limit_the_discount_is_the_presets() -> None:
    assert make_agent(Monitor(CountingEnv())).model.config.episode_length == 500


def limited() -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(CountingEnv(), 300)


@pytest.mark.parametrize(
    "envs", [Monitor(limited()), DummyVecEnv([limited, limited]), gym.vector.SyncVectorEnv([limited, limited])]
)
def test_a_time_limit_around_an_environment_without_a_spec_is_found(envs: Any) -> None:
    assert make_agent(envs).model.config.episode_length == 300


def test_fields_that_are_given_go_before_the_environments() -> None:
    agent = make_agent(model_kwargs={**TINY_TDMPC2, "episode_length": 1000, "episodic": False})
    assert agent.model.config.discounts == (0.995,) and agent.model.termination_head is None


@pytest.mark.parametrize(("ends", "seen"), [("terminate", 1.0), ("truncate", 0.0), ("both", 1.0)])
def test_the_termination_head_switches_itself_on_at_the_first_termination(ends: str, seen: float) -> None:
    agent = make_agent(Monitor(CountingEnv(lengths=(6,), ends=(ends,)))).learn(40)
    assert agent.model.termination_seen.item() == seen
    continues = agent.model.rollout(agent.model.initial_state(5), torch.zeros(2, 5, 1)).continues
    assert bool((continues < 1).any()) is bool(seen)


def test_episodes_shorter_than_the_horizon_are_learned_from() -> None:
    agent = make_agent(Monitor(CountingEnv(lengths=(1, 2), ends=("terminate", "truncate")))).learn(60)
    assert agent._n_updates == 60
    assert np.isfinite([float(loss) for loss in agent.last_losses.values()]).all()


# --- acting


def test_deterministic_plans_draw_no_random_numbers_and_depend_on_their_row_alone(trained: WorldFluxAgent) -> None:
    obs = observations(4)
    before = torch.get_rng_state()
    together, memory = trained.predict(obs, deterministic=True)
    assert torch.equal(before, torch.get_rng_state())
    again, memory = trained.predict(obs, memory, deterministic=True)
    for row in range(4):
        alone, own = trained.predict(obs[row], deterministic=True)
        # Matrix products of other sizes round differently; nothing else may differ.
        np.testing.assert_allclose(alone, together[row], atol=1e-5)
        np.testing.assert_allclose(trained.predict(obs[row], own, deterministic=True)[0], again[row], atol=1e-5)


def test_a_plan_goes_on_within_an_episode_and_starts_anew_with_the_next(trained: WorldFluxAgent) -> None:
    obs = observations(2)
    fresh, memory = trained.predict(obs, deterministic=True)
    plan = memory[-1]
    assert plan.shape == (2, 3, 1) and np.abs(plan).max() > 0
    _, continued = trained.predict(obs, memory, deterministic=True)
    restarted, partly = trained.predict(obs, memory, np.array([True, False]), deterministic=True)
    np.testing.assert_array_equal(partly[-1][0], plan[0])
    np.testing.assert_array_equal(partly[-1][1], continued[-1][1])
    np.testing.assert_array_equal(restarted[0], fresh[0])
    assert not np.array_equal(continued[-1], plan)


def test_without_a_planner_the_policy_prior_acts() -> None:
    agent = make_agent(planner=None).learn(40)
    obs = observations(3)
    actions, memory = agent.predict(obs, deterministic=True)
    with torch.no_grad():
        prior = agent.model.policy(agent.model.encode(torch.from_numpy(obs), deterministic=True), deterministic=True)
    np.testing.assert_allclose(actions, 2.0 * prior.numpy(), rtol=1e-6)  # Pendulum's bounds are -2 and 2
    assert len(memory) == 2  # latent and actions, no plan


@pytest.mark.parametrize("planner", ["mppi", "cem"])
def test_dreamerv3_plans_with_the_same_planners(planner: str) -> None:
    settings: dict[str, Any] = dict(
        seq_len=6, batch_size=2, train_ratio=6, buffer_size=1000, model="dreamerv3:tiny", model_kwargs=TINY
    )
    agent = make_agent(planner=planner, **settings).learn(40)
    assert agent._n_updates > 5
    actions, memory = agent.predict(observations(2), deterministic=True)
    assert memory[-1].shape == (2, 3, 1)
    unplanned, _ = make_agent(planner=None, **settings).learn(40).predict(observations(2), deterministic=True)
    assert not np.array_equal(actions, unplanned)
    assert make_agent(**settings).planner is None
    discrete = make_agent("CartPole-v1", planner=planner, **settings).learn(30)
    _, memory = discrete.predict(np.zeros((2, 4), np.float32), deterministic=True)
    np.testing.assert_allclose(memory[-1].sum(-1), 1.0, rtol=1e-5)  # probabilities of both actions


@pytest.mark.parametrize("planner", ["mppi", None])
def test_discrete_actions_are_learned_saved_and_loaded(tmp_path: Path, planner: str | None) -> None:
    agent = make_agent("CartPole-v1", planner=planner).learn(60)
    assert isinstance(agent.model, TDMPC2) and agent.model.config.action_classes == (2,)
    assert agent.model.config.episodic and agent.model.termination_seen == 1.0  # poles have fallen
    agent.save(tmp_path / "agent.zip")
    loaded = WorldFluxAgent.load(tmp_path / "agent.zip", device="cpu")
    obs = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    (actions, memory), (again, remembered) = (one.predict(obs, deterministic=True) for one in (agent, loaded))
    np.testing.assert_array_equal(actions, again)
    assert actions.dtype == np.int64 and set(actions.tolist()) <= {0, 1}
    for mine, its in zip(memory, remembered, strict=True):
        np.testing.assert_array_equal(mine, its)
    assert len(memory) == (2 if planner is None else 3)
    sampled = {tuple(agent.predict(obs)[0]) for _ in range(5)}
    assert len(sampled) > 1


def test_a_memory_of_an_agent_without_a_plan_is_refused(trained: WorldFluxAgent) -> None:
    _, memory = trained.predict(observations(2), deterministic=True)
    with pytest.raises(ShapeMismatchError, match="expected the 3 arrays that predict returned: latent, actions, plan"):
        trained.predict(observations(2), memory[:-1])


def test_evaluation_over_several_environments(trained: WorldFluxAgent) -> None:
    scores = []
    for _ in range(2):
        envs = make_vec_env("Pendulum-v1", 3, seed=1)
        returns, lengths = evaluate_policy(trained, envs, n_eval_episodes=3, return_episode_rewards=True)
        assert lengths == [200, 200, 200] and len(set(returns)) == 3 and max(returns) < 0
        scores.append(returns)
    assert scores[0] == scores[1]


# --- files and settings


def test_gradient_steps_that_an_interruption_left_are_taken_later(tmp_path: Path, monkeypatch: Any) -> None:
    agent = make_agent()
    step = agent.trainer.step

    def interrupted(*args: Any) -> Any:
        if agent._n_updates == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(agent.trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(40)
    assert (agent.num_timesteps, agent._n_updates) == (20, 5)
    monkeypatch.undo()
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer.npz")

    loaded = WorldFluxAgent.load(tmp_path / "agent", "Pendulum-v1")
    loaded.learn(10, reset_num_timesteps=False)  # an empty buffer: nothing can be trained on yet
    assert loaded._n_updates == 5
    loaded.load_replay_buffer(tmp_path / "buffer.npz")
    for resumed in (loaded, agent):
        before = resumed.num_timesteps
        resumed.learn(4, reset_num_timesteps=False)
        assert (resumed.num_timesteps - before, resumed._n_updates) == (4, 20 + 4)
    collecting = WorldFluxAgent.load(tmp_path / "agent", "Pendulum-v1", train_ratio=0)
    collecting.load_replay_buffer(tmp_path / "buffer.npz")
    assert collecting.learn(4, reset_num_timesteps=False)._n_updates == 5


def test_a_loaded_agent_acts_the_same_and_starts_at_random_no_more(tmp_path: Path, trained: WorldFluxAgent) -> None:
    trained.save(tmp_path / "agent")
    loaded = WorldFluxAgent.load(tmp_path / "agent", make_vec_env("Pendulum-v1", 2))
    assert (loaded.planner, loaded.planner_kwargs) == ("mppi", PLAN)
    obs = observations(5)
    action, memory = trained.predict(obs, deterministic=True)
    loaded_action, loaded_memory = loaded.predict(obs, deterministic=True)
    np.testing.assert_array_equal(loaded_action, action)
    for one, other in zip(memory, loaded_memory, strict=True):
        np.testing.assert_array_equal(one, other)
    planned = at_each_plan(loaded, lambda: True)
    loaded.learn(4, reset_num_timesteps=False)
    assert len(planned) == 2
    assert WorldFluxAgent.load(tmp_path / "agent", planner=None).actor.planner is None
    other = WorldFluxAgent.load(tmp_path / "agent", planner="cem")
    assert other.actor.planner is not None and other.actor.planner.config.temperature is None
    assert not np.array_equal(other.predict(obs, deterministic=True)[0], action)
    other.save(tmp_path / "other")
    again = WorldFluxAgent.load(tmp_path / "other")
    assert again.planner == "cem" and again.actor.planner is not None
    assert again.actor.planner.config == other.actor.planner.config


def test_a_model_of_ones_own_is_planned_with() -> None:
    model = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1, **TINY_TDMPC2)
    agent = make_agent(model=model)
    assert agent.actor.planner is not None and agent.actor.planner.config.num_samples == 16
    own = WorldFluxAgent(model, "Pendulum-v1", planner_kwargs={"horizon": 5})
    assert own.predict(observations(1), deterministic=True)[1][-1].shape == (1, 5, 1)
    for planner in ("mppi", "cem"):
        again = make_agent(planner=planner, planner_kwargs={"discount": None, "temperature": None})
        assert again.actor.planner.config.discount is again.actor.planner.config.temperature is None


# --- official checkpoints


def official(**fields: Any) -> TDMPC2:
    return load_official_tdmpc2(OFFICIAL, **{"obs_shape": (9,), "action_dim": 3, **fields})


def spaces_of_the_checkpoint(**options: Any) -> CountingEnv:
    env = CountingEnv(action_space=spaces.Box(-1.0, 1.0, (3,)), **options)
    env.observation_space = spaces.Box(-np.inf, np.inf, (9,))
    env._obs = lambda: np.full(9, 0.1 * env.t, np.float32)  # type: ignore[method-assign]
    return env


def test_an_official_checkpoint_acts_at_once_and_is_saved_with_the_agent(tmp_path: Path) -> None:
    model = official()
    agent = WorldFluxAgent(model, Monitor(spaces_of_the_checkpoint()), device="cpu")
    obs = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    actions, _ = agent.predict(obs, deterministic=True)
    planner = Planner(model, PlannerConfig())
    planned, _ = planner.plan(model.encode(torch.from_numpy(obs)), planner.start(2), deterministic=True)
    np.testing.assert_array_equal(actions, planned)
    agent.save(tmp_path / "agent")
    np.testing.assert_array_equal(
        WorldFluxAgent.load(tmp_path / "agent", device="cpu").predict(obs, deterministic=True)[0], actions
    )


def test_an_official_checkpoint_goes_on_learning_where_episodes_terminate() -> None:
    model = official(episodic=True, use_decoder=True)
    assert model.termination_head is not None and model.termination_seen.item() == 0.0
    old = [p.clone() for p in model.dynamics.parameters()]
    for one, other in zip(official().dynamics.parameters(), old, strict=True):
        assert torch.equal(one, other)
    agent = make_agent(Monitor(spaces_of_the_checkpoint()), model=model).learn(30)
    assert agent.model.termination_seen.item() == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"planner": "best"}, "planner is 'best', expected 'mppi' or 'cem' to plan"),
        (
            {"planner": "cem", "planner_kwargs": {"temperature": 2.0}},
            "temperature=2.0, but planner='cem' gives all elites the same weight",
        ),
        (
            {"planner_kwargs": {"num_sample": 3}},
            "'num_sample' in planner_kwargs; did you mean 'num_samples'",
        ),
        ({"planner_kwargs": {"num_samples": 0}}, "num_samples is 0, expected a whole number from 1"),
        ({"planner_kwargs": {"num_samples": "many"}}, "num_samples is 'many', expected a"),
        ({"planner_kwargs": 5}, "planner_kwargs is 5, expected a dictionary"),
        ({"seq_len": 3}, "seq_len is 3, expected at least 4"),
    ],
)
def test_settings_of_the_planner_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_agent(**settings)
