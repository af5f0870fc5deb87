"""Checks of what environments return, made before anything casts it.

SB3's `DummyVecEnv` and Gymnasium's vector environments write observations into arrays that the space describes: floats
in a `uint8` space become black pictures there, 300 becomes 44, and one number fills three. Nothing that comes later can
see that. Numbers that are stored as float32 lose their changes where they are too large for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv, VectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from worldflux.envs.processes import naming_the_ended
from worldflux.envs.spaces import Array, is_image
from worldflux.envs.taps import Tap, tapped
from worldflux.envs.vector import JoinedVecEnv, base_of
from worldflux.errors import ShapeMismatchError, WorkerError, a_type
from worldflux.replay.spec import LARGE, are_lost, is_wide, lost_changes

_MOST_LOOKS = 1000
"""The number of looks at large numbers after which their changes are trusted."""
_BEYOND = 1e38
"""The number from which on float32 may not hold a number at all."""

_CHANGE_SPACE = "Change what the environment returns, or its observation_space."


def _warn(problem: str) -> None:
    warnings.warn(problem, UserWarning, stacklevel=2)


class GivenValues:
    """Checks the observations and rewards of one environment, in the order in which it gives them.

    Attributes:
        check_obs: Checks an observation; raises a `ShapeMismatchError` if some of it would be lost in an array that the
            space describes, or in float32.

    Args:
        space: The space of the observations, one that `ObservationCodec` takes.
        say: A function that is called once for each number whose changes float32 loses; by default it warns.
    """

    def __init__(self, space: spaces.Space[Any], say: Callable[[str], None] = _warn) -> None:
        self._parts: dict[str, _GivenArray] = {}
        if isinstance(space, spaces.Dict):
            self._parts = {key: _GivenArray(part, f"observation '{key}'", say) for key, part in space.spaces.items()}
        self.check_obs = self._check_parts if self._parts else _GivenArray(space, "observation", say).check
        remedy = "Divide rewards, for example with gymnasium.wrappers.TransformReward."
        self._rewards = _Rounding("reward", remedy, say)

    def _check_parts(self, obs: Any) -> None:
        if not isinstance(obs, Mapping) or obs.keys() != self._parts.keys():
            kind = a_type(obs)
            given = f"keys {sorted(map(str, obs))}" if isinstance(obs, Mapping) else kind
            raise ShapeMismatchError(
                f"The observation is {given}, expected a dictionary with keys {sorted(self._parts)}, as the space "
                "says. Return exactly these, or change observation_space."
            )
        for key, part in self._parts.items():
            part.check(obs[key])

    def check_reward(self, reward: Any) -> None:
        """Checks a reward: a number, or an array of one.

        Raises:
            ShapeMismatchError: If it is neither, or beyond float32.
        """
        small = self._rewards.small
        try:
            if -small < reward < small:
                return
            number = np.array([reward], np.float64)
        except (TypeError, ValueError) as error:
            raise ShapeMismatchError(
                f"The reward is {reward!r}, expected one number. Change what step returns as its second value."
            ) from error
        except OverflowError:
            number = np.array([np.finfo(np.float64).max if reward > 0 else np.finfo(np.float64).min])
        self._rewards.look_at_large(number)


class _GivenArray:
    """Checks one array of the observations."""

    def __init__(self, space: spaces.Space[Any], name: str, say: Callable[[str], None]) -> None:
        self._name = name
        self._shape: tuple[int, ...] = tuple(space.shape or ())
        self._dtype = np.dtype(space.dtype)
        self._is_image = isinstance(space, spaces.Box) and is_image(space)
        self._is_numbers = isinstance(space, spaces.Box) and not self._is_image
        self._is_wide = self._is_numbers and is_wide(self._dtype)
        self._kinds = "" if self._is_image else "biuf" if self._is_numbers else "biu"
        self._options = range(0)
        if isinstance(space, spaces.Discrete):
            self._options = range(int(space.start), int(space.start + space.n))
        remedy = (
            "Subtract what stays the same, such as the time at which it began, or scale it, before it is observed: "
            "gymnasium.wrappers.TransformObservation does that."
        )
        self._rounding = _Rounding(name, remedy, say)

    def check(self, value: Any) -> None:
        """Raises a `ShapeMismatchError` unless the array that the space describes can hold the value."""
        if type(value) is np.ndarray:
            array = value
        elif isinstance(value, int | np.integer) and value in self._options:
            return
        else:
            try:
                array = np.asarray(value)
            except ValueError as error:  # rows of different lengths
                raise ShapeMismatchError(f"The {self._name} is no array: {error}") from error
        if array.shape != self._shape:
            raise ShapeMismatchError(
                f"The {self._name} has shape {array.shape}, expected {self._shape}, as the space says. {_CHANGE_SPACE}"
            )
        if array.dtype != self._dtype:
            self._check_cast(array)
            if self._is_numbers and is_wide(array.dtype):
                self._rounding.look(array)
        elif self._is_wide:
            self._rounding.look(array)

    def _check_cast(self, array: Array) -> None:
        """Checks that every number stays the same in the dtype of the space."""
        if array.dtype.kind not in self._kinds:
            remedy = "Pictures stay whole numbers from 0 to 255; the model scales them."
            raise ShapeMismatchError(
                f"The {self._name} has dtype {array.dtype}, expected {self._dtype}, as the space says. "
                f"{remedy if self._is_image else _CHANGE_SPACE}"
            )
        if self._dtype.kind == "f" and self._dtype.itemsize > 2:
            return
        with np.errstate(invalid="ignore", over="ignore"):
            cast = array.astype(self._dtype)
            differs = np.isinf(cast) & np.isfinite(array) if self._dtype.kind == "f" else cast != array
        if differs.any():
            at = tuple(int(index) for index in np.argwhere(differs)[0])
            raise ShapeMismatchError(
                f"The {self._name} holds {array[at]}{f' at index {list(at)}' if at else ''}, expected what "
                f"{self._dtype} can hold, as the space says. Change what the environment returns, or the dtype of "
                "its observation_space."
            )


class _Rounding:
    """Looks for numbers whose changes are lost in float32.

    Attributes:
        small: The size below which numbers need no look.

    Args:
        name: What the numbers are called in messages.
        remedy: What to do about lost changes.
        say: A function that is called with a message, once.
    """

    def __init__(self, name: str, remedy: str, say: Callable[[str], None]) -> None:
        self._name, self._remedy, self._say = name, remedy, say
        self._before: tuple[Array, Array] | None = None  # the last numbers, and what float32 makes of them
        self._changed = self._lost = np.zeros(0, np.int64)
        self._looks = 0
        self.small = LARGE

    def look(self, array: Array) -> None:
        """Looks at an array of numbers; most arrays have only small ones."""
        flat = array.reshape(-1)
        if flat.dtype != np.float64:
            flat = flat.astype(np.float64)
        if not flat.dot(flat) < self.small**2:
            self.look_at_large(flat)

    def look_at_large(self, numbers: Array) -> None:
        """Looks at numbers of which some are large.

        Args:
            numbers: The numbers. `float64 [K]`

        Raises:
            ShapeMismatchError: If one is beyond float32.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = numbers.astype(np.float32)
            beyond = np.isinf(rounded) & np.isfinite(numbers)
            if beyond.any():
                raise ShapeMismatchError(
                    f"The {self._name} holds {numbers[beyond][0]:g}, expected at most {np.finfo(np.float32).max:.2g}: "
                    f"it is stored as float32. {self._remedy}"
                )
            before, self._before = self._before, (numbers.copy(), rounded)
            if before is None or self.small > LARGE:
                return
            changed, lost = lost_changes(before[0], numbers, before[1], rounded)
        self._looks += 1
        if self._looks == 1:
            self._changed, self._lost = np.zeros((2, len(numbers)), np.int64)
        self._changed += changed
        self._lost += lost
        constant = are_lost(self._changed, self._lost)
        if self._looks == _MOST_LOOKS or constant.any():
            self.small = _BEYOND
        if constant.any():
            at = int(np.argmax(constant))
            place = f" at index {at}" if len(numbers) > 1 else ""
            self._say(
                f"The {self._name} is {numbers[at]:.10g}{place} and changes in steps that are lost: it is stored as "
                f"float32, which tells apart steps of {np.spacing(rounded[at]):g} there. {self._remedy}"
            )


# --- listening to environments that others put together


class _CheckedReset(Tap):
    def __init__(self, method: Callable[..., Any], given: GivenValues) -> None:
        super().__init__(method)
        self.given = given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.method(*args, **kwargs)
        if isinstance(result, tuple):  # otherwise its caller raises an error
            self.given.check_obs(result[0])
        return result


class _CheckedStep(_CheckedReset):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.method(*args, **kwargs)
        if isinstance(result, tuple):
            self.given.check_obs(result[0])
            self.given.check_reward(result[1])
        return result


class _HeardRemote:
    """The pipe to a process of `SubprocVecEnv`, which keeps the answer to a step or a reset until it is checked.

    Once the process has ended, sending and receiving raise a `WorkerError`, but closing does not.
    """

    def __init__(self, remote: Any, given: GivenValues, number: int, process: Any) -> None:
        self._remote, self._given, self._processes = remote, given, {number: process}
        # Forked processes hold the ends of each other's pipes, which therefore stay open when one of them ends.
        self._sentinel = process.sentinel if type(process).__name__ == "ForkProcess" else None
        self._asked = ""
        self._heard: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote, name)

    def send(self, message: Any) -> None:
        self._asked = message[0]
        try:
            with naming_the_ended(self._processes):
                self._remote.send(message)
        except WorkerError:
            if self._asked != "close":
                raise

    def recv(self) -> Any:
        if not self._asked:  # SB3 fetches the answer to a step that failed once more before it closes the processes
            return None
        try:
            with naming_the_ended(self._processes):
                if self._sentinel is not None and self._remote not in wait([self._remote, self._sentinel]):
                    raise EOFError
                answer = self._remote.recv()
        except WorkerError:
            self._asked = ""
            raise
        if self._asked in ("step", "reset"):
            self._heard = answer
        return answer

    def check(self) -> None:
        """Checks the last answer."""
        answer, self._heard = self._heard, None
        if answer is None:
            return
        if self._asked == "step":
            _, reward, done, info, _ = answer
            if done:
                self._given.check_obs(info["terminal_observation"])
            self._given.check_reward(reward)
        self._given.check_obs(answer[0])


class _CheckedAnswers(Tap):
    """A method of `SubprocVecEnv` that fetches answers. All of them are fetched before any is checked."""

    def __init__(self, method: Callable[..., Any], remotes: tuple[_HeardRemote, ...]) -> None:
        super().__init__(method)
        self.remotes = remotes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = self.method(*args, **kwargs)
        except Exception:  # such as arrays of different shapes that cannot be put together
            self._check()
            raise
        self._check()
        return result

    def _check(self) -> None:
        for remote in self.remotes:
            remote.check()


def check_what_is_given(envs: VecEnv | VectorEnv[Any, Any, Any]) -> None:
    """Makes resets and steps raise, from now on, where an environment gives what its space does not describe.

    That holds for environments in this process and in those of `SubprocVecEnv`. The processes of Gymnasium's
    `AsyncVectorEnv` cast what they give before anybody sees it.

    Args:
        envs: The outermost wrapper of what is stepped, with spaces that `ObservationCodec` takes.
    """
    base = base_of(envs)
    if isinstance(base, JoinedVecEnv):
        for member in base.members:
            check_what_is_given(member)
    elif isinstance(base, SubprocVecEnv):
        if not isinstance(base.remotes[0], _HeardRemote):
            base.remotes = tuple(
                _HeardRemote(remote, GivenValues(base.observation_space), number, process)
                for number, (remote, process) in enumerate(zip(base.remotes, base.processes, strict=True))
            )
        for name in ("reset", "step_wait"):
            tapped(base, name, _CheckedAnswers, base.remotes)
    elif isinstance(base, DummyVecEnv | SyncVectorEnv):
        space = base.observation_space if isinstance(base, DummyVecEnv) else base.single_observation_space
        if isinstance(base, DummyVecEnv) and type(base)._save_obs is not DummyVecEnv._save_obs:
            return  # it knows what its environments give
        for env in base.envs:
            given = tapped(env, "reset", _CheckedReset, GivenValues(space)).given
            tapped(env, "step", _CheckedStep, given)
