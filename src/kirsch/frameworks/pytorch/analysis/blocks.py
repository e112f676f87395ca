"""Residual blocks: modules whose output can be replaced by what they are given, found on the traced operations.

A block is a module that is called once, from whose output a path of additions, and of operations that keep each number
in its place or normalize, leads back to one tensor that it is given, of the same shape. Its own parameters lie in the
branches that are added on that path. What it is given besides (masks, positions) does not depend on that tensor.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kirsch.frameworks.pytorch.analysis.program import name_of, shapes_of
from kirsch.frameworks.pytorch.analysis.regions import exits, regions
from kirsch.frameworks.pytorch.inference.predict import arguments, inference, run
from kirsch.frameworks.pytorch.modules.interpreted import Part, part_in, tapped
from kirsch.frameworks.pytorch.modules.submodule import part_of, shared_with_rest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from numpy.typing import NDArray
    from torch.fx import Node

    from kirsch.frameworks.pytorch.analysis.provenance import Calls

_CARRYING = """
relu relu6 gelu silu mish elu leaky_relu hardswish hardtanh clamp dropout native_dropout clone contiguous alias detach
to _to_copy view _unsafe_view reshape flatten unflatten permute transpose squeeze unsqueeze layer_norm rms_norm
batch_norm _native_batch_norm_legit_no_training getitem group_norm instance_norm
"""
CARRYING = frozenset(_CARRYING.split())
"""Operations that a path from the output of a block to its input may lead through, by their first operand."""


@dataclass(frozen=True)
class Block:
    """A module that may be left out.

    Args:
        path: of the module.
        entry: what it is given and hands on when it is left out.
        exit: what it puts out.
        argument: place or keyword of the entry among the arguments of its call.
        plain: whether the entry is its one argument and the exit all that it gives back.
        features: axis of the exit that holds channels; None if that is not known.
        part: where it lies in the graph that runs it, if a `torch.fx` graph does and never calls the module.
    """

    path: str
    entry: Node
    exit: Node
    argument: int | str
    plain: bool
    features: int | None
    part: Part | None = None

    def entry_of(self, args: tuple[Any, ...], options: dict[str, Any]) -> torch.Tensor:
        """The entry among the arguments of a call."""
        entry: torch.Tensor = args[self.argument] if isinstance(self.argument, int) else options[self.argument]
        return entry


def find(model: nn.Module, states: Mapping[Node, Any], held: Collection[str], calls: Calls) -> tuple[Block, ...]:
    """The blocks of a model, in its order; of two within each other that which has additions of its own.

    Args:
        model: that was traced.
        states: the labels of the result of each node of its program, in their order.
        held: names of the nodes that are parameters, buffers and constants.
        calls: what was seen while it was traced.
    """
    place = {node: number for number, node in enumerate(states)}
    within = regions(states)
    found: dict[str, Block] = {}
    for path, module in reversed([*model.named_modules()]):  # the inner ones first
        if not path or path not in within or len(calls.entered.get(path, ())) > 1:
            continue
        if path in calls.entered:
            block, way = _block(path, within[path], place, states, held, calls) or (None, [])
        else:
            block, way = _block_of_graph(model, path, within[path], place, states, held) or (None, [])
        if block is None or not any(True for _ in module.parameters()) or shared_with_rest(model, path):
            continue
        if block.part is None and not block.plain and not _in_row(model, path):
            continue
        inner = [name for name in found if name.startswith(f"{path}.")]
        covered = {node for name in inner for node in within[name]}
        same = block.part is not None and [(found[name].entry, found[name].exit) for name in inner] == [
            (block.entry, block.exit)  # a graph does not tell which of two modules adds
        ]
        if inner and not same and not any(_adds(node) and node not in covered for node in way):
            continue  # a row of blocks
        for name in inner:
            del found[name]
        found[path] = block
    return tuple(found[path] for path, _ in model.named_modules() if path in found)


def _block(
    path: str,
    region: list[Node],
    place: Mapping[Node, int],
    states: Mapping[Node, Any],
    held: Collection[str],
    calls: Calls,
) -> tuple[Block, list[Node]] | None:
    """The module as a block, and the way from its output back to its input; None if it is none."""
    found = _through(region, place, states, held)
    if found is None:
        return None
    *way, entry = found
    call = calls.entered[path][0]
    origin = (entry.meta.get("custom") or {}).get("kirsch_call", -1)
    shape = shapes_of(entry)[0]
    alike = [given for given in call.tensors if given.shape == shape]
    own = [given for given in alike if given.origin == origin] or alike
    if len(own) != 1 or call.result == "other":
        return None
    plain = own[0].argument == 0 and call.alone and call.result == "tensor"
    return Block(path, entry, way[0], own[0].argument, plain, _features(states[way[0]])), way


def _block_of_graph(
    model: nn.Module,
    path: str,
    region: list[Node],
    place: Mapping[Node, int],
    states: Mapping[Node, Any],
    held: Collection[str],
) -> tuple[Block, list[Node]] | None:
    """The same for a module that a `torch.fx` graph runs operation by operation.

    What follows the module and has no parameters, such as a pooling, may have been counted to its region: without it
    the module may be a block.
    """
    region = list(region)
    found = _through(region, place, states, held)
    while found is None and region and not any(source.name in held for source in region[-1].all_input_nodes):
        region.pop()
        found = _through(region, place, states, held)
    if found is None:
        return None
    *way, entry = found
    if not any(entry in node.all_input_nodes for node in region if node is not way[-1]):
        return None  # a branch, with the addition of the other one counted to it
    part = part_in(model, region, entry, way[0])
    return None if part is None else (Block(path, entry, way[0], 0, True, _features(states[way[0]]), part), way)


def _through(
    region: list[Node], place: Mapping[Node, int], states: Mapping[Node, Any], held: Collection[str]
) -> list[Node] | None:
    """The way from the one output of a region back to its entry, on which nothing else that it takes depends."""
    inside = set(region)
    ends = exits(region)
    found = _way_back(ends[0], inside) if len(ends) == 1 else None
    if found is None:
        return None
    axes = {_features(states[node]) for node in (found[0], found[-1])} - {None}
    if len(axes) > 1:  # of equal sizes, but turned
        return None
    given = {source for node in region for source in node.all_input_nodes} - inside
    others = [node for node in given if node is not found[-1] and node.name not in held]
    return None if any(_depends(node, found[-1], place) for node in others) else found


def _features(state: Any) -> int | None:
    labeled = [axis for axis, labels in enumerate(state.axes) if labels is not None]
    return labeled[0] if len(labeled) == 1 else None


def _adds(node: Node) -> bool:
    return name_of(node) == "aten.add" and len(node.all_input_nodes) > 1


def _way_back(exit_: Node, inside: set[Node]) -> list[Node] | None:
    """The shortest way from the output of a region by additions and what carries to a like tensor outside."""
    shape = shapes_of(exit_)
    before: dict[Node, Node | None] = {exit_: None}
    waiting = deque([exit_])
    while waiting:
        node = waiting.popleft()
        if node not in inside:
            way = [node]
            while (following := before[way[-1]]) is not None:
                way.append(following)
            way.reverse()
            if shapes_of(node) == shape and any(_adds(step) for step in way[:-1]):
                return way
            continue
        if node.op != "call_function":
            continue
        sources = node.all_input_nodes if _adds(node) else []
        if name_of(node).removeprefix("aten.") in CARRYING:
            sources = node.all_input_nodes[:1]
        for source in sources:
            if source not in before:
                before[source] = node
                waiting.append(source)
    return None


def _depends(node: Node, on: Node, place: Mapping[Node, int]) -> bool:
    """Whether a node is computed from another."""
    seen, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source is on:
                return True
            if source not in seen and place[source] > place[on]:
                seen.add(source)
                waiting.append(source)
    return False


def _in_row(model: nn.Module, path: str) -> bool:
    """Whether a module is one of a list of modules of one class."""
    parent = part_of(model, path.rpartition(".")[0])
    return isinstance(parent, (nn.ModuleList, nn.Sequential)) and len({type(child) for child in parent}) == 1


class Runner:
    """Fulfills `kirsch.graph.graph.ModelRunner`."""

    def __init__(self, whole: nn.Module, model: nn.Module, blocks: Collection[Block]) -> None:
        """`whole` is run; the blocks are those of `model`, which may be a part of it."""
        self._whole = whole
        self._model = model
        self._blocks = {block.path: block for block in blocks}

    def outputs(self, inputs: Any, without: Collection[str] = ()) -> list[NDArray[Any]]:
        """See there."""
        with skipping(self._model, [self._blocks[path] for path in without]):
            found = repeatable(self._whole, *arguments(inputs))
        return [value.double().cpu().numpy() for value in found if value.is_floating_point()]

    def passed(self, inputs: Any, see: Callable[[str, NDArray[Any], NDArray[Any]], None]) -> None:
        """See there."""

        def features_last(value: torch.Tensor, axis: int | None) -> NDArray[Any]:
            value = value.flatten(1) if axis is None else value.movedim(axis, -1)
            return value.detach().double().cpu().numpy()

        def saw(block: Block, entry: torch.Tensor, out: torch.Tensor) -> None:
            see(block.path, *(features_last(value, block.features) for value in (entry, out)))

        with _tapped(self._model, self._blocks.values(), saw):
            repeatable(self._whole, *arguments(inputs))


Tap = Callable[[Block, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""Block, its entry, its output → what takes the place of the output, if anything."""


@contextlib.contextmanager
def _tapped(model: nn.Module, blocks: Collection[Block], tap: Tap) -> Iterator[None]:
    """Call `tap` at the end of each of these blocks whenever the model runs."""

    def hook(block: Block) -> Any:
        def ended(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], out: Any) -> Any:
            several = not isinstance(out, torch.Tensor)
            new = tap(block, block.entry_of(args, options), out[0] if several else out)
            return type(out)([new, *out[1:]]) if several and new is not None else new

        return ended

    with contextlib.ExitStack() as stack:
        for block in blocks:
            if block.part is None:
                module = model.get_submodule(block.path)
                stack.callback(module.register_forward_hook(hook(block), with_kwargs=True).remove)
        parts: dict[str, dict[Part, Callable[..., Any]]] = {}
        for block in blocks:
            if block.part is not None:
                parts.setdefault(block.part.path, {})[block.part] = functools.partial(tap, block)
        for path, taps in parts.items():
            stack.enter_context(tapped(model.get_submodule(path), taps))
        yield


def skipping(model: nn.Module, blocks: Collection[Block]) -> contextlib.AbstractContextManager[None]:
    """The model with these blocks putting out what they are given."""
    return _tapped(model, blocks, lambda _, entry, __: entry)


def repeatable(model: nn.Module, args: Any, options: Any) -> list[torch.Tensor]:
    """The outputs in inference mode, with the same random numbers each time."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with inference(model), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return run(model, args, options)
