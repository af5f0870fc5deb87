"""`worldflux imagine`: plots and numbers of what a saved agent predicts for recorded actions."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from worldflux.cli import runs
from worldflux.cli.environments import make_environment
from worldflux.cli.options import AgentPath, Count, EnvOptions, Number, check_writable, counted
from worldflux.cli.players import environment_of, load_player
from worldflux.cli.runs import Saved
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.files import checked_path, directory_beside, writing
from worldflux.hub.addresses import is_address
from worldflux.hub.client import RECORD_FILE, dataset_path

if TYPE_CHECKING:
    from worldflux.agents import WorldFluxAgent
    from worldflux.diagnostics.open_loop import PredictionError
    from worldflux.models.base import WorldModel
    from worldflux.training import ReplayBuffer

_Data = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DATA]", help_behavior_hint="")]
_Env = Annotated[str | None, tyro.conf.arg(metavar="ENV", help_behavior_hint="")]

WINDOWS, IMAGE_WINDOWS = 256, 32
"""Default numbers of windows; windows of images take much memory."""
_NO_OPTIONS = EnvOptions()


def imagine(
    agent: AgentPath,
    data: _Data = None,
    *,
    env: _Env = None,
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
        episodes: Number of episodes to record with --env.
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
    if data is not None and env is not None:
        raise ConfigurationError(f"Both {data} and --env {env} are given. Leave one of them out.")
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
    from worldflux.diagnostics.plots.style import no_decoder

    model, steps, buffer, described = model_and_data(source, data, env, options, episodes=episodes, seed=seed)
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
            figure.savefig(beside / f"{name}.png")
        numbers = {"agent": str(source.path), "data": described, "seed": seed, **summary(found, errors)}
        (beside / "imagination.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        written = [output / file.replace(target / file.name).name for file in sorted(beside.iterdir())]
    _report(errors, written, no_decoder(found))
    return 0


def model_and_data(
    source: Saved, data: Path | None, env: str | None, options: EnvOptions, *, episodes: int, seed: int
) -> tuple[WorldModel, int | None, ReplayBuffer, str]:
    """The model, the environment steps of its agent, the data that the model is shown, and their description.

    Args:
        source: The agent or model.
        data: File or directory of recorded episodes; None for those of its run.
        env: Environment in which to record new episodes instead.
        options: Options of `env`.
        episodes: Number of new episodes.
        seed: Seed of the new episodes and of the windows.
    """
    from worldflux.agents import WorldFluxAgent
    from worldflux.factory import create_world_model
    from worldflux.training import ReplayBuffer

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
            data, storage = Path(config.task), config.settings.get("storage")
    if data is not None and is_address(data):
        data = dataset_path("DATA", data)
    if data is not None and not data.exists():
        raise ConfigurationError(f"There is no file '{data}'. DATA is an .npz of worldflux collect.")
    if env is not None:
        player, buffer = _record(source, env, options, episodes, seed)
        steps = player.num_timesteps if source.is_agent else None
        return player.model, steps, buffer, f"{counted(episodes, 'new episode')} in {env}"
    if not source.is_agent:
        assert data is not None
        model = create_world_model(path, device="auto")
        return model, None, ReplayBuffer.load(data, seed=seed, storage=storage), f"episodes of {data.name}"
    player = WorldFluxAgent.load(path)
    if data is not None:
        return player.model, player.num_timesteps, ReplayBuffer.load(data, seed=seed), f"episodes of {data.name}"
    return player.model, player.num_timesteps, _replay_data(player, path, seed), f"replay data of {path.name}"


def _record(
    source: Saved, env: str, options: EnvOptions, episodes: int, seed: int
) -> tuple[WorldFluxAgent, ReplayBuffer]:
    """Loads the agent and records new episodes, with sampled actions as in training."""
    from worldflux.accel.randomness import seed_everything
    from worldflux.envs.collection import collect

    made = make_environment(env, options)
    try:
        player = load_player(source, made, env)
        seed_everything(seed)
        return player, collect(made, player, episodes=episodes, seed=seed)
    finally:
        made.close()


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
        extras=agent.model.replay_extras() if agent.replay_context else {},
    )
    ReplaySegments.read(checkpoint, buffer)
    buffer.seed(seed)
    return buffer


def check_rows(model: WorldModel, buffer: ReplayBuffer, described: str) -> None:
    """Raises a `ShapeMismatchError` if the data were not recorded for this model."""
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
            first, last = (f"{error.model.mean[step]:.3g}" for step in (0, -1))
            ahead = counted(len(error.ratio), "step")
            print(f"{name}: error {first} one step ahead and {last} {ahead} ahead; {compared}")
    if remark:
        print(remark)
