"""The setting `compile`: its requirements, and the messages if they are missing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from worldflux import ConfigurationError, WorldModel, create_world_model
from worldflux.accel import compilation as compiling
from worldflux.accel.compilation import compiles
from worldflux.training import Trainer, TrainingConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Simulates a machine with Python's header files, but without compilers and Triton."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    return monkeypatch


def install(name: str, directory: Path) -> None:
    (directory / name).write_text("#!/bin/sh\n")
    (directory / name).chmod(0o755)


def test_auto_compiles_only_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_missing", lambda device: None)
    assert [compiles(setting, CPU) for setting in ("auto", True, False)] == [False, True, False]
    assert [compiles(setting, CUDA) for setting in ("auto", True, False)] == [True, True, False]


def test_compiling_for_a_cpu_needs_a_cpp_compiler_and_headers(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"needs a C\+\+ compiler \(such as g\+\+\) for cpu.*compile='auto'"):
        compiles(True, CPU)
    assert not compiles("auto", CPU) and not compiles(False, CPU)
    install("my-compiler", tmp_path)
    bare.setenv("CXX", "my-compiler")
    assert compiles(True, CPU)
    (tmp_path / "Python.h").unlink()
    with pytest.raises(ConfigurationError, match="needs Python's header files"):
        compiles(True, CPU)


def test_compiling_for_cuda_needs_triton_and_a_c_compiler(
    bare: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigurationError, match="needs Triton for cuda"):
        compiles(True, CUDA)
    bare.setattr(compiling, "find_spec", lambda name: object())
    with caplog.at_level(logging.INFO, "worldflux.training"):
        assert not compiles("auto", CUDA)
    assert caplog.messages == [
        "the model is not compiled: torch.compile needs a C compiler (such as gcc), which was not found"
    ]
    install("gcc", tmp_path)
    assert compiles("auto", CUDA) and compiles(True, CUDA)


def test_the_trainer_compiles_world_models_when_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_missing", lambda device: None)
    compiled: list[nn.Module] = []
    model = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1)
    monkeypatch.setattr(type(model), "compile_functions", lambda self: compiled.append(self))
    Trainer(model, TrainingConfig(device="cpu"))
    Trainer(model, TrainingConfig(device="cpu", compile=False))
    assert compiled == []
    Trainer(model, TrainingConfig(device="cpu", compile=True))
    assert compiled == [model]


def test_by_default_a_model_compiles_nothing() -> None:
    model = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=1)
    before = set(vars(model))
    WorldModel.compile_functions(model)
    assert set(vars(model)) == before
