"""Import direction: lower layers never import upper ones, and `import worldflux` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.small_models import PRESETS

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = {"worldflux": ROOT / "worldflux", "worldflux.envs": ROOT / "envs", "worldflux.agents": ROOT / "agents"}

# Each layer may import itself and the layers above it in this list. A module belongs to the longest matching prefix.
LAYERS = (
    ("worldflux.lazy",),
    ("worldflux.errors",),
    ("worldflux.files",),
    ("worldflux.reading",),
    ("worldflux.run_directory",),
    ("worldflux.locks",),
    ("worldflux.pickles",),
    ("worldflux.validation",),
    ("worldflux.tracking",),
    ("worldflux.hub",),
    ("worldflux.accel",),
    ("worldflux.nn",),
    ("worldflux.config",),
    ("worldflux.replay",),
    ("worldflux.models",),
    ("worldflux.interop",),
    ("worldflux.factory",),
    ("worldflux.envs",),
    ("worldflux.diagnostics",),
    ("worldflux.datasets",),
    ("worldflux.training",),
    ("worldflux.agents",),
    ("worldflux.cli",),
    ("worldflux",),
)
LEVEL = {prefix: level for level, layer in enumerate(LAYERS) for prefix in layer}
FOLDER_NAMES = ("envs", "agents", "tests", "examples", "benchmarks")


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = path
    return found


MODULES = modules()


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "worldflux"}


def prefix_of(module: str) -> str:
    fitting = [prefix for prefix in LEVEL if module == prefix or module.startswith(prefix + ".")]
    return max(fitting, key=len)


def imports_of(name: str, *, for_types: bool = True) -> set[str]:
    """The modules that a module imports, also inside functions, and optionally under `if TYPE_CHECKING`."""
    found = set()
    for node in statements(ast.parse(MODULES[name].read_text(encoding="utf-8")), for_types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: import from the full name of the module"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return found


def statements(tree: ast.AST, for_types: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if for_types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from statements(node, for_types)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "worldflux"])
def test_a_module_imports_only_what_lies_below_it(name: str) -> None:
    own = prefix_of(name)
    for imported in ours(imports_of(name)):
        assert imported != "worldflux", f"{name} imports the root; import from the defining module"
        other = prefix_of(imported)
        assert LEVEL[other] <= LEVEL[own], f"{name} imports {imported}, which lies above it"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_names_the_folders_instead_of_the_packages(name: str) -> None:
    assert not {imported for imported in imports_of(name) if imported.split(".")[0] in FOLDER_NAMES}


def test_no_two_modules_import_each_other() -> None:
    graph = {name: ours(imports_of(name, for_types=False)) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for imported in sorted(graph.get(name, ())):
                visit(imported, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_batch_imports_only_torch_and_errors() -> None:
    imported = imports_of("worldflux.replay.batch")
    assert ours(imported) <= {"worldflux.errors"}
    assert {name.split(".")[0] for name in imported} <= {*sys.stdlib_module_names, "torch", "worldflux"}


def test_import_worldflux_loads_nothing_heavy() -> None:
    code = (
        "import sys, worldflux; dir(worldflux); worldflux.__version__; worldflux.DreamerV3Config;"
        "print(sorted({'torch', 'numpy', 'gymnasium', 'stable_baselines3', 'cv2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_training_saving_and_loading_import_no_compiler(tmp_path: Path) -> None:
    code = (
        "import sys, worldflux\n"
        f"for preset, sizes in {PRESETS}.items():\n"
        "    settings = dict(batch_size=2, seq_len=3, learning_starts=8, model_kwargs=sizes, device='cpu')\n"
        "    worldflux.WorldFluxAgent(preset, 'Pendulum-v1', **settings).learn(12).save_checkpoint(preset)\n"
        "    agent = worldflux.WorldFluxAgent.load(preset, 'Pendulum-v1', device='cpu', resume=True)\n"
        "    agent.learn(2, reset_num_timesteps=False).model.save_pretrained('model')\n"
        "    worldflux.create_world_model('model')\n"
        "    assert agent._n_updates > 4\n"
        "print({'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "set()\n"
