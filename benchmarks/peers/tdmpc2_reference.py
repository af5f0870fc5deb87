"""Times nicklashansen/tdmpc2, the authors' implementation, at the reference sizes.

    python benchmarks/peers/tdmpc2_reference.py --repo path/to/tdmpc2 [--compile]

The gradient step is the agent's own update for one batch, and the plan is its `act` for one observation. The source of
the peer names the first CUDA device. On a CPU, it is replaced by the CPU, and the optimisers are not `capturable`.
README.md gives the commit and the packages to install.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import batches
import rows

CASES = ("tdmpc2-5m-state", "tdmpc2-5m-pixels")
HORIZON, ACTIONS = 3, 6


class TorchOnCpu:
    """PyTorch, with every device replaced by the CPU, which reports enough free memory."""

    cuda = SimpleNamespace(mem_get_info=lambda: (1 << 40, 1 << 40))

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def device(self, *_: object) -> Any:
        """Returns the CPU."""
        return self._torch.device("cpu")


def settings(repo: str, **changes: Any) -> Any:
    """The peer's configuration for one task, as the dataclass that its parser creates."""
    from common.parser import cfg_to_dataclass
    from omegaconf import OmegaConf

    raw = OmegaConf.to_container(OmegaConf.load(Path(repo) / "tdmpc2/config.yaml"))
    raw.pop("defaults")
    raw.update(multitask=False, task_dim=0, bin_size=(raw["vmax"] - raw["vmin"]) / (raw["num_bins"] - 1), **changes)
    unset = {name: None for name, value in raw.items() if value == "???"}
    return cfg_to_dataclass(OmegaConf.create({**raw, **unset}))


def build(config: Any, device: str) -> Any:
    """Builds the agent on the given device."""
    import tdmpc2
    import torch
    from common import layers, scale

    layers.enc.__defaults__[0].clear()  # its mutable default would keep the encoder of an earlier model
    if device == "cpu":
        tdmpc2.torch = scale.torch = TorchOnCpu(torch)
    try:
        agent = tdmpc2.TDMPC2(config)
    finally:
        tdmpc2.torch = scale.torch = torch
    if device == "cpu":
        for optimizer in (agent.optim, agent.pi_optim):
            for group in optimizer.param_groups:
                group["capturable"] = False
    return agent


def measure(case: str, options, threads: int) -> None:
    """Measures one case and prints its rows."""
    import tensordict
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as in the peer's training script
    from common import MODEL_SIZE

    observed = {"obs": "rgb", "obs_shape": {"rgb": (9, 64, 64)}}
    if not case.endswith("pixels"):
        observed = {"obs": "state", "obs_shape": {"state": (24,)}}
    fixed = {"compile": options.compile, "action_dim": ACTIONS, "episode_length": 500}
    agent = build(settings(options.repo, **{**MODEL_SIZE[5], **observed, **fixed}), options.device)

    rows_of = {
        name: torch.from_numpy(value).transpose(0, 1).contiguous().to(options.device)
        for name, value in batches.read(options.batch).items()
    }
    earned = (rows_of[name][:HORIZON].float().unsqueeze(-1) for name in ("rewards", "terminations"))
    batch = (rows_of["obs"], rows_of["actions"][:HORIZON], *earned)

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

    obs = rows_of["obs"][0, 0]
    agent.act(obs, t0=True)
    times = rows.clock(lambda: agent.act(obs), options.repeats, options.budget, wait)
    rows.print_row("nicklashansen/tdmpc2", case, rows.PLAN, {**times, "envs": 1, **facts})


if __name__ == "__main__":
    rows.run_peer(__doc__, CASES, measure, folder="tdmpc2", half=())
