"""Trains both families on recordings of mixed quality, and compares their scores with cloning the recorded actions.

    python benchmarks/offline_quality.py cartpole --models dreamerv3 cloning --seeds 0 1 2
    python benchmarks/offline_quality.py cartpole --models dreamerv3 --set 'loss_scales={"imitation": 1}' --seeds 0 1 2

    python benchmarks/offline_quality.py pendulum --models tdmpc2 --online 4000 --seeds 0 1 2

Half of each recording was made by random actions, and half by a controller a third of whose actions are random. The
models learn from it with `train` alone; `cloning` fits a network of two layers to the recorded actions. Each prints a
line of JSON with its mean return over 20 episodes with deterministic actions, of the policy and of the planner, beside
the mean return of the recording.

With `--online`, each model then goes on in the environment for so many steps, with half of each batch from the
recording, and so does a new model without a recording (`"from": "scratch"`). Both are evaluated every 500 steps, with
the planner that the family uses.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from torch import Tensor, nn

from worldflux import WorldFluxAgent, create_world_model
from worldflux.accel.randomness import keeping_random_streams
from worldflux.envs import collect, make_vec_env
from worldflux.training import ReplayBuffer, train

Controller = Callable[[np.ndarray], np.ndarray]


def balance(obs: np.ndarray) -> np.ndarray:
    """Pushes the cart under the pole. `[1, 4]` to `[1]`"""
    return (obs[:, 2] + 0.3 * obs[:, 3] + 0.02 * obs[:, 0] + 0.05 * obs[:, 1] > 0).astype(np.int64)


def swing_up(obs: np.ndarray) -> np.ndarray:
    """Swings a pendulum up by its energy, and holds it. `[1, 3]` to `[1, 1]`"""
    cosine, sine, velocity = obs.T
    angle, missing = np.arctan2(sine, cosine), 5.0 - (velocity**2 / 6.0 + 5.0 * cosine)
    pump = 2.0 * np.sign(velocity) * np.clip(missing, -1, 1)
    torque = np.where(np.abs(angle) < 0.4, -10.0 * angle - 2.0 * velocity, pump)
    return np.clip(torque, -2.0, 2.0)[:, None].astype(np.float32)


@dataclass(frozen=True)
class Task:
    """A task with the controller of the better half of its recording."""

    env: str
    controller: Controller
    models: dict[str, str]
    settings: dict[str, dict[str, Any]]
    """Arguments of `train` for each model."""


DREAMER = {"total_steps": 4_000, "batch_size": 16, "sequence_length": 17, "learning_rate": 4e-4}
TDMPC2 = {"total_steps": 8_000, "batch_size": 256, "sequence_length": 4, "learning_rate": 3e-4}
TASKS = {
    "cartpole": Task("CartPole-v1", balance, {"dreamerv3": "dreamerv3:tiny"}, {"dreamerv3": DREAMER}),
    "pendulum": Task(
        "Pendulum-v1",
        swing_up,
        {"dreamerv3": "dreamerv3:tiny", "tdmpc2": "tdmpc2:tiny"},
        {"dreamerv3": DREAMER, "tdmpc2": TDMPC2},
    ),
}


class Noisy:
    """A controller with a share of random actions, as a policy for `collect`."""

    def __init__(self, controller: Controller, space: Any, seed: int, share: float = 1 / 3) -> None:
        self.controller, self.space, self.share = controller, space, share
        self.space.seed(seed)
        self.rng = np.random.default_rng(seed)

    def predict(self, obs: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        """The action of the controller, or a random one."""
        if self.rng.random() < self.share:
            return np.array([self.space.sample()]), None
        return self.controller(obs), None


def record(task: Task, steps: int, seed: int) -> ReplayBuffer:
    """Random actions in half of the steps, and the noisy controller in the others."""
    space = make_vec_env(task.env).action_space
    random = collect(task.env, steps=steps // 2, seed=2 * seed)
    controlled = collect(task.env, Noisy(task.controller, space, seed), steps=steps // 2, seed=2 * seed + 1)
    both = ReplayBuffer(
        2 * steps,
        random.obs_shape,
        random.action_dim,
        action_type=random.action_type,
        action_classes=random.action_classes or None,
        seed=seed,
    )
    both.add_episodes_of(random)
    both.add_episodes_of(controlled)
    return both


def returns_and_steps(buffer: ReplayBuffer) -> tuple[np.ndarray, Tensor, Tensor]:
    """Returns of the episodes `[E]`, and the observations `[N, D]` and actions `[N, A]` of all steps."""
    with tempfile.TemporaryDirectory() as folder:
        buffer.save(Path(folder) / "data.npz")
        data = np.load(Path(folder) / "data.npz")
        returns = np.add.reduceat(data["rewards"], np.r_[0, np.cumsum(data["episode_lengths"])[:-1]])
        return returns, torch.from_numpy(data["obs"]), torch.from_numpy(data["actions"])


class Cloned:
    """A network of two layers that is fitted to recorded actions.

    Args:
        obs: Observations. `[N, D]`
        actions: Actions, one-hot or continuous. `[N, A]`
        low: Lower bound of continuous actions in the environment; None for discrete ones.
        high: Upper bound.
    """

    def __init__(self, obs: Tensor, actions: Tensor, low: Any, high: Any) -> None:
        self.low, self.high = low, high
        self.mean, self.std = obs.mean(0), obs.std(0) + 1e-6
        width = 128
        self.net = nn.Sequential(
            nn.Linear(obs.shape[1], width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, actions.shape[1]),
        )
        optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
        loss_of = nn.functional.cross_entropy if low is None else nn.functional.mse_loss
        for _ in range(5_000):
            at = torch.randint(len(obs), (256,))
            optimizer.zero_grad()
            loss_of(self.net((obs[at] - self.mean) / self.std), actions[at]).backward()
            optimizer.step()

    def predict(self, obs: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        """The most likely action, or the mean one, for `evaluate_policy`."""
        with torch.no_grad():
            out = self.net((torch.from_numpy(obs) - self.mean) / self.std)
        if self.low is None:
            return out.argmax(-1).numpy(), None
        return (self.low + (out.clamp(-1, 1).numpy() + 1) / 2 * (self.high - self.low)).astype(np.float32), None


def score(agent: Any, env: str, seed: int) -> float:
    """Mean return of 20 episodes with deterministic actions."""
    mean, _ = evaluate_policy(agent, make_vec_env(env, seed=10_000 + seed), n_eval_episodes=20, deterministic=True)
    return round(float(mean), 1)


def run(name: str, model: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Learns from a recording, and evaluates what was learned."""
    task = TASKS[name]
    buffer = record(task, options.steps, seed)
    returns, obs, actions = returns_and_steps(buffer)
    row = {"task": name, "model": model, "seed": seed, "data": round(float(returns.mean()), 1)}
    row["best_episode"] = round(float(returns.max()), 1)
    began = time.process_time()
    torch.manual_seed(seed)
    if model == "cloning":
        space = make_vec_env(task.env).action_space
        cloned = Cloned(obs, actions, getattr(space, "low", None), getattr(space, "high", None))
        return row | {"policy": score(cloned, task.env, seed)}
    changes = {key: json.loads(value) for key, _, value in (item.partition("=") for item in options.set)}
    world = create_world_model(
        task.models[model],
        obs_shape=buffer.obs_shape,
        action_dim=buffer.action_dim,
        action_type=buffer.action_type,
        action_classes=buffer.action_classes,
        **changes,
    )
    arguments = task.settings[model] | ({"total_steps": options.updates} if options.updates else {})
    train(world, buffer, seed=seed, **arguments)
    row |= {"settings": changes, "cpu_seconds": round(time.process_time() - began)}
    row["policy"] = score(WorldFluxAgent(world, task.env, planner=None), task.env, seed)
    if "mppi" in options.planners:
        row["mppi"] = score(WorldFluxAgent(world, task.env, planner="mppi"), task.env, seed)
    if options.online:
        row["online"] = scores_online(
            WorldFluxAgent(world, task.env, buffer=buffer, seed=seed, learning_rate=arguments["learning_rate"]),
            task,
            seed,
            options,
        )
    return row


def scratch(name: str, model: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Learns in the environment alone."""
    task = TASKS[name]
    agent = WorldFluxAgent(task.models[model], task.env, seed=seed, learning_rate=task.settings[model]["learning_rate"])
    return {"task": name, "model": model, "seed": seed, "from": "scratch"} | {
        "online": scores_online(agent, task, seed, options)
    }


class Scores(BaseCallback):
    """Mean returns of some episodes with deterministic actions, at the beginning and every 500 steps."""

    def __init__(self, env: str, seed: int, episodes: int) -> None:
        super().__init__()
        self.env, self.seed, self.episodes = env, seed, episodes
        self.found: dict[int, float] = {}

    def _on_training_start(self) -> None:
        self.look()

    def _on_step(self) -> bool:
        if self.num_timesteps % 500 == 0:
            self.look()
        return True

    def look(self) -> None:
        """Evaluates the agent, without moving the random numbers of its training."""
        with keeping_random_streams(self.model.device):
            env = make_vec_env(self.env, n_envs=self.episodes, seed=10_000 + self.seed)
            mean, _ = evaluate_policy(self.model, env, n_eval_episodes=self.episodes, deterministic=True, warn=False)
        self.found[self.num_timesteps] = round(float(mean), 1)


def scores_online(agent: WorldFluxAgent, task: Task, seed: int, options: argparse.Namespace) -> dict[int, float]:
    """Scores by environment step."""
    scores = Scores(task.env, seed, options.episodes)
    agent.learn(options.online, callback=scores)
    return scores.found


def main() -> None:
    """Runs each model with each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument("--models", nargs="+", default=["cloning", "dreamerv3"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=24_000, help="steps of the recording")
    parser.add_argument("--updates", type=int, help="gradient steps (default: those of the task)")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=JSON", help="fields of the model to change")
    parser.add_argument("--planners", nargs="*", default=[], choices=["mppi"], help="evaluate a planner, too")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of each evaluation with --online")
    parser.add_argument("--online", type=int, default=0, help="steps to go on in the environment")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for model in options.models:
            print(json.dumps(run(options.task, model, seed, options)), flush=True)
            if options.online and model != "cloning":
                print(json.dumps(scratch(options.task, model, seed, options)), flush=True)


if __name__ == "__main__":
    main()
