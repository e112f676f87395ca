"""YAML of recipes: plain data with line numbers; other YAML is refused."""

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

AMBIGUOUS = st.from_regex(r"[-+.0-9eE_:x]{1,8}", fullmatch=True) | st.sampled_from(
    [
        "no",
        "on",
        "Yes",
        "null",
        "~",
        "true",
        "=",
        "<<",
        "...",
        "---",
        "- a",
        "# a",
        "a # b",
        "a: b",
        "2020-01-01",
        ":a",
        "?a",
        "a?",
    ]
)
"""Strings that some version of YAML resolves to another type."""


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
        ("0x10", 16),
        ("0o17", 15),
        ("1_000", 1000),
        ("TRUE", True),
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
def test_scalars_are_resolved_as_in_yaml_1_2(text, value):
    found = read(f"a: {text}\n").data["a"]
    assert found == value
    assert type(found) is type(value)
    assert scalar(text, "here") == value


def test_lines_of_keys_and_items_are_recorded():
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
def test_empty_text_is_an_empty_mapping(text):
    assert read(text).data == {}


@pytest.mark.parametrize("text", ["- a\n- b\n", "word\n", "5\n", "null\n", "---\n"])
def test_other_values_than_a_mapping_are_refused(text):
    with pytest.raises(RecipeError, match=r"The recipe is not a mapping of keys to values\. Write `key: value` lines"):
        read(text)


@pytest.mark.parametrize(
    ("text", "lines"),
    [("a: 1\nb: 2\n\na: 3\n", "1 and 4"), ("s:\n  a: 1\n  'a': 2\n", "2 and 3"), ("{a: 1, a: 1}", "1 and 1")],
)
def test_duplicate_key_is_refused_with_both_lines(text, lines):
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
        "!custom 5",
        "!custom:int 5",
        "!!seq 5",
        "!!str [a]",
    ],
)
def test_tag_is_refused_with_its_line_and_no_code_runs(tmp_path, value):
    text = value.format(folder=tmp_path / "created")
    for document in (f"x: 1\ny:\n  a: {text}\n", f"x: 1\ny:\n  - {text}\n"):
        with pytest.raises(RecipeError, match=r"The recipe uses the tag '.*'\. Line 3\. Write a plain value"):
            read(document)
    assert list(tmp_path.iterdir()) == []


def test_tag_of_a_key_is_refused():
    with pytest.raises(RecipeError, match=r"uses the tag '!custom'\. Line 2\."):
        read("x: 1\n!custom y: 1\n")


def test_key_that_is_not_a_scalar_is_refused_with_its_line():
    with pytest.raises(RecipeError, match=r"The recipe: a key must be a plain word\. Line 2\."):
        read("x: 1\n[a, b]: 1\n")


@pytest.mark.parametrize(
    "value",
    [
        ".nan",
        ".inf",
        "-.Inf",
        "1e999",
        "-1e999",
        "9" * 5000,
        f"0x{5000 * 'f'}",
        "!!int ten",
        "!!float ten",
        "!!bool maybe",
    ],
)
def test_value_that_is_not_a_finite_number_of_ordinary_length_is_refused_with_its_line(value):
    shown = re.escape(value.rpartition(" ")[2][:40])
    with pytest.raises(RecipeError, match=rf"The recipe: '{shown}…?' cannot be used\. Line 2: expected a finite"):
        read(f"x: 1\na: {value}\n")


def test_alias_is_a_copy():
    data = read("a: &a {b: [1]}\nc: *a\n").data
    assert data["c"] == data["a"] == {"b": [1]}
    data["c"]["b"].append(2)
    assert data["a"] == {"b": [1]}


def test_a_redefined_anchor_applies_to_later_aliases():
    assert read("a: &x 1\nb: &x 2\nc: *x\n").data["c"] == 2


def test_version_directive_does_not_change_types():
    assert read("%YAML 1.1\n---\na: no\nb: 1:30\n").data == {"a": "no", "b": "1:30"}
    with pytest.raises(RecipeError, match=r"not valid YAML\. .*1, 9"):
        read("%YAML 1.9\n---\na: no\n")


def test_alias_bomb_is_refused_before_expansion():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20)
    )
    with pytest.raises(RecipeError, match=rf"The recipe is too large\. Line \d+: more than {MOST_NODES} values"):
        read(bomb)


def test_recursive_alias_is_refused():
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
def test_deep_nesting_is_refused(text):
    with pytest.raises(RecipeError, match=rf"The recipe is too large\. Line \d+: .* or more than {MOST_DEPTH} levels"):
        read(text)


def test_number_of_levels_is_limited():
    def nested(levels):
        return "a: " + levels * "[" + levels * "]"

    assert read(nested(MOST_DEPTH)).data["a"] == eval(MOST_DEPTH * "[" + MOST_DEPTH * "]")
    with pytest.raises(RecipeError, match=f"or more than {MOST_DEPTH} levels"):
        read(nested(MOST_DEPTH + 2))


def test_number_of_values_is_limited():
    row = ", ".join(["x"] * (MOST_NODES - 2))  # the mapping and the list count, too
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
def test_invalid_yaml_is_refused_with_its_line(text, sentence):
    with pytest.raises(RecipeError, match=rf"^The recipe is not valid YAML\. {sentence}"):
        read(text)


def test_file_is_named_by_its_path(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: [")
    with pytest.raises(RecipeError, match=rf"^{re.escape(str(path))} is not valid YAML\. Line 1: "):
        read(path)


def test_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("a: ü\n".encode("utf-8-sig"))
    assert read(path).data == {"a": "ü"}


@pytest.mark.parametrize(("encoding", "line"), [("latin-1", 2), ("utf-16", 1)])
def test_other_encoding_is_refused_with_the_line(tmp_path, encoding, line):
    path = tmp_path / "r.yaml"
    path.write_bytes("a: 1\nb: Kürbis\n".encode(encoding))
    with pytest.raises(RecipeError, match=rf"r\.yaml is not UTF-8 text\. Line {line}\. Save it as UTF-8\."):
        read(path)


def test_file_size_is_limited_to_one_megabyte(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: 1 #".ljust(MOST_BYTES, b"x"))
    assert read(path).data == {"a": 1}
    path.write_bytes(b"a: 1 #".ljust(MOST_BYTES + 1, b"x"))
    with pytest.raises(RecipeError, match=r"r\.yaml is too large for a recipe\. At most 1,000,000 bytes are allowed\."):
        read(path)


@pytest.mark.parametrize(("name", "why"), [("none.yaml", "No such file or directory"), (".", "Is a directory")])
def test_unreadable_file_is_named(tmp_path, name, why):
    with pytest.raises(RecipeError, match=rf"The recipe .* cannot be read\. {why}\. Check the path\."):
        read(tmp_path / name)


def test_invalid_scalar_is_named_by_its_origin():
    with pytest.raises(RecipeError, match=r"^--set a=\[ is not valid YAML\."):
        scalar("[", "--set a=[")


@given(SECTIONS)
def test_dumped_data_reads_back_equal(data):
    assert read(dump(data)).data == data
    assert yaml.safe_load(dump(data)) == data


@given(st.dictionaries(AMBIGUOUS, AMBIGUOUS, min_size=1))
def test_string_that_looks_like_another_type_stays_a_string(data):
    assert read(dump(data)).data == data
    assert yaml.safe_load(dump(data)) == data


@given(PLAIN | AMBIGUOUS | st.lists(AMBIGUOUS) | st.dictionaries(AMBIGUOUS, AMBIGUOUS))
def test_value_on_one_line_can_be_followed_by_a_comment(value):
    text = dump(value, one_line=True)
    assert "\n" not in text
    assert read(f"a: {text}  # why\nb: 1\n").data == {"a": value, "b": 1}


@given(st.dictionaries(st.text("abc", min_size=1), st.integers() | st.booleans() | st.none() | st.text("xyz ")))
def test_output_of_yaml_safe_dump_is_read_correctly(data):
    assert read(yaml.safe_dump(data)).data == data
