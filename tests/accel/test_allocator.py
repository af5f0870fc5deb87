"""Freed memory is kept for the next step."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
FAULTS = """
import resource, torch
from worldflux.accel.allocator import keep_freed_memory
print(keep_freed_memory())
def step():
    parts = [torch.ones(6_000_000) for _ in range(8)]  # 24 MB each
    while parts:
        parts.pop()  # the last one first, as backward frees what forward made
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**variables: str) -> list[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS]
    return subprocess.run(
        command, env={**plain, **variables}, check=True, capture_output=True, text=True
    ).stdout.split()


@pytest.mark.skipif(not GLIBC, reason="only glibc is told to keep memory")
def test_a_second_step_needs_no_new_memory_pages():
    told, kept = faults()
    assert told == "True"
    assert int(kept) < 100


@pytest.mark.skipif(not GLIBC, reason="only glibc is told to keep memory")
def test_allocator_settings_of_the_user_are_kept():
    told, _ = faults(MALLOC_ARENA_MAX="2")
    assert told == "False"
