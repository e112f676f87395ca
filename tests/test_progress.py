"""Progress lines of a job."""

from __future__ import annotations

import io

import pytest

from kirsch import __version__
from kirsch.cli.terminal import Mode, Terminal
from kirsch.progress import (
    JobProgress,
    RunningStep,
    epoch_line,
    header_lines,
    status_line,
    step_line,
    timing_line,
    verdict_lines,
)
from kirsch.tables import plain
from terminals import Tty

TEACHER = {
    "event": "step_end",
    "number": 1,
    "key": "train",
    "did": "teacher trained",
    "cells": ["98.3 % ± 1.2", "1.21 M MACs", "112 k params"],
    "seconds": 18.4,
}
PRUNE = {
    "event": "step_kept",
    "number": 3,
    "key": "prune",
    "did": "−50.3 % MACs",
    "cells": ["61.1 % ± 5.0", "402 k MACs", "14.2 k params", "milp, verified (3e-07)"],
    "seconds": 1.0,
}
EPOCH = {
    "event": "epoch",
    "step": "train",
    "epoch": 3,
    "epochs": 12,
    "loss": 0.0412,
    "accuracy": 0.975,
    "seconds": 2.0,
}
END = {
    "event": "end",
    "met": True,
    "items": [{"text": "MACs 16.5 % of the teacher", "met": True}],
    "significance": "",
    "report": "r/report.html",
    "seconds": 65,
}


def test_a_step_is_one_line_with_columns():
    text = " 1 train      teacher trained  98.3 % ± 1.2   1.21 M MACs   112 k params"
    assert plain(step_line(TEACHER, 82)) == text + " " * 6 + "18 s"


def test_units_of_all_steps_are_aligned():
    first, second = plain(step_line(TEACHER)), plain(step_line(PRUNE))
    assert first.index(" M MACs") == second.index(" k MACs")
    assert first.index(" k params") == second.index(" k params")
    assert first.index(" %") == second.index(" %", second.index("MACs"))


def test_durations_are_aligned_at_the_right():
    assert len(plain(step_line(TEACHER, 110))) == len(plain(step_line(PRUNE, 110))) == 110


def test_a_long_line_keeps_its_duration():
    assert plain(step_line(PRUNE, 40)).endswith("(3e-07)   kept")


def test_a_kept_step_has_the_word_kept_instead_of_a_duration():
    assert plain(step_line(PRUNE)).endswith(" kept")
    assert plain(step_line(TEACHER)).endswith(" 18 s")


def test_an_epoch_is_one_line():
    assert plain(epoch_line(EPOCH)) == "   train      epoch  3/12   loss 0.0412   97.5 %   2.0 s"


def test_an_epoch_without_validation_has_no_accuracy():
    assert plain(epoch_line(EPOCH | {"accuracy": None})) == "   train      epoch  3/12   loss 0.0412   2.0 s"


def test_bar_and_remaining_time_follow_from_the_epochs():
    now = RunningStep(1, "train", 100.0)
    now.epoch, now.epochs_here = EPOCH, 3
    line = status_line(now, 106.0, 110)  # 3 epochs in 6 s, 9 to go
    assert line[1].text == "━" * 6
    assert line[2].text == "━" * 18
    assert plain(line).endswith(" epoch 3/12   loss 0.0412   97.5 %   18 s left")


def test_the_remaining_time_of_a_resumed_run_follows_from_the_epochs_since_the_resume():
    now = RunningStep(1, "train", 100.0)
    now.epoch, now.epochs_here = EPOCH | {"epoch": 10}, 1
    assert plain(status_line(now, 106.0, 110)).endswith("12 s left")  # one epoch took 6 s, 2 to go


@pytest.mark.parametrize("width", [10, 80, 110])
def test_the_bar_is_shorter_on_a_narrow_terminal(width):
    now = RunningStep(5, "recover-2", 100.0)
    now.epoch = {**EPOCH, "epoch": 10, "epochs": 100, "accuracy": 1.0}
    text = plain(status_line(now, 106.0, width))
    assert text.count("━") == {10: 0, 80: 11, 110: 24}[width]
    assert text.endswith("100.0 %   9 min 00 s left")


def test_the_status_line_before_the_first_epoch_has_the_elapsed_time():
    assert plain(status_line(RunningStep(5, "export", 1.0), 3.5, 110)) == " 5 export     running for 2.5 s"


def test_the_header_has_name_folder_and_one_line_for_each_goal():
    lines = header_lines({"name": "digits", "run": "runs/a", "goals": ["MACs ≤ 50 %", "speed ≥ 2×"]})
    assert [plain(line) for line in lines] == [
        f"kirsch {__version__} · digits · run runs/a",
        "goal  MACs ≤ 50 %",
        "      speed ≥ 2×",
        "",
    ]


def test_the_header_without_a_goal_has_no_goal_line():
    assert len(header_lines({"name": "digits", "run": "runs/a", "goals": []})) == 2


@pytest.mark.parametrize(("met", "words", "tone"), [(True, "goal met", "good"), (False, "goal missed", "bad")])
def test_the_verdict_has_words_and_color(met, words, tone):
    line = verdict_lines(END | {"met": met})[0]
    assert (line[0].text.strip(), line[0].tone) == (words, tone)


def test_the_verdict_has_one_line_for_each_goal_and_marks_the_missed_ones():
    items = [{"text": "MACs 40 %", "met": True}, {"text": "accuracy drop 2.0 points", "met": False}]
    lines = verdict_lines(END | {"met": False, "items": items})
    assert [plain(line) for line in lines[:2]] == [
        "goal missed  MACs 40 %",
        "             missed: accuracy drop 2.0 points",
    ]


def test_the_verdict_without_a_goal_says_that_none_was_set():
    assert plain(verdict_lines(END | {"items": []})[0]) == "goal         none was set"


def test_the_verdict_has_the_significance():
    assert (
        plain(verdict_lines(END | {"significance": "not significant (p = 0.5)"})[1])
        == "significance not significant (p = 0.5)"
    )
    assert not any("significance" in plain(line) for line in verdict_lines(END))


def run_through(stream: io.StringIO, **mode: bool) -> str:
    progress = JobProgress(Terminal(Mode(**mode), stream, stream), clock=lambda: 0.0)
    for event in (
        {"event": "start", "name": "[red]", "run": "<script>", "goals": ["[/0]"]},
        {"event": "step_start", "number": 1, "of": 2, "key": "train"},
        {"event": "first_batch", "step": "train", "shares": {}},
        EPOCH,
        {"event": "note", "text": "a\nb"},
        {"event": "warning", "step": "train", "text": "unused"},
        TEACHER,
        PRUNE,
        END,
    ):
        progress(event)
    return stream.getvalue()


def test_a_pipe_gets_one_line_per_epoch_and_step():
    lines = run_through(io.StringIO()).splitlines()
    assert lines[0] == f"kirsch {__version__} · [red] · run <script>"
    assert lines[1] == "goal  [/0]"
    assert [line.split()[:2] for line in lines[3:8]] == [
        ["train", "epoch"],
        ["note", "a\\nb"],
        ["warning", "unused"],
        ["1", "train"],
        ["3", "prune"],
    ]
    assert lines[8:] == [""]  # the command writes the verdict


def test_a_terminal_gets_one_line_per_epoch_and_a_bar():
    written = run_through(Tty())
    assert "3/12   loss 0.0412   97.5 %   2.0 s\n" in written
    assert "━" * 6 in written
    assert "1.21 M MACs" in written


def test_quiet_shows_no_progress():
    assert run_through(io.StringIO(), quiet=True) == ""


def test_the_status_line_is_not_updated_during_the_measurement():
    refreshes = []

    class Spy(Terminal):
        def start_status(self, draw, *, refresh=True):
            refreshes.append(refresh)

    progress = JobProgress(Spy(Mode(), Tty(), Tty()))
    for key in ("export", "measure"):
        progress({"event": "step_start", "number": 5, "of": 6, "key": key})
    assert refreshes == [True, False]
    assert plain(timing_line(RunningStep(6, "measure"))).startswith(" 6 measure    measuring latency")
