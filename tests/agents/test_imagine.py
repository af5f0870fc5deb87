"""Pictures in TensorBoard of what an agent imagines while it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from helpers.agents import make_agent
from helpers.envs import CountingEnv
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from worldflux.agents import ImaginationCallback, WorldFluxAgent
from worldflux.errors import ConfigurationError
from worldflux.training import Batch


def imagining(obs: str = "vector", **settings: Any) -> WorldFluxAgent:
    """An agent in episodes of 9 and 30 steps."""
    return make_agent(CountingEnv(lengths=(9, 30), obs=obs), **{"train_ratio": 2, "learning_starts": 20, **settings})


def logged(directory: Path) -> dict[str, list[int]]:
    """The steps at which each image was logged."""
    events = EventAccumulator(str(directory), size_guidance={"images": 0})
    events.Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_training_has_the_same_bits_with_the_callback_and_without(tmp_path: Path) -> None:
    agents = []
    for callback in (None, ImaginationCallback(40, context=3, horizon=6, windows=4, shown=1)):
        agent = imagining()
        agent.set_logger(configure(str(tmp_path / str(len(agents))), ["tensorboard", "csv"]))
        agents.append(agent.learn(90, callback))
    plain, watched = agents
    assert logged(tmp_path / "0") == {}
    pictures = logged(tmp_path / "1")
    assert pictures.keys() == {f"imagination/{name}" for name in ("imagination", "errors", "rewards", "continues")}
    assert set(map(tuple, pictures.values())) == {(40, 80)}
    assert plain._n_updates == watched._n_updates > 0
    for (name, one), other in zip(plain.model.state_dict().items(), watched.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert plain.replay_buffer is not None and watched.replay_buffer is not None
    assert plain.replay_buffer.rng_state() == watched.replay_buffer.rng_state()
    assert plain.model.training == watched.model.training
    # The other entries of the log wait for their own dump.
    assert (tmp_path / "0/progress.csv").read_text().count("\n") == (tmp_path / "1/progress.csv").read_text().count(
        "\n"
    )


def test_films_are_shown_where_images_are(tmp_path: Path) -> None:
    agent = imagining("dict", train_ratio=0, buffer_size=100)
    agent.set_logger(configure(str(tmp_path), ["tensorboard"]))
    agent.learn(40, ImaginationCallback(30, context=3, horizon=6, windows=2, shown=1))
    assert logged(tmp_path)["imagination/film"] == [30]
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    film = events.Images("imagination/film")[0]
    decoded, animation = cv2.imdecodeanimation(np.frombuffer(film.encoded_image_string, np.uint8))
    assert decoded and len(animation.frames) == 9
    assert animation.frames[0].shape[:2] == (film.height, film.width)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Batch]]:
    """The steps at which pictures would be drawn, and their windows."""
    found: list[tuple[int, Batch]] = []
    monkeypatch.setattr(
        ImaginationCallback, "_draw", lambda callback, batch: found.append((callback.num_timesteps, batch))
    )
    return found


def test_it_waits_until_a_window_fits(tmp_path: Path, drawn: list[tuple[int, Batch]]) -> None:
    agent = imagining(train_ratio=0)
    agent.set_logger(configure(str(tmp_path), ["tensorboard"]))
    agent.learn(80, ImaginationCallback(10, context=5, horizon=45, windows=2))
    # After 48 steps, the last observations of the first two episodes included, there are 50 rows.
    assert [step for step, _ in drawn] == [48, 50, 60, 70, 80]


def test_without_tensorboard_it_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("worldflux.agents.imagination.open_loop", None)
    for logger in (configure(str(tmp_path), ["csv"]), Logger(None, [])):
        agent = imagining(train_ratio=0)
        agent.set_logger(logger)
        agent.learn(60, ImaginationCallback(20, context=3, horizon=6))
    # What earlier tests left open is not its doing.
    assert not [str(w.message) for w in recwarn if w.category is not ResourceWarning]


def test_observations_are_normalised_as_the_model_sees_them(tmp_path: Path, drawn: list[tuple[int, Batch]]) -> None:
    env = VecNormalize(DummyVecEnv([lambda: CountingEnv(lengths=(40,))]))
    agent = make_agent(env, train_ratio=0)
    agent.set_logger(configure(str(tmp_path), ["tensorboard"]))
    agent.learn(35, ImaginationCallback(30, context=3, horizon=6, windows=4))
    obs = drawn[0][1].obs
    assert isinstance(obs, torch.Tensor)
    # The third number is the step, from 0 to 30 here.
    assert 0.5 < obs[..., 2].abs().max() < 3


def test_a_model_that_diverged_is_left_to_the_check_of_training(tmp_path: Path) -> None:
    agent = imagining(train_ratio=0)
    agent.set_logger(configure(str(tmp_path), ["tensorboard"]))
    with torch.no_grad():
        agent.model.reward_head.out.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    agent.learn(40, ImaginationCallback(30, context=3, horizon=6, windows=2))
    assert logged(tmp_path) == {}


def test_other_algorithms_and_wrong_numbers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="draws what a WorldFluxAgent imagines, got PPO"):
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).learn(8, ImaginationCallback())
    for name in ("interval", "context", "horizon", "windows", "shown"):
        with pytest.raises(ConfigurationError, match=f"{name} is 0, expected a whole number from 1"):
            ImaginationCallback(**{name: 0})
