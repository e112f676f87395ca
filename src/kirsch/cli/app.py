"""The subcommands of `kirsch` and their options. The other files implement the subcommands."""

# typer reads the annotations when a subcommand is registered: no `from __future__ import annotations` here.
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kirsch import __version__
from kirsch.annotations import FEWEST_ROUNDS
from kirsch.cli import failure
from kirsch.cli.command import CLOSED, STOPPED, Session, app, command
from kirsch.cli.flags import given_limits, given_options, with_flags
from kirsch.cli.streams import discard_stdout, prepare_streams
from kirsch.cli.terminal import ClosedError, Mode, Terminal
from kirsch.errors import GoalError, Interrupted, OutputError, UsageError
from kirsch.pruning.options import PlanOptions
from kirsch.pruning.sensitivity_options import SensitivityOptions
from kirsch.pruning.sparsity.options import SparsityOptions

# typer has no public name for the base class of its errors, and its module differs between versions.
CommandLineError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

Model = Annotated[str, typer.Argument(help="package.module:callable, file.py:callable or timm:NAME.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="Shape of an input, such as 1,3,224,224, with its type (1,24:int64) and name (mask=1,24:int64); "
        "may be repeated. Default: random inputs of the model's example_shape, dummy_inputs or image size.",
    ),
]
Weights = Annotated[str, typer.Option("--weights", help="random, pretrained (timm), or a safetensors FILE.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of random weights and random choices.", min=0)]
BlockData = Annotated[
    str,
    typer.Option(
        "--data",
        help="Data source, as in a recipe, for importances that run the model. Blocks: default random example inputs.",
        metavar="SOURCE",
    ),
]
PrunedFolder = Annotated[
    str,
    typer.Option(
        "--pruned", help="Use the pruned model in this folder of kirsch prune; MODEL is its original.", metavar="FOLDER"
    ),
]
Run = Annotated[str, typer.Argument(help="Folder of a run.")]


@command
def compress(
    session: Session,
    recipe: Annotated[str, typer.Argument(help="A recipe. Default: the built-in recipe digits.")] = "",
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: prune.goal.macs=0.4; may be repeated.")
    ] = None,
    run: Annotated[str, typer.Option("--run", help="The run folder. Default: a new folder in runs/.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the steps, costs and time, without training.")
    ] = False,
) -> int:
    """Run a recipe, from the teacher to the report."""
    from kirsch.cli import jobs

    parsed, base = jobs.read(recipe, changes or [])
    if dry_run:
        return jobs.dry_run(parsed, base, run, session.terminal)
    session.folder = jobs.folder_for(parsed, run)
    return jobs.compress(parsed, base, session.folder, session.terminal)


@command
def resume(session: Session, run: Run) -> int:
    """Resume a run that was stopped or killed."""
    from kirsch.cli import jobs

    session.folder = Path(run)
    return jobs.resume(session.folder, session.terminal)


@command
def init(
    session: Session,
    file: Annotated[str, typer.Argument(help="The recipe file to write.")] = "recipe.yaml",
) -> int:
    """Write a recipe with a comment on each key."""
    from kirsch.cli import jobs

    return jobs.init(file, session.terminal)


@command
def trace(
    session: Session,
    model: Model,
    explain: Annotated[
        str, typer.Option("--explain", help="Show the layers coupled to this layer, and why.", metavar="LAYER")
    ] = "",
    inputs: Inputs = None,
    weights: Weights = "random",
    seed: Seed = 0,
) -> int:
    """Show the groups of units of a model, and what freezes axes."""
    from kirsch.cli import networks

    return networks.show_trace(networks.load_model(model, inputs or [], weights, seed=seed), explain, session.terminal)


@command
@with_flags(PlanOptions, limits=True)
def plan(
    session: Session,
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="File for the plan, as JSON.", metavar="FILE")] = "",
    inputs: Inputs = None,
    data: BlockData = "",
    weights: Weights = "random",
    seed: Seed = 0,
    **options: Any,
) -> int:
    """Choose the units to remove, without removing them."""
    from kirsch.cli import networks

    request = networks.PlanRequest(given_limits(options), given_options(options, PlanOptions), data, seed)
    loaded = networks.load_model(model, inputs or [], weights, seed=seed)
    return networks.show_plan(loaded, request, output, session.terminal)


@command
@with_flags(PlanOptions, limits=True)
def prune(
    session: Session,
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the pruned model.", metavar="FOLDER")],
    plan_file: Annotated[str, typer.Option("--plan", help="A plan file of kirsch plan.", metavar="FILE")] = "",
    inputs: Inputs = None,
    data: BlockData = "",
    weights: Weights = "random",
    seed: Seed = 0,
    **options: Any,
) -> int:
    """Prune a model by a plan or a goal, with verification."""
    from kirsch.cli import networks

    return networks.show_prune(
        lambda: networks.load_model(model, inputs or [], weights, seed=seed),
        plan_file,
        networks.PlanRequest(given_limits(options), given_options(options, PlanOptions), data, seed),
        output,
        session.terminal,
    )


@command
@with_flags(SparsityOptions)
def sparsify(
    session: Session,
    model: Model,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Safetensors file for the weights with zeros.", metavar="FILE")
    ],
    data: Annotated[
        str, typer.Option("--data", help="Data source, as in a recipe, for wanda and sparsegpt.", metavar="SOURCE")
    ] = "",
    weights: Weights = "random",
    seed: Seed = 0,
    **options: Any,
) -> int:
    """Set weights of a model to zero, and write all weights."""
    from kirsch.cli import networks, sparsify

    return sparsify.show_sparsify(
        lambda: networks.load_without_inputs(model, weights, seed=seed),
        given_options(options, SparsityOptions) | {"seed": seed},
        data,
        output,
        session.terminal,
    )


@command
@with_flags(SensitivityOptions)
def sensitivity(
    session: Session,
    model: Model,
    data: Annotated[
        str,
        typer.Option("--data", help="Data source, as in a recipe; its validation part is used.", metavar="SOURCE"),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="File for the result, as JSON.", metavar="FILE")] = "",
    inputs: Inputs = None,
    weights: Weights = "random",
    seed: Seed = 0,
    **options: Any,
) -> int:
    """Measure the quality without a part of each layer."""
    from kirsch.cli import networks, sensitivity

    return sensitivity.show_sensitivity(
        lambda: networks.load_model(model, inputs or [], weights, seed=seed),
        given_options(options, SensitivityOptions),
        data,
        seed,
        output,
        session.terminal,
    )


@command
def export(
    session: Session,
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="The ONNX file.", metavar="FILE")],
    pruned: PrunedFolder = "",
    inputs: Inputs = None,
    weights: Weights = "random",
    seed: Seed = 0,
) -> int:
    """Export a model to an ONNX file, and check the file."""
    from kirsch.cli import networks

    loaded = networks.load_model(model, inputs or [], weights, pruned=pruned, seed=seed)
    return networks.show_export(loaded, output, session.terminal)


@command
def measure(
    session: Session,
    model: Annotated[str, typer.Argument(help="A model, as MODEL of kirsch trace, or an ONNX file.")],
    pruned: PrunedFolder = "",
    inputs: Inputs = None,
    weights: Weights = "random",
    seed: Seed = 0,
    threads: Annotated[int, typer.Option("--threads", help="Threads of the runtime.", min=1)] = 1,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds of the timing.", min=FEWEST_ROUNDS)] = 30,
) -> int:
    """Measure time and size of a model or an ONNX file."""
    from kirsch.cli import networks

    if model.lower().endswith(".onnx"):
        networks.refuse_beside_file(model, {"--pruned": pruned, "--weights": weights.removeprefix("random")})
        return networks.show_measure_file(model, inputs or [], threads, rounds, session.terminal)
    loaded = networks.load_model(model, inputs or [], weights, pruned=pruned, seed=seed)
    return networks.show_measure(loaded, threads, rounds, session.terminal)


@command
def report(session: Session, run: Run) -> int:
    """Write the report of a finished run again."""
    from kirsch.cli import jobs

    return jobs.report(Path(run), session.terminal)


@command
def verify(session: Session, run: Run) -> int:
    """Check the files of a run against their hashes."""
    from kirsch.cli import jobs

    return jobs.verify(Path(run), session.terminal)


@command
def store(
    session: Session,
    action: Annotated[str, typer.Argument(help="build, check, verify or info.")],
    folder: Annotated[str, typer.Argument(help="Folder of the store.")],
    model: Annotated[str, typer.Option("--model", help="The teacher, as MODEL of kirsch trace.")] = "",
    weights: Weights = "random",
    data: Annotated[str, typer.Option("--data", help="Data source, as in a recipe; its training part is used.")] = "",
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Option of the data source: train=45000; may be repeated.")
    ] = None,
    keep: Annotated[str, typer.Option("--keep", help="Number of most likely classes to store; dense: all.")] = "10",
    views: Annotated[int, typer.Option("--views", help="Augmented views of each sample.", min=1)] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="Temperature of the stored probabilities.")] = 1.0,
    part: Annotated[str, typer.Option("--part", help="Build only one part, such as 1/4.")] = "",
    samples: Annotated[int, typer.Option("--samples", help="For check: number of views to compare.", min=1)] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples of one batch of the teacher.", min=1)] = 256,
    seed: Seed = 0,
) -> int:
    """Store a teacher's outputs on disk, or check a store."""
    from kirsch.cli import stores

    teacher = stores.TeacherArguments(model, weights, data, option or [], seed, batch_size)
    build_options = stores.BuildOptions(keep, views, temperature, part)
    return stores.run_action(action, Path(folder), teacher, build_options, samples, session.terminal)


@command
def methods(
    session: Session,
    name: Annotated[str, typer.Argument(help="A preset or a loss to show in full.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Write all presets and losses as Markdown.")] = False,
) -> int:
    """List objectives and losses of distillation."""
    from kirsch.cli.methods import methods as show

    return show(name, session.terminal, markdown=markdown)


@command
def doctor(session: Session) -> int:
    """List missing and broken packages, with pip commands."""
    from kirsch.cli.doctor import doctor as run_doctor

    return run_doctor(session.terminal)


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


def run(arguments: Sequence[str]) -> int:
    """Run the command with the arguments of a command line, and return the exit code."""
    prepare_streams()
    if "" not in sys.path:
        # The working folder is last, so that package.module:callable is found and no package is shadowed.
        sys.path.append("")
    terminal = Terminal(Mode(json="--json" in arguments, debug="--debug" in arguments))
    try:
        code = app(list(arguments), prog_name="kirsch", standalone_mode=False)
    except CommandLineError as error:
        return failure.report_error(_usage_error(error), terminal)
    except (typer.Abort, KeyboardInterrupt):
        return failure.report_error(Interrupted(STOPPED), terminal)
    except (SystemExit, ClosedError):  # typer exits if the reader of the help has closed the output
        discard_stdout()
        return CLOSED
    except OSError as error:  # typer writes the help to the standard output itself
        return failure.report_error(OutputError("The standard output cannot be written.", f"{error}."), terminal)
    return code if isinstance(code, int) else 0


def _usage_error(error: Any) -> UsageError:
    """Return the error for a command line that typer refused."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "kirsch"
    option = str(getattr(error, "option_name", ""))
    from kirsch.graph.cost_names import WORDS
    from kirsch.graph.goal import IN_PLACE_OF_LATENCY, LATENCY, NO_LATENCY, WHY_NO_LATENCY

    if LATENCY.search(option):
        return GoalError(f"There is no option {option}: {NO_LATENCY}", WHY_NO_LATENCY, IN_PLACE_OF_LATENCY)
    first, *rest = error.format_message().strip().split("\n")
    fraction = getattr(getattr(error, "param", None), "name", None) in WORDS
    fix = "Write a fraction: 0.5 for 50 %." if fraction else f"See {path} --help."
    return UsageError(first, " ".join(rest), fix)
