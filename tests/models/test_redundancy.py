"""DreamerV3 without a decoder: the redundancy loss, and models that are trained with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.agents import TINY, make_agent
from helpers.envs import CountingEnv
from helpers.fast import SMALL, episodes
from torch import Tensor

from worldflux import WorldFluxAgent, create_world_model
from worldflux.config import DreamerV3Config
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.models.dreamerv3.representation import redundancy_loss
from worldflux.training import Trainer, TrainingConfig, check_health

GOLDEN = Path(__file__).parent.parent / "golden"
WITHOUT = {**TINY, "representation": "redundancy"}


@pytest.mark.parametrize("kind", ["vector", "pixels"])
def test_loss_and_projector_gradient_equal_the_reference(kind: str) -> None:
    with np.load(GOLDEN / f"r2dreamer_{kind}.npz") as file:
        ref = {name: torch.from_numpy(file[name]) for name in file.files}
    projector = ref["projector"].clone().requires_grad_()
    projected = ref["feat"] @ projector.t()
    torch.testing.assert_close(projected, ref["projected"], rtol=1e-5, atol=1e-5)
    loss = redundancy_loss(projected, ref["embed"], off_diagonal=float(ref["lambd"]))
    torch.testing.assert_close(loss, ref["loss"], rtol=1e-6, atol=0.0)
    (ref["loss_scale"] * loss).backward()
    assert projector.grad is not None
    largest = float(ref["projector_grad"].abs().max())
    torch.testing.assert_close(projector.grad, ref["projector_grad"], rtol=1e-4, atol=1e-5 * largest)
    defaults = DreamerV3Config(representation="redundancy").loss_scales
    assert (float(ref["lambd"]), float(ref["loss_scale"])) == pytest.approx((5e-4, defaults["redundancy"]))


def test_loss_worked_by_hand() -> None:
    """Of two rows, all standardised entries are ±sqrt(1/2), and all correlations, divided by N = 2, are ±1/2."""
    projected, embed = torch.tensor([[1.0, 5.0], [3.0, 4.0]]), torch.tensor([[0.0, 9.0], [8.0, 7.0]])
    # Diagonal: 2 * (1/2 - 1)^2; others: 2 * (1/2)^2.
    assert float(redundancy_loss(projected, embed, off_diagonal=0.1)) == pytest.approx(0.5 + 0.1 * 0.5)
    # The first column now moves against its target: c_11 = -1/2.
    assert float(redundancy_loss(projected, embed.flip(0), off_diagonal=0.0)) == pytest.approx(2 * 1.5**2)


@pytest.mark.parametrize("rows", [5, 40])
def test_few_and_many_rows_are_computed_by_the_definition(rows: int) -> None:
    projected, embed = torch.randn(rows, 16).double(), torch.randn(rows, 16).double()
    ours, theirs = ((x - x.mean(0)) / (x.std(0) + 1e-8) for x in (projected, embed))
    c = ours.t() @ theirs / rows
    expected = (c.diag() - 1).square().sum() + 0.3 * (c - c.diag().diag()).square().sum()
    torch.testing.assert_close(redundancy_loss(projected, embed, 0.3).double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("rows", [4, 40])
def test_rows_that_do_not_count_change_nothing_whatever_they_contain(rows: int) -> None:
    mask = torch.arange(rows) % 3 != 1
    projected, embed = torch.randn(rows, 12), torch.randn(rows, 12)
    expected = redundancy_loss(projected[mask], embed[mask])
    projected[~mask], embed[~mask] = 1e3, torch.nan
    projected.requires_grad_()
    loss = redundancy_loss(projected, embed, mask=mask)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert projected.grad is not None
    assert not projected.grad[~mask].any() and projected.grad[mask].abs().sum() > 0


@pytest.mark.parametrize("mask", [None, torch.tensor([True]), torch.tensor([False])])
def test_a_single_row_has_no_correlations_and_no_gradient(mask: Tensor | None) -> None:
    projected = torch.randn(1, 6, requires_grad=True)
    loss = redundancy_loss(projected, torch.randn(1, 6), mask=mask)
    loss.backward()
    assert loss.item() == 6 and projected.grad is not None and not projected.grad.any()


def test_a_constant_entry_of_the_embedding_is_a_constant_of_the_loss() -> None:
    projected, embed = torch.randn(9, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    with torch.no_grad():
        embed[:, 1] = 2.0
    redundancy_loss(projected, embed, off_diagonal=0.5).backward()
    assert projected.grad is not None and projected.grad.isfinite().all()
    assert embed.grad is None  # gradients reach the encoder through the features alone


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ShapeMismatchError, match=r"projected has shape \[2, 3, 4\], embed \[6, 4\]"):
        redundancy_loss(torch.zeros(2, 3, 4), torch.zeros(6, 4))
    with pytest.raises(ShapeMismatchError, match=r"and mask \[2, 3\], expected \[N, E\]"):
        redundancy_loss(torch.zeros(6, 4), torch.zeros(6, 4), mask=torch.ones(2, 3, dtype=torch.bool))


def test_bfloat16_is_used_for_products_of_the_model_and_not_in_the_loss() -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = create_world_model(
            "dreamerv3:tiny", obs_shape=(3,), action_dim=2, representation="redundancy", dtype=dtype, **SMALL
        )
        torch.manual_seed(0)
        term = model.loss(episodes(finals=True, model=model).sample(6, 7)).terms["redundancy"]
        assert term.dtype == torch.float32
        losses.append(float(term))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    projected, embed = torch.randn(20, 8), torch.randn(20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(redundancy_loss(projected, embed), redundancy_loss(projected.clone(), embed))
        inside = redundancy_loss(projected, embed)
    assert torch.equal(inside, redundancy_loss(projected, embed))


def test_the_model_has_a_projector_in_place_of_a_decoder() -> None:
    model = create_world_model("dreamerv3:tiny", obs_shape=(3,), action_dim=2, representation="redundancy", **SMALL)
    with_decoder = create_world_model("dreamerv3:tiny", obs_shape=(3,), action_dim=2, **SMALL)
    names, others = set(model.state_dict()), set(with_decoder.state_dict())
    assert names - others == {"projector.weight"}
    assert others - names == {name for name in others if name.startswith("decoder.")}
    weight = model.projector.weight
    assert weight.shape == (16, 48)
    # Truncated at two standard deviations of a normal, as the kernels of all other layers.
    assert float(weight.detach().abs().max()) <= 2 * 1.1368 / 48**0.5
    assert weight.std().item() == pytest.approx(48**-0.5, rel=0.1)


@pytest.mark.parametrize("finals", [True, False], ids=["all observed", "last observations missing"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_steps_on_a_buffer_train_the_projector_and_the_encoder(finals: bool, fast: bool) -> None:
    torch.manual_seed(0)
    scales = {"reward": 0.0, "continue": 0.0, "kl": 0.0, "actor": 0.0, "critic": 0.0, "replay_critic": 0.0}
    model = create_world_model(
        "dreamerv3:tiny", obs_shape=(3,), action_dim=2, representation="redundancy", loss_scales=scales, **SMALL
    )
    model.rssm.fast = fast
    buffer = episodes(finals=finals, model=model)
    batch = buffer.sample(16, 9)
    assert (batch.obs_mask is None) == finals
    if batch.obs_mask is not None:
        others = replace(batch, obs=torch.where(batch.obs_mask.unsqueeze(-1), batch.obs, 7.0))
        found = []
        for given in (batch, others):
            torch.manual_seed(1)
            found.append(model.loss(given).terms["redundancy"])
        assert torch.equal(*found), "what was not observed does not count"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(model, TrainingConfig(learning_rate=3e-3, device="cpu"))
    losses = [float(trainer.step(batch)["redundancy"]) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"encoder", "rssm", "projector"}


@pytest.mark.parametrize("obs", ["vector", "image", "dict"])
def test_an_agent_learns_saves_and_acts_without_a_decoder(obs: str, tmp_path: Path) -> None:
    env = CountingEnv(lengths=(9, 5), obs=obs)
    scales = {"imitation": 0.5}
    agent = make_agent(env, model_kwargs={**WITHOUT, "loss_scales": scales}).learn(60)
    losses: Any = agent.last_losses
    assert {"redundancy", "imitation"} <= set(losses) and not any("reconstruction" in name for name in losses)
    assert all(float(value) == float(value) for value in losses.values())
    assert agent.replay_buffer is not None
    assert check_health(agent.model, agent.replay_buffer.sample(4, 6), seed=0)
    agent.save(tmp_path / "agent.zip")
    loaded = WorldFluxAgent.load(tmp_path / "agent.zip", env)
    assert loaded.model.config.representation == "redundancy"
    first, _ = env.reset()
    assert np.array_equal(agent.predict(first, deterministic=True)[0], loaded.predict(first, deterministic=True)[0])
    assert set(loaded.model.decode(loaded.model.initial_state(2))) == {"reward", "continue"}
    agent.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigurationError, match=r"cannot be changed to \{'representation': 'reconstruction'\}"):
        create_world_model(tmp_path / "model", representation="reconstruction")


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"representation is 'redundance'.*redundancy"):
        DreamerV3Config(representation="redundance")
    with pytest.raises(ConfigurationError, match=r"\['reconstruction'\] is 2.0, which has no effect .*'redundancy'"):
        DreamerV3Config(representation="redundancy", loss_scales={"reconstruction": 2.0})
    with pytest.raises(ConfigurationError, match=r"\['redundancy'\] is 0.1, which has no effect"):
        DreamerV3Config(loss_scales={"redundancy": 0.1})
    config = DreamerV3Config(representation="redundancy", loss_scales={"redundancy": 0.1})
    assert DreamerV3Config.from_dict(config.to_dict()) == config
    # `bspace` divides the input of the image decoder alone.
    assert DreamerV3Config(representation="redundancy", obs_shape=(3, 64, 64), bspace=7, blocks=8).bspace == 7
