"""What all tests of the replay buffer share."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """It would take most of the time, and no power fails here."""
    with mock.patch("os.fsync"):
        yield
