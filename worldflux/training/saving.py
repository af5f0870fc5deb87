"""The directory in which a run saves its checkpoints, and how everything around a training ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from worldflux.accel import ranks
from worldflux.errors import ConfigurationError
from worldflux.files import checked_path, remove_directory
from worldflux.locks import using
from worldflux.training.checkpoint import checkpoint_name, checkpoints_in, incomplete_in, run_of
from worldflux.validation import whole_number

logger = logging.getLogger("worldflux.training")


class CheckpointDirectory:
    """A directory for the checkpoints of one run, which no other run uses at the same time.

    Every checkpoint names its run; a run keeps its name when it is resumed. Checkpoints of other runs are not touched.

    Attributes:
        path: Absolute path of the directory.
        max_checkpoints: Number of checkpoints of the run to keep.
        overwrite: Whether checkpoints of other runs are removed once this run has saved one.

    Args:
        path: The directory, which is created when a run begins.
        max_checkpoints: Number of checkpoints to keep, at least 1.
        overwrite: Whether to remove checkpoints of other runs.

    Raises:
        ConfigurationError: If the number is below 1, or the path cannot be that of a directory.
    """

    def __init__(self, path: str | Path, max_checkpoints: int, overwrite: bool) -> None:
        self.path = checked_path("output_dir", path, directory=True)
        self.max_checkpoints = whole_number("max_checkpoints", max_checkpoints, 1)
        self.overwrite = overwrite
        self._held = ExitStack()

    def hold(self) -> None:
        """Reserves the directory for this run until `release`.

        Raises:
            ConfigurationError: If another run uses it, or it cannot be written to.
        """
        self.release()
        ranks.on_first(partial(self._held.enter_context, using(self.path)))

    def release(self) -> None:
        """Lets other runs use the directory."""
        self._held.close()

    def check_owner(self, run: str, go_on: str) -> None:
        """Checks that the checkpoints in the directory are those of a run.

        Args:
            run: Name of the run.
            go_on: Advice, for the error message, on how to continue the run that is there.

        Raises:
            ConfigurationError: If there are checkpoints of other runs that are not to be overwritten, or an incomplete
                one that the run could not replace with its own.
        """
        if not self.overwrite:
            ranks.on_first(partial(self._check_owner, run, go_on))

    def _check_owner(self, run: str, go_on: str) -> None:
        found = checkpoints_in(self.path)
        others = [checkpoint for checkpoint in found if run_of(checkpoint) != run]
        if others:
            raise ConfigurationError(
                f"{self.path} holds checkpoints of another run, the newest {others[-1].name}. To go on with that run, "
                f"{go_on}. For a new run choose another output_dir, or pass overwrite=True to the callback, which "
                "removes them once the new run has saved a checkpoint."
            )
        goes_on = f"this run goes on from {found[-1].name}" if found else "no checkpoint of this run is there yet"
        for path, fault in incomplete_in(self.path).items():
            if any(path.iterdir()):
                raise ConfigurationError(
                    f"{path} is not a complete checkpoint ({fault}). Remove or move it; {goes_on}."
                )

    def save(self, step: int, run: str, write: Callable[[Path], None]) -> Path:
        """Saves a checkpoint and removes outdated ones.

        Args:
            step: Step that the checkpoint is named after.
            run: Name of the run.
            write: Function that writes the checkpoint to a path.

        Returns:
            The path of the checkpoint.
        """
        path = self.path / checkpoint_name(step)
        if ranks.is_first() and path.is_symlink():  # the target of a link is not for this run to change
            path.unlink()
        write(path)
        if ranks.is_first():
            self._remove_outdated(run)
        return path

    def _remove_outdated(self, run: str) -> None:
        """Removes the oldest checkpoints of the run, and those of other runs if they are overwritten."""
        mine = []
        for checkpoint in checkpoints_in(self.path):
            if run_of(checkpoint) == run:
                mine.append(checkpoint)
            elif self.overwrite:
                remove_directory(checkpoint)
        for incomplete in incomplete_in(self.path) if self.overwrite else ():
            remove_directory(incomplete)
        for outdated in mine[: -self.max_checkpoints]:
            remove_directory(outdated)


def call_all(functions: Iterable[Callable[[], None]]) -> None:
    """Calls all functions that belong to the end of something, even if one of them raises an error.

    If an error is being handled already, the caller will see that one, and errors of the functions are logged.
    Otherwise the first of their errors is raised and the others are logged.
    """
    first = sys.exc_info()[1]
    raised: BaseException | None = None
    for function in functions:
        try:
            function()
        except BaseException as error:
            if isinstance(error, Exception) and (first or raised) is not None:
                logger.error("Another error came while the training ended: %s: %s", type(error).__name__, error)
            else:
                raised = error
    if raised is not None:
        raise raised
