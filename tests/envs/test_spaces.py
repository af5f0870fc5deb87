"""Codecs translate between Gymnasium spaces and the library's form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from worldflux.envs.spaces import ActionCodec, ObservationCodec
from worldflux.errors import ConfigurationError, ShapeMismatchError

IMAGE = spaces.Box(0, 255, (20, 24, 3), np.uint8)


def unbounded(shape: tuple[int, ...], dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, shape, dtype)


@pytest.mark.parametrize(
    ("space", "shape", "dtype", "classes"),
    [
        (unbounded((4,)), (4,), np.float32, {}),
        (unbounded((4,), np.float64), (4,), np.float32, {}),
        (unbounded(()), (1,), np.float32, {}),
        (unbounded((2, 3)), (6,), np.float32, {}),
        (spaces.Box(0, 255, (128,), np.uint8), (128,), np.float32, {}),
        (IMAGE, (3, 20, 24), np.uint8, {}),
        (spaces.Box(0, 255, (12, 20, 24), np.uint8), (12, 20, 24), np.uint8, {}),
        (spaces.Box(0, 255, (84, 84), np.uint8), (1, 84, 84), np.uint8, {}),
        (spaces.Discrete(5), (5,), np.float32, {"obs": (5,)}),
        (spaces.MultiDiscrete([3, 2]), (5,), np.float32, {"obs": (3, 2)}),
        (spaces.MultiBinary(3), (6,), np.float32, {"obs": (2, 2, 2)}),
        (
            spaces.Dict(a=unbounded((2,)), b=IMAGE, c=spaces.Discrete(3)),
            {"a": (2,), "b": (3, 20, 24), "c": (3,)},
            {"a": np.float32, "b": np.uint8, "c": np.float32},
            {"c": (3,)},
        ),
    ],
)
def test_observation_spaces_and_their_library_form(space: Any, shape: Any, dtype: Any, classes: Any) -> None:
    codec = ObservationCodec(space)
    sample = space.sample()

    single, was_batched = codec.encode_any(sample)

    assert (codec.obs_shape, codec.obs_dtype, codec.obs_classes) == (shape, dtype, classes)
    assert not was_batched
    for key, one in single.items() if isinstance(single, dict) else [(None, single)]:
        assert one.shape == (1, *(shape if key is None else shape[key]))
        assert one.dtype == (dtype if key is None else dtype[key])


def test_a_batch_of_observations_keeps_its_rows() -> None:
    codec = ObservationCodec(spaces.Dict(x=unbounded((2,)), n=spaces.Discrete(3, start=1)))

    encoded, was_batched = codec.encode_any({"x": [[1.0, 2.0], [3.0, 4.0]], "n": [1, 3]})

    assert was_batched and isinstance(encoded, dict)
    np.testing.assert_array_equal(encoded["x"], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(encoded["n"], [[1, 0, 0], [0, 0, 1]])


def test_several_choices_become_one_hots_in_a_row() -> None:
    encoded = ObservationCodec(spaces.MultiDiscrete([3, 2], start=[0, 5])).encode([[2, 5], [0, 6]])

    np.testing.assert_array_equal(encoded, [[0, 0, 1, 1, 0], [1, 0, 0, 0, 1]])


@pytest.mark.parametrize("space_shape", [(20, 24, 3), (3, 20, 24)])
def test_images_are_accepted_in_both_channel_orders(space_shape: tuple[int, ...]) -> None:
    codec = ObservationCodec(spaces.Box(0, 255, space_shape, np.uint8))
    chw = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 24), dtype=np.uint8)
    hwc = np.ascontiguousarray(chw.transpose(0, 2, 3, 1))

    for given_image in (chw, hwc):
        np.testing.assert_array_equal(codec.encode(given_image), chw)
        single, was_batched = codec.encode_any(given_image[1])
        np.testing.assert_array_equal(single, chw[1:])
        assert not was_batched


@pytest.mark.parametrize("channels_last", [True, False])
def test_stacked_frames_become_channels_one_frame_after_another(channels_last: bool) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 3, 20, 24), dtype=np.uint8)  # N, S, C, H, W
    given_frames = np.moveaxis(frames, 2, 4) if channels_last else frames
    codec = ObservationCodec(spaces.Box(0, 255, given_frames.shape[1:], np.uint8))
    assert codec.obs_shape == (12, 20, 24) and codec.obs_dtype == np.uint8
    encoded = codec.encode(given_frames)
    np.testing.assert_array_equal(encoded, frames.reshape(2, 12, 20, 24))
    np.testing.assert_array_equal(encoded[1, 3:6], frames[1, 1])


def test_an_encoded_observation_does_not_change_with_the_array_that_was_given() -> None:
    for space, given_obs in (
        (unbounded((2,)), np.ones((1, 2), np.float32)),
        (spaces.Box(0, 255, (3, 20, 24), np.uint8), np.ones((1, 3, 20, 24), np.uint8)),
    ):
        encoded = ObservationCodec(space).encode(given_obs)
        given_obs[:] = 7
        assert np.all(encoded == 1)


@pytest.mark.parametrize(
    ("space", "obs", "message"),
    [
        (unbounded((4,)), np.zeros(3), r"observation has shape \(3,\), expected \(4,\) for one .* or \(n_envs, 4\)"),
        (unbounded((2,)), [np.nan, 0.0], "contains NaN or infinite values, expected finite numbers"),
        (unbounded((2,), np.float64), [0, 1e39], r"observation holds 1e\+39, expected at most 3.4e\+38"),
        (unbounded((2,)), ["a", "b"], "has dtype <U1, expected numbers"),
        (unbounded((2,)), {"x": 0}, r"dictionary with keys \['x'\], expected an array"),
        (IMAGE, np.zeros((20, 24, 3), np.float32), "has dtype float32, expected uint8"),
        (IMAGE, np.zeros((20, 24, 4), np.uint8), r"has shape \(20, 24, 4\), expected \(20, 24, 3\)"),
        (spaces.Discrete(3), 3, r"has values between 3 and 3, expected \[0\] to \[2\]"),
        (spaces.Discrete(3), 0.5, "has dtype float64, expected whole numbers"),
        (spaces.Dict(a=unbounded((1,))), np.zeros(1), r"is an ndarray, expected a dictionary with keys \['a'\]"),
        (spaces.Dict(a=unbounded((1,))), {"b": [0.0]}, r"keys \['b'\], expected .* \['a'\]"),
        (
            spaces.Dict(a=unbounded((1,)), b=unbounded((1,))),
            {"a": [0.0], "b": [[0.0], [1.0]]},
            "disagree on the number of environments",
        ),
    ],
)
def test_an_observation_that_does_not_fit_says_what_was_expected(space: Any, obs: Any, message: str) -> None:
    with pytest.raises(ShapeMismatchError, match=message):
        ObservationCodec(space).encode_any(obs)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Tuple([spaces.Discrete(2)]), "observation is a Tuple space, which is not supported. Supported .* Box"),
        (spaces.Text(5), "Text space, which is not supported"),
        (spaces.Dict(inner=spaces.Dict(a=unbounded((1,)))), "observation 'inner' is a Dict space"),
        (spaces.Dict(), "empty Dict space"),
        (spaces.Box(0.0, 1.0, (64, 64, 3)), r"looks like an image \(64, 64, 3\) of floats, expected uint8"),
        (spaces.Box(0, 1, (2, 64, 64, 3)), r"looks like an image \(2, 64, 64, 3\) of floats, expected uint8"),
        (spaces.Box(0, 1, (64, 64, 3), np.int32), r"looks like an image \(64, 64, 3\) of int32, expected uint8"),
    ],
)
def test_an_unsupported_observation_space_names_those_that_are(space: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ObservationCodec(space)


@pytest.mark.parametrize(
    ("space", "kind", "classes", "dim"),
    [
        (spaces.Box(-2.0, 2.0, (3,)), "continuous", (), 3),
        (spaces.Box(0.0, 1.0, (2, 2)), "continuous", (), 4),
        (spaces.Discrete(4, start=-1), "discrete", (4,), 4),
        (spaces.MultiDiscrete([3, 2]), "multi_discrete", (3, 2), 5),
        (spaces.MultiDiscrete([[3, 2], [2, 4]]), "multi_discrete", (3, 2, 2, 4), 11),
        (spaces.MultiBinary(3), "multi_discrete", (2, 2, 2), 6),
        (spaces.MultiBinary((2, 2)), "multi_discrete", (2, 2, 2, 2), 8),
    ],
)
def test_actions_survive_the_way_to_the_library_and_back(space: Any, kind: str, classes: Any, dim: int) -> None:
    codec = ActionCodec(space)
    actions = np.stack([np.asarray(space.sample()) for _ in range(20)])

    library = codec.from_env(actions)

    assert (codec.action_type, codec.action_classes, codec.action_dim) == (kind, classes, dim)
    assert library.shape == (20, dim) and library.dtype == np.float32
    assert np.all((library >= -1) & (library <= 1))
    returned = codec.to_env(library)
    np.testing.assert_allclose(returned, actions, atol=1e-6)
    assert returned.dtype == space.dtype and all(space.contains(action) for action in returned)


def test_bounds_are_mapped_to_minus_one_and_one_and_actions_outside_are_clipped_both_ways() -> None:
    codec = ActionCodec(spaces.Box(np.array([0.0, -4.0], np.float32), np.array([10.0, 0.0], np.float32)))

    executed = codec.to_env(np.array([[-1, 1], [0, 0], [3, -3]], np.float32))

    np.testing.assert_allclose(executed, [[0, 0], [5, -2], [10, -4]])
    np.testing.assert_allclose(codec.from_env(np.array([[15.0, -8.0]], np.float32)), [[1, -1]])


def test_an_axis_without_a_choice_is_zero_in_the_library() -> None:
    codec = ActionCodec(spaces.Box(np.array([3.0], np.float32), np.array([3.0], np.float32)))

    assert codec.from_env(np.array([[3.0]])) == 0 and codec.from_env(np.array([[3.5]])) == 0
    assert codec.to_env(np.array([[0.7]])) == 3


def test_whole_number_boxes_are_rounded() -> None:
    codec = ActionCodec(spaces.Box(0, 3, (1,), np.int32))

    np.testing.assert_array_equal(codec.to_env(np.array([[-1.0], [0.2], [0.9]])), [[0], [2], [3]])


@given(st.floats(-1e6, 1e6, width=32), st.floats(0.125, 1e6, width=32), st.floats(-3, 3, width=32))
def test_an_action_for_the_environment_is_always_inside_its_box(low: float, size: float, action: float) -> None:
    space = spaces.Box(np.array([low], np.float32), np.array([np.float32(low) + np.float32(size)], np.float32))

    assert space.contains(ActionCodec(space).to_env(np.array([[action]], np.float32))[0])


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (unbounded((2,)), "has no finite bounds, expected Box with finite bounds, Discrete"),
        (spaces.Box(np.zeros(2, np.float32), np.array([1.0, np.inf], np.float32)), "has no finite bounds"),
        (spaces.Tuple([spaces.Discrete(2)]), "action space is a Tuple space, which is not supported"),
        (spaces.Dict(a=spaces.Discrete(2)), "action space is a Dict space"),
    ],
)
def test_an_unsupported_action_space_names_those_that_are(space: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ActionCodec(space)


def test_actions_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeMismatchError, match=r"actions have shape \(2, 3\), expected \(n_envs, 1\)"):
        ActionCodec(spaces.Box(-1.0, 1.0, (1,))).from_env(np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("space", "options"),
    [
        (spaces.Discrete(10**9), "Discrete space with 1,000,000,000 options"),
        (spaces.Discrete(2**16 + 1), "Discrete space with 65,537 options"),
        (spaces.MultiDiscrete([10**9, 3]), "MultiDiscrete space with 1,000,000,003 options"),
        (spaces.MultiDiscrete(np.full(10**5, 2)), "MultiDiscrete space with 200,000 options"),
        (spaces.MultiBinary(10**5), "MultiBinary space with 200,000 options"),
    ],
)
def test_one_hots_that_are_absurdly_wide_are_refused_at_once(space: Any, options: str) -> None:
    message = rf"{options}, .* expected at most 65,536\. Give it as a Box of a few numbers instead"
    for codec, whole in ((ObservationCodec, space), (ObservationCodec, spaces.Dict(a=space)), (ActionCodec, space)):
        with pytest.raises(ConfigurationError, match=message):
            codec(whole)
    for nested in (spaces.Dict(a=spaces.Dict(b=space)), spaces.Tuple([space])):
        with pytest.raises(ConfigurationError, match="which is not supported"):
            ObservationCodec(nested)


def test_one_hots_may_be_wide() -> None:
    assert ObservationCodec(spaces.Discrete(2**16)).encode(np.array([65_535]))[0, -1] == 1.0
