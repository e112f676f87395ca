"""metrics.json is read with every part that the report shows, or refused with the part named."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest

from kirsch.errors import LoadError
from kirsch.report import read_metrics, render


def places(content, way=()):
    """The way to every part."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*way, key)
        yield from places(value, (*way, key))


def without(content, way):
    changed = copy.deepcopy(content)
    place = changed
    for key in way[:-1]:
        place = place[key]
    del place[way[-1]]
    return changed


def replaced(content, way, value):
    changed = copy.deepcopy(content)
    place = changed
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    return changed


@pytest.fixture
def read(tmp_path):
    def from_file(content):
        (tmp_path / "metrics.json").write_text(json.dumps(content))
        return read_metrics(tmp_path / "metrics.json")

    return from_file


def test_metrics_are_read_as_they_were_written(read, metrics):
    assert read(metrics) == metrics
    assert read(metrics | {"later": 1}) == metrics | {"later": 1}


def test_each_part_that_is_missing_is_named_or_is_not_shown(read, metrics):
    kept = []
    for way in list(places(metrics)):
        changed = without(metrics, way)
        try:
            kept.append(read(changed))
        except LoadError as error:
            name = way[-1]
            assert isinstance(name, int) or name in error.why or "null" in error.why  # noqa: PT017 - in any of many
    assert 20 < len(kept) < 120
    for found in kept[::5]:
        assert render(found).startswith("<!doctype html>")


@pytest.mark.parametrize("value", [None, "text", -1, [], {}, True, 1e300], ids=str)
def test_whatever_stands_in_a_part_the_report_is_drawn_or_the_file_is_refused(read, metrics, value):
    kept = []
    for way in list(places(metrics)):
        with contextlib.suppress(LoadError):
            kept.append(read(replaced(metrics, way, value)))
    for found in kept[::9]:
        assert render(found).startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("way", "value", "sentence"),
    [
        (("kirsch_metrics",), True, "kirsch_metrics: 1 is expected, and true was found"),
        (("kirsch_metrics",), 2, "kirsch_metrics: 1 is expected"),
        (("models",), [], "models: at least 1 items"),
        (("models", 3, "chosen"), False, "models: one model is chosen, and 0 say so"),
        (("quality", "before", "confusion"), [[1]], r"quality\.before\.confusion"),
        (("curves", 0, "loss"), [1.0], r"curves\[0\]: each list has one value"),
        (("removed", "layers", 0, "group"), "x", "there is no group 'x'"),
        (("measured", "aa"), None, r"measured\.aa is null"),
        (("models", 0, "latency", "median_us"), 0, r"models\[0\]\.latency\.median_us"),
    ],
)
def test_parts_that_cannot_be_are_named(read, metrics, way, value, sentence):
    with pytest.raises(LoadError, match=sentence):
        read(replaced(metrics, way, value))


def test_nesting_and_keys_given_twice_are_refused(tmp_path, metrics):
    path = tmp_path / "metrics.json"
    for text in ("[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000):
        path.write_text(text)
        with pytest.raises(LoadError, match=r"metrics\.json is damaged"):
            read_metrics(path)
    path.write_text(json.dumps(metrics).replace('"name"', '"name": "x", "name"', 1))
    with pytest.raises(LoadError, match="the key 'name' is given twice"):
        read_metrics(path)
