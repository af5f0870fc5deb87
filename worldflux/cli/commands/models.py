"""`worldflux models`: lists the presets."""

from __future__ import annotations

import json

from worldflux.cli.options import Json


def models(*, json_output: Json = False) -> int:
    """List the presets that MODEL can be.

    Args:
        json_output: Print JSON, including the fields of each preset.

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
    print("\nParameters are counted for 64x64 images and 6 continuous actions; they differ for other spaces.")
    return 0
