"""The masked original: the traced program with removed entries set to zero and statistics over the kept entries.

The statistics are implemented here from their definitions, independently of the surgery, so that one wrong rule cannot
affect both sides of the verification.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter
from torch.utils._pytree import tree_map

from kirsch.frameworks.pytorch.analysis.program import ASSERTIONS, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch.fx import Node

    from kirsch.frameworks.pytorch.analysis.traced import Traced
    from kirsch.graph.graph import Graph
    from kirsch.graph.labels import Tensor


RANDOM = ("rand", "normal", "bernoulli", "dropout", "multinomial")
"""Parts of the names of operations that draw random numbers."""


def input_free_nodes(traced: Traced) -> set[Node]:
    """Return the nodes that only depend on parameters, buffers and constants."""
    stored = {*traced.slots, *traced.program.graph_signature.inputs_to_lifted_tensor_constants}
    input_free: set[Node] = set()
    for node in traced.program.graph.nodes:
        deterministic = node.op == "call_function" and not any(word in name_of(node) for word in RANDOM)
        if node.name in stored or (deterministic and input_free.issuperset(node.all_input_nodes)):
            input_free.add(node)
    return input_free


@dataclass(frozen=True)
class _Lazy:
    """Placeholder for a parameter or buffer, by path, until an operation reads it."""

    name: str


class MaskedRun(Interpreter):
    """Run the traced operations of the original with masked tensors."""

    def __init__(
        self,
        graph: Graph,
        keep: NDArray[np.bool_],
        tensors: Mapping[str, torch.Tensor],
        blocks: Collection[str] = (),
        *,
        training: bool = False,
    ) -> None:
        """Prepare a run.

        Args:
            graph: graph of the original.
            keep: mask of the components (sets of coupled labels) that stay, bool of shape (components,).
            tensors: parameters and buffers by path, in the dtype to compute in. Each access returns a new tensor, which
                the run changes.
            blocks: paths of residual blocks to skip.
            training: run the trace of training mode.
        """
        self._graph = graph
        self._traced: Traced = graph.traced.training if training else graph.traced
        self._keep = keep
        self._tensors = tensors
        self._entries = {block.exit: block.entry for block in self._traced.blocks if block.path in blocks}
        self._entered: dict[Node, Any] = {}
        self._input_free = input_free_nodes(self._traced)
        self._kept_of: dict[int, NDArray[np.bool_] | None] = {}
        super().__init__(self._traced.program.graph_module)

    def outputs(self, inputs: list[Any], *, gradients: bool = False) -> list[torch.Tensor]:
        """Return the outputs of the program, without removed units.

        Args:
            inputs: the flat user inputs.
            gradients: record gradients.
        """
        with torch.set_grad_enabled(gradients):
            outputs = self.run(*self.feed(inputs))
        return self.kept_outputs([outputs[i] for i in self._traced.outputs], self._keep)

    def kept_outputs(self, outputs: Sequence[torch.Tensor], keep: NDArray[np.bool_]) -> list[torch.Tensor]:
        """Return outputs of the program without the units that a mask of components removes from them."""
        output_node = next(iter(reversed(self._traced.program.graph.nodes)))
        nodes: Any = output_node.args[0]
        states, selected = self._traced.states, self._traced.selected_outputs  # selected outputs keep all units
        return [
            output if i in selected else self._kept(output, states.get(nodes[i]), keep)
            for i, output in zip(self._traced.outputs, outputs, strict=True)
        ]

    def feed(self, inputs: list[Any]) -> list[Any]:
        """Return the arguments of the program: constants, user inputs, and None for parameters and buffers."""
        signature = self._traced.program.graph_signature
        user_inputs = iter(inputs)
        feed: list[Any] = []
        for node in self._traced.program.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in self._traced.slots:
                feed.append(None)
            elif node.name in signature.inputs_to_lifted_tensor_constants:
                feed.append(self._traced.program.constants[signature.inputs_to_lifted_tensor_constants[node.name]])
            else:
                feed.append(next(user_inputs))
        return feed

    def _kept(self, value: torch.Tensor, labeled: Tensor | None, keep: NDArray[np.bool_]) -> torch.Tensor:
        """Return the kept units of an output that may lose units."""
        for axis, labels in enumerate(labeled.axes if labeled is not None else ()):
            mask = self._graph.kept(labels, keep)
            if mask is not None:
                value = value.index_select(axis, torch.from_numpy(mask.nonzero()[0]).to(value.device))
        return value

    def run_node(self, n: Node) -> Any:
        """Run one operation. The output of a skipped block is its input."""
        out = self._entered[self._entries[n]] if n in self._entries else self._operation(n)
        if n in self._entries.values():
            self._entered[n] = out
        return out

    def _operation(self, n: Node) -> Any:
        """Run one operation. A statistic over a labeled axis is computed over the kept entries only."""
        if n.op == "placeholder" and n.name in self._traced.slots:
            next(self.args_iter)  # the None of `feed`
            return _Lazy(self._traced.slots[n.name])
        if n.op != "call_function" or n.target is operator.getitem:
            return super().run_node(n)
        if n.target.__name__.partition(".")[0] in ASSERTIONS:  # type: ignore[union-attr]
            return None
        if n.target is torch.ops.aten.view.default:
            # `view` fails if the strides of a masked statistic differ from the traced strides.
            args, _ = self.fetch_args_kwargs_from_env(n)
            return self._finite(args[0].reshape(args[1]), self._traced.states[n])
        out = self._statistic(n) if n.name in self._traced.statistics else super().run_node(n)
        state = self._traced.states[n]
        zeroed = self._zeroed if n in self._input_free else self._finite
        if isinstance(out, (tuple, list)):
            return [zeroed(value, labeled) for value, labeled in zip(out, state, strict=True)]
        return zeroed(out, state)

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """Return the arguments of an operation.

        Parameters are masked when an operation reads them, so that only a few masked copies exist at a time.
        """
        return tree_map(
            lambda value: self._masked(value.name) if isinstance(value, _Lazy) else value,
            super().fetch_args_kwargs_from_env(n),
        )

    def _masks(self, labeled: Tensor) -> list[NDArray[np.bool_] | None]:
        """Return for each axis of a tensor which entries are kept; None if all are."""
        for labels in labeled.axes:
            if id(labels) not in self._kept_of:
                self._kept_of[id(labels)] = self._graph.kept(labels, self._keep)
        return [self._kept_of[id(labels)] for labels in labeled.axes]

    def _is_cut(self, labeled: Tensor) -> bool:
        return any(kept is not None for kept in self._masks(labeled))

    def _mask_of(self, labeled: Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return 1 for kept and 0 for removed entries of a tensor, in a shape that broadcasts against the tensor."""
        mask = torch.ones((1,) * len(labeled.shape), dtype=like.dtype, device=like.device)
        for axis, kept in enumerate(self._masks(labeled)):
            if kept is not None:
                shape = [-1 if position == axis else 1 for position in range(len(labeled.shape))]
                mask = mask * torch.from_numpy(kept).to(like.device, like.dtype).reshape(shape)
        return mask

    def _masked(self, name: str) -> torch.Tensor:
        value, labeled = self._tensors[name], self._graph.tensors[name]
        if not self._is_cut(labeled) or not (value.is_floating_point() or value.is_complex()):
            return value
        return value.mul_(self._mask_of(labeled, value))

    def _zeroed(self, value: Any, labeled: Any) -> Any:
        """Return the value with 0 in removed units, for a weight that is computed from others.

        If a mean is subtracted from the weight, removed units are not 0 and would affect the next computed weight.
        """
        if not isinstance(value, torch.Tensor) or labeled is None or not self._is_cut(labeled):
            return value
        return value.masked_fill(self._mask_of(labeled, value) == 0, 0)

    def _finite(self, value: Any, labeled: Any) -> Any:
        """Return the value with 0 in place of infinity and NaN in removed units.

        A removed channel is zero, so its logarithm is infinite. Infinity times a masked weight of 0 is NaN, which would
        spread to kept units.
        """
        if not isinstance(value, torch.Tensor) or labeled is None or not self._is_cut(labeled):
            return value
        if bool(value.sum().isfinite()):  # much cheaper than a test of each entry
            return value
        removed = self._mask_of(labeled, value) == 0
        return torch.where(removed & ~value.isfinite(), 0, value)

    def _statistic(self, n: Node) -> Any:
        args, options = self.fetch_args_kwargs_from_env(n)
        source = n.args[0]
        labeled = self._traced.states[source]  # type: ignore[index]
        mask = self._mask_of(labeled, args[0]).expand(args[0].shape)
        return STATISTICS[n.target.__name__.partition(".")[0]](mask, *args, **options)  # type: ignore[union-attr]


def _layer_norm(
    mask: torch.Tensor,
    x: torch.Tensor,
    sizes: list[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    _cudnn: bool = False,
) -> torch.Tensor:
    dims = tuple(range(-len(sizes), 0))
    count = mask.sum(dims, keepdim=True)
    mean = (x * mask).sum(dims, keepdim=True) / count
    variance = (((x - mean) * mask) ** 2).sum(dims, keepdim=True) / count
    out = (x - mean) / (variance + eps).sqrt()
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias) * mask


def _rms_norm(
    mask: torch.Tensor,
    x: torch.Tensor,
    sizes: list[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    dims = tuple(range(-len(sizes), 0))
    square = ((x * mask) ** 2).sum(dims, keepdim=True) / mask.sum(dims, keepdim=True)
    out = x / (square + (torch.finfo(x.dtype).eps if eps is None else eps)).sqrt()
    return (out if weight is None else out * weight) * mask


def _weight_norm(mask: torch.Tensor, v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    others = tuple(axis for axis in range(v.dim()) if axis != dim)  # dim=-1 means the norm over all axes
    return g * v / ((v * mask) ** 2).sum(others, keepdim=True).sqrt()


def _group_norm(
    mask: torch.Tensor,
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    _cudnn: bool = False,
) -> torch.Tensor:
    rows, kept = (t.reshape(x.shape[0], groups, -1) for t in (x, mask))
    count = kept.sum(-1, keepdim=True).clamp(min=1)  # a fully removed group has no entries
    mean = (rows * kept).sum(-1, keepdim=True) / count
    variance = (((rows - mean) * kept) ** 2).sum(-1, keepdim=True) / count
    out = ((rows - mean) / (variance + eps).sqrt()).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    out = out if weight is None else out * weight.reshape(shape)
    return (out if bias is None else out + bias.reshape(shape)) * mask


def _native_layer_norm(mask: torch.Tensor, x: torch.Tensor, *args: Any) -> Any:
    return _layer_norm(mask, x, *args), *_unused_statistics(x)


def _native_group_norm(
    mask: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *sizes_groups_eps: Any,
) -> Any:
    groups, eps = sizes_groups_eps[-2:]
    return _group_norm(mask, x, groups, weight, bias, eps), *_unused_statistics(x)


def _unused_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return NaN for the mean and the reciprocal deviation, so that any use of them in the forward pass is detected."""
    return x.new_full((), torch.nan), x.new_full((), torch.nan)


def _dims(x: torch.Tensor, dim: Any) -> tuple[int, ...]:
    return tuple(range(x.dim())) if dim is None else tuple(dim) if isinstance(dim, (list, tuple)) else (dim,)


def _sum(mask: torch.Tensor, x: torch.Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> torch.Tensor:
    return (x * mask).sum(_dims(x, dim), keepdim=keepdim)


def _mean(mask: torch.Tensor, x: torch.Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> torch.Tensor:
    return (x * mask).sum(_dims(x, dim), keepdim=keepdim) / mask.sum(_dims(x, dim), keepdim=keepdim).clamp(min=1)


def _var(
    mask: torch.Tensor,
    x: torch.Tensor,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> torch.Tensor:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dims = _dims(x, dim)
    count = mask.sum(dims, keepdim=True)
    mean = (x * mask).sum(dims, keepdim=True) / count
    correction = float(unbiased) if correction is None else correction
    out = (((x - mean) * mask) ** 2).sum(dims, keepdim=True) / (count - correction)
    return out if keepdim else out.squeeze(dims)


def _std(mask: torch.Tensor, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return _var(mask, x, *args, **options).sqrt()


def _norm(
    mask: torch.Tensor, x: torch.Tensor, order: float | None = None, dim: Any = None, keepdim: bool = False, **_: Any
) -> torch.Tensor:
    out: torch.Tensor = torch.linalg.vector_norm(x * mask, 2 if order is None else order, _dims(x, dim), keepdim)
    return out


def _softmax(mask: torch.Tensor, x: torch.Tensor, dim: int, *_: Any, **__: Any) -> torch.Tensor:
    return torch.exp(_log_softmax(mask, x, dim)) * mask


def _log_softmax(mask: torch.Tensor, x: torch.Tensor, dim: int, *_: Any, **__: Any) -> torch.Tensor:
    return x - x.masked_fill(mask == 0, -torch.inf).logsumexp(dim, keepdim=True)


def _topk(mask: torch.Tensor, x: torch.Tensor, *args: Any, **options: Any) -> Any:
    return x.masked_fill(mask == 0, -torch.inf).topk(*args, **options)


def _cumsum(mask: torch.Tensor, x: torch.Tensor, dim: int, **options: Any) -> torch.Tensor:
    return (x * mask.to(x.dtype)).cumsum(dim, **options)


def _amax(mask: torch.Tensor, x: torch.Tensor, dim: Any = (), keepdim: bool = False) -> torch.Tensor:
    return x.masked_fill(mask == 0, -torch.inf).amax(_dims(x, dim), keepdim)


def _amin(mask: torch.Tensor, x: torch.Tensor, dim: Any = (), keepdim: bool = False) -> torch.Tensor:
    return x.masked_fill(mask == 0, torch.inf).amin(_dims(x, dim), keepdim)


def _max(mask: torch.Tensor, x: torch.Tensor, *args: Any, **options: Any) -> Any:
    return x.masked_fill(mask == 0, -torch.inf).max(*args, **options)


def _min(mask: torch.Tensor, x: torch.Tensor, *args: Any, **options: Any) -> Any:
    return x.masked_fill(mask == 0, torch.inf).min(*args, **options)


STATISTICS: dict[str, Callable[..., Any]] = {
    "layer_norm": _layer_norm,
    "native_layer_norm": _native_layer_norm,
    "rms_norm": _rms_norm,
    "_weight_norm": _weight_norm,
    "group_norm": _group_norm,
    "native_group_norm": _native_group_norm,
    "sum": _sum,
    "mean": _mean,
    "nansum": _sum,
    "linalg_vector_norm": _norm,
    "linalg_norm": _norm,
    "norm": _norm,
    "var": _var,
    "std": _std,
    "softmax": _softmax,
    "_softmax": _softmax,
    "log_softmax": _log_softmax,
    "_log_softmax": _log_softmax,
    "topk": _topk,
    "cumsum": _cumsum,
    "amax": _amax,
    "amin": _amin,
    "max": _max,
    "min": _min,
}
