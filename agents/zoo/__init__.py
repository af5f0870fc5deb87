"""DreamerV3 and TD-MPC2 for RL Baselines3 Zoo (rl_zoo3), as the algorithms `dreamerv3` and `tdmpc2`.

Importing this package registers both, with hyperparameters and search spaces of their own:

    python -m worldflux.agents.zoo train --algo dreamerv3 --env CartPole-v1
    python -m worldflux.agents.zoo enjoy --algo dreamerv3 --env CartPole-v1 --folder logs

These are `rl_zoo3.train` and `rl_zoo3.enjoy` with this import before them. `docs/rl_zoo3.md` has other ways, and says
which of the hyperparameters were measured.
"""

from worldflux.agents.zoo.algorithms import TDMPC2, DreamerV3
from worldflux.agents.zoo.registration import register

__all__ = ["TDMPC2", "DreamerV3"]

register()
