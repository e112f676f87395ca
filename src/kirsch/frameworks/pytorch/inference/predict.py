"""Outputs of a model in inference mode."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from kirsch.errors import DataError, KirschError, UsageError, error_text
from kirsch.failures import lacks_memory
from kirsch.frameworks.annotations import ONLY_NUMBERS
from kirsch.frameworks.predictions import logits_output
from kirsch.frameworks.pytorch.inference.calling import UNFIT, explained, fitted, not_running, one_sample
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.modules.modes import set_modes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Call:
    """Example inputs of which some are positional and some are keyword arguments, as a part of a model may take."""

    args: tuple[Any, ...]
    options: dict[str, Any]


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments; numpy arrays become tensors."""
    if isinstance(example_inputs, Call):
        return example_inputs.args, dict(example_inputs.options)
    if isinstance(example_inputs, Mapping):  # a tokenizer returns a UserDict, which is not a dict
        return (), _tensors_for_numpy(dict(example_inputs))
    return _tensors_for_numpy(
        tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    ), {}


def _tensors_for_numpy(inputs: Any) -> Any:
    return tree_map(lambda value: _from_numpy(value) if isinstance(value, np.ndarray) else value, inputs)


def _from_numpy(array: NDArray[Any]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array) if array.ndim else array)
    except TypeError:
        what = f"An input is an array of dtype {array.dtype} and shape {array.shape}."
        raise UsageError(what, fix=ONLY_NUMBERS) from None


def copied(inputs: Any) -> Any:
    """Inputs that a model may write into."""
    return tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, inputs)


def called(model: nn.Module, args: Any, options: Any, asked: Any = MappingProxyType({})) -> Any:
    """What a model puts out, with further keywords that it is asked by.

    Raises:
        UsageError: it does not run, and its inputs are of another type than it computes in, are called otherwise than
            its arguments, or lack those of a decoder.
        DataError: it normalizes over the batch, in training mode, and the batch has one sample.
        ModelError: it does not run for another reason, such as the shapes of its inputs.
    """
    args, options = fitted(model, args, options, asked)
    try:
        return model(*args, **options)
    except UNFIT as error:
        if lacks_memory(error):  # the caller may try a smaller batch
            raise
        raise _reason(model, args, options, asked, error) from error


def _reason(model: nn.Module, args: Any, options: Any, asked: Any, error: Exception) -> KirschError:
    """The error for a model that raises on these arguments."""
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return one_sample(model, error)
    decodes = isinstance(error, ValueError) and getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if decodes and not any(name.startswith("decoder_input") for name in options):
        return UsageError(
            f"{type(model).__name__} has a decoder, and the batches have no decoder_input_ids for it.",
            error_text(error),
            "Give DataCollatorForSeq2Seq the model, or model.prepare_decoder_input_ids_from_labels(labels=labels).",
        )
    reason = explained(model, args, options, error) if isinstance(error, (RuntimeError, TypeError)) else None
    if reason is not None:
        return reason
    named_inputs = {name: value for name, value in options.items() if name not in asked}
    return not_running(model, named_inputs or (args[0] if len(args) == 1 else args), error)


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """The model in inference mode; each module gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
    except NotImplementedError:  # of torch.export, whose mode is the one that it was exported in
        model.training = False
    try:
        yield
    finally:
        set_modes(modes)


def run(model: nn.Module, args: Any, options: Any) -> list[torch.Tensor]:
    """All tensors that a model puts out in its present mode, without gradient; it may write into its inputs."""
    args, options = copied((args, options))
    with torch.no_grad():
        return list(named(model(*args, **options)).values())


def logits_of(outputs: Any) -> Any:
    """Return the logits among the outputs of a model, a tensor; see `logits_output`.

    Raises:
        UsageError: there are no tensors, or their names do not tell which are the logits.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    direct = getattr(outputs, "logits", None)
    if isinstance(direct, torch.Tensor):  # most models; their other outputs may be many
        return direct
    found = named(outputs)
    if not found:
        raise UsageError(
            f"The model returns a {type(outputs).__name__} without tensors, so there are no logits.",
            fix="Give a model that returns its logits, in inference mode as well as in training.",
        )
    return found[logits_output(list(found))]


def logits_of_each(models: Iterable[nn.Module], args: Any, options: Any) -> list[Any]:
    """The scores of several models for the same inputs, into which one may write without the next seeing it."""
    found = []
    for model in models:
        own_args, own_options = copied((args, options))
        found.append(logits_of(called(model, own_args, own_options)))
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where a model lies: the device of its first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def tensors(inputs: Any, model: nn.Module) -> Any:
    """One batch, of numpy or of PyTorch, as tensors where the model lies."""
    device = device_of(model)
    return tree_map(lambda value: on(device, value), inputs)


def on(device: torch.device, array: Any) -> Any:
    """An array, of numpy or of PyTorch, on a device; anything else as it is."""
    if isinstance(array, np.ndarray):
        return _from_numpy(array).to(device)
    return array.to(device) if isinstance(array, torch.Tensor) else array


def infer(run: Any, inputs: Any) -> Any:
    """What a model in inference mode, or a watch of one, gives for one batch, without gradient; it moves there."""
    first = next(value for value in tree_leaves(inputs) if isinstance(value, torch.Tensor))
    getattr(run, "model", run).to(first.device)
    with torch.no_grad():
        if isinstance(run, nn.Module):
            args, options = arguments(copied(inputs))
            return logits_of(called(run, args, options))
        return run(inputs)


def predict(model: nn.Module, inputs: Any, *, batch_size: int = 256) -> NDArray[Any]:
    """Scores of a classifier in inference mode.

    Args:
        model: any mode; it keeps it.
        inputs: an array of shape (N, ...), of numpy or PyTorch, or a tuple or dict of such.
        batch_size: samples at a time.

    Returns:
        Floating array of shape (N, K).

    Raises:
        DataError: there are no samples.
    """
    count = len(next(leaf for leaf in tree_leaves(inputs) if hasattr(leaf, "shape")))
    if not count:
        raise DataError("There is nothing to predict: the inputs have no samples.")
    out = []
    with inference(model):
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            part = tree_map(lambda value, rows=rows: value[rows] if hasattr(value, "shape") else value, inputs)
            out.append(infer(model, tensors(part, model)).float().cpu().numpy())
    return np.concatenate(out)
