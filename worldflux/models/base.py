"""Common interface of all world models: states, losses, optimisation and files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from worldflux.accel.device import resolve_device
from worldflux.config import WorldModelConfig
from worldflux.errors import CheckpointError, ShapeMismatchError, a_type
from worldflux.files import checked_path, reading_together, replacing_together, writing
from worldflux.models.health import HealthMetric
from worldflux.models.weights import check_weights, read_weights
from worldflux.nn.precision import autocast
from worldflux.reading import InvalidJSONError, only_our_errors
from worldflux.replay.batch import Batch, Observation

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class State(Mapping[str, Tensor]):
    """Immutable mapping from names to tensors that share their leading axes.

    A string index such as `state["deter"]` returns one tensor. Any other index, such as `state[3]`, `state[mask]` or
    `state[:, 0]`, is applied to the leading axes of all tensors and returns a state.
    """

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, index: Any) -> Any:
        """Returns the tensor of a name, or the state at an index of the leading axes."""
        if isinstance(index, str):
            return self._tensors[index]
        return self._map(lambda x: x[index])

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Returns the number of tensors (not of rows)."""
        return len(self._tensors)

    def __repr__(self) -> str:
        """Returns the names and shapes."""
        return f"State({', '.join(f'{k}: {list(v.shape)}' for k, v in self._tensors.items())})"

    def to(self, *args: Any, **kwargs: Any) -> State:
        """Returns the state on another device or with another dtype; takes the arguments of `torch.Tensor.to`."""
        return self._map(lambda x: x.to(*args, **kwargs))

    def detach(self) -> State:
        """Returns the state without gradient."""
        return self._map(lambda x: x.detach())

    @staticmethod
    def stack(states: Sequence[State], dim: int = 0) -> State:
        """Stacks states along a new axis."""
        return State({k: torch.stack([s[k] for s in states], dim) for k in states[0]})

    @staticmethod
    def cat(states: Sequence[State], dim: int = 0) -> State:
        """Concatenates states along an existing axis."""
        return State({k: torch.cat([s[k] for s in states], dim) for k in states[0]})

    def _map(self, function: Callable[[Tensor], Tensor]) -> State:
        return State({name: function(tensor) for name, tensor in self._tensors.items()})


@dataclass(frozen=True)
class Trajectory:
    """Open-loop prediction of a model for a sequence of actions."""

    states: State
    """State after each action. `[H, B, ...]`"""
    rewards: Tensor
    """Reward of each action. `[H, B]`"""
    continues: Tensor
    """Probability that the episode continues after each action, in [0, 1]. `[H, B]`"""


@dataclass(frozen=True)
class LossOutput:
    """Result of computing a loss, which changes nothing in the model."""

    loss: Tensor
    """Scalar to differentiate."""
    terms: dict[str, Tensor]
    """Named scalars for the log, without gradient."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Values to store in the replay buffer with the last T' rows of the batch. `[B, T', ...]`"""
    updates: dict[str, Tensor] = field(default_factory=dict)
    """New values of the model's buffers (running normalisers), which `after_step` writes."""
    carry: dict[str, Tensor] = field(default_factory=dict)
    """Intermediate results for later phases of the same step, without gradient."""


@dataclass(frozen=True)
class OptimizerSpec:
    """Optimiser settings of a family, as in its papers."""

    kind: Literal["laprop", "adam"]
    """Optimiser: LaProp (momentum after the RMS scaling) or Adam."""
    learning_rate: float
    """Learning rate after the warm-up, constant from then on."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the momentum and of the squared gradients."""
    eps: float = 1e-8
    """Term added to the root of the squared gradients."""
    agc: float | None = None
    """Adaptive gradient clipping: largest norm of a parameter's gradient as a fraction of the parameter's norm. None
    disables it."""
    grad_clip: float | None = None
    """Largest joint norm of all gradients. None disables clipping."""
    warmup_steps: int = 0
    """Number of steps over which the learning rate rises linearly from zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with their own learning rate."""

    parameters: list[nn.Parameter]
    """The parameters of the group."""
    rate_scale: float = 1.0
    """Factor on the optimiser's learning rate."""
    eps: float | None = None
    """Value that replaces `OptimizerSpec.eps` for this group. None keeps it."""


@dataclass(frozen=True)
class Phase:
    """One loss of a gradient step and the parameters that it trains.

    Each phase has its own optimiser, and its gradients are clipped separately.
    """

    name: str
    parameters: list[nn.Parameter] | list[ParameterGroup]
    loss: Callable[[Batch, Sequence[LossOutput]], LossOutput]
    """Loss function, called with the batch and the outputs of the preceding phases."""

    @property
    def trained(self) -> list[nn.Parameter]:
        """All parameters that the phase trains."""
        return [p for group in parameter_groups(self.parameters) for p in group.parameters]


def parameter_groups(parameters: Iterable[nn.Parameter | ParameterGroup]) -> list[ParameterGroup]:
    """Returns the given groups, and collects individual parameters in one more group with the optimiser's own rate."""
    items = list(parameters)
    groups = [item for item in items if isinstance(item, ParameterGroup)]
    loose = [item for item in items if not isinstance(item, ParameterGroup)]
    return [*groups, ParameterGroup(loose)] if loose else groups


@dataclass(frozen=True)
class OnlineDefaults:
    """Default settings of a family for learning in an environment."""

    train_ratio: float | None
    """Number of replayed time steps per environment step. A higher ratio learns more from each step and takes longer.
    None performs one gradient step per environment step, whatever the batch size."""
    batch_size: int
    """Number of windows per gradient step."""
    seq_len: int
    """Number of trained time steps per window."""
    buffer_size: int
    """Number of transitions kept in the replay buffer."""
    learning_starts: int | None
    """Number of environment steps before the first gradient step. None waits until there are as many windows as a batch
    has time steps."""
    random_start: bool = False
    """Whether actions are uniformly random until `learning_starts`; the gradient steps of that time are then caught up
    on at its end."""
    min_seq_len: int = 1
    """Smallest number of trained time steps per window for which the losses can be computed."""
    fresh_windows: bool = False
    """Whether each new window is trained on once before windows are drawn at random."""
    planner: str | None = None
    """Method of choosing actions: "mppi" or "cem" plans, None acts with the policy."""


class WorldModel(nn.Module):
    """Base class of all world models. All methods are batched.

    Observations are tensors `[B, ...]` or dictionaries of such tensors. Actions are `[B, A]`: continuous actions lie in
    [-1, 1], discrete actions are one-hot. Subclasses set `config_class` and implement the methods that raise
    `NotImplementedError` here.
    """

    config_class: ClassVar[type[WorldModelConfig]] = WorldModelConfig
    capturable: ClassVar[bool] = True
    """Whether a gradient step may be captured as a CUDA graph and replayed. This requires that the losses and
    `after_step` compute only with tensors, change those of the model in place, and never wait for the device. Set it to
    False for a model that, for example, counts steps in Python."""

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> WorldModel:
        """Sets training or evaluation mode recursively like `torch.nn.Module.train`, but without its overhead.

        An agent changes the mode twice for each environment step.
        """
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")  # the same message as in torch
        modules: list[nn.Module] = [self]
        while modules:
            module = modules.pop()
            if module is not self and (type(module).train is not nn.Module.train or "train" in vars(module)):
                module.train(mode)  # an overridden method
                continue
            module.__dict__["training"] = mode
            modules.extend(child for child in module._modules.values() if child is not None)
        return self

    def set_training_mode(self, mode: bool) -> None:
        """Calls `train(mode)`. Callbacks and scripts for stable-baselines3 expect this method of a policy."""
        self.train(mode)

    def compile_functions(self) -> None:
        """Compiles performance-critical functions with `torch.compile`. By default there are none.

        `Trainer` calls this method according to its setting `compile`; calling it again has no effect. Compiled
        functions must be stored outside of the modules, so that files and copies of the model do not change.
        """

    # States

    def initial_state(self, batch_size: int) -> State:
        """Returns the state before any observation."""
        raise NotImplementedError("initial_state(batch_size) -> State")

    def encode(self, obs: Observation, *, deterministic: bool = False) -> State:
        """Returns the state after the first observation of an episode.

        Args:
            obs: First observation. `[B, ...]`
            deterministic: Whether to take the most likely latents instead of sampling them.
        """
        raise NotImplementedError("encode(obs) -> State")

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Observation,
        *,
        is_first: Tensor | None = None,
        deterministic: bool = False,
    ) -> State:
        """Returns the state after an action and the resulting observation (posterior).

        Args:
            state: State before the action.
            action: Action that was taken. `[B, A]`
            obs: Observation after the action. `[B, ...]`
            is_first: True where `obs` starts an episode; the state and action of that row are ignored. `[B]`
            deterministic: Whether to take the most likely latents instead of sampling them.
        """
        raise NotImplementedError("update(state, action, obs) -> State")

    def transition(self, state: State, action: Tensor, *, deterministic: bool = False) -> State:
        """Returns the state that the model predicts after an action `[B, A]`, without an observation (prior)."""
        raise NotImplementedError("transition(state, action) -> State")

    def decode(self, state: State) -> dict[str, Any]:
        """Returns predictions for a state: `"obs"` as an observation, `"reward"` `[B]` and `"continue"` `[B]`.

        A family only returns the keys that it can predict.
        """
        raise NotImplementedError("decode(state) -> dict")

    def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
        """Predicts the results of a sequence of actions `[H, B, A]` open loop."""
        raise NotImplementedError("rollout(state, actions) -> Trajectory")

    def policy(self, state: State, deterministic: bool = False) -> Tensor:
        """Returns actions of the learned policy. `[B, A]`"""
        raise NotImplementedError("policy(state) -> actions")

    def value(self, state: State) -> Tensor:
        """Returns the expected discounted sum of rewards from a state onwards, in reward units. `[B]`"""
        raise NotImplementedError("value(state) -> Tensor")

    # Learning

    def loss(self, batch: Batch) -> LossOutput:
        """Computes the training loss of a batch of replayed windows, without side effects."""
        raise NotImplementedError("loss(batch) -> LossOutput")

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        """Optimiser settings of the family's papers."""
        raise NotImplementedError("optimizer_spec")

    def phases(self) -> list[Phase]:
        """Returns the losses of one gradient step in order; by default, `loss` for all trainable parameters."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [Phase("model", trainable, lambda batch, previous: self.loss(batch))]

    @torch.no_grad()
    def after_step(self, outputs: Sequence[LossOutput]) -> None:
        """Updates running normalisers after a gradient step; subclasses also update target networks."""
        for output in outputs:
            for name, value in output.updates.items():
                self.get_buffer(name).copy_(value)

    def health(self, batch: Batch) -> tuple[HealthMetric, ...]:
        """Measures the model's health metrics on a batch, without gradient; by default there are none.

        It draws random numbers like `loss` does; `training.check_health` separates them from those of training.
        """
        return ()

    # Replay and acting

    def online_defaults(self) -> OnlineDefaults:
        """Returns the default settings of the family for learning in an environment."""
        raise NotImplementedError("online_defaults() -> OnlineDefaults")

    def replay_extras(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Returns names, shapes and dtypes of the values that the model stores with each replayed row."""
        return {}

    def extras_from_state(self, state: State) -> dict[str, Tensor]:
        """Returns the values of `replay_extras` for a state, `[B, ...]` each."""
        return {}

    # Files

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, either both or neither, and replaces an older model.

        Args:
            directory: Directory to write to, created if it does not exist. Other files in it are kept.

        Raises:
            ConfigurationError: If `directory` is not a valid path of a directory.
            CheckpointError: If the files cannot be written. An older model is unchanged in this case.
        """
        path = checked_path("directory", directory, directory=True)
        with writing(path, CheckpointError), replacing_together(path) as beside:
            (beside / WEIGHTS_FILE).write_bytes(self.weights_bytes())
            (beside / CONFIG_FILE).write_text(self.config.to_json(), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: str | torch.device = "cpu", *, allow_nonfinite: bool = False
    ) -> WorldModel:
        """Loads a model that `save_pretrained` wrote, even while another process is replacing it.

        The weights are compared with the configuration before the model is built, so that building it takes no more
        memory than the size of the file.

        Args:
            directory: Directory written by `save_pretrained`.
            device: Device of the loaded model.
            allow_nonfinite: Whether to accept weights that are NaN or infinite, in order to examine them.

        Raises:
            CheckpointError: If a file is missing, or the weights do not fit the configuration or are not finite.
            ConfigurationError: If the device is not available, or the configuration or `directory` is not valid.
        """
        path, place = checked_path("directory", directory), resolve_device(device)
        return reading_together(path, (CONFIG_FILE, WEIGHTS_FILE), lambda: cls._read(path, allow_nonfinite)).to(place)

    @classmethod
    def _read(cls, directory: Path, allow_nonfinite: bool) -> WorldModel:
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{directory} has no {' and no '.join(missing)}. Pass a directory written by save_pretrained."
            )
        try:
            config = cls.config_class.load(directory / CONFIG_FILE)
        except InvalidJSONError as error:
            raise CheckpointError(str(error)) from error
        with only_our_errors(directory):
            weights = read_weights(directory / WEIGHTS_FILE, allow_nonfinite=allow_nonfinite)
            cls._check_described(config, weights, directory / WEIGHTS_FILE)
            with torch.random.fork_rng(devices=[]):  # the initial weights are replaced
                model = cls(config)
            try:
                model.load_state_dict(weights)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{directory / WEIGHTS_FILE} does not fit the model's configuration. {error}"
                ) from error
        return model

    @classmethod
    def _check_described(cls, config: WorldModelConfig, weights: Mapping[str, Tensor], path: Path) -> None:
        """Raises a `CheckpointError` unless the weights fit the model that a configuration describes."""
        if cls.load_state_dict is not nn.Module.load_state_dict:  # an override may accept weights of other names
            return
        try:
            with torch.device("meta"):
                described = cls(config).state_dict()
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error):  # such as a size that overflows
                raise
            return  # a user's model that computes values in its constructor
        check_weights(path, weights, described)

    def weights_bytes(self) -> bytes:
        """Returns all parameters and buffers in the safetensors format."""
        return safetensors.torch.save({k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()})

    # For the families: checks of their inputs, and the precision in which they compute

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = self.config.dtype
        return autocast(self.device, None if kind == "float32" else getattr(torch, kind))

    def _observations(self, obs: Observation, *, leading: int, rows: int | None = None) -> dict[str, Tensor]:
        """Returns the observation as a dictionary, after checking its keys, shapes and dtypes.

        Args:
            obs: Observation to check.
            leading: Number of batch axes.
            rows: Expected size of the first batch axis; None accepts any.
        """
        tensors = obs if isinstance(obs, dict) else {"obs": obs}
        shapes = self.config.obs_shapes
        if set(tensors) != set(shapes):
            raise ShapeMismatchError(
                f"The observation has the keys {sorted(tensors)}, expected {sorted(shapes)}. "
                "Pass the observations that the model was built for."
            )
        for key, expected in shapes.items():
            if not isinstance(tensors[key], Tensor):
                raise ShapeMismatchError(
                    f"Observation '{key}' is {a_type(tensors[key])}, expected a torch tensor. "
                    "Convert arrays with torch.as_tensor, on the model's device."
                )
            actual = tuple(tensors[key].shape[leading:])
            if tensors[key].ndim != leading + len(expected) or actual != tuple(expected):
                hint = f"Pass it with {leading} leading batch axes."
                if len(expected) == 3 and actual == (*expected[1:], expected[0]):
                    hint = "Images are channel-first here: transpose HWC to CHW."
                raise ShapeMismatchError(
                    f"Observation '{key}' has shape {tuple(tensors[key].shape)}, "
                    f"expected {'B, T'[: 3 * leading - 2]} and then {tuple(expected)}. {hint}"
                )
            if len(expected) == 3 and tensors[key].dtype != torch.uint8:
                raise ShapeMismatchError(
                    f"Image '{key}' has dtype {tensors[key].dtype}, expected torch.uint8. "
                    "Pass 0 to 255; the model scales them itself."
                )
            if rows is not None and len(tensors[key]) != rows:
                raise ShapeMismatchError(
                    f"Observation '{key}' has {len(tensors[key])} rows, but the state has {rows}. "
                    "Pass one observation for each row."
                )
        return tensors

    def _check_actions(self, actions: Tensor, *leading: int) -> None:
        expected = (*leading, self.config.action_dim)
        if not isinstance(actions, Tensor) or tuple(actions.shape) != expected:
            found = f"shape {list(actions.shape)}" if isinstance(actions, Tensor) else f"type {type(actions).__name__}"
            raise ShapeMismatchError(
                f"actions have {found}, expected a tensor of shape {list(expected)}. "
                "Discrete actions are passed one-hot."
            )
