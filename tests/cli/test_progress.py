"""A run as it is seen."""

from __future__ import annotations

import io

import pytest

from kirsch.cli.progress import Progress, Running, epoch, head, running, stage, still, verdict
from kirsch.cli.terminal import Mode, Terminal, plain

TEACHER = {
    "event": "stage_end",
    "number": 1,
    "key": "teacher",
    "did": "trained",
    "cells": ["98.3 % ± 1.2", "1.21 M MACs", "112 k params"],
    "seconds": 18.4,
}
PRUNE = {
    "event": "stage_kept",
    "number": 3,
    "key": "prune",
    "did": "−50.3 % MACs",
    "cells": ["61.1 % ± 5.0", "402 k MACs", "14.2 k params", "5 groups, verified (3e-07)"],
    "seconds": 1.0,
}
EPOCH = {
    "event": "epoch",
    "stage": "teacher",
    "epoch": 3,
    "epochs": 12,
    "loss": 0.0412,
    "accuracy": 0.975,
    "seconds": 2.0,
}
END = {
    "event": "end",
    "met": True,
    "text": "MACs 16.5 % of the teacher",
    "doubt": "",
    "report": "r/report.html",
    "seconds": 65,
}


class Tty(io.StringIO):
    """A terminal that can be read."""

    def isatty(self) -> bool:
        return True


def test_a_stage_is_one_line_of_columns():
    text = " 1 teacher    trained        98.3 % ± 1.2   1.21 M MACs   112 k params"
    assert plain(stage(TEACHER, 80)) == text + " " * 6 + "18 s"


def test_units_stand_below_each_other():
    first, second = plain(stage(TEACHER)), plain(stage(PRUNE))
    assert first.index(" M MACs") == second.index(" k MACs")
    assert first.index(" k params") == second.index(" k params")
    assert first.index(" %") == second.index(" %", second.index("MACs"))


def test_durations_end_in_one_column_where_the_line_leaves_room():
    assert len(plain(stage(TEACHER, 110))) == len(plain(stage(PRUNE, 110))) == 110


def test_a_long_line_keeps_its_duration():
    assert plain(stage(PRUNE, 40)).endswith("(3e-07)   kept")


def test_a_kept_stage_says_so_in_place_of_its_time():
    assert plain(stage(PRUNE)).endswith(" kept")
    assert plain(stage(TEACHER)).endswith(" 18 s")


def test_an_epoch_is_one_line():
    assert plain(epoch(EPOCH)) == "   teacher    epoch  3/12   loss 0.0412   97.5 %   2.0 s"


def test_an_epoch_without_validation_has_no_accuracy():
    assert plain(epoch(EPOCH | {"accuracy": None})) == "   teacher    epoch  3/12   loss 0.0412   2.0 s"


def test_the_bar_and_the_time_left_follow_from_the_epochs():
    now = Running(1, "teacher", 100.0)
    now.epoch, now.seen = EPOCH, 3
    line = running(now, 106.0)  # 3 epochs in 6 s, 9 to go
    assert line[1].text == "━" * 6
    assert line[2].text == "━" * 18
    assert plain(line).endswith(" epoch 3/12   loss 0.0412   97.5 %   18 s left")


def test_the_time_left_of_a_run_that_goes_on_counts_its_own_epochs_alone():
    now = Running(1, "teacher", 100.0)
    now.epoch, now.seen = EPOCH | {"epoch": 10}, 1
    assert plain(running(now, 106.0)).endswith("12 s left")  # one epoch took 6 s, 2 to go


def test_before_the_first_epoch_the_line_says_how_long_it_has_been():
    assert plain(running(Running(5, "export", 1.0), 3.5)) == " 5 export     at work for 2.5 s"


def test_the_head_says_what_where_and_what_for():
    lines = head({"name": "digits", "run": "runs/a", "goal": "MACs ≤ 50 %"})
    assert [plain(line) for line in lines] == ["kirsch 0.1.0 · digits · run runs/a", "goal  MACs ≤ 50 %", ""]


def test_a_head_without_a_goal_has_no_line_for_it():
    assert len(head({"name": "digits", "run": "runs/a", "goal": ""})) == 2


@pytest.mark.parametrize(("met", "words", "tone"), [(True, "goal met", "good"), (False, "goal missed", "bad")])
def test_the_verdict_says_in_words_what_its_color_means(met, words, tone):
    line = verdict(END | {"met": met})[0]
    assert (line[0].text.strip(), line[0].tone) == (words, tone)


def test_without_a_goal_none_is_met():
    assert plain(verdict(END | {"text": ""})[0]) == "goal         none was set"


def test_verdict_shows_the_significance():
    assert plain(verdict(END | {"doubt": "not significant (p = 0.5)"})[1]) == "significance not significant (p = 0.5)"
    assert not any("significance" in plain(line) for line in verdict(END))


def run_through(stream: io.StringIO, **mode: bool) -> str:
    progress = Progress(Terminal(Mode(**mode), stream, stream), clock=lambda: 0.0)
    for event in (
        {"event": "start", "name": "[red]", "run": "<script>", "goal": "[/0]"},
        {"event": "stage_start", "number": 1, "of": 2, "key": "teacher"},
        {"event": "first_batch", "stage": "teacher", "shares": {}},
        EPOCH,
        {"event": "note", "text": "a\nb"},
        TEACHER,
        PRUNE,
        END,
    ):
        progress(event)
    return stream.getvalue()


def test_a_pipe_gets_a_line_an_epoch_and_a_line_a_stage():
    lines = run_through(io.StringIO()).splitlines()
    assert lines[0] == "kirsch 0.1.0 · [red] · run <script>"
    assert lines[1] == "goal  [/0]"
    assert [line.split()[:2] for line in lines[3:7]] == [
        ["teacher", "epoch"],
        ["note", "a\\nb"],
        ["1", "teacher"],
        ["3", "prune"],
    ]
    assert lines[7:] == [""]  # the verdict is a result


def test_a_terminal_gets_no_line_an_epoch():
    written = run_through(Tty())
    assert "3/12   loss 0.0412   97.5 %   2.0 s\n" not in written
    assert "1.21 M MACs" in written


def test_quiet_shows_nothing_of_it():
    assert run_through(io.StringIO(), quiet=True) == ""


def test_nothing_moves_while_the_machine_is_timed():
    asked = []

    class Spy(Terminal):
        def start(self, draw, *, moves=True):
            asked.append(moves)

    progress = Progress(Spy(Mode(), Tty(), Tty()))
    for key in ("export", "measure"):
        progress({"event": "stage_start", "number": 5, "of": 6, "key": key})
    assert asked == [True, False]
    assert plain(still(Running(6, "measure"))).startswith(" 6 measure    timing")
