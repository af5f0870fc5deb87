"""The Dockerfile copies files that exist, installs extras that exist, and gives a working command where Docker runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_packaging import PROJECT, ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_what_the_dockerfile_names_exists() -> None:
    copied = re.findall(r"^COPY (\S+) ", TEXT, re.M)
    assert copied == ["constraints.txt", "."]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for path in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "worldflux", "envs", "agents"):
        assert (ROOT / path).exists() and path not in ignored
    (extras,) = re.findall(r'"/opt/worldflux\[(\S+)\]"', TEXT)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    (command,) = re.findall(r'^ENTRYPOINT \["(\S+)"\]$', TEXT, re.M)
    assert command in PROJECT["project"]["scripts"]


def docker_runs() -> bool:
    return (
        shutil.which("docker") is not None and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not docker_runs(), reason="no Docker engine runs here")
def test_the_image_trains_an_agent(tmp_path: Path) -> None:
    subprocess.run(["docker", "build", "-t", "worldflux:test", str(ROOT)], check=True)
    mount = f"{tmp_path}:/workspace/runs"
    words = "train dreamerv3:tiny CartPole-v1 --steps 400 --eval-episodes 1".split()
    subprocess.run(["docker", "run", "--rm", "-v", mount, "worldflux:test", *words], check=True)
    assert (tmp_path / "CartPole-v1" / "dreamerv3-tiny" / "1" / "agent.zip").is_file()
