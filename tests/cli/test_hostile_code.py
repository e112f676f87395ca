"""Exit codes and messages for failing user code, bad paths, and broken streams."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from kirsch.cli import main

pytest.importorskip("torch")

MODELS = '''
import ctypes, os, subprocess, sys, warnings

import numpy as np
import torch
from torch import nn

from kirsch import DataSet, Split

import nets


def fails_when_built():
    return {}["width"]


def exits_when_built():
    sys.exit(0)


def too_large():
    return nn.Linear(10**7, 10**7)


def moves():
    os.chdir("/")
    warnings.simplefilter("error")
    return nets.teacher()


class Counted(nets.Net):
    """Raise the error in the environment variable ERROR in forward pass number AT."""

    runs = 0

    def forward(self, x):
        Counted.runs += 1
        if Counted.runs == int(os.environ["AT"]):
            raise eval(os.environ["ERROR"])
        return super().forward(x)


def counted():
    Counted.runs = 0
    return Counted(16)


class Draws(nets.Net):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


def draws():
    return Draws(16)


class Loud(nets.Net):
    def forward(self, x):
        print("printed")
        os.write(1, b"written\\n")
        ctypes.CDLL(None).puts(b"put")
        subprocess.run(["echo", "echoed"], check=True)
        return super().forward(x)


def loud():
    print("printed at build")
    return Loud(8)


def noisy_stripes(*, seed):
    print("printed by the data")
    os.system("echo echoed by the data")
    return nets.stripes(seed=seed)


def failing_stripes(*, seed):
    raise OSError("the disk is gone")


def misnamed_stripes(*, seed):
    data = nets.stripes(seed=seed)
    return DataSet("stripes", data.train, data.validation, data.test, classes=("dark", "gr\\udce9y", "light"))


print("printed at import")
sys.__stdout__.write("held back until the end\\n")
'''


@pytest.fixture(autouse=True)
def _models(folder):
    (folder / "models.py").write_text(MODELS)
    (folder / "syntax.py").write_text("x = 1\ndef net(:\n")
    (folder / "latin.py").write_bytes(b"name = 'caf\xe9'\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(0)\n")
    (folder / "asks.py").write_text("name = input()\n")
    (folder / "warns.py").write_text("import warnings\nwarnings.simplefilter('error')\nwarnings.warn('old')\n")
    (folder / "loop.py").symlink_to("loop.py")
    (folder / "folder.py").mkdir()


LONG = "a" * 300


@pytest.mark.parametrize(
    ("arguments", "code", "sentences"),
    [
        (["trace", "syntax.py:net"], 4, ["syntax.py fails", "SyntaxError", "line 2"]),
        (["trace", "latin.py:net"], 4, ["latin.py fails", "line 1"]),
        (["trace", "exits.py:net"], 4, ["exits.py fails", "SystemExit: 0 (exits.py:2)"]),
        (["trace", "warns.py:net"], 4, ["warns.py fails", "UserWarning: old (warns.py:3)"]),
        (["trace", "loop.py:net"], 4, ["loop.py cannot be read", "symbolic links"]),
        (["trace", "folder.py:net"], 4, ["folder.py cannot be read"]),
        (["trace", "models.py:fails_when_built"], 4, ["KeyError: 'width' (models.py:", "in fails_when_built"]),
        (["trace", "models.py:exits_when_built"], 4, ["SystemExit: 0 (models.py:"]),
        (["trace", "models.py:too_large"], 5, ["The memory is not sufficient", "--input"]),
        (["trace", f"{LONG}.py:net"], 2, ["File name too long"]),
        (["trace", "nets.py:chain", "--weights", LONG], 2, ["--weights", "File name too long"]),
        (["plan", "nets.py:chain", "--macs", "0.5", "-o", LONG], 2, ["--output", "File name too long"]),
        (["prune", "nets.py:chain", "--macs", "0.5", "-o", f"small/{LONG}"], 2, ["--output", "File name too long"]),
        (["export", "nets.py:chain", "-o", "a\0b"], 2, ["--output", "null"]),
        (["measure", f"{LONG}.onnx"], 2, ["MODEL", "File name too long"]),
        (["compress", LONG], 2, ["RECIPE", "File name too long"]),
        (["compress", "--run", LONG], 2, ["RUN", "File name too long"]),
        (["resume", LONG], 2, ["RUN", "File name too long"]),
        (["verify", LONG], 2, ["RUN", "File name too long"]),
        (["report", LONG], 2, ["RUN", "File name too long"]),
        (["init", LONG], 2, ["FILE", "File name too long"]),
        (["store", "info", LONG], 2, ["FOLDER", "File name too long"]),
        (["trace", "n\udce9ts.py:chain"], 2, ["n\\udce9ts.py' is not valid text", "PYTHONUTF8=1"]),
        (["plan", "nets.py:chain", "--macs", "50%"], 2, ["'--macs'", "Write a fraction: 0.5 for 50 %."]),
        (["plan", "nets.py:chain", "--latency", "5"], 2, ["latency goals do not exist yet", "macs=0.5"]),
        (["compress", "recipe.yaml", "--set", "prune.goal.latency_ms=5"], 2, ["latency goals do not exist yet"]),
        (
            ["compress", "recipe.yaml", "--set", "data.source=models.py:failing_stripes"],
            4,
            ["OSError: the disk is gone"],
        ),
        (
            ["compress", "recipe.yaml", "--set", "data.source=models.py:misnamed_stripes", "--run", "run"],
            4,
            ["The class 1 of stripes has the name 'gr\\udce9y'", "not valid text"],
        ),
        (
            ["compress", "recipe.yaml", "--set", "teacher.model=models.py:draws", "--run", "run"],
            6,
            ["The model Draws returns different outputs for the same inputs", "training=self.training"],
        ),
        (
            ["compress", "recipe.yaml", "--set", "teacher.model=models.py:draws", "--dry-run"],
            6,
            ["The model Draws returns different outputs for the same inputs"],
        ),
        (
            ["store", "build", "kept", "--model", "models.py:draws", "--data", "nets.py:stripes"],
            6,
            ["The model Draws returns different outputs for the same inputs"],
        ),
    ],
)
def test_an_error_of_the_user_or_the_machine_has_its_exit_code_and_a_fix(kirsch, arguments, code, sentences):
    exit_code, _, err = kirsch(*arguments)
    message = " ".join(err.split())
    assert exit_code == code, message
    labels = [line.split()[0] for line in err.splitlines() if line[0] != " "]
    assert labels in (["error", "why", "fix"], ["error", "fix"])
    for sentence in sentences:
        assert sentence in message


@pytest.mark.parametrize(
    ("error", "code", "what", "why"),
    [
        ("ValueError('boom')", 4, "The code of the model or the data failed", "ValueError: boom (models.py:"),
        ("SystemExit(0)", 4, "The code of the model or the data failed", "SystemExit: 0 (models.py:"),
        ("FileNotFoundError(2, 'gone', 'x')", 4, "The code of the model or the data failed", "FileNotFoundError"),
        ("MemoryError()", 5, "The memory is not sufficient", "MemoryError"),
        ("OSError(28, 'No space left on device')", 5, "The work cannot continue", "No space left"),
        ("KeyboardInterrupt()", 130, "The command was stopped", ""),
    ],
)
@pytest.mark.parametrize(("at", "when"), [(1, "in the checks before the first step"), (30, "in the step 'train'")])
def test_the_error_for_an_exception_in_forward_names_line_step_and_batch_size(
    run_json, monkeypatch, error, code, what, why, at, when
):
    monkeypatch.setenv("AT", str(at))
    monkeypatch.setenv("ERROR", error)
    changes = ("teacher.model=models.py:counted", "student=null", "distill=null", "prune.importance=magnitude")
    arguments = ("compress", "recipe.yaml", *(word for change in changes for word in ("--set", change)))
    content = run_json(*arguments, "--run", "run", code=code)["error"]
    first = "Counted does not run on a batch whose inputs are"
    assert content["what"].startswith(what) or first in content["what"]
    assert why in content["why"]
    assert code == 130 or when in content["what"] or first in content["what"]
    assert code != 5 or "MemoryError" not in error or "batch size" in content["fix"]


def test_an_output_file_is_written_although_the_model_changes_the_working_folder_and_the_warning_filters(
    run_json, folder
):
    run_json("plan", "models.py:moves", "--macs", "0.7", "-o", "plan.json")
    assert (folder / "plan.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["trace", "models.py:loud"],
        ["store", "build", "kept", "--model", "models.py:loud", "--data", "models.py:noisy_stripes"],
        ["compress", "recipe.yaml", "--dry-run", "--set", "data.source=models.py:noisy_stripes"],
    ],
)
def test_with_json_only_the_json_object_goes_to_the_standard_output(process, folder, arguments):
    with process("-m", "kirsch", *arguments, "--json", cwd=folder) as started:
        out, err = started.communicate(timeout=120)
    assert isinstance(json.loads(out), dict)
    assert out.count("\n") == 1
    assert "printed at import" in err
    assert "held back until the end" in err
    if "models.py:loud" in arguments:
        assert {"printed", "written", "put", "echoed", "printed at build"} <= set(err.splitlines())
    if "noisy_stripes" in arguments[-1]:
        assert {"printed by the data", "echoed by the data"} <= set(err.splitlines())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["plan", "models.py:loud", "--macs", "0.7"], 0),
        (["prune", "models.py:loud", "--macs", "0.7", "-o", "small"], 0),
        (["export", "models.py:loud", "-o", "net.onnx"], 0),
        (["measure", "models.py:loud", "--rounds", "6"], 0),
        (["trace", "models.py:fails_when_built"], 4),
    ],
)
def test_the_standard_output_is_restored_after_a_call_of_main_with_json(capfd, arguments, code):
    assert main([*arguments, "--json"]) == code
    out, err = capfd.readouterr()
    assert isinstance(json.loads(out), dict)
    assert code or {"written", "put", "echoed", "printed at build"} <= set(err.splitlines())
    os.write(1, b"still there\n")
    assert capfd.readouterr().out == "still there\n"


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize("name", ["typer", "nets"])
def test_control_c_during_imports_writes_one_line_and_exits_with_130(process, folder, name, more):
    """The signal is sent during the import of a dependency of Kirsch, or of the model's file."""
    (folder / f"{name}.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.path.insert(0, '')\n"
        "from kirsch.cli import main; sys.exit(main())"
    )
    with process("-c", program, "trace", "nets.py:chain", *more, cwd=folder) as started:
        out, err = started.communicate(timeout=60)
    assert started.returncode == 130
    if more:
        assert (json.loads(out)["error"]["exit_code"], err) == (130, "")
    else:
        assert (out, err) == ("", "stopped The command was stopped by SIGINT.\n")


def test_an_ignored_interrupt_stays_ignored(process, folder):
    (folder / "signals.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfrom nets import chain\n"
    )
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from kirsch.cli import main; sys.exit(main())"
    )
    with process("-c", program, "trace", "signals.py:chain", cwd=folder) as started:
        out, err = started.communicate(timeout=60)
    assert (started.returncode, err) == (0, "")
    assert out.startswith("Sequential")


@pytest.mark.parametrize("mode", [(), ("--json",)])
def test_a_full_device_as_standard_output_gives_an_error(process, folder, mode):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("w") as stdout, process("-m", "kirsch", "methods", *mode, cwd=folder, stdout=stdout) as started:
        _, err = started.communicate(timeout=60)
    assert started.returncode == 5
    assert err.startswith("error   The standard output cannot be written.")


def test_a_closed_pipe_ends_the_command_without_a_message(process, folder):
    with process("-m", "kirsch", "methods", cwd=folder) as started:
        started.stdout.close()
        assert started.stderr.read() == ""
    assert started.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("closed", ["1", "012"])
def test_the_command_works_with_closed_streams(process, folder, closed):
    program = (
        f"import os, sys\nfor number in {closed!r}: os.close(int(number))\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'kirsch', 'trace', 'nets.py:chain', '--json'])"
    )
    with process("-c", program, cwd=folder) as started:
        out, _ = started.communicate(timeout=60)
    assert started.returncode == 0
    assert "1" in closed or json.loads(out)["model"] == "Sequential"
