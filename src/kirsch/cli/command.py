"""The typer application, and the decorator that makes a function a subcommand of `kirsch`."""

# typer reads the annotations when a subcommand is registered: no `from __future__ import annotations` here.
import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path  # noqa: TC003 - see above
from typing import Annotated, Any

import typer

from kirsch.cli import failure
from kirsch.cli.interrupts import interruptible
from kirsch.cli.paths import check_paths
from kirsch.cli.streams import discard_stdout, stdout_for_result
from kirsch.cli.terminal import ClosedError, Mode, Terminal
from kirsch.errors import Interrupted

MODES = {
    "json": "One JSON object on the standard output; progress goes to the standard error.",
    "quiet": "Show no progress. The result is the same.",
    "debug": "Show the traceback of an error.",
}
"""Options of every subcommand."""

STOPPED = "The command was stopped by SIGINT."
CLOSED = 141
"""Exit code if the reader of the standard output has closed it. Shells use the same code for SIGPIPE."""

app = typer.Typer(
    name="kirsch",
    help="Distill, prune, export and measure neural networks, with verification.",
    epilog=(
        "Exit codes: 0 done, goals met; 2 wrong usage or recipe; 3 done, but a goal is missed, or verify found an "
        "unfinished run; 4 model, data or checkpoint cannot be loaded, or verify found damage; "
        "5 a package is missing, memory is not sufficient, or a file cannot be written; 6 numerical failure; "
        "75 and 130 stopped, kirsch resume continues; 1 a bug of Kirsch."
    ),
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Session:
    """State of one subcommand.

    Args:
        terminal: output of the subcommand.
    """

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.folder: Path | None = None  # folder of the run, once known; tracebacks are written there


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Register a function as a subcommand.

    The function takes a `Session` and the options of the subcommand, and returns the exit code. Each subcommand also
    has the options of `MODES`. `failure.report_error` writes any exception.
    """

    def run(**options: Any) -> int:
        mode = Mode(**{name: options.pop(name) for name in MODES})
        with stdout_for_result() if mode.json else contextlib.nullcontext(sys.stdout) as stdout:
            session = Session(Terminal(mode, stdout))
            try:
                check_paths(options)
                with interruptible(stdout), _quiet_warnings(mode):
                    return function(session, **options)
            except ClosedError:
                discard_stdout()
                return CLOSED
            except KeyboardInterrupt:
                session.terminal.stop_status()
                return failure.report_error(Interrupted(STOPPED), session.terminal)
            except BaseException as error:  # noqa: BLE001 - the last handler, also for code of a model that calls sys.exit
                session.terminal.stop_status()
                return failure.report_error(error, session.terminal, session.folder, function.__name__)

    _register(run, function)
    return run


@contextlib.contextmanager
def _quiet_warnings(mode: Mode) -> Iterator[None]:
    """Hide the warnings of libraries, because most are about internals of the libraries.

    Warnings are shown with --debug, and if the user sets -W or PYTHONWARNINGS.
    """
    with warnings.catch_warnings():
        if not mode.debug and not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def _register(run: Callable[..., int], function: Callable[..., int]) -> None:
    """Register `run` with the name, docstring and options of `function`, and the options of `MODES`."""
    signature = inspect.signature(function)
    modes = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option(f"--{name}", help=text)],
        )
        for name, text in MODES.items()
    ]
    parameters = [*list(signature.parameters.values())[1:], *modes]
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    # typer reads the signature, older versions read the annotations.
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # read by inspect.signature
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": int}
    app.command(function.__name__)(run)
