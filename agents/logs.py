"""Writing the log."""

from __future__ import annotations

from stable_baselines3.common.logger import HumanOutputFormat, Logger

_INDENT = 3
"""Columns that a table puts before a name."""


def dump_log(logger: Logger, step: int) -> None:
    """Writes what was recorded.

    SB3's tables cut names that are longer than their `max_length`, and raise where two of them become the same.
    Names of losses hold those of the observations, which begin alike in many environments, so tables are made wide
    enough for all of them, whoever made the logger.
    """
    longest = max(map(len, logger.name_to_value), default=0) + _INDENT
    for output in logger.output_formats:
        if isinstance(output, HumanOutputFormat):
            output.max_length = max(output.max_length, longest)
    logger.dump(step)
