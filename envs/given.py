"""What environments give, looked at before anybody casts it.

SB3's `DummyVecEnv` and Gymnasium's vector environments write observations into arrays that their space describes: there
floats in a `uint8` space become black pictures, 300 becomes 44, and one number fills three. What follows later sees
only what is left. And whatever is stored as float32 loses the changes of numbers that are too large for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv, VectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from worldflux.envs.spaces import Array, is_image
from worldflux.envs.taps import Tap, tapped
from worldflux.envs.vector import GymnasiumVecEnv, innermost
from worldflux.errors import ShapeMismatchError

_LARGE = 8192.0
"""From here on float32 tells apart steps of a thousandth and more."""
_NOISE = 1e-13
"""Changes that are smaller than this share of a number are the rounding of float64."""
_LOST_CHANGES = 5
"""Before anything is said of them."""
_MOST_LOOKS = 1000
"""At numbers that float32 has told apart so far."""
_ALL_BUT_BEYOND = 1e38
"""After that, only what float32 may not hold at all needs a look."""


class GivenValues:
    """Checks the observations and rewards of one environment, in the order in which it gives them.

    Args:
        space: Of its observations; one that `ObservationCodec` takes.
        say: Hears once of each number whose changes float32 loses; by default this is a warning.
    """

    def __init__(self, space: spaces.Space[Any], say: Callable[[str], None] | None = None) -> None:
        self._say = say
        self._parts: dict[str, _GivenArray] = {}
        if isinstance(space, spaces.Dict):
            self._parts = {key: _GivenArray(part, f"observation '{key}'") for key, part in space.spaces.items()}
        self._whole = None if self._parts else _GivenArray(space, "observation")
        self._rewards = _Rounding("reward", "Divide rewards, for example with gymnasium.wrappers.TransformReward.")

    def check_obs(self, obs: Any) -> None:
        """Looks at an observation.

        Raises:
            ShapeMismatchError: If something of it would be lost in an array that the space describes, or in float32.
        """
        if self._whole is not None:
            problem = self._whole.check(obs)
            if problem is not None:
                self._tell(problem)
            return
        if not isinstance(obs, Mapping) or obs.keys() != self._parts.keys():
            given = f"keys {sorted(map(str, obs))}" if isinstance(obs, Mapping) else _kind(obs)
            raise ShapeMismatchError(
                f"The observation is {given}, expected a dictionary with keys {sorted(self._parts)}, as the space "
                "says. Return exactly these, or change observation_space."
            )
        for key, part in self._parts.items():
            problem = part.check(obs[key])
            if problem is not None:
                self._tell(problem)

    def check_reward(self, reward: Any) -> None:
        """Looks at a reward: a number, or an array of one.

        Raises:
            ShapeMismatchError: If it is none, or beyond float32.
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
        problem = self._rewards.see(number)
        if problem is not None:
            self._tell(problem)

    def _tell(self, problem: str) -> None:
        if self._say is None:
            warnings.warn(problem, UserWarning, stacklevel=2)
        else:
            self._say(problem)


class _GivenArray:
    """Checks one array of the observations."""

    def __init__(self, space: spaces.Space[Any], name: str) -> None:
        self._name = name
        self._shape: tuple[int, ...] = tuple(space.shape or ())
        self._dtype = np.dtype(space.dtype)
        self._is_image = isinstance(space, spaces.Box) and is_image(space)
        self._kinds = "" if self._is_image else "biuf" if isinstance(space, spaces.Box) else "biu"
        self._is_stored_as_numbers = isinstance(space, spaces.Box) and not self._is_image
        self._is_wide = self._is_stored_as_numbers and _is_wide(self._dtype)
        self._first = self._end = 0  # of the options of a single choice
        if isinstance(space, spaces.Discrete):
            self._first, self._end = int(space.start), int(space.start + space.n)
        self._rounding = _Rounding(
            name,
            "Subtract what stays the same, such as the time at which it began, or scale it, before it is observed: "
            "gymnasium.wrappers.TransformObservation does that.",
        )

    def check(self, value: Any) -> str | None:
        """What is to be said of its changes, which is nothing mostly."""
        if type(value) is np.ndarray:
            array = value
        elif isinstance(value, int | np.integer) and self._first <= value < self._end:
            return None
        else:
            array = self._as_array(value)
        if array.shape != self._shape:
            raise ShapeMismatchError(
                f"The {self._name} has shape {array.shape}, expected {self._shape}, as the space says. Change what "
                "the environment returns, or its observation_space."
            )
        if array.dtype == self._dtype:
            return self._rounding.look(array) if self._is_wide else None
        self._check_cast(array)
        return self._rounding.look(array) if self._is_stored_as_numbers and _is_wide(array.dtype) else None

    def _as_array(self, value: Any) -> Array:
        try:
            return np.asarray(value)
        except ValueError as error:  # rows of different lengths
            raise ShapeMismatchError(f"The {self._name} is no array: {error}") from error

    def _check_cast(self, array: Array) -> None:
        """Whether every number stays what it is in the dtype of the space."""
        if array.dtype.kind not in self._kinds:
            hint = "Pictures stay whole numbers from 0 to 255; the model scales them." if self._is_image else ""
            raise ShapeMismatchError(
                f"The {self._name} has dtype {array.dtype}, expected {self._dtype}, as the space says. "
                f"{hint or 'Change what the environment returns, or its observation_space.'}"
            )
        if self._dtype.kind == "f":
            return
        with np.errstate(invalid="ignore"):
            differs = array.astype(self._dtype) != array
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
        small: Numbers below this need no look.

    Args:
        name: Of what is looked at.
        remedy: What to do about it.
    """

    def __init__(self, name: str, remedy: str) -> None:
        self._name, self._remedy = name, remedy
        self._before: tuple[Array, Array] | None = None  # the last numbers, and what float32 makes of them
        self._changed = self._lost = np.zeros(0, np.int64)
        self._looks = 0
        self.small = _LARGE

    def look(self, array: Array) -> str | None:
        """Looks at an array of numbers; most have only small ones."""
        flat = array.reshape(-1)
        if flat.dtype != np.float64:
            flat = flat.astype(np.float64)
        return None if flat.dot(flat) < self.small**2 else self.see(flat)

    def see(self, numbers: Array) -> str | None:
        """Looks at numbers of which some are large.

        Args:
            numbers: `float64 [K]`

        Returns:
            What is to be said of them, once.

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
            if before is None or self.small > _LARGE:
                return None
            size = np.abs(numbers)
            changed = np.abs(numbers - before[0]) > _NOISE * size
            lost = changed & (rounded == before[1]) & (size >= _LARGE)
        self._looks += 1
        if self._looks == 1:
            self._changed, self._lost = np.zeros((2, len(numbers)), np.int64)
        self._changed += changed
        self._lost += lost
        constant = (self._lost >= _LOST_CHANGES) & (2 * self._lost > self._changed)
        if self._looks == _MOST_LOOKS or constant.any():
            self.small = _ALL_BUT_BEYOND
        if not constant.any():
            return None
        at = int(np.argmax(constant))
        place = f" at index {at}" if len(numbers) > 1 else ""
        return (
            f"The {self._name} is {numbers[at]:.10g}{place} and changes in steps that are lost: it is stored as "
            f"float32, which tells apart steps of {np.spacing(rounded[at]):g} there. {self._remedy}"
        )


def _is_wide(dtype: np.dtype[Any]) -> bool:
    """Whether float32 does not hold all numbers of a dtype."""
    return dtype.itemsize > (4 if dtype.kind == "f" else 2)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


# --- listening to environments that others put together


class _CheckedReset(Tap):
    def __init__(self, method: Callable[..., Any], given: GivenValues) -> None:
        super().__init__(method)
        self.given = given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.method(*args, **kwargs)
        if isinstance(result, tuple):  # else its caller complains
            self.given.check_obs(result[0])
        return result


class _CheckedStep(_CheckedReset):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        if isinstance(result, tuple):
            self.given.check_reward(result[1])
        return result


class _HeardRemote:
    """The pipe to a process of `SubprocVecEnv`; it keeps what came back from a step or a reset.

    Attributes:
        heard: The last such answer, until somebody takes it.
        given: Checks what the environment gives.
    """

    def __init__(self, remote: Any, given: GivenValues) -> None:
        self._remote = remote
        self._asked = ""
        self.heard: Any = None
        self.given = given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote, name)

    def send(self, message: Any) -> None:
        self._asked = message[0]
        self._remote.send(message)

    def recv(self) -> Any:
        answer = self._remote.recv()
        if self._asked in ("step", "reset"):
            self.heard = answer
        return answer

    def check(self) -> None:
        """Looks at the last answer."""
        answer, self.heard = self.heard, None
        if answer is None:
            return
        if self._asked == "step":
            _, reward, done, info, _ = answer
            if done:
                self.given.check_obs(info["terminal_observation"])
            self.given.check_reward(reward)
        self.given.check_obs(answer[0])


class _CheckedAnswers(Tap):
    """A method of `SubprocVecEnv` that fetches answers. All are fetched before one is complained of."""

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
    """From now on, resets and steps raise where an environment gives what its space does not describe.

    That is so for environments in this process and in those of `SubprocVecEnv`. The processes of Gymnasium's
    `AsyncVectorEnv` cast what they give before anybody sees it.

    Args:
        envs: With spaces that `ObservationCodec` takes; outermost wrapper of what is stepped.
    """
    base: Any = envs if isinstance(envs, VectorEnv) else innermost(envs)
    if isinstance(base, GymnasiumVecEnv):
        base = base.vector_env
    if isinstance(base, VectorEnv):
        base = base.unwrapped
    if isinstance(base, SubprocVecEnv):
        if not isinstance(base.remotes[0], _HeardRemote):
            base.remotes = tuple(_HeardRemote(remote, GivenValues(base.observation_space)) for remote in base.remotes)
        for name in ("reset", "step_wait"):
            tapped(base, name, _CheckedAnswers, base.remotes)
    elif isinstance(base, DummyVecEnv | SyncVectorEnv):
        space = base.observation_space if isinstance(base, DummyVecEnv) else base.single_observation_space
        if isinstance(base, DummyVecEnv) and type(base)._save_obs is not DummyVecEnv._save_obs:
            return  # it knows what its environments give
        for env in base.envs:
            given = tapped(env, "reset", _CheckedReset, GivenValues(space)).given
            tapped(env, "step", _CheckedStep, given)
