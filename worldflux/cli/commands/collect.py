"""`worldflux collect`: records a policy in an environment, in a file to train from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from worldflux.cli.environments import EnvName, make_environments
from worldflux.cli.options import Count, EnvOptions, Flag, Number, TaskName, check_writable, counted
from worldflux.cli.players import load_player, one_task
from worldflux.cli.runs import Saved, saved_agent
from worldflux.errors import ConfigurationError
from worldflux.files import checked_path
from worldflux.hub.addresses import is_address
from worldflux.validation import whole_number

RANDOM = "random"
_NO_OPTIONS = EnvOptions()


def collect(
    env: EnvName,
    *,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")],
    steps: Number = None,
    episodes: Number = None,
    policy: Annotated[str, tyro.conf.arg(metavar="POLICY")] = RANDOM,
    task: TaskName = None,
    n_envs: Count = 1,
    seed: Number = None,
    overwrite: Flag = False,
    options: Annotated[EnvOptions, tyro.conf.arg(name="")] = _NO_OPTIONS,
) -> int:
    """Record a policy's episodes in a file for worldflux train-offline.

    Args:
        env: An id (CartPole-v1, dmc/walker-walk, atari/pong), or your class: module:Class or path.py:Class.
        output: The .npz file to write.
        steps: Number of environment steps to record, summed over all environments.
        episodes: Number of complete episodes to record, instead of --steps.
        policy: "random", a zip of WorldFluxAgent.save, or the directory of a run or of a model.
        task: Task of the policy that ENV is, for an agent that has several. Default: the one with the name of ENV.
        n_envs: Number of environments that are stepped together.
        seed: Seed of the environments and of random actions. If omitted, it is random.
        overwrite: Replace the file if it exists.
        options: Options of ENV.

    Returns:
        0, or 130 after Ctrl-C and 143 after SIGTERM.
    """
    target = checked_path("--output", output)  # before the environment may change the working directory
    check_output(output, overwrite)
    if (steps is None) == (episodes is None):
        raise ConfigurationError("Give either --steps or --episodes: how much is recorded.")
    saved = None if policy == RANDOM else _policy(policy)
    task, env = one_task(env, task, "worldflux collect records")
    if saved is None and task is not None:
        raise ConfigurationError(f"The task {task} is one of a --policy, which is missing. Leave the task out.")
    if seed is not None:
        whole_number("seed", seed, 0)

    from worldflux.envs.collection import collect as collect_steps
    from worldflux.training.signals import stopping_on_signals

    envs = make_environments(env, options, n_envs, seed=seed)
    buffer, status = None, 0
    try:
        acting = None if saved is None else load_player(saved, envs, env, task)
        shown = _Progress(steps, "step") if episodes is None else _Progress(episodes, "episode")
        with stopping_on_signals() as stop:

            def go_on(done: int) -> bool:
                shown.show(done)
                return not stop

            try:
                buffer = collect_steps(envs, acting, steps=steps, episodes=episodes, seed=seed, callback=go_on)
            finally:
                shown.close()
    except (KeyboardInterrupt, SystemExit) as error:
        if buffer is None:
            print("worldflux: stopped; nothing has been saved", file=sys.stderr)
            raise
        print("worldflux: stopped early; the last episode of each environment is cut short", file=sys.stderr)
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 130
    finally:
        envs.close()
    buffer.save(target)
    print(f"{output}: {counted(buffer.num_transitions, 'step')} of {counted(buffer.num_episodes, 'episode')}.")
    return status


class _Progress:
    """Shows the progress on stderr: a bar on a terminal if tqdm is installed, otherwise lines."""

    def __init__(self, total: int | None, unit: str) -> None:
        from worldflux.cli.run_callbacks import ProgressLines, progress_bar

        total = whole_number(f"{unit}s", total, 1)
        self._lines = ProgressLines(total, 0, unit)
        self._bar = progress_bar(total, unit=unit) if sys.stderr.isatty() else None

    def show(self, done: int) -> None:
        """Shows how much is done."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._lines.is_due(done):
            print(self._lines.line(done, ""), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def check_output(output: Path, overwrite: bool) -> None:
    """Raises a `ConfigurationError` if the file cannot be written, before anything is recorded."""
    if output.is_dir():
        raise ConfigurationError(f"{output} is a directory, expected a file. Add a name: {output / 'data.npz'}.")
    if output.suffix.lower() != ".npz":
        found = f"ends in '{output.suffix}'" if output.suffix else "has no ending"
        raise ConfigurationError(f"{output} {found}, expected .npz: {output.with_suffix('.npz')}.")
    if output.exists() and not overwrite:
        raise ConfigurationError(f"{output} exists. Pass --overwrite to replace it, or choose another --output.")
    if not output.absolute().parent.is_dir():
        raise ConfigurationError(f"There is no directory '{output.parent}' for {output.name}. Create it first.")
    check_writable("--output", output, output.absolute().parent)


def _policy(given: str) -> Saved:
    path = Path(given)
    if not is_address(given) and not path.exists() and not path.with_name(f"{path.name}.zip").is_file():
        raise ConfigurationError(
            f"There is no file '{given}'. --policy is 'random', a file of WorldFluxAgent.save, or the directory of a "
            "run or of a model, or an address on the Hugging Face Hub."
        )
    return saved_agent(path)
