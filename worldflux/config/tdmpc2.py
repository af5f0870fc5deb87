"""TD-MPC2's configuration and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from worldflux.config.base import DynamicsType, LatentType, WorldModelConfig, sized_fields
from worldflux.errors import ConfigurationError
from worldflux.validation import RESIZE_OR_FLATTEN, clean_sizes, whole_number

_SAMPLES_PER_PROPOSAL, _MOST_PROPOSALS = 16, 24
_LEAST_IMAGE_SIDE = 39
"""Smallest height and width of which the encoder's four convolutions leave one pixel."""


@dataclass(frozen=True)
class TDMPC2Config(WorldModelConfig):
    """TD-MPC2, arXiv:2310.16828. Numbers follow the authors' implementation, sizes its default of 5M parameters.

    `from_size` gives the other sizes. `deter_dim` follows from `latent_dim`. Actions are continuous. Several tasks
    share one model when `num_tasks` is above 1: observations are then padded with zeros to `obs_shape`, actions to
    `action_dim`.
    """

    model_type: str = "tdmpc2"
    """Family of the model."""
    latent_type: LatentType = LatentType.SIMNORM
    """Always SimNorm: groups of numbers that are each a softmax."""
    dynamics_type: DynamicsType = DynamicsType.MLP
    """Always an MLP."""
    latent_dim: int = 512
    """Width of the latent state. A multiple of `simnorm_dim`."""
    deter_dim: int = None  # type: ignore[assignment]
    """Width of the deterministic part of the state, which is all of it: `latent_dim`. Derived."""
    stoch_dim: int = 0
    """Width of the stochastic part of the state. Always 0: there is none."""
    hidden_dim: int = 512
    """Width of the hidden layers of the dynamics."""
    learning_rate: float = 3e-4
    """Step size of Adam."""
    grad_clip: float = 20.0
    """Largest norm of the gradient, of the model's and of the policy's each. Smaller clips more."""

    simnorm_dim: int = 8
    """Numbers in each group of the latent state. Smaller groups are closer to one-hot vectors."""
    num_hidden_layers: int = 2
    """Hidden layers of dynamics, reward, termination, value and policy."""
    mlp_dim: int = 512
    """Width of the hidden layers of reward, termination, value and policy."""
    enc_dim: int = 256
    """Width of the encoder's hidden layers for vectors."""
    num_enc_layers: int = 2
    """Layers of the vector encoder, the one to the latent state included; at least 2 are built."""
    num_channels: int = 32
    """Channels of the image encoder. 64x64 images give `16 * num_channels` numbers, which are the latent state itself
    where that is as wide; otherwise a layer brings them to its width."""
    num_q_networks: int = 5
    """Value networks, of which every estimate uses two at random. More are steadier and cost linearly."""
    dropout: float = 0.01
    """Share of the first hidden layer of each value network that is dropped in training."""
    num_bins: int = 101
    """Bins of the two-hot reward and value distributions; odd."""
    vmin: float = -10.0
    """Lowest bin, in symlog space; `-vmax`, so that a fresh model predicts 0."""
    vmax: float = 10.0
    """Highest bin, in symlog space: symexp(10) is about 22,000."""
    log_std_min: float = -10.0
    """Smallest logarithm of the policy's standard deviation."""
    log_std_max: float = 2.0
    """Largest one. Larger explores more widely."""
    use_decoder: bool = False
    """Also learn to picture the observation. The decoder learns beside the model and does not influence it."""

    num_tasks: int = 1
    """Tasks that share the model. One needs no task embedding."""
    task_dim: int = 96
    """Width of a task's embedding; without effect for a single task."""
    task_action_dims: tuple[int, ...] = ()
    """Action dimensions that each task uses, at most `action_dim`. Empty: all of them."""
    task_episode_lengths: tuple[int, ...] = ()
    """Decisions in a full episode of each task. Empty: `episode_length` for all."""

    episodic: bool = False
    """Predict terminations, and plan with them. The head counts from the first termination that is learned from on;
    targets of the value respect terminations either way."""
    episode_length: int = 500
    """Decisions in a full episode, which the discount follows from (see `discounts`)."""
    discount_denom: float = 5.0
    """Larger looks less far ahead: an episode of n decisions has the discount `1 - discount_denom / n`."""
    discount_min: float = 0.95
    """Smallest discount, whatever the episode length."""
    discount_max: float = 0.995
    """Largest discount, whatever the episode length."""

    horizon: int = 3
    """Latent steps that are learned from each replayed start, and planned ahead. Larger sees further and compounds the
    model's error."""
    rho: float = 0.5
    """Weight of each step ahead against the one before it, in the losses."""
    consistency_coef: float = 20.0
    """Weight of predicting the next latent state."""
    reward_coef: float = 0.1
    """Weight of the reward loss."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    termination_coef: float = 1.0
    """Weight of the termination loss, once a termination was seen."""
    entropy_coef: float = 1e-4
    """Weight of the policy's entropy. Larger explores more."""
    encoder_lr_scale: float = 0.3
    """Learning rate of the encoder, as a share of `learning_rate`."""
    tau: float = 0.01
    """Share of the value networks that their targets take over after every step; also the speed of the value scale."""

    num_samples: int = 512
    """Action sequences that the planner tries in each iteration. Cost grows linearly."""
    num_elites: int = 64
    """Best sequences that the planner's next distribution is fitted to; at most `num_samples`."""
    num_pi_trajs: int = None  # type: ignore[assignment]
    """Sequences among the samples that the policy proposes; fewer than `num_samples`. If it is not given, one in 16
    samples, at most the paper's 24."""
    iterations: int = 6
    """Iterations of the planner, which makes two more from 20 action dimensions on."""
    temperature: float = 0.5
    """Weight of an elite's value in its score. Larger trusts the best ones more."""
    momentum: float = 0.0
    """Share of the planner's old mean in the new one. 0 is the paper's."""
    min_std: float = 0.05
    """Smallest standard deviation of the planner's samples."""
    max_std: float = 2.0
    """Standard deviation that the planner starts with."""

    _positive: ClassVar[tuple[str, ...]] = (
        *(name for name in WorldModelConfig._positive if name != "stoch_dim"),
        "simnorm_dim",
        "num_hidden_layers",
        "mlp_dim",
        "enc_dim",
        "num_enc_layers",
        "num_channels",
        "num_q_networks",
        "vmax",
        "num_tasks",
        "task_dim",
        "episode_length",
        "discount_denom",
        "horizon",
        "tau",
        "num_samples",
        "num_elites",
        "iterations",
        "temperature",
        "min_std",
        "max_std",
    )

    _at_most: ClassVar[dict[str, int]] = {
        "num_hidden_layers": 1_000,
        "num_enc_layers": 1_000,
        "num_q_networks": 1_000,
        "num_tasks": 100_000,
        "horizon": 1_000,
    }

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> TDMPC2Config:
        """Configuration of a named size, with fields of your own.

        Args:
            size: `5m`, `19m`, `48m` or `317m`, `reference-1m` to `reference-317m` (the authors' own dimensions), or
                `tiny`.
            **overrides: Any field, such as `obs_shape`, `action_dim` or `learning_rate`.

        Raises:
            ConfigurationError: If the size or a field is unknown; it is a `ValueError`.
        """
        return cls(**sized_fields(cls, TDMPC2_SIZES, size, overrides))

    @classmethod
    def episode_fields(cls, max_steps: int | None) -> dict[str, Any]:
        """The discount follows the length of episodes; the termination head waits for a first termination."""
        return {"episodic": True} | ({} if max_steps is None else {"episode_length": max_steps})

    @property
    def discounts(self) -> tuple[float, ...]:
        """Discount of each task: `1 - discount_denom / n` for n decisions, within `discount_min` and `discount_max`."""
        lengths = self.task_episode_lengths or (self.episode_length,) * self.num_tasks
        found = (1.0 - self.discount_denom / length for length in lengths)
        return tuple(min(max(discount, self.discount_min), self.discount_max) for discount in found)

    def _derive(self) -> None:
        super()._derive()
        self._derive_width("deter_dim", whole_number("latent_dim", self.latent_dim), "latent_dim")
        if self.num_pi_trajs is None:
            proposed = whole_number("num_samples", self.num_samples) // _SAMPLES_PER_PROPOSAL
            self._set("num_pi_trajs", min(proposed, _MOST_PROPOSALS))
        for name in ("task_action_dims", "task_episode_lengths"):
            self._set(name, clean_sizes(name, getattr(self, name)))

    def _check_common(self) -> None:
        if self.action_type != "continuous":
            raise ConfigurationError(
                f"action_type is '{self.action_type}', expected 'continuous': TD-MPC2 plans over continuous actions. "
                "For discrete ones choose DreamerV3, 'dreamerv3:size12m' for example."
            )
        super()._check_common()
        if self.latent_type is not LatentType.SIMNORM or self.dynamics_type is not DynamicsType.MLP:
            raise ConfigurationError(
                f"latent_type is '{self.latent_type.value}' and dynamics_type is '{self.dynamics_type.value}', "
                "expected 'simnorm' and 'mlp': TD-MPC2 has no others."
            )
        if self.stoch_dim != 0:
            raise ConfigurationError(
                f"stoch_dim is {self.stoch_dim}, expected 0: TD-MPC2's state has no stochastic part. Leave it out."
            )
        if self.latent_dim % self.simnorm_dim:
            below = max(self.latent_dim // self.simnorm_dim, 1) * self.simnorm_dim
            raise ConfigurationError(
                f"latent_dim is {self.latent_dim}, expected a multiple of simnorm_dim ({self.simnorm_dim}), "
                f"such as {below} or {below + self.simnorm_dim}."
            )
        if self.num_bins % 2 == 0 or self.num_bins < 3:
            raise ConfigurationError(
                f"num_bins is {self.num_bins}, expected an odd number of at least 3, so that one bin is 0."
            )
        if self.vmin != -self.vmax:
            raise ConfigurationError(f"vmin is {self.vmin}, expected -vmax ({-self.vmax}), so that the bins mirror.")
        self._check_ranges()
        self._check_tasks()
        for key in self.image_keys:
            if min(self.obs_shapes[key][1:]) < _LEAST_IMAGE_SIDE:
                raise ConfigurationError(
                    f"The image '{key}' has shape {self.obs_shapes[key]}, expected a height and width of at least "
                    f"{_LEAST_IMAGE_SIDE}, which the convolutions shrink to one. {RESIZE_OR_FLATTEN}"
                )

    def _check_ranges(self) -> None:
        for name in ("rho", "tau"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected a share between 0 and 1.")
        for name in ("dropout", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected a share from 0 and below 1.")
        for name in (
            "consistency_coef",
            "reward_coef",
            "value_coef",
            "termination_coef",
            "entropy_coef",
            "encoder_lr_scale",
            "num_pi_trajs",
        ):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected 0 or more.")
        if not 0 < self.discount_min <= self.discount_max <= 1:
            raise ConfigurationError(
                f"discount_min is {self.discount_min} and discount_max is {self.discount_max}, expected two numbers "
                "above 0 and up to 1, in this order."
            )
        if self.num_elites > self.num_samples:
            raise ConfigurationError(
                f"num_elites is {self.num_elites}, expected 1 to num_samples ({self.num_samples})."
            )
        if self.num_pi_trajs >= self.num_samples:
            raise ConfigurationError(
                f"num_pi_trajs is {self.num_pi_trajs}, expected fewer than num_samples ({self.num_samples})."
            )
        for low, high in (("log_std_min", "log_std_max"), ("min_std", "max_std")):
            if getattr(self, low) > getattr(self, high):
                raise ConfigurationError(
                    f"{low} is {getattr(self, low)}, expected at most {high} ({getattr(self, high)})."
                )

    def _check_tasks(self) -> None:
        for name in ("task_action_dims", "task_episode_lengths"):
            given = getattr(self, name)
            if given and len(given) != self.num_tasks:
                raise ConfigurationError(f"{name} is {given}, expected one number for each of {self.num_tasks} tasks.")
        if self.num_tasks == 1 and self.task_action_dims not in ((), (self.action_dim,)):
            raise ConfigurationError(
                f"task_action_dims is {self.task_action_dims}, expected none for a single task. Set action_dim."
            )
        if any(used > self.action_dim for used in self.task_action_dims):
            raise ConfigurationError(
                f"task_action_dims is {self.task_action_dims}, expected at most action_dim ({self.action_dim}) each."
            )


def _size(latent: int, hidden: int, mlp: int, enc: int, channels: int, **more: int) -> Mapping[str, int]:
    return {
        "latent_dim": latent,
        "hidden_dim": hidden,
        "mlp_dim": mlp,
        "enc_dim": enc,
        "num_channels": channels,
        **more,
    }


TDMPC2_SIZES: dict[str, Mapping[str, int]] = {
    "tiny": {
        **_size(128, 128, 128, 128, 8),
        "num_q_networks": 3,
        "num_samples": 192,
        "num_elites": 24,
    },
    "5m": _size(256, 256, 664, 256, 16),
    "19m": _size(512, 512, 1328, 512, 32),
    "48m": _size(512, 1024, 2264, 1024, 32),
    "317m": _size(1024, 2048, 6088, 2048, 64),
    "reference-1m": _size(128, 384, 384, 256, 8, num_q_networks=2),
    "reference-5m": _size(512, 512, 512, 256, 32),
    "reference-19m": _size(768, 1024, 1024, 1024, 48, num_enc_layers=3),
    "reference-48m": _size(768, 1792, 1792, 1792, 48, num_enc_layers=4),
    "reference-317m": _size(1376, 4096, 4096, 4096, 86, num_enc_layers=5, num_q_networks=8),
}
"""Dimensions of each size that `TDMPC2Config.from_size` knows.

`5m` to `317m` keep the latent and hidden width of their documentation; `mlp_dim` is the one that brings the parameter
count nearest to the name, for vectors of 24 numbers and for images alike. `reference-*` are the authors' own
dimensions. `tiny` is for laptops: it learns and plans with smaller networks and fewer samples.
"""
