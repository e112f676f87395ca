"""Scales of attention that are attributes of a transformers model.

A model that is built from the configuration of the pruned model computes such a scale from the new width. When the
width is cut, the attribute therefore gets its new value, and the rows of the weights that compute the queries are
multiplied, so that the product stays the same.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.fx.node import Node

from kirsch.frameworks.pytorch.analysis.attention import QueryScaling, name_of, query_scaling
from kirsch.frameworks.pytorch.transformers.blueprint import has_configuration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from kirsch.frameworks.pytorch.analysis.traced import Traced


def attribute_scale(width: int, present: float, present_width: int) -> float:
    """Return the scale for a width by the formula that gives the present scale exactly.

    The formulas differ in the last bit of the result.
    """
    formulas = (lambda n: n**-0.5, lambda n: 1 / math.sqrt(n))
    return next((formula for formula in formulas if formula(present_width) == present), formulas[0])(width)


def attribute_scalings(model: nn.Module, traced: Traced) -> Iterator[QueryScaling]:
    """Yield the attentions whose scale is an attribute of a module and equals width ** -0.5 of the queries.

    There are none in a model without a configuration, whose attributes need not follow the width.
    """
    modules = dict(model.named_modules())
    for node in traced.program.graph.nodes if has_configuration(model) else ():
        query, scale = _explicit_scale(node)
        axes = getattr(traced.states.get(query), "axes", None) if isinstance(query, Node) else None
        if not axes or axes[-1] is None or not math.isclose(scale, len(axes[-1]) ** -0.5, rel_tol=1e-12):
            continue
        path = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))[0]
        names = [name for name, value in vars(modules.get(path, model)).items() if type(value) is float]
        names = [name for name in names if getattr(modules.get(path, model), name) == scale]
        found = query_scaling(node, axes[-1], traced.slots, query) if len(names) == 1 else None
        if found is not None:
            yield replace(found, attribute=(path, names[0]))


def _explicit_scale(node: Node) -> tuple[Any, float]:
    """Return the queries and the scale of a product of queries and keys with a scale; None and 0 for other nodes."""
    if node.op != "call_function":
        return None, 0.0
    name = name_of(node)
    if name == "scaled_dot_product_attention":
        return node.args[0], float(node.kwargs.get("scale") or 0.0)  # type: ignore[arg-type]
    if name == "baddbmm":
        return node.args[1], float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    if name == "mul" and isinstance(node.args[0], Node) and type(node.args[1]) is float:
        product = node.args[0]
        if name_of(product) in ("matmul", "bmm") and len(product.users) == 1:
            return product.args[0], node.args[1]
    return None, 0.0
