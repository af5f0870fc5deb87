"""`worldflux report`: one HTML page about a run, or about several seeds of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from worldflux.cli import runs
from worldflux.cli.options import Count, Flag, check_writable
from worldflux.errors import ConfigurationError
from worldflux.files import checked_path, write_text


def report(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("report.html"),
    no_film: Flag = False,
    no_imagination: Flag = False,
    no_reference: Flag = False,
    episodes: Count = 1,
    seed: Count = 0,
) -> int:
    """Write one HTML page about a run: curves, films, imagined and real, settings.

    Args:
        run: Directory of a run, or of several runs that differ only in their seeds.
        output: Page to write, .html. It needs no other files and no network.
        no_film: Leave out the films, for which the agents play in their environment.
        no_imagination: Leave out the comparison of the model's predictions with recorded episodes.
        no_reference: Leave out the scores that the model's authors have published for the same task.
        episodes: Number of episodes in each film.
        seed: Seed of the films, and of the choice of recorded episodes.

    Returns:
        0
    """
    from worldflux.cli.commands.plot import grouped, no_run
    from worldflux.cli.curves import read_run
    from worldflux.cli.report.content import Options, build_page
    from worldflux.cli.report.pictures import check_one_kind
    from worldflux.validation import whole_number

    whole_number("episodes", episodes, 1)
    whole_number("seed", seed, 0)
    target = checked_path("--output", output)  # before an environment may change the working directory
    if output.suffix.lower() not in (".html", ".htm") or not target.parent.is_dir() or target.is_dir():
        raise ConfigurationError(f"{output} cannot be written, expected an .html in an existing directory.")
    check_writable("--output", output, target.parent)
    directory = checked_path("RUN", run)
    found = [read_run(place) for place in runs.find_runs(directory)]
    if not found:
        raise ConfigurationError(no_run(run))
    curves = [(task, curve) for task, each in grouped(found).items() for curve in each]
    check_one_kind([f"{curve.label} in {task}" for task, curve in curves], run)
    ((task, curve),) = curves
    options = Options(not no_film, not no_imagination, not no_reference, episodes, seed)
    write_text(target, build_page(directory, task, curve, options).html(), ConfigurationError)
    print(output)
    return 0
