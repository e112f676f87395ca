"""`save_pretrained` and `push_to_hub` of pruned models: an error where the checkpoint could not be loaded.

Such a checkpoint is weights and a configuration, and `from_pretrained` builds the model from the configuration. After a
cut that no configuration describes, it would build other sizes: an error, or, with `ignore_mismatched_sizes=True`,
weights drawn at random without a word.
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
    """Raises an error in the place of a method of one model.

    It is an attribute of the instance, so that copies, `kirsch.distill` and pickles keep it, and holds nothing but
    text, so that it is copied and pickled like any setting.

    Args:
        method: the name of the method.
        model: the class of the model.
        why, fix: for the error.
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
    """Path and module of each part of a model that has `save_pretrained`, the whole ("") first."""
    return ((path, module) for path, module in model.named_modules() if _has(module, "save_pretrained"))


def _has(module: nn.Module, method: str) -> bool:
    return callable(getattr(module, method, None))


def refuse(module: nn.Module, why: str, fix: str) -> None:
    """Make `save_pretrained` and `push_to_hub` of a module raise an error."""
    for method in METHODS:
        if _has(module, method):
            vars(module)[method] = Refusal(method, type(module).__name__, why, fix)


def allow(module: nn.Module) -> None:
    """Take back what `refuse` did, if it did."""
    for method in METHODS:
        if isinstance(vars(module).get(method), Refusal):
            del vars(module)[method]


def refused(module: nn.Module) -> bool:
    """Return whether `save_pretrained` of a module raises the error."""
    return isinstance(vars(module).get("save_pretrained"), Refusal)
