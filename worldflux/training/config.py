"""The settings of `Trainer` and `train`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from worldflux.accel.compilation import checked_compile
from worldflux.accel.device import resolve_device
from worldflux.errors import ConfigurationError, nearest
from worldflux.files import checked_path, write_text
from worldflux.reading import only_our_errors, read_json
from worldflux.validation import finite_number, whole_number

_COUNTS = {
    "total_steps": 1,
    "batch_size": 1,
    "sequence_length": 1,
    "warmup_steps": 0,
    "log_interval": 1,
    "eval_interval": 1,
    "save_interval": 1,
    "seed": 0,
}


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of `Trainer` and `train`, the same for every family of models.

    The model determines the kind of its optimiser and the optimiser's own numbers; the learning rate, warm-up, weight
    decay and clipping are set here.

    Raises:
        ConfigurationError: If a value has the wrong type or is out of range.
    """

    total_steps: int = 100_000
    """Gradient steps of the whole run, including those before a checkpoint."""
    batch_size: int = 16
    """Windows in each gradient step. More windows give smoother gradients; the cost grows linearly."""
    sequence_length: int = 50
    """Time steps in each window. Longer windows teach longer memory; the cost grows linearly."""
    learning_rate: float = 3e-4
    """Step size of the optimiser after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay: each step takes this share of a weight, times the learning rate, away from it. Larger
    values keep weights smaller."""
    grad_clip: float = 100.0
    """Largest norm of all gradients together; larger gradients are scaled down to it. 0 or infinity turns it off."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    log_interval: int = 100
    """Steps after which losses are read from the device, checked and shown."""
    eval_interval: int = 1000
    """Steps between evaluations, if the trainer has `eval_data`."""
    save_interval: int = 10_000
    """Steps between checkpoints of a `CheckpointCallback` that was not given an interval of its own."""
    device: str = "auto"
    """Where to train: "cpu", "cuda", "cuda:1", ...; "auto" takes CUDA if there is a device."""
    seed: int = 42
    """Seed of every random stream of the run: Python, NumPy, torch and the buffer's sampler."""
    compile: bool | Literal["auto"] = "auto"
    """On CUDA, capture gradient steps in CUDA graphs and compile the model's hot functions; on a CPU, compile these
    alone, which needs a C++ compiler. "auto": on CUDA only."""

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        for name in ("learning_rate", "weight_decay", "grad_clip"):
            number = finite_number(name, getattr(self, name), or_infinite=name == "grad_clip")
            object.__setattr__(self, name, number)
        if self.learning_rate <= 0:
            raise ConfigurationError(f"learning_rate is {self.learning_rate}, expected a finite number above 0.")
        if self.weight_decay < 0:
            raise ConfigurationError(f"weight_decay is {self.weight_decay}, expected a finite number from 0.")
        if self.grad_clip < 0:
            raise ConfigurationError(f"grad_clip is {self.grad_clip}, expected a norm above 0, or 0 to turn it off.")
        if self.seed >= 2**32:
            raise ConfigurationError(f"seed is {self.seed}, expected a whole number below 2**32, which NumPy can take.")
        object.__setattr__(self, "compile", checked_compile(self.compile))
        resolve_device(self.device, must_exist=False)
        object.__setattr__(self, "device", str(self.device))  # JSON cannot hold a torch.device

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingConfig:
        """Makes a configuration of what `to_dict` returned; missing fields take their defaults.

        Raises:
            ConfigurationError: If a field is unknown or a value does not fit.
        """
        if not isinstance(data, Mapping):
            raise ConfigurationError(f"A TrainingConfig is a mapping of names to values, got {type(data).__name__}.")
        known = [item.name for item in fields(cls)]
        for name in data:
            if name not in known:
                raise ConfigurationError(f"Unknown TrainingConfig field '{name}'{nearest(str(name), known)}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """All fields with their values, in a form that JSON can hold."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the configuration to `path` as JSON, whole or not at all. Missing directories are created.

        Raises:
            ConfigurationError: If it cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n", ConfigurationError)

    @classmethod
    def load(cls, path: str | Path) -> TrainingConfig:
        """Reads a configuration that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ConfigurationError: If it is not a training configuration. If it is not even JSON, the error is also a
                `json.JSONDecodeError`.
        """
        path = checked_path("path", path)
        data = read_json(path, error=ConfigurationError, finite=False)  # grad_clip may be infinite
        with only_our_errors(path, ConfigurationError):
            try:
                return cls.from_dict(data)
            except ConfigurationError as error:
                raise ConfigurationError(f"{path}: {error}") from error


_READ_IN_EACH_STEP = ("log_interval", "eval_interval")
"""Settings that may change while `Trainer.train` runs."""
_READ_BY_TRAIN = ("total_steps", "batch_size", "sequence_length", "save_interval", "seed")
"""Settings that may change between two calls of `Trainer.train`."""


def check_changes(before: TrainingConfig, after: TrainingConfig, *, running: bool) -> None:
    """Checks that a trainer can go on with other settings than it was made with.

    Args:
        before: Its settings.
        after: The other settings.
        running: Whether `train` runs.

    Raises:
        ConfigurationError: If a setting cannot be changed, or not while `train` runs.
    """
    old = before.to_dict()
    changed = [name for name, value in after.to_dict().items() if value != old[name]]
    if built_in := [name for name in changed if name not in (*_READ_IN_EACH_STEP, *_READ_BY_TRAIN)]:
        raise ConfigurationError(
            f"{', '.join(built_in)} cannot be changed: the trainer was made with it. Make another one, "
            "Trainer(model, config), and call its load_checkpoint with what this one saved. The learning rate of "
            "each group of parameters can be set: trainer.optimizers[0].param_groups[0]['lr'] = ..."
        )
    if running and (begun := [name for name in changed if name in _READ_BY_TRAIN]):
        raise ConfigurationError(
            f"{', '.join(begun)} cannot be changed while train runs. Let the callback return False to end it, and "
            "call train() again with the other settings."
        )
