"""What `config.json` says about the code and the machine of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import gymnasium
import pytest
import torch

from worldflux.cli import provenance
from worldflux.cli.provenance import circumstances, commit_of, commits, differences, versions


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *args]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "coins.py").write_text("SIDES = 2\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_versions_are_those_of_the_packages_that_a_run_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mujoco", "dm_control", "ale_py", "Box2D"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    found = versions("CartPole-v1")
    assert list(found) == ["python", "worldflux", "torch", "numpy", "gymnasium", "stable-baselines3"]
    assert (found["python"], found["gymnasium"]) == (platform.python_version(), gymnasium.__version__)
    assert versions("dmc/walker-walk").items() - found.items() == {
        (name, metadata.version(name)) for name in ("mujoco", "dm-control")
    }
    monkeypatch.setitem(sys.modules, "ale_py", sys)  # imported by an environment of another name
    assert set(versions("ALE/Pong-v5")) - set(found) == {"ale-py"}


def test_a_commit_is_marked_if_files_differ_from_it(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    file = checkout / "coins.py"
    assert commit_of(file) == commit
    file.write_text("SIDES = 3\n")
    three = commit_of(file)
    file.write_text("SIDES = 4\n")
    four = commit_of(file)
    assert three is not None and four is not None
    assert three.startswith(f"{commit}-dirty-") and four.startswith(f"{commit}-dirty-") and three != four
    file.write_text("SIDES = 3\n")
    assert commit_of(file) == three  # equal texts for equal files
    (checkout / "installed.py").write_text("")
    assert commit_of(checkout / "installed.py") is None  # in the folder of a checkout, but not part of it


def test_without_a_repository_or_git_there_is_no_commit(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commit_of(tmp_path / "gone.py") is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # as in a hook
    assert commit_of(checkout / "coins.py") is not None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(checkout / "coins.py") is None


def test_own_environments_have_the_commit_of_their_own_repository(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert commits(f"{checkout}/coins.py:Coin")["environment"] == commit
    assert "environment" not in commits("CartPole-v1")
    assert "environment" not in commits("json:Coin")  # a module without a repository


def test_a_worldflux_that_pip_took_from_a_repository_has_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        def read_text(self, name: str) -> str:
            return '{"url": "https://example.org/w.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}'

    monkeypatch.setattr(provenance, "commit_of", lambda file: None)
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed())
    assert commits() == {"worldflux": "abc"}
    monkeypatch.setattr(Installed, "read_text", lambda self, name: None)
    assert commits() == {}


def test_differences_name_what_changed() -> None:
    now = circumstances("CartPole-v1", "cpu")
    assert now["machine"]["device"] == "cpu" and now["machine"]["threads"] == str(torch.get_num_threads())
    assert differences(now, now) == {}
    then = {
        "versions": {**now["versions"], "torch": "1.0"},
        "commits": {"worldflux": "abc"},
        "machine": {name: value for name, value in now["machine"].items() if name != "cpu"},
    }
    commit = now["commits"].get("worldflux")
    assert differences(then, now) == {
        "torch": ("1.0", now["versions"]["torch"]),
        "commit of worldflux": ("abc", commit),
        "cpu": (None, now["machine"]["cpu"]),
    }
