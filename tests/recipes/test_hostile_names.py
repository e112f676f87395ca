"""Names from recipes and data are escaped in the terminal, the report and the files."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

import kirsch
from kirsch.cli import main
from kirsch.recipes.yaml import dump
from tiny import RECIPE, write_job

NAME = "<script>alert(1)</script> [red]a[/0]\n\x1b[31m {{ 7*7 }} \u202e 'b' \"c\" & d"
DATA = "</style><img src=x onerror=alert(2)> [bold]\r\n"
CLASSES = ["<b onclick='x'>one</b>", "[/red]\x1b]0;title\x07", "a\nb & \u2028"]


class Reader(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Folder of a recipe whose name, data and classes are hostile."""
    base = tmp_path_factory.mktemp("hostile")
    write_job(base)
    recipe = (
        RECIPE.replace("name: stripes\n", "")
        .replace("- export\n- measure: {rounds: 10}\n", "")
        .replace('data: {source: "nets.py:stripes", batch_size: 16}\n', "")
    )
    data = {"source": "nets.py:stripes", "options": {"classes": CLASSES, "name": DATA}, "batch_size": 16}
    (base / "recipe.yaml").write_text(recipe + dump({"name": NAME, "data": data}))
    return base


@pytest.fixture
def printed(done, capsys, monkeypatch):
    """Run folder, and the printed output of the run."""
    monkeypatch.chdir(done)
    monkeypatch.setenv("COLUMNS", "400")
    code = main(["compress", "recipe.yaml", "--run", "run"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return done / "run", out


def test_names_are_escaped_in_terminal_report_and_files(printed):
    folder, out = printed
    shown = NAME.replace("\n", "\\n").replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert out.splitlines()[0] == f"kirsch {kirsch.__version__} · {shown} · run run"
    assert all(character.isprintable() or character == "\n" for character in out)

    events = [json.loads(line) for line in (folder / "events.jsonl").read_bytes().split(b"\n") if line]
    assert events[0]["name"] == NAME

    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["name"] == NAME
    assert metrics["quality"]["classes"] == CLASSES
    assert metrics["measured"]["data"]["name"] == DATA

    page = (folder / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert reader.tags.isdisjoint({"script", "img", "b", "iframe", "link", "object", "embed", "form", "base"})
    assert [name for name, _ in reader.attributes if name.startswith("on") or name in ("src", "href")] == []
    text = "".join(reader.text)
    for name in (NAME, *CLASSES):
        assert re.sub(r"\s+", " ", name) in re.sub(r"\s+", " ", text)


def test_run_with_hostile_names_is_resumed(printed, capsys):
    folder, _ = printed
    assert main(["resume", str(folder), "--quiet"]) == 0
    assert "\x1b" not in capsys.readouterr().out
