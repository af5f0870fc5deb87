"""Runs of both families log exactly what docs/metrics.md defines."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from helpers.envs import Samples
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import KVWriter
from stable_baselines3.common.monitor import Monitor

from worldflux import WorldFluxAgent, create_world_model
from worldflux.agents import learning
from worldflux.training import LoggingCallback, create_random_buffer, train

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "metrics.md"
FAMILIES: dict[str, dict[str, Any]] = {
    "dreamerv3": dict(
        deter_dim=16,
        hidden_dim=8,
        units=8,
        stoch_discrete=2,
        stoch_classes=4,
        bins=15,
        imagination_horizon=2,
        loss_scales={"imitation": 1.0},
    ),
    "tdmpc2": dict(
        latent_dim=16,
        hidden_dim=16,
        mlp_dim=16,
        enc_dim=16,
        num_q_networks=2,
        num_bins=15,
        iterations=1,
        num_samples=8,
        num_elites=2,
        use_decoder=True,
        episodic=True,
    ),
}
"""Configurations that log everything they can, in sizes that train in milliseconds."""
TITLES = {"dreamerv3": "DreamerV3", "tdmpc2": "TD-MPC2"}
KEYS = ("first", "second")


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LoggingCallback` writes TensorBoard logs to the working directory."""
    monkeypatch.chdir(tmp_path)


class Telling(Samples):
    """Has everything that adds to a log: two observations, success and an action repeat."""

    action_repeat = 2

    def __init__(self) -> None:
        box = spaces.Box(-1, 1, (2,), np.float32)
        super().__init__(spaces.Dict({key: box for key in KEYS}), spaces.Box(-1, 1, (1,), np.float32), length=8)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, _, over, _ = super().step(action)
        return obs, 1.0, over, False, {"is_success": over}


class Names(KVWriter):
    """Collects the names of logged values."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.seen |= set(key_values)

    def close(self) -> None:
        pass


class Listen(BaseCallback):
    """Adds a writer to the logger of a run."""

    def __init__(self, names: Names) -> None:
        super().__init__()
        self.names = names

    def _on_training_start(self) -> None:
        self.logger.output_formats.append(self.names)

    def _on_step(self) -> bool:
        return True


def documented(family: str) -> set[str]:
    """The keys on the page that a family logs: those in sections and rows that do not name the other family."""
    found = set()
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        for key, row in re.findall(r"^\| `([\w/<>]+)` (.*)$", text, re.M):
            owners = [name for name, shown in TITLES.items() if shown in title or row.startswith(f"| {shown} |")]
            if not owners or family in owners:
                found.add(key)
    return found


DECODED = {"train/reconstruction", "train/reconstruction/<key>"}
INSTEAD = {"train/redundancy"}
"""Losses that DreamerV3 logs with a decoder, and without one."""


@pytest.mark.parametrize("family", FAMILIES)
def test_an_agent_logs_exactly_what_the_page_defines(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "CHECK_INTERVAL", 1)
    agent = WorldFluxAgent(
        f"{family}:tiny",
        Telling(),
        model_kwargs=FAMILIES[family],
        batch_size=2,
        seq_len=4,
        train_ratio=2,
        learning_starts=24,
        buffer_size=500,
        seed=0,
    )
    names = Names()
    evaluation = EvalCallback(Monitor(Telling()), n_eval_episodes=1, eval_freq=32, verbose=0)
    agent.learn(56, [Listen(names), evaluation], log_interval=1)
    agent.learn(16, Listen(names), log_interval=1, reset_num_timesteps=False, asynchronous=True)
    assert agent._n_updates >= 5
    expected = {key for key in documented(family) - INSTEAD if "/" in key and not key.startswith("eval/<")}
    expected |= {key.replace("<key>", each) for key in expected if "<key>" in key for each in KEYS}
    assert names.seen == {key for key in expected if "<" not in key}


@pytest.mark.parametrize(
    ("family", "fields"), [*((family, {}) for family in FAMILIES), ("dreamerv3", {"representation": "redundancy"})]
)
def test_offline_training_logs_the_same_losses_and_what_the_page_adds(
    family: str, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {name: value for name, value in FAMILIES[family].items() if name != "imagination_horizon"} | fields
    model = create_world_model(f"{family}:tiny", obs_shape=(3,), action_dim=1, **sizes)
    buffer = create_random_buffer(capacity=200, obs_shape=(3,), action_dim=1)
    with caplog.at_level(logging.INFO, logger="worldflux.training"):
        train(
            model,
            buffer,
            total_steps=2,
            batch_size=2,
            sequence_length=4,
            eval_interval=2,
            log_interval=1,
            device="cpu",
            eval_data=buffer,
            callbacks=[LoggingCallback(log_interval=1)],
        )
    lines = [record.message for record in caplog.records if record.levelno == logging.INFO]
    logged = {name for line in lines for name in re.findall(r"  ([\w/]+) \S+", line)}
    listed = documented(family) - (DECODED if fields else INSTEAD)
    losses = {key.removeprefix("train/") for key in listed if key.startswith("train/") and "<" not in key}
    losses -= {"n_updates", "learning_rate"}
    health = {key for key in documented(family) if key.startswith("health/")}
    assert "steps_per_second" in documented(family) and "eval/<loss>" in documented(family)
    trained, evaluated = {key for key in logged if "eval/" not in key}, {key for key in logged if "eval/" in key}
    assert trained == losses | health | {"steps_per_second"}
    # An evaluation has no gradients, and TD-MPC2's `loss` is one for all phases.
    assert {"eval/loss", "eval/reward"} <= evaluated <= {f"eval/{name}" for name in losses}
