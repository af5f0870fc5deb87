"""Official DreamerV3 checkpoints: dimensions, locations, and that reading them cannot run code."""

import os
import pickle

import pytest
import torch
from helpers.golden_dreamerv3 import GOLDEN, OBS_SHAPES, golden

from worldflux.errors import CheckpointError
from worldflux.interop import load_official_dreamerv3

CHECKPOINTS = GOLDEN / "dreamerv3_proprio_official" / "ckpt"
FOLDER = CHECKPOINTS / (CHECKPOINTS / "latest").read_text().strip()


def load(source, **changes):
    return load_official_dreamerv3(source, **{"obs_shape": OBS_SHAPES["proprio"], "action_dim": 3, **changes})


@pytest.mark.parametrize("place", [CHECKPOINTS.parent, CHECKPOINTS, FOLDER, FOLDER / "agent.pkl"], ids=lambda p: p.name)
def test_the_run_the_ckpt_the_folder_and_the_file_are_all_accepted(place):
    assert torch.equal(load(place).rssm.prior_out.weight, load(FOLDER).rssm.prior_out.weight)


def test_dimensions_come_from_the_shapes():
    config = golden("pixels").model().config
    assert (config.deter_dim, config.hidden_dim, config.units, config.cnn_depth) == (64, 16, 24, 4)
    assert (config.stoch_discrete, config.stoch_classes, config.blocks, config.bspace) == (4, 6, 8, 8)
    assert config.action_classes == (5,)


def test_a_flat_vector_joins_the_vector_keys_in_sorted_order():
    ref = golden("proprio")
    apart, joined = ref.model(), load(ref.under("p/"), obs_shape=(11,))
    obs = ref.obs("policy/0/obs/")
    flat = torch.cat([obs[k] for k in sorted(obs)], -1)
    a, b = apart.encode(obs, deterministic=True), joined.encode(flat, deterministic=True)
    torch.testing.assert_close(a["deter"], b["deter"])
    decoded = apart.decode(a)["obs"]
    torch.testing.assert_close(torch.cat([decoded[k] for k in sorted(decoded)], -1), joined.decode(b)["obs"])


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent.pkl").write_bytes(pickle.dumps({"params": {"enc/mlp0/kernel": Malicious()}}))
    with pytest.raises(CheckpointError, match="could run code"):
        load(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_folder_cannot_point_outside(tmp_path):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "latest").write_text("../../elsewhere")
    with pytest.raises(CheckpointError, match=r"ckpt.elsewhere.agent\.pkl"):
        load(tmp_path)


def test_shapes_of_another_environment_are_an_error():
    with pytest.raises(CheckpointError, match=r"of observations .* and action_dim 4\? Pass those of its training"):
        load(FOLDER, action_dim=4)
    with pytest.raises(CheckpointError, match="lacks"):
        load(FOLDER, obs_shape=(3, 64, 64))
    params = golden("proprio").under("p/")
    del params["dyn/dyngru/kernel"]
    with pytest.raises(CheckpointError, match="lacks"):
        load(params)
    del params["dyn/dynhid0/kernel"]
    with pytest.raises(CheckpointError, match="dyn/dynhid0/kernel"):
        load(params)


def test_the_loaded_model_saves_and_loads_as_any_other(tmp_path):
    model = load(FOLDER)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
