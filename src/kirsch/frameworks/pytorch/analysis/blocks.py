"""Residual blocks: modules whose output can be replaced by their input, found from the traced operations.

A residual block is a module that is called once. A path of additions, normalizations, activations and operations that
only move values leads from the output of the module back to an input tensor of the same shape, through at least one
addition. Other inputs of the module (masks, positions) do not depend on that input tensor. The module has parameters,
and shares none of them with the rest of the model.
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
from kirsch.frameworks.pytorch.inference.predict import inference, run
from kirsch.frameworks.pytorch.modules.interpreted import Part, part_in, tapped
from kirsch.frameworks.pytorch.modules.submodule import part_of, shared_with_rest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch.fx import Node

    from kirsch.frameworks.pytorch.analysis.provenance import RecordedCalls

_CARRYING = """
relu relu6 gelu silu mish elu leaky_relu hardswish hardtanh clamp dropout native_dropout clone contiguous alias detach
to _to_copy view _unsafe_view reshape flatten unflatten permute transpose squeeze unsqueeze layer_norm rms_norm
batch_norm _native_batch_norm_legit_no_training getitem group_norm instance_norm
"""
CARRYING = frozenset(_CARRYING.split())
"""Operations on the path from the output of a block to its input; the path continues at their first operand."""


@dataclass(frozen=True)
class ResidualBlock:
    """A module that can be removed.

    Args:
        path: path of the module.
        entry: node of the input that replaces the output when the block is removed.
        exit: node of the output.
        argument: position or keyword of the entry among the arguments of the module.
        plain: whether the entry is the only argument of the module, and the exit is its only result.
        features: axis of the exit that holds channels; None if it is unknown.
        part: the block's part of the graph, if a `torch.fx` graph runs the operations and never calls the module.
    """

    path: str
    entry: Node
    exit: Node
    argument: int | str
    plain: bool
    features: int | None
    part: Part | None = None

    def entry_of(self, args: tuple[Any, ...], options: dict[str, Any]) -> torch.Tensor:
        """Return the entry among the arguments of a call."""
        entry: torch.Tensor = args[self.argument] if isinstance(self.argument, int) else options[self.argument]
        return entry


class _Program:
    """The traced operations in which blocks are searched.

    Args:
        states: labels of the result of each node, in the order of the program.
        constants: names of the nodes that are parameters, buffers and constants.
    """

    def __init__(self, states: Mapping[Node, Any], constants: Collection[str]) -> None:
        self.states = states
        self.constants = constants
        self.index = {node: number for number, node in enumerate(states)}


def find(
    model: nn.Module, states: Mapping[Node, Any], constants: Collection[str], recorded: RecordedCalls
) -> tuple[ResidualBlock, ...]:
    """Return the residual blocks of a model, in the order of its modules.

    Of two nested blocks, the outer one is returned if it has additions outside of the inner one.

    Args:
        model: the traced model.
        states: labels of the result of each node of the traced program, in the order of the program.
        constants: names of the nodes that are parameters, buffers and constants.
        recorded: the calls of the traced forward pass.
    """
    program = _Program(states, constants)
    region_of = regions(states)
    blocks: dict[str, ResidualBlock] = {}
    for path, module in reversed([*model.named_modules()]):  # inner modules first
        if not path or path not in region_of or len(recorded.module_calls.get(path, ())) > 1:
            continue
        if path in recorded.module_calls:
            block, way = _called_block(path, region_of[path], program, recorded) or (None, [])
        else:
            block, way = _block_of_graph(model, path, region_of[path], program) or (None, [])
        if block is None or not any(True for _ in module.parameters()) or shared_with_rest(model, path):
            continue
        if block.part is None and not block.plain and not _in_list(model, path):
            continue
        inner = [name for name in blocks if name.startswith(f"{path}.")]
        covered = {node for name in inner for node in region_of[name]}
        same = block.part is not None and [(blocks[name].entry, blocks[name].exit) for name in inner] == [
            (block.entry, block.exit)  # a graph does not show which of two nested modules adds
        ]
        if inner and not same and not any(_adds(node) and node not in covered for node in way):
            continue  # the outer module is a sequence of blocks
        for name in inner:
            del blocks[name]
        blocks[path] = block
    return tuple(blocks[path] for path, _ in model.named_modules() if path in blocks)


def _called_block(
    path: str, region: list[Node], program: _Program, recorded: RecordedCalls
) -> tuple[ResidualBlock, list[Node]] | None:
    """Return a module as a block, and the path from its output to its input; None if the module is not a block."""
    path_back = _path_through(region, program)
    if path_back is None:
        return None
    *way, entry = path_back
    call = recorded.module_calls[path][0]
    origin = (entry.meta.get("custom") or {}).get("kirsch_call", -1)
    shape = shapes_of(entry)[0]
    same_shape = [argument for argument in call.tensors if argument.shape == shape]
    candidates = [argument for argument in same_shape if argument.origin == origin] or same_shape
    if len(candidates) != 1 or call.result == "other":
        return None
    argument = candidates[0].argument
    plain = argument == 0 and call.single and call.result == "tensor"
    return ResidualBlock(path, entry, way[0], argument, plain, _feature_axis(program.states[way[0]])), way


def _block_of_graph(
    model: nn.Module, path: str, region: list[Node], program: _Program
) -> tuple[ResidualBlock, list[Node]] | None:
    """Return block and path as `_called_block` does, for a module whose operations a `torch.fx` graph runs one by one.

    Operations without parameters that follow the module, such as a pooling, may be attributed to the module. They are
    removed from the end of its region until a block is found.
    """
    region = list(region)
    path_back = _path_through(region, program)
    while (
        path_back is None and region and not any(node.name in program.constants for node in region[-1].all_input_nodes)
    ):
        region.pop()
        path_back = _path_through(region, program)
    if path_back is None:
        return None
    *way, entry = path_back
    if not any(entry in node.all_input_nodes for node in region if node is not way[-1]):
        return None  # the module is one of two branches, and their addition was attributed to it
    part = part_in(model, region, entry, way[0])
    if part is None:
        return None
    return ResidualBlock(path, entry, way[0], 0, True, _feature_axis(program.states[way[0]]), part), way


def _path_through(region: list[Node], program: _Program) -> list[Node] | None:
    """Return the path from the only output of a region back to its entry. A region is the operations of a module.

    None if the region has several outputs, if there is no such path, or if another input depends on the entry.
    """
    inside = set(region)
    ends = exits(region)
    way = _path_back(ends[0], inside) if len(ends) == 1 else None
    if way is None:
        return None
    axes = {_feature_axis(program.states[node]) for node in (way[0], way[-1])} - {None}
    if len(axes) > 1:  # equal shapes with transposed axes
        return None
    inputs = {source for node in region for source in node.all_input_nodes} - inside
    others = [node for node in inputs if node is not way[-1] and node.name not in program.constants]
    return None if any(_depends(node, way[-1], program.index) for node in others) else way


def _feature_axis(state: Any) -> int | None:
    """Return the only axis of a tensor that has labels; None if there are several or none."""
    labeled = [axis for axis, labels in enumerate(state.axes) if labels is not None]
    return labeled[0] if len(labeled) == 1 else None


def _adds(node: Node) -> bool:
    return name_of(node) == "aten.add" and len(node.all_input_nodes) > 1


def _path_back(exit_: Node, inside: set[Node]) -> list[Node] | None:
    """Return the shortest path from the output of a region to a tensor of the same shape outside the region.

    The path follows additions and `CARRYING` operations, and has at least one addition.
    """
    shape = shapes_of(exit_)
    previous: dict[Node, Node | None] = {exit_: None}
    waiting = deque([exit_])
    while waiting:
        node = waiting.popleft()
        if node not in inside:
            way = [node]
            while (following := previous[way[-1]]) is not None:
                way.append(following)
            way.reverse()
            if shapes_of(node) == shape and any(_adds(each) for each in way[:-1]):
                return way
            continue
        if node.op != "call_function":
            continue
        sources = node.all_input_nodes if _adds(node) else []
        if name_of(node).removeprefix("aten.") in CARRYING:
            sources = node.all_input_nodes[:1]
        for source in sources:
            if source not in previous:
                previous[source] = node
                waiting.append(source)
    return None


def _depends(node: Node, on: Node, index: Mapping[Node, int]) -> bool:
    """Return whether a node is computed from another."""
    seen, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source is on:
                return True
            if source not in seen and index[source] > index[on]:
                seen.add(source)
                waiting.append(source)
    return False


def _in_list(model: nn.Module, path: str) -> bool:
    """Return whether a module is an element of a list of modules of one class."""
    parent = part_of(model, path.rpartition(".")[0])
    return isinstance(parent, (nn.ModuleList, nn.Sequential)) and len({type(child) for child in parent}) == 1


Tap = Callable[[ResidualBlock, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""Function of a block, its entry and its output that returns a new output, or None to keep the output."""


@contextlib.contextmanager
def tapped_blocks(model: nn.Module, blocks: Collection[ResidualBlock], tap: Tap) -> Iterator[None]:
    """Call `tap` at the end of each of these blocks whenever the model runs."""

    def hook(block: ResidualBlock) -> Any:
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


def skipping(model: nn.Module, blocks: Collection[ResidualBlock]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which these blocks of the model return their inputs."""
    return tapped_blocks(model, blocks, lambda _, entry, __: entry)


def repeatable_outputs(model: nn.Module, args: Any, options: Any) -> list[torch.Tensor]:
    """Return the outputs in inference mode, with the same random numbers in each call."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with inference(model), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return run(model, args, options)
