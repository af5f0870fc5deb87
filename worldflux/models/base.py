"""The interface of every world model: its state, its losses, how it is optimised, how it is saved."""

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
from worldflux.errors import CheckpointError, ShapeMismatchError
from worldflux.files import checked_path, reading_together, replacing_together, writing
from worldflux.models.health import HealthMetric
from worldflux.models.weights import check_weights, parse_weights, read_weights
from worldflux.nn.precision import autocast
from worldflux.reading import InvalidJSONError, only_our_errors
from worldflux.replay.batch import Batch, Observation

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class State(Mapping[str, Tensor]):
    """An immutable mapping of names to tensors that share their leading axes.

    `state["deter"]` is one tensor; any other index goes to the leading axis of all of them: `state[3]`, `state[mask]`,
    `state[:, 0]`.
    """

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, index: Any) -> Any:
        """One tensor by its name, or the state at an index of the leading axes."""
        if isinstance(index, str):
            return self._tensors[index]
        return self._map(lambda x: x[index])

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Number of tensors (a mapping's length), not of rows."""
        return len(self._tensors)

    def __repr__(self) -> str:
        """Names and shapes."""
        return f"State({', '.join(f'{k}: {list(v.shape)}' for k, v in self._tensors.items())})"

    def to(self, *args: Any, **kwargs: Any) -> State:
        """All tensors on another device or of another dtype; arguments as of `torch.Tensor.to`."""
        return self._map(lambda x: x.to(*args, **kwargs))

    def detach(self) -> State:
        """All tensors without gradient."""
        return self._map(lambda x: x.detach())

    @staticmethod
    def stack(states: Sequence[State], dim: int = 0) -> State:
        """Puts states side by side along a new axis."""
        return State({k: torch.stack([s[k] for s in states], dim) for k in states[0]})

    @staticmethod
    def cat(states: Sequence[State], dim: int = 0) -> State:
        """Joins states along an existing axis."""
        return State({k: torch.cat([s[k] for s in states], dim) for k in states[0]})

    def _map(self, function: Callable[[Tensor], Tensor]) -> State:
        return State({name: function(tensor) for name, tensor in self._tensors.items()})


@dataclass(frozen=True)
class Trajectory:
    """What a model expects of a sequence of actions."""

    states: State
    """State after each action. `[H, B, ...]`"""
    rewards: Tensor
    """What each action earned. `[H, B]`"""
    continues: Tensor
    """Probability that the episode goes on after each action, in [0, 1]. `[H, B]`"""


@dataclass(frozen=True)
class LossOutput:
    """Result of one loss computation; nothing in the model has changed by it."""

    loss: Tensor
    """Scalar to differentiate."""
    terms: dict[str, Tensor]
    """Named scalars for the log, without gradient."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """What to store beside the last T' rows of the batch. `[B, T', ...]`"""
    updates: dict[str, Tensor] = field(default_factory=dict)
    """Buffers of the model that `after_step` moves to these values (running normalisers)."""
    carry: dict[str, Tensor] = field(default_factory=dict)
    """What later phases of the same step go on with, without gradient."""


@dataclass(frozen=True)
class OptimizerSpec:
    """How a family's papers optimise it."""

    kind: Literal["laprop", "adam"]
    """LaProp (momentum after the RMS scaling) or Adam."""
    learning_rate: float
    """Constant after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the momentum and of the squared gradients."""
    eps: float = 1e-8
    """Added to the root of the squared gradients."""
    agc: float | None = None
    """Adaptive gradient clipping: largest gradient norm of a tensor as a share of its own norm. None: off."""
    grad_clip: float | None = None
    """Largest norm of all gradients together. None: off."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from zero."""
    weight_decay: float = 0.0
    """Decoupled."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate of their own."""

    parameters: list[nn.Parameter]
    rate_scale: float = 1.0
    """Factor on the optimiser's learning rate."""
    eps: float | None = None
    """In place of the specification's `eps`."""


@dataclass(frozen=True)
class Phase:
    """One loss of a gradient step with the parameters that it trains.

    Each phase has an optimiser of its own, and its gradient is clipped by itself.
    """

    name: str
    parameters: list[nn.Parameter] | list[ParameterGroup]
    loss: Callable[[Batch, Sequence[LossOutput]], LossOutput]
    """Called with the batch and the outputs of the phases before it."""

    @property
    def trained(self) -> list[nn.Parameter]:
        """Every parameter that the phase trains."""
        return [p for group in parameter_groups(self.parameters) for p in group.parameters]


def parameter_groups(parameters: Iterable[nn.Parameter | ParameterGroup]) -> list[ParameterGroup]:
    """Groups as they are given; loose parameters become one more group, with the optimiser's own rate."""
    items = list(parameters)
    groups = [item for item in items if isinstance(item, ParameterGroup)]
    loose = [item for item in items if not isinstance(item, ParameterGroup)]
    return [*groups, ParameterGroup(loose)] if loose else groups


@dataclass(frozen=True)
class OnlineDefaults:
    """A family's own numbers for learning in an environment."""

    train_ratio: float | None
    """Replayed time steps per environment step. Higher learns more from each step and takes longer. None: one gradient
    step for each environment step, whatever the size of its batch."""
    batch_size: int
    """Windows per gradient step."""
    seq_len: int
    """Trained time steps per window."""
    buffer_size: int
    """Transitions kept."""
    learning_starts: int | None
    """Environment steps before the first gradient step. None: until there are as many windows as a batch has time
    steps."""
    random_start: bool = False
    """Take uniformly random actions until then, and make up for the gradient steps of that time at its end."""
    min_seq_len: int = 1
    """Least trained time steps per window that the losses can be computed on."""
    fresh_windows: bool = False
    """Train on each new window once before drawing at random."""
    planner: str | None = None
    """How actions are chosen: "mppi" plans, None acts with the policy."""


class WorldModel(nn.Module):
    """What a world model can do, whatever its family; all of it batched.

    Observations are `[B, ...]`, or a dictionary of such; actions are `[B, A]`, continuous ones in [-1, 1], discrete
    ones one-hot. Subclasses set `config_class` and implement the methods that raise here.
    """

    config_class: ClassVar[type[WorldModelConfig]] = WorldModelConfig
    capturable: ClassVar[bool] = True
    """Whether a gradient step may be recorded as a CUDA graph and played back: losses and `after_step` compute with
    tensors alone, change the model's in place, and wait for nothing. A model that counts in Python says False."""

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> WorldModel:
        """Sets the module and all inside to training or evaluation mode, as torch does, without its bookkeeping.

        An agent changes the mode twice for each environment step.
        """
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")  # as torch says it
        modules: list[nn.Module] = [self]
        while modules:
            module = modules.pop()
            if module is not self and (type(module).train is not nn.Module.train or "train" in vars(module)):
                module.train(mode)  # its own
                continue
            module.__dict__["training"] = mode
            modules.extend(child for child in module._modules.values() if child is not None)
        return self

    def set_training_mode(self, mode: bool) -> None:
        """stable-baselines3's name of `train(mode)`, for callbacks and scripts that expect it of a policy."""
        self.train(mode)

    def compile_functions(self) -> None:
        """Replaces hot functions by what `torch.compile` makes of them; by default there are none.

        `Trainer` calls it where its setting `compile` asks for it; calling it again changes nothing. What is compiled
        is kept beside the modules, so that files and copies of the model are the same as without.
        """

    # States

    def initial_state(self, batch_size: int) -> State:
        """The state before any observation."""
        raise NotImplementedError("initial_state(batch_size) -> State")

    def encode(self, obs: Observation, *, deterministic: bool = False) -> State:
        """State after the first observation of an episode.

        Args:
            obs: `[B, ...]`
            deterministic: Take the likeliest latents instead of sampling them.
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
        """State after an action and the observation that it led to (posterior).

        Args:
            state: Before the action.
            action: `[B, A]`
            obs: What was seen after it. `[B, ...]`
            is_first: True where `obs` starts an episode: that row's state and action are ignored. `[B]`
            deterministic: Take the likeliest latents instead of sampling them.
        """
        raise NotImplementedError("update(state, action, obs) -> State")

    def transition(self, state: State, action: Tensor, *, deterministic: bool = False) -> State:
        """State that the model expects after an action, without seeing anything (prior). `[B, A]` → State"""
        raise NotImplementedError("transition(state, action) -> State")

    def decode(self, state: State) -> dict[str, Any]:
        """Predictions of a state: `"obs"` as an observation, `"reward"` `[B]`, `"continue"` `[B]`, where offered."""
        raise NotImplementedError("decode(state) -> dict")

    def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
        """Open-loop prediction of a sequence of actions `[H, B, A]`."""
        raise NotImplementedError("rollout(state, actions) -> Trajectory")

    def policy(self, state: State, deterministic: bool = False) -> Tensor:
        """Actions of the learned policy. `[B, A]`"""
        raise NotImplementedError("policy(state) -> actions")

    def value(self, state: State) -> Tensor:
        """Expected discounted reward from a state onwards, in reward units. `[B]`"""
        raise NotImplementedError("value(state) -> Tensor")

    # Learning

    def loss(self, batch: Batch) -> LossOutput:
        """The training loss of a batch of replayed windows. Changes nothing."""
        raise NotImplementedError("loss(batch) -> LossOutput")

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        """How the family's papers optimise it."""
        raise NotImplementedError("optimizer_spec")

    def phases(self) -> list[Phase]:
        """The losses of one gradient step, in order. By default `loss` over all trainable parameters."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [Phase("model", trainable, lambda batch, previous: self.loss(batch))]

    @torch.no_grad()
    def after_step(self, outputs: Sequence[LossOutput]) -> None:
        """Commits what a gradient step leaves behind: running normalisers; subclasses add target networks."""
        for output in outputs:
            for name, value in output.updates.items():
                self.get_buffer(name).copy_(value)

    def health(self, batch: Batch) -> tuple[HealthMetric, ...]:
        """Numbers that tell whether the model is dying, measured on a batch without a gradient; none by default.

        It draws random numbers as `loss` does; `training.check_health` keeps them apart from those of training.
        """
        return ()

    # Replay and acting

    def online_defaults(self) -> OnlineDefaults:
        """The family's own numbers for learning in an environment."""
        raise NotImplementedError("online_defaults() -> OnlineDefaults")

    def replay_extras(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Names, shapes and dtypes of what the model wants stored beside each replayed row."""
        return {}

    def extras_from_state(self, state: State) -> dict[str, Tensor]:
        """The values of `replay_extras` for a state. `[B, ...]` each"""
        return {}

    # Files

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, both or neither, also where another model was saved.

        Args:
            directory: Created if it does not exist. Other files in it stay.

        Raises:
            ConfigurationError: If `directory` can be none.
            CheckpointError: If it cannot be written; an older model is unchanged then.
        """
        path = checked_path("directory", directory, directory=True)
        with writing(path, CheckpointError), replacing_together(path) as beside:
            (beside / WEIGHTS_FILE).write_bytes(self.weights_bytes())
            (beside / CONFIG_FILE).write_text(self.config.to_json(), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: str | torch.device = "cpu", *, allow_nonfinite: bool = False
    ) -> WorldModel:
        """Builds the model that `save_pretrained` wrote; also while another process replaces it.

        The weights are read and compared with what the configuration describes before anything is built: what is built
        takes as much memory as the file has bytes.

        Args:
            directory: What it wrote.
            device: Where the model shall be.
            allow_nonfinite: Take weights that are NaN or infinite, to look at them.

        Raises:
            CheckpointError: If the directory lacks a file, the weights do not fit the configuration, or are not finite.
            ConfigurationError: If there is no such device, the configuration is none, or `directory` can be none.
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
            with torch.random.fork_rng(devices=[]):  # the weights that it draws are replaced
                model = cls(config)
            model._take_over(weights, directory / WEIGHTS_FILE)
        return model

    @classmethod
    def _check_described(cls, config: WorldModelConfig, weights: Mapping[str, Tensor], path: Path) -> None:
        """Raises a `CheckpointError` unless the weights are those of the model that a configuration describes."""
        if cls.load_state_dict is not nn.Module.load_state_dict:  # who may take weights under other names
            return
        try:
            with torch.device("meta"):
                described = cls(config).state_dict()
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error):  # such as a size that no number of bytes is enough for
                raise
            return  # a model of somebody's own, which computes while it is built
        check_weights(path, weights, described)

    def weights_bytes(self) -> bytes:
        """All parameters and buffers in safetensors format."""
        return safetensors.torch.save({k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()})

    def load_weights(self, data: bytes, *, source: object, allow_nonfinite: bool = False) -> None:
        """Takes over what `weights_bytes` gave.

        Args:
            data: safetensors.
            source: Named in errors.
            allow_nonfinite: Take weights that are NaN or infinite.

        Raises:
            CheckpointError: If the data is damaged or not finite, or names or shapes differ from the model's.
        """
        with only_our_errors(source):
            self._take_over(parse_weights(data, source, allow_nonfinite=allow_nonfinite), source)

    def _take_over(self, weights: Mapping[str, Tensor], source: object) -> None:
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{source} does not fit the model's configuration. {error}") from error

    # For the families: what they are given, and in which precision they compute

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = self.config.dtype
        return autocast(self.device, None if kind == "float32" else getattr(torch, kind))

    def _observations(self, obs: Observation, *, leading: int, rows: int | None = None) -> dict[str, Tensor]:
        """The observation as a dictionary, checked; the first of the `leading` batch axes has `rows` rows."""
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
                    f"Observation '{key}' is a {type(tensors[key]).__name__}, expected a torch tensor. "
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
                    f"Observation '{key}' has {len(tensors[key])} rows, but the state has {rows}. Pass one for each."
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
