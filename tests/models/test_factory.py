"""Creating models by name, from saved directories, and for registered families."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from worldflux import factory
from worldflux.config import DreamerV3Config, WorldModelConfig
from worldflux.errors import CheckpointError, ConfigurationError
from worldflux.factory import create_world_model, list_models, register_model
from worldflux.models.base import WorldModel
from worldflux.models.dreamerv3.world_model import DreamerV3
from worldflux.replay.buffer import ReplayBuffer

REFERENCE_COUNTS = {
    "reference-1m": 686_846,
    "reference-12m": 10_494_158,
    "reference-25m": 23_489_326,
    "reference-50m": 41_650_062,
    "reference-100m": 93_468_238,
    "reference-200m": 165_948_686,
    "reference-400m": 372_896_398,
}


@dataclass(frozen=True)
class ThirdPartyConfig(WorldModelConfig):
    model_type: str = "third-party"
    obs_shape: tuple[int, ...] = (2,)
    depth: int = 1


class ThirdPartyModel(WorldModel):
    config_class = ThirdPartyConfig

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(2, config.hidden_dim)


class AnotherModel(ThirdPartyModel):
    pass


@pytest.fixture
def _registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(factory, "_families", dict(factory._families))
    yield
    factory._count_parameters.cache_clear()


def test_every_listed_size_is_as_large_as_its_name_says() -> None:
    listed = list_models(verbose=True)
    assert list(listed) == list_models()
    for name in ("size12m", "size25m", "size50m", "size100m", "size200m"):
        millions = int(name[len("size") : -1])
        assert listed[f"dreamerv3:{name}"]["params"] == pytest.approx(millions * 1e6, rel=0.005), name


def test_the_reference_sizes_have_the_parameter_counts_of_the_reference() -> None:
    listed = list_models(verbose=True)
    assert {name: listed[f"dreamerv3:{name}"]["params"] for name in REFERENCE_COUNTS} == REFERENCE_COUNTS


def test_the_verbose_list_tells_family_dimensions_and_aliases() -> None:
    entry = list_models(verbose=True)["dreamerv3:size12m"]
    assert entry["type"] == "dreamerv3"
    assert "deter_dim 2048" in entry["description"]
    assert {"dreamer", "dreamerv3", "dreamer-small"} <= set(entry["aliases"])


def test_a_preset_is_built_for_the_given_shapes() -> None:
    model = create_world_model(
        "dreamerv3:tiny", obs_shape=(4,), action_dim=2, action_type="discrete", learning_rate=1e-3
    )
    assert isinstance(model, DreamerV3)
    config = model.config
    assert (config.model_name, config.obs_shape, config.action_dim, config.learning_rate) == ("tiny", (4,), 2, 1e-3)
    actions = model.policy(model.encode(torch.zeros(3, 4)))
    assert torch.equal(actions.sum(-1), torch.ones(3))


def test_shapes_default_to_an_image_and_six_actions() -> None:
    config = create_world_model("dreamerv3:tiny").config
    assert (config.obs_shape, config.action_dim) == ((3, 64, 64), 6)


@pytest.mark.parametrize("alias", ["dreamer-tiny", "DreamerV3:Tiny"])
def test_aliases_and_other_cases_name_the_same_preset(alias: str) -> None:
    assert (
        create_world_model(alias, obs_shape=(4,)).config == create_world_model("dreamerv3:tiny", obs_shape=(4,)).config
    )


def test_unknown_names_are_answered_with_the_nearest() -> None:
    expected = r"^Unknown model 'dreamerv3:size13m'; did you mean 'dreamerv3:size12m'\? list_models\(\) shows all, "
    with pytest.raises(ConfigurationError, match=expected):
        create_world_model("dreamerv3:size13m")
    with pytest.raises(ConfigurationError, match="'obs_shap'; did you mean 'obs_shape'"):
        create_world_model("dreamerv3:tiny", obs_shap=(4,))
    with pytest.raises(ConfigurationError, match="device is 'gpu', expected"):
        create_world_model("dreamerv3:tiny", device="gpu")


def test_a_missing_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as raised:
        create_world_model("my-run")
    assert str(raised.value) == (
        f"Unknown model 'my-run'. list_models() shows all, and there is no directory {tmp_path}/my-run."
    )


@pytest.mark.parametrize("spec", ["", None, 3, b"dreamerv3:tiny"])
def test_a_spec_that_is_not_a_name_is_an_unknown_model(spec: object) -> None:
    with pytest.raises(ConfigurationError, match=f"^Unknown model {spec!r}.* list_models\\(\\) shows"):
        create_world_model(spec)  # type: ignore[call-overload]


def test_the_automatic_device_is_the_gpu_where_there_is_one() -> None:
    model = create_world_model("dreamerv3:tiny", obs_shape=(4,), device="auto")
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu") == model.config.device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_device_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="torch sees 0 CUDA devices"):
        create_world_model("dreamerv3:tiny", device="cuda")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, DreamerV3]:
    model = create_world_model("dreamerv3:tiny", obs_shape=(4,), action_dim=2)
    assert isinstance(model, DreamerV3)
    model.save_pretrained(tmp_path / "walker")
    return tmp_path / "walker", model


def test_a_saved_directory_gives_back_the_model(saved: tuple[Path, DreamerV3]) -> None:
    directory, model = saved
    for spec in (directory, str(directory)):
        again = create_world_model(spec, obs_shape=[4], action_dim=2)  # type: ignore[arg-type]
        assert again.config == model.config
        weights = again.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_saved_model_accepts_fields_that_do_not_affect_its_weights(saved: tuple[Path, DreamerV3]) -> None:
    directory, model = saved
    again = create_world_model(directory, learning_rate=1e-3, imagination_horizon=5)
    assert isinstance(again.config, DreamerV3Config)
    assert (again.config.learning_rate, again.config.imagination_horizon) == (1e-3, 5)
    assert again.optimizer_spec.learning_rate == 1e-3
    assert torch.equal(again.state_dict()["actor.mean.weight"], model.state_dict()["actor.mean.weight"])


def test_a_saved_model_rejects_contradicting_fields(saved: tuple[Path, DreamerV3]) -> None:
    directory, _ = saved
    with pytest.raises(ConfigurationError, match=r"obs_shape is \(5,\), but the model in .*walker was made for \(4,\)"):
        create_world_model(directory, obs_shape=(5,))
    with pytest.raises(ConfigurationError, match=r"action_dim is 3, but the model in .* was made for 2"):
        create_world_model(directory, action_dim=3)
    with pytest.raises(ConfigurationError, match=r"cannot be changed to {'units': 32}"):
        create_world_model(directory, units=32)
    with pytest.raises(ConfigurationError, match="'learning_rte'; did you mean 'learning_rate'"):
        create_world_model(directory, learning_rte=1.0)


def test_an_incomplete_model_directory_is_a_checkpoint_error(saved: tuple[Path, DreamerV3]) -> None:
    directory, _ = saved
    with pytest.raises(CheckpointError, match=r"is a directory of models\. Pass the model of one .*walker'\)\."):
        create_world_model(directory.parent)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="written by save_pretrained"):
        create_world_model(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no readable config.json"):
        create_world_model(directory)


@pytest.mark.usefixtures("_registry")
def test_a_registered_family_is_found_by_name_and_from_its_directory(tmp_path: Path) -> None:
    register_model(
        "mine", ThirdPartyConfig, ThirdPartyModel, sizes={"small": {"hidden_dim": 3}, "large": {"hidden_dim": 5}}
    )
    assert list_models()[-2:] == ["mine:small", "mine:large"]
    assert list_models(verbose=True)["mine:large"]["params"] == 2 * 5 + 5
    model = create_world_model("mine", depth=2)
    assert isinstance(model, ThirdPartyModel) and model.layer.out_features == 3
    model.save_pretrained(tmp_path / "saved")
    again = create_world_model(tmp_path / "saved")
    assert isinstance(again, ThirdPartyModel) and again.config == model.config
    with pytest.raises(ConfigurationError, match="'mine:smal'; did you mean 'mine:small'"):
        create_world_model("mine:smal")


def test_the_directory_of_an_unregistered_family_says_so(tmp_path: Path) -> None:
    ThirdPartyModel(ThirdPartyConfig()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "third-party"
    with pytest.raises(ConfigurationError, match=r"family 'third-party'.*Call register_model"):
        create_world_model(tmp_path)


@pytest.mark.usefixtures("_registry")
def test_registering_refuses_taken_names_and_wrong_classes() -> None:
    with pytest.raises(ConfigurationError, match="The family 'dreamerv3' is DreamerV3 already"):
        register_model("dreamerv3", ThirdPartyConfig, ThirdPartyModel)
    with pytest.raises(ConfigurationError, match="'dreamer' belongs to 'dreamerv3'"):
        register_model("dreamer", ThirdPartyConfig, ThirdPartyModel)
    with pytest.raises(ConfigurationError, match="expected a subclass of WorldModelConfig"):
        register_model("mine", dict, ThirdPartyModel)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="expected a subclass of WorldModel"):
        register_model("mine", ThirdPartyConfig, nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="'detph'; did you mean 'depth'"):
        register_model("mine", ThirdPartyConfig, ThirdPartyModel, sizes={"small": {"detph": 1}})
    with pytest.raises(ConfigurationError, match="cannot be named 'mine:small'"):
        register_model("mine:small", ThirdPartyConfig, ThirdPartyModel)
    with pytest.raises(ConfigurationError, match="'m' stands for 'mine:smal'; did you mean 'mine:small'"):
        register_model("mine", ThirdPartyConfig, ThirdPartyModel, sizes={"small": {}}, aliases={"m": "mine:smal"})
    assert not any(name.startswith("mine") for name in list_models())
    register_model("mine", ThirdPartyConfig, ThirdPartyModel)
    register_model("mine", ThirdPartyConfig, ThirdPartyModel)  # as when a notebook cell runs twice
    with pytest.raises(ConfigurationError, match="'mine' is ThirdPartyModel already"):
        register_model("mine", ThirdPartyConfig, AnotherModel)


def test_a_buffer_that_does_not_know_the_kind_of_its_actions_gives_the_default() -> None:
    buffer = ReplayBuffer(10, (3,), 2)
    assert (buffer.action_type, buffer.action_classes) == (None, None)
    model = create_world_model(
        "tdmpc2:tiny",
        obs_shape=buffer.obs_shape,
        action_dim=buffer.action_dim,
        action_type=buffer.action_type,
        action_classes=buffer.action_classes,
    )
    assert (model.config.action_type, model.config.action_classes) == ("continuous", ())
