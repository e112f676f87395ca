"""Run a model in one floating-point dtype and without dropout, so that two models can be compared closely."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kirsch.frameworks.pytorch.analysis.traced import Traced


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a floating-point tensor in a dtype, detached; any other value unchanged."""
    return value.detach().to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def limits_of_the_trace(traced: Traced, dtype: torch.dtype) -> Iterator[None]:
    """Make `torch.finfo` return the limits of the dtype of the trace, because the traced program has them as constants.

    This is done only if all floating-point values of the trace have the same dtype.
    """
    values = [value for node in traced.program.graph.nodes for value in tree_leaves(node.meta.get("val"))]
    types = {value.dtype for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()}
    original: Any = torch.finfo
    if len(types) == 1:
        traced_type = types.pop()

        def finfo(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map(lambda value: traced_type if value is dtype else value, (args, kwargs))
            return original(*args, **kwargs)

        setattr(torch, "finfo", finfo)  # noqa: B010 - mypy does not allow the assignment
    try:
        yield
    finally:
        setattr(torch, "finfo", original)  # noqa: B010 - likewise


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
            args, options = tree_map(self._cast, (args, options))
        out = func(*args, **options)
        creates = not any(isinstance(value, torch.Tensor) for value in tree_leaves((args, options)))
        return tree_map(self._cast, out) if creates else out

    def _cast(self, value: Any) -> Any:
        return cast(value, self._dtype) if isinstance(value, torch.Tensor) else value


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
