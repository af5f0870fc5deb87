"""What the loop wants to know of the environments that it steps."""

from __future__ import annotations

from typing import Any

from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecTransposeImage

from worldflux.envs.vector import GymnasiumVecEnv, innermost
from worldflux.envs.wrappers import LIMIT_NAMES, max_episode_steps, smallest_limit, stated_frames


def steps_elsewhere(venv: VecEnv) -> bool:
    """Whether a step is made by other processes, so that this one can work between `step_async` and `step_wait`."""
    base = innermost(venv)
    if isinstance(base, GymnasiumVecEnv):
        return isinstance(base.vector_env.unwrapped, AsyncVectorEnv)
    return isinstance(base, SubprocVecEnv)


def stands_for(venv: VecEnv, env: object) -> bool:
    """Whether `venv` is what an agent makes of `env`: itself, or wrapped in what SB3 and worldflux put around it."""
    layer: Any = venv
    while layer is not env:
        if isinstance(layer, VecTransposeImage):
            layer = layer.venv
        elif isinstance(layer, GymnasiumVecEnv):
            layer = layer.vector_env
        elif isinstance(layer, DummyVecEnv) and layer.num_envs == 1:
            layer = layer.envs[0]
        elif isinstance(layer, Monitor):
            layer = layer.env
        else:
            return False
    return True


def max_vec_episode_steps(venv: VecEnv) -> int | None:
    """Steps after which each environment cuts its episodes; None where it does not say.

    Of environments in other processes only the outermost limit of each name is known.
    """
    base = innermost(venv)
    envs = base.vector_env.unwrapped if isinstance(base, GymnasiumVecEnv) else base
    if isinstance(envs, DummyVecEnv | SyncVectorEnv):
        return max_episode_steps(envs.envs[0])
    stated = [_of_the_first(venv, name) for name in LIMIT_NAMES]
    if not isinstance(base, SubprocVecEnv):  # whose processes die of a specification that cannot be pickled
        stated.append(getattr(_of_the_first(venv, "spec"), "max_episode_steps", None))
    return smallest_limit(stated)


def frames_per_vec_step(venv: VecEnv) -> int:
    """Frames that a step of each environment takes, by the attribute `action_repeat`; 1 where there is none."""
    return stated_frames(_of_the_first(venv, "action_repeat"))


def _of_the_first(venv: VecEnv, name: str) -> Any:
    """An attribute of the first environment; None where it has none of that name, or cannot be asked."""
    try:
        return venv.get_attr(name, indices=[0])[0] if venv.has_attr(name) else None
    except (AttributeError, TypeError, LookupError, NotImplementedError):
        # What SB3's wrapper class is put around may be no VecEnv, and have none of its methods, or others.
        return None
