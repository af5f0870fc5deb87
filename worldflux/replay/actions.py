"""Kinds of actions: which values an action vector may have, checks of them, and the kind that values look like."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from worldflux.errors import BufferError, ConfigurationError
from worldflux.validation import clean_sizes

Classes = tuple[int, ...]
"""Sizes of the one-hots that an action vector is made of; none for continuous actions."""

ROUNDING = 1e-4
"""Distance beyond [-1, 1] at which a continuous action still counts as 1."""

_TYPES = ("continuous", "discrete", "multi_discrete")


def declared_classes(action_type: str | None, action_classes: Sequence[int] | None, action_dim: int) -> Classes | None:
    """The kind of actions that is named as in a model's configuration; None if none is.

    Raises:
        ConfigurationError: If the two do not agree with each other or with `action_dim`.
    """
    if action_type not in (None, *_TYPES):
        raise ConfigurationError(f"action_type is {action_type!r}, expected one of {', '.join(_TYPES)}, or None.")
    if action_type is None and action_classes is None:
        return None
    classes = clean_sizes("action_classes", () if action_classes is None else action_classes)
    if not classes and action_type == "discrete":
        classes = (action_dim,)
    fits = {
        "continuous": not classes,
        "discrete": classes == (action_dim,),
        "multi_discrete": sum(classes) == action_dim,
        None: not classes or sum(classes) == action_dim,
    }
    if not fits[action_type]:
        raise ConfigurationError(
            f"action_type is {action_type!r} and action_classes is {classes}, which do not fit action_dim "
            f"{action_dim}. MultiDiscrete([3, 2]) has action_classes=(3, 2), action_dim=5; continuous ones have none."
        )
    return classes


def type_of(classes: Classes) -> str:
    """The name of a kind."""
    return ("continuous", "discrete", "multi_discrete")[min(len(classes), 2)]


def described(classes: Classes) -> str:
    """A kind of actions as it is written in a model's configuration."""
    return f"action_type={type_of(classes)!r}" + (f", action_classes={classes}" if len(classes) > 1 else "")


def rescaled(actions: Any, low: Any, high: Any) -> Any:
    """Actions between `low` and `high` (numbers, or one for each entry) rescaled to [-1, 1]. `[..., A]`

    Raises:
        ConfigurationError: If only one bound is given, or they are no bounds.
        BufferError: If an action is beyond them.
    """
    if low is None and high is None:
        return actions
    if low is None or high is None:
        present, missing = ("action_low", "action_high") if high is None else ("action_high", "action_low")
        raise ConfigurationError(f"{present} is given without {missing}. Pass both.")
    wrong = f"action_low is {low} and action_high is {high}, expected a number each, or one for each action entry."
    try:
        lowest, highest = np.asarray(low, np.float64), np.asarray(high, np.float64)
        with np.errstate(all="ignore"):  # the bounds are checked next
            result = (np.asarray(actions, np.float64) - lowest) * (2.0 / (highest - lowest)) - 1.0
    except (TypeError, ValueError) as error:
        raise ConfigurationError(wrong) from error
    if result.shape != np.shape(actions):
        raise ConfigurationError(f"{wrong} Actions have shape {np.shape(actions)}.")
    if not (np.isfinite(lowest).all() and np.isfinite(highest).all() and (lowest < highest).all()):
        raise ConfigurationError(
            f"action_low is {low} and action_high is {high}, expected finite bounds, the first below the second."
        )
    if (np.abs(result) > 1 + ROUNDING).any():
        given = np.asarray(actions, np.float64)
        raise BufferError(
            f"actions has values from {given.min():g} to {given.max():g}, expected them between action_low ({low}) and "
            f"action_high ({high}). Pass the bounds of the environment's action space."
        )
    return result


def as_executed(name: str, given: Any, actions: np.ndarray, classes: Classes | None) -> np.ndarray:
    """Returns the actions if they are of the kind; continuous ones beyond [-1, 1] by a rounding are clipped.

    Args:
        name: Name of the actions in messages.
        given: What the user passed, whose dtype may tell discrete actions.
        actions: The same as float32, finite. `[N, A]`
        classes: The kind; None where nobody has named it.

    Raises:
        BufferError: If they are of another kind.
    """
    if classes:
        check_one_hots(name, actions, classes)
        return actions
    if not actions.size:
        return actions
    lowest, highest = float(actions.min()), float(actions.max())
    numbers = np.asarray(given).dtype.kind in "iu" or (highest > 1 and not np.modf(actions)[0].any())
    if actions.shape[-1] == 1 and numbers and classes is None and lowest >= 0 and highest > 0:
        raise BufferError(
            f"{name} are whole numbers from {lowest:g} to {highest:g} in one column, like those of discrete actions. "
            f"Pass discrete actions one-hot: np.eye({int(highest) + 1})[actions[:, 0].astype(int)]; and continuous "
            "ones as floats in [-1, 1], or with action_low and action_high."
        )
    if max(-lowest, highest) > 1 + ROUNDING:
        raise BufferError(
            f"{name} has values from {lowest:g} to {highest:g}, expected -1 to 1 for continuous actions. Pass the "
            "bounds of the action space as action_low and action_high, which rescale them (both add_episode and "
            "ReplayBuffer.load take these)."
        )
    return np.clip(actions, -1.0, 1.0) if max(-lowest, highest) > 1 else actions


def check_one_hots(name: str, actions: np.ndarray, classes: Classes) -> None:
    """Checks that actions `[N, A]` are one-hots of these sizes, one behind another.

    Raises:
        BufferError: If they are not; it names the first such row.
    """
    ones, expected = actions == 1, len(actions) * len(classes)
    starts = [0, *accumulate(classes[:-1])]
    good = np.logical_or.reduceat(ones, starts, axis=-1).all(-1)  # a one in each part, and nothing else
    if np.count_nonzero(actions) != expected or not good.all():
        good &= np.count_nonzero(actions, axis=-1) == len(classes)
        row = int(np.flatnonzero(~good)[0])
        raise BufferError(
            f"{name}[{row}] is {actions[row].tolist()}, expected one-hots of {' + '.join(map(str, classes))} entries "
            "for discrete actions, as np.eye(n)[numbers] gives them."
        )


def judged_classes(actions: np.ndarray) -> Classes | None:
    """The kind that actions `[N, A]` look like; None where zeros and ones can be of several kinds.

    One-hots are discrete; actions with other values than 0 and 1, or with one of the two alone, are continuous.
    """
    if not actions.size:
        return None
    if not ((actions == 0) | (actions == 1)).all() or actions.all() or not actions.any():
        return ()
    if actions.shape[1] > 1 and (actions.sum(1) == 1).all():
        return (actions.shape[1],)
    return None


def check_fits(what: str, actions: np.ndarray, declared: Classes | None, wanted: Classes) -> None:
    """Checks that the actions of data are of a model's kind.

    Args:
        what: The data, as the beginning of a sentence.
        actions: All actions. `[N, A]`
        declared: Their kind, if it was named.
        wanted: The kind of the model's actions.

    Raises:
        BufferError: If they are not; it says what to do.
    """
    if not actions.size:
        return
    if not wanted and np.abs(actions).max() > 1 + ROUNDING:
        raise BufferError(
            f"{what} has actions from {actions.min():g} to {actions.max():g}, expected -1 to 1 for continuous actions. "
            "Store them rescaled: 2 * (actions - low) / (high - low) - 1."
        )
    if declared is None and wanted:
        check_one_hots(f"The model has {described(wanted)}, and the data's actions", actions, wanted)
        return
    found = judged_classes(actions) if declared is None else declared
    if found == wanted:
        return
    if found is None:
        raise BufferError(
            f"{what} has actions of zeros and ones, and does not say whether they are continuous or discrete. Say so: "
            "ReplayBuffer(..., action_type='continuous') or ReplayBuffer.load(..., action_type='continuous'); discrete "
            "ones are one-hots, with action_classes for several in a row."
        )
    raise BufferError(
        f"{what} has actions with {described(found)}, and the model has {described(wanted)}. Create the model with "
        f"{described(found)}"
        + ("." if declared is not None else ", or name the actions' kind: action_type='continuous' for the buffer.")
    )
