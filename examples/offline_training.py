"""Both families learn a pendulum from a file: records it, trains on it in a fresh process, and draws what they foresee.

A third of the episodes swings the pendulum up, a third does so with a third of its actions at random, and a third acts
at random. Each family then learns from the file alone, in a process of its own. What it has learned is measured on
episodes that were kept back: it sees the first rows of a window, predicts the others from the recorded actions alone,
and is compared with whoever expects that nothing changes.

Writes the episodes (`train.npz`, `test.npz`), the models (`dreamerv3/`, `tdmpc2/`), the errors (`dreamerv3.csv`,
`tdmpc2.csv`) and the picture (`prediction.png`), and prints one line of JSON at the end: the models' errors as shares
of those of that comparison.
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
"""Share of random actions, by turns: of a controller, a controller with noise, and chance alone."""
FAMILIES: dict[str, dict[str, Any]] = {
    # The world model is what is looked at here, and imagining from all rows would take two thirds of the time.
    "dreamerv3": {"imag_last": 8},
    # The paper's losses look 3 steps ahead, mostly at the first; what a model expects after 15 is then left to chance.
    # The decoder learns beside the model and does not influence it: it shows what the model knows.
    "tdmpc2": {"horizon": 8, "rho": 0.9, "use_decoder": True},
}
TITLES = {"dreamerv3": "DreamerV3", "tdmpc2": "TD-MPC2"}
COLORS = {"dreamerv3": "tab:blue", "tdmpc2": "tab:orange"}
REPORTED = (1, 5, 15)
"""Steps ahead whose errors are drawn over training, and printed."""
COLUMNS = ("error", "standard_error", "unchanged", "ratio")
"""Of the files of errors: the model's mean error, that of "nothing changes", and the one as a share of the other."""
QUANTITIES = {"obs": "observation", "reward": "reward", "state/latent": "latent state"}


@dataclass(frozen=True)
class Settings:
    """What is recorded, how long each family learns from it, and how it is measured."""

    out: Path = Path("offline")
    """Directory for all files."""
    episodes: int = 80
    """Episodes to learn from."""
    test_episodes: int = 20
    """Episodes that are kept back."""
    looks: tuple[int, ...] = (0, 100, 300, 1000, 3000)
    """Gradient steps after which the errors are measured; the last one is the end."""
    batch_size: int = 16
    """Windows in each gradient step."""
    sequence_length: int = 33
    """Rows of each; one more than the steps in them."""
    learning_rate: float = 3e-4
    """Of both families. It is the default of `train`, and TD-MPC2's own."""
    windows: int = 512
    """Windows of the kept episodes that the errors are measured on."""
    context: int = 5
    """Rows of a window that a model sees."""
    horizon: int = 15
    """Rows after them that it predicts."""
    seed: int = 0
    stage: Literal["all", "record", "train", "draw"] = "all"
    """What to do; "all" does one after the other, and trains in fresh processes."""
    family: Annotated[Literal["dreamerv3", "tdmpc2"], tyro.conf.arg(help="The one that --stage train trains.")] = (
        "dreamerv3"
    )


class MixedPolicy:
    """Swings the pendulum up by its energy and holds it there; the share of random actions changes with each episode.

    Args:
        seed: Of the random actions.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._chances = itertools.cycle(CHANCES)
        self._chance = 0.0

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, None]:
        """Torques `[1, 1]` for the observation of one environment `[1, 3]`, as SB3's algorithms give them."""
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
        errors: By step and quantity.

    Args:
        name: What the model is called where its errors are printed.
        batch: Windows of episodes that are not trained on.
        context: Rows of them that the model sees.
        steps: Gradient steps after which it looks.
    """

    def __init__(self, name: str, batch: Batch, context: int, steps: Sequence[int]) -> None:
        self.errors: dict[int, dict[str, PredictionError]] = {}
        self._name, self._batch, self._context, self._steps = name, batch, context, steps
        self._model: WorldModel | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Looks at the untrained model."""
        assert isinstance(trainer.model, WorldModel)
        self._model = trainer.model
        self._look(0)

    def on_step_end(self, step: int, losses: Mapping[str, float]) -> None:
        """Looks where it is due."""
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
            f"{self._name}, step {step}: error {ahead} steps ahead, as a share of that of 'nothing changes': {shares}",
            flush=True,
        )


def record(settings: Settings) -> None:
    """Writes `train.npz` and `test.npz`."""
    for name, episodes, seed in (
        ("train", settings.episodes, 2 * settings.seed),
        ("test", settings.test_episodes, 2 * settings.seed + 1),
    ):
        buffer = collect(ENV, MixedPolicy(seed), episodes=episodes, seed=seed)
        buffer.save(settings.out / f"{name}.npz")
        print(f"{settings.out / name}.npz: {buffer.num_transitions} steps of {episodes} episodes", flush=True)


def learn(settings: Settings) -> None:
    """Trains one family from `train.npz` and measures it on `test.npz`; writes its model and its errors."""
    family = settings.family
    buffer = ReplayBuffer.load(settings.out / "train.npz")
    measure = Measure(TITLES[family], held_out_windows(settings), settings.context, settings.looks)
    # The weights are drawn when the model is built, before training starts the random numbers from its seed.
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
    """The same windows of `test.npz` whenever it is called."""
    buffer = ReplayBuffer.load(settings.out / "test.npz", seed=settings.seed)
    return buffer.sample(settings.windows, settings.context + settings.horizon)


Errors = dict[tuple[str, int, str], np.ndarray]
"""By family, step and quantity, the `COLUMNS` for each step ahead. `[4, H]`"""


def read_errors(settings: Settings) -> Errors:
    """What the training processes measured."""
    found: dict[tuple[str, int, str], list[list[float]]] = {}
    for family in FAMILIES:
        with (settings.out / f"{family}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                key = (family, int(row["step"]), row["quantity"])
                found.setdefault(key, []).append([float(row[column]) for column in COLUMNS])
    return {key: np.array(numbers).T for key, numbers in found.items()}


def draw(settings: Settings, errors: Errors) -> None:
    """Writes `prediction.png`: errors over the horizon and over training, and what the models expect of one window."""
    last = settings.looks[-1]
    figure, grid = plt.subplots(2, 4, figsize=(18, 7.5))
    for column, (quantity, name) in enumerate(QUANTITIES.items()):
        # What the parts of DreamerV3's state are called differs, and its observations tell as much.
        families = [family for family in FAMILIES if (family, last, quantity) in errors]
        draw_horizon(grid[0, column], {family: errors[family, last, quantity] for family in families})
        grid[0, column].set(title=f"{name} after {last} gradient steps", ylabel="error (standard deviations)")
        for family in families:
            ratios = np.array([errors[family, step, quantity][3] for step in settings.looks])  # [looks, H]
            draw_training(grid[1, column], family, settings.looks, ratios)
        grid[1, column].set(title=f"{name} over training", ylabel="error / error of 'nothing changes'")
    draw_window(grid[0, 3], grid[1, 3], settings)
    figure.suptitle(
        f"{ENV}, episodes kept back: {settings.context} rows seen, then {settings.horizon} predicted from the actions"
    )
    figure.tight_layout()
    figure.savefig(settings.out / "prediction.png", dpi=100)
    plt.close(figure)


def draw_horizon(axes: Any, errors: Mapping[str, np.ndarray]) -> None:
    """Errors over the steps ahead, with two standard errors to both sides.

    Args:
        axes: Where to draw.
        errors: By family, as in `Errors`.
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
    """A family's errors over the gradient steps, some distances ahead.

    Args:
        axes: Where to draw.
        family: Whose they are.
        steps: Gradient steps.
        ratios: Error as a share of that of "nothing changes". `[len(steps), H]`
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
    """What was recorded and what the saved models expect of it, in the window where most happens."""
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
    """Prints one line of JSON: errors as shares of those of "nothing changes", by family, quantity and steps ahead."""
    result: dict[str, Any] = {"env": ENV, "gradient_steps": settings.looks[-1], "seconds": round(seconds, 1)}
    for (family, step, quantity), (_, _, _, ratio) in errors.items():
        if step == settings.looks[-1]:
            shown = {str(ahead): round(ratio[ahead - 1], 3) for ahead in REPORTED if ahead <= len(ratio)}
            result.setdefault(family, {})[quantity] = shown
    print(json.dumps(result))


def main(args: Sequence[str] | None = None) -> None:
    """Does what the settings say.

    Args:
        args: Of the command line; None takes those of the process.
    """
    given = list(sys.argv[1:] if args is None else args)
    settings = tyro.cli(Settings, args=given, description=__doc__)
    settings.out.mkdir(parents=True, exist_ok=True)
    # Layers this small gain little from a second core.
    torch.set_num_threads(1)
    started = time.perf_counter()
    if settings.stage in ("all", "record"):
        record(settings)
    if settings.stage == "train":
        learn(settings)
    if settings.stage == "all":
        # In processes of their own, which have nothing but the file; at the same time, on a core each.
        command = [sys.executable, __file__, *given, "--stage", "train", "--family"]
        running = {family: subprocess.Popen([*command, family]) for family in FAMILIES}
        failed = [family for family, process in running.items() if process.wait() != 0]
        if failed:
            sys.exit(f"Training {' and '.join(failed)} failed; the reason stands above.")
    if settings.stage in ("all", "draw"):
        errors = read_errors(settings)
        draw(settings, errors)
        print(f"The picture is {settings.out / 'prediction.png'}.")
        report(settings, errors, time.perf_counter() - started)


if __name__ == "__main__":
    main()
