"""The standard suites by name: which tasks and games there are, and which of them each benchmark uses.

Names are lower case with dashes. Nothing is imported here, so that a list can be read where a suite is not installed.
"""

from __future__ import annotations

_DMC_ALIASES = {"ball-in-cup": "cup", "point-mass": "pointmass"}


def dmc_name(name: str) -> str:
    """The name of a task in worldflux, from any spelling: "walker_walk", "ball_in_cup-catch", "stacker-stack_2"."""
    name = name.replace("_", "-").lower()
    for theirs, ours in _DMC_ALIASES.items():
        if name.startswith(f"{theirs}-"):
            name = ours + name.removeprefix(theirs)
    domain, _, task = name.partition("-")
    repeated = {"lqr": "lqr-", "stacker": "stack-", "swimmer": "swimmer"}.get(domain)
    if repeated is not None and task.startswith(repeated):
        task = task.removeprefix(repeated)
    return f"{domain}-{task}"


_DMC_SUITE = {
    "acrobot": "swingup swingup_sparse",
    "cartpole": "balance balance_sparse swingup swingup_sparse three_poles two_poles",
    "cheetah": "run",
    "ball_in_cup": "catch",
    "dog": "fetch run stand trot walk",
    "finger": "spin turn_easy turn_hard",
    "fish": "swim upright",
    "hopper": "hop stand",
    "humanoid_CMU": "run stand walk",
    "humanoid": "run run_pure_state stand walk",
    "lqr": "lqr_2_1 lqr_6_2",
    "manipulator": "bring_ball bring_peg insert_ball insert_peg",
    "pendulum": "swingup",
    "point_mass": "easy hard",
    "quadruped": "escape fetch run walk",
    "reacher": "easy hard",
    "stacker": "stack_2 stack_4",
    "swimmer": "swimmer6 swimmer15",
    "walker": "run stand walk",
}
"""The tasks of each domain of dm_control's suite, as they are called there."""

DMC_TASKS: dict[str, tuple[str, str]] = {
    dmc_name(f"{domain}-{task}"): (domain, task) for domain, tasks in _DMC_SUITE.items() for task in tasks.split()
}
"""All tasks of dm_control's suite: the name in worldflux, and the domain and task there."""

DMC_BENCHMARK: tuple[str, ...] = tuple(
    """
    acrobot-swingup acrobot-swingup-sparse cartpole-balance cartpole-balance-sparse cartpole-swingup
    cartpole-swingup-sparse cheetah-run cup-catch finger-spin finger-turn-easy finger-turn-hard fish-swim
    fish-upright hopper-hop hopper-stand humanoid-run humanoid-stand humanoid-walk manipulator-bring-ball
    pendulum-swingup pointmass-easy reacher-easy reacher-hard swimmer-6 swimmer-15 walker-run walker-stand
    walker-walk
    """.split()
)
"""The 28 tasks that dm_control tags as its benchmark (`suite.BENCHMARKING`)."""

DMC_TDMPC2: tuple[str, ...] = tuple(
    """
    acrobot-swingup cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse cheetah-run
    cup-catch dog-run dog-stand dog-trot dog-walk finger-spin finger-turn-easy finger-turn-hard fish-swim hopper-hop
    hopper-stand humanoid-run humanoid-stand humanoid-walk pendulum-swingup quadruped-run quadruped-walk
    reacher-easy reacher-hard walker-run walker-stand walker-walk
    """.split()
)
"""The 28 tasks of dm_control's suite in TD-MPC2's results (its other 11 are tasks of its authors)."""

DMC_DREAMERV3_VISION: tuple[str, ...] = tuple(
    """
    acrobot-swingup cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse cheetah-run
    cup-catch finger-spin finger-turn-easy finger-turn-hard hopper-hop hopper-stand pendulum-swingup quadruped-run
    quadruped-walk reacher-easy reacher-hard walker-run walker-stand walker-walk
    """.split()
)
"""The 20 tasks of DreamerV3's results from pixels."""

DMC_DREAMERV3_PROPRIO: tuple[str, ...] = tuple(
    name for name in DMC_DREAMERV3_VISION if not name.startswith("quadruped")
)
"""The 18 tasks of DreamerV3's results from state."""

ATARI_57: dict[str, str] = {
    game: game.title().replace("-", "")
    for game in """
    alien amidar assault asterix asteroids atlantis bank-heist battle-zone beam-rider berzerk bowling boxing
    breakout centipede chopper-command crazy-climber defender demon-attack double-dunk enduro fishing-derby freeway
    frostbite gopher gravitar hero ice-hockey jamesbond kangaroo krull kung-fu-master montezuma-revenge ms-pacman
    name-this-game phoenix pitfall pong private-eye qbert riverraid road-runner robotank seaquest skiing solaris
    space-invaders star-gunner surround tennis time-pilot tutankham up-n-down venture video-pinball wizard-of-wor
    yars-revenge zaxxon
    """.split()
}
"""The 57 games of the Arcade Learning Environment (ALE) benchmark: the name in worldflux, and the ALE's."""

ATARI_100K: tuple[str, ...] = tuple(
    """
    alien amidar assault asterix bank-heist battle-zone boxing breakout chopper-command crazy-climber demon-attack
    freeway frostbite gopher hero jamesbond kangaroo krull kung-fu-master ms-pacman pong private-eye qbert
    road-runner seaquest up-n-down
    """.split()
)
"""The 26 games of the Atari 100k benchmark."""


def atari_name(game: str) -> str:
    """The name of a game in worldflux, from "ms_pacman" too."""
    return game.replace("_", "-").lower()


def ale_id(game: str) -> str:
    """Gymnasium's id of a game in `ATARI_57`: "pong" is "ALE/Pong-v5"."""
    return f"ALE/{ATARI_57[game]}-v5"
