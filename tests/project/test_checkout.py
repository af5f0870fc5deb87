"""Scripts in the folder of the checkout use it, although `envs` and `agents` lie beside the package there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]  # as without -e
sys.path.insert(0, sys.argv[1])
import worldflux.agents.agent, worldflux.envs.make
print(worldflux.envs.__file__, worldflux.agents.__file__)
"""


def test_the_checkout_can_be_imported_without_an_editable_installation() -> None:
    command = [sys.executable, "-c", SCRIPT, str(ROOT)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [str(ROOT / "envs" / "__init__.py"), str(ROOT / "agents" / "__init__.py")]
