"""The protocols of the papers for each suite: tasks, environments, budget, and scores.

Steps are steps of the simulator, as on the axes of the papers, and include those that `action_repeat` repeats.
docs/environments.md lists the sources of the numbers under "Settings of the published results".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from worldflux.envs.suites import (
    ATARI_57,
    ATARI_100K,
    DMC_DREAMERV3_PROPRIO,
    DMC_DREAMERV3_VISION,
    DMC_TDMPC2,
)


@dataclass(frozen=True)
class Protocol:
    """The protocol of one model family for one suite."""

    name: str
    """Name of the protocol and of its published curves, such as "dreamerv3_dmc_proprio"."""
    title: str
    environment: str
    """Prefix that turns the name of a task into a name for `make_env`, such as "dmc/"."""
    tasks: tuple[str, ...]
    action_repeat: int
    steps: int
    """Steps of a run."""
    envs: int
    """Number of parallel environments."""
    score: Literal["training", "evaluation"]
    """Scored episodes: training episodes with sampled actions, or evaluations with deterministic actions."""
    window: int = 0
    """Steps over which training episodes are averaged."""
    eval_every: int = 0
    """Steps between evaluations."""
    eval_episodes: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `make_env`."""
    frame_stack: int = 1
    """Number of stacked images in an observation."""

    @property
    def family(self) -> str:
        """The model family to which the protocol applies."""
        return self.name.partition("_")[0]

    def anchors(self, task: str) -> tuple[float, float]:
        """The scores that are normalised to 0 and 1."""
        return (0.0, 1000.0) if self.environment == "dmc/" else RANDOM_AND_HUMAN[task]


_PIXELS = {"pixels": True, "action_repeat": 2}

DMC = {
    "proprio": (
        Protocol(
            "dreamerv3_dmc_proprio",
            "DeepMind Control from state, DreamerV3's protocol",
            "dmc/",
            DMC_DREAMERV3_PROPRIO,
            action_repeat=1,
            steps=500_000,
            envs=16,
            score="training",
            window=25_000,
            options={"action_repeat": 1},
        ),
        Protocol(
            "tdmpc2_dmc_proprio",
            "DeepMind Control from state, TD-MPC2's protocol",
            "dmc/",
            DMC_TDMPC2,
            action_repeat=2,
            steps=4_000_000,
            envs=1,
            score="evaluation",
            eval_every=100_000,
            eval_episodes=10,
            options={"action_repeat": 2},
        ),
    ),
    "vision": (
        Protocol(
            "dreamerv3_dmc_vision",
            "DeepMind Control from pixels, DreamerV3's protocol",
            "dmc/",
            DMC_DREAMERV3_VISION,
            action_repeat=2,
            steps=1_000_000,
            envs=8,
            score="training",
            window=25_000,
            options=_PIXELS,
        ),
        Protocol(
            "tdmpc2_dmc_vision",
            "DeepMind Control from pixels, TD-MPC2's protocol",
            "dmc/",
            (
                "acrobot-swingup",
                "cartpole-swingup-sparse",
                "cheetah-run",
                "finger-spin",
                "finger-turn-easy",
                "finger-turn-hard",
                "quadruped-run",
                "quadruped-walk",
                "reacher-easy",
                "reacher-hard",
                "walker-run",
                "walker-walk",
            ),
            action_repeat=2,
            steps=2_000_000,
            envs=1,
            score="evaluation",
            eval_every=100_000,
            eval_episodes=10,
            options=_PIXELS,
            frame_stack=3,
        ),
    ),
}
"""Protocols of each family, keyed by suite."""

ATARI = {
    "atari100k": (
        Protocol(
            "dreamerv3_atari100k",
            "Atari 100k, DreamerV3's protocol",
            "atari100k/",
            ATARI_100K,
            action_repeat=4,
            steps=400_000,
            envs=1,
            score="training",
            window=40_000,
        ),
    ),
    "atari57": (
        Protocol(
            "dreamerv3_atari57",
            "Atari, 57 games with sticky actions, DreamerV3's protocol",
            "atari/",
            tuple(ATARI_57),
            action_repeat=4,
            steps=200_000_000,
            envs=16,
            score="training",
            window=4_000_000,
        ),
    ),
}
"""Protocols of each family, keyed by suite. TD-MPC2 does not support discrete actions."""

PROTOCOLS = {protocol.name: protocol for suites in (DMC, ATARI) for of in suites.values() for protocol in of}

RANDOM_AND_HUMAN: dict[str, tuple[float, float]] = {
    "alien": (227.8, 7127.7),
    "amidar": (5.8, 1719.5),
    "assault": (222.4, 742.0),
    "asterix": (210.0, 8503.3),
    "asteroids": (719.1, 47388.7),
    "atlantis": (12850.0, 29028.1),
    "bank-heist": (14.2, 753.1),
    "battle-zone": (2360.0, 37187.5),
    "beam-rider": (363.9, 16926.5),
    "berzerk": (123.7, 2630.4),
    "bowling": (23.1, 160.7),
    "boxing": (0.1, 12.1),
    "breakout": (1.7, 30.5),
    "centipede": (2090.9, 12017.0),
    "chopper-command": (811.0, 7387.8),
    "crazy-climber": (10780.5, 35829.4),
    "defender": (2874.5, 18688.9),
    "demon-attack": (152.1, 1971.0),
    "double-dunk": (-18.6, -16.4),
    "enduro": (0.0, 860.5),
    "fishing-derby": (-91.7, -38.7),
    "freeway": (0.0, 29.6),
    "frostbite": (65.2, 4334.7),
    "gopher": (257.6, 2412.5),
    "gravitar": (173.0, 3351.4),
    "hero": (1027.0, 30826.4),
    "ice-hockey": (-11.2, 0.9),
    "jamesbond": (29.0, 302.8),
    "kangaroo": (52.0, 3035.0),
    "krull": (1598.0, 2665.5),
    "kung-fu-master": (258.5, 22736.3),
    "montezuma-revenge": (0.0, 4753.3),
    "ms-pacman": (307.3, 6951.6),
    "name-this-game": (2292.3, 8049.0),
    "phoenix": (761.4, 7242.6),
    "pitfall": (-229.4, 6463.7),
    "pong": (-20.7, 14.6),
    "private-eye": (24.9, 69571.3),
    "qbert": (163.9, 13455.0),
    "riverraid": (1338.5, 17118.0),
    "road-runner": (11.5, 7845.0),
    "robotank": (2.2, 11.9),
    "seaquest": (68.4, 42054.7),
    "skiing": (-17098.1, -4336.9),
    "solaris": (1236.3, 12326.7),
    "space-invaders": (148.0, 1668.7),
    "star-gunner": (664.0, 10250.0),
    "surround": (-10.0, 6.5),
    "tennis": (-23.8, -8.3),
    "time-pilot": (3568.0, 5229.2),
    "tutankham": (11.4, 167.6),
    "up-n-down": (533.4, 11693.2),
    "venture": (0.0, 1187.5),
    "video-pinball": (16256.9, 17667.9),
    "wizard-of-wor": (563.5, 4756.5),
    "yars-revenge": (3092.9, 54576.9),
    "zaxxon": (32.5, 9173.3),
}
"""Scores of random actions and of a professional tester in each game, with up to 30 no-ops at the start.

The numbers are those of DeepMind's papers (Wang et al., 2016, arXiv:1511.06581), taken from google-deepmind/dqn_zoo,
`dqn_zoo/atari_data.py`, commit 359945d.
"""
