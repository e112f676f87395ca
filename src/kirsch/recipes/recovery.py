"""Objective of the training after pruning: the features of the original model in the kept channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.arguments import checked
from kirsch.data.annotations import Inputs, Model
from kirsch.data.arrays import host
from kirsch.distillation.further_outputs import squared_difference_loss, with_further_outputs
from kirsch.distillation.matching import stages_among
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import NumericError, UnknownNameError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.pruning.kept import kept_output_channels

if TYPE_CHECKING:
    from kirsch.frameworks.protocols import Features
    from kirsch.pruning.kept import Kept


@checked
def recovery(
    small: Model,
    original: Model,
    inputs: Inputs,
    *,
    at: str | Sequence[str] | None = None,
    weight: float = 1.0,
    objective: Objective | None = None,
) -> Objective:
    """Return an objective for training a pruned model with the original model as its teacher.

    The objective adds one term for each layer: the mean squared difference between the features of the pruned model and
    the kept channels of the original's features. This difference is divided by the mean square of the original's
    features on `inputs`, so that 0.1 means ten percent in every layer. The objective contains the kept channels and
    these divisors, and can be written as JSON.

    Without the argument `objective`, the result also has a term for each output of the model besides the logits. The
    term compares this output with that of the original; see `kirsch.distillation.further_outputs.output_terms`.

    Args:
        small: pruned model from `kirsch.prune` or `kirsch.load`, pruned once or several times.
        original: model before pruning; the teacher.
        inputs: inputs of one batch.
        at: layers to compare: a module path, a pattern such as "layer*", or a list of these. By default the stages of
            the network: the last feature map of each resolution, or each layer of tokens.
        weight: total weight of all layers, > 0, divided equally among them.
        objective: objective to extend; by default `Objective.kd()` with the terms for further outputs.

    Raises:
        UsageError: the model was not pruned by Kirsch, lost whole blocks or has no stages, or the weight is not > 0.
        UnknownNameError: the kept channels of a layer are not known.
        PlanError: the original is not the model that was pruned.
        NumericError: the original's features are all zero, or not finite, in a layer.

    Source: features of the original as the target after pruning: He et al. 2017, arXiv:1707.06168, equation 1, here by
        gradient descent and in all layers at once; combined with soft targets as in Muralidharan et al. 2024,
        arXiv:2407.14679.
    """
    if not weight > 0:
        raise UsageError(
            f"`weight` of kirsch.recovery is {weight}; expected a number above 0.", fix="For example, give weight=1.0."
        )
    extractor = framework_of(small).features
    objective = objective or with_further_outputs(Objective.kd(), extractor, small, original, inputs)
    known = _comparable_layers(extractor, small, original, inputs)
    layers = _selected_layers(extractor, original, inputs, at, known)
    features = extractor.extract(original, layers, inputs)
    terms = tuple(_term(layer, known[layer][0], host(features[layer]), weight / len(layers)) for layer in layers)
    return dataclasses.replace(objective, terms=(*objective.terms, *terms))


def _comparable_layers(
    features: Features, small: Any, original: Any, inputs: Any
) -> dict[str, tuple[Kept, tuple[int, ...]]]:
    """Return kept channels and original shape of each module that both models have, by path, in order of execution."""
    kept_channels, small_shapes = (
        kept_output_channels(small, original, example_inputs=inputs),
        dict(features.shapes(small, inputs)),
    )
    layers = {}
    for path, shape in features.shapes(original, inputs):
        if path not in kept_channels or path not in small_shapes:
            continue
        channels = kept_channels[path]
        expected = [len(channels.indices) if axis == channels.axis else size for axis, size in enumerate(shape)]
        if expected == list(small_shapes[path]):
            layers[path] = channels, shape
    return layers


def _selected_layers(
    features: Features, original: Any, inputs: Any, at: Any, known: dict[str, tuple[Kept, tuple[int, ...]]]
) -> list[str]:
    """Return the paths of the layers to compare."""
    model_name = type(original).__name__
    if at is None:
        shapes = [(path, shape) for path, (_, shape) in known.items()]
        return [path for path, _ in stages_among(shapes, ops.first_array(inputs).shape, model_name)]
    texts = [at] if isinstance(at, str) else list(at)
    paths = [path for text in texts for path in features.expand(original, text, inputs)]
    for path in paths:
        if path not in known:
            raise UnknownNameError(f"layer of {model_name} with known kept channels named", path, known)
    if not paths:
        raise UsageError("`at` of kirsch.recovery names no layers.", fix='Give a layer or pattern: at="layer*".')
    return list(dict.fromkeys(paths))


def _term(path: str, channels: Kept, features: Any, weight: float) -> Term:
    """Return the term of one layer, from the features of the original."""
    target = features if channels.axis is None else np.take(features, channels.indices, channels.axis)
    mean_square = float((target.astype(np.float64) ** 2).mean())
    if not (np.isfinite(mean_square) and mean_square > 0):
        raise NumericError(
            f"The original's features at `{path}` have the mean square {mean_square:g} on these inputs.",
            "The term of this layer is divided by this number.",
            "Give other inputs, or leave the layer out of `at`.",
        )
    options: dict[str, Any] = {}
    if channels.axis is not None:
        options = {"indices": list(channels.indices), "axis": channels.axis}
    return Term(
        loss=squared_difference_loss(target.ndim),
        weight=float(f"{weight / mean_square:.6g}"),
        student_layer=path,
        adapter="kept" if options else "none",
        adapter_options=options,
        name=f"kept.{path}",
    )
