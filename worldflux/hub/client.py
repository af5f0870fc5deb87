"""Downloads from the Hugging Face Hub and uploads to it, through `huggingface_hub`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from worldflux.errors import ConfigurationError, HubError, MissingDependencyError, WorldFluxError, install_hint
from worldflux.files import checked_path
from worldflux.hub.addresses import Address, Kind, address, checked_repo_id, is_address

AGENT_FILE = "agent.json"
RECORD_FILE = "worldflux.json"
"""What is known about a pushed agent. A directory with this file holds neither an optimiser nor replay data."""
CARD_FILE = "README.md"
DATA_FILE = "data.npz"
MODEL_FILES = (AGENT_FILE, "config.json", "model.safetensors", RECORD_FILE)
"""Files that are read from the repository of an agent or a model: JSON and safetensors. No other file is downloaded."""
AGENT_EXTRAS = ("evaluations.csv", "replay.gif", "replay.mp4")
"""Files for people in the repository of an agent."""
DATASET_PATTERNS = ("*.npz", "*.json", "*.jsonl", "*.parquet", "*.mp4", "*.hdf5", "*.h5")
"""Files that are read from the repository of a data set: formats that cannot run code."""

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token of huggingface.co/settings/tokens"


def import_hub() -> Any:
    """The module `huggingface_hub`.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(
            f"The Hugging Face Hub needs huggingface_hub. Install it with: {install_hint('hub')}"
        ) from error
    return huggingface_hub


def model_path(name: str, given: str | os.PathLike[str]) -> Path:
    """The path of a saved model or agent; one on the Hub is downloaded.

    Args:
        name: Name of the argument in error messages.
        given: Path, or address on the Hub.

    Raises:
        ConfigurationError: If nothing can exist under this path.
        HubError: If it cannot be downloaded.
        MissingDependencyError: If `huggingface_hub` is needed and not installed.
    """
    return download(address(given, "model"), MODEL_FILES) if is_address(given) else checked_path(name, given)


def dataset_path(name: str, given: str | os.PathLike[str]) -> Path:
    """The path of a data set: a file of `ReplayBuffer.save`, or a directory in another format. See `model_path`."""
    if not is_address(given):
        return checked_path(name, given)
    return pinned_dataset(given)[1]


def pinned_dataset(given: str | os.PathLike[str]) -> tuple[str, Path]:
    """Downloads a data set.

    Args:
        given: Its address.

    Returns:
        The address of the commit that was downloaded, which stays the same whatever is pushed later; and the path.
    """
    place = address(given, "dataset")
    directory = download(place, DATASET_PATTERNS)
    path = directory / DATA_FILE if (directory / DATA_FILE).is_file() else directory
    return str(replace(place, revision=directory.name)), path


def download(place: Address, patterns: Sequence[str]) -> Path:
    """Downloads a repository into the cache of `huggingface_hub`, or finds it there if it was downloaded before.

    Args:
        place: The repository.
        patterns: The files that are downloaded; all others are left out.

    Returns:
        The directory in the cache, which must not be changed.

    Raises:
        HubError: If there is no such repository, it cannot be reached and is not in the cache, or it has no such files.
        MissingDependencyError: If `huggingface_hub` is not installed.
    """
    hub = import_hub()
    with _our_errors(str(place), place.repo_id, place.revision):
        found = hub.snapshot_download(
            place.repo_id,
            repo_type=place.kind,
            revision=place.revision,
            allow_patterns=list(patterns),
            library_name="worldflux",
            library_version=metadata.version("worldflux"),
        )
    directory = Path(found)
    if not directory.is_dir():
        raise HubError(f"{place} is not a repository of worldflux: it has no {', '.join(patterns)}.")
    return directory


def upload(
    directory: Path,
    repo_id: str,
    kind: Kind,
    *,
    replaced: Sequence[str],
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
) -> str:
    """Uploads the files of a directory in one commit. The repository is created if there is none.

    Args:
        directory: Directory with the files.
        repo_id: The repository.
        kind: Whether it holds a model or a data set.
        replaced: Files of an earlier push that are removed if they are not in the directory. Others stay.
        commit_message: Message of the commit.
        private: Whether a new repository is private; None: as the owner's settings say.
        token: Token of the Hub; None: the one that was stored by `hf auth login`, or `HF_TOKEN`.
        branch: Branch, created if there is none; None: the main branch.

    Returns:
        The address of the repository's page.

    Raises:
        ConfigurationError: If the name of the repository is invalid.
        HubError: If the Hub cannot be reached, or refuses it.
        MissingDependencyError: If `huggingface_hub` is not installed.
    """
    checked_repo_id(repo_id)
    hub = import_hub()
    version = metadata.version("worldflux")
    api = hub.HfApi(token=token, library_name="worldflux", library_version=version)
    with _our_errors(f"'{repo_id}'", repo_id, branch, writes=True):
        page = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(page.repo_id, branch=branch, repo_type=kind, exist_ok=True)
        api.upload_folder(
            repo_id=page.repo_id,
            repo_type=kind,
            folder_path=directory,
            revision=branch,
            commit_message=commit_message or f"Push with worldflux {version}",
            delete_patterns=list(replaced),
        )
    return str(page)


@contextmanager
def _our_errors(name: str, repo_id: str, revision: str | None, *, writes: bool = False) -> Iterator[None]:
    """Converts the errors of `huggingface_hub` into errors that say what to do."""
    from huggingface_hub import errors as hub

    try:
        yield
    except WorldFluxError:
        raise
    except hub.GatedRepoError as error:
        raise HubError(
            f"{name} is gated: accept its terms on its page on the Hub. {_LOG_IN} of the user who has accepted them."
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise HubError(f"{name} does not exist, or is private. Check the name. {_LOG_IN} if it is yours.") from error
    except hub.RevisionNotFoundError as error:
        raise HubError(
            f"'{repo_id}' has no revision '{revision}'. Pass one of its branches, tags or commits, or leave it out."
        ) from error
    except hub.HFValidationError as error:
        raise ConfigurationError(f"{name} is not accepted by the Hub: {error}") from error
    except hub.LocalTokenNotFoundError as error:
        raise HubError(f"{name}: you are not logged in. {_LOG_IN}.") from error
    except hub.OfflineModeIsEnabled as error:
        raise HubError(f"{name} cannot be reached, because HF_HUB_OFFLINE is set. Unset it.") from error
    except hub.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if _is_offline() else f"the Hub cannot be reached ({_root_of(error)})"
        raise HubError(
            f"{name} is not in the cache, and {why}. Try again with a connection, or load a copy from the disk."
        ) from error
    except hub.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise HubError(f"{name}: you are not logged in, or your token is not valid. {_LOG_IN}.") from error
        if status == 403:
            to = "write to" if writes else "read"
            raise HubError(
                f"Your token does not allow you to {to} {name}. Use a token with that right, or another repository."
            ) from error
        said = getattr(error, "server_message", None) or str(error).partition("\n")[0]
        raise HubError(f"The Hub has refused the request for {name}: {said} (status {status}).") from error
    except Exception as error:
        if not _is_of_network(error):
            raise
        raise HubError(
            f"The Hub cannot be reached for {name} ({_root_of(error)}). Check the connection, and try again."
        ) from error


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _is_of_network(error: BaseException) -> bool:
    """Whether an error comes from a connection. Versions of `huggingface_hub` differ in the library that they use."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or module.startswith(("httpx", "httpcore", "requests"))


def _root_of(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
