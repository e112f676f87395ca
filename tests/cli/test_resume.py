"""A run that was killed or stopped at any moment goes on, and ends in the same bits as one that was left alone."""

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
from kirsch.recipes import soundness
from tiny import write_job

pytest.importorskip("torch")

STAGES = ["teacher", "distill", "prune", "recover", "export"]

NURSERY = '''
"""Does a job once, so that everything is loaded, and then forks a process for each order that it reads.

A process that imports PyTorch anew takes seconds; these are real processes all the same, and are killed as such.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from kirsch.cli import main
from kirsch.frameworks.data import ArrayData
from kirsch.recipes.job import Job


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Says once that something happened for the nth time."""

    def __init__(self, times):
        self.left = times

    def __call__(self):
        self.left -= 1
        return self.left == 0


def at_event(stage, event, times):
    """Killed after an event was written."""
    tell, due = Job.tell, Countdown(times)

    def told(self, happening):
        tell(self, happening)
        if happening["event"] == event and stage in (happening.get("stage"), happening.get("key")) and due():
            die()

    Job.tell = told


def in_event(stage, event, times):
    """Killed while the line of an event is half written."""
    tell, due = Job.tell, Countdown(times)

    def told(self, happening):
        if happening["event"] == event and stage in (happening.get("stage"), happening.get("key")) and due():
            with (self.folder / "events.jsonl").open("a") as file:
                file.write(json.dumps(happening)[:25])
            die()
        tell(self, happening)

    Job.tell = told


def before_rename(name, times):
    """Killed when all that shall get this name is written, under another one."""
    replace, due = Path.replace, Countdown(times)

    def replaced(self, target):
        if name in ("", Path(target).name) and due():
            die()
        return replace(self, target)

    Path.replace = replaced


def after_rename(name, times):
    """Killed as soon as something has got its name."""
    replace, due = Path.replace, Countdown(times)

    def replaced(self, target):
        found = replace(self, target)
        if Path(target).name == name and due():
            die()
        return found

    Path.replace = replaced


def in_removal(name, times):
    """Killed when half of a folder is removed."""
    remove, due = shutil.rmtree, Countdown(times)

    def removed(path, *rest, **options):
        if Path(path).name.startswith(name) and due():
            next(iter(sorted(Path(path).iterdir()))).unlink()
            die()
        return remove(path, *rest, **options)

    shutil.rmtree = removed


def signaled(number, batch, again):
    """Sent a signal, once or twice, before a batch is given out."""
    epoch, due = ArrayData.epoch, Countdown(batch)

    def batches(self, *given):
        for pair in epoch(self, *given):
            if due():
                for _ in range(1 + again):
                    os.kill(os.getpid(), number)
            yield pair

    ArrayData.epoch = batches


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored, which Kirsch respects
main(["compress", "recipe.yaml", "--run", "whole", "--quiet"])
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            os.dup2(os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        if order["plant"] is not None:
            globals()[order["plant"][0]](*order["plant"][1:])
        os._exit(main(order["arguments"]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''


class Nursery:
    """Processes of the `kirsch` command, one after the other.

    Args:
        started: a process of `NURSERY`.
        base: its working folder, with the files of the job and the run `whole`, which was left alone.
    """

    def __init__(self, started, base):
        self.started = started
        self.base = base
        lines = iter(started.stdout.readline, "")
        assert "ready\n" in lines, "the job that was left alone has failed"

    def begin(self, *arguments, plant=None) -> int:
        """Start a process, with something that shall happen to it; gives its id."""
        order = {"arguments": arguments, "plant": plant, "output": str(self.base / "output.txt")}
        self.started.stdin.write(json.dumps(order) + "\n")
        self.started.stdin.flush()
        return int(self.started.stdout.readline())

    def end(self) -> int:
        """The exit code of the process that was started last; minus the number of the signal that killed it."""
        return int(self.started.stdout.readline())

    def do(self, *arguments, plant=None) -> int:
        self.begin(*arguments, plant=plant)
        return self.end()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    base = tmp_path_factory.mktemp("nursery")
    recipe = write_job(base)
    recipe.write_text(recipe.read_text().replace("measure: {rounds: 10}", "measure: null"))
    # One thread: forking with more is not safe, and only on one are sums always taken in one order.
    surroundings = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NURSERY]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=base, env=surroundings, text=True) as started:
        yield Nursery(started, base)
        started.stdin.close()


@pytest.fixture
def run(nursery):
    """The folder of a run that has not begun, beside the files of the job."""
    folder = nursery.base / "run"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def assert_same_run(run, whole):
    """Weights, scores, plans and the exported file are equal bit for bit, and so are all figures but times."""
    assert not list(run.rglob(f"{files.TEMPORARY}*")), "half written files were left"
    assert not list(run.glob("checkpoints/*/step-*")), "checkpoints of finished stages were left"
    for stage in STAGES:
        for path in sorted((whole / "checkpoints" / stage / "done").rglob("*")):
            if path.suffix in (".safetensors", ".npy") or path.name == "plan.json":
                assert (run / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
        assert files.first_flaw(run / "checkpoints" / stage / "done") == ""
    for name in ("plan.json", "recipe.yaml", "artifacts/model/model.safetensors", "artifacts/model/plan.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert (run / "artifacts" / "model.onnx").read_bytes() == (whole / "artifacts" / "model.onnx").read_bytes()
    found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (run, whole))
    for key in ("goal", "models", "quality", "removed", "verification", "not_measured"):
        assert found[key] == expected[key], key
    for first, second in zip(found["curves"], expected["curves"], strict=True):
        assert first | {"seconds": 0} == second | {"seconds": 0}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert events[-1]["event"] == "end"
    found = soundness.check(run)
    assert (found.finished, found.wrong) == (True, [])


CHAINS = {
    "while the teacher trains": [
        ("at_event", "teacher", "first_batch", 1),  # in the first epoch
        ("before_rename", "step-00001-000000", 1),  # the first checkpoint is half written
        ("before_rename", "values.json", 2),  # a file of the second is
        ("at_event", "teacher", "epoch", 2),  # the third epoch is done and told, and not saved
        ("in_removal", ".tmp-step-", 1),  # an old checkpoint is half removed
        ("before_rename", "done", 1),  # the stage is done, and not sealed
        ("after_rename", "done", 1),  # it is sealed, with its checkpoints still there
    ],
    "from the student to the recovery": [
        ("at_event", "teacher", "stage_end", 1),  # between two stages
        ("at_event", "distill", "epoch", 2),
        ("before_rename", "model", 1),  # the pruned model is half written
        ("in_event", "recover", "epoch", 2),  # a line of events is half written
        ("before_rename", "step-00002-000000", 1),
    ],
    "from the export to the report": [
        ("before_rename", "model.onnx", 1),
        ("after_rename", "model.onnx", 1),  # it lies there, and its stage is not done
        ("before_rename", "metrics.json", 1),
        ("after_rename", "metrics.json", 1),
        ("before_rename", "manifest.json", 1),  # the run has told its end
        ("after_rename", "manifest.json", 1),  # that is not in run.json yet
        ("before_rename", "run.json", 1),
    ],
}


@pytest.mark.parametrize("kills", CHAINS.values(), ids=CHAINS)
def test_a_run_that_is_killed_and_resumed_ends_in_the_same_bits(nursery, run, kills):
    first, *others = kills
    assert nursery.do("compress", "recipe.yaml", "--run", "run", plant=first) == -signal.SIGKILL
    for kill in others:
        assert nursery.do("verify", "run") in (0, 3), "what a kill leaves is no damage"
        assert nursery.do("resume", "run", plant=kill) == -signal.SIGKILL, kill
    assert nursery.do("verify", "run") in (0, 3)
    assert nursery.do("resume", "run") == 0
    assert_same_run(run, nursery.base / "whole")


def test_a_finished_run_whose_resuming_is_killed_stays_sound(nursery, run):
    """While its manifest is taken away, and after that."""
    shutil.copytree(nursery.base / "whole", run)
    for kill in (
        ("before_rename", "run.json", 1),
        ("after_rename", "run.json", 1),
        ("before_rename", "environment.json", 1),
        ("at_event", "recover", "stage_kept", 1),
    ):
        assert nursery.do("resume", "run", plant=kill) == -signal.SIGKILL, kill
        assert nursery.do("verify", "run") in (0, 3), kill
    assert nursery.do("resume", "run") == 0
    assert_same_run(run, nursery.base / "whole")


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(nursery, run):
    """Each process dies at a later one of its renames; the first ones before there is a run to resume."""
    killed = 0
    for number in range(1, 200, 4):
        code = nursery.do("compress", "recipe.yaml", "--run", "run", plant=("before_rename", "", number))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed > 5
    assert_same_run(run, nursery.base / "whole")


def test_a_run_that_is_killed_from_outside_ends_in_the_same_bits(nursery, run):
    """At whatever instruction it is just then."""
    child = nursery.begin("compress", "recipe.yaml", "--run", "run")
    events = run / "events.jsonl"
    deadline = time.monotonic() + 60
    while not (events.is_file() and '"stage": "distill"' in events.read_text()) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert nursery.end() == -signal.SIGKILL
    assert nursery.do("resume", "run") == 0
    assert_same_run(run, nursery.base / "whole")


def test_a_run_that_is_stopped_within_an_epoch_ends_in_the_same_bits(nursery, run):
    """The teacher has six epochs of three batches, the student four; dropout and augmentation are drawn on."""
    for verb, number, batch, code, checkpoint in (
        (("compress", "recipe.yaml", "--run"), signal.SIGINT, 2, 130, "teacher/step-00000-000002"),
        (("resume",), signal.SIGTERM, 3, 75, "teacher/step-00001-000002"),
        (("resume",), signal.SIGTERM, 13 + 3 * 4 + 1, 75, "recover/step-00000-000001"),
    ):
        assert nursery.do(*verb, "run", plant=("signaled", number, batch, 0)) == code
        assert (run / "checkpoints" / checkpoint).is_dir()
    assert nursery.do("resume", "run") == 0
    assert_same_run(run, nursery.base / "whole")


def test_a_second_signal_ends_a_run_at_once_and_it_ends_in_the_same_bits(nursery, run):
    """At once: without the checkpoint of the epoch that it is in."""
    plant = ("signaled", signal.SIGINT, 3 * 6 + 3 + 2, 1)
    assert nursery.do("compress", "recipe.yaml", "--run", "run", plant=plant) == 130
    assert [path.name for path in run.glob("checkpoints/distill/step-*")] == ["step-00001-000000"]
    assert nursery.do("resume", "run") == 0
    assert_same_run(run, nursery.base / "whole")


def test_a_run_that_was_killed_before_it_began_is_started_again(nursery, run):
    """Before its first file, and between that and the one that makes the folder a run."""
    for name in ("recipe.yaml", "run.json"):
        plant = ("before_rename", name, 1)
        assert nursery.do("compress", "recipe.yaml", "--run", "run", plant=plant) == -signal.SIGKILL
        assert list(run.glob(f"{files.TEMPORARY}*"))
        assert nursery.do("resume", "run") == 4
    assert "Start it: kirsch compress" in (nursery.base / "output.txt").read_text()
    assert nursery.do("compress", "recipe.yaml", "--run", "run") == 0
    assert_same_run(run, nursery.base / "whole")
