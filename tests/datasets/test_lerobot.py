"""Data sets of LeRobot as versions 2.1 and 3.0 lay them out, with videos and with images in the tables."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data_sets import acted, assert_holds, earned, observed, stored

from worldflux.datasets import detect, load
from worldflux.errors import BufferError, ConfigurationError, WorldFluxError

LENGTHS = {0: 3, 1: 1, 2: 4}
HELD = [(number, length, "truncated", False) for number, length in LENGTHS.items()]
FPS = 10
CAMERA = "observation.images.top"


def shade(number: int, t: int) -> int:
    return 20 + 60 * number + 10 * t


def write_video(path: Path, shades: list[int]) -> None:
    """Grey pictures of 64 x 48, encoded as LeRobot does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=Fraction(FPS), options={"g": "2", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for grey in shades:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def table(numbers: list[int], **more: Any) -> pa.Table:
    """The rows of episodes: no last observation, and no row of its own for it."""
    join = np.concatenate
    rows = {
        "observation.state": pa.FixedSizeListArray.from_arrays(
            pa.array(join([observed(n, LENGTHS[n]) for n in numbers]).reshape(-1)), 2
        ),
        "action": pa.array(join([acted(n, LENGTHS[n]) for n in numbers]).tolist(), pa.list_(pa.float32())),
        "next.reward": pa.array(join([earned(n, LENGTHS[n]) for n in numbers])),
        "next.done": pa.array(join([(np.arange(LENGTHS[n]) == LENGTHS[n] - 1) & (n != 1) for n in numbers])),
        "timestamp": pa.array(join([np.arange(LENGTHS[n], dtype=np.float32) / FPS for n in numbers])),
        "frame_index": pa.array(join([np.arange(LENGTHS[n]) for n in numbers])),
        "episode_index": pa.array(np.repeat(numbers, [LENGTHS[n] for n in numbers])),
    }
    return pa.table({**rows, **{name: make(numbers) for name, make in more.items()}})


def png(numbers: list[int]) -> pa.Array:
    """Images as `datasets` embeds them: red tells the episode, green the step."""
    found = []
    for number in numbers:
        for t in range(LENGTHS[number]):
            picture = np.zeros((20, 24, 3), np.uint8)
            picture[..., 2], picture[..., 1] = 50 * number + 1, t + 1  # OpenCV has blue first
            found.append({"bytes": cv2.imencode(".png", picture)[1].tobytes(), "path": "frame.png"})
    return pa.array(found)


def put(path: Path, content: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path)


def write(root: Path, version: str, *, camera: str = "video", drop: tuple[str, ...] = ()) -> Path:
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": [2], "names": ["a", "b"]},
        "action": {"dtype": "float32", "shape": [1], "names": None},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "observation.language": {"dtype": "string", "shape": [1], "names": None},
    }
    if camera:
        shape = [48, 64, 3] if camera == "video" else [20, 24, 3]
        features[CAMERA] = {"dtype": camera, "shape": shape, "names": ["height", "width", "channels"]}
    images = {CAMERA: png} if camera == "image" else {}
    (root / "meta").mkdir(parents=True)
    info = {"codebase_version": version, "fps": FPS, "features": features, "chunks_size": 1000}
    (root / "meta/info.json").write_text(json.dumps(info))
    stats = {"action": {"min": [-2.0], "max": [2.0]}}
    if version == "v2.1":
        for number, length in LENGTHS.items():
            put(root / f"data/chunk-000/episode_{number:06d}.parquet", table([number], **images).drop_columns(drop))
            if camera == "video":
                video = root / f"videos/chunk-000/{CAMERA}/episode_{number:06d}.mp4"
                write_video(video, [shade(number, t) for t in range(length)])
        (root / "meta/episodes_stats.jsonl").write_text(json.dumps({"episode_index": 0, "stats": stats}))
        return root
    (root / "meta/stats.json").write_text(json.dumps(stats))
    put(root / "data/chunk-000/file-000.parquet", table([0, 1], **images).drop_columns(drop))
    put(root / "data/chunk-000/file-001.parquet", table([2], **images).drop_columns(drop))
    if camera == "video":  # the first video has two episodes, the second has others before ours
        folder = root / f"videos/{CAMERA}/chunk-000"
        write_video(folder / "file-000.mp4", [shade(n, t) for n in (0, 1) for t in range(LENGTHS[n])])
        write_video(folder / "file-001.mp4", [255, 255] + [shade(2, t) for t in range(LENGTHS[2])])
    places = {"chunk_index": [0, 0, 0], "file_index": [0, 0, 1], "from_timestamp": [0.0, 3 / FPS, 2 / FPS]}
    listed = {f"videos/{CAMERA}/{name}": pa.array(values) for name, values in places.items()}
    put(root / "meta/episodes/chunk-000/file-000.parquet", pa.table({"episode_index": pa.array([0, 1, 2]), **listed}))
    return root


VERSIONS = pytest.mark.parametrize("version", ["v2.1", "v3.0"])


@VERSIONS
def test_states_are_read_without_last_observations(
    version: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "set", version)
    assert detect(path) == "lerobot"
    assert_holds(load(path, obs="observation.state"), HELD)
    assert "ends='termination'" in caplog.text
    ends = [one.end for one in stored(load(path, obs="state", ends="termination"))]
    assert ends == ["terminated", "truncated", "terminated"]


@VERSIONS
def test_frames_of_videos_belong_to_their_rows(version: str, tmp_path: Path) -> None:
    buffer = load(write(tmp_path / "set", version), image_size=(16, 32))
    assert buffer.obs_shape == {"state": (2,), "images.top": (3, 16, 32)}
    for number, one in enumerate(stored(buffer)):
        expected = np.array([shade(number, t) for t in range(LENGTHS[number])])
        pictures = one.obs["images.top"].astype(int)
        assert np.abs(pictures - expected[:, None, None, None]).max() <= 4
        np.testing.assert_array_equal(one.obs["state"], observed(number, LENGTHS[number]))


@VERSIONS
def test_images_in_the_tables_are_decoded(version: str, tmp_path: Path) -> None:
    buffer = load(write(tmp_path / "set", version, camera="image"), obs={"top": CAMERA})
    for number, one in enumerate(stored(buffer)):
        assert one.obs["top"].shape[1:] == (3, 20, 24)
        steps = np.arange(LENGTHS[number])
        np.testing.assert_array_equal(one.obs["top"][:, 0, 3, 3], 50 * number + 1 + 0 * steps)
        np.testing.assert_array_equal(one.obs["top"][:, 1, 3, 3], steps + 1)


@VERSIONS
def test_the_recorded_range_of_actions_can_be_their_bounds(version: str, tmp_path: Path) -> None:
    path = write(tmp_path / "set", version, camera="")
    buffer = load(path, action_bounds="stats")
    np.testing.assert_allclose(stored(buffer)[2].actions, acted(2, 4) / 2)
    assert buffer.obs_shape == (2,)
    (path / "meta" / ("stats.json" if version == "v3.0" else "episodes_stats.jsonl")).write_text("{}")
    with pytest.raises(BufferError, match="Pass action_low and action_high"):
        load(path, action_bounds="stats")


def test_rows_of_different_lengths_are_refused_whatever_their_sum(tmp_path: Path) -> None:
    root = write(tmp_path / "robot", "v2.1", camera="image")
    path = sorted((root / "data").glob("*/*.parquet"))[-1]
    rows = pq.read_table(path)
    ragged = [[1.0], [1.0, 2.0, 3.0], *[[1.0, 2.0]] * (len(rows) - 2)]
    at = rows.column_names.index("observation.state")
    pq.write_table(rows.set_column(at, "observation.state", pa.array(ragged, pa.list_(pa.float32()))), path)
    with pytest.raises(BufferError, match=r"'observation\.state' has rows of different lengths"):
        load(root, obs="state")


def test_a_reward_that_was_asked_for_and_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no 'gain'\. It has action"):
        load(write(tmp_path / "robot", "v2.1"), obs="state", reward="gain")


def test_missing_rewards_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    buffer = load(write(tmp_path / "set", "v3.0", camera="", drop=("next.reward", "next.done")), ends="termination")
    assert "no 'next.reward'" in caplog.text
    assert [(one.end, one.rewards.any()) for one in stored(buffer)] == [("terminated", False)] * 3


@VERSIONS
def test_missing_videos_and_damaged_files_are_refused(version: str, tmp_path: Path) -> None:
    path = write(tmp_path / "set", version)
    video = sorted(path.glob("videos/**/*.mp4"))[-1]
    whole = video.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2]):
        video.write_bytes(content)
        with pytest.raises(WorldFluxError):
            load(path)
    video.unlink()
    with pytest.raises(BufferError, match=r"no video .* obs='observation\.state'"):
        load(path)
    with pytest.raises(ConfigurationError, match=r"no observation 'stat'.* It has observation"):
        load(path, obs="stat")
    data = sorted(path.glob("data/**/*.parquet"))[-1]
    data.write_bytes(data.read_bytes()[:-50])
    with pytest.raises(BufferError, match="not a readable Parquet file"):
        load(path, obs="state")
    (path / "meta/info.json").write_text("[]")
    with pytest.raises(BufferError, match="has no features"):
        load(path)


def test_a_video_with_too_few_frames_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "set", "v2.1")
    write_video(path / f"videos/chunk-000/{CAMERA}/episode_000002.mp4", [1, 2])
    with pytest.raises(BufferError, match="has 2 frames, and frame 2 was asked for"):
        load(path)


def test_a_video_that_goes_on_after_its_episode_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "set", "v2.1")
    load(path)
    assert "goes on" not in caplog.text
    write_video(path / f"videos/chunk-000/{CAMERA}/episode_000002.mp4", [shade(2, t) for t in range(6)])
    assert load(path).num_transitions == 8
    assert "episode_000002.mp4 goes on after frame 3, for which there is the last row of an episode" in caplog.text


@VERSIONS
def test_pictures_of_another_size_than_stated_are_not_decoded(version: str, tmp_path: Path) -> None:
    for camera in ("video", "image"):
        path = write(tmp_path / camera, version, camera=camera)
        info = json.loads((path / "meta/info.json").read_text())
        info["features"][CAMERA]["shape"] = [3, 10, 20]
        (path / "meta/info.json").write_text(json.dumps(info))
        with pytest.raises(BufferError, match=r"a picture of (48 x 64|20 x 24) pixels, .* description says 200 pixels"):
            load(path)


@pytest.mark.parametrize("encode", [".png", ".jpg"])
def test_an_enormous_picture_is_refused_before_it_is_decoded(
    encode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(cv2.imencode(encode, np.zeros((20, 24, 3), np.uint8))[1].tobytes())
    size = np.array([30000, 30000], ">u4" if encode == ".png" else ">u2").tobytes()
    at = 16 if encode == ".png" else data.index(b"\xff\xc0") + 5
    data[at : at + len(size)] = size
    path = write(tmp_path / "set", "v3.0", camera="")
    info = json.loads((path / "meta/info.json").read_text())
    info["features"][CAMERA] = {"dtype": "image"}
    (path / "meta/info.json").write_text(json.dumps(info))
    for one in path.glob("data/*/*.parquet"):
        rows = pq.read_table(one)
        pq.write_table(rows.append_column(CAMERA, pa.array([{"bytes": bytes(data)}] * len(rows))), one)
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(BufferError, match=r"a picture of 30000 x 30000 pixels, expected at most 33,554,432"):
        load(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("episode_index", "a", "'episode_index' is 'a' in row 0, expected whole numbers from 0"),
        ("episode_index", np.nan, "'episode_index' is .*nan.* in row 0, expected whole numbers from 0"),
        ("frame_index", 0.5, "'frame_index' is .*0.5.* in row 0, expected whole numbers from 0"),
        ("frame_index", -1, "'frame_index' is .*-1.* in row 0, expected whole numbers from 0"),
        ("next.done", "yes", "next.done has dtype object, expected numbers"),
    ],
)
def test_numbers_of_episodes_and_frames_are_whole(name: str, value: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "set", "v3.0")
    for one in path.glob("data/*/*.parquet"):
        rows = pq.read_table(one)
        pq.write_table(rows.set_column(rows.column_names.index(name), name, pa.array([value] * len(rows))), one)
    with pytest.raises(BufferError, match=message):
        load(path, ends="termination")


@pytest.mark.parametrize("stats", [{"min": [-2, -2], "max": [2, 2]}, {"min": [2], "max": [-2]}, {"min": [-2]}])
def test_wrong_stats_are_named(stats: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "set", "v3.0", camera="")
    (path / "meta/stats.json").write_text(json.dumps({"action": stats}))
    with pytest.raises(BufferError, match=r"stats\.json.* action_bounds='stats' takes.* Pass action_low and action"):
        load(path, action_bounds="stats")


def test_a_camera_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    path = write(tmp_path / "set", "v2.1")
    info = json.loads((path / "meta/info.json").read_text())
    info["features"]["observation/../../x"] = {"dtype": "video"}
    (path / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(BufferError, match="without slashes"):
        load(path)
