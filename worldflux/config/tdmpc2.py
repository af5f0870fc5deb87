"""TD-MPC2's configuration and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from worldflux.config.base import DynamicsType, LatentType, WorldModelConfig, sized_fields
from worldflux.errors import ConfigurationError, nearest
from worldflux.validation import RESIZE_OR_FLATTEN, clean_sizes, whole_number

_SAMPLES_PER_PROPOSAL, _MOST_PROPOSALS = 16, 24
_LEAST_IMAGE_SIDE = 39
"""Smallest height and width of which the encoder's four convolutions leave one pixel."""


@dataclass(frozen=True)
class TDMPC2Config(WorldModelConfig):
    """TD-MPC2, arXiv:2310.16828, for continuous actions, and with categorical distributions for discrete ones.

    Default hyperparameters are those of the authors' implementation, default sizes those of its model of 5M parameters;
    see `from_size` for other sizes. `deter_dim` is derived from `latent_dim`. If `num_tasks` is above 1, the tasks
    share one model: observations are padded with zeros to `obs_shape`, actions to `action_dim`.
    """

    model_type: str = "tdmpc2"
    """Family of the model."""
    latent_type: LatentType = LatentType.SIMNORM
    """Always SimNorm: groups of numbers, each normalised by a softmax."""
    dynamics_type: DynamicsType = DynamicsType.MLP
    """Always an MLP."""
    latent_dim: int = 512
    """Width of the latent state. A multiple of `simnorm_dim`."""
    deter_dim: int = None  # type: ignore[assignment]
    """Width of the deterministic part of the state, which is the whole state: `latent_dim`. Derived."""
    stoch_dim: int = 0
    """Width of the stochastic part of the state. Always 0."""
    hidden_dim: int = 512
    """Width of the hidden layers of the dynamics."""
    learning_rate: float = 3e-4
    """Learning rate of Adam."""
    grad_clip: float = 20.0
    """Largest gradient norm, for the model and for the policy separately. Smaller values clip more."""

    simnorm_dim: int = 8
    """Size of each group of the latent state. Smaller groups are closer to one-hot vectors."""
    num_hidden_layers: int = 2
    """Number of hidden layers of the dynamics, reward, termination, value and policy networks."""
    mlp_dim: int = 512
    """Width of the hidden layers of the reward, termination, value and policy networks."""
    enc_dim: int = 256
    """Width of the hidden layers of the vector encoder."""
    num_enc_layers: int = 2
    """Number of layers of the vector encoder, including the last one to the latent state. At least 2 are built."""
    num_channels: int = 32
    """Number of channels of the image encoder. 64x64 images give `16 * num_channels` features. If the latent state has
    the same width, these are the latent state; otherwise a linear layer follows."""
    num_q_networks: int = 5
    """Number of value networks, of which every estimate uses two at random. More are steadier and cost more."""
    dropout: float = 0.01
    """Dropout rate in the first hidden layer of each value network."""
    num_bins: int = 101
    """Number of bins of the two-hot reward and value distributions; odd."""
    vmin: float = -10.0
    """Lowest bin in symlog space; `-vmax`, so that a new model predicts 0."""
    vmax: float = 10.0
    """Highest bin in symlog space; symexp(10) is about 22,000."""
    log_std_min: float = -10.0
    """Smallest logarithm of the policy's standard deviation."""
    log_std_max: float = 2.0
    """Largest logarithm of the policy's standard deviation. Larger values explore more widely."""
    use_decoder: bool = False
    """Whether to train a decoder of observations. It does not influence the rest of the model."""

    num_tasks: int = 1
    """Number of tasks that share the model. A single task needs no task embedding."""
    task_names: tuple[str, ...] = ()
    """Name of each task, by which agents and data refer to it. Empty: tasks only have their numbers."""
    task_dim: int = 96
    """Width of the task embedding. Without effect for a single task."""
    task_action_dims: tuple[int, ...] = ()
    """Number of action dimensions that each task uses, at most `action_dim`. Empty: all of them."""
    task_episode_lengths: tuple[int, ...] = ()
    """Number of steps in a full episode of each task. Empty: `episode_length` for all tasks."""

    episodic: bool = False
    """Whether to predict terminations and plan with them, once the training data contain one. Value targets respect
    terminations in any case."""
    episode_length: int = 500
    """Number of steps in a full episode, from which the discount is derived (see `discounts`)."""
    discount_denom: float = 5.0
    """The discount is `1 - discount_denom / n` for episodes of n steps. Larger values look less far ahead."""
    discount_min: float = 0.95
    """Smallest discount for any episode length."""
    discount_max: float = 0.995
    """Largest discount for any episode length."""

    horizon: int = 3
    """Number of latent steps for training and planning. A longer horizon looks further ahead, with larger model
    errors."""
    rho: float = 0.5
    """Weight of each step ahead in the losses, relative to the step before."""
    consistency_coef: float = 20.0
    """Weight of the consistency loss: predicting the next latent state."""
    reward_coef: float = 0.1
    """Weight of the reward loss."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    termination_coef: float = 1.0
    """Weight of the termination loss, once a termination has been seen."""
    entropy_coef: float = 1e-4
    """Weight of the policy's entropy. Larger values explore more."""
    encoder_lr_scale: float = 0.3
    """Learning rate of the encoder, as a share of `learning_rate`."""
    tau: float = 0.01
    """Update rate of the target value networks, after every gradient step, and of the value scale."""

    num_samples: int = 512
    """Number of action sequences that the planner evaluates in each iteration. The cost grows linearly."""
    num_elites: int = 64
    """Number of best sequences to which the planner fits its next distribution; at most `num_samples`."""
    num_pi_trajs: int = None  # type: ignore[assignment]
    """Number of samples that the policy proposes; fewer than `num_samples`. Default: one in 16 samples, at most the
    paper's 24."""
    iterations: int = 6
    """Number of iterations of the planner. From 20 action dimensions on, it makes two more."""
    temperature: float = 0.5
    """Weight of an elite's value in its score. Larger values favour the best sequences more."""
    momentum: float = 0.0
    """Share of the planner's old mean in the new one. The paper uses 0."""
    min_std: float = 0.05
    """Smallest standard deviation of the planner's samples."""
    max_std: float = 2.0
    """Initial standard deviation of the planner's samples."""
    uniform_share: float = 0.05
    """Share of random actions among those that the planner draws and carries out, for discrete actions. Larger values
    explore more."""

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
    _not_negative: ClassVar[tuple[str, ...]] = (
        "consistency_coef",
        "reward_coef",
        "value_coef",
        "termination_coef",
        "entropy_coef",
        "encoder_lr_scale",
        "num_pi_trajs",
    )
    _shares: ClassVar[tuple[str, ...]] = ("rho", "tau", "uniform_share")
    _at_most: ClassVar[dict[str, int]] = {
        "num_hidden_layers": 1_000,
        "num_enc_layers": 1_000,
        "num_q_networks": 1_000,
        "num_tasks": 100_000,
        "horizon": 1_000,
    }

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> TDMPC2Config:
        """Creates a configuration of a named size, with some fields replaced.

        Args:
            size: `5m`, `19m`, `48m` or `317m`, `reference-1m` to `reference-317m` (the authors' own dimensions), or
                `tiny`.
            **overrides: Any field, such as `obs_shape`, `action_dim` or `learning_rate`.

        Raises:
            ConfigurationError: If the size or a field is unknown. The error is also a `ValueError`.
        """
        return cls(**sized_fields(cls, TDMPC2_SIZES, size, overrides))

    @classmethod
    def episode_fields(cls, max_steps: int | None) -> dict[str, Any]:
        """Terminations are predicted, and the discount is derived from the length of episodes."""
        return {"episodic": True} | ({} if max_steps is None else {"episode_length": max_steps})

    @property
    def used_action_dims(self) -> tuple[int, ...]:
        """Number of action dimensions that each task uses."""
        return self.task_action_dims or (self.action_dim,) * self.num_tasks

    @property
    def discounts(self) -> tuple[float, ...]:
        """Discount of each task: `1 - discount_denom / n` for n steps, clipped to `discount_min` and `discount_max`."""
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
        names = self.task_names
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
            raise ConfigurationError(
                f"task_names is {names!r}, expected a name for each task, such as ('walk', 'run')."
            )
        self._set("task_names", tuple(names))

    def _check_common(self) -> None:
        super()._check_common()
        self._require_kinds(LatentType.SIMNORM, DynamicsType.MLP)
        self._require("stoch_dim", self.stoch_dim == 0, "0: TD-MPC2's state has no stochastic part. Leave it out")
        self._require_multiple("latent_dim", self.latent_dim, "simnorm_dim", self.simnorm_dim)
        self._require_bins("num_bins")
        self._require("vmin", self.vmin == -self.vmax, f"-vmax ({-self.vmax}), so that the bins are symmetric")
        self._check_ranges()
        self._check_tasks()
        for key in self.image_keys:
            if min(self.obs_shapes[key][1:]) < _LEAST_IMAGE_SIDE:
                raise ConfigurationError(
                    f"The image '{key}' has shape {self.obs_shapes[key]}, expected a height and width of at least "
                    f"{_LEAST_IMAGE_SIDE}, which the convolutions shrink to one. {RESIZE_OR_FLATTEN}"
                )

    def _check_ranges(self) -> None:
        for name in ("dropout", "momentum"):
            self._require(name, 0 <= getattr(self, name) < 1, "a share from 0 and below 1")
        if not 0 < self.discount_min <= self.discount_max <= 1:
            raise ConfigurationError(
                f"discount_min is {self.discount_min} and discount_max is {self.discount_max}, expected two numbers "
                "above 0 and up to 1, in this order."
            )
        samples = self.num_samples
        self._require("num_elites", self.num_elites <= samples, f"1 to num_samples ({samples})")
        self._require("num_pi_trajs", self.num_pi_trajs < samples, f"fewer than num_samples ({samples})")
        for low, high in (("log_std_min", "log_std_max"), ("min_std", "max_std")):
            most = getattr(self, high)
            self._require(low, getattr(self, low) <= most, f"at most {high} ({most})")

    def task_number(self, task: str | int) -> int:
        """Number of a task, given by its name or number.

        Raises:
            ConfigurationError: If there is no such task; it lists those that there are.
        """
        if isinstance(task, str):
            if task in self.task_names:
                return self.task_names.index(task)
            names = f"the names {', '.join(self.task_names)}" if self.task_names else "no names of tasks"
            raise ConfigurationError(f"Unknown task '{task}'{nearest(task, self.task_names)} The model has {names}.")
        number = whole_number("task", task)
        if not 0 <= number < self.num_tasks:
            raise ConfigurationError(f"task is {number}, expected 0 to {self.num_tasks - 1}.")
        return number

    def _check_tasks(self) -> None:
        for name in ("task_action_dims", "task_episode_lengths", "task_names"):
            given = getattr(self, name)
            what = "name" if name == "task_names" else "number"
            if given and len(given) != self.num_tasks:
                raise ConfigurationError(f"{name} is {given}, expected one {what} for each of {self.num_tasks} tasks.")
        if len(set(self.task_names)) < len(self.task_names):
            raise ConfigurationError(f"task_names is {self.task_names}, expected names that differ.")
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

`5m` to `317m` have the documented latent and hidden width; `mlp_dim` is chosen so that the number of parameters is
nearest to the name, both for vectors of 24 numbers and for images. `reference-*` are the authors' own dimensions.
`tiny` is for laptops: it has smaller networks and plans with fewer samples.
"""
