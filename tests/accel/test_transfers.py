"""Copies between host and device that can be tested without a GPU; `test_cuda.py` contains the others."""

from __future__ import annotations

import numpy as np
import torch

from worldflux.accel.transfers import copy_into, to_device, to_host


def test_arrays_come_back_as_they_are_and_bfloat16_as_float32() -> None:
    found = to_host(
        {"a": torch.tensor([[1, 2]]), "b": torch.tensor([0.5, 3.0], dtype=torch.bfloat16, requires_grad=True)}
    )
    assert found["a"].tolist() == [[1, 2]] and found["a"].dtype == np.int64
    assert found["b"].tolist() == [0.5, 3.0] and found["b"].dtype == np.float32


def test_a_tensor_on_the_target_device_is_not_copied() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
    assert to_device(tensor, torch.device("meta")).is_meta


def test_sources_are_written_into_the_targets_of_their_names() -> None:
    targets = {"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.uint8)}
    places = {name: target.data_ptr() for name, target in targets.items()}
    copy_into(
        targets, {"b": torch.tensor([1, 2, 3], dtype=torch.uint8), "a": torch.tensor([4.0, 5.0]), "c": torch.ones(1)}
    )
    assert targets["a"].tolist() == [4.0, 5.0] and targets["b"].tolist() == [1, 2, 3]
    assert {name: target.data_ptr() for name, target in targets.items()} == places
