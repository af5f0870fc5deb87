"""Times nicklashansen/tdmpc2, the authors' implementation, at the reference sizes.

    python benchmarks/peers/tdmpc2_reference.py --repo path/to/tdmpc2 [--compile]

The training step is the agent's own update of one batch, and the plan what its `act` does for one observation. It names
the first CUDA device in its source: on a CPU that name is answered with the CPU, and its optimisers are told not to
expect a capture. README.md says which commit, and what to install.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import rows

CASES = ("tdmpc2-5m-state", "tdmpc2-5m-pixels")
BATCH, HORIZON, ACTIONS = 256, 3, 6


class TorchOnCpu:
    """PyTorch, but that every device is the CPU."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def device(self, *_: object) -> Any:
        """The CPU."""
        return self._torch.device("cpu")


def settings(case: str, options) -> Any:
    """Their configuration of one task, as the data class that their parser makes."""
    from common import MODEL_SIZE
    from common.parser import cfg_to_dataclass
    from omegaconf import OmegaConf

    raw = OmegaConf.to_container(OmegaConf.load(Path(options.repo) / "tdmpc2/config.yaml"))
    pixels = case.endswith("pixels")
    raw.pop("defaults")
    raw.update(MODEL_SIZE[5])
    raw.update(
        compile=options.compile,
        obs="rgb" if pixels else "state",
        obs_shape={"rgb": (9, 64, 64)} if pixels else {"state": (24,)},
        action_dim=ACTIONS,
        episode_length=500,
        multitask=False,
        task_dim=0,
        bin_size=(raw["vmax"] - raw["vmin"]) / (raw["num_bins"] - 1),
    )
    unset = {name: None for name, value in raw.items() if value == "???"}
    return cfg_to_dataclass(OmegaConf.create({**raw, **unset}))


def build(case: str, options) -> Any:
    """The agent on the asked device."""
    import tdmpc2
    import torch
    from common import layers, scale

    layers.enc.__defaults__[0].clear()  # it keeps the encoder of an earlier model
    if options.device == "cpu":
        tdmpc2.torch = scale.torch = TorchOnCpu(torch)
    try:
        agent = tdmpc2.TDMPC2(settings(case, options))
    finally:
        tdmpc2.torch = scale.torch = torch
    if options.device == "cpu":
        for optimizer in (agent.optim, agent.pi_optim):
            for group in optimizer.param_groups:
                group["capturable"] = False
    return agent


def measure(case: str, options, threads: int) -> None:
    """Prints the rows of one case."""
    import tensordict
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as their training script does
    agent = build(case, options)

    def observation(*shape: int) -> torch.Tensor:
        if case.endswith("pixels"):
            return torch.randint(0, 256, (*shape, 9, 64, 64), dtype=torch.uint8).to(options.device)
        return (torch.rand(*shape, 24) * 2 - 1).to(options.device)

    batch = (
        observation(HORIZON + 1, BATCH),
        (torch.rand(HORIZON, BATCH, ACTIONS) * 2 - 1).to(options.device),
        torch.rand(HORIZON, BATCH, 1, device=options.device),
        torch.zeros(HORIZON, BATCH, 1, device=options.device),
    )

    def update() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        agent._update(*batch)

    cuda = options.device == "cuda"
    facts = {
        "device": torch.cuda.get_device_name() if cuda else rows.cpu_name(),
        "threads": threads,
        "dtype": "float32 (TF32 matrix products)" if cuda else "float32",
        "compile": options.compile,
        "params": agent.model.total_params,
        "versions": {"torch": torch.__version__, "tensordict": tensordict.__version__},
    }
    wait = torch.cuda.synchronize if cuda else None
    times = rows.clock(update, options.repeats, options.budget, wait)
    peak = round(torch.cuda.max_memory_allocated() / (1 << 20), 1) if cuda else rows.peak_resident_mib()
    rows.print_row("nicklashansen/tdmpc2", case, rows.GRADIENT, {**times, "peak_mib": peak, **facts})

    obs = observation()
    agent.act(obs, t0=True)
    times = rows.clock(lambda: agent.act(obs), options.repeats, options.budget, wait)
    rows.print_row("nicklashansen/tdmpc2", case, rows.PLAN, {**times, "envs": 1, **facts})


if __name__ == "__main__":
    rows.run_peer(__doc__, CASES, measure, folder="tdmpc2", half=())
