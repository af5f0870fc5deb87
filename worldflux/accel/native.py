"""Small C sources, compiled by the system's compiler when they are first used, and kept on disk.

Native code stands behind plain torch: without a compiler, or where compiling fails, `load` gives None, and the caller
computes plainly. `WORLDFLUX_NATIVE=0` switches it off; `WORLDFLUX_CACHE` says where libraries are kept, by default in
`worldflux` under `XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("worldflux.accel")

_COMPILERS = ("gcc", "cc", "clang")
_FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_SECONDS = 60.0
"""After which a compiler is given up."""


def switched_on() -> bool:
    """Whether native code may be used at all."""
    return os.environ.get("WORLDFLUX_NATIVE", "1") != "0" and sys.platform in ("linux", "darwin")


@cache
def load(source: Path) -> ctypes.CDLL | None:
    """The library that is made of a C file for this machine's processor; None where that is not possible.

    The first call compiles, which takes about a second, and leaves the library in the cache; later processes load it.
    The file appears there whole or not at all, so processes may compile at the same time. Its name has the checksum of
    its content: one that a crash or a full disk has cut short would end the process, and is compiled again.

    Args:
        source: C without dependencies; a function that runs in several threads is told how many.
    """
    compiler = _compiler()
    if not switched_on() or compiler is None:
        return None
    code = source.read_bytes()
    for flags in _choices():
        digest = hashlib.sha256(b"\0".join([code, " ".join((compiler, *flags)).encode(), _processor()])).hexdigest()
        try:
            return ctypes.CDLL(str(_built(source, compiler, flags, f"{source.stem}-{digest[:20]}")))
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or error
            logger.info("%s was not compiled with %s: %s", source.name, " ".join(flags), detail)
    return None


@cache
def sgemm() -> int | None:
    """Address of the Fortran interface of the matrix product that torch itself uses; None if it is not to be found."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).is_file():
            try:
                return ctypes.cast(ctypes.CDLL(str(folder / name)).sgemm_, ctypes.c_void_p).value
            except (OSError, AttributeError):
                return None
    return None


def _compiler() -> str | None:
    for name in (os.environ.get("CC", ""), *_COMPILERS):
        path = shutil.which(name) if name else None
        if path is not None:
            return path
    return None


def _choices() -> list[tuple[str, ...]]:
    """Flags, the best first; each is tried where the one before it fails."""
    wide = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
    threads = ("-fopenmp",) if sys.platform == "linux" else ()
    return [(*_FLAGS, "-march=native", *wide, *threads), (*_FLAGS, "-march=native"), _FLAGS]


def _built(source: Path, compiler: str, flags: tuple[str, ...], name: str) -> Path:
    """The library whose name begins so, compiled unless it is in the cache."""
    for place in (_cache_folder, _private_folder):
        try:
            folder = place()
            for built in sorted(folder.glob(f"{name}-*.so")):
                if built.stem == f"{name}-{_checksum(built)}":
                    return built
            folder.mkdir(parents=True, exist_ok=True)
            handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
        except (OSError, RuntimeError):  # no home, or one that cannot be read or written
            continue
        os.close(handle)
        try:
            command = [compiler, *flags, str(source), "-o", unfinished, "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
            target = folder / f"{name}-{_checksum(Path(unfinished))}.so"
            os.replace(unfinished, target)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
        return target
    raise OSError("there is no folder to write a library to")


def _checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:20]


def _cache_folder() -> Path:
    given = os.environ.get("WORLDFLUX_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "worldflux"


@cache
def _private_folder() -> Path:
    """A folder that only this process writes to, for where the cache cannot be written."""
    folder = Path(tempfile.mkdtemp(prefix="worldflux-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _processor() -> bytes:
    """What tells this machine's processor from others that share the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        told = []
    return "\n".join([platform.machine(), platform.processor(), *told]).encode()
