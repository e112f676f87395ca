"""Analyze a PyTorch model: export it, then apply the rule of each operation."""

from __future__ import annotations

import contextlib
import functools
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
from kirsch.frameworks.pytorch.analysis.attention import QueryScaling, query_scaling
from kirsch.frameworks.pytorch.analysis.attention_scale import attribute_scalings
from kirsch.frameworks.pytorch.analysis.blocks import find as find_blocks
from kirsch.frameworks.pytorch.analysis.count import macs_of
from kirsch.frameworks.pytorch.analysis.input_specifications import specification
from kirsch.frameworks.pytorch.analysis.integers import PACKAGES, Comparison, TracedInt
from kirsch.frameworks.pytorch.analysis.memory import add_memory, is_view
from kirsch.frameworks.pytorch.analysis.node_call import call_of
from kirsch.frameworks.pytorch.analysis.operation import OperationContext
from kirsch.frameworks.pytorch.analysis.parameters import add_costs, freeze_shared, freeze_unused, identities, values_of
from kirsch.frameworks.pytorch.analysis.program import SizeInterpreter, export, name_of, shapes_of
from kirsch.frameworks.pytorch.analysis.provenance import RecordedCalls, SizeOf
from kirsch.frameworks.pytorch.analysis.regions import module_outputs
from kirsch.frameworks.pytorch.analysis.residual import last_layers_of_branch
from kirsch.frameworks.pytorch.analysis.traced import Traced
from kirsch.frameworks.pytorch.inference.calling import without_values
from kirsch.frameworks.pytorch.inference.outputs import selected_outputs
from kirsch.frameworks.pytorch.inference.predict import arguments_of
from kirsch.frameworks.pytorch.modules.submodule import inputs_of, part_of, shared_with_rest
from kirsch.frameworks.pytorch.modules.tuners import adapter_tensors
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
CONSTANT = "the axis is combined with a constant tensor"
RANDOM = "the axis is combined with a tensor of random numbers"


def trace(whole: nn.Module, example_inputs: Any, tracing: Tracing = DEFAULT, *, of_part: bool = False) -> Graph:
    """Return the coupling analysis of a model; see `kirsch.trace`.

    Args:
        whole: the model.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        tracing: the options, such as the part to analyze.
        of_part: whether the example inputs are inputs of the part, not of the whole model.

    Raises:
        ModelError: the model cannot be traced, or returns no tensors.
    """
    model = part_of(whole, tracing.module)
    if tracing.module and not of_part:
        example_inputs = inputs_of(whole, tracing.module, example_inputs)
    args, options = arguments_of(model, example_inputs)
    check(model)
    _check_samples(model, args, options)
    facts = Facts()
    tensors = _labeled_tensors(model, facts)
    traced = _walk(model, args, options, facts, tensors, tracing)
    if not traced.outputs:
        raise ModelError(
            f"The model {type(model).__name__} returns no tensors.",
            "Without outputs, a cut could not be verified.",
            "Let the `forward` method return the output tensors.",
        )
    add_costs(model, facts, tensors)
    unused = _unused(tensors, traced)
    if unused:
        training = _training_walk(model, args, options, facts, tensors, tracing)
        still_unused = unused if training is None else unused & _unused(tensors, training)
        if still_unused != unused:  # a buffer that no mode reads, for example, needs no comparison in training mode
            traced.training, unused = training, still_unused
    if traced.training is not None:
        scaled = {name for scaling in traced.query_scalings for name in scaling.rows}
        further = traced.training.query_scalings
        traced.query_scalings += [scaling for scaling in further if scaled.isdisjoint(scaling.rows)]
    if not tracing.as_graph:  # the traced program has the scale as a constant
        traced.query_scalings += attribute_scalings(model, traced)
    freeze_unused(unused, model, facts, tensors)
    if tracing.module:
        freeze_shared(shared_with_rest(whole, tracing.module), model, facts, tensors)
    parameters = dict(model.named_parameters())
    return Graph(
        model_name=type(model).__name__,
        facts=facts,
        tensors=tensors,
        parameters=tuple(parameters),
        inputs=specification(args, options),
        values=lambda name: values_of(parameters, name, type(model).__name__),
        fits=lambda other: other is whole and {n: id(p) for n, p in parameters.items()} == identities(model),
        blocks=tuple(block.path for block in traced.blocks),
        adapters=adapter_tensors(model),
        module_outputs=functools.cache(lambda: module_outputs(traced.states)),
        model=whole,
        tracing=tracing,
        traced=traced,
    )


def _check_samples(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raise an error if the example inputs have no samples, or no values although the model has values.

    The verification would accept any cut on such inputs.
    """
    given = [value for value in tree_leaves((args, options)) if isinstance(value, torch.Tensor)]
    empty = without_values(model, args, options) if any(value.is_meta for value in given) else None
    if empty is not None:
        raise ModelError(f"The model {type(model).__name__} cannot be traced.", *empty)
    axes = [value.shape for value in given if value.dim()]
    if axes and not any(shape[0] for shape in axes):
        raise ModelError(
            f"The example inputs have no samples: their shapes are {', '.join(str(tuple(shape)) for shape in axes)}.",
            "Without samples, the verification would compare nothing.",
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
    """Export the model and collect the facts of each operation."""
    recorded = RecordedCalls()
    program = export(model, args, options, recorded, tracing.decisions, training=training)
    signature = program.graph_signature
    slots = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    user = [index for index, spec in enumerate(signature.output_specs) if spec.kind is OutputKind.USER_OUTPUT]
    outputs = dict(zip(user, recorded.outputs, strict=False))  # the remaining ones are computed and never read
    selected_names = selected_outputs(recorded.outputs, () if training else tracing.outputs)
    constants = frozenset(signature.inputs_to_lifted_tensor_constants)
    shaped = [value for value in tree_leaves((args, options)) if isinstance(value, torch.Tensor) and value.dim()]
    batch = shaped[0].shape[0] if shaped else 1
    sizes = SizeInterpreter.find_shapes(program, args, options)
    walk = _Walk(facts, tensors, slots, constants, recorded, sizes, tracing, batch)
    for node in program.graph.nodes:
        walk.visit(node)
    selected = frozenset(index for index, name in outputs.items() if name in selected_names)
    walk.freeze_outputs(outputs, selected)
    if not training:
        add_memory(program, walk.states, walk.weights, {node: _module(node) for node in walk.states}, facts)
    if not tracing.as_graph:
        walk.pin_numbers()
    modules = not training and not tracing.as_graph
    blocks = find_blocks(model, walk.states, {*slots, *constants}, recorded) if modules else ()
    statistics = frozenset(facts.statistics)
    return Traced(
        program, slots, walk.states, args, options, outputs, selected, walk.query_scalings, blocks, statistics
    )


def _training_walk(
    model: nn.Module,
    args: tuple[Any, ...],
    options: dict[str, Any],
    facts: Facts,
    tensors: dict[str, Tensor],
    tracing: Tracing,
) -> Traced | None:
    """Add the facts of a forward pass in training mode; None if the model cannot be traced in training mode.

    Such a pass also runs auxiliary heads. Costs and statistics remain those of inference.
    """
    terms, uncounted = list(facts.terms), list(facts.uncounted)
    statistics, facts.statistics = facts.statistics, set()
    # To follow branches that depend on random values, the exporter copies all weights, so this is tried last.
    try:
        for trial in dict.fromkeys([tracing, replace(tracing, decisions="example")]):
            with contextlib.suppress(ModelError):
                return _walk(model, args, options, facts, tensors, trial, training=True)
        return None
    finally:
        facts.terms[:], facts.uncounted[:], facts.statistics = terms, uncounted, statistics


def _labeled_tensors(model: nn.Module, facts: Facts) -> dict[str, Tensor]:
    """Return each parameter and buffer with new labels on each axis; tied tensors share their labels."""
    by_identity: dict[int, Tensor] = {}
    labeled = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in named:
        if id(value) not in by_identity:
            axes = [facts.fresh(size) if size > 1 else None for size in value.shape]
            by_identity[id(value)] = Tensor.of(value.shape, axes)
        labeled[name] = by_identity[id(value)]
    return labeled


def _unused(tensors: dict[str, Tensor], traced: Traced) -> set[int]:
    """Return the `id` of each labeled tensor that no operation of a trace uses."""
    nodes = traced.program.graph.nodes
    names = [traced.slots[n.name] for n in nodes if n.op == "placeholder" and n.name in traced.slots and n.users]
    used = {id(tensors[name]) for name in names}
    return {id(tensor) for tensor in tensors.values() if any(a is not None for a in tensor.axes)} - used


class _Walk:
    """Visits the nodes in order; `states` maps each node to the labels of its result.

    `weights` are the nodes that are computed from parameters and constants only.
    """

    def __init__(
        self,
        facts: Facts,
        tensors: dict[str, Tensor],
        slots: dict[str, str],
        constants: frozenset[str],
        recorded: RecordedCalls,
        sizes: dict[Node, list[tuple[int, ...]]],
        tracing: Tracing,
        batch: int,
    ) -> None:
        self.states: dict[Node, Any] = {}
        self.query_scalings: list[QueryScaling] = []
        self._causes: dict[Node, Freeze] = {}  # why a result has no labels
        self._facts = facts
        self._tensors = tensors
        self._slots = slots
        self._constants = constants
        self._recorded = recorded
        self._sizes = sizes
        self._tracing = tracing
        self._outputs: list[Any] = []
        self._index: dict[Node, int] = {}
        self._batch = batch
        self.weights: set[Node] = set()
        self._selections: set[Node] = set()  # matrices that indices select from a weight, and views of them
        self._by_call: dict[int, list[Any]] = {}
        self._tied: dict[int, set[int]] = {}  # number of a call → its integers that a rule has tied to an axis
        self._origin: dict[int, Operation] = {}  # the first operation of each call

    def visit(self, node: Node) -> None:
        """Process one node."""
        self._index[node] = len(self._index)
        if node.op == "placeholder":
            self.states[node] = self._input(node)
        elif node.op == "call_function" and node.target is operator.getitem:
            source, item = node.args[0], node.args[1]
            self.states[node] = self.states[source][item]  # type: ignore[index]
            if source in self._causes:
                self._causes[node] = self._causes[source]  # type: ignore[index]
            if source in self.weights:
                self.weights.add(node)
        elif node.op == "call_function":
            self.states[node] = self._operation(node)
        elif node.op == "output":
            sources: Any = node.args[0]
            self._outputs = [self.states.get(source) for source in sources]
        else:
            value = node.meta.get("val")
            self.states[node] = Tensor.of(value.shape) if isinstance(value, torch.Tensor) else None

    def _input(self, node: Node) -> Tensor | None:
        if node.name in self._slots or node.name in self._constants:
            self.weights.add(node)
        if node.name in self._slots:
            return self._tensors[self._slots[node.name]]
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        constant = node.name in self._constants
        reason = CONSTANT if constant else "the axis is combined with an input of the model"
        self._causes[node] = Freeze(np.zeros(0, np.int64), reason, Operation(node.name), boundary=not constant)
        return Tensor.of(value.shape)

    def _operation(self, node: Node) -> Any:
        facts = self._facts
        inputs = node.all_input_nodes
        causes = [self._causes[source] for source in inputs if source in self._causes]
        causes.sort(key=lambda cause: cause.boundary)  # an operation of the model explains more than an input
        operation = Operation(name_of(node), _module(node), _source(node), node.name)
        causes = [cause if cause.operation.node else replace(cause, operation=operation) for cause in causes]
        facts.begin(operation, causes[0] if causes else None)
        frozen = len(facts.freezes)
        shapes = self._sizes.get(node) or shapes_of(node)
        number = (node.meta.get("custom") or {}).get("kirsch_call", -1)
        call = self._recorded.log[number] if 0 <= number < len(self._recorded.log) else None
        if self._tracing.as_graph:
            call = call_of(node)
        args: Any = map_arg(node.args, self.states.get)
        options: Any = map_arg(node.kwargs, self.states.get)
        weights = {id(self.states[source]) for source in inputs if source in self.weights}
        selections = {id(self.states[source]) for source in inputs if source in self._selections}
        if inputs and self.weights.issuperset(inputs):
            self.weights.add(node)
        elif inputs and self._is_selection(node, inputs[0]):
            self._selections.add(node)
        op = OperationContext(
            facts,
            name_of(node).removeprefix("aten."),
            args,
            options,
            shapes,
            call,
            self._labels_of,
            macs=lambda: self._macs(node),
            keeps_scale=lambda width: self._keeps_scale(node, width),
            is_weight=lambda tensor: id(tensor) in weights,
            is_selection=lambda tensor: id(tensor) in selections,
            softmax=self._tracing.softmax,
            tied=self._tied.setdefault(number, set()),
            is_residual=lambda: self._is_residual(node),
            batch=self._batch,
        )
        results = operators.apply(op) if shapes else []
        facts.cost("activations", *_activations(results), owner=facts.operation.module)
        if all(axis is None for result in results for axis in result.axes):
            last = facts.freezes[frozen:][-1:]
            reason = RANDOM if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) else CONSTANT
            created = [] if inputs else [Freeze(np.zeros(0, np.int64), reason, Operation(node.name))]
            reasons = [*(cause for cause in causes if not cause.boundary), *last, *causes, *created]
            if reasons:
                self._causes[node] = reasons[0]
        state = _structured(iter(results), node.meta.get("val"))
        if call is not None:
            self._by_call.setdefault(number, []).append(state)
            self._origin.setdefault(number, facts.operation)
        return state

    def _macs(self, node: Node) -> int:
        """Return the multiply-accumulates of the current operation; 0 if they cannot be counted."""
        macs = macs_of(node)
        if macs is None:
            self._facts.uncounted.append(self._facts.operation)
        return macs or 0

    def _is_selection(self, node: Node, source: Node) -> bool:
        if source in self._selections:
            return is_view(node)
        shape = getattr(self.states[source], "shape", ())
        return name_of(node) == "aten.index" and source in self.weights and len(shape) == len("GIO")

    def freeze_outputs(self, indices: Iterable[int], selected: Collection[int]) -> None:
        """Freeze the axes of the selected outputs, and the axes into which any output holds indices."""
        self._facts.begin(Operation("output"))
        for index in indices:
            state = self._outputs[index]
            if isinstance(state, Tensor):
                self._facts.freeze(state.points, "indices into the axis are an output of the model")
                for axis in state.axes if index in selected else ():
                    self._facts.freeze(axis, "the axis is part of an output of the model", boundary=True)

    def _keeps_scale(self, node: Node, width: Axis) -> bool:
        found = None if width is None else query_scaling(node, width, self._slots)
        self.query_scalings += [] if found is None else [found]
        return width is None or found is not None

    def _is_residual(self, node: Node) -> bool:
        """Return whether an addition is residual; mark the inputs of the last layers of its branch."""
        layers = last_layers_of_branch(node, self._index)
        for layer in layers or []:
            for source, axis in zip(layer.all_input_nodes[1:], (1, 0), strict=False):
                weight = self.states[source]
                if isinstance(weight, Tensor) and source in self.weights and len(weight.axes) > 1:
                    name = name_of(layer).rpartition(".")[2]
                    into = axis if name == "linear" else len(weight.axes) - 2
                    self._facts.mark(weight.axes[into], "into sum")
        return layers is not None

    def pin_numbers(self) -> None:
        """Require that integers of the code that are not sizes, such as scales and paddings, keep their values.

        Add the comparisons with traced integers, too; see `OperationContext.add_comparison`.
        """
        op = OperationContext(self._facts, "", (), {}, [], None, self._labels_of)
        for number, operation in self._origin.items():
            for integer in self._recorded.log[number].integers():
                if isinstance(integer, TracedInt) and id(integer) not in self._tied[number]:
                    self._facts.begin(operation)
                    op.pin(integer)
        for event in self._recorded.events:
            if isinstance(event, Comparison):
                self._facts.begin(Operation(COMPARISON, source=event.source))
                op.add_comparison(event)
            else:
                self._facts.begin(Operation("arithmetic", source=event.source))
                op.pin(event.number)

    def _labels_of(self, size: SizeOf) -> Axis:
        """Return the labels of an axis whose size the code read; raises KeyError if the tensor is unknown."""
        if size.name:
            return self._tensors[size.name].axes[size.axis]
        state = self._by_call[size.call][-1]
        if isinstance(state, list):
            tensor = state[size.output or 0] if (size.output or 0) < len(state) else None
        else:
            tensor = state if size.output is None else None
        if tensor is None or size.axis >= len(tensor.axes):
            raise KeyError(size)
        axis: Axis = tensor.axes[size.axis]
        return axis


def _structured(results: Iterator[Tensor], values: Any) -> Any:
    """Return the results in the structure of the values of an operation, with None for values that are not tensors."""
    if isinstance(values, (list, tuple)):
        return [_structured(results, value) for value in values]
    return next(results) if isinstance(values, torch.Tensor) else None


def _activations(results: list[Tensor]) -> tuple[float, list[Axis]]:
    """Return the size of the first result of an operation, as `coefficient` and `factors` of `Facts.cost`."""
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
    """Return the innermost line of the stack that is outside of PyTorch and Kirsch: "file.py:12"; "" if unknown."""
    source = ""
    for line in (node.meta.get("stack_trace") or "").splitlines():
        text = line.strip()
        if text.startswith('File "') and not text[6:].startswith(PACKAGES):
            path, _, rest = text[6:].partition('", line ')
            source = f"{Path(path).name}:{rest.partition(',')[0]}"
    return source
