"""The file of a saved agent, a zip in which nothing can run code; and the same entries in a checkpoint's directory.

| entry | content |
| --- | --- |
| `agent.json` | settings, spaces and counters; the versions that it was saved with |
| `config.json`, `model.safetensors` | the model, as `WorldModel.save_pretrained` writes it |
| `optimizer.pt`, `trainer.json` | the trainer's checkpoint; read without unpickling |
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, Literal, TypeGuard

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import get_system_info
from stable_baselines3.common.vec_env import VecNormalize

from worldflux.agents.settings import AgentSettings, rate_from_json, rate_to_json
from worldflux.envs.spaces_json import space_from_json, space_to_json
from worldflux.errors import CheckpointError, ConfigurationError, ShapeMismatchError
from worldflux.files import checked_path, directory_beside, recover_directory
from worldflux.models.base import CONFIG_FILE, WEIGHTS_FILE
from worldflux.reading import check_stored, open_regular, read_json
from worldflux.training.checkpoint import (
    OPTIMIZER_FILE,
    TRAINER_FILE,
    damaged,
    incomplete_in,
    newest_checkpoint,
    writing_checkpoint,
)
from worldflux.validation import finite_number, whole_number

AGENT_FILE = "agent.json"
FORMAT = 1
_ENTRIES = (AGENT_FILE, CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE, TRAINER_FILE)

_NAMELESS = "the file object"
"""What errors call a file that has no path."""

ArchivePath = str | Path | io.BufferedIOBase | IO[bytes]


def is_file(given: object, to: Literal["read", "write"]) -> TypeGuard[IO[bytes]]:
    """Whether `given` is a file object and not a path.

    Args:
        given: By the user.
        to: What it has to be open for.

    Raises:
        ConfigurationError: If it is neither, or a file that is closed, opened for text or for the other direction.
    """
    if isinstance(given, str | os.PathLike):
        return False
    if not hasattr(given, to):
        raise ConfigurationError(f"The file is given as {given!r}, expected a path or a binary file object.")
    if getattr(given, "closed", False):
        raise ConfigurationError(f"The file object {given!r} is closed. Open it in mode '{to[0]}b'.")
    able = getattr(given, {"read": "readable", "write": "writable"}[to], None)
    if hasattr(given, "encoding") or isinstance(given, io.TextIOBase) or (able is not None and not able()):
        raise ConfigurationError(f"The file object {given!r} cannot {to} bytes. Open it in mode '{to[0]}b'.")
    seekable = getattr(given, "seekable", None)
    if to == "read" and seekable is not None and not seekable():
        raise ConfigurationError(
            f"The file object {given!r} is a pipe or the like, expected one that can be read from its start. Pass "
            "io.BytesIO(file.read())."
        )
    return True


@contextmanager
def path_to_write(target: ArchivePath) -> Iterator[str | Path]:
    """A path to write to for who knows nothing of file objects: the one that was given, or that of a scratch file."""
    if not is_file(target, "write"):
        yield target  # type: ignore[misc]
        return
    with tempfile.TemporaryDirectory(prefix="agent-") as scratch:
        path = Path(scratch) / _NAMELESS
        yield path
        with path.open("rb") as source:
            shutil.copyfileobj(source, target)


@contextmanager
def path_to_read(source: ArchivePath) -> Iterator[str | Path]:
    """The same for reading. Of a file object everything is read, wherever it stands."""
    if not is_file(source, "read"):
        yield source  # type: ignore[misc]
        return
    with tempfile.TemporaryDirectory(prefix="agent-") as scratch:
        path = Path(scratch) / _NAMELESS
        source.seek(0)
        with path.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield path


def write_archive(path: ArchivePath, description: dict[str, Any], write_checkpoint: Callable[[Path], None]) -> None:
    """Writes an agent's file, whole or not at all.

    Args:
        path: A path, to which `.zip` is appended if it has no suffix and whose directories are made, or a binary file.
        description: Content of `agent.json`.
        write_checkpoint: Writes the trainer's checkpoint into an empty directory.

    Raises:
        CheckpointError: If the path is a directory, or cannot be written.
        ConfigurationError: If it is neither a path nor a binary file that can be written.
    """
    target = None if is_file(path, "write") else _with_suffix(checked_path("path", path))
    if target is not None and (target.is_dir() or os.path.basename(os.fspath(path)) in ("", ".", "..")):  # type: ignore[arg-type]
        name = target if target.is_dir() else path
        raise CheckpointError(f"{name} is a directory, expected the path of a file. Add a name, such as agent.zip.")
    with _scratch(target) as scratch:
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint(checkpoint)
        whole = scratch / "agent.zip"
        with whole.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(AGENT_FILE, _as_text(description))
                for entry in sorted(checkpoint.iterdir()):
                    archive.write(entry, entry.name)
            file.flush()
            # On the disk before the old file is gone.
            os.fsync(file.fileno())
        if target is not None:
            os.replace(whole, target)
        else:
            with whole.open("rb") as source:
                shutil.copyfileobj(source, path)  # type: ignore[arg-type]


def write_description(directory: Path, description: dict[str, Any]) -> None:
    """Writes `agent.json` beside the trainer's files in a checkpoint's directory."""
    (directory / AGENT_FILE).write_text(_as_text(description), encoding="utf-8")


@contextmanager
def open_saved(path: ArchivePath, *, resume: bool = False) -> Iterator[tuple[dict[str, Any], Path]]:
    """The description of a saved agent, and a directory with its checkpoint that may be gone afterwards.

    Args:
        path: As given to `write_archive`, where `.zip` may be left out; or the directory of a checkpoint, or one that
            holds several, of which the newest is taken.
        resume: Whether a run is to go on from it.

    Raises:
        FileNotFoundError: If there is nothing.
        CheckpointError: If it is no agent, or damaged; or there is no run to resume.
        ConfigurationError: If it is neither a path nor a binary file that can be read.
    """
    from_file = is_file(path, "read")
    holder = None if from_file else checked_path("path", path)
    if holder is not None:
        recover_directory(holder)
    if holder is None or not holder.is_dir():
        with _open_archive(path) as opened:
            if resume:
                raise CheckpointError(
                    f"{path} holds no replay data, so it cannot be resumed. Leave resume=True out, or pass a directory "
                    "that AgentCheckpointCallback wrote."
                )
            yield opened
        return
    directory = holder if (holder / AGENT_FILE).is_file() else newest_checkpoint(holder, warn=True)
    if directory is None and any((holder / name).is_file() for name in (WEIGHTS_FILE, TRAINER_FILE)):
        directory = holder  # what is missing is said below
    if directory is None:
        incomplete = "; ".join(f"{place.name} is incomplete: {fault}" for place, fault in incomplete_in(holder).items())
        raise FileNotFoundError(
            f"The directory {path} holds no checkpoint of an agent{incomplete and f' ({incomplete})'}. Pass one that "
            "save_checkpoint wrote, or that holds several of them."
        )
    _check_complete(directory, (*_ENTRIES, RUN_FILE) if resume else _ENTRIES)
    yield _checked(read_json(directory / AGENT_FILE), directory), directory


def _check_complete(directory: Path, names: Sequence[str]) -> None:
    """Raises a `CheckpointError` unless a checkpoint has these files."""
    missing = [name for name in names if not (directory / name).is_file()]
    if AGENT_FILE in missing and not (directory / RUN_FILE).is_file():
        raise CheckpointError(
            f"{directory} holds a model without an agent (no {AGENT_FILE}): train() or save_pretrained wrote it. "
            f"Use WorldFluxAgent({str(directory)!r}, env)."
        )
    if missing:
        raise damaged(directory, f"no {', '.join(missing)}")


def print_saved_system(description: dict[str, Any]) -> None:
    """Prints the versions that an agent was saved with, under SB3's headline."""
    print("== SAVED MODEL SYSTEM INFO ==")
    versions = description.get("system_info")
    if not isinstance(versions, dict):
        versions = {"Versions": "not in the file, which an older worldflux wrote"}
    print("".join(f"- {name}: {version}\n" for name, version in versions.items()))


@contextmanager
def _open_archive(path: ArchivePath) -> Iterator[tuple[dict[str, Any], Path]]:
    """The same for a zip."""
    from_file = is_file(path, "read")
    existing = None if from_file else _existing(Path(path))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="agent-") as scratch:
        try:
            with ExitStack() as stack:
                source: Any = path if existing is None else stack.enter_context(open_regular(existing))
                archive = stack.enter_context(zipfile.ZipFile(source))
                names = set(archive.namelist())
                missing = [entry for entry in _ENTRIES if entry not in names]
                if missing:
                    theirs = "data" in names
                    hint = (
                        "was saved by stable-baselines3 itself"
                        if theirs
                        else "is incomplete or damaged, or something else"
                    )
                    raise CheckpointError(
                        f"{path} has no {', '.join(missing)}. It {hint}. Pass a file that WorldFluxAgent.save wrote."
                    )
                check_stored(archive, source.seek(0, os.SEEK_END))
                for entry in _ENTRIES:  # these names only: a zip may hold any path
                    archive.extract(entry, scratch)
        except CheckpointError:
            raise
        except Exception as error:  # what a damaged zip makes zipfile raise is not a closed list
            raise CheckpointError(
                f"{path} is not a readable file of an agent, but incomplete or damaged ({str(error).rstrip('.')}). "
                "Pass another file that WorldFluxAgent.save wrote, or load an earlier checkpoint of the run."
            ) from error
        description = read_json(Path(scratch) / AGENT_FILE, name=f"{path}: {AGENT_FILE}")
        yield _checked(description, path), Path(scratch)


@contextmanager
def _scratch(target: Path | None) -> Iterator[Path]:
    """A directory to write in, which is removed afterwards.

    It lies beside the target, so that the last move stays inside one file system.
    """
    if target is None:
        with tempfile.TemporaryDirectory(prefix="agent-") as directory:
            yield Path(directory)
        return
    with writing_checkpoint(target), directory_beside(target) as beside:
        yield beside


def _as_text(description: dict[str, Any]) -> str:
    system, _ = get_system_info(print_info=False)
    return json.dumps({"format": FORMAT, "system_info": system, **description}, indent=2)


def _checked(description: Any, path: object) -> dict[str, Any]:
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise CheckpointError(f"{path} has format {found}, this version reads {FORMAT}. Use a newer worldflux.")
    return description


def _with_suffix(path: Path) -> Path:
    return path if path.suffix or not path.name else path.with_name(f"{path.name}.zip")


def _existing(path: Path) -> Path:
    """SB3's rule: the path as it is, else with `.zip` behind it."""
    absolute = checked_path("path", path)
    candidates = [absolute] if absolute.suffix == ".zip" else [absolute, absolute.with_name(f"{absolute.name}.zip")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"There is no file or directory '{path}' (looked for {' and '.join(map(str, candidates))}). Pass a file that "
        "WorldFluxAgent.save wrote, or a directory of checkpoints that AgentCheckpointCallback wrote."
    )


RUN_FILE = "run.json"
_EPISODE_INFO = ("r", "l", "t")
"""What SB3's `Monitor` says of an episode: its return, its length, and when it ended."""


@dataclass(frozen=True)
class RunState:
    """What a run remembers besides its agent and its replay data."""

    collected: int
    """Transitions that the replay buffer has received."""
    episode_infos: list[dict[str, float]]
    """SB3's `ep_info_buffer`: return, length and time of the last episodes."""
    episode_successes: list[float]
    """SB3's `ep_success_buffer`."""
    normalization: dict[str, Any] | None
    """Statistics of the `VecNormalize` around the environments, if there is one."""

    def write(self, directory: Path) -> None:
        """Writes `run.json`."""
        (directory / RUN_FILE).write_text(json.dumps(vars(self)), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> RunState:
        """What `write` wrote.

        Raises:
            CheckpointError: If the file is missing or damaged.
        """
        path = directory / RUN_FILE
        try:
            data = read_json(path, name=RUN_FILE, finite=False)  # statistics of a VecNormalize may be anything
            infos = data["episode_infos"]
            infos = [
                {name: finite_number(name, info[name]) for name in _EPISODE_INFO if name in info} for info in infos
            ]
            return cls(
                collected=whole_number("collected", data["collected"], 0),
                episode_infos=[{**info, "l": int(info["l"])} for info in infos],
                episode_successes=[finite_number("episode_successes", value) for value in data["episode_successes"]],
                normalization=None if data["normalization"] is None else dict(data["normalization"]),
            )
        except FileNotFoundError as error:
            raise damaged(directory, f"no {RUN_FILE}") from error
        except CheckpointError as error:
            raise damaged(directory, str(error).removesuffix(". The file is damaged.")) from error
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise damaged(directory, f"in {RUN_FILE}: {error!r}") from error


def episode_info(info: Mapping[str, Any]) -> dict[str, float]:
    """What is remembered of an episode, as JSON can hold it; `VecMonitor` and others give NumPy's numbers."""
    return {name: float(info[name]) for name in _EPISODE_INFO if name in info}


def normalization_state(normalize: VecNormalize | None) -> dict[str, Any] | None:
    """The running statistics of a `VecNormalize`, as JSON can hold them."""
    if normalize is None:
        return None
    obs = normalize.obs_rms if normalize.norm_obs else {}
    return {
        "obs": {key: _moments(rms) for key, rms in (obs if isinstance(obs, dict) else {"": obs}).items()},
        "returns": _moments(normalize.ret_rms),
    }


def restore_normalization(normalize: VecNormalize | None, state: Mapping[str, Any] | None) -> None:
    """Continues the statistics that `normalization_state` gave.

    Raises:
        ConfigurationError: If only one of the two runs has a `VecNormalize`.
        CheckpointError: If the statistics are of other observations.
    """
    if (normalize is None) != (state is None):
        was, now = ("had a", "has none") if normalize is None else ("had no", "has one")
        raise ConfigurationError(
            f"The run {was} VecNormalize around its environments, and env {now}. Wrap env as it was."
        )
    if normalize is None or state is None:
        return
    obs = normalize.obs_rms if normalize.norm_obs else {}
    try:
        for key, rms in (obs if isinstance(obs, dict) else {"": obs}).items():
            _restore_moments(rms, state["obs"][key])
        _restore_moments(normalize.ret_rms, state["returns"])
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"The statistics of VecNormalize in the checkpoint do not fit env: {error}.") from error


def _moments(rms: RunningMeanStd) -> dict[str, Any]:
    return {"mean": np.asarray(rms.mean).tolist(), "var": np.asarray(rms.var).tolist(), "count": float(rms.count)}


def _restore_moments(rms: RunningMeanStd, state: Mapping[str, Any]) -> None:
    mean, var = np.asarray(state["mean"], np.float64), np.asarray(state["var"], np.float64)
    if mean.shape != np.shape(rms.mean) or var.shape != np.shape(rms.var):
        raise ShapeMismatchError(f"a mean has shape {mean.shape}, expected {np.shape(rms.mean)}")
    count = finite_number("count", state["count"])
    if not np.isfinite(mean).all() or not (np.isfinite(var) & (var >= 0)).all() or count < 0:
        raise ConfigurationError("a mean, a variance or a count is none")
    rms.mean, rms.var, rms.count = mean, var, count


LOOP_COUNTERS = ("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_episode_num")
"""Attributes of an agent that go on counting after loading."""

COUNTERS = (*LOOP_COUNTERS, "_n_updates", "_updates_owed")
"""These and what its `Learner` goes on counting."""


_LATER_SETTINGS = {"compile"}
"""That the first files of this format lack."""

_PLACES = ("buffer_storage", "tensorboard_log")
"""Settings that say where to write. They are those of the machine that an agent was saved on, and no file decides on
where its reader writes."""
_ELSEWHERE = "elsewhere"
"""What a file says of replay data that did not lie in memory."""

MOST_ENVS = 2**20
LARGEST_COUNTER = 2**48
"""No count in a file is that large."""


@dataclass(frozen=True)
class AgentDescription:
    """An agent without its model and optimiser."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    n_envs: int
    settings: AgentSettings
    counters: Mapping[str, int]
    """By the names in `COUNTERS`."""
    progress_remaining: float
    """1 at the beginning of a call of `learn`, 0 at its end."""
    schedule: Mapping[str, int | None]
    """Where `UpdateSchedule` stands."""
    stored_elsewhere: bool
    """Whether the replay data lay on a disk or a device."""

    def to_json(self) -> dict[str, Any]:
        """What `from_json` builds an equal description from."""
        return {
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "n_envs": self.n_envs,
            "settings": {
                **vars(self.settings),
                **dict.fromkeys(_PLACES),
                "learning_rate": rate_to_json(self.settings.learning_rate),
                "buffer_storage": _ELSEWHERE if self.stored_elsewhere else None,
            },
            "counters": dict(self.counters),
            "progress_remaining": self.progress_remaining,
            "schedule": dict(self.schedule),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: object) -> AgentDescription:
        """The description that `to_json` turned into JSON.

        Args:
            data: Its content.
            source: Named in errors.

        Raises:
            CheckpointError: If something is missing, or no agent can have such a value.
        """
        try:
            return cls(
                observation_space=space_from_json(data["observation_space"]),
                action_space=space_from_json(data["action_space"]),
                n_envs=whole_number("n_envs", data["n_envs"], 1, below=MOST_ENVS),
                settings=_settings(data["settings"]),
                counters={
                    name: whole_number(name, data["counters"][name], 0, below=LARGEST_COUNTER) for name in COUNTERS
                },
                progress_remaining=finite_number("progress_remaining", data["progress_remaining"]),
                schedule={
                    "env_steps": _whole_or_none("schedule: env_steps", data["schedule"]["env_steps"]),
                    "handed_out": whole_number(
                        "schedule: handed_out", data["schedule"]["handed_out"], 0, below=LARGEST_COUNTER
                    ),
                },
                stored_elsewhere=data["settings"].get("buffer_storage") not in (None, "memory"),
            )
        except KeyError as error:
            raise CheckpointError(f"{source} is damaged: its agent.json has no {error}.") from error
        except (CheckpointError, ConfigurationError, AttributeError, ArithmeticError, TypeError) as error:
            raise CheckpointError(f"{source} is damaged. In its agent.json: {error}") from error


def _settings(data: Mapping[str, Any]) -> AgentSettings:
    """Settings as they were saved, without places; one that came later than the file takes its default."""
    names = [item.name for item in fields(AgentSettings) if item.name not in _PLACES]
    known = [name for name in names if name in data or name not in _LATER_SETTINGS]
    return AgentSettings(
        **{**{name: data[name] for name in known}, "learning_rate": rate_from_json(data["learning_rate"])}
    )


def _whole_or_none(name: str, value: Any) -> int | None:
    return None if value is None else whole_number(name, value, 0, below=LARGEST_COUNTER)
