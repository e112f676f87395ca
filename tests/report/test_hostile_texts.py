"""Texts of a run in the report: absolute paths are shortened, and hostile names are escaped."""

from __future__ import annotations

import json

import pytest

from kirsch.report.html import without_folders
from report.structure import assert_self_contained, assert_well_formed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model: /home/alice/work/nets.py:teacher", "model: nets.py:teacher"),
        ("model: nets.py:teacher", "model: nets.py:teacher"),
        ("source: ../data/nets.py:stripes", "source: ../data/nets.py:stripes"),
        ("options: {path: '/Users/alice'}", "options: {path: '~'}"),
        ('weights: "~/secret/w.safetensors"', 'weights: "w.safetensors"'),
        (r"weights: C:\Users\alice\w.safetensors", "weights: w.safetensors"),
        ("folder: /srv/alice/data", "folder: data"),
        ("model: /home/alice/nets.py:teacher", "model: nets.py:teacher"),
        ("model: timm:resnet18", "model: timm:resnet18"),
    ],
)
def test_the_recipe_is_shown_without_the_folders_of_absolute_paths(page, metrics, text, shown):
    assert without_folders(text) == shown
    metrics["provenance"]["recipe"] = f"name: digits\n{text}\n"
    assert f"name: digits\n{shown}\n" in [element.text for element in page(metrics).all("pre")]


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "</title></pre></svg></table><h1>mine</h1>",
    "<!-- <![CDATA[ ",
    "[red]", "[/0]", "{{ 7*7 }}{% raw %}", "${7*7} &lt; &amp;", "javascript:alert(1)", "two\nlines\tand a tab",
    "\x1b[31mred\x1b[0m", "\N{RIGHT-TO-LEFT OVERRIDE}right to left", "…", "x" * 3000,
]  # fmt: skip


NAMES = {
    "digits", "2026-03-14-digits-7f3a",
    "MACs ≤ 50 %, accuracy drop ≤ 1.0 point", "MACs 49.6 % of it", "7 samples lost, 1 gained",
    "teacher", "student", "pruned", "exported",
    "stem", "stem_bn", "block.conv1", "block.bn1", "channel", "smallest weights of the group (L2)",
    "reshape", "head", "net.py:41", "view",
    "cat", "dog", "eel",
    "artifacts/model.onnx", "ONNX opset 20", "Cherry 9000", "onnxruntime 1.32.0",
    "Energy.", "Other seeds.", "rounding", "equal to the masked original",
    "teacher trained", "−50.4 % MACs", "98.5 % ± 1.2", "2 groups",
}  # fmt: skip
"""Texts of the metrics that come from a model, a recipe or a machine."""


def prefixed(value, prefix):
    """Return the metrics with the prefix before each text in `NAMES`."""
    if isinstance(value, dict):
        return {key: prefixed(part, prefix) for key, part in value.items()}
    if isinstance(value, list):
        return [prefixed(part, prefix) for part in value]
    return prefix + value if isinstance(value, str) and value in NAMES else value


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_is_escaped_in_every_place(page, metrics, name):
    plain = page(metrics)
    hostile = prefixed(metrics, name)
    hostile["export"]["usage"] = hostile["provenance"]["recipe"] = f"a\n{name}\n"
    hostile["provenance"]["environment"] = {name: [name]}
    hostile["curves"][0]["terms"] = {name: [1.0, 2.0, 3.0], "kd": [4.0, 5.0, 6.0]}
    tree = page(hostile)
    assert_self_contained(tree)
    assert_well_formed(tree)
    assert [element.tag for element in tree.all()] == [element.tag for element in plain.all()]
    assert [text for text in NAMES if name + text not in tree.text] == []
    usage, recipe, _, environment = (element.text for element in tree.all("pre"))
    assert usage == recipe == f"a\n{name}\n"
    assert json.loads(environment) == {name: [name]}
