"""Checks of the structure of the report as a page."""

from __future__ import annotations

import json
import re

from kirsch.report.html import FOLDER

STYLE = (FOLDER / "style.css").read_text(encoding="utf-8")


def assert_self_contained(tree):
    """Assert that no tag, attribute or style loads a resource or runs a script."""
    active = {"script", "iframe", "object", "embed", "link", "base", "form", "img", "image", "use", "a", "audio"}
    assert not active & {element.tag for element in tree.all()}
    for element in tree.all():
        for name in element.attributes:
            assert not name.startswith("on"), (element.tag, name)
            assert name not in {"src", "href", "xlink:href", "action", "data", "srcset", "poster", "style"}, name
    (style,) = tree.all("style")
    assert style.text.strip() == STYLE.strip()
    (policy,) = tree.all("meta", http_equiv="Content-Security-Policy")
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def assert_well_formed(tree):
    for element in tree.all("table"):
        widths = {len(row) for row in element.rows()}
        assert len(widths) == 1, (element.rows()[0], widths)
        assert [part.tag for part in element.all("thead", "tbody")] == ["thead", "tbody"]
    for drawing in tree.all("svg"):
        first, second = drawing.children[:2]
        assert (first.tag, second.tag) == ("title", "desc")
        assert first.text
        assert second.text
        assert drawing.attributes["role"] == "img"
        assert drawing.attributes["aria-label"] == first.text
        assert not re.search(
            r"\b(nan|inf|none)\b", json.dumps([element.attributes for element in drawing.all()]).lower()
        )
    assert [len(tree.all(tag)) for tag in ("html", "head", "body", "h1")] == [1, 1, 1, 1]
