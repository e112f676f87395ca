"""YAML of recipes: a safe subset of YAML 1.2 with plain data only, read together with line numbers."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

from kirsch.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

MOST_BYTES, MOST_NODES, MOST_DEPTH = 1_000_000, 20_000, 40
SHOWN = 40
"""Longest part of a value that an error message shows, in characters."""

TAG = "tag:yaml.org,2002:"
SCALARS = {f"{TAG}{name}" for name in ("str", "null", "bool", "int", "float")}


class _Resolver(VersionedResolver):
    """Types of plain scalars in YAML 1.2. Dates, "<<" and "=" remain strings; ruamel.yaml has other types for them."""

    processing_version = (1, 2)  # a %YAML directive does not change what a recipe means

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        return self.DEFAULT_SCALAR_TAG if kind is ScalarNode and str(tag) not in SCALARS else tag


class _Representer(SafeRepresenter):
    """Representer whose output a YAML 1.1 reader reads as the same data: "no" is quoted, 1e-06 is written 1.0e-06."""

    yaml_1_1 = VersionedResolver((1, 1))

    def represent_str(self, data: str) -> Any:
        # Double quotes escape line breaks; in other styles the value takes several lines, and no comment can follow it.
        # ruamel.yaml leaves ":a" and "?a" plain within brackets, and then cannot read them; PyYAML cannot read "a?".
        is_text = str(self.yaml_1_1.resolve(ScalarNode, data, (True, False))) == f"{TAG}str"
        plain = is_text and data.isprintable() and not data.startswith(":") and "?" not in data
        return self.represent_scalar(f"{TAG}str", data, style=None if plain else '"')

    def represent_float(self, data: float) -> Any:
        text = repr(data)
        return self.represent_scalar(f"{TAG}float", text if "." in text else text.replace("e", ".0e"))  # as in YAML 1.1


_Representer.add_representer(str, _Representer.represent_str)
_Representer.add_representer(float, _Representer.represent_float)


@dataclass(frozen=True)
class Document:
    """Content of a YAML file as plain data.

    Args:
        data: dictionaries, lists, strings, numbers, booleans and None.
        lines: dotted key → line number, starting at 1.
    """

    data: dict[str, Any]
    lines: dict[str, int]


def read(source: str | Path) -> Document:
    """Read a YAML mapping from a text (`str`) or a file (`Path`).

    Raises:
        RecipeError: the source is not YAML with plain data. The message names the line.
    """
    name = "The recipe" if isinstance(source, str) else str(source)
    reader = _Reader(name)
    data = reader.read(source if isinstance(source, str) else _text(source), empty={})
    if not isinstance(data, dict):
        raise RecipeError(
            f"{name} is not a mapping of keys to values.", fix="Write `key: value` lines, or start from `kirsch init`."
        )
    return Document(data, reader.lines)


def scalar(text: str, origin: str) -> Any:
    """Read a value from the command line or the environment as YAML.

    Args:
        text: value as text.
        origin: source of the value, for error messages.
    """
    return _Reader(origin).read(text, empty=None)


def dump(data: Any, *, one_line: bool = False) -> str:
    """Return plain data as YAML; `read` of the text returns equal data.

    Args:
        data: plain data as in `Document.data`, with finite numbers.
        one_line: whether to write lists and mappings in brackets on one line.
    """
    yaml = _yaml()
    yaml.Representer = _Representer
    yaml.default_flow_style = one_line
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.width = MOST_BYTES
    stream = io.StringIO()
    yaml.dump(data, stream)
    text = stream.getvalue()
    return text.split("\n", 1)[0] if one_line else text  # without the line "..." after a scalar


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # without libyaml, which has other error messages and recurses in C
    yaml.Resolver = _Resolver
    return yaml


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read.", f"{error.strerror}.", "Check the path.") from error
    if len(content) > MOST_BYTES:
        raise RecipeError(f"{path} is too large for a recipe.", f"At most {MOST_BYTES:,} bytes are allowed.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"The recipe {path} is not UTF-8 text.", f"Line {line}.", "Save it as UTF-8.") from error


class _Reader:
    """Converts YAML to plain data. Aliases are expanded, and the expanded values count towards the limit.

    The constructors of ruamel.yaml would share one object between aliases, create the Python objects that tags name,
    convert keys to numbers, and keep line numbers only together with comments.
    """

    def __init__(self, name: str) -> None:
        self.lines: dict[str, int] = {}
        self._name = name
        self._nodes = 0
        self._yaml = _yaml()
        self._yaml.max_depth = MOST_DEPTH + 1
        self._yaml.composer.warn_double_anchors = False

    def read(self, text: str, *, empty: Any) -> Any:
        try:
            node = self._yaml.compose(text)
        except MaxDepthExceededError as error:
            raise self._too_large(error.problem_mark.line + 1) from error
        except (YAMLError, AssertionError) as error:  # ruamel.yaml asserts that %YAML is 1.1 or 1.2
            raise RecipeError(
                f"{self._name} is not valid YAML.", _why(error, text), "Fix the line, or start from `kirsch init`."
            ) from error
        return empty if node is None else self._plain(node, "", 0)

    def _plain(self, node: Any, key: str, depth: int) -> Any:
        self._nodes += 1
        line = node.start_mark.line + 1
        if self._nodes > MOST_NODES or depth > MOST_DEPTH:
            raise self._too_large(line)
        if key:
            self.lines[key] = line
        if node.tag == f"{TAG}map" and isinstance(node, MappingNode):
            return self._mapping(node, key, depth)
        if node.tag == f"{TAG}seq" and isinstance(node, SequenceNode):
            return [self._plain(item, f"{key}.{index}", depth + 1) for index, item in enumerate(node.value)]
        return self._scalar(node, line)

    def _mapping(self, node: MappingNode, key: str, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for name_node, value in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, ScalarNode):
                raise RecipeError(f"{self._name}: a key must be a plain word.", f"Line {line}.")
            self._check_tag(name_node, line)
            name = name_node.value
            if name in first_lines:
                raise RecipeError(
                    f"{self._name} has the key {name!r} twice.",
                    f"Lines {first_lines[name]} and {line}.",
                    "Keep one of them.",
                )
            first_lines[name] = line
            path = f"{key}.{name}".lstrip(".")
            mapping[name] = self._plain(value, path, depth + 1)
            self.lines[path] = line  # the line of the key, not of the value
        return mapping

    def _scalar(self, node: Any, line: int) -> Any:
        self._check_tag(node, line)
        try:
            value = self._yaml.constructor.construct_object(node)
            finite = not isinstance(value, int | float) or math.isfinite(value)
        except (ValueError, KeyError, IndexError, OverflowError):  # !!int ten, !!bool maybe, !!float '', 0xfff…
            finite = False
        if not finite:
            shown = node.value if len(node.value) <= SHOWN else f"{node.value[:SHOWN]}…"
            raise RecipeError(
                f"{self._name}: {shown!r} cannot be used.",
                f"Line {line}: expected a finite number of ordinary length.",
                "Write a text in quotes.",
            )
        return value

    def _check_tag(self, node: Any, line: int) -> None:
        if node.tag not in SCALARS or not isinstance(node, ScalarNode):
            raise RecipeError(
                f"{self._name} uses the tag {node.tag!r}.", f"Line {line}.", "Write a plain value without a tag."
            )

    def _too_large(self, line: int) -> RecipeError:
        return RecipeError(
            f"{self._name} is too large.",
            f"Line {line}: more than {MOST_NODES} values, or more than {MOST_DEPTH} levels.",
        )


def _why(error: Exception, text: str) -> str:
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"Line {line}: the character {chr(error.character)!a} is not allowed."
    mark = getattr(error, "problem_mark", None)
    prefix = f"Line {mark.line + 1}: " if mark is not None else ""
    return f"{prefix}{getattr(error, 'problem', None) or error}."
