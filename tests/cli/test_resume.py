"""A run that is killed or stopped at any moment and resumed has the same bits as an uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kirsch import files
from kirsch.recipes import integrity
from tiny import write_job

pytest.importorskip("torch")

STEPS = ["train", "distill", "prune", "recover", "export"]

FORK_SERVER = '''
"""Runs the recipe once, so that all modules are loaded, and then forks a process for each request.

Importing PyTorch in each process would take seconds. The forked processes are real processes, and can be killed.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from kirsch.cli import main
from kirsch.data.batches import ArrayData
from kirsch.jobs.job import Job


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Returns True only at call number `times`."""

    def __init__(self, times):
        self.left = times

    def __call__(self):
        self.left -= 1
        return self.left == 0


def at_event(step, event, times):
    """Kill the process after an event was written."""
    emit, due = Job.emit, Countdown(times)

    def emit_and_die(self, content):
        emit(self, content)
        if content["event"] == event and step in (content.get("step"), content.get("key")) and due():
            die()

    Job.emit = emit_and_die


def in_event(step, event, times):
    """Kill the process when the line of an event is half written."""
    emit, due = Job.emit, Countdown(times)

    def write_half_and_die(self, content):
        if content["event"] == event and step in (content.get("step"), content.get("key")) and due():
            with (self.folder / "events.jsonl").open("a") as file:
                file.write(json.dumps(content)[:25])
            die()
        emit(self, content)

    Job.emit = write_half_and_die


def before_rename(name, times):
    """Kill the process before a temporary file or folder gets this name."""
    replace, due = Path.replace, Countdown(times)

    def die_or_replace(self, target):
        if name in ("", Path(target).name) and due():
            die()
        return replace(self, target)

    Path.replace = die_or_replace


def after_rename(name, times):
    """Kill the process after a file or folder got this name."""
    replace, due = Path.replace, Countdown(times)

    def replace_and_die(self, target):
        result = replace(self, target)
        if Path(target).name == name and due():
            die()
        return result

    Path.replace = replace_and_die


def in_removal(name, times):
    """Kill the process when a part of a folder is removed."""
    remove, due = shutil.rmtree, Countdown(times)

    def remove_part_and_die(path, *rest, **options):
        if Path(path).name.startswith(name) and due():
            next(iter(sorted(Path(path).iterdir()))).unlink()
            die()
        return remove(path, *rest, **options)

    shutil.rmtree = remove_part_and_die


def signaled(number, batch, again):
    """Send a signal to the process before a batch, once or twice."""
    epoch, due = ArrayData.epoch, Countdown(batch)

    def batches(self, *arguments):
        for pair in epoch(self, *arguments):
            if due():
                for _ in range(1 + again):
                    os.kill(os.getpid(), number)
            yield pair

    ArrayData.epoch = batches


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore SIGINT, and Kirsch keeps ignored signals
main(["compress", "recipe.yaml", "--run", "uninterrupted", "--quiet"])
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            os.dup2(os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        if request["plant"] is not None:
            globals()[request["plant"][0]](*request["plant"][1:])
        os._exit(main(request["arguments"]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''


class ForkServer:
    """Runs processes of the `kirsch` command, one after the other.

    Args:
        started: a process of `FORK_SERVER`.
        base: working folder of the process, with the files of the recipe and the run `uninterrupted`.
    """

    def __init__(self, started, base):
        self.started = started
        self.base = base
        lines = iter(started.stdout.readline, "")
        assert "ready\n" in lines, "the uninterrupted run has failed"

    def begin(self, *arguments, plant=None) -> int:
        """Start a process with a planted failure, and return the process id."""
        request = {"arguments": arguments, "plant": plant, "output": str(self.base / "output.txt")}
        self.started.stdin.write(json.dumps(request) + "\n")
        self.started.stdin.flush()
        return int(self.started.stdout.readline())

    def end(self) -> int:
        """Return the exit code of the last process; if a signal killed the process, minus the signal number."""
        return int(self.started.stdout.readline())

    def run(self, *arguments, plant=None) -> int:
        """Run a process to its end, and return the exit code as `end` does."""
        self.begin(*arguments, plant=plant)
        return self.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    recipe = write_job(base)
    recipe.write_text(recipe.read_text().replace("- measure: {rounds: 10}\n", ""))
    # With several threads, forking is not safe, and the order of sums is not fixed.
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORK_SERVER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=base, env=environment, text=True) as started:
        yield ForkServer(started, base)
        started.stdin.close()


@pytest.fixture
def run(server):
    """Yield the folder of a run that is not started yet, and remove the folder afterwards."""
    folder = server.base / "run"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def assert_same_run(run, reference):
    """Check that all files and metrics are equal, except durations."""
    assert not list(run.rglob(f"{files.TEMPORARY}*")), "temporary files are left"
    assert not list(run.glob("checkpoints/*/step-*")), "checkpoints of finished steps are left"
    for step in STEPS:
        for path in sorted((reference / "checkpoints" / step / "done").rglob("*")):
            if path.suffix in (".safetensors", ".npy") or path.name == "plan.json":
                assert (run / path.relative_to(reference)).read_bytes() == path.read_bytes(), path
        assert files.first_flaw(run / "checkpoints" / step / "done") == ""
    for name in ("plan.json", "recipe.yaml", "artifacts/model/model.safetensors", "artifacts/model/plan.json"):
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    assert (run / "artifacts" / "model.onnx").read_bytes() == (reference / "artifacts" / "model.onnx").read_bytes()
    found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (run, reference))
    for key in ("goal", "models", "quality", "removals", "not_measured"):
        assert found[key] == expected[key], key
    for first, second in zip(found["curves"], expected["curves"], strict=True):
        assert first | {"seconds": 0} == second | {"seconds": 0}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert events[-1]["event"] == "end"
    checked = integrity.check(run)
    assert (checked.finished, checked.problems) == (True, [])


KILL_SEQUENCES = {
    "training of the teacher": [
        ("at_event", "train", "first_batch", 1),  # in the first epoch
        ("before_rename", "step-00001-000000", 1),  # the first checkpoint is not complete
        ("before_rename", "values.json", 2),  # a file of the second checkpoint is not complete
        ("at_event", "train", "epoch", 2),  # the epoch is done, and not saved
        ("in_removal", ".tmp-step-", 1),  # an old checkpoint is partly removed
        ("before_rename", "done", 1),  # the step is done, and its folder has a temporary name
        ("after_rename", "done", 1),  # the step is complete, and its checkpoints are not removed
    ],
    "from distillation to recovery": [
        ("at_event", "train", "step_end", 1),  # between two steps
        ("at_event", "distill", "epoch", 2),
        ("before_rename", "model", 1),  # the pruned model is not complete
        ("in_event", "recover", "epoch", 2),  # a line of the events is half written
        ("before_rename", "step-00002-000000", 1),
    ],
    "from export to report": [
        ("before_rename", "model.onnx", 1),
        ("after_rename", "model.onnx", 1),  # the file exists, and its step is not done
        ("before_rename", "metrics.json", 1),
        ("after_rename", "metrics.json", 1),
        ("before_rename", "manifest.json", 1),  # the end event is written
        ("after_rename", "manifest.json", 1),  # run.json is not updated
        ("before_rename", "run.json", 1),
    ],
}


@pytest.mark.parametrize("kills", KILL_SEQUENCES.values(), ids=KILL_SEQUENCES)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(server, run, kills):
    first, *others = kills
    assert server.run("compress", "recipe.yaml", "--run", "run", plant=first) == -signal.SIGKILL
    for kill in others:
        assert server.run("verify", "run") in (0, 3), "a kill must not look like damage"
        assert server.run("resume", "run", plant=kill) == -signal.SIGKILL, kill
    assert server.run("verify", "run") in (0, 3)
    assert server.run("resume", "run") == 0
    assert_same_run(run, server.base / "uninterrupted")


def test_a_finished_run_stays_valid_if_resuming_is_killed(server, run):
    shutil.copytree(server.base / "uninterrupted", run)
    for kill in (
        ("before_rename", "run.json", 1),
        ("after_rename", "run.json", 1),
        ("before_rename", "environment.json", 1),
        ("at_event", "recover", "step_kept", 1),
    ):
        assert server.run("resume", "run", plant=kill) == -signal.SIGKILL, kill
        assert server.run("verify", "run") in (0, 3), kill
    assert server.run("resume", "run") == 0
    assert_same_run(run, server.base / "uninterrupted")


def test_a_run_that_is_killed_many_times_equals_an_uninterrupted_run(server, run):
    """Each process is killed four renames later than the previous one. The first kills leave an incomplete folder."""
    killed = 0
    for number in range(1, 200, 4):
        code = server.run("compress", "recipe.yaml", "--run", "run", plant=("before_rename", "", number))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed > 5
    assert_same_run(run, server.base / "uninterrupted")


def test_a_run_that_is_killed_at_an_arbitrary_instruction_equals_an_uninterrupted_run(server, run):
    child = server.begin("compress", "recipe.yaml", "--run", "run")
    events = run / "events.jsonl"
    deadline = time.monotonic() + 60
    while not (events.is_file() and '"step": "distill"' in events.read_text()) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert server.end() == -signal.SIGKILL
    assert server.run("resume", "run") == 0
    assert_same_run(run, server.base / "uninterrupted")


def test_a_run_that_is_stopped_within_an_epoch_equals_an_uninterrupted_run(server, run):
    """An epoch has three batches. The teacher is trained for six epochs, the student for four.

    The second resumed process trains 13 batches of the teacher and 3 · 4 of the student before the recovery starts.
    """
    for arguments, number, batch, code, checkpoint in (
        (("compress", "recipe.yaml", "--run"), signal.SIGINT, 2, 130, "train/step-00000-000002"),
        (("resume",), signal.SIGTERM, 3, 75, "train/step-00001-000002"),
        (("resume",), signal.SIGTERM, 13 + 3 * 4 + 1, 75, "recover/step-00000-000001"),
    ):
        assert server.run(*arguments, "run", plant=("signaled", number, batch, 0)) == code
        assert (run / "checkpoints" / checkpoint).is_dir()
    assert server.run("resume", "run") == 0
    assert_same_run(run, server.base / "uninterrupted")


def test_a_run_that_is_ended_by_a_second_signal_equals_an_uninterrupted_run(server, run):
    """The second signal ends the process without a checkpoint of the current epoch."""
    plant = ("signaled", signal.SIGINT, 3 * 6 + 3 + 2, 1)
    assert server.run("compress", "recipe.yaml", "--run", "run", plant=plant) == 130
    assert [path.name for path in run.glob("checkpoints/distill/step-*")] == ["step-00001-000000"]
    assert server.run("resume", "run") == 0
    assert_same_run(run, server.base / "uninterrupted")


def test_a_run_that_was_killed_before_its_start_is_started_again(server, run):
    """The process is killed before it writes its first file, then before run.json, without which there is no run."""
    for name in ("recipe.yaml", "run.json"):
        plant = ("before_rename", name, 1)
        assert server.run("compress", "recipe.yaml", "--run", "run", plant=plant) == -signal.SIGKILL
        assert list(run.glob(f"{files.TEMPORARY}*"))
        assert server.run("resume", "run") == 4
    assert "Start a run: kirsch compress" in (server.base / "output.txt").read_text()
    assert server.run("compress", "recipe.yaml", "--run", "run") == 0
    assert_same_run(run, server.base / "uninterrupted")
