"""How long one gradient step and one acting step take; median of many after a warm-up, as lines of JSON.

    python benchmarks/throughput.py --preset dreamerv3:reference-1m --device cpu --threads 2
    python benchmarks/throughput.py --preset dreamerv3:tiny --obs vector --batch 16 --length 16

The gradient step is the whole of `Trainer.step`: forward, backward, clipping, optimiser, slow critic. Sampling from the
buffer and copying to the device are not in it. Run it on an idle machine, and compare only what one run printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from worldflux import create_world_model
from worldflux.models.base import WorldModel
from worldflux.training import Batch, Trainer, TrainingConfig

OBSERVATIONS = {"vector": (24,), "image": (3, 64, 64)}
ACTION_DIM = 6


def median_ms(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of a call in milliseconds, after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def random_batch(model: WorldModel, obs_shape: tuple[int, ...], batch: int, length: int) -> Batch:
    """Windows of random experience with stored latents, one context row more than `length`."""
    rows = length + 1
    obs = torch.rand(batch, rows, *obs_shape)
    if len(obs_shape) == 3:
        obs = (obs * 255).to(torch.uint8)
    extras = {
        name: torch.zeros(batch, rows, *shape, dtype=torch.from_numpy(dtype.type([0])).dtype)
        for name, (shape, dtype) in model.replay_extras().items()
    }
    return Batch(
        obs=obs,
        actions=torch.rand(batch, rows, ACTION_DIM) * 2 - 1,
        rewards=torch.rand(batch, rows),
        terminations=torch.zeros(batch, rows, dtype=torch.bool),
        is_first=torch.zeros(batch, rows, dtype=torch.bool),
        extras=extras,
    )


def measure(preset: str, options: argparse.Namespace) -> dict[str, object]:
    """Times of one model."""
    obs_shape = OBSERVATIONS[options.obs]
    torch.manual_seed(0)
    model = create_world_model(
        preset, obs_shape=obs_shape, action_dim=ACTION_DIM, device=options.device, dtype=options.dtype
    )
    trainer = Trainer(model, TrainingConfig(device=options.device, grad_clip=0.0))
    batch = random_batch(model, obs_shape, options.batch, options.length).to(trainer.device)
    assert isinstance(batch.obs, torch.Tensor)
    obs = batch.obs[:1, 0].expand(options.envs, *obs_shape).contiguous()
    state, action = model.initial_state(options.envs), torch.zeros(options.envs, ACTION_DIM, device=trainer.device)

    @torch.inference_mode()
    def act() -> torch.Tensor:
        return model.policy(model.update(state, action, obs))

    return {
        "preset": preset,
        "obs": options.obs,
        "batch": [options.batch, options.length],
        "params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "gradient_step_ms": round(median_ms(lambda: trainer.step(batch), options.repeats, trainer.device), 2),
        "acting_step_ms": round(median_ms(act, 20 * options.repeats, trainer.device), 3),
        "envs": options.envs,
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "torch": torch.__version__,
    }


def main() -> None:
    """Measures every preset that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["dreamerv3:tiny", "dreamerv3:reference-1m"])
    parser.add_argument("--obs", choices=OBSERVATIONS, default="vector")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="trained time steps per window")
    parser.add_argument("--envs", type=int, default=1, help="environments that act together")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU; default: torch's choice")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for preset in options.preset:
        print(json.dumps(measure(preset, options)), flush=True)


if __name__ == "__main__":
    main()
