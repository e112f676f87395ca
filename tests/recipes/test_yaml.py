"""YAML as a recipe may use it: plain data with lines, and nothing that surprises or executes."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kirsch.errors import RecipeError
from kirsch.recipes.yaml import MOST_BYTES, MOST_DEPTH, MOST_NODES, dump, read, scalar

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
SECTIONS = st.dictionaries(st.text(), PLAIN, max_size=4)
"""Any data that a recipe can hold."""

SEEN_AS_NUMBERS = st.from_regex(r"[-+.0-9eE_:x]{1,8}", fullmatch=True) | st.sampled_from(
    ["no", "on", "Yes", "null", "~", "true", "=", "<<", "...", "---", "- a", "# a", "a # b", "a: b", "2020-01-01"]
)
"""Texts that one version of YAML or another takes for something else."""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1000.0),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("1_000.5", 1000.5),
        ("7", 7),
        ("-0", 0),
        ("+3", 3),
        ("12:30", "12:30"),
        ("0x10", "0x10"),
        ("2020-01-01", "2020-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("=", "="),
        ("<<", "<<"),
        ("'1e-4'", "1e-4"),
        ('"a\\tb"', "a\tb"),
        ("!!str 7", "7"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("|-\n  two\n  lines", "two\nlines"),
    ],
)
def test_a_value_is_what_yaml_1_2_says(text, value):
    found = read(f"a: {text}\n").data["a"]
    assert found == value
    assert type(found) is type(value)
    assert scalar(text, "here") == value


def test_every_key_and_item_has_its_line():
    document = read("a: 1\nb:\n  c: [x,\n    y]\n\n  # d\n  d: {e: 1}\n")
    assert document.lines == {
        "a": 1,
        "b": 2,
        "b.c": 3,
        "b.c.0": 3,
        "b.c.1": 4,
        "b.d": 7,
        "b.d.e": 7,
    }


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n"])
def test_an_empty_text_has_no_keys(text):
    assert read(text).data == {}


@pytest.mark.parametrize("text", ["- a\n- b\n", "word\n", "5\n", "null\n", "---\n"])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(RecipeError, match=r"The recipe is no mapping of keys to values\. Start from `kirsch init`\."):
        read(text)


@pytest.mark.parametrize(
    ("text", "lines"),
    [("a: 1\nb: 2\n\na: 3\n", "1 and 4"), ("s:\n  a: 1\n  'a': 2\n", "2 and 3"), ("{a: 1, a: 1}", "1 and 1")],
)
def test_a_key_that_is_there_twice_is_refused_with_both_lines(text, lines):
    with pytest.raises(RecipeError, match=rf"The recipe has the key 'a' twice\. Lines {lines}\. Keep one of them\."):
        read(text)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir ['{folder}']",
        "!!python/object/apply:os.mkdir {{path: '{folder}'}}",
        "!!python/object/new:os.mkdir ['{folder}']",
        "!!python/name:os.mkdir ''",
        "!!python/tuple [1, 2]",
        "!!set {{a, b}}",
        "!!omap [a: 1]",
        "!!binary aGk=",
        "!!timestamp 2020-01-01",
        "!mine 5",
        "!mine:int 5",
        "!!seq 5",
        "!!str [a]",
    ],
)
def test_a_tag_is_refused_with_its_line_and_nothing_runs(tmp_path, value):
    text = value.format(folder=tmp_path / "made")
    for document in (f"x: 1\ny:\n  a: {text}\n", f"x: 1\ny:\n  - {text}\n"):
        with pytest.raises(RecipeError, match=r"The recipe uses the tag '.*'\. Line 3\. Only plain values are read\."):
            read(document)
    assert list(tmp_path.iterdir()) == []


def test_a_tag_at_a_key_is_refused_too():
    with pytest.raises(RecipeError, match=r"uses the tag '!mine'\. Line 2\."):
        read("x: 1\n!mine y: 1\n")


def test_a_key_that_is_no_word_is_refused_with_its_line():
    with pytest.raises(RecipeError, match=r"The recipe: a key must be a plain word\. Line 2\."):
        read("x: 1\n[a, b]: 1\n")


@pytest.mark.parametrize(
    "value", [".nan", ".inf", "-.Inf", "1e999", "-1e999", "9" * 5000, "!!int ten", "!!float ten", "!!bool maybe"]
)
def test_what_is_no_finite_number_is_refused_with_its_line(value):
    shown = re.escape(value.rpartition(" ")[2][:40])
    with pytest.raises(RecipeError, match=rf"The recipe: '{shown}…?' cannot be used\. Line 2: a number must be finite"):
        read(f"x: 1\na: {value}\n")


def test_an_alias_is_a_copy():
    data = read("a: &a {b: [1]}\nc: *a\n").data
    assert data["c"] == data["a"] == {"b": [1]}
    data["c"]["b"].append(2)
    assert data["a"] == {"b": [1]}


def test_an_alias_bomb_is_refused_before_it_goes_off():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20)
    )
    with pytest.raises(RecipeError, match=rf"The recipe is too large\. Line \d+: more than {MOST_NODES} values"):
        read(bomb)


def test_an_alias_of_itself_is_refused():
    with pytest.raises(RecipeError, match="The recipe is too large"):
        read("a: &a [*a]\n")


@pytest.mark.parametrize(
    "text",
    [
        "a: " + 5000 * "[" + 5000 * "]",
        "a: " + 5000 * "{a: " + 5000 * "}",
        "\n".join(n * " " + "a:" for n in range(1400)),
        "\n".join(n * " " + "-" for n in range(1400)),
    ],
    ids=["lists", "mappings", "lines", "dashes"],
)
def test_5000_levels_are_refused(text):
    with pytest.raises(RecipeError, match=r"The recipe is no YAML\. It is nested too deeply\."):
        read(text)


def test_levels_are_counted():
    def nested(levels):
        return "a: " + levels * "[" + levels * "]"

    assert read(nested(MOST_DEPTH)).data["a"] == eval(MOST_DEPTH * "[" + MOST_DEPTH * "]")
    with pytest.raises(RecipeError, match=f"or {MOST_DEPTH} levels"):
        read(nested(MOST_DEPTH + 2))


def test_values_are_counted():
    row = ", ".join(["x"] * (MOST_NODES - 2))  # the mapping and the list are values as well
    assert len(read(f"a: [{row}]").data["a"]) == MOST_NODES - 2
    with pytest.raises(RecipeError, match=f"more than {MOST_NODES} values"):
        read(f"a: [{row}, x]")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: [1\nc: 2\n", r"Line 3: expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", r"Line 2: found character '\\t'"),
        ("a: 1\nb: *c\n", r"Line 2: found undefined alias 'c'"),
        ("a: 1\n---\nb: 2\n", r"Line 2: but found another document"),
        ("a: 1\nb: \x1b[31m\n", r"Line 2: the character '\\x1b' is not allowed"),
        ("a: 1\nb: 2\nc: \x00\n", r"Line 3: the character '\\x00' is not allowed"),
        ("a: \udcff\n", r"Line 1: the character '\\udcff' is not allowed"),
    ],
)
def test_what_is_no_yaml_is_named_with_its_line(text, sentence):
    with pytest.raises(RecipeError, match=rf"^The recipe is no YAML\. {sentence}"):
        read(text)


def test_a_file_is_named_by_its_path(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: [")
    with pytest.raises(RecipeError, match=rf"^{re.escape(str(path))} is no YAML\. Line 1: "):
        read(path)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("a: ü\n".encode("utf-8-sig"))
    assert read(path).data == {"a": "ü"}


@pytest.mark.parametrize(("encoding", "line"), [("latin-1", 2), ("utf-16", 1)])
def test_a_file_in_another_encoding_is_refused_with_the_line(tmp_path, encoding, line):
    path = tmp_path / "r.yaml"
    path.write_bytes("a: 1\nb: Kürbis\n".encode(encoding))
    with pytest.raises(RecipeError, match=rf"r\.yaml is no UTF-8 text\. Line {line}\. Save it as UTF-8\."):
        read(path)


def test_a_file_may_have_one_megabyte(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: 1 #".ljust(MOST_BYTES, b"x"))
    assert read(path).data == {"a": 1}
    path.write_bytes(b"a: 1 #".ljust(MOST_BYTES + 1, b"x"))
    with pytest.raises(RecipeError, match=r"r\.yaml is too large for a recipe\. 1,000,000 bytes are allowed\."):
        read(path)


@pytest.mark.parametrize(("name", "why"), [("none.yaml", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, why):
    with pytest.raises(RecipeError, match=rf"The recipe .* cannot be read\. {why}\. Check the path\."):
        read(tmp_path / name)


def test_a_wrong_value_of_the_command_line_is_named_by_where_it_comes_from():
    with pytest.raises(RecipeError, match=r"^--set a=\[ is no YAML\."):
        scalar("[", "--set a=[")


@given(SECTIONS)
def test_data_that_is_dumped_reads_back_equal(data):
    assert read(dump(data)).data == data
    assert yaml.safe_load(dump(data)) == data, "another reader sees something else"


@given(st.dictionaries(SEEN_AS_NUMBERS, SEEN_AS_NUMBERS, min_size=1))
def test_a_text_that_looks_like_something_else_stays_a_text(data):
    assert read(dump(data)).data == data
    assert yaml.safe_load(dump(data)) == data


@given(PLAIN | SEEN_AS_NUMBERS)
def test_a_value_in_one_line_can_have_a_comment_behind_it(value):
    text = dump(value, one_line=True)
    assert "\n" not in text
    assert read(f"a: {text}  # why\nb: 1\n").data == {"a": value, "b": 1}


@given(st.dictionaries(st.text("abc", min_size=1), st.integers() | st.booleans() | st.none() | st.text("xyz ")))
def test_what_others_dump_is_read_as_they_meant_it(data):
    assert read(yaml.safe_dump(data)).data == data
