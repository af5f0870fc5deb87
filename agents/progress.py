"""What learning says on stderr: what it will do, how long that takes, and how far it is."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from stable_baselines3.common.callbacks import BaseCallback

from worldflux.accel import ranks
from worldflux.accel.device import is_small
from worldflux.agents.building import shown_model
from worldflux.agents.pace import Pace, measured_cost, seconds_of
from worldflux.errors import ConfigurationError, MissingDependencyError, install_hint
from worldflux.factory import find_preset

if TYPE_CHECKING:
    from worldflux.agents.agent import WorldFluxAgent

_SHORT = 60.0
"""Seconds of a call of `learn` that need no estimate."""
_SHORT_BURST = 5.0
"""Seconds of gradient steps in a row that need no announcement."""
_LONG = 3600.0
"""Seconds of a call of `learn` on a CPU after which a cheaper preset is named."""
_REFRESHED = 0.5
"""Seconds between two changes of a progress bar."""
_MEASURED_STEPS = 20
"""Steps of the environments to measure before an estimate where no gradient step is taken."""


def duration(seconds: float) -> str:
    """A time in words, such as "40 seconds" or "9 days"."""
    units = (("second", 1, 90), ("minute", 60, 5400), ("hour", 3600, 48 * 3600), ("day", 86400, float("inf")))
    unit, size = next((unit, size) for unit, size, limit in units if seconds < limit)
    number = max(round(seconds / size), 1)
    return f"{number:,} {unit}{'s' if number > 1 else ''}"


class Report:
    """Says what an agent's `learn` will do and how long that takes.

    What it does is said once per agent, and again if the train ratio changed or the call is much longer than before. An
    estimate of the time is said once per call, as soon as a few gradient steps were measured, if the call is long.

    Attributes:
        pace: The times that the present call has measured.

    Args:
        agent: The agent.
    """

    def __init__(self, agent: WorldFluxAgent) -> None:
        self.agent = agent
        self.pace = Pace(meanwhile=False)
        self._announced: tuple[float, int] | None = None
        self._warned = False
        self._steps = 0
        self._estimated = self._burst_told = True

    def begin(self, steps: int, max_lag: int | None = None) -> None:
        """Announces a call of `learn`.

        Args:
            steps: Environment steps of the call.
            max_lag: Gradient steps by which acting may run ahead of learning; None where they take turns.
        """
        agent, learner = self.agent, self.agent._learner
        self.pace = Pace(meanwhile=agent._steps_in_subprocesses, beside=max_lag is not None)
        self._steps, self._estimated, self._burst_told = steps, False, False
        if not steps:
            return
        before = self._announced
        if before is None or agent.train_ratio != before[0] or steps >= 2 * before[1]:
            self._announced, self._warned = (agent.train_ratio, steps), False
            ranks.say(self._description(max_lag))
            wait = learner.steps_to_wait
            if wait > steps and not learner.n_updates and agent.train_ratio:
                ranks.say(
                    f"warning: this call takes {steps:,} environment steps, and the first gradient step comes after "
                    f"{learner.learning_starts:,} (learning_starts): the agent will learn nothing. Raise "
                    "total_timesteps, or lower learning_starts."
                )

    def end(self) -> None:
        """Warns if the agent has learned nothing."""
        agent, learner = self.agent, self.agent._learner
        if learner.n_updates or not agent.train_ratio or not self._steps or self._warned:
            return
        self._warned = True
        if learner.steps_to_wait:
            reason = f"{learner.collected:,} environment steps were taken of {learner.learning_starts:,}"
            remedy = "Raise total_timesteps, or lower learning_starts."
        else:
            reason = f"there are fewer than {agent.batch_size} windows of {agent.seq_len} steps"
            remedy = "Raise total_timesteps, or lower batch_size or seq_len."
        ranks.say(f"warning: the agent is untrained: no gradient step was taken, because {reason}. {remedy}")

    def check(self) -> None:
        """Says how long a burst of gradient steps and the whole call take, once this is known."""
        if (self._burst_told and self._estimated) or not ranks.is_first():
            return
        agent, pace = self.agent, self.pace
        burst, update = agent.burst, pace.gradient_step.mean
        if burst is not None and not self._burst_told and update is not None:
            self._burst_told = True
            seconds = burst[1] * update
            if seconds > _SHORT_BURST:
                ranks.say(f"{burst[1]:,} gradient steps at once after the random start, about {duration(seconds)}")
                # On CUDA, graphs would be captured for this alone.
                if agent.device.type == "cpu" and update * agent._learner.updates_until(self._steps_left) > _SHORT:
                    pace.acting = self._own_acting()
        few = not agent.train_ratio and pace.vec_step.count >= _MEASURED_STEPS
        if self._estimated or not (pace.is_measured or few):
            return
        remaining = agent.remaining_seconds()
        if remaining is None:
            return
        self._estimated = True
        if pace.elapsed + remaining > _SHORT:
            ranks.say(self._estimate(pace.elapsed + remaining))

    @property
    def _steps_left(self) -> int:
        return max(self.agent._total_timesteps - self.agent.num_timesteps, 0)

    def _description(self, max_lag: int | None) -> str:
        agent, device = self.agent, self.agent.device
        threads = torch.get_num_threads()
        place = f"the CPU ({threads} thread{'s' if threads > 1 else ''})"
        if threads > 1 and is_small(agent.model):
            place = f"the CPU ({threads} threads; on a busy machine, OMP_NUM_THREADS=1 is faster for a small model)"
        if device.type == "cuda":
            place = f"{device} ({torch.cuda.get_device_name(device)})"
        text = f"{shown_model(agent.model)} on {place}; {agent._learner.describe_schedule()}"
        if max_lag is None:
            return text
        return f"{text}; learning while the environments step, at most {max_lag} gradient steps behind"

    def _estimate(self, seconds: float) -> str:
        agent = self.agent
        place = "CPU" if agent.device.type == "cpu" else "GPU" if agent.device.type == "cuda" else "device"
        text = f"{self._steps:,} steps take about {duration(seconds)} on this {place}"
        if place == "CPU" and seconds > _LONG and ranks.size() == 1:  # others would have to join what is measured
            text += self._alternative(seconds)
        return text

    def _alternative(self, seconds: float) -> str:
        """The family's smallest preset with its own settings, where it takes much less time, which is measured."""
        agent, pace = self.agent, self.pace
        preset = f"{agent.model.config.model_type}:tiny"
        step = pace.vec_step.mean if pace.vec_step.mean is not None else pace.random_step.mean
        if find_preset(preset) is None or agent.env is None or step is None:
            return ""
        try:
            cost = measured_cost(
                preset, agent.obs_codec, agent.action_codec, agent.env, agent._last_obs, torch.device(agent.device)
            )
        except ConfigurationError:  # it does not take these spaces
            return ""
        waiting = step if pace.vec_step.mean is None else max(step - self._own_acting(), 0.0)
        other = cost.seconds(self._steps, agent._envs_of_all, waiting)
        if other > seconds / 2:
            return ""
        return f"; {preset} with its own settings (train_ratio {cost.train_ratio:g}): about {duration(other)}"

    def _own_acting(self) -> float:
        """Seconds in which this agent chooses its actions."""
        obs: Any = self.agent._last_obs
        return seconds_of(lambda: self.agent.actor.predict(obs, None, None, deterministic=True, task=0))


class ProgressBar(BaseCallback):
    """Shows a bar of tqdm on stderr with the time that learning will still take, for this call of `learn`.

    The bar that SB3 has predicts the time from the steps so far, which says nothing before the first gradient step.

    Args:
        total: Steps of the whole run, if the bar shows more than this call.

    Raises:
        MissingDependencyError: If tqdm is not installed.
    """

    model: WorldFluxAgent

    def __init__(self, total: int | None = None) -> None:
        super().__init__()
        self.total = total
        self._bar: Any = None
        self._offset = 0
        self._shown = 0.0

    def _on_training_start(self) -> None:
        self._offset = self.model.num_timesteps if self.total is None else 0
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise MissingDependencyError(f"Progress bars need tqdm: {install_hint('extra')}") from error
        self._bar = tqdm(
            total=self.locals["total_timesteps"] - self._offset if self.total is None else self.total,
            initial=self.model.num_timesteps - self._offset,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self.model.at_gradient_steps(self._show)

    def _on_step(self) -> bool:
        if self._bar is not None:
            self._show()
            self._bar.update(self.num_timesteps - self._offset - self._bar.n)
        return True

    def _on_training_end(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self.text(), refresh=False)
            self._bar.close()
            self._bar = None

    def _show(self) -> None:
        now = time.monotonic()
        if self._bar is not None and now - self._shown > _REFRESHED:
            self._shown = now
            self._bar.set_postfix_str(self.text(), refresh=self.model.burst is not None)

    def text(self) -> str:
        """What stands behind the bar: the remaining time, and how far a burst of gradient steps is."""
        remaining = self.model.remaining_seconds(self.total)
        parts = [f"{duration(remaining)} left"] if remaining else []
        if self.model.burst is not None:
            parts.append("gradient step {:,}/{:,}".format(*self.model.burst))
        return ", ".join(parts)
