"""Saving, loading and copying work as with SB3's own algorithms."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from helpers.agents import weights
from helpers.sb3_families import BOX, FAMILIES, IMAGE, NUMBERS, OBSERVATIONS, AnySpaces, both, copies, make
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer as SB3ReplayBuffer
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from worldflux.agents import WorldFluxAgent
from worldflux.errors import BufferError, CheckpointError, ConfigurationError, ShapeMismatchError

OBS = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest) -> WorldFluxAgent:
    """Shared by tests that change nothing in it."""
    return make(request.param, copies(2)).learn(24)


def assert_acts_like(agent: WorldFluxAgent, other: WorldFluxAgent) -> None:
    action, state = agent.predict(OBS, deterministic=True)
    expected, remembered = other.predict(OBS, deterministic=True)
    np.testing.assert_array_equal(action, expected)
    np.testing.assert_array_equal(agent.predict(OBS, state)[1][0], other.predict(OBS, remembered)[1][0])


def in_memory(agent: WorldFluxAgent) -> io.BytesIO:
    file = io.BytesIO()
    agent.save(file)
    return file


# --- a fresh process

THREE_LINES = """
from worldflux import WorldFluxAgent
agent = WorldFluxAgent.load({path!r})
action, state = agent.predict({obs}, deterministic=True)
"""


def test_a_file_is_loaded_and_acts_in_three_lines_and_a_fresh_process(trained: WorldFluxAgent, tmp_path: Path) -> None:
    trained.save(tmp_path / "agent")
    program = THREE_LINES.format(path=str(tmp_path / "agent"), obs=[0.5, -0.5, 0.0])
    assert len(program.strip().splitlines()) == 3

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program + "print(action.tolist())"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    assert (done.returncode, done.stderr) == (0, "")
    expected, _ = trained.predict([0.5, -0.5, 0.0], deterministic=True)
    np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-5)


# --- paths and file objects


@pytest.mark.parametrize(
    ("saved", "file", "loaded"),
    [
        ("agent", "agent.zip", "agent"),
        ("agent", "agent.zip", "agent.zip"),
        ("agent.zip", "agent.zip", "agent"),
        ("v1.5", "v1.5", "v1.5"),
        ("new/folders/agent", "new/folders/agent.zip", "new/folders/agent"),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_paths_with_and_without_a_suffix_are_those_of_sb3(
    trained: WorldFluxAgent, tmp_path: Path, kind: Callable[[Any], Any], saved: str, file: str, loaded: str
) -> None:
    trained.save(kind(tmp_path / saved))

    assert (tmp_path / file).is_file()
    assert_acts_like(WorldFluxAgent.load(kind(tmp_path / loaded)), trained)


def test_file_objects_are_written_and_read(trained: WorldFluxAgent, tmp_path: Path) -> None:
    with (tmp_path / "agent").open("wb") as file:
        trained.save(file)
    with (tmp_path / "agent").open("rb") as file:
        assert_acts_like(WorldFluxAgent.load(file), trained)
    with tempfile.NamedTemporaryFile() as file:
        trained.save(file)
        assert_acts_like(WorldFluxAgent.load(file), trained)
    memory = in_memory(trained)
    assert not memory.closed
    assert_acts_like(WorldFluxAgent.load(memory), trained)
    memory.seek(0)
    assert_acts_like(WorldFluxAgent.load(memory, copies(3)), trained)


def opened(path: Path, mode: str) -> Any:
    path.touch()
    return path.open(mode)


def closed() -> io.BytesIO:
    file = io.BytesIO()
    file.close()
    return file


NO_FILES: list[tuple[Callable[[Path], Any], str, str]] = [
    (lambda path: 5, "given as 5, expected a path or a binary file", "given as 5, expected a path or a binary file"),
    (lambda path: None, "given as None", "given as None"),
    (lambda path: closed(), r"is closed\. Open it in mode 'wb'", r"is closed\. Open it in mode 'rb'"),
    (lambda path: io.StringIO(), "cannot write bytes", "cannot read bytes"),
    (lambda path: opened(path, "r"), "cannot write bytes", r"cannot read bytes\. Open it in mode 'rb'"),
    (lambda path: opened(path, "rb"), r"cannot write bytes\. Open it in mode 'wb'", ""),
    (lambda path: opened(path, "wb"), "", "cannot read bytes"),
]


@pytest.mark.parametrize(("given", "no_target", "no_source"), NO_FILES)
def test_what_is_no_file_is_refused_before_anything_is_done(
    trained: WorldFluxAgent, tmp_path: Path, given: Callable[[Path], Any], no_target: str, no_source: str
) -> None:
    agent = copy.copy(trained)
    file = given(tmp_path / "file")
    for message, calls in (
        (no_target, (agent.save, agent.save_replay_buffer)),
        (no_source, (WorldFluxAgent.load, agent.set_parameters, agent.load_replay_buffer)),
    ):
        for call in calls if message else ():
            with pytest.raises(ConfigurationError, match=message):
                call(file)
    if hasattr(file, "close"):
        file.close()


# --- what is loaded


def test_a_loaded_agent_has_no_environment_until_it_is_given_one(trained: WorldFluxAgent) -> None:
    file = in_memory(trained)

    alone = WorldFluxAgent.load(file)
    assert alone.get_env() is None and alone.n_envs == 2
    assert (alone.observation_space, alone.action_space) == (NUMBERS, BOX)
    with pytest.raises(ConfigurationError, match="no environment to learn in"):
        alone.learn(10)
    alone.set_env(copies(2))
    assert alone.learn(10, reset_num_timesteps=False).num_timesteps == 34

    env = copies(4)
    more = WorldFluxAgent.load(file, env)
    assert more.get_env() is env and more.n_envs == 4
    assert more.learn(12).num_timesteps == 12


def test_environments_of_other_spaces_or_another_number_are_refused(trained: WorldFluxAgent) -> None:
    file = in_memory(trained)

    for env in (AnySpaces(OBSERVATIONS["discrete"]), AnySpaces(IMAGE)):
        with pytest.raises(ValueError, match="Observation spaces do not match"):
            WorldFluxAgent.load(file, env)
    with pytest.raises(ValueError, match="Action spaces do not match"):
        WorldFluxAgent.load(file, AnySpaces(NUMBERS, OBSERVATIONS["box"]))
    loaded = WorldFluxAgent.load(file)
    with pytest.raises(AssertionError, match="number of environments to be set is different"):
        loaded.set_env(copies(3))


@both
def test_setting_an_environment_brings_its_wrappers(family: str) -> None:
    agent = make(family, copies(2), train_ratio=0).learn(10)
    normalized = VecNormalize(copies(2))

    agent.set_env(normalized)

    assert agent.get_env() is agent.get_vec_normalize_env() is normalized
    agent.learn(10, reset_num_timesteps=False)
    assert agent.num_timesteps == agent.replay_buffer.num_transitions == 20


def test_settings_are_changed_by_keywords_and_by_custom_objects(trained: WorldFluxAgent) -> None:
    file = in_memory(trained)

    changed = WorldFluxAgent.load(file, learning_rate=0.5, verbose=1, seed=9, tensorboard_log="logs")
    assert (changed.learning_rate, changed.verbose, changed.seed) == (0.5, 1, 9)
    assert changed.tensorboard_log == os.path.abspath("logs")
    # What scripts pass to read old files of SB3; a schedule that this library does not have is none of its settings.
    objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    assert WorldFluxAgent.load(file, custom_objects=objects).learning_rate == 0.0
    assert WorldFluxAgent.load(file, custom_objects=objects, learning_rate=0.25).learning_rate == 0.25
    assert WorldFluxAgent.load(file).learning_rate == trained.learning_rate
    with pytest.raises(ConfigurationError, match="Unknown setting 'learning_rat'; did you mean 'learning_rate'"):
        WorldFluxAgent.load(file, learning_rat=0.5)


@pytest.mark.parametrize("device", ["auto", "cpu", torch.device("cpu")])
def test_a_device_is_chosen_when_loading(trained: WorldFluxAgent, device: Any) -> None:
    loaded = WorldFluxAgent.load(in_memory(trained), device=device)

    assert loaded.device.type == loaded.policy.device.type
    if device != "auto":
        assert loaded.device.type == "cpu"


def test_a_device_that_is_not_there_is_an_error(trained: WorldFluxAgent) -> None:
    with pytest.raises(ConfigurationError, match=r"device is 'cuda:97', but torch sees \d+ CUDA devices"):
        WorldFluxAgent.load(in_memory(trained), device="cuda:97")


def test_the_versions_of_then_and_now_are_printed(trained: WorldFluxAgent, capsys: pytest.CaptureFixture[str]) -> None:
    WorldFluxAgent.load(in_memory(trained), print_system_info=True)

    now, _, then = capsys.readouterr().out.partition("== SAVED MODEL SYSTEM INFO ==\n")
    assert now.startswith("== CURRENT SYSTEM INFO ==\n")
    for part in (now, then):
        assert f"- PyTorch: {torch.__version__}\n" in part and f"- Numpy: {np.__version__}\n" in part


ALWAYS_SAVED = ["learning_rate", "policy", "policy.optimizer", "model", "num_timesteps", "action_space", "seed"]
NEVER_SAVED = ["replay_buffer", "env", "logger", "_last_obs", "ep_info_buffer", "actor", "no_such_attribute"]


@pytest.mark.parametrize("name", ALWAYS_SAVED)
def test_what_is_always_in_the_file_cannot_be_left_out(trained: WorldFluxAgent, name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"exclude has '{name}', which is always in the file"):
        trained.save(io.BytesIO(), exclude=["env", name])
    trained.save(io.BytesIO(), include=[name])


@pytest.mark.parametrize("name", NEVER_SAVED)
def test_what_is_never_in_the_file_may_be_left_out(trained: WorldFluxAgent, name: str) -> None:
    file = io.BytesIO()
    trained.save(file, exclude=[name, "replay_buffer"])

    assert WorldFluxAgent.load(file).num_timesteps == trained.num_timesteps
    with pytest.raises(ConfigurationError, match=rf"include has '{name}', which is never in the file"):
        trained.save(io.BytesIO(), include=[name])


def test_names_are_taken_alone_and_in_any_collection(trained: WorldFluxAgent) -> None:
    for choice in ({"exclude": "replay_buffer"}, {"exclude": ("env",)}, {"exclude": {"env"}}, {"exclude": []}, {}):
        trained.save(io.BytesIO(), **choice)
    with pytest.raises(ConfigurationError, match="exclude has 3, expected names of attributes"):
        trained.save(io.BytesIO(), exclude=[3])


def test_a_file_of_sb3_itself_is_refused(trained: WorldFluxAgent, tmp_path: Path) -> None:
    SAC("MlpPolicy", AnySpaces(), buffer_size=10, device="cpu").save(tmp_path / "sac")

    with pytest.raises(CheckpointError, match="saved by stable-baselines3 itself"):
        WorldFluxAgent.load(tmp_path / "sac")


# --- learning rates in files


@both
def test_a_linear_schedule_is_in_the_file(family: str) -> None:
    agent = make(family, learning_rate=LinearSchedule(0.1, 0.01, 0.5))

    loaded = WorldFluxAgent.load(in_memory(agent), copies(1))

    assert [loaded.lr_schedule(remaining) for remaining in (1.0, 0.75, 0.0)] == pytest.approx([0.1, 0.055, 0.01])
    loaded.learn(10)
    assert loaded.lr_schedule(loaded._current_progress_remaining) == 0.01


@both
def test_schedules_that_are_numbers_become_numbers(family: str) -> None:
    for given in (FloatSchedule(0.25), ConstantSchedule(0.25), FloatSchedule(ConstantSchedule(0.25)), np.float32(0.25)):
        assert make(family, learning_rate=given).learning_rate == 0.25


def cosine(remaining: float) -> float:
    return 0.01 * remaining


@both
def test_a_function_is_not_in_the_file_and_is_asked_for_when_learning_goes_on(family: str) -> None:
    file = in_memory(make(family, learning_rate=cosine).learn(10))

    loaded = WorldFluxAgent.load(file, copies(1))
    loaded.predict(OBS)
    with pytest.raises(ConfigurationError, match=r"followed the function 'cosine', which its file cannot hold\. Pass"):
        loaded.learn(10)
    again = WorldFluxAgent.load(in_memory(loaded), copies(1), learning_rate=cosine)
    assert again.learn(10).lr_schedule(0.5) == 0.005
    by_object = WorldFluxAgent.load(file, copies(1), custom_objects={"learning_rate": 1e-3})
    assert by_object.learn(10, reset_num_timesteps=False).num_timesteps == 20


# --- parameters


def test_parameters_are_given_and_taken_by_name(trained: WorldFluxAgent) -> None:
    parameters = trained.get_parameters()
    assert set(parameters) == {"policy"} and set(parameters["policy"]) == set(trained.policy.state_dict())
    other = WorldFluxAgent.load(in_memory(trained))
    random = {name: torch.rand_like(value) for name, value in parameters["policy"].items() if value.is_floating_point()}

    other.set_parameters({"policy": {**parameters["policy"], **random}})

    assert all(torch.equal(value, random[name]) for name, value in other.policy.state_dict().items() if name in random)
    assert not torch.equal(weights(other), weights(trained))
    other.set_parameters(parameters)
    assert_acts_like(other, trained)
    other.set_parameters({"policy": {**parameters["policy"], **random}})
    other.set_parameters(in_memory(trained))
    assert_acts_like(other, trained)


def test_parameters_that_do_not_match_are_refused_unless_a_part_is_meant(trained: WorldFluxAgent) -> None:
    agent = WorldFluxAgent.load(in_memory(trained))
    whole = trained.get_parameters()["policy"]
    name, value = next((name, value) for name, value in whole.items() if value.ndim == 2)
    part = {name: torch.full_like(value, 0.5)}

    with pytest.raises(RuntimeError, match="Missing key"):
        agent.set_parameters({"policy": part})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        agent.set_parameters({"policy": {**whole, "surplus": torch.zeros(1)}})
    with pytest.raises(ValueError, match="Key critic is an invalid object name"):
        agent.set_parameters({"policy": whole, "critic": {}})
    with pytest.raises(ValueError, match=r"expected \{'policy'\}, got set\(\)"):
        agent.set_parameters({})
    assert_acts_like(agent, trained)

    agent.set_parameters({"policy": {**part, "surplus": torch.zeros(1)}}, exact_match=False)
    changed = agent.policy.state_dict()
    assert bool((changed[name] == 0.5).all())
    assert all(torch.equal(changed[other], whole[other]) for other in whole if other != name)
    agent.set_parameters({}, exact_match=False)


# --- the replay buffer


def test_the_replay_buffer_goes_by_any_path_and_by_file_objects(trained: WorldFluxAgent, tmp_path: Path) -> None:
    memory = io.BytesIO()
    trained.save_replay_buffer(memory)
    trained.save_replay_buffer(str(tmp_path / "without_suffix"))
    trained.save_replay_buffer(tmp_path / "new" / "buffer.pkl")
    with tempfile.NamedTemporaryFile() as file:
        trained.save_replay_buffer(file)
        file.flush()
        assert Path(file.name).read_bytes() == memory.getvalue() == (tmp_path / "without_suffix").read_bytes()

    sources = [memory, str(tmp_path / "without_suffix"), tmp_path / "new" / "buffer.pkl"]
    for source in sources:
        agent = WorldFluxAgent.load(in_memory(trained), copies(2))
        agent.load_replay_buffer(source)
        assert agent.replay_buffer.num_transitions == 24
        assert agent.learn(10, reset_num_timesteps=False).replay_buffer.num_transitions == 34
    memory.seek(0)
    with np.load(memory, allow_pickle=False) as arrays:
        assert arrays["actions"].shape == (24, 2)


@both
def test_a_replay_buffer_that_is_none_of_ours_is_refused(family: str, tmp_path: Path) -> None:
    agent = make(family)
    theirs = SAC("MlpPolicy", AnySpaces(), buffer_size=10, device="cpu")
    theirs.save_replay_buffer(tmp_path / "sac")
    assert isinstance(theirs.replay_buffer, SB3ReplayBuffer)

    with pytest.raises(BufferError, match=r"sac\.pkl is not a readable \.npz file"):
        agent.load_replay_buffer(tmp_path / "sac.pkl")
    with pytest.raises(BufferError, match=r"the file object is not a readable \.npz file"):
        agent.load_replay_buffer(io.BytesIO(b"text"))
    with pytest.raises(FileNotFoundError):
        agent.load_replay_buffer(tmp_path / "nothing")
    make(family, AnySpaces(OBSERVATIONS["discrete"], OBSERVATIONS["box"])).save_replay_buffer(tmp_path / "other")
    with pytest.raises(ShapeMismatchError, match=r"holds observations \(3,\) and 3 action numbers"):
        agent.load_replay_buffer(tmp_path / "other")
    assert WorldFluxAgent.load(in_memory(agent)).replay_buffer is None


# --- copies in memory

COPIES: dict[str, Callable[[WorldFluxAgent], WorldFluxAgent]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda agent: pickle.loads(pickle.dumps(agent)),
    "cloudpickle": lambda agent: cloudpickle.loads(cloudpickle.dumps(agent)),
}


@both
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_learns_as_the_original_would_and_leaves_it_alone(family: str, way: str) -> None:
    agent = make(family).learn(12)
    before = weights(agent)
    duplicate = COPIES[way](agent)
    assert_acts_like(duplicate, agent)

    states = torch.get_rng_state(), np.random.get_state()
    duplicate.learn(12, reset_num_timesteps=False)
    assert duplicate._n_updates > agent._n_updates and torch.equal(weights(agent), before)
    assert agent.num_timesteps == agent.replay_buffer.num_transitions == 12

    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    agent.learn(12, reset_num_timesteps=False)
    assert torch.equal(weights(agent), weights(duplicate)) and not torch.equal(weights(agent), before)
