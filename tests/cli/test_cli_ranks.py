"""`worldflux train` under torchrun: one run of several processes, which goes on when one of them dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.ranks import free_port
from helpers.small_models import DREAMERV3

from worldflux import WorldFluxAgent
from worldflux.cli.runs import read_evaluations
from worldflux.training.checkpoint import checkpoints_in

FRAGILE = '''
import os, pathlib, signal
import gymnasium as gym
import numpy as np

class Fragile(gym.Env):
    """Kills rank 1 at the end of its twentieth episode, once."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)
    episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        done = self.steps == 8
        Fragile.episodes += done
        mark = pathlib.Path(__file__).with_name("died")
        if os.environ.get("RANK") == "1" and Fragile.episodes == 20 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), float(action), done, False, {}
'''


def test_torchrun_trains_one_run_and_goes_on_after_a_process_was_killed(tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE, encoding="utf-8")
    options = dict(steps=480, checkpoint_interval=96, eval_interval=240, eval_episodes=1)
    options |= dict(batch_size=2, seq_len=5, train_ratio=2)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    words += [word for name, value in DREAMERV3.items() for word in ("--set", f"{name}={value}")]
    launch = f"-m torch.distributed.run --nproc-per-node 2 --max-restarts 1 --master-port {free_port()} -m worldflux"
    command = [sys.executable, *launch.split(), "train", "dreamerv3:tiny", "fragile.py:Fragile", "--device=cpu", *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "died").exists()
    assert "worldflux: resuming at step 288 of 480" in result.stderr
    assert result.stderr.count("one gradient step every") == 2  # rank 0 alone speaks, once in each part

    (run,) = (tmp_path / "runs").glob("*/*/*")
    assert [row.step for row in read_evaluations(run / "evaluations.csv")] == [240, 480]
    checkpoint = checkpoints_in(run / "checkpoints")[-1]
    assert checkpoint.name == "step-00000480"
    assert (checkpoint / "rank-0001" / "replay" / "replay.json").is_file()
    assert WorldFluxAgent.load(run / "agent.zip").num_timesteps == 480
