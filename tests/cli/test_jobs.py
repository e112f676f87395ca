"""The subcommands for recipes and runs: compress, resume, verify, report and init."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kirsch import __version__, files
from kirsch.cli import jobs, main
from kirsch.recipes import manifest
from kirsch.recipes.recipe import read_recipe
from kirsch.tables import plain

pytest.importorskip("torch")

STEPS = ["train", "distill", "prune", "recover", "export", "measure"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_job):
    """Return a folder with a finished run in `run`, the exit code and the output. Tests must not change the folder."""
    folder = tmp_path_factory.mktemp("job")
    write_job(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main(["compress", "recipe.yaml", "--run", "run"])
    return folder, code, out.getvalue()


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """Return a copy of the finished run in the working folder."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_a_run_prints_a_header_one_line_per_step_and_the_verdict(finished):
    _, code, out = finished
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == f"kirsch {__version__} · stripes · run run"
    assert lines[1].startswith("goal  prune: MACs ≤ 60 % of the student")
    assert [line.split()[1] for line in lines if line[:2].strip().isdigit()] == STEPS
    assert sum(" epoch " in line for line in lines) == 6 + 6 + 2
    assert lines[-3].startswith("goal met     prune: MACs ")
    assert lines[-2] == "report       run/report.html"


def test_a_run_folder_has_the_documented_files(finished):
    names = {path.name for path in (finished[0] / "run").iterdir()} - {".lock"}
    assert names == {
        "recipe.yaml",
        "run.json",
        "plan.json",
        "events.jsonl",
        "metrics.json",
        "checkpoints",
        "artifacts",
        "report.html",
        "environment.json",
        "manifest.json",
    }


def test_resuming_a_finished_run_keeps_all_steps(run, kirsch):
    before = files.sha256(run / "artifacts" / "model.onnx")
    code, out, _ = kirsch("resume", "run")
    steps = [line for line in out.splitlines() if line[:2].strip().isdigit()]
    assert code == 0
    assert all(line.endswith(" kept") for line in steps)
    assert files.sha256(run / "artifacts" / "model.onnx") == before


def test_json_contains_the_metrics_and_progress_goes_to_the_standard_error(run, kirsch):
    code, out, err = kirsch("resume", "run", "--json")
    content = json.loads(out)
    assert content["exit_code"] == code == 0
    assert content["metrics"] == json.loads((run / "metrics.json").read_text())
    assert [step["key"] for step in content["metrics"]["steps"]] == STEPS
    assert " 1 train" in err


def test_quiet_prints_only_the_verdict(run, kirsch):
    code, out, err = kirsch("resume", "run", "--quiet")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["goal", "report", "took"]


def test_a_missed_goal_has_exit_code_3(run, kirsch):
    code, out, _ = kirsch(
        "compress",
        "recipe.yaml",
        "--run",
        "missed",
        "--set",
        "goal.speedup=1000",
        "--set",
        "measure.rounds=10",
        "--set",
        "train.epochs=4",
    )
    assert code == 3
    assert "\ngoal missed  " in out


def test_verify_accepts_an_undamaged_run(finished, run, run_json):
    found = run_json("verify", "run")
    assert (found["sound"], found["finished"], found["uncovered"]) == (True, True, [])
    assert found["folders"] >= len(STEPS)
    assert found["files"] == len(covered(finished[0] / "run")) - 1  # the manifest does not list itself


def test_verify_shows_a_run_without_manifest_as_not_finished(run, kirsch, run_json):
    manifest.remove(run)
    found = run_json("verify", "run", code=3)
    assert (found["sound"], found["finished"], found["done"]) == (False, False, found["steps"])
    (run / "checkpoints" / "recover").rename(run.parent / "recover")
    (run / "checkpoints" / "export").rename(run.parent / "export")
    (run / "checkpoints" / "measure").rename(run.parent / "measure")
    code, out, _ = kirsch("verify", "run")
    assert code == 3
    assert out.startswith("not finished run: 3 of 6 steps are done; ")
    assert "sound" not in out


def covered(run) -> list:
    """Return all files of a run except the lock."""
    return sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_verify_names_the_file_of_a_flipped_bit(run, kirsch, data):
    path = data.draw(st.sampled_from(covered(run)))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    before = path.read_bytes()
    path.write_bytes(content)
    code, _, err = kirsch("verify", "run")
    path.write_bytes(before)
    assert code == 4
    assert str(path.relative_to(run)) in err


def test_verify_names_all_damaged_files(run, kirsch):
    (run / "artifacts" / "model.onnx").unlink()
    (run / "checkpoints" / "train" / "done" / files.MANIFEST).unlink()
    (run / "plan.json").write_text("{")
    code, _, err = kirsch("verify", "run")
    assert code == 4
    lines = [line.strip() for line in err.splitlines()]
    assert lines[0] == "error   The run run is damaged:"
    assert set(lines[1:-1]) == {
        "run/artifacts/model.onnx is missing",
        "run/checkpoints/train/done/manifest.json is missing",
        "run/plan.json does not have the sha256 that its manifest states",
    }


@pytest.mark.parametrize("subcommand", ["verify", "resume", "report"])
def test_a_folder_that_is_not_a_run_is_refused(kirsch, folder, subcommand):
    code, out, err = kirsch(subcommand, ".")
    assert (code, out) == (4, "")
    assert err.startswith("error   . is not a run folder")
    assert sorted(path.name for path in folder.iterdir()) == ["nets.py", "recipe.yaml"]


def test_verify_says_that_a_folder_was_written_by_prune(kirsch, folder):
    assert kirsch("prune", "nets.py:student", "--macs", "0.6", "--input", "1,1,6,6", "-o", "small")[0] == 0
    for subcommand in ("verify", "resume"):
        code, _, err = kirsch(subcommand, "small")
        assert code == 4
        assert "small is not a run folder: it is a folder written by kirsch prune." in err
        assert "Give it to other commands as --pruned small, or load it with kirsch.load" in err


def test_report_writes_the_report_from_the_metrics(run, kirsch):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    code, out, _ = kirsch("report", "run")
    assert (code, out) == (0, "report       run/report.html\n")
    assert (run / "report.html").read_text() == before


@pytest.mark.parametrize(
    ("content", "sentence"), [("{", "metrics.json is damaged."), ("[]", "an object is expected, and a list was found")]
)
def test_report_refuses_damaged_metrics(run, kirsch, content, sentence):
    (run / "metrics.json").write_text(content)
    code, _, err = kirsch("report", "run")
    assert code == 4
    assert sentence in err


def test_report_refuses_altered_metrics(run, kirsch):
    before = (run / "report.html").read_bytes()
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["models"][-1]["accuracy"]["value"] = 1.0
    files.write_json(path, metrics)
    code, _, err = kirsch("report", "run")
    assert code == 4
    assert "metrics.json does not have the sha256 that its manifest states" in err
    assert "kirsch resume run" in err
    assert (run / "report.html").read_bytes() == before


def test_a_report_that_is_written_again_keeps_the_run_valid(run, kirsch):
    original = (run / "report.html").read_text()
    (run / "report.html").write_text("another version")
    manifest.remove(run)
    manifest.write(run)
    assert kirsch("verify", "run")[0] == kirsch("report", "run")[0] == kirsch("verify", "run")[0] == 0
    assert (run / "report.html").read_text() == original


def test_report_does_not_hide_other_damage(run, kirsch):
    (run / "report.html").write_text("altered")
    (run / "plan.json").write_text("{}")
    assert kirsch("report", "run")[0] == 0
    code, _, err = kirsch("verify", "run")
    assert code == 4
    assert [line.strip() for line in err.splitlines()[1:-1]] == [
        "run/plan.json does not have the sha256 that its manifest states"
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: text.replace('"quality"', '"quantity"', 1), "quality is missing"),
        (lambda text: text.replace('"models"', '"model"', 1), "models is missing"),
        (lambda text: text.replace('"name"', '"name": "x", "name"', 1), "the key 'name' is given twice"),
        (lambda text: "[" * 100_000 + "]" * 100_000, "nested more than 100 levels"),
        (lambda text: text.replace("true", "NaN", 1), "NaN is not a JSON number"),
    ],
)
def test_invalid_metrics_are_refused_by_report_and_verify(run, kirsch, change, sentence):
    path = run / "metrics.json"
    path.write_text(change(path.read_text()))
    code, _, err = kirsch("report", "run")
    assert code == 4
    assert "run/metrics.json is damaged" in err
    assert sentence in err
    code, _, err = kirsch("verify", "run")
    assert code == 4
    assert "run/metrics.json does not have the sha256 that its manifest states" in err


@pytest.mark.parametrize("text", ["[" * 100_000, '{"base": ".", "base": ".."}', '{"base": NaN}'])
def test_an_invalid_run_json_is_found_and_restored(run, kirsch, text):
    (run / "run.json").write_text(text)
    code, _, err = kirsch("verify", "run")
    assert code == 4
    assert "run/run.json" in err
    assert kirsch("resume", "run")[0] == 0
    assert kirsch("verify", "run")[0] == 0


def test_a_dry_run_names_the_weights_by_which_the_plan_ranks_units(folder, kirsch):
    dry = ("compress", "recipe.yaml", "--dry-run")
    assert "with the weights of nets.py:student before training" in kirsch(*dry)[1]
    trained = ("--set", "student=null", "--set", "distill=null", "--set", "recover=null")
    assert "with the weights of nets.py:teacher before training" in kirsch(*dry, *trained)[1]
    out = kirsch(*dry, *trained, "--set", "train=null")[1]
    assert "with the weights that nets.py:teacher comes with" in out
    assert "untrained" not in out


def test_a_dry_run_shows_the_steps_and_writes_nothing(folder, kirsch, run_json):
    found = run_json("compress", "recipe.yaml", "--dry-run")
    code, out, _ = kirsch("compress", "recipe.yaml", "--dry-run")
    assert code == 0
    assert [step["key"] for step in found["steps"]] == STEPS
    assert [line.split()[1] for line in out.splitlines() if line[:2].strip().isdigit()] == STEPS
    cost = found["plans"]["prune"]["cost"]
    assert cost["after"]["macs"] <= 0.6 * cost["before"]["macs"]
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == ["nets.py", "recipe.yaml"]


def test_a_dry_run_with_a_run_folder_writes_only_recipe_and_plan(folder, kirsch):
    code, out, _ = kirsch("compress", "recipe.yaml", "--dry-run", "--run", "soon")
    assert code == 0
    assert sorted(path.name for path in (folder / "soon").iterdir()) == ["plan.json", "recipe.yaml"]
    assert out.splitlines()[-1] == "written      soon: recipe.yaml, plan.json"


def test_a_dry_run_does_not_replace_a_recipe(folder, kirsch):
    before = (folder / "recipe.yaml").read_text()
    code, _, err = kirsch("compress", "recipe.yaml", "--dry-run", "--run", ".")
    assert (code, err.splitlines()[0]) == (5, "error   The folder . is not empty.")
    assert (folder / "recipe.yaml").read_text() == before


def test_a_dry_run_names_missing_packages():
    content = {
        "name": "n",
        "goals": ["g"],
        "expected": [],
        "data": {"name": "d", "train": 1, "validation": 2, "test": 3},
        "steps": [],
    }
    content |= {"plans": {}, "seconds": 1.0, "disk_bytes": 1, "missing": ["onnx"], "notes": []}
    assert plain(jobs.forecast_lines(content)[-1]) == "missing      onnx; see kirsch doctor"


def test_init_writes_the_built_in_recipe(folder, kirsch):
    code, out, _ = kirsch("init", "new.yaml")
    assert code == 0
    assert "kirsch compress new.yaml" in out
    assert read_recipe(folder / "new.yaml") == read_recipe(jobs.DEFAULT)


def test_init_does_not_replace_a_file(folder, kirsch):
    before = (folder / "recipe.yaml").read_text()
    code, _, err = kirsch("init")
    assert code == 5
    assert err.splitlines()[:2] == ["error   recipe.yaml already exists.", "why     It is not replaced."]
    assert (folder / "recipe.yaml").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent.yaml"], "The recipe absent.yaml cannot be read."),
        (["recipe.yaml", "--set", "prune"], "--set 'prune' is not a change of a key."),
        (["recipe.yaml", "--set", "prune.gaol.macs=1"], "prune.gaol: unknown key. Known: "),
        (["recipe.yaml", "--set", "prune.goal.macs=.nan"], "prune.goal.macs"),
        (["recipe.yaml", "--set", "train.epochs=ten"], "train.epochs"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_work(folder, kirsch, arguments, sentence):
    code, out, err = kirsch("compress", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert not (folder / "runs").exists()


def test_the_command_line_takes_precedence_over_the_environment(folder, monkeypatch):
    monkeypatch.setenv("KIRSCH_RECIPE__PRUNE__GOAL__MACS", "0.3")
    assert jobs.read("recipe.yaml", [])[0].all_steps["prune"].goal.macs == 0.3
    assert jobs.read("recipe.yaml", ["prune.goal.macs=0.7"])[0].all_steps["prune"].goal.macs == 0.7


def test_the_built_in_recipe_is_the_default(folder):
    recipe, base = jobs.read("", [])
    assert recipe.name == "digits"
    assert jobs.folder_for(recipe, "").parent.name == "runs"
    assert (folder / base).samefile(folder)


def test_an_unwritable_run_folder_is_refused_before_any_work(folder, kirsch):
    (folder / "file").write_text("")
    code, _, err = kirsch("compress", "recipe.yaml", "--run", "file")
    assert code == 5
    assert err.startswith("error   file is a file.")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_run_shows_the_resume_command_and_can_be_verified(folder, process, kirsch, number, code):
    command = ["-m", "kirsch.cli", "compress", "recipe.yaml", "--run", "run", "--set", "train.epochs=2000"]
    with process(*command, cwd=folder) as started:
        for line in started.stdout:
            if " epoch " in line:
                break
        started.send_signal(number)
        err = started.stderr.read()
        assert started.wait(60) == code
    assert err.splitlines()[-1] == "fix     Continue with: kirsch resume run"
    assert list((folder / "run" / "checkpoints" / "train").glob("step-*"))
    code, out, _ = kirsch("verify", "run")
    assert code == 3
    first, second, third = out.splitlines()
    assert first == "not finished run: 0 of 6 steps are done; continue with kirsch resume run"
    assert re.fullmatch(
        r"verified     \d files in \d folders?: the sha256 of each matches the manifest of its folder", second
    )
    assert third.startswith("not verified run.json, recipe.yaml, events.jsonl, environment.json: no hash is stored ")
