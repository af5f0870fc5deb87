"""The short examples, with settings that take seconds; `offline_training.py` has a file of its own."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from helpers.agents import TINY_TDMPC2
from helpers.pages import example

from worldflux import CheckpointError, WorldFluxAgent, create_world_model, factory
from worldflux.envs import check_env


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent of `custom_environment.py`, hardly trained."""
    path = tmp_path_factory.mktemp("examples") / "room.zip"
    learned, chance = example("custom_environment").main(
        steps=80, train_ratio=8, learning_starts=60, episodes=1, out=path
    )
    assert -50.0 * 96 < learned < 0.0 and -50.0 * 96 < chance < 0.0
    return path


def test_the_room_heats_by_its_power_and_loses_a_share_of_the_difference_to_the_outside() -> None:
    env = gym.make("Room-v0") if example("custom_environment") else None
    assert env is not None
    obs, _ = env.reset(seed=3)
    before, outside, wanted = obs
    obs, reward, terminated, truncated, _ = env.step(np.array([1.5], np.float32))
    assert obs[0] == pytest.approx(before + 0.05 * (outside - before) + 1.5, abs=0.5)  # five deviations of the draught
    assert reward == pytest.approx(-abs(obs[0] - wanted), abs=1e-4)
    assert (obs[1], obs[2], terminated, truncated) == (outside, wanted, False, False)


def test_a_room_that_freezes_terminates_and_one_that_does_not_is_truncated_after_a_day() -> None:
    module = example("custom_environment")
    for power, steps in ((0.0, 96), (1.0, 96)):
        env = gym.make(module.ENV)
        for seed in range(20):
            env.reset(seed=seed)
            count, over = 0, False
            while not over:
                obs, reward, terminated, truncated, _ = env.step(np.array([power], np.float32))
                count, over = count + 1, terminated or truncated
            assert terminated == (obs[0] < 0.0)
            assert (reward == -50.0) == terminated
            assert truncated == (count == steps)
            if power:
                assert not terminated  # a kilowatt is enough in any weather


def test_the_rooms_picture_grows_with_its_temperature() -> None:
    env = gym.make(example("custom_environment").ENV, render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    picture = env.render()
    red = np.array(picture)[:, 32] == (220, 90, 60)
    assert abs(red.all(-1).sum() - 3.0 * obs[0]) <= 3  # of which the line of the wanted temperature hides two at most


def test_the_custom_environment_passes_every_check() -> None:
    check_env(example("custom_environment").Room)


def test_the_custom_environment_is_learned_and_saved(room: Path) -> None:
    agent = WorldFluxAgent.load(room)
    assert agent.num_timesteps == 80
    assert agent.trainer.step_count == 1  # one at 60, and 20 * 8 of the 256 replayed steps of the next


def test_load_and_evaluate_gives_the_return_of_each_episode_and_of_one_by_hand(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("load_and_evaluate")
    returns = module.main(room, "Room-v0", episodes=2, seed=5)
    printed = capsys.readouterr().out
    assert f"mean return of 2 episodes: {np.mean(returns):.1f} (worst {min(returns):.1f})" in printed
    # The same episodes again, by hand; and the one after that which SB3 begins when it has seen enough.
    agent, env = WorldFluxAgent.load(room), gym.make("Room-v0")
    env.reset(seed=5)
    for expected in returns:
        assert module.play(agent, env) == (pytest.approx(expected, abs=1e-3), 96)
    env.reset()
    total, steps = module.play(agent, env)
    assert f"return of one more episode: {total:.1f} in {steps} steps" in printed


def test_record_video_writes_a_frame_for_each_observation(room: Path, tmp_path: Path) -> None:
    video = tmp_path / "room.mp4"
    frames = example("record_video").main(room, "Room-v0", out=video, seed=5)
    film = cv2.VideoCapture(str(video))
    assert int(film.get(cv2.CAP_PROP_FRAME_COUNT)) == frames == 97
    assert (film.get(cv2.CAP_PROP_FRAME_WIDTH), film.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (64, 96)
    assert film.get(cv2.CAP_PROP_FPS) == 12
    _, first = film.read()
    env = gym.make("Room-v0", render_mode="rgb_array")
    env.reset(seed=5)
    assert (
        np.abs(first[..., ::-1].astype(int) - np.array(env.render())).mean() < 12
    )  # as it was drawn, but for the codec


def test_record_video_cuts_pictures_to_even_sides_and_refuses_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    write = example("record_video").write_video
    write(tmp_path / "odd.mp4", np.zeros((3, 33, 35, 3), np.uint8), fps=10.0)
    film = cv2.VideoCapture(str(tmp_path / "odd.mp4"))
    assert (film.get(cv2.CAP_PROP_FRAME_WIDTH), film.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (34, 32)
    with pytest.raises(SystemExit, match="cannot be written as a video"):
        write(tmp_path / "nowhere" / "film.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps=10.0)


def test_resume_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, run = example("resume"), tmp_path / "run"
    first = module.main(run, total=60, save_interval=50, train_ratio=0)
    assert first.num_timesteps == 60
    again = module.main(run, total=100, save_interval=50, train_ratio=0)
    assert "resuming after 60 steps" in capsys.readouterr().out
    assert again.num_timesteps == 100
    assert again.replay_buffer is not None and again.replay_buffer.num_transitions == 100
    assert sorted(path.name for path in run.iterdir()) == ["step-00000060", "step-00000100"]


def test_resume_begins_anew_where_a_kill_left_no_checkpoint_and_stops_at_a_damaged_one(tmp_path: Path) -> None:
    module = example("resume")
    (tmp_path / "run").mkdir()
    assert module.main(tmp_path / "run", total=20, train_ratio=0).num_timesteps == 20
    (tmp_path / "run" / "step-00000020" / "agent.json").write_text("{")
    with pytest.raises(CheckpointError):
        module.main(tmp_path / "run", total=40, train_ratio=0)


def test_a_family_of_your_own_plans_with_what_it_has_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "_families", dict(factory._families))
    mean = example("custom_model", again=True).main(steps=520, episodes=1, horizon=2, candidates=16)
    assert -2_000.0 < mean < 0.0
    model = create_world_model("dynamics:large", obs_shape=(3,), action_dim=1)
    assert model.network[0].out_features == 512


def test_own_goal_gives_one_agent_each_goal_and_plots_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, angles = example("own_goal"), torch.tensor([0.0, 20.0, 380.0, 110.0]).deg2rad()
    obs = torch.stack([angles.cos(), angles.sin(), torch.tensor([0.0, 0.0, 5.0, 7.0])], -1).unsqueeze(0)
    seen = SimpleNamespace(observations=obs, rewards=torch.zeros(1, 4))
    expected = [-(math.radians(20.0) ** 2), 0.0, -2.5, -((math.pi / 2) ** 2) - 4.9]
    torch.testing.assert_close(module.hold_angle(seen), torch.tensor([expected]))
    assert module.turn(seen).tolist() == [[-25.0, -25.0, 0.0, -4.0]]
    assert module.too_fast(seen).tolist() == [[0.0, 0.0, 0.0, -math.inf]]

    settings = dict(planner=None, batch_size=4, model_kwargs={**TINY_TDMPC2, "use_decoder": True})
    agent = WorldFluxAgent("tdmpc2:tiny", "Pendulum-v1", device="cpu", **settings)
    agent.save(tmp_path / "pendulum-5.zip")
    rows = module.main(tmp_path, seeds=(5,), planner="cem", horizon=2, candidates=16, test_steps=4)
    assert [row["goal"] for row in rows] == list(module.GOALS) and {row["seed"] for row in rows} == {5}
    assert capsys.readouterr().out.count('"planner": "cem"') == 4
    assert cv2.imread(str(tmp_path / "own_goal_cem.png")).shape[1] == 990
    assert agent.objective is None


@pytest.mark.parametrize(
    "name", ["custom_environment", "custom_model", "load_and_evaluate", "own_goal", "record_video", "resume"]
)
def test_help_of_an_example_describes_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = example(name).main
    with pytest.raises(SystemExit) as ended:
        tyro.cli(main, args=["--help"])
    assert ended.value.code == 0
    shown, documented = capsys.readouterr().out, inspect.getdoc(main) or ""
    for option in inspect.signature(main).parameters:
        assert option.replace("_", "-").upper() in shown.upper()
        assert f"    {option}: " in documented


def test_ppo_trains_in_a_learned_world_and_is_evaluated_in_the_real_one() -> None:
    module = example("imagined_training")
    row = module.run(0, module.Options(steps=300, imagined_steps=256, n_envs=4, horizon=5))
    assert row["seed"] == 0
    assert all(8 <= row[name] <= 500 for name in ("imagined", "real", "dreamerv3"))
