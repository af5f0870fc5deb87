"""How much memory and disk space is free, for this process, and errors where it does not suffice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from worldflux.errors import BufferError


@dataclass(frozen=True)
class Budget:
    """The free space of one place, and the parts of the error message if it is too small."""

    free: int | None
    """Number of free bytes. None if the system does not report it; then nothing is refused."""
    holder: str
    """Subject of the error's sentence, such as "this machine"."""
    kind: str
    """Kind of space, such as "memory"."""
    remedy: str
    """Remedy besides a smaller capacity, as the end of a sentence."""

    def require(self, needed: int, *, what: str, fits: int) -> None:
        """Checks that there is room.

        Args:
            needed: Number of bytes.
            what: Subject of the error's sentence, which takes these bytes.
            fits: The capacity that would fit; 0 if none does.

        Raises:
            BufferError: If less is free than is needed.
        """
        if self.free is None or needed <= self.free:
            return
        smaller = f"Use a smaller capacity ({_rounded_down(fits):,} would fit), or " if fits else "Use "
        raise BufferError(
            f"{what} takes {human(needed)}, and {self.holder} has {human(self.free)} of free {self.kind}. "
            f"{smaller}{self.remedy}."
        )


def human(count: int) -> str:
    """A number of bytes with its unit, such as "13.1 GB" (powers of 1000)."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take without swapping: what the machine has, or its container if that is less.

    Memory in which the system only caches files counts as free. Without `/proc` (macOS), all of the machine's memory is
    returned, and None if the system does not report that either (Windows).

    Args:
        root: Directory that contains `proc` and `sys`; tests pass their own.
    """
    found = [*_machine_memory(root), *_container_memory(root)]
    if found:
        return max(0, min(found))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def free_disk(directory: Path) -> int:
    """Bytes that this user can still write to the file system of `directory`, which need not exist yet."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that torch can still take on a device: what is free there, and what torch holds there unused.

    None for a device that does not report it.
    """
    if device.type == "cpu":
        return free_memory()
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _machine_memory(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _container_memory(root: Path) -> Iterator[int]:
    """What is left below the limit of each control group of this process, the groups above them included."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            top, limit_name, used_name, cached = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):  # version 1
            top = root / "sys/fs/cgroup/memory"
            limit_name, used_name, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = top / path.lstrip("/")
        # Inside a container the path may be the one outside of it; the group itself is at the top then.
        for place in (group, *group.parents):
            if top not in (place, *place.parents):
                break
            limit, used = _lines(place / limit_name), _lines(place / used_name)
            if limit and used and limit[0] != "max":
                stat = dict(entry.split(maxsplit=1) for entry in _lines(place / "memory.stat"))
                files = sum(int(stat.get(f"{cached}{kind}_file", 0)) for kind in ("inactive", "active"))
                yield int(limit[0]) - int(used[0]) + files


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _rounded_down(count: int) -> int:
    """A number rounded down to two digits, because the free space changes from moment to moment."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return count // unit * unit
