"""Files that somebody may have made to do harm: each is refused at once, with an error of ours."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium import spaces
from helpers.agents import make_planner
from helpers.envs import CountingEnv
from helpers.training import MemoryProvider, NoisyRegression

from worldflux import WorldFluxAgent, create_world_model
from worldflux.cli.runs import RunConfig, read_evaluations
from worldflux.config import WorldModelConfig
from worldflux.errors import BufferError, CheckpointError, ConfigurationError, WorldFluxError
from worldflux.models.base import WorldModel
from worldflux.reading import MOST_JSON_BYTES, open_regular, read_json
from worldflux.replay import backends as storage_places
from worldflux.training import Callback, CheckpointCallback, EarlyStoppingCallback, Trainer, TrainingConfig


def make_env() -> CountingEnv:
    return CountingEnv(action_space=spaces.Box(-1, 1, (1,), np.float32))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file of each kind."""
    root = tmp_path_factory.mktemp("good")
    agent = make_planner(make_env()).learn(30)
    assert agent._n_updates > 0
    agent.save_checkpoint(root / "checkpoint")
    agent.save(root / "agent.zip")
    agent.model.save_pretrained(root / "model")
    TrainingConfig().save(root / "training.json")
    (root / "run").mkdir()
    RunConfig("train", "tdmpc2:tiny", "Pendulum-v1", {}).write(root / "run")
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(good, tmp_path / "place")


def resume(place: Path) -> WorldFluxAgent:
    return WorldFluxAgent.load(place / "checkpoint", make_env(), device="cpu", resume=True)


def load(place: Path, **settings: Any) -> WorldFluxAgent:
    return WorldFluxAgent.load(place / "agent.zip", make_env(), device="cpu", **settings)


def entries(place: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(place / "agent.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(place: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(place / "agent.zip", "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def with_value(content: Any, keys: str, value: Any) -> Any:
    """A deep copy in which the entry "a.b.c" has another value, or is missing."""
    content = copy.deepcopy(content)
    *path, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
    inner = content
    for key in path:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return content


def describe(place: Path, keys: str, value: Any) -> None:
    """Changes `agent.json` in the zip."""
    content = entries(place)
    changed = with_value(json.loads(content["agent.json"]), keys, value)
    write_zip(place, {**content, "agent.json": json.dumps(changed).encode()})


READERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint/agent.json": resume,
    "checkpoint/run.json": resume,
    "checkpoint/trainer.json": resume,
    "checkpoint/replay/replay.json": resume,
    "checkpoint/config.json": resume,
    "model/config.json": lambda place: create_world_model(place / "model"),
    "training.json": lambda place: TrainingConfig.load(place / "training.json"),
    "run/config.json": lambda place: RunConfig.read(place / "run"),
}
"""The reader of each JSON file."""


def replaced(path: Path, content: bytes | None) -> None:
    """Replaces a file, which may have hard links, by other content or by a pipe that nobody writes to."""
    path.unlink()
    os.mkfifo(path) if content is None else path.write_bytes(content)


# JSON

TEXTS: dict[str, tuple[bytes | None, str]] = {
    "brackets": (b"[" * 100_000, "nested more than 64 levels deep"),
    "objects in objects": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested more than 64 levels deep"),
    "many digits": (b'{"a": ' + b"9" * 5_000 + b"}", "digits"),
    "some digits": (b'{"a": ' + b"9" * 400 + b"}", "a number has 400 digits, expected at most 308"),
    "an infinite number": (b'{"a": 1e999}', "a number is inf"),
    "NaN": (b'{"a": [NaN]}', "a number is nan"),
    "twice": (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    "no text": (b"\xff\xfe\x00\xd8", "it is not a text file, expected JSON"),
    "cut short": (b'{"a": ', "Expecting value"),
    "a pipe": (None, "a directory, a pipe or a device, expected a file"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_json_beyond_all_bounds_is_refused(kind: str, tmp_path: Path) -> None:
    content, message = TEXTS[kind]
    path = tmp_path / "file.json"
    path.touch()
    replaced(path, content)
    with pytest.raises(CheckpointError, match=rf"file\.json cannot be read: .*{message}"):
        read_json(path)


def test_json_within_the_bounds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for value in ({"a": [1, 2.5, None, True, "b"]}, 2**1023 - 1, -(2**128), [], "", 0):
        path.write_text(json.dumps(value))
        assert read_json(path) == value
    path.write_text("[" * 64 + "]" * 64)
    read_json(path)
    path.write_text('{"a": Infinity}')
    assert read_json(path, finite=False) == {"a": float("inf")}


def test_a_large_json_file_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file.json").open("wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="it has more than 32 MB"):
        read_json(tmp_path / "file.json")


def test_what_is_no_json_is_told_apart_where_that_is_documented(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("{")
    with pytest.raises(json.JSONDecodeError, match=r"file\.json cannot be read: Expecting .*line 1 column 2") as raised:
        WorldModelConfig.load(tmp_path / "file.json")
    assert isinstance(raised.value, ConfigurationError)


@pytest.mark.parametrize("kind", ["brackets", "many digits", "twice", "a pipe"])
@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_json_refuses_it(name: str, kind: str, place: Path) -> None:
    replaced(place / name, TEXTS[kind][0])
    # What marks a directory as a checkpoint is looked for, and a pipe is no file.
    missing = (FileNotFoundError,) if (name, kind) == ("checkpoint/agent.json", "a pipe") else ()
    with pytest.raises((CheckpointError, ConfigurationError, *missing)):
        READERS[name](place)


TOO_LONG = b"step,score,std,length,episodes,seconds,seed\n" + b"9" * 400 + b",1,1,1,1,1,1\n"


@pytest.mark.parametrize("content", [b"step,score\n\0\n", b"step,score\n" + b"9" * 200_000, b"\xff\xfe", TOO_LONG])
def test_a_learning_curve_that_csv_cannot_read_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "evaluations.csv").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a file of evaluations"):
        read_evaluations(tmp_path / "evaluations.csv")


@pytest.mark.parametrize("path", ["/dev/zero", ".", "pipe"])
def test_only_regular_files_are_opened(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(OSError, match="a directory, a pipe or a device, expected a file"):
        open_regular(path)


# What is in an agent's file: entries, places, numbers


def test_entries_that_unpack_to_more_than_the_file_has_are_refused(place: Path) -> None:
    content = entries(place)
    write_zip(place, {**content, "agent.json": content["agent.json"] + b" " * 10**6}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"its entry 'agent\.json' is compressed or encrypted"):
        load(place)
    write_zip(place, content)
    data = (place / "agent.zip").read_bytes()
    at = data.rfind(b"PK\x01\x02")  # the last entry of the table of contents: its two sizes
    (place / "agent.zip").write_bytes(data[: at + 20] + (2**31).to_bytes(4, "little") * 2 + data[at + 28 :])
    with pytest.raises(CheckpointError, match=r"its entries claim 2,\d{3},\d{3},\d{3} bytes, and the file has"):
        load(place)


@pytest.mark.parametrize("name", ["buffer_storage", "tensorboard_log"])
def test_a_file_does_not_say_where_its_reader_writes(name: str, place: Path, tmp_path: Path) -> None:
    describe(place, f"settings.{name}", str(tmp_path / "anywhere"))
    agent = load(place)
    assert getattr(agent, name) is None
    agent.learn(5, reset_num_timesteps=False)
    assert not (tmp_path / "anywhere").exists()
    assert getattr(load(place, **{name: str(tmp_path / "mine")}), name) == str(tmp_path / "mine")


STORED = (
    "This agent kept its replay data in a directory or on a device; loaded, it keeps them in memory. To keep them on "
    "disk, pass buffer_storage=DIRECTORY to load."
)
LOGGED = (
    "This agent wrote a TensorBoard log; loaded, it writes none. To go on with it, pass tensorboard_log=DIRECTORY to "
    "load."
)


def test_places_are_not_told_and_asked_for_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"buffer_storage": tmp_path / "rows", "tensorboard_log": tmp_path / "logs"}
    agent = make_planner(make_env(), train_ratio=0, **places).learn(15)
    agent.save_checkpoint(tmp_path / "checkpoint")
    agent.save(tmp_path / "agent.zip")
    for described in (entries(tmp_path)["agent.json"], (tmp_path / "checkpoint" / "agent.json").read_bytes()):
        assert str(tmp_path).encode() not in described

    def warned(function: Callable[[], WorldFluxAgent]) -> tuple[WorldFluxAgent, list[str]]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "worldflux"):
            return function(), list(caplog.messages)

    def again(**settings: Any) -> WorldFluxAgent:
        return WorldFluxAgent.load(tmp_path / "checkpoint", make_env(), device="cpu", **settings)

    assert warned(lambda: load(tmp_path))[1] == []  # the zip holds no replay data, and no run goes on
    assert warned(again)[1] == [STORED]
    resumed, said = warned(lambda: again(resume=True, **places))
    assert said == [] and resumed.replay_buffer is not None and resumed.replay_buffer.storage == tmp_path / "rows"
    resumed, said = warned(lambda: again(resume=True))
    assert said == [STORED, LOGGED] and resumed.tensorboard_log is None
    assert resumed.replay_buffer is not None and resumed.replay_buffer.storage == "memory"
    assert len(resumed.replay_buffer) == 15
    monkeypatch.setattr(storage_places, "free_memory", lambda: 100)
    with pytest.raises(BufferError, match=r"Storing 15 more transitions .* this machine has 100 bytes of free memory"):
        again(resume=True)


BOX = {"type": "Box", "low": -1.0, "high": 1.0, "dtype": "float32"}
DESCRIPTIONS: list[tuple[str, Any, str]] = [
    ("observation_space", {**BOX, "shape": [10**9]}, "1,000,000,000 numbers .* expected at most 16,777,216"),
    ("observation_space", {"type": "MultiBinary", "shape": [-1]}, "description of a space is damaged"),
    ("observation_space.shape", [2.5], "a size is 2.5"),
    ("action_space", {**BOX, "shape": [10**5, 10**5]}, "10,000,000,000 numbers"),
    ("action_space", {"type": "Discrete", "n": 10**30, "start": 0}, "description of a space is damaged"),
    ("n_envs", 2**20, r"n_envs is above 1e06, expected a whole number below 2\*\*20"),
    ("n_envs", 10**300, "n_envs is above 1e06, expected a whole number below"),
    ("n_envs", "x", "n_envs is 'x', expected a whole number from 1"),
    ("n_envs", ..., r"agent\.json has no 'n_envs'"),
    ("counters", [], r"is damaged\. In its agent\.json: list indices"),
    ("counters.num_timesteps", -1, "num_timesteps is -1, expected a whole number from 0"),
    ("counters.num_timesteps", 2**48, r"num_timesteps is above 3e14, expected a whole number below 2\*\*48"),
    ("schedule", {}, r"agent\.json has no 'env_steps'"),
    ("schedule.env_steps", "x", "schedule: env_steps is 'x', expected a whole number"),
    ("schedule.env_steps", 10**15, "schedule: env_steps is above 3e14"),
    ("progress_remaining", "x", "progress_remaining is 'x', expected a finite number"),
    ("settings", [], "is damaged"),
    ("settings.learning_rate", "fast", "learning_rate is 'fast', expected a finite number"),
    ("settings.learning_rate", {"schedule": "linear", "start": 1, "end": 0, "end_fraction": 0}, "end_fraction is 0.0"),
    ("settings.train_ratio", ..., r"agent\.json has no 'train_ratio'"),
    ("settings.buffer_size", 10**17, r"does not fit into memory|takes .* free memory"),
    ("settings.planner_kwargs.num_samples", 10**9, "expected at most 4,194,304 steps of candidates in a plan"),
    ("settings.planner_kwargs.horizon", 10**9, "expected at most 4,194,304 steps"),
    ("settings.planner_kwargs.iterations", 10**9, "expected at most 4,194,304 steps"),
    ("format", 2, r"has format 2, this version reads 1"),
]


@pytest.mark.parametrize(("keys", "value", "message"), DESCRIPTIONS)
def test_what_no_agent_has_is_refused(keys: str, value: Any, message: str, place: Path) -> None:
    describe(place, keys, value)
    with pytest.raises(WorldFluxError, match=message):
        load(place)


@pytest.mark.parametrize(
    "space",
    [
        {"type": "Discrete", "n": 10**9, "start": 0},
        {"type": "MultiDiscrete", "nvec": [10**9] * 2, "start": [0, 0], "dtype": "int64"},
        {"type": "MultiBinary", "n": 10**10},
        {"type": "Dict", "spaces": {str(key): {**BOX, "shape": [2**20]} for key in range(17)}},
    ],
)
def test_descriptions_of_spaces_are_measured_before_they_are_built(space: dict[str, Any], place: Path) -> None:
    describe(place, "observation_space", space)
    with pytest.raises(CheckpointError, match=r"it has [\d,]+ numbers and [\d,]+ choices, expected at most"):
        WorldFluxAgent.load(place / "agent.zip", device="cpu")


def test_no_more_gradient_steps_are_owed_than_the_schedule_can_owe(place: Path) -> None:
    describe(place, "counters._updates_owed", 10**14)
    agent = load(place)
    done = agent._n_updates
    agent.learn(30, reset_num_timesteps=False)
    assert 0 < agent._n_updates - done < 50


CONFIGS: dict[str, Any] = {
    "mlp_dim": 30_000,
    "latent_dim": 2**40,
    "hidden_dim": 2**50,
    "enc_dim": 10**30,
    "simnorm_dim": 2**61,
    "num_q_networks": 10**5,
    "num_hidden_layers": 10**5,
    "num_enc_layers": 900,
    "num_tasks": 10**8,
    "horizon": 10**9,
    "num_samples": 10**9,
    "obs_shape": [10**9],
    "model_type": [],
    "episode_length": -1,
    "latent_type": {},
    "dtype": ["float32"],
    "action_classes": [[1]],
}


@pytest.mark.parametrize("field", CONFIGS)
def test_a_configuration_is_compared_with_the_weights_before_anything_is_built(field: str, place: Path) -> None:
    config = json.loads((place / "model" / "config.json").read_text())
    replaced(place / "model" / "config.json", json.dumps({**config, field: CONFIGS[field]}).encode())
    if field == "num_samples":  # a plan's, not the model's
        replaced(place / "checkpoint" / "config.json", (place / "model" / "config.json").read_bytes())
        describe(place, "settings.planner_kwargs", None)
        write_zip(place, {**entries(place), "config.json": (place / "model" / "config.json").read_bytes()})
        with pytest.raises(ConfigurationError, match="expected at most 4,194,304 steps"):
            load(place)
        return
    for read in (create_world_model, WorldModel.from_pretrained):
        with pytest.raises((CheckpointError, ConfigurationError)) as raised:
            read(place / "model")
        assert "allocate" not in str(raised.value)


# Numbers that are not finite


def poisoned(path: Path) -> str:
    weights = safetensors.torch.load_file(path)
    name = sorted(weights)[3]
    weights[name].view(-1)[1] = torch.nan
    replaced(path, safetensors.torch.save(weights))
    return name


def trained(place: Path) -> Trainer:
    model = create_world_model(place / "model")
    return Trainer(model, TrainingConfig(device="cpu"))


NONFINITE: dict[str, tuple[str, Callable[..., Any]]] = {
    "create_world_model": ("model", lambda place, **k: create_world_model(place / "model", **k)),
    "from_pretrained": (
        "model",
        lambda place, **k: type(create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1)).from_pretrained(
            place / "model", **k
        ),
    ),
    "load_checkpoint": ("checkpoint", lambda place, **k: trained(place).load_checkpoint(place / "checkpoint", **k)),
    "load": ("checkpoint", lambda place, **k: WorldFluxAgent.load(place / "checkpoint", device="cpu", **k)),
    "resume": (
        "checkpoint",
        lambda place, **k: WorldFluxAgent.load(place / "checkpoint", make_env(), device="cpu", resume=True, **k),
    ),
    "set_parameters": ("checkpoint", lambda place, **k: load(place).set_parameters(place / "checkpoint", **k)),
}


@pytest.mark.parametrize("reader", NONFINITE)
def test_weights_that_are_not_finite_are_refused_unless_they_are_asked_for(reader: str, place: Path) -> None:
    folder, read = NONFINITE[reader]
    name = poisoned(place / folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: '{name}' has 1 of .* values that are NaN"):
        read(place)
    read(place, allow_nonfinite=True)


# Optimisers and progress


def a_step(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry.update(step=value)


def a_moment(change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry.update(exp_avg=change(entry["exp_avg"]))


OPTIMIZERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "sparse": a_moment(torch.Tensor.to_sparse),
    "without numbers": a_moment(lambda moment: torch.empty(moment.shape, device="meta")),
    "repeated": a_moment(lambda moment: torch.zeros(()).expand(moment.shape)),
    "whole numbers": a_moment(torch.Tensor.long),
    "another shape": a_moment(lambda moment: moment[None]),
    "not finite": a_moment(lambda moment: moment / 0),
    "no tensor": a_moment(lambda moment: 3),
    "no moment": lambda entry: entry.pop("exp_avg_sq"),
    "several steps": a_step(torch.ones(5)),
    "a negative step": a_step(torch.tensor(-1.0)),
    "half a step": a_step(0.5),
    "no step": a_step(None),
    "too many steps": a_step(1e30),
    "step NaN": a_step(torch.tensor(torch.nan)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_of_an_optimiser_is_checked_when_it_is_read(kind: str, place: Path) -> None:
    path = place / "checkpoint" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    OPTIMIZERS[kind](next(iter(state["states"][0]["state"].values())))
    path.unlink()
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        resume(place)


def test_moments_that_lie_in_one_large_storage_take_its_memory_once(place: Path) -> None:
    path = place / "checkpoint" / "optimizer.pt"
    saved, large = torch.load(path, weights_only=True), torch.zeros(2_000_000)
    for entry in saved["states"][0]["state"].values():
        entry.update({name: large[: entry[name].numel()].view_as(entry[name]) for name in ("exp_avg", "exp_avg_sq")})
    path.unlink()
    torch.save(saved, path)
    trainer = load(place).trainer
    tracemalloc.start()
    try:
        trainer.load_checkpoint(place / "checkpoint")
        assert tracemalloc.get_traced_memory()[1] < 10 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_of_an_optimiser_only_counts_and_moments_are_taken(place: Path) -> None:
    path = place / "checkpoint" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    for group in state["states"][0]["param_groups"]:
        group.update(lr="x", betas=None, maximize=True, fused=7, foreach="yes", capturable=True, further=[1])
    path.unlink()
    torch.save(state, path)
    agent = resume(place)
    group = agent.trainer.optimizers[0].param_groups[0]
    assert group["lr"] == 3e-4 and group["maximize"] is False and "further" not in group
    done = agent._n_updates
    assert agent.learn(5, reset_num_timesteps=False)._n_updates > done


def test_a_step_that_no_run_has_is_refused(place: Path) -> None:
    progress = json.loads((place / "checkpoint" / "trainer.json").read_text())
    replaced(place / "checkpoint" / "trainer.json", json.dumps({**progress, "step": 10**30}).encode())
    with pytest.raises(CheckpointError, match=r"trainer\.json: step is above .*, expected a whole number below"):
        resume(place)


class Counting(Callback):
    """A user's callback, which trusts what it has saved."""

    calls = 0

    def on_step_end(self, step: int, losses: Any) -> None:
        self.calls += 1

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = int(state["calls"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("best", "sum", "best_step", "count") for value in ("x", [], True, math.nan)),
        *(("best_step", None), ("count", -1), ("best_step", 0.5), ("calls", "x"), ("calls", None), ("calls", math.inf)),
    ],
)
def test_what_callbacks_remember_is_checked_before_the_first_step(name: str, value: Any, tmp_path: Path) -> None:
    def train(steps: int) -> None:
        callbacks = [EarlyStoppingCallback(patience=50), Counting(), CheckpointCallback(tmp_path)]
        config = TrainingConfig(total_steps=steps, batch_size=2, sequence_length=4, device="cpu")
        Trainer(NoisyRegression(), config, callbacks).train(MemoryProvider(), resume=True)

    train(2)
    path = tmp_path / "step-00000002" / "trainer.json"
    progress = json.loads(path.read_text())
    next(entry["state"] for entry in progress["callbacks"] if name in entry["state"])[name] = value
    replaced(path, json.dumps(progress).encode())
    with pytest.raises(CheckpointError, match=r"EarlyStoppingCallback|What Counting remembered in the checkpoint"):
        train(3)
    assert not (tmp_path / "step-00000003").exists()


@pytest.mark.parametrize("value", [[float("nan")] * 3, [-1.0] * 3, [float("inf")] * 3, "x", None])
def test_statistics_that_are_not_finite_are_refused(value: Any, tmp_path: Path) -> None:
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    agent = make_planner(VecNormalize(DummyVecEnv([make_env])), train_ratio=0)
    agent.learn(5).save_checkpoint(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "run.json"
    replaced(path, json.dumps(with_value(json.loads(path.read_text()), "normalization.obs..var", value)).encode())
    with pytest.raises(CheckpointError, match="statistics of VecNormalize"):
        WorldFluxAgent.load(tmp_path / "checkpoint", VecNormalize(DummyVecEnv([make_env])), device="cpu", resume=True)


PICKLES: dict[str, tuple[bytes, str]] = {
    "code": (b"cos\nsystem\n(S'true'\ntR.", "refers to os.system"),
    "memory": (b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.", "refers to builtins.bytearray"),
    "a place far off": (b"}r\xff\xff\xff\x7f.", "KeyError|TypeError|cannot be loaded"),
    "itself": (b"]q\x00h\x00a.", "cannot be loaded"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_the_state_of_an_optimiser_is_not_unpickled(kind: str, place: Path) -> None:
    content, message = PICKLES[kind]
    (place / "checkpoint" / "optimizer.pt").unlink()
    with zipfile.ZipFile(place / "checkpoint" / "optimizer.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content)
    with pytest.raises(CheckpointError, match=rf"optimizer\.pt cannot be loaded .*{message}|{message}"):
        resume(place)
