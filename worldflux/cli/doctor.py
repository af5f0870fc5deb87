"""`worldflux doctor`: what works on this machine, and what to install for the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import tyro

from worldflux.cli.options import OptionalEnvName


def doctor(
    env: OptionalEnvName = None,
    *,
    device: str = "auto",
    render: bool = False,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Say what works on this machine, what is missing, and the command that installs it.

    Args:
        env: An environment to check as well: an id, module:Class or path.py:Class.
        device: A device that shall work: cpu, cuda, cuda:1; auto is content with any.
        render: Check the picture of ENV, too.
        json_output: Print JSON.

    Returns:
        1 if ENV or the device does not work, otherwise 0.
    """
    from worldflux.cli import diagnosis

    report: dict[str, Any] = {"versions": diagnosis.packages()}
    report["device"] = diagnosis.hardware(device)
    report["rendering"] = diagnosis.rendering()
    report["environment"] = None if env is None else diagnosis.environment(env, render=render)
    report["missing"] = diagnosis.missing(report["versions"])
    works = report["device"]["works"] and (env is None or report["environment"]["works"])
    if json_output:
        print(json.dumps({**report, "works": works}, indent=2))
    else:
        _print(report)
    return 0 if works else 1


def _print(report: Mapping[str, Any]) -> None:
    """The report for people."""
    _title("versions")
    for name, version in report["versions"].items():
        if version is not None:
            _line(name, version)
    _title("device")
    for name, value in report["device"].items():
        if name not in ("works", "problem", "asked_for"):
            _line(name, ", ".join(value) if isinstance(value, list) else value)
    _line(
        f"--device {report['device']['asked_for']}",
        report["device"]["works"] or f"does not work: {report['device']['problem']}",
    )
    _title("pictures of MuJoCo, one frame with each backend")
    for name, answer in report["rendering"].items():
        _line(name, answer)
    if report["environment"] is not None:
        _title(report["environment"]["name"])
        for status, text in report["environment"]["checks"]:
            _line(status, text)
    _title("not installed")
    for package, command in report["missing"].items():
        _line(package, command)
    sys.stdout.flush()


def _title(text: str) -> None:
    print(f"\n{text}" if text != "versions" else text)


def _line(name: str, value: object) -> None:
    print(f"  {name:<18} {value}")
