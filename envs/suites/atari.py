"""Atari games under the two protocols that world models are compared on.

| setting | `"standard"` (57 games) | `"100k"` (26 games) |
| --- | --- | --- |
| image | 96x96 grey | 64x64 colour |
| sticky actions | with probability 0.25 | none |
| actions | all 18 | those that the game uses |

Both repeat an action for 4 frames, take the maximum of the last two, begin with up to 30 no-ops, play until the game is
over or 108,000 frames have passed, and leave rewards as they are. The settings are those of DreamerV3's published
configuration (danijar/dreamerv3, `configs.yaml`, `env.atari` and `env.atari100k`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
from gymnasium.error import DependencyNotInstalled
from gymnasium.wrappers import AtariPreprocessing

from worldflux.envs.suites import ATARI_57, ale_id, atari_name
from worldflux.errors import ConfigurationError, MissingDependencyError, install_hint, nearest


@dataclass(frozen=True)
class AtariProtocol:
    """The settings in which the two benchmarks differ."""

    screen_size: int
    """The side of the image in pixels."""
    grayscale_obs: bool
    """Whether observations have one channel of luminance instead of three of colour."""
    repeat_action_probability: float
    """The chance, in each frame, that the game receives the previous action again (sticky actions)."""
    full_action_space: bool
    """Whether all 18 actions of the console are offered instead of those that the game uses."""


PROTOCOLS = {
    "standard": AtariProtocol(
        screen_size=96, grayscale_obs=True, repeat_action_probability=0.25, full_action_space=True
    ),
    "100k": AtariProtocol(screen_size=64, grayscale_obs=False, repeat_action_probability=0.0, full_action_space=False),
}

MAX_FRAMES = 108_000
"""The most frames of an episode in both protocols: 30 minutes of play."""


class AtariFrames(AtariPreprocessing):
    """Gymnasium's preprocessing with the last frames of an episode in its last observation.

    Gymnasium's own `step` leaves the loop before it reads the screen on which a game ends, so that the final
    observation repeats earlier ones. Replay keeps final observations, and a model learns to end the game from them.

    Takes the arguments of `AtariPreprocessing`; the wrapped environment gives the frames that are pooled, grey ones
    where `grayscale_obs` is set.
    """

    @property
    def action_repeat(self) -> int:
        """The number of frames for each decision."""
        return self.frame_skip

    @property
    def max_episode_steps(self) -> int | None:
        """The most decisions in an episode, None without a limit; no-ops count as frames, so some are shorter."""
        frames = int(self.ale.getInt("max_num_frames_per_episode"))
        return -(-frames // self.frame_skip) if frames > 0 else None

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Repeats the action, and stops early if the episode ends."""
        total, terminated, truncated = 0.0, False, False
        info: dict[str, Any] = {}
        frames: list[Any] = []
        for _ in range(self.frame_skip):
            frame, reward, terminated, truncated, info = self.env.step(action)
            frames.append(frame)
            total += float(reward)
            lives = self.ale.lives()
            if self.terminal_on_life_loss and lives < self.lives:
                terminated = True
            self.lives, self.game_over = lives, terminated
            if terminated or truncated:
                break
        # Where an episode ends on the first frame of a decision, that frame stands alone.
        self.obs_buffer = [frames[-1], frames[-2] if len(frames) > 1 else frames[-1]]
        return self._get_obs(), total, terminated, truncated, info


def register_ale() -> None:
    """Makes ALE's own ids, such as `"ALE/Pong-v5"`, known to Gymnasium, and ALE quiet.

    Raises:
        MissingDependencyError: If ale-py is not installed.
    """
    try:
        import ale_py
    except ImportError as error:
        raise MissingDependencyError(
            f"Atari environments need ale-py. Install it with: {install_hint('atari')}."
        ) from error
    gym.register_envs(ale_py)
    # This setting is static, so it also silences the banner of the first game.
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


def make_atari(
    game: str,
    *,
    protocol: str = "standard",
    screen_size: int | tuple[int, int] | None = None,
    frame_skip: int = 4,
    noop_max: int = 30,
    grayscale_obs: bool | None = None,
    terminal_on_life_loss: bool = False,
    repeat_action_probability: float | None = None,
    full_action_space: bool | None = None,
    max_num_frames_per_episode: int = MAX_FRAMES,
    render_mode: str | None = None,
) -> AtariFrames:
    """Makes an Atari game; options are named as in ALE and in Gymnasium's `AtariPreprocessing`.

    Observations are images `uint8 [H, W, C]`; `info["lives"]` counts the lives that are left. An episode that reaches
    the limit of frames is truncated, one whose game is over is terminated.

    Args:
        game: The game, such as `"ms-pacman"`.
        protocol: The protocol, `"standard"` or `"100k"`; it gives the value of each option that is None.
        screen_size: The side of the image, or `(width, height)`. The models take 48 to 256 in multiples of 16.
        frame_skip: The number of frames for each decision.
        noop_max: The most frames without an action with which an episode begins; 0 starts at the game's own beginning.
        grayscale_obs: Whether observations have one channel of luminance instead of three of colour.
        terminal_on_life_loss: Whether each lost life ends the episode. Neither protocol does so.
        repeat_action_probability: The probability of sticky actions, for each frame.
        full_action_space: Whether all 18 actions are offered instead of those that the game uses.
        max_num_frames_per_episode: The number of frames, no-ops included, after which an episode is truncated.
        render_mode: `"rgb_array"` for the game's own picture, `"human"` for a window.

    Raises:
        ConfigurationError: If the game or the protocol is unknown, or an option cannot be used.
        MissingDependencyError: If ale-py is not installed, or OpenCV cannot be loaded.
    """
    if protocol not in PROTOCOLS:
        raise ConfigurationError(f"The Atari protocol is {protocol!r}, expected one of {', '.join(PROTOCOLS)}.")
    given: dict[str, Any] = {
        "screen_size": screen_size,
        "grayscale_obs": grayscale_obs,
        "repeat_action_probability": repeat_action_probability,
        "full_action_space": full_action_space,
    }
    settings = {name: getattr(PROTOCOLS[protocol], name) if value is None else value for name, value in given.items()}
    if not 0.0 <= settings["repeat_action_probability"] <= 1.0:
        raise ConfigurationError(
            f"repeat_action_probability is {settings['repeat_action_probability']}, expected a probability from 0 to 1."
        )
    if atari_name(game) not in ATARI_57:
        raise ConfigurationError(
            f"Unknown Atari game '{game}'{nearest(game, ATARI_57)} worldflux.envs.suites.ATARI_57 has all."
        )
    register_ale()
    env = gym.make(
        ale_id(atari_name(game)),
        # The passive checker would look at every frame, and the outermost environment is the one to check.
        disable_env_checker=True,
        # Frames are pooled as ALE gives them: colours channel by channel, or the luminance of its palette.
        obs_type="grayscale" if settings["grayscale_obs"] else "rgb",
        frameskip=1,
        repeat_action_probability=settings["repeat_action_probability"],
        full_action_space=settings["full_action_space"],
        max_num_frames_per_episode=max_num_frames_per_episode,
        render_mode=render_mode,
    )
    try:
        return AtariFrames(
            env,
            noop_max=noop_max,
            frame_skip=frame_skip,
            screen_size=settings["screen_size"],
            terminal_on_life_loss=terminal_on_life_loss,
            grayscale_obs=settings["grayscale_obs"],
            grayscale_newaxis=True,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigurationError(f"The Atari environment cannot be made: {error}.") from error
    except DependencyNotInstalled as error:
        raise MissingDependencyError(
            f"Atari environments need OpenCV, which cannot be loaded: {error.__cause__}. "
            "Where opencv-python is installed, a slim machine lacks libgl1: apt-get install libgl1."
        ) from error
