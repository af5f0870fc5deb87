"""Training on stored experience in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeVar

from torch import nn

from worldflux.training.callbacks import Callback
from worldflux.training.config import TrainingConfig
from worldflux.training.trainer import Provider, Trainer

ModelT = TypeVar("ModelT", bound=nn.Module)


def train(
    model: ModelT,
    buffer: Provider,
    total_steps: int = 100_000,
    batch_size: int = 16,
    sequence_length: int = 50,
    learning_rate: float = 3e-4,
    *,
    weight_decay: float = 0.0,
    grad_clip: float = 100.0,
    warmup_steps: int = 0,
    log_interval: int = 100,
    eval_interval: int = 1000,
    save_interval: int = 10_000,
    device: str = "auto",
    seed: int = 42,
    compile: bool | Literal["auto"] = "auto",
    callbacks: Iterable[Callback] = (),
    eval_data: Provider | float | None = None,
    resume: bool = False,
) -> ModelT:
    """Trains a model on stored experience, with a `Trainer` in one call.

        train(model, ReplayBuffer.load("walker.npz"), total_steps=50_000).save_pretrained("walker-model")

    Args:
        model: A `WorldModel`, or any `nn.Module` with `loss(batch)`. It is trained in place.
        buffer: A `ReplayBuffer` or another provider of batches. For a model of several tasks, the buffers of its
            tasks by their names, `{"walker-walk": walk, "walker-run": run}`, or one with a column `task`.
        total_steps: Gradient steps of the whole run. `TrainingConfig` describes this and the following settings.
        batch_size: Windows in each gradient step.
        sequence_length: Time steps in each window.
        learning_rate: Step size of the optimiser.
        weight_decay: Decoupled weight decay.
        grad_clip: Largest norm of all gradients together; 0 turns clipping off.
        warmup_steps: Steps over which the learning rate rises from zero.
        log_interval: Steps between checks of the losses.
        eval_interval: Steps between evaluations on `eval_data`.
        save_interval: Steps between checkpoints of a `CheckpointCallback` without an interval of its own.
        device: Device to train on; "auto" takes CUDA if there is a device.
        seed: Seed of every random stream.
        compile: Compile the model and capture its gradient steps in CUDA graphs; "auto" does so on CUDA.
        callbacks: Callbacks, called in this order.
        eval_data: Data for evaluation, or the share of the buffer to hold out.
        resume: Continue from the newest checkpoint of the `CheckpointCallback` among `callbacks`.

    Returns:
        The same model, trained, on the device and in evaluation mode.
    """
    config = TrainingConfig(
        total_steps=total_steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        grad_clip=grad_clip,
        warmup_steps=warmup_steps,
        log_interval=log_interval,
        eval_interval=eval_interval,
        save_interval=save_interval,
        device=device,
        seed=seed,
        compile=compile,
    )
    Trainer(model, config, callbacks, eval_data=eval_data).train(buffer, resume=resume)
    return model
