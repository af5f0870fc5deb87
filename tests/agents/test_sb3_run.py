"""Agents run, log, count, repeat a run with a seed, and stay silent in any environment, as SB3's algorithms do."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from helpers.agents import weights
from helpers.sb3_families import (
    BOX,
    DISCRETE_ACTIONS,
    FAMILIES,
    IMAGE,
    LENGTH,
    NUMBERS,
    OBSERVATIONS,
    AnySpaces,
    both,
    copies,
    make,
)
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from worldflux.agents import WorldFluxAgent
from worldflux.errors import ConfigurationError

# --- spaces


@both
@pytest.mark.parametrize("observed", OBSERVATIONS)
def test_every_kind_of_observation_is_learned_from(family: str, observed: str) -> None:
    agent = make(family, copies(2, OBSERVATIONS[observed]), train_ratio=1).learn(20)

    assert agent._n_updates > 0
    mean, _ = evaluate_policy(agent, agent.get_env(), n_eval_episodes=2)
    assert mean == LENGTH


@both
@pytest.mark.parametrize("acted", DISCRETE_ACTIONS)
def test_every_kind_of_action_is_taken(family: str, acted: str) -> None:
    agent = make(family, copies(2, NUMBERS, DISCRETE_ACTIONS[acted])).learn(20)

    assert agent._n_updates > 0
    assert evaluate_policy(agent, agent.get_env(), n_eval_episodes=2)[0] == LENGTH


@both
@pytest.mark.parametrize(
    ("observed", "acted", "message"),
    [
        (spaces.Dict({"inner": spaces.Dict({"x": NUMBERS})}), BOX, "Dict space, which is not supported"),
        (spaces.Tuple([NUMBERS, NUMBERS]), BOX, "Tuple space, which is not supported"),
        (NUMBERS, spaces.Dict({"x": BOX}), "Dict space, which is not supported"),
        (NUMBERS, spaces.Box(-np.inf, np.inf, (1,)), "no finite bounds"),
    ],
)
def test_spaces_that_nobody_supports_are_refused(family: str, observed: Any, acted: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(family, AnySpaces(observed, acted))


# --- vectorised environments and their wrappers


def plain() -> gym.Env[Any, Any]:
    return AnySpaces()


def monitored() -> gym.Env[Any, Any]:
    return Monitor(AnySpaces())


def of_images() -> DummyVecEnv:
    return DummyVecEnv([lambda: AnySpaces(IMAGE)] * 2)


def of_dictionaries() -> DummyVecEnv:
    return copies(2, OBSERVATIONS["dict"])


WRAPPED: dict[str, Any] = {
    "one environment": plain,
    "DummyVecEnv": lambda: DummyVecEnv([plain, plain]),
    "VecMonitor": lambda: VecMonitor(DummyVecEnv([plain, plain])),
    "VecCheckNan": lambda: VecCheckNan(copies(2), raise_exception=True),
    "VecNormalize": lambda: VecNormalize(copies(2)),
    "VecNormalize of a dictionary": lambda: VecNormalize(of_dictionaries(), norm_obs_keys=["numbers"]),
    "VecFrameStack": lambda: VecFrameStack(copies(2), n_stack=3),
    "VecFrameStack of images": lambda: VecFrameStack(of_images(), n_stack=2),
    "VecTransposeImage": lambda: VecTransposeImage(of_images()),
    "VecFrameStack of transposed images": lambda: VecFrameStack(VecTransposeImage(of_images()), n_stack=2),
    "VecExtractDictObs": lambda: VecExtractDictObs(of_dictionaries(), "numbers"),
    "all at once": lambda: VecNormalize(VecFrameStack(VecMonitor(VecCheckNan(DummyVecEnv([plain, plain]))), 2)),
}


@both
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrappers_of_sb3_are_learned_in_and_evaluated_in(family: str, wrapped: str) -> None:
    agent = make(family, WRAPPED[wrapped](), train_ratio=1).learn(20)

    env = agent.get_env()
    assert isinstance(env, VecEnv) and agent._n_updates > 0
    assert agent.replay_buffer.num_transitions == 20
    assert agent.replay_buffer.sample(20, 2).rewards.unique().tolist() in ([1.0], [0.0, 1.0])  # as the env gave them
    if isinstance(env, VecNormalize):
        env.training, env.norm_reward = False, False
    returns, lengths = evaluate_policy(agent, env, n_eval_episodes=2, return_episode_rewards=True, warn=False)
    assert list(returns) == [LENGTH] * 2 and lengths == [LENGTH] * 2


@pytest.fixture(scope="module")
def processes() -> Iterator[SubprocVecEnv]:
    """Two environments, whose processes take seconds to start."""
    env = SubprocVecEnv([monitored, monitored], start_method="forkserver")
    yield env
    env.close()


@both
def test_environments_in_processes_are_learned_in(family: str, processes: SubprocVecEnv) -> None:
    agent = make(family, processes).learn(20)

    assert agent._n_updates > 0 and evaluate_policy(agent, processes, n_eval_episodes=2)[0] == LENGTH


@both
def test_what_vec_normalize_knows_is_found(family: str) -> None:
    env = VecNormalize(copies(2))
    agent = make(family, env).learn(20)

    assert agent.get_vec_normalize_env() is env and agent.get_env() is env
    assert env.obs_rms.count == pytest.approx(22, abs=0.1)  # the first observations and those of 20 steps
    assert make(family).get_vec_normalize_env() is None


@both
def test_episodes_are_remembered_with_and_without_a_monitor(family: str) -> None:
    agent = make(family, copies(2), stats_window_size=3, train_ratio=0).learn(40)
    assert [(info["r"], info["l"]) for info in agent.ep_info_buffer] == [(LENGTH, LENGTH)] * 3
    assert list(agent.ep_success_buffer) == [True] * 3

    alone = make(family, AnySpaces(), train_ratio=0).learn(20)  # which SB3 monitors itself
    assert len(alone.ep_info_buffer) == 4
    unmonitored = make(family, DummyVecEnv([plain]), train_ratio=0).learn(20)
    assert len(unmonitored.ep_info_buffer) == 0 and len(unmonitored.ep_success_buffer) == 4


# --- logs

OF_SB3 = {
    "rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/success_rate", "time/episodes", "time/fps",
    "time/time_elapsed", "time/total_timesteps", "train/learning_rate", "train/n_updates",
}  # fmt: skip


@both
def test_csv_json_and_tensorboard_have_the_names_of_sb3(family: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    agent = make(family)
    agent.set_logger(configure(str(tmp_path), ["csv", "json", "tensorboard", "log"]))
    agent.learn(40, log_interval=2)

    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert set(lines[-1]) >= OF_SB3 and any(name.startswith("train/") for name in set(lines[-1]) - OF_SB3)
    assert [line["time/total_timesteps"] for line in lines] == [10, 20, 30, 40]
    assert [line["time/episodes"] for line in lines] == [2, 4, 6, 8]
    assert lines[-1]["rollout/ep_rew_mean"] == lines[-1]["rollout/ep_len_mean"] == LENGTH
    assert lines[-1]["rollout/success_rate"] == 1.0
    assert lines[-1]["train/n_updates"] == agent._n_updates > 0
    assert lines[-1]["train/learning_rate"] == agent.learning_rate
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["time/total_timesteps"]) for row in rows] == [10, 20, 30, 40] and OF_SB3 <= set(rows[0])
    events = EventAccumulator(str(tmp_path)).Reload()
    # SB3 leaves these to the axis of the picture.
    only_text = {"time/episodes", "time/time_elapsed", "time/total_timesteps", "train/n_updates"}
    assert set(events.Tags()["scalars"]) >= OF_SB3 - only_text
    assert [point.step for point in events.Scalars("rollout/ep_rew_mean")] == [10, 20, 30, 40]


@both
def test_a_run_that_goes_on_goes_on_in_its_directory_of_tensorboard(family: str, tmp_path: Path) -> None:
    agent = make(family, tensorboard_log=str(tmp_path), train_ratio=0).learn(10)
    agent.learn(10, reset_num_timesteps=False)
    assert [path.name for path in tmp_path.iterdir()] == [f"{family}_1"]

    agent.learn(10)
    agent.learn(10, tb_log_name="mine")

    assert {path.name for path in tmp_path.iterdir()} == {f"{family}_1", f"{family}_2", "mine_1"}


@both
def test_a_logger_of_ones_own_stays(family: str) -> None:
    agent = make(family, train_ratio=0)
    logger = configure(None, [])
    agent.set_logger(logger)

    assert agent.learn(10).logger is logger


@both
def test_what_is_printed_is_sb3s_table(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(family, verbose=1).learn(20, log_interval=4)

    printed = capsys.readouterr().out
    assert "Using cpu device" in printed and "|    ep_rew_mean" in printed and "|    total_timesteps" in printed


# --- repeated learning, seeds, learning rates


@both
def test_repeated_learning_goes_on_or_begins_anew(family: str) -> None:
    agent = make(family)
    assert agent.num_timesteps == 0

    agent.learn(20)
    assert (agent.num_timesteps, agent._total_timesteps, agent._episode_num) == (20, 20, 4)
    updates = agent._n_updates
    agent.learn(20, reset_num_timesteps=False)
    assert (agent.num_timesteps, agent._total_timesteps, agent._episode_num) == (40, 40, 8)
    assert agent._n_updates > updates
    agent.learn(10)
    assert (agent.num_timesteps, agent._total_timesteps, agent._episode_num) == (10, 10, 2)
    assert len(agent.ep_info_buffer) == 2


class Resets(gym.Wrapper[Any, Any, Any, Any]):
    """Counts resets."""

    count = 0

    def reset(self, **kwargs: Any) -> Any:
        self.count += 1
        return self.env.reset(**kwargs)


SET_ENV: dict[str, Callable[[Resets], Any]] = {
    "the environment": lambda env: env,
    "a monitored one": Monitor,
    "a VecEnv": lambda env: DummyVecEnv([lambda: env]),
    "a wrapped VecEnv": lambda env: VecMonitor(DummyVecEnv([lambda: env])),
    "a Gymnasium vector environment": lambda env: SyncVectorEnv([lambda: env]),
}


@pytest.mark.parametrize("given", SET_ENV)
@pytest.mark.parametrize("observed", [NUMBERS, IMAGE], ids=["numbers", "images"])
def test_an_environment_that_is_set_already_need_not_be_reset(given: str, observed: spaces.Space[Any]) -> None:
    counted = Resets(AnySpaces(observed))
    env = SET_ENV[given](counted)
    agent = make("dreamerv3", env).learn(LENGTH + 2)
    before, episodes = counted.count, agent._episode_num

    for same in (env, agent.get_env()):
        agent.set_env(same, force_reset=False)
    agent.learn(1, reset_num_timesteps=False)
    assert counted.count == before  # in the middle of an episode
    agent.learn(LENGTH, reset_num_timesteps=False)
    assert agent._episode_num == episodes + 1

    before = counted.count
    agent.set_env(env)
    agent.learn(1, reset_num_timesteps=False)
    assert counted.count == before + 1


def test_another_environment_is_always_reset() -> None:
    agent = make("dreamerv3", Resets(AnySpaces())).learn(2)
    other = Resets(AnySpaces())

    agent.set_env(other, force_reset=False)
    agent.learn(1, reset_num_timesteps=False)

    assert other.count == 1


@both
def test_a_seed_repeats_a_run_and_its_actions(family: str) -> None:
    agents = []
    for drawn, seed in enumerate((3, 3, 4)):
        agent = make(family, seed=seed)
        torch.rand(drawn), np.random.rand(drawn)  # random numbers between building and learning do not matter
        agents.append(agent.learn(20))
    first, second, other = agents

    assert torch.equal(weights(first), weights(second)) and not torch.equal(weights(first), weights(other))
    obs = NUMBERS.sample()
    acted, sampled = [], []
    for agent in agents:
        agent.set_random_seed(7)
        acted.append([agent.predict(obs)[0].tolist() for _ in range(3)])
        sampled.append(agent.action_space.sample().tolist())
    assert acted[0] == acted[1] != acted[2]
    assert len({tuple(action) for action in acted[0]}) == 3
    assert sampled[0] == sampled[1] == sampled[2]


def halving(remaining: float) -> float:
    return 0.01 if remaining > 0.5 else 0.0


@both
def test_the_learning_rate_may_follow_the_progress_of_a_run(family: str, tmp_path: Path) -> None:
    agent = make(family, learning_rate=LinearSchedule(1e-2, 1e-3, 1.0))
    agent.set_logger(configure(str(tmp_path), ["json"]))

    agent.learn(40, log_interval=2)

    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert [line["train/learning_rate"] for line in lines] == pytest.approx([0.00775, 0.0055, 0.00325, 0.001])
    used = [group["lr"] for optimizer in agent.trainer.optimizers for group in optimizer.param_groups]
    assert used == pytest.approx([0.001] * len(used))


@both
def test_a_rate_of_nothing_changes_nothing(family: str) -> None:
    agent = make(family, learning_rate=halving).learn(20)
    before = {name: value.clone() for name, value in agent.model.named_parameters()}
    agent.learning_rate = 0.0

    agent.learn(20, reset_num_timesteps=False)

    trained = [p for phase in agent.model.phases() for p in phase.trained]
    assert trained
    for name, value in agent.model.named_parameters():
        if any(value is p for p in trained):
            assert torch.equal(value, before[name]), name


@both
@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (lambda remaining: -1.0, r"learning_rate\(1\) is -1\.0, expected a number of 0 or more"),
        (lambda remaining: None, r"learning_rate\(1\) is None, expected a finite number"),
        (lambda remaining: float("nan"), r"learning_rate\(1\) is nan, expected a finite number"),
        (-0.5, r"learning_rate is -0\.5, expected a number of 0 or more"),
    ],
)
def test_what_is_no_learning_rate_is_refused_before_the_first_step(family: str, rate: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(family, learning_rate=rate).learn(20)


# --- silence


@both
def test_a_run_gives_no_warning_and_only_announces_itself(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = make(family, copies(2)).learn(30, EvalCallback(copies(1), eval_freq=5, n_eval_episodes=1, verbose=0))
        evaluate_policy(agent, agent.get_env(), n_eval_episodes=2)
        agent.save(tmp_path / "agent")
        agent.save_replay_buffer(tmp_path / "buffer")
        loaded = WorldFluxAgent.load(tmp_path / "agent", copies(2))
        loaded.load_replay_buffer(tmp_path / "buffer")
        loaded.learn(10)

    printed, said = capfd.readouterr()
    announced = [line for line in said.splitlines() if line.startswith(f"worldflux: {family}:tiny with ")]
    assert printed == "" and said.splitlines() == announced and len(announced) == 2  # one for each agent


def test_the_families_are_all_there_are() -> None:
    from worldflux import list_models

    assert {name.split(":")[0] for name in list_models()} == set(FAMILIES)
