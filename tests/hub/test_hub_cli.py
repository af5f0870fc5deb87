"""`worldflux push`, and the commands that take an address on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.data_sets import acted, earned, observed
from helpers.hub import Hub
from huggingface_hub import ModelCard

from worldflux.cli.main import main
from worldflux.training import ReplayBuffer

NAME, ADDRESS = "ann/cartpole", "hf://ann/cartpole"
SIZES = [f"--set={name}={value}" for name, value in dict(deter_dim=16, units=8, hidden_dim=8).items()]
TRAIN = ["--steps", "40", "--train-ratio", "0", "--eval-interval", "20", "--eval-episodes", "2", "--seed", "0", *SIZES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        kwargs = ["--env-kwargs", "sutton_barto_reward=false"]
        assert main(["train", "dreamerv3:tiny", "CartPole-v1", *TRAIN, *kwargs, "--run", "run"]) == 0
    return place


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return Path("run")


def test_a_run_is_pushed_with_everything_that_it_knows(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "run", NAME, "--episodes", "3", "--video", "--message", "First", "--private"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/{NAME}\n"
    repository, files = hub.repositories[NAME], hub.files(NAME)
    assert repository.private and repository.messages[-1] == "First"
    assert files.keys() - {".gitattributes"} == {
        *("README.md", "agent.json", "config.json", "evaluations.csv", "model.safetensors"),
        *("replay.gif", "worldflux.json"),
    }
    assert files["replay.gif"].startswith(b"GIF89a")
    assert files["evaluations.csv"] == (run / "evaluations.csv").read_bytes()
    card, config = ModelCard(files["README.md"].decode()), json.loads((run / "config.json").read_text())
    (result,) = card.data.eval_results
    assert result.metric_args == {"episodes": 3, "deterministic": True, "seed": 1000}
    assert "![An episode of this agent](replay.gif)" in card.text
    assert f"```bash\n{config['command']}\n```" in card.text
    assert f"| torch | {config['versions']['torch']} |" in card.text
    assert all(f"| commit of {name} | `{commit}` |" in card.text for name, commit in config["commits"].items())
    assert "with the best of 2 evaluations of the run, from step 20" in card.text
    assert "| 20 | " in card.text and "| 40 | " in card.text and "| `seed` | 0 |" in card.text
    assert 'make_env("CartPole-v1", sutton_barto_reward=False)' in card.text
    assert "hf://ann/cartpole --video" in card.text


def test_a_second_push_leaves_no_film_of_the_first(hub: Hub, run: Path) -> None:
    assert main(["push", "run", NAME, "--episodes", "1", "--video"]) == 0
    hub.files(NAME)["notes.txt"] = b"mine"
    assert main(["push", "run", NAME, "--episodes", "0"]) == 0
    files = hub.files(NAME)
    assert "replay.gif" not in files and files["notes.txt"] == b"mine"
    assert ModelCard(files["README.md"].decode()).data.eval_results is None
    assert b"The agent was not evaluated." in files["README.md"]


def test_eval_and_imagine_play_a_pushed_agent_in_its_environment(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["push", "run", NAME, "--episodes", "2", "--seed", "5"]) == 0
    capsys.readouterr()
    assert main(["eval", ADDRESS, "--episodes", "2", "--seed", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["agent"], found["env"]) == (ADDRESS, "CartPole-v1")
    score = json.loads(hub.files(NAME)["worldflux.json"])["score"]
    assert (
        main(["train", ADDRESS, "CartPole-v1", *TRAIN[:4], "--eval-interval", "0", "--run", str(tmp_path / "run")]) == 0
    )
    assert (found["mean"], found["std"]) == (score["mean"], score["std"])
    data = str(tmp_path / "data.npz")
    assert main(["collect", "CartPole-v1", "--policy", ADDRESS, "--steps", "20", "--output", data]) == 0
    sizes = {"windows": 1, "horizon": 2, "context": 2, "episodes": 2, "shown": 1}
    options = [f"--{name}={size}" for name, size in sizes.items()] + ["--output", str(tmp_path / "im")]
    assert main(["imagine", ADDRESS, *options]) == 0
    assert json.loads((tmp_path / "im" / "imagination.json").read_text())["data"] == "2 new episodes in CartPole-v1"


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("os:system", {}, "names no installed environment, or one with further wrappers. Add ENV: worldflux eval"),
        ("CartPole-v1", {"path": "/etc"}, "has options for CartPole-v1 that are no numbers: {'path': '/etc'}. Add ENV"),
        (None, {}, "names no installed environment"),
        (7, {}, "worldflux.json of the repository is damaged"),
    ],
)
def test_a_repository_does_not_choose_what_is_imported(
    hub: Hub, run: Path, env: object, options: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "run", NAME, "--episodes", "0"]) == 0
    record = json.loads(hub.files(NAME)["worldflux.json"])
    hub.files(NAME)["worldflux.json"] = json.dumps({**record, "env": env, "env_options": options}).encode()
    assert main(["eval", ADDRESS]) == 2
    assert message in capsys.readouterr().err
    assert main(["eval", ADDRESS, "CartPole-v1", "--episodes", "1"]) == 0


def test_a_preview_is_written_and_nothing_is_pushed(hub: Hub, run: Path, tmp_path: Path) -> None:
    preview = tmp_path / "preview"
    assert main(["push", "run/checkpoints", NAME, "--episodes", "1", "--preview", str(preview)]) == 0
    assert (preview / "README.md").read_text().startswith("---\nlibrary_name: worldflux\n")
    assert "the newest of the run, from step 40" in (preview / "README.md").read_text()
    assert hub.requests == []
    assert main(["push", "run", NAME, "--preview", str(preview)]) == 2  # it is not empty


def test_a_model_of_recorded_data_is_pushed_as_an_agent(hub: Hub, run: Path, tmp_path: Path) -> None:
    data, trained = str(tmp_path / "steps.npz"), str(tmp_path / "trained")
    assert main(["collect", "CartPole-v1", "--steps", "60", "--seed", "0", "--output", data]) == 0
    few = ["--steps", "2", "--batch-size", "2", "--seq-len", "4", "--eval-share", "0", "--seed", "3", *SIZES]
    assert main(["train-offline", "dreamerv3:tiny", data, *few, "--run", trained]) == 0
    assert main(["push", trained, NAME, "CartPole-v1", "--episodes", "1"]) == 0
    text = hub.files(NAME)["README.md"].decode()
    assert "from recorded data (`steps.npz`)" in text and "\n2 gradient steps." in text and "| `seed` | 3 |" in text
    assert str(tmp_path) not in text
    assert main(["eval", ADDRESS, "--episodes", "1"]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "a b"], "repo_id is 'a b', expected 'user/name'"),
        (["run", NAME, "--episodes", "0", "--video"], "--video films the evaluation"),
        (["nothing", NAME], "There is no 'nothing'"),
        (["run/best_agent.zip", NAME, "--pixels"], "--pixels: options of an environment need ENV"),
        (["run", "bob/cartpole", "--episodes", "0"], "Your token does not allow you to write to 'bob/cartpole'"),
    ],
)
def test_what_cannot_be_pushed_is_said_in_one_line(
    hub: Hub, run: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", *args]) == 2
    assert message in capsys.readouterr().err
    assert hub.repositories == {}


def test_the_command_line_pushes_data_and_trains_from_there(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    buffer, address = ReplayBuffer(100, (2,), 1, action_type="continuous", seed=0), "hf://datasets/ann/counts"
    for episode in range(3):
        buffer.add_episode(observed(episode, 6), acted(episode, 5), earned(episode, 5))
    buffer.save("counts.npz")
    words = ["--env", "Counting-v0", "--about", "By hand.", "--private"]
    assert main(["data", "push", "counts.npz", "ann/counts", *words]) == 0
    assert capsys.readouterr().out == f"{hub.url}/datasets/ann/counts\n"
    assert hub.repositories["datasets/ann/counts"].private
    settings = "--steps 1 --batch-size 2 --seq-len 4 --eval-share 0 --seed 0 --run run".split()
    assert main(["train-offline", "tdmpc2:tiny", address, *settings]) == 0
    sha = hub.repositories["datasets/ann/counts"].branches["main"]
    assert f'"task": "{address}@{sha}"' in Path("run/config.json").read_text()
    buffer.push_to_hub("ann/counts", description="Changed.")
    assert main(["train-offline", "--resume", "run", "--steps", "2"]) == 0
