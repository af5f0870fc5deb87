"""What the loop wants to know of the environments that it steps."""

from __future__ import annotations

from gymnasium.vector import AsyncVectorEnv
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from worldflux.envs.vector import GymnasiumVecEnv


def steps_elsewhere(venv: VecEnv) -> bool:
    """Whether a step is made by other processes, so that this one can work between `step_async` and `step_wait`."""
    base = venv.unwrapped
    if isinstance(base, GymnasiumVecEnv):
        return isinstance(base.vector_env.unwrapped, AsyncVectorEnv)
    return isinstance(base, SubprocVecEnv)


def max_vec_episode_steps(venv: VecEnv) -> int | None:
    """Steps after which each environment cuts its episodes; None where it does not say."""
    if venv.has_attr("max_episode_steps"):
        steps = venv.get_attr("max_episode_steps", indices=[0])[0]
        return None if steps is None else int(steps)
    spec = venv.get_attr("spec", indices=[0])[0] if venv.has_attr("spec") else None
    return None if spec is None else spec.max_episode_steps


def frames_per_vec_step(venv: VecEnv) -> int:
    """Frames that a step of each environment takes, by the attribute `action_repeat`; 1 where there is none."""
    if not venv.has_attr("action_repeat"):
        return 1
    return int(venv.get_attr("action_repeat", indices=[0])[0])
