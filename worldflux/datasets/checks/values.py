"""Whether the numbers are ones that a model can learn from: finite, scaled, of the right kind, and varying."""

from __future__ import annotations

import hashlib

import numpy as np

from worldflux.datasets.checks.findings import Findings
from worldflux.datasets.checks.sample import Sample, is_image
from worldflux.datasets.checks.sources import Source
from worldflux.replay.actions import ROUNDING
from worldflux.replay.spec import image_line
from worldflux.validation import SINGLE_KEY

_SATURATED = 0.3
_SHOWN = 8


def check_finite(source: Source, findings: Findings) -> None:
    """Finds NaN and infinite numbers."""
    for name, array in (("actions", source.actions), ("rewards", source.rewards)):
        _report_not_finite(name, np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1)), source, findings)
    for key, (_, dtype) in source.obs.items():
        if dtype.kind != "f":
            continue
        rows = [part[~np.isfinite(array).reshape(len(array), -1).all(1)] for part, array in source.read(key)]
        name = "obs" if key == SINGLE_KEY else f"obs '{key}'"
        _report_not_finite(name, np.concatenate([np.zeros(0, np.int64), *rows]), source, findings)


def _report_not_finite(name: str, rows: np.ndarray, source: Source, findings: Findings) -> None:
    if not len(rows):
        return
    first = np.cumsum(source.lengths) - source.lengths
    advice = "Remove or repair these rows."
    if len(rows) > 1 and np.isin(rows, first).all():
        advice = (
            "All are first rows of episodes, which hold nothing where rewards or actions stand beside the observation "
            'that they led to: read the data with align="arrives", or "led_to" if the actions do so as well.'
        )
    findings.add("not-finite", f"{name} has NaN or infinite numbers in {len(rows):,} rows. {advice}", rows=rows)


def check_actions(source: Source, findings: Findings) -> None:
    """Finds actions that are out of range, saturated, or numbers where one-hots are expected."""
    actions = source.actions.astype(np.float32)
    finite = np.isfinite(actions).all(1)
    if not finite.any():
        return
    known = actions[finite]
    lowest, highest = float(known.min()), float(known.max())
    if source.classes:
        ends = np.cumsum(source.classes)
        parts = np.split(actions, ends[:-1], axis=1) if ends[-1] == actions.shape[1] else [actions]
        good = np.all([(np.count_nonzero(part, axis=1) == 1) & (part.max(1) == 1) for part in parts], axis=0)
        _add_rows(
            "not-one-hot",
            f"{{count:,}} actions are no one-hots of {' + '.join(map(str, source.classes))} entries, as the file says "
            "that they are. Write discrete actions as np.eye(n)[numbers].",
            np.flatnonzero(~good & finite),
            findings,
        )
        return
    is_whole = bool((known == np.rint(known)).all())
    if is_whole and lowest >= 0 and (highest > 1 or (actions.shape[1] == 1 and lowest != highest)):
        findings.add(
            "integer-actions",
            f"Actions are whole numbers from {lowest:g} to {highest:g}, like those of discrete actions. Write them "
            f"one-hot, np.eye({int(highest) + 1})[actions], or read the data with action_classes.",
            rows=np.flatnonzero((actions != 0).any(1))[:1],
            total=len(actions),
        )
        return
    outside = (np.abs(actions) > 1 + ROUNDING).any(1) & finite
    _add_rows(
        "action-range",
        f"{{count:,}} rows have continuous actions outside of [-1, 1], from {lowest:g} to {highest:g}. Rescale them "
        "with the bounds of the environment's action space: action_low and action_high.",
        np.flatnonzero(outside),
        findings,
    )
    if outside.any():
        return
    at_bound = np.abs(known) >= 1 - 1e-6
    share = at_bound.mean(0)
    values = [len(np.unique(column[:2000])) for column in known.T]
    clipped = [number for number, part in enumerate(share) if part > _SATURATED and values[number] > 20]
    if clipped:
        rows = np.flatnonzero(finite)[at_bound[:, clipped].all(1)]
        findings.add(
            "action-saturated",
            f"{share[clipped].mean():.0%} of the actions in {_columns(clipped).lower()} are exactly -1 or 1, and the "
            "others are spread between. Policies that were trained to their limits and clipped noise look like this; "
            "so do actions in other units that were clipped instead of rescaled.",
            rows=rows,
            severity="note",
        )


def check_columns(source: Source, sample: Sample, findings: Findings) -> None:
    """Finds columns of observations and actions that never change, or are the same as another."""
    for key in [key for key, (shape, _) in source.obs.items() if not is_image(shape)]:
        numbers = [number for number, label in enumerate(sample.labels) if label[0] == key]
        name = "" if key == SINGLE_KEY else f" of '{key}'"
        _check_columns("observations", name, sample.obs[:, numbers], findings)
    for key, low in sample.lowest.items():
        if low == sample.highest[key]:
            findings.add("constant-column", f"All images{_of(key)} have the one value {low:g}.")
    _check_columns("actions", "", sample.actions[sample.is_step], findings)


def _check_columns(what: str, of: str, array: np.ndarray, findings: Findings) -> None:
    if len(array) < 2:
        return
    varies = (array != array[0]).any(0)
    if not varies.any():
        findings.add("constant-column", f"The {what}{of} are the same in all rows: nothing can be learned from them.")
        return
    if (~varies).any():
        constant = np.flatnonzero(~varies)
        verb = "never changes" if len(constant) == 1 else "never change"
        findings.add("constant-column", f"{_columns(constant)} of the {what}{of} {verb}.", severity="note")
    groups: dict[bytes, list[int]] = {}
    for column in np.flatnonzero(varies):
        digest = hashlib.blake2b(np.ascontiguousarray(array[:, column]).data, digest_size=16).digest()
        groups.setdefault(digest, []).append(int(column))
    pairs = [(group[0], other) for group in groups.values() for other in group[1:]]
    if pairs:
        shown = ", ".join(f"{one} and {other}" for one, other in pairs[:_SHOWN])
        findings.add(
            "duplicate-column",
            f"Columns of the {what}{of} are the same in all rows: {shown}{' and more' * (len(pairs) > _SHOWN)}.",
            severity="note",
        )


def check_images(source: Source, sample: Sample, findings: Findings) -> None:
    """Finds images that are not bytes from 0 to 255."""
    for key, low in sample.lowest.items():
        high, dtype = sample.highest[key], source.obs[key][1]
        if low == high:
            continue
        if dtype.kind == "f":
            findings.add(
                "image-scale",
                f"Images{_of(key)} are {dtype} with values from {low:g} to {high:g}, expected bytes (uint8) from 0 to "
                f"255, which models scale themselves: {image_line(low, high, sample.is_whole_numbers[key])}",
            )
        elif high <= 1:
            findings.add(
                "image-scale",
                f"Images{_of(key)} are bytes with no value above {high:g}, and look black to a model, which divides "
                "them by 255. They were probably scaled to 0 to 1 before they became bytes: multiply by 255 first.",
            )


def _of(key: str) -> str:
    return "" if key == SINGLE_KEY else f" '{key}'"


def _columns(numbers: np.ndarray | list[int]) -> str:
    shown = [str(int(number)) for number in numbers[:_SHOWN]]
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"{'Columns' if len(numbers) > 1 else 'Column'} {', '.join(shown)}{more}"


def _add_rows(code: str, message: str, rows: np.ndarray, findings: Findings) -> None:
    if len(rows):
        findings.add(code, message.format(count=len(rows)), rows=rows)
