"""Loading or resuming what is incomplete, something else, or missing: errors say which, and what to do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.training import MemoryProvider, NoisyRegression

from worldflux import TDMPC2Config, create_world_model
from worldflux.agents import AgentCheckpointCallback, WorldFluxAgent
from worldflux.errors import BufferError, CheckpointError, ConfigurationError
from worldflux.training import CheckpointCallback, ReplayBuffer, Trainer, TrainingConfig
from worldflux.training.checkpoint import checkpoints_in

ENV = "Pendulum-v1"
NEWEST = "run/step-00000006"


def new_agent() -> WorldFluxAgent:
    """An agent that only collects."""
    return WorldFluxAgent("tdmpc2:tiny", ENV, train_ratio=0, buffer_size=500, seed=0, device="cpu")


def load(path: str | Path, **settings: Any) -> WorldFluxAgent:
    return WorldFluxAgent.load(path, ENV, device="cpu", **settings)


def go_on(path: str | Path, **settings: Any) -> WorldFluxAgent:
    agent = load(path, resume=True)
    return agent.learn(2, AgentCheckpointCallback(path, 2, **settings), reset_num_timesteps=False)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 4 and 6, and its agent as a zip."""
    root = tmp_path_factory.mktemp("good")
    new_agent().learn(6, AgentCheckpointCallback(root / "run", 2)).save(root / "agent.zip")
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, which is the working directory."""
    root = shutil.copytree(good, tmp_path / "place")
    monkeypatch.chdir(root)
    return root


# --- incomplete checkpoints


@pytest.mark.parametrize(("content", "fault"), [(None, "no trainer.json"), ("{", "trainer.json cannot be read")])
def test_an_incomplete_checkpoint_is_none_of_another_run(
    place: Path, content: str | None, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    (place / NEWEST / "trainer.json").unlink()
    if content is not None:
        (place / NEWEST / "trainer.json").write_text(content)
    said = f"{place / NEWEST} is not a complete checkpoint ({fault})."
    assert load("run", resume=True).num_timesteps == 4
    assert f"{said} It was skipped, and step-00000004 is loaded." in caplog.text
    with pytest.raises(
        ConfigurationError, match=re.escape(f"{said} Remove or move it; this run goes on from step-000")
    ):
        go_on("run")
    shutil.move(place / NEWEST, place / "elsewhere")
    assert go_on("run").num_timesteps == 6


def test_an_incomplete_checkpoint_is_removed_with_overwrite_and_stays_without(place: Path) -> None:
    (place / NEWEST).rename(place / "run" / "step-00000500")
    (place / "run" / "step-00000500" / "trainer.json").unlink()
    with pytest.raises(ConfigurationError, match="another run"):
        new_agent().learn(2, AgentCheckpointCallback("run", 2))
    assert (place / "run" / "step-00000500").exists()
    new_agent().learn(2, AgentCheckpointCallback("run", 2, overwrite=True))
    assert [path.name for path in (place / "run").iterdir()] == ["step-00000002"]


def test_an_empty_directory_among_the_checkpoints_is_skipped(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (place / "run" / "step-00009999").mkdir()
    assert go_on("run").num_timesteps == 8
    assert "step-00009999 is not a complete checkpoint (no trainer.json)." in caplog.text
    assert [path.name for path in checkpoints_in(place / "run")] == ["step-00000006", "step-00000008"]


def test_a_directory_with_incomplete_checkpoints_alone_names_them(place: Path) -> None:
    for checkpoint in checkpoints_in(place / "run"):
        (checkpoint / "trainer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"step-00000006 is incomplete: no trainer\.json"):
        load("run")
    with pytest.raises(ConfigurationError, match="Remove or move it; no checkpoint of this run is there yet"):
        new_agent().learn(2, AgentCheckpointCallback("run", 2))


def test_a_trainer_skips_incomplete_checkpoints_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TrainingConfig(total_steps=4, batch_size=2, sequence_length=4, device="cpu")

    def train() -> Trainer:
        trainer = Trainer(NoisyRegression(), config, [CheckpointCallback(tmp_path, 2)])
        trainer.train(MemoryProvider(), resume=True)
        return trainer

    train()
    (tmp_path / "step-00000004" / "trainer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"04 is not a complete checkpoint .* from step-00000002"):
        train()
    assert "It was skipped, and step-00000002 is loaded" in caplog.text
    shutil.rmtree(tmp_path / "step-00000004")
    assert train().step_count == 4


@pytest.mark.parametrize(
    "name", ["agent.json", "config.json", "model.safetensors", "optimizer.pt", "run.json", "trainer.json"]
)
def test_what_a_checkpoint_lacks_is_named_alone(place: Path, name: str) -> None:
    (place / NEWEST / name).unlink()
    said = f"{place / NEWEST} is incomplete or damaged (no {name}). Load an earlier checkpoint of the run."
    with pytest.raises(CheckpointError, match=f"^{re.escape(said)}$"):
        load(NEWEST, resume=True)


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_zip_that_was_cut_short_says_so(place: Path, size: int) -> None:
    (place / "agent.zip").write_bytes((place / "agent.zip").read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"agent\.zip .*ncomplete or damaged.* Pass .* WorldFluxAgent\.save"):
        load("agent.zip")


@pytest.mark.parametrize("start", [b"\x89HDF\r\n\x1a\n", b"\x80\x04\x95", b"PAR1", b"{}"])
def test_a_file_of_another_kind_says_so(place: Path, start: bytes) -> None:
    (place / "agent.zip").write_bytes(start + bytes(200))
    with pytest.raises(CheckpointError, match=r"but something else, or damaged .* Pass .* WorldFluxAgent\.save"):
        load("agent.zip")


def test_a_configuration_names_the_function_that_builds_its_model() -> None:
    with pytest.raises(ConfigurationError, match=r"model is a TDMPC2Config, .*create_world_model\(config\)"):
        WorldFluxAgent(TDMPC2Config(obs_shape=(3,), action_dim=1), ENV)


@pytest.mark.parametrize("offline", ["checkpoints", "checkpoint", "pretrained"])
def test_a_model_without_an_agent_is_none(place: Path, offline: str) -> None:
    model = place / NEWEST
    if offline == "pretrained":
        model = place / "model"
        new_agent().model.save_pretrained(model)
    else:
        for name in ("agent.json", "run.json"):
            (model / name).unlink()
    said = rf"{model} holds a model without an agent \(no agent\.json\): .* Use WorldFluxAgent\('{model}', env\)"
    with pytest.raises(CheckpointError, match=said):
        load("run" if offline == "checkpoints" else model)
    assert WorldFluxAgent(model, ENV, device="cpu").num_timesteps == 0


@pytest.mark.parametrize("run", ["runs/first", "runs/CartPole-v1/dreamerv3-tiny/1"])
def test_a_directory_of_runs_names_one_of_them(place: Path, run: str) -> None:
    (place / run).mkdir(parents=True)
    (place / run / "config.json").write_text('{"run": 1}')
    with pytest.raises(FileNotFoundError, match=rf"runs holds runs\. Pass one of the runs in it, such as .*/{run}\.$"):
        load("runs")


# --- something else


def buffer_of(path: str) -> None:
    new_agent().load_replay_buffer(path)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a zip to resume from": (
        lambda: load("agent.zip", resume=True),
        CheckpointError,
        "agent.zip holds no replay data, so it cannot be resumed. Leave resume=True out, or pass a directory that "
        "AgentCheckpointCallback wrote.",
    ),
    "a zip as a model": (
        lambda: create_world_model("agent.zip"),
        ConfigurationError,
        "save_pretrained. The file of an agent is loaded with WorldFluxAgent.load('agent.zip', env).",
    ),
    "a zip for a new agent": (
        lambda: WorldFluxAgent("agent.zip", ENV),
        ConfigurationError,
        "save_pretrained. The file of an agent is loaded with WorldFluxAgent.load('agent.zip', env).",
    ),
    "a file as a model": (
        lambda: create_world_model(f"{NEWEST}/run.json"),
        ConfigurationError,
        "run.json' is a file, expected a preset or a directory written by save_pretrained.",
    ),
    "checkpoints as a model": (
        lambda: WorldFluxAgent("run", ENV),
        CheckpointError,
        "'run' is a directory of checkpoints. Pass the model of one of them ('run/step-00000004', "
        "'run/step-00000006'), or the newest agent with WorldFluxAgent.load('run', env).",
    ),
    "no such directory": (
        lambda: load("runs/nope", resume=True),
        FileNotFoundError,
        "There is no file or directory 'runs/nope' (looked for {0}/runs/nope and {0}/runs/nope.zip). Pass a file that "
        "WorldFluxAgent.save wrote, or a directory of checkpoints that AgentCheckpointCallback wrote.",
    ),
    "no such zip": (lambda: load("nope.zip"), FileNotFoundError, "'nope.zip' (looked for {0}/nope.zip). Pass"),
    "no such buffer": (
        lambda: ReplayBuffer.load("nope.npz"),
        FileNotFoundError,
        "There is no file 'nope.npz' (looked for {0}/nope.npz). Pass what save_replay_buffer or ReplayBuffer.save",
    ),
    "no such buffer of an agent": (
        lambda: buffer_of("nope.npz"),
        FileNotFoundError,
        "There is no file 'nope.npz' (looked for {0}/nope.npz).",
    ),
    "a zip as a buffer": (
        lambda: buffer_of("agent.zip"),
        BufferError,
        "agent.zip is a saved agent, which has no replay data in it. Pass what save_replay_buffer wrote",
    ),
    "a checkpoint as a buffer": (
        lambda: buffer_of(NEWEST),
        BufferError,
        "a checkpoint. WorldFluxAgent.load('{0}/" + NEWEST + "', env, resume=True) reads its replay data.",
    ),
    "its replay data as a buffer": (
        lambda: buffer_of(f"{NEWEST}/replay"),
        BufferError,
        "a checkpoint. WorldFluxAgent.load('{0}/" + NEWEST + "', env, resume=True) reads its replay data.",
    ),
    "an abbreviation": (
        lambda: load("agent", lr=1),
        ConfigurationError,
        "Unknown setting 'lr'; did you mean 'learning_rate'?",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_wrong_thing_is_named_with_what_to_do(place: Path, case: str) -> None:
    call, error, said = WRONG[case]
    with pytest.raises(error, match=re.escape(said.format(place))):
        call()


# --- resumed, and begun anew by mistake


def test_learning_anew_after_resuming_warns_once(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = "The step counter begins at 0 again; reset_num_timesteps=False continues it at 6."
    agent = load("run", resume=True)
    agent.learn(2)
    agent.learn(2)
    assert caplog.messages.count(said) == 1
    load("run", resume=True).learn(2, reset_num_timesteps=False).learn(2)
    load("run").learn(2)
    assert caplog.messages.count(said) == 1
