"""The origin of the integers in a forward pass: a module attribute, the size of a tensor, or a number in the code.

A copy of the model has `TracedInt`s in place of the integer attributes that may be sizes. While the copy is exported, a
`TorchFunctionMode` records each call of the user's code with the integers among its arguments, and stores the number of
the call in the graph nodes that the call creates. The sizes that the code reads, such as `x.shape[1]`, are `TracedInt`s
too.
"""

from __future__ import annotations

import functools
import inspect
import operator
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn
from torch.fx import traceback
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kirsch.frameworks.pytorch.analysis.integers import Comparison, LostOrigin, TracedInt
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.modules.interpreted import NUMBERS, plain_module_of, replace_integers
from kirsch.frameworks.pytorch.modules.interpreted import set_integer as set_graph_integer
from kirsch.graph.expression import Leaf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

WIDTHS = frozenset(
    [
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "groups",
        "num_features",
        "num_groups",
        "num_channels",
        "embedding_dim",
        "embed_dim",
        "num_heads",
        "head_dim",
        "hidden_size",
        "input_size",
        "proj_size",
        "normalized_shape",
        "unflattened_size",
        "padding",
    ]
)
"""Attributes of PyTorch's own layers that may count channels; others, such as strides, are never traced."""


@dataclass(frozen=True)
class SizeOf:
    """The size of an axis of a result of a call, or of a parameter or buffer.

    Args:
        call: number of the call, -1 for a parameter or buffer.
        output: index of the tensor among several results; None if the call returns one tensor.
        axis: axis of the tensor.
        name: path of the parameter or buffer, "" for a result of a call.
    """

    call: int
    output: int | None
    axis: int
    name: str = ""


@dataclass(frozen=True)
class UserCall:
    """A call in the user's code that created nodes of the graph.

    Args:
        name: name of the function, such as "view".
        arguments: positional arguments, with None in place of tensors; integers may be `TracedInt`s.
        options: keyword arguments, in the same form.
    """

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def integers(self) -> list[int]:
        """Return all integers among the arguments, in order."""
        return list(_integers((self.arguments, tuple(self.options.values()))))


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, slice):
        yield from _integers((value.start, value.stop, value.step))


@dataclass(frozen=True)
class TensorArgument:
    """A tensor argument of a module.

    Args:
        argument: position or keyword.
        origin: number of the call that returned the tensor, -1 for none.
        shape: shape of the tensor.
    """

    argument: int | str
    origin: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Args:
        tensors: the tensor arguments.
        single: whether the call has exactly one argument.
        result: kind of the result: "tensor"; "first" for a tuple or list that begins with a tensor; or "other".
    """

    tensors: tuple[TensorArgument, ...]
    single: bool
    result: str


@dataclass
class RecordedCalls:
    """The calls of one forward pass.

    Args:
        log: the calls of the user's code, by number.
        failed_in: path of the innermost module whose `forward` raised an exception, "" if none did.
        outputs: names of the output tensors of the model.
        events: traced integers that became plain numbers, and comparisons.
        module_calls: path of each module → its calls.
        origin: `id` of each tensor → number of the call that returned it, and its index among several results.
    """

    log: list[UserCall] = field(default_factory=list)
    failed_in: str = ""
    outputs: tuple[str, ...] = ()
    events: list[LostOrigin | Comparison] = field(default_factory=list)
    module_calls: dict[str, list[ModuleCall]] = field(default_factory=dict)
    origin: dict[int, tuple[int, int | None]] = field(default_factory=dict)


class CallRecorder(TorchFunctionMode):
    """Records calls, numbers their graph nodes, and returns sizes as `TracedInt`s.

    Args:
        recorded: object to which the calls are added.
        names: `id` of each parameter and buffer → its path.
    """

    def __init__(self, recorded: RecordedCalls, names: Mapping[int, str]) -> None:
        super().__init__()
        self._recorded = recorded
        self._names = names
        self._alive: list[Any] = []  # an id is only unique while its tensor lives
        self._siblings: dict[int, list[int]] = {}  # all results of a call count as read if one of them is read
        self.unread: dict[int, torch.Tensor] = {}  # results that no later call has read, by `id`

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and record one call."""
        kwargs = kwargs or {}
        name = called_name(func)
        if func in _SHAPE or name in _COUNTS:
            return self._sizes(name, func(*args, **kwargs), args, kwargs)
        if name.startswith("sym_"):  # arithmetic with sizes that depend on values
            return func(*(int(value) if isinstance(value, TracedInt) else value for value in args), **kwargs)
        if func is nn.functional.multi_head_attention_forward:
            with self:  # the function reads sizes and computes with them, like user code
                return _attention(*args, **kwargs)
        number = len(self._recorded.log)
        if name in LIKE_ANOTHER:  # the function reads only the shape of the other tensor
            other = args[1] if len(args) > 1 else kwargs["other"]
            shape = tuple(self._size(other, axis, size) for axis, size in enumerate(other.shape))
            self._recorded.log.append(UserCall(name, (None, shape), {}))
        else:
            arguments, options = (self._without_foreign(_without_tensors(value)) for value in (args, kwargs))
            self._recorded.log.append(UserCall(name, arguments, options))
        with traceback.annotate({"kirsch_call": number}):
            out = func(*args, **kwargs)
        read = args[:1] if name in LIKE_ANOTHER else (args, kwargs)  # reading a shape is not reading values
        inputs = {id(value) for value in tree_leaves(read) if isinstance(value, torch.Tensor)}
        for tensor in inputs:
            for sibling in self._siblings.get(tensor, (tensor,)):
                self.unread.pop(sibling, None)
        several = isinstance(out, (tuple, list))
        if several:
            results = [id(tensor) for tensor in out if isinstance(tensor, torch.Tensor)]
            self._siblings.update(dict.fromkeys(results, results))
        for index, tensor in enumerate(out if several else (out,)):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in inputs:
                self._recorded.origin[id(tensor)] = (number, index if several else None)
                self._alive.append(tensor)
                self.unread[id(tensor)] = tensor
        return out

    def _without_foreign(self, value: Any) -> Any:
        """Return arguments with plain numbers in place of traced integers that the code has cached in another trace."""
        foreign = isinstance(value, TracedInt) and value.events is not self._recorded.events
        if isinstance(value, (tuple, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            result = {key: self._without_foreign(item) for key, item in items}
            return result if isinstance(value, dict) else tuple(result.values())
        return int.__int__(value) if foreign else value

    def _sizes(self, name: str, out: Any, args: Any, kwargs: Any) -> Any:
        """Return a shape, size or count that the code reads, as traced integers."""
        tensor = args[0]
        if isinstance(out, torch.SymInt):  # the size depends on values
            return out
        if not isinstance(out, int):
            return torch.Size([self._size(tensor, axis, size) for axis, size in enumerate(out)])
        if name in ("numel", "nelement"):
            sizes = [self._size(tensor, axis, size) for axis, size in enumerate(tensor.shape)]
            return functools.reduce(operator.mul, sizes, 1)
        if name == "__len__":  # Python converts the result to a plain number
            number = self._size(tensor, 0, out)
            if isinstance(number, TracedInt):
                number.lose()
            return out
        axis = args[1] if len(args) > 1 else kwargs["dim"]
        return self._size(tensor, axis % tensor.dim(), out)

    def _size(self, tensor: Any, axis: int, size: int) -> int:
        if isinstance(size, torch.SymInt):
            return size
        name = self._names.get(id(tensor), "")
        call, output = self._recorded.origin.get(id(tensor), (-1, None))
        if not name and call < 0:
            return size
        return TracedInt.leaf(size, SizeOf(call, output, axis, name), self._recorded.events)


def called_name(func: Any) -> str:
    """Return the name of a function, or the name of an operator of `torch.ops` without its overload."""
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return str(schema.name).rpartition("::")[2]
    return getattr(func, "__name__", str(func))


def _attention(*args: Any, **kwargs: Any) -> Any:
    """Run PyTorch's multi-head attention with recorded calls.

    The query is first viewed with the width that the module states, so that this width is recorded, too.
    """
    arguments = inspect.signature(nn.functional.multi_head_attention_forward).bind(*args, **kwargs).arguments
    query = arguments["query"]
    viewed = query.view(*query.shape[:-1], arguments["embed_dim_to_check"])
    for name in ("query", "key", "value"):  # keys and values that are the query itself are projected together with it
        arguments[name] = viewed if arguments[name] is query else arguments[name]
    with _ATTENTION_LOCK, mock.patch.object(nn.functional, "has_torch_function", _asks_no_mode):
        return nn.functional.multi_head_attention_forward(**arguments)


def _asks_no_mode(_tensors: Any) -> bool:
    """Replace `has_torch_function`; otherwise the attention would pass itself to the active function mode forever."""
    return False


_ATTENTION_LOCK = threading.Lock()
"""Held while a function of `torch.nn.functional` is replaced, so that another thread does not keep the replacement."""

LIKE_ANOTHER = frozenset(["view_as", "reshape_as", "expand_as"])
_COUNTS = frozenset(["size", "numel", "nelement", "__len__"])
_SHAPE = {getattr(torch.Tensor.shape, "__get__")}  # noqa: B009 - mypy does not find __get__ of this descriptor


def _without_tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, (list, tuple)):
        return tuple(_without_tensors(item) for item in value)
    if isinstance(value, dict):
        return {key: _without_tensors(item) for key, item in value.items()}
    return value


def traceable_copy(model: nn.Module, *, share_buffers: bool, training: bool) -> nn.Module:
    """Return a copy of a model in inference or training mode, with the parameters of the model itself.

    The copy keeps the hooks of the model, because they may change the outputs of a module.

    Args:
        model: the model to copy.
        share_buffers: whether the copy has the buffers of the model itself, too.
        training: the mode.

    Raises:
        ModelError: the model cannot be copied.
    """
    same = [*model.parameters(), *(model.buffers() if share_buffers else ())]
    copied = copy_of(model, {id(tensor): tensor for tensor in same})
    return plain_module_of(copied.train(training))


def record_calls(model: nn.Module, recorded: RecordedCalls) -> None:
    """Put traced integers into a model, and make its `forward` record all calls.

    `forward` then returns two lists: the output tensors of the model, and the tensors that are computed and never
    read.
    """
    for path, module in model.named_modules():
        replace_integers(
            module, path, lambda size, leaf: TracedInt.leaf(size, leaf, recorded.events) if size > 1 else size
        )
        from_torch = type(module).__module__.startswith("torch.nn.")
        for name, value in list(vars(module).items()):
            if not name.startswith("_") and (not from_torch or name in WIDTHS):
                axis = _axis_of(module, name)
                if axis is not None and type(value) is int and value > 1:
                    size = SizeOf(-1, None, axis, f"{path}.weight".lstrip("."))
                    traced: Any = TracedInt.leaf(value, size, recorded.events)
                else:
                    traced = _traced(value, path, name, recorded.events)
                if traced is not value:
                    setattr(module, name, traced)
        module.forward = _recording(module.forward, path, recorded)
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        for record in (recorded.log, recorded.events, recorded.module_calls, recorded.origin):
            record.clear()
        # The names are looked up in each call, because the exporter replaces the tensors with fake ones before it calls
        # `forward`.
        names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        with CallRecorder(recorded, names) as recorder:
            out = original(*args, **kwargs)
        tensors = named(out)
        recorded.outputs = tuple(tensors)
        outputs = {id(tensor) for tensor in tensors.values()}
        # The exporter drops operations that no output depends on, but `forward` still runs them after a cut.
        return list(tensors.values()), [tensor for key, tensor in recorder.unread.items() if key not in outputs]

    model.forward = forward


def _axis_of(module: nn.Module, name: str) -> int | None:
    """Return the axis of a standard layer's weight whose size an attribute states; None if there is no such axis.

    Such an attribute always equals the size of the axis, so it is traced as that size; see `surgery.cut.update_widths`.
    """
    if module._parameters.get("weight") is None:  # noqa: SLF001 - a parametrized weight is an attribute, too
        return None
    axes: tuple[str, ...] = ()
    if isinstance(module, nn.Linear):
        axes = ("out_features", "in_features")
    elif isinstance(module, nn.modules.conv._ConvNd):  # noqa: SLF001 - the common base of all convolutions
        axes = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        axes = axes[:1] if module.groups > 1 else axes  # the second axis then counts the channels of one group
    elif isinstance(module, nn.modules.batchnorm._NormBase):  # noqa: SLF001 - likewise
        axes = ("num_features",)
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        axes = ("num_embeddings", "embedding_dim")
    return axes.index(name) if name in axes else None


def _traced(value: Any, path: str, name: str, events: list[LostOrigin | Comparison]) -> Any:
    if type(value) is int and value > 1:
        return TracedInt.leaf(value, Leaf(path, name), events)
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        return type(value)(
            TracedInt.leaf(item, Leaf(path, name, index), events) if item > 1 else item
            for index, item in enumerate(value)
        )
    return value


def _recording(forward: Callable[..., Any], path: str, recorded: RecordedCalls) -> Callable[..., Any]:
    """Return a `forward` function that records its calls, and the innermost module in which an exception is raised."""

    @functools.wraps(forward)
    def recording(*args: Any, **kwargs: Any) -> Any:
        try:
            out = forward(*args, **kwargs)
        except Exception:
            recorded.failed_in = recorded.failed_in or path or "the model itself"
            raise
        arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        tensors = tuple(
            TensorArgument(key, recorded.origin.get(id(value), (-1, None))[0], tuple(value.shape))
            for key, value in arguments
            if isinstance(value, torch.Tensor)
        )
        several = type(out) in (tuple, list) and bool(out) and isinstance(out[0], torch.Tensor)
        result = "tensor" if isinstance(out, torch.Tensor) else "first" if several else "other"
        recorded.module_calls.setdefault(path, []).append(ModuleCall(tensors, len(arguments) == 1, result))
        return out

    return recording


def set_integer(model: nn.Module, leaf: Leaf, value: int) -> None:
    """Set an integer attribute of a module to a new value."""
    module = model.get_submodule(leaf.module)
    if leaf.attribute.startswith(NUMBERS):
        set_graph_integer(module, leaf, value)
        return
    if leaf.index is None:
        setattr(module, leaf.attribute, value)
        return
    old = getattr(module, leaf.attribute)
    items = list(old)
    operator.setitem(items, leaf.index, value)
    setattr(module, leaf.attribute, type(old)(items))
