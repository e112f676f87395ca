"""The subcommands and their options."""

from __future__ import annotations

import json

import pytest

from kirsch import __version__
from kirsch.cli.app import app
from kirsch.cli.command import MODES

SUBCOMMANDS = [
    "compress",
    "resume",
    "init",
    "trace",
    "plan",
    "prune",
    "sparsify",
    "sensitivity",
    "export",
    "measure",
    "report",
    "verify",
    "store",
    "methods",
    "doctor",
]


def test_the_subcommands_are_registered_in_order():
    assert [command.name or command.callback.__name__ for command in app.registered_commands] == SUBCOMMANDS


def test_help_lists_each_subcommand_with_a_complete_sentence(kirsch):
    code, out, err = kirsch("--help")
    listed = [line.split(maxsplit=1) for line in out.partition("Commands:")[2].partition("Exit codes")[0].splitlines()]
    assert (code, err) == (0, "")
    assert [entry[0] for entry in listed if entry] == SUBCOMMANDS
    assert all(entry[1].endswith(".") and not entry[1].endswith("...") for entry in listed if entry)


def test_the_help_is_shown_without_a_subcommand(kirsch):
    assert kirsch() == kirsch("-h")


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_each_subcommand_has_the_options_json_quiet_and_debug(kirsch, subcommand):
    code, out, _ = kirsch(subcommand, "--help")
    assert code == 0
    assert all(f"--{mode} " in out for mode in MODES)


def test_the_version_of_the_package_is_shown(kirsch):
    assert kirsch("--version") == (0, f"kirsch {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence", "see"),
    [
        (["tracy"], "'tracy'", "kirsch --help"),
        (["trace"], "Missing argument 'MODEL'", "kirsch trace --help"),
        (["trace", "a:b", "--imput", "1"], "--imput", "kirsch trace --help"),
        (["measure", "a.onnx", "--threads", "0"], "--threads", "kirsch measure --help"),
        (["prune", "a:b"], "--output", "kirsch prune --help"),
    ],
)
def test_the_error_for_a_wrong_command_line_names_the_problem_and_the_help_command(kirsch, arguments, sentence, see):
    code, out, err = kirsch(*arguments)
    first, *_, last = err.splitlines()
    assert (code, out) == (2, "")
    assert first.startswith("error   ")
    assert sentence.lower() in first.lower()
    assert last == f"fix     See {see}."


def test_a_wrong_command_line_with_json_gives_a_json_error(kirsch):
    code, out, err = kirsch("trace", "--json")
    assert (code, err) == (2, "")
    assert json.loads(out)["error"]["type"] == "UsageError"


def test_the_command_runs_as_a_module(process):
    with process("-m", "kirsch.cli", "trace", "nowhere:net", "--json") as started:
        out, err = started.communicate(timeout=60)
    assert (started.returncode, err) == (4, "")
    assert json.loads(out)["error"]["what"] == "The module 'nowhere' cannot be imported."
