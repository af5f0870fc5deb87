"""Checkpoints of DreamerV3's reference implementation (danijar/dreamerv3) as worldflux models."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldflux.config import DreamerV3Config
from worldflux.errors import CheckpointError
from worldflux.models.dreamerv3.world_model import DreamerV3

_SCALARS = {"retnorm/lo/value": "return_low", "retnorm/hi/value": "return_high"}

_HEADS = {"rew": "reward_head", "con": "continue_head", "pol": "actor", "val": "critic", "slowval": "slow_critic"}

# Official module name -> ours; `kernel`, `bias` and `scale` follow.
_MODULES = [
    (r"enc/mlp(\d)", r"encoder.mlp.linears.\1"),
    (r"enc/mlp(\d)norm", r"encoder.mlp.norms.\1"),
    (r"enc/cnn(\d)", r"encoder.cnn.convs.\1"),
    (r"enc/cnn(\d)norm", r"encoder.cnn.norms.\1"),
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
    (r"dyn/prior(\d)", r"rssm.prior_in.linears.\1"),
    (r"dyn/prior(\d)norm", r"rssm.prior_in.norms.\1"),
    (r"dyn/priorlogit", "rssm.prior_out"),
    (r"dec/mlp/linear(\d)", r"decoder.mlp.linears.\1"),
    (r"dec/mlp/norm(\d)", r"decoder.mlp.norms.\1"),
    (r"dec/sp(\d)", r"decoder.cnn.sp\1"),
    (r"dec/sp1norm", "decoder.cnn.sp1norm"),
    (r"dec/spnorm", "decoder.cnn.spnorm"),
    (r"dec/imgout", "decoder.cnn.out"),
    *((rf"{theirs}/mlp/linear(\d)", rf"{ours}.mlp.linears.\1") for theirs, ours in _HEADS.items()),
    *((rf"{theirs}/mlp/norm(\d)", rf"{ours}.mlp.norms.\1") for theirs, ours in _HEADS.items()),
    (r"rew/head/logits", "reward_head.out"),
    (r"con/head/logit", "continue_head.out"),
    (r"val/head/logits", "critic.out"),
    (r"slowval/head/logits", "slow_critic.out"),
    (r"pol/head/[^/]+/logits", "actor.logits"),
    (r"pol/head/[^/]+/mean", "actor.mean"),
    (r"pol/head/[^/]+/stddev", "actor.std"),
]
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "scale"}


def load_official_dreamerv3(
    params_or_path: Mapping[str, Any] | str | Path,
    *,
    obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
    action_dim: int,
    action_type: str = "continuous",
    stoch_discrete: int | None = None,
) -> DreamerV3:
    """A model with the weights of a checkpoint of DreamerV3's reference implementation.

    All dimensions are read from the weights' shapes.

    Args:
        params_or_path: The reference's parameter names and arrays, or its run directory, its `ckpt` directory, one
            checkpoint folder in there, or an `agent.pkl`. The pickle is read by an unpickler that admits NumPy arrays
            and plain containers only.
        obs_shape: Of the environment that the checkpoint was trained in; images `(C, H, W)`. A dictionary names the
            reference's observation keys; a single vector joins all of its vector keys in sorted order.
        action_dim: A
        action_type: `"continuous"` or `"discrete"`.
        stoch_discrete: Categorical rows of the latent; the shapes give only rows times classes. By default 32, as in
            all of the reference's sizes, or where 32 does not divide the latent, its largest divisor up to the square
            root.

    Returns:
        The model, on the CPU, in float32.

    Raises:
        CheckpointError: If the file cannot be read, holds anything but arrays, or its weights do not fit the shapes
            given.
    """
    if isinstance(params_or_path, Mapping):
        params = {name: np.asarray(value) for name, value in params_or_path.items()}
    else:
        params = _read_params(Path(params_or_path))
    shapes = dict(obs_shape) if isinstance(obs_shape, Mapping) else tuple(obs_shape)
    try:
        config = _config(params, shapes, action_dim, action_type, stoch_discrete)
    except KeyError as error:
        raise CheckpointError(
            f"The checkpoint has no parameter {error}, which a DreamerV3 of these observations and actions needs. "
            "Check obs_shape and action_type, and that the file is one of danijar/dreamerv3."
        ) from error
    model = DreamerV3(config)
    tensors = official_to_state_dict(params, model)
    expected = model.state_dict()
    missing = sorted(set(expected) - set(tensors))
    wrong = [k for k in tensors if k in expected and tensors[k].shape != expected[k].shape]
    if missing or wrong:
        problem = f"lacks {missing[:3]}" if missing else f"differs in the shape of {wrong[:3]}"
        raise CheckpointError(
            f"The checkpoint {problem} from a DreamerV3 with obs_shape={shapes} and action_dim={action_dim}. "
            "Pass the shapes of the environment that it was trained in."
        )
    model.load_state_dict(tensors)
    return model


def official_to_state_dict(params: Mapping[str, np.ndarray], model: DreamerV3) -> dict[str, Tensor]:
    """Renames and transposes the reference's arrays (parameters, or gradients of them) for `model.load_state_dict`.

    Names that are no network parameters (optimiser state, counters) are left out.
    """
    keys = list(model.encoder.layout.vectors)
    convolutions = len(model.encoder.cnn.convs) if model.encoder.layout.images else 0
    tensors: dict[str, Tensor] = {}
    vectors: dict[str, dict[str, Tensor]] = {}
    for name, value in params.items():
        if name in _SCALARS:
            tensors[_SCALARS[name]] = torch.tensor(float(value))
            continue
        module, _, leaf = name.rpartition("/")
        if leaf not in _LEAVES or module.startswith("opt/"):
            continue
        array = torch.from_numpy(np.array(value, dtype=np.float32))
        if leaf == "kernel":
            # (in, out) -> (out, in); (h, w, in, out) -> (out, in, h, w); block-linear kernels keep (g, in, out).
            array = {2: lambda x: x.t(), 3: lambda x: x, 4: lambda x: x.permute(3, 2, 0, 1)}[array.ndim](array)
            array = array.contiguous()
        if match := re.fullmatch(r"dec/vec/(.+)/(?:pred|logits)", module):
            vectors.setdefault(match[1], {})[_LEAVES[leaf]] = array
        elif match := re.fullmatch(r"dec/conv(\d)(norm)?", module):
            # The reference numbers the decoder's stages from the image down; ours run upwards.
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


def _config(
    params: Mapping[str, np.ndarray], obs_shape: Any, action_dim: int, action_type: str, groups: int | None
) -> DreamerV3Config:
    """Dimensions from the weights' shapes."""

    def width(name: str, axis: int) -> int:
        return int(params[name].shape[axis])

    def layers(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in params)

    blocks, block_in, block_out = (int(n) for n in params["dyn/dynhid0/kernel"].shape)
    deter = blocks * block_out
    hidden = (block_in - block_out) // 3
    stoch = width("dyn/obslogit/kernel", 1)
    groups = _groups(stoch) if groups is None else groups
    options: dict[str, Any] = {}
    if "enc/cnn0/kernel" in params:
        options["cnn_depth"] = width("enc/cnn0/kernel", 3) // 2
        options["cnn_kernels"] = tuple(width(f"enc/cnn{i}/kernel", 0) for i in range(4))
        options["bspace"] = width("dec/sp0/kernel", 0)
    if "enc/mlp0/kernel" in params:
        options["encoder_layers"] = layers(r"enc/mlp\d/kernel")
        options["decoder_layers"] = layers(r"dec/mlp/linear\d/kernel")
    return DreamerV3Config(
        model_name="official",
        obs_shape=obs_shape,
        action_dim=action_dim,
        action_type=action_type,
        deter_dim=deter,
        hidden_dim=hidden,
        stoch_discrete=groups,
        stoch_classes=stoch // groups,
        units=width("rew/mlp/linear0/kernel", 1),
        blocks=blocks,
        bins=width("rew/head/logits/bias", 0),
        reward_layers=layers(r"rew/mlp/linear\d/kernel"),
        continue_layers=layers(r"con/mlp/linear\d/kernel"),
        actor_layers=layers(r"pol/mlp/linear\d/kernel"),
        critic_layers=layers(r"val/mlp/linear\d/kernel"),
        **options,
    )


def _groups(stoch: int) -> int:
    """Categorical rows of a latent that is `stoch` wide; see `stoch_discrete` above."""
    if stoch % 32 == 0:
        return 32
    return max(n for n in range(1, int(stoch**0.5) + 1) if stoch % n == 0)


class _ArraysOnly(pickle.Unpickler):
    """Reads plain containers and NumPy arrays; anything else in a pickle could run code."""

    _ALLOWED = frozenset(
        (module, name)
        for root in ("numpy.core", "numpy._core")
        for module, name in [
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            (f"{root}.multiarray", "_reconstruct"),
            (f"{root}.multiarray", "scalar"),
            (f"{root}.numeric", "_frombuffer"),
        ]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise CheckpointError(
                f"The pickle refers to {module}.{name}, expected NumPy arrays and plain containers only. "
                "It is not loaded, because it could run code."
            )
        return super().find_class(module, name)


def _read_params(path: Path) -> dict[str, np.ndarray]:
    """The `params` of an `agent.pkl`, which is looked for in the places that the reference writes to."""
    path = _agent_file(path)
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path} is not a readable pickle: {error}.") from error
    params = content.get("params") if isinstance(content, dict) else None
    if not isinstance(params, dict) or not all(isinstance(v, np.ndarray | np.generic) for v in params.values()):
        raise CheckpointError(f"{path} has no mapping 'params' of names to arrays. Is it a DreamerV3 checkpoint?")
    if any(np.asarray(v).dtype.hasobject for v in params.values()):
        raise CheckpointError(f"{path} holds arrays of Python objects, expected numbers.")
    return {name: np.asarray(value) for name, value in params.items()}


def _agent_file(path: Path) -> Path:
    """`agent.pkl` of a run directory, a `ckpt` directory, one checkpoint folder, or the file itself."""
    if path.is_file():
        return path
    for folder in (path / "ckpt", path):
        latest = folder / "latest"
        if latest.is_file():
            # The file holds the name of a sibling folder; a path in it would lead elsewhere.
            return _existing(folder / Path(latest.read_text().strip()).name / "agent.pkl", path)
    return _existing(path / "agent.pkl", path)


def _existing(file: Path, given: Path) -> Path:
    if not file.is_file():
        raise CheckpointError(
            f"{given} has no agent.pkl (looked for {file}). Pass a run directory, a ckpt directory or an agent.pkl."
        )
    return file
