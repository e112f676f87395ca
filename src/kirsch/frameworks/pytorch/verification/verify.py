"""The verification of a cut: the very module that is returned, held against the masked original."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kirsch.errors import VerificationError, error_text
from kirsch.frameworks.pytorch.analysis.program import user_line
from kirsch.frameworks.pytorch.inference.predict import run
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.surgery.cut import sliced
from kirsch.frameworks.pytorch.verification.computed_weights import changed
from kirsch.frameworks.pytorch.verification.masked import MaskedRun
from kirsch.frameworks.pytorch.verification.unseen import unseen
from kirsch.graph.constants import AS_GRAPH
from kirsch.graph.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from kirsch.frameworks.pytorch.analysis.traced import Traced
    from kirsch.graph.graph import Graph

# A wrong index moves an output by a thousandth of its size or more; rounding moves it by the type's epsilon, times the
# length and number of the sums on the way.
TOLERANCES = {
    torch.float64: (1e-9, "rounding in float64; a wrong index moves outputs by 1e-3 and more"),
    torch.float32: (1e-4, "rounding in float32, because the model cannot run in float64"),
}
FOLDED = 1e-6, "rounding of the weights that the scale of attention is folded into; a wrong index moves outputs by 1e-3"

LIMIT = 1e37
"""Larger numbers are the limits of a type, such as `torch.finfo(dtype).min` in masked scores, or parts of them."""

WRONG_CUT = "A cut went wrong, so nothing was returned; the model given is unchanged."
OTHER_WAY = "Its forward decides by values, and may have gone another way than in the trace; nothing was returned."


def verify(
    pruned: nn.Module,
    original: nn.Module,
    graph: Graph,
    keep: NDArray[np.bool_],
    without: Collection[str] = (),
    moved: Mapping[str, str] | None = None,
) -> Verification:
    """Hold a pruned module against the masked original, in float64 where the model allows.

    Both get the same noise on all parameters first: biases, scales and branches that start at zero would otherwise hide
    a wrong cut.

    Args:
        pruned, original: the new model, and the one that was traced.
        graph: of the original.
        keep: component → whether it stays.
        without: paths of the blocks that were left out.
        moved: path of a module in the original → its path in the pruned one, where blocks were left out.

    Raises:
        VerificationError: the pruned module does not run, differs, or holds what was one tensor as two.
    """
    if any(parameter.is_meta for parameter in original.parameters()):
        raise VerificationError(
            f"The pruned {graph.model_name} cannot be verified.",
            "It lives on the meta device and has no values.",
            "Prune with verify=False, or give the model values first.",
        )
    what = _Cut(keep, without, moved)
    if not _shares_alike(pruned, original, what):  # of equal values, they would put out the same until they are trained
        raise VerificationError(
            f"The pruned {graph.model_name} does not share the tensors that the original shares.",
            WRONG_CUT,
            "Exclude the layers that share a tensor, and report the model.",
        )
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):  # a forward may draw random numbers
        return _verified(pruned, original, graph, what)


@dataclass(frozen=True)
class _Cut:
    """What `verify` is told of a cut."""

    keep: NDArray[np.bool_]
    without: Collection[str]
    moved: Mapping[str, str] | None

    def now(self, name: str) -> str | None:
        """What a tensor of the original is called in the pruned model; None if it went with a block."""
        if self.moved is None:
            return name
        path, _, own = name.rpartition(".")
        now = self.moved.get(path)
        return now if now is None else f"{now}.{own}".removeprefix(".")


def _verified(pruned: nn.Module, original: nn.Module, graph: Graph, what: _Cut) -> Verification:
    dtype = torch.float64
    try:
        found = _compare(pruned, original, graph, what, dtype)
    except Exception:  # noqa: BLE001 - whatever the model's own code raises
        dtype = torch.float32
        found = _compare(pruned, original, graph, what, dtype)
    if not found.passed:
        _refuse_unstable(pruned, graph)
        raise VerificationError(
            f"The pruned {graph.model_name} is {found.text}.",
            OTHER_WAY if graph.tracing.decisions == "example" else WRONG_CUT,
            "Exclude the layers that are unusual, and report the model.",
        )
    fault = _training_fault(pruned, graph)
    if fault is None and graph.traced.training is not None and not (what.without or graph.tracing.as_graph):
        error = _training_error(pruned, original, graph, what, dtype)
        if error is not None:  # what only training reaches was seen there
            found = replace(found, unseen=tuple(path for path in found.unseen if path in _reached(graph.traced)))
        if error is not None and not error <= found.tolerance:
            raise VerificationError(
                f"The pruned {graph.model_name} in training mode is not equal to the masked original.",
                f"What only training runs differs by {error:.0e}. {WRONG_CUT}",
                "Exclude the layers that are unusual, and report the model.",
            )
    if fault is not None and _training_fault(original, graph) is None:
        raise VerificationError(
            f"The pruned {graph.model_name} runs in inference mode only.",
            error_text(fault),
            f"What its forward does in training holds on to a width ({user_line(fault) or 'in PyTorch'}); let it read "
            f"the width from the tensor's shape, or {AS_GRAPH}.",
        )
    return found


def _refuse_unstable(pruned: nn.Module, graph: Graph) -> None:
    """Say so if a model puts out NaN, or other numbers at each run, so that it differs from anything."""
    traced: Traced = graph.traced
    first, second = (run(copy_of(pruned).eval(), traced.args, traced.options) for _ in range(2))
    apart = distance(first, second)
    why = "It puts out NaN, or no finite number, for the example inputs." if apart != apart else ""  # noqa: PLR0124 - NaN
    why = "It draws random numbers in inference mode, so that no two runs agree." if apart > 0 else why
    if why:
        raise VerificationError(
            f"The pruned {graph.model_name} cannot be verified.",
            why,
            "Mend that first, or prune with verify=False; the model given is unchanged.",
        )


def _training_fault(model: nn.Module, graph: Graph) -> Exception | None:
    """What a model raises in training mode; None if it runs."""
    traced: Traced = graph.traced
    try:
        run(copy_of(model).train(), traced.args, traced.options)
    except Exception as error:  # noqa: BLE001 - whatever the model's own code raises
        return error
    return None


def computed(original: nn.Module, graph: Graph, keep: NDArray[np.bool_], dtype: torch.dtype) -> dict[str, float]:
    """Return the modules whose computed weights a cut changes for the units that stay; see `computed.changed`."""
    with _OneType(dtype):
        return changed(graph, keep, {name: _cast(value, dtype) for name, value in _named(original).items()})


def _compare(pruned: nn.Module, original: nn.Module, graph: Graph, what: _Cut, dtype: torch.dtype) -> Verification:
    keep = what.keep
    traced: Traced = graph.traced
    noise = noise_of(original)
    tensors = _noisy(original, noise, dtype)
    candidate = _candidate(pruned, original, graph, what, noise, dtype)
    args, options = _inputs(graph, dtype)
    flat = tree_leaves((args, options))
    with _OneType(dtype):
        masked = drawing_alike(lambda: MaskedRun(graph, keep, tensors, what.without).outputs(flat))
        dense = drawing_alike(lambda: MaskedRun(graph, graph.keep({}), tensors).outputs(flat, shown=keep))
        with _limits_of_the_trace(traced, dtype):
            found = drawing_alike(functools.partial(run, candidate, args, options))
    folded = any(graph.kept(fold.width, keep) is not None for fold in traced.folds)
    tolerance, reason = max(TOLERANCES[dtype], FOLDED) if folded else TOLERANCES[dtype]
    error = distance(masked, found)
    del candidate, noise
    with _OneType(dtype):
        hidden = unseen(graph, keep, tensors, flat) if error <= tolerance else ()
        reweighted = computed(original, graph, keep, dtype) if error <= tolerance else {}
    return Verification(
        error=error,
        tolerance=tolerance,
        reason=reason,
        power=effect(masked, dense),
        statistics=tuple(sorted(graph.facts.statistics)),
        unseen=hidden,
        reweighted=reweighted,
    )


def _reached(traced: Traced) -> set[str]:
    """Paths of the modules whose tensors the operations read."""
    taken = {node.name for node in traced.program.graph.nodes if node.op == "placeholder" and node.users}
    return {path.rpartition(".")[0] for name, path in traced.slots.items() if name in taken}


def _training_error(
    pruned: nn.Module, original: nn.Module, graph: Graph, what: _Cut, dtype: torch.dtype
) -> float | None:
    """How far a pruned module lies from the masked original in training mode, where nothing is dropped.

    None where not even the original does what the trace says, because it draws which way it goes.
    """
    noise = noise_of(original)
    tensors = _noisy(original, noise, dtype)
    args, options = _inputs(graph, dtype)
    flat = tree_leaves((args, options))
    whole = _Cut(graph.keep({}), (), None)

    def apart(model: nn.Module, cut: _Cut) -> float:
        candidate = _candidate(model, original, graph, cut, noise, dtype).train()
        with _OneType(dtype), _DropsNothing():  # type: ignore[no-untyped-call]
            masked = drawing_alike(lambda: MaskedRun(graph, cut.keep, tensors, training=True).outputs(flat))
            with _limits_of_the_trace(graph.traced, dtype):
                return distance(masked, drawing_alike(functools.partial(run, candidate, args, options)))

    try:
        follows = apart(original, whole) <= TOLERANCES[dtype][0]
    except Exception:  # noqa: BLE001 - whatever an operation of training raises in this type
        return None
    return apart(pruned, what) if follows else None


def _noisy(model: nn.Module, noise: Mapping[int, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters and buffers with their noise."""
    return {
        name: torch.add(_cast(value, dtype), noise[id(value)].to(value.device))
        if id(value) in noise
        else value.detach()
        for name, value in _named(model).items()
    }


def _inputs(graph: Graph, dtype: torch.dtype) -> tuple[Any, Any]:
    """The example inputs in a type; with noise where they tell nothing."""
    both: tuple[Any, Any] = tree_map(lambda v: _cast(v, dtype), (graph.traced.args, graph.traced.options))
    if graph.tracing.decisions != "example":  # other values could lead elsewhere
        both = tree_map(_telling, both)
    return both


def drawing_alike(forward: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """The outputs of a run, whose forward draws the same random numbers each time if it draws the same number."""
    torch.manual_seed(0)
    return forward()


@contextlib.contextmanager
def _limits_of_the_trace(traced: Traced, dtype: torch.dtype) -> Iterator[None]:
    """Let `torch.finfo` return the limits that the trace holds as numbers, where all of it was in one floating type."""
    values = [value for node in traced.program.graph.nodes for value in tree_leaves(node.meta.get("val"))]
    types = {value.dtype for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()}
    own: Any = torch.finfo
    if len(types) == 1:
        traced_type = types.pop()

        def finfo(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map(lambda value: traced_type if value is dtype else value, (args, kwargs))
            return own(*args, **kwargs)

        setattr(torch, "finfo", finfo)  # noqa: B010 - mypy does not allow the assignment
    try:
        yield
    finally:
        setattr(torch, "finfo", own)  # noqa: B010 - likewise


class _OneType(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch annotates neither
    """Everything is computed in one floating type, also where the model's code converts to another."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        options = dict(kwargs or {})
        if isinstance(options.get("dtype"), torch.dtype) and options["dtype"].is_floating_point:
            options["dtype"] = self._dtype
        if not func._schema.is_mutable:  # noqa: SLF001 - the one place that knows
            args, options = tree_map(self._widened, (args, options))
        out = func(*args, **options)
        made = not any(isinstance(value, torch.Tensor) for value in tree_leaves((args, options)))
        return tree_map(self._widened, out) if made else out

    def _widened(self, value: Any) -> Any:
        return _cast(value, self._dtype) if isinstance(value, torch.Tensor) else value


class _DropsNothing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws of zeros and ones are their means, so that dropout keeps everything, in models of any width."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        name = func._schema.name.removeprefix("aten::")  # noqa: SLF001 - as above
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name in ("bernoulli", "bernoulli_"):
            default = 0.5 if name == "bernoulli_" else args[0]  # PyTorch leaves out what equals the default
            mean = args[1] if len(args) > 1 else default
            return (args[0] if name == "bernoulli_" else torch.empty_like(args[0])).copy_(torch.as_tensor(mean))
        return func(*args, **(kwargs or {}))


def _candidate(
    pruned: nn.Module,
    original: nn.Module,
    graph: Graph,
    what: _Cut,
    noise: dict[int, torch.Tensor],
    dtype: torch.dtype,
) -> nn.Module:
    """A copy of the pruned module in inference mode, with its part of the noise."""
    candidate = copy_of(pruned).eval()
    candidate = candidate.double() if dtype is torch.float64 else candidate.float()  # and complex ones stay complex
    mine = _named(candidate)
    done = set()
    with torch.no_grad():
        for name, value in _named(original).items():
            now = what.now(name)
            if now is None:
                continue
            if now not in mine and graph.tracing.as_graph:  # no operation reads it
                continue
            target = mine[now]
            if id(value) in noise and id(target) not in done:
                done.add(id(target))
                target.add_(sliced(noise[id(value)], graph.tensors[name], graph, what.keep).to(target.device))
    return candidate


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _shares_alike(pruned: nn.Module, original: nn.Module, what: _Cut) -> bool:
    """Whether the names of one tensor are still those of one, and names of two those of two."""
    mine = _named(pruned)
    both = {(id(value), id(mine[now])) for name, value in _named(original).items() if (now := what.now(name)) in mine}
    return len(both) == len({one for one, _ in both}) == len({other for _, other in both})


def noise_of(model: nn.Module) -> dict[int, torch.Tensor]:
    """Noise for each floating tensor by identity: a tenth of its size for weights, enough to matter for the rest.

    Numbers only ever grow away from zero, because a variance must stay positive, and so must whatever a model takes the
    logarithm of. Infinite ones (masks) stay so.
    """
    generator = torch.Generator().manual_seed(0)
    out: dict[int, torch.Tensor] = {}
    for name, value in _named(model).items():
        if not value.is_floating_point() or id(value) in out:
            continue
        plain = value.detach().to("cpu", torch.float32)
        noise = torch.randn(value.shape, generator=generator)
        size = float(plain.nan_to_num(posinf=0.0, neginf=0.0).abs().mean()) if value.numel() else 0.0
        noise *= 0.1 * max(size, 1e-2) if value.dim() > 1 else 0.1
        away = torch.ones_like(plain) if name.endswith("running_var") else plain.sign()
        out[id(value)] = torch.where(away == 0, noise, noise.abs_() * away)
    return out


def _telling(value: Any) -> Any:
    """An input, with noise if all its numbers are the same: zeros put out zeros, whatever is cut."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return value
    if bool((value != value.flatten()[0]).any()):
        return value
    noise = 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).abs()
    return value + noise.to(value.device, value.dtype) * torch.where(value < 0, -1, 1)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.detach().to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _without_limits(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor with infinity for numbers at the limits of a type, beside which all others would be nothing."""
    if not value.is_floating_point():
        return value
    limits = value.double().abs() >= LIMIT
    return value if bool(limits.all()) else torch.where(limits, value.sign() * torch.inf, value)


def distance(reference: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest reference value, over all outputs.

    NaN where an output holds NaN, the reference no finite number, or there is nothing to compare. Infinite if shapes
    differ. Of outputs that are no measurements (classes, masks) it is the share that differs.
    """
    pairs = list(zip(reference, found, strict=False))
    if not reference and not found:
        return float("nan")
    if len(reference) != len(found) or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    worst = 0.0
    for a, b in ((_without_limits(a), _without_limits(b)) for a, b in pairs):
        if a.numel():
            if a.is_floating_point() or a.is_complex():
                if not a.isfinite().any():  # infinities alone would differ by nothing
                    return float("nan")
                finite = ~((a == b) & a.isinf())  # equal infinities, as in masked scores, differ by NaN
                apart = float(torch.where(finite, a - b, 0).abs().max())
                apart /= max(float(torch.where(finite, a, 0).abs().max()), 1e-300)
            else:
                apart = float((a != b).double().mean())
            if apart != apart:  # noqa: PLR0124 - NaN
                return float("nan")
            worst = max(worst, apart)
    return worst


def effect(masked: list[torch.Tensor], dense: list[torch.Tensor]) -> float:
    """Largest difference of two runs of equal shapes relative to the larger of their values, over all outputs: 0 to 2.

    Where only one of them is a finite number, they differ by 1; where neither is, not at all.
    """
    worst = 0.0
    for a, b in ((_without_limits(a), _without_limits(b)) for a, b in zip(masked, dense, strict=True)):
        if not a.numel():
            continue
        if not (a.is_floating_point() or a.is_complex()):
            worst = max(worst, float((a != b).double().mean()))
            continue
        finite = a.isfinite() & b.isfinite()
        first, second = (torch.where(finite, value, 0).abs().max() for value in (a, b))
        largest = float(torch.maximum(first, second))
        apart = float(torch.where(finite, a - b, 0).abs().max()) / largest if largest else 0.0
        worst = max(worst, apart, float((a.isfinite() != b.isfinite()).any()))
    return worst
