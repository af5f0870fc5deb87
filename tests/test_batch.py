import pytest
import torch

from worldflux.errors import ShapeMismatchError
from worldflux.training.batch import Batch, BatchRequest


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


def test_moving_a_batch_keeps_every_field_and_leaves_the_row_ids_on_the_cpu():
    rows = torch.arange(6).reshape(2, 3)
    batch = batch_of(
        obs={"a": torch.zeros(2, 3, 4), "b": torch.zeros(2, 3, 1, 8, 8, dtype=torch.uint8)},
        is_first=torch.ones(2, 3),
        extras={"deter": torch.zeros(2, 3, 5)},
        rows=rows,
    )
    moved = batch.to("meta")
    assert {key: value.device.type for key, value in moved.obs.items()} == {"a": "meta", "b": "meta"}
    assert moved.obs["b"].dtype == torch.uint8
    assert moved.extras["deter"].device.type == moved.is_first.device.type == moved.rewards.device.type == "meta"
    assert moved.rows is rows
    assert moved.truncations is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.zeros(2)}, r"rewards have shape \(2,\), expected \[B, T\]"),
        ({"actions": torch.zeros(2, 3)}, "one-hot"),
        ({"obs": torch.zeros(2, 4, 4)}, r"obs has shape \(2, 4, 4\), expected \[B, T\] = \[2, 3\]"),
        ({"obs": {"x": torch.zeros(3, 3, 4)}}, r"obs\['x'\] has shape \(3, 3, 4\)"),
        ({"terminations": torch.zeros(2, 3, 1)}, r"terminations has shape \(2, 3, 1\)"),
        ({"extras": {"deter": torch.zeros(2, 2, 5)}}, r"extras\['deter'\]"),
        ({"rows": torch.zeros(3, 2)}, "rows has shape"),
    ],
)
def test_fields_that_disagree_are_named(changes, message):
    with pytest.raises(ShapeMismatchError, match=message):
        batch_of(**changes)


def test_a_request_leaves_length_and_device_open():
    assert BatchRequest(8) == BatchRequest(batch_size=8, seq_len=None, device="cpu")
