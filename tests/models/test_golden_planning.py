"""The planner and the values of action sequences compared with recorded plans of the reference implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.golden_tdmpc2 import KINDS, Golden, assert_matches, golden, model
from helpers.small_models import value_of_sequences
from torch import Tensor

from worldflux.config import PlannerConfig
from worldflux.models.planning import PlanDraws, Planner, PlanTrace

TOLERANCE = 2e-4
CASES = [
    (kind, case)
    for kind in KINDS
    for case in sorted({name.split("/")[1] for name in golden(kind).arrays if name.startswith("plan/")})
]


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_actions_have_the_recorded_values(kind):
    ref, built = golden(kind), model(kind)
    actions = ref["value/actions"].unsqueeze(1)  # one row of 32 sequences

    with torch.no_grad():
        values = value_of_sequences(
            built,
            ref.state(ref["value/z"], task=0),
            actions,
            discount=None,
            deterministic=False,
            noise=ref["value/pi_eps"].unsqueeze(0),
            members=ref["value/q_idx"],
        )

    assert_matches(values, ref["value/value"].T, TOLERANCE if kind == "pixels" else 2e-5)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_a_plan_follows_the_recorded_one(kind, case):
    ref, built = golden(kind), model(kind)
    prefix = f"plan/{case}/"
    traces: list[PlanTrace] = []

    actions, mean = Planner(built, _config(ref)).plan(
        built.encode(ref[f"{prefix}obs"], **_how_to_encode(ref, prefix)),
        ref[f"{prefix}prev_mean"].unsqueeze(0),
        is_first=ref[f"{prefix}t0"].bool().unsqueeze(0),
        draws=_draws(ref, prefix),
        trace=traces.append,
    )

    def over_iterations(name: str) -> Tensor:
        return torch.cat([getattr(trace, name) for trace in traces])  # [I, ...], of the one row

    assert_matches(over_iterations("values"), ref[f"{prefix}value"].squeeze(-1), TOLERANCE)
    assert torch.equal(over_iterations("elites"), ref[f"{prefix}elite_idxs"])
    assert_matches(over_iterations("weights"), ref[f"{prefix}score"].squeeze(-1), TOLERANCE)
    assert_matches(over_iterations("mean"), ref[f"{prefix}mean"], TOLERANCE)
    assert_matches(over_iterations("std"), ref[f"{prefix}std"], TOLERANCE)
    assert_matches(actions[0], ref[f"{prefix}action"], TOLERANCE)
    assert_matches(mean[0], ref[f"{prefix}prev_mean_after"], TOLERANCE)


def test_recorded_plans_are_the_same_as_rows_of_one_batch():
    """Plans all cases of the state file in one batch; each row has its own observation, previous plan and noise."""
    ref, built = golden("state"), model("state")
    cases = [f"plan/{case}/" for kind, case in CASES if kind == "state"]
    draws = [_draws(ref, case) for case in cases]
    # All rows use the same critics, so each case is compared with its own plan with the critics of the first case.
    members = draws[0].members

    def plan(rows: list[int]) -> tuple[Tensor, Tensor]:
        together = PlanDraws(
            policy=torch.cat([draws[row].policy for row in rows], 1),
            actions=torch.cat([draws[row].actions for row in rows], 2),
            gumbel=torch.cat([draws[row].gumbel for row in rows]),
            final=None,
            value=torch.cat([draws[row].value for row in rows], 1),
            members=members,
        )
        return Planner(built, _config(ref)).plan(
            built.encode(torch.cat([ref[f"{cases[row]}obs"] for row in rows])),
            torch.stack([ref[f"{cases[row]}prev_mean"] for row in rows]),
            is_first=torch.stack([ref[f"{cases[row]}t0"].bool() for row in rows]),
            draws=together,
        )

    actions, mean = plan([0, 1, 2, 3])

    for row in range(4):
        alone, alone_mean = plan([row])
        assert_matches(alone[0], actions[row], TOLERANCE)
        assert_matches(alone_mean[0], mean[row], TOLERANCE)


def _config(ref: Golden) -> PlannerConfig:
    names = ("horizon", "iterations", "num_samples", "num_elites", "num_pi_trajs")
    sizes = {name: int(ref[f"cfg/{name}"]) for name in names}
    return PlannerConfig(**sizes, temperature=0.5, min_std=0.05, max_std=2.0)


def _how_to_encode(ref: Golden, prefix: str) -> dict[str, Any]:
    """Returns the task and the shift of images of a case that has them."""
    return {name: ref[prefix + name].long() for name in ("task", "shift") if prefix + name in ref}


def _draws(ref: Golden, prefix: str) -> PlanDraws:
    """Returns the recorded draws of one row."""
    return PlanDraws(
        policy=ref[f"{prefix}prior_eps"].unsqueeze(1),
        actions=ref[f"{prefix}action_noise"].unsqueeze(2),
        gumbel=ref[f"{prefix}gumbel"].unsqueeze(0),
        final=ref[f"{prefix}final_noise"].unsqueeze(0) if f"{prefix}final_noise" in ref else None,
        value=ref[f"{prefix}value_pi_eps"].unsqueeze(1),
        members=ref[f"{prefix}q_idx"],
    )
