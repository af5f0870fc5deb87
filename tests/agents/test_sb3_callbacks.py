"""Every callback of SB3 works with both families as with SB3's own algorithms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sb3_families import LENGTH, both, copies, make
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from worldflux.agents import WorldFluxAgent


class Times(BaseCallback):
    """Notes the steps at which it is called, and checks what it finds then."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.times: list[int] = []
        self.stop_at = stop_at

    def _on_step(self) -> bool:
        assert self.model.num_timesteps == self.num_timesteps
        assert self.training_env is self.model.get_env() and self.logger is self.model.logger
        if self.locals:  # which SB3 does not give to `callback_on_new_best`
            self._check_locals()
            assert self.model.replay_buffer.num_transitions == self.num_timesteps  # the step is stored already
        self.times.append(self.num_timesteps)
        return self.num_timesteps != self.stop_at

    def _check_locals(self) -> None:
        assert self.locals["self"] is self.model
        assert len(self.locals["infos"]) == len(self.locals["dones"]) == len(self.locals["rewards"])
        assert len(self.locals["actions"]) == len(self.locals["new_obs"]) == self.training_env.num_envs


@both
def test_all_of_them_together(family: str, tmp_path: Path) -> None:
    """As a script would combine them, with the statistics of a VecNormalize in training and evaluation."""
    on_best, after_eval, every = Times(), Times(), Times()
    agent = make(family, VecNormalize(copies(2)))
    agent.set_logger(configure(str(tmp_path), ["json"]))
    evaluated = VecNormalize(copies(1), training=False, norm_reward=False)
    evaluation = EvalCallback(
        evaluated,
        callback_on_new_best=CallbackList([on_best, StopTrainingOnRewardThreshold(LENGTH + 1)]),
        callback_after_eval=CallbackList([after_eval, StopTrainingOnNoModelImprovement(9, 9)]),
        n_eval_episodes=2,
        eval_freq=10,
        log_path=str(tmp_path / "log"),
        best_model_save_path=str(tmp_path / "best"),
        verbose=0,
        warn=False,
    )
    checkpoints = CheckpointCallback(15, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    agent.learn(
        60,
        [evaluation, checkpoints, EveryNTimesteps(20, every), StopTrainingOnMaxEpisodes(99), LogEveryNTimesteps(20)],
        log_interval=None,
    )

    assert agent.num_timesteps == 60
    assert (on_best.times, after_eval.times, every.times) == ([20], [20, 40, 60], [20, 40, 60])
    found = np.load(tmp_path / "log" / "evaluations.npz")
    assert found["timesteps"].tolist() == [20, 40, 60]
    assert found["results"].tolist() == [[LENGTH] * 2] * 3 and found["ep_lengths"].tolist() == [[LENGTH] * 2] * 3
    assert found["successes"].all()
    np.testing.assert_array_equal(evaluated.obs_rms.mean, agent.get_vec_normalize_env().obs_rms.mean)
    assert evaluated.obs_rms.count > 60
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    logged = {step: {} for step in (20, 40, 60)}
    for line in lines:
        logged[line["time/total_timesteps"]].update(line)
    for values in logged.values():
        assert values["eval/mean_reward"] == values["rollout/ep_rew_mean"] == values["eval/mean_ep_length"] == LENGTH
        assert values["eval/success_rate"] == 1.0
    assert WorldFluxAgent.load(tmp_path / "best" / "best_model").num_timesteps == 20
    assert {path.name for path in tmp_path.glob("rl_model_*")} == {
        f"rl_model_{kind}{steps}_steps.{suffix}"
        for steps in (30, 60)
        for kind, suffix in (("", "zip"), ("replay_buffer_", "pkl"), ("vecnormalize_", "pkl"))
    }

    env = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_30_steps.pkl"), copies(2))
    resumed = WorldFluxAgent.load(tmp_path / "rl_model_30_steps", env)
    resumed.load_replay_buffer(tmp_path / "rl_model_replay_buffer_30_steps.pkl")
    assert (resumed.num_timesteps, resumed.replay_buffer.num_transitions) == (30, 30)
    assert resumed.learn(20, reset_num_timesteps=False).num_timesteps == 50


def evaluating(freq: int, **callbacks: Any) -> EvalCallback:
    return EvalCallback(copies(1), n_eval_episodes=1, eval_freq=freq, **callbacks)


ENDS: dict[str, tuple[Callable[[], BaseCallback], int, int, str]] = {
    "a good evaluation": (
        lambda: evaluating(12, callback_on_new_best=StopTrainingOnRewardThreshold(LENGTH - 1, verbose=1)),
        1,
        12,
        f"the mean reward {LENGTH}.00 is above the threshold {LENGTH - 1}",
    ),
    "evaluations that get no better": (  # the best one, one that is no better, and one too many
        lambda: evaluating(6, callback_after_eval=StopTrainingOnNoModelImprovement(1, 0)), 1, 3 * 6, "",
    ),
    "enough episodes": (
        lambda: StopTrainingOnMaxEpisodes(3, verbose=1), 2, 6 * LENGTH, "because the {0} model reached max_episodes=3",
    ),
    "a callback every 7 steps": (lambda: EveryNTimesteps(7, Times(stop_at=24)), 2, 24, ""),
}  # fmt: skip
"""What ends a run: the callback, the number of environments, the last step, and what is printed."""


@both
@pytest.mark.parametrize("end", ENDS)
def test_callbacks_end_the_run(family: str, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    callback, n_envs, steps, said = ENDS[end]
    agent = make(family, copies(n_envs), train_ratio=0).learn(100, callback())
    assert agent.num_timesteps == steps
    assert said.format(family) in capsys.readouterr().out


Plain = Callable[[dict[str, Any], dict[str, Any]], Any]


def stopping(answer: Any) -> Plain:
    """A function that gives `answer` from the fifth step on."""
    return lambda found, _: answer if found["self"].num_timesteps >= 5 else True


FORMS: dict[str, Callable[[Plain], Any]] = {
    "a function": lambda function: function,
    "a converted function": ConvertCallback,
    "a list": lambda function: [ConvertCallback(function), Times()],
    "a CallbackList": lambda function: CallbackList([Times(), ConvertCallback(function)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_callbacks_come_in_every_form(form: str) -> None:
    assert make("dreamerv3", train_ratio=0).learn(10, FORMS[form](stopping(False))).num_timesteps == 5
    assert make("dreamerv3", train_ratio=0).learn(10, FORMS[form](stopping(True))).num_timesteps == 10


@pytest.mark.parametrize(("answer", "steps"), [(np.bool_(False), 5), (0, 5), (np.bool_(True), 10), (None, 10)])
def test_any_answer_that_means_no_stops_the_run_and_none_at_all_does_not(answer: Any, steps: int) -> None:
    assert make("dreamerv3", train_ratio=0).learn(10, stopping(answer)).num_timesteps == steps


@both
@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_the_progress_bar_counts_the_steps_of_this_call(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    agent, bar = make(family, copies(2), train_ratio=0), ProgressBarCallback()

    agent.learn(20, bar)
    assert (bar.pbar.n, bar.pbar.total) == (20, 20)
    agent.learn(10, bar, reset_num_timesteps=False)
    assert (bar.pbar.n, bar.pbar.total) == (10, 10)

    assert agent.learn(10, progress_bar=True).num_timesteps == 10
    assert "10/10 [" in capsys.readouterr().err


@both
def test_callbacks_hear_of_the_beginning_and_the_end_in_order(family: str) -> None:
    heard: list[str] = []

    class Listener(BaseCallback):
        def _on_training_start(self) -> None:
            assert self.locals["total_timesteps"] == 3
            heard.append("training starts")

        def _on_rollout_start(self) -> None:
            heard.append("acts")

        def _on_step(self) -> bool:
            heard.append("has acted")
            return True

        def _on_rollout_end(self) -> None:
            heard.append("is done")

        def _on_training_end(self) -> None:
            heard.append("training ends")

    make(family, train_ratio=0).learn(3, Listener())

    assert heard == ["training starts", *["acts", "has acted", "is done"] * 3, "training ends"]
