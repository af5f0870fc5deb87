"""`worldflux doctor`: reports what works on this machine, and what to install for the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from worldflux.cli.options import DeviceName, Flag, Json, OptionalDeviceName, OptionalEnvName


def doctor(
    env: OptionalEnvName = None,
    *,
    device: DeviceName = "auto",
    render: Flag = False,
    check_device: OptionalDeviceName = None,
    json_output: Json = False,
) -> int:
    """Report what works on this machine, and the commands that install the rest.

    Args:
        env: An environment to check as well: an id, module:Class or path.py:Class.
        device: A device that has to work: cpu, cuda, cuda:1; auto accepts any.
        render: Check the rendered image of ENV, too.
        check_device: A device (cpu, cuda, ...) on which to compare and time all implementations; takes a minute.
        json_output: Print JSON.

    Returns:
        1 if ENV or a device does not work, or a fast implementation gives different results; otherwise 0.
    """
    from worldflux.cli import diagnosis

    report: dict[str, Any] = {"versions": diagnosis.packages()}
    report["device"] = diagnosis.hardware(device)
    report["rendering"] = diagnosis.rendering()
    report["environment"] = None if env is None else diagnosis.environment(env, render=render)
    report["missing"] = diagnosis.missing(report["versions"])
    report["check"] = None
    if check_device is not None:
        from worldflux.cli import device_check

        report["check"] = device_check.check_device(check_device)
    parts = [report["device"], report["environment"], report["check"]]
    works = all(part["works"] for part in parts if part is not None)
    if json_output:
        print(json.dumps({**report, "works": works}, indent=2))
    else:
        _print(report)
    return 0 if works else 1


def _print(report: Mapping[str, Any]) -> None:
    """Prints the report for people."""
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
    _title("MuJoCo rendering, one frame with each backend")
    for name, answer in report["rendering"].items():
        _line(name, answer)
    if report["environment"] is not None:
        _title(report["environment"]["name"])
        for status, text in report["environment"]["checks"]:
            _line(status, text)
    if report["check"] is not None:
        _print_check(report["check"])
    _title("not installed")
    for package, command in report["missing"].items():
        _line(package, command)
    sys.stdout.flush()


def _print_check(check: Mapping[str, Any]) -> None:
    """Prints the milliseconds of each implementation, and the differences."""
    _title(f"one gradient step and one action on {check['device']}, milliseconds")
    forms = list(dict.fromkeys(form for row in check["rows"] for form in row["milliseconds"]))
    print(f"  {'':<34}" + "".join(f"{form:>10}" for form in forms))
    for row in check["rows"]:
        name = f"{row['model']}, {row['observations']}, {row['computes']}"
        times = (row["milliseconds"].get(form) for form in forms)
        shown = "".join(f"{'-' if one is None else format(one, '.2f'):>10}" for one in times)
        print(f"  {name:<34}{shown}   {'differs' if row['problems'] else 'same results'}")
    for row in check["rows"]:
        for problem in row["problems"]:
            _line("failed", f"{row['model']}, {row['observations']}, {row['computes']}: {problem}")
    if not check["works"]:
        _line("report", f"to the developers of worldflux, with this: {check['circumstances']}")


def _title(text: str) -> None:
    print(f"\n{text}" if text != "versions" else text)


def _line(name: str, value: object) -> None:
    print(f"  {name:<18} {value}")
