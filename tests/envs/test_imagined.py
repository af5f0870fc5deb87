"""Learned worlds as environments: predictions, where episodes begin and end, and whose random numbers are drawn."""

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from helpers.small_models import SIZES
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor
from torch import nn

from worldflux import State, WorldModel, WorldModelConfig, create_world_model
from worldflux.envs import ImaginedEnv, ImaginedVecEnv
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError, TrainingError
from worldflux.models.base import Trajectory
from worldflux.models.evaluation import evaluating
from worldflux.training import ReplayBuffer

CHOICES = {"action_type": "discrete", "action_classes": (2,)}


class Counting(WorldModel):
    """Counts up by ten times the action and is never wrong; episodes terminate from 1,000 on."""

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(1))

    def initial_state(self, batch_size):
        return State({"count": torch.zeros(batch_size, 1)})

    def update(self, state, action, obs, **options):
        return State({"count": obs})

    def rollout(self, state, actions, *, deterministic=False):
        assert not self.training and not torch.is_grad_enabled()
        after = state["count"] + 10 * actions[0] * self.weight
        return Trajectory(State({"count": after[None]}), after.squeeze(-1)[None] / 2, (after < 1_000).float().T)

    def decode(self, state):
        return {"obs": state["count"]}


def counting():
    return Counting(WorldModelConfig(obs_shape=(1,), action_dim=1))


def counted(episodes=8, length=20):
    """Episodes whose observations are 100 times the episode plus the step; the last observation is marked by .5."""
    buffer = ReplayBuffer(1_000, (1,), 1, seed=0)
    for episode in range(episodes):
        obs = 100.0 * episode + np.arange(length + 1.0)
        obs[-1] += 0.5
        buffer.add_episode(obs[:, None], np.zeros((length, 1)), np.zeros(length), terminations=np.arange(length) == 19)
    return buffer


def recorded(obs_shape=(3,), steps=60, **arguments):
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(200, obs_shape, 2, seed=0, **arguments)

    def observed(shape):
        if len(shape) == 3:
            return rng.integers(0, 256, (steps + 1, *shape), np.uint8)
        return rng.normal(size=(steps + 1, *shape)).astype(np.float32)

    obs = {k: observed(s) for k, s in obs_shape.items()} if isinstance(obs_shape, dict) else observed(obs_shape)
    actions = np.eye(2)[rng.integers(2, size=steps)] if arguments else rng.uniform(-1, 1, (steps, 2))
    buffer.add_episode(obs, actions.astype(np.float32), rng.normal(size=steps), terminations=np.zeros(steps))
    return buffer


def model_of(family, buffer, **options):
    torch.manual_seed(0)
    return create_world_model(
        f"{family}:tiny",
        obs_shape=buffer.obs_shape,
        action_dim=buffer.action_dim,
        action_type=buffer.action_type or "continuous",
        action_classes=buffer.action_classes or (),
        **SIZES[family],
        **({"use_decoder": True} if family == "tdmpc2" else {}),
        **options,
    )


def test_episodes_begin_at_recorded_rows_and_follow_the_model():
    env = ImaginedVecEnv(counting(), counted(), n_envs=4, horizon=3)
    begun = np.concatenate([env.reset() for _ in range(100)])
    assert np.array_equal(begun, np.floor(begun)), "no action is taken at the last observation of an episode"
    assert set((begun % 100).ravel()) == set(range(20)), "and every other one may come first"
    first = env.reset()
    assert first.shape == (4, 1) and first.dtype == np.float32
    obs, rewards, dones, infos = env.step(np.array([[1.0], [0.5], [-1.0], [7.0]]))
    after = first + np.array([[10.0], [5.0], [-10.0], [10.0]])  # the last action is clipped to its bounds
    np.testing.assert_allclose(obs, after)
    np.testing.assert_allclose(rewards, after[:, 0] / 2)
    assert not dones.any() and infos == [{}] * 4


def test_episodes_are_truncated_at_the_horizon_and_go_on_from_another_row():
    env = ImaginedVecEnv(counting(), counted(), n_envs=3, horizon=2)
    first = env.reset()
    for _ in range(2):
        obs, _, dones, infos = env.step(np.ones((3, 1)))
    assert dones.all()
    last = np.stack([info["terminal_observation"] for info in infos])
    np.testing.assert_allclose(last, first + 20)
    assert all(info["TimeLimit.truncated"] for info in infos)
    assert (obs % 100 <= 19).all(), "the next episodes begin at recorded rows"
    after, _, dones, _ = env.step(np.ones((3, 1)))
    np.testing.assert_allclose(after, obs + 10)
    assert not dones.any(), "steps are counted from the beginning of each episode"


def test_only_the_ended_episode_begins_anew():
    buffer = ReplayBuffer(1_000, (1,), 1, seed=0)
    for start in (0.0, 990.0):
        buffer.add_episode(np.full((21, 1), start), np.zeros((20, 1)), np.zeros(20), terminations=np.zeros(20))
    env = ImaginedVecEnv(counting(), buffer, n_envs=12, horizon=9)
    first = env.reset()
    assert set(first[:, 0]) == {0.0, 990.0}
    obs, _, dones, infos = env.step(np.ones((12, 1)))
    assert np.array_equal(dones, first[:, 0] == 990), "the model predicts that episodes end at 1,000"
    assert not any(info["TimeLimit.truncated"] for info, done in zip(infos, dones, strict=True) if done)
    np.testing.assert_allclose(obs[~dones, 0], 10)
    assert set(obs[dones, 0]) <= {0.0, 990.0}


def test_a_termination_at_the_horizon_is_no_truncation():
    buffer = ReplayBuffer(100, (1,), 1)
    buffer.add_episode(np.full((21, 1), 990.0), np.zeros((20, 1)), np.zeros(20), terminations=np.zeros(20))
    env = ImaginedVecEnv(counting(), buffer, n_envs=1, horizon=1)
    env.reset()
    assert env.step(np.ones((1, 1)))[3][0]["TimeLimit.truncated"] is False


def test_the_share_of_terminations_is_the_predicted_probability():
    model = counting()
    model.rollout = lambda state, actions, **_: Trajectory(
        State({"count": state["count"][None]}), torch.zeros(1, len(actions[0])), torch.full((1, len(actions[0])), 0.75)
    )
    env = ImaginedVecEnv(model, counted(), n_envs=400, horizon=1_000)
    env.reset()
    share = np.mean([env.step(np.zeros((400, 1)))[2].mean() for _ in range(10)])
    assert abs(share - 0.25) < 0.025  # about 3.6 standard errors


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_steps_are_those_of_the_model(family):
    buffer = recorded()
    model = model_of(family, buffer)
    env = ImaginedVecEnv(model, buffer, n_envs=3, horizon=5, seed=7)
    env.reset()
    state, actions = env._state, torch.rand(3, 2) * 2 - 1
    with evaluating(model, model.device, int(copy.deepcopy(env._rng).integers(2**31))):
        ahead = model.rollout(state, actions[None])
        expected = model.decode(ahead.states[0])["obs"]
    obs, rewards, _, infos = env.step(actions.numpy())
    reached = [info.get("terminal_observation", row) for row, info in zip(obs, infos, strict=True)]
    np.testing.assert_allclose(np.stack(reached), expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(rewards, ahead.rewards[0].numpy(), rtol=1e-5)
    assert model.training


def test_equal_seeds_give_equal_episodes_and_no_other_stream_moves():
    buffer = recorded(**CHOICES)
    model = model_of("dreamerv3", buffer)
    torch.manual_seed(3)
    buffer_before, before = buffer.sample(4, 6), torch.get_rng_state()

    def episode(seed):
        env = ImaginedVecEnv(model, buffer, n_envs=4, horizon=3, seed=seed)
        seen = [env.reset()]
        return np.stack(seen + [env.step(np.array([0, 1, 0, 1]))[0] for _ in range(7)])

    first = episode(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert np.array_equal(episode(1), first)
    assert not np.array_equal(episode(2), first)
    again = recorded(**CHOICES)
    assert torch.equal(again.sample(4, 6).obs, buffer_before.obs)
    assert torch.equal(again.sample(4, 6).obs, buffer.sample(4, 6).obs), "the buffer's sampler has not moved"


def test_seed_of_sb3_replaces_the_seed():
    env = ImaginedVecEnv(counting(), counted(), n_envs=4, horizon=3, seed=1)
    env.seed(5)
    first = env.reset()
    assert not np.array_equal(env.reset(), first)
    env.seed(5)
    assert np.array_equal(env.reset(), first)


def test_spaces_of_the_real_environment_are_kept():
    shapes = {"camera": (3, 48, 48), "speed": (4,)}
    buffer = recorded(shapes)
    model = model_of("dreamerv3", buffer, cnn_depth=2)
    space = spaces.Dict(
        {"camera": spaces.Box(0, 255, (48, 48, 3), np.uint8), "speed": spaces.Box(-0.01, 0.01, (2, 2), np.float64)}
    )
    actions = spaces.Box(np.array([0.0, -5.0]), np.array([2.0, 5.0]), dtype=np.float64)
    env = ImaginedVecEnv(model, buffer, n_envs=2, horizon=4, observation_space=space, action_space=actions)
    assert env.observation_space == space and env.action_space == actions
    first = env.reset()
    pictures, decode = [], model.decode
    model.decode = lambda state: (found := decode(state), pictures.append(found["obs"]["camera"]))[0]
    obs, _, ended, _ = env.step(np.array([[2.0, 0.0], [0.0, 5.0]]))
    predicted = (255 * pictures[0]).round().byte().permute(0, 2, 3, 1).numpy()
    assert not ended.all() and np.array_equal(obs["camera"][~ended], predicted[~ended])
    for seen in (first, obs):
        assert space.contains({key: value[0] for key, value in seen.items()})
    # The recorded pictures come back with their channels last.
    starts = env._recorded["camera"]
    assert any(np.array_equal(first["camera"][0], picture.transpose(1, 2, 0)) for picture in starts)
    seen, rollout = [], model.rollout
    model.rollout = lambda state, given: (seen.append(given[0]), rollout(state, given))[1]
    env.step(np.array([[2.0, 0.0], [0.0, 5.0]]))
    np.testing.assert_allclose(seen[0], [[1.0, 0.0], [-1.0, 1.0]])


def test_spaces_without_an_environment():
    env = ImaginedVecEnv(model_of("dreamerv3", recorded(**CHOICES)), recorded(**CHOICES), n_envs=1)
    assert env.action_space == spaces.Discrete(2)
    assert env.observation_space == spaces.Box(-np.inf, np.inf, (3,))
    env = ImaginedVecEnv(counting(), counted(), n_envs=1)
    assert env.action_space == spaces.Box(-1.0, 1.0, (1,))


def test_choices_have_the_classes_of_the_model():
    kinds = {"action_type": "multi_discrete", "action_classes": (2, 3)}
    config = WorldModelConfig(obs_shape=(5,), obs_classes={"obs": (3, 2)}, action_dim=5, **kinds)
    for name in ("observation_space", "action_space"):
        with pytest.raises(ConfigurationError, match=rf"{name} has .*classes.*\(4, 1\)"):
            ImaginedVecEnv(Counting(config), counted(), **{name: spaces.MultiDiscrete([4, 1])})


def test_tasks_go_on_in_imagination_with_the_actions_that_they_have():
    buffer = ReplayBuffer(200, (3,), 2, seed=0, extras={"task": ((), np.int64)})
    for task in (0, 1):
        obs, actions = np.full((21, 3), float(task)), np.zeros((20, 2))
        buffer.add_episode(obs, actions, np.zeros(20), extras={"task": np.full(20, task)})
    model = model_of("tdmpc2", buffer, num_tasks=2, task_dim=4, task_action_dims=(1, 2))
    env = ImaginedVecEnv(model, buffer, n_envs=8, horizon=1)
    tasks = env.reset()[:, 0]
    seen, rollout = [], model.rollout
    model.rollout = lambda state, given: (seen.append((state["task"], given[0])), rollout(state, given))[1]
    env.step(np.ones((8, 2)))
    (of_state, actions) = seen[0]
    assert set(tasks) == {0, 1} and np.array_equal(of_state, tasks)
    assert np.array_equal(actions, np.stack([np.ones(8), tasks], 1)), "task 0 has no second dimension"
    with pytest.raises(BufferError, match="the data do not say which task a row is of"):
        ImaginedVecEnv(model, recorded())


def test_frames_in_a_stack_keep_their_places():
    from worldflux.envs import ObservationCodec

    space = spaces.Box(0, 255, (2, 5, 6, 3), np.uint8)
    codec = ObservationCodec(space)
    frames = np.random.default_rng(0).integers(0, 256, (4, 2, 5, 6, 3), np.uint8)
    assert np.array_equal(codec.decode({"obs": codec.encode(frames)}), frames)
    choices = ObservationCodec(spaces.MultiDiscrete([3, 4], start=[1, 2]))
    values = np.array([[1, 5], [3, 2]])
    assert np.array_equal(choices.decode({"obs": choices.encode(values)}), values)
    whole = ObservationCodec(spaces.Box(0, 10, (2,), np.int64))
    assert np.array_equal(whole.decode({"obs": np.array([[1.6, 12.0]])}), [[2, 10]])


def test_the_buffer_may_grow():
    buffer = counted(episodes=1)
    env = ImaginedVecEnv(counting(), buffer, n_envs=4, horizon=1)
    env.reset()
    obs = 500.0 + np.arange(21.0)[:, None]
    for _ in range(5):
        buffer.add_episode(obs, np.zeros((20, 1)), np.zeros(20), terminations=np.zeros(20))
    begun = np.concatenate([env.step(np.zeros((4, 1)))[0] for _ in range(60)])
    assert (begun >= 500).any() and (begun < 500).any()


def test_a_single_environment_keeps_to_gymnasium():
    space, actions = spaces.Box(-5.0, 5.0, (3,)), spaces.Discrete(2)
    buffer = recorded(**CHOICES)
    env = ImaginedEnv(model_of("dreamerv3", buffer), buffer, 3, observation_space=space, action_space=actions)
    check_env(env, skip_render_check=True)
    first, _ = env.reset(seed=4)
    assert np.array_equal(env.reset(seed=4)[0], first)
    ends = [env.step(0)[2:4] for _ in range(3)]
    assert [truncated for _, truncated in ends] == [False, False, True] or any(done for done, _ in ends)


def test_ppo_learns_inside():
    """Counting up pays, so that PPO's mean action rises from 0."""
    buffer = ReplayBuffer(100, (1,), 1)
    buffer.add_episode(np.zeros((21, 1)), np.zeros((20, 1)), np.zeros(20), terminations=np.zeros(20))
    env = VecMonitor(ImaginedVecEnv(counting(), buffer, n_envs=8, horizon=4))
    ppo = PPO("MlpPolicy", env, seed=0, n_steps=16, batch_size=64, learning_rate=3e-3, device="cpu").learn(1_500)
    assert ppo.predict(np.zeros((1, 1), np.float32), deterministic=True)[0][0, 0] > 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 0}, "horizon is 0"),
        ({"n_envs": 0}, "n_envs is 0"),
        ({"context": 0}, "context is 0"),
        ({"observation_space": spaces.Box(-1, 1, (2,))}, "was built for \\(1,\\)"),
        ({"action_space": spaces.Discrete(2)}, "discrete actions of 2 numbers"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        ImaginedVecEnv(counting(), counted(), **arguments)


def test_refused_models_and_buffers():
    buffer = recorded()
    model = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=2, **SIZES["tdmpc2"])
    with pytest.raises(ConfigurationError, match="use_decoder=True"):
        ImaginedVecEnv(model, buffer)
    with pytest.raises(BufferError, match="No stream of the buffer has 10 rows, twice the context of 5"):
        ImaginedVecEnv(counting(), ReplayBuffer(10, (1,), 1))
    with pytest.raises(
        ShapeMismatchError, match=r"holds observations \(3,\) and 2 action numbers, expected \(1,\) and 1"
    ):
        ImaginedVecEnv(counting(), buffer)
    chooses = model_of("dreamerv3", recorded(**CHOICES))
    with pytest.raises(BufferError, match="The model has action_type='discrete'"):
        ImaginedVecEnv(chooses, buffer)
    with pytest.raises(ConfigurationError, match=r"model is a str.*agent\.model"):
        ImaginedVecEnv("dreamerv3:tiny", counted())
    with pytest.raises(ConfigurationError, match="buffer is None, expected"):
        ImaginedVecEnv(counting(), None)
    env = ImaginedVecEnv(counting(), counted())
    with pytest.raises(ConfigurationError, match="Call reset first"):
        env.step(np.zeros((16, 1)))
    env.reset()
    with pytest.raises(ShapeMismatchError, match="3 actions, expected one for each of 16"):
        env.step(np.zeros((3, 1)))
    with pytest.raises(TrainingError, match="The actions are not finite"):
        env.step(np.full((16, 1), np.nan))
    broken = counting()
    env = ImaginedVecEnv(broken, counted(), n_envs=1)
    env.reset()
    broken.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN"):
        env.step(np.ones((1, 1)))
