"""The subcommand doctor: installed and missing packages, and the command that installs them."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kirsch import __version__
from kirsch.errors import RequirementError
from kirsch.tables import Line, Piece

if TYPE_CHECKING:
    from kirsch.cli.terminal import Terminal

CORE = "core"
PURPOSE = {
    CORE: "recipes, plans, reports and the command",
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
        name: name of the package.
        extra: the extra of Kirsch that installs the package.
        needed: versions that Kirsch works with, such as ">=2.10".
        found: installed version, None if the package is missing.
    """

    name: str
    extra: str
    needed: str
    found: str | None

    @property
    def state(self) -> str:
        """Return "ok", "missing" or "other version"."""
        if self.found is None:
            return "missing"
        return "ok" if SpecifierSet(self.needed).contains(self.found, prereleases=True) else "other version"


def packages() -> list[Package]:
    """Return all packages that Kirsch can use, with their installed versions.

    Raises:
        RequirementError: Kirsch runs from its source without being installed.
    """
    try:
        requirements = [Requirement(text) for text in metadata.requires("kirsch") or ()]
    except metadata.PackageNotFoundError as error:
        raise RequirementError(
            "The package kirsch is not installed; only its source was found.",
            fix="Run `pip install -e .` in the folder of the source.",
        ) from error
    return [
        Package(requirement.name, extra, str(requirement.specifier), _version(requirement.name))
        for extra in PURPOSE
        for requirement in requirements
        if _belongs(requirement, extra)
    ]


def _belongs(requirement: Requirement, extra: str) -> bool:
    """Return whether the requirement belongs to this extra. The requirements of the core belong only to `CORE`."""
    marker = requirement.marker
    in_core = marker is None or marker.evaluate({"extra": ""})
    return in_core if extra == CORE else not in_core and marker is not None and marker.evaluate({"extra": extra})


def doctor(terminal: Terminal) -> int:
    """Show packages and machine. Return 0 if the core is complete, else 5."""
    found = packages()
    complete = all(package.state == "ok" for package in found if package.extra == CORE)
    fixes = {
        extra: 'pip install "kirsch"' if extra == CORE else f'pip install "kirsch[{extra}]"'
        for extra in PURPOSE
        if any(package.state != "ok" for package in found if package.extra == extra)
    }
    machine = _machine()
    lines: list[Line] = [
        [Piece(f"kirsch {__version__}", "strong")],
        *([Piece(f"{name:<13}{text}")] for name, text in machine.items()),
    ]
    for extra in PURPOSE:
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
        note = f"{package.needed} is needed" if package.state == "other version" else package.state.removeprefix("ok")
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
