"""The reference arrays of DreamerV3 and models with the reference's parameters, for the golden tests.

Recorded from the authors' JAX implementation (danijar/dreamerv3, MIT licence) on CPU in float32.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldflux.interop.dreamerv3 import load_official_dreamerv3
from worldflux.models.dreamerv3.alignment import ArrivalRows
from worldflux.models.dreamerv3.world_model import Draws, DreamerV3
from worldflux.replay.batch import Batch

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = ("proprio", "pixels")
OBS_SHAPES = {
    "proprio": {"height": (1,), "position": (5,), "velocity": (5,)},
    "pixels": {"image": (3, 64, 64)},
}


class Golden:
    """The arrays of one file as tensors, in worldflux's layouts where a method says so."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        with np.load(GOLDEN / f"dreamerv3_{kind}.npz") as file:
            self.arrays = {name: file[name] for name in file.files}

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}

    def classes(self, name: str) -> Tensor:
        """One-hot samples as class numbers."""
        return self[name].argmax(-1)

    def actions(self, name: str) -> Tensor:
        """Actions in library form: floats, or one-hot."""
        actions = self[name]
        return actions if self.kind == "proprio" else torch.nn.functional.one_hot(actions.long(), 5).float()

    def obs(self, prefix: str) -> dict[str, Tensor]:
        """Observations with scalars as vectors of one number and images channel-first."""
        if self.kind == "pixels":
            return {"image": self[f"{prefix}image"].movedim(-1, -3)}
        obs = {k: self[prefix + k] for k in OBS_SHAPES["proprio"]}
        return obs | {"height": obs["height"].unsqueeze(-1)}

    def model(self, params: str = "p/") -> DreamerV3:
        arrays = self.under("p/") | self.under(params)
        discrete = self.kind == "pixels"
        model = load_official_dreamerv3(
            arrays,
            obs_shape=OBS_SHAPES[self.kind],
            action_dim=5 if discrete else 3,
            action_type="discrete" if discrete else "continuous",
        )
        model.config = replace(model.config, imagination_horizon=int(self["cfg/imag_length"]))
        return model

    def rows(self) -> ArrivalRows:
        """`in/*`, what the model is trained on."""
        return ArrivalRows(
            obs=self.obs("in/obs/"),
            prev_actions=self.actions("in/prevact/action"),
            is_first=self["in/is_first"].bool(),
            rewards=self["in/reward"],
            is_terminal=self["in/is_terminal"].float(),
            is_last=self["in/is_last"].float(),
            arrival_known=torch.ones_like(self["in/is_first"]).bool(),
            obs_mask=None,
        )

    def batch(self) -> Batch:
        """`data/*`, as the reference's replay gives it, in the alignment of our buffer."""

        # The reference stores what a step arrived with; ours stores what the step's action led to.
        def led_to(name: str) -> Tensor:
            arrived = self[f"data/{name}"]
            return torch.cat([arrived[:, 1:], torch.zeros_like(arrived[:, :1])], 1)

        terminations, ends = led_to("is_terminal").bool(), led_to("is_last").bool()
        return Batch(
            obs=self.obs("data/"),
            actions=self.actions("data/action"),
            rewards=led_to("reward"),
            terminations=terminations,
            truncations=ends & ~terminations,
            is_first=self["data/is_first"].bool(),
            extras={"deter": self["data/dyn/deter"], "stoch": self.classes("data/dyn/stoch") + 1},
        )

    def draws(self, prefix: str) -> Draws:
        return Draws(
            self.classes(f"{prefix}stoch"), self.classes(f"{prefix}imgstoch"), self.actions(f"{prefix}imgact/action")
        )


@lru_cache
def golden(kind: str) -> Golden:
    return Golden(kind)


def assert_matches(actual: Tensor, expected: Tensor, *, rtol: float = 1e-4, scale: float = 1e-5) -> None:
    """Equal to `rtol`, with an absolute part of `scale` times the largest expected entry."""
    expected = expected.float()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.detach().float(), expected, rtol=rtol, atol=scale * largest + 1e-12)
