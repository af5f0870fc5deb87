"""`WorldFluxAgent` with the arguments of SB3's algorithms, which rl_zoo3 builds from a file of hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import LinearSchedule

from worldflux.accel import ranks
from worldflux.agents.agent import WorldFluxAgent
from worldflux.agents.settings import AgentSettings, Rate
from worldflux.agents.zoo.upstream import SimpleLinearSchedule
from worldflux.config import DreamerV3Config, TDMPC2Config, WorldModelConfig
from worldflux.errors import ConfigurationError, TrainingError, nearest
from worldflux.factory import find_preset
from worldflux.models.base import WorldModel


class DivergedError(TrainingError, ValueError):
    """Raised when a loss is not finite. A `ValueError` makes rl_zoo3's search give up the trial."""


class ZooAgent(WorldFluxAgent):
    """An agent of one family of models, whose arguments have the names and kinds that rl_zoo3 gives them.

    Args:
        policy: A preset's name, with or without the family before it ("dreamerv3:tiny" or "tiny"); or whatever
            `WorldFluxAgent` takes as its model.
        env: As for `WorldFluxAgent`.
        policy_kwargs: Fields of the preset's configuration to override (`model_kwargs` of `WorldFluxAgent`).
        learning_rate: As for `WorldFluxAgent`, or the schedule that rl_zoo3 makes of `lin_1e-3`.
        **settings: The other settings of `WorldFluxAgent`.

    Raises:
        ConfigurationError: If a setting is unknown, or the model is of another family.
    """

    config_class: ClassVar[type[WorldModelConfig]]

    def __init__(
        self,
        policy: str | Path | WorldModel,
        env: GymEnv | str | None,
        *,
        policy_kwargs: Mapping[str, Any] | None = None,
        learning_rate: Rate | None = None,
        _init_setup_model: bool = True,
        **settings: Any,
    ) -> None:
        self._check_names(settings)
        super().__init__(
            self._with_family(policy),
            env,
            model_kwargs=policy_kwargs,
            learning_rate=_as_sb3_has_it(learning_rate),
            _init_setup_model=_init_setup_model,
            **settings,
        )

    def learn(self, *args: Any, **kwargs: Any) -> Any:
        """As `WorldFluxAgent.learn`.

        Raises:
            DivergedError: If a loss is not finite; it names the loss and the step.
        """
        try:
            return super().learn(*args, **kwargs)
        except TrainingError as error:
            raise DivergedError(str(error)) from error

    def save(self, *args: Any, **kwargs: Any) -> None:
        """As `WorldFluxAgent.save`; says whether the agent that rl_zoo3 saves at the end of a run is untrained."""
        super().save(*args, **kwargs)
        if not self._n_updates and self._learning is None:
            ranks.say("the agent is untrained (0 gradient steps)")

    def _setup_model(self) -> None:
        super()._setup_model()
        found = self.model.config.model_type
        if not isinstance(self.model.config, self.config_class):
            raise ConfigurationError(
                f"The model is of the family {found}, expected {self._family()}. Use --algo {found}."
            )

    @classmethod
    def _family(cls) -> str:
        return cls.config_class.model_type

    @classmethod
    def _with_family(cls, policy: Any) -> Any:
        """The full name of a preset that is given without its family; anything else unchanged."""
        full = f"{cls._family()}:{policy}"
        return full if isinstance(policy, str) and find_preset(full) else policy

    @classmethod
    def _check_names(cls, settings: Mapping[str, Any]) -> None:
        own = {item.name for item in fields(AgentSettings)} | {"device", "policy_kwargs"}
        for name in settings:
            if name in own:
                continue
            if name in {item.name for item in fields(cls.config_class)}:
                raise ConfigurationError(f"'{name}' is a field of the model. Write it into policy_kwargs.")
            raise ConfigurationError(f"Unknown hyperparameter '{name}' of {cls._family()}{nearest(name, own)}")


class DreamerV3(ZooAgent):
    """rl_zoo3's algorithm `dreamerv3`."""

    config_class = DreamerV3Config


class TDMPC2(ZooAgent):
    """rl_zoo3's algorithm `tdmpc2`."""

    config_class = TDMPC2Config


def _as_sb3_has_it(learning_rate: Any) -> Any:
    """SB3's schedule in place of rl_zoo3's, because an agent's file can hold it."""
    if isinstance(learning_rate, SimpleLinearSchedule):
        return LinearSchedule(learning_rate.initial_value, 0.0, 1.0)
    return learning_rate
