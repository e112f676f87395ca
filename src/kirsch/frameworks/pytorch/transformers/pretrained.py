"""Errors of `save_pretrained` and `push_to_hub` for pruned models whose checkpoint could not be loaded.

A checkpoint has weights and a configuration, from which `from_pretrained` builds the model. If no configuration
describes a pruned model, `from_pretrained` builds other sizes. It then raises an error, or, with
`ignore_mismatched_sizes=True`, silently initializes weights at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

METHODS = ("save_pretrained", "push_to_hub")


@dataclass(frozen=True)
class Refusal:
    """Object that replaces a method of one model and raises an error when it is called.

    It is an attribute of the instance, so that copies, pickles and models of `kirsch.distill` keep it. It contains only
    strings, so that it can be copied and pickled.

    Args:
        method: name of the method.
        model: name of the model's class.
        why, fix: texts of the error.
    """

    method: str
    model: str
    why: str
    fix: str

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Raise the error."""
        raise UsageError(
            f"{self.method} of this pruned {self.model} would write a checkpoint that from_pretrained cannot load.",
            self.why,
            self.fix,
        )


def savers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of each module with `save_pretrained`: the model itself, with path "", and submodules."""
    return ((path, module) for path, module in model.named_modules() if _has(module, "save_pretrained"))


def _has(module: nn.Module, method: str) -> bool:
    return callable(getattr(module, method, None))


def refuse(module: nn.Module, why: str, fix: str) -> None:
    """Make `save_pretrained` and `push_to_hub` of a module raise an error."""
    for method in METHODS:
        if _has(module, method):
            vars(module)[method] = Refusal(method, type(module).__name__, why, fix)


def allow(module: nn.Module) -> None:
    """Undo `refuse`."""
    for method in METHODS:
        if isinstance(vars(module).get(method), Refusal):
            del vars(module)[method]


def refused(module: nn.Module) -> bool:
    """Return whether `save_pretrained` of a module raises the error that `refuse` sets."""
    return isinstance(vars(module).get("save_pretrained"), Refusal)
