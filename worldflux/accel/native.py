"""Small C sources that the system's compiler compiles on first use, and whose libraries are cached on disk.

Native code is optional: without a compiler, or if compiling fails, `load` returns None, and the caller uses torch.
`WORLDFLUX_NATIVE=0` disables it. `WORLDFLUX_CACHE` is the folder of the libraries, by default `worldflux` in
`XDG_CACHE_HOME` or `~/.cache`.
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
"""Timeout of the compiler in seconds."""


def switched_on() -> bool:
    """Returns whether native code may be used at all."""
    return os.environ.get("WORLDFLUX_NATIVE", "1") != "0" and sys.platform in ("linux", "darwin")


@cache
def load(source: Path) -> ctypes.CDLL | None:
    """Loads the library compiled from a C file for this machine's processor, or returns None if that is not possible.

    The first call compiles, which takes about a second, and stores the library in the cache; later processes load it.
    The file is written atomically, so processes may compile at the same time. Its name contains the checksum of its
    content, so that a library truncated by a crash or a full disk, which would crash the process, is compiled again.

    Args:
        source: C file without dependencies. Functions that use several threads take their number as an argument.
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
    """Returns the address of the Fortran interface of the matrix product in torch's own BLAS, or None if not found."""
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
    """Returns sets of compiler flags in order of preference; each is tried if the previous ones fail."""
    wide = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
    threads = ("-fopenmp",) if sys.platform == "linux" else ()
    return [(*_FLAGS, "-march=native", *wide, *threads), (*_FLAGS, "-march=native"), _FLAGS]


def _built(source: Path, compiler: str, flags: tuple[str, ...], name: str) -> Path:
    """Returns the path of the library whose name starts with `name`, and compiles it if it is not in the cache."""
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
    raise OSError("there is no folder to which a library can be written")


def _checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:20]


def _cache_folder() -> Path:
    given = os.environ.get("WORLDFLUX_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "worldflux"


@cache
def _private_folder() -> Path:
    """Creates a temporary folder for this process, used if the cache is not writable."""
    folder = Path(tempfile.mkdtemp(prefix="worldflux-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _processor() -> bytes:
    """Returns a description that distinguishes this machine's processor from others that share the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        told = []
    return "\n".join([platform.machine(), platform.processor(), *told]).encode()
