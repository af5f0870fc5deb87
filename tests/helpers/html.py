"""What tests read from a HTML page."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"meta", "link", "img", "input", "br"}


class ParsedPage(HTMLParser):
    """The elements of a page, and the texts in them.

    Attributes:
        elements: Names and attributes of all elements, in their order.
        texts: For each kind of element, the text of each one.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"elements that are not closed: {[name for name, _ in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append((tag, []))

    def handle_endtag(self, tag: str) -> None:
        name, parts = self._open.pop()
        assert name == tag, f"</{tag}> closes <{name}>"
        self.texts.setdefault(tag, []).append(" ".join("".join(parts).split()))

    def handle_data(self, data: str) -> None:
        for _, parts in self._open:
            parts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def images(self) -> list[tuple[str, bytes]]:
        """Media type and content of each picture, all of which are embedded."""
        found = []
        for image in self.all("img"):
            embedded = re.fullmatch(r"data:([\w/+.-]+);base64,(.+)", image["src"])
            assert embedded is not None, image["src"][:80]
            found.append((embedded[1], base64.b64decode(embedded[2], validate=True)))
        return found


def assert_well_made(page: ParsedPage) -> None:
    """Asserts that a page needs nothing else, and can be read by everyone."""
    names = [name for name, _ in page.elements]
    assert not {"script", "iframe", "object", "embed", "video", "audio", "source"} & set(names)
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")], f"a script in <{name}>"
        for key in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(key, "#")
            assert value.startswith(("data:", "#")), f'<{name} {key}="{value[:60]}">'
    (policy,) = (meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")
    (style,) = page.texts["style"]
    assert "url(" not in style and "@import" not in style
    assert page.all("html")[0]["lang"] == "en" and page.texts["title"] == page.texts["h1"]
    levels = [int(name[1]) for name in names if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert names.count("caption") == names.count("table")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link["href"].removeprefix("#") for link in page.all("a")}
    assert targets <= set(ids) and len(targets) == names.count("section")
