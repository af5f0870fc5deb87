"""Gradient steps that are played back: equal to plain ones, whatever changes between them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.captured import CONFIG, FAMILIES, IMAGE, PLAIN_STEPS, batches, new, recorded, run, set_rate
from helpers.tape import TapeCapturer
from helpers.training import MemoryProvider, NoisyRegression
from torch import Tensor, nn

from worldflux import WorldModel
from worldflux.training import Batch, ReplayBuffer, Trainer, TrainingConfig, create_random_buffer
from worldflux.training import trainer as trainer_module
from worldflux.training.captured_step import MAX_FORMS
from worldflux.training.optim import Adam


@pytest.fixture(autouse=True)
def without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code never runs where steps are recorded; without it both sides round in the same way."""
    monkeypatch.setenv("WORLDFLUX_NATIVE", "0")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Makes trainers that record tapes on the CPU, in the way in which they record CUDA graphs."""

    def made(model: nn.Module, config: TrainingConfig = CONFIG) -> Trainer:
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "captures", lambda setting, device, model: True)
            patch.setattr(trainer_module, "CudaGraphCapturer", TapeCapturer)
            return Trainer(model, config)

    return made


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=2e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_updates_played_back_equal_ten_plain_ones(captured: Callable[..., Trainer], family: str) -> None:
    plain, played = Trainer(new(family), CONFIG), captured(new(family))
    given = batches(10, obs_shape=IMAGE if "pixels" in family else (4,), discrete="discrete" in family)
    for trainer in (plain, played):
        torch.manual_seed(1)
        trainer.seen = []  # type: ignore[attr-defined]
        for step, batch in enumerate(given):
            set_rate(trainer, 1e-3 * (1 - step / 20))  # a schedule, on top of the warm-up
            losses = trainer.step(batch)
            trainer.seen.append({name: value.clone() for name, value in losses.items()})  # type: ignore[attr-defined]
        assert all(value.dim() == 0 and not value.requires_grad for value in losses.values())
    assert recorded(played) == 1
    for one, other in zip(plain.seen, played.seen, strict=True):  # type: ignore[attr-defined]
        assert_same(one, other)
    assert_same(state(plain), state(played))
    assert not torch.equal(torch.stack([x["loss"] for x in played.seen]).diff(), torch.zeros(9))  # type: ignore[attr-defined]


def both(captured: Callable[..., Trainer], model: Callable[[], nn.Module], **changes: Any) -> tuple[Trainer, Trainer]:
    config = replace(CONFIG, **changes)
    return Trainer(model(), config), captured(model(), config)


@pytest.fixture(params=["dreamerv3", "tdmpc2"])
def pair(captured: Callable[..., Trainer], request: pytest.FixtureRequest) -> tuple[Trainer, Trainer]:
    """A plain trainer, and one whose steps are played back, after the same seven steps."""
    made = both(captured, lambda: new(request.param))
    for trainer in made:
        run(trainer, batches(7))
    assert recorded(made[1]) == 1
    return made


def test_what_a_step_returned_stays_as_it_is(pair: tuple[Trainer, Trainer]) -> None:
    first = pair[1].step(batches(1)[0])
    before = {name: value.clone() for name, value in first.items()}
    pair[1].step(batches(2)[1])
    assert_same(first, before)


def test_weights_that_are_loaded_in_place_are_trained_on_from(pair: tuple[Trainer, Trainer]) -> None:
    other = new("dreamerv3" if pair[0]._kind == "laprop" else "tdmpc2").state_dict()
    for trainer in pair:
        trainer.model.load_state_dict(other)
        run(trainer, batches(2))
    assert recorded(pair[1]) == 1
    assert_same(state(pair[0]), state(pair[1]))


def test_a_checkpoint_is_continued_and_recorded_anew(pair: tuple[Trainer, Trainer], tmp_path: Path) -> None:
    saved = {}
    for number, trainer in enumerate(pair):
        trainer.save_checkpoint(tmp_path / str(number))
        saved[number] = [dict(trainer.step(batch)) for batch in batches(6)]
    # Back to the checkpoint, and each to the other's.
    for source, trainer in [(0, pair[0]), (1, pair[1]), (1, pair[0]), (0, pair[1])]:
        trainer.load_checkpoint(tmp_path / str(source))
        for one, other in zip([dict(trainer.step(batch)) for batch in batches(6)], saved[source], strict=True):
            assert_same(one, other)
    assert recorded(pair[1]) == 1
    assert pair[1].step_count == 13


def test_where_adam_counts_is_no_part_of_a_checkpoint(captured: Callable[..., Trainer]) -> None:
    plain, played = both(captured, lambda: new("tdmpc2"))
    for trainer in (plain, played):
        run(trainer, batches(6))
    for source, target in [(plain, played), (played, plain)]:
        for one, other in zip(source.optimizers, target.optimizers, strict=True):
            assert isinstance(other, Adam)
            fused = [group["fused"] for group in other.param_groups]
            other.load_state_dict(copy.deepcopy(one.state_dict()))
            assert [group["fused"] for group in other.param_groups] == fused
            assert all(entry["step"].dtype == torch.float32 for entry in other.state.values())
            assert {float(entry["step"]) for entry in other.state.values()} == {6.0}
    for trainer in (plain, played):
        run(trainer, batches(6), seed=2)
    assert_same(state(plain), state(played))


def test_an_optimizer_that_is_loaded_is_not_played_back_with_its_old_moments(pair: tuple[Trainer, Trainer]) -> None:
    for trainer in pair:
        saved = [optimizer.state_dict() for optimizer in trainer.optimizers]
        for part in saved:
            for entry in part["state"].values():
                entry.update({name: value * 0 for name, value in entry.items() if name != "step"})
        for optimizer, part in zip(trainer.optimizers, saved, strict=True):
            optimizer.load_state_dict(part)
    assert recorded(pair[1]) == 1
    for trainer in pair:
        run(trainer, batches(6))
    assert_same(state(pair[0]), state(pair[1]))
    assert recorded(pair[1]) == 1


def test_settings_of_an_optimizer_may_change(pair: tuple[Trainer, Trainer]) -> None:
    for trainer in pair:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group.update(betas=(0.5, 0.9), weight_decay=0.1)
        run(trainer, batches(6))
    assert_same(state(pair[0]), state(pair[1]))


def test_parameters_may_be_frozen_and_thawed(pair: tuple[Trainer, Trainer]) -> None:
    for trainer in pair:
        encoder = trainer.model.encoder
        assert isinstance(encoder, nn.Module)
        before = [p.clone() for p in encoder.parameters()]
        encoder.requires_grad_(False)
        run(trainer, batches(6))
        assert all(map(torch.equal, before, encoder.parameters()))
        encoder.requires_grad_(True)
        run(trainer, batches(6), seed=2)
    assert recorded(pair[1]) == 1
    assert_same(state(pair[0]), state(pair[1]))


def test_a_parameter_that_moves_is_found(pair: tuple[Trainer, Trainer]) -> None:
    for trainer in pair:
        for p in trainer.model.parameters():
            p.data = p.data.clone()
        run(trainer, batches(2))
    assert_same(state(pair[0]), state(pair[1]))
    assert recorded(pair[1]) == 0


def test_each_form_of_batches_has_a_recording_up_to_a_limit(captured: Callable[..., Trainer]) -> None:
    torch.manual_seed(0)
    model, provider = NoisyRegression(), MemoryProvider()
    lengths = [3, 4, 5, 6, 7, 8]
    given = [provider.sample(4, length) for length in lengths * (PLAIN_STEPS + 2)]
    plain, played = both(captured, lambda: copy.deepcopy(model))
    for trainer in (plain, played):
        run(trainer, given)
    assert len(lengths) > MAX_FORMS == recorded(played)
    assert_same(state(plain), state(played))


def test_parameters_that_only_some_batches_train_are_played_back(captured: Callable[..., Trainer]) -> None:
    class Halves(nn.Module):
        """Its second half learns from long windows alone."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.always, self.sometimes = nn.Linear(3, 1), nn.Linear(3, 1)

        @property
        def optimizer_spec(self) -> Any:
            return NoisyRegression().optimizer_spec

        def loss(self, batch: Batch) -> Tensor:
            long = batch.seq_len > 4
            predicted = self.always(batch.obs) + (self.sometimes(batch.obs) if long else 0.0)
            return (predicted.squeeze(-1) - batch.rewards).square().mean()

    provider = MemoryProvider()
    given = [provider.sample(4, 6 if step % 3 else 4) for step in range(24)]
    plain, played = both(captured, Halves)
    for trainer in (plain, played):
        run(trainer, given)
    assert_same(state(plain), state(played))
    starts = [sorted({entry["start"] for entry in t.optimizers[0].state.values()}) for t in (plain, played)]
    assert starts == [[0, 1], [0, 1]]
    assert recorded(played) == 2


def test_latents_go_back_to_their_rows(captured: Callable[..., Trainer]) -> None:
    counts = []
    for trainer in both(captured, NoisyRegression):
        provider = MemoryProvider()
        for _ in range(8):
            trainer.step(provider.sample(4, 5), provider)
        trainer._write_back.flush()
        counts.append(torch.from_numpy(provider.count))
    assert counts[0].sum() > 0 and torch.equal(*counts)


class Waiting(NoisyRegression):
    """Reads a value in its loss, and counts in Python."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.read: list[float] = []

    def loss(self, batch: Batch) -> Any:
        output = super().loss(batch)
        self.read.append(output.loss.item())
        return output


def test_a_model_that_waits_for_the_device_is_trained_plainly(
    captured: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    provider = MemoryProvider()
    given = [provider.sample(4, 5) for _ in range(9)]
    plain, played = both(captured, Waiting)
    with caplog.at_level(logging.WARNING, "worldflux.training"):
        for trainer in (plain, played):
            run(trainer, given)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "The gradient step of Waiting cannot be captured in a CUDA graph, so it is computed plainly"
    ]
    assert len(played.model.read) == 9  # type: ignore[arg-type]
    assert_same(state(plain), state(played))


def test_a_recording_that_fails_costs_no_step(
    captured: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from worldflux.accel.cuda_graphs import NotCapturable

    def refuse(self: TapeCapturer, function: Any) -> Any:
        raise NotCapturable("no")

    monkeypatch.setattr(TapeCapturer, "capture", refuse)
    plain, played = both(captured, lambda: new("tdmpc2"))
    for trainer in (plain, played):
        run(trainer, batches(8))
    assert recorded(played) == 0
    assert_same(state(plain), state(played))


def test_evaluating_between_steps_changes_nothing(pair: tuple[Trainer, Trainer]) -> None:
    buffer = create_random_buffer(200, (4,), 2, num_episodes=10, episode_length=17, seed=0)
    before = state(pair[1])
    evaluated = [trainer.evaluate(buffer, 2) for trainer in pair]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-3, abs=1e-5)
    assert_same(before, state(pair[1]))
    for trainer in pair:
        run(trainer, batches(2))
    assert_same(state(pair[0]), state(pair[1]))


def test_a_model_that_counts_in_python_is_not_recorded_unless_asked_for() -> None:
    from worldflux.accel.compilation import captures

    class Counting(WorldModel):
        capturable = False

    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    model = new("tdmpc2")
    assert captures("auto", cuda, model) and captures(True, cuda, model) and not captures(False, cuda, model)
    assert not captures("auto", cpu, model) and not captures(True, cpu, model)
    for other in (nn.Linear(1, 1), Counting(model.config)):  # type: ignore[arg-type]
        assert not captures("auto", cuda, other) and captures(True, cuda, other)


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_batches_with_and_without_a_mask_are_played_back_by_turns(
    captured: Callable[..., Trainer], family: str
) -> None:
    buffer = ReplayBuffer(200, (4,), 2, seed=0)
    for episode in torch.rand(10, 17, 7):  # without their last observations
        buffer.add_episode(episode[:, :4].numpy(), episode[:, 4:6].numpy(), episode[:, 6].numpy())
    drawn = [buffer.sample(2, 6) for _ in range(100)]
    masked = [batch for batch in drawn if batch.obs_mask is not None]
    whole = [batch for batch in drawn if batch.obs_mask is None]
    plain, played = Trainer(new(family), CONFIG), captured(new(family))
    for trainer in (plain, played):
        torch.manual_seed(1)
        for pair in zip(masked[:6], whole[:6], strict=True):
            for batch in pair:
                trainer.step(batch)
    assert recorded(played) == 2
    assert_same(state(plain), state(played))
