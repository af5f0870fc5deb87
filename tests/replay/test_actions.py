"""Actions are stored as they were executed, of one kind, and no model learns from those of another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers.small_models import DREAMERV3, SIZES, TDMPC2
from stable_baselines3.common.vec_env import DummyVecEnv

from worldflux import WorldFluxAgent, create_world_model
from worldflux.envs import RecordEpisodes, VecRecordEpisodes, collect
from worldflux.errors import BufferError, ConfigurationError
from worldflux.training import Batch, ReplayBuffer, Trainer, TrainingConfig, train

STEPS = dict(total_steps=1, batch_size=2, sequence_length=6, device="cpu")
RNG = np.random.default_rng(0)
ONE_HOT = np.eye(2)[RNG.integers(0, 2, 30)]
NUMBERS = RNG.integers(0, 4, (30, 1))
SOFT = RNG.uniform(-1, 1, (30, 3))
TWO_PARTS = np.concatenate([np.eye(2)[RNG.integers(0, 2, 30)], np.eye(3)[RNG.integers(0, 3, 30)]], 1)


def model_of(family: str, action_dim: int, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = SIZES[family]
    return create_world_model(f"{family}:tiny", obs_shape=(4,), action_dim=action_dim, **sizes, **fields)


def buffer_of(actions: Any, **named: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(100, (4,), np.shape(actions)[1], **named)
    buffer.add_episode(np.zeros((31, 4)), actions, np.zeros(30))
    return buffer


def file_of(path: Path, actions: Any, **more: Any) -> Path:
    count, width = np.shape(actions)
    arrays = dict(
        obs=np.zeros((count, 4), np.float32),
        actions=actions,
        rewards=np.zeros(count),
        dones=np.zeros(count),
        obs_shape=[4],
        action_dim=width,
        capacity=count,
    )
    np.savez(path / "mine.npz", **arrays, **more)
    return path / "mine.npz"


# What may be stored

REFUSED = [
    (2 * SOFT, {}, r"values from -1\.\d+ to 1\.\d+, expected -1 to 1 .* action_low and action_high"),
    (np.full((30, 2), 512.0), {}, "values from 512 to 512"),
    (NUMBERS, {}, r"whole numbers from 0 to 3 in one column.*np\.eye\(4\)"),
    (NUMBERS.astype(float), {}, r"np\.eye\(4\)\[actions\[:, 0\]\.astype\(int\)\]"),
    (ONE_HOT.argmax(1)[:, None], {}, r"whole numbers from 0 to 1 in one column.*np\.eye\(2\)"),
    (NUMBERS, {"action_type": "discrete"}, r"\[0\] is .* expected one-hots of 1 entries"),
    (SOFT, {"action_type": "discrete"}, r"\[0\] is .* expected one-hots of 3 entries"),
    (np.zeros((30, 3)), {"action_type": "discrete"}, "expected one-hots of 3 entries"),
    (np.ones((30, 3)), {"action_type": "discrete"}, "expected one-hots of 3 entries"),
    (TWO_PARTS, {"action_type": "multi_discrete", "action_classes": (3, 2)}, r"expected one-hots of 3 \+ 2 entries"),
    (np.full((30, 2), np.nan), {}, "nan"),
    (np.full((30, 2), np.inf), {}, "inf"),
]


@pytest.mark.parametrize("door", ["add_episode", "load"])
@pytest.mark.parametrize(("actions", "named", "message"), REFUSED)
def test_other_actions_are_refused_with_what_to_do(
    door: str, actions: Any, named: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BufferError, match=message):
        if door == "add_episode":
            buffer_of(actions, **named)
        else:
            ReplayBuffer.load(file_of(tmp_path, actions), **named)


def test_steps_of_a_kind_that_was_named_are_refused_at_once_and_others_when_training_starts(tmp_path: Path) -> None:
    for named, wrong in (({"action_type": "continuous"}, [[2.0, 0.0]]), ({"action_type": "discrete"}, [[0.5, 0.5]])):
        buffer = ReplayBuffer(100, (4,), 2, **named)
        with pytest.raises(BufferError, match=r"expected (-1 to 1|one-hots)"):
            buffer.add(np.zeros((1, 4)), wrong, [0.0], [False], [False])
    buffer = ReplayBuffer(100, (4,), 2)
    for _ in range(30):
        buffer.add(np.zeros((1, 4)), [[2.0, 0.0]], [0.0], [False], [False])
    buffer.save(tmp_path / "saved.npz")
    for data in (buffer, ReplayBuffer.load(tmp_path / "saved.npz")):
        with pytest.raises(BufferError, match="has actions from 0 to 2, expected -1 to 1"):
            train(model_of("tdmpc2", 2), data, **STEPS)


def test_bounds_rescale_actions_in_the_environments_own_units(tmp_path: Path) -> None:
    low, high = np.array([-2.0, 0.0]), np.array([2.0, 512.0])
    executed = np.array([[-2.0, 512.0], [1.0, 128.0], [0.0, 256.0]] * 10)
    expected = np.array([[-1.0, 1.0], [0.5, -0.5], [0.0, 0.0]] * 10, np.float32)
    buffer = ReplayBuffer(100, (4,), 2)
    buffer.add_episode(np.zeros((31, 4)), executed, np.zeros(30), action_low=low, action_high=high)
    loaded = ReplayBuffer.load(file_of(tmp_path, executed), action_low=low, action_high=high)
    for one in (buffer, loaded):
        assert np.array_equal(one.stored()[0].actions[:30], expected)
    numbers = ReplayBuffer.load(file_of(tmp_path, NUMBERS), action_low=0, action_high=3)
    assert np.allclose(numbers.stored()[0].actions[:30], NUMBERS * 2 / 3 - 1)
    for low, high in ((0, 1), (1, 3)):
        beyond = rf"from 0 to 3, expected them between action_low \({low}\) and action_high \({high}\)"
        with pytest.raises(BufferError, match=beyond):  # and not that whole numbers look like discrete actions
            ReplayBuffer.load(file_of(tmp_path, NUMBERS), action_low=low, action_high=high)
    for bounds in (
        {"action_low": -1},
        {"action_high": 1},
        {"action_low": 1, "action_high": 1},
        {"action_low": "a", "action_high": 1},
        {"action_low": [0, 0, 0], "action_high": 1},
    ):
        with pytest.raises(ConfigurationError, match="action_low"):
            ReplayBuffer.load(file_of(tmp_path, executed), **bounds)


def test_a_saved_buffer_is_not_rescaled_a_second_time(tmp_path: Path) -> None:
    buffer = ReplayBuffer(100, (4,), 2, action_type="continuous")
    buffer.add_episode(np.zeros((31, 4)), np.full((30, 2), 2.0), np.zeros(30), action_low=-2, action_high=2)
    buffer.save(tmp_path / "saved.npz")

    with pytest.raises(BufferError, match=r"saved\.npz .* rescaled already.*Leave action_low and action_high out"):
        ReplayBuffer.load(tmp_path / "saved.npz", action_low=-2, action_high=2)


def test_a_rounding_beyond_one_ends_at_one() -> None:
    stored = buffer_of(np.full((30, 2), 1.00001)).stored()[0].actions[:30]
    assert np.array_equal(stored, np.ones((30, 2), np.float32))


# Which kind it is


@pytest.mark.parametrize(
    ("actions", "kind"),
    [
        (ONE_HOT, ("discrete", (2,))),
        (SOFT, ("continuous", ())),
        (np.zeros((30, 2)), ("continuous", ())),
        (np.ones((30, 1)), ("continuous", ())),
        (np.sign(SOFT), ("continuous", ())),
        (TWO_PARTS, (None, None)),
        (ONE_HOT[:, :1], (None, None)),
    ],
)
def test_a_file_that_does_not_say_its_kind_is_judged_by_its_values(actions: Any, kind: Any, tmp_path: Path) -> None:
    loaded = ReplayBuffer.load(file_of(tmp_path, actions))
    assert (loaded.action_type, loaded.action_classes) == kind


def test_a_file_carries_the_kind_of_its_actions(tmp_path: Path) -> None:
    two = dict(action_type="multi_discrete", action_classes=(2, 3))
    for actions, named in ((ONE_HOT, {"action_type": "continuous"}), (TWO_PARTS, two), (ONE_HOT, {})):
        buffer = buffer_of(actions, **named)
        buffer.save(tmp_path / "saved.npz")
        loaded = ReplayBuffer.load(tmp_path / "saved.npz")
        if named:
            assert (loaded.action_type, loaded.action_classes) == (buffer.action_type, buffer.action_classes)
            with pytest.raises(BufferError, match="was asked for"):
                ReplayBuffer.load(tmp_path / "saved.npz", action_type="discrete")
        assert np.array_equal(loaded.stored()[0].actions, buffer.stored()[0].actions)
    assert ReplayBuffer.load(file_of(tmp_path, TWO_PARTS), **two).action_classes == (2, 3)
    for damaged in ([3, 3], [-1, 6], [0, 5]):
        with pytest.raises(BufferError, match="action_classes is"):
            ReplayBuffer.load(file_of(tmp_path, TWO_PARTS, action_classes=damaged))


def test_a_kind_that_cannot_be_is_refused() -> None:
    for named in (
        {"action_type": "discreet"},
        {"action_type": "multi_discrete"},
        {"action_type": "multi_discrete", "action_classes": (2, 2)},
        {"action_type": "continuous", "action_classes": (3,)},
        {"action_classes": (2,)},
        {"action_classes": (0, 3)},
    ):
        with pytest.raises(ConfigurationError, match="action_"):
            ReplayBuffer(100, (4,), 3, **named)


DISCRETE = {"action_type": "discrete"}
MIXED = [
    ("dreamerv3", ONE_HOT, {}, {}, "action_type='discrete'"),
    ("tdmpc2", ONE_HOT, {}, {}, "action_type='discrete'"),
    ("dreamerv3", ONE_HOT, DISCRETE, {}, "action_type='discrete'"),
    ("dreamerv3", SOFT, {}, DISCRETE, "expected one-hots of 3|Create the model with action_type='continuous'"),
    ("dreamerv3", SOFT, {"action_type": "continuous"}, DISCRETE, "Create the model with action_type='continuous'"),
    ("dreamerv3", ONE_HOT, {"action_type": "continuous"}, DISCRETE, "action_type='continuous'"),
    ("dreamerv3", TWO_PARTS, {}, {}, "does not say whether they are continuous or discrete"),
    ("dreamerv3", TWO_PARTS, {}, DISCRETE, "expected one-hots of 5"),
    ("dreamerv3", ONE_HOT[:, :1].astype(np.float32), {}, {}, "does not say whether they are continuous or discrete"),
]


@pytest.mark.parametrize(("family", "actions", "of_buffer", "of_model", "message"), MIXED)
@pytest.mark.parametrize("way", ["buffer", "file", "part", "eval_data"])
def test_a_model_refuses_actions_of_another_kind(
    family: str, actions: Any, of_buffer: Any, of_model: Any, message: str, way: str, tmp_path: Path
) -> None:
    model, buffer = model_of(family, actions.shape[1], **of_model), buffer_of(actions, **of_buffer)
    buffer.add_episode(np.zeros((31, 4)), actions, np.zeros(30))
    data: Any = buffer
    if way == "file":
        buffer.save(tmp_path / "buffer.npz")
        data = ReplayBuffer.load(tmp_path / "buffer.npz")
    elif way == "part":
        data, _ = buffer.split(0.5, seq_len=6)
    right = SOFT[:, : actions.shape[1]] if not of_model else np.eye(actions.shape[1])[np.zeros(30, int)]
    with pytest.raises(BufferError, match=message):
        if way == "eval_data" and right.shape[1] == actions.shape[1]:
            train(model, buffer_of(right), **STEPS, eval_data=buffer)
        else:
            train(model, data, **STEPS)


def test_a_kind_that_was_named_trains() -> None:
    train(model_of("dreamerv3", 2), buffer_of(ONE_HOT, action_type="continuous"), **STEPS)
    train(model_of("dreamerv3", 2, action_type="discrete"), buffer_of(ONE_HOT), **STEPS)
    classes = dict(action_type="multi_discrete", action_classes=(2, 3))
    train(model_of("dreamerv3", 5, **classes), buffer_of(TWO_PARTS), **STEPS)
    train(model_of("tdmpc2", 3), buffer_of(SOFT), **STEPS)


def batch_of(actions: torch.Tensor) -> Batch:
    B, T, _ = actions.shape
    return Batch(torch.zeros(B, T, 4), actions, torch.zeros(B, T), torch.zeros(B, T))


class Gives:
    """The same batch again and again."""

    def __init__(self, actions: torch.Tensor) -> None:
        self.batch = batch_of(actions)

    def sample(self, batch_size: int, seq_len: int | None = None, device: str = "cpu") -> Batch:
        return self.batch


def test_a_providers_actions_are_looked_at_once() -> None:
    with pytest.raises(BufferError, match="The batch's actions have values from 2 to 2"):
        Trainer(model_of("tdmpc2", 1), TrainingConfig(device="cpu")).step(batch_of(torch.full((1, 5, 1), 2.0)))
    with pytest.raises(BufferError, match="The batch's actions have values from -50 to 50, expected -1 to 1"):
        train(model_of("dreamerv3", 1), Gives(50.0 * torch.tensor([[[1.0], [-1.0]]])), **STEPS)
    with pytest.raises(BufferError, match="expected one-hots of 2"):
        train(model_of("dreamerv3", 2, action_type="discrete"), Gives(torch.full((1, 2, 2), 0.5)), **STEPS)


# What was executed


@pytest.mark.parametrize("scale", [1, 2, 50])
def test_dreamerv3s_losses_do_not_depend_on_what_lies_beyond_one(scale: int) -> None:
    model = model_of("dreamerv3", 2)
    drawn = scale * torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(1))
    found = []
    for actions in (drawn, drawn.clamp(-1, 1)):
        torch.manual_seed(0)
        model.zero_grad()
        output = model.loss(batch_of(actions))
        output.loss.backward()
        found.append([*output.terms.values(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert (drawn.abs() > 1).any()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Told(gym.Env):
    """Remembers what its step was given."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space, self.given = action_space, []

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        self.given.append(np.asarray(action))
        return np.zeros(3, np.float32), 0.0, False, len(self.given) % 20 == 0, {}


BOXES = {
    "numbers": spaces.Box(np.array([-2, 0], np.float32), np.array([2, 512], np.float32)),
    "whole numbers": spaces.Box(-3, 4, (2,), np.int64),
    "one that is fixed": spaces.Box(np.array([-2, 7], np.float32), np.array([2, 7], np.float32)),
}


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2", "dreamerv3 that plans"])
@pytest.mark.parametrize("space", BOXES)
def test_an_agent_stores_the_actions_that_its_environments_carried_out(family: str, space: str) -> None:
    env = Told(BOXES[space])
    sizes, plans = (TDMPC2 if family == "tdmpc2" else DREAMERV3), "plans" in family
    agent = WorldFluxAgent(
        f"{family.split()[0]}:tiny",
        env,
        model_kwargs=sizes,
        batch_size=2,
        seq_len=4,
        train_ratio=1,
        learning_starts=15,
        planner="mppi" if plans else None,
        planner_kwargs=dict(num_samples=8, num_elites=4, iterations=1) if plans else None,
        device="cpu",
        seed=0,
    ).learn(40)
    rows = agent.replay_buffer.stored()[0]
    stored = np.asarray(rows.actions[rows.stored_at()])
    executed = agent.action_codec.from_env(np.stack(env.given))
    first = stored[:20]  # of the first episode; a row without an action follows it
    assert np.allclose(first, executed[:20], atol=1e-6) and np.allclose(stored[21:41], executed[20:40], atol=1e-6)
    assert np.abs(stored).max() <= 1
    batch = agent.replay_buffer.sample(2, 5)
    assert batch.actions.abs().max() <= 1


def test_recorders_store_actions_beyond_the_space_as_the_nearest_inside() -> None:
    space = BOXES["numbers"]
    given = np.array([[5.0, -100.0], [1.0, 600.0]], np.float32)
    expected = np.array([[1.0, -1.0], [0.5, 1.0]], np.float32)
    alone, several = ReplayBuffer(100, (3,), 2), ReplayBuffer(100, (3,), 2, n_envs=2)
    env = RecordEpisodes(Told(space), alone)
    env.reset()
    for action in given:
        env.step(action)
    venv = VecRecordEpisodes(DummyVecEnv([lambda: Told(space)] * 2), several)
    venv.reset()
    venv.step(given)
    assert np.array_equal(alone.stored()[0].actions[:2], expected)
    rows = several.stored()[0]
    assert np.array_equal(rows.actions[rows.base], expected)
    policy = collect(Told(space), lambda obs: given[0], steps=5)
    assert np.array_equal(policy.stored()[0].actions[:5], np.tile(expected[0], (5, 1)))


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        (spaces.Discrete(3), ("discrete", (3,))),
        (spaces.MultiDiscrete([3, 2]), ("multi_discrete", (3, 2))),
        (spaces.MultiBinary(2), ("multi_discrete", (2, 2))),
        (spaces.Box(-1, 1, (2,)), ("continuous", ())),
    ],
)
def test_what_records_names_the_kind(space: spaces.Space[Any], kind: Any, tmp_path: Path) -> None:
    buffer = collect(Told(space), steps=30)
    assert (buffer.action_type, buffer.action_classes) == kind
    mine = ReplayBuffer(100, (3,), buffer.action_dim)
    RecordEpisodes(Told(space), mine)
    assert (mine.action_type, mine.action_classes) == kind
    buffer.save(tmp_path / "kind.npz")
    assert ReplayBuffer.load(tmp_path / "kind.npz").action_classes == kind[1]
    other = ReplayBuffer(100, (3,), buffer.action_dim, action_type="discrete" if not kind[1] else "continuous")
    with pytest.raises(BufferError, match="The buffer is for actions with"):
        RecordEpisodes(Told(space), other)


def test_an_agent_refuses_a_replay_buffer_of_another_kind(tmp_path: Path) -> None:
    agent = WorldFluxAgent("dreamerv3:tiny", Told(spaces.Discrete(2)), model_kwargs=DREAMERV3, device="cpu")
    file = tmp_path / "other.npz"
    continuous = ReplayBuffer(100, (3,), 2)
    continuous.add_episode(np.zeros((31, 3)), SOFT[:, :2], np.zeros(30))
    continuous.save(file)
    with pytest.raises(BufferError, match="action_type='discrete'"):
        agent.load_replay_buffer(file)
