"""Cards of agents and data sets: the README of a repository on the Hugging Face Hub, made from what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.errors import CheckpointError
from worldflux.hub.client import CARD_FILE, DATA_FILE, RECORD_FILE, import_hub
from worldflux.reading import read_json

FORMAT = 1
"""Version of `worldflux.json`."""
_FAMILIES = {"dreamerv3": "DreamerV3", "tdmpc2": "TD-MPC2"}
_PAPERS = {"dreamerv3": "2301.04104", "tdmpc2": "2310.16828"}
"""The papers of the families on arXiv."""
_MOST_ROWS = 12
"""Rows of a learning curve in a card."""
_FOLDERS = re.compile(r"(?<![\w./~-])(?:~?/|[A-Za-z]:[\\/])(?:[^\s'\"=,:]*[\\/])?")
"""The directories of an absolute path."""


@dataclass(frozen=True)
class Score:
    """Returns of episodes, and how they were measured."""

    mean: float
    std: float
    """Standard deviation over the episodes."""
    episodes: int
    length: float
    """Mean number of steps in an episode."""
    seed: int | None = None
    """Seed of the environment; None for episodes of the training, which had none of their own."""
    env: str | None = None
    """Name of the environment that was played in; None if it has none."""

    @classmethod
    def of(cls, returns: Sequence[float], lengths: Sequence[float], seed: int | None = None) -> Score:
        """The score of some episodes."""
        return cls(float(np.mean(returns)), float(np.std(returns)), len(returns), float(np.mean(lengths)), seed)


@dataclass(frozen=True)
class AgentRecord:
    """What is known about a pushed agent: the content of `worldflux.json`, from which its card is made."""

    family: str
    """Name of the algorithm: "dreamerv3", "tdmpc2" or a registered one."""
    model: str
    """Name of the preset: "dreamerv3:tiny"."""
    parameters: int
    """Number of trained parameters."""
    observations: str
    actions: str
    env: str | None = None
    """Name of the environment; None if it is not known."""
    env_options: Mapping[str, Any] = field(default_factory=dict)
    """Options with which it was made."""
    wrappers: Sequence[str] = ()
    """Further wrappers around it, which its name does not say."""
    timesteps: int = 0
    """Environment steps of the training."""
    data: str = ""
    """Recorded data that it was trained on; empty for an agent that has learned in the environment."""
    gradient_steps: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the agent."""
    score: Score | None = None
    """Evaluation of this agent, with its most likely actions."""
    training: Score | None = None
    """The last episodes of the training, with sampled actions."""
    curve: Sequence[Mapping[str, Any]] = ()
    """Evaluations during the training: `step`, `score`, `std` and `episodes`."""
    chosen: str = ""
    """Which agent of the run this is."""
    command: str = ""
    """Command of the training."""
    versions: Mapping[str, str] = field(default_factory=dict)
    commits: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Writes `worldflux.json`."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        (directory / RECORD_FILE).write_text(text, encoding="utf-8")


def without_folders(text: str) -> str:
    """A text in which absolute paths have lost their directories, which tell about a machine and its user."""
    return _FOLDERS.sub("", text)


def recorded_environment(directory: Path) -> tuple[str, dict[str, Any]] | None:
    """The environment that `worldflux.json` in a downloaded directory names, and its options.

    Returns:
        An id and options; None if they do not suffice, because the environment is not known or has further wrappers,
        or if making it would run other code than that of installed environments: a file does not decide which module
        is imported.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    path = directory / RECORD_FILE
    data = read_json(path) if path.is_file() else {}
    env, options = (data.get("env"), data.get("env_options", {})) if isinstance(data, dict) else (None, None)
    if not isinstance(env, str | None) or not isinstance(options, dict):
        raise CheckpointError(f"{RECORD_FILE} of the repository is damaged: env is {env!r}.")
    return None if env is None or ":" in env or data.get("wrappers") else (env, options)


def write_agent_card(directory: Path, repo_id: str, record: AgentRecord, *, film: str | None = None) -> None:
    """Writes the card of an agent.

    Args:
        directory: Directory for `README.md`.
        repo_id: Repository of the agent.
        record: What is known about it.
        film: Name of the file with an episode; None without one.
    """
    title = _FAMILIES.get(record.family, record.family)
    data = {
        "library_name": "worldflux",
        "pipeline_tag": "reinforcement-learning",
        "tags": ["reinforcement-learning", "deep-reinforcement-learning", "world-model", "worldflux", record.family]
        + ([] if record.env is None or ":" in record.env else [record.env]),
    }
    score = record.score
    if score is not None and score.env is not None:
        data["model_name"] = title
        data["eval_results"] = [
            import_hub().EvalResult(
                task_type="reinforcement-learning",
                task_name="reinforcement-learning",
                dataset_type=score.env,
                dataset_name=score.env,
                metric_type="mean_reward",
                metric_name="mean_reward",
                metric_value=f"{score.mean:.2f} +/- {score.std:.2f}",
                metric_args={"episodes": score.episodes, "deterministic": True, "seed": score.seed},
                verified=False,
            )
        ]
    scores = [row["score"] for row in record.curve]
    body = _template("agent_card.md").render(
        record=record,
        repo_id=repo_id,
        title=title,
        paper=_PAPERS.get(record.family),
        film=film,
        curve=_thinned(record.curve),
        lowest=min(scores, default=None),
        highest=max(scores, default=None),
        env_call=_env_call(record),
    )
    _write_card(directory, import_hub().ModelCardData(**data), body)


def write_dataset_card(
    directory: Path, repo_id: str, *, env: str | None = None, description: str | None = None
) -> None:
    """Writes the card of the data set in the same directory, from what is in the file.

    Args:
        directory: Directory that has the file of the data, and gets `README.md`.
        repo_id: Repository of the data set.
        env: Name of the environment that was recorded.
        description: How it was recorded.
    """
    data = {
        "pretty_name": repo_id.rpartition("/")[2],
        "tags": ["reinforcement-learning", "offline-reinforcement-learning", "world-model", "worldflux"]
        + ([] if env is None else [env]),
        "task_categories": ["reinforcement-learning"],
    }
    facts = _facts_of_data(directory / DATA_FILE)
    body = _template("dataset_card.md").render(repo_id=repo_id, env=env, description=description, **facts)
    _write_card(directory, import_hub().DatasetCardData(**data), body)


def _facts_of_data(path: Path) -> dict[str, Any]:
    """Shapes, counts and returns of a file that `ReplayBuffer.save` has written."""
    with np.load(path, allow_pickle=False) as file:
        rewards, lengths = file["rewards"].astype(np.float64), file["episode_lengths"]
        whole = file["episode_starts"] & file["episode_ends"]
        returns = np.add.reduceat(rewards, np.cumsum(lengths) - lengths) if len(lengths) else np.zeros(0)
        arrays = [(name, *_header(file, name)) for name in file.files if _is_of_steps(name)]
        classes = file["action_classes"] if "action_classes" in file.files else None
        dones, truncations = file["dones"], file["truncations"]
    kinds = {0: "continuous in [-1, 1]", 1: "discrete, one-hot"}
    actions = "not named" if classes is None else kinds.get(len(classes), f"multi-discrete, one-hots of {classes}")
    return {
        "arrays": [(name, ", ".join(map(str, shape)), dtype) for name, shape, dtype in arrays],
        "actions": actions,
        "transitions": len(rewards),
        "episodes": int(whole.sum()),
        "parts": int((~whole).sum()),
        "terminated": int(dones.sum()),
        "truncated": int((truncations & ~dones).sum()),
        "returns": returns[whole],
        "lengths": lengths[whole],
        "rewards": rewards,
    }


def _is_of_steps(name: str) -> bool:
    return name.partition("/")[0] in ("obs", "actions", "rewards", "dones", "truncations", "final_obs")


def _header(file: Any, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of an array, which is not read."""
    with file.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    return shape, str(dtype)


def _env_call(record: AgentRecord) -> str | None:
    """The code that makes the environment; None if its name does not suffice for that."""
    if record.env is None or ":" in record.env:
        return None
    options = "".join(f", {name}={value!r}" for name, value in record.env_options.items())
    return f'make_env("{record.env}"{options})'


def _thinned(curve: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Evenly spaced rows of a learning curve, with the first and the last one."""
    kept = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), _MOST_ROWS)).round().astype(int))
    return [curve[index] for index in kept]


@cache
def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["number"] = _number
    return environment.from_string((resources.files(__package__) / name).read_text(encoding="utf-8"))


def _number(value: float) -> str:
    """A number with four digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1_000 or float(value).is_integer() else f"{value:.4g}"


def _write_card(directory: Path, metadata: Any, body: str) -> None:
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body}"
    (directory / CARD_FILE).write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")
