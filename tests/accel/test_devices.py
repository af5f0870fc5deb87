"""Missing and unsupported devices in every function that takes a device."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sb3_families import AnySpaces, make

from worldflux import WorldFluxAgent, create_world_model
from worldflux.accel.device import resolve_device
from worldflux.cli.main import main
from worldflux.errors import ConfigurationError
from worldflux.models.base import WorldModel
from worldflux.training import ReplayBuffer, Trainer, TrainingConfig

UNSUPPORTED = ["mps", "mps:0", "xpu", "xla", "hpu", "mtia", "vulkan", "ipu", "privateuseone", torch.device("mps")]
UNKNOWN = ["gpu", "", "tpu", None, 1.5, True, ["cpu"], "cuda:-1"]


def small_model() -> WorldModel:
    return create_world_model("dreamerv3:tiny", obs_shape=(3,), action_dim=2)


def loaded(device: Any, directory: Path) -> Any:
    small_model().save_pretrained(directory)
    return type(small_model()).from_pretrained(directory, device=device)


def saved_agent(device: Any, directory: Path) -> Any:
    file = io.BytesIO()
    make("dreamerv3").save(file)
    return WorldFluxAgent.load(file, device=device)


def sampled(device: Any, directory: Path) -> Any:
    buffer = ReplayBuffer(10, (1,), 1)
    buffer.add_episode(np.zeros((3, 1)), np.zeros((3, 1)), np.zeros(3))
    return buffer.sample(1, 2, device)


DOORS: dict[str, Callable[[Any, Path], Any]] = {
    "WorldFluxAgent": lambda device, directory: make("dreamerv3", AnySpaces(), device=device),
    "WorldFluxAgent.load": saved_agent,
    "create_world_model": lambda device, directory: create_world_model("tdmpc2:tiny", device=device),
    "from_pretrained": loaded,
    "Trainer": lambda device, directory: Trainer(small_model(), TrainingConfig(device=device)),
    "sample": sampled,
}


@pytest.mark.parametrize("device", UNSUPPORTED, ids=str)
def test_an_unsupported_device_is_an_error(device: Any) -> None:
    count = torch.cuda.device_count()
    message = rf"device is '{device}', which worldflux does not support.* torch sees {count} here\. Use device='auto'"
    with pytest.raises(ConfigurationError, match=message):
        resolve_device(device)


def test_the_first_missing_cuda_device_is_an_error() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ConfigurationError, match=rf"device is 'cuda:{count}', but torch sees {count} CUDA devices"):
        resolve_device(f"cuda:{count}")


@pytest.mark.parametrize("device", UNKNOWN, ids=repr)
def test_an_invalid_device_name_is_an_error(device: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"device is .*, expected 'auto', 'cpu', 'cuda' or 'cuda:<index>'"):
        resolve_device(device)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("device", ["mps", "cuda:97"])
def test_every_function_with_a_device_names_the_available_devices(door: str, device: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"device is '{device}'.* torch sees \d+ .*Use device='auto' or 'cpu'"
    ):
        DOORS[door](device, tmp_path)


def test_an_agent_needs_a_device_with_values() -> None:
    with pytest.raises(ConfigurationError, match="device is 'meta', which worldflux does not support"):
        make("dreamerv3", AnySpaces(), device="meta")
    assert create_world_model("dreamerv3:tiny", device="meta").device.type == "meta"


def test_the_command_line_reports_the_device_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert main(["train", "dreamerv3:tiny", "CartPole-v1", "--steps", "10", "--run", run, "--device", "mps"]) == 2
    assert capsys.readouterr().err.count("device is 'mps'") == 1
    assert not Path(run).exists()
