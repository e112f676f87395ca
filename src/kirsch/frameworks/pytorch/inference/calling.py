"""Arguments of a model's forward, and why a model does not run on its inputs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from kirsch.errors import DataError, ModelError, UsageError, error_text
from kirsch.failures import error_with_location
from kirsch.frameworks.structure import look

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

NCHW = 4
COLORS = (1, 3, 4)
UNFIT = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What the forward of a model raises on inputs of a wrong shape."""

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.bool)
"""Types of whole numbers that neither layers with float weights nor embeddings take."""


CASTS = {torch.float32: "float()", torch.float64: "double()", torch.float16: "half()", torch.bfloat16: "bfloat16()"}
"""Methods of a tensor or a model that convert it to a type."""

LOOKED_UP = "Numbers that an embedding looks up, such as those of tokens, must be int64."


def looks_up(error: BaseException) -> bool:
    """Whether an embedding was given other numbers than integers."""
    return "'indices'" in str(error)


def fix_of_looked_up(args: Any, options: Any) -> str:
    """Return how to give an embedding its integers, on the command line too, by the shape of the floating input."""
    named = [("", part) for part in tree_leaves(args)] + [(f"{name}=", part) for name, part in options.items()]
    floating = [(name, part) for name, part in named if isinstance(part, torch.Tensor) and part.is_floating_point()]
    name, sizes = "", "1,24"
    if len(floating) == 1:
        name, sizes = floating[0][0], ",".join(map(str, floating[0][1].shape))
    return f"{LOOKED_UP[:-1]}: --input {name}{sizes}:int64 on the command line."


def fitted(model: nn.Module, args: Any, options: Any, asked: Any) -> tuple[Any, Any]:
    """The arguments as the forward of a model takes them.

    The only entry of a dict is the first argument where the forward has no argument of its name: loaders call it
    "image" or "x", whatever the model calls it.

    Args:
        model: whose forward is called.
        args, options: by place and by name.
        asked: further keywords, which the forward is known to take.

    Raises:
        UsageError: the forward does not have these arguments.
    """
    found = _parameters(model) if options else None
    if found is None:
        return args, {**options, **asked}
    known = [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [name for name in options if name not in known]
    if unknown and len(options) == 1 and not args and any(p.kind <= p.POSITIONAL_OR_KEYWORD for p in found):
        return (options[unknown[0]],), dict(asked)
    if unknown and not any(p.kind == p.VAR_KEYWORD for p in found):
        raise _unfit(model, known, args, options)
    return args, {**options, **asked}


def unknown(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of some names that the forward does not have, of two or more; a single one is its first argument."""
    known = {p.name for p in _parameters(model) or []}
    return [name for name in names if name not in known] if known and len(names) > 1 else []


def _parameters(model: nn.Module) -> list[inspect.Parameter] | None:
    """The parameters of a model's forward; None where it does not say."""
    try:
        found = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # TorchScript, for one
        return None
    return found if any(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in found) else None


def _unfit(model: nn.Module, known: list[str], args: Any, options: Any) -> UsageError:
    given = [f"{len(args)} by place"] * bool(args) + [f"{', '.join(options)} by name"] * bool(options)
    why = "The entries of a dict are given to the model by their names, but for labels and ids."
    fix = "Rename the entries or leave out those that the model does not take, or give batches of (inputs, targets)."
    if len(args) < len(known) and not options:
        why = "Of a batch (a, b, c) the model is given a; b are the targets and c the numbers of the samples."
        entries = ", ".join(f'"{name}": ...' for name in [*known, "labels"])
        fix = f"Give batches as a dict that names the inputs of the model: {{{entries}}}."
    return UsageError(
        f"The forward of {type(model).__name__} takes {', '.join(known) or 'no arguments'}; the batches give "
        f"{' and '.join(given)}.",
        why,
        fix,
    )


def explained(model: nn.Module, args: Any, options: Any, error: Exception) -> UsageError | None:
    """Why a model does not run on what it is given, by the look of its inputs; None where that does not tell.

    Args:
        model: that was called.
        args, options: what it was given.
        error: what it raised.
    """
    name = type(model).__name__
    parts = [part for part in tree_leaves((args, options)) if isinstance(part, torch.Tensor)]
    own, given = _floating(model.parameters()), _floating(parts)
    if isinstance(error, TypeError):
        try:
            inspect.signature(model.forward).bind(*args, **options)
        except TypeError:
            return _unfit(model, [p.name for p in _parameters(model) or []], args, options)
        except ValueError:
            return None
    if own and given and not own & given:
        types = [" and ".join(sorted(map(_plain, found))) for found in (own, given)]
        return UsageError(
            f"{name} computes in {types[0]}, and its inputs are {types[1]}.",
            error_text(error),
            _fix_of_types(own, given),
        )
    whole = _whole(parts, error) if own and not given else None
    if whole is not None:
        return UsageError(
            f"{name} computes in {_plain(next(iter(own)))}, and its inputs are {look(whole)}, values "
            f"{int(whole.min())} to {int(whole.max())}.",
            error_text(error),
            _fix_of_whole(whole),
        )
    return None


def fix_of_inputs(model: nn.Module, args: Any, options: Any, error: Exception) -> str:
    """Return how to change inputs that a model raises on, by their type or layout; "" where those do not tell."""
    parts = [part for part in tree_leaves((args, options)) if isinstance(part, torch.Tensor)]
    own, given = _floating(model.parameters()), _floating(parts)
    if own and given and not own & given and "type" in str(error):
        return _fix_of_types(own, given)
    whole = _whole(parts, error) if own and not given else None
    return _fix_of_whole(whole) if whole is not None else _fix_of_layout(parts)


def without_values(model: nn.Module, args: Any, options: Any) -> tuple[str, str] | None:
    """Return why inputs and a model do not fit of which only one lies on the meta device, and the fix; None if not."""
    empty = next((name for name, value in model.named_parameters() if value.is_meta), None)
    given = any(part.is_meta for part in tree_leaves((args, options)) if isinstance(part, torch.Tensor))
    if given and empty is None:
        return (
            "The example inputs lie on the meta device and have no values.",
            "Give inputs with values, such as torch.randn(inputs.shape).",
        )
    if empty is not None and not given:
        return f"Its parameter `{empty}` lies on the meta device and has no values.", "Load its weights first."
    return None


def _floating(values: Iterable[torch.Tensor]) -> set[torch.dtype]:
    return {value.dtype for value in values if value.is_floating_point()}


def _fix_of_types(own: set[torch.dtype], given: set[torch.dtype]) -> str:
    wanted = torch.float32 if torch.float32 in own else min(own, key=str)
    name, method = _plain(wanted), CASTS.get(wanted, f"to({wanted})")
    array = "" if wanted is torch.bfloat16 else f"inputs.astype(numpy.{name}) of an array, "  # numpy lacks it
    other = "; or bring the model to theirs: model.float()" if given == {torch.float32} else ""
    return f"Give inputs in {name}: {array}inputs.{method} of a tensor{other}."


def _whole(parts: Sequence[torch.Tensor], error: Exception) -> torch.Tensor | None:
    """The first input of whole numbers, where these are at fault."""
    whole = next((part for part in parts if part.dtype in WHOLE or not part.is_floating_point()), None)
    return whole if whole is not None and (whole.dtype in WHOLE or "type" in str(error)) else None


def _fix_of_whole(whole: torch.Tensor) -> str:
    scale = " and scaled as in its training, for example inputs.astype(numpy.float32) / 255"
    return f"Give inputs of floating type{scale if whole.dtype == torch.uint8 else ''}; numbers of tokens as int64."


def _fix_of_layout(parts: Iterable[Any]) -> str:
    images = [part for part in parts if getattr(part, "ndim", 0) == NCHW]
    if not any(part.shape[-1] in COLORS and part.shape[1] not in COLORS for part in images):
        return ""
    axes = (0, 3, 1, 2)
    return (
        f"These images have their channels last. Where the model takes them first, give inputs.transpose{axes} of an "
        f"array, inputs.permute{axes} of a tensor."
    )


def not_running(model: nn.Module, inputs: Any, error: Exception) -> ModelError:
    """The error for a model that raises on a batch, whatever it raises."""
    fix = _fix_of_layout(tree_leaves(inputs)) or (
        "Give each batch as the forward of the model takes it, padded or resized where it has one size; try "
        "model(inputs) by itself."
    )
    if looks_up(error):
        fix = LOOKED_UP
    elif isinstance(error, IndexError):
        fix = "If these are numbers of tokens, compare the vocabulary of the tokenizer with that of the model."
    return ModelError(
        f"{type(model).__name__} does not run on a batch whose inputs are {look(inputs)}.",
        error_with_location(error),
        fix,
    )


def one_sample(model: nn.Module, error: Exception) -> DataError:
    """The error for a batch of one sample, which batch normalization cannot be trained on."""
    return DataError(
        f"A batch has one sample, and {type(model).__name__} normalizes over the samples of a batch.",
        error_text(error),
        "Give the DataLoader drop_last=True, or a batch size that does not leave one sample over; ArrayData joins such "
        "a sample to the batch before.",
    )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
