"""`worldflux push`: uploads an agent to the Hugging Face Hub, with a card that is made from its run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from worldflux.cli import runs
from worldflux.cli.environments import is_own_code, make_environment
from worldflux.cli.options import (
    AgentPath,
    Count,
    Directory,
    EnvOptions,
    Flag,
    Name,
    OptionalEnvName,
    TaskName,
    from_json,
)
from worldflux.cli.players import chosen_environment, load_player, one_task
from worldflux.cli.runs import RunConfig
from worldflux.errors import ConfigurationError
from worldflux.files import checked_path
from worldflux.hub.addresses import checked_repo_id

if TYPE_CHECKING:
    from worldflux.agents import WorldFluxAgent
    from worldflux.cli.commands.eval import Episode
    from worldflux.hub.cards import AgentRecord, Score

_NO_OPTIONS = EnvOptions()
_FILM = "replay.gif"
RepoName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO")]


def push(
    agent: AgentPath,
    repo: RepoName,
    env: OptionalEnvName = None,
    *,
    task: TaskName = None,
    episodes: Count = 10,
    seed: Count = 1000,
    newest: Flag = False,
    video: Flag = False,
    private: Flag = False,
    branch: Name = None,
    message: Name = None,
    preview: Directory = None,
    options: Annotated[EnvOptions, tyro.conf.arg(name="")] = _NO_OPTIONS,
) -> int:
    """Upload an agent to the Hugging Face Hub, with a card made from its run.

    Args:
        agent: The directory of a run, a zip of WorldFluxAgent.save, a checkpoint, or the directory of a model.
        repo: The repository on the Hub, user/name. It is created if there is none.
        env: ENV of worldflux train. Default: the environment of the agent's run, with the same options.
        task: Task to evaluate an agent in that has several.
        episodes: Number of episodes to evaluate the agent in, with its most likely actions. 0: no evaluation.
        seed: Seed of the evaluation.
        newest: For the directory of a run, use the newest checkpoint instead of the agent with the best evaluation.
        video: Also film the first episode of the evaluation, and show it in the card.
        private: Make a new repository private.
        branch: Branch to push to. Default: the main branch.
        message: Message of the commit.
        preview: Write the files to this new directory, and push nothing.
        options: Options of ENV.

    Returns:
        0.
    """
    from worldflux.agents.saving import describe, write_shared
    from worldflux.hub.client import import_hub
    from worldflux.hub.pushing import push_agent, write_agent_repository
    from worldflux.validation import whole_number

    whole_number("episodes", episodes, 0)
    whole_number("seed", seed, 0, below=2**32)
    checked_repo_id(repo)
    import_hub()
    if video and not episodes:
        raise ConfigurationError("--video films the evaluation, and --episodes 0 leaves it out. Leave out one of them.")
    target = None if preview is None else _new_directory(preview)
    source = runs.saved_agent(agent, newest=newest)
    source = replace(source, path=source.path.absolute())  # before the environment may change the working directory
    name, options = chosen_environment(f"worldflux push {agent} {repo}", agent, env, options)
    task, name = one_task(name, task, "worldflux push evaluates an agent in")
    with tempfile.TemporaryDirectory(prefix="worldflux-film-") as scratch:
        film = Path(scratch) / _FILM if video else None
        player, played = _played(source, name, options, episodes, seed, film, task)
        record = _with_environment(describe(player, _score(played, seed, name)), name, options)
        files = [] if film is None else [film]
        if (run := runs.run_of(source.path)) is not None:
            record = _with_run(record, run, player, best=source.path.name == runs.BEST_AGENT_FILE)
            files = _files_of(run, files)
        write = partial(write_shared, player)
        if target is not None:
            target.mkdir(exist_ok=True)
            write_agent_repository(target, write, repo, record, files)
            print(preview)
            return 0
        print(
            push_agent(write, repo, record, files=files, private=private or None, branch=branch, commit_message=message)
        )
    return 0


def _new_directory(preview: Path) -> Path:
    target = checked_path("--preview", preview, directory=True)
    if not target.parent.is_dir() or (target.exists() and any(target.iterdir())):
        raise ConfigurationError(f"{preview} is not a new directory in an existing one. Choose another --preview.")
    return target


def _played(
    source: runs.Saved,
    name: str,
    options: EnvOptions,
    episodes: int,
    seed: int,
    film: Path | None,
    task: str | None,
) -> tuple[WorldFluxAgent, list[Episode]]:
    """The agent, and its evaluation."""
    from worldflux.agents import WorldFluxAgent
    from worldflux.agents.acting import TaskPolicy
    from worldflux.cli.commands.eval import play_episodes

    made = make_environment(name, options, None if film is None else "rgb_array")
    try:
        player: WorldFluxAgent | TaskPolicy
        if source.is_agent:
            player = load_player(source, made, name, task)
        elif task is None:
            player = WorldFluxAgent(source.path, made)
        else:
            player = WorldFluxAgent(source.path, {task: made}).for_task(task, made)
        agent = player.agent if isinstance(player, TaskPolicy) else player
        return agent, play_episodes(player, made, episodes, seed=seed, deterministic=True, film=film)
    finally:
        made.close()


def _score(played: Sequence[Episode], seed: int, name: str) -> Score | None:
    from worldflux.hub.cards import Score, without_folders

    if not played:
        return None
    score = Score.of([one.score for one in played], [one.length for one in played], seed)
    return replace(score, env=without_folders(name))


def _with_environment(record: AgentRecord, name: str, options: EnvOptions) -> AgentRecord:
    """The record with the environment of the command line. Of the user's own code, only names are published."""
    from worldflux.hub.cards import without_folders

    given = {**options.of_ids(), **options.arguments(of_id=not is_own_code(name))}
    shown = {key: without_folders(value) if isinstance(value, str) else value for key, value in given.items()}
    return replace(record, env=without_folders(name), env_options=shown, wrappers=[])


def _with_run(record: AgentRecord, run: Path, player: WorldFluxAgent, *, best: bool) -> AgentRecord:
    """The record with what the agent's run knows."""
    from worldflux.hub.cards import without_folders

    config, curve = RunConfig.read(run), runs.read_evaluations(run / runs.EVALUATIONS_FILE)
    machine = dict(config.machine)
    if config.resumed:
        machine["resumed"] = "at step " + ", ".join(f"{part.get('step', '?')}" for part in config.resumed)
    if best and curve:
        chosen = f"the one with the best of {len(curve)} evaluations of the run, from step {player.num_timesteps:,}"
    else:
        chosen = f"the newest of the run, from step {player.num_timesteps:,}"
    if config.kind != "train":
        from worldflux.cli.commands.train_offline import OfflineSettings

        settings = from_json(OfflineSettings, config.settings, run / runs.CONFIG_FILE)
        shown = ("batch_size", "seq_len", "learning_rate", "seed")
        record = replace(
            record,
            data=without_folders(config.task),
            gradient_steps=runs.newest_step(run) or 0,
            settings={name: value for name in shown if (value := getattr(settings, name)) is not None},
        )
        chosen = ""
    return replace(
        record,
        curve=[{name: getattr(row, name) for name in ("step", "score", "std", "episodes")} for row in curve],
        chosen=chosen,
        command=without_folders(config.command),
        versions=config.versions or record.versions,
        commits=config.commits,
        machine=machine,
    )


def _files_of(run: Path, films: list[Path]) -> list[Path]:
    """The files of a run for people: the evaluations, and a film that is there already unless a new one was made."""
    from worldflux.hub.client import AGENT_EXTRAS

    there = [run / name for name in AGENT_EXTRAS if (run / name).is_file()]
    return [*films, *(file for file in there if not films or file.suffix == ".csv")]
