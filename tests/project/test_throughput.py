"""The measurements of speed: their rows, what is counted, the table drawn from them, and what fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import rows
import table
import throughput
import torch
from torch import nn

import worldflux
from worldflux import WorldFluxAgent

sys.path.append(str(Path(cases.__file__).parent / "peers"))
import batches

SMALL = {
    "dreamerv3-small": cases.Case("dreamerv3:tiny", (5,), 2, 4),
    "tdmpc2-small": cases.Case("tdmpc2:tiny", (5,), 4, 4),
    "dreamerv3-picture": cases.Case("dreamerv3:tiny", cases.IMAGE, 1, 2),
}
OPTIONS = {"device": "cpu", "dtype": "float32", "compile": "auto", "repeats": 2, "budget": 0.0, "envs": 2, "save": None}


def run_of(*found: dict[str, Any], failures: tuple[dict[str, str], ...] = ()) -> dict[str, Any]:
    return {
        "date": "2026-01-02 03:04 UTC",
        "commit": "0123456789abcdef",
        "changed_files": 0,
        "command": "python benchmarks/throughput.py",
        "machine": {"cpu": "A processor", "threads": 2, "gpu": None, "system": "Linux"},
        "versions": {"python": "3.11", "torch": "2.13", "cuda": None, "numpy": "2"},
        "rows": list(found),
        "failures": list(failures),
    }


def row_of(who: str, ms: float, **facts: Any) -> dict[str, Any]:
    row = {"who": who, "case": "tdmpc2-5m-state", "what": rows.PLAN, "ms": ms, "ms_quartiles": [ms, 2 * ms]}
    row |= {"compile_s": 0.5, "dtype": "float32", "threads": 2, "versions": {"torch": "2.13"}, "compile": False}
    return row | ({"gflop": 10.0, "compile": "auto"} if who == "worldflux" else {}) | facts


PEAK = {"who": "worldflux", "case": "peak", "what": rows.MATRIX, "dtype": "float32", "tflop_per_s": 0.2, "ms": 1.0}


def test_cases_are_measured_in_turn_with_their_own_fields(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = SMALL["dreamerv3-picture"]
    without = cases.Case(picture.preset, picture.obs_shape, 1, 2, {"representation": "redundancy"})
    monkeypatch.setattr(cases, "CASES", {"decoder": picture, "redundancy": without})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    cases.in_turn(["decoder", "redundancy"], Namespace(**OPTIONS), threads=1)
    first, other = rows.rows_in(capsys.readouterr().out)
    assert (first["case"], other["case"]) == ("decoder", "redundancy")
    assert first["share_of_first"] == 1 and 0 < other["share_of_first"] and other["ms_least"] <= other["ms"]
    assert first["calls"] == other["calls"] == 2 and first["params"] != other["params"]


@pytest.mark.parametrize("name", SMALL)
def test_a_case_has_a_row_for_each_of_its_steps(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "CASES", SMALL)
    few = {"num_samples": 8, "num_elites": 4, "num_pi_trajs": 2}
    monkeypatch.setattr(worldflux, "WorldFluxAgent", partial(WorldFluxAgent, planner_kwargs=few))

    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # the other tests keep theirs

    cases.measure(name, Namespace(**OPTIONS), threads=1)

    found = rows.rows_in(capsys.readouterr().out)
    assert [row["what"] for row in found] == [rows.GRADIENT, rows.ACTING, rows.PLAN]
    gradient, acting, plan = found
    keys = {"who", "case", "ms", "ms_quartiles", "ms_least", "calls", "compile_s", "gflop", "tflop_per_s", "device"}
    for row in found:
        assert keys | {"threads", "dtype", "compile", "params", "versions"} <= row.keys()
        assert (row["who"], row["case"], row["dtype"], row["calls"]) == ("worldflux", name, "float32", 2)
        assert row["ms_least"] <= row["ms"] and row["gflop"] > 0
        assert row["tflop_per_s"] == pytest.approx(row["gflop"] / row["ms"])
    assert gradient["peak_mib"] > 100  # MiB; PyTorch alone is more
    assert acting["envs"] == plan["envs"] == 2 and plan["gflop"] > 2 * acting["gflop"]


@pytest.mark.parametrize("name", ["dreamerv3-small", "dreamerv3-picture"])
def test_the_peers_are_given_the_batch_that_the_agent_has_recorded(name: str, tmp_path: Path) -> None:
    case, path = SMALL[name], tmp_path / "batch.npz"
    agent = cases.make_agent(case, Namespace(**OPTIONS), compiled="off", planner=None)
    batch = cases.batch_of(agent, case)
    cases.save(batch, str(path))
    written = batches.read(str(path))

    obs = agent.replay_buffer.sample(64, 1).obs.flatten(0, 1)  # what was recorded, with replacement
    assert batch.batch_size == case.batch and batch.seq_len == case.length + 1 and obs.unique(dim=0).shape[0] > 8
    assert agent.trainer.step_count == 0 and agent.num_timesteps >= case.batch + case.length
    assert batch.extras["deter"].any()  # of the steps that it acted in
    np.testing.assert_array_equal(written["obs"], batch.obs)
    seen = batches.on_arrival(written)
    shape = case.obs_shape
    assert seen["image" if len(shape) == 3 else "vector"].shape == (case.batch, case.length + 1, *shape)
    assert seen["reward"][:, 1:] == pytest.approx(np.where(batch.is_first[:, 1:], 0, batch.rewards[:, :-1]))


def test_what_an_action_earned_moves_to_the_row_where_it_arrived() -> None:
    rows_of = {
        "obs": np.arange(5.0).reshape(1, 5, 1),
        "actions": np.arange(5.0).reshape(1, 5, 1),
        "rewards": np.array([[1.0, 2.0, 0.0, 4.0, 5.0]]),
        "terminations": np.array([[False, True, False, False, False]]),
        "truncations": np.array([[False, False, False, True, False]]),
        "is_first": np.array([[True, False, False, True, False]]),
    }
    seen = batches.on_arrival(rows_of)
    assert seen["reward"].tolist() == [[0.0, 1.0, 2.0, 0.0, 4.0]]
    assert seen["is_terminal"].tolist() == [[False, False, True, False, False]]
    assert seen["is_last"].tolist() == [[False, False, True, False, True]]
    assert seen["vector"].tolist() == rows_of["obs"].tolist()
    assert batches.one_hot(np.array([0, 1, 3]), 3).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1]]


def test_operations_of_known_layers_are_counted_forward_and_backward() -> None:
    linear, conv = nn.Linear(7, 5), nn.Conv2d(3, 4, kernel_size=3, bias=False)
    rows_in, image = torch.rand(11, 7, requires_grad=True), torch.rand(2, 3, 10, 10)
    product = 2 * 11 * 7 * 5

    assert cases.flops_of(lambda: linear(rows_in.detach())) == product
    assert cases.flops_of(lambda: linear(rows_in).sum().backward()) == 3 * product  # of the input, of the weight
    assert cases.flops_of(lambda: conv(image)) == 2 * (2 * 8 * 8) * (3 * 3 * 3) * 4
    with torch.inference_mode():  # where a layer arrives as one operation
        assert cases.flops_of(lambda: linear(rows_in)) == product


def test_the_machine_s_speed_at_matrix_products_is_the_best_of_its_sizes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "MATRIX_SIZES", {"cpu": (2, 128)})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    cases.matrix_peak(Namespace(**OPTIONS), threads=1)
    (row,) = rows.rows_in(capsys.readouterr().out)
    assert (row["what"], row["size"]) == (rows.MATRIX, 128)
    assert row["tflop_per_s"] == pytest.approx(2 * 128**3 / row["ms"] / 1e9)


def test_the_clock_leaves_out_the_first_calls_and_stops_at_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, iter([5.0, 1.0, 0.2, 0.4, 0.3])

    def work() -> None:
        nonlocal now
        now += next(calls)

    monkeypatch.setattr(rows.time, "perf_counter", lambda: now)
    times = rows.clock(work, repeats=3, budget=100.0)
    assert (times["ms"], times["ms_least"], times["calls"]) == (300.0, 200.0, 3)
    assert times["ms_quartiles"] == [250.0, 350.0]
    assert times["compile_s"] == 5.4  # 5 s and 1 s, of which every call takes 0.3 s

    calls = iter([5.0, 1.0, 0.2, 0.4, 0.3])
    assert rows.clock(work, repeats=3, budget=6.0)["calls"] == rows.LEAST_CALLS

    calls, waits = iter([1.0] * 8 + [0.5, 0.5]), []
    times = rows.clock(work, repeats=2, budget=0.0, wait=lambda: waits.append(now))
    assert (times["ms"], times["compile_s"], len(waits)) == (500.0, 4.0, 10)  # a device has more to warm up


def test_rows_are_found_between_other_output(capsys: pytest.CaptureFixture[str]) -> None:
    print("Compiling ...", end="")
    rows.print_row("somebody", "tdmpc2-5m-state", rows.PLAN, {"ms": 1.5})
    print('{"loss": 3}')
    assert rows.rows_in(capsys.readouterr().out) == [
        {"who": "somebody", "case": "tdmpc2-5m-state", "what": "plan", "ms": 1.5}
    ]


def test_the_table_compares_with_the_limit_and_with_the_peers() -> None:
    theirs = row_of("somebody/tdmpc2", 300.0, peak_mib=512.4)
    text = table.document([run_of(PEAK, row_of("worldflux", 200.0, peak_mib=256.0), theirs)])
    ours, beside = text.split("Compared with the peers:")
    assert "A processor, 2 threads" in ours and "commit `0123456789ab`, python 3.11, torch 2.13, numpy 2" in ours
    assert "| worldflux | peer / worldflux | worldflux, bfloat16 | memory of the peer | compiling |" in beside
    # 10 GFLOP in 200 ms are 0.05 TFLOP/s; at 0.2 TFLOP/s they would take 50 ms.
    line = "| tdmpc2-5m-state | plan | float32 | 200 ms | 200 ms to 400 ms | 0.05 | 50 ms | 25 % | 256 MiB | 0.5 s |"
    assert line in ours
    line = "| somebody/tdmpc2 | float32 | torch 2.13 | 300 ms | 200 ms | 1.50 |  | 512 MiB | 0.5 s |"
    assert "| tdmpc2-5m-state | plan " + line in beside


def test_the_table_takes_medians_of_rounds_and_our_fastest_form_of_the_same_precision() -> None:
    rounds = [row_of("worldflux", ms, compile="off") for ms in (400.0, 100.0, 200.0)]
    half = row_of("worldflux", 50.0, dtype="bfloat16")
    text = table.peers_table(run_of(PEAK, *rounds, row_of("worldflux", 1200.0), half, row_of("somebody", 3000.0)))
    assert "| somebody | float32 | torch 2.13 | 3 s | 200 ms | 15.00 | 50 ms |" in text
    assert table.peers_table(run_of(half, row_of("somebody", 3000.0))) == ""  # nothing of ours in float32


def test_runs_of_one_commit_share_a_section_and_others_do_not() -> None:
    one, other = run_of(PEAK, row_of("worldflux", 200.0)), run_of(PEAK, row_of("worldflux", 300.0))
    failure = {"command": "python peers/somebody.py", "error": "exit code 1"}
    shared = table.document([one, {**other, "failures": [failure]}])
    assert shared.count("## A processor") == 1 and shared.count("| case | step | precision |") == 1
    assert "| 250 ms | 200 ms to 600 ms | 0.04 | 50 ms | 20 % |" in shared
    assert "Not measured, because it failed: `python peers/somebody.py`." in shared
    assert table.document([one, {**other, "commit": "f" * 16}]).count("## A processor") == 2


def test_ours_and_the_peers_take_turns() -> None:
    peers = [throughput.Peer.parse("tdmpc2_reference+compile=~/td"), throughput.Peer.parse("r2dreamer=/r2,/py")]
    options = Namespace(**{**OPTIONS, "dtype": ["float32", "bfloat16"], "compile": ["auto", "off"]}, threads=2)
    options.cases, options.peers, options.rounds = ["tdmpc2-5m-state"], peers, 2
    options.batches = Path("/batches")
    found = list(throughput.commands(options))
    assert [Path(command[1]).stem for command in found] == [
        *("cases", "cases"),  # the peaks
        *("cases", "cases", "tdmpc2_reference", "cases", "cases") * 2,  # the peer has no bfloat16
    ]
    assert all("--peak" in command for command in found[:2])
    theirs = found[4]
    assert ["--repo", str(Path.home() / "td")] in [list(pair) for pair in pairwise(theirs)]
    batches = [command[command.index(option) + 1] for command, option in ((found[3], "--save"), (theirs, "--batch"))]
    assert batches == ["/batches/tdmpc2-5m-state.npz"] * 2  # which ours has taken from its replay buffer
    assert "--compile" in theirs and theirs[-2:] == ["--cases", "tdmpc2-5m-state"]
    assert peers[1].command("dreamerv3-12m-pixels", "bfloat16", "cpu")[:2] == [  # type: ignore[index]
        "/py",
        str(throughput.HERE / "peers" / "r2dreamer.py"),
    ]
    assert peers[1].command("tdmpc2-5m-state", "float32", "cpu") is None


@pytest.mark.parametrize("text", ["somebody=/repo", "r2dreamer", "r2dreamer=", "dreamerv3_jax+compile=/repo"])
def test_a_peer_that_cannot_be_run_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"is not FORM=CHECKOUT\[,PYTHON\] with a FORM of dreamerv3_jax, r2d"):
        throughput.Peer.parse(text)


def test_the_exit_code_tells_of_a_failure_and_the_other_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = row_of("worldflux", 1.0)
    good = [sys.executable, "-c", f"print({json.dumps(json.dumps(row))})"]
    bad = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    out = tmp_path / "new" / "results.json"
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--out", str(out)])
    monkeypatch.setattr(rows, "use_threads", lambda asked: 2)
    monkeypatch.setattr(throughput, "commands", lambda options: iter([bad, good]))
    assert throughput.main() == 1
    written = json.loads(out.read_text())
    monkeypatch.setattr(throughput, "commands", lambda options: iter([good]))
    assert throughput.main() == 0
    assert written["rows"] == [row] and json.loads(out.read_text())["failures"] == []
    assert written["failures"][0]["error"] == "exit code 1: no such model"
    assert written["command"] == "python benchmarks/throughput.py --out results.json"  # no folders of this machine
    assert "no such model" in capsys.readouterr().err
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert throughput.run(slow, limit=0.2) == ([], "timed out after 0.2 s")


def test_results_are_what_the_table_draws_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "results.json", tmp_path / "RESULTS.md"
    run = run_of(PEAK, row_of("worldflux", 200.0))
    source.write_text(json.dumps(run))
    monkeypatch.setattr(sys, "argv", ["table.py", str(source), "--out", str(out)])
    assert table.main() == 0
    assert out.read_text() == table.document([run])


@pytest.mark.skipif(shutil.which("timeout") is None, reason="gpu.sh needs bash and timeout")
def test_a_part_that_fails_on_the_gpu_leaves_the_others_alone(tmp_path: Path) -> None:
    python = tmp_path / "python"  # no CUDA device is needed to see what is run, and for how long
    python.write_text(
        '#!/bin/sh\necho "$@" >> "$CALLS"\ncase "$*" in *test_cuda.py*) exit 3;; *float32.json*) sleep 60;; esac\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "SECONDS_IN_ALL": "60"}
    script = (throughput.HERE / "gpu.sh").read_text().replace("float32 100", "float32 1")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu.sh").write_text(script)
    command = ["bash", str(tmp_path / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    summary = [line.rpartition(",")[0] for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()]
    assert done.returncode == 1 and summary[:5] == [
        "tests: failed with exit code 3, see tests.log",
        "doctor: done",
        "speed-bfloat16: done",
        "speed-float32: cut short",
        "speed-plain: done",
    ]
    calls = (tmp_path / "calls").read_text()
    assert calls.count("benchmarks/throughput.py --device cuda") == 3 and "--compile off" in calls
    assert "worldflux.cli.main doctor --check-device cuda" in calls
    for name in ("tdmpc2", "dreamerv3"):  # the curves come last, two tasks each
        assert sum(f"curve-{name}" in line for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()) == 2
