"""WorldFluxAgent: its loop, its memory, its files, and how it is built."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers.agents import SETTINGS, TINY, counting_envs, make_agent, rows_compared, trained_on, weights
from helpers.envs import CountingEnv
from helpers.faults import Disk
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from worldflux import training
from worldflux.agents import WorldFluxAgent, learning
from worldflux.agents.archive import open_saved
from worldflux.errors import CheckpointError, ConfigurationError, ShapeMismatchError, WorldFluxError


@pytest.fixture(scope="module")
def trained() -> WorldFluxAgent:
    """Shared by tests that change nothing in it."""
    return make_agent().learn(60)


# --- the loop and its data


@pytest.mark.parametrize("n_envs", [1, 3])
def test_what_was_acted_on_is_what_is_replayed(n_envs: int) -> None:
    envs = counting_envs(n_envs, lengths=(3, 7, 1, 400), ends=("terminate", "truncate", "both"))
    agent = make_agent(envs, train_ratio=0)

    agent.learn(n_envs * 60)

    assert agent.replay_buffer.num_transitions == agent.num_timesteps == n_envs * 60
    assert rows_compared(agent, 256, 8) > 1000
    batch = agent.replay_buffer.sample(256, 8)
    assert set(batch.obs[..., 0].unique().tolist()) == set(range(n_envs))
    long_ones = batch.obs[..., 1] == 3  # the episodes in flight at the end
    assert long_ones.any() and not batch.terminations[long_ones].any()


def test_truncations_are_told_from_terminations() -> None:
    agent = make_agent(counting_envs(2, lengths=(4,), ends=("terminate", "truncate", "both")), train_ratio=0).learn(80)

    batch = agent.replay_buffer.sample(64, 6)

    last = batch.obs[..., 2] == 3
    truncated = batch.obs[..., 1] % 3 == 1
    assert torch.equal(batch.truncations, last & truncated)
    assert torch.equal(batch.terminations, last & ~truncated)


def test_actions_are_stored_as_they_were_executed() -> None:
    agent = make_agent(counting_envs(4, lengths=(50,)), train_ratio=0).learn(400)

    batch = agent.replay_buffer.sample(100, 2)

    # A fresh policy draws with a standard deviation near one: some of its actions were clipped.
    assert batch.actions.abs().max() == 1 and (batch.actions.abs() == 1).float().mean() > 0.1
    assert batch.obs[..., 3].min() >= 0 and batch.obs[..., 3].max() <= 10


def test_the_latents_beside_a_row_are_the_state_that_its_action_was_chosen_in() -> None:
    agent = make_agent(counting_envs(2, lengths=(9,)), train_ratio=0)
    states = []
    original = agent.model.policy
    agent.model.policy = lambda state, deterministic=False: (states.append(state), original(state, deterministic))[1]

    agent.learn(40)

    batch = agent.replay_buffer.sample(128, 1)
    row, env = np.divmod(batch.row_ids[:, 0].numpy(), 2)
    step = row - row // 10  # every tenth row holds a last observation, where nobody acted
    acted = row % 10 != 9
    stored = batch.extras["deter"][:, 0].float().numpy()[acted]
    chosen_in = np.stack([states[s]["deter"][e].numpy() for s, e in zip(step[acted], env[acted], strict=True)])
    np.testing.assert_allclose(stored, chosen_in, atol=1e-3)
    assert np.abs(stored).max() > 0
    classes = np.stack([states[s]["stoch"][e].argmax(-1).numpy() for s, e in zip(step[acted], env[acted], strict=True)])
    np.testing.assert_array_equal(batch.extras["stoch"][:, 0].numpy()[acted], classes + 1)


def test_training_starts_with_episodes_in_flight_and_keeps_the_ratio() -> None:
    agent = make_agent(counting_envs(2, lengths=(10_000,)), learning_starts=20, train_ratio=6)

    agent.learn(60)  # 12 replayed steps per update, 6 per environment step

    assert agent.replay_buffer.num_episodes == 0
    # The first update at step 20, then one every second step.
    assert agent._n_updates == agent.trainer.step_count == 1 + (60 - 20) // 2


def test_training_waits_for_a_batch_of_windows() -> None:
    agent = make_agent(counting_envs(1, lengths=(10_000,)), learning_starts=0, batch_size=4, seq_len=6, train_ratio=24)

    agent.learn(9)  # 9 rows hold 3 windows of 7
    assert agent._n_updates == 0
    agent.learn(1, reset_num_timesteps=False)
    assert agent._n_updates == 1


def test_training_waits_for_what_was_collected_not_for_what_is_still_stored() -> None:
    # Episodes of one step fill the buffer's rows with their last observations long before it holds 8000 transitions.
    agent = make_agent(counting_envs(64, lengths=(1,)), buffer_size=64 * 128, learning_starts=8000)

    agent.learn(7936)
    assert agent._n_updates == 0
    agent.learn(64, reset_num_timesteps=False)

    assert agent.replay_buffer.num_transitions < 8000
    assert agent._n_updates == 1


def test_a_window_is_trained_on_once_when_it_is_complete() -> None:
    agent = make_agent(counting_envs(1, lengths=(10_000,)), train_ratio=1, learning_starts=0, replay_context=False)
    batches = trained_on(agent)

    agent.learn(50)

    # The first batch is drawn when two windows of six rows fit; after it, each has the two that were completed since.
    assert [batch.row_ids[:, 0].tolist() for batch in batches] == [[0, 1], [6, 12], [18, 24], [30, 36]]


def test_without_replay_context_nothing_is_stored_beside_the_rows() -> None:
    agent = make_agent(replay_context=False).learn(30)

    assert agent.replay_buffer.extras == {} and agent._n_updates > 0
    assert agent.replay_buffer.nbytes < make_agent().replay_buffer.nbytes


def test_learning_goes_on_where_it_stopped() -> None:
    whole = make_agent(counting_envs(1, lengths=(1000,))).learn(60)
    parts = make_agent(counting_envs(1, lengths=(1000,))).learn(25)

    parts.learn(35, reset_num_timesteps=False)

    assert parts.num_timesteps == 60 and parts.replay_buffer.num_episodes == 0
    assert torch.equal(weights(whole), weights(parts))


def test_learning_anew_resets_the_environments_and_closes_their_episodes() -> None:
    agent = make_agent(counting_envs(2, lengths=(1000,))).learn(20)

    agent.learn(20)

    assert agent.num_timesteps == 20 and agent.replay_buffer.num_transitions == 40
    assert agent.replay_buffer.num_episodes == 2
    assert rows_compared(agent, 100, 3) > 50
    batch = agent.replay_buffer.sample(100, 3)
    assert batch.obs_mask is None and not batch.terminations.any()


HANDLES: dict[str, Callable[[WorldFluxAgent, Any], Any]] = {
    "the agent's": lambda agent, venv: agent.get_env(),
    "the one below a wrapper": lambda agent, venv: venv,
    "one environment alone": lambda agent, venv: venv.envs[1],
    "the innermost environment": lambda agent, venv: venv.envs[1].unwrapped,
}


@pytest.mark.parametrize("handle", HANDLES)
def test_whoever_moves_the_environments_in_between_new_episodes_begin(handle: str) -> None:
    venv = counting_envs(2, lengths=(30,))
    agent = make_agent(VecNormalize(venv, norm_obs=False), train_ratio=0).learn(40)

    HANDLES[handle](agent, venv).reset()
    agent.learn(40, reset_num_timesteps=False)

    assert agent.num_timesteps == agent.replay_buffer.num_transitions == 80
    assert agent.replay_buffer.num_episodes == 2
    assert rows_compared(agent) > 500
    batch = agent.replay_buffer.sample(200, 5)
    assert batch.obs_mask is None
    cut = batch.truncations
    assert bool(cut.any()) and set(batch.obs[cut][:, 2].tolist()) == {19}


def test_an_evaluation_in_the_training_environments_breaks_no_rows() -> None:
    agent = make_agent(counting_envs(2, lengths=(9,)), train_ratio=0).learn(24)
    evaluate_policy(agent, agent.get_env(), n_eval_episodes=3)

    evaluation = EvalCallback(agent.get_env(), n_eval_episodes=1, eval_freq=5, verbose=0)
    agent.learn(60, callback=evaluation, reset_num_timesteps=False)

    assert agent.num_timesteps == agent.replay_buffer.num_transitions == 84
    assert rows_compared(agent, 300, 6) > 50


def test_a_keyboard_interrupt_leaves_a_usable_agent() -> None:
    agent = make_agent(counting_envs(1, lengths=(100,), raise_at=25))

    with pytest.raises(KeyboardInterrupt):
        agent.learn(60)
    assert agent.replay_buffer.num_transitions == 25
    agent.predict(np.zeros(4, np.float32))
    agent.learn(20, reset_num_timesteps=False)

    assert agent.num_timesteps == 45 and agent.replay_buffer.num_transitions == 45
    assert rows_compared(agent, 100, 4) > 50


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("CheckpointCallback", "AgentCheckpointCallback"),
        ("LoggingCallback", "callbacks of stable-baselines3"),
        ("ProgressCallback", "callbacks of stable-baselines3"),
    ],
)
@pytest.mark.parametrize("held", [lambda given: given, lambda given: [given], lambda given: CallbackList([given])])
def test_callbacks_of_a_trainer_are_refused_before_the_first_step(
    tmp_path: Path, name: str, takes: str, held: Callable[[Any], Any]
) -> None:
    agent = make_agent()
    given = getattr(training, name)(*[tmp_path / "run"] * (name == "CheckpointCallback"))
    with pytest.raises(ConfigurationError, match=rf"^{name} is for train\(\); an agent takes {takes}\.$"):
        agent.learn(5, held(given))
    assert agent.num_timesteps == 0 and list(tmp_path.iterdir()) == []


def test_normalised_observations_reach_the_model_and_raw_ones_the_buffer() -> None:
    env = VecNormalize(counting_envs(2, lengths=(30,)))
    agent = make_agent(env)
    batches = trained_on(agent)

    agent.learn(80)

    assert rows_compared(agent, 64, 6) > 50
    stored = agent.replay_buffer.sample(200, 6)
    assert stored.rewards.max() > 20
    raw = dict(zip(stored.row_ids.flatten().tolist(), stored.obs.flatten(0, 1).numpy(), strict=True))
    ids, seen = batches[-1].row_ids.flatten().tolist(), batches[-1].obs.flatten(0, 1).numpy()
    np.testing.assert_allclose(seen, env.normalize_obs(np.stack([raw[row] for row in ids])), atol=1e-5)


# --- callbacks and logs


def test_the_log_has_the_health_of_a_model_that_has_taken_enough_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "CHECK_INTERVAL", 5)
    agent = make_agent()
    agent.set_logger(configure(str(tmp_path / "first"), ["json"]))
    agent.learn(200, log_interval=1)
    agent.save(tmp_path / "agent.zip")

    lines = [json.loads(line) for line in (tmp_path / "first" / "progress.json").read_text().splitlines()]
    measured = [line["health/kl_at_free_nats"] for line in lines if "health/kl_at_free_nats" in line]
    assert 2 <= len(measured) < len(lines) and all(0 <= value <= 1 for value in measured)

    loaded = WorldFluxAgent.load(tmp_path / "agent.zip", "CartPole-v1", device="cpu", train_ratio=0)
    loaded.set_logger(configure(str(tmp_path / "loaded"), ["json"]))
    loaded.learn(60, log_interval=1)
    assert "health/" not in (tmp_path / "loaded" / "progress.json").read_text()


def test_evaluation_in_between_does_not_change_what_is_learned() -> None:
    plain = make_agent(counting_envs(1, lengths=(1000,))).learn(40)
    agent = make_agent(counting_envs(1, lengths=(1000,)))
    evaluation = EvalCallback(Monitor(CountingEnv(lengths=(4,))), n_eval_episodes=1, eval_freq=7, verbose=0)

    agent.learn(40, callback=evaluation)

    assert torch.equal(weights(plain), weights(agent))


# --- predict


def test_rows_of_a_batch_are_predicted_on_their_own(trained: WorldFluxAgent) -> None:
    obs = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    _, state = trained.predict(obs[0], deterministic=True)
    actions, state = trained.predict(obs[1], state, deterministic=True)

    for i in range(5):
        _, alone = trained.predict(obs[0, i], deterministic=True)
        action, alone = trained.predict(obs[1, i], alone, deterministic=True)
        assert action == actions[i]
        for array, whole in zip(alone, state, strict=True):
            np.testing.assert_allclose(array[0], whole[i], atol=1e-5)


def test_rows_whose_episode_starts_forget_and_the_others_remember(trained: WorldFluxAgent) -> None:
    obs = np.random.default_rng(0).normal(size=(2, 2, 4)).astype(np.float32)
    _, state = trained.predict(obs[0], deterministic=True)

    _, both = trained.predict(obs[1], state, np.array([False, True]), deterministic=True)

    _, remembered = trained.predict(obs[1], state, deterministic=True)
    _, forgot = trained.predict(obs[1], deterministic=True)
    for array, kept, fresh in zip(both, remembered, forgot, strict=True):
        np.testing.assert_allclose(array[0], kept[0], atol=1e-6)
        np.testing.assert_allclose(array[1], fresh[1], atol=1e-6)
    assert np.abs(remembered[0][1] - forgot[0][1]).max() > 1e-4


STATE = (np.zeros((2, 32)), np.zeros((2, 4, 4)), np.zeros((2, 4, 4)), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((0, 4), np.float32),), r"observation has shape \(0, 4\), expected at least one row"),
        ((np.zeros(4, np.float32), (np.zeros(3),)), r"state is 1 arrays, expected the 4 arrays that predict returned"),
        ((np.zeros((3, 4), np.float32), STATE), r"state 'deter' has shape \(2, 32\), expected \(3, 32\)"),
        ((np.zeros((2, 4), np.float32), STATE, np.zeros(3, bool)), r"episode_start has shape \(3,\), expected one"),
    ],
)
def test_what_cannot_be_predicted_from_says_what_was_expected(
    trained: WorldFluxAgent, arguments: Any, message: str
) -> None:
    with pytest.raises(ShapeMismatchError, match=message):
        trained.predict(*arguments)


# --- files


def test_the_optimiser_goes_on_after_loading(trained: WorldFluxAgent) -> None:
    file = io.BytesIO()
    trained.save(file)
    file.seek(0)

    loaded = WorldFluxAgent.load(file, "CartPole-v1")

    before, after = (agent.trainer.optimizers[0].state_dict() for agent in (trained, loaded))
    assert after["param_groups"][0]["updates"] == trained._n_updates
    for name, expected in before["state"][0].items():
        assert torch.equal(torch.as_tensor(after["state"][0][name]), torch.as_tensor(expected))


def test_a_saved_agent_holds_no_pickle_of_objects(tmp_path: Path, trained: WorldFluxAgent) -> None:
    trained.save(tmp_path / "agent.zip")

    with zipfile.ZipFile(tmp_path / "agent.zip") as archive:
        assert set(archive.namelist()) == {
            "agent.json", "config.json", "model.safetensors", "optimizer.pt", "trainer.json"
        }  # fmt: skip
        description = json.loads(archive.read("agent.json"))
    assert description["action_space"] == {"type": "Discrete", "n": 2, "start": 0, "dtype": "int64"}
    assert list(tmp_path.iterdir()) == [tmp_path / "agent.zip"]


def test_numbers_of_numpy_can_be_saved() -> None:
    agent = make_agent(
        batch_size=np.int64(2),
        train_ratio=np.float32(6),
        learning_starts=np.array(10),
        replay_context=np.bool_(True),
        stats_window_size=np.int64(5),
        verbose=np.int64(0),
        seed=np.uint8(3),
    )
    agent.learn(np.int64(12), log_interval=np.int64(4))
    file = io.BytesIO()
    agent.save(file)

    loaded = WorldFluxAgent.load(file)

    assert loaded.num_timesteps == 12
    settings = [loaded.batch_size, loaded.train_ratio, loaded.replay_context, loaded.stats_window_size, loaded.seed]
    assert settings == [2, 6.0, True, 5, 3]
    assert [type(setting) for setting in settings] == [int, float, bool, int, int]


def test_a_float_that_is_whole_counts_steps() -> None:
    agent = make_agent(train_ratio=0).learn(1e1)

    assert agent.num_timesteps == 10
    with pytest.raises(ConfigurationError, match=r"total_timesteps is 10.5, expected a whole number from 0"):
        agent.learn(10.5)
    with pytest.raises(ConfigurationError, match="log_interval is 0, expected a whole number from 1"):
        agent.learn(10, log_interval=0)


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another(
    tmp_path: Path, disk: Disk, trained: WorldFluxAgent
) -> None:
    calls = disk.recorded()

    trained.save(tmp_path / "agent.zip")

    file = (tmp_path / "agent.zip").stat().st_ino
    assert calls == [("fsync", file), ("replace", file)]


@pytest.mark.parametrize(
    ("obs", "action_space"),
    [
        ("vector", spaces.MultiDiscrete([3, 2], start=[1, 0])),
        ("image", spaces.MultiBinary(2)),
        ("dict", spaces.Box(-1.0, 3.0, (2,))),
    ],
)
def test_spaces_survive_saving(obs: str, action_space: Any) -> None:
    agent = make_agent(CountingEnv(obs=obs, action_space=action_space))
    file = io.BytesIO()
    agent.save(file)

    loaded = WorldFluxAgent.load(file, counting_envs(3, obs=obs, action_space=action_space))

    assert loaded.observation_space == agent.observation_space and loaded.action_space == agent.action_space
    assert loaded.n_envs == loaded.replay_buffer.n_envs == 3


def test_no_flipped_byte_of_a_zips_structure_gives_anything_but_our_own_error(
    tmp_path: Path, trained: WorldFluxAgent
) -> None:
    trained.save(tmp_path / "whole.zip")
    path, small = tmp_path / "agent.zip", tmp_path / "small.zip"
    with zipfile.ZipFile(tmp_path / "whole.zip") as archive, zipfile.ZipFile(small, "w") as shorter:
        for name in archive.namelist():
            shorter.writestr(name, archive.read(name) if name == "agent.json" else b"{}")
    whole, damaged = small.read_bytes(), 0
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            with open_saved(path):
                pass
        except CheckpointError:
            damaged += 1
    assert damaged > len(whole) / 4


# --- construction


def test_models_are_given_by_name_by_directory_and_as_objects(tmp_path: Path, trained: WorldFluxAgent) -> None:
    trained.model.save_pretrained(tmp_path / "model")

    from_directory = WorldFluxAgent(tmp_path / "model", "CartPole-v1", **{**SETTINGS, "model_kwargs": None})
    from_object = WorldFluxAgent(from_directory.model, "CartPole-v1", **{**SETTINGS, "model_kwargs": None})

    assert torch.equal(weights(from_directory), weights(trained))
    assert from_object.policy is from_object.model is from_directory.model
    assert isinstance(from_object.policy, torch.nn.Module)


def test_a_name_means_the_same_model_as_for_the_factory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: WorldFluxAgent
) -> None:
    trained.model.save_pretrained(tmp_path / "dreamerv3:tiny")
    trained.model.save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)

    for name, is_saved in (("dreamerv3:tiny", False), ("DreamerV3:Tiny", False), ("./dreamerv3:tiny", True)):
        # Without the fields that make the preset smaller, so that the two differ in size.
        agent = WorldFluxAgent(name, "CartPole-v1", **{**SETTINGS, "model_kwargs": None})
        assert agent.model.config.deter_dim == (TINY["deter_dim"] if is_saved else 256), name
    by_path = WorldFluxAgent("mine", "CartPole-v1", **{**SETTINGS, "model_kwargs": None})
    assert torch.equal(weights(by_path), weights(trained))


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("given", [None, 70])
def test_dreamerv3_starts_to_learn_with_one_batch_of_rows(n_envs: int, given: int | None) -> None:
    agent = make_agent(counting_envs(n_envs), batch_size=4, seq_len=8, learning_starts=given)
    first: list[int] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            if agent._n_updates and not first:
                first.append(self.num_timesteps - n_envs)  # learned from before this step
            return True

    agent.learn(100, Watch())
    # Four windows of eight steps are 32 windows, each of which begins one row later than the one before.
    starts = 4 * 8 + n_envs * 8 if given is None else given
    assert agent.learning_starts == starts
    assert first == [-(-starts // n_envs) * n_envs]


def test_settings_that_are_not_given_are_the_familys_own() -> None:
    agent = WorldFluxAgent("dreamerv3:reference-1m", "CartPole-v1", device="cpu")
    defaults = agent.model.online_defaults()

    assert (agent.train_ratio, agent.batch_size, agent.seq_len) == (1024, 16, 64)
    assert agent.buffer_size == agent.replay_buffer.capacity == defaults.buffer_size
    assert agent.learning_rate == agent.model.optimizer_spec.learning_rate
    assert agent.learning_starts == 16 * 64 + 64
    assert agent.schedule.env_steps_per_update == 1


def test_the_preset_for_laptops_trains_less_often_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    agent = WorldFluxAgent("dreamerv3:tiny", "CartPole-v1", device="cpu")
    assert (agent.train_ratio, agent.batch_size, agent.seq_len, agent.learning_rate) == (64, 16, 16, 1e-3)
    assert (agent.schedule.env_steps_per_update, agent.learning_starts) == (4, 16 * 16 + 16)

    agent.model.save_pretrained(tmp_path / "model")  # whose configuration has the ratio, too
    assert WorldFluxAgent(tmp_path / "model", "CartPole-v1", device="cpu").train_ratio == 64
    given = {"train_ratio": 1024, "seq_len": 64, "learning_rate": 4e-4}
    told = WorldFluxAgent("dreamerv3:tiny", "CartPole-v1", device="cpu", **given)
    assert {name: getattr(told, name) for name in given} == given
    with pytest.raises(ConfigurationError, match="train_ratio is a setting of the agent and a field of model_kwargs"):
        WorldFluxAgent("dreamerv3:tiny", "CartPole-v1", train_ratio=1, model_kwargs={"train_ratio": 2})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_agent(batch_size=0), "batch_size is 0, expected a whole number from 1"),
        (lambda: make_agent(seq_len=2.5), "seq_len is 2.5, expected a whole number"),
        (lambda: make_agent(buffer_size=8), "buffer_size is 8, expected at least 10: learning_starts"),
        (lambda: make_agent(train_ratio=-1), "train_ratio is -1.0, expected a number of 0 or more"),
        (lambda: make_agent(train_ratio=1e300), "train_ratio is 1e.300, expected a number of 0 or more, up to 1e9"),
        (lambda: make_agent(learning_rate=float("nan")), "learning_rate is nan, expected a finite number"),
        (lambda: make_agent(learning_rate="3e-4"), "learning_rate is '3e-4', expected a finite number"),
        (lambda: make_agent(replay_context="yes"), "replay_context is 'yes', expected True or False"),
        (lambda: make_agent(stats_window_size=0), "stats_window_size is 0, expected a whole number from 1"),
        (lambda: make_agent(verbose="loud"), "verbose is 'loud', expected a whole number from 0"),
        (lambda: make_agent(tensorboard_log=5), "tensorboard_log is 5, expected a directory or None"),
        (lambda: make_agent(seed=-1), "seed is -1, expected a whole number from 0"),
        (lambda: make_agent(seed=2**40), r"seed is above 4e09, expected a whole number below 2\*\*32"),
        (lambda: make_agent(seed="a"), "seed is 'a', expected a whole number"),
        (lambda: make_agent(seed=1.0), r"seed is 1\.0, expected a whole number"),
        (lambda: make_agent(device="gpu"), "device is 'gpu', expected 'auto', 'cpu', 'cuda' or 'cuda:<index>'"),
        (lambda: make_agent(model_kwargs=[1]), r"model_kwargs is \[1\], expected a dictionary with fields"),
        (lambda: make_agent(model_kwargs={"device": "cpu"}), "Pass device to WorldFluxAgent itself"),
        (lambda: make_agent(model_kwargs={"obs_shape": (3,)}), r"model has obs_shape=\(3,\), expected \(4,\)"),
        (lambda: make_agent(5), "env is 5, expected a name, a Gymnasium environment or an SB3 VecEnv"),
        (lambda: make_agent(CountingEnv), r"env is the class CountingEnv, .* Pass an instance: CountingEnv\(\)"),
        (lambda: make_agent([CountingEnv()]), "env is a list, .* Several environments are passed as a VecEnv"),
        (lambda: make_agent().set_env(None), "env is None, expected a name"),
        (lambda: make_agent("bad id!!"), "Environment 'bad id!!' cannot be made: Malformed environment ID"),
        (lambda: WorldFluxAgent("", "CartPole-v1"), r"Unknown model ''.*list_models\(\) shows all"),
        (lambda: make_agent("CartPol-v1"), "Unknown environment 'CartPol-v1'; did you mean"),
        (lambda: make_agent(None), "env is None, expected a name"),
        (lambda: WorldFluxAgent("CartPole-v1", "dreamerv3:tiny"), r"WorldFluxAgent\('dreamerv3:tiny', 'CartPole-v1'\)"),
        (lambda: WorldFluxAgent(3, "CartPole-v1"), "model is an int, expected a preset"),
        (lambda: WorldFluxAgent("dreamerv3:tinny", "CartPole-v1"), "tinny"),
        (lambda: WorldFluxAgent(make_agent().model, "Pendulum-v1"), r"model has obs_shape=\(4,\), expected \(3,\)"),
        (lambda: WorldFluxAgent(make_agent().model, "CartPole-v1", model_kwargs=TINY), "the model is built already"),
    ],
)
def test_what_cannot_be_built_says_why(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(WorldFluxError, match=message):
        make()
