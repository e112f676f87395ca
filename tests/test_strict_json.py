"""The strict JSON reader refuses texts that Python's reader accepts."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch import strict_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=9,
)


@given(JSON)
def test_the_result_for_ordinary_json_equals_that_of_the_json_module(content):
    for text in (json.dumps(content), json.dumps(content, ensure_ascii=False)):
        assert strict_json.parse(text) == strict_json.parse(text.encode()) == content


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' is given twice"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e999]", "1e999 is too large"),
        ("[" * 101 + "]" * 101, "more than 100 levels"),
        ('{"a":' * 200_000, "more than 100 levels|is not JSON"),
        ("[" * 200_000, "more than 100 levels|is not JSON"),
        ('["\\ud800"]', "half of a surrogate pair"),
        ('{"\\udfff": 1}', "half of a surrogate pair"),
        (b"[\xff]", "not UTF-8"),
        ("[1] 2", "is not JSON: Extra data"),
        ("", "is not JSON"),
        ("[" + "9" * 5000 + "]", "digits"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_text_that_is_not_strict_json_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        strict_json.parse(text)


def test_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "a.json"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text('{"ü": [1]}', encoding=encoding)
        assert strict_json.read(path) == {"ü": [1]}


def test_a_too_large_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(strict_json, "MAX_BYTES", 4)
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        strict_json.read(path)


def test_the_largest_depth_of_nesting_is_accepted():
    assert strict_json.parse("[" * 100 + "]" * 100)


def test_nan_is_accepted_on_request():
    assert math.isnan(strict_json.parse("[NaN]", finite=False)[0])
