"""Zeros in the weights of a model, held by masks while the model is trained, and folded at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.annotations import Names, Seed
from kirsch.arguments import checked
from kirsch.data.annotations import Calibration, Model
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of
from kirsch.pruning.selection import matches, unknown_layer
from kirsch.pruning.sparsity.choice import Chooser
from kirsch.pruning.sparsity.file_size import MOST_VALUES, FileSize, file_size
from kirsch.pruning.sparsity.matrix import matrix_shape
from kirsch.pruning.sparsity.options import SAME, Sparsity, SparsityOptions, ZeroImportance, ZeroRanking
from kirsch.pruning.sparsity.pattern import UNSTRUCTURED
from kirsch.pruning.sparsity.runtimes import runtime_notes
from kirsch.pruning.sparsity.sparsified import SparseLayer, Sparsified

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from kirsch.frameworks.masking import WeightMatrix

EXCLUDED = "excluded by `exclude`"

LISTED = 3
"""Number of layers that an error or a note names."""


@checked
def sparsify(
    model: Model,
    *,
    sparsity: Sparsity | None = None,
    pattern: str = UNSTRUCTURED,
    importance: ZeroImportance = "magnitude",
    ranking: ZeroRanking | None = None,
    data: Calibration | None = None,
    exclude: Names = (),
    seed: Seed = 0,
) -> Sparsified:
    """Return a copy of the model whose weights are partly zero, and stay zero while it is trained.

    Shapes do not change, so the result is faster only on runtimes that support the pattern; the notes of the record
    name them. Weights of linear layers, convolutions, recurrent layers and attention are masked. Embeddings, biases,
    normalizations, and parameters whose role is not known are kept dense; the record lists them. The first and the last
    layer are masked like the others, unless they are smaller than the pattern: give them to `exclude` if they are
    sensitive.

    If the model has masks already, they grow: `sparsity` counts all masked weights. `kirsch.fit`, `kirsch.distill` and
    any other training keep the masks, and `kirsch.fold_masks` makes them permanent. `kirsch.export` and
    `kirsch.measure` fold a copy by themselves.

    Args:
        model: trained model; it is not changed.
        sparsity: fraction of zeros in the weights that may be masked, at least 0 and below 1. A pattern N:M states it.
        pattern: "unstructured"; "N:M", such as "2:4": at most N of M consecutive inputs of an output are not zero (for
            a convolution, at each position of the kernel); or "RxC", such as "1x4" or "16x1": blocks of R outputs and C
            inputs are zero together. A layer that is smaller than the pattern is kept dense.
        importance: score of a weight. "magnitude": |w|. "wanda": |w| times the norm of its input. "sparsegpt": the
            increase of the squared error of the layer's output, when the later weights of the row are updated to
            compensate; the kept weights change. The inputs are those in the model whose earlier blocks are sparse
            already, and the data is read once for each block. "random": a baseline. The score of a block is the mean
            over its weights.
        ranking: "global": the weights with the lowest scores of all layers become zero. "local": each layer has the
            same sparsity, with "wanda" each output. None: "global" for "magnitude" and "random", else "local".
        data: calibration data for "wanda" and "sparsegpt": a loader, `ArrayData`, a list of batches, or one batch;
            labels are ignored, and so is padding. About 128 to 256 samples suffice.
        exclude: one or several paths of layers, names of weights, or globs ("layer4.*") whose weights are not masked.
        seed: seed of "random".

    Returns:
        A `Sparsified`: the model, a table of its layers, the parameters that are kept, and notes.

    Raises:
        UsageError: options contradict each other, data is missing or has no effect, a pattern does not divide a layer,
            no weight is left to mask, or the model has more zeros already.
        UnknownNameError: a name in `exclude` is unknown.
        NumericError: weights or activations are NaN or infinite.
        ModelError: the weights of the model cannot be masked, for example because it is quantized.

    Source: magnitude: Han et al. 2015, arXiv:1506.02626; wanda: Sun et al. 2024, arXiv:2306.11695; sparsegpt: Frantar,
        Alistarh 2023, arXiv:2301.00774.
    """
    options = SparsityOptions(
        sparsity=sparsity, pattern=pattern, importance=importance, ranking=ranking, exclude=exclude, seed=seed
    )
    _check_data(options, data)
    masking = framework_of(model).masking
    weights, kept = _selected(masking.weight_matrices(model), options)
    masks = masking.masks(model)
    _check_growth(weights, masks, options.fraction)
    copy = masking.fold(model)  # without masks, because the importances run the plain model
    before = file_size(copy, masking.weight_matrices(copy)) if _parameters(copy) <= MOST_VALUES else None
    unused = _apply(copy, copy, weights, masks, masking.patterns(model), options, data)
    return _record(copy, kept | unused, options, data, before)


@checked
def fold_masks(model: Model) -> Any:
    """Return a copy of a model without masks, whose masked weights are zero; its layers are ordinary ones again.

    Args:
        model: a model of `kirsch.sparsify`, trained or not; a model without masks is copied.
    """
    return framework_of(model).masking.fold(model)


def _check_data(options: SparsityOptions, data: Any) -> None:
    if options.needs_inputs and data is None:
        raise UsageError(
            f"`data` of kirsch.sparsify is missing: the importance {options.importance!r} runs the model.",
            fix="Give calibration batches of inputs: a DataLoader, kirsch.ArrayData or a list; 256 samples suffice.",
        )
    if not options.needs_inputs and data is not None:
        raise UsageError(
            "`data` of kirsch.sparsify has no effect.",
            f"The importance {options.importance!r} is computed without it.",
            "Remove `data`, or use the importance 'wanda' or 'sparsegpt'.",
        )
    if isinstance(data, Iterator):
        raise UsageError(
            f"`data` of kirsch.sparsify is a {type(data).__name__}, which can be iterated over only once.",
            fix="Give a DataLoader, or a list: list(data).",
        )


def _selected(matrices: Sequence[WeightMatrix], options: SparsityOptions) -> tuple[list[WeightMatrix], dict[str, str]]:
    """Return the weights to mask, and the reason for each parameter that is kept dense.

    Raises:
        UsageError: a pattern does not divide a layer, or no weight is left.
    """
    names = {weight.name: (weight.name, *weight.tied) for weight in matrices}
    for pattern in options.exclude:
        if not any(matches(name, pattern) for each in names.values() for name in each):
            known = {name.rpartition(".")[0] for each in names.values() for name in each} - {""}
            raise unknown_layer(pattern, known, "exclude")
    form, weights, kept = options.form, [], {}
    undivided: list[tuple[WeightMatrix, str]] = []
    for weight in matrices:
        excluded = any(matches(name, pattern) for name in names[weight.name] for pattern in options.exclude)
        if weight.kept or excluded:
            kept[weight.name] = weight.kept or EXCLUDED
        elif form.too_large(matrix_shape(weight)):
            kept[weight.name] = f"its layer {form.too_large(matrix_shape(weight))}"
        elif form.remainder(matrix_shape(weight)):
            undivided.append((weight, form.remainder(matrix_shape(weight))))
        else:
            weights.append(weight)
    if undivided:
        listed = figures.listed([f"`{weight.name}` ({why})" for weight, why in undivided], LISTED)
        layers = [weight.layer or weight.name for weight, _ in undivided]
        raise UsageError(
            f'`pattern` "{options.pattern}" does not divide {figures.counted(len(undivided), "weight")}: {listed}.',
            fix=f"Keep these layers dense, exclude={[*options.exclude, *dict.fromkeys(layers)]!r}, or give another "
            "pattern.",
        )
    if not weights:
        reasons = figures.listed([f"`{name}`: {reason}" for name, reason in kept.items()], LISTED, "; ")
        raise UsageError(
            "The model has no weights to mask.", f"All are kept dense: {reasons}.", "Exclude fewer layers."
        )
    return weights, kept


def _check_growth(weights: Sequence[WeightMatrix], masks: Mapping[str, NDArray[np.bool_]], fraction: float) -> None:
    """Refuse a sparsity that is lower than that of the masks that a model has."""
    zeros = sum(int((~masks[weight.name]).sum()) for weight in weights if weight.name in masks)
    total = sum(weight.size for weight in weights)
    # Each row or layer rounds its number of zeros, so that a mask can have slightly more zeros than asked for.
    slack = SAME + sum(0.5 * math.prod(matrix_shape(weight)[:2]) for weight in weights) / total
    if zeros / total > fraction + slack:
        raise UsageError(
            f"`sparsity` is {fraction:.4g}, and {zeros / total:.4g} of the weights are masked already.",
            "Masks only grow, so that a weight that was removed is not trained again.",
            "Give a higher sparsity, or the model before it was masked.",
        )


def _apply(
    plain: Any,
    target: Any,
    weights: Sequence[WeightMatrix],
    masks: Mapping[str, NDArray[np.bool_]],
    patterns: Mapping[str, str],
    options: SparsityOptions,
    data: Any,
) -> dict[str, str]:
    """Choose the zeros from a plain model, and set the masks of `target`; return the reasons for what is kept.

    `masks` and `patterns` are those that the model had before, by name.
    """
    choice = Chooser(plain, weights, masks, options, data).choose()
    masking = framework_of(target).masking
    masking.hold(target, {**masks, **choice.masks}, choice.values)
    masking.set_patterns(target, {**patterns, **dict.fromkeys(choice.masks, options.pattern)})
    return {weight.name: "its layer does not run on the calibration data" for weight in choice.unused}


def _record(
    model: Any, kept: Mapping[str, str], options: SparsityOptions, data: Any, before: FileSize | None
) -> Sparsified:
    """Return the record of a model with masks."""
    masking = framework_of(model).masking
    matrices = {weight.name: weight for weight in masking.weight_matrices(model)}
    patterns = masking.patterns(model)
    layers = []
    for name, mask in masking.masks(model).items():
        matrix, pattern = matrices[name], patterns[name] or UNSTRUCTURED
        layers.append(SparseLayer(name, matrix.kind, matrix.shape, int((~mask).sum()), mask.size, pattern))
    empty = [f"`{layer.name}`" for layer in layers if layer.zeros == layer.size]
    notes = [f"No weight is left in {figures.listed(empty)}, so that the output is constant there."] if empty else []

    def raise_to(record: Sparsified, sparsity: float) -> Sparsified:
        new = _raised_options(record.options, sparsity)
        weights, still = _selected(masking.weight_matrices(record.model), new)
        masks = masking.masks(record.model)
        _check_growth(weights, masks, new.fraction)
        plain = masking.fold(record.model) if new.needs_inputs else record.model
        unused = _apply(plain, record.model, weights, masks, masking.patterns(record.model), new, data)
        return _record(record.model, still | unused, new, data, record.before)

    return Sparsified(
        model,
        tuple(layers),
        kept,
        sum(weight.size for weight in matrices.values()),
        options,
        (*notes, *runtime_notes(options.form)),
        before,
        raise_to,
    )


def _raised_options(options: SparsityOptions, sparsity: float) -> SparsityOptions:
    if options.form.is_ratio:
        raise UsageError(
            f'The sparsity of the pattern "{options.pattern}" cannot be raised.',
            "The pattern states it.",
            "Call kirsch.sparsify with a pattern that has more zeros.",
        )
    return options.changed(sparsity=sparsity)


def _parameters(model: Any) -> int:
    return sum(weight.size for weight in framework_of(model).masking.weight_matrices(model))
