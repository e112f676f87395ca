"""Run a model in one floating-point dtype and without dropout, so that two models can be compared closely."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kirsch.frameworks.pytorch.analysis.traced import Traced


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a floating-point tensor in a dtype, detached; any other value unchanged."""
    return value.detach().to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _floating_type(values: Iterable[Any]) -> torch.dtype | None:
    """Return the dtype of the floating-point tensors among the values; None without or with several such dtypes."""
    types = {value.dtype for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()}
    return types.pop() if len(types) == 1 else None


@contextlib.contextmanager
def constants_of_the_trace(traced: Traced, dtype: torch.dtype) -> Iterator[None]:
    """Make the code of the model create the constants that the traced program has.

    Code such as `torch.finfo(x.dtype)` reads the dtype of its input. In the verification this is `dtype`; in the trace
    it was another one, whose limits and rounded constants the traced program contains.
    """
    traced_type = _floating_type(traced.program.constants.values())
    with _limits_of_the_trace(traced, dtype), _RoundedConstants(dtype, traced_type):
        yield


@contextlib.contextmanager
def _limits_of_the_trace(traced: Traced, dtype: torch.dtype) -> Iterator[None]:
    """Make `torch.finfo` return the limits of the dtype of the trace, because the traced program has them as constants.

    This is done only if all floating-point values of the trace have the same dtype.
    """
    values = [value for node in traced.program.graph.nodes for value in tree_leaves(node.meta.get("val"))]
    traced_type = _floating_type(values)
    original: Any = torch.finfo
    if traced_type is not None:

        def finfo(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map(lambda value: traced_type if value is dtype else value, (args, kwargs))
            return original(*args, **kwargs)

        setattr(torch, "finfo", finfo)  # noqa: B010 - mypy does not allow the assignment
    try:
        yield
    finally:
        setattr(torch, "finfo", original)  # noqa: B010 - likewise


class _RoundedConstants(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch has no annotations here
    """Round tensors that code creates from numbers in one floating dtype to the dtype of the traced constants."""

    def __init__(self, dtype: torch.dtype, traced_type: torch.dtype | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self._traced_type = traced_type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default and out.dtype is self._dtype and self._traced_type is not None:
            return out.to(self._traced_type).to(self._dtype)
        return out


class OneType(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch has no annotations here
    """Compute all operations in one floating dtype, also where the model's code converts to another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        options = dict(kwargs or {})
        if isinstance(options.get("dtype"), torch.dtype) and options["dtype"].is_floating_point:
            options["dtype"] = self._dtype
        if not func._schema.is_mutable:  # noqa: SLF001 - has no public name
            args, options = mapped(self._cast, args), mapped(self._cast, options)
        out = func(*args, **options)
        return out if has_tensor(args) or has_tensor(options) else mapped(self._cast, out)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        right = tensor.dtype is self._dtype or not tensor.is_floating_point()
        return tensor if right else tensor.to(self._dtype)


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return the arguments or results of an operation with a function applied to the tensors.

    These are tensors, lists, tuples and dicts of them, and other values; `tree_map` takes ten times as long.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: mapped(function, item) for name, item in value.items()}
    return type(value)([mapped(function, item) for item in value]) if type(value) in (list, tuple) else value


def has_tensor(value: Any) -> bool:
    """Return whether the arguments of an operation contain a tensor."""
    if isinstance(value, dict):
        return any(map(has_tensor, value.values()))
    return any(map(has_tensor, value)) if isinstance(value, (list, tuple)) else isinstance(value, torch.Tensor)


class WithoutDropout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replace Bernoulli draws with their means, because two models of different widths would draw different numbers.

    Dropout then keeps all entries.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        name = func._schema.name.removeprefix("aten::")  # noqa: SLF001 - has no public name
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name in ("bernoulli", "bernoulli_"):
            default = 0.5 if name == "bernoulli_" else args[0]  # PyTorch omits arguments that equal the default
            mean = args[1] if len(args) > 1 else default
            return (args[0] if name == "bernoulli_" else torch.empty_like(args[0])).copy_(torch.as_tensor(mean))
        return func(*args, **(kwargs or {}))
