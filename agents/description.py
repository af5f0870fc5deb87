"""What the file of an agent says of it besides its model: spaces, settings and counters, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gymnasium import spaces

from worldflux.agents.numbers import count, finite_number
from worldflux.agents.rates import rate_from_json, rate_to_json
from worldflux.agents.settings import AgentSettings
from worldflux.envs.spaces_json import space_from_json, space_to_json
from worldflux.errors import CheckpointError, ConfigurationError

LOOP_COUNTERS = ("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_episode_num")
"""Attributes of an agent that go on counting after loading."""

COUNTERS = (*LOOP_COUNTERS, "_n_updates", "_updates_owed")
"""These and what its `Learner` goes on counting."""


_LATER_SETTINGS = {"compile"}
"""That the first files of this format lack."""

_PLACES = ("buffer_storage", "tensorboard_log")
"""Settings that say where to write. They are those of the machine that an agent was saved on, and no file decides on
where its reader writes."""
_ELSEWHERE = "elsewhere"
"""What a file says of replay data that did not lie in memory."""

MOST_ENVS = 2**20
LARGEST_COUNTER = 2**48
"""No count in a file is that large."""


@dataclass(frozen=True)
class AgentDescription:
    """An agent without its model and optimiser."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    n_envs: int
    settings: AgentSettings
    counters: Mapping[str, int]
    """By the names in `COUNTERS`."""
    progress_remaining: float
    """1 at the beginning of a call of `learn`, 0 at its end."""
    schedule: Mapping[str, int | None]
    """Where `UpdateSchedule` stands."""
    stored_elsewhere: bool
    """Whether the replay data lay on a disk or a device."""

    def to_json(self) -> dict[str, Any]:
        """What `from_json` builds an equal description from."""
        return {
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "n_envs": self.n_envs,
            "settings": {
                **vars(self.settings),
                **dict.fromkeys(_PLACES),
                "learning_rate": rate_to_json(self.settings.learning_rate),
                "buffer_storage": _ELSEWHERE if self.stored_elsewhere else None,
            },
            "counters": dict(self.counters),
            "progress_remaining": self.progress_remaining,
            "schedule": dict(self.schedule),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: object) -> AgentDescription:
        """The description that `to_json` turned into JSON.

        Args:
            data: Its content.
            source: Named in errors.

        Raises:
            CheckpointError: If something is missing, or no agent can have such a value.
        """
        try:
            return cls(
                observation_space=space_from_json(data["observation_space"]),
                action_space=space_from_json(data["action_space"]),
                n_envs=count("n_envs", data["n_envs"], 1, below=MOST_ENVS),
                settings=_settings(data["settings"]),
                counters={name: count(name, data["counters"][name], 0, below=LARGEST_COUNTER) for name in COUNTERS},
                progress_remaining=finite_number("progress_remaining", data["progress_remaining"]),
                schedule={
                    "env_steps": _whole_or_none("schedule: env_steps", data["schedule"]["env_steps"]),
                    "handed_out": count(
                        "schedule: handed_out", data["schedule"]["handed_out"], 0, below=LARGEST_COUNTER
                    ),
                },
                stored_elsewhere=data["settings"].get("buffer_storage") not in (None, "memory"),
            )
        except KeyError as error:
            raise CheckpointError(f"{source} is damaged: its agent.json has no {error}.") from error
        except (CheckpointError, ConfigurationError, AttributeError, ArithmeticError, TypeError) as error:
            raise CheckpointError(f"{source} is damaged. In its agent.json: {error}") from error


def _settings(data: Mapping[str, Any]) -> AgentSettings:
    """Settings as they were saved, without places; one that came later than the file takes its default."""
    names = [item.name for item in fields(AgentSettings) if item.name not in _PLACES]
    known = [name for name in names if name in data or name not in _LATER_SETTINGS]
    return AgentSettings(
        **{**{name: data[name] for name in known}, "learning_rate": rate_from_json(data["learning_rate"])}
    )


def _whole_or_none(name: str, value: Any) -> int | None:
    return None if value is None else count(name, value, 0, below=LARGEST_COUNTER)
