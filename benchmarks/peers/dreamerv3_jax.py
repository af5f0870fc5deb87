"""Times danijar/dreamerv3, the authors' implementation in JAX, at the reference sizes.

    python benchmarks/peers/dreamerv3_jax.py --repo path/to/dreamerv3

The gradient step is the agent's own, compiled as a whole by XLA; sampling and copying to the device are not included.
README.md gives the commit and the packages to install.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import batches
import rows

SIZES = {"dreamerv3-1m-proprio": "size1m", "dreamerv3-12m-pixels": "size12m"}


def build(case: str, options):
    """Builds the agent. JAX is imported only here, because the number of threads has to be set before."""
    os.environ["JAX_PLATFORMS"] = options.device
    import elements
    import numpy as np
    import ruamel.yaml
    from dreamerv3.agent import Agent

    configs = ruamel.yaml.YAML(typ="safe").load((Path(options.repo) / "dreamerv3/configs.yaml").read_text())
    config = elements.Config(configs["defaults"]).update(configs[SIZES[case]])
    observation = (
        {"image": elements.Space(np.uint8, (64, 64, 3))}
        if case.endswith("pixels")
        else {"vector": elements.Space(np.float32, (24,))}
    )
    spaces = {
        **observation,
        "reward": elements.Space(np.float32),
        "is_first": elements.Space(bool),
        "is_last": elements.Space(bool),
        "is_terminal": elements.Space(bool),
    }
    jax_settings = {
        **config.jax,
        "platform": options.device,
        "compute_dtype": options.dtype,
        "precompile": False,  # the first call compiles, and is timed separately
        "profiler": False,
        "prealloc": False,
    }
    agent = Agent(
        spaces,
        {"action": elements.Space(np.float32, (6,), -1, 1)},
        elements.Config(
            **config.agent,
            logdir=tempfile.mkdtemp(),
            seed=0,
            jax=jax_settings,
            batch_size=16,
            batch_length=64,
            replay_context=1,
            report_length=32,
            replica=0,
            replicas=1,
        ),
    )
    return agent


def measure(case: str, options, threads: int) -> None:
    """Measures one case and prints its rows."""
    agent = build(case, options)
    import jax
    import jaxlib
    import numpy as np
    from embodied.jax import internal

    batch = batches.read(options.batch)
    stoch = batches.one_hot(batch["stoch"], agent.spaces["dyn/stoch"].shape[-1])
    seen = {"dyn/deter": batch["deter"], "dyn/stoch": stoch, **batches.on_arrival(batch)}
    data = {
        name: np.asarray(seen[name], space.dtype) if name in seen else np.zeros((16, 65, *space.shape), space.dtype)
        for name, space in agent.spaces.items()
    }
    data = internal.device_put(data, agent.train_sharded)
    carry = agent.init_train(16)
    seed = agent._seeds(0, agent.train_mirrored)

    def step() -> None:
        nonlocal carry
        carry, _, _ = agent.train(carry, {**data, "seed": seed})
        jax.block_until_ready(agent.params)

    facts = {
        "device": jax.devices()[0].device_kind if options.device != "cpu" else rows.cpu_name(),
        "threads": threads,
        "dtype": options.dtype,
        "compile": True,
        "params": int(
            sum(v.size for k, v in agent.params.items() if not k.startswith(("opt/", "slowval/", "retnorm/")))
        ),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
    }
    wait = None if options.device == "cpu" else lambda: None  # only indicates that more warm-up calls are needed
    times = rows.clock(step, options.repeats, options.budget, wait)
    memory = {"peak_mib": rows.peak_resident_mib()} if options.device == "cpu" else {}
    rows.print_row("danijar/dreamerv3", case, rows.GRADIENT, {**times, **facts, **memory})

    obs = {name: value[:1, 1] for name, value in batches.on_arrival(batch).items() if name in agent.obs_space}
    acting = agent.init_policy(1)

    def act() -> None:
        nonlocal acting
        acting, actions, _ = agent.policy(acting, obs)
        np.asarray(actions["action"])

    times = rows.clock(act, 4 * options.repeats, options.budget / 3, wait)
    rows.print_row("danijar/dreamerv3", case, rows.ACTING, {**times, "envs": 1, **facts})


if __name__ == "__main__":
    rows.run_peer(__doc__, SIZES, measure, compiles=False)
