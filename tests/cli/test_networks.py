"""The subcommands for one model: trace, plan, prune, export and measure."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("torch")

CHAIN = "nets.py:chain"
TEACHER = "nets.py:teacher"


@pytest.fixture(autouse=True)
def _in_folder(folder):
    return folder


def test_trace_shows_the_cost_of_a_group(run_json):
    """The 8 channels have the weights of conv 1 → 8 (72) and conv 8 → 4 (288)."""
    found = run_json("trace", CHAIN)
    (group,) = found["groups"]
    assert found["cost"]["parameters"] == 72 + 288 + 51
    assert group["name"] == "0"
    assert group["units"] == 8
    assert group["layers"] == ["0", "2"]
    assert group["parameters"] == 72 + 288
    assert group["macs"] == 72 * 4 * 4 + 288 * 2 * 2
    assert group["footprint"] == [["0.weight", 0], ["2.weight", 1]]
    assert found["inputs"] == [[1, 1, 6, 6]]


def test_trace_prints_groups_and_blockers(kirsch):
    code, out, err = kirsch("trace", CHAIN)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "Sequential   411 parameters   2.35 k MACs for the input 1×1×6×6"
    assert lines[2] == "0       8 channels      360 parameters   2.30 k MACs   with 2"
    assert lines[4] == "blockers  reasons why parameters cannot be removed, with their share of all parameters"
    assert lines[5].split(maxsplit=2)[:2] == ["11.7", "%"]  # 48 of 411: the weights of the linear layer
    assert "a softmax is computed over the axis  aten.softmax" in lines[5]


def test_trace_explains_a_layer(kirsch, run_json):
    explanation = [
        "2.weight[:, i]: the 8 units (channel) of '0'.",
        "Each unit is removed together with:",
        "  0: weight[i]  by conv2d (2)",
    ]
    code, out, err = kirsch("trace", CHAIN, "--explain", "2")
    assert (code, out.splitlines()[:3], err) == (0, explanation, "")
    found = run_json("trace", CHAIN, "--explain", "2")
    assert (found["layer"], found["explanation"][:3]) == ("2", explanation)


@pytest.mark.parametrize("name", ["macs", "parameters", "size", "memory"])
def test_each_cost_can_be_limited(run_json, kirsch, folder, name):
    run_json("plan", CHAIN, f"--{name}", "0.8", "--round-to", "1", "-o", "plan.json")
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["goal"] == {name: 0.8}
    assert plan["cost"]["after"][name] <= 0.8 * plan["cost"]["before"][name]
    code, _, err = kirsch("plan", CHAIN, f"--{name}", "80%")
    assert code == 2
    assert "Write a fraction: 0.5 for 50 %." in err


def test_kinds_and_uniform_are_options_of_plan(run_json, kirsch, folder):
    run_json("plan", CHAIN, "--macs", "0.8", "--kinds", "channel", "--uniform", "--round-to", "1", "-o", "plan.json")
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["method"]["uniform"] is True
    assert {removal["kind"] for removal in plan["groups"]} == {"channel"}
    code, _, err = kirsch("plan", CHAIN, "--macs", "0.8", "--kinds", "channels")
    assert code == 2
    assert "Did you mean 'channel'?" in err


def test_markup_in_layer_names_is_not_interpreted(kirsch):
    code, out, _ = kirsch("trace", "nets.py:hostile")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["[red]", "<script>"]
    assert "with [/0]" in out


def test_the_input_shape_is_an_option(run_json):
    small, large = (
        run_json("trace", "nets.py:shapeless", "--input", shape)["cost"]["macs"] for shape in ("2,1,6,6", "4,1,6,6")
    )
    assert large == 2 * small


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nets.py:shapeless"], 2, "The inputs of nets.py:shapeless are unknown.*Give --input"),
        ([CHAIN, "--input", "1,a"], 2, "--input '1,a' is not a shape"),
        ([CHAIN, "--input", "1,0,6,6"], 2, "--input '1,0,6,6' is not a shape"),
        ([CHAIN, "--input", "1,3,6,6"], 4, "cannot be traced with inputs of shape .1, 3, 6, 6"),
        ([CHAIN, "--weights", "pretrained"], 2, "pretrained cannot be used for nets.py:chain"),
        ([CHAIN, "--weights", "absent.safetensors"], 4, "absent.safetensors"),
        (["chain"], 2, "'chain' is not a reference to a model"),
        (["absent.py:chain"], 4, "absent.py does not exist"),
        (["nets.py:chian"], 4, "no callable of nets.py named 'chian'"),
        (["nets.py:fails"], 4, "nets.py:fails failed. why ValueError: no such thing"),
        (["absent_module:chain"], 4, "module 'absent_module' cannot be imported"),
        (["json:dumps"], 4, "json:dumps cannot be called without arguments"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named(kirsch, arguments, code, sentence):
    exit_code, out, err = kirsch("trace", *arguments)
    assert (exit_code, out) == (code, "")
    assert re.search(sentence, " ".join(err.split()))


def test_weights_that_do_not_fit_are_refused_with_their_names(kirsch, folder):
    safetensors.numpy.save_file({"0.wait": np.zeros((8, 1, 3, 3), np.float32)}, folder / "w.safetensors")
    code, _, err = kirsch("trace", CHAIN, "--weights", "w.safetensors")
    assert code == 4
    assert err.startswith("error   The weights in w.safetensors do not fit a Sequential.")
    assert "0.wait" in err


@pytest.fixture
def no_timm():
    """Remove timm from the loaded modules. Afterwards, remove the test's stand-in, and restore timm."""

    def pop_modules() -> dict:
        return {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] in ("timm", "nets")}

    removed = pop_modules()
    yield
    pop_modules()
    sys.modules.update(removed)


@pytest.mark.usefixtures("no_timm")
def test_a_broken_installation_of_timm_is_not_a_bug(kirsch, folder, monkeypatch):
    (folder / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(folder)
    code, _, err = kirsch("trace", "timm:resnet18")
    assert code == 5
    assert err.splitlines()[:2] == [
        "error   timm is installed and cannot be imported.",
        "why     RuntimeError: operator torchvision::nms does not exist.",
    ]


def test_missing_timm_is_named_with_its_pip_command(kirsch, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = kirsch("trace", "timm:resnet18")
    assert code == 5
    assert err.splitlines()[-1] == 'fix     Run: pip install "kirsch[zoo]"'


@pytest.mark.usefixtures("no_timm")
def test_random_weights_of_a_timm_model_have_a_note(kirsch, folder, monkeypatch):
    """The stand-in for timm has only the functions that Kirsch calls."""
    (folder / "timm.py").write_text(
        "from nets import teacher\n"
        "def is_model(name): return name == 'tiny'\n"
        "def list_models(): return ['tiny']\n"
        "def create_model(name, pretrained):\n"
        "    net = teacher(); net.__class__.example_shape = None; net.default_cfg = {'input_size': (1, 6, 6)}\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(folder)
    code, out, _ = kirsch("plan", "timm:tiny", "--macs", "0.5")
    assert code == 0
    assert "note         the weights are random (seed 0); use --weights pretrained or FILE for trained weights." in out
    assert "The units were ranked by random weights" in out
    code, out, _ = kirsch("plan", "timm:tiny", "--macs", "0.5", "--weights", "pretrained", "-o", "plan.json")
    assert json.loads((folder / "plan.json").read_text())["method"]["weights"] == "the weights are pretrained"
    assert code == 0
    assert "random" not in out
    assert "Did you mean 'tiny'?" in kirsch("trace", "timm:tinny")[2]


def test_a_module_in_the_working_folder_can_be_named(run_json, folder):
    shutil.copy("nets.py", "nets_of_beside.py")
    (folder / "beside.py").write_text("from nets_of_beside import chain\n")
    assert run_json("trace", "beside:chain")["model"] == "Sequential"


def test_weights_are_loaded_from_a_file(run_json, folder):
    """The plan removes the four channels with the smallest weights in the file."""
    random = np.random.default_rng(0)
    weights = {
        name: random.uniform(1, 2, shape) for name, shape in (("0.weight", (8, 1, 3, 3)), ("2.weight", (4, 8, 3, 3)))
    }
    for channel in (1, 2, 5, 7):
        weights["0.weight"][channel] /= 100
        weights["2.weight"][:, channel] /= 100
    weights |= {"5.weight": np.zeros((3, 16)), "5.bias": np.zeros(3)}
    arrays = {name: value.astype(np.float32) for name, value in weights.items()}
    safetensors.numpy.save_file(arrays, folder / "w.safetensors")
    found = run_json("plan", CHAIN, "--macs", "0.55", "--weights", "w.safetensors")
    assert found["plan"]["groups"][0]["removed"] == [1, 2, 5, 7]
    assert found["weights"] == "the weights are from w.safetensors"


def test_a_plan_is_shown_as_bars_and_written_to_a_file(kirsch, folder):
    code, out, _ = kirsch("plan", CHAIN, "--macs", "0.55", "-o", "plan.json")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "Sequential   magnitude (L2), global, round widths   MACs for the input 1×1×6×6"
    assert lines[2] == "0  ████████████░░░░░░░░░░░░      8 → 4       −50.0 %"
    assert lines[5] == "MACs         2.35 k → 1.20 k   51.0 % of the original   goal met: ≤ 55 %"
    assert json.loads((folder / "plan.json").read_text())["groups"][0]["size"] == 8


def test_an_excluded_group_is_kept(kirsch):
    code, out, _ = kirsch("plan", TEACHER, "--macs", "0.8", "--exclude", "head")
    kept = next(line for line in out.splitlines() if line.startswith("second"))
    assert code == 0
    assert kept == "second  ████████████████████████     16 → 16         kept"
    assert ", without head" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "The goal is missing.*Give a limit: --macs 0.5"),
        (["--macs", "1.5"], "The goal macs=1.5 is out of range"),
        (["--macs", "0"], "The goal macs=0.0 is out of range"),
        (["--macs", "nan"], "`macs` of kirsch.Goal is nan; expected a finite number"),
        (["--macs", "0.001"], "No plan for Sequential reaches the goal: .* is the least reachable"),
        (["--macs", "0.5", "--importance", "magnitud"], "no importance 'magnitud'.*Did you mean 'magnitude'"),
        (["--macs", "0.5", "--ranking", "here"], "`ranking` of kirsch.plan is 'here'"),
        (["--macs", "0.5", "--round-to", "some"], "`round_to` of kirsch.plan is 'some'"),
        (["--macs", "0.5", "--exclude", "layer9"], "`exclude` names the layer 'layer9', which does not exist"),
        (["--macs", "half"], "--macs"),
    ],
)
def test_a_wrong_goal_or_option_is_refused(run_json, arguments, sentence):
    error = run_json("plan", CHAIN, *arguments, code=2)["error"]
    assert re.search(sentence, f"{error['what']} {error['why']} {error['fix']}")


def test_plan_prune_export_and_measure_work_in_sequence(kirsch, run_json, folder):
    """Each subcommand uses the files of the previous one."""
    plan = run_json("plan", TEACHER, "--macs", "0.5", "-o", "plan.json")["plan"]
    pruned = run_json("prune", TEACHER, "--plan", "plan.json", "-o", "small")
    assert pruned["plan"]["groups"] == plan["groups"]
    assert pruned["verification"]["error"] <= pruned["verification"]["tolerance"]
    assert sorted(path.name for path in (folder / "small").iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "plan.json",
    ]

    exported = run_json("export", TEACHER, "--pruned", "small", "-o", "small.onnx")
    assert exported["bytes"] == (folder / "small.onnx").stat().st_size
    assert exported["drift"] < 1e-4

    model = run_json("measure", TEACHER, "--pruned", "small", "--rounds", "6")
    file = run_json("measure", "small.onnx", "--rounds", "6")
    assert model["macs"] == plan["cost"]["after"]["macs"]
    assert model["bytes"] == file["bytes"] == exported["bytes"]
    assert file["parameters"] is None
    assert file["input"] == [1, 1, 6, 6]  # read from the file
    assert {"Accuracy: no data was given."} < set(file["not_measured"])


def edit(path, **changes):
    """Change the first group of a plan file."""
    content = json.loads(path.read_text())
    content["groups"][0] |= changes
    path.write_text(json.dumps(content))


def test_an_edited_plan_is_printed_and_stored_with_recomputed_costs(run_json, kirsch, folder):
    """With 1 of 8 channels, 9 + 4 × 9 weights of the convolutions remain, and the 51 parameters of the linear layer."""
    run_json("plan", CHAIN, "--macs", "0.8", "--round-to", "1", "-o", "plan.json")
    edit(folder / "plan.json", removed=[0, 1, 2, 3, 4, 5, 6])
    code, out, _ = kirsch("prune", CHAIN, "--plan", "plan.json", "-o", "small")
    assert code == 0
    macs, original = 9 * 16 + 36 * 4 + 48, 72 * 16 + 288 * 4 + 48
    (line,) = [line for line in out.splitlines() if line.startswith("MACs")]
    assert line.endswith(f"{100 * macs / original:.1f} % of the original   goal met: ≤ 80 %")
    assert "The plan plan.json was edited after it was made" in out
    stored = json.loads((folder / "small" / "plan.json").read_text())
    assert stored["cost"]["after"]["macs"] == macs
    assert stored["cost"]["after"]["parameters"] == 9 + 36 + 51
    assert not any("points below the goal" in note for note in stored["notes"])


def test_an_edited_plan_that_misses_its_goal_has_a_note(run_json, kirsch, folder):
    run_json("plan", CHAIN, "--macs", "0.5", "--round-to", "1", "-o", "plan.json")
    edit(folder / "plan.json", removed=[0])
    _, out, _ = kirsch("prune", CHAIN, "--plan", "plan.json", "-o", "small")
    assert "goal missed: ≤ 50 %" in out
    assert "The goal is missed: MACs are" in out


def test_an_invalid_plan_is_refused_before_any_work(kirsch, run_json, folder):
    run_json("plan", CHAIN, "--macs", "0.55", "-o", "plan.json")
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace('"macs": 0.55', '"macs": "half"'))
    code, _, err = kirsch("prune", CHAIN, "--plan", "plan.json", "-o", "small")
    assert code == 2
    assert err.startswith("error   The plan plan.json is not valid.")
    assert "goal.macs: a finite number above 0 and below 1 is expected, and 'half' was found" in err
    assert not (folder / "small").exists()


def test_a_plan_is_read_before_the_model_is_loaded(kirsch, folder):
    (folder / "plan.json").write_text("{}")
    code, _, err = kirsch("prune", "nets.py:fails", "--plan", "plan.json", "-o", "small")
    assert code == 2
    assert "The plan plan.json is not a plan." in err


def test_a_plan_made_from_other_weights_has_a_note(kirsch, run_json, folder):
    random = np.random.default_rng(0)
    shapes = {"0.weight": (8, 1, 3, 3), "2.weight": (4, 8, 3, 3), "5.weight": (3, 16), "5.bias": (3,)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(arrays, folder / "w.safetensors")
    run_json("plan", CHAIN, "--macs", "0.55", "-o", "plan.json")
    found = run_json("prune", CHAIN, "--plan", "plan.json", "--weights", "w.safetensors", "-o", "small")
    assert any("for the plan, the weights are those of the callable" in note for note in found["notes"])
    assert not any(
        "other weights" in n for n in run_json("prune", CHAIN, "--plan", "plan.json", "-o", "small")["notes"]
    )


def test_min_keep_is_an_option(kirsch):
    goal = ("plan", CHAIN, "--macs", "0.2", "--round-to", "1")
    code, _, err = kirsch(*goal, "--min-keep", "0.9")
    assert code == 2
    assert "min_keep=0.1" in err
    assert kirsch(*goal, "--min-keep", "0.1")[0] == 0


def test_prune_measure_and_export_print_their_results(kirsch):
    code, out, _ = kirsch("prune", TEACHER, "--macs", "0.5", "-o", "small")
    assert code == 0
    assert "verified     equal to the masked original: error" in out
    assert "saved        small" in out
    code, out, _ = kirsch("measure", TEACHER, "--pruned", "small", "--rounds", "6")
    assert code == 0
    words = [line.split()[0] for line in out.splitlines()]
    assert [word for word in words if word != "note"] == [  # a busy machine gets a note on noise
        "size", "input", "latency", "runtime", "noise", "not", "weights",
    ]  # fmt: skip
    code, out, _ = kirsch("export", TEACHER, "-o", "teacher.onnx")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["file", "inputs", "verified", "sha256", "weights"]


def test_prune_replaces_the_folder_of_an_earlier_prune(run_json, folder):
    for goal in ("0.7", "0.5"):
        run_json("prune", TEACHER, "--macs", goal, "-o", "small")
    assert json.loads((folder / "small" / "plan.json").read_text())["goal"] == {"macs": 0.5}


def test_prune_does_not_replace_a_folder_with_other_files(kirsch, folder):
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").write_text("years of work")
    code, _, err = kirsch("prune", TEACHER, "--macs", "0.5", "-o", "other")
    assert code == 5
    assert "The folder other contains other files." in err
    assert (folder / "other" / "thesis.tex").read_text() == "years of work"
    assert kirsch("prune", TEACHER, "--macs", "0.5", "-o", "nets.py")[2].startswith("error   nets.py is a file.")


@pytest.mark.parametrize(
    ("command", "noun"), [(["plan", TEACHER, "--macs", "0.5"], "a plan"), (["export", TEACHER], "an ONNX file")]
)
def test_plan_and_export_replace_only_a_file_of_their_own_kind(kirsch, folder, command, noun):
    before = (folder / "nets.py").read_text()
    code, _, err = kirsch(*command, "-o", "nets.py")
    assert code == 5
    assert err.startswith(f"error   The file nets.py exists and is not {noun}.")
    assert (folder / "nets.py").read_text() == before
    (folder / "empty.onnx").touch()
    for name in ("new.onnx", "new.onnx", "empty.onnx"):
        assert kirsch(*command, "-o", name)[0] == 0


def test_a_plan_for_another_model_is_refused_with_both_named(kirsch):
    kirsch("plan", TEACHER, "--macs", "0.5", "-o", "plan.json")
    code, _, err = kirsch("prune", CHAIN, "--plan", "plan.json", "-o", "small")
    assert code == 2
    assert "The plan plan.json is for another model: Net with" in err
    assert "This model is Sequential with" in err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["prune", CHAIN, "-o", "small"], 2, "The goal is missing."),
        (["prune", CHAIN, "--plan", "p", "--macs", "0.5", "-o", "small"], 2, "Both a plan and --macs are given."),
        (["prune", CHAIN, "--plan", "p", "--norm", "2", "-o", "small"], 2, "Both a plan and --norm are given."),
        (["prune", CHAIN, "--plan", "absent.json", "-o", "small"], 4, "The plan absent.json cannot be read."),
        (["prune", CHAIN, "--plan", "nets.py", "-o", "small"], 2, "The plan nets.py cannot be read as JSON."),
        (["export", CHAIN, "-o", "."], 5, ". is a folder."),
        (["export", CHAIN, "--pruned", "absent", "-o", "a.onnx"], 4, "The folder absent does not exist."),
        (["export", CHAIN, "--pruned", "a", "--weights", "b", "-o", "c"], 2, "Both --pruned and --weights are given."),
        (["measure", "absent.onnx"], 4, "The file absent.onnx does not exist."),
        (["measure", "a.onnx", "--pruned", "small"], 2, "--pruned has no effect on the file a.onnx."),
        (["measure", "a.onnx", "--weights", "a.safetensors"], 2, "--weights has no effect on the file a.onnx."),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(kirsch, arguments, code, sentence):
    exit_code, out, err = kirsch(*arguments)
    assert (exit_code, out) == (code, "")
    assert err.startswith(f"error   {sentence}")


def test_a_file_that_is_not_a_model_is_refused(kirsch, folder):
    (folder / "junk.onnx").write_bytes(b"junk")
    code, _, err = kirsch("measure", "junk.onnx")
    assert code == 4
    assert err.startswith("error   junk.onnx cannot be loaded by ONNX Runtime.")


def test_measure_of_a_file_uses_the_given_input_shape(kirsch, run_json):
    kirsch("export", CHAIN, "-o", "chain.onnx")
    code, _, err = kirsch("measure", "chain.onnx", "--input", "1,2,6,6", "--rounds", "6")
    assert code != 0
    assert "error" in err
    assert run_json("measure", "chain.onnx", "--input", "1,1,6,6", "--rounds", "6")["input"] == [1, 1, 6, 6]
