"""The benchmark of whole training loops: what it counts, in which order it runs, and its tables."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import gymnasium as gym
import loop
import loops
import numpy as np
import online
import parity
import pytest
import rows
import torch
from gymnasium import spaces

SMALL = {
    "dreamerv3-small": loops.Loop(
        "dreamerv3", "CartPole-v1", 60, starts=30, skipped=2, batch=2, length=4, train_ratio=4
    ),
    "dreamerv3-picture": loops.Loop(
        "dreamerv3", "PixelSeek", 46, starts=30, skipped=1, batch=2, length=4, train_ratio=1, cnn_depth=4
    ),
    "tdmpc2-small": loops.Loop("tdmpc2", "Pendulum-v1", 36, starts=30, skipped=31, batch=4, length=4, limit=15),
}


def row_of(who: str, seed: int, cpu: float, **facts: Any) -> dict[str, Any]:
    row = {"who": who, "case": "dreamerv3-cartpole", "what": loops.WHAT, "seed": seed, "updates": 100, "losses": []}
    return row | {"cpu_ms_per_update": cpu, "wall_s": cpu / 5, "episodes": [[1600, 10.0 * cpu]]} | facts


@pytest.mark.parametrize("name", SMALL)
def test_a_loop_of_ours_counts_its_gradient_steps_and_every_episode(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loops, "LOOPS", SMALL)
    monkeypatch.setattr(rows, "use_threads", lambda asked: asked)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(sys, "argv", ["loop.py", "--case", name, "--losses", "2"])

    loops.run(None, "worldflux", ("dreamerv3", "tdmpc2"), loop.learn)

    (row,) = rows.rows_in(capsys.readouterr().out)
    case = SMALL[name]
    per_action = 1 if case.family == "tdmpc2" else case.train_ratio / (case.batch * case.length)
    first = case.starts if case.family == "tdmpc2" else 1
    assert row["actions"] == case.steps
    assert row["whole_updates"] == first + int((case.steps - case.starts) * per_action)
    assert row["updates"] == row["whole_updates"] - case.skipped
    assert row["cpu_ms_per_update"] == pytest.approx(1e3 * row["cpu_s"] / row["updates"], rel=0.01)
    assert 0 < row["cpu_s"] < row["whole_cpu_s"] and row["params"] > 200_000
    ends = [step for step, _ in row["episodes"]]
    assert ends == sorted(ends) and ends[-1] <= case.steps
    if case.env == "CartPole-v1":  # which earns 1 for each action
        assert [score for _, score in row["episodes"]] == np.diff([0, *ends]).tolist()
    else:
        assert ends == list(range(case.limit or 20, case.steps + 1, case.limit or 20))
    counted = [entry["updates"] for entry in row["losses"]]
    assert counted and all(updates % 2 == 0 for updates in counted) and len(set(counted)) == len(counted)
    assert all(np.isfinite(value) for entry in row["losses"] for value in entry.values())


class Count(gym.Env[Any, Any]):
    """Rewards each action with its number; an episode has three actions."""

    observation_space = spaces.Box(0, 99, (1,), np.float32)
    action_space = spaces.Discrete(2)
    seeds: list[int | None]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.seeds = [*getattr(self, "seeds", []), seed]
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.zeros(1, np.float32), float(self.t), self.t == 3, False, {}


def test_the_clock_runs_from_the_first_counted_gradient_step_to_the_last_action(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env, now = Count(), [0.0]
    monkeypatch.setattr(loops, "make_env", lambda case, seed: env)
    monkeypatch.setattr(loops.time, "process_time", lambda: now[0])
    monkeypatch.setattr(loops.time, "perf_counter", lambda: 2 * now[0])
    taken = 0
    watched = loops.Watched(loops.Loop("dreamerv3", "", 8, starts=0, skipped=3), seed=7, updates=lambda: taken)
    watched.reset(seed=1)
    with pytest.raises(loops.Stop):
        while True:
            _, _, terminated, truncated, _ = watched.step(0)
            taken, now[0] = taken + 1, now[0] + 0.5  # a gradient step after each action
            if terminated or truncated:
                watched.reset(seed=1)
    assert watched.taken == taken == 8
    assert watched.times() == {"updates": 5, "cpu_s": 2.5, "wall_s": 5.0, "cpu_ms_per_update": 500.0}
    assert watched.episodes == [(3, 6.0), (6, 6.0)]
    assert env.seeds == [7, None, None]  # the run's, whatever the loop asks for


def test_ours_and_the_peer_take_turns_at_equal_settings() -> None:
    options = Namespace(cases=["tdmpc2", "dreamerv3-8x8"], seeds=[0, 1], threads=1, losses=25)
    options.dreamerv3, options.tdmpc2 = "/dreamer,/jax/python", None
    found = list(online.commands(options))
    assert [Path(command[1]).stem for command in found] == [*["loop"] * 2, *["loop", "dreamerv3_loop"] * 2]
    ours, theirs = found[2:4]
    assert theirs[0] == "/jax/python" and theirs[2:4] == ["--repo", "/dreamer"]
    assert theirs[4:] == ours[2:] == ["--case", "dreamerv3-8x8", "--seed", "0", "--threads", "1", "--losses", "25"]


def test_the_table_has_the_medians_of_both_sides_and_their_ratio() -> None:
    found = [row_of("worldflux", seed, cpu) for seed, cpu in enumerate((30.0, 10.0, 20.0))]
    text = online.table([*found, row_of("danijar/dreamerv3", 0, 50.0)])
    assert "| dreamerv3-cartpole | worldflux | 3 | 100 | 20.0 | 10.0, 30.0 | 40.0 |  |" in text
    assert "| dreamerv3-cartpole | danijar/dreamerv3 | 1 | 100 | 50.0 | 50.0, 50.0 | 100.0 | 0.40 |" in text


def test_rows_are_kept_beside_those_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row, out = row_of("worldflux", 1, 20.0), tmp_path / "new" / "rows.jsonl"
    good = [sys.executable, "-c", f"print({json.dumps(json.dumps(row))})"]
    bad = [sys.executable, "-c", "import sys; sys.exit('no such peer')"]
    monkeypatch.setattr(rows, "use_threads", lambda asked: 1)
    monkeypatch.setattr(sys, "argv", ["online.py", "--cases", "tdmpc2", "--out", str(out)])
    monkeypatch.setattr(online, "commands", lambda options: iter([bad, good]))
    assert online.main() == 1 and "no such peer" in capsys.readouterr().err
    monkeypatch.setattr(online, "commands", lambda options: iter([good]))
    assert online.main() == 0
    written = rows.rows_in(out.read_text())
    assert len(written) == 2 and written[0].items() >= row.items() and len(written[0]["commit"]) == 40
    assert "| worldflux | 2 | 100 | 20.0 |" in capsys.readouterr().out


def test_the_permutation_test_counts_splits_that_differ_as_much() -> None:
    low, high = np.array([1.0, 2.0, 3.0]), np.array([10.0, 11.0, 12.0])
    assert parity.permutation_p(low, high) == parity.permutation_p(high, low) == 2 / 20  # this split and its mirror
    assert parity.permutation_p(low, low) == 1.0
    assert parity.permutation_p(np.array([0.0]), np.array([1.0, 2.0, 6.0])) == 2 / 4  # 3, 1.67, 0.33 and 5 apart


def test_learning_is_compared_seed_by_seed_and_the_curves_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = [{"updates": 50, "critic": 3.0}], [{"updates": 50, "loss/value": 2.0}]
    found = [row_of("worldflux", seed, 10.0 + seed, losses=losses[0]) for seed in (1, 0)]
    found += [row_of("danijar/dreamerv3", seed, 20.0 + seed, losses=losses[1]) for seed in (0, 1)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in found))
    monkeypatch.setattr(sys, "argv", ["parity.py", str(source), "--curves", str(tmp_path)])
    assert parity.main() == 0
    text = capsys.readouterr().out
    line = "| mean return, steps 1,500 to 2,700 | 105 ± 7.1 | 205 ± 7.1 | -100 | 0.33 | 100, 110 / 200, 210 |"
    assert "dreamerv3-cartpole, 2 and 2 seeds" in text and line in text
    assert "| first episode of 100 | 1600 ± 0 | 1600 ± 0 | +0 | 1.00 |" in text
    assert "| critic, gradient step 50 | 3 ± 0 | 2 ± 0 | +1 | 0.33 | 3, 3 / 2, 2 |" in text
    curve = (tmp_path / "parity_dreamerv3_cartpole_reference.csv").read_text()
    assert curve == "step,score,seed\n1600,200.0,0\n1600,210.0,1\n"
