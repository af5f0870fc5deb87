"""Stand-ins for the packages wandb and mlflow, which keep what they are given."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any


class FakeWandbRun:
    """A run of wandb. The names of `define_metric` are kept as axes."""

    def __init__(self, tool: FakeWandb, id: str, **given: Any) -> None:
        self.tool, self.id, self.given = tool, id, given
        self.project, self.name, self.config = given["project"], given["name"], dict(given["config"])
        self.rows: list[dict[str, float]] = []
        self.axes: dict[str, str | None] = {}
        self.ended: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: Mapping[str, float]) -> None:
        assert self.ended is None
        self.rows.append(dict(values))

    def finish(self, exit_code: int) -> None:
        self.ended, self.tool.run = exit_code, None


class FakeWandb:
    """The package wandb, as far as worldflux uses it."""

    def __init__(self) -> None:
        self.run: FakeWandbRun | None = None
        self.runs: list[FakeWandbRun] = []

    def init(self, *, id: str | None, **given: Any) -> FakeWandbRun:
        assert self.run is None
        self.run = FakeWandbRun(self, id or f"w{len(self.runs)}", **given)
        self.runs.append(self.run)
        return self.run


class FakeMlflow:
    """The package mlflow, as far as worldflux uses it. As in the real one, a parameter cannot be changed."""

    def __init__(self) -> None:
        self.experiment: str | None = None
        self.runs: dict[str, SimpleNamespace] = {}
        self.open: SimpleNamespace | None = None

    def set_experiment(self, name: str) -> None:
        self.experiment = name

    def active_run(self) -> SimpleNamespace | None:
        return self.open

    def start_run(self, *, run_id: str | None, run_name: str | None, tags: Any) -> SimpleNamespace:
        assert self.open is None
        run_id = run_id or f"m{len(self.runs)}"
        info = SimpleNamespace(run_id=run_id)
        new = SimpleNamespace(info=info, name=run_name, experiment=self.experiment, tags=tags, params={}, rows=[])
        self.open = self.runs.setdefault(run_id, new)
        return self.open

    def log_params(self, params: Mapping[str, Any]) -> None:
        assert self.open is not None and not set(params) & set(self.open.params) and len(params) <= 100
        self.open.params |= params

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        assert self.open is not None
        self.open.rows.append((step, dict(values)))

    def end_run(self, status: str) -> None:
        assert self.open is not None
        self.open.status, self.open = status, None
