"""Training on stored experience that is stopped, killed, and resumed."""

from __future__ import annotations

import logging
import os
import random
import resource
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.agents import weights
from helpers.processes import finish, kill, start, strays, wait_for
from helpers.training import MemoryProvider, NoisyRegression
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from worldflux.errors import BufferError, CheckpointError, ConfigurationError, TrainingError
from worldflux.replay.provider import PrefetchedBatches
from worldflux.replay.views import ReplayPart
from worldflux.training import (
    Batch,
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    ReplayBuffer,
    Trainer,
    TrainingConfig,
    create_random_buffer,
    train,
)
from worldflux.training.checkpoint import checkpoints_in, newest_checkpoint
from worldflux.training.signals import StopRequest, stopping_on_signals

CONFIG = TrainingConfig(total_steps=12, batch_size=4, sequence_length=6, log_interval=5, device="cpu", seed=3)


def small_buffer() -> ReplayBuffer:
    return create_random_buffer(400, (3,), 2, num_episodes=12, episode_length=9, seed=1)


def new_trainer(directory: Path | None = None, *callbacks: Callback, every: int = 4, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    saving = [] if directory is None else [CheckpointCallback(directory, save_interval=every, max_checkpoints=3)]
    return Trainer(NoisyRegression(), replace(CONFIG, **changes), [*saving, *callbacks])


def uninterrupted(**changes: Any) -> Tensor:
    trainer = new_trainer(**changes)
    trainer.train(small_buffer())
    return weights(trainer)


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, step: int, losses: Any) -> None:
        if step == self.step:
            raise OSError("the machine is gone")


@pytest.mark.parametrize("step", [4, 5, 7, 11])
def test_a_resumed_run_has_the_bits_of_one_that_did_not_stop(tmp_path: Path, step: int) -> None:
    expected = uninterrupted()
    with pytest.raises(OSError, match="gone"):
        new_trainer(tmp_path, StopAt(step)).train(small_buffer())
    resumed = new_trainer(tmp_path)
    resumed.train(small_buffer(), resume=True)
    assert resumed.step_count == 12
    torch.testing.assert_close(weights(resumed), expected, rtol=0, atol=0)


def test_what_training_wrote_beside_the_rows_goes_on(tmp_path: Path) -> None:
    def run(*callbacks: Callback, resume: bool = False) -> Any:
        buffer = filled(extras=True)
        new_trainer(tmp_path, *callbacks).train(buffer, resume=resume)
        return buffer.extras_state()["count"]

    expected = run()
    assert expected.max() > 3
    for checkpoint in checkpoints_in(tmp_path):
        shutil.rmtree(checkpoint)
    with pytest.raises(OSError, match="gone"):
        run(StopAt(7))
    assert torch.equal(run(resume=True), expected)
    assert torch.equal(run(resume=True), expected)  # from the last checkpoint, which is written behind the last step
    with pytest.raises(BufferError, match="extras have shapes"):
        filled(extras=True).load_extras_state({"count": torch.zeros(3, 1)})


def test_a_checkpoint_that_is_copied_through_a_trainer_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        new_trainer(tmp_path / "run", StopAt(7)).train(small_buffer())
    between = new_trainer()
    between.load_checkpoint(newest_checkpoint(tmp_path / "run"))  # type: ignore[arg-type]
    between.save_checkpoint(tmp_path / "copy" / "step-00000004")
    resumed = new_trainer(tmp_path / "copy")
    resumed.train(small_buffer(), resume=True)
    torch.testing.assert_close(weights(resumed), uninterrupted(), rtol=0, atol=0)


def test_a_run_without_a_checkpoint_yet_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = new_trainer(tmp_path / "new")
    with caplog.at_level(logging.INFO, "worldflux.training"):
        trainer.train(small_buffer(), resume=True)
    assert "no checkpoint" in caplog.text
    torch.testing.assert_close(weights(trainer), uninterrupted(), rtol=0, atol=0)


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    new_trainer(tmp_path).train(small_buffer())
    again = new_trainer(tmp_path)
    again.train(small_buffer(), resume=True)
    assert again.step_count == 12
    torch.testing.assert_close(weights(again), uninterrupted(), rtol=0, atol=0)


@pytest.mark.parametrize("given", ["runs/walker", Path("runs/walker"), 1, None])
def test_resume_is_true_or_false_and_no_directory(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"resume is .*, expected True or False.*CheckpointCallback\(DIREC"):
        new_trainer(tmp_path / "run").train(small_buffer(), resume=given)
    with pytest.raises(ConfigurationError, match="expected True or False"):
        train(NoisyRegression(), small_buffer(), total_steps=2, device="cpu", resume=given)
    assert list(tmp_path.iterdir()) == []


def test_resuming_needs_a_checkpoint_callback() -> None:
    with pytest.raises(ConfigurationError, match="CheckpointCallback"):
        new_trainer().train(small_buffer(), resume=True)


def test_the_function_resumes_as_well(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"batch_size": 4, "sequence_length": 6, "device": "cpu", "seed": 3, "log_interval": 5}
    saving = [CheckpointCallback(tmp_path, 4)]
    train(NoisyRegression(), small_buffer(), total_steps=8, callbacks=saving, **settings)  # type: ignore[arg-type]
    model = train(
        NoisyRegression(),
        small_buffer(),
        total_steps=12,
        callbacks=saving,
        resume=True,
        **settings,  # type: ignore[arg-type]
    )
    found = torch.cat([value.flatten().double() for value in model.state_dict().values()])
    torch.testing.assert_close(found, uninterrupted(), rtol=0, atol=0)


def test_other_data_are_noticed(tmp_path: Path) -> None:
    new_trainer(tmp_path, total_steps=8).train(small_buffer())
    other = create_random_buffer(400, (3,), 2, num_episodes=12, episode_length=9, seed=2)
    with pytest.raises(CheckpointError, match="other data"):
        new_trainer(tmp_path).train(other, resume=True)
    going_on = new_trainer()
    going_on.load_checkpoint(newest_checkpoint(tmp_path))  # type: ignore[arg-type]
    going_on.train(other)
    assert going_on.step_count == 12


def test_early_stopping_waits_on_where_it_was(tmp_path: Path) -> None:
    def run(*callbacks: Callback, resume: bool = False, directory: Path) -> int:
        stopping = EarlyStoppingCallback("fit", patience=3, min_delta=100.0)
        trainer = new_trainer(directory, *callbacks, stopping, log_interval=2, every=1, total_steps=40)
        trainer.train(small_buffer(), resume=resume)
        return trainer.step_count

    expected = run(directory=tmp_path / "whole")
    assert expected < 40
    with pytest.raises(OSError, match="gone"):
        run(StopAt(expected - 1), directory=tmp_path / "parts")
    assert run(resume=True, directory=tmp_path / "parts") == expected


def test_a_checkpoint_has_what_callbacks_remember_of_its_step(tmp_path: Path) -> None:
    class Count(Callback):
        steps = 0

        def on_step_end(self, step: int, losses: Any) -> None:
            self.steps += 1

        def state_dict(self) -> dict[str, Any]:
            return {"steps": self.steps}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.steps = state["steps"]

    with pytest.raises(OSError, match="gone"):
        new_trainer(tmp_path, Count(), StopAt(7)).train(small_buffer())
    count = Count()
    new_trainer(tmp_path, count).train(small_buffer(), resume=True)
    assert count.steps == 12


def test_all_callbacks_see_the_end_whatever_one_of_them_raises(tmp_path: Path) -> None:
    class Failing(Callback):
        def on_train_end(self, trainer: Trainer) -> None:
            raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        new_trainer(tmp_path, Failing(), every=100).train(small_buffer())
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000012"]


def test_a_clock_that_was_set_back_makes_no_new_checkpoint_an_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_trainer(tmp_path, total_steps=8).train(small_buffer())
    monkeypatch.setattr(time, "time", lambda: 1e9)
    new_trainer(tmp_path, every=1).train(small_buffer(), resume=True)
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"step-000000{step}" for step in (10, 11, 12)]


def test_another_part_of_the_same_data_is_noticed(tmp_path: Path) -> None:
    def run(share: float, total_steps: int) -> None:
        config = replace(CONFIG, total_steps=total_steps)
        Trainer(NoisyRegression(), config, [CheckpointCallback(tmp_path)], eval_data=share).train(
            small_buffer(), resume=True
        )

    run(0.3, 4)
    with pytest.raises(CheckpointError, match="other data"):
        run(0.5, 8)
    run(0.3, 8)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000008"


def test_what_a_run_held_out_stays_held_out(tmp_path: Path) -> None:
    class Evaluations(Callback):
        def __init__(self) -> None:
            self.seen: dict[int, float] = {}

        def on_eval_end(self, step: int, metrics: Any) -> None:
            self.seen[step] = metrics["loss"]

    def run(
        *callbacks: Callback, resume: bool = False, directory: Path | None = None
    ) -> tuple[Tensor, dict[int, float]]:
        torch.manual_seed(0)
        evaluations = Evaluations()
        saving = [] if directory is None else [CheckpointCallback(directory, 4)]
        config = replace(CONFIG, eval_interval=3)
        trainer = Trainer(NoisyRegression(), config, [*saving, evaluations, *callbacks], eval_data=0.3)
        trainer.train(small_buffer(), resume=resume)
        assert trainer.eval_data is None
        return weights(trainer), evaluations.seen

    expected, losses = run()
    assert sorted(losses) == [3, 6, 9, 12]
    with pytest.raises(OSError, match="gone"):
        run(StopAt(7), directory=tmp_path)
    found, later = run(resume=True, directory=tmp_path)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert later == {step: losses[step] for step in (9, 12)}


def test_training_goes_on_with_all_but_the_share_that_is_held_out() -> None:
    sizes: dict[str, int] = {}

    class Sizes(Callback):
        def on_train_begin(self, trainer: Any) -> None:
            assert isinstance(trainer.eval_data, ReplayPart)
            sizes["held out"] = len(trainer.eval_data)
            sizes["trained on"] = len(trainer._batches.provider)

    buffer = create_random_buffer(1000, (3,), 2, num_episodes=20, episode_length=10, seed=0)
    Trainer(NoisyRegression(), replace(CONFIG, total_steps=1), [Sizes()], eval_data=0.1).train(buffer)
    assert sizes == {"held out": 20, "trained on": 180}


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, True, float("nan")])
def test_a_share_to_hold_out_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(ConfigurationError, match="share between 0 and 1"):
        Trainer(NoisyRegression(), CONFIG, eval_data=share)


def test_nothing_can_be_held_out_of_a_provider_that_cannot_be_split() -> None:
    with pytest.raises(ConfigurationError, match="split"):
        Trainer(NoisyRegression(), CONFIG, eval_data=0.1).train(MemoryProvider())


# --- signals


def train_slowly(directory: Path, pace: float) -> None:
    torch.set_num_threads(1)

    class Pace(Callback):
        def on_step_end(self, step: int, losses: Any) -> None:
            time.sleep(pace)

    new_trainer(directory, Pace(), every=100, total_steps=1000).train(small_buffer())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_saves_the_step_and_stops(tmp_path: Path, number: int, code: int) -> None:
    process = start(train_slowly, tmp_path, 0.01)
    wait_for(lambda: (tmp_path / "step-00000100").exists(), process)
    time.sleep(0.1)  # so that it comes behind a later step
    os.kill(process.pid, number)
    assert finish(process) == code
    (stopped,) = (path for path in checkpoints_in(tmp_path) if path.name != "step-00000100")
    step = int(stopped.name.removeprefix("step-"))
    assert 100 < step < 1000 and strays(tmp_path) == []
    resumed = new_trainer(tmp_path, total_steps=step + 3)
    resumed.train(small_buffer(), resume=True)
    torch.testing.assert_close(weights(resumed), uninterrupted(total_steps=step + 3), rtol=0, atol=0)


class Signal(Callback):
    """Sends a signal to its own process at some steps."""

    def __init__(self, number: int, steps: tuple[int, ...]) -> None:
        self.number, self.steps = number, steps

    def on_step_end(self, step: int, losses: Any) -> None:
        if step in self.steps:
            os.kill(os.getpid(), self.number)


def test_ctrl_c_ends_in_a_keyboard_interrupt_behind_a_whole_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer, buffer = new_trainer(tmp_path, Signal(signal.SIGINT, (6,)), every=100), small_buffer()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(buffer)
    assert "\nStopping after this step; checkpoint callbacks then save. Press Ctrl-C again" in capfd.readouterr().err
    assert (trainer.step_count, trainer.interrupted, trainer.finished) == (6, True, False)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000006"]
    assert signal.getsignal(signal.SIGINT) is before
    trainer.train(buffer)
    torch.testing.assert_close(weights(trainer), uninterrupted(), rtol=0, atol=0)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    class Twice(Callback):
        def on_step_end(self, step: int, losses: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second one was not seen")

    trainer = new_trainer(None, Twice())
    with pytest.raises(KeyboardInterrupt):
        trainer.train(small_buffer())
    assert not trainer.interrupted


def test_the_notice_names_the_time_of_a_long_step() -> None:
    stop = StopRequest()
    assert "Stopping after this step; checkpoint callbacks then save." in stop.notice
    with stop.timing():
        pass
    assert stop.seconds_per_step is not None and 0 < stop.seconds_per_step < 3
    assert "Stopping after this step; checkpoint callbacks then save." in stop.notice
    stop.seconds_per_step = 15.7
    assert "Stopping after this step, which takes about 16 seconds; checkpoint" in stop.notice


def test_a_programs_own_handler_is_left_alone() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        trainer = new_trainer(None, Signal(signal.SIGTERM, (2,)))
        trainer.train(small_buffer())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] and trainer.finished


def test_training_works_on_another_thread() -> None:
    trainer = new_trainer()
    thread = threading.Thread(target=trainer.train, args=(small_buffer(),))
    thread.start()
    thread.join()
    torch.testing.assert_close(weights(trainer), uninterrupted(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_was_forked_meanwhile_obeys_signals_as_ever(number: int) -> None:
    with stopping_on_signals() as stop:
        child = os.fork()
        if child == 0:
            try:
                time.sleep(20)
            except KeyboardInterrupt:
                os._exit(5)
            finally:
                os._exit(7)
        time.sleep(0.05)
        os.kill(child, number)
        _, status = os.waitpid(child, 0)
        assert not stop
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGTERM if number == signal.SIGTERM else 5)


def test_processes_that_the_same_signal_ended_are_no_error() -> None:
    with pytest.raises(KeyboardInterrupt), stopping_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        raise EOFError
    with pytest.raises(SystemExit, match="143"), stopping_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise BrokenPipeError
    with pytest.raises(KeyboardInterrupt), stopping_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        raise TorchDynamoException("the compiler was interrupted")
    with pytest.raises(EOFError), stopping_on_signals():
        raise EOFError
    with pytest.raises(CheckpointError), stopping_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        raise CheckpointError("The disk is full.")


# --- kills


def train_to_the_end(directory: Path, out: Path) -> None:
    torch.set_num_threads(1)
    trainer = new_trainer(directory, every=1, total_steps=60)
    trainer.train(small_buffer(), resume=True)
    torch.save(weights(trainer), out)


def run_with_kills(directory: Path, out: Path, kills: int, seed: int) -> int:
    """Trains to the end despite so many kills; returns how many of them met a running training."""
    moments, met = random.Random(seed), 0
    for _ in range(kills):
        process = start(train_to_the_end, directory, out)
        before = newest_checkpoint(directory)
        wait_for(lambda: newest_checkpoint(directory) != before, process)  # noqa: B023
        time.sleep(moments.uniform(0, 0.03))
        met += process.exitcode is None
        kill(process)
        loaded = new_trainer()
        loaded.load_checkpoint(newest_checkpoint(directory))  # type: ignore[arg-type]
    assert finish(start(train_to_the_end, directory, out)) == 0
    return met


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_any_moment_lose_nothing(tmp_path: Path, kills: int) -> None:
    directory, out = tmp_path / "run", tmp_path / "weights.pt"
    assert run_with_kills(directory, out, kills, seed=kills) >= 2
    assert strays(directory) == []
    torch.testing.assert_close(torch.load(out), uninterrupted(total_steps=60), rtol=0, atol=0)


# --- a full disk


def train_on_a_full_disk(directory: Path, out: Path) -> None:
    torch.set_num_threads(1)

    class Fill(Callback):
        def on_step_end(self, step: int, losses: Any) -> None:
            if step == 6:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    trainer = new_trainer(None, Fill(), CheckpointCallback(directory, 4))
    try:
        trainer.train(small_buffer())
    except CheckpointError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        out.write_text(str(error))


def test_a_full_disk_is_an_error_that_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    directory, out = tmp_path / "run", tmp_path / "error.txt"
    assert finish(start(train_on_a_full_disk, directory, out)) == 0
    assert "step-00000008 could not be written" in out.read_text() and "unchanged" in out.read_text()
    assert [path.name for path in directory.iterdir()] == ["step-00000004"]
    resumed = new_trainer(directory)
    resumed.train(small_buffer(), resume=True)
    torch.testing.assert_close(weights(resumed), uninterrupted(), rtol=0, atol=0)


# --- divergence


def test_a_diverged_run_resumes_from_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, every=2)
    trainer.model.poison_at = 6  # type: ignore[assignment]
    with pytest.raises(TrainingError, match="noise is not finite at gradient step 6"):
        trainer.train(small_buffer())
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000004"
    resumed = new_trainer(tmp_path)
    resumed.train(small_buffer(), resume=True)
    torch.testing.assert_close(weights(resumed), uninterrupted(), rtol=0, atol=0)


# --- batches on their way


class Recording(ReplayBuffer):
    """Remembers on which threads windows were gathered."""

    threads: list[str]

    def sample_ahead(self, batch_size: int, seq_len: int | None = None) -> Batch:
        self.threads.append(threading.current_thread().name)
        return super().sample_ahead(batch_size, seq_len)


def filled(kind: type[ReplayBuffer] = ReplayBuffer, extras: bool = False) -> Any:
    spec = {"count": ((1,), np.float32)} if extras else None
    buffer = kind(200, (3,), 2, extras=spec, seed=5)
    data = np.random.default_rng(0)
    for _ in range(10):
        buffer.add_episode(data.normal(size=(10, 3)), data.uniform(-1, 1, (9, 2)), data.normal(size=9))
    return buffer


def test_prefetched_batches_are_those_of_the_buffer_itself() -> None:
    plain, ahead = filled(), filled()
    with PrefetchedBatches(ahead, 4, 6, torch.device("cpu")) as batches:
        for _ in range(3):
            mine, its = batches.next(), plain.sample(4, 6)
            torch.testing.assert_close(mine.obs, its.obs)
            assert mine.row_ids is not None and its.row_ids is not None
            assert torch.equal(mine.row_ids, its.row_ids)
        assert batches.rng_state() == plain.rng_state()
    assert ahead.rng_state() == plain.rng_state()


def test_a_batch_has_the_extras_that_the_step_before_wrote() -> None:
    buffer = filled(extras=True)
    with PrefetchedBatches(buffer, 8, 10, torch.device("cpu")) as batches:
        first = batches.next()
        assert first.row_ids is not None
        buffer.update_extras(first.row_ids, {"count": np.ones((8, 10, 1), np.float32)})
        second = batches.next()
    assert second.row_ids is not None
    expected = torch.isin(second.row_ids, first.row_ids).float()[..., None]
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(second.extras["count"], expected, rtol=0, atol=0)


def test_training_samples_on_another_thread_but_asks_a_users_provider_on_its_own() -> None:
    buffer = filled(Recording)
    buffer.threads = []
    new_trainer().train(buffer)
    assert len(buffer.threads) == 13 and all(name.startswith("prefetch") for name in buffer.threads)

    class Own(MemoryProvider):
        def sample(self, *args: Any, **kwargs: Any) -> Batch:
            assert threading.current_thread() is threading.main_thread()
            return super().sample(*args, **kwargs)

    new_trainer().train(Own())


def test_an_error_of_the_buffer_reaches_the_caller() -> None:
    with pytest.raises(ValueError, match="seq_len"):
        new_trainer(sequence_length=500).train(small_buffer())
