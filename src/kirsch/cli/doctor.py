"""The subcommand doctor: packages that are missing or cannot be imported, and the pip commands that fix them."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kirsch import __version__
from kirsch.errors import RequirementError
from kirsch.tables import Line, Piece

if TYPE_CHECKING:
    from collections.abc import Sequence

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
TORCHVISION = "torchvision"
MODULES = {
    "lightning": "lightning.pytorch",
    "pillow": "PIL.Image",
    "ruamel-yaml": "ruamel.yaml",
    "scikit-learn": "sklearn",
    "transformers": "transformers.trainer",
}
"""Module to import, for a package whose module has another name, or whose top module does not import the rest."""
IMPORT = """
import importlib, os, sys
output = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the packages may print
for module in sys.argv[1:]:
    text = ""
    try:
        importlib.import_module(module)
    except BaseException as error:
        while error.__cause__:  # transformers hides the cause
            error = error.__cause__
        text = " ".join(f"{type(error).__name__}: {error}".split())
    print(text, file=output, flush=True)
os._exit(0)  # the cleanup of the packages is not checked
"""
"""Program that imports modules and prints one line for each of them: the error, or an empty text."""


@dataclass(frozen=True)
class Package:
    """A package that Kirsch can use.

    Args:
        name: name of the package.
        extra: the extra of Kirsch that installs the package.
        needed: versions that Kirsch works with, such as ">=2.10".
        found: installed version, None if the package is missing.
        error: error of importing the package, "" if it can be imported.
    """

    name: str
    extra: str
    needed: str
    found: str | None
    error: str = ""

    @property
    def state(self) -> str:
        """Return "ok", "missing", "other version" or "broken"."""
        if self.found is None:
            return "missing"
        if not SpecifierSet(self.needed).contains(self.found, prereleases=True):
            return "other version"
        return "broken" if self.error else "ok"

    @property
    def note(self) -> str:
        """Return what is wrong with the package, "" if nothing is."""
        notes = {"other version": f"{self.needed} is needed", "broken": f"cannot be imported: {self.error}", "ok": ""}
        return notes.get(self.state, self.state)


def packages() -> list[Package]:
    """Return all packages that Kirsch can use, with their installed versions and import errors.

    torchvision is in the list if it is installed, because timm, transformers and Lightning import it.

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
    used = [
        (requirement.name, extra, str(requirement.specifier))
        for extra in PURPOSE
        for requirement in requirements
        if _belongs(requirement, extra)
    ]
    if _version(TORCHVISION):
        used.append((TORCHVISION, "zoo", ""))
    versions = {name: _version(name) for name, _, _ in used}
    errors = import_errors([name for name, version in versions.items() if version])
    return [Package(name, extra, needed, versions[name], errors.get(name, "")) for name, extra, needed in used]


def import_errors(names: Sequence[str]) -> dict[str, str]:
    """Import packages in a new process, and return the error of each package, "" if it can be imported.

    If a package ends the process, the packages after it are not in the result.
    """
    modules = [MODULES.get(name, name.replace("-", "_")) for name in names]
    # -P: a file of the user in the current folder is not imported in place of a package
    # S603: the names are those of packages that Kirsch requires
    command = [sys.executable, "-P", "-W", "ignore", "-c", IMPORT, *modules]
    run = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # noqa: S603
    errors = run.stdout.decode(errors="replace").splitlines()
    if run.returncode:
        errors.append(f"the import ended Python with exit code {run.returncode}")
    return dict(zip(names, errors, strict=False))


def _belongs(requirement: Requirement, extra: str) -> bool:
    """Return whether the requirement belongs to this extra. The requirements of the core belong only to `CORE`."""
    marker = requirement.marker
    in_core = marker is None or marker.evaluate({"extra": ""})
    return in_core if extra == CORE else not in_core and marker is not None and marker.evaluate({"extra": extra})


def doctor(terminal: Terminal) -> int:
    """Show packages and machine. Return 0 if the core is complete, else 5."""
    found = packages()
    complete = all(package.state == "ok" for package in found if package.extra == CORE)
    fixes = {extra: fix for extra in PURPOSE if (fix := _fix(extra, found))}
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
            {
                "name": p.name,
                "extra": p.extra,
                "needed": p.needed,
                "found": p.found,
                "state": p.state,
                "error": p.error or None,
            }
            for p in found
        ],
        "complete": complete,
        "install": fixes,
    }
    terminal.result(lines, content)
    return 0 if complete else 5


def _fix(extra: str, found: Sequence[Package]) -> str:
    """Return the command that makes an extra complete, "" if it is complete."""
    wrong = {package.name: package for package in found if package.extra == extra and package.state != "ok"}
    if not wrong:
        return ""
    if any(package.state != "broken" for package in wrong.values()):
        return 'pip install "kirsch"' if extra == CORE else f'pip install "kirsch[{extra}]"'
    errors = {package.name: package.error for package in found}
    cause = errors.get(TORCHVISION)
    if cause and not errors.get("torch") and cause in {package.error for package in wrong.values()}:
        return _torchvision_fix()
    names = " ".join(f'"{name}=={package.found}"' for name, package in wrong.items())
    return f"pip install --force-reinstall --no-deps {names}"


def _torchvision_fix() -> str:
    """Return the command that installs the torchvision that matches the installed torch.

    The operators of torchvision load only with the build of torch for which they were compiled, and each build of torch
    has its own package index.
    """
    torch = str(_version("torch"))
    build = torch.partition("+")[2]
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f'pip uninstall --yes {TORCHVISION} && pip install "torch=={torch}" {TORCHVISION}{index}'


def _section(extra: str, found: list[Package], fix: str | None) -> list[Line]:
    state, tone = ("complete", "good") if fix is None else ("incomplete", "bad" if extra == CORE else "warning")
    lines: list[Line] = [
        [Piece(f"{extra:<13}", "strong"), Piece(state, tone), Piece(f"   for {PURPOSE[extra]}", "faint")]
    ]
    for package in found:
        version = package.found or ""
        lines.append([Piece(f"  {package.name:<15}{version:<14}"), Piece(package.note, "warning")])
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
