"""Trains DreamerV3 and TD-MPC2 on recorded episodes of a pendulum, and plots their prediction errors.

In a third of the episodes a controller swings the pendulum up, in another third a third of its actions are random, and
in the last third all are. Each model is then trained on the file alone, in its own process, and evaluated on held-out
episodes: it observes the first rows of a window, predicts the others from the recorded actions alone, and is compared
with a baseline that predicts that nothing changes.

Writes the episodes (`train.npz`, `test.npz`), the models (`dreamerv3/`, `tdmpc2/`), the errors (`dreamerv3.csv`,
`tdmpc2.csv`) and the plot (`prediction.png`), and prints one line of JSON at the end with each model's errors as shares
of the errors of the baseline.
"""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

from worldflux import create_world_model
from worldflux.diagnostics.open_loop import PredictionError, open_loop
from worldflux.envs import collect
from worldflux.models.base import WorldModel
from worldflux.training import Batch, Callback, ReplayBuffer, Trainer, train

ENV = "Pendulum-v1"
OBS_NAMES = ("cosine of the angle", "sine of the angle", "angular velocity")
CHANCES = (0.0, 1 / 3, 1.0)
"""Shares of random actions in successive episodes: the controller, the controller with noise, random actions only."""
FAMILIES: dict[str, dict[str, Any]] = {
    # Only the world model is evaluated here, and imagining from all rows would take two thirds of the time.
    "dreamerv3": {"imag_last": 8},
    # The paper's losses cover 3 steps and weight the first most, which leaves predictions 15 steps ahead untrained.
    # The decoder is trained with the model but does not influence it: it shows what the model knows.
    "tdmpc2": {"horizon": 8, "rho": 0.9, "use_decoder": True},
}
TITLES = {"dreamerv3": "DreamerV3", "tdmpc2": "TD-MPC2"}
COLORS = {"dreamerv3": "tab:blue", "tdmpc2": "tab:orange"}
REPORTED = (1, 5, 15)
"""Steps ahead whose errors are plotted over training and printed."""
COLUMNS = ("error", "standard_error", "unchanged", "ratio")
"""Columns of the error files: the model's mean error and its standard error, the baseline's error, and their ratio."""
QUANTITIES = {"obs": "observation", "reward": "reward", "state/latent": "latent state"}


@dataclass(frozen=True)
class Settings:
    """Settings of recording, training and evaluation."""

    out: Path = Path("offline")
    """Directory for all files."""
    episodes: int = 80
    """Number of training episodes."""
    test_episodes: int = 20
    """Number of held-out episodes."""
    looks: tuple[int, ...] = (0, 100, 300, 1000, 3000)
    """Gradient steps after which the errors are measured; training ends at the last."""
    batch_size: int = 16
    """Windows per gradient step."""
    sequence_length: int = 33
    """Rows per window, one more than its number of steps."""
    learning_rate: float = 3e-4
    """Learning rate of both models. It is the default of `train` and of TD-MPC2."""
    windows: int = 512
    """Windows of the held-out episodes on which the errors are measured."""
    context: int = 5
    """Rows of a window that a model observes."""
    horizon: int = 15
    """Rows after the context that it predicts."""
    seed: int = 0
    stage: Literal["all", "record", "train", "draw"] = "all"
    """Stage to run; "all" runs one after the other and trains in separate processes."""
    family: Annotated[Literal["dreamerv3", "tdmpc2"], tyro.conf.arg(help="The model that --stage train trains.")] = (
        "dreamerv3"
    )


class MixedPolicy:
    """An energy-based swing-up controller whose share of random actions changes with each episode.

    Args:
        seed: Seed of the random actions.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._chances = itertools.cycle(CHANCES)
        self._chance = 0.0

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, None]:
        """Returns the torque `[1, 1]` for the observation of one environment `[1, 3]`, like SB3's algorithms."""
        if episode_start[0]:
            self._chance = next(self._chances)
        cosine, sine, velocity = observation[0]
        angle = np.arctan2(sine, cosine)  # 0: upright
        missing = 5.0 - (velocity**2 / 6.0 + 5.0 * cosine)
        torque = (
            -10.0 * angle - 2.0 * velocity if abs(angle) < 0.4 else 2.0 * np.sign(velocity) * np.clip(missing, -1, 1)
        )
        if self._rng.random() < self._chance:
            torque = self._rng.uniform(-2.0, 2.0)
        return np.array([[np.clip(torque, -2.0, 2.0)]], np.float32), None


class Measure(Callback):
    """Measures the open-loop errors at the given steps.

    Attributes:
        errors: Errors, keyed by gradient step and quantity.

    Args:
        name: Name of the model in the printed lines.
        batch: Windows of held-out episodes.
        context: Rows of each window that the model observes.
        steps: Gradient steps after which the errors are measured.
    """

    def __init__(self, name: str, batch: Batch, context: int, steps: Sequence[int]) -> None:
        self.errors: dict[int, dict[str, PredictionError]] = {}
        self._name, self._batch, self._context, self._steps = name, batch, context, steps
        self._model: WorldModel | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Measures the untrained model."""
        assert isinstance(trainer.model, WorldModel)
        self._model = trainer.model
        self._look(0)

    def on_step_end(self, step: int, losses: Mapping[str, float]) -> None:
        """Measures the model after the given steps."""
        self._look(step)

    def _look(self, step: int) -> None:
        if step not in self._steps:
            return
        assert self._model is not None
        found = open_loop(self._model, self._batch, self._context).errors()
        self.errors[step] = {key: found[key] for key in QUANTITIES if key in found}
        ahead = min(REPORTED[-1], self._batch.seq_len - self._context)
        shares = ", ".join(f"{QUANTITIES[key]} {e.ratio[ahead - 1]:.2f}" for key, e in self.errors[step].items())
        print(
            f"{self._name}, step {step}: error {ahead} steps ahead, relative to 'nothing changes': {shares}",
            flush=True,
        )


def record(settings: Settings) -> None:
    """Records episodes to `train.npz` and `test.npz`."""
    for name, episodes, seed in (
        ("train", settings.episodes, 2 * settings.seed),
        ("test", settings.test_episodes, 2 * settings.seed + 1),
    ):
        buffer = collect(ENV, MixedPolicy(seed), episodes=episodes, seed=seed)
        buffer.save(settings.out / f"{name}.npz")
        print(f"{settings.out / name}.npz: {buffer.num_transitions} steps of {episodes} episodes", flush=True)


def learn(settings: Settings) -> None:
    """Trains one model on `train.npz` and evaluates it on `test.npz`; writes the model and its errors."""
    family = settings.family
    buffer = ReplayBuffer.load(settings.out / "train.npz")
    measure = Measure(TITLES[family], held_out_windows(settings), settings.context, settings.looks)
    # The weights are initialised when the model is built, before `train` sets the seed.
    torch.manual_seed(settings.seed)
    model = create_world_model(
        f"{family}:tiny", obs_shape=buffer.obs_shape, action_dim=buffer.action_dim, **FAMILIES[family]
    )
    train(
        model,
        buffer,
        total_steps=settings.looks[-1],
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        callbacks=[measure],
    ).save_pretrained(settings.out / family)
    with (settings.out / f"{family}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "quantity", "ahead", *COLUMNS])
        for step, errors in measure.errors.items():
            for quantity, error in errors.items():
                columns = (error.model.mean, error.model.standard_error, error.unchanged.mean, error.ratio)
                for ahead, numbers in enumerate(zip(*columns, strict=True), 1):
                    writer.writerow([step, quantity, ahead, *(f"{number:.5f}" for number in numbers)])
    print(f"{TITLES[family]}: {time.process_time():.0f} s of one core", flush=True)


def held_out_windows(settings: Settings) -> Batch:
    """Windows of `test.npz`, the same in every call."""
    buffer = ReplayBuffer.load(settings.out / "test.npz", seed=settings.seed)
    return buffer.sample(settings.windows, settings.context + settings.horizon)


Errors = dict[tuple[str, int, str], np.ndarray]
"""The `COLUMNS` for each step ahead `[4, H]`, keyed by model family, gradient step and quantity."""


def read_errors(settings: Settings) -> Errors:
    """Reads the errors that the training processes measured."""
    found: dict[tuple[str, int, str], list[list[float]]] = {}
    for family in FAMILIES:
        with (settings.out / f"{family}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                key = (family, int(row["step"]), row["quantity"])
                found.setdefault(key, []).append([float(row[column]) for column in COLUMNS])
    return {key: np.array(numbers).T for key, numbers in found.items()}


def draw(settings: Settings, errors: Errors) -> None:
    """Plots errors over the horizon and over training, and predictions for one window, to `prediction.png`."""
    last = settings.looks[-1]
    figure, grid = plt.subplots(2, 4, figsize=(18, 7.5))
    for column, (quantity, name) in enumerate(QUANTITIES.items()):
        # The parts of DreamerV3's state have other names; its observations are just as informative.
        families = [family for family in FAMILIES if (family, last, quantity) in errors]
        draw_horizon(grid[0, column], {family: errors[family, last, quantity] for family in families})
        grid[0, column].set(title=f"{name} after {last} gradient steps", ylabel="error (standard deviations)")
        for family in families:
            ratios = np.array([errors[family, step, quantity][3] for step in settings.looks])  # [looks, H]
            draw_training(grid[1, column], family, settings.looks, ratios)
        grid[1, column].set(title=f"{name} over training", ylabel="error / error of 'nothing changes'")
    draw_window(grid[0, 3], grid[1, 3], settings)
    figure.suptitle(
        f"{ENV}, held-out episodes: {settings.context} rows observed, then {settings.horizon} predicted from actions"
    )
    figure.tight_layout()
    figure.savefig(settings.out / "prediction.png", dpi=100)
    plt.close(figure)


def draw_horizon(axes: Any, errors: Mapping[str, np.ndarray]) -> None:
    """Plots errors over the steps ahead, with bands of two standard errors on both sides.

    Args:
        axes: Axes to plot on.
        errors: Errors as in `Errors`, keyed by model family.
    """
    for family, (error, standard_error, _, _) in errors.items():
        ahead = np.arange(1, len(error) + 1)
        axes.plot(ahead, error, color=COLORS[family], label=TITLES[family])
        axes.fill_between(
            ahead, error - 2 * standard_error, error + 2 * standard_error, color=COLORS[family], alpha=0.2
        )
    _, _, unchanged, _ = next(iter(errors.values()))
    axes.plot(ahead, unchanged, color="gray", linestyle="--", label="nothing changes")
    axes.set(xlabel="steps ahead", ylim=(0, None))
    axes.legend()


def draw_training(axes: Any, family: str, steps: Sequence[int], ratios: np.ndarray) -> None:
    """Plots the errors of one model over training, for several numbers of steps ahead.

    Args:
        axes: Axes to plot on.
        family: Model family.
        steps: Gradient steps.
        ratios: Errors relative to "nothing changes", `[len(steps), H]`.
    """
    for ahead, style in zip(REPORTED, (":", "--", "-"), strict=True):
        if ahead <= ratios.shape[1]:
            label = f"{TITLES[family]}, {ahead} ahead"
            axes.plot(steps, ratios[:, ahead - 1], style, marker=".", color=COLORS[family], label=label)
    axes.axhline(1.0, color="gray", linestyle="--")
    axes.set_xscale("symlog", linthresh=100)
    axes.set(xlabel="gradient steps", xlim=(0, 1.1 * steps[-1]), yscale="log")
    axes.legend(fontsize=8)


def draw_window(angle_axes: Any, velocity_axes: Any, settings: Settings) -> None:
    """Plots the recorded values and the predictions of the saved models, in the window with the most variation."""
    batch = held_out_windows(settings)
    assert isinstance(batch.obs, torch.Tensor) and batch.is_first is not None
    moved = batch.obs.std(1).sum(1) - 1e9 * batch.is_first[:, 1:].any(1)
    window = int(moved.argmax())
    real, time_axis = batch.obs[window].numpy(), np.arange(batch.seq_len) - settings.context + 1
    expected = {
        family: open_loop(create_world_model(str(settings.out / family)), batch, settings.context).obs["obs"][0, window]
        for family in FAMILIES
    }
    for axes, column in ((angle_axes, 0), (velocity_axes, 2)):
        axes.plot(time_axis, real[:, column], ".", color="black", label="recorded")
        for family, obs in expected.items():
            ahead = slice(settings.context, None)
            axes.plot(time_axis[ahead], obs[ahead, column].numpy(), color=COLORS[family], label=TITLES[family])
        axes.axvline(0, color="gray", linestyle=":")
        axes.set(title=f"{OBS_NAMES[column]} in one window", xlabel="steps ahead")
        axes.legend()


def report(settings: Settings, errors: Errors, seconds: float) -> None:
    """Prints errors relative to "nothing changes", by model, quantity and steps ahead, as one line of JSON."""
    result: dict[str, Any] = {"env": ENV, "gradient_steps": settings.looks[-1], "seconds": round(seconds, 1)}
    for (family, step, quantity), (_, _, _, ratio) in errors.items():
        if step == settings.looks[-1]:
            shown = {str(ahead): round(ratio[ahead - 1], 3) for ahead in REPORTED if ahead <= len(ratio)}
            result.setdefault(family, {})[quantity] = shown
    print(json.dumps(result))


def main(args: Sequence[str] | None = None) -> None:
    """Runs the stages that the settings select.

    Args:
        args: Command-line arguments; None uses those of the process.
    """
    given = list(sys.argv[1:] if args is None else args)
    settings = tyro.cli(Settings, args=given, description=__doc__)
    settings.out.mkdir(parents=True, exist_ok=True)
    # Layers this small benefit little from a second core.
    torch.set_num_threads(1)
    started = time.perf_counter()
    if settings.stage in ("all", "record"):
        record(settings)
    if settings.stage == "train":
        learn(settings)
    if settings.stage == "all":
        # In separate processes, which have only the file, in parallel on one core each.
        command = [sys.executable, __file__, *given, "--stage", "train", "--family"]
        running = {family: subprocess.Popen([*command, family]) for family in FAMILIES}
        failed = [family for family, process in running.items() if process.wait() != 0]
        if failed:
            sys.exit(f"Training {' and '.join(failed)} failed; see the error above.")
    if settings.stage in ("all", "draw"):
        errors = read_errors(settings)
        draw(settings, errors)
        print(f"The plot is {settings.out / 'prediction.png'}.")
        report(settings, errors, time.perf_counter() - started)


if __name__ == "__main__":
    main()
