"""Times pytorch/rl's DreamerV3 (its `DreamerV3Loss` and learner) at the reference sizes.

    python benchmarks/peers/torchrl_dreamerv3.py --repo path/to/site-packages [--compile]

`--repo` is a folder with `sota-implementations/dreamer_v3`, such as the `site-packages` into which TorchRL's wheel
installs one. The gradient step is the learner's own update. `--compile` compiles its whole step around its scan and, on
CUDA, captures it as a CUDA graph. README.md gives the version and the packages to install.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import batches
import rows

SIZES: dict[str, dict[str, int]] = {
    "dreamerv3-1m-proprio": {"rnn_hidden_dim": 512, "hidden_dim": 64, "num_classes": 4, "image_depth": 4},
    "dreamerv3-12m-pixels": {"rnn_hidden_dim": 2048, "hidden_dim": 256, "num_classes": 16, "image_depth": 16},
}
ENV = "RowsOfNumbers-v0"


def settings(case: str, options) -> Any:
    """The part of the peer's configuration that its learner reads, with the values of the reference presets."""
    from omegaconf import OmegaConf

    pixels = case.endswith("pixels")
    networks = {
        "num_categoricals": 32,
        "unimix": 0.01,
        "recurrent_model": "block_gru",
        "num_blocks": 8,
        "dynamics_layers": 1,
        "prior_layers": 2,
        "posterior_layers": 1,
        "norm_eps": 1e-4,
        "decoder_event_dims": None,
        "num_reward_bins": 255,
        "num_value_bins": 255,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "reward_layers": 1,
        "actor_layers": 3,
        "value_layers": 3,
        "policy_min_std": 0.1,
        "policy_max_std": 1.0,
        "image_mults": [2, 3, 4, 4],
        "image_kernel_size": 5,
        "image_decoder_blocks": 8,
        **SIZES[case],
    }
    fast = options.compile and options.device == "cuda"
    optimization = {
        "device": options.device,
        "separate_policy_rng": False,
        "mixed_precision": options.dtype == "bfloat16",
        "compile": "off",
        "compile_train_step": options.compile,
        "compile_train_step_mode": None,
        "compile_rssm": "scan" if options.compile else None,
        "cudagraph_train_step": fast,
        "rssm_scan_unroll": 8,
        "lr": 4e-5,
        "optimizer_eps": 1e-20,
        "adaptive_grad_clip": 0.3,
        "warmup_steps": 1000,
        "imagination_horizon": 15,
        "continuation_horizon": 333,
        "use_reinforce": True,
        "return_normalization_rate": 0.01,
        "return_normalization_min_scale": 1.0,
        "slow_critic_regularization": 1.0,
        "slow_critic_tau": 0.02,
        "replay_value_loss_weight": 0.3,
        "free_bits": 1.0,
        "dynamic_loss_weight": 1.0,
        "representation_loss_weight": 0.1,
        "gamma": 1.0,
        "lmbda": 0.95,
    }
    env = {
        "backend": "gym",
        "name": ENV,
        "seed": 0,
        "use_seed": True,
        "max_episode_steps": 500,
        "vector_key": None if pixels else "observation",
        "pixels_key": "pixels" if pixels else None,
    }
    replay = {"batch_size": 16, "seq_len": 64}
    return OmegaConf.create({"networks": networks, "optimization": optimization, "env": env, "replay_buffer": replay})


def register_env() -> None:
    """Registers an environment with 24 numbers and 6 actions, from which the peer's imagination takes its shapes."""
    import gymnasium
    import numpy as np

    class RowsOfNumbers(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (24,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (6,), np.float32)

        def __init__(self, **_) -> None:
            """Accepts and ignores the settings that TorchRL passes to every environment."""

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(24, np.float32), {}

        def step(self, action):
            return np.zeros(24, np.float32), 0.0, False, False, {}

    if ENV not in gymnasium.registry:
        gymnasium.register(ENV, entry_point=RowsOfNumbers)


def measure(case: str, options, threads: int) -> None:
    """Measures one case and prints its row."""
    import runpy

    import tensordict
    import torch
    import torchrl
    from tensordict import TensorDict

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    register_env()
    torch.set_float32_matmul_precision("high")  # as in the peer's own benchmark
    example = runpy.run_path(str(Path(options.repo) / "sota-implementations/dreamer_v3/train.py"), run_name="benchmark")
    pixels = case.endswith("pixels")
    config, device = settings(case, options), torch.device(options.device)
    shape = {"pixels_shape": (3, 64, 64)} if pixels else {}
    learner = example["_build_learner"](config, device, 0 if pixels else 24, 6, **shape)
    update = example["_make_learner_update"](config, device, learner)

    # A row is the transition from its observation to the next one, so 65 rows form 64 transitions.
    found = batches.read(options.batch)
    batch = {name: torch.from_numpy(value) for name, value in found.items()}
    stoch = torch.from_numpy(batches.one_hot(found["stoch"], config.networks.num_classes))
    ends = {"terminated": batch["terminations"][:, :-1, None], "truncated": batch["truncations"][:, :-1, None]}
    following = {
        "pixels" if pixels else "observation": batch["obs"][:, 1:],
        "reward": batch["rewards"][:, :-1, None],
        "done": ends["terminated"] | ends["truncated"],
        **ends,
    }
    data = TensorDict(
        {
            "state": stoch[:, :-1].flatten(2),
            "belief": batch["deter"][:, :-1].float(),
            "action": batch["actions"][:, :-1],
            "is_init": batch["is_first"][:, :-1, None],
            "next": following,
        },
        (16, 64),
    ).to(device)

    cuda = options.device == "cuda"
    wait = torch.cuda.synchronize if cuda else None
    warmed = 0.0
    if options.compile:  # the peer compiles and captures in a separate call
        started = time.perf_counter()
        update.warmup(data.clone())
        if wait is not None:
            wait()
        warmed = time.perf_counter() - started
    times = rows.clock(lambda: update.step(None, data.clone()), options.repeats, options.budget, wait)
    times["compile_s"] = round(times["compile_s"] + warmed, 3)
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    peak = round(torch.cuda.max_memory_allocated() / (1 << 20), 1) if cuda else rows.peak_resident_mib()
    facts = {
        "peak_mib": peak,
        "device": torch.cuda.get_device_name() if cuda else rows.cpu_name(),
        "threads": threads,
        "dtype": options.dtype,
        "compile": options.compile,
        "params": sum(p.numel() for p in parameters),
        "versions": {name.__name__: name.__version__ for name in (torch, torchrl, tensordict)},
    }
    rows.print_row("pytorch/rl", case, rows.GRADIENT, {**times, **facts})


if __name__ == "__main__":
    rows.run_peer(__doc__, SIZES, measure, folder="sota-implementations/dreamer_v3", half=("cuda",))
