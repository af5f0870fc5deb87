"""A directory of checkpoints belongs to one run, and whatever ends the run, its last step is saved there."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable as Function
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.faults import Disk
from helpers.processes import kill, start, strays, wait_for
from helpers.training import MemoryProvider, NoisyRegression
from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps

from worldflux.agents import AgentCheckpointCallback, WorldFluxAgent
from worldflux.errors import CheckpointError, ConfigurationError, TrainingError
from worldflux.locks import LOCK_FILE, DirectoryLock, using
from worldflux.training import Callback, CheckpointCallback, Trainer, TrainingConfig
from worldflux.training.checkpoint import TRAINER_FILE, checkpoints_in

CONFIG = TrainingConfig(total_steps=6, batch_size=2, sequence_length=4, log_interval=2, device="cpu", seed=3)


def new_trainer(directory: Path, *callbacks: Callback, every: int = 2, keep: int = 9, **keywords: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        NoisyRegression(), CONFIG, [CheckpointCallback(directory, every, max_checkpoints=keep, **keywords), *callbacks]
    )


def new_agent() -> WorldFluxAgent:
    """One that only collects."""
    return WorldFluxAgent("tdmpc2:tiny", "Pendulum-v1", train_ratio=0, buffer_size=500, seed=0, device="cpu")


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints_in(directory))


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([value.flatten() for value in trainer.model.state_dict().values()])


# --- whose it is


def train_anew(directory: Path) -> None:
    new_trainer(directory).train(MemoryProvider())


def learn_anew(directory: Path) -> None:
    new_agent().learn(6, AgentCheckpointCallback(directory, 2))


def learn_with_a_saved_agent(directory: Path) -> None:
    agent = WorldFluxAgent.load(directory, "Pendulum-v1", device="cpu")  # to act, not to go on with its run
    agent.learn(6, AgentCheckpointCallback(directory, 2))


@pytest.mark.parametrize(
    ("first", "second", "advice"),
    [
        (train_anew, train_anew, "pass resume=True to train"),
        (learn_anew, learn_anew, r"WorldFluxAgent.load\('.*run', env, resume=True\)"),
        (learn_anew, learn_with_a_saved_agent, "resume=True"),
        (train_anew, learn_anew, "resume=True"),
    ],
)
def test_a_new_run_does_not_begin_where_another_has_saved(
    tmp_path: Path, first: Function[[Path], None], second: Function[[Path], None], advice: str
) -> None:
    run = tmp_path / "run"
    first(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(ConfigurationError, match=f"run holds checkpoints of another run.*{advice}.*overwrite=True"):
        second(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_goes_on_in_its_own_directory(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, keep=2)
    trainer.train(MemoryProvider(), 4)
    trainer.train(MemoryProvider(), 2)  # once more with the same trainer
    assert steps(tmp_path) == [4, 6]
    resumed = new_trainer(tmp_path, keep=2)
    resumed.config = TrainingConfig(**{**CONFIG.to_dict(), "total_steps": 8})
    resumed.train(MemoryProvider(), resume=True)
    assert steps(tmp_path) == [6, 8]
    by_hand = new_trainer(tmp_path, keep=2)
    by_hand.load_checkpoint(tmp_path / "step-00000008")
    by_hand.train(MemoryProvider(), 2)
    assert steps(tmp_path) == [8, 10] and by_hand.run == trainer.run


def test_an_agent_goes_on_in_the_directory_of_its_run(tmp_path: Path) -> None:
    agent = new_agent().learn(4, AgentCheckpointCallback(tmp_path, 2))
    agent.learn(2, AgentCheckpointCallback(tmp_path, 2), reset_num_timesteps=False)
    resumed = WorldFluxAgent.load(tmp_path, "Pendulum-v1", device="cpu", resume=True)
    resumed.learn(2, AgentCheckpointCallback(tmp_path, 2), reset_num_timesteps=False)
    assert steps(tmp_path) == [6, 8]


def test_another_run_is_replaced_on_request_once_there_is_something_in_its_place(tmp_path: Path) -> None:
    train_anew(tmp_path)
    before = steps(tmp_path)

    class Look(Callback):
        def on_step_end(self, step: int, losses: Any) -> None:
            if step < 3:
                assert steps(tmp_path) == before

    new_trainer(tmp_path, Look(), every=3, overwrite=True).train(MemoryProvider(), 5)
    assert steps(tmp_path) == [3, 5]
    new_agent().learn(4, AgentCheckpointCallback(tmp_path, 2, overwrite=True))
    assert steps(tmp_path) == [2, 4]


def test_a_link_among_the_checkpoints_is_not_written_through(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run")
    trainer.save_checkpoint(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere" / TRAINER_FILE).read_text()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000002").symlink_to(tmp_path / "elsewhere")
    trainer.train(MemoryProvider(), 4)
    assert (tmp_path / "elsewhere" / TRAINER_FILE).read_text() == before
    assert not (tmp_path / "run" / "step-00000002").is_symlink()


@pytest.mark.parametrize("begin", [train_anew, learn_anew])
def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path, begin: Function[[Path], None]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigurationError, match=r"Nothing can be written in .*\.lock"):
        begin(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "precious"


def test_the_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    train_anew(tmp_path / "run")
    assert steps(tmp_path / "scratch") == [2, 4, 6] and (tmp_path / "run").is_symlink()


# --- two at a time


class Began(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, step: int, losses: Any) -> None:
        self.path.touch()


def train_for_long(directory: Path, began: Path) -> None:
    torch.set_num_threads(1)
    new_trainer(directory, Began(began), every=100_000).train(MemoryProvider(), 100_000)


def test_two_processes_do_not_save_in_one_directory_and_a_kill_leaves_no_lock(tmp_path: Path) -> None:
    run, began = tmp_path / "run", tmp_path / "began"
    process = start(train_for_long, run, began)
    wait_for(began.exists, process)
    for begin in (train_anew, learn_anew):
        with pytest.raises(ConfigurationError, match=rf"in use by process {process.pid} on .*choose another"):
            begin(run)
    kill(process)
    train_anew(run)
    assert steps(run) == [2, 4, 6] and strays(run) == []


def test_a_directory_is_free_again_however_training_ended(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_begin(self, trainer: Trainer) -> None:
            raise OSError("no")

    class FailAtFirst(BaseCallback):
        def _on_training_start(self) -> None:
            raise OSError("no")

        def _on_step(self) -> bool:
            return True

    saving = AgentCheckpointCallback(tmp_path / "run", 2)
    for begin in (
        lambda: new_trainer(tmp_path / "run", Fail()).train(MemoryProvider()),
        lambda: new_agent().learn(4, [saving, FailAtFirst()]),
        lambda: new_agent().learn(4, EveryNTimesteps(1, FailAtFirst())),
    ):
        with pytest.raises(OSError, match="no"):
            begin()
        assert not (tmp_path / "run").exists()
    new_agent().learn(4, EveryNTimesteps(2, saving))  # which does not tell its child that training has ended
    assert steps(tmp_path / "run") == [2, 4] and strays(tmp_path / "run") == []


@pytest.mark.parametrize("begin", [train_anew, learn_anew])
def test_two_callbacks_of_one_program_do_not_save_in_one_directory(
    tmp_path: Path, begin: Function[[Path], None]
) -> None:
    with pytest.raises(
        ConfigurationError, match=r"run is in use: another callback of this program writes there\. Give"
    ):
        with using(tmp_path / "run"):
            begin(tmp_path / "run")
    both = [CheckpointCallback(tmp_path / "run"), CheckpointCallback(tmp_path / "run")]
    with pytest.raises(ConfigurationError, match="another callback of this program writes there"):
        Trainer(NoisyRegression(), CONFIG, both).train(MemoryProvider())
    assert strays(tmp_path) == []


def test_threads_and_a_stale_lock_file(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("process 1 on a machine that is gone")
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with using(tmp_path):
            held.set()
            go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    with pytest.raises(ConfigurationError, match="in use: another callback of this program"), using(tmp_path):
        pass
    go.set()
    thread.join()
    with using(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_keeps_nobody_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    train_anew(tmp_path)
    assert steps(tmp_path) == [2, 4, 6] and strays(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_an_error_at_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **keywords: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    trainer = new_trainer(tmp_path / "run")
    with pytest.raises(ConfigurationError, match=r"Nothing can be written in .*run: .*Permission denied"):
        trainer.train(MemoryProvider())
    assert trainer.step_count == 0


def test_a_lock_that_a_forked_process_has_inherited_ends_with_its_owner(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    assert lock.take()
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writes)
        lock.release()  # not its own
        os.read(reads, 1)
        os._exit(0)
    os.close(reads)
    assert not DirectoryLock(tmp_path).take()
    lock.release()
    other = DirectoryLock(tmp_path)
    assert other.take()
    other.release()
    os.close(writes)
    os.waitpid(child, 0)


# --- whatever ends it


class Down(Callback):
    """A callback that fails; with a step of its own, or wherever it is told to."""

    def __init__(self, step: int, place: str = "step", error: type[BaseException] = ConnectionError) -> None:
        self.step, self.place, self.error = step, place, error

    def on_step_end(self, step: int, losses: Any) -> None:
        if self.place == "step" and step == self.step:
            raise self.error("the server is down")

    def on_train_end(self, trainer: Trainer) -> None:
        if self.place == "end":
            raise self.error("the server is down")


class Dry(MemoryProvider):
    def sample(self, *args: Any, **keywords: Any) -> Any:
        if len(self.sampled) == 5:
            raise ConnectionError("the server is down")
        return super().sample(*args, **keywords)


@pytest.mark.parametrize("error", [ConnectionError, SystemExit, KeyboardInterrupt])
def test_what_a_callback_raises_is_raised_and_the_step_is_saved(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error, match="the server is down"):
        new_trainer(tmp_path, Down(5, error=error), every=4).train(MemoryProvider())
    assert steps(tmp_path) == [4, 5]
    resumed, whole = new_trainer(tmp_path), new_trainer(tmp_path / "whole")
    resumed.train(MemoryProvider(), resume=True)
    whole.train(MemoryProvider())
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_what_a_provider_raises_is_raised_and_the_step_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="the server is down"):
        new_trainer(tmp_path, every=100).train(Dry())
    assert steps(tmp_path) == [5]


def test_what_a_model_raises_is_raised_and_the_step_before_is_saved(tmp_path: Path) -> None:
    class Large(NoisyRegression):
        def loss(self, batch: Any) -> Any:
            if self.steps == 3:
                raise RuntimeError("CUDA out of memory")
            return super().loss(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        Trainer(Large(), CONFIG, [CheckpointCallback(tmp_path, 100)]).train(MemoryProvider())
    assert steps(tmp_path) == [3]


def test_all_callbacks_end_and_the_first_error_is_the_one_that_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConnectionError, match="the server is down"):
        new_trainer(tmp_path, Down(5), Down(0, "end", ValueError), every=100).train(MemoryProvider())
    assert steps(tmp_path) == [5] and "ValueError: the server is down" in caplog.text
    with pytest.raises(ValueError, match="the server is down"):
        new_trainer(tmp_path / "b", Down(0, "end", ValueError), Down(0, "end"), every=100).train(MemoryProvider())
    assert steps(tmp_path / "b") == [6] and "ConnectionError" in caplog.text


class DownAgent(BaseCallback):
    """The same for an agent."""

    def __init__(self, step: int, *places: str) -> None:
        super().__init__()
        self.step, self.places = step, places

    def _on_step(self) -> bool:
        if "step" in self.places and self.num_timesteps == self.step:
            raise ConnectionError("the server is down")
        return True

    def _on_training_end(self) -> None:
        if "end" in self.places:
            raise ValueError("the server is still down")


def test_an_agent_is_saved_whatever_other_callbacks_raise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saving = AgentCheckpointCallback(tmp_path, 100)
    with pytest.raises(ConnectionError, match="the server is down"):
        new_agent().learn(20, [DownAgent(7, "step", "end"), saving])
    assert steps(tmp_path) == [7] and "still down" in caplog.text
    agent = WorldFluxAgent.load(tmp_path, "Pendulum-v1", device="cpu", resume=True)
    with pytest.raises(ValueError, match="still down"):
        agent.learn(3, [DownAgent(7, "end"), saving], reset_num_timesteps=False)
    assert steps(tmp_path) == [7, 10]


@pytest.mark.parametrize("kind", ["trainer", "agent"])
def test_a_save_that_fails_at_the_end_does_not_hide_what_ended_it(
    tmp_path: Path, kind: str, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.refuse(errno.ENOSPC, "fsync")
    with pytest.raises(ConnectionError, match="the server is down"):
        if kind == "trainer":
            new_trainer(tmp_path, Down(5), every=100).train(MemoryProvider())
        else:
            new_agent().learn(20, [DownAgent(7, "step"), AgentCheckpointCallback(tmp_path, 100)])
    assert "CheckpointError" in caplog.text and "the disk is full" in caplog.text
    with pytest.raises(CheckpointError, match="the disk is full"):
        new_trainer(tmp_path / "b", every=100).train(MemoryProvider())


@pytest.mark.parametrize("kind", ["trainer", "agent"])
def test_a_broken_model_is_not_saved(tmp_path: Path, kind: str) -> None:
    def break_it(model: Any) -> None:
        with torch.no_grad():
            next(iter(model.parameters())).fill_(torch.nan)

    class Break(Down):
        def on_train_begin(self, trainer: Trainer) -> None:
            self.model = trainer.model

        def on_step_end(self, step: int, losses: Any) -> None:
            if step == self.step:
                break_it(self.model)
            super().on_step_end(step, losses)

    class BreakAgent(DownAgent):
        def _on_step(self) -> bool:
            if self.num_timesteps == self.step:
                break_it(self.model.policy)
            return super()._on_step()

    with pytest.raises(ConnectionError, match="the server is down"):
        if kind == "trainer":
            new_trainer(tmp_path, Break(5), every=4).train(MemoryProvider())
        else:
            new_agent().learn(20, [AgentCheckpointCallback(tmp_path, 4), BreakAgent(5, "step")])
    assert steps(tmp_path) == [4]
    with pytest.raises(TrainingError, match=r"Nothing is saved: of the model's weights '.*' has .* NaN or infinite"):
        if kind == "trainer":
            new_trainer(tmp_path / "b", Break(4, "nowhere"), every=4).train(MemoryProvider())
        else:
            new_agent().learn(20, [BreakAgent(4), AgentCheckpointCallback(tmp_path / "b", 4)])
    assert not (tmp_path / "b").exists()
