"""World models by name: presets, aliases, saved directories, and families that users registered."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, overload

import torch

from worldflux.accel.device import resolve_device
from worldflux.config import (
    DREAMERV3_SIZES,
    TDMPC2_SIZES,
    DreamerV3Config,
    ObsShape,
    TDMPC2Config,
    WorldModelConfig,
)
from worldflux.config.base import check_field_names
from worldflux.errors import CheckpointError, ConfigurationError, nearest
from worldflux.files import reading_together
from worldflux.hub.client import model_path
from worldflux.models.base import CONFIG_FILE, WEIGHTS_FILE, WorldModel
from worldflux.models.dreamerv3.world_model import DreamerV3
from worldflux.models.tdmpc2.world_model import TDMPC2
from worldflux.reading import InvalidJSONError

_DERIVED = ("deter_dim", "stoch_dim", "latent_dim", "encoder_type", "decoder_type")
"""Fields of configurations that are derived from others unless a family has a default for them."""


@dataclass(frozen=True)
class _Family:
    """A family of models, as given to `register_model`."""

    config_class: type[WorldModelConfig]
    model_class: type[WorldModel]
    presets: Mapping[str, Mapping[str, Any]]
    """Fields of the configuration for each preset name."""
    aliases: Mapping[str, str]
    """Preset that each alias stands for."""
    description: str

    def names(self) -> list[str]:
        """Returns the names of all presets and aliases."""
        return [*self.presets, *self.aliases]


_families: dict[str, _Family] = {}
_OF_BUFFERS = ("obs_shape", "action_dim", "action_type", "action_classes")
"""Fields that are copied from replay buffers. None, as in one that does not know the kind of its actions, keeps the
default."""


def create_world_model(
    spec_or_path: str | os.PathLike[str] | WorldModelConfig,
    *,
    obs_shape: ObsShape | None = None,
    action_dim: int | None = None,
    device: str | torch.device = "cpu",
    allow_nonfinite: bool = False,
    **overrides: Any,
) -> WorldModel:
    """Creates a world model from a preset, an alias, a saved directory or a configuration.

        >>> model = create_world_model("dreamerv3:size12m", obs_shape=(4,), action_dim=2, action_type="discrete")
        >>> model = create_world_model(TDMPC2Config(obs_shape=(39,), action_dim=6, latent_dim=256))

    Args:
        spec_or_path: A name from `list_models` or an alias, a directory written by `save_pretrained`, an address on
            the Hugging Face Hub (`hf://user/name`), or a configuration. A name takes precedence over a directory of
            the same name; write `./name` for the directory.
        obs_shape: Shape of one observation, or shapes by key; images are `(C, H, W)`. Default: the configuration's, or
            `(3, 64, 64)` for a preset. For a saved model, it must equal the shape that the model was made for.
        action_dim: Dimension of the action vector. Default: the configuration's, or 6 for a preset.
        device: Device of the model; "auto" selects the GPU if there is one. With a configuration, its own `device`
            is used unless this differs from the default.
        allow_nonfinite: Whether to load saved weights that are NaN or infinite, in order to inspect them.
        **overrides: Any other fields of the model's configuration, such as `action_type` or `learning_rate`. For a
            saved model, only fields that do not change the shapes of its weights. `action_type` and `action_classes`
            may be None, as those of a buffer that does not know the kind of its actions.

    Raises:
        ConfigurationError: If the name, a field or a value is unknown or invalid. The message says what is valid.
        CheckpointError: If the directory is not a complete saved model, or its weights are not finite.
        HubError: If it cannot be downloaded.
    """
    fields = {"obs_shape": obs_shape, "action_dim": action_dim, **overrides}
    given = {name: value for name, value in fields.items() if value is not None or name not in _OF_BUFFERS}
    if isinstance(spec_or_path, WorldModelConfig):
        return _from_config(spec_or_path, device, given)
    if not isinstance(spec_or_path, (str, os.PathLike)):
        raise ConfigurationError(
            f"Unknown model {spec_or_path!r}. Pass a name that list_models() shows, or a directory written by "
            "save_pretrained."
        )
    name = os.fspath(spec_or_path)
    place = resolve_device(device)
    found = find_preset(name) if isinstance(spec_or_path, str) else None
    if found is None:
        return _load(name, place, given, allow_nonfinite)
    preset, family = found
    named = {"model_name": preset.split(":")[-1], **family.presets[preset]}
    config = family.config_class.from_dict({**named, **given, "device": str(place)})
    return family.model_class(config).to(place)


@overload
def list_models(verbose: Literal[False] = False) -> list[str]: ...
@overload
def list_models(verbose: Literal[True]) -> dict[str, dict[str, Any]]: ...
def list_models(verbose: bool = False) -> list[str] | dict[str, dict[str, Any]]:
    """Lists the presets that `create_world_model` accepts.

    Args:
        verbose: Whether to return details of each preset.

    Returns:
        The names of the presets. With `verbose`, a dict from each name to its `description`, `type` (the family),
        `params` (trainable parameters for a 64x64 RGB image and 6 continuous actions) and `aliases`.
    """
    if not verbose:
        return [preset for family in _families.values() for preset in family.presets]
    return {
        preset: {
            "description": _describe(family, fields),
            "type": family.config_class.model_type,
            "params": _count_parameters(preset),
            "aliases": [alias for alias, target in family.aliases.items() if target == preset],
        }
        for family in _families.values()
        for preset, fields in family.presets.items()
    }


def register_model(
    name: str,
    config_class: type[WorldModelConfig],
    model_class: type[WorldModel],
    *,
    sizes: Mapping[str, Mapping[str, Any]] | None = None,
    aliases: Mapping[str, str] | None = None,
    description: str = "",
) -> None:
    """Makes a custom family of models available by name, in `create_world_model` and in `WorldFluxAgent`.

        >>> register_model("mine", MyConfig, MyModel, sizes={"small": {"hidden_dim": 64}})
        >>> create_world_model("mine:small", obs_shape=(4,), action_dim=2)

    Args:
        name: Name of the family. Without `sizes`, it is also the name of the only preset.
        config_class: Class of its configuration, a `WorldModelConfig` with its own `model_type`.
        model_class: Class of its model, a `WorldModel` that is constructed from a configuration.
        sizes: Fields of the configuration for each size. The presets are called `name:size`, and `name` alone is an
            alias of the first.
        aliases: Preset that each further name stands for.
        description: One sentence for `list_models`.

    Raises:
        ConfigurationError: If the name is taken, or a class or a size is invalid.
    """
    if not name or ":" in name or os.sep in name or "/" in name:
        raise ConfigurationError(f"A family cannot be named '{name}'. Use a plain word, and pass sizes separately.")
    if not (isinstance(config_class, type) and issubclass(config_class, WorldModelConfig)):
        raise ConfigurationError(f"config_class is {config_class!r}, expected a subclass of WorldModelConfig.")
    if not (isinstance(model_class, type) and issubclass(model_class, WorldModel)):
        raise ConfigurationError(f"model_class is {model_class!r}, expected a subclass of WorldModel.")
    presets = {f"{name}:{size}": dict(fields) for size, fields in sizes.items()} if sizes else {name: {}}
    added = dict(aliases or {})
    if sizes:
        added.setdefault(name, next(iter(presets)))
    for alias, target in added.items():
        if target not in presets:
            raise ConfigurationError(f"The alias '{alias}' stands for '{target}'{nearest(target, presets)}")
    known = _families.get(name)
    if known is not None and _identity(known.model_class) != _identity(model_class):
        raise ConfigurationError(f"The family '{name}' is {known.model_class.__name__} already. Choose another name.")
    owners = {key.lower(): family for family, entry in _families.items() for key in entry.names()}
    for key in (*presets, *added):
        if owners.get(key.lower(), name) != name:
            raise ConfigurationError(f"The name '{key}' belongs to '{owners[key.lower()]}'. Choose another one.")
    for preset in presets.values():
        config_class.from_dict(preset)
    # A class that is defined again, as in a notebook, replaces its former self.
    _families[name] = _Family(config_class, model_class, presets, added, description)
    _count_parameters.cache_clear()


def _identity(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def find_preset(name: str) -> tuple[str, _Family] | None:
    """Returns the preset that a name or an alias stands for, ignoring case, and its family; None if unknown."""
    for family in _families.values():
        lowered = {key.lower(): key for key in family.names()}
        if name.lower() in lowered:
            key = lowered[name.lower()]
            return family.aliases.get(key, key), family
    return None


def _from_config(config: WorldModelConfig, device: str | torch.device, given: dict[str, Any]) -> WorldModel:
    """Creates a model from a configuration with some of its fields replaced."""
    family = next((entry for entry in _families.values() if isinstance(config, entry.config_class)), None)
    if family is None:
        known = ", ".join(entry.config_class.__name__ for entry in _families.values())
        raise ConfigurationError(
            f"A {type(config).__name__} belongs to no family of models, expected one of: {known}. Call register_model "
            "for a family of your own first."
        )
    place = resolve_device(config.device if device == "cpu" else device)
    check_field_names(type(config), given)
    # Derived fields are derived again, from the replaced ones.
    derived = {item.name: None for item in fields(config) if item.name in _DERIVED and item.default is None}
    return family.model_class(replace(config, **{**derived, **given, "device": str(place)})).to(place)


def _load(name: str, device: torch.device, given: dict[str, Any], allow_nonfinite: bool) -> WorldModel:
    """Loads the saved model in the directory `name`, with some fields of its configuration replaced."""
    directory = model_path("spec_or_path", name) if name else None  # an empty path would be the working directory
    if directory is None or not directory.exists():
        options = [key for family in _families.values() for key in family.names()]
        missing = f", and there is no directory {directory}" if directory else ""
        raise ConfigurationError(f"Unknown model {name!r}{nearest(name, options)} list_models() shows all{missing}.")
    if directory.is_file():
        raise ConfigurationError(
            f"{name!r} is a file, expected a preset or a directory written by save_pretrained. The file of an agent is "
            f"loaded with WorldFluxAgent.load({name!r}, env)."
        )
    return reading_together(
        directory, (CONFIG_FILE, WEIGHTS_FILE), lambda: _read(name, directory, device, given, allow_nonfinite)
    )


def _read(name: str, directory: Path, device: torch.device, given: dict[str, Any], allow_nonfinite: bool) -> WorldModel:
    """Reads a saved model from a directory that exists."""
    inside = sorted(place.parent for place in directory.glob(f"*/{CONFIG_FILE}"))
    if inside and not (directory / CONFIG_FILE).exists():
        agent = any((place / "agent.json").exists() for place in inside)
        load = f", or the newest agent with WorldFluxAgent.load({name!r}, env)" if agent else ""
        raise CheckpointError(
            f"{name!r} is a directory of {'checkpoints' if agent else 'models'}. Pass the model of one of them "
            f"({', '.join(repr(os.path.join(name, place.name)) for place in inside[-3:])}){load}."
        )
    try:
        saved = WorldModelConfig.load(directory / CONFIG_FILE)
    except (OSError, InvalidJSONError) as error:
        raise CheckpointError(
            f"{name} has no readable {CONFIG_FILE} ({error}). Pass a directory written by save_pretrained."
        ) from error
    family = next((entry for entry in _families.values() if type(saved) is entry.config_class), None)
    if family is None:
        known = ", ".join(_families)
        raise ConfigurationError(
            f"{name} holds a model of the family '{saved.model_type}', expected one of: {known}. "
            "Call register_model for a family of your own first."
        )
    for field in ("obs_shape", "action_dim"):
        if field in given and getattr(WorldModelConfig(**{field: given[field]}), field) != getattr(saved, field):
            raise ConfigurationError(
                f"{field} is {given[field]}, but the model in {name} was made for {getattr(saved, field)}. "
                "Leave it out, or create a new model."
            )
    options = {"allow_nonfinite": True} if allow_nonfinite else {}  # custom models may not have this parameter
    model = family.model_class.from_pretrained(directory, device=device, **options)
    try:
        config = family.config_class.from_dict({**saved.to_dict(), **given, "device": str(device)})
        if given:
            weights = model.state_dict()
            model = family.model_class(config).to(device)
            model.load_state_dict(weights)
    except (ConfigurationError, RuntimeError) as error:
        raise ConfigurationError(f"The model in {name} cannot be changed to {given}. {error}") from error
    model.config = config
    return model


def _describe(family: _Family, fields: Mapping[str, Any]) -> str:
    dimensions = ", ".join(f"{key} {value}" for key, value in fields.items())
    return "; ".join(part for part in (family.description, dimensions) if part)


@cache
def _count_parameters(preset: str) -> int:
    """Counts trainable parameters for a 64x64 RGB image and 6 continuous actions, without allocating any."""
    found = find_preset(preset)
    assert found is not None, preset
    family = found[1]
    fields = {**family.presets[preset], "obs_shape": (3, 64, 64), "action_dim": 6}
    with torch.device("meta"):
        model = family.model_class(family.config_class.from_dict(fields))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


register_model(
    "dreamerv3",
    DreamerV3Config,
    DreamerV3,
    sizes=DREAMERV3_SIZES,
    aliases={
        "dreamer": "dreamerv3:size12m",
        "dreamerv3": "dreamerv3:size12m",
        "dreamer-tiny": "dreamerv3:tiny",
        "dreamer-small": "dreamerv3:size12m",
        "dreamer-medium": "dreamerv3:size50m",
        "dreamer-large": "dreamerv3:size200m",
    },
    description="DreamerV3: recurrent state-space model, actor and critic trained in imagination",
)
register_model(
    "tdmpc2",
    TDMPC2Config,
    TDMPC2,
    sizes=TDMPC2_SIZES,
    aliases={"tdmpc": "tdmpc2:5m", "tdmpc2": "tdmpc2:5m", "tdmpc2-tiny": "tdmpc2:tiny"},
    description="TD-MPC2: implicit world model, value ensemble and policy prior for planning",
)
