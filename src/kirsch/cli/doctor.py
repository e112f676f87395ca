"""The subcommand doctor: installed and missing packages, and the command that installs them."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from kirsch import __version__
from kirsch.tables import Line, Piece

if TYPE_CHECKING:
    from kirsch.cli.terminal import Terminal

CORE = "core"
NEEDED: dict[str, dict[str, str]] = {
    CORE: {
        "numpy": "2",
        "scipy": "1.13",
        "safetensors": "0.5",
        "pydantic": "2.10",
        "pyyaml": "6",
        "typer": "0.16",
        "rich": "13.8",
        "jinja2": "3.1",
        "filelock": "3.16",
        "psutil": "6",
    },
    "torch": {"torch": "2.10", "accelerate": "1.10", "onnx": "1.18", "onnxscript": "0.5", "onnxruntime": "1.22"},
    "tasks": {"scikit-learn": "1.5", "pillow": "11", "pyarrow": "18"},
    "zoo": {"timm": "1.0"},
    "hf": {"transformers": "5.24"},
    "lightning": {"lightning": "2.6"},
}
"""Extra → package → minimum version, as in pyproject.toml, which is not part of an installation."""

PURPOSE = {
    CORE: "everything",
    "torch": "PyTorch models, export and ONNX Runtime",
    "tasks": "the built-in data sets",
    "zoo": "models named timm:NAME",
    "hf": "distilling in the Trainer of transformers",
    "lightning": "distilling in Lightning",
}


@dataclass(frozen=True)
class Package:
    """A package that Kirsch can use.

    Args:
        name: of the package.
        extra: the extra of Kirsch that installs the package.
        needed: minimum version.
        found: installed version, None if the package is missing.
    """

    name: str
    extra: str
    needed: str
    found: str | None

    @property
    def state(self) -> str:
        """Return "ok", "missing" or "too old"."""
        if self.found is None:
            return "missing"
        return "ok" if _numbers(self.found) >= _numbers(self.needed) else "too old"


def packages() -> list[Package]:
    """Return all packages that Kirsch can use, with their installed versions."""
    return [
        Package(name, extra, least, _version(name)) for extra, names in NEEDED.items() for name, least in names.items()
    ]


def doctor(terminal: Terminal) -> int:
    """Show packages and machine. Return 0 if the core is complete, else 5."""
    found = packages()
    complete = all(package.state == "ok" for package in found if package.extra == CORE)
    fixes = {
        extra: 'pip install "kirsch"' if extra == CORE else f'pip install "kirsch[{extra}]"'
        for extra in NEEDED
        if any(package.state != "ok" for package in found if package.extra == extra)
    }
    machine = _machine()
    lines: list[Line] = [
        [Piece(f"kirsch {__version__}", "strong")],
        *([Piece(f"{name:<13}{text}")] for name, text in machine.items()),
    ]
    for extra in NEEDED:
        lines += [[], *_section(extra, [package for package in found if package.extra == extra], fixes.get(extra))]
    content = {
        "kirsch": __version__,
        **machine,
        "packages": [
            {"name": p.name, "extra": p.extra, "needed": p.needed, "found": p.found, "state": p.state} for p in found
        ],
        "complete": complete,
        "install": fixes,
    }
    terminal.result(lines, content)
    return 0 if complete else 5


def _section(extra: str, found: list[Package], fix: str | None) -> list[Line]:
    state, tone = ("complete", "good") if fix is None else ("incomplete", "bad" if extra == CORE else "warning")
    lines: list[Line] = [
        [Piece(f"{extra:<13}", "strong"), Piece(state, tone), Piece(f"   for {PURPOSE[extra]}", "faint")]
    ]
    for package in found:
        note = {"ok": "", "missing": "missing", "too old": f"too old, {package.needed} is needed"}[package.state]
        version = package.found or ""
        lines.append([Piece(f"  {package.name:<15}{version:<14}"), Piece(note, "warning")])
    return lines if fix is None else [*lines, [Piece(f"  {fix}")]]


def _machine() -> dict[str, str]:
    """Return Python version, system and processor."""
    try:
        from kirsch.measurement.machine import cpu, usable_cores

        name, flags = cpu()
        processor = f"{name}, {usable_cores()} cores{', ' if flags else ''}{' '.join(flags)}"
    except ModuleNotFoundError:  # a package of the core is missing; the list shows which
        processor = platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers at the start of a version, for comparison: "2.13.0+cpu" → (2, 13, 0)."""
    start = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in start[0].split(".")) if start else ()
