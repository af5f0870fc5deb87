"""The pictures of a report: learning curve, films, imagined against real, losses and health."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import inf, isfinite

import numpy as np

from worldflux.cli import runs
from worldflux.cli.commands.eval import play
from worldflux.cli.commands.imagine import IMAGE_WINDOWS, WINDOWS, check_rows, model_and_data
from worldflux.cli.curves import STEP, Curve, Run, draw, published
from worldflux.cli.environments import is_own_code, make_environment
from worldflux.cli.options import EnvOptions
from worldflux.cli.players import environment_of, load_player, one_task
from worldflux.cli.report.animations import MOST_BYTES, Film, animated
from worldflux.cli.report.charts import Lines, metric_chart, picture
from worldflux.cli.report.page import Picture, Section, Table
from worldflux.errors import CheckpointError, ConfigurationError

_LIMIT = 2_000
"""Steps after which a filmed episode is cut off."""
_CONTEXT, _HORIZON, _SHOWN = 5, 45, 3
"""Rows that the model sees, rows that it predicts, and windows that are drawn."""

_METRICS = {
    "loss": ("Total loss", "Weighted sum of all losses"),
    "reconstruction": ("Reconstruction", "Error of the decoded observations"),
    "redundancy": ("Redundancy", "Distance of correlations between features and embeddings from the identity"),
    "consistency": ("Consistency", "Error of predicted latent states"),
    "reward": ("Reward", "Cross-entropy of predicted rewards"),
    "continue": ("Continuation", "Cross-entropy of predicted continuations"),
    "termination": ("Termination", "Cross-entropy of predicted terminations"),
    "kl": ("KL divergence", "Information in an observation that was not predicted"),
    "value": ("Value", "Cross-entropy of predicted values"),
    "critic": ("Critic", "Cross-entropy of predicted values in imagination"),
    "actor": ("Actor", "Loss of the policy"),
    "policy": ("Policy", "Loss of the policy"),
    "policy_entropy": ("Policy entropy", "Randomness of the policy"),
    "imagined_return": ("Imagined return", "Mean return of imagined rollouts"),
    "grad_norm": ("Gradient norm", "Norm of the gradient before clipping"),
}
"""Title and meaning of the metrics that are drawn, in their order; docs/metrics.md defines all of them."""

_HEALTH = {
    "kl_at_free_nats": ("Uninformative latents", "Share of steps without information in the latents"),
    "unused_codes": ("Unused codes", "Share of the latents' classes that never occur"),
    "saturated_groups": ("Saturated groups", "Share of latent groups that have become one-hot"),
    "constant_latents": ("Constant latents", "Share of latent groups that never change"),
    "value_over_rewards": ("Value over rewards", "Values relative to the largest possible return"),
    "values_at_edge": ("Values at the edge", "Share of values at the limits of the bins"),
    "policy_randomness": ("Randomness of the policy", "From 0, no exploration, to 1, no preference"),
}
"""Title and meaning of each health metric."""

_IMAGINATION = {
    "imagination-strip": ("Images", "Recorded, predicted and the difference, some steps apart."),
    "imagination": ("Over time", "Black: recorded. Orange, dashed: predicted. Grey background: seen by the model."),
    "errors": ("Errors", "Orange: the model. Grey: predicting that nothing changes, which the model has to beat."),
    "rewards": ("Rewards", "Predicted and recorded rewards."),
    "continues": ("Continuation", "Predicted and recorded ends of episodes."),
}
"""Title and caption of the plots of `worldflux imagine`, in their order."""

_ERRORS_TITLE = "Mean errors. A last column below 1 means that the model predicts better than 'nothing changes'."
_HARD_TO_BEAT = (
    "A good policy often visits states in which little changes. There, predicting that nothing changes is hard to "
    "beat, so that the model may look worse than it is."
)


def learning_curve(section: Section, curve: Curve, task: str, *, reference: bool) -> None:
    """Adds the learning curve, with published scores behind it."""
    kind = "evaluation" if all(run.evaluation for run in curve.runs) else "training"
    note = "Evaluations take the most likely actions." if kind == "evaluation" else "There are no evaluations yet."
    with_scores = [run for run in curve.runs if run.scores(kind)]
    tasks: dict[str, list[Run]] = {}
    for run in with_scores:
        for part in run.parts():
            tasks.setdefault(part.task, []).append(part)
    if not with_scores:
        section.missing.append("There are no scores yet. Wait for the first evaluation or the end of an episode.")
        return
    curves = {name: [Curve(curve.label, of_task)] for name, of_task in tasks.items()}
    figure = draw(curves, x="steps", kind=kind, reference=reference)
    if len(tasks) == 1:
        figure.set_size_inches(7.6, 4.2)
        figure.axes[0].set_title("")
    figure.tight_layout(rect=(0, 0.04 if figure.texts[0].get_text() else 0, 1, 1))
    last = ", ".join(f"{label}: {run.scores(kind)[-1][2]:.4g}" for label, run in labelled(with_scores).items())
    kinds = {"evaluation": "of the evaluations", "training": "of the training episodes"}
    alt = f"Learning curve: return {kinds[kind]} over the environment steps. Last score of {last}."
    if reference and published(curve.runs[0].config.model, task) is not None:
        note += " Published scores are those of the model's authors."
    section.pictures.append(picture(figure, alt, caption=note, wide=True))


def losses(section: Section, found: Sequence[Run]) -> None:
    """Adds a chart for each of the most important losses."""
    offline = found[0].config.kind != "train"
    for name, (title, meaning) in _METRICS.items():
        lines = _lines(found, f"train/{name}")
        if offline and name != "grad_norm":
            lines = {f"{label}, training": line for label, line in lines.items()}
            held_out = _lines(found, f"eval/{name}").items()
            lines |= {f"{label}, held out": line for label, line in held_out}
        if lines:
            section.pictures.append(metric_chart(f"train/{name}", lines, title, meaning, unit_of(found[0])))
    if not section.pictures:
        section.missing.append("No losses have been logged yet.")


def health(section: Section, found: Sequence[Run]) -> None:
    """Adds a chart for each health metric, with its limit."""
    from worldflux.models.dreamerv3.health import DREAMERV3_THRESHOLDS
    from worldflux.models.tdmpc2.health import TDMPC2_THRESHOLDS

    thresholds = TDMPC2_THRESHOLDS if _lines(found, "health/saturated_groups") else DREAMERV3_THRESHOLDS
    for name, (title, meaning) in _HEALTH.items():
        lines = _lines(found, f"health/{name}")
        if lines:
            limit = thresholds[name]
            chart = metric_chart(f"health/{name}", lines, title, meaning, unit_of(found[0]), limit)
            section.pictures.append(chart)
    if not section.pictures:
        section.missing.append(
            "There are no health metrics yet. worldflux train measures them at most once in 100 gradient steps."
        )


def film(run: Run, label: str, *, episodes: int, seed: int, share: float) -> Picture:
    """A film of the run's best agent.

    Args:
        run: The run.
        label: Name of the run.
        episodes: Number of episodes.
        seed: Seed of the environment.
        share: Share of the size of all films that this one may have.
    """
    from worldflux.accel.randomness import seed_everything

    source = runs.saved_agent(run.directory)
    name, options = environment_of(run.directory, "A film needs an environment: worldflux eval RUN ENV --video FILE.")
    task, name = one_task(name, run.part or None, "A film shows")
    if is_own_code(name):
        print(f"worldflux: importing {name}, which {runs.CONFIG_FILE} names", file=sys.stderr)
    env = make_environment(name, options, "rgb_array")
    try:
        player = load_player(source, env, name, task)
        seed_everything(seed)
        frames, played = Film(env.metadata.get("render_fps") or 30), []
        for number in range(episodes):
            given = seed if number == 0 else None
            played.append(play(player, env, seed=given, deterministic=True, show=frames.add, limit=_LIMIT))
    finally:
        env.close()
    scores = ", ".join(f"{episode.score:.4g}" for episode in played)
    lengths = ", ".join(f"{episode.length}" for episode in played)
    cut = f" Filmed up to step {_LIMIT}." if any(episode.length >= _LIMIT for episode in played) else ""
    which = "best agent" if source.path.name == runs.BEST_AGENT_FILE else "newest agent"
    caption = f"The {which}, after {player.num_timesteps:,} steps. Score {scores} in {lengths} steps.{cut}"
    alt = f"Film of the {which} of {label} in {run.task}. Score {scores}."
    label += f", {run.part}" if run.part else ""
    return frames.picture(int(MOST_BYTES * share), alt, title=label[:1].upper() + label[1:], caption=caption)


def imagination(section: Section, run: Run, label: str, *, seed: int) -> None:
    """Adds plots of what the run's model predicts, compared with what was recorded."""
    from worldflux.diagnostics.calibration import check_finite, overall_ratio
    from worldflux.diagnostics.open_loop import open_loop
    from worldflux.diagnostics.plots import figures
    from worldflux.diagnostics.plots.frames import FPS, image_keys, longest_windows
    from worldflux.diagnostics.plots.frames import film as imagined
    from worldflux.diagnostics.plots.style import no_decoder

    source = runs.saved_agent(run.directory, newest=True)
    model, steps, buffer, described = model_and_data(source, None, None, EnvOptions(), episodes=1, seed=seed)
    check_rows(model, buffer, described)
    has_images = any(len(shape) == 3 for shape in model.config.obs_shapes.values())
    batch = buffer.sample(IMAGE_WINDOWS if has_images else WINDOWS, _CONTEXT + _HORIZON)
    found = open_loop(model, batch, context=_CONTEXT, seed=seed)
    check_finite(found)
    errors = found.errors()
    after = "" if steps is None else f" after {steps:,} steps"
    section.texts.append(
        f"The model of {label}{after} sees {_CONTEXT} rows of recorded episodes ({described}), and predicts the next "
        f"{_HORIZON} from the actions alone. {_HARD_TO_BEAT}"
    )
    if remark := no_decoder(found):
        section.texts.append(remark)
    rows = []
    for name, error in errors.items():
        if found.obs and name.startswith("state"):  # of interest only where observations cannot be compared
            continue
        ratio = overall_ratio(error)
        compared = f"{ratio:.2f}" if isfinite(ratio) else "the recorded values never change"
        rows.append((name, f"{error.model.mean[0]:.3g}", f"{error.model.mean[-1]:.3g}", compared))
    head = ("Prediction", "1 step ahead", f"{_HORIZON} steps ahead", "All steps, relative to 'nothing changes'")
    section.tables.append(Table(_ERRORS_TITLE, head, rows))
    drawn = figures(found, errors, shown=_SHOWN)
    for key in image_keys(found):
        frames = list(imagined(found, key, longest_windows(found, _SHOWN)))
        alt = f"Animation of recorded images of {key}, the predicted ones, and the difference between them."
        caption = "From top to bottom: recorded, predicted, difference. The orange frame marks predictions."
        made = animated(
            frames,
            1 / FPS,
            MOST_BYTES,
            alt,
            title="Film" if key == "obs" else f"Film of {key}",
            caption=caption,
            wide=True,
        )
        section.pictures.append(made)
    for kind, (title, caption) in _IMAGINATION.items():
        for name, figure in drawn.items():
            if name == kind or (kind == "imagination-strip" and name.startswith(kind)):
                wide = kind.startswith("imagination") or figure.get_figwidth() > 7
                alt = f"{title}: what the model predicts, compared with what was recorded. {caption}"
                section.pictures.append(picture(figure, alt, title=title, caption=caption, wide=wide, scrolls=wide))


def labelled(found: Sequence[Run]) -> dict[str, Run]:
    """The runs by their seeds, or by their directories if a seed occurs twice."""
    seeds = [run.seed for run in found]
    if len(set(seeds)) == len(seeds):
        return {f"seed {run.seed}": run for run in found}
    return {str(runs.shown(run.directory)): run for run in found}


def best_run(found: Mapping[str, Run]) -> str:
    """The label of the run with the best evaluation; the first run if there are no evaluations."""

    def best(label: str) -> float:
        scores: list[float] = []
        with suppress(CheckpointError):  # a damaged file, which the section of the evaluations names
            scores = [score for _, _, score in found[label].evaluation]
        return max(scores, default=-inf)

    return max(found, key=best)


def unit_of(run: Run) -> str:
    """Unit of the steps of a run."""
    return "environment steps" if run.config.kind == "train" else "gradient steps"


def _lines(found: Sequence[Run], name: str) -> Lines:
    """The values of a metric in the runs that have logged it."""
    lines = {}
    for label, run in labelled(found).items():
        rows = [(row[STEP], row[name]) for row in run.log if name in row]
        if rows:
            steps, values = np.array(rows).T
            lines[label] = (steps, values)
    return lines


def check_one_kind(labels: Sequence[str], directory: object) -> None:
    """Raises a `ConfigurationError` if runs cannot be in one report.

    Args:
        labels: Task and model of each group of runs that differ in more than their seeds.
        directory: Directory of the runs.
    """
    if len(labels) > 1:
        raise ConfigurationError(
            f"{directory} has runs that differ in more than their seeds: {'; '.join(labels)}. Pass a directory with "
            "one of them; worldflux plot compares them."
        )
