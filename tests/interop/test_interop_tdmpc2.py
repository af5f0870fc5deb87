"""Official TD-MPC2 checkpoints: both formats, all kinds of networks, and invalid files."""

from pathlib import Path

import pytest
import torch
from helpers.golden_tdmpc2 import GOLDEN, KINDS, OBS_SHAPES, assert_matches, golden, model

from worldflux.errors import CheckpointError, ConfigurationError
from worldflux.interop import load_official_tdmpc2

PRESENT = GOLDEN / "tdmpc2_state_official.pt"
OLD = GOLDEN / "tdmpc2_state_official_old.pt"


def load(source, **fields):
    return load_official_tdmpc2(source, **{"obs_shape": (9,), "action_dim": 3, **fields})


@pytest.mark.parametrize("path", [PRESENT, OLD])
def test_both_formats_give_the_reference_model(path):
    net, expected = load(path), model("state").state_dict()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ref = golden("state")
    assert_matches(net.encode(ref["in/obs"][0])["latent"], ref["fwd/z"][0])
    state = ref.state(ref["fwd/zs"][0])
    assert_matches(net.q_values(state, ref["in/action"][0]), ref["fwd/q"][:, 0, :, 0])
    assert not net.training


def test_dimensions_come_from_the_shapes():
    config = load(PRESENT).config
    found = (config.latent_dim, config.hidden_dim, config.mlp_dim, config.enc_dim, config.num_q_networks)
    assert found == (64, 56, 56, 48, 5)
    assert (config.num_enc_layers, config.num_hidden_layers, config.num_bins) == (2, 2, 101)
    assert (config.log_std_min, config.log_std_max, config.episodic) == (-10.0, 2.0, False)


def test_what_shapes_do_not_tell_can_be_given():
    assert load(PRESENT, episode_length=1000).discount == pytest.approx(0.995)
    with pytest.raises(ConfigurationError, match="'episode_len'; did you mean 'episode_length'"):
        load(PRESENT, episode_len=1000)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_is_recognised(kind):
    ref, net = golden(kind), model(kind)
    assert net.config.obs_shape == OBS_SHAPES[kind]
    assert (net.termination_head is not None) == (kind == "episodic")
    assert (net.tasks is not None) == (kind == "multitask")
    if kind == "multitask":
        assert net.config.task_action_dims == (2, 4, 3)
        assert torch.equal(net.tasks.action_masks, ref["sd/_action_masks"])
    if kind == "episodic":
        assert float(net.termination_seen) == 1.0


def test_the_second_name_of_the_values_wins_as_in_the_reference():
    params = torch.load(PRESENT, weights_only=True)["model"]
    changed = {**params, "_detach_Qs_params.2.bias": params["_detach_Qs_params.2.bias"] + 1.0}
    assert torch.equal(load(changed).critics.layers[2].bias, params["_Qs.params.2.bias"] + 1.0)


def test_a_model_that_was_loaded_is_saved_and_read_again(tmp_path: Path):
    net = load(PRESENT)
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    assert again.config == net.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_what_cannot_be_read_is_a_checkpoint_error(tmp_path: Path, capsys):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"model": Harmful()}, tmp_path / "code.pt")
    torch.save({"model": {"step": 3}}, tmp_path / "empty.pt")
    torch.save({"model": {"other.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    for name, message in (
        ("absent.pt", "is not a file"),
        ("text.pt", "text.pt cannot be loaded .* it is no archive"),
        ("code.pt", "code.pt cannot be loaded .* could run code"),
        ("empty.pt", "no mapping of names to tensors"),
        ("other.pt", "has no parameter '_dynamics.0.weight'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"obs_shape": (10,)}, r"encoder.parts.0.0.weight has shape \(48, 9\), expected \(48, 10\)"),
        ({"action_dim": 4}, "actor.layers.2.bias has shape"),
        ({"obs_shape": (9, 64, 64)}, "has no parameter '_encoder.rgb.2.weight'"),
    ],
)
def test_other_shapes_than_the_checkpoints_are_refused(fields, message):
    with pytest.raises(CheckpointError, match=message):
        load(PRESENT, **fields)


def test_missing_and_unknown_parameters_are_named():
    params = dict(torch.load(PRESENT, weights_only=True)["model"])
    del params["_pi.1.bias"]
    with pytest.raises(CheckpointError, match=r"lacks 'actor.layers.1.bias' and has nothing"):
        load(params)
    params = dict(torch.load(PRESENT, weights_only=True)["model"])
    params["_reward.3.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"lacks nothing and has 'reward_head.layers.3.weight'"):
        load(params)
