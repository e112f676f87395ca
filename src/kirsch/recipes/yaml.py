"""YAML as a recipe may use it: plain data, with line numbers, and nothing that surprises or executes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from kirsch.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from yaml.nodes import Node

MOST_BYTES, MOST_NODES, MOST_DEPTH = 1_000_000, 20_000, 40

FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?)$")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-4 is a float, and only true and false are booleans."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Document:
    """A YAML file as plain data.

    Args:
        data: dictionaries, lists, strings, numbers, booleans and None.
        lines: dotted key → line, counted from 1.
    """

    data: dict[str, Any]
    lines: dict[str, int]


def read(source: str | Path) -> Document:
    """The mapping in a YAML text or file.

    Raises:
        RecipeError: it is no YAML of plain data; names the line.
    """
    text = source if isinstance(source, str) else _text(source)
    name = "The recipe" if isinstance(source, str) else str(source)
    if len(text) > MOST_BYTES:
        raise RecipeError(f"{name} has {len(text):,} characters; {MOST_BYTES:,} are allowed.")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(
            f"{name} is no YAML.", _where(error), "Mend the line, or start from `kirsch init`."
        ) from error
    if node is None:
        return Document({}, {})
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{name} is no mapping of keys to values.", mend="Start from `kirsch init`.")
    reader = _Reader(name)
    data = reader.plain(node, "", 0)
    return Document(data, reader.lines)


def scalar(text: str) -> Any:
    """A value given on the command line, read as YAML."""
    return read(f"value: {text}").data["value"]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read.", f"{error.strerror}.", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"The recipe {path} is no UTF-8 text.", f"Byte {error.start}.", "Save it as UTF-8."
        ) from error


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f"Line {mark.line + 1}: " if mark is not None else ""
    return f"{line}{getattr(error, 'problem', None) or 'it is nested too deeply'}."


class _Reader:
    """Nodes → plain data. Aliases are followed, so what they unfold to is counted."""

    def __init__(self, name: str) -> None:
        self.lines: dict[str, int] = {}
        self._name = name
        self._nodes = 0

    def plain(self, node: Node, key: str, depth: int) -> Any:
        self._nodes += 1
        line = node.start_mark.line + 1
        if self._nodes > MOST_NODES or depth > MOST_DEPTH:
            raise RecipeError(
                f"{self._name} is too large.", f"Line {line}: more than {MOST_NODES} values, or {MOST_DEPTH} levels."
            )
        if key:
            self.lines[key] = line
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, f"{key}.{place}", depth + 1) for place, item in enumerate(node.value)]
        return self._scalar(node, line)

    def _mapping(self, node: Any, key: str, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        first: dict[str, int] = {}
        for name_node, value in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, yaml.ScalarNode):
                raise RecipeError(f"{self._name}: a key must be a plain word.", f"Line {line}.")
            name = str(name_node.value)
            if name in first:
                raise RecipeError(
                    f"{self._name} has the key {name!r} twice.",
                    f"Lines {first[name]} and {line}.",
                    "Keep one of them.",
                )
            first[name] = line
            out[name] = self.plain(value, f"{key}.{name}".lstrip("."), depth + 1)
        return out

    def _scalar(self, node: Node, line: int) -> Any:
        tag, value = node.tag.rpartition(":")[2], node.value
        if tag == "str":
            return value
        if tag == "null":
            return None
        if tag == "bool":
            return value.lower() == "true"
        if tag == "int":
            return int(value)
        if tag == "float":
            return float(value.replace("_", ""))
        raise RecipeError(f"{self._name} uses the tag {node.tag!r}.", f"Line {line}.", "Only plain values are read.")
