"""What cannot be pushed to the Hugging Face Hub or loaded from it, and what the errors say."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from helpers.agents import make_agent
from helpers.hub import TOKEN, Hub

from worldflux import ConfigurationError, HubError, WorldFluxAgent, create_world_model
from worldflux.errors import CheckpointError, MissingDependencyError, TrainingError

NAME, ADDRESS = "ann/cartpole", "hf://ann/cartpole"


@pytest.fixture(scope="module")
def agent() -> WorldFluxAgent:
    return make_agent(train_ratio=0)


def test_who_may_not_push_is_told_so(hub: Hub, agent: WorldFluxAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match="Your token does not allow you to write to 'bob/cartpole'"):
        agent.push_to_hub("bob/cartpole")
    with pytest.raises(HubError, match="'ann/cartpole': you are not logged in, or your token is not valid"):
        agent.push_to_hub(NAME, token="hf_wrong")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"not logged in.*hf auth login"):
        agent.push_to_hub(NAME)
    assert NAME not in hub.repositories


def test_a_private_repository_is_private(hub: Hub, agent: WorldFluxAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.push_to_hub(NAME, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"hf://ann/cartpole does not exist, or is private.*hf auth login.*HF_TOKEN"):
        WorldFluxAgent.load(ADDRESS)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    WorldFluxAgent.load(ADDRESS)


@pytest.mark.parametrize("repo_id", ["ann/a b", "a/b/c", "", "hf://ann/cartpole", "ann/..", 5])
def test_names_that_no_repository_has_are_refused(hub: Hub, agent: WorldFluxAgent, repo_id: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^repo_id is .*, expected 'user/name'"):
        agent.push_to_hub(repo_id)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://cartpole", "'hf://cartpole' is not an address on the Hugging Face Hub, expected hf://user/name"),
        ("hf://ann/cart/pole", "is not an address"),
        ("hf://ann/cartpole@", "is not an address"),
        ("hf://../cartpole", "is not an address"),
        ("hf://ann/cartpole@../../main", "is not an address"),
        ("hf://datasets/ann/data", "is the address of a data set, expected that of a model, such as 'hf://ann/data'"),
    ],
)
def test_wrong_addresses_are_refused(hub: Hub, address: str, message: str) -> None:
    for load in (WorldFluxAgent.load, create_world_model):
        with pytest.raises(ConfigurationError, match=message):
            load(address)
    assert hub.requests == []


def test_unknown_repositories_and_revisions_are_named(hub: Hub, agent: WorldFluxAgent) -> None:
    agent.push_to_hub(NAME)
    with pytest.raises(HubError, match=r"hf://ann/cartpol does not exist, or is private. Check the name"):
        WorldFluxAgent.load("hf://ann/cartpol")
    with pytest.raises(HubError, match=r"'ann/cartpole' has no revision 'v2'. Pass one of its branches"):
        WorldFluxAgent.load(f"{ADDRESS}@v2")


def test_a_repository_of_something_else_is_refused(hub: Hub, agent: WorldFluxAgent) -> None:
    hub.put("bob/notes", {"README.md": b"notes", "model.pkl": b"a pickle"})
    for load in (WorldFluxAgent.load, create_world_model):
        with pytest.raises(HubError, match=r"hf://bob/notes is not a repository of worldflux: it has no agent.json, "):
            load("hf://bob/notes")
    agent.push_to_hub(NAME)
    weights = hub.files(NAME)["model.safetensors"]
    hub.put("bob/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": weights})
    with pytest.raises(CheckpointError, match=r"not an agent.*of one that holds a model alone.*\('hf://bob/bert', env"):
        WorldFluxAgent.load("hf://bob/bert")
    with pytest.raises(ConfigurationError, match="bert"):
        create_world_model("hf://bob/bert")


@pytest.mark.parametrize("name", ["agent.json", "config.json", "model.safetensors"])
def test_damaged_files_are_refused(hub: Hub, agent: WorldFluxAgent, name: str) -> None:
    agent.push_to_hub(NAME)
    hub.files(NAME)[name] = hub.files(NAME)[name][:-20]
    with pytest.raises(CheckpointError):
        WorldFluxAgent.load(ADDRESS)


def test_a_diverged_agent_is_not_pushed(hub: Hub) -> None:
    agent = make_agent(train_ratio=0)
    with torch.no_grad():
        next(iter(agent.model.parameters())).fill_(torch.nan)
    with pytest.raises(TrainingError, match="Nothing is saved"):
        agent.push_to_hub(NAME)
    assert hub.requests == []


def test_without_huggingface_hub_the_extra_is_named(agent: WorldFluxAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (lambda: agent.push_to_hub(NAME), lambda: WorldFluxAgent.load(ADDRESS)):
        with pytest.raises(MissingDependencyError, match=r"needs huggingface_hub. Install it with: pip .*\[hub"):
            use()
