"""Exceptions of other code are translated to errors of Kirsch."""

from __future__ import annotations

import errno

import pytest

import kirsch
from kirsch.errors import MemoryShortageError, ModelError, OutputError, Preempted, RequirementError, UsageError
from kirsch.failures import during, error_with_location, location, translate


class OutOfMemoryError(RuntimeError):
    """Exception with the name of the error that PyTorch raises if the memory of a GPU is exhausted."""


class UnprintableError(Exception):
    """An exception whose text raises an error."""

    def __str__(self) -> str:
        raise ValueError("no text")


USER_FILE, KIRSCH_FILE = "/home/me/nets.py", kirsch.__file__


def raised(error: BaseException, file: str) -> BaseException:
    """Return the error with a traceback: raised by a function in `file`, which a file of Kirsch called."""
    names = {"error": error}
    exec(compile("def forward():\n    raise error", file, "exec"), names)
    try:
        exec(compile("forward()", KIRSCH_FILE, "exec"), names)
    except BaseException as caught:  # noqa: BLE001 - the exception is the result
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
@pytest.mark.parametrize("file", [USER_FILE, KIRSCH_FILE])
def test_a_lack_of_memory_in_user_code_or_in_kirsch_has_the_given_fix(error, file):
    known = translate(raised(error, file), "in the stage 'recover'", "Lower batch_size.")
    assert type(known) is MemoryShortageError
    assert known.exit_code == 5
    assert known.what == "The memory is not sufficient in the stage 'recover'."
    assert known.fix == "Lower batch_size."


def test_a_lack_of_memory_that_caused_an_error_of_kirsch_is_found():
    error = ModelError("It cannot be traced.")
    error.__cause__ = MemoryError()
    assert type(translate(error)) is MemoryShortageError
    assert translate(known := ModelError("It ran out of memory.")) is known


@pytest.mark.parametrize(
    ("number", "kind", "fix"),
    [
        (errno.ENOSPC, OutputError, "Free space on the disk, or choose a folder on another one."),
        (errno.EMFILE, OutputError, "Raise the limit of open files: ulimit -n 4096."),
        (errno.EACCES, RequirementError, "Check the path and its permissions."),
        (errno.ENAMETOOLONG, RequirementError, "Check the path and its permissions."),
    ],
)
def test_a_refusal_of_the_operating_system_is_not_a_bug(number, kind, fix):
    known = translate(raised(OSError(number, "refused", "some/file"), KIRSCH_FILE))
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
        UnprintableError(),
    ],
)
def test_an_exception_in_user_code_names_the_line(error):
    known = translate(raised(error, USER_FILE), "in the stage 'teacher'")
    assert (type(known), known.exit_code) == (ModelError, 4)
    assert known.what == "The code of the model or the data failed in the stage 'teacher'."
    assert known.why.startswith((f"{type(error).__name__}: ", f"{type(error).__name__} without a message "))
    assert known.why.endswith(" (nets.py:2, in forward).")


@pytest.mark.parametrize("error", [ValueError("boom"), KeyError("x"), ZeroDivisionError(), RuntimeError("wrong shape")])
def test_an_unexpected_exception_inside_kirsch_is_a_bug(error):
    assert translate(raised(error, KIRSCH_FILE)) is None


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (UserWarning("old"), "A warning was raised as an error."),
        (ImportError("broken", name="scipy"), "The package scipy cannot be imported."),
        (ImportError("broken"), "A package cannot be imported."),
    ],
)
def test_a_warning_or_a_failed_import_is_not_a_bug(error, what):
    assert translate(raised(error, KIRSCH_FILE)).what == what


def test_a_failed_import_of_kirsch_is_a_bug():
    assert translate(raised(ImportError("no name", name="kirsch.graph"), KIRSCH_FILE)) is None


def test_the_location_may_be_a_frame_of_a_worker_process():
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "/home/me/data.py", line 7, in __getitem__\n    raise ValueError'
    )
    assert location(raised(ValueError(text), KIRSCH_FILE)) == "data.py:7, in __getitem__"


def test_the_location_may_be_in_an_installed_package_but_not_in_torch_or_in_compiled_code():
    assert location(raised(ValueError(), "/venv/lib/python3.12/site-packages/timm/net.py")) == "net.py:2, in forward"
    assert location(raised(ValueError(), "/venv/lib/python3.12/site-packages/torch/nn/linear.py")) == ""
    assert location(raised(ValueError(), "_compiled.pyx")) == ""


def test_a_syntax_error_names_its_line_once():
    with pytest.raises(SyntaxError) as caught:
        compile("def f(:", "/home/me/nets.py", "exec")
    assert error_with_location(caught.value) == "SyntaxError: invalid syntax (nets.py, line 1)."


def test_the_root_cause_is_named():
    error = raised(ImportError("no such thing"), USER_FILE)
    error.__cause__ = RuntimeError("in between")
    error.__cause__.__cause__ = OSError("libgone.so: no such file")
    assert error_with_location(error) == (
        "ImportError: no such thing (nets.py:2, in forward). It was raised from OSError: libgone.so: no such file."
    )


def test_a_long_message_is_shortened():
    assert len(error_with_location(ValueError("x" * 10_000))) < 500


def test_during_translates_exceptions_and_passes_interrupts_and_kirsch_errors_on():
    for error in (KeyboardInterrupt(), Preempted("Stopped."), UsageError("Wrong.")):
        with pytest.raises(type(error)) as caught, during("now"):
            raise error
        assert caught.value is error
    with pytest.raises(ModelError) as caught, during("now"):
        raise raised(ValueError("boom"), USER_FILE)
    assert isinstance(caught.value.__cause__, ValueError)
