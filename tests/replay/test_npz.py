"""Buffers in files: round trips, what others write, and every way in which a file can be broken."""

import os
import zipfile

import numpy as np
import pytest
import torch
from helpers.replay import acted, seen

from worldflux.errors import BufferError
from worldflux.files import write_atomically
from worldflux.replay import npz
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.npz import write_npz


def documented(**changes):
    """Two episodes, of 3 and 2 steps, with the documented keys alone."""
    count = np.array([0, 1, 2, 1000, 1001], np.float32)
    arrays = dict(
        obs=np.stack([count, -count], 1),
        actions=acted(count[:, None]),
        rewards=count + 0.5,
        dones=np.array([0, 0, 1, 0, 1], np.float32),
        obs_shape=np.array([2]),
        action_dim=np.array(1),
        capacity=np.array(20),
    )
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def filled(n_envs=2, capacity=24):
    """Streams with ended, cut and in-flight episodes of images and vectors; a final observation is missing in one."""
    buffer = ReplayBuffer(capacity, {"camera": (3, 8, 8), "speed": (1,)}, 2, n_envs=n_envs, seed=0)
    for t in range(16):
        count = np.arange(n_envs) * 100.0 + t
        camera = np.zeros((n_envs, 3, 8, 8), np.uint8) + count[:, None, None, None].astype(np.uint8)
        obs = {"camera": camera, "speed": count[:, None]}
        ends = np.full(n_envs, t % 5 == 4)
        buffer.add(obs, np.full((n_envs, 2), t), count, ends & (t < 9), ends & (t >= 9), final_obs=obs)
        if t == 6:
            buffer.end_episodes(0)
    return buffer


def assert_same(batch, other):
    for name in ("actions", "rewards", "terminations", "truncations", "is_first"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    assert torch.equal(seen(batch), seen(other))
    for key in batch.obs:
        assert torch.equal(batch.obs[key], other.obs[key]), key


def drawn(buffer, seq_len=9):
    buffer.seed(3)
    return buffer.sample(100, seq_len)


def test_a_loaded_buffer_is_the_saved_one_with_episodes_in_flight_and_goes_on_like_it(tmp_path):
    buffer = filled()
    before = buffer.num_transitions, buffer.num_episodes, buffer.capacity, buffer.n_envs, buffer.obs_shape
    buffer.save(tmp_path / "a.npz")
    loaded = ReplayBuffer.load(tmp_path / "a.npz")
    after = loaded.num_transitions, loaded.num_episodes, loaded.capacity, loaded.n_envs, loaded.obs_shape
    assert before == after == (24, 7, 24, 2, {"camera": (3, 8, 8), "speed": (1,)})
    batch = drawn(buffer)
    assert not batch.obs_mask.all() and batch.truncations.any() and batch.terminations.any()
    assert_same(batch, drawn(loaded))
    for each in (buffer, loaded):  # the episode in flight continues: no is_first
        obs = {"camera": np.full((2, 3, 8, 8), 9, np.uint8), "speed": np.full((2, 1), 9.0)}
        each.add(obs, np.zeros((2, 2)), [9, 9], [1, 0], [0, 0], final_obs=obs)
    assert_same(drawn(buffer), drawn(loaded))
    loaded.save(tmp_path / "b.npz")
    buffer.save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_empty_buffer_makes_the_round_trip(tmp_path):
    ReplayBuffer(7, (3,), 2, n_envs=2).save(tmp_path / "empty.npz")
    loaded = ReplayBuffer.load(tmp_path / "empty.npz")
    assert (len(loaded), loaded.num_episodes, loaded.capacity, loaded.obs_shape) == (0, 0, 7, (3,))


def test_arrays_larger_than_a_chunk_are_written_and_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "CHUNK_BYTES", 500)  # two images
    buffer = filled()
    buffer.save(tmp_path / "a.npz")
    assert_same(drawn(buffer), drawn(ReplayBuffer.load(tmp_path / "a.npz")))


def test_others_read_the_documented_arrays_with_numpy_alone(tmp_path):
    buffer = ReplayBuffer(10, (1,), 1)
    buffer.add_episode(np.arange(4.0)[:, None], np.zeros((3, 1)), [1, 2, 3], [0, 0, 1])
    buffer.add_episode(np.arange(3.0)[:, None], np.ones((2, 1)), [4, 5], [0, 0])
    buffer.save(tmp_path / "buffer")  # exactly this path, without a suffix
    assert os.listdir(tmp_path) == ["buffer"]
    with np.load(tmp_path / "buffer", allow_pickle=False) as file:
        assert file["obs"].tolist() == [[0], [1], [2], [0], [1]]
        assert file["rewards"].tolist() == [1, 2, 3, 4, 5]
        assert file["dones"].tolist() == [0, 0, 1, 0, 0]
        assert file["truncations"].tolist() == [0, 0, 0, 0, 1]
        assert file["final_obs"].tolist() == [[3], [2]]
        assert (file["obs_shape"].tolist(), int(file["action_dim"]), int(file["capacity"])) == ([1], 1, 10)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_with_the_documented_keys_alone_gives_every_reward_and_termination(tmp_path, save):
    save(tmp_path / "walker.npz", **documented())
    buffer = ReplayBuffer.load(tmp_path / "walker.npz", seed=0)
    assert (len(buffer), buffer.num_episodes, buffer.capacity, buffer.obs_shape) == (5, 2, 20, (2,))
    batch = buffer.sample(1, 7)  # all there is
    assert batch.obs[0, :, 0].tolist() == [0, 1, 2, 0, 1000, 1001, 0]
    assert batch.obs_mask[0].tolist() == [True, True, True, False, True, True, False]
    assert batch.rewards[0].tolist() == [0.5, 1.5, 2.5, 0, 1000.5, 1001.5, 0]
    assert batch.terminations[0].nonzero().flatten().tolist() == [2, 5]
    assert batch.is_first[0].nonzero().flatten().tolist() == [0, 4]


def test_a_last_episode_without_a_done_counts_as_truncated(tmp_path):
    np.savez(tmp_path / "walker.npz", **documented(dones=np.array([0, 0, 1, 0, 0])))
    batch = ReplayBuffer.load(tmp_path / "walker.npz").sample(1, 7)
    assert batch.truncations[0].nonzero().flatten().tolist() == [5]
    assert batch.terminations[0].nonzero().flatten().tolist() == [2]


def test_column_major_and_big_endian_arrays_are_read_like_others(tmp_path):
    np.savez(tmp_path / "a.npz", **documented())
    changes = {"obs": np.asfortranarray(documented()["obs"]), "rewards": documented()["rewards"].astype(">f8")}
    np.savez(tmp_path / "b.npz", **documented(**changes))
    one, other = (ReplayBuffer.load(tmp_path / name).sample(1, 7) for name in ("a.npz", "b.npz"))
    assert torch.equal(one.obs, other.obs) and torch.equal(one.rewards, other.rewards)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, float])
def test_images_are_stored_as_bytes_whatever_the_file_has(tmp_path, dtype):
    obs = np.full((5, 3, 8, 8), 200, dtype)
    np.savez(tmp_path / "a.npz", **documented(obs=obs, obs_shape=np.array([3, 8, 8])))
    found = ReplayBuffer.load(tmp_path / "a.npz").sample(1, 2).obs
    assert found.dtype == torch.uint8 and int(found.max()) == 200


def test_a_smaller_capacity_keeps_the_newest_transitions(tmp_path):
    np.savez(tmp_path / "a.npz", **documented())
    buffer = ReplayBuffer.load(tmp_path / "a.npz", capacity=3)
    assert buffer.capacity == 3
    assert buffer.sample(1, 5).obs[0, :, 0].tolist() == [2, 0, 1000, 1001, 0]


def test_episodes_are_shared_out_among_another_number_of_streams(tmp_path):
    buffer = filled(n_envs=2, capacity=100)
    buffer.save(tmp_path / "a.npz")
    loaded = ReplayBuffer.load(tmp_path / "a.npz", n_envs=3)
    assert (len(loaded), loaded.n_envs) == (32, 3)
    assert loaded.num_episodes == 9  # seven had ended, two were in flight and are closed
    batch = loaded.sample(500, 2)
    speed = batch.obs["speed"][..., 0]
    follows = speed[:, 1] == speed[:, 0] + 1
    ended = batch.terminations[:, 0] | batch.truncations[:, 0]
    assert torch.all(follows | batch.is_first[:, 1] | ended)
    assert set(speed[seen(batch)].tolist()) == {float(t + 100 * env) for t in range(16) for env in range(2)}


BROKEN = [
    ({"dones": None}, "no array 'dones'.*found: action_dim, actions, capacity, obs, obs_shape, rewards.*schema"),
    ({"obs": None}, "no array 'obs'"),
    ({"actions": None, "capacity": None}, "no array 'actions', 'capacity'"),
    ({"rewards": np.zeros(4)}, r"rewards has shape \(4,\), expected \(5,\)"),
    ({"obs": np.zeros((4, 2))}, r"obs has shape \(4, 2\), but there are 5 actions"),
    ({"obs_shape": np.array([3])}, r"obs has shape \(5, 2\).*obs_shape is \(3,\)"),
    ({"actions": np.zeros((5, 2))}, r"actions have shape \(5, 2\).*action_dim 1"),
    ({"actions": np.zeros(5)}, "actions have shape"),
    ({"action_dim": np.array([1, 2])}, r"action_dim is \[1 2\], expected a whole number"),
    ({"capacity": np.array(-1)}, "capacity is -1"),
    ({"capacity": np.array(4)}, "capacity is 4, but has 5 transitions. Pass capacity="),
    ({"rewards": np.array([0, 0, np.nan, 0, 0])}, r"rewards has nan at index \(2,\)"),
    ({"obs": np.full((5, 2), np.inf)}, "a.npz: obs has inf"),
    ({"dones": np.array([0, 0, 3, 0, 1])}, "dones has values other than 0 and 1"),
    ({"rewards": np.array([None] * 5)}, "array 'rewards' has dtype object.*never unpickled"),
    ({"obs": np.array([["text", None]] * 5, object)}, "array 'obs' has dtype object.*never unpickled"),
    ({"rewards": np.array(["x"] * 5)}, "dtype <U1"),
    ({"truncations": np.zeros(3)}, r"truncations has shape \(3,\)"),
    ({"episode_lengths": np.array([3, 2])}, "no array 'episode_streams'"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN, ids=[" ".join(changes) for changes, _ in BROKEN])
def test_a_file_that_contradicts_itself_is_refused_by_name(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **documented(**changes))
    with pytest.raises(BufferError, match=message):
        ReplayBuffer.load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episode_lengths": np.array([3, 1])}, "episode_lengths add up to 4, expected .* the 5 transitions"),
        ({"episode_lengths": np.array([6, -1])}, "episode_lengths add up to 5, expected numbers from 1"),
        ({"episode_lengths": np.array([2, 3])}, "do not lie at the ends"),
        ({"episode_lengths": np.array([3.0, 2.0])}, "episode_lengths has dtype float64, expected whole numbers"),
        ({"episode_streams": np.array([0, 1])}, r"outside of 0 to n_envs - 1 \(0\)"),
        ({"episode_ends": np.array([0, 1])}, "do not lie at the ends"),
        ({"episode_starts": np.array([1, 0])}, "another one follows it"),
        ({"episode_ends": np.array([1, 0]), "dones": np.array([0, 0, 1, 0, 0])}, "final_obs_mask is set"),
        ({"final_obs": np.zeros((3, 2))}, "final_obs has shape"),
        ({"n_envs": np.array(21)}, "n_envs is 21, expected at most capacity"),
    ],
)
def test_a_table_of_episodes_that_does_not_fit_the_steps_is_refused(tmp_path, changes, message):
    table = dict(
        truncations=np.zeros(5), episode_lengths=np.array([3, 2]), episode_streams=np.zeros(2, int),
        episode_starts=np.ones(2), episode_ends=np.ones(2), final_obs=np.ones((2, 2)), final_obs_mask=np.ones(2),
        n_envs=np.array(1),
    )  # fmt: skip
    np.savez(tmp_path / "a.npz", **documented(**table))
    assert ReplayBuffer.load(tmp_path / "a.npz").num_episodes == 2
    np.savez(tmp_path / "a.npz", **documented(**{**table, **changes}))
    with pytest.raises(BufferError, match=message):
        ReplayBuffer.load(tmp_path / "a.npz")


def test_no_file_a_text_and_a_truncated_zip_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError):
        ReplayBuffer.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(BufferError, match=r"text.npz is not a readable .npz file"):
        ReplayBuffer.load(tmp_path / "text.npz")
    filled().save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BufferError, match="damaged or cut short"):
        ReplayBuffer.load(tmp_path / "half.npz")
    with pytest.raises(BufferError, match="not a readable"):
        ReplayBuffer.load(tmp_path)


def test_a_member_shorter_than_its_header_says_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **documented())
    with zipfile.ZipFile(tmp_path / "a.npz") as source, zipfile.ZipFile(tmp_path / "b.npz", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:-4] if name == "obs.npy" else data)
    with pytest.raises(BufferError, match=r"array 'obs' of shape \(5, 2\) needs 40 bytes, the file has 36"):
        ReplayBuffer.load(tmp_path / "b.npz")


def test_a_directory_is_no_place_for_a_buffer(tmp_path):
    with pytest.raises(BufferError, match="runs is a directory, expected the path of a file"):
        (tmp_path / "runs").mkdir()
        filled().save(tmp_path / "runs")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["runs"]


def test_a_saved_file_is_as_readable_as_any_other(tmp_path):
    umask = os.umask(0o027)
    try:
        filled().save(tmp_path / "a.npz")
        write_atomically(tmp_path / "a.json", b"{}")
    finally:
        os.umask(umask)
    assert [os.stat(tmp_path / name).st_mode & 0o777 for name in ("a.npz", "a.json")] == [0o640, 0o640]


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "runs" / "a.npz"  # the directory is made
    write_npz(path, {"x": np.arange(3)})

    def chunks():
        yield np.zeros(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_npz(path, {"y": npz.ArrayChunks((9,), np.dtype(float), chunks())})
    assert os.listdir(tmp_path / "runs") == ["a.npz"]
    with np.load(path) as file:
        assert file["x"].tolist() == [0, 1, 2]


def test_images_of_flags_are_bright_in_files_with_all_arrays_too(tmp_path):
    buffer = ReplayBuffer(20, (1, 8, 8), 1)
    pictures = np.arange(5 * 64).reshape(5, 1, 8, 8) % 3 == 0
    buffer.add_episode(pictures, np.zeros((4, 1)), np.zeros(4))
    buffer.save(tmp_path / "bytes.npz")
    with np.load(tmp_path / "bytes.npz") as file:
        arrays = dict(file)
    flags = {name: arrays[name] > 0 for name in ("obs", "final_obs")}
    np.savez(tmp_path / "flags.npz", **arrays | flags)

    obs = ReplayBuffer.load(tmp_path / "flags.npz").sample(1, 5).obs

    assert np.array_equal(obs[0], np.where(pictures, 255, 0))


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_black_and_white_images_are_as_bright_as_floats_from_0_to_1(tmp_path, dtype):
    pictures = np.zeros((5, 1, 16, 16), dtype)
    pictures[:, :, ::2] = 1
    np.savez(tmp_path / "a.npz", **documented(obs=pictures, obs_shape=np.array([1, 16, 16])))

    batch = ReplayBuffer.load(tmp_path / "a.npz").sample(1, 4)

    seen = batch.obs[batch.obs_mask]
    assert len(seen) > 0
    assert torch.equal(seen[:, 0, :, 0], torch.tensor([255, 0] * 8, dtype=torch.uint8).expand(len(seen), -1))


def test_images_with_nan_are_not_given_a_line_with_nan():
    buffer = ReplayBuffer(20, (1, 16, 16), 1)
    with pytest.raises(BufferError, match="obs has NaN or infinite values, expected images of finite numbers"):
        buffer.add_episode(np.full((9, 1, 16, 16), np.nan), np.zeros((9, 1)), np.zeros(9))
