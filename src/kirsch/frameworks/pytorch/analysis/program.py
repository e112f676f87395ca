"""Export a model as a program: the operations of one forward pass, without in-place operations and not decomposed."""

from __future__ import annotations

import contextlib
import io
import logging
import sysconfig
import traceback as python_traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.fx import Interpreter, traceback
from torch.utils._pytree import tree_leaves

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.analysis.integers import PACKAGES
from kirsch.frameworks.pytorch.analysis.provenance import RecordedCalls, record_calls, traceable_copy
from kirsch.frameworks.pytorch.inference.calling import embedding_fix, fix_of_inputs, is_embedding_error, without_values
from kirsch.frameworks.pytorch.modules.copying import restoring_attributes
from kirsch.frameworks.pytorch.modules.interpreted import assign_modules
from kirsch.frameworks.pytorch.modules.unsupported import reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.export import ExportedProgram
    from torch.fx import Node


WITH_VALUES = ("fake_tensor_propagate_real_tensors", "generate_fake_kernels_from_real_mismatches")
"""Options that make the exporter compute with values, not only with shapes."""

ASSERTIONS = frozenset(["_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"])
"""Checks of types and sizes that the exporter adds; they would fail for inputs of another type or size."""


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    options: dict[str, Any],
    recorded: RecordedCalls,
    decisions: str,
    *,
    training: bool,
) -> ExportedProgram:
    """Return the operations of a model, functional and not decomposed.

    Args:
        model: the model to export.
        args, options: the example inputs.
        recorded: object to which the calls of the user's code are added.
        decisions: "refuse" to raise an error for branches that depend on values, or "example" to take the branches
            that the example inputs take.
        training: whether the model runs in training mode.

    Raises:
        ModelError: the model cannot be exported.
    """
    # With "example", the exporter computes with values, and `forward` may change the buffers.
    copied = traceable_copy(model, share_buffers=decisions == "refuse", training=training)
    if decisions == "example":
        _parameters_to_buffers(copied)
    with_values = dict.fromkeys(WITH_VALUES, decisions == "example")
    with (
        restoring_attributes(model),
        _quiet(),
        torch.no_grad(),
        traceback.preserve_node_meta(),
        functorch_config.patch(with_values),
    ):
        try:
            record_calls(copied, recorded)
            program = torch.export.export(copied, args, options, strict=False)
            functional: ExportedProgram = program.run_decompositions({})
        except Exception as error:
            raise ModelError(*_reason(model, args, options, recorded, error)) from error
    signature = functional.graph_signature
    assign_modules(functional, {**signature.inputs_to_parameters, **signature.inputs_to_buffers})
    return functional


def _parameters_to_buffers(model: nn.Module) -> None:
    """Replace all parameters by buffers, since the exporter copies values of plain tensors only."""
    plain: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            delattr(module, name)
            module.register_buffer(name, plain.setdefault(id(value), value.detach()))
            setattr(module, name, plain[id(value)])  # on assignment, a recurrent layer updates its list of weights


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence PyTorch's warnings about its internals, and restore the random state.

    Before the exporter raises an error, it prints the operations that it has traced to stderr.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    # These loggers report each followed decision, and the traceback of an error that is also raised.
    quiet = {"torch.fx.experimental.symbolic_shapes": logging.ERROR, "torch._subclasses.fake_tensor": logging.CRITICAL}
    levels = {name: logging.getLogger(name).level for name in quiet}
    for name, level in quiet.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.random.fork_rng(devices):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _reason(
    model: nn.Module, args: tuple[Any, ...], options: dict[str, Any], recorded: RecordedCalls, error: Exception
) -> tuple[str, str, str]:
    """Return the problem, the reason and the fix for a model that cannot be exported."""
    shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves((args, options)) if isinstance(t, torch.Tensor))
    line = f" ({found})" if (found := user_line(error)) else ""
    place = f" in `{recorded.failed_in}`{line}" if recorded.failed_in else line
    first = next((text for text in str(error).splitlines() if text.strip()), "").strip()
    what = f"The model {type(model).__name__} cannot be traced with inputs of shape {shapes or 'none'}."
    empty = without_values(model, args, options)
    if empty is not None:
        return what, *empty
    known = reason_of({call.name for call in recorded.log}, error)
    if known is not None:
        return what, f"{known[0]} ({type(error).__name__}{place})", known[1]
    why = f"{type(error).__name__}{place}: {first}"
    why = why if why.endswith((".", "!", "?")) else f"{why}."
    if is_embedding_error(error):
        return what, why, embedding_fix(args, options)
    dynamic = any(word in type(error).__name__ for word in ("DataDependent", "GuardOn")) or "data-dependent" in str(
        error
    )
    if dynamic:
        return what, why, _fix_of_decisions(model)
    inputs = "Check that model(*example_inputs) runs, and that the model expects inputs of these shapes."
    return what, why, fix_of_inputs(model, args, options, error) or inputs


def _fix_of_decisions(model: nn.Module) -> str:
    """Return the fix for a model whose operations depend on the values of the inputs."""
    depend = "The operations that `forward` runs depend on the values of the inputs."
    if getattr(getattr(model, "config", None), "_experts_implementation", None) == "eager":
        return f'{depend} Call model.set_experts_implementation("grouped_mm") before kirsch.trace.'
    return (
        f'{depend} Trace a part without such decisions (module="backbone"), '
        'or follow the decisions for these inputs (kirsch.trace(..., decisions="example"), in Python only).'
    )


def user_line(error: BaseException) -> str:
    """Return the last line of the user's code in the traceback of an error: "file.py:12"; "" if there is none."""
    frames = [f for f in python_traceback.extract_tb(error.__traceback__) if is_user_code(f.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def is_user_code(path: str) -> bool:
    """Return whether a file belongs to neither PyTorch, Kirsch nor the standard library."""
    standard = path.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in path
    return not standard and not path.startswith((*PACKAGES, "<"))


class SizeInterpreter(Interpreter):
    """Runs a program on the example inputs to find sizes that depend on values, as after `x[mask]`."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.shapes: dict[Node, list[tuple[int, ...]]] = {}

    @classmethod
    def find_shapes(cls, program: ExportedProgram, args: Any, options: Any) -> dict[Node, list[tuple[int, ...]]]:
        """Return the shapes of the results of each node; empty if no size depends on values."""
        if not any(isinstance(n, torch.SymInt) for node in program.graph.nodes for s in shapes_of(node) for n in s):
            return {}
        interpreter = cls(program)
        signature, inputs = program.graph_signature, iter(tree_leaves((args, options)))
        known = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = {**program.state_dict, **program.constants}
        known |= signature.inputs_to_lifted_tensor_constants
        nodes = [node.name for node in program.graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            interpreter.run(*(constants[known[name]] if name in known else next(inputs) for name in nodes))
        return interpreter.shapes

    def run_node(self, n: Node) -> Any:
        """Run one operation, unless it is a check of the exporter."""
        if n.op == "call_function" and name_of(n).removeprefix("aten.") in ASSERTIONS:
            return None
        out = super().run_node(n)
        self.shapes[n] = [tuple(v.shape) for v in tree_leaves(out) if isinstance(v, torch.Tensor)]
        return out


def shapes_of(node: Node) -> list[Any]:
    """Return the shapes of the tensors that an operation returns; sizes that depend on values are symbols."""
    return [tuple(v.shape) for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]


def name_of(node: Node) -> str:
    """Return the operator of a node, such as "aten.conv2d"."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    return str(schema.name).replace("::", ".")
