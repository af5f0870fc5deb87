"""`worldflux envs`: lists the environments that ENV can be."""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from worldflux.cli.options import Flag, Json
from worldflux.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

_Pattern = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PATTERN]", help_behavior_hint="")]

_MADE = 12
"""Largest number of environments that are made to learn their spaces, if making them takes time."""
_QUICK = ("gymnasium.envs.classic_control", "gymnasium.envs.toy_text", "gymnasium.envs.box2d")
"""Modules whose environments take no time to make."""
_OWN_CODE = "ENV can also be a class or function of your own: package.module:MyEnv or folder/file.py:MyEnv."
_SUITES = {
    "dmc": ("DeepMind Control", "dm-control", "vector, or image with --pixels", "continuous"),
    "atari": ("Atari, standard protocol", "ale-py", "image", "discrete"),
    "atari100k": ("Atari 100k", "ale-py", "image", "discrete"),
}
"""Title, package, observations and actions of each suite."""
_ALE = "Arcade Learning Environment, without preprocessing"


@dataclass(frozen=True)
class Entry:
    """An environment that can be given by its id."""

    id: str
    """ENV of the other commands."""
    group: str
    """Suite or package that the environment belongs to."""
    observations: str | None
    """Kind of observations; None if it is not known without making the environment."""
    actions: str | None
    """Kind of actions; None if it is not known without making the environment."""
    needs: str | None
    """What is missing to make the environment; None if nothing is known to be missing."""
    gymnasium_id: str
    """Id for `gymnasium.make`."""


def envs(
    pattern: _Pattern = None,
    *,
    all_versions: Flag = False,
    json_output: Json = False,
) -> int:
    """List the environments that ENV can be.

    Args:
        pattern: Part of the id, such as walker, or a pattern such as 'dmc/*-walk'. Default: all environments.
        all_versions: Also list versions of an environment that a newer one replaces.
        json_output: Print JSON.

    Returns:
        0
    """
    found = _entries(all_versions)
    chosen = [entry for entry in found if pattern is None or _matches(entry, pattern)]
    if not chosen:
        assert pattern is not None
        raise ConfigurationError(f"No environment matches '{pattern}'{_near(pattern, found)} {_OWN_CODE}")
    chosen = [_inspected(entry) if _is_quick(entry) or len(chosen) <= _MADE else entry for entry in chosen]
    if json_output:
        print(json.dumps([asdict(entry) for entry in chosen], indent=2))
        return 0
    groups: dict[str, list[Entry]] = {}
    for entry in chosen:
        groups.setdefault(entry.group, []).append(entry)
    for title, entries in groups.items():
        for line in _described(title, entries, whole=pattern is not None):
            print(line)
        print()
    print(_OWN_CODE)
    return 0


def _entries(all_versions: bool) -> list[Entry]:
    """All environments: those of Gymnasium and of installed packages, then the suites."""
    import gymnasium as gym

    from worldflux.cli.diagnosis import missing
    from worldflux.cli.provenance import installed_version
    from worldflux.envs.suites.atari import register_ale
    from worldflux.envs.suites.registration import register_suites, suite_id, suite_names

    register_suites()
    try:
        register_ale()
    except MissingDependencyError:
        pass
    suites = []
    for name in suite_names():
        title, package, observations, actions = _SUITES[name.partition("/")[0]]
        needs = missing({package: installed_version(package)}).get(package)
        suites.append(Entry(name, title, observations, actions, needs, str(suite_id(name))))
    newest: dict[tuple[str | None, str], int] = {}
    for spec in gym.registry.values():
        newest[spec.namespace, spec.name] = max(newest.get((spec.namespace, spec.name), 0), spec.version or 0)
    known = {entry.gymnasium_id for entry in suites}
    others = [
        _registered(spec)
        for spec in gym.registry.values()
        if spec.id not in known
        and not _only_raises(spec.entry_point)
        and (all_versions or (spec.version or 0) == newest[spec.namespace, spec.name])
    ]
    return sorted(others, key=lambda entry: (entry.group == _ALE, not entry.group.startswith("Gymnasium"))) + suites


def _registered(spec: EnvSpec) -> Entry:
    """An environment of Gymnasium or of another package."""
    module = str(spec.entry_point).partition(":")[0]
    if spec.namespace == "ALE" or module.startswith("ale_py."):
        return Entry(spec.id, _ALE, "image", "discrete", None, spec.id)
    if module.startswith("gymnasium.envs.mujoco"):
        return Entry(spec.id, "Gymnasium: mujoco", "vector", "continuous", None, spec.id)
    inner = re.match(r"gymnasium\.envs\.(\w+)", module)
    group = f"Gymnasium: {inner[1].replace('_', ' ')}" if inner else module.partition(".")[0]
    return Entry(spec.id, group, None, None, None, spec.id)


def _only_raises(entry_point: object) -> bool:
    """Whether Gymnasium keeps the id only to say which package the environment has moved to."""
    return callable(entry_point) and getattr(entry_point, "__name__", "").startswith("_raise")


def _is_quick(entry: Entry) -> bool:
    import gymnasium as gym

    return str(gym.registry[entry.gymnasium_id].entry_point).startswith(_QUICK)


def _inspected(entry: Entry) -> Entry:
    """The entry with the spaces of the environment, or with what is missing to make it."""
    import warnings

    import gymnasium as gym

    if entry.needs is not None:
        return entry
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about older versions, which the user has asked for
            env = gym.make(entry.gymnasium_id, disable_env_checker=True)
    except Exception as error:  # the constructor of any package
        return replace(entry, needs=" ".join(str(error).split()) or type(error).__name__)
    try:
        observations = _kind(env.observation_space, _observed)
        if entry.id.startswith("dmc/"):
            observations += ", or image with --pixels"
        return replace(entry, observations=observations, actions=_kind(env.action_space, _acted))
    finally:
        env.close()


def _kind(space: Any, of_box: Callable[[Any], str]) -> str:
    """The kind of a space in words."""
    from gymnasium import spaces

    if isinstance(space, spaces.Box):
        return of_box(space)
    if isinstance(space, spaces.Discrete):
        return f"discrete ({space.n})"
    if isinstance(space, spaces.MultiDiscrete):
        return f"multi-discrete ({' x '.join(map(str, space.nvec.reshape(-1)))})"
    if isinstance(space, spaces.MultiBinary):
        return f"multi-binary ({space.n})"
    if isinstance(space, spaces.Dict):
        return ", ".join(f"{name}: {_kind(part, of_box)}" for name, part in space.items())
    return f"{type(space).__name__}, which worldflux does not support"


def _observed(space: Any) -> str:
    shape = "x".join(map(str, space.shape))
    return f"{'image' if len(space.shape) == 3 else 'vector' if len(space.shape) == 1 else 'array'} ({shape})"


def _acted(space: Any) -> str:
    return f"continuous ({'x'.join(map(str, space.shape))})"


def _matches(entry: Entry, pattern: str) -> bool:
    """Whether one of the ids contains the text, or fits the pattern."""
    names, pattern = (entry.id.lower(), entry.gymnasium_id.lower()), pattern.lower()
    if any(sign in pattern for sign in "*?["):
        return any(fnmatchcase(name, pattern) for name in names)
    return any(pattern in name for name in names)


def _near(pattern: str, entries: Sequence[Entry]) -> str:
    """The end of the message about a pattern without a match: up to three ids that are similar."""
    text = pattern.lower().strip("*?")
    by_part: dict[str, list[str]] = {}
    for entry in entries:
        lowered = entry.id.lower()
        for part in {lowered, *re.split(r"[/-]", lowered), lowered.rpartition("/")[2], lowered.rpartition("-v")[0]}:
            by_part.setdefault(part, []).append(entry.id)
    close = difflib.get_close_matches(text, by_part, n=3, cutoff=0.65)
    names = list(dict.fromkeys(name for part in close for name in by_part[part]))[:3]
    return f"; did you mean {' or '.join(names)}?" if names else "."


def _described(title: str, entries: Sequence[Entry], *, whole: bool) -> Iterator[str]:
    """The lines about a group: a table if its environments differ, otherwise only their ids."""
    kinds = {(entry.observations, entry.actions, entry.needs) for entry in entries}
    if title == _ALE and not whole:
        yield f"{title} ({len(entries)}): listed if PATTERN is given, such as 'ALE/*'"
        return
    if len(kinds) == 1 and len(entries) > 1:
        (observations, actions, needs) = kinds.pop()
        known = "" if observations is None else f"; observations: {observations}; actions: {actions}"
        yield f"{title} ({len(entries)}){known}"
        if needs is not None:
            yield f"  cannot be made here: {needs}"
        yield from _in_columns([entry.id for entry in entries])
        return
    yield f"{title} ({len(entries)})"
    width = max(len(entry.id) for entry in entries)
    middle = max(len(entry.observations or "") for entry in entries)
    for entry in entries:
        kind = f"{entry.observations or '':<{middle}}  {entry.actions or ''}"
        kind = kind if entry.needs is None else f"cannot be made here: {entry.needs}"
        yield f"  {entry.id:<{width}}  {kind}".rstrip()


def _in_columns(names: Sequence[str]) -> Iterator[str]:
    """The names in as many columns as fit, sorted downwards."""
    width = 2 + max(map(len, names))
    columns = max((shutil.get_terminal_size((100, 24)).columns - 2) // width, 1)
    rows = -(-len(names) // columns)
    for row in range(rows):
        yield "  " + "".join(name.ljust(width) for name in names[row::rows]).rstrip()
