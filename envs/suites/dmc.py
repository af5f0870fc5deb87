"""The tasks of DeepMind Control as Gymnasium environments, observed as numbers or as pictures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldflux.envs.suites import DMC_TASKS, rendering
from worldflux.envs.wrappers import Size, checked_size
from worldflux.errors import ConfigurationError, MissingDependencyError, ShapeMismatchError, install_hint, nearest
from worldflux.validation import whole_number

Array = np.ndarray[Any, np.dtype[Any]]

_FAST_FLAGS = {"shadow": False, "reflection": False}

_DRAWN_DOMAINS = ("lqr",)
"""The domains whose model dm_control draws from the seed, too: the springs between the balls."""


class DMCEnv(gym.Env[Array, Array], gym.utils.EzPickle):
    """A task of dm_control's suite.

    An episode ends as *terminated* where dm_control's discount is 0, so that nothing beyond has a value (only in
    `lqr`), and as *truncated* at the task's time limit. If the simulation diverges, which MuJoCo
    answers by resetting it, the episode ends as truncated with the observation before, and
    `info["physics_error"]` says what happened.

    `reset(seed=n)` starts the same episodes as dm_control's own `suite.load(..., task_kwargs={"random": n})`.
    A pickled or copied environment is made anew from its arguments; the state of the simulation is not in it.

    Attributes:
        observation_space: The space of all entries of the task's observation in their order, flattened: `float32 [n]`.
            With `pixels`: `uint8 [height, width, 3]`.
        action_space: The task's own bounds, `float32 [A]`. Actions outside are clipped, because rewards count the
            control that was asked for while MuJoCo applies the clipped one.
        action_repeat: The number of the task's control steps in one step.
        max_episode_steps: The number of steps until the time limit, or None for a task without one (`lqr`).

    Args:
        name: One of `worldflux.envs.suites.DMC_TASKS`, such as `"walker-walk"`.
        pixels: Whether to observe a picture instead of the task's numbers.
        size: The size of the observed picture, a number for a square or `(height, width)`. None means 64.
        camera: The number or name of a camera in the task's model, -1 for the free camera. None is 2 for `quadruped`,
            whose camera 0 looks from far away, and 0 for all others, as in the papers' implementations.
        action_repeat: How often an action is applied. Rewards are summed; the end of the episode ends it early.
        render_mode: The render mode, `"rgb_array"` or None.
        render_size: The size of the pictures from `render()`, as `size`.
        fast_rendering: Whether to draw without shadows, reflections and multisampling, which is several times faster
            without a graphics card. The pictures differ, so it is for tests and never for results.

    Raises:
        ConfigurationError: If there is no such task or camera, or a number is out of range.
        MissingDependencyError: If dm_control is not installed, or nothing can draw the pictures that `pixels` needs.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012 (as gym.Env has it)

    def __init__(
        self,
        name: str,
        *,
        pixels: bool = False,
        size: Size | None = None,
        camera: int | str | None = None,
        action_repeat: int = 2,
        render_mode: str | None = None,
        render_size: Size = 480,
        fast_rendering: bool = False,
    ) -> None:
        gym.utils.EzPickle.__init__(
            self,
            name,
            pixels=pixels,
            size=size,
            camera=camera,
            action_repeat=action_repeat,
            render_mode=render_mode,
            render_size=render_size,
            fast_rendering=fast_rendering,
        )
        if name not in DMC_TASKS:
            raise ConfigurationError(
                f"Unknown task '{name}' of DeepMind Control{nearest(name, DMC_TASKS)} "
                "worldflux.envs.suites.DMC_TASKS lists all."
            )
        action_repeat = whole_number("action_repeat", action_repeat, 1)
        if render_mode not in (None, "rgb_array"):
            raise ConfigurationError(
                f"render_mode is {render_mode!r}, expected 'rgb_array' or None. "
                "gymnasium.wrappers.HumanRendering shows a window."
            )
        self.name, self.pixels, self.action_repeat, self.render_mode = name, pixels, action_repeat, render_mode
        self._size = checked_size(64 if size is None else size, "size")
        if size is not None and not pixels:
            raise ConfigurationError(
                f"size is {size!r}, and '{name}' observes numbers, not pictures: it would change nothing. Pass "
                "pixels=True (--pixels), or leave it out."
            )
        self._render_size = checked_size(render_size, "render_size")
        self._render_flags = _FAST_FLAGS if fast_rendering else {}
        self._fast_rendering = fast_rendering
        domain, _ = DMC_TASKS[name]
        self._views: dict[tuple[int, int], Any] = {}
        self._dmc = self._load()
        if pixels:
            rendering.check_backend()
        self._camera = _camera_number(self.physics, (2 if domain == "quadruped" else 0) if camera is None else camera)
        control_steps = self._dmc._step_limit  # dm_control has no public attribute for it
        self.max_episode_steps = (
            None if math.isinf(control_steps) else math.ceil(math.ceil(control_steps) / action_repeat)
        )
        fps = round(1.0 / (self._dmc.control_timestep() * action_repeat))
        self.metadata = {**type(self).metadata, "render_fps": max(fps, 1)}

        actions = self._dmc.action_spec()
        self._low, self._high = (np.broadcast_to(bound, actions.shape) for bound in (actions.minimum, actions.maximum))
        self.action_space = spaces.Box(self._low.astype(np.float32), self._high.astype(np.float32), dtype=np.float32)
        self.observation_space: spaces.Box
        if pixels:
            self.observation_space = spaces.Box(0, 255, (*self._size, 3), np.uint8)
        else:
            entries = self._dmc.observation_spec().values()
            numbers = sum(math.prod(entry.shape) for entry in entries)
            self.observation_space = spaces.Box(-np.inf, np.inf, (numbers,), np.float32)
        self._obs: Array | None = None  # the latest observation of an episode in flight

    @property
    def physics(self) -> Any:
        """dm_control's `Physics`, with MuJoCo's model and data."""
        self._check_open()
        return self._dmc.physics

    @property
    def task(self) -> Any:
        """dm_control's `Task`, which gives rewards and starting positions."""
        self._check_open()
        return self._dmc.task

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: The seed of the task's random numbers, from which all following episodes draw, too; None goes on with
                the present ones.
            options: Not used.

        Returns:
            The first observation, and an empty dictionary.

        Raises:
            ConfigurationError: If pictures are observed and cannot be drawn; see `render()`.
        """
        super().reset(seed=seed)
        self._obs = None
        if seed is not None:
            self._seed(seed)
        with _nothing_drawn(self.physics):
            time_step = self._dmc.reset()
        self._obs = self._observe(time_step.observation)
        return self._obs, {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Applies an action `action_repeat` times, or until the episode ends.

        Args:
            action: `[A]`, finite numbers; clipped to the bounds.

        Returns:
            The observation after the last repetition, the sum of the rewards, terminated, truncated, and a dictionary
            that is empty, or has `"physics_error"` if the simulation diverged.

        Raises:
            ShapeMismatchError: If the action has another shape or is not finite.
            ConfigurationError: If the episode is over.
        """
        if self._obs is None:
            self._check_open()
            raise ConfigurationError("step() was called before the first reset() or after the end of an episode.")
        control = self._control(action)
        reward = 0.0
        for _ in range(self.action_repeat):
            try:
                time_step = self._dmc.step(control)
            except _physics_error() as error:
                return self._end_diverged(reward, str(error))
            reward += float(time_step.reward or 0.0)
            if time_step.last():
                break
        obs = self._observe(time_step.observation)
        terminated = bool(time_step.last() and time_step.discount == 0)
        truncated = bool(time_step.last() and not terminated)
        self._obs = None if terminated or truncated else obs
        return obs, reward, terminated, truncated, {}

    def render(self) -> Any:
        """Draws a picture `uint8 [*render_size, 3]`; returns None, with a warning, without a `render_mode`.

        Raises:
            ConfigurationError: If this process was forked from one that had drawn, or the backend fails.
            MissingDependencyError: If there is no backend to draw with; the message names the system packages.
        """
        if self.render_mode is None:
            gym.logger.warn("render() draws nothing: make the environment with render_mode='rgb_array'.")
            return None
        return self._draw(self._render_size)

    def close(self) -> None:
        """Frees the simulation and its OpenGL context. Closing again does nothing; anything else is an error then."""
        if self._dmc is None:
            return
        self._free()
        self._dmc = self._obs = None

    def _load(self, random: Any = None) -> Any:
        """Loads dm_control's `Environment`, which draws its random numbers from `random`."""
        dmc = _load_task(*DMC_TASKS[self.name], random)
        # The frame buffer is made once, so it must be large enough for both sizes.
        visual = dmc.physics.model.vis
        visual.global_.offheight = max(visual.global_.offheight, self._size[0], self._render_size[0])
        visual.global_.offwidth = max(visual.global_.offwidth, self._size[1], self._render_size[1])
        if self._fast_rendering:
            visual.quality.offsamples = 0
        return dmc

    def _seed(self, seed: int) -> None:
        self._check_open()
        if DMC_TASKS[self.name][0] not in _DRAWN_DOMAINS:
            self.task.random.seed(_words(seed))
            return
        self._free()
        self._dmc = self._load(np.random.RandomState(_words(seed)))

    def _free(self) -> None:
        """Frees the simulation and its OpenGL context."""
        self._views.clear()
        # A context that was inherited through a fork belongs to the parent, and freeing it here could hang.
        if not rendering.drawn_before_fork():
            self._dmc.physics.free()

    def _check_open(self) -> None:
        if self._dmc is None:
            raise ConfigurationError(f"The environment '{self.name}' was closed. Make a new one.")

    def _control(self, action: Array) -> Array:
        """The action in the form that dm_control takes, `float64 [A]` within the bounds."""
        try:
            control = np.asarray(action, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ShapeMismatchError(
                f"The action is {action!r}, expected numbers of shape {self.action_space.shape}."
            ) from error
        if control.shape != self.action_space.shape:
            raise ShapeMismatchError(f"The action has shape {control.shape}, expected {self.action_space.shape}.")
        if not np.isfinite(control).all():
            raise ShapeMismatchError(f"The action is {control.tolist()}, expected finite numbers.")
        return np.clip(control, self._low, self._high)

    def _end_diverged(self, reward: float, message: str) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        # The observation after MuJoCo's reset is not what the action led to.
        last, self._obs = self._obs, None
        assert last is not None
        gym.logger.warn(f"The simulation of '{self.name}' diverged; the episode ends as truncated. {message}")
        return last.copy(), reward, False, True, {"physics_error": message}

    def _observe(self, entries: dict[str, Any]) -> Array:
        if self.pixels:
            return self._draw(self._size)
        return np.concatenate([np.ravel(entry) for entry in entries.values()]).astype(np.float32)

    def _draw(self, size: tuple[int, int]) -> Array:
        """Draws the present state into a new array `uint8 [*size, 3]`."""
        rendering.check_process()
        view = self._views.get(size)
        if view is None:
            view = self._views[size] = self._open_view(size)
        # dm_control returns its own buffer, upside down.
        return np.array(view.render(render_flag_overrides=self._render_flags), order="C")

    def _open_view(self, size: tuple[int, int]) -> Any:
        from dm_control.mujoco import engine

        physics = self.physics
        rendering.check_backend()
        rendering.mark_drawing()
        try:
            return engine.Camera(physics, height=size[0], width=size[1], camera_id=self._camera)
        except Exception as error:  # PyOpenGL, MuJoCo and dm_control each raise their own
            raise rendering.explain("MuJoCo cannot draw", error) from error


def drop_missing_fields(array_sizes: dict[str, dict[str, Any]], model: type, data: type) -> None:
    """Removes the fields that the installed MuJoCo lacks from dm_control's table of array sizes.

    dm_control's table is written for a version of MuJoCo, and it reads every field in it when a task is loaded.
    MuJoCo 4 no longer has some of them, which no task uses.

    Args:
        array_sizes: `dm_control.mujoco.wrapper.mjbindings.sizes.array_sizes`; changed in place.
        model: `mujoco.MjModel`.
        data: `mujoco.MjData`.
    """
    for struct, fields in ((model, array_sizes["mjmodel"]), (data, array_sizes["mjdata"])):
        for field in [field for field in fields if not hasattr(struct, field)]:
            del fields[field]


def _load_task(domain: str, task: str, random: Any) -> Any:
    """Loads a `dm_control.rl.control.Environment`, with the backend chosen before dm_control reads it."""
    rendering.choose_backend()
    try:
        import mujoco
        from dm_control import suite
        from dm_control.mujoco.wrapper.mjbindings import sizes
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"The tasks of DeepMind Control need dm-control (no module named '{error.name}'). "
            f"Install it with: {install_hint('dmc')}."
        ) from error
    except Exception as error:  # a backend that does not load can raise anything
        raise rendering.explain("dm_control cannot be imported", error) from error
    drop_missing_fields(sizes.array_sizes, mujoco.MjModel, mujoco.MjData)
    return suite.load(domain, task, task_kwargs={"random": random})


def _physics_error() -> type[Exception]:
    from dm_control.rl.control import PhysicsError

    return PhysicsError


@contextlib.contextmanager
def _nothing_drawn(physics: Any) -> Iterator[None]:
    """Keeps a task from making an OpenGL context, which it may not need or may not be allowed to make.

    `quadruped-escape` uploads its terrain to the context at the start of every episode, and makes one for it. The first
    picture makes one as well, and finds the terrain in the model.
    """
    physics._make_rendering_contexts = lambda: None
    try:
        yield
    finally:
        del physics._make_rendering_contexts


def _words(seed: int) -> int | list[int]:
    """A seed for NumPy's `RandomState`, which takes a number of 32 bits or a list of them."""
    if seed < 2**32:
        return seed
    return [(seed >> shift) % 2**32 for shift in range(0, seed.bit_length(), 32)]


def _camera_number(physics: Any, camera: int | str) -> int:
    """The number of a camera, from its number or name."""
    names = [physics.model.id2name(number, "camera") for number in range(physics.model.ncam)]
    number = names.index(camera) if camera in names else camera
    if isinstance(number, str) or not -1 <= number < len(names):
        raise ConfigurationError(
            f"camera is {camera!r}, expected 0 to {len(names) - 1} or one of {names}, or -1 for the free camera."
        )
    return number
