"""Data sets on the Hugging Face Hub: what is pushed, the card, and what is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.data_sets import acted, earned, observed
from helpers.hub import Hub
from huggingface_hub import DatasetCard

from worldflux import BufferError, ConfigurationError, HubError
from worldflux.datasets import lint, load
from worldflux.training import ReplayBuffer

NAME, ADDRESS = "ann/counts", "hf://datasets/ann/counts"


@pytest.fixture
def buffer() -> ReplayBuffer:
    """Three episodes, of which the first one terminates."""
    buffer = ReplayBuffer(100, (2,), 1, action_type="continuous", seed=0)
    for episode, length in enumerate((3, 5, 4)):
        ends = np.arange(length) == length - 1
        buffer.add_episode(
            observed(episode, length + 1),
            acted(episode, length),
            earned(episode, length),
            terminations=ends & (episode == 0),
            truncations=ends & (episode > 0),
        )
    return buffer


def content(buffer: ReplayBuffer, path: Path) -> dict[str, np.ndarray]:
    buffer.save(path)
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("read", [load, ReplayBuffer.load])
def test_a_pushed_data_set_is_equal_to_the_buffer(hub: Hub, buffer: ReplayBuffer, read: type, tmp_path: Path) -> None:
    assert buffer.push_to_hub(NAME) == f"{hub.url}/datasets/{NAME}"
    loaded = read(ADDRESS)
    expected, found = content(buffer, tmp_path / "mine.npz"), content(loaded, tmp_path / "theirs.npz")
    assert expected.keys() == found.keys() and found["rewards"][3] == 1000.5
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_pushed_data_set_is_checked_by_its_address(hub: Hub, buffer: ReplayBuffer) -> None:
    buffer.push_to_hub(NAME)
    report = lint(ADDRESS)
    assert (report.transitions, report.episodes) == (12, 3)


def test_only_the_data_and_the_card_are_pushed_and_no_pickle_is_downloaded(hub: Hub, buffer: ReplayBuffer) -> None:
    buffer.push_to_hub(NAME)
    files = hub.files(f"datasets/{NAME}")
    assert files.keys() - {".gitattributes"} == {"data.npz", "README.md"}
    files["data.pkl"] = files["loader.py"] = files["episodes.pt"] = b"code"
    load(ADDRESS)
    assert hub.downloads() == ["data.npz"]


def test_the_card_says_what_is_in_the_data(hub: Hub, buffer: ReplayBuffer) -> None:
    buffer.push_to_hub(NAME, env="Counting-v0", description="Counted by hand.")
    card = DatasetCard(hub.files(f"datasets/{NAME}")["README.md"].decode())
    assert {"reinforcement-learning", "worldflux", "Counting-v0"} <= set(card.data.tags)
    returns = [earned(0, 3).sum(), earned(1, 5).sum(), earned(2, 4).sum()]
    assert returns == [4.5, 5012.5, 8008.0]
    for line in (
        "Recorded transitions of **Counting-v0**, in the format of",
        "Counted by hand.",
        "| transitions | 12 |",
        "| complete episodes | 3 |",
        "| terminations | 1 |",
        "| truncations | 2 |",
        "| actions | continuous in [-1, 1] |",
        "| return of an episode | 4,342 | 4.5 | 8,008 |",
        "| length of an episode | 4 | 3 | 5 |",
        "| reward of a step | 1,085 | 0.5 | 2,004 |",
        "| `obs` | 12, 2 | float32 |",
        "| `final_obs` | 3, 2 | float32 |",
        'load("hf://datasets/ann/counts")',
    ):
        assert line in card.text, line
    assert "parts of episodes" not in card.text


def test_episodes_in_flight_and_dictionaries_are_described(hub: Hub) -> None:
    space = {"image": (3, 4, 4), "speed": (2,)}
    buffer = ReplayBuffer(50, space, 3, action_type="discrete", seed=0)
    obs = {"image": np.zeros((6, 3, 4, 4), np.uint8), "speed": np.zeros((6, 2), np.float32)}
    actions = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1]]
    buffer.add_episode(obs, actions, np.ones(5, np.float32), terminations=np.arange(5) == 4)
    buffer.push_to_hub(NAME)
    text = hub.files(f"datasets/{NAME}")["README.md"].decode()
    assert "| `obs/image` | 5, 3, 4, 4 | uint8 |" in text and "| actions | discrete, one-hot |" in text
    assert "How they were recorded was not stated." in text
    assert load(ADDRESS).obs_shape == space


def test_an_empty_buffer_has_a_card_without_returns(hub: Hub) -> None:
    ReplayBuffer(50, (2,), 1, seed=0).push_to_hub(NAME)
    text = hub.files(f"datasets/{NAME}")["README.md"].decode()
    assert "| transitions | 0 |" in text and "return of an episode" not in text


def test_what_is_no_data_set_is_refused(hub: Hub, buffer: ReplayBuffer) -> None:
    with pytest.raises(ConfigurationError, match=r"is the address of a model, expected that of a data set"):
        load("hf://ann/counts")
    with pytest.raises(HubError, match="hf://datasets/ann/other does not exist"):
        ReplayBuffer.load("hf://datasets/ann/other")
    hub.put("datasets/bob/notes", {"README.md": b"notes", "data.pkl": b"a pickle"})
    with pytest.raises(HubError, match=r"hf://datasets/bob/notes is not a repository of worldflux: it has no \*\.npz"):
        load("hf://datasets/bob/notes")
    buffer.push_to_hub(NAME)
    hub.files(f"datasets/{NAME}")["data.npz"] = hub.files(f"datasets/{NAME}")["data.npz"][:300]
    with pytest.raises(BufferError, match=r"data\.npz"):
        load(ADDRESS)


def test_data_sets_of_other_formats_are_downloaded_whole(hub: Hub, tmp_path: Path) -> None:
    np.savez(
        tmp_path / "flat.npz", obs=observed(1, 4), actions=acted(1, 4), rewards=earned(1, 4), dones=np.zeros(4, bool)
    )
    hub.put("datasets/bob/flat", {"data.npz": (tmp_path / "flat.npz").read_bytes()})
    buffer = load("hf://datasets/bob/flat", format="arrays", keys={"obs": "obs", "terminations": "dones"}, align="own")
    assert buffer.num_transitions == 4
