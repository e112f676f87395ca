"""The subcommand doctor lists packages that are missing or cannot be imported."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from kirsch.cli import doctor
from kirsch.cli.doctor import CORE, PURPOSE, Package

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


NO_IMPORTS = "from kirsch.cli import doctor; doctor.import_errors = lambda names: {}\n"  # importing all takes 5 s
REAL_IMPORT_ERRORS = doctor.import_errors
BROKEN = "RuntimeError: operator torchvision::nms does not exist"


@pytest.fixture(autouse=True)
def broken(monkeypatch):
    """Return the import errors by package. A test adds errors; without errors, all packages can be imported."""
    errors = {}
    monkeypatch.setattr(doctor, "import_errors", lambda names: {name: errors.get(name, "") for name in names})
    return errors


@pytest.fixture
def installed_versions(monkeypatch):
    """Return a function that changes the installed versions of packages; None makes a package missing."""

    def change(**versions):
        real = doctor._version
        monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else real(name))

    return change


def test_each_extra_has_a_purpose():
    assert PURPOSE.keys() == {CORE, *PROJECT["optional-dependencies"]} - {"dev"}


def test_packages_are_those_that_the_installed_kirsch_requires(monkeypatch, installed_versions):
    installed_versions(torchvision=None)  # installed by other packages
    required = ["numpy>=2", "none>=1; python_version < '3'", "torch<3,>=2.10; extra == 'torch'", "ruff; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", {"kirsch": required}.get)
    assert [(package.name, package.extra, package.needed) for package in doctor.packages()] == [
        ("numpy", CORE, ">=2"),
        ("torch", "torch", "<3,>=2.10"),
    ]


def test_doctor_raises_an_error_with_the_fix_if_kirsch_is_not_installed(kirsch, monkeypatch):
    def missing(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", missing)
    code, _, err = kirsch("doctor")
    assert code == 5
    assert "The package kirsch is not installed" in err
    assert "pip install" in err


@pytest.mark.parametrize(
    ("needed", "found", "state"),
    [
        (">=2.10", "2.10.0+cpu", "ok"),
        (">=2.10", "2.9.1", "other version"),
        (">=6", "6.0.4", "ok"),
        (">=1.13", "2.0rc1", "ok"),
        (">=1.13", None, "missing"),
        ("<3,>=2", "3.0", "other version"),
        ("", "0.1", "ok"),
    ],
)
def test_versions_are_compared_as_pip_does(needed, found, state):
    assert Package("p", CORE, needed, found).state == state


def test_a_complete_installation_exits_with_zero(kirsch):
    code, out, err = kirsch("doctor")
    assert (code, err) == (0, "")
    assert "core         complete" in out
    assert "pip install" not in out


def test_a_missing_extra_is_shown_with_its_pip_command_and_exit_code_zero(kirsch, installed_versions):
    installed_versions(torch=None)
    code, out, _ = kirsch("doctor")
    assert code == 0
    assert re.search(r"^  torch +missing$", out, re.MULTILINE)
    assert 'pip install "kirsch[torch]"' in out


def test_an_unsupported_version_is_shown_with_the_versions_that_are_needed(kirsch, installed_versions):
    installed_versions(timm="0.9")
    assert re.search(r"^  timm +0\.9 +>=1\.0 is needed$", kirsch("doctor")[1], re.MULTILINE)


def test_an_incomplete_core_exits_with_five(run_json, installed_versions):
    installed_versions(scipy=None)
    found = run_json("doctor", code=5)
    assert found["complete"] is False
    assert found["install"] == {CORE: 'pip install "kirsch"'}


def test_a_package_that_cannot_be_imported_is_shown_with_the_error_and_a_fix(run_json, kirsch, broken):
    broken["transformers"] = "ImportError: no accelerate"
    found = run_json("doctor")
    (package,) = (package for package in found["packages"] if package["name"] == "transformers")
    assert (package["state"], package["error"]) == ("broken", "ImportError: no accelerate")
    fix = f'pip install --force-reinstall --no-deps "transformers=={package["found"]}"'
    assert found["install"] == {"hf": fix}
    out = kirsch("doctor")[1]
    assert "cannot be imported: ImportError: no accelerate" in out
    assert fix in out


@pytest.mark.parametrize(
    ("torch", "source"),
    [("2.13.0", ""), ("2.13.0+cu130", " --index-url https://download.pytorch.org/whl/cu130")],
)
def test_a_torchvision_for_another_build_of_torch_is_replaced(run_json, installed_versions, broken, torch, source):
    installed_versions(torch=torch, torchvision="0.28.0")
    broken.update(dict.fromkeys(("torchvision", "timm", "lightning"), BROKEN), pyarrow="ImportError: damaged")
    fix = f'pip uninstall --yes torchvision && pip install "torch=={torch}" torchvision{source}'
    found = run_json("doctor")["install"]
    assert found.pop("tasks").startswith("pip install --force-reinstall --no-deps")
    assert found == {"zoo": fix, "lightning": fix}


def test_a_missing_torchvision_is_not_reported(run_json, installed_versions):
    installed_versions(torchvision=None)
    assert "torchvision" not in {package["name"] for package in run_json("doctor")["packages"]}


def test_the_module_of_each_package_is_known():
    installed = metadata.packages_distributions()
    for package in doctor.packages():
        module = doctor.MODULES.get(package.name, package.name.replace("-", "_")).partition(".")[0]
        assert package.name in {name.lower().replace(".", "-") for name in installed[module]}, package.name


def test_json_lists_each_package_once(run_json):
    names = [package["name"] for package in run_json("doctor")["packages"]]
    assert {"numpy", "torch", "lightning"} <= set(names)
    assert len(set(names)) == len(names)


PACKAGES = {
    "fine": "print('text of the package')",
    "cause": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ImportError('hidden') from error",
    "exits": "raise SystemExit('two\\nlines')",
    "crashes": "import os; os._exit(3)",
    "last": "",
}


@pytest.fixture
def write_packages(tmp_path, monkeypatch):
    """Write `PACKAGES` where Python finds them, and go to a folder with a file that has the name of a package."""
    for name, text in PACKAGES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "numpy.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.usefixtures("write_packages")
def test_import_errors_are_those_of_a_new_process():
    assert REAL_IMPORT_ERRORS(["numpy", *PACKAGES]) == {
        "numpy": "",
        "fine": "",
        "cause": "ZeroDivisionError: division by zero",
        "exits": "SystemExit: two lines",
        "crashes": "the import ended Python with exit code 3",
    }


@pytest.mark.parametrize("arguments", ["--help", "doctor", "--version"])
def test_help_version_and_doctor_load_no_framework(process, arguments):
    program = (
        f"{NO_IMPORTS}import sys; from kirsch.cli import main; main([{arguments!r}])\n"
        "print('loaded', *sorted({'torch', 'numpy', 'onnxruntime', 'rich'} & set(sys.modules)))"
    )
    with process("-c", program) as started:
        out, err = started.communicate(timeout=60)
    assert out.splitlines()[-1] == "loaded", err


def test_the_check_for_loaded_frameworks_detects_numpy(process):
    program = "import sys, numpy; print('loaded', *sorted({'torch', 'numpy'} & set(sys.modules)))"
    with process("-c", program) as started:
        assert started.communicate(timeout=60)[0] == "loaded numpy\n"


def test_doctor_works_if_torch_and_psutil_cannot_be_imported(process):
    program = (
        f"{NO_IMPORTS}import sys; sys.modules.update(torch=None, psutil=None)\n"
        "from kirsch.cli import main; sys.exit(main(['doctor']))"
    )
    with process("-c", program) as started:
        out, err = started.communicate(timeout=60)
    assert (started.returncode, err) == (0, "")  # both are installed, so the installation is complete
    assert "processor" in out


def test_a_closed_pipe_ends_the_subcommand_without_a_message(process):
    with process("-c", f"{NO_IMPORTS}import sys; from kirsch.cli import main; sys.exit(main(['doctor']))") as started:
        started.stdout.close()
        assert started.stderr.read() == ""
        assert started.wait(60) == 141
