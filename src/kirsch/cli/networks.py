"""The subcommands on one model: trace, plan, prune, export, measure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.cli.inputs import EXAMPLE, example_inputs, specifications
from kirsch.data.batches import Batch
from kirsch.data.sources import load_data
from kirsch.deploy.export import export, usage
from kirsch.deploy.measure import measure
from kirsch.deploy.onnx_inputs import generated_inputs
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import NOT_REACHED, OutputError, UsageError
from kirsch.files import check_writable, write_text
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.trace import trace
from kirsch.graph.inputs import tensors
from kirsch.graph.kinds import BLOCK
from kirsch.graph.plan import Goal, Plan
from kirsch.pruning.blocks import runs_model
from kirsch.pruning.choose import plan as choose
from kirsch.pruning.importance import importance_of
from kirsch.pruning.prune import prune_with_verification
from kirsch.pruning.step import CALIBRATION
from kirsch.pruning.store import is_saved, load, save
from kirsch.recipes.models import build, stated_inputs
from kirsch.tables import Part, Piece, Table, notes
from kirsch.tasks.metrics import class_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.cli.terminal import Terminal
    from kirsch.frameworks.protocols import Framework
    from kirsch.graph.inputs import InputSpec

RANDOM, PRETRAINED = "random", "pretrained"
RANDOM_NOTE = "The zeros were chosen by random weights of the model; use --weights pretrained or FILE."
PLAN_FILE = re.compile(rb'\s*\{\s*"kirsch_plan"')
ONNX_FILE = re.compile(rb"\x08")  # key of the first field of the message, the version of the format


@dataclass(frozen=True)
class LoadedModel:
    """A model that the command line names, and its example inputs.

    Args:
        model: the model.
        inputs: example inputs: a tuple of the framework's arrays, or a dict by keyword.
        weights: description of the origin of the weights.
        random: whether the weights are random.
    """

    model: Any
    inputs: Any
    weights: str
    random: bool

    @property
    def framework(self) -> Framework:
        """Framework of the model."""
        return framework_of(self.model)

    def weights_parts(self) -> list[Part]:
        """Return a row on the origin of the weights, as a note if they are random."""
        if not self.random:
            return [Table([["weights", self.weights.removeprefix("the weights are ")]])]
        return [notes([f"{self.weights}; use --weights pretrained or FILE for trained weights."])]

    def shapes(self) -> list[list[int]]:
        """Return the shape of each input."""
        arrays = self.inputs.values() if isinstance(self.inputs, dict) else self.inputs
        return [list(array.shape) for array in arrays]


@dataclass(frozen=True)
class PlanRequest:
    """Goal and options of a plan from the command line.

    Args:
        limits: limits of the goal whose flags are given; see `Goal`.
        options: options of `kirsch.plan` whose flags are given.
        data: name or reference of a data source, as in `data.source` of a recipe, for importances that run the model.
            "": none; blocks are ranked on the example inputs.
        seed: seed of the plan and of the data.
    """

    limits: dict[str, Any]
    options: dict[str, Any]
    data: str
    seed: int

    @property
    def given_options(self) -> list[str]:
        """Names of the options that the user gave."""
        values = {**self.limits, "data": self.data or None, **self.options}
        return [name for name, value in values.items() if value is not None]

    @property
    def on_example_inputs(self) -> bool:
        """Whether blocks are ranked on the example inputs."""
        of_blocks = self.options.get("kinds") == [BLOCK] and not self.data
        return of_blocks and runs_model(self.options.get("importance", "influence"))

    def plan(self, loaded: LoadedModel) -> Plan:
        """Return the plan for a model. Its `method["weights"]` describes the weights that ranked the units."""
        if not self.limits and not self.options.get("keep") and "max_drop" not in self.options:
            raise UsageError(
                "The goal is missing.",
                "A plan needs a limit of the cost, a largest drop of the quality, or widths by hand.",
                "Give a limit: --macs 0.5 or --max-drop 0.02; or a width: --keep 'layer4.*=0.5'.",
            )
        options = dict(self.options)
        data: Any = [Batch(loaded.inputs)] if self.on_example_inputs else None
        if self.data:
            source = load_data(self.data, {}, seed=self.seed, base=Path())
            of_blocks = self.options.get("kinds") == [BLOCK]
            name = options.get("importance", "influence" if of_blocks else "magnitude")
            measures = "max_drop" in options
            if measures:
                options["validation"] = source.validation
                options["class_weights"] = class_numbers(options.get("class_weights"), source.classes)
            if not measures or (runs_model(name) if of_blocks else importance_of(name).needs != "weights"):
                data = source.calibration_batches(CALIBRATION)
        goal = Goal(**self.limits) if self.limits else None
        plan = choose(trace(loaded.model, loaded.inputs), goal, data=data, seed=self.seed, **options)
        return replace(plan, method=plan.method | {"weights": loaded.weights})

    def notes(self) -> list[str]:
        """Return a note if blocks were ranked on the example inputs."""
        if not self.on_example_inputs:
            return []
        return ["The blocks were ranked on example inputs, which are random; --data SOURCE ranks them on data."]


def load_model(reference: str, inputs: Sequence[str], weights: str, *, pruned: str = "", seed: int = 0) -> LoadedModel:
    """Return the model of a reference, with example inputs.

    Args:
        reference: "package.module:callable", "file.py:callable" or "timm:NAME".
        inputs: example inputs, such as "1,3,224,224" or "input_ids=1,24:int64"; empty uses the inputs of the model.
        weights: "random", "pretrained" (timm only), or a safetensors file.
        pruned: folder written by `kirsch prune`; the model in it is returned, and `reference` is its original.
        seed: seed of random weights.
    """
    if pruned and weights != RANDOM:
        raise UsageError(
            "Both --pruned and --weights are given.",
            "The folder of a pruned model contains the weights.",
            "Remove one of the options.",
        )
    specs = specifications(inputs)
    if pruned:
        original = load(pruned, lambda: build(reference, base=Path(), seed=seed))
        return _with_inputs(original, reference, specs, f"the weights are those of {pruned}", pruned=pruned)
    loaded = load_without_inputs(reference, weights, seed=seed)
    return _with_inputs(loaded.model, reference, specs, loaded.weights, random=loaded.random)


def load_without_inputs(reference: str, weights: str, *, seed: int = 0) -> LoadedModel:
    """Return the model of a reference, for subcommands that do not run it on example inputs; see `load_model`."""
    model, zoo = model_of(reference, weights, seed=seed), reference.startswith("timm:")
    return LoadedModel(model, (), origin_of(reference, weights, seed), zoo and weights == RANDOM)


def origin_of(reference: str, weights: str, seed: int) -> str:
    """Return a description of the origin of the weights."""
    if weights == PRETRAINED:
        return "the weights are pretrained"
    if weights != RANDOM:
        return f"the weights are from {weights}"
    zoo = reference.startswith("timm:")
    return f"the weights are random (seed {seed})" if zoo else "the weights are those of the callable"


def model_of(reference: str, weights: str, *, seed: int = 0) -> Any:
    """Return the model of a reference with its weights; see `load_model`."""
    zoo = reference.startswith("timm:")
    if weights == PRETRAINED and not zoo:
        raise UsageError(
            f"--weights pretrained cannot be used for {reference}.",
            "Only timm models have pretrained weights.",
            "Load the weights in the callable, or give a safetensors file.",
        )
    model = build(reference, base=Path(), seed=seed, weights=weights if zoo else RANDOM)
    if weights not in (RANDOM, PRETRAINED) and not zoo:
        framework_of(model).inference.load_weights(model, Path(weights))
    return model


def show_trace(loaded: LoadedModel, layer: str, terminal: Terminal) -> int:
    """Show the groups and blockers of a model, or the layers coupled to one layer."""
    graph = trace(loaded.model, loaded.inputs)
    if layer:
        text = graph.explain(layer).splitlines()
        terminal.result([[Piece(line)] for line in text], {"layer": layer, "explanation": text})
        return 0
    content = {
        "model": graph.model_name,
        "weights": loaded.weights,
        "fingerprint": graph.fingerprint,
        "inputs": [list(spec.shape) for spec in tensors(graph.inputs)],
        "cost": graph.cost.to_dict(),
        "groups": [cost.to_dict() for cost in graph.group_costs()],
        "blocks": list(graph.blocks),
        "blockers": [vars(blocker) for blocker in graph.blockers],
    }
    terminal.result([*graph.parts(), [], *loaded.weights_parts()], content)
    return 0


def show_plan(loaded: LoadedModel, request: PlanRequest, output: str, terminal: Terminal) -> int:
    """Show a plan with its costs, and write it to a file if one is named."""
    target = output_file(output, PLAN_FILE, "a plan") if output else None
    plan = request.plan(loaded)
    texts = [*request.notes(), *_random_weights_note(loaded, plan)]
    parts = [*plan.parts(), *loaded.weights_parts(), notes(texts)]
    if target is not None:
        write_text(target, plan.to_json())
        parts.append(Table([["plan", output]]))
    content = {
        "plan": json.loads(plan.to_json()),
        "file": output or None,
        "weights": loaded.weights,
        "notes": [*plan.notes, *texts],
    }
    terminal.result(parts, content)
    return 0


def show_prune(
    load: Callable[[], LoadedModel], plan_file: str, request: PlanRequest, output: str, terminal: Terminal
) -> int:
    """Prune a model and save it to a folder. Plan and folder are checked before the model is loaded."""
    if plan_file and request.given_options:
        flag = f"--{request.given_options[0].replace('_', '-')}"
        raise UsageError(
            f"Both a plan and {flag} are given.",
            "A plan contains its goal and its options.",
            f"Give --plan or {flag}, not both.",
        )
    _check_output_folder(Path(output))
    stored = Plan.read(plan_file) if plan_file else None
    loaded = load()
    plan = stored or request.plan(loaded)
    pruned = prune_with_verification(loaded.model, plan, example_inputs=loaded.inputs)
    folder = save(pruned.model, output)
    plan = pruned.plan
    verification = pruned.verification
    if verification is None:
        raise RuntimeError("a removal with verify=True returned no verification")
    texts = [*([] if stored else request.notes()), *_random_weights_note(loaded, plan)]
    texts += _other_weights_note(loaded, plan)
    saved = Table([["saved", [Piece(f"{folder}"), Piece("   load it with kirsch.load", "faint")]]])
    parts = [*pruned.parts(), notes(texts), saved, *loaded.weights_parts()]
    content = {
        "folder": str(folder),
        "plan": json.loads(pruned.plan.to_json()),
        "verification": verification.to_dict(),
        "notes": [*pruned.notes, *texts],
        "weights": loaded.weights,
    }
    terminal.result(parts, content)
    goal_met = plan.limits is None or plan.limits.met_by(plan.after, plan.before)
    return 0 if goal_met else NOT_REACHED


def show_export(loaded: LoadedModel, output: str, terminal: Terminal) -> int:
    """Export a model to an ONNX file, and compare the outputs of model and file."""
    artifact = export(loaded.model, output_file(output, ONNX_FILE, "an ONNX file"), example_inputs=loaded.inputs)
    content = artifact.to_dict() | {"path": str(artifact.path), "usage": usage(artifact), "weights": loaded.weights}
    terminal.result([*artifact.parts(), *loaded.weights_parts()], content)
    return 0


def show_measure(loaded: LoadedModel, threads: int, rounds: int, terminal: Terminal) -> int:
    """Measure a model."""
    measurement = measure(loaded.model, example_inputs=loaded.inputs, threads=threads, rounds=rounds)
    parts = [measurement.table(_shapes_text(loaded.shapes())), *loaded.weights_parts()]
    terminal.result(
        parts, measurement.to_dict() | {"input": _single_or_all(loaded.shapes()), "weights": loaded.weights}
    )
    return 0


def show_measure_file(path: str, inputs: Sequence[str], threads: int, rounds: int, terminal: Terminal) -> int:
    """Measure an ONNX file."""
    arrays = generated_inputs(OnnxSession(path, threads), specifications(inputs))
    measurement = measure(path, example_inputs=arrays, threads=threads, rounds=rounds)
    shapes = [list(array.shape) for array in arrays]
    content = measurement.to_dict() | {"input": _single_or_all(shapes), "file": path}
    terminal.result([measurement.table(_shapes_text(shapes))], content)
    return 0


def refuse_beside_file(path: str, options: dict[str, str]) -> None:
    """Refuse options that select the weights of a model, together with an ONNX file.

    Args:
        path: path of the file.
        options: options and their values, which are empty if they are not given.
    """
    given = next((name for name, value in options.items() if value), None)
    if given is not None:
        raise UsageError(
            f"{given} has no effect on the file {path}.",
            "An ONNX file contains its weights.",
            f"Remove {given}, or give the model in place of the file.",
        )


def _single_or_all(shapes: list[list[int]]) -> Any:
    """Return the shape of a single input, or the list of shapes of several inputs."""
    return shapes[0] if len(shapes) == 1 else shapes


def _shapes_text(shapes: list[list[int]]) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in shapes)


def _with_inputs(
    model: Any, reference: str, specs: list[InputSpec], weights: str, *, pruned: str = "", random: bool = False
) -> LoadedModel:
    framework = framework_of(model)
    inputs = example_inputs(model, specs) if specs else stated_inputs(reference, model)
    if inputs is None and pruned:
        inputs = framework.analysis.inputs_like(Plan.read(Path(pruned) / "plan.json").inputs, model) or None
    if inputs is None:
        raise UsageError(
            f"The inputs of {reference} are unknown.",
            "Neither the model nor its callable has example_shape, and the model has no dummy_inputs.",
            EXAMPLE.replace("Write", "Give"),
        )
    return LoadedModel(model, inputs, weights, random)


def _random_weights_note(loaded: LoadedModel, plan: Plan) -> list[str]:
    """Return a note if the units of a plan were ranked by random weights of the model."""
    if not loaded.random or plan.method.get("weights") != loaded.weights:
        return []
    return ["The units were ranked by random weights. Make a new plan for the trained model."]


def _other_weights_note(loaded: LoadedModel, plan: Plan) -> list[str]:
    """Return a note if the weights of a plan and of the model differ."""
    plan_weights = plan.method.get("weights", loaded.weights)
    if plan_weights == loaded.weights:
        return []
    text = "The units of the plan were ranked by other weights than those of the model"
    return [f"{text}: for the plan, {plan_weights}; for the model, {loaded.weights}. Make a new plan."]


def output_file(output: str, start: re.Pattern[bytes], noun: str) -> Path:
    """Return the path of an output file, after a check that it can be written.

    Args:
        output: the path.
        start: pattern of the first bytes of a file of this kind; other files are not replaced.
        noun: name of this kind of files, for messages.
    """
    path = Path(output)
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", "A file is needed for the output.", "Give a file name in the folder.")
    check_writable(path.parent)
    if path.is_file() and (content := path.read_bytes()) and not start.match(content):
        raise OutputError(f"The file {path} exists and is not {noun}.", "It is not replaced.", "Choose another name.")
    return path


def _check_output_folder(folder: Path) -> None:
    """Check that an output folder is absent, empty, or from an earlier `kirsch prune`."""
    check_writable(folder.parent)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file.", "A folder is needed for the output.", "Choose another name.")
    if folder.is_dir() and any(folder.iterdir()) and not is_saved(folder):
        raise OutputError(
            f"The folder {folder} contains other files.",
            "It is neither empty nor the folder of a pruned model.",
            "Choose another folder.",
        )
