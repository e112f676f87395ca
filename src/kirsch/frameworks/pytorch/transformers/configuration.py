"""Updates the configuration of a pruned model, as models of transformers have one.

A model carries a configuration if `type(model)(config)` builds it and the configuration converts to a dict and back.
New numbers are set only after verification: a model built from them returns the same bits. Where no configuration
describes the result, `save_pretrained` raises an error; see `pretrained.py`.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import PlanError, error_text, nearest
from kirsch.frameworks.pytorch.inference.predict import run
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.transformers.blueprint import Search, built, carried, held, numbers, quietly, sizes
from kirsch.frameworks.pytorch.transformers.pretrained import allow, refuse, refused, savers
from kirsch.frameworks.pytorch.verification.verify import distance, drawing_alike, noise_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from kirsch.frameworks.pytorch.transformers.blueprint import Numbers
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Plan

MOST_SOLUTIONS = 4
"""Configurations of the right shapes that are held against the pruned model."""
MOST_GROWTH = 4
"""A number of a configuration may grow, as a ratio does whose divisor shrinks, but not above this times any size."""

SCALING = ("embedding dim", "head dim")
"""Kinds whose number often sets a factor as well, such as the scale of attention, which no shape shows."""


def check(model: nn.Module, plan: Plan) -> None:
    """Make sure that the configuration a plan states may be one of a model, before anything is built with it.

    Raises:
        PlanError: the model carries no configuration, or none with these numbers.
    """
    if not plan.configuration:
        return
    if not carried(model) or plan.tracing.scope:
        owner = f"The part {plan.tracing.scope!r} of" if plan.tracing.scope else "A"
        raise PlanError(
            f"{plan.title} states a configuration: {', '.join(plan.configuration)}.",
            f"{owner} {type(model).__name__} carries none that a plan could change.",
            "Take these numbers out of configuration, or give the model that the plan was made for.",
        )
    today, modules = numbers(model.config), held(model)
    most = MOST_GROWTH * max([*(size for size in sizes(model).values()), *(n for n in today.values() if n)])
    for path, number in plan.configuration.items():
        if path not in today and path not in modules:
            raise PlanError(
                f"{plan.title} states a number for configuration.{path}.",
                f"The configuration of the {type(model).__name__} has no such number.",
                nearest(path, today) or "Take it out, or give the model that the plan was made for.",
            )
        if number > most:
            raise PlanError(
                f"{plan.title} states {number:g} for configuration.{path}.",
                f"No size of the {type(model).__name__} comes near it.",
                "Correct the number, or make a new plan.",
            )


ORIGINAL_SIZE = "from_pretrained would build it in its original size."


@dataclass(frozen=True)
class Configured:
    """What became of the configurations in a pruned model.

    Args:
        numbers: new numbers of the configuration of the model itself.
        notes: what was changed, in words.
        why, fix: of the error that `save_pretrained` raises from now on; empty where it works.
    """

    numbers: Numbers = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    why: str = ""
    fix: str = ""


def configure(pruned: nn.Module, model: nn.Module, plan: Plan, graph: Graph, *, verify: bool) -> Configured:
    """Make the configurations in a pruned model describe it, or `save_pretrained` raise an error.

    Without verification only the numbers that the plan states are set; they were verified when it was applied first.
    """
    if not (plan.groups or plan.blocks):
        return Configured()
    if "" not in dict(savers(pruned)):
        return _refuse_parts(pruned, model)
    found = _of_whole(pruned, model, plan, graph, verify=verify)
    if found.why:
        refuse(pruned, found.why, found.fix)
    else:
        allow(pruned)
    _refuse_parts(pruned, model)
    return found


def _of_whole(pruned: nn.Module, model: nn.Module, plan: Plan, graph: Graph, *, verify: bool) -> Configured:
    """Find out whether a configuration describes the pruned model as a whole, and tell it if so."""
    name, scope = type(pruned).__name__, graph.tracing.scope
    if not carried(pruned):
        why = f"No configuration describes the pruned {name}. {ORIGINAL_SIZE}"
        return Configured(why=why, fix="Save it with kirsch.save.")
    if scope:
        why = f"The configuration of the {name} is left as it was, since a part was pruned alone: {scope!r}."
        return Configured(why=why, fix="Save it with kirsch.save, or trace without scope and prune the whole model.")
    if not verify:
        return _as_stated(pruned, model, plan, graph)
    search, differences = Search(pruned), []
    for changes in search.solutions()[:MOST_SOLUTIONS]:
        difference = otherwise(pruned, changes, graph.traced.args, graph.traced.options)
        if not difference:
            return _told(pruned, changes)
        differences.append(f"With {_in_words(pruned, changes)} it has these shapes and differs: {difference}.")
    return _undescribed(pruned, differences[0] if differences else search.obstacle, _remedy(model, plan, graph))


def _undescribed(pruned: nn.Module, why: str, remedy: str) -> Configured:
    fix = f"Save it with kirsch.save, or {remedy}." if remedy else "Save it with kirsch.save."
    return Configured(why=f"No configuration describes the pruned {type(pruned).__name__}. {why}", fix=fix)


def _refuse_parts(pruned: nn.Module, model: nn.Module) -> Configured:
    """Make `save_pretrained` of modules within a pruned model raise an error where their configuration does not fit.

    Those that were not cut are left as they are. Returns the reason for the first that is refused.
    """
    originals, found = dict(model.named_modules()), Configured()
    for path, part in savers(pruned):
        cut = path not in originals or sizes(originals[path]) != sizes(part)
        if not path or not (cut or refused(part)):
            continue
        misfit = Search(part).misfit if carried(part) else ORIGINAL_SIZE
        if not misfit:
            allow(part)
        elif cut:
            why = f"No configuration describes the pruned {path!r}, a {type(part).__name__}. {misfit}"
            own = Configured(why=why, fix="Save the whole model with kirsch.save.")
            refuse(part, own.why, own.fix)
            found = found if found.why else own
    return found


def _remedy(model: nn.Module, plan: Plan, graph: Graph) -> str:
    """The options of a plan whose result the configuration describes, in words; empty where none are known."""
    kinds = _described(model, graph)
    cut = {removal.kind for removal in plan.groups}
    if not kinds or not cut or (plan.method.get("uniform") and cut <= set(kinds)):
        return ""
    return f"plan with granularity={json.dumps(kinds)}, uniform=True"


def _described(model: nn.Module, graph: Graph) -> list[str]:
    """The kinds of units of which a configuration says how many there are, by numbers that set no other size."""
    search, axes = Search(model), dict[str, set[tuple[str, int]]]()
    for group in graph.groups:
        if group.kind not in SCALING:
            axes.setdefault(group.kind, set()).update(group.footprint)
    return [kind for kind, touched in sorted(axes.items()) if touched <= search.settable(touched)]


def _as_stated(pruned: nn.Module, model: nn.Module, plan: Plan, graph: Graph) -> Configured:
    search, changes = Search(pruned), plan.configuration
    if changes and search.fits(changes):
        return _told(pruned, changes)
    if not search.solutions():  # as `prune` found, with verification
        return _undescribed(pruned, search.obstacle, _remedy(model, plan, graph))
    why = search.misfit or "Without verification nothing shows that it computes the same."
    remedy = _remedy(model, plan, graph)
    return Configured(
        why=f"The configuration of the {type(pruned).__name__} is left as it was, without verification. {why}",
        fix=f"Save it with kirsch.save, or {remedy}{' and ' * bool(remedy)}prune with verify=True.",
    )


def _told(pruned: nn.Module, changes: Numbers) -> Configured:
    if not changes:
        return Configured()
    note = f"config: {_in_words(pruned, changes)}; save_pretrained holds it."
    tell(pruned, built(pruned, changes, "meta"))
    return Configured(changes, (note,))


def _in_words(model: nn.Module, changes: Numbers) -> str:
    today = numbers(model.config)
    return ", ".join(f"{path} {today.get(path)} -> {number}" for path, number in changes.items())


def otherwise(pruned: nn.Module, changes: Numbers, args: Any, options: Any) -> str:
    """What the model that a configuration builds does otherwise than the pruned one, in words; "" if nothing.

    Both get the same noise on what is stored, since parameters that start at zero would hide a difference, and must
    then return the same bits. So must the pruned model when it has the new configuration itself.
    """
    noise = noise_of(pruned)
    own = copy_of(pruned).eval()

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        return drawing_alike(lambda: run(model, args, options))

    def differs() -> bool:
        with contextlib.suppress(Exception):  # one number alone may not fit the others
            return distance(before, outputs(own)) != 0
        return False

    with quietly():
        try:
            anew = built(pruned, changes, next(pruned.parameters()).device).eval()
            state = {
                name: value.detach() + noise[id(value)].to(value) if id(value) in noise else value
                for name, value in pruned.state_dict(keep_vars=True).items()
            }
            own.load_state_dict(state)
            anew.load_state_dict(state)
            _convert_alike(anew, own)
            before = outputs(own)
            tell(own, anew)
            if distance(before, outputs(own)) != 0:
                return "the forward of the pruned model reads its configuration"
            if distance(before, outputs(anew)) != 0:
                return _cause(own, anew, differs)
        except Exception as error:  # noqa: BLE001 - whatever the model's own code raises
            return error_text(error).rstrip(".")
    return ""


def _convert_alike(anew: nn.Module, own: nn.Module) -> None:
    """Give the buffers of a model built anew the types to which the other was converted as a whole, `model.half()`."""
    for path, module in anew.named_modules():
        for name, value in own.get_submodule(path).named_buffers(recurse=False):
            setattr(module, name, module.get_buffer(name).to(value.dtype))


def _cause(own: nn.Module, anew: nn.Module, differs: Callable[[], bool]) -> str:
    """The number in the modules that matters and that a model built anew has otherwise, in words."""
    tried = set()
    for path, module in anew.named_modules():
        mine = own.get_submodule(path)
        for name, number in vars(module).items():
            today = getattr(mine, name, number)
            if type(number) in (int, float) and today != number and (type(module), name) not in tried:
                tried.add((type(module), name))
                setattr(mine, name, number)
                if differs():
                    return f"{path}.{name} is {today:.4g} and would be {number:.4g}".removeprefix(".")
                setattr(mine, name, today)
    buffers = dict(own.named_buffers())
    others = [name for name, value in anew.named_buffers() if not torch.equal(value, buffers[name])]
    return f"{others[0]} would have other values" if others else "its outputs differ"


def tell(model: nn.Module, anew: nn.Module) -> None:
    """Give each module the configuration that its counterpart in a model built anew has."""
    for path, module in anew.named_modules():
        if "config" in vars(module):
            model.get_submodule(path).config = module.config
