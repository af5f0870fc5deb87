"""What a world model is made of: its sizes, its inputs and its hyperparameters, checked when they are put together."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from worldflux.errors import ConfigurationError, nearest
from worldflux.files import write_atomically

ObsShape = tuple[int, ...] | dict[str, tuple[int, ...]]
"""Shape of one observation without batch or time, or one such shape per key."""

ConfigT = TypeVar("ConfigT", bound="WorldModelConfig")
EnumT = TypeVar("EnumT", bound=Enum)

_ACTION_TYPES = ("continuous", "discrete", "multi_discrete")
_DTYPES = ("float32", "bfloat16")
_ENCODER_TYPES = ("cnn", "mlp", "multi")
_FAMILIES: dict[str, type[WorldModelConfig]] = {}


class LatentType(str, Enum):
    """What kind of number a latent state is made of."""

    DETERMINISTIC = "deterministic"
    GAUSSIAN = "gaussian"
    CATEGORICAL = "categorical"
    VQ = "vq"
    SIMNORM = "simnorm"


class DynamicsType(str, Enum):
    """What predicts the next latent state."""

    RSSM = "rssm"
    MLP = "mlp"
    TRANSFORMER = "transformer"
    SSM = "ssm"


@dataclass(frozen=True)
class WorldModelConfig:
    """What every family of world models has in common.

    A configuration is complete and checked once it exists, and does not change afterwards. A family derives from this
    class, gives `model_type` a value of its own and is then found by `from_dict` and `load`:

        >>> WorldModelConfig.from_dict({"model_type": "dreamerv3", "obs_shape": [4]}).obs_shape
        (4,)
    """

    model_type: str = "base"
    """Family of the model. Decides which class a saved configuration is read into."""
    model_name: str = "unnamed"
    """Name for people: which preset or run this is. Nothing depends on it."""
    obs_shape: ObsShape = (3, 64, 64)
    """Shape of one observation, or a dict of shapes by key. Three dimensions mean a channel-first image `[C, H, W]`."""
    action_dim: int = 6
    """Width of the library's action vector: the sum of the classes where actions are one-hot."""
    action_type: str = "continuous"
    """"continuous" (in [-1, 1]), "discrete" (one one-hot) or "multi_discrete" (one-hots in a row)."""
    action_classes: tuple[int, ...] = ()
    """Number of choices of each one-hot in the action vector. Needed for "multi_discrete", derived for the others."""
    obs_classes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Observation keys that hold one-hots in a row, with the classes of each. A single tensor has the key "obs"."""
    latent_type: LatentType = LatentType.DETERMINISTIC
    """What the latent state consists of."""
    latent_dim: int = 256
    """Width of the latent state as the heads see it."""
    deter_dim: int = 256
    """Width of the deterministic part of the state. Larger remembers more and costs quadratically."""
    stoch_dim: int = 32
    """Width of the stochastic part of the state."""
    dynamics_type: DynamicsType = DynamicsType.MLP
    """What predicts the next latent state."""
    hidden_dim: int = 512
    """Width of the hidden layers of the dynamics."""
    learning_rate: float = 3e-4
    """Step size of the optimiser. Larger learns faster until it diverges."""
    grad_clip: float = 100.0
    """Bound on the size of a gradient; how it is measured is the family's choice. Smaller clips more."""
    device: str = "cpu"
    """Where the model is built: "cpu", "cuda", "cuda:1", ..."""
    dtype: str = "float32"
    """Precision of the computation: "float32", or "bfloat16" (parameters and losses stay float32)."""

    _positive: ClassVar[tuple[str, ...]] = (
        "action_dim",
        "latent_dim",
        "deter_dim",
        "stoch_dim",
        "hidden_dim",
        "learning_rate",
        "grad_clip",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the family under its `model_type`, so that a saved file finds its class."""
        super().__init_subclass__(**kwargs)
        model_type = cls.__dict__.get("model_type")
        if not isinstance(model_type, str):
            return
        known = _FAMILIES.get(model_type)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigurationError(
                f"model_type '{model_type}' of {cls.__qualname__} already belongs to {known.__qualname__}. "
                "Give the new family another one."
            )
        _FAMILIES[model_type] = cls

    def __post_init__(self) -> None:
        self._derive()
        self._check_kinds()
        self._check_common()

    @property
    def obs_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each observation by key, in sorted order; a single tensor has the key "obs"."""
        return dict(self.obs_shape) if isinstance(self.obs_shape, dict) else {"obs": self.obs_shape}

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Keys of the observations that are images `[C, H, W]`, in sorted order."""
        return tuple(key for key, shape in self.obs_shapes.items() if len(shape) == 3)

    @property
    def vector_keys(self) -> tuple[str, ...]:
        """Keys of the observations that are flattened to vectors, in sorted order."""
        return tuple(key for key, shape in self.obs_shapes.items() if len(shape) != 3)

    @classmethod
    def from_dict(cls: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
        """Configuration from what `to_dict` returned; fields that are absent take their defaults.

        Args:
            data: Field names and values. `model_type` decides the class, which must be this class or derive from it.

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
        known = {item.name for item in fields(target)}
        if model_type not in _FAMILIES and not set(data) <= known:
            raise ConfigurationError(
                f"Unknown model_type '{model_type}'{nearest(str(model_type), _FAMILIES)} "
                f"Known are: {', '.join(_FAMILIES)}. "
                "A family of your own must be imported before its configurations are read."
            )
        _check_field_names(target, data)
        return target(**data)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON has it: enums as their values, tuples as lists."""
        return {item.name: _to_json(getattr(self, item.name)) for item in fields(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration to `path` as JSON. A kill at any moment leaves the old file or the new one."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @classmethod
    def load(cls: type[ConfigT], path: str | os.PathLike[str]) -> ConfigT:
        """Configuration from a JSON file (or the `config.json` of a directory), in the class of its `model_type`.

        Raises:
            FileNotFoundError: If there is no such file.
            json.JSONDecodeError: If the file is not JSON.
            ConfigurationError: If it is JSON, but not a configuration that this class can hold.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"{path} is not a text file. A configuration is JSON written by save()."
            ) from error
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from error

    def _derive(self) -> None:
        """Bring what was given to its stored form, and fill in what follows from it."""
        self._set("obs_shape", _clean_obs_shape(self.obs_shape))
        self._set("latent_type", _clean_enum("latent_type", self.latent_type, LatentType))
        self._set("dynamics_type", _clean_enum("dynamics_type", self.dynamics_type, DynamicsType))
        self._set("action_dim", _integer("action_dim", self.action_dim))
        self._set("action_classes", _clean_sizes("action_classes", self.action_classes))
        if self.action_type == "discrete" and not self.action_classes:
            self._set("action_classes", (self.action_dim,))
        if not isinstance(self.obs_classes, Mapping):
            raise ConfigurationError(f"obs_classes is {self.obs_classes!r}, expected a dict of key to classes.")
        cleaned = {key: _clean_sizes(f"obs_classes['{key}']", value) for key, value in self.obs_classes.items()}
        self._set("obs_classes", dict(sorted(cleaned.items())))

    def _check_kinds(self) -> None:
        """Numbers are numbers, names are names. Fields of derived families are covered by their annotations."""
        for item in fields(self):
            kind = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
            value = getattr(self, item.name)
            if kind == "int":
                self._set(item.name, _integer(item.name, value))
            elif kind == "float":
                self._set(item.name, _number(item.name, value))
            elif kind == "bool" and not isinstance(value, bool):
                raise ConfigurationError(f"{item.name} is {value!r}, expected True or False.")
            elif kind == "str" and not isinstance(value, str):
                raise ConfigurationError(f"{item.name} is {value!r}, expected a string.")
        for name in self._positive:
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected a number above 0.")

    def _check_common(self) -> None:
        if type(self) is not WorldModelConfig and self.model_type != _family_of(type(self)):
            raise ConfigurationError(
                f"model_type is '{self.model_type}', expected '{_family_of(type(self))}' for {type(self).__name__}. "
                "Leave it out; model_name is the free text."
            )
        _choice("action_type", self.action_type, _ACTION_TYPES)
        _choice("dtype", self.dtype, _DTYPES)
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
                    f"to have shape ({sum(classes)},), but it has {self.obs_shapes[key]}. One-hots lie in a row."
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

_DREAMERV3_LOSS_SCALES = {
    "reconstruction": 1.0,
    "reward": 1.0,
    "continue": 1.0,
    "kl": 1.1,
    "actor": 1.0,
    "critic": 1.0,
    "replay_critic": 0.3,
}


@dataclass(frozen=True)
class DreamerV3Config(WorldModelConfig):
    """DreamerV3, arXiv:2301.04104. Hyperparameters follow the authors' implementation, sizes the preset `size50m`.

    `from_size` gives the other sizes. `stoch_dim`, `latent_dim`, `encoder_type` and `decoder_type` follow from the
    other fields; given all the same, they must agree with them.
    """

    model_type: str = "dreamerv3"
    """Family of the model."""
    latent_type: LatentType = LatentType.CATEGORICAL
    """Always categorical."""
    dynamics_type: DynamicsType = DynamicsType.RSSM
    """Always the recurrent state-space model."""
    latent_dim: int = None  # type: ignore[assignment]
    """Width of the heads' input, `deter_dim + stoch_dim`. Derived."""
    deter_dim: int = 4096
    """Width of the recurrent state. A multiple of `blocks`; with images also of `bspace`."""
    stoch_dim: int = None  # type: ignore[assignment]
    """Width of the stochastic state, `stoch_discrete * stoch_classes`. Derived."""
    hidden_dim: int = 640
    """Width of the hidden layers of the recurrent model."""
    learning_rate: float = 4e-5
    """Step size of LaProp after its warm-up."""
    grad_clip: float = 0.3
    """Adaptive clipping: largest ratio of a tensor's gradient norm to its own norm. Smaller clips more."""
    warmup_steps: int = 1000
    """Gradient steps over which an agent's learning rate rises from zero."""

    stoch_discrete: int = 32
    """Number of categorical variables in the stochastic state."""
    stoch_classes: int = 32
    """Classes of each categorical variable; at most 65535."""
    blocks: int = 8
    """Diagonal blocks of the recurrent weights. More blocks mean fewer parameters and less exchange between them."""
    unimix: float = 0.01
    """Share of the uniform distribution mixed into every categorical latent. 0 lets probabilities vanish."""

    encoder_type: str = None  # type: ignore[assignment]
    """"cnn" (images only), "mlp" (vectors only) or "multi" (both). Derived from `obs_shape`."""
    decoder_type: str = None  # type: ignore[assignment]
    """As `encoder_type`, for the reconstruction."""
    units: int = 512
    """Width of the hidden layers of encoder, decoder and heads, outside the recurrent model."""
    encoder_layers: int = 3
    """Hidden layers for vector observations."""
    decoder_layers: int = 3
    """Hidden layers of the vector decoder."""
    reward_layers: int = 1
    """Hidden layers of the reward head."""
    continue_layers: int = 1
    """Hidden layers of the continue head."""
    actor_layers: int = 3
    """Hidden layers of the policy."""
    critic_layers: int = 3
    """Hidden layers of the critic."""
    cnn_depth: int = 48
    """Base of the image channels: the four stages have 2, 3, 4 and 4 times as many. `4 * cnn_depth` is a multiple of
    `bspace`."""
    cnn_kernels: tuple[int, ...] = (5, 5, 5, 5)
    """Kernel sizes of the four encoder stages, odd; the decoder uses them in reverse."""
    bspace: int = 8
    """Blocks of the layer from the recurrent state to the image decoder's first map."""
    use_symlog: bool = True
    """Squash vector observations, and the targets of their reconstruction, by symlog. Off suits inputs of order 1."""
    bins: int = 255
    """Bins of the two-hot reward and value distributions; odd."""

    kl_free: float = 1.0
    """Nats of KL divergence per step that cost nothing. Larger keeps more detail in the latent."""
    kl_balance: float = 10 / 11
    """Share of the KL weight that trains the prior; the rest trains the representation."""
    loss_scales: dict[str, float] = field(default_factory=lambda: dict(_DREAMERV3_LOSS_SCALES))
    """Weight of each loss. A partial dict changes only what it names. "kl" 1.1 at the default balance is 1.0 for the
    prior and 0.1 for the representation, as in the paper."""

    imagination_horizon: int = 15
    """Imagined steps from every replayed state."""
    imag_last: int = 0
    """Steps at the end of each window to imagine from; 0 takes all. Fewer make a step cheaper, not the model worse."""
    discount_horizon: float = 333.0
    """Steps over which rewards count: the discount is `1 - 1 / discount_horizon`."""
    lambda_: float = 0.95
    """Mixture of the return: 0 trusts the critic after one step, 1 trusts the whole rollout."""
    entropy_scale: float = 3e-4
    """Weight of the policy's entropy. Larger explores more."""
    return_norm_rate: float = 0.01
    """Speed of the running percentiles of the return."""
    return_norm_limit: float = 1.0
    """Smallest scale that returns are divided by, so that small ones are not blown up."""
    slow_critic_rate: float = 0.02
    """Share of the critic that the slow critic takes over after every step."""

    _positive: ClassVar[tuple[str, ...]] = (
        *WorldModelConfig._positive,
        "stoch_discrete",
        "stoch_classes",
        "blocks",
        "units",
        "encoder_layers",
        "decoder_layers",
        "reward_layers",
        "continue_layers",
        "actor_layers",
        "critic_layers",
        "cnn_depth",
        "bspace",
        "bins",
        "imagination_horizon",
        "return_norm_rate",
        "return_norm_limit",
        "slow_critic_rate",
    )

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> DreamerV3Config:
        """Configuration of a named size, with fields of your own.

        Args:
            size: `size12m` to `size200m`, `reference-1m` to `reference-400m` (the authors' own dimensions), or `tiny`.
            **overrides: Any field, such as `obs_shape`, `action_dim` or `learning_rate`.

        Raises:
            ConfigurationError: If the size or a field is unknown; it is a `ValueError`.
        """
        if size not in DREAMERV3_SIZES:
            raise ConfigurationError(
                f"Unknown size '{size}'{nearest(size, DREAMERV3_SIZES)} The sizes are: {', '.join(DREAMERV3_SIZES)}."
            )
        _check_field_names(cls, overrides)
        return cls(**{"model_name": size, **DREAMERV3_SIZES[size], **overrides})

    def _derive(self) -> None:
        super()._derive()
        for name in ("deter_dim", "stoch_discrete", "stoch_classes"):
            self._set(name, _integer(name, getattr(self, name)))
        self._derive_width("stoch_dim", self.stoch_discrete * self.stoch_classes, "stoch_discrete * stoch_classes")
        self._derive_width("latent_dim", self.deter_dim + self.stoch_dim, "deter_dim + stoch_dim")
        expected = "multi" if self.image_keys and self.vector_keys else "cnn" if self.image_keys else "mlp"
        for name in ("encoder_type", "decoder_type"):
            given = getattr(self, name)
            if given is not None:
                _choice(name, given, _ENCODER_TYPES)
                if given != expected:
                    raise ConfigurationError(
                        f"{name} is '{given}', expected '{expected}' for obs_shape {self.obs_shape}. "
                        "Leave it out to have it follow the observation."
                    )
            self._set(name, expected)
        self._set("cnn_kernels", _clean_sizes("cnn_kernels", self.cnn_kernels))
        self._set("loss_scales", _merge_loss_scales(self.loss_scales))

    def _derive_width(self, name: str, expected: int, formula: str) -> None:
        given = getattr(self, name)
        if given is not None and given != expected:
            raise ConfigurationError(
                f"{name} is {given}, expected {formula} = {expected}. Leave it out to have it derived."
            )
        self._set(name, expected)

    def _check_common(self) -> None:
        super()._check_common()
        if self.latent_type is not LatentType.CATEGORICAL or self.dynamics_type is not DynamicsType.RSSM:
            raise ConfigurationError(
                f"latent_type is '{self.latent_type.value}' and dynamics_type is '{self.dynamics_type.value}', "
                "expected 'categorical' and 'rssm': DreamerV3 has no others."
            )
        if self.stoch_classes > 65535:
            raise ConfigurationError(f"stoch_classes is {self.stoch_classes}, expected at most 65535.")
        if len(self.cnn_kernels) != 4 or any(kernel % 2 == 0 for kernel in self.cnn_kernels):
            raise ConfigurationError(
                f"cnn_kernels is {self.cnn_kernels}, expected four odd sizes, one per stage, such as (5, 5, 5, 5)."
            )
        if self.bins % 2 == 0 or self.bins < 3:
            raise ConfigurationError(
                f"bins is {self.bins}, expected an odd number of at least 3, so that one bin is 0."
            )
        if self.discount_horizon <= 1:
            raise ConfigurationError(f"discount_horizon is {self.discount_horizon}, expected more than 1 step.")
        for name in ("unimix", "kl_balance", "lambda_", "return_norm_rate", "slow_critic_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected a share between 0 and 1.")
        for name in ("kl_free", "entropy_scale", "imag_last", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected 0 or more.")
        self._check_divisible("deter_dim", self.deter_dim, "blocks", self.blocks)
        if self.image_keys:
            self._check_divisible("deter_dim", self.deter_dim, "bspace", self.bspace)
            self._check_divisible("4 * cnn_depth", 4 * self.cnn_depth, "bspace", self.bspace)
            self._check_images()

    @staticmethod
    def _check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
        if value % divisor:
            below = max(value // divisor, 1) * divisor
            raise ConfigurationError(
                f"{name} is {value}, expected a multiple of {divisor_name} ({divisor}), "
                f"such as {below} or {below + divisor}."
            )

    def _check_images(self) -> None:
        sides = {key: self.obs_shapes[key][1:] for key in self.image_keys}
        if len(set(sides.values())) > 1:
            raise ConfigurationError(
                f"The images have different sizes ({', '.join(f'{key}: {h}x{w}' for key, (h, w) in sides.items())}), "
                "expected one height and width, because their channels are stacked. Resize them to the same size."
            )
        for key, (height, width) in sides.items():
            if any(side % 16 or not 48 <= side <= 256 for side in (height, width)):
                raise ConfigurationError(
                    f"The image '{key}' is {height}x{width} (obs_shape {self.obs_shapes[key]}), expected sides that "
                    "are multiples of 16 from 48 to 256, because the encoder halves them four times. "
                    "Resize it, to 64x64 for example."
                )


def _size(deter: int, groups: int, classes: int, hidden: int, units: int, depth: int, **more: int) -> Mapping[str, int]:
    return {
        "deter_dim": deter,
        "stoch_discrete": groups,
        "stoch_classes": classes,
        "hidden_dim": hidden,
        "units": units,
        "cnn_depth": depth,
        **more,
    }


DREAMERV3_SIZES: dict[str, Mapping[str, int | float]] = {
    "tiny": {**_size(256, 16, 8, 64, 64, 8), "learning_rate": 4e-4, "warmup_steps": 100},
    "size12m": _size(2048, 16, 16, 256, 360, 20),
    "size25m": _size(4096, 32, 16, 512, 248, 16, blocks=16),
    "size50m": _size(4096, 32, 32, 640, 512, 48),
    "size100m": _size(8192, 32, 32, 768, 792, 32, blocks=16),
    "size200m": _size(8192, 32, 32, 1024, 1688, 72),
    "reference-1m": _size(512, 32, 4, 64, 64, 4),
    "reference-12m": _size(2048, 32, 16, 256, 256, 16),
    "reference-25m": _size(3072, 32, 24, 384, 384, 24),
    "reference-50m": _size(4096, 32, 32, 512, 512, 32),
    "reference-100m": _size(6144, 32, 48, 768, 768, 48),
    "reference-200m": _size(8192, 32, 64, 1024, 1024, 64),
    "reference-400m": _size(12288, 32, 96, 1536, 1536, 96),
}
"""Dimensions of each size that `DreamerV3Config.from_size` knows.

`size*` keep the recurrent state, latents and hidden width of their documentation; their `units`, `cnn_depth` and
`blocks` are the ones that bring the parameter count nearest to the name. `reference-*` are the authors' own dimensions,
in which hidden width and `units` are an eighth of the recurrent state, and classes and `cnn_depth` a 128th. `tiny` is
for laptops, with a larger learning rate and a shorter warm-up, as runs of some thousand gradient steps need.
"""


def _family_of(cls: type[WorldModelConfig]) -> str:
    """Default of the class's `model_type`."""
    default = next(item.default for item in fields(cls) if item.name == "model_type")
    return str(default) if default is not MISSING else cls.__name__


def _check_field_names(cls: type[WorldModelConfig], given: Mapping[str, Any]) -> None:
    known = [item.name for item in fields(cls)]
    for name in given:
        if name not in known:
            raise ConfigurationError(
                f"Unknown field '{name}'{nearest(name, known)} {cls.__name__} has: {', '.join(known)}."
            )


def _clean_obs_shape(shape: Any) -> ObsShape:
    if isinstance(shape, Mapping):
        if not shape or not all(isinstance(key, str) and key for key in shape):
            raise ConfigurationError(f"obs_shape is {shape!r}, expected at least one key, each a name, with its shape.")
        return {key: _clean_shape(f"obs_shape['{key}']", shape[key]) for key in sorted(shape)}
    return _clean_shape("obs_shape", shape)


def _clean_shape(name: str, shape: Any) -> tuple[int, ...]:
    cleaned = _clean_sizes(name, shape)
    if len(cleaned) > 3:
        raise ConfigurationError(
            f"{name} is {cleaned}, expected at most 3 dimensions: a vector (n,) or an image (C, H, W). "
            "Fold further dimensions, such as stacked frames, into the channels."
        )
    if len(cleaned) == 3 and cleaned[2] in (1, 3, 4) and cleaned[0] not in (1, 3, 4):
        height, width, channels = cleaned
        raise ConfigurationError(
            f"{name} is {cleaned}, which looks like an image with its channels last; expected channels first (CHW). "
            f"Transpose the images and use ({channels}, {height}, {width})."
        )
    return cleaned


def _clean_sizes(name: str, sizes: Any) -> tuple[int, ...]:
    try:
        cleaned = tuple(_integer(name, size) for size in sizes) if not isinstance(sizes, str) else None
    except TypeError:
        cleaned = None
    if cleaned is None or any(size < 1 for size in cleaned):
        example = f" Write ({sizes},) for one dimension." if isinstance(sizes, int) else ""
        raise ConfigurationError(f"{name} is {sizes!r}, expected a tuple of integers above 0.{example}")
    return cleaned


def _clean_enum(name: str, value: Any, kind: type[EnumT]) -> EnumT:
    try:
        return kind(value.lower() if isinstance(value, str) and not isinstance(value, Enum) else value)
    except ValueError:
        options = [str(member.value) for member in kind]
        raise ConfigurationError(
            f"{name} is '{value}'{nearest(value, options)} It is one of: {', '.join(options)}."
        ) from None


def _choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ConfigurationError(f"{name} is '{value}'{nearest(value, options)} It is one of: {', '.join(options)}.")


def _integer(name: str, value: Any) -> int:
    """`value` as an `int`; NumPy's integers count, booleans and floats do not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ConfigurationError(f"{name} is {value!r}, expected an integer.") from None


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool | str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigurationError(f"{name} is {value!r}, expected a number.") from None
    if not math.isfinite(number):
        raise ConfigurationError(f"{name} is {number}, expected a finite number.")
    return number


def _merge_loss_scales(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"loss_scales is {given!r}, expected a dict of loss name to weight.")
    merged = dict(_DREAMERV3_LOSS_SCALES)
    for name, scale in given.items():
        if name not in merged:
            raise ConfigurationError(
                f"loss_scales names the loss '{name}'{nearest(name, merged)} The losses are: {', '.join(merged)}."
            )
        merged[name] = _number(f"loss_scales['{name}']", scale)
        if merged[name] < 0:
            raise ConfigurationError(f"loss_scales['{name}'] is {scale}, expected 0 or more.")
    return merged


def _to_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    return value
