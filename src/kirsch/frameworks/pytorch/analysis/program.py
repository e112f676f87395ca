"""A model as a program: the operations that one forward runs, functional and not decomposed."""

from __future__ import annotations

import contextlib
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
from kirsch.frameworks.pytorch.analysis.provenance import Calls, twin_of, watched
from kirsch.frameworks.pytorch.inference.calling import embedding_fix, is_embedding_error
from kirsch.frameworks.pytorch.modules.copying import restoring_attributes
from kirsch.frameworks.pytorch.modules.interpreted import assign_modules
from kirsch.frameworks.pytorch.modules.unsupported import reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.export import ExportedProgram
    from torch.fx import Node


WITH_VALUES = ("fake_tensor_propagate_real_tensors", "generate_fake_kernels_from_real_mismatches")
"""What the exporter needs to compute with values beside shapes."""

ASSERTIONS = frozenset(["_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"])
"""What the exporter adds to hold a run to the types and sizes of the trace; ours has other values, of another type."""


def export(
    model: nn.Module, args: tuple[Any, ...], options: dict[str, Any], calls: Calls, decisions: str, *, training: bool
) -> ExportedProgram:
    """The operations of the model, functional and not decomposed."""
    name = type(model).__name__
    twin = twin_of(model, shared=decisions == "refuse", training=training)  # with values, it may write into its buffers
    if decisions == "example":
        _plain_tensors(twin)
    with_values = dict.fromkeys(WITH_VALUES, decisions == "example")
    with (
        restoring_attributes(model),
        _quiet(),
        torch.no_grad(),
        traceback.preserve_node_meta(),
        functorch_config.patch(with_values),
    ):
        try:
            watched(twin, calls)
            program = torch.export.export(twin, args, options, strict=False)
            functional: ExportedProgram = program.run_decompositions({})
        except Exception as error:
            raise ModelError(*_reason(name, args, options, calls, error)) from error
    signature = functional.graph_signature
    assign_modules(functional, {**signature.inputs_to_parameters, **signature.inputs_to_buffers})
    return functional


def _plain_tensors(twin: nn.Module) -> None:
    """Buffers in the place of all parameters: the exporter copies values from nothing but plain tensors."""
    plain: dict[int, torch.Tensor] = {}
    for module in twin.modules():
        for name, value in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            delattr(module, name)
            module.register_buffer(name, plain.setdefault(id(value), value.detach()))
            setattr(module, name, plain[id(value)])  # a recurrent layer notes this


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warnings about its own internals, and with the caller's random state unharmed."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    # Each decision that is followed would be told, and each failure with a traceback beside the error that names it.
    quiet = {"torch.fx.experimental.symbolic_shapes": logging.ERROR, "torch._subclasses.fake_tensor": logging.CRITICAL}
    levels = {name: logging.getLogger(name).level for name in quiet}
    for name, level in quiet.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _reason(
    name: str, args: tuple[Any, ...], options: dict[str, Any], calls: Calls, error: Exception
) -> tuple[str, str, str]:
    """What, why and fix for a model that cannot be exported."""
    shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves((args, options)) if isinstance(t, torch.Tensor))
    line = f" ({found})" if (found := user_line(error)) else ""
    place = f" in `{calls.failed_in}`{line}" if calls.failed_in else line
    first = next((text for text in str(error).splitlines() if text.strip()), "").strip()
    what = f"The model {name} cannot be traced with inputs of shape {shapes or 'none'}."
    known = reason_of({call.name for call in calls.log}, error)
    if known is not None:
        return what, f"{known[0]} ({type(error).__name__}{place})", known[1]
    why = f"{type(error).__name__}{place}: {first}"
    if is_embedding_error(error):
        return what, why, embedding_fix(args, options)
    dynamic = any(word in type(error).__name__ for word in ("DataDependent", "GuardOn")) or "data-dependent" in str(
        error
    )
    fix = (
        'The forward decides by the values of its input; trace a part that does not (scope="backbone"), '
        'or follow the way of these inputs (decisions="example").'
        if dynamic
        else "Check that model(*example_inputs) runs, and that the shapes are those that the model expects."
    )
    return what, why if why.endswith((".", "!", "?")) else f"{why}.", fix


def user_line(error: BaseException) -> str:
    """The last line of the model's own code that an error passed through: "file.py:12"; "" if there is none."""
    frames = [f for f in python_traceback.extract_tb(error.__traceback__) if of_user(f.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def of_user(path: str) -> bool:
    """Whether a file belongs neither to PyTorch, nor to this library, nor to Python's own."""
    own = path.startswith(sysconfig.get_path("stdlib")) and "layer-packages" not in path
    return not own and not path.startswith((*PACKAGES, "<"))


class Sizes(Interpreter):
    """Runs a program once on the example inputs to see the sizes that depend on values, as after `x[mask]`."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.shapes: dict[Node, list[tuple[int, ...]]] = {}

    @classmethod
    def of(cls, program: ExportedProgram, args: Any, options: Any) -> dict[Node, list[tuple[int, ...]]]:
        """Node → shapes of its results; empty where no size depends on values."""
        if not any(isinstance(n, torch.SymInt) for node in program.graph.nodes for s in shapes_of(node) for n in s):
            return {}
        run = cls(program)
        signature, inputs = program.graph_signature, iter(tree_leaves((args, options)))
        known = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = {**program.state_dict, **program.constants}
        known |= signature.inputs_to_lifted_tensor_constants
        nodes = [node.name for node in program.graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            run.run(*(constants[known[name]] if name in known else next(inputs) for name in nodes))
        return run.shapes

    def run_node(self, n: Node) -> Any:
        """One operation; what the exporter asserts about sizes is left out."""
        if n.op == "call_function" and name_of(n).removeprefix("aten.") in ASSERTIONS:
            return None
        out = super().run_node(n)
        self.shapes[n] = [tuple(v.shape) for v in tree_leaves(out) if isinstance(v, torch.Tensor)]
        return out


def shapes_of(node: Node) -> list[Any]:
    """The shapes of the tensors that an operation puts out; sizes that depend on values are symbols."""
    return [tuple(v.shape) for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]


def name_of(node: Node) -> str:
    """The operator of a node: "aten.conv2d"."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    return str(schema.name).replace("::", ".")
