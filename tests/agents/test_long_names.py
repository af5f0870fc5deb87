"""Observations with long names that begin alike are told apart in every log."""

import io
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from helpers.envs import CountingEnv, Samples
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import CSVOutputFormat, HumanOutputFormat, Logger, configure
from stable_baselines3.common.monitor import Monitor

from worldflux import WorldFluxAgent

NAMES = {
    "robosuite": ["robot0_joint_pos_cos", "robot0_joint_pos_sin"],
    "dm_control's arm": ["jaco_arm/joints_pos", "jaco_arm/joints_torque", "jaco_arm/joints_vel"],
    "lerobot": ["observation.images.left_wrist", "observation.images.left_front"],
    "very long": ["x" * 200 + "a", "x" * 200 + "b"],
    "with slashes in front": ["/a/" + "y" * 40 + "1", "/a/" + "y" * 40 + "2"],
}
SETTINGS: dict[str, Any] = {"batch_size": 4, "train_ratio": 2, "learning_starts": 40, "buffer_size": 3000, "seed": 0}


def with_keys(keys: list[str]) -> Samples:
    space = spaces.Dict({key: spaces.Box(-9, 9, (2,), np.float32) for key in keys})
    return Samples(space, spaces.Box(-1, 1, (2,), np.float32), length=9)


def make(keys: list[str], family: str = "dreamerv3:tiny", **settings: Any) -> WorldFluxAgent:
    return WorldFluxAgent(family, with_keys(keys), seq_len=8, **SETTINGS, **settings)


@pytest.mark.parametrize(
    ("case", "family"), [*((case, "dreamerv3:tiny") for case in NAMES), ("very long", "tdmpc2:tiny")]
)
def test_long_names_are_printed_in_full(case: str, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(NAMES[case], family, verbose=1).learn(80, log_interval=1)

    printed = capsys.readouterr().out
    assert "n_updates" in printed
    if family.startswith("dreamerv3"):
        for key in NAMES[case]:
            assert f"{key} " in printed


def test_loggers_of_users_are_widened_too(tmp_path: Any) -> None:
    table = io.StringIO()
    agent = make(NAMES["robosuite"])
    agent.set_logger(
        Logger(str(tmp_path), [HumanOutputFormat(table, max_length=20), CSVOutputFormat(f"{tmp_path}/a.csv")])
    )
    agent.learn(60, log_interval=1)
    assert all(f"{key} " in table.getvalue() for key in NAMES["robosuite"])

    agent = make(NAMES["lerobot"])
    agent.set_logger(configure(str(tmp_path), ["log", "json"]))
    agent.learn(60, log_interval=1)
    assert all(f"{key} " in (tmp_path / "log.txt").read_text() for key in NAMES["lerobot"])


@pytest.mark.parametrize("table", ["mine/", "a/", ""])  # names are indented in tables that have a title
def test_what_a_user_records_beside_them_is_printed(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Records(BaseCallback):
        def _on_step(self) -> bool:
            for end in "ab":
                self.logger.record(table + "z" * 50 + end, 1.0)
            return True

    make(NAMES["robosuite"], verbose=1).learn(60, Records(), log_interval=1)

    assert "z" * 50 + "b" in capsys.readouterr().out


def test_evaluations_between_two_dumps_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    keys = NAMES["lerobot"]

    make(keys, verbose=1).learn(
        80, EvalCallback(Monitor(with_keys(keys)), eval_freq=30, n_eval_episodes=1), log_interval=1
    )

    assert "mean_ep_length" in capsys.readouterr().out


def test_tables_of_short_names_keep_their_width(tmp_path: Any) -> None:
    table = HumanOutputFormat(io.StringIO())
    agent = WorldFluxAgent("dreamerv3:tiny", CountingEnv(), seq_len=8, **SETTINGS)
    agent.set_logger(Logger(str(tmp_path), [table]))
    agent.learn(60, log_interval=1)

    assert table.max_length == 36
