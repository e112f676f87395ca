"""Whether a model gives the same outputs each time it is run, and what it draws if it does not."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kirsch.frameworks.pytorch.analysis.program import of_user

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.export import ExportedProgram

APART = 1e-5
"""Share of the largest output that two runs may differ by: sums on many threads have no fixed order."""

STILL = (
    "Draw only where self.training is true (F.dropout takes training=self.training), or let the random numbers be an "
    "input of the model."
)
"""What to do about a model that draws random numbers in inference mode."""


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch annotates neither
    """Notes the line of code of each operation that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        if draws(func, args, kwargs or {}):
            self.lines.append(line_of([(f.filename, f.lineno, f.line) for f in traceback.extract_stack()]))
        return func(*args, **(kwargs or {}))


def unsteady(model: nn.Module, run: Callable[[], list[torch.Tensor]]) -> tuple[str, str]:
    """Return why two runs for one input differ, and what to do; two empty texts if they do not.

    What draws too rarely to be seen in two runs is found in the program that is exported; see `drawing_line`.

    Args:
        model: what is run, whose buffers are compared before and after.
        run: gives the outputs.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    before = {name: value.clone() for name, value in model.named_buffers()}
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        first = run()
        torch.manual_seed(1)
        if _alike(first, run()):
            return "", ""
        with _Draws() as watch:
            run()
    if watch.lines:
        return drawing(next(filter(None, watch.lines), "")), STILL
    buffers = dict(model.named_buffers())
    changed = [name for name, value in buffers.items() if name not in before or not torch.equal(value, before[name])]
    if changed:
        return (
            f"It changes its buffer `{changed[0]}` in inference mode, so that each run starts from another state.",
            "Change it only where self.training is true, or make the state an input and an output.",
        )
    return (
        "Two runs with the same inputs give different outputs.",
        "Look for random numbers that are not PyTorch's (random, numpy.random) and for state that a forward changes.",
    )


def draws(func: Any, args: Any, options: Any) -> bool:
    """Return whether an operation draws random numbers.

    Attention and recurrent layers are marked as drawing whether or not they drop anything.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    names = func._schema.arguments  # noqa: SLF001 - has no public name
    given = {argument.name: argument.default_value for argument in names}
    given |= dict(zip(given, args, strict=False)) | options
    dropped = [given[name] for name in ("p", "dropout_p") if isinstance(given.get(name), (int, float))]
    return given.get("train", given.get("training")) is not False and 0 not in dropped


def drawing_line(program: ExportedProgram) -> str | None:
    """Return the line of the first operation that draws random numbers for an output, "" if it is unknown.

    None where there is no such operation.
    """
    needed = {node for node in program.graph.nodes if node.op == "output"}
    found = None
    for node in reversed(program.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
            if node.op == "call_function" and draws(node.target, node.args, node.kwargs):
                found = line_in(node.meta.get("stack_trace") or "")
    return found


def line_in(trace: str) -> str:
    """Return the innermost line outside of PyTorch and Kirsch in the text of a stack trace; see `line_of`."""
    found = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)', trace)
    return line_of([(file, int(number), code) for file, number, code in found])


def drawing(line: str) -> str:
    """Return the sentence for a model that draws random numbers at a line of code, which may be unknown: ""."""
    return f"It draws random numbers in inference mode{f': {line}' if line else ''}."


def _alike(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether two runs give the same numbers up to rounding; NaN and infinity at the same places are the same."""
    if [value.shape for value in first] != [value.shape for value in second]:
        return False
    sizes = [float(a.abs().nan_to_num(posinf=0.0).max()) if a.is_floating_point() and a.numel() else 0.0 for a in first]
    return all(
        torch.allclose(a, b, rtol=0.0, atol=APART * size, equal_nan=True)
        for a, b, size in zip(first, second, sizes, strict=True)
    )


def line_of(frames: list[tuple[str, int | None, str | None]]) -> str:
    """Return the innermost line outside of PyTorch and Kirsch, as "net.py:41, `return F.dropout(x)`"; "" if none is.

    Args:
        frames: file, line number and code of each call, the outermost first.
    """
    for file, number, code in reversed(frames):
        if of_user(file):
            return f"{Path(file).name}:{number}{f', `{code.strip()}`' if code and code.strip() else ''}"
    return ""
