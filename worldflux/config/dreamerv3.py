"""Configuration and sizes of DreamerV3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from worldflux.config.base import DynamicsType, LatentType, WorldModelConfig, sized_fields
from worldflux.errors import ConfigurationError, nearest
from worldflux.validation import RESIZE_OR_FLATTEN, check_choice, clean_sizes, finite_number, whole_number

_ENCODER_TYPES = ("cnn", "mlp", "multi")
_REPRESENTATIONS = ("reconstruction", "redundancy")
_DREAMERV3_LOSS_SCALES = {
    "reconstruction": 1.0,
    "redundancy": 0.05,
    "reward": 1.0,
    "continue": 1.0,
    "kl": 1.1,
    "actor": 1.0,
    "critic": 1.0,
    "replay_critic": 0.3,
    "imitation": 0.0,
}


@dataclass(frozen=True)
class DreamerV3Config(WorldModelConfig):
    """DreamerV3, arXiv:2301.04104.

    Default hyperparameters are those of the authors' implementation, default sizes those of `size50m`; see `from_size`
    for other sizes. `stoch_dim`, `latent_dim`, `encoder_type` and `decoder_type` are derived from other fields. If they
    are given, they have to agree with them.
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
    """Learning rate of LaProp after the warm-up."""
    grad_clip: float = 0.3
    """Adaptive gradient clipping: largest ratio of the gradient norm to the norm of a tensor. Smaller clips more."""
    warmup_steps: int = 1000
    """Gradient steps over which an agent's learning rate rises from zero."""
    train_ratio: float | None = None
    """Replayed time steps per environment step, unless an agent is given another ratio. None stands for the paper's:
    1024 for vectors, 256 for images."""
    seq_len: int = 64
    """Trained time steps in each window, unless an agent is given another length."""

    stoch_discrete: int = 32
    """Number of categorical variables in the stochastic state."""
    stoch_classes: int = 32
    """Classes of each categorical variable; at most 65535."""
    blocks: int = 8
    """Number of diagonal blocks of the recurrent weights. More blocks have fewer parameters and less exchange."""
    unimix: float = 0.01
    """Share of the uniform distribution in every categorical latent. With 0, probabilities can vanish."""

    representation: str = "reconstruction"
    """What the latents are learned from: "reconstruction" decodes observations from them, as in the paper; "redundancy"
    (R2-Dreamer) has no decoder, and learns to predict each entry of the encoder's output and no other one. It is faster
    with images, and predicts no observations; `decoder_layers` and `bspace` have no effect."""
    encoder_type: str = None  # type: ignore[assignment]
    """"cnn" (images only), "mlp" (vectors only) or "multi" (both). Derived from `obs_shape`."""
    decoder_type: str = None  # type: ignore[assignment]
    """Like `encoder_type`, for the reconstruction. Derived even if there is no decoder."""
    units: int = 512
    """Width of the hidden layers of the encoder, decoder and heads."""
    encoder_layers: int = 3
    """Number of hidden layers of the vector encoder."""
    decoder_layers: int = 3
    """Number of hidden layers of the vector decoder."""
    reward_layers: int = 1
    """Number of hidden layers of the reward head."""
    continue_layers: int = 1
    """Number of hidden layers of the continue head."""
    actor_layers: int = 3
    """Number of hidden layers of the policy."""
    critic_layers: int = 3
    """Number of hidden layers of the critic."""
    cnn_depth: int = 48
    """Base number of image channels: the four stages have 2, 3, 4 and 4 times as many. `4 * cnn_depth` is a multiple
    of `bspace`."""
    cnn_kernels: tuple[int, ...] = (5, 5, 5, 5)
    """Kernel sizes of the four encoder stages, all odd. The decoder uses them in reverse order."""
    bspace: int = 8
    """Number of blocks of the layer from the recurrent state to the first feature map of the image decoder."""
    use_symlog: bool = True
    """Whether symlog is applied to vector observations and their targets. Use False for inputs of order 1."""
    bins: int = 255
    """Number of bins of the two-hot reward and value distributions; odd."""

    kl_free: float = 1.0
    """Free nats: KL divergence per step that is not penalised. Larger values keep more detail in the latent."""
    kl_balance: float = 10 / 11
    """Share of the KL loss that trains the prior; the rest trains the representation."""
    loss_scales: dict[str, float] = field(default_factory=lambda: dict(_DREAMERV3_LOSS_SCALES))
    """Weight of each loss. A partial dictionary changes only the losses that it names. With the default balance, a
    weight of 1.1 for "kl" is 1.0 for the prior and 0.1 for the representation, as in the paper. Of "reconstruction" and
    "redundancy", only the one that `representation` names is used. "imitation" is not part of the paper: above 0 the
    policy also imitates those recorded actions that turned out better than expected, which keeps it near the data in
    offline training."""

    imagination_horizon: int = 15
    """Number of imagined steps from every replayed state."""
    imag_last: int = 0
    """Number of steps at the end of each window to imagine from; 0 uses all. Fewer steps are cheaper."""
    discount_horizon: float = 333.0
    """Number of steps over which rewards count: the discount is `1 - 1 / discount_horizon`."""
    lambda_: float = 0.95
    """Lambda of the return: 0 uses the critic after one step, 1 uses the whole rollout."""
    entropy_scale: float = 3e-4
    """Weight of the policy's entropy. Larger values explore more."""
    return_norm_rate: float = 0.01
    """Update rate of the running percentiles of the return."""
    return_norm_limit: float = 1.0
    """Smallest scale by which returns are divided, so that small returns are not amplified."""
    slow_critic_rate: float = 0.02
    """Update rate of the slow critic, after every gradient step."""

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
        "seq_len",
    )
    _not_negative: ClassVar[tuple[str, ...]] = ("kl_free", "entropy_scale", "imag_last", "warmup_steps")
    _shares: ClassVar[tuple[str, ...]] = ("unimix", "kl_balance", "lambda_", "return_norm_rate", "slow_critic_rate")
    _at_most: ClassVar[dict[str, int]] = {
        "encoder_layers": 1_000,
        "decoder_layers": 1_000,
        "reward_layers": 1_000,
        "continue_layers": 1_000,
        "actor_layers": 1_000,
        "critic_layers": 1_000,
        "imagination_horizon": 10_000,
        "stoch_classes": 65_535,
    }

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> DreamerV3Config:
        """Creates a configuration of a named size, with some fields replaced.

        Args:
            size: `size12m` to `size200m`, `reference-1m` to `reference-400m` (the authors' own dimensions), or `tiny`.
            **overrides: Any field, such as `obs_shape`, `action_dim` or `learning_rate`.

        Raises:
            ConfigurationError: If the size or a field is unknown. The error is also a `ValueError`.
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
        self._require_kinds(LatentType.CATEGORICAL, DynamicsType.RSSM)
        if len(self.cnn_kernels) != 4 or any(kernel % 2 == 0 for kernel in self.cnn_kernels):
            raise ConfigurationError(
                f"cnn_kernels is {self.cnn_kernels}, expected four odd sizes, one per stage, such as (5, 5, 5, 5)."
            )
        self._require_bins("bins")
        check_choice("representation", self.representation, _REPRESENTATIONS)
        for name in _REPRESENTATIONS:
            scale, default = self.loss_scales[name], _DREAMERV3_LOSS_SCALES[name]
            if name != self.representation and scale != default:
                raise ConfigurationError(
                    f"loss_scales['{name}'] is {scale}, which has no effect with representation "
                    f"'{self.representation}'. Set loss_scales['{self.representation}'], or representation to "
                    f"'{name}'."
                )
        if self.train_ratio is not None:
            self._set("train_ratio", finite_number("train_ratio", self.train_ratio))
            self._require("train_ratio", self.train_ratio >= 0, "0 or more, or None")
        self._require("discount_horizon", self.discount_horizon > 1, "more than 1 step")
        self._require_multiple("deter_dim", self.deter_dim, "blocks", self.blocks)
        if self.image_keys:
            if self.representation == "reconstruction":
                self._require_multiple("deter_dim", self.deter_dim, "bspace", self.bspace)
                self._require_multiple("4 * cnn_depth", 4 * self.cnn_depth, "bspace", self.bspace)
            self._check_images()

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
    "tiny": {
        **_size(256, 16, 8, 64, 64, 8),
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "train_ratio": 64.0,
        "seq_len": 16,
    },
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

`size*` have the documented recurrent state, latents and hidden width; `units`, `cnn_depth` and `blocks` are chosen so
that the number of parameters is nearest to the name. `reference-*` are the authors' own dimensions, in which the hidden
width and `units` are an eighth of the recurrent state, and the classes and `cnn_depth` a 128th. `tiny` is for laptops:
it trains less often and on shorter windows, with a larger learning rate and a shorter warm-up, because its runs have a
few thousand gradient steps.
"""


def _merge_loss_scales(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"loss_scales is {given!r}, expected a dict of loss names to weights.")
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
