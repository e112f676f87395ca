"""Prepare an exported ONNX file for distribution: readable names, and no traces of the user's source code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.analysis.randomness import line_in
from kirsch.frameworks.pytorch.io.flat import unique

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

TRACE = "pkg.torch.onnx.stack_trace"
"""Key under which the exporter stores the source lines of a node."""

NOTES = ("doc_string", "metadata_props")
"""Fields that no runtime reads, into which the exporter writes source lines, file paths and class names."""


def finish(path: Path, *, inputs: Sequence[str], outputs: Sequence[str], prefix: str, model: str) -> None:
    """Rewrite an ONNX file with new names of inputs and outputs, and without notes about the source code.

    The file keeps what a runtime or a debugger reads: operations, weights under their names in the model, shapes and
    types of intermediate values, names of nodes, opset, and the producer with its version.

    Args:
        path: path of the file; an external weights file beside it is not changed.
        inputs, outputs: new names in the order of the graph, C identifiers, all different.
        prefix: prefix to remove from the names of weights.
        model: name of the model's class, for errors.

    Raises:
        ModelError: an intermediate value is bfloat16, for which ONNX Runtime lacks most operators.
    """
    written = onnx.load(str(path), load_external_data=False)
    _check_bfloat16(written.graph, model)
    _clear_notes(written)
    _rename(written.graph, inputs, outputs, prefix)
    weights = {tensor.name for tensor in written.graph.initializer}
    values = [
        value for value in written.graph.value_info if value.name not in weights
    ]  # initializers state their shapes
    del written.graph.value_info[:]
    written.graph.value_info.extend(values)
    used = {node.domain for node in _nodes(written.graph)} | {f.domain for f in written.functions} | {""}
    used |= {node.domain for function in written.functions for node in function.node}
    imports = [entry for entry in written.opset_import if entry.domain in used]
    del written.opset_import[:]
    written.opset_import.extend(imports)
    path.write_bytes(written.SerializeToString(deterministic=True))


def details(path: Path) -> dict[str, Any]:
    """Return opset, IR version, and name, shape and type of each input and output of an ONNX file."""
    written = onnx.load(str(path), load_external_data=False)
    return {
        "opset": max(entry.version for entry in written.opset_import if entry.domain in ("", "ai.onnx")),
        "ir_version": written.ir_version,
        "inputs": [_value(value) for value in written.graph.input],
        "outputs": [_value(value) for value in written.graph.output],
    }


def _value(value: Any) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "shape": shape, "type": onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}


def _clear_notes(message: Any) -> None:
    """Delete the notes of a protobuf message and of its nested messages."""
    for name in NOTES:
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    if isinstance(message, onnx.TensorProto):  # listing its fields would copy the data
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                _clear_notes(part)


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and its subgraphs: branches and bodies of loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _nodes(graph: Any) -> Iterator[Any]:
    return (node for part in _graphs(graph) for node in part.node)


def _rename(graph: Any, inputs: Sequence[str], outputs: Sequence[str], prefix: str) -> None:
    """Rename inputs, outputs and weights; other values keep their names, with a number appended if taken."""
    _separate_outputs(graph)
    names = dict(zip((value.name for value in graph.input), inputs, strict=True))
    names |= dict(zip((value.name for value in graph.output), outputs, strict=True))
    taken = set(names.values())
    weights = {tensor.name: tensor.name.removeprefix(prefix) for part in _graphs(graph) for tensor in part.initializer}
    others = {name: name for node in _nodes(graph) for name in node.output if name}
    others |= {value.name: value.name for part in _graphs(graph) for value in part.input}
    for old, preferred in (weights | {old: name for old, name in others.items() if old not in weights}).items():
        if old not in names:
            names[old] = unique(preferred, taken)
            taken.add(names[old])
    for part in _graphs(graph):
        for value in (*part.input, *part.output, *part.initializer, *part.value_info):
            value.name = names.get(value.name, value.name)
        for node in part.node:
            for field in (node.input, node.output):
                field[:] = [names.get(name, name) for name in field]


def _separate_outputs(graph: Any) -> None:
    """Insert an Identity node for each output that is also an input or another output."""
    seen = {value.name for value in graph.input}
    names = seen | {name for node in _nodes(graph) for name in node.output}
    for value in graph.output:
        if value.name in seen:
            name = unique(value.name, names)
            graph.node.append(onnx.helper.make_node("Identity", [value.name], [name]))
            value.name = name
            names.add(name)
        seen.add(value.name)


def _check_bfloat16(graph: Any, model: str) -> None:
    """Raise an error with the line of code if an intermediate value is bfloat16."""
    bfloat16 = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16}
    nodes = [node for node in _nodes(graph) if bfloat16.intersection(node.output)]
    if nodes:
        line = next(filter(None, map(_line, nodes)), "")
        raise computing_in_bfloat16(model, f": {line}" if line else "", "")


def computing_in_bfloat16(model: str, line: str, output: str) -> ModelError:
    """Return the error for a model that computes in bfloat16, although its weights have another dtype."""
    return ModelError(
        f"A {model} that computes in bfloat16 cannot be exported{line}.",
        f"{output}ONNX Runtime lacks most operators in this type.",
        "Remove conversions to bfloat16 from the code that runs in inference mode, and call torch.autocast with "
        "enabled=self.training.",
    )


def _line(node: Any) -> str:
    """Return the line of code that a node comes from; "" if it is not known."""
    return line_in(next((entry.value for entry in node.metadata_props if entry.key == TRACE), ""))
