"""The standard suites by name: which tasks and games there are, and which of them each benchmark uses.

Names are lower case with dashes. Nothing is imported here, so that a list can be read where a suite is not installed.
"""

from __future__ import annotations

DMC_TASKS: dict[str, tuple[str, str]] = {
    "acrobot-swingup": ("acrobot", "swingup"),
    "acrobot-swingup-sparse": ("acrobot", "swingup_sparse"),
    "cartpole-balance": ("cartpole", "balance"),
    "cartpole-balance-sparse": ("cartpole", "balance_sparse"),
    "cartpole-swingup": ("cartpole", "swingup"),
    "cartpole-swingup-sparse": ("cartpole", "swingup_sparse"),
    "cartpole-three-poles": ("cartpole", "three_poles"),
    "cartpole-two-poles": ("cartpole", "two_poles"),
    "cheetah-run": ("cheetah", "run"),
    "cup-catch": ("ball_in_cup", "catch"),
    "dog-fetch": ("dog", "fetch"),
    "dog-run": ("dog", "run"),
    "dog-stand": ("dog", "stand"),
    "dog-trot": ("dog", "trot"),
    "dog-walk": ("dog", "walk"),
    "finger-spin": ("finger", "spin"),
    "finger-turn-easy": ("finger", "turn_easy"),
    "finger-turn-hard": ("finger", "turn_hard"),
    "fish-swim": ("fish", "swim"),
    "fish-upright": ("fish", "upright"),
    "hopper-hop": ("hopper", "hop"),
    "hopper-stand": ("hopper", "stand"),
    "humanoid-cmu-run": ("humanoid_CMU", "run"),
    "humanoid-cmu-stand": ("humanoid_CMU", "stand"),
    "humanoid-cmu-walk": ("humanoid_CMU", "walk"),
    "humanoid-run": ("humanoid", "run"),
    "humanoid-run-pure-state": ("humanoid", "run_pure_state"),
    "humanoid-stand": ("humanoid", "stand"),
    "humanoid-walk": ("humanoid", "walk"),
    "lqr-2-1": ("lqr", "lqr_2_1"),
    "lqr-6-2": ("lqr", "lqr_6_2"),
    "manipulator-bring-ball": ("manipulator", "bring_ball"),
    "manipulator-bring-peg": ("manipulator", "bring_peg"),
    "manipulator-insert-ball": ("manipulator", "insert_ball"),
    "manipulator-insert-peg": ("manipulator", "insert_peg"),
    "pendulum-swingup": ("pendulum", "swingup"),
    "pointmass-easy": ("point_mass", "easy"),
    "pointmass-hard": ("point_mass", "hard"),
    "quadruped-escape": ("quadruped", "escape"),
    "quadruped-fetch": ("quadruped", "fetch"),
    "quadruped-run": ("quadruped", "run"),
    "quadruped-walk": ("quadruped", "walk"),
    "reacher-easy": ("reacher", "easy"),
    "reacher-hard": ("reacher", "hard"),
    "stacker-2": ("stacker", "stack_2"),
    "stacker-4": ("stacker", "stack_4"),
    "swimmer-6": ("swimmer", "swimmer6"),
    "swimmer-15": ("swimmer", "swimmer15"),
    "walker-run": ("walker", "run"),
    "walker-stand": ("walker", "stand"),
    "walker-walk": ("walker", "walk"),
}
"""All tasks of dm_control's suite: our name, and the domain and task there."""

DMC_BENCHMARK: tuple[str, ...] = (
    "acrobot-swingup",
    "acrobot-swingup-sparse",
    "cartpole-balance",
    "cartpole-balance-sparse",
    "cartpole-swingup",
    "cartpole-swingup-sparse",
    "cheetah-run",
    "cup-catch",
    "finger-spin",
    "finger-turn-easy",
    "finger-turn-hard",
    "fish-swim",
    "fish-upright",
    "hopper-hop",
    "hopper-stand",
    "humanoid-run",
    "humanoid-stand",
    "humanoid-walk",
    "manipulator-bring-ball",
    "pendulum-swingup",
    "pointmass-easy",
    "reacher-easy",
    "reacher-hard",
    "swimmer-6",
    "swimmer-15",
    "walker-run",
    "walker-stand",
    "walker-walk",
)
"""The 28 tasks that dm_control tags as its benchmark (`suite.BENCHMARKING`)."""

DMC_TDMPC2: tuple[str, ...] = (
    "acrobot-swingup",
    "cartpole-balance",
    "cartpole-balance-sparse",
    "cartpole-swingup",
    "cartpole-swingup-sparse",
    "cheetah-run",
    "cup-catch",
    "dog-run",
    "dog-stand",
    "dog-trot",
    "dog-walk",
    "finger-spin",
    "finger-turn-easy",
    "finger-turn-hard",
    "fish-swim",
    "hopper-hop",
    "hopper-stand",
    "humanoid-run",
    "humanoid-stand",
    "humanoid-walk",
    "pendulum-swingup",
    "quadruped-run",
    "quadruped-walk",
    "reacher-easy",
    "reacher-hard",
    "walker-run",
    "walker-stand",
    "walker-walk",
)
"""The 28 tasks of dm_control's suite in TD-MPC2's results (its other 11 are tasks of its authors)."""

DMC_DREAMERV3_VISION: tuple[str, ...] = (
    "acrobot-swingup",
    "cartpole-balance",
    "cartpole-balance-sparse",
    "cartpole-swingup",
    "cartpole-swingup-sparse",
    "cheetah-run",
    "cup-catch",
    "finger-spin",
    "finger-turn-easy",
    "finger-turn-hard",
    "hopper-hop",
    "hopper-stand",
    "pendulum-swingup",
    "quadruped-run",
    "quadruped-walk",
    "reacher-easy",
    "reacher-hard",
    "walker-run",
    "walker-stand",
    "walker-walk",
)
"""The 20 tasks of DreamerV3's results from pixels."""

DMC_DREAMERV3_PROPRIO: tuple[str, ...] = tuple(
    name for name in DMC_DREAMERV3_VISION if not name.startswith("quadruped")
)
"""The 18 tasks of DreamerV3's results from state."""

ATARI_57: dict[str, str] = {
    "alien": "Alien",
    "amidar": "Amidar",
    "assault": "Assault",
    "asterix": "Asterix",
    "asteroids": "Asteroids",
    "atlantis": "Atlantis",
    "bank-heist": "BankHeist",
    "battle-zone": "BattleZone",
    "beam-rider": "BeamRider",
    "berzerk": "Berzerk",
    "bowling": "Bowling",
    "boxing": "Boxing",
    "breakout": "Breakout",
    "centipede": "Centipede",
    "chopper-command": "ChopperCommand",
    "crazy-climber": "CrazyClimber",
    "defender": "Defender",
    "demon-attack": "DemonAttack",
    "double-dunk": "DoubleDunk",
    "enduro": "Enduro",
    "fishing-derby": "FishingDerby",
    "freeway": "Freeway",
    "frostbite": "Frostbite",
    "gopher": "Gopher",
    "gravitar": "Gravitar",
    "hero": "Hero",
    "ice-hockey": "IceHockey",
    "jamesbond": "Jamesbond",
    "kangaroo": "Kangaroo",
    "krull": "Krull",
    "kung-fu-master": "KungFuMaster",
    "montezuma-revenge": "MontezumaRevenge",
    "ms-pacman": "MsPacman",
    "name-this-game": "NameThisGame",
    "phoenix": "Phoenix",
    "pitfall": "Pitfall",
    "pong": "Pong",
    "private-eye": "PrivateEye",
    "qbert": "Qbert",
    "riverraid": "Riverraid",
    "road-runner": "RoadRunner",
    "robotank": "Robotank",
    "seaquest": "Seaquest",
    "skiing": "Skiing",
    "solaris": "Solaris",
    "space-invaders": "SpaceInvaders",
    "star-gunner": "StarGunner",
    "surround": "Surround",
    "tennis": "Tennis",
    "time-pilot": "TimePilot",
    "tutankham": "Tutankham",
    "up-n-down": "UpNDown",
    "venture": "Venture",
    "video-pinball": "VideoPinball",
    "wizard-of-wor": "WizardOfWor",
    "yars-revenge": "YarsRevenge",
    "zaxxon": "Zaxxon",
}
"""The 57 games of the Arcade Learning Environment (ALE) benchmark: our name, and the ALE's."""

ATARI_100K: tuple[str, ...] = (
    "alien",
    "amidar",
    "assault",
    "asterix",
    "bank-heist",
    "battle-zone",
    "boxing",
    "breakout",
    "chopper-command",
    "crazy-climber",
    "demon-attack",
    "freeway",
    "frostbite",
    "gopher",
    "hero",
    "jamesbond",
    "kangaroo",
    "krull",
    "kung-fu-master",
    "ms-pacman",
    "pong",
    "private-eye",
    "qbert",
    "road-runner",
    "seaquest",
    "up-n-down",
)
"""The 26 games of the Atari 100k benchmark."""

_DMC_ALIASES = {"ball-in-cup": "cup", "point-mass": "pointmass"}


def dmc_name(name: str) -> str:
    """Our name of a task, from any spelling: "walker_walk", "ball_in_cup-catch", "stacker-stack_2"."""
    name = name.replace("_", "-").lower()
    for theirs, ours in _DMC_ALIASES.items():
        if name.startswith(f"{theirs}-"):
            name = ours + name.removeprefix(theirs)
    domain, _, task = name.partition("-")
    repeated = {"lqr": "lqr-", "stacker": "stack-", "swimmer": "swimmer"}.get(domain)
    if repeated is not None and task.startswith(repeated):
        task = task.removeprefix(repeated)
    return f"{domain}-{task}"


def atari_name(game: str) -> str:
    """Our name of a game, from "ms_pacman" too."""
    return game.replace("_", "-").lower()


def ale_id(game: str) -> str:
    """Gymnasium's id of a game in `ATARI_57`: "pong" is "ALE/Pong-v5"."""
    return f"ALE/{ATARI_57[game]}-v5"
