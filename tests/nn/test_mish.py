"""Layers with Mish: the activation and its gradient, and ensembles compared with separate networks."""

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import TDMPC2

from worldflux import State, create_world_model
from worldflux.nn.layers import MLP
from worldflux.nn.mish import Ensemble, MishMLP, mish

X = torch.cat([torch.linspace(-30.0, 30.0, 601), torch.tensor([-1e4, -100.0, 0.0, 19.999, 20.001, 88.0, 1e4])])


def test_mish_and_its_gradient_are_torchs_own():
    ours, theirs = X.clone().requires_grad_(), X.double().requires_grad_()
    weights = torch.linspace(0.5, 2.0, len(X))
    values, expected = mish(ours), F.mish(theirs)
    torch.testing.assert_close(values, expected.float(), rtol=2e-6, atol=1e-9)
    assert torch.equal(mish(X), values)
    (values * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=5e-6, atol=1e-7)


def test_an_ensemble_equals_its_separate_members():
    torch.manual_seed(0)
    together = Ensemble(3, 5, [8, 8], 4)
    for p in together.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(7, 5)
    for member in range(3):
        alone = MishMLP(5, [8, 8], 4)
        alone.load_state_dict({name: value[member] for name, value in together.state_dict().items()})
        torch.testing.assert_close(together(x)[member], alone(x))


def test_a_frozen_ensemble_passes_gradients_to_its_input_only():
    torch.manual_seed(0)
    ensemble = Ensemble(3, 5, [8], 4)
    torch.nn.init.normal_(ensemble.layers[-1].weight)
    x = torch.randn(7, 5, requires_grad=True)
    ensemble(x, members=torch.tensor([2, 0]), frozen=True).sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0.0
    assert all(p.grad is None for p in ensemble.parameters())
    # Members that are not evaluated are not trained.
    ensemble(x.detach(), members=torch.tensor([2, 0])).sum().backward()
    assert torch.equal(ensemble.layers[0].weight.grad[1], torch.zeros(8, 5))
    assert float(ensemble.layers[0].weight.grad[0].abs().max()) > 0.0


@pytest.mark.parametrize("width", [9, 11, 300])
@pytest.mark.parametrize("net", [MishMLP(10, [16], 4), Ensemble(2, 10, [16], 4), MLP(10, 16, 1)])
def test_inputs_of_another_width_are_errors_as_those_of_torch(net, width):
    net(torch.zeros(300, 10))
    for training in (True, False):
        with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match=r"size|shape"):
            net(torch.zeros(300, width))


@torch.no_grad()
def test_a_rollout_from_a_state_of_another_model_is_an_error():
    model = create_world_model("tdmpc2:tiny", obs_shape=(4,), action_dim=2, **TDMPC2)
    actions = torch.zeros(2, 3, 5, 2)
    model.partial_return(State({"latent": torch.zeros(3, 16)}), actions, discount=None, deterministic=True)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        model.partial_return(State({"latent": torch.zeros(3, 24)}), actions, discount=None, deterministic=True)
