"""From a PyTorch model to its `Graph`: export, then walk the operations."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.export.graph_signature import OutputKind
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.analysis import operators
from kirsch.frameworks.pytorch.analysis.attention import Fold, fold
from kirsch.frameworks.pytorch.analysis.blocks import Runner
from kirsch.frameworks.pytorch.analysis.blocks import find as find_blocks
from kirsch.frameworks.pytorch.analysis.count import macs_of
from kirsch.frameworks.pytorch.analysis.held import (
    costs,
    freeze_shared,
    freeze_unused,
    identities,
    values_of,
)
from kirsch.frameworks.pytorch.analysis.integers import PACKAGES, Compared, TracedInt
from kirsch.frameworks.pytorch.analysis.node_call import call_of
from kirsch.frameworks.pytorch.analysis.operation import Step
from kirsch.frameworks.pytorch.analysis.program import Sizes, export, name_of, shapes_of
from kirsch.frameworks.pytorch.analysis.provenance import Calls, SizeOf
from kirsch.frameworks.pytorch.analysis.residual import ends_of_branch
from kirsch.frameworks.pytorch.analysis.stand_ins import specification
from kirsch.frameworks.pytorch.analysis.traced import Traced
from kirsch.frameworks.pytorch.inference.calling import without_values
from kirsch.frameworks.pytorch.inference.outputs import counting
from kirsch.frameworks.pytorch.inference.predict import arguments
from kirsch.frameworks.pytorch.modules.submodule import inputs_of, part_of, shared_with_rest
from kirsch.frameworks.pytorch.modules.unsupported import check
from kirsch.graph.constants import COMPARISON
from kirsch.graph.facts import Facts, Freeze, Operation
from kirsch.graph.graph import Graph, Tracing
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from torch.fx import Node

    from kirsch.graph.labels import Axis

DEFAULT = Tracing()
CONSTANT = "it meets a constant tensor"


def trace(whole: nn.Module, example_inputs: Any, tracing: Tracing = DEFAULT, *, of_part: bool = False) -> Graph:
    """The coupling analysis of a model; see `kirsch.trace`.

    `of_part`: the example inputs are those of the part that is traced, not of the whole.
    """
    model = part_of(whole, tracing.scope)
    if tracing.scope and not of_part:
        example_inputs = inputs_of(whole, tracing.scope, example_inputs)
    args, options = arguments(example_inputs)
    check(model)
    _check_samples(model, args, options)
    facts = Facts()
    tensors = _labelled(model, facts)
    traced = _walk(model, args, options, facts, tensors, tracing)
    if not traced.outputs:
        raise ModelError(
            f"The model {type(model).__name__} returns no tensors.",
            "Every unit could go without any output changing, so that a cut could not be verified.",
            "Let its forward return the tensors that count.",
        )
    costs(model, facts, tensors)
    unused = _unused(tensors, traced)
    if unused:
        traced.training = _training_only(model, args, options, facts, tensors, tracing)
    if traced.training is not None:
        unused &= _unused(tensors, traced.training)
        known = {name for fold in traced.folds for name in fold.rows}
        traced.folds += [fold for fold in traced.training.folds if known.isdisjoint(fold.rows)]
    freeze_unused(unused, facts, tensors)
    if tracing.scope:
        freeze_shared(shared_with_rest(whole, tracing.scope), model, facts, tensors)
    own = dict(model.named_parameters())
    return Graph(
        model_name=type(model).__name__,
        facts=facts,
        tensors=tensors,
        parameters=tuple(own),
        inputs=specification(args, options),
        values=lambda name: values_of(own[name], name, type(model).__name__),
        fits=lambda other: other is whole and {n: id(p) for n, p in own.items()} == identities(model),
        blocks=tuple(block.path for block in traced.blocks),
        runner=Runner(whole, model, traced.blocks),
        tracing=tracing,
        traced=traced,
    )


def _check_samples(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raise if the example inputs hold no samples, or no values where the model has some: any cut would pass."""
    given = [value for value in tree_leaves((args, options)) if isinstance(value, torch.Tensor)]
    empty = without_values(model, args, options) if any(value.is_meta for value in given) else None
    if empty is not None:
        raise ModelError(f"The model {type(model).__name__} cannot be traced.", *empty)
    axes = [value.shape for value in given if value.dim()]
    if axes and not any(shape[0] for shape in axes):
        raise ModelError(
            f"The example inputs have no samples: their shapes are {', '.join(str(tuple(shape)) for shape in axes)}.",
            "On no samples, a verification would show nothing.",
            "Give at least one sample on the first axis.",
        )


def _walk(
    model: nn.Module,
    args: tuple[Any, ...],
    options: dict[str, Any],
    facts: Facts,
    tensors: dict[str, Tensor],
    tracing: Tracing,
    *,
    training: bool = False,
) -> Traced:
    """Export the model and gather the facts of each operation."""
    calls = Calls()
    program = export(model, args, options, calls, tracing.decisions, training=training)
    signature = program.graph_signature
    slots = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    user = [place for place, spec in enumerate(signature.output_specs) if spec.kind is OutputKind.USER_OUTPUT]
    outputs = dict(zip(user, calls.outputs, strict=False))  # after them come tensors that are computed and never read
    counts = counting(calls.outputs, () if training else tracing.outputs)
    constants = frozenset(signature.inputs_to_lifted_tensor_constants)
    shaped = [value for value in tree_leaves((args, options)) if isinstance(value, torch.Tensor) and value.dim()]
    batch = shaped[0].shape[0] if shaped else 1
    walk = _Walk(facts, tensors, slots, constants, calls, Sizes.of(program, args, options), tracing, batch)
    for node in program.graph.nodes:
        walk.visit(node)
    counted = frozenset(place for place, name in outputs.items() if name in counts)
    walk.put_out(outputs, counted)
    if not tracing.as_graph:
        walk.pin_numbers()
    modules = not training and not tracing.as_graph
    blocks = find_blocks(model, walk.states, {*slots, *constants}, calls) if modules else ()
    statistics = frozenset(facts.statistics)
    return Traced(program, slots, walk.states, args, options, outputs, counted, walk.folds, blocks, statistics)


def _training_only(
    model: nn.Module,
    args: tuple[Any, ...],
    options: dict[str, Any],
    facts: Facts,
    tensors: dict[str, Tensor],
    tracing: Tracing,
) -> Traced | None:
    """Add the ties of what only training runs, such as auxiliary heads; None if training cannot be traced.

    Costs and statistics stay those of inference.
    """
    terms, statistics, facts.statistics = list(facts.terms), facts.statistics, set()
    try:
        way = replace(tracing, decisions="example")  # of several, such as the masks that training draws
        return _walk(model, args, options, facts, tensors, way, training=True)
    except ModelError:
        return None
    finally:
        facts.terms[:], facts.statistics = terms, statistics


def _labelled(model: nn.Module, facts: Facts) -> dict[str, Tensor]:
    """Fresh labels for each axis of each parameter and buffer; tied tensors share theirs."""
    by_identity: dict[int, Tensor] = {}
    out = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in named:
        if id(value) not in by_identity:
            axes = [facts.fresh(size) if size > 1 else None for size in value.shape]
            by_identity[id(value)] = Tensor.of(value.shape, axes)
        out[name] = by_identity[id(value)]
    return out


def _unused(tensors: dict[str, Tensor], traced: Traced) -> set[int]:
    """The labeled tensors, by identity, that no operation of a trace takes."""
    nodes = traced.program.graph.nodes
    taken = [traced.slots[n.name] for n in nodes if n.op == "placeholder" and n.name in traced.slots and n.users]
    used = {id(tensors[name]) for name in taken}
    return {id(tensor) for tensor in tensors.values() if any(a is not None for a in tensor.axes)} - used


class _Walk:
    """Visits the nodes in order; `states` holds what each put out."""

    def __init__(
        self,
        facts: Facts,
        tensors: dict[str, Tensor],
        slots: dict[str, str],
        constants: frozenset[str],
        calls: Calls,
        sizes: dict[Node, list[tuple[int, ...]]],
        tracing: Tracing,
        batch: int,
    ) -> None:
        self.states: dict[Node, Any] = {}
        self.folds: list[Fold] = []
        self._causes: dict[Node, Freeze] = {}
        self._facts = facts
        self._tensors = tensors
        self._slots = slots
        self._constants = constants
        self._calls = calls
        self._sizes = sizes
        self._tracing = tracing
        self._given: list[Any] = []
        self._place: dict[Node, int] = {}
        self._batch = batch
        self._fixed: set[Node] = set()  # made of parameters and constants alone
        self._by_call: dict[int, list[Any]] = {}
        self._settled: dict[int, set[int]] = {}
        self._origin: dict[int, Operation] = {}  # the first of each call

    def visit(self, node: Node) -> None:
        """One node."""
        self._place[node] = len(self._place)
        if node.op == "placeholder":
            self.states[node] = self._input(node)
        elif node.op == "call_function" and node.target is operator.getitem:
            source, place = node.args[0], node.args[1]
            self.states[node] = self.states[source][place]  # type: ignore[index]
            if source in self._causes:
                self._causes[node] = self._causes[source]  # type: ignore[index]
            if source in self._fixed:
                self._fixed.add(node)
        elif node.op == "call_function":
            self.states[node] = self._operation(node)
        elif node.op == "output":
            given: Any = node.args[0]
            self._given = [self.states.get(source) for source in given]
        else:
            value = node.meta.get("val")
            self.states[node] = Tensor.of(value.shape) if isinstance(value, torch.Tensor) else None

    def _input(self, node: Node) -> Tensor | None:
        if node.name in self._slots or node.name in self._constants:
            self._fixed.add(node)
        if node.name in self._slots:
            return self._tensors[self._slots[node.name]]
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        own = node.name in self._constants
        reason = CONSTANT if own else "it meets an input of the model"
        self._causes[node] = Freeze(np.zeros(0, np.int64), reason, Operation(node.name), boundary=not own)
        return Tensor.of(value.shape)

    def _operation(self, node: Node) -> Any:
        facts = self._facts
        causes = [self._causes[source] for source in node.all_input_nodes if source in self._causes]
        causes.sort(key=lambda cause: cause.boundary)  # what the model does to itself is the better explanation
        here = Operation(name_of(node), _module(node), _source(node), node.name)
        causes = [cause if cause.operation.node else replace(cause, operation=here) for cause in causes]
        facts.begin(here, causes[0] if causes else None)
        frozen = len(facts.freezes)
        values = node.meta.get("val")
        shapes = self._sizes.get(node) or shapes_of(node)
        number = (node.meta.get("custom") or {}).get("kirsch_call", -1)
        call = self._calls.log[number] if 0 <= number < len(self._calls.log) else None
        if self._tracing.as_graph:
            call = call_of(node)
        args: Any = map_arg(node.args, self.states.get)
        options: Any = map_arg(node.kwargs, self.states.get)
        name = name_of(node).removeprefix("aten.")
        fixed = {id(self.states[source]) for source in node.all_input_nodes if source in self._fixed}
        if node.all_input_nodes and len(self._fixed.intersection(node.all_input_nodes)) == len(node.all_input_nodes):
            self._fixed.add(node)
        settled = self._settled.setdefault(number, set())
        step = Step(
            facts,
            name,
            args,
            options,
            shapes,
            call,
            self._labels_of,
            macs=lambda: macs_of(node),
            keeps_scale=lambda width: self._keeps_scale(node, width),
            is_weight=lambda tensor: id(tensor) in fixed,
            softmax=self._tracing.softmax,
            settled=settled,
            is_residual=lambda: self._residual(node),
            batch=self._batch,
        )
        results = operators.apply(step) if shapes else []
        facts.cost("activations", *_outputs(results), owner=facts.operation.module)
        ended = all(axis is None for result in results for axis in result.axes)  # whatever labels there were
        own = facts.freezes[frozen:][-1:]
        made = [] if node.all_input_nodes else [Freeze(np.zeros(0, np.int64), CONSTANT, Operation(node.name))]
        found = [*(cause for cause in causes if not cause.boundary), *own, *causes, *made]
        if ended and found:
            self._causes[node] = found[0]
        state = _arranged(iter(results), values)
        if call is not None:
            self._by_call.setdefault(number, []).append(state)
            self._origin.setdefault(number, facts.operation)
        return state

    def put_out(self, places: Iterable[int], counted: Collection[int]) -> None:
        """The shapes of the outputs that count stay what they are, as do axes on which any output holds positions."""
        self._facts.begin(Operation("output"))
        for place in places:
            state = self._given[place]
            if isinstance(state, Tensor):
                self._facts.freeze(state.points, "positions on it are an output of the model")
                for axis in state.axes if place in counted else ():
                    self._facts.freeze(axis, "it is an output of the model", boundary=True)

    def _keeps_scale(self, node: Node, width: Axis) -> bool:
        found = None if width is None else fold(node, width, self._slots)
        if found is not None:
            self.folds.append(found)
        return width is None or found is not None

    def _residual(self, node: Node) -> bool:
        """Whether an addition is residual; marks what the layers read that end its branch."""
        ends = ends_of_branch(node, self._place)
        for end in ends or []:
            for source, axis in zip(end.all_input_nodes[1:], (1, 0), strict=False):
                weight = self.states[source]
                if isinstance(weight, Tensor) and source in self._fixed and len(weight.axes) > 1:
                    name = name_of(end).rpartition(".")[2]
                    into = axis if name == "linear" else len(weight.axes) - 2
                    self._facts.mark(weight.axes[into], "into sum")
        return ends is not None

    def pin_numbers(self) -> None:
        """What the code does with its integers apart from sizes (scales, paddings) it does after a cut as well."""
        step = Step(self._facts, "", (), {}, [], None, self._labels_of)
        for number, operation in self._origin.items():
            for integer in self._calls.log[number].integers():
                if isinstance(integer, TracedInt) and id(integer) not in self._settled[number]:
                    self._facts.begin(operation)
                    step.pin(integer)
        for lost in self._calls.lost:
            if isinstance(lost, Compared):
                self._facts.begin(Operation(COMPARISON, source=lost.source))
                step.compared(lost)
            else:
                self._facts.begin(Operation("arithmetic", source=lost.source))
                step.pin(lost.number)

    def _labels_of(self, size: SizeOf) -> Axis:
        """The labels of a size that the code read; KeyError if the tensor is not known."""
        if size.name:
            return self._tensors[size.name].axes[size.axis]
        state = self._by_call[size.call][-1]
        if isinstance(state, list):
            tensor = state[size.place or 0] if (size.place or 0) < len(state) else None
        else:
            tensor = state if size.place is None else None
        if tensor is None or size.axis >= len(tensor.axes):
            raise KeyError(size)
        axis: Axis = tensor.axes[size.axis]
        return axis


def _arranged(results: Iterator[Tensor], values: Any) -> Any:
    """The results in the places of the tensors that an operation puts out; None in the place of anything else."""
    if isinstance(values, (list, tuple)):
        return [_arranged(results, value) for value in values]
    return next(results) if isinstance(values, torch.Tensor) else None


def _outputs(results: list[Tensor]) -> tuple[float, list[Axis]]:
    """Coefficient and factors of the numbers that an operation puts out; only its first result counts."""
    if not results:
        return 0.0, []
    constant = 1
    for size, axis in zip(results[0].shape, results[0].axes, strict=True):
        constant *= size if axis is None else 1
    return float(constant), list(results[0].axes)


def _module(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _source(node: Node) -> str:
    """The last line of the stack that lies outside PyTorch: "file.py:12"."""
    found = ""
    for line in (node.meta.get("stack_trace") or "").splitlines():
        text = line.strip()
        if text.startswith('File "') and not text[6:].startswith(PACKAGES):
            path, _, rest = text[6:].partition('", line ')
            found = f"{Path(path).name}:{rest.partition(',')[0]}"
    return found
