"""What a pruned model learns when it recovers: the scores of the original, and its channels that are left."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.arguments import checked
from kirsch.distillation.arrays import first_array
from kirsch.distillation.matching import stages_among
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import NumericError, UnknownNameError, UsageError
from kirsch.frameworks.annotations import Inputs, Model
from kirsch.frameworks.port import framework_of, host
from kirsch.pruning.kept import kept

if TYPE_CHECKING:
    from kirsch.frameworks.port import Framework
    from kirsch.pruning.kept import Kept

TOKENS = len("NLD")


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
    """An objective by which a pruned model comes near to its original again, which is its teacher in `kirsch.distill`.

    To the terms of another objective it adds one for each place: the mean squared difference between what the pruned
    model puts out there and what the original puts out in the same channels. It is divided by the mean square of the
    latter on the inputs given, so that 0.1 says ten percent wherever it is. Which channels were kept, and these
    numbers, stand in the objective, which can be told in JSON.

    Args:
        small: of `kirsch.prune` or `kirsch.load`, pruned once or several times.
        original: the model that it was made of; it is the teacher.
        inputs: some samples, as a batch has them.
        at: places: a path of modules, or a pattern such as "layer*", or several. By default the stages of the network:
            the last maps of each size, or each layer of tokens.
        weight: > 0; of all places together, which count alike.
        objective: what is learned beside; `Objective.kd()` if left out.

    Raises:
        UsageError: the model was not pruned by Kirsch, lost whole blocks, has no stages, or the weight is not above 0.
        UnknownNameError: at a place it is not known which channels were kept.
        PlanError: the original is another model than the one that was pruned.
        NumericError: the original puts out nothing but zeros, or no finite numbers, at a place.

    Source: the maps of the original as the target of what pruning left: He et al. 2017, arXiv:1707.06168, equation 1,
        here by gradient and at all places at once; beside soft targets as Muralidharan et al. 2024, arXiv:2407.14679.
    """
    if not weight > 0:
        raise UsageError(f"The weight of the places is {weight}; a number above 0 is needed.")
    objective = objective or Objective.kd()
    framework = framework_of(small)
    known = _known(framework, small, original, inputs)
    places = _chosen(framework, original, inputs, at, known)
    values = framework.dry_run(original, places, inputs)
    terms = tuple(_term(place, known[place][0], host(values[place]), weight / len(places)) for place in places)
    return dataclasses.replace(objective, terms=(*objective.terms, *terms))


def _known(framework: Framework, small: Any, original: Any, inputs: Any) -> dict[str, tuple[Kept, tuple[int, ...]]]:
    """Path → what is kept there, and the shape in the original, of modules of both, in the order in which they end."""
    left, own = kept(small, original, example_inputs=inputs), dict(framework.shapes(small, inputs))
    found = {}
    for path, shape in framework.shapes(original, inputs):
        if path not in left or path not in own:
            continue
        place = left[path]
        wanted = [len(place.indices) if axis == place.axis else size for axis, size in enumerate(shape)]
        if wanted == list(own[path]):
            found[path] = place, shape
    return found


def _chosen(
    framework: Framework, original: Any, inputs: Any, at: Any, known: dict[str, tuple[Kept, tuple[int, ...]]]
) -> list[str]:
    """The places that are compared."""
    called = type(original).__name__
    if at is None:
        shapes = [(path, shape) for path, (_, shape) in known.items()]
        return [path for path, _ in stages_among(shapes, first_array(inputs).shape, called)]
    texts = [at] if isinstance(at, str) else list(at)
    paths = [path for text in texts for path in framework.expand(original, text, inputs)]
    for path in paths:
        if path not in known:
            raise UnknownNameError(f"place in {called} whose kept channels are known", path, known)
    if not paths:
        raise UsageError("There are no places to compare.", fix='Name some: at="layer*".')
    return list(dict.fromkeys(paths))


def _term(path: str, place: Kept, values: Any, weight: float) -> Term:
    """The term of one place, from what the original puts out there."""
    seen = values if place.axis is None else np.take(values, place.indices, place.axis)
    size = float((seen.astype(np.float64) ** 2).mean())
    if not (np.isfinite(size) and size > 0):
        raise NumericError(
            f"What the original puts out at `{path}` has the mean square {size:g} on these inputs.",
            "There is nothing to come near to.",
            "Give other inputs, or leave the place out.",
        )
    options: dict[str, Any] = {}
    if place.axis is not None:
        options = {"indices": list(place.indices), "axis": place.axis}
    return Term(
        loss="hidden-mse" if len(seen.shape) == TOKENS else "fitnet",
        weight=float(f"{weight / size:.6g}"),
        student=path,
        adapter="kept" if options else "none",
        adapter_options=options,
        name=f"kept.{path}",
    )
