"""Loading checkpoints of DreamerV3's reference implementation (danijar/dreamerv3)."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldflux.config import DreamerV3Config
from worldflux.errors import CheckpointError, ConfigurationError, a_type
from worldflux.files import checked_path
from worldflux.models.dreamerv3.world_model import DreamerV3
from worldflux.models.weights import check_finite, check_weights
from worldflux.pickles.reader import NUMPY, PickleReader, StoredArray
from worldflux.reading import only_our_errors
from worldflux.validation import whole_number

_SCALARS = {"retnorm/lo/value": "return_low", "retnorm/hi/value": "return_high"}

_HEADS = {"rew": "reward_head", "con": "continue_head", "pol": "actor", "val": "critic", "slowval": "slow_critic"}

# Names of modules in the reference, and here. `kernel`, `bias` or `scale` follow.
_MODULES = [
    (r"enc/mlp([0-9])", r"encoder.mlp.linears.\1"),
    (r"enc/mlp([0-9])norm", r"encoder.mlp.norms.\1"),
    (r"enc/cnn([0-9])", r"encoder.cnn.convs.\1"),
    (r"enc/cnn([0-9])norm", r"encoder.cnn.norms.\1"),
    (r"dyn/dynin0", "rssm.deter_in.linears.0"),
    (r"dyn/dynin1", "rssm.stoch_in.linears.0"),
    (r"dyn/dynin2", "rssm.action_in.linears.0"),
    (r"dyn/dynin0norm", "rssm.deter_in.norms.0"),
    (r"dyn/dynin1norm", "rssm.stoch_in.norms.0"),
    (r"dyn/dynin2norm", "rssm.action_in.norms.0"),
    (r"dyn/dynhid0", "rssm.hidden"),
    (r"dyn/dynhid0norm", "rssm.hidden_norm"),
    (r"dyn/dyngru", "rssm.gates"),
    (r"dyn/obs0", "rssm.posterior_in.linears.0"),
    (r"dyn/obs0norm", "rssm.posterior_in.norms.0"),
    (r"dyn/obslogit", "rssm.posterior_out"),
    (r"dyn/prior([0-9])", r"rssm.prior_in.linears.\1"),
    (r"dyn/prior([0-9])norm", r"rssm.prior_in.norms.\1"),
    (r"dyn/priorlogit", "rssm.prior_out"),
    (r"dec/mlp/linear([0-9])", r"decoder.mlp.linears.\1"),
    (r"dec/mlp/norm([0-9])", r"decoder.mlp.norms.\1"),
    (r"dec/sp([0-9])", r"decoder.cnn.sp\1"),
    (r"dec/sp1norm", "decoder.cnn.sp1norm"),
    (r"dec/spnorm", "decoder.cnn.spnorm"),
    (r"dec/imgout", "decoder.cnn.out"),
    *((rf"{theirs}/mlp/linear([0-9])", rf"{ours}.mlp.linears.\1") for theirs, ours in _HEADS.items()),
    *((rf"{theirs}/mlp/norm([0-9])", rf"{ours}.mlp.norms.\1") for theirs, ours in _HEADS.items()),
    (r"rew/head/logits", "reward_head.out"),
    (r"con/head/logit", "continue_head.out"),
    (r"val/head/logits", "critic.out"),
    (r"slowval/head/logits", "slow_critic.out"),
    (r"pol/head/[^/]+/logits", "actor.logits"),
    (r"pol/head/[^/]+/mean", "actor.mean"),
    (r"pol/head/[^/]+/stddev", "actor.std"),
]
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "scale"}
_KERNELS = {2: (1, 0), 3: (0, 1, 2), 4: (3, 2, 0, 1)}
"""(in, out) -> (out, in); (h, w, in, out) -> (out, in, h, w); block-linear kernels keep (g, in, out)."""
_OPTIMIZER = "opt/"
_LONGEST_LATEST = 256
"""Largest number of bytes that are read of the file that names the newest checkpoint."""


def load_official_dreamerv3(
    params_or_path: Mapping[str, Any] | str | Path,
    *,
    obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
    action_dim: int,
    action_type: str = "continuous",
    stoch_discrete: int | None = None,
    allow_nonfinite: bool = False,
) -> DreamerV3:
    """Loads a model from a checkpoint of DreamerV3's reference implementation.

    All dimensions are derived from the shapes of the weights. Memory for the model is only allocated after its shapes
    have been compared with those of all weights.

    Args:
        params_or_path: The reference's parameter names and arrays, or the path of its run directory, `ckpt` directory,
            one checkpoint in it, or `agent.pkl`. The file is not unpickled: NumPy arrays of numbers and plain
            containers are read, and a file that refers to anything else is refused. The optimizer state is ignored.
        obs_shape: Shape of the observations that the model was trained on; images are `(C, H, W)`. A dictionary has the
            reference's observation keys. A single vector stands for all of its vector keys, joined in sorted order.
        action_dim: Width of the action vector.
        action_type: `"continuous"` or `"discrete"`.
        stoch_discrete: Number of categorical variables of the latent, because the shapes only show this number times
            the classes. Default: 32, as in all sizes of the reference. If the latent is not divisible by 32, its
            largest divisor up to the square root.
        allow_nonfinite: Accept weights that are NaN or infinite.

    Returns:
        The model, on the CPU, in float32.

    Raises:
        CheckpointError: If the file cannot be read or contains anything but arrays, or its weights are not finite or do
            not fit the given shapes.
        ConfigurationError: If no DreamerV3 has such observations, actions or categorical variables.
    """
    shapes = dict(obs_shape) if isinstance(obs_shape, Mapping) else obs_shape
    given = DreamerV3Config(model_name="official", obs_shape=shapes, action_dim=action_dim, action_type=action_type)
    if stoch_discrete is not None:
        stoch_discrete = whole_number("stoch_discrete", stoch_discrete, 1)
    if isinstance(params_or_path, Mapping):
        where: object = "The checkpoint"
        with only_our_errors(where):
            params = {_name(name): _numbers(name, value) for name, value in params_or_path.items()}
    elif isinstance(params_or_path, str | os.PathLike):
        with only_our_errors(params_or_path):
            where = _agent_file(checked_path("params_or_path", params_or_path))
        with only_our_errors(where):
            params = _read_params(where)
    else:
        raise ConfigurationError(f"The checkpoint is {a_type(params_or_path)}, expected a path or names and arrays.")
    with only_our_errors(where):
        config = _config(params, given, stoch_discrete)
        with torch.device("meta"):
            sketch = DreamerV3(config)
        tensors = official_to_state_dict(params, sketch)
    remedy = f"Is it of observations {given.obs_shape} and action_dim {action_dim}? Pass those of its training."
    check_weights(where, tensors, sketch.state_dict(), remedy)
    if not allow_nonfinite:
        check_finite(where, tensors)
    model = DreamerV3(config)
    model.load_state_dict(tensors)
    return model


def official_to_state_dict(params: Mapping[str, np.ndarray], model: DreamerV3) -> dict[str, Tensor]:
    """Renames and transposes the reference's parameters, or their gradients, for `model.load_state_dict`.

    Arrays that are not parameters of a network (optimizer state, counters) are left out.
    """
    keys = list(model.encoder.layout.vectors)
    convolutions = len(model.encoder.cnn.convs) if model.encoder.layout.images else 0
    tensors: dict[str, Tensor] = {}
    vectors: dict[str, dict[str, Tensor]] = {}
    for name, value in params.items():
        if name in _SCALARS:
            if value.size != 1:
                raise CheckpointError(f"The checkpoint's {name} has shape {value.shape}, expected a single number.")
            tensors[_SCALARS[name]] = torch.tensor(value.item(), dtype=torch.float32)
            continue
        module, _, leaf = name.rpartition("/")
        if leaf not in _LEAVES or module.startswith(_OPTIMIZER):
            continue
        array = torch.from_numpy(np.array(value, dtype=np.float32))
        if leaf == "kernel":
            if array.ndim not in _KERNELS:
                raise CheckpointError(f"The checkpoint's {name} has shape {value.shape}, expected 2 to 4 dimensions.")
            array = array.permute(_KERNELS[array.ndim]).contiguous()
        if match := re.fullmatch(r"dec/vec/(.+)/(?:pred|logits)", module):
            vectors.setdefault(match[1], {})[_LEAVES[leaf]] = array
        elif match := re.fullmatch(r"dec/conv([0-9])(norm)?", module):
            # The reference counts the stages of the decoder from the image on, and we count towards the image.
            stage = convolutions - 2 - int(match[1])
            tensors[f"decoder.cnn.{'norms' if match[2] else 'convs'}.{stage}.{_LEAVES[leaf]}"] = array
        else:
            for pattern, ours in _MODULES:
                if match := re.fullmatch(pattern, module):
                    tensors[f"{match.expand(ours)}.{_LEAVES[leaf]}"] = array
                    break
    if keys == ["obs"] and "obs" not in vectors and vectors:
        joined = [vectors[k] for k in sorted(vectors)]
        vectors = {"obs": {leaf: torch.cat([v[leaf] for v in joined]) for leaf in ("weight", "bias")}}
    for key, leaves in vectors.items():
        if key in keys:
            tensors |= {f"decoder.vectors.{keys.index(key)}.{leaf}": value for leaf, value in leaves.items()}
    return tensors


def _config(params: Mapping[str, np.ndarray], given: DreamerV3Config, groups: int | None) -> DreamerV3Config:
    """`given` with the dimensions that follow from the shapes of the weights."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in params:
            raise CheckpointError(
                f"The checkpoint has no parameter {name!r}, which a DreamerV3 of these observations and actions needs. "
                "Check obs_shape and action_type, and that the file was written by danijar/dreamerv3."
            )
        found = params[name].shape
        if len(found) != axes or not all(found):
            raise CheckpointError(
                f"The checkpoint's {name} has shape {found}, expected {axes} dimensions of at least 1. "
                "Check that the file was written by danijar/dreamerv3."
            )
        return found

    def layers(name: str) -> int:
        return next(number for number in itertools.count() if f"{name}{number}/kernel" not in params)

    blocks, block_in, block_out = shape("dyn/dynhid0/kernel", 3)
    stoch = shape("dyn/obslogit/kernel", 2)[1]
    groups = _groups(stoch) if groups is None else groups
    fields: dict[str, Any] = {
        "deter_dim": blocks * block_out,
        "hidden_dim": (block_in - block_out) // 3,
        "stoch_discrete": groups,
        "stoch_classes": stoch // groups,
        "units": shape("rew/mlp/linear0/kernel", 2)[1],
        "blocks": blocks,
        "bins": shape("rew/head/logits/bias", 1)[0],
        "reward_layers": layers("rew/mlp/linear"),
        "continue_layers": layers("con/mlp/linear"),
        "actor_layers": layers("pol/mlp/linear"),
        "critic_layers": layers("val/mlp/linear"),
    }
    if "enc/cnn0/kernel" in params:
        fields["cnn_depth"] = shape("enc/cnn0/kernel", 4)[3] // 2
        fields["cnn_kernels"] = tuple(shape(f"enc/cnn{i}/kernel", 4)[0] for i in range(4))
        fields["bspace"] = shape("dec/sp0/kernel", 3)[0]
    if "enc/mlp0/kernel" in params:
        fields["encoder_layers"] = layers("enc/mlp")
        fields["decoder_layers"] = layers("dec/mlp/linear")
    described = {name: getattr(given, name) for name in ("model_name", "obs_shape", "action_dim", "action_type")}
    try:
        return DreamerV3Config(**described, **fields)
    except ConfigurationError as error:
        raise CheckpointError(f"The checkpoint's weights do not form a valid DreamerV3. {error}") from error


def _groups(stoch: int) -> int:
    """Default of `stoch_discrete` for a latent that is `stoch` wide."""
    if stoch % 32 == 0:
        return 32
    return max(n for n in range(1, int(stoch**0.5) + 1) if stoch % n == 0)


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise CheckpointError(f"The checkpoint has a parameter under {a_type(name)}, expected its name.")
    return name


def _numbers(name: str, value: Any) -> np.ndarray:
    """An array that the user has passed."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise CheckpointError(f"The checkpoint's {name} has the type {array.dtype}, expected real numbers.")
    return array


def _read_params(path: Path) -> dict[str, np.ndarray]:
    """The `params` of an `agent.pkl`, without the optimizer state."""
    size = path.stat().st_size
    with path.open("rb") as file:
        content = PickleReader(file, size, NUMPY).read()
        params = content.get("params") if isinstance(content, dict) else None
        if not isinstance(params, dict) or not all(isinstance(value, StoredArray) for value in params.values()):
            raise CheckpointError(f"{path} has no mapping 'params' of names to arrays. Is it a DreamerV3 checkpoint?")
        needed = {name: value for name, value in params.items() if not name.startswith(_OPTIMIZER)}
        # Several arrays may share the bytes of one.
        claimed = sum(value.nbytes for value in needed.values())
        if claimed > size:
            raise CheckpointError(f"{path} has {size:,} bytes, and its arrays claim {claimed:,}. It is damaged.")
        return {name: value.load(file) for name, value in needed.items()}


def _agent_file(path: Path) -> Path:
    """The `agent.pkl` of a run directory, a `ckpt` directory or one checkpoint, or the file itself."""
    if path.is_file():
        return path
    for folder in (path / "ckpt", path):
        latest = folder / "latest"
        if latest.is_file():
            with only_our_errors(latest), latest.open("rb") as file:
                text = file.read(_LONGEST_LATEST).decode().strip()
            # The file contains the name of a folder beside it. A path could lead elsewhere.
            name = Path(text).name
            if name in ("", ".."):
                raise CheckpointError(f"{latest} is {text!r}, expected the name of a folder beside it.")
            return _existing(folder / name / "agent.pkl", path)
    return _existing(path / "agent.pkl", path)


def _existing(file: Path, given: Path) -> Path:
    if not file.is_file():
        raise CheckpointError(
            f"{given} has no agent.pkl (looked for {file}). Pass a run directory, a ckpt directory or an agent.pkl."
        )
    return file
