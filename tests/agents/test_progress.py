"""What `learn` says about itself: what it will do, how long it takes, how far it is, and that nothing was learned."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
import torch
from helpers.agents import make_agent, make_planner, weights
from helpers.envs import CountingEnv
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor

from worldflux.agents import AgentCheckpointCallback, WorldFluxAgent, pace, progress
from worldflux.agents.progress import duration
from worldflux.envs import make_vec_env
from worldflux.training.checkpoint import checkpoints_in

ENV = "CartPole-v1"


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of learn is long enough for an estimate."""
    monkeypatch.setattr(progress, "_SHORT", 0.0)
    monkeypatch.setattr(pace, "_MANY", 3)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("worldflux: ")]


# --- what it will do


def test_learn_says_once_what_it_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    agent = make_agent()
    count = sum(weights.numel() for weights in agent.model.parameters() if weights.requires_grad)
    for _ in range(3):
        agent.learn(20, reset_num_timesteps=False)
    told = (
        f"worldflux: dreamerv3:tiny with {count:,} parameters on the CPU (2 threads; on a busy machine, "
        "OMP_NUM_THREADS=1 is faster for a small model); one gradient step every 2 environment steps "
        "(train_ratio 6, batches of 2 x 6), from step 10 on"
    )
    assert said(capsys) == [told]

    agent.train_ratio = 24
    agent.learn(20, reset_num_timesteps=False)
    (again,) = said(capsys)
    assert "; 2 gradient steps per environment step (train_ratio 24, batches of 2 x 6)" in again
    agent.learn(40)  # twice as long
    assert len(said(capsys)) == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (89, "89 seconds"),
        (90, "2 minutes"),
        (5399, "90 minutes"),
        (5400, "2 hours"),
        (9 * 86400, "9 days"),
        (1e8, "1,157 days"),
    ],
)
def test_durations_are_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize("kind", ["none", "closed", "broken"])
@pytest.mark.parametrize("bars", [False, True])
def test_learn_needs_no_stderr(kind: str, bars: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> TextIO:
        end, written = os.pipe()
        os.close(end)
        return os.fdopen(written, "w")

    def closed() -> TextIO:
        stream = open(os.devnull, "w")
        stream.close()
        return stream

    if bars:
        import tqdm as tqdm
    else:
        monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    agent = make_agent()
    stream = {"none": lambda: None, "closed": closed, "broken": broken}[kind]()
    monkeypatch.setattr(sys, "stderr", stream)
    agent.learn(12)
    assert agent.num_timesteps == 12
    if kind == "broken":
        with suppress(BrokenPipeError):  # what could not be written is still in its buffer
            stream.close()


# --- how long it takes


def test_the_estimate_follows_from_measured_steps() -> None:
    measured = pace.Pace(meanwhile=False)
    for seconds in (9.0, 0.5, 1.5):  # the first one compiles
        measured.add_gradient_step(seconds)
        measured.vec_step.add(seconds / 10)
    assert measured.training == 11 and measured.gradient_step.mean == 1
    assert measured.remaining(100, 25) == pytest.approx(100 * 0.1 + 25 * 1)
    assert measured.remaining(100, 0) == pytest.approx(10)
    assert pace.Pace(meanwhile=False).remaining(100, 25) is None


@pytest.mark.parametrize(("meanwhile", "step"), [(False, 0.02 + 0.03), (True, 0.02)])
def test_before_the_planner_acts_its_time_is_added_to_that_of_the_environment(meanwhile: bool, step: float) -> None:
    measured = pace.Pace(meanwhile=meanwhile)
    for _ in range(3):
        measured.add_gradient_step(0.1)
        measured.random_step.add(0.03)
    assert measured.remaining(100, 100) is None
    measured.acting = 0.02
    assert measured.remaining(100, 100) == pytest.approx(100 * step + 100 * 0.1)


def test_a_long_call_says_once_how_long_it_takes(times: None, capsys: pytest.CaptureFixture[str]) -> None:
    agent = make_agent()
    agent.learn(60)
    assert re.fullmatch(r"worldflux: 60 steps take about \d+ \w+ on this CPU", said(capsys)[-1])
    assert agent.remaining_seconds() == 0 and agent.remaining_seconds(1060) > 0
    assert agent._report.pace.remaining(0, 3) == pytest.approx(3 * agent._report.pace.gradient_step.mean)


def test_a_short_call_says_nothing_about_time(capsys: pytest.CaptureFixture[str]) -> None:
    make_agent().learn(60)
    assert len(said(capsys)) == 1


@pytest.mark.parametrize("processes", [False, True])
def test_the_burst_of_tdmpc2_is_announced_and_counted(
    times: None, processes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SHORT_BURST", 0.0)
    monkeypatch.setattr(progress, "_REFRESHED", 0.0)
    agent = make_planner(make_vec_env("Pendulum-v1", 2, processes=True) if processes else "Pendulum-v1", train_ratio=16)
    seen: list[Any] = []
    watch = progress.ProgressBar()

    class Watch(BaseCallback):
        def _on_training_start(self) -> None:
            agent.at_gradient_steps(lambda: seen.append((agent.burst, watch.text())))

        def _on_step(self) -> bool:
            return True

    agent.learn(30, [Watch(), watch])
    burst = [item for item in seen if item[0] is not None]
    assert [item[0] for item in burst] == [(done, 20) for done in range(20)] and agent.burst is None
    assert burst[5][1].endswith("left, gradient step 5/20")
    text = said(capsys)
    assert text[1].startswith("worldflux: 20 gradient steps at once after the random start, about ")
    assert text[2].startswith("worldflux: 30 steps take about ") and len(text) == 3


def test_a_very_long_call_on_a_cpu_names_a_preset_whose_cost_was_measured(
    times: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cost, measured = pace.PresetCost(64.0, 0.25, 0.0, -1.0), []
    learned = []
    for long, measure in ((0.0, True), (0.0, False), (1e9, False)):
        monkeypatch.setattr(progress, "_LONG", long)
        measure_it = lambda *args: measured.append(pace.measured_cost(*args)) or cost  # noqa: E731
        monkeypatch.setattr(progress, "measured_cost", measure_it if measure else pace.measured_cost)
        monkeypatch.setattr(progress.Report, "_own_acting", lambda report: 1e9)
        learned.append(make_agent().learn(60))
    first, second, third = [line for line in said(capsys) if " take about " in line]
    alternative = "; dreamerv3:tiny with its own settings (train_ratio 64): about 1 second"
    assert first.endswith(f"on this CPU{alternative}")
    assert second.endswith("on this CPU") and third.endswith("on this CPU")  # the preset takes longer than this agent
    (found,) = measured
    assert (found.train_ratio, found.gradient_steps) == (64, 0.25) and found.gradient_step > found.acting > 0
    assert found.seconds(100, 2, 0.5) == pytest.approx(100 * ((found.acting + 0.5) / 2 + 0.25 * found.gradient_step))
    assert torch.equal(weights(learned[0]), weights(learned[2]))  # measuring another model changes nothing


# --- nothing learned


def test_a_call_that_is_too_short_warns_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    agent = make_agent(learning_starts=50)
    agent.learn(20)
    text = said(capsys)
    assert text[1] == (
        "worldflux: warning: this call takes 20 environment steps, and the first gradient step comes after 50 "
        "(learning_starts): the agent will learn nothing. Raise total_timesteps, or lower learning_starts."
    )
    assert text[2] == (
        "worldflux: warning: the agent is untrained: no gradient step was taken, because 20 environment steps were "
        "taken of 50. Raise total_timesteps, or lower learning_starts."
    )
    agent.learn(10, reset_num_timesteps=False)
    assert said(capsys) == []  # once is enough
    agent.learn(30, reset_num_timesteps=False)
    assert agent._n_updates and said(capsys) == []


def test_no_warning_where_nothing_was_to_be_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_agent(train_ratio=0).learn(20)
    make_agent().learn(40).save_checkpoint(tmp_path / "checkpoint")
    WorldFluxAgent.load(tmp_path / "checkpoint", ENV, resume=True).learn(2, reset_num_timesteps=False)
    text = said(capsys)
    assert len(text) == 3 and "collecting without training (train_ratio 0)" in text[0]
    assert not any("warning" in line for line in text)


# --- stopping


class Interrupt(BaseCallback):
    """Sends Ctrl-C to this process before some gradient step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_training_start(self) -> None:
        self.model.at_gradient_steps(self._look)

    def _look(self) -> None:
        if self.model._n_updates == self.at and not self.model.stopping:
            os.kill(os.getpid(), signal.SIGINT)

    def _on_step(self) -> bool:
        return True


def test_ctrl_c_stops_between_the_gradient_steps_of_a_burst(tmp_path: Path) -> None:
    agent = make_planner(train_ratio=16)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(40, [AgentCheckpointCallback(tmp_path, 20), Interrupt(7)])
    assert (agent.num_timesteps, agent._n_updates, agent._learner.updates_owed) == (20, 7, 13)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000020"]
    resumed = []
    for _ in range(2):
        resumed.append(WorldFluxAgent.load(tmp_path, "Pendulum-v1", device="cpu", resume=True))
        assert resumed[-1]._n_updates == 7  # the checkpoint of this step was written again
        resumed[-1].learn(0, reset_num_timesteps=False)
        assert resumed[-1]._n_updates == 20
    assert torch.equal(weights(resumed[0]), weights(resumed[1]))


def test_ctrl_c_breaks_off_the_evaluation_of_a_callback(tmp_path: Path) -> None:
    class Endless(CountingEnv):
        steps = 0

        def step(self, action: Any) -> Any:
            self.steps += 1
            if self.steps == 5:
                os.kill(os.getpid(), signal.SIGINT)
            assert self.steps < 20
            obs, reward, _, _, info = super().step(action)
            return obs, reward, False, False, info

    agent, env = make_agent(CountingEnv()), Endless()
    evaluation = EvalCallback(Monitor(env), eval_freq=13, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(40, [evaluation, AgentCheckpointCallback(tmp_path, 1000)])
    assert agent.num_timesteps == 13 and env.steps <= 6
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000013"]
    assert agent.learn(5, reset_num_timesteps=False).num_timesteps == 18


def test_a_callback_may_still_look_at_one_action_of_the_last_step() -> None:
    class Look(BaseCallback):
        looked = 0

        def _on_step(self) -> bool:
            if self.num_timesteps == 5:
                os.kill(os.getpid(), signal.SIGINT)
            self.model.predict(np.zeros(4, np.float32))
            self.looked += 1
            return True

    look = Look()
    with pytest.raises(KeyboardInterrupt):
        make_agent(train_ratio=0).learn(20, look)
    assert look.looked == 6
