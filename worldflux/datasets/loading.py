"""Reading data sets of any known format into a replay buffer."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from worldflux.datasets.detection import detect
from worldflux.datasets.filling import ActionForm, filled_buffer
from worldflux.datasets.images import with_resized_images
from worldflux.datasets.options import check_options, check_source
from worldflux.datasets.recording import Recording
from worldflux.envs.wrappers import Size, checked_size
from worldflux.errors import BufferError, ConfigurationError
from worldflux.hub.addresses import is_address
from worldflux.hub.client import dataset_path
from worldflux.reading import only_our_errors
from worldflux.replay.backends import StoragePlace
from worldflux.replay.buffer import ReplayBuffer
from worldflux.validation import check_choice, check_flag

_READERS = {
    "minari": "minari:open_source",
    "lerobot": "lerobot:open_source",
    "d4rl": "d4rl:open_source",
    "ogbench": "d4rl:open_ogbench",
    "dreamerv3": "dreamer:open_chunks",
    "dreamerv3-torch": "dreamer:open_episodes",
    "tdmpc2": "tdmpc2:open_source",
    "robomimic": "robomimic:open_source",
    "sb3": "sb3:open_source",
    "arrays": "arrays:open_source",
}
"""Module and function that open a source of each format but worldflux's own; their keywords are its options."""

FORMATS: tuple[str, ...] = ("worldflux", *_READERS)
"""The formats that `load` reads."""


def load(
    source: Any,
    *,
    format: str = "auto",
    capacity: int | None = None,
    extras: Mapping[str, tuple[tuple[int, ...], Any]] | None = None,
    seed: int | None = None,
    storage: StoragePlace = None,
    action_type: str | None = None,
    action_classes: Sequence[int] | None = None,
    action_low: Any = None,
    action_high: Any = None,
    clip_actions: bool = False,
    image_size: Size | None = None,
    progress: bool | None = None,
    **options: Any,
) -> ReplayBuffer:
    """Reads a data set into a replay buffer, in which each action stands beside what it earned.

    Observations and actions take the form in which an agent would store them: numbers are float32 vectors, images
    uint8 with their channels first, discrete actions one-hot, and continuous ones in [-1, 1]. What a source cannot
    tell, such as whether episodes terminated or were cut, is logged as a warning that names the option for it.

    No source can run code: pickles are refused. A few megabytes of the source are in memory at a time.

    Args:
        source: Path of a file or directory, id of a Minari data set, replay buffer of SB3, arrays in memory, or the
            address of a data set on the Hugging Face Hub, `hf://datasets/user/name`, of which only files that cannot
            run code are downloaded.
        format: One of `FORMATS`; "auto" tells it from the content.
        capacity: Transitions that the buffer keeps at most; None: all that the source has.
        extras: As for `ReplayBuffer`.
        seed: Seed of the buffer's sampler.
        storage: As for `ReplayBuffer`: a directory for data larger than memory.
        action_type: Kind of the actions, as for `ReplayBuffer`, where the source does not say it.
        action_classes: Numbers of choices of discrete actions that are stored as whole numbers or one-hots: `(n,)`.
        action_low: With `action_high`, the bounds of continuous actions in the environment's units, a number or one
            for each entry. They take precedence over a space that the source names. `[A]`
        action_high: See `action_low`. `[A]`
        clip_actions: Whether actions beyond the bounds become the nearest ones inside; otherwise they are an error.
            Actions beyond those of a space that the source names are always clipped, as environments do.
        image_size: Height and width to which all images are resized, or one number for both.
        progress: Whether to show a bar on stderr; None: if it is a terminal.
        options: Options of the format, which are documented with each format on the page "Your data".

    Returns:
        The buffer, with all episodes complete.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        ConfigurationError: If there is no such format or option, an option has a value that it cannot have, or one is
            missing.
        BufferError: If the source is damaged, holds NaN or infinite numbers, or cannot be read without running code; or
            if the machine has no room for it.
        ShapeMismatchError: If arrays of the source do not fit each other.
        MissingDependencyError: If a package that reads the format is not installed.
    """
    check_choice("format", format, ("auto", *FORMATS))
    check_flag("clip_actions", clip_actions)
    if progress is not None:
        check_flag("progress", progress)
    image_size = None if image_size is None else checked_size(image_size, "image_size")
    name = source_name(source)
    if is_address(source):
        source = dataset_path("source", source)
    chosen = detect(source) if format == "auto" else format
    check_source(source, chosen)
    options = {option: value for option, value in options.items() if value is not None}
    if chosen == "worldflux":
        check_options(chosen, options, ("n_envs", "sharded"))
        if clip_actions or image_size is not None:
            raise ConfigurationError("clip_actions and image_size are for other formats than 'worldflux'.")
        return ReplayBuffer.load(
            source,
            capacity=capacity,
            extras=extras,
            seed=seed,
            storage=storage,
            action_type=action_type,
            action_classes=action_classes,
            action_low=action_low,
            action_high=action_high,
            **options,
        )
    module, _, function = _READERS[chosen].partition(":")
    reader = getattr(importlib.import_module(f"worldflux.datasets.formats.{module}"), function)
    check_options(chosen, options, list(inspect.signature(reader).parameters)[1:])
    with only_our_errors(name, BufferError):
        recording: Recording = reader(source, **options)
        try:
            form = ActionForm(recording, action_type, action_classes, action_low, action_high, clip_actions)
            if image_size is not None:
                recording = with_resized_images(recording, image_size)
            return filled_buffer(
                recording,
                form,
                capacity=capacity,
                extras=extras,
                seed=seed,
                storage=storage,
                progress=progress,
            )
        finally:
            recording.close()


def source_name(source: Any) -> str:
    """What a source is called in messages."""
    if isinstance(source, str | Path):
        return Path(source).name or str(source)
    return f"the {type(source).__name__}"
