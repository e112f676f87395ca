"""The subcommand store, with its actions build, check, info and verify."""

from __future__ import annotations

import json

import pytest

from kirsch.distillation.store import TeacherStore

pytest.importorskip("torch")

TEACHER_AND_DATA = ("--model", "nets.py:teacher", "--data", "nets.py:stripes")


@pytest.fixture
def built(folder, kirsch):
    code, out, _ = kirsch(
        "store", "build", "kept", *TEACHER_AND_DATA, "--keep", "2", "--temperature", "4", "--seed", "3"
    )
    assert (code, "range        1 of 1" in out) == (0, True)
    assert "96 samples, views 1: indices, log_p, tail" in out
    assert "12 bytes per record" in out
    return folder / "kept"


def test_info_shows_a_built_store(built, kirsch):
    code, out, _ = kirsch("store", "info", "kept", "--json")
    content = json.loads(out)
    assert code == 0
    assert (content["samples"], content["temperature"], content["seed"], content["bytes"]) == (96, 4.0, 3, 96 * 12)
    assert TeacherStore.open(built).read([0, 5])["indices"].shape == (2, 2)


def test_check_accepts_the_same_teacher_and_data(built, kirsch):
    code, out, _ = kirsch("store", "check", "kept", *TEACHER_AND_DATA, "--seed", "3", "--samples", "50")
    assert code == 0
    assert "50 views, largest difference" in out
    assert "the same top class in 100.0%" in out
    content = json.loads(kirsch("store", "check", "kept", *TEACHER_AND_DATA, "--seed", "3", "--json")[1])
    assert content["samples"] == 96
    assert set(content["differences"]) == {"log_p", "tail"}


def test_check_names_different_weights_and_data(built, kirsch):
    code, _, err = kirsch("store", "check", "kept", *TEACHER_AND_DATA, "--seed", "4")
    assert code == 4
    assert "the teacher's weights" in err
    assert "the data (inputs and ids)" in err


def test_check_finds_changed_code_of_the_teacher(built, kirsch):
    nets = (built.parent / "nets.py").read_text()
    (built.parent / "nets.py").write_text(
        nets.replace("self.second(self.first(x).relu())", "self.second(self.first(x))")
    )
    code, _, err = kirsch("store", "check", "kept", *TEACHER_AND_DATA, "--seed", "3")
    assert code == 4
    assert "do not agree" in err
    assert "code may have changed; build the store again" in err


def test_a_store_that_was_built_with_a_callable_must_be_checked_in_python(built, kirsch):
    stored = json.loads((built / "store.json").read_text())
    (built / "store.json").write_text(json.dumps(stored | {"outputs": "nets.outputs version 1"}))
    code, _, err = kirsch("store", "check", "kept", *TEACHER_AND_DATA, "--seed", "3")
    assert code == 2
    assert "a callable that the command line cannot name" in err
    assert "check(teacher, data, outputs=...)" in err


def test_verify_finds_a_flipped_bit(built, kirsch):
    assert kirsch("store", "verify", "kept")[0] == 0
    path = built / "view-0000-range-000000.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    code, _, err = kirsch("store", "verify", "kept")
    assert code == 4
    assert "view-0000-range-000000.bin (view 0, samples 0 to 95)" in err


def test_a_store_can_be_built_in_parts(folder, kirsch):
    """96 samples fit in one range, which is one file. Part 1 builds it, and part 2 has nothing to do."""
    parts = ["store", "build", "kept", *TEACHER_AND_DATA, "--keep", "dense", "--part"]
    code, out, _ = kirsch(*parts, "2/2")
    assert (code, "part 2/2; the store needs the other parts, too" in out) == (0, True)
    assert kirsch("store", "info", "kept")[0] == 4
    code, out, _ = kirsch(*parts, "1/2")
    assert (code, "96 samples, views 1: scores, maximum" in out) == (0, True)
    assert kirsch("store", "check", "kept", *TEACHER_AND_DATA)[0] == 0


def test_options_are_passed_to_the_data_source(folder, kirsch):
    code, _, err = kirsch("store", "build", "kept", *TEACHER_AND_DATA, "--option", "stripe=3")
    assert code == 2
    assert "does not take these options" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["paint", "kept"], "There is no action 'paint'. Known: build, check, info, verify"),
        (["build", "kept"], "--model is missing"),
        (["build", "kept", *TEACHER_AND_DATA[:2]], "--data is missing"),
        (
            ["build", "kept", *TEACHER_AND_DATA, "--keep", "all"],
            "--keep 'all' is not a number of classes. Write --keep 10, or --keep dense",
        ),
        (
            ["build", "kept", *TEACHER_AND_DATA, "--part", "0/2"],
            "--part '0/2' does not have the form i/n, from 1/n to n/n. An example is --part 1/4",
        ),
        (["build", "kept", *TEACHER_AND_DATA, "--part", "3/2"], "--part '3/2' does not have the form i/n"),
        (
            ["build", "kept", *TEACHER_AND_DATA, "--option", "train"],
            "--option 'train' does not have the form key=value. An example is --option train=45000",
        ),
    ],
)
def test_wrong_arguments_are_refused(folder, kirsch, arguments, sentence):
    code, _, err = kirsch("store", *arguments)
    assert code == 2
    assert sentence in " ".join(err.replace("why ", "").replace("fix ", "").replace("error ", "").split())


def test_a_folder_without_a_store_is_refused(folder, kirsch):
    code, _, err = kirsch("store", "info", "nothing")
    assert code == 4
    assert "There is no store in nothing" in err


def test_build_refuses_a_data_set_whose_training_part_is_a_loader(folder, kirsch):
    nets = (folder / "nets.py").read_text()
    loaded = """

def loaded(*, seed):
    data = stripes(seed=seed)
    batches = [(data.train.inputs, data.train.labels)]
    return DataSet("loaded", batches, data.validation, data.test, classes=data.classes)
"""
    (folder / "nets.py").write_text(nets + loaded)
    code, _, err = kirsch("store", "build", "kept", "--model", "nets.py:teacher", "--data", "nets.py:loaded")
    assert code == 2
    assert "The training part of loaded is a loader." in err
