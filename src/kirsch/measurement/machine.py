"""Description of the machine and package versions of a measurement, without names of persons or hosts."""

from __future__ import annotations

import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from kirsch.errors import MemoryShortageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.graph.inputs import InputSpec

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
BYTES = {
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Element types of inputs, with the size of one element in bytes."""

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")


def version_of(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def require_memory(specs: Sequence[InputSpec]) -> None:
    """Check that inputs fit into the memory of the machine.

    Raises:
        MemoryShortageError: the inputs do not fit; the message has the size of the largest axis.
    """
    needed_bytes = sum(math.prod(spec.shape) * BYTES.get(spec.dtype, 4) for spec in specs)
    memory_bytes = psutil.virtual_memory().total
    if needed_bytes > memory_bytes:
        largest = max(specs, key=lambda spec: math.prod(spec.shape))
        shapes = ", ".join("×".join(map(str, spec.shape)) for spec in specs)
        raise MemoryShortageError(
            f"The memory is not sufficient for inputs of shape {shapes}.",
            f"They need {needed_bytes / 1e9:,.0f} GB; the machine has {memory_bytes / 1e9:,.0f} GB.",
            f"Use smaller inputs, e.g. with --input; the largest axis has the size {max(largest.shape)}.",
        )


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def load() -> float | None:
    """Return the load average of the last minute, None on systems without one."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu() -> tuple[str, list[str]]:
    """Return the model name of the processor and its instruction sets listed in `FLAGS`."""
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
    """Return the machine and the package versions as JSON."""
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
