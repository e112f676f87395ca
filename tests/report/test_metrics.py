"""Reading metrics.json: every field that the report shows is required."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest

from kirsch.errors import LoadError
from kirsch.report import read_metrics, render


def paths_in(content, path=()):
    """Yield the path of every value in nested dicts and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths_in(value, (*path, key))


def copy_with_parent(content, path):
    """Return a copy, and the dict or list in it that contains the last key of the path."""
    changed = copy.deepcopy(content)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    return changed, parent


def without(content, path):
    changed, parent = copy_with_parent(content, path)
    del parent[path[-1]]
    return changed


def replaced(content, path, value):
    changed, parent = copy_with_parent(content, path)
    parent[path[-1]] = value
    return changed


@pytest.fixture
def read(tmp_path):
    def from_file(content):
        (tmp_path / "metrics.json").write_text(json.dumps(content))
        return read_metrics(tmp_path / "metrics.json")

    return from_file


def test_metrics_are_read_as_written_and_unknown_fields_are_kept(read, metrics):
    assert read(metrics) == metrics
    assert read(metrics | {"later": 1}) == metrics | {"later": 1}


def test_training_data_without_a_known_size_is_accepted(read, metrics):
    metrics["measured"]["data"]["train"] = None  # a loader without a length
    assert "a loader for training" in " ".join(render(read(metrics)).split())


def test_a_missing_field_is_named_or_not_needed_by_the_report(read, metrics):
    accepted = []
    for path in list(paths_in(metrics)):
        try:
            accepted.append(read(without(metrics, path)))
        except LoadError as error:
            name = path[-1]
            assert isinstance(name, int) or name in error.why or "null" in error.why  # noqa: PT017 - some paths are accepted
    assert 20 < len(accepted) < 120
    for content in accepted[::5]:
        assert render(content).startswith("<!doctype html>")


@pytest.mark.parametrize("value", [None, "text", -1, [], {}, True, 1e300], ids=str)
def test_a_file_with_a_wrong_value_is_either_rejected_or_rendered(read, metrics, value):
    accepted = []
    for path in list(paths_in(metrics)):
        with contextlib.suppress(LoadError):
            accepted.append(read(replaced(metrics, path, value)))
    for content in accepted[::9]:
        assert render(content).startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kirsch_metrics",), True, "kirsch_metrics: 1 is expected, and true was found"),
        (("kirsch_metrics",), 2, "kirsch_metrics: 1 is expected"),
        (("models",), [], "models: at least 1 items"),
        (("models", 3, "chosen"), False, "models: 0 models are chosen; exactly one must be"),
        (("quality", "before", "confusion"), [[1]], r"quality\.before\.confusion"),
        (("curves", 0, "loss"), [1.0], r"curves\[0\]: each list must have 3 values"),
        (("removals", 0, "layers", 0, "group"), "x", r"removals\[0\]\.layers\[0\]\.group: there is no group 'x'"),
        (("measured", "aa"), None, r"measured\.aa is null although"),
        (("models", 0, "latency", "median_us"), 0, r"models\[0\]\.latency\.median_us"),
    ],
)
def test_an_invalid_field_is_named(read, metrics, path, value, message):
    with pytest.raises(LoadError, match=message):
        read(replaced(metrics, path, value))


def test_deep_nesting_and_repeated_keys_are_rejected(tmp_path, metrics):
    path = tmp_path / "metrics.json"
    for text in ("[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000):
        path.write_text(text)
        with pytest.raises(LoadError, match=r"metrics\.json is damaged"):
            read_metrics(path)
    path.write_text(json.dumps(metrics).replace('"name"', '"name": "x", "name"', 1))
    with pytest.raises(LoadError, match="the key 'name' is given twice"):
        read_metrics(path)
