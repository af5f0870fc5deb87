"""Times NM512/r2dreamer, a DreamerV3 in PyTorch, with its decoder (`rep_loss=dreamer`) at the reference sizes.

    python benchmarks/peers/r2dreamer.py --repo path/to/r2dreamer [--compile]

The gradient step is the agent's own `update` with a buffer that always returns the same batch. On a CPU, the gradient
is computed in the requested precision. On CUDA, `--dtype bfloat16` selects the half precision that the peer was written
for, which is float16 with a gradient scaler. README.md gives the commit and the packages to install.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import batches
import rows

SIZES = {
    "dreamerv3-1m-proprio": {"deter": 512, "hidden": 64, "discrete": 4, "depth": 4, "units": 64},
    "dreamerv3-12m-pixels": {"deter": 2048, "hidden": 256, "discrete": 16, "depth": 16, "units": 256},
}


class OneBatch:
    """A replay buffer that always returns the same batch."""

    def __init__(self, data, initial) -> None:
        self.data, self.initial = data, initial

    def sample(self):
        """Returns what the peer's buffer returns: rows, their indices, and the latent state before them."""
        return self.data.copy(), None, self.initial

    def update(self, index, stoch, deter) -> None:
        """Discards updated latent states."""


def build(case: str, options):
    """Builds the agent with the layer sizes and the observations of the case."""
    import dreamer
    import gymnasium
    import numpy as np
    import torch
    from omegaconf import OmegaConf

    configs = Path(options.repo) / "configs"
    observations = OmegaConf.load(configs / f"env/dmc_{'vision' if case.endswith('pixels') else 'proprio'}.yaml")
    observations.device, observations.seed = options.device, 0
    model = OmegaConf.load(configs / "model/_base_.yaml")
    model = OmegaConf.merge(model, SIZES[case], {"act": "SiLU", "norm": True})
    config = OmegaConf.create({"device": options.device, "env": observations, "model": model})
    config.model.rep_loss, config.model.compile = "dreamer", options.compile

    half = torch.float16 if options.device == "cuda" else torch.bfloat16

    def autocast(device_type: str, dtype):
        return torch.autocast(device_type, dtype=half, enabled=options.dtype != "float32")

    dreamer.autocast = autocast  # the peer always uses float16
    space = (
        {"image": gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)}
        if case.endswith("pixels")
        else {"vector": gymnasium.spaces.Box(-np.inf, np.inf, (24,), np.float32)}
    )
    agent = dreamer.Dreamer(config.model, gymnasium.spaces.Dict(space), gymnasium.spaces.Box(-1, 1, (6,), np.float32))
    if options.dtype == "float32" or options.device == "cpu":
        agent._scaler = torch.amp.GradScaler(options.device, enabled=False)
    return agent.to(options.device)


def measure(case: str, options, threads: int) -> None:
    """Measures one case and prints its rows."""
    import numpy as np
    import tensordict
    import torch
    from tensordict import TensorDict

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    agent = build(case, options)

    # The peer's windows have no row for the initial latents, so they are the 64 rows after it.
    arrived = batches.on_arrival(batches.read(options.batch))
    rows_of = {name: torch.from_numpy(np.ascontiguousarray(value[:, 1:])) for name, value in arrived.items()}
    flags = ("reward", "is_first", "is_last", "is_terminal")
    shaped = {name: value.unsqueeze(-1) if name in flags else value for name, value in rows_of.items()}
    data = TensorDict(shaped, batch_size=(16, 64)).to(options.device)
    state = agent.get_initial_state(16)
    buffer = OneBatch(data, (state["stoch"], state["deter"]))
    cuda = options.device == "cuda"
    facts = {
        "device": torch.cuda.get_device_name() if cuda else rows.cpu_name(),
        "threads": threads,
        "dtype": "float16" if cuda and options.dtype != "float32" else options.dtype,
        "compile": options.compile,
        "params": sum(p.numel() for p in agent._named_params.values()),
        "versions": {"torch": torch.__version__, "tensordict": tensordict.__version__},
    }
    wait = torch.cuda.synchronize if cuda else None
    times = rows.clock(lambda: agent.update(buffer), options.repeats, options.budget, wait)
    peak = round(torch.cuda.max_memory_allocated() / (1 << 20), 1) if cuda else rows.peak_resident_mib()
    rows.print_row("NM512/r2dreamer", case, rows.GRADIENT, {**times, "peak_mib": peak, **facts})

    acting = agent.get_initial_state(1)
    obs = data[:1, 0].select("image" if "image" in shaped else "vector", "is_first")

    def act() -> None:
        nonlocal acting
        action, acting = agent.act(obs.copy(), acting)
        action.cpu()

    times = rows.clock(act, 4 * options.repeats, options.budget / 3, wait)
    rows.print_row("NM512/r2dreamer", case, rows.ACTING, {**times, "envs": 1, **facts})


if __name__ == "__main__":
    rows.run_peer(__doc__, SIZES, measure)
