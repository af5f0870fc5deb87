"""Where a run saves its checkpoints, and how everything around a training ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from worldflux.errors import ConfigurationError
from worldflux.files import checked_path, remove_directory
from worldflux.locks import using
from worldflux.training.checkpoint import checkpoint_name, checkpoints_in, incomplete_in, run_of
from worldflux.validation import whole_number

logger = logging.getLogger("worldflux.training")


class CheckpointDirectory:
    """A directory for the checkpoints of one run, which no other run uses at the same time.

    Every checkpoint says of which run it is; the name of a run stays when it is resumed. What other runs have saved in
    the directory is not touched.

    Attributes:
        path: The directory, absolute.
        max_checkpoints: How many of the run are kept.
        overwrite: Whether checkpoints of other runs are removed, once this run has saved one.

    Args:
        path: Made when a run begins, if it does not exist.
        max_checkpoints: At least 1.
        overwrite: Likewise.

    Raises:
        ConfigurationError: If the number is below 1, or the path can be none of a directory.
    """

    def __init__(self, path: str | Path, max_checkpoints: int, overwrite: bool) -> None:
        self.path = checked_path("output_dir", path, directory=True)
        self.max_checkpoints = whole_number("max_checkpoints", max_checkpoints, 1)
        self.overwrite = overwrite
        self._held = ExitStack()

    def hold(self) -> None:
        """Keeps other runs away until `release`.

        Raises:
            ConfigurationError: If one is there, or nothing can be written in the directory.
        """
        self.release()
        self._held.enter_context(using(self.path))

    def release(self) -> None:
        """Lets other runs in."""
        self._held.close()

    def check_owner(self, run: str, go_on: str) -> None:
        """Makes sure that the checkpoints in the directory are those of a run.

        Args:
            run: Its name.
            go_on: What to do to go on with the run that is there.

        Raises:
            ConfigurationError: If others are there, and are not to be overwritten; or what is called like a checkpoint
                and is incomplete, over which the run could not save its own.
        """
        if self.overwrite:
            return
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
        """Saves a checkpoint, and removes those that are one too many.

        Args:
            step: Names it.
            run: Whose it is.
            write: Writes it to a path.

        Returns:
            That path.
        """
        path = self.path / checkpoint_name(step)
        if path.is_symlink():  # what a link in there names is not for this run to change
            path.unlink()
        write(path)
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
        return path


def call_all(functions: Iterable[Callable[[], None]]) -> None:
    """Calls all functions that belong to the end of something, whatever one of them raises.

    Where an error is on its way already, it is that one which the caller will see, and theirs are logged; else the
    first of theirs is raised.
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
