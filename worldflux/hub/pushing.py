"""Pushing agents and data sets to the Hugging Face Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from worldflux.hub.addresses import checked_repo_id
from worldflux.hub.cards import AgentRecord, write_agent_card, write_dataset_card
from worldflux.hub.client import AGENT_EXTRAS, CARD_FILE, DATA_FILE, MODEL_FILES, import_hub, upload


def push_agent(
    write: Callable[[Path], None], repo_id: str, record: AgentRecord, *, files: Sequence[Path] = (), **options: Any
) -> str:
    """Pushes an agent with its card.

    Args:
        write: Writes the files of the agent into an empty directory.
        repo_id: The repository.
        record: What the card is made from.
        files: Further files, with names from `AGENT_EXTRAS`.
        **options: Options of `upload`.

    Returns:
        The address of the repository's page.
    """
    checked_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="worldflux-push-") as scratch:
        directory = Path(scratch)
        write_agent_repository(directory, write, repo_id, record, files)
        return upload(directory, repo_id, "model", replaced=(*MODEL_FILES, *AGENT_EXTRAS), **options)


def write_agent_repository(
    directory: Path, write: Callable[[Path], None], repo_id: str, record: AgentRecord, files: Sequence[Path]
) -> None:
    """Writes all files of an agent's repository into an empty directory."""
    import_hub()
    write(directory)
    record.write(directory)
    for file in files:
        shutil.copyfile(file, directory / file.name)
    films = [file.name for file in files if file.suffix in (".gif", ".mp4")]
    write_agent_card(directory, repo_id, record, film=films[0] if films else None)


def push_dataset(
    write: Callable[[Path], None], repo_id: str, *, env: str | None, description: str | None, **options: Any
) -> str:
    """Pushes a data set with its card.

    Args:
        write: Writes the data to a path.
        repo_id: The repository.
        env: Name of the environment that was recorded.
        description: How it was recorded.
        **options: Options of `upload`.

    Returns:
        The address of the repository's page.
    """
    checked_repo_id(repo_id)
    import_hub()
    with tempfile.TemporaryDirectory(prefix="worldflux-push-") as scratch:
        directory = Path(scratch)
        write(directory / DATA_FILE)
        write_dataset_card(directory, repo_id, env=env, description=description)
        return upload(directory, repo_id, "dataset", replaced=(DATA_FILE, CARD_FILE), **options)
