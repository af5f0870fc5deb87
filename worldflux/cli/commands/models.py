"""`worldflux models`: what MODEL may be."""

from __future__ import annotations

import json
from typing import Annotated

import tyro


def models(*, json_output: Annotated[bool, tyro.conf.arg(name="json")] = False) -> int:
    """List the models that can be trained by name.

    Args:
        json_output: Print JSON, the fields of each preset included.

    Returns:
        0
    """
    from worldflux.factory import list_models

    found = list_models(verbose=True)
    if json_output:
        print(json.dumps(found, indent=2))
        return 0
    rows = [("MODEL", "PARAMETERS", "ALSO CALLED")]
    rows += [(name, f"{entry['params']:,}", ", ".join(entry["aliases"])) for name, entry in found.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    family = ""
    for (name, parameters, aliases), entry in zip(rows, [None, *found.values()], strict=True):
        if entry is not None and entry["type"] != family:
            family = entry["type"]
            print(f"\n{entry['description'].partition(';')[0]}")
        print(f"{name:<{widths[0]}}  {parameters:>{widths[1]}}  {aliases}".rstrip())
    print("\nParameters are counted for a 64x64 picture and 6 continuous actions; other spaces have others.")
    return 0
