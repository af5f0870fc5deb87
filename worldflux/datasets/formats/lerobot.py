"""Data sets of LeRobot, versions 2 and 3: Parquet files, with images in them or in videos beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from worldflux.datasets.columns import Column, imported
from worldflux.datasets.flat import Alignment, flat_recording
from worldflux.datasets.formats.videos import PictureColumn, Place, VideoColumn
from worldflux.datasets.recording import ObsChoice, Recording, chosen_obs
from worldflux.errors import BufferError, ConfigurationError
from worldflux.reading import open_regular, read_json
from worldflux.replay.spec import checked

_PREFIX = "observation."
_REWARD = "next.reward"
_BATCH_ROWS = 256
_BUFFER_BYTES = 2**20
_BOOL = np.dtype(np.bool_)
_NUMBERS = ("float", "int", "uint", "bool")


def open_source(
    source: Any,
    *,
    obs: ObsChoice = None,
    action: str = "action",
    reward: str = _REWARD,
    ends: str | None = None,
    action_bounds: str | None = None,
) -> Recording:
    """Opens the directory of a data set of LeRobot. The observation after an episode's last step is never recorded.

    Args:
        source: The directory, which has `meta/info.json`.
        obs: Names of the observations that are read, such as "observation.state"; None: all of them. Dictionaries have
            the names without "observation.".
        action: Name of the actions.
        reward: Name of the rewards.
        ends: What the end of an episode is: "truncation" (None), or "termination" where `next.done` says so, or
            everywhere if there is no `next.done`.
        action_bounds: "stats" takes the smallest and largest recorded actions for the bounds of the action space.
    """
    path = Path(source)
    info = read_json(path / "meta" / "info.json", error=BufferError, finite=False)
    features = info.get("features") if isinstance(info, dict) else None
    if not isinstance(features, dict):
        raise BufferError(f"{path.name}: meta/info.json has no features, as data sets of LeRobot have.")
    files = _Files(path)
    observed = [name for name, one in features.items() if name.startswith("observation") and _is_readable(one)]
    wanted, is_dict = chosen_obs(path.name, observed, _full_names(obs, observed))
    if is_dict and not isinstance(obs, Mapping):
        wanted = {key.removeprefix(_PREFIX): name for key, name in wanted.items()}
    if action not in files.names:
        raise ConfigurationError(f"{path.name} has no '{action}'. It has {', '.join(sorted(files.names))}.")
    columns: dict[str, Column] = {"actions": _Numbers(files, action)}
    notes: list[str] = []
    for key, name in wanted.items():
        kind = features[name].get("dtype")
        if kind == "video":
            place = _Videos(path, name, info, files).place
            columns[f"obs/{key}"] = VideoColumn(place, files.count, _pixels(path, name, features), notes)
        elif kind == "image":
            take = partial(files.take, name)
            columns[f"obs/{key}"] = PictureColumn(path.name, take, files.count, _pixels(path, name, features))
        else:
            columns[f"obs/{key}"] = _Numbers(files, name)
    if reward in files.names:
        columns["rewards"] = _Numbers(files, reward)
    elif reward != _REWARD:
        raise ConfigurationError(f"{path.name} has no '{reward}'. It has {', '.join(sorted(files.names))}.")
    else:
        notes.append(f"it has no '{reward}': rewards are stored as zeros. Pass reward= if they have another name.")
    episode = files.indices("episode_index")
    last = np.append(episode[1:] != episode[:-1], True)
    columns["is_last"] = last
    if ends == "termination":
        done: Any = True
        if "next.done" in files.names:
            done = checked(f"{path.name}: next.done", files.whole("next.done").reshape(-1), (files.count,), _BOOL)
        columns["terminations"] = last & done
    elif ends is None:
        notes.append(
            "it does not tell terminations from time limits: all episodes count as truncated. Pass ends='termination' "
            "if they end where their tasks do, or ends='truncation' to confirm."
        )
    return flat_recording(
        path.name,
        columns,
        is_dict,
        Alignment(),
        action_space=None if action_bounds is None else _bounds(path, action, columns["actions"]),
        notes=notes,
    )


def _pixels(path: Path, name: str, features: Mapping[str, Any]) -> int | None:
    """Number of pixels of each image of a camera, which `meta/info.json` says as `[H, W, C]` or `[C, H, W]`."""
    shape = features[name].get("shape")
    if shape is None:
        return None
    if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(type(n) is int and n > 0 for n in shape):
        raise BufferError(f"{path.name}: meta/info.json has the shape {shape} for '{name}', expected that of images.")
    return math.prod(sorted(shape)[-2:])


def _is_readable(feature: Any) -> bool:
    kind = feature.get("dtype") if isinstance(feature, dict) else None
    is_depth = isinstance(kind, str) and bool((feature.get("info") or {}).get("video.is_depth_map"))
    return isinstance(kind, str) and (kind in ("video", "image") or kind.startswith(_NUMBERS)) and not is_depth


def _full_names(obs: ObsChoice, names: list[str]) -> ObsChoice:
    """The choice in the names of the data set, where the user left "observation." out."""

    def full(name: str) -> str:
        return _PREFIX + name if name not in names and _PREFIX + name in names else name

    if obs is None:
        return None
    if isinstance(obs, str):
        return full(obs)
    return {key: full(name) for key, name in obs.items()} if isinstance(obs, Mapping) else [full(name) for name in obs]


class _Reader:
    """Rows of one column, read in ascending order.

    Attributes:
        begin: The first row that can still be taken.

    Args:
        batches: The rows, as arrays of pyarrow.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self.begin, self._batches = 0, batches
        self._batch: Any = None

    def take(self, part: slice) -> Iterator[Any]:
        """Some rows, in parts."""
        at = part.start
        while at < part.stop:
            size = 0 if self._batch is None else len(self._batch)
            if at >= self.begin + size:
                self.begin, self._batch = self.begin + size, next(self._batches)
                continue
            until = min(part.stop, self.begin + size)
            yield self._batch.slice(at - self.begin, until - at)
            at = until


class _Files:
    """The Parquet files of a data set, in their order.

    Attributes:
        names: Names of the columns.
        count: Rows of all files.
    """

    def __init__(self, path: Path) -> None:
        self._parquet = imported("pyarrow.parquet", "lerobot", "Reading a data set of LeRobot")
        self._name, self._paths = path.name, sorted((path / "data").glob("*/*.parquet"))
        if not self._paths:
            raise BufferError(f"{path.name} has no Parquet files in data/. Download the whole data set.")
        files = [self._opened(one) for one in self._paths]
        self.names = set(files[0].schema_arrow.names)
        self.count = sum(int(file.metadata.num_rows) for file in files)
        self._readers: dict[str, _Reader] = {}  # of each column

    def _opened(self, path: Path) -> Any:
        try:
            open_regular(path).close()
            return self._parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES)
        except (OSError, ValueError) as error:  # errors of pyarrow are ValueErrors
            raise BufferError(f"{path.name} is not a readable Parquet file: {error}") from error

    def take(self, name: str, part: slice) -> Iterator[Any]:
        """Some rows of a column, as arrays of pyarrow. They are read in batches, in ascending order."""
        if name not in self._readers or part.start < self._readers[name].begin:
            self._readers[name] = _Reader(self._batches(name))
        yield from self._readers[name].take(part)

    def _batches(self, name: str) -> Iterator[Any]:
        for path in self._paths:
            file = self._opened(path)
            if name not in file.schema_arrow.names:
                raise BufferError(f"{path.name} has no column '{name}'.")
            try:
                for batch in file.iter_batches(_BATCH_ROWS, columns=[name], use_threads=False):
                    yield batch.column(0)
            except (OSError, ValueError) as error:
                raise BufferError(f"{path.name}: '{name}' cannot be read: {error}") from error

    def whole(self, name: str) -> np.ndarray:
        """All rows of a column of numbers. `[N, ...]`"""
        return np.concatenate([_as_numbers(name, one) for one in self.take(name, slice(0, self.count))])

    def indices(self, name: str) -> np.ndarray:
        """All rows of a column of whole numbers from 0. `[N]`

        Raises:
            BufferError: If it has others: NaN or text in a column of episodes would make an episode of each row.
        """
        found = self.whole(name).reshape(self.count, -1)[:, 0]
        is_number = found.dtype.kind in "iuf"
        wrong = np.flatnonzero(~((found >= 0) & (found == np.rint(found)))) if is_number else np.arange(1)
        if len(wrong):
            raise BufferError(
                f"{self._name}: '{name}' is {found[wrong[0]]!r} in row {wrong[0]}, expected whole numbers from 0."
            )
        return found.astype(np.int64)


def _as_numbers(name: str, rows: Any) -> np.ndarray:
    """Rows of numbers, or of nested lists of them, flattened to vectors. `[N]` or `[N, M]`"""
    count = len(rows)
    is_list = False
    while hasattr(rows, "flatten") and hasattr(rows.type, "value_type"):
        if hasattr(rows, "value_lengths") and len(rows.value_lengths().drop_null().unique()) > 1:
            raise BufferError(f"'{name}' has rows of different lengths.")
        rows, is_list = rows.flatten(), True
    if rows.null_count:
        raise BufferError(f"'{name}' has {rows.null_count} rows without a value.")
    numbers = rows.to_numpy(zero_copy_only=False)
    if not is_list:
        return numbers
    return numbers.reshape(count, len(numbers) // max(count, 1))


class _Numbers:
    """A column of numbers."""

    def __init__(self, files: _Files, name: str) -> None:
        self._files, self._name = files, name
        first = self[0:1]
        self.shape, self.dtype = (files.count, *first.shape[1:]), first.dtype

    def __getitem__(self, part: slice) -> np.ndarray:
        part = slice(part.start or 0, self._files.count if part.stop is None else part.stop)
        return np.concatenate([_as_numbers(self._name, one) for one in self._files.take(self._name, part)])


class _Videos:
    """The videos of one camera: which frame of which file belongs to a row."""

    def __init__(self, path: Path, name: str, info: Mapping[str, Any], files: _Files) -> None:
        if "/" in name or "\\" in name or name.startswith("."):
            raise BufferError(f"{path.name} has a camera {name!r}, expected a name without slashes.")
        self._path, self._name = path, name
        self._episode, self._frame = files.indices("episode_index"), files.indices("frame_index")
        self._starts: dict[int, tuple[int, int, int]] = {}  # in version 3: chunk, file and first frame of an episode
        size = info.get("chunks_size", 1000)
        self._size = size if type(size) is int and size > 0 else 1000
        tables = sorted((path / "meta" / "episodes").glob("*/*.parquet"))
        if tables:
            self._read_starts(tables, info.get("fps"))

    def _read_starts(self, tables: list[Path], fps: Any) -> None:
        if type(fps) not in (int, float) or not 0 < fps < 1e6:
            raise BufferError(f"{self._path.name}: meta/info.json has fps {fps!r}, expected a number above 0.")
        parquet = imported("pyarrow.parquet", "lerobot", "Reading a data set of LeRobot")
        places = ("chunk_index", "file_index", "from_timestamp")
        names = ["episode_index", *(f"videos/{self._name}/{one}" for one in places)]
        for one in tables:
            try:
                table = parquet.read_table(one, columns=names)
                columns = [table.column(name).to_numpy() for name in names]
                for episode, chunk, file, start in zip(*columns, strict=True):
                    first = round(float(start) * fps)
                    if first < 0:
                        raise ValueError(f"episode {episode} starts at {start} seconds")
                    self._starts[int(episode)] = int(chunk), int(file), first
            except (KeyError, OSError, OverflowError, TypeError, ValueError) as error:
                raise BufferError(f"{one.name} does not say where the frames of '{self._name}' are: {error}") from error

    def place(self, row: int) -> Place:
        """File and number of the frame of a row."""
        episode, frame = int(self._episode[row]), int(self._frame[row])
        if not self._starts:
            folder = self._path / "videos" / f"chunk-{episode // self._size:03d}" / self._name
            return folder / f"episode_{episode:06d}.mp4", frame
        if episode not in self._starts:
            raise BufferError(f"{self._path.name}: meta/episodes does not list episode {episode}.")
        chunk, file, start = self._starts[episode]
        folder = self._path / "videos" / self._name / f"chunk-{chunk:03d}"
        return folder / f"file-{file:03d}.mp4", start + frame


def _bounds(path: Path, action: str, column: Column) -> spaces.Box:
    """The smallest and largest recorded actions, as a space."""
    whole = path / "meta" / "stats.json"
    where = "meta/stats.json" if whole.is_file() else "meta/episodes_stats.jsonl"
    try:
        if whole.is_file():
            stats = [read_json(whole, error=BufferError, finite=False)[action]]
        else:
            import json

            with open_regular(path / where) as file:
                stats = [json.loads(line)["stats"][action] for line in file]
        low, high = (np.asarray([one[end] for one in stats], np.float32) for end in ("min", "max"))
        low, high = low.reshape(len(stats), -1).min(0), high.reshape(len(stats), -1).max(0)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise BufferError(
            f"{path.name} has no minimum and maximum of '{action}' in meta/stats.json or meta/episodes_stats.jsonl, "
            "which action_bounds='stats' takes. Pass action_low and action_high."
        ) from error
    width = math.prod(column.shape[1:])
    if low.size != width or high.size != width or not np.isfinite([low, high]).all() or not (low <= high).all():
        raise BufferError(
            f"{path.name}: {where} has {low.tolist()} and {high.tolist()} for the minimum and maximum of '{action}', "
            f"which action_bounds='stats' takes: expected {width} finite numbers each. Pass action_low and action_high."
        )
    return spaces.Box(low, high, dtype=np.float32)
