"""Trains and evaluates DreamerV3 on CartPole on a laptop, and plots its learning curve and what it imagines.

Writes `learning_curve.png`, `imagination.png` and `agent.zip` to `demo/`, and prints one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from tqdm.auto import tqdm

from worldflux import WorldFluxAgent
from worldflux.diagnostics.open_loop import open_loop
from worldflux.envs import make_vec_env
from worldflux.training import Batch

ENV = "CartPole-v1"
BEST_RETURN = 500
SOLVED = 490
"""Mean return of ten evaluation episodes at which training stops."""
STATE_NAMES = ("cart position", "cart velocity", "pole angle", "pole angular velocity")
CONTEXT, HORIZON = 20, 60


class Progress(BaseCallback):
    """Shows a progress bar with the return, the losses and the speed, and collects the returns for the plot."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.bar = tqdm(total=total, unit="step", dynamic_ncols=True)
        self.returns: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.returns.append((self.num_timesteps, info["episode"]["r"]))
        self.bar.update(self.num_timesteps - self.bar.n)
        if self.n_calls % 50 == 0:
            recent = [r for _, r in self.returns[-10:]]
            losses = self.model.last_losses
            shown = {"return": f"{np.mean(recent):.0f}" if recent else "-"}
            shown |= {
                k: f"{float(losses[k]):.2f}" for k in ("reconstruction", "dynamics", "actor", "critic") if k in losses
            }
            self.bar.set_postfix(shown, refresh=False)
        return True

    def _on_training_end(self) -> None:
        self.bar.close()


def random_return(episodes: int, seed: int) -> float:
    """Mean return of uniformly random actions."""
    env = gym.make(ENV)
    env.action_space.seed(seed)
    total = 0.0
    for episode in range(episodes):
        env.reset(seed=seed + episode)
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, over = total + float(reward), terminated or truncated
    return total / episodes


def draw_curve(
    returns: list[tuple[int, float]], evaluations: tuple[np.ndarray, np.ndarray], random: float, path: Path
) -> None:
    """Plots the return of every training episode and of the evaluations.

    Args:
        returns: Environment steps and return of each training episode.
        evaluations: Environment steps `[N]` and returns `[N, episodes]`.
        random: Mean return of random actions.
        path: File for the plot.
    """
    steps, values = np.array(returns).T
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(steps, values, ".", color="tab:blue", alpha=0.4, label="training episode (sampled actions)")
    axes.plot(evaluations[0], evaluations[1].mean(1), "o-", color="tab:orange", label="evaluation (10 episodes)")
    axes.axhline(random, color="gray", linestyle=":", label="random actions")
    axes.axhline(BEST_RETURN, color="tab:green", linestyle="--", label="best possible")
    axes.set(xlabel="environment steps", ylabel="return", title=f"DreamerV3 on {ENV}")
    axes.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_imagination(agent: WorldFluxAgent, seed: int, path: Path) -> None:
    """Plots a real trajectory and what the model predicts for the same actions from the first steps alone.

    Some actions after the context are random, because a balanced pole hardly moves and is too easy to predict.
    """
    env = gym.make(ENV)
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    seen, actions, memory = [obs], [], None
    while len(seen) <= CONTEXT + HORIZON:
        action, memory = agent.predict(obs, memory, deterministic=True)
        if len(seen) > CONTEXT and rng.random() < 0.3:
            action = rng.integers(2)
        obs, _, terminated, _, _ = env.step(int(action))
        seen.append(obs)
        actions.append(np.eye(2, dtype=np.float32)[int(action)])
        if terminated:
            break
    real = np.array(seen)
    rows = len(real)
    batch = Batch(
        obs=torch.as_tensor(real).unsqueeze(0),
        actions=torch.as_tensor(np.array([*actions, np.zeros(2)], np.float32)).unsqueeze(0),
        rewards=torch.ones(1, rows),
        terminations=torch.zeros(1, rows),
        is_first=(torch.arange(rows) == 0).unsqueeze(0),
    )
    # Several samples of the future show how certain the model is.
    found = open_loop(agent.model, batch, CONTEXT + 1, samples=16, seed=seed)
    imagined = found.obs["obs"][:, 0, CONTEXT + 1 :].transpose(0, 1).cpu().numpy()  # [H, samples, 4]

    figure, grid = plt.subplots(2, 2, figsize=(10, 6), sharex=True)
    time_axis = np.arange(CONTEXT + 1, CONTEXT + 1 + len(imagined))
    for i, (axes, name) in enumerate(zip(grid.flat, STATE_NAMES, strict=True)):
        axes.plot(time_axis, imagined[:, :, i], color="tab:orange", alpha=0.2)
        axes.plot(time_axis, imagined[:, :, i].mean(1), color="tab:orange", label="imagined")
        axes.plot(real[:, i], color="black", label="real")
        axes.axvline(CONTEXT, color="gray", linestyle=":")
        axes.set(title=name, xlabel="step")
    grid.flat[0].legend()
    figure.suptitle(f"{CONTEXT} steps seen (left of the dotted line), then imagined from the actions alone")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> dict[str, Any]:
    """Trains and evaluates the agent, plots the results, and saves the agent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12_000, help="maximum number of environment steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="directory for the plots and the agent")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    # Layers this small benefit little from a second core, and waiting for it is slow on a busy machine.
    torch.set_num_threads(1)

    env = make_vec_env(ENV, n_envs=4)
    agent = WorldFluxAgent("dreamerv3:tiny", env, seed=options.seed)
    progress = Progress(options.steps)
    evaluation_env = Monitor(gym.make(ENV))
    evaluation_env.reset(seed=20_000 + options.seed)
    evaluation = EvalCallback(
        evaluation_env,
        n_eval_episodes=10,
        eval_freq=500 // env.num_envs,
        best_model_save_path=str(options.out),
        log_path=str(options.out),
        callback_on_new_best=StopTrainingOnRewardThreshold(SOLVED, verbose=0),
        verbose=0,
    )
    agent.learn(options.steps, callback=[progress, evaluation])
    seconds = time.perf_counter() - started
    env_steps = agent.num_timesteps

    # The best agent of these evaluations is kept. It is evaluated on new episodes, which did not select it.
    (options.out / "best_model.zip").replace(options.out / "agent.zip")
    agent = WorldFluxAgent.load(options.out / "agent.zip")
    test_env = Monitor(gym.make(ENV))
    test_env.reset(seed=10_000 + options.seed)
    mean_return, _ = evaluate_policy(agent, test_env, n_eval_episodes=10, deterministic=True)
    baseline = random_return(10, seed=options.seed)
    with np.load(options.out / "evaluations.npz") as file:
        evaluations = file["timesteps"], file["results"]
    draw_curve(progress.returns, evaluations, baseline, options.out / "learning_curve.png")
    draw_imagination(agent, seed=options.seed, path=options.out / "imagination.png")

    result = {
        "env": ENV,
        "mean_return": float(mean_return),
        "random_return": baseline,
        "env_steps": env_steps,
        "seconds": round(seconds, 1),
    }
    print(f"The agent and the plots are in {options.out}/: agent.zip, learning_curve.png, imagination.png")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
