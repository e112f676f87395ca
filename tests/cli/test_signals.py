"""Being asked to stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kirsch.cli.signals import Stop, watched
from kirsch.errors import Interrupted, Preempted

KINDS = [(signal.SIGINT, Interrupted, 130), (signal.SIGTERM, Preempted, 75), (signal.SIGHUP, Preempted, 75)]


def test_nothing_stops_as_long_as_nobody_asks():
    with watched(Path("run")) as stop:
        assert stop() is None


@pytest.mark.parametrize(("number", "kind", "code"), KINDS)
def test_a_signal_is_kept_until_the_work_asks(number, kind, code):
    with watched(Path("my run")) as stop:
        os.kill(os.getpid(), number)
        error = stop()
    assert type(error) is kind
    assert error.exit_code == code
    assert error.fix == "Go on with: kirsch resume 'my run'"


def test_handlers_are_as_before_when_the_block_ends():
    before = {number: signal.getsignal(number) for number, _, _ in KINDS}
    with watched(Path("run")):
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number, _, _ in KINDS} == before


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watched(Path("run")) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop() is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "_kind", "code"), KINDS)
def test_a_second_signal_ends_at_once_after_the_cursor_is_back(number, _kind, code):
    happened = []
    stop = Stop(Path("run"), lambda: happened.append("cursor"), happened.append)
    stop.receive(signal.SIGINT)
    assert happened == []
    stop.receive(number)
    assert happened == ["cursor", code]


@pytest.mark.parametrize(("number", "_kind", "code"), KINDS[:2])
def test_a_process_that_does_not_listen_ends_at_the_second_signal(process, number, _kind, code):
    program = (
        "import time; from pathlib import Path; from kirsch.cli.signals import watched\n"
        "with watched(Path('run')) as stop:\n"
        "    print('ready', flush=True)\n"
        "    while stop() is None: time.sleep(0.01)\n"
        "    print('asked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with process("-c", program) as started:
        assert started.stdout.readline() == "ready\n"
        started.send_signal(number)
        assert started.stdout.readline() == "asked\n"
        started.send_signal(number)
        assert started.wait(30) == code
