"""TD-MPC2's losses, gradients and full updates compared with the reference, and which parameters gradients reach."""

import pytest
import torch
from helpers.golden_tdmpc2 import KINDS, TOLERANCE, Golden, assert_matches, golden, model
from torch import Tensor

from worldflux.interop.tdmpc2 import official_to_state_dict
from worldflux.models.base import LossOutput
from worldflux.models.tdmpc2.losses import value_percentiles
from worldflux.models.tdmpc2.world_model import TDMPC2, PolicyDraws
from worldflux.training.config import TrainingConfig
from worldflux.training.optim import build_optimizer, clip_by_global_norm
from worldflux.training.trainer import Trainer

PARAMETER_TOLERANCE = 5e-5
"""Absolute tolerance of weights; one update changes them by 3e-4."""


@pytest.fixture(params=KINDS)
def ref(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def updates_of(ref: Golden) -> int:
    """Returns how many of the recorded updates our trainer reproduces.

    In the reference the policy's gradient of the task embedding remains and is added to that of the next update. Ours
    does not do this, so with several tasks only the first update agrees.
    """
    return 3 if ref.kind in ("state", "episodic") else 1


def batch_of(ref: Golden, update: int):
    return ref.batch("in/" if update == 0 else f"upd{update}/")


def carried(ref: Golden, latents: Tensor) -> LossOutput:
    """Returns an output of the model's loss that carries the given latents `[T, B, L]` to the policy's loss."""
    latents = latents.transpose(0, 1)
    carry = {"latents": latents, "states": torch.ones(latents.shape[:2])}
    if ref.task is not None:
        carry["task"] = ref.task
    return LossOutput(torch.zeros(()), {}, carry=carry)


def gradients(net: TDMPC2, loss: Tensor) -> dict[str, Tensor]:
    """Returns the gradient of every parameter that the loss reaches."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def check_gradients(ref: Golden, actual: dict[str, Tensor], prefix: str) -> None:
    expected = official_to_state_dict(ref.under(prefix), model(ref.kind))
    assert expected
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-4, atol=1e-5 * largest + 1e-8, msg=lambda m, name=name: f"{name}: {m}"
        )


def check_parameters(net: TDMPC2, expected: dict[str, Tensor]) -> None:
    state = net.state_dict()
    tensors = official_to_state_dict(expected, net)
    assert len(tensors) == len(expected)
    for name, tensor in tensors.items():
        assert float((state[name] - tensor).abs().max()) < PARAMETER_TOLERANCE, name


def test_targets_predictions_and_losses(ref):
    net = model(ref.kind)
    parts = net.model_parts(net._windows(ref.batch("in/")), ref.model_draws("upd0/"))
    tolerance = TOLERANCE[ref.kind]
    assert_matches(parts.next_latents, ref.rows("upd0/next_z"), tolerance)
    assert_matches(parts.targets, ref.rows("upd0/td_targets"), tolerance)
    assert_matches(parts.latents, ref.rows("upd0/zs"), tolerance)
    assert_matches(parts.reward_logits, ref.rows("upd0/reward_logits"), tolerance)
    assert_matches(parts.value_logits, ref["upd0/qs_logits"].transpose(1, 2), tolerance)
    if ref.kind == "episodic":
        assert_matches(parts.termination_logits, ref.rows("upd0/termination_logits"), tolerance)
    for name, loss in parts.losses.items():
        assert_matches(loss, ref[f"upd0/info/{name}_loss"], tolerance)


def test_gradients_of_the_model_before_clipping(ref):
    net = model(ref.kind)
    output = net.model_loss(ref.batch("in/"), ref.model_draws("upd0/"))
    assert_matches(output.loss, ref["upd0/info/total_loss"])
    actual = gradients(net, output.loss)
    norm = torch.stack([g.norm() for g in actual.values()]).norm()
    assert_matches(norm, ref["upd0/grad_norm"], TOLERANCE[ref.kind])
    if ref.kind != "pixels":
        check_gradients(ref, actual, "upd0/grad/")


def test_policy_loss_on_the_first_networks(ref):
    net = model(ref.kind)
    latents = ref["pi0/zs"]
    tasks = None if ref.task is None else ref.task.expand(len(latents), -1)
    sample = net._policy(latents, tasks, ref["pi0/eps"])
    value = net._q(net.critics, net._inputs(latents, tasks, sample.action), ref["pi0/q_idx"]).mean(0)
    tolerance = TOLERANCE[ref.kind]
    for actual, name in (
        (sample.action, "pi_action"),
        (sample.log_std, "pi_log_std"),
        (value, "pi_q"),
        (sample.entropy, "pi_entropy_t"),
        (sample.scaled_entropy, "pi_scaled_entropy_t"),
    ):
        assert_matches(actual, ref[f"pi0/{name}"].reshape(actual.shape), tolerance)
    assert_matches(
        value_percentiles(value[0], torch.ones(value.shape[1])), ref["pi0/scale_percentiles"].squeeze(-1), tolerance
    )
    output = net.policy_loss(carried(ref, latents), PolicyDraws(ref.rows("pi0/eps"), ref["pi0/q_idx"]))
    assert_matches(output.loss, ref["pi0/info/pi_loss"], tolerance)
    assert_matches(output.terms["policy_entropy"], ref["pi0/info/pi_entropy"], tolerance)
    assert_matches(output.terms["policy_scaled_entropy"], ref["pi0/info/pi_scaled_entropy"], tolerance)
    assert_matches(output.updates["value_scale"], ref["pi0/scale_after"].squeeze(), tolerance)
    assert_matches(value / output.updates["value_scale"], ref["pi0/pi_q_scaled"].reshape(value.shape), tolerance)

    actual = gradients(net, output.loss)
    assert set(actual) == {f"actor.{name}" for name, _ in net.actor.named_parameters()}
    assert_matches(torch.stack([g.norm() for g in actual.values()]).norm(), ref["pi0/grad_norm"], tolerance)
    if ref.kind != "pixels":
        check_gradients(ref, actual, "pi0/grad/")
    # The Adam step of the policy
    phase = net.phases()[1]
    output.loss.backward()
    clip_by_global_norm(phase.trained, 20.0)
    spec = net.optimizer_spec
    build_optimizer(spec, phase.parameters).step()
    check_parameters(net, ref.under("pi0/after/"))


class Replayed:
    """Returns a trainer whose model takes its random numbers from the recorded updates, one after the other."""

    def __init__(self, ref: Golden, grad_clip: float) -> None:
        self.ref = ref
        self.net = model(ref.kind)
        self.update = 0
        self.net.model_draws = lambda windows, steps: ref.model_draws(f"upd{self.update}/")
        self.net.policy_draws = lambda windows, states: ref.policy_draws(f"upd{self.update}/")
        rate = float(ref["cfg/lr"])
        self.trainer = Trainer(self.net, TrainingConfig(device="cpu", learning_rate=rate, grad_clip=grad_clip))

    def step(self) -> dict[str, Tensor]:
        losses = self.trainer.step(batch_of(self.ref, self.update))
        self.update += 1
        return losses


TERMS = {
    "consistency": "consistency_loss",
    "reward": "reward_loss",
    "value": "value_loss",
    "model_loss": "total_loss",
    "model_grad_norm": "grad_norm",
    "policy": "pi_loss",
    "policy_loss": "pi_loss",
    "policy_grad_norm": "pi_grad_norm",
    "policy_entropy": "pi_entropy",
    "policy_scaled_entropy": "pi_scaled_entropy",
    "value_scale": "pi_scale",
}
EPISODIC_TERMS = {
    "termination": "termination_loss",
    "termination_rate": "termination_rate",
    "termination_f1": "termination_f1",
}


def test_full_updates_through_the_trainer(ref):
    replayed = Replayed(ref, grad_clip=20.0)
    terms = TERMS | (EPISODIC_TERMS if ref.kind == "episodic" else {})
    for update in range(updates_of(ref)):
        parts = replayed.net.model_parts(replayed.net._windows(batch_of(ref, update)), ref.model_draws(f"upd{update}/"))
        assert_matches(parts.next_latents, ref.rows(f"upd{update}/next_z"), 1e-4)
        assert_matches(parts.targets, ref.rows(f"upd{update}/td_targets"), 1e-4)
        assert_matches(parts.latents, ref.rows(f"upd{update}/zs"), 1e-4)
        losses = replayed.step()
        for ours, theirs in terms.items():
            assert_matches(losses[ours], ref[f"upd{update}/info/{theirs}"], 1e-4)
        assert_matches(replayed.net.value_scale, ref[f"upd{update}/scale_after"].squeeze(), 1e-4)
        if update == 0:
            check_parameters(replayed.net, ref.under("after/"))
    last = {3: "after3/", 1: "after1/"}[updates_of(ref)]
    if ref.kind != "multitask":
        check_parameters(replayed.net, ref.under(last))


def test_updates_with_clipping_active(ref):
    clip = float(ref["clip/grad_clip_norm"])
    replayed = Replayed(ref, grad_clip=clip)
    for update in range(updates_of(ref)):
        losses = replayed.step()
        for ours, theirs in (
            ("model_grad_norm", "grad_norm"),
            ("policy_grad_norm", "pi_grad_norm"),
            ("model_loss", "total_loss"),
            ("policy_loss", "pi_loss"),
        ):
            assert_matches(losses[ours], ref[f"clip/upd{update}_{theirs}"], 1e-4)
    if ref.kind != "multitask":
        prefix = "clip/after1/" if ref.kind == "pixels" else "clip/after3/"
        check_parameters(replayed.net, ref.under(prefix))


def test_clipped_gradients_of_the_first_update(ref):
    net, clip = model(ref.kind), float(ref["clip/grad_clip_norm"])
    expected = official_to_state_dict(ref.under("clip/grad_clipped/"), net)
    of_model, of_policy = net.phases()
    first = net.model_loss(batch_of(ref, 0), ref.model_draws("upd0/"))
    first.loss.backward()
    clip_by_global_norm(of_model.trained, clip)
    build_optimizer(net.optimizer_spec, of_model.parameters).step()
    net.policy_loss(first, ref.policy_draws("upd0/")).loss.backward()
    clip_by_global_norm(of_policy.trained, clip)
    named = dict(net.named_parameters())
    assert {"dynamics", "reward_head", "actor"} <= {name.split(".")[0] for name in expected}
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(named[name].grad, gradient, rtol=2e-4, atol=5e-5 * scale)


def left_over(ref: Golden, net: TDMPC2, model_output: LossOutput, update: int) -> Tensor:
    """Computes the policy loss's gradient of the task embedding, which our `policy_loss` does not propagate."""
    draws = ref.policy_draws(f"upd{update}/")
    latents, tasks = model_output.carry["latents"], ref.task.unsqueeze(1).expand(-1, 4)
    sample = net._policy(latents, tasks, draws.noise)
    value = net._q(net.critics, net._inputs(latents, tasks, sample.action), draws.members).mean(0)
    scale = net.policy_loss(model_output, draws).updates["value_scale"]
    loss = -((1e-4 * sample.scaled_entropy + value / scale) * 0.5 ** torch.arange(4)).mean()
    return gradients(net, loss)["tasks.weight"]


@pytest.mark.parametrize("group", ["upd", "clip"])
def test_several_tasks_agree_given_the_references_leftover_gradient(group):
    """Adds the policy's gradient of the task embedding to the next update, as the reference does implicitly."""
    ref = golden("multitask")
    net = model("multitask")
    clip = 20.0 if group == "upd" else float(ref["clip/grad_clip_norm"])
    of_model, of_policy = net.phases()
    spec = net.optimizer_spec
    adam = build_optimizer(spec, of_model.parameters)
    policy_adam = build_optimizer(spec, of_policy.parameters)
    rest = torch.zeros_like(net.tasks.weight)
    for update in range(3):
        net.zero_grad()
        first = net.model_loss(batch_of(ref, update), ref.model_draws(f"upd{update}/"))
        first.loss.backward()
        net.tasks.weight.grad += rest
        norm = clip_by_global_norm(of_model.trained, clip)
        adam.step()
        net.zero_grad()
        rest = left_over(ref, net, first, update)
        if group == "upd" and update == 0:
            assert_matches(rest, ref["upd0/leftover_grad/_task_emb.weight"], 1e-4)
        second = net.policy_loss(first, ref.policy_draws(f"upd{update}/"))
        second.loss.backward()
        policy_norm = clip_by_global_norm(of_policy.trained, clip)
        policy_adam.step()
        net.after_step([first, second])
        found = {"grad_norm": norm, "pi_grad_norm": policy_norm, "total_loss": first.loss, "pi_loss": second.loss}
        for name, value in found.items():
            expected = ref[f"upd{update}/info/{name}" if group == "upd" else f"clip/upd{update}_{name}"]
            assert_matches(value, expected, 1e-4)
    check_parameters(net, ref.under("after3/" if group == "upd" else "clip/after3/"))


# Where gradients go


def test_no_loss_reaches_parameters_that_it_does_not_train(ref):
    net = model(ref.kind)
    batch = ref.batch("in/")
    reached = {name.split(".")[0] for name in gradients(net, net.model_loss(batch, ref.model_draws("upd0/")).loss)}
    expected = {"encoder", "dynamics", "reward_head", "critics"}
    expected |= {"termination_head"} if ref.kind == "episodic" else set()
    expected |= {"tasks"} if ref.kind == "multitask" else set()
    assert reached == expected
    output = net.model_loss(batch, ref.model_draws("upd0/"))
    policy = net.policy_loss(output, ref.policy_draws("upd0/"))
    assert {name.split(".")[0] for name in gradients(net, policy.loss)} == {"actor"}
    assert not any(p.requires_grad for p in net.target_critics.parameters())


@pytest.mark.parametrize("name", ["consistency", "reward", "value", "termination"])
def test_each_loss_of_the_model_reaches_the_networks_that_produce_it(name):
    ref = golden("episodic")
    net = model("episodic")
    parts = net.model_parts(net._windows(ref.batch("in/")), ref.model_draws("upd0/"))
    reached = {key.split(".")[0] for key in gradients(net, parts.losses[name])}
    head = {"reward": "reward_head", "value": "critics", "termination": "termination_head"}.get(name)
    assert reached == {"encoder", "dynamics"} | ({head} if head else set())


def test_computing_the_loss_changes_nothing(ref):
    net = model(ref.kind)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    output = net.loss(ref.batch("in/"))
    output.loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.after_step([output])
    assert not torch.equal(net.value_scale, before["value_scale"])
    assert not torch.equal(net.target_critics.layers[0].weight, before["target_critics.layers.0.weight"])


def test_the_whole_loss_is_the_sum_of_the_phases(ref):
    net = model(ref.kind)
    net.model_draws = lambda windows, steps: ref.model_draws("upd0/")
    net.policy_draws = lambda windows, states: ref.policy_draws("upd0/")
    output = net.loss(ref.batch("in/"))
    expected = ref["upd0/info/total_loss"] + output.terms["policy"]
    assert_matches(output.loss, expected)
