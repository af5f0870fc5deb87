import pytest
import torch

from worldflux.errors import BufferError, ShapeMismatchError
from worldflux.replay.batch import Batch, BatchRequest


def batch_of(**changes):
    fields = dict(
        obs=torch.arange(24.0).reshape(2, 3, 4),
        actions=torch.zeros(2, 3, 1),
        rewards=torch.arange(6.0).reshape(2, 3),
        terminations=torch.tensor([[0, 0, 1], [0, 0, 0]]),
    )
    return Batch(**{**fields, **changes})


def test_four_fields_are_enough_and_the_flags_become_bool():
    batch = batch_of()
    assert (batch.batch_size, batch.seq_len) == (2, 3)
    assert batch.terminations.dtype == torch.bool
    assert batch.terminations.tolist() == [[False, False, True], [False, False, False]]
    assert batch.truncations is None and batch.is_first is None and batch.extras == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5, 2])
def test_a_flag_is_zero_or_one(value):
    for name in ("terminations", "is_first"):
        with pytest.raises(BufferError, match=f"The batch's {name} has values other than 0 and 1"):
            batch_of(**{name: torch.tensor([[0, 1, value], [0, 0, 0]])})


def test_moving_a_batch_keeps_every_field_and_leaves_the_row_ids_on_the_cpu():
    rows = torch.arange(6).reshape(2, 3)
    batch = batch_of(
        obs={"a": torch.zeros(2, 3, 4), "b": torch.zeros(2, 3, 1, 8, 8, dtype=torch.uint8)},
        is_first=torch.ones(2, 3),
        extras={"deter": torch.zeros(2, 3, 5)},
        row_ids=rows,
    )
    moved = batch.to("meta")
    assert {key: value.device.type for key, value in moved.obs.items()} == {"a": "meta", "b": "meta"}
    assert moved.obs["b"].dtype == torch.uint8
    assert moved.extras["deter"].device.type == moved.is_first.device.type == moved.rewards.device.type == "meta"
    assert moved.row_ids is rows
    assert moved.truncations is None


def test_a_batch_is_made_anew_from_its_tensors_by_name():
    batch = batch_of(
        obs={"a": torch.zeros(2, 3, 4), "b": torch.ones(2, 3, 1)},
        truncations=torch.ones(2, 3),
        extras={"deter": torch.zeros(2, 3, 5)},
        row_ids=torch.arange(6).reshape(2, 3),
    )
    named = batch.named_tensors()
    assert list(named) == ["obs/a", "obs/b", "actions", "rewards", "terminations", "truncations", "extras/deter"]
    assert batch.tensors() == list(named.values())
    other = batch.with_tensors(
        {name: value + 1 if value.dtype != torch.bool else ~value for name, value in named.items()}
    )
    assert other.obs["a"].unique().tolist() == [1.0] and other.obs["b"].unique().tolist() == [2.0]
    assert torch.equal(other.rewards, batch.rewards + 1) and torch.equal(other.truncations, ~batch.truncations)
    assert other.extras["deter"].unique().tolist() == [1.0]
    assert other.is_first is None and other.row_ids is None
    plain = batch_of()
    assert torch.equal(plain.with_tensors(plain.named_tensors()).obs, plain.obs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.zeros(2)}, r"rewards have shape \(2,\), expected \[B, T\]"),
        ({"actions": torch.zeros(2, 3)}, "one-hot"),
        ({"obs": torch.zeros(2, 4, 4)}, r"obs has shape \(2, 4, 4\), expected \[B, T\] = \[2, 3\]"),
        ({"obs": {"x": torch.zeros(3, 3, 4)}}, r"obs\['x'\] has shape \(3, 3, 4\)"),
        ({"terminations": torch.zeros(2, 3, 1)}, r"terminations has shape \(2, 3, 1\)"),
        ({"extras": {"deter": torch.zeros(2, 2, 5)}}, r"extras\['deter'\]"),
        ({"row_ids": torch.zeros(3, 2)}, "row_ids has shape"),
    ],
)
def test_fields_that_disagree_are_named(changes, message):
    with pytest.raises(ShapeMismatchError, match=message):
        batch_of(**changes)


def test_a_request_leaves_length_and_device_open():
    assert BatchRequest(8) == BatchRequest(batch_size=8, seq_len=None, device="cpu")
