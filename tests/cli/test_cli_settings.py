"""No setting is accepted and ignored, whether it is given to the command line, the agent or the trainer."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_models import SIZES

from worldflux import BufferError, ConfigurationError, WorldFluxAgent, create_world_model
from worldflux.cli.commands.train_offline import OfflineSettings, OfflineTraining
from worldflux.cli.main import main
from worldflux.config import DreamerV3Config, TDMPC2Config, WorldModelConfig
from worldflux.training import ReplayBuffer, Trainer, TrainingConfig, train

CONFIGS: dict[str, type[WorldModelConfig]] = {"dreamerv3": DreamerV3Config, "tdmpc2": TDMPC2Config}
OTHER: dict[str, Any] = {
    # Values for the command line that cannot be derived from the default.
    "model_name": "mine", "dtype": "bfloat16", "learning_rate": 0.05, "grad_clip": 0.01, "warmup_steps": 7,
    "loss_scales": '{"actor": 2.0}', "cnn_kernels": "[3,3,3,3]", "use_symlog": "false", "episodic": "true",
    "use_decoder": "true", "obs_classes": '{"obs": [3]}', "vmax": 9.0, "simnorm_dim": 4, "num_bins": 17, "bins": 17,
    "num_pi_trajs": 3, "discount_min": 0.9, "discount_max": 0.99, "log_std_min": -5.0, "momentum": 0.1, "rho": 0.4,
    "dropout": 0.2, "tau": 0.02, "unimix": 0.02, "kl_balance": 0.8, "lambda_": 0.9, "return_norm_rate": 0.02,
    "slow_critic_rate": 0.03, "encoder_lr_scale": 0.4, "num_elites": 20, "min_std": 0.1, "blocks": 2, "bspace": 4,
    "cnn_depth": 4, "representation": "redundancy", "task_dim": 8, "termination_coef": 2.0, "uniform_share": 0.1,
    "task_names": '["walk"]',
}  # fmt: skip
DERIVED = {
    # Fields whose other values are all refused, because they follow from other fields or have only one value.
    "dreamerv3": {
        "model_type", "latent_type", "dynamics_type", "latent_dim", "stoch_dim", "encoder_type", "decoder_type",
        "action_classes", "action_type",
    },
    "tdmpc2": {
        "model_type", "latent_type", "dynamics_type", "deter_dim", "stoch_dim", "action_type", "action_classes", "vmin",
        "vmax", "num_tasks", "task_action_dims",
    },
}  # fmt: skip
RULED = {
    "dreamerv3": {"device", "obs_shape", "action_dim", "learning_rate", "warmup_steps", "train_ratio", "seq_len"},
    "tdmpc2": {"device", "obs_shape", "action_dim", "learning_rate", "grad_clip"},
}
"""Fields that `train-offline` refuses with the name of what decides about them."""


def buffer_of(actions: Any = None) -> ReplayBuffer:
    rng, buffer = np.random.default_rng(0), ReplayBuffer(500, (3,), 2)
    for _ in range(4):
        made = rng.uniform(-1, 1, (20, 2)) if actions is None else actions(rng)
        buffer.add_episode(rng.normal(size=(21, 3)), made, rng.normal(size=20), np.arange(20) == 19)
    return buffer


@pytest.fixture(autouse=True)
def _with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer_of().save("data.npz")


def other_value(family: str, name: str) -> Any:
    """Another value of a field, as text for the command line."""
    if name in OTHER:
        return OTHER[name]
    before = getattr(CONFIGS[family].from_size("tiny", obs_shape=(3,), action_dim=2, **SIZES[family]), name)
    if isinstance(before, float):
        return before * 2 if before else 0.5
    return 2 * before if isinstance(before, int) and before else "[4]" if before == () else "other" if before else 3


def config_with(family: str, given: tuple[str, ...]) -> WorldModelConfig:
    """Configuration of the model that `train-offline` builds with these --set."""
    settings = OfflineSettings(set=given, eval_share=0)
    return OfflineTraining(f"{family}:tiny", "data.npz", settings, None, ExitStack()).model.config


EVERY = [(family, item.name) for family, cls in CONFIGS.items() for item in fields(cls)]


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_every_field_reaches_the_model_or_is_refused_with_what_rules(family: str, name: str) -> None:
    """`tests/config/test_config_fields.py` shows that every field has an effect in the model."""
    size = {key: value for key, value in SIZES[family].items() if key != name}
    given = tuple(f"{key}={value}" for key, value in {**size, name: other_value(family, name)}.items())
    if name in RULED[family]:
        ruling = "(--|the data has|an agent)"
        with pytest.raises(ConfigurationError, match=f"--set {name} would change nothing here: .*{ruling}"):
            config_with(family, given)
    elif name in DERIVED[family]:
        with pytest.raises((ConfigurationError, BufferError), match=name if name != "action_classes" else "action_"):
            config_with(family, given)
    else:
        usual = create_world_model(f"{family}:tiny", obs_shape=(3,), action_dim=2, **SIZES[family])
        assert getattr(config_with(family, given), name) != getattr(usual.config, name)


def trained(family: str, *options: str) -> dict[str, torch.Tensor]:
    sizes = [word for name, value in SIZES[family].items() for word in ("--set", f"{name}={value}")]
    shape = [] if "--batch-size" in options else ["--batch-size", "2"]
    shape += [] if "--seq-len" in options else ["--seq-len", "6"]
    length = [] if "--steps" in options else ["--steps", "3"]
    command = ["train-offline", f"{family}:tiny", "data.npz", *length, *shape, *sizes, *options, "--run", "run"]
    assert main(command) == 0
    weights = create_world_model("run/model").state_dict()
    Path("run").rename(f"run{len(list(Path().glob('run*')))}")
    return weights


OPTIONS = [
    ("--steps", "2"),
    ("--eval-share", "0"),
    ("--seed", "7"),
    ("--learning-rate", "0.05"),
    ("--batch-size", "3"),
    ("--seq-len", "7"),
    ("--grad-clip", "0.001"),
    ("--warmup-steps", "10"),
]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_option_of_train_offline_changes_what_is_learned(family: str) -> None:
    usual = trained(family)
    assert all(torch.equal(value, usual[name]) for name, value in trained(family).items())
    for option in OPTIONS:
        changed = trained(family, *option)
        assert any(not torch.equal(value, usual[name]) for name, value in changed.items()), option
    # The other options set where to train and when something is written.
    told = {option.removeprefix("--").replace("-", "_") for option, _ in OPTIONS}
    elsewhere = {"device", "dtype", "compile", "track", "track_project", "set", "storage"}
    elsewhere |= {"checkpoint_interval", "eval_interval", "log_interval"}
    assert told | elsewhere == {item.name for item in fields(OfflineSettings)}


@pytest.mark.parametrize(
    ("family", "name", "ruling"),
    [
        ("tdmpc2", "learning_rate", "--learning-rate"),
        ("tdmpc2", "grad_clip", "--grad-clip"),
        ("dreamerv3", "warmup_steps", "--warmup-steps"),
        ("dreamerv3", "device", "--device"),
    ],
)
def test_what_rules_elsewhere_is_refused_before_there_is_a_directory(
    family: str, name: str, ruling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train-offline", f"{family}:tiny", "data.npz", "--set", f"{name}=1"]) == 2
    assert f"--set {name} would change nothing here: {ruling}" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_trainer_says_which_fields_of_the_model_it_does_not_use(caplog: pytest.LogCaptureFixture) -> None:
    common = dict(obs_shape=(3,), action_dim=2, **SIZES["tdmpc2"])
    steps = dict(total_steps=1, batch_size=2, sequence_length=6, device="cpu")
    with caplog.at_level(logging.WARNING, "worldflux.training"):
        train(create_world_model("tdmpc2:tiny", **common), buffer_of(), **steps)
        train(create_world_model("tdmpc2:tiny", learning_rate=0.05, **common), buffer_of(), **steps, learning_rate=0.05)
        assert not caplog.messages
        train(create_world_model("tdmpc2:tiny", learning_rate=0.05, grad_clip=3.0, **common), buffer_of(), **steps)
    first, second = caplog.messages
    assert "learning_rate=0.05, which is not used here: TrainingConfig.learning_rate rules, and is 0.0003" in first
    assert "grad_clip=3, which is not used here: TrainingConfig.grad_clip rules, and is 100" in second


def test_an_agent_uses_or_refuses_what_it_is_given(caplog: pytest.LogCaptureFixture) -> None:
    small, env = SIZES["tdmpc2"], "Pendulum-v1"
    agent = WorldFluxAgent(
        "tdmpc2:tiny", env, model_kwargs={**small, "learning_rate": 0.05, "grad_clip": 3.0}, device="cpu"
    )
    assert agent.learning_rate == 0.05 and agent.trainer.config.grad_clip == 3.0 and not caplog.messages
    for given, message in (
        ({"learning_rate": 1e-3, "model_kwargs": {**small, "learning_rate": 0.05}}, "learning_rate is a setting of"),
        ({"planner_kwargs": {"iterations": 2}, "model_kwargs": {"iterations": 3}}, "iterations is in planner_kwargs"),
        ({"model_kwargs": {"device": "cuda"}}, "Pass device to WorldFluxAgent itself"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            WorldFluxAgent("tdmpc2:tiny", env, device="cpu", **given)
    with caplog.at_level(logging.WARNING, "worldflux"):
        WorldFluxAgent(
            "dreamerv3:tiny", env, planner_kwargs={"iterations": 2}, model_kwargs=SIZES["dreamerv3"], device="cpu"
        )
    assert "planner_kwargs change nothing" in caplog.text


def test_train_refuses_a_learning_rate_that_is_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--learning-rate", "1e-3", "--set", "learning_rate=0.05"]
    assert main(["train", "tdmpc2:tiny", "Pendulum-v1", *options]) == 2
    assert "Pass one of them" in capsys.readouterr().err


def test_a_size_of_pictures_that_nobody_sees_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for env in ("dmc/cartpole-balance", "CartPole-v1"):
        assert main(["train", "tdmpc2:tiny", env, "--size", "84", "--steps", "1"]) == 2
        assert env != "dmc/cartpole-balance" or "pixels=True (--pixels)" in capsys.readouterr().err
    assert not Path("runs").exists()


# The data determine the model


def test_a_discrete_file_makes_a_discrete_model(capsys: pytest.CaptureFixture[str]) -> None:
    buffer_of(lambda rng: np.eye(2)[rng.integers(2, size=20)]).save("data.npz")
    for number, family in enumerate(("dreamerv3", "tdmpc2"), 1):
        trained(family)
        config = create_world_model(f"run{number}/model").config
        assert (config.action_type, config.action_classes) == ("discrete", (2,))
    assert main(["train-offline", "dreamerv3:tiny", "data.npz", "--set", "action_type=continuous"]) == 2
    assert "Create the model with action_type='discrete'" in capsys.readouterr().err


def test_a_file_of_a_single_episode_is_told_how_to_train_on_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    buffer = ReplayBuffer(100, (3,), 2)
    buffer.add_episode(np.zeros((21, 3)), np.zeros((20, 2)), np.zeros(20))
    buffer.save("data.npz")
    assert main(["train-offline", "tdmpc2:tiny", "data.npz"]) == 2
    assert "--eval-share 0" in capsys.readouterr().err and not Path("runs").exists()
    trained("tdmpc2", "--eval-share", "0")


def test_the_trainers_own_config_rules_in_python(caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for rate in (3e-4, 0.05):
        torch.manual_seed(0)
        model = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=2, **SIZES["tdmpc2"])
        config = TrainingConfig(total_steps=2, batch_size=2, sequence_length=6, learning_rate=rate, device="cpu")
        Trainer(model, config).train(buffer_of())
        found.append(model.state_dict())
    assert any(not torch.equal(value, found[1][name]) for name, value in found[0].items())
