"""What is installed and what is missing."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from kirsch.cli import doctor
from kirsch.cli.doctor import CORE, NEEDED, Package

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.fixture
def without(monkeypatch):
    """Makes packages look missing, or of another version."""

    def change(**versions):
        real = doctor._version
        monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else real(name))

    return change


def test_the_table_is_that_of_the_project():
    extras = {CORE: PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    del extras["dev"]
    assert {extra: dict(re.split(">=", line) for line in lines) for extra, lines in extras.items()} == NEEDED


def test_every_extra_says_what_it_is_for():
    assert doctor.PURPOSE.keys() == NEEDED.keys()


@pytest.mark.parametrize(
    ("needed", "found", "state"),
    [
        ("2.10", "2.10.0+cpu", "ok"),
        ("2.10", "2.9.1", "too old"),
        ("6", "6.0.4", "ok"),
        ("1.13", "2.0rc1", "ok"),
        ("1.13", None, "missing"),
    ],
)
def test_versions_are_compared_number_by_number(needed, found, state):
    assert Package("p", CORE, needed, found).state == state


def test_a_complete_installation_exits_with_zero(kirsch):
    code, out, err = kirsch("doctor")
    assert (code, err) == (0, "")
    assert "core         complete" in out
    assert "pip install" not in out


def test_a_missing_extra_is_named_with_its_line_and_is_no_error(kirsch, without):
    without(torch=None)
    code, out, _ = kirsch("doctor")
    assert code == 0
    assert re.search(r"^  torch +missing$", out, re.MULTILINE)
    assert 'pip install "kirsch[torch]"' in out


def test_an_old_package_says_what_is_needed(kirsch, without):
    without(timm="0.9")
    assert re.search(r"^  timm +0\.9 +too old, 1\.0 is needed$", kirsch("doctor")[1], re.MULTILINE)


def test_an_incomplete_core_exits_with_five(answer, without):
    without(scipy=None)
    found = answer("doctor", code=5)
    assert found["complete"] is False
    assert found["install"] == {CORE: 'pip install "kirsch"'}


def test_json_has_every_package_once(answer):
    names = [package["name"] for package in answer("doctor")["packages"]]
    assert sorted(names) == sorted(name for extra in NEEDED.values() for name in extra)


@pytest.mark.parametrize("arguments", ["--help", "doctor", "--version"])
def test_what_needs_no_framework_loads_none(process, arguments):
    program = (
        f"import sys; from kirsch.cli import main; main([{arguments!r}])\n"
        "print('loaded', *sorted({'torch', 'numpy', 'onnxruntime', 'rich'} & set(sys.modules)))"
    )
    with process("-c", program) as started:
        out, err = started.communicate(timeout=60)
    assert out.splitlines()[-1] == "loaded", err


def test_the_check_above_sees_a_framework(process):
    program = "import sys, numpy; print('loaded', *sorted({'torch', 'numpy'} & set(sys.modules)))"
    with process("-c", program) as started:
        assert started.communicate(timeout=60)[0] == "loaded numpy\n"


def test_the_doctor_works_where_neither_torch_nor_psutil_can_be_imported(process):
    program = (
        "import sys; sys.modules.update(torch=None, psutil=None)\n"
        "from kirsch.cli import main; sys.exit(main(['doctor']))"
    )
    with process("-c", program) as started:
        out, err = started.communicate(timeout=60)
    assert (started.returncode, err) == (0, "")  # both are installed: they are only not importable
    assert "processor" in out


def test_a_reader_that_closes_the_pipe_ends_the_verb_quietly(process):
    with process("-m", "kirsch.cli", "doctor") as started:
        started.stdout.close()
        assert started.stderr.read() == ""
        assert started.wait(60) == 141
