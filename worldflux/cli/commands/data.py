"""`worldflux data`: work on files of recorded data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import tyro

from worldflux.cli.commands.collect import check_output
from worldflux.cli.options import NO_HINT, Directory, Flag, Json, Name, Number, assignments, counted
from worldflux.errors import ConfigurationError
from worldflux.files import checked_path
from worldflux.hub.addresses import checked_repo_id

_Options = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE", help_behavior_hint=NO_HINT), tyro.conf.UseAppendAction
]
_Bounds = Annotated[tuple[float, ...] | None, tyro.conf.arg(metavar="FLOAT ...", help_behavior_hint=NO_HINT)]
_Sizes = Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT ...", help_behavior_hint=NO_HINT)]


@contextmanager
def _missing_is_ours() -> Iterator[None]:
    """Says in one line that there is no such file, as of other wrong arguments."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigurationError(str(error)) from error


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    *,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")],
    format: Annotated[str, tyro.conf.arg(metavar="FORMAT")] = "auto",
    option: _Options = (),
    action_low: _Bounds = None,
    action_high: _Bounds = None,
    action_classes: _Sizes = None,
    clip_actions: Flag = False,
    image_size: Number = None,
    capacity: Number = None,
    storage: Directory = None,
    overwrite: Flag = False,
) -> int:
    """Write a data set of another format as a file for worldflux train-offline.

    Args:
        source: A file, a directory, or the id of a Minari data set.
        output: The .npz file to write.
        format: The format of SOURCE, such as minari, lerobot or d4rl. auto: it is told from the content.
        option: An option of the format, such as --option align=arrives. May be repeated.
        action_low: Lower bounds of the actions, one number or one for each entry, where the data does not name them.
        action_high: Upper bounds of the actions.
        action_classes: Numbers of choices, for discrete actions that are stored as whole numbers.
        clip_actions: Move actions beyond the bounds to the nearest ones inside.
        image_size: Resize all images to so many pixels on each side.
        capacity: Keep only so many of the newest steps.
        storage: A directory for working files, for data larger than memory.
        overwrite: Replace the output if it exists.

    Returns:
        0.
    """
    target = checked_path("--output", output)
    check_output(output, overwrite)
    options = assignments("--option", option, "NAME=VALUE, such as align=arrives")

    from worldflux.datasets import load

    with _missing_is_ours():
        buffer = load(
            source,
            format=format,
            capacity=capacity,
            storage=storage,
            action_low=action_low,
            action_high=action_high,
            action_classes=action_classes,
            clip_actions=clip_actions,
            image_size=image_size,
            **options,
        )
    buffer.save(target)
    print(f"{output}: {counted(buffer.num_transitions, 'step')} of {counted(buffer.num_episodes, 'episode')}.")
    return 0


def push_data(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO")],
    *,
    env: Name = None,
    about: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint=NO_HINT)] = None,
    private: Flag = False,
    branch: Name = None,
    message: Name = None,
) -> int:
    """Upload a data set to the Hugging Face Hub, with a card that says what is in it.

    Args:
        source: An .npz file of worldflux, or a data set of another format as in worldflux data convert.
        repo: The repository on the Hub, user/name. It is created if there is none.
        env: Name of the environment that was recorded, for the card.
        about: How it was recorded, for the card.
        private: Make a new repository private.
        branch: Branch to push to. Default: the main branch.
        message: Message of the commit.

    Returns:
        0.
    """
    checked_repo_id(repo)

    from worldflux.datasets import load

    with _missing_is_ours():
        buffer = load(source)
    page = buffer.push_to_hub(
        repo, env=env, description=about, private=private or None, branch=branch, commit_message=message
    )
    print(page)
    return 0


def lint(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    *,
    format: Annotated[str, tyro.conf.arg(metavar="FORMAT")] = "auto",
    option: _Options = (),
    action_low: _Bounds = None,
    action_high: _Bounds = None,
    action_classes: _Sizes = None,
    clip_actions: Flag = False,
    json_output: Json = False,
) -> int:
    """Say what is probably wrong with recorded data, and show the rows.

    Args:
        source: A file of worldflux, or whatever worldflux data convert reads.
        format: The format of SOURCE, such as minari, lerobot or d4rl. auto: it is told from the content.
        option: An option of the format, such as --option align=arrives. May be repeated.
        action_low: Lower bounds of the actions, one number or one for each entry, where the data does not name them.
        action_high: Upper bounds of the actions.
        action_classes: Numbers of choices, for discrete actions that are stored as whole numbers.
        clip_actions: Move actions beyond the bounds to the nearest ones inside.
        json_output: Print JSON.

    Returns:
        0, or 1 if something is probably wrong. Notes, which good data can have as well, do not count.
    """
    options = assignments("--option", option, "NAME=VALUE, such as align=arrives")

    from worldflux.datasets import lint as lint_data

    given = {"action_low": action_low, "action_high": action_high, "action_classes": action_classes}
    options |= {name: value for name, value in given.items() if value is not None}
    options |= {"clip_actions": True} if clip_actions else {}
    options |= {"format": format} if format != "auto" else {}
    with _missing_is_ours():
        report = lint_data(source, **options)
    print(json.dumps(report.to_dict(), indent=2) if json_output else report)
    return 0 if report.ok else 1
