"""Stop requests by signals."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kirsch.cli.signals import Stop, stop_on_signals
from kirsch.errors import Interrupted, Preempted

KINDS = [(signal.SIGINT, Interrupted, 130), (signal.SIGTERM, Preempted, 75), (signal.SIGHUP, Preempted, 75)]


def test_there_is_no_stop_request_without_a_signal():
    with stop_on_signals(Path("run")) as stop:
        assert stop() is None


@pytest.mark.parametrize(("number", "kind", "code"), KINDS)
def test_a_signal_is_kept_until_it_is_queried(number, kind, code):
    with stop_on_signals(Path("my run")) as stop:
        os.kill(os.getpid(), number)
        error = stop()
    assert type(error) is kind
    assert error.exit_code == code
    assert error.fix == "Continue with: kirsch resume 'my run'"


def test_the_handlers_are_restored_after_the_block():
    before = {number: signal.getsignal(number) for number, _, _ in KINDS}
    with stop_on_signals(Path("run")):
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number, _, _ in KINDS} == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(Path("run")) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop() is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "_kind", "code"), KINDS)
def test_a_second_signal_restores_the_cursor_and_ends_the_process(number, _kind, code):
    calls = []
    stop = Stop(Path("run"), lambda: calls.append("cursor"), calls.append)
    stop.receive(signal.SIGINT)
    assert calls == []
    stop.receive(number)
    assert calls == ["cursor", code]


@pytest.mark.parametrize(("number", "_kind", "code"), KINDS[:2])
def test_a_process_that_ignores_the_stop_request_ends_at_the_second_signal(process, number, _kind, code):
    program = (
        "import time; from pathlib import Path; from kirsch.cli.signals import stop_on_signals\n"
        "with stop_on_signals(Path('run')) as stop:\n"
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
