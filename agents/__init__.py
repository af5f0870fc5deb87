"""Agents: world models that collect their own experience, with the interface of stable-baselines3."""

from worldflux.agents.agent import WorldFluxAgent
from worldflux.agents.callbacks import AgentCheckpointCallback, TaskEvalCallback, TrackingCallback, evaluate_tasks
from worldflux.agents.imagination import ImaginationCallback
from worldflux.agents.learning import UpdateSchedule

__all__ = [
    "AgentCheckpointCallback",
    "ImaginationCallback",
    "TaskEvalCallback",
    "TrackingCallback",
    "UpdateSchedule",
    "WorldFluxAgent",
    "evaluate_tasks",
]
