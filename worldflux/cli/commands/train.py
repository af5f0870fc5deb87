"""`worldflux train`: an agent learns in an environment, in a directory from which it can go on."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from worldflux.cli import runs
from worldflux.cli.environments import find_environment, is_own_code, lasting_name
from worldflux.cli.options import (
    Directory,
    EnvOptions,
    Fields,
    ModelName,
    Number,
    OptionalEnvName,
    Real,
    as_arguments,
    changed,
    from_json,
    model_fields,
)
from worldflux.cli.runs import RunConfig
from worldflux.errors import ConfigurationError
from worldflux.files import checked_path
from worldflux.locks import using

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

    from worldflux.agents import WorldFluxAgent

KIND = "train"


@dataclass(frozen=True)
class TrainSettings(EnvOptions):
    """The options of `worldflux train`; None takes the number of the model's family."""

    steps: Number = None
    """Environment steps of the whole run, over all environments. Default: 100000."""
    n_envs: int = 1
    """Environments that are stepped together."""
    processes: bool = False
    """A process for each of them; the agent trains while they step."""
    seed: Number = None
    """Of everything that is random. Without one, chance decides, and config.json tells."""
    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1; auto takes the GPU if there is one."""
    learning_rate: Real = None
    """Step size of the optimiser. Default: the model's."""
    train_ratio: Real = None
    """Replayed time steps per environment step. Larger learns more from each and takes longer. Default: the model's."""
    batch_size: Number = None
    """Windows in a gradient step. Default: the model's."""
    seq_len: Number = None
    """Time steps in each window. Default: the model's."""
    buffer_size: Number = None
    """Environment steps kept for training. Default: the model's."""
    learning_starts: Number = None
    """Environment steps before the first gradient step. Default: the model's."""
    planner: Literal["auto", "mppi", "none"] = "auto"
    """How actions are chosen: mppi plans each, none asks the policy, auto does what the model's paper does."""
    set: Fields = ()
    """A field of the model's configuration, such as --set hidden_dim=64."""
    checkpoint_interval: int = 10_000
    """Environment steps between checkpoints; one more is saved at the end, and by Ctrl-C and SIGTERM."""
    eval_interval: Number = None
    """Environment steps between evaluations; 0 makes none. Default: a twentieth of the steps."""
    eval_episodes: int = 5
    """Episodes of an evaluation."""

    def resolved(self) -> TrainSettings:
        """The same with numbers in place of what depends on others, or on chance.

        Raises:
            ConfigurationError: If a number is out of its range.
        """
        import secrets

        from worldflux.validation import whole_number

        steps = whole_number("steps", 100_000 if self.steps is None else self.steps, 1)
        interval = max(steps // 20, 1) if self.eval_interval is None else self.eval_interval
        return replace(
            self,
            steps=steps,
            n_envs=whole_number("n_envs", self.n_envs, 1),
            seed=secrets.randbelow(2**31) if self.seed is None else whole_number("seed", self.seed, 0),
            checkpoint_interval=whole_number("checkpoint_interval", self.checkpoint_interval, 1),
            eval_interval=whole_number("eval_interval", interval, 0),
            eval_episodes=whole_number("eval_episodes", self.eval_episodes, 1),
        )

    def agent_settings(self) -> dict[str, Any]:
        """What `WorldFluxAgent` takes."""
        names = ("learning_rate", "train_ratio", "batch_size", "seq_len", "buffer_size", "learning_starts")
        return {
            **{name: getattr(self, name) for name in names},
            "planner": None if self.planner == "none" else self.planner,
            "model_kwargs": model_fields(self.set),
            "device": self.device,
            "seed": self.seed,
        }


_DEFAULTS = TrainSettings()


def train(
    model: ModelName = None,
    env: OptionalEnvName = None,
    *,
    run: Directory = None,
    resume: Directory = None,
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")] = _DEFAULTS,
) -> int:
    """Train an agent in an environment, or go on with a run that was stopped.

    Args:
        model: A preset (worldflux models lists them), or a directory of WorldModel.save_pretrained.
        env: An id (CartPole-v1, dmc/walker-walk, atari/pong), or where your class is: module:Class or path.py:Class.
        run: Directory of the new run. Default: runs/<env>/<model>/<number>.
        resume: Directory of a run to go on with, by its config.json. --steps and --device may be given anew.
        settings: The others.

    Returns:
        0, or 130 and 143 after Ctrl-C and SIGTERM.
    """
    if resume is not None:
        if model is not None or env is not None or run is not None:
            raise ConfigurationError("--resume goes on with the MODEL, ENV and directory of the run. Leave them out.")
        resume = checked_path("--resume", resume)
        return _resume(resume, settings)
    if model is None or env is None:
        raise ConfigurationError(
            "MODEL and ENV are missing, such as: worldflux train dreamerv3:size12m CartPole-v1. "
            "A run that was stopped goes on with: worldflux train --resume DIR"
        )
    root = checked_path("the directory of runs", runs.ROOT)
    return _start(model, env, runs.lasting("--run", run), root, settings.resolved())


def _start(model: str, env: str, run: Path | None, root: Path, settings: TrainSettings) -> int:
    """Begins a new run."""
    from worldflux.agents import WorldFluxAgent
    from worldflux.agents.collecting import frames_per_vec_step

    runs.check_free(run)
    envs = _make_envs(env, settings)
    try:
        agent = WorldFluxAgent(model, envs, **settings.agent_settings())
        directory = runs.make_directory(run, env, model, root)
        with using(directory):
            runs.check_free(directory)
            RunConfig(
                kind=KIND,
                model=model,
                task=lasting_name(env),
                settings=asdict(settings),
                frames_per_step=frames_per_vec_step(envs),
                command=f"worldflux train {shlex.quote(model)} {shlex.quote(env)} {as_arguments(settings)}",
                versions=runs.versions(),
                started=runs.now(),
            ).write(directory)
            return _run(agent, directory, env, settings)
    finally:
        envs.close()


def _resume(directory: Path, given: TrainSettings) -> int:
    """Goes on with a run."""
    from worldflux.agents import WorldFluxAgent

    config = RunConfig.read(directory)
    if config.kind != KIND:
        raise ConfigurationError(
            f"{runs.shown(directory)} is a run of worldflux {config.kind}, which has a --resume of its own."
        )
    settings = from_json(TrainSettings, config.settings, directory / runs.CONFIG_FILE).resolved()
    settings = with_changes(settings, given, directory)
    assert settings.steps is not None
    done = runs.newest_step(directory)
    if done is not None and done >= settings.steps and (directory / runs.AGENT_FILE).is_file():
        print(
            f"{runs.shown(directory)} has finished its {settings.steps} steps. A larger --steps goes on: "
            f"worldflux train --resume {runs.shown(directory)} --steps {2 * settings.steps}"
        )
        return 0
    if is_own_code(config.task):
        print(f"worldflux: importing {config.task}, which {runs.CONFIG_FILE} names", file=sys.stderr)
    envs = _make_envs(config.task, settings)
    try:
        if done is None:
            print(f"worldflux: {runs.shown(directory)} has no checkpoint yet, so the run begins anew", file=sys.stderr)
            agent = WorldFluxAgent(config.model, envs, **settings.agent_settings())
        else:
            try:
                agent = WorldFluxAgent.load(directory / runs.CHECKPOINTS, envs, device=settings.device, resume=True)
            except ValueError as error:  # SB3's, where the spaces are others
                raise ConfigurationError(f"{runs.shown(directory)} cannot go on in {config.task}: {error}") from error
            print(f"worldflux: going on at step {agent.num_timesteps} of {settings.steps}", file=sys.stderr)
        with using(directory):
            replace(config, settings=asdict(settings)).write(directory)
            return _run(agent, directory, config.task, settings)
    finally:
        envs.close()


def with_changes(settings: Any, given: Any, directory: Path) -> Any:
    """A run's settings with those that may be given anew when it goes on.

    Args:
        settings: Of the run.
        given: On the command line.
        directory: Of the run.

    Raises:
        ConfigurationError: If others are given.
    """
    anew = changed(given)
    fixed = [f"--{name.replace('_', '-')}" for name in anew if name not in ("steps", "device")]
    if fixed:
        raise ConfigurationError(
            f"{', '.join(fixed)}: a run goes on with the settings of {runs.shown(directory / runs.CONFIG_FILE)}; only "
            "--steps and --device may be given anew. Other settings need a new run."
        )
    return replace(settings, **anew)


def _run(agent: WorldFluxAgent, directory: Path, env: str, settings: TrainSettings) -> int:
    """Trains until the run has its steps, or somebody stops it."""
    from worldflux.agents import AgentCheckpointCallback
    from worldflux.cli.run_callbacks import Evaluations, Progress, run_logger

    steps, seed = settings.steps, settings.seed
    assert steps is not None and seed is not None, settings
    progress = Progress(steps)
    callbacks: list[Any] = [progress]
    evaluations = None
    if settings.eval_interval:
        eval_envs = _make_envs(env, replace(settings, n_envs=1, processes=False))
        evaluations = Evaluations(
            eval_envs,
            directory,
            interval=settings.eval_interval,
            episodes=settings.eval_episodes,
            seed=seed,
            say=progress.say,
        )
        callbacks.append(evaluations)
    # Behind the evaluation, so that what it holds is evaluated already.
    callbacks.append(AgentCheckpointCallback(directory / runs.CHECKPOINTS, settings.checkpoint_interval))
    agent.set_logger(run_logger(directory / runs.LOGS))
    every = agent.schedule.env_steps_per_update
    print(
        f"worldflux: {runs.shown(directory)}, seed {seed}, a gradient step every {every:g} environment steps",
        file=sys.stderr,
    )
    try:
        agent.learn(max(steps - agent.num_timesteps, 0), callbacks, reset_num_timesteps=False)
        agent.dump_logs()  # of the episodes since the last dump
    except BaseException as error:
        return ended_early(error, directory, KIND)
    finally:
        agent.logger.close()
        if evaluations is not None:
            evaluations.envs.close()
    agent.save(directory / runs.AGENT_FILE)
    best = evaluations.best if evaluations is not None else None
    scored = "" if best is None else f", best evaluation {best.score:g} at step {best.step}"
    print(f"{runs.shown(directory)}: {agent.num_timesteps} steps{scored}.")
    return 0


def ended_early(error: BaseException, directory: Path, command: str) -> int:
    """Says on stderr where a run that ends early goes on.

    Args:
        error: What ended it. Another one than Ctrl-C or SIGTERM is raised again.
        directory: Of the run.
        command: The one that goes on.

    Returns:
        130 for Ctrl-C, 143 for SIGTERM.
    """
    asked = isinstance(error, KeyboardInterrupt | SystemExit)
    step = runs.newest_step(directory)
    if asked or step is not None:
        where = "nothing is saved yet, and it begins anew" if step is None else f"saved at step {step}, and it goes on"
        again = f"worldflux {command} --resume {shlex.quote(str(runs.shown(directory)))}"
        print(f"worldflux: stopped; {where} with: {again}", file=sys.stderr)
    if not asked:
        raise error
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 130


def _make_envs(env: str, settings: TrainSettings) -> VecEnv:
    from worldflux.envs.make import make_vec_env

    return make_vec_env(
        find_environment(env), settings.n_envs, seed=settings.seed, processes=settings.processes, **settings.given()
    )
