"""`TrackingCallback`: an agent's run in an experiment tracker, from Python."""

from __future__ import annotations

import sys

import pytest
from helpers.envs import Corridor
from helpers.small_models import SIZES
from helpers.trackers import FakeMlflow, FakeWandb
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from worldflux import ConfigurationError, WorldFluxAgent
from worldflux.agents import TrackingCallback


@pytest.fixture
def agent() -> WorldFluxAgent:
    sizes = dict(batch_size=2, seq_len=4, learning_starts=16, buffer_size=500, train_ratio=4)
    return WorldFluxAgent("dreamerv3:tiny", Corridor(), model_kwargs=SIZES["dreamerv3"], seed=0, device="cpu", **sizes)


def test_wandb_gets_what_the_agent_logs(agent: WorldFluxAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    callback = TrackingCallback("wandb", project="p", name="n", tags=["a"], config={"note": {"why": "x"}})
    agent.learn(40, callback)
    (run,) = wandb.runs
    assert (run.project, run.name, run.given["tags"], run.ended) == ("p", "n", ("a",), 0)
    assert (run.config["train_ratio"], run.config["model.units"], run.config["note.why"]) == (4, 8, "x")
    assert run.rows[-1]["global_step"] == 40 and {"train/loss", "rollout/ep_rew_mean"} <= set(run.rows[-1])
    assert callback.run_id == "w0" and not agent.logger.output_formats
    agent.learn(20, callback, reset_num_timesteps=False)
    assert (wandb.runs[-1].id, wandb.runs[-1].given["resume"]) == ("w0", "allow")
    assert wandb.runs[-1].rows[-1]["global_step"] == 60


def test_a_run_that_is_open_is_used_and_stays_open(agent: WorldFluxAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = FakeWandb(), FakeMlflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    mine = wandb.init(id="mine", project="p", name="n", config={"own": 1})
    theirs = mlflow.start_run(run_id="theirs", run_name=None, tags=None)
    agent.learn(40, [TrackingCallback("wandb"), TrackingCallback("mlflow")])
    assert wandb.run is mine and mine.ended is None and mine.rows[-1]["global_step"] == 40
    assert mine.config["own"] == 1 and mine.config["train_ratio"] == 4
    assert mlflow.active_run() is theirs and theirs.rows[-1][0] == 40
    assert theirs.params["model.units"] == 8 and theirs.params["seed"] == 0


class Fails(BaseCallback):
    def _on_step(self) -> bool:
        raise ZeroDivisionError


def test_mlflow_is_told_how_the_run_ended(agent: WorldFluxAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with pytest.raises(ZeroDivisionError):
        agent.learn(40, [TrackingCallback("mlflow", tags=["try", "stage=2"]), Fails()])
    assert (mlflow.runs["m0"].status, mlflow.runs["m0"].tags) == ("FAILED", {"try": "true", "stage": "2"})
    agent.learn(40, TrackingCallback("mlflow", run_id="m0"))
    assert list(mlflow.runs) == ["m0"] and mlflow.runs["m0"].status == "FINISHED"


def test_what_cannot_be_tracked_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="tracker is 'wanbd'; did you mean 'wandb'"):
        TrackingCallback("wanbd")


def test_other_algorithms_are_pointed_to_their_own_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    with pytest.raises(ConfigurationError, match=r"got PPO\. Use wandb\.integration\.sb3"):
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).learn(8, TrackingCallback("wandb"))
