"""Wrong recordings are detected when they are replayed for the first time, and are discarded."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from helpers.captured import CONFIG, PLAIN_STEPS, acted, actors, batches, new, recorded, run, set_rate
from helpers.envs import Aim
from helpers.small_models import PRESETS
from helpers.tape import RANDOM, Spoil, SpoiledCapturer, TapeCapturer, stale, the_same_draws_again, without
from torch import Tensor

from worldflux.agents import WorldFluxAgent
from worldflux.agents import acting as acting_module
from worldflux.agents import base as base_module
from worldflux.nn.definitions import by_definition
from worldflux.training import Trainer
from worldflux.training import trainer as trainer_module


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def moments(trainer: Trainer) -> list[Tensor]:
    """Returns all state of a trainer's optimisers."""
    return [
        torch.as_tensor(value)
        for optimizer in trainer.optimizers
        for entry in optimizer.state_dict()["state"].values()
        for value in entry.values()
    ]


STEPS: dict[str, Spoil] = {
    "observations of the recording": stale("obs"),
    "rewards of the recording": stale("rewards"),
    "rates of the recording": stale("rates"),
    "noise of the recording": without(*RANDOM),
    "the same noise each time": the_same_draws_again,
    "target networks that stay": without("_foreach_lerp_"),
    "parameters that stay": without("_foreach_add_", "_fused_adamw_"),
    "no results": without("stack"),
}


@pytest.mark.parametrize("fault", STEPS)
@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_a_wrongly_recorded_step_gives_the_results_of_the_plain_run(
    family: str, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "captures", lambda setting, device, model: True)
        patch.setattr(trainer_module, "CudaGraphCapturer", lambda device: SpoiledCapturer(device, STEPS[fault]))
        played = Trainer(new(family), CONFIG)
    plain = Trainer(new(family), CONFIG)
    given = batches(PLAIN_STEPS + 4)
    run(played, given[:PLAIN_STEPS])
    for trainer in (played, plain):
        set_rate(trainer, 0.9e-3)
    played.save_checkpoint(tmp_path / "checkpoint")
    plain.load_checkpoint(tmp_path / "checkpoint")
    found, expected = (run(trainer, given[PLAIN_STEPS:], seed=2) for trainer in (played, plain))

    for losses, plain_losses in zip(found, expected, strict=True):
        assert losses.keys() == plain_losses.keys()
        assert all(torch.equal(losses[name], plain_losses[name]) for name in losses)
    after, plain_after = played.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(after[name], plain_after[name]) for name in after)
    assert all(map(torch.equal, moments(played), moments(plain)))
    gradients = [[p.grad for p in trainer.model.parameters() if p.grad is not None] for trainer in (played, plain)]
    assert gradients[0] and all(map(torch.equal, *gradients))
    assert recorded(played) == 0
    (message,) = messages(caplog)
    assert message.startswith(f"The gradient step of {type(plain.model).__name__}, replayed as a CUDA graph")
    assert f"torch {torch.__version__}" in message


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_the_comparison_is_not_an_additional_training_step(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The compared step has the effect of one step of the recording, and draws the random numbers of one step."""
    monkeypatch.setattr(trainer_module, "captures", lambda setting, device, model: True)
    monkeypatch.setattr(trainer_module, "CudaGraphCapturer", TapeCapturer)
    played = Trainer(new(family), CONFIG)
    given = batches(PLAIN_STEPS + 2)
    run(played, given[:PLAIN_STEPS])
    other = copy.deepcopy(played)  # has no recordings, so this step is its first one and runs without them
    ends, steps = [], []
    for trainer in (played, other):
        run(trainer, given[PLAIN_STEPS : PLAIN_STEPS + 1], seed=2)
        ends.append(torch.get_rng_state())
        steps.append([int(group["updates"]) for opt in trainer.optimizers for group in opt.param_groups])
    assert recorded(played) == 1 and recorded(other) == 0 and messages(caplog) == []
    assert torch.equal(*ends) and steps[0] == steps[1]
    after, plain = played.model.state_dict(), other.model.state_dict()
    for name in after:
        torch.testing.assert_close(after[name], plain[name], rtol=2e-4, atol=2e-6)
    assert set(steps[0]) == {PLAIN_STEPS + 1}
    counts = [[int(x) for x in moments(trainer) if x.dim() == 0] for trainer in (played, other)]
    assert counts[0] == counts[1] != []
    # Steps that are replayed from here on write the gradients of the parameters.
    before = [None if p.grad is None else p.grad.clone() for p in played.model.parameters()]
    run(played, given[-1:], seed=3)
    shown = [p.grad for p in played.model.parameters()]
    assert any(b is not None and g is not None and not torch.equal(b, g) for b, g in zip(before, shown, strict=True))


ACTIONS: dict[str, Spoil] = {
    "observations of the recording": stale("obs/obs"),
    "starts of the recording": stale("is_first"),
    "noise of the recording": without(*RANDOM),
    "the same noise each time": the_same_draws_again,
}
PLANS = {"states of the recording": stale("state/latent"), "plans of the recording": stale("plan")}


@pytest.mark.parametrize(
    ("preset", "plans", "fault"),
    [
        *(("dreamerv3:tiny", False, fault) for fault in ACTIONS),
        *(("tdmpc2:tiny", True, fault) for fault in ("observations of the recording", *PLANS)),
    ],
)
def test_wrongly_recorded_actions_give_the_results_of_the_plain_actor(
    preset: str, plans: bool, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spoil = {**ACTIONS, **PLANS}[fault]
    plain, played = actors(preset, "vector", plans, monkeypatch)
    monkeypatch.setattr(acting_module, "CudaGraphCapturer", lambda device: SpoiledCapturer(device, spoil))
    played = copy.deepcopy(played)
    with by_definition():  # tapes only record operations of torch; native code rounds differently
        both = zip(acted(played, 3, False), acted(plain, 3, False), strict=True)
    for found, expected in both:
        assert torch.equal(found.actions, expected.actions)
        assert all(torch.equal(found.state[name], expected.state[name]) for name in expected.state)
        assert found.plan is None or expected.plan is None or torch.equal(found.plan, expected.plan)
    assert played._captures is not None and played._captures.count == 0
    (message,) = messages(caplog)
    assert message.startswith(f"Acting of {type(plain.model).__name__}, replayed as a CUDA graph")


@pytest.mark.parametrize("spoil", [None, stale()], ids=["right", "wrong"])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_agent_learns_with_right_and_with_wrong_recordings(
    preset: str, spoil: Spoil | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def recorder(device: torch.device) -> TapeCapturer:
        return TapeCapturer(device) if spoil is None else SpoiledCapturer(device, spoil)

    for module in (trainer_module, base_module):
        monkeypatch.setattr(module, "captures", lambda setting, device, model: True)
    for module in (trainer_module, acting_module):
        monkeypatch.setattr(module, "CudaGraphCapturer", recorder)
    planner = (
        {}
        if "dreamer" in preset
        else {"planner_kwargs": dict(num_samples=16, num_elites=4, num_pi_trajs=2, iterations=2)}
    )
    agent = WorldFluxAgent(
        preset, Aim(), model_kwargs=PRESETS[preset], batch_size=4, seq_len=4, train_ratio=16, learning_starts=20,
        buffer_size=500, device="cpu", seed=0, **planner,
    )  # fmt: skip
    with by_definition():  # as above
        agent.learn(32)
    assert agent._n_updates > 10 and agent.actor._captures is not None
    found = [message.partition(" of ")[0] for message in messages(caplog)]
    if spoil is None:
        assert found == [] and recorded(agent.trainer) >= 1 and agent.actor._captures.count == 2
    else:
        assert sorted(found) == ["Acting", "The gradient step"]
        assert recorded(agent.trainer) == agent.actor._captures.count == 0
    assert all(bool(torch.isfinite(value.float()).all()) for value in agent.model.state_dict().values())
