"""What the buffer stores and gives, and what it refuses; `test_replay_model.py` has a plain model of it.

The counting environment observes `1000 * episode + t`, so every number says where it belongs.
"""

import json

import numpy as np
import pytest
import torch
from helpers.buffers import content
from helpers.replay import HeldBack, acted, counts, ended

from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.replay.batch import BatchRequest
from worldflux.replay.buffer import ReplayBuffer


def test_a_sampled_step_follows_the_one_before_except_at_episode_starts():
    buffer = ReplayBuffer(60, (1,), 1, seed=0)
    for episode in range(20):
        buffer.add_episode(*counts(episode, 7), ended(7))
    batch = buffer.sample(200, 20)
    count = batch.obs[..., 0]  # [B, T]
    assert torch.all((count[:, 1:] == count[:, :-1] + 1) | batch.is_first[:, 1:])
    assert torch.all(count[batch.is_first] % 1000 == 0)
    assert torch.all(batch.terminations == (count % 1000 == 6))  # the seventh of seven steps
    final = count % 1000 == 7
    assert torch.all(batch.actions[..., 0] == torch.where(final, 0.0, acted(count)))
    assert torch.all(batch.rewards == torch.where(final, 0.0, count + 0.5))
    assert batch.obs_mask is None and not batch.truncations.any()
    assert count.min() == 11 * 1000 + 3  # 60 transitions: the eighth-last episode is cut to its last four steps
    assert (len(buffer), buffer.num_episodes) == (60, 9)


def test_steps_that_are_held_back_are_there_for_whoever_looks():
    buffer = ReplayBuffer(100, (1,), 1, seed=0)
    held = HeldBack(buffer)
    no, yes = np.zeros(1, bool), np.ones(1, bool)
    held.add(np.zeros((1, 1)), no, no, yes)
    assert len(buffer) == 1 and not held.steps
    held.add(np.ones((1, 1)), no, no, yes)
    assert buffer.sample(1, 2).obs[..., 0].tolist() == [[0, 1]]
    held.add(np.full((1, 1), 2), no, no, yes)
    buffer.end_episodes(final_obs=[[3]])
    held.add(np.full((1, 1), 4), no, no, yes)
    buffer.end_episodes(final_obs=[[5]])
    other = HeldBack(buffer)  # the first hands over and is forgotten
    assert not held.steps and buffer.is_attached(other) and not buffer.is_attached(held)
    assert (held.streams.tolist(), other.streams.tolist(), buffer.num_streams) == ([0], [0], 1)
    steps_of(buffer, 1, start=6)
    assert buffer.sample(1, 7).obs[..., 0].tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_a_buffer_with_room_does_not_drop_rows_and_one_that_grew_has_more():
    buffer = ReplayBuffer(10_000, (1,), 1, n_envs=2)
    row = np.zeros((2, 1))
    for _ in range(2):
        for _ in range(buffer.room):  # the worst case: every step ends an episode
            buffer.add(row, row, [0, 0], [1, 1], [0, 0], final_obs=row)
    before = len(buffer)
    while buffer.room:
        buffer.add(row, row, [0, 0], [1, 1], [0, 0], final_obs=row)
        before += 2
    assert len(buffer) == before < 10_000  # final rows fill it earlier
    buffer.grow(20_000)
    assert (buffer.capacity, len(buffer)) == (20_000, before) and buffer.room > 1000
    with pytest.raises(ConfigurationError, match="capacity is 5, expected a whole number from 20000"):
        buffer.grow(5)


def steps_of(buffer, steps, start=0):
    for t in range(start, start + steps):
        obs = np.array([[t + 1000.0 * env] for env in range(buffer.n_envs)])
        no = np.zeros(buffer.n_envs, bool)
        buffer.add(obs, obs, obs[:, 0], no, no)


def test_windows_that_were_just_completed_come_first_once_and_in_order_on_request():
    buffer = ReplayBuffer(100, (1,), 1, n_envs=2, seed=0)
    steps_of(buffer, 7)
    first = buffer.sample(3, 3, fresh=True).obs[..., 0].tolist()
    assert first == [[0, 1, 2], [1000, 1001, 1002], [3, 4, 5]]
    steps_of(buffer, 2, start=7)
    batch = buffer.sample(BatchRequest(50, 3), fresh=True).obs[..., 0].tolist()
    assert batch[:3] == [[1003, 1004, 1005], [6, 7, 8], [1006, 1007, 1008]]
    assert sum(window == [6, 7, 8] for window in batch) < 15  # from then on as often as any other of 14 windows
    assert len({tuple(window) for window in batch[3:]}) > 10


def test_waiting_windows_that_were_overwritten_are_dropped():
    buffer = ReplayBuffer(10, (1,), 1, seed=0)
    steps_of(buffer, 14)  # rows 4 to 13 remain: of the windows at 0, 3, 6, 9 the last two are whole
    assert buffer.sample(2, 3, fresh=True).obs[..., 0].tolist() == [[6, 7, 8], [9, 10, 11]]


def test_without_a_request_recorded_windows_are_drawn_like_all_others_and_stay_fresh():
    buffer = ReplayBuffer(10, (1,), 1, seed=0)
    steps_of(buffer, 14)
    batches = []
    for seq_len in (5, 3, 3):  # a window of another length between them has no influence
        buffer.seed(1)
        batches.append(buffer.sample(400, seq_len))
    assert torch.equal(batches[1].row_ids, batches[2].row_ids)
    starts = torch.bincount(batches[1].row_ids[:, 0] - 4)
    assert len(starts) == 8 and starts.min() > 25 and starts.max() < 80  # 50 expected, sigma 7
    assert buffer.sample(2, 3, fresh=True).obs[..., 0].tolist() == [[6, 7, 8], [9, 10, 11]]


def test_whole_episodes_and_loaded_ones_are_drawn_uniformly_from_the_start(tmp_path):
    buffer = ReplayBuffer(1000, (1,), 1, seed=0)
    buffer.add_episode(*counts(0, 99), ended(99))
    starts = torch.cat([buffer.sample(1000, 51).obs[:, 0, 0] for _ in range(10)])
    frequency = torch.bincount(starts.long(), minlength=50)
    assert len(frequency) == 50
    assert frequency.min() > 140 and frequency.max() < 260  # 200 expected, sigma 14
    state = buffer.rng_state()
    waiting = buffer.sample(5, 10, fresh=True)
    buffer.set_rng_state(state)
    assert torch.equal(waiting.row_ids, buffer.sample(5, 10).row_ids)
    steps_of(buffer, 60)
    buffer.save(tmp_path / "buffer.npz")
    loaded, again = (ReplayBuffer.load(tmp_path / "buffer.npz", seed=0) for _ in range(2))
    assert torch.equal(loaded.sample(5, 10, fresh=True).row_ids, again.sample(5, 10).row_ids)


def test_one_seed_gives_the_same_samples_and_the_state_continues_them():
    buffers = [ReplayBuffer(100, (1,), 1, seed=seed) for seed in (7, 7, 8)]
    for buffer in buffers:
        buffer.add_episode(*counts(0, 80), ended(80))
    same, again, other = (buffer.sample(20, 5).obs for buffer in buffers)
    assert torch.equal(same, again) and not torch.equal(same, other)
    state = json.loads(json.dumps(buffers[0].rng_state()))
    later = buffers[0].sample(20, 5).obs
    buffers[2].set_rng_state(state)
    assert torch.equal(buffers[2].sample(20, 5).obs, later)
    before = buffers[2].rng_state()
    no_position = {**state, "state": {"state": 1, "inc": 1}, "uinteger": None}
    for wrong in ({"state": 1}, {**state, "bit_generator": "MT19937"}, {**state, "state": {"state": -1}}, no_position):
        with pytest.raises(BufferError, match="rng_state"):
            buffers[2].set_rng_state(wrong)
        assert buffers[2].rng_state() == before


def test_a_request_and_three_arguments_give_the_same_batch():
    buffer = ReplayBuffer(100, (1,), 1)
    buffer.add_episode(*counts(0, 80), ended(80))
    buffer.seed(1)
    by_request = buffer.sample(BatchRequest(batch_size=4, seq_len=6))
    buffer.seed(1)
    assert torch.equal(by_request.obs, buffer.sample(4, seq_len=6, device="cpu").obs)
    assert buffer.sample(2).seq_len == buffer.sample(BatchRequest(2)).seq_len == 50


def test_dictionaries_of_images_and_vectors_keep_their_dtypes():
    shapes = {"camera": (3, 8, 8), "speed": (2,)}
    buffer = ReplayBuffer(50, shapes, 1, seed=0)
    camera = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((3, 8, 8), np.uint8)
    buffer.add_episode({"camera": camera, "speed": np.arange(12.0).reshape(6, 2)}, np.zeros((5, 1)), np.zeros(5))
    batch = buffer.sample(9, 6)
    assert buffer.obs_shape == shapes
    assert batch.obs["camera"].dtype == torch.uint8 and batch.obs["camera"].shape == (9, 6, 3, 8, 8)
    assert batch.obs["camera"][0, :, 2, 7, 7].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.obs["speed"][0, :, 1].tolist() == [1, 3, 5, 7, 9, 11]


def test_bytes_that_are_no_images_are_given_as_floats():
    buffer = ReplayBuffer(10, (2,), 1, obs_dtype=np.uint8)
    buffer.add_episode(np.array([[1, 2], [3, 4]]), np.zeros((1, 1)), np.zeros(1))
    assert buffer.sample(1, 2).obs.tolist() == [[[1.0, 2.0], [3.0, 4.0]]]


def test_a_last_step_without_a_flag_counts_as_truncated():
    buffer = ReplayBuffer(50, (1,), 1)
    obs, actions, rewards = counts(0, 3)
    buffer.add_episode(obs, actions, rewards)
    buffer.add_episode(obs, actions, rewards, [0, 0, 0])
    buffer.add_episode(obs, actions, rewards, terminations=[0, 0, 1], truncations=[0, 0, 1])
    batch = buffer.sample(1, 12)
    assert batch.terminations[0].nonzero().flatten().tolist() == [10]
    assert batch.truncations[0].nonzero().flatten().tolist() == [2, 6, 10]
    assert batch.is_first[0].nonzero().flatten().tolist() == [0, 4, 8]


def test_what_is_stored_is_a_copy_and_what_is_sampled_too():
    buffer = ReplayBuffer(10, (1,), 1)
    obs, actions, rewards = counts(0, 3)
    obs = obs.astype(np.float32)
    buffer.add_episode(obs, actions, rewards)
    obs[:] = -1
    buffer.sample(1, 4).obs.fill_(-2)
    assert buffer.sample(1, 4).obs[0, :, 0].tolist() == [0, 1, 2, 3]


def test_half_precision_extras_are_cast_on_the_way_in():
    buffer = ReplayBuffer(10, (1,), 1, extras={"deter": ((2,), np.float16), "stoch": ((3,), np.uint8)})
    steps_of(buffer, 4)
    batch = buffer.sample(1, 4)
    assert batch.extras["deter"].dtype == torch.float16 and not batch.extras["deter"].any()
    deter = torch.rand(1, 3, 2, requires_grad=True).bfloat16()
    buffer.update_extras(batch.row_ids[:, 1:], {"deter": deter, "stoch": torch.full((1, 3, 3), 7)})
    after = buffer.sample(1, 4).extras
    assert torch.equal(after["deter"][0, 1:], deter[0].half()) and not after["deter"][0, 0].any()
    assert after["stoch"][0, :, 0].tolist() == [0, 7, 7, 7]
    with pytest.raises(BufferError, match="without extras 'latent'; it has \\['deter', 'stoch'\\]"):
        buffer.update_extras(batch.row_ids, {"latent": deter})
    with pytest.raises(ShapeMismatchError, match=r"extras\['stoch'\] has shape \(1, 4, 2\), expected \(1, 4, 3\)"):
        buffer.update_extras(batch.row_ids, {"stoch": torch.zeros(1, 4, 2)})


def episode(length=4, **changes):
    obs, actions, rewards = counts(0, length)
    return {**dict(obs=obs, actions=actions, rewards=rewards), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"obs": np.zeros((5, 2))}, ShapeMismatchError, r"obs has shape \(5, 2\), expected \(5, 1\)"),
        ({"obs": np.zeros((3, 1))}, ShapeMismatchError, "obs has 3 rows, actions has 4 and rewards has 4"),
        ({"rewards": np.zeros(3)}, ShapeMismatchError, "actions has 4 and rewards has 3. Expected one reward for each"),
        ({"rewards": np.zeros(5)}, ShapeMismatchError, "actions has 4 and rewards has 5. Expected one reward for each"),
        ({"rewards": 1.0}, ShapeMismatchError, "obs has 5 rows, actions has 4 and rewards has 1"),
        ({"actions": np.zeros((3, 1))}, ShapeMismatchError, "actions has 3 and rewards has 4"),
        ({"actions": np.zeros(4)}, ShapeMismatchError, "one-hot"),
        ({"actions": np.zeros((4, 3))}, ShapeMismatchError, r"\(4, 3\), expected \(4, 1\)"),
        ({"rewards": np.zeros((4, 1))}, ShapeMismatchError, r"rewards has shape \(4, 1\), expected \(4,\)"),
        ({"rewards": np.zeros(0)}, ShapeMismatchError, "at least one step"),
        ({"rewards": [0, 0, np.nan, 0]}, BufferError, r"rewards has nan at index \(2,\)"),
        ({"actions": np.full((4, 1), np.inf)}, BufferError, r"actions has inf at index \(0, 0\)"),
        ({"obs": np.full((5, 1), 1e300)}, BufferError, "obs has inf"),
        ({"obs": np.array([["a"]] * 5)}, BufferError, "dtype <U1, expected numbers"),
        ({"obs": np.array([[None]] * 5)}, BufferError, "dtype object"),
        ({"obs": [[1], [2, 3]]}, ShapeMismatchError, "obs is no array"),
        ({"obs": {"a": np.zeros((5, 1))}}, ShapeMismatchError, r"obs is a dict with \['a'\], expected one array"),
        ({"dones": [0, 0, 0, 2]}, BufferError, "dones has values other than 0 and 1"),
        ({"dones": [0, 1]}, ShapeMismatchError, r"dones has shape \(2,\), expected \(4,\)"),
        ({"dones": [0] * 4, "terminations": [0] * 4}, BufferError, "pass one of them"),
    ],
)  # fmt: skip
def test_an_episode_that_does_not_fit_is_refused_and_nothing_is_stored(changes, error, message):
    buffer = ReplayBuffer(20, (1,), 1)
    for _ in range(6):
        buffer.add_episode(**episode())  # full
    before = content(buffer)
    with pytest.raises(error, match=message):
        buffer.add_episode(**episode(**changes))
    assert content(buffer) == before


@pytest.mark.filterwarnings("error")
def test_recorded_numbers_whose_changes_float32_loses_are_warned_of():
    since_1970, count = 1.75e9 + np.arange(21.0)[:, None], np.zeros((20, 1))
    buffer = ReplayBuffer(100, (1,), 1)
    with pytest.warns(UserWarning, match="obs has values such as 1750000020 whose changes are lost"):
        buffer.add_episode(since_1970, count, count[:, 0])
    with pytest.warns(UserWarning, match="rewards has values such as .* apart steps of 128 there"):
        buffer.add_episode(np.zeros((21, 1)), count, since_1970[:20, 0].astype(np.int64))
    for told_apart in (
        1e6 * np.arange(21.0)[:, None],
        np.full((21, 1), 1.75e9),
        since_1970.astype(np.float32),
        since_1970 - 1.75e9,
    ):
        buffer.add_episode(told_apart, count, count[:, 0])

    # The rows of one step are of different environments, and do not follow each other.
    several, flags = ReplayBuffer(100, (1,), 1, n_envs=20), np.zeros(20, np.bool_)
    several.add(since_1970[:20], count, np.zeros(20), flags, flags)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"obs": np.zeros((1, 1))}, ShapeMismatchError, r"obs has shape \(1, 1\), expected \(2, 1\)"),
        ({"obs": np.full((2, 1), np.nan)}, BufferError, "obs has nan"),
        ({"terminations": [True, False]}, BufferError, r"environments \[0\], but final_obs is missing"),
        ({"truncations": [0, 1], "final_obs": np.zeros((1, 1))}, ShapeMismatchError, "final_obs has shape"),
        ({"truncations": [0, 1], "final_obs": [[0], [np.nan]]}, BufferError, "final_obs has nan"),
        ({"extras": {"mark": np.zeros(2)}}, BufferError, "without extras 'mark'"),
        ({"active": [True]}, ShapeMismatchError, r"active has shape \(1,\), expected \(2,\)"),
        ({"active": [0, 1], "rewards": [0]}, ShapeMismatchError, r"rewards has shape \(1,\), expected \(2,\)"),
        ({"active": [0, 1], "rewards": [0, np.nan]}, BufferError, r"rewards has nan at index \(1,\)"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_and_nothing_is_stored(changes, error, message):
    buffer = ReplayBuffer(20, (1,), 1, n_envs=2)
    step = dict(obs=np.zeros((2, 1)), actions=np.zeros((2, 1)), rewards=[0, 0], terminations=[0, 0], truncations=[0, 0])
    with pytest.raises(error, match=message):
        buffer.add(**{**step, **changes})
    assert len(buffer) == 0
    buffer.add(**step, active=[False, False])
    assert len(buffer) == 0
    buffer.add(**{**step, "truncations": [0, 1], "final_obs": [[np.nan], [5]]})  # only the ended one's row is read
    assert (len(buffer), buffer.num_episodes) == (2, 1)
    with pytest.raises(BufferError, match="env is 2, expected 0 to 1"):
        buffer.end_episodes(2)
    with pytest.raises(BufferError, match="final_obs has nan"):
        buffer.end_episodes(final_obs=np.full((2, 1), np.nan))
    assert buffer.num_episodes == 1


def test_channel_last_images_are_answered_with_the_transposition_that_helps():
    for channels in (1, 3, 4, 9):  # the last are stacked frames
        with pytest.raises(ShapeMismatchError, match=rf"channel-last.*pass \({channels}, 64, 64\)"):
            ReplayBuffer(10, (64, 64, channels), 1)
        ReplayBuffer(10, (channels, 64, 64), 1)
    buffer = ReplayBuffer(10, (3, 16, 12), 1)
    images = np.zeros((3, 16, 12, 3), np.uint8)
    with pytest.raises(ShapeMismatchError, match=r"np.transpose\(obs, \(0, 3, 1, 2\)\).*\(3, 3, 16, 12\)"):
        buffer.add_episode(images, np.zeros((2, 1)), np.zeros(2))
    buffer.add_episode(np.transpose(images, (0, 3, 1, 2)), np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(ShapeMismatchError, match="channel-last"):
        buffer.add(images[:1], np.zeros((1, 1)), [0], [0], [0])


FLAGS = np.arange(2 * 64).reshape(2, 1, 8, 8) % 3 == 0


def added(buffer, obs, final_obs):
    buffer.add(obs, np.zeros((1, 1)), np.zeros(1), np.ones(1), np.zeros(1), final_obs=final_obs)


def ended_from_outside(buffer, obs, final_obs):
    buffer.add(obs, np.zeros((1, 1)), np.zeros(1), np.zeros(1), np.zeros(1))
    buffer.end_episodes(final_obs=final_obs)


def added_whole(buffer, obs, final_obs):
    obs = {"map": np.concatenate([obs["map"], final_obs["map"]])}
    buffer.add_episode(obs, np.zeros((1, 1)), np.zeros(1))


@pytest.mark.parametrize("door", [added, ended_from_outside, added_whole])
@pytest.mark.parametrize("of", [np.asarray, torch.from_numpy])
def test_images_of_flags_become_black_and_white(door, of):
    buffer = ReplayBuffer(10, {"map": (1, 8, 8)}, 1)
    door(buffer, {"map": of(FLAGS[:1])}, {"map": of(FLAGS[1:])})
    stored = buffer.sample(1, 2).obs["map"]
    assert stored.dtype == torch.uint8 and np.array_equal(stored[0], np.where(FLAGS, 255, 0))


@pytest.mark.parametrize(("dtype", "shape"), [(np.uint8, (8,)), (np.float32, (1, 8, 8))])
def test_flags_that_are_no_bytes_of_images_stay_0_and_1(dtype, shape):
    buffer = ReplayBuffer(10, shape, 1, obs_dtype=dtype)
    flags = FLAGS.reshape(-1)[: 2 * np.prod(shape)].reshape(2, *shape)
    buffer.add_episode(flags, np.zeros((1, 1)), np.zeros(1))
    assert np.array_equal(buffer.sample(1, 2).obs[0], flags.astype(float))


def test_numbers_that_are_no_images_are_not_advised_like_images():
    with pytest.raises(
        BufferError, match=r"dtype float64, expected uint8 \(0 to 255\)\. Or create the buffer with obs_dty"
    ) as no:
        ReplayBuffer(10, (2,), 1, obs_dtype=np.uint8).add_episode(np.full((2, 2), 0.5), np.zeros((1, 1)), np.zeros(1))
    assert "image" not in str(no.value)


def test_images_are_bytes_unless_the_buffer_was_made_for_floats():
    images = np.full((2, 1, 8, 8), 0.5)
    step = (np.zeros((1, 1)), np.zeros(1))
    with pytest.raises(BufferError, match=r"dtype float64, expected uint8.*obs_dtype=np.float32"):
        ReplayBuffer(10, (1, 8, 8), 1).add_episode(images, *step)
    with pytest.raises(BufferError, match="values from 0 to 256, expected 0 to 255"):
        ReplayBuffer(10, (1, 8, 8), 1).add_episode(np.arange(2)[:, None, None, None] * np.full((1, 8, 8), 256), *step)
    buffer = ReplayBuffer(10, (1, 8, 8), 1, obs_dtype=np.float32)
    buffer.add_episode(images, *step)
    assert buffer.sample(1, 2).obs.unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, (1,), 1), ConfigurationError, "capacity is 0"),
        ((10, (1,), 1.5), ConfigurationError, "action_dim is 1.5"),
        ((10, (), 1), ConfigurationError, r"that of a number is \(1,\)"),
        ((10, 4, 1), ConfigurationError, "obs_shape is 4"),
        ((10, {}, 1), ConfigurationError, "empty dict"),
        ((10**15, (3, 64, 64), 1), BufferError, "1000000000000000 transitions does not fit"),
        ((10**30, (1,), 1), ConfigurationError, "capacity is above 9e18"),
    ],
)
def test_a_buffer_that_cannot_be_says_which_argument_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        ReplayBuffer(*arguments)
    with pytest.raises(ConfigurationError, match=r"capacity is 2, expected at least n_envs \(3\)"):
        ReplayBuffer(2, (1,), 1, n_envs=3)
    with pytest.raises(ConfigurationError, match="obs_dtype is float64"):
        ReplayBuffer(2, (1,), 1, obs_dtype=np.float64)
    for seed in (-1, "a", 0.5):
        with pytest.raises(ConfigurationError, match=f"seed is {seed!r}, expected a whole number from 0"):
            ReplayBuffer(2, (1,), 1, seed=seed)
    for extras in (3, (3, float), ((0,), float), ("3", float), ((3,), "words"), ((3,), object)):
        with pytest.raises(ConfigurationError, match=r"extras\['x'\] is .*, expected a shape"):
            ReplayBuffer(2, (1,), 1, extras={"x": extras})
    with pytest.raises(ConfigurationError, match="extras is 3, expected a dict"):
        ReplayBuffer(2, (1,), 1, extras=3)


def test_a_buffer_too_small_to_sample_from_says_both_numbers():
    buffer = ReplayBuffer(100, (1,), 1)
    buffer.add_episode(**episode(8))
    with pytest.raises(BufferError, match=r"longest stream has 9 rows, but seq_len is 10.*Add more steps"):
        buffer.sample(4, 10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 3), BufferError, "batch_size is 0, expected a whole number from 1"),
        ((2.5, 3), BufferError, "batch_size is 2.5, expected a whole number"),
        (("2", 3), BufferError, "batch_size is '2', expected a whole number"),
        ((2, 2.5), BufferError, "seq_len is 2.5, expected a whole number"),
        ((True, 3), BufferError, "batch_size is True"),
        ((BatchRequest(2, -1),), BufferError, "seq_len is -1"),
        ((2, 3, "foo"), ConfigurationError, "device is 'foo', expected 'auto'"),
        ((2, 3, "cuda:99"), ConfigurationError, "device is 'cuda:99', but torch sees"),
    ],
)
def test_a_batch_that_cannot_be_given_says_which_argument_is_wrong(arguments, error, message):
    buffer = ReplayBuffer(20, (1,), 1, seed=0)
    buffer.add_episode(**episode(8))
    before = buffer.rng_state()
    with pytest.raises(error, match=message):
        buffer.sample(*arguments)
    assert buffer.rng_state() == before
    with pytest.raises(BufferError, match=r"seq_len is 2\.5"):
        buffer.num_windows(2.5)
    assert buffer.sample(np.int64(2), torch.tensor(3)).obs.shape == (2, 3, 1)
