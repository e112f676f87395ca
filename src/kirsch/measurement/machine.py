"""What a measurement ran on: enough to repeat it, nothing that names a person or a host."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "kirsch",
    "numpy",
    "scipy",
    "safetensors",
    "torch",
    "accelerate",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "scikit-learn",
    "timm",
)
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


def version_of(package: str) -> str | None:
    """The installed version of a package, None if it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def usable_cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def load() -> float | None:
    """Load average of the last minute, None where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu() -> tuple[str, list[str]]:
    """Model name and the instruction sets that matter."""
    name, flags = platform.processor() or platform.machine(), list[str]()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features") and not flags:
                flags = [flag for flag in FLAGS if flag in value.split()]
    return name, flags


def environment() -> dict[str, Any]:
    """The machine and the versions, as JSON."""
    name, flags = cpu()
    return {
        "cpu": name,
        "instruction_sets": flags,
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {package: version for package in PACKAGES if (version := version_of(package)) is not None},
    }
