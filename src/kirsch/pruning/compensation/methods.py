"""The methods of compensation, and the check of their names and data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from kirsch.annotations import Fix, OneOrMore
from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.find import framework_of

if TYPE_CHECKING:
    from kirsch.graph.plan import Plan

METHODS = ("bias", "least_squares", "batch_norm")
"""Names of the methods, in the order in which they are applied."""

Compensate = (
    Annotated[
        str | Sequence[str],
        OneOrMore(),
        Fix("Give one or several of 'bias', 'least_squares' and 'batch_norm'."),
    ]
    | None
)
"""One or several names of `METHODS`."""


def methods_of(compensate: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the named methods, in the order of `METHODS`.

    Raises:
        UnknownNameError: there is no method of a name.
        UsageError: "bias" and "least_squares" are combined.
    """
    names = () if compensate is None else (compensate,) if isinstance(compensate, str) else tuple(compensate)
    for name in names:
        if name not in METHODS:
            raise UnknownNameError("compensation", name, METHODS, len(METHODS), "compensate")
    if {"bias", "least_squares"} <= set(names):
        raise UsageError(
            "`compensate` names both 'bias' and 'least_squares'.",
            "Least squares also sets the biases.",
            "Remove 'bias'.",
        )
    return tuple(name for name in METHODS if name in names)


def check_data(methods: Sequence[str], data: Any) -> None:
    """Check that data are given if and only if they are used.

    Raises:
        UsageError: data are missing, have no effect, or can be iterated over only once.
    """
    if methods and data is None:
        raise UsageError(
            "`data` of kirsch.prune is missing: `compensate` runs the model on calibration data.",
            fix="Give batches of inputs: a DataLoader, kirsch.ArrayData or a list; 256 samples suffice.",
        )
    if not methods and data is not None:
        raise UsageError(
            "`data` of kirsch.prune has no effect.",
            "It is used only by `compensate`.",
            "Remove `data`, or give compensate='least_squares'.",
        )
    if isinstance(data, Iterator):
        raise UsageError(
            f"`data` of kirsch.prune is a {type(data).__name__}, which can be iterated over only once.",
            fix="Give a DataLoader, or a list: list(data).",
        )


def check_model(methods: Sequence[str], model: Any, plan: Plan) -> None:
    """Check that the methods can be applied to a model and a plan.

    Raises:
        UsageError: the plan removes blocks, or the model has no batch normalization with running statistics.
    """
    weights = [name for name in methods if name != "batch_norm"]
    if weights and plan.blocks:
        raise UsageError(
            f"compensate={weights[0]!r} cannot be used with a plan that removes residual blocks.",
            "It changes layers that have lost inputs, and a layer after a removed block has all its inputs.",
            "Use compensate='batch_norm', or remove units and blocks by two plans.",
        )
    if "batch_norm" in methods and not framework_of(model).surgery.batch_norms(model):
        raise UsageError(
            f"compensate='batch_norm' has no effect on a {type(model).__name__}.",
            "It has no batch normalization with running statistics.",
            "Remove 'batch_norm', or use compensate='least_squares'.",
        )
