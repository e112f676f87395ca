"""JSON read strictly: no key given twice, no NaN or infinity, no deep nesting, UTF-8 alone.

Python's own reader keeps the last of two equal keys, takes NaN, and ends in a RecursionError where a file is nested
deeply. Every JSON text that Kirsch did not make itself in the same process is read here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from pathlib import Path

MOST_BYTES = 1 << 28
"""Bytes of a file: the plan of a model with a million units has about 10 MB."""
MOST_LEVELS = 100
"""Levels of nesting; the files of Kirsch have fewer than ten."""


def read(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not strict JSON; see `parse`.
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    return parse(content)


def parse(content: str | bytes, *, finite: bool = True) -> Any:
    """The content of a JSON text.

    Args:
        content: the text, or its UTF-8 bytes.
        finite: whether NaN and infinity are refused. They are in JSON, and Python writes them all the same.

    Raises:
        ValueError: it is not JSON, or a key is given twice in one object, a number is not finite, it is nested too
            deeply or too large, or a text is not Unicode. The message says which, without a point at its end.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
    try:
        hooks: dict[str, Any] = {"parse_constant": _constant, "parse_float": _number} if finite else {}
        found = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_object, **hooks)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep") from error
    _check_depth(found)
    if "\\u" in text:  # half of a pair of surrogates passes for text, and cannot be written again
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text has half of a surrogate pair, which is not Unicode") from error
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is given twice in one object; keep one of them")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _check_depth(content: Any) -> None:
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(MOST_LEVELS):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, (dict, list))]
    if level:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
