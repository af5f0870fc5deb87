"""Several tasks in one model: the column `task` of buffers and files, training on the data of each, further tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worldflux import create_world_model
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.replay.provider import TaskReplay
from worldflux.training import Callback, CheckpointCallback, ReplayBuffer, Trainer, TrainingConfig, train

SMALL = dict(latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=3, num_bins=15, task_dim=4)
TASK = {"task": ((), np.int64)}
CONFIG = TrainingConfig(total_steps=6, batch_size=8, sequence_length=4, log_interval=3, device="cpu", seed=3)


def model_of(*names: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    tasks = dict(num_tasks=len(names), task_names=names) if names else {}
    return create_world_model("tdmpc2:tiny", **{"obs_shape": (4,), "action_dim": 2, **SMALL, **tasks, **fields})


def weights(model: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def data_of(task: int, episodes: int = 6, width: int = 4, action_dim: int = 2, **options: Any) -> ReplayBuffer:
    """Episodes of ten steps, of which every observation begins with 100 times the task."""
    rng, buffer = np.random.default_rng(task), ReplayBuffer(1_000, (width,), action_dim, seed=0, **options)
    for _ in range(episodes):
        obs = rng.normal(size=(11, width))
        obs[:, 0] = 100 * task + rng.uniform(size=11)
        extras = {"task": np.full(10, task)} if "extras" in options else None
        buffer.add_episode(obs, rng.uniform(-1, 1, (10, action_dim)), rng.normal(size=10), extras=extras)
    return buffer


def two_tasks(**options: Any) -> ReplayBuffer:
    """Episodes of task 0 and of task 1 in turn."""
    buffer = ReplayBuffer(1_000, (4,), 2, extras=TASK, seed=0, **options)
    for episode in range(8):
        obs = np.full((11, 4), 100.0 * (episode % 2))
        buffer.add_episode(obs, np.zeros((10, 2)), np.zeros(10), extras={"task": np.full(10, episode % 2)})
    return buffer


def tasks_match(buffer: ReplayBuffer) -> bool:
    """Whether each row is of the task that its observation shows, also the last one of each episode."""
    batch = buffer.sample(256, 4)
    return torch.equal(batch.extras["task"], (batch.obs[..., 0] / 100).long())


# The column of a buffer and its files


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_envs": 3},
        {"storage": "in_place"},
        {"capacity": 25},
        {"capacity": 25, "extras": {"mark": ((2,), np.float32)}},
    ],
)
def test_a_file_keeps_the_task_of_each_row(tmp_path: Path, options: dict[str, Any]) -> None:
    two_tasks(n_envs=2).save(tmp_path / "tasks.npz")
    with np.load(tmp_path / "tasks.npz") as file:
        assert file["task"].dtype == np.int64 and sorted(set(file["task"].tolist())) == [0, 1]
    again = ReplayBuffer.load(tmp_path / "tasks.npz", **options)
    assert again.extras["task"] == ((), np.dtype(np.int64)) and tasks_match(again)


def test_the_files_of_a_directory_keep_their_tasks_and_are_of_one_kind(tmp_path: Path) -> None:
    for task in (0, 1):
        data_of(task, extras=TASK).save(tmp_path / f"{task}.npz")
    assert tasks_match(ReplayBuffer.load(tmp_path))
    data_of(2).save(tmp_path / "2.npz")
    with pytest.raises(BufferError, match=r"columns 'task' are there in the first and missing in the second"):
        ReplayBuffer.load(tmp_path)


def test_a_file_without_the_table_of_episodes_may_have_tasks(tmp_path: Path) -> None:
    rows = dict(obs=np.zeros((6, 4), np.float32), actions=np.zeros((6, 2), np.float32), rewards=np.zeros(6, np.float32))
    flags = dict(dones=np.arange(6) % 3 == 2, obs_shape=np.array([4]), action_dim=2, capacity=10)
    np.savez(tmp_path / "own.npz", **rows, **flags, task=np.array([0, 0, 0, 1, 1, 1], np.int32))
    assert ReplayBuffer.load(tmp_path / "own.npz").extras_state()["task"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (np.full(80, -2), "task has -2, expected whole numbers from 0"),
        (np.full(80, 2**40), "task has 1099511627776, expected whole numbers from 0 to 99,999"),
        (np.full(80, 0.5), "task has dtype float64, expected whole numbers"),
        (np.full(80, np.nan), "task has dtype float64, expected whole numbers"),
        (np.zeros(79, np.int64), r"task has shape \(79,\), expected \(80,\)"),
    ],
)
def test_a_file_with_wrong_tasks_is_refused(tmp_path: Path, tasks: np.ndarray, message: str) -> None:
    two_tasks().save(tmp_path / "tasks.npz")
    with np.load(tmp_path / "tasks.npz") as file:
        np.savez(tmp_path / "wrong.npz", **{**file, "task": tasks})
    with pytest.raises(BufferError, match=message):
        ReplayBuffer.load(tmp_path / "wrong.npz")


@pytest.mark.parametrize("task", [-1, 0.5, float("nan"), 10**6])
def test_what_is_no_task_is_not_stored(task: float) -> None:
    buffer = ReplayBuffer(100, (4,), 2, extras=TASK)
    with pytest.raises(BufferError, match="expected whole numbers from 0 to 99,999"):
        buffer.add_episode(np.zeros((3, 4)), np.zeros((2, 2)), np.zeros(2), extras={"task": np.full(2, task)})
    assert not len(buffer)
    with pytest.raises(ConfigurationError, match=r"extras\['task'\] is .*such as \(\(\), 'int64'\)"):
        ReplayBuffer(100, (4,), 2, extras={"task": ((), np.float32)})


def test_a_buffer_of_which_nobody_has_said_the_tasks_has_no_column_in_its_file(tmp_path: Path) -> None:
    data_of(0).save(tmp_path / "plain.npz")
    blank = ReplayBuffer.load(tmp_path / "plain.npz", extras=TASK)
    assert set(blank.extras_state()["task"].tolist()) == {-1}
    blank.save(tmp_path / "blank.npz")
    assert "task" not in np.load(tmp_path / "blank.npz")
    later = data_of(0)
    later.add_extras(TASK)
    assert set(later.extras_state()["task"].tolist()) == {-1}


def test_tasks_go_along_where_episodes_are_copied_and_tell_data_apart() -> None:
    whole, copy = two_tasks(), ReplayBuffer(1_000, (4,), 2, extras=TASK, seed=0)
    copy.add_episodes_of(whole)
    assert len(copy) == len(whole) and tasks_match(copy)
    other = data_of(0, extras=TASK)
    other._store.extras["task"][:] = 1
    assert other.digest() != data_of(0, extras=TASK).digest()


# Data that do not fit


def test_data_that_do_not_say_their_tasks_or_are_of_others_are_refused() -> None:
    model, steps = model_of("a", "b"), dict(total_steps=1, batch_size=2, sequence_length=4, device="cpu")
    blank = data_of(0)
    blank.add_extras(model.replay_extras())
    for data in (data_of(0), blank):
        with pytest.raises(BufferError, match=r"2 tasks \(num_tasks\), and the data do not say which.*'walk': buffer"):
            train(model, data, **steps)
    with pytest.raises(BufferError, match="has 2, expected whole numbers from 0 to 1"):
        train(model, data_of(2, extras=TASK), **steps)
    with pytest.raises(ConfigurationError, match=r"data of the task 'walk'.*tasks of the model are: a, b"):
        train(model, {"walk": data_of(0)}, **steps)
    with pytest.raises(ConfigurationError, match=r"expected a ReplayBuffer for each name"):
        train(model, {"a": "file.npz"}, **steps)
    with pytest.raises(ShapeMismatchError, match=r"data of the task 'b' have observations \(5,\)"):
        train(model, {"a": data_of(0), "b": data_of(1, width=5)}, **steps)
    narrow = model_of("a", "b", task_action_dims=(2, 1))
    wide = data_of(1, extras=TASK)
    for data in ({"a": data_of(0), "b": data_of(1)}, wide):
        with pytest.raises(BufferError, match=r"the model uses the first 1 of these numbers for .*task"):
            train(narrow, data, **steps)
    train(narrow, {"a": data_of(0), "b": data_of(1, action_dim=1)}, **steps)
    with pytest.raises(ConfigurationError, match="data of the task 'walk'"):
        train(model_of(task_names=("run",)), {"walk": data_of(0)}, **steps)
    with pytest.raises(BufferError, match="data of the task 'a' have no window of 400 rows"):
        train(model, {"a": data_of(0)}, total_steps=1, sequence_length=400, device="cpu")
    for single in (model_of(), create_world_model("dreamerv3:tiny", obs_shape=(4,), action_dim=2)):
        with pytest.raises(ConfigurationError, match=r"tasks \('a', 'b'\), and the model has one.*num_tasks=2"):
            train(single, {"a": data_of(0), "b": data_of(1)}, **steps)


def test_a_batch_of_a_task_that_there_is_not_is_refused() -> None:
    model, data = model_of("a", "b"), TaskReplay({"c": data_of(2)}, {"c": 2}, (4,), 2)
    with pytest.raises(BufferError, match=r"extras\['task'\] has 2, expected whole numbers from 0 to 1"):
        Trainer(model, CONFIG).step(data.sample(2, 4), data)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a",), "task_names is .* expected one name for each of 2 tasks"),
        (("a", "a"), "expected names that differ"),
        ("ab", "expected a name for each task"),
        (("a", ""), "expected a name for each task"),
        (("a", 1), "expected a name for each task"),
    ],
)
def test_names_of_tasks_are_checked(names: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        model_of(num_tasks=2, task_names=names)


def test_a_task_is_found_by_its_name_or_number() -> None:
    config = model_of("walk", "run").config
    assert [config.task_number(task) for task in ("run", "walk", 1, np.int64(0))] == [1, 0, 1, 0]
    with pytest.raises(ConfigurationError, match=r"Unknown task 'runn'; did you mean 'run'.*walk, run"):
        config.task_number("runn")
    with pytest.raises(ConfigurationError, match="task is 2, expected 0 to 1"):
        config.task_number(2)


# Training on the data of each task


def test_batches_have_all_tasks_in_proportion_and_in_the_form_of_the_model() -> None:
    data = {"a": data_of(0, episodes=2), "b": data_of(1, episodes=6, width=3, action_dim=1)}
    mixed = TaskReplay(data, {"b": 1, "a": 0}, (4,), 2)
    mixed.seed(0)
    assert len(mixed) == 80 and mixed.num_transitions == 80
    batch = mixed.sample(4000, 4)
    assert (batch.obs.shape, batch.actions.shape) == ((4000, 4, 4), (4000, 4, 2))
    tasks = batch.extras["task"]
    assert torch.equal(tasks, (batch.obs[..., 0] / 100).long())
    assert 0.72 < float(tasks.float().mean()) < 0.78
    of_b = tasks == 1
    assert not batch.obs[of_b][:, 3].any() and not batch.actions[of_b][:, 1].any()
    assert batch.obs[~of_b][:, 3].any() and batch.actions[~of_b][:, 1].any()
    state = mixed.rng_state()
    again = [mixed.sample(8, 4).obs, mixed.set_rng_state(state), mixed.sample(8, 4).obs]
    assert torch.equal(again[0], again[2])


def test_each_task_has_its_share_held_out_and_a_loss_of_its_own() -> None:
    class Evaluations(Callback):
        def on_eval_end(self, step: int, metrics: Any) -> None:
            seen.append(dict(metrics))

    seen: list[dict[str, float]] = []
    model = model_of("a", "b")
    data = {"a": data_of(0, episodes=10), "b": data_of(1, episodes=20)}
    trainer = Trainer(model, replace(CONFIG, eval_interval=3), [Evaluations()], eval_data=0.2)
    trainer.train(data)
    assert len(seen) == 2 and {"loss", "loss/a", "loss/b"} <= seen[0].keys()
    assert trainer.evaluate(data) == trainer.evaluate(TaskReplay(data, {"a": 0, "b": 1}, (4,), 2))
    assert trainer.evaluate(data)["loss/a"] == pytest.approx(trainer.evaluate({"a": data["a"]})["loss"])
    left, held_out = TaskReplay(data, {"a": 0, "b": 1}, (4,), 2).split(0.2)
    assert [len(left), len(held_out), len(held_out.data["b"])] == [240, 60, 40]


def test_training_on_several_tasks_changes_what_the_model_knows_of_each_and_is_resumed_exactly(tmp_path: Path) -> None:
    class Gone(Callback):
        def on_step_end(self, step: int, losses: Any) -> None:
            if step == 4:
                raise OSError("gone")

    def run(*callbacks: Callback, resume: bool = False) -> Tensor:
        model = model_of("a", "b")
        Trainer(model, CONFIG, callbacks).train({"a": data_of(0), "b": data_of(1)}, resume=resume)
        changed.append(model.tasks.weight.detach() - model_of("a", "b").tasks.weight.detach())
        return weights(model)

    changed: list[Tensor] = []
    expected = run()
    assert changed[0].abs().amax(1).gt(1e-5).all()
    saving = CheckpointCallback(tmp_path, 2)
    with pytest.raises(OSError, match="gone"):
        run(saving, Gone())
    torch.testing.assert_close(run(CheckpointCallback(tmp_path, 2), resume=True), expected, rtol=0, atol=0)


# Several tasks and one


def single_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model of several tasks as those of a model of one: without embeddings and their columns."""
    names, width = model_of(episodic=True).state_dict(), model.config.task_dim
    found = {}
    for name, weight in model.state_dict().items():
        if name in names:
            if weight.shape != names[name].shape:  # inputs are the latent or observation, the embedding, the action
                before = 4 if name.startswith("encoder") else 16
                assert not weight[..., before : before + width].any(), name
                weight = torch.cat([weight[..., :before], weight[..., before + width :]], -1)
            found[name] = weight.clone()
    return found


def test_an_update_with_rows_of_one_task_is_that_of_a_model_with_one_task() -> None:
    many = model_of("a", "b", episodic=True)
    shapes = model_of(episodic=True).state_dict()
    with torch.no_grad():  # an embedding of zeros that no layer listens to stays as it is
        many.tasks.weight.zero_()
        for name, weight in many.state_dict().items():
            if name in shapes and weight.shape != shapes[name].shape:
                before = 4 if name.startswith("encoder") else 16
                weight[..., before : before + many.config.task_dim] = 0.0
    one = model_of(episodic=True)
    one.load_state_dict(single_weights(many))
    data, losses = data_of(0), []
    for model, given in ((many, {"a": data}), (one, {"a": data})):
        trainer = Trainer(model, CONFIG)
        trainer.train(given)
        losses.append(trainer.evaluate(given))
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-4)
    assert not many.tasks.weight.any()
    for name, weight in single_weights(many).items():
        torch.testing.assert_close(weight, one.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(one.reward_head.layers[0].weight, model_of(episodic=True).reward_head.layers[0].weight)


def test_data_of_the_only_task_give_the_bits_of_data_without_a_name() -> None:
    named, plain = model_of(), model_of()
    train(named, {"walk": data_of(0)}, total_steps=4, batch_size=4, sequence_length=4, device="cpu")
    train(plain, data_of(0), total_steps=4, batch_size=4, sequence_length=4, device="cpu")
    torch.testing.assert_close(weights(named), weights(plain), rtol=0, atol=0)


# Further tasks


def test_a_further_task_leaves_what_the_model_knows_of_the_others(tmp_path: Path) -> None:
    model = model_of("a", "b", task_action_dims=(2, 1), task_episode_lengths=(500, 50), episodic=True)
    data = {"a": data_of(0), "b": data_of(1, action_dim=1)}
    train(model, data, total_steps=3, batch_size=4, sequence_length=4, device="cpu")
    model.save_pretrained(tmp_path)
    model = create_world_model(tmp_path)
    assert model.config.task_names == ("a", "b")
    grown = model.with_task("c", like="b")
    assert (grown.config.task_names, grown.config.task_action_dims) == (("a", "b", "c"), (2, 1, 2))
    assert grown.config.task_episode_lengths == (500, 50, 50) and model.config.num_tasks == 2
    obs = torch.randn(2, 4)
    for task in (0, 1):
        old, new = model.encode(obs, task=task), grown.encode(obs, task=task)
        torch.testing.assert_close(grown.value(new), model.value(old), rtol=0, atol=0)
    latent = grown.encode(obs, task=2)["latent"]
    torch.testing.assert_close(latent, grown.encode(obs, task=1)["latent"], rtol=0, atol=0)
    assert not torch.equal(latent, model.with_task("c").encode(obs, task=2)["latent"])
    other = model.with_task("c", action_dim=1, episode_length=100).config
    assert (other.task_action_dims[2], other.task_episode_lengths[2]) == (1, 100)


def test_a_further_task_is_learned() -> None:
    model = model_of("a", "b")
    train(model, {"a": data_of(0), "b": data_of(1)}, total_steps=3, batch_size=4, sequence_length=4, device="cpu")
    grown, new = model.with_task("c"), {"c": data_of(2)}
    trainer = Trainer(grown, replace(CONFIG, total_steps=60, batch_size=16))
    before = trainer.evaluate(new)["loss"]
    trainer.train(new)
    assert trainer.evaluate(new)["loss"] < 0.7 * before
    torch.testing.assert_close(grown.tasks.weight[:2], model.tasks.weight, rtol=0, atol=0)


def test_tasks_without_names_are_called_by_their_numbers_once_another_one_is_added() -> None:
    assert model_of(num_tasks=2).with_task("new").config.task_names == ("0", "1", "new")
    with pytest.raises(ConfigurationError, match="expected names that differ"):
        model_of("a", "b").with_task("a")
    with pytest.raises(ConfigurationError, match="Unknown task 'x'"):
        model_of("a", "b").with_task("c", like="x")
    with pytest.raises(ConfigurationError, match="has a single task"):
        model_of().with_task("b")
