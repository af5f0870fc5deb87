"""Data-parallel training: N ranks with a batch of B / N windows each are one process with B windows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import (
    TESTS,
    WINDOWS,
    equality,
    failing,
    finished_ranks,
    on_ranks,
    steps_of,
    stored,
    trainer_of,
    training,
    variables_of_ranks,
)

from worldflux.training.checkpoint import checkpoints_in


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


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradient_steps_of_ranks_are_those_of_one_process(count: int, tmp_path: Path) -> None:
    of_ranks = on_ranks(count, equality, tmp_path)
    for case, finals in of_ranks[0]:
        check_equal([one[case, finals] for one in of_ranks], case, finals)


def test_ranks_train_together_and_resume_exactly_or_on_another_number(tmp_path: Path) -> None:
    directory, one_process = tmp_path / "trained", tmp_path / "one"
    alone = trainer_of(one_process)
    alone.train(stored(alone), num_steps=4)
    first, second = trained = on_ranks(2, training, tmp_path / "out", directory, one_process)

    # The ranks share batches and losses.
    assert first["seen"]["windows"] == second["seen"]["windows"] == [WINDOWS // 2] * 6
    assert first["seen"]["losses"] == second["seen"]["losses"] and len(set(first["seen"]["losses"])) == 6
    assert first["seen"]["evaluations"] == second["seen"]["evaluations"] and len(first["seen"]["evaluations"]) == 2
    assert (first["first"], second["first"]) == (6, 0)
    refused = "batch_size is 7, which counts over all ranks and cannot be divided by 2 ranks"
    for one in trained:
        check_same_weights(one["whole"], first["whole"])
        assert one["refused"].startswith(refused)
        # A resumed training is bit-identical.
        assert one["resumed step"] == 6
        check_same_weights(one["resumed"], one["whole"])
        # The training of one process goes on with two.
        assert one["grown step"] == 6
        check_same_weights(one["grown"], first["grown"])
    begun = trainer_of(one_process)
    begun.load_checkpoint(one_process / "step-00000004")
    check_same_weights(second["grown from"], begun.model.state_dict())
    # That of two goes on in one process.
    shrunk = trainer_of(directory / "parts")
    shrunk.load_checkpoint(directory / "parts" / "step-00000004")
    assert shrunk.step_count == 4
    shrunk.train(stored(shrunk), num_steps=1)
    assert shrunk.step_count == 5


def check_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.slow  # one that is killed is also a test of the command line
@pytest.mark.parametrize("how", ["raise", "SIGKILL"])
def test_a_rank_that_dies_ends_the_others_soon_and_leaves_the_checkpoint(how: str, tmp_path: Path) -> None:
    ranks = finished_ranks(2, failing, tmp_path / "out", tmp_path / "run", how, limit=60)
    (first, said), (second, said_too) = ranks
    assert first == 1 and second == (1 if how == "raise" else -9)
    assert "TrainingError: Rank 0 has lost contact with the others" in said
    assert ("ValueError: an error of its own" in said_too) == (how == "raise")
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["step-00000002"]


def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint(tmp_path: Path) -> None:
    ranks = finished_ranks(2, failing, tmp_path / "out", tmp_path / "run", "SIGTERM", limit=60)
    assert [status for status, _ in ranks] == [143, 143]
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
        network = dict(MASTER_ADDR="10.77.0.1", GLOO_SOCKET_IFNAME="cable", WORLDFLUX_TIMEOUT="5")
        network |= dict(PYTHONPATH=str(TESTS), OMP_NUM_THREADS="1")

        def start(steps: int) -> list[subprocess.Popen[str]]:
            """Starts a rank on each host."""
            command = [sys.executable, "-m", "helpers.ranks", str(tmp_path), str(steps)]
            pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            return [
                subprocess.Popen(["ip", "netns", "exec", name, *command], env=os.environ | variables | network, **pipes)
                for name, variables in zip(names, variables_of_ranks(2), strict=True)
            ]

        def ended(hosts: list[subprocess.Popen[str]]) -> Iterator[tuple[int, str]]:
            """Exit status and output of each rank; all are killed if one takes too long."""
            try:
                for one in hosts:
                    yield one.wait(60), one.communicate()[0]
            finally:
                for one in hosts:
                    one.kill()

        cut_off = start(10_000)
        while not (tmp_path / "begun").exists():
            assert all(one.poll() is None for one in cut_off)
            time.sleep(0.1)
        subprocess.run(["ip", "-n", names[0], "link", "set", "cable", "down"], check=True)
        began = time.monotonic()
        for status, said in ended(cut_off):
            assert status == 1 and "has lost contact with the others" in said
        assert time.monotonic() - began < 30

        subprocess.run(["ip", "-n", names[0], "link", "set", "cable", "up"], check=True)
        newest = int(checkpoints_in(tmp_path / "run")[-1].name.removeprefix("step-"))
        for status, said in ended(start(newest + 3)):
            assert status == 0, said
        assert torch.load(tmp_path / "1.pt") == newest + 3
