"""Data-parallel training: N ranks with a batch of B / N windows each are one process with B windows."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import (
    CASES,
    WINDOWS,
    command_of,
    equality,
    failing,
    finished,
    long_training,
    on_ranks,
    start_ranks,
    steps_of,
    stored,
    trainer_of,
    training,
)

from worldflux.training.checkpoint import checkpoints_in


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return on_ranks(2, equality, tmp_path_factory.mktemp("two"))


def check_close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Compares norms: LaProp scales up rounding in gradients that are almost zero, in single entries."""
    found, expected = found.double(), expected.double()
    assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-7, name


def check_equal(of_ranks: list[dict[str, Any]], case: str, finals: bool) -> None:
    whole = steps_of(case, finals, [one["draws"] for one in of_ranks])
    for one in of_ranks:
        for name, weight in whole["weights"].items():
            assert torch.equal(one["weights"][name], of_ranks[0]["weights"][name]), name
            check_close(one["weights"][name], weight, name)
        for number, state in enumerate(whole["states"]):
            check_close(one["states"][number], state, f"state {number} of the optimisers")
        for mine, theirs in zip(one["losses"], whole["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("finals", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradient_steps_of_two_ranks_are_those_of_one_process(two: list[Any], case: str, finals: bool) -> None:
    check_equal([one[case, finals] for one in two], case, finals)


@pytest.mark.slow
def test_gradient_steps_of_four_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    of_ranks = on_ranks(4, equality, tmp_path)
    for case, finals in of_ranks[0]:
        check_equal([one[case, finals] for one in of_ranks], case, finals)


def test_a_batch_that_cannot_be_shared_is_refused(trained: list[dict[str, Any]]) -> None:
    for one in trained:
        assert one["refused"].startswith(
            "batch_size is 7, which counts over all ranks and cannot be divided by 2 ranks"
        )


def test_the_ranks_of_a_training_share_its_batches_and_its_losses(trained: list[dict[str, Any]]) -> None:
    first, second = trained
    assert first["seen"]["windows"] == second["seen"]["windows"] == [WINDOWS // 2] * 6
    assert first["seen"]["losses"] == second["seen"]["losses"] and len(set(first["seen"]["losses"])) == 6
    assert first["seen"]["evaluations"] == second["seen"]["evaluations"] and len(first["seen"]["evaluations"]) == 2
    assert (first["first"], second["first"]) == (6, 0)
    for name, weight in first["whole"].items():
        assert torch.equal(second["whole"][name], weight), name


def test_a_resumed_training_of_ranks_is_bit_identical(trained: list[dict[str, Any]]) -> None:
    for one in trained:
        assert one["resumed step"] == 6
        for name, weight in one["whole"].items():
            assert torch.equal(one["resumed"][name], weight), name


def test_a_training_goes_on_with_more_ranks_and_with_fewer(trained: list[dict[str, Any]], tmp_path: Path) -> None:
    for one in trained:
        assert one["grown step"] == 6
        for name, weight in trained[0]["grown"].items():
            assert torch.equal(one["grown"][name], weight), name
    begun = trainer_of(trained[0]["one"])
    begun.load_checkpoint(trained[0]["one"] / "step-00000004")
    for name, weight in begun.model.state_dict().items():
        assert torch.equal(trained[1]["grown from"][name], weight), name

    shrunk = trainer_of(trained[0]["directory"] / "parts")
    shrunk.load_checkpoint(trained[0]["directory"] / "parts" / "step-00000004")
    assert shrunk.step_count == 4
    shrunk.train(stored(shrunk), num_steps=1)
    assert shrunk.step_count == 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory, one = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("one")
    alone = trainer_of(one)
    alone.train(stored(alone), num_steps=4)
    results = on_ranks(2, training, directory / "out", directory, one)
    return [{**result, "directory": directory, "one": one} for result in results]


@pytest.mark.parametrize("how", [pytest.param("raise", marks=pytest.mark.slow), "SIGKILL"])
def test_a_rank_that_dies_ends_the_others_soon_and_leaves_the_checkpoint(how: str, tmp_path: Path) -> None:
    ranks = start_ranks(2, command_of(failing, tmp_path / "out", tmp_path / "run", how))
    (first, said), (second, said_too) = finished(ranks, limit=60)
    assert first == 1 and second == (1 if how == "raise" else -9)
    assert "TrainingError: Rank 0 has lost contact with the others" in said
    assert ("ValueError: an error of its own" in said_too) == (how == "raise")
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["step-00000002"]


def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint(tmp_path: Path) -> None:
    ranks = start_ranks(2, command_of(failing, tmp_path / "out", tmp_path / "run", "SIGTERM"))
    assert [status for status, _ in finished(ranks, limit=60)] == [143, 143]
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in (tmp_path / "run" / "step-00000003").iterdir() if path.is_dir()) == [
        "rank-0001"
    ]


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with an address each, joined by a cable: 10.77.0.1 and 10.77.0.2."""
    names = (f"wf{os.getpid()}a", f"wf{os.getpid()}b")
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        ends = [f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}"]
        for number, name in enumerate(names, 1):
            ends += [f"-n {name} addr add 10.77.0.{number}/24 dev cable"]
            ends += [f"-n {name} link set {device} up" for device in ("cable", "lo")]
        for end in ends:
            subprocess.run(["ip", *end.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def can_make_hosts() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") is not None


@pytest.mark.slow
@pytest.mark.skipif(not can_make_hosts(), reason="making network namespaces needs root and iproute2")
def test_two_hosts_train_together_and_go_on_after_their_network_was_cut(tmp_path: Path) -> None:
    with two_hosts() as names:
        prefixes = [["ip", "netns", "exec", name] for name in names]
        network = dict(MASTER_ADDR="10.77.0.1", GLOO_SOCKET_IFNAME="cable", WORLDFLUX_TIMEOUT="5")

        def start(steps: int) -> list[subprocess.Popen[str]]:
            return start_ranks(2, command_of(long_training, tmp_path, tmp_path, steps), prefixes, **network)

        cut_off = start(10_000)
        while not (tmp_path / "begun").exists():
            assert all(one.poll() is None for one in cut_off)
            time.sleep(0.1)
        subprocess.run(["ip", "-n", names[0], "link", "set", "cable", "down"], check=True)
        began = time.monotonic()
        for status, said in finished(cut_off, limit=60):
            assert status == 1 and "has lost contact with the others" in said
        assert time.monotonic() - began < 30

        subprocess.run(["ip", "-n", names[0], "link", "set", "cable", "up"], check=True)
        newest = int(checkpoints_in(tmp_path / "run")[-1].name.removeprefix("step-"))
        for status, said in finished(start(newest + 3), limit=60):
            assert status == 0, said
        assert torch.load(tmp_path / "1.pt") == newest + 3
