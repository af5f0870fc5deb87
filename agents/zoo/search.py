"""Samplers of rl_zoo3's search for hyperparameters (`train -optimize`) for the two algorithms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


def sample_dreamerv3(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Settings of one trial; the others stay as in the file of hyperparameters. rl_zoo3 passes the arguments."""
    return convert(
        {
            "learning_rate": trial.suggest_float("learning_rate", 3e-5, 3e-3, log=True),
            "train_ratio_pow": trial.suggest_int("train_ratio_pow", 4, 8),
            "seq_len_pow": trial.suggest_int("seq_len_pow", 4, 6),
        }
    )


def sample_tdmpc2(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Settings of one trial of TD-MPC2."""
    return convert(
        {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
            "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 9),
        }
    )


def convert(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters from what a trial drew: `<name>_pow` is an exponent of two."""
    return {
        name.removesuffix("_pow"): 2**value if name.endswith("_pow") else value
        for name, value in sampled_params.items()
    }
