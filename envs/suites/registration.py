"""Registers the suites' tasks with Gymnasium, so that they can be made wherever an id is taken."""

from __future__ import annotations

from collections.abc import Collection

import gymnasium as gym

from worldflux.envs.suites import ATARI_57, ATARI_100K, DMC_TASKS, atari_name, dmc_name

NAMESPACE = "worldflux"

_SUITES: dict[str, Collection[str]] = {"dmc": DMC_TASKS, "atari": ATARI_57, "atari100k": ATARI_100K}


def register_suites() -> None:
    """Registers every task once; nothing is imported before one of them is made."""
    if _id("dmc", "walker-walk") in gym.registry:
        return
    for name in DMC_TASKS:
        gym.register(_id("dmc", name), entry_point="worldflux.envs.suites.dmc:DMCEnv", kwargs={"name": name})
    for game in ATARI_57:
        gym.register(_id("atari", game), entry_point="worldflux.envs.suites.atari:make_atari", kwargs={"game": game})
    for game in ATARI_100K:
        gym.register(
            _id("atari100k", game),
            entry_point="worldflux.envs.suites.atari:make_atari",
            kwargs={"game": game, "protocol": "100k"},
        )


def suite_id(name: str) -> str | None:
    """Gymnasium's id of "dmc/walker-walk", "atari/pong" or "atari100k/pong"; None for a name of no suite."""
    suite, _, task = name.partition("/")
    if suite not in _SUITES:
        return None
    task = dmc_name(task) if suite == "dmc" else atari_name(task)
    return _id(suite, task) if task in _SUITES[suite] else None


def suite_names() -> list[str]:
    """All names that `suite_id` knows, such as "dmc/walker-walk"."""
    return [f"{suite}/{name}" for suite, names in _SUITES.items() for name in names]


def _id(suite: str, name: str) -> str:
    return f"{NAMESPACE}/{suite}-{name}-v0"
