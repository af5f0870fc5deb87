"""Addresses of repositories on the Hugging Face Hub: `hf://user/name`, `hf://datasets/user/name@revision`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from worldflux.errors import ConfigurationError

Kind = Literal["model", "dataset"]

_PREFIX = re.compile(r"hf:/{1,2}(?!/)")
"""A `pathlib.Path`, such as an argument of the command line, keeps only one of the two slashes."""
_NAME = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_REPOSITORY = re.compile(rf"(?:{_NAME}/)?{_NAME}", re.ASCII)
_ADDRESS = re.compile(rf"(?P<datasets>datasets/)?(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^\s@]+))?", re.ASCII)


@dataclass(frozen=True)
class Address:
    """A repository on the Hub, at one of its revisions."""

    repo_id: str
    """The repository: `user/name`."""
    kind: Kind
    """Whether it holds a model or a data set."""
    revision: str | None = None
    """Branch, tag or commit; None: the newest commit of the main branch."""

    def __str__(self) -> str:
        folder = "datasets/" if self.kind == "dataset" else ""
        return f"hf://{folder}{self.repo_id}{f'@{self.revision}' if self.revision else ''}"


def is_address(given: object) -> bool:
    """Whether a path that a user has given is an address on the Hub."""
    return isinstance(given, str | os.PathLike) and _PREFIX.match(str(os.fspath(given))) is not None


def address(given: str | os.PathLike[str], kind: Kind) -> Address:
    """Parses an address.

    Args:
        given: Text or path for which `is_address` is true.
        kind: What the repository has to hold.

    Raises:
        ConfigurationError: If it is not an address, or that of the other kind.
    """
    text = os.fspath(given)
    text = f"hf://{_PREFIX.sub('', text, count=1)}"
    example = "hf://datasets/user/name" if kind == "dataset" else "hf://user/name"
    found = _ADDRESS.fullmatch(text.removeprefix("hf://"))
    if found is None or ".." in text or "--" in found["repo"]:
        raise ConfigurationError(
            f"'{text}' is not an address on the Hugging Face Hub, expected {example} or {example}@revision."
        )
    there: Kind = "dataset" if found["datasets"] else "model"
    if there != kind:
        other = f"datasets/{found['repo']}" if kind == "dataset" else found["repo"]
        raise ConfigurationError(
            f"'{text}' is the address of a {_NAMES[there]}, expected that of a {_NAMES[kind]}, such as 'hf://{other}'."
        )
    return Address(found["repo"], there, found["revision"])


_NAMES = {"model": "model", "dataset": "data set"}


def checked_repo_id(given: object) -> str:
    """The name of a repository to push to: `user/name`, or `name` for one of the user who is logged in.

    Raises:
        ConfigurationError: If no repository can have this name.
    """
    if not isinstance(given, str) or not _REPOSITORY.fullmatch(given) or ".." in given or "--" in given:
        hint = f" Pass '{str(given).rpartition('://')[2]}'." if is_address(given) else ""
        raise ConfigurationError(
            f"repo_id is {given!r}, expected 'user/name' with letters, digits, '-', '_' and '.'.{hint}"
        )
    return given
