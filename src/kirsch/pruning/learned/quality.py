"""Quality of pruned models during a search: minus the loss on calibration data, or a function of the user."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kirsch import ops
from kirsch.data.arrays import host
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of
from kirsch.pruning.importance.activations import labels_in
from kirsch.pruning.importance.calibration import CalibrationBatches, check_reusable, loss_of, no_labels
from kirsch.pruning.importance.padding import only_padding, refuse_padding
from kirsch.pruning.importance.statistics import calibration_of
from kirsch.tasks.padding import counted_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.data.batches import Batch
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Goal, Plan
    from kirsch.pruning.importance.calibration import Loss
    from kirsch.pruning.options import PlanOptions

    QualityFunction = Callable[[Any], float]
    """Function of a pruned model that returns a number, larger for better models. It may train the model."""


@dataclass(frozen=True)
class SearchQuality:
    """Quality of pruned models during a search.

    Args:
        of_model: function of a pruned model.
        words: description of the quality, for the note of the plan.
    """

    of_model: QualityFunction
    words: str

    def of_plan(self, graph: Graph, plan: Plan, seed: int) -> float:
        """Return the quality of the model that a plan gives, without verification; the model itself is not changed.

        Args:
            graph: graph of the model.
            plan: the plan.
            seed: random seed of the function, which may train the model. The caller's random state is not changed.

        Raises:
            UsageError: the function of the user does not return a number.
        """
        framework = framework_of(graph.model)
        pruned, _ = framework.surgery.prune(graph.model, plan, graph, verify=False)
        found = framework.training.seeded(lambda: self.of_model(pruned), seed)
        try:
            return float(found)
        except (TypeError, ValueError):
            raise UsageError(
                f"`quality` of kirsch.plan returns {found!r:.80}.",
                fix="Return a number, larger for better models, such as the accuracy.",
            ) from None


def check_search(goal: Goal | None, options: PlanOptions, quality: QualityFunction | None) -> None:
    """Raise a UsageError for a learned ranking without goal, or a quality without learned ranking."""
    if goal is None and options.max_drop is None and options.is_learned:
        raise UsageError(
            f'ranking="{options.ranking}" has no effect without a goal.',
            "It searches for the widths with which the model meets a goal.",
            "Give a goal, kirsch.Goal(macs=0.5), or remove `ranking`.",
        )
    if quality is not None and not options.is_learned:
        raise UsageError(
            f'`quality` has no effect with ranking="{options.ranking}".',
            fix='Remove `quality`, or give ranking="legr".',
        )


def quality_of(graph: Graph, ranking: str, data: Any, loss: Any, given: QualityFunction | None) -> SearchQuality:
    """Return the quality that a learned ranking maximizes.

    Args:
        graph: graph of the model.
        ranking: name of the ranking, for messages.
        data: calibration batches. They are read once and kept, so that all models are compared on the same samples.
        loss: name of a loss or a function, for batches with labels. Without labels, the quality is minus the KL
            divergence from the outputs of the original.
        given: function of the user that returns the quality; data and loss are then not used.

    Raises:
        UsageError: data is missing, the outputs without labels are single numbers, or the graph has no model.
        DataError: the data has no batches.
    """
    calibration_of(graph)  # refuses a graph without a model
    if given is not None:
        return SearchQuality(given, "result of the given function `quality`")
    if data is None:
        raise UsageError(
            f'`data` of kirsch.plan is missing: ranking="{ranking}" runs pruned models.',
            fix="Give calibration batches of (inputs, labels), 256 samples or more; or `quality`, a function of a "
            "pruned model. On the command line, give --data SOURCE.",
        )
    check_reusable(data)
    reader = f'ranking="{ranking}"'
    batches = list(CalibrationBatches(graph.model, data, "inputs", reader, loss))
    if all(batch.targets is not None for batch in batches):
        batches = list(CalibrationBatches(graph.model, batches, "labels", reader, loss))
        name = loss if isinstance(loss, str) else "given loss"
        of_model, words = _minus_mean_loss(batches, loss_of(loss), labels_in), f"minus the {name}"
    else:
        of_model = _minus_mean_loss(_with_outputs(graph, batches), _divergence, _positions)
        words = "minus the KL divergence from the outputs of the original"
    statistics = framework_of(graph.model).surgery.batch_norms(graph.model)
    if statistics:
        for batch in batches:
            refuse_padding(batch, "give `quality`, a function of a pruned model")
    with_statistics = ", with batch-norm statistics of these samples" if statistics else ""
    return SearchQuality(of_model, f"{words} on {sum(map(len, batches)):,} samples{with_statistics}")


def _minus_mean_loss(batches: Sequence[Batch], loss: Loss, weight: Callable[[Batch], int]) -> QualityFunction:
    """Return the function that returns minus the mean of a loss over the batches.

    The statistics of batch normalization are estimated on the batches first. With those of the original, the loss of a
    model that has lost many units is near chance and says nothing on its accuracy after training (Li et al. 2020,
    arXiv:2007.02491, section 3).
    """
    weights = [weight(batch) for batch in batches]
    if not sum(weights):
        raise only_padding() if weight is _positions else no_labels()

    def quality(model: Any) -> float:
        framework = framework_of(model)
        inference, surgery = framework.inference, framework.surgery
        if surgery.batch_norms(model):
            surgery.estimate_batch_norms(model, ((len(batch), batch.inputs) for batch in batches))
        model, total = inference.inference_mode(model), 0.0
        for batch, count in zip(batches, weights, strict=True):
            if count:
                moved = inference.to_device(batch, model)
                total += count * float(loss(inference.infer(model, moved.inputs), moved.targets))
        return -total / sum(weights)

    return quality


def _with_outputs(graph: Graph, batches: Sequence[Batch]) -> list[Batch]:
    """Return the batches with the logits of the original, and which positions are not padding, as targets."""
    inference = framework_of(graph.model).inference
    model = inference.frozen_copy(graph.model, graph.model)
    found = []
    for batch in batches:
        inputs = inference.to_device(batch, model).inputs
        logits = host(inference.infer(model, inputs))
        if logits.shape[-1] == 1:
            raise UsageError(
                "`data` of kirsch.plan has no labels, and the model returns one number for each sample.",
                "Without labels, pruned models are compared with the original by their probabilities of classes.",
                "Give batches of (inputs, labels), or `quality`, a function of a pruned model.",
            )
        found.append(replace(batch, targets={"logits": logits, "mask": counted_tokens(batch.inputs, logits.shape)}))
    return found


def _positions(batch: Batch) -> int:
    """Return the number of positions of a batch of `_with_outputs` that are not padding."""
    logits, mask = batch.targets["logits"], batch.targets["mask"]
    return int(ops.classes_last(logits)[..., 0].size if mask is None else mask.sum())


def _divergence(logits: Any, targets: Any) -> Any:
    """Return the KL divergence from the original's to the pruned model's probabilities, the mean over the positions."""
    original, pruned = (ops.log_softmax(ops.classes_last(ops.upcast(values))) for values in (targets["logits"], logits))
    return ops.masked_mean(ops.sum(ops.kl_terms(original, pruned), axis=-1), targets["mask"])
