"""YAML of recipes: a safe subset of YAML 1.2 with plain data only, read together with line numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from kirsch.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from yaml.nodes import Node

MOST_BYTES, MOST_NODES, MOST_DEPTH = 1_000_000, 20_000, 40

TAG = "tag:yaml.org,2002:"
INT = re.compile(r"^[-+]?(0|[1-9]\d*)$")
FLOAT = re.compile(r"^([-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$")
RULES = (
    (f"{TAG}bool", re.compile(r"^(true|false|True|False)$"), "tfTF"),
    (f"{TAG}int", INT, "-+0123456789"),
    (f"{TAG}float", FLOAT, "-+.0123456789"),
)
"""Tag, pattern and first characters of scalars, as in YAML 1.2: 1e-4 is a float; only true and false are booleans."""


class _Loader(yaml.SafeLoader):
    """Loader that resolves scalars by `RULES`; of the rules of YAML 1.1 only null is kept."""


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] == f"{TAG}null"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes strings that `RULES` or YAML 1.1 would resolve to another type, such as 1e5 or no."""


for _tag, _pattern, _first in RULES:
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Double quotes escape line breaks; in other styles the value takes several lines, and no comment can follow it.
    return dumper.represent_scalar(f"{TAG}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text_node)


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
        RecipeError: the source is not YAML with plain data; names the line.
    """
    text = source if isinstance(source, str) else _text(source)
    name = "The recipe" if isinstance(source, str) else str(source)
    reader = _Reader(name)
    node = _compose(text, name)
    if node is None:
        return Document({}, {})
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            f"{name} is not a mapping of keys to values.", fix="Write `key: value` lines, or start from `kirsch init`."
        )
    data = reader.plain(node, "", 0)
    return Document(data, reader.lines)


def scalar(text: str, origin: str) -> Any:
    """Read a value from the command line or the environment as YAML.

    Args:
        text: value as text.
        origin: source of the value, for error messages.
    """
    node = _compose(text, origin)
    return None if node is None else _Reader(origin).plain(node, "", 0)


def dump(data: Any, *, one_line: bool = False) -> str:
    """Return plain data as YAML; `read` of the text returns equal data.

    Args:
        data: plain data as in `Document.data`, with finite numbers.
        one_line: whether to write lists and mappings in brackets on one line.
    """
    text: str = yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=one_line,
        width=MOST_BYTES,
    )
    return text.split("\n", 1)[0] if one_line else text  # drops the end mark after a scalar


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


def _compose(text: str, name: str) -> Node | None:
    """Return the node tree of a YAML text."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(
            f"{name} is not valid YAML.", _why(error, text), "Fix the line, or start from `kirsch init`."
        ) from error


def _why(error: Exception, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"Line {line}: the character {chr(error.character)!a} is not allowed."
    mark = getattr(error, "problem_mark", None)
    prefix = f"Line {mark.line + 1}: " if mark is not None else ""
    return f"{prefix}{getattr(error, 'problem', None) or 'It is nested too deeply'}."


class _Reader:
    """Converts nodes to plain data. Aliases are expanded, and the expanded nodes count towards the limit."""

    def __init__(self, name: str) -> None:
        self.lines: dict[str, int] = {}
        self._name = name
        self._nodes = 0

    def plain(self, node: Node, key: str, depth: int) -> Any:
        self._nodes += 1
        line = node.start_mark.line + 1
        if self._nodes > MOST_NODES or depth > MOST_DEPTH:
            raise RecipeError(
                f"{self._name} is too large.",
                f"Line {line}: more than {MOST_NODES} values, or more than {MOST_DEPTH} levels.",
            )
        if key:
            self.lines[key] = line
        if node.tag == f"{TAG}map" and isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, depth)
        if node.tag == f"{TAG}seq" and isinstance(node, yaml.SequenceNode):
            return [self.plain(item, f"{key}.{index}", depth + 1) for index, item in enumerate(node.value)]
        return self._scalar(node, line)

    def _mapping(self, node: Any, key: str, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for name_node, value in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, yaml.ScalarNode):
                raise RecipeError(f"{self._name}: a key must be a plain word.", f"Line {line}.")
            self._check_tag(name_node, line)
            name = str(name_node.value)
            if name in first_lines:
                raise RecipeError(
                    f"{self._name} has the key {name!r} twice.",
                    f"Lines {first_lines[name]} and {line}.",
                    "Keep one of them.",
                )
            first_lines[name] = line
            path = f"{key}.{name}".lstrip(".")
            mapping[name] = self.plain(value, path, depth + 1)
            self.lines[path] = line  # the line of the key, not of the value
        return mapping

    def _scalar(self, node: Node, line: int) -> Any:
        self._check_tag(node, line)
        try:
            return SCALARS[node.tag](node.value)
        except ValueError as error:
            shown = node.value if len(node.value) <= SHOWN else f"{node.value[:SHOWN]}…"
            raise RecipeError(
                f"{self._name}: {shown!r} cannot be used.",
                f"Line {line}: expected a finite number of ordinary length.",
            ) from error

    def _check_tag(self, node: Node, line: int) -> None:
        if node.tag not in SCALARS or not isinstance(node, yaml.ScalarNode):
            raise RecipeError(
                f"{self._name} uses the tag {node.tag!r}.", f"Line {line}.", "Write a plain value without a tag."
            )


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _float(text: str) -> float:
    value = float(text.replace("_", ""))
    if not math.isfinite(value):  # 1e999
        raise ValueError(text)
    return value


SCALARS: dict[str, Callable[[str], Any]] = {
    f"{TAG}str": str,
    f"{TAG}null": lambda _text: None,
    f"{TAG}bool": _bool,
    f"{TAG}int": int,
    f"{TAG}float": _float,
}
SHOWN = 40
"""Longest part of a value that an error message shows, in characters."""
