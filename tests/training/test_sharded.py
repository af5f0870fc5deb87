"""Recorded files that the ranks of a training share: each reads a part of its own, and nothing is used twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ranks import loading, on_ranks, sharded_training, trainer_of

from worldflux.errors import BufferError, CheckpointError
from worldflux.replay.loading import shares
from worldflux.training import ReplayBuffer


def record(path: Path, lengths: list[int], first: int = 0, seed: int = 0) -> None:
    """Writes episodes whose observations begin with `1000 * episode + t`, and whose rewards are half a step ahead."""
    buffer, rng = ReplayBuffer(1000, (3,), 2), np.random.default_rng(seed)
    for episode, length in enumerate(lengths, first):
        count = 1000.0 * episode + np.arange(length + 1)
        obs = np.stack([count, count / 1000, rng.normal(size=length + 1)], 1)
        buffer.add_episode(obs, rng.uniform(-1, 1, (length, 2)), count[:-1] + 0.5, terminations=None)
    buffer.save(path)


def rows_of(episodes: dict[int, int]) -> list[float]:
    """The first number of each observation of episodes, whose lengths are given by their numbers."""
    return [1000.0 * episode + t for episode, length in episodes.items() for t in range(length + 1)]


def test_each_rank_loads_a_part_of_its_own(tmp_path: Path) -> None:
    for name in ("whole", "uneven"):
        (tmp_path / name).mkdir()
    for number in range(4):
        record(tmp_path / "whole" / f"{number}.npz", [6, 10, 4], 3 * number)
    record(tmp_path / "uneven" / "a.npz", [9, 5, 7, 8, 4, 6])
    record(tmp_path / "uneven" / "b.npz", [5, 4], 6)
    record(tmp_path / "few.npz", [20])
    for kind in ("more", "other"):  # as on machines with disks of their own
        for rank in range(2):
            (tmp_path / kind / str(rank)).mkdir(parents=True)
            for number in range(2 + (kind == "more" and rank)):
                record(tmp_path / kind / str(rank) / f"{number}.npz", [4, 5], seed=rank)
    paths = [tmp_path / name for name in ("whole", "uneven", "few.npz", ".")]
    first, second = on_ranks(2, loading, tmp_path / "out", *paths)

    whole = {episode: (6, 10, 4)[episode % 3] for episode in range(12)}
    divided = dict(enumerate([9, 5, 7, 8, 4, 6, 5, 4]))
    for name, lengths, border in (("whole files", whole, 6), ("divided", divided, 3)):
        for one, own in (
            (first, {episode: length for episode, length in lengths.items() if episode < border}),
            (second, {episode: length for episode, length in lengths.items() if episode >= border}),
        ):
            expected = rows_of(own)
            for place in (name, {"whole files": "in place", "divided": "divided in place"}[name]):
                assert one[place]["counts"] == expected
                is_last = np.append(np.diff(expected) != 1, True)
                assert one[place]["rewards"] == np.where(is_last, 0, np.add(expected, 0.5)).tolist()
                assert one[place]["windows"] == len(expected) - 2
    for one in (first, second):
        assert one["everything"] == 48
        # On all ranks, and in place or not, the data are the same.
        assert one["divided"]["digests"] == one["divided in place"]["digests"] == first["divided"]["digests"]
        assert len(set(one["divided"]["digests"])) == 3
        assert one["divided"]["digests"][0] != one["whole files"]["digests"][0]
        assert "few.npz has 1 episodes of 20 transitions, which cannot be divided among 2 ranks" in one["refused"]
        assert one["refused"].startswith("BufferError")
        assert "on rank 1 does not have the same files as on rank 0" in one["more files"]
    assert "on rank 1 does not have the same files" in second["other files"]
    alone = ReplayBuffer.load(tmp_path / "uneven", sharded=True)
    assert (alone.num_transitions, alone.digest()) == (48, first["divided"]["digests"][0])
    alone.add_episode(np.zeros((2, 3)), np.zeros((1, 2)), [0])
    assert alone.digest() != first["divided"]["digests"][0]


def test_a_training_on_parts_resumes_exactly_or_on_another_number_of_ranks(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for place, seed in ((data, 0), (tmp_path / "other", 1)):
        place.mkdir()
        for number in range(4):
            record(place / f"{number}.npz", [12, 15, 9, 14], 4 * number, seed)
    trained = on_ranks(2, sharded_training, tmp_path / "out", tmp_path / "runs", data)
    for one in trained:
        assert one["step"] == 6
        for name, weight in one["whole"].items():
            assert torch.equal(weight, trained[0]["whole"][name]) and torch.equal(weight, one["resumed"][name]), name
    checkpoints = sorted((tmp_path / "runs").rglob("*"))
    assert max(path.stat().st_size for path in checkpoints if "extras" not in path.name) < 2**20
    assert not [path for path in checkpoints if path.suffix == ".npz"]

    alone = trainer_of(tmp_path / "runs" / "parts")
    with pytest.raises(CheckpointError, match="The buffer holds other data"):
        alone.train(ReplayBuffer.load(tmp_path / "other", sharded=True), resume=True)
    alone.train(ReplayBuffer.load(data, sharded=True, extras=alone.model.replay_extras()), num_steps=1, resume=True)
    assert alone.step_count == 7


def test_parts_are_of_whole_files_if_these_are_about_equal() -> None:
    path = Path("data")
    assert shares(path, [[5, 5], [10], [4, 6], [10]], 2) == [[[0, 0, 2], [1, 0, 1]], [[2, 0, 2], [3, 0, 1]]]
    assert shares(path, [[5, 5, 5, 5]], 4) == [[[0, n, n + 1]] for n in range(4)]
    assert shares(path, [[10], [], [30, 30, 10]], 2) == [[[0, 0, 1], [2, 0, 1]], [[2, 1, 3]]]
    assert shares(path, [[25, 25, 2], [48]], 2) == [[[0, 0, 3]], [[1, 0, 1]]]
    assert shares(path, [[25, 25, 4], [46]], 2) == [[[0, 0, 2]], [[0, 2, 3], [1, 0, 1]]]
    assert shares(path, [[1], [1], [1]], 1) == [[[0, 0, 1], [1, 0, 1], [2, 0, 1]]]
    for lengths in ([[5]], [[]], [[100, 1]], [[100], [1], [1]]):
        with pytest.raises(BufferError, match="cannot be divided among 3 ranks so that each has about as many"):
            shares(path, lengths, 3)


def test_every_episode_is_in_exactly_one_part() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = [rng.integers(1, 60, rng.integers(0, 9)).tolist() for _ in range(rng.integers(1, 9))]
        count = int(rng.integers(1, 5))
        try:
            parts = shares(Path("data"), lengths, count)
        except BufferError:
            continue
        used = [(file, episode) for part in parts for file, first, end in part for episode in range(first, end)]
        assert used == [(file, episode) for file, of in enumerate(lengths) for episode in range(len(of))]
        sizes = [sum(sum(lengths[file][first:end]) for file, first, end in part) for part in parts]
        equal, longest = sum(sizes) / count, max(max(of, default=0) for of in lengths)
        assert max(abs(size - equal) for size in sizes) <= max(longest, 0.15 * equal)
