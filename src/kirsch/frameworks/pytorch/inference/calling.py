"""Arguments of a model's `forward`, and errors that explain why a model does not run on its inputs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from kirsch.data.images import SCALE, has_channels_last, order_fix
from kirsch.data.structure import TARGETS, summary
from kirsch.errors import DataError, ModelError, UsageError, error_text
from kirsch.failures import error_with_location

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

UNFIT = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""Exceptions that the `forward` of a model raises for inputs of a wrong shape."""

SMALL_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.bool)
"""Dtypes that neither layers with floating-point weights nor embeddings take."""

EMBEDDING_INDICES = "The indices of an embedding, such as token ids, must be int64."

CASTS = {torch.float32: "float()", torch.float64: "double()", torch.float16: "half()", torch.bfloat16: "bfloat16()"}
"""Methods of a tensor or a model that convert it to a dtype."""


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
"""Kinds of parameters that need no argument."""


def is_embedding_error(error: BaseException) -> bool:
    """Return whether an embedding was called with indices that are not integers."""
    return "'indices'" in str(error)


def embedding_fix(args: Any, options: Any) -> str:
    """Return how to pass integer indices on the command line, with the shape of the floating-point input."""
    named = [("", part) for part in tree_leaves(args)] + [(f"{name}=", part) for name, part in options.items()]
    floating = [(name, part) for name, part in named if isinstance(part, torch.Tensor) and part.is_floating_point()]
    name, sizes = "", "1,24"
    if len(floating) == 1:
        name, sizes = floating[0][0], ",".join(map(str, floating[0][1].shape))
    return f"{EMBEDDING_INDICES[:-1]}: --input {name}{sizes}:int64 on the command line."


def fitted_arguments(model: nn.Module, args: Any, options: Any, extra: Any) -> tuple[Any, Any]:
    """Return positional and keyword arguments for the `forward` of a model; see `by_position`.

    Args:
        model: the model to call.
        args, options: positional and keyword arguments.
        extra: keyword arguments that `forward` is known to take.

    Raises:
        UsageError: `forward` does not have these arguments.
    """
    args, options = by_position(model, args, options)
    parameters = _parameters(model) if options else None
    if parameters is None:
        return args, {**options, **extra}
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [name for name in options if name not in known]
    if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters):
        raise _unfit(model, known, args, options)
    return args, {**options, **extra}


def by_position(model: nn.Module, args: Any, options: Any) -> tuple[Any, Any]:
    """Return the arguments with a single keyword argument as the first positional one if `forward` lacks its name.

    A loader may name its only input "image" although the argument of the model is `x`.
    """
    parameters = _parameters(model) if len(options) == 1 and not args else None
    known = {p.name for p in parameters or [] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    positional = any(p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters or [])
    return (tuple(options.values()), {}) if positional and not known & set(options) else (args, options)


def unknown_arguments(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names that `forward` does not take; empty for a single name, which becomes the first argument."""
    known = {p.name for p in _parameters(model) or []}
    return [name for name in names if name not in known] if known and len(names) > 1 else []


def named_arguments(model: nn.Module, inputs: Any) -> Any:
    """Return a tuple or list of inputs as a dict by the names of the arguments of `forward`.

    Other inputs, and those of a `forward` whose arguments have no names, are returned unchanged.
    """
    parameters = _parameters(model) or []
    known = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if not isinstance(inputs, (tuple, list)) or len(known) < len(inputs):
        return inputs
    names = [p.name for p in known[: len(inputs)]]
    return dict(zip(names, inputs, strict=True)) if known[: len(inputs)] == parameters[: len(inputs)] else inputs


def _parameters(model: nn.Module) -> list[inspect.Parameter] | None:
    """Return the parameters of a model's `forward`; None if they are not known."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # TorchScript, for example
        return None
    return parameters if any(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters) else None


def _unfit(model: nn.Module, known: list[str], args: Any, options: Any) -> UsageError:
    passed = [f"{len(args)} positional"] * bool(args) + [f"{', '.join(options)} by name"] * bool(options)
    why = "The entries of a dict, except labels and ids, are passed to the model as keyword arguments."
    fix = "Rename or remove the entries that the model does not take, or give batches of (inputs, targets)."
    needed = [p.name for p in _parameters(model) or [] if p.default is p.empty and p.kind not in VARIADIC]
    missing = [name for name in needed[len(args) :] if name not in options]
    if missing and set(options) <= set(known):
        fix = f"Add the missing entries: {', '.join(missing)}."
    if len(args) < len(known) and not options:
        why = "In a batch (a, b, c), a is the input of the model, b are the targets, and c the ids of the samples."
        entries = ", ".join(f'"{name}": ...' for name in [*known, "labels"])
        fix = f"Give batches as a dict with the names of the inputs of the model: {{{entries}}}."
    targets = next((name for name in missing if name in TARGETS), None)
    if targets is not None:
        why = "The labels of a batch are not passed to the model."
        fix = f"Give the argument a default: {targets}=None."
    return UsageError(
        f"The forward of {type(model).__name__} takes {', '.join(known) or 'no arguments'}; the batches have "
        f"{' and '.join(passed)}.",
        why,
        fix,
    )


def explained_error(model: nn.Module, args: Any, options: Any, error: Exception) -> UsageError | None:
    """Return an error that explains an exception by the names and types of a model's inputs; None for other causes.

    Args:
        model: the model that was called.
        args, options: positional and keyword arguments of the call.
        error: the exception that the model raised.
    """
    name = type(model).__name__
    parts = [part for part in tree_leaves((args, options)) if isinstance(part, torch.Tensor)]
    model_types, input_types = _floating(model.parameters()), _floating(parts)
    if isinstance(error, TypeError):
        try:
            inspect.signature(model.forward).bind(*args, **options)
        except TypeError:
            return _unfit(model, [p.name for p in _parameters(model) or []], args, options)
        except ValueError:
            return None
    if model_types and input_types and not model_types & input_types:
        types = [" and ".join(sorted(map(_dtype_name, dtypes))) for dtypes in (model_types, input_types)]
        return UsageError(
            f"{name} computes in {types[0]}, and its inputs are {types[1]}.",
            error_text(error),
            _fix_of_types(model_types, input_types),
        )
    integers = _integers(parts, error) if model_types and not input_types else None
    if integers is not None:
        return UsageError(
            f"{name} computes in {_dtype_name(next(iter(model_types)))}, and its inputs are {summary(integers)}, with "
            f"values from {int(integers.min())} to {int(integers.max())}.",
            error_text(error),
            _fix_of_integers(integers),
        )
    return None


def fix_of_inputs(model: nn.Module, args: Any, options: Any, error: Exception) -> str:
    """Return how to change the dtype or layout of inputs on which a model raises an exception; "" for other causes."""
    parts = [part for part in tree_leaves((args, options)) if isinstance(part, torch.Tensor)]
    model_types, input_types = _floating(model.parameters()), _floating(parts)
    if model_types and input_types and not model_types & input_types and "type" in str(error):
        return _fix_of_types(model_types, input_types)
    integers = _integers(parts, error) if model_types and not input_types else None
    return _fix_of_integers(integers) if integers is not None else _fix_of_layout(parts)


def without_values(model: nn.Module, args: Any, options: Any) -> tuple[str, str] | None:
    """Return (why, fix) if either the inputs or the model, but not both, are on the meta device; None otherwise."""
    empty = next((name for name, value in model.named_parameters() if value.is_meta), None)
    inputs_on_meta = any(part.is_meta for part in tree_leaves((args, options)) if isinstance(part, torch.Tensor))
    if inputs_on_meta and empty is None:
        return (
            "The example inputs are on the meta device and have no values.",
            "Give inputs with values, such as torch.randn(inputs.shape).",
        )
    if empty is not None and not inputs_on_meta:
        return f"Its parameter `{empty}` is on the meta device and has no values.", "Load its weights first."
    return None


def _floating(values: Iterable[torch.Tensor]) -> set[torch.dtype]:
    return {value.dtype for value in values if value.is_floating_point()}


def _fix_of_types(model_types: set[torch.dtype], input_types: set[torch.dtype]) -> str:
    dtype = torch.float32 if torch.float32 in model_types else min(model_types, key=str)
    name, method = _dtype_name(dtype), CASTS.get(dtype, f"to({dtype})")
    array = "" if dtype is torch.bfloat16 else f"inputs.astype(numpy.{name}) for arrays, "  # numpy lacks bfloat16
    other = "; or convert the model: model.float()" if input_types == {torch.float32} else ""
    return f"Give inputs in {name}: {array}inputs.{method} for tensors{other}."


def _integers(parts: Sequence[torch.Tensor], error: Exception) -> torch.Tensor | None:
    """Return the first integer input if integers are the cause of the error."""
    integers = next((part for part in parts if not part.is_floating_point()), None)
    caused = integers is not None and (integers.dtype in SMALL_INTEGERS or "type" in str(error))
    return integers if caused else None


def _fix_of_integers(integers: torch.Tensor) -> str:
    return SCALE if integers.dtype == torch.uint8 else "Give floating-point inputs; token ids as int64."


def _fix_of_layout(parts: Iterable[Any]) -> str:
    if not any(has_channels_last(getattr(part, "shape", ())) for part in parts):
        return ""
    return f"The images have their channels last, and the model may take channels first. {order_fix(uint8=False)}"


def not_running(model: nn.Module, inputs: Any, error: Exception) -> ModelError:
    """Return the error for a model that raises an exception on a batch."""
    fix = _fix_of_layout(tree_leaves(inputs)) or (
        "Give each batch in the form that the model takes, padded or resized to its input size. Check that "
        "model(inputs) runs."
    )
    if is_embedding_error(error):
        fix = EMBEDDING_INDICES
    elif isinstance(error, IndexError):
        fix = "If the inputs are token ids, compare the vocabulary of the tokenizer with that of the model."
    return ModelError(
        f"{type(model).__name__} does not run on a batch whose inputs are {summary(inputs)}.",
        error_with_location(error),
        fix,
    )


def one_sample(model: nn.Module, error: Exception) -> DataError:
    """Return the error for a batch of one sample, for which batch normalization has no variance."""
    return DataError(
        f"A batch has one sample, and {type(model).__name__} normalizes over the samples of a batch.",
        error_text(error),
        "Give batches of at least two samples: choose another batch size, or set drop_last=True in the DataLoader to "
        "leave out a last batch of one sample. ArrayData adds such a sample to the previous batch.",
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
