"""Runs one of the loops of `../loops.py` with danijar/dreamerv3: its `embodied.run.train`, agent, driver and replay.

    python benchmarks/peers/dreamerv3_loop.py --repo path/to/dreamerv3 --case dreamerv3-16x16

worldflux provides the environment, the sizes and the step counter, which counts only actions, whereas the peer also
counts the row that a reset creates. The train ratio therefore means the same on both sides, and gradient steps begin
after the same action.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import loops
import numpy as np


def learn(loop: loops.Loop, options: argparse.Namespace) -> tuple[loops.Watched, dict[str, Any]]:
    """Runs a loop, and returns the environment and additional facts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    parallel = str(options.threads > 1).lower()
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={parallel} intra_op_parallelism_threads={options.threads}"
    import jax

    jax.devices()  # initialises XLA with these flags, which the agent would replace
    import elements
    import embodied
    import portal
    import ruamel.yaml
    from dreamerv3 import main as theirs

    agents: list[Any] = []
    watched = loops.Watched(loop, options.seed, lambda: int(agents[0].n_updates) if agents else 0)
    config = settings(loop, options, elements, ruamel.yaml)

    class Actions(elements.Counter):
        """The peer's step counter, without the rows that resets create."""

        def increment(self, amount: int = 1) -> None:
            self.value = watched.taken

    class Env(embodied.Env):
        """The environment with the interface of the peer, in which a reset is a step."""

        over = True
        key = "image" if len(watched.observation_space.shape) == 3 else "vector"

        @property
        def obs_space(self) -> dict[str, Any]:
            seen = watched.observation_space
            flags = {name: elements.Space(bool) for name in ("is_first", "is_last", "is_terminal")}
            return {self.key: elements.Space(seen.dtype, seen.shape), "reward": elements.Space(np.float32), **flags}

        @property
        def act_space(self) -> dict[str, Any]:
            action = elements.Space(np.int32, (), 0, int(watched.action_space.n))
            return {"action": action, "reset": elements.Space(bool)}

        def step(self, action: dict[str, Any]) -> dict[str, Any]:
            first, reward, terminated = bool(action["reset"]) or self.over, 0.0, False
            if first:
                obs, self.over = watched.reset()[0], False
            else:
                obs, reward, terminated, truncated, _ = watched.step(int(action["action"]))
                self.over = terminated or truncated
            flags = {"is_first": first, "is_last": self.over, "is_terminal": terminated}
            return {self.key: obs, "reward": np.float32(reward), **flags}

    class Replay(embodied.replay.Replay):
        """The peer's replay buffer, which reports to be empty until `loop.starts` actions have been taken."""

        def __len__(self) -> int:
            return super().__len__() if watched.taken >= loop.starts else 0

    def make_replay() -> Replay:
        length = loop.length + config.replay_context
        return Replay(length, int(config.replay.size), online=config.replay.online, seed=options.seed)

    def make_agent() -> Any:
        agents.append(theirs.make_agent(config))
        if options.losses:
            agents[0].train = recorded(agents[0], options.losses, losses)
        return agents[0]

    losses: list[dict[str, float]] = []
    theirs.make_env = lambda config, index: theirs.wrap_env(Env(), config)
    portal.setup()
    np.random.seed(options.seed)
    shared = ("batch_size", "batch_length", "report_length", "consec_train", "consec_report", "replay_context")
    same = {name: config[name] for name in (*shared, "replica", "replicas", "logdir")}
    logger = SimpleNamespace(step=Actions(), add=lambda *_, **__: None, write=lambda: None, close=lambda: None)
    try:
        embodied.run.train(
            make_agent,
            make_replay,
            lambda index: theirs.make_env(config, index),
            lambda replay, mode: theirs.make_stream(config, replay, mode),
            lambda: logger,
            elements.Config(**config.run, **same),
        )
    except loops.Stop:
        pass
    params = sum(v.size for k, v in agents[0].params.items() if not k.startswith(("opt/", "slowval/", "retnorm/")))
    return watched, {"params": int(params), "versions": {"jax": jax.__version__}, "losses": losses}


def settings(loop: loops.Loop, options: argparse.Namespace, elements: Any, yaml: Any) -> Any:
    """The peer's defaults with the settings of the loop."""
    sizes = loops.SIZES["dreamerv3"]
    defaults = yaml.YAML(typ="safe").load((Path(options.repo) / "dreamerv3/configs.yaml").read_text())["defaults"]
    quiet = {"psutil": False, "nvsmi": False, "gputil": False, "malloc": False, "gc": False}
    cpu = {"platform": "cpu", "compute_dtype": "float32", "prealloc": False, "precompile": False, "profiler": False}
    return elements.Config({**defaults, "jax": {**defaults["jax"], **cpu}}).update(
        {
            r".*\.rssm": {name: sizes[name] for name in ("deter", "hidden", "stoch", "classes", "blocks")},
            r".*\.units": sizes["units"],
            r".*\.depth": loop.cnn_depth,
            "agent.opt.lr": loop.learning_rate,
            "agent.opt.warmup": loop.warmup,
            "agent.imag_loss.actent": loop.entropy_scale,
            "agent.report": False,
            "batch_size": loop.batch,
            "batch_length": loop.length,
            "report_length": loop.length,
            "seed": options.seed,
            "replay.size": 1e6,  # as in worldflux
            "run": {"train_ratio": loop.train_ratio, "envs": 1, "debug": True, "usage": quiet},
            "run.log_every": 0,
            "run.report_every": 0,
            "run.save_every": 0,
            "logdir": tempfile.mkdtemp(),
        }
    )


def recorded(agent: Any, every: int, found: list[dict[str, float]]) -> Any:
    """The agent's gradient step, which also appends the losses of every n-th step to `found`."""
    step = agent.train

    def train(carry: Any, data: Any) -> Any:
        carry, outs, metrics = step(carry, data)
        updates = int(agent.n_updates) - 1  # metrics are returned one call later
        if metrics and updates % every == 0:
            losses = {name: round(float(value), 5) for name, value in metrics.items() if np.ndim(value) == 0}
            found.append({"updates": updates, **losses})
        return carry, outs, metrics

    return train


if __name__ == "__main__":
    loops.run(__doc__, "danijar/dreamerv3", ("dreamerv3",), learn)
    sys.stdout.flush()
    os._exit(0)  # otherwise, threads of the peer would keep running
