"""Analysis of a model of any framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from kirsch.arguments import checked
from kirsch.data.annotations import Inputs, Model
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of
from kirsch.graph.graph import Graph, Tracing


@checked
def trace(
    model: Model,
    example_inputs: Inputs,
    *,
    outputs: str | Sequence[str] = (),
    decisions: Literal["refuse", "example"] = "refuse",
    module: str = "",
    softmax: Literal["freeze", "kept"] = "freeze",
    as_graph: bool = False,
) -> Graph:
    """Return the groups of units of a model that must be removed together, and the frozen units with the reasons.

    Args:
        model: model of a supported framework; it may be on the meta device. It is not changed.
        example_inputs: one array, a tuple of positional arguments, or a dict of keyword arguments. MACs are counted for
            one forward pass on these inputs, with all samples of the batch.
        outputs: names of the outputs whose shapes must not change: a key ("logits"), an index ("0") or a path
            ("aux.0"). By default all outputs. Hidden states, attention weights and caches are excluded if the model
            also returns logits or predictions.
        decisions: treatment of code that branches on values of its input, such as `if x.sum() > 0` or the selection of
            boxes in a detector. "refuse": raise an error that names the line. "example": follow the branch of the
            example inputs; other branches are not analyzed.
        module: path of a part, such as "backbone", that is analyzed alone. The inputs of the part are recorded in a run
            of the whole model; shapes of its inputs and outputs do not change. Goals of plans are fractions of the cost
            of the part, and `kirsch.prune` returns the whole model with the pruned part.
        softmax: treatment of an axis over which a softmax or a selection of the k largest values is computed. If
            units of such an axis are removed, the other probabilities change, or other units are selected. "freeze":
            all units of the axis are kept. "kept": units may be removed, and the softmax or selection is computed over
            the kept units. The pruned model then computes another function than the original with the units set to
            zero; the verification reports the number of such operations. "kept" is needed to remove experts of a
            mixture of experts.
        as_graph: whether the pruned model is the traced program, a `torch.fx.GraphModule`, in place of the module's own
            code. Integers in the code that would freeze units are then rewritten. The program is valid for the shapes
            of the example inputs (the batch size may differ unless the code contains it) and stays in inference mode:
            no dropout, and batch normalization with running statistics.

    Returns:
        The `Graph` with `.groups`, `.blockers` and `.cost`.

    Raises:
        ModelError: the model cannot be copied or traced with these inputs; the message names the line of code.
        UnknownNameError: the model has no such output or part.
        UsageError: an argument has the wrong type, or `as_graph` is combined with `module`.
    """
    if as_graph and module:
        raise UsageError(
            "`as_graph` of kirsch.trace cannot be combined with `module`.",
            "A part must fit into the code of the rest of the model.",
            "Trace the part by itself: kirsch.trace(model.part, inputs_of_part, as_graph=True).",
        )
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    tracing = Tracing(names, decisions, module, softmax, as_graph)
    return framework_of(model).analysis.trace(model, example_inputs, tracing)
