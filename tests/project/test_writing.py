"""Writing files: invalid paths, full disks, missing permissions, killed writers, changing working directories."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable as Function
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.faults import Disk
from helpers.processes import kill, start, wait_for
from helpers.training import MemoryProvider, NoisyRegression

from worldflux import create_world_model
from worldflux.agents import AgentCheckpointCallback, WorldFluxAgent
from worldflux.cli.main import main
from worldflux.config import WorldModelConfig
from worldflux.errors import BufferError, CheckpointError, ConfigurationError, WorldFluxError
from worldflux.files import atomic_directory, reading_together, replacing, replacing_together, write_atomically
from worldflux.interop import load_official_dreamerv3, load_official_tdmpc2
from worldflux.models.base import WorldModel
from worldflux.training import CheckpointCallback, LoggingCallback, ReplayBuffer, Trainer, TrainingConfig
from worldflux.training.checkpoint import OPTIMIZER_FILE, checkpoints_in
from worldflux.training.data import create_random_buffer

SMALL: dict[str, Any] = dict(train_ratio=0, buffer_size=200, seed=0, device="cpu")
WIDTHS = dict(enc_dim=8, mlp_dim=8, latent_dim=8, simnorm_dim=4, num_q_networks=2, num_bins=11)


@pytest.fixture(scope="module")
def agent() -> WorldFluxAgent:
    return WorldFluxAgent("tdmpc2:tiny", "Pendulum-v1", **SMALL).learn(6)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(NoisyRegression(), TrainingConfig(device="cpu"))


def model(value: float, latent_dim: int = 8) -> WorldModel:
    """A model that is recognised by its weights."""
    built = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1, **{**WIDTHS, "latent_dim": latent_dim})
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(value)
    return built


# --- strange paths

STRANGE = {
    "empty": "",
    "NUL": "a\0b",
    "surrogate": "\ud800",
    "long name": "x" * 256,
    "no path": 5,
    "home": "~/x.zip",
    "home itself": "~",
}


def places(agent: WorldFluxAgent, trainer: Trainer) -> dict[str, Function[[Any], Any]]:
    """All functions that take a path: 14 that write, then those that read."""
    buffer, config = agent.replay_buffer, agent.model.config
    assert buffer is not None

    def log(path: Any) -> None:
        logs = LoggingCallback()
        logs.tensorboard_log = path
        Trainer(NoisyRegression(), TrainingConfig(total_steps=1, device="cpu"), [logs]).train(MemoryProvider())

    return {
        "save_checkpoint": agent.save_checkpoint,
        "save": agent.save,
        "save_replay_buffer": agent.save_replay_buffer,
        "AgentCheckpointCallback": AgentCheckpointCallback,
        "buffer_storage": lambda path: WorldFluxAgent("tdmpc2:tiny", "Pendulum-v1", buffer_storage=path, **SMALL),
        "tensorboard_log": lambda path: WorldFluxAgent("tdmpc2:tiny", "Pendulum-v1", tensorboard_log=path, **SMALL),
        "LoggingCallback": log,
        "Trainer.save_checkpoint": trainer.save_checkpoint,
        "CheckpointCallback": CheckpointCallback,
        "save_pretrained": agent.model.save_pretrained,
        "config.save": config.save,
        "TrainingConfig.save": trainer.config.save,
        "ReplayBuffer.save": buffer.save,
        "ReplayBuffer storage": lambda path: ReplayBuffer(10, (1,), 1, storage=path),
        # Reading begins here.
        "load": lambda path: WorldFluxAgent.load(path),
        "load_replay_buffer": agent.load_replay_buffer,
        "set_parameters": agent.set_parameters,
        "Trainer.load_checkpoint": trainer.load_checkpoint,
        "from_pretrained": type(agent.model).from_pretrained,
        "create_world_model": create_world_model,
        "config.load": WorldModelConfig.load,
        "TrainingConfig.load": TrainingConfig.load,
        "ReplayBuffer.load": ReplayBuffer.load,
        "load_official_tdmpc2": lambda path: load_official_tdmpc2(path, obs_shape=(3,), action_dim=1),
        "load_official_dreamerv3": lambda path: load_official_dreamerv3(path, obs_shape=(3,), action_dim=1),
    }


@pytest.mark.parametrize("strange", STRANGE)
def test_a_path_that_can_be_none_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: WorldFluxAgent, trainer: Trainer, strange: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for place, use in places(agent, trainer).items():
        if strange == "no path" and place.startswith("load_official"):  # which also take what is in the file
            continue
        with pytest.raises(WorldFluxError) as raised:
            use(STRANGE[strange])
        assert isinstance(raised.value, ConfigurationError), (place, raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", r"^output_dir is '', expected the path of a directory\. Choose another path\.$"),
        (5, r"^output_dir is 5, expected the path of a directory\.$"),
        ("~/runs", rf"^output_dir is '~/runs', whose ~ only a shell expands\. Pass '{Path.home()}/runs'\.$"),
    ],
)
def test_the_message_says_what_path_was_expected(given: Any, message: str) -> None:
    for callback in (CheckpointCallback, AgentCheckpointCallback):
        with pytest.raises(ConfigurationError, match=message):
            callback(given)


def test_a_directory_may_be_called_after_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("./~", "~nobody-is-called-so"):
        model(1.0).save_pretrained(name)
        create_world_model(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["~", "~nobody-is-called-so"]


def test_a_file_where_a_directory_should_be_is_a_configuration_error(
    tmp_path: Path, agent: WorldFluxAgent, trainer: Trainer
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for above in ("file", "nowhere"):
        for place, use in list(places(agent, trainer).items())[:14]:  # those that write
            with pytest.raises(ConfigurationError, match="expected a directory") as raised:
                use(tmp_path / above / "below")
            assert above in str(raised.value), place
    for place in ("AgentCheckpointCallback", "CheckpointCallback", "save_pretrained", "tensorboard_log"):
        with pytest.raises(ConfigurationError, match="file', which is a file, expected a directory"):
            places(agent, trainer)[place](tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_root_of_the_file_system_is_no_file(agent: WorldFluxAgent, trainer: Trainer) -> None:
    for place in ("save", "save_checkpoint", "save_replay_buffer", "config.save", "TrainingConfig.save"):
        with pytest.raises(WorldFluxError, match=r"^/ (is a directory|exists and is no checkpoint)"):
            places(agent, trainer)[place]("/")
    with pytest.raises(FileNotFoundError, match="The directory / holds no checkpoint of an agent"):
        WorldFluxAgent.load("/")


@pytest.mark.parametrize("command", ["train --run", "collect -o"])
def test_the_command_line_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name, option = command.split()
    what = ["tdmpc2:tiny", "Pendulum-v1"] if name == "train" else ["Pendulum-v1", "--steps", "5"]
    assert main([name, *what, option, "x" * 300]) == 2
    assert "which has a name of 300 bytes, expected at most 255" in capsys.readouterr().err


# --- faults


WRITERS: dict[str, tuple[type[WorldFluxError], Function[[Any, Path], None]]] = {
    "save_pretrained": (CheckpointError, lambda agent, path: agent.model.save_pretrained(path)),
    "config.save": (ConfigurationError, lambda agent, path: agent.model.config.save(path)),
    "TrainingConfig.save": (ConfigurationError, lambda agent, path: agent.trainer.config.save(path)),
    "ReplayBuffer.save": (BufferError, lambda agent, path: agent.replay_buffer.save(path)),
    "save_replay_buffer": (BufferError, lambda agent, path: agent.save_replay_buffer(path)),
    "save": (CheckpointError, lambda agent, path: agent.save(path)),
    "save_checkpoint": (CheckpointError, lambda agent, path: agent.save_checkpoint(path)),
    "Trainer.save_checkpoint": (CheckpointError, lambda agent, path: agent.trainer.save_checkpoint(path)),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only, choose another place"),
        (errno.EIO, "Input/output"),
    ],
)
def test_what_cannot_be_written_is_an_error_of_ours_and_leaves_the_old(
    tmp_path: Path, disk: Disk, agent: WorldFluxAgent, writer: str, number: int, words: str
) -> None:
    kind, write = WRITERS[writer]
    write(agent, tmp_path / "saved.zip")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    disk.refuse(number, "fsync")
    with pytest.raises(kind, match=rf"saved\.zip could not be written: .*{words}.* unchanged"):
        write(agent, tmp_path / "saved.zip")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != tmp_path / "saved.zip"} | {
        tmp_path / "saved.zip": before[tmp_path / "saved.zip"]
    } == before


def test_a_directory_is_replaced_though_another_writer_is_in_between(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "old").touch()
    with atomic_directory(tmp_path / "saved") as directory:
        (directory / "new").touch()
        shutil.copytree(tmp_path / "saved", tmp_path / ".saved.replaced")  # as the other one does
    assert [entry.name for entry in (tmp_path / "saved").iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_what_a_kill_has_left_where_nothing_can_be_written_is_an_error_of_ours(
    tmp_path: Path, disk: Disk, trainer: Trainer
) -> None:
    trainer.save_checkpoint(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / ".saved.replaced")
    disk.refuse(errno.EROFS, "rename")
    for read in (trainer.load_checkpoint, WorldFluxAgent.load):
        with pytest.raises(CheckpointError, match=r"was being replaced .* cannot be moved back from \.saved\.replaced"):
            read(tmp_path / "saved")


@pytest.mark.parametrize("room", [0, 100, 1_000])
@pytest.mark.parametrize("writer", ["save", "save_checkpoint", "Trainer.save_checkpoint"])
def test_a_disk_that_is_full_in_the_middle_of_the_optimiser_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: WorldFluxAgent, writer: str, room: int
) -> None:
    opened = Path.open

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def opens(path: Path, *args: Any, **keywords: Any) -> Any:
        return Full(path, "w") if path.name == OPTIMIZER_FILE else opened(path, *args, **keywords)

    monkeypatch.setattr(Path, "open", opens)
    with pytest.raises(
        CheckpointError, match=r"saved\.zip could not be written: the disk is full \(.*28.*unchanged\.$"
    ):
        WRITERS[writer][1](agent, tmp_path / "saved.zip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_rights_is_written_to(
    tmp_path: Path, disk: Disk, agent: WorldFluxAgent, writer: str, number: int
) -> None:
    disk.refuse(number, "chmod", "fchmod")
    WRITERS[writer][1](agent, tmp_path / "saved.zip")
    assert (tmp_path / "saved.zip").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_all_files_have_the_rights_that_the_user_gives_new_ones(
    tmp_path: Path, agent: WorldFluxAgent, umask: int
) -> None:
    before = os.umask(umask)
    try:
        for name, (_, write) in WRITERS.items():
            write(agent, tmp_path / f"{name}.zip")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith("rows-")]
    assert len(files) >= 15
    assert {(path.name, stat.S_IMODE(path.stat().st_mode)) for path in files} == {
        (path.name, 0o666 & ~umask) for path in files
    }


# --- two files that belong together


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_model_over_another_one_is_the_old_or_the_new_wherever_a_kill_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    place, replace, calls = tmp_path / "model", os.replace, []
    model(1.0).save_pretrained(place)
    (place / "README.md").write_text("mine")

    def dies(old: Any, new: Any) -> None:
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", dies)
    if moved < 2:
        with pytest.raises(KeyboardInterrupt):
            model(2.0, latent_dim=16).save_pretrained(place)
    else:
        model(2.0, latent_dim=16).save_pretrained(place)
    monkeypatch.setattr(os, "replace", replace)
    for read in (type(model(0.0)).from_pretrained, create_world_model):
        found = read(place)
        assert found.config.latent_dim == 16 and all((p == 2).all() for p in found.parameters())
    assert sorted(path.name for path in place.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_model_is_the_old_one_if_its_writer_dies_before_both_are_written(tmp_path: Path, disk: Disk) -> None:
    model(1.0).save_pretrained(tmp_path)
    disk.refuse(errno.EIO, "rename")
    with pytest.raises(CheckpointError, match="unchanged"):
        model(2.0, latent_dim=16).save_pretrained(tmp_path)
    assert all((p == 1).all() for p in create_world_model(tmp_path).parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def write_for_ever(place: Path) -> None:
    torch.set_num_threads(1)
    models = [(model(size, latent_dim=int(size))) for size in (8.0, 16.0)]
    while True:
        for one in models:
            one.save_pretrained(place)
            time.sleep(0.1)  # a reader needs time of its own on a machine with one core


def test_a_reader_never_sees_half_of_two_models_and_a_kill_leaves_a_whole_one(tmp_path: Path) -> None:
    place = tmp_path / "model"
    process = start(write_for_ever, place)
    wait_for(lambda: (place / "model.safetensors").exists(), process)
    seen = set()
    for _ in range(30):
        found = create_world_model(place)
        seen.add(found.config.latent_dim)
        assert all((p == found.config.latent_dim).all() for p in found.parameters())
    kill(process)
    found = create_world_model(place)
    assert all((p == found.config.latent_dim).all() for p in found.parameters())
    found.save_pretrained(place)
    assert sorted(path.name for path in place.iterdir()) == ["config.json", "model.safetensors"]


def test_files_that_wait_for_their_places_do_not_come_through_a_link(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for place in (mine, theirs):
        place.mkdir()
    (mine / "letter.txt").write_text("mine")
    (theirs / ".replacing").symlink_to(mine)
    assert reading_together(theirs, ["letter.txt"], lambda: (theirs / "letter.txt").exists()) is False
    assert (mine / "letter.txt").read_text() == "mine"


def test_writers_in_threads_do_not_meet(tmp_path: Path) -> None:
    with replacing_together(tmp_path) as first, replacing_together(tmp_path) as second:
        (first / "a").write_text("1")
        (second / "a").write_text("2")
    assert (tmp_path / "a").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


# --- what killed writers leave

_WRITER = """
import os, sys
from worldflux.files import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_writer_leaves_is_removed_by_the_next_one(tmp_path: Path) -> None:
    target = tmp_path / "buffer.npz"
    target.write_text("old")
    subprocess.run([sys.executable, "-c", _WRITER, str(target)], check=False)
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    with replacing(tmp_path / "other.npz") as file:
        file.write(b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["buffer.npz", "other.npz"]


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 120 + ".npz"):
        create_random_buffer(20, (1,), 1, 2, 9).save(tmp_path / name)
        assert len(ReplayBuffer.load(tmp_path / name)) > 0


# --- links


def test_replay_data_behind_a_link_are_not_taken_over(tmp_path: Path, agent: WorldFluxAgent) -> None:
    agent.save_checkpoint(tmp_path / "run" / "step-00000006")
    shutil.copytree(tmp_path / "run", tmp_path / "theirs")
    rows = next((tmp_path / "theirs").rglob("rows-*.npz"))
    shutil.move(rows, tmp_path / "private.npz")
    rows.symlink_to(tmp_path / "private.npz")

    def resume(path: Path) -> WorldFluxAgent:
        return WorldFluxAgent.load(path, "Pendulum-v1", device="cpu", resume=True)

    with pytest.raises(CheckpointError, match=r"rows-\d+.npz is a symbolic link.*cp -rL"):
        resume(tmp_path / "theirs")
    shutil.move(tmp_path / "run" / "step-00000006" / "replay", tmp_path / "elsewhere")
    (tmp_path / "run" / "step-00000006" / "replay").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="replay is a symbolic link"):
        resume(tmp_path / "run")


def test_a_link_that_took_the_place_of_replay_data_is_not_in_the_next_checkpoint(tmp_path: Path) -> None:
    agent = WorldFluxAgent("tdmpc2:tiny", "Pendulum-v1", **SMALL).learn(6)
    agent.save_checkpoint(tmp_path / "a")
    rows = next((tmp_path / "a").rglob("rows-*.npz"))
    shutil.move(rows, tmp_path / "elsewhere.npz")
    rows.symlink_to(tmp_path / "elsewhere.npz")
    agent.save_checkpoint(tmp_path / "b")
    files = list((tmp_path / "b").rglob("*"))
    assert len(files) > 7 and not any(path.is_symlink() for path in files)
    assert (tmp_path / "elsewhere.npz").stat().st_nlink == 1


def test_a_checkpoint_at_a_link_is_written_where_it_leads(tmp_path: Path, trainer: Trainer) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "scratch")
    for _ in range(2):
        trainer.save_checkpoint(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "scratch" / "trainer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "scratch"]


# --- a working directory that changes


class Moves(gym.Env[Any, Any]):
    """An environment that changes the working directory in each step."""

    places: tuple[Path, ...] = ()

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        os.chdir(self.places[self.t % 2])
        return np.zeros(2, np.float32), 0.0, False, self.t == 9, {}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("here", "a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(Moves, "places", (tmp_path / "a", tmp_path / "b"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_an_agent_writes_where_it_was_told_to(here: Path) -> None:
    agent = WorldFluxAgent("tdmpc2:tiny", Moves(), tensorboard_log="logs", buffer_storage="rows", **SMALL)
    agent.learn(12, AgentCheckpointCallback("run", 5))
    assert [path.name for path in checkpoints_in(here / "run")] == ["step-00000010", "step-00000012"]
    assert sorted(path.name for path in here.iterdir()) == ["logs", "rows", "run"]
    assert list((here.parent / "a").iterdir()) == list((here.parent / "b").iterdir()) == []


def test_the_trainer_writes_where_it_was_told_to(here: Path) -> None:
    class Walk(MemoryProvider):
        def sample(self, *args: Any, **keywords: Any) -> Any:
            os.chdir(here.parent / "a")
            return super().sample(*args, **keywords)

    callbacks = [LoggingCallback(1), CheckpointCallback("run", 2)]
    os.chdir(here)
    config = TrainingConfig(total_steps=4, batch_size=2, sequence_length=4, device="cpu")
    os.chdir(here.parent / "b")
    Trainer(NoisyRegression(), config, callbacks).train(Walk())
    assert sorted(path.name for path in here.iterdir()) == ["run", "runs"]
    assert list((here.parent / "a").iterdir()) == list((here.parent / "b").iterdir()) == []


@pytest.mark.parametrize("named", [[], ["--run", "mine"]])
def test_the_command_line_writes_where_it_was_told_to(here: Path, named: list[str]) -> None:
    train = ["tdmpc2:tiny", f"{__name__}:Moves", "--steps", "12", "--train-ratio", "0", "--eval-episodes", "1"]
    assert main(["train", *train, "--buffer-size", "500", "--learning-starts", "8", *named]) == 0
    os.chdir(here)
    assert main(["collect", f"{__name__}:Moves", "--steps", "20", "-o", "data.npz"]) == 0
    assert sorted(path.name for path in here.iterdir()) == sorted(["data.npz", "mine" if named else "runs"])
    assert list((here.parent / "a").iterdir()) == list((here.parent / "b").iterdir()) == []


def test_two_commands_do_not_work_on_one_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from worldflux.locks import using

    train = ["train", "tdmpc2:tiny", f"{__name__}:Moves", "--steps", "12", "--train-ratio", "0", "--eval-interval", "0"]
    train += ["--buffer-size", "500", "--learning-starts", "8"]
    with using(here / "mine"):
        assert main([*train, "--run", str(here / "mine")]) == 2
    assert "in use: another callback of this program" in capsys.readouterr().err
    assert main([*train, "--run", str(here / "mine")]) == 0
    with using(here / "mine"):
        assert main(["train", "--resume", str(here / "mine"), "--steps", "20"]) == 2
    assert "in use: another callback of this program" in capsys.readouterr().err


@pytest.mark.parametrize("path", [".", "..", "below/"])
def test_a_path_that_names_a_directory_is_no_file_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: WorldFluxAgent, path: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="is a directory, expected the path of a file"):
        agent.save(path)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["here"]


def test_files_that_are_replaced_whenever_they_are_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    letters = iter(range(1000))

    def read() -> str:
        write_atomically(tmp_path / "letter.txt", str(next(letters)).encode())
        return "half of two letters"

    with pytest.raises(CheckpointError, match=r"Another process keeps replacing .*\. Read it again when"):
        reading_together(tmp_path, ["letter.txt"], read)
