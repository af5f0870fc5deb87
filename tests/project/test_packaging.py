"""The wheel holds every package, under the installed names and no others."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import worldflux
from worldflux.errors import install_hint

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither the checkout nor another test sees the build's files."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("worldflux", "envs", "agents"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(out), "."]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_of_the_checkout(wheel: Path) -> None:
    expected = set()
    for package, folder in (("worldflux", "worldflux"), ("worldflux/envs", "envs"), ("worldflux/agents", "agents")):
        expected |= {f"{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.endswith(".py")} == expected
    assert "worldflux/py.typed" in names
    hyperparams = {f"worldflux/agents/zoo/hyperparams/{algorithm}.yml" for algorithm in ("dreamerv3", "tdmpc2")}
    assert hyperparams <= names
    assert {"worldflux/cli/report/page.html", "worldflux/cli/report/style.css"} <= names
    assert {name.split("/")[0] for name in names} == {"worldflux", f"worldflux-{worldflux.__version__}.dist-info"}


def test_every_package_can_be_imported_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    packages = PROJECT["tool"]["setuptools"]["packages"]
    code = (
        "import importlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "for name in sys.argv[2:]:\n"
        "    assert importlib.import_module(name).__file__.startswith(sys.argv[1]), name\n"
        "from worldflux import WorldFluxAgent, create_world_model\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *packages]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_source_distribution_holds_what_the_tests_need(tmp_path: Path) -> None:
    folders = ("worldflux", "envs", "agents", "tests", "docs", "examples", "benchmarks", ".ci")
    files = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt")
    files = (*files, "mkdocs.yml", "pyproject.toml")
    source = tmp_path / "source"
    for folder in folders:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*files, "MANIFEST.in"):
        shutil.copy(ROOT / file, source / file)
    expected = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert expected <= names


def test_the_version_is_stated_once() -> None:
    assert PROJECT["project"]["version"] == worldflux.__version__
    assert f"\nversion: {worldflux.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_core_needs_nine_packages() -> None:
    names = {line.split(">")[0] for line in PROJECT["project"]["dependencies"]}
    expected = {"torch", "numpy", "gymnasium", "stable-baselines3", "safetensors", "opencv-python", "tyro"}
    assert names == expected | {"pyyaml", "jinja2"}
    assert {"extra", "dmc", "atari", "wandb", "zoo", "plot", "docs", "dev"} <= set(
        PROJECT["project"]["optional-dependencies"]
    )


def test_what_the_developers_install_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    project = PROJECT["project"]
    named = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        named += extra
    wanted = {line.split(">")[0].split("[")[0] for line in named} - {"worldflux"}
    assert wanted <= pinned


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({"url": "file:///home/ann/my%20code", "dir_info": {}}, 'pip install "/home/ann/my code[dmc]"'),
        ({"url": "file:///src", "dir_info": {"editable": True}}, 'pip install "/src[dmc]"'),
        (
            {"url": "https://host/w.git", "vcs_info": {"vcs": "git", "requested_revision": "dev", "commit_id": "a1"}},
            'pip install "worldflux[dmc] @ git+https://host/w.git@dev"',
        ),
        (
            {"url": "file:///tmp/worldflux.whl", "archive_info": {}},
            'pip install "worldflux[dmc] @ file:///tmp/worldflux.whl"',
        ),
        (None, 'pip install "worldflux[dmc]"'),  # from an index
    ],
)
def test_the_command_that_installs_an_extra_installs_it_from_where_worldflux_came_from(
    origin: dict[str, Any] | None, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "worldflux-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: worldflux\nVersion: 0\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    assert install_hint("dmc") == command


def test_no_file_advises_to_install_worldflux_from_an_index() -> None:
    advised = re.compile(r"""pip install[^\n`#()]*[ "']worldflux(?:[\[ "'@]|$)""", re.M)
    for folder in ("worldflux", "envs", "agents", "examples", "benchmarks", "docs"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md"), *ROOT.glob("*.md")]:
            if path != ROOT / "worldflux" / "errors.py":  # where such commands come from
                assert not advised.findall(path.read_text(encoding="utf-8")), path
