"""Residual blocks leave a model: those in a list leave it, and others become identities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.analysis.blocks import repeatable, skipping
from kirsch.frameworks.pytorch.modules.interpreted import Part, without

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import torch

    from kirsch.frameworks.pytorch.analysis.blocks import ResidualBlock


def drop(model: nn.Module, blocks: Collection[ResidualBlock], args: Any, options: Any) -> dict[str, str]:
    """Take blocks out of a model, which is changed.

    A block that a `torch.fx` graph runs leaves the graph. One that stands in a list leaves it, and what numbers the
    elements of the list is numbered anew; where the forward does not allow that, and elsewhere, it becomes
    `nn.Identity`.

    Args:
        model: the copy that is changed.
        blocks: of `find`.
        args, options: example inputs.

    Returns:
        Path of each module that is left → its path now.

    Raises:
        ModelError: a block can neither leave its list nor be an identity.
    """
    modules = dict(model.named_modules())  # kept, since an id is only unique while its module lives
    before = {id(module): path for path, module in modules.items()}
    with skipping(model, blocks):
        wanted = repeatable(model, args, options)
    _leave_graphs(model, blocks)
    left = [block for block in blocks if block.part is None]
    parents = dict.fromkeys(block.path.rpartition(".")[0] for block in left)
    for parent in sorted(parents, key=lambda path: -path.count(".")):  # leaving a list moves what lies below it
        own = [block for block in left if block.path.rpartition(".")[0] == parent]
        left = [block for block in left if block not in own]
        container = model.get_submodule(parent)
        names = [block.path.rpartition(".")[2] for block in own]
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            undo = _leave(container, names)
            with skipping(model, left):
                if _same(wanted, _attempt(model, args, options)):
                    continue
            undo()
        for block, name in zip(own, names, strict=True):
            if not block.plain:
                raise ModelError(
                    f"The block {block.path!r} of {type(model).__name__} cannot be left out.",
                    "The forward does not run without it, or computes something else then, and passes it more than "
                    "one argument.",
                    "Exclude it.",
                )
            setattr(container, name, nn.Identity().train(modules[block.path].training))
    return {before[id(module)]: path for path, module in model.named_modules() if id(module) in before}


def _leave_graphs(model: nn.Module, blocks: Collection[ResidualBlock]) -> None:
    """Take those blocks out that graphs run, and their parameters."""
    parts: dict[str, list[Part]] = {}
    for block in blocks:
        if block.part is not None:
            parts.setdefault(block.part.path, []).append(block.part)
    for path, own in parts.items():
        without(model.get_submodule(path), own)
    for block in blocks:
        if block.part is not None:
            holder, _, name = block.path.rpartition(".")
            delattr(model.get_submodule(holder), name)


def _leave(container: nn.Module, names: Collection[str]) -> Callable[[], None]:
    """Take elements out of a list and number what is left anew; gives the way back."""
    whole = dict(container.named_children())
    numbers = _numbers(list(whole.values()))
    rest = {name: child for name, child in whole.items() if name not in names}
    numbered = all(name.isdecimal() for name in whole)
    _fill(container, {str(number) if numbered else name: rest[name] for number, name in enumerate(rest)})
    for number, child in enumerate(rest.values()):
        _number(child, number, numbers)

    def undo() -> None:
        _fill(container, whole)
        for number, child in enumerate(whole.values()):
            _number(child, number, numbers)

    return undo


def _fill(container: nn.Module, children: Mapping[str, nn.Module]) -> None:
    for name in [name for name, _ in container.named_children()]:
        delattr(container, name)
    for name, child in children.items():
        container.add_module(name, child)


def _numbers(children: Sequence[nn.Module]) -> set[tuple[str, str]]:
    """(path, attribute) that holds in each element of a list its own number, if there are two elements or more.

    Such as the number of a layer by which it finds its own part of a cache.
    """
    found = [
        {
            (path, attribute)
            for path, module in child.named_modules()
            for attribute, value in vars(module).items()
            if type(value) is int and value == number
        }
        for number, child in enumerate(children)
    ]
    return found[0].intersection(*found[1:]) if len(found) > 1 else set()


def _number(child: nn.Module, number: int, numbers: Collection[tuple[str, str]]) -> None:
    for path, attribute in numbers:
        setattr(child.get_submodule(path), attribute, number)


def _attempt(model: nn.Module, args: Any, options: Any) -> list[torch.Tensor]:
    """The outputs; none if the forward fails."""
    try:
        return repeatable(model, args, options)
    except Exception:  # noqa: BLE001 - whatever the model's own code raises
        return []


def _same(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> bool:
    """Whether two runs put out the same numbers; on the meta device, the same shapes."""
    if [t.shape for t in wanted] != [t.shape for t in found]:
        return False
    return all(
        a.is_meta or bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(wanted, found, strict=True)
    )
