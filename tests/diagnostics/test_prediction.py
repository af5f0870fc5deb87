"""Open-loop prediction of models whose errors are known, and of both families."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from worldflux import create_world_model
from worldflux.config import WorldModelConfig
from worldflux.diagnostics.open_loop import HorizonError, OpenLoop, open_loop
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.models.base import State, Trajectory, WorldModel
from worldflux.replay.batch import Observation
from worldflux.training import Batch, ReplayBuffer, create_random_buffer


class Pusher(WorldModel):
    """Predicts that an action moves every entry of the observation by `gain` times itself, and earns `earned`.

    Its state is the last observation, and the number of rows of the episode it has seen. Sampled futures have `noise`.
    """

    def __init__(
        self, shape: Any = (2,), *, gain: float = 1.0, earned: float = 0.0, goes_on: float = 1.0, noise: float = 0.0
    ) -> None:
        super().__init__(WorldModelConfig(obs_shape=shape, action_dim=1))
        self.gain = nn.Parameter(torch.tensor(gain))
        self.earned, self.goes_on, self.noise = earned, goes_on, noise

    def initial_state(self, batch_size: int) -> State:
        return State({"seen": torch.zeros(batch_size, 2), "age": torch.zeros(batch_size, dtype=torch.long)})

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Observation,
        *,
        is_first: Tensor | None = None,
        deterministic: bool = False,
    ) -> State:
        assert deterministic and isinstance(obs, Tensor) and is_first is not None
        return State({"seen": obs.float(), "age": torch.where(is_first, 0, state["age"]) + 1})

    def transition(self, state: State, action: Tensor, *, deterministic: bool = False) -> State:
        moved = state["seen"] + self.gain * action
        if not deterministic:
            moved = moved + self.noise * torch.randn(moved.shape)
        return State({"seen": moved, "age": state["age"]})

    def decode(self, state: State) -> dict[str, Any]:
        return {"obs": state["seen"]}

    def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
        states = []
        for action in actions:
            state = self.transition(state, action, deterministic=deterministic)
            states.append(state)
        told = torch.ones(actions.shape[:2])
        return Trajectory(State.stack(states), self.earned * told, self.goes_on * told)


def pushed(length: int, *, windows: int = 1, scale: tuple[float, ...] = (1.0, 1.0)) -> Batch:
    """Windows in which every action is 1 and moves each entry by its scale. The reward counts the rows."""
    count = torch.arange(length, dtype=torch.float32)
    ends = torch.zeros(windows, length, dtype=torch.bool)
    return Batch(
        obs=(count.unsqueeze(-1) * torch.tensor(scale)).expand(windows, -1, -1).clone(),
        actions=torch.ones(windows, length, 1),
        rewards=count.expand(windows, -1).clone(),
        terminations=ends,
        truncations=ends.clone(),
        is_first=ends.clone(),
        obs_mask=~ends,
    )


def of_counting(length: int) -> float:
    """Standard deviation of the numbers from 0 to length - 1."""
    return float(np.arange(length).std())


# --- errors


def test_a_model_that_knows_the_dynamics_makes_no_error_and_nothing_changes_is_off_by_the_way_gone() -> None:
    error = open_loop(Pusher(gain=1.0), pushed(7), context=3).errors()["obs"]
    np.testing.assert_allclose(error.model.values, [[0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(error.unchanged.values, np.array([[1, 2, 3, 4]]) / of_counting(7), rtol=1e-6)
    np.testing.assert_allclose(error.ratio, [0, 0, 0, 0], atol=1e-6)


def test_a_model_that_believes_in_half_the_motion_is_off_by_half_of_it() -> None:
    error = open_loop(Pusher(gain=0.5), pushed(7), context=3).errors()["obs"]
    np.testing.assert_allclose(error.model.mean, np.array([0.5, 1, 1.5, 2]) / of_counting(7), rtol=1e-6)
    np.testing.assert_allclose(error.ratio, [0.5] * 4, rtol=1e-6)


def test_a_model_that_believes_in_no_motion_is_as_good_as_nothing_changes() -> None:
    for name, error in open_loop(Pusher(gain=0.0), pushed(7), context=3).errors().items():
        if name in ("obs", "state/seen"):
            np.testing.assert_array_equal(error.model.values, error.unchanged.values)


def test_the_entries_of_an_observation_count_equally_whatever_their_units() -> None:
    # The first entry is foreseen. The second moves by 100 at each step, of which the model knows 1.
    error = open_loop(Pusher(gain=1.0), pushed(5, scale=(1.0, 100.0)), context=3).errors()["obs"]
    off = np.array([99, 198]) / (100 * of_counting(5))
    np.testing.assert_allclose(error.model.mean, np.sqrt(np.square(off) / 2), rtol=1e-6)


def test_an_entry_that_never_differs_keeps_its_units() -> None:
    error = open_loop(Pusher(gain=3.0), pushed(5, scale=(0.0, 0.0)), context=3).errors()["obs"]
    np.testing.assert_allclose(error.model.mean, [3, 6], rtol=1e-6)
    assert error.unchanged.mean.tolist() == [0, 0]
    assert error.ratio.tolist() == [np.inf, np.inf]


def test_states_are_compared_with_those_of_a_model_that_saw_the_rows() -> None:
    errors = open_loop(Pusher(gain=0.5), pushed(7, scale=(1.0, 0.0)), context=3).errors()
    # Off by half of the way in the first entry, and by as much in the second, which stays; scaled by the variance of
    # both entries together.
    way, total = np.array([0.5, 1, 1.5, 2]), np.sqrt(of_counting(7) ** 2 / 2)
    np.testing.assert_allclose(errors["state/seen"].model.mean, way / total, rtol=1e-6)
    np.testing.assert_allclose(errors["state/seen"].unchanged.mean, np.arange(1, 5) / np.sqrt(2) / total, rtol=1e-6)
    assert "state/age" not in errors  # whole numbers name something


def test_rewards_are_compared_with_what_each_predicted_action_earned() -> None:
    found = open_loop(Pusher(earned=2.5), pushed(6), context=3)
    # The state after row 2 predicts what the actions of rows 2, 3 and 4 earned; last known is that of row 1.
    assert found.earned.tolist() == [[2, 3, 4]]
    error = found.errors()["reward"]
    np.testing.assert_allclose(error.model.mean, np.array([0.5, 0.5, 1.5]) / of_counting(3), rtol=1e-6)
    np.testing.assert_allclose(error.unchanged.mean, np.array([1, 2, 3]) / of_counting(3), rtol=1e-6)


def test_a_context_that_ends_on_a_first_row_has_no_reward_that_could_stay() -> None:
    batch = pushed(6, windows=2)
    assert batch.is_first is not None
    batch.is_first[0, 2] = True
    error = open_loop(Pusher(), batch, context=3).errors()["reward"]
    assert error.model.count.tolist() == [2, 2, 2]
    assert error.unchanged.count.tolist() == [1, 1, 1]
    only = open_loop(Pusher(), pushed(6), context=1).errors()["reward"]
    assert only.unchanged.count.tolist() == [0] * 5
    assert np.isnan(only.ratio).all()


def test_continuation_is_compared_with_terminations_only() -> None:
    batch = pushed(6, windows=2)
    batch.terminations[0, 3] = True
    assert batch.is_first is not None and batch.truncations is not None
    batch.truncations[1, 3] = True
    batch.is_first[:, 5] = True  # rows 4 are the last observations
    found = open_loop(Pusher(goes_on=0.75), batch, context=3)
    assert found.went_on.tolist() == [[1, 0, 1], [1, 1, 1]]
    error = found.errors()["continue"]
    np.testing.assert_allclose(error.model.values[:, :2], [[0.25, 0.75], [0.25, 0.25]])
    assert error.unchanged.values[:, :2].tolist() == [[0, 1], [0, 0]]
    assert error.model.count.tolist() == [2, 2, 0]


def test_images_are_compared_by_pixels_between_0_and_1() -> None:
    class Gray(Pusher):
        """Predicts a uniform gray."""

        def update(self, state: State, action: Tensor, obs: Observation, **options: Any) -> State:
            assert isinstance(obs, Tensor)
            return State({"seen": obs[:, 0, 0].float(), "age": state["age"]})

        def decode(self, state: State) -> dict[str, Any]:
            return {"obs": torch.full((len(state["seen"]), 3, 2, 2), 0.5)}

    batch = pushed(4)
    levels = torch.tensor([0, 51, 102, 255], dtype=torch.uint8)
    images = Batch(levels[None, :, None, None, None].expand(1, 4, 3, 2, 2), *_rest(batch))
    error = open_loop(Gray((3, 2, 2)), images, context=2).errors()["obs"]
    np.testing.assert_allclose(error.model.mean, [0.1, 0.5], atol=1e-6)
    np.testing.assert_allclose(error.unchanged.mean, [0.2, 0.8], atol=1e-6)


def _rest(batch: Batch) -> tuple[Any, ...]:
    return (batch.actions, batch.rewards, batch.terminations, batch.truncations, batch.is_first, batch.obs_mask)


def test_one_hots_are_compared_by_their_probabilities() -> None:
    class Unsure(Pusher):
        """Predicts two classes with equal probability."""

        def decode(self, state: State) -> dict[str, Any]:
            return {"obs": torch.full((len(state["seen"]), 2), 0.5)}

    model = Unsure()
    model.config = WorldModelConfig(obs_shape=(2,), action_dim=1, obs_classes={"obs": (2,)})
    batch = pushed(4)
    one_hots = torch.eye(2)[torch.tensor([0, 0, 1, 0])].unsqueeze(0)
    error = open_loop(model, Batch(one_hots, *_rest(batch)), context=2).errors()["obs"]
    np.testing.assert_allclose(error.model.mean, [0.5, 0.5])
    np.testing.assert_allclose(error.unchanged.mean, [1, 0])


def test_a_model_that_pictures_nothing_is_measured_by_its_states_and_rewards() -> None:
    class Blind(Pusher):
        def decode(self, state: State) -> dict[str, Any]:
            return {}

    found = open_loop(Blind(), pushed(5), context=3)
    assert found.obs == {}
    assert set(found.errors()) == {"state/seen", "reward", "continue"}


# --- ends of episodes


def two_episodes(*, finals: bool = True) -> ReplayBuffer:
    """Five steps, then four; observations count from 0 in the first and from 100 in the second, rewards likewise."""
    buffer = ReplayBuffer(20, (2,), 1)
    for start, length in ((0, 5), (100, 4)):
        count = np.arange(start, start + length + finals, dtype=np.float32)
        ends = np.arange(length) == length - 1
        buffer.add_episode(np.stack([count, count], 1), np.ones((length, 1)), np.arange(start, start + length), ends)
    return buffer


def all_rows(buffer: ReplayBuffer) -> Batch:
    """The one window of all eleven rows, `o0 ... o4 o5* | p0 ... p3 p4*`, * being a last observation."""
    return buffer.sample(1, 11)


def test_nothing_counts_behind_the_end_of_the_episode_that_the_context_ends_in() -> None:
    found = open_loop(Pusher(), all_rows(two_episodes()), context=3)
    assert found.steps.tolist() == [[True] * 3 + [False] * 5]
    assert found.arrived.tolist() == found.steps.tolist()
    error = found.errors()["obs"]
    np.testing.assert_allclose(error.model.mean[:3], [0, 0, 0], atol=1e-6)
    assert np.isnan(error.model.mean[3:]).all() and np.isnan(error.ratio[3:]).all()
    assert found.errors()["reward"].model.count.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_the_state_starts_anew_where_an_episode_starts_in_the_context() -> None:
    found = open_loop(Pusher(), all_rows(two_episodes()), context=8)
    assert found.observed["age"].tolist() == [[1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5]]
    assert found.states["age"].tolist() == [[[2, 2, 2]]]
    assert found.steps.tolist() == [[True] * 3]
    np.testing.assert_allclose(found.obs["obs"][0, 0, 8:, 0], [102, 103, 104])


def test_a_context_that_ends_on_a_last_observation_predicts_nothing_that_counts() -> None:
    found = open_loop(Pusher(), all_rows(two_episodes()), context=6)
    assert not found.steps.any()
    for error in found.errors().values():
        assert np.isnan(error.model.mean).all()


def test_the_first_row_of_a_window_starts_anew_wherever_it_was_cut() -> None:
    batch = pushed(4)
    assert batch.is_first is not None and not batch.is_first.any()
    assert open_loop(Pusher(), batch, context=2).observed["age"].tolist() == [[1, 2, 3, 4]]


def test_the_last_reward_counts_where_no_last_observation_was_recorded_and_the_observation_does_not() -> None:
    batch = all_rows(two_episodes(finals=False))
    assert batch.obs_mask is not None and batch.obs_mask.tolist()[0] == [True] * 5 + [False] + [True] * 4 + [False]
    found = open_loop(Pusher(), batch, context=3)
    assert found.steps.tolist() == [[True] * 3 + [False] * 5]
    assert found.arrived.tolist() == [[True] * 2 + [False] * 6]
    errors = found.errors()
    assert errors["obs"].model.count.tolist() == errors["state/seen"].model.count.tolist() == [1, 1, *[0] * 6]
    assert errors["reward"].model.count.tolist() == [1, 1, 1, *[0] * 5]
    # The zeros that stand for it are no part of the scale.
    rows = np.array([0, 1, 2, 3, 4, 100, 101, 102, 103])
    np.testing.assert_allclose(errors["obs"].unchanged.mean[:2], np.array([1, 2]) / rows.std(), rtol=1e-6)


def test_nothing_counts_behind_a_context_whose_end_was_not_recorded() -> None:
    batch = pushed(6, windows=2)
    assert batch.obs_mask is not None
    batch.obs_mask[0, 2] = False
    found = open_loop(Pusher(), batch, context=3)
    assert found.steps.tolist() == found.arrived.tolist() == [[False] * 3, [True] * 3]


def test_a_batch_of_the_four_documented_fields_alone_gets_rows_for_its_last_rewards() -> None:
    batch = pushed(6)
    batch.terminations[0, 3] = True
    plain = Batch(batch.obs, batch.actions, batch.rewards, batch.terminations)
    found = open_loop(Pusher(), plain, context=2)
    # o0 o1 o2 o3 · o4: the third step ahead terminates.
    assert found.steps.tolist() == [[True, True, True, False]]
    assert found.arrived.tolist() == [[True, True, False, False]]
    assert found.earned[0, :3].tolist() == [1, 2, 3]
    assert found.went_on[0, :3].tolist() == [1, 1, 0]


# --- futures, and what stays as it was


def test_errors_are_those_of_the_mean_of_the_futures() -> None:
    model = Pusher(noise=0.5)
    found = open_loop(model, pushed(6), context=3, samples=50)
    assert found.obs["obs"].shape == (50, 1, 6, 2)
    assert found.obs["obs"][:, 0, 3].std(0).tolist() == pytest.approx([0.5, 0.5], rel=0.3)
    mean = found.obs["obs"].mean(0)[0, 3:]
    off = (mean - found.real.obs[0, 3:]).square().mean(-1).sqrt() / of_counting(6)  # type: ignore[index]
    np.testing.assert_allclose(found.errors()["obs"].model.values[0], off, rtol=1e-5)


def test_the_futures_of_a_window_start_from_its_own_state_with_its_own_actions() -> None:
    batch = pushed(5, windows=2)
    assert isinstance(batch.obs, Tensor)
    batch.obs[1] += 10
    batch.actions[1] *= 2
    futures = open_loop(Pusher(), batch, context=3, samples=3).obs["obs"]
    for future in futures:
        assert future[:, 3:, 0].tolist() == [[3, 4], [14, 16]]


def test_the_same_seed_gives_the_same_futures_and_another_one_others() -> None:
    def futures(seed: int) -> Tensor:
        return open_loop(Pusher(noise=1.0), pushed(6), context=3, samples=2, seed=seed).obs["obs"]

    first = futures(1)
    torch.manual_seed(99)
    assert torch.equal(futures(1), first)
    assert not torch.equal(futures(2), first)


def test_without_samples_nothing_is_left_to_chance() -> None:
    found = open_loop(Pusher(noise=1.0), pushed(6), context=3)
    np.testing.assert_allclose(found.errors()["obs"].model.values, 0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_its_mode_and_the_random_numbers_are_left_as_they_were(training: bool) -> None:
    modes: list[bool] = []

    class Watched(Pusher):
        def transition(self, state: State, action: Tensor, *, deterministic: bool = False) -> State:
            modes.append(self.training)
            return super().transition(state, action, deterministic=deterministic)

    model = Watched(noise=1.0).train(training)
    before = torch.get_rng_state()
    open_loop(model, pushed(6), context=3, samples=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training is training
    assert modes == [False] * 3
    assert model.gain.grad is None

    class Failing(Watched):
        def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
            torch.randn(())
            raise RuntimeError("no memory")

    failing = Failing().train(training)
    with pytest.raises(RuntimeError, match="no memory"):
        open_loop(failing, pushed(6), context=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert failing.training is training


def test_what_cannot_be_asked_for_is_named() -> None:
    with pytest.raises(ShapeMismatchError, match=r"5 rows in each window, expected more than context \(5\)"):
        open_loop(Pusher(), pushed(5), context=5)
    with pytest.raises(ConfigurationError, match="context is 0, expected a whole number from 1"):
        open_loop(Pusher(), pushed(5), context=0)
    with pytest.raises(ConfigurationError, match="samples is 0, expected a whole number from 1"):
        open_loop(Pusher(), pushed(5), context=2, samples=0)
    with pytest.raises(ConfigurationError, match="seed is -1, expected a whole number from 0"):
        open_loop(Pusher(), pushed(5), context=2, seed=-1)


# --- statistics


def test_statistics_are_over_the_windows_that_count() -> None:
    values = np.array([[1.0, 5.0, 1.0], [2.0, 7.0, np.nan], [6.0, np.inf, np.nan]])
    counts = np.array([[True, True, False], [True, True, False], [True, False, False]])
    error = HorizonError(values, counts)
    assert error.count.tolist() == [3, 2, 0]
    np.testing.assert_allclose(error.mean, [3, 6, np.nan])
    np.testing.assert_allclose(error.standard_error, [np.std([1, 2, 6], ddof=1) / np.sqrt(3), 1, np.nan])
    np.testing.assert_allclose(error.quantile(0.5), [2, 6, np.nan])
    np.testing.assert_allclose(error.quantile(1.0), [6, 7, np.nan])


def test_a_model_that_broke_down_is_not_counted_out() -> None:
    error = open_loop(Pusher(gain=float("nan")), pushed(5), context=3).errors()["obs"]
    assert np.isnan(error.model.mean).all() and np.isnan(error.ratio).all()
    assert error.model.count.tolist() == [1, 1]


# --- both families


SHAPES: dict[str, Any] = {
    "vector": (3,),
    "image": (3, 48, 48),
    "dictionary": {"camera": (3, 48, 48), "joints": (4,)},
}


def family(name: str, shape: Any, **fields: Any) -> WorldModel:
    torch.manual_seed(3)
    if name == "tdmpc2":
        fields = {"use_decoder": True, "episodic": True, **fields}
    return create_world_model(f"{name}:tiny", obs_shape=shape, action_dim=2, **fields).train()


def replayed(shape: Any) -> Batch:
    return create_random_buffer(60, shape, 2, 3, 20, seed=0).sample(4, 9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["dreamerv3", "tdmpc2"])
def test_predictions_are_those_of_the_models_own_interface(name: str, shape: Any) -> None:
    model, batch = family(name, shape), replayed(shape)
    found = open_loop(model, batch, context=4)
    model.eval()
    assert batch.is_first is not None

    def row(t: int) -> Observation:
        return {k: v[:, t] for k, v in batch.obs.items()} if isinstance(batch.obs, dict) else batch.obs[:, t]

    with torch.no_grad():
        state = model.encode(row(0), deterministic=True)
        for t in range(1, 4):
            state = model.update(
                state, batch.actions[:, t - 1], row(t), is_first=batch.is_first[:, t], deterministic=True
            )
        seen = model.decode(state)["obs"]
        ahead = model.rollout(state, batch.actions[:, 3:-1].transpose(0, 1), deterministic=True)
        expected = model.decode(ahead.states[2])["obs"]
    torch.testing.assert_close(found.rewards[0], ahead.rewards.T)
    torch.testing.assert_close(found.continues[0], ahead.continues.T)
    for key in found.obs:
        now, later = (seen[key], expected[key]) if isinstance(seen, dict) else (seen, expected)
        torch.testing.assert_close(found.obs[key][0, :, 3], now)
        torch.testing.assert_close(found.obs[key][0, :, 6], later)
    observations = {"obs"} if not isinstance(shape, dict) else {"obs/camera", "obs/joints"}
    states = {"state/deter", "state/stoch", "state/logits"} if name == "dreamerv3" else {"state/latent"}
    errors = found.errors()
    assert set(errors) == observations | states | {"reward", "continue"}
    for error in errors.values():
        assert error.model.values.shape == (4, 5)
        assert np.isfinite(error.model.values).all()


def test_tdmpc2_without_a_decoder_is_measured_by_its_latent_state() -> None:
    model, batch = family("tdmpc2", (3,), use_decoder=False), replayed((3,))
    found: OpenLoop = open_loop(model, batch, context=4)
    assert isinstance(batch.obs, Tensor)
    with torch.no_grad():
        real = torch.stack([model.encode(row, deterministic=True)["latent"] for row in batch.obs.unbind(1)], 1)
    scale = real.flatten(0, 1).var(0, correction=0).mean().sqrt()
    off = (found.states["latent"][0] - real[:, 4:]).square().mean(-1).sqrt() / scale
    error = found.errors()["state/latent"].model
    np.testing.assert_allclose(error.values[error.counts], off.numpy()[error.counts], rtol=1e-4)


WITHOUT: dict[str, Any] = {"dreamerv3": {"representation": "redundancy"}, "tdmpc2": {"use_decoder": False}}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_a_decoder_values_are_compared(name: str) -> None:
    model, batch = family(name, SHAPES["dictionary"], **WITHOUT[name]), replayed(SHAPES["dictionary"])
    if name == "dreamerv3":  # whose values are zero at first
        nn.init.normal_(model.critic.out.weight)  # type: ignore[union-attr]
    found = open_loop(model, batch, context=4)
    assert not found.obs and found.values is not None and found.observed_values is not None
    assert found.values.shape == (1, 4, 5) and found.observed_values.shape == (4, 9)
    assert np.isfinite(found.errors()["value"].model.values).all()
    if name == "dreamerv3":  # TD-MPC2's values are those of sampled actions
        with torch.no_grad():
            ahead = model.eval().value(State({key: value[0, :, 2] for key, value in found.states.items()}))
            seen = model.value(State({key: value[:, 6] for key, value in found.observed.items()}))
        torch.testing.assert_close(found.values[0, :, 2], ahead)
        torch.testing.assert_close(found.observed_values[:, 6], seen)
        assert float((ahead - seen).abs().min()) > 0


def test_a_model_of_several_tasks_predicts_each_window_in_its_own() -> None:
    model = family("tdmpc2", (3,), num_tasks=2, task_dim=4)
    batch = replayed((3,))
    both = [
        open_loop(model, Batch(batch.obs, *_rest(batch), {"task": torch.full((4, 9), task)}), context=4)
        for task in (0, 1)
    ]
    assert both[1].observed["task"].unique().tolist() == both[1].states["task"].unique().tolist() == [1]
    assert not torch.allclose(both[0].states["latent"], both[1].states["latent"])
