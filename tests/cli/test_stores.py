"""The verb on stores of teacher outputs."""

from __future__ import annotations

import json

import pytest

from kirsch.distillation.store import TeacherStore

pytest.importorskip("torch")

GIVEN = ("--model", "nets.py:teacher", "--data", "nets.py:stripes")


@pytest.fixture
def built(folder, kirsch):
    code, out, _ = kirsch("store", "build", "kept", *GIVEN, "--keep", "2", "--temperature", "4", "--seed", "3")
    assert (code, "range        1 of 1" in out) == (0, True)
    assert "96 samples, views 1: indices, log_p, tail" in out
    assert "12 bytes a record" in out
    return folder / "kept"


def test_a_store_is_built_and_told_of(built, kirsch):
    code, out, _ = kirsch("store", "info", "kept", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["samples"], told["temperature"], told["seed"], told["bytes"]) == (96, 4.0, 3, 96 * 12)
    assert TeacherStore.open(built).read([0, 5])["indices"].shape == (2, 2)


def test_a_store_that_agrees_is_said_to(built, kirsch):
    code, out, _ = kirsch("store", "check", "kept", *GIVEN, "--seed", "3", "--samples", "50")
    assert code == 0
    assert "50 looks, at most" in out
    assert "the same class first in 100.0%" in out
    told = json.loads(kirsch("store", "check", "kept", *GIVEN, "--seed", "3", "--json")[1])
    assert told["samples"] == 96
    assert set(told["differences"]) == {"log_p", "tail"}


def test_what_differs_is_named_with_exit_code_4(built, kirsch):
    code, _, err = kirsch("store", "check", "kept", *GIVEN, "--seed", "4")
    assert code == 4
    assert "the teacher's weights" in err
    assert "the data (inputs and ids)" in err


def test_code_that_changed_beside_the_weights_is_seen(built, kirsch):
    nets = (built.parent / "nets.py").read_text()
    (built.parent / "nets.py").write_text(
        nets.replace("self.second(self.first(x).relu())", "self.second(self.first(x))")
    )
    code, _, err = kirsch("store", "check", "kept", *GIVEN, "--seed", "3")
    assert code == 4
    assert "do not agree" in err
    assert "code may have changed beside its weights" in err


def test_a_store_of_what_a_callable_puts_out_is_checked_in_python(built, kirsch):
    manifest = json.loads((built / "manifest.json").read_text())
    (built / "manifest.json").write_text(json.dumps(manifest | {"outputs_sha256": "0" * 64}))
    code, _, err = kirsch("store", "check", "kept", *GIVEN, "--seed", "3")
    assert code == 2
    assert "a callable that a command line cannot name" in err
    assert "check(teacher, data, outputs=...)" in err


def test_a_flipped_bit_is_seen(built, kirsch):
    assert kirsch("store", "verify", "kept")[0] == 0
    path = built / "view-0000.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    code, _, err = kirsch("store", "verify", "kept")
    assert code == 4
    assert "view-0000.bin (samples 0 to 95) does not have the sha256" in err


def test_a_build_is_shared_and_finished(folder, kirsch):
    for part in ("1/2", "2/2"):
        code, out, _ = kirsch("store", "build", "kept", *GIVEN, "--keep", "dense", "--part", part)
        assert (code, f"part {part}" in out, "kirsch store finish kept" in out) == (0, True, True)
    assert kirsch("store", "info", "kept")[0] == 4
    assert kirsch("store", "finish", "kept")[0] == 0
    assert kirsch("store", "check", "kept", *GIVEN)[0] == 0


def test_options_reach_the_data(folder, kirsch):
    code, _, err = kirsch("store", "build", "kept", *GIVEN, "--option", "stripe=3")
    assert code == 2
    assert "does not take these options" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["paint", "kept"], "There is no action 'paint'. Known: build, check, finish, info, verify"),
        (["build", "kept"], "--model is missing"),
        (["build", "kept", *GIVEN[:2]], "--data is missing"),
        (["build", "kept", *GIVEN, "--keep", "all"], "--keep is 'all'. Give a number of classes, or dense"),
        (["build", "kept", *GIVEN, "--part", "0/2"], "--part is '0/2'. Its form is i/n"),
        (["build", "kept", *GIVEN, "--part", "3/2"], "--part is '3/2'"),
        (["build", "kept", *GIVEN, "--option", "train"], "--option 'train' is no option"),
    ],
)
def test_a_wrong_call_is_named(folder, kirsch, arguments, sentence):
    code, _, err = kirsch("store", *arguments)
    assert code == 2
    assert sentence in " ".join(err.replace("why ", "").replace("do ", "").replace("error ", "").split())


def test_a_folder_without_a_store_is_named(folder, kirsch):
    code, _, err = kirsch("store", "info", "nothing")
    assert code == 4
    assert "There is no store in nothing" in err
