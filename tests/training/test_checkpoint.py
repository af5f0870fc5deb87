"""Saving and continuing a run, and what damaged or foreign checkpoints are answered with."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.training import MemoryProvider, NoisyRegression

from worldflux.accel.randomness import random_state, set_random_state
from worldflux.errors import CheckpointError
from worldflux.files import atomic_directory, recover_directory, remove_directory
from worldflux.replay.buffer import ReplayBuffer
from worldflux.training import Trainer, TrainingConfig
from worldflux.training.checkpoint import TRAINER_FILE, newest_checkpoint

CONFIG = TrainingConfig(
    total_steps=8, batch_size=3, sequence_length=4, learning_rate=1e-2, warmup_steps=5, device="cpu"
)
CPU = torch.device("cpu")


def new_trainer(width: int = 8, **changes) -> Trainer:
    torch.manual_seed(0)
    return Trainer(NoisyRegression(width), replace(CONFIG, **changes))


def same_weights(a: Trainer, b: Trainer) -> bool:
    one, other = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def saved(tmp_path) -> Path:
    trainer = new_trainer()
    trainer.train(MemoryProvider(), num_steps=3)
    trainer.save_checkpoint(tmp_path / "run")
    return tmp_path / "run"


def test_a_continued_run_has_the_same_bits_as_one_that_did_not_stop(saved):
    whole = new_trainer()
    whole_data = MemoryProvider()
    whole.train(whole_data)

    continued = Trainer(NoisyRegression(), CONFIG)
    continued.load_checkpoint(saved)
    assert continued.step_count == 3
    torch.rand(7), np.random.rand(7), random.random()  # what happens between loading and training has no influence
    data = MemoryProvider()
    continued.train(data)

    assert continued.step_count == 8
    assert torch.equal(torch.stack(data.sampled), torch.stack(whole_data.sampled[3:]))
    assert same_weights(continued, whole)


def test_a_checkpoint_that_names_no_ranks_is_that_of_one_process(saved):
    progress = json.loads((saved / "trainer.json").read_text())
    assert progress.pop("ranks") == 1
    (saved / "trainer.json").write_text(json.dumps(progress))
    continued = new_trainer()
    continued.load_checkpoint(saved)
    assert continued.step_count == 3


def test_single_steps_continue_too(saved):
    losses = []
    for _ in range(2):
        trainer = Trainer(NoisyRegression(), CONFIG)
        trainer.load_checkpoint(saved)
        losses.append(trainer.step(MemoryProvider().sample(2, 3))["loss"].item())
    assert losses[0] == losses[1]


def test_saving_does_not_change_the_run(tmp_path):
    undisturbed, disturbed = new_trainer(), new_trainer()
    data = MemoryProvider()
    undisturbed.train(MemoryProvider())
    disturbed.train(data, num_steps=4)
    disturbed.save_checkpoint(tmp_path / "run")
    disturbed.save_checkpoint(tmp_path / "run")
    disturbed.train(data)
    assert same_weights(undisturbed, disturbed)


def test_a_checkpoint_is_four_plain_files(saved):
    @dataclass
    class Config:
        def save(self, path: Path) -> None:
            path.write_text("{}")

    assert sorted(file.name for file in saved.iterdir()) == ["model.safetensors", "optimizer.pt", "trainer.json"]
    trainer = new_trainer()
    trainer.model.config = Config()
    trainer.save_checkpoint(saved)
    assert sorted(file.name for file in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "trainer.json",
    ]
    assert [entry.name for entry in saved.parent.iterdir()] == ["run"]
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())


def test_weights_that_are_shared_come_back_shared(tmp_path):
    def tied() -> Trainer:
        trainer_model = NoisyRegression()
        trainer_model.again = trainer_model.body
        return Trainer(trainer_model, CONFIG)

    first = tied()
    first.save_checkpoint(tmp_path / "run")
    second = tied()
    second.load_checkpoint(tmp_path / "run")
    assert same_weights(first, second)
    assert second.model.again[0].weight is second.model.body[0].weight


def test_the_rate_of_the_new_configuration_rules_and_the_warm_up_goes_on(saved):
    trainer = Trainer(NoisyRegression(), replace(CONFIG, learning_rate=0.5))
    trainer.load_checkpoint(saved)
    group = trainer.optimizers[0].param_groups[0]
    assert group["lr"] == 0.5 and group["updates"] == 3


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer.json"])
@pytest.mark.parametrize("damage", ["missing", "half", "empty", "foreign"])
def test_a_damaged_file_is_named_and_the_trainer_stays_as_it_was(saved, name, damage):
    file = saved / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"half": content[: len(content) // 2], "empty": b"", "foreign": b"[1, 2]"}[damage])
    trainer, untouched = new_trainer(), new_trainer()
    with pytest.raises(CheckpointError, match=name):
        trainer.load_checkpoint(saved)
    assert same_weights(trainer, untouched) and trainer.step_count == 0


def changed(content: dict, keys: str, value: object) -> dict:
    """A deep copy of `content` with one entry, given as "a.b.c", replaced; without it if the value is None."""
    content = copy.deepcopy(content)
    *path, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
    inner = content
    for key in path:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return content


def assert_refused(directory: Path, message: str) -> None:
    trainer, untouched = new_trainer(), new_trainer()
    before = json.dumps(random_state(CPU))
    with pytest.raises(CheckpointError, match=message):
        trainer.load_checkpoint(directory)
    assert json.dumps(random_state(CPU)) == before
    assert same_weights(trainer, untouched) and trainer.step_count == 0 and not trainer.optimizers[0].state


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("format", 1, "has format 1, this version reads 2. Load it with the version of worldflux that wrote it"),
        ("step", "x", "trainer.json: step is 'x', expected a whole number from 0"),
        ("step", -1, "step is -1"),
        ("step", 2.0, "step is 2.0"),
        ("step", True, "step is True"),
        ("run", None, "is not the progress of a Trainer"),
        ("ranks", 0, "trainer.json: ranks is 0, expected a whole number from 1"),
        ("sampler", "x", "sampler is 'x'"),
        ("random", {}, "trainer.json: random is not the state"),
        ("random", [], "random is not the state"),
        ("random.python", [3, [1, 2], 0.5], "random is not the state"),
        ("random.python.1.0", -1, "random is not the state"),
        ("random.numpy", [1], "random is not the state"),
        ("random.numpy.state", [1], "random is not the state"),
        ("random.numpy.state.key", [1, 2], "random is not the state"),
        ("random.numpy.state.pos", 10**6, "random is not the state .*pos is 1000000"),
        ("random.numpy.bit_generator", "PCG64", "random is not the state"),
        ("random.torch.cpu", "AAAA", "random is not the state"),
        ("random.torch.cpu", None, "random is not the state"),
        ("random.torch.cpu", "no base64", "random is not the state"),
    ],
)
def test_progress_that_nobody_can_go_on_from_is_refused_before_anything_is_changed(saved, keys, value, message):
    progress = json.loads((saved / "trainer.json").read_text())
    (saved / "trainer.json").write_text(json.dumps(changed(progress, keys, value)))
    assert_refused(saved, message)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("kind", None),
        ("states", 3),
        ("states", [3]),
        ("states.0.param_groups", [{}]),
        ("states.0.param_groups.0.params", [0, 1, 2, 2]),
        ("states.0.param_groups.0.updates", "x"),
        ("states.0.param_groups.0.updates", None),
        ("states.0.state", [1]),
        ("states.0.state.0", {}),
        ("states.0.state.0.start", "x"),
        ("states.0.state.0.start", 100),
        ("states.0.state.0.mu", torch.zeros(2, 2)),
        ("states.0.state.3.nu", None),
    ],
)
def test_an_optimizer_that_cannot_go_on_is_refused_before_anything_is_changed(saved, keys, value):
    content = torch.load(saved / "optimizer.pt", weights_only=True)
    torch.save(changed(content, keys, value), saved / "optimizer.pt")
    assert_refused(saved, "optimizer.pt cannot be loaded")


def test_a_checkpoint_of_adam_has_what_adam_goes_on_from(tmp_path):
    def with_adam() -> Trainer:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        model.loss = lambda batch: (model(batch.obs).squeeze(-1) - batch.rewards).square().mean()
        return Trainer(model, CONFIG)

    whole, first, continued = with_adam(), with_adam(), with_adam()
    whole.train(MemoryProvider())
    first.train(MemoryProvider(), num_steps=3)
    first.save_checkpoint(tmp_path / "run")
    continued.load_checkpoint(tmp_path / "run")
    continued.train(MemoryProvider())
    assert same_weights(whole, continued)


def test_a_run_on_recorded_steps_continues_with_the_same_bits(tmp_path):
    def recorded() -> ReplayBuffer:
        buffer, rng = ReplayBuffer(100, (3,), 2), np.random.default_rng(0)
        for _ in range(60):
            buffer.add(rng.normal(size=(1, 3)), rng.uniform(-1, 1, (1, 2)), rng.normal(size=1), [False], [False])
        return buffer

    whole, first, continued, buffer = new_trainer(), new_trainer(), new_trainer(), recorded()
    whole.train(recorded())
    first.train(buffer, num_steps=3)
    first.save_checkpoint(tmp_path / "run")
    buffer.save(tmp_path / "buffer.npz")
    continued.load_checkpoint(tmp_path / "run")
    continued.train(ReplayBuffer.load(tmp_path / "buffer.npz"))
    assert same_weights(whole, continued)


def test_a_checkpoint_that_is_not_there_is_an_error_of_ours(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere has no trainer.json\. Pass a directory written by"):
        new_trainer().load_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_of_another_model_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"body.0.bias has shape \(8,\), expected \(9,\)"):
        new_trainer(width=9).load_checkpoint(saved)
    other = torch.nn.Linear(2, 2)
    other.loss = lambda batch: other(batch.obs).mean()
    with pytest.raises(CheckpointError, match=r"it lacks 'bias' and 1 more and has 'body.0.bias' and 4 more"):
        Trainer(other, CONFIG).load_checkpoint(saved)
    frozen = NoisyRegression()
    frozen.body[0].requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"optimisers for \[\[4\]\] parameters, and this model trains \[\[2\]\]"):
        Trainer(frozen, CONFIG).load_checkpoint(saved)


def test_a_directory_with_other_things_in_it_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
        new_trainer().save_checkpoint(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_a_write_that_fails_leaves_the_old_checkpoint(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    trainer = new_trainer()
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left"):
        trainer.save_checkpoint(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["run"]


# Directories


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "run"
    with atomic_directory(target) as beside:
        (beside / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), atomic_directory(target) as beside:
        (beside / "a").write_text("2")
        raise ZeroDivisionError
    assert (target / "a").read_text() == "1"
    with atomic_directory(target) as beside:
        (beside / "b").write_text("3")
    assert [file.name for file in target.iterdir()] == ["b"]
    assert [entry.name for entry in target.parent.iterdir()] == ["run"]


def test_files_are_on_the_disk_before_their_directory_takes_its_place(tmp_path, disk):
    calls = disk.recorded()
    with atomic_directory(tmp_path / "run") as beside:
        (beside / "deep").mkdir()
        (beside / "deep" / "a").write_text("1")
    run = tmp_path / "run"
    written = {("fsync", path.stat().st_ino) for path in (run / "deep" / "a", run / "deep", run)}
    renamed = calls.index(("rename", run.stat().st_ino))
    assert set(calls[:renamed]) == written and calls[renamed + 1 :] == [("fsync", tmp_path.stat().st_ino)]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    target = tmp_path / "run"
    with atomic_directory(target) as beside:
        (beside / "a").write_text("1")
    os.rename(target, tmp_path / ".run.replaced")
    recover_directory(target)
    assert (target / "a").read_text() == "1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


_WRITER = """
import sys
from worldflux.files import atomic_directory
i = 0
while True:
    i += 1
    with atomic_directory(sys.argv[1]) as beside:
        for name in "ab":
            (beside / name).write_text(str(i))
    print(i, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_directory_and_the_next_one_cleans_up(tmp_path):
    target = tmp_path / "run"
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(target)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    recover_directory(target)
    assert (target / "a").read_text() == (target / "b").read_text()
    with atomic_directory(target) as beside:
        (beside / "a").write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_leftovers_are_removed_but_not_what_somebody_may_be_writing(tmp_path):
    with atomic_directory(tmp_path / "a") as beside:
        mine = beside.name
        with atomic_directory(tmp_path / "b"):
            assert beside.is_dir()
    # A container that is started again gives its processes the same numbers.
    before_a_restart = tmp_path / mine.replace(".a.", ".c.")
    elsewhere_now, elsewhere_long_ago = tmp_path / ".d.machine-1.writing", tmp_path / ".e.machine-1.writing"
    for left in (before_a_restart, elsewhere_now, elsewhere_long_ago):
        left.mkdir()
    yesterday = time.time() - 90_000
    os.utime(elsewhere_long_ago, (yesterday, yesterday))
    with atomic_directory(tmp_path / "a"):
        pass
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b", elsewhere_now.name}


def test_a_reader_between_the_two_renames_disturbs_nobody(tmp_path, monkeypatch):
    target, rename = tmp_path / "run", os.rename
    with atomic_directory(target) as beside:
        (beside / "a").write_text("1")

    def rename_and_read(old, new):
        rename(old, new)
        if Path(old) == target:
            monkeypatch.setattr(os, "rename", rename)
            recover_directory(target)
            assert (target / "a").read_text() == "1"

    monkeypatch.setattr(os, "rename", rename_and_read)
    with atomic_directory(target) as beside:
        (beside / "a").write_text("2")
    assert (target / "a").read_text() == "2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_a_writer_may_be_quicker_than_a_reader_that_recovers(tmp_path, monkeypatch):
    target, aside = tmp_path / "run", tmp_path / ".run.replaced"
    aside.mkdir()

    def too_late(old, new):
        target.mkdir()
        (target / "a").write_text("2")
        raise OSError("Directory not empty")

    monkeypatch.setattr(os, "rename", too_late)
    recover_directory(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_what_somebody_else_has_removed_needs_no_removing(tmp_path):
    remove_directory(tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


def test_looking_for_checkpoints_moves_nothing_that_is_none(tmp_path):
    for name in ("notes", ".notes.replaced", ".step-00000004.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / TRAINER_FILE).write_text('{"run": "a"}')
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000004"
    assert {entry.name for entry in tmp_path.iterdir()} == {"notes", ".notes.replaced", "step-00000004"}


def test_the_random_streams_continue_where_they_were():
    def draw() -> tuple[float, float, float, float]:
        return random.random(), float(np.random.randn()), torch.rand(()).item(), random.gauss(0, 1)

    draw()
    state = random_state(CPU)
    expected = draw()
    draw()
    set_random_state(state, CPU)
    assert draw() == expected
