"""Configurations: derived fields, sizes, files, and the messages about invalid values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldflux.config import (
    DREAMERV3_SIZES,
    DreamerV3Config,
    DynamicsType,
    LatentType,
    WorldModelConfig,
)
from worldflux.errors import ConfigurationError, WorldFluxError, nearest

DOCUMENTED_SIZES = {
    "size12m": (2048, 16, 16, 256),
    "size25m": (4096, 32, 16, 512),
    "size50m": (4096, 32, 32, 640),
    "size100m": (8192, 32, 32, 768),
    "size200m": (8192, 32, 32, 1024),
}


def test_the_common_fields_have_their_documented_defaults() -> None:
    config = WorldModelConfig()
    documented = {
        "model_type": "base",
        "model_name": "unnamed",
        "obs_shape": (3, 64, 64),
        "action_dim": 6,
        "action_type": "continuous",
        "latent_type": LatentType.DETERMINISTIC,
        "latent_dim": 256,
        "deter_dim": 256,
        "stoch_dim": 32,
        "dynamics_type": DynamicsType.MLP,
        "hidden_dim": 512,
        "learning_rate": 3e-4,
        "grad_clip": 100.0,
        "device": "cpu",
        "dtype": "float32",
    }
    assert {name: getattr(config, name) for name in documented} == documented


@pytest.mark.parametrize("size", DOCUMENTED_SIZES)
def test_the_documented_sizes_have_their_documented_dimensions(size: str) -> None:
    config = DreamerV3Config.from_size(size)
    found = (config.deter_dim, config.stoch_discrete, config.stoch_classes, config.hidden_dim)
    assert found == DOCUMENTED_SIZES[size]
    assert config.model_name == size


@pytest.mark.parametrize("size", [name for name in DREAMERV3_SIZES if name.startswith("reference-")])
def test_the_reference_sizes_keep_the_proportions_of_the_authors(size: str) -> None:
    config = DreamerV3Config.from_size(size)
    assert config.stoch_discrete == 32 and config.blocks == 8
    assert config.hidden_dim == config.units == config.deter_dim // 8
    assert config.stoch_classes == config.cnn_depth == config.deter_dim // 128


def test_the_widths_of_the_state_follow_from_its_parts() -> None:
    config = DreamerV3Config(deter_dim=64, stoch_discrete=4, stoch_classes=6)
    assert (config.stoch_dim, config.latent_dim) == (24, 88)
    with pytest.raises(ConfigurationError, match=r"stoch_dim is 25, expected stoch_discrete \* stoch_classes = 24"):
        DreamerV3Config(deter_dim=64, stoch_discrete=4, stoch_classes=6, stoch_dim=25)


@pytest.mark.parametrize(
    ("obs_shape", "kind", "images", "vectors"),
    [
        ((3, 64, 64), "cnn", ("obs",), ()),
        ((4,), "mlp", (), ("obs",)),
        ({"b": (3,), "a": ()}, "mlp", (), ("a", "b")),
        ({"speed": (2,), "camera": (1, 48, 48)}, "multi", ("camera",), ("speed",)),
    ],
)
def test_encoder_and_decoder_follow_the_observation(
    obs_shape: Any, kind: str, images: tuple[str, ...], vectors: tuple[str, ...]
) -> None:
    config = DreamerV3Config(obs_shape=obs_shape)
    assert (config.encoder_type, config.decoder_type) == (kind, kind)
    assert (config.image_keys, config.vector_keys) == (images, vectors)


def test_an_encoder_that_contradicts_the_observation_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="encoder_type is 'cnn', expected 'mlp' for obs_shape"):
        DreamerV3Config(obs_shape=(4,), encoder_type="cnn")


def test_the_default_kl_weights_are_the_papers() -> None:
    config = DreamerV3Config()
    kl = config.loss_scales["kl"]
    assert kl * config.kl_balance == pytest.approx(1.0)
    assert kl * (1 - config.kl_balance) == pytest.approx(0.1)


def test_a_partial_dict_of_loss_scales_changes_only_what_it_names() -> None:
    default = DreamerV3Config().loss_scales
    assert DreamerV3Config(loss_scales={"actor": 2}).loss_scales == {**default, "actor": 2.0}
    with pytest.raises(ConfigurationError, match="'rewards'; did you mean 'reward'"):
        DreamerV3Config(loss_scales={"rewards": 1.0})


def test_discrete_actions_know_their_classes() -> None:
    assert WorldModelConfig(action_type="discrete", action_dim=3).action_classes == (3,)
    multi = WorldModelConfig(action_type="multi_discrete", action_dim=5, action_classes=[3, 2])  # type: ignore[arg-type]
    assert multi.action_classes == (3, 2)


def test_given_shapes_become_plain_tuples_and_numbers() -> None:
    config = WorldModelConfig(obs_shape=[np.int64(4)], action_dim=np.int64(2), learning_rate=1)  # type: ignore[arg-type]
    assert config.obs_shape == (4,) and type(config.obs_shape[0]) is int and type(config.action_dim) is int
    assert config.learning_rate == 1.0 and type(config.learning_rate) is float


def test_a_configuration_does_not_change() -> None:
    scales = {"actor": 2.0}
    config = DreamerV3Config(loss_scales=scales)
    scales["actor"] = 5.0
    assert config.loss_scales["actor"] == 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.action_dim = 3  # type: ignore[misc]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"obs_shape": 4}, r"obs_shape is 4, expected a tuple.*Write \(4,\)"),
    ({"obs_shape": "4"}, "expected a tuple of integers"),
    ({"obs_shape": (0,)}, "expected a tuple of integers above 0"),
    ({"obs_shape": {}}, "expected at least one key"),
    ({"action_dim": 0}, "action_dim is 0, expected a number above 0"),
    ({"action_dim": 2.0}, "action_dim is 2.0, expected an integer"),
    ({"action_dim": True}, "action_dim is True, expected an integer"),
    ({"hidden_dim": -1}, "hidden_dim is -1"),
    ({"learning_rate": float("nan")}, "learning_rate is nan, expected a finite number"),
    ({"learning_rate": "fast"}, "learning_rate is 'fast', expected a finite number"),
    ({"model_name": 3}, "model_name is 3, expected a string"),
    ({"latent_type": "categorial"}, "did you mean 'categorical'"),
    ({"action_type": "discret"}, "action_type is 'discret'; did you mean 'discrete'"),
    ({"dtype": "float17"}, "dtype is 'float17'; did you mean 'float16'.*float32, bfloat16, float16"),
    ({"action_classes": (6,)}, "expected none for continuous actions"),
    ({"action_type": "discrete", "action_classes": (3, 3)}, r"expected \(6,\) for discrete actions"),
    ({"action_type": "multi_discrete"}, r"summing to action_dim \(6\)"),
    ({"action_type": "multi_discrete", "action_classes": (3, 2)}, "sums to 5"),
    ({"obs_shape": (5,), "obs_classes": {"obs": (3,)}}, r"expected the observation 'obs' to have shape \(3,\)"),
    ({"obs_shape": {"room": (5,)}, "obs_classes": {"rom": (5,)}}, "'rom'; did you mean 'room'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_value_that_does_not_fit_is_refused_with_a_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        WorldModelConfig(**fields)


REFUSED_DREAMER: list[tuple[dict[str, Any], str]] = [
    ({"obs_shape": (64, 64, 3)}, r"channels last; expected channels first \(CHW\).*use \(3, 64, 64\)"),
    ({"obs_shape": (64, 64, 9)}, r"channels last; expected channels first \(CHW\).*use \(9, 64, 64\)"),
    ({"obs_shape": {"camera": (96, 96, 1)}}, r"obs_shape\['camera'\] is \(96, 96, 1\).*use \(1, 96, 96\)"),
    ({"obs_shape": (2, 3, 64, 64)}, "expected at most 3 dimensions"),
    ({"deter_dim": 100}, r"deter_dim is 100, expected a multiple of blocks \(8\), such as 96 or 104"),
    ({"cnn_depth": 3}, r"4 \* cnn_depth is 12, expected a multiple of bspace \(8\), such as 8 or 16"),
    ({"obs_shape": (3, 84, 84)}, "84x84.*multiples of 16 from 48 to 256.*Resize it"),
    ({"obs_shape": (3, 32, 32)}, "32x32"),
    ({"obs_shape": {"a": (3, 64, 64), "b": (3, 96, 96)}}, "different sizes.*a: 64x64, b: 96x96"),
    ({"cnn_kernels": (4, 4, 4, 4)}, "expected four odd sizes"),
    ({"cnn_kernels": (5, 5)}, "expected four odd sizes"),
    ({"bins": 254}, "bins is 254, expected an odd number"),
    ({"stoch_classes": 65536}, "stoch_classes is 65536, expected at most 65,535"),
    ({"unimix": 1.5}, "unimix is 1.5, expected a share between 0 and 1"),
    ({"kl_free": -1}, "kl_free is -1.0, expected 0 or more"),
    ({"discount_horizon": 1}, "expected more than 1 step"),
    ({"imagination_horizon": 0}, "imagination_horizon is 0"),
    ({"use_symlog": 1}, "use_symlog is 1, expected True or False"),
    ({"latent_type": "gaussian"}, "expected 'categorical' and 'rssm', the only ones of DreamerV3Config"),
    ({"model_type": "dreamer"}, "model_type is 'dreamer', expected 'dreamerv3'"),
    ({"loss_scales": {"kl": -1}}, r"loss_scales\['kl'\] is -1, expected 0 or more"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED_DREAMER)
def test_dreamer_refuses_what_it_cannot_be_built_from(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DreamerV3Config(**fields)


def test_an_unknown_size_is_a_value_error_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"'size13m'; did you mean 'size12m'\? The sizes are: tiny, size12m"):
        DreamerV3Config.from_size("size13m")


def test_an_unknown_field_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigurationError, match="Unknown field 'detr_dim'; did you mean 'deter_dim'"):
        DreamerV3Config.from_size("tiny", detr_dim=3)
    with pytest.raises(ConfigurationError, match="Unknown field 'unit'"):
        WorldModelConfig.from_dict({"model_type": "dreamerv3", "unit": 3})


def test_no_image_rules_bind_a_model_of_vectors() -> None:
    assert DreamerV3Config(obs_shape=(4,), deter_dim=24, blocks=3, cnn_depth=3).deter_dim == 24


@given(
    size=st.sampled_from(sorted(DREAMERV3_SIZES)),
    obs_shape=st.one_of(
        st.tuples(st.integers(1, 40)),
        st.tuples(st.integers(1, 4), st.sampled_from([48, 64, 96]), st.just(64)),
        st.dictionaries(st.text("abcxyz/_", min_size=1), st.tuples(st.integers(1, 9)), min_size=1, max_size=4),
    ),
    classes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    scale=st.floats(0, 10),
)
def test_json_gives_back_the_same_configuration(size: str, obs_shape: Any, classes: list[int], scale: float) -> None:
    config = DreamerV3Config.from_size(
        size,
        obs_shape=obs_shape,
        action_type="multi_discrete",
        action_classes=tuple(classes),
        action_dim=sum(classes),
        loss_scales={"reward": scale},
    )
    assert WorldModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_load_returns_the_class_that_was_saved(tmp_path: Path) -> None:
    dreamer = DreamerV3Config.from_size("tiny", obs_shape={"a": (3,), "b": (1, 48, 64)}, obs_classes={"a": (3,)})
    dreamer.save(tmp_path / "new" / "dreamer.json")
    base = WorldModelConfig(latent_type="vq", dynamics_type="ssm")  # type: ignore[arg-type]
    base.save(str(tmp_path / "base.json"))
    loaded = WorldModelConfig.load(tmp_path / "new" / "dreamer.json")
    assert type(loaded) is DreamerV3Config and loaded == dreamer
    assert WorldModelConfig.load(str(tmp_path / "base.json")) == base
    assert base.latent_type is LatentType.VQ and base.dynamics_type is DynamicsType.SSM
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["base.json", "dreamer.json"]
    with pytest.raises(ConfigurationError, match="model_type is 'base', and DreamerV3Config reads 'dreamerv3'"):
        DreamerV3Config.load(tmp_path / "base.json")


def test_load_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError):
        WorldModelConfig.load(path)
    path.write_text('{"model_type": ')
    with pytest.raises(json.JSONDecodeError):
        WorldModelConfig.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(ConfigurationError, match=r"config.json: .*got list"):
        WorldModelConfig.load(path)
    path.write_text('{"model_type": "dreamerv4", "units": 8}')
    with pytest.raises(ConfigurationError, match="Unknown model_type 'dreamerv4'; did you mean 'dreamerv3'"):
        WorldModelConfig.load(path)
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigurationError, match="not a text file"):
        WorldModelConfig.load(path)


def test_a_model_type_belongs_to_one_family() -> None:
    with pytest.raises(ConfigurationError, match=r"of .*Impostor already belongs to DreamerV3Config"):

        class Impostor(WorldModelConfig):
            model_type: str = "dreamerv3"


def test_every_configuration_error_is_ours_and_a_value_error() -> None:
    assert issubclass(ConfigurationError, WorldFluxError) and issubclass(ConfigurationError, ValueError)


def test_nearest_ignores_case_and_stays_silent_when_nothing_is_near() -> None:
    assert nearest("SIZE12", ["size12m", "Tiny"]) == "; did you mean 'size12m'?"
    assert nearest("tinny", ["size12m", "Tiny"]) == "; did you mean 'Tiny'?"
    assert nearest("walker", ["size12m", "Tiny"]) == "."
