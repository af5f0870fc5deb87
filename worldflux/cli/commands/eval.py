"""`worldflux eval`: evaluates a saved agent, and films it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from worldflux.cli import runs
from worldflux.cli.environments import make_environment, open_window
from worldflux.cli.options import (
    AgentPath,
    Count,
    EnvNames,
    EnvOptions,
    File,
    Flag,
    Json,
    TaskName,
    counted,
    joined_tasks,
)
from worldflux.cli.players import chosen_environment, chosen_tasks, load_player
from worldflux.errors import ConfigurationError, MissingDependencyError
from worldflux.files import checked_path
from worldflux.hub.addresses import address, is_address

if TYPE_CHECKING:
    import gymnasium as gym
    import numpy as np

    from worldflux.envs.collection import Predictor

_NO_OPTIONS = EnvOptions()
_LINES = 10


@dataclass(frozen=True)
class Episode:
    """Result of an episode."""

    score: float
    """Sum of the rewards."""
    length: int
    """Number of steps."""


def evaluate(
    agent: AgentPath,
    env: EnvNames = (),
    *,
    task: TaskName = None,
    episodes: Count = 10,
    seed: Count = 0,
    stochastic: Flag = False,
    newest: Flag = False,
    video: File = None,
    video_episodes: Count = 1,
    render: Flag = False,
    json_output: Json = False,
    options: Annotated[EnvOptions, tyro.conf.arg(name="")] = _NO_OPTIONS,
) -> int:
    """Play episodes with a saved agent, and print its scores.

    Args:
        agent: A zip of WorldFluxAgent.save, a checkpoint, the directory of a run or of a model (save_pretrained), or
            an address on the Hugging Face Hub (hf://user/name).
        env: ENV of worldflux train. Default: the environment of the agent's run, with the same options.
        task: Task to play, or the one that ENV is, for an agent that has several. Default: all of its run.
        episodes: Number of episodes to play, of each task.
        seed: Seed of the environment and of sampled actions.
        stochastic: Sample the actions, as in training, instead of taking the most likely ones.
        newest: For the directory of a run, use the newest checkpoint instead of the agent with the best evaluation.
        video: Also film the first episodes, as an .mp4 or a .gif.
        video_episodes: Number of episodes to film.
        render: Show the episodes in a window.
        json_output: Print JSON, including every episode.
        options: Options of ENV.

    Returns:
        0
    """
    from worldflux.agents.settings import AgentSettings
    from worldflux.cli.video import check_target
    from worldflux.validation import whole_number

    whole_number("episodes", episodes, 1)
    whole_number("video_episodes", video_episodes, 1)
    AgentSettings(seed=seed)  # checks the seed
    source = runs.saved_agent(agent, newest=newest)
    name, options = chosen_environment(f"worldflux eval {agent}", agent, joined_tasks(env), options)
    if video is not None:
        check_target(video)
        video_file = checked_path("--video", video)  # before the environment may change the working directory
    if render and video is not None:
        raise ConfigurationError("--render and --video cannot be combined. Leave one of them out.")
    mode = "human" if render else None if video is None else "rgb_array"
    played, films = {}, {}
    tasks = chosen_tasks(name, task)
    for one, place in tasks.items():
        if video is not None:
            ending = f"-{one}{video.suffix}" if len(tasks) > 1 else video.suffix
            films[one] = video.with_name(video.stem + ending)
        made = make_environment(place, options, mode)
        try:
            if render:
                open_window(made, place)
            played[one] = play_episodes(
                load_player(source, made, place, one),
                made,
                episodes,
                seed=seed,
                deterministic=not stochastic,
                film=None if video is None else video_file.with_name(films[one].name),
                filmed=video_episodes,
            )
        finally:
            made.close()
    shown = str(address(agent, "model")) if is_address(agent) else str(source.path)
    found = {one: _result(played[one], place, films.get(one)) for one, place in tasks.items()}
    _report(found, shown, stochastic=stochastic, seed=seed, as_json=json_output)
    return 0


def play_episodes(
    agent: Predictor,
    env: gym.Env[Any, Any],
    episodes: int,
    *,
    seed: int,
    deterministic: bool,
    film: Path | None = None,
    filmed: int = 1,
) -> list[Episode]:
    """Plays episodes, and prints some lines about the progress.

    Args:
        agent: The agent that plays.
        env: Environment of `make_environment`.
        episodes: Number of episodes.
        seed: Seed of the environment and of sampled actions.
        deterministic: Take the most likely actions instead of sampling them.
        film: Video of the first episodes; None for no video.
        filmed: Number of episodes in the video.
    """
    from worldflux.accel.randomness import seed_everything
    from worldflux.cli.video import VideoFile

    seed_everything(seed)
    fps = env.metadata.get("render_fps") or 30
    played: list[Episode] = []
    with nullcontext() if film is None else VideoFile(film, fps) as video:
        while len(played) < episodes:
            episode = play(
                agent,
                env,
                seed=None if played else seed,
                deterministic=deterministic,
                show=video.add if video is not None and len(played) < filmed else None,
            )
            played.append(episode)
            _tell(len(played), episodes, episode)
    return played


def play(
    agent: Predictor,
    env: gym.Env[Any, Any],
    *,
    seed: int | None,
    deterministic: bool,
    show: Callable[[np.ndarray], None] | None,
    limit: float = inf,
) -> Episode:
    """Plays an episode.

    Args:
        agent: The agent that plays.
        env: Environment of `make_environment`.
        seed: Seed of the environment; None to go on with its random numbers.
        deterministic: Take the most likely actions instead of sampling them.
        show: Called with every frame.
        limit: Number of steps after which the episode is cut off.
    """
    obs, _ = env.reset(seed=seed)
    memory, score, length, over = None, 0.0, 0, False
    while not over and length < limit:
        if show is not None:
            show(_picture(env))
        action, memory = agent.predict(obs, memory, deterministic=deterministic)
        obs, reward, terminated, truncated, _ = env.step(action)
        score, length, over = score + float(reward), length + 1, terminated or truncated
    if show is not None:
        show(_picture(env))
    return Episode(score, length)


def _tell(number: int, episodes: int, episode: Episode) -> None:
    """Prints some lines about the progress on stderr, because planning is slow."""
    if number * _LINES // episodes > (number - 1) * _LINES // episodes:
        print(f"episode {number}/{episodes}  score {episode.score:.4g}  length {episode.length}", file=sys.stderr)


def _picture(env: gym.Env[Any, Any]) -> np.ndarray:
    """An RGB image of the environment. `[H, W, 3]`"""
    import numpy as np
    from gymnasium.error import DependencyNotInstalled

    try:
        picture: Any = env.render()
    except DependencyNotInstalled as error:
        raise MissingDependencyError(f"The environment cannot be filmed: {error}") from error
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
        kind = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise ConfigurationError(f"render() of the environment gave {kind}, expected uint8 [height, width, 3].")
    return picture


def _result(played: list[Episode], env: str, film: Path | None) -> dict[str, Any]:
    """The scores of the episodes in an environment."""
    from statistics import fmean, pstdev

    scores, lengths = [episode.score for episode in played], [episode.length for episode in played]
    found = {
        "env": env,
        "episodes": len(played),
        "mean": fmean(scores),
        "std": pstdev(scores),
        "min": min(scores),
        "max": max(scores),
        "scores": scores,
        "lengths": lengths,
    }
    return found if film is None else {**found, "video": str(film)}


def _report(
    found: Mapping[str | None, dict[str, Any]], agent: str, *, stochastic: bool, seed: int, as_json: bool
) -> None:
    """Prints the scores in each task."""
    from statistics import fmean, pstdev

    mean = fmean(result["mean"] for result in found.values())
    if as_json:
        about = {"agent": agent, "deterministic": not stochastic, "seed": seed}
        several = {"mean": mean, "tasks": found}
        print(json.dumps({**about, **(several if len(found) > 1 else next(iter(found.values())))}))
        return
    actions = "sampled" if stochastic else "most likely"
    for task, result in found.items():
        where = result["env"] if task is None else f"{task} ({result['env']})"
        print(f"{agent} in {where}: {counted(result['episodes'], 'episode')}, {actions} actions, seed {seed}")
        for name, values in (("score", result["scores"]), ("length", result["lengths"])):
            low, high = min(values), max(values)
            print(
                f"  {name:<7} mean {fmean(values):<10.6g} std {pstdev(values):<10.4g} min {low:<10.6g} max {high:.6g}"
            )
        if "video" in result:
            print(f"  {result['video']}")
    if len(found) > 1:
        print(f"mean score of {len(found)} tasks: {mean:.6g}")
