"""What an error that Kirsch did not raise is."""

from __future__ import annotations

import errno

import pytest

import kirsch
from kirsch.errors import MemoryShortageError, ModelError, OutputError, Preempted, SurroundingsError, UsageError
from kirsch.failures import during, place, told, translated


class OutOfMemoryError(RuntimeError):
    """As PyTorch calls that of a GPU."""


class UnspeakableError(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise ValueError("no text")


USER, OWN = "/home/me/nets.py", kirsch.__file__


def raised(error: BaseException, file: str) -> BaseException:
    """The error, raised by a line of a file that Kirsch called."""
    names = {"error": error}
    exec(compile("def forward():\n    raise error", file, "exec"), names)
    try:
        exec(compile("forward()", OWN, "exec"), names)
    except BaseException as caught:  # noqa: BLE001 - that is the point
        return caught


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
        RuntimeError("Storage size calculation overflowed with sizes=[1000000000000, 1000000000000]"),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
@pytest.mark.parametrize("file", [USER, OWN])
def test_a_lack_of_memory_is_told_with_the_number_to_lower_whoever_met_it(error, file):
    known = translated(raised(error, file), "in the stage 'recover'", "Lower batch_size.")
    assert type(known) is MemoryShortageError
    assert known.exit_code == 5
    assert known.what == "The memory does not suffice in the stage 'recover'."
    assert known.fix == "Lower batch_size."


def test_a_lack_of_memory_behind_an_error_of_kirsch_is_seen():
    error = ModelError("It cannot be traced.")
    error.__cause__ = MemoryError()
    assert type(translated(error)) is MemoryShortageError
    assert translated(known := ModelError("It ran out of memory.")) is known


@pytest.mark.parametrize(
    ("number", "kind", "fix"),
    [
        (errno.ENOSPC, OutputError, "Free space on the disk, or choose a folder on another one."),
        (errno.EMFILE, OutputError, "Raise the limit of open files: ulimit -n 4096."),
        (errno.EACCES, SurroundingsError, "Check the path and its permissions."),
        (errno.ENAMETOOLONG, SurroundingsError, "Check the path and its permissions."),
    ],
)
def test_what_the_operating_system_refuses_kirsch_is_no_bug(number, kind, fix):
    known = translated(raised(OSError(number, "refused", "some/file"), OWN))
    assert (type(known), known.exit_code, known.fix) == (kind, 5, fix)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("boom"),
        KeyError("x"),
        RecursionError("too deep"),
        SystemExit(0),
        FileNotFoundError(errno.ENOENT, "gone", "weights.bin"),
        UserWarning("made an error"),
        BaseException("of its own kind"),
        UnspeakableError(),
    ],
)
def test_code_of_the_user_that_fails_is_named_with_its_line(error):
    known = translated(raised(error, USER), "in the stage 'teacher'")
    assert (type(known), known.exit_code) == (ModelError, 4)
    assert known.what == "The code of the model or the data failed in the stage 'teacher'."
    assert known.why.startswith((f"{type(error).__name__}: ", f"{type(error).__name__} without a message "))
    assert known.why.endswith(" (nets.py:2, in forward).")


@pytest.mark.parametrize("error", [ValueError("boom"), KeyError("x"), ZeroDivisionError(), RuntimeError("wrong shape")])
def test_what_kirsch_itself_raises_by_mistake_is_a_bug(error):
    assert translated(raised(error, OWN)) is None


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (UserWarning("old"), "A warning was made an error."),
        (ImportError("broken", name="scipy"), "The package scipy cannot be imported."),
        (ImportError("broken"), "A package cannot be imported."),
    ],
)
def test_a_warning_or_an_import_that_fails_is_no_bug(error, what):
    assert translated(raised(error, OWN)).what == what


def test_an_import_of_kirsch_that_fails_is_a_bug():
    assert translated(raised(ImportError("no name", name="kirsch.graph"), OWN)) is None


def test_a_frame_of_a_worker_process_counts():
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "/home/me/data.py", line 7, in __getitem__\n    raise ValueError'
    )
    assert place(raised(ValueError(text), OWN)) == "data.py:7, in __getitem__"


def test_code_of_an_installed_package_is_named_where_there_is_no_other():
    assert place(raised(ValueError(), "/venv/lib/python3.12/site-packages/timm/net.py")) == "net.py:2, in forward"
    assert place(raised(ValueError(), "/venv/lib/python3.12/site-packages/torch/nn/linear.py")) == ""
    assert place(raised(ValueError(), "_compiled.pyx")) == ""


def test_a_syntax_error_names_its_line_once():
    with pytest.raises(SyntaxError) as caught:
        compile("def f(:", "/home/me/nets.py", "exec")
    assert told(caught.value) == "SyntaxError: invalid syntax (nets.py, line 1)."


def test_the_first_of_several_errors_is_named_too():
    error = raised(ImportError("no such thing"), USER)
    error.__cause__ = RuntimeError("in between")
    error.__cause__.__cause__ = OSError("libgone.so: no such file")
    assert told(error) == (
        "ImportError: no such thing (nets.py:2, in forward). It was raised from OSError: libgone.so: no such file."
    )


def test_a_long_text_is_cut():
    assert len(told(ValueError("x" * 10_000))) < 500


def test_the_block_raises_in_place_and_lets_what_is_meant_pass():
    for error in (KeyboardInterrupt(), Preempted("Stopped."), UsageError("Wrong.")):
        with pytest.raises(type(error)) as caught, during("now"):
            raise error
        assert caught.value is error
    with pytest.raises(ModelError) as caught, during("now"):
        raise raised(ValueError("boom"), USER)
    assert isinstance(caught.value.__cause__, ValueError)
