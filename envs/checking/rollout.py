"""The checks of one environment: what is done with it, and what follows from that."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.utils.env_checker import data_equivalence

from worldflux.config import DreamerV3Config, TDMPC2Config
from worldflux.envs.checking import report as names
from worldflux.envs.checking.others import PlainNumbers, is_unimportant
from worldflux.envs.checking.report import Check, CheckReport
from worldflux.envs.checking.stored import limit_unlike, lost_in_float32, names_alike, saved_otherwise, stored_otherwise
from worldflux.envs.checking.values import (
    extreme_actions,
    is_number,
    kind,
    mismatch,
    one_line,
    parts,
    plain_text,
    same_bytes,
)
from worldflux.envs.spaces import ActionCodec, ObservationCodec
from worldflux.envs.wrappers import max_episode_steps
from worldflux.errors import ConfigurationError

_KEPT_FOR = 8
"""The number of observations that are watched for changes at a time; buffers that are used in turn have fewer."""

_SEED_HINT = " Call super().reset(seed=seed) in reset(), and draw all randomness from self.np_random."


class _Step(NamedTuple):
    """The result of a step; a reset has an observation and nothing else."""

    observation: Any
    reward: Any = None
    terminated: Any = None
    truncated: Any = None

    @property
    def is_reset(self) -> bool:
        return self.reward is None

    @property
    def is_over(self) -> bool:
        return bool(self.terminated or self.truncated)


class _StopRollout(Exception):
    """The environment cannot be stepped on; the reason has been noted."""


class EnvChecker:
    """Checks one environment and notes what it finds.

    Args:
        name: What the environment is called in the report.
        env: The environment to check.
        make: A function that makes another instance of it.
        steps: The number of random actions.
        seed: The seed of the environment and of the actions.
    """

    def __init__(
        self, name: str, env: gym.Env[Any, Any], make: Callable[[], gym.Env[Any, Any]], steps: int, seed: int
    ) -> None:
        self.name, self.env, self.make, self.seed = name, env, make, seed
        self._results: dict[str, Check] = {}
        self._advice: dict[str, None] = {}
        self._obs_space, self._action_space = env.observation_space, copy.deepcopy(env.action_space)
        self._action_space.seed(seed)
        self._actions = [self._action_space.sample() for _ in range(steps)]

    def report(self) -> CheckReport:
        """The checks that were made and their results."""
        checks = tuple(self._results[name] for name in names.ORDER if name in self._results)
        return CheckReport(self.name, checks, tuple(self._advice))

    def run(self, render: bool) -> None:
        """Makes every check that the earlier ones leave possible."""
        supported = self._check_spaces()
        trace = self._check_steps()
        if trace is not None:
            self._check_repeats(names.SEEDS, self.env, trace)
            self._check_instances(trace)
            self._check_last_observation(trace)
            self._advise_on_episodes(trace)
            self._advise_on_seeds(trace)
            if supported:
                self._check_stored(trace)
                self._check_every_action()
            if render:
                self._check_rendering()
        with self._external(names.GYMNASIUM):
            # Checking other render modes opens windows; checking close() makes instances, which not every wrapper can.
            gymnasium_check_env(PlainNumbers(self.env), skip_render_check=True, skip_close_check=True)
        if supported:  # otherwise SB3's checker objects to the same spaces, less clearly
            from stable_baselines3.common.env_checker import check_env as sb3_check_env

            with self._external(names.SB3):
                sb3_check_env(PlainNumbers(self.env), skip_render_check=True)

    def _fail(self, name: str, problem: str) -> None:
        """Notes that a check failed; its first problem is kept."""
        if name not in self._results or self._results[name].passed:
            self._results[name] = Check(name, False, problem)

    def _pass(self, name: str, detail: str = "") -> None:
        """Notes that a check passed, unless it has failed."""
        self._results.setdefault(name, Check(name, True, detail))

    def _judge(self, name: str, problem: str | None) -> None:
        """Notes the result of a check that returns its problem."""
        if problem is None:
            self._pass(name)
        else:
            self._fail(name, problem)

    def _advise(self, text: str | None) -> None:
        if text is not None:
            self._advice.setdefault(text)

    # Spaces

    def _check_spaces(self) -> bool:
        """Whether worldflux supports the spaces, and its models take the shapes that they become."""
        try:
            obs_codec, action_codec = ObservationCodec(self._obs_space), ActionCodec(self._action_space)
        except ConfigurationError as error:
            self._fail(names.SPACES, str(error))
            return False
        shapes = f"observations {obs_codec.obs_shape}, actions ({action_codec.action_dim},) in the library"
        self._pass(names.SPACES, shapes)
        self._check_models(obs_codec, action_codec)
        self._judge(names.SAVED, saved_otherwise(self._obs_space, self._action_space))
        self._advise(names_alike(self._obs_space))
        for name, space in parts(self._obs_space):
            if isinstance(space, spaces.Box) and space.dtype == np.float64:
                self._advise(f"The {name} is float64; float32 is what the library stores and half the size.")
        return True

    def _check_models(self, obs_codec: ObservationCodec, action_codec: ActionCodec) -> None:
        """Checks that a family takes the shapes; objections of the other are advice."""
        refusals: dict[str, str] = {}
        families: dict[str, type[DreamerV3Config | TDMPC2Config]] = {
            "DreamerV3": DreamerV3Config,
            "TD-MPC2": TDMPC2Config,
        }
        for family, config in families.items():
            try:
                config.from_size(
                    "tiny",
                    obs_shape=obs_codec.obs_shape,
                    obs_classes=obs_codec.obs_classes,
                    action_dim=action_codec.action_dim,
                    action_type=action_codec.action_type,
                    action_classes=action_codec.action_classes,
                )
            except ConfigurationError as error:
                refusals[family] = str(error)
        if len(refusals) == len(families):
            self._fail(names.MODELS, refusals["DreamerV3"])
            return
        self._pass(names.MODELS, "" if not refusals else f"{' and '.join(families.keys() - refusals)} only")
        for family, refusal in refusals.items():
            self._advise(f"{family} does not take these shapes: {refusal}")

    # Steps

    def _check_steps(self) -> list[_Step] | None:
        """Plays the actions and looks at everything on the way; None if not all of them could be played."""
        try:
            trace = self._inspected_rollout()
        except _StopRollout:
            return None
        for name in (names.RESET, names.OBSERVATIONS, names.REWARDS, names.FLAGS, names.LAST, names.KEPT):
            self._pass(name)
        return trace

    def _inspected_rollout(self) -> list[_Step]:
        """Copies of what every reset and step returned."""
        kept: deque[tuple[str, Any, Any]] = deque(maxlen=_KEPT_FOR)  # origin, the object returned, a copy of it
        trace: list[_Step] = []

        def keep(step: _Step, origin: str) -> None:
            before = copy.deepcopy(step.observation)
            kept.append((origin, step.observation, before))
            trace.append(step._replace(observation=before))

        keep(self._reset(self.seed), "reset()")
        for t, action in enumerate(self._actions):
            step, info = self._step(action, t)
            keep(step, f"step {t}")
            if step.is_over:
                self._look_for_own_reset(info, t)
                keep(self._reset(None), f"the reset after step {t}")
            for origin, given, before in kept:
                if not same_bytes(given, before):
                    later = " or the reset after it" if step.is_over else ""
                    self._fail(
                        names.KEPT,
                        f"The observation of {origin} was changed by step {t}{later}. "
                        "Replay keeps what it is given: return a new array each time, for example obs.copy().",
                    )
        return trace

    def _look_for_own_reset(self, info: Mapping[str, Any], t: int) -> None:
        for key in ("final_obs", "final_observation", "terminal_observation"):
            if key in info:
                self._fail(
                    names.LAST,
                    f"The info of step {t}, which ended an episode, has '{key}': the environment resets itself, and "
                    "the observation is the next episode's. Return the last one of the episode that ended, and leave "
                    "the next one to reset().",
                )

    def _reset(self, seed: int | None) -> _Step:
        try:
            result = self.env.reset(seed=seed)
        except Exception as error:
            hint = "It takes the keywords seed and options."
            self._fail(names.RESET, f"reset(seed={seed}) raised {one_line(error)}. {hint}")
            raise _StopRollout from error
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
            expected = "(observation, info) with a dictionary info"
            self._fail(names.RESET, f"reset() returned {kind(result)}, expected {expected}.")
            raise _StopRollout
        problem = mismatch(self._obs_space, result[0])
        if problem is not None:
            self._fail(names.RESET, f"After reset(), {problem}")
        return _Step(result[0])

    def _step(self, action: Any, t: int) -> tuple[_Step, Mapping[str, Any]]:
        """Steps, and checks everything that the step returned."""
        when, handed_over = f"step {t}", copy.deepcopy(action)
        try:
            result = self.env.step(handed_over)
        except Exception as error:
            self._fail(names.OBSERVATIONS, f"The action {action!r} at {when} raised {one_line(error)}.")
            raise _StopRollout from error
        if not isinstance(result, tuple) or len(result) != 5 or not isinstance(result[4], Mapping):
            self._fail(
                names.OBSERVATIONS,
                f"step() returned {kind(result)}, expected (observation, reward, terminated, truncated, info) with "
                "a dictionary info.",
            )
            raise _StopRollout
        obs, reward, terminated, truncated, info = result
        if not same_bytes(handed_over, action):
            self._fail(
                names.KEPT,
                f"step() changed the action that it was given at {when} from {action!r} to {handed_over!r}. "
                "Replay keeps actions: work on a copy.",
            )
        problem = mismatch(self._obs_space, obs)
        if problem is not None:
            self._fail(names.OBSERVATIONS, f"At {when}, {problem}")
        if not is_number(reward):
            given = f"The reward of {when} is {reward!r} ({kind(reward)})"
            self._fail(names.REWARDS, f"{given}, expected one finite number: a float.")
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                given = f"{name} of {when} is {flag!r} ({kind(flag)})"
                self._fail(names.FLAGS, f"{given}, expected True or False: bool(...).")
            if np.ndim(flag) > 0:  # it cannot be told whether the episode is over
                raise _StopRollout
        return _Step(obs, reward, terminated, truncated), info

    def _check_stored(self, trace: list[_Step]) -> None:
        """Checks that a replay buffer holds what was observed, if that was sound."""
        sound = (names.RESET, names.OBSERVATIONS, names.REWARDS, names.KEPT)
        if all(self._results[name].passed for name in sound):
            problem = lost_in_float32(self._obs_space, [(step.observation, step.reward) for step in trace])
            self._judge(names.STORED, problem or stored_otherwise(self.env, self._actions, self.seed))

    # Seeds

    def _check_instances(self, trace: list[_Step]) -> None:
        try:
            other = self.make()
        except Exception as error:
            self._advise(
                f"A second instance could not be made to compare with ({one_line(error)}). "
                "Pass the class, or a function that makes the environment."
            )
            return
        try:
            self._check_repeats(names.INSTANCES, other, trace)
        finally:
            other.close()

    def _check_repeats(self, name: str, env: gym.Env[Any, Any], trace: list[_Step]) -> None:
        """Checks that the same seed and actions bring the same again."""
        if env.spec is not None and env.spec.nondeterministic:
            self._advise("The environment is registered as not deterministic, so its seeds were not checked.")
            return
        again = self._replayed(env, self.seed, len(self._actions), name)
        if again is None:
            return
        same = f"With seed {self.seed} and the same actions, "
        if len(again) != len(trace):
            self._fail(name, f"{same}episodes ended at other steps.{_SEED_HINT}")
            return
        made = 0  # steps
        for before, now in zip(trace, again, strict=True):
            made += not before.is_reset
            for field in _Step._fields:
                one, other = getattr(before, field), getattr(now, field)
                if not data_equivalence(one, other):
                    after_reset = "after a reset" if made else "of reset()"
                    when = after_reset if before.is_reset else f"of step {made - 1}"
                    self._fail(name, f"{same}the {field} {when} is another one.{_SEED_HINT}")
                    return
                if not data_equivalence(one, other, exact=True):
                    self._advise(f"With one seed, {field}s agree to five digits and not in every bit.")
        self._pass(name, f"over {len(self._actions)} steps")

    def _replayed(self, env: gym.Env[Any, Any], seed: int, steps: int, name: str) -> list[_Step] | None:
        """Plays the first of the actions once more without any checks; None where that failed."""
        try:
            trace = [_Step(copy.deepcopy(env.reset(seed=seed)[0]))]
            for action in self._actions[:steps]:
                obs, reward, terminated, truncated, _ = env.step(copy.deepcopy(action))
                trace.append(_Step(copy.deepcopy(obs), reward, terminated, truncated))
                if terminated or truncated:
                    trace.append(_Step(copy.deepcopy(env.reset()[0])))
        except Exception as error:
            self._fail(name, f"Actions that were accepted before raised {one_line(error)} the second time.")
            return None
        return trace

    def _advise_on_seeds(self, trace: list[_Step]) -> None:
        few = min(10, len(self._actions))
        other = self._replayed(self.env, self.seed + 1, few, names.SEEDS)
        if other is not None and data_equivalence(other, trace[: len(other)]):
            self._advise(
                f"Seeds {self.seed} and {self.seed + 1} bring the same. That is right for an environment without "
                "chance; otherwise draw from self.np_random."
            )

    # Ends of episodes

    def _check_last_observation(self, trace: list[_Step]) -> None:
        """Checks that the step that ends an episode does not reset the environment.

        Seen from outside, such a step gives the observation that a reset in its place gives. If a reset in place of the
        step before gives that step's observation, too, observations are drawn anew each time, and both are the same
        draw. Where all episodes begin alike, or have a single step, the task itself may be so, and this is only advice.
        """
        end = next((t for t, step in enumerate(trace) if step.is_over), None)
        if end is None or not self._resembles_reset(trace, end):
            return
        last, first = trace[end].observation, trace[0].observation
        if data_equivalence(trace[end - 1].observation, last) or (end > 1 and self._resembles_reset(trace, end - 1)):
            return
        text = (
            f"The observation of step {end - 1}, which ended an episode, is what reset() gives in its place: step() "
            "seems to reset the environment. Return the last observation of the episode that ended."
        )
        if end == 1 or data_equivalence(first, last, exact=True):
            self._advise(text)
        else:
            self._fail(names.LAST, text)

    def _resembles_reset(self, trace: list[_Step], t: int) -> bool:
        """Whether a reset in place of the `t`-th step of the first episode gives the observation of that step."""
        until = self._replayed(self.env, self.seed, t - 1, names.LAST)
        if until is None or len(until) != t:
            return False
        return bool(data_equivalence(trace[t].observation, self.env.reset()[0], exact=True))

    def _advise_on_episodes(self, trace: list[_Step]) -> None:
        resets = [t for t, step in enumerate(trace) if step.is_reset]
        episodes = [trace[start + 1 : end] for start, end in zip(resets, [*resets[1:], len(trace)], strict=True)]
        if any(step.terminated and step.truncated for step in trace):
            self._advise("A step was terminated and truncated at once; it counts as terminated.")
        ended = [episode for episode in episodes if episode and episode[-1].is_over]
        lengths = {len(episode) for episode in ended}
        always_terminated = all(episode[-1].terminated and not episode[-1].truncated for episode in ended)
        if len(ended) >= 3 and len(lengths) == 1 and always_terminated and lengths != {1}:
            self._advise(
                f"Every episode was terminated after {lengths.pop()} steps. A time limit is reported as truncated: "
                "what lies beyond it is worth something."
            )
        for text in limit_unlike(self.env, max(map(len, episodes))):
            self._advise(text)
        if not ended and max_episode_steps(self.env) is None:
            self._advise(
                f"No episode ended within {len(self._actions)} steps, and no time limit was found. If nothing ends "
                "episodes, use gymnasium.wrappers.TimeLimit."
            )

    # Actions and pictures

    def _check_every_action(self) -> None:
        """Steps with each option and with both ends of each bound, as the library hands them over."""
        over = True
        for index, action in enumerate(extreme_actions(ActionCodec(self._action_space))):
            try:
                if over:
                    self.env.reset(seed=None if index else self.seed)
                over = any(self.env.step(action)[2:4])
            except Exception as error:
                self._fail(
                    names.ACTIONS,
                    f"The action {action!r} raised {one_line(error)}. Everything in {self._action_space} must be "
                    "accepted, its bounds included.",
                )
                return
        self._pass(names.ACTIONS)

    def _check_rendering(self) -> None:
        if self.env.render_mode != "rgb_array":
            self._advise(f"Pictures were not checked: the render_mode is {self.env.render_mode!r}, not 'rgb_array'.")
            return
        try:
            self.env.reset(seed=self.seed)
            picture: Any = self.env.render()
        except Exception as error:
            self._fail(names.RENDERING, f"render() raised {one_line(error)}.")
            return
        is_array = isinstance(picture, np.ndarray) and picture.dtype == np.uint8
        if not is_array or picture.ndim != 3 or picture.shape[2] != 3:
            self._fail(names.RENDERING, f"render() gave {kind(picture)}, expected a uint8 array (height, width, 3).")
            return
        self._pass(names.RENDERING, f"{picture.shape[0]}x{picture.shape[1]}")

    # The checkers of Gymnasium and SB3

    @contextmanager
    def _external(self, name: str) -> Iterator[None]:
        """Turns the errors and warnings of another checker into lines of the report."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except Exception as error:
                if not is_unimportant(str(error)):
                    self._fail(name, f"{plain_text(error) if isinstance(error, AssertionError) else one_line(error)}.")
        for warning in caught:
            text = plain_text(warning.message)
            if issubclass(warning.category, UserWarning) and not is_unimportant(text):
                self._advise(f"{name}: {text}.")
        self._pass(name)
