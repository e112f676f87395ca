"""Metrics of a run, as in metrics.json, and a parser of the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest

from kirsch.report import render

VOID = {"meta", "br", "hr", "img", "link", "input"}


@dataclass
class Element:
    """An HTML element with its attributes and children (elements and texts)."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self):
        """Text of the element and its descendants, with entities resolved."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def words(self):
        """Text of the element with each run of whitespace replaced by one space."""
        return " ".join(self.text.split())

    def all(self, *tags, **attributes):
        """Return all descendants with one of the tags and with the attributes, in order."""
        elements = []
        for child in self.children:
            if isinstance(child, Element):
                matches = all(
                    child.attributes.get(key.rstrip("_").replace("_", "-")) == value
                    for key, value in attributes.items()
                )
                elements += [child] if (not tags or child.tag in tags) and matches else []
                elements += child.all(*tags, **attributes)
        return elements

    def rows(self):
        """Return the texts of a table by rows; a cell that spans several columns is repeated."""
        return [
            [cell.words for cell in row.all("td", "th") for _ in range(int(cell.attributes.get("colspan") or 1))]
            for row in self.all("tr")
        ]


class TreeParser(HTMLParser):
    """Build the tree of elements; fail if tags are not properly nested."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.root = Element("page", {})
        self.path = [self.root]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> is repeated"
        element = Element(tag, dict(attrs))
        self.path[-1].children.append(element)
        if tag not in VOID:
            self.path.append(element)

    def handle_endtag(self, tag):
        assert self.path[-1].tag == tag, f"</{tag}> closes <{self.path[-1].tag}>"
        self.path.pop()

    def handle_data(self, data):
        self.path[-1].children.append(data)


def parse(html):
    parser = TreeParser()
    parser.feed(html)
    parser.close()
    assert [element.tag for element in parser.path] == ["page"]
    return parser.root


@pytest.fixture
def page():
    """Render metrics and return the tree of the page."""
    return lambda metrics: parse(render(metrics))


def share(value, low, high, n=400):
    return {"value": value, "low": low, "high": high, "n": n}


def latency(median, speedup):
    return {
        "median_us": median,
        "p10_us": median * 0.9,
        "p90_us": median * 1.1,
        "p95_us": median * 1.2,
        "rounds": 30,
        "calls": 50,
        "speedup": {"value": speedup, "low": speedup * 0.9, "high": speedup * 1.1, "of": "teacher"},
    }


def model(key, parameters, macs, size, accuracy, timed_latency=None, *, chosen=False):
    return {
        "key": key,
        "name": key,
        "parameters": parameters,
        "macs": macs,
        "bytes": size,
        "accuracy": accuracy,
        "latency": timed_latency,
        "chosen": chosen,
    }


def curve(step, loss, accuracy):
    count = len(loss)
    return {
        "step": step,
        "epochs": list(range(1, count + 1)),
        "loss": loss,
        "terms": {"label": [0.25 * value if value is not None else None for value in loss], "kd": [None] * count},
        "accuracy": accuracy,
        "learning_rate": [0.05 / (epoch + 1) for epoch in range(count)],
        "seconds": [0.5] * count,
    }


def group(name, size, removed, layers, reason="smallest weights of the group (L2)"):
    return {
        "name": name,
        "kind": "channel",
        "size": size,
        "removed": removed,
        "reason": reason if removed else "kept",
        "layers": layers,
        "parameters": 97 * len(removed),
        "macs": 1013 * len(removed),
    }


def layer(name, group, before, after):
    return {
        "name": name,
        "group": group,
        "before": before,
        "after": after,
        "parameters_before": 17 * before,
        "parameters_after": 17 * after,
    }


@pytest.fixture
def metrics():
    """Metrics of a run with all sections; all numbers differ, so that a mix-up is detected."""
    return {
        "kirsch_metrics": 1,
        "name": "digits",
        "run": "2026-03-14-digits-7f3a",
        "kirsch": "0.1.0",
        "created": "2026-03-14T15:09:26Z",
        "seconds": 65.4,
        "goal": {
            "met": False,
            "text": "MACs ≤ 50 %, accuracy drop ≤ 1.0 point",
            "items": [
                {
                    "name": "macs",
                    "text": "MACs 49.6 % of it",
                    "limit": 0.5,
                    "value": 0.496,
                    "met": True,
                    "significance": "",
                },
                {
                    "name": "max_drop",
                    "text": "accuracy drop 1.5 points",
                    "limit": 0.01,
                    "value": 0.015,
                    "met": False,
                    "significance": "7 samples lost, 1 gained",
                },
            ],
        },
        "models": [
            model("teacher", 885_450, 10_737_536, 3_541_463, share(0.985, 0.969, 0.993), latency(223.4, 1.0)),
            model("student", 222_570, 2_694_080, 892_214, share(0.9726, 0.952, 0.984), latency(67.8, 3.29)),
            model("pruned", 119_274, 1_336_960, 485_312, share(0.543, 0.494, 0.590)),
            model("exported", 119_273, 1_336_961, 479_666, share(0.97, 0.948, 0.982), latency(41.2, 5.42), chosen=True),
        ],
        "steps": [
            {
                "number": 1,
                "key": "train",
                "did": "teacher trained",
                "cells": ["98.5 % ± 1.2", "10.7 M MACs"],
                "seconds": 18.2,
            },
            {"number": 2, "key": "prune", "did": "−50.4 % MACs", "cells": ["a", "b", "c", "2 groups"], "seconds": 0.44},
            {"number": 3, "key": "measure", "did": "onnxruntime", "cells": [], "seconds": 125},
        ],
        "curves": [curve("train", [0.583, 0.041, 0.0112], [0.928, 0.994, 0.989])],
        "removals": [
            {
                "step": "prune",
                "groups": [
                    group("stem", 32, [], ["stem", "stem_bn"]),
                    group("block.conv1", 64, [0, 1, 2, 7, 63], ["block.conv1", "block.bn1"]),
                ],
                "layers": [layer("block.conv1", "block.conv1", 64, 59), layer("stem", "stem", 32, 32)],
                "blockers": [
                    {"reason": "reshape", "where": "head", "source": "net.py:41", "operation": "view", "share": 0.273},
                ],
                "notes": ["MACs are far below the goal of <50 %>."],
                "verification": {
                    "text": "equal to the masked original",
                    "error": 2e-16,
                    "reason": "rounding",
                    "power": 0.707,
                },
            }
        ],
        "quality": {
            "classes": ["cat", "dog", "eel"],
            "before": {"key": "teacher", "confusion": [[139, 0, 1], [2, 128, 0], [0, 3, 127]]},
            "after": {"key": "exported", "confusion": [[136, 4, 0], [0, 129, 1], [0, 7, 123]]},
            "lost": [
                {"name": "eel", "before": 127 / 130, "after": 123 / 130, "n": 130},
                {"name": "cat", "before": 139 / 140, "after": 136 / 140, "n": 140},
                {"name": "dog", "before": 128 / 130, "after": 129 / 130, "n": 130},
            ],
            "calibration": {
                "before": {
                    "ece": 0.0246,
                    "bins": [
                        {"confidence": 0.553, "accuracy": 0.6, "n": 5},
                        {"confidence": 0.974, "accuracy": 0.989, "n": 395},
                    ],
                },
                "after": {"ece": 0.0181, "bins": [{"confidence": 0.941, "accuracy": 0.968, "n": 400}]},
            },
            "paired": {"text": "7 samples lost, 1 gained of 400; not significant (p = 0.07)", "p": 0.07},
        },
        "export": {
            "file": "artifacts/model.onnx",
            "bytes": 479_666,
            "sha256": "74620f1d" * 8,
            "format": "ONNX opset 20",
            "same_labels": 399,
            "n": 400,
            "max_error": 3.8e-6,
            "usage": 'import onnxruntime\nsession = onnxruntime.InferenceSession("model.onnx")\n',
        },
        "measured": {
            "runtime": "onnxruntime 1.32.0",
            "threads": 2,
            "batch": 1,
            "rounds": 31,
            "machine": "Cherry 9000",
            "aa": {"value": 1.006, "low": 0.974, "high": 1.031},
            "load_before": 0.34,
            "load_after": 0.78,
            "notes": [],
            "seed": 11,
            "data": {"name": "digits", "sha256": "6e072b97" * 8, "train": 1078, "validation": 360, "test": 400},
        },
        "warnings": [],
        "not_measured": ["Energy.", "Other seeds."],
        "provenance": {
            "recipe": "version: 2\nname: digits\n",
            "plans": [{"kirsch_plan": 1, "goal": {"macs": 0.5}}],
            "environment": {"cpu": "Cherry 9000", "cores": 2},
            "fingerprint": "005859b571d823de4cc0ab91",
        },
    }
