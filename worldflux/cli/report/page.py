"""The parts of a page, and their rendering as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources


@dataclass(frozen=True)
class Picture:
    """A picture with its caption."""

    data: bytes
    """Content of the image file."""
    kind: str
    """Media type, such as "image/png"."""
    alt: str
    """What the picture shows, for people who cannot see it."""
    title: str = ""
    """Title above the picture."""
    caption: str = ""
    """Text below the picture."""
    wide: bool = False
    """Whether the picture takes the whole width."""
    scrolls: bool = False
    """Whether the picture keeps its size on a small screen, and scrolls sideways."""
    still: bytes | None = None
    """For an animation, a PNG that is shown instead of it in print and while it is stopped."""
    bad: bool = False
    """Whether the picture shows a problem."""

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return _uri(self.kind, self.data)

    @property
    def still_source(self) -> str:
        """The still picture as a data URI."""
        assert self.still is not None
        return _uri("image/png", self.still)


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    title: str
    """Caption of the table."""
    head: Sequence[str]
    """Names of the columns."""
    rows: Sequence[Sequence[str]]
    """Texts of the cells."""
    marked: frozenset[int] = frozenset()
    """Numbers of the rows that are emphasised."""


@dataclass
class Section:
    """A section of the page."""

    title: str
    """Heading."""
    texts: list[str] = field(default_factory=list)
    """Paragraphs."""
    missing: list[str] = field(default_factory=list)
    """What could not be shown, and why."""
    pictures: list[Picture] = field(default_factory=list)
    """Pictures."""
    tables: list[Table] = field(default_factory=list)
    """Tables."""
    commands: list[tuple[str, str]] = field(default_factory=list)
    """Commands to copy, each with its purpose."""

    @property
    def anchor(self) -> str:
        """Identifier of the section within the page."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    """What was trained, in what."""
    subtitle: str
    """State and time of the run."""
    facts: Sequence[tuple[str, str, str]]
    """Numbers at the top of the page: name, value and a remark."""
    sections: Sequence[Section]
    """The sections in their order."""
    footer: str
    """Text at the end."""

    def html(self) -> str:
        """The page as one HTML file without external files and scripts. All texts are escaped."""
        from jinja2 import Environment, StrictUndefined

        folder = resources.files("worldflux.cli.report")
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
        return template.render(page=self, style=folder.joinpath("style.css").read_text(encoding="utf-8"))


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
