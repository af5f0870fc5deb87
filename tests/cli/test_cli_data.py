"""`worldflux data convert`: a data set of another format becomes a file to train from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.data_sets import acted, assert_holds, earned, observed

from worldflux.cli.main import main
from worldflux.training import ReplayBuffer


def source(directory: Path, scale: float = 1) -> Path:
    """Two episodes, of 3 and 2 steps, whose rewards came with the observations after them."""
    void = np.zeros(1, np.float32)
    np.savez(
        directory / "mine.npz",
        state=np.concatenate([observed(1, 4), observed(2, 3)]),
        action=scale * np.concatenate([acted(1, 3), void[:, None], acted(2, 2), void[:, None]]),
        reward=np.concatenate([void, earned(1, 3), void, earned(2, 2)]),
        is_first=[1, 0, 0, 0, 1, 0, 0],
        is_terminal=[0, 0, 0, 1, 0, 0, 0],
    )
    return directory / "mine.npz"


HELD = [(1, 3, "terminated", True), (2, 2, "truncated", True)]
OPTIONS = ["--format", "arrays", "--option", "align=arrives", "--option", 'keys={"obs": "state"}']


def test_a_data_set_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "data.npz"
    assert main(["data", "convert", str(source(tmp_path)), "-o", str(target), *OPTIONS]) == 0
    assert capsys.readouterr().out == f"{target}: 5 steps of 2 episodes.\n"
    assert_holds(ReplayBuffer.load(target), HELD)


def test_bounds_of_actions_and_a_directory_for_rows_are_passed_on(tmp_path: Path) -> None:
    target, given = tmp_path / "data.npz", source(tmp_path, 4)
    options = [*OPTIONS, "--action-low", "-4", "--action-high", "4", "--storage", str(tmp_path / "rows")]
    assert main(["data", "convert", str(given), "-o", str(target), *options]) == 0
    assert_holds(ReplayBuffer.load(target), HELD)


def test_what_cannot_be_converted_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, target = str(source(tmp_path)), tmp_path / "data.npz"
    for arguments, message in (
        ([given, "-o", str(target)], "those of no known format"),
        ([given, "-o", str(tmp_path / "data.hdf5")], "expected .npz"),
        ([given, "-o", given, *OPTIONS], "Pass --overwrite"),
        ([given, "-o", str(target), *OPTIONS, "--option", "allign=own"], "Unknown option 'allign'"),
        ([str(tmp_path / "no.npz"), "-o", str(target)], "There is no file"),
    ):
        assert main(["data", "convert", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not target.exists()


def test_the_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["data"])
    assert "convert" in capsys.readouterr().out


def test_a_missing_file_is_not_pushed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "push", str(tmp_path / "no.npz"), "ann/data"]) == 2
    assert "There is no file 'no.npz'" in capsys.readouterr().err
