"""Choice of the units to remove, so that the cost of the model meets a goal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.annotations import Count, MaxDrop, Names, Seed
from kirsch.arguments import checked
from kirsch.data.annotations import Calibration
from kirsch.errors import GoalError, UnknownNameError, UsageError, listing
from kirsch.frameworks.find import framework_of
from kirsch.graph.cost_names import WORDS
from kirsch.graph.graph import Graph
from kirsch.graph.plan import Goal, Plan
from kirsch.pruning.blocks import BLOCK_IMPORTANCES, BlockScores, least_cost_of_blocks, plan_blocks
from kirsch.pruning.importance import IMPORTANCES, importance_of
from kirsch.pruning.learned.quality import check_search, quality_of
from kirsch.pruning.loadable_plan import is_loadable, least_loadable, plan_function
from kirsch.pruning.max_drop import DropSearch, check_validation, minimized_cost
from kirsch.pruning.options import (
    ClassWeights,
    Keep,
    Kinds,
    Minimize,
    MinKeep,
    Norm,
    PlanOptions,
    Ranking,
    RoundTo,
)
from kirsch.pruning.quality import Quality
from kirsch.pruning.scores import scores_of
from kirsch.pruning.units import least_units, plan_units
from kirsch.tasks.metrics import GIVEN

if TYPE_CHECKING:
    from kirsch.graph.cost import Cost


@checked
def plan(
    graph: Graph,
    goal: Goal | None = None,
    *,
    data: Calibration | None = None,
    importance: str | Callable[..., Any] | Mapping[str, Any] | None = None,
    loss: str | Callable[..., Any] = "cross-entropy",
    norm: Norm = 2,
    ranking: Ranking = "auto",
    round_to: RoundTo = "auto",
    kinds: Kinds = None,
    uniform: bool = False,
    loadable: bool | None = None,
    min_keep: MinKeep = 0.1,
    keep: Keep = None,
    max_drop: MaxDrop | None = None,
    validation: Calibration | None = None,
    metric: str | Callable[..., Any] | None = None,
    class_weights: ClassWeights = None,
    minimize: Minimize = None,
    exclude: Names = (),
    keep_outputs: Names = (),
    seed: Seed = 0,
    evaluations: Count = 200,
    quality: Callable[[Any], float] | None = None,
    progress: bool | None = None,
) -> Plan:
    """Return the units to remove from a traced model, so that its cost is at most the goal, and close to the goal.

    The outputs of the model keep their sizes in every plan, so the last layer need not be excluded.

    Args:
        graph: result of `kirsch.trace`.
        goal: fractions of the original cost. None: `max_drop` determines the cost, or only the units that `keep` names
            are removed. If the model already meets a goal that is a fraction of an earlier model (`Goal.of`), the plan
            removes nothing.
        data: calibration batches for importances that run the model, such as a DataLoader, `ArrayData`, or a list of
            (inputs, labels); about 256 samples suffice. ranking="milp" needs inputs for any importance, and so does
            kinds="block". Several inputs are a dict by name, or a tuple: ((first, second), labels).
        importance: name of the importance that ranks the units. From the weights: "magnitude" (the default), "lamp",
            "fpgm", "bn_scale", "random". From inputs: "activation", "apoz", "wanda", "flap", "thinet". From inputs and
            labels: "taylor", "fisher", "taylor_weights", "snip", "grasp", "hessian", "leave_one_out". Or a function
            (graph, group) → scores of the units, or a dict of scores by group name. For kinds="block": "influence" (the
            default; one minus the cosine similarity of a block's input and output), "change" (change of the model's
            outputs when the block is removed; one run per block) or "random".
        loss: loss for importances from labels: "cross-entropy", "binary", "squared-error"; "next-token" for causal
            language models, whose labels are their input tokens; or a function (logits, labels) → mean over samples.
            ranking="milp" compares class probabilities for "cross-entropy", "next-token" and "binary", and the outputs
            themselves for other losses.
        norm: 1 or 2, the norm of "magnitude" and "lamp".
        ranking: "global" ranks all units together; "per_cost" as well, by their importance divided by the cost that the
            goal limits. "auto" is "per_cost" for "taylor", "fisher" and "snip", which estimate changes of the loss, and
            "global" for others. It is also "global" for "taylor" and "snip" in models with units of kind "embedding
            dim", such as transformers, and for goals on the memory. "local" removes the same fraction of each group;
            "isomorphic" removes the same fraction of each class of groups that occur in layers of the same types (after
            Fang et al. 2024, arXiv:2407.04616).
            "milp" measures, for up to nine widths of each group, how much the outputs on `data` change if only this
            group is reduced, and chooses the widths with the least sum of changes by an integer program. This runs the
            model once for each width and batch. "legr" searches for the number of units of each group with
            which the pruned model has the best quality on `data`; see docs/learned_pruning.md.
        round_to: the number of kept units of each group is a multiple of this number. Runtimes are slow for other
            widths. "auto": 16 for groups of 128 units or more, 8 from 16 units, 4 from 8 units, else 1; always 1 for
            heads and other units that contain several channels each. Multiples are halved, but not below 4, if
            the goal cannot be met closely otherwise. A dict sets multiples by kind of unit, {"head dim": 8}; other
            kinds are "auto".
        kinds: a list, such as ["head", "ffn unit"]: only units of these kinds are removed (`kirsch.graph.kinds.KINDS`
            defines the kinds). A dict, such as {"head": 2.0, "head dim": 0}: units of all kinds are removed.
            Importances are divided by the weight of the kind, which is 1 for kinds that are not in the dict; units of a
            kind with weight 0 are kept. None: all kinds, with weight 1. "block" removes whole residual blocks
            (`graph.blocks`); to reduce widths, too, prune by this plan, trace the result, and plan again. With
            ranking="milp", "block" may be named together with other kinds: blocks and units are chosen together.
        uniform: remove the same number of units from all groups of the same kind and size, so that one number in a
            configuration describes all layers.
        loadable: only make cuts that the configuration of a transformers model can state, so that `save_pretrained`
            writes a checkpoint that `from_pretrained` loads without Kirsch: FFN width, heads, hidden size, experts,
            and, for kinds=None and rankings that compare groups, numbers of layers. The layers that share a number lose
            the same number of units. Of the layers and widths, those are removed whose importances have the smallest
            sum; with `data`, of several such choices, the one that changes the outputs least. See docs/loadable.md.
            None: True for a model with such a configuration. A plan with any cuts is made if the configuration cannot
            state one for the goal or the widths in `keep`, or with the rankings "milp" and "legr", which choose the
            width of each layer; a note of the plan says so. With True, it is an error.
        min_keep: fraction of each group that is always kept, 0 < min_keep <= 1.
        keep: widths by hand: a dict from layers to the number of output units that are kept (int) or the fraction of
            them (float), such as {"layer3.*": 0.5, "layer4.0.conv1": 48, "fc1": 1.0}. A layer is a path, a glob, or the
            name of a group. The least important units of these layers are removed; the goal, if there is one, is
            reached with the other layers. `round_to` and `min_keep` do not apply to these layers.
        max_drop: largest drop of the quality, without training, measured on `validation`: 0.02 is two percentage
            points. Without a goal, the smallest model inside this limit is searched for by bisection over the cost;
            about seven models are evaluated. With a goal, an error is raised if the plan for the goal exceeds it.
        validation: samples on which the quality is measured: batches of (inputs, labels), or of inputs for metrics that
            compare outputs with those of the original. None: `data`.
        metric: metric of `max_drop`; larger values are better. With labels: "accuracy", "balanced_accuracy",
            "log_likelihood", "next_token_accuracy", "next_token_log_likelihood", "binary_accuracy", "r2". Compared with
            the outputs of the original: "agreement" (same predicted class), "kl" (minus the KL divergence),
            "output_r2". Or a function (outputs, labels) → number. None: by the form of the labels, see
            `kirsch.tasks.metrics.default_metric`.
        class_weights: class number → weight, such as {3: 5.0}; the accuracy is then the weighted mean of the recalls of
            the classes. The weight of other classes is 1.
        minimize: the cost that is minimized with `max_drop` and no goal: "macs", "parameters", "size" or "memory".
            None: MACs, or parameters if the model has no MACs.
        exclude: one or several module paths, parameter names or globs ("layer4.*") whose parameters are not changed.
            The units that these layers read are kept, too. For kinds="block", the blocks that are named, or that
            contain a named layer, are kept.
        keep_outputs: one or several module paths or globs; the outputs of these modules are not changed. They may lose
            inputs.
        seed: seed of the importances "random" and "hessian", and of the ranking "legr".
        evaluations: number of plans that "legr" evaluates; each runs a pruned model on `data`.
        quality: for "legr", a function of a pruned model that returns a number, larger for better
            models, such as its accuracy. It may train the model, which is a copy. None: minus `loss` on `data`, or
            without labels, minus the KL divergence from the outputs of the original.
        progress: whether to show the progress of rankings that run the model; None: on a terminal and in a notebook.

    Returns:
        A `Plan`. Its `notes` state the cost of the units that `exclude` and `keep_outputs` keep, and the reason if the
        cost of the plan is more than 1 % of the original below the goal.

    Raises:
        GoalError: no plan reaches the goal; the message has the least reachable cost, the layers that cannot be cut
            further, and options that reach the goal. Or the goal is on MACs only, and the model has no MACs.
        UnknownNameError: an importance, a kind or a name to exclude is unknown.
        UsageError: an option is out of range or has no effect with the others, `kinds` names blocks and other kinds,
            `data` is missing or cannot be used, or the model has masks of `kirsch.sparsify`.
        DataError: the data has no samples or labels.
        NumericError: a weight, an activation or a gradient is not finite.
    """
    options = PlanOptions(
        importance=importance if importance is None or isinstance(importance, str) else importance_of(importance).name,
        loss=loss if isinstance(loss, str) else "given function",
        norm=norm,
        ranking=ranking,
        round_to=round_to,
        kinds=kinds,
        uniform=uniform,
        loadable=loadable,
        min_keep=min_keep,
        keep=keep,
        max_drop=max_drop,
        metric=metric if metric is None or isinstance(metric, str) else GIVEN,
        class_weights=class_weights,
        minimize=minimize,
        exclude=exclude,
        keep_outputs=keep_outputs,
        seed=seed,
        evaluations=evaluations,
    )
    _check_importance(options, importance)
    check_search(goal, options, quality)
    if goal is None and not options.keep and max_drop is None:
        raise UsageError(
            "The goal is missing.",
            fix="Give a goal, kirsch.Goal(macs=0.5), a largest drop, max_drop=0.02, or widths by hand in `keep`.",
        )
    if graph.model is not None and framework_of(graph.model).masking.masks(graph.model):
        raise UsageError(
            f"{graph.model_name} has masks from kirsch.sparsify, which the plan would prune like weights.",
            fix="Trace kirsch.fold_masks(model), whose weights have the zeros. In a recipe, the step prune does this.",
        )
    if goal is not None and not graph.cost.macs and list(goal.to_dict()) == ["macs"]:
        raise GoalError(
            f"The goal macs={goal.macs} has no effect.",
            f"{graph.model_name} has no MACs{'' if graph.cost.parameters else ' and no parameters'}.",
            "Give parameters=0.5."
            if graph.cost.parameters
            else "Give a model that has layers with parameters to prune.",
        )
    if goal is not None:
        _check_reference(graph, goal)
    elif options.ranking == "milp" and max_drop is None:
        raise UsageError(
            'ranking="milp" has no effect without a goal.',
            "It chooses widths by their cost, and `keep` sets the widths by hand.",
            "Give a goal, such as kirsch.Goal(macs=0.5), or remove `ranking`.",
        )
    check_validation(options, goal, data, validation)
    on_data = max_drop is not None and validation is None  # the drop is measured on `data`
    plan_for: Callable[..., Plan]
    if options.of_blocks:
        block_scores = BlockScores(graph, options, data, measured=on_data)
        plan_for = partial(plan_blocks, graph, options=options, block_scores=block_scores)
    else:
        chosen = importance_of(options.importance_name if importance is None else importance)
        present = set() if is_loadable(graph, options) else {group.kind for group in graph.groups}
        limits_memory = goal is not None and goal.memory is not None
        options = options.with_ranking(chosen, present, limits_memory=limits_memory)
        options.check_importance(chosen)
        if isinstance(importance, Mapping):
            _check_groups(graph, importance)
        searched = quality_of(graph, options.ranking, data, loss, quality) if options.is_learned else None
        # `data` may be only for the ranking or for the measurement of the drop.
        other_use = (options.is_learned and quality is None) or on_data
        unused = other_use and chosen.needs == "weights" and options.ranking != "milp"
        scores = scores_of(graph, options, chosen, None if unused else data, loss)

        def any_cuts(changed: PlanOptions) -> Callable[..., Plan]:
            return partial(plan_units, graph, options=changed, scores=scores, quality=searched, progress=progress)

        plan_for = plan_function(graph, goal, options, scores, any_cuts)
    if max_drop is None:
        return plan_for(goal)
    samples, argument = (data, "data") if validation is None else (validation, "validation")
    measured = Quality(graph, samples, metric, class_weights, argument=argument)
    search = DropSearch(graph, measured, max_drop, minimized_cost(graph, goal, minimize), plan_for)
    return search.within(goal, least_cost(graph, options))


def least_cost(graph: Graph, options: PlanOptions) -> Cost:
    """Return the least cost that plans with these options and any goal reach."""
    if options.of_blocks:
        return least_cost_of_blocks(graph, options)
    loadable = least_loadable(graph, options)
    return least_units(graph, Goal(parameters=0.5), options).cost if loadable is None else loadable


def _check_reference(graph: Graph, goal: Goal) -> None:
    """Raise a GoalError if the model costs more than the original that the goal states."""
    for name in goal.to_dict() if goal.of is not None else ():
        cost, reference = getattr(graph.cost, name), getattr(goal.of, name)
        if cost > reference:
            raise GoalError(
                f"The goal is a fraction of {figures.count(reference)} {WORDS[name]}, and {graph.model_name} has "
                f"{figures.count(cost)}.",
                "A model that is pruned cannot cost more than its original.",
                "Trace both with example inputs of the same shape, and give of=graph.cost of the original.",
            )


def _check_groups(graph: Graph, scores: Mapping[str, Any]) -> None:
    """Raise an UnknownNameError for scores of a group that the model does not have."""
    known = [group.name for group in graph.groups]
    unknown = next((name for name in scores if name not in known), None)
    if unknown is not None:
        raise UnknownNameError("group", unknown, known, argument="importance")


def _check_importance(options: PlanOptions, importance: Any) -> None:
    """Raise a UsageError for the importance of a block in a plan of units, and the reverse."""
    name = options.importance_name
    if options.of_blocks and not (importance is None or isinstance(importance, str)):
        raise UsageError(
            f"`importance` of kirsch.plan is a {type(importance).__name__}, and kinds='block' removes residual blocks.",
            "Functions and dicts of scores rank the units of layers.",
            f"Give the name of an importance of blocks ({', '.join(sorted(BLOCK_IMPORTANCES))}), or other `kinds`.",
        )
    if options.of_blocks and name in IMPORTANCES and name not in BLOCK_IMPORTANCES:
        raise UsageError(
            f"The importance {name!r} ranks units of layers, and kinds='block' removes residual blocks.",
            listing(sorted(BLOCK_IMPORTANCES)),
            "Give an importance of blocks, or other `kinds`.",
        )
    if not options.of_blocks and name in BLOCK_IMPORTANCES and name not in IMPORTANCES:
        raise UsageError(
            f"The importance {name!r} ranks residual blocks, and this plan removes units of layers.",
            listing(sorted(IMPORTANCES)),
            "Give kinds='block', or an importance of units.",
        )
