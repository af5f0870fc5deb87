"""The recurrence's weights in the form that `worldflux/nn/fast/kernels.c` takes."""

from __future__ import annotations

import ctypes

from worldflux.models.dreamerv3.fast.cell import CoreWeights
from worldflux.nn.fast.kernels import addresses

_POINTER = ctypes.c_void_p


class Model(ctypes.Structure):
    """`Model` of `kernels.c`."""

    _fields_ = [
        *[(name, ctypes.c_int) for name in ("D", "g", "h", "S", "C", "A", "F", "units", "actor_layers", "parts")],
        ("unimix", ctypes.c_float),
        ("widths", _POINTER),
        *[(name, _POINTER * 3) for name in ("deter_in", "stoch_in", "action_in")],
        ("prior_in", _POINTER * 6),
        *[(name, _POINTER * 2) for name in ("prior_out", "policy_out", "std_out")],
        *[(name, _POINTER) for name in ("actor", "stoch_columns", "actor_columns", "recurrent")],
        ("recurrent_stride", ctypes.c_long),
        *[(name, _POINTER) for name in ("dense", "hidden_bias", "hidden_scale", "gates", "gates_bias")],
    ]

    @classmethod
    def of(cls, core: CoreWeights, groups: int, classes: int, unimix: float) -> Model:
        """The fields that the recurrence needs; the tensors have to stay alive."""
        blocks, width, _ = core.recurrent.shape
        model = cls(
            D=blocks * width, g=blocks, h=len(core.deter_kernel), S=groups, C=classes, unimix=unimix,
            F=blocks * width + groups * classes,
        )  # fmt: skip
        model.deter_in = addresses(core[:3])
        model.stoch_in = addresses(core[3:6])
        model.recurrent, model.recurrent_stride = core.recurrent.data_ptr(), core.recurrent.stride(0)
        model.dense, model.hidden_scale = core.dense.data_ptr(), core.hidden_scale.data_ptr()
        model.gates, model.gates_bias = core.gates.data_ptr(), core.gates_bias.data_ptr()
        return model
