"""Where the integers of a forward come from: which module attribute, which tensor's size, or a number in the code.

A twin of the model, sharing its tensors, gets every integer attribute replaced by a `TracedInt` that remembers
its leaf through arithmetic. While the twin is exported, a function mode sees each call that the user's code makes,
notes the integers in its arguments, and marks the graph nodes that come of it with the number of the call. The sizes
that the code reads (`x.shape[1]`) are `TracedInt`s too.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import traceback
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kirsch.frameworks.pytorch.analysis.integers import Compared, Lost, TracedInt
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.modules.interpreted import NUMBERS, plain_module_of, replace_integers, set_integer
from kirsch.graph.expression import Leaf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# The attributes of PyTorch's own layers that speak of channels; strides, paddings and the like are left alone.
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


@dataclass(frozen=True)
class SizeOf:
    """Axis `axis` of what call `call` put out, or of the parameter or buffer `name`.

    `place`: which of several tensors that the call put out; None if it put out one.
    """

    call: int
    place: int | None
    axis: int
    name: str = ""


@dataclass(frozen=True)
class Call:
    """A call of the user's code that made nodes of the graph.

    Args:
        name: of the function, such as "view".
        arguments: without tensors; integers may be `TracedInt`.
        options: keyword arguments, likewise.
    """

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def integers(self) -> list[int]:
        """All integers among the arguments, in order."""
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
class Given:
    """A tensor that a module is called with: its place or keyword, the call that put it out (-1: none), its shape."""

    argument: int | str
    origin: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entered:
    """One call of a module.

    Args:
        tensors: that it is called with.
        alone: whether it has one argument only.
        result: "tensor", "first" for a tuple or list that begins with one, "other".
    """

    tensors: tuple[Given, ...]
    alone: bool
    result: str


@dataclass
class Calls:
    """What the function mode saw.

    Args:
        log: the calls, by number.
        failed_in: path of the module in whose forward an exception passed, "" if none.
        outputs: names of the tensors that the model puts out.
        lost: where an integer with a past became a plain number, or was compared.
        entered: path of each module → its calls.
        origin: identity of each tensor → the call that put it out, and its place if that put out several.
    """

    log: list[Call] = field(default_factory=list)
    lost: list[Lost | Compared] = field(default_factory=list)
    failed_in: str = ""
    outputs: tuple[str, ...] = ()
    entered: dict[str, list[Entered]] = field(default_factory=dict)
    origin: dict[int, tuple[int, int | None]] = field(default_factory=dict)


class Watch(TorchFunctionMode):
    """Notes calls, marks their nodes, and hands out sizes that remember their tensor."""

    def __init__(self, calls: Calls, names: Mapping[int, str]) -> None:
        super().__init__()
        self._calls = calls
        self._names = names
        self._alive: list[Any] = []  # an id is only unique while its tensor lives
        self._together: dict[int, list[int]] = {}  # results of one call: what reads one keeps the call
        self.unread: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call."""
        kwargs = kwargs or {}
        name = _called(func)
        if func in _SHAPE or name in _COUNTS:
            return self._sizes(name, func(*args, **kwargs), args, kwargs)
        if name.startswith("sym_"):  # arithmetic with sizes that depend on values
            return func(*(int(value) if isinstance(value, TracedInt) else value for value in args), **kwargs)
        if func is nn.functional.multi_head_attention_forward:
            with self:  # it reads sizes and computes with them, as the code of a user does
                return _attention(*args, **kwargs)
        number = len(self._calls.log)
        if name in LIKE_ANOTHER:  # the other tensor stands for its shape
            other = args[1] if len(args) > 1 else kwargs["other"]
            shape = tuple(self._size(other, axis, size) for axis, size in enumerate(other.shape))
            self._calls.log.append(Call(name, (None, shape), {}))
        else:
            given, options = (self._own(_without_tensors(value)) for value in (args, kwargs))
            self._calls.log.append(Call(name, given, options))
        with traceback.annotate({"kirsch_call": number}):
            out = func(*args, **kwargs)
        read = args[:1] if name in LIKE_ANOTHER else (args, kwargs)  # a shape is not a value
        given = {id(value) for value in tree_leaves(read) if isinstance(value, torch.Tensor)}
        for tensor in given:
            for result in self._together.get(tensor, (tensor,)):
                self.unread.pop(result, None)
        several = isinstance(out, (tuple, list))
        if several:
            together = [id(tensor) for tensor in out if isinstance(tensor, torch.Tensor)]
            self._together.update(dict.fromkeys(together, together))
        for place, tensor in enumerate(out if several else (out,)):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in given:
                self._calls.origin[id(tensor)] = (number, place if several else None)
                self._alive.append(tensor)
                self.unread[id(tensor)] = tensor
        return out

    def _own(self, value: Any) -> Any:
        """Arguments in which integers of another trace, as out of a cache of the code, are plain numbers."""
        foreign = isinstance(value, TracedInt) and value.lost is not self._calls.lost
        if isinstance(value, (tuple, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            made = {key: self._own(item) for key, item in items}
            return made if isinstance(value, dict) else tuple(made.values())
        return int.__int__(value) if foreign else value

    def _sizes(self, name: str, out: Any, args: Any, kwargs: Any) -> Any:
        """The shape, size or count just read, with its past."""
        tensor = args[0]
        if isinstance(out, torch.SymInt):  # it depends on values
            return out
        if not isinstance(out, int):
            return torch.Size([self._size(tensor, axis, size) for axis, size in enumerate(out)])
        if name in ("numel", "nelement"):
            sizes = [self._size(tensor, axis, size) for axis, size in enumerate(tensor.shape)]
            return functools.reduce(operator.mul, sizes, 1)
        if name == "__len__":  # Python makes a plain number of it
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
        call, place = self._calls.origin.get(id(tensor), (-1, None))
        if not name and call < 0:
            return size
        return TracedInt.leaf(size, SizeOf(call, place, axis, name), self._calls.lost)


def _called(func: Any) -> str:
    """The name of a function, without the overload where it is an operator of `torch.ops`."""
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return str(schema.name).rpartition("::")[2]
    return getattr(func, "__name__", str(func))


def _attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """PyTorch's own attention, whose calls are seen one by one, and whose width must be that of the query."""
    names = ("key", "value", "embed_dim_to_check")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    seen = query.view(*query.shape[:-1], given["embed_dim_to_check"])
    for name in ("key", "value"):  # whether they are the query itself decides how they are projected
        given[name] = seen if given[name] is query else given[name]
    return _OPEN_ATTENTION(seen, **given, **dict(zip(_PARAMETERS[4:], args[3:], strict=False)))


# The function hands itself over to whoever watches it, and would do so for ever.
_OPEN_ATTENTION = FunctionType(
    nn.functional.multi_head_attention_forward.__code__,
    {**vars(nn.functional), "has_torch_function": lambda _: False},
    argdefs=nn.functional.multi_head_attention_forward.__defaults__,
)

_PARAMETERS = _OPEN_ATTENTION.__code__.co_varnames

LIKE_ANOTHER = frozenset(["view_as", "reshape_as", "expand_as"])
_COUNTS = frozenset(["size", "numel", "nelement", "__len__"])
_SHAPE = {getattr(torch.Tensor.shape, "__get__")}  # noqa: B009 - mypy knows no __get__ of this descriptor


def _without_tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, (list, tuple)):
        return tuple(_without_tensors(item) for item in value)
    if isinstance(value, dict):
        return {key: _without_tensors(item) for key, item in value.items()}
    return value


def twin_of(model: nn.Module, *, shared: bool, training: bool) -> nn.Module:
    """A copy of the model in inference or training mode, whose parameters and buffers may be those of the model.

    Its hooks run while it is traced, since they may change what a module puts out.

    Raises:
        ModelError: the model cannot be copied.
    """
    same: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]} if shared else {}
    twin = copy_of(model, same)
    return plain_module_of(twin.train(training))


def watched(twin: nn.Module, calls: Calls) -> None:
    """Plant traced integers in a twin and make its forward note every call.

    The forward then gives a pair: the tensors that the model puts out, and those that it computes and never reads.
    """
    for path, module in twin.named_modules():
        replace_integers(module, path, lambda size, leaf: TracedInt.leaf(size, leaf, calls.lost) if size > 1 else size)
        own = type(module).__module__.startswith("torch.nn.")
        for name, value in list(vars(module).items()):
            if not name.startswith("_") and (not own or name in WIDTHS):
                axis = _axis_of(module, name)
                if axis is not None and type(value) is int and value > 1:
                    size = SizeOf(-1, None, axis, f"{path}.weight".lstrip("."))
                    planted: Any = TracedInt.leaf(value, size, calls.lost)
                else:
                    planted = _planted(value, path, name, calls.lost)
                if planted is not value:
                    setattr(module, name, planted)
        module.forward = _locating(module.forward, path, calls)
    plain = twin.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        for seen in (calls.log, calls.lost, calls.entered, calls.origin):
            seen.clear()
        # Only now, since the exporter puts stand-ins in the places of the tensors.
        names = {id(t): name for name, t in [*twin.named_parameters(), *twin.named_buffers()]}
        with Watch(calls, names) as watch:
            out = plain(*args, **kwargs)
        tensors = named(out)
        calls.outputs = tuple(tensors)
        put_out = {id(tensor) for tensor in tensors.values()}
        # The exporter drops what no output depends on, but the forward goes on computing it after a cut.
        return list(tensors.values()), [tensor for key, tensor in watch.unread.items() if key not in put_out]

    twin.forward = forward


def _axis_of(module: nn.Module, name: str) -> int | None:
    """The axis of a standard layer's weight whose size an attribute states, as `surgery.cut.update_widths` sets it.

    Such an attribute cannot be given another value than the weight has, so it is a size that is read.
    """
    if module._parameters.get("weight") is None:  # noqa: SLF001 - a parametrized weight is an attribute, too
        return None
    axes: tuple[str, ...] = ()
    if isinstance(module, nn.Linear):
        axes = ("out_features", "in_features")
    elif isinstance(module, nn.modules.conv._ConvNd):  # noqa: SLF001 - as in `surgery.cut.update_widths`
        axes = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        axes = axes[:1] if module.groups > 1 else axes  # the second axis then has a part of them
    elif isinstance(module, nn.modules.batchnorm._NormBase):  # noqa: SLF001 - likewise
        axes = ("num_features",)
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        axes = ("num_embeddings", "embedding_dim")
    return axes.index(name) if name in axes else None


def _planted(value: Any, path: str, name: str, lost: list[Lost | Compared]) -> Any:
    if type(value) is int and value > 1:
        return TracedInt.leaf(value, Leaf(path, name), lost)
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        return type(value)(
            TracedInt.leaf(item, Leaf(path, name, place), lost) if item > 1 else item
            for place, item in enumerate(value)
        )
    return value


def _locating(forward: Callable[..., Any], path: str, calls: Calls) -> Callable[..., Any]:
    """The forward, noting how it is called and the innermost module in which an exception arises."""

    @functools.wraps(forward)
    def located(*args: Any, **kwargs: Any) -> Any:
        try:
            out = forward(*args, **kwargs)
        except Exception:
            calls.failed_in = calls.failed_in or path or "the model itself"
            raise
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        tensors = tuple(
            Given(key, calls.origin.get(id(value), (-1, None))[0], tuple(value.shape))
            for key, value in given
            if isinstance(value, torch.Tensor)
        )
        several = type(out) in (tuple, list) and bool(out) and isinstance(out[0], torch.Tensor)
        result = "tensor" if isinstance(out, torch.Tensor) else "first" if several else "other"
        calls.entered.setdefault(path, []).append(Entered(tensors, len(given) == 1, result))
        return out

    return located


def put(model: nn.Module, leaf: Leaf, value: int) -> None:
    """Give an integer attribute its new value."""
    module = model.get_submodule(leaf.module)
    if leaf.attribute.startswith(NUMBERS):
        set_integer(module, leaf, value)
        return
    if leaf.index is None:
        setattr(module, leaf.attribute, value)
        return
    old = getattr(module, leaf.attribute)
    items = list(old)
    operator.setitem(items, leaf.index, value)
    setattr(module, leaf.attribute, type(old)(items))
