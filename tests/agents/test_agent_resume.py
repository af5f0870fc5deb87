"""Runs of an agent that are stopped, killed, and resumed from a checkpoint."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.agents import counting_envs, make_agent, make_planner, rows_compared, weights
from helpers.envs import CountingEnv
from helpers.processes import finish, kill, start, strays, wait_for
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize

from worldflux.agents import AgentCheckpointCallback, WorldFluxAgent
from worldflux.errors import CheckpointError, ConfigurationError, TrainingError
from worldflux.training.checkpoint import checkpoints_in, newest_checkpoint


def counting(n_envs: int = 2) -> DummyVecEnv:
    return counting_envs(n_envs, lengths=(7, 4, 30))


def stored(agent: WorldFluxAgent) -> list[torch.Tensor]:
    assert agent.replay_buffer is not None
    agent.replay_buffer.seed(0)
    batch = agent.replay_buffer.sample(64, 5)
    assert isinstance(batch.obs, torch.Tensor) and batch.row_ids is not None
    return [batch.obs, batch.actions, batch.rewards, batch.terminations, batch.row_ids]


def resumed(path: Path, env: Any, steps: int, **settings: Any) -> WorldFluxAgent:
    agent = WorldFluxAgent.load(path, env, device="cpu", resume=True, **settings)
    return agent.learn(steps, reset_num_timesteps=False)


@pytest.mark.parametrize(
    ("make", "env"), [(make_agent, "CartPole-v1"), (make_planner, "Pendulum-v1"), (make_planner, "CartPole-v1")]
)
def test_two_resumes_of_one_checkpoint_give_the_same_bits(tmp_path: Path, make: Any, env: str) -> None:
    agent = make(env)
    agent.learn(60).save_checkpoint(tmp_path / "checkpoint")
    first, second = (resumed(tmp_path / "checkpoint", env, 45) for _ in range(2))
    assert first.num_timesteps == 105 and first.trainer.step_count > agent.trainer.step_count > 0
    assert torch.equal(weights(first), weights(second))
    for mine, its in zip(stored(first), stored(second), strict=True):
        assert torch.equal(mine, its)


def test_everything_is_as_it_was_when_the_checkpoint_was_written(tmp_path: Path) -> None:
    agent = make_agent(counting()).learn(90)
    agent.save_checkpoint(tmp_path / "checkpoint")
    loaded = WorldFluxAgent.load(tmp_path / "checkpoint", counting(), device="cpu", resume=True)
    assert agent.replay_buffer is not None and loaded.replay_buffer is not None
    assert torch.equal(weights(agent), weights(loaded))
    for name in ("num_timesteps", "_episode_num", "_n_updates"):
        assert getattr(agent, name) == getattr(loaded, name) > 0, name
    assert loaded.schedule.state_dict() == agent.schedule.state_dict()
    assert list(loaded.ep_info_buffer or ()) == list(agent.ep_info_buffer or ()) != []
    assert loaded.replay_buffer.rng_state() == agent.replay_buffer.rng_state()
    agent.replay_buffer.end_episodes()  # which resuming has done
    assert loaded.replay_buffer.num_transitions == 90
    assert loaded.replay_buffer.num_episodes == agent.replay_buffer.num_episodes
    agent.replay_buffer.set_rng_state(loaded.replay_buffer.rng_state())
    mine, its = agent.replay_buffer.sample(64, 5), loaded.replay_buffer.sample(64, 5)
    assert mine.row_ids is not None and its.row_ids is not None
    assert torch.equal(mine.row_ids, its.row_ids) and torch.equal(mine.actions, its.actions)
    assert torch.equal(mine.extras["deter"], its.extras["deter"])


def test_gradient_steps_that_were_owed_when_it_was_saved_are_taken(tmp_path: Path) -> None:
    class Save(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 60:
                self.model.save_checkpoint(tmp_path / "checkpoint")  # type: ignore[attr-defined]
            return True

    agent = make_agent(counting(), train_ratio=18).learn(60, Save())
    loaded = WorldFluxAgent.load(tmp_path / "checkpoint", counting(), device="cpu", resume=True)
    assert loaded.trainer.step_count == agent.trainer.step_count - 3
    assert loaded.learn(0, reset_num_timesteps=False).trainer.step_count == agent.trainer.step_count


@pytest.mark.parametrize("seed", [0, None])
def test_a_resumed_run_does_not_begin_with_the_episodes_of_the_first_one(tmp_path: Path, seed: int | None) -> None:
    def first_obs(agent: WorldFluxAgent) -> Any:
        assert agent.env is not None
        return agent.env.reset()

    begun = first_obs(make_agent(seed=seed))
    make_agent(seed=seed, train_ratio=0).learn(20).save_checkpoint(tmp_path / "checkpoint")
    one, other = (
        first_obs(WorldFluxAgent.load(tmp_path / "checkpoint", "CartPole-v1", device="cpu", resume=True))
        for _ in range(2)
    )
    assert np.array_equal(one, other) and not np.array_equal(one, begun)


def test_a_replay_buffer_that_took_the_place_of_another_is_saved_whole(tmp_path: Path) -> None:
    make_agent(train_ratio=0).learn(70).save_replay_buffer(tmp_path / "other.npz")
    agent = make_agent(train_ratio=0).learn(30)
    agent.save_checkpoint(tmp_path / "first")
    agent.load_replay_buffer(tmp_path / "other.npz")
    agent.save_checkpoint(tmp_path / "second")
    loaded = WorldFluxAgent.load(tmp_path / "second", "CartPole-v1", device="cpu", resume=True)
    assert loaded.replay_buffer is not None and loaded.replay_buffer.num_transitions == 70
    for mine, its in zip(stored(agent), stored(loaded), strict=True):
        assert torch.equal(mine, its)


def test_an_episode_in_flight_ends_as_truncated_with_its_last_observation(tmp_path: Path) -> None:
    agent = make_agent(counting(1), train_ratio=0).learn(9)  # two steps into the second episode
    agent.save_checkpoint(tmp_path / "checkpoint")
    buffer = WorldFluxAgent.load(tmp_path / "checkpoint", counting(1), device="cpu", resume=True).replay_buffer
    assert buffer is not None and (buffer.num_transitions, buffer.num_episodes) == (9, 2)
    batch = buffer.sample(1, 11)
    assert isinstance(batch.obs, torch.Tensor)
    assert batch.truncations is not None and batch.obs_mask is None
    assert batch.truncations[0].nonzero().flatten().tolist() == [9]
    assert batch.obs[0, -1, 1:3].tolist() == [1, 2]


def test_steps_before_and_after_a_resume_are_replayed_together(tmp_path: Path) -> None:
    make_agent(counting()).learn(120).save_checkpoint(tmp_path / "checkpoint")
    agent = resumed(tmp_path / "checkpoint", counting(), 70)
    assert agent.replay_buffer is not None and agent.replay_buffer.num_transitions == 190
    assert rows_compared(agent, 128, 6) > 500


def test_the_ratio_of_training_is_kept_over_resumes(tmp_path: Path) -> None:
    def steps_of(parts: list[int]) -> int:
        agent = make_agent(counting(), train_ratio=5)
        for part in parts[:-1]:
            agent.learn(part, reset_num_timesteps=False, callback=AgentCheckpointCallback(tmp_path, 1000))
            agent = WorldFluxAgent.load(tmp_path, counting(), device="cpu", resume=True)
        return agent.learn(parts[-1], reset_num_timesteps=False).trainer.step_count

    assert steps_of([120]) == steps_of([42, 20, 58]) > 40


def test_a_checkpoint_costs_only_what_is_new(tmp_path: Path) -> None:
    agent = make_agent(counting(), train_ratio=0, buffer_size=20_000, replay_context=False)
    agent.learn(1000).save_checkpoint(tmp_path / "first")
    agent.learn(30, reset_num_timesteps=False).save_checkpoint(tmp_path / "second")

    def own_bytes(path: Path) -> int:
        return sum(file.stat().st_size for file in (path / "replay").glob("*.npz") if file.stat().st_nlink == 1)

    whole = sum(file.stat().st_size for file in (tmp_path / "second" / "replay").glob("*.npz"))
    assert 0 < own_bytes(tmp_path / "second") < 8_000 < 30_000 < whole
    shutil.rmtree(tmp_path / "first")
    loaded = WorldFluxAgent.load(tmp_path / "second", counting(), device="cpu", resume=True)
    assert loaded.replay_buffer is not None and loaded.replay_buffer.num_transitions == 1030


def test_statistics_of_vec_normalize_go_on(tmp_path: Path) -> None:
    def envs() -> VecNormalize:
        return VecNormalize(counting(), clip_obs=5)

    agent = make_agent(envs()).learn(60)
    agent.save_checkpoint(tmp_path / "checkpoint")
    loaded = WorldFluxAgent.load(tmp_path / "checkpoint", envs(), device="cpu", resume=True)
    was, now = agent.get_vec_normalize_env(), loaded.get_vec_normalize_env()
    assert was is not None and now is not None
    np.testing.assert_array_equal(now.obs_rms.mean, was.obs_rms.mean)  # type: ignore[union-attr]
    np.testing.assert_array_equal(now.obs_rms.var, was.obs_rms.var)  # type: ignore[union-attr]
    for name in ("mean", "var", "count"):
        assert getattr(now.ret_rms, name) == getattr(was.ret_rms, name)
    assert now.obs_rms.count > 60  # type: ignore[union-attr]
    with pytest.raises(ConfigurationError, match="VecNormalize"):
        WorldFluxAgent.load(tmp_path / "checkpoint", counting(), device="cpu", resume=True)


def test_episodes_are_remembered_whoever_counts_them(tmp_path: Path) -> None:
    def envs() -> VecMonitor:
        return VecMonitor(DummyVecEnv([lambda: CountingEnv(lengths=(7, 4, 30))]))  # type: ignore[list-item,return-value]

    agent = make_agent(envs(), train_ratio=0).learn(30)
    assert agent.ep_info_buffer is not None and isinstance(agent.ep_info_buffer[0]["r"], np.float32)
    del agent.ep_info_buffer[0]["t"]  # which not all who count episodes tell, and SB3 does not need
    agent.save_checkpoint(tmp_path / "checkpoint")
    loaded = WorldFluxAgent.load(tmp_path / "checkpoint", envs(), device="cpu", resume=True)
    assert list(loaded.ep_info_buffer or ()) == list(agent.ep_info_buffer)


def test_a_checkpoint_that_was_being_replaced_is_found(tmp_path: Path) -> None:
    make_agent(train_ratio=0).learn(10).save_checkpoint(tmp_path / "latest")
    os.rename(tmp_path / "latest", tmp_path / ".latest.replaced")  # and there it was killed
    assert WorldFluxAgent.load(tmp_path / "latest", "CartPole-v1", device="cpu", resume=True).num_timesteps == 10


def test_a_checkpoint_can_be_loaded_to_act_alone(tmp_path: Path) -> None:
    agent = make_agent().learn(40)
    agent.save_checkpoint(tmp_path / "run" / "step-00000040")
    obs = np.zeros(4, np.float32)
    for path in (tmp_path / "run" / "step-00000040", tmp_path / "run"):
        loaded = WorldFluxAgent.load(path, device="cpu")
        assert loaded.replay_buffer is None
        assert loaded.predict(obs, deterministic=True)[0] == agent.predict(obs, deterministic=True)[0]


def test_the_newest_checkpoint_of_a_directory_is_taken(tmp_path: Path) -> None:
    make_agent().learn(50, AgentCheckpointCallback(tmp_path, 15, max_checkpoints=2))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000045", "step-00000050"]
    assert WorldFluxAgent.load(tmp_path, "CartPole-v1", device="cpu", resume=True).num_timesteps == 50


def test_what_cannot_be_resumed_says_why(tmp_path: Path) -> None:
    agent = make_agent().learn(30)
    agent.save_checkpoint(tmp_path / "checkpoint")
    load = WorldFluxAgent.load
    with pytest.raises(ConfigurationError, match="Pass env"):
        load(tmp_path / "checkpoint", device="cpu", resume=True)
    with pytest.raises(ConfigurationError, match="capacity"):
        load(tmp_path / "checkpoint", "CartPole-v1", device="cpu", resume=True, buffer_size=300)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(tmp_path, "CartPole-v1", device="cpu", resume=True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        agent.save_checkpoint(tmp_path)
    with pytest.raises(ConfigurationError, match="call save"):
        load(tmp_path / "checkpoint", device="cpu").save_checkpoint(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="PPO"):
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).learn(1, AgentCheckpointCallback(tmp_path / "ppo"))


RUN_FILES: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "missing": lambda run: None,
    "not json": lambda run: "{",
    "a text": lambda run: '"run"',
    "too deep": lambda run: "[" * 100_000,
    "a negative count": lambda run: json.dumps({**run, "collected": -1}),
    "no number": lambda run: json.dumps({**run, "collected": "many"}),
    "too large": lambda run: json.dumps({**run, "episode_successes": [10**400]}),
}


@pytest.mark.parametrize("kind", RUN_FILES)
def test_a_damaged_run_file_is_named_with_what_to_do(tmp_path: Path, kind: str) -> None:
    make_agent(train_ratio=0).learn(10).save_checkpoint(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "run.json"
    text = RUN_FILES[kind](json.loads(path.read_text()))
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=r"is incomplete or damaged \(.*run\.json.*Load an earlier checkpoint"):
        WorldFluxAgent.load(tmp_path / "checkpoint", "CartPole-v1", device="cpu", resume=True)


def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    class Poison(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 45:
                with torch.no_grad():
                    next(iter(self.model.policy.parameters())).fill_(torch.nan)
            return True

    agent = make_agent()
    with pytest.raises(TrainingError, match="not finite"):
        agent.learn(400, [AgentCheckpointCallback(tmp_path, 20), Poison()])
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000040"
    assert strays(tmp_path) == []
    assert resumed(tmp_path, "CartPole-v1", 20).num_timesteps == 60


def test_an_error_in_the_environment_loses_nothing(tmp_path: Path) -> None:
    class Failing(CountingEnv):
        def step(self, action: Any) -> Any:
            if self.total == 33:
                raise OSError("the simulator is gone")
            return super().step(action)

    with pytest.raises(OSError, match="gone"):
        make_agent(Failing(lengths=(10,))).learn(100, AgentCheckpointCallback(tmp_path, 20))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000020", "step-00000033"]
    assert resumed(tmp_path, CountingEnv(lengths=(10,)), 20).replay_buffer.num_transitions == 53  # type: ignore[union-attr]


# --- signals, full disks and kills


def test_ctrl_c_saves_the_step_it_came_in(tmp_path: Path) -> None:
    class Interrupt(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 31:
                os.kill(os.getpid(), signal.SIGINT)
            return True

    agent = make_agent()
    with pytest.raises(KeyboardInterrupt):
        agent.learn(400, [AgentCheckpointCallback(tmp_path, 1000), Interrupt()])
    assert agent.num_timesteps == 32  # the signal came behind the callback that saves, so one more step was made
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000032"]
    assert agent.learn(10, reset_num_timesteps=False).num_timesteps == 42


def test_ctrl_c_in_a_terminal_reaches_the_environments_as_well(tmp_path: Path) -> None:
    class Interrupted(CountingEnv):
        def __init__(self, learner: int) -> None:
            super().__init__()
            self.learner = learner

        def step(self, action: Any) -> Any:
            if self.total == 20:
                os.kill(self.learner, signal.SIGINT)
                raise KeyboardInterrupt
            return super().step(action)

    learner = os.getpid()
    agent = make_agent(SubprocVecEnv([lambda: Interrupted(learner)], start_method="forkserver"))
    with pytest.raises(KeyboardInterrupt):
        agent.learn(400, AgentCheckpointCallback(tmp_path, 1000))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000020"]
    assert resumed(tmp_path, CountingEnv(), 20).num_timesteps == 40


def learn_on_a_full_disk(directory: Path, out: Path) -> None:
    torch.set_num_threads(1)
    agent, errors = make_agent(), []

    class Fill(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 25:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            return True

    for use in (
        lambda: agent.learn(400, [AgentCheckpointCallback(directory, 20), Fill()]),
        lambda: agent.save(directory / "agent.zip"),
    ):
        try:
            use()
        except CheckpointError as error:
            errors.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    agent.learn(7, reset_num_timesteps=False)
    agent.save_checkpoint(directory / "step-00000047")
    out.write_text("\n".join(errors))


def test_a_full_disk_is_an_error_and_the_run_can_go_on_from_there(tmp_path: Path) -> None:
    directory, out = tmp_path / "run", tmp_path / "errors.txt"
    assert finish(start(learn_on_a_full_disk, directory, out)) == 0
    learning, saving = out.read_text().splitlines()
    assert "step-00000040 could not be written" in learning and "unchanged" in learning
    assert "agent.zip could not be written" in saving
    assert [path.name for path in checkpoints_in(directory)] == ["step-00000020", "step-00000047"]
    assert strays(directory) == []
    assert resumed(directory, "CartPole-v1", 3).replay_buffer.num_transitions == 50  # type: ignore[union-attr]
    assert resumed(directory / "step-00000020", "CartPole-v1", 3).num_timesteps == 23


def learn_to_the_end(directory: Path, out: Path, total: int) -> None:
    torch.set_num_threads(1)
    saving = AgentCheckpointCallback(directory, 5)
    if newest_checkpoint(directory) is None:
        # Enough to start with, however many episodes resuming has cut short.
        agent = make_agent(counting(), learning_starts=30)
    else:
        agent = WorldFluxAgent.load(directory, counting(), device="cpu", resume=True)
    agent.learn(total - agent.num_timesteps, saving, reset_num_timesteps=False)
    out.write_text(str(agent.trainer.step_count))


def test_sigterm_saves_and_stops(tmp_path: Path) -> None:
    process = start(learn_to_the_end, tmp_path / "run", tmp_path / "out", 100_000)
    wait_for(lambda: newest_checkpoint(tmp_path / "run"), process)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 143
    assert strays(tmp_path / "run") == [] and not (tmp_path / "out").exists()
    agent = WorldFluxAgent.load(tmp_path / "run", counting(), device="cpu", resume=True)
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name == f"step-{agent.num_timesteps:08d}"
    assert agent.replay_buffer is not None and agent.replay_buffer.num_transitions == min(agent.num_timesteps, 500)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_any_moment_leave_a_run_to_resume(tmp_path: Path, kills: int) -> None:
    directory, out = tmp_path / "run", tmp_path / "out"
    moments, met = random.Random(kills), 0
    total = 40 + 20 * kills
    for _ in range(kills):
        process = start(learn_to_the_end, directory, out, total)
        before = newest_checkpoint(directory)
        wait_for(lambda: newest_checkpoint(directory) != before, process)  # noqa: B023
        time.sleep(moments.uniform(0, 0.05))
        met += process.exitcode is None
        kill(process)
        agent = WorldFluxAgent.load(directory, counting(), device="cpu", resume=True)
        assert agent.replay_buffer is not None
        assert agent.replay_buffer.num_transitions == min(agent.num_timesteps, 500)
    assert finish(start(learn_to_the_end, directory, out, total)) == 0
    assert met >= kills // 2 and strays(directory) == []
    whole = make_agent(counting(), learning_starts=30).learn(total)
    assert int(out.read_text()) == whole.trainer.step_count
