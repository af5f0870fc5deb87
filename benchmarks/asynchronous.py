"""Measures what `learn(asynchronous=True)` gains where environments are slow.

    python benchmarks/asynchronous.py dreamerv3:tiny
    python benchmarks/asynchronous.py tdmpc2:tiny --cases waits-20 works-20 --turns 9

In the cases `waits-M`, a step of the only environment, in this process, takes M milliseconds of waiting, as for a
simulator on another machine. In `works-M`, each of two environments in a process of its own computes for M
milliseconds, and in `waits-M-processes` each waits. `train_ratio` is set so that the gradient steps that a step asks
for take about as long as everything else of the step; for M = 0 it is that of the preset.

Two agents with the same settings, one of which acts and learns in turn, alternate in turns of equally many steps, so
that other load affects both. All times are medians over the turns, in milliseconds per step of all environments:

    env, learn       the steps of the environments, and the gradient steps, where acting and learning take turns
    turns, beside    everything, with `asynchronous=False` and `True`
    best             the longer of `learn` and of everything else, which no overlap can beat; with processes, everything
                     else is not known, and `best` is the longer of `learn` and `env`
    gain             median of the ratios `turns / beside` of neighbouring turns
    idle             shares of the time in which the learner took no gradient step, and the environments made no step
    cpu              processor time of this process
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from worldflux import WorldFluxAgent

CASES = ("waits-0", "waits-5", "waits-20", "waits-50", "waits-20-processes", "works-20")
LEAST_STEPS = 10


class Slow(gym.Env[Any, Any]):
    """An environment whose steps take a while; the info says how many seconds.

    Args:
        seconds: Seconds of a step.
        works: Whether it computes rather than waits.
    """

    def __init__(self, seconds: float, works: bool) -> None:
        self.observation_space = spaces.Box(-1, 1, (8,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.seconds, self.works, self.t = seconds, works, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode of 100 steps."""
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Takes the time."""
        began = time.perf_counter()
        if self.works:
            began_cpu = time.process_time()
            while time.process_time() - began_cpu < self.seconds:
                pass
        elif self.seconds:
            time.sleep(self.seconds)
        self.t += 1
        info = {"seconds": time.perf_counter() - began}
        return self.observation_space.sample(), float(action[0]), False, self.t == 100, info


class Stepping(BaseCallback):
    """Adds up the seconds in which environments made steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def _on_step(self) -> bool:
        self.seconds += max(info["seconds"] for info in self.locals["infos"])
        return True


class Measured:
    """An agent and the seconds of its gradient steps.

    Args:
        preset: Preset of the model.
        env: Its environments.
        asynchronous: How it learns.
    """

    def __init__(self, preset: str, env: VecEnv, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        # With a ratio of 0 in the beginning, no gradient steps make up for a random start.
        self.agent = WorldFluxAgent(
            preset, env, train_ratio=0, learning_starts=300, buffer_size=20_000, seed=0, device="cpu"
        )
        self.learning, take = 0.0, self.agent._learner.take_step

        def timed(*args: Any) -> None:
            began = time.perf_counter()
            take(*args)
            self.learning += time.perf_counter() - began

        self.agent._learner.take_step = timed  # type: ignore[method-assign]

    def collect(self) -> None:
        """Fills the replay buffer with enough to begin."""
        for env in getattr(self.agent.env, "envs", []):
            env.unwrapped.seconds, seconds = 0.0, env.unwrapped.seconds
        self.agent.learn(320)
        for env in getattr(self.agent.env, "envs", []):
            env.unwrapped.seconds = seconds

    def turn(self, vec_steps: int) -> dict[str, float]:
        """Takes so many steps of all environments; milliseconds for each, and shares."""
        stepping, self.learning = Stepping(), 0.0
        began, cpu = time.perf_counter(), time.process_time()
        steps = vec_steps * self.agent.n_envs
        self.agent.learn(steps, stepping, reset_num_timesteps=False, asynchronous=self.asynchronous)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        return {
            "all": 1000 * wall / vec_steps,
            "env": 1000 * stepping.seconds / vec_steps,
            "learn": 1000 * self.learning / vec_steps,
            "learner idle": 1 - self.learning / wall,
            "envs idle": 1 - stepping.seconds / wall,
            "cpu": 1000 * cpu / vec_steps,
        }


def environments(case: str) -> VecEnv:
    """The environments of a case."""
    kind, milliseconds, *where = case.split("-")
    make: Callable[[], Slow] = lambda: Slow(float(milliseconds) / 1000, kind == "works")  # noqa: E731
    if kind == "works" or where:
        return SubprocVecEnv([make] * 2)
    return DummyVecEnv([make])


def measure(preset: str, case: str, turns: int, seconds: float) -> str:
    """Measures a case; a row of the table."""
    pair = [Measured(preset, environments(case), asynchronous) for asynchronous in (False, True)]
    for one in pair:
        one.collect()
    first = pair[0].agent
    batch, default = first.batch_size * first.seq_len, first.model.online_defaults().train_ratio
    pair[0].turn(LEAST_STEPS)
    step = pair[0].turn(2 * LEAST_STEPS)["all"]
    gradient_step = 1000 * statistics.median(seconds_of(first) for _ in range(15))
    updates = step / gradient_step
    if case == "waits-0":
        updates = first.n_envs * (1.0 if default is None else default / batch)
    for one in pair:
        one.agent.train_ratio = updates * batch / one.agent.n_envs
        one.turn(LEAST_STEPS)
    steps = max(int(1000 * seconds / (step + gradient_step * updates)), LEAST_STEPS)
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for turn in range(turns):
        for one in pair if turn % 2 else pair[::-1]:
            found[one.asynchronous].append(one.turn(steps))
    for one in pair:
        assert one.agent.env is not None
        one.agent.env.close()

    def median(asynchronous: bool, name: str) -> float:
        return statistics.median(one[name] for one in found[asynchronous])

    gain = statistics.median(a["all"] / b["all"] for a, b in zip(found[False], found[True], strict=True))
    env, learn, in_turn = (median(False, name) for name in ("env", "learn", "all"))
    best = max(learn, env if isinstance(pair[0].agent.env, SubprocVecEnv) else in_turn - learn)
    idle = [f"{100 * median(beside, name):.0f}%" for beside in (False, True) for name in ("learner idle", "envs idle")]
    times = [f"{x:.1f}" for x in (env, learn, in_turn, median(True, "all"), best)]
    cpu = [f"{median(beside, 'cpu'):.1f}" for beside in (False, True)]
    cells = [case, f"{updates:.2f}", *times, f"{gain:.2f}", f"{idle[0]}, {idle[1]}", f"{idle[2]}, {idle[3]}", *cpu]
    return f"| {' | '.join(cells)} |"


def seconds_of(agent: WorldFluxAgent) -> float:
    """Seconds of one gradient step."""
    began = time.perf_counter()
    agent.trainer.step(agent._learner.sample(agent.replay_buffer, None), agent.replay_buffer)  # type: ignore[arg-type]
    return time.perf_counter() - began


def main() -> None:
    """Measures the cases of a preset, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="about the length of a turn")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        "| case | gradient steps per step | env | learn | turns | beside | best | gain | idle in turns: learner, "
        "environments | idle beside | cpu in turns | cpu beside |"
    )
    print("|" + " --- |" * 12)
    for case in options.cases:
        print(measure(options.preset, case, options.turns, options.seconds), flush=True)


if __name__ == "__main__":
    main()
