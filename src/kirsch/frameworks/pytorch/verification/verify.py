"""Verify a cut: compare the outputs of the pruned module with those of the masked original."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from kirsch.errors import VerificationError, error_text
from kirsch.failures import lacks_memory
from kirsch.frameworks.pytorch.analysis.program import user_line
from kirsch.frameworks.pytorch.inference.predict import run
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.modules.read_only import ChangeInPlaceError, ReadOnly, sharing_copy
from kirsch.frameworks.pytorch.verification.candidate import Candidate, Removal
from kirsch.frameworks.pytorch.verification.computed_weights import changed_weight_ratios
from kirsch.frameworks.pytorch.verification.distance import distance, power
from kirsch.frameworks.pytorch.verification.dtypes import OneType, WithoutDropout, cast
from kirsch.frameworks.pytorch.verification.masked import MaskedRun
from kirsch.frameworks.pytorch.verification.noise import (
    ConvertedTensors,
    Noise,
    named_tensors,
    seeded,
    without_constant,
)
from kirsch.frameworks.pytorch.verification.unseen import FAINT, ROUNDED, OriginalRun, run_original
from kirsch.graph.constants import AS_GRAPH
from kirsch.graph.verification import UNUSUAL_LAYERS, Verification

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from kirsch.frameworks.pytorch.analysis.traced import Traced
    from kirsch.graph.graph import Graph

# A wrong index changes an output by a thousandth of its size or more. Rounding changes it by the machine epsilon times
# the length and number of the sums.
TOLERANCES = {
    torch.float64: (1e-9, "rounding in float64; a wrong index changes outputs by 1e-3 or more"),
    torch.float32: (1e-4, "rounding in float32, because the model cannot run in float64"),
}
QUERY_SCALING = (
    1e-6,
    "rounding of weights that contain an attention scale; a wrong index changes outputs by 1e-3",
)

NOISE_FACTORS = (100.0, 30.0, 10.0, 300.0, 1000.0) * 2
"""Factors of the noise for units that have no effect on the outputs, such as units behind a ReLU with negative biases.

The first factor makes noise that is larger than usual biases. A function such as `exp` may need a smaller one. One unit
behind a batch normalization stays inactive for two in five noises of a single sample.
"""
CLEAR = 1e-3
"""Power at which a wrong index changes the outputs clearly; see `Verification.power`."""

WRONG_CUT = "The cut is wrong, so no model was returned; the original is unchanged."
OTHER_BRANCH = (
    "Its `forward` method has a branch that depends on values, and may have taken another branch than in the trace, "
    "so no model was returned."
)


def verify(
    pruned: nn.Module,
    original: nn.Module,
    graph: Graph,
    keep: NDArray[np.bool_],
    without: Collection[str] = (),
    moved: Mapping[str, str] | None = None,
) -> Verification:
    """Compare a pruned module with the masked original, in float64 if the model runs in float64.

    The same noise is added to the parameters of both modules. Biases, scales and branches that are zero would otherwise
    hide a wrong cut. The noise is larger if the removed units have no effect on the outputs otherwise.

    Args:
        pruned, original: the pruned model, and the model that was traced.
        graph: graph of the original.
        keep: mask of the components (sets of coupled labels) that stay, bool of shape (components,).
        without: paths of the dropped blocks.
        moved: path of a module in the original → its path in the pruned model. None if no block was dropped.

    Raises:
        VerificationError: the outputs differ, a tied tensor is no longer tied, or the pruned module cannot be verified.
    """
    if any(parameter.is_meta for parameter in original.parameters()):
        raise VerificationError(
            f"The pruned {graph.model_name} cannot be verified.",
            "It is on the meta device and has no values.",
            "Prune with verify=False, or load the weights of the model first.",
        )
    removal = Removal(keep, without, moved)
    if not _same_ties(pruned, original, removal):  # copies of a tied tensor give equal outputs until they are trained
        raise VerificationError(
            f"The pruned {graph.model_name} does not share the tensors that the original shares.",
            WRONG_CUT,
            "Exclude the layers that share a tensor, and report the model.",
        )
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):  # the models may draw random numbers
        return _verify(pruned, original, graph, removal)


def _verify(pruned: nn.Module, original: nn.Module, graph: Graph, removal: Removal) -> Verification:
    dtype = torch.float64
    try:
        verification = _compare(pruned, original, graph, removal, dtype)
    except Exception as failure:  # the code of the model can raise any exception
        if lacks_memory(failure):
            raise
        dtype = torch.float32
        verification = _compare(pruned, original, graph, removal, dtype)
    if verification.passed and verification.power <= verification.tolerance:
        verification = _compare_activated(pruned, original, graph, removal, dtype) or verification
    if not verification.passed:
        _raise_if_unstable(pruned, graph)
        raise VerificationError(
            f"The pruned {graph.model_name} is {verification.text}.",
            OTHER_BRANCH if graph.tracing.decisions == "example" else WRONG_CUT,
            f"Exclude {UNUSUAL_LAYERS}, and report the model.",
        )
    return _verify_training(verification, pruned, original, graph, removal, dtype)


def _verify_training(
    verification: Verification,
    pruned: nn.Module,
    original: nn.Module,
    graph: Graph,
    removal: Removal,
    dtype: torch.dtype,
) -> Verification:
    """Return the verification with the result of the comparison in training mode, or why there was none.

    Raises:
        VerificationError: the outputs in training mode differ, or only the original runs in training mode.
    """
    compared = graph.traced.training is not None and not graph.tracing.as_graph and not removal.without
    if compared and _equal_in_training(pruned, original, graph, removal, dtype, verification.tolerance):
        # Modules that only run in training mode were compared in this run.
        in_inference = _modules_read(graph.traced)
        return replace(verification, unseen=tuple(path for path in verification.unseen if path in in_inference))
    exception = _training_exception(pruned, graph)
    if exception is not None:
        in_original = _training_exception(original, graph)
        if in_original is not None:
            return replace(
                verification, not_compared=(f"training mode: the original raises {error_text(in_original)}",)
            )
        raise VerificationError(
            f"The pruned {graph.model_name} runs in inference mode only.",
            error_text(exception),
            f"The forward uses a fixed width in training mode ({user_line(exception) or 'in PyTorch'}). Read the width "
            f"from the shape of the tensor, or {AS_GRAPH}.",
        )
    if graph.traced.training is None or graph.tracing.as_graph:
        return verification
    if removal.without:
        why = "the comparison of removed blocks is in inference mode only."
        return replace(verification, not_compared=(f"training mode: {why}",))
    try:
        _check_original_in_training(original, graph, dtype)
        error = _training_error(pruned, original, graph, removal, dtype, verification.tolerance)
    except _OriginalDiffersError as reason:
        return replace(verification, not_compared=(f"training mode: {reason}",))
    raise VerificationError(
        f"The pruned {graph.model_name} in training mode is not equal to the masked original.",
        f"Its outputs in training mode differ by {error:.0e}. {WRONG_CUT}",
        f"Exclude {UNUSUAL_LAYERS}, and report the model.",
    )


def _raise_if_unstable(pruned: nn.Module, graph: Graph) -> None:
    """Raise an error if the model returns NaN or differs from itself in a second run."""
    traced: Traced = graph.traced
    first, second = (run(copy_of(pruned).eval(), traced.args, traced.options) for _ in range(2))
    difference = distance(first, second)
    why = ""
    if math.isnan(difference):
        why = "It returns NaN, or no finite number, for the example inputs."
    elif difference > 0:
        why = "It draws random numbers in inference mode, so that two runs differ."
    if why:
        raise VerificationError(
            f"The pruned {graph.model_name} cannot be verified.",
            why,
            "Fix this in the model, or prune with verify=False. The original is unchanged.",
        )


def _training_exception(model: nn.Module, graph: Graph) -> Exception | None:
    """Return the exception that a model raises in training mode; None if it runs.

    A lack of memory is not such an exception, and is raised.
    """
    traced: Traced = graph.traced
    try:
        try:
            with ReadOnly(list(model.parameters())):
                run(sharing_copy(model).train(), traced.args, traced.options)
        except ChangeInPlaceError:
            run(copy_of(model).train(), traced.args, traced.options)
    except Exception as error:  # the code of the model can raise any exception
        if lacks_memory(error):
            raise
        return error
    return None


def computed_weight_ratios(
    original: nn.Module, graph: Graph, keep: NDArray[np.bool_], dtype: torch.dtype
) -> dict[str, float]:
    """Return the modules whose computed weights change for the kept units; see `changed_weight_ratios`."""
    with OneType(dtype):
        return changed_weight_ratios(graph, keep, ConvertedTensors(original, None, dtype))


def _compare_activated(
    pruned: nn.Module, original: nn.Module, graph: Graph, removal: Removal, dtype: torch.dtype
) -> Verification | None:
    """Compare with noise that is so large that removed units without effect get an effect on the outputs.

    Returns:
        The first comparison in which the effect is clear, or else the one with the largest effect. None if no noise
        gives the removed units an effect, or if the models do not run with the noise, because it makes the argument of
        a logarithm negative, for example.
    """
    if removal.keep.all() and not removal.without:
        return None
    best: Verification | None = None
    # A unit that the noise does not activate is often activated by the noise of the opposite sign.
    for seed, factor in [(seed, sign * factor) for seed, factor in enumerate(NOISE_FACTORS, 1) for sign in (1, -1)]:
        try:
            verification = _compare(pruned, original, graph, removal, dtype, Noise(original, factor, seed))
        except Exception as error:  # the code of the model can raise any exception for such parameters
            if lacks_memory(error):
                raise
            continue
        least = verification.tolerance if best is None else best.power
        if not math.isnan(verification.error) and verification.power > least:
            best = verification
            if best.power > CLEAR:
                break
    return best


def _compare(
    pruned: nn.Module,
    original: nn.Module,
    graph: Graph,
    removal: Removal,
    dtype: torch.dtype,
    noise: Noise | None = None,
) -> Verification:
    keep = removal.keep
    traced: Traced = graph.traced
    noise = Noise(original) if noise is None else noise
    tensors = ConvertedTensors(original, noise, dtype)
    args, options = _inputs(graph, dtype)
    flat = tree_leaves((args, options))
    scaled = any(graph.kept(scaling.width, keep) is not None for scaling in traced.query_scalings)
    tolerance, reason = max(TOLERANCES[dtype], QUERY_SCALING) if scaled else TOLERANCES[dtype]
    with OneType(dtype):
        masked = seeded(lambda: MaskedRun(graph, keep, tensors, removal.without).outputs(flat))
    error = Candidate(pruned, original, graph, removal, noise, dtype).distance(masked, args, options, tolerance)
    equal = error <= tolerance
    dense = _run_original(original, graph, keep, noise, dtype, masked, gradients=equal)
    return Verification(
        error=error,
        tolerance=tolerance,
        reason=reason,
        power=power(masked, dense.outputs),
        statistics=tuple(sorted(graph.facts.statistics)),
        unseen=dense.unseen,
        reweighted=computed_weight_ratios(original, graph, keep, dtype) if equal else {},
        undetermined=dense.undetermined,
    )


def _run_original(
    original: nn.Module,
    graph: Graph,
    keep: NDArray[np.bool_],
    noise: Noise,
    dtype: torch.dtype,
    masked: list[torch.Tensor],
    *,
    gradients: bool,
) -> OriginalRun:
    """Return the outputs of the original, and the modules without effect on them.

    A run in float32 takes half the memory and much less time. Its effects are those of some rows of the weights. It
    decides if it shows an effect of each module, because one unit with an effect is sufficient, and no effect is so
    small that it may be a rounding error. Otherwise, a run in the dtype of the comparison computes all effects.
    """
    for trial, sampled in ((torch.float32, True), (dtype, False)):
        args, options = _inputs(graph, trial)
        tensors = ConvertedTensors(original, noise, trial, read_only=True)
        faint = (ROUNDED if sampled else FAINT) if gradients else None
        with OneType(trial):
            found = run_original(graph, keep, tensors, tree_leaves((args, options)), faint, sampled=sampled)
        if not found.unseen and not found.undetermined and power(masked, found.outputs) > CLEAR:
            break
    return found


def _modules_read(traced: Traced) -> set[str]:
    """Return the paths of the modules with a parameter or buffer that an operation of the trace reads."""
    used = {node.name for node in traced.program.graph.nodes if node.op == "placeholder" and node.users}
    return {path.rpartition(".")[0] for name, path in traced.slots.items() if name in used}


class _OriginalDiffersError(Exception):
    """The original cannot be compared with its own trace in training mode; the message is the reason."""


def _equal_in_training(
    pruned: nn.Module, original: nn.Module, graph: Graph, removal: Removal, dtype: torch.dtype, tolerance: float
) -> bool:
    """Return whether the pruned model runs in training mode and equals the masked original."""
    try:
        return _training_error(pruned, original, graph, removal, dtype, tolerance) <= tolerance
    except Exception as failure:  # the code of the model, or an operation that does not support the dtype
        if lacks_memory(failure):
            raise
        return False


def _training_error(
    pruned: nn.Module, original: nn.Module, graph: Graph, removal: Removal, dtype: torch.dtype, tolerance: float
) -> float:
    """Return the distance of the pruned module from the masked original in training mode, without dropout."""
    noise = Noise(original)
    args, options = _inputs(graph, dtype)
    run_of_trace = MaskedRun(graph, removal.keep, ConvertedTensors(original, noise, dtype), training=True)
    with OneType(dtype), WithoutDropout():  # type: ignore[no-untyped-call]
        masked = seeded(lambda: run_of_trace.outputs(tree_leaves((args, options))))
    candidate = Candidate(pruned, original, graph, removal, noise, dtype, training=True)
    return candidate.distance(masked, args, options, tolerance)


def _check_original_in_training(original: nn.Module, graph: Graph, dtype: torch.dtype) -> None:
    """Check that the original in training mode equals its own trace.

    Raises:
        _OriginalDiffersError: the original does not run in this dtype, or differs from its own trace because it
            chooses branches at random.
    """
    tolerance = TOLERANCES[dtype][0]
    try:
        difference = _training_error(original, original, graph, Removal(graph.keep({})), dtype, tolerance)
    except Exception as failure:  # an operation that does not support the dtype may raise any class of error
        if lacks_memory(failure):
            raise
        name = str(dtype).removeprefix("torch.")
        raise _OriginalDiffersError(f"the original does not run in {name}: {error_text(failure)}") from failure
    if not difference <= tolerance:
        raise _OriginalDiffersError(f"the original differs by {difference:.0e} from its own trace.")


def _inputs(graph: Graph, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the example inputs in a dtype, with noise added to inputs whose entries are all equal."""
    both: tuple[Any, Any] = tree_map(lambda v: cast(v, dtype), (graph.traced.args, graph.traced.options))
    if graph.tracing.decisions != "example":  # other values could take another branch
        both = tree_map(without_constant, both)
    return both


def _same_ties(pruned: nn.Module, original: nn.Module, removal: Removal) -> bool:
    """Return whether the same names share a tensor in the pruned model and in the original."""
    tensors = named_tensors(pruned)
    pairs = {
        (id(value), id(tensors[new_name]))
        for name, value in named_tensors(original).items()
        if (new_name := removal.new_name(name)) in tensors
    }
    return len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})
