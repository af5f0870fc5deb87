"""Records the initial weights of danijar/dreamerv3, and batches and losses of its first gradient steps.

    python benchmarks/peers/dreamerv3_batches.py --repo path/to/dreamerv3 --case dreamerv3-cartpole --losses 130

`--losses` is the number of gradient steps. Everything is written to `batches.npz`, for `../same_batches.py`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import dreamerv3_loop
import loops
import numpy as np

FIELDS = ("vector", "action", "reward", "is_first", "is_last", "is_terminal", "dyn/deter", "dyn/stoch")


def recorded(agent: Any, updates: int, _: list[dict[str, float]]) -> Any:
    """The agent's gradient step, which also keeps its batches and writes them to a file after `updates` steps."""
    step = agent.train
    # Copies, because on a CPU, JAX returns views of memory that the next step overwrites.
    arrays = {f"weights/{name}": np.array(value) for name, value in agent.params.items()}

    def train(carry: Any, data: Any) -> Any:
        done = int(agent.n_updates)
        if done < updates:
            arrays.update({f"batch/{done}/{name}": np.array(data[name]) for name in FIELDS})
        carry, outs, metrics = step(carry, data)
        # Metrics are returned one call later.
        arrays.update({f"losses/{done - 1}/{k}": np.array(v) for k, v in metrics.items() if k.startswith("loss/")})
        if done >= updates:
            np.savez("batches.npz", **arrays)
            raise loops.Stop
        return carry, outs, metrics

    return train


if __name__ == "__main__":
    dreamerv3_loop.recorded = recorded
    loops.run(__doc__, "danijar/dreamerv3", ("dreamerv3",), dreamerv3_loop.learn)
    sys.stdout.flush()
    os._exit(0)  # otherwise, threads of the peer would keep running
