"""Numbers of layers that the configuration of a model can state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch.frameworks.pytorch.io.vision import import_beside
from kirsch.frameworks.pytorch.modules.tuners import path_of_base_model
from kirsch.frameworks.pytorch.transformers.blueprint import build, numbers
from kirsch.graph.configuration import ConfiguredDepth

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from kirsch.graph.graph import Graph


def configured_depths(model: nn.Module, graph: Graph) -> list[ConfiguredDepth]:
    """Return the numbers that count the elements of a list whose elements are residual blocks.

    A number counts a list if a model that is built with the number minus 1 lacks the tensors of the last element, and
    no others, and if the cache of `generate` still fits the layers: transformers 5.24 gives the cache of a T5 as many
    entries as its encoder has layers.

    Args:
        model: the model without adapters.
        graph: its graph, which may have adapters.
    """
    found = []
    traced: nn.Module = graph.model
    prefix = path_of_base_model(traced)
    for path, blocks in _lists(graph).items():
        length = len(traced.get_submodule(path))  # type: ignore[arg-type]
        names = set(model.state_dict())
        last = f"{path.removeprefix(prefix)}.{length - 1}."
        without_last = {name for name in names if not name.startswith(last)}
        for number, value in numbers(model.config).items():
            if value == length and type(value) is int and _builds_with(model, {number: length - 1}, without_last):
                elements = tuple(f"{path}.{index}" for index in range(length))
                types = tuple(_type(traced.get_submodule(element)) for element in elements)
                found.append(ConfiguredDepth(number, length, elements, tuple(blocks), types))
                break
    return found


def _type(module: nn.Module) -> str:
    """Return the classes, words and None values in the attributes of a module and its parts, as one text."""
    parts = []
    for path, part in module.named_modules():
        words = {name: value for name, value in vars(part).items() if value is None or type(value) in (str, bool)}
        plain = {name: value for name, value in words.items() if not name.startswith("_")}
        parts.append(f"{path} {type(part).__name__} {sorted(plain.items(), key=str)}")
    return "; ".join(parts)


def _lists(graph: Graph) -> dict[str, list[str]]:
    """Return the removable elements of each list of residual blocks, by path of the list."""
    lists: dict[str, list[str]] = {}
    for block in graph.blocks:
        owner, _, index = block.rpartition(".")
        if owner and index.isdecimal():
            lists.setdefault(owner, []).append(block)
    return lists


def _builds_with(model: nn.Module, changes: Mapping[str, float], names: set[str]) -> bool:
    """Return whether a model that is built with changed numbers has these tensors only, and a cache for its layers."""
    try:
        changed = build(model, changes, "meta")
    except Exception:  # noqa: BLE001 - the code of the model can raise any exception if numbers do not fit
        return False
    return set(changed.state_dict()) == names and (_has_cache(changed) or not _has_cache(model))


def _has_cache(model: nn.Module) -> bool:
    """Return whether the cache of `generate` has an entry for each layer of the decoder."""
    try:
        decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
        config: Any = model.config
        entries = len(import_beside("transformers").DynamicCache(config=config.get_text_config(decoder=True)).layers)
    except Exception:  # noqa: BLE001 - models without a decoder or a cache, and other versions of transformers
        return False
    layers = [getattr(module, "layer_idx", None) for module in decoder.modules()]
    return all(index < entries for index in layers if isinstance(index, int))
