"""Find cut modules in which the units of the cut group have no effect on any output for the example inputs.

The output of attention over one token, or over equal tokens, does not depend on queries and keys, so that a wrong cut
of queries and keys would pass the verification. The gradients of the outputs show such modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import linear

from kirsch.errors import error_text
from kirsch.frameworks.pytorch.verification.masked import MaskedRun

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group, ParameterAxis

FAINT = 1e-6
"""Effects below this fraction of the largest effect are rounding errors in float64. `verify` adds noise to the
parameters before the call, so most real effects are above 1e-3 of the largest effect."""

ROUNDED = 1e-5
"""Effects below this fraction of the largest effect may be rounding errors in float32.

In a Llama with 1 billion parameters, the effects of queries and keys are above 5e-4 of the largest effect for different
tokens. For equal tokens, they would be 0 without rounding, and are below 2e-8.
"""

ROWS = 64
"""Number of rows of the weight of a linear layer whose effects are computed if they are sampled."""

Effects = dict["ParameterAxis", "NDArray[np.float64]"]
"""Axis of a tensor → for each index on it, the effect on the outputs."""


@dataclass(frozen=True)
class OriginalRun:
    """Outputs of the original, and the modules in which the units of a cut group have no effect on them.

    Args:
        outputs: the outputs without the units that the cut removes from them.
        unseen: paths of the modules, in the order of the groups; also empty if no output is differentiable.
        undetermined: the error because of which these modules are not known, else "".
    """

    outputs: list[torch.Tensor]
    unseen: tuple[str, ...] = ()
    undetermined: str = ""


def run_original(
    graph: Graph,
    keep: NDArray[np.bool_],
    tensors: Mapping[str, torch.Tensor],
    inputs: list[Any],
    faint: float | None,
    *,
    sampled: bool = False,
) -> OriginalRun:
    """Run the trace of the original.

    Args:
        graph: graph of the original.
        keep: mask of the components (sets of coupled labels) that stay, bool of shape (components,).
        tensors: parameters and buffers of the original by path, in the dtype to compute in.
        inputs: the flat user inputs.
        faint: effects below this fraction of the largest effect are rounding errors; None: do not compute the effects.
        sampled: compute the effects of some rows of the weights of linear layers only, which takes much less time. If
            one of them has an effect, the module has one; otherwise, other rows may still have one.
    """
    undetermined = ""
    if faint is not None:
        weights = _Weights(graph, tensors, ROWS if sampled else None)
        try:
            outputs = weights.run(inputs)
        except (
            RuntimeError
        ) as error:  # PyTorch raises it for an operator without a derivative, and for a lack of memory
            undetermined = error_text(error)
        else:
            return OriginalRun(outputs(keep), _unseen(graph, keep, weights.effects, faint))
    run = MaskedRun(graph, graph.keep({}), tensors)
    torch.manual_seed(0)
    return OriginalRun(run.kept_outputs(run.outputs(inputs), keep), (), undetermined)


def _unseen(graph: Graph, keep: NDArray[np.bool_], effects: Effects, faint: float) -> tuple[str, ...]:
    threshold = faint * max((float(effect.max()) for effect in effects.values()), default=0.0)
    cut = [group for group in graph.groups if not keep[group.components].all()]
    return tuple(
        dict.fromkeys(
            path for group in cut for path in group.layers if _without_effect(group, path, graph, effects, threshold)
        )
    )


def _without_effect(group: Group, path: str, graph: Graph, effects: Effects, threshold: float) -> bool:
    """Return whether no unit of a group affects an output through the tensors of the module at a path."""
    in_group = np.zeros(len(graph.coupling.frozen), bool)
    in_group[group.components] = True
    axes = [axis for axis in group.footprint if axis in effects and axis[0].rpartition(".")[0] == path]
    of_units = [effects[axis][in_group[graph.coupling.component[graph.axes[axis]]]] for axis in axes]
    return bool(axes) and all(bool((effect <= threshold).all()) for effect in of_units)


class _Weights(Mapping["str", "torch.Tensor"]):
    """Parameters and buffers for a run with gradients; each exists only while an operation reads it.

    Attributes:
        effects: the largest |gradient · value| for each index of each axis, after `run`. Only axes of parameters have
            an effect: batch normalization has no derivative with respect to its buffers.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, torch.Tensor], rows: int | None = None) -> None:
        self._graph, self._tensors, self._rows = graph, tensors, rows
        self._requires_grad = torch.ones((), requires_grad=True)
        self._last = "", torch.empty(0)
        first: dict[int, str] = {}
        self._name_of = {name: first.setdefault(id(graph.tensors[name]), name) for name in tensors}  # of tied tensors
        parameters = set(graph.parameters)
        self.effects: Effects = {
            (name, axis): np.zeros(graph.tensors[name].shape[axis])
            for name, axis in graph.axes
            if name in parameters and 0 not in graph.tensors[name].shape
        }
        self._axes: dict[str, list[int]] = {}
        for name, axis in self.effects:
            self._axes.setdefault(name, []).append(axis)

    def run(self, inputs: list[Any]) -> Callable[[NDArray[np.bool_]], list[torch.Tensor]]:
        """Run the original, compute the effects for a random weighting of the outputs, and return the outputs."""
        run = _SampledRun(self._graph, self._graph.keep({}), self)
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(self._without_weight, self._with_weight):
            outputs = run.outputs(inputs, gradients=True)
        differentiable = [out.abs() if out.is_complex() else out for out in outputs if out.requires_grad]
        if differentiable:
            sums = [torch.where(out.isfinite(), out * torch.rand_like(out), 0).sum() for out in differentiable]
            torch.stack(sums).sum().backward()  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
        else:
            self.effects = {}
        detached = [out.detach() for out in outputs]
        return lambda keep: run.kept_outputs(detached, keep)

    def __getitem__(self, name: str) -> torch.Tensor:
        first = self._name_of[name]
        if first not in self._axes:
            return self._tensors[name]
        value: torch.Tensor = _Read.apply(self._requires_grad, self._tensors, first, self._record)  # type: ignore[no-untyped-call]
        setattr(value, NAME, first)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `linear(x, weight, bias)`; its derivative computes the effects of the sampled rows of the weight."""
        name = getattr(weight, NAME, None)
        if self._rows is None or name is None or len(weight) <= self._rows:
            return linear(x, weight, bias)
        rows = torch.linspace(0, len(weight) - 1, self._rows).long()
        value, record = (functools.partial(function, name) for function in (self._value, self._record))
        out: torch.Tensor = _Linear.apply(x, self._requires_grad, weight.detach(), rows, value, record)  # type: ignore[no-untyped-call]
        return out if bias is None else out + bias

    def _record(self, name: str, gradient: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        value = self._value(name) if rows is None else self._value(name)[rows]
        effect = (gradient * value).abs()
        if not bool(effect.sum().isfinite()):  # much cheaper than the replacement
            effect.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        for axis in self._axes[name]:
            largest = effect.movedim(axis, 0).reshape(effect.shape[axis], -1).amax(1).cpu().double().numpy()
            index = slice(None) if rows is None or axis else rows.numpy()
            effects = self.effects[name, axis]
            effects[index] = np.maximum(effects[index], largest)

    def _without_weight(self, value: torch.Tensor) -> Any:
        """Return what the derivative of an operation stores: for a weight or a view of it, its name and strides."""
        name = getattr(value if value._base is None else value._base, NAME, None)  # noqa: SLF001 - has no public name
        return value if name is None else (name, value.size(), value.stride(), value.storage_offset())

    def _with_weight(self, stored: Any) -> torch.Tensor:
        if isinstance(stored, torch.Tensor):
            return stored
        name, *view = stored
        return self._value(name).as_strided(*view)

    def _value(self, name: str) -> torch.Tensor:
        """Return a weight; an operation that needs the weight for its gradient also passes on the weight's gradient."""
        if self._last[0] != name:
            self._last = name, self._tensors[name]
        return self._last[1]


class _SampledRun(MaskedRun):
    """Run the traced operations of the original with the linear layers of `_Weights`."""

    _tensors: _Weights

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation."""
        if target is torch.ops.aten.linear.default:
            return self._tensors.linear(*args, **kwargs)
        return super().call_function(target, args, kwargs)


NAME = "_kirsch_name"
"""Attribute of a weight that an operation reads: its path."""


class _Read(torch.autograd.Function):
    """A weight whose gradient is passed to a function, and which the graph of the gradients does not keep."""

    @staticmethod
    def forward(
        ctx: Any,
        requires_grad: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        record: Callable[..., None],
    ) -> torch.Tensor:
        del requires_grad
        ctx.name, ctx.record = name, record
        return tensors[name]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.record(ctx.name, gradient)
        return None, None, None, None


class _Linear(torch.autograd.Function):
    """A linear layer whose derivative passes the gradients of some rows of the weight to a function.

    The other rows get no gradient, and the graph of the gradients does not keep the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        requires_grad: torch.Tensor,
        weight: torch.Tensor,
        rows: torch.Tensor,
        value: Callable[[], torch.Tensor],
        record: Callable[..., None],
    ) -> torch.Tensor:
        del requires_grad
        ctx.save_for_backward(x)
        ctx.rows, ctx.value, ctx.record = rows, value, record
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        of_rows = gradient[..., ctx.rows].reshape(-1, len(ctx.rows))
        ctx.record(of_rows.T @ x.reshape(-1, x.shape[-1]), ctx.rows)
        of_x = gradient @ ctx.value() if ctx.needs_input_grad[0] else None
        return of_x, None, None, None, None, None
