"""DreamerV3's complete loss, its gradients and four training steps compared with the reference implementation."""

import numpy as np
import pytest
import torch
from helpers.golden_dreamerv3 import GOLDEN, KINDS, OBS_SHAPES, Golden, assert_matches, golden

from worldflux.interop.dreamerv3 import load_official_dreamerv3, official_to_state_dict
from worldflux.models.dreamerv3.alignment import arrival_rows
from worldflux.training.optim import build_optimizer

TRAINED = ("con", "dec", "dyn", "enc", "pol", "rew", "val")
LOSS_NAMES = {
    "reward": "rew",
    "continue": "con",
    "dynamics": "dyn",
    "representation": "rep",
    "actor": "policy",
    "critic": "value",
    "replay_critic": "repval",
}


@pytest.fixture(params=KINDS)
def ref(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def full_parts(ref: Golden, model):
    """Computes the losses of the batch `in/*` with the recorded samples."""
    return model._loss_parts(ref.rows(), ref["in/carry/deter"], ref["in/carry/stoch"], ref.draws("full/"))


def test_rows_are_converted_to_the_references_alignment(ref):
    rows, expected = arrival_rows(ref.batch(), has_context=True), ref.rows()
    for name in ("is_first", "rewards", "is_terminal", "is_last", "arrival_known"):
        assert torch.equal(getattr(rows, name), getattr(expected, name)), name
    assert torch.equal(rows.prev_actions, expected.prev_actions)
    for key in expected.obs:
        assert torch.equal(rows.obs[key], expected.obs[key])
    deter, stoch = ref.model()._context(ref.batch())
    assert torch.equal(deter, ref["in/carry/deter"])
    assert torch.equal(stoch, ref["in/carry/stoch"])


def test_every_loss_per_step(ref):
    parts = full_parts(ref, ref.model())
    for ours, theirs in LOSS_NAMES.items():
        assert_matches(parts.losses[ours], ref[f"full/losses/{theirs}"])
    for key, loss in parts.reconstruction.items():
        assert_matches(loss, ref[f"full/losses/{key}"])
    assert_matches(parts.observed.deter, ref["full/deter"])
    deter_dim = ref["cfg/deter"]
    assert_matches(parts.imagined.feat[..., :deter_dim], ref["full/imgdeter"])
    behavior = parts.behavior
    assert_matches(behavior.returns, ref["full/imgout/ret"])
    assert_matches(behavior.weight, ref["full/imgout/weight"])
    assert_matches(behavior.advantage, ref["full/imgout/adv_normed"])
    assert_matches(behavior.entropy, ref["full/imgout/ent"])
    assert_matches(parts.replay_returns, ref["full/replout/ret"])
    assert_matches(torch.stack([behavior.norm.low, behavior.norm.high]), ref["full/retnorm_after"])


def test_means_scales_and_total(ref):
    model = ref.model()
    parts = full_parts(ref, model)
    output = model._reduce(parts)
    for ours, theirs in LOSS_NAMES.items():
        assert_matches(output.terms[ours], ref[f"full/mean/{theirs}"])
        assert_matches(model.loss_scale(ours) * output.terms[ours], ref[f"full/scaled/{theirs}"])
    assert_matches(output.loss, ref["full/loss"])


def test_computing_the_loss_changes_nothing(ref):
    model = ref.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    output = model.loss(ref.batch())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.after_step([output])
    assert not torch.equal(model.return_high, before["return_high"])


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(named.items(), grads, strict=True)}


def test_gradient_of_the_total_for_every_tensor(ref):
    model = ref.model()
    actual = gradients(model, model._reduce(full_parts(ref, model)).loss)
    expected = official_to_state_dict(ref.under("g/"), model)
    assert set(expected) == set(actual)
    for name, gradient in expected.items():
        assert_matches(actual[name], gradient, rtol=1e-4, scale=1e-5)


def test_each_loss_reaches_exactly_the_tensors_it_should(ref):
    """Compares the norms of each loss's gradients; exact zeros show which tensors a loss does not reach."""
    model = ref.model()
    parts = full_parts(ref, model)
    names = sorted(n for n in ref.under("p/") if n.split("/")[0] in TRAINED)
    terms = sorted([*LOSS_NAMES.values(), *parts.reconstruction])
    ours = {v: k for k, v in LOSS_NAMES.items()}
    # Filling every official tensor with its index shows to which of our tensors it corresponds.
    marks = official_to_state_dict({n: np.full_like(ref.arrays[f"p/{n}"], i) for i, n in enumerate(names)}, model)
    for row, term in enumerate(terms):
        loss = parts.losses[ours[term]] if term in ours else parts.reconstruction[term]
        actual = gradients(model, loss.mean())
        for name, mark in marks.items():
            expected = float(ref["gradnorm"][row, int(mark.flatten()[0])])
            norm = float(actual[name].norm())
            assert (norm == 0.0) == (expected == 0.0), (term, name, norm, expected)
            assert norm == pytest.approx(expected, rel=1e-4, abs=1e-6 * float(ref["gradnorm"][row].max())), (term, name)


def train_steps(ref: Golden, steps: range, params: str = "p/", optimizer_state=None):
    """Performs the reference's training steps with its recorded samples, and yields the model after each step."""
    model = ref.model(params)
    rate, warmup = (float(x) for x in ref["train/lr_warmup"])
    spec = model.optimizer_spec
    spec = type(spec)(**{**vars(spec), "learning_rate": rate, "warmup_steps": int(warmup)})
    optimizer = build_optimizer(spec, [p for p in model.parameters() if p.requires_grad])
    for i in steps:
        output = model._reduce(model.loss_parts(ref.batch(), ref.draws(f"train/{i}/")))
        optimizer.zero_grad()
        output.loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        optimizer.step()
        model.after_step([output])
        yield i, model, output, norm


def test_four_train_steps(ref):
    rate = float(ref["train/lr_warmup"][0])
    for i, model, output, norm in train_steps(ref, range(4)):
        for ours, theirs in LOSS_NAMES.items():
            assert_matches(output.terms[ours], ref[f"train/{i}/mean/{theirs}"], rtol=1e-4)
        assert_matches(output.loss, ref[f"train/{i}/loss"], rtol=1e-4)
        assert_matches(norm, ref[f"train/{i}/grad_norm"], rtol=1e-4)
        assert_matches(torch.stack([model.return_low, model.return_high]), ref[f"train/{i}/retnorm"], rtol=1e-4)
        if i < 2:
            continue
        expected = official_to_state_dict(ref.under(f"train/p{i + 1}/"), model)
        state = model.state_dict()
        assert len(expected) > 85
        for name, tensor in expected.items():
            assert float((state[name] - tensor).abs().max()) < 0.05 * rate, name
        if i == 2:
            latents = output.extras["deter"].float()
            assert_matches(latents, ref["train/replay_deter"], rtol=1e-3, scale=1e-3)  # half precision


def test_official_checkpoint_directory_loads_the_agent_after_three_steps():
    ref = golden("proprio")
    model = load_official_dreamerv3(
        GOLDEN / "dreamerv3_proprio_official", obs_shape=OBS_SHAPES["proprio"], action_dim=3
    )
    expected = official_to_state_dict(ref.under("train/p3/"), model)
    assert len(expected) > 85
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert float(model.return_high) == pytest.approx(float(ref["train/2/retnorm"][1]), rel=1e-6)
