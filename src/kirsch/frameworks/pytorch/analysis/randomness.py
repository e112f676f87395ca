"""Detect models whose outputs differ from run to run, and find the line of code that draws random numbers."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kirsch.frameworks.pytorch.analysis.program import is_user_code
from kirsch.frameworks.pytorch.inference.predict import arguments_of, inference, run, tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.export import ExportedProgram

TOLERANCE = 1e-5
"""Largest difference between runs that count as equal, relative to the largest value of the output.

Runs may differ by rounding, because sums on several threads have no fixed order.
"""

RANDOMNESS_FIX = (
    "Draw random numbers only if self.training is true (F.dropout takes training=self.training), or make them an input "
    "of the model."
)
"""Fix for a model that draws random numbers in inference mode."""


class _DrawRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch has no annotations here
    """Records the line of code of each operation that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        if draws(func, args, kwargs or {}):
            self.lines.append(line_of([(f.filename, f.lineno, f.line) for f in traceback.extract_stack()]))
        return func(*args, **(kwargs or {}))


def difference_of_runs(model: nn.Module, run: Callable[[], list[torch.Tensor]]) -> tuple[str, str]:
    """Return why two runs with the same inputs differ, and the fix; two empty texts if they agree.

    Two runs may agree although the model draws random numbers, if these rarely change the outputs. `line_that_draws`
    finds such numbers in the exported program.

    Args:
        model: the model that runs; its buffers are compared before and after.
        run: function that returns the outputs of one run.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    before = {name: value.clone() for name, value in model.named_buffers()}
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        first = run()
        torch.manual_seed(1)
        if _alike(first, run()):
            return "", ""
        with _DrawRecorder() as recorder:
            run()
    if recorder.lines:
        return reason_for(next(filter(None, recorder.lines), "")), RANDOMNESS_FIX
    buffers = dict(model.named_buffers())
    changed = [name for name, value in buffers.items() if name not in before or not torch.equal(value, before[name])]
    if changed:
        return (
            f"It changes its buffer `{changed[0]}` in inference mode, so that each run starts from another state.",
            "Change the buffer only if self.training is true, or make it an input and an output of the model.",
        )
    return (
        "Two runs with the same inputs give different outputs.",
        "Look for random numbers that are not PyTorch's (random, numpy.random) and for state that the model changes.",
    )


def nondeterminism(model: nn.Module, inputs: Any) -> tuple[str, str]:
    """Return why two runs in inference mode on the same inputs differ, and the fix; empty texts if they agree."""
    args, options = arguments_of(model, tensors(inputs, model))
    with inference(model):
        return difference_of_runs(model, lambda: run(model, args, options))


def draws(func: Any, args: Any, options: Any) -> bool:
    """Return whether an operation draws random numbers.

    PyTorch marks attention and recurrent layers as random even if their dropout is 0, so the dropout is checked.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    names = func._schema.arguments  # noqa: SLF001 - the schema has no public name
    values = {argument.name: argument.default_value for argument in names}
    values |= dict(zip(values, args, strict=False)) | options
    dropout = [values[name] for name in ("p", "dropout_p") if isinstance(values.get(name), (int, float))]
    return values.get("train", values.get("training")) is not False and 0 not in dropout


def line_that_draws(program: ExportedProgram) -> str | None:
    """Return the line of the first operation that draws random numbers and that affects an output.

    Returns:
        The line, "" if it is unknown; None if no output depends on random numbers.
    """
    needed = {node for node in program.graph.nodes if node.op == "output"}
    line = None
    for node in reversed(program.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
            if node.op == "call_function" and draws(node.target, node.args, node.kwargs):
                line = line_in(node.meta.get("stack_trace") or "")
    return line


def line_in(trace: str) -> str:
    """Return the innermost line outside of PyTorch and Kirsch in the text of a stack trace; see `line_of`."""
    frames = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)', trace)
    return line_of([(file, int(number), code) for file, number, code in frames])


def reason_for(line: str) -> str:
    """Return the sentence of an error about random numbers. `line` is the code that draws them; "" if it is unknown."""
    return f"It draws random numbers in inference mode{f': {line}' if line else ''}."


def _alike(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Return whether two runs agree up to rounding; NaN equals NaN, and infinity equals infinity."""
    if [value.shape for value in first] != [value.shape for value in second]:
        return False
    sizes = [float(a.abs().nan_to_num(posinf=0.0).max()) if a.is_floating_point() and a.numel() else 0.0 for a in first]
    return all(
        torch.allclose(a, b, rtol=0.0, atol=TOLERANCE * size, equal_nan=True)
        for a, b, size in zip(first, second, sizes, strict=True)
    )


def line_of(frames: list[tuple[str, int | None, str | None]]) -> str:
    """Return the innermost line outside of PyTorch and Kirsch: "net.py:41, `return F.dropout(x)`".

    Args:
        frames: file, line number and code of each call, outermost first.

    Returns:
        The line, "" if there is none.
    """
    for file, number, code in reversed(frames):
        if is_user_code(file):
            return f"{Path(file).name}:{number}{f', `{code.strip()}`' if code and code.strip() else ''}"
    return ""
