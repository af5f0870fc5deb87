"""DreamerV3's configuration and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from worldflux.config.base import DynamicsType, LatentType, WorldModelConfig, sized_fields
from worldflux.errors import ConfigurationError, nearest
from worldflux.validation import RESIZE_OR_FLATTEN, check_choice, clean_sizes, finite_number, whole_number

_ENCODER_TYPES = ("cnn", "mlp", "multi")
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

    _at_most: ClassVar[dict[str, int]] = {
        "encoder_layers": 1_000,
        "decoder_layers": 1_000,
        "reward_layers": 1_000,
        "continue_layers": 1_000,
        "actor_layers": 1_000,
        "critic_layers": 1_000,
        "imagination_horizon": 10_000,
    }

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> DreamerV3Config:
        """Configuration of a named size, with fields of your own.

        Args:
            size: `size12m` to `size200m`, `reference-1m` to `reference-400m` (the authors' own dimensions), or `tiny`.
            **overrides: Any field, such as `obs_shape`, `action_dim` or `learning_rate`.

        Raises:
            ConfigurationError: If the size or a field is unknown; it is a `ValueError`.
        """
        return cls(**sized_fields(cls, DREAMERV3_SIZES, size, overrides))

    def _derive(self) -> None:
        super()._derive()
        for name in ("deter_dim", "stoch_discrete", "stoch_classes"):
            self._set(name, whole_number(name, getattr(self, name)))
        self._derive_width("stoch_dim", self.stoch_discrete * self.stoch_classes, "stoch_discrete * stoch_classes")
        self._derive_width("latent_dim", self.deter_dim + self.stoch_dim, "deter_dim + stoch_dim")
        expected = "multi" if self.image_keys and self.vector_keys else "cnn" if self.image_keys else "mlp"
        for name in ("encoder_type", "decoder_type"):
            given = getattr(self, name)
            if given is not None:
                check_choice(name, given, _ENCODER_TYPES)
                if given != expected:
                    raise ConfigurationError(
                        f"{name} is '{given}', expected '{expected}' for obs_shape {self.obs_shape}. "
                        "Leave it out to have it follow the observation."
                    )
            self._set(name, expected)
        self._set("cnn_kernels", clean_sizes("cnn_kernels", self.cnn_kernels))
        self._set("loss_scales", _merge_loss_scales(self.loss_scales))

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
                "expected one height and width, because their channels are stacked. "
                "Resize them to the same size: worldflux.envs.ResizeImages(env, 64)."
            )
        for key, (height, width) in sides.items():
            if any(side % 16 or not 48 <= side <= 256 for side in (height, width)):
                raise ConfigurationError(
                    f"The image '{key}' is {height}x{width} (obs_shape {self.obs_shapes[key]}), expected sides that "
                    "are multiples of 16 from 48 to 256, because the encoder halves them four times. "
                    + RESIZE_OR_FLATTEN
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


def _merge_loss_scales(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"loss_scales is {given!r}, expected a dict of loss name to weight.")
    merged = dict(_DREAMERV3_LOSS_SCALES)
    for name, scale in given.items():
        if name not in merged:
            raise ConfigurationError(
                f"loss_scales names the loss '{name}'{nearest(name, merged)} The losses are: {', '.join(merged)}."
            )
        merged[name] = finite_number(f"loss_scales['{name}']", scale)
        if merged[name] < 0:
            raise ConfigurationError(f"loss_scales['{name}'] is {scale}, expected 0 or more.")
    return merged
