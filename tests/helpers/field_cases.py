"""Helpers to test that changing any field of a configuration makes a difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worldflux.errors import ConfigurationError


@dataclass(frozen=True)
class Case:
    """One field with another value."""

    value: Any
    see: Callable[[Any], Any] | None
    """Observes, for a configuration, what the field changes. None: every other value is refused."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the comparison starts from, where the common ones would hide the effect."""
    along: Mapping[str, Any] = field(default_factory=dict)
    """Fields that have to change with it."""


def every_field(tables: Mapping[type, Mapping[str, Case]]) -> pytest.MarkDecorator:
    """Parametrises a test over each field of each dataclass, whether it has an entry or not."""
    pairs = [(cls, item.name) for cls in tables for item in fields(cls)]
    return pytest.mark.parametrize(("cls", "name"), pairs, ids=[f"{cls.__name__}-{name}" for cls, name in pairs])


def check_field(
    cls: Any, name: str, table: Mapping[str, Case], common: Mapping[str, Any], *, file: str, where: str
) -> None:
    """Fails unless the field, changed as its entry says, makes a difference.

    Args:
        cls: The dataclass.
        name: The field.
        table: The entries of all its fields.
        common: What every comparison starts from.
        file: Where entries are added, for the message.
        where: The name of the table there.
    """
    if name not in table:
        pytest.fail(
            f"{cls.__name__}.{name} has no entry. Add one to {where} in {file}: another value, and an observation "
            "in which it makes a difference. A field for which there is none is to be removed."
        )
    case = table[name]
    start = {**common, **case.base}
    base, changed = start, {**start, name: case.value, **case.along}
    assert getattr(cls(**base), name) != case.value, "the entry does not change the field"
    if case.see is None:
        with pytest.raises(ConfigurationError, match=name):
            cls(**changed)
        return
    before = getattr(cls(**base), name)
    difference = not same(case.see(cls(**base)), case.see(cls(**changed)))
    assert difference, f"{cls.__name__}.{name} changes nothing: {before} or {case.value}"


def same(one: Any, other: Any) -> bool:
    """Whether two observations are equal bit by bit, whatever tensors and containers they are made of."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.device == other.device and (one.is_meta or torch.equal(one, other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def check_no_entry_is_left_over(tables: Mapping[type, Iterable[str]]) -> None:
    """Fails if there is an entry for a field that does not exist."""
    for cls, table in tables.items():
        assert set(table) <= {item.name for item in fields(cls)}, cls
