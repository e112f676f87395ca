"""Strict JSON reader: refuses repeated keys, NaN and infinity, deep nesting and encodings other than UTF-8.

Python's own reader keeps the last of two equal keys, accepts NaN, and raises a RecursionError for deeply nested files.
All JSON that comes from outside the process is read here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 1 << 28
"""Largest size of a file. The plan of a model with a million units has about 10 MB."""
MAX_LEVELS = 100
"""Largest depth of nesting. The files of Kirsch have fewer than ten levels."""


def read(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not strict JSON; see `parse`.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    return parse(content)


def parse(content: str | bytes, *, finite: bool = True) -> Any:
    """Return the content of a JSON text.

    Args:
        content: the text, or its UTF-8 bytes.
        finite: whether NaN and infinity are refused. JSON does not define them, but Python writes them.

    Raises:
        ValueError: the text is not JSON, is too large or too deeply nested, repeats a key in one object, or contains a
            number that is not finite or a text that is not Unicode. The message has no period at its end.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
    try:
        hooks: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite_number} if finite else {}
        parsed = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_object_without_repeats, **hooks)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_LEVELS} levels deep") from error
    _check_depth(parsed)
    if "\\u" in text:  # Python accepts half of a surrogate pair, and cannot encode it again
        try:
            json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text has half of a surrogate pair, which is not Unicode") from error
    return parsed


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {repeated!r} is given twice in one object; keep one of them")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _check_depth(content: Any) -> None:
    containers = [content] if isinstance(content, (dict, list)) else []
    for _ in range(MAX_LEVELS):
        items = (item for outer in containers for item in (outer.values() if isinstance(outer, dict) else outer))
        containers = [item for item in items if isinstance(item, (dict, list))]
    if containers:
        raise ValueError(f"it is nested more than {MAX_LEVELS} levels deep")
