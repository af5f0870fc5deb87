"""Data sets of Minari: by id, by path, or as an object."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from worldflux.datasets.columns import Hdf5Columns, hdf5_entry, hdf5_group, imported, open_hdf5
from worldflux.datasets.formats.videos import decoded_image
from worldflux.datasets.recording import Arrays, Block, ObsChoice, Recording, chosen_obs
from worldflux.diagnostics.plots.frames import import_cv2
from worldflux.errors import BufferError
from worldflux.reading import read_json
from worldflux.validation import SINGLE_KEY


def open_source(source: Any, *, obs: ObsChoice = None, download: bool = False) -> Recording:
    """Opens a data set of Minari, with the last observation of each episode.

    Args:
        source: Its id, such as "D4RL/pendulum/human-v2"; the path of its directory; or a `MinariDataset`.
        obs: Names of the observations that are read, where they are a dictionary; parts of an inner dictionary are
            "outer/inner". None: all of them that are numbers.
        download: Whether to download a data set that is not on this machine.

    Raises:
        FileNotFoundError: If it is not on this machine.
        BufferError: If it does not name its spaces: they would have to be asked of an environment that it names, whose
            code would run.
    """
    minari = imported("minari", "minari", "Reading a data set of Minari")
    imported("h5py", "minari", "Reading a data set of Minari")
    storage_of = imported("minari.dataset.minari_storage", "minari", "Reading a data set of Minari").MinariStorage
    if isinstance(source, str | Path):
        directory = _directory(minari, source, download)
        metadata = read_json(
            directory / "metadata.json", name=f"{source}: metadata.json", error=BufferError, finite=False
        )
        missing = {"observation_space", "action_space"} - set(metadata)
        if missing:
            raise BufferError(
                f"{source} does not name its {' and '.join(sorted(missing))}. Minari would ask the environment that it "
                "names, which runs code. Load it with minari.load_dataset if you trust it, and pass the MinariDataset."
            )
        storage, name = storage_of.read(directory), str(source)
    else:
        storage, name = source.storage, "the MinariDataset"
    indices = getattr(source, "episode_indices", None)
    numbers = [int(one) for one in (range(storage.total_episodes) if indices is None else indices)]
    parts = dict(_leaves(storage.observation_space))
    wanted, is_dict = chosen_obs(name, parts, obs)
    is_dict = is_dict or (obs is None and isinstance(storage.observation_space, spaces.Dict))
    if is_dict and SINGLE_KEY in wanted and wanted[SINGLE_KEY] != SINGLE_KEY:
        wanted = {source_name: source_name for source_name in wanted.values()}
    chosen: dict[str, spaces.Space[Any]] = {key: parts[one] for key, one in wanted.items()}
    action_space = storage.action_space

    def blocks() -> Iterator[Block]:
        if storage.FORMAT == "hdf5":
            yield from _hdf5_blocks(name, storage, numbers, {key: (one, parts[one]) for key, one in wanted.items()})
            return
        for episode in storage.get_episodes(numbers):
            found = {key: _part(episode["observations"], one) for key, one in wanted.items()}
            yield _block(f"{name}, episode {episode['id']}", found, episode)

    steps = int(storage.total_steps)
    if indices is not None:
        steps = sum(int(one["total_steps"]) for one in storage.get_episode_metadata(numbers))
    return Recording(
        name,
        spaces.Dict(chosen) if is_dict else chosen[SINGLE_KEY],
        tuple(action_space.shape or ()),
        np.dtype(action_space.dtype),
        steps,
        len(numbers),
        blocks,
        action_space=action_space,
    )


def _directory(minari: Any, source: str | Path, download: bool) -> Path:
    """The directory with the data of a data set."""
    path = Path(source)
    local = imported("minari.storage.datasets_root_dir", "minari", "Reading a data set of Minari")
    for directory in (path, path / "data"):
        if (directory / "metadata.json").is_file():
            return directory
    if path.exists():
        raise BufferError(f"{path} is no data set of Minari: it has no data/metadata.json.")
    directory = local.get_dataset_path(str(source)) / "data"
    if not directory.is_dir():
        if not download:
            raise FileNotFoundError(
                f"There is no file '{source}', and no data set of Minari of this name at {directory.parent}. Pass "
                "download=True to download it."
            )
        minari.download_dataset(str(source))
    return directory


def _leaves(space: spaces.Space[Any], prefix: str = "") -> Iterator[tuple[str, spaces.Space[Any]]]:
    """The spaces of numbers in nested dictionaries and tuples, by their paths."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        inner = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for key, part in inner:
            yield from _leaves(part, f"{prefix}{key}/")
    elif not isinstance(space, spaces.Text):
        yield prefix[:-1] or SINGLE_KEY, space


def _part(observations: Any, path: str) -> np.ndarray:
    """The array at a path of nested dictionaries and tuples."""
    for key in path.split("/"):
        if isinstance(observations, Mapping):
            observations = observations[key]
        elif isinstance(observations, tuple):
            observations = observations[int(key)]
    return np.asarray(observations)


def _hdf5_blocks(
    name: str, storage: Any, numbers: list[int], wanted: Mapping[str, tuple[str, spaces.Space[Any]]]
) -> Iterator[Block]:
    """The steps of a data set in HDF5, of which nothing is read but what is wanted. Minari reads all infos as well."""
    is_image = imported("minari.dataset.minari_storage", "minari", "Reading a data set of Minari").is_image_space
    with open_hdf5(storage.data_path / "main_data.hdf5") as file:
        for number in numbers:
            episode = hdf5_group(file, f"episode_{number}")
            if episode is None:
                raise BufferError(f"{name} has no episode {number}: its file is damaged.")
            group = Hdf5Columns(episode)
            found = {}
            for key, (path, space) in wanted.items():
                inner = "/".join(f"_index_{part}" if part.isdigit() else part for part in path.split("/"))
                at = "observations" if path == SINGLE_KEY else f"observations/{inner}"
                if storage.jpeg_encoding and is_image(space):
                    found[key] = _decoded(_jpegs(episode, at), space.shape or ())
                else:
                    found[key] = np.asarray(group[at][:])
            rest = {key: group[key][:] for key in ("actions", "rewards", "terminations", "truncations")}
            yield _block(f"{name}, episode {number}", found, rest)


def _jpegs(episode: Any, path: str) -> Any:
    """The array of compressed images at a path. `[T+1]`"""
    rows = hdf5_entry(episode, path)
    if rows is None or not hasattr(rows, "dtype"):
        raise BufferError(f"{episode.name} has no array '{path}'. Links are not followed.")
    return rows


def _decoded(rows: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Images that are compressed one by one. `[T+1, *shape]`"""
    flags, pixels = import_cv2().IMREAD_UNCHANGED, math.prod(sorted(shape)[-2:])
    found = np.empty((len(rows), *shape), np.uint8)
    for number, row in enumerate(rows[:]):
        image = decoded_image(rows.name, np.asarray(row, np.uint8).tobytes(), pixels, flags)
        if image.size != found[number].size:
            raise BufferError(f"{rows.name} has an image of {image.shape}, expected {shape}.")
        found[number] = image.reshape(shape)
    return found


def _block(name: str, obs: Arrays, episode: Mapping[str, Any]) -> Block:
    actions = np.asarray(episode["actions"])
    terminated, truncated = (np.asarray(episode[key]) != 0 for key in ("terminations", "truncations"))
    count = len(actions)
    lengths = {len(array) for array in obs.values()}
    if lengths != {count + 1} or not len(episode["rewards"]) == len(terminated) == len(truncated) == count:
        raise BufferError(
            f"{name} has {count} actions, {len(episode['rewards'])} rewards, {len(terminated)} flags and "
            f"{max(lengths)} observations, expected as many of each, and one more observation."
        )
    truncated = truncated & ~terminated
    if count:
        truncated[-1] |= not terminated[-1]
    ends = int(np.count_nonzero(terminated | truncated))
    return Block(
        {key: array[:-1] for key, array in obs.items()},
        actions,
        np.asarray(episode["rewards"]),
        terminated,
        truncated,
        {key: np.repeat(array[-1:], ends, axis=0) for key, array in obs.items()},
        np.arange(ends) == ends - 1,
    )
