"""Trainer and train: the gradient step, the loop around it, and what both refuse."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from helpers.training import MemoryProvider, NoisyRegression
from torch import Tensor, nn

from worldflux.accel.device import resolve_device
from worldflux.errors import ConfigurationError, TrainingError
from worldflux.models.base import LossOutput, Phase
from worldflux.replay.buffer import ReplayBuffer
from worldflux.training import Callback, Trainer, TrainingConfig, train
from worldflux.training.optim import Adam, LaProp

FAST = TrainingConfig(total_steps=6, batch_size=4, sequence_length=5, learning_rate=1e-2, device="cpu")


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def fresh_model(seed: int = 0) -> NoisyRegression:
    torch.manual_seed(seed)
    return NoisyRegression()


class Calls(Callback):
    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.calls: list[str] = []
        self.losses: list[dict[str, float]] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        self.calls.append(f"begin {trainer.step_count} to {trainer.target_step}")

    def on_step_end(self, step, losses):
        self.calls.append(f"step {step}")
        self.losses.append(dict(losses))
        return None if step != self.stop_at else False

    def on_eval_end(self, step, metrics):
        self.calls.append(f"eval {step}")
        self.metrics.append(dict(metrics))

    def on_train_end(self, trainer: Trainer) -> None:
        self.calls.append("finished" if trainer.finished else "broken off")


# TrainingConfig


def test_a_configuration_comes_back_from_its_file(tmp_path):
    config = replace(FAST, grad_clip=math.inf, seed=7)
    config.save(tmp_path / "runs" / "training.json")
    assert TrainingConfig.load(tmp_path / "runs" / "training.json") == config
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(FileNotFoundError):
        TrainingConfig.load(tmp_path / "none.json")
    with pytest.raises(json.JSONDecodeError):
        TrainingConfig.load(tmp_path / "broken.json")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"total_steps": 0}, "total_steps is 0, expected a whole number from 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5, expected a whole number from 1"),
        ({"log_interval": True}, "log_interval is True"),
        ({"warmup_steps": -1}, "warmup_steps is -1, expected a whole number from 0"),
        ({"learning_rate": 0}, "learning_rate is 0.0, expected a finite number above 0"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', expected a finite number"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"grad_clip": math.nan}, "grad_clip is nan"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"device": "gpu"}, "device is 'gpu', expected 'auto'"),
        ({"compile": "yes"}, "compile is 'yes', expected True, False, or 'auto'"),
        ({"compile": 1}, "compile is 1, expected True, False, or 'auto'"),
        ({"total_step": 5}, "Unknown TrainingConfig field 'total_step'; did you mean 'total_steps'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        TrainingConfig.from_dict(change)


def test_a_cuda_device_that_is_not_there_is_refused_by_the_trainer():
    with pytest.raises(ConfigurationError, match="device is 'cuda:99', but torch sees"):
        resolve_device("cuda:99")


def run(change: dict, eval_data: MemoryProvider | None = None) -> tuple[Tensor, list[str], int]:
    """What a user can see of a run: the weights, the calls of a callback, and the rows sampled."""
    recorder, provider, model = Calls(), MemoryProvider(), fresh_model()
    model.poison_at = 5 if "log_interval" in change else None
    config = replace(FAST, **change)
    try:
        Trainer(model, config, [recorder], eval_data=eval_data).train(provider)
    except TrainingError:
        pass
    return weights(model), recorder.calls, sum(rows.numel() for rows in provider.sampled)


@pytest.mark.parametrize(
    "change",
    [
        {"total_steps": 4},
        {"batch_size": 3},
        {"sequence_length": 4},
        {"learning_rate": 2e-2},
        {"weight_decay": 0.5},
        {"grad_clip": 1e-25},
        {"warmup_steps": 3},
        {"log_interval": 2},
        {"eval_interval": 2},
        {"seed": 43},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_changes_what_happens(change):
    usual = run({"log_interval": 6} if "log_interval" in change else {}, MemoryProvider(seed=1))
    other = run(change, MemoryProvider(seed=1))
    assert not torch.equal(usual[0], other[0]) or usual[1:] != other[1:]


def test_the_fields_not_covered_above_are_covered_elsewhere():
    """`save_interval`: test_callbacks.py. `device`: the test of the refused device. `compile`: test_compiling.py."""
    changed = {next(iter(change)) for change in test_every_field_changes_what_happens.pytestmark[0].args[1]}
    assert {item.name for item in fields(TrainingConfig)} - changed == {"save_interval", "device", "compile"}


# The step


def test_a_step_is_the_gradient_step_written_out_by_hand():
    by_hand, trained = fresh_model(), fresh_model()
    batch = MemoryProvider().sample(4, 5)
    optimizer = LaProp(by_hand.parameters(), lr=1e-2, agc=0.3)
    torch.manual_seed(1)
    by_hand.loss(batch).loss.backward()
    norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm()
    optimizer.step()

    trainer = Trainer(trained, FAST)
    torch.manual_seed(1)
    losses = trainer.step(batch)
    assert torch.equal(weights(trained), weights(by_hand))
    assert losses["grad_norm"].item() == pytest.approx(norm.item())
    assert losses["loss"].item() == pytest.approx(losses["fit"].item() + losses["noise"].item())
    assert list(losses) == ["fit", "noise", "loss", "grad_norm"]
    assert all(value.dim() == 0 and not value.requires_grad for value in losses.values())
    assert trained.steps == 1 and trainer.step_count == 1


def test_the_model_chooses_the_optimizer_and_the_configuration_its_rate():
    optimizer = Trainer(fresh_model(), replace(FAST, learning_rate=0.5, warmup_steps=9)).optimizers[0]
    assert isinstance(optimizer, LaProp)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["warmup_steps"], group["agc"], group["eps"]) == (0.5, 9, 0.3, 1e-20)
    assert isinstance(Trainer(Plain(lambda error: error.mean()), FAST).optimizers[0], Adam)


class Plain(nn.Module):
    """Any module with a loss; `form` turns the squared errors `[B, T]` into what it returns."""

    def __init__(self, form) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.form = form

    def loss(self, batch):
        return self.form((self.layer(batch.obs).squeeze(-1) - batch.rewards).square())


@pytest.mark.parametrize(
    "form",
    [
        lambda error: error.mean(),
        lambda error: {"loss": error.mean(), "largest": error.max(), "errors": error, "weight": 2.0},
        lambda error: LossOutput(error.mean(), {"largest": error.max()}),
    ],
    ids=["tensor", "dict", "LossOutput"],
)
def test_any_module_with_a_loss_learns(form):
    recorder = Calls()
    config = replace(FAST, total_steps=60, learning_rate=3e-2)
    Trainer(Plain(form), config, [recorder]).train(MemoryProvider())
    early, late = (sum(x["loss"] for x in part) / 10 for part in (recorder.losses[:10], recorder.losses[-10:]))
    assert late < 0.6 * early
    assert "errors" not in recorder.losses[0] and recorder.losses[0].get("weight", 2.0) == 2.0


@pytest.mark.parametrize(
    "form,message",
    [
        (lambda error: error, r"The loss has shape \(4, 5\), expected a scalar"),
        (lambda error: {"total": error.mean()}, r"loss\(batch\) gave dict, expected a scalar tensor"),
        (lambda error: error.mean().detach(), "depends on no parameter"),
    ],
)
def test_what_cannot_be_differentiated_is_refused(form, message):
    with pytest.raises(TrainingError, match=message):
        Trainer(Plain(form), FAST).train(MemoryProvider())


def test_a_module_without_a_loss_is_refused():
    with pytest.raises(ConfigurationError, match=r"Linear has no method loss\(batch\)"):
        Trainer(nn.Linear(3, 1), FAST)


class TwoPhases(nn.Module):
    """A critic that regresses rewards, and an actor that climbs the critic."""

    def __init__(self) -> None:
        super().__init__()
        self.critic, self.actor = nn.Linear(5, 1), nn.Linear(3, 2)
        self.critic_seen_by_actor: list[Tensor] = []

    def phases(self) -> list[Phase]:
        return [
            Phase("model", list(self.critic.parameters()), self.critic_loss),
            Phase("policy", list(self.actor.parameters()), self.actor_loss),
        ]

    def critic_loss(self, batch, previous) -> LossOutput:
        assert not previous
        error = self.critic(torch.cat([batch.obs, batch.actions], -1)).squeeze(-1) - batch.rewards
        return LossOutput(error.square().mean(), {"fit": error.square().mean().detach()})

    def actor_loss(self, batch, previous) -> LossOutput:
        assert len(previous) == 1
        self.critic_seen_by_actor.append(weights(self.critic))
        value = self.critic(torch.cat([batch.obs, self.actor(batch.obs).tanh()], -1)).mean()
        return LossOutput(-value, {"value": value.detach()})


def test_phases_train_their_own_parameters_each_on_what_the_one_before_left():
    torch.manual_seed(0)
    model = TwoPhases()
    alone = TwoPhases()
    alone.load_state_dict(model.state_dict())
    batch = MemoryProvider().sample(4, 5)
    trainer = Trainer(model, replace(FAST, grad_clip=0.0))
    for _ in range(2):
        losses = trainer.step(batch)
    # The actor's gradient on the critic must not leak into the critic's next update.
    optimizer = Adam(alone.critic.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        alone.critic_loss(batch, []).loss.backward()
        optimizer.step()
    assert torch.equal(weights(model.critic), weights(alone.critic))
    assert torch.equal(model.critic_seen_by_actor[1], weights(model.critic))
    assert not torch.equal(weights(model.actor), weights(alone.actor))
    by_phase = {f"{phase}_{what}" for phase in ("model", "policy") for what in ("loss", "grad_norm")}
    assert set(losses) == {"fit", "value", "loss", "grad_norm"} | by_phase
    assert losses["loss"].item() == pytest.approx(losses["model_loss"].item() + losses["policy_loss"].item())


def test_what_the_model_computed_anew_goes_back_to_the_rows_it_belongs_to():
    provider = MemoryProvider(rows=6)
    Trainer(fresh_model(), replace(FAST, batch_size=1, sequence_length=6)).train(provider, num_steps=3)
    assert provider.count[:, 0].tolist() == [0, 3, 3, 3, 3, 3]


# The loop


def test_two_runs_with_one_seed_give_the_same_bits():
    assert torch.equal(run({})[0], run({})[0])


def test_callbacks_are_called_in_order_and_told_how_far_training_goes():
    recorder = Calls()
    trainer = Trainer(fresh_model(), replace(FAST, eval_interval=2), eval_data=MemoryProvider(seed=1))
    trainer.add_callback(recorder)
    assert trainer.train(MemoryProvider(), num_steps=3) is trainer.model
    assert recorder.calls == ["begin 0 to 3", "step 1", "eval 2", "step 2", "step 3", "finished"]
    trainer.train(MemoryProvider())
    assert recorder.calls[6:] == ["begin 3 to 6", "eval 4", "step 4", "step 5", "eval 6", "step 6", "finished"]


def test_a_callback_that_returns_false_stops_training_after_the_others_were_called():
    first, second = Calls(stop_at=2), Calls()
    Trainer(fresh_model(), FAST, [first, second]).train(MemoryProvider())
    assert first.calls == second.calls == ["begin 0 to 6", "step 1", "step 2", "finished"]


def test_a_second_call_of_train_goes_on_with_other_batches():
    provider = MemoryProvider()
    trainer = Trainer(fresh_model(), FAST)
    trainer.train(provider, num_steps=2)
    trainer.train(provider, num_steps=2)
    assert not torch.equal(provider.sampled[0], provider.sampled[2])


@pytest.mark.parametrize("num_steps", [2.5, "2", -1])
def test_a_number_of_steps_that_is_none_is_refused_before_anything_happens(num_steps):
    recorder, provider = Calls(), MemoryProvider()
    trainer = Trainer(fresh_model(), FAST, [recorder])
    with pytest.raises(ConfigurationError, match=f"num_steps is {num_steps!r}, expected a whole number from 0"):
        trainer.train(provider, num_steps)
    assert not recorder.calls and not provider.sampled and trainer.step_count == 0


def test_only_callbacks_are_accepted():
    with pytest.raises(ConfigurationError, match=r"got type. Pass an instance, not a class"):
        Trainer(fresh_model(), FAST, [Calls])


def test_a_loss_that_is_not_finite_stops_the_run_with_its_name_and_first_step():
    recorder, model = Calls(), fresh_model()
    model.poison_at = 3
    with pytest.raises(TrainingError, match=r"^noise is not finite at gradient step 3"):
        Trainer(model, replace(FAST, total_steps=50, log_interval=5), [recorder]).train(MemoryProvider())
    assert recorder.calls[-2:] == ["step 4", "broken off"]


def test_a_gradient_that_is_not_finite_is_found_although_the_loss_is():
    class Cusp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(()))

        def loss(self, batch) -> Tensor:
            return self.x.sqrt()  # 0, with an infinite slope

    with pytest.raises(TrainingError, match=r"^grad_norm is not finite at gradient step 1"):
        Trainer(Cusp(), FAST).train(MemoryProvider())


def test_train_hands_every_setting_to_the_trainer():
    seen: list[TrainingConfig] = []

    class Look(Callback):
        def on_train_begin(self, trainer: Trainer) -> None:
            seen.append(trainer.config)

    changed = {**FAST.to_dict(), "total_steps": 1, "weight_decay": 0.1, "grad_clip": 5.0, "warmup_steps": 3, "seed": 1}
    changed |= {"log_interval": 7, "eval_interval": 8, "save_interval": 9}
    model = fresh_model()
    assert train(model, MemoryProvider(), **changed, callbacks=[Look()]) is model
    assert seen == [TrainingConfig(**changed)]
    assert not model.training


# Evaluation


def test_evaluation_changes_nothing_and_repeats_itself():
    model, held_out = fresh_model(), MemoryProvider(seed=1)
    trainer = Trainer(model, FAST)
    before, stream, sampler = weights(model), torch.get_rng_state(), held_out.rng_state()
    first = trainer.evaluate(held_out)
    with pytest.raises(ConfigurationError, match="num_batches is 0, expected a whole number from 1"):
        trainer.evaluate(held_out, num_batches=0)
    assert torch.equal(torch.get_rng_state(), stream) and held_out.rng_state() == sampler
    assert torch.equal(weights(model), before) and model.training and model.steps == 0
    assert trainer.evaluate(held_out) == first
    assert set(first) == {"fit", "noise", "loss"}
    assert first["loss"] == pytest.approx(first["fit"] + first["noise"], rel=1e-5)


def recorded() -> ReplayBuffer:
    """What `add` stored, as a recorder calls it: its windows are fresh to the one who asks for that."""
    buffer, rng = ReplayBuffer(100, (3,), 2, seed=0), np.random.default_rng(0)
    for t in range(60):
        obs, ends = rng.normal(size=(1, 3)), [t % 20 == 19]
        buffer.add(obs, rng.uniform(-1, 1, (1, 2)), rng.normal(size=1), ends, [False], final_obs=obs)
    return buffer


def test_evaluation_on_the_training_buffer_repeats_itself_and_leaves_the_training_alone():
    alone, evaluated = Trainer(fresh_model(), FAST), Trainer(fresh_model(), FAST)
    buffer = recorded()
    before = evaluated.evaluate(buffer)
    assert evaluated.evaluate(buffer) == before
    alone.train(recorded())
    evaluated.train(buffer, num_steps=3)
    evaluated.evaluate(buffer)
    evaluated.train(buffer)
    assert torch.equal(weights(alone.model), weights(evaluated.model))


def test_training_with_evaluation_gives_the_same_bits_as_without():
    assert torch.equal(run({"eval_interval": 2}, MemoryProvider(seed=1))[0], run({})[0])
