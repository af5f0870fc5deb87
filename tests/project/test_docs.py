"""README and documentation name what exists: imports, arguments, fields, files, commands, pages, anchors, sizes."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import DOCS, PAGES, ROOT, blocks, prose

import worldflux
from worldflux import DreamerV3Config, TDMPC2Config, WorldFluxAgent, WorldModel, list_models
from worldflux.agents.settings import AgentSettings
from worldflux.config import PlannerConfig
from worldflux.errors import MissingDependencyError
from worldflux.training import ReplayBuffer, Trainer

PUBLIC = (
    "worldflux",
    "worldflux.agents",
    "worldflux.envs",
    "worldflux.training",
    "worldflux.datasets",
    "worldflux.interop",
    "worldflux.config",
)
FAMILY_FIELDS = {item.name for config in (DreamerV3Config, TDMPC2Config) for item in fields(config)}
DATA_OPTIONS = {"keys", "align", "final_row", "time_limit", "obs", "ends", "action_bounds", "download", "task"}
"""Options of the formats that `worldflux.datasets.load` reads."""
OPEN_KEYWORDS = {
    "create_world_model": FAMILY_FIELDS,
    "load": {item.name for item in fields(AgentSettings)} | DATA_OPTIONS,
}
"""The keywords that `**` in a signature accepts."""
DICTIONARIES = {"model_kwargs": FAMILY_FIELDS, "planner_kwargs": {item.name for item in fields(PlannerConfig)}}
VARIABLES = {"agent": WorldFluxAgent, "buffer": ReplayBuffer, "trainer": Trainer, "model": WorldModel}
"""Names of objects in the pages, with their classes."""

FILES = ("zip", "json", "safetensors", "md", "pkl")
"""Endings of file names such as agent.zip, which are no attributes."""

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def public_names() -> dict[str, Any]:
    modules = [importlib.import_module(name) for name in PUBLIC]
    return {name: getattr(module, name) for module in modules for name in module.__all__}


def known_names(page: Path) -> dict[str, Any]:
    """Names of worldflux that a page's code may use: its imports, and all public names."""
    names = public_names()
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "worldflux":
                module = importlib.import_module(node.module or "")
                names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    return names


def called(node: ast.Call, names: dict[str, Any]) -> tuple[Any, bool]:
    """The function of ours that is called, or None, and whether it is a method that takes `self`."""
    match node.func:
        case ast.Name(id=name):
            return names.get(name), False
        case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in VARIABLES:
            return inspect.getattr_static(VARIABLES[owner], name, None), True
        case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in names:
            return getattr(names[owner], name), False
    return None, False


def calls(page: Path) -> Iterator[ast.Call]:
    for code in blocks(page, "python"):
        yield from (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))


@page_by_page
def test_nothing_is_left_to_be_filled_in(page: Path) -> None:
    marks = re.findall(r"@@\w*@@|\b(?:TODO|TBD|FIXME|XXX)\b|(?i:lorem ipsum)", page.read_text(encoding="utf-8"))
    assert not marks


@page_by_page
def test_python_blocks_are_python_and_what_they_import_from_worldflux_exists(page: Path) -> None:
    known_names(page)


@page_by_page
def test_calls_in_python_blocks_have_arguments_that_the_functions_take(page: Path) -> None:
    names = known_names(page)
    for node in calls(page):
        function, is_method = called(node, names)
        if function is None or any(isinstance(item, ast.Starred) for item in node.args):
            continue
        if not callable(function):
            function = function.__func__  # a class method, looked up statically
        given = [None] * (len(node.args) + is_method)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}
        try:
            inspect.signature(function).bind_partial(*given, **keywords)
        except TypeError as error:
            pytest.fail(f"{ast.unparse(node)}: {error}")
        allowed = OPEN_KEYWORDS.get(function.__name__)
        parameters = inspect.signature(function).parameters
        assert allowed is None or not set(keywords) - set(parameters) - allowed, ast.unparse(node)


@page_by_page
def test_dictionaries_of_overrides_name_fields_of_a_configuration(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for argument, allowed in DICTIONARIES.items():
        for inside in re.findall(rf"{argument}={{([^}}]*)}}", text):
            assert set(re.findall(r'"(\w+)":', inside)) <= allowed


@pytest.fixture(scope="module")
def attributes() -> dict[str, set[str]]:
    """The attributes of an object for each name in `VARIABLES`."""
    agent = WorldFluxAgent("dreamerv3:tiny", "CartPole-v1", model_kwargs={"deter_dim": 16, "units": 8})
    objects = {"agent": agent, "buffer": agent.replay_buffer, "trainer": agent.trainer, "model": agent.model}
    return {name: set(dir(each)) for name, each in objects.items()}


@page_by_page
def test_attributes_of_agents_buffers_trainers_and_models_exist(page: Path, attributes: dict[str, set[str]]) -> None:
    code = "\n".join(blocks(page, "python") + re.findall(r"`([^`\n]+)`", prose(page)))
    for owner, name in re.findall(r"(?<![\w./:\"-])(agent|buffer|trainer|model)\.([A-Za-z_]\w*)", code):
        if name not in FILES:
            assert name in attributes[owner], f"{owner}.{name}"


@page_by_page
def test_dotted_names_in_the_text_can_be_imported(page: Path) -> None:
    for name in re.findall(r"(?<![\w/:])(worldflux(?:\.\w+)+)", prose(page)):
        parts = [part for part in name.split(".") if part not in FILES]
        found: Any = worldflux
        for depth, part in enumerate(parts[1:], 2):
            if not hasattr(found, part):
                with suppress(MissingDependencyError):  # of an extra that is not installed
                    found = importlib.import_module(".".join(parts[:depth]))
                continue
            found = getattr(found, part)


# Links, files, commands


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings that are the same on GitHub and on the site."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {text.replace(" ", "-") for text in plain if text.replace(" ", "-") == re.sub(r"[-\s]+", "-", text)}


@page_by_page
def test_links_lead_to_pages_and_headings_that_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
        if page.is_relative_to(DOCS):
            assert target.is_relative_to(DOCS), f"{link} leaves the site"


@page_by_page
def test_files_that_are_named_exist(page: Path) -> None:
    named = r"(?<![\w/.-])((?:examples|benchmarks|tests|worldflux|agents)/[\w/*.-]+\.(?:py|csv))"
    for path in re.findall(named, page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(path)), path


@page_by_page
def test_commands_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    commands = {path.stem.replace("_", "-") for path in (ROOT / "worldflux" / "cli" / "commands").glob("*.py")} | {
        "help"
    }
    shell = "\n".join(blocks(page, "bash") + re.findall(r"`([^`\n]+)`", prose(page)))
    for line in shell.splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert all(word in targets for word in words[1:] if "=" not in word), line
        if words[:1] == ["worldflux"] and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in commands, line


def test_notes_are_rendered_as_notes() -> None:
    noted = [page.name for page in PAGES if re.search(r"^!!! ", page.read_text(encoding="utf-8"), re.MULTILINE)]
    assert noted and "\n  - admonition\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = text[text.index("\nnav:\n") :]
    listed = re.findall(r"^ *- (?:[^#\n]+: )?(\S+\.md)$", navigation, re.M)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


# API pages and tables


def api_pages() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))


def test_what_the_api_pages_describe_exists() -> None:
    described = re.findall(r"^::: (\S+)$", api_pages(), re.M)
    assert len(described) == len(set(described)) > 40
    for name in described:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_the_api_pages_show_no_bases_that_they_do_not_describe() -> None:
    text = api_pages()
    for name, options in re.findall(r"^::: (\S+)\n((?: {4}.*\n)*)", text, re.M):
        module, _, attribute = name.rpartition(".")
        described = getattr(importlib.import_module(module), attribute, None)
        if not isinstance(described, type) or "show_bases: false" in options:
            continue
        for base in described.__bases__:
            if base.__module__.startswith("worldflux"):
                assert re.search(rf"^::: (worldflux\S*\.{base.__name__}|{base.__module__})$", text, re.M), (name, base)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_its_place_in_the_api_pages(module: str) -> None:
    text = api_pages()
    package = importlib.import_module(module)
    for name in package.__all__:
        if not name.startswith("_"):
            home = getattr(getattr(package, name), "__module__", "")  # described as a whole, maybe
            places = (f"::: {module}.{name}\n", f"::: worldflux.{name}\n", f"::: {home}\n")
            assert any(place in text for place in places), f"{module}.{name}"


def test_tables_of_sizes_show_each_preset_with_the_parameters_that_it_has() -> None:
    counted = {name: entry["params"] for name, entry in list_models(verbose=True).items()}
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+:\S+)` .*\| ([\d,]+) \|$", page, re.M))
    assert {name: int(number.replace(",", "")) for name, number in shown.items()} == counted
