"""No dead options: every field of the trainer's and of the agent's settings, changed, makes a difference."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.field_cases import Case, check_field, check_no_entry_is_left_over, every_field, same
from torch import nn

from worldflux import ConfigurationError, TrainingError, WorldFluxAgent, create_world_model
from worldflux.agents.settings import AgentSettings
from worldflux.models.dreamerv3.world_model import DreamerV3
from worldflux.models.tdmpc2.world_model import TDMPC2
from worldflux.training import (
    Batch,
    Callback,
    CheckpointCallback,
    ProgressCallback,
    ReplayBuffer,
    Trainer,
    TrainingConfig,
    create_random_buffer,
)

COMMON: dict[type, dict[str, Any]] = {
    TrainingConfig: dict(total_steps=6, batch_size=4, sequence_length=5, learning_rate=0.1, device="cpu"),
    AgentSettings: dict(train_ratio=4, batch_size=2, seq_len=4, buffer_size=200, learning_starts=10, seed=0),
}


# Observations of training


class Line(nn.Module):
    """Predicts rewards from observations; from `poison_at` on its loss is NaN."""

    def __init__(self, poison_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.poison_at, self.batches = nn.Linear(3, 1), poison_at, []

    def loss(self, batch: Batch) -> torch.Tensor:
        assert isinstance(batch.obs, torch.Tensor)
        if self.training:
            self.batches.append(batch.obs)
        loss = (self.body(batch.obs).squeeze(-1) - batch.rewards).square().mean()
        return loss * torch.nan if self.poison_at is not None and len(self.batches) >= self.poison_at else loss


class GraphCapturer(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.evaluations: dict[int, float] = {}

    def on_step_end(self, step, losses):
        self.steps.append(step)

    def on_eval_end(self, step, metrics):
        self.evaluations[step] = metrics["loss"]


def data(seed: int = 0) -> ReplayBuffer:
    return create_random_buffer(200, (3,), 1, num_episodes=5, episode_length=20, seed=seed)


def run(config: TrainingConfig, *callbacks: Callback) -> Line:
    model = Line()
    Trainer(model, config, callbacks, eval_data=data(1)).train(data())
    return model


def steps(config: TrainingConfig) -> Any:
    recorder = GraphCapturer()
    run(config, recorder)
    return recorder.steps


def batches(config: TrainingConfig) -> Any:
    return run(config).batches


def weights(config: TrainingConfig) -> Any:
    return run(config).state_dict()


def evaluations(config: TrainingConfig) -> Any:
    recorder = GraphCapturer()
    run(config, recorder)
    return recorder.evaluations


def checkpoints(config: TrainingConfig) -> Any:
    with tempfile.TemporaryDirectory() as directory, mock.patch("os.fsync"):
        run(config, CheckpointCallback(directory))
        return sorted(entry.name for entry in Path(directory).iterdir())


def progress_without_a_bar(config: TrainingConfig) -> Any:
    no_tqdm = mock.patch.dict(sys.modules, {"tqdm": None, "tqdm.auto": None})
    with no_tqdm, contextlib.redirect_stderr(io.StringIO()) as out:
        run(config, ProgressCallback())
    return [line.split()[1] for line in out.getvalue().splitlines()]


def where_it_trains(config: TrainingConfig) -> Any:
    try:
        return str(Trainer(Line(), config).device)
    except ConfigurationError as error:
        return str(error)


def what_is_compiled(config: TrainingConfig) -> Any:
    """The models whose hot functions are compiled on a machine that has a compiler."""
    with (
        mock.patch("worldflux.accel.compilation._missing", lambda device: None),
        mock.patch.object(TDMPC2, "compile_functions", autospec=True) as compiled,
    ):
        Trainer(create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1), config)
    return compiled.call_count


TRAINING = {
    "total_steps": Case(4, steps),
    "batch_size": Case(3, batches),
    "sequence_length": Case(4, batches),
    "learning_rate": Case(0.01, weights),
    "weight_decay": Case(0.5, weights),
    "grad_clip": Case(1e-3, weights),
    "warmup_steps": Case(3, weights),
    "log_interval": Case(2, progress_without_a_bar),
    "eval_interval": Case(3, evaluations),
    "save_interval": Case(4, checkpoints),
    "device": Case("cuda:97", where_it_trains),
    "seed": Case(7, batches),
    "compile": Case(True, what_is_compiled),
}


# Observations of an agent


class Dice(gym.Env[Any, Any]):
    """Random numbers, in episodes of three steps."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._throw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._throw(), float(action[0]), False, self.t == 3, {}

    def _throw(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)


SMALL = dict(
    deter_dim=16, hidden_dim=8, units=8, stoch_discrete=2, stoch_classes=4, blocks=4, bins=15, imagination_horizon=2,
    warmup_steps=0,
)  # fmt: skip


def new_agent(settings: AgentSettings) -> WorldFluxAgent:
    made = WorldFluxAgent("dreamerv3:tiny", Dice(), model_kwargs=SMALL, device="cpu", **asdict(settings))
    return made.learn(20, log_interval=1)


LEARNED: dict[str, WorldFluxAgent] = {}


def agent(settings: AgentSettings) -> WorldFluxAgent:
    """One that has learned; most comparisons start from the same."""
    key = repr(settings)
    if key not in LEARNED:
        LEARNED[key] = new_agent(settings)
    return LEARNED[key]


def learned(settings: AgentSettings) -> Any:
    return agent(settings).model.state_dict()


def updates(settings: AgentSettings) -> Any:
    return agent(settings)._n_updates


def transitions_kept(settings: AgentSettings) -> Any:
    buffer = agent(settings).replay_buffer
    assert buffer is not None
    return buffer.num_transitions


def where_transitions_lie(settings: AgentSettings) -> Any:
    buffer = agent(settings).replay_buffer
    assert buffer is not None
    return buffer.storage


def decision(settings: AgentSettings) -> Any:
    return agent(settings).predict(np.zeros(2, np.float32), deterministic=True)[0]


def episodes_remembered(settings: AgentSettings) -> Any:
    infos = agent(settings).ep_info_buffer
    assert infos is not None
    return len(infos)


def printed(settings: AgentSettings) -> Any:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        new_agent(settings)
    return "train_ratio" in out.getvalue()


def event_files(settings: AgentSettings) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        before = os.getcwd()
        os.chdir(directory)
        try:
            new_agent(settings)
        finally:
            os.chdir(before)
        return sorted(entry.relative_to(directory).parts[0] for entry in Path(directory).rglob("events.*"))


def whose_training_is_compiled(settings: AgentSettings) -> Any:
    with (
        mock.patch("worldflux.accel.compilation._missing", lambda device: None),
        mock.patch.object(DreamerV3, "compile_functions", autospec=True) as compiled,
    ):
        new_agent(settings)
    return compiled.call_count


SEARCH = dict(num_samples=16, num_elites=4, num_pi_trajs=2, iterations=2)
AGENT = {
    "learning_rate": Case(0.1, learned),
    "train_ratio": Case(8, updates),
    "batch_size": Case(3, learned),
    "seq_len": Case(5, learned),
    "buffer_size": Case(12, transitions_kept),
    "buffer_storage": Case("cpu", where_transitions_lie),  # as tensors on that device
    "learning_starts": Case(16, updates),
    "replay_context": Case(False, learned),
    "planner": Case("mppi", decision, dict(planner_kwargs=SEARCH)),
    "planner_kwargs": Case({**SEARCH, "num_samples": 24}, decision, dict(planner="mppi", planner_kwargs=SEARCH)),
    "stats_window_size": Case(2, episodes_remembered),
    "tensorboard_log": Case("logs", event_files),
    "verbose": Case(1, printed),
    "seed": Case(1, learned),
    "compile": Case(True, whose_training_is_compiled),
}

TABLES: dict[type, dict[str, Case]] = {TrainingConfig: TRAINING, AgentSettings: AGENT}
NAMES = {TrainingConfig: "TRAINING", AgentSettings: "AGENT"}


@every_field(TABLES)
def test_every_field_makes_a_difference(cls: Any, name: str) -> None:
    check_field(cls, name, TABLES[cls], COMMON[cls], file="tests/agents/test_settings_fields.py", where=NAMES[cls])


def test_no_entry_is_left_over() -> None:
    check_no_entry_is_left_over(TABLES)


@pytest.mark.parametrize("see", [steps, batches, weights, evaluations, checkpoints, progress_without_a_bar])
def test_without_a_change_training_is_the_same(see: Any) -> None:
    config = TrainingConfig(**COMMON[TrainingConfig])
    assert same(see(config), see(config))


def test_without_a_change_an_agent_is_the_same() -> None:
    settings = AgentSettings(**COMMON[AgentSettings], planner="mppi", planner_kwargs=SEARCH)
    seen = []
    for _ in range(2):
        LEARNED.clear()
        seen.append([see(settings) for see in (learned, updates, decision, transitions_kept, episodes_remembered)])
    assert same(*seen)


def test_a_field_without_an_entry_says_where_to_add_one() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"seed has no entry\. Add one to TRAINING in tests/x\.py"):
        check_field(TrainingConfig, "seed", {}, {}, file="tests/x.py", where="TRAINING")


def test_a_dead_field_is_found() -> None:
    with pytest.raises(AssertionError, match=r"TrainingConfig\.seed changes nothing: 42 or 7"):
        check_field(TrainingConfig, "seed", {"seed": Case(7, steps)}, COMMON[TrainingConfig], file="x", where="X")


# What each field does, in numbers


def test_the_fields_of_training_do_what_they_say() -> None:
    common = COMMON[TrainingConfig]
    assert steps(TrainingConfig(**common)) == [1, 2, 3, 4, 5, 6]
    assert [tuple(obs.shape) for obs in batches(TrainingConfig(**common))] == [(4, 5, 3)] * 6
    assert list(evaluations(TrainingConfig(**common, eval_interval=2))) == [2, 4, 6]
    assert progress_without_a_bar(TrainingConfig(**common, log_interval=3)) == ["3/6", "6/6"]
    assert checkpoints(TrainingConfig(**common, save_interval=4)) == ["step-00000004", "step-00000006"]
    # The first step of a warm-up has rate 0, and without a gradient nothing but the decay changes a weight.
    start = Line().state_dict()
    assert same(weights(TrainingConfig(**{**common, "total_steps": 1}, warmup_steps=5)), start)
    decayed = weights(TrainingConfig(**{**common, "total_steps": 1}, weight_decay=0.5))
    kept = weights(TrainingConfig(**{**common, "total_steps": 1}))
    assert torch.allclose(decayed["body.weight"], kept["body.weight"] - 0.1 * 0.5 * start["body.weight"], atol=1e-6)


def test_a_loss_that_is_not_finite_is_found_at_the_next_log_interval() -> None:
    for interval, found_at in ((1, 3), (2, 4), (5, 5)):
        trainer = Trainer(Line(poison_at=3), TrainingConfig(**COMMON[TrainingConfig], log_interval=interval))
        with pytest.raises(TrainingError, match="not finite at gradient step 3"):
            trainer.train(data())
        assert trainer.step_count == found_at


def test_a_device_that_is_not_there_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigurationError, match=r"device is 'cuda:97', and torch sees \d+ CUDA devices here"):
        Trainer(Line(), TrainingConfig(device="cuda:97"))
    there = "cuda" if torch.cuda.is_available() else "cpu"
    assert Trainer(Line(), TrainingConfig(device="auto")).device.type == there


def test_a_torch_device_becomes_its_name_so_that_a_configuration_can_be_saved(tmp_path: Path) -> None:
    config = TrainingConfig(device=torch.device("cpu"))  # type: ignore[arg-type]
    assert config.device == "cpu" and config == TrainingConfig(device="cpu")
    config.save(tmp_path / "training.json")
    assert TrainingConfig.load(tmp_path / "training.json") == config


@pytest.mark.parametrize("rate", [np.ones(2), torch.ones(2), "3e-4", None, True, 1j])
def test_a_rate_that_is_not_one_number_is_refused(rate: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"learning_rate is .*, expected a finite number"):
        TrainingConfig(learning_rate=rate)
