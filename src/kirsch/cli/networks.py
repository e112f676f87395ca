"""The verbs on one model: trace, plan, prune, export, measure."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kirsch.cli import drawing
from kirsch.cli.inputs import EXAMPLE, example_inputs, specifications
from kirsch.cli.terminal import Line, Piece
from kirsch.deploy.export import export, usage
from kirsch.deploy.measure import Measurement, measure
from kirsch.deploy.onnx_inputs import stand_ins
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import OutputError, UsageError
from kirsch.files import MANIFEST, check_writable, write_text
from kirsch.frameworks.port import Framework, framework_of, trace
from kirsch.graph.inputs import tensors
from kirsch.graph.plan import Goal, Plan
from kirsch.pruning.choose import plan as choose
from kirsch.pruning.prune import prune_with_verification
from kirsch.pruning.store import load, save
from kirsch.recipes.models import build, stated_inputs
from kirsch.report import figures

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.cli.terminal import Terminal
    from kirsch.graph.graph import InputSpec

RANDOM, PRETRAINED = "random", "pretrained"
GOAL_MISSED = 3
"""Exit code where the work is done and a goal is missed."""
MADE = ("plan.json", "model.safetensors", MANIFEST)
"""What a folder of a pruned model holds."""


@dataclass(frozen=True)
class Choice:
    """What a plan is asked for on the command line.

    Args:
        macs, params: the goal; see `Goal`.
        importance, scope, round_to, exclude, granularity, uniform, min_keep, seed: see `kirsch.plan`.
    """

    macs: float | None
    params: float | None
    importance: str
    scope: str
    round_to: str
    exclude: Sequence[str]
    granularity: Sequence[str]
    uniform: bool
    min_keep: float
    seed: int

    def plan(self, graph: Any, weights: str) -> Plan:
        """The plan for a graph, which keeps in words which weights it was made by."""
        if self.macs is None and self.params is None:
            raise UsageError("The goal is missing.", "Nothing says how small the model shall be.", "Give --macs 0.5.")
        plan = choose(
            graph,
            Goal(macs=self.macs, params=self.params),
            self.importance,
            cast("Any", self.scope),  # checked by `plan`, which names the known ones
            _round_to(self.round_to),
            self.exclude,
            self.granularity or None,
            uniform=self.uniform,
            min_keep=self.min_keep,
            seed=self.seed,
        )
        return replace(plan, method=plan.method | {"weights": weights})


@dataclass(frozen=True)
class Given:
    """A model that was named on the command line, ready for a verb.

    Args:
        model: the object.
        inputs: example inputs: a tuple of the framework's arrays, or a dict by keyword.
        weights: where its weights come from, in words.
        random: whether the weights are random.
    """

    model: Any
    inputs: Any
    weights: str
    random: bool

    @property
    def framework(self) -> Framework:
        """The framework of the model."""
        return framework_of(self.model)

    def said(self) -> list[Line]:
        """Where the weights come from: a ranking, an export or a store is worth what they are worth."""
        if not self.random:
            return [[Piece(f"{'weights':<13}{self.weights.removeprefix('the weights are ')}")]]
        return [[Piece(f"{'note':<13}", "doubt"), Piece(f"{self.weights}; --weights pretrained or FILE gives others.")]]

    def sizes(self) -> list[list[int]]:
        """The shape of each input."""
        arrays = self.inputs.values() if isinstance(self.inputs, dict) else self.inputs
        return [list(array.shape) for array in arrays]


def given(reference: str, inputs: Sequence[str], weights: str, *, pruned: str = "", seed: int = 0) -> Given:
    """The model that a reference names.

    Args:
        reference: "package.module:callable", "file.py:callable" or "timm:NAME".
        inputs: its example inputs, such as "1,3,224,224" or "input_ids=1,24:int64"; none takes what the model states.
        weights: "random", "pretrained" (timm only), or a safetensors file.
        pruned: folder of `kirsch prune`; its model is then taken, and the reference is its original.
        seed: of random weights.
    """
    if pruned and weights != RANDOM:
        raise UsageError("Both --pruned and --weights are given.", "A pruned model has its weights.", "Leave one out.")
    specs = specifications(inputs)
    if pruned:
        original = load(pruned, lambda: build(reference, base=Path(), seed=seed))
        return _ready(original, reference, specs, f"the weights are those of {pruned}", pruned=pruned)
    zoo = reference.startswith("timm:")
    model = model_of(reference, weights, seed=seed)
    return _ready(model, reference, specs, origin_of(reference, weights, seed), random=zoo and weights == RANDOM)


def origin_of(reference: str, weights: str, seed: int) -> str:
    """Where the weights of a model come from, in words."""
    if weights == PRETRAINED:
        return "the weights are pretrained"
    if weights != RANDOM:
        return f"the weights are from {weights}"
    zoo = reference.startswith("timm:")
    return f"the weights are random (seed {seed})" if zoo else "the weights are those that the callable gives"


def model_of(reference: str, weights: str, *, seed: int = 0) -> Any:
    """The model that a reference names, with its weights; see `given`."""
    zoo = reference.startswith("timm:")
    if weights == PRETRAINED and not zoo:
        raise UsageError(
            f"--weights pretrained does not go with {reference}.",
            "Only timm models have pretrained weights.",
            "Let the callable load them, or give a safetensors file.",
        )
    model = build(reference, base=Path(), seed=seed, weights=weights if zoo else RANDOM)
    if weights not in (RANDOM, PRETRAINED) and not zoo:
        framework_of(model).load_weights(model, Path(weights))
    return model


def show_trace(given: Given, layer: str, terminal: Terminal) -> int:
    """The groups and blockers of a model, or what goes with one layer of it and why."""
    graph = trace(given.model, given.inputs)
    if layer:
        text = graph.explain(layer).splitlines()
        terminal.result([[Piece(line)] for line in text], {"layer": layer, "explanation": text})
        return 0
    found = drawing.hanging(graph)
    content = {
        "model": graph.model_name,
        "weights": given.weights,
        "fingerprint": graph.fingerprint,
        "inputs": [list(spec.shape) for spec in tensors(graph.inputs)],
        "cost": graph.cost.to_dict(),
        "groups": [hangs.to_dict() for hangs in found],
        "blocks": list(graph.blocks),
        "blockers": [vars(blocker) for blocker in graph.blockers],
    }
    terminal.result([*drawing.trace_lines(graph, found), [], *given.said()], content)
    return 0


def show_plan(given: Given, choice: Choice, output: str, terminal: Terminal) -> int:
    """What would go, and what that costs; the plan goes to a file if one is named."""
    target = _file(output) if output else None
    graph = trace(given.model, given.inputs)
    plan = choice.plan(graph, given.weights)
    lines = [*drawing.plan_lines(plan, graph), *given.said(), *drawing.notes(_chance(given, plan))]
    if target is not None:
        write_text(target, plan.to_json())
        lines.append([Piece(f"{'plan':<13}{output}")])
    content = {
        "plan": json.loads(plan.to_json()),
        "file": output or None,
        "weights": given.weights,
        "notes": [*plan.notes, *_chance(given, plan)],
    }
    terminal.result(lines, content)
    return 0


def show_prune(make: Callable[[], Given], plan_file: str, choice: Choice, output: str, terminal: Terminal) -> int:
    """A pruned model in a folder, with verification. The plan and the folder are looked at before the model is made."""
    if plan_file and (choice.macs is not None or choice.params is not None):
        raise UsageError(
            "Both a plan and a goal are given.", "A plan has its goal.", "Give --plan or --macs, not both."
        )
    _check_folder(Path(output))
    stored = Plan.read(plan_file) if plan_file else None
    given = make()
    plan = stored or choice.plan(trace(given.model, given.inputs), given.weights)
    pruned = prune_with_verification(given.model, plan, example_inputs=given.inputs)
    folder = save(pruned.model, output)
    plan = pruned.plan
    notes = [*pruned.notes, *_chance(given, plan), *_other_weights(given, plan)]
    cut = sum(bool(removal.removed) for removal in plan.groups)
    verification = pruned.verification
    if verification is None:
        raise RuntimeError("a removal that was asked to verify gave no verification")
    lines = [
        [
            Piece(plan.model, "strong"),
            Piece(
                f"   {cut} group{'s' * (cut != 1)} cut{f', {len(plan.blocks)} blocks left out' if plan.blocks else ''}"
            ),
        ],
        *drawing.cost_lines(plan),
        [Piece(f"{'verified':<13}", "good"), Piece(verification.text)],
        [Piece(f"{'saved':<13}{folder}"), Piece("   kirsch.load gives it back", "faint")],
        *drawing.notes(notes),
        *given.said(),
    ]
    content = {
        "folder": str(folder),
        "plan": json.loads(pruned.plan.to_json()),
        "verification": verification.to_dict(),
        "notes": notes,
        "weights": given.weights,
    }
    terminal.result(lines, content)
    goal_met = not plan.goal or Goal(**plan.goal).met_by(plan.after, plan.before)
    return 0 if goal_met else GOAL_MISSED


def show_export(given: Given, output: str, terminal: Terminal) -> int:
    """A model as an ONNX file, held against the model."""
    artifact = export(given.model, _file(output), example_inputs=given.inputs)
    drift = artifact.details["drift"]
    taken = ", ".join(f"{value['name']} {value['shape']}" for value in artifact.details["inputs"])
    lines = [
        [Piece(f"{'file':<13}{artifact.path}   {figures.bytes_(artifact.bytes)}   opset {artifact.details['opset']}")],
        [Piece(f"{'inputs':<13}{taken}")],
        [
            Piece(f"{'verified':<13}", "good"),
            Piece(f"on {artifact.details['runtime']}: outputs differ by {drift:.0e} of the largest"),
        ],
        [Piece(f"{'sha256':<13}{artifact.sha256}")],
        *drawing.notes(artifact.details["notes"]),
        *given.said(),
    ]
    content = artifact.to_dict() | {"path": str(artifact.path), "usage": usage(artifact), "weights": given.weights}
    terminal.result(lines, content)
    return 0


def show_measure(given: Given, threads: int, rounds: int, terminal: Terminal) -> int:
    """What a model costs where it runs."""
    found = measure(given.model, example_inputs=given.inputs, threads=threads, rounds=rounds)
    lines = [*_measured(found, given.sizes()), *given.said()]
    terminal.result(lines, found.to_dict() | {"input": _one(given.sizes()), "weights": given.weights})
    return 0


def show_measure_file(path: str, inputs: Sequence[str], threads: int, rounds: int, terminal: Terminal) -> int:
    """What an ONNX file costs where it runs."""
    arrays = stand_ins(OnnxSession(path, threads), specifications(inputs))
    found = measure(path, example_inputs=arrays, threads=threads, rounds=rounds)
    sizes = [list(array.shape) for array in arrays]
    terminal.result(_measured(found, sizes), found.to_dict() | {"input": _one(sizes), "file": path})
    return 0


def _one(sizes: list[list[int]]) -> Any:
    """The shape of the only input, or the shapes of all."""
    return sizes[0] if len(sizes) == 1 else sizes


def _measured(found: Measurement, shapes: list[list[int]]) -> list[Line]:
    latency, aa = found.latency, found.aa
    sizes = [f"{figures.bytes_(found.bytes)} as ONNX"]
    if found.parameters is not None and found.macs is not None:
        sizes = [f"{figures.count(found.parameters)} parameters", f"{figures.count(found.macs)} MACs", *sizes]
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    taken = ", ".join("×".join(map(str, shape)) for shape in shapes)
    return [
        [Piece(f"{'size':<13}{'   '.join(sizes)}")],
        [Piece(f"{'input':<13}{taken}")],
        [
            Piece(
                f"{'latency':<13}{figures.micros(latency.median_us)}"
                f" [p10 {figures.micros(latency.p10_us)} – p90 {figures.micros(latency.p90_us)}]"
                f"   p95 {figures.micros(latency.p95_us)}   median of {latency.rounds} rounds of {latency.calls} calls"
            )
        ],
        [Piece(f"{'runtime':<13}{found.runtime}, {threads}, batch 1")],
        [Piece(f"{'noise':<13}A/A {figures.ratio(aa.value, aa.low, aa.high)}: the same file against itself")],
        *([Piece(f"{'not measured':<13}", "doubt"), Piece(text)] for text in found.not_measured),
    ]


def _ready(
    model: Any, reference: str, specs: list[InputSpec], weights: str, *, pruned: str = "", random: bool = False
) -> Given:
    framework = framework_of(model)
    inputs = example_inputs(model, specs) if specs else stated_inputs(reference, model)
    if inputs is None and pruned:
        inputs = framework.inputs_like(Plan.read(Path(pruned) / "plan.json").inputs, model) or None
    if inputs is None:
        raise UsageError(
            f"{reference} does not say what its inputs look like.",
            "Neither the model nor its callable has example_shape, and the model has no dummy_inputs.",
            EXAMPLE.replace("Write", "Give"),
        )
    return Given(model, inputs, weights, random)


def _round_to(text: str) -> Any:
    """A whole number if it is one; `plan` says what is wrong with anything else."""
    return int(text) if text.isascii() and text.isdigit() else text


def _chance(given: Given, plan: Plan) -> list[str]:
    """A note where the units of a plan were ranked by random weights, which are those of the model."""
    if not given.random or plan.method.get("weights") != given.weights:
        return []
    return ["Random weights rank the units by chance: which ones go says nothing about a trained model."]


def _other_weights(given: Given, plan: Plan) -> list[str]:
    """A note where a plan was made by other weights than those that it is applied to."""
    made = plan.method.get("weights", given.weights)
    if made == given.weights:
        return []
    return [f"The units of the plan were ranked by other weights: {made}. Now {given.weights}. Make the plan anew."]


def _file(output: str) -> Path:
    """A path to write to, found writable before any long work."""
    path = Path(output)
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", "A file is needed for the output.", "Give a name in it.")
    check_writable(path.parent)
    return path


def _check_folder(folder: Path) -> None:
    """A folder that may be written anew: absent, empty, or the work of an earlier `kirsch prune`."""
    check_writable(folder.parent)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file.", "A folder is needed for the output.", "Choose another name.")
    if folder.is_dir() and any(folder.iterdir()) and not all((folder / name).is_file() for name in MADE):
        raise OutputError(
            f"The folder {folder} holds something else.",
            "It is not empty, and no pruned model.",
            "Choose another folder.",
        )
