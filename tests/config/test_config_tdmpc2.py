"""TD-MPC2's configuration: documented sizes and defaults, derived fields, and invalid values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import worldflux
from worldflux.config import TDMPC2_SIZES, DynamicsType, LatentType, TDMPC2Config, WorldModelConfig
from worldflux.errors import ConfigurationError

DOCUMENTED_SIZES = {"5m": (256, 256), "19m": (512, 512), "48m": (512, 1024), "317m": (1024, 2048)}
REFERENCE_SIZES = {
    "reference-1m": (128, 384, 256, 2, 2),
    "reference-5m": (512, 512, 256, 2, 5),
    "reference-19m": (768, 1024, 1024, 3, 5),
    "reference-48m": (768, 1792, 1792, 4, 5),
    "reference-317m": (1376, 4096, 4096, 5, 8),
}


def config(**fields: Any) -> TDMPC2Config:
    return TDMPC2Config(**{"obs_shape": (24,), **fields})


def test_the_fields_have_their_documented_defaults() -> None:
    documented = {
        "model_type": "tdmpc2",
        "latent_type": LatentType.SIMNORM,
        "dynamics_type": DynamicsType.MLP,
        "simnorm_dim": 8,
        "num_hidden_layers": 2,
        "num_tasks": 1,
        "num_q_networks": 5,
        "horizon": 3,
        "num_samples": 512,
        "num_elites": 64,
        "temperature": 0.5,
        "momentum": 0.0,
        "use_decoder": False,
        "learning_rate": 3e-4,
        "grad_clip": 20.0,
    }
    assert {name: getattr(config(), name) for name in documented} == documented
    assert worldflux.TDMPC2Config is TDMPC2Config


@pytest.mark.parametrize("size", DOCUMENTED_SIZES)
def test_the_documented_sizes_have_their_documented_dimensions(size: str) -> None:
    found = TDMPC2Config.from_size(size)
    assert (found.latent_dim, found.hidden_dim) == DOCUMENTED_SIZES[size]
    assert found.model_name == size


@pytest.mark.parametrize("size", REFERENCE_SIZES)
def test_the_reference_sizes_have_the_dimensions_of_the_authors(size: str) -> None:
    found = TDMPC2Config.from_size(size)
    dimensions = (found.latent_dim, found.mlp_dim, found.enc_dim, found.num_enc_layers, found.num_q_networks)
    assert dimensions == REFERENCE_SIZES[size]
    assert found.hidden_dim == found.mlp_dim


@pytest.mark.parametrize("size", TDMPC2_SIZES)
def test_an_images_features_are_the_latent_itself_in_every_size(size: str) -> None:
    found = TDMPC2Config.from_size(size)
    assert 16 * found.num_channels == found.latent_dim


def test_an_unknown_size_is_a_value_error_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"Unknown size '5mb'; did you mean '5m'\? The sizes are: tiny, 5m, 19m"):
        TDMPC2Config.from_size("5mb")
    with pytest.raises(ConfigurationError, match="'num_elite'; did you mean 'num_elites'"):
        TDMPC2Config.from_size("5m", num_elite=3)


def test_overrides_replace_fields_of_a_size() -> None:
    found = TDMPC2Config.from_size("19m", obs_shape=(3,), action_dim=1, horizon=5)
    assert (found.latent_dim, found.obs_shape, found.action_dim, found.horizon) == (512, (3,), 1, 5)


def test_json_gives_back_the_same_configuration(tmp_path: Path) -> None:
    given = config(num_tasks=2, task_action_dims=[6, 2], task_episode_lengths=[500, 100], use_decoder=True)
    given.save(tmp_path / "config.json")
    assert WorldModelConfig.load(tmp_path / "config.json") == given
    assert TDMPC2Config.from_dict(given.to_dict()) == given
    assert given.task_action_dims == (6, 2)


def test_discounts_follow_from_episode_lengths_within_their_limits() -> None:
    assert config(episode_length=200).discounts == (0.975,)
    assert config(episode_length=10).discounts == (0.95,)
    assert config(episode_length=5000).discounts == (0.995,)
    assert config(episode_length=200, discount_max=0.9, discount_min=0.9).discounts == (0.9,)
    assert config(num_tasks=2, episode_length=500).discounts == (0.99, 0.99)
    assert config(num_tasks=2, task_episode_lengths=(500, 200)).discounts == (0.99, 0.975)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_dim": 100}, r"latent_dim is 100, expected a multiple of simnorm_dim \(8\), such as 96 or 104"),
        ({"latent_type": "categorical"}, "expected 'simnorm' and 'mlp'"),
        ({"num_bins": 100}, "num_bins is 100, expected an odd number"),
        ({"vmin": -5.0}, r"vmin is -5.0, expected -vmax \(-10.0\)"),
        ({"obs_shape": (3, 32, 32)}, r"The image 'obs' has shape \(3, 32, 32\), expected a height and width of at"),
        ({"num_elites": 600}, r"num_elites is 600, expected 1 to num_samples \(512\)"),
        ({"num_pi_trajs": 512}, r"num_pi_trajs is 512, expected fewer than num_samples \(512\)"),
        ({"min_std": 3.0}, r"min_std is 3.0, expected at most max_std \(2.0\)"),
        ({"log_std_min": 3.0}, r"log_std_min is 3.0, expected at most log_std_max"),
        ({"dropout": 1.0}, "dropout is 1.0, expected a share from 0 and below 1"),
        ({"momentum": 1.0}, "momentum is 1.0, expected a share from 0 and below 1"),
        ({"tau": 1.5}, "tau is 1.5, expected a share between 0 and 1"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
        ({"horizon": 0}, "horizon is 0, expected a number above 0"),
        ({"entropy_coef": -1.0}, "entropy_coef is -1.0, expected 0 or more"),
        ({"discount_min": 0.999}, "discount_min is 0.999 and discount_max is 0.995"),
        ({"num_tasks": 2, "task_action_dims": (6,)}, "expected one number for each of 2 tasks"),
        ({"num_tasks": 2, "task_action_dims": (6, 7)}, r"expected at most action_dim \(6\) each"),
        ({"task_action_dims": (4,)}, r"expected none for a single task\. Set action_dim"),
        ({"episodic": 1}, "episodic is 1, expected True or False"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_a_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        config(**fields)
