"""Drop residual blocks: remove them from their list or graph, or replace them with `nn.Identity`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.analysis.blocks import repeatable_outputs, skipping
from kirsch.frameworks.pytorch.modules.interpreted import Part, remove_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import torch

    from kirsch.frameworks.pytorch.analysis.blocks import ResidualBlock


def drop(model: nn.Module, blocks: Collection[ResidualBlock], args: Any, options: Any) -> dict[str, str]:
    """Drop residual blocks from a model, in place.

    A block of a `torch.fx` graph is removed from the graph. A block in a list is removed from the list, and the
    following elements are renumbered. A block that `forward` needs in its list, or that is not in a list, becomes
    `nn.Identity`.

    Args:
        model: the copy to change.
        blocks: residual blocks that `analysis.blocks` found.
        args, options: example inputs.

    Returns:
        Old path of each remaining module → its new path.

    Raises:
        ModelError: a block can neither be removed nor be replaced with an identity.
    """
    modules = dict(model.named_modules())  # kept alive, because an id is only unique while its object exists
    old_paths = {id(module): path for path, module in modules.items()}
    with skipping(model, blocks):
        expected = repeatable_outputs(model, args, options)
    _remove_from_graphs(model, blocks)
    remaining = [block for block in blocks if block.part is None]
    parents = dict.fromkeys(block.path.rpartition(".")[0] for block in remaining)
    for parent in sorted(parents, key=lambda path: -path.count(".")):  # deepest first: a removal renames inner paths
        children = [block for block in remaining if block.path.rpartition(".")[0] == parent]
        remaining = [block for block in remaining if block not in children]
        container = model.get_submodule(parent)
        names = [block.path.rpartition(".")[2] for block in children]
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            undo = _remove_from_list(container, names)
            with skipping(model, remaining):
                if _same(expected, _outputs_or_none(model, args, options)):
                    continue
            undo()
        for block, name in zip(children, names, strict=True):
            if not block.plain:
                raise ModelError(
                    f"The block {block.path!r} of {type(model).__name__} cannot be dropped.",
                    "The model fails or computes another result when the block is removed from its list, and the "
                    "block takes more than one argument, so that nn.Identity cannot replace it.",
                    "Exclude the block.",
                )
            setattr(container, name, nn.Identity().train(modules[block.path].training))
    return {old_paths[id(module)]: path for path, module in model.named_modules() if id(module) in old_paths}


def _remove_from_graphs(model: nn.Module, blocks: Collection[ResidualBlock]) -> None:
    """Remove the blocks that a `torch.fx` graph runs, and their parameters."""
    parts: dict[str, list[Part]] = {}
    for block in blocks:
        if block.part is not None:
            parts.setdefault(block.part.path, []).append(block.part)
    for path, graph_parts in parts.items():
        remove_parts(model.get_submodule(path), graph_parts)
    for block in blocks:
        if block.part is not None:
            holder, _, name = block.path.rpartition(".")
            delattr(model.get_submodule(holder), name)


def _remove_from_list(container: nn.Module, names: Collection[str]) -> Callable[[], None]:
    """Remove elements of a list and renumber the others. Return a function that undoes both."""
    children = dict(container.named_children())
    index_attributes = _index_attributes(list(children.values()))
    kept = {name: child for name, child in children.items() if name not in names}
    numbered = all(name.isdecimal() for name in children)
    _set_children(container, {str(index) if numbered else name: kept[name] for index, name in enumerate(kept)})
    for index, child in enumerate(kept.values()):
        _set_index(child, index, index_attributes)

    def undo() -> None:
        _set_children(container, children)
        for index, child in enumerate(children.values()):
            _set_index(child, index, index_attributes)

    return undo


def _set_children(container: nn.Module, children: Mapping[str, nn.Module]) -> None:
    for name in [name for name, _ in container.named_children()]:
        delattr(container, name)
    for name, child in children.items():
        container.add_module(name, child)


def _index_attributes(children: Sequence[nn.Module]) -> set[tuple[str, str]]:
    """Return (path, attribute) pairs that hold the index of each list element, such as the `layer_idx` of a KV cache.

    Empty for fewer than two elements, which cannot show a pattern.
    """
    candidates = [
        {
            (path, attribute)
            for path, module in child.named_modules()
            for attribute, value in vars(module).items()
            if type(value) is int and value == index
        }
        for index, child in enumerate(children)
    ]
    return candidates[0].intersection(*candidates[1:]) if len(candidates) > 1 else set()


def _set_index(child: nn.Module, index: int, attributes: Collection[tuple[str, str]]) -> None:
    for path, attribute in attributes:
        setattr(child.get_submodule(path), attribute, index)


def _outputs_or_none(model: nn.Module, args: Any, options: Any) -> list[torch.Tensor]:
    """Return the outputs; an empty list if the model raises an exception."""
    try:
        return repeatable_outputs(model, args, options)
    except Exception:  # noqa: BLE001 - the code of the model can raise any exception
        return []


def _same(expected: list[torch.Tensor], found: list[torch.Tensor]) -> bool:
    """Return whether two runs return equal tensors; on the meta device, equal shapes."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return False
    return all(
        a.is_meta or bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(expected, found, strict=True)
    )
