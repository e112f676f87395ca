"""Description of the machine of a measurement."""

from __future__ import annotations

import getpass
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from kirsch.errors import MemoryShortageError
from kirsch.graph.inputs import InputSpec
from kirsch.measurement import machine

X86 = "processor\t: 0\nmodel name\t: Cherry 9000 @ 3.2 GHz: fast\nflags\t\t: fpu avx2 sse avx512f amx_tiles\n\n" * 2
ARM = "processor\t: 0\nFeatures\t: fp asimd sve crc32\nCPU implementer\t: 0x41\n"


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """Return a function that replaces the content of /proc/cpuinfo."""

    def write(text):
        (tmp_path / "cpuinfo").write_text(text)

    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / Path(name).name)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    return write


def test_the_processor_is_described_by_its_model_name_and_known_instruction_sets(cpuinfo):
    cpuinfo(X86)
    assert machine.cpu() == ("Cherry 9000 @ 3.2 GHz: fast", ["avx2", "avx512f"])


def test_a_processor_without_a_model_name_is_described_by_its_architecture(cpuinfo):
    cpuinfo(ARM)
    assert machine.cpu() == ("riscv64", ["asimd", "sve"])


def test_a_system_without_cpuinfo_is_described_by_its_architecture(cpuinfo):
    assert machine.cpu() == ("riscv64", [])


def test_usable_cores_are_counted_by_the_affinity_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert machine.usable_cores() == 3


@pytest.mark.parametrize(("counted", "cores"), [(7, 7), (None, 1)])
def test_all_cores_are_usable_on_systems_without_affinity(monkeypatch, counted, cores):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert machine.usable_cores() == cores


def test_the_load_is_the_average_of_the_last_minute_or_none(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.25, 2.0, 3.0), raising=False)
    assert machine.load() == 0.25
    monkeypatch.delattr(os, "getloadavg")
    assert machine.load() is None


def test_the_version_of_a_package_is_the_installed_version_or_none():
    assert machine.version_of("numpy") == metadata.version("numpy")
    assert machine.version_of("no-such-package-as-this") is None


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "float16", "int32", "float32", "int64", "float64", "uint32"]
)
def test_inputs_must_fit_into_the_memory(monkeypatch, dtype):
    specs = [InputSpec("image", (2, 3, 500), dtype), InputSpec("mask", (1, 40), "bool")]
    needed = 3000 * np.dtype(dtype).itemsize + 40
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=needed))
    machine.require_memory(specs)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=needed - 1))
    with pytest.raises(MemoryShortageError, match="2×3×500, 1×40") as caught:
        machine.require_memory(specs)
    assert "the largest axis has the size 500" in caught.value.fix


def test_the_environment_is_json_without_the_names_of_user_and_host(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "host-of-somebody")
    host = platform.uname()._replace(node="host-of-somebody", version="built by somebody")
    monkeypatch.setattr(platform, "uname", lambda: host)
    monkeypatch.setenv("LOGNAME", "somebody-by-name")
    environment = machine.environment()
    text = json.dumps(environment)
    assert getpass.getuser() == "somebody-by-name"
    assert not any(name in text for name in ("somebody", "host-of", str(Path.home())))
    assert environment["system"] == f"{platform.system()} {platform.machine()}"
    assert environment["packages"]["numpy"] == metadata.version("numpy")
    assert None not in environment["packages"].values()
    assert environment.keys() == {"cpu", "instruction_sets", "cores", "memory_bytes", "system", "python", "packages"}
