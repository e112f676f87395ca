"""The proof of a cut: the very module that is returned, held against the masked original."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from kirsch.errors import VerificationError
from kirsch.frameworks.pytorch.masked import MaskedRun
from kirsch.frameworks.pytorch.surgery import sliced
from kirsch.graph.proof import Verification

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.frameworks.pytorch.trace import Traced
    from kirsch.graph.graph import Graph

# A wrong index moves an output by a thousandth of its size or more; rounding moves it by the type's epsilon, times the
# length and number of the sums on the way.
TOLERANCES = {
    torch.float64: (1e-9, "rounding in float64; a wrong index moves outputs by 1e-3 and more"),
    torch.float32: (1e-4, "rounding in float32, because the model cannot run in float64"),
}


def verify(pruned: nn.Module, original: nn.Module, graph: Graph, keep: NDArray[np.bool_]) -> Verification:
    """Hold a pruned module against the masked original, in float64 where the model allows.

    Both get the same noise on all parameters first: biases, scales and branches that start at zero would otherwise hide
    a wrong cut.

    Raises:
        VerificationError: the pruned module does not run, or differs.
    """
    try:
        found = _compare(pruned, original, graph, keep, torch.float64)
    except (RuntimeError, TypeError):
        found = _compare(pruned, original, graph, keep, torch.float32)
    if not found.passed:
        raise VerificationError(
            f"The pruned {graph.model_name} is {found.text}.",
            "A cut went wrong, so nothing was returned; the model given is unchanged.",
            "Exclude the layers that are unusual, and report the model.",
        )
    return found


def _compare(
    pruned: nn.Module, original: nn.Module, graph: Graph, keep: NDArray[np.bool_], dtype: torch.dtype
) -> Verification:
    traced: Traced = graph.traced
    noise = _noise(original)
    tensors = {
        name: _cast(value, dtype) + (noise[id(value)].to(value.device, dtype) if id(value) in noise else 0)
        for name, value in _named(original).items()
    }
    candidate = _candidate(pruned, original, graph, keep, noise, dtype)
    args, options = tree_map(lambda value: _cast(value, dtype), (traced.args, traced.options))
    flat = tree_leaves((args, options))
    masked = MaskedRun(graph, keep, tensors).outputs(flat)
    dense = MaskedRun(graph, graph.keep({}), tensors).outputs(flat)
    with torch.no_grad():
        found = [value for value in tree_leaves(_plain(candidate(*args, **options))) if isinstance(value, torch.Tensor)]
    tolerance, reason = TOLERANCES[dtype]
    return Verification(
        error=_distance(masked, found),
        tolerance=tolerance,
        reason=reason,
        power=_distance(masked, dense),
        statistics=tuple(sorted(graph.facts.statistics)),
    )


def _candidate(
    pruned: nn.Module,
    original: nn.Module,
    graph: Graph,
    keep: NDArray[np.bool_],
    noise: dict[int, torch.Tensor],
    dtype: torch.dtype,
) -> nn.Module:
    """A copy of the pruned module in inference mode, with its part of the noise."""
    candidate = copy.deepcopy(pruned).eval().to(dtype)
    mine = _named(candidate)
    done = set()
    with torch.no_grad():
        for name, value in _named(original).items():
            target = mine[name]
            if id(value) in noise and id(target) not in done:
                done.add(id(target))
                target.add_(sliced(noise[id(value)], graph.tensors[name], graph, keep).to(target.device, dtype))
    return candidate


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _noise(model: nn.Module) -> dict[int, torch.Tensor]:
    """Noise for each floating tensor by identity: a tenth of its size for weights, enough to matter for the rest.

    Running variances stay positive because they are only ever made larger.
    """
    generator = torch.Generator().manual_seed(0)
    out: dict[int, torch.Tensor] = {}
    for name, value in _named(model).items():
        if not value.is_floating_point() or id(value) in out:
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        size = float(value.detach().double().abs().mean()) if value.numel() else 0.0
        scale = 0.1 * max(size, 1e-2) if value.dim() > 1 else 0.1
        out[id(value)] = noise.abs() * scale if name.endswith("running_var") else noise * scale
    return out


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.detach().to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _plain(outputs: Any) -> Any:
    """Dataclass outputs of other libraries as tuples."""
    return outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs


def _distance(reference: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest reference value, over all floating outputs; inf if shapes differ."""
    pairs = [(a, b) for a, b in zip(reference, found, strict=False) if a.is_floating_point()]
    if len(reference) != len(found) or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    worst = 0.0
    for a, b in pairs:
        if a.numel():
            distance = float((a - b).abs().max() / a.abs().max().clamp(min=1e-300))
            if distance != distance:  # noqa: PLR0124 - NaN
                return float("nan")
            worst = max(worst, distance)
    return worst
