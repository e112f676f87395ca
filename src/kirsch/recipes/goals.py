"""Goals of a job: their texts, whether a run has met them, and whether its steps can reach them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.deploy.steps import RUNTIME
from kirsch.errors import GoalError
from kirsch.graph.cost_names import WORDS
from kirsch.graph.plan import Goal
from kirsch.steps import Measure, Prune

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kirsch.jobs.job import Job, Record
    from kirsch.jobs.step import Step


@dataclass(frozen=True)
class CostGoal:
    """Limits of the cost of one model.

    Args:
        key: key of the step whose result is limited; empty for the final model of the job.
        limits: the limits.
        reference: name of the model whose cost the limits are fractions of.
        of_job: whether this is the model before any step, otherwise the model before the step.
        prefix: beginning of the texts on these limits; empty if the job has no other limits.
    """

    key: str
    limits: Goal
    reference: str
    of_job: bool
    prefix: str

    def text(self) -> str:
        """Return the limits as text."""
        limits = ", ".join(f"{WORDS[name]} ≤ {_limit(limit)}" for name, limit in self.limits.to_dict().items())
        return f"{self.prefix}{limits} of the {self.reference}"

    def items(self, after: Mapping[str, int], before: Mapping[str, int]) -> Iterator[dict[str, Any]]:
        """Yield an item for each limit, from the costs of the limited model and of the reference."""
        for name, limit in self.limits.to_dict().items():
            value = after[name] / max(before[name], 1)
            text = f"{self.prefix}{WORDS[name]} {_share(value, limit)} of the {self.reference}, goal ≤ {_limit(limit)}"
            yield item(f"{self.key}.{name}" if self.key else name, text, limit, value, met=value <= limit)


def cost_goals(job: Job, steps: Mapping[str, Step]) -> list[CostGoal]:
    """Return the limits of the cost of all steps and of the final model.

    A limit of a step `Prune` that equals the limit of the final model, and is a fraction of the same cost, is left out,
    since it would be listed twice.
    """
    final, goals = job.goal.cost, []
    prunings = [(key, step) for key, step in steps.items() if isinstance(step, Prune)]
    for number, (key, step) in enumerate(prunings):
        of_job = step.goal_of == "job"
        of_start = of_job or number == 0
        limits: dict[str, Any] = step.goal.to_dict() if step.goal is not None else {}
        if of_start and final is not None:
            limits = {name: limit for name, limit in limits.items() if final.to_dict().get(name) != limit}
        if limits:
            goals.append((key, Goal(**limits), job.model_name if of_start else "model before this step", of_job))
    found = [CostGoal(*goal, f"{goal[0]}: ") for goal in goals]
    if final is not None:
        found.append(CostGoal("", final, job.model_name, True, "at the end: " if found else ""))
    return found


def goals_of_steps(steps: Mapping[str, Step]) -> list[Goal]:
    """Return the goals of the steps that prune."""
    return [step.goal for step in steps.values() if isinstance(step, Prune) and step.goal is not None]


def goal_texts(job: Job, steps: Mapping[str, Step]) -> list[str]:
    """Return a text for each goal of a job and of its steps."""
    texts = [goal.text() for goal in cost_goals(job, steps)]
    if job.goal.max_drop is not None:
        texts.append(f"accuracy drop ≤ {figures.points(job.goal.max_drop)} against the teacher")
    if job.goal.speedup is not None:
        measure = next(step for step in steps.values() if isinstance(step, Measure))
        conditions = f"{RUNTIME}, {figures.counted(measure.threads, 'thread')}"
        texts.append(f"speed ≥ {figures.digits(job.goal.speedup)}× that of the teacher ({conditions})")
    return texts


def goal_items(job: Job, steps: Mapping[str, Step], first: str, final: str, significance: str) -> list[dict[str, Any]]:
    """Return an item for each goal of a finished job.

    Args:
        job: job with the records of all steps.
        steps: steps by key.
        first, final: keys of the steps that made the teacher and the final model.
        significance: significance of the change of accuracy, as text.
    """
    records, goal = job.records, job.goal
    items: list[dict[str, Any]] = []
    for cost in cost_goals(job, steps):
        before = job.start_cost if cost.of_job else records[cost.key]["before"]
        items += cost.items(records[cost.key or final], before)
    if goal.max_drop is not None:
        items.append(_drop_item(records[first], records[final], goal.max_drop, significance))
    if goal.speedup is not None:
        speedup = records["measure"]["race"]["speedups"]["exported"]
        text = f"{figures.ratio(**speedup)} the speed of the teacher, goal ≥ {figures.digits(goal.speedup)}×"
        items.append(item("speedup", text, goal.speedup, speedup["value"], met=speedup["value"] >= goal.speedup))
    return items


def _drop_item(before: Record, after: Record, limit: float, significance: str) -> dict[str, Any]:
    """Return the item of the drop of accuracy; a gain is a negative drop."""
    drop = before["accuracy"]["value"] - after["accuracy"]["value"]
    text = f"accuracy drop {figures.points(drop)} against the teacher, goal ≤ {figures.points(limit)}"
    if "balanced_accuracy" in before and "balanced_accuracy" in after:  # accuracy may hide the loss of a rare class
        balanced = (figures.percent(record["balanced_accuracy"]) for record in (before, after))
        text += f" (balanced accuracy {' → '.join(balanced)})"
    return item("max_drop", text, limit, drop, met=drop <= limit + 1e-12, significance=significance)


def item(name: str, text: str, limit: float, value: float, *, met: bool, significance: str = "") -> dict[str, Any]:
    """Return the result of one goal, as JSON."""
    return {"name": name, "text": text, "limit": limit, "value": value, "met": met, "significance": significance}


def expected_items(job: Job, steps: Mapping[str, Step], final: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return an item for each limit of the cost of a job whose steps were previewed.

    Args:
        job: job with the plans of its steps.
        steps: steps by key.
        final: cost of the final model.
    """
    items: list[dict[str, Any]] = []
    for goal in cost_goals(job, steps):
        if goal.key:
            plan = job.plans[goal.key]
            items += goal.items(plan.after.to_dict(), job.start_cost if goal.of_job else plan.before.to_dict())
        else:
            items += goal.items(final, job.start_cost)
    return items


def refuse_unreachable(job: Job, steps: Mapping[str, Step], final: Mapping[str, int]) -> None:
    """Refuse limits of the cost that the steps of a job do not reach; the arguments are those of `expected_items`.

    Raises:
        GoalError: the final model would be above a limit.
    """
    missed = [item for item in expected_items(job, steps, final) if not item["met"]]
    if not missed:
        return
    name, value = missed[0]["name"], missed[0]["value"]
    limits = f"{WORDS[name]} {_share(value, missed[0]['limit'])} of the {job.model_name}"
    prunings = [key for key, step in steps.items() if isinstance(step, Prune)]
    reached = [
        f"{key} {figures.percent(plan.after.to_dict()[name] / max(plan.before.to_dict()[name], 1))}"
        for key, plan in job.plans.items()
    ]
    why = "No step removes units."
    if reached:
        why = f"Share of the {WORDS[name]} that each step leaves: {', '.join(reached)}."
    fix = f"Lower `goal.{name}` of the step {prunings[-1]!r}" if prunings else "Add a step prune"
    possible = math.ceil(1000 * value) / 1000
    of_job = f"`goal.{name}` of the job"
    alternative = f"raise {of_job} to {possible:g}" if possible < 1 else f"leave out {of_job}"
    raise GoalError(
        f"The steps cannot reach the goal: they lead to {limits}, and the goal is ≤ {_limit(missed[0]['limit'])}.",
        why,
        f"{fix}, or {alternative}.",
    )


def _limit(limit: float) -> str:
    """Return a limit as percent, without trailing zeros."""
    return f"{100 * limit:g} %"


def _share(value: float, limit: float) -> str:
    """Return a fraction as percent, with enough digits to distinguish it from its limit."""
    decimals = next((n for n in range(1, 16) if figures.percent(value, n) != figures.percent(limit, n)), 1)
    return figures.percent(value, decimals)
