"""Loading checkpoints of TD-MPC2's reference implementation (nicklashansen/tdmpc2)."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldflux.config import TDMPC2Config
from worldflux.errors import CheckpointError, ConfigurationError, a_type
from worldflux.files import checked_path
from worldflux.models.tdmpc2.world_model import TDMPC2
from worldflux.models.weights import check_finite, check_weights
from worldflux.pickles.torch_files import StoredTensor, TorchFile
from worldflux.reading import only_our_errors
from worldflux.validation import clean_sizes

_NETWORKS = {
    "_dynamics": "dynamics",
    "_reward": "reward_head",
    "_pi": "actor",
    "_termination": "termination_head",
    "_Qs.params": "critics",
    "_target_Qs_params": "target_critics",
}
_STACKED_LEAVES = ("weight", "bias", "ln.weight", "ln.bias")
"""Parameters of each layer of the value networks, which the old format numbers."""
_MOST_TASKS = 100_000
"""Largest number of tasks; the reference has 80. Each takes far more memory than its embedding in a file."""
_FIRST_CONV, _CONV_STEP = 2, 2
"""Positions of the convolutions in the reference's image encoder."""


def load_official_tdmpc2(
    checkpoint_or_path: Mapping[str, Any] | str | Path,
    *,
    obs_shape: tuple[int, ...],
    action_dim: int,
    allow_nonfinite: bool = False,
    **overrides: Any,
) -> TDMPC2:
    """Loads a model from a checkpoint of TD-MPC2's reference implementation.

    All dimensions are derived from the shapes of the weights. Memory for the model is only allocated after its shapes
    have been compared with those of all weights. All other fields have the reference's defaults, unless they are given
    in `overrides`: in particular `episode_length`, from which the discount is derived, and for several tasks
    `task_episode_lengths` and, for old checkpoints, `task_action_dims`. With `episodic=True`, a checkpoint without a
    termination head gets a new one, to continue training in environments that terminate.

    Args:
        checkpoint_or_path: A `.pt` file, or the result of `torch.load`. Files are not unpickled: tensors and plain
            containers are read, and a file that refers to anything else is refused. Both the current key format and
            that of the checkpoints published in 2023 and 2024 are supported.
        obs_shape: Shape of the observations that the model was trained on; images are `(C, H, W)`. For several tasks,
            the shape of the padded observation.
        action_dim: Width of the action vector; for several tasks, of the padded one.
        allow_nonfinite: Accept weights that are NaN or infinite.
        **overrides: Further fields of `TDMPC2Config`.

    Returns:
        The model, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: If the file cannot be read, or its weights are not finite or do not fit the given shapes.
        ConfigurationError: If `obs_shape` is not a shape, or an override is unknown or does not fit.
    """
    if isinstance(obs_shape, Mapping):
        raise ConfigurationError(f"obs_shape is {obs_shape!r}, expected the shape of one tensor, as the reference has.")
    given = TDMPC2Config(obs_shape=clean_sizes("obs_shape", obs_shape), action_dim=action_dim)
    obs_shape, action_dim = given.obs_shapes["obs"], given.action_dim
    where = f"{checkpoint_or_path}" if isinstance(checkpoint_or_path, str | os.PathLike) else "The checkpoint"
    with only_our_errors(where):
        params = _present_names(_read(checkpoint_or_path))
        fields = _dimensions(params, obs_shape, action_dim)
        try:
            config = TDMPC2Config.from_dict({**fields, **overrides})
        except ConfigurationError as error:
            if overrides:
                raise
            raise CheckpointError(f"The checkpoint's weights do not form a valid TD-MPC2. {error}") from error
        with torch.device("meta"):
            sketch = TDMPC2(config)
        tensors = official_to_state_dict(params, sketch)
    # Parts that the checkpoint cannot have are new if an override asks for them.
    fresh = ("decoder.",) if fields["episodic"] else ("decoder.", "termination_head.")
    own = {name for name, _ in sketch.named_parameters() if not name.startswith(fresh)}
    expected = {name: tensor for name, tensor in sketch.state_dict().items() if name in own}
    remedy = f"Is it of observations {obs_shape} and action_dim {action_dim}? Pass those of its training."
    check_weights(where, tensors, expected, remedy)
    if not allow_nonfinite:
        check_finite(where, tensors)
    model = TDMPC2(config)
    model.load_state_dict(tensors, strict=False)
    if model.tasks is not None:
        model.tasks.renormalize()
    if fields["episodic"]:
        model.termination_seen.fill_(1.0)
    return model.eval()


def official_to_state_dict(params: Mapping[str, Tensor], model: TDMPC2) -> dict[str, Tensor]:
    """Renames the reference's parameters, or their gradients, for `model.load_state_dict`. Others are left out."""
    last = model.config.num_enc_layers - 1 or 1  # the reference builds no encoder of one layer
    tensors: dict[str, Tensor] = {}
    for name, value in params.items():
        ours = None
        if name == "_task_emb.weight":
            ours = "tasks.weight"
        elif match := re.fullmatch(r"_encoder\.state\.([0-9]{1,6})\.(.+)", name):
            layer = int(match[1])
            ours = f"encoder.project.{match[2]}" if layer == last else f"encoder.parts.0.{layer}.{match[2]}"
        elif match := re.fullmatch(r"_encoder\.rgb\.([0-9]{1,6})\.(.+)", name):
            ours = f"encoder.parts.0.convs.{(int(match[1]) - _FIRST_CONV) // _CONV_STEP}.{match[2]}"
        elif match := re.fullmatch(r"(.+?)\.([0-9]{1,6})\.((?:ln\.)?(?:weight|bias))", name):
            if match[1] in _NETWORKS:
                ours = f"{_NETWORKS[match[1]]}.layers.{match[2]}.{match[3]}"
        if ours is not None:
            tensors[ours.replace(".ln.", ".norm.")] = value.detach().float()
    return tensors


def _read(source: Mapping[str, Any] | str | Path) -> Mapping[Any, Any]:
    """The parameters of a checkpoint, which may be nested in other content."""
    content: Any = source
    if not isinstance(source, Mapping):
        if not isinstance(source, str | os.PathLike):
            raise CheckpointError(
                f"The checkpoint is {a_type(source)}, expected a path or what torch.load returns for it."
            )
        path = checked_path("source", source)
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file. Pass a checkpoint (.pt) of TD-MPC2.")
        with TorchFile(path) as file:
            content = _parameters(file.read())
            return file.tensors(content)
    return _parameters(source)


def _parameters(content: Any) -> Mapping[Any, Any]:
    """The mapping of names to tensors, which may be nested in other content."""
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not any(
        isinstance(value, Tensor | StoredTensor) for value in content.values()
    ):
        raise CheckpointError("The checkpoint has no mapping of names to tensors. Is it one of TD-MPC2?")
    return content


def _present_names(params: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors under the names of the current format."""
    found: dict[str, Tensor] = {}
    for name, value in params.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            continue
        if match := re.fullmatch(r"(_target_Qs|_Qs)\.params\.([0-9]{1,6})", name):
            layer, leaf = divmod(int(match[2]), len(_STACKED_LEAVES))
            prefix = "_Qs.params" if match[1] == "_Qs" else "_target_Qs_params"
            name = f"{prefix}.{layer}.{_STACKED_LEAVES[leaf]}"
        found[name] = _checked(name, value)
    # A second name of the value networks, which takes precedence in the reference.
    for name in [name for name in found if name.startswith("_detach_Qs_params.")]:
        found[name.replace("_detach_Qs_params", "_Qs.params")] = found[name]
    return found


def _checked(name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it is dense, holds real numbers and repeats none of them."""
    problem = None
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        problem = "is sparse, quantised or nested"
    elif tensor.device.type == "meta":
        problem = "has a shape and no numbers"
    elif tensor.is_complex():
        problem = "holds complex numbers"
    elif not tensor.numel():
        problem = f"is empty, with shape {tuple(tensor.shape)}"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        problem = f"has shape {tuple(tensor.shape)} and strides {tensor.stride()}, which repeat its numbers"
    if problem:
        raise CheckpointError(f"The checkpoint's {name} {problem}; expected a dense tensor of real numbers.")
    return tensor


def _dimensions(params: Mapping[str, Tensor], obs_shape: tuple[int, ...], action_dim: int) -> dict[str, Any]:
    """Fields of the configuration that follow from the shapes of the weights."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in params:
            raise CheckpointError(
                f"The checkpoint has no parameter {name!r}, which a TD-MPC2 of these observations needs. "
                "Check obs_shape, and that the file was written by nicklashansen/tdmpc2."
            )
        found = tuple(params[name].shape)
        if len(found) != axes:
            raise CheckpointError(
                f"The checkpoint's {name} has shape {found}, expected {axes} dimensions. "
                "Check that the file was written by nicklashansen/tdmpc2."
            )
        return found

    def layers(network: str) -> int:
        shape(f"{network}.0.weight", 3 if network == "_Qs.params" else 2)
        return next(number for number in itertools.count() if f"{network}.{number}.weight" not in params)

    count = layers("_dynamics")
    members, bins, mlp_dim = shape(f"_Qs.params.{layers('_Qs.params') - 1}.weight", 3)
    fields: dict[str, Any] = {
        "model_type": "tdmpc2",
        "model_name": "official",
        "obs_shape": obs_shape,
        "action_dim": action_dim,
        "latent_dim": shape(f"_dynamics.{count - 1}.weight", 2)[0],
        "hidden_dim": shape("_dynamics.0.weight", 2)[0],
        "num_hidden_layers": count - 1,
        "mlp_dim": mlp_dim,
        "num_q_networks": members,
        "num_bins": bins,
        "episodic": "_termination.0.weight" in params,
    }
    if len(obs_shape) == 3:
        fields["num_channels"] = shape(f"_encoder.rgb.{_FIRST_CONV}.weight", 4)[0]
    else:
        fields["enc_dim"] = shape("_encoder.state.0.weight", 2)[0]
        fields["num_enc_layers"] = layers("_encoder.state")
    if "_task_emb.weight" in params:
        fields["num_tasks"], fields["task_dim"] = shape("_task_emb.weight", 2)
        if fields["num_tasks"] > _MOST_TASKS:
            raise CheckpointError(f"The checkpoint has {fields['num_tasks']:,} tasks, expected up to {_MOST_TASKS:,}.")
        if "_action_masks" in params:
            shape("_action_masks", 2)
            fields["task_action_dims"] = tuple(int(used) for used in params["_action_masks"].sum(-1))
    if "log_std_min" in params and "log_std_dif" in params:
        low, above = float(params["log_std_min"]), float(params["log_std_dif"])
        fields["log_std_min"], fields["log_std_max"] = low, low + above
    return fields
