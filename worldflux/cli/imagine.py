"""`worldflux imagine`: what a saved agent expects of recorded actions, as pictures and numbers."""

from __future__ import annotations

import json
import tempfile
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from worldflux.cli import runs
from worldflux.cli.eval import check_spaces, make_environment
from worldflux.cli.options import EnvOptions, Number, from_json
from worldflux.cli.train import TrainSettings
from worldflux.errors import ConfigurationError, ShapeMismatchError

if TYPE_CHECKING:
    from worldflux.agents import WorldFluxAgent
    from worldflux.training import ReplayBuffer
    from worldflux.training.prediction import PredictionError

_Data = Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA", help_behavior_hint="")]
_Env = Annotated[str | None, tyro.conf.arg(metavar="ENV", help_behavior_hint="")]

WINDOWS, IMAGE_WINDOWS = 256, 32
"""By default; windows of images take much memory."""
_NO_OPTIONS = EnvOptions()


def imagine(
    agent: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="AGENT")],
    data: _Data = None,
    *,
    env: _Env = None,
    episodes: int = 10,
    context: int = 5,
    horizon: int = 45,
    windows: Number = None,
    shown: int = 4,
    samples: Number = None,
    seed: int = 0,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("imagination"),
    options: Annotated[EnvOptions, tyro.conf.arg(name="")] = _NO_OPTIONS,
) -> int:
    """Draw what a saved agent imagines: it sees how recorded windows begin, and predicts the rest from the actions.

    Args:
        agent: A zip of WorldFluxAgent.save, a checkpoint, or the directory of a run.
        data: Recorded episodes, an .npz. Without it and --env, the replay data of the checkpoint.
        env: Record new episodes of the agent instead, in an environment as for worldflux train.
        episodes: How many to record with --env.
        context: Rows of each window that the model sees.
        horizon: Rows after them that it predicts.
        windows: That the errors are measured on. By default 256, of images 32.
        shown: Windows that are drawn: those in which most can be seen.
        samples: Futures to draw for each window. By default one, of the likeliest latents.
        seed: Of the windows, the drawn futures, and with --env of the environment and the actions.
        output: Directory for the pictures and imagination.json.
        options: How ENV is made.

    Returns:
        0
    """
    from worldflux.training.config import whole_number

    whole_number("context", context, 1)
    whole_number("horizon", horizon, 1)
    whole_number("shown", shown, 1)
    whole_number("episodes", episodes, 1)
    whole_number("seed", seed, 0)
    if windows is not None:
        whole_number("windows", windows, 1)
    if samples is not None:
        whole_number("samples", samples, 1)
    if data is not None and env is not None:
        raise ConfigurationError(f"Both {data} and --env {env} are given. Leave one of them out.")
    if options != _NO_OPTIONS and env is None:
        raise ConfigurationError(f"--{' --'.join(options.given())} go with --env. Add it, or leave them out.")
    source = _find_agent(agent)
    _make_directory(output)

    from worldflux.agents import WorldFluxAgent
    from worldflux.cli.video import VideoFile
    from worldflux.training.calibration import check_finite, summary
    from worldflux.training.pictures import figures, picture_name
    from worldflux.training.pictures.frames import FPS, film, image_keys, longest_windows
    from worldflux.training.prediction import open_loop

    player = WorldFluxAgent.load(source)
    buffer, described = _episodes_of(player, source, data, env, options, episodes=episodes, seed=seed)
    _check_rows(player, buffer, described)
    has_images = any(len(shape) == 3 for shape in player.model.config.obs_shapes.values())
    count = windows or (IMAGE_WINDOWS if has_images else WINDOWS)
    found = open_loop(
        player.model, buffer.sample(count, context + horizon), context=context, samples=samples, seed=seed
    )
    check_finite(found)
    errors = found.errors()
    title = f"{player.model.config.model_type} after {player.num_timesteps} steps; {described}"
    with tempfile.TemporaryDirectory(dir=output, prefix=".imagination-") as scratch:
        beside = Path(scratch)
        images = image_keys(found)
        for key in images:
            with VideoFile(beside / f"{picture_name('imagination', key, images)}.mp4", FPS) as video:
                for frame in film(found, key, longest_windows(found, shown)):
                    video.add(frame)
        for name, figure in figures(found, errors, shown=shown, title=title).items():
            figure.savefig(beside / f"{name}.png")
        numbers = {"agent": str(source), "data": described, "seed": seed, **summary(found, errors)}
        (beside / "imagination.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        written = [file.replace(output / file.name) for file in sorted(beside.iterdir())]
    _report(errors, written, pictured=bool(found.obs))
    return 0


def _find_agent(path: Path) -> Path:
    """What `WorldFluxAgent.load` reads, the newest checkpoint where there are several: it has replay data."""
    from worldflux.training.checkpoint import newest_checkpoint

    source = runs.saved_agent(path, newest=True)
    if not source.is_dir() or (source / "agent.json").is_file():
        return source
    newest = newest_checkpoint(source)
    if newest is None:
        raise ConfigurationError(f"{path} holds no checkpoint of an agent. Pass what an agent was saved to.")
    return newest


def _make_directory(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"Nothing can be written to {output}: {error.strerror}. Choose another one."
        ) from error


def _episodes_of(
    agent: WorldFluxAgent,
    source: Path,
    data: Path | None,
    env: str | None,
    options: EnvOptions,
    *,
    episodes: int,
    seed: int,
) -> tuple[ReplayBuffer, str]:
    """What the agent is shown, and what that is in words."""
    from worldflux.training import ReplayBuffer

    if data is not None:
        if not data.is_file():
            raise ConfigurationError(f"There is no file '{data}'. DATA is an .npz of worldflux collect.")
        return ReplayBuffer.load(data, seed=seed), f"episodes of {data.name}"
    if env is None and source.is_dir():
        return _replay_data(agent, source, seed), f"replay data of {source.name}"
    if env is None:
        run = runs.run_of(source)
        if run is None:
            raise ConfigurationError(
                f"{source} holds no replay data. Add recorded episodes (worldflux imagine {source} data.npz), or "
                "--env ENV to record some."
            )
        config = runs.RunConfig.read(run)
        env = config.task
        options = from_json(TrainSettings, config.settings, run / runs.CONFIG_FILE)
    return _record(agent, env, options, episodes, seed), f"{episodes} new episodes in {env}"


def _record(agent: WorldFluxAgent, env: str, options: EnvOptions, episodes: int, seed: int) -> ReplayBuffer:
    """New episodes of the agent, with sampled actions as in training."""
    from worldflux.envs.collection import collect
    from worldflux.training.randomness import seed_everything

    made = make_environment(env, options, film=False)
    try:
        check_spaces(agent, made, env)
        seed_everything(seed)
        return collect(made, agent, episodes=episodes, seed=seed)
    finally:
        made.close()


def _replay_data(agent: WorldFluxAgent, checkpoint: Path, seed: int) -> ReplayBuffer:
    """The replay data of a checkpoint."""
    from worldflux.agents.checkpoints import RunState
    from worldflux.training import ReplayBuffer
    from worldflux.training.replay_segments import ReplaySegments

    normalization = RunState.read(checkpoint).normalization
    if normalization is not None and normalization["obs"]:
        raise ConfigurationError(
            "The agent was trained behind a VecNormalize, and its replay data are as they were before that. "
            "Add ImaginationCallback to its training instead: it normalises them."
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


def _check_rows(agent: WorldFluxAgent, buffer: ReplayBuffer, described: str) -> None:
    expected = (agent.obs_codec.obs_shape, agent.action_codec.action_dim)
    if (buffer.obs_shape, buffer.action_dim) != expected:
        raise ShapeMismatchError(
            f"The {described} hold observations {buffer.obs_shape} and {buffer.action_dim} action numbers, expected "
            f"{expected[0]} and {expected[1]} for this agent."
        )


def _report(errors: dict[str, PredictionError], written: list[Path], *, pictured: bool) -> None:
    """Prints what was written, and how far the model is off."""
    from worldflux.training.calibration import overall_ratio

    for path in written:
        print(path)
    for name, error in errors.items():
        if name.startswith(("obs", "reward")) or (not pictured and name.startswith("state")):
            ratio = overall_ratio(error)
            compared = f"{ratio:.3g} of the error of 'nothing changes'" if isfinite(ratio) else "nothing did change"
            first, last = (f"{error.model.mean[step]:.3g}" for step in (0, -1))
            print(f"{name}: off by {first} one step ahead and {last} {len(error.ratio)} ahead; {compared}")
    if not pictured:
        print("The model has no decoder, so that it pictures no observations: latent states are compared.")
