"""No dead options: changing any setting of an agent makes a difference."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers.envs import Aim
from helpers.field_cases import Case, check_field, check_no_entry_is_left_over, every_field, same

from worldflux import WorldFluxAgent
from worldflux.agents.settings import AgentSettings
from worldflux.models.dreamerv3.world_model import DreamerV3

COMMON: dict[str, Any] = dict(train_ratio=4, batch_size=2, seq_len=4, buffer_size=200, learning_starts=10, seed=0)


SMALL = dict(
    deter_dim=16, hidden_dim=8, units=8, stoch_discrete=2, stoch_classes=4, blocks=4, bins=15, imagination_horizon=2,
    warmup_steps=0,
)  # fmt: skip


def new_agent(settings: AgentSettings) -> WorldFluxAgent:
    made = WorldFluxAgent("dreamerv3:tiny", Aim(), model_kwargs=SMALL, device="cpu", **asdict(settings))
    return made.learn(20, log_interval=1)


LEARNED: dict[str, WorldFluxAgent] = {}


def agent(settings: AgentSettings) -> WorldFluxAgent:
    """An agent that has learned; most comparisons start from the same one."""
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
    return agent(settings).predict(np.zeros(1, np.float32), deterministic=True)[0]


def episodes_remembered(settings: AgentSettings) -> Any:
    infos = agent(settings).ep_info_buffer
    assert infos is not None
    return len(infos)


def printed(settings: AgentSettings) -> Any:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        new_agent(settings)
    return "total_timesteps" in out.getvalue()


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


@every_field({AgentSettings: AGENT})
def test_every_field_makes_a_difference(cls: Any, name: str) -> None:
    check_field(cls, name, AGENT, COMMON, file="tests/agents/test_settings_fields.py", where="AGENT")


def test_no_entry_is_left_over() -> None:
    check_no_entry_is_left_over({AgentSettings: AGENT})


def test_without_a_change_an_agent_is_the_same() -> None:
    settings = AgentSettings(**COMMON, planner="mppi", planner_kwargs=SEARCH)
    seen = []
    for _ in range(2):
        LEARNED.clear()
        seen.append([see(settings) for see in (learned, updates, decision, transitions_kept, episodes_remembered)])
    assert same(*seen)


def test_a_field_without_an_entry_says_where_to_add_one() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"seed has no entry\. Add one to AGENT in tests/x\.py"):
        check_field(AgentSettings, "seed", {}, {}, file="tests/x.py", where="AGENT")


def test_a_dead_field_is_found() -> None:
    with pytest.raises(AssertionError, match=r"AgentSettings\.seed changes nothing: 0 or 7"):
        check_field(AgentSettings, "seed", {"seed": Case(7, updates)}, COMMON, file="x", where="X")
