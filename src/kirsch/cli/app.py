"""The `kirsch` command: its verbs and their options. What a verb does lives in the files beside it."""

# Annotations are read by typer when a verb is registered: no `from __future__ import annotations` here.
import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kirsch import __version__
from kirsch.cli import failure
from kirsch.cli.interrupts import interruptible
from kirsch.cli.paths import check_paths
from kirsch.cli.streams import forsake_stdout, prepare_streams, stdout_for_result
from kirsch.cli.terminal import ClosedError, Mode, Terminal
from kirsch.errors import GoalError, Interrupted, OutputError, UsageError

MODES = {
    "json": "One JSON object on the standard output; progress goes to the standard error.",
    "quiet": "Results only, no progress.",
    "debug": "Show the traceback of an error.",
}
"""Options that every verb has."""

STOPPED = "The command was stopped by SIGINT."
CLOSED = 141
"""Exit code when the reader of the standard output has gone: what a shell gives for SIGPIPE."""

# typer has no public name for the base of its errors, and where it lives has changed between its versions.
BadCall: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="kirsch",
    help="Distill, prune, export and measure neural networks, with verification.",
    epilog=(
        "Exit codes: 0 done, goals met; 2 usage or recipe; 3 a goal missed, or verify of a run that is not finished; "
        "4 model, data or checkpoint; 5 environment; 6 numbers went wrong; 75 and 130 stopped, checkpoint saved; "
        "1 a bug of ours."
    ),
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Session:
    """What a verb is given beside its options.

    Args:
        terminal: where it writes.
    """

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.folder: Path | None = None  # of the run, as soon as there is one: tracebacks go there


def verb(act: Callable[..., int]) -> Callable[..., int]:
    """Make a function a verb: it gets a `Session` first, and its options, and gives the exit code.

    Each verb has the options of `MODES` as well, and whatever it raises is told as `failure.tell` does.
    """

    def run(**options: Any) -> int:
        mode = Mode(**{name: options.pop(name) for name in MODES})
        with stdout_for_result() if mode.json else contextlib.nullcontext(sys.stdout) as stdout:
            session = Session(Terminal(mode, stdout))
            try:
                check_paths(options)
                with interruptible(stdout), _calm(mode):
                    return act(session, **options)
            except ClosedError:
                forsake_stdout()
                return CLOSED
            except KeyboardInterrupt:
                session.terminal.stop()
                return failure.tell(Interrupted(STOPPED), session.terminal)
            except BaseException as error:  # noqa: BLE001 - the last stop, also for a model's code that calls sys.exit
                session.terminal.stop()
                return failure.tell(error, session.terminal, session.folder, act.__name__)

    _as_command(run, act)
    return run


@contextlib.contextmanager
def _calm(mode: Mode) -> Iterator[None]:
    """Silence the warnings of libraries: they speak of their own insides, to those who call them.

    With --debug, or where Python was told what to do with warnings (-W, PYTHONWARNINGS), they are shown.
    """
    with warnings.catch_warnings():
        if not mode.debug and not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def _as_command(run: Callable[..., int], act: Callable[..., int]) -> None:
    """Register `run` with the name, the text and the options of `act`, and those of `MODES`."""
    signature = inspect.signature(act)
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
    run.__name__, run.__doc__ = act.__name__, act.__doc__
    # typer reads the one, older versions the other.
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # Python's own protocol
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": int}
    app.command(act.__name__)(run)


Model = Annotated[str, typer.Argument(help="package.module:callable, file.py:callable or timm:NAME.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="An input: 1,3,224,224, 1,24:int64 or name=1,24:int64; may be repeated. Else what the model states.",
    ),
]
Weights = Annotated[str, typer.Option("--weights", help="random, pretrained (timm), or a safetensors FILE.")]
Seed = Annotated[int, typer.Option("--seed", help="Of random weights and random choices.", min=0)]
Macs = Annotated[float | None, typer.Option("--macs", help="MACs that may stay, as a fraction: 0.5.")]
Params = Annotated[float | None, typer.Option("--params", help="Parameters that may stay, as a fraction.")]
Importance = Annotated[str, typer.Option("--importance", help="What ranks the units: magnitude, random.")]
Scope = Annotated[str, typer.Option("--scope", help="global ranks all layers together, local each by itself.")]
RoundTo = Annotated[str, typer.Option("--round-to", help="Kept widths are multiples of this number, or auto.")]
Granularity = Annotated[
    list[str] | None, typer.Option("--kind", help="Kind of unit that may go, such as head; may be repeated. All.")
]
Uniform = Annotated[bool, typer.Option("--uniform", help="Layers of one kind lose the same number of units.")]
MinKeep = Annotated[float, typer.Option("--min-keep", help="Fraction of each group that stays in any case.")]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="A layer or glob to leave as it is; may be repeated.")
]
PrunedFolder = Annotated[
    str,
    typer.Option("--pruned", help="Folder of kirsch prune: take its model; MODEL is the original.", metavar="FOLDER"),
]
Run = Annotated[str, typer.Argument(help="Folder of a run.")]


@verb
def compress(
    session: Session,
    recipe: Annotated[str, typer.Argument(help="A recipe; the built-in digits if left out.")] = "",
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: prune.goal.macs=0.4; may be repeated.")
    ] = None,
    run: Annotated[str, typer.Option("--run", help="The run folder; a new one below runs/ if left out.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, without training.")] = False,
) -> int:
    """Do a whole job, from the teacher to the report."""
    from kirsch.cli import jobs

    wanted, base = jobs.read(recipe, changes or [])
    if dry_run:
        return jobs.dry_run(wanted, base, run, session.terminal)
    session.folder = jobs.folder_for(wanted, run)
    return jobs.compress(wanted, base, session.folder, session.terminal)


@verb
def resume(session: Session, run: Run) -> int:
    """Go on with a run that was stopped or killed."""
    from kirsch.cli import jobs

    session.folder = Path(run)
    return jobs.resume(session.folder, session.terminal)


@verb
def init(
    session: Session,
    file: Annotated[str, typer.Argument(help="Where to write it.")] = "recipe.yaml",
) -> int:
    """Write a recipe with a comment on each key."""
    from kirsch.cli import jobs

    return jobs.init(file, session.terminal)


@verb
def trace(
    session: Session,
    model: Model,
    explain: Annotated[
        str, typer.Option("--explain", help="Say what goes with this layer, and why.", metavar="LAYER")
    ] = "",
    inputs: Inputs = None,
    weights: Weights = "random",
    seed: Seed = 0,
) -> int:
    """Show what of a model may go, and what blocks the rest."""
    from kirsch.cli import networks

    return networks.show_trace(networks.given(model, inputs or [], weights, seed=seed), explain, session.terminal)


@verb
def plan(
    session: Session,
    model: Model,
    macs: Macs = None,
    params: Params = None,
    importance: Importance = "magnitude",
    scope: Scope = "global",
    round_to: RoundTo = "auto",
    exclude: Exclude = None,
    kind: Granularity = None,
    uniform: Uniform = False,
    min_keep: MinKeep = 0.1,
    output: Annotated[str, typer.Option("--output", "-o", help="File for the plan, as JSON.", metavar="FILE")] = "",
    inputs: Inputs = None,
    weights: Weights = "random",
    seed: Seed = 0,
) -> int:
    """Choose what goes, without cutting it."""
    from kirsch.cli import networks

    kinds, left = kind or [], exclude or []
    choice = networks.Choice(macs, params, importance, scope, round_to, left, kinds, uniform, min_keep, seed)
    found = networks.given(model, inputs or [], weights, seed=seed)
    return networks.show_plan(found, choice, output, session.terminal)


@verb
def prune(
    session: Session,
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the pruned model.", metavar="FOLDER")],
    plan_file: Annotated[str, typer.Option("--plan", help="A plan of kirsch plan.", metavar="FILE")] = "",
    macs: Macs = None,
    params: Params = None,
    importance: Importance = "magnitude",
    scope: Scope = "global",
    round_to: RoundTo = "auto",
    exclude: Exclude = None,
    kind: Granularity = None,
    uniform: Uniform = False,
    min_keep: MinKeep = 0.1,
    inputs: Inputs = None,
    weights: Weights = "random",
    seed: Seed = 0,
) -> int:
    """Cut a model by a plan or a goal, with verification."""
    from kirsch.cli import networks

    kinds, left = kind or [], exclude or []
    choice = networks.Choice(macs, params, importance, scope, round_to, left, kinds, uniform, min_keep, seed)
    return networks.show_prune(
        lambda: networks.given(model, inputs or [], weights, seed=seed), plan_file, choice, output, session.terminal
    )


@verb
def export(
    session: Session,
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="The ONNX file.", metavar="FILE")],
    pruned: PrunedFolder = "",
    inputs: Inputs = None,
    weights: Weights = "random",
    seed: Seed = 0,
) -> int:
    """Write a model as an ONNX file, and check it."""
    from kirsch.cli import networks

    found = networks.given(model, inputs or [], weights, pruned=pruned, seed=seed)
    return networks.show_export(found, output, session.terminal)


@verb
def measure(
    session: Session,
    model: Annotated[str, typer.Argument(help="A model as for trace, or an ONNX file.")],
    pruned: PrunedFolder = "",
    inputs: Inputs = None,
    weights: Weights = "random",
    seed: Seed = 0,
    threads: Annotated[int, typer.Option("--threads", help="Of the runtime.", min=1)] = 1,
    rounds: Annotated[int, typer.Option("--rounds", help="Of the timing.", min=6)] = 30,
) -> int:
    """Time and count a model or an ONNX file."""
    from kirsch.cli import networks

    if model.lower().endswith(".onnx"):
        return networks.show_measure_file(model, inputs or [], threads, rounds, session.terminal)
    found = networks.given(model, inputs or [], weights, pruned=pruned, seed=seed)
    return networks.show_measure(found, threads, rounds, session.terminal)


@verb
def report(session: Session, run: Run) -> int:
    """Draw the report of a finished run again."""
    from kirsch.cli import jobs

    return jobs.report(Path(run), session.terminal)


@verb
def verify(session: Session, run: Run) -> int:
    """Check the files of a run against their hashes."""
    from kirsch.cli import jobs

    return jobs.verify(Path(run), session.terminal)


@verb
def store(
    session: Session,
    action: Annotated[str, typer.Argument(help="build, finish, check, verify or info.")],
    folder: Annotated[str, typer.Argument(help="Folder of the store.")],
    model: Annotated[str, typer.Option("--model", help="The teacher, as MODEL of trace.")] = "",
    weights: Weights = "random",
    data: Annotated[str, typer.Option("--data", help="A source of a recipe's data; its training part.")] = "",
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Of the data: train=45000; may be repeated.")
    ] = None,
    keep: Annotated[str, typer.Option("--keep", help="The K most likely classes, as 10; or dense.")] = "10",
    views: Annotated[int, typer.Option("--views", help="Augmented looks of each sample.", min=1)] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the probabilities kept.")] = 1.0,
    part: Annotated[str, typer.Option("--part", help="Build a share only, as 1/4; then finish.")] = "",
    samples: Annotated[int, typer.Option("--samples", help="Looks that check compares.", min=1)] = 256,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Samples that the teacher runs on at a time.", min=1)
    ] = 256,
    seed: Seed = 0,
) -> int:
    """Keep a teacher's outputs on disk, or check them."""
    from kirsch.cli import stores

    asked = stores.Asked(model, weights, data, option or [], seed, batch_size)
    building = stores.Building(keep, views, temperature, part)
    return stores.act(action, Path(folder), asked, building, samples, session.terminal)


@verb
def methods(
    session: Session,
    name: Annotated[str, typer.Argument(help="A preset or a loss, to be shown in full.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="All as a page of Markdown.")] = False,
) -> int:
    """List objectives and losses of distillation."""
    from kirsch.cli.methods import methods as show

    return show(name, session.terminal, markdown=markdown)


@verb
def doctor(session: Session) -> int:
    """List what is installed, missing, and how to get it."""
    from kirsch.cli.doctor import doctor as examine

    return examine(session.terminal)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Distill, prune, export and measure neural networks, with verification."""
    if version:
        typer.echo(f"kirsch {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(given: Sequence[str]) -> int:
    """Run the command with the arguments of a command line; gives the exit code."""
    prepare_streams()
    if "" not in sys.path:
        sys.path.append("")  # the working folder, last: package.module:callable is found there, and shadows nothing
    terminal = Terminal(Mode(json="--json" in given, debug="--debug" in given))
    try:
        code = app(list(given), prog_name="kirsch", standalone_mode=False)
    except BadCall as error:
        return failure.tell(_misuse(error), terminal)
    except (typer.Abort, KeyboardInterrupt):
        return failure.tell(Interrupted(STOPPED), terminal)
    except (SystemExit, ClosedError):  # typer exits by itself where the reader of the help has gone
        forsake_stdout()
        return CLOSED
    except OSError as error:  # of the help, which goes to the standard output by itself
        return failure.tell(OutputError("The standard output cannot be written.", f"{error}."), terminal)
    return code if isinstance(code, int) else 0


def _misuse(error: Any) -> UsageError:
    """What typer says of a wrong command line, in three lines."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "kirsch"
    option = str(getattr(error, "option_name", ""))
    from kirsch.graph.plan import IN_PLACE_OF_LATENCY, LATENCY, NO_LATENCY, WHY_NO_LATENCY

    if LATENCY.search(option):
        return GoalError(f"There is no option {option}: {NO_LATENCY}", WHY_NO_LATENCY, IN_PLACE_OF_LATENCY)
    first, *rest = error.format_message().strip().split("\n")
    fraction = getattr(getattr(error, "param", None), "name", None) in ("macs", "params")
    fix = "Write a fraction: 0.5 for 50 %." if fraction else f"See {path} --help."
    return UsageError(first, " ".join(rest), fix)
