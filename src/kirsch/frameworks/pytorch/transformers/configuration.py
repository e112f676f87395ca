"""Update the configuration of a pruned transformers model, so that `from_pretrained` can load it.

A model has a configuration if `type(model)(config)` builds the model and the configuration converts to a dict and back.
New numbers are only set after a check: the outputs of a model built from them must be bit-identical to those of the
pruned model. If no configuration describes the pruned model, `save_pretrained` raises an error; see `pretrained.py`.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import PlanError, error_text, nearest
from kirsch.frameworks.pytorch.inference.predict import run
from kirsch.frameworks.pytorch.modules.read_only import ReadOnly, sharing_copy
from kirsch.frameworks.pytorch.modules.tuners import has_tuners, plain_names, without_tuners
from kirsch.frameworks.pytorch.transformers.adapted import adapter_difference, copy_base_configurations, saving_note
from kirsch.frameworks.pytorch.transformers.blueprint import (
    Search,
    build,
    has_configuration,
    integer_attributes,
    numbers,
    quiet,
    sizes,
)
from kirsch.frameworks.pytorch.transformers.pretrained import allow, refuse, refused, savers
from kirsch.frameworks.pytorch.verification.distance import distance
from kirsch.frameworks.pytorch.verification.noise import Noise, seeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from kirsch.frameworks.pytorch.transformers.blueprint import Numbers
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Plan

MOST_SOLUTIONS = 4
"""Largest number of configurations that give the right shapes and whose outputs are compared with the pruned model."""
MOST_GROWTH = 4
"""Limit of a number that a plan states, as a multiple of the largest size of the model or number of its configuration.

It is above 1 because a ratio, such as `mlp_ratio`, grows when the width in its denominator is pruned.
"""

SCALING = ("embedding dim", "head dim")
"""Kinds of units whose number often also sets a factor that shapes do not show, such as the scale of attention."""


def check(model: nn.Module, plan: Plan) -> None:
    """Raise an error if the configuration in a plan cannot be a configuration of the model; no model is built.

    Raises:
        PlanError: the model has no configuration, or its configuration does not have these numbers.
    """
    if not plan.configuration:
        return
    if not has_configuration(model) or plan.tracing.module:
        owner = f"The part {plan.tracing.module!r} of" if plan.tracing.module else "A"
        raise PlanError(
            f"{plan.title} states a configuration: {', '.join(plan.configuration)}.",
            f"{owner} {type(model).__name__} has no configuration that a plan can change.",
            "Remove these numbers from the configuration in the plan, or give the model that the plan was made for.",
        )
    current, attributes = numbers(model.config), integer_attributes(model)
    most = MOST_GROWTH * max([*(size for size in sizes(model).values()), *(n for n in current.values() if n)])
    for path, number in plan.configuration.items():
        if path not in current and path not in attributes:
            raise PlanError(
                f"{plan.title} states a number for configuration.{path}.",
                f"The configuration of the {type(model).__name__} has no such number.",
                nearest(path, current) or "Remove it, or give the model that the plan was made for.",
            )
        if number > most:
            raise PlanError(
                f"{plan.title} states {number:g} for configuration.{path}.",
                f"This is more than {MOST_GROWTH} times the largest size of the {type(model).__name__}.",
                "Correct the number, or make a new plan.",
            )


ORIGINAL_SIZE = "from_pretrained would build the model in its original size."


@dataclass(frozen=True)
class Configured:
    """Changes of the configurations in a pruned model.

    Args:
        numbers: new numbers of the configuration of the model itself.
        notes: sentences on the changes.
        why, fix: texts of the error that `save_pretrained` raises; empty if it can save the model.
    """

    numbers: Numbers = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    why: str = ""
    fix: str = ""


def configure(pruned: nn.Module, model: nn.Module, plan: Plan, graph: Graph, *, verify: bool) -> Configured:
    """Update the configurations in a pruned model, or make `save_pretrained` raise an error.

    Without verification, only the numbers that the plan states are set. These numbers were verified when the plan was
    applied for the first time.
    """
    if not (plan.groups or plan.blocks):
        return Configured()
    if "" not in dict(savers(pruned)):
        return _refuse_parts(pruned, model)
    configure_whole = _configure_adapted if has_tuners(pruned) else _configure_model
    configured = configure_whole(pruned, model, plan, graph, verify=verify)
    if configured.why:
        refuse(pruned, configured.why, configured.fix)
    else:
        allow(pruned)
    _refuse_parts(pruned, model)
    return configured


def _configure_adapted(pruned: nn.Module, model: nn.Module, plan: Plan, graph: Graph, *, verify: bool) -> Configured:
    """Update the configurations of a model with adapters, if they describe its base model and its adapters."""
    base, original = without_tuners(pruned), without_tuners(model)
    configured = _configure_model(base, original, plan, graph, verify=verify)
    if configured.why:
        return configured
    copy_base_configurations(base, pruned)
    difference = adapter_difference(pruned, graph.traced.args, graph.traced.options)
    if difference:
        why = f"The configuration of the adapters does not describe the pruned adapters: {difference}."
        return replace(configured, why=why, fix="Save it with kirsch.save, or merge the adapters first.")
    return replace(configured, notes=(*configured.notes, saving_note(pruned)))


def _configure_model(pruned: nn.Module, model: nn.Module, plan: Plan, graph: Graph, *, verify: bool) -> Configured:
    """Update the configuration of the pruned model itself, if there are numbers with which it describes the model."""
    name, module = type(pruned).__name__, graph.tracing.module
    if not has_configuration(pruned):
        why = f"No configuration describes the pruned {name}. {ORIGINAL_SIZE}"
        return Configured(why=why, fix="Save it with kirsch.save.")
    if module:
        why = f"The configuration of the {name} is unchanged, because only a part was pruned: {module!r}."
        return Configured(why=why, fix="Save it with kirsch.save, or trace without module and prune the whole model.")
    if not verify:
        return _as_stated(pruned, model, plan, graph)
    stated = plan.configuration
    if stated and not difference_of(pruned, stated, graph.traced.args, graph.traced.options):
        return _updated(pruned, stated)
    search, differences = Search(pruned), []
    for changes in search.solutions()[:MOST_SOLUTIONS]:
        difference = difference_of(pruned, changes, graph.traced.args, graph.traced.options)
        if not difference:
            return _updated(pruned, changes)
        differences.append(f"With {_in_words(pruned, changes)}, the shapes agree and the outputs differ: {difference}.")
    return _undescribed(pruned, differences[0] if differences else search.obstacle, _plan_options(model, plan, graph))


def _undescribed(pruned: nn.Module, why: str, options: str) -> Configured:
    fix = f"Save it with kirsch.save, or {options}." if options else "Save it with kirsch.save."
    return Configured(why=f"No configuration describes the pruned {type(pruned).__name__}. {why}", fix=fix)


def _refuse_parts(pruned: nn.Module, model: nn.Module) -> Configured:
    """Make `save_pretrained` of submodules raise an error if they were cut and their configuration does not fit.

    Returns:
        The error of the first such submodule.
    """
    originals, first = dict(model.named_modules()), Configured()
    for path, part in savers(pruned):
        cut = path not in originals or sizes(originals[path]) != sizes(part)
        if not path or not (cut or refused(part)):
            continue
        misfit = Search(without_tuners(part)).misfit if has_configuration(part) else ORIGINAL_SIZE
        if not misfit:
            allow(part)
        elif cut:
            why = f"No configuration describes the pruned {path!r}, a {type(part).__name__}. {misfit}"
            refusal = Configured(why=why, fix="Save the whole model with kirsch.save.")
            refuse(part, refusal.why, refusal.fix)
            first = first if first.why else refusal
    return first


def _plan_options(model: nn.Module, plan: Plan, graph: Graph) -> str:
    """Return options, in words, for a plan whose result a configuration can describe; empty if none are known."""
    kinds = _described(model, graph)
    cut = {removal.kind for removal in plan.groups}
    if not kinds or not cut or (plan.method.get("uniform") and cut <= set(kinds)):
        return ""
    return f"plan with kinds={json.dumps(kinds)}, uniform=True"


def _described(model: nn.Module, graph: Graph) -> list[str]:
    """Return the kinds of units whose number the configuration can change without changing other sizes."""
    search, axes = Search(model), dict[str, set[tuple[str, int]]]()
    names = {traced: name for name, traced in plain_names(graph.model).items()}
    for group in graph.groups:
        if group.kind not in SCALING:
            touched = {(names[name], axis) for name, axis in group.footprint if name in names}
            axes.setdefault(group.kind, set()).update(touched)
    return [kind for kind, touched in sorted(axes.items()) if touched and touched <= search.settable(touched)]


def _as_stated(pruned: nn.Module, model: nn.Module, plan: Plan, graph: Graph) -> Configured:
    search, changes = Search(pruned), plan.configuration
    if changes and search.fits(changes):
        return _updated(pruned, changes)
    if not search.solutions():  # the same message as after verification
        return _undescribed(pruned, search.obstacle, _plan_options(model, plan, graph))
    why = search.misfit or "Without verification, it is not known whether the outputs agree."
    advice = _plan_options(model, plan, graph)
    return Configured(
        why=f"The configuration of the {type(pruned).__name__} is unchanged, because the pruned model was not "
        f"verified. {why}",
        fix=f"Save it with kirsch.save, or {advice}{' and ' * bool(advice)}prune with verify=True.",
    )


def _updated(pruned: nn.Module, changes: Numbers) -> Configured:
    if not changes:
        return Configured()
    note = f"config: {_in_words(pruned, changes)}; save_pretrained saves it."
    copy_configurations(build(pruned, changes, "meta"), pruned)
    return Configured(changes, (note,))


def _in_words(model: nn.Module, changes: Numbers) -> str:
    current = numbers(model.config)
    return ", ".join(f"{path} {current.get(path)} -> {number}" for path, number in changes.items())


def difference_of(pruned: nn.Module, changes: Numbers, args: Any, options: Any) -> str:
    """Return how a model built from a changed configuration differs from the pruned model, in words; "" if not at all.

    The same noise is added to the stored tensors of both models, because parameters that are zero would hide a
    difference. The outputs of both must then be bit-identical. The new configuration must not change the outputs of the
    pruned model, either.
    """
    noise = Noise(pruned)
    # To save memory, the copy and the built model have the parameters of the pruned model, unless noise is added.
    parameters, copied = list(pruned.parameters()), sharing_copy(pruned).eval()

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        with ReadOnly(parameters):
            return seeded(lambda: run(model, args, options))

    def differs() -> bool:
        with contextlib.suppress(Exception):  # a single changed number may not fit the others
            return distance(before, outputs(copied)) != 0
        return False

    with quiet():
        try:
            built = build(pruned, changes, next(pruned.parameters()).device).eval()
            computed = set(getattr(pruned, "_keys_to_ignore_on_save", None) or ())  # such as sines of positions
            state = {
                name: noise.added(id(value), value.dtype)
                if id(value) in noise and noise.changes(id(value)) and name not in computed
                else value.detach()
                for name, value in pruned.state_dict(keep_vars=True).items()
            }
            copied.load_state_dict(state, assign=True)
            # `save_pretrained` does not store the computed tensors: the built model has those of its configuration.
            own = {name: value for name, value in built.state_dict().items() if name in computed}
            built.load_state_dict({**state, **own}, assign=True)
            if other := _other_words(copied, built):
                return other
            _convert_buffers(built, copied)
            before = outputs(copied)
            copy_configurations(built, copied)
            if distance(before, outputs(copied)) != 0:
                return "the forward of the pruned model reads its configuration"
            if distance(before, outputs(built)) != 0:
                return _cause(copied, built, differs)
        except Exception as error:  # noqa: BLE001 - the code of the model can raise any exception
            return error_text(error).rstrip(".")
    return ""


def _other_words(pruned: nn.Module, built: nn.Module) -> str:
    """Return an attribute of a module that is a word or None in one of the models and differs in the other.

    Such an attribute may change the outputs for other inputs only, such as the type of attention for long texts.
    """
    for path, module in built.named_modules():
        attributes = vars(pruned.get_submodule(path))
        for name, value in vars(module).items():
            present = attributes.get(name, value)
            simple = all(item is None or type(item) in (str, bool, int) for item in (value, present))
            if not simple or name.startswith("_"):
                continue
            if type(value) is not type(present) or (type(value) is str and value != present):
                return f"{path}.{name} is {present!r} and would be {value!r}".removeprefix(".")
    return ""


def _convert_buffers(built: nn.Module, pruned: nn.Module) -> None:
    """Convert the buffers of a built model to the dtypes of the pruned model, which `model.half()` may have changed."""
    for path, module in built.named_modules():
        for name, value in pruned.get_submodule(path).named_buffers(recurse=False):
            setattr(module, name, module.get_buffer(name).to(value.dtype))


def _cause(pruned: nn.Module, built: nn.Module, differs: Callable[[], bool]) -> str:
    """Return the attribute of a module that makes the outputs differ, in words.

    `differs` returns whether the outputs of `pruned` have changed, after an attribute was set to its value in `built`.
    """
    tried = set()
    for path, module in built.named_modules():
        counterpart = pruned.get_submodule(path)
        for name, number in vars(module).items():
            current = getattr(counterpart, name, number)
            if type(number) in (int, float) and current != number and (type(module), name) not in tried:
                tried.add((type(module), name))
                setattr(counterpart, name, number)
                if differs():
                    return f"{path}.{name} is {current:.4g} and would be {number:.4g}".removeprefix(".")
                setattr(counterpart, name, current)
    buffers = dict(pruned.named_buffers())
    others = [name for name, value in built.named_buffers() if not torch.equal(value, buffers[name])]
    return f"the buffer {others[0]} would have other values" if others else "the cause is not known"


def copy_configurations(source: nn.Module, target: nn.Module) -> None:
    """Set the configuration of each module to that of its counterpart in another model."""
    for path, module in source.named_modules():
        if "config" in vars(module):
            target.get_submodule(path).config = module.config
