"""The files of a saved agent: a directory, or a zip of one. Nothing in them can run code.

| entry | content |
| --- | --- |
| `agent.json` | settings, spaces and counters; the versions that it was saved with |
| `config.json`, `model.safetensors` | the model, as `WorldModel.save_pretrained` writes it |
| `optimizer.pt`, `trainer.json` | the trainer's checkpoint; read without unpickling |
| `run.json`, `replay/` | in a directory only: what is needed to resume the run |
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
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
from worldflux.hub.addresses import is_address
from worldflux.hub.client import RECORD_FILE, model_path
from worldflux.models.base import CONFIG_FILE, WEIGHTS_FILE
from worldflux.reading import check_stored, open_regular, read_json
from worldflux.run_directory import agent_of_run, first_run_in, is_run
from worldflux.training.checkpoint import (
    OPTIMIZER_FILE,
    TRAINER_FILE,
    damaged,
    incomplete_in,
    newest_checkpoint,
    writing_checkpoint,
)
from worldflux.validation import TASK_KEY, finite_number, whole_number

AGENT_FILE = "agent.json"
RUN_FILE = "run.json"
FORMAT = 1
"""Version of `agent.json`; a change that other versions cannot read raises it."""
SHARED = (AGENT_FILE, CONFIG_FILE, WEIGHTS_FILE)
"""What `push_to_hub` shares of an agent; it suffices for acting, and for learning with a new optimiser."""
_ENTRIES = (AGENT_FILE, CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE, TRAINER_FILE)

_NAMELESS = "the file object"
"""Name of a file object in error messages."""

ArchivePath = str | Path | io.BufferedIOBase | IO[bytes]


# --- paths and file objects


def is_file(given: object, to: Literal["read", "write"]) -> TypeGuard[IO[bytes]]:
    """Whether `given` is a file object and not a path.

    Args:
        given: What the user passed.
        to: What the file object has to be open for.

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
            f"The file object {given!r} is a pipe or similar, expected one that can be read from its start. Pass "
            "io.BytesIO(file.read())."
        )
    return True


@contextmanager
def path_to_write(target: ArchivePath) -> Iterator[str | Path]:
    """The path that was given, or that of a scratch file whose content then goes into the file object."""
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
    """The path that was given, or that of a scratch file with the whole content of the file object."""
    if not is_file(source, "read"):
        yield source  # type: ignore[misc]
        return
    with tempfile.TemporaryDirectory(prefix="agent-") as scratch:
        path = Path(scratch) / _NAMELESS
        source.seek(0)
        with path.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield path


# --- zips and directories


def write_archive(path: ArchivePath, write: Callable[[Path], None]) -> None:
    """Writes an agent's directory into a zip, whole or not at all.

    Args:
        path: A path, to which `.zip` is appended if it has no suffix and whose parents are made, or a binary file.
        write: Writes the entries into an empty directory.

    Raises:
        CheckpointError: If the path is a directory, or cannot be written.
        ConfigurationError: If it is neither a path nor a binary file that can be written.
    """
    if not is_file(path, "write"):
        path = _zip_path(path)  # type: ignore[arg-type]
    with path_to_write(path) as given:
        target = Path(given)
        with writing_checkpoint(target), directory_beside(target) as scratch:
            entries, whole = scratch / "entries", scratch / "agent.zip"
            entries.mkdir()
            write(entries)
            with whole.open("wb") as file:
                with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                    for entry in sorted(entries.iterdir()):
                        archive.write(entry, entry.name)
                file.flush()
                os.fsync(file.fileno())  # on the disk before the old file is gone
            os.replace(whole, target)


def _zip_path(given: str | Path) -> Path:
    """Where `write_archive` writes; never a directory."""
    path = checked_path("path", given)
    target = path if path.suffix or not path.name else path.with_name(f"{path.name}.zip")
    if target.is_dir() or os.path.basename(os.fspath(given)) in ("", ".", ".."):
        name = target if target.is_dir() else given
        raise CheckpointError(f"{name} is a directory, expected the path of a file. Add a name, such as agent.zip.")
    return target


@contextmanager
def open_saved(path: ArchivePath, *, resume: bool = False) -> Iterator[tuple[AgentDescription, Path]]:
    """The description of a saved agent, and its directory, which may be gone afterwards.

    Args:
        path: As given to `write_archive`, where `.zip` may be left out; or the directory of a checkpoint, or one that
            holds several, of which the newest is taken; the directory of a run of `worldflux train`; or an address on
            the Hugging Face Hub.
        resume: Whether a run is to go on from it.

    Raises:
        FileNotFoundError: If there is nothing.
        CheckpointError: If it is no agent, or damaged; or there is no run to resume.
        ConfigurationError: If it is neither a path nor a binary file that can be read.
        HubError: If it cannot be downloaded.
    """
    name: Any = _NAMELESS if is_file(path, "read") else path
    with path_to_read(path) as given, tempfile.TemporaryDirectory(prefix="agent-") as scratch:
        holder = model_path("path", given)
        recover_directory(holder)
        if holder.is_dir() and is_run(holder):
            name = given = holder = agent_of_run(holder, newest=resume)
        if is_address(given) or (holder / RECORD_FILE).is_file():
            directory = holder
            _check_shared(directory, name)
            if resume:
                raise _not_resumable(name)
        elif holder.is_dir():
            name = directory = _newest(holder)
            _check_complete(directory, (*_ENTRIES, RUN_FILE) if resume else _ENTRIES)
        else:
            directory = Path(scratch)
            _unpack(_existing(given), directory, name)
            if resume:
                raise _not_resumable(name)
        yield AgentDescription.read(directory, name), directory


def _newest(holder: Path) -> Path:
    """The directory of an agent: `holder` itself, or the newest checkpoint in it."""
    directory = holder if (holder / AGENT_FILE).is_file() else newest_checkpoint(holder, warn=True)
    if directory is not None:
        return directory
    if any((holder / name).is_file() for name in (WEIGHTS_FILE, TRAINER_FILE)):
        return holder  # `_check_complete` says what is missing
    if run := first_run_in(holder):
        raise FileNotFoundError(f"The directory {holder} holds runs. Pass one of the runs in it, such as {run}.")
    incomplete = "; ".join(f"{place.name} is incomplete: {fault}" for place, fault in incomplete_in(holder).items())
    raise FileNotFoundError(
        f"The directory {holder} holds no checkpoint of an agent{incomplete and f' ({incomplete})'}. Pass one that "
        "save_checkpoint wrote, or that holds several of them."
    )


def _not_resumable(name: object) -> CheckpointError:
    return CheckpointError(
        f"{name} holds no replay data, so it cannot be resumed. Leave resume=True out, or pass a directory that "
        "AgentCheckpointCallback wrote."
    )


def _check_shared(directory: Path, name: object) -> None:
    """Raises a `CheckpointError` unless a directory has the files that `push_to_hub` shares of an agent."""
    missing = [file for file in SHARED if not (directory / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{name} is not an agent of worldflux (no {', '.join(missing)}). Pass a repository that push_to_hub wrote; "
            f"of one that holds a model alone, make an agent: WorldFluxAgent({str(name)!r}, env)."
        )


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


def _unpack(path: Path, directory: Path, name: object) -> None:
    """Extracts the entries of an agent's zip, and no others: a zip may hold any path."""
    what = "incomplete or damaged"
    try:
        with open_regular(path) as file:
            if file.read(2) not in (b"PK", b""):
                what = "something else, or damaged"
            with zipfile.ZipFile(file) as archive:
                _check_entries(archive, name)
                check_stored(archive, file.seek(0, os.SEEK_END))
                for entry in _ENTRIES:
                    archive.extract(entry, directory)
    except CheckpointError:
        raise
    except Exception as error:  # what a damaged zip makes zipfile raise is not a closed list
        raise CheckpointError(
            f"{name} is not a readable file of an agent, but {what} ({str(error).rstrip('.')}). "
            "Pass another file that WorldFluxAgent.save wrote, or load an earlier checkpoint of the run."
        ) from error


def _check_entries(archive: zipfile.ZipFile, name: object) -> None:
    names = set(archive.namelist())
    missing = [entry for entry in _ENTRIES if entry not in names]
    if missing:
        hint = "is incomplete or damaged, or something else"
        if "data" in names:
            hint = "was saved by stable-baselines3 itself"
        raise CheckpointError(
            f"{name} has no {', '.join(missing)}. It {hint}. Pass a file that WorldFluxAgent.save wrote."
        )


def _existing(path: str | Path) -> Path:
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


# --- agent.json

LOOP_COUNTERS = ("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_episode_num")
"""Attributes of an agent that go on counting after loading."""

COUNTERS = (*LOOP_COUNTERS, "_n_updates", "_updates_owed")
"""These, and what its `Learner` goes on counting."""

PLACES = ("buffer_storage", "tensorboard_log")
"""Settings that say where to write. No file decides on where its reader writes, nor tells where its writer did."""
_ELSEWHERE = "elsewhere"
"""What a file says of a place that was set."""

MOST_ENVS = 2**20
LARGEST_COUNTER = 2**48
"""No count in a file is that large."""


def _counter(name: str, value: Any) -> int:
    return whole_number(name, value, 0, below=LARGEST_COUNTER)


def _versions() -> dict[str, str]:
    return get_system_info(print_info=False)[0]


@dataclass(frozen=True)
class AgentDescription:
    """An agent without its model and optimiser: the content of `agent.json`."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    n_envs: int
    settings: AgentSettings
    elsewhere: Sequence[str]
    """Those of `PLACES` that were set to another place than memory."""
    counters: Mapping[str, int]
    """Counts by the names in `COUNTERS`."""
    progress_remaining: float
    """Share of the steps of `learn` that remain: 1 at its beginning, 0 at its end."""
    schedule: Mapping[str, int | None]
    """State of the `UpdateSchedule`."""
    system_info: Mapping[str, str] = field(default_factory=_versions)
    """Versions of the software that the agent was saved with."""

    def write(self, directory: Path) -> None:
        """Writes `agent.json`."""
        data = {
            "format": FORMAT,
            "system_info": dict(self.system_info),
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "n_envs": self.n_envs,
            "settings": {
                **vars(self.settings),
                **{name: _ELSEWHERE if name in self.elsewhere else None for name in PLACES},
                "learning_rate": rate_to_json(self.settings.learning_rate),
            },
            "counters": dict(self.counters),
            "progress_remaining": self.progress_remaining,
            "schedule": dict(self.schedule),
        }
        (directory / AGENT_FILE).write_text(json.dumps(data, indent=2), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path, name: object) -> AgentDescription:
        """What `write` wrote, without places.

        Args:
            directory: Where the file is.
            name: What errors call it.

        Raises:
            CheckpointError: If something is missing, or no agent can have such a value.
        """
        data = read_json(directory / AGENT_FILE, name=f"{name}: {AGENT_FILE}")
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise CheckpointError(f"{name} has format {found}, this version reads {FORMAT}. Use a newer worldflux.")
        try:
            settings = {item.name: data["settings"][item.name] for item in fields(AgentSettings)}
            steps = data["schedule"]["env_steps"]
            return cls(
                observation_space=space_from_json(data["observation_space"]),
                action_space=space_from_json(data["action_space"]),
                n_envs=whole_number("n_envs", data["n_envs"], 1, below=MOST_ENVS),
                settings=AgentSettings(
                    **{**settings, **dict.fromkeys(PLACES)}
                    | {"learning_rate": rate_from_json(settings["learning_rate"])}
                ),
                elsewhere=[place for place in PLACES if settings[place] is not None],
                counters={counter: _counter(counter, data["counters"][counter]) for counter in COUNTERS},
                progress_remaining=finite_number("progress_remaining", data["progress_remaining"]),
                schedule={"env_steps": None if steps is None else _counter("schedule: env_steps", steps)},
                system_info={str(key): str(value) for key, value in data["system_info"].items()},
            )
        except KeyError as error:
            raise CheckpointError(f"{name} is damaged: its {AGENT_FILE} has no {error}.") from error
        except (CheckpointError, ConfigurationError, AttributeError, ArithmeticError, TypeError) as error:
            raise CheckpointError(f"{name} is damaged. In its {AGENT_FILE}: {error}") from error


# --- run.json

_EPISODE_INFO = ("r", "l", "t", TASK_KEY)
"""What SB3's `Monitor` says of an episode: its return, its length, and when it ended; and the number of its task."""


@dataclass(frozen=True)
class RunState:
    """What a run remembers besides its agent and its replay data: the content of `run.json`."""

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
    """The part of an episode's info that is kept, as Python's numbers; `VecMonitor` and others give NumPy's."""
    return {name: float(info[name]) for name in _EPISODE_INFO if name in info}


def normalization_state(normalize: VecNormalize | None) -> dict[str, Any] | None:
    """The running statistics of a `VecNormalize`, as JSON can hold them."""
    if normalize is None:
        return None
    return {
        "obs": {key: _moments(rms) for key, rms in _observed(normalize).items()},
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
    try:
        for key, rms in _observed(normalize).items():
            _restore_moments(rms, state["obs"][key])
        _restore_moments(normalize.ret_rms, state["returns"])
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"The statistics of VecNormalize in the checkpoint do not fit env: {error}.") from error


def _observed(normalize: VecNormalize) -> dict[str, RunningMeanStd]:
    """The statistics of each key of the observations; the key is empty where they are one array."""
    obs = normalize.obs_rms if normalize.norm_obs else {}
    return obs if isinstance(obs, dict) else {"": obs}


def _moments(rms: RunningMeanStd) -> dict[str, Any]:
    return {"mean": np.asarray(rms.mean).tolist(), "var": np.asarray(rms.var).tolist(), "count": float(rms.count)}


def _restore_moments(rms: RunningMeanStd, state: Mapping[str, Any]) -> None:
    mean, var = np.asarray(state["mean"], np.float64), np.asarray(state["var"], np.float64)
    if mean.shape != np.shape(rms.mean) or var.shape != np.shape(rms.var):
        raise ShapeMismatchError(f"a mean has shape {mean.shape}, expected {np.shape(rms.mean)}")
    count = finite_number("count", state["count"])
    if not np.isfinite(mean).all() or not (np.isfinite(var) & (var >= 0)).all() or count < 0:
        raise ConfigurationError("a mean is not finite, or a variance or a count is not a finite number from 0")
    rms.mean, rms.var, rms.count = mean, var, count
