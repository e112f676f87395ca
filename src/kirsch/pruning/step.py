"""Step of a job that prunes its model."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from kirsch import figures, files
from kirsch.annotations import Seed
from kirsch.errors import GoalError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.trace import trace
from kirsch.graph.cost import Cost
from kirsch.graph.cost_names import WORDS
from kirsch.graph.goal import Goal
from kirsch.graph.plan import Plan
from kirsch.jobs.goal import PlanGoal
from kirsch.jobs.job import without_masks
from kirsch.jobs.step import STEPS, Step, model_cells
from kirsch.pruning.blocks import runs_model
from kirsch.pruning.choose import least_cost
from kirsch.pruning.choose import plan as choose
from kirsch.pruning.compensation import Compensate, check_model, methods_of
from kirsch.pruning.importance import importance_of
from kirsch.pruning.loadable_plan import is_loadable
from kirsch.pruning.max_drop import minimized_cost
from kirsch.pruning.options import ONLY_WITH_MAX_DROP, PlanOptions
from kirsch.pruning.prune import OPTIMIZER_NOTE, prune_with_verification, rebuilt
from kirsch.pruning.quality import Quality
from kirsch.pruning.sparsity.pattern import UNSTRUCTURED
from kirsch.pruning.store import last_plan, load, save
from kirsch.pruning.units import runs_for_milp
from kirsch.tasks.metrics import METRIC_OF_LOSS, class_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.jobs.goal import JobGoal
    from kirsch.jobs.job import Job, Record

CALIBRATION, PREVIEW = 256, 8
"""Number of training samples for the ranking of units and blocks and for compensation; and for the ranking of units
before the job starts."""

BATCH = 32
"""Number of samples that a model runs on at once."""

FEW_MACS = 10**12
"""Number of multiply-accumulates that "milp" may always need: a few seconds on a processor."""

SHORT = {"macs": "MACs", "parameters": "params", "size": "bytes", "memory": "memory"}
"""Short names of the costs in `WORDS`."""

PATTERN_FIX = "The kept inputs of a layer need not fit it. Prune before the step sparsify to keep it."

PRUNED = "model"
"""Folder of the pruned model in the folder of the step."""


FIRST = "prune"
"""Key of the first step that prunes, to which the limits of the job apply."""


def plan_file(key: str) -> str:
    """Return the file name of the plan of a step: "plan.json", or "plan-2.json" for the second step."""
    return f"{key.replace('prune', 'plan')}.json"


def validation_of(job: Job, metric: str | None, class_weights: Mapping[str | int, float] | None) -> dict[str, Any]:
    """Return the arguments of `kirsch.plan` for measurements on the validation part of a job.

    Args:
        job: the job; its task determines the metric if none is given.
        metric: name of a metric, or None.
        class_weights: class name or number → weight, or None.
    """
    if metric is None and class_weights is None:
        metric = METRIC_OF_LOSS.get(job.task.label_loss)
    weights = class_numbers(class_weights, job.data.classes)
    return {"validation": job.data.validation, "metric": metric, "class_weights": weights}


@STEPS.register("prune")
class Prune(PlanOptions, Step):
    """Remove units of the model, and verify the result.

    The options are those of `kirsch.plan`, with a goal and a seed that may come from the job.
    """

    goal: PlanGoal | None = Field(
        None,
        description=(
            "limits, as fractions of the cost of a model; null: the goal of the job, for the first step prune or with "
            "goal_of: job"
        ),
    )
    goal_of: Literal["step", "job"] = Field(
        "step",
        description=(
            'model whose cost the limits are fractions of: "step", the model before this step; "job", the model before '
            "the first step prune, as for the goal of the job"
        ),
    )
    seed: Seed | None = Field(
        None, description='seed of the importances "random" and "hessian"; null: the seed of the recipe'
    )  # type: ignore[assignment]
    compensate: Compensate = Field(
        None,
        description=(
            'how the kept weights are changed after the cut, from 256 training samples and without training: "bias", '
            '"least_squares", "batch_norm", or a list of them; null: not at all'
        ),
    )

    def check(self) -> None:
        """Check the options of the plan, and the methods of compensation."""
        super().check()
        methods_of(self.compensate)

    def identity(self, job: Job) -> str:
        """Return the options, and the goal of the job if the step has none."""
        return self.model_dump_json() if self.goal is not None else f"{self.model_dump_json()} {job.goal.cost}"

    def preview(self, job: Job) -> None:
        """Check that a plan reaches the goal, and remove units, without verification.

        The quality of the model before training says nothing. With `max_drop` and no goal, the size of the result is
        therefore not known; a model of about half the cost takes its place.
        """
        masks = self._without_masks(job)
        begun = time.perf_counter()
        _, plan = self._plan(job, PREVIEW, evaluations=1) if self.max_drop is None else self._assumed_plan(job)
        measured = plan.method.get("ranking") == "milp"
        seconds = (time.perf_counter() - begun) * (CALIBRATION / BATCH if measured else 1)
        job.planning_seconds[job.key] = seconds
        job.plans[job.key] = plan
        check_model(methods_of(self.compensate), job.model, plan)
        pruned = prune_with_verification(job.model, plan, verify=False).model
        _hold_cut_masks(pruned, job.model, plan, masks)
        job.model = pruned

    def _without_masks(self, job: Job) -> dict[str, NDArray[np.bool_]]:
        """Replace the model of a job by a copy without masks, and return the masks; a model without masks stays.

        Raises:
            UsageError: the model has masks, and compensation changes weights.
        """
        masks = framework_of(job.model).masking.masks(job.model)
        if masks and "least_squares" in methods_of(self.compensate):
            raise UsageError(
                f"The step {job.key!r} cannot compensate with 'least_squares'.",
                "It changes all weights, and a step before it, such as sparsify, holds some of them at zero.",
                "Use 'bias' or 'batch_norm', or prune before the step sparsify.",
            )
        job.model = without_masks(job.model)
        return masks

    def goal_in(self, goal: JobGoal, key: str) -> Goal | None:
        """Return the goal of this step, or the limits of the job's `goal` if it applies to this step.

        The goal of the job applies to the first step without a goal, and to steps with goal_of="job". None for `keep`
        or `max_drop` alone.

        Raises:
            UsageError: neither the step nor the job limits the cost or the drop, and no widths are given by hand.
        """
        own = self.goal or (goal.cost if key == FIRST or self.goal_of == "job" else None)
        if own is None and not self.keep and self.max_drop is None:
            raise UsageError(
                f"The step {key!r} has no goal.",
                f"Neither the step nor the job limits a cost: {', '.join(WORDS)}.",
                "Give the step or the job a goal, such as macs=0.5, or the step a largest drop, such as max_drop=0.02.",
            )
        return own

    def _plan(self, job: Job, samples: int = CALIBRATION, evaluations: int | None = None) -> tuple[Graph, Plan]:
        """Return the graph of the model of a job, and the plan of this step.

        Args:
            job: the job.
            samples: number of training samples for the importance or the ranking.
            evaluations: number of plans that a learned ranking evaluates; None: the option of the step.
        """
        goal = self.goal_in(job.goal, job.key)
        if goal is not None and self.goal_of == "job":
            goal = Goal(**goal.to_dict(), of=Cost(**{"parameters": 0, "macs": 0, "activations": 0} | job.start_cost))
        inference = framework_of(job.model).inference
        graph = trace(job.model, inference.from_numpy(job.example))
        options = {name: getattr(self, name) for name in PlanOptions.model_fields}
        options["seed"] = job.seed if self.seed is None else self.seed
        options["progress"] = False  # the job shows its own progress
        options |= self._ranked_by(job, samples)
        if options["importance"] == "taylor" and self.uses_milp(graph, goal, job.data.sizes["train"]):
            options["ranking"] = "milp"
        if self.is_learned:
            options["evaluations"] = evaluations or self.evaluations
        if self.max_drop is not None:
            options |= validation_of(job, self.metric, self.class_weights)
        try:
            return graph, choose(graph, goal, **options)
        except GoalError as error:  # several steps may have the same options
            raise GoalError(f"The step {job.key!r} cannot prune. {error.what}", error.why, error.fix) from error

    def _ranked_by(self, job: Job, samples: int) -> dict[str, Any]:
        """Return the importance, and the data that it or the ranking needs.

        The default is "taylor" where there are labels and the loss can be computed; docs/benchmarks.md compares it with
        "magnitude", the default without data.
        """
        # The preview must remove the same blocks as the run, and therefore ranks them on the same samples.
        count = CALIBRATION if self.of_blocks else samples
        name, data = self.importance_name, None
        of_magnitude = self.norm != type(self).model_fields["norm"].default
        of_logits = job.task.label_loss == self.loss and job.outputs.get(job.model_name) != "probabilities"
        if self.importance is None and of_logits and not (self.of_blocks or of_magnitude):
            data = self._calibration(job, job.data.calibration_batches, count)
            name = name if any(batch.targets is None for batch in data) else "taylor"
        runs = runs_model(name) if self.of_blocks else importance_of(name).needs != "weights"
        if not (self.ranking == "milp" or self.is_learned or runs):
            return {"importance": name}
        return {"importance": name, "data": data or self._calibration(job, job.data.calibration_batches, count)}

    def uses_milp(self, graph: Graph, goal: Goal | None, training_samples: int | None) -> bool:
        """Return whether the ranking "auto" is "milp" in this step.

        "milp" was the best ranking in docs/benchmarks.md, but it runs a model for each alternative width on
        `CALIBRATION` samples. It is used if these runs together have at most as many multiply-accumulates as one pass
        over the training data, or at most `FEW_MACS`.

        Args:
            graph: graph of the model.
            goal: goal of the step.
            training_samples: number of training samples; None if it is not known.
        """
        if self.ranking != "auto" or self.of_blocks or goal is None or self.max_drop is not None:
            return False
        if is_loadable(graph, self):
            return False
        most = max(training_samples or 0, FEW_MACS // max(graph.cost.macs, 1))
        return CALIBRATION * runs_for_milp(graph, goal, self) <= most

    def _assumed_plan(self, job: Job) -> tuple[Graph, Plan]:
        """Return a plan for the goal, or else one half way to the least cost, without a measurement of quality."""
        inference = framework_of(job.model).inference
        graph = trace(job.model, inference.from_numpy(job.example))
        validation = validation_of(job, self.metric, self.class_weights)
        Quality(graph, validation["validation"], validation["metric"], validation["class_weights"])  # checks them
        step = self.changed(max_drop=None, **dict.fromkeys(ONLY_WITH_MAX_DROP))
        if self.goal_in(job.goal, job.key) is None:
            name = minimized_cost(graph, None, self.minimize)
            least = getattr(least_cost(graph, step), name) / max(getattr(graph.cost, name), 1)
            step = step.changed(goal=Goal(**{name: min((1 + least) / 2, 0.999)}))
        return step._plan(job, PREVIEW, evaluations=1)  # noqa: SLF001 - of the same class

    def _calibration(self, job: Job, read: Callable[[int], Any], samples: int = CALIBRATION) -> Any:
        """Return training samples; a shuffling loader gives the same samples each time."""
        return framework_of(job.model).training.seeded(lambda: read(samples), job.seed)

    def seconds(self, job: Job) -> float:
        """Return the estimated time: about a second, and that of the preview, which runs "milp" on one small batch."""
        return 1.0 + job.planning_seconds.get(job.key, 0.0)

    def run(self, job: Job, folder: Path) -> Record:
        """Prune the model, verify it, and write it with its plan."""
        lost = sorted(set(framework_of(job.model).masking.patterns(job.model).values()) - {"", UNSTRUCTURED})
        masks = self._without_masks(job)
        graph, plan = self._plan(job)
        samples = None if not self.compensate else self._calibration(job, job.data.calibration_batches)
        pruned = prune_with_verification(job.model, plan, compensate=self.compensate, data=samples)
        _hold_cut_masks(pruned.model, job.model, plan, masks)
        job.model = pruned.model
        save(pruned.model, folder / PRUNED)
        files.write_text(job.folder / plan_file(job.key), pruned.plan.to_json())
        notes = [note for note in pruned.notes if note != OPTIMIZER_NOTE]  # the steps make their own optimizers
        if lost:
            notes.append(f"The zeros stay zero, but no longer have the pattern {figures.listed(lost)}. {PATTERN_FIX}")
        for text in notes:
            job.note(text)
        error = pruned.verification.error if pruned.verification else float("nan")
        record: Record = {"model": "pruned", "did": _reduction(plan), **job.evaluate(pruned.model, folder, plan.limits)}
        record["bytes"] = (folder / PRUNED / "model.safetensors").stat().st_size
        record["verification"] = pruned.verification.to_dict() if pruned.verification else None
        record["removed"] = removal_record(graph, plan)
        record["plan"] = json.loads(pruned.plan.to_json())
        record["notes"] = notes
        if pruned.compensation is not None:
            record["compensation"] = pruned.compensation.to_dict()
            record["notes"] = [*notes, f"Compensation: {pruned.compensation.text}."]
        record["before"] = plan.before.to_dict()
        chosen = figures.counted(len(plan.blocks), "block") if plan.blocks else plan.method["ranking"]
        record["cells"] = [*model_cells(record), f"{chosen}, verified ({error:.0e})"]
        return record

    def load(self, job: Job, folder: Path, record: Record) -> None:
        """Load the pruned model, and restore the copy of its plan in the run folder."""
        del record
        pruned = load(folder / PRUNED, job.make_model)
        masks = framework_of(job.model).masking.masks(job.model)
        if masks:
            _hold_cut_masks(pruned, without_masks(job.model), Plan.read(last_plan(folder / PRUNED)), masks)
        job.model = pruned
        stored, shown = last_plan(folder / PRUNED), job.folder / plan_file(job.key)
        if not shown.is_file() or shown.read_bytes() != stored.read_bytes():
            files.write_bytes(shown, stored.read_bytes())


def _hold_cut_masks(pruned: Any, model: Any, plan: Plan, masks: Mapping[str, NDArray[np.bool_]]) -> None:
    """Give a pruned model the masks that its weights had before it was pruned, without the removed units.

    The masks are cut by pruning the model with their values as weights, so that a kept weight that happens to be zero
    is not held. They have no pattern: the kept inputs need not fit it.

    Args:
        pruned: the pruned model, which gets the masks.
        model: the model before pruning; its weights are overwritten, so give a copy.
        plan: the plan by which it was pruned.
        masks: masks of the weights of `model` by name; weights that are removed as a whole are left out.
    """
    if not masks:
        return
    framework = framework_of(model)
    framework.masking.hold(model, {}, {name: mask.astype(np.float32) for name, mask in masks.items()})
    cut = rebuilt(model, plan)
    kept = [name for name in masks if name in framework.inference.parameter_shapes(cut)]
    framework.masking.hold(pruned, {name: framework.masking.values(cut, name) != 0 for name in kept})


def _reduction(plan: Plan) -> str:
    """Return the reduction of the first cost that the goal limits, MACs by default, as text."""
    name = next(iter(plan.goal), "macs")
    removed = 1 - plan.after.to_dict()[name] / max(plan.before.to_dict()[name], 1)
    return f"−{figures.percent(removed)} {SHORT[name]}"


def removal_record(graph: Graph, plan: Plan) -> dict[str, Any]:
    """Return the units that a plan removes, listed by group and by layer, and the blockers of the graph, as JSON."""
    removals = {removal.name: removal for removal in plan.groups}
    kept = plan.keep(graph)
    before, after = graph.prices.by_owner(graph.keep({})), graph.prices.by_owner(kept)
    groups: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    in_removed_block = re.compile("|".join(rf"{re.escape(path)}(\..*)?" for path in plan.without) or "$^").fullmatch
    for group in graph.groups:
        removal = removals.get(group.name)
        units = list(removal.removed) if removal else []
        alone = graph.prices.price(graph.keep({group.name: tuple(units)}))
        groups.append(
            {
                "name": group.name,
                "kind": group.kind,
                "size": group.size,
                "removed": units,
                "reason": removal.reason if removal else "kept",
                "layers": list(group.layers),
                "parameters": graph.cost.parameters - alone.parameters,
                "macs": graph.cost.macs - alone.macs,
            }
        )
        for name, axis in group.footprint:
            layer, _, parameter = name.rpartition(".")
            # The weights of a recurrent layer, such as weight_ih_l0, have a row for each gate of each unit.
            recurrent = axis == 0 and group.kind == "recurrent unit" and parameter.startswith("weight")
            if (recurrent or parameter.endswith("weight")) and len(graph.tensors[name].shape) > 1:
                labels = None if recurrent else _output_labels(graph, group, name, axis)
                if layer in {entry["name"] for entry in layers}:  # its outputs belong to several groups
                    continue
                if recurrent:
                    size, rest = group.size, group.size - len(units)
                elif labels is None:
                    continue
                else:
                    size, mask = len(labels), graph.kept(labels, kept)
                    rest = size if mask is None else int(mask.sum())
                gone = bool(in_removed_block(layer))
                layers.append(
                    {
                        "name": layer,
                        "group": group.name,
                        "before": size,
                        "after": 0 if gone else rest,
                        "parameters_before": before[layer][0],
                        "parameters_after": 0 if gone else after[layer][0],
                    }
                )
    blockers = [
        {"reason": b.reason, "where": b.where, "source": b.source, "operation": b.operation, "share": b.share}
        for b in graph.blockers
    ]
    return {"groups": groups, "layers": layers, "blockers": blockers}


def _output_labels(graph: Graph, group: Group, name: str, axis: int) -> NDArray[np.int64] | None:
    """Return the labels of the outputs of a layer if units of a group are among them; None if they are not.

    Args:
        graph: graph of the model.
        group: the group.
        name: weight of the layer, an axis of which belongs to the group.
        axis: this axis; the outputs of a module that is not called are assumed to be those of its first axis.
    """
    outputs = graph.module_outputs().get(name.rpartition(".")[0])
    if outputs is None:
        return graph.axes[name, axis] if axis == 0 else None
    in_group = np.zeros(len(graph.coupling.frozen), bool)
    in_group[group.components] = True
    labels = (labels for output in outputs for labels in output.axes if labels is not None)
    return next((found for found in labels if in_group[graph.coupling.component[found]].any()), None)
