"""`worldflux imagine`: plots and numbers of what a saved agent predicts for recorded actions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from worldflux.cli import runs
from worldflux.cli.environments import make_environment
from worldflux.cli.options import (
    AgentPath,
    Count,
    DataNames,
    EnvOptions,
    Number,
    TaskName,
    check_writable,
    counted,
    joined_tasks,
    tasks_in,
)
from worldflux.cli.players import chosen_tasks, environment_of, load_player
from worldflux.cli.runs import Saved
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.files import checked_path, directory_beside, writing
from worldflux.hub.addresses import is_address
from worldflux.hub.client import RECORD_FILE, dataset_path

if TYPE_CHECKING:
    from worldflux.agents import WorldFluxAgent
    from worldflux.agents.acting import TaskPolicy
    from worldflux.diagnostics.open_loop import PredictionError
    from worldflux.models.base import WorldModel
    from worldflux.replay.provider import TaskReplay
    from worldflux.training import ReplayBuffer

    Data = ReplayBuffer | TaskReplay

_Env = Annotated[str | None, tyro.conf.arg(metavar="ENV", help_behavior_hint="")]

WINDOWS, IMAGE_WINDOWS = 256, 32
"""Default numbers of windows; windows of images take much memory."""
_NO_OPTIONS = EnvOptions()


def imagine(
    agent: AgentPath,
    data: DataNames = (),
    *,
    env: _Env = None,
    task: TaskName = None,
    episodes: Count = 10,
    context: Count = 5,
    horizon: Count = 45,
    windows: Number = None,
    shown: Count = 4,
    samples: Number = None,
    seed: Count = 0,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = Path("imagination"),
    options: Annotated[EnvOptions, tyro.conf.arg(name="")] = _NO_OPTIONS,
) -> int:
    """Plot what a saved agent predicts for recorded actions, and what happened.

    Args:
        agent: A zip of WorldFluxAgent.save, a checkpoint, or the directory of a run or of a model (save_pretrained).
        data: Recorded episodes, an .npz or a directory of them. Default: the checkpoint's replay data, or the data of
            the train-offline run.
        env: Record new episodes of the agent instead, in this environment (ENV of worldflux train).
        task: Task that DATA or --env is of, or the one of the run to play, for an agent that has several.
        episodes: Number of episodes to record with --env, of each task.
        context: Number of rows of each window that the model sees.
        horizon: Number of rows after the context that it predicts.
        windows: Number of windows on which errors are measured. Default: 256, or 32 for images.
        shown: Number of windows that are drawn. The longest ones are chosen.
        samples: Number of futures to sample for each window. Default: one, of the most likely latents.
        seed: Seed of the windows and sampled futures, and with --env of the environment and the actions.
        output: Directory for the plots and imagination.json.
        options: Options of ENV.

    Returns:
        0
    """
    from worldflux.validation import whole_number

    counts = {"context": context, "horizon": horizon, "shown": shown, "episodes": episodes}
    counts |= {name: given for name, given in (("windows", windows), ("samples", samples)) if given is not None}
    for name, given in counts.items():
        whole_number(name, given, 1)
    whole_number("seed", seed, 0)
    files = joined_tasks(data)
    if files is not None and env is not None:
        raise ConfigurationError(f"Both {files} and --env {env} are given. Leave one of them out.")
    if options != _NO_OPTIONS and env is None:
        raise ConfigurationError(f"{options.shown()}: options of an environment need --env. Add it, or leave them out.")
    source = runs.saved_agent(agent, newest=True)  # checkpoints have replay data
    target = checked_path("--output", output, directory=True)  # before an environment may change the working directory
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written: {error.strerror}. Choose another --output.") from error
    check_writable("--output", output, output)

    from worldflux.cli.video import VideoFile
    from worldflux.diagnostics.calibration import check_finite, summary
    from worldflux.diagnostics.open_loop import open_loop
    from worldflux.diagnostics.plots import figures, picture_name
    from worldflux.diagnostics.plots.frames import FPS, film, image_keys, longest_windows
    from worldflux.diagnostics.plots.style import lay_out, no_decoder

    model, steps, buffer, described = model_and_data(
        source, files, env, options, episodes=episodes, seed=seed, task=task
    )
    check_rows(model, buffer, described)
    has_images = any(len(shape) == 3 for shape in model.config.obs_shapes.values())
    count = windows or (IMAGE_WINDOWS if has_images else WINDOWS)
    found = open_loop(model, buffer.sample(count, context + horizon), context=context, samples=samples, seed=seed)
    check_finite(found)
    errors = found.errors()
    after = "" if steps is None else f" after {counted(steps, 'step')}"
    title = f"{model.config.model_type}{after}; {described}"
    with writing(output, ConfigurationError), directory_beside(target / "imagination") as beside:
        images = image_keys(found)
        for key in images:
            with VideoFile(beside / f"{picture_name('imagination', key, images)}.mp4", FPS) as video:
                for frame in film(found, key, longest_windows(found, shown)):
                    video.add(frame)
        for name, figure in figures(found, errors, shown=shown, title=title).items():
            lay_out(figure)
            figure.savefig(beside / f"{name}.png")
        numbers = {"agent": str(source.path), "data": described, "seed": seed, **summary(found, errors)}
        (beside / "imagination.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        written = [output / file.replace(target / file.name).name for file in sorted(beside.iterdir())]
    _report(errors, written, no_decoder(found))
    return 0


def model_and_data(
    source: Saved,
    data: str | None,
    env: str | None,
    options: EnvOptions,
    *,
    episodes: int,
    seed: int,
    task: str | None = None,
) -> tuple[WorldModel, int | None, Data, str]:
    """The model, the environment steps of its agent, the data that the model is shown, and their description.

    Args:
        source: The agent or model.
        data: File or directory of recorded episodes; None for those of its run.
        env: Environment in which to record new episodes instead.
        options: Options of `env`.
        episodes: Number of new episodes.
        seed: Seed of the new episodes and of the windows.
        task: Task of `data` or `env`.
    """
    from worldflux.agents import WorldFluxAgent
    from worldflux.factory import create_world_model

    path, storage = source.path, None
    shared = (path / RECORD_FILE).is_file()  # by push_to_hub, without replay data
    if data is None and env is None and (shared or not (source.is_agent and path.is_dir())):
        remedy = f"Add recorded episodes (worldflux imagine {path} data.npz), or --env ENV to record some."
        run = runs.run_of(path)
        config = None if run is None else runs.RunConfig.read(run)
        if not shared and (config is None or (config.kind == "train") != source.is_agent):
            raise ConfigurationError(f"{path} holds no replay data. {remedy}")
        if source.is_agent:
            env, options = environment_of(path, remedy)
        else:
            assert config is not None
            data, storage = config.task, config.settings.get("storage")
    if env is not None:
        recorded, found = _record(source, env, options, episodes, seed, task)
        steps = recorded.num_timesteps if source.is_agent else None
        return recorded.model, steps, found, f"{counted(episodes, 'new episode')} in {env}"
    player = WorldFluxAgent.load(path) if source.is_agent else None
    model = create_world_model(path, device="auto") if player is None else player.model
    steps = None if player is None else player.num_timesteps
    if data is not None:
        found, names = _loaded(model, data, task, seed, storage)
        return model, steps, found, f"episodes of {names}"
    assert player is not None
    if task is not None:
        raise ConfigurationError(
            f"--task {task} says of which task DATA or --env is, and the replay data of {path.name} are of all tasks. "
            "Leave it out, or add one of these."
        )
    return model, steps, _replay_data(player, path, seed), f"replay data of {path.name}"


def _loaded(
    model: WorldModel, data: str, task: str | None, seed: int, storage: Literal["memory", "in_place"] | None
) -> tuple[Data, str]:
    """Recorded episodes, and the names of their files."""
    from worldflux.training import ReplayBuffer

    files = {}
    for name, place in ({} if Path(data).exists() else tasks_in(data)).items() or [(task, data)]:
        files[name] = dataset_path("DATA", place) if is_address(place) else Path(place)
        if not files[name].exists():
            raise ConfigurationError(f"There is no file '{place}'. DATA is an .npz of worldflux collect.")
    buffers = {name: ReplayBuffer.load(file, seed=seed, storage=storage) for name, file in files.items()}
    return _of_tasks(model, buffers, seed), ", ".join(file.name for file in files.values())


def _of_tasks(model: WorldModel, buffers: Mapping[str | None, ReplayBuffer], seed: int) -> Data:
    """Data of tasks by their names as those of the model; data without a name as they are."""
    from worldflux.training.fitting import provider_for

    if None in buffers:
        return buffers[None]
    found: Data = provider_for(model, buffers)
    found.seed(seed)
    return found


def _record(
    source: Saved, env: str, options: EnvOptions, episodes: int, seed: int, task: str | None
) -> tuple[WorldFluxAgent | TaskPolicy, Data]:
    """Loads the agent and records new episodes in each task, with sampled actions as in training."""
    from worldflux.accel.randomness import seed_everything
    from worldflux.agents.acting import TaskPolicy
    from worldflux.envs.collection import collect

    buffers: dict[str | None, ReplayBuffer] = {}
    for one, place in chosen_tasks(env, task).items():
        made = make_environment(place, options)
        try:
            player = load_player(source, made, place, one)
            seed_everything(seed)
            name = player.task if isinstance(player, TaskPolicy) else None
            buffers[name] = collect(made, player, episodes=episodes, seed=seed)
        finally:
            made.close()
    return player, _of_tasks(player.model, buffers, seed)


def _replay_data(agent: WorldFluxAgent, checkpoint: Path, seed: int) -> ReplayBuffer:
    """The replay data of a checkpoint."""
    from worldflux.agents.archive import RunState
    from worldflux.replay.checkpoint import ReplaySegments
    from worldflux.training import ReplayBuffer

    normalization = RunState.read(checkpoint).normalization
    if normalization is not None and normalization["obs"]:
        raise ConfigurationError(
            "The agent was trained with a VecNormalize, and its replay data are not normalised. "
            "Add ImaginationCallback to its training instead, which normalises them."
        )
    buffer = ReplayBuffer(
        agent.buffer_size,
        agent.obs_codec.obs_shape,
        agent.action_codec.action_dim,
        obs_dtype=agent.obs_codec.obs_dtype,
        n_envs=agent.n_envs,
        extras=agent.stored_extras(),
    )
    ReplaySegments.read(checkpoint, buffer)
    buffer.seed(seed)
    return buffer


def check_rows(model: WorldModel, buffer: Data, described: str) -> None:
    """Raises an error if the data were not recorded for this model, or do not say their tasks."""
    from worldflux.replay.provider import TaskReplay

    if isinstance(buffer, TaskReplay):  # which has been checked
        return
    tasks = getattr(model.config, "num_tasks", 1)
    if tasks > 1 and not buffer.num_tasks:
        names = ", ".join(getattr(model.config, "task_names", ())) or f"0 to {tasks - 1}"
        raise ConfigurationError(
            f"The model has the tasks {names}, and the {described} do not say of which they are: --task NAME."
        )
    expected = (model.config.obs_shape, model.config.action_dim)
    if (buffer.obs_shape, buffer.action_dim) != expected:
        raise ShapeMismatchError(
            f"The {described} have observations {buffer.obs_shape} and {buffer.action_dim} action dimensions, expected "
            f"{expected[0]} and {expected[1]} for this model."
        )


def _report(errors: dict[str, PredictionError], written: list[Path], remark: str) -> None:
    """Prints the files that were written, and the errors of the model.

    Args:
        errors: Errors of the predictions.
        written: The files.
        remark: What is said of a model without a decoder, of which all errors are printed; empty for others.
    """
    from worldflux.diagnostics.calibration import overall_ratio

    for path in written:
        print(path)
    for name, error in errors.items():
        if remark or name.startswith(("obs", "reward")):
            ratio = overall_ratio(error)
            compared = (
                f"{ratio:.3g} of the error of 'nothing changes'"
                if isfinite(ratio)
                else "the recorded values never change"
            )
            # No episode may be as long as the horizon.
            reached = max((step for step, mean in enumerate(error.model.mean) if isfinite(mean)), default=0)
            first, last = (f"{error.model.mean[step]:.3g}" for step in (0, reached))
            ahead = counted(reached + 1, "step")
            print(f"{name}: error {first} one step ahead and {last} {ahead} ahead; {compared}")
    if remark:
        print(remark)
