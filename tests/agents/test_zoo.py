"""rl_zoo3 trains, evaluates, resumes, plays, films and searches with our algorithms as with SB3's own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from helpers.envs import Corridor
from learning import TASKS
from optuna import create_study
from optuna.trial import FixedTrial
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import ConstantSchedule

from worldflux import WorldFluxAgent, list_models
from worldflux.errors import ConfigurationError, TrainingError

SMALL = dict(deter_dim=64, hidden_dim=32, units=32, stoch_discrete=8, stoch_classes=4, bins=31, imagination_horizon=3)
QUICK = ("learning_starts:60", "train_ratio:16", "batch_size:8", "seq_len:8", f"policy_kwargs:{SMALL!r}")
TRAIN = ("train", "--algo", "dreamerv3", "--env", "CartPole-v1", "--seed", "0", "--device", "cpu")


class FilmedCorridor(Corridor):
    """A corridor with a picture."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self) -> np.ndarray:
        picture = np.zeros((32, 32 * self.CELLS, 3), np.uint8)
        picture[:, 32 * self.cell : 32 * self.cell + 32] = 255
        return picture


@pytest.fixture(scope="module")
def zoo() -> Iterator[SimpleNamespace]:
    """Our package, and the parts of rl_zoo3 that the tests use.

    rl_zoo3 patches Gymnasium's TimeLimit and NumPy when it is imported, which is undone for the other tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym.wrappers, "TimeLimit", gym.wrappers.TimeLimit)
        patch.setattr(gym.wrappers.common, "TimeLimit", gym.wrappers.common.TimeLimit)
        patch.setattr(np, "bool8", np.bool_, raising=False)
        from rl_zoo3 import exp_manager, hyperparams_opt, utils

        from worldflux.agents import zoo
        from worldflux.agents.zoo import __main__, algorithms, registration

        yield SimpleNamespace(
            main=__main__.main,
            DreamerV3=zoo.DreamerV3,
            TDMPC2=zoo.TDMPC2,
            DivergedError=algorithms.DivergedError,
            algorithms=registration.ALGORITHMS,
            hyperparams=registration.HYPERPARAMS,
            manager=exp_manager.ExperimentManager,
            samplers=hyperparams_opt.HYPERPARAMS_SAMPLER,
            converters=hyperparams_opt.HYPERPARAMS_CONVERTER,
            get_wrapper_class=utils.get_wrapper_class,
        )


@pytest.fixture(scope="module")
def folder(zoo: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which `train` has run once."""
    place = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        arguments = ("-n", "120", "--eval-freq", "80", "--eval-episodes", "2", "--save-freq", "80")
        patch.setattr(sys, "argv", ["zoo", *TRAIN, *arguments, "--save-replay-buffer", "-params", *QUICK])
        zoo.main()
    return place


@pytest.fixture
def command(zoo: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command line in that directory and returns what it printed."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["zoo", *arguments])
        capsys.readouterr()
        zoo.main()
        return capsys.readouterr().out

    return run


def hyperparameters(zoo: SimpleNamespace, algorithm: str) -> dict[str, dict[str, Any]]:
    return yaml.safe_load((zoo.hyperparams / f"{algorithm}.yml").read_text(encoding="utf-8"))


def test_training_leaves_the_files_that_rl_zoo3_promises(folder):
    run = folder / "logs" / "dreamerv3" / "CartPole-v1_1"
    assert {path.name for path in run.glob("*.zip")} == {"CartPole-v1.zip", "best_model.zip", "rl_model_80_steps.zip"}
    with np.load(run / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [80]
        assert evaluations["results"].shape == (1, 2)
    agent = WorldFluxAgent.load(run / "CartPole-v1.zip")
    assert (agent.num_timesteps, agent.seed, agent.train_ratio) == (120, 0, 16.0)
    assert agent.model.config.model_name == "tiny" and agent.model.config.deter_dim == 64
    # 120 steps of which the first 60 owe nothing, a gradient step for every 8 * 8 / 16.
    assert agent._n_updates > 10


def test_enjoy_plays_the_saved_agent_the_same_way_each_time(command):
    arguments = ("enjoy", "--algo", "dreamerv3", "--env", "CartPole-v1", "-f", "logs", "--no-render", "-n", "60")
    printed = command(*arguments, "--exp-id", "1", "--load-best")
    assert "Loading logs/dreamerv3/CartPole-v1_1/best_model.zip" in printed
    rewards = re.findall(r"Episode Reward: ([\d.]+)\nEpisode Length (\d+)", printed)
    assert rewards and all(float(reward) == float(length) for reward, length in rewards)
    assert command(*arguments, "--exp-id", "1", "--load-best") == printed


def test_a_trained_agent_goes_on_with_its_weights_and_its_replay_data(command, folder, zoo):
    run = folder / "logs" / "dreamerv3" / "CartPole-v1_1"
    params = ("-params", *QUICK[2:], "train_ratio:0", "learning_rate:'lin_5e-4'", "n_envs:1")
    command(*TRAIN, "-n", "20", "-f", "more", "--eval-freq", "-1", "-i", str(run / "CartPole-v1.zip"), *params)
    before = zoo.DreamerV3.load(run / "CartPole-v1.zip")
    after = zoo.DreamerV3.load(folder / "more" / "dreamerv3" / "CartPole-v1_1" / "CartPole-v1.zip", env="CartPole-v1")
    for name, weights in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], weights), name
    assert (after.learning_rate(0.5), after.train_ratio) == (2.5e-4, 0.0)
    assert after.num_timesteps == 20  # rl_zoo3 counts anew
    after.load_replay_buffer(run / "replay_buffer.pkl")
    assert after.replay_buffer.num_transitions == 120


def test_the_command_of_rl_zoo3_itself_works_beside_a_custom_envs_module(tmp_path):
    (tmp_path / "custom_envs.py").write_text("import worldflux.agents.zoo\n")
    command = [sys.executable, "-m", "rl_zoo3.train", "--algo", "dreamerv3", "--env", "CartPole-v1", "-n", "20"]
    done = subprocess.run([*command, "--num-threads", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "('train_ratio', 64)" in done.stdout
    assert (tmp_path / "logs" / "dreamerv3" / "CartPole-v1_1" / "CartPole-v1.zip").is_file()


def test_that_module_also_serves_where_rl_zoo3_imports_it_halfway_through_its_manager(tmp_path):
    (tmp_path / "custom_envs.py").write_text("import worldflux.agents.zoo\n")
    code = "import rl_zoo3.exp_manager; from rl_zoo3 import ALGOS; print(ALGOS['tdmpc2'].__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "worldflux.agents.zoo.algorithms\n", done.stderr


def test_tdmpc2_trains_and_plans_in_rl_zoo3(command):
    quick = "dict(latent_dim=32, hidden_dim=32, mlp_dim=32, enc_dim=32, num_samples=8, num_elites=4, iterations=2)"
    params = ("learning_starts:20", "batch_size:16", f"policy_kwargs:{quick}")
    arguments = ("--algo", "tdmpc2", "--env", "Pendulum-v1", "--seed", "1")
    command("train", *arguments, "-n", "30", "--eval-freq", "-1", "-params", *params)
    printed = command("enjoy", *arguments, "-f", "logs", "--no-render", "-n", "200")
    (mean,) = re.findall(r"Mean reward: (-?[\d.]+)", printed)
    assert -2000 < float(mean) < 0


def test_a_video_of_an_agent_is_recorded(command, folder):
    gym.register("Corridor-v0", entry_point=FilmedCorridor)
    try:
        arguments = ("--algo", "dreamerv3", "--env", "Corridor-v0")
        command("train", *arguments, "-n", "10", "--eval-freq", "-1", "-params", *QUICK, "policy:'tiny'")
        command("record_video", *arguments, "-f", "logs", "-n", "15", "-o", "videos")
    finally:
        del gym.registry["Corridor-v0"]
    (video,) = (folder / "videos").glob("*.mp4")
    assert video.stat().st_size > 500


def test_a_file_of_ones_own_goes_before_the_shipped_one(command, folder):
    own = {"CartPole-v1": {"policy": "dreamerv3:tiny", "n_timesteps": 30, "policy_kwargs": SMALL, "n_envs": 2}}
    (folder / "own.yml").write_text(yaml.safe_dump(own))
    printed = command(*TRAIN, "--conf-file", "own.yml", "--eval-freq", "-1", "-f", "own")
    assert "Loading hyperparameters from: own.yml" in printed and "Using 2 environments" in printed
    assert WorldFluxAgent.load(folder / "own" / "dreamerv3" / "CartPole-v1_1" / "CartPole-v1.zip").num_timesteps == 30


def test_an_unknown_command_is_answered_with_those_that_there_are(command):
    with pytest.raises(SystemExit, match=r"\{train,enjoy,record_video\}"):
        command("trian")


@pytest.mark.parametrize("algorithm", ["dreamerv3", "tdmpc2"])
def test_every_shipped_entry_is_of_an_environment_and_fits_the_algorithm(zoo, algorithm):
    theirs = {"n_envs", "n_timesteps", "env_kwargs", "env_wrapper"}
    entries = hyperparameters(zoo, algorithm)
    shared = {"control", "dmc", "atari", "atari100k", "atari200m", "default"}
    assert "default" in entries and set(entries) - shared <= set(gym.registry)
    for name, entry in entries.items():
        assert f"{algorithm}:{entry['policy']}" in list_models(), name
        assert int(entry["n_timesteps"]) == entry["n_timesteps"] > 0
        settings = {key: value for key, value in entry.items() if key not in theirs}
        zoo.algorithms[algorithm](**settings, env=None, _init_setup_model=False)


def test_what_is_called_measured_has_the_settings_of_the_measurement(zoo):
    pendulum = TASKS["pendulum"]
    assert hyperparameters(zoo, "dreamerv3")["Pendulum-v1"] == {
        "policy": pendulum.preset.partition(":")[2],
        "n_timesteps": pendulum.steps,
        **pendulum.settings,
    }
    planned = TASKS["pendulum_tdmpc2"]
    assert hyperparameters(zoo, "tdmpc2")["Pendulum-v1"] == {
        "policy": planned.preset.partition(":")[2],
        "n_timesteps": planned.steps,
        **planned.settings,
    }


def test_ales_own_ids_are_preprocessed_as_in_atari_100k(zoo):
    entry = hyperparameters(zoo, "dreamerv3")["atari"]
    theirs = zoo.get_wrapper_class(entry)(gym.make("ALE/Pong-v5", **entry["env_kwargs"]))
    ours = gym.make("worldflux/atari100k-pong-v0")
    assert theirs.observation_space == ours.observation_space and theirs.action_space == ours.action_space
    np.testing.assert_array_equal(theirs.reset(seed=3)[0], ours.reset(seed=3)[0])
    for action in (2, 3, 3, 0):
        np.testing.assert_array_equal(theirs.step(action)[0], ours.step(action)[0])


def test_a_policy_is_a_preset_with_or_without_its_family(zoo):
    for policy in ("tiny", "dreamerv3:tiny"):
        agent = zoo.DreamerV3(policy, "CartPole-v1", policy_kwargs=SMALL, learning_rate=ConstantSchedule(2e-3))
        assert agent.model.config.model_name == "tiny" and agent.model.config.units == 32
        assert agent.learning_rate == 2e-3
    with pytest.raises(ConfigurationError, match=r"of the family tdmpc2, expected dreamerv3. Use --algo tdmpc2\."):
        zoo.DreamerV3("tdmpc2:tiny", "Pendulum-v1")
    with pytest.raises(ConfigurationError, match="model is 'MlpPolicy', a policy of stable-baselines3"):
        zoo.DreamerV3("MlpPolicy", "CartPole-v1")


def test_a_file_of_the_other_algorithm_is_refused_with_its_name(zoo, folder):
    with pytest.raises(ConfigurationError, match=r"of the family dreamerv3, expected tdmpc2"):
        zoo.TDMPC2.load(folder / "logs" / "dreamerv3" / "CartPole-v1_1" / "CartPole-v1.zip")


def test_hyperparameters_that_do_not_exist_here_are_named(zoo):
    with pytest.raises(ConfigurationError, match=r"Unknown hyperparameter 'train_freq' of dreamerv3; did you mean"):
        zoo.DreamerV3("tiny", "CartPole-v1", train_freq=4)
    with pytest.raises(
        ConfigurationError, match=r"'entropy_scale' is a field of the model. Write it into policy_kwargs"
    ):
        zoo.DreamerV3("tiny", "CartPole-v1", entropy_scale=1e-3)


def test_a_search_trains_with_what_a_trial_draws(zoo, folder, monkeypatch):
    monkeypatch.chdir(folder)
    manager = zoo.manager(
        SimpleNamespace(),
        "dreamerv3",
        "CartPole-v1",
        "search",
        hyperparams={"policy_kwargs": SMALL, "batch_size": 8, "learning_starts": 60},
        n_timesteps=80,
        optimize_hyperparameters=True,
        n_eval_episodes=1,
        n_evaluations=2,
        device="cpu",
        verbose=0,
    )
    assert manager.setup_experiment() is None
    trained = []
    learn = zoo.DreamerV3.learn
    monkeypatch.setattr(zoo.DreamerV3, "learn", lambda agent, *a, **k: trained.append(agent) or learn(agent, *a, **k))
    score = manager.objective(FixedTrial({"learning_rate": 1e-3, "train_ratio_pow": 4, "seq_len_pow": 5}))
    assert 8 <= score <= 500
    (agent,) = trained
    assert (agent.learning_rate, agent.train_ratio, agent.seq_len) == (1e-3, 16.0, 32)
    assert (agent.batch_size, agent.model.config.units) == (8, 32)  # what is not drawn stays


@pytest.mark.parametrize("algorithm", ["dreamerv3", "tdmpc2"])
def test_what_a_search_found_is_read_back_as_it_was_tried(zoo, algorithm):
    trial = create_study().ask()
    sampled = zoo.samplers[algorithm](trial, 1, 1, {})
    assert zoo.converters[algorithm](trial.params) == sampled
    assert 3e-5 <= sampled["learning_rate"] <= 3e-3
    zoo.algorithms[algorithm]("tiny", None, **sampled, _init_setup_model=False)


def test_a_loss_that_is_not_finite_is_an_error_that_a_search_survives(zoo):
    class Poison(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 70:
                with torch.no_grad():
                    for weights in self.model.policy.parameters():
                        weights.fill_(float("nan"))
            return True

    quick = dict(policy_kwargs=SMALL, learning_starts=60, train_ratio=16, batch_size=8, seq_len=8)
    agent = zoo.DreamerV3("tiny", "CartPole-v1", **quick)
    with pytest.raises(zoo.DivergedError, match="not finite") as caught:
        agent.learn(200, callback=Poison())
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, TrainingError)
