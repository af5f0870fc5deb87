"""The base class of all configurations: common fields, checks, and JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, TypeVar

from worldflux.errors import ConfigurationError, nearest
from worldflux.files import checked_path, write_text
from worldflux.reading import only_our_errors, read_json
from worldflux.validation import (
    ObsShape,
    check_choice,
    clean_enum,
    clean_obs_shape,
    clean_sizes,
    finite_number,
    whole_number,
)

ConfigT = TypeVar("ConfigT", bound="WorldModelConfig")

_ACTION_TYPES = ("continuous", "discrete", "multi_discrete")
_DTYPES = ("float32", "bfloat16", "float16")
_FAMILIES: dict[str, type[WorldModelConfig]] = {}


class LatentType(str, Enum):
    """Kind of latent state."""

    DETERMINISTIC = "deterministic"
    GAUSSIAN = "gaussian"
    CATEGORICAL = "categorical"
    VQ = "vq"
    SIMNORM = "simnorm"


class DynamicsType(str, Enum):
    """Kind of network that predicts the next latent state."""

    RSSM = "rssm"
    MLP = "mlp"
    TRANSFORMER = "transformer"
    SSM = "ssm"


@dataclass(frozen=True)
class WorldModelConfig:
    """The fields that all families of world models have in common.

    A configuration is checked when it is created, and immutable. A family derives from this class and sets its own
    `model_type`, by which `from_dict` and `load` find it:

        >>> WorldModelConfig.from_dict({"model_type": "dreamerv3", "obs_shape": [4]}).obs_shape
        (4,)
    """

    model_type: str = "base"
    """Family of the model, which determines the class that a saved configuration is loaded into."""
    model_name: str = "unnamed"
    """Name of the preset or run. For information only."""
    obs_shape: ObsShape = (3, 64, 64)
    """Shape of one observation, or a dictionary of shapes by key. For all families, three dimensions stand for a
    channel-first image `[C, H, W]`; this base class accepts any shape."""
    action_dim: int = 6
    """Width of the action vector; for one-hot actions, the sum of the classes."""
    action_type: str = "continuous"
    """"continuous" (in [-1, 1]), "discrete" (one one-hot vector) or "multi_discrete" (concatenated one-hot vectors)."""
    action_classes: tuple[int, ...] = ()
    """Number of choices of each one-hot action. Required for "multi_discrete", otherwise derived."""
    obs_classes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Classes of observations that are concatenated one-hot vectors, by key. A single tensor has the key "obs"."""
    latent_type: LatentType = LatentType.DETERMINISTIC
    """Kind of latent state."""
    latent_dim: int = 256
    """Width of the latent state that is the input of the heads."""
    deter_dim: int = 256
    """Width of the deterministic part of the state. A larger state remembers more; the cost grows quadratically."""
    stoch_dim: int = 32
    """Width of the stochastic part of the state."""
    dynamics_type: DynamicsType = DynamicsType.MLP
    """Kind of network that predicts the next latent state."""
    hidden_dim: int = 512
    """Width of the hidden layers of the dynamics."""
    learning_rate: float = 3e-4
    """Learning rate of the optimizer. Larger values learn faster until training diverges."""
    grad_clip: float = 100.0
    """Bound for gradient clipping, which each family defines. Smaller values clip more."""
    device: str = "cpu"
    """Device on which `create_world_model` creates the model: "cpu", "cuda", "cuda:1", ..."""
    dtype: str = "float32"
    """Precision of matrix products: "float32", "bfloat16" or "float16". Parameters and losses stay in float32. In
    float16, gradients below 6e-8 become zero and values above 65504 infinite: prefer "bfloat16"."""

    _positive: ClassVar[tuple[str, ...]] = (
        "action_dim",
        "latent_dim",
        "deter_dim",
        "stoch_dim",
        "hidden_dim",
        "learning_rate",
        "grad_clip",
    )
    """Fields that are greater than 0."""
    _not_negative: ClassVar[tuple[str, ...]] = ()
    """Fields that are 0 or greater."""
    _shares: ClassVar[tuple[str, ...]] = ()
    """Fields between 0 and 1."""
    _at_most: ClassVar[dict[str, int]] = {}
    """Upper limits of fields that determine memory or time, but no shape of a weight that a file could contradict."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Registers the family under its `model_type`, by which saved files find the class."""
        super().__init_subclass__(**kwargs)
        model_type = cls.__dict__.get("model_type")
        if not isinstance(model_type, str):
            return
        known = _FAMILIES.get(model_type)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigurationError(
                f"model_type '{model_type}' of {cls.__qualname__} already belongs to {known.__qualname__}. "
                "Choose another one for the new family."
            )
        _FAMILIES[model_type] = cls

    def __post_init__(self) -> None:
        self._derive()
        self._check_kinds()
        self._check_common()

    @property
    def obs_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the observations by key, in sorted order. A single tensor has the key "obs"."""
        return dict(self.obs_shape) if isinstance(self.obs_shape, dict) else {"obs": self.obs_shape}

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Keys of observations that are images `[C, H, W]`, in sorted order."""
        return tuple(key for key, shape in self.obs_shapes.items() if len(shape) == 3)

    @property
    def vector_keys(self) -> tuple[str, ...]:
        """Keys of observations that are flattened to vectors, in sorted order."""
        return tuple(key for key, shape in self.obs_shapes.items() if len(shape) != 3)

    @classmethod
    def episode_fields(cls, max_steps: int | None) -> dict[str, Any]:
        """Fields of a preset that follow from the environment's episodes.

        Args:
            max_steps: Number of steps after which an episode is truncated; None if unknown.
        """
        return {}

    @classmethod
    def from_dict(cls: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
        """Creates a configuration from the result of `to_dict`. Missing fields take their defaults.

        Args:
            data: Field names and values. `model_type` determines the class, which has to be this class or derive from
                it.

        Raises:
            ConfigurationError: If a field is unknown, a value does not fit, or the family is another one.
        """
        if not isinstance(data, Mapping):
            raise ConfigurationError(
                f"A configuration is a mapping of field names to values, got {type(data).__name__}."
            )
        model_type = data.get("model_type", _family_of(cls))
        target = _FAMILIES.get(model_type, WorldModelConfig) if isinstance(model_type, str) else WorldModelConfig
        if issubclass(cls, target):
            target = cls
        if not issubclass(target, cls) or (target is not WorldModelConfig and model_type != _family_of(target)):
            raise ConfigurationError(
                f"model_type is {model_type!r}, and {cls.__name__} reads '{_family_of(cls)}'. "
                "WorldModelConfig.load reads every known family."
            )
        if model_type not in _FAMILIES:
            raise ConfigurationError(
                f"Unknown model_type '{model_type}'{nearest(str(model_type), _FAMILIES)} "
                f"Known are: {', '.join(_FAMILIES)}. "
                "Import your own family before you read its configurations."
            )
        check_field_names(target, data)
        return target(**data)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values: enums as their values, tuples as lists."""
        return {item.name: _to_json(getattr(self, item.name)) for item in fields(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the configuration to a JSON file, which is replaced as a whole.

        Raises:
            ConfigurationError: If it cannot be written.
        """
        write_text(path, self.to_json(), ConfigurationError)

    def to_json(self) -> str:
        """The text that `save` writes."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def load(cls: type[ConfigT], path: str | os.PathLike[str]) -> ConfigT:
        """Loads a configuration from a JSON file or a directory's `config.json`, in the class of its `model_type`.

        Raises:
            FileNotFoundError: If there is no such file.
            ConfigurationError: If it is not a configuration of this class. If it is not even JSON, the error is also a
                `json.JSONDecodeError`.
        """
        path = checked_path("path", path)
        if path.is_dir():
            path = path / "config.json"
        data = read_json(
            path, error=ConfigurationError, finite=False
        )  # the checks of the fields name a value that is not finite
        with only_our_errors(path, ConfigurationError):
            try:
                return cls.from_dict(data)
            except ConfigurationError as error:
                raise ConfigurationError(f"{path}: {error}") from error

    def _derive(self) -> None:
        """Normalises the given values, and derives the fields that follow from them."""
        self._set("obs_shape", clean_obs_shape(self.obs_shape, any_shape=type(self) is WorldModelConfig))
        self._set("latent_type", clean_enum("latent_type", self.latent_type, LatentType))
        self._set("dynamics_type", clean_enum("dynamics_type", self.dynamics_type, DynamicsType))
        self._set("action_dim", whole_number("action_dim", self.action_dim))
        self._set("action_classes", clean_sizes("action_classes", self.action_classes))
        if self.action_type == "discrete" and not self.action_classes:
            self._set("action_classes", (self.action_dim,))
        if not isinstance(self.obs_classes, Mapping):
            raise ConfigurationError(f"obs_classes is {self.obs_classes!r}, expected a dict of keys to classes.")
        cleaned = {key: clean_sizes(f"obs_classes['{key}']", value) for key, value in self.obs_classes.items()}
        self._set("obs_classes", dict(sorted(cleaned.items())))

    def _derive_width(self, name: str, expected: int, formula: str) -> None:
        """Sets a field that follows from others. A given value has to agree with them."""
        given = getattr(self, name)
        if given is not None and given != expected:
            raise ConfigurationError(
                f"{name} is {given}, expected {formula} = {expected}. Leave it out to have it derived."
            )
        self._set(name, expected)

    def _check_kinds(self) -> None:
        """Checks types and ranges. The types of derived families follow from their annotations."""
        for item in fields(self):
            kind = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
            value = getattr(self, item.name)
            if kind == "int":
                self._set(item.name, whole_number(item.name, value))
            elif kind == "float":
                self._set(item.name, finite_number(item.name, value))
            elif kind == "bool" and not isinstance(value, bool):
                raise ConfigurationError(f"{item.name} is {value!r}, expected True or False.")
            elif kind == "str" and not isinstance(value, str):
                raise ConfigurationError(f"{item.name} is {value!r}, expected a string.")
        for name, most in self._at_most.items():
            self._require(name, getattr(self, name) <= most, f"at most {most:,}")
        for name in self._positive:
            self._require(name, getattr(self, name) > 0, "a number above 0")
        for name in self._not_negative:
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in self._shares:
            self._require(name, 0 <= getattr(self, name) <= 1, "a share between 0 and 1")

    def _require(self, name: str, fits: bool, expected: str) -> None:
        """Raises a `ConfigurationError` about a field that does not fit."""
        if not fits:
            raise ConfigurationError(f"{name} is {getattr(self, name)}, expected {expected}.")

    def _require_bins(self, name: str) -> None:
        """Checks the number of bins of a two-hot distribution."""
        bins = getattr(self, name)
        self._require(name, bins % 2 == 1 and bins >= 3, "an odd number of at least 3, so that one bin is 0")

    def _require_kinds(self, latent: LatentType, dynamics: DynamicsType) -> None:
        """Checks the kinds of latent state and dynamics, of which a family has only one."""
        if (self.latent_type, self.dynamics_type) != (latent, dynamics):
            raise ConfigurationError(
                f"latent_type is '{self.latent_type.value}' and dynamics_type is '{self.dynamics_type.value}', "
                f"expected '{latent.value}' and '{dynamics.value}', the only ones of {type(self).__name__}."
            )

    @staticmethod
    def _require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
        """Checks that a size is a multiple of another."""
        if value % divisor:
            below = max(value // divisor, 1) * divisor
            raise ConfigurationError(
                f"{name} is {value}, expected a multiple of {divisor_name} ({divisor}), "
                f"such as {below} or {below + divisor}."
            )

    def _check_common(self) -> None:
        if type(self) is not WorldModelConfig and self.model_type != _family_of(type(self)):
            raise ConfigurationError(
                f"model_type is '{self.model_type}', expected '{_family_of(type(self))}' for {type(self).__name__}. "
                "Leave it out; the name for people is model_name."
            )
        check_choice("action_type", self.action_type, _ACTION_TYPES)
        check_choice("dtype", self.dtype, _DTYPES)
        if not self.device:
            raise ConfigurationError("device is empty, expected a name such as 'cpu' or 'cuda'.")
        self._check_actions()
        for key, classes in self.obs_classes.items():
            if key not in self.obs_shapes:
                raise ConfigurationError(
                    f"obs_classes names the key '{key}'{nearest(key, self.obs_shapes)} "
                    f"obs_shape has: {', '.join(self.obs_shapes)}."
                )
            if self.obs_shapes[key] != (sum(classes),):
                raise ConfigurationError(
                    f"obs_classes['{key}'] is {classes} and sums to {sum(classes)}, expected the observation '{key}' "
                    f"to have shape ({sum(classes)},), but it has {self.obs_shapes[key]}. They are concatenated."
                )

    def _check_actions(self) -> None:
        classes, total = self.action_classes, sum(self.action_classes)
        if self.action_type == "continuous" and classes:
            raise ConfigurationError(
                f"action_classes is {classes}, expected none for continuous actions. "
                "Set action_type to 'discrete' or 'multi_discrete' for one-hot actions."
            )
        if self.action_type == "discrete" and classes != (self.action_dim,):
            raise ConfigurationError(
                f"action_classes is {classes}, expected ({self.action_dim},) for discrete actions with action_dim "
                f"{self.action_dim}. Leave it out, or set action_type to 'multi_discrete'."
            )
        if self.action_type == "multi_discrete" and (not classes or total != self.action_dim):
            raise ConfigurationError(
                f"action_classes is {classes} and sums to {total}, expected the number of choices of each action, "
                f"summing to action_dim ({self.action_dim}). "
                "MultiDiscrete([3, 2]) has action_classes=(3, 2), action_dim=5."
            )

    def _set(self, name: str, value: Any) -> None:
        """Store a derived value; only `__post_init__` does, while the configuration is being made."""
        object.__setattr__(self, name, value)


_FAMILIES["base"] = WorldModelConfig


def _family_of(cls: type[WorldModelConfig]) -> str:
    """The default `model_type` of a class."""
    default = next(item.default for item in fields(cls) if item.name == "model_type")
    return str(default) if default is not MISSING else cls.__name__


def sized_fields(
    cls: type[WorldModelConfig], sizes: Mapping[str, Mapping[str, Any]], size: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of a named size, with some of them replaced, for the `from_size` of a family.

    Raises:
        ConfigurationError: If the size or a field is unknown.
    """
    if size not in sizes:
        raise ConfigurationError(f"Unknown size '{size}'{nearest(size, sizes)} The sizes are: {', '.join(sizes)}.")
    check_field_names(cls, overrides)
    return {"model_name": size, **sizes[size], **overrides}


def check_field_names(cls: type[WorldModelConfig], given: Mapping[str, Any]) -> None:
    """Raises a `ConfigurationError` if a name is not a field of the family."""
    known = [item.name for item in fields(cls)]
    for name in given:
        if name not in known:
            raise ConfigurationError(
                f"Unknown field '{name}'{nearest(name, known)} {cls.__name__} has: {', '.join(known)}."
            )


def _to_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    return value
